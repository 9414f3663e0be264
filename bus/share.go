package bus

import (
	"context"
	"errors"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"waybill.dev/schemas"
)

// shareFor is how long after nobody has read them the events of a share are
// still kept for who comes.
const shareFor = time.Hour

// Share gives each event of these kinds, from now on, to one of the processes
// that share the name, in no order, and at most once: what a process was given
// when it dies is gone. It is for what may be lost, and costs the log no
// acknowledgement. It blocks until ctx is done; up (may be nil) is told when it
// reads. take must not block.
func (l *Log) Share(ctx context.Context, name string, kinds []schemas.Kind, up func(bool), take func(schemas.Event)) error {
	if up == nil {
		up = func(bool) {}
	}
	for ctx.Err() == nil {
		if err := l.share(ctx, name, kinds, up, take); err != nil && ctx.Err() == nil {
			l.o.Log.Warn("shared reading interrupted, opening it again", "name", name, "error", err)
			pause(ctx, time.Second)
		}
	}
	return nil
}

func (l *Log) share(ctx context.Context, name string, kinds []schemas.Kind, up func(bool), take func(schemas.Event)) error {
	subjects, err := Filter{Kinds: kinds}.subjects()
	if err != nil {
		return err
	}
	c, err := l.js.CreateOrUpdateConsumer(ctx, events, jetstream.ConsumerConfig{
		Durable: name, FilterSubjects: subjects, DeliverPolicy: jetstream.DeliverNewPolicy,
		AckPolicy: jetstream.AckNonePolicy, InactiveThreshold: shareFor,
	})
	if err != nil {
		return err
	}
	it, err := c.Messages(l.pulling()...)
	if err != nil {
		return err
	}
	defer it.Stop()
	defer context.AfterFunc(ctx, it.Stop)()
	up(true)
	defer up(false)
	for {
		m, err := it.Next()
		switch {
		case err == nil:
		case ctx.Err() != nil || errors.Is(err, jetstream.ErrMsgIteratorClosed):
			return nil
		case errors.Is(err, jetstream.ErrNoHeartbeat) && l.nc.IsConnected():
			continue
		default:
			return err
		}
		if e, _, err := decodeMsg(m); err == nil {
			take(e)
		}
	}
}
