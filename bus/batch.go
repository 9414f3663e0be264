package bus

import (
	"context"
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

// batchBytes is what the messages of a batch may have together, headers
// included; what a reader holds while what it writes to is away.
const batchBytes = 16 << 20

// Batch gives the whole log, in order and without gaps, to take: at most max
// events at a time, fewer when wait has passed or 16 MiB are full. A batch is acknowledged when
// take has returned nil; until then it is given again, after a pause, and
// after a restart. There must be one such puller for each name.
//
// What cannot be decoded is stored as a dead letter and left out of the batch;
// its sequence lies within it.
func (l *Log) Batch(ctx context.Context, name string, max int, wait time.Duration, take func(context.Context, Events) error) error {
	for ctx.Err() == nil {
		if err := l.batches(ctx, name, max, wait, take); err != nil && ctx.Err() == nil {
			l.o.Log.Warn("batch reader interrupted, opening it again", "name", name, "error", err)
			pause(ctx, time.Second)
		}
	}
	return nil
}

func (l *Log) batches(ctx context.Context, name string, max int, wait time.Duration, take func(context.Context, Events) error) error {
	c, err := l.js.CreateOrUpdateConsumer(ctx, events, jetstream.ConsumerConfig{
		Durable: name, FilterSubject: "ev.>",
		AckPolicy: jetstream.AckAllPolicy, AckWait: time.Minute, MaxAckPending: max, MaxDeliver: -1,
	})
	if err != nil {
		return err
	}
	// What a puller that is gone was given and did not acknowledge would come
	// after the AckWait only, and what follows it before: a gap, over which the
	// next acknowledgement would pass.
	if _, err := l.js.ResetConsumer(ctx, events, name); err != nil {
		return err
	}
	for ctx.Err() == nil {
		got, err := c.Fetch(max, jetstream.FetchMaxWait(wait), jetstream.FetchMaxBytes(batchBytes))
		if err != nil {
			return err
		}
		var b Events
		var last jetstream.Msg
		for m := range got.Messages() {
			e, md, err := decodeMsg(m)
			if md == nil {
				continue
			}
			if md.Sequence.Stream <= b.Last {
				return fmt.Errorf("sequence %d came after %d", md.Sequence.Stream, b.Last)
			}
			if b.First == 0 {
				b.First = md.Sequence.Stream
			}
			b.Last, last = md.Sequence.Stream, m
			if err != nil {
				if err := l.bury(ctx, name, m, md.Sequence.Stream, err); err != nil {
					return err
				}
				continue
			}
			b.Events = append(b.Events, e)
		}
		if last == nil {
			if err := got.Error(); err != nil {
				return err
			}
			continue
		}
		for n := 0; ; n++ {
			err := take(ctx, b)
			if err == nil {
				break
			}
			l.o.Log.Warn("batch not taken, trying again", "name", name, "first", b.First, "last", b.Last, "error", err)
			if !pause(ctx, min(100*time.Millisecond<<min(n, 8), 10*time.Second)) {
				return nil
			}
			if err := last.InProgress(); err != nil {
				return err
			}
		}
		if err := last.Ack(); err != nil {
			return fmt.Errorf("acknowledge up to %d: %w", b.Last, err)
		}
	}
	return nil
}
