package policy

import (
	"fmt"
	"slices"
	"strings"

	"waybill.dev/schemas"
)

// Line is what one rule says of a request.
type Line struct {
	Rule   string `json:"rule"`
	Effect string `json:"effect"`
	Where  string `json:"where,omitempty"` // file and line
	When   string `json:"when,omitempty"`
	Reason string `json:"reason,omitempty"`
	Says   string `json:"says"` // applies; no match; condition is false; failed: …
}

// Says of a line.
const (
	SaysApplies = "applies"
	SaysNoMatch = "no match"
	SaysFalse   = "condition is false"
	SaysFailed  = "failed"
)

// Explain says what each rule says of a request that may concern it. It is pure,
// and [Bundle.Decide] is what follows from it.
func (b *Bundle) Explain(e schemas.Event, facts Facts) []Line {
	q, ok := e.Data.(*schemas.Requested)
	if !ok || q == nil {
		return nil
	}
	in := &Input{Event: &e, Request: q, Facts: facts}
	var lines []Line
	for _, r := range b.concerning(q) {
		l := Line{Rule: r.ID, Effect: r.Effect.String(), Where: r.where, When: r.when, Reason: r.Reason}
		switch m, err := r.match(in); {
		case err != nil:
			l.Says = SaysFailed + ": " + brief(err)
		case m.Applies:
			l.Says = SaysApplies
		case m.Selected:
			l.Says = SaysFalse
		default:
			l.Says = SaysNoMatch
		}
		lines = append(lines, l)
	}
	return lines
}

// NeedsOf are the names of the facts that the rules may look at for a request,
// for who supposes some.
func (b *Bundle) NeedsOf(e schemas.Event) (groups, session, tool bool, limits []Limit) {
	q, ok := e.Data.(*schemas.Requested)
	if !ok || q == nil {
		return
	}
	n := b.needs(&e, q)
	return n.groups, n.session, n.tool, n.limits
}

// Outcome is the verdict in a word: permit, hold or deny.
func (v Verdict) Outcome() string {
	switch {
	case v.Permit:
		return "permit"
	case v.Hold:
		return "hold"
	case len(v.Ask) > 0:
		return "ask a guard"
	}
	return "deny"
}

// Differs says where a decision that was stored is not what it would be again,
// or "". data is the payload of an authorized, denied or held event.
func (v Verdict) Differs(data schemas.Payload) string {
	var was schemas.Decision
	outcome := ""
	switch d := data.(type) {
	case *schemas.Authorized:
		was, outcome = d.Decision, "permit"
		if !slices.Equal(d.Only, v.Only) || d.Each != v.Each {
			return fmt.Sprintf("a list could show %q, and could now show %q", d.Only, v.Only)
		}
	case *schemas.Denied:
		was, outcome = d.Decision, "deny"
	case *schemas.Held:
		was, outcome = d.Decision, "hold"
	default:
		return "it is no decision"
	}
	matches := v.Matches
	if len(matches) > maxMatches {
		matches = matches[:maxMatches]
	}
	switch {
	case outcome != v.Outcome():
		return fmt.Sprintf("it was %s and would be %s", outcome, v.Outcome())
	case was.Rule != v.Rule:
		return fmt.Sprintf("rule %q decided, now %q would", was.Rule, v.Rule)
	case !slices.Equal(was.Matches, matches):
		return fmt.Sprintf("rules %s spoke, now %s would", strings.Join(was.Matches, ", "), strings.Join(matches, ", "))
	}
	return ""
}
