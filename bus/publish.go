package bus

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"strconv"
	"time"

	"github.com/cenkalti/backoff/v4"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"waybill.dev/schemas"
)

// publishFor bounds how long one event is tried again. It is longer than the
// election of a new leader takes.
const publishFor = 15 * time.Second

// Publish stores an event and returns when the log has acknowledged it. It is
// a [schemas.Emit]: what may pass is retried with the same ID, which makes the
// repetition vanish if the first try was stored after all. It returns
// [schemas.ErrTooLarge], [schemas.ErrInvalid], or [schemas.ErrOverloaded] when
// the log has not taken the event; after any other error it may have.
func (l *Log) Publish(ctx context.Context, e schemas.Event) (schemas.Receipt, error) {
	return l.publish(ctx, e, nil)
}

// PublishLast is Publish if the newest event of e's session is the one with the
// sequence last; else it stores nothing and returns [ErrOvertaken].
func (l *Log) PublishLast(ctx context.Context, e schemas.Event, last uint64) (schemas.Receipt, error) {
	of, err := Filter{Tenant: e.Tenant, Session: e.Session}.subjects()
	if err != nil {
		return schemas.Receipt{}, err
	}
	receipt, err := l.publish(ctx, e, nats.Header{
		jetstream.ExpectedLastSubjSeqHeader:     {strconv.FormatUint(last, 10)},
		jetstream.ExpectedLastSubjSeqSubjHeader: {of[0]},
	})
	if overtaken(err) {
		err = fmt.Errorf("store %s: %w", e.ID(), ErrOvertaken)
	}
	return receipt, err
}

func (l *Log) publish(ctx context.Context, e schemas.Event, header nats.Header) (schemas.Receipt, error) {
	if e.Time.IsZero() {
		e.Time = time.Now().UTC()
	}
	msg, err := encode(e)
	if err != nil {
		return schemas.Receipt{}, fmt.Errorf("store %s: %w", idOf(e), err)
	}
	maps.Copy(msg.Header, header)
	var ack *jetstream.PubAck
	stored := false // perhaps
	try := func() error {
		if l.o.Fault != nil {
			if err := l.o.Fault(e, false); err != nil {
				return err
			}
		}
		var err error
		ack, err = l.acks.publish(ctx, msg)
		if err == nil && l.o.Fault != nil {
			err = l.o.Fault(e, true)
		}
		stored = stored || !refuses(err)
		if err != nil && l.o.Fault == nil && !passing(err) {
			return backoff.Permanent(err)
		}
		return err
	}
	if err = try(); err != nil && ctx.Err() == nil {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, publishFor) // try uses it too
		defer cancel()
		wait := backoff.NewExponentialBackOff(backoff.WithInitialInterval(20*time.Millisecond), backoff.WithMaxInterval(time.Second))
		err = backoff.Retry(try, backoff.WithContext(wait, ctx))
	}
	switch {
	case err != nil && stored:
		return schemas.Receipt{}, fmt.Errorf("store %s: not known to be stored: %w", e.ID(), err)
	case err != nil:
		return schemas.Receipt{}, fmt.Errorf("store %s: %w", e.ID(), refused(err))
	}
	return schemas.Receipt{Seq: ack.Sequence, Duplicate: ack.Duplicate}, nil
}

func idOf(e schemas.Event) schemas.EventID {
	if e.Data == nil {
		return "an event without payload"
	}
	return e.ID()
}

// refuses tells whether an error means that this try has stored nothing: the
// server has said so, or has not been sent the event.
func refuses(err error) bool {
	var api *jetstream.APIError
	return errors.As(err, &api) || errors.Is(err, nats.ErrNoResponders) || errors.Is(err, jetstream.ErrNoStreamResponse) ||
		errors.Is(err, nats.ErrMaxPayload) || errors.Is(err, nats.ErrConnectionClosed) || errors.Is(err, nats.ErrReconnectBufExceeded)
}

// refused names the cause in the vocabulary of the callers.
func refused(err error) error {
	var api *jetstream.APIError
	switch {
	case errors.As(err, &api) && api.ErrorCode == codeHeaders,
		errors.Is(err, nats.ErrMaxPayload), errors.Is(err, jetstream.ErrStreamMessageExceedsMaximum):
		return fmt.Errorf("%w: %w", schemas.ErrTooLarge, err)
	default:
		return fmt.Errorf("%w: the log does not take events now: %w", schemas.ErrOverloaded, err)
	}
}
