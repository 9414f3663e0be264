package bus_test

import (
	"context"
	"errors"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"waybill.dev/bus"
	"waybill.dev/bus/embed"
)

// owner is a process with leases.
type owner struct {
	*bus.Leases
	alive chan bool
	dead  chan string
	stop  func()
}

func (w *world) owner(name string) *owner {
	w.t.Helper()
	l := w.open(bus.Options{Role: bus.RoleDispatch, Leases: true, LeaseTTL: 2 * time.Second})
	leases, err := l.Leases(w.t.Context(), name)
	if err != nil {
		w.t.Fatal(err)
	}
	o := &owner{Leases: leases, alive: make(chan bool, 16), dead: make(chan string, 16)}
	o.stop = background(w.t, func(ctx context.Context) error {
		return o.Run(ctx, func(b bool) { o.alive <- b }, func(_ context.Context, name string) { o.dead <- name })
	})
	if !<-o.alive {
		w.t.Fatal(name, "does not live")
	}
	return o
}

func (w *world) acquires(o *owner, key, want string) {
	w.t.Helper()
	if got, err := o.Acquire(w.t.Context(), key); err != nil || got != want {
		w.t.Errorf("%s acquires %s: it is %q's, %v; want %q", o.Name(), key, got, err, want)
	}
}

// What one process owns no other can, until it is released or its owner gone.
func TestLeases(t *testing.T) {
	w := start(t, embed.Options{})
	a, b := w.owner("a"), w.owner("b")
	w.acquires(a, "g.acme.s1.files", "a")
	w.acquires(b, "g.acme.s1.files", "a")
	w.acquires(a, "g.acme.s1.files", "a") // again
	w.acquires(b, "g.acme.s2.files", "b")
	if err := a.Release(t.Context(), "g.acme.s1.files"); err != nil {
		t.Fatal(err)
	}
	w.acquires(b, "g.acme.s1.files", "b")
	w.acquires(a, "g.acme.s1.files", "b")
	w.acquires(a, "g.acme.s3.files", "a")
	if keys, err := a.Owned(t.Context(), "b"); len(keys) != 2 || err != nil {
		t.Errorf("b owns %v: %v", keys, err)
	}
	// What is another's, or nobody's, is not given up.
	for _, key := range []string{"g.acme.s3.files", "g.acme.s5.files"} {
		if err := b.Release(t.Context(), key); err != nil {
			t.Error(err)
		}
	}
	w.acquires(b, "g.acme.s3.files", "a")
	gone := b.Gone("a")
	a.stop()
	if a.Holds() {
		t.Error("who has said good-bye still owns")
	}
	if _, err := a.Acquire(t.Context(), "g.acme.s4.files"); !errors.Is(err, bus.ErrNotHeld) {
		t.Errorf("who has said good-bye acquires: %v", err)
	}
	select {
	case <-gone:
	case <-time.After(patience):
		t.Fatal("nobody hears that a is gone")
	}
	if name := <-b.dead; name != "a" {
		t.Errorf("%s died", name)
	}
	w.acquires(b, "g.acme.s3.files", "b")
	// Who comes later finds what the dead own.
	b.stop()
	c := w.owner("c")
	if name := <-c.dead; name != "b" {
		t.Errorf("%s died", name)
	}
}

// What comes of one death takes long: this process lives on meanwhile, and hears
// of others.
func TestLeasesLongMourning(t *testing.T) {
	w := start(t, embed.Options{})
	l := w.open(bus.Options{Role: bus.RoleDispatch, Leases: true, LeaseTTL: time.Second})
	leases, err := l.Leases(t.Context(), "z")
	if err != nil {
		t.Fatal(err)
	}
	alive, dead, letGo := make(chan bool, 16), make(chan string, 16), make(chan struct{})
	background(t, func(ctx context.Context) error {
		return leases.Run(ctx, func(b bool) { alive <- b }, func(_ context.Context, name string) { dead <- name; <-letGo })
	})
	if !<-alive {
		t.Fatal("it does not live")
	}
	a, b := w.owner("a"), w.owner("b")
	gone := []<-chan struct{}{leases.Gone("a"), leases.Gone("b")}
	a.stop()
	if name := <-dead; name != "a" {
		t.Errorf("%s died", name)
	}
	b.stop()
	for _, gone := range gone {
		select {
		case <-gone:
		case <-time.After(patience):
			t.Fatal("nobody hears that it is gone")
		}
	}
	if !leases.Holds() || len(alive) > 0 {
		t.Error("it has lost its leases")
	}
	close(letGo)
	if name := <-dead; name != "b" {
		t.Errorf("%s died", name)
	}
}

// A process that cannot reach the log takes itself for dead before the others do.
func TestLeasesLapse(t *testing.T) {
	w := start(t, embed.Options{})
	var cut []*nats.Conn
	l, err := bus.Open(t.Context(), bus.Options{
		Role: bus.RoleDispatch, LeaseTTL: 2 * time.Second,
		Dial: func(r bus.Role, opts ...nats.Option) (*nats.Conn, error) {
			w.open(bus.Options{Role: r, Leases: true})
			nc, err := w.srv.Connect(r, opts...)
			cut = append(cut, nc)
			return nc, err
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	leases, err := l.Leases(t.Context(), "a")
	if err != nil {
		t.Fatal(err)
	}
	alive := make(chan bool, 16)
	background(t, func(ctx context.Context) error {
		return leases.Run(ctx, func(b bool) { alive <- b }, func(context.Context, string) {})
	})
	<-alive
	if got, err := leases.Acquire(t.Context(), "k"); got != "a" || err != nil {
		t.Fatal(got, err)
	}
	b := w.owner("b")
	gone := b.Gone("a")
	cut[0].Close()
	at := time.Now()
	for <-alive {
	}
	lapsed := time.Since(at)
	select {
	case <-gone:
		t.Logf("a took itself for dead after %s, the others after %s", lapsed, time.Since(at))
	case <-time.After(patience):
		t.Fatal("nobody notices")
	}
	if leases.Holds() || lapsed >= time.Since(at) {
		t.Errorf("it took itself for dead after %s, the others after %s", lapsed, time.Since(at))
	}
	w.acquires(b, "k", "b")
}

// A process that stands still for longer than it may, as a machine that is paused, is
// told that it has lost its leases before it has them again; and what it owned and no
// other has taken is its own by a new word only.
func TestLeasesStandstill(t *testing.T) {
	w := start(t, embed.Options{})
	l := w.open(bus.Options{Role: bus.RoleDispatch, Leases: true, LeaseTTL: 2 * time.Second})
	leases, err := l.Leases(t.Context(), "a")
	if err != nil {
		t.Fatal(err)
	}
	alive, goOn := make(chan bool, 16), make(chan struct{})
	background(t, func(ctx context.Context) error {
		return leases.Run(ctx, func(b bool) {
			alive <- b
			<-goOn // no beat meanwhile
		}, func(context.Context, string) {})
	})
	if !<-alive {
		t.Fatal("it does not live")
	}
	a := &owner{Leases: leases}
	w.acquires(a, "k1", "a")
	w.acquires(a, "k2", "a")
	b := w.owner("b")
	gone := b.Gone("a")
	select {
	case <-gone:
	case <-time.After(patience):
		t.Fatal("nobody notices")
	}
	w.acquires(b, "k1", "b")
	close(goOn)
	if <-alive {
		t.Fatal("it has its leases again and was not told that it had lost them")
	}
	if !<-alive {
		t.Fatal("it does not live again")
	}
	w.acquires(a, "k1", "b")
	w.acquires(a, "k2", "a")
	w.acquires(b, "k2", "a")
}

// Only dispatch owns anything.
func TestLeasesAreDispatchs(t *testing.T) {
	w := start(t, embed.Options{})
	w.owner("a")
	for _, role := range bus.Roles() {
		if role == bus.RoleAdmin || role == bus.RoleDispatch {
			continue
		}
		nc, err := w.srv.Connect(role, nats.ErrorHandler(func(*nats.Conn, *nats.Subscription, error) {}))
		if err != nil {
			t.Fatal(err)
		}
		defer nc.Close()
		js, err := jetstream.New(nc)
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithTimeout(t.Context(), 150*time.Millisecond)
		if _, err := js.Publish(ctx, "$KV.OWNERS.own.k", []byte("x")); err == nil {
			t.Errorf("%s can own", role)
		}
		cancel()
	}
}

// What it costs to own something: a write when it is acquired, a reading and a write
// when it is released, and nothing between.
func BenchmarkLease(b *testing.B) {
	w := start(b, embed.Options{})
	o := w.owner("a")
	for b.Loop() {
		if _, err := o.Acquire(b.Context(), "k"); err != nil {
			b.Fatal(err)
		}
		if err := o.Release(b.Context(), "k"); err != nil {
			b.Fatal(err)
		}
	}
}
