package bus_test

import (
	"context"
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go"

	"waybill.dev/bus"
	"waybill.dev/bus/embed"
	"waybill.dev/schemas"
)

// becomes waits until something is so.
func becomes(t *testing.T, what string, is func() bool) {
	t.Helper()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for begun := time.Now(); !is(); <-tick.C {
		if time.Since(begun) > patience {
			t.Fatalf("not within %s: %s", patience, what)
		}
	}
}

// What a guarded reader has not read does not age out, also over a restart, and
// does when it is read.
func TestNothingUnreadAgesOut(t *testing.T) {
	const age = 3 * time.Second
	w := start(t, embed.Options{})
	o := bus.Options{Role: bus.RoleEdge, MaxAge: age, Guard: []string{"project"}}
	edge := w.open(o)
	background(t, func(ctx context.Context) error { return edge.Watch(ctx, 5*time.Millisecond) })
	status := func() bus.Status {
		t.Helper()
		s, err := edge.Status(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	for range 5 {
		if _, err := edge.Publish(t.Context(), request("x")); err != nil {
			t.Fatal(err)
		}
	}
	stored := time.Now()
	becomes(t, "aging is suspended", func() bool { return status().MaxAge == 0 })
	becomes(t, "the events are old", func() bool { return time.Since(stored) > 2*age })
	if s := status(); s.Events != 5 || s.FirstSeq != 1 {
		t.Fatalf("%+v, want all events", s)
	}
	o.Dial = w.srv.Connect
	if err := bus.Setup(t.Context(), o); err != nil { // as the next start does
		t.Fatal(err)
	}
	if s := status(); s.Events != 5 || s.MaxAge != 0 {
		t.Fatalf("%+v after another start, want all events", s)
	}
	o.Role = bus.RoleProject
	background(t, func(ctx context.Context) error {
		return w.open(o).Batch(ctx, "project", 10, 50*time.Millisecond, func(context.Context, bus.Events) error { return nil })
	})
	becomes(t, "events age out again", func() bool { s := status(); return s.MaxAge == age && s.Events == 0 })
}

// Where the server's settings are not ours to change, calls are refused before
// what is unread ages out.
func TestRefusedBeforeAgingOut(t *testing.T) {
	w := start(t, embed.Options{})
	edge := w.open(bus.Options{Role: bus.RoleEdge, MaxAge: time.Minute, Guard: []string{"project"}})
	if _, err := edge.Publish(t.Context(), request("x")); err != nil {
		t.Fatal(err)
	}
	stored := time.Now()
	refused, err := bus.Open(t.Context(), bus.Options{
		Role: bus.RoleEdge, MaxAge: time.Second, Guard: []string{"project"},
		Dial: func(r bus.Role, opts ...nats.Option) (*nats.Conn, error) {
			if r == bus.RoleAdmin {
				return nil, errors.New("not yours")
			}
			return w.srv.Connect(r, opts...)
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	defer refused.Close()
	background(t, func(ctx context.Context) error { return refused.Watch(ctx, 5*time.Millisecond) })
	becomes(t, "calls are refused", func() bool {
		s, err := refused.Status(t.Context())
		return err == nil && strings.Contains(s.Refusing, "dropped")
	})
	if took := time.Since(stored); took < 700*time.Millisecond {
		t.Errorf("refused after %s", took)
	}
}

// A few large events that are unread, behind many small ones that are read, are
// noticed before they are dropped.
func TestLargeUnread(t *testing.T) {
	w := start(t, embed.Options{})
	o := bus.Options{Role: bus.RoleEdge, MaxBytes: 32 << 20, Guard: []string{"project"}}
	edge := w.open(o)
	o.Role = bus.RoleProject
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	for range 5000 {
		if _, err := edge.Publish(t.Context(), request("x")); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.open(o).Batch(ctx, "project", 5000, 50*time.Millisecond, func(_ context.Context, b bus.Events) error {
		if b.Last == 5000 {
			stop()
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	background(t, func(ctx context.Context) error { return edge.Watch(ctx, 5*time.Millisecond) })
	body := strings.Repeat("x", 2<<20)
	for range 14 { // 80 % of 32 MiB are 13
		if _, err := edge.Publish(t.Context(), request(body)); err != nil {
			t.Fatal(err)
		}
	}
	becomes(t, "calls are refused", func() bool {
		s, err := edge.Status(t.Context())
		return err == nil && strings.Contains(s.Refusing, "behind")
	})
	gone, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := collect(gone, edge.Asker("e1"), request("y")); !errors.Is(err, schemas.ErrOverloaded) {
		t.Errorf("%v, want overloaded", err)
	}
}

// A reader that has less than it acknowledged is given the log again from there;
// one that has it all is shown the last event once more.
func TestBatchRewinds(t *testing.T) {
	w := start(t, embed.Options{})
	edge := w.open(bus.Options{Role: bus.RoleEdge})
	for range 20 {
		if _, err := edge.Publish(t.Context(), request("x")); err != nil {
			t.Fatal(err)
		}
	}
	read := func(take func(bus.Events) error, until uint64) {
		t.Helper()
		ctx, cancel := context.WithTimeout(t.Context(), patience)
		defer cancel()
		if err := w.open(bus.Options{Role: bus.RoleProject}).Batch(ctx, "project", 6, 50*time.Millisecond, func(_ context.Context, b bus.Events) error {
			err := take(b)
			if err == nil && b.Last == until {
				cancel()
			}
			return err
		}); err != nil || !errors.Is(ctx.Err(), context.Canceled) {
			t.Fatalf("%v, %v", err, ctx.Err())
		}
	}
	has := uint64(0)
	take := func(b bus.Events) error {
		if b.First > has+1 {
			return &bus.Rewind{After: has}
		}
		has = max(has, b.Last)
		return nil
	}
	read(take, 20)
	has = 7 // it lost what it had
	var first []uint64
	read(func(b bus.Events) error { first = append(first, b.First); return take(b) }, 20)
	if len(first) < 2 || first[0] != 20 || first[1] != 8 {
		t.Errorf("batches that begin at %v, want the last and then 8", first)
	}
	first = nil
	read(func(b bus.Events) error { first = append(first, b.First); return take(b) }, 20)
	if len(first) != 1 || first[0] != 20 {
		t.Errorf("batches that begin at %v, want the last once more", first)
	}

	// It loses some in the middle of it.
	for range 30 {
		if _, err := edge.Publish(t.Context(), request("x")); err != nil {
			t.Fatal(err)
		}
	}
	lost := false
	read(func(b bus.Events) error {
		if b.Last > 40 && !lost {
			has, lost = 3, true
		}
		return take(b)
	}, 50)
	if has != 50 || !lost {
		t.Errorf("read up to %d", has)
	}
	js := w.js(bus.RoleAdmin)
	c, err := js.Consumer(t.Context(), "EVENTS", "project")
	if err != nil {
		t.Fatal(err)
	}
	becomes(t, "all is acknowledged", func() bool {
		info, err := c.Info(t.Context())
		return err == nil && info.AckFloor.Stream == 50 && info.NumPending == 0 && info.NumAckPending == 0
	})
}
