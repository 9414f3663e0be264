package test

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"waybill.dev/test/gateway"
	"waybill.dev/test/peers"
)

// The official peers of the revisions with sessions work with servers over stdio
// as with those over HTTP: requests of the server, progress, subscriptions,
// cancellation, streams that are cut.
func TestLegacyPeersOverStdio(t *testing.T) {
	t.Parallel() // it mostly waits
	g := gateway.Start(t, gateway.Config("servers:\n"+
		gateway.Command("everything", peers.ServerEverythingCommand(t), "")+
		gateway.Command("conformance", peers.EverythingCommand(t), "era: legacy")))
	if n := len(started(t, g)); n != 0 {
		t.Errorf("%d processes before anything was called", n)
	}
	t.Run("conformance", func(t *testing.T) { peers.ConformanceLegacy(t, g.URL+"/mcp/conformance") })
	t.Run("server-everything", func(t *testing.T) {
		peers.ExerciseLegacy(t, peers.Endpoint{URL: g.URL + "/mcp/everything"})
	})
	for _, e := range g.Events() {
		if err := e.Check(); err != nil {
			t.Error(err)
		}
	}
	// A session that was ended has no process. Some clients leave theirs open.
	if !becomes(within, func() bool {
		return strings.Contains(get(t, g.Admin+"/metrics"), fmt.Sprintf("\nwaybill_edge_sessions %d\n", len(started(t, g))))
	}) {
		t.Errorf("processes %v for\n%s", started(t, g), get(t, g.Admin+"/metrics"))
	}
	if err := g.Stop(); err != nil {
		t.Errorf("stopping: %v", err)
	}
}

// The same for the revision without sessions.
func TestModernPeersOverStdio(t *testing.T) {
	t.Parallel() // it mostly waits
	g := gateway.Start(t, gateway.Config("servers:\n"+gateway.Command("everything", peers.EverythingCommand(t), "")))
	url := g.URL + "/mcp/everything"
	t.Run("conformance", func(t *testing.T) { peers.ConformanceModernScored(t, url) })
	t.Run("inspector", func(t *testing.T) { peers.ExerciseInspector(t, url) })
	t.Run("typescript", func(t *testing.T) { peers.ExerciseTypeScript(t, url) })
	t.Run("go", func(t *testing.T) { peers.ExerciseGoSDK(t, url) })
	if n := len(started(t, g)); n != 1 {
		t.Errorf("%d processes, want 1", n)
	}
	if err := g.Stop(); err != nil {
		t.Errorf("stopping: %v", err)
	}
}

// Servers that people run this way do their work: one for each session, and one
// for all.
func TestStdioServers(t *testing.T) {
	for _, process := range []string{"session", "server"} {
		t.Run(process, func(t *testing.T) {
			dir, err := filepath.EvalSymlinks(t.TempDir())
			if err != nil {
				t.Fatal(err)
			}
			g := gateway.Start(t, gateway.Config("servers:\n"+
				gateway.Command("files", peers.FilesystemCommand(t, dir), "process: "+process)+
				gateway.Command("memory", peers.MemoryCommand(t), fmt.Sprintf("process: %s, env: {MEMORY_FILE_PATH: %q}", process, filepath.Join(dir, "memory.jsonl")))))
			var sessions [2]*peers.LegacySession
			for i := range sessions {
				if sessions[i], _, err = peers.OpenLegacy(t.Context(), peers.Endpoint{URL: g.URL + "/mcp"}, "2025-11-25", struct{}{}); err != nil {
					t.Fatal(err)
				}
			}
			call := func(i int, tool string, args any) string {
				t.Helper()
				result, err := sessions[i].Call(t.Context(), "tools/call", map[string]any{"name": tool, "arguments": args})
				if err != nil {
					t.Fatal(err)
				}
				return string(result)
			}
			list, err := sessions[0].Call(t.Context(), "tools/list", nil)
			if err != nil || !strings.Contains(string(list), `"files__write_file"`) || !strings.Contains(string(list), `"memory__create_entities"`) {
				t.Errorf("%s %v", list, err)
			}
			file := filepath.Join(dir, "a.txt")
			call(0, "files__write_file", map[string]any{"path": file, "content": "grüße"})
			if got := call(1, "files__read_text_file", map[string]any{"path": file}); !strings.Contains(got, "grüße") {
				t.Error(got)
			}
			call(0, "memory__create_entities", map[string]any{"entities": []any{map[string]any{"name": "Ada", "entityType": "person", "observations": []string{"counts"}}}})
			if got := call(1, "memory__search_nodes", map[string]any{"query": "counts"}); !strings.Contains(got, "Ada") {
				t.Error(got)
			}
			if got := call(1, "files__read_text_file", map[string]any{"path": "/etc/passwd"}); !strings.Contains(got, `"isError":true`) {
				t.Error(got)
			}
			if n, want := len(started(t, g)), map[string]int{"session": 4, "server": 2}[process]; n != want {
				t.Errorf("%d processes, want %d", n, want)
			}
			// A client of the revision without sessions has them too.
			a, err := g.Post(t.Context(), "files", "tools/call", "read_text_file", fmt.Sprintf(
				`{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{"name":"read_text_file","arguments":{"path":%q},%s}}`, file, gateway.Meta))
			if err != nil || a.Status != 200 || !strings.Contains(string(a.Body), "grüße") {
				t.Errorf("%d %s %v", a.Status, a.Body, err)
			}
			for _, s := range sessions {
				if _, err := s.Delete(t.Context()); err != nil {
					t.Error(err)
				}
			}
			// That of the client without a session stays a while.
			if process == "session" && !becomes(within, func() bool { return len(started(t, g)) == 1 }) {
				t.Errorf("processes are left: %v", started(t, g))
			}
		})
	}
}

// The TypeScript, Python and Go SDKs work with servers that people run this way,
// in both eras (server-everything with sessions: [TestLegacyPeersOverStdio]).
func TestStdioSDKs(t *testing.T) {
	t.Parallel() // it mostly waits
	dir, err := filepath.EvalSymlinks(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	memory := func(process, file string) string {
		return fmt.Sprintf("process: %s, env: {MEMORY_FILE_PATH: %q}", process, filepath.Join(dir, file))
	}
	g := gateway.Start(t, gateway.Config("servers:\n"+
		gateway.Command("everything", peers.ServerEverythingCommand(t), "process: session")+
		gateway.Command("files", peers.FilesystemCommand(t, dir), "process: session")+
		gateway.Command("memory", peers.MemoryCommand(t), memory("session", "own.jsonl"))+
		gateway.Command("shared", peers.MemoryCommand(t), memory("server", "shared.jsonl"))))
	t.Run("sdks", func(t *testing.T) { // for these run beside each other
		t.Run("server-everything", func(t *testing.T) {
			t.Parallel()
			peers.ExerciseModern(t, peers.Endpoint{URL: g.URL + "/mcp/everything"})
		})
		t.Run("others", func(t *testing.T) {
			t.Parallel()
			visitStdio(t, g, dir)
		})
	})
	for _, e := range g.Events() {
		if err := e.Check(); err != nil {
			t.Error(err)
		}
	}
	if err := g.Stop(); err != nil {
		t.Errorf("stopping: %v", err)
	}
}

// visitStdio has each SDK write and read files, and remember what a client that
// stays is told too. They come one after the other: server-memory reads all it
// keeps, and writes all, without a lock.
func visitStdio(t *testing.T, g *gateway.Gateway, dir string) {
	stays, _, err := peers.OpenLegacy(t.Context(), peers.Endpoint{URL: g.URL + "/mcp/shared"}, "2025-11-25", struct{}{})
	if err != nil {
		t.Fatal(err)
	}
	entity := func(name string) map[string]any {
		return map[string]any{"entities": []any{map[string]any{"name": name, "entityType": "client", "observations": []string{name + " writes grüße"}}}}
	}
	call := func(tool string, args any) string {
		t.Helper()
		result, err := stays.Call(t.Context(), "tools/call", map[string]any{"name": tool, "arguments": args})
		if err != nil {
			t.Fatal(err)
		}
		return string(result)
	}
	call("create_entities", entity("who stays"))
	remember := func(name string) []peers.Call {
		return []peers.Call{
			{Tool: "create_entities", Args: entity(name)},
			{Tool: "search_nodes", Args: map[string]any{"query": name + " writes"}},
			{Tool: "read_graph", Args: map[string]any{}},
		}
	}
	before := "" // who came before
	for _, v := range peers.Visitors() {
		t.Run(v.Name, func(t *testing.T) {
			file := filepath.Join(dir, v.Name+".txt")
			answered := v.Visit(t,
				peers.Visit{URL: g.URL + "/mcp/files", Calls: []peers.Call{
					{Tool: "write_file", Args: map[string]any{"path": file, "content": "grüße <&> of " + v.Name}},
					{Tool: "read_text_file", Args: map[string]any{"path": file}},
					{Tool: "list_directory", Args: map[string]any{"path": dir}},
					{Tool: "read_text_file", Args: map[string]any{"path": "/etc/passwd"}},
				}},
				peers.Visit{URL: g.URL + "/mcp/memory", Calls: remember(v.Name)},
				peers.Visit{URL: g.URL + "/mcp/shared", Calls: remember(v.Name)},
			)
			for i, want := range []struct {
				tool   string
				texts  []string
				others string // whom the graph holds too
			}{
				{"edit_file", []string{"Successfully wrote to " + file, "grüße <&> of " + v.Name, "[FILE] " + v.Name + ".txt", "Access denied - path outside allowed directories"}, ""},
				{"delete_entities", []string{v.Name + " writes grüße", v.Name + " writes grüße", v.Name + " writes grüße"}, before},
				{"delete_entities", []string{v.Name + " writes grüße", v.Name + " writes grüße", v.Name + " writes grüße"}, "who stays"},
			} {
				got := answered[i]
				if !slices.Contains(got.Tools, want.tool) {
					t.Errorf("%s is not among the tools listed: %q", want.tool, got.Tools)
				}
				for j, text := range want.texts {
					if !strings.Contains(got.Texts[j], text) || got.Failed[j] != strings.HasPrefix(text, "Access denied") {
						t.Errorf("call %d: %q (failed: %v), want %q", j, got.Texts[j], got.Failed[j], text)
					}
				}
				if last := got.Texts[len(got.Texts)-1]; i > 0 && !strings.Contains(last, want.others) {
					t.Errorf("the graph lacks %q: %s", want.others, last)
				}
			}
			if b, err := os.ReadFile(file); err != nil || string(b) != "grüße <&> of "+v.Name {
				t.Errorf("%q %v", b, err)
			}
			if got := call("search_nodes", map[string]any{"query": v.Name + " writes"}); !strings.Contains(got, v.Name+" writes grüße") {
				t.Errorf("who stays does not see it: %s", got)
			}
			before = v.Name
		})
	}
	shared := 0
	for _, pid := range started(t, g) {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/environ", pid))
		if err == nil && strings.Contains(string(b), "shared.jsonl") { // else it has ended
			shared++
		}
	}
	if shared != 1 {
		t.Errorf("%d processes are what all share", shared)
	}
	if _, err := stays.Delete(t.Context()); err != nil {
		t.Error(err)
	}
}

// However the gateway ends, no server outlives it; and its sessions go on with
// the next one, which starts them again.
func TestStdioGatewayEnds(t *testing.T) {
	g := gateway.Start(t, gateway.Config("servers:\n"+gateway.Command("everything", peers.ServerEverythingCommand(t), "")))
	s, _, err := peers.OpenLegacy(t.Context(), peers.Endpoint{URL: g.URL + "/mcp/everything"}, "2025-11-25", struct{}{})
	if err != nil {
		t.Fatal(err)
	}
	for _, end := range []string{"killed", "stopped", "at last"} {
		result, err := s.Call(t.Context(), "tools/call", map[string]any{"name": "echo", "arguments": map[string]any{"message": end}})
		if err != nil || !strings.Contains(string(result), "Echo: "+end) {
			t.Fatalf("%s: %s %v", end, result, err)
		}
		pids := started(t, g)
		if len(pids) != 1 {
			t.Fatalf("processes %v, want 1", pids)
		}
		switch end {
		case "killed":
			g.Kill()
		default:
			if err := g.Stop(); err != nil {
				t.Errorf("stopping: %v", err)
			}
		}
		if !becomes(within, func() bool { return !runs(pids[0]) }) {
			t.Errorf("a server outlives the gateway that was %s", end)
		}
		if end != "at last" {
			g.Restart()
		}
	}
}

// A server that fails says so where operators look, and to nobody else.
func TestStdioServerFails(t *testing.T) {
	g := gateway.Start(t, gateway.Config("servers:\n"+gateway.Command("broken", []string{"/bin/sh", "-c", "echo the disk is on fire: $TOKEN >&2; exit 5"}, "env: {TOKEN: {env: STDIO_TOKEN}}")), "STDIO_TOKEN=hunter22")
	for range 2 {
		a, err := g.Post(t.Context(), "broken", "tools/list", "", `{"jsonrpc":"2.0","id":1,"method":"tools/list","params":{`+gateway.Meta+`}}`)
		if err != nil {
			t.Fatal(err)
		}
		if a.Status != 503 || strings.Contains(string(a.Body), "fire") {
			t.Errorf("%d %s", a.Status, a.Body)
		}
	}
	var details []string
	for _, e := range g.Events() {
		b, err := json.Marshal(e)
		if err != nil {
			t.Fatal(err)
		}
		if strings.Contains(string(b), "hunter22") {
			t.Errorf("a secret is in the log: %s", b)
		}
		if strings.Contains(string(b), "it exited with code 5; its last words: the disk is on fire: [secret]") {
			details = append(details, string(b))
		}
	}
	if len(details) != 2 {
		t.Errorf("%d events say how it ended, want 2", len(details))
	}
	if out := g.Output(); strings.Contains(out, "hunter22") || !strings.Contains(out, "the disk is on fire: [secret]") {
		t.Error(out)
	}
}

// started are the processes that the gateway has started.
func started(t *testing.T, g *gateway.Gateway) (pids []int) {
	t.Helper()
	threads, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", g.Pid()))
	if err != nil || len(threads) == 0 {
		t.Fatalf("the system does not say what the gateway has started: %v", err)
	}
	for _, file := range threads {
		b, err := os.ReadFile(file)
		if err != nil {
			continue // the thread has ended
		}
		for _, field := range strings.Fields(string(b)) {
			pid, err := strconv.Atoi(field)
			if err != nil {
				t.Fatal(err)
			}
			pids = append(pids, pid)
		}
	}
	return pids
}

// runs tells whether a process runs, and is no zombie.
func runs(pid int) bool {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	_, state, ok := strings.Cut(string(b), ") ")
	return err == nil && ok && !strings.HasPrefix(state, "Z")
}
