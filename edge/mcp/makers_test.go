package mcp

import (
	"context"
	"testing"
	"testing/synctest"
)

// One tenant takes no more than half of the places from the others, and who waits too
// long has taken none.
func TestMakersPlaces(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := newMakers()
		ctx, cancel := context.WithTimeout(t.Context(), findTime)
		defer cancel()
		entered := make(chan func(), 3*findMost)
		for range 2 * findMost {
			go func() {
				if leave, ok := m.enter(ctx, "evil"); ok {
					entered <- leave
				} else {
					leave()
				}
			}()
		}
		synctest.Wait()
		if n := len(entered); n != findMost/2 {
			t.Errorf("one tenant has %d places of %d", n, findMost)
		}
		for range findMost / 2 {
			leave, ok := m.enter(ctx, "acme")
			if !ok {
				t.Error("no place for the other")
			}
			entered <- leave
		}
		<-ctx.Done()
		synctest.Wait()
		for len(entered) > 0 {
			(<-entered)()
		}
		if len(m.places) != 0 || len(m.of["evil"]) != 0 || len(m.of["acme"]) != 0 {
			t.Errorf("%d, %d and %d places are not given back", len(m.places), len(m.of["evil"]), len(m.of["acme"]))
		}
	})
}
