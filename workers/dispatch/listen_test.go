package dispatch

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"waybill.dev/schemas"
	"waybill.dev/schemas/jsonrpc"
)

// listening is a rig with an open session, whose server's stream is given.
func listening(t *testing.T, l *legacyServer, change ...func(*Options)) *rig {
	r := legacyRig(t, l, change...)
	e := r.legacy("write")
	r.handle(e)
	r.ends(e, "completed")
	return r
}

func notice(i int) string {
	return fmt.Sprintf(`{"jsonrpc":"2.0","method":"notifications/message","params":{"n": %d}}`, i)
}

// What the server says outside of calls is stored as it came, in order, over
// connections that break.
func TestListen(t *testing.T) {
	var conns atomic.Int32
	var mu sync.Mutex
	var lasts []string
	l := &legacyServer{}
	l.get = func(w http.ResponseWriter, req *http.Request) {
		n := int(conns.Add(1))
		mu.Lock()
		lasts = append(lasts, req.Header.Get("Last-Event-Id"))
		mu.Unlock()
		if n%3 == 0 {
			w.WriteHeader([]int{409, 429, 500, 503}[n/3%4])
			return
		}
		sseHead(w)
		say(w, "id: e%d\nretry: 1\ndata: %s", n, notice(n))
		switch n {
		case 1:
			say(w, ": keepalive")
			say(w, `id: q`+"\n"+`data: {"jsonrpc":"2.0","id":"r1","method":"roots/list"}`)
			say(w, "data: {garbage")
			say(w, `data: {"jsonrpc":"2.0","id":9,"result":{}}`)
			say(w, "event: other\ndata: x")
		case 2:
			say(w, "id: e1\ndata: %s", notice(1)) // again
			fmt.Fprint(w, "data: {")
			hangUp(w)
		case 7:
			<-req.Context().Done()
		}
	}
	r := listening(t, l)
	events := r.log.await(t, schemas.KindNotified, 5)
	var got []string
	for _, e := range events {
		p := e.Data.(*schemas.Notified)
		if e.Call != "" || e.Root != "" || e.Edge != "" || e.Session != "s1" || e.Agent != "a1" || p.Server != "s" || p.Method != "notifications/message" || p.ToServer {
			t.Errorf("%+v %+v", e, p)
		}
		got = append(got, string(e.Body))
	}
	if want := []string{notice(1), notice(2), notice(4), notice(5), notice(7)}; fmt.Sprint(got) != fmt.Sprint(want) {
		t.Errorf("stored %v", got)
	}
	mu.Lock()
	if want := "[ q e1 e1 e4 e5 e5]"; fmt.Sprint(lasts) != want {
		t.Errorf("asked for what came after %v", lasts)
	}
	mu.Unlock()
	// Outside of a call the client is asked the same way.
	asked := r.log.of(schemas.KindAsked)
	if len(asked) != 1 || asked[0].Call != "" || asked[0].Edge != "" || asked[0].Data.(*schemas.Asked).Method != "roots/list" {
		t.Fatal(r.log)
	}
	p := asked[0].Data.(*schemas.Asked)
	answer := r.log.add(asked[0].Next(&schemas.Answered{Target: p.Target, ID: p.ID}, []byte(`{"jsonrpc":"2.0","id":"`+p.ID+`","result":{"roots":[]}}`)))
	if err := r.d.Hear(t.Context(), answer, r.log.emit); err != nil {
		t.Fatal(err)
	}
	l.await(t, "response", 1)
	if got := l.body("response"); got != `{"jsonrpc":"2.0","id":"r1","result":{"roots":[]}}` {
		t.Error(got)
	}
}

// What the log does not take is asked for again, and is not taken for what was there
// before.
func TestListenNotStored(t *testing.T) {
	var conns atomic.Int32
	l := &legacyServer{}
	l.get = func(w http.ResponseWriter, req *http.Request) {
		conns.Add(1)
		sseHead(w)
		if req.Header.Get("Last-Event-Id") == "" {
			say(w, "id: e1\ndata: %s", notice(1))
		}
		say(w, "id: e2\ndata: %s", notice(2))
		<-req.Context().Done()
	}
	r := legacyRig(t, l, func(o *Options) {
		store := o.Store
		o.Store = func(ctx context.Context, e schemas.Event) (schemas.Receipt, error) {
			if string(e.Body) == notice(2) && conns.Load() < 3 {
				return schemas.Receipt{}, errors.New("the log is away")
			}
			return store(ctx, e)
		}
	})
	r.d.sessions.timing.store = 50 * time.Millisecond
	e := r.legacy("write")
	r.handle(e)
	r.ends(e, "completed")
	events := r.log.await(t, schemas.KindNotified, 2)
	if got := string(events[1].Body); got != notice(2) || conns.Load() != 3 {
		t.Errorf("stored %s, asked for %d times", got, conns.Load())
	}
}

// A server without such a stream is not asked again.
func TestListenNot(t *testing.T) {
	for _, status := range []int{405, 404, 400, 401, 200, 204, 501} {
		l := &legacyServer{}
		asked := make(chan struct{}, 10)
		l.get = func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(status); asked <- struct{}{} }
		r := listening(t, l)
		<-asked
		r.d.sessions.stop()
		r.d.sessions.wg.Wait() // the listener has ended, or would ask again
		if len(asked) > 0 || l.came("DELETE") != 0 || l.opened != 1 {
			t.Errorf("%d: %v", status, l.log)
		}
	}
}

// A server that lost the session while the client only listens: it is opened
// again, with what was subscribed to.
func TestListenLost(t *testing.T) {
	l := &legacyServer{}
	cut := make(chan struct{})
	l.get = func(w http.ResponseWriter, req *http.Request) {
		sseHead(w)
		if req.Header.Get("Mcp-Session-Id") == "up-1" {
			<-cut
			return
		}
		say(w, "data: %s", notice(2))
		<-req.Context().Done()
	}
	r := listening(t, l)
	e := r.method("resources/subscribe", "a:1", `{"jsonrpc":"2.0","id":1,"method":"resources/subscribe","params":{"uri":"a:1"}}`, inSession("s1"))
	r.handle(e)
	r.ends(e, "completed")
	l.await(t, "GET", 1)
	l.forget()
	close(cut)
	r.log.await(t, schemas.KindNotified, 1)
	if l.opened != 2 || l.came("resources/subscribe") != 2 {
		t.Error(l.log)
	}
}

// A session that the server lost and does not open at once is opened when it does,
// without a call.
func TestListenLostLong(t *testing.T) {
	l := &legacyServer{}
	var refusals atomic.Int32
	l.init = func(w http.ResponseWriter, _ *jsonrpc.Message) bool {
		if l.came("initialize") == 1 || refusals.Add(1) > 2 {
			return false
		}
		w.WriteHeader(http.StatusServiceUnavailable)
		return true
	}
	cut := make(chan struct{})
	l.get = func(w http.ResponseWriter, req *http.Request) {
		sseHead(w)
		if req.Header.Get("Mcp-Session-Id") == "up-1" {
			<-cut
			return
		}
		say(w, "data: %s", notice(2))
		<-req.Context().Done()
	}
	r := listening(t, l)
	l.await(t, "GET", 1)
	l.forget()
	close(cut)
	r.log.await(t, schemas.KindNotified, 1)
	if l.opened != 2 || l.came("initialize") != 4 {
		t.Error(l.log)
	}
	// The call that comes then finds the new one.
	e := r.legacy("write")
	r.handle(e)
	r.ends(e, "completed")
	if l.opened != 2 {
		t.Error(l.log)
	}
}

// A stream that there has been is asked for again, whatever the server says for a
// while.
func TestListenRefusedForAWhile(t *testing.T) {
	l := &legacyServer{}
	var n atomic.Int32
	l.get = func(w http.ResponseWriter, req *http.Request) {
		switch i := int(n.Add(1)); i {
		case 2, 3, 4, 5:
			w.WriteHeader([]int{401, 403, 405, 501}[i-2])
		case 6:
			sseHead(w)
			say(w, "data: %s", notice(i))
			<-req.Context().Done()
		default:
			sseHead(w)
		}
	}
	r := listening(t, l)
	r.log.await(t, schemas.KindNotified, 1)
}

// While the log is away nothing is lost, and nothing more is read.
func TestListenFlood(t *testing.T) {
	const n = 2000
	l := &legacyServer{}
	all := make(chan struct{})
	l.get = func(w http.ResponseWriter, req *http.Request) {
		sseHead(w)
		pad := strings.Repeat("x", 8000)
		for i := range n {
			if _, err := fmt.Fprintf(w, "data: {\"jsonrpc\":\"2.0\",\"method\":\"m\",\"params\":{\"n\":%d,\"pad\":%q}}\n\n", i, pad); err != nil {
				return
			}
		}
		w.(http.Flusher).Flush()
		close(all)
		<-req.Context().Done()
	}
	hold := make(chan struct{})
	var failed atomic.Int32
	held := make(chan struct{})
	r := listening(t, l, func(o *Options) {
		store := o.Store
		o.Store = func(ctx context.Context, e schemas.Event) (schemas.Receipt, error) {
			if e.Kind() == schemas.KindNotified {
				if failed.Add(1) == 1 {
					close(held)
					return schemas.Receipt{}, errors.New("the log is away")
				}
				<-hold
			}
			return store(ctx, e)
		}
	})
	<-held
	// 16 MB are more than the buffers on the way hold: the server has to wait,
	// however long one looks.
	select {
	case <-all:
		t.Error("the server could say everything while nothing was stored")
	case <-time.After(100 * time.Millisecond):
	}
	close(hold)
	for i, e := range r.log.await(t, schemas.KindNotified, n) {
		if !strings.Contains(string(e.Body), fmt.Sprintf(`"n":%d,`, i)) {
			t.Fatalf("event %d is %s", i, e.Body[:60])
		}
	}
}

// What the log will never take is left out, and a server that asked it hears so.
func TestListenRefused(t *testing.T) {
	l := &legacyServer{}
	l.get = func(w http.ResponseWriter, req *http.Request) {
		sseHead(w)
		say(w, "data: %s", strings.Repeat("x", 30_000)) // too large: the stream begins anew
		<-req.Context().Done()
	}
	first := l.get
	var once sync.Once
	l.get = func(w http.ResponseWriter, req *http.Request) {
		again := true
		once.Do(func() { again = false; first(w, req) })
		if !again {
			return
		}
		sseHead(w)
		say(w, `data: {"jsonrpc":"2.0","method":"no"}`)
		say(w, `data: {"jsonrpc":"2.0","id":5,"method":"no"}`)
		say(w, "data: %s", notice(1))
		<-req.Context().Done()
	}
	r := listening(t, l, func(o *Options) {
		o.MaxAnswer = 10_000
		store := o.Store
		o.Store = func(ctx context.Context, e schemas.Event) (schemas.Receipt, error) {
			switch d := e.Data.(type) {
			case *schemas.Notified:
				if d.Method == "no" {
					return schemas.Receipt{}, schemas.ErrTooLarge
				}
			case *schemas.Asked:
				return schemas.Receipt{}, schemas.ErrInvalid
			}
			return store(ctx, e)
		}
	})
	r.log.await(t, schemas.KindNotified, 1)
	l.await(t, "response", 1)
	if got := l.body("response"); !strings.Contains(got, `"id":5`) || !strings.Contains(got, `"error"`) {
		t.Error(got)
	}
}

// Garbage without end costs a connection from time to time, and nothing else.
func TestListenGarbage(t *testing.T) {
	l := &legacyServer{}
	l.get = func(w http.ResponseWriter, req *http.Request) {
		sseHead(w)
		for req.Context().Err() == nil {
			if _, err := fmt.Fprint(w, "data: [1]\n\n"); err != nil {
				return
			}
		}
	}
	r := listening(t, l)
	l.await(t, "GET", 5)
	e := r.legacy("write")
	r.handle(e)
	r.ends(e, "completed")
	if len(r.log.of(schemas.KindNotified)) != 0 {
		t.Error(r.log)
	}
}
