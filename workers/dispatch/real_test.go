package dispatch

import (
	"bytes"
	"fmt"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"waybill.dev/schemas"
	"waybill.dev/test/peers"
)

// between stands between the gateway and a server of others: it can hang up in
// the middle of an answer, and put another server, which knows no session, into
// the place of the first.
type between struct {
	to  atomic.Pointer[httputil.ReverseProxy]
	cut atomic.Int32 // so many answers to tools/call end after their first event

	mu  sync.Mutex
	log []string // method and JSON-RPC method or Last-Event-ID
}

func (b *between) use(t *testing.T, target string) {
	u, err := url.Parse(target)
	if err != nil {
		t.Fatal(err)
	}
	b.to.Store(&httputil.ReverseProxy{
		FlushInterval: -1,
		ErrorLog:      log.New(io.Discard, "", 0), // of the connections that are to break
		Rewrite:       func(r *httputil.ProxyRequest) { r.SetURL(u); r.Out.URL.Path = u.Path },
		ErrorHandler:  func(w http.ResponseWriter, _ *http.Request, _ error) { hangUp(w) },
	})
}

func (b *between) ServeHTTP(w http.ResponseWriter, req *http.Request) {
	what := req.Method
	if id := req.Header.Get("Last-Event-Id"); id != "" {
		what += " after"
	}
	b.mu.Lock()
	b.log = append(b.log, what)
	b.mu.Unlock()
	// Else net/http would break streams that begin while the proxy is not quite
	// done with the request.
	body, _ := io.ReadAll(req.Body)
	req.Body = io.NopCloser(bytes.NewReader(body))
	if req.Method == http.MethodPost && b.cut.Load() > 0 && b.cut.Add(-1) >= 0 {
		w = &cutting{ResponseWriter: w}
	}
	b.to.Load().ServeHTTP(w, req)
}

func (b *between) came(what string) (n int) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, s := range b.log {
		if s == what {
			n++
		}
	}
	return n
}

// cutting is a connection that breaks after the first event.
type cutting struct{ http.ResponseWriter }

func (c *cutting) Unwrap() http.ResponseWriter { return c.ResponseWriter }

func (c *cutting) Write(b []byte) (int, error) {
	_, _ = c.ResponseWriter.Write(b)
	_ = http.NewResponseController(c.ResponseWriter).Flush()
	panic(http.ErrAbortHandler)
}

func real(t *testing.T, target string) (*rig, *between) {
	b := &between{}
	b.use(t, target)
	srv := httptest.NewServer(b)
	t.Cleanup(srv.Close)
	t.Cleanup(srv.CloseClientConnections)
	r := newRig(t, nil, func(o *Options) { o.Servers[0].URL = srv.URL + "/mcp" })
	r.d.sessions.timing.silence = 300 * time.Millisecond
	return r, b
}

// start opens session s1 as a client with every capability.
func (r *rig) start() {
	r.t.Helper()
	const body = `{"jsonrpc":"2.0","id":0,"method":"initialize","params":{"protocolVersion":"2025-11-25","capabilities":{"sampling":{},"elicitation":{"form":{}},"roots":{"listChanged":true}},"clientInfo":{"name":"c","version":"1"}}}`
	r.log.add(schemas.Event{
		Tenant: "acme", Session: "s1", Agent: "a1",
		Data: &schemas.Opened{Protocol: "mcp", Name: "c", Server: "s", Revision: "2025-11-25"}, Body: []byte(body),
	})
	e := r.method("initialize", "", body, inSession("s1"))
	r.handle(e)
	r.ends(e, "completed")
	e = r.method("notifications/initialized", "", `{"jsonrpc":"2.0","method":"notifications/initialized"}`, inSession("s1"),
		authorized(func(a *schemas.Authorized) { a.OneWay = true }))
	r.handle(e)
	r.ends(e, "completed")
}

// tool calls a tool and answers what the server asks meanwhile.
func (r *rig) tool(name, args string, answers ...string) (schemas.Event, string) {
	r.t.Helper()
	e := r.method("tools/call", name, `{"jsonrpc":"2.0","id":7,"method":"tools/call","params":{"name":"`+name+`","arguments":`+args+`,"_meta":{"progressToken":"t"}}}`, inSession("s1"))
	done := make(chan struct{})
	go func() { defer close(done); r.handle(e) }()
	before := len(r.log.of(schemas.KindAnswered))
	for i, answer := range answers {
		a := r.log.await(r.t, schemas.KindAsked, before+i+1)[before+i]
		r.reply(a, answer)
	}
	<-done
	end := r.ends(e, "completed")
	if end.Data.(*schemas.Completed).ErrorCode != 0 {
		r.t.Errorf("%s: %s", name, end.Body)
	}
	return end, string(end.Body)
}

// reply answers something that the server asked.
func (r *rig) reply(a schemas.Event, answer string) {
	r.t.Helper()
	p := a.Data.(*schemas.Asked)
	e := r.log.add(a.Next(&schemas.Answered{Target: p.Target, ID: p.ID}, []byte(`{"jsonrpc":"2.0","id":"`+p.ID+`","result":`+answer+`}`)))
	if err := r.d.Hear(r.t.Context(), e, r.log.emit); err != nil {
		r.t.Fatal(err)
	}
}

const sampled = `{"model":"m","role":"assistant","content":{"type":"text","text":"forty-two"}}`

// The TypeScript SDK's server: sessions, streams that can be resumed, requests
// to the client within and outside of calls.
func TestServerEverything(t *testing.T) {
	r, b := real(t, peers.ServerEverything(t))
	r.start()
	// Outside of any call it asks for the roots, a moment after it was told
	// that the client is ready.
	asked := r.log.await(t, schemas.KindAsked, 1)[0]
	if p := asked.Data.(*schemas.Asked); p.Method != "roots/list" || asked.Call != "" {
		t.Errorf("%+v", p)
	}
	r.reply(asked, `{"roots":[{"uri":"file:///r","name":"the root"}]}`)

	if _, body := r.tool("echo", `{"message":"hello"}`); !strings.Contains(body, "Echo: hello") {
		t.Error(body)
	}
	if _, body := r.tool("trigger-sampling-request", `{"prompt":"q"}`, sampled); !strings.Contains(body, "forty-two") {
		t.Error(body)
	}
	if _, body := r.tool("trigger-elicitation-request", `{}`, `{"action":"decline"}`); !strings.Contains(body, "declined") {
		t.Error(body)
	}
	end, body := r.tool("trigger-long-running-operation", `{"duration":0.3,"steps":3}`)
	if s := summary(end); s.Chunks != 3 || !strings.Contains(body, "completed") {
		t.Errorf("%+v %s", s, body)
	}
	// The stream breaks and is resumed.
	b.cut.Store(1)
	end, body = r.tool("trigger-long-running-operation", `{"duration":1,"steps":4}`)
	if s := summary(end); s.Chunks != 4 || !strings.Contains(body, "completed") || s.Attempts != 1 || b.came("GET after") == 0 {
		t.Errorf("%+v %s %v", s, body, b.log)
	}
	// The server is started again, and knows nothing.
	b.use(t, peers.ServerEverything(t))
	if _, body := r.tool("echo", `{"message":"again"}`); !strings.Contains(body, "Echo: again") {
		t.Error(body)
	}
	if n := len(r.log.of(schemas.KindConnected)); n != 2 {
		t.Errorf("connected %d times", n)
	}
	// Cancelled: the server stops, and says nothing more of it.
	e := r.method("tools/call", "trigger-long-running-operation", `{"jsonrpc":"2.0","id":7,"method":"tools/call","params":{"name":"trigger-long-running-operation","arguments":{"duration":60,"steps":600},"_meta":{"progressToken":"t"}}}`, inSession("s1"))
	done := make(chan struct{})
	go func() { defer close(done); r.handle(e) }()
	r.log.await(t, schemas.KindProgressed, 8)
	if err := r.d.Hear(t.Context(), e.Next(&schemas.Cancel{Reason: "enough"}, nil), r.log.emit); err != nil {
		t.Fatal(err)
	}
	<-done
	r.ends(e, "cancelled")
	closed := r.log.add(schemas.Event{Tenant: "acme", Session: "s1", Agent: "a1", Data: &schemas.Closed{Reason: "client"}})
	if err := r.d.Hear(t.Context(), closed, r.log.emit); err != nil {
		t.Fatal(err)
	}
	for b.came("DELETE") == 0 {
		select {
		case <-t.Context().Done():
			t.Fatal("not deleted")
		case <-time.After(time.Millisecond):
		}
	}
}

// The Go SDK's server, with sessions.
func TestGoEverythingServer(t *testing.T) {
	r, b := real(t, peers.EverythingServer(t, "-stateless=false"))
	r.start()
	if _, body := r.tool("test_simple_text", `{}`); !strings.Contains(body, "simple text") {
		t.Error(body)
	}
	if _, body := r.tool("test_sampling", `{"prompt":"q"}`, sampled); !strings.Contains(body, "forty-two") {
		t.Error(body)
	}
	if _, body := r.tool("test_elicitation", `{"message":"m"}`, `{"action":"accept","content":{"username":"sure"}}`); !strings.Contains(body, "sure") {
		t.Error(body)
	}
	if end, _ := r.tool("test_tool_with_progress", `{}`); summary(end).Chunks != 3 {
		t.Errorf("%+v", summary(end))
	}
	e := r.method("resources/subscribe", "test://watched-resource", `{"jsonrpc":"2.0","id":1,"method":"resources/subscribe","params":{"uri":"test://watched-resource"}}`, inSession("s1"))
	r.handle(e)
	r.ends(e, "completed")
	n := len(r.log.await(t, schemas.KindNotified, 1))
	// In its place comes one that knows nothing: the subscription is made anew
	// with the next call.
	b.use(t, peers.EverythingServer(t, "-stateless=false"))
	if _, body := r.tool("test_simple_text", `{}`); !strings.Contains(body, "simple text") {
		t.Error(body)
	}
	if n := len(r.log.of(schemas.KindConnected)); n != 2 {
		t.Errorf("connected %d times", n)
	}
	for _, e := range r.log.await(t, schemas.KindNotified, n+1)[n:] {
		if p := e.Data.(*schemas.Notified); p.Method != "notifications/resources/updated" {
			t.Error(p.Method)
		}
	}
	e = r.method("ping", "", `{"jsonrpc":"2.0","id":1,"method":"ping"}`, inSession("s1"))
	r.handle(e)
	if end := r.ends(e, "completed"); string(end.Body) != fmt.Sprintf(`{"jsonrpc":"2.0","id":%q,"result":{}}`, e.Call) {
		t.Errorf("%s", end.Body)
	}
}
