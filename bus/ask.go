package bus

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"waybill.dev/schemas"
)

// Asker follows the calls of one edge replica: one consumer hears all that is
// addressed to the replica and hands each event to whoever waits for its call.
type Asker struct {
	l       *Log
	replica schemas.Replica

	mu      sync.Mutex
	waiting map[schemas.CallID]*waiter
}

// queued is how many events may wait for a slow reader. A reader that falls
// behind reads on from the log, which is the real queue.
const queued = 16

var errLeft = errors.New("the caller left")

// waiter is one call that an edge waits for.
type waiter struct {
	events chan *schemas.Event
	behind bool // owned by Asker.mu: events were left in the log
}

// Asker makes the asker of a replica. Its Run must run while Ask is used.
func (l *Log) Asker(r schemas.Replica) *Asker {
	return &Asker{l: l, replica: r, waiting: map[schemas.CallID]*waiter{}}
}

// Run hears the answers until ctx is done; up (may be nil) is told when.
func (a *Asker) Run(ctx context.Context, up func(bool)) error {
	after, err := a.l.Last(ctx)
	if err != nil {
		return err
	}
	return a.l.Follow(ctx, Filter{To: a.replica}, after, up, func(_ context.Context, e schemas.Event) error {
		a.route(e)
		return nil
	})
}

// route hands an event over. It never waits for a reader.
func (a *Asker) route(e schemas.Event) {
	a.mu.Lock()
	defer a.mu.Unlock()
	w := a.waiting[e.Call]
	if w == nil || w.behind {
		return
	}
	select {
	case w.events <- &e:
	default:
		w.behind = true
	}
}

// Ask is a [schemas.Handler] for a request: it stores it, hands on what comes
// of it, and returns after the ending. To an edge it is the whole rest of the
// system. If ctx ends first, Ask stores the wish to cancel the call and
// returns ctx's error. It returns [schemas.ErrOverloaded] or
// [schemas.ErrTooLarge] when the request was not taken.
func (a *Asker) Ask(ctx context.Context, e schemas.Event, emit schemas.Emit) error {
	if why := a.l.full.Load(); why != nil {
		return fmt.Errorf("%w: %s", schemas.ErrOverloaded, *why)
	}
	e.Edge = a.replica
	w := &waiter{events: make(chan *schemas.Event, queued)}
	a.mu.Lock()
	a.waiting[e.Call] = w
	a.mu.Unlock()
	defer func() {
		a.mu.Lock()
		delete(a.waiting, e.Call)
		a.mu.Unlock()
	}()

	receipt, err := a.l.Publish(ctx, e)
	if err != nil {
		if !errors.Is(err, schemas.ErrTooLarge) && !errors.Is(err, schemas.ErrInvalid) && !errors.Is(err, schemas.ErrOverloaded) {
			a.cancel(ctx, e, "its request is not known to be stored") // it may be
		}
		return err
	}
	last := receipt.Seq
	take := func(e schemas.Event) (ended bool, err error) {
		if e.Seq <= last {
			return false, nil
		}
		last = e.Seq
		_, err = emit(ctx, e)
		return e.Kind().Ends(), err
	}
	for {
		select {
		case <-ctx.Done():
			why := context.Cause(ctx)
			if errors.Is(why, context.Canceled) {
				why = errLeft
			}
			a.cancel(ctx, e, why.Error())
			return ctx.Err()
		case got := <-w.events:
			if ended, err := take(*got); ended {
				return err
			} else if err != nil {
				a.cancel(ctx, e, err.Error())
				return err
			}
			if len(w.events) > 0 || !a.caughtUp(w) {
				continue
			}
			// The queue ran over: read on from the log, beside which the queue
			// fills again.
			for got, err := range a.l.Read(ctx, Filter{Tenant: e.Tenant, Session: e.Session, To: a.replica}, last+1) {
				if errors.Is(err, ErrUndecodable) || err == nil && got.Call != e.Call {
					continue
				}
				var ended bool
				if err == nil {
					ended, err = take(got)
				}
				if ended {
					return err
				}
				if err != nil {
					a.cancel(ctx, e, err.Error())
					return err
				}
			}
		}
	}
}

// caughtUp takes the mark of a waiter that fell behind, and tells whether it
// was there.
func (a *Asker) caughtUp(w *waiter) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	was := w.behind
	w.behind = false
	return was
}

// cancel stores the wish that a call end. Nobody waits for it any more, so an
// error ends in the log of the process: the call then runs to its deadline.
func (a *Asker) cancel(ctx context.Context, e schemas.Event, reason string) {
	ctx, stop := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
	defer stop()
	if _, err := a.l.Publish(ctx, e.Next(&schemas.Cancel{Reason: reason}, nil)); err != nil {
		a.l.o.Log.Warn("cancel not stored", "session", e.Session, "call", e.Call, "error", err)
	}
}

// Waiting is how many calls are being followed.
func (a *Asker) Waiting() int {
	a.mu.Lock()
	defer a.mu.Unlock()
	return len(a.waiting)
}
