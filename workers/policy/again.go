package policy

import (
	"errors"
	"fmt"
	"time"

	"waybill.dev/schemas"
)

// What a decision says and what it makes of the request are pure, so that replay
// can make it again: here is nothing that looks at a clock or at what else goes on.

// spoken writes a verdict into a decision.
func spoken(word schemas.Decision, v Verdict, facts Facts) schemas.Decision {
	word.Rule, word.Reason, word.Facts = v.Rule, v.Reason, facts.Record()
	word.Matches, word.MatchesMore = v.Matches, 0
	if more := len(v.Matches) - maxMatches; more > 0 {
		word.Matches, word.MatchesMore = v.Matches[:maxMatches], more
	}
	if v.Permit || v.Hold {
		word.Obligations = v.Obligations.Record()
	}
	return word
}

// refusal is the payload of a request that is not let on.
func refusal(e schemas.Event, q *schemas.Requested, word schemas.Decision) *schemas.Denied {
	word.Obligations = nil
	return &schemas.Denied{Summary: summary(e, q), Decision: word}
}

// told is what a caller is told of its arguments: of a tool that it may list.
func (b *Bundle) told(e schemas.Event, q *schemas.Requested, facts Facts) string {
	if facts.Arguments != "" && facts.Refused == "" && b.Shows(e, facts, q.Name) {
		return facts.Arguments
	}
	return ""
}

// held is the payload of a request that a person has to approve.
func held(e schemas.Event, q *schemas.Requested, v Verdict, word schemas.Decision) *schemas.Held {
	expires := q.Deadline
	if w := v.Obligations.Wait; w > 0 {
		expires = e.Stored.Add(w)
	} else if expires.IsZero() {
		expires = e.Stored.Add(patience)
	}
	return &schemas.Held{Target: q.Target, Decision: word, RequestedSeq: e.Seq, RequestedAt: e.Stored, Expires: expires}
}

// granted is the payload and the body of a request that is let on. again is when,
// if it was held before.
func granted(e schemas.Event, q *schemas.Requested, v Verdict, word schemas.Decision, again time.Time) (schemas.Payload, []byte) {
	a := &schemas.Authorized{
		Requested: *q, Decision: word, Orders: v.Obligations.Orders(), RequestedSeq: e.Seq, RequestedAt: e.Stored, Only: v.Only, Each: v.Each,
	}
	if word.N > 1 {
		// The times are not about persons: the call has those that it had.
		if !q.Deadline.IsZero() {
			a.Deadline = again.Add(q.Deadline.Sub(e.Stored))
		}
		if !q.TaskUntil.IsZero() {
			a.TaskUntil = again.Add(q.TaskUntil.Sub(e.Stored))
		}
	}
	if d := v.Obligations.Deadline; d > 0 {
		begin := e.Stored
		if word.N > 1 {
			begin = again
		}
		if until := begin.Add(d); a.Deadline.IsZero() || until.Before(a.Deadline) {
			a.Deadline = until
		}
	}
	body := e.Body
	if len(v.Obligations.Redact) > 0 {
		var err error
		if body, err = redact(q, e.Body, v.Obligations.Redact); err != nil {
			word.Reason = brief(err)
			return refusal(e, q, word), nil
		}
		return a, body
	}
	if len(body) <= schemas.InlineBody {
		return a, body
	}
	a.BodySize, a.BodySHA256 = len(body), digest(body)
	return a, nil
}

// What a hold comes to where it cannot be one.
const (
	nobodyToAsk = "; nobody can be asked"
	tooManyHeld = "; too many calls wait for an approval already"
)

// noPolicy is the reason of a denial while there are no rules.
const noPolicy = "no policy is in force"

// ErrNoDecision is returned for an event that is no decision, or not of the request.
var ErrNoDecision = errors.New("no decision on this request")

// Again makes the decision again that a stored event is: the event that would be
// stored now, on the facts that the decision names, under this bundle, which has to
// be the one that it names. It is pure. When a call that was held went on is not
// recorded apart, so the times that follow from it are taken from the decision.
func (b *Bundle) Again(request, was schemas.Event) (schemas.Event, error) {
	q, ok := request.Data.(*schemas.Requested)
	if !ok || q == nil || request.Call != was.Call {
		return schemas.Event{}, ErrNoDecision
	}
	var d schemas.Decision
	switch p := was.Data.(type) {
	case *schemas.Authorized:
		d = p.Decision
	case *schemas.Denied:
		d = p.Decision
	case *schemas.Held:
		d = p.Decision
	default:
		return schemas.Event{}, ErrNoDecision
	}
	if d.PolicySHA256 == "" {
		return request.Next(refusal(request, q, schemas.Decision{N: d.N, Reason: noPolicy}), nil), nil
	}
	facts, err := FactsOf(d.Facts)
	if err != nil {
		return schemas.Event{}, fmt.Errorf("the facts of decision %d: %w", d.N, err)
	}
	// Which definition was pinned is what the registry said, and a fact.
	word := schemas.Decision{N: d.N, PolicySHA256: b.Digest, ToolSHA256: d.ToolSHA256}
	if t := facts.Tool; t != nil {
		word.ToolSHA256 = t.SHA256
	}
	in := &Input{Event: &request, Request: q, Facts: facts}
	if q.Method == toolsCall {
		in.read = readRequest(q.Method, request.Body)
		word.ArgsSHA256 = in.read.digest(request.Body)
	}
	v := b.decide(in)
	if d.N > 1 || v.Hold || facts.Approval != "" {
		word.Approval = approvalID(request, q, word)
	}
	word = spoken(word, v, facts)
	switch {
	case v.Hold:
		if r, ok := was.Data.(*schemas.Denied); ok && (r.Reason == word.Reason+nobodyToAsk || r.Reason == word.Reason+tooManyHeld) {
			word.Reason = r.Reason // of what was the case then
			return request.Next(refusal(request, q, word), nil), nil
		}
		return request.Next(held(request, q, v, word), nil), nil
	case !v.Permit:
		r := refusal(request, q, word)
		r.Arguments = b.told(request, q, facts)
		return request.Next(r, nil), nil
	}
	data, body := granted(request, q, v, word, was.Time)
	if a, ok := data.(*schemas.Authorized); ok && d.N > 1 {
		if p, ok := was.Data.(*schemas.Authorized); ok {
			a.Deadline, a.TaskUntil = p.Deadline, p.TaskUntil
		}
	}
	return request.Next(data, body), nil
}
