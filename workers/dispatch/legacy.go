package dispatch

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync/atomic"
	"time"

	"github.com/cenkalti/backoff/v4"

	"waybill.dev/schemas/jsonrpc"
	"waybill.dev/schemas/sse"
)

// errLost: the server does not know the session (any more). It has not carried
// out what was sent.
var errLost = errors.New("the server does not know the session")

// errCut: a stream ended before the answer.
var errCut = errors.New("the stream ended without an answer")

// codeNoSession is the error with which the TypeScript SDK's server answers 404.
const codeNoSession = -32001

// resumes is how often in a row a stream that broke is asked for in vain.
const resumes = 10

// maxEventID is the longest event ID with which a stream is asked for again.
const maxEventID = 4096

// legacy makes a call in a session. The request is sent once. Only when the
// server says that it does not know the session, which it does before it looks
// at the request, is it sent once more in another.
func (m *mcpServer) legacy(ctx context.Context, c Call, progress func([]byte) error) (Answer, error) {
	if m.sessions == nil || m.sessions.opt.Latest == nil || m.sessions.opt.Store == nil {
		return Answer{}, faultf(Invalid, "this gateway keeps no sessions")
	}
	body, _, err := mcpBody(c)
	if err != nil {
		return Answer{}, &Fault{Kind: Invalid, Err: err}
	}
	if c.Requested.Method == "initialize" {
		return m.begin(ctx, c, progress)
	}
	s, err := m.sessions.get(ctx, m, c.Event)
	if err != nil {
		return Answer{}, err
	}
	if c.Requested.TaskNow && c.Requested.Alias != "" {
		return s.ownTask(ctx, c, body, progress)
	}
	answer, err := s.call(ctx, c, body, progress)
	if !errors.Is(err, errLost) {
		if answer.ErrorCode == jsonrpc.CodeUnsupportedProtocolVersion || answer.ErrorCode == jsonrpc.CodeHeaderMismatch {
			m.doubt() // errors that only the other era has
		}
		return answer, err
	}
	if s, err = m.sessions.again(ctx, s); err != nil {
		return Answer{}, err
	}
	if answer, err = s.call(ctx, c, body, progress); errors.Is(err, errLost) {
		err = faultf(Refused, "%w, which it has just opened", errLost)
	}
	return answer, err
}

// call sends a request in the session and brings back the answer. When ctx ends
// because the caller takes the call back, or its time is over, the server is
// told so before the connection is dropped, which by itself means nothing in
// these revisions.
func (s *session) call(ctx context.Context, c Call, body []byte, progress func([]byte) error) (answer Answer, err error) {
	if !s.enter() {
		return Answer{}, &Fault{Kind: Refused, Err: errLost} // nothing was sent
	}
	ready := c.Requested.Method == "notifications/initialized"
	if ready && !s.first() {
		s.leave()
		return Answer{Status: http.StatusAccepted}, nil // the gateway has told the server already
	}
	inner, hangUp := context.WithCancel(context.WithoutCancel(ctx))
	var open atomic.Bool // the server may be at work on it
	told := make(chan struct{})
	unhook := context.AfterFunc(ctx, func() {
		defer close(told)
		if open.Load() && !c.Requested.OneWay {
			s.cancel(c, context.Cause(ctx))
		}
		hangUp()
	})
	unhookEnd := context.AfterFunc(s.over, hangUp)
	leave := func() {
		if !unhook() {
			<-told
		}
		unhookEnd()
		hangUp()
		s.callOver(c.Event.Call)
		s.leave()
	}
	defer func() {
		open.Store(false)
		if release := answer.Release; err == nil && release != nil {
			answer.Release = func(h func()) {
				release(func() { h(); hangUp() })
				leave()
			}
			return
		}
		leave()
	}()

	x := &exchange{s: s, c: c, ctx: inner, progress: progress}
	answer, err = x.post(body, func() { open.Store(true); c.Connected() })
	if ready {
		s.settle(err == nil)
	}
	if err == nil && answer.ErrorCode == 0 {
		s.note(c.Requested.Method, body)
	}
	return answer, err
}

// first tells whether the server has yet to be told that the client is ready,
// and takes that upon the caller.
func (s *session) first() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	was := s.initialized
	s.initialized = true
	return !was
}

// settle says whether it has been told. From then on it may speak for itself.
func (s *session) settle(told bool) {
	if told {
		s.listen()
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.initialized = false
}

// cancel tells the server that the answer is not wanted any more, unless it is
// this process that gives up.
func (s *session) cancel(c Call, cause error) {
	reason := "the client's time for it is over"
	var w *wish
	switch {
	case errors.As(cause, &w):
		reason = w.reason
	case !errors.Is(cause, errDeadline) && !errors.Is(cause, errLifetime):
		return
	}
	ctx, stop := context.WithTimeout(s.over, s.t.timing.cancel)
	defer stop()
	err := s.tell(ctx, []byte(`{"jsonrpc":"2.0","method":"notifications/cancelled","params":{"requestId":`+
		string(jsonrpc.Quote(string(c.ID)))+`,"reason":`+string(jsonrpc.Quote(reason))+`}}`))
	if err != nil {
		s.log().Debug("the server did not hear that a call is cancelled", "call", c.ID, "error", err)
	}
}

// exchange is a request and what comes of it. It belongs to one goroutine.
type exchange struct {
	s        *session
	c        Call
	ctx      context.Context
	progress func([]byte) error

	// Of the stream that answers.
	last    string // event ID
	moved   bool   // last has changed since the stream was asked for
	retry   time.Duration
	resumed bool
	heard   func() // a message came; nil while the stream is the first
}

func (x *exchange) post(body []byte, connected func()) (Answer, error) {
	resp, err := x.s.m.send(x.ctx, http.MethodPost, x.s.header(x.c.Trace), body, connected)
	if err != nil {
		return Answer{}, err
	}
	x.c.Heard()
	answer, err := Answer{}, error(nil)
	switch gone, readErr := x.s.gone(resp, string(x.c.ID)); {
	case readErr != nil:
		err = readErr
	case gone:
		err = &Fault{Kind: Refused, Err: errLost}
	default:
		answer, err = x.s.m.answer(resp, x.c, func() (Answer, error) { return x.stream(resp.Body) })
	}
	if err != nil {
		resp.Body.Close()
		return Answer{}, err
	}
	answer.Status = resp.StatusCode
	return answer, nil
}

// gone tells whether a server says that it does not know the session, and so
// has not looked at the request. The protocol's word for that is 404. Servers
// made after the example of the TypeScript SDK say 400 instead; that is taken
// for the same only in its very words, which it writes where it looks for the
// session and nowhere else.
func (s *session) gone(resp *http.Response, call string) (bool, error) {
	if s.upstream == "" || resp.StatusCode != http.StatusNotFound && resp.StatusCode != http.StatusBadRequest {
		return false, nil
	}
	body, err := s.m.read(resp)
	resp.Body.Close()
	if err != nil {
		return false, err
	}
	resp.Body = io.NopCloser(bytes.NewReader(body))
	msg, err := jsonrpc.Decode(body, jsonrpc.Limits{Bytes: int(s.m.maxAnswer), Depth: answerDepth, AllowCaseVariants: true})
	if resp.StatusCode == http.StatusNotFound {
		// What names the call answers it, as later revisions do where the method
		// is unknown, and the call must not be sent again; but for the error
		// with which servers after the same example say that there is no session.
		if err == nil && call != "" && msg.IsResponse() {
			id, _ := msg.ID().Text()
			code, _ := msg.ErrorCode()
			return id != call || code == codeNoSession, nil
		}
		return true, nil
	}
	if err != nil || msg.ID().Kind() > jsonrpc.Null {
		return false, nil
	}
	code, _ := msg.ErrorCode()
	text, _ := msg.Error().Get("message").Text()
	return code == -32000 && (text == "Bad Request: No valid session ID provided" || text == "Bad Request: Server not initialized"), nil
}

// stream reads the answer from a stream of events, and goes on with another
// connection where one breaks, if the server has said how.
func (x *exchange) stream(first io.Reader) (Answer, error) {
	answer, err := x.read(first)
	if !errors.Is(err, errCut) {
		return answer, err
	}
	t := x.s.t.timing
	pauses := backoff.NewExponentialBackOff(
		backoff.WithInitialInterval(t.pause), backoff.WithMultiplier(2), backoff.WithMaxInterval(t.pauses), backoff.WithMaxElapsedTime(0))
	for failures := 0; errors.Is(err, errCut) && x.last != "" && failures < resumes; {
		if x.moved {
			pauses.Reset()
			failures = 0
		}
		if !pause(x.ctx, max(pauses.NextBackOff(), min(x.retry, t.retry))) {
			return Answer{}, faultf(Broken, "%w: %w", err, context.Cause(x.ctx))
		}
		x.moved = false
		var silent bool
		if answer, silent, err = x.resume(); !silent {
			failures++
		}
	}
	return answer, err
}

// resume asks for the rest of the stream. silent says that the server has given
// it, and nothing came of it for a while.
func (x *exchange) resume() (answer Answer, silent bool, err error) {
	ctx, hangUp := context.WithCancel(x.ctx)
	defer hangUp()
	resp, err := x.s.get(ctx, x.last)
	if err != nil {
		return Answer{}, false, faultf(Broken, "%w; asking for the rest: %w", errCut, err)
	}
	defer resp.Body.Close()
	switch code := resp.StatusCode; {
	case eventStream(resp):
	case code == http.StatusConflict, code == http.StatusTooManyRequests, code == http.StatusRequestTimeout, code >= 500:
		// The server may not have noticed yet that the first one broke.
		return Answer{}, false, faultf(Broken, "%w; asking for the rest: HTTP %d", errCut, code)
	default:
		return Answer{}, false, faultf(Broken, "the stream ended without an answer, and the server does not give the rest: HTTP %d", code)
	}
	// There are servers that give what there was, and what comes afterwards
	// only to who asks again.
	var quiet atomic.Bool
	silence := time.AfterFunc(x.s.t.timing.silence, func() { quiet.Store(true); hangUp() })
	defer silence.Stop()
	x.resumed, x.heard = true, func() { silence.Reset(x.s.t.timing.silence) }
	answer, err = x.read(resp.Body)
	return answer, quiet.Load(), err
}

// get asks for a stream of the session: its own, or the rest of one.
func (s *session) get(ctx context.Context, last string) (*http.Response, error) {
	h := s.header(onward{})
	h.Del("Content-Type")
	h.Set("Accept", "text/event-stream")
	if last != "" {
		h.Set("Last-Event-Id", last)
	}
	return s.m.send(ctx, http.MethodGet, h, nil, func() {})
}

func eventStream(resp *http.Response) bool {
	kind, _, _ := strings.Cut(resp.Header.Get("Content-Type"), ";")
	return resp.StatusCode == http.StatusOK && strings.EqualFold(strings.TrimSpace(kind), "text/event-stream")
}

// read reads events up to the answer. The error wraps errCut when there is none.
//
// A resumed stream is read with more patience: there are servers that put into
// it what belongs to other streams of the session, or stood there before.
func (x *exchange) read(body io.Reader) (Answer, error) {
	m := x.s.m
	for event, err := range sse.Read(body, 2*int(m.maxAnswer)) {
		switch {
		case errors.Is(err, sse.ErrTooLarge):
			return Answer{}, faultf(TooLarge, "a message of the stream: %w", err)
		case err != nil:
			return Answer{}, faultf(Broken, "%w: %w", errCut, err)
		}
		if event.Retry != 0 {
			x.retry = max(event.Retry, 0)
		}
		id := len(event.ID) <= maxEventID && headerValue(event.ID)
		known := event.ID != "" && id && x.resumed && x.s.knows(event.ID)
		x.moved = x.moved || event.ID != "" && id && !known
		if len(event.Data) > 0 && (event.Name == "" || event.Name == "message") && !known {
			if x.heard != nil {
				x.heard()
			}
			answer, done, err := x.message(event.Data)
			if done || err != nil {
				return answer, err
			}
		}
		if event.ID != "" && id {
			x.s.saw(event.ID)
		}
		if event.HasID && id {
			x.last = event.ID
		}
	}
	return Answer{}, faultf(Broken, "%w", errCut)
}

// message takes one message of the stream.
func (x *exchange) message(raw []byte) (answer Answer, done bool, err error) {
	m := x.s.m
	msg, err := m.decode(raw, x.c)
	switch {
	case errors.Is(err, jsonrpc.ErrTooLarge):
		return Answer{}, false, faultf(TooLarge, "a message of the stream: %w", err)
	case err != nil && x.resumed:
		return Answer{}, false, nil
	case err != nil:
		return Answer{}, false, faultf(Garbled, "a message of the stream: %w", err)
	}
	switch id, _ := msg.ID().Text(); {
	case msg.IsNotification():
		return Answer{}, false, x.progress(raw)
	case msg.IsRequest() && x.c.Requested.Method == "initialize":
		// The session does not stand yet, so that nobody could answer in it.
		x.s.log().Warn("a request of the server is ignored: it came before the session was open", "method", clip(msg.Method(), maxWords))
		return Answer{}, false, nil
	case msg.IsRequest():
		if err := x.s.ask(x.ctx, x.c.Event, msg, ""); err != nil {
			return Answer{}, false, faultf(Broken, "storing what the server asks: %w", err)
		}
		return Answer{}, false, nil
	case id == string(x.c.ID) && msg.ID().Kind() == jsonrpc.String:
		answer, err = m.done(msg, x.c)
		return answer, true, err
	case x.resumed:
		return Answer{}, false, nil
	default:
		return Answer{}, false, faultf(Garbled, "the stream answers another request")
	}
}

// pause waits. It is false when ctx has ended.
func pause(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return ctx.Err() == nil
	case <-ctx.Done():
		return false
	}
}

// mcpBody checks that a request says what was authorized, and rewrites its id,
// the name where the caller has another for it than the server, and the trace
// context where it stands in the body. name is the
// server's, "" for a method without.
func mcpBody(c Call) (body []byte, name string, err error) {
	msg, err := jsonrpc.Decode(c.Body, jsonrpc.Limits{Bytes: len(c.Body)})
	if err != nil {
		return nil, "", fmt.Errorf("the request: %w", err)
	}
	target, alias := c.Requested.Target, c.Requested.Alias
	if msg.Method() != target.Method {
		return nil, "", fmt.Errorf("the request's method is %q, authorized was %q", msg.Method(), target.Method)
	}
	patch := msg.Patch()
	if at, ok := mcpNames[target.Method]; ok {
		value := msg.Params().Get(at.member)
		name, ok = value.Text()
		switch {
		case alias != "" && (!ok || name != alias || target.Name == ""):
			return nil, "", fmt.Errorf("the request's %s is %q, authorized was %q for %q", at.member, name, alias, target.Name)
		case alias != "":
			name = target.Name
			patch.Replace(value, jsonrpc.Quote(name))
		case (at.required || target.Name != "") && (!ok || name != target.Name):
			return nil, "", fmt.Errorf("the request's %s is %q, authorized was %q", at.member, name, target.Name)
		}
	} else if alias != "" {
		value := completes(msg)
		if was, ok := value.Text(); target.Method != "completion/complete" || !ok || was != alias || target.Name == "" {
			return nil, "", fmt.Errorf("the request's name is %q, authorized was %q for %q", was, alias, target.Name)
		}
		patch.Replace(value, jsonrpc.Quote(target.Name))
	}
	if target.Method == "subscriptions/listen" {
		// Of the names in it those are the server's that the gateway itself asks with.
		if filter := msg.Params().Get("notifications"); filter.Get("taskIds").Exists() && target.Name == "" {
			patch.Remove(filter, "taskIds") // names of the gateway's, see tasks.go
		}
	}
	traced := c.Trace.write(patch, msg)
	switch {
	case msg.IsRequest() == c.Requested.OneWay:
		return nil, "", errors.New("the request has an id and wants no answer, or has none and wants one")
	case msg.IsRequest():
		patch.Replace(msg.ID(), []byte(`"`+string(c.ID)+`"`))
	case alias == "" && !traced:
		return c.Body, name, nil
	}
	if body = patch.Bytes(); body == nil {
		return nil, "", fmt.Errorf("rewriting the request: %w", patch.Err())
	}
	return body, name, nil
}

// completes finds the name of what completion/complete is about.
func completes(msg *jsonrpc.Message) jsonrpc.Value {
	ref := msg.Params().Get("ref")
	switch kind, _ := ref.Get("type").Text(); kind {
	case "ref/prompt":
		return ref.Get("name")
	case "ref/resource":
		return ref.Get("uri")
	}
	return jsonrpc.Value{}
}
