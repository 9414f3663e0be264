package dispatch

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/cenkalti/backoff/v4"

	"waybill.dev/schemas"
	"waybill.dev/schemas/jsonrpc"
)

// maxAsked is how many requests of a server may wait for the client's answers
// in one session. The next takes the place of one whose call is over, or else is
// answered by the gateway, with an error.
const maxAsked = 64

// asking is a request of a server that has no answer yet.
type asking struct {
	id       []byte         // as the server wrote it
	call     schemas.CallID // within which it was asked; "" if outside of any
	over     bool           // that call has ended, so hardly anybody waits for the answer
	answered bool           // the answer is on its way
	to       chan<- []byte  // who waits for it here, with room for it; nil: the server does
}

// answerTries is how often the gateway tries to bring an answer to the server.
const answerTries = 5

// number makes an ID that is unique within the client's session, whoever else
// makes some.
func (s *session) number() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.numbered++
	return s.by + "." + strconv.FormatUint(s.numbered, 10)
}

// numberOf is number for a message of the session's own stream. What has an event
// ID there is the same whoever hears it, so that the log has it once.
func (s *session) numberOf(event string, raw []byte) string {
	if event == "" || s.openedBy == "" {
		return s.number()
	}
	sum := sha256.Sum256(append([]byte(event+"\x00"), raw...))
	return s.openedBy + "." + hex.EncodeToString(sum[:12])
}

// ask stores what the server asks of the client: as said within the call of e,
// or outside of any if e has none; then event is its ID in the session's stream,
// or "". msg must be a request. The error is that of the log, other than that it
// refuses the event.
func (s *session) ask(ctx context.Context, e schemas.Event, msg *jsonrpc.Message, event string) error {
	if s.t.opt.mute(s.m.name) {
		s.refuse(ctx, msg.ID().Raw(), "nothing of this server is approved")
		return nil
	}
	if w := s.t.cores.of(s, msg.Params().Get("_meta", relatedTask, "taskId")); w != nil {
		w.ask(ctx, s, msg)
		return nil
	}
	if s.guest != nil {
		s.guest.asked(ctx, s, e.Call, msg)
		return nil
	}
	id := s.numberOf(event, msg.Raw())
	s.mu.Lock()
	full := len(s.asked) >= maxAsked && !s.giveUp()
	if !full {
		if s.asked == nil {
			s.asked = make(map[string]asking)
		}
		// Before it is stored, since the answer may come at once.
		s.asked[id] = asking{id: bytes.Clone(msg.ID().Raw()), call: e.Call}
	}
	s.mu.Unlock()
	if full {
		s.refuse(ctx, msg.ID().Raw(), fmt.Sprintf("%d requests wait for the client already", maxAsked))
		return nil
	}
	target := schemas.Target{Protocol: "mcp", Server: s.m.name, Method: msg.Method()}
	err := s.store(ctx, e.Next(&schemas.Asked{Target: target, ID: id, Event: event}, msg.Raw()))
	if err == nil {
		return nil
	}
	s.mu.Lock()
	delete(s.asked, id)
	s.mu.Unlock()
	if refused(err) {
		s.refuse(ctx, msg.ID().Raw(), "the request cannot be passed on to the client")
		return nil
	}
	return err
}

// callOver marks what a call has asked and nobody has answered: a client that
// answers nothing must not keep those from being asked who come later.
func (s *session) callOver(call schemas.CallID) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for id, a := range s.asked {
		if call != "" && a.call == call {
			a.over = true
			s.asked[id] = a
		}
	}
}

// giveUp lets go of a request whose call is over. mu is held.
func (s *session) giveUp() bool {
	for id, a := range s.asked {
		if a.over && !a.answered {
			delete(s.asked, id)
			return true
		}
	}
	return false
}

// refuse answers a server in place of the client.
func (s *session) refuse(ctx context.Context, id []byte, why string) {
	s.log().Warn("a request of the server is refused", "why", why)
	ctx, cancel := context.WithTimeout(ctx, s.t.timing.cancel)
	defer cancel()
	if err := s.tell(ctx, jsonrpc.ErrorResponse(id, jsonrpc.CodeInternalError, why, nil)); err != nil {
		s.log().Warn("a request of the server is left without an answer", "error", err)
	}
}

// say stores what the server says outside of any call. What the log will never
// take is left out, which is logged; another error is the log's.
func (s *session) say(raw []byte) error {
	msg, err := jsonrpc.Decode(raw, jsonrpc.Limits{Bytes: int(s.m.maxAnswer), Depth: answerDepth, AllowCaseVariants: true})
	if err != nil {
		return err
	}
	return s.notify(msg, "")
}

// notify is say; event is the message's ID in the session's stream, or "".
func (s *session) notify(msg *jsonrpc.Message, event string) error {
	switch msg.Method() {
	case taskStatus:
		if w := s.t.cores.of(s, msg.Params().Get("taskId")); w != nil {
			poke(w.news)
			return nil
		}
	case "notifications/tools/list_changed":
		s.mu.Lock()
		s.tools = nil
		s.mu.Unlock()
	}
	s.t.opt.learning.says(s.m.name, msg.Method())
	if s.t.opt.mute(s.m.name) && !strings.HasSuffix(msg.Method(), "/list_changed") {
		return nil
	}
	if s.guest != nil {
		s.guest.notified(s, msg)
		return nil
	}
	target := schemas.Target{Protocol: "mcp", Server: s.m.name, Method: msg.Method()}
	err := s.store(s.ctx, s.base.Next(&schemas.Notified{Target: target, ID: s.numberOf(event, msg.Raw()), Event: event}, msg.Raw()))
	if refused(err) {
		s.log().Error("a message of the server is lost", "method", clip(msg.Method(), maxWords), "error", err)
		return nil
	}
	return err
}

// store stores an event that came from the server, whatever becomes of ctx: the
// server will not say it again. It tries for as long as the log is away, within
// limits.
func (s *session) store(ctx context.Context, e schemas.Event) error {
	e, err := s.t.opt.answers.screenedEvent(s.m.name, e)
	if err != nil {
		return err
	}
	ctx, cancel := sure(ctx, s.t.timing.store)
	defer cancel()
	pauses := backoff.NewExponentialBackOff(backoff.WithInitialInterval(100*time.Millisecond), backoff.WithMaxInterval(5*time.Second))
	return backoff.Retry(func() error {
		_, err := s.t.opt.Store(ctx, e)
		// When the process is being stopped one try has to do.
		if refused(err) || err != nil && s.t.ctx.Err() != nil {
			return backoff.Permanent(err)
		}
		return err
	}, backoff.WithContext(pauses, ctx))
}

// Answered is the [schemas.Handler] for answered. Every dispatcher hears every
// answer: the one whose upstream has asked brings it there, once.
func (d *Dispatcher) Answered(_ context.Context, e schemas.Event, _ schemas.Emit) error {
	a, ok := e.Data.(*schemas.Answered)
	if !ok {
		return nil
	}
	t := d.sessions
	t.mu.Lock()
	s := t.of[idOfSession(e)][a.Server]
	t.mu.Unlock()
	switch {
	case s != nil:
		s.bring(e, a)
	case e.Call == "" && t.opt.Owners == nil && t.opt.Latest != nil:
		// Asked of this process before it was started again. Where there are
		// several, who takes over what one listened to brings the answer.
		d.inBackground(func(ctx context.Context) {
			u := d.upstreams[a.Server]
			if u == nil || u.mcp == nil || u.mcp.held {
				return // gone with the process that held it
			}
			last, found, err := t.connected(ctx, idOfSession(e), a.Server)
			if err == nil && found {
				err = d.takeOver(ctx, idOfSession(e), u.mcp, last)
			}
			if err != nil {
				d.opt.Log.Warn("an answer of the client does not reach the server", "session", e.Session, "server", a.Server, "error", err)
			}
		})
	}
	return nil
}

// bring has the client's answer brought to the server, once.
func (s *session) bring(e schemas.Event, a *schemas.Answered) {
	s.mu.Lock()
	asked, ok := s.asked[a.ID]
	if !ok || asked.answered {
		s.mu.Unlock()
		return
	}
	if asked.to != nil {
		delete(s.asked, a.ID)
		s.mu.Unlock()
		asked.to <- e.Body
		return
	}
	asked.answered = true
	s.asked[a.ID] = asked
	s.mu.Unlock()
	// One goroutine for each that was asked, of which there are few.
	s.t.spawn(func() {
		defer func() {
			s.mu.Lock()
			defer s.mu.Unlock()
			delete(s.asked, a.ID)
		}()
		if err := s.answer(asked.id, e.Body); err != nil && s.ctx.Err() == nil {
			// The client has been told that its answer is taken.
			s.log().Error("an answer of the client did not reach the server", "id", a.ID, "seq", e.Seq, "error", err)
		}
	})
}

// patiently asks the log for something, again for as long as it is away, within
// limits.
func (s *session) patiently(ctx context.Context, ask func() error) error {
	ctx, cancel := context.WithTimeout(ctx, s.t.timing.store)
	defer cancel()
	pauses := backoff.NewExponentialBackOff(backoff.WithInitialInterval(s.t.timing.pause), backoff.WithMaxInterval(s.t.timing.pauses))
	return backoff.Retry(ask, backoff.WithContext(pauses, ctx))
}

// lastEvent is the ID of the newest event of the session's stream that the log
// has, whoever listened then; "" if that is not known.
func (s *session) lastEvent(ctx context.Context) (string, error) {
	var last string
	var seq uint64
	note := func(e schemas.Event) bool {
		var server, id, event string
		switch d := e.Data.(type) {
		case *schemas.Notified:
			server, id, event = d.Server, d.ID, d.Event
		case *schemas.Asked:
			server, id, event = d.Server, d.ID, d.Event
		}
		if event == "" || server != s.m.name || !strings.HasPrefix(id, s.openedBy+".") {
			return false
		}
		if e.Seq > seq {
			last, seq = event, e.Seq
		}
		return true
	}
	for _, k := range []schemas.Kind{schemas.KindNotified, schemas.KindAsked} {
		e, err := s.t.opt.Latest(ctx, s.id.tenant, s.id.key, k)
		if errors.Is(err, schemas.ErrNotFound) {
			continue
		}
		if err != nil {
			return "", err
		}
		// The newest may be another server's, or said within a call.
		if note(e) || e.Seq < seq || s.t.opt.Scan == nil {
			continue
		}
		for e, err := range s.t.opt.Scan(ctx, s.id.tenant, s.id.key, k) {
			if err != nil {
				return "", err
			}
			note(e)
		}
	}
	return last, nil
}

// recently is how long ago an answer may have been given that is brought to the
// server by whoever takes a session over: the process that should have done so
// may have died before. A server that has it passes it over.
const recently = 2 * time.Minute

// openQuestions finds out what the server has asked on the session's stream while
// another process listened, and has the answers that were given meanwhile
// brought there.
func (s *session) openQuestions(ctx context.Context) error {
	if s.t.opt.Scan == nil {
		return nil
	}
	// Answers that come from here on find the questions; those before are read.
	var since uint64
	for e, err := range s.t.opt.Scan(ctx, s.id.tenant, s.id.key, schemas.KindConnected) {
		if err != nil {
			return err
		}
		if c, ok := e.Data.(*schemas.Connected); ok && c.Server == s.m.name && c.By == s.openedBy {
			since = e.Seq
		}
	}
	found := false
	for e, err := range s.t.opt.Scan(ctx, s.id.tenant, s.id.key, schemas.KindAsked) {
		if err != nil {
			return err
		}
		a, ok := e.Data.(*schemas.Asked)
		if !ok || e.Call != "" || a.Server != s.m.name || e.Seq < since {
			continue
		}
		msg, err := jsonrpc.Decode(e.Body, jsonrpc.Limits{Bytes: max(len(e.Body), 1), Depth: answerDepth, AllowCaseVariants: true})
		if err != nil || !msg.IsRequest() {
			continue
		}
		s.mu.Lock()
		if q, ok := s.asked[a.ID]; ok {
			found = found || !q.answered // it may be answered by now
		} else if len(s.asked) < maxAsked || s.giveUp() {
			if s.asked == nil {
				s.asked = make(map[string]asking)
			}
			s.asked[a.ID] = asking{id: bytes.Clone(msg.ID().Raw())}
			found = true
		}
		s.mu.Unlock()
	}
	if !found {
		return nil
	}
	for e, err := range s.t.opt.Scan(ctx, s.id.tenant, s.id.key, schemas.KindAnswered) {
		if err != nil {
			return err
		}
		a, ok := e.Data.(*schemas.Answered)
		if !ok || a.Server != s.m.name || e.Call != "" {
			continue
		}
		if s.t.opt.Now().Sub(e.Stored) < recently {
			s.bring(e, a)
			continue
		}
		s.mu.Lock()
		if q, ok := s.asked[a.ID]; ok && !q.answered {
			delete(s.asked, a.ID)
		}
		s.mu.Unlock()
	}
	return nil
}

// answer brings the client's answer to the server. The server may hear it
// twice, and it counts once there, as it does here.
func (s *session) answer(id, body []byte) error {
	msg, err := jsonrpc.Decode(body, jsonrpc.Limits{Bytes: max(len(body), 1), Depth: answerDepth, AllowCaseVariants: true})
	if err == nil && (!msg.IsResponse() || !msg.ID().Exists()) {
		err = errors.New("it is no answer")
	}
	if err == nil {
		p := msg.Patch().Replace(msg.ID(), id)
		if body = p.Bytes(); body == nil {
			err = p.Err()
		}
	}
	ctx, cancel := context.WithTimeout(s.ctx, s.t.timing.answer)
	defer cancel()
	if err != nil {
		s.refuse(ctx, id, "the client's answer cannot be read")
		return err
	}
	pauses := backoff.NewExponentialBackOff(backoff.WithInitialInterval(s.t.timing.pause))
	return backoff.Retry(func() error {
		err := s.tell(ctx, body)
		if f := new(Fault); errors.As(err, &f) && f.Kind != Garbled {
			return err
		}
		if err != nil {
			return backoff.Permanent(err)
		}
		return nil
	}, backoff.WithContext(backoff.WithMaxRetries(pauses, answerTries-1), ctx))
}
