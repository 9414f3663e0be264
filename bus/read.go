package bus

import (
	"context"
	"errors"
	"fmt"
	"iter"

	"github.com/nats-io/nats.go/jetstream"

	"waybill.dev/schemas"
)

// ErrNotFound is returned for a sequence that the log does not hold (any more).
var ErrNotFound = errors.New("no such event in the log")

// Read yields the stored events that fit the filter, from the sequence `from`
// on, oldest first, up to the newest at the time of the call. Errors are as in
// [Log.Listen].
func (l *Log) Read(ctx context.Context, f Filter, from uint64) iter.Seq2[schemas.Event, error] {
	return func(yield func(schemas.Event, error) bool) {
		fail := func(err error) { yield(schemas.Event{}, err) }
		last, err := l.Last(ctx)
		if err != nil {
			fail(err)
			return
		}
		if last == 0 || from > last {
			return
		}
		c, err := l.ordered(ctx, f, from)
		if err != nil {
			fail(err)
			return
		}
		info, err := c.Info(ctx)
		if err != nil {
			fail(fmt.Errorf("read the log: %w", err))
			return
		}
		if info.NumPending == 0 {
			return
		}
		it, err := c.Messages(jetstream.PullMaxMessages(1000))
		if err != nil {
			fail(fmt.Errorf("read the log: %w", err))
			return
		}
		defer it.Stop()
		for {
			m, err := it.Next(jetstream.NextContext(ctx))
			if err != nil {
				fail(fmt.Errorf("read the log: %w", err))
				return
			}
			e, md, err := decodeMsg(m)
			if md == nil || e.Seq > last {
				return
			}
			if !yield(e, err) || md.NumPending == 0 || e.Seq == last {
				return
			}
		}
	}
}

// Load reads one event by its sequence. It returns [ErrNotFound].
func (l *Log) Load(ctx context.Context, seq uint64) (schemas.Event, error) {
	m, err := l.stream.GetMsg(ctx, seq)
	if errors.Is(err, jetstream.ErrMsgNotFound) {
		return schemas.Event{}, fmt.Errorf("sequence %d: %w", seq, ErrNotFound)
	}
	if err != nil {
		return schemas.Event{}, fmt.Errorf("load sequence %d: %w", seq, err)
	}
	e, err := decode(m.Subject, m.Header, m.Data)
	e.Seq, e.Stored = m.Sequence, m.Time.UTC()
	return e, err
}

// Past is a [schemas.Past]: what the log holds of e's call from its request
// on, or from e on when that is not known.
func (l *Log) Past(ctx context.Context, e schemas.Event) ([]schemas.Event, error) {
	from := e.Seq
	if a, ok := e.Data.(*schemas.Authorized); ok && a.RequestedSeq < from {
		from = a.RequestedSeq
	}
	var past []schemas.Event
	for p, err := range l.Read(ctx, Filter{Tenant: e.Tenant, Session: e.Session}, from) {
		if errors.Is(err, ErrUndecodable) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("past of call %s: %w", e.Call, err)
		}
		if p.Call == e.Call {
			past = append(past, p)
		}
	}
	return past, nil
}

// Counts tells how many events each session of the filter has, by kind.
func (l *Log) Counts(ctx context.Context, f Filter) (map[schemas.SessionKey]map[schemas.Kind]uint64, error) {
	counts := map[schemas.SessionKey]map[schemas.Kind]uint64{}
	subjects, err := f.subjects()
	if err != nil {
		return nil, err
	}
	for _, s := range subjects {
		info, err := l.stream.Info(ctx, jetstream.WithSubjectFilter(s))
		if err != nil {
			return nil, fmt.Errorf("count events: %w", err)
		}
		for subj, n := range info.State.Subjects {
			_, session, kind, ok := parts(subj)
			if !ok {
				continue
			}
			if counts[session] == nil {
				counts[session] = map[schemas.Kind]uint64{}
			}
			counts[session][kind] += n
		}
	}
	return counts, nil
}
