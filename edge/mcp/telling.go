package mcp

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"net/http"
	"strconv"
	"sync/atomic"
	"time"

	"waybill.dev/edge"
	"waybill.dev/schemas"
	"waybill.dev/schemas/jsonrpc"
	"waybill.dev/schemas/sse"
)

// telling is what a client with a session is told on one connection: of one of
// its calls, to the answer, or of what belongs to no call. It belongs to the
// goroutine that runs Ask or Follow; what the timers do is in the stream.
//
// Each event of the stream has an id, <anchor>-<position>: the sequence of the
// event that the stream begins with in the log, a call's requested or the
// session's opened, and of the event it was made from. So a client that says
// what it saw last says all that is needed to go on, to any replica.
type telling struct {
	a       *Adapter
	s       *lasting
	w       http.ResponseWriter
	front   *schemas.Front     // nil at the endpoint of one server
	call    schemas.CallID     // "" for the session's own stream
	id      []byte             // the client's, in its bytes; empty for a notification
	request *schemas.Requested // nil for the session's own stream
	json    bool               // the client takes JSON
	sse     bool               // the client takes an event stream
	resumed bool               // the client has come back for the rest of a call
	opening string             // the ID of the session that the call opens; else ""
	stored  chan struct{}      // closed when the request is in the log; may be nil
	cancel  context.CancelCauseFunc

	attached *attachment // of the session's own stream, where there are other replicas

	anchor    uint64 // 0: not known yet
	after     uint64 // up to here the client has been told before
	stream    *edge.Stream
	resumable atomic.Bool // the client has been told an id
	late      *time.Timer // nil without a deadline

	next   int  // index of the next progressed event
	heard  bool // something was emitted, so the request was stored
	ended  bool // the answer has been given, or there is none to give
	left   bool // the call goes on without this client
	agreed bool // the session's initialize had a result
}

// begin prepares the stream, once its anchor is known. Of an initialize nothing
// is sent before there is something to send: the header has the ID then.
func (c *telling) begin(anchor uint64, prime bool) {
	c.anchor = anchor
	if !c.sse {
		return
	}
	wait := patience
	switch {
	case c.call != "" && c.resumed:
		wait = time.Second // in which nearly all that there is comes from the log, or turns out not to be there
	case c.opening != "" || c.resumed:
		wait = 0
	}
	c.stream = edge.NewStream(c.w, edge.StreamOptions{
		Patience: wait, KeepAlive: keepAlive, Lost: func(error) { c.cancel(schemas.ErrDetached) },
		First: func() *sse.Event {
			if c.opening != "" {
				c.w.Header()[headerSession] = []string{c.opening}
			}
			if !prime || c.anchor == 0 {
				return nil
			}
			c.resumable.Store(true)
			return &sse.Event{ID: c.at(max(c.anchor, c.after)), Data: []byte{}}
		},
	})
}

// stop stops the timers.
func (c *telling) stop() {
	if c.stream != nil {
		c.stream.Stop()
	}
	if c.late != nil {
		c.late.Stop()
	}
}

// at is the id of what is told of the event at a sequence; none without one.
func (c *telling) at(seq uint64) string {
	if c.anchor == 0 || seq == 0 {
		return ""
	}
	return strconv.FormatUint(c.anchor, 10) + "-" + strconv.FormatUint(seq, 10)
}

// emit writes one event to the client. It returns an error when the client
// cannot be written to; the context ends, too.
func (c *telling) emit(ctx context.Context, e schemas.Event) (schemas.Receipt, error) {
	if c.ended {
		return schemas.Receipt{}, nil
	}
	c.heard = true
	var err error
	switch d := e.Data.(type) {
	case *schemas.Requested:
		if c.anchor == 0 {
			if c.stored != nil {
				close(c.stored)
				c.stored = nil
			}
			c.begin(e.Seq, primes(c.request.Revision))
		}
	case *schemas.Progressed:
		if d.Index < c.next {
			break // seen: a worker that died was replaced
		}
		c.next = d.Index + 1
		err = c.send(e.Seq, c.server(""), e.Body)
	case *schemas.Notified:
		if !d.ToServer {
			err = c.send(e.Seq, c.server(d.Server), e.Body)
		}
	case *schemas.Asked:
		err = c.question(e, d)
	case *schemas.Held:
		c.a.hold(c.late, c.request, d)
		if body := c.a.waiting(ctx, e.Call, d); body != nil {
			err = c.send(e.Seq, c.server(""), body)
		}
	case *schemas.Cancel:
		if len(e.Body) > 0 { // the client's own: there is no answer
			c.quit()
		}
	case *schemas.Attached:
		if c.attached != nil && e.Seq > c.attached.seq && d.N == 0 {
			c.cancel(errReplaced)
		}
	case *schemas.Closed:
		c.quit()
	case *schemas.Tasked:
		err = c.created(e)
	case *schemas.Completed:
		err = c.complete(e.Seq, d, e.Body)
	case *schemas.Denied:
		if d.Arguments != "" {
			done, body := misfit(e, d, c.request.Revision)
			err = c.complete(e.Seq, done, body)
			break
		}
		err = c.denied(e.Seq)
	case *schemas.Failed:
		if d.Unlisted {
			err = c.denied(e.Seq)
			break
		}
		f, ok := failures[d.Code]
		if !ok {
			f, d.Code = failures[schemas.FailInternal], schemas.FailInternal
		}
		f.reason = string(d.Code)
		err = c.fail(e.Seq, ofCall(f))
	case *schemas.Cancelled:
		err = c.fail(e.Seq, cancelled)
	}
	if c.resumed && e.Kind().Ends() {
		c.s.ended(e.Call)
	}
	return schemas.Receipt{}, err
}

// send tells the client what a server said.
func (c *telling) send(seq uint64, server string, body []byte) error {
	// A client that takes JSON only is told no more than the answer.
	if c.told(seq) || c.stream == nil {
		return nil
	}
	body = c.a.outward(c.front, server, body)
	if bytes.Contains(body, []byte("notifications/cancelled")) {
		body = c.renumberCancelled(server, body)
	}
	c.resumable.Store(c.anchor != 0)
	now := c.a.o.Now()
	if err := c.stream.Send(sse.Event{ID: c.at(seq), Data: body}); err != nil {
		return err
	}
	if c.call == "" {
		c.s.served(seq, now)
	}
	return nil
}

// told tells whether the client has had what was made from the event at a
// sequence.
func (c *telling) told(seq uint64) bool { return seq != 0 && seq <= c.after }

// server is whose message it is: the one that it names, or the call's.
func (c *telling) server(named string) string {
	if named == "" && c.request != nil {
		return c.request.Server
	}
	return named
}

// question puts an upstream's request to the client, under an id that is known
// in the whole session.
func (c *telling) question(e schemas.Event, d *schemas.Asked) error {
	m, err := jsonrpc.Decode(e.Body, answerLimits)
	if err != nil || !m.IsRequest() {
		c.a.o.Log.Error("stored request cannot be read", "session", e.Session, "call", e.Call, "error", err)
		return nil
	}
	p := m.Patch()
	p.Replace(m.ID(), jsonrpc.Quote(d.ID))
	body := p.Bytes()
	if p.Err() != nil {
		c.a.o.Log.Error("stored request cannot be patched", "session", e.Session, "call", e.Call, "error", p.Err())
		return nil
	}
	q := &question{event: e, original: string(m.ID().Raw())}
	q.event.Body = nil
	c.s.ask(d.ID, q)
	if c.stream == nil && !c.told(e.Seq) {
		c.a.o.Log.Warn("an upstream's request cannot be put to a client that takes no event stream", "session", e.Session, "call", e.Call, "method", d.Method)
		return nil
	}
	return c.send(e.Seq, c.server(d.Server), body)
}

// renumberCancelled makes the id of a request that a server takes back the one
// that the client knows it by.
func (c *telling) renumberCancelled(server string, body []byte) []byte {
	m, err := jsonrpc.Decode(body, answerLimits)
	if err != nil || m.Method() != "notifications/cancelled" {
		return body
	}
	of := m.Params().Get("requestId")
	id, ok := c.s.known(server, string(of.Raw()))
	if !ok {
		return body
	}
	p := m.Patch()
	p.Replace(of, jsonrpc.Quote(id))
	if out := p.Bytes(); out != nil {
		return out
	}
	return body
}

// complete answers with what the upstream said.
func (c *telling) complete(seq uint64, d *schemas.Completed, body []byte) error {
	if c.request.OneWay {
		c.ended = true
		if s := clientError(d.Status); s != 0 {
			write(c.w, withoutID, noSuchSession(reply{status: s, code: jsonrpc.CodeInvalidRequest, message: "The server did not accept the notification."}))
			return nil
		}
		c.w.WriteHeader(http.StatusAccepted)
		return nil
	}
	m, err := jsonrpc.Decode(body, answerLimits)
	if err == nil && !m.IsResponse() {
		err = errors.New("not a response")
	}
	var out []byte
	if err == nil {
		p := m.Patch()
		if id := m.ID(); id.Exists() {
			p.Replace(id, c.id)
		} else {
			p.Set(m.Root(), "id", c.id)
		}
		outwardResult(p, c.front, c.request.Target, m.Result())
		out, err = p.Bytes(), p.Err()
	}
	if err != nil {
		c.a.o.Log.Error("stored answer cannot be read", "call", c.call, "error", err)
		f := failures[schemas.FailBadAnswer]
		f.reason = string(schemas.FailBadAnswer)
		return c.fail(seq, ofCall(f))
	}
	if c.opening != "" && m.Result().Exists() {
		c.agreed = true
		version, _ := m.Result().Get("protocolVersion").Text()
		c.s.agreeOn(version)
		c.w.Header()[headerSession] = []string{c.opening}
	}
	return c.answer(seq, http.StatusOK, out, 0)
}

// agreeOn notes the revision that the upstream's answer to initialize names.
func (s *lasting) agreeOn(version string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if version != "" && version < Revision && len(version) <= len(Revision) {
		s.revision = version
	}
	s.agreed = true
}

// denied answers like a server that has no such thing; an unknown notification
// every server accepts.
func (c *telling) denied(seq uint64) error {
	if c.request.OneWay {
		c.ended = true
		c.w.WriteHeader(http.StatusAccepted)
		return nil
	}
	return c.fail(seq, ofCall(deniedReply(asWritten(c.request))))
}

// ofCall is how a session's client is told what became of a call: with an error
// response, which it has the id of, and a status that says that the exchange
// worked. These clients take any other for a broken transport, and 404 for the
// end of the session.
func ofCall(f reply) reply {
	f.status, f.retry = http.StatusOK, 0
	return f
}

// noSuchSession keeps an error from being taken for the end of the session.
func noSuchSession(f reply) reply {
	if f.status == http.StatusNotFound {
		f.status = http.StatusBadRequest
	}
	return f
}

// quit ends the stream without an answer.
func (c *telling) quit() {
	if c.ended {
		return
	}
	c.ended = true
	if c.stream == nil {
		return
	}
	if !c.resumed {
		_ = c.stream.Open()
	}
	_, _ = c.stream.Last(nil)
}

// finish answers when Ask has returned without an ending.
func (c *telling) finish(ctx context.Context, err error) {
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
		if errors.Is(err, schemas.ErrInvalid) {
			log(slog.LevelWarn, "request makes no sound event")
		}
		_ = c.fail(0, notStoredReply(err))
	case errors.Is(cause, errTakenBack):
		if c.sse {
			c.quit()
		} else {
			_ = c.fail(0, cancelled)
		}
	case errors.Is(cause, errClosed):
		_ = c.fail(0, cancelled)
	case errors.Is(cause, schemas.ErrDetached):
		c.left = true
		c.leave(goneOn)
	case errors.Is(cause, edge.ErrDraining):
		_ = c.fail(0, draining)
	case errors.Is(cause, errOverdue):
		log(slog.LevelWarn, "call has no ending by its deadline")
		_ = c.fail(0, overdue)
	case cause != nil:
		_ = c.fail(0, halfClosed)
	default:
		log(slog.LevelError, "call has no ending")
		c.left = true
		c.leave(lostTrack)
	}
}

// leave ends a connection on which the answer will not come: a stream without a
// word, since the client can ask for the rest, and else with an error.
func (c *telling) leave(f reply) {
	if c.stream != nil {
		if opened, _ := c.stream.Last(nil); opened {
			c.ended = true
			return
		}
	}
	_ = c.fail(0, f)
}

// notStoredReply is the answer to a call that never began.
func notStoredReply(err error) reply {
	f := cannotStore
	switch {
	case errors.Is(err, schemas.ErrOverloaded):
		f = failures[schemas.FailOverloaded]
		f.reason = string(schemas.FailOverloaded)
	case errors.Is(err, schemas.ErrTooLarge):
		f = tooLargeToStore
	case errors.Is(err, schemas.ErrInvalid):
		f = failures[schemas.FailInvalid]
		f.reason = string(schemas.FailInvalid)
	}
	return f
}

// fail answers with an error of the gateway.
func (c *telling) fail(seq uint64, f reply) error {
	id := c.id
	if c.request.OneWay {
		id = withoutID
		if f.status < 400 {
			f.status = http.StatusBadGateway // a notification is accepted with 202 or refused with an error status
		}
	}
	f = noSuchSession(f)
	return c.answer(seq, f.status, encode(id, f, c.call), f.retry)
}

// answer gives the one answer, in the form that has begun, or else as JSON; a
// client that takes nothing else gets a stream.
func (c *telling) answer(seq uint64, status int, body []byte, retry int) error {
	c.ended = true
	if c.told(seq) {
		c.stop()
		return nil
	}
	if c.stream != nil {
		if status == http.StatusOK && !c.json {
			if err := c.stream.Open(); err != nil {
				return err
			}
		}
		if opened, err := c.stream.Last(&sse.Event{ID: c.at(seq), Data: body}); opened {
			return err
		}
	}
	if retry > 0 {
		c.w.Header().Set("Retry-After", strconv.Itoa(retry))
	}
	edge.WriteJSON(c.w, status, body)
	return nil
}
