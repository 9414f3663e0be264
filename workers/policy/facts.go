package policy

import (
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"waybill.dev/schemas"
)

// Facts are what a decision may depend on beyond its event and its bundle. They
// are found out before it and written into it ([Facts.Record]), so that whoever
// decides again has the same ([FactsOf]). What no rule that may concern the
// request speaks of is left out.
type Facts struct {
	Groups   []string       // of the agent; nil: not known
	Session  *SessionFacts  // nil: not known
	Tool     *ToolFacts     // nil: not known, which makes a rule fail that asks
	Counts   map[string]int // of calls within the window of each limit, by [Limit].key
	Approval string         // "" before it was asked for; else it begins with one of the words below

	Guards map[string]schemas.Check // what guards say of the request, by their name

	// Of the registry, before any rule is asked: why what the request names must not
	// be called, and what is wrong with the arguments. "": nothing.
	Refused, Arguments string
}

// Defined is what the registry says of a request.
type Defined struct {
	SHA256             string     // hex; of the definition of what it names, where that is known
	Tool               *ToolFacts // of a tool that is known
	Refused, Arguments string     // as in Facts
}

// What becomes of an approval that was asked for.
const (
	ApprovalGranted = "granted"
	ApprovalRefused = "refused"
	ApprovalSilence = "silence" // nobody has said anything in time
	ApprovalGone    = "gone"    // the caller has taken the call back
)

// SessionFacts are what was decided in the session of a request before it.
type SessionFacts struct {
	Calls  int      // tools/call that were authorized
	Denied int      // requests that were denied
	Tools  []string // server/tool of those authorized, sorted
	Labels []string // that rules have put on what was authorized, sorted
}

// ToolFacts are what the registry knows of a tool.
type ToolFacts struct {
	SHA256                                       string // of its definition, hex
	ReadOnly, Destructive, Idempotent, OpenWorld bool
}

// Limit is a rate limit as it concerns one request.
type Limit struct {
	Rule  string
	Who   string // whom it counts: "agent=researcher tool=files/read"
	Calls int
	Per   time.Duration

	tenant schemas.Tenant // whose calls they are
}

func (l Limit) key() string { return l.Rule + " " + l.Who }

func (l Limit) String() string { return fmt.Sprintf("%d calls in %s of %s", l.Calls, l.Per, l.Who) }

// limitFact begins the name of a fact that is a count.
const limitFact = "calls "

// Record writes the facts as a decision holds them; nil if there are none.
func (f Facts) Record() map[string]string {
	m := map[string]string{}
	list := func(l []string) string {
		b, _ := json.Marshal(l) // of strings: cannot fail
		return string(b)
	}
	if f.Groups != nil {
		m["agent.groups"] = list(f.Groups)
	}
	if s := f.Session; s != nil {
		m["session.calls"], m["session.denied"] = strconv.Itoa(s.Calls), strconv.Itoa(s.Denied)
		m["session.tools"] = list(s.Tools)
		if len(s.Labels) > 0 {
			m["session.labels"] = list(s.Labels)
		}
	}
	if t := f.Tool; t != nil {
		m["tool.digest"] = t.SHA256
		m["tool.read_only"], m["tool.destructive"] = strconv.FormatBool(t.ReadOnly), strconv.FormatBool(t.Destructive)
		m["tool.idempotent"], m["tool.open_world"] = strconv.FormatBool(t.Idempotent), strconv.FormatBool(t.OpenWorld)
	}
	for key, n := range f.Counts {
		m[limitFact+key] = strconv.Itoa(n)
	}
	if f.Approval != "" {
		m["approval"] = f.Approval
	}
	if f.Refused != "" {
		m["registry.refused"] = f.Refused
	}
	if f.Arguments != "" {
		m["registry.arguments"] = f.Arguments
	}
	for name, c := range f.Guards {
		m[guardFact+name] = guardText(c)
	}
	if len(m) == 0 {
		return nil
	}
	return m
}

// FactsOf reads what Record has written. What cannot be read is an error: a
// decision is not to be found again on other facts than it was made on.
func FactsOf(m map[string]string) (Facts, error) {
	var f Facts
	var err error
	number := func(key string) int {
		n, e := strconv.Atoi(m[key])
		if e != nil && err == nil {
			err = fmt.Errorf("fact %s: %q is no number", key, m[key])
		}
		return n
	}
	list := func(key string) (l []string) {
		if l, ok := plainList(m[key]); ok {
			return l
		}
		if e := json.Unmarshal([]byte(m[key]), &l); e != nil && err == nil {
			err = fmt.Errorf("fact %s: %w", key, e)
		}
		return l
	}
	is := func(key string) bool {
		b, e := strconv.ParseBool(m[key])
		if e != nil && err == nil {
			err = fmt.Errorf("fact %s: %q is neither true nor false", key, m[key])
		}
		return b
	}
	for _, key := range slices.Sorted(maps.Keys(m)) { // of several that cannot be read, the error names the first
		if rest, ok := strings.CutPrefix(key, limitFact); ok {
			if f.Counts == nil {
				f.Counts = map[string]int{}
			}
			f.Counts[rest] = number(key)
		}
		if name, ok := strings.CutPrefix(key, guardFact); ok {
			c, e := guardWord(name, m[key])
			if e != nil && err == nil {
				err = e
			}
			if f.Guards == nil {
				f.Guards = map[string]schemas.Check{}
			}
			f.Guards[name] = c
		}
	}
	if _, ok := m["agent.groups"]; ok {
		f.Groups = list("agent.groups")
	}
	if _, ok := m["session.calls"]; ok {
		f.Session = &SessionFacts{Calls: number("session.calls"), Denied: number("session.denied"), Tools: list("session.tools")}
		if _, ok := m["session.labels"]; ok {
			f.Session.Labels = list("session.labels")
		}
	}
	if digest, ok := m["tool.digest"]; ok {
		f.Tool = &ToolFacts{
			SHA256: digest, ReadOnly: is("tool.read_only"), Destructive: is("tool.destructive"),
			Idempotent: is("tool.idempotent"), OpenWorld: is("tool.open_world"),
		}
	}
	f.Approval, f.Refused, f.Arguments = m["approval"], m["registry.refused"], m["registry.arguments"]
	return f, err
}

// plainList reads a list of texts in JSON as they nearly always are: without escapes,
// and without white space between them.
func plainList(text string) ([]string, bool) {
	if text == "[]" {
		return []string{}, true
	}
	inner, begins := strings.CutPrefix(text, `["`)
	inner, ends := strings.CutSuffix(inner, `"]`)
	if !begins || !ends || strings.ContainsFunc(inner, func(r rune) bool { return r < ' ' || r == '\\' || r == utf8.RuneError }) {
		return nil, false
	}
	list := strings.Split(inner, `","`)
	return list, strings.Count(inner, `"`) == 2*(len(list)-1)
}

// needs are the facts that rules may look at for a request.
type needs struct {
	groups, session, tool bool
	limits                []Limit
}

// needs asks the rules that may concern a request. It is pure.
func (b *Bundle) needs(e *schemas.Event, q *schemas.Requested) (n needs) {
	in := &Input{Event: e, Request: q}
	for _, r := range b.concerning(q) {
		if r.needs == nil {
			continue
		}
		m := r.needs(in)
		n.groups, n.session, n.tool = n.groups || m.groups, n.session || m.session, n.tool || m.tool
		n.limits = append(n.limits, m.limits...)
	}
	return n
}
