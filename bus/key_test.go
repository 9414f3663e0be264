package bus_test

import (
	"bytes"
	"context"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"waybill.dev/bus"
	"waybill.dev/bus/embed"
)

// Whoever asks for a key has the same, and nobody else can read it.
func TestKey(t *testing.T) {
	w := start(t, embed.Options{})
	a := w.open(bus.Options{Role: bus.RoleDispatch, Leases: true})
	b := w.open(bus.Options{Role: bus.RoleDispatch, Leases: true})
	got := make(chan []byte, 16)
	for i := range cap(got) {
		l := a
		if i%2 == 0 {
			l = b
		}
		go func() {
			k, err := l.Key(t.Context(), "state", 32)
			if err != nil {
				t.Error(err)
			}
			got <- k
		}()
	}
	first := <-got
	for range cap(got) - 1 {
		if k := <-got; !bytes.Equal(k, first) {
			t.Errorf("two keys: %x and %x", k, first)
		}
	}
	if len(first) != 32 || bytes.Equal(first, make([]byte, 32)) {
		t.Errorf("the key is %x", first)
	}
	if k, err := a.Key(t.Context(), "state", 16); err == nil {
		t.Errorf("a key of another size: %x", k)
	}
	for _, role := range []bus.Role{bus.RoleEdge, bus.RolePolicy, bus.RoleProject, bus.RoleObserver} {
		nc, err := w.srv.Connect(role, nats.ErrorHandler(func(*nats.Conn, *nats.Subscription, error) {}))
		if err != nil {
			t.Fatal(err)
		}
		js, err := jetstream.New(nc)
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
		if s, err := js.Stream(ctx, "KEYS"); err == nil {
			if m, err := s.GetLastMsgForSubject(ctx, "key.state"); err == nil {
				t.Errorf("%s reads the key: %x", role, m.Data)
			}
			if c, err := s.OrderedConsumer(ctx, jetstream.OrderedConsumerConfig{}); err == nil {
				if m, err := c.Next(jetstream.FetchMaxWait(200 * time.Millisecond)); err == nil {
					t.Errorf("%s reads the key: %x", role, m.Data())
				}
			}
		}
		cancel()
		nc.Close()
	}
}
