package policy

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"waybill.dev/schemas"
)

// written compiles one file of rules over the servers files and mail.
func bundle(t testing.TB, text string) *Bundle {
	t.Helper()
	b, err := tryBundle(File{"rules.yaml", text})
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func tryBundle(files ...File) (*Bundle, error) {
	encoded, err := Source{Servers: []string{"files", "mail", "all"}, Fronts: []string{"all"}, Files: files, Guards: []string{"lamp", "shield"}}.Encode()
	if err != nil {
		return nil, err
	}
	return Compile(encoded)
}

// with is a call of a tool with arguments.
func with(tool, args string) schemas.Event {
	e := call("tools/call", tool)
	e.Body = fmt.Appendf(nil, `{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{"name":%q,"arguments":%s}}`, tool, args)
	return e
}

// outcome is a verdict in a word and its rule.
func outcome(v Verdict) string {
	switch {
	case v.Permit:
		return "permit " + v.Rule
	case v.Hold:
		return "hold " + v.Rule
	}
	return "deny " + v.Rule
}

const payments = `
rules:
  - id: transfers
    effect: permit
    match: {agents: ["res*"], groups: [payers], servers: [files], tools: ["transfer*", balance]}
  - id: large
    effect: forbid
    match: {tools: ["transfer*"]}
    when: has(args.amount) && args.amount > 5000
    reason: amounts over 5000 go another way
  - id: abroad
    effect: require_approval
    match: {tools: [transfer]}
    when: args.to.country != "DE"
    wait: 5m
  - id: marked
    effect: oblige
    match: {tools: ["transfer*"]}
    obligations: {tags: [money], redact: [to.iban, "items.*.note"], deadline: 10s}
`

func TestRulesOfAFile(t *testing.T) {
	b := bundle(t, payments)
	payer := Facts{Groups: []string{"staff", "payers"}}
	for _, tt := range []struct {
		name  string
		e     schemas.Event
		facts Facts
		want  string
	}{
		{"home", with("transfer", `{"amount":10,"to":{"country":"DE"}}`), payer, "permit transfers"},
		{"large", with("transfer", `{"amount":5001,"to":{"country":"DE"}}`), payer, "deny large"},
		{"large, a fraction", with("transfer", `{"amount":5000.01,"to":{"country":"DE"}}`), payer, "deny large"},
		{"at the limit", with("transfer", `{"amount":5000,"to":{"country":"DE"}}`), payer, "permit transfers"},
		{"no amount", with("transfer", `{"to":{"country":"DE"}}`), payer, "permit transfers"},
		{"abroad", with("transfer", `{"amount":10,"to":{"country":"FR"}}`), payer, "hold abroad"},
		{"abroad and large", with("transfer", `{"amount":9000,"to":{"country":"FR"}}`), payer, "deny large"},
		{"abroad by another tool", with("transfer_many", `{"to":{"country":"FR"}}`), payer, "permit transfers"},
		{"approved", with("transfer", `{"amount":10,"to":{"country":"FR"}}`), Facts{Groups: payer.Groups, Approval: "granted by ann, record 3"}, "permit transfers"},
		{"approved, but large", with("transfer", `{"amount":9000,"to":{"country":"FR"}}`), Facts{Groups: payer.Groups, Approval: "granted by ann, record 3"}, "deny large"},
		{"refused", with("transfer", `{"amount":10,"to":{"country":"FR"}}`), Facts{Groups: payer.Groups, Approval: "refused by ann, record 3"}, "deny abroad"},
		{"silence", with("transfer", `{"amount":10,"to":{"country":"FR"}}`), Facts{Groups: payer.Groups, Approval: "silence"}, "deny abroad"},
		{"gone, although nothing needs approval", with("transfer", `{"amount":10,"to":{"country":"DE"}}`), Facts{Groups: payer.Groups, Approval: "gone"}, "deny transfers"},
		{"not in the group", with("transfer", `{"amount":10,"to":{"country":"DE"}}`), Facts{Groups: []string{"staff"}}, "deny "},
		{"groups not known", with("transfer", `{"amount":10,"to":{"country":"DE"}}`), Facts{}, "deny "},
		{"approval opens nothing", with("other", `{}`), Facts{Groups: payer.Groups, Approval: "granted by ann, record 3"}, "deny "},
		{"another tool", with("wipe", `{}`), payer, "deny "},
		{"another method", call("prompts/get", "transfer"), payer, "deny "},
	} {
		if got := outcome(b.Decide(tt.e, tt.facts)); got != tt.want {
			t.Errorf("%s: %s, want %s", tt.name, got, tt.want)
		}
	}
	v := b.Decide(with("transfer", `{"amount":9000,"to":{"country":"FR"}}`), payer)
	if want := []string{"abroad", "large", "marked", "transfers"}; !slices.Equal(v.Matches, want) || v.Reason != "amounts over 5000 go another way" {
		t.Errorf("%+v, want matches %q", v, want)
	}
	v = b.Decide(with("transfer", `{"amount":1,"to":{"country":"FR"}}`), payer)
	if got, want := v.Obligations.Record(), []string{"tag money", "redact items.*.note", "redact to.iban", "deadline 10s"}; !slices.Equal(got, want) || v.Obligations.Wait != 5*time.Minute {
		t.Errorf("obligations %q and wait %s, want %q", got, v.Obligations.Wait, want)
	}
}

// TestTypeConfusion: arguments of other types than a rule expects never get past
// it (facts: each of these passes some other engine).
func TestTypeConfusion(t *testing.T) {
	b := bundle(t, `
rules:
  - {id: all, effect: permit, match: {tools: ["*"]}}
  - {id: amount, effect: forbid, match: {tools: [pay]}, when: args.amount > 5000}
  - {id: path, effect: forbid, match: {tools: [read]}, when: 'args.path.startsWith("/etc") || args.path.contains("..")'}
  - {id: country, effect: forbid, match: {tools: [send]}, when: 'has(args.to.country) && args.to.country in ["KP", "IR"]'}
  - {id: items, effect: forbid, match: {tools: [order]}, when: 'args.items.exists(i, i.qty > 10)'}
  - {id: depth, effect: forbid, match: {tools: [deep]}, when: 'has(args.a) && has(args.a.b) && has(args.a.b.c) && args.a.b.c == true'}
  - {id: in, effect: forbid, match: {tools: [in]}, when: '"force" in args'}
`)
	many := `"m0":0` // members
	for i := range 20 {
		many += fmt.Sprintf(`,"m%d":0`, i+1)
	}
	for tool, args := range map[string][]string{
		"pay": {
			`{"amount":99999}`, `{"amount":"99999"}`, `{"amount":[99999]}`, `{"amount":null}`, `{"amount":99999.5}`, `{"amount":{}}`,
			`{"amount":{"value":99999}}`, `{"amount":true}`, `{"amount":1e400}`, `{"amount":1e5}`, `{"amount":-1e400}`,
			`{"amount":99999999999999999999}`, `{"amount":-99999999999999999999}`, `{"Amount":1}`, `{}`, `[99999]`, `"amount"`, `null`, `5`,
			`{"amount":1,"amount":99999}`, `{"amount":1,"AMOUNT":99999}`,
		},
		"read": {
			`{"path":"/etc/passwd"}`, `{"path":["/etc/passwd"]}`, `{"path":{"":"/etc/passwd"}}`, `{"path":null}`, `{"path":7}`, `{}`,
			`{"path":"a/../b"}`, `{"path":"\u002fetc"}`,
		},
		"send":  {`{"to":{"country":"KP"}}`, `{"to":"DE"}`, `{"to":["KP"]}`, `{"to":null}`, `{"to":7}`, `{}`, `{"to":true}`},
		"order": {`{"items":[{"qty":1},{"qty":11}]}`, `{"items":[{"qty":"11"}]}`, `{"items":{"qty":11}}`, `{"items":"11"}`, `{"items":null}`, `{"items":[null]}`, `{"items":[[]]}`, `{}`},
		"deep":  {`{"a":{"b":{"c":true}}}`, `{"a":"b"}`, `{"a":{"b":"c"}}`, `{"a":[]}`, `{"A":{"b":{"c":true}}}`, `{"a":{"B":{"c":true}}}`, `{"a":{"b":{"C":true}}}`, `{"a":{"b":{"C":true,` + many + `}}}`},
		"in":    {`{"force":1}`, `{"Force":1}`, `{"\u0046ORCE":1}`, `{"FORCE":1,` + many + `}`},
	} {
		for _, a := range args {
			if v := b.Decide(with(tool, a), Facts{}); v.Permit {
				t.Errorf("%s %s: %+v", tool, a, v)
			}
			// A server may not care for the case of a name.
			e := with(tool, a)
			e.Body = bytes.Replace(e.Body, []byte(`"arguments"`), []byte(`"Arguments"`), 1)
			if v := b.Decide(e, Facts{}); v.Permit {
				t.Errorf("%s Arguments %s: %+v", tool, a, v)
			}
		}
	}
	for tool, args := range map[string][]string{
		"pay": {`{"amount":5000}`, `{"amount":1.5}`, `{"amount":-3}`}, "read": {`{"path":"a/b"}`},
		"send": {`{"to":{}}`, `{"to":{"country":"DE"}}`}, "order": {`{"items":[]}`, `{"items":[{"qty":10.0}]}`}, "deep": {`{}`, `{"a":{}}`, `{"a":{"b":{"c":false}}}`, `{"a":{"b":{"d":true,` + many + `}}}`},
		"in": {`{}`, `{"forces":1}`, `{` + many + `}`},
	} {
		for _, a := range args {
			if v := b.Decide(with(tool, a), Facts{}); !v.Permit {
				t.Errorf("%s %s: %+v", tool, a, v)
			}
		}
	}
}

// TestErrorsFire: a condition that fails makes each effect that restricts fire,
// and no permit.
func TestErrorsFire(t *testing.T) {
	for effect, want := range map[string]string{
		"permit": "deny ", "forbid": "deny x", "require_approval": "hold x", "oblige": "permit all",
	} {
		for _, when := range []string{
			"args.none > 1", `args.n > "a"`, "1 / args.zero > 0", "tool.destructive", "session.calls > 3", `"a" in agent.groups`,
			"args.n", "int(args.text) > 1", `args.list[7] == 1`, `timestamp(args.text) > time`,
		} {
			text := fmt.Sprintf("rules:\n- {id: x, effect: %s, match: {tools: ['*']}, when: '%s', obligations: {tags: [it]}}\n", effect, when)
			if effect == "forbid" {
				text = strings.Replace(text, ", obligations: {tags: [it]}", "", 1)
			}
			if effect != "permit" {
				text += "- {id: all, effect: permit, match: {tools: ['*']}}\n"
			}
			v := bundle(t, text).Decide(with("t", `{"n":1,"zero":0,"text":"x","list":[]}`), Facts{})
			if outcome(v) != want || len(v.Faults) != 1 {
				t.Errorf("%s when %s: %+v, want %s", effect, when, v, want)
			}
			if effect == "oblige" && !slices.Equal(v.Obligations.Tags, []string{"it"}) {
				t.Errorf("%s when %s: obligations %+v", effect, when, v.Obligations)
			}
		}
	}
}

// What a rule is to concern is what is written, however YAML would read it.
func TestTextsAreTexts(t *testing.T) {
	b := bundle(t, "\ufeffrules:\n- {id: all, effect: permit, match: {tools: ['*']}}\n- {id: 010, effect: forbid, match: {tools: [0x10, 1e3, 1.0, true, .inf, -7, 2026-01-01]}}\n")
	for _, tool := range []string{"0x10", "1e3", "1.0", "true", ".inf", "-7", "2026-01-01"} {
		if v := b.Decide(with(tool, `{}`), Facts{}); v.Permit || v.Rule != "010" {
			t.Errorf("%s: %+v", tool, v)
		}
	}
	for _, tool := range []string{"16", "1000", "1", "7"} {
		if v := b.Decide(with(tool, `{}`), Facts{}); !v.Permit {
			t.Errorf("%s: %+v", tool, v)
		}
	}
}

// A file of tests is read as strictly as one of rules.
func TestTestFiles(t *testing.T) {
	b := bundle(t, "rules:\n- {id: all, effect: permit, match: {tools: ['*']}}\n")
	for text, want := range map[string]string{
		"tests: []\n---\ntests: []\n": "t.yaml:2: another document",
		"tests: !!seq []\n":           "t.yaml:1: has a tag",
		"tests:\n- {name: x, call: {agent: a, server: files, tool: x, approval: yes}, expect: permit}\n":             `t.yaml:2: approval: "yes" is neither`,
		"tests:\n- {name: x, call: {agent: a, server: files, tool: x, guards: {lamp: no}}, expect: permit}\n":        `t.yaml:2: guards: "no" is none of`,
		"tests:\n- {name: x, call: {agent: a, server: files, tool: x, args: {a: null, b: [1, x: y]}}, expect: it}\n": `t.yaml:2: expect: "it"`,
	} {
		if _, err := b.Test(File{"t.yaml", text}); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %s", text, err, want)
		}
	}
}

// Tests suppose what a tool says of itself, too.
func TestSupposedAnnotations(t *testing.T) {
	b := bundle(t, "rules:\n- {id: all, effect: permit, match: {tools: ['*']}}\n- {id: no, effect: forbid, match: {tools: ['*']}, when: tool.destructive && !tool.read_only}\n")
	results, err := b.Test(File{"t.yaml", `tests:
- {name: not known, call: {server: files, tool: x}, expect: deny, rule: "no"}
- {name: says nothing, call: {server: files, tool: x, annotations: {}}, expect: deny, rule: "no"}
- {name: reads, call: {server: files, tool: x, annotations: {read_only: true}}, expect: permit}
- {name: adds, call: {server: files, tool: x, annotations: {destructive: false}}, expect: permit}
`})
	if err != nil || len(results) != 4 {
		t.Fatal(results, err)
	}
	for _, r := range results {
		if r.Wrong != "" {
			t.Errorf("%s: %s", r.Name, r.Wrong)
		}
	}
}

// FuzzRules: a file of rules is refused with words that name it, or it decides.
func FuzzRules(f *testing.F) {
	for _, s := range []string{
		payments, "rules: [{id: a, effect: permit, match: {tools: !!str x}}]", "rules: &a [*a]", "rules: [{<<: {id: a}}]", "\ufeffrules:\n- id: |\n   a\n",
		"rules: [{id: 1e9, effect: oblige, obligations: {limit: {calls: 0x5, per: 1m, by: [agent]}, guards: [{name: lamp, on: [answer]}]}}]",
		"rules:\n- id: a\n  effect: forbid\n  match: {tools: [x]}\n  when: >-\n    args.x.exists(y, y > 1)\n",
	} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, text string) {
		b, err := tryBundle(File{"rules.yaml", text})
		if err != nil {
			if !strings.Contains(err.Error(), "rules.yaml") && !strings.Contains(err.Error(), "may have") {
				t.Errorf("refused as %q", err)
			}
			return
		}
		b.Decide(with("transfer", `{"amount":1}`), Facts{})
		_, _ = b.Test(File{"rules_test.yaml", text}) // it is none, and is told so
	})
}

// TestFileErrors: what is wrong is said with file and line.
func TestFileErrors(t *testing.T) {
	for _, tt := range []struct{ name, text, want string }{
		{"unknown key", "rules:\n  - id: a\n    effect: permit\n    wen: true\n", "rules.yaml:4: unknown field \"wen\""},
		{"unknown key of match", "rules:\n  - id: a\n    effect: permit\n    match:\n      tool: [x]\n", "rules.yaml:5: unknown field"},
		{"no yaml", "rules: [\n", "rules.yaml:"},
		{"twice the key", "rules:\n  - id: a\n    id: b\n    effect: permit\n", "rules.yaml:3:"},
		{"a list for a text", "rules:\n  - id: [a]\n    effect: permit\n", "rules.yaml:2:"},
		{"no id", "rules:\n  - effect: permit\n", "rules.yaml:2: id: \"\""},
		{"twice the id", "rules:\n  - {id: a, effect: permit}\n  - {id: a, effect: forbid}\n", "rules.yaml:3: another rule at rules.yaml:2 is called a"},
		{"no effect", "rules:\n  - id: a\n    effect: allow\n", "rules.yaml:3: rule a: effect: \"allow\""},
		{"empty list", "rules:\n  - id: a\n    effect: permit\n    match: {tools: []}\n", "match.tools: is empty"},
		{"bad pattern", "rules:\n  - id: a\n    effect: permit\n    match: {tools: ['**']}\n", "match.tools: \"**\""},
		{"tools and methods", "rules:\n  - id: a\n    effect: permit\n    match: {tools: [x], methods: [y]}\n", "exclude each other"},
		{"misspelt variable", "rules:\n  - id: a\n    effect: forbid\n    when: agent.tenat == 'x'\n", "rules.yaml:4: rule a: when: column 6: undeclared reference"},
		{"wrong type", "rules:\n  - id: a\n    effect: forbid\n    when: session.calls > '8'\n", "rules.yaml:4: rule a: when: column"},
		{"no condition", "rules:\n  - id: a\n    effect: forbid\n    when: agent.id\n", "a condition is true or false, this is string"},
		{"a block's second line", "rules:\n  - id: a\n    effect: forbid\n    match: {tools: [x]}\n    when: |\n      has(args.a) &&\n      args.a > nothing\n", "rules.yaml:7: rule a: when: column 10"},
		{"bad regex", "rules:\n  - id: a\n    effect: forbid\n    when: name.matches('(')\n", "rules.yaml:4: rule a: when"},
		{"nested loops", "rules:\n  - id: a\n    effect: forbid\n    match: {tools: [x]}\n    when: args.all(a, args.all(b, args.all(c, true)))\n", "rules.yaml:5: rule a: when"},
		{"has of no member", "rules:\n  - id: a\n    effect: forbid\n    match: {tools: [x]}\n    when: has(args)\n", "has() takes a member"},
		{"the hidden function", "rules:\n  - id: a\n    effect: forbid\n    when: '@object(name) == name'\n", "rules.yaml:4: rule a: when"},
		{"a clock", "rules:\n  - id: a\n    effect: forbid\n    when: now() > time\n", "undeclared reference to 'now'"},
		{"args of anything", "rules:\n  - id: a\n    effect: forbid\n    when: args.a == 1\n", "needs tools or methods"},
		{"obliged forbid", "rules:\n  - id: a\n    effect: forbid\n    obligations: {tags: [x]}\n", "obligations: a forbid"},
		{"redact no path of a result", "rules:\n  - id: a\n    effect: oblige\n    obligations: {redact_result: [a..b]}\n", "obligations.redact_result: \"a..b\" is no path"},
		{"cap results at nothing", "rules:\n  - id: a\n    effect: oblige\n    obligations: {max_result: 0}\n", "obligations.max_result: 0"},
		{"cap results in words", "rules:\n  - id: a\n    effect: oblige\n    obligations: {max_result: 1kB}\n", "rules.yaml:4"},
		{"a label of two words", "rules:\n  - id: a\n    effect: oblige\n    obligations: {labels: [not trusted]}\n", "obligations.labels"},
		{"a guard that is not configured", "rules:\n  - id: a\n    effect: oblige\n    obligations: {guards: [{name: other}]}\n", "rules.yaml:2: rule a: obligations.guards: no guard is called \"other\""},
		{"a guard of the moon", "rules:\n  - id: a\n    effect: oblige\n    obligations: {guards: [{name: other, on: [moon]}]}\n", "\"moon\" is neither request nor answer"},
		{"a guard of nothing", "rules:\n  - id: a\n    effect: oblige\n    obligations: {guards: [{name: other, on: []}]}\n", "is asked about nothing"},
		{"a guard that may fail perhaps", "rules:\n  - id: a\n    effect: oblige\n    obligations: {guards: [{name: other, failure: perhaps}]}\n", "neither deny nor allow"},
		{"wait of a permit", "rules:\n  - id: a\n    effect: permit\n    wait: 1m\n", "rules.yaml:4: rule a: wait: is for require_approval"},
		{"long wait", "rules:\n  - id: a\n    effect: require_approval\n    wait: 48h\n", "rules.yaml:4: rule a: wait"},
		{"limit of nobody", "rules:\n  - id: a\n    effect: permit\n    obligations: {limit: {calls: 3, per: 1m}}\n", "limit.by"},
		{"limit of nothing", "rules:\n  - id: a\n    effect: permit\n    obligations: {limit: {calls: 0, per: 1m, by: [agent]}}\n", "limit.calls"},
		{"limit forever", "rules:\n  - id: a\n    effect: permit\n    obligations: {limit: {calls: 3, per: 5h, by: [agent]}}\n", "limit.per"},
		{"limit of the moon", "rules:\n  - id: a\n    effect: permit\n    obligations: {limit: {calls: 3, per: 1m, by: [moon]}}\n", "\"moon\""},
		{"two documents", "rules: []\n---\nrules:\n  - {id: a, effect: forbid}\n", "rules.yaml:2: another document"},
		{"an empty one after it", "rules: []\n---\n", "rules.yaml:2: another document"},
		{"a directive", "%YAML 1.2\n---\nrules: []\n", "rules.yaml:2: another document"},
		{"an empty one before it", "---\n---\nrules: []\n", "rules.yaml:1: has no rules"},
		{"empty", "", "rules.yaml:1: has no rules"},
		{"a comment", "# rules\n", "rules.yaml:1: has no rules"},
		{"nothing of it", "{}\n", "rules.yaml:1: has no rules"},
		{"no rules", "rules:\n", "rules.yaml:1: rules: has no value"},
		{"no rule", "rules:\n  - {id: a, effect: permit}\n  -\n", "rules.yaml:3: rules[1]: has no value"},
		{"when of nothing", "rules:\n  - id: a\n    effect: permit\n    when:\n", "rules.yaml:4: rules[0].when: has no value"},
		{"match of nothing", "rules:\n  - id: a\n    effect: permit\n    match:\n    reason: x\n", "rules.yaml:4: rules[0].match: has no value"},
		{"agents of nothing", "rules:\n  - id: a\n    effect: permit\n    match:\n      agents:\n", "rules.yaml:5: rules[0].match.agents: has no value"},
		{"an agent of nothing", "rules:\n  - id: a\n    effect: permit\n    match: {agents: [~]}\n", "rules.yaml:4: rules[0].match.agents[0]: has no value"},
		{"null by its tag", "rules:\n  - id: a\n    effect: permit\n    match: {agents: !!null ''}\n", "rules.yaml:4: rules[0].match.agents: has no value"},
		{"null by an alias", "rules:\n  - id: a\n    effect: permit\n    reason: &x\n    match: *x\n", "rules.yaml:4: rules[0].reason: has no value"},
		{"a limit of nothing", "rules:\n  - id: a\n    effect: permit\n    obligations: {limit: null}\n", "rules.yaml:4: rules[0].obligations.limit: has no value"},
		{"a tag", "rules:\n  - id: a\n    effect: permit\n    match: {tools: !!str x}\n", "rules.yaml:4: has a tag (!!str)"},
		{"a tag of nobody's", "rules:\n  - id: a\n    effect: permit\n    match: !x {tools: [x]}\n", "rules.yaml:4: has a tag (!x)"},
		{"not UTF-8", "rules:\n  - {id: a, effect: permit}\n  - {id: b, effect: forbid, match: {tools: [\"\xff\"]}}\n", "rules.yaml:3: it is not UTF-8"},
		{"a zero", "rules: []\n# \x00\n", "rules.yaml:2: it is not UTF-8, or has a zero"},
		{"the gateway's own", "rules:\n  - {id: 'fronts', effect: permit}\n", "rules.yaml:2: a rule of the gateway's own is called fronts"},
		{"no path", "rules:\n  - id: a\n    effect: oblige\n    obligations: {redact: [a..b]}\n", "obligations.redact"},
	} {
		_, err := tryBundle(File{"rules.yaml", tt.text})
		if err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: %v, want %q", tt.name, err, tt.want)
		}
	}
	_, err := tryBundle(File{"a.yaml", "rules: [{id: a, effect: x}]"}, File{"b.yaml", "rules: [{id: b, effect: y}]"})
	if err == nil || !strings.Contains(err.Error(), "a.yaml:1") || !strings.Contains(err.Error(), "b.yaml:1") {
		t.Errorf("two files: %v", err)
	}
	if _, err := Compile([]byte(`{"version":1,"engine":"another"}`)); err == nil {
		t.Error("another engine's policy")
	}
	for _, text := range []string{"rules: []\n", "---\nrules: []\n...\n", "# none\n---\n# yet\nrules: []\n"} {
		if b, err := tryBundle(File{"empty.yaml", text}); err != nil || b.Decide(with("t", "{}"), Facts{}).Permit {
			t.Errorf("%q: %v", text, err)
		}
	}
}

// TestListsOfAFile: what a list shows is what can be called with some arguments.
func TestListsOfAFile(t *testing.T) {
	b := bundle(t, `
rules:
  - {id: list, effect: permit, match: {methods: [tools/list]}}
  - {id: some, effect: permit, match: {tools: ["read*", write, wipe, odd, pay, kind]}}
  - {id: wipe, effect: forbid, match: {tools: [wipe]}}
  - {id: arg, effect: forbid, match: {tools: [write]}, when: args.path == "/"}
  - {id: by-name, effect: forbid, match: {tools: ["*"]}, when: 'name.endsWith("_secret") || args.path == "x"'}
  - {id: fails, effect: forbid, match: {tools: [odd]}, when: tool.destructive}
  - {id: asks, effect: require_approval, match: {tools: [pay]}}
  - {id: maybe, effect: permit, match: {tools: [maybe]}, when: args.x == 1}
  - {id: never, effect: permit, match: {tools: [never]}, when: 'agent.id == "another" && args.x == 1'}
  - {id: kind, effect: permit, match: {tools: [kind2]}, when: tool.read_only}
`)
	list := call("tools/list", "")
	v := b.Decide(list, Facts{})
	if !v.Permit || !v.Each {
		t.Fatalf("%+v", v)
	}
	for tool, want := range map[string]bool{
		"read": true, "read_secret": false, "read_all": true, "write": true, "wipe": false, "odd": false, "pay": true,
		"maybe": true, "never": false, "kind": true, "kind2": false, "other": false, "": false,
	} {
		if got := b.Shows(list, Facts{}, tool); got != want {
			t.Errorf("shows %q: %t", tool, got)
		}
		if want && !slices.ContainsFunc(v.Only, func(p string) bool { return schemas.Match(p, tool) }) {
			t.Errorf("%q is not among %q", tool, v.Only)
		}
	}
}

// TestCostIsBounded: arguments cannot make a condition take long; it fails first.
func TestCostIsBounded(t *testing.T) {
	b := bundle(t, `
rules:
  - {id: all, effect: permit, match: {tools: ["*"]}}
  - {id: pairs, effect: forbid, match: {tools: [t]}, when: 'args.l.exists(a, args.l.exists(c, a + c == 1))'}
`)
	for n, want := range map[int]string{10: "permit all", 3000: "deny pairs"} {
		v := b.Decide(with("t", `{"l":[`+strings.Repeat("1,", n)+`1]}`), Facts{})
		if outcome(v) != want {
			t.Errorf("%d values: %+v", n, v)
		}
	}
	b = bundle(t, `
rules:
  - {id: all, effect: permit, match: {tools: ["*"]}}
  - {id: split, effect: forbid, match: {tools: [t]}, when: 'args.s.split("").exists(a, args.s.split("").exists(c, a + c == "xy"))'}
`)
	for n, want := range map[int]string{10: "permit all", 3000: "deny split"} {
		if v := b.Decide(with("t", `{"s":"`+strings.Repeat("x", n)+`"}`), Facts{}); outcome(v) != want {
			t.Errorf("%d characters: %+v", n, v)
		}
	}
}

func TestRedact(t *testing.T) {
	e := with("transfer", `{"to":{"iban":"DE1","name":"x"},"items":[{"note":"a"},{"note":{"b":1}},{}],"note":"kept"}`)
	q := e.Data.(*schemas.Requested)
	body, err := redact(q, e.Body, []string{"to.iban", "items.*.note", "absent", "to.name.deeper"})
	if want := `{"to":{"iban":"[redacted]","name":"x"},"items":[{"note":"[redacted]"},{"note":"[redacted]"},{}],"note":"kept"}`; err != nil || !strings.Contains(string(body), want) {
		t.Errorf("%s, %v", body, err)
	}
	body, err = redact(q, e.Body, []string{"to.iban", "to"})
	if want := `{"to":"[redacted]","items"`; err != nil || !strings.Contains(string(body), want) {
		t.Errorf("%s, %v", body, err)
	}
	q.Headers = map[string]string{"Mcp-Param-Iban": "DE1"}
	if body, err := redact(q, e.Body, []string{"to.iban"}); err == nil {
		t.Errorf("the header keeps it: %s", body)
	}
	if _, err := redact(q, []byte("{"), []string{"to.iban"}); err == nil {
		t.Error("what cannot be read is redacted")
	}
	// A server may not care for the case of a name, nor for what the arguments are.
	for _, args := range []string{`{"To":{"iban":"DE1"}}`, `{"to":{"IBAN":"DE1"}}`, `{"to":{},"items":[{"NOTE":"a"}]}`, `["DE1"]`, `"DE1"`, `7`} {
		if body, err := redact(q, with("transfer", args).Body, []string{"to.iban", "items.*.note"}); !errors.Is(err, errRedact) {
			t.Errorf("%s: %s, %v", args, body, err)
		}
	}
	for _, method := range []string{"tools/call", "prompts/get"} {
		e := with("transfer", `{"to":{"iban":"DE1"}}`)
		q := &schemas.Requested{Target: schemas.Target{Method: method}}
		if body, err := redact(q, bytes.Replace(e.Body, []byte(`"arguments"`), []byte(`"Arguments"`), 1), []string{"to.iban"}); !errors.Is(err, errRedact) {
			t.Errorf("%s with Arguments: %s, %v", method, body, err)
		}
	}
	for _, args := range []string{`null`, `{}`, `{"to":null}`, `{"to":"DE1"}`} {
		e := with("transfer", args)
		if body, err := redact(e.Data.(*schemas.Requested), e.Body, []string{"to.iban"}); err != nil || !bytes.Equal(body, e.Body) {
			t.Errorf("%s: %s, %v", args, body, err)
		}
	}
}

// manyRules are 200 rules as a large operator may have them.
func manyRules() string {
	var b strings.Builder
	b.WriteString("rules:\n")
	for i := range 120 {
		fmt.Fprintf(&b, "- {id: p%d, effect: permit, match: {groups: [team%d, payers], servers: [files, s%d], tools: [transfer, 't%d*']}, when: 'has(args.amount) && args.amount < %d'}\n", i, i, i, i, 1000+i)
	}
	for i := range 50 {
		fmt.Fprintf(&b, "- {id: f%d, effect: forbid, match: {servers: [files, s%d], tools: ['*']}, when: '%s'}\n", i, i, []string{
			`has(args.amount) && args.amount > 100000`, `has(args.path) && (args.path.startsWith("/etc") || args.path.contains(".."))`,
			`has(args.to) && has(args.to.country) && args.to.country in ["KP", "IR", "SY"]`, `has(args.items) && args.items.exists(i, i.qty > 1000)`,
			`agent.id == "rogue"`,
		}[i%5])
	}
	for i := range 30 {
		fmt.Fprintf(&b, "- {id: o%d, effect: oblige, match: {agents: ['res*', a%d], tools: [transfer]}, when: 'args.amount > %d', obligations: {tags: [t%d]}}\n", i, i, i, i)
	}
	return b.String()
}

// BenchmarkRules decides by 200 rules with conditions. In "spread" each concerns
// one of 50 servers, as rules do; in "all" every one concerns the call.
func BenchmarkRules(b *testing.B) {
	args := `{"amount":42.5,"to":{"name":"Ann","iban":"DE02120300000000202051","country":"DE"},"path":"/home/ann/report.txt","items":[` +
		strings.Repeat(`{"sku":"A-1000","qty":3,"note":"a note of some length"},`, 9) + `{"sku":"B","qty":1}],"text":"` + strings.Repeat("lorem ipsum ", 20) + `"}`
	e := with("transfer", args)
	spread := strings.NewReplacer("servers: [files, s", "servers: [s").Replace(manyRules())
	spread = strings.Replace(spread, "servers: [s7]", "servers: [files]", 1)
	for i := range 4 {
		spread = strings.Replace(spread, fmt.Sprintf("id: f%d, effect: forbid, match: {servers: [s%d]", i, i), fmt.Sprintf("id: f%d, effect: forbid, match: {servers: [files]", i), 1)
	}
	for name, text := range map[string]string{"spread": spread, "all": manyRules()} {
		b.Run(name, func(b *testing.B) {
			set := bundle(b, text)
			facts := Facts{Groups: []string{"payers", "staff", "eu"}}
			b.ReportAllocs()
			n, before := 0, cpu(b)
			for b.Loop() {
				n++
				if v := set.Decide(e, facts); !v.Permit {
					b.Fatalf("%+v", v)
				}
			}
			b.ReportMetric(float64(cpu(b)-before)/float64(n)/1e3, "cpu-µs/op")
		})
	}
	// What encoding/json takes for the arguments alone, to compare machines by.
	b.Run("json", func(b *testing.B) {
		n, before := 0, cpu(b)
		for b.Loop() {
			n++
			var v map[string]any
			if err := json.Unmarshal([]byte(args), &v); err != nil {
				b.Fatal(err)
			}
		}
		b.ReportMetric(float64(cpu(b)-before)/float64(n)/1e3, "cpu-µs/op")
	})
	encoded, err := Source{Servers: []string{"files"}, Files: []File{{"many.yaml", manyRules()}}}.Encode()
	if err != nil {
		b.Fatal(err)
	}
	b.Run("compile", func(b *testing.B) {
		n, before := 0, cpu(b)
		for b.Loop() {
			n++
			if _, err := Compile(encoded); err != nil {
				b.Fatal(err)
			}
		}
		b.ReportMetric(float64(cpu(b)-before)/float64(n)/1e6, "cpu-ms/op")
	})
}

// cpu is the process's CPU time, which on a machine that is shared says more than
// the clock.
func cpu(b *testing.B) time.Duration {
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		b.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}
