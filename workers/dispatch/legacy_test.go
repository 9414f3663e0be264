package dispatch

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/time/rate"

	"waybill.dev/schemas"
	"waybill.dev/schemas/jsonrpc"
)

// legacyServer is an MCP server of a revision with sessions, as plain as the
// protocol allows, whose answers a test spoils.
type legacyServer struct {
	call func(w http.ResponseWriter, req *http.Request, m *jsonrpc.Message) // requests in a session; nil: an empty result
	get  http.HandlerFunc                                                   // nil: 405
	init func(w http.ResponseWriter, m *jsonrpc.Message) bool               // true: it has answered
	lost func(w http.ResponseWriter, m *jsonrpc.Message)                    // to a session that it does not know; nil: 404

	mu      sync.Mutex
	live    map[string]bool
	opened  int
	log     []string // what came, in order
	headers []http.Header
	bodies  map[string]string // the last of each method
	news    chan struct{}
}

func (l *legacyServer) ServeHTTP(w http.ResponseWriter, req *http.Request) {
	id := req.Header.Get("Mcp-Session-Id")
	what, m := req.Method, (*jsonrpc.Message)(nil)
	if req.Method == http.MethodPost {
		b, _ := io.ReadAll(req.Body)
		var err error
		if m, err = jsonrpc.Decode(b, jsonrpc.Limits{Depth: 512}); err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		if what = m.Method(); m.IsResponse() {
			what = "response"
		}
	}
	l.mu.Lock()
	l.log = append(l.log, what)
	l.headers = append(l.headers, req.Header)
	if l.bodies == nil {
		l.bodies, l.live = map[string]string{}, map[string]bool{}
	}
	if m != nil {
		l.bodies[what] = string(m.Raw())
	}
	known := l.live[id]
	if what == http.MethodDelete {
		delete(l.live, id)
	}
	if l.news != nil {
		close(l.news)
		l.news = nil
	}
	l.mu.Unlock()
	switch {
	case what == "initialize":
		if l.init != nil && l.init(w, m) {
			return
		}
		l.mu.Lock()
		l.opened++
		id := fmt.Sprintf("up-%d", l.opened)
		l.live[id] = true
		l.mu.Unlock()
		version, _ := m.Params().Get("protocolVersion").Text()
		w.Header().Set("Mcp-Session-Id", id)
		answerJSON(w, 200, `{"jsonrpc":"2.0","id":`+string(m.ID().Raw())+`,"result":{"protocolVersion":"`+version+`","capabilities":{},"serverInfo":{"name":"s","version":"1"}}}`)
	case !known && l.lost != nil:
		l.lost(w, m)
	case !known:
		http.Error(w, "session not found", http.StatusNotFound)
	case what == http.MethodGet && l.get == nil:
		w.WriteHeader(http.StatusMethodNotAllowed)
	case what == http.MethodGet:
		l.get(w, req)
	case what == http.MethodDelete:
	case !m.IsRequest():
		w.WriteHeader(http.StatusAccepted)
	case l.call == nil:
		answerJSON(w, 200, result(m))
	default:
		l.call(w, req, m)
	}
}

func result(m *jsonrpc.Message) string {
	return string(jsonrpc.ResultResponse(m.ID().Raw(), []byte(`{"ok": 1E400}`)))
}

// forget is a restart of the server.
func (l *legacyServer) forget() {
	l.mu.Lock()
	defer l.mu.Unlock()
	clear(l.live)
}

// came are the messages of a kind that came.
func (l *legacyServer) came(what string) (n int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, s := range l.log {
		if s == what {
			n++
		}
	}
	return n
}

func (l *legacyServer) body(what string) string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.bodies[what]
}

// await waits until something has come n times.
func (l *legacyServer) await(t testing.TB, what string, n int) {
	t.Helper()
	late := time.After(20 * time.Second)
	for {
		l.mu.Lock()
		if l.news == nil {
			l.news = make(chan struct{})
		}
		news := l.news
		l.mu.Unlock()
		if l.came(what) >= n {
			return
		}
		select {
		case <-news:
		case <-late:
			l.mu.Lock()
			defer l.mu.Unlock()
			t.Fatalf("no %d %s come: %v", n, what, l.log)
		}
	}
}

const initialize = `{"jsonrpc":"2.0","id": 0, "method":"initialize","params":{"protocolVersion":"2025-11-25","capabilities":{"sampling":{},"x":1E400},"clientInfo":{"name":"c","version":"1"}}}`

// inSession makes an event one of a session that a client has opened.
func inSession(key string) func(*schemas.Event) {
	return func(e *schemas.Event) {
		e.Session = schemas.SessionKey(key)
		e.Data.(*schemas.Authorized).Revision = "2025-11-25"
	}
}

// open stores that a client has opened a session.
func (r *rig) open(key string) {
	r.log.add(schemas.Event{
		Tenant: "acme", Session: schemas.SessionKey(key), Agent: "a1",
		Data: &schemas.Opened{Protocol: "mcp", Name: "c", Server: "s", Revision: "2025-11-25"}, Body: []byte(initialize),
	})
}

func legacyRig(t testing.TB, l *legacyServer, change ...func(*Options)) *rig {
	r := newRig(t, l.ServeHTTP, change...)
	r.open("s1")
	quick(r.d)
	t.Cleanup(r.http.CloseClientConnections) // of streams that would never end
	return r
}

// quick makes the pauses short.
func quick(d *Dispatcher) {
	d.sessions.timing.pace = rate.Inf
	d.sessions.timing.pause, d.sessions.timing.pauses, d.sessions.timing.rest = time.Millisecond, 10*time.Millisecond, 10*time.Millisecond
}

func (r *rig) legacy(tool string, change ...func(*schemas.Event)) schemas.Event {
	return r.call(tool, append([]func(*schemas.Event){inSession("s1")}, change...)...)
}

// outcomeOf is how a call ended.
func (r *rig) outcomeOf(e schemas.Event) (string, schemas.Event) {
	r.t.Helper()
	for _, k := range []schemas.Kind{schemas.KindCompleted, schemas.KindFailed, schemas.KindCancelled} {
		for _, end := range r.log.of(k) {
			if end.Call == e.Call {
				return outcome(end), end
			}
		}
	}
	r.t.Fatalf("call %s has no ending%v", e.Call, r.log)
	return "", schemas.Event{}
}

func (r *rig) ends(e schemas.Event, want string) schemas.Event {
	r.t.Helper()
	got, end := r.outcomeOf(e)
	if got != want {
		r.t.Fatalf("ended %s (%+v), want %s%v", got, end.Data, want, r.log)
	}
	return end
}

// What goes out in a session that the client opens at the server itself.
func TestLegacyOpen(t *testing.T) {
	leaks(t)
	l := &legacyServer{}
	r := legacyRig(t, l)
	first := r.method("initialize", "", initialize, inSession("s1"))
	r.handle(first)
	end := r.ends(first, "completed")
	want := strings.Replace(initialize, `"id": 0`, `"id": "`+string(first.Call)+`"`, 1)
	if got := l.body("initialize"); got != want {
		t.Errorf("sent %s\nwant %s", got, want)
	}
	if !strings.Contains(string(end.Body), `"protocolVersion":"2025-11-25"`) {
		t.Errorf("answer %s", end.Body)
	}
	connected := r.log.of(schemas.KindConnected)
	if len(connected) != 1 {
		t.Fatal(r.log)
	}
	if c := connected[0].Data.(*schemas.Connected); c.Server != "s" || c.Upstream != "up-1" || c.Revision != "2025-11-25" || c.By == "" ||
		string(connected[0].Body) != string(end.Body) || connected[0].Call != "" || connected[0].Seq > end.Seq {
		t.Errorf("%+v %s", c, connected[0].Body)
	}
	ready := r.method("notifications/initialized", "", `{"jsonrpc":"2.0","method":"notifications/initialized"}`, inSession("s1"),
		authorized(func(a *schemas.Authorized) { a.OneWay = true }))
	r.handle(ready)
	r.ends(ready, "completed")
	call := r.legacy("write", authorized(func(a *schemas.Authorized) {
		a.Headers = map[string]string{"Mcp-Param-Region": "x"}
	}))
	r.handle(call)
	if end := r.ends(call, "completed"); !strings.Contains(string(end.Body), "1E400") {
		t.Errorf("answer %s", end.Body)
	}
	l.await(t, "GET", 1)
	l.mu.Lock()
	for i, h := range l.headers {
		session, version := "up-1", "2025-11-25"
		if l.log[i] == "initialize" {
			session, version = "", ""
		}
		if h.Get("Mcp-Session-Id") != session || h.Get("Mcp-Protocol-Version") != version || h["Mcp-Method"] != nil || h["Mcp-Name"] != nil || h["Mcp-Param-Region"] != nil {
			t.Errorf("headers of %s: %v", l.log[i], h)
		}
		if l.log[i] == "GET" && (h.Get("Accept") != "text/event-stream" || h["Content-Type"] != nil || h["Last-Event-Id"] != nil) {
			t.Errorf("headers of GET: %v", h)
		}
	}
	if want := `{"jsonrpc":"2.0", "id": "` + string(call.Call) + `","method":"tools/call"`; !strings.HasPrefix(l.bodies["tools/call"], want) {
		t.Errorf("sent %s", l.bodies["tools/call"])
	}
	l.mu.Unlock()
	if n := r.d.Stats()[0].Sessions; n != 1 {
		t.Errorf("%d sessions", n)
	}
	r.d.Close()
	r.http.Close()
}

// A call in a session that the server does not know yet opens one, once.
func TestLegacyOpensOnDemand(t *testing.T) {
	l := &legacyServer{}
	r := legacyRig(t, l)
	r.open("s2")
	var calls []schemas.Event
	for i := range 20 {
		calls = append(calls, r.legacy("write", inSession(fmt.Sprintf("s%d", i%2+1))))
	}
	var wg sync.WaitGroup
	for _, e := range calls {
		wg.Go(func() { r.handle(e) })
	}
	wg.Wait()
	for _, e := range calls {
		r.ends(e, "completed")
	}
	if l.opened != 2 || l.came("notifications/initialized") != 2 {
		t.Errorf("%d sessions: %v", l.opened, l.log)
	}
	if got := l.body("initialize"); !strings.Contains(got, `"capabilities":{"sampling":{},"x":1E400}`) {
		t.Error(got)
	}
	// What the client says later the server has heard already.
	ready := r.method("notifications/initialized", "", `{"jsonrpc":"2.0","method":"notifications/initialized"}`, inSession("s1"),
		authorized(func(a *schemas.Authorized) { a.OneWay = true }))
	r.handle(ready)
	r.ends(ready, "completed")
	if n := l.came("notifications/initialized"); n != 2 {
		t.Errorf("told %d times", n)
	}
}

// A session that cannot be opened: the call has not been carried out.
func TestLegacyOpenFails(t *testing.T) {
	text := func(status int, body string) func(http.ResponseWriter, *jsonrpc.Message) bool {
		return func(w http.ResponseWriter, m *jsonrpc.Message) bool {
			w.Header().Set("Mcp-Session-Id", "bad")
			answerJSON(w, status, strings.Replace(body, "ID", string(m.ID().Raw()), 1))
			return true
		}
	}
	long := func(w http.ResponseWriter, _ *jsonrpc.Message) bool {
		w.Header().Set("Mcp-Session-Id", strings.Repeat("x", 600))
		w.WriteHeader(200)
		return true
	}
	for _, c := range []struct {
		name        string
		init        func(http.ResponseWriter, *jsonrpc.Message) bool
		call, start string // the endings of a call that needs the session, and of initialize itself
		deleted     bool
	}{
		{"hangs up", func(w http.ResponseWriter, _ *jsonrpc.Message) bool { hangUp(w); return true }, "unavailable", "unavailable", false},
		{"500", text(500, "sorry"), "unavailable", "bad_answer", true},
		{"429", text(429, "sorry"), "overloaded", "overloaded", true},
		{"error", text(200, `{"jsonrpc":"2.0","id":ID,"error":{"code":-32602,"message":"no"}}`), "unavailable", "completed", false},
		{"garbage", text(200, `<html>`), "unavailable", "bad_answer", true},
		{"another revision", text(200, `{"jsonrpc":"2.0","id":ID,"result":{"protocolVersion":"2024-10-07"}}`), "unavailable", "bad_answer", true},
		{"no revision", text(200, `{"jsonrpc":"2.0","id":ID,"result":{}}`), "unavailable", "bad_answer", true},
		{"too large", text(200, `{"jsonrpc":"2.0","id":ID,"result":"`+strings.Repeat("x", 100_000)+`"}`), "unavailable", "too_large", true},
		{"long id", long, "unavailable", "bad_answer", false},
	} {
		t.Run(c.name, func(t *testing.T) {
			l := &legacyServer{init: c.init}
			r := legacyRig(t, l, func(o *Options) { o.MaxAnswer = 10_000; o.Attempts = 2 })
			e := r.legacy("write")
			r.handle(e)
			r.ends(e, c.call)
			r.open("s2")
			start := r.method("initialize", "", initialize, inSession("s2"))
			r.handle(start)
			r.ends(start, c.start)
			if l.came("tools/call") != 0 {
				t.Error("called")
			}
			if c.deleted {
				l.await(t, "DELETE", 2)
			}
			if n := r.d.Stats()[0].Sessions; n != 0 {
				t.Errorf("%d sessions", n)
			}
		})
	}
}

// A server that knows only the first revision is spoken to in it, also by the
// process that comes after.
func TestOldestRevision(t *testing.T) {
	l := &legacyServer{init: func(w http.ResponseWriter, m *jsonrpc.Message) bool {
		w.Header().Set("Content-Type", "application/json")
		_, _ = fmt.Fprintf(w, `{"jsonrpc":"2.0","id":%s,"result":{"protocolVersion":"2024-11-05","capabilities":{},"serverInfo":{"name":"old","version":"1"}}}`, m.ID().Raw())
		return true
	}}
	l.bodies, l.live = map[string]string{}, map[string]bool{"": true}
	r := legacyRig(t, l)
	for range 2 {
		e := r.legacy("write")
		r.handle(e)
		r.ends(e, "completed")
		r.d = r.fresh()
	}
	if n := l.came("initialize"); n != 1 {
		t.Errorf("initialized %d times", n)
	}
}

// Without what the client said of itself, or after its end, nothing is opened.
func TestLegacyNoSession(t *testing.T) {
	l := &legacyServer{}
	r := legacyRig(t, l)
	e := r.legacy("write", inSession("unknown"))
	r.handle(e)
	r.ends(e, "invalid")
	r.log.add(schemas.Event{Tenant: "acme", Session: "s1", Agent: "a1", Data: &schemas.Closed{Reason: "client"}})
	e = r.legacy("write")
	r.handle(e)
	r.ends(e, "invalid")
	if len(l.log) != 0 {
		t.Error(l.log)
	}
}

func TestLegacyTooManySessions(t *testing.T) {
	l := &legacyServer{}
	r := legacyRig(t, l, func(o *Options) { o.MaxSessions = 1 })
	r.open("s2")
	e := r.legacy("write")
	r.handle(e)
	r.ends(e, "completed")
	e = r.legacy("write", inSession("s2"))
	r.handle(e)
	r.ends(e, "overloaded")
	closed := r.log.add(schemas.Event{Tenant: "acme", Session: "s1", Agent: "a1", Data: &schemas.Closed{}})
	if err := r.d.Hear(t.Context(), closed, r.log.emit); err != nil {
		t.Fatal(err)
	}
	e = r.legacy("write", inSession("s2"))
	r.handle(e)
	r.ends(e, "completed")
	l.await(t, "DELETE", 1)
}

// One tenant cannot take all the sessions that there may be.
func TestLegacyShare(t *testing.T) {
	r := legacyRig(t, &legacyServer{}, func(o *Options) { o.MaxSessions = 4 })
	write := func(tenant schemas.Tenant, key, want string) {
		t.Helper()
		r.log.add(schemas.Event{
			Tenant: tenant, Session: schemas.SessionKey(key), Agent: "a1",
			Data: &schemas.Opened{Protocol: "mcp", Name: "c", Server: "s", Revision: "2025-11-25"}, Body: []byte(initialize),
		})
		e := r.legacy("write", inSession(key), func(e *schemas.Event) { e.Tenant = tenant })
		r.handle(e)
		r.ends(e, want)
	}
	write("acme", "a1", "completed")
	write("acme", "a2", "completed")
	write("acme", "a3", "overloaded")
	write("other", "b1", "completed")
}

func sseHead(w http.ResponseWriter) {
	w.Header().Set("Content-Type", "text/event-stream")
	w.WriteHeader(200)
	w.(http.Flusher).Flush()
}

func say(w http.ResponseWriter, format string, a ...any) {
	fmt.Fprintf(w, format+"\n\n", a...)
	w.(http.Flusher).Flush()
}

// The server asks the client within a call, and answers when it has the answers.
func TestLegacyAsked(t *testing.T) {
	ids := []string{`1.50`, `"x\u0041"`, `9007199254740993`, `1`}
	replies := make(chan string, len(ids))
	l := &legacyServer{}
	l.call = func(w http.ResponseWriter, req *http.Request, m *jsonrpc.Message) {
		sseHead(w)
		say(w, `data: {"jsonrpc":"2.0","method":"notifications/progress","params":{"progressToken":7,"progress":1}}`)
		for _, id := range ids {
			say(w, `data: {"jsonrpc":"2.0","id":%s,"method":"sampling/createMessage","params":{"n": 1E400}}`, id)
		}
		for range ids {
			<-replies
		}
		say(w, `data: %s`, result(m))
	}
	var mu sync.Mutex
	heard := map[string]bool{}
	r := newRig(t, func(w http.ResponseWriter, req *http.Request) {
		if req.Method == http.MethodPost {
			b, _ := io.ReadAll(req.Body)
			req.Body = io.NopCloser(strings.NewReader(string(b)))
			if m, _ := jsonrpc.Decode(b, jsonrpc.Limits{}); m != nil && m.IsResponse() {
				mu.Lock()
				first := !heard[string(b)]
				heard[string(b)] = true
				mu.Unlock()
				if first && strings.Contains(string(b), "1.50") {
					hangUp(w) // this one has to come again
					mu.Lock()
					heard[string(b)] = true
					mu.Unlock()
					return
				}
				defer func() { replies <- string(b) }()
			}
		}
		l.ServeHTTP(w, req)
	})
	r.open("s1")
	quick(r.d)
	e := r.legacy("write")
	done := make(chan struct{})
	go func() { defer close(done); r.handle(e) }()
	for i, a := range r.log.await(t, schemas.KindAsked, len(ids)) {
		p := a.Data.(*schemas.Asked)
		if a.Call != e.Call || a.Edge != e.Edge || p.Server != "s" || p.Method != "sampling/createMessage" ||
			string(a.Body) != `{"jsonrpc":"2.0","id":`+ids[i]+`,"method":"sampling/createMessage","params":{"n": 1E400}}` {
			t.Errorf("%+v %s", p, a.Body)
		}
		answer := a.Next(&schemas.Answered{Target: p.Target, ID: p.ID}, []byte(`{"jsonrpc":"2.0", "id":"`+p.ID+`","result":{"i":`+fmt.Sprint(i)+`}}`))
		answer = r.log.add(answer)
		other := answer
		other.Session = "s9"
		unknown := answer.Next(&schemas.Answered{Target: p.Target, ID: "x.1"}, answer.Body)
		for _, ev := range []schemas.Event{other, unknown, answer, answer} {
			if err := r.d.Hear(t.Context(), ev, r.log.emit); err != nil {
				t.Fatal(err)
			}
		}
	}
	<-done
	s := summary(r.ends(e, "completed"))
	if s.Chunks != 1 || len(r.log.of(schemas.KindAsked)) != len(ids) {
		t.Errorf("%+v %v", s, r.log)
	}
	mu.Lock()
	defer mu.Unlock()
	for i, id := range ids {
		if want := `{"jsonrpc":"2.0", "id":` + id + `,"result":{"i":` + fmt.Sprint(i) + `}}`; !heard[want] {
			t.Errorf("the server did not hear %s: %v", want, heard)
		}
	}
	if len(heard) != len(ids) {
		t.Error(heard)
	}
}

// More questions than may wait are answered by the gateway.
func TestLegacyAsksTooMuch(t *testing.T) {
	l := &legacyServer{}
	l.call = func(w http.ResponseWriter, req *http.Request, m *jsonrpc.Message) {
		sseHead(w)
		for i := range maxAsked + 5 {
			say(w, `data: {"jsonrpc":"2.0","id":%d,"method":"ping"}`, i)
		}
		say(w, `data: %s`, result(m))
	}
	r := legacyRig(t, l)
	e := r.legacy("write")
	r.handle(e)
	r.ends(e, "completed")
	if n := len(r.log.of(schemas.KindAsked)); n != maxAsked || l.came("response") != 5 {
		t.Errorf("%d asked, %d refused", n, l.came("response"))
	}
	// They do not stand in the way of what the next call asks.
	e = r.legacy("write")
	r.handle(e)
	r.ends(e, "completed")
	if n := len(r.log.of(schemas.KindAsked)); n != 2*maxAsked || l.came("response") != 10 {
		t.Errorf("%d asked, %d refused by the second call", n, l.came("response"))
	}
}

// A stream that breaks is resumed where the server allows it, and the request
// is never sent again.
func TestLegacyResume(t *testing.T) {
	const note = `{"jsonrpc":"2.0","method":"notifications/progress","params":{"progressToken":1,"progress":%d}}`
	type conn struct {
		w    http.ResponseWriter
		last string
		id   string // of the request, as JSON
	}
	ok := func(c conn) string { return `{"jsonrpc":"2.0","id":` + c.id + `,"result":{}}` }
	for _, c := range []struct {
		name   string
		post   func(conn)
		get    func(n int, c conn)
		want   string
		chunks int
		gets   int // at least
	}{
		{"no ids", func(c conn) { say(c.w, "data: "+note, 1) }, nil, "unknown", 1, 0},
		{"primed", func(c conn) { say(c.w, "id: a\nretry: 1\ndata: ") },
			func(_ int, c conn) { sseHead(c.w); say(c.w, "id: b\ndata: "+ok(c)) }, "completed", 0, 1},
		{"cut within an event", func(c conn) { say(c.w, "id: a\ndata: "+note, 1); fmt.Fprint(c.w, "id: b\ndata: {") },
			func(_ int, c conn) { sseHead(c.w); say(c.w, "id: b\ndata: "+ok(c)) }, "completed", 1, 1},
		{"many times", func(c conn) { say(c.w, "id: 0\ndata:") },
			func(n int, c conn) {
				if n%2 == 0 {
					hangUp(c.w)
					return
				}
				sseHead(c.w)
				if n < 30 {
					say(c.w, "id: %d\ndata: "+note, n, n)
					return
				}
				say(c.w, "id: z\ndata: "+ok(c))
			}, "completed", 15, 31},
		{"not noticed yet", func(c conn) { say(c.w, "id: a\ndata:") },
			func(n int, c conn) {
				if n < 3 {
					c.w.WriteHeader(http.StatusConflict)
					return
				}
				sseHead(c.w)
				say(c.w, "data: "+ok(c))
			}, "completed", 0, 4},
		{"down", func(c conn) { say(c.w, "id: a\ndata:") }, func(_ int, c conn) { c.w.WriteHeader(503) }, "unknown", 0, resumes},
		{"not given", func(c conn) { say(c.w, "id: a\ndata:") }, func(_ int, c conn) { c.w.WriteHeader(405) }, "unknown", 0, 1},
		{"session gone", func(c conn) { say(c.w, "id: a\ndata:") }, func(_ int, c conn) { c.w.WriteHeader(404) }, "unknown", 0, 1},
		{"no stream", func(c conn) { say(c.w, "id: a\ndata:") }, func(_ int, c conn) { answerJSON(c.w, 200, ok(c)) }, "unknown", 0, 1},
		{"garbage, repeats and others' answers", func(c conn) { say(c.w, "id: a\ndata: "+note, 1) },
			func(_ int, c conn) {
				sseHead(c.w)
				say(c.w, "id: p\ndata: {}")
				say(c.w, "id: a\ndata: "+note, 1)
				say(c.w, `id: o`+"\n"+`data: {"jsonrpc":"2.0","id":"other","result":{}}`)
				say(c.w, "id: b\ndata: "+ok(c))
			}, "completed", 1, 1},
		{"silent until asked again", func(c conn) { say(c.w, "id: a\ndata:") },
			func(n int, c conn) {
				sseHead(c.w)
				if n < 3 {
					say(c.w, ": keepalive")
					<-c.w.(interface{ CloseNotify() <-chan bool }).CloseNotify()
					return
				}
				say(c.w, "id: b\ndata: "+ok(c))
			}, "completed", 0, 4},
		{"too large", func(c conn) { say(c.w, "id: a\ndata:") },
			func(_ int, c conn) { sseHead(c.w); say(c.w, "data: %s", strings.Repeat("x", 100_000)) }, "too_large", 0, 1},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			l := &legacyServer{}
			var id atomic.Value
			var gets atomic.Int32
			l.call = func(w http.ResponseWriter, _ *http.Request, m *jsonrpc.Message) {
				id.Store(string(m.ID().Raw()))
				sseHead(w)
				c.post(conn{w: w, id: string(m.ID().Raw())})
				hangUp(w)
			}
			l.get = func(w http.ResponseWriter, req *http.Request) {
				last := req.Header.Get("Last-Event-Id")
				if last == "" { // the session's own
					w.WriteHeader(405)
					return
				}
				c.get(int(gets.Add(1)-1), conn{w: w, last: last, id: id.Load().(string)})
			}
			r := legacyRig(t, l, func(o *Options) { o.MaxAnswer = 10_000 })
			r.d.sessions.timing.silence = 30 * time.Millisecond
			e := r.legacy("write")
			r.handle(e)
			s := summary(r.ends(e, c.want))
			if n := l.came("tools/call"); n != 1 {
				t.Errorf("sent %d times", n)
			}
			if s.Chunks != c.chunks || int(gets.Load()) < c.gets {
				t.Errorf("%d chunks, asked for the rest %d times", s.Chunks, gets.Load())
			}
		})
	}
}

// A server that was started again: the call comes in a new session, once, and
// what the session had told the server is told again.
func TestLegacyLost(t *testing.T) {
	for _, words := range []string{
		"", `404 {"jsonrpc":"2.0","id":ID,"error":{"code":-32001,"message":"Session not found"}}`,
		`{"jsonrpc":"2.0","error":{"code":-32000,"message":"Bad Request: No valid session ID provided"}}`,
		`{"jsonrpc":"2.0","id":null,"error":{"code":-32000,"message":"Bad Request: Server not initialized"}}`,
	} {
		l := &legacyServer{}
		if words != "" {
			l.lost = func(w http.ResponseWriter, m *jsonrpc.Message) {
				if answer, ok := strings.CutPrefix(words, "404 "); ok && m != nil {
					answerJSON(w, 404, strings.Replace(answer, "ID", string(m.ID().Raw()), 1))
					return
				}
				answerJSON(w, 400, words)
			}
		}
		r := legacyRig(t, l)
		for _, m := range []struct{ method, name, params string }{
			{"logging/setLevel", "", `{"level":"error"}`}, {"resources/subscribe", "a:1", `{"uri":"a:1"}`},
			{"resources/subscribe", "a:2", `{"uri":"a:2"}`}, {"resources/unsubscribe", "a:1", `{"uri":"a:1"}`},
		} {
			e := r.method(m.method, m.name, `{"jsonrpc":"2.0","id":1,"method":"`+m.method+`","params":`+m.params+`}`, inSession("s1"))
			r.handle(e)
			r.ends(e, "completed")
		}
		l.forget()
		l.mu.Lock()
		l.log = nil
		l.mu.Unlock()
		var wg sync.WaitGroup
		calls := []schemas.Event{r.legacy("write"), r.legacy("write"), r.legacy("write")}
		for _, e := range calls {
			wg.Go(func() { r.handle(e) })
		}
		wg.Wait()
		for _, e := range calls {
			r.ends(e, "completed")
		}
		if l.opened != 2 || l.came("logging/setLevel") != 1 || l.came("resources/subscribe") != 1 || !strings.Contains(l.body("resources/subscribe"), "a:2") {
			t.Errorf("%d sessions, %v", l.opened, l.log)
		}
		if c := r.log.of(schemas.KindConnected); len(c) != 2 || c[1].Data.(*schemas.Connected).Upstream != "up-2" {
			t.Error(r.log)
		}
	}
}

// A call that was given a session just before another call found it lost does
// not go out in it, to be hung up on in the middle.
func TestLegacyLostMeanwhile(t *testing.T) {
	l := &legacyServer{}
	r := legacyRig(t, l)
	r.handle(r.legacy("write"))
	e := r.legacy("write")
	m := r.d.upstreams["s"].mcp
	old, err := r.d.sessions.get(t.Context(), m, e)
	if err != nil {
		t.Fatal(err)
	}
	l.forget()
	r.handle(r.legacy("write"))
	c := Call{ID: e.Call, Event: e, Requested: &e.Data.(*schemas.Authorized).Requested, Body: e.Body, Connected: func() {}, Heard: func() {}}
	before := l.came("tools/call")
	if _, err := old.call(t.Context(), c, c.Body, nil); !errors.Is(err, errLost) || l.came("tools/call") != before {
		t.Errorf("%v, %d sent", err, l.came("tools/call")-before)
	}
	if s, err := r.d.sessions.again(t.Context(), old); err != nil || s.upstream != "up-2" {
		t.Errorf("%v, then %+v", err, s)
	}
	r.handle(e)
	r.ends(e, "completed")
}

// A server that knows none of the sessions that it opens is not asked for ever.
func TestLegacyAlwaysLost(t *testing.T) {
	l := &legacyServer{}
	l.call = func(w http.ResponseWriter, _ *http.Request, _ *jsonrpc.Message) { http.Error(w, "what?", 404) }
	r := legacyRig(t, l)
	e := r.legacy("write")
	r.handle(e)
	r.ends(e, "unavailable")
	if n := l.came("tools/call"); n != 2 {
		t.Errorf("sent %d times", n)
	}
}

// Other words of a 400 or 404 are answers, or no reason to repeat the call.
func TestLegacyNotLost(t *testing.T) {
	for body, want := range map[string]string{
		`404 {"jsonrpc":"2.0","id":ID,"error":{"code":-32601,"message":"no"}}`:                                        "completed",
		`404 {"jsonrpc":"2.0","id":ID,"error":{"code":-32002,"message":"it has gone, and so has what it did"}}`:       "completed",
		`404 {"jsonrpc":"2.0","id":ID,"result":{"content":[]}}`:                                                       "completed",
		`400 {"jsonrpc":"2.0","id":null,"error":{"code":-32000,"message":"Bad Request: you"}}`:                        "completed",
		`400 {"jsonrpc":"2.0","id":ID,"error":{"code":-32000,"message":"Bad Request: No valid session ID provided"}}`: "completed",
		`400 No valid session ID provided`:                                                                            "bad_answer",
	} {
		l := &legacyServer{}
		l.call = func(w http.ResponseWriter, _ *http.Request, m *jsonrpc.Message) {
			status := 400
			if strings.HasPrefix(body, "404") {
				status = 404
			}
			answerJSON(w, status, strings.Replace(body[4:], "ID", string(m.ID().Raw()), 1))
		}
		r := legacyRig(t, l)
		e := r.legacy("write")
		r.handle(e)
		r.ends(e, want)
		if n := l.came("tools/call"); n != 1 {
			t.Errorf("%s: sent %d times", body, n)
		}
	}
}

// Who takes a call back, or has no more time for it, has the server told first.
func TestLegacyCancel(t *testing.T) {
	for _, how := range []string{"wish", "deadline", "shutdown"} {
		t.Run(how, func(t *testing.T) {
			gone := make(chan string, 1)
			l := &legacyServer{}
			l.call = func(w http.ResponseWriter, req *http.Request, m *jsonrpc.Message) {
				sseHead(w)
				say(w, ": hi")
				<-req.Context().Done()
				gone <- l.body("notifications/cancelled")
			}
			r := legacyRig(t, l)
			e := r.legacy("write", authorized(func(a *schemas.Authorized) {
				if how == "deadline" {
					a.Deadline = time.Now().Add(500 * time.Millisecond)
				}
			}))
			ctx, stop := context.WithCancel(t.Context())
			done := make(chan error, 1)
			go func() { done <- r.d.Handle(ctx, e, r.log.emit) }()
			l.await(t, "tools/call", 1)
			want := map[string]string{"wish": "cancelled", "deadline": "unknown", "shutdown": "unknown"}[how]
			switch how {
			case "wish":
				if err := r.d.Hear(t.Context(), e.Next(&schemas.Cancel{Reason: "changed my mind"}, nil), r.log.emit); err != nil {
					t.Fatal(err)
				}
			case "shutdown":
				stop()
			}
			if err := <-done; err != nil {
				t.Fatal(err)
			}
			stop()
			r.ends(e, want)
			told := <-gone
			if how == "shutdown" {
				if told != "" {
					t.Errorf("told %s", told)
				}
				return
			}
			if !strings.Contains(told, `"requestId":"`+string(e.Call)+`"`) || how == "wish" && !strings.Contains(told, "changed my mind") {
				t.Errorf("told %s", told)
			}
		})
	}
}

// Another process, or this one after a restart, goes on with the server's session.
func TestLegacyRestart(t *testing.T) {
	l := &legacyServer{}
	r := legacyRig(t, l, func(o *Options) {
		o.Servers = append(o.Servers, Server{Name: "t", URL: o.Servers[0].URL, Era: EraClient})
	})
	other := authorized(func(a *schemas.Authorized) { a.Server = "t" })
	for _, e := range []schemas.Event{r.legacy("write"), r.legacy("write", other)} {
		r.handle(e)
		r.ends(e, "completed")
	}
	r.d.Close()
	r.d = r.fresh()
	for _, e := range []schemas.Event{r.legacy("write"), r.legacy("write", other)} {
		r.handle(e)
		r.ends(e, "completed")
	}
	if l.opened != 2 || l.came("DELETE") != 0 || l.came("notifications/initialized") != 2 {
		t.Errorf("%d sessions, %v", l.opened, l.log)
	}
	l.mu.Lock()
	var used []string
	for i, h := range l.headers {
		if l.log[i] == "tools/call" {
			used = append(used, h.Get("Mcp-Session-Id"))
		}
	}
	l.mu.Unlock()
	if !slices.Equal(used, []string{"up-1", "up-2", "up-1", "up-2"}) {
		t.Error(used)
	}
	// A process that knows of the session from the log only closes it as well.
	r.d.Close()
	r.d = r.fresh()
	closed := r.log.add(schemas.Event{Tenant: "acme", Session: "s1", Agent: "a1", Data: &schemas.Closed{}})
	if err := r.d.Hear(t.Context(), closed, r.log.emit); err != nil {
		t.Fatal(err)
	}
	l.await(t, "DELETE", 2)
}

// The end of a session cancels what is done in it.
func TestLegacyClosed(t *testing.T) {
	leaks(t)
	l := &legacyServer{}
	ended := make(chan struct{}, 2)
	l.call = func(w http.ResponseWriter, req *http.Request, m *jsonrpc.Message) {
		sseHead(w)
		<-req.Context().Done()
		ended <- struct{}{}
	}
	l.get = func(w http.ResponseWriter, req *http.Request) {
		sseHead(w)
		<-req.Context().Done()
		ended <- struct{}{}
	}
	r := legacyRig(t, l)
	e := r.legacy("write")
	done := make(chan struct{})
	go func() { defer close(done); r.handle(e) }()
	l.await(t, "tools/call", 1)
	l.await(t, "GET", 1)
	closed := r.log.add(schemas.Event{Tenant: "acme", Session: "s1", Agent: "a1", Data: &schemas.Closed{}})
	if err := r.d.Hear(t.Context(), closed, r.log.emit); err != nil {
		t.Fatal(err)
	}
	<-done
	r.ends(e, "cancelled")
	<-ended
	<-ended
	l.await(t, "DELETE", 1)
	if n := r.d.Stats()[0].Sessions; n != 0 {
		t.Errorf("%d sessions", n)
	}
	r.d.Close()
	r.http.Close()
}

// A name that a front gave is the server's again, and nothing else is sent.
func TestAlias(t *testing.T) {
	for _, c := range []struct{ method, alias, name, params, want string }{
		{"tools/call", "s__echo", "echo", `{"name": "s__\u0065cho","arguments":{"name":"s__echo"}}`, `{"name": "echo","arguments":{"name":"s__echo"}}`},
		{"prompts/get", "s__p", `p"q`, `{"name":"s__p"}`, `{"name":"p\"q"}`},
		{"resources/read", "waybill://s/a:b", "a:b", `{"uri":"waybill://s/a:b"}`, `{"uri":"a:b"}`},
		{"resources/subscribe", "waybill://s/a:b", "a:b", `{"uri":"waybill://s/a:b"}`, `{"uri":"a:b"}`},
		{"completion/complete", "s__p", "p", `{"ref":{"type":"ref/prompt","name":"s__p","uri":"s__p"}}`, `{"ref":{"type":"ref/prompt","name":"p","uri":"s__p"}}`},
		{"completion/complete", "waybill://s/a:{b}", "a:{b}", `{"ref":{"type":"ref/resource","uri":"waybill://s/a:{b}"}}`, `{"ref":{"type":"ref/resource","uri":"a:{b}"}}`},
		{"tools/call", "s__echo", "echo", `{"name":"s__rm"}`, ""},
		{"tools/call", "s__echo", "echo", `{"name":"echo"}`, ""},
		{"tools/call", "s__echo", "", `{"name":"s__echo"}`, ""},
		{"completion/complete", "s__p", "p", `{"ref":{"type":"ref/resource","name":"s__p"}}`, ""},
		{"completion/complete", "s__p", "p", `{"ref":{"name":"s__p"}}`, ""},
		{"tools/list", "s__p", "p", `{"name":"s__p"}`, ""},
	} {
		for _, revision := range []string{"2025-11-25", "2026-07-28"} {
			l := &legacyServer{}
			var body, name string
			r := newRig(t, func(w http.ResponseWriter, req *http.Request) {
				if req.Header.Get("Mcp-Protocol-Version") != "2026-07-28" {
					l.ServeHTTP(w, req)
					return
				}
				b, _ := io.ReadAll(req.Body)
				m, _ := jsonrpc.Decode(b, jsonrpc.Limits{})
				body, name = string(b), req.Header.Get("Mcp-Name")
				answerJSON(w, 200, result(m))
			})
			r.open("s1")
			e := r.method(c.method, c.name, `{"jsonrpc":"2.0","id":1,"method":"`+c.method+`","params":`+c.params+`}`, inSession("s1"),
				authorized(func(a *schemas.Authorized) { a.Revision, a.Alias = revision, c.alias }))
			r.handle(e)
			if c.want == "" {
				r.ends(e, "invalid")
				if len(l.log) != 0 || body != "" {
					t.Errorf("%v: sent %v %s", c, l.log, body)
				}
				continue
			}
			r.ends(e, "completed")
			if revision == "2025-11-25" {
				body = l.body(c.method)
			} else if want := headerText(c.name); c.method != "completion/complete" && name != want {
				t.Errorf("%s: Mcp-Name %q, want %q", c.method, name, want)
			}
			if want := `{"jsonrpc":"2.0","id":"` + string(e.Call) + `","method":"` + c.method + `","params":` + c.want + `}`; body != want {
				t.Errorf("sent %s\nwant %s", body, want)
			}
		}
	}
}
