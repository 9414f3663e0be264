package mcp

import (
	"context"
	"errors"
	"net/http"
	"strconv"
	"strings"
	"time"

	"waybill.dev/edge"
	"waybill.dev/schemas"
	"waybill.dev/schemas/jsonrpc"
)

// get serves the stream of a session, and the rest of any stream that was cut
// (2025-11-25, transports, "Listening for Messages from the Server" and
// "Resumability and Redelivery"). All that it serves comes from the log.
func (a *Adapter) get(w http.ResponseWriter, r *http.Request, p edge.Principal) {
	if r.Method != http.MethodGet || modernHeader(r.Header) {
		notServed(w, r)
		return
	}
	front, endpoint := a.endpoint(r)
	if _, ok := accepts(r.Header["Accept"]); !ok || len(r.Header["Accept"]) == 0 {
		write(w, withoutID, reply{status: http.StatusNotAcceptable, code: codeBadRequest, message: "Not Acceptable: Accept must allow text/event-stream"})
		return
	}
	anchor, after, back, bad := lastEvent(r.Header)
	var s *lasting
	if bad == nil {
		s, bad = a.session(r.Context(), r.Header, p, endpoint)
	}
	if bad != nil {
		write(w, withoutID, *bad)
		return
	}
	defer func() { s.leave(a.o.Now()) }()
	revision, bad := s.agree(r.Header)
	c := &telling{a: a, s: s, w: w, front: front, sse: true, resumed: true, after: after}
	opened, _ := s.from()
	if bad == nil && back && anchor != opened {
		bad = a.find(r.Context(), c, anchor)
	}
	if bad != nil {
		write(w, withoutID, *bad)
		return
	}

	// Waiting for what may never come would only hold up a shutdown.
	lasting, release := edge.UntilDrain(r.Context())
	defer release()
	ctx, cancel := context.WithCancelCause(lasting)
	defer cancel(nil)
	c.cancel = cancel
	older, own, release := s.take(c.call, cancel)
	defer release()
	if c.call == "" {
		defer func() {
			s.cutOff(a.o.Now())
			if c.attached != nil {
				a.say(r.Context(), s, c.attached, true)
			}
		}()
	}
	if !back {
		if older != nil {
			<-older.done // it was told to end; how far it got is known then
		}
		anchor, c.after = s.from()
	}
	if c.call == "" {
		s.received(c.after)
	}
	if c.call == "" && a.o.Shared {
		at, after, err := a.attach(ctx, s, back, c.after)
		if err != nil {
			write(w, withoutID, *storeFailure(err))
			return
		}
		c.attached, c.after = at, max(c.after, after)
		s.mu.Lock()
		own.at = at
		s.mu.Unlock()
	}
	if c.request != nil && !c.request.Deadline.IsZero() {
		c.late = time.AfterFunc(a.remains(c.request.Deadline)+grace, func() { cancel(errOverdue) })
	}
	w.Header()["Waybill-Session-Key"] = []string{string(s.key)}
	c.begin(anchor, !back && primes(revision))
	defer c.stop()
	if c.call == "" {
		if err := c.stream.Open(); err != nil {
			return
		}
	}
	of := s.event(nil, nil, time.Time{})
	of.Call = c.call
	from := c.after
	if c.call != "" {
		from = anchor // to know what was seen, and whether the call was taken back
	}
	err := a.o.Follow(ctx, of, from, c.emit)
	switch cause := context.Cause(ctx); {
	case c.ended:
		// Nothing was left to be told: the client has had the answer, or has
		// taken the call back. Some come back all the same (the TypeScript SDK
		// v1, after an error), and would again and again if they were not told
		// that there is no more to come (WHATWG HTML §9.2.3).
		if opened, _ := c.stream.Last(nil); !opened {
			w.WriteHeader(http.StatusNoContent)
		}
	case c.call != "" && errors.Is(cause, edge.ErrDraining):
		c.leave(draining)
	case errors.Is(cause, errOverdue):
		e := s.event(&schemas.Cancel{Reason: errOverdue.Error()}, nil, a.o.Now().UTC())
		e.Call, e.Root = c.call, c.call
		if _, err := a.o.Store(context.WithoutCancel(ctx), e); err != nil {
			a.o.Log.Error("cannot store", "call", c.call, "error", err)
		}
		_ = c.fail(0, overdue)
	// A stream that has not begun must not look like one with nothing in it.
	case errors.Is(cause, errClosed):
		c.leave(*sessionUnknown())
	case errors.Is(cause, schemas.ErrDetached):
		c.leave(goneOn)
	case err != nil && cause == nil:
		a.o.Log.Warn("stream ended, its client may come back", "session", s.key, "call", c.call, "error", err)
		c.leave(cannotRead)
	}
}

// find makes c the rest of the call whose request is at a sequence of the log.
// What is not a call that this session's client has made is unknown.
func (a *Adapter) find(ctx context.Context, c *telling, anchor uint64) *reply {
	// Not 404, by which a client would take its session for ended.
	unknown := badRequest("the stream of this Last-Event-ID is not found")
	e, err := a.o.Load(ctx, anchor)
	if errors.Is(err, schemas.ErrNotFound) {
		return unknown
	}
	if err != nil {
		a.o.Log.Error("event cannot be looked up", "session", c.s.key, "seq", anchor, "error", err)
		return &cannotRead
	}
	d, ok := e.Data.(*schemas.Requested)
	if !ok || e.Tenant != c.s.tenant || e.Session != c.s.key || d.Within(e) || d.OneWay || d.Revision >= Revision {
		return unknown
	}
	m, err := jsonrpc.Decode(e.Body, answerLimits)
	if err != nil {
		a.o.Log.Error("stored request cannot be read", "call", e.Call, "error", err)
		return unknown
	}
	c.call, c.id, c.request = e.Call, m.ID().Raw(), d
	return nil
}

// lastEvent reads the Last-Event-ID header; back tells whether it was there.
func lastEvent(h http.Header) (anchor, after uint64, back bool, bad *reply) {
	values := h[headerLast]
	if len(values) == 0 || len(values) == 1 && values[0] == "" {
		return 0, 0, false, nil
	}
	if len(values) == 1 {
		first, second, _ := strings.Cut(values[0], "-")
		var ok1, ok2 bool
		anchor, ok1 = sequence(first)
		after, ok2 = sequence(second)
		if ok1 && ok2 && anchor <= after {
			return anchor, after, true, nil
		}
	}
	return 0, 0, false, badRequest("Last-Event-ID is not the id of an event that was sent here")
}

// sequence reads a sequence of the log as [telling.at] writes it.
func sequence(s string) (uint64, bool) {
	n, err := strconv.ParseUint(s, 10, 64)
	return n, err == nil && n > 0 && strconv.FormatUint(n, 10) == s
}

// delete ends a session, as its client wants (2025-11-25, transports, "Session
// Management" 5).
func (a *Adapter) delete(w http.ResponseWriter, r *http.Request, p edge.Principal) {
	if modernHeader(r.Header) {
		notServed(w, r)
		return
	}
	_, endpoint := a.endpoint(r)
	s, bad := a.session(r.Context(), r.Header, p, endpoint)
	if bad == nil {
		defer func() { s.leave(a.o.Now()) }()
		if err := a.end(r.Context(), s, reasonClient); err != nil {
			a.o.Log.Error("session not closed", "error", err)
			bad = storeFailure(err)
		}
	}
	if bad != nil {
		write(w, withoutID, *bad)
		return
	}
	w.WriteHeader(http.StatusNoContent)
}

// notServed answers GET and DELETE where the era has neither, in the words of
// the shell.
func notServed(w http.ResponseWriter, r *http.Request) {
	w.Header()["Allow"] = []string{"POST"}
	edge.WriteJSON(w, http.StatusMethodNotAllowed, []byte(`{"error":{"code":"method","message":"the method `+r.Method+` is not served at this path"}}`))
}
