package bus

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"waybill.dev/schemas"
)

// Asker follows the calls and sessions of one edge replica: one consumer hears
// all that is addressed to the replica, and what belongs to no call, and hands
// each event to whoever waits for it.
type Asker struct {
	l       *Log
	replica schemas.Replica

	wishes sync.WaitGroup // cancels on their way

	mu       sync.Mutex
	waiting  map[schemas.CallID]*waiter
	sessions map[sessionID]map[*waiter]bool
}

// sessionID names a session in full: its key alone is a hash that another
// tenant cannot have, but nothing here depends on that.
type sessionID struct {
	tenant schemas.Tenant
	key    schemas.SessionKey
}

// queued is how many events may wait for a slow reader. A reader that falls
// behind reads on from the log, which is the real queue.
const queued = 16

var errLeft = errors.New("the caller left")

// waiter is one call, or the events of one session, that an edge waits for.
type waiter struct {
	events chan *schemas.Event
	behind bool // owned by Asker.mu: events were left in the log
}

// beside are the kinds of a session that may belong to none of its calls; those
// are addressed to no replica, as any may hold the session's stream.
var beside = []schemas.Kind{schemas.KindAsked, schemas.KindNotified, schemas.KindClosed, schemas.KindAttached}

// Asker makes the asker of a replica. Its Run must run while Ask and Follow are
// used.
func (l *Log) Asker(r schemas.Replica) *Asker {
	return &Asker{l: l, replica: r, waiting: map[schemas.CallID]*waiter{}, sessions: map[sessionID]map[*waiter]bool{}}
}

// Run hears the answers until ctx is done; up (may be nil) is told when.
func (a *Asker) Run(ctx context.Context, up func(bool)) error {
	after, err := a.l.Last(ctx)
	if err != nil {
		return err
	}
	defer a.wishes.Wait()
	return a.l.Follow(ctx, Filter{To: a.replica, Beside: beside}, after, up, func(_ context.Context, e schemas.Event) error {
		a.route(e)
		return nil
	})
}

// route hands an event over. It never waits for a reader.
func (a *Asker) route(e schemas.Event) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if w := a.waiting[e.Call]; w != nil {
		w.hand(&e)
	}
	if e.Call == "" {
		for w := range a.sessions[sessionID{e.Tenant, e.Session}] {
			w.hand(&e)
		}
	}
}

// hand gives w an event, or marks that it has to read it from the log. Asker.mu
// is held.
func (w *waiter) hand(e *schemas.Event) {
	if w.behind {
		return
	}
	select {
	case w.events <- e:
	default:
		w.behind = true
	}
}

// Ask is a [schemas.Handler] for a request: it stores it, hands on what comes
// of it, the request as it stands in the log first, and returns after the
// ending. To an edge it is the whole rest of the system. If ctx ends first, Ask
// returns ctx's error and stores the wish to cancel the call, unless the cause
// is [schemas.ErrDetached]. It returns [schemas.ErrOverloaded] or
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
	e.Seq = receipt.Seq
	_, err = emit(ctx, e)
	if err == nil {
		err = a.follow(ctx, w, receipt.Seq, Filter{Tenant: e.Tenant, Session: e.Session, To: a.replica}, e.Call, emit)
	}
	switch why := context.Cause(ctx); {
	case err == nil, errors.Is(why, schemas.ErrDetached):
	case why == nil:
		a.cancel(ctx, e, err.Error())
	case errors.Is(why, context.Canceled):
		a.cancel(ctx, e, errLeft.Error())
	default:
		a.cancel(ctx, e, why.Error())
	}
	return err
}

// Follow hands on what the log holds after a sequence, and what comes from then
// on: of the call of `of`, to its ending, from whichever replica it was asked;
// or, where `of` names no call, what is asked, notified, attached and closed in
// its session outside of any call, until it is closed or ctx is done. Events come
// in the order of the log, each once. An error of emit ends it.
func (a *Asker) Follow(ctx context.Context, of schemas.Event, after uint64, emit schemas.Emit) error {
	if of.Call != "" {
		return a.followCall(ctx, of, after, emit)
	}
	w := &waiter{events: make(chan *schemas.Event, queued), behind: true} // what is in the log comes first
	id := sessionID{of.Tenant, of.Session}
	a.mu.Lock()
	if a.sessions[id] == nil {
		a.sessions[id] = map[*waiter]bool{}
	}
	a.sessions[id][w] = true
	a.mu.Unlock()
	defer func() {
		a.mu.Lock()
		defer a.mu.Unlock()
		if delete(a.sessions[id], w); len(a.sessions[id]) == 0 {
			delete(a.sessions, id)
		}
	}()
	return a.follow(ctx, w, after, Filter{Tenant: of.Tenant, Session: of.Session, Kinds: beside}, "", emit)
}

// followCall reads the session with a consumer of its own: it is for a client
// that comes back, and the call's events may be addressed to another replica.
// Those of a task (schemas.Event.ToTask) are read by themselves.
func (a *Asker) followCall(ctx context.Context, of schemas.Event, after uint64, emit schemas.Emit) error {
	filter := Filter{Tenant: of.Tenant, Session: of.Session}
	if of.ToTask() {
		filter.To = of.Edge
	}
	heard, err := a.l.Listen(ctx, filter, after)
	if err != nil {
		return err
	}
	for e, err := range heard {
		if errors.Is(err, ErrUndecodable) || err == nil && e.Call != of.Call {
			continue
		}
		if err == nil {
			_, err = emit(ctx, e)
		}
		if err != nil || e.Kind().Ends() {
			return err
		}
	}
	return ctx.Err()
}

// follow hands w's events on until one is the last. call is whose they are, ""
// for a session's.
func (a *Asker) follow(ctx context.Context, w *waiter, last uint64, past Filter, call schemas.CallID, emit schemas.Emit) error {
	take := func(e schemas.Event) (ended bool, err error) {
		if e.Seq <= last || e.Call != call {
			return false, nil
		}
		last = e.Seq
		_, err = emit(ctx, e)
		return e.Kind().Ends() || e.Kind() == schemas.KindClosed, err
	}
	for {
		// Where the queue ran over, the log is read, beside which the queue
		// fills again.
		for len(w.events) == 0 && a.caughtUp(w) {
			for got, err := range a.l.Read(ctx, past, last+1) {
				if errors.Is(err, ErrUndecodable) {
					continue
				}
				var ended bool
				if err == nil {
					ended, err = take(got)
				}
				if ended || err != nil {
					return err
				}
			}
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case got := <-w.events:
			if ended, err := take(*got); ended || err != nil {
				return err
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

// wishTime bounds the storing of a wish to cancel, and wishWait how long who has
// it waits for that: there is an answer to be given.
const (
	wishTime = 5 * time.Second
	wishWait = 500 * time.Millisecond
)

// cancel stores the wish that a call end. Nobody waits for it any more, so an
// error ends in the log of the process: the call then runs to its deadline.
func (a *Asker) cancel(ctx context.Context, e schemas.Event, reason string) {
	stored := make(chan struct{})
	a.wishes.Go(func() {
		defer close(stored)
		ctx, stop := context.WithTimeout(context.WithoutCancel(ctx), wishTime)
		defer stop()
		if _, err := a.l.Publish(ctx, e.Next(&schemas.Cancel{Reason: reason}, nil)); err != nil {
			a.l.o.Log.Warn("cancel not stored", "session", e.Session, "call", e.Call, "error", err)
		}
	})
	wait := time.NewTimer(wishWait)
	defer wait.Stop()
	select {
	case <-stored:
	case <-wait.C:
	}
}

// Waiting is how many calls are being followed.
func (a *Asker) Waiting() int {
	a.mu.Lock()
	defer a.mu.Unlock()
	return len(a.waiting)
}
