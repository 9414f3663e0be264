package dispatch

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"hash"
	"slices"
	"strings"
	"sync"
	"time"

	"waybill.dev/schemas"
)

// old tells whether the log may have forgotten the ID of an event that another
// run stored after known, so that it would take ours for the first. Then the
// call's past has to be read. Half of the window is left for the time that an
// event takes to be stored and for a difference of the clocks.
func (r *run) old() bool { return r.d.opt.Now().Sub(r.known) > r.d.opt.Duplicates/2 }

// lost tells whether a claim of the call may have been stored and be gone with the
// tail of the log, so that none can be relied on not to have been.
func (r *run) lost() bool { return !r.repeatable && r.d.opt.Lost(r.e) }

// endTime is what the storing of one event may take: less than what old leaves.
func (d *Dispatcher) endTime() time.Duration { return min(endTime, d.opt.Duplicates/4) }

// past is what the log holds of a call.
type past struct {
	end     schemas.Event   // with errEnded
	started bool            // another run has claimed it
	wish    *schemas.Cancel // it was to be cancelled
}

// recall reads the call's past. The error is errEnded when the call has its
// ending. Of events with one ID the first in sequence counts. Chunks that other
// runs stored are taken over.
func (r *run) recall(ctx context.Context) (past, error) {
	ctx, cancel := sure(ctx, r.d.endTime())
	defer cancel()
	now := r.d.opt.Now() // before reading: what is stored meanwhile may be missed
	events, err := r.d.opt.Past(ctx, r.e)
	if err != nil {
		return past{}, fmt.Errorf("reading the past of the call: %w", err)
	}
	events = slices.DeleteFunc(slices.Clone(events), func(e schemas.Event) bool {
		return e.Call != r.e.Call || e.Tenant != r.e.Tenant || e.Data == nil
	})
	slices.SortStableFunc(events, func(a, b schemas.Event) int {
		switch {
		case a.Seq < b.Seq:
			return -1
		case a.Seq > b.Seq:
			return 1
		}
		return 0
	})
	if r.task != nil {
		r.stood(events)
		r.attempt0 = r.task.round
	}
	var p past
	seen := make(map[schemas.EventID]bool, len(events))
	chunks := make(map[int][]byte)
	for _, e := range events {
		if id := e.ID(); seen[id] {
			continue
		} else {
			seen[id] = true
		}
		switch data := e.Data.(type) {
		case *schemas.Started:
			p.started = p.started || data.By != r.by && data.Attempt == r.attempt0+1
		case *schemas.Cancel:
			p.wish = data
		case *schemas.Progressed:
			chunks[data.Index] = e.Body
		default:
			if e.Kind().Ends() && p.end.Data == nil {
				p.end = e
			}
		}
	}
	for body, ok := chunks[r.chunks]; ok; body, ok = chunks[r.chunks] {
		r.add(body)
	}
	r.known = now
	if p.end.Data != nil {
		return p, errEnded
	}
	return p, nil
}

// claim makes this run the owner of the call: the only one that may call its
// upstream. It returns when the log has said who owns it, and errClaim when the
// log will not have a claim at all. It does not give up with ctx: a claim that
// is stored and not known to be would cost the call its outcome.
func (r *run) claim(ctx context.Context) (bool, error) {
	if r.claimed {
		return true, nil
	}
	if r.old() {
		// Another run may have come further: what this one was about to ask, the
		// server has been asked already.
		round := r.attempt0
		if past, err := r.recall(ctx); err != nil || past.started || r.attempt0 != round {
			return false, err
		}
	}
	ctx, cancel := sure(ctx, r.d.endTime())
	defer cancel()
	receipt, err := r.emit(ctx, r.next(&schemas.Started{Attempt: r.attempt0 + 1, By: r.by}, nil))
	if refused(err) {
		return false, fmt.Errorf("%w: %w", errClaim, err)
	}
	if err != nil {
		return false, fmt.Errorf("claiming the call: %w", err)
	}
	if receipt.Duplicate {
		// Perhaps our own, whose receipt was lost on the way.
		first, err := r.d.opt.Load(ctx, receipt.Seq)
		if err != nil {
			return false, fmt.Errorf("reading the claim at %d: %w", receipt.Seq, err)
		}
		if s, ok := first.Data.(*schemas.Started); !ok || s.By != r.by {
			return false, nil
		}
	}
	r.claimed = true
	return true, nil
}

// claimLost ends a call that another run had begun and did not end. Should that
// one still be at work after all, its answer is kept as late.
func (r *run) claimLost(ctx context.Context) (ending, error) {
	// Rare enough to look whether it has ended, and what it stored.
	past, err := r.recall(ctx)
	if err != nil {
		return ending{}, err
	}
	if r.task != nil && r.up != nil {
		switch {
		case r.task.id != "":
			return ending{}, errFollow // begun before, and the server knows how it goes
		case r.task.asked != nil && !past.started && !r.lost():
			return ending{}, errThinking // nothing is under way there
		}
	}
	if r.a.Stream {
		// In this era a broken stream is never resumed: the client asks again.
		return cancelled("its connection is gone"), nil
	}
	return failed(schemas.FailUnknown, "begun before, and nobody knows how it went"), nil
}

func endedBy(e schemas.Event) string {
	switch p := e.Data.(type) {
	case *schemas.Completed:
		return p.By
	case *schemas.Failed:
		return p.By
	case *schemas.Cancelled:
		return p.By
	}
	return ""
}

// chunkDigest makes Summary.ChunksSHA256: the SHA-256, in hex, of the bodies of
// the progressed events in the order of their index, each preceded by its
// length as 8 bytes, big endian. Without chunks it is "".
type chunkDigest struct{ h hash.Hash }

func (c *chunkDigest) add(chunk []byte) {
	if c.h == nil {
		c.h = sha256.New()
	}
	var n [8]byte
	binary.BigEndian.PutUint64(n[:], uint64(len(chunk)))
	c.h.Write(n[:])
	c.h.Write(chunk)
}

func (c *chunkDigest) hex() string {
	if c.h == nil {
		return ""
	}
	return hex.EncodeToString(c.h.Sum(nil))
}

// wish is the cause of a context that a cancel event ended.
type wish struct{ reason string }

func (w *wish) Error() string { return "cancelled: " + w.reason }

func wishOf(ctx context.Context) (reason string, ok bool) {
	w, ok := context.Cause(ctx).(*wish)
	if !ok {
		return "", false
	}
	return w.reason, true
}

// calls knows what runs, and remembers cancels whose call has not come yet.
// The memory is bounded in number and age: a cancel is a wish, and a call that
// comes later than that is carried out.
type calls struct {
	mu      sync.Mutex
	running map[callKey]*running
	young   map[callKey]string // cancels of the current half of the time, and
	older   map[callKey]string // of the half before
	turned  time.Time
}

const (
	wishes    = 16_384 // in each half
	wishesAge = 10 * time.Minute
)

type callKey struct {
	tenant schemas.Tenant
	call   schemas.CallID
}

type running struct {
	cancel  context.CancelCauseFunc
	session sessionID
	twin    *running // another run of the same call
}

// enter registers a run. Its context ends with a *wish when a cancel comes, and
// has ended when one had come before; stop ends it otherwise.
func (c *calls) enter(ctx context.Context, e schemas.Event) (_ context.Context, stop context.CancelCauseFunc, leave func()) {
	ctx, cancel := context.WithCancelCause(ctx)
	key := callKey{e.Tenant, e.Call}
	self := &running{cancel: cancel, session: idOfSession(e)}
	c.mu.Lock()
	defer c.mu.Unlock()
	reason, found := c.young[key]
	if !found {
		reason, found = c.older[key]
	}
	if found {
		cancel(&wish{reason})
	}
	if c.running == nil {
		c.running = make(map[callKey]*running)
	}
	self.twin = c.running[key]
	c.running[key] = self
	return ctx, cancel, func() {
		cancel(nil)
		c.mu.Lock()
		defer c.mu.Unlock()
		for at := c.running[key]; at != nil; at = at.twin {
			switch {
			case at == self && self.twin == nil: // the first of them, the usual case
				delete(c.running, key)
			case at == self:
				c.running[key] = self.twin
			case at.twin == self:
				at.twin = self.twin
			default:
				continue
			}
			return
		}
	}
}

// close ends what runs in a session that has ended, as if each had been taken
// back.
func (c *calls) close(id sessionID) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, at := range c.running {
		for ; at != nil; at = at.twin {
			if at.session == id {
				at.cancel(&wish{"the session has ended"})
			}
		}
	}
}

func (c *calls) cancel(e schemas.Event, reason string) {
	key := callKey{e.Tenant, e.Call}
	c.mu.Lock()
	defer c.mu.Unlock()
	for at := c.running[key]; at != nil; at = at.twin {
		at.cancel(&wish{reason})
	}
	// Remembered even so: should this run's ending not be stored, the call is
	// delivered again.
	if now := time.Now(); len(c.young) >= wishes || now.Sub(c.turned) > wishesAge/2 {
		c.older = c.young
		if now.Sub(c.turned) > wishesAge {
			c.older = nil
		}
		c.young, c.turned = nil, now
	}
	if c.young == nil {
		c.young = make(map[callKey]string)
	}
	// What was read from the log holds on to all of its event's envelope.
	key = callKey{schemas.Tenant(strings.Clone(string(key.tenant))), schemas.CallID(strings.Clone(string(key.call)))}
	c.young[key] = strings.Clone(reason)
}
