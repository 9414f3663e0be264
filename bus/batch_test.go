package bus_test

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"testing"
	"time"

	"github.com/nats-io/nats.go"

	"waybill.dev/bus"
	"waybill.dev/bus/embed"
)

// Batches follow one another without a gap, over readers that go away with a
// batch in their hands and over a restart of the log.
func TestBatch(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "log")
	w := start(t, embed.Options{Dir: dir})
	publish := func(n int) {
		t.Helper()
		edge := w.open(bus.Options{Role: bus.RoleEdge})
		for range n {
			if _, err := edge.Publish(t.Context(), request("x")); err != nil {
				t.Fatal(err)
			}
		}
	}
	// read takes batches until it has read up to last, or one fails; then the
	// reader is gone.
	done := uint64(0) // taken
	read := func(last uint64, take func(bus.Events) error) {
		t.Helper()
		ctx, cancel := context.WithTimeout(t.Context(), patience)
		defer cancel()
		err := w.open(bus.Options{Role: bus.RoleProject}).Batch(ctx, "project", 10, 50*time.Millisecond,
			func(_ context.Context, b bus.Events) error {
				// An acknowledgement may be lost, so a batch may come again.
				if b.First > done+1 || b.Last-b.First+1 != uint64(len(b.Events)) || len(b.Events) > 10 {
					t.Errorf("batch %d to %d of %d events, want it to begin at %d or before", b.First, b.Last, len(b.Events), done+1)
				}
				for i, e := range b.Events {
					if e.Seq != b.First+uint64(i) {
						t.Errorf("event %d of the batch from %d has sequence %d", i, b.First, e.Seq)
					}
				}
				if err := take(b); err != nil {
					cancel()
					return err
				}
				if done = b.Last; done == last {
					cancel()
				}
				return nil
			})
		if err != nil {
			t.Fatal(err)
		}
		if errors.Is(ctx.Err(), context.DeadlineExceeded) {
			t.Fatalf("read up to %d, want %d", done, last)
		}
	}
	all := func(bus.Events) error { return nil }
	gone := func(bus.Events) error { return errors.New("the reader went away") }

	publish(25)
	read(25, all)
	publish(3)
	read(0, gone) // has three events, and room for seven more
	publish(12)
	read(40, all)
	publish(5)
	read(0, gone)
	if err := w.srv.Close(); err != nil {
		t.Fatal(err)
	}
	w = start(t, embed.Options{Dir: dir})
	publish(20)
	read(65, all)
	w.settled("project")
}

// A batch is given again, the same one, until it is taken; what cannot be read
// lies within its batch.
func TestBatchAgain(t *testing.T) {
	w := start(t, embed.Options{})
	edge := w.open(bus.Options{Role: bus.RoleEdge})
	js := w.js(bus.RoleEdge)
	for i := range 7 {
		var err error
		if i == 3 {
			_, err = js.PublishMsg(t.Context(), &nats.Msg{Subject: "ev.acme.s1.requested._", Data: []byte("garbage")})
		} else {
			_, err = edge.Publish(t.Context(), request("x"))
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	var batches []string
	taken := make(chan struct{})
	background(t, func(ctx context.Context) error {
		return w.open(bus.Options{Role: bus.RoleProject}).Batch(ctx, "project", 100, 50*time.Millisecond, func(_ context.Context, b bus.Events) error {
			var seqs []uint64
			for _, e := range b.Events {
				seqs = append(seqs, e.Seq)
			}
			batches = append(batches, fmt.Sprint(b.First, b.Last, seqs))
			if len(batches) == 1 {
				return errors.New("not now")
			}
			if b.Last == 7 {
				close(taken)
			}
			return nil
		})
	})
	select {
	case <-taken:
	case <-time.After(patience):
		t.Fatalf("batches %v", batches)
	}
	if want := "1 7 [1 2 3 5 6 7]"; len(batches) != 2 || batches[0] != want || batches[1] != want {
		t.Errorf("batches %v, want %s twice", batches, want)
	}
	if dead := w.dead(); len(dead) != 1 || string(dead[0].Data) != "garbage" {
		t.Errorf("%d dead letters", len(dead))
	}
}
