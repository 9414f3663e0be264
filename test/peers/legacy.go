package peers

import (
	"bytes"
	"compress/gzip"
	"crypto/rand"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
)

// The clients of the legacy era against server-everything. Each script takes the same steps and says what it saw in the
// same terms, so that what a gateway in between changes, or loses, shows.

// legacy is the revision that the clients must settle on, and legacyOlder the one that some ask for.
const (
	legacy      = "2025-11-25"
	legacyOlder = "2025-06-18"
)

// legacySeen is what a client saw in one session, from its beginning to its end.
type legacySeen struct {
	Revision string // that it settled on

	Roots [2]string // text of get-roots-list: with one root, and with two after notifications/roots/list_changed

	Tools      []string                     // names as listed, all pages
	Echo       string                       // text
	Structured map[string]any               // of get-structured-content
	Failing    bool                         // isError of a call that fails
	Unknown    string                       // of a tool that is not there: "error <code>", "isError" or "result"
	Progress   [][2]float64                 // progress and total of a long operation, in order
	Operation  string                       // its text, which came after
	Logged     struct{ Level, Data string } // a simulated log message; the level was debug
	Updated    bool                         // notifications/resources/updated named the URI that was subscribed to
	Quiet      bool                         // with the level error, the server's remark of level info about unsubscribing did not come
	Cancelled  bool                         // a long operation that was cancelled after its first progress ended with an error
	Pinged     bool                         // after that

	Prompts   []string    // names as listed
	Prompt    string      // text of args-prompt for a city and a state
	Completed [3][]string // departments with S; names in Sales; the resource id 7 of the template for texts

	Resources []string // names as listed
	Templates []string // names as listed
	Read      string   // text of features.md
	ReadURI   bool     // its URI was the one that was asked for
	Template  string   // text of the resource that the template for texts names for the id 7

	Sampled, SampledAsked   string // trigger-sampling-request: its text; what the client was asked
	Elicited, ElicitedAsked string // trigger-elicitation-request: its texts; what the client was asked
	Declined                string // its first text when the user declines

	Added string // blob of a resource that gzip-file-as-resource added, read after notifications/resources/list_changed

	Resumed          [][2]float64 // progress of the operation whose stream was cut after the first
	ResumedOperation string       // its text
}

// everythingTools are what server-everything offers a client that answers for sampling, elicitation and roots.
var everythingTools = []string{
	"echo", "get-annotated-message", "get-env", "get-resource-links", "get-resource-reference", "get-roots-list",
	"get-structured-content", "get-sum", "get-tiny-image", "gzip-file-as-resource", "simulate-research-query",
	"toggle-simulated-logging", "toggle-subscriber-updates", "trigger-elicitation-request",
	"trigger-long-running-operation", "trigger-sampling-request",
}

// everythingOptional are the tools that depend on what else an SDK declares by itself.
var everythingOptional = []string{"trigger-elicitation-request-async", "trigger-sampling-request-async", "trigger-url-elicitation"}

func (s legacySeen) check(t testing.TB, e Endpoint, revision string) {
	t.Helper()
	same := func(what string, got, want any) {
		t.Helper()
		g, _ := json.Marshal(got)
		w, _ := json.Marshal(want)
		if !bytes.Equal(g, w) {
			t.Errorf("%s: %s, want %s", what, g, w)
		}
	}
	has := func(what, got string, want ...string) {
		t.Helper()
		for _, w := range want {
			if !strings.Contains(got, w) {
				t.Errorf("%s: %q lacks %q", what, got, w)
			}
		}
	}
	// Of an endpoint that serves several servers, ours are what bears the prefix.
	ours := func(names []string) (bare []string) {
		for _, name := range names {
			if name, ok := strings.CutPrefix(name, e.Prefix); ok {
				bare = append(bare, name)
			}
		}
		slices.Sort(bare)
		return bare
	}
	among := func(what string, names []string, want ...string) {
		t.Helper()
		for _, w := range want {
			n := 0
			for _, name := range names {
				if name == w || name == e.Prefix+w {
					n++
				}
			}
			if n != 1 {
				t.Errorf("%s: %s is there %d times: %q", what, w, n, names)
			}
		}
	}

	same("revision", s.Revision, revision)
	has("roots", s.Roots[0], "(1 total)", "file:///waybill/one")
	has("roots after list_changed", s.Roots[1], "(2 total)", "file:///waybill/one", "file:///waybill/two")
	tools := everythingTools
	if e.MCPGo {
		tools = mcpGoTools
	}
	same("tools", slices.DeleteFunc(ours(s.Tools), func(name string) bool { return slices.Contains(everythingOptional, name) }), tools)
	same("echo", s.Echo, "Echo: grüße <&> 9007199254740993")
	same("get-structured-content", s.Structured, map[string]any{"temperature": 33, "conditions": "Cloudy", "humidity": 82})
	same("a failing call's isError", s.Failing, true)
	if e.Direct && !e.MCPGo {
		same("an unknown tool", s.Unknown, "isError")
	} else if s.Unknown != "error -32602" && s.Unknown != "isError" { // the gateway's own answer, or the server's
		t.Errorf("an unknown tool: %s", s.Unknown)
	}
	progress := func(what string, got [][2]float64, steps int) {
		t.Helper()
		var want [][2]float64
		for i := range steps {
			want = append(want, [2]float64{float64(i + 1), float64(steps)})
		}
		if e.dropsLast && len(got) == steps-1 {
			want = want[:steps-1]
		}
		if !e.MCPGo {
			same(what, got, want)
			return
		}
		// What mcp-go sends on the GET stream may come out of order, and too late for the call; but nothing twice.
		for i, p := range got {
			if !slices.Contains(want, p) || slices.Contains(got[:i], p) {
				t.Errorf("%s: %v", what, got)
			}
		}
	}
	progress("progress", s.Progress, 4)
	same("trigger-long-running-operation", s.Operation, "Long running operation completed. Duration: 0.2 seconds, Steps: 4.")
	if word, _, _ := strings.Cut(strings.ReplaceAll(strings.ToLower(s.Logged.Data), " ", "-"), "-"); word == "" || word != s.Logged.Level {
		t.Errorf("logged: %q with the level %q", s.Logged.Data, s.Logged.Level)
	}
	same("the updated resource is the subscribed one", s.Updated, true)
	same("quiet above the level", s.Quiet, true)
	same("cancelled", s.Cancelled, true)
	same("pinged after the cancellation", s.Pinged, true)

	among("prompts", s.Prompts, "simple-prompt", "args-prompt", "completable-prompt", "resource-prompt")
	same("args-prompt", s.Prompt, "What's weather in Zürich, ZH?")
	same("completions", s.Completed, [3][]string{{"Sales", "Support"}, {"David", "Eve", "Frank"}, {"7"}})
	among("resources", s.Resources, "architecture.md", "features.md", "startup.md")
	among("templates", s.Templates, "Dynamic Text Resource", "Dynamic Blob Resource")
	has("features.md", s.Read, "# Everything Server - Features", "trigger-sampling-request")
	same("the URI read is the one asked for", s.ReadURI, true)
	has("the templated resource", s.Template, "Resource 7: This is a plaintext resource created at")

	has("trigger-sampling-request", s.Sampled, "sampled: grüße", "waybill-model")
	has("what the client was asked to sample", s.SampledAsked, "what is a waybill?")
	has("trigger-elicitation-request", s.Elicited, "- Name: Ada", "- Agreed to terms: true", `"action": "accept"`)
	has("what the user was asked", s.ElicitedAsked, "provide inputs")
	has("trigger-elicitation-request, declined", s.Declined, "declined")

	if text, err := gunzip(s.Added); err != nil || text != "waybill" {
		t.Errorf("the added resource: %q, %v", text, err)
	}
	progress("progress, cut and resumed", s.Resumed, e.cutSteps())
	same("the operation, cut and resumed", s.ResumedOperation,
		fmt.Sprintf("Long running operation completed. Duration: %v seconds, Steps: %d.", cutOperation, e.cutSteps()))
}

func gunzip(blob string) (string, error) {
	r, err := gzip.NewReader(base64.NewDecoder(base64.StdEncoding, strings.NewReader(blob)))
	if err != nil {
		return "", err
	}
	text, err := io.ReadAll(r)
	return string(text), err
}

// ExerciseLegacyTypeScript takes the steps with a TypeScript SDK: "v1" or "v2".
func ExerciseLegacyTypeScript(t testing.TB, e Endpoint, sdk string) {
	t.Helper()
	// They hand notifications on a moment later than answers, which over HTTP come apart; with server-everything's own stdio
	// it is the same.
	e.dropsLast = e.Command != nil
	exerciseLegacyScript(t, e, sdk, func(args string) Output { return NodeScript(t, beside("legacy.mjs"), args) })
}

// ExerciseLegacyPython takes the steps with the Python SDK.
func ExerciseLegacyPython(t testing.TB, e Endpoint) {
	t.Helper()
	exerciseLegacyScript(t, e, "python", func(args string) Output { return python(t, beside("legacy.py"), args) })
}

// exerciseLegacyScript runs a script, whose argument says where and how, and checks what it printed and what the tap
// saw of it.
func exerciseLegacyScript(t testing.TB, e Endpoint, sdk string, run func(args string) Output) {
	t.Helper()
	tap := newTap(t, e, breakOff)
	args, err := json.Marshal(map[string]any{"command": e.command(tap.URL), "duration": cutOperation, "steps": e.cutSteps(), "sdk": sdk, "url": tap.URL, "prefix": e.Prefix, "unique": unique(), "token": e.Token})
	if err != nil {
		t.Fatal(err)
	}
	out := run(string(args))
	var s legacySeen
	if err := json.Unmarshal([]byte(out.Stdout), &s); err != nil || out.Exit != 0 {
		t.Fatalf("%s: exit %d, %v\n%s%s", sdk, out.Exit, err, out.Stdout, out.Stderr)
	}
	s.check(t, e, legacy)
	tap.check(t, e)
}

// beside names a file of this directory.
func beside(file string) string {
	_, here, _, _ := runtime.Caller(0)
	return filepath.Join(filepath.Dir(here), file)
}

// unique is a word that no other run uses.
func unique() string { return "waybill-" + rand.Text() }

// ExerciseLegacy takes the steps with every client, each a subtest beside the others.
func ExerciseLegacy(t *testing.T, e Endpoint) {
	t.Helper()
	for name, exercise := range map[string]func(testing.TB, Endpoint){
		"TypeScript v1": func(t testing.TB, e Endpoint) { ExerciseLegacyTypeScript(t, e, "v1") },
		"TypeScript v2": func(t testing.TB, e Endpoint) { ExerciseLegacyTypeScript(t, e, "v2") },
		"Inspector":     ExerciseLegacyInspector,
		"Python SDK":    ExerciseLegacyPython,
		"Go SDK":        func(t testing.TB, e Endpoint) { ExerciseLegacyGoSDK(t, e, legacy) },
		"Go SDK older":  func(t testing.TB, e Endpoint) { ExerciseLegacyGoSDK(t, e, legacyOlder) },
		"mcp-go":        ExerciseLegacyMCPGo,
		"HTTP":          func(t testing.TB, e Endpoint) { ExerciseLegacyHTTP(t, e, legacy) },
		"HTTP older":    func(t testing.TB, e Endpoint) { ExerciseLegacyHTTP(t, e, legacyOlder) },
	} {
		// This SDK resumes a stream of which the last event is an error, as if the answer were still to come. mcp-go then ends
		// the resumed stream, and the SDK listens once more beside its GET stream: the two end each other from there on.
		if name == "TypeScript v1" && e.Direct && e.MCPGo {
			continue
		}
		// This client cancels by leaving, which does not cancel (2025-11-25, transports): through a gateway the operation goes on, and
		// this server tells of changes on the stream of any call there is, of that one too, which nobody reads any more.
		if name == "mcp-go" && e.MCPGo && !e.Direct {
			continue
		}
		// These are their own transport.
		if e.Command != nil && strings.HasPrefix(name, "HTTP") {
			continue
		}
		// Its runs are slow, and say the same of either server.
		if name == "Inspector" && e.MCPGo {
			continue
		}
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			exercise(t, e)
		})
	}
}
