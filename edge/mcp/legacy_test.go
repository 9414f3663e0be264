package mcp_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"waybill.dev/edge/mcp"
	"waybill.dev/schemas"
)

// stepwise carries out calls as a test says: each step of a tools/call is sent
// to it; initialize and notifications are answered at once.
type stepwise struct {
	steps chan func(ctx context.Context, e schemas.Event, emit schemas.Emit) (end bool)
}

func newStepwise() *stepwise {
	return &stepwise{make(chan func(context.Context, schemas.Event, schemas.Emit) bool)}
}

func (s *stepwise) handle(ctx context.Context, e schemas.Event, emit schemas.Emit) error {
	q := e.Data.(*schemas.Requested)
	switch {
	case q.OneWay:
		return answering("")(ctx, e, emit)
	case q.Method == "initialize":
		return answering(initialized)(ctx, e, emit)
	}
	for step := range s.steps {
		if step(ctx, e, emit) {
			return nil
		}
	}
	return nil
}

func (s *stepwise) progress(n int) {
	s.steps <- func(ctx context.Context, e schemas.Event, emit schemas.Emit) bool {
		_, _ = emit(ctx, e.Next(&schemas.Progressed{Index: n}, fmt.Appendf(nil, `{"jsonrpc":"2.0","method":"notifications/progress","params":{"progress":%d}}`, n)))
		return false
	}
}

func (s *stepwise) answer() {
	s.steps <- func(ctx context.Context, e schemas.Event, emit schemas.Emit) bool {
		_ = answering(fmt.Sprintf(`{"jsonrpc":"2.0","id":%q,"result":{}}`, e.Call))(ctx, e, emit)
		return true
	}
}

func (s *stepwise) cancelled() {
	s.steps <- func(ctx context.Context, e schemas.Event, emit schemas.Emit) bool {
		_, _ = emit(ctx, e.Next(&schemas.Cancelled{}, nil))
		return true
	}
}

// beside is an event of the session, outside of its calls.
func beside(log *memory, c *client, n int) {
	p := people[c.token]
	_, _ = log.store(context.Background(), schemas.Event{
		Tenant: p.Tenant, Agent: p.Agent, Session: schemas.NewSessionKey(p.Tenant, p.Agent, c.session),
		Data: &schemas.Notified{ID: fmt.Sprint("b", n)}, Body: fmt.Appendf(nil, `{"jsonrpc":"2.0","method":"notifications/message","params":{"data":"beside %d"}}`, n),
	})
}

func kinds(log *memory, k schemas.Kind) (n int) {
	for _, e := range log.all() {
		if e.Kind() == k {
			n++
		}
	}
	return n
}

const slowCall = `{"jsonrpc":"2.0","id":7,"method":"tools/call","params":{"name":"slow"}}`

// A client that leaves does not cancel its call, and comes back for the rest:
// before the ending is stored, and after, to another gateway.
func TestComesBack(t *testing.T) {
	rest := newStepwise()
	log := newMemory(t, rest.handle)
	addr, stop := up(t, log.options())
	c := open(t, addr, "alice")
	go rest.progress(0) // the answer begins with it
	l := c.listen("POST", "", slowCall)
	l.want(t, "")
	first := l.want(t, `"progress":0`)
	l.cancel()
	stop() // the handler has returned, although the call goes on
	if kinds(log, schemas.KindCancel) != 0 {
		t.Error("cancelled")
	}
	c.addr, _ = up(t, log.options())
	l = c.listen("GET", first.ID, "")
	rest.progress(1)
	second := l.want(t, `"progress":1`)
	l.cancel()
	rest.answer()
	log.work.Wait()
	for range 2 {
		l = c.listen("GET", second.ID, "")
		last := l.want(t, `"id":7,"result"`)
		l.ends(t)
		l = c.listen("GET", last.ID, "")
		l.ends(t) // it had everything
	}
}

// Who comes back and is not served, before there was anything to tell, is told
// so: an empty answer would be the end of the call.
func TestComesBackInVain(t *testing.T) {
	rest := newStepwise()
	log := newMemory(t, rest.handle)
	o := log.options()
	var broken atomic.Bool
	begun := make(chan bool, 3)
	o.Follow = func(ctx context.Context, of schemas.Event, after uint64, emit schemas.Emit) error {
		if begun <- true; broken.Load() {
			return errors.New("no log")
		}
		return log.follow(ctx, of, after, emit)
	}
	addr, _ := up(t, o)
	c := open(t, addr, "alice")
	go rest.progress(0)
	l := c.listen("POST", "", slowCall)
	l.want(t, "")
	last := l.want(t, `"progress":0`).ID
	l.cancel()

	broken.Store(true)
	if res := c.do(t.Context(), "GET", last, ""); res.StatusCode != 503 {
		t.Errorf("the log cannot be read: %s", res.Status)
	}
	broken.Store(false)
	<-begun
	first := make(chan *http.Response, 1)
	go func() {
		first <- c.try(t.Context(), "GET", last, "")
		rest.answer()
	}()
	<-begun
	l = c.listen("GET", last, "")
	if res := <-first; res == nil || res.StatusCode != 400 {
		t.Errorf("another has taken over: %v", res)
	}
	l.want(t, `"id":7,"result"`)
	l.ends(t)
}

// The newest stream wins, of a session and of a call. What was written to the
// one before counts as received, where its client does not say, when that has
// lived on for a moment.
func TestNewestStreamWins(t *testing.T) {
	rest := newStepwise()
	log := newMemory(t, rest.handle)
	o := log.options()
	var passed atomic.Int64
	o.Now = func() time.Time { return noon.Add(time.Duration(passed.Load())) }
	addr, _ := up(t, o)
	c := open(t, addr, "bob")

	beside(log, c, 1)
	old := c.listen("GET", "", "")
	old.want(t, "")
	old.want(t, "beside 1")
	soon := c.listen("GET", "", "")
	old.ends(t)
	soon.want(t, "")
	soon.want(t, "beside 1")
	passed.Add(int64(time.Second))
	young := c.listen("GET", "", "")
	soon.ends(t)
	young.want(t, "")
	beside(log, c, 2)
	at := young.want(t, "beside 2") // and not 1 again
	third := c.listen("GET", at.ID, "")
	young.ends(t)
	beside(log, c, 3)
	third.want(t, "beside 3")

	// The same of a call's stream.
	go rest.progress(0) // the answer begins with it
	post := c.listen("POST", "", slowCall)
	prime := post.want(t, "")
	post.want(t, `"progress":0`)
	again := c.listen("GET", prime.ID, "")
	again.want(t, `"progress":0`)
	post.ends(t)
	rest.answer()
	again.want(t, `"result"`)
	again.ends(t)
	if kinds(log, schemas.KindCancel) != 0 {
		t.Error("cancelled")
	}
}

// notifications/cancelled is stored as the client wrote it, and the stream ends
// without an answer.
func TestTakeBack(t *testing.T) {
	rest := newStepwise()
	log := newMemory(t, rest.handle)
	addr, _ := up(t, log.options())
	c := open(t, addr, "alice")
	go rest.progress(0) // the answer begins with it
	l := c.listen("POST", "", slowCall)
	prime := l.want(t, "")
	l.want(t, `"progress":0`)
	const cancel = `{"jsonrpc":"2.0","method":"notifications/cancelled","params":{"requestId":7,"reason":"enough"}}`
	if status, _ := c.say("POST", cancel); status != 202 {
		t.Error(status)
	}
	l.ends(t)
	var stored []schemas.Event
	for _, e := range log.all() {
		if e.Kind() == schemas.KindCancel {
			stored = append(stored, e)
		}
	}
	if len(stored) != 1 || string(stored[0].Body) != cancel || stored[0].Data.(*schemas.Cancel).Reason != "enough" {
		t.Errorf("stored %+v", stored)
	}
	rest.cancelled()
	log.work.Wait()
	l = c.listen("GET", prime.ID, "")
	l.want(t, `"progress":0`)
	l.ends(t)

	// A call that was left to itself can be taken back, too, by the same id.
	go rest.progress(0) // the answer begins with it
	l = c.listen("POST", "", slowCall)
	l.want(t, "")
	l.cancel()
	for n := kinds(log, schemas.KindCancel); n == kinds(log, schemas.KindCancel); {
		if status, _ := c.say("POST", cancel); status != 202 {
			t.Fatal(status)
		}
	}
	rest.cancelled()
}

// An id in flight cannot be used for another request.
func TestSameID(t *testing.T) {
	rest := newStepwise()
	log := newMemory(t, rest.handle)
	addr, _ := up(t, log.options())
	c := open(t, addr, "alice")
	go rest.progress(0) // the answer begins with it
	l := c.listen("POST", "", slowCall)
	l.want(t, "")
	if status, text := c.say("POST", slowCall); status != 400 || !strings.Contains(text, "-32600") {
		t.Error(status, text)
	}
	rest.answer()
	l.want(t, `"progress":0`)
	l.want(t, `"result"`)
	l.ends(t)
	go rest.progress(0) // the answer begins with it
	l = c.listen("POST", "", slowCall)
	l.want(t, "")
	rest.answer()
	l.want(t, `"progress":0`)
	l.want(t, `"result"`)
}

// DELETE ends what is open in the session, and cancels what is in flight.
func TestDeleteEndsAll(t *testing.T) {
	rest := newStepwise()
	log := newMemory(t, rest.handle)
	addr, _ := up(t, log.options())
	c := open(t, addr, "alice")
	get := c.listen("GET", "", "")
	get.want(t, "")
	go rest.progress(0) // the answer begins with it
	post := c.listen("POST", "", slowCall)
	post.want(t, "")
	post.want(t, `"progress":0`)
	if status, _ := c.say("DELETE", ""); status != 204 {
		t.Error(status)
	}
	get.ends(t)
	post.want(t, "The call was cancelled.")
	post.ends(t)
	rest.cancelled()
	if kinds(log, schemas.KindCancel) != 1 || kinds(log, schemas.KindClosed) != 1 {
		t.Error("not stored")
	}
}

// Another replica's DELETE is heard of.
func TestClosedElsewhere(t *testing.T) {
	log := newMemory(t, newStepwise().handle)
	here, _ := up(t, log.options())
	there, _ := up(t, log.options())
	c := open(t, here, "alice")
	get := c.listen("GET", "", "")
	get.want(t, "")
	c.addr = there
	if status, _ := c.say("DELETE", ""); status != 204 {
		t.Error(status)
	}
	get.ends(t)
	c.addr = here
	if status, _ := c.say("POST", slowCall); status != 404 {
		t.Error(status)
	}
}

// At shutdown streams end at once, and their clients can go on elsewhere.
func TestDrainSessions(t *testing.T) {
	rest := newStepwise()
	log := newMemory(t, rest.handle)
	addr, stop := up(t, log.options())
	c := open(t, addr, "alice")
	get := c.listen("GET", "", "")
	at := get.want(t, "")
	stopped := make(chan struct{})
	go func() { defer close(stopped); stop() }()
	get.ends(t)
	<-stopped
	c.addr, _ = up(t, log.options())
	beside(log, c, 1)
	get = c.listen("GET", at.ID, "")
	get.want(t, "beside 1")
}

// A slow call's stream begins with its id after 5 s.
func TestSlowCallIsPrimed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		log := newMemory(t, func(ctx context.Context, e schemas.Event, emit schemas.Emit) error {
			if e.Data.(*schemas.Requested).Method != "initialize" {
				<-time.After(time.Minute)
			} else {
				<-time.After(10 * time.Second) // never streamed: the session's ID is in the header
			}
			return answering(initialized)(ctx, e, emit)
		})
		s := newServer(t, log.options())
		request := func(session, body string) *http.Request {
			r := httptest.NewRequestWithContext(t.Context(), "POST", "http://localhost/mcp/everything", strings.NewReader(body))
			r.Header = http.Header{"Content-Type": {"application/json"}, "Accept": {"application/json, text/event-stream"}, "Mcp-Session-Id": {session}}
			if session == "" {
				delete(r.Header, "Mcp-Session-Id")
			}
			return r
		}
		first := httptest.NewRecorder()
		s.ServeHTTP(first, request("", initialize))
		if first.Header().Get("Content-Type") != "application/json" || first.Header().Get("Mcp-Session-Id") == "" {
			t.Errorf("%+v", first)
		}
		w := &recorder{h: http.Header{}}
		go func() {
			for _, at := range []struct {
				after time.Duration
				want  string
			}{{4999 * time.Millisecond, ""}, {time.Millisecond, "id: 4-4\ndata:\n\n"}, {15 * time.Second, "id: 4-4\ndata:\n\n:\n\n"}} {
				<-time.After(at.after)
				synctest.Wait()
				if got := w.text(); got != at.want {
					t.Errorf("after %s more: %q, want %q", at.after, got, at.want)
				}
			}
		}()
		s.ServeHTTP(w, request(first.Header().Get("Mcp-Session-Id"), slowCall))
		if !strings.HasSuffix(w.text(), ":\n\nid: 4-5\ndata: "+strings.Replace(initialized, `"c0"`, "7", 1)+"\n\n") {
			t.Errorf("%q", w.text())
		}
	})
}

// Sessions end when they are idle or old, those that nobody closed before a
// restart as well, and not while somebody uses them.
func TestSweep(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		log := newMemory(t, newStepwise().handle)
		o := log.options()
		o.Now = time.Now
		o.SessionLimits = mcp.SessionLimits{Idle: time.Hour, Max: 3 * time.Hour}
		opened := func(agent schemas.Agent) {
			_, _ = log.store(t.Context(), schemas.Event{Tenant: "acme", Agent: agent, Session: schemas.NewSessionKey("acme", agent, "x"),
				Time: time.Now(), Data: &schemas.Opened{Protocol: "mcp", Revision: "2025-11-25"}})
		}
		reasons := func() (all []string) {
			for _, e := range log.all() {
				if c, ok := e.Data.(*schemas.Closed); ok {
					all = append(all, string(e.Agent)+" "+c.Reason)
				}
			}
			return all
		}
		opened("orphan")
		opened("busy")
		_, _ = log.store(t.Context(), schemas.Event{Tenant: "acme", Agent: "modern", Session: "m", Time: time.Now(), Data: &schemas.Opened{Protocol: "mcp"}})
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- mcp.New(o).Run(ctx) }()
		for n := range 7 {
			<-time.After(30 * time.Minute)
			call := schemas.NewCallID(time.Now())
			_, _ = log.store(t.Context(), schemas.Event{Tenant: "acme", Agent: "busy", Session: schemas.NewSessionKey("acme", "busy", "x"), Call: call, Root: call,
				Time: time.Now(), Data: &schemas.Requested{}})
			synctest.Wait()
			if got := fmt.Sprint(reasons()); n == 2 && got != "[orphan idle]" || n == 4 && got != "[orphan idle]" || n == 6 && got != "[orphan idle busy expired]" {
				t.Errorf("%d: %s", n, got)
			}
		}
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}

// A stream that is open is a use, but not beyond the longest time.
func TestOpenStreamIsUse(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		log := newMemory(t, newStepwise().handle)
		o := log.options()
		o.Now = time.Now
		o.SessionLimits = mcp.SessionLimits{Idle: time.Minute, Max: time.Hour}
		a := mcp.New(o)
		s := serverOf(t, a)
		ctx, cancel := context.WithCancel(t.Context())
		var ran sync.WaitGroup
		ran.Go(func() { _ = a.Run(ctx) })
		w := httptest.NewRecorder()
		r := httptest.NewRequestWithContext(t.Context(), "POST", "http://localhost/mcp", strings.NewReader(initialize))
		r.Header = http.Header{"Content-Type": {"application/json"}}
		s.ServeHTTP(w, r)
		r = httptest.NewRequestWithContext(t.Context(), "GET", "http://localhost/mcp", nil)
		r.Header = http.Header{"Accept": {"text/event-stream"}, "Mcp-Session-Id": w.Header()["Mcp-Session-Id"]}
		start := time.Now()
		s.ServeHTTP(&recorder{h: http.Header{}}, r)
		if took := time.Since(start); took < time.Hour || took > time.Hour+2*time.Minute {
			t.Errorf("the stream ended after %s", took)
		}
		cancel()
		ran.Wait()
	})
}

// Too many sessions are refused, of an agent and of a tenant, until some end.
func TestSessionLimits(t *testing.T) {
	log := newMemory(t, newStepwise().handle)
	o := log.options()
	o.SessionLimits = mcp.SessionLimits{PerAgent: 2, PerTenant: 3}
	addr, _ := up(t, o)
	refused := func(token string) {
		t.Helper()
		c := &client{t: t, addr: addr, token: token}
		res := c.do(t.Context(), "POST", "", initialize)
		defer res.Body.Close()
		if b, _ := io.ReadAll(res.Body); res.StatusCode != 429 || res.Header.Get("Retry-After") == "" || !strings.Contains(string(b), "too many open sessions") {
			t.Errorf("%s %s", res.Status, b)
		}
	}
	first := open(t, addr, "alice")
	open(t, addr, "alice")
	refused("alice")
	open(t, addr, "bob")
	refused("bob")
	open(t, addr, "eve") // another tenant
	first.say("DELETE", "")
	open(t, addr, "bob")
}

// What cannot be stored is not done, and nobody is told that it was.
func TestSessionFaults(t *testing.T) {
	rest := newStepwise()
	log := newMemory(t, rest.handle)
	o := log.options()
	var fail schemas.Kind
	o.Store = func(ctx context.Context, e schemas.Event) (schemas.Receipt, error) {
		if e.Kind() == fail {
			return schemas.Receipt{}, errors.New("secret")
		}
		return log.store(ctx, e)
	}
	latest := errors.New("secret")
	o.Latest = func(ctx context.Context, tn schemas.Tenant, s schemas.SessionKey, k schemas.Kind) (schemas.Event, error) {
		if latest != nil {
			return schemas.Event{}, latest
		}
		return log.latest(ctx, tn, s, k)
	}
	addr, _ := up(t, o)
	c := &client{t: t, addr: addr}
	want := func(method, body string, status int) {
		t.Helper()
		if got, text := c.say(method, body); got != status || strings.Contains(text, "secret") {
			t.Errorf("%s %s: %d %s, want %d", method, body, got, text, status)
		}
	}
	fail = schemas.KindOpened
	want("POST", initialize, 503)
	fail = ""
	c = open(t, addr, "")
	fail = schemas.KindClosed
	want("DELETE", "", 503)
	go func() {
		rest.steps <- func(ctx context.Context, e schemas.Event, emit schemas.Emit) bool {
			_, _ = emit(ctx, e.Next(&schemas.Asked{ID: "q"}, []byte(`{"jsonrpc":"2.0","id":1,"method":"roots/list"}`)))
			return false
		}
	}()
	l := c.listen("POST", "", slowCall) // the session lives
	l.want(t, "")
	l.want(t, `"id":"q"`)
	fail = schemas.KindAnswered
	want("POST", `{"jsonrpc":"2.0","id":"q","result":{}}`, 503)
	fail = schemas.KindCancel
	want("POST", `{"jsonrpc":"2.0","method":"notifications/cancelled","params":{"requestId":7}}`, 503)
	fail = ""
	want("POST", `{"jsonrpc":"2.0","id":"q","result":{}}`, 202)
	rest.answer()
	l.want(t, `"result"`)
	want("DELETE", "", 204)
	c.session = "nobody-has-this"
	want("POST", slowCall, 503)
	latest = nil
	want("POST", slowCall, 404)
}
