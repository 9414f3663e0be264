package policy

import (
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"waybill.dev/schemas"
)

// Policies by chance, against an evaluator that is slow and plain: it reads the
// rules as the manual has them, and knows nothing of selectors, index and CEL.

// drawn is a rule by chance.
type drawn struct {
	id                             string
	effect                         Effect
	agents, groups, servers, tools []string // nil: any
	when                           int      // of conditions
	tag                            string
	limit                          int // 0: none
}

// errFails is what a condition comes to that cannot be evaluated.
var errFails = errors.New("fails")

type args map[string]any

// number is a JSON number of the arguments.
func number(v any, there bool) (float64, error) {
	f, ok := v.(float64)
	if !there || !ok {
		return 0, errFails
	}
	return f, nil
}

// sampled are the conditions that rules are drawn from, in CEL and in Go. Those up
// to openTo are what permits are drawn from, the rest is for what restricts: so
// that no permit and forbid can be at odds about every value of an argument.
var sampled = []struct {
	cel string
	go_ func(agent, tool string, groups []string, a args) (bool, error)
}{
	{"", func(string, string, []string, args) (bool, error) { return true, nil }},
	{`args.n > 3`, func(_, _ string, _ []string, a args) (bool, error) {
		v, ok := a["n"]
		n, err := number(v, ok)
		return n > 3, err
	}},
	{`agent.id == "ann"`, func(agent, _ string, _ []string, _ args) (bool, error) { return agent == "ann", nil }},
	{`name == "t1" || "g2" in agent.groups`, func(_, tool string, groups []string, _ args) (bool, error) {
		return tool == "t1" || slices.Contains(groups, "g2"), nil
	}},
	{`has(args.s) && args.s == "x"`, func(_, _ string, _ []string, a args) (bool, error) { return a["s"] == "x", nil }},
	{`args.o.v == true`, func(_, _ string, _ []string, a args) (bool, error) {
		o, ok := a["o"].(map[string]any)
		v, there := o["v"]
		if !ok || !there {
			return false, errFails
		}
		return v == true, nil
	}},
	{`has(args.o) && has(args.o.v)`, func(_, _ string, _ []string, a args) (bool, error) {
		v, there := a["o"]
		if !there {
			return false, nil
		}
		o, ok := v.(map[string]any)
		if !ok {
			return false, errFails
		}
		_, there = o["v"]
		return there, nil
	}},
	{`args.l.exists(i, i > 5)`, func(_, _ string, _ []string, a args) (bool, error) {
		switch l := a["l"].(type) {
		case []any:
			var err error
			for _, v := range l {
				n, e := number(v, true)
				if e == nil && n > 5 {
					return true, nil
				}
				err = errors.Join(err, e)
			}
			return false, err
		case map[string]any:
			if len(l) == 0 {
				return false, nil
			}
		}
		return false, errFails
	}},
	{`agent.id == "bob" && name.startsWith("t")`, func(agent, tool string, _ []string, _ args) (bool, error) {
		return agent == "bob" && strings.HasPrefix(tool, "t"), nil
	}},
}

const openTo = 4

// reference decides as the manual says. It returns the outcome and the rules that
// spoke.
func reference(rules []drawn, agent, server, tool string, groups []string, a args, counts map[string]int, approval string) (string, []string) {
	fits := func(patterns []string, names ...string) bool {
		if patterns == nil {
			return true
		}
		for _, p := range patterns {
			for _, n := range names {
				if p == n || p == "*" || strings.HasSuffix(p, "*") && strings.HasPrefix(n, p[:len(p)-1]) {
					return true
				}
			}
		}
		return false
	}
	var spoke []string
	by := map[Effect]int{}
	limited := false
	for _, r := range rules {
		if !fits(r.agents, agent) || !fits(r.servers, server) || !fits(r.tools, tool) || !fits(r.groups, groups...) {
			continue
		}
		ok, err := sampled[r.when].go_(agent, tool, groups, a)
		if err != nil {
			ok = r.effect != Permit
		}
		if !ok {
			continue
		}
		spoke = append(spoke, r.id)
		by[r.effect]++
		limited = limited || r.limit > 0 && counts[r.id] >= r.limit
	}
	slices.Sort(spoke)
	switch {
	case by[Forbid] > 0, by[Permit] == 0, limited, approval == ApprovalRefused:
		return "deny", spoke
	case by[Approve] > 0 && approval == "":
		return "hold", spoke
	}
	return "permit", spoke
}

// chance draws rules and calls from a seed.
type chance struct{ *rand.Rand }

func (c chance) some(from ...string) []string {
	if c.IntN(3) == 0 {
		return nil
	}
	var l []string
	for _, s := range from {
		if c.IntN(2) == 0 {
			l = append(l, s)
		}
	}
	if len(l) == 0 {
		l = []string{from[c.IntN(len(from))]}
	}
	return l
}

func (c chance) rule(i int) drawn {
	r := drawn{
		id: fmt.Sprintf("r%02d", i), effect: Effect(c.IntN(4) + 1),
		agents: c.some("ann", "b*", "*"), groups: c.some("g1", "g2", "g*"), servers: c.some("files", "mail", "f*"), tools: c.some("t1", "t*", "u1", "*"),
	}
	if c.IntN(3) == 0 {
		r.effect = Permit // else most is denied
	}
	r.when = c.IntN(openTo)
	if r.effect != Permit {
		r.tag = "tag-" + r.id
		r.when = c.IntN(len(sampled) - openTo)
		if r.when > 0 {
			r.when += openTo
		}
	}
	if r.effect != Forbid && c.IntN(4) == 0 {
		r.limit = 1 + c.IntN(3)
	}
	return r
}

var (
	drawnN = []string{"", `"n":1`, `"n":9`, `"n":9.5`, `"n":"9"`, `"n":null`, `"n":[9]`}
	drawnS = []string{"", `"s":"x"`, `"s":"y"`, `"s":7`}
	drawnO = []string{"", `"o":{"v":true}`, `"o":{"v":1}`, `"o":{}`, `"o":"v"`, `"o":null`}
	drawnL = []string{"", `"l":[]`, `"l":[1,9]`, `"l":[1,"9"]`, `"l":["9",9]`, `"l":{}`, `"l":{"a":9}`, `"l":9`}
)

func join(members ...string) string {
	return "{" + strings.Join(slices.DeleteFunc(members, func(m string) bool { return m == "" }), ",") + "}"
}

func (c chance) args() string {
	return join(drawnN[c.IntN(len(drawnN))], drawnS[c.IntN(len(drawnS))], drawnO[c.IntN(len(drawnO))], drawnL[c.IntN(len(drawnL))])
}

// conditions compiles those that are drawn from, once.
func conditions(t testing.TB) []*condition {
	env, err := environment()
	if err != nil {
		t.Fatal(err)
	}
	all := make([]*condition, len(sampled))
	for i, s := range sampled {
		if s.cel == "" {
			continue
		}
		if all[i], err = compileCondition(env, s.cel); err != nil {
			t.Fatal(err)
		}
	}
	return all
}

// armed makes a bundle of drawn rules.
func armed(t testing.TB, conditions []*condition, rules []drawn) *Bundle {
	t.Helper()
	list := []Rule{fixed("list", Permit, Match{}, nil)}
	list[0].Match = func(in *Input) (Match, error) { return Match{Applies: in.Request.Method == toolsList}, nil }
	for _, d := range rules {
		r := Rule{ID: d.id, Effect: d.effect, Methods: []string{toolsCall}, Servers: d.servers}
		if d.tag != "" && d.effect != Forbid {
			r.Obligations.Tags = []string{d.tag}
		}
		if d.limit > 0 {
			r.Obligations.limit = &limitRule{Calls: d.limit, Per: time.Minute, By: []string{"agent"}}
		}
		s := selectors{when: conditions[d.when], tools: patterns{all: true}, toolList: []string{"*"}, methods: ready(r.Methods), byMethod: true}
		s.agents, s.byAgent = ready(d.agents), d.agents != nil
		s.groups, s.byGroup = ready(d.groups), d.groups != nil
		s.servers, s.byServer = ready(d.servers), d.servers != nil
		if d.tools != nil {
			s.tools, s.toolList = ready(d.tools), d.tools
		}
		s.arm(&r)
		list = append(list, r)
	}
	b, err := NewBundle(list, []string{"files", "mail"})
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// TestAgainstReference: 5,000 policies by chance decide as the plain evaluator
// does; their order changes nothing; one more forbid that speaks always denies.
func TestAgainstReference(t *testing.T) {
	compiled := conditions(t)
	outcomes := map[string]int{}
	for seed := range uint64(5000) {
		c := chance{rand.New(rand.NewPCG(seed, 7))}
		rules := make([]drawn, 1+c.IntN(8))
		for i := range rules {
			rules[i] = c.rule(i)
		}
		b := armed(t, compiled, rules)
		shuffled := slices.Clone(rules)
		c.Shuffle(len(shuffled), func(i, j int) { shuffled[i], shuffled[j] = shuffled[j], shuffled[i] })
		other := armed(t, compiled, shuffled)
		strict := armed(t, compiled, append(slices.Clone(rules), drawn{id: "z", effect: Forbid}))
		for range 3 {
			agent, server, tool := []string{"ann", "bob", "cy"}[c.IntN(3)], []string{"files", "mail"}[c.IntN(2)], []string{"t1", "t2", "u1"}[c.IntN(3)]
			groups := [][]string{{}, {"g1"}, {"g2", "h"}}[c.IntN(3)]
			text := c.args()
			e := with(tool, text)
			e.Agent = schemas.Agent(agent)
			e.Data.(*schemas.Requested).Server = server
			facts := Facts{Groups: groups, Counts: map[string]int{}, Approval: []string{"", "", "granted by x, record 1", "refused by x, record 1"}[c.IntN(4)]}
			counts := map[string]int{}
			for _, l := range b.needs(&e, e.Data.(*schemas.Requested)).limits {
				counts[l.Rule] = c.IntN(4)
				facts.Counts[l.key()] = counts[l.Rule]
			}
			var a args
			if err := json.Unmarshal([]byte(text), &a); err != nil {
				t.Fatal(err)
			}
			said, _, _ := strings.Cut(facts.Approval, " ")
			want, spoke := reference(rules, agent, server, tool, groups, a, counts, said)
			v := b.Decide(e, facts)
			outcomes[want]++
			if v.Outcome() != want || !slices.Equal(v.Matches, spoke) {
				t.Fatalf("seed %d: %s on %s/%s with %s, groups %q, counts %v, approval %q:\nis   %s by %q: %s\nwant %s by %q\nrules %+v",
					seed, agent, server, tool, text, groups, counts, said, v.Outcome(), v.Matches, v.Reason, want, spoke, rules)
			}
			o := other.Decide(e, facts)
			if o.Outcome() != want || !slices.Equal(o.Matches, v.Matches) || !reflect.DeepEqual(o.Obligations, v.Obligations) {
				t.Fatalf("seed %d: in order %+v, shuffled %+v", seed, v, o)
			}
			if s := strict.Decide(e, facts); s.Outcome() != "deny" {
				t.Fatalf("seed %d: a forbid loses: %+v", seed, s)
			}
			// The facts as the decision records them give the same decision.
			again, err := FactsOf(facts.Record())
			if err != nil {
				t.Fatal(err)
			}
			if r := b.Decide(e, again); !reflect.DeepEqual(v.Outcome(), r.Outcome()) || !slices.Equal(v.Matches, r.Matches) {
				t.Fatalf("seed %d: from %+v %+v, from what is recorded %+v", seed, facts, v, r)
			}
		}
	}
	for _, o := range []string{"permit", "deny", "hold"} {
		if outcomes[o] < 300 {
			t.Errorf("only %d calls are to %s: the policies say too little: %v", outcomes[o], o, outcomes)
		}
	}
}

// TestListedByRules: a list shows a tool exactly if some arguments of it are let
// go on, or would be if a person approved or a limit were not reached.
func TestListedByRules(t *testing.T) {
	compiled := conditions(t)
	var samples []string
	for _, n := range []string{"", `"n":9`} {
		for _, s := range []string{"", `"s":"x"`} {
			for _, o := range []string{"", `"o":{}`, `"o":{"v":false}`, `"o":{"v":true}`} {
				for _, l := range []string{"", `"l":[]`, `"l":[9]`} {
					samples = append(samples, join(n, s, o, l))
				}
			}
		}
	}
	seen := map[bool]int{}
	for seed := range uint64(400) {
		c := chance{rand.New(rand.NewPCG(seed, 11))}
		rules := make([]drawn, 1+c.IntN(6))
		for i := range rules {
			rules[i] = c.rule(i)
			if w := &rules[i].when; rules[i].effect != Permit && (sampled[*w].cel == `args.o.v == true` || sampled[*w].cel == `has(args.o) && has(args.o.v)`) {
				*w = 4 // of these two no value might please both
			}
		}
		b := armed(t, compiled, rules)
		for _, agent := range []string{"ann", "bob", "cy"} {
			list := call("tools/list", "")
			list.Agent = schemas.Agent(agent)
			facts := Facts{Groups: [][]string{{}, {"g1"}, {"g2"}}[c.IntN(3)]}
			v := b.Decide(list, facts)
			if !v.Permit {
				t.Fatalf("seed %d: %+v", seed, v)
			}
			for _, tool := range []string{"t1", "t2", "u1", "v"} {
				shown := slices.ContainsFunc(v.Only, func(p string) bool { return schemas.Match(p, tool) }) || v.Only == nil
				shown = shown && (!v.Each || b.Shows(list, facts, tool))
				callable := slices.ContainsFunc(samples, func(text string) bool {
					e := with(tool, text)
					e.Agent = list.Agent
					f := facts
					f.Counts = map[string]int{}
					for _, l := range b.needs(&e, e.Data.(*schemas.Requested)).limits {
						f.Counts[l.key()] = 0
					}
					return b.Decide(e, f).Outcome() != "deny"
				})
				if seen[shown]++; shown != callable {
					t.Fatalf("seed %d: %s, tool %s: shown %t, callable %t; only %q each %t\n%+v", seed, agent, tool, shown, callable, v.Only, v.Each, rules)
				}
			}
		}
	}
	if seen[true] < 200 || seen[false] < 200 {
		t.Errorf("shown and not: %v", seen)
	}
}

// TestFactsRecorded: what a decision records of its facts is read back the same.
func TestFactsRecorded(t *testing.T) {
	for _, f := range []Facts{
		{}, {Groups: []string{}}, {Groups: []string{"a,b", `"`, "ü"}},
		{Session: &SessionFacts{Calls: 3, Denied: 1, Tools: []string{"a/b"}}}, {Tool: &ToolFacts{SHA256: "ab", ReadOnly: true, OpenWorld: true}},
		{Counts: map[string]int{"r tenant=a agent=b": 7}}, {Approval: "granted by ann, record 3"},
	} {
		got, err := FactsOf(f.Record())
		if err != nil || !reflect.DeepEqual(got, f) {
			t.Errorf("%+v comes back as %+v, %v", f, got, err)
		}
	}
	for k, v := range map[string]string{
		"agent.groups": "a", "session.calls": "x", "tool.digest": "ab", "calls r x": "many",
	} {
		if f, err := FactsOf(map[string]string{k: v}); err == nil {
			t.Errorf("%s %q is read as %+v", k, v, f)
		}
	}
	if len(slices.Collect(maps.Keys(Facts{}.Record()))) != 0 {
		t.Error("no facts are recorded as some")
	}
}
