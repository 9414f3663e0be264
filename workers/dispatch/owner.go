package dispatch

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/cenkalti/backoff/v4"

	"waybill.dev/schemas"
	"waybill.dev/schemas/jsonrpc"
)

// Owners says which process holds what only one can: the stream of a session at
// a server, a server's child process. A process owns what it has acquired until
// it releases it or does not live any more.
type Owners interface {
	// Name is this process's, which no other has, nor had before a restart.
	Name() string

	// Acquire makes this process the owner of a key, unless another is that
	// lives, and returns the owner. Keys are tokens with dots between them.
	Acquire(ctx context.Context, key string) (owner string, err error)

	// Release gives up a key that this process owns.
	Release(ctx context.Context, key string) error

	// Holds tells whether this process still owns what it has acquired. It turns
	// false before another could have taken over.
	Holds() bool

	// Gone is closed when the process of a name is known to live no more.
	Gone(name string) <-chan struct{}

	// Owned lists what a process owns, or owned when it died; with an error, as far
	// as it is known.
	Owned(ctx context.Context, name string) ([]string, error)
}

const (
	ownerPause = 250 * time.Millisecond // before an owner is asked for again
	ownerRest  = 5 * time.Second        // the longest such pause: one that gives the call back each time is not hurried
	ownerGrace = 5 * time.Second        // in which an owner ends a call whose time is over
)

// errOwnerGone: the owner of a call lives no more, or has given the call back.
var errOwnerGone = errors.New("the owner is gone")

// errStopped: the run's context ended before there was an owner.
var errStopped = errors.New("stopped before there was an owner")

// handOver gives the call to the process that alone can carry it out, where
// there is one, and waits for the ending, with which it returns errEnded. It
// returns nil when this process is to carry it out: because it owns what the
// call needs, or because the owner has died. Then the claim says what becomes of
// a call that the owner had begun.
func (r *run) handOver(ctx context.Context) error {
	o := r.d.opt.Owners
	if o == nil || r.up.owner == nil || r.handed {
		return nil
	}
	body := r.e.Body
	switch {
	case legacy(r.a.Revision): // whose body says nothing of an owner
		// Once for all: a server that is found to be of the other era before the
		// call is made would have it made by who does not own the session.
		if m := r.up.mcp; m != nil && !m.held && r.a.Method != "ping" {
			r.era = m.eraOf(ctx)
		}
	case mayAsk[r.a.Method]:
		var err error
		if body, err = r.request(ctx); err != nil {
			return nil // who carries it out will find that too
		}
		r.read = body
	}
	nobody := func() {}
	key, owner := r.up.owner(Call{
		ID: r.e.Call, Event: r.e, Requested: &r.a.Requested, Only: r.a.Only, Body: body,
		Era: r.era, Connected: nobody, Heard: nobody,
	})
	if key != "" {
		r.era = EraAuto // the owner makes it in whichever era the server is of by then
	}
	if key != "" || owner != "" && owner != o.Name() {
		r.read = nil // who waits for an owner holds no body
	}
	for wait := ownerPause; ; wait = min(2*wait, ownerRest) {
		if key != "" {
			var err error
			if owner, err = r.d.acquire(ctx, key); err != nil {
				return err
			}
		}
		if owner == "" || owner == o.Name() {
			return r.besideHanded(ctx)
		}
		switch err := r.d.route(ctx, r, owner); {
		case !errors.Is(err, errOwnerGone):
			return err
		case key == "":
			return nil
		}
		if !pause(ctx, wait) {
			return errStopped
		}
	}
}

// acquire is Acquire for as long as it takes: while the log is away nobody can
// say who owns anything.
func (d *Dispatcher) acquire(ctx context.Context, key string) (string, error) {
	for try := 0; ; try++ {
		owner, err := d.opt.Owners.Acquire(ctx, key)
		if err == nil {
			return owner, nil
		}
		if try == 10 {
			d.opt.Log.Warn("nobody can say who owns what", "key", key, "error", err)
		}
		if !pause(ctx, ownerPause) {
			return "", errStopped
		}
	}
}

// route has another process carry out the call of a run, and waits until it has
// ended, which is errEnded. It is errOwnerGone when that process has died, or could
// not bring the call to an end.
func (d *Dispatcher) route(ctx context.Context, r *run, owner string) error {
	o := d.opt.Owners
	gone := o.Gone(owner)
	select {
	case <-gone:
		return errOwnerGone
	default:
	}
	// Another name each time: what a run has handed over before, and got back, is
	// in the log already, where a second of its name would vanish unheard.
	r.routed++
	by := r.by + "." + strconv.Itoa(r.routed)
	back, leave := d.routes.wait(by)
	defer leave()
	defer r.away(ctx)()
	store, cancel := sure(ctx, d.endTime())
	receipt, err := r.emit(store, r.e.Next(&schemas.Routed{To: owner, From: o.Name(), Seq: r.e.Seq, By: by}, nil))
	if err == nil && receipt.Duplicate {
		// Our own, whose receipt was lost on the way; nobody hears of another.
		var first schemas.Event
		if first, err = d.opt.Load(store, receipt.Seq); err == nil {
			if p, ok := first.Data.(*schemas.Routed); !ok || p.To != owner || p.By != by {
				err = fmt.Errorf("event %d has its ID", receipt.Seq)
			}
		}
	}
	cancel()
	if err != nil {
		return fmt.Errorf("handing the call to its owner: %w", err)
	}
	select {
	case <-back:
	case <-gone:
	case <-ctx.Done():
		// The owner hears of it too, or knows the deadline.
		grace := time.NewTimer(ownerGrace)
		defer grace.Stop()
		select {
		case <-back:
		case <-gone:
		case <-grace.C:
		}
	}
	if _, err := r.recall(ctx); err != nil {
		return err // errEnded
	}
	if ctx.Err() != nil {
		return errStopped
	}
	return errOwnerGone
}

// besideHanded waits for a run of the same call that another process has handed
// over to this one, should there be one: the call may be delivered to its owner
// too, when who waited for it has died.
func (r *run) besideHanded(ctx context.Context) error {
	done := r.d.routes.running(callKey{r.e.Tenant, r.e.Call})
	if done == nil {
		return nil
	}
	select {
	case <-done:
	case <-ctx.Done():
		return errStopped
	}
	_, err := r.recall(ctx)
	return err
}

// Routed is the [schemas.Handler] for routed. Every dispatcher hears of all: the
// one that a call is handed to carries it out.
func (d *Dispatcher) Routed(_ context.Context, e schemas.Event, _ schemas.Emit) error {
	p, ok := e.Data.(*schemas.Routed)
	if !ok || d.opt.Owners == nil || p.To != d.opt.Owners.Name() {
		return nil
	}
	if p.Back {
		d.routes.wake(p.By)
		return nil
	}
	// As many as the work "dispatch" hands out: who handed it over keeps its
	// place there.
	d.sessions.spawn(func() { d.takeIn(d.sessions.ctx, e, p) })
	return nil
}

// takeIn carries out a call that was handed over, and gives it back.
func (d *Dispatcher) takeIn(ctx context.Context, e schemas.Event, p *schemas.Routed) {
	key := callKey{e.Tenant, e.Call}
	done, first := d.routes.begin(key)
	var err error
	if first {
		var of schemas.Event
		if of, err = d.opt.Load(ctx, p.Seq); err == nil {
			if _, ok := of.Data.(*schemas.Authorized); !ok || of.Call != e.Call || of.Tenant != e.Tenant || of.Session != e.Session {
				err = fmt.Errorf("event %d is not what authorizes the call", p.Seq)
			} else {
				err = d.handle(ctx, of, d.opt.Store, true)
			}
		}
		d.routes.end(key)
	} else {
		select {
		case <-done:
		case <-ctx.Done():
			return
		}
	}
	if err != nil {
		d.opt.Log.Warn("a call that was handed to this process goes back", "session", e.Session, "call", e.Call, "error", err)
	}
	ctx, cancel := sure(ctx, d.endTime())
	defer cancel()
	if _, err := d.opt.Store(ctx, e.Next(&schemas.Routed{To: p.From, From: p.To, Seq: p.Seq, By: p.By, Back: true}, nil)); err != nil {
		d.opt.Log.Warn("who waits for a call does not hear that it has ended", "session", e.Session, "call", e.Call, "error", err)
	}
}

// routes are the calls on their way between processes.
type routes struct {
	mu      sync.Mutex
	waiting map[string]chan struct{}  // by Routed.By: runs here whose call another carries out
	handed  map[callKey]chan struct{} // carried out here for others; closed when done
}

func (t *routes) wait(by string) (back <-chan struct{}, leave func()) {
	c := make(chan struct{})
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.waiting == nil {
		t.waiting = make(map[string]chan struct{})
	}
	t.waiting[by] = c
	return c, func() {
		t.mu.Lock()
		defer t.mu.Unlock()
		if t.waiting[by] == c {
			delete(t.waiting, by)
		}
	}
}

func (t *routes) wake(by string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if c := t.waiting[by]; c != nil {
		close(c)
		delete(t.waiting, by)
	}
}

func (t *routes) begin(key callKey) (done <-chan struct{}, first bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if c := t.handed[key]; c != nil {
		return c, false
	}
	if t.handed == nil {
		t.handed = make(map[callKey]chan struct{})
	}
	c := make(chan struct{})
	t.handed[key] = c
	return c, true
}

func (t *routes) end(key callKey) {
	t.mu.Lock()
	defer t.mu.Unlock()
	close(t.handed[key])
	delete(t.handed, key)
}

func (t *routes) running(key callKey) <-chan struct{} {
	t.mu.Lock()
	defer t.mu.Unlock()
	if c := t.handed[key]; c != nil {
		return c
	}
	return nil
}

// processKeys begin the keys of sessions at servers that are held by a process of
// the gateway, and end with it.
const processKeys = "process."

// ownerOf is [Connection.Owner] of an MCP server: a session that a process of the
// gateway holds is that one's, and so is an exchange that waits for its client's
// input.
func (m *mcpServer) ownerOf(c Call) (key, owner string) {
	if legacy(c.Requested.Revision) {
		// At a server without sessions the session is the gateway's own, and what
		// the client sets in it is in one process.
		if m.held || c.Era == EraModern {
			key = processKey(idOfSession(c.Event), m.name)
		}
		return key, ""
	}
	if m.parking == nil || !mayAsk[c.Requested.Method] || !mayHoldState(c.Body) {
		return "", ""
	}
	body, _, err := mcpBody(c)
	if err != nil {
		return "", ""
	}
	msg, err := jsonrpc.Decode(body, jsonrpc.Limits{Bytes: len(body)})
	if err != nil {
		return "", ""
	}
	text, ok := msg.Params().Get("requestState").Text()
	st, err := m.parking.open(text, bind(c, msg), m.parking.now())
	if !ok || err != nil || st.Again {
		return "", "" // for who carries it out to say
	}
	return "", st.Owner
}

// streamKey is what the owner of a session's stream at a server holds: by is who
// had the server open that session (Connected.By).
func streamKey(id sessionID, server, by string) string {
	return streamKeys + strings.Join([]string{string(id.tenant), string(id.key), server, by}, ".")
}

const streamKeys = "stream."

// own keeps follow running while this process owns the session's stream, and
// waits while another does: exactly one may listen, or what the server says
// would be heard twice. follow returns true when there is nothing to follow any
// more, and has to end with its context.
func (s *session) own(follow func(context.Context) bool) {
	o := s.t.opt.Owners
	first := true
	learn := func(ctx context.Context) {
		if !first || s.shared() { // else nobody can have listened before
			err := s.patiently(ctx, func() error { return s.openQuestions(ctx) })
			if err != nil && ctx.Err() == nil {
				s.log().Warn("what a server has asked before is not known: answers to it do not reach it", "error", err)
			}
		}
		first = false
	}
	// A guest's session ends with this process: nobody takes it over.
	if o == nil || s.guest != nil {
		learn(s.ctx)
		follow(s.ctx)
		return
	}
	key := streamKey(s.id, s.m.name, s.openedBy)
	for s.ctx.Err() == nil {
		owner, err := o.Acquire(s.ctx, key)
		switch {
		case err != nil:
			s.log().Debug("nobody can say who listens to the server", "error", err)
			pause(s.ctx, ownerPause)
		case owner == o.Name():
			if s.ownFor(o, learn, follow) {
				return
			}
		default:
			s.share()
			// It may give the key up, too, of which nobody is told.
			check := time.NewTimer(s.t.timing.check)
			select {
			case <-o.Gone(owner):
			case <-check.C:
			case <-s.ctx.Done():
			}
			check.Stop()
		}
	}
}

// ownFor learns what was before and follows for as long as this process holds its
// leases.
func (s *session) ownFor(o Owners, learn func(context.Context), follow func(context.Context) bool) bool {
	ctx, cancel := context.WithCancel(s.ctx)
	defer cancel()
	s.mu.Lock()
	s.unfollow = cancel
	s.mu.Unlock()
	if !o.Holds() {
		return false
	}
	learn(ctx)
	return follow(ctx) && o.Holds()
}

// Lapsed is told that this process does not hold its leases any more: it stops
// listening to the servers, before others begin.
func (d *Dispatcher) Lapsed() {
	d.sessions.mu.Lock()
	defer d.sessions.mu.Unlock()
	for _, of := range d.sessions.of {
		for _, s := range of {
			s.mu.Lock()
			if s.unfollow != nil {
				s.unfollow()
			}
			s.mu.Unlock()
		}
	}
}

// disown releases what a session that has ended was owned by: the key of its
// stream, or of the process that held it.
func (t *sessions) disown(key string) {
	o := t.opt.Owners
	if o == nil {
		return
	}
	t.spawn(func() {
		ctx, cancel := context.WithTimeout(t.ctx, t.timing.delete)
		defer cancel()
		if err := o.Release(ctx, key); err != nil {
			t.opt.Log.Debug("who listened to a session that has ended is forgotten later", "key", key, "error", err)
		}
	})
}

// Regained is told that this process holds leases again: what Lapsed stopped at
// servers without sessions goes on, unless another has taken it over. Who listens
// in a session waits for that by itself.
func (d *Dispatcher) Regained() {
	var stopped []*session
	d.sessions.mu.Lock()
	for _, of := range d.sessions.of {
		for _, s := range of {
			if s.solo != nil && s.guest == nil && s.ctx.Err() != nil && s.over.Err() == nil {
				stopped = append(stopped, s)
			}
		}
	}
	d.sessions.mu.Unlock()
	if len(stopped) == 0 {
		return
	}
	d.sessions.spawn(func() {
		ctx := d.sessions.ctx
		forEach(stopped, func(s *session) {
			owner, err := d.acquire(ctx, processKey(s.id, s.m.name))
			if err == nil && owner == d.opt.Owners.Name() {
				var now *session
				if now, err = d.sessions.solo(ctx, s.m, s.base); err == nil {
					now.leave()
				}
			}
			if err != nil && ctx.Err() == nil {
				s.log().Warn("a server without sessions is not listened to again before the client's next call", "error", err)
			}
		})
	})
}

// Died is told that another process has died: what it listened to, and can be
// listened to from here, is taken over. Sessions that are in use here notice by
// themselves; the others are found in the log. What fails is tried again until it
// is done or another has taken it over: others wait for who holds a key, and one
// that does not listen would have them wait for ever.
func (d *Dispatcher) Died(ctx context.Context, name string) {
	if d.opt.Owners == nil || d.opt.Latest == nil {
		return
	}
	left, err := d.inherit(ctx, name, nil)
	if len(left) == 0 && err == nil {
		return
	}
	d.sessions.spawn(func() {
		t := d.sessions
		pauses := backoff.NewExponentialBackOff(
			backoff.WithInitialInterval(t.timing.pause), backoff.WithMultiplier(2), backoff.WithMaxInterval(t.timing.rest), backoff.WithMaxElapsedTime(0))
		for (len(left) > 0 || err != nil) && pause(t.ctx, pauses.NextBackOff()) {
			left, err = d.inherit(t.ctx, name, left)
		}
	})
}

// takeOvers is how many sessions are taken over at once.
const takeOvers = 16

// forEach does one for each, takeOvers at once, and returns when all are done.
func forEach[T any](all []T, one func(T)) {
	var running sync.WaitGroup
	room := make(chan struct{}, takeOvers)
	for _, it := range all {
		room <- struct{}{}
		running.Go(func() {
			defer func() { <-room }()
			one(it)
		})
	}
	running.Wait()
}

// inherit takes over what a process owned that has died, and the keys that were left
// before. left are those that have to be tried again; with an error there may be more.
func (d *Dispatcher) inherit(ctx context.Context, name string, before []string) (left []string, err error) {
	owned, err := d.opt.Owners.Owned(ctx, name)
	if err != nil {
		d.opt.Log.Warn("what a process owned is not all known", "name", name, "error", err)
	}
	keys := append(before, owned...)
	slices.Sort(keys)
	keys = slices.Compact(keys)
	var taken int
	var mu sync.Mutex
	forEach(keys, func(key string) {
		mine, err := d.inheritOne(ctx, key)
		if err != nil {
			d.opt.Log.Warn("a session at a server is not taken over yet", "key", key, "error", err)
		}
		mu.Lock()
		defer mu.Unlock()
		if err != nil {
			left = append(left, key)
		} else if mine {
			taken++
		}
	})
	if len(keys) > 0 {
		d.opt.Log.Info("another process is gone", "name", name, "owned", len(keys), "taken_over", taken)
	}
	return left, err
}

// inheritOne takes over one key, if that can be done here. An error says that it has
// to be tried again.
func (d *Dispatcher) inheritOne(ctx context.Context, key string) (mine bool, err error) {
	rest, stream := strings.CutPrefix(key, streamKeys)
	if !stream {
		rest = strings.TrimPrefix(key, processKeys)
	}
	part := strings.Split(rest, ".")
	if rest == key || len(part) != 3 && !stream || len(part) != 4 && stream {
		return false, nil
	}
	id, server := sessionID{schemas.Tenant(part[0]), schemas.SessionKey(part[1])}, part[2]
	u := d.upstreams[server]
	if u == nil || u.mcp == nil || u.mcp.held {
		return false, nil // it is gone with the process that held it, or another knows the server
	}
	last, found, err := d.sessions.connected(ctx, id, server)
	if err != nil {
		return false, err
	}
	if !stream && (!found || last.Revision != mcpRevision) {
		return false, nil // only the client could go on with it in its place
	}
	if owner, err := d.opt.Owners.Acquire(ctx, key); err != nil || owner != d.opt.Owners.Name() {
		return false, err
	}
	switch {
	case stream && (!found || last.By != part[3]):
		err = errSessionClosed // the client's session has another there since
	case stream:
		err = d.takeOver(ctx, id, u.mcp, last)
	default:
		err = d.takeOverSolo(ctx, id, u.mcp)
	}
	if f := new(Fault); errors.Is(err, errSessionClosed) || errors.Is(err, schemas.ErrNotFound) || errors.As(err, &f) && f.Kind == Invalid {
		if stream && d.sessions.lives(id, server, part[3]) {
			return true, nil // it is that one's own, whatever the log still knows of it
		}
		d.sessions.disown(key)
		return false, nil
	}
	return true, err
}

// lives tells whether this process is in the session that by had a server open.
func (t *sessions) lives(id sessionID, server, by string) bool {
	t.mu.Lock()
	s := t.of[id][server]
	t.mu.Unlock()
	if s == nil {
		return false
	}
	select {
	case <-s.ready:
		return s.fault == nil && s.openedBy == by && s.ctx.Err() == nil
	default:
		return false
	}
}

// takeOver goes on with a session at a server, which must be the one that the
// client's session has there.
func (d *Dispatcher) takeOver(ctx context.Context, id sessionID, m *mcpServer, last *schemas.Connected) error {
	opened, err := d.opt.Latest(ctx, id.tenant, id.key, schemas.KindOpened)
	if err != nil {
		return err
	}
	s, err := d.sessions.get(ctx, m, schemas.Event{Tenant: id.tenant, Session: id.key, Agent: opened.Agent})
	if err != nil {
		return err
	}
	if s.openedBy != last.By {
		now, found, err := d.sessions.connected(ctx, id, m.name)
		if err != nil {
			return err
		}
		if found && now.By == s.openedBy {
			return errSessionClosed // it has been opened here meanwhile, in place of the other
		}
		// One that the server has lost, which nobody has noticed here.
		if s, err = d.sessions.again(ctx, s); err != nil {
			return err
		}
		if s.openedBy != last.By {
			return errSessionClosed
		}
	}
	// It may be here already and have listened to nothing yet: this process opened it,
	// and the one that is gone told the server that the client is ready.
	s.share()
	s.first()
	s.listen()
	return nil
}

// takeOverSolo goes on with a session at a server without sessions: a client may
// do nothing but listen.
func (d *Dispatcher) takeOverSolo(ctx context.Context, id sessionID, m *mcpServer) error {
	opened, err := d.opt.Latest(ctx, id.tenant, id.key, schemas.KindOpened)
	if err != nil {
		return err
	}
	s, err := d.sessions.solo(ctx, m, schemas.Event{Tenant: id.tenant, Session: id.key, Agent: opened.Agent})
	if err == nil {
		s.leave()
	}
	return err
}

// processKey is what the process holds that alone makes the calls of a session at a
// server.
func processKey(id sessionID, server string) string {
	return processKeys + strings.Join([]string{string(id.tenant), string(id.key), server}, ".")
}
