package policy

import (
	"slices"
	"strings"

	"waybill.dev/schemas"
)

// open is of a decision on facts that were found out for other rules. What a rule
// asks for and nobody has found out is neither this nor that: the rule may apply.
type open struct {
	touched []string // what was asked for and is not there
	list    bool     // what a list shows depends on that
	lenient bool     // a limit that nobody has counted for is not reached
}

// Names of facts, as decisions record them; the arguments, which are in no
// decision, as conditions call them.
const (
	groupsFact    = "agent.groups"
	argumentsFact = "args"
)

// isFact tells of a variable whether it is a fact, and not of the request.
func isFact(name string) bool {
	return name == groupsFact || strings.HasPrefix(name, "tool.") || strings.HasPrefix(name, "session.") && name != "session.id"
}

func (o *open) touch(fact string) {
	if o != nil && !slices.Contains(o.touched, fact) {
		o.touched = append(o.touched, fact)
	}
}

// passes tells whether to go on without the count of a limit.
func (o *open) passes(l Limit) bool {
	if o != nil {
		o.touch(limitFact + l.key())
	}
	return o != nil && o.lenient
}

// DecideAgain is [Bundle.Decide] on what was recorded for another bundle, whose
// rules may have asked for less. Where it depends on a fact that is not there what
// the verdict is, there is none, and missing names the facts; else missing is nil.
// What only some of the rules would need does not matter if the others settle it.
// gone says that the request's body is not there, and so nobody knows the arguments.
//
// It asks the rules only as far as the verdict needs: of Matches, it has some.
func (b *Bundle) DecideAgain(e schemas.Event, facts Facts, gone bool) (v Verdict, missing []string) {
	q, _ := e.Data.(*schemas.Requested)
	return b.decideAgain(&Input{Event: &e, Request: q, Facts: facts, anyArgs: gone, open: &open{}})
}

func (b *Bundle) decideAgain(in *Input) (v Verdict, missing []string) {
	if reason := b.senseless(in); reason != "" {
		return Verdict{Reason: reason}, nil
	}
	defer func() {
		// What cannot be redacted does not go on.
		if v.Permit && len(v.Obligations.Redact) > 0 && in.anyArgs {
			v, missing = Verdict{}, []string{argumentsFact}
		} else if v.Permit && len(v.Obligations.Redact) > 0 {
			if _, err := redact(in.Request, in.Event.Body, v.Obligations.Redact); err != nil {
				v = Verdict{Rule: v.Rule, Reason: brief(err)}
			}
		}
	}()
	var sure voices
	var maybe []*Rule
	list := in.Request.Method == toolsList
	ask := func(r *Rule) {
		in.open.touched = in.open.touched[:0]
		m, err := r.match(in)
		if !m.Maybe || err != nil && r.Effect == Permit {
			sure.add(r, m, err)
			return
		}
		maybe = append(maybe, r)
		missing = append(missing, in.open.touched...)
		sure.tools, sure.each = append(sure.tools, m.Tools...), sure.each || m.Each
	}
	// A forbid that applies is the last word; of permits that order nothing the first
	// says all, and without any the rest has nothing to say.
	all := b.concerning(in.Request)
	for _, r := range all {
		if r.Effect == Forbid && (list || len(sure.forbids) == 0) {
			ask(r)
		}
	}
	forbidden := !list && len(sure.forbids) > 0
	for _, r := range all {
		if r.Effect == Permit && !forbidden && (list || len(sure.permits) == 0 || !r.plain) {
			ask(r)
		}
	}
	permits := len(sure.permits) > 0 || slices.ContainsFunc(maybe, func(r *Rule) bool { return r.Effect == Permit })
	for _, r := range all {
		if r.Effect > Forbid && !forbidden && permits {
			ask(r)
		}
	}
	in.open.touched, in.open.lenient = nil, true
	best := b.conclude(in, sure.or(maybe, true))
	if len(best.Ask) > 0 {
		return Verdict{}, unasked(best) // at their best for the caller
	}
	if len(maybe) == 0 && len(in.open.touched) == 0 && !in.open.list {
		return best, nil
	}
	in.open.lenient = false
	worst := b.conclude(in, sure.or(maybe, false))
	open := slices.ContainsFunc(maybe, (*Rule).orders) || list && in.open.list
	if o := worst.Outcome(); o == best.Outcome() && (o == "deny" || !open) {
		return worst, nil
	}
	missing = append(missing, unasked(worst)...)
	if in.open.list {
		missing = append(missing, groupsFact)
	}
	missing = append(missing, in.open.touched...)
	slices.Sort(missing)
	return Verdict{}, slices.Compact(missing)
}

// unasked are the facts of the guards on which a verdict depends and that nobody
// has asked: that is not for who decides again to do.
func unasked(v Verdict) []string {
	var facts []string
	for _, name := range v.Ask {
		facts = append(facts, guardFact+name)
	}
	return facts
}

// or is s with rules of which it is not known whether they apply, at their best for
// the caller or at their worst.
func (s voices) or(maybe []*Rule, best bool) voices {
	if len(maybe) == 0 {
		return s
	}
	s.permits, s.forbids = slices.Clip(s.permits), slices.Clip(s.forbids)
	s.approves, s.obliges, s.matches = slices.Clip(s.approves), slices.Clip(s.obliges), slices.Clone(s.matches)
	for _, r := range maybe {
		switch {
		case r.Effect == Permit && best:
			free := *r // of its limit, which a rule that does not apply does not set
			free.Obligations.limit = nil
			s.permits = append(s.permits, &free)
		case best:
		case r.Effect == Forbid:
			s.forbids = append(s.forbids, r)
		case r.Effect == Approve:
			s.approves = append(s.approves, r)
		case r.Effect == Permit: // of which its limit is left
			s.obliges = append(s.obliges, &Rule{ID: r.ID, Reason: r.Reason, Obligations: Obligations{limit: r.Obligations.limit}})
		default:
			s.obliges = append(s.obliges, r)
		}
	}
	return s
}

// orders tells whether the rule orders something for the calls that it lets go on.
func (r *Rule) orders() bool {
	o := r.Obligations
	return len(o.Redact)+len(o.Tags)+len(o.RedactResult)+len(o.Labels)+len(o.Guards) > 0 || o.Deadline > 0 || o.Wait > 0 || o.MaxResult > 0
}
