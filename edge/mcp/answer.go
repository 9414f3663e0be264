package mcp

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"math"
	"net/http"
	"strconv"
	"time"

	"waybill.dev/edge"
	"waybill.dev/schemas"
	"waybill.dev/schemas/jsonrpc"
	"waybill.dev/schemas/sse"
)

// caller is the client's side of one call: it turns events into the answer. It
// belongs to the goroutine that runs Ask; what the timers do is in the stream.
type caller struct {
	a       *Adapter
	w       http.ResponseWriter
	front   *schemas.Front // nil at the endpoint of one server
	call    schemas.CallID
	id      []byte // the client's, in its bytes; empty for a notification
	request *schemas.Requested
	json    bool // the client takes JSON
	sse     bool // the client takes an event stream

	stream   *edge.Stream // nil unless sse
	late     *time.Timer  // nil without a deadline
	cancel   context.CancelCauseFunc
	watching *watching // the tasks in a subscription; nil: none

	next  int  // index of the next progressed event
	heard bool // something was emitted, so the request was stored
	ended bool // the answer has been given
}

var errOverdue = errors.New("no ending by the deadline")

// begin starts the timers; a zero deadline is none.
func (c *caller) begin(deadline time.Time) {
	if c.sse {
		c.stream = edge.NewStream(c.w, edge.StreamOptions{Patience: patience, KeepAlive: keepAlive, Lost: c.cancel})
	}
	if !deadline.IsZero() {
		c.late = time.AfterFunc(c.a.remains(deadline)+grace, func() { c.cancel(errOverdue) })
	}
}

// stop stops the timers.
func (c *caller) stop() {
	if c.stream != nil {
		c.stream.Stop()
	}
	if c.late != nil {
		c.late.Stop()
	}
}

// emit writes one event to the client. It returns an error when the client
// cannot be written to; the call's context ends, too.
func (c *caller) emit(ctx context.Context, e schemas.Event) (schemas.Receipt, error) {
	if c.ended {
		return schemas.Receipt{}, nil
	}
	c.heard = true
	switch d := e.Data.(type) {
	case *schemas.Progressed:
		// A client that takes JSON only is not told of progress.
		if d.Index < c.next || c.stream == nil {
			return schemas.Receipt{}, nil // seen: a worker that died was replaced
		}
		c.next = d.Index + 1
		body := c.a.outward(c.front, c.request.Server, c.renumber(e.Body))
		if c.watching == nil {
			return schemas.Receipt{}, c.stream.Send(sse.Event{Data: body})
		}
		err := c.stream.Send(sse.Event{Data: c.watching.acknowledge(body)})
		c.watching.begin(ctx)
		return schemas.Receipt{}, err
	case *schemas.Notified:
		// Only a subscription hears of what is outside of its call
		// (streamable HTTP, "Receiving Messages").
		if !c.request.Stream || d.ToServer {
			return schemas.Receipt{}, nil
		}
		return schemas.Receipt{}, c.stream.Send(sse.Event{Data: c.a.outward(c.front, d.Server, c.renumber(e.Body))})
	case *schemas.Held:
		c.a.hold(c.late, c.request, d)
		if c.stream != nil && !c.request.Stream {
			if body := c.a.waiting(ctx, e.Call, d); body != nil {
				return schemas.Receipt{}, c.stream.Send(sse.Event{Data: body})
			}
		}
	case *schemas.Asked:
		// The revision has no requests to the client. Dispatch translates or
		// refuses them; one that comes here cannot be answered.
		c.a.o.Log.Warn("an upstream's request cannot be put to this client", "call", c.call, "method", d.Method)
	case *schemas.Tasked:
		return schemas.Receipt{}, c.created(e)
	case *schemas.Completed:
		return schemas.Receipt{}, c.complete(d, e.Body)
	case *schemas.Denied:
		if d.Arguments != "" {
			return schemas.Receipt{}, c.complete(misfit(e, d, c.request.Revision))
		}
		return schemas.Receipt{}, c.fail(deniedReply(asWritten(c.request)))
	case *schemas.Failed:
		if d.Unlisted {
			return schemas.Receipt{}, c.fail(deniedReply(asWritten(c.request)))
		}
		f, ok := failures[d.Code]
		if !ok {
			f, d.Code = failures[schemas.FailInternal], schemas.FailInternal
		}
		f.reason = string(d.Code)
		return schemas.Receipt{}, c.fail(f)
	case *schemas.Cancelled:
		return schemas.Receipt{}, c.fail(cancelled)
	}
	return schemas.Receipt{}, nil
}

// finish answers when Ask has returned without an ending.
func (c *caller) finish(ctx context.Context, err error) {
	log := func(level slog.Level, what string) {
		c.a.o.Log.Log(context.WithoutCancel(ctx), level, what, "call", c.call, "server", c.request.Server, "method", c.request.Method, "error", err)
	}
	cause := context.Cause(ctx)
	switch {
	case c.ended:
		if err != nil && cause == nil {
			log(slog.LevelWarn, "error after the answer")
		}
	case errors.Is(err, schemas.ErrOverloaded), errors.Is(err, schemas.ErrTooLarge), errors.Is(err, schemas.ErrInvalid) && !c.heard:
		c.notStored(err)
	case errors.Is(cause, edge.ErrDraining):
		c.drain()
	case errors.Is(cause, errOverdue):
		log(slog.LevelWarn, "call has no ending by its deadline")
		_ = c.fail(overdue)
	case cause != nil:
		// The client is gone, or has closed its half of the connection and
		// still reads. Once a stream has begun, closing it has cancelled the
		// call and nothing may follow (streamable HTTP, "Cancellation").
		if c.stream != nil {
			if opened, _ := c.stream.Last(nil); opened {
				c.ended = true
				return
			}
		}
		_ = c.fail(halfClosed)
	default:
		log(slog.LevelError, "call has no ending")
		_ = c.fail(lostTrack)
	}
}

// notStored answers a call that never began.
func (c *caller) notStored(err error) {
	switch {
	case errors.Is(err, schemas.ErrOverloaded), errors.Is(err, schemas.ErrTooLarge):
	case errors.Is(err, schemas.ErrInvalid):
		// What check lets pass should make a sound event.
		c.a.o.Log.LogAttrs(context.Background(), slog.LevelWarn, "request makes no sound event", slog.Any("call", c.call), slog.Any("error", err))
	default:
		c.a.o.Log.LogAttrs(context.Background(), slog.LevelError, "cannot store", slog.Any("call", c.call), slog.Any("error", err))
	}
	_ = c.fail(notStoredReply(err))
}

// drain ends a call that the shutdown cuts off. A subscription ends with the
// result that the revision has for this (schema, SubscriptionsListenResult).
func (c *caller) drain() {
	if !c.request.Stream {
		_ = c.fail(draining)
		return
	}
	result := append([]byte(`{"resultType":"complete","_meta":{"`+metaSubscription+`":`), c.id...)
	_ = c.answer(http.StatusOK, jsonrpc.ResultResponse(c.id, append(result, "}}"...)), 0)
}

// complete answers with what the upstream said.
func (c *caller) complete(d *schemas.Completed, body []byte) error {
	if c.request.OneWay {
		c.ended = true
		if s := clientError(d.Status); s != 0 {
			write(c.w, withoutID, reply{status: s, code: jsonrpc.CodeInvalidRequest, message: "The server did not accept the notification."})
			return nil
		}
		c.w.WriteHeader(http.StatusAccepted)
		return nil
	}
	body, code, err := c.rewrite(body)
	if err != nil {
		c.a.o.Log.Error("stored answer cannot be read", "call", c.call, "error", err)
		f := failures[schemas.FailBadAnswer]
		f.reason = string(schemas.FailBadAnswer)
		return c.fail(f)
	}
	return c.answer(status(d.Status, code), body, 0)
}

// status is the HTTP status of an upstream's answer: its own if it is about the
// message, else the one that the revision has for the error code, else 200.
func status(upstream, code int) int {
	if code == 0 {
		return http.StatusOK
	}
	if s := clientError(upstream); s != 0 {
		return s
	}
	switch code {
	case jsonrpc.CodeMethodNotFound:
		return http.StatusNotFound
	case jsonrpc.CodeHeaderMismatch, jsonrpc.CodeMissingRequiredClientCapability, jsonrpc.CodeUnsupportedProtocolVersion:
		return http.StatusBadRequest
	}
	return http.StatusOK
}

// clientError returns a status that says what is wrong with the message, or 0.
// What is about credentials concerns the gateway's own at the upstream: a
// client that saw it would go and ask the gateway for other ones.
func clientError(status int) int {
	switch status {
	case http.StatusUnauthorized, http.StatusForbidden, http.StatusProxyAuthRequired:
		return 0
	}
	if status >= 400 && status < 500 {
		return status
	}
	return 0
}

// fail answers with an error of the gateway.
func (c *caller) fail(f reply) error {
	body := encode(c.id, f, c.call)
	if c.request.OneWay {
		body = encode(withoutID, f, c.call)
		if f.status < 400 {
			f.status = http.StatusBadGateway // a notification is accepted with 202 or refused with an error status
		}
	}
	return c.answer(f.status, body, f.retry)
}

// answer gives the one answer, in the form that has begun, or else as JSON. A
// subscription that works, and a client that takes nothing else, get a stream.
// After retry seconds, if that is not 0, the client may try again.
func (c *caller) answer(status int, body []byte, retry int) error {
	c.ended = true
	if c.stream != nil {
		if status == http.StatusOK && (!c.json || c.request.Stream) {
			if err := c.stream.Open(); err != nil {
				return err
			}
		}
		if opened, err := c.stream.Last(&sse.Event{Data: body}); opened {
			return err
		}
	}
	if retry > 0 {
		c.w.Header().Set("Retry-After", strconv.Itoa(retry))
	}
	edge.WriteJSON(c.w, status, body)
	return nil
}

// answerLimits are wider than any under which an answer was stored: that it
// fits was decided before. A map of words may have names equal but for case.
var answerLimits = jsonrpc.Limits{Bytes: math.MaxInt32, Depth: 1 << 20, AllowCaseVariants: true}

// cacheable are the methods whose results must say how they may be cached
// (2026-07-28, server/utilities/caching).
var cacheable = map[string]bool{
	"server/discover":          true,
	"tools/list":               true,
	"prompts/list":             true,
	"resources/list":           true,
	"resources/templates/list": true,
	"resources/read":           true,
}

// rewrite makes the changes 1 to 5 of the package comment to a response, and
// returns its error code, 0 if it has none.
func (c *caller) rewrite(body []byte) (out []byte, code int, err error) {
	m, err := jsonrpc.Decode(body, answerLimits)
	if err != nil {
		return nil, 0, err
	}
	if !m.IsResponse() {
		return nil, 0, errors.New("not a response")
	}
	if m.Error().Exists() {
		code, _ = m.ErrorCode()
		if code == 0 {
			code = jsonrpc.CodeInternalError // an error all the same
		}
	}
	p := m.Patch()
	if id := m.ID(); id.Exists() {
		p.Replace(id, c.id)
	} else {
		p.Set(m.Root(), "id", c.id)
	}
	result := m.Result()
	if result.Kind() == jsonrpc.Object {
		if cacheable[c.request.Method] {
			makePrivate(p, result)
		}
		if c.request.Method == "server/discover" {
			narrowVersions(p, result)
			if c.a.o.Tasks(c.request.Server) {
				declareTasks(p, result)
			}
		}
		if c.request.Stream {
			c.patchSubscription(p, result)
		}
	}
	outwardResult(p, c.front, c.request.Target, result)
	return p.Bytes(), code, p.Err()
}

var (
	private  = []byte(`"private"`)
	zero     = []byte("0")
	versions = []byte(`["` + Revision + `"]`)
)

func makePrivate(p *jsonrpc.Patch, result jsonrpc.Value) {
	var ttl, scope, kind jsonrpc.Value
	for name, v := range result.Members() {
		switch name {
		case "ttlMs":
			ttl = v
		case "cacheScope":
			scope = v
		case "resultType":
			kind = v
		}
	}
	if text, _ := scope.Text(); text == "public" {
		p.Replace(scope, private)
	}
	// A question to the client (input_required), a task, or whatever else a
	// resultType may say, is nothing to cache and has none of these members.
	if text, _ := kind.Text(); kind.Exists() && text != "complete" {
		return
	}
	if !ttl.Exists() {
		p.Set(result, "ttlMs", zero)
	}
	if !scope.Exists() {
		p.Set(result, "cacheScope", private)
	}
}

func narrowVersions(p *jsonrpc.Patch, result jsonrpc.Value) {
	v := result.Get("supportedVersions")
	if v.Kind() != jsonrpc.Array {
		return
	}
	n, only := 0, true
	for e := range v.Elements() {
		text, _ := e.Text()
		n++
		only = only && text == Revision
	}
	if n != 1 || !only {
		p.Replace(v, versions)
	}
}

// renumber makes change 2 to a message that comes before the answer. A message
// that does not hold the call id is not even read.
func (c *caller) renumber(body []byte) []byte {
	if !c.request.Stream && !bytes.Contains(body, []byte(c.call)) {
		return body
	}
	m, err := jsonrpc.Decode(body, answerLimits)
	if err != nil {
		c.a.o.Log.Error("stored message cannot be read", "call", c.call, "error", err)
		return body
	}
	p := m.Patch()
	if !c.patchSubscription(p, m.Params()) {
		return body
	}
	if out := p.Bytes(); out != nil {
		return out
	}
	return body
}

// patchSubscription changes the subscription id in the _meta of params or
// result, if it is the call's.
func (c *caller) patchSubscription(p *jsonrpc.Patch, in jsonrpc.Value) bool {
	v := in.Get("_meta", metaSubscription)
	if text, ok := v.Text(); !ok || text != string(c.call) {
		return false
	}
	p.Replace(v, c.id)
	return true
}
