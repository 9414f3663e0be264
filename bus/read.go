package bus

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"strings"
	"sync"
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
		fail := func(err error) { yield(schemas.Event{}, err) }
		last, err := l.Last(ctx)
		if err != nil {
			fail(err)
			return
		}
		if last == 0 || from > last {
			return
		}
		at := max(from, 1) - 1 // what has been seen, up to here
		more, err := l.readAt(ctx, f, last, &at, wanted, yield)
		if err == nil && more && at < last && l.o.Replicas > 1 {
			_, err = l.readRest(ctx, f, last, at, wanted, yield)
		}
		if err != nil {
			fail(err)
		}
	}
}

// readAt reads with a consumer, which in a cluster is at one of the nodes and
// has what that one has by now; at is moved along. It is false when the reader
// wants no more.
func (l *Log) readAt(ctx context.Context, f Filter, last uint64, at *uint64, wanted func(schemas.EventID) bool, yield func(schemas.Event, error) bool) (more bool, err error) {
	c, err := l.ordered(ctx, f, *at+1)
	if err != nil {
		return false, err
	}
	defer l.letGo(ctx, c)
	info, err := retry(ctx, l, c.Info)
	if err != nil {
		return false, fmt.Errorf("read the log: %w", err)
	}
	if info.NumPending == 0 {
		return true, nil
	}
	it, err := c.Messages(l.pulling()...)
	if err != nil {
		return false, fmt.Errorf("read the log: %w", err)
	}
	defer it.Stop()
	for {
		m, err := it.Next(jetstream.NextContext(ctx))
		if err != nil {
			return false, fmt.Errorf("read the log: %w", err)
		}
		md, err := m.Metadata()
		if err != nil {
			return false, fmt.Errorf("read the log: %w", err)
		}
		if *at = md.Sequence.Stream; *at > last {
			return false, nil
		}
		if wanted(schemas.EventID(m.Headers().Get(jetstream.MsgIDHeader))) {
			if e, _, err := decodeMsg(m); !yield(e, err) {
				return false, nil
			}
		}
		if md.NumPending == 0 || *at == last {
			return true, nil
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

// Past is a [schemas.Past]: what the log holds of e's call from its request
// on, or from e on when that is not known.
//
// Calls of a session that ask at the same time share one reading. After a crash
// all that were open ask at once, and each would read what the others did too.
func (l *Log) Past(ctx context.Context, e schemas.Event) ([]schemas.Event, error) {
	from := e.Seq
	if a, ok := e.Data.(*schemas.Authorized); ok && a.RequestedSeq < from {
		from = a.RequestedSeq
	}
	r, line, leave := l.pasts.join(Filter{Tenant: e.Tenant, Session: e.Session}, e.Call, from)
	defer leave()
	select {
	case <-r.done: // another read it for us
	case line.turn <- struct{}{}:
		l.pasts.close(line, r)
		select {
		case <-r.done: // a moment ago
		default:
			r.err = l.readPast(ctx, line.of, r)
			close(r.done)
		}
		<-line.turn
	case <-ctx.Done():
		return nil, fmt.Errorf("past of call %s: %w", e.Call, ctx.Err())
	}
	if r.err != nil {
		return nil, fmt.Errorf("past of call %s: %w", e.Call, r.err)
	}
	return r.calls[e.Call], nil
}

func (l *Log) readPast(ctx context.Context, of Filter, r *reading) error {
	asked := func(id schemas.EventID) bool {
		call, _, _ := strings.Cut(string(id), "/")
		_, ok := r.calls[schemas.CallID(call)]
		return ok
	}
	for p, err := range l.read(ctx, of, r.from, asked) {
		if errors.Is(err, ErrUndecodable) {
			continue
		}
		if err != nil {
			return err
		}
		r.calls[p.Call] = append(r.calls[p.Call], p)
	}
	return nil
}

// pasts are the sessions whose past is being read.
type pasts struct {
	mu    sync.Mutex
	lines map[string]*pastLine
}

// pastLine is a session's line of readings: one at a time, and what is asked
// meanwhile is for the next.
type pastLine struct {
	of    Filter
	turn  chan struct{} // of one place: who is in it reads
	next  *reading      // owned by pasts.mu; who asks joins it until it begins; may be nil
	users int           // owned by pasts.mu
}

// reading is one look at the log for several calls. from and calls belong to
// pasts.mu until it begins, then to who reads, and after done to all, unchanged.
type reading struct {
	from  uint64
	calls map[schemas.CallID][]schemas.Event
	err   error
	done  chan struct{}
}

// join finds the reading that has not begun, which will see all that is stored
// by now.
func (p *pasts) join(of Filter, call schemas.CallID, from uint64) (*reading, *pastLine, func()) {
	key := string(of.Tenant) + "." + string(of.Session)
	p.mu.Lock()
	defer p.mu.Unlock()
	line := p.lines[key]
	if line == nil {
		line = &pastLine{of: of, turn: make(chan struct{}, 1)}
		if p.lines == nil {
			p.lines = map[string]*pastLine{}
		}
		p.lines[key] = line
	}
	line.users++
	if line.next == nil {
		line.next = &reading{from: from, calls: map[schemas.CallID][]schemas.Event{}, done: make(chan struct{})}
	}
	line.next.from = min(line.next.from, from)
	line.next.calls[call] = nil
	return line.next, line, func() {
		p.mu.Lock()
		defer p.mu.Unlock()
		if line.users--; line.users == 0 {
			delete(p.lines, key)
		}
	}
}

// close lets nobody join a reading any more.
func (p *pasts) close(line *pastLine, r *reading) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if line.next == r {
		line.next = nil
	}
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
