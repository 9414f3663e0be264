// Package policy decides which calls may go on. It is default deny: a call
// that no rule permits is denied, with an event that says why.
//
// Begin with [Rule], what every kind of rule compiles to, then
// [Policy.Decide], which is pure, and [Policy.Handle], which puts it between
// the log's `requested` and `authorized`. A new kind of rule is one file with
// a struct as the operator writes it and a method Rule() (Rule, error):
// allow.go is the pattern.
package policy

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"waybill.dev/schemas"
)

// Options are all that a Policy depends on. Policy keeps them unchanged for
// its life: another policy is another Policy.
type Options struct {
	// Rules in the order in which the operator wrote them. The order decides
	// only which of several agreeing rules a decision names.
	Rules []Rule

	// Servers are the upstreams that exist. A call to any other is denied,
	// whatever the rules say, so that guessing names teaches nothing.
	Servers []string

	// Past reads what the log holds of a call. Required.
	Past schemas.Past

	// Duplicates is the window in which the log drops a repeated ID. Required.
	Duplicates time.Duration

	Now func() time.Time // default time.Now
	Log *slog.Logger     // for rules that fail; default: none
}

// Policy is safe for concurrent use; it holds nothing that changes.
type Policy struct {
	forbids, permits []Rule // each in the operator's order
	servers          map[string]bool
	past             schemas.Past
	duplicates       time.Duration
	now              func() time.Time
	log              *slog.Logger
}

// New checks the options. Rules must have an ID, unique among them, an effect
// and a function; no rules at all is a policy too, which denies everything.
func New(o Options) (*Policy, error) {
	if o.Past == nil {
		return nil, errors.New("policy: no Past")
	}
	if o.Duplicates <= 0 {
		return nil, errors.New("policy: no Duplicates window")
	}
	p := &Policy{
		servers: make(map[string]bool, len(o.Servers)),
		past:    o.Past, duplicates: o.Duplicates, now: o.Now, log: o.Log,
	}
	if p.now == nil {
		p.now = time.Now
	}
	if p.log == nil {
		p.log = slog.New(slog.DiscardHandler)
	}
	for _, s := range o.Servers {
		p.servers[s] = true
	}
	seen := make(map[string]bool, len(o.Rules))
	for i, r := range o.Rules {
		switch {
		case r.ID == "":
			return nil, fmt.Errorf("policy: rule %d has no ID", i)
		case seen[r.ID]:
			return nil, fmt.Errorf("policy: two rules are called %s", r.ID)
		case r.Match == nil:
			return nil, fmt.Errorf("policy: rule %s has no Match", r.ID)
		case r.Effect == Forbid:
			p.forbids = append(p.forbids, r)
		case r.Effect == Permit:
			p.permits = append(p.permits, r)
		default:
			return nil, fmt.Errorf("policy: rule %s neither permits nor forbids", r.ID)
		}
		seen[r.ID] = true
	}
	return p, nil
}

// Handle is the [schemas.Handler] for requested events; it leaves the others
// alone. It emits exactly one of authorized, denied and failed (expired, or
// invalid when the log refuses the decision for good), or nothing when the log
// already holds a decision or an ending of the call. It
// returns an error, and so is called again, only when the log could not be
// read or written; a call is never let through on an error.
func (p *Policy) Handle(ctx context.Context, e schemas.Event, emit schemas.Emit) error {
	q, ok := e.Data.(*schemas.Requested)
	if !ok || q == nil {
		return nil
	}
	now := p.now()
	expired := !q.Deadline.IsZero() && !now.Before(q.Deadline)
	// The log drops a second decision by its ID only for so long. Half of the
	// window is left for the clocks' difference and for storing the decision.
	if old := now.Sub(e.Stored) > p.duplicates/2; old || expired {
		past, err := p.past(ctx, e)
		if err != nil {
			return fmt.Errorf("read the past of call %s: %w", e.Call, err)
		}
		if settled(past, e.Call) {
			return nil
		}
	}
	next := e.Next(p.decision(e, q, expired))
	_, err := emit(ctx, next)
	if errors.Is(err, schemas.ErrTooLarge) || errors.Is(err, schemas.ErrInvalid) {
		err = p.refused(ctx, e, q, next.Kind(), emit, err)
	}
	if err != nil {
		return fmt.Errorf("store %s for call %s: %w", next.Kind(), e.Call, err)
	}
	return nil
}

// refused ends a call whose decision the log refuses for good, so that it is
// never carried out. An earlier delivery may have had other rules, whose
// decision was not refused; that one stands.
func (p *Policy) refused(ctx context.Context, e schemas.Event, q *schemas.Requested, k schemas.Kind, emit schemas.Emit, why error) error {
	if k == schemas.KindFailed {
		return why // nothing smaller is left to say
	}
	past, err := p.past(ctx, e)
	if err != nil {
		return fmt.Errorf("%w; read the past: %w", why, err)
	}
	if settled(past, e.Call) {
		return nil
	}
	p.log.Error("the log refuses a decision", "session", e.Session, "call", e.Call, "kind", k, "error", why)
	detail := "the log refuses the decision, which is too large"
	if errors.Is(why, schemas.ErrInvalid) {
		detail = "the log refuses the decision, which is no valid event"
	}
	_, err = emit(ctx, e.Next(&schemas.Failed{
		Summary: summary(e, q), Code: schemas.FailInvalid, Detail: detail,
	}, nil))
	return err
}

// summary is what is known of a call that policy ends.
func summary(e schemas.Event, q *schemas.Requested) schemas.Summary {
	return schemas.Summary{Target: q.Target, RequestedAt: e.Stored, RequestSize: len(e.Body), Revision: q.Revision, Back: q.Back}
}

// settled tells whether policy has nothing left to say of the call. A cancel
// does not settle it: that is a wish, which dispatch, who owns authorized
// calls, turns into the ending.
func settled(past []schemas.Event, call schemas.CallID) bool {
	for _, e := range past {
		if e.Call != call {
			continue
		}
		if k := e.Kind(); k == schemas.KindAuthorized || k == schemas.KindHeld || k.Ends() {
			return true
		}
	}
	return false
}

// decision makes the payload and the body of what follows the request.
func (p *Policy) decision(e schemas.Event, q *schemas.Requested, expired bool) (schemas.Payload, []byte) {
	if expired {
		return &schemas.Failed{
			Summary: summary(e, q), Code: schemas.FailExpired, Detail: "the deadline passed before policy decided",
		}, nil
	}
	v := p.Decide(e)
	for _, f := range v.Faults {
		p.log.Warn("policy rule failed", "rule", f.Rule, "error", f.Err,
			"session", e.Session, "call", e.Call, "kind", e.Kind())
	}
	word := schemas.Decision{N: 1, Rule: v.Rule, Reason: v.Reason}
	if !v.Permit {
		return &schemas.Denied{Summary: summary(e, q), Decision: word}, nil
	}
	a := &schemas.Authorized{
		Requested: *q, Decision: word, RequestedSeq: e.Seq, RequestedAt: e.Stored, Only: v.Only,
	}
	if len(e.Body) <= schemas.InlineBody {
		return a, e.Body
	}
	sum := sha256.Sum256(e.Body)
	a.BodySize, a.BodySHA256 = len(e.Body), hex.EncodeToString(sum[:])
	return a, nil
}
