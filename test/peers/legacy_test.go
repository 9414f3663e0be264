package peers

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"reflect"
	"regexp"
	"runtime"
	"strings"
	"sync"
	"testing"
)

// The legacy clients against the servers themselves, with no gateway: what they see through the gateway is worth
// something only if this holds.

func TestLegacyDirect(t *testing.T) {
	t.Parallel()
	ExerciseLegacy(t, Endpoint{URL: ServerEverything(t), Direct: true})
}

func TestLegacyMCPGoServer(t *testing.T) {
	t.Parallel()
	ExerciseLegacy(t, Endpoint{URL: MCPGoServer(t), MCPGo: true, Direct: true})
}

// recorder is a test that may fail without its test failing.
type recorder struct {
	testing.TB
	mu     sync.Mutex
	faults []string
}

func (r *recorder) Errorf(format string, args ...any) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.faults = append(r.faults, fmt.Sprintf(format, args...))
}

func (r *recorder) Error(args ...any) { r.Errorf("%s", fmt.Sprint(args...)) }

func (r *recorder) Fatalf(format string, args ...any) {
	r.Errorf(format, args...)
	runtime.Goexit()
}

func (r *recorder) Fatal(args ...any) { r.Fatalf("%s", fmt.Sprint(args...)) }

// record runs what may fail and returns its faults.
func record(t testing.TB, f func(testing.TB)) []string {
	r := &recorder{TB: t}
	done := make(chan struct{})
	go func() {
		defer close(done)
		f(r)
	}()
	<-done
	return r.faults
}

// Whatever a client did not see, or saw otherwise, must be found.
func TestLegacyCheckTells(t *testing.T) {
	t.Parallel()
	e := Endpoint{Direct: true}
	good := func() legacySeen {
		s := legacySeen{
			Revision: legacy,
			Roots:    [2]string{"(1 total) file:///waybill/one", "(2 total) file:///waybill/one file:///waybill/two"},
			Tools:    everythingTools, Echo: "Echo: grüße <&> 9007199254740993",
			Structured: map[string]any{"temperature": 33, "conditions": "Cloudy", "humidity": 82},
			Failing:    true, Unknown: "isError",
			Progress:  [][2]float64{{1, 4}, {2, 4}, {3, 4}, {4, 4}},
			Operation: "Long running operation completed. Duration: 0.2 seconds, Steps: 4.",
			Updated:   true, Quiet: true, Cancelled: true, Pinged: true,
			Prompts: []string{"simple-prompt", "args-prompt", "completable-prompt", "resource-prompt"}, Prompt: "What's weather in Zürich, ZH?",
			Completed: [3][]string{{"Sales", "Support"}, {"David", "Eve", "Frank"}, {"7"}},
			Resources: []string{"architecture.md", "features.md", "startup.md"}, Templates: []string{"Dynamic Text Resource", "Dynamic Blob Resource"},
			Read: "# Everything Server - Features: trigger-sampling-request", ReadURI: true,
			Template: "Resource 7: This is a plaintext resource created at noon",
			Sampled:  "sampled: grüße by waybill-model", SampledAsked: "what is a waybill?",
			Elicited: `- Name: Ada - Agreed to terms: true "action": "accept"`, ElicitedAsked: "provide inputs", Declined: "declined",
			Added:            "H4sIAAAAAAACAytPrEzKzMkBAGWprNgHAAAA",
			Resumed:          [][2]float64{{1, 3}, {2, 3}, {3, 3}},
			ResumedOperation: "Long running operation completed. Duration: 0.6 seconds, Steps: 3.",
		}
		s.Logged.Level, s.Logged.Data = "notice", "Notice-level message"
		return s
	}
	if faults := record(t, func(t testing.TB) { good().check(t, e, legacy) }); faults != nil {
		t.Fatalf("what is right is found wrong: %q", faults)
	}
	for i := range reflect.TypeFor[legacySeen]().NumField() {
		s := good()
		reflect.ValueOf(&s).Elem().Field(i).SetZero()
		if faults := record(t, func(t testing.TB) { s.check(t, e, legacy) }); faults == nil {
			t.Errorf("that %s is missing is not noticed", reflect.TypeFor[legacySeen]().Field(i).Name)
		}
	}
	for what, spoil := range map[string]func(*legacySeen){
		"progress twice":        func(s *legacySeen) { s.Progress = append(s.Progress, s.Progress[3]) },
		"progress out of order": func(s *legacySeen) { s.Progress[0], s.Progress[1] = s.Progress[1], s.Progress[0] },
		"progress lost":         func(s *legacySeen) { s.Resumed = s.Resumed[:2] },
		"another's tool":        func(s *legacySeen) { s.Tools = append(s.Tools[:0:0], append(s.Tools, "echo2")...) },
		"a resource twice":      func(s *legacySeen) { s.Resources = append(s.Resources, "features.md") },
		"a level of another":    func(s *legacySeen) { s.Logged.Level = "debug" },
	} {
		s := good()
		spoil(&s)
		if faults := record(t, func(t testing.TB) { s.check(t, e, legacy) }); faults == nil {
			t.Errorf("not noticed: %s", what)
		}
	}
}

// An endpoint that gives tools and prompts a prefix and resources other URIs, as one for several servers does.
func TestLegacyPrefix(t *testing.T) {
	t.Parallel()
	const prefix = "everything__"
	target, err := url.Parse(ServerEverything(t))
	if err != nil {
		t.Fatal(err)
	}
	name := regexp.MustCompile(`"name":"([a-z]+-[a-z-]+|echo)"`)
	proxy := &httputil.ReverseProxy{
		Rewrite: func(r *httputil.ProxyRequest) {
			r.Out.URL, r.Out.Host = target, target.Host
			body, err := io.ReadAll(r.In.Body)
			if err != nil {
				t.Error(err)
			}
			body = bytes.ReplaceAll(body, []byte(`"`+prefix), []byte(`"`))
			body = bytes.ReplaceAll(body, []byte("other:demo:"), []byte("demo:"))
			r.Out.Body, r.Out.ContentLength = io.NopCloser(bytes.NewReader(body)), int64(len(body))
		},
		ModifyResponse: func(r *http.Response) error {
			r.Body = &rewritten{body: r.Body, lines: bufio.NewReader(r.Body), rewrite: func(line []byte) []byte {
				line = name.ReplaceAll(line, []byte(`"name":"`+prefix+`$1"`))
				return bytes.ReplaceAll(line, []byte("demo://"), []byte("other:demo://"))
			}}
			return nil
		},
		FlushInterval: -1,
	}
	server := httptest.NewServer(proxy)
	t.Cleanup(func() { server.CloseClientConnections(); server.Close() })
	e := Endpoint{URL: server.URL + "/mcp", Prefix: prefix, Direct: true}
	t.Run("TypeScript v2", func(t *testing.T) { t.Parallel(); ExerciseLegacyTypeScript(t, e, "v2") })
	t.Run("Python SDK", func(t *testing.T) { t.Parallel(); ExerciseLegacyPython(t, e) })
	t.Run("HTTP", func(t *testing.T) { t.Parallel(); ExerciseLegacyHTTP(t, e, legacy) })
}

// rewritten is a body of which each line is another.
type rewritten struct {
	body    io.Closer
	lines   *bufio.Reader
	rewrite func([]byte) []byte
	rest    []byte
}

func (r *rewritten) Read(b []byte) (int, error) {
	if len(r.rest) == 0 {
		line, err := r.lines.ReadBytes('\n')
		if len(line) == 0 {
			return 0, err
		}
		r.rest = r.rewrite(line)
	}
	n := copy(b, r.rest)
	r.rest = r.rest[n:]
	return n, nil
}

func (r *rewritten) Close() error { return r.body.Close() }

// An endpoint that takes the event ids away leaves nothing to resume after, and the steps must fail.
func TestLegacyStepsTell(t *testing.T) {
	t.Parallel()
	target, err := url.Parse(ServerEverything(t))
	if err != nil {
		t.Fatal(err)
	}
	proxy := &httputil.ReverseProxy{
		Rewrite: func(r *httputil.ProxyRequest) { r.Out.URL, r.Out.Host = target, target.Host },
		ModifyResponse: func(r *http.Response) error {
			r.Body = &rewritten{body: r.Body, lines: bufio.NewReader(r.Body), rewrite: func(line []byte) []byte {
				if bytes.HasPrefix(line, []byte("id:")) {
					return []byte(": no id\n")
				}
				return line
			}}
			return nil
		},
		FlushInterval: -1,
	}
	server := httptest.NewServer(proxy)
	t.Cleanup(func() { server.CloseClientConnections(); server.Close() })
	e := Endpoint{URL: server.URL + "/mcp", Direct: true}
	for who, exercise := range map[string]func(testing.TB){
		"HTTP":   func(t testing.TB) { ExerciseLegacyHTTP(t, e, legacy) },
		"Go SDK": func(t testing.TB) { ExerciseLegacyGoSDK(t, e, legacy) },
	} {
		if faults := record(t, exercise); !strings.Contains(strings.Join(faults, "\n"), "the operation of 3 steps") {
			t.Errorf("%s: without event ids: %q", who, faults)
		}
	}
}

// LegacyStream is cut at every byte of a stream: what was whole before the cut is there, nothing else is, and the last
// id is that of the last event which was whole.
func TestLegacyStreamCut(t *testing.T) {
	t.Parallel()
	const body = ": a comment\n\nid: 1-0\ndata:\n\nid: 1-1\r\nretry: 5\r\ndata: {\"id\":1,\r\ndata: \"result\":{}}\r\n\r\nevent: message\ndata: {}\n\n"
	whole := []struct {
		end  int // of the event in the body
		id   string
		data string
	}{
		{strings.Index(body, "data:\n\n") + len("data:\n\n"), "1-0", ""},
		{strings.Index(body, "event:"), "1-1", "{\"id\":1,\n\"result\":{}}"},
		{len(body), "", "{}"},
	}
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "text/event-stream; charset=utf-8")
		_, _ = io.WriteString(w, body) // who is cut off does not read it all
	}))
	t.Cleanup(server.Close)
	session := &LegacySession{Endpoint: Endpoint{URL: server.URL}}
	for n := range len(body) + 1 {
		stream, err := session.Listen(t.Context(), "")
		if err != nil {
			t.Fatal(err)
		}
		stream.CutAfter(int64(n))
		lastID := ""
		for i, want := range whole {
			event, err := stream.Next()
			if n < want.end {
				if !errors.Is(err, ErrCut) {
					t.Fatalf("cut after %d: event %d: %v, %v", n, i, event, err)
				}
				break
			}
			if err != nil || event.ID != want.id || string(event.Data) != want.data {
				t.Fatalf("cut after %d: event %d: %q %q, %v", n, i, event.ID, event.Data, err)
			}
			if want.id != "" {
				lastID = want.id
			}
		}
		if stream.LastID != lastID {
			t.Errorf("cut after %d: last id %q, want %q", n, stream.LastID, lastID)
		}
		stream.Close()
	}
}

// A session of LegacySession from end to end, with what the steps leave out: a stream resumed twice gives the same twice,
// and a stranger's session is unknown.
func TestLegacySession(t *testing.T) {
	t.Parallel()
	ctx := t.Context()
	e := Endpoint{URL: MCPGoServer(t), MCPGo: true, Direct: true}
	session, result, err := OpenLegacy(ctx, e, legacy, json.RawMessage(`{}`))
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(string(result), "waybill-test-mcp-go") {
		t.Errorf("initialize: %s", result)
	}
	if _, err := session.Call(ctx, "no/such", nil); !errors.As(err, new(*RPCError)) {
		t.Errorf("an unknown method: %v", err)
	}
	// Without a GET stream all that the call brings comes with it.
	stream, err := session.Request(ctx, "tools/call", map[string]any{
		"name": "trigger-long-running-operation", "arguments": map[string]any{"duration": 0.05, "steps": 5},
		"_meta": map[string]any{"progressToken": "t"},
	})
	if err != nil {
		t.Fatal(err)
	}
	first, err := stream.Next()
	if err != nil {
		t.Fatal(err)
	}
	stream.Close()
	var again [2]string
	for i := range again {
		resumed, err := session.Listen(ctx, first.ID)
		if err != nil {
			t.Fatal(err)
		}
		resumed.ID = stream.ID
		answer, err := resumed.Answer()
		if err != nil {
			t.Fatalf("resumed after %q: %v", first.ID, err)
		}
		again[i] = string(answer.Result)
		resumed.Close()
	}
	if again[0] != again[1] || !strings.Contains(again[0], "Steps: 5.") {
		t.Errorf("resumed twice: %q", again)
	}
	stranger := &LegacySession{Endpoint: e, ID: "no-such-session", Revision: legacy}
	if stream, err := stranger.Request(ctx, "ping", nil); err != nil || stream.Status != http.StatusNotFound {
		t.Errorf("a session that is not there: %v, %v", stream, err)
	}
	if status, err := session.Delete(context.WithoutCancel(ctx)); err != nil || status != http.StatusOK {
		t.Errorf("DELETE: %d, %v", status, err)
	}
}
