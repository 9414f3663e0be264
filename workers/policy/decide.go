package policy

// Nothing in this file, nor in the files of the kinds of rule, may look at a
// clock, at chance or at the world: replay recomputes every decision and must
// agree. test/arch_test.go checks it.

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	"waybill.dev/schemas"
)

// Effect is what a rule says when it applies.
type Effect int

const (
	Permit Effect = iota + 1 // the call may go on, unless another rule forbids it
	Forbid                   // the call may not go on, whatever else is said
)

// A Rule is one line of the policy, of whatever kind.
type Rule struct {
	ID     string // decisions name it
	Effect Effect

	// Match looks at a request; q is e's payload. It must not change either
	// and must be pure: the same event gives the same match, and the same
	// error. A rule that fails or panics is taken at its worst: a permit does
	// not apply, a forbid does.
	Match func(e *schemas.Event, q *schemas.Requested) (Match, error)
}

// Match is what a rule finds in a request.
type Match struct {
	Applies bool // the rule's effect holds for this request

	// Tools answers a tools/list: patterns ([schemas.Match]) of the tools that
	// this permit lets the caller call on this server, also when it does not
	// apply to the listing itself. "*" is all of them. A forbid leaves it nil:
	// patterns cannot be subtracted, so the kind of rule that forbids single
	// tools must bring its own way of keeping them out of lists.
	Tools []string
}

// Verdict is the word on one request.
type Verdict struct {
	Permit bool
	Rule   string   // the rule that decided, the first in order; "" for default deny
	Reason string   // of a denial, for operators; a permit's reason is its rule
	Only   []string // what a permitted tools/list may show; nil: all of it

	Faults []Fault // rules that failed on the way; their consequence is already drawn
}

// Fault is a rule that could not be evaluated.
type Fault struct {
	Rule string
	Err  error
}

// protocols are those whose methods the rules know how to read. A request of
// any other is denied.
var protocols = []schemas.Protocol{"mcp"}

const (
	toolsCall = "tools/call"
	toolsList = "tools/list"
)

// Decide says whether the event, which must be a request, may go on. It is
// pure. A forbid wins over every permit; without a permit the call is denied.
func (p *Policy) Decide(e schemas.Event) Verdict {
	q, ok := e.Data.(*schemas.Requested)
	switch {
	case !ok || q == nil:
		return Verdict{Reason: "not a request"}
	case !slices.Contains(protocols, q.Protocol):
		return Verdict{Reason: "unknown protocol"}
	case q.Server == "":
		return Verdict{Reason: "no server is named"}
	case !p.servers[q.Server]:
		return Verdict{Reason: "unknown server"}
	case q.Method == "":
		return Verdict{Reason: "no method is named"}
	}
	for i := range p.forbids {
		r := &p.forbids[i]
		m, err := r.match(&e, q)
		if err != nil {
			return Verdict{
				Rule: r.ID, Reason: "a rule that forbids failed: " + brief(err), Faults: []Fault{{r.ID, err}},
			}
		}
		if m.Applies {
			return Verdict{Rule: r.ID, Reason: "a rule forbids this call"}
		}
	}
	return p.permit(&e, q)
}

// permit asks the permits. The first that applies decides, but for a listing
// all are asked, since each may open tools to be listed.
func (p *Policy) permit(e *schemas.Event, q *schemas.Requested) Verdict {
	var v Verdict
	list := q.Method == toolsList
	tools := []string{} // not nil: a permit of the list alone shows nothing
	for i := range p.permits {
		r := &p.permits[i]
		m, err := r.match(e, q)
		if err != nil {
			v.Faults = append(v.Faults, Fault{r.ID, err})
			continue
		}
		if m.Applies && !v.Permit {
			v.Permit, v.Rule = true, r.ID
		}
		if v.Permit && !list {
			return v
		}
		if list {
			tools = append(tools, m.Tools...)
		}
	}
	if !v.Permit {
		v.Reason = "no rule permits this call"
		if len(v.Faults) > 0 {
			v.Reason += "; rule " + v.Faults[0].Rule + " failed: " + brief(v.Faults[0].Err)
		}
		return v
	}
	if !slices.Contains(tools, "*") {
		slices.Sort(tools)
		v.Only = slices.Compact(tools)
	}
	return v
}

// errPanicked stands for whatever a rule panicked with, which may hold an
// address and so differ from run to run.
var errPanicked = errors.New("the rule panicked")

// match evaluates the rule and turns a panic into an error: one broken rule
// must not take the worker down with it, again and again at each redelivery.
func (r *Rule) match(e *schemas.Event, q *schemas.Requested) (m Match, err error) {
	defer func() {
		if v := recover(); v != nil {
			m, err = Match{}, panicked{fmt.Sprint(v)}
		}
	}()
	return r.Match(e, q)
}

// panicked keeps the value for the operator's log and out of the decision.
type panicked struct{ value string }

func (p panicked) Error() string { return errPanicked.Error() + ": " + p.value }
func (p panicked) Unwrap() error { return errPanicked }

// brief is an error as a decision may hold it.
func brief(err error) string {
	if errors.Is(err, errPanicked) {
		return errPanicked.Error()
	}
	s := err.Error()
	if len(s) > 200 {
		s = s[:200] + "…"
	}
	return strings.ToValidUTF8(s, "�")
}
