package playback

import (
	"context"
	"fmt"
	"iter"
	"slices"
	"time"

	"waybill.dev/schemas"
)

// What follows is what an edge asks of a log: one order, each ID once, and what
// is stored is heard. It is kept in memory, since nobody needs it after the agent
// has left.

// Store is a [schemas.Emit].
func (l *Log) Store(_ context.Context, e schemas.Event) (schemas.Receipt, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.store(e)
}

// store is Store with mu held.
func (l *Log) store(e schemas.Event) (schemas.Receipt, error) {
	if err := e.Check(); err != nil {
		return schemas.Receipt{}, err
	}
	if l.life.Err() != nil {
		return schemas.Receipt{}, fmt.Errorf("%w: the replay has ended", schemas.ErrOverloaded)
	}
	id := e.ID()
	if seq := l.ids[id]; seq != 0 {
		return schemas.Receipt{Seq: seq, Duplicate: true}, nil
	}
	e.Stored = l.o.Now().UTC()
	if e.Time.IsZero() {
		e.Time = e.Stored
	}
	e.Seq = l.first + uint64(len(l.events))
	l.ids[id] = e.Seq
	l.events = append(l.events, e)
	l.bytes += cost(e)
	if l.bytes > maxBytes {
		n := 0
		for ; l.bytes > maxBytes/4*3 && n < len(l.events)-1; n++ {
			l.bytes -= cost(l.events[n])
			delete(l.ids, l.events[n].ID())
		}
		l.events, l.first = slices.Clone(l.events[n:]), l.first+uint64(n) // others may be reading the old ones
	}
	l.heed(e)
	l.change()
	return schemas.Receipt{Seq: e.Seq}, nil
}

// cost is about what an event takes of memory.
func cost(e schemas.Event) int { return len(e.Body) + 1<<10 }

// put stores an event of the record, of which nothing can be wrong that was not
// wrong then. mu is held.
func (l *Log) put(e schemas.Event) { _, _ = l.store(e) }

// tell is put without mu held.
func (l *Log) tell(e schemas.Event) { _, _ = l.Store(l.life, e) }

// change wakes all that wait. mu is held.
func (l *Log) change() {
	close(l.changed)
	l.changed = make(chan struct{})
}

// until waits until done, which is asked with mu held whenever something has
// changed. It is false when ctx ended, or one of these channels was closed, first.
func (l *Log) until(ctx context.Context, stop <-chan struct{}, done func() bool) bool {
	for {
		l.mu.Lock()
		ok, changed := done(), l.changed
		l.mu.Unlock()
		if ok {
			return true
		}
		select {
		case <-changed:
		case <-stop:
			return false
		case <-ctx.Done():
			return false
		}
	}
}

// since is what is stored after a sequence, and a channel that is closed when
// there is more.
func (l *Log) since(after uint64) ([]schemas.Event, <-chan struct{}) {
	l.mu.Lock()
	defer l.mu.Unlock()
	from := max(after+1, l.first) - l.first
	if from >= uint64(len(l.events)) {
		return nil, l.changed
	}
	return l.events[from:len(l.events):len(l.events)], l.changed
}

// Follow is as bus.Asker.Follow.
func (l *Log) Follow(ctx context.Context, of schemas.Event, after uint64, emit schemas.Emit) error {
	return l.follow(ctx, of, after, func(schemas.Event) bool { return true }, emit)
}

// follow is Follow of the events that are wanted.
func (l *Log) follow(ctx context.Context, of schemas.Event, after uint64, wanted func(schemas.Event) bool, emit schemas.Emit) error {
	for {
		next, changed := l.since(after)
		for _, e := range next {
			after = e.Seq
			if e.Tenant != of.Tenant || e.Session != of.Session || e.Call != of.Call || of.ToTask() && e.Edge != of.Edge {
				continue
			}
			if of.Call == "" {
				switch e.Kind() {
				case schemas.KindAsked, schemas.KindNotified, schemas.KindClosed, schemas.KindAttached:
				default:
					continue
				}
			}
			if !wanted(e) {
				continue
			}
			if _, err := emit(ctx, e); err != nil {
				return err
			}
			if e.Kind().Ends() || e.Kind() == schemas.KindClosed {
				return nil
			}
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// Hear hands on what is stored of these kinds from now on, until ctx is done.
func (l *Log) Hear(ctx context.Context, kinds []schemas.Kind, hear func(context.Context, schemas.Event)) {
	l.mu.Lock()
	after := l.first + uint64(len(l.events)) - 1
	l.mu.Unlock()
	for {
		next, changed := l.since(after)
		for _, e := range next {
			after = e.Seq
			for _, k := range kinds {
				if e.Kind() == k {
					hear(ctx, e)
				}
			}
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return
		}
	}
}

// Load reads the event at a sequence; [schemas.ErrNotFound].
func (l *Log) Load(_ context.Context, seq uint64) (schemas.Event, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if seq < l.first || seq-l.first >= uint64(len(l.events)) {
		return schemas.Event{}, fmt.Errorf("sequence %d: %w", seq, schemas.ErrNotFound)
	}
	return l.events[seq-l.first], nil
}

// Latest reads the newest event of a kind in a session; [schemas.ErrNotFound].
func (l *Log) Latest(_ context.Context, t schemas.Tenant, s schemas.SessionKey, k schemas.Kind) (found schemas.Event, err error) {
	err = fmt.Errorf("%s of session %s: %w", k, s, schemas.ErrNotFound)
	for e := range l.Scan(context.Background(), t, s, k, 0) {
		found, err = e, nil
	}
	return found, err
}

// Asked reads what a session's client was asked by its ID; [schemas.ErrNotFound].
func (l *Log) Asked(ctx context.Context, t schemas.Tenant, s schemas.SessionKey, id string) (schemas.Event, error) {
	for e := range l.Scan(ctx, t, s, schemas.KindAsked, 0) {
		if a, ok := e.Data.(*schemas.Asked); ok && a.ID == id {
			return e, nil
		}
	}
	return schemas.Event{}, schemas.ErrNotFound
}

// Scan reads the events of a kind in a session that are stored after a sequence,
// the oldest first.
func (l *Log) Scan(_ context.Context, t schemas.Tenant, s schemas.SessionKey, k schemas.Kind, after uint64) iter.Seq2[schemas.Event, error] {
	return l.those(after, func(e schemas.Event) bool { return e.Tenant == t && e.Session == s && e.Kind() == k })
}

// Task reads what is addressed to a task after its first event.
func (l *Log) Task(_ context.Context, first schemas.Event) iter.Seq2[schemas.Event, error] {
	return l.those(first.Seq, func(e schemas.Event) bool {
		return e.Tenant == first.Tenant && e.Session == first.Session && e.Edge == first.Edge
	})
}

// TaskedAfter reads the events of a tenant that say how tasks stand.
func (l *Log) TaskedAfter(_ context.Context, t schemas.Tenant, after uint64) iter.Seq2[schemas.Event, error] {
	return l.those(after, func(e schemas.Event) bool { return e.Tenant == t && e.Kind() == schemas.KindTasked })
}

// Past is a [schemas.Past].
func (l *Log) Past(_ context.Context, of schemas.Event) (past []schemas.Event, err error) {
	for e := range l.those(0, func(e schemas.Event) bool { return e.Session == of.Session && e.Call == of.Call }) {
		past = append(past, e)
	}
	return past, nil
}

func (l *Log) those(after uint64, fits func(schemas.Event) bool) iter.Seq2[schemas.Event, error] {
	return func(yield func(schemas.Event, error) bool) {
		next, _ := l.since(after)
		for _, e := range next {
			if fits(e) && !yield(e, nil) {
				return
			}
		}
	}
}

// at is when an event happened, by the log's clock.
func at(e schemas.Event) time.Time {
	if e.Stored.IsZero() {
		return e.Time
	}
	return e.Stored
}
