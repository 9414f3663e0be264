package test

import (
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"waybill.dev/schemas"
	"waybill.dev/test/gateway"
)

// what is a change of decisions, as a what-if tells of it.
type whatChanges struct {
	Was, Now, Rule string
	Of             string `json:"was_rule"`
	What           string
	Count          int
	Examples       []struct{ Call, Tool string }
}

type whatSum struct {
	Decisions, Same, Changed int
	Undecided                int `json:"cannot_be_decided"`
	NoRequest                int `json:"without_request"`
}

// firstDecisions are the first decision on each tools/call, in the order of the calls.
func firstDecisions(events []schemas.Event) (outcomes, rules []string) {
	slices.SortFunc(events, func(a, b schemas.Event) int { return int(a.Seq) - int(b.Seq) })
	at := map[schemas.CallID]int{}
	for _, e := range events {
		outcome, d, of := "", schemas.Decision{}, schemas.Target{}
		switch p := e.Data.(type) {
		case *schemas.Authorized:
			outcome, d, of = "permit", p.Decision, p.Target
		case *schemas.Denied:
			outcome, d, of = "deny", p.Decision, p.Target
		case *schemas.Held:
			outcome, d, of = "hold", p.Decision, p.Target
		}
		if _, known := at[e.Call]; known || outcome == "" || of.Method != "tools/call" {
			continue
		}
		at[e.Call] = len(outcomes)
		outcomes, rules = append(outcomes, outcome), append(rules, d.Rule)
	}
	return outcomes, rules
}

// TestWhatIf: what the log says that other rules would decide is what they decide
// when the same is asked for again, limits and what sessions did among it.
func TestWhatIf(t *testing.T) {
	t.Parallel()
	const before = `
rules:
  - {id: all, effect: permit, match: {tools: ["*"]}}
  - {id: bad, effect: forbid, match: {tools: [count]}, when: 'args.key == "bad"'}
  - {id: five, effect: oblige, match: {tools: [read]}, obligations: {limit: {calls: 5, per: 1h, by: [agent, tool]}}}
`
	const after = `
rules:
  - {id: some, effect: permit, match: {tools: [count, read]}}
  - {id: x, effect: forbid, match: {tools: [count]}, when: 'args.key.startsWith("x")'}
  - {id: seven, effect: oblige, match: {tools: [read]}, obligations: {limit: {calls: 7, per: 1h, by: [agent, tool]}}}
  - {id: look, effect: require_approval, match: {tools: [count]}, when: 'args.key == "held"', wait: 1s}
  - {id: enough, effect: forbid, match: {tools: [count]}, when: 'session.calls > 30'}
`
	traffic := func(r *ruled) {
		call := func(tool, args string) { // in one session, whatever the hour
			body := fmt.Sprintf(`{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{"name":%q,"arguments":%s,%s}}`, tool, args, gateway.Meta)
			if _, err := r.Post(t.Context(), "up", "tools/call", tool, body, "Waybill-Session: one"); err != nil {
				t.Fatal(err)
			}
		}
		for i := range 40 {
			switch {
			case i%4 == 0:
				call("read", `{"key":"r"}`)
			case i%7 == 0:
				call("count", `{"key":"bad"}`)
			case i == 9:
				call("count", `{"key":"held"}`)
			case i%5 == 0:
				call("count", fmt.Sprintf(`{"key":"x%d"}`, i))
			default:
				call("count", fmt.Sprintf(`{"key":"k%d"}`, i))
			}
		}
		call("other", `{}`)
	}
	first, second := startRuled(t, before), startRuled(t, after)
	traffic(first)
	traffic(second)
	outcomes, rules := firstDecisions(first.Events())
	live, liveRules := firstDecisions(second.Events())
	if len(outcomes) != 41 || len(live) != 41 {
		t.Fatalf("%d and %d decisions", len(outcomes), len(live))
	}
	want := map[string]int{}
	for i := range live {
		if outcomes[i] != live[i] {
			want[fmt.Sprintf("%s by %s → %s by %s", outcomes[i], rules[i], live[i], liveRules[i])]++
		}
	}
	if len(want) < 5 {
		t.Fatalf("the live runs hardly differ: %v", want)
	}

	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "rules.yaml"), []byte(after), 0o600); err != nil {
		t.Fatal(err)
	}
	effects := first.effects()
	read := func(args ...string) (map[string]int, whatSum, int) {
		t.Helper()
		out, errs, exit := first.CLI(append(args, "--json")...)
		if errs != "" {
			t.Fatalf("%q: exit %d, %s", args, exit, errs)
		}
		got, sum := map[string]int{}, whatSum{}
		for line := range strings.Lines(out) {
			var l struct {
				Change  *whatChanges
				Summary *whatSum
				whatChanges
			}
			if err := json.Unmarshal([]byte(line), &l); err != nil {
				t.Fatal(err)
			}
			c, n := l.Change, 1
			if l.Summary != nil {
				sum = *l.Summary
				continue
			}
			if c == nil {
				c = &l.whatChanges
			} else {
				n = c.Count
			}
			if c.Was != "" {
				got[fmt.Sprintf("%s by %s → %s by %s", c.Was, c.Of, c.Now, c.Rule)] += n
			}
		}
		return got, sum, exit
	}
	got, sum, exit := read("replay", "--since", "1h", "--tenant", "acme", "--policy", dir)
	if !maps.Equal(got, want) || exit != 3 || sum.Decisions != 41 || sum.Undecided != 0 || sum.NoRequest != 0 {
		t.Errorf("exit %d, %+v\nwhat-if says %v\nlive it is   %v", exit, sum, got, want)
	}
	if _, sum, exit := read("replay", "--since", "1h", "--tenant", "other", "--policy", dir); exit != 0 || sum.Decisions != 0 {
		t.Errorf("another tenant: exit %d, %+v", exit, sum)
	}
	// Under the same rules nothing changes; before they are in force likewise.
	if got, sum, exit := read("policy", "check", "--what-if", "1h"); exit != 0 || len(got) != 0 || sum.Same != 41 {
		t.Errorf("under the same rules: exit %d, %v, %+v", exit, got, sum)
	}

	// Of one session, what no rule had asked for is not known.
	var key schemas.SessionKey
	for key = range sessionsOf(first.Events()) {
	}
	_, sum, exit = read("replay", string(key), "--policy", dir)
	if exit != 3 || sum.Decisions == 0 || sum.Undecided == 0 {
		t.Errorf("of session %s: exit %d, %+v", key, exit, sum)
	}
	out, errs, exit := first.CLI("replay", string(key), "--policy", dir)
	if exit != 3 || !strings.Contains(out, "cannot be decided: fact calls seven tenant=acme agent=researcher tool=up/read was not recorded") {
		t.Errorf("exit %d, %s%s", exit, out, errs)
	}
	if _, sum, exit := read("replay", string(key), "--policy", filepath.Join(dir, "rules.yaml")); exit != 3 || sum.Decisions == 0 {
		t.Errorf("under one file: exit %d, %+v", exit, sum)
	}
	for args, says := range map[string]string{
		"replay --since 1h --policy /nowhere":                    "no such file",
		"replay --since 1h --policy " + t.TempDir():              "neither files of rules",
		"replay --since 1h --policy " + dir + " --from x.export": "--since is of the log or of the record",
	} {
		if out, errs, exit := first.CLI(strings.Fields(args)...); exit != 1 && exit != 2 || !strings.Contains(errs, says) {
			t.Errorf("%s: exit %d, %s%s", args, exit, out, errs)
		}
	}
	// Where it is erased there is nothing to decide, which is said.
	if _, errs, exit := first.CLI("erase", string(key)); exit != 0 {
		t.Fatal(errs)
	}
	for args, code := range map[string]int{string(key): 4, "--since 1h": 0} {
		out, errs, exit := first.CLI(slices.Concat([]string{"replay", "--policy", dir}, strings.Fields(args))...)
		if exit != code || !strings.Contains(out, "0 decisions under") || !strings.Contains(out, "erased") {
			t.Errorf("erased, %s: exit %d, %s%s", args, exit, out, errs)
		}
	}
	if n := first.effects(); n != effects {
		t.Errorf("a what-if has called the upstream: %d effects, were %d", n, effects)
	}
}
