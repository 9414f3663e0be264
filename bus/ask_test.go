package bus_test

import (
	"context"
	"errors"
	"strings"
	"sync"
	"testing"
	"time"

	"waybill.dev/bus"
	"waybill.dev/bus/embed"
	"waybill.dev/schemas"
)

// A caller that does not read holds up nobody, and gets all that it missed.
func TestSlowReader(t *testing.T) {
	const chunks = 400
	w := start(t, embed.Options{})
	slow := request("slow")
	a := w.pipeline(permit, func(ctx context.Context, e schemas.Event, emit schemas.Emit) error {
		if e.Call == slow.Call {
			for i := range chunks {
				if _, err := emit(ctx, e.Next(&schemas.Progressed{Index: i, By: "me"}, []byte("chunk"))); err != nil {
					return err
				}
			}
		}
		return complete(ctx, e, emit)
	})
	begun, read := make(chan struct{}), make(chan struct{})
	var got []schemas.Event
	var asked error
	var asker sync.WaitGroup
	asker.Go(func() {
		asked = a.Ask(t.Context(), slow, func(_ context.Context, e schemas.Event) (schemas.Receipt, error) {
			if e.Kind() == schemas.KindRequested {
				return schemas.Receipt{}, nil
			}
			if len(got) == 0 {
				close(begun)
				<-read
			}
			got = append(got, e)
			return schemas.Receipt{}, nil
		})
	})
	<-begun
	for range 50 {
		if others, err := collect(t.Context(), a, request("quick")); err != nil || len(others) != 1 {
			t.Errorf("beside a reader that does not read: %d events, %v", len(others), err)
		}
	}
	w.ended(slow.Call) // all of it is in the log
	close(read)
	asker.Wait()
	if asked != nil || len(got) != chunks+1 {
		t.Fatalf("%d events, want %d; %v", len(got), chunks+1, asked)
	}
	for i, e := range got[:chunks] {
		if p, ok := e.Data.(*schemas.Progressed); !ok || p.Index != i {
			t.Fatalf("event %d is %s %+v", i, e.Kind(), e.Data)
		}
	}
	if last := got[chunks]; last.Kind() != schemas.KindCompleted {
		t.Errorf("the last is %s", last.Kind())
	}
	if n := a.Waiting(); n != 0 {
		t.Errorf("%d calls are followed still", n)
	}
}

// Who leaves wishes for the call's end, and the wish is stored.
func TestLeavingCancels(t *testing.T) {
	w := start(t, embed.Options{})
	a := w.pipeline(func(ctx context.Context, e schemas.Event, emit schemas.Emit) error {
		_, err := emit(ctx, e.Next(&schemas.Held{Decision: schemas.Decision{N: 1}}, nil))
		return err
	}, complete)
	left := errors.New("the client went home")
	ctx, leave := context.WithCancelCause(t.Context())
	e := request("x")
	err := a.Ask(ctx, e, func(_ context.Context, e schemas.Event) (schemas.Receipt, error) {
		leave(left)
		return schemas.Receipt{}, nil
	})
	if !errors.Is(err, context.Canceled) {
		t.Errorf("left, and Ask returned %v", err)
	}
	c := w.await("a wish", func(c schemas.Event) bool { return c.Call == e.Call && c.Kind() == schemas.KindCancel })
	if got := c.Data.(*schemas.Cancel).Reason; got != left.Error() {
		t.Errorf("the wish's reason is %q", got)
	}
}

// While a guarded reader is so far behind that events would age out unread, no
// call is taken; when it has caught up, they are.
func TestOverloaded(t *testing.T) {
	w := start(t, embed.Options{})
	o := bus.Options{Role: bus.RoleEdge, MaxBytes: 1 << 20, Guard: []string{"project"}}
	edge := w.open(o)
	o.Role = bus.RolePolicy
	pol := w.open(o)
	o.Role = bus.RoleProject
	project := w.open(o)
	w.run(pol, requests, func(ctx context.Context, e schemas.Event, emit schemas.Emit) error {
		_, err := emit(ctx, e.Next(&schemas.Denied{Decision: schemas.Decision{N: 1}}, nil))
		return err
	})
	a := edge.Asker("e1")
	up := make(chan bool, 8)
	background(t, func(ctx context.Context) error { return a.Run(ctx, func(is bool) { up <- is }) })
	<-up
	background(t, func(ctx context.Context) error { return edge.Watch(ctx, 5*time.Millisecond) })

	// It stops at the first batch.
	first, goOn := make(chan struct{}), make(chan struct{})
	seen := map[schemas.EventID]bool{}
	var mu sync.Mutex
	background(t, func(ctx context.Context) error {
		return project.Batch(ctx, "project", 100, 50*time.Millisecond, func(ctx context.Context, b bus.Events) error {
			if b.First == 1 {
				close(first)
				<-goOn
			}
			mu.Lock()
			defer mu.Unlock()
			for _, e := range b.Events {
				seen[e.ID()] = true
			}
			return nil
		})
	})

	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	body := strings.Repeat("x", 10<<10)
	taken := 0
	var err error
	for ; err == nil && ctx.Err() == nil; taken++ {
		if _, err = collect(ctx, a, request(body)); taken == 0 {
			<-first
		}
		// As fast as the watch looks, which bounds what comes in between.
		if err == nil {
			<-time.After(10 * time.Millisecond)
		}
	}
	if !errors.Is(err, schemas.ErrOverloaded) || !strings.Contains(err.Error(), "project") {
		t.Fatalf("after %d calls: %v, want overloaded", taken, err)
	}
	s, err := edge.Status(ctx)
	if err != nil || s.Refusing == "" || s.FirstSeq != 1 {
		t.Errorf("status %+v, %v: want refusing, and nothing aged out", s, err)
	}
	close(goOn)
	for err = schemas.ErrOverloaded; errors.Is(err, schemas.ErrOverloaded) && ctx.Err() == nil; {
		_, err = collect(ctx, a, request("after"))
	}
	if err != nil {
		t.Fatalf("after the reader caught up: %v", err)
	}
	w.settled("project")
	mu.Lock()
	defer mu.Unlock()
	for e, err := range edge.Read(t.Context(), bus.Filter{}, 0) {
		if err != nil || !seen[e.ID()] {
			t.Errorf("event %d was not read: %v", e.Seq, err)
		}
	}
	t.Logf("%d calls were taken before, of %d KB; the log holds %d KB", taken-1, len(body)>>10, s.Bytes>>10)
}
