package dispatch

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"waybill.dev/schemas"
	"waybill.dev/schemas/jsonrpc"
)

// guest is a client without sessions in one that the gateway has opened for it.
// It outlives that session where the server loses it.
//
// Locks are taken in this order: sessions.mu, guest.mu, errand.mu, parking.mu.
// Whoever holds one takes none that stands before it, so that under errand.mu
// nobody can ask the guest anything that its mu guards, nor spawn. session.mu and
// subscription.mu are taken last of all, and nothing is under them.
type guest struct {
	t    *sessions
	m    *mcpServer
	id   sessionID
	slot string
	base schemas.Event
	caps []byte // of the client, an object
	info []byte // of the client, an object

	leveling chan struct{} // holds one: who sets the level
	wishing  chan struct{} // holds one: who subscribes

	server atomic.Pointer[hosted] // what the server said of itself, last; nil: nothing yet

	mu      sync.Mutex
	busy    int                     // calls, exchanges and subscriptions
	keeps   map[schemas.CallID]bool // tasks of the server's in it, which may outlive this process
	gone    bool
	idle    *time.Timer
	mirrors map[string][]mirror // what tools repeat in headers, as far as they were listed
	errands []*errand           // the oldest first
	pending []*query            // asked outside of any call
	subs    []*subscription
	uris    map[string]int // subscribed to, and by how many
	stream  streamState
	told    chan struct{} // closed when stream changes
}

// hosted is what a server says of itself when a session is opened.
type hosted struct {
	result []byte // of initialize
	info   []byte // serverInfo, nil if there is none
	caps   jsonrpc.Value
}

// visit returns the session for the client of a call, in which the caller is
// counted in until it leaves. Who comes first opens it, the others wait.
func (t *sessions) visit(ctx context.Context, m *mcpServer, c Call, meta jsonrpc.Value) (*session, error) {
	caps, info := []byte("{}"), []byte(`{"name":"waybill","version":"1"}`)
	if v := meta.Get(metaCaps); v.Kind() == jsonrpc.Object {
		caps = bytes.Clone(v.Raw())
	}
	if v := meta.Get(metaClient); v.Kind() == jsonrpc.Object {
		info = bytes.Clone(v.Raw())
	}
	if len(caps)+len(info) > maxGuest {
		return nil, faultf(Invalid, "clientCapabilities and clientInfo have more than %d bytes", maxGuest)
	}
	h := sha256.New()
	put(h, 'c', caps)
	put(h, 'i', info)
	slot := m.name + "\x00" + hex.EncodeToString(h.Sum(nil)[:16])
	id := idOfSession(c.Event)

	t.mu.Lock()
	s := t.of[id][slot]
	if s != nil && !s.guest.enter() {
		t.take(s) // it is being closed
		s = nil
	}
	if s == nil && !t.roomFor(m, id) {
		t.mu.Unlock()
		return nil, faultf(Busy, "%d sessions are in use at the server by this client, each with other capabilities", maxGuests)
	}
	if s == nil {
		g := &guest{
			t: t, m: m, id: id, slot: slot, caps: caps, info: info, busy: 1,
			leveling: make(chan struct{}, 1), wishing: make(chan struct{}, 1), told: make(chan struct{}),
		}
		var err error
		if s, err = t.add(m, c.Event, nil, g); err != nil {
			t.mu.Unlock()
			return nil, err
		}
		g.base = s.base
		t.wg.Go(func() { t.open(s) })
	}
	t.mu.Unlock()
	if _, err := s.wait(ctx); err != nil {
		select {
		case <-s.ready:
			s.guest.fail(s)
		default: // it is the caller who leaves
		}
		s.guest.leave()
		return nil, err
	}
	return s, nil
}

// fail says of a session that could not be opened that it is none.
func (g *guest) fail(s *session) {
	if s.fault == nil {
		return
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	g.gone = g.gone || g.server.Load() == nil
}

// roomFor makes room for one more session of a client at a server, of which each
// stands for other capabilities or another name: one that nobody is in is
// closed. mu is held.
func (t *sessions) roomFor(m *mcpServer, id sessionID) bool {
	n, spare := 0, (*session)(nil)
	for _, s := range t.of[id] {
		if s.m != m || s.guest == nil {
			continue
		}
		n++
		s.guest.mu.Lock()
		if s.guest.busy == 0 && len(s.guest.keeps) == 0 && !s.guest.gone {
			spare = s
		}
		s.guest.mu.Unlock()
	}
	if n < maxGuests {
		return true
	}
	if spare == nil {
		return false
	}
	g := spare.guest
	g.mu.Lock()
	g.gone = true
	g.idle.Stop()
	g.mu.Unlock()
	t.take(spare)
	if !t.closed {
		t.wg.Go(spare.end)
	}
	return true
}

// visited are the sessions of a client at a server.
func (t *sessions) visited(m *mcpServer, id sessionID) (all []*session) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, s := range t.of[id] {
		if s.m == m && s.guest != nil {
			all = append(all, s)
		}
	}
	return all
}

// session is the one that the guest is in now.
func (g *guest) session(ctx context.Context) (*session, error) {
	g.t.mu.Lock()
	s := g.t.of[g.id][g.slot]
	g.t.mu.Unlock()
	if s == nil {
		return nil, faultf(Unsent, "%w", errSessionClosed)
	}
	return s.wait(ctx)
}

// enter counts somebody in, unless the session is being closed.
func (g *guest) enter() bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.gone {
		return false
	}
	g.busy++
	if g.idle != nil {
		g.idle.Stop()
	}
	return true
}

func (g *guest) leave() {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.busy--; g.busy > 0 || g.gone || g.t.ctx.Err() != nil {
		return
	}
	if g.idle == nil {
		g.idle = time.AfterFunc(g.t.timing.idle, g.close)
		return
	}
	g.idle.Reset(g.t.timing.idle)
}

// close ends the session if nobody is in it.
func (g *guest) close() {
	g.mu.Lock()
	if g.busy > 0 || len(g.keeps) > 0 || g.gone {
		g.mu.Unlock()
		return
	}
	g.gone = true
	g.mu.Unlock()
	g.t.mu.Lock()
	s := g.t.of[g.id][g.slot]
	g.t.mu.Unlock()
	if s != nil && s.guest == g {
		s.end()
	}
}

// guests are the sessions that no other process goes on with. mu is held.
func (t *sessions) guests() (all []*session) {
	for _, of := range t.of {
		for _, s := range of {
			if s.guest != nil {
				all = append(all, s)
			}
		}
	}
	return all
}

// farewell closes the sessions of guests at their servers, as many as there is
// time for.
func (t *sessions) farewell(all []*session) {
	until := time.Now().Add(farewellTime)
	each(len(all), cap(t.deletes), func(i int) {
		s := all[i]
		s.guest.mu.Lock()
		s.guest.gone = true
		kept := len(s.guest.keeps) > 0
		if s.guest.idle != nil {
			s.guest.idle.Stop()
		}
		s.guest.mu.Unlock()
		if kept {
			return // whoever goes on with the tasks finds it in the log
		}
		select {
		case <-s.ready:
		default:
			return
		}
		if left := time.Until(until); s.fault == nil && s.upstream != "" && left > 0 {
			t.deleteNow(s.m, s.upstream, s.revision, min(left, t.timing.delete))
		}
	})
}

func (g *guest) log() *slog.Logger {
	return g.t.opt.Log.With("session", g.id.key, "tenant", g.id.tenant, "server", g.m.name)
}

// open opens the session.
func (g *guest) open(ctx context.Context, s *session) error {
	body := fmt.Appendf(nil, `{"jsonrpc":"2.0","id":%s,"method":"initialize","params":{"protocolVersion":%s,"capabilities":%s,"clientInfo":%s}}`,
		jsonrpc.Quote(s.by), jsonrpc.Quote(legacyRevisions[0]), g.caps, g.info)
	nobody := func() {}
	c := Call{
		ID: schemas.CallID(s.by), Event: s.base, Requested: &schemas.Requested{Target: schemas.Target{Method: "initialize"}, Revision: legacyRevisions[0]},
		Body: body, Connected: nobody, Heard: nobody,
	}
	inner, hangUp := context.WithCancel(ctx)
	defer hangUp()
	answer, err := s.initialize(inner, c, body, s.say)
	if err != nil {
		if f := new(Fault); errors.As(err, &f) && f.Kind == Garbled {
			g.m.doubt()
		}
		return err
	}
	if answer.Release != nil {
		answer.Release(hangUp)
	}
	if answer.ErrorCode != 0 {
		g.m.doubt() // it may be another server by now
		return faultf(Refused, "the server refuses to open a session: error %d", answer.ErrorCode)
	}
	m, err := jsonrpc.Decode(answer.Body, jsonrpc.Limits{Bytes: len(answer.Body), Depth: answerDepth, AllowCaseVariants: true})
	if err != nil {
		return &Fault{Kind: Garbled, Err: err}
	}
	h := &hosted{result: m.Result().Raw(), caps: m.Result().Get("capabilities")}
	if v := m.Result().Get("serverInfo"); v.Kind() == jsonrpc.Object {
		h.info = v.Raw()
	}
	g.server.Store(h)
	g.mu.Lock()
	g.pending = nil // those of a session that is lost
	g.mu.Unlock()
	s.initialized = true
	if err := s.tell(ctx, []byte(`{"jsonrpc":"2.0","method":"notifications/initialized"}`)); err != nil {
		s.t.delete(s.m, s.upstream, s.revision)
		return err
	}
	s.restore(ctx)
	return nil
}

// tail is the _meta that every result has, as a further member of it.
func (g *guest) tail() []byte {
	h := g.server.Load()
	if h == nil || h.info == nil {
		return nil
	}
	return slices.Concat([]byte(`,"_meta":{"`+metaServerInfo+`":`), h.info, []byte(`}`))
}

// send makes a request in the session. It is sent once more only where the server
// says that it does not know the session.
func (g *guest) send(ctx context.Context, s *session, c Call, body []byte, progress func([]byte) error) (Answer, error) {
	answer, err := s.call(ctx, c, body, progress)
	if !errors.Is(err, errLost) {
		return answer, err
	}
	if s, err = g.t.again(ctx, s); err != nil {
		return Answer{}, err
	}
	if answer, err = s.call(ctx, c, body, progress); errors.Is(err, errLost) {
		err = faultf(Refused, "%w, which it has just opened", errLost)
	}
	return answer, err
}

// aside makes a request of the gateway's own in the session.
func (g *guest) aside(ctx context.Context, s *session, method string, params []byte) error {
	nobody := func() {}
	c := Call{
		ID: schemas.CallID(s.number()), Event: s.base, Requested: &schemas.Requested{Target: schemas.Target{Method: method}},
		Connected: nobody, Heard: nobody,
	}
	c.Body = fmt.Appendf(nil, `{"jsonrpc":"2.0","id":%s,"method":%s,"params":%s}`, jsonrpc.Quote(string(c.ID)), jsonrpc.Quote(method), params)
	a, err := g.send(ctx, s, c, c.Body, s.say)
	if a.Release != nil {
		a.Release(func() {})
	}
	if err == nil && a.ErrorCode != 0 {
		err = fmt.Errorf("error %d", a.ErrorCode)
	}
	return err
}

// setLevel has the server log what the calls under way have asked for, and this
// one. What it says beyond the level of one of them is left out there. A server
// that does not take it logs as it likes.
func (g *guest) setLevel(ctx context.Context, s *session, e *errand, level int) {
	h := g.server.Load()
	if h == nil || !h.caps.Get("logging").Exists() {
		return
	}
	select {
	case g.leveling <- struct{}{}:
		defer func() { <-g.leveling }()
	case <-ctx.Done():
		return
	}
	e.mu.Lock()
	e.level = level
	e.mu.Unlock()
	g.mu.Lock()
	errands := slices.Clone(g.errands)
	g.mu.Unlock()
	for _, o := range errands {
		o.mu.Lock()
		if o.level >= 0 {
			level = min(level, o.level)
		}
		o.mu.Unlock()
	}
	text := jsonrpc.Quote(levels[level])
	s.mu.Lock()
	same := bytes.Equal(s.level, text)
	s.mu.Unlock()
	if same {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, g.t.timing.open)
	defer cancel()
	if err := g.aside(ctx, s, "logging/setLevel", slices.Concat([]byte(`{"level":`), text, []byte(`}`))); err != nil {
		g.log().Debug("the server's level is not set", "level", levels[level], "error", err)
	}
}

// How well a question suits an exchange. One that is of no call that is known goes
// to where a client waits, before one that has yet to come back, and may not: which
// of them it is asked in the server knows alone, and it finds its answer by the id.
const (
	fitsLater = 1 + iota // its client may come back
	fitsNow              // its client waits for it
	fitsOwn              // it is asked in this very call
)

func (e *errand) fits(call schemas.CallID) int {
	switch {
	case !e.asks:
		return 0
	case e.is(call):
		return fitsOwn
	case e.alone:
		return 0
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.attached {
		return fitsNow
	}
	return fitsLater
}

// asked takes what the server asks, within a call or outside of any.
func (g *guest) asked(ctx context.Context, s *session, call schemas.CallID, msg *jsonrpc.Message) {
	id := bytes.Clone(msg.ID().Raw())
	if msg.Method() == "ping" {
		g.reply(ctx, s, jsonrpc.ResultResponse(id, nil))
		return
	}
	if code, why := g.declines(msg); why != "" {
		g.log().Debug("a request of the server is declined", "method", clip(msg.Method(), maxWords), "why", why)
		g.reply(ctx, s, jsonrpc.ErrorResponse(id, code, why, nil))
		return
	}
	q := &query{s: s, id: id, method: msg.Method(), params: bytes.Clone(msg.Params().Raw())}
	var to *errand
	var over []*query
	g.mu.Lock()
	best := 0
	for _, e := range g.errands {
		if fit := e.fits(call); fit > best {
			to, best = e, fit
		}
	}
	q.own = best == fitsOwn
	if to == nil {
		over = g.keep(q)
	}
	g.mu.Unlock()
	if to != nil && !to.add(q) {
		over = append(over, q)
	}
	for _, q := range over {
		s.refuse(ctx, q.id, "too many requests wait for the client already")
	}
}

// keep lets a question wait for the next call that can ask it, and returns those
// for which there is no room any more. mu is held.
func (g *guest) keep(q *query) (over []*query) {
	g.pending = append(g.pending, q)
	size := 0
	for _, q := range g.pending {
		size += len(q.params)
	}
	for len(g.pending) > 1 && (len(g.pending) > maxPending || size > int(g.m.maxAnswer)/2) {
		size -= len(g.pending[0].params)
		over, g.pending = append(over, g.pending[0]), g.pending[1:]
	}
	return over
}

// reply answers a server.
func (g *guest) reply(ctx context.Context, s *session, body []byte) {
	ctx, cancel := context.WithTimeout(ctx, g.t.timing.cancel)
	defer cancel()
	if err := s.tell(ctx, body); err != nil {
		g.log().Warn("a request of the server is left without an answer", "error", err)
	}
}

// declines tells why the client cannot be asked this: a server must not ask for
// what it has not declared (2025-11-25, basic/lifecycle, "Operation"), and a
// client of these revisions can only be asked three things.
func (g *guest) declines(msg *jsonrpc.Message) (code int, why string) {
	name := ""
	switch msg.Method() {
	case "elicitation/create":
		name = "elicitation"
	case "sampling/createMessage":
		name = "sampling"
	case "roots/list":
		name = "roots"
	default:
		return jsonrpc.CodeMethodNotFound, "Method not found"
	}
	caps, err := jsonrpc.Parse(g.caps, jsonrpc.Limits{Bytes: len(g.caps), Depth: answerDepth, AllowCaseVariants: true})
	if err != nil || caps.Get(name).Kind() != jsonrpc.Object {
		return jsonrpc.CodeMethodNotFound, "The client has not declared " + name + "."
	}
	if p := msg.Params(); p.Exists() && p.Kind() != jsonrpc.Object {
		return jsonrpc.CodeInvalidParams, "params must be an object"
	}
	if mode, _ := msg.Params().Get("mode").Text(); name == "elicitation" && mode == "url" && !caps.Get(name, "url").Exists() {
		return jsonrpc.CodeInvalidParams, "The client has not declared elicitation by URL."
	}
	return 0, ""
}

// notified takes what the server says outside of calls.
func (g *guest) notified(s *session, msg *jsonrpc.Message) {
	if g.elsewhere(s, msg) {
		return
	}
	// A server may say here what belongs to a call and cannot say to which.
	level, token := -1, []byte(nil)
	switch msg.Method() {
	case "notifications/message":
		text, _ := msg.Params().Get("level").Text()
		if level = slices.Index(levels, text); level < 0 {
			level = len(levels)
		}
	case "notifications/progress":
		if token = msg.Params().Get("progressToken").Raw(); token == nil {
			return
		}
	default:
		g.log().Debug("a message of the server is of no call and nobody has subscribed to it", "method", clip(msg.Method(), maxWords))
		return
	}
	g.mu.Lock()
	errands := slices.Clone(g.errands)
	g.mu.Unlock()
	for _, e := range errands {
		e.mu.Lock()
		fits := e.attached && !e.over && e.sent && (token != nil && bytes.Equal(e.token, token) || token == nil && e.level >= 0 && e.level <= level)
		e.mu.Unlock()
		if !fits {
			continue
		}
		late := time.NewTimer(handTime)
		defer late.Stop()
		select {
		case e.said <- piece{msg: bytes.Clone(msg.Raw())}:
		case <-e.life.Done():
		case <-s.over.Done():
		case <-late.C: // it has stopped listening
		}
		return
	}
}

// elsewhere takes what belongs to no call, or to none any more.
func (g *guest) elsewhere(s *session, msg *jsonrpc.Message) bool {
	switch msg.Method() {
	case "notifications/tools/list_changed", "notifications/prompts/list_changed", "notifications/resources/list_changed", "notifications/resources/updated":
		g.publish(msg)
	case "notifications/cancelled":
		id := msg.Params().Get("requestId").Raw()
		g.mu.Lock()
		errands := slices.Clone(g.errands)
		g.pending = slices.DeleteFunc(g.pending, func(q *query) bool { return q.s == s && bytes.Equal(q.id, id) })
		g.mu.Unlock()
		for _, e := range errands {
			if e.withdraw(s, id) {
				break
			}
		}
	case "notifications/elicitation/complete":
	default:
		return false
	}
	return true
}
