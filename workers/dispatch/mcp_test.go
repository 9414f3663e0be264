package dispatch

import (
	"context"
	"encoding/base64"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/modelcontextprotocol/go-sdk/mcp"

	"waybill.dev/schemas"
	"waybill.dev/schemas/jsonrpc"
)

// What goes out: the caller's bytes but for the id, and headers made anew.
func TestRequest(t *testing.T) {
	var header http.Header
	var body []byte
	r := newRig(t, func(w http.ResponseWriter, req *http.Request) {
		header = req.Header
		body, _ = io.ReadAll(req.Body)
		m, _ := jsonrpc.Decode(body, jsonrpc.Limits{})
		fmt.Fprintf(w, `{"jsonrpc":"2.0", "id":%s, "result":{"n": 1E400, "resultType":"input_required","\u0061":[ 9007199254740993 ]}} `, m.ID().Raw())
	}, func(o *Options) {
		o.Servers[0].Header = http.Header{"authorization": {"Bearer operator"}, "X-Team": {"a", "b"}}
	})
	e := r.call("café ", authorized(func(a *schemas.Authorized) {
		a.Headers = map[string]string{"Mcp-Param-Region": "=?base64?5pel5pys?=", "Authorization": "Bearer caller", "Cookie": "c=1", "X-Forwarded-For": "::1"}
	}))
	r.handle(e)
	end := r.want("completed")
	if want := strings.Replace(string(e.Body), "9007199254740993", `"`+string(e.Call)+`"`, 1); string(body) != want {
		t.Errorf("sent %s\nwant %s", body, want)
	}
	if want := `{"jsonrpc":"2.0", "id":"` + string(e.Call) + `", "result":{"n": 1E400, "resultType":"input_required","\u0061":[ 9007199254740993 ]}} `; string(end.Body) != want {
		t.Errorf("stored %s\nwant   %s", end.Body, want)
	}
	if c := end.Data.(*schemas.Completed); c.Result != "input_required" || c.Status != 200 || c.ErrorCode != 0 {
		t.Errorf("%+v", c)
	}
	parent, state := e.Onward(nil)
	want := http.Header{
		"Accept": {"application/json, text/event-stream"}, "Authorization": {"Bearer operator"},
		"Content-Length": {fmt.Sprint(len(body))}, "Content-Type": {"application/json"},
		"Mcp-Method": {"tools/call"}, "Mcp-Name": {"=?base64?" + base64.StdEncoding.EncodeToString([]byte("café ")) + "?="},
		"Mcp-Param-Region": {"=?base64?5pel5pys?="}, "Mcp-Protocol-Version": {"2026-07-28"},
		"Traceparent": {parent}, "Tracestate": {state}, "User-Agent": {"waybill"}, "X-Team": {"a", "b"},
	}
	if got, want := fmt.Sprint(header), fmt.Sprint(want); got != want {
		t.Errorf("headers %s\nwant    %s", got, want)
	}
}

func TestHeaderText(t *testing.T) {
	for in, want := range map[string]string{
		"echo": "echo", "two words": "two words", "a\tb": "=?base64?YQli?=",
		" us-west1": "=?base64?IHVzLXdlc3Qx?=", "us-west1 ": "=?base64?dXMtd2VzdDEg?=", "\tindented": "=?base64?CWluZGVudGVk?=",
		"日本語": "=?base64?5pel5pys6Kqe?=", "line1\r\nline2": "=?base64?bGluZTENCmxpbmUy?=",
		"=?base64?literal?=": "=?base64?PT9iYXNlNjQ/bGl0ZXJhbD89?=", "=?base64?x": "=?base64?x", "a\x7f": "=?base64?YX8=?=",
	} {
		if got := headerText(in); got != want {
			t.Errorf("%q: %q, want %q", in, got, want)
		}
	}
}

// A body that says something else than was authorized does not leave the house.
func TestMismatch(t *testing.T) {
	r := newRig(t, func(http.ResponseWriter, *http.Request) { t.Error("called") })
	for _, c := range []struct{ method, name, body string }{
		{"tools/list", "", `{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{"name":"rm"}}`},
		{"tools/call", "ls", `{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{"name":"rm"}}`},
		{"tools/call", "", `{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{"name":"rm"}}`},
		{"tools/call", "", `{"jsonrpc":"2.0","id":1,"method":"tools/call"}`},
		{"resources/read", "a:b", `{"jsonrpc":"2.0","id":1,"method":"resources/read","params":{"uri":"a:c"}}`},
		{"tasks/cancel", "t1", `{"jsonrpc":"2.0","id":1,"method":"tasks/cancel","params":{"taskId":"t2"}}`},
		{"tools/call", "ls", `{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{"name":"ls","name":"ls"}}`},
		{"tools/call", "ls", `{"jsonrpc":"2.0","method":"tools/call","params":{"name":"ls"}}`},
		{"tools/call", "ls", ``},
	} {
		r.log.events, r.log.ids = nil, nil
		r.handle(r.method(c.method, c.name, c.body))
		if s := summary(r.want("invalid")); s.Attempts != 0 {
			t.Errorf("%+v", s)
		}
	}
	r.log.events, r.log.ids = nil, nil
	r.handle(r.call("ls", authorized(func(a *schemas.Authorized) { a.Headers = map[string]string{"Mcp-Param-A": "1\r\nX: 2"} })))
	r.want("invalid")
}

// An answer may be nested deeper than a request.
func TestDepth(t *testing.T) {
	for depth, want := range map[int]string{63: "completed", 511: "completed", 512: "bad_answer"} {
		for _, kind := range []string{"application/json", "text/event-stream"} {
			r := newRig(t, func(w http.ResponseWriter, req *http.Request) {
				w.Header().Set("Content-Type", kind)
				before, after := "", ""
				if kind == "text/event-stream" {
					before, after = "data: ", "\n\n"
				}
				fmt.Fprintf(w, `%s{"jsonrpc":"2.0","id":%s,"result":%s%s}%s`, before, idOf(req), strings.Repeat("[", depth), strings.Repeat("]", depth), after)
			})
			r.handle(r.call("write"))
			r.want(want)
		}
	}
	r := newRig(t, func(http.ResponseWriter, *http.Request) { t.Error("called") })
	r.handle(r.method("tools/call", "n", `{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{"name":"n","arguments":`+
		strings.Repeat("[", 64)+strings.Repeat("]", 64)+`}}`))
	r.want("invalid")
}

func TestOneWay(t *testing.T) {
	const note = `{"jsonrpc":"2.0", "method":"notifications/x"}`
	oneWay := authorized(func(a *schemas.Authorized) { a.OneWay = true })
	for status, want := range map[int]string{202: "completed", 200: "completed", 400: "bad_answer", 500: "unknown"} {
		var got []byte
		r := newRig(t, func(w http.ResponseWriter, req *http.Request) {
			got, _ = io.ReadAll(req.Body)
			w.WriteHeader(status)
		})
		r.handle(r.method("notifications/x", "", note, oneWay))
		end := r.want(want)
		if string(got) != note || end.Body != nil {
			t.Errorf("%q, answer %q", got, end.Body)
		}
	}
}

// Messages of a stream are stored as they came, and the connection serves the
// next call.
func TestStream(t *testing.T) {
	leaks(t)
	const first = `{"jsonrpc":"2.0","method":"notifications/progress","params":{"progress": 1E400,"x\u0041":"é"}}`
	const second = `{"jsonrpc":"2.0","method":"notifications/message", "params" : {}}`
	conns := make(map[string]bool)
	r := newRig(t, func(w http.ResponseWriter, req *http.Request) {
		conns[req.RemoteAddr] = true
		id := idOf(req)
		w.Header().Set("Content-Type", "Text/Event-Stream")
		fmt.Fprintf(w, ": alive\n\nretry: 5\n\nevent: message\ndata: %s\n\nevent: other\ndata: x\n\n", first)
		w.(http.Flusher).Flush()
		fmt.Fprintf(w, "id: 7\ndata: %s\n\ndata: {\"jsonrpc\":\"2.0\",\"id\":%s,\ndata: \"result\":{}}\n\n", second, id)
	})
	for range 10 {
		r.log.events, r.log.ids = nil, nil
		e := r.call("write")
		r.handle(e)
		end := r.want("completed")
		if string(end.Body) != `{"jsonrpc":"2.0","id":"`+string(e.Call)+"\",\n\"result\":{}}" {
			t.Errorf("%s", end.Body)
		}
		if s := summary(end); s.Chunks != 2 || s.ChunksSHA256 != digestOf(first, second) {
			t.Error(r.log)
		}
	}
	if len(conns) != 1 {
		t.Errorf("%d connections for calls one after the other", len(conns))
	}
	r.d.Close()
	r.http.Close()
}

// A server that goes on after its answer is hung up on.
func TestStreamGoesOn(t *testing.T) {
	leaks(t)
	gone := make(chan bool, 1)
	r := newRig(t, func(w http.ResponseWriter, req *http.Request) {
		w.Header().Set("Content-Type", "text/event-stream")
		fmt.Fprintf(w, "data: {\"jsonrpc\":\"2.0\",\"id\":%s,\"result\":{}}\n\n", idOf(req))
		w.(http.Flusher).Flush()
		<-req.Context().Done()
		gone <- true
	})
	r.handle(r.call("write"))
	r.want("completed")
	<-gone
	r.d.Close()
	r.http.Close()
}

// An upstream cannot fill the log before it answers.
func TestTooManyMessages(t *testing.T) {
	r := newRig(t, func(w http.ResponseWriter, req *http.Request) {
		_ = idOf(req)
		w.Header().Set("Content-Type", "text/event-stream")
		for req.Context().Err() == nil {
			if _, err := io.WriteString(w, "data: {\"jsonrpc\":\"2.0\",\"method\":\"n\"}\n\n"); err != nil {
				return
			}
		}
	})
	r.handle(r.call("write"))
	if s := summary(r.want("too_large")); s.Chunks != maxChunks {
		t.Errorf("%+v", s)
	}
}

// Nor with few that are large.
func TestTooMuchSaid(t *testing.T) {
	message := fmt.Sprintf("data: {\"jsonrpc\":\"2.0\",\"method\":\"n\",\"params\":{\"x\":%q}}\n\n", strings.Repeat("x", 2<<20))
	r := newRig(t, func(w http.ResponseWriter, req *http.Request) {
		_ = idOf(req)
		w.Header().Set("Content-Type", "text/event-stream")
		for req.Context().Err() == nil {
			if _, err := io.WriteString(w, message); err != nil {
				return
			}
		}
	}, func(o *Options) { o.Answers.Secrets = Allow }) // megabytes pass RE2 slowly with the race detector
	r.handle(r.call("write"))
	if s := summary(r.want("too_large")); s.Chunks != maxSaid/len(message) {
		t.Errorf("%d messages of %d bytes", s.Chunks, len(message))
	}
}

func TestOnly(t *testing.T) {
	only := authorized(func(a *schemas.Authorized) { a.Only = []string{"read*", "x"} })
	for _, c := range []struct{ method, result, want, removed string }{
		{"tools/list", `{"tools":[ {"name":"read_a"} ,  {"name":"write"}, {"x":1, "name":"x"} ] , "nextCursor":"c"}`,
			`{"tools":[ {"name":"read_a"} , {"x":1, "name":"x"} ] , "nextCursor":"c"}`, "[write]"},
		{"tools/list", `{"tools":[{"name":"w"},{"name":1},{},7]}`, `{"tools":[]}`, "[w   ]"},
		{"tools/list", `{"tools": [ ]}`, `{"tools": [ ]}`, "[]"},
		{"prompts/list", `{"prompts":[{"name":"w"},{"name":"reader"}]}`, `{"prompts":[{"name":"reader"}]}`, "[w]"},
		{"resources/list", `{"resources":[{"uri":"read:a","name":"no"},{"uri":"w","name":"x"}]}`, `{"resources":[{"uri":"read:a","name":"no"}]}`, "[w]"},
		{"resources/templates/list", `{"resourceTemplates":[{"uriTemplate":"w/{x}"}]}`, `{"resourceTemplates":[]}`, "[w/{x}]"},
		{"server/discover", `{"tools":[{"name":"w"}]}`, `{"tools":[{"name":"w"}]}`, "[]"},
		{"tools/list", `{"tools":{"name":"w"}}`, "", ""},
		{"tools/list", `{"Tools":[{"name":"w"}]}`, "", ""},
		{"tools/list", `{"tools":[{"name":"x","Name":"w"}]}`, "", ""},
		{"tools/list", `{"resultType":"complete"}`, `{"resultType":"complete"}`, "[]"},
	} {
		r := newRig(t, func(w http.ResponseWriter, req *http.Request) {
			fmt.Fprintf(w, `{"jsonrpc":"2.0","id":%s,"result":%s}`, idOf(req), c.result)
		})
		e := r.method(c.method, "", `{"jsonrpc":"2.0","id":1,"method":"`+c.method+`"}`, only)
		r.handle(e)
		if c.want == "" {
			r.want("bad_answer")
			continue
		}
		end := r.want("completed")
		removed := end.Data.(*schemas.Completed).Removed
		if fmt.Sprint(removed) != c.removed {
			t.Errorf("%s: removed %q, want %s", c.result, removed, c.removed)
		}
		m, err := jsonrpc.Decode(end.Body, jsonrpc.Limits{})
		if err != nil {
			t.Fatal(err)
		}
		if got := string(m.Result().Raw()); got != c.want && !(len(removed) > 0 && squeeze(got) == squeeze(c.want)) {
			t.Errorf("%s\ngot  %s\nwant %s", c.result, got, c.want)
		}
	}
}

// squeeze ignores which of the spaces around a removed element stay.
func squeeze(s string) string { return strings.ReplaceAll(s, " ", "") }

// The table of what is idempotent, by what happens when the connection breaks.
func TestIdempotent(t *testing.T) {
	var calls atomic.Int32
	r := newRig(t, func(w http.ResponseWriter, req *http.Request) {
		_ = idOf(req)
		calls.Add(1)
		hangUp(w)
	})
	for method, twice := range map[string]bool{
		"tools/list": true, "resources/read": true, "server/discover": true,
		"ping": true, "logging/setLevel": true, "resources/subscribe": true, "tasks/result": true,
		"tools/call": false, "tasks/cancel": false, "tasks/update": false, "unheard/of": false, "": false,
	} {
		calls.Store(0)
		name := ""
		if method == "tools/call" || method == "resources/read" || method == "resources/subscribe" {
			name = "n"
		}
		d := r.fresh() // its breaker is new
		e := r.method(method, name, `{"jsonrpc":"2.0","id":1,"method":"`+method+`","params":{"name":"n","uri":"n","taskId":"t"}}`)
		if err := d.Handle(t.Context(), e, r.log.emit); err != nil {
			t.Fatal(err)
		}
		if got := calls.Load() > 1; got != twice {
			t.Errorf("%s: called %d times", method, calls.Load())
		}
	}
}

// A server of the official SDK, with an answer in JSON or as a stream.
func TestSDK(t *testing.T) {
	leaks(t)
	server := mcp.NewServer(&mcp.Implementation{Name: "upstream", Version: "1"}, nil)
	type in struct {
		Text string `json:"text"`
	}
	mcp.AddTool(server, &mcp.Tool{Name: "echo"}, func(ctx context.Context, req *mcp.CallToolRequest, in in) (*mcp.CallToolResult, any, error) {
		if token := req.Params.GetProgressToken(); token != nil {
			_ = req.Session.NotifyProgress(ctx, &mcp.ProgressNotificationParams{ProgressToken: token, Progress: 1})
		}
		return &mcp.CallToolResult{Content: []mcp.Content{&mcp.TextContent{Text: in.Text}}}, nil, nil
	})
	const meta = `"_meta":{"io.modelcontextprotocol/protocolVersion":"2026-07-28","io.modelcontextprotocol/clientCapabilities":{},"progressToken":"p"}`
	for _, asJSON := range []bool{false, true} {
		h := httptest.NewServer(mcp.NewStreamableHTTPHandler(func(*http.Request) *mcp.Server { return server },
			&mcp.StreamableHTTPOptions{Stateless: true, JSONResponse: asJSON}))
		r := newRig(t, nil, func(o *Options) { o.Servers[0].URL = h.URL })
		for _, c := range []struct{ method, name, params, want string }{
			{"server/discover", "", `{` + meta + `}`, "supportedVersions"},
			{"tools/list", "", `{` + meta + `}`, `"echo"`},
			{"tools/call", "echo", `{"name":"echo","arguments":{"text":"hello"},` + meta + `}`, `"hello"`},
			{"tools/call", "nope", `{"name":"nope","arguments":{},` + meta + `}`, `-32602`},
			{"unheard/of", "", `{` + meta + `}`, `-32601`},
		} {
			r.log.events, r.log.ids = nil, nil
			e := r.method(c.method, c.name, `{"jsonrpc":"2.0","id":1,"method":"`+c.method+`","params":`+c.params+`}`)
			r.handle(e)
			end := r.want("completed")
			if !strings.Contains(string(end.Body), c.want) || !strings.Contains(string(end.Body), string(e.Call)) {
				t.Errorf("%s: %s", c.method, end.Body)
			}
			s := summary(end)
			if want := c.name == "echo" && !asJSON; want != (s.Chunks == 1) {
				t.Errorf("%s: %d chunks%v", c.method, s.Chunks, r.log)
			}
		}
		r.d.Close()
		h.Close()
	}
}

func TestStats(t *testing.T) {
	r := newRig(t, nil, func(o *Options) { o.Servers = append(o.Servers, Server{Name: "a", URL: "http://127.0.0.1:1"}) })
	if got := r.d.Stats(); !slices.Equal(got, []Stat{{Server: "s", Breaker: "closed"}, {Server: "a", Breaker: "closed"}}) {
		t.Errorf("%+v", got)
	}
}

// echoServer answers every request on a connection, as cheaply as can be, so
// that the benchmark shows the dispatcher.
func echoServer(b *testing.B) string {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				buf := make([]byte, 16<<10)
				out := make([]byte, 0, 1024)
				for {
					n, err := c.Read(buf)
					if err != nil {
						return
					}
					i := strings.Index(string(buf[:n]), `"id": "`) + len(`"id": "`)
					id := buf[i : i+strings.IndexByte(string(buf[i:n]), '"')]
					const result = `,"result":{"content":[{"type":"text","text":"hello"}],"resultType":"complete"}}`
					out = fmt.Appendf(out[:0], "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n{\"jsonrpc\":\"2.0\",\"id\":\"%s\"%s",
						len(`{"jsonrpc":"2.0","id":""`)+len(id)+len(result), id, result)
					if _, err := c.Write(out); err != nil {
						return
					}
				}
			}()
		}
	}()
	return "http://" + l.Addr().String() + "/mcp"
}

// cpu reports the CPU time of the whole process per operation, which does not
// depend on what else the machine does, or on how many run at once.
func cpu(b *testing.B) func() {
	used := func() time.Duration {
		var u syscall.Rusage
		if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
			b.Fatal(err)
		}
		return time.Duration(u.Utime.Nano() + u.Stime.Nano())
	}
	start := used()
	return func() { b.ReportMetric(float64(used()-start)/1e3/float64(b.N), "cpu-µs/op") }
}

// BenchmarkTransport is what net/http alone costs for the same exchange: the
// part of BenchmarkHandle that is not ours.
func BenchmarkTransport(b *testing.B) {
	r := newRig(b, nil)
	url := echoServer(b)
	e := r.call("write")
	body := strings.Replace(string(e.Body), "9007199254740993", `"`+string(e.Call)+`"`, 1)
	var t http.Transport
	defer t.CloseIdleConnections()
	b.ReportAllocs()
	defer cpu(b)()
	for b.Loop() {
		req, err := http.NewRequest(http.MethodPost, url, strings.NewReader(body))
		if err != nil {
			b.Fatal(err)
		}
		resp, err := t.RoundTrip(req)
		if err != nil {
			b.Fatal(err)
		}
		_, _ = io.Copy(io.Discard, resp.Body)
		resp.Body.Close()
	}
}

// BenchmarkHandle: one call against an upstream on loopback, the log costing
// nothing. The upstream's part is in the figure.
func BenchmarkHandle(b *testing.B) {
	r := newRig(b, nil, func(o *Options) { o.Servers[0].URL = echoServer(b) })
	for _, tool := range []string{"write", "read"} {
		e := r.call(tool)
		var seq atomic.Uint64
		emit := func(_ context.Context, e schemas.Event) (schemas.Receipt, error) {
			if f, ok := e.Data.(*schemas.Failed); ok {
				b.Errorf("%+v", f)
			}
			return schemas.Receipt{Seq: seq.Add(1)}, nil
		}
		handle := func() {
			e := e
			e.Stored = time.Now()
			if err := r.d.Handle(context.Background(), e, emit); err != nil {
				b.Error(err)
			}
		}
		e.Data.(*schemas.Authorized).Deadline = time.Now().Add(time.Hour)
		b.Run(tool, func(b *testing.B) {
			b.ReportAllocs()
			defer cpu(b)()
			for b.Loop() {
				handle()
			}
		})
		b.Run(tool+"-parallel", func(b *testing.B) {
			b.ReportAllocs()
			b.SetParallelism(16)
			defer cpu(b)()
			b.RunParallel(func(pb *testing.PB) {
				for pb.Next() {
					handle()
				}
			})
		})
	}
}
