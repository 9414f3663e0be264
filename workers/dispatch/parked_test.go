package dispatch

import (
	"fmt"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"waybill.dev/schemas"
	"waybill.dev/schemas/jsonrpc"
)

// guestOf opens the session of a guest at a host, and is it.
func guestOf(t *testing.T, r *rig) (*guest, *session) {
	t.Helper()
	r.answered(r.modern("tools/list", "", allCaps, `}}`))
	m := r.d.upstreams["s"].mcp
	all := m.sessions.visited(m, sessionID{"acme", "s1"})
	if len(all) != 1 || !all[0].guest.enter() {
		t.Fatalf("%d sessions", len(all))
	}
	return all[0].guest, all[0]
}

// exchangeOf is one that has been sent, to which nobody reads the end of.
func exchangeOf(g *guest) (*errand, Call) {
	call := schemas.CallID("c0000000000000000000000000")
	c := Call{ID: call, Event: schemas.Event{Call: call, Tenant: "acme", Session: "s1"}, Requested: &schemas.Requested{}}
	e := g.newErrand(c, binding{tenant: "acme"}, true)
	e.sent, e.call = true, call
	return e, c
}

// What a server asks and what is put to the client, at once and with others who
// come into the session: nobody waits for a lock that another holds.
func TestParkedLocks(t *testing.T) {
	leaks(t)
	h := &host{}
	r := newHost(t, h)
	g, s := guestOf(t, r)
	go func() {
		for {
			select {
			case <-h.answer("1"): // what is refused
			case <-t.Context().Done():
				return
			}
		}
	}()
	e, c := exchangeOf(g)
	msg, err := jsonrpc.Decode([]byte(`{"jsonrpc":"2.0","id":1,"method":"roots/list"}`), jsonrpc.Limits{Bytes: 100})
	if err != nil {
		t.Fatal(err)
	}
	// Under the guest's mu others wait for the exchange's: not the other way around.
	e.add(&query{s: s, id: []byte("1"), method: "roots/list"})
	put := make(chan bool, 1)
	g.mu.Lock()
	go func() { _, ok := e.park(c); put <- ok }()
	select {
	case ok := <-put:
		if !ok {
			t.Error("it is not parked")
		}
	case <-time.After(10 * time.Second):
		t.Error("what is put to the client waits for the guest's mu")
	}
	g.mu.Unlock()
	const times = 2000
	var all sync.WaitGroup
	all.Go(func() {
		for range times {
			g.asked(t.Context(), s, c.ID, msg)
		}
	})
	all.Go(func() {
		for range times {
			e.park(c)
			e.mu.Lock()
			e.attached, e.round, e.open, e.put, e.bytes = true, 0, nil, 0, 0
			e.mu.Unlock()
		}
	})
	all.Go(func() {
		for range times {
			if g.enter() {
				g.leave()
			}
		}
	})
	done := make(chan struct{})
	go func() { defer close(done); all.Wait() }()
	select {
	case <-done:
	case <-time.After(60 * time.Second):
		t.Fatal("each waits for the other")
	}
	e.finish()
	empty(t, r)
}

// What is refused for want of room is the caller's alone, and counts no more.
func TestParkedRefused(t *testing.T) {
	r := newHost(t, &host{})
	g, s := guestOf(t, r)
	e, c := exchangeOf(g)
	g.m.parking.mu.Lock()
	g.m.parking.tenants["acme"] = maxParkedTenant
	g.m.parking.mu.Unlock()
	first := &query{s: s, id: []byte("1"), method: "roots/list"}
	for _, q := range []*query{first, {s: s, id: []byte("2"), method: "roots/list"}, {s: s, id: []byte("3"), method: "roots/list"}} {
		e.add(q)
	}
	_, parked, refused, why := e.tryPark(c)
	later := &query{s: s, id: []byte("4"), method: "roots/list", params: []byte("{}")}
	if !e.add(later) || !e.withdraw(s, []byte("4")) || !e.add(later) {
		t.Error("another question is not taken")
	}
	if parked || len(refused) != 3 || refused[0] != first || slices.Contains(refused, nil) || why == "" || len(e.open) != 1 || e.bytes != 258 {
		t.Errorf("%v %v %q; %d are open, of %d bytes", parked, refused, why, len(e.open), e.bytes)
	}
	g.m.parking.mu.Lock()
	delete(g.m.parking.tenants, "acme")
	g.m.parking.mu.Unlock()
	// While it is parked the questions that come are counted too.
	if _, ok := e.park(c); !ok || !e.add(&query{s: s, id: []byte("5"), method: "roots/list"}) {
		t.Error("it is not parked")
	}
	g.m.parking.mu.Lock()
	if g.m.parking.bytes != 258+256 {
		t.Errorf("%d bytes", g.m.parking.bytes)
	}
	g.m.parking.bytes += maxParkedBytes
	g.m.parking.mu.Unlock()
	if e.add(&query{s: s, id: []byte("6"), method: "roots/list"}) {
		t.Error("there is no end of questions")
	}
	g.m.parking.mu.Lock()
	g.m.parking.bytes -= maxParkedBytes
	g.m.parking.mu.Unlock()
	e.finish()
	empty(t, r)
}

// A server that asks without end is refused in the end, or its answer is.
func TestParkedTurns(t *testing.T) {
	leaks(t)
	h := &host{tools: func(v *visit, m *jsonrpc.Message) {
		if name, _ := m.Params().Get("name").Text(); name == "anew" {
			v.end(`{"resultType":"input_required","inputRequests":{"k":{"method":"roots/list"}}}`)
			return
		}
		for i := 0; ; i++ {
			v.say(fmt.Sprintf(`{"jsonrpc":"2.0","id":%d,"method":"roots/list"}`, i))
			if a := v.wait(fmt.Sprint(i)); a == "" || strings.Contains(a, `"error"`) {
				v.end(`{"turns":` + fmt.Sprint(i) + `,"why":` + string(jsonrpc.Quote(a)) + `}`)
				return
			}
		}
	}}
	r := newHost(t, h)
	r.d.sessions.timing.gather = time.Millisecond
	for _, name := range []string{"ask", "anew"} {
		e := r.modern("tools/call", name, allCaps, `}}`)
		turns := 0
		for ; turns <= 2*maxTurns; turns++ {
			r.handle(e)
			got, end := r.outcomeOf(e)
			if got != "completed" || end.Data.(*schemas.Completed).Result != inputRequired {
				break
			}
			m, err := jsonrpc.Decode(end.Body, jsonrpc.Limits{Depth: 512})
			if err != nil {
				t.Fatal(err)
			}
			state, keys := r.stateOf(m.Root())
			e = r.modern("tools/call", name, allCaps, retry(state, `"`+keys[0]+`":{"roots":[]}`))
		}
		if turns != maxTurns {
			t.Errorf("%s: asked %d times", name, turns)
		}
		switch got, end := r.outcomeOf(e); {
		case name == "anew" && got != "bad_answer":
			t.Errorf("%s %s", got, end.Body)
		case name == "ask" && (got != "completed" || !strings.Contains(string(end.Body), "asked for input 100 times")):
			t.Errorf("%s %s", got, end.Body)
		}
	}
	empty(t, r)
}

// What is asked outside of any call while one is under way, and is not put to its
// client before it ends, goes to the next.
func TestAskedBeside(t *testing.T) {
	leaks(t)
	begun, end := make(chan struct{}), make(chan struct{})
	h := &host{out: make(chan string), tools: func(v *visit, m *jsonrpc.Message) {
		if name, _ := m.Params().Get("name").Text(); name == "slow" {
			close(begun)
			<-end
		}
		v.end(`{"n":1}`)
	}}
	r := newHost(t, h)
	r.d.sessions.timing.gather = time.Hour
	e := r.modern("tools/call", "slow", allCaps, `}}`)
	ended := make(chan struct{})
	go func() { defer close(ended); r.handle(e) }()
	<-begun
	h.out <- whoQuestion
	h.out <- `{"jsonrpc":"2.0","id":8,"method":"ping"}`
	<-h.answer("8") // so the question before it has been taken
	close(end)
	<-ended
	r.ends(e, "completed")
	empty(t, r) // its question is kept for the next one when the exchange is over, after its answer
	_, v := r.answered(r.modern("tools/call", "t", allCaps, `}}`))
	state, _ := r.stateOf(v)
	r.answered(r.modern("tools/call", "t", allCaps, retry(state, `"elicitation/create-1":`+accept)))
	if a := <-h.answer("7"); !strings.Contains(a, "Ada") {
		t.Errorf("%s", a)
	}
	empty(t, r)
}

// Nothing runs on when the process ends while exchanges are parked, one that was
// sent and one that was not.
func TestParkedClose(t *testing.T) {
	leaks(t)
	h := &host{tools: func(v *visit, m *jsonrpc.Message) {
		if m.Method() != "tools/call" {
			v.end(`{}`)
			return
		}
		v.say(whoQuestion)
		<-v.r.Context().Done()
	}}
	r := newHost(t, h)
	_, v := r.answered(r.modern("tools/call", "t", allCaps, `}}`))
	r.stateOf(v)
	g, s := guestOf(t, r)
	g.leave()
	g.mu.Lock()
	over := g.keep(&query{s: s, id: []byte("9"), method: "roots/list"})
	g.mu.Unlock()
	_, v = r.answered(r.modern("tools/call", "t", allCaps, `}}`))
	r.stateOf(v)
	g.mu.Lock()
	parked := slices.DeleteFunc(slices.Clone(g.errands), func(e *errand) bool {
		e.mu.Lock()
		defer e.mu.Unlock()
		return e.attached // the list's, which is just ending
	})
	g.mu.Unlock()
	if len(parked) != 2 || len(over) != 0 || h.came("tools/call") != 1 {
		t.Fatalf("%d are parked; sent %v", len(parked), h.log)
	}
	r.d.Close()
	empty(t, r)
	for _, e := range parked {
		e.mu.Lock()
		if !e.over || e.timer.Stop() {
			t.Errorf("the timer of an exchange runs (sent: %v)", e.sent)
		}
		e.mu.Unlock()
	}
	g.mu.Lock()
	if g.busy != 0 || g.idle != nil && g.idle.Stop() {
		t.Errorf("%d are in the session, or its timer runs", g.busy)
	}
	g.mu.Unlock()
	if h.came(http.MethodDelete) != 1 {
		t.Errorf("%v", h.log)
	}
}
