package mcp

import (
	"bytes"
	"context"
	"errors"
	"net/http"
	"strings"
	"time"

	"waybill.dev/edge"
	"waybill.dev/schemas"
	"waybill.dev/schemas/jsonrpc"
)

// postLegacy takes one message of the era with sessions.
func (a *Adapter) postLegacy(w http.ResponseWriter, r *http.Request, p edge.Principal, m *jsonrpc.Message) {
	front, endpoint := a.endpoint(r)
	if m.IsRequest() && m.Method() == "initialize" && len(r.Header[headerSession]) == 0 {
		a.initialize(w, r, p, m, front, endpoint)
		return
	}
	id := m.ID().Raw()
	if !m.IsRequest() {
		id = withoutID
	}
	s, bad := a.session(r.Context(), r.Header, p, endpoint)
	if bad != nil {
		write(w, id, *bad)
		return
	}
	defer func() { s.leave(a.o.Now()) }()
	revision, bad := s.agree(r.Header)
	switch {
	case bad != nil:
	case m.IsResponse():
		bad = a.answered(r.Context(), s, m)
	case m.Method() == "notifications/cancelled" && m.IsNotification():
		bad = a.takeBack(r.Context(), s, m)
	case m.Method() == "initialize":
		bad = &reply{status: http.StatusBadRequest, code: jsonrpc.CodeInvalidRequest, message: "The session is initialized already."}
	default:
		a.callLegacy(w, r, p, m, &telling{a: a, s: s, w: w, front: front}, endpoint, revision)
		return
	}
	if bad != nil {
		write(w, id, *bad)
		return
	}
	w.WriteHeader(http.StatusAccepted)
}

// initialize opens a session: what the client asked for is stored first, and
// then the call is made by which the upstream learns of it. If that does not
// end with a result, the session ends too.
func (a *Adapter) initialize(w http.ResponseWriter, r *http.Request, p edge.Principal, m *jsonrpc.Message, front *schemas.Front, endpoint string) {
	id, params := m.ID().Raw(), m.Params()
	asked, _ := params.Get("protocolVersion").Text()
	now := a.o.Now().UTC()
	sessionID := newSessionID()
	s := &lasting{
		key: schemas.NewSessionKey(p.Tenant, p.Agent, sessionID), tenant: p.Tenant, agent: p.Agent, server: endpoint,
		openedAt: now, used: now, revision: agreeable(asked), checked: true, users: 1,
	}
	if bad := bounds(&schemas.Requested{Target: schemas.Target{Server: endpoint, Method: "initialize"}}, id); bad != nil {
		write(w, id, *bad)
		return
	}
	if _, bad := a.table.add(s, true); bad != nil {
		w.Header().Set("Retry-After", "30")
		write(w, id, *bad)
		return
	}
	defer func() { s.leave(a.o.Now()) }()
	client := clientName(params.Get("clientInfo"))
	o := s.event(&schemas.Opened{Protocol: Protocol, Name: client, Client: client, Server: endpoint, Revision: s.revision}, m.Raw(), now)
	if client == "" {
		o.Data.(*schemas.Opened).Name = string(p.Agent)
	}
	o.Trace, o.TraceState = trace(r.Header, readMeta(params.Get("_meta")))
	receipt, err := a.o.Store(r.Context(), o)
	if err != nil {
		// It may be stored: whoever hears of it ends it when it is idle.
		a.table.remove(s.key, false)
		c := caller{a: a, w: w, id: id, request: &schemas.Requested{}}
		c.notStored(err)
		return
	}
	s.mu.Lock()
	s.opened = receipt.Seq
	s.mu.Unlock()

	c := &telling{a: a, s: s, w: w, front: front, opening: sessionID}
	a.callLegacy(w, r, p, m, c, endpoint, s.revision)
	if c.agreed || c.left && c.resumable.Load() {
		return
	}
	if err := a.end(context.WithoutCancel(r.Context()), s, reasonRefused); err != nil {
		a.o.Log.Warn("session not closed, trying again when it is idle", "error", err)
	}
}

// legacyName says which member of a method's params is the name of the call.
func legacyName(method string) string {
	switch method {
	case "resources/subscribe", "resources/unsubscribe":
		return "uri"
	}
	return nameMember[method]
}

// callLegacy takes one request or notification of a session through the log. A
// client that leaves does not cancel it (2025-11-25, transports, "Sending
// Messages to the Server" 6): it goes on, and its client may come back for the
// rest.
func (a *Adapter) callLegacy(w http.ResponseWriter, r *http.Request, p edge.Principal, m *jsonrpc.Message, c *telling, endpoint, revision string) {
	s, now, id, oneWay := c.s, a.o.Now().UTC(), m.ID().Raw(), m.IsNotification()
	if oneWay {
		id = withoutID
	}
	params := m.Params()
	req := &schemas.Requested{Target: schemas.Target{Protocol: Protocol, Server: endpoint, Method: m.Method()}, Revision: revision, OneWay: oneWay}
	if c.front != nil {
		req.Server = c.front.Name
	}
	if member := legacyName(req.Method); member != "" {
		req.Name, _ = params.Get(member).Text()
	}
	c.json, c.sse = accepts(r.Header["Accept"])
	bad := bounds(req, id)
	if bad == nil && !oneWay && !c.json && !c.sse {
		bad = &reply{status: http.StatusNotAcceptable, code: codeBadRequest, message: "Not Acceptable: Accept must allow application/json and text/event-stream"}
	}
	if bad != nil {
		write(w, id, *bad)
		return
	}
	c.sse = c.sse && !oneWay
	if !oneWay && revision >= revision2025Nov && ofCoreTask(req.Method) && a.coreTask(r.Context(), c, m, endpoint, req) {
		return
	}
	c.call, c.id, c.request = schemas.NewCallID(now), id, req
	e := s.event(req, m.Raw(), now)
	e.Call, e.Root, e.Edge = c.call, c.call, a.o.Edge
	e.Trace, e.TraceState = trace(r.Header, readMeta(params.Get("_meta")))
	a.madeFor(r.Context(), &e, req)
	h := w.Header()
	h["Waybill-Call"] = []string{string(c.call)}
	h["Waybill-Session-Key"] = []string{string(s.key)}

	// The call's context is not the request's: only what is said here ends it.
	ctx, cancel := context.WithCancelCause(context.WithoutCancel(r.Context()))
	defer cancel(nil)
	c.cancel = cancel
	if until, ok := a.wantsTask(params, now); ok && !oneWay && revision >= revision2025Nov && req.Method == "tools/call" {
		req.TaskNow, req.TaskUntil = true, until
	}
	run := &running{event: e, stored: make(chan struct{}), ctx: ctx, cancel: cancel}
	run.event.Body = nil
	c.stored = run.stored
	if !oneWay {
		if !s.begin(id, run) {
			write(w, id, reply{status: http.StatusBadRequest, code: jsonrpc.CodeInvalidRequest, message: "A request with this id has not been answered yet: an id must not be used twice in a session."})
			return
		}
		_, _, release := s.take(c.call, cancel)
		defer release()
		defer func() { s.end(id, run, c.left) }()
	}
	defer context.AfterFunc(r.Context(), func() { cancel(c.whyLeft(context.Cause(r.Context()))) })()

	if c.front != nil {
		a.resolve(ctx, e, c.front, params)
	}
	if limit := a.o.Deadline(req.Server, req.Method); limit > 0 {
		req.Deadline = now.Add(limit)
		c.late = time.AfterFunc(a.remains(req.Deadline)+grace, func() { cancel(errOverdue) })
	}
	defer c.stop()
	err := a.o.Ask(ctx, e, c.emit)
	c.finish(ctx, err)
}

// whyLeft is the cause with which a call's context ends when its request's has.
// A client that can come back for the rest leaves the call to itself, and so
// does one that has merely lost its connection; what a shutdown cuts off is
// cancelled, unless the client knows how to ask for it again.
func (c *telling) whyLeft(cause error) error {
	switch {
	case c.resumable.Load():
		return schemas.ErrDetached
	case errors.Is(cause, edge.ErrDraining):
		return edge.ErrDraining
	case c.opening != "":
		return context.Canceled // nobody knows the session's ID
	}
	return schemas.ErrDetached
}

// takeBack stores the client's wish to cancel a call, and ends its stream
// without an answer (2025-11-25, cancellation). What is not in flight is no
// error: it may just have been answered.
func (a *Adapter) takeBack(ctx context.Context, s *lasting, m *jsonrpc.Message) *reply {
	id := m.Params().Get("requestId")
	run, over := s.call(id.Raw())
	if over {
		return nil
	}
	if run == nil {
		return a.takeBackElsewhere(ctx, s, id, m)
	}
	if run.reads {
		run.cancel(errTakenBack)
		return nil
	}
	select {
	case <-run.stored:
	case <-run.ctx.Done():
		select {
		case <-run.stored: // it was left to itself
		default:
			return nil // it was never stored, or its ending was just told
		}
	case <-ctx.Done():
		return badRequest("the connection was closed")
	}
	if bad := a.wish(ctx, run.event, m); bad != nil {
		return bad
	}
	run.cancel(errTakenBack)
	return nil
}

// wish stores that the client wants a call to end.
func (a *Adapter) wish(ctx context.Context, call schemas.Event, m *jsonrpc.Message) *reply {
	reason, _ := m.Params().Get("reason").Text()
	e := call.Next(&schemas.Cancel{Reason: short(reason)}, m.Raw())
	e.Time = a.o.Now().UTC()
	if _, err := a.o.Store(ctx, e); err != nil {
		a.o.Log.Error("cannot store", "call", e.Call, "error", err)
		return storeFailure(err)
	}
	return nil
}

// takeBackElsewhere is takeBack of a call that this process does not know: one
// that was made at another replica, or before a restart. The log has it. Of a
// call that has ended the wish comes to nothing.
func (a *Adapter) takeBackElsewhere(ctx context.Context, s *lasting, id jsonrpc.Value, m *jsonrpc.Message) *reply {
	if !id.Exists() {
		return nil
	}
	var call schemas.Event // the latest of this id: ids are not used twice, but by clients that err
	now := a.o.Now()
	opened, _ := s.from()
	for e, err := range a.o.Scan(ctx, s.tenant, s.key, schemas.KindRequested, opened) {
		if err != nil {
			a.o.Log.Error("call cannot be looked up", "session", s.key, "error", err)
			return &cannotRead
		}
		d, ok := e.Data.(*schemas.Requested)
		if !ok || d.Within(e) || d.OneWay || !d.Deadline.IsZero() && now.After(d.Deadline) {
			continue
		}
		if r, err := jsonrpc.Decode(e.Body, answerLimits); err == nil && bytes.Equal(r.ID().Raw(), id.Raw()) {
			e.Body = nil
			call = e
		}
	}
	if call.Call == "" {
		return nil
	}
	return a.wish(ctx, call, m)
}

// maxQuestion bounds the id of a question, of those who made it up too.
const maxQuestion = 128

// answered stores the client's answer to what an upstream asked in this very
// session.
func (a *Adapter) answered(ctx context.Context, s *lasting, m *jsonrpc.Message) *reply {
	unknown := badRequest("this is a response to a request that was not made in this session")
	id, ok := m.ID().Text()
	if !ok || id == "" || len(id) > maxQuestion || strings.ContainsFunc(id, func(r rune) bool { return r <= ' ' || r > '~' }) {
		return unknown
	}
	if task, key, ok := cutQuestion(id); ok {
		return a.answeredTask(ctx, s, m, task, key)
	}
	q, ok := s.question(id)
	if q.answered {
		return nil // the first one counts
	}
	if !ok {
		e, err := a.o.Asked(ctx, s.tenant, s.key, id)
		if errors.Is(err, schemas.ErrNotFound) {
			return unknown
		}
		if err != nil {
			a.o.Log.Error("question cannot be looked up", "session", s.key, "error", err)
			return &cannotRead
		}
		if d, ok := e.Data.(*schemas.Asked); !ok || d.ID != id || e.Session != s.key || e.Tenant != s.tenant {
			return unknown
		}
		q.event = e
	}
	d := q.event.Data.(*schemas.Asked)
	e := q.event.Next(&schemas.Answered{Target: d.Target, ID: d.ID}, m.Raw())
	e.Time = a.o.Now().UTC()
	if _, err := a.o.Store(ctx, e); err != nil {
		a.o.Log.Error("cannot store", "session", s.key, "error", err)
		return storeFailure(err)
	}
	s.answered(id)
	return nil
}

// storeFailure is the answer when something beside a call could not be stored.
func storeFailure(err error) *reply {
	switch {
	case errors.Is(err, schemas.ErrTooLarge):
		return &tooLargeToStore
	case errors.Is(err, schemas.ErrOverloaded):
		f := failures[schemas.FailOverloaded]
		return &f
	}
	return &cannotStore
}
