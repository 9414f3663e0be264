package bus_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"waybill.dev/bus"
	"waybill.dev/bus/embed"
	"waybill.dev/schemas"
)

var requests = bus.Work{Name: "policy", Kinds: []schemas.Kind{schemas.KindRequested}}

// run keeps a handler at work until the test ends, and returns when it is.
func (w *world) run(l *bus.Log, work bus.Work, h schemas.Handler) (stop func()) {
	w.t.Helper()
	up := make(chan bool, 8)
	work.Up = func(is bool) { up <- is }
	stop = background(w.t, func(ctx context.Context) error { return l.Run(ctx, work, h) })
	<-up
	return stop
}

// patience bounds every wait; only a failure meets it.
const patience = 30 * time.Second

// await returns the event that fits, when it is stored.
func (w *world) await(what string, fits func(schemas.Event) bool) schemas.Event {
	w.t.Helper()
	l := w.open(bus.Options{Role: bus.RoleObserver})
	ctx, cancel := context.WithTimeout(w.t.Context(), patience)
	defer cancel()
	heard, err := l.Listen(ctx, bus.Filter{}, 0)
	if err != nil {
		w.t.Fatal(err)
	}
	for e, err := range heard {
		if err == nil && fits(e) {
			return e
		}
	}
	w.t.Fatalf("%s was not stored", what)
	return schemas.Event{}
}

// ended returns a call's ending, when it is stored.
func (w *world) ended(call schemas.CallID) schemas.Event {
	w.t.Helper()
	return w.await("an ending of "+string(call), func(e schemas.Event) bool { return e.Call == call && e.Kind().Ends() })
}

// endings counts those of all calls.
func (w *world) endings() map[schemas.CallID]int {
	w.t.Helper()
	n := map[schemas.CallID]int{}
	for e, err := range w.open(bus.Options{Role: bus.RoleObserver}).Read(w.t.Context(), bus.Filter{}, 0) {
		if err == nil && e.Kind().Ends() {
			n[e.Call]++
		}
	}
	return n
}

// dead returns the dead letters.
func (w *world) dead() (all []*jetstream.RawStreamMsg) {
	w.t.Helper()
	js := w.js(bus.RoleObserver)
	s, err := js.Stream(w.t.Context(), "DEAD")
	if err != nil {
		w.t.Fatal(err)
	}
	for seq := uint64(1); ; {
		m, err := s.GetMsg(w.t.Context(), seq, jetstream.WithGetMsgSubject("dead.>"))
		if errors.Is(err, jetstream.ErrMsgNotFound) {
			return all
		}
		if err != nil {
			w.t.Fatal(err)
		}
		all = append(all, m)
		seq = m.Sequence + 1
	}
}

// settled waits until a consumer has nothing left to do.
func (w *world) settled(consumer string) {
	w.t.Helper()
	l := w.open(bus.Options{Role: bus.RoleObserver})
	ctx, cancel := context.WithTimeout(w.t.Context(), patience)
	defer cancel()
	for tick := time.Tick(10 * time.Millisecond); ; {
		s, err := l.Status(ctx)
		if err != nil {
			w.t.Fatal(err)
		}
		for _, lag := range s.Lags {
			if lag.Consumer == consumer && lag.Events == 0 {
				return
			}
		}
		select {
		case <-tick:
		case <-ctx.Done():
			w.t.Fatalf("%s does not settle: %+v", consumer, s.Lags)
		}
	}
}

func TestHandlerIsTriedAgainThenBuried(t *testing.T) {
	w := start(t, embed.Options{})
	l := w.open(bus.Options{Role: bus.RolePolicy, AckWait: 250 * time.Millisecond})
	edge := w.open(bus.Options{Role: bus.RoleEdge})
	fails, panics, second, patient, fine := request("fails"), request("panics"), request("second"), request("patient"), request("fine")
	var tries sync.Map
	w.run(l, requests, func(ctx context.Context, e schemas.Event, emit schemas.Emit) error {
		n, _ := tries.LoadOrStore(e.Call, new(atomic.Int32))
		nth := n.(*atomic.Int32).Add(1)
		switch {
		case e.Call == fails.Call, e.Call == second.Call && nth < 3:
			return errors.New("not today")
		case e.Call == patient.Call && nth < 12:
			return fmt.Errorf("reading the past: %w", context.DeadlineExceeded)
		case e.Call == panics.Call:
			panic("out of order")
		}
		_, err := emit(ctx, e.Next(&schemas.Denied{Decision: schemas.Decision{N: 1}}, nil))
		return err
	})
	for _, e := range []schemas.Event{fails, panics, second, patient, fine} {
		if _, err := edge.Publish(t.Context(), e); err != nil {
			t.Fatal(err)
		}
	}
	for _, c := range []struct {
		e    schemas.Event
		kind schemas.Kind
		n    int32
		why  string
	}{
		{fine, schemas.KindDenied, 1, ""}, {second, schemas.KindDenied, 3, ""},
		{patient, schemas.KindDenied, 12, ""}, // it was the log's fault
		{fails, schemas.KindFailed, 8, "not today"}, {panics, schemas.KindFailed, 8, "panicked: out of order"},
	} {
		end := w.ended(c.e.Call)
		n, _ := tries.Load(c.e.Call)
		if tried := n.(*atomic.Int32).Load(); end.Kind() != c.kind || tried != c.n {
			t.Errorf("%s: ended as %s after %d tries, want %s after %d", c.e.Body, end.Kind(), tried, c.kind, c.n)
		}
		if f, ok := end.Data.(*schemas.Failed); ok && (f.Code != schemas.FailInternal || !strings.Contains(f.Detail, c.why)) {
			t.Errorf("%s: ended as %s: %s", c.e.Body, f.Code, f.Detail)
		}
	}
	w.settled("policy")
	for call, n := range w.endings() {
		if n != 1 {
			t.Errorf("call %s has %d endings", call, n)
		}
	}
	dead := w.dead()
	if len(dead) != 2 {
		t.Fatalf("%d dead letters, want 2", len(dead))
	}
	for _, m := range dead {
		if body := string(m.Data); body != "fails" && body != "panics" || m.Subject != "dead.policy" ||
			!strings.HasPrefix(m.Header.Get("Dead-Subject"), "ev.acme.") || m.Header.Get("Dead-Waybill-Event") == "" {
			t.Errorf("dead letter %q on %s: %v", m.Data, m.Subject, m.Header)
		}
	}
}

// An authorized call on which the handler gives up may have been carried out.
func TestBuriedAuthorizedIsUnknown(t *testing.T) {
	w := start(t, embed.Options{})
	w.open(bus.Options{Role: bus.RolePolicy})
	l := w.open(bus.Options{Role: bus.RoleDispatch, AckWait: 200 * time.Millisecond})
	w.run(l, bus.Work{Name: "dispatch", Kinds: []schemas.Kind{schemas.KindAuthorized}},
		func(context.Context, schemas.Event, schemas.Emit) error { return errors.New("not today") })
	e := request("x")
	if err := permit(t.Context(), e, w.open(bus.Options{Role: bus.RolePolicy}).Publish); err != nil {
		t.Fatal(err)
	}
	if f, ok := w.ended(e.Call).Data.(*schemas.Failed); !ok || f.Code != schemas.FailUnknown {
		t.Errorf("ended as %+v, want unknown", f)
	}
}

// One that has become a task has its ending where its client looks.
func TestBuriedTask(t *testing.T) {
	w := start(t, embed.Options{})
	w.open(bus.Options{Role: bus.RolePolicy})
	l := w.open(bus.Options{Role: bus.RoleDispatch, AckWait: 200 * time.Millisecond})
	w.run(l, bus.Work{Name: "dispatch", Kinds: []schemas.Kind{schemas.KindAuthorized}},
		func(ctx context.Context, e schemas.Event, emit schemas.Emit) error {
			if string(e.Body) == "tasked" {
				if _, err := emit(ctx, e.Next(&schemas.Tasked{Status: "working", By: "x"}, nil)); err != nil {
					return err
				}
			}
			return errors.New("not today")
		})
	policy := w.open(bus.Options{Role: bus.RolePolicy})
	for _, body := range []string{"tasked", "plain"} {
		e := request(body)
		a := &schemas.Authorized{Requested: *e.Data.(*schemas.Requested), Decision: schemas.Decision{N: 1}}
		a.TaskUntil = time.Now().Add(time.Hour)
		if _, err := policy.Publish(t.Context(), e.Next(a, e.Body)); err != nil {
			t.Fatal(err)
		}
		if end := w.ended(e.Call); end.Kind() != schemas.KindFailed || end.ToTask() != (body == "tasked") {
			t.Errorf("%s ends as %s, addressed to %q", body, end.Kind(), end.Edge)
		}
	}
}

// Messages that no version of this program wrote, or a later one did.
func TestUndecodable(t *testing.T) {
	w := start(t, embed.Options{})
	l := w.open(bus.Options{Role: bus.RolePolicy})
	w.run(l, requests, func(ctx context.Context, e schemas.Event, emit schemas.Emit) error {
		_, err := emit(ctx, e.Next(&schemas.Denied{Decision: schemas.Decision{N: 1}}, nil))
		return err
	})
	js := w.js(bus.RoleEdge)
	const subject = "ev.acme.s1.requested._"
	envelope := func(v int, call, more string) string {
		return fmt.Sprintf(`{"v":%d,"kind":"requested","id":"%s/requested","time":"2026-07-28T12:00:00Z","tenant":"acme","session":"s1","call":%q,"root":%q,"agent":"researcher","edge":"e1","data":{"protocol":"mcp","server":"s","method":"m"%s}}`, v, call, call, call, more)
	}
	ends := map[string]bool{}
	for name, h := range map[string]nats.Header{
		"newer":       {"Waybill-Event": {envelope(2, "newer", "")}, "Nats-Msg-Id": {"newer/requested"}},
		"garbage":     {"Waybill-Event": {`{"v":`}, "Nats-Msg-Id": {"garbage/requested"}},
		"wrongid":     {"Waybill-Event": {envelope(1, "wrongid", "")}, "Nats-Msg-Id": {"wrongid/other"}},
		"no envelope": {"Nats-Msg-Id": {"bare/requested"}},
		"nothing":     {},
		"fine":        {"Waybill-Event": {envelope(1, "fine", `,"unknown_member":1`)}, "Nats-Msg-Id": {"fine/requested"}},
	} {
		if _, err := js.PublishMsg(t.Context(), &nats.Msg{Subject: subject, Header: h, Data: []byte(name)}); err != nil {
			t.Fatal(err)
		}
	}
	for _, call := range []schemas.CallID{"newer", "garbage", "wrongid", "bare"} {
		end := w.ended(call)
		if f, ok := end.Data.(*schemas.Failed); !ok || f.Code != schemas.FailUndecodable || end.Session != "s1" || end.Tenant != "acme" {
			t.Errorf("%s: ended as %+v", call, end)
		}
		ends[string(call)] = true
	}
	if end := w.ended("newer"); end.Edge != "e1" || end.Agent != "researcher" {
		t.Errorf("the ending goes to edge %q and names agent %q", end.Edge, end.Agent)
	}
	if end := w.ended("fine"); end.Kind() != schemas.KindDenied {
		t.Errorf("a message with a member more ended as %s", end.Kind())
	}
	w.settled("policy")
	if dead := w.dead(); len(dead) != 5 {
		t.Errorf("%d dead letters, want 5", len(dead))
	}
}

// A handler that takes several times the AckWait keeps its event; at the same
// time one whose process is gone loses it.
func TestHeartbeatAndDeath(t *testing.T) {
	const ackWait = time.Second
	w := start(t, embed.Options{})
	edge := w.open(bus.Options{Role: bus.RoleEdge})
	slow, orphan := request("slow"), request("orphan")

	type delivery struct {
		by   string
		call schemas.CallID
	}
	given := make(chan delivery, 64)
	done := make(chan struct{})
	worker := func(name string, l *bus.Log) func() {
		return w.run(l, requests, func(ctx context.Context, e schemas.Event, emit schemas.Emit) error {
			given <- delivery{name, e.Call}
			select {
			case <-done:
			case <-ctx.Done():
				return ctx.Err()
			}
			_, err := emit(ctx, e.Next(&schemas.Denied{Decision: schemas.Decision{N: 1}}, nil))
			return err
		})
	}
	next := func() delivery {
		t.Helper()
		select {
		case d := <-given:
			return d
		case <-time.After(patience):
			t.Fatal("nothing was delivered")
			return delivery{}
		}
	}
	publish := func(e schemas.Event) {
		t.Helper()
		if _, err := edge.Publish(t.Context(), e); err != nil {
			t.Fatal(err)
		}
	}
	doomed := w.open(bus.Options{Role: bus.RolePolicy, AckWait: ackWait})
	stopA := worker("a", doomed)
	publish(orphan)
	if d := next(); d != (delivery{"a", orphan.Call}) {
		t.Fatalf("delivered %v", d)
	}
	doomed.Close() // to the log this is a process that died
	worker("b", w.open(bus.Options{Role: bus.RolePolicy, AckWait: ackWait}))
	publish(slow)
	got := map[schemas.CallID]int{}
	for range 2 {
		d := next()
		if d.by != "b" {
			t.Errorf("delivered to %s", d.by)
		}
		got[d.call]++
	}
	if got[slow.Call] != 1 || got[orphan.Call] != 1 {
		t.Errorf("delivered %v, want each once", got)
	}
	select {
	case d := <-given:
		t.Errorf("delivered again while its handler was at work: %v", d)
	case <-time.After(3 * ackWait):
	}
	close(done)
	for _, call := range []schemas.CallID{slow.Call, orphan.Call} {
		w.ended(call)
	}
	w.settled("policy")
	stopA()
	for call, n := range w.endings() {
		if n != 1 {
			t.Errorf("call %s has %d endings", call, n)
		}
	}
}

// When Run is told to end, handlers at work may finish, and what they cannot
// finish is for another.
func TestRunDrains(t *testing.T) {
	w := start(t, embed.Options{})
	edge := w.open(bus.Options{Role: bus.RoleEdge})
	begun, finish := make(chan schemas.CallID, 8), make(chan struct{})
	quick, stuck := request("quick"), request("stuck")
	l := w.open(bus.Options{Role: bus.RolePolicy})
	work := requests
	work.Drain = 500 * time.Millisecond
	stop := w.run(l, work, func(ctx context.Context, e schemas.Event, emit schemas.Emit) error {
		begun <- e.Call
		wait := finish
		if e.Call == stuck.Call {
			wait = nil
		}
		select {
		case <-wait:
		case <-ctx.Done():
			return ctx.Err()
		}
		_, err := emit(ctx, e.Next(&schemas.Denied{Decision: schemas.Decision{N: 1}}, nil))
		return err
	})
	for _, e := range []schemas.Event{quick, stuck} {
		if _, err := edge.Publish(t.Context(), e); err != nil {
			t.Fatal(err)
		}
		<-begun
	}
	stopped := make(chan struct{})
	go func() { stop(); close(stopped) }()
	close(finish)
	<-stopped
	if n := w.endings(); n[quick.Call] != 1 || n[stuck.Call] != 0 {
		t.Errorf("endings %v", n)
	}
	w.run(w.open(bus.Options{Role: bus.RolePolicy}), requests, func(ctx context.Context, e schemas.Event, emit schemas.Emit) error {
		if e.Call != stuck.Call {
			t.Errorf("%s is delivered again", e.Body)
		}
		_, err := emit(ctx, e.Next(&schemas.Denied{Decision: schemas.Decision{N: 1}}, nil))
		return err
	})
	w.ended(stuck.Call)
}

// Whether the log has an event is said only when it is known.
func TestPublishSaysWhatItKnows(t *testing.T) {
	w := start(t, embed.Options{})
	e := request("x")
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	_, err := w.open(bus.Options{Role: bus.RoleEdge, Fault: func(_ schemas.Event, stored bool) error {
		if stored {
			return nats.ErrTimeout // the acknowledgement is lost, each time
		}
		return nil
	}}).Publish(ctx, e)
	if err == nil || errors.Is(err, schemas.ErrOverloaded) {
		t.Errorf("stored and not acknowledged: %v; overloaded means that nothing was stored", err)
	}
	e.Body = make([]byte, bus.MaxBody+1)
	if _, err := w.open(bus.Options{Role: bus.RoleEdge}).Publish(t.Context(), e); !errors.Is(err, schemas.ErrTooLarge) {
		t.Errorf("a body of %d bytes: %v", len(e.Body), err)
	}
}

// Many that ask for the past of their calls at once each get their own, and all
// that was stored before they asked.
func TestPast(t *testing.T) {
	const calls = 100
	w := start(t, embed.Options{})
	edge, pol := w.open(bus.Options{Role: bus.RoleEdge}), w.open(bus.Options{Role: bus.RolePolicy})
	l := w.open(bus.Options{Role: bus.RoleDispatch})
	var crowd sync.WaitGroup
	for i := range calls {
		crowd.Go(func() {
			e := request(fmt.Sprint(i))
			if i%2 == 0 {
				e.Session = "another"
			}
			r, err := edge.Publish(t.Context(), e)
			if err == nil {
				e.Seq = r.Seq
				err = permit(t.Context(), e, pol.Publish)
			}
			if err != nil {
				t.Error(err)
				return
			}
			for _, from := range []schemas.Event{e, e.Next(&schemas.Authorized{RequestedSeq: r.Seq}, nil)} {
				if from.Seq == 0 {
					from.Seq = r.Seq + 1
				}
				past, err := l.Past(t.Context(), from)
				if err != nil || len(past) != 2 || past[0].Kind() != schemas.KindRequested || past[1].Kind() != schemas.KindAuthorized || past[0].Call != e.Call {
					t.Errorf("past of call %d: %d events, %v", i, len(past), err)
				}
			}
		})
	}
	crowd.Wait()
	gone, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := l.Past(gone, request("x")); err == nil {
		t.Error("a past for who does not wait for it")
	}
	if _, err := l.Past(t.Context(), request("x")); err != nil {
		t.Errorf("after that: %v", err)
	}
}

// What is asked for again is what was found before and what came since, each once;
// and who asks from further back learns of all since then.
func TestPastGrows(t *testing.T) {
	w := start(t, embed.Options{})
	edge, pol := w.open(bus.Options{Role: bus.RoleEdge}), w.open(bus.Options{Role: bus.RolePolicy})
	l := w.open(bus.Options{Role: bus.RoleDispatch})
	e := request("grows")
	past := func(from uint64, want ...schemas.Kind) {
		t.Helper()
		asks := e
		asks.Seq = from
		found, err := l.Past(t.Context(), asks)
		var kinds []schemas.Kind
		for _, f := range found {
			kinds = append(kinds, f.Kind())
		}
		if err != nil || !slices.Equal(kinds, want) {
			t.Errorf("past from %d: %v, %v; want %v", from, kinds, err, want)
		}
	}
	for i := range 3 { // others of the session, before it
		if _, err := edge.Publish(t.Context(), request(fmt.Sprint("other", i))); err != nil {
			t.Fatal(err)
		}
	}
	past(1)
	r, err := edge.Publish(t.Context(), e)
	if err != nil {
		t.Fatal(err)
	}
	past(r.Seq, schemas.KindRequested)
	past(r.Seq+1, schemas.KindRequested) // what is known may be more than what was asked for
	e.Seq = r.Seq
	if err := permit(t.Context(), e, pol.Publish); err != nil {
		t.Fatal(err)
	}
	past(r.Seq, schemas.KindRequested, schemas.KindAuthorized)
	past(1, schemas.KindRequested, schemas.KindAuthorized)
	if _, err := l.Publish(t.Context(), e.Next(&schemas.Failed{Code: schemas.FailInternal}, nil)); err != nil {
		t.Fatal(err)
	}
	past(r.Seq, schemas.KindRequested, schemas.KindAuthorized, schemas.KindFailed)
}
