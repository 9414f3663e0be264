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
	ID      string   `json:"id"`                // by position: allow[0]
	Tenants []string `json:"tenants,omitempty"` // whose agents; none: those of every tenant
	Agents  []string `json:"agents"`
	Servers []string `json:"servers"`

	// Tools that may be called. Exactly "*" among them means every method of
	// the server, known or unknown; otherwise these tools' tools/call and
	// nothing else.
	Tools []string `json:"tools,omitempty"`

	// Methods opens further methods, but never tools/call. A permitted
	// tools/list shows what Tools of all the caller's rules let it call.
	Methods []string `json:"methods,omitempty"`
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
	r := allow{
		tenants: ready(a.Tenants), agents: ready(a.Agents), servers: ready(a.Servers),
		tools: ready(a.Tools), methods: ready(a.Methods), list: slices.Clone(a.Tools),
	}
	if r.tools.all {
		r.list = []string{"*"}
	}
	return Rule{ID: a.ID, Effect: Permit, Servers: slices.Clone(a.Servers), Match: r.match}, nil
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

// allow is an Allow made ready. It shares nothing with what the operator's
// config holds, and never changes.
type allow struct {
	tenants, agents, servers, tools, methods patterns
	list                                     []string // of tools, for Match.Tools
}

func (a *allow) match(in *Input) (Match, error) {
	e, q := in.Event, in.Request
	if !a.agents.match(string(e.Agent)) || !a.servers.match(q.Server) ||
		!a.tenants.empty() && !a.tenants.match(string(e.Tenant)) {
		return Match{}, nil
	}
	switch {
	case a.tools.all:
		return Match{Applies: true, Tools: a.list}, nil
	case q.Method == toolsCall:
		return Match{Applies: q.Name != "" && a.tools.match(q.Name)}, nil
	case q.Method == toolsList:
		return Match{Applies: a.methods.match(toolsList), Tools: a.list}, nil
	}
	return Match{Applies: a.methods.match(q.Method)}, nil
}

// patterns match like [schemas.Match] of each of them. Most are plain names,
// and to compare these first makes a policy of 200 rules three times cheaper.
type patterns struct {
	all   bool // "*" is among them
	names []string
	globs []string
}

func ready(list []string) (p patterns) {
	for _, s := range list {
		switch {
		case s == "*":
			p.all = true
		case strings.Contains(s, "*"):
			p.globs = append(p.globs, s)
		default:
			p.names = append(p.names, s)
		}
	}
	return p
}

func (p *patterns) empty() bool { return !p.all && len(p.names) == 0 && len(p.globs) == 0 }

func (p *patterns) match(name string) bool {
	if p.all || slices.Contains(p.names, name) {
		return true
	}
	for _, g := range p.globs {
		if schemas.Match(g, name) {
			return true
		}
	}
	return false
}
