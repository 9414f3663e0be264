// Package mcp is the edge adapter for the Model Context Protocol over
// streamable HTTP: /mcp/{server} is one server, /mcp all of them together and
// /mcp/{view} a chosen set ([schemas.Front]).
//
// A request becomes one requested event, which the rest of the gateway
// ([Options].Ask) turns into events for the caller; each of these becomes bytes
// on the connection. What it needs to resume is in the log.
//
// Two eras share the URLs. A request whose MCP-Protocol-Version is 2026-07-28 or
// later, or that says so in its body and names no session, is of the modern one,
// which has no sessions: POST only, and a client that leaves cancels its call.
// All else is of the legacy era, 2025-11-25, 2025-06-18 and 2025-03-26 without
// its batches: initialize opens a session, whose ID the client sends along; GET
// is the session's own stream or, with Last-Event-ID, the rest of any; DELETE
// ends it; and a call goes on when its client is gone. A session is events as
// well, so any replica serves it, and one that has restarted.
//
// # What is changed on the way
//
// The body of a request is stored as it came. A server is sent it with the call's
// id, the server's own name of what is called, and, where the caller's stands there
// or it has to be there, _meta.traceparent and tracestate with the span of the call
// (workers/dispatch, trace.go), and otherwise as it came. An answer leaves as the upstream
// wrote it, byte for byte, but for these members:
//
//  1. id of a response: the client's own, in the client's bytes. (Upstream, the
//     call id stands in its place.)
//  2. _meta["io.modelcontextprotocol/subscriptionId"] of a notification's params
//     or a response's result, where it is the call id: the client's id.
//  3. cacheScope "public" in results of server/discover, tools/list,
//     prompts/list, resources/list, resources/templates/list and resources/read:
//     "private", for what one caller may see is not what another may.
//  4. ttlMs and cacheScope where one of these results, being complete, lacks
//     them: added as 0 and "private", as the revision requires both.
//  5. supportedVersions of server/discover: what the gateway serves.
//     What an error's status is in HTTP follows the revision.
//  6. In an event stream a CR between two tokens becomes LF, since no event can
//     carry it; in a JSON answer it stays.
//
// For a client with a session 2 to 5 do not apply, since its revisions have
// none of these members, and the status of an answered call is 200. Instead
//
//  7. id of a request that an upstream makes to the client: [schemas.Asked].ID,
//     unique in the session; and so params.requestId when the upstream takes it
//     back.
//
// At a front, for both eras,
//
//  8. uris of resources in results of resources/read, tools/call and
//     prompts/get, and in notifications/resources/updated: those of the front.
//
// Calls that become tasks, and what is changed there, are in tasks.go and
// coretasks.go.
//
// What the gateway answers by itself is in failures.go, and what it refuses
// before it stores anything in check.go.
//
// Begin with [New] and [Adapter.Routes].
package mcp

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"log/slog"
	"net/http"
	"time"
	"unicode/utf8"

	"waybill.dev/edge"
	"waybill.dev/schemas"
	"waybill.dev/schemas/jsonrpc"
)

// Protocol is the adapter's name in events.
const Protocol schemas.Protocol = "mcp"

// Revision is the protocol revision that is served without sessions.
const Revision = "2026-07-28"

// Options of an [Adapter].
type Options struct {
	// Ask is the rest of the gateway. It is given a requested event and emits
	// what is addressed to the caller, from its own goroutine, the ending last.
	// An error that wraps [schemas.ErrOverloaded] or [schemas.ErrTooLarge] means
	// that the request was not stored, and so does [schemas.ErrInvalid] when
	// nothing was emitted. When its context ends before the call
	// does, Ask stores the wish to cancel.
	Ask schemas.Handler

	Store schemas.Emit    // for what is no request: the events of a session, the wish to cancel
	Edge  schemas.Replica // this process

	// Deadline is the time a call may take; 0 or a nil function: any.
	Deadline func(server, method string) time.Duration

	// What the log holds, for sessions with an ID. Without these there is nothing
	// in it beyond what this process has seen.

	// Follow hands on what is stored after a sequence of the call of `of`, to its
	// ending, or, where that names no call, what its session has outside of any.
	Follow func(ctx context.Context, of schemas.Event, after uint64, emit schemas.Emit) error
	// Load reads the event at a sequence; [schemas.ErrNotFound].
	Load func(ctx context.Context, seq uint64) (schemas.Event, error)
	// Latest reads the newest event of a kind in a session; [schemas.ErrNotFound].
	Latest func(context.Context, schemas.Tenant, schemas.SessionKey, schemas.Kind) (schemas.Event, error)
	// Asked reads what a session's client was asked by its ID; [schemas.ErrNotFound].
	Asked func(ctx context.Context, t schemas.Tenant, s schemas.SessionKey, id string) (schemas.Event, error)
	// Scan reads the events of a kind in a session that are stored after a
	// sequence, the oldest first.
	Scan func(ctx context.Context, t schemas.Tenant, s schemas.SessionKey, k schemas.Kind, after uint64) iter.Seq2[schemas.Event, error]
	// Sessions emits the opened and closed events of all sessions, those in the
	// log first, until ctx is done.
	Sessions func(ctx context.Context, emit schemas.Emit) error

	// Shared says that other replicas may serve the same sessions, which are told
	// through the log where a session's client listens.
	Shared bool
	// Task reads what is addressed to a task ([schemas.Event.Task]) after its first
	// event, oldest first.
	Task func(ctx context.Context, first schemas.Event) iter.Seq2[schemas.Event, error]
	// Tasked reads the events of a tenant that say how tasks stand, those that are
	// stored after a sequence, the oldest first.
	Tasked func(ctx context.Context, t schemas.Tenant, after uint64) iter.Seq2[schemas.Event, error]
	// TaskTime is how long a call may go on as a task; 0: none becomes one.
	TaskTime time.Duration
	// Tasks tells whether tools at the endpoint of this name may become tasks by
	// the gateway's doing, so that it declares the extension; nil: at none.
	Tasks func(endpoint string) bool

	// BySpan finds the request of a call that a server was told by this span that it
	// is called by ([schemas.PartUpstream]), which was minted at about this time;
	// [schemas.ErrNotFound]. nil: no call is found to be made for another.
	BySpan func(ctx context.Context, t schemas.Tenant, span string, minted time.Time) (schemas.Event, error)
	// ActsAs tells whether a server is known to call as this agent, beside the agent
	// that called it; nil: it does not.
	ActsAs func(server string, as schemas.Agent) bool
	// Flags are those of a trace that no caller named ([schemas.Event.TraceFlags]).
	Flags func(traceID string) string

	Fronts        []*schemas.Front // endpoints that show several servers as one
	SessionLimits SessionLimits    // of sessions with an ID

	Now    func() time.Time // default: time.Now
	Limits jsonrpc.Limits   // of requests
	Log    *slog.Logger     // default: discard
}

// Adapter turns HTTP into events and back. It is safe for concurrent use.
type Adapter struct {
	o        Options
	fronts   map[string]*schemas.Front // by name; immutable
	sessions *seen                     // those without an ID that were opened
	table    *table                    // those with one
	long     names                     // what shortened names stand for
	watched  watched                   // tasks
	makers   makers                    // calls for which others are made
}

// New returns an adapter.
func New(o Options) *Adapter {
	if o.Now == nil {
		o.Now = time.Now
	}
	if o.Deadline == nil {
		o.Deadline = func(string, string) time.Duration { return 0 }
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	if o.Follow == nil {
		o.Follow = func(ctx context.Context, _ schemas.Event, _ uint64, _ schemas.Emit) error {
			<-ctx.Done()
			return ctx.Err()
		}
	}
	if o.Load == nil {
		o.Load = func(context.Context, uint64) (e schemas.Event, err error) { return e, schemas.ErrNotFound }
	}
	if o.Latest == nil {
		o.Latest = func(context.Context, schemas.Tenant, schemas.SessionKey, schemas.Kind) (e schemas.Event, err error) {
			return e, schemas.ErrNotFound
		}
	}
	if o.Task == nil {
		o.Task = func(context.Context, schemas.Event) iter.Seq2[schemas.Event, error] {
			return func(func(schemas.Event, error) bool) {}
		}
	}
	if o.Tasked == nil {
		o.Tasked = func(context.Context, schemas.Tenant, uint64) iter.Seq2[schemas.Event, error] {
			return func(func(schemas.Event, error) bool) {}
		}
	}
	if o.Tasks == nil {
		o.Tasks = func(string) bool { return false }
	}
	if o.Asked == nil {
		o.Asked = func(context.Context, schemas.Tenant, schemas.SessionKey, string) (e schemas.Event, err error) {
			return e, schemas.ErrNotFound
		}
	}
	if o.Scan == nil {
		o.Scan = func(context.Context, schemas.Tenant, schemas.SessionKey, schemas.Kind, uint64) iter.Seq2[schemas.Event, error] {
			return func(func(schemas.Event, error) bool) {}
		}
	}
	if o.Sessions == nil {
		o.Sessions = func(ctx context.Context, _ schemas.Emit) error {
			<-ctx.Done()
			return nil
		}
	}
	if o.BySpan == nil {
		o.BySpan = func(context.Context, schemas.Tenant, string, time.Time) (e schemas.Event, err error) {
			return e, schemas.ErrNotFound
		}
	}
	if o.ActsAs == nil {
		o.ActsAs = func(string, schemas.Agent) bool { return false }
	}
	a := &Adapter{makers: newMakers(), o: o, fronts: map[string]*schemas.Front{}, sessions: newSeen(maxSeen, time.Hour), table: newTable(o.SessionLimits)}
	a.fronts[schemas.Gateway] = &schemas.Front{Name: schemas.Gateway} // of no server, unless told
	for _, f := range o.Fronts {
		a.fronts[f.Name] = f
	}
	return a
}

// Routes lists what the adapter serves. GET and DELETE belong to sessions with
// an ID; a modern client's are answered 405 (streamable HTTP, "Earlier
// Streamable HTTP Revisions").
func (a *Adapter) Routes() []edge.Route {
	var routes []edge.Route
	for _, path := range []string{"/mcp", "/mcp/{server}"} {
		routes = append(routes,
			edge.Route{Pattern: "POST " + path, Serve: a.post, Refuse: refuse},
			edge.Route{Pattern: "GET " + path, Serve: a.get, Refuse: refuse, Stream: true},
			edge.Route{Pattern: "DELETE " + path, Serve: a.delete, Refuse: refuse},
		)
	}
	return routes
}

const (
	// patience is how long an answer may take before the client sees a stream
	// begin: long enough for nearly every call to be answered as plain JSON
	// with the HTTP status that belongs to it, short enough for proxies.
	patience  = 5 * time.Second
	keepAlive = 15 * time.Second

	// grace is how long after a call's deadline its ending may come: the
	// deadline binds those who carry it out, and they are the ones to end it.
	grace = 5 * time.Second
)

// post takes one message through the log.
func (a *Adapter) post(w http.ResponseWriter, r *http.Request, p edge.Principal) {
	body := edge.Body(r)
	m, err := jsonrpc.Decode(body, a.o.Limits)
	if err != nil {
		write(w, nil, undecodable(err))
		return
	}
	if isLegacy(m, r.Header) {
		a.postLegacy(w, r, p, m)
		return
	}
	id, oneWay := m.ID().Raw(), m.IsNotification()
	if m.IsResponse() {
		write(w, nil, reply{status: http.StatusBadRequest, code: jsonrpc.CodeInvalidRequest,
			message: "A client sends requests and notifications only: this is a response."})
		return
	}
	front, endpoint := a.endpoint(r)
	req, bad := check(m, r.Header)
	if bad == nil {
		if req.Server = endpoint; front != nil {
			req.Server = front.Name
		}
		bad = bounds(&req.Requested, id)
	}
	stream := req.Method == "subscriptions/listen" && !oneWay
	json, sse := accepts(r.Header["Accept"])
	if bad == nil && !oneWay && (!json && !sse || stream && !sse) {
		bad = &reply{status: http.StatusNotAcceptable, code: jsonrpc.CodeInvalidRequest,
			message: "Accept must allow application/json and text/event-stream; subscriptions/listen answers with the latter."}
	}
	now := a.o.Now().UTC()
	var session session
	if bad == nil {
		session, bad = nameSession(r.Header, req.meta, p, now)
	}
	if bad != nil {
		if oneWay {
			id = withoutID
		}
		write(w, id, *bad)
		return
	}

	var taskIDs jsonrpc.Value
	if stream {
		taskIDs = m.Params().Get("notifications", "taskIds")
	}
	if !oneWay && (ofTask(req.Method) || taskIDs.Exists()) && !req.meta.takesTasks() {
		write(w, id, undeclared)
		return
	}
	if !oneWay && ofTask(req.Method) {
		c := &caller{a: a, w: w, front: front, id: id, request: &req.Requested, json: json, sse: !json, cancel: func(error) {}}
		c.begin(time.Time{})
		defer c.stop()
		if bad := c.task(r.Context(), p, endpoint, m); bad != nil {
			_ = c.fail(*bad)
		}
		return
	}

	req.OneWay, req.Stream = oneWay, stream
	call := schemas.NewCallID(now)
	e := schemas.Event{
		Tenant: p.Tenant, Session: session.key, Call: call, Root: call, Agent: p.Agent,
		Edge: a.o.Edge, Time: now, Data: &req.Requested, Body: body,
	}
	e.Trace, e.TraceState = trace(r.Header, req.meta)
	h := w.Header()
	// Not Waybill-Session: with that a client names a session, and one that
	// sent the key back would name another.
	h["Waybill-Call"] = []string{string(call)}
	h["Waybill-Session-Key"] = []string{string(session.key)}

	parent := r.Context()
	if stream {
		ctx, release := edge.UntilDrain(parent)
		defer release()
		parent = ctx
	}
	ctx, cancel := context.WithCancelCause(parent)
	defer cancel(nil)
	c := &caller{
		a: a, w: w, front: front, call: call, id: id, request: &req.Requested,
		json: json, sse: sse && !oneWay, cancel: cancel,
	}
	if stream && taskIDs.Exists() {
		watch, bad := c.watch(ctx, p, endpoint, taskIDs)
		if bad != nil {
			write(w, id, *bad)
			return
		}
		c.watching = watch
		if onlyTasks(m.Params().Get("notifications")) {
			c.begin(time.Time{})
			defer c.stop()
			watch.alone(ctx)
			return
		}
		defer watch.wg.Wait()
		defer cancel(nil)
	}
	if err := a.open(ctx, e, session); err != nil {
		c.notStored(err)
		return
	}
	a.madeFor(ctx, &e, &req.Requested)
	if front != nil {
		a.resolve(ctx, e, front, m.Params())
	}
	limit := a.o.Deadline(req.Server, req.Method)
	if stream {
		limit = 0
	}
	if limit > 0 {
		req.Deadline = now.Add(limit)
	}
	if req.Method == "tools/call" && !oneWay && a.o.TaskTime > 0 && req.meta.takesTasks() {
		req.TaskUntil = now.Add(a.o.TaskTime)
	}
	c.begin(req.Deadline)
	defer c.stop()
	err = a.o.Ask(ctx, e, c.emit)
	c.finish(ctx, err)
}

// remains is the time that a call still has: of that from its beginning, looking
// for what a name stands for may have taken some.
func (a *Adapter) remains(deadline time.Time) time.Duration {
	return max(0, deadline.Sub(a.o.Now()))
}

// open stores the session's opened event, once for each session and process;
// a second one, from another process, has the same ID and changes nothing.
func (a *Adapter) open(ctx context.Context, e schemas.Event, s session) error {
	if a.sessions.has(s.key) {
		return nil
	}
	o := e.Next(&schemas.Opened{Protocol: Protocol, Name: s.name, Client: s.client}, nil)
	o.Time, o.Call, o.Root, o.Edge = e.Time, "", "", ""
	if _, err := a.o.Store(ctx, o); err != nil {
		return err
	}
	a.sessions.add(s.key)
	return nil
}

// Sizes of what goes into the envelope of an event. It travels in a header of
// JetStream, which takes no more than 64 KiB of them, and in JSON a character
// such as "<" becomes six. So a name has at most 24 KiB there; what is too much
// together, with the Mcp-Param headers, the log refuses ([schemas.ErrTooLarge]).
const (
	maxServer = 256
	maxMethod = 256
	maxName   = 4 << 10
	maxID     = 1 << 10
)

func bounds(r *schemas.Requested, id []byte) *reply {
	switch {
	case len(r.Server) > maxServer || !utf8.ValidString(r.Server):
		denied := deniedReply(r.Target) // like any other name that is not served
		return &denied
	case len(r.Method) > maxMethod:
		return &reply{status: http.StatusBadRequest, code: jsonrpc.CodeInvalidRequest, message: fmt.Sprintf("The method may have at most %d bytes.", maxMethod)}
	case len(r.Name) > maxName:
		return &reply{status: http.StatusBadRequest, code: jsonrpc.CodeInvalidParams, message: fmt.Sprintf("The name (of a tool or prompt, the uri of a resource, a taskId) may have at most %d bytes.", maxName)}
	case len(id) > maxID:
		return &reply{status: http.StatusBadRequest, code: jsonrpc.CodeInvalidRequest, message: fmt.Sprintf("The id may have at most %d bytes.", maxID)}
	}
	return nil
}

// undecodable answers what is no message. Its id is not known, which JSON-RPC
// 2.0 §5 writes as null.
func undecodable(err error) reply {
	f := reply{status: http.StatusBadRequest, code: jsonrpc.Code(err)}
	if errors.Is(err, jsonrpc.ErrTooLarge) {
		f.status = http.StatusRequestEntityTooLarge
	}
	f.message = "The body is not one JSON-RPC message: " + err.Error() + "."
	return f
}
