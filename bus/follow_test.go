package bus_test

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"

	"waybill.dev/bus"
	"waybill.dev/bus/embed"
	"waybill.dev/schemas"
)

// A session's stream has what was stored before it was opened and what comes
// later, each once and in order, however much that is, and nothing of calls or
// of other sessions. It ends when the session is closed.
func TestFollowSession(t *testing.T) {
	w := start(t, embed.Options{})
	a := w.pipeline(permit, complete)
	dispatch := w.open(bus.Options{Role: bus.RoleDispatch})
	mine := request("")
	mine.Call, mine.Root, mine.Edge = "", "", ""
	other := mine
	other.Session = schemas.NewSessionKey("acme", "researcher", "another")
	notify := func(of schemas.Event, n int) {
		t.Helper()
		for _, e := range []schemas.Event{
			of.Next(&schemas.Notified{ID: fmt.Sprint(n)}, []byte("x")),
			other.Next(&schemas.Notified{ID: fmt.Sprint(n)}, []byte("x")),
		} {
			if _, err := dispatch.Publish(t.Context(), e); err != nil {
				t.Fatal(err)
			}
		}
	}
	const before, all = 40, 200
	for n := range before {
		notify(mine, n)
	}
	heard, ended := make(chan string), make(chan error, 1)
	go func() {
		ended <- a.Follow(t.Context(), mine, 0, func(_ context.Context, e schemas.Event) (schemas.Receipt, error) {
			if n, ok := e.Data.(*schemas.Notified); ok && e.Session == mine.Session {
				heard <- n.ID
			} else if e.Kind() != schemas.KindClosed {
				heard <- fmt.Sprintf("%s of %s", e.Kind(), e.Session)
			}
			return schemas.Receipt{}, nil
		})
	}()
	if got := <-heard; got != "0" {
		t.Fatalf("the first is %s", got)
	}
	// The reader does not read on, so that its queue runs over.
	for n := before; n < all; n++ {
		notify(mine, n)
	}
	if _, err := collect(t.Context(), a, request("a call beside")); err != nil {
		t.Fatal(err)
	}
	if _, err := w.open(bus.Options{Role: bus.RoleEdge}).Publish(t.Context(), mine.Next(&schemas.Closed{}, nil)); err != nil {
		t.Fatal(err)
	}
	for n := 1; n < all; n++ {
		if got := <-heard; got != fmt.Sprint(n) {
			t.Fatalf("heard %s, want %d", got, n)
		}
	}
	if err := <-ended; err != nil {
		t.Error(err)
	}
}

// A call is followed from wherever it was left, by whoever comes, and who
// leaves it to itself does not cancel it.
func TestFollowCall(t *testing.T) {
	w := start(t, embed.Options{})
	go2 := make(chan struct{})
	a := w.pipeline(permit, func(ctx context.Context, e schemas.Event, emit schemas.Emit) error {
		for i := range 3 {
			if i == 2 {
				<-go2
			}
			if _, err := emit(ctx, e.Next(&schemas.Progressed{Index: i, By: "me"}, []byte("chunk"))); err != nil {
				return err
			}
		}
		return complete(ctx, e, emit)
	})
	req := request("")
	ctx, leave := context.WithCancelCause(t.Context())
	var asked, second uint64
	err := a.Ask(ctx, req, func(_ context.Context, e schemas.Event) (schemas.Receipt, error) {
		switch p := e.Data.(type) {
		case *schemas.Requested:
			asked = e.Seq
		case *schemas.Progressed:
			if p.Index == 1 {
				second = e.Seq
				leave(schemas.ErrDetached)
			}
		}
		return schemas.Receipt{}, nil
	})
	if !errors.Is(err, context.Canceled) || asked == 0 || second <= asked {
		t.Fatalf("asked at %d, left at %d: %v", asked, second, err)
	}
	other := w.open(bus.Options{Role: bus.RoleEdge}).Asker("another")
	var kinds []schemas.Kind
	close(go2)
	if err := other.Follow(t.Context(), req, second, func(_ context.Context, e schemas.Event) (schemas.Receipt, error) {
		kinds = append(kinds, e.Kind())
		return schemas.Receipt{}, nil
	}); err != nil {
		t.Fatal(err)
	}
	for len(kinds) > 0 && kinds[0] == schemas.KindAuthorized {
		kinds = kinds[1:]
	}
	if want := "[progressed completed]"; fmt.Sprint(kinds) != want {
		t.Errorf("followed %v, want %v", kinds, want)
	}
	log := w.open(bus.Options{Role: bus.RoleObserver})
	latest, err := log.Latest(t.Context(), req.Tenant, req.Session, schemas.KindCompleted)
	if err != nil || latest.Call != req.Call {
		t.Errorf("latest completed: %v, %v", latest.Call, err)
	}
	if _, err := log.Latest(t.Context(), req.Tenant, req.Session, schemas.KindCancel); !errors.Is(err, schemas.ErrNotFound) {
		t.Errorf("a cancel was stored: %v", err)
	}
}

// Clients that come back again and again leave no consumers behind: there is a
// limit to their number, beyond which nobody could read.
func TestFollowLeavesNothing(t *testing.T) {
	w := start(t, embed.Options{})
	l := w.open(bus.Options{Role: bus.RoleEdge})
	req := request("")
	dispatch := w.open(bus.Options{Role: bus.RoleDispatch})
	if _, err := l.Publish(t.Context(), req); err != nil {
		t.Fatal(err)
	}
	if _, err := dispatch.Publish(t.Context(), req.Next(&schemas.Cancelled{}, nil)); err != nil {
		t.Fatal(err)
	}
	for range 5 {
		if err := l.Asker("another").Follow(t.Context(), req, 0, func(context.Context, schemas.Event) (schemas.Receipt, error) {
			return schemas.Receipt{}, nil
		}); err != nil {
			t.Fatal(err)
		}
	}
	nc, err := w.srv.Connect(bus.RoleObserver)
	if err != nil {
		t.Fatal(err)
	}
	defer nc.Close()
	names, err := nc.RequestWithContext(t.Context(), "$JS.API.CONSUMER.NAMES.EVENTS", nil)
	if err != nil || !strings.Contains(string(names.Data), `"total":0`) {
		t.Errorf("left behind: %s, %v", names.Data, err)
	}
}
