package bus_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"waybill.dev/bus"
	"waybill.dev/bus/embed"
	"waybill.dev/schemas"
)

// world is a running server with what a test opens on it.
type world struct {
	t   testing.TB
	srv *embed.Server
}

func start(t testing.TB, o embed.Options) *world {
	t.Helper()
	if o.Dir == "" {
		o.Dir = filepath.Join(t.TempDir(), "log")
	}
	// Not in the time of a test: when a store is opened again, the server's first
	// sync may race with its own beginning (bus/embed, begin).
	o.Sync = time.Minute
	srv, err := embed.Start(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := srv.Close(); err != nil {
			t.Error(err)
		}
	})
	return &world{t, srv}
}

// js is a connection of a role beside the log.
func (w *world) js(role bus.Role) jetstream.JetStream {
	w.t.Helper()
	nc, err := w.srv.Connect(role)
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(nc.Close)
	js, err := jetstream.New(nc)
	if err != nil {
		w.t.Fatal(err)
	}
	return js
}

// open opens the log as a role, with the streams set up.
func (w *world) open(o bus.Options) *bus.Log {
	w.t.Helper()
	o.Dial = w.srv.Connect
	o.Log = slog.New(slog.NewTextHandler(writer{w.t}, &slog.HandlerOptions{Level: slog.LevelWarn}))
	if err := bus.Setup(w.t.Context(), o); err != nil {
		w.t.Fatal(err)
	}
	l, err := bus.Open(w.t.Context(), o)
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(l.Close)
	return l
}

type writer struct{ t testing.TB }

func (w writer) Write(b []byte) (int, error) {
	w.t.Log(strings.TrimSpace(string(b)))
	return len(b), nil
}

// background runs a component until the test ends and waits for it.
func background(t testing.TB, run func(context.Context) error) (stop func()) {
	ctx, cancel := context.WithCancel(context.Background())
	var done sync.WaitGroup
	done.Go(func() {
		if err := run(ctx); err != nil {
			t.Errorf("component: %v", err)
		}
	})
	stop = sync.OnceFunc(func() { cancel(); done.Wait() })
	t.Cleanup(stop)
	return stop
}

func request(body string) schemas.Event {
	call := schemas.NewCallID(time.Now())
	return schemas.Event{
		Tenant: "acme", Session: schemas.NewSessionKey("acme", "researcher", "one"), Agent: "researcher",
		Call: call, Root: call, Body: []byte(body),
		Data: &schemas.Requested{Target: schemas.Target{Protocol: "mcp", Server: "everything", Method: "tools/call", Name: "echo"}},
	}
}

func permit(ctx context.Context, e schemas.Event, emit schemas.Emit) error {
	_, err := emit(ctx, e.Next(&schemas.Authorized{
		Requested: *e.Data.(*schemas.Requested), Decision: schemas.Decision{N: 1, Rule: "all"},
		RequestedSeq: e.Seq, RequestedAt: e.Stored,
	}, e.Body))
	return err
}

func complete(ctx context.Context, e schemas.Event, emit schemas.Emit) error {
	_, err := emit(ctx, e.Next(&schemas.Completed{Status: 200}, e.Body))
	return err
}

// pipeline runs policy, dispatch and an asker; the handlers are the test's.
func (w *world) pipeline(policy, dispatch schemas.Handler) *bus.Asker {
	pol, dis, edge := w.open(bus.Options{Role: bus.RolePolicy}), w.open(bus.Options{Role: bus.RoleDispatch}), w.open(bus.Options{Role: bus.RoleEdge})
	background(w.t, func(ctx context.Context) error {
		return pol.Run(ctx, bus.Work{Name: "policy", Kinds: []schemas.Kind{schemas.KindRequested}}, policy)
	})
	background(w.t, func(ctx context.Context) error {
		return dis.Run(ctx, bus.Work{Name: "dispatch", Kinds: []schemas.Kind{schemas.KindAuthorized}}, dispatch)
	})
	a := edge.Asker("e1")
	ready := make(chan bool, 8)
	background(w.t, func(ctx context.Context) error { return a.Run(ctx, func(up bool) { ready <- up }) })
	<-ready
	return a
}

// collect asks and returns what came back.
func collect(ctx context.Context, a *bus.Asker, e schemas.Event) ([]schemas.Event, error) {
	var got []schemas.Event
	err := a.Ask(ctx, e, func(_ context.Context, e schemas.Event) (schemas.Receipt, error) {
		if e.Kind() != schemas.KindRequested || e.Seq == 0 { // which comes first, as stored
			got = append(got, e)
		}
		return schemas.Receipt{}, nil
	})
	return got, err
}

func TestCallGoesThroughTheLog(t *testing.T) {
	w := start(t, embed.Options{})
	a := w.pipeline(permit, complete)
	req := request(`{"id":9007199254740993}`)
	got, err := collect(t.Context(), a, req)
	if err != nil {
		t.Fatal(err)
	}
	if len(got) != 1 || got[0].Kind() != schemas.KindCompleted || string(got[0].Body) != string(req.Body) {
		t.Fatalf("got %v", got)
	}
	var kinds []schemas.Kind
	for e, err := range w.open(bus.Options{Role: bus.RoleObserver}).Read(t.Context(), bus.Filter{Session: req.Session}, 0) {
		if err != nil {
			t.Fatal(err)
		}
		kinds = append(kinds, e.Kind())
	}
	if want := "[requested authorized completed]"; fmt.Sprint(kinds) != want {
		t.Errorf("log holds %v, want %v", kinds, want)
	}
}

func TestPublishTwiceIsStoredOnce(t *testing.T) {
	w := start(t, embed.Options{})
	var fail atomic.Int32
	l := w.open(bus.Options{Role: bus.RoleEdge, Fault: func(_ schemas.Event, stored bool) error {
		if stored && fail.Add(-1) >= 0 || !stored && fail.Load() == 10 {
			return errors.New("injected")
		}
		return nil
	}})
	e := request("x")
	fail.Store(1) // stored, but reported as failed: the retry meets its own event
	r, err := l.Publish(t.Context(), e)
	if err != nil || !r.Duplicate {
		t.Fatalf("receipt %+v, %v; want a duplicate", r, err)
	}
	again, err := l.Publish(t.Context(), e)
	if err != nil || again.Seq != r.Seq || !again.Duplicate {
		t.Fatalf("receipt %+v, %v; want the first one's sequence %d", again, err, r.Seq)
	}
	if last, err := l.Last(t.Context()); err != nil || last != 1 {
		t.Fatalf("log holds %d events, %v", last, err)
	}
}

func TestRolesMayStoreOnlyTheirKinds(t *testing.T) {
	w := start(t, embed.Options{})
	w.open(bus.Options{Role: bus.RoleEdge})
	req := request("x")
	auth := req.Next(&schemas.Authorized{Decision: schemas.Decision{N: 1}}, nil)
	done := req.Next(&schemas.Completed{}, nil)
	for _, c := range []struct {
		role bus.Role
		e    schemas.Event
		ok   bool
	}{
		{bus.RoleEdge, req, true}, {bus.RoleEdge, auth, false}, {bus.RoleEdge, done, false},
		{bus.RolePolicy, auth, true}, {bus.RolePolicy, done, false},
		{bus.RoleDispatch, done, true}, {bus.RoleDispatch, auth, false},
		{bus.RoleObserver, req, false}, {bus.RoleProject, req, false},
	} {
		ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
		_, err := w.open(bus.Options{Role: c.role}).Publish(ctx, c.e)
		cancel()
		if (err == nil) != c.ok {
			t.Errorf("%s storing %s: error %v", c.role, c.e.Kind(), err)
		}
	}
}

func BenchmarkCall(b *testing.B) {
	for _, n := range []int{1, 32, 256} {
		b.Run(fmt.Sprint("callers=", n), func(b *testing.B) {
			w := start(b, embed.Options{})
			a := w.pipeline(permit, complete)
			body := strings.Repeat("x", 1024)
			b.ReportAllocs()
			b.ResetTimer()
			var left atomic.Int64
			left.Store(int64(b.N))
			var callers sync.WaitGroup
			for range n {
				callers.Go(func() {
					for left.Add(-1) >= 0 {
						if _, err := collect(context.Background(), a, request(body)); err != nil {
							b.Error(err)
							return
						}
					}
				})
			}
			callers.Wait()
		})
	}
}
