package bus

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"waybill.dev/schemas"
)

// Events is a batch of the log: every event of First to Last, in order.
type Events struct {
	First, Last uint64
	Events      []schemas.Event
}

// Rewind is the error of whoever takes batches and does not have all that was
// acknowledged: it has lost some, or is another than before. It is given what
// follows After, as far as the log still holds it.
type Rewind struct{ After uint64 }

func (r *Rewind) Error() string { return fmt.Sprintf("only what is before %d is there", r.After+1) }

// batchBytes is what the messages of a batch may have together, headers
// included. A reader holds two of them: the one that is taken and the next.
const batchBytes = 8 << 20

// Batch gives the whole log, in order and without gaps, to take: at most max
// events at a time, fewer when wait has passed or 8 MiB are full. A batch is
// acknowledged when take has returned nil; until then it is given again, after
// a pause, and after a restart. There must be one such puller for each name.
//
// Whenever reading begins, the last event that was acknowledged is given once
// more, so that who takes can find that it does not have it ([Rewind]).
//
// What cannot be decoded is stored as a dead letter and left out of the batch;
// its sequence lies within it.
func (l *Log) Batch(ctx context.Context, name string, max int, wait time.Duration, take func(context.Context, Events) error) error {
	b := batcher{l: l, name: name, max: max, wait: wait, take: take}
	for ctx.Err() == nil {
		if err := b.run(ctx); err != nil && ctx.Err() == nil {
			l.o.Log.Warn("batch reader interrupted, opening it again", "name", name, "error", err)
			pause(ctx, time.Second)
		}
	}
	return nil
}

// batcher is one Batch.
type batcher struct {
	l    *Log
	name string
	max  int
	wait time.Duration
	take func(context.Context, Events) error
}

// fetched is a batch with the message that acknowledges it.
type fetched struct {
	Events
	last       jetstream.Msg
	deliveries uint64 // since the consumer was reset: none may be missing
}

func (b *batcher) run(ctx context.Context) error {
	c, err := b.l.js.CreateOrUpdateConsumer(ctx, events, jetstream.ConsumerConfig{
		Durable: b.name, FilterSubject: "ev.>",
		// Room for the batch that is taken and for the next.
		AckPolicy: jetstream.AckAllPolicy, AckWait: time.Minute, MaxAckPending: 2 * b.max, MaxDeliver: -1,
	})
	if err != nil {
		return err
	}
	last, err := b.l.Last(ctx)
	if err != nil {
		return err
	}
	// A log that has lost its end goes on where it ends now.
	after := min(c.CachedInfo().AckFloor.Stream, last)
	err = b.again(ctx, after)
	for {
		if back := new(Rewind); errors.As(err, &back) {
			b.l.o.Log.Warn("reading the log again from an earlier place", "name", b.name, "after", back.After)
			after, err = back.After, nil
		}
		if err != nil || ctx.Err() != nil {
			return err
		}
		after, err = b.follow(ctx, c, after)
	}
}

// again gives the event that was acknowledged last once more.
func (b *batcher) again(ctx context.Context, floor uint64) error {
	if floor == 0 {
		return nil
	}
	e, err := b.l.Load(ctx, floor)
	switch {
	case errors.Is(err, schemas.ErrNotFound), errors.Is(err, ErrUndecodable):
		return nil // nobody can have it
	case err != nil:
		return err
	}
	return b.give(ctx, Events{First: floor, Last: floor, Events: []schemas.Event{e}}, nil)
}

// follow takes batch after batch of what comes after a sequence, and fetches the
// next one meanwhile. It returns up to where it came, when nothing is being
// fetched any more.
func (b *batcher) follow(ctx context.Context, c jetstream.Consumer, after uint64) (uint64, error) {
	// What a puller that is gone was given and did not acknowledge would come
	// after the AckWait only, and what follows it before: a gap, over which the
	// next acknowledgement would pass.
	if _, err := b.l.js.ResetConsumerToSequence(ctx, events, b.name, after+1); err != nil {
		return after, err
	}
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	type next struct {
		fetched
		err error
	}
	batches := make(chan next)
	go func() {
		defer close(batches)
		at := fetched{Events: Events{Last: after}}
		for ctx.Err() == nil {
			got, err := b.fetch(ctx, c, at)
			at = fetched{Events: Events{Last: got.Last}, deliveries: got.deliveries}
			if got.last == nil && err == nil {
				continue
			}
			select {
			case batches <- next{got, err}:
			case <-ctx.Done():
			}
			if err != nil {
				return
			}
		}
	}()
	var failed error
	for n := range batches {
		if failed != nil {
			continue // it ends
		}
		if failed = n.err; failed == nil {
			failed = b.give(ctx, n.Events, n.last)
		}
		if failed != nil {
			stop()
		} else {
			after = n.Last
		}
	}
	return after, failed
}

// fetch gets the batch that follows another.
func (b *batcher) fetch(ctx context.Context, c jetstream.Consumer, before fetched) (fetched, error) {
	f := fetched{Events: Events{Last: before.Last}, deliveries: before.deliveries}
	got, err := c.Fetch(b.max, jetstream.FetchMaxWait(b.wait), jetstream.FetchMaxBytes(batchBytes))
	if err != nil {
		return f, err
	}
	for m := range got.Messages() {
		e, md, err := decodeMsg(m)
		if md == nil {
			continue
		}
		if f.deliveries++; md.Sequence.Consumer != f.deliveries {
			return f, fmt.Errorf("delivery %d came where %d was due", md.Sequence.Consumer, f.deliveries)
		}
		seq := md.Sequence.Stream
		if seq <= before.Last {
			continue // of the batch before, which is being taken for longer than the AckWait
		}
		if seq <= f.Last {
			return f, fmt.Errorf("sequence %d came after %d", seq, f.Last)
		}
		if f.First == 0 {
			f.First = seq
		}
		f.Last, f.last = seq, m
		if err != nil {
			if err := b.l.bury(ctx, b.name, m, seq, err); err != nil {
				return f, err
			}
			continue
		}
		f.Events.Events = append(f.Events.Events, e)
	}
	if f.last == nil {
		return f, got.Error()
	}
	return f, nil
}

// give has a batch taken, however often that has to be tried, and acknowledges
// it by m, which is nil for what is acknowledged. It returns a [Rewind].
func (b *batcher) give(ctx context.Context, e Events, m jetstream.Msg) error {
	for n := 0; ; n++ {
		err := b.take(ctx, e)
		if err == nil {
			break
		}
		if back := new(Rewind); errors.As(err, &back) {
			return err
		}
		if ctx.Err() != nil {
			return ctx.Err()
		}
		b.l.o.Log.Warn("batch not taken, trying again", "name", b.name, "first", e.First, "last", e.Last, "error", err)
		if !pause(ctx, min(100*time.Millisecond<<min(n, 8), 10*time.Second)) {
			return ctx.Err()
		}
		if m != nil {
			if err := m.InProgress(); err != nil {
				return err
			}
		}
	}
	if m == nil {
		return nil
	}
	if err := m.Ack(); err != nil {
		return fmt.Errorf("acknowledge up to %d: %w", e.Last, err)
	}
	return nil
}
