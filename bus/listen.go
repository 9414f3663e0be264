package bus

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"waybill.dev/schemas"
)

// ahead is how many bytes a reader may be sent before it has asked for them: by
// number, large bodies would fill the memory.
const ahead = 16 << 20

// Listen hears the events that fit the filter and are stored after the
// sequence `after` ([Log.Last] for "from now on"). Nothing is missed and nothing comes
// twice while the iteration lasts, over reconnects too. It ends when ctx is
// done. When Listen returns, it hears already.
//
// A message that cannot be decoded is yielded with an error that wraps
// [ErrUndecodable]; the iteration goes on. Any other error is the last.
func (l *Log) Listen(ctx context.Context, f Filter, after uint64) (iter.Seq2[schemas.Event, error], error) {
	c, err := l.ordered(ctx, f, after+1)
	if err != nil {
		return nil, err
	}
	it, err := c.Messages(l.pulling()...)
	if err != nil {
		l.letGo(ctx, c)
		return nil, fmt.Errorf("listen: %w", err)
	}
	return func(yield func(schemas.Event, error) bool) {
		defer l.letGo(ctx, c)
		defer it.Stop()
		defer context.AfterFunc(ctx, it.Stop)()
		for {
			m, err := it.Next()
			switch {
			case err == nil:
			case ctx.Err() != nil:
				return
			case errors.Is(err, jetstream.ErrNoHeartbeat):
				continue // it reconnects by itself and goes on where it was
			default:
				yield(schemas.Event{}, fmt.Errorf("listen: %w", err))
				return
			}
			e, _, err := decodeMsg(m)
			if !yield(e, err) {
				return
			}
		}
	}, nil
}

// pulling is how a reader pulls. In a cluster the node that has the reader's
// consumer may die, which the reader notices by what it does not hear.
func (l *Log) pulling() []jetstream.PullMessagesOpt {
	opts := []jetstream.PullMessagesOpt{jetstream.PullMaxMessagesWithBytesLimit(512, ahead)}
	if l.o.Replicas > 1 {
		opts = append(opts, jetstream.PullExpiry(10*time.Second), jetstream.PullHeartbeat(time.Second))
	}
	return opts
}

// Follow listens until ctx is done and gives each event to take, over every
// interruption; up (may be nil) is told when it hears. An error of take is
// logged: who follows has no way to send an event back.
func (l *Log) Follow(ctx context.Context, f Filter, after uint64, up func(bool), take func(context.Context, schemas.Event) error) error {
	if up == nil {
		up = func(bool) {}
	}
	for {
		heard, err := l.Listen(ctx, f, after)
		if err == nil {
			up(true)
			for e, err := range heard {
				if err == nil {
					err = take(ctx, e)
				}
				if err != nil && ctx.Err() == nil {
					l.o.Log.Error("event not taken, it is in the log", "seq", e.Seq, "error", err)
				}
				after = max(after, e.Seq)
			}
			up(false)
		}
		if ctx.Err() != nil {
			return nil
		}
		l.o.Log.Warn("listening interrupted, reading on", "after", after, "error", err)
		pause(ctx, 250*time.Millisecond)
	}
}

// Floor is the sequence up to which a durable consumer has settled everything;
// 0 when there is no such consumer yet.
func (l *Log) Floor(ctx context.Context, consumer string) (uint64, error) {
	c, err := l.stream.Consumer(ctx, consumer)
	if errors.Is(err, jetstream.ErrConsumerNotFound) {
		return 0, nil
	}
	if err != nil {
		return 0, fmt.Errorf("consumer %s: %w", consumer, err)
	}
	return c.CachedInfo().AckFloor.Stream, nil
}

// Last is the sequence of the newest event.
func (l *Log) Last(ctx context.Context) (uint64, error) {
	info, err := retry(ctx, l, func(ctx context.Context) (*jetstream.StreamInfo, error) { return l.stream.Info(ctx) })
	if err != nil {
		return 0, fmt.Errorf("ask for the newest event: %w", err)
	}
	return info.State.LastSeq, nil
}

// ordered makes an ephemeral consumer from a sequence on.
func (l *Log) ordered(ctx context.Context, f Filter, from uint64) (jetstream.Consumer, error) {
	subjects, err := f.subjects()
	if err != nil {
		return nil, err
	}
	c, err := retry(ctx, l, func(ctx context.Context) (jetstream.Consumer, error) {
		return l.stream.OrderedConsumer(ctx, jetstream.OrderedConsumerConfig{
			FilterSubjects:    subjects,
			DeliverPolicy:     jetstream.DeliverByStartSequencePolicy,
			OptStartSeq:       max(from, 1),
			InactiveThreshold: 30 * time.Second,
		})
	})
	if err != nil {
		return nil, fmt.Errorf("read the log: %w", err)
	}
	return c, nil
}

// letGo deletes the consumer of a reader. It would go by itself after a while,
// but there may be no more than so many, which clients that come back again and
// again would reach.
func (l *Log) letGo(ctx context.Context, c jetstream.Consumer) {
	now := c.CachedInfo()
	if now == nil || !l.nc.IsConnected() { // it is being made anew; nobody can be told
		return
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 2*time.Second)
	defer cancel()
	if err := l.js.DeleteConsumer(ctx, now.Stream, now.Name); err != nil {
		l.o.Log.Debug("reader's consumer is left to expire", "error", err)
	}
}
