package peers

import (
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"testing"
)

// Clients of the legacy era, by others, at a server of the modern one, with a gateway in between: whether their types
// take what such a server says, and whether they see all that a session has.

// translatedSeen is what a client saw of everything-server without sessions.
type translatedSeen struct {
	Revision  string
	Tools     int       // how many
	Inputs    []string  // texts of the tools test_input_required_result_*, and of the prompt
	Progress  []float64 // of test_tool_with_progress
	Logged    string    // after logging/setLevel
	Changed   bool      // list_changed came
	Updated   string    // the resource of which an update came
	Resources int       // how many
	Read      string    // text of test://static-text
	Missing   int       // the error for a resource that is not there

	OddTools []string // of OddServer
	Odd      string   // text of its tool "list"
}

var translatedInputs = []string{
	"Hello, Ada!", "Sampling response: Grüße", "Client exposed 1 root(s): file:///waybill/one",
	"state-ok: requestState received and confirmation accepted", "Grüße Ada — 1 root(s) visible",
	"Multi-round complete: Ada likes green", "state-ok: requestState received and confirmation accepted", "Context: rain",
}

// ExerciseTranslated takes the steps with the TypeScript SDKs and the Python SDK at a gateway's endpoint in front of
// everything-server without sessions, and at odd, one in front of [OddServer]. The Inspector lists and calls there. Each
// is a subtest.
func ExerciseTranslated(t *testing.T, url, odd string) {
	t.Helper()
	for name, run := range map[string]func(testing.TB, string) Output{
		"TypeScript v1": func(t testing.TB, args string) Output { return NodeScript(t, beside("translated.mjs"), args) },
		"TypeScript v2": func(t testing.TB, args string) Output { return NodeScript(t, beside("translated.mjs"), args) },
		"Python SDK":    func(t testing.TB, args string) Output { return python(t, beside("translated.py"), args) },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			sdk := name[strings.LastIndex(name, " ")+1:]
			args, err := json.Marshal(map[string]string{"sdk": sdk, "url": url, "odd": odd})
			if err != nil {
				t.Fatal(err)
			}
			out := run(t, string(args))
			var s translatedSeen
			if err := json.Unmarshal([]byte(out.Stdout), &s); err != nil || out.Exit != 0 {
				t.Fatalf("exit %d, %v\n%s%s", out.Exit, err, out.Stdout, out.Stderr)
			}
			if sdk == "v2" && s.Missing == -32602 {
				s.Missing = -32002 // which it makes of it, for the applications of both eras
			}
			s.check(t)
		})
	}
	t.Run("Inspector", func(t *testing.T) {
		t.Parallel()
		inspect := func(endpoint, want string, args ...string) {
			t.Helper()
			out := Inspector(t, append([]string{endpoint, "--transport", "http", "--protocol-era", "legacy", "--format", "json", "--quiet", "--method"}, args...)...)
			if out.Exit != 0 || !strings.Contains(out.Stdout, want) {
				t.Errorf("%s: exit %d, want %q\n%s%s", args, out.Exit, want, out.Stdout, out.Stderr)
			}
		}
		inspect(url, "2025-11-25", "initialize")
		inspect(url, "test_x_mcp_header", "tools/list", "--strict")
		inspect(url, simpleText, "tools/call", "--tool-name", tools.Simple)
		inspect(odd, `"list"`, "tools/list", "--strict")
		inspect(odd, "[1,2]", "tools/call", "--tool-name", "list")
	})
}

func (s translatedSeen) check(t testing.TB) {
	t.Helper()
	if s.Revision != legacy {
		t.Errorf("revision %q, want %s", s.Revision, legacy)
	}
	if !slices.Equal(s.Inputs, translatedInputs) {
		t.Errorf("input: %q\nwant   %q", s.Inputs, translatedInputs)
	}
	if fmt.Sprint(s.Progress) != "[0 50 100]" {
		t.Errorf("progress: %v", s.Progress)
	}
	if s.Tools < 27 || s.Logged != "Tool execution completed" || !s.Changed || s.Updated != "test://watched-resource" || s.Resources != 3 ||
		s.Read != "This is the content of the static text resource." || s.Missing != -32002 {
		t.Errorf("saw %+v", s)
	}
	if !slices.Equal(s.OddTools, []string{"list", "text"}) || s.Odd != "[1,2]" {
		t.Errorf("odd tools: %q %q", s.OddTools, s.Odd)
	}
}

// OddServer is a server of revision 2026-07-28 with a tool that answers a list, as no revision before could: its output
// schema and what it answers are no objects. It returns the URL of its endpoint.
func OddServer(t testing.TB) string {
	t.Helper()
	results := map[string]string{
		"server/discover": `{"resultType":"complete","supportedVersions":["2026-07-28"],"capabilities":{"tools":{},"extensions":{"x.y/z":{}}},"ttlMs":0,"cacheScope":"public",` +
			`"_meta":{"io.modelcontextprotocol/serverInfo":{"name":"odd","version":"1"}}}`,
		"tools/list": `{"resultType":"complete","ttlMs":0,"cacheScope":"public","tools":[` +
			`{"name":"list","inputSchema":{"type":"object"},"outputSchema":{"type":"array","items":{"type":"integer"}}},` +
			`{"name":"text","inputSchema":{"type":"object"},"outputSchema":{"anyOf":[{"type":"string"},{"type":"null"}]}}]}`,
		"tools/call": `{"resultType":"complete","content":[],"structuredContent":[1,2]}`,
	}
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		var m Message
		if err := json.NewDecoder(r.Body).Decode(&m); err != nil || results[m.Method] == "" {
			http.Error(w, fmt.Sprintf("%s: %v", m.Method, err), http.StatusBadRequest)
			return
		}
		w.Header().Set("Content-Type", "application/json")
		_, _ = fmt.Fprintf(w, `{"jsonrpc":"2.0","id":%s,"result":%s}`, m.ID, results[m.Method]) // to a client that will say if it broke off
	}))
	t.Cleanup(server.Close)
	return server.URL + "/mcp"
}
