package dispatch

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/http"
	"slices"

	"waybill.dev/schemas"
	"waybill.dev/schemas/jsonrpc"
)

// A server without sessions asks nothing of its own accord. It answers that it
// wants input, and is asked again with it (2026-07-28, basic/patterns/mrtr).
// The client of an older revision is asked by requests, in the middle of its
// call, which has one claim and one ending however often the server is asked.

// maxRounds is how often a server is asked again.
const maxRounds = 16

// inputMethods are what a server may ask of a client, and what an error stands
// for with which the client answers; "" for nothing: then the call is over.
var inputMethods = map[string]string{
	"elicitation/create":     `{"action":"cancel"}`,
	"sampling/createMessage": "",
	"roots/list":             "",
}

// inputs are what a request is sent again with.
type inputs struct {
	responses []byte // an object; nil: none were wanted
	state     []byte // JSON; nil: none
}

// members are the inputs as members of an object that has others before.
func (in *inputs) members() []byte {
	if in == nil {
		return nil
	}
	var b []byte
	if in.responses != nil {
		b = append(append(b, `,"inputResponses":`...), in.responses...)
	}
	if in.state != nil {
		b = append(append(b, `,"requestState":`...), in.state...)
	}
	return b
}

// set puts the inputs into params. What the request had of that kind belonged
// to the round before, or was nobody's.
func (in *inputs) set(p *jsonrpc.Patch, params jsonrpc.Value) {
	for _, m := range []member{{"inputResponses", in.responses}, {"requestState", in.state}} {
		if m.raw == nil {
			p.Remove(params, m.name)
		} else {
			p.Set(params, m.name, m.raw)
		}
	}
}

// errInput: what the server must know of the client cannot be had.
type errInput struct{ why string }

func (e *errInput) Error() string { return e.why }

func noInput(format string, a ...any) error { return &errInput{fmt.Sprintf(format, a...)} }

// gaveUp is the end of a call whose server wants input and does not get it.
func gaveUp(c Call, why error) Answer {
	a := rejected(c, jsonrpc.CodeInternalError, "%v", why)
	a.Local = false // the server was asked
	return a
}

// rounds makes a call at a server without sessions: it is asked as often as it
// wants to know more of the client.
//
// Only the first round can end as one that was never carried out. What the
// server has done before it asked, nobody knows, so that a later one whose
// connection breaks, or which the server refuses, leaves the outcome unknown.
func (s *session) rounds(ctx context.Context, c Call, progress func([]byte) error) (Answer, error) {
	var given *inputs
	nth := 0 // requests so far
	headers := s.headers(c)
	learned := false
	for round := 0; ; {
		inner, hangUp := context.WithCancel(ctx)
		answer, err := s.sendModern(inner, c, nth, given, headers, progress)
		nth++
		if err != nil {
			hangUp()
			if round == 0 {
				if errors.Is(err, errParams) || errors.Is(err, errMeta) {
					return rejected(c, jsonrpc.CodeInvalidParams, "%v", err), nil
				}
				s.suspectFault(err)
				return Answer{}, err
			}
			return Answer{}, begun(err)
		}
		s.suspect(answer)
		if answer.ErrorCode == jsonrpc.CodeHeaderMismatch && answer.Status == http.StatusBadRequest && !learned && c.Requested.Method == "tools/call" {
			learned = true
			if better, others := s.learn(ctx, c, headers); others {
				letGo(answer, hangUp)
				headers = better
				continue
			}
		}
		// A task is asked by other means, when its client comes for it.
		if answer.Result != inputRequired || !mayAsk[c.Requested.Method] || c.Requested.TaskNow {
			release := answer.Release
			answer.Release = func(h func()) {
				if release != nil {
					release(func() { h(); hangUp() })
				}
				hangUp()
			}
			older, err := s.older(answer, c)
			if err != nil {
				answer.Release(func() {})
			}
			return older, err
		}
		letGo(answer, hangUp)
		if round++; round > maxRounds {
			return gaveUp(c, fmt.Errorf("the server has asked for input %d times; it is not asked again", maxRounds)), nil
		}
		if given, err = s.fulfil(ctx, c, answer.Body, round); err != nil {
			if wrong := new(errInput); errors.As(err, &wrong) {
				return gaveUp(c, err), nil
			}
			return Answer{}, begun(err)
		}
	}
}

// letGo gives back the connection of an answer that is not the last.
func letGo(a Answer, hangUp func()) {
	if a.Release != nil {
		a.Release(hangUp)
	}
	hangUp()
}

// begun is a fault of a round after the first: the call is not one any more of
// which the server has never heard.
func begun(err error) error {
	f := new(Fault)
	if !errors.As(err, &f) {
		return faultf(Broken, "after the server had asked for input: %w", err)
	}
	switch f.Kind {
	case Unsent, Busy, Refused, Invalid:
		return faultf(Broken, "after the server had asked for input: %w", f.Err)
	}
	return f
}

// fulfil asks the client what the server wants to know, all at once, and returns
// what the client has answered when all of it is there.
func (s *session) fulfil(ctx context.Context, c Call, body []byte, round int) (*inputs, error) {
	msg, err := s.m.decode(body, c)
	if err != nil {
		return nil, &Fault{Kind: Garbled, Err: err} // it was decoded before
	}
	given := &inputs{}
	if state := msg.Result().Get("requestState"); state.Exists() {
		given.state = bytes.Clone(state.Raw())
	}
	requests := msg.Result().Get("inputRequests")
	if !requests.Exists() {
		if given.state == nil {
			return nil, faultf(Garbled, "the server wants input and does not say which")
		}
		return given, s.rest(ctx, round)
	}
	if requests.Kind() != jsonrpc.Object {
		return nil, faultf(Garbled, "the input that the server wants is no object")
	}
	var questions []*inquiry
	for key, v := range requests.Members() {
		method, _ := v.Get("method").Text()
		params := v.Get("params")
		switch _, ok := inputMethods[method]; {
		case !ok:
			return nil, noInput("the server wants %q of the client, which is nothing that it can be asked", clip(method, maxResultType))
		case params.Exists() && params.Kind() != jsonrpc.Object:
			return nil, noInput("the server asks %s of the client with params that are no object", method)
		case len(questions) == maxAsked:
			return nil, noInput("the server asks more than %d things of the client at once", maxAsked)
		}
		questions = append(questions, &inquiry{key: key, method: method, params: params.Raw()})
	}
	defer func() {
		for _, q := range questions {
			s.forgetAsked(q.id)
		}
	}()
	for _, q := range questions {
		if err := s.inquire(ctx, c.Event, q); err != nil {
			return nil, err
		}
	}
	if len(questions) == 0 { // which is how some servers ask for patience
		given.responses = []byte("{}")
		return given, s.rest(ctx, round)
	}
	responses := []byte{'{'}
	for i, q := range questions {
		var answer []byte
		select {
		case answer = <-q.answer:
		case <-ctx.Done():
			return nil, faultf(Broken, "the client has not answered %s: %w", q.method, context.Cause(ctx))
		case <-s.over.Done():
			return nil, faultf(Broken, "the client has not answered %s: %w", q.method, errSessionClosed)
		}
		result, err := q.result(answer)
		if err != nil {
			return nil, err
		}
		if i > 0 {
			responses = append(responses, ',')
		}
		responses = append(append(append(responses, jsonrpc.Quote(q.key)...), ':'), result...)
	}
	given.responses = append(responses, '}')
	return given, nil
}

// rest waits before a server is asked again that wants nothing but that.
func (s *session) rest(ctx context.Context, round int) error {
	t := s.t.timing
	if !pause(ctx, min(t.pause<<min(round-1, 16), t.pauses)) {
		return faultf(Broken, "waiting to ask again: %w", context.Cause(ctx))
	}
	return nil
}

// inquiry is one thing that a server wants to know of the client.
type inquiry struct {
	key, method string
	params      []byte // nil: none
	id          string // of the question, in the session
	answer      chan []byte
}

// inquire puts a question to the client, within its call.
func (s *session) inquire(ctx context.Context, e schemas.Event, q *inquiry) error {
	id := s.number()
	q.answer = make(chan []byte, 1)
	s.mu.Lock()
	full := len(s.asked) >= maxAsked
	if !full {
		q.id = id
		if s.asked == nil {
			s.asked = make(map[string]asking)
		}
		// Before it is stored, since the answer may come at once.
		s.asked[id] = asking{call: e.Call, to: q.answer}
	}
	s.mu.Unlock()
	if full {
		return noInput("the server wants input, and %d requests wait for the client already", maxAsked)
	}
	body := slices.Concat([]byte(`{"jsonrpc":"2.0","id":`), jsonrpc.Quote(id), []byte(`,"method":`), jsonrpc.Quote(q.method))
	if q.params != nil {
		body = slices.Concat(body, []byte(`,"params":`), q.params)
	}
	target := schemas.Target{Protocol: "mcp", Server: s.m.name, Method: q.method}
	err := s.store(ctx, e.Next(&schemas.Asked{Target: target, ID: id}, append(body, '}')))
	if refused(err) {
		return noInput("what the server asks of the client cannot be passed on")
	}
	if err != nil {
		return faultf(Broken, "storing what the server asks: %w", err)
	}
	return nil
}

// forgetAsked lets go of a question that nobody waits for any more.
func (s *session) forgetAsked(id string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.asked, id)
}

// result is what the client's answer tells the server.
func (q *inquiry) result(answer []byte) ([]byte, error) {
	msg, err := jsonrpc.Decode(answer, jsonrpc.Limits{Bytes: max(len(answer), 1), Depth: answerDepth, AllowCaseVariants: true})
	if err != nil || !msg.IsResponse() {
		return nil, noInput("the client's answer to %s cannot be read", q.method)
	}
	if msg.Error().Exists() {
		if instead := inputMethods[q.method]; instead != "" {
			return []byte(instead), nil
		}
		text, _ := msg.Error().Get("message").Text()
		return nil, noInput("the client answered %s with an error: %s", q.method, clip(text, maxWords/2))
	}
	return msg.Result().Raw(), nil
}
