package cli

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"waybill.dev/schemas"
)

// report is what a what-if finds.
type report struct {
	w    *whatIf
	head trafficHead
	last string // what was decided last; "" where that is not known

	changes map[changeKey]*change
	gaps    map[string]*gap // by the facts that are missing

	Policy      string    `json:"policy_sha256"`
	Rules       int       `json:"rules"`
	Since       time.Time `json:"since,omitzero"`
	Decisions   int       `json:"decisions"`
	Same        int       `json:"same"`
	OtherRule   int       `json:"same_by_another_rule"` // of the same
	Changed     int       `json:"changed"`
	Undecided   int       `json:"cannot_be_decided"`
	NoRequest   int       `json:"without_request,omitempty"` // whose request is not there
	Undecodable int       `json:"undecodable,omitempty"`
	Erased      int       `json:"erased_sessions,omitempty"`
	More        int       `json:"changed_otherwise,omitempty"` // that are in no group, of which there are too many
	Notes       []string  `json:"notes,omitempty"`             // of what of a session is not there
	Seconds     float64   `json:"seconds"`
}

func newReport(w *whatIf) report {
	return report{w: w, changes: map[changeKey]*change{}, gaps: map[string]*gap{}, Policy: w.bundle.Digest, Rules: w.bundle.Rules()}
}

// changeKey is by what changes are put together.
type changeKey struct {
	Was  string `json:"was"` // permit, hold or deny
	Now  string `json:"now"`
	Rule string `json:"rule,omitempty"`     // that decides now; none: no rule permits it
	Of   string `json:"was_rule,omitempty"` // that decided
	What string `json:"what,omitempty"`     // changes, where the outcome is the same
}

// change is what decisions have in common that would be others.
type change struct {
	changeKey
	Reason   string    `json:"reason,omitempty"` // of the first
	Count    int       `json:"count"`
	Examples []example `json:"examples"`
}

// gap is what decisions have in common of which it cannot be told what they would be.
type gap struct {
	Facts    []string  `json:"not_recorded"`
	Count    int       `json:"count"`
	Examples []example `json:"examples"`
}

// example is one decision.
type example struct {
	Call    schemas.CallID     `json:"call"`
	N       int                `json:"n"`
	At      time.Time          `json:"at"`
	Tenant  schemas.Tenant     `json:"tenant"`
	Agent   schemas.Agent      `json:"agent"`
	Session schemas.SessionKey `json:"session"`
	Server  string             `json:"server"`
	Method  string             `json:"method"`
	Name    string             `json:"name,omitempty"`
	Why     string             `json:"why,omitempty"` // it would be so, or cannot be decided
}

// maxGroups bounds how many groups there are.
const maxGroups = 10_000

// What changes of a decision whose outcome is the same.
const (
	otherObligations = "obligations"
	otherTools       = "tools that the list may show"
)

// add takes a decision.
func (r *report) add(d *decision) error {
	if r.last = d.v.Outcome(); d.missing != nil {
		r.last = ""
	}
	if !d.counted {
		return nil
	}
	r.Decisions++
	if d.missing != nil {
		r.Undecided++
		return r.undecided(d)
	}
	k := changeKey{Was: d.Outcome, Now: d.v.Outcome(), Rule: d.v.Rule, Of: d.was.Rule}
	switch {
	case k.Was != k.Now:
	case k.Now != "deny" && !d.v.Obligations.Recorded(d.was.Obligations):
		k.What = otherObligations
	case k.Now == "permit" && (!slices.Equal(d.only, d.v.Only) || (d.only == nil) != (d.v.Only == nil) || d.each != d.v.Each):
		k.What = otherTools
	default:
		r.Same++
		if k.Rule != k.Of {
			r.OtherRule++
		}
		return nil
	}
	r.Changed++
	e := d.example(d.v.Reason)
	if k.What != "" {
		e.Why = k.What
	}
	if r.w.full {
		return r.w.line(k, e)
	}
	c := r.changes[k]
	if c == nil {
		if len(r.changes) >= maxGroups {
			r.More++
			return nil
		}
		c = &change{changeKey: k, Reason: d.v.Reason}
		r.changes[k] = c
	}
	if c.Count++; len(c.Examples) < r.w.examples {
		c.Examples = append(c.Examples, e)
	}
	return nil
}

// undecided takes a decision of which it cannot be told what it would be.
func (r *report) undecided(d *decision) error {
	facts := strings.Join(d.missing, ", ")
	e := d.example("")
	e.Why = notRecorded(d.missing)
	if r.w.full {
		return r.w.line(changeKey{Was: d.Outcome, Of: d.was.Rule}, e)
	}
	g := r.gaps[facts]
	if g == nil {
		if len(r.gaps) >= maxGroups {
			return nil
		}
		g = &gap{Facts: d.missing}
		r.gaps[facts] = g
	}
	if g.Count++; len(g.Examples) < r.w.examples {
		g.Examples = append(g.Examples, e)
	}
	return nil
}

// notRecorded says why a decision cannot be taken.
func notRecorded(facts []string) string {
	if len(facts) == 1 {
		return "cannot be decided: fact " + facts[0] + " was not recorded"
	}
	return "cannot be decided: facts " + strings.Join(facts, ", ") + " were not recorded"
}

func (d *decision) example(why string) example {
	e := d.request.Event
	x := example{Call: e.Call, N: d.N, At: d.at, Tenant: e.Tenant, Agent: e.Agent, Session: e.Session, Why: why}
	if q, ok := e.Data.(*schemas.Requested); ok {
		x.Server, x.Method, x.Name = q.Server, q.Method, q.Name
	}
	return x
}

// line prints one decision.
func (w *whatIf) line(k changeKey, e example) error {
	if w.json {
		return w.env.printJSON(struct {
			changeKey
			example
		}{k, e})
	}
	p := printer{w: w.env.Stdout, color: w.env.Color}
	p.line("%s", p.paint(bold, k.String()))
	p.line("    %s", e)
	return p.err
}

// String is the change in words.
func (k changeKey) String() string {
	rule := func(id, none string) string {
		if id == "" {
			return none
		}
		return "by " + visible(id)
	}
	text := fmt.Sprintf("%s → %s", k.Was, cmp.Or(k.Now, "?"))
	switch {
	case k.Now == "":
		return text
	case k.What != "":
		text = k.Now + ", other " + k.What
	}
	return fmt.Sprintf("%s  %s (was %s)", text, rule(k.Rule, "as no rule permits it"), rule(k.Of, "by none"))
}

func (e example) String() string {
	text := fmt.Sprintf("%s  %s  %s  by %s of %s in session %s", e.At.Local().Format("2006-01-02 15:04:05.000"), e.Call,
		target(schemas.Target{Server: e.Server, Method: e.Method, Name: e.Name}), e.Agent, e.Tenant, e.Session)
	if e.Why != "" {
		text += ": " + visible(e.Why)
	}
	return text
}

// print prints the groups, if each decision is not printed, and the sums. The
// error is an [outcome] that says whether anything would change.
func (r *report) print() error {
	changes := slices.SortedFunc(maps.Values(r.changes), func(a, b *change) int {
		return cmp.Or(cmp.Compare(b.Count, a.Count), cmp.Compare(a.String(), b.String()))
	})
	gaps := slices.SortedFunc(maps.Values(r.gaps), func(a, b *gap) int {
		return cmp.Or(cmp.Compare(b.Count, a.Count), slices.Compare(a.Facts, b.Facts))
	})
	r.Since = r.head.Since
	if err := r.lines(changes, gaps); err != nil {
		return err
	}
	switch {
	case r.Changed > 0:
		return &outcome{exitChanges, "decisions would change"}
	case r.Undecided > 0 || r.NoRequest > 0 || r.Undecodable > 0 || len(r.Notes) > 0 && r.w.from != "":
		return &outcome{exitUndecided, "some decisions cannot be taken again"}
	}
	return nil
}

func (r *report) lines(changes []*change, gaps []*gap) error {
	env := r.w.env
	if r.w.json {
		for _, c := range changes {
			if err := env.printJSON(map[string]*change{"change": c}); err != nil {
				return err
			}
		}
		for _, g := range gaps {
			if err := env.printJSON(map[string]*gap{"undecided": g}); err != nil {
				return err
			}
		}
		return env.printJSON(map[string]*report{"summary": r})
	}
	p := printer{w: env.Stdout, color: env.Color}
	for _, c := range changes {
		p.line("%s  %s", p.paint(bold, fmt.Sprintf("%8d", c.Count)), p.paint(bold, c.String()))
		if c.Reason != "" {
			p.line("          %s", visible(c.Reason))
		}
		for _, e := range c.Examples {
			e.Why = ""
			p.line("          %s", p.paint(dim, e.String()))
		}
	}
	for _, g := range gaps {
		p.line("%s  %s", p.paint(bold, fmt.Sprintf("%8d", g.Count)), p.paint(yellow, visible(notRecorded(g.Facts))))
		for _, e := range g.Examples {
			e.Why = ""
			p.line("          %s", p.paint(dim, e.String()))
		}
	}
	p.line("%s under %d rules (policy %.12s…): %d would change, %d cannot be decided, %d stay (%d of them by another rule)",
		count(r.Decisions, "decision"), r.Rules, r.Policy, r.Changed, r.Undecided, r.Same, r.OtherRule)
	if r.NoRequest > 0 {
		p.line("%s", p.paint(yellow, count(r.NoRequest, "decision")+" beside, whose request is not there any more"))
	}
	if r.Undecodable > 0 {
		p.line("%s", p.paint(yellow, count(r.Undecodable, "event")+" that this program cannot read"))
	}
	for _, note := range r.Notes {
		p.line("%s", p.paint(yellow, visible(note)))
	}
	if h := r.head; !h.Whole.IsZero() && h.Whole.After(h.Since) {
		p.line("%s", p.paint(yellow, "the log has nothing of before "+h.Whole.Local().Format("2006-01-02 15:04:05")))
	}
	return p.err
}
