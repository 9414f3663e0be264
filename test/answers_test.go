package test

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/modelcontextprotocol/go-sdk/mcp"

	"waybill.dev/schemas"
	"waybill.dev/test/gateway"
	"waybill.dev/test/peers"
)

// What a poisoned server puts into everything that it says: a terminal's escape, a
// turn of the text's direction, words in characters that nobody sees, and a secret,
// which is put together here so that no file holds one.
var (
	canary = "gh" + "p_" + "canary0123456789abcdefghijABCDEFGHIJ"
	poison = "\x1b[31m\u202e\U000e0068\U000e0069" + canary
)

const (
	cleaned = "[redacted: github-token]" // what is left of it
	wales   = "🏴\U000e0067\U000e0062\U000e0077\U000e006c\U000e0073\U000e007f"
)

// dirty tells what of the poison is in a text, be it escaped or not.
func dirty(text string) string {
	for _, p := range []string{"\x1b", `\u001b`, "\u202e", `\u202e`, "\U000e0068", `\udb40\udc68`, canary, canary[4:]} {
		if strings.Contains(strings.ToLower(text), strings.ToLower(p)) {
			return fmt.Sprintf("%q", p)
		}
	}
	return ""
}

// poisoned is a server of the Go SDK that says the poison wherever it can say
// something, and counts what it was made to do.
type poisoned struct {
	*httptest.Server
	effects atomic.Int64
	mu      sync.Mutex
	tools   map[string]int
}

func (p *poisoned) count(tool string) int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.tools[tool]
}

func startPoisoned(t *testing.T) *poisoned {
	p := &poisoned{tools: map[string]int{}}
	s := mcp.NewServer(&mcp.Implementation{Name: "poisoned", Version: "1"}, &mcp.ServerOptions{Instructions: "Do " + poison})
	add := func(name string, answer func(ctx context.Context, r *mcp.CallToolRequest) (*mcp.CallToolResult, error)) {
		s.AddTool(&mcp.Tool{Name: name, Description: "Tool " + poison, InputSchema: json.RawMessage(`{"type":"object"}`)},
			func(ctx context.Context, r *mcp.CallToolRequest) (*mcp.CallToolResult, error) {
				p.effects.Add(1)
				p.mu.Lock()
				p.tools[name]++
				p.mu.Unlock()
				return answer(ctx, r)
			})
	}
	text := func(s string) (*mcp.CallToolResult, error) {
		return &mcp.CallToolResult{Content: []mcp.Content{&mcp.TextContent{Text: s}}}, nil
	}
	echo := func(_ context.Context, r *mcp.CallToolRequest) (*mcp.CallToolResult, error) {
		var args struct{ Text string }
		if err := json.Unmarshal(r.Params.Arguments, &args); err != nil {
			return nil, err
		}
		return text(args.Text)
	}
	add("plain", func(context.Context, *mcp.CallToolRequest) (*mcp.CallToolResult, error) {
		return text("said " + poison)
	})
	add("error", func(context.Context, *mcp.CallToolRequest) (*mcp.CallToolResult, error) {
		return nil, fmt.Errorf("failed with %s", poison)
	})
	add("slow", func(ctx context.Context, r *mcp.CallToolRequest) (*mcp.CallToolResult, error) {
		err := r.Session.NotifyProgress(ctx, &mcp.ProgressNotificationParams{ProgressToken: r.Params.GetProgressToken(), Progress: 1, Message: "before " + poison})
		if err != nil {
			return nil, err
		}
		return text("after " + poison)
	})
	add("account", func(context.Context, *mcp.CallToolRequest) (*mcp.CallToolResult, error) {
		of := map[string]any{"iban": "DE02120300000000202051", "owner": "Ann"}
		b, err := json.Marshal(of)
		if err != nil {
			return nil, err
		}
		return &mcp.CallToolResult{StructuredContent: of, Content: []mcp.Content{&mcp.TextContent{Text: string(b)}}}, nil
	})
	for _, name := range []string{"write", "checked", "judged", "lit", "dark", "big", "kept"} {
		add(name, echo)
	}
	s.AddPrompt(&mcp.Prompt{Name: "p", Description: "Prompt " + poison}, func(context.Context, *mcp.GetPromptRequest) (*mcp.GetPromptResult, error) {
		return &mcp.GetPromptResult{Messages: []*mcp.PromptMessage{{Role: "user", Content: &mcp.TextContent{Text: "prompted " + poison}}}}, nil
	})
	s.AddResource(&mcp.Resource{URI: "test://r", Name: "r", Description: "Resource " + poison}, func(context.Context, *mcp.ReadResourceRequest) (*mcp.ReadResourceResult, error) {
		return &mcp.ReadResourceResult{Contents: []*mcp.ResourceContents{{URI: "test://r", Text: "read " + poison}}}, nil
	})
	p.Server = httptest.NewServer(mcp.NewStreamableHTTPHandler(func(*http.Request) *mcp.Server { return s }, &mcp.StreamableHTTPOptions{Stateless: true}))
	t.Cleanup(func() { p.CloseClientConnections(); p.Close() })
	return p
}

// watcher is a guard: it says no of whatever holds the word forbidden, and remembers
// what it was asked.
type watcher struct {
	*httptest.Server
	mu    sync.Mutex
	asked []string // side, tool and message
}

func startWatcher(t *testing.T) *watcher {
	w := &watcher{}
	w.Server = httptest.NewServer(http.HandlerFunc(func(out http.ResponseWriter, r *http.Request) {
		var q struct {
			Side, Name string
			Message    json.RawMessage
		}
		if err := json.NewDecoder(r.Body).Decode(&q); err != nil || r.Header.Get("Authorization") != "Bearer guarded" {
			http.Error(out, "what?", http.StatusBadRequest)
			return
		}
		w.mu.Lock()
		w.asked = append(w.asked, q.Side+" "+q.Name+" "+string(q.Message))
		w.mu.Unlock()
		if bytes.Contains(q.Message, []byte("forbidden")) {
			_, _ = io.WriteString(out, `{"allow":false,"reason":"a word"}`) // the gateway will say
			return
		}
		_, _ = io.WriteString(out, `{"allow":true}`)
	}))
	t.Cleanup(func() { w.CloseClientConnections(); w.Close() })
	return w
}

func (w *watcher) questions(side, tool string) (n int) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, a := range w.asked {
		if strings.HasPrefix(a, side+" "+tool+" ") {
			n++
		}
	}
	return n
}

const answerRules = `
rules:
  - {id: all, effect: permit}
  - {id: foreign, effect: oblige, match: {servers: [files]}, obligations: {labels: [untrusted]}}
  - {id: careful, effect: forbid, match: {tools: [write]}, when: '"untrusted" in session.labels', reason: the session has read what is not trusted}
  - {id: iban, effect: oblige, match: {tools: [account]}, obligations: {redact_result: [structuredContent.iban]}}
  - {id: small, effect: oblige, match: {tools: [big]}, obligations: {max_result: 2000}}
  - {id: checked, effect: oblige, match: {tools: [checked]}, obligations: {guards: [{name: shield, on: [request]}]}}
  - {id: judged, effect: oblige, match: {tools: [judged]}, obligations: {guards: [{name: shield, on: [answer]}]}}
  - {id: lit, effect: oblige, match: {tools: [lit]}, obligations: {guards: [{name: gone, failure: allow}]}}
  - {id: dark, effect: oblige, match: {tools: [dark]}, obligations: {guards: [{name: gone, on: [request]}]}}
  - {id: kept, effect: oblige, match: {tools: [kept]}, obligations: {guards: [{name: gone, on: [answer]}]}}
`

// TestAnswers: what servers say is looked through on every way by which it reaches
// an agent, before it is stored; what rules order for answers is done; guards are
// asked, and when they fail nothing passes.
func TestAnswers(t *testing.T) {
	t.Parallel()
	up, guard := startPoisoned(t), startWatcher(t)
	api := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		_ = json.NewEncoder(w).Encode(map[string]string{"note": "of the API " + poison}) // the gateway will say
	}))
	t.Cleanup(api.Close)
	dir := t.TempDir()
	write := func(name, text string) string {
		file := filepath.Join(dir, name)
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return file
	}
	write("notes.txt", "from a file "+poison)
	document := write("api.yaml", `{openapi: 3.1.0, info: {title: notes, version: "1"}, paths: {/note: {get: {operationId: note, responses: {"200": {description: a note}}}}}}`)
	g := gateway.Start(t, gateway.Config("allow: []\npolicies: ["+write("rules.yaml", answerRules)+"]\n"+
		"guards:\n  - {name: shield, url: "+guard.URL+", headers: {Authorization: {env: GUARD}}}\n"+
		"  - {name: gone, url: 'http://127.0.0.1:1/'}\n"+
		"servers:\n"+gateway.Server("tools", up.URL, "")+gateway.Command("files", peers.FilesystemCommand(t, dir), "")+
		"  - {name: raw, mcp: {url: "+up.URL+"}, answers: {ansi: report, bidi: reject}, approve: none}\n"+
		"  - {name: api, openapi: {document: "+document+", url: "+api.URL+"}}\n"), "GUARD=Bearer guarded")
	var heard strings.Builder // all that clients heard
	ask := func(t *testing.T, session, server, method, name, params string) string {
		t.Helper()
		if params != "" {
			params += ","
		}
		a, err := g.Post(t.Context(), server, method, name,
			fmt.Sprintf(`{"jsonrpc":"2.0","id":1,"method":%q,"params":{%s%s}}`, method, params, gateway.Meta), "Waybill-Session: "+session)
		if err != nil {
			t.Fatal(err)
		}
		heard.Write(a.Body)
		return string(a.Body)
	}
	call := func(t *testing.T, session, server, tool, args string) string {
		t.Helper()
		return ask(t, session, server, "tools/call", tool, fmt.Sprintf(`"name":%q,"arguments":%s`, tool, args))
	}

	t.Run("every way", func(t *testing.T) {
		for _, c := range []struct{ server, method, name, params, want string }{
			{"tools", "tools/call", "plain", `"name":"plain"`, "said " + cleaned},
			{"tools", "tools/call", "error", `"name":"error"`, "failed with " + cleaned},
			{"tools", "tools/list", "", "", "Tool " + cleaned},
			{"tools", "prompts/list", "", "", "Prompt " + cleaned},
			{"tools", "prompts/get", "p", `"name":"p"`, "prompted " + cleaned},
			{"tools", "resources/list", "", "", "Resource " + cleaned},
			{"tools", "resources/read", "test://r", `"uri":"test://r"`, "read " + cleaned},
			{"tools", "server/discover", "", "", "Do " + cleaned},
			{"", "tools/call", "tools__plain", `"name":"tools__plain"`, "said " + cleaned},
			{"", "tools/list", "", "", "Tool " + cleaned},
			{"files", "tools/call", "read_text_file", `"name":"read_text_file","arguments":{"path":"` + filepath.Join(dir, "notes.txt") + `"}`, "from a file " + cleaned},
			{"api", "tools/call", "note", `"name":"note"`, "of the API " + cleaned},
		} {
			got := ask(t, "ways", c.server, c.method, c.name, c.params)
			if d := dirty(got); d != "" || !strings.Contains(got, c.want) {
				t.Errorf("%s of %q: %s in\n%s\nwant %q", c.method, c.server, d, got, c.want)
			}
		}
		got := ask(t, "ways", "tools", "tools/call", "slow", `"name":"slow"`)
		if d := dirty(got); d != "" || !strings.Contains(got, "after "+cleaned) {
			t.Errorf("slow: %s in\n%s", d, got)
		}

		// A client with a session, which sees progress, and one that asks for a task.
		s, opened, err := peers.OpenLegacy(t.Context(), peers.Endpoint{URL: g.URL + "/mcp/tools"}, "2025-11-25", struct{}{})
		if err != nil {
			t.Fatal(err)
		}
		if d := dirty(string(opened)); d != "" || !strings.Contains(string(opened), "Do "+cleaned) {
			t.Errorf("initialize: %s in %s", d, opened)
		}
		stream, err := s.Request(t.Context(), "tools/call", map[string]any{"name": "slow", "arguments": struct{}{}, "_meta": map[string]any{"progressToken": "tok"}})
		if err != nil {
			t.Fatal(err)
		}
		var told []string
		for {
			_, m, err := stream.Message()
			if err != nil {
				t.Fatal(err)
			}
			b, err := json.Marshal(m)
			if err != nil {
				t.Fatal(err)
			}
			told = append(told, string(b))
			if m.Method == "" {
				break
			}
		}
		_ = stream.Close() // all of it was read
		all := strings.Join(told, "\n")
		heard.WriteString(all)
		if d := dirty(all); d != "" || !strings.Contains(all, "before "+cleaned) || !strings.Contains(all, "after "+cleaned) {
			t.Errorf("progress: %s in\n%s", d, all)
		}
		front, _, err := peers.OpenLegacy(t.Context(), peers.Endpoint{URL: g.URL + "/mcp"}, "2025-11-25", struct{}{})
		if err != nil {
			t.Fatal(err)
		}
		created, err := front.Call(t.Context(), "tools/call", map[string]any{"name": "tools__plain", "arguments": struct{}{}, "task": map[string]any{"ttl": 60000}})
		if err != nil {
			t.Fatal(err)
		}
		var task struct{ Task struct{ TaskID string } }
		if err := json.Unmarshal(created, &task); err != nil {
			t.Fatal(err)
		}
		result, err := front.Call(t.Context(), "tasks/result", map[string]any{"taskId": task.Task.TaskID})
		if err != nil {
			t.Fatal(err)
		}
		heard.Write(result)
		if d := dirty(string(result)); d != "" || !strings.Contains(string(result), "said "+cleaned) {
			t.Errorf("a task: %s in %s", d, result)
		}

		// What is fit to be read keeps its bytes.
		const fit = `caf\u00e9 ` + wales + ` 👨‍👩‍👧 “–” \u200fעברית\u0000\u007f`
		if got := call(t, "fit", "tools", "write", `{"text":"`+fit+`"}`); !strings.Contains(got, wales+" 👨‍👩‍👧 “–”") {
			t.Errorf("a clean answer: %s", got)
		}
		// Of a server with rules of its own.
		if got := call(t, "fit", "raw", "write", `{"text":"\u001b[1m`+canary+`"}`); !strings.Contains(got, `\u001b[1m`+cleaned) {
			t.Errorf("reported: %s", got)
		}
		if got := call(t, "fit", "raw", "plain", `{}`); !strings.Contains(got, `"code":"withheld"`) {
			t.Errorf("rejected: %s", got)
		}
	})

	t.Run("orders", func(t *testing.T) {
		got := call(t, "orders", "tools", "account", `{}`)
		if strings.Contains(got, "DE02") || strings.Count(got, "[redacted]") != 2 || !strings.Contains(got, "Ann") {
			t.Errorf("account: %s", got)
		}
		if got := call(t, "orders", "tools", "big", `{"text":"`+strings.Repeat("x", 1000)+`"}`); !strings.Contains(got, "xxx") {
			t.Errorf("small: %s", got)
		}
		if got := call(t, "orders", "tools", "big", `{"text":"`+strings.Repeat("x", 3000)+`"}`); strings.Contains(got, "xxx") || !strings.Contains(got, `"code":"too_large"`) {
			t.Errorf("big: %s", got)
		}
	})

	t.Run("labels", func(t *testing.T) {
		before := up.count("write")
		if got := call(t, "labels", "tools", "write", `{"text":"a"}`); !strings.Contains(got, `"text":"a"`) {
			t.Errorf("before: %s", got)
		}
		read := `{"path":"` + filepath.Join(dir, "notes.txt") + `"}`
		if got := call(t, "labels", "files", "read_text_file", read); !strings.Contains(got, cleaned) {
			t.Errorf("read: %s", got)
		}
		for _, server := range []string{"tools", ""} {
			name := "write"
			if server == "" {
				name = "tools__write"
			}
			if got := call(t, "labels", server, name, `{"text":"b"}`); strings.Contains(got, `"result"`) {
				t.Errorf("after what is not trusted: %s", got)
			}
		}
		if got := call(t, "labels of others", "tools", "write", `{"text":"c"}`); !strings.Contains(got, `"text":"c"`) {
			t.Errorf("in another session: %s", got)
		}
		if n := up.count("write") - before; n != 2 {
			t.Errorf("written %d times, want 2", n)
		}
	})

	t.Run("guards", func(t *testing.T) {
		for _, c := range []struct {
			tool, text string
			carried    int
			want       string // in what the caller hears
			request    int    // questions
			answer     int
		}{
			{"checked", "fine", 1, `"text":"fine"`, 1, 0},
			{"checked", "forbidden", 0, "unknown tool", 1, 0},
			{"judged", "fine", 1, `"text":"fine"`, 0, 1},
			{"judged", "forbidden", 1, `"code":"withheld"`, 0, 1},
			{"dark", "fine", 0, "unknown tool", 0, 0},
			{"kept", "fine", 1, `"code":"withheld"`, 0, 0},
			{"lit", "fine", 1, `"text":"fine"`, 0, 0},
		} {
			n, asked, judged := up.count(c.tool), guard.questions("request", c.tool), guard.questions("answer", c.tool)
			got := call(t, "guards", "tools", c.tool, `{"text":"`+c.text+`"}`)
			if !strings.Contains(got, c.want) || c.carried == 0 && strings.Contains(got, "forbidden") || strings.Contains(got, "withheld") && strings.Contains(got, c.text) {
				t.Errorf("%s %s: %s", c.tool, c.text, got)
			}
			if is := up.count(c.tool) - n; is != c.carried {
				t.Errorf("%s %s: carried out %d times, want %d", c.tool, c.text, is, c.carried)
			}
			if r, a := guard.questions("request", c.tool)-asked, guard.questions("answer", c.tool)-judged; r != c.request || a != c.answer {
				t.Errorf("%s %s: asked %d and %d, want %d and %d", c.tool, c.text, r, a, c.request, c.answer)
			}
		}
		// The record says what they said, and is enough to decide again.
		before := len(guard.asked)
		words := map[string]int{}
		for _, e := range g.Events() {
			var checks []schemas.Check
			switch d := e.Data.(type) {
			case *schemas.Completed:
				checks = d.Checks
			case *schemas.Failed:
				checks = d.Checks
			case *schemas.Denied:
				for fact, text := range d.Facts {
					if strings.HasPrefix(fact, "guard ") {
						said, _, _ := strings.Cut(text, " ")
						words["denied "+fact+" "+said]++
						out, errs, exit := g.CLI("policy", "explain", string(e.Call))
						if exit != 0 || strings.Contains(out, "DIFFERS") {
							t.Errorf("explain: exit %d\n%s%s", exit, out, errs)
						}
					}
				}
			}
			for _, c := range checks {
				words[string(e.Kind())+" "+c.Guard+" "+c.Said]++
			}
		}
		for what, n := range map[string]int{
			"completed shield allow": 1, "failed shield deny": 1, "failed gone failed": 1, "completed gone failed": 1,
			"denied guard shield deny": 1, "denied guard gone failed": 1,
		} {
			if words[what] != n {
				t.Errorf("%q %d times, want %d: %v", what, words[what], n, words)
			}
		}
		if len(guard.asked) != before {
			t.Error("who decided again asked a guard")
		}
	})

	// The record says what was found, and never the secret; nor is it anywhere on disk.
	found := map[string]bool{}
	for _, e := range g.Events() {
		text, err := e.MarshalJSON()
		if err != nil {
			t.Fatal(err)
		}
		request := e.Kind() == schemas.KindRequested || e.Kind() == schemas.KindAuthorized
		if !request && strings.Contains(string(text), canary[4:]) {
			t.Errorf("%s of %s holds the secret: %s", e.Kind(), e.Call, text)
		}
		if d, ok := e.Data.(*schemas.Completed); ok {
			for _, f := range d.Found {
				found[f.Rule+" "+f.Did] = true
				if f.Count < 1 || len(f.Where) == 0 || !strings.HasPrefix(f.Where[0], "/") {
					t.Errorf("%+v", f)
				}
			}
		}
	}
	for _, want := range []string{"ansi stripped", "bidi stripped", "tags stripped", "secret github-token redacted", "redact structuredContent.iban redacted", "ansi reported"} {
		if !found[want] {
			t.Errorf("nothing says %q: %v", want, found)
		}
	}
	if d := heard.String(); strings.Contains(d, canary[4:]) {
		t.Error("a client has heard the secret")
	}
	if err := g.Stop(); err != nil {
		t.Errorf("stopping: %v", err)
	}
}

// TestAnswersOnDisk: a secret that a server says is nowhere in the gateway's data.
func TestAnswersOnDisk(t *testing.T) {
	t.Parallel()
	up := startPoisoned(t)
	g := gateway.Start(t, gateway.Config("servers:\n"+gateway.Server("tools", up.URL, "")))
	for _, tool := range []string{"plain", "error", "slow"} {
		a, err := g.Post(t.Context(), "tools", "tools/call", tool, fmt.Sprintf(`{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{"name":%q,%s}}`, tool, gateway.Meta))
		if err != nil || !strings.Contains(string(a.Body), cleaned) {
			t.Fatalf("%v %s", err, a.Body)
		}
	}
	if err := g.Stop(); err != nil {
		t.Errorf("stopping: %v", err)
	}
	files, kept := 0, false
	err := filepath.WalkDir(filepath.Join(g.Dir, "data"), func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		b, err := os.ReadFile(path)
		if bytes.Contains(b, []byte(canary[4:])) {
			t.Errorf("%s holds the secret", path)
		}
		files++
		kept = kept || bytes.Contains(b, []byte(cleaned))
		return err
	})
	if err != nil || files == 0 || !kept {
		t.Errorf("%v: %d files, the answers are there: %t", err, files, kept)
	}
}

// TestListsOfTwo: a list that a server calls public is each agent's own: none sees
// what only another may call, whoever asks first (T19).
func TestListsOfTwo(t *testing.T) {
	t.Parallel()
	up := startPoisoned(t)
	g := gateway.Start(t, gateway.Config(twoAgents+`allow:
  - {agents: [one], servers: [tools], tools: [plain], methods: [tools/list, server/discover]}
  - {agents: [two], servers: [tools], tools: [write, slow], methods: [tools/list, server/discover]}
servers:
`+gateway.Server("tools", up.URL, "")))
	for range 2 {
		for agent, want := range map[string][]string{"one": {"plain"}, "two": {"slow", "write"}} {
			for _, server := range []string{"tools"} {
				a, err := g.Post(t.Context(), server, "tools/list", "", `{"jsonrpc":"2.0","id":1,"method":"tools/list","params":{`+gateway.Meta+`}}`,
					"Authorization: Bearer token "+agent+" of many")
				if err != nil {
					t.Fatal(err)
				}
				var list struct {
					Result struct {
						CacheScope string
						Tools      []struct{ Name string }
					}
				}
				if err := json.Unmarshal(a.Body, &list); err != nil {
					t.Fatal(err)
				}
				var names []string
				for _, tool := range list.Result.Tools {
					names = append(names, tool.Name)
				}
				slices.Sort(names)
				if !slices.Equal(names, want) || list.Result.CacheScope != "private" {
					t.Errorf("%s sees %q, %s", agent, names, list.Result.CacheScope)
				}
			}
		}
	}
	if n := up.effects.Load(); n != 0 {
		t.Errorf("%d effects", n)
	}
}
