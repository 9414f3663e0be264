package mcp

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"sync"
	"time"

	"waybill.dev/edge"
	"waybill.dev/schemas"
	"waybill.dev/schemas/jsonrpc"
)

// lasting is a session with an ID. The ID is a secret between the client and
// the gateway and is kept nowhere: the key is its hash with the principal, so
// the ID of another principal is simply one that nobody has given out.
//
// All that matters of it is in the log: any replica finds it there, and what is
// here is what this one happens to know.
type lasting struct {
	key    schemas.SessionKey
	tenant schemas.Tenant
	agent  schemas.Agent
	server string // the endpoint's name in the path; "" for /mcp

	mu       sync.Mutex // guards what follows
	opened   uint64     // sequence of its opened event
	openedAt time.Time
	revision string // of the protocol, as agreed
	agreed   bool   // revision is the upstream's word, and not only what the client asked for
	checked  bool   // minted here, or looked up: it had no end then
	closed   bool
	users    int       // requests and streams that are being served
	used     time.Time // when the last one ended
	sent     uint64    // how far this process has served the session's stream, for all it knows
	fresh    []mark    // what it has sent since, oldest first

	streams map[schemas.CallID]*outlet // open streams, the session's own under ""
	calls   map[string]*running        // by the JSON-RPC id, in the client's bytes
	left    []string                   // ids of calls that were left to themselves, oldest first
	over    []string                   // ids of calls that were answered here, oldest first
	asked   map[string]*question       // by Asked.ID
}

// Bounds of what is kept of one session.
const (
	maxLeft  = 64  // calls that were left to themselves
	maxOver  = 64  // calls that were answered: clients take back what they have just heard
	maxAsked = 256 // questions; an older one is found in the log
)

// running is a call whose answer the client has not had.
type running struct {
	event  schemas.Event // its requested event, without the body
	stored chan struct{} // closed when that is in the log
	ctx    context.Context
	cancel context.CancelCauseFunc
	reads  bool // it is none: what is awaited is read from the log, and nothing has to be told that nobody waits
	left   bool // owned by the session's mu: nobody waits for the answer here
}

// outlet is an open stream.
type outlet struct {
	cancel context.CancelCauseFunc
	done   chan struct{}
	at     *attachment // owned by the session's mu; of its own stream, where there are other replicas
}

// question is what an upstream asked of the client.
type question struct {
	event    schemas.Event // without the body
	original string        // its JSON-RPC id, in the upstream's bytes
	answered bool
}

// Causes with which streams and calls of a session end.
var (
	errReplaced  = fmt.Errorf("a newer stream has taken over: %w", schemas.ErrDetached)
	errTakenBack = fmt.Errorf("the client took the call back: %w", schemas.ErrDetached) // the wish is stored already
	errClosed    = errors.New("the session was closed")
)

// enter counts a request in; it tells if the session still lives.
func (s *lasting) enter() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return false
	}
	s.users++
	return true
}

func (s *lasting) leave(now time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.users--
	s.used = now
}

// event is an event of the session.
func (s *lasting) event(data schemas.Payload, body []byte, now time.Time) schemas.Event {
	return schemas.Event{Tenant: s.tenant, Session: s.key, Agent: s.agent, Time: now, Data: data, Body: body}
}

// agree holds the MCP-Protocol-Version header against the session's revision.
// Without the header it is taken as said (2025-11-25, transports, "Protocol
// Version Header"). A session that was found in the log may have agreed on an
// older revision than its client asked for, which the first header then says.
func (s *lasting) agree(h http.Header) (string, *reply) {
	values := h[headerVersion]
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case len(values) == 0:
		return s.revision, nil
	case len(values) > 1:
		return "", badRequest("the MCP-Protocol-Version header is there more than once")
	case values[0] == s.revision:
	case values[0] != revision2024 && !slices.Contains(legacyRevisions(), values[0]):
		return "", badRequest("unsupported protocol version " + string(jsonrpc.Quote(short(values[0]))))
	case s.agreed || values[0] > s.revision:
		return "", badRequest("the MCP-Protocol-Version header is not the version that the session has agreed on")
	}
	s.revision, s.agreed = values[0], true
	return s.revision, nil
}

func (s *lasting) version() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.revision
}

// begin notes a call under the client's id. It returns false while another
// call of this id has not ended.
func (s *lasting) begin(id []byte, r *running) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if old := s.calls[string(id)]; old != nil && !old.left {
		return false
	}
	if s.calls == nil {
		s.calls = map[string]*running{}
	}
	s.calls[string(id)] = r
	return true
}

// end forgets a call, or keeps it as one that goes on by itself, for its client
// may still take it back.
func (s *lasting) end(id []byte, r *running, left bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.calls[string(id)] != r {
		return
	}
	if !left {
		delete(s.calls, string(id))
		if s.over = append(s.over, string(id)); len(s.over) > maxOver {
			s.over = slices.Delete(s.over, 0, 1)
		}
		return
	}
	r.left = true
	if s.left = append(s.left, string(id)); len(s.left) > maxLeft {
		if old := s.calls[s.left[0]]; old != nil && old.left {
			delete(s.calls, s.left[0])
		}
		s.left = slices.Delete(s.left, 0, 1)
	}
}

// ended forgets a call that was left to itself and has ended.
func (s *lasting) ended(call schemas.CallID) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for id, r := range s.calls {
		if r.event.Call == call && r.left {
			delete(s.calls, id)
		}
	}
}

// call finds a call by the client's id; over says that it was answered here.
func (s *lasting) call(id []byte) (r *running, over bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	r = s.calls[string(id)]
	return r, r == nil && slices.Contains(s.over, string(id))
}

// ask notes a question that the client is about to be told.
func (s *lasting) ask(id string, q *question) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.asked[id] != nil {
		return
	}
	if s.asked == nil {
		s.asked = map[string]*question{}
	}
	// Those that have their answer go first.
	for _, any := range []bool{false, true} {
		for old, o := range s.asked {
			if len(s.asked) < maxAsked {
				break
			}
			if any || o.answered {
				delete(s.asked, old)
			}
		}
	}
	s.asked[id] = q
}

func (s *lasting) question(id string) (q question, ok bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if p := s.asked[id]; p != nil {
		return *p, true
	}
	return q, false
}

func (s *lasting) answered(id string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if q := s.asked[id]; q != nil {
		q.answered = true
	}
}

// known is the id that the client knows a question by which the upstream knows
// by its own. Servers count anew in each session, so of several the latest is
// meant that has no answer.
func (s *lasting) known(server, original string) (id string, ok bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	latest := uint64(0)
	for key, q := range s.asked {
		a, _ := q.event.Data.(*schemas.Asked)
		if q.answered || q.original != original || server != "" && a.Server != server || ok && q.event.Seq < latest {
			continue
		}
		id, ok, latest = key, true, q.event.Seq
	}
	return id, ok
}

// take makes this the one stream of a call, or of the session: an older one is
// told to end, and returned. release ends it.
func (s *lasting) take(call schemas.CallID, cancel context.CancelCauseFunc) (old, o *outlet, release func()) {
	o = &outlet{cancel: cancel, done: make(chan struct{})}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.streams == nil {
		s.streams = map[schemas.CallID]*outlet{}
	}
	if old = s.streams[call]; old != nil {
		old.cancel(errReplaced)
	}
	if s.streams[call] = o; s.closed {
		cancel(errClosed)
	}
	return old, o, func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		if s.streams[call] == o {
			delete(s.streams, call)
		}
		close(o.done)
	}
}

// mark is an event of the session's stream that was written to a client.
type mark struct {
	seq uint64
	at  time.Time
}

// settle is how long a connection has to live on after something was written to
// it for that to count as received, where the client does not say. A client
// that was cut off before it saw a single id has none to come back with.
const settle = time.Second

// served is told how far the session's stream has got.
func (s *lasting) served(seq uint64, now time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.fresh = append(s.fresh, mark{seq, now})
	s.settled(now)
}

// settled moves sent on; mu is held.
func (s *lasting) settled(now time.Time) {
	const most = 256 // so many at once are a burst, and remembered whole
	n := max(0, len(s.fresh)-most)
	for n < len(s.fresh) && now.Sub(s.fresh[n].at) >= settle {
		n++
	}
	if n > 0 {
		s.sent = max(s.sent, s.fresh[n-1].seq)
		s.fresh = slices.Delete(s.fresh, 0, n)
	}
}

// cutOff is told that the session's stream has ended: what was written just
// before may not have arrived.
func (s *lasting) cutOff(now time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.settled(now)
	s.fresh = nil
}

// received is told how far the client says that it has got.
func (s *lasting) received(seq uint64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.sent = max(s.sent, seq)
}

// from is where the session's stream goes on when the client does not say, and
// the sequence by which its events name the stream.
func (s *lasting) from() (anchor, after uint64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.opened, max(s.opened, s.sent)
}

// shut ends all that the session has open here.
func (s *lasting) shut() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.closed = true
	for _, o := range s.streams {
		o.cancel(errClosed)
	}
	for _, r := range s.calls {
		r.cancel(errClosed)
	}
}

// SessionLimits are those of sessions with an ID. Zero means the default.
type SessionLimits struct {
	Idle      time.Duration // between two uses; a stream that is open is a use; default 1 h
	Max       time.Duration // from the beginning; default 12 h
	PerAgent  int           // default 1000
	PerTenant int           // default 10000
}

func (l SessionLimits) withDefaults() SessionLimits {
	if l.Idle <= 0 {
		l.Idle = time.Hour
	}
	if l.Max <= 0 {
		l.Max = 12 * time.Hour
	}
	if l.PerAgent <= 0 {
		l.PerAgent = 1000
	}
	if l.PerTenant <= 0 {
		l.PerTenant = 10000
	}
	return l
}

// lateFor is how long it is remembered at least that a session has ended.
const lateFor = 5 * time.Minute

// table is the sessions that this process knows.
type table struct {
	limits SessionLimits
	gone   *seen // the latest to have ended: what is heard late of one must not bring it back

	mu      sync.Mutex // guards what follows; never taken while a session's is held
	all     map[schemas.SessionKey]*lasting
	agents  map[principal]int
	tenants map[schemas.Tenant]int
}

type principal struct {
	tenant schemas.Tenant
	agent  schemas.Agent
}

func newTable(l SessionLimits) *table {
	return &table{
		limits: l.withDefaults(), gone: newSeen(maxSeen, lateFor), all: map[schemas.SessionKey]*lasting{},
		agents: map[principal]int{}, tenants: map[schemas.Tenant]int{},
	}
}

func (t *table) get(k schemas.SessionKey) *lasting {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.all[k]
}

// add takes a session in, unless it is there or limited is set and there are
// too many; it returns the one that is there then.
func (t *table) add(s *lasting, limited bool) (*lasting, *reply) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if old := t.all[s.key]; old != nil {
		return old, nil
	}
	who := principal{s.tenant, s.agent}
	if limited && (t.agents[who] >= t.limits.PerAgent || t.tenants[s.tenant] >= t.limits.PerTenant) {
		return nil, &reply{status: http.StatusTooManyRequests, code: jsonrpc.CodeInternalError, reason: "sessions", retry: 30,
			message: "There are too many open sessions. End those that are not needed with DELETE, or try again when some have expired."}
	}
	t.all[s.key] = s
	t.agents[who]++
	t.tenants[s.tenant]++
	return s, nil
}

// remove forgets a session; ended also sees to it that it stays forgotten.
func (t *table) remove(k schemas.SessionKey, ended bool) *lasting {
	if ended {
		t.gone.add(k)
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	s := t.all[k]
	if s == nil {
		return nil
	}
	delete(t.all, k)
	who := principal{s.tenant, s.agent}
	if t.agents[who]--; t.agents[who] == 0 {
		delete(t.agents, who)
	}
	if t.tenants[s.tenant]--; t.tenants[s.tenant] == 0 {
		delete(t.tenants, s.tenant)
	}
	return s
}

// size is how many sessions there are.
func (t *table) size() int {
	t.mu.Lock()
	defer t.mu.Unlock()
	return len(t.all)
}

// Sessions is how many sessions with an ID are open, as far as is known here:
// those of every replica, once Run has heard of them.
func (a *Adapter) Sessions() int { return a.table.size() }

func (t *table) list() []*lasting {
	t.mu.Lock()
	defer t.mu.Unlock()
	all := make([]*lasting, 0, len(t.all))
	for _, s := range t.all {
		all = append(all, s)
	}
	return all
}

// due lists the sessions that should end, with the reason.
func (t *table) due(now time.Time) map[*lasting]string {
	var due map[*lasting]string
	for _, s := range t.list() {
		s.mu.Lock()
		reason := ""
		switch {
		case s.opened == 0: // about to be stored
		case now.Sub(s.openedAt) >= t.limits.Max:
			reason = reasonExpired
		case s.users == 0 && now.Sub(s.used) >= t.limits.Idle:
			reason = reasonIdle
		}
		s.mu.Unlock()
		if reason != "" {
			if due == nil {
				due = map[*lasting]string{}
			}
			due[s] = reason
		}
	}
	return due
}

// Reasons of closed events.
const (
	reasonClient  = "client"
	reasonIdle    = "idle"
	reasonExpired = "expired"
	reasonRefused = "initialize did not succeed"
)

// newSessionID mints an ID: at least 128 random bits, in letters and digits.
func newSessionID() string { return rand.Text() }

// fromOpened is the session of an opened event, if it is one with an ID.
func fromOpened(e schemas.Event) *lasting {
	o, ok := e.Data.(*schemas.Opened)
	if !ok || o.Protocol != Protocol || o.Revision == "" {
		return nil
	}
	return &lasting{
		key: e.Session, tenant: e.Tenant, agent: e.Agent, server: o.Server,
		opened: e.Seq, openedAt: e.Time, used: e.Time, revision: o.Revision,
	}
}

// session finds the session that a request names, counted in: the caller has
// to leave it.
func (a *Adapter) session(ctx context.Context, h http.Header, p edge.Principal, endpoint string) (*lasting, *reply) {
	ids := h[headerSession]
	switch {
	case len(ids) == 0:
		return nil, badRequest("the Mcp-Session-Id header is missing: open a session with initialize, or use revision " + Revision)
	case len(ids) > 1:
		return nil, badRequest("the Mcp-Session-Id header is there more than once")
	}
	key := schemas.NewSessionKey(p.Tenant, p.Agent, ids[0])
	s := a.table.get(key)
	if s == nil || !s.isChecked() {
		var err error
		if s, err = a.recall(ctx, p.Tenant, key); err != nil {
			a.o.Log.Error("session cannot be looked up", "session", key, "error", err)
			return nil, &cannotRead
		}
	}
	now := a.o.Now()
	if s == nil || s.server != endpoint || s.tenant != p.Tenant || s.agent != p.Agent ||
		now.Sub(s.openedAt) >= a.table.limits.Max || !s.enter() {
		return nil, sessionUnknown()
	}
	return s, nil
}

func (s *lasting) isChecked() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.checked
}

// recall looks a session up in the log: one of another replica, or of the time
// before a restart. It returns nil when there is none.
func (a *Adapter) recall(ctx context.Context, t schemas.Tenant, key schemas.SessionKey) (*lasting, error) {
	e, err := a.o.Latest(ctx, t, key, schemas.KindOpened)
	if errors.Is(err, schemas.ErrNotFound) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	s := fromOpened(e)
	if s == nil {
		return nil, nil
	}
	_, err = a.o.Latest(ctx, t, key, schemas.KindClosed)
	if err == nil {
		if s = a.table.remove(key, true); s != nil {
			s.shut()
		}
		return nil, nil
	}
	if !errors.Is(err, schemas.ErrNotFound) {
		return nil, err
	}
	s.used = a.o.Now()
	s, _ = a.table.add(s, false)
	if a.table.gone.has(key) { // closed since it was looked up
		a.table.remove(key, true)
		return nil, nil
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.checked = true
	return s, nil
}

// end stores that a session has ended, and ends what it has open here.
func (a *Adapter) end(ctx context.Context, s *lasting, reason string) error {
	s.mu.Lock()
	was := s.closed
	s.closed = true // from here nothing new begins in it
	s.mu.Unlock()
	if _, err := a.o.Store(ctx, s.event(&schemas.Closed{Reason: reason}, nil, a.o.Now().UTC())); err != nil {
		s.mu.Lock()
		s.closed = was
		s.mu.Unlock()
		return fmt.Errorf("close session %s: %w", s.key, err)
	}
	a.table.remove(s.key, true)
	s.shut()
	return nil
}

// Run ends the sessions whose time has come, and keeps up with those of other
// replicas and of the time before, until ctx is done.
func (a *Adapter) Run(ctx context.Context) error {
	heard := make(chan error, 1)
	go func() { heard <- a.o.Sessions(ctx, a.hear) }()
	every := min(max(min(a.table.limits.Idle, a.table.limits.Max)/10, time.Second), time.Minute)
	t := time.NewTicker(every)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			<-heard
			return nil
		case err := <-heard:
			if ctx.Err() != nil {
				return nil
			}
			return fmt.Errorf("hear of sessions: %w", err)
		case <-t.C:
			a.sweep(ctx)
			now := a.o.Now()
			a.sessions.age(now)
			a.table.gone.age(now)
		}
	}
}

// hear takes in what is opened and closed anywhere.
func (a *Adapter) hear(_ context.Context, e schemas.Event) (schemas.Receipt, error) {
	switch e.Kind() {
	case schemas.KindOpened:
		if s := fromOpened(e); s != nil && !a.table.gone.has(e.Session) {
			a.table.add(s, false)
		}
	case schemas.KindClosed:
		if s := a.table.remove(e.Session, true); s != nil {
			s.shut()
		}
	}
	return schemas.Receipt{}, nil
}

// usedElsewhere is when a session was last used at any replica, as far as the
// log has it.
func (a *Adapter) usedElsewhere(ctx context.Context, s *lasting) (used time.Time, err error) {
	for _, k := range []schemas.Kind{schemas.KindRequested, schemas.KindAnswered, schemas.KindAttached} {
		e, err := a.o.Latest(ctx, s.tenant, s.key, k)
		if errors.Is(err, schemas.ErrNotFound) {
			continue
		}
		if err != nil {
			return used, err
		}
		if e.Time.After(used) {
			used = e.Time
		}
	}
	return used, nil
}

func (a *Adapter) sweep(ctx context.Context) {
	now := a.o.Now()
	a.stillAttached(ctx, now)
	for s, reason := range a.table.due(now) {
		if ctx.Err() != nil {
			return
		}
		if reason == reasonIdle {
			used, err := a.usedElsewhere(ctx, s)
			if err != nil {
				a.o.Log.Warn("cannot tell if a session is idle", "session", s.key, "error", err)
				continue
			}
			if now.Sub(used) < a.table.limits.Idle {
				s.mu.Lock()
				s.used = used
				s.mu.Unlock()
				continue
			}
		}
		if err := a.end(ctx, s, reason); err != nil && ctx.Err() == nil {
			a.o.Log.Warn("session not closed, trying again", "error", err)
		}
	}
}
