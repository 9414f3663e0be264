package cli

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"sync/atomic"
	"time"

	"waybill.dev/schemas/jsonrpc"
	"waybill.dev/schemas/sse"
	"waybill.dev/workers/dispatch"
)

// carried is a request of the client's on its way. It belongs to the goroutine
// that carries it, but for what is said.
type carried struct {
	r      *relay
	m      *jsonrpc.Message
	id     []byte // the client's, in its bytes
	method string
	modern bool
	opens  bool // it opens the session
	until  time.Time
	after  *telling // the notification before it

	ctx    context.Context
	cancel context.CancelCauseFunc

	gotten    bool          // owned by the relay's mu: from here the gateway may have it
	sent      chan struct{} // closed when it is written, or has come to an end
	written   bool          // owned by the relay's mu: sent is closed
	takenBack atomic.Bool   // the gateway was told so, and need not answer
}

// endless tells whether the request only listens.
func (c *carried) endless() bool { return c.method == "subscriptions/listen" }

// carry brings a request to the gateway and returns the answer; nil when there
// is none, because the client has taken the request back. What comes before the
// answer is written to the client.
//
// What may have an effect is sent again only when the gateway has certainly not
// got it, or says that it has not looked at it.
func (c *carried) carry() []byte {
	defer c.wrote()
	c.inOrder()
	var answer []byte
	var err error
	if c.modern {
		answer, err = c.carryModern()
	} else {
		answer, err = c.carryLegacy()
	}
	switch {
	case err == nil:
		return answer
	case context.Cause(c.ctx) == errTakenBack, c.takenBack.Load(), c.ctx.Err() != nil && c.endless():
		return nil
	}
	return c.failed(err)
}

// failed is the answer when there is none.
func (c *carried) failed(err error) []byte {
	var refused *refusedError
	const code = jsonrpc.CodeInternalError
	c.r.mu.Lock()
	gotten := c.gotten
	c.r.mu.Unlock()
	switch {
	case errors.Is(err, errLeaving) && !gotten:
		return ownError(c.id, code, "unreachable", "The request was not sent before stdin ended.")
	case errors.As(err, &refused):
		c.r.say("%s: %v", c.method, err)
		return ownError(c.id, code, "refused", "The request was not carried out: "+err.Error()+".")
	case errors.Is(err, errUnsent):
		return ownError(c.id, code, "unreachable", "The request was not sent: "+err.Error()+". Is `waybill up` running? It is safe to try again.")
	case errors.Is(err, errSessionOver):
		return ownError(c.id, code, "session_ended", "The gateway has ended the session while the request was under way. Its outcome is unknown: find out what happened before trying again.")
	case errors.Is(err, errBadAnswer):
		c.r.say("%s: %v", c.method, err)
		return ownError(c.id, code, "bad_answer", "The outcome of the request is unknown: "+err.Error()+".")
	case dispatch.Reads(c.method):
		return ownError(c.id, code, "unreachable", "The request has no answer: "+err.Error()+". It is safe to try again.")
	}
	c.r.say("%s: %v; whether it was carried out is unknown", c.method, err)
	return ownError(c.id, code, "unknown", "The outcome of the request is unknown: "+err.Error()+". It was not sent again; find out what happened before trying again.")
}

// inOrder waits until the gateway has the notifications that the client sent
// before, but not for long: a server may take its time over one.
func (c *carried) inOrder() {
	if c.after == nil {
		return
	}
	t := time.NewTimer(c.r.t.order)
	defer t.Stop()
	select {
	case <-c.after.done:
	case <-t.C:
	case <-c.ctx.Done():
	}
	c.after = nil
}

// got notes that the gateway may have the request from here on.
func (c *carried) got() {
	c.r.mu.Lock()
	defer c.r.mu.Unlock()
	c.gotten = true
}

// wrote notes that it has all of it.
func (c *carried) wrote() {
	c.r.mu.Lock()
	defer c.r.mu.Unlock()
	if !c.written {
		c.written = true
		close(c.sent)
	}
}

// errBadAnswer: the gateway, or what stands in its place, answered with what is
// no answer.
var errBadAnswer = errors.New("what came is no answer of the protocol")

// errCut: a stream ended before the answer.
var errCut = errors.New("the answer broke off")

// carryModern carries a request of the revisions without sessions. A stream of
// these that breaks is lost; what only reads is asked again.
func (c *carried) carryModern() ([]byte, error) {
	r := c.r
	params := r.paramHeaders(c.m)
	looked := false
	x := strand{c: c}
	pauses := r.backoff(r.t.pauses)
	for {
		resp, err := r.reach(c.ctx, c.until, r.modernHeader(c.m, params), c.m.Raw(), c.got, c.wrote)
		var answer []byte
		bad := false
		if err == nil {
			bad = resp.StatusCode == http.StatusBadRequest
			answer, err = c.read(resp, &x)
		}
		switch {
		case err == nil && bad && !looked && c.method == "tools/call" && mismatched(answer):
			// It was refused before anybody looked at what it is to do: that is
			// what the status says, the code alone may come of who has begun.
			looked = true
			if more := r.lookUp(c); len(more) > 0 {
				params = more
				continue
			}
			return answer, nil
		case err == nil && c.endless() && x.wrote && !x.again && r.now().Sub(x.since) >= r.t.steady:
			// A gateway that shuts down ends subscriptions as a server does that
			// wants no more of one. What the next says tells them apart.
			x.again, x.ended = true, answer
			c.until = r.now().Add(r.t.patience)
		case err == nil && x.again && x.ended != nil:
			return x.ended, nil
		case err == nil:
			return answer, nil
		case c.ctx.Err() != nil:
			return nil, err
		case c.endless() && x.wrote && (errors.Is(err, errCut) || errors.Is(err, errBroken) || errors.Is(err, errUnsent)):
			// It goes on for as long as the client likes, whatever the gateway does.
			c.until = r.now().Add(r.t.patience)
			x.again = true
		case (errors.Is(err, errCut) || errors.Is(err, errBroken)) && dispatch.Reads(c.method) && !x.wrote && r.now().Before(c.until):
		default:
			return nil, err
		}
		if !r.pause(c.ctx, pauses.NextBackOff()) {
			return nil, context.Cause(c.ctx)
		}
	}
}

// mismatched tells whether an answer refuses a request for headers that do not
// say what the body says.
func mismatched(answer []byte) bool {
	m, err := jsonrpc.Decode(answer, connectAnswerLimits)
	if err != nil {
		return false
	}
	code, _ := m.ErrorCode()
	return code == jsonrpc.CodeHeaderMismatch
}

// strand is what is read of one answer, over as many connections as it takes.
// It belongs to one goroutine.
type strand struct {
	c     *carried // nil: the session's own stream
	last  string   // event ID; "": the stream cannot be resumed
	moved bool     // since the stream was asked for
	retry time.Duration
	wrote bool // something was passed on

	// Of a subscription.
	again bool      // it is about to be made anew
	since time.Time // when it was
	ended []byte    // how it ended before
}

// read reads an answer.
func (c *carried) read(resp *http.Response, x *strand) ([]byte, error) {
	if isStream(resp) {
		return c.r.readStream(resp, x)
	}
	body, err := readAnswer(resp)
	if err != nil {
		return nil, err
	}
	m, err := jsonrpc.Decode(body, connectAnswerLimits)
	switch {
	case resp.StatusCode/100 == 2 && len(bytes.TrimSpace(body)) == 0:
		return nil, fmt.Errorf("%w: HTTP %d without an answer", errBadAnswer, resp.StatusCode)
	case err != nil && resp.StatusCode/100 == 2:
		return nil, fmt.Errorf("%w: %w", errBadAnswer, err)
	case err != nil || !m.IsResponse():
		if resp.StatusCode >= 500 || resp.StatusCode == http.StatusRequestTimeout { // of something in between, which may have passed it on
			return nil, fmt.Errorf("%w: %s", errBadAnswer, reason(resp, body))
		}
		return nil, &refusedError{resp.StatusCode, reason(resp, body), nil}
	}
	if resp.StatusCode == http.StatusUnauthorized || resp.StatusCode == http.StatusForbidden {
		c.r.say("%s: the gateway refuses it: %s", c.method, reason(resp, body))
	}
	return c.ours(m)
}

// ours makes sure that an answer is the request's. An error may come without an
// id, from who has not read the request; the client gets it with.
func (c *carried) ours(m *jsonrpc.Message) ([]byte, error) {
	switch id := m.ID(); {
	case bytes.Equal(id.Raw(), c.id):
		c.learn(m)
		return m.Raw(), nil
	case m.Error().Exists() && id.Kind() == jsonrpc.None:
		return m.Patch().Set(m.Root(), "id", c.id).Bytes(), nil
	case m.Error().Exists() && id.Kind() == jsonrpc.Null:
		return m.Patch().Replace(id, c.id).Bytes(), nil
	}
	return nil, fmt.Errorf("%w: it answers another request", errBadAnswer)
}

// readStream reads a stream of events up to the answer, and passes on what
// comes before. The error wraps errCut when the stream ends without.
func (r *relay) readStream(resp *http.Response, x *strand) ([]byte, error) {
	body := resp.Body
	defer func() { _ = body.Close() }()
	// The gateway comments when it has nothing to say.
	var quiet atomic.Bool
	silence := time.AfterFunc(r.t.silence, func() { quiet.Store(true); _ = body.Close() })
	defer silence.Stop()
	for event, err := range sse.Read(&watched{body, silence, r.t.silence}, 2*connectAnswer) {
		switch {
		case errors.Is(err, sse.ErrTooLarge):
			return nil, fmt.Errorf("%w: %w", errBadAnswer, err)
		case err != nil:
			if quiet.Load() {
				err = fmt.Errorf("nothing came for %s", r.t.silence)
			}
			return nil, fmt.Errorf("%w: %w", errCut, err)
		}
		if event.Retry != 0 {
			x.retry = max(event.Retry, 0)
		}
		if len(event.Data) > 0 && (event.Name == "" || event.Name == "message") {
			answer, err := r.message(event.Data, x)
			if answer != nil || err != nil {
				return answer, err
			}
		}
		if event.HasID {
			x.last, x.moved = event.ID, true
		}
	}
	return nil, errCut
}

// watched moves the end of patience on with every byte.
type watched struct {
	io.Reader
	silence *time.Timer
	after   time.Duration
}

func (w *watched) Read(b []byte) (int, error) {
	n, err := w.Reader.Read(b)
	if n > 0 {
		w.silence.Reset(w.after)
	}
	return n, err
}

// message takes one message of a stream, and returns it if it is the answer.
func (r *relay) message(raw []byte, x *strand) ([]byte, error) {
	m, err := jsonrpc.Decode(raw, connectAnswerLimits)
	switch {
	case err != nil && x.c == nil:
		r.say("a message of the session's stream is not passed on: %v", err)
		return nil, nil
	case err != nil:
		return nil, fmt.Errorf("%w: %w", errBadAnswer, err)
	}
	if m.IsResponse() {
		if x.c == nil {
			r.say("the gateway answers what was not asked; it is not passed on")
			return nil, nil
		}
		return x.c.ours(m)
	}
	if x.c != nil && x.c.endless() && m.Method() == "notifications/subscriptions/acknowledged" {
		x.since = r.now()
		if x.again {
			r.missed(m)
			x.again = false
			return nil, nil
		}
	}
	x.wrote = true
	return nil, r.out.write(m.Raw())
}
