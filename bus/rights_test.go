package bus_test

import (
	"context"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"waybill.dev/bus"
	"waybill.dev/bus/embed"
	"waybill.dev/schemas"
)

// Only its own role can touch a work's consumer: who could acknowledge, pause
// or delete it could make calls vanish.
func TestConsumersAreTheirRoles(t *testing.T) {
	w := start(t, embed.Options{})
	pol := w.open(bus.Options{Role: bus.RolePolicy})
	stop := w.run(pol, bus.Work{Name: "policy", Kinds: []schemas.Kind{schemas.KindRequested}}, permit)
	stop() // the consumer stays
	if _, err := w.open(bus.Options{Role: bus.RoleEdge}).Publish(t.Context(), request("x")); err != nil {
		t.Fatal(err)
	}
	for _, role := range []bus.Role{bus.RoleObserver, bus.RoleEdge, bus.RoleDispatch, bus.RoleProject} {
		nc, err := w.srv.Connect(role, nats.ErrorHandler(func(*nats.Conn, *nats.Subscription, error) {}))
		if err != nil {
			t.Fatal(err)
		}
		defer nc.Close()
		js, err := jetstream.New(nc)
		if err != nil {
			t.Fatal(err)
		}
		for what, try := range map[string]func(context.Context) error{
			"delete": func(ctx context.Context) error { return js.DeleteConsumer(ctx, "EVENTS", "policy") },
			"pause": func(ctx context.Context) error {
				_, err := js.PauseConsumer(ctx, "EVENTS", "policy", time.Now().Add(time.Hour))
				return err
			},
			"reset": func(ctx context.Context) error { _, err := js.ResetConsumer(ctx, "EVENTS", "policy"); return err },
			"change": func(ctx context.Context) error {
				_, err := js.CreateOrUpdateConsumer(ctx, "EVENTS", jetstream.ConsumerConfig{Durable: "policy", FilterSubject: "ev.>", AckPolicy: jetstream.AckExplicitPolicy})
				return err
			},
			"pull": func(ctx context.Context) error {
				_, err := nc.RequestWithContext(ctx, "$JS.API.CONSUMER.MSG.NEXT.EVENTS.policy", []byte(`{"batch":1,"no_wait":true}`))
				return err
			},
			"purge": func(ctx context.Context) error {
				s, err := js.Stream(ctx, "EVENTS")
				if err != nil {
					return nil // wrong: it may read
				}
				return s.Purge(ctx)
			},
		} {
			ctx, cancel := context.WithTimeout(t.Context(), 150*time.Millisecond)
			if err := try(ctx); err == nil {
				t.Errorf("%s can %s", role, what)
			}
			cancel()
		}
	}
	// And the work goes on where it was.
	w.run(pol, bus.Work{Name: "policy", Kinds: []schemas.Kind{schemas.KindRequested}}, permit)
	w.await("authorized", func(e schemas.Event) bool { return e.Kind() == schemas.KindAuthorized })
}

// A message at the server's limit is put aside and its call ends; the work does
// not stop at it.
func TestDeadLetterAtTheLimit(t *testing.T) {
	w := start(t, embed.Options{})
	pol := w.open(bus.Options{Role: bus.RolePolicy, AckWait: 200 * time.Millisecond})
	w.run(pol, bus.Work{Name: "policy", Kinds: []schemas.Kind{schemas.KindRequested}, InFlight: 1}, permit)
	nc, err := w.srv.Connect(bus.RoleEdge)
	if err != nil {
		t.Fatal(err)
	}
	defer nc.Close()
	// Not what Publish would let through: another program's.
	e := request("x")
	m := nats.NewMsg("ev.acme." + string(e.Session) + ".requested._")
	m.Header.Set("Nats-Msg-Id", string(e.ID()))
	m.Header.Set("Waybill-Event", `{"v":99,"call":"`+string(e.Call)+`","pad":"`+strings.Repeat("<", 64<<10-300)+`"}`)
	if _, err := nc.RequestMsg(m, patience); err != nil {
		t.Fatal(err)
	}
	if f, ok := w.ended(e.Call).Data.(*schemas.Failed); !ok || f.Code != schemas.FailUndecodable {
		t.Errorf("ended as %+v", f)
	}
	w.settled("policy")
	if dead := w.dead(); len(dead) != 1 || dead[0].Header.Get("Dead-Sequence") != "1" {
		t.Errorf("%d dead letters", len(dead))
	}
}
