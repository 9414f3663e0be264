package bus_test

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats.go"

	"waybill.dev/bus"
	"waybill.dev/bus/embed"
)

// TestOwnAcknowledgement: a receipt is of the event that was published, also
// when others give up while theirs is on its way.
func TestOwnAcknowledgement(t *testing.T) {
	l := start(t, embed.Options{}).open(bus.Options{Role: bus.RoleEdge})
	var wg sync.WaitGroup
	for i := range 32 {
		wg.Go(func() {
			for n := range 50 {
				e := request(fmt.Sprintf("%d-%d", i, n))
				ctx, cancel := context.WithCancel(t.Context())
				gone := make(chan struct{})
				if (i+n)%3 == 0 {
					go func() { cancel(); close(gone) }()
				} else {
					close(gone)
				}
				receipt, err := l.Publish(ctx, e)
				<-gone
				cancel()
				if err != nil {
					if !errors.Is(err, context.Canceled) {
						t.Error(err)
					}
					continue
				}
				stored, err := l.Load(t.Context(), receipt.Seq)
				if err != nil || stored.ID() != e.ID() {
					t.Errorf("the receipt of %s is of %v, %v", e.ID(), stored.Data, err)
				}
			}
		})
	}
	wg.Wait()
}

// TestClosedWhilePublishing: who waits for an acknowledgement does not wait for
// a connection that is closed.
func TestClosedWhilePublishing(t *testing.T) {
	w := start(t, embed.Options{})
	l := w.open(bus.Options{Role: bus.RoleEdge})
	if err := w.srv.Close(); err != nil { // the connection now waits for a server
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() {
		_, err := l.Publish(t.Context(), request("x"))
		done <- err
	}()
	begun := time.Now()
	l.Close()
	if err := <-done; err == nil || !errors.Is(err, nats.ErrConnectionClosed) && !errors.Is(err, nats.ErrDisconnected) {
		t.Errorf("published through a closed connection: %v", err)
	}
	if took := time.Since(begun); took > 4*time.Second {
		t.Errorf("that took %v", took)
	}
}
