// Package policy decides which calls may go on. It is default deny: a call
// that no rule permits is denied, with an event that says why.
//
// Begin with [Rule], what every kind of rule compiles to, then [Bundle.Decide],
// which is pure, and [Policy.Handle], which puts it between the log's `requested`
// and `authorized`, `denied` or `held`. A new kind of rule is one file with a
// struct as the operator writes it and a method Rule() (Rule, error): allow.go is
// the pattern; file.go is the kind that the operator's files are of. It goes into
// the list of [Source].
//
// A decision is a function of the event, of the facts that it records ([Facts])
// and of the bundle that it names. What is not a function (counting, asking,
// the clock) is in policy.go, limits.go and holds.go, and done before it.
//
// What a list shows is what can be called. A listing's decision says by patterns
// what the permits open ([schemas.Authorized].Only), and, where a condition or a
// forbid has a say, that each name has to be asked about: [Bundle.Shows], with the
// same bundle and facts. A condition on arguments is then open: a permit of which
// some arguments may meet the condition counts, a forbid counts only if it is
// met whatever the arguments are. So a tool is shown if, by each rule for itself,
// some arguments could be allowed.
package policy

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"sync/atomic"
	"time"

	"waybill.dev/schemas"
)

// Options are all that a Policy depends on.
type Options struct {
	// Bundle is in force until another is activated ([Policy.Activate]). nil:
	// everything is denied until then.
	Bundle *Bundle

	// Past reads what the log holds of a call. Required.
	Past schemas.Past

	// Duplicates is the window in which the log drops a repeated ID. Required.
	Duplicates time.Duration

	// Facts that rules may speak of. Where one is nil, or says nil, the fact is
	// not known, and a rule that needs it fails. An error is that of a log that
	// cannot be read: the event is decided on when it can.
	Groups  func(schemas.Tenant, schemas.Agent) []string // never nil for an agent that has none
	Session func(context.Context, schemas.Event) (*SessionFacts, error)

	// Defined says what is pinned of what a request names, and what is wrong with its
	// arguments, as the request has them. nil: nothing is pinned. It asks nobody.
	Defined func(q *schemas.Requested, arguments []byte) Defined

	// Guard asks the guard of a name about a request, of which said is what may be
	// shown to it, and returns within the time that it has for that. nil: there is
	// none, so that each has failed.
	Guard func(ctx context.Context, name string, request schemas.Event, said []byte) schemas.Check

	// What is held is asked for, and decided on again, with these; without them
	// it is denied.
	Load  func(ctx context.Context, seq uint64) (schemas.Event, error)
	Store schemas.Emit
	Claim func(ctx context.Context, id string, use []byte, last uint64) (uint64, error) // see Approvals

	Now func() time.Time // default time.Now
	Log *slog.Logger     // for rules that fail; default: none
}

// Policy is safe for concurrent use. Which rules it has changes as a whole: a
// decision is made by one bundle, the one that it names.
type Policy struct {
	o      Options
	bundle atomic.Pointer[Bundle]
	limits *limiter
	holds  *holds
}

// New checks the options.
func New(o Options) (*Policy, error) {
	if o.Past == nil {
		return nil, errors.New("policy: no Past")
	}
	if o.Duplicates <= 0 {
		return nil, errors.New("policy: no Duplicates window")
	}
	if o.Now == nil {
		o.Now = time.Now
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	p := &Policy{o: o, limits: newLimiter(), holds: newHolds()}
	p.bundle.Store(o.Bundle)
	return p, nil
}

// Activate puts a bundle in force for all that is decided from now on.
func (p *Policy) Activate(b *Bundle) { p.bundle.Store(b) }

// Bundle is the one in force, or nil.
func (p *Policy) Bundle() *Bundle { return p.bundle.Load() }

// Decide is [Bundle.Decide] of the bundle in force, without facts.
func (p *Policy) Decide(e schemas.Event) Verdict { return p.bundle.Load().Decide(e, Facts{}) }

// Handle is the [schemas.Handler] for requested events; it leaves the others
// alone. It emits exactly one of authorized, denied, held and failed (expired, or
// invalid when the log refuses the decision for good), or nothing when the log
// already holds a decision or an ending of the call. It
// returns an error, and so is called again, only when the log could not be
// read or written; a call is never let through on an error.
func (p *Policy) Handle(ctx context.Context, e schemas.Event, emit schemas.Emit) error {
	q, ok := e.Data.(*schemas.Requested)
	if !ok || q == nil {
		return nil
	}
	now := p.o.Now()
	expired := !q.Deadline.IsZero() && !now.Before(q.Deadline)
	// The log drops a second decision by its ID only for so long. Half of the
	// window is left for the clocks' difference and for storing the decision.
	if old := now.Sub(e.Stored) > p.o.Duplicates/2; old || expired {
		past, err := p.o.Past(ctx, e)
		if err != nil {
			return fmt.Errorf("read the past of call %s: %w", e.Call, err)
		}
		if settled(past, e.Call) {
			return nil
		}
	}
	if expired {
		return p.store(ctx, e, q, &schemas.Failed{
			Summary: summary(e, q),
			Code:    schemas.FailExpired, Detail: "the deadline passed before policy decided",
		}, nil, emit)
	}
	return p.decide(ctx, e, q, 1, approval{}, emit)
}

// decide decides on a request for the nth time, and stores the decision. asked is
// what became of the approval that was asked for, if n is not 1.
func (p *Policy) decide(ctx context.Context, e schemas.Event, q *schemas.Requested, n int, asked approval, emit schemas.Emit) error {
	b := p.bundle.Load()
	if b == nil {
		return p.store(ctx, e, q, &schemas.Denied{
			Summary:  summary(e, q),
			Decision: schemas.Decision{N: n, Reason: noPolicy},
		}, nil, emit)
	}
	facts, limits, asksTool, err := p.facts(ctx, b, e, q)
	if err != nil {
		return err
	}
	facts.Approval = asked.fact
	word := schemas.Decision{N: n, PolicySHA256: b.Digest}
	var asks *read
	if q.Method == toolsCall {
		asks = readRequest(q.Method, e.Body)
		word.ArgsSHA256 = asks.digest(e.Body)
	}
	if p.o.Defined != nil {
		var args []byte
		if asks != nil {
			args = asks.args.Raw()
		}
		d := p.o.Defined(q, args)
		word.ToolSHA256, facts.Refused, facts.Arguments = d.SHA256, d.Refused, d.Arguments
		if asksTool {
			facts.Tool = d.Tool
		}
		if asks != nil && asks.err != nil && facts.Refused == "" && facts.Arguments == "" && d.SHA256 != "" {
			facts.Arguments = "they cannot be read as an object"
		}
	}
	if n > 1 {
		if word.Approval = approvalID(e, q, word); word.Approval != asked.id {
			facts.Approval = ApprovalRefused + ": the tool is another than the one that was asked for"
		}
	}
	decide := func() (Verdict, func()) {
		return p.limits.decide(limits, e.Call, p.at(e, n), &facts, func() Verdict {
			return b.decide(&Input{Event: &e, Request: q, Facts: facts, read: asks})
		})
	}
	v, release := decide()
	if len(v.Ask) > 0 {
		facts.Guards = p.askGuards(ctx, e, q, v)
		if err := ctx.Err(); err != nil {
			return fmt.Errorf("asking guards about call %s: %w", e.Call, err)
		}
		v, release = decide()
	}
	if v.Hold {
		word.Approval = approvalID(e, q, word)
		if facts.Approval, err = p.approval(ctx, e, word.Approval); err != nil {
			return err
		}
		if facts.Approval != "" {
			v, release = decide()
		}
	}
	for _, f := range v.Faults {
		p.o.Log.Warn("policy rule failed", "rule", f.Rule, "error", f.Err,
			"session", e.Session, "call", e.Call, "kind", e.Kind())
	}
	word = spoken(word, v, facts)
	data, body := p.payload(e, q, v, word)
	if d, ok := data.(*schemas.Denied); ok {
		d.Arguments = b.told(e, q, facts)
	}
	err = p.store(ctx, e, q, data, body, emit)
	if err != nil || data.Kind() != schemas.KindAuthorized {
		release()
	}
	if held, ok := data.(*schemas.Held); ok && err == nil {
		p.holds.add(e.Next(held, nil))
	}
	return err
}

// maxMatches is how many of the rules that spoke a decision names.
const maxMatches = 32

// at is when a call counts for rate limits: when it was asked for, or, of one
// that was held, now.
func (p *Policy) at(e schemas.Event, n int) time.Time {
	if n > 1 {
		return p.o.Now()
	}
	return e.Stored
}

// askGuards asks those on whom a verdict depends, one after the other, until one
// says no. They see of the request what its server would.
func (p *Policy) askGuards(ctx context.Context, e schemas.Event, q *schemas.Requested, v Verdict) map[string]schemas.Check {
	said := map[string]schemas.Check{}
	body, err := e.Body, error(nil)
	if len(v.Obligations.Redact) > 0 {
		body, err = redact(q, e.Body, v.Obligations.Redact)
	}
	for _, name := range v.Ask {
		c := schemas.Check{Guard: name, Said: schemas.CheckFailed, Reason: "nobody can ask it"}
		switch {
		case err != nil:
			c.Reason = brief(err)
		case p.o.Guard != nil:
			c = p.o.Guard(ctx, name, e, body)
		}
		// As the decision will record it, so that who decides again has the same.
		if c, err := guardWord(name, guardText(c)); err == nil {
			said[name] = c
		}
		if c.Said == schemas.CheckDeny {
			break
		}
	}
	return said
}

// facts finds out what the rules may need to know.
func (p *Policy) facts(ctx context.Context, b *Bundle, e schemas.Event, q *schemas.Requested) (f Facts, limits []Limit, tool bool, err error) {
	n := b.needs(&e, q)
	if n.groups && p.o.Groups != nil {
		f.Groups = p.o.Groups(e.Tenant, e.Agent)
	}
	if n.session && p.o.Session != nil {
		if f.Session, err = p.o.Session(ctx, e); err != nil {
			return f, nil, false, fmt.Errorf("facts of session %s: %w", e.Session, err)
		}
	}
	return f, n.limits, n.tool, nil
}

// payload makes the payload and the body of a decision.
func (p *Policy) payload(e schemas.Event, q *schemas.Requested, v Verdict, word schemas.Decision) (schemas.Payload, []byte) {
	switch {
	case v.Hold && (p.o.Load == nil || p.o.Store == nil || p.o.Claim == nil):
		word.Reason += nobodyToAsk
		return refusal(e, q, word), nil
	case v.Hold && !p.holds.room(e.Agent):
		word.Reason += tooManyHeld
		return refusal(e, q, word), nil
	case v.Hold:
		return held(e, q, v, word), nil
	case !v.Permit:
		return refusal(e, q, word), nil
	}
	return granted(e, q, v, word, p.o.Now().UTC())
}

// patience is how long an approval is waited for where neither rule nor call has
// a time.
const patience = time.Minute

// store stores a decision, or an ending in its place if the log refuses it for
// good.
func (p *Policy) store(ctx context.Context, e schemas.Event, q *schemas.Requested, data schemas.Payload, body []byte, emit schemas.Emit) error {
	next := e.Next(data, body)
	_, err := emit(ctx, next)
	if errors.Is(err, schemas.ErrTooLarge) || errors.Is(err, schemas.ErrInvalid) {
		err = p.refused(ctx, e, q, next.Kind(), emit, err)
	}
	if err != nil {
		return fmt.Errorf("store %s for call %s: %w", next.Kind(), e.Call, err)
	}
	return nil
}

func digest(b []byte) string {
	sum := sha256.Sum256(b)
	return hex.EncodeToString(sum[:])
}

// refused ends a call whose decision the log refuses for good, so that it is
// never carried out. An earlier delivery may have had other rules, whose
// decision was not refused; that one stands.
func (p *Policy) refused(ctx context.Context, e schemas.Event, q *schemas.Requested, k schemas.Kind, emit schemas.Emit, why error) error {
	if k == schemas.KindFailed {
		return why // nothing smaller is left to say
	}
	past, err := p.o.Past(ctx, e)
	if err != nil {
		return fmt.Errorf("%w; read the past: %w", why, err)
	}
	if settled(past, e.Call) {
		return nil
	}
	p.o.Log.Error("the log refuses a decision", "session", e.Session, "call", e.Call, "kind", k, "error", why)
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
