package mcp

import (
	"context"
	"errors"
	"net/http"
	"slices"
	"sync"
	"time"

	"waybill.dev/schemas"
)

// trace returns the W3C trace context that came with a message: of its _meta
// (2026-07-28, SEP-414), which is of the message itself, before that of the HTTP
// request, which may be somebody's on the way. A traceparent that is not
// well-formed is as good as none, wherever it stands; a tracestate counts beside
// its own traceparent only, and one that is not well-formed is left out.
func trace(h http.Header, m meta) (parent, state string) {
	if s, ok := m.traceparent.Text(); ok {
		if parent, ok = schemas.Traceparent(s); ok {
			if s, ok := m.tracestate.Text(); ok {
				state, _ = schemas.Tracestate(s)
			}
			return parent, state
		}
	}
	if v := h["Traceparent"]; len(v) == 1 {
		var ok bool
		if parent, ok = schemas.Traceparent(v[0]); ok {
			state, _ = schemas.Tracestate(h["Tracestate"]...)
			return parent, state
		}
	}
	return "", ""
}

const (
	backFor  = time.Hour   // how long after it was made a call may be called back for
	findTime = time.Second // in which the call has to be found
	findMost = 16          // that are looked for at once, half of them for one tenant
	maxMaker = 1 << 12     // that are remembered, at some 500 bytes each
)

// madeFor finds out whether a call is made by a server for a call that the
// gateway makes of it: then its trace context is the one with which the server
// was called, or comes of that. The call gets that one for its parent, and its
// root, where the caller may know of it: it is of the same tenant, and calls as
// the agent that made the parent or as one of those that the parent's server is
// known to act as. Of all others only the trace is kept, which they have named
// themselves.
//
// What it is for is seen in the span itself, so that what others trace costs
// nothing; the call is then looked for in the log, where any replica finds it.
func (a *Adapter) madeFor(ctx context.Context, e *schemas.Event, req *schemas.Requested) {
	if e.Trace == "" {
		return
	}
	now := a.o.Now()
	for _, span := range e.MadeFor() {
		minted, ok := schemas.SpanTime(span, now)
		if !ok || now.Sub(minted) > backFor {
			continue
		}
		parent, ok := a.maker(ctx, e.Tenant, span, minted)
		if !ok {
			continue
		}
		of, ok := parent.Data.(*schemas.Requested)
		if !ok || parent.Tenant != e.Tenant || parent.TraceID() != e.TraceID() {
			continue
		}
		if parent.Agent != e.Agent && !a.o.ActsAs(of.Server, e.Agent) {
			continue
		}
		e.Parent, e.Root, req.Back = parent.Call, parent.Call, true
		if parent.Root != "" {
			e.Root = parent.Root
		}
		if parent.Session == e.Session {
			return
		}
		// Before the call itself, of which the log would otherwise have more than the
		// parent's session says.
		c := parent.Next(&schemas.Caused{Call: e.Call, Session: e.Session, Agent: e.Agent}, nil)
		c.Time, c.Edge = e.Time, ""
		if _, err := a.o.Store(ctx, c); err != nil {
			a.o.Log.Warn("not stored that a call is made for another", "call", e.Call, "parent", parent.Call, "error", err)
		}
		return
	}
}

// maker finds the call whose server was called under the span.
func (a *Adapter) maker(ctx context.Context, t schemas.Tenant, span string, minted time.Time) (schemas.Event, bool) {
	key := string(t) + " " + span
	if e, ok := a.makers.get(key); ok {
		return e, true
	}
	ctx, cancel := context.WithTimeout(ctx, findTime)
	defer cancel()
	leave, ok := a.makers.enter(ctx, t)
	defer leave()
	if !ok {
		a.o.Log.Warn("not found for what a call is made: too many are looked for", "span", span)
		return schemas.Event{}, false
	}
	e, err := a.o.BySpan(ctx, t, span, minted)
	if err != nil {
		if !errors.Is(err, schemas.ErrNotFound) {
			a.o.Log.Warn("not found for what a call is made", "span", span, "error", err)
		}
		return schemas.Event{}, false
	}
	e.Body = nil
	a.makers.add(key, e)
	return e, true
}

// makers are calls that others were made for lately.
type makers struct {
	places chan struct{} // of who looks for one

	mu    sync.Mutex                       // guards the rest
	of    map[schemas.Tenant]chan struct{} // places of a tenant; there are few tenants
	found map[string]schemas.Event
	order []string // of found, the oldest first
}

func newMakers() makers {
	return makers{places: make(chan struct{}, findMost), of: map[schemas.Tenant]chan struct{}{}, found: map[string]schemas.Event{}}
}

// enter waits for a place to look for a call of a tenant, until ctx is done. A tenant
// waits for its own first, so that it takes none from others. leave is to be called in
// any case.
func (m *makers) enter(ctx context.Context, t schemas.Tenant) (leave func(), ok bool) {
	m.mu.Lock()
	own := m.of[t]
	if own == nil {
		own = make(chan struct{}, findMost/2)
		m.of[t] = own
	}
	m.mu.Unlock()
	var taken []chan struct{}
	leave = func() {
		for _, places := range taken {
			<-places
		}
	}
	for _, places := range []chan struct{}{own, m.places} {
		select {
		case places <- struct{}{}:
			taken = append(taken, places)
		case <-ctx.Done():
			return leave, false
		}
	}
	return leave, true
}

func (m *makers) get(key string) (schemas.Event, bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	e, ok := m.found[key]
	return e, ok
}

func (m *makers) add(key string, e schemas.Event) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if _, ok := m.found[key]; ok {
		return
	}
	if len(m.order) >= maxMaker {
		for _, old := range m.order[:maxMaker/4] {
			delete(m.found, old)
		}
		m.order = slices.Clone(m.order[maxMaker/4:])
	}
	m.found[key], m.order = e, append(m.order, key)
}
