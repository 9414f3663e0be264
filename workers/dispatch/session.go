package dispatch

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"hash/maphash"
	"log/slog"
	"maps"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/time/rate"

	"waybill.dev/schemas"
	"waybill.dev/schemas/jsonrpc"
)

// Before 2026-07-28 MCP has sessions: a client initializes one, and its calls,
// what the server asks, and the server's stream (GET) belong to it. For each
// session of a client the gateway has one of its own at each server that the
// client's calls go to: it is opened when the first call needs it, with what
// the client said of itself, and closed with the client's.
//
// The log knows them (connected), so that another process, or this one after a
// restart, goes on with the session that the server has. What an upstream said
// on a session's stream while no process listened is lost, unless it says it
// again to who comes next.

// legacyRevisions are the revisions with sessions that are served, the newest
// first. It is the one that a client gets who wants another.
var legacyRevisions = []string{"2025-11-25", "2025-06-18", "2025-03-26"}

// oldestRevision is one that a server may agree on all the same: there are many
// over stdio that know nothing later, and its messages are the same.
const oldestRevision = "2024-11-05"

func mayAgree(revision string) bool {
	return revision == oldestRevision || slices.Contains(legacyRevisions, revision)
}

// legacy tells whether a revision is one with sessions.
func legacy(revision string) bool { return revision != "" && revision < mcpRevision }

const (
	// maxSessions is how many sessions at upstreams a process holds by default.
	// Each may have a connection for its stream, beside those that the limits
	// of the servers count, which is 10,000 file descriptors.
	maxSessions = 10_000

	// maxSessionID is the longest session ID that is taken from a server: it
	// becomes part of an event's envelope and of each request's header.
	maxSessionID = 512

	maxSubscriptions = 1000 // of a session, remembered to be made again
	maxURI           = 4096 // of one of them
	seenEvents       = 256  // of a session's streams, remembered to know them again
)

// timing is what a test makes shorter.
type timing struct {
	open    time.Duration // the opening of a session
	cancel  time.Duration // telling a server that a call is cancelled
	delete  time.Duration // closing a session
	answer  time.Duration // bringing the client's answer to the server
	store   time.Duration // storing what a server says outside of calls, before it is given up
	silence time.Duration // of a resumed stream, before it is asked for again
	pause   time.Duration // the first pause before a stream is asked for again; doubles
	pauses  time.Duration // the longest of a call's
	rest    time.Duration // the longest of a session's own stream
	retry   time.Duration // the longest that a server may ask for (retry:)
	front   time.Duration // the first pause before a front listens to a server again; doubles
	fronts  time.Duration // the longest
	check   time.Duration // who waits for the death of a stream's owner asks again whether it is one
	overlap time.Duration // of a stream that was replaced with the one that has its place
	gather  time.Duration // more questions of a server, before the client of a later revision is asked
	park    time.Duration // the life of an exchange that waits for its client to come back
	idle    time.Duration // of the session of a client that has none of its own
	pace    rate.Limit    // bytes a second that a session's own stream is read at in the long run
}

var defaultTiming = timing{
	open: 30 * time.Second, cancel: time.Second, delete: 5 * time.Second, answer: 30 * time.Second,
	store: time.Minute, silence: 10 * time.Second,
	pause: 100 * time.Millisecond, pauses: 5 * time.Second, rest: 30 * time.Second, retry: 30 * time.Second,
	front: time.Second, fronts: time.Minute, check: 5 * time.Minute, overlap: overlap,
	gather: 100 * time.Millisecond, park: 10 * time.Minute, idle: 10 * time.Minute,
	pace: paceRate,
}

// sessions is the table of the sessions that this process has at upstreams.
// Its goroutines, at most two for each session and one for each answer on its
// way, end with close.
type sessions struct {
	opt    Options
	name   string // unique for each Dispatcher
	max    int
	timing timing
	seed   maphash.Seed
	ctx    context.Context
	stop   context.CancelFunc
	wg     sync.WaitGroup

	// deletes bounds how many sessions are closed at once. They wait for it in
	// goroutines: as many as there were sessions, and maxForgotten.
	deletes   chan struct{}
	forgotten chan struct{}

	cores cores // tasks of servers that are followed here

	mu      sync.Mutex
	of      map[sessionID]map[string]*session // by their slots
	n       int
	tenants map[schemas.Tenant]int // how many of them; each may have half
	opened  uint64
	closed  bool
}

// sessionID names a client's session.
type sessionID struct {
	tenant schemas.Tenant
	key    schemas.SessionKey
}

func idOfSession(e schemas.Event) sessionID { return sessionID{e.Tenant, e.Session} }

// session is one session at one upstream, on behalf of one of a client.
type session struct {
	t    *sessions
	m    *mcpServer
	id   sessionID
	slot string          // among those of its client: the server's name, or more where it has a guest
	base schemas.Event   // what its events have in common; of no call, addressed to no edge
	by   string          // unique for each time that one is opened or taken over
	lost *session        // in whose place this one comes; may be nil
	need string          // the method of the call for which it is opened
	born time.Time       // when this process began to open it
	rash int             // how many in a row before it were lost soon after they were born
	ctx  context.Context // of its listener and the answers on their way
	stop context.CancelFunc
	over context.Context // of all that is done in it; it ends when the session is closed
	shut context.CancelFunc

	guest *guest // for whom it is, if that is a client without sessions; nil: for one with
	solo  *solo  // set where the server has no sessions (oldclient.go); nil: it has

	// Owned by who opens it until ready is closed, and fixed from then on.
	ready    chan struct{}
	fault    error // why it could not be opened; nil: it is
	upstream string
	revision string
	openedBy string // Connected.By
	after    string // Connected.After

	mu          sync.Mutex
	tools       map[string]string // taskSupport of those that have some; nil: not known
	initialized bool              // the server has been, or is being, told that the client is ready
	listening   bool
	elsewhere   bool               // another process has listened, or has this session too
	unfollow    context.CancelFunc // stops listening; nil: nobody has begun
	calls       int                // in it now
	replaced    bool               // another stands in its place
	asked       map[string]asking
	numbered    uint64 // what the server asked or said outside of calls
	subscribed  map[string]bool
	level       []byte // of its log, as JSON
	seen        []uint64
	next        int // in seen
}

func newSessions(opt Options, name string) *sessions {
	ctx, stop := context.WithCancel(context.Background())
	return &sessions{
		opt: opt, name: name, max: positive(opt.MaxSessions, maxSessions), timing: defaultTiming,
		seed: maphash.MakeSeed(), ctx: ctx, stop: stop, of: make(map[sessionID]map[string]*session), tenants: make(map[schemas.Tenant]int),
		deletes: make(chan struct{}, 16), forgotten: make(chan struct{}, maxForgotten),
	}
}

// close stops everything and waits for it. The upstreams keep the sessions of
// clients that have some: the next process goes on with them. Those of guests
// are closed, as far as there is time.
func (t *sessions) close() {
	t.mu.Lock()
	t.closed = true
	guests := t.guests()
	t.mu.Unlock()
	t.farewell(guests)
	t.stop()
	t.wg.Wait()
}

// spawn runs f unless the table is closed. f has to end when the table's
// context does.
func (t *sessions) spawn(f func()) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.closed {
		return false
	}
	t.wg.Go(f)
	return true
}

// count tells how many sessions a server has.
func (t *sessions) count(server string) (n int) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, of := range t.of {
		for _, s := range of {
			if s.m.name == server {
				n++
			}
		}
	}
	return n
}

// add makes a session that has yet to be opened. mu is held. g is nil unless it
// is for a guest.
func (t *sessions) add(m *mcpServer, e schemas.Event, lost *session, g *guest) (*session, error) {
	if t.closed {
		return nil, faultf(Unsent, "the gateway is shutting down")
	}
	id, slot := idOfSession(e), m.name
	if g != nil {
		slot = g.slot
	}
	if t.of[id][slot] == nil {
		switch share := max(t.max/2, 1); {
		case t.n >= t.max:
			return nil, faultf(Busy, "%d sessions are open at upstreams, no more may be", t.n)
		case t.tenants[e.Tenant] >= share:
			return nil, faultf(Busy, "%d sessions are open at upstreams for the tenant, no more may be", share)
		}
		t.n++
		t.tenants[e.Tenant]++
	}
	if t.of[id] == nil {
		t.of[id] = make(map[string]*session)
	}
	t.opened++
	s := &session{
		t: t, m: m, id: id, slot: slot, guest: g, lost: lost,
		base:  schemas.Event{Tenant: e.Tenant, Session: e.Session, Agent: e.Agent},
		by:    rand.Text()[:13] + strconv.FormatUint(t.opened, 36),
		ready: make(chan struct{}), born: time.Now(),
	}
	if lost != nil && s.born.Sub(lost.born) < 2*t.timing.rest {
		s.rash = lost.rash + 1
	}
	if a, ok := e.Data.(*schemas.Authorized); ok {
		s.need = a.Method
	}
	s.over, s.shut = context.WithCancel(t.ctx)
	s.ctx, s.stop = context.WithCancel(s.over)
	t.of[id][slot] = s
	return s, nil
}

// drop takes a session out of the table, if it is the one that is there.
func (t *sessions) drop(s *session) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.take(s)
}

// has tells whether there is a session in a place, which another may have left.
func (t *sessions) has(id sessionID, slot string) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.of[id][slot] != nil
}

// take is drop with mu held.
func (t *sessions) take(s *session) {
	if t.of[s.id][s.slot] != s {
		return
	}
	delete(t.of[s.id], s.slot)
	if len(t.of[s.id]) == 0 {
		delete(t.of, s.id)
	}
	t.n--
	if t.tenants[s.id.tenant]--; t.tenants[s.id.tenant] == 0 {
		delete(t.tenants, s.id.tenant)
	}
}

// bringBack puts a lost session into the place of the one that could not be
// opened instead, so that what it knows is not lost too: the next call will
// find again that its server does not know it. It is false where that place is
// none any more.
func (t *sessions) bringBack(s *session) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.of[s.id][s.slot] != s || s.lost.over.Err() != nil {
		return false
	}
	t.of[s.id][s.slot] = s.lost
	return true
}

// get returns the session at a server in which a call is made. Who comes first
// opens it and all others wait for that one; should it fail, each is told.
func (t *sessions) get(ctx context.Context, m *mcpServer, e schemas.Event) (*session, error) {
	t.mu.Lock()
	s := t.of[idOfSession(e)][m.name]
	var other *session // of the era that the server was of before
	if s != nil && s.solo != nil {
		other, s = s, nil
	}
	if s == nil {
		var err error
		if s, err = t.add(m, e, nil, nil); err != nil {
			t.mu.Unlock()
			return nil, err
		}
		if other != nil {
			other.handOver(s)
		}
		t.wg.Go(func() { t.open(s) })
	}
	t.mu.Unlock()
	if other != nil {
		other.stop()
		other.retire()
	}
	return s.wait(ctx)
}

// again returns the session that stands in the place of one that its server
// does not know any more, and opens it if nobody has.
func (t *sessions) again(ctx context.Context, lost *session) (*session, error) {
	t.mu.Lock()
	s := t.of[lost.id][lost.slot]
	if s == lost || s == nil || s.solo != nil {
		var err error
		if s, err = t.add(lost.m, lost.base, lost, lost.guest); err != nil {
			t.mu.Unlock()
			return nil, err
		}
		lost.handOver(s)
		t.wg.Go(func() { t.open(s) })
	}
	t.mu.Unlock()
	return s.wait(ctx)
}

// retire lets a lost session go once the calls that are still made in it, and
// which its server may know of after all, have ended.
func (s *session) retire() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.replaced = true; s.calls == 0 {
		s.shut()
	}
}

// enter counts a call in, unless the session is over or its server has been
// found not to know it: between get and enter another call may have seen that.
func (s *session) enter() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.replaced || s.over.Err() != nil {
		return false
	}
	s.calls++
	return true
}

func (s *session) leave() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.calls--; s.calls == 0 && s.replaced {
		s.shut()
	}
}

// handOver gives another session what this one's server would have to be told
// again. What it has asked is over: nobody waits for the answers.
func (s *session) handOver(to *session) {
	s.mu.Lock()
	defer s.mu.Unlock()
	to.subscribed, to.level = maps.Clone(s.subscribed), s.level
}

func (s *session) wait(ctx context.Context) (*session, error) {
	select {
	case <-s.ready:
	default:
		select {
		case <-s.ready:
		case <-ctx.Done():
			return nil, faultf(Unsent, "the session at the server was being opened: %w", context.Cause(ctx))
		}
	}
	if s.fault != nil {
		return nil, s.fault
	}
	return s, nil
}

// done ends the opening of a session.
func (s *session) done(fault error) {
	back := false
	if fault != nil {
		if f := new(Fault); s.lost != nil && errors.As(fault, &f) && f.Kind != Invalid {
			back = s.t.bringBack(s)
		}
		s.t.drop(s)
		s.shut()
	}
	if lost := s.lost; lost != nil && !back {
		// Not before: until there is another, or there will be none, its listener
		// tries again.
		lost.stop()
		lost.retire()
		if lost.guest == nil && lost.openedBy != s.openedBy {
			s.t.disown(streamKey(lost.id, lost.m.name, lost.openedBy))
		}
	}
	s.lost = nil
	s.fault = fault
	close(s.ready)
	// Whoever has closed it before it was ready has left the rest to us.
	if fault == nil && s.over.Err() != nil {
		s.t.delete(s.m, s.upstream, s.revision)
		if s.guest == nil {
			s.t.disown(streamKey(s.id, s.m.name, s.openedBy))
		}
	}
}

// open opens a session on behalf of a call that needs it. Whatever fails, that
// call has not been carried out.
func (t *sessions) open(s *session) {
	ctx, cancel := context.WithTimeout(s.ctx, t.timing.open)
	defer cancel()
	err := t.opening(ctx, s)
	if err != nil && t.ctx.Err() == nil && s.over.Err() != nil {
		err = faultf(Invalid, "%w", errSessionClosed)
	}
	if err != nil {
		s.done(unsent(err))
		return
	}
	ready := s.initialized
	s.done(nil)
	if ready {
		s.listen()
	}
}

var errSessionClosed = errors.New("the session is closed")

func (t *sessions) opening(ctx context.Context, s *session) error {
	if s.guest != nil {
		return s.guest.open(ctx, s)
	}
	switch _, err := t.opt.Latest(ctx, s.id.tenant, s.id.key, schemas.KindClosed); {
	case err == nil:
		return faultf(Invalid, "%w", errSessionClosed)
	case !errors.Is(err, schemas.ErrNotFound):
		return faultf(Unsent, "reading whether the session is closed: %w", err)
	}
	before, found, err := t.connected(ctx, s.id, s.m.name)
	if err != nil {
		return faultf(Unsent, "reading of the session at the server: %w", err)
	}
	if found && (s.lost == nil || before.By != s.lost.openedBy) && s.adopt(before) {
		s.initialized = s.need != "notifications/initialized"
		return nil
	}
	if s.after = s.m.name; found {
		s.after = before.By
	}
	opened, err := t.opt.Latest(ctx, s.id.tenant, s.id.key, schemas.KindOpened)
	if errors.Is(err, schemas.ErrNotFound) {
		return faultf(Invalid, "the log does not hold (any more) how the session was opened")
	}
	if err != nil {
		return faultf(Unsent, "reading how the session was opened: %w", err)
	}
	o, ok := opened.Data.(*schemas.Opened)
	if !ok || !legacy(o.Revision) {
		return faultf(Invalid, "the session is not one of a revision that has sessions")
	}
	body, err := initializeBody(opened.Body, s.by, o.Revision)
	if err != nil {
		return &Fault{Kind: Invalid, Err: err}
	}
	nobody := func() {}
	c := Call{
		ID: schemas.CallID(s.by), Event: s.base, Requested: &schemas.Requested{Target: schemas.Target{Method: "initialize"}},
		Body: body, Connected: nobody, Heard: nobody,
	}
	inner, hangUp := context.WithCancel(ctx)
	defer hangUp()
	answer, err := s.initialize(inner, c, body, s.say)
	if other := new(overtaken); errors.As(err, &other) && s.adopt(other.by) {
		s.initialized = true // by who was faster
		return nil
	}
	if err != nil {
		return err
	}
	if answer.Release != nil {
		answer.Release(hangUp)
	}
	if answer.ErrorCode != 0 {
		return faultf(Refused, "the server refuses to open a session: error %d", answer.ErrorCode)
	}
	s.initialized = true
	if err := s.tell(ctx, []byte(`{"jsonrpc":"2.0","method":"notifications/initialized"}`)); err != nil {
		s.t.delete(s.m, s.upstream, s.revision)
		return err
	}
	if found && (t.opt.Owners != nil || s.lost == nil || s.lost.openedBy != s.lost.by) {
		// Some of it the client may have set by way of another process.
		if err := t.remember(ctx, s); err != nil {
			s.log().Warn("what the client has set in a session that is opened again is not all known", "error", err)
		}
	}
	s.restore(ctx)
	return nil
}

// adopt makes this session the one that another process has opened, or this one
// before; false: it cannot be gone on with.
func (s *session) adopt(c *schemas.Connected) bool {
	if !mayAgree(c.Revision) || !sessionIDOK(c.Upstream) {
		return false
	}
	s.upstream, s.revision, s.openedBy = c.Upstream, c.Revision, c.By
	return true
}

// overtaken: another process has opened the session before.
type overtaken struct{ by *schemas.Connected }

func (o *overtaken) Error() string { return "another process has opened the session" }

// unsent is a fault of the opening as one of the call that needs the session.
func unsent(err error) error {
	f := new(Fault)
	if !errors.As(err, &f) {
		f = &Fault{Kind: Unsent, Err: err}
	}
	kind := f.Kind
	switch kind {
	case Broken:
		kind = Unsent
	case Gateway, Crashed, Garbled, TooLarge:
		kind = Refused
	}
	return &Fault{Kind: kind, After: f.After, Err: fmt.Errorf("opening a session: %w", f.Err)}
}

// connected finds what the log last knows of a session at a server.
func (t *sessions) connected(ctx context.Context, id sessionID, server string) (*schemas.Connected, bool, error) {
	e, err := t.opt.Latest(ctx, id.tenant, id.key, schemas.KindConnected)
	if errors.Is(err, schemas.ErrNotFound) {
		return nil, false, nil
	}
	if err != nil {
		return nil, false, err
	}
	c, ok := e.Data.(*schemas.Connected)
	if ok && c.Server == server {
		return c, true, nil
	}
	all, err := t.connections(ctx, id)
	c = all[server]
	return c, c != nil, err
}

// connections finds what the log last knows of a session at each server.
func (t *sessions) connections(ctx context.Context, id sessionID) (map[string]*schemas.Connected, error) {
	all := make(map[string]*schemas.Connected)
	if t.opt.Scan == nil {
		return all, nil
	}
	for e, err := range t.opt.Scan(ctx, id.tenant, id.key, schemas.KindConnected) {
		if err != nil {
			return nil, err
		}
		if c, ok := e.Data.(*schemas.Connected); ok {
			all[c.Server] = c
		}
	}
	return all, nil
}

// initializeBody is the client's request to initialize, with our id and the
// revision that was agreed with the client.
func initializeBody(body []byte, id, revision string) ([]byte, error) {
	msg, err := jsonrpc.Decode(body, jsonrpc.Limits{Bytes: len(body)})
	if err != nil {
		return nil, fmt.Errorf("the request that opened the session: %w", err)
	}
	if msg.Method() != "initialize" || !msg.IsRequest() || msg.Params().Kind() != jsonrpc.Object {
		return nil, errors.New("the request that opened the session is no initialize")
	}
	if !slices.Contains(legacyRevisions, revision) {
		revision = legacyRevisions[0]
	}
	p := msg.Patch().Replace(msg.ID(), jsonrpc.Quote(id)).Set(msg.Params(), "protocolVersion", jsonrpc.Quote(revision))
	if b := p.Bytes(); b != nil {
		return b, nil
	}
	return nil, fmt.Errorf("the request that opened the session: %w", p.Err())
}

// begin is the method initialize, called by a client: it opens the client's
// session at the server. A second one opens another, as it may be that nobody
// heard the answer to the first.
func (m *mcpServer) begin(ctx context.Context, c Call, progress func([]byte) error) (Answer, error) {
	t := m.sessions
	body, err := initializeBody(c.Body, string(c.ID), c.Requested.Revision)
	if err != nil {
		return Answer{}, &Fault{Kind: Invalid, Err: err}
	}
	t.mu.Lock()
	old := t.of[idOfSession(c.Event)][m.name]
	s, err := t.add(m, c.Event, nil, nil)
	t.mu.Unlock()
	if err != nil {
		return Answer{}, err
	}
	if old != nil {
		old.end()
	}
	ctx, hangUp := context.WithCancel(ctx)
	defer context.AfterFunc(s.over, hangUp)()
	answer, err := s.initialize(ctx, c, body, progress)
	release := answer.Release
	answer.Release = func(h func()) {
		if release != nil {
			release(func() { h(); hangUp() })
		}
		hangUp()
	}
	switch {
	case err == nil && answer.ErrorCode != 0:
		s.done(faultf(Refused, "the server refused to open a session"))
	case err != nil:
		hangUp()
		s.done(unsent(err))
	default:
		s.done(nil)
	}
	return answer, err
}

// initialize has the server open the session and stores that it has. The server
// may refuse, which is an answer with an error code.
func (s *session) initialize(ctx context.Context, c Call, body []byte, progress func([]byte) error) (Answer, error) {
	resp, err := s.m.send(ctx, http.MethodPost, s.header(c.Trace), body, c.Connected)
	if err != nil {
		return Answer{}, err
	}
	c.Heard()
	id := resp.Header.Get("Mcp-Session-Id")
	if !sessionIDOK(id) {
		resp.Body.Close()
		return Answer{}, faultf(Garbled, "a session ID that is longer than %d bytes or not visible ASCII", maxSessionID)
	}
	s.upstream, s.openedBy = id, s.by
	x := &exchange{s: s, c: c, ctx: ctx, progress: progress}
	answer, err := s.m.answer(resp, c, func() (Answer, error) { return x.stream(resp.Body) })
	if err != nil {
		resp.Body.Close()
		s.undo(c)
		s.suspectFault(err)
		return Answer{}, err
	}
	answer.Status = resp.StatusCode
	if answer.ErrorCode != 0 {
		s.m.doubt() // a server of the other era knows no such method
		return answer, nil
	}
	revision, err := agreed(answer.Body, s.m.maxAnswer)
	if err == nil {
		s.revision = revision
		ctx, cancel := sure(ctx, endTime)
		defer cancel()
		var e schemas.Event
		e, err = s.t.opt.answers.screenedEvent(s.m.name, s.base.Next(&schemas.Connected{
			Server: s.m.name, Upstream: s.upstream, Revision: revision, By: s.by, After: s.after,
		}, answer.Body))
		if err == nil {
			err = s.connect(ctx, e)
		}
		if other := new(overtaken); err != nil && !errors.As(err, &other) {
			err = faultf(Broken, "storing the session at the server: %w", err)
			if refused(err) {
				err = faultf(refusedAs(err), "storing the session at the server: %w", err)
			}
		}
	}
	if err != nil {
		resp.Body.Close()
		s.undo(c)
		return Answer{}, err
	}
	return answer, nil
}

// connect stores that the server has opened the session. The error is an *overtaken
// where another process has stored another in the same place.
func (s *session) connect(ctx context.Context, e schemas.Event) error {
	receipt, err := s.t.opt.Store(ctx, e)
	if err != nil || !receipt.Duplicate || s.after == "" {
		return err
	}
	first, err := s.t.opt.Load(ctx, receipt.Seq)
	if err != nil {
		return err
	}
	if c, ok := first.Data.(*schemas.Connected); !ok {
		return fmt.Errorf("event %d has its ID", receipt.Seq)
	} else if c.By != s.by { // else our own, whose receipt was lost on the way
		return &overtaken{c}
	}
	return nil
}

// undo closes a session that the server has opened and that nobody will use.
func (s *session) undo(c Call) {
	if s.upstream == "" {
		return
	}
	revision := s.revision
	if revision == "" {
		revision = c.Requested.Revision
	}
	s.t.delete(s.m, s.upstream, revision)
	s.upstream = ""
}

// agreed reads the revision that a server answers with.
func agreed(body []byte, limit int64) (string, error) {
	msg, err := jsonrpc.Decode(body, jsonrpc.Limits{Bytes: int(limit), Depth: answerDepth, AllowCaseVariants: true})
	if err != nil {
		return "", &Fault{Kind: Garbled, Err: err}
	}
	v, ok := msg.Result().Get("protocolVersion").Text()
	switch {
	case !ok:
		return "", faultf(Garbled, "the server's answer to initialize has no protocolVersion")
	case !mayAgree(v):
		return "", faultf(Garbled, "the server wants to speak revision %q, which is none of %s", clip(v, 32), strings.Join(legacyRevisions, ", "))
	}
	return v, nil
}

func sessionIDOK(id string) bool {
	return len(id) <= maxSessionID && strings.IndexFunc(id, func(r rune) bool { return r < '!' || r > '~' }) < 0
}

// header makes the headers of a request in the session, which are all that a
// server of these revisions reads; the others of the event belong to later ones.
func (s *session) header(trace onward) http.Header {
	h := s.m.header.Clone()
	if s.revision != "" {
		h.Set("Mcp-Protocol-Version", s.revision)
	}
	if s.upstream != "" {
		h.Set("Mcp-Session-Id", s.upstream)
	}
	trace.headers(h.Set)
	if s.m.held {
		h.Set(headerTenant, string(s.id.tenant))
		h.Set(headerSession, string(s.id.key))
	}
	return h
}

// tell sends a message that has no answer, a notification or a response.
func (s *session) tell(ctx context.Context, body []byte) error {
	resp, err := s.m.send(ctx, http.MethodPost, s.header(onward{}), body, func() {})
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if gone, err := s.gone(resp, ""); err != nil {
		return err
	} else if gone {
		return errLost
	}
	if resp.StatusCode < 200 || resp.StatusCode > 299 {
		if f := refusal(resp); f != nil {
			return f
		}
		return faultf(Garbled, "HTTP %d to a message without an answer", resp.StatusCode)
	}
	return nil
}

// restore tells a server again what the session in whose place this one comes
// had told it. What it does not take is logged: the client cannot be told.
func (s *session) restore(ctx context.Context) {
	s.mu.Lock()
	uris, level := make([]string, 0, len(s.subscribed)), s.level
	for uri := range s.subscribed {
		uris = append(uris, uri)
	}
	s.mu.Unlock()
	slices.Sort(uris)
	var params []([2]string)
	if level != nil {
		params = append(params, [2]string{"logging/setLevel", `{"level":` + string(level) + `}`})
	}
	for _, uri := range uris {
		params = append(params, [2]string{"resources/subscribe", `{"uri":` + string(jsonrpc.Quote(uri)) + `}`})
	}
	for i, p := range params {
		c := Call{
			ID: schemas.CallID(s.by + "." + strconv.Itoa(i)), Event: s.base, Requested: &schemas.Requested{Target: schemas.Target{Method: p[0]}},
			Connected: func() {}, Heard: func() {},
		}
		c.Body = []byte(`{"jsonrpc":"2.0","id":"` + string(c.ID) + `","method":"` + p[0] + `","params":` + p[1] + `}`)
		a, err := s.call(ctx, c, c.Body, s.say)
		if a.Release != nil {
			a.Release(func() {})
		}
		if err != nil || a.ErrorCode != 0 {
			s.log().Warn("a session that was opened again is not what it was", "method", p[0], "code", a.ErrorCode, "error", err)
		}
		if ctx.Err() != nil {
			return
		}
	}
}

// note remembers what would have to be told again.
func (s *session) note(method string, body []byte) {
	switch method {
	case "logging/setLevel", "resources/subscribe", "resources/unsubscribe":
	default:
		return
	}
	msg, err := jsonrpc.Decode(body, jsonrpc.Limits{Bytes: len(body)})
	if err != nil {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	uri, ok := msg.Params().Get("uri").Text()
	switch {
	case method == "logging/setLevel":
		if l := msg.Params().Get("level"); l.Kind() == jsonrpc.String && len(l.Raw()) < maxResultType {
			s.level = bytes.Clone(l.Raw()) // not the whole request
		}
	case method == "resources/unsubscribe":
		delete(s.subscribed, uri)
	case ok && len(uri) <= maxURI && len(s.subscribed) < maxSubscriptions:
		if s.subscribed == nil {
			s.subscribed = make(map[string]bool)
		}
		s.subscribed[uri] = true
	}
}

// knows tells whether an event of one of the session's streams was dealt with before.
func (s *session) knows(eventID string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Contains(s.seen, maphash.String(s.t.seed, eventID))
}

// saw remembers an event that was dealt with: not before, as what the log did not
// take comes again and is no repetition.
func (s *session) saw(eventID string) {
	h := maphash.String(s.t.seed, eventID)
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case slices.Contains(s.seen, h):
	case len(s.seen) < seenEvents:
		s.seen = append(s.seen, h)
	default:
		s.seen[s.next] = h
		s.next = (s.next + 1) % seenEvents
	}
}

func (s *session) log() *slog.Logger {
	return s.t.opt.Log.With("session", s.id.key, "tenant", s.id.tenant, "server", s.m.name)
}

// end closes the session at the server and stops what belongs to it.
func (s *session) end() {
	s.t.drop(s)
	s.shut()
	select {
	case <-s.ready:
		if s.fault == nil {
			if s.guest == nil { // a guest's stream has no owner beside this process
				s.t.disown(streamKey(s.id, s.m.name, s.openedBy))
			}
			if (s.m.held || s.solo != nil) && !s.t.has(s.id, s.slot) {
				s.t.disown(processKey(s.id, s.m.name))
			}
			s.t.delete(s.m, s.upstream, s.revision)
		}
	default: // see done
	}
}

// delete closes a session at a server, some time soon. A server that does not
// do that lets it expire.
func (t *sessions) delete(m *mcpServer, upstream, revision string) {
	if upstream == "" {
		return
	}
	t.spawn(func() {
		select {
		case t.deletes <- struct{}{}:
		case <-t.ctx.Done():
			return
		}
		defer func() { <-t.deletes }()
		t.deleteNow(m, upstream, revision, t.timing.delete)
	})
}

func (t *sessions) deleteNow(m *mcpServer, upstream, revision string, within time.Duration) {
	ctx, cancel := context.WithTimeout(t.ctx, within)
	defer cancel()
	s := &session{m: m, upstream: upstream, revision: revision}
	h := s.header(onward{})
	h.Del("Content-Type")
	resp, err := m.send(ctx, http.MethodDelete, h, nil, func() {})
	if err != nil {
		t.opt.Log.Debug("a session at a server is left to expire", "server", m.name, "error", err)
		return
	}
	drain(resp)(cancel)
}

// maxForgotten is how many sessions that this process does not hold may wait to
// be closed.
const maxForgotten = 1024

// Closed is the [schemas.Handler] for closed: the session's calls are cancelled,
// and its counterparts at the upstreams are closed too. Those of a process that is gone are looked for only
// where this one has none of the session; else they are left to expire.
func (d *Dispatcher) Closed(_ context.Context, e schemas.Event, _ schemas.Emit) error {
	if _, ok := e.Data.(*schemas.Closed); !ok || d.sessions.opt.Latest == nil {
		return nil
	}
	d.calls.close(idOfSession(e))
	t := d.sessions
	t.mu.Lock()
	var held []*session
	for _, s := range t.of[idOfSession(e)] {
		held = append(held, s)
	}
	t.mu.Unlock()
	for _, s := range held {
		s.end()
	}
	if len(held) > 0 {
		return nil
	}
	d.inBackground(func(ctx context.Context) { d.forget(ctx, idOfSession(e)) })
	return nil
}

// inBackground does something about a session that this process does not hold,
// unless too many such things are being done: then it is left.
func (d *Dispatcher) inBackground(do func(context.Context)) {
	t := d.sessions
	select {
	case t.forgotten <- struct{}{}:
	default:
		return
	}
	if !t.spawn(func() {
		defer func() { <-t.forgotten }()
		ctx, cancel := context.WithTimeout(t.ctx, t.timing.open)
		defer cancel()
		do(ctx)
	}) {
		<-t.forgotten
	}
}

func (d *Dispatcher) forget(ctx context.Context, id sessionID) {
	if _, err := d.opt.Latest(ctx, id.tenant, id.key, schemas.KindConnected); err != nil {
		return // the usual case: it has none
	}
	all, err := d.sessions.connections(ctx, id)
	if err != nil {
		d.opt.Log.Debug("a session's counterparts at the servers are left to expire", "session", id.key, "error", err)
	}
	for server, c := range all {
		if u := d.upstreams[server]; u != nil && u.mcp != nil && sessionIDOK(c.Upstream) {
			d.sessions.delete(u.mcp, c.Upstream, c.Revision)
			d.sessions.disown(streamKey(id, server, c.By))
		}
	}
}
