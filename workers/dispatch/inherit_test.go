package dispatch

import (
	"context"
	"iter"
	"net/http"
	"sync/atomic"
	"testing"
	"time"

	"waybill.dev/schemas"
	"waybill.dev/schemas/jsonrpc"
)

// A session that its server has lost and that cannot be opened again, for good, is
// not listened to any more either, though the server goes on with its stream.
func TestLostForGood(t *testing.T) {
	l := &legacyServer{}
	s := listenTo(t, l, nil)
	r := newReplicas(t, l.ServeHTTP)
	r.open("s1")
	r.calls(r.a)
	s.opens("up-1", "")
	latest := r.a.opt.Latest
	r.a.sessions.opt.Latest = func(ctx context.Context, tenant schemas.Tenant, session schemas.SessionKey, k schemas.Kind) (schemas.Event, error) {
		if k == schemas.KindOpened {
			return schemas.Event{}, schemas.ErrNotFound
		}
		return latest(ctx, tenant, session, k)
	}
	l.forget()
	e := r.legacy("write")
	r.handled(r.give(r.a, e))
	s.ends("up-1")
}

// While a process opens a session in the place of one that the server has lost, the
// one that listened dies: there is one new session, and not a second in its place.
func TestDiesWhileOpened(t *testing.T) {
	l := &legacyServer{}
	s := listenTo(t, l, nil)
	r := newReplicas(t, l.ServeHTTP)
	r.open("s1")
	r.calls(r.a)
	s.opens("up-1", "")
	r.calls(r.b)
	l.forget()
	began, goOn := make(chan bool, 8), make(chan bool)
	l.init = func(http.ResponseWriter, *jsonrpc.Message) bool {
		began <- true
		<-goOn
		return false
	}
	e := r.legacy("write")
	handled := r.give(r.b, e)
	<-began
	r.ledger.lapse("a")
	r.a.Lapsed()
	r.ledger.die("a")
	died, read := make(chan bool), make(chan bool, 8)
	latest := r.b.opt.Latest
	r.b.opt.Latest = func(ctx context.Context, tenant schemas.Tenant, session schemas.SessionKey, k schemas.Kind) (schemas.Event, error) {
		read <- true // which session it is stands in the log before that
		return latest(ctx, tenant, session, k)
	}
	go func() { r.b.Died(t.Context(), "a"); close(died) }()
	select {
	case <-read:
	case <-died: // who waited for a's end has taken over already
	}
	close(goOn)
	r.handled(handled)
	<-died
	s.opens("up-2", "")
	if n := l.came("initialize"); n != 2 {
		t.Errorf("%d sessions are opened%v", n, r.log)
	}
}

// A server that opens sessions and knows none of them is asked for another after longer
// and longer pauses.
func TestKnowsNoSession(t *testing.T) {
	opened := make(chan time.Time, 4096)
	l := &legacyServer{}
	s := listenTo(t, l, nil)
	r := newReplicas(t, l.ServeHTTP)
	r.a.sessions.timing.rest = 200 * time.Millisecond
	r.open("s1")
	r.calls(r.a)
	s.opens("up-1", "")
	l.init = func(w http.ResponseWriter, m *jsonrpc.Message) bool {
		opened <- time.Now()
		w.Header().Set("Mcp-Session-Id", "none")
		answerJSON(w, 200, `{"jsonrpc":"2.0","id":`+string(m.ID().Raw())+`,"result":{"protocolVersion":"2025-11-25","capabilities":{},"serverInfo":{"name":"s","version":"1"}}}`)
		return true
	}
	l.forget()
	r.http.CloseClientConnections()
	first := <-opened
	for range 19 {
		<-opened
	}
	if d := time.Since(first); d < 250*time.Millisecond {
		t.Errorf("twenty in %s", d)
	}
}

// The log is away for a moment when a stream is taken over: it is taken over where the
// other stopped all the same, and what was answered meanwhile reaches the server.
func TestTakeOverLogAway(t *testing.T) {
	l := &legacyServer{}
	s := listenTo(t, l, func(w http.ResponseWriter, _, last string) {
		if last == "" {
			say(w, "id: e1\ndata: "+`{"jsonrpc":"2.0","id":"r1","method":"roots/list"}`)
		}
	})
	r := newReplicas(t, l.ServeHTTP)
	r.open("s1")
	r.calls(r.a)
	s.opens("up-1", "")
	asked := r.log.await(t, schemas.KindAsked, 1)[0]
	p := asked.Data.(*schemas.Asked)
	r.log.add(asked.Next(&schemas.Answered{Target: p.Target, ID: p.ID}, []byte(`{"jsonrpc":"2.0","id":"`+p.ID+`","result":{"roots":[]}}`)))
	var n, answers atomic.Int32
	opt := &r.b.sessions.opt
	latest, scan := opt.Latest, opt.Scan
	opt.Latest = func(ctx context.Context, tenant schemas.Tenant, session schemas.SessionKey, k schemas.Kind) (schemas.Event, error) {
		if k == schemas.KindNotified && n.Add(1) <= 3 {
			return schemas.Event{}, errLog
		}
		return latest(ctx, tenant, session, k)
	}
	opt.Scan = func(ctx context.Context, tenant schemas.Tenant, session schemas.SessionKey, k schemas.Kind) iter.Seq2[schemas.Event, error] {
		if k == schemas.KindAnswered && answers.Add(1) <= 3 {
			return func(yield func(schemas.Event, error) bool) { yield(schemas.Event{}, errLog) }
		}
		return scan(ctx, tenant, session, k)
	}
	r.die(r.a, "a", r.b)
	s.opens("up-1", "e1")
	l.await(t, "response", 1)
}

// A session that is older than what the log holds is listened to by one process only.
func TestTakeOverOfOld(t *testing.T) {
	l := &legacyServer{}
	s := listenTo(t, l, nil)
	r := newReplicas(t, l.ServeHTTP)
	r.open("s1")
	r.calls(r.a)
	s.opens("up-1", "")
	r.calls(r.b)
	latest := r.b.opt.Latest
	aged := func(ctx context.Context, tenant schemas.Tenant, session schemas.SessionKey, k schemas.Kind) (schemas.Event, error) {
		if k == schemas.KindOpened || k == schemas.KindConnected {
			return schemas.Event{}, schemas.ErrNotFound
		}
		return latest(ctx, tenant, session, k)
	}
	r.b.opt.Latest, r.b.sessions.opt.Latest = aged, aged
	r.die(r.a, "a", r.b)
	s.opens("up-1", "")
	r.b.Close() // what is under way is done
	keys, _ := (holder{r.ledger, "a"}).Owned(t.Context(), "b")
	if len(keys) != 1 {
		t.Errorf("b owns %v", keys)
	}
}

// A server that says neither whether it knows a session nor that it has no stream is
// asked again.
func TestTakeOverServerAway(t *testing.T) {
	l := &legacyServer{}
	s := listenTo(t, l, nil)
	var away atomic.Int32
	r := newReplicas(t, func(w http.ResponseWriter, req *http.Request) {
		if n := away.Load(); n > 0 {
			away.Add(-1)
			w.WriteHeader(map[string]int{http.MethodGet: 404, http.MethodPost: 503}[req.Method])
			return
		}
		l.ServeHTTP(w, req)
	})
	r.open("s1")
	r.calls(r.a)
	s.opens("up-1", "")
	r.ledger.lapse("a")
	r.a.Lapsed()
	s.ends("up-1")
	away.Store(2)
	r.ledger.die("a")
	r.b.Died(t.Context(), "a")
	s.opens("up-1", "")
}
