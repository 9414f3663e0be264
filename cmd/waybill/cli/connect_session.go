package cli

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"strings"
	"time"

	"waybill.dev/schemas/jsonrpc"
	"waybill.dev/workers/dispatch"
)

// connectSession is the session of a client of a revision before 2026-07-28. It
// does not change but for what is guarded.
type connectSession struct {
	id       string // the gateway's, a secret
	revision string // as agreed
	begin    *jsonrpc.Message
	ctx      context.Context
	end      context.CancelCauseFunc

	// Owned by the relay's mu.
	ready *jsonrpc.Message            // the client's notifications/initialized, once the gateway has it
	kept  map[string]*jsonrpc.Message // what a new session has to be told, by what it is about
}

// connectKept bounds what is kept of a session to be told to the next.
const connectKept = 256

// errSessionOver: the gateway does not know the session any more.
var errSessionOver = errors.New("the gateway has ended the session")

// header is that of a message of the session; s may be nil.
func (s *connectSession) header() http.Header {
	h := http.Header{"Content-Type": {"application/json"}, "Accept": {"application/json, text/event-stream"}}
	if s == nil {
		return h
	}
	if s.id != "" {
		h["Mcp-Session-Id"] = []string{s.id}
	}
	if s.revision != "" {
		h["Mcp-Protocol-Version"] = []string{s.revision}
	}
	return h
}

// current is the session, once the initialize under way has ended; nil without
// one.
func (r *relay) current(ctx context.Context) (*connectSession, error) {
	for {
		r.mu.Lock()
		s, opening := r.session, r.opening
		r.mu.Unlock()
		if s != nil || opening == nil {
			return s, nil
		}
		select {
		case <-opening:
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
	}
}

// gone tells whether an answer says that the gateway does not know the session:
// it has not looked at what was sent.
func (s *connectSession) gone(resp *http.Response) bool {
	return s != nil && s.id != "" && resp.StatusCode == http.StatusNotFound
}

// carryLegacy carries a request of the session. A stream that breaks is asked
// for again from where it broke; a session that is gone is opened again.
func (c *carried) carryLegacy() ([]byte, error) {
	r := c.r
	if c.opens {
		return c.open()
	}
	x := strand{c: c}
	pauses := r.backoff(r.t.pauses)
	for renewed := 0; ; {
		s, err := r.current(c.ctx)
		if err != nil {
			return nil, err
		}
		resp, err := r.reach(c.ctx, c.until, s.header(), c.m.Raw(), c.got, c.wrote)
		var answer []byte
		switch {
		case err != nil:
		case s.gone(resp) && renewed < 2:
			_ = resp.Body.Close()
			renewed++
			if _, err := r.renew(c.ctx, s, c.until); err != nil {
				return nil, err
			}
			continue
		default:
			if answer, err = c.read(resp, &x); errors.Is(err, errCut) && x.last != "" {
				answer, err = c.resume(s, &x, err)
			}
		}
		if err == nil {
			r.keep(s, c.m, answer)
			return answer, nil
		}
		lost := errors.Is(err, errBroken) || errors.Is(err, errCut)
		if !lost || !dispatch.Reads(c.method) || x.wrote || r.now().After(c.until) || c.takenBack.Load() {
			return nil, err
		}
		if !r.pause(c.ctx, pauses.NextBackOff()) {
			return nil, context.Cause(c.ctx)
		}
	}
}

// resume asks for the rest of an answer that broke off.
func (c *carried) resume(s *connectSession, x *strand, cut error) ([]byte, error) {
	r := c.r
	pauses := r.backoff(r.t.pauses)
	until := r.now().Add(r.t.resume)
	for {
		if c.takenBack.Load() {
			return nil, cut // the gateway ends the stream without an answer
		}
		if !r.pauseUntilUp(c.ctx, max(pauses.NextBackOff(), min(x.retry, r.t.resume))) {
			return nil, context.Cause(c.ctx)
		}
		x.moved = false
		resp, err := r.get(c.ctx, s, x.last)
		switch {
		case err != nil && c.ctx.Err() != nil:
			return nil, err
		case err != nil:
			r.missing(err)
			err = fmt.Errorf("%w; the rest cannot be asked for: %w", errCut, err)
		case isStream(resp):
			var answer []byte
			if answer, err = r.readStream(resp, x); !errors.Is(err, errCut) {
				return answer, err
			}
		default:
			body, _ := readAnswer(resp)
			err = fmt.Errorf("%w, and the gateway does not give the rest: %s", errCut, reason(resp, body))
			if s.gone(resp) {
				return nil, fmt.Errorf("%w: %w", errSessionOver, err)
			}
			if code := resp.StatusCode; code < 500 && code != http.StatusTooManyRequests && code != http.StatusConflict && code != http.StatusRequestTimeout {
				return nil, err
			}
		}
		if x.moved {
			pauses.Reset()
			until = r.now().Add(r.t.resume)
		}
		if r.now().After(until) {
			return nil, err
		}
	}
}

// get asks for a stream of the session: its own, or the rest of one.
func (r *relay) get(ctx context.Context, s *connectSession, last string) (*http.Response, error) {
	h := s.header()
	h.Del("Content-Type")
	h["Accept"] = []string{"text/event-stream"}
	if last != "" {
		h["Last-Event-Id"] = []string{last}
	}
	return r.send(ctx, http.MethodGet, h, nil, nil, nil)
}

// open carries the initialize that opens the session.
func (c *carried) open() ([]byte, error) {
	s, answer, err := c.r.initialize(c.ctx, c, c.m, c.until)
	if err != nil || s == nil {
		return answer, err
	}
	c.r.mu.Lock()
	c.r.session = s
	c.r.mu.Unlock()
	return answer, nil
}

// initialize opens a session, of c's if that is not nil. There is none when the
// gateway answers with an error. A session whose answer was lost is of no use
// to anybody and ends by itself, so that it may be asked for again.
func (r *relay) initialize(ctx context.Context, c *carried, m *jsonrpc.Message, until time.Time) (*connectSession, []byte, error) {
	own := c
	if own == nil {
		own = &carried{r: r, m: m, id: m.ID().Raw(), method: m.Method(), ctx: ctx, sent: make(chan struct{})}
	}
	pauses := r.backoff(r.t.pauses)
	for {
		resp, err := r.reach(ctx, until, (*connectSession)(nil).header(), m.Raw(), own.got, own.wrote)
		var answer []byte
		if err == nil {
			x := strand{c: own}
			answer, err = own.read(resp, &x)
		}
		switch {
		case err == nil:
		case (errors.Is(err, errBroken) || errors.Is(err, errCut)) && r.now().Before(until) && r.pause(ctx, pauses.NextBackOff()):
			continue
		default:
			return nil, nil, err
		}
		a, err := jsonrpc.Decode(answer, connectAnswerLimits)
		if err != nil {
			return nil, nil, fmt.Errorf("%w: %w", errBadAnswer, err)
		}
		if !a.Result().Exists() {
			text, _ := a.Error().Get("message").Text()
			r.say("there is no session to be had at %s: %s. Is that a server or view, and may this agent use it?", r.url, strings.TrimSuffix(text, "."))
			return nil, answer, nil
		}
		s := &connectSession{id: resp.Header.Get("Mcp-Session-Id"), begin: m, kept: map[string]*jsonrpc.Message{}}
		s.revision, _ = a.Result().Get("protocolVersion").Text()
		s.ctx, s.end = context.WithCancelCause(r.ctx)
		return s, answer, nil
	}
}

// inSession sends a notification, or an answer to what a server asks, in the
// session.
func (r *relay) inSession(m *jsonrpc.Message, until time.Time) error {
	for renewed := false; ; renewed = true {
		s, err := r.current(r.ctx)
		if err != nil {
			return err
		}
		if s == nil {
			return errors.New("there is no session")
		}
		ready := m.Method() == "notifications/initialized" && m.IsNotification()
		if ready {
			until = r.now().Add(24 * time.Hour) // without it the session is of no use
		}
		err = r.post(r.ctx, until, s.header, m.Raw(), m.IsResponse() || repeatable(m.Method()))
		var refused *refusedError
		switch {
		case errors.As(err, &refused) && refused.status == http.StatusNotFound && s.id != "":
			if m.IsResponse() {
				return errSessionOver // nobody is left who has asked
			}
			if renewed {
				return err
			}
			if _, err := r.renew(r.ctx, s, until); err != nil {
				return err
			}
			continue
		case err != nil:
			return err
		}
		if ready {
			r.begun(s, m)
		}
		return nil
	}
}

// begun notes that the gateway knows that the client is ready, and from then on
// listens to what it says outside of answers.
func (r *relay) begun(s *connectSession, m *jsonrpc.Message) {
	r.mu.Lock()
	first := s.ready == nil
	s.ready = m
	r.mu.Unlock()
	if first && s.id != "" {
		r.work.Go(func() { r.listen(s) })
	}
}

// listen passes on the session's own stream, until the session ends. It is
// asked for again, from where it broke, for as long as that takes.
func (r *relay) listen(s *connectSession) {
	x := strand{}
	pauses := r.backoff(5 * r.t.pauses)
	said := ""
	for {
		x.moved = false
		resp, err := r.get(s.ctx, s, x.last)
		switch {
		case s.ctx.Err() != nil:
			if err == nil {
				_ = resp.Body.Close()
			}
			return
		case err != nil:
			r.missing(err)
		case isStream(resp):
			_, err = r.readStream(resp, &x)
			if s.ctx.Err() != nil {
				return
			}
			if errors.Is(err, errBadAnswer) {
				r.say("the session's stream: %v", err) // a message that is too large; there is no way past it
				return
			}
			said = ""
		default:
			body, _ := readAnswer(resp)
			text := reason(resp, body)
			switch {
			case s.gone(resp):
				if _, err := r.renew(s.ctx, s, r.now().Add(r.t.patience)); err == nil {
					return
				} else if s.ctx.Err() == nil {
					r.say("%v", err)
				}
			case resp.StatusCode == http.StatusMethodNotAllowed:
				return // there is none to be had
			case resp.StatusCode == http.StatusBadRequest && x.last != "":
				r.say("the session's stream cannot be resumed, messages may be missing: %s", text)
				x.last = ""
			case resp.StatusCode != http.StatusNoContent && text != said:
				said = text
				r.say("the session's stream is refused: %s", text)
			}
		}
		if x.moved {
			pauses.Reset()
		}
		if !r.pauseUntilUp(s.ctx, max(pauses.NextBackOff(), min(x.retry, r.t.patience))) {
			return
		}
	}
}

// keep notes what a session has been told that a new one would have to be told
// again.
func (r *relay) keep(s *connectSession, m *jsonrpc.Message, answer []byte) {
	if s == nil {
		return
	}
	uri, _ := m.Params().Get("uri").Text()
	key, add := "", true
	switch m.Method() {
	case "logging/setLevel":
		key = "level"
	case "resources/subscribe":
		key = "of " + uri
	case "resources/unsubscribe":
		key, add = "of "+uri, false
	default:
		return
	}
	if !succeeded(answer) {
		return
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if !add {
		delete(s.kept, key)
		return
	}
	if s.kept[key] == nil && len(s.kept) >= connectKept {
		return
	}
	s.kept[key] = m
}

// renew opens the session again that the gateway does not know any more, unless
// somebody has done so: with what the client said when it opened the first, and
// what it has asked of it since. It goes on when who needs the session does not,
// for others do.
func (r *relay) renew(ctx context.Context, old *connectSession, until time.Time) (*connectSession, error) {
	select {
	case r.renewing <- struct{}{}:
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
	defer func() { <-r.renewing }()
	if s, err := r.current(r.ctx); err != nil || s != old {
		return s, err
	}
	s, answer, err := r.initialize(r.ctx, nil, old.begin, until)
	switch {
	case err != nil:
		return nil, fmt.Errorf("the gateway has ended the session, and a new one cannot be opened: %w", err)
	case s == nil:
		text := "it answers with an error"
		if a, err := jsonrpc.Decode(answer, connectAnswerLimits); err == nil {
			text, _ = a.Error().Get("message").Text()
		}
		return nil, &refusedError{http.StatusOK, "it has ended the session, and opens no new one: " + text, nil}
	case s.revision != old.revision:
		s.end(errSessionOver)
		return nil, &refusedError{http.StatusOK, fmt.Sprintf("it has ended the session, and a new one has revision %s, not %s: start the client again", s.revision, old.revision), nil}
	}
	r.mu.Lock()
	ready := old.ready
	s.kept = maps.Clone(old.kept)
	r.mu.Unlock()
	if ready != nil {
		if err := r.post(r.ctx, until, s.header, ready.Raw(), true); err != nil {
			s.end(errSessionOver)
			return nil, fmt.Errorf("the gateway has ended the session, and a new one did not begin: %w", err)
		}
	}
	lost := 0
	for key, m := range s.kept {
		c := &carried{r: r, m: m, id: m.ID().Raw(), method: m.Method(), ctx: r.ctx, sent: make(chan struct{})}
		resp, err := r.reach(r.ctx, until, s.header(), m.Raw(), nil, nil)
		var answer []byte
		if err == nil {
			answer, err = c.read(resp, &strand{c: c})
		}
		if err != nil || !succeeded(answer) {
			delete(s.kept, key)
			lost++
		}
	}
	r.mu.Lock()
	r.session = s
	r.mu.Unlock()
	old.end(errSessionOver)
	if ready != nil {
		r.begun(s, ready)
	}
	r.say("the gateway has ended the session; a new one has been opened")
	if lost > 0 {
		r.say("%d subscriptions and settings of the old session could not be made again", lost)
	}
	return s, nil
}

// succeeded tells whether an answer is a result.
func succeeded(answer []byte) bool {
	m, err := jsonrpc.Decode(answer, connectAnswerLimits)
	return err == nil && m.Result().Exists()
}

// farewell ends the session.
func (r *relay) farewell(ctx context.Context) {
	r.mu.Lock()
	s := r.session
	r.mu.Unlock()
	if s == nil || s.id == "" {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, r.t.farewell)
	defer cancel()
	h := s.header()
	h.Del("Content-Type")
	resp, err := r.send(ctx, http.MethodDelete, h, nil, nil, nil)
	if err != nil {
		r.say("the session was not ended, and ends by itself when it is idle: %v", err)
		return
	}
	_ = resp.Body.Close()
}
