package upstream

import (
	"context"
	"encoding/json"
	"fmt"
	"strings"
	"sync"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

// Witness reads the log with a connection of its own and with code of its own:
// nothing of the gateway stands between it and the server. It knows of every
// call when its events were stored.
type Witness struct {
	nc     *nats.Conn
	stream jetstream.Stream
	follow jetstream.ConsumeContext

	mu    sync.Mutex
	seq   uint64                          // read up to here
	more  chan struct{}                   // closed when seq grows
	calls map[string]map[string]time.Time // call → kind → stored; the first of a kind
}

// Watch connects to the log at url, credentials included.
func Watch(url string) (*Witness, error) {
	nc, err := nats.Connect(url)
	if err != nil {
		return nil, err
	}
	w := &Witness{nc: nc, more: make(chan struct{}), calls: map[string]map[string]time.Time{}}
	if err := w.begin(); err != nil {
		nc.Close()
		return nil, err
	}
	return w, nil
}

func (w *Witness) begin() error {
	js, err := jetstream.New(w.nc)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	if w.stream, err = js.Stream(ctx, "EVENTS"); err != nil {
		return err
	}
	all, err := w.stream.OrderedConsumer(ctx, jetstream.OrderedConsumerConfig{})
	if err != nil {
		return err
	}
	w.follow, err = all.Consume(w.note)
	return err
}

// Close ends the connection.
func (w *Witness) Close() {
	w.follow.Stop()
	w.nc.Close()
}

func (w *Witness) note(m jetstream.Msg) {
	md, err := m.Metadata()
	if err != nil {
		return // Check then waits in vain, and says so
	}
	var e struct{ Kind, Call string }
	if err := json.Unmarshal([]byte(m.Headers().Get("Waybill-Event")), &e); err != nil {
		e.Call = ""
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.seq = md.Sequence.Stream
	if kinds := w.calls[e.Call]; kinds == nil {
		w.calls[e.Call] = map[string]time.Time{e.Kind: md.Timestamp}
	} else if _, ok := kinds[e.Kind]; !ok {
		kinds[e.Kind] = md.Timestamp
	}
	close(w.more)
	w.more = make(chan struct{})
}

// Check returns an error unless, at the time, events of the call of all these
// kinds were stored. One of them with bars between ("completed|failed") is
// enough where any will do.
//
// The log's clock is this machine's, so that its word on when counts to the
// microsecond; that the events are to be had, too, is asked as soon as possible.
func (w *Witness) Check(ctx context.Context, call string, at time.Time, want ...string) error {
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	info, err := w.stream.Info(ctx)
	if err != nil {
		return fmt.Errorf("call %s: what does the log hold: %w", call, err)
	}
	for {
		w.mu.Lock()
		seq, more := w.seq, w.more
		w.mu.Unlock()
		if seq >= info.State.LastSeq {
			break
		}
		select {
		case <-more:
		case <-ctx.Done():
			return fmt.Errorf("call %s: read up to %d of %d: %w", call, seq, info.State.LastSeq, ctx.Err())
		}
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, kinds := range want {
		var stored time.Time
		for kind := range strings.SplitSeq(kinds, "|") {
			if t, ok := w.calls[call][kind]; ok {
				stored = t
			}
		}
		switch {
		case stored.IsZero():
			return fmt.Errorf("call %s: no %s in the log, which has %v", call, kinds, w.calls[call])
		case stored.After(at):
			return fmt.Errorf("call %s: %s was stored %s too late", call, kinds, stored.Sub(at))
		}
	}
	return nil
}
