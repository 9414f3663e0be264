package policy

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	"waybill.dev/schemas"
)

// Allow is the simplest kind of rule, an entry of the config's `allow:`. It
// permits what agents whose name fits Agents do on servers whose name fits
// Servers. All lists hold patterns ([schemas.Match]).
//
// There is no list of groups: a request names its agent only, and a decision
// may depend on nothing that its event does not hold.
type Allow struct {
	ID      string   // by position: allow[0]
	Tenants []string // whose agents; none: those of every tenant
	Agents  []string
	Servers []string

	// Tools that may be called. Exactly "*" among them means every method of
	// the server, known or unknown; otherwise these tools' tools/call and
	// nothing else.
	Tools []string

	// Methods opens further methods, but never tools/call. A permitted
	// tools/list shows what Tools of all the caller's rules let it call.
	Methods []string
}

// Rule compiles the entry. An error says what is wrong with what the operator
// wrote; nothing is left to fail later.
func (a Allow) Rule() (Rule, error) {
	switch {
	case len(a.Agents) == 0:
		return Rule{}, fmt.Errorf("%s: agents: name at least one, or \"*\"", a.ID)
	case len(a.Servers) == 0:
		return Rule{}, fmt.Errorf("%s: servers: name at least one, or \"*\"", a.ID)
	case len(a.Tools) == 0 && len(a.Methods) == 0:
		return Rule{}, fmt.Errorf("%s: opens neither tools nor methods", a.ID)
	}
	for _, l := range []struct {
		key      string
		patterns []string
	}{
		{"tenants", a.Tenants}, {"agents", a.Agents}, {"servers", a.Servers}, {"tools", a.Tools}, {"methods", a.Methods},
	} {
		for _, p := range l.patterns {
			if err := checkPattern(p); err != nil {
				return Rule{}, fmt.Errorf("%s: %s: %q: %w", a.ID, l.key, p, err)
			}
		}
	}
	// The caller keeps its slices; the rule must not change with them.
	a.Tenants, a.Agents, a.Servers = slices.Clone(a.Tenants), slices.Clone(a.Agents), slices.Clone(a.Servers)
	a.Tools, a.Methods = slices.Clone(a.Tools), slices.Clone(a.Methods)
	all := slices.Contains(a.Tools, "*")
	return Rule{ID: a.ID, Effect: Permit, Match: func(e *schemas.Event, q *schemas.Requested) (Match, error) {
		return a.match(e, q, all), nil
	}}, nil
}

// checkPattern refuses the patterns besides "*" that fit an empty name: a list
// could show by them what a call by name is then refused.
func checkPattern(p string) error {
	if p == "" {
		return errors.New("an empty pattern matches nothing that has a name")
	}
	if p != "*" && strings.Trim(p, "*") == "" {
		return errors.New(`write "*" for everything`)
	}
	return nil
}

func (a *Allow) match(e *schemas.Event, q *schemas.Requested, all bool) Match {
	if !matchAny(a.Agents, string(e.Agent)) || !matchAny(a.Servers, q.Server) ||
		len(a.Tenants) > 0 && !matchAny(a.Tenants, string(e.Tenant)) {
		return Match{}
	}
	if all {
		return Match{Applies: true, Tools: every}
	}
	switch q.Method {
	case toolsCall:
		return Match{Applies: q.Name != "" && matchAny(a.Tools, q.Name)}
	case toolsList:
		return Match{Applies: matchAny(a.Methods, toolsList), Tools: a.Tools}
	}
	return Match{Applies: matchAny(a.Methods, q.Method)}
}

// every is never written to.
var every = []string{"*"}

func matchAny(patterns []string, name string) bool {
	for _, p := range patterns {
		if schemas.Match(p, name) {
			return true
		}
	}
	return false
}
