package bus_test

import (
	"context"
	"sync"
	"testing"

	"waybill.dev/bus"
	"waybill.dev/bus/embed"
	"waybill.dev/schemas"
)

// TestShare: each ending is given to one of those who share the name, and what
// was stored while nobody was there to who comes.
func TestShare(t *testing.T) {
	w := start(t, embed.Options{})
	d := w.open(bus.Options{Role: bus.RoleDispatch})
	var mu sync.Mutex
	got := map[schemas.CallID]int{}
	seen := make(chan struct{}, 1000)
	up := make(chan bool, 16)
	reader := func() (stop func()) {
		l := w.open(bus.Options{Role: bus.RoleTraces})
		return background(t, func(ctx context.Context) error {
			return l.Share(ctx, "traces", []schemas.Kind{schemas.KindCompleted, schemas.KindFailed}, func(is bool) { up <- is }, func(e schemas.Event) {
				mu.Lock()
				got[e.Call]++
				mu.Unlock()
				seen <- struct{}{}
			})
		})
	}
	end := func(n int) {
		for range n {
			e := request("")
			if _, err := d.Publish(t.Context(), e.Next(&schemas.Started{Attempt: 1, By: "me"}, nil)); err != nil {
				t.Fatal(err)
			}
			if _, err := d.Publish(t.Context(), e.Next(&schemas.Completed{}, nil)); err != nil {
				t.Fatal(err)
			}
		}
	}
	one, other := reader(), reader()
	<-up
	<-up
	end(50)
	for range 50 {
		<-seen
	}
	one()
	other()
	end(20)
	reader()
	for range 20 {
		<-seen
	}
	mu.Lock()
	defer mu.Unlock()
	if len(got) != 70 {
		t.Errorf("%d calls", len(got))
	}
	for call, n := range got {
		if n != 1 {
			t.Errorf("%s was given %d times", call, n)
		}
	}
}
