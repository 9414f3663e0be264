package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strings"
	"sync"
	"time"

	"waybill.dev/schemas/jsonrpc"
	"waybill.dev/workers/dispatch"
)

// Bounds of what a relay holds. What is more is answered with an error, but for
// notifications and answers, which the client is made to wait with.
const (
	connectLine    = jsonrpc.DefaultBytes // of a message of the client's: what the gateway takes at most
	connectCalls   = 256                  // requests under way
	connectBytes   = 64 << 20             // of them together
	connectQueue   = 256                  // notifications that wait to be sent, and as many answers
	connectMirrors = 4096                 // tools with arguments that are repeated in headers
)

// modernRevision is the first revision without sessions, and what a client is
// taken to speak that has not said it.
const modernRevision = "2026-07-28"

// relay carries messages between one client and the gateway: each line is one
// message and goes on as it is, byte for byte.
//
// Requests are carried side by side, each on a goroutine; notifications one
// after the other, in their order, and a request after those before it.
type relay struct {
	url   string   // of the endpoint
	at    *url.URL // the same; nil: nobody looks for it before it is needed
	token string
	http  *http.Client
	out   *lineWriter
	say   func(format string, args ...any) // to the client's log
	t     relayTimes

	lane    chan *telling // notifications, in order
	answers chan struct{} // a place for each answer of the client's that is under way
	work    sync.WaitGroup
	calls   sync.WaitGroup // requests, and answers of the client's; added to only under mu, while not leaving

	// ctx is that of all that is under way, and life of what goes on until the
	// session has been ended.
	ctx  context.Context
	stop context.CancelCauseFunc

	renewing chan struct{} // a place for who opens the session again

	mu       sync.Mutex // guards what follows
	session  *connectSession
	opening  chan struct{} // closed when the initialize under way has ended; nil: there is none
	leaving  bool          // nothing more is begun
	requests map[string]*carried
	held     int      // bytes of requests
	last     *telling // the latest notification
	modern   string   // revision of the latest message that named one
	mirrors  map[string]dispatch.Mirrors
	used     time.Time     // when the gateway was last talked to
	up       chan struct{} // closed when it answers again; nil: it did
}

// Causes with which what is under way ends.
var (
	errTakenBack = errors.New("the client took the request back")
	errLeaving   = errors.New("the client is gone")
)

func newRelay(endpoint *url.URL, token string, transport http.RoundTripper, out io.Writer, say func(string, ...any), t relayTimes) *relay {
	r := &relay{
		url: endpoint.String(), at: endpoint, token: token, out: newLineWriter(out), say: say, t: t.withDefaults(),
		http: &http.Client{Transport: transport, CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }},
		lane: make(chan *telling, connectQueue), answers: make(chan struct{}, connectQueue), renewing: make(chan struct{}, 1),
		requests: map[string]*carried{}, mirrors: map[string]dispatch.Mirrors{}, modern: modernRevision, used: time.Now().Round(0),
	}
	return r
}

// run carries messages until stdin ends, ctx does or stdout breaks; then it
// gives what is under way a moment, ends the session, and returns. Only who
// reads a stdin on which nothing comes, or writes to a stdout that nobody reads,
// may be left when it does, for nobody can wake them.
func (r *relay) run(ctx context.Context, in io.Reader) error {
	r.ctx, r.stop = context.WithCancelCause(context.WithoutCancel(ctx))
	defer r.stop(errLeaving)
	ended := make(chan error, 1)
	go func() {
		ended <- readLines(in, connectLine, func(l stdinLine) bool {
			r.take(l)
			return r.ctx.Err() == nil
		})
	}()
	if r.at != nil {
		r.work.Go(func() { r.probe(r.ctx, r.at) })
	}
	r.work.Go(r.tell)
	var err error
	grace := r.t.finish
	select {
	case err = <-ended:
		if err != nil {
			err = fmt.Errorf("reading stdin: %w", err)
		}
	case <-ctx.Done():
		grace = r.t.stop
	case <-r.out.broken:
		grace = 0
		err = fmt.Errorf("the client does not read any more: %w", r.out.err)
	}
	r.finish(ctx, grace)
	return err
}

// finish ends what is under way, in that time if it can, and then the session.
func (r *relay) finish(ctx context.Context, grace time.Duration) {
	r.hangUp()
	done := make(chan struct{})
	last := &telling{done: make(chan struct{})} // behind all notifications
	go func() {
		defer close(done)
		select {
		case r.lane <- last:
		case <-r.ctx.Done():
			return
		}
		select {
		case <-last.done:
		case <-r.ctx.Done():
			return
		}
		r.calls.Wait()
	}()
	wait := func(d time.Duration, interrupted <-chan struct{}) {
		t := time.NewTimer(d)
		defer t.Stop()
		select {
		case <-done:
		case <-t.C:
		case <-r.out.broken:
		case <-interrupted:
		}
	}
	if grace > r.t.stop {
		wait(grace, ctx.Done())
		grace = 0
		if ctx.Err() != nil {
			grace = r.t.stop
		}
	}
	if grace > 0 {
		wait(grace, nil)
	}
	r.stop(errLeaving)
	gone := make(chan struct{})
	go func() { defer close(gone); r.calls.Wait(); r.work.Wait() }()
	r.farewell(context.WithoutCancel(ctx))
	select {
	case <-gone:
	case <-time.After(r.t.farewell): // the client does not read, and somebody writes to it
	}
}

// hangUp takes nothing more, and ends streams that have no end of their own.
func (r *relay) hangUp() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.leaving = true
	for _, c := range r.requests {
		if c.endless() {
			c.cancel(errLeaving)
		}
	}
}

// take takes a line of the client's. It belongs to the goroutine that reads
// them, which waits while a queue is full.
func (r *relay) take(l stdinLine) {
	if l.tooLong {
		r.write(jsonrpc.ErrorResponse(nil, jsonrpc.CodeInvalidRequest, fmt.Sprintf("The message is longer than %d bytes and was skipped.", connectLine), nil))
		return
	}
	if len(l.text) == 0 {
		return
	}
	m, err := jsonrpc.Decode(l.text, jsonrpc.Limits{Bytes: connectLine})
	switch {
	case err != nil:
		r.write(jsonrpc.ErrorResponse(nil, jsonrpc.Code(err), "The line is not one JSON-RPC message: "+err.Error()+".", nil))
	case m.IsResponse():
		r.answer(m)
	case m.IsNotification():
		r.notify(m)
	default:
		r.begin(m)
	}
}

// write writes to the client. That it is gone is seen by run.
func (r *relay) write(message []byte) { _ = r.out.write(message) }

// isModern tells whether a message is of the revisions without sessions, as the
// gateway does.
func (r *relay) isModern(m *jsonrpc.Message) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	said, ok := m.Params().Get("_meta", metaVersion).Text()
	inSession := r.session != nil || r.opening != nil
	switch {
	case ok && said >= modernRevision:
		r.modern = said
		return true
	case m.Method() == "initialize" && m.IsRequest():
		return false
	case m.Method() == "server/discover", !inSession && ok:
		return true
	case m.IsRequest():
		return false
	}
	return !inSession
}

// metaVersion is where a message says its revision.
const metaVersion = "io.modelcontextprotocol/protocolVersion"

// begin takes a request.
func (r *relay) begin(m *jsonrpc.Message) {
	c := &carried{r: r, m: m, id: m.ID().Raw(), method: m.Method(), modern: r.isModern(m), until: r.now().Add(r.t.patience), sent: make(chan struct{})}
	c.ctx, c.cancel = context.WithCancelCause(r.ctx)
	r.mu.Lock()
	c.after = r.last
	var refused string
	switch {
	case r.leaving:
		refused = "The program is about to end. The request was not carried out."
	case r.requests[string(c.id)] != nil:
		refused = "A request with this id has not been answered yet: an id must not be used twice."
	case len(r.requests) >= connectCalls || r.held+len(m.Raw()) > connectBytes && r.held > 0:
		refused = "Too many requests are waiting for their answers. This one was not carried out; try again when others have been answered."
	default:
		r.requests[string(c.id)] = c
		r.held += len(m.Raw())
		if c.opens = !c.modern && c.method == "initialize" && r.session == nil && r.opening == nil; c.opens {
			r.opening = make(chan struct{})
		}
		r.calls.Add(1)
	}
	r.mu.Unlock()
	if refused != "" {
		c.cancel(nil)
		r.write(ownError(c.id, jsonrpc.CodeInvalidRequest, "refused", refused))
		return
	}
	go func() {
		defer r.calls.Done()
		defer c.cancel(nil)
		answer := c.carry()
		r.over(c)
		if answer != nil && context.Cause(c.ctx) != errTakenBack {
			r.write(answer)
		}
	}()
}

// over forgets a request. It is before its answer is written: from then on the
// client may use the id again.
func (r *relay) over(c *carried) {
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.requests, string(c.id))
	r.held -= len(c.m.Raw())
	if c.opens {
		close(r.opening)
		r.opening = nil
	}
}

// telling is a notification on its way.
type telling struct {
	m      *jsonrpc.Message // nil: only to be told when those before it are done
	modern bool
	until  time.Time
	of     *carried      // the request that it takes back
	done   chan struct{} // closed when the gateway has it, or never will
}

// notify takes a notification. What takes back a request of a revision without
// sessions closes that request's connection, which says it; so does what takes
// back a request that has not been sent yet.
func (r *relay) notify(m *jsonrpc.Message) {
	t := &telling{m: m, modern: r.isModern(m), until: r.now().Add(r.t.patience), done: make(chan struct{})}
	if m.Method() == "notifications/cancelled" {
		r.mu.Lock()
		t.of = r.requests[string(m.Params().Get("requestId").Raw())]
		gone := t.of == nil && t.modern
		if c := t.of; c != nil && (c.modern || !c.gotten) {
			c.cancel(errTakenBack)
			gone = true
		}
		r.mu.Unlock()
		if gone {
			return
		}
	}
	r.mu.Lock()
	r.last = t
	r.mu.Unlock()
	select {
	case r.lane <- t:
	case <-r.ctx.Done():
	}
}

// tell sends notifications, one after the other.
func (r *relay) tell() {
	for {
		select {
		case t := <-r.lane:
			if t.m != nil {
				r.tellOne(t)
			}
			close(t.done)
		case <-r.ctx.Done():
			return
		}
	}
}

func (r *relay) tellOne(t *telling) {
	if c := t.of; c != nil {
		// What it takes back is on its way: the gateway must have that first.
		select {
		case <-c.sent:
		case <-c.ctx.Done():
		case <-time.After(time.Second):
		}
		c.takenBack.Store(true)
	}
	var err error
	if t.modern {
		err = r.post(r.ctx, t.until, func() http.Header { return r.modernHeader(t.m, nil) }, t.m.Raw(), false)
	} else {
		err = r.inSession(t.m, t.until)
	}
	if err != nil && r.ctx.Err() == nil {
		r.say("the notification %s did not get through: %v", t.m.Method(), err)
	}
}

// repeatable are the notifications of which the second says nothing new.
func repeatable(method string) bool {
	switch method {
	case "notifications/initialized", "notifications/cancelled", "notifications/roots/list_changed":
		return true
	}
	return false
}

// post sends what has no answer. again says that it may be sent a second time
// when nobody knows whether it was heard.
func (r *relay) post(ctx context.Context, until time.Time, header func() http.Header, body []byte, again bool) error {
	for {
		resp, err := r.reach(ctx, until, header(), body, nil, nil)
		if err != nil {
			if again && errors.Is(err, errBroken) && r.now().Before(until) && r.pause(ctx, r.t.pause) {
				continue
			}
			return err
		}
		text, err := readAnswer(resp)
		if resp.StatusCode/100 == 2 {
			return nil
		}
		return &refusedError{resp.StatusCode, reason(resp, text), err}
	}
}

// refusedError is an answer of the gateway that is a refusal.
type refusedError struct {
	status int
	text   string
	err    error
}

func (e *refusedError) Error() string { return "the gateway refuses it: " + e.text }
func (e *refusedError) Unwrap() error { return e.err }

// reason is what the gateway says in a refusal.
func reason(resp *http.Response, body []byte) string {
	if m, err := jsonrpc.Decode(body, connectAnswerLimits); err == nil {
		if text, _ := m.Error().Get("message").Text(); text != "" {
			return fmt.Sprintf("%s (HTTP %d)", strings.TrimSuffix(text, "."), resp.StatusCode)
		}
	}
	text := strings.TrimSpace(string(body))
	if len(text) > 200 {
		text = text[:200]
	}
	return strings.TrimSpace(fmt.Sprintf("HTTP %d %s", resp.StatusCode, strings.ToValidUTF8(text, "")))
}

// answer takes the client's answer to what a server asks. The first that the
// gateway gets counts, so it may be sent again.
func (r *relay) answer(m *jsonrpc.Message) {
	select {
	case r.answers <- struct{}{}:
	case <-r.ctx.Done():
		return
	}
	until := r.now().Add(r.t.patience)
	r.mu.Lock()
	leaving := r.leaving
	if !leaving {
		r.calls.Add(1)
	}
	r.mu.Unlock()
	if leaving {
		return
	}
	go func() {
		defer r.calls.Done()
		defer func() { <-r.answers }()
		if err := r.inSession(m, until); err != nil && r.ctx.Err() == nil {
			r.say("an answer of the client's did not get through: %v", err)
		}
	}()
}

// ownError is an error that does not come from the gateway.
func ownError(id []byte, code int, reason, message string) []byte {
	return jsonrpc.ErrorResponse(id, code, message, []byte(`{"waybill":{"code":"`+reason+`"}}`))
}
