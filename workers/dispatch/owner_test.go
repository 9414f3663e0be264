package dispatch

import (
	"bytes"
	"context"
	"net/http"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"waybill.dev/schemas"
	"waybill.dev/schemas/jsonrpc"
)

// ledger is who owns what among the processes of a test; what the log's leases
// are to real ones (bus.TestLeases).
type ledger struct {
	mu    sync.Mutex
	owner map[string]string
	gone  map[string]chan struct{} // by process; closed when it is dead
	loose map[string]bool          // have lost their leases, and may live
}

// holder is one process's side of it.
type holder struct {
	*ledger
	name string
}

func (h holder) Name() string { return h.name }

func (l *ledger) alive(name string) bool {
	select {
	case <-l.goneOf(name):
		return false
	default:
		return true
	}
}

// goneOf: mu is held.
func (l *ledger) goneOf(name string) chan struct{} {
	if l.gone == nil {
		l.gone, l.owner = map[string]chan struct{}{}, map[string]string{}
	}
	if l.gone[name] == nil {
		l.gone[name] = make(chan struct{})
	}
	return l.gone[name]
}

func (h holder) Acquire(_ context.Context, key string) (string, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if !h.alive(h.name) || h.loose[h.name] {
		return "", errLog
	}
	if was := h.owner[key]; was == "" || !h.alive(was) {
		h.owner[key] = h.name
	}
	return h.owner[key], nil
}

func (h holder) Release(_ context.Context, key string) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.owner[key] == h.name {
		delete(h.owner, key)
	}
	return nil
}

func (h holder) Holds() bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.alive(h.name) && !h.loose[h.name]
}

func (h holder) Gone(name string) <-chan struct{} {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.goneOf(name)
}

func (h holder) Owned(_ context.Context, name string) (keys []string, err error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for key, owner := range h.owner {
		if owner == name {
			keys = append(keys, key)
		}
	}
	return keys, nil
}

// lapse takes a process's leases, which others may acquire when it is dead.
func (l *ledger) lapse(name string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.loose = map[string]bool{name: true}
}

func (l *ledger) die(name string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	close(l.goneOf(name))
}

// replicas are two dispatchers on one log.
type replicas struct {
	*rig
	ledger *ledger
	a, b   *Dispatcher
}

func newReplicas(t *testing.T, h http.HandlerFunc, change ...func(*Options)) *replicas {
	r := &replicas{rig: newRig(t, h, change...), ledger: &ledger{}}
	r.opt.Store = r.emit
	for name, d := range map[string]**Dispatcher{"a": &r.a, "b": &r.b} {
		r.opt.Owners = holder{r.ledger, name}
		*d = r.fresh()
		quick(*d)
	}
	if h != nil {
		t.Cleanup(r.http.CloseClientConnections) // of streams that would never end
	}
	return r
}

// emit stores, and has both hear what every dispatcher hears.
func (r *replicas) emit(ctx context.Context, e schemas.Event) (schemas.Receipt, error) {
	receipt, err := r.log.emit(ctx, e)
	if err == nil && !receipt.Duplicate && slices.Contains(Heard(), e.Kind()) {
		e.Seq = receipt.Seq
		for _, d := range []*Dispatcher{r.a, r.b} {
			if err := d.Hear(ctx, e, r.emit); err != nil {
				r.t.Error(err)
			}
		}
	}
	return receipt, err
}

// give has a dispatcher handle a call, in the background.
func (r *replicas) give(d *Dispatcher, e schemas.Event) (handled <-chan error) {
	c := make(chan error, 1)
	go func() { c <- d.Handle(context.Background(), e, r.emit) }()
	return c
}

func (r *replicas) handled(c <-chan error) {
	r.t.Helper()
	select {
	case err := <-c:
		if err != nil {
			r.t.Error(err)
		}
	case <-time.After(20 * time.Second):
		r.t.Fatalf("Handle does not return%v", r.log)
	}
}

// calls counts the calls of a dispatcher's upstream, which then run until they
// are let go.
type counted struct {
	n     atomic.Int32
	began chan struct{}
	letGo chan struct{}
}

func (r *replicas) upstream(d *Dispatcher, owner func(Call) (string, string)) *counted {
	c := &counted{began: make(chan struct{}, 8), letGo: make(chan struct{})}
	d.upstreams["s"].owner = owner
	d.upstreams["s"].call = func(ctx context.Context, call Call, _ func([]byte) error) (Answer, error) {
		c.n.Add(1)
		call.Connected()
		c.began <- struct{}{}
		select {
		case <-c.letGo:
			return Answer{Status: 200, Body: []byte(`{}`)}, nil
		case <-ctx.Done():
			return Answer{}, faultf(Broken, "%w", context.Cause(ctx))
		}
	}
	return c
}

func key(Call) (string, string) { return "k", "" }

// ownedByB is two dispatchers of which b owns what calls need.
func ownedByB(t *testing.T) (r *replicas, atA, atB *counted) {
	r = newReplicas(t, nil)
	atA, atB = r.upstream(r.a, key), r.upstream(r.b, key)
	if _, err := (holder{r.ledger, "b"}).Acquire(t.Context(), "k"); err != nil {
		t.Fatal(err)
	}
	return r, atA, atB
}

// A call goes to its owner, wherever it was delivered, and has one ending.
func TestRouted(t *testing.T) {
	r, atA, atB := ownedByB(t)
	close(atB.letGo)
	e := r.call("write")
	r.handled(r.give(r.a, e))
	r.want("completed")
	if atA.n.Load() != 0 || atB.n.Load() != 1 {
		t.Errorf("%d calls at a, %d at b", atA.n.Load(), atB.n.Load())
	}
	routed := r.log.await(t, schemas.KindRouted, 2)
	if to := routed[0].Data.(*schemas.Routed); to.To != "b" || to.From != "a" || to.Seq != e.Seq || to.Back {
		t.Errorf("%+v", to)
	}
	if back := routed[1].Data.(*schemas.Routed); back.To != "a" || !back.Back {
		t.Errorf("%+v", back)
	}
	// And one that its owner gets itself stays there.
	e = r.call("write")
	r.handled(r.give(r.b, e))
	if atB.n.Load() != 2 || len(r.log.of(schemas.KindRouted)) != 2 {
		t.Error(r.log)
	}
}

// The owner dies in the middle: what may have an effect is not repeated.
func TestRoutedOwnerDies(t *testing.T) {
	for tool, want := range map[string]string{"write": "unknown", "read": "completed"} {
		t.Run(tool, func(t *testing.T) {
			r, atA, atB := ownedByB(t)
			close(atA.letGo)
			handled := r.give(r.a, r.call(tool))
			<-atB.began
			r.ledger.die("b")
			r.handled(handled)
			r.want(want)
			if n := atA.n.Load(); tool == "write" && n != 0 || tool == "read" && n != 1 {
				t.Errorf("%d calls at a", n)
			}
		})
	}
}

// One that died before is not waited for, whether it was found by a key or named.
func TestRoutedToTheDead(t *testing.T) {
	for _, owner := range []func(Call) (string, string){key, func(Call) (string, string) { return "", "b" }} {
		r, atA, _ := ownedByB(t)
		r.a.upstreams["s"].owner = owner
		r.ledger.die("b")
		close(atA.letGo)
		r.handled(r.give(r.a, r.call("write")))
		r.want("completed")
		if n := len(r.log.of(schemas.KindRouted)); n != 0 {
			t.Errorf("%d times routed", n)
		}
	}
}

// A cancel reaches the owner, and who waits hears of the ending.
func TestRoutedCancel(t *testing.T) {
	r, atA, atB := ownedByB(t)
	e := r.call("write")
	handled := r.give(r.a, e)
	<-atB.began
	if _, err := r.emit(t.Context(), e.Next(&schemas.Cancel{Reason: "enough"}, nil)); err != nil {
		t.Fatal(err)
	}
	r.handled(handled)
	r.want("cancelled")
	if atA.n.Load() != 0 {
		t.Error("a has called too")
	}
}

// The owner gives the call back without an ending: it is handed over again, and the
// owner hears of it again. A receipt that was lost on the way changes nothing.
func TestRoutedBack(t *testing.T) {
	r, atA, atB := ownedByB(t)
	close(atB.letGo)
	load := r.b.opt.Load
	var n atomic.Int32
	r.b.opt.Load = func(ctx context.Context, seq uint64) (schemas.Event, error) {
		if n.Add(1) <= 2 {
			return schemas.Event{}, errLog
		}
		return load(ctx, seq)
	}
	r.log.again = func(e schemas.Event) bool { p, ok := e.Data.(*schemas.Routed); return ok && !p.Back }
	handled := r.give(r.a, r.call("write"))
	// memLog.again makes each receipt one of a duplicate, of which the rig does not
	// have the dispatchers hear: they hear of it here, as of what the log has.
	for i := 1; i <= 3; i++ {
		var there []schemas.Event
		for len(there) < i {
			there = nil
			for _, e := range r.log.await(t, schemas.KindRouted, 2*i-1) {
				if !e.Data.(*schemas.Routed).Back {
					there = append(there, e)
				}
			}
		}
		if err := r.b.Hear(t.Context(), there[i-1], r.emit); err != nil {
			t.Fatal(err)
		}
	}
	r.handled(handled)
	r.want("completed")
	if atA.n.Load() != 0 || atB.n.Load() != 1 {
		t.Errorf("%d calls at a, %d at b", atA.n.Load(), atB.n.Load())
	}
}

// The era of the server, which decides who owns a call, is found once for it: one
// that has no owner is not made in a session that has one.
func TestOneEraForACall(t *testing.T) {
	for era, want := range map[Era]struct {
		call  Era
		owned int
	}{EraLegacy: {EraLegacy, 0}, EraModern: {EraAuto, 1}} {
		r := newReplicas(t, nil, func(o *Options) { o.Servers[0].Era = EraAuto })
		u := r.a.upstreams["s"]
		u.mcp.eras.era, u.mcp.eras.until = era, time.Now().Add(time.Hour)
		u.call = func(_ context.Context, c Call, _ func([]byte) error) (Answer, error) {
			if c.Era != want.call {
				t.Errorf("%s: the call is made in %q, want %q", era, c.Era, want.call)
			}
			return Answer{Status: 200, Body: []byte(`{}`)}, nil
		}
		r.handled(r.give(r.a, r.legacy("write")))
		r.want("completed")
		if keys, _ := (holder{r.ledger, "b"}).Owned(t.Context(), "a"); len(keys) != want.owned {
			t.Errorf("%s: a owns %v", era, keys)
		}
	}
}

// A body that stayed in the log is read once, to find the owner and for the call;
// and not at all for a method that has none.
func TestBodyReadOnce(t *testing.T) {
	for method, want := range map[string]int32{"tools/call": 1, "tools/list": 1} {
		r := newReplicas(t, nil)
		var asked atomic.Int32
		r.a.upstreams["s"].owner = func(c Call) (string, string) {
			if (len(c.Body) > 0) != (method == "tools/call") {
				t.Errorf("%s: %q to find the owner of", method, c.Body)
			}
			return "", ""
		}
		r.a.upstreams["s"].call = func(_ context.Context, c Call, _ func([]byte) error) (Answer, error) {
			if string(c.Body) != "large" {
				t.Errorf("%s: asked %q", method, c.Body)
			}
			return Answer{Status: 200, Body: []byte(`{}`)}, nil
		}
		load := r.a.opt.Load
		r.a.opt.Load = func(ctx context.Context, seq uint64) (schemas.Event, error) { asked.Add(1); return load(ctx, seq) }
		call := schemas.NewCallID(time.Now())
		request := r.log.add(schemas.Event{Tenant: "acme", Session: "s1", Call: call, Root: call, Agent: "a1", Data: &schemas.Requested{}, Body: []byte("large")})
		e := r.method(method, "read", "", func(e *schemas.Event) {
			a := e.Data.(*schemas.Authorized)
			e.Call, e.Root, e.Body = call, call, nil
			a.RequestedSeq, a.BodySize, a.BodySHA256 = request.Seq, len(request.Body), digestHex(string(request.Body))
		})
		r.handled(r.give(r.a, e))
		r.want("completed")
		if n := asked.Load(); n != want {
			t.Errorf("%s: read %d times", method, n)
		}
	}
}

// Who waited dies: the call is delivered again, to a third or to the owner
// itself, which carries it out already.
func TestRoutedTwice(t *testing.T) {
	r, atA, atB := ownedByB(t)
	e := r.call("write")
	first := r.give(r.a, e)
	<-atB.began
	again, owner := r.give(r.a, e), r.give(r.b, e)
	r.log.await(t, schemas.KindRouted, 2)
	close(atB.letGo)
	r.handled(first)
	r.handled(again)
	r.handled(owner)
	r.want("completed")
	if atA.n.Load() != 0 || atB.n.Load() != 1 {
		t.Errorf("%d calls at a, %d at b", atA.n.Load(), atB.n.Load())
	}
}

// A call's time passes at its owner.
func TestRoutedDeadline(t *testing.T) {
	r, atA, _ := ownedByB(t)
	r.handled(r.give(r.a, r.call("write", authorized(func(a *schemas.Authorized) { a.Deadline = time.Now().Add(100 * time.Millisecond) }))))
	r.want("unknown")
	if atA.n.Load() != 0 {
		t.Error("a has called too")
	}
}

// A client without sessions answers what a server with sessions has asked it, and
// comes to another dispatcher with that than the one that keeps the exchange.
func TestParkedElsewhere(t *testing.T) {
	l := &legacyServer{}
	l.call = func(w http.ResponseWriter, req *http.Request, m *jsonrpc.Message) {
		sseHead(w)
		say(w, `data: {"jsonrpc":"2.0","id":"q1","method":"elicitation/create","params":{"message":"who?","requestedSchema":{"type":"object","properties":{}}}}`)
		l.await(t, "response", 1)
		say(w, `data: {"jsonrpc":"2.0","id":%s,"result":{"content":[{"type":"text","text":"done"}]}}`, m.ID().Raw())
	}
	r := newReplicas(t, l.ServeHTTP, func(o *Options) { o.Servers[0].Era, o.StateKey = EraLegacy, bytes.Repeat([]byte("k"), stateKeySize) })
	body := func(more string) string {
		return `{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{"name":"write","arguments":{}` + more + `,"_meta":{"` + metaVersion + `":"2026-07-28","io.modelcontextprotocol/clientCapabilities":{"elicitation":{"form":{}}}}}}`
	}
	e := r.method("tools/call", "write", body(""))
	r.handled(r.give(r.a, e))
	end := r.ends(e, "completed")
	m, err := jsonrpc.Decode(end.Body, jsonrpc.Limits{})
	if err != nil {
		t.Fatal(err)
	}
	state, ok := m.Result().Get("requestState").Text()
	if !ok {
		t.Fatalf("%s", end.Body)
	}
	asked := ""
	for name := range m.Result().Get("inputRequests").Members() {
		asked = name
	}
	retry := body(`,"requestState":` + string(jsonrpc.Quote(state)) + `,"inputResponses":{` + string(jsonrpc.Quote(asked)) + `:{"action":"accept","content":{}}}`)
	e = r.method("tools/call", "write", retry)
	r.handled(r.give(r.b, e))
	if end := r.ends(e, "completed"); !strings.Contains(string(end.Body), "done") {
		t.Errorf("%s", end.Body)
	}
	if n := len(r.log.of(schemas.KindRouted)); n != 2 || l.opened != 1 {
		t.Errorf("%d routed events, %d sessions at the server", n, l.opened)
	}
	// After a's death nobody has the exchange, and that is said.
	r.ledger.die("a")
	e = r.method("tools/call", "write", retry)
	r.handled(r.give(r.b, e))
	if end := r.ends(e, "completed"); end.Data.(*schemas.Completed).ErrorCode == 0 {
		t.Errorf("%s", end.Body)
	}
}

// Two dispatchers have a session, one of which listens; when it dies, another
// does, also for sessions that it had not known.
func TestOneListener(t *testing.T) {
	l := &legacyServer{}
	opened, ended := make(chan string, 8), make(chan string, 8)
	l.get = func(w http.ResponseWriter, req *http.Request) {
		sseHead(w)
		opened <- req.Header.Get("Mcp-Session-Id")
		<-req.Context().Done()
		ended <- req.Header.Get("Mcp-Session-Id")
	}
	r := newReplicas(t, l.ServeHTTP)
	r.open("s1")
	r.open("s2")
	stream := func() string {
		t.Helper()
		select {
		case s := <-opened:
			return s
		case <-time.After(20 * time.Second):
			t.Fatal("nobody listens")
			return ""
		}
	}
	for _, session := range []string{"s1", "s2"} {
		e := r.call("write", inSession(session))
		r.handled(r.give(r.a, e))
		r.ends(e, "completed")
		stream()
	}
	e := r.legacy("write")
	r.handled(r.give(r.b, e))
	r.ends(e, "completed")
	if l.opened != 2 {
		t.Fatalf("%d sessions at the server", l.opened)
	}
	if keys, _ := (holder{r.ledger, "b"}).Owned(t.Context(), "a"); len(keys) != 2 || !strings.HasPrefix(keys[0], "stream.acme.s") {
		t.Errorf("a listens to %v", keys)
	}
	// As if the machine that a is on were cut off: it stops first.
	r.ledger.lapse("a")
	r.a.Lapsed()
	for range 2 {
		<-ended
	}
	if len(opened) > 0 {
		t.Errorf("%s is listened to twice", <-opened)
	}
	r.ledger.die("a")
	r.b.Died(t.Context(), "a")
	if got := []string{stream(), stream()}; !slices.Contains(got, "up-1") || !slices.Contains(got, "up-2") {
		t.Errorf("b listens to %v", got)
	}
	if l.opened != 2 {
		t.Errorf("%d sessions at the server", l.opened)
	}
	closed := r.log.add(schemas.Event{Tenant: "acme", Session: "s1", Agent: "a1", Data: &schemas.Closed{}})
	if err := r.b.Hear(t.Context(), closed, r.emit); err != nil {
		t.Fatal(err)
	}
	l.await(t, "DELETE", 1)
}

// One process opens a session at the server and another tells it that the client is
// ready, and listens. When that one dies, the first has the session and has never
// listened in it: it does now.
func TestOpenedHereListenedThere(t *testing.T) {
	l := &legacyServer{}
	s := listenTo(t, l, nil)
	r := newReplicas(t, l.ServeHTTP)
	r.open("s1")
	first := r.method("initialize", "", initialize, inSession("s1"))
	r.handled(r.give(r.b, first))
	r.ends(first, "completed")
	ready := r.method("notifications/initialized", "", `{"jsonrpc":"2.0","method":"notifications/initialized"}`, inSession("s1"),
		authorized(func(a *schemas.Authorized) { a.OneWay = true }))
	r.handled(r.give(r.a, ready))
	r.ends(ready, "completed")
	s.opens("up-1", "")
	r.die(r.a, "a", r.b)
	s.opens("up-1", "")
	if l.opened != 1 || l.came("notifications/initialized") != 1 {
		t.Errorf("%d sessions at the server, told %d times that the client is ready", l.opened, l.came("notifications/initialized"))
	}
}

// streams counts who listens to a legacy server: the sessions that are listened to, each
// with the event after which.
type streams struct {
	t      *testing.T
	opened chan [2]string
	ended  chan string
}

func listenTo(t *testing.T, l *legacyServer, events func(w http.ResponseWriter, session, last string)) *streams {
	s := &streams{t: t, opened: make(chan [2]string, 64), ended: make(chan string, 64)}
	l.get = func(w http.ResponseWriter, req *http.Request) {
		session, last := req.Header.Get("Mcp-Session-Id"), req.Header.Get("Last-Event-Id")
		sseHead(w)
		if events != nil {
			events(w, session, last)
		}
		s.opened <- [2]string{session, last}
		<-req.Context().Done()
		s.ended <- session
	}
	return s
}

func (s *streams) opens(session, last string) {
	s.t.Helper()
	select {
	case got := <-s.opened:
		if want := ([2]string{session, last}); got != want {
			s.t.Errorf("%q is listened to, want %q", got, want)
		}
	case <-time.After(20 * time.Second):
		s.t.Fatal("nobody listens to ", session)
	}
}

func (s *streams) ends(session string) {
	s.t.Helper()
	select {
	case got := <-s.ended:
		if got != session {
			s.t.Errorf("%s is not listened to any more, want %s", got, session)
		}
	case <-time.After(20 * time.Second):
		s.t.Fatal("it goes on listening to ", session)
	}
}

// die is what becomes of the processes when one is cut off from the log for long.
func (r *replicas) die(d *Dispatcher, name string, other *Dispatcher) {
	r.ledger.lapse(name)
	d.Lapsed()
	r.ledger.die(name)
	other.Died(r.t.Context(), name)
}

func (r *replicas) calls(d *Dispatcher, change ...func(*schemas.Event)) {
	r.t.Helper()
	e := r.legacy("write", change...)
	r.handled(r.give(d, e))
	r.ends(e, "completed")
}

// Who opened a session and takes its stream over from another begins where that one
// stopped, and brings the answers to what it was asked.
func TestOpenedHereTakenBack(t *testing.T) {
	for _, other := range []bool{false, true} { // another server has spoken since, in the client's session
		l := &legacyServer{}
		s := listenTo(t, l, func(w http.ResponseWriter, _, last string) {
			if last == "" {
				say(w, "id: e1\ndata: "+`{"jsonrpc":"2.0","id":"r1","method":"roots/list"}`)
			}
		})
		r := newReplicas(t, l.ServeHTTP)
		r.open("s1")
		first := r.method("initialize", "", initialize, inSession("s1"))
		r.handled(r.give(r.b, first))
		r.ends(first, "completed")
		r.calls(r.a)
		s.opens("up-1", "")
		asked := r.log.await(t, schemas.KindAsked, 1)[0]
		p := asked.Data.(*schemas.Asked)
		if other {
			r.log.add(asked.Next(&schemas.Asked{Target: schemas.Target{Protocol: "mcp", Server: "s2", Method: "roots/list"}, ID: "x.1", Event: "e7"}, asked.Body))
		}
		r.die(r.a, "a", r.b)
		s.opens("up-1", "e1")
		answer := r.log.add(asked.Next(&schemas.Answered{Target: p.Target, ID: p.ID}, []byte(`{"jsonrpc":"2.0","id":"`+p.ID+`","result":{"roots":[]}}`)))
		if err := r.b.Hear(t.Context(), answer, r.emit); err != nil {
			t.Fatal(err)
		}
		l.await(t, "response", 1)
		if got := l.body("response"); got != `{"jsonrpc":"2.0","id":"r1","result":{"roots":[]}}` || l.opened != 1 {
			t.Errorf("%s; %d sessions", got, l.opened)
		}
	}
}

// The server loses a session that two processes have, and the one that listens opens
// another. When it dies the other takes that one over, which it does not know.
func TestTakenOverIsTheNewest(t *testing.T) {
	l := &legacyServer{}
	s := listenTo(t, l, nil)
	r := newReplicas(t, l.ServeHTTP)
	r.open("s1")
	r.calls(r.a)
	s.opens("up-1", "")
	r.calls(r.b)
	l.forget()
	r.calls(r.a)
	s.opens("up-2", "")
	if keys, _ := (holder{r.ledger, "b"}).Owned(t.Context(), "a"); len(keys) > 2 {
		t.Errorf("a owns %v", keys)
	}
	r.die(r.a, "a", r.b)
	s.opens("up-2", "")
	r.calls(r.b)
	if l.opened != 2 {
		t.Errorf("%d sessions at the server", l.opened)
	}
}

// What cannot be taken over at once is taken over later; what has ended meanwhile is
// let go of.
func TestTakeOverLater(t *testing.T) {
	l := &legacyServer{}
	s := listenTo(t, l, nil)
	r := newReplicas(t, l.ServeHTTP)
	r.open("s1")
	r.open("s2")
	r.calls(r.a)
	s.opens("up-1", "")
	r.calls(r.a, inSession("s2"))
	s.opens("up-2", "")
	r.log.add(schemas.Event{Tenant: "acme", Session: "s2", Agent: "a1", Data: &schemas.Closed{}}) // of which nobody has heard
	var away atomic.Int32
	latest := r.b.opt.Latest
	r.b.opt.Latest = func(ctx context.Context, tenant schemas.Tenant, session schemas.SessionKey, k schemas.Kind) (schemas.Event, error) {
		if away.Add(1) <= 20 {
			return schemas.Event{}, errLog
		}
		return latest(ctx, tenant, session, k)
	}
	r.die(r.a, "a", r.b)
	s.opens("up-1", "")
	r.b.sessions.mu.Lock()
	n := len(r.b.sessions.of)
	r.b.sessions.mu.Unlock()
	if n != 1 {
		t.Errorf("b has %d sessions", n)
	}
	for late := time.Now().Add(20 * time.Second); ; {
		keys, _ := (holder{r.ledger, "a"}).Owned(t.Context(), "b")
		left, _ := (holder{r.ledger, "a"}).Owned(t.Context(), "a")
		if len(keys) == 1 && len(left) == 0 {
			break
		}
		if time.Now().After(late) {
			t.Fatalf("b owns %v, a still %v", keys, left)
		}
		runtime.Gosched()
	}
}

// The server has lost the session of a process that dies: who takes it over finds that
// out, though it has never listened, and opens another.
func TestTakeOverOfLost(t *testing.T) {
	l := &legacyServer{}
	s := listenTo(t, l, nil)
	r := newReplicas(t, l.ServeHTTP)
	r.open("s1")
	r.calls(r.a)
	s.opens("up-1", "")
	r.ledger.lapse("a")
	r.a.Lapsed()
	s.ends("up-1")
	l.forget()
	r.ledger.die("a")
	r.b.Died(t.Context(), "a")
	s.opens("up-2", "")
}

// What the client has subscribed to by way of one process is restored by another, which
// opens the session again.
func TestRestoredElsewhere(t *testing.T) {
	l := &legacyServer{}
	r := newReplicas(t, l.ServeHTTP)
	r.open("s1")
	r.calls(r.a)
	for _, uri := range []string{"a:1", "a:2"} {
		e := r.method("resources/subscribe", uri, `{"jsonrpc":"2.0","id":1,"method":"resources/subscribe","params":{"uri":"`+uri+`"}}`, inSession("s1"))
		r.handled(r.give(r.b, e))
		r.ends(e, "completed")
	}
	e := r.method("resources/unsubscribe", "a:1", `{"jsonrpc":"2.0","id":1,"method":"resources/unsubscribe","params":{"uri":"a:1"}}`, inSession("s1"))
	r.handled(r.give(r.a, e))
	r.ends(e, "completed")
	l.forget()
	r.calls(r.a)
	if n, last := l.came("resources/subscribe"), l.body("resources/subscribe"); n != 3 || !strings.Contains(last, `"a:2"`) {
		t.Errorf("subscribed %d times, at last %s", n, last)
	}
}

// releases is a process's side of the ledger that notes what it releases.
type releases struct {
	holder
	mu  *sync.Mutex
	all *[]string
}

func (h releases) Release(ctx context.Context, key string) error {
	h.mu.Lock()
	*h.all = append(*h.all, key)
	h.mu.Unlock()
	return h.holder.Release(ctx, key)
}

// A client that initializes once more is in a session with the same owner: the end of
// the first does not take that away.
func TestBegunAgainIsOwned(t *testing.T) {
	p := &plainServer{}
	r := newReplicas(t, p.ServeHTTP, func(o *Options) { o.Servers[0].Era = EraModern })
	h := releases{holder: holder{r.ledger, "a"}, mu: new(sync.Mutex), all: new([]string)}
	r.opt.Owners = h
	r.a = r.fresh()
	r.open("s1")
	for range 2 {
		e := r.method("initialize", "", initialize, inSession("s1"))
		r.handled(r.give(r.a, e))
		r.ends(e, "completed")
	}
	r.a.Close() // and all that it does beside
	for _, key := range *h.all {
		if strings.HasPrefix(key, processKeys) {
			t.Errorf("%s was released", key)
		}
	}
}

// Two processes find at once that the server has lost the session: one of them opens
// another, and both go on in that.
func TestOpenedOnce(t *testing.T) {
	l := &legacyServer{}
	var both sync.WaitGroup
	both.Add(2)
	l.init = func(http.ResponseWriter, *jsonrpc.Message) bool {
		if l.came("initialize") > 1 {
			both.Done()
			both.Wait() // neither is stored before the other has begun
		}
		return false
	}
	s := listenTo(t, l, nil)
	r := newReplicas(t, l.ServeHTTP)
	r.open("s1")
	r.calls(r.a)
	s.opens("up-1", "")
	r.calls(r.b)
	l.forget()
	one, two := r.legacy("write"), r.legacy("write")
	first, second := r.give(r.a, one), r.give(r.b, two)
	r.handled(first)
	r.handled(second)
	r.ends(one, "completed")
	r.ends(two, "completed")
	l.await(t, "DELETE", 1) // of the one that is too many
	connected := r.log.of(schemas.KindConnected)
	if len(connected) != 2 || l.opened != 3 {
		t.Fatalf("%d sessions at the server%v", l.opened, r.log)
	}
	now := connected[1].Data.(*schemas.Connected)
	s.opens(now.Upstream, "")
	for name, d := range map[string]*Dispatcher{"a": r.a, "b": r.b} {
		d.sessions.mu.Lock()
		if got := d.sessions.of[sessionID{"acme", "s1"}]["s"].upstream; got != now.Upstream {
			t.Errorf("%s goes on in %s, want %s", name, got, now.Upstream)
		}
		d.sessions.mu.Unlock()
	}
	if now.After != connected[0].Data.(*schemas.Connected).By || len(s.opened) > 0 {
		t.Errorf("%+v; %d more streams", now, len(s.opened))
	}
}

// A server asks on its stream, and who listened dies before the client answers,
// or before it has brought the answer there: who comes after it does, also where
// it is the same process, started again. And it listens where the other stopped.
func TestAnswerAfterDeath(t *testing.T) {
	for _, c := range []string{"answered after the take-over", "answered before", "restarted"} {
		t.Run(c, func(t *testing.T) {
			l := &legacyServer{}
			after := make(chan string, 8)
			l.get = func(w http.ResponseWriter, req *http.Request) {
				sseHead(w)
				last := req.Header.Get("Last-Event-Id")
				if last == "" {
					say(w, "id: e1\ndata: "+`{"jsonrpc":"2.0","id":"r1","method":"roots/list"}`)
				}
				after <- last
				<-req.Context().Done()
			}
			r := newReplicas(t, l.ServeHTTP)
			if c == "restarted" {
				r.opt.Owners = nil
				r.a = r.fresh()
			}
			r.open("s1")
			e := r.legacy("write")
			r.handled(r.give(r.a, e))
			r.ends(e, "completed")
			asked := r.log.await(t, schemas.KindAsked, 1)[0]
			<-after
			p := asked.Data.(*schemas.Asked)
			if p.Event != "e1" {
				t.Errorf("%+v", p)
			}
			answer := func(hear ...*Dispatcher) {
				e := r.log.add(asked.Next(&schemas.Answered{Target: p.Target, ID: p.ID}, []byte(`{"jsonrpc":"2.0","id":"`+p.ID+`","result":{"roots":[]}}`)))
				for _, d := range hear {
					if err := d.Hear(t.Context(), e, r.emit); err != nil {
						t.Fatal(err)
					}
				}
			}
			r.a.Close()
			r.ledger.die("a")
			switch c {
			case "answered before":
				answer(r.b)
				r.b.Died(t.Context(), "a")
			case "answered after the take-over":
				r.b.Died(t.Context(), "a")
				if last := <-after; last != "e1" {
					t.Errorf("listens after %q", last)
				}
				answer(r.b)
			case "restarted":
				answer(r.fresh())
			}
			l.await(t, "response", 1)
			if got := l.body("response"); got != `{"jsonrpc":"2.0","id":"r1","result":{"roots":[]}}` {
				t.Error(got)
			}
			if n := len(r.log.of(schemas.KindAsked)); n != 1 {
				t.Errorf("asked %d times", n)
			}
		})
	}
}
