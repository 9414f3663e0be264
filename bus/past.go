package bus

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"waybill.dev/schemas"
)

// Past is a [schemas.Past]: what the log holds of e's call from its request
// on, or from e on when that is not known.
//
// Calls of a session that ask at the same time share one reading, which goes on
// when those who asked have no time left, and what it found is kept for a while.
// So after a crash, when all calls that were open ask at once and again, a
// session is read once, however long it is and however slow the machine.
func (l *Log) Past(ctx context.Context, e schemas.Event) ([]schemas.Event, error) {
	from := e.Seq
	if a, ok := e.Data.(*schemas.Authorized); ok && a.RequestedSeq < from {
		from = a.RequestedSeq
	}
	r := l.pasts.join(l, Filter{Tenant: e.Tenant, Session: e.Session}, e.Call, from)
	select {
	case <-r.done:
	case <-ctx.Done():
		return nil, fmt.Errorf("past of call %s: %w", e.Call, ctx.Err())
	}
	if r.err != nil {
		return nil, fmt.Errorf("past of call %s: %w", e.Call, r.err)
	}
	return r.found[e.Call], nil
}

const (
	pastReadings = 16              // sessions that are read at once
	pastTime     = 2 * time.Minute // of one reading; what it has found by then is kept
	pastBytes    = 64 << 20        // of bodies that are kept of a session between readings
	pastCalls    = 8192            // likewise: twice what may be in work
)

// pasts are the sessions whose past is being read, or was a moment ago.
type pasts struct {
	mu    sync.Mutex
	lines map[string]*pastLine
	busy  chan struct{} // one for each reading; made by Open
}

// pastLine is a session's line of readings: one at a time, and what is asked
// meanwhile is for the next.
type pastLine struct {
	key string
	of  Filter

	// Owned by pasts.mu.
	next   *reading    // who asks joins it until it begins; nil: none
	works  bool        // a goroutine reads
	forget *time.Timer // what is known, when nobody has asked for a while; nil while it reads

	known map[schemas.CallID]*pastCall // owned by who reads
	bytes int                          // of bodies in it
}

// pastCall is what is known of a call.
type pastCall struct {
	events     []schemas.Event
	from, upTo uint64 // all of the call's events in between are among them
}

// reading is one look at the log for several calls. from belongs to pasts.mu until
// it begins, then to who reads; found and err are set when done is closed.
type reading struct {
	from  map[schemas.CallID]uint64
	found map[schemas.CallID][]schemas.Event
	err   error
	done  chan struct{}
}

// join finds the reading that has not begun, which will see all that is stored
// by now.
func (p *pasts) join(l *Log, of Filter, call schemas.CallID, from uint64) *reading {
	key := string(of.Tenant) + "." + string(of.Session)
	p.mu.Lock()
	defer p.mu.Unlock()
	line := p.lines[key]
	if line == nil {
		line = &pastLine{key: key, of: of, known: map[schemas.CallID]*pastCall{}}
		if p.lines == nil {
			p.lines = map[string]*pastLine{}
		}
		p.lines[key] = line
	}
	if line.next == nil {
		line.next = &reading{from: map[schemas.CallID]uint64{}, done: make(chan struct{})}
	}
	r := line.next
	if first, ok := r.from[call]; !ok || from < first {
		r.from[call] = from
	}
	if !line.works {
		line.works = true
		if line.forget != nil {
			line.forget.Stop()
			line.forget = nil
		}
		go p.work(l, line)
	}
	return r
}

// work reads until nobody asks any more.
func (p *pasts) work(l *Log, line *pastLine) {
	p.busy <- struct{}{}
	defer func() { <-p.busy }()
	for r := p.begin(l, line); r != nil; r = p.begin(l, line) {
		ctx, cancel := context.WithTimeout(l.life, pastTime)
		r.err = line.read(ctx, l, r)
		cancel()
		close(r.done)
	}
}

// begin takes the next reading, which nobody can join any more. When there is
// none, the line comes to rest.
func (p *pasts) begin(l *Log, line *pastLine) *reading {
	p.mu.Lock()
	defer p.mu.Unlock()
	if line.bytes > pastBytes || len(line.known) > pastCalls {
		line.known, line.bytes = map[schemas.CallID]*pastCall{}, 0
	}
	r := line.next
	line.next = nil
	if r != nil {
		return r
	}
	line.works = false
	// Who had no answer in time is delivered again within the AckWait.
	var forget *time.Timer
	forget = time.AfterFunc(3*l.o.AckWait, func() {
		p.mu.Lock()
		defer p.mu.Unlock()
		if line.forget == forget {
			delete(p.lines, line.key)
		}
	})
	line.forget = forget
	return nil
}

// read finds what is asked for. Of what an earlier reading has found, only what
// came after is read.
func (line *pastLine) read(ctx context.Context, l *Log, r *reading) error {
	last, err := l.Last(ctx)
	if err != nil {
		return err
	}
	at := last // what has been read, up to here
	for call, from := range r.from {
		c := line.known[call]
		if c == nil || c.from > from {
			c = &pastCall{from: from, upTo: max(from, 1) - 1}
			line.known[call] = c
		}
		at = min(at, c.upTo)
	}
	asked := func(id schemas.EventID) bool {
		call, _, _ := strings.Cut(string(id), "/")
		_, ok := r.from[schemas.CallID(call)]
		return ok
	}
	for e, readErr := range l.readTo(ctx, line.of, &at, last, asked) {
		if errors.Is(readErr, ErrUndecodable) {
			continue
		}
		if err = readErr; err != nil {
			break
		}
		if c := line.known[e.Call]; c != nil && e.Seq > c.upTo {
			c.events = append(c.events, e)
			line.bytes += len(e.Body)
		}
	}
	if err == nil {
		at = last
	}
	r.found = make(map[schemas.CallID][]schemas.Event, len(r.from))
	for call := range r.from {
		c := line.known[call]
		c.upTo = max(c.upTo, at)
		r.found[call] = slices.Clip(c.events)
	}
	return err
}
