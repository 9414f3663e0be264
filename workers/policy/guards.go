package policy

import (
	"fmt"
	"slices"
	"strconv"
	"strings"

	"waybill.dev/schemas"
)

// Guards are checks outside of the gateway: a rule orders that one be asked about a
// request before it is decided, about the answer before it is stored, or both. What
// a guard says of a request is a fact like any other: found out before the decision,
// recorded in it, and never asked for again by who decides again. A guard that says
// no denies; so does one that fails, unless the rule says otherwise.

// Guard is a guard that a rule has asked.
type Guard struct {
	Name    string
	Request bool
	Answer  bool
	Open    bool // what it says nothing of may pass
}

func (g Guard) String() string {
	s := "guard " + g.Name
	if g.Request {
		s += " on the request"
	}
	if g.Request && g.Answer {
		s += " and"
	}
	if g.Answer {
		s += " on the answer"
	}
	if g.Open {
		s += ", which may fail"
	}
	return s
}

// together are the guards of several rules: each once, and open only where all that
// have it asked say so.
func together(all []Guard) []Guard {
	var once []Guard
	for _, g := range all {
		i := slices.IndexFunc(once, func(have Guard) bool { return have.Name == g.Name })
		if i < 0 {
			once = append(once, g)
			continue
		}
		have := &once[i]
		have.Request, have.Answer, have.Open = have.Request || g.Request, have.Answer || g.Answer, have.Open && g.Open
	}
	slices.SortFunc(once, func(a, b Guard) int { return strings.Compare(a.Name, b.Name) })
	return once
}

// guarded tells what the guards make of a request that the rules would permit: whom
// to ask first, or by which rule, and why, it is denied.
func (v *Verdict) guarded(rules []*Rule, facts Facts) (ask []string, by *Rule, reason string) {
	for _, r := range rules {
		for _, g := range r.Obligations.Guards {
			if !g.Request {
				continue
			}
			c, known := facts.Guards[g.Name]
			switch {
			case !known:
				ask = append(ask, g.Name)
			case c.Said == schemas.CheckAllow, c.Said == schemas.CheckFailed && g.Open:
			case c.Said == schemas.CheckDeny:
				return nil, r, "guard " + g.Name + " says no: " + c.Reason
			default:
				return nil, r, "guard " + g.Name + " has failed: " + c.Reason
			}
		}
	}
	slices.Sort(ask)
	return slices.Compact(ask), nil, ""
}

// guardFact begins the name of a fact that is a guard's word.
const guardFact = "guard "

// maxReason is how much of what a guard says a fact has.
const maxReason = 200

// guardText writes a guard's word as a fact, and guardWord reads it.
func guardText(c schemas.Check) string {
	reason := c.Reason
	if len(reason) > maxReason {
		reason = strings.ToValidUTF8(reason[:maxReason], "") + "…"
	}
	return fmt.Sprintf("%s in %d ms: %s", c.Said, c.Millis, reason)
}

func guardWord(name, text string) (c schemas.Check, err error) {
	said, rest, ok1 := strings.Cut(text, " in ")
	ms, reason, ok2 := strings.Cut(rest, " ms: ")
	n, err := strconv.Atoi(ms)
	if err != nil || !ok1 || !ok2 {
		return c, fmt.Errorf("fact %s%s: %q is no guard's word", guardFact, name, text)
	}
	return schemas.Check{Guard: name, Said: said, Reason: reason, Millis: n}, nil
}
