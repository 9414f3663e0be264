package policy

import (
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"

	"waybill.dev/schemas"
)

// TestDecideAgain: by policies of chance, what is decided again on the same facts
// is what was decided; and where facts are missing and there is a verdict all the
// same, it is that of every fact there might have been.
func TestDecideAgain(t *testing.T) {
	compiled := conditions(t)
	seen := map[string]int{}
	for seed := range uint64(3000) {
		c := chance{rand.New(rand.NewPCG(seed, 23))}
		rules := make([]drawn, 1+c.IntN(8))
		for i := range rules {
			rules[i] = c.rule(i)
		}
		b := armed(t, compiled, rules)
		e := with([]string{"t1", "t2", "u1"}[c.IntN(3)], c.args())
		e.Agent = schemas.Agent([]string{"ann", "bob", "cy"}[c.IntN(3)])
		if c.IntN(10) == 0 {
			e.Data.(*schemas.Requested).Method = toolsList
		}
		limits := b.needs(&e, e.Data.(*schemas.Requested)).limits
		count := func(n int) map[string]int {
			m := map[string]int{}
			for _, l := range limits {
				m[l.key()] = n
			}
			return m
		}
		groups := [][]string{{}, {"g1"}, {"g2", "h"}, {"g1", "g2"}}
		facts := Facts{Groups: groups[c.IntN(4)], Counts: count(c.IntN(4)), Approval: []string{"", "", "granted by x, record 1"}[c.IntN(3)]}
		want := b.Decide(e, facts)
		v, missing := b.DecideAgain(e, facts, false)
		if missing != nil || outcome(v) != outcome(want) || v.Reason != want.Reason || !reflect.DeepEqual(v.Obligations, want.Obligations) ||
			!reflect.DeepEqual(v.Only, want.Only) || v.Each != want.Each {
			t.Fatalf("seed %d: again %+v, missing %q; at first %+v\n%+v", seed, v, missing, want, rules)
		}
		for _, without := range []string{"groups", "counts", "arguments", "all"} {
			f, gone := facts, false
			if without == "groups" || without == "all" {
				f.Groups = nil
			}
			if without == "counts" || without == "all" {
				f.Counts = nil
			}
			if without == "arguments" || without == "all" {
				gone = true
			}
			v, missing := b.DecideAgain(e, f, gone)
			if missing != nil {
				seen[without+" missing"]++
				if !reflect.DeepEqual(v, Verdict{}) {
					t.Fatalf("seed %d: %q are missing and yet it is %+v", seed, missing, v)
				}
				for _, m := range missing {
					if m != groupsFact && m != argumentsFact && !strings.HasPrefix(m, limitFact) {
						t.Fatalf("seed %d: %q is missing", seed, m)
					}
				}
				continue
			}
			seen[without+" settled"]++
			if f.Groups == nil {
				f.Groups = groups[c.IntN(4)]
			}
			if f.Counts == nil {
				f.Counts = count(c.IntN(4))
			}
			e := e
			if gone {
				e.Body = with("t1", c.args()).Body
			}
			one := b.Decide(e, f)
			if one.Outcome() != v.Outcome() || !reflect.DeepEqual(one.Only, v.Only) || v.Outcome() != "deny" && !slices.Equal(one.Obligations.Record(), v.Obligations.Record()) {
				t.Fatalf("seed %d without %s: %+v, though with %+v and %s it is %+v\n%+v", seed, without, v, f, e.Body, one, rules)
			}
		}
	}
	for _, what := range []string{"groups missing", "groups settled", "counts missing", "counts settled", "arguments missing", "arguments settled", "all missing", "all settled"} {
		if seen[what] < 20 {
			t.Errorf("%s: only %d times of %v", what, seen[what], seen)
		}
	}
}

// TestMissingFacts: each fact by its name, and not where another rule settles it.
func TestMissingFacts(t *testing.T) {
	permit := "rules:\n- {id: p, effect: permit, match: {tools: ['*']}}\n"
	for _, tt := range []struct {
		rules string
		facts Facts
		gone  bool
		want  string
	}{
		{permit, Facts{}, false, "permit p"},
		{permit, Facts{}, true, "permit p"},
		{permit + "- {id: f, effect: forbid, when: session.calls > 3}", Facts{}, false, "session.calls"},
		{permit + "- {id: f, effect: forbid, when: session.calls > 3}", Facts{Session: &SessionFacts{Calls: 4}}, false, "deny f"},
		{permit + "- {id: f, effect: forbid, when: agent.id == 'ann' && session.calls > 3}", Facts{}, false, "permit p"},
		{permit + "- {id: f, effect: forbid, when: tool.destructive}", Facts{}, false, "tool.destructive"},
		{permit + "- {id: f, effect: forbid, when: tool.destructive}\n- {id: e, effect: forbid, when: 'true'}", Facts{}, false, "deny e"},
		{permit + "- {id: f, effect: forbid, match: {groups: [x]}}", Facts{}, false, "agent.groups"},
		{permit + "- {id: f, effect: forbid, match: {groups: [x]}}", Facts{Groups: []string{}}, false, "permit p"},
		{permit + "- {id: f, effect: forbid, match: {tools: [read]}, when: args.n > 3}", Facts{}, true, "args"},
		{permit + "- {id: f, effect: forbid, match: {tools: [write]}, when: args.n > 3}", Facts{}, true, "permit p"},
		{permit + "- {id: o, effect: oblige, obligations: {limit: {calls: 3, per: 1m, by: [agent]}}}", Facts{}, false, "calls o tenant=acme agent=researcher"},
		{permit + "- {id: o, effect: oblige, obligations: {limit: {calls: 3, per: 1m, by: [agent]}}}", Facts{Counts: map[string]int{"o tenant=acme agent=researcher": 3}}, false, "deny o"},
		{permit + "- {id: o, effect: oblige, match: {groups: [x]}, obligations: {tags: [x]}}", Facts{}, false, "agent.groups"},
	} {
		b, err := tryBundle(File{"rules.yaml", tt.rules})
		if err != nil {
			if tt.want != "" {
				t.Errorf("%s: %v", tt.rules, err)
			}
			continue
		}
		v, missing := b.DecideAgain(with("read", `{"n":1}`), tt.facts, tt.gone)
		got := strings.Join(missing, " ")
		if missing == nil {
			got = outcome(v)
		}
		if got != tt.want {
			t.Errorf("%s with %+v: %s, want %s", tt.rules, tt.facts, got, tt.want)
		}
	}
}

// TestRerun: what limits and sessions count is counted by the rules' own verdicts,
// and not known where the traffic does not reach back.
func TestRerun(t *testing.T) {
	b := bundle(t, "rules:\n- {id: p, effect: permit, match: {tools: ['*']}, obligations: {limit: {calls: 2, per: 10s, by: [agent]}}}\n"+
		"- {id: f, effect: forbid, match: {tools: [last]}, when: '!(\"files/read\" in session.tools) || session.denied < 2'}\n")
	start := call("tools/call", "").Stored
	decide := func(r *Rerun, n int, tool string, at time.Duration) string {
		e := with(tool, `{}`)
		e.Call, e.Stored = schemas.CallID(fmt.Sprint("c", n)), start.Add(at)
		v, missing := r.Decide(e, Decided{N: 1, At: e.Stored, Outcome: "permit"})
		if missing != nil {
			return strings.Join(missing, " ")
		}
		return outcome(v)
	}
	r := NewRerun(b, true, time.Time{})
	r.Opened(call("", ""))
	for i, want := range []string{"permit p", "permit p", "deny p", "deny p", "permit p", "permit p", "deny p"} {
		if got := decide(r, i, "read", time.Duration(i)*3*time.Second); got != want {
			t.Errorf("call %d: %s, want %s", i, got, want)
		}
	}
	if got := decide(r, 9, "last", time.Minute); got != "permit p" {
		t.Errorf("after 3 denials: %s", got)
	}
	r = NewRerun(b, true, start)
	if got := decide(r, 1, "read", 3*time.Second); got != "calls p tenant=acme agent=researcher" {
		t.Errorf("before its window is whole: %s", got)
	}
	if got := decide(r, 2, "read", 12*time.Second); got != "permit p" {
		t.Errorf("when it is whole: %s", got)
	}
	if got := decide(r, 3, "last", time.Minute); !strings.HasPrefix(got, "session.") {
		t.Errorf("of a session that began before: %s", got)
	}
	if r := NewRerun(b, false, time.Time{}); !strings.HasPrefix(decide(r, 1, "read", 0), "calls p") {
		t.Error("counted, though not all is given")
	}
}

// BenchmarkAgain decides again by 200 rules, of which in "spread" each concerns one
// of 50 servers, as rules do, and in "all" every one concerns the call.
func BenchmarkAgain(b *testing.B) {
	e := with("transfer", `{"amount":42.5,"to":{"name":"Ann","iban":"DE02120300000000202051","country":"DE"},"path":"/home/ann/report.txt","items":[{"sku":"B","qty":1}],"text":"lorem ipsum"}`)
	spread := strings.NewReplacer("servers: [files, s", "servers: [s").Replace(manyRules())
	spread = strings.Replace(spread, "servers: [s7]", "servers: [files]", 1)
	for name, text := range map[string]string{"spread": spread, "all": manyRules()} {
		b.Run(name, func(b *testing.B) {
			set := bundle(b, text)
			facts := Facts{Groups: []string{"payers", "staff", "eu"}}
			b.ReportAllocs()
			n, before := 0, cpu(b)
			for b.Loop() {
				n++
				if v, missing := set.DecideAgain(e, facts, false); !v.Permit || missing != nil {
					b.Fatalf("%+v %q", v, missing)
				}
			}
			b.ReportMetric(float64(cpu(b)-before)/float64(n)/1e3, "cpu-µs/op")
		})
	}
}

// A list of texts is read as encoding/json reads it, or is left to that.
func TestPlainList(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		text := rapid.OneOf(
			rapid.StringOfN(rapid.RuneFrom([]rune(`[]",a\ é`+"\n\x00�")), 0, 12, -1),
			rapid.Custom(func(t *rapid.T) string {
				b, _ := json.Marshal(rapid.SliceOfN(rapid.StringOfN(rapid.RuneFrom([]rune(`ab",\<é� `)), 0, 4, -1), 0, 4).Draw(t, "list"))
				return string(b)
			}),
		).Draw(t, "text")
		got, ok := plainList(text)
		var want []string
		if err := json.Unmarshal([]byte(text), &want); ok && (err != nil || !reflect.DeepEqual(got, want)) {
			t.Fatalf("%q is read as %q, by encoding/json as %q (%v)", text, got, want, err)
		}
	})
	for _, text := range []string{`[]`, `[""]`, `["payers","staff"]`} {
		if _, ok := plainList(text); !ok {
			t.Errorf("%s is not read", text)
		}
	}
}

func TestRecorded(t *testing.T) {
	o := Obligations{
		Redact: []string{"to.iban"}, Tags: []string{"a", "b"}, Deadline: time.Second, RedactResult: []string{"x"}, MaxResult: 9,
		Labels: []string{"untrusted"}, Guards: []Guard{{Name: "shield", Request: true}},
	}
	all := o.Record()
	if len(all) != 8 || !o.Recorded(all) || !(&Obligations{}).Recorded(nil) || (&Obligations{}).Record() != nil {
		t.Fatalf("%q is not what was recorded", all)
	}
	for i := range all {
		other := slices.Clone(all)
		other[i] += "x"
		if o.Recorded(other) || o.Recorded(all[:i]) || o.Recorded(slices.Insert(slices.Clone(all), i, "tag z")) || o.Recorded(append(all, "tag z")) {
			t.Errorf("one that differs at %d passes", i)
		}
	}
}
