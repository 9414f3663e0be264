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

// Read yields the stored events that fit the filter, from the sequence `from`
// on, oldest first, up to the newest at the time of the call. Errors are as in
// [Log.Listen].
func (l *Log) Read(ctx context.Context, f Filter, from uint64) iter.Seq2[schemas.Event, error] {
	return l.read(ctx, f, from, func(schemas.EventID) bool { return true })
}

// read is Read of those events whose ID is wanted. The others are not decoded,
// which is most of the work.
func (l *Log) read(ctx context.Context, f Filter, from uint64, wanted func(schemas.EventID) bool) iter.Seq2[schemas.Event, error] {
	return func(yield func(schemas.Event, error) bool) {
		last, err := l.Last(ctx)
		if err != nil {
			yield(schemas.Event{}, err)
			return
		}
		at := max(from, 1) - 1
		l.readTo(ctx, f, &at, last, wanted)(yield)
	}
}

// readTo is read of what comes after at, up to last; at is moved along, so that it
// is known how far a reading came that broke off.
func (l *Log) readTo(ctx context.Context, f Filter, at *uint64, last uint64, wanted func(schemas.EventID) bool) iter.Seq2[schemas.Event, error] {
	return func(yield func(schemas.Event, error) bool) {
		if *at >= last {
			return
		}
		more, late, err := l.readAt(ctx, f, last, at, wanted, yield)
		if err == nil && more && *at < last && (late || l.o.Replicas > 1) {
			_, err = l.readRest(ctx, f, last, *at, wanted, yield)
		}
		if err != nil {
			yield(schemas.Event{}, err)
		}
	}
}

// ReadSince is Read from the first event on that was stored at a time or after it.
func (l *Log) ReadSince(ctx context.Context, f Filter, since time.Time) iter.Seq2[schemas.Event, error] {
	return func(yield func(schemas.Event, error) bool) {
		from, err := l.since(ctx, since)
		if err != nil {
			yield(schemas.Event{}, err)
			return
		}
		l.Read(ctx, f, from)(yield)
	}
}

// since is the sequence of the first event of a time, or one after the newest.
func (l *Log) since(ctx context.Context, at time.Time) (uint64, error) {
	info, err := retry(ctx, l, func(ctx context.Context) (*jetstream.StreamInfo, error) { return l.stream.Info(ctx) })
	if err != nil {
		return 0, fmt.Errorf("read the log: %w", err)
	}
	// Halving, as events lie in the order of their times. What was erased is missing
	// in between: then it is the next that is left which tells.
	low, high := max(info.State.FirstSeq, 1), info.State.LastSeq+1
	for low < high {
		mid := low + (high-low)/2
		m, err := retry(ctx, l, func(ctx context.Context) (*jetstream.RawStreamMsg, error) {
			return l.stream.GetMsg(ctx, mid, jetstream.WithGetMsgSubject("ev.>"))
		})
		switch {
		case errors.Is(err, jetstream.ErrMsgNotFound):
			high = mid
		case err != nil:
			return 0, fmt.Errorf("read the log: %w", err)
		case m.Time.Before(at):
			low = m.Sequence + 1
		default:
			high = mid
		}
	}
	return low, nil
}

// readAt reads with a consumer, which in a cluster is at one of the nodes and
// has what that one has by now; at is moved along. more is false when the reader
// wants no more, and late true when a message that was counted does not come: it was
// erased meanwhile.
func (l *Log) readAt(ctx context.Context, f Filter, last uint64, at *uint64, wanted func(schemas.EventID) bool, yield func(schemas.Event, error) bool) (more, late bool, err error) {
	c, err := l.ordered(ctx, f, *at+1)
	if err != nil {
		return false, false, err
	}
	defer l.letGo(ctx, c)
	info, err := retry(ctx, l, c.Info)
	if err != nil {
		return false, false, fmt.Errorf("read the log: %w", err)
	}
	if info.NumPending == 0 {
		return true, false, nil
	}
	it, err := c.Messages(l.pulling()...)
	if err != nil {
		return false, false, fmt.Errorf("read the log: %w", err)
	}
	defer it.Stop()
	for {
		waiting, stop := context.WithTimeout(ctx, uncounted)
		m, err := it.Next(jetstream.NextContext(waiting))
		late := waiting.Err() != nil && ctx.Err() == nil
		stop()
		if err != nil && late {
			// Or the server is slow: then it is still to come.
			if info, err := retry(ctx, l, c.Info); err != nil {
				return false, false, fmt.Errorf("read the log: %w", err)
			} else if info.NumPending > 0 {
				continue
			}
			return true, true, nil
		}
		if err != nil {
			return false, false, fmt.Errorf("read the log: %w", err)
		}
		md, err := m.Metadata()
		if err != nil {
			return false, false, fmt.Errorf("read the log: %w", err)
		}
		if *at = md.Sequence.Stream; *at > last {
			return false, false, nil
		}
		if wanted(schemas.EventID(m.Headers().Get(jetstream.MsgIDHeader))) {
			if e, _, err := decodeMsg(m); !yield(e, err) {
				return false, false, nil
			}
		}
		if md.NumPending == 0 || *at == last {
			return true, false, nil
		}
	}
}

// readRest asks the stream's leader for what the node of the consumer did not
// have yet, usually nothing: a node may be some events behind, or, when it has
// just come back, many. A reader that missed an event would tell a claim or an
// ending from none.
func (l *Log) readRest(ctx context.Context, f Filter, last, at uint64, wanted func(schemas.EventID) bool, yield func(schemas.Event, error) bool) (more bool, err error) {
	subjects, err := f.subjects()
	if err != nil {
		return false, err
	}
	for at < last {
		var next *jetstream.RawStreamMsg
		for _, s := range subjects {
			m, err := retry(ctx, l, func(ctx context.Context) (*jetstream.RawStreamMsg, error) {
				return l.stream.GetMsg(ctx, at+1, jetstream.WithGetMsgSubject(s))
			})
			if errors.Is(err, jetstream.ErrMsgNotFound) {
				continue
			}
			if err != nil {
				return false, fmt.Errorf("read the log: %w", err)
			}
			if next == nil || m.Sequence < next.Sequence {
				next = m
			}
		}
		if next == nil || next.Sequence > last {
			return true, nil
		}
		at = next.Sequence
		if wanted(schemas.EventID(next.Header.Get(jetstream.MsgIDHeader))) {
			e, err := decode(next.Subject, next.Header, next.Data)
			e.Seq, e.Stored = next.Sequence, next.Time.UTC()
			if !yield(e, err) {
				return false, nil
			}
		}
	}
	return true, nil
}

// readFor bounds how long a read is tried again, readTry one try: a cluster that
// has lost a node needs some seconds to agree on another leader.
const (
	readFor = 15 * time.Second
	readTry = 2 * time.Second
)

// retry reads again where the error may pass. Reading twice does no harm.
func retry[T any](ctx context.Context, l *Log, read func(context.Context) (T, error)) (T, error) {
	for end := time.Now().Add(readFor); ; {
		try, cancel := context.WithTimeout(ctx, readTry)
		v, err := read(try)
		cancel()
		if err == nil || ctx.Err() != nil || !passing(err) || time.Now().After(end) || !pause(ctx, 100*time.Millisecond) {
			return v, err
		}
	}
}

// Load reads one event by its sequence. It returns [schemas.ErrNotFound].
func (l *Log) Load(ctx context.Context, seq uint64) (schemas.Event, error) {
	m, err := retry(ctx, l, func(ctx context.Context) (*jetstream.RawStreamMsg, error) { return l.stream.GetMsg(ctx, seq) })
	if errors.Is(err, jetstream.ErrMsgNotFound) {
		return schemas.Event{}, fmt.Errorf("sequence %d: %w", seq, schemas.ErrNotFound)
	}
	if err != nil {
		return schemas.Event{}, fmt.Errorf("load sequence %d: %w", seq, err)
	}
	e, err := decode(m.Subject, m.Header, m.Data)
	e.Seq, e.Stored = m.Sequence, m.Time.UTC()
	return e, err
}

// Latest reads the newest event of a kind in a session. It returns
// [schemas.ErrNotFound].
func (l *Log) Latest(ctx context.Context, t schemas.Tenant, s schemas.SessionKey, k schemas.Kind) (schemas.Event, error) {
	of, err := Filter{Tenant: t, Session: s, Kinds: []schemas.Kind{k}}.subjects()
	if err != nil {
		return schemas.Event{}, err
	}
	m, err := retry(ctx, l, func(ctx context.Context) (*jetstream.RawStreamMsg, error) {
		return l.stream.GetLastMsgForSubject(ctx, of[0])
	})
	if errors.Is(err, jetstream.ErrMsgNotFound) {
		return schemas.Event{}, fmt.Errorf("%s of session %s: %w", k, s, schemas.ErrNotFound)
	}
	if err != nil {
		return schemas.Event{}, fmt.Errorf("latest %s of session %s: %w", k, s, err)
	}
	e, err := decode(m.Subject, m.Header, m.Data)
	e.Seq, e.Stored = m.Sequence, m.Time.UTC()
	return e, err
}

// Counts tells how many events a session has, by kind.
func (l *Log) Counts(ctx context.Context, t schemas.Tenant, s schemas.SessionKey) (map[schemas.Kind]uint64, error) {
	subjects, err := Filter{Tenant: t, Session: s}.subjects()
	if err != nil {
		return nil, err
	}
	info, err := l.stream.Info(ctx, jetstream.WithSubjectFilter(subjects[0]))
	if err != nil {
		return nil, fmt.Errorf("count the events of session %s: %w", s, err)
	}
	counts := map[schemas.Kind]uint64{}
	for subj, n := range info.State.Subjects {
		if _, _, kind, ok := parts(subj); ok {
			counts[kind] += n
		}
	}
	return counts, nil
}
