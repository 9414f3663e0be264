package policy

import (
	"errors"
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

// call is a request of researcher (tenant acme) to server files.
func call(method, name string) schemas.Event {
	at := time.Date(2026, 7, 28, 12, 0, 0, 0, time.UTC)
	return schemas.Event{
		Tenant: "acme", Session: "s1", Call: "c1", Root: "c1", Agent: "researcher", Edge: "e1",
		Trace: "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
		Time:  at, Stored: at, Seq: 7,
		Data: &schemas.Requested{
			Target:   schemas.Target{Protocol: "mcp", Server: "files", Method: method, Name: name},
			Revision: "2026-07-28", Deadline: at.Add(time.Minute),
		},
		Body: []byte(`{"jsonrpc":"2.0"}`),
	}
}

// newPolicy is a policy over the servers files and mail with nothing in the
// past.
func newPolicy(t testing.TB, rules ...Rule) *Policy {
	t.Helper()
	b, err := NewBundle(rules, []string{"files", "mail"})
	if err != nil {
		t.Fatal(err)
	}
	p, err := New(Options{Bundle: b, Past: nothing, Duplicates: time.Minute})
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func compile(t testing.TB, allows ...Allow) []Rule {
	t.Helper()
	var rules []Rule
	for i, a := range allows {
		if a.ID == "" {
			a.ID = fmt.Sprintf("allow[%d]", i)
		}
		r, err := a.Rule()
		if err != nil {
			t.Fatal(err)
		}
		rules = append(rules, r)
	}
	return rules
}

// fixed is a rule that always says the same.
func fixed(id string, effect Effect, m Match, err error) Rule {
	return Rule{ID: id, Effect: effect, Match: func(*Input) (Match, error) { return m, err }}
}

func panics(id string, effect Effect) Rule {
	return Rule{ID: id, Effect: effect, Match: func(*Input) (Match, error) {
		var none *schemas.Requested
		_ = none.Server // a nil pointer, as a bug would have it
		return Match{Applies: true}, nil
	}}
}

// TestCombine: rules that say no, fail or panic against one that says yes.
func TestCombine(t *testing.T) {
	yes := fixed("yes", Permit, Match{Applies: true}, nil)
	also := fixed("also", Permit, Match{Applies: true}, nil)
	silent := fixed("silent", Permit, Match{}, nil)
	no := fixed("no", Forbid, Match{Applies: true}, nil)
	idle := fixed("idle", Forbid, Match{}, nil)
	broken := errors.New("no such field")
	// What a failing rule returns beside its error counts for nothing.
	badYes := fixed("bad-yes", Permit, Match{Applies: true, Tools: []string{"*"}}, broken)
	badNo := fixed("bad-no", Forbid, Match{}, broken)

	tests := []struct {
		name   string
		rules  []Rule
		permit bool
		rule   string
		reason string // a part of it
		faults int
	}{
		{"no rules", nil, false, "", "no rule permits", 0},
		{"nobody speaks", []Rule{silent, idle}, false, "", "no rule permits", 0},
		{"one permits", []Rule{silent, yes}, true, "yes", "", 0},
		{"two permit, the first is named", []Rule{also, yes}, true, "also", "", 0},
		{"forbid alone", []Rule{no}, false, "no", "forbids", 0},
		{"forbid after permit", []Rule{yes, no}, false, "no", "forbids", 0},
		{"forbid before permit", []Rule{no, yes}, false, "no", "forbids", 0},
		{"forbid that does not apply", []Rule{idle, yes}, true, "yes", "", 0},
		{"permit fails", []Rule{badYes}, false, "", "bad-yes failed: no such field", 1},
		{"permit fails, another permits", []Rule{badYes, yes}, true, "yes", "", 1},
		{"forbid fails", []Rule{yes, badNo}, false, "bad-no", "since it failed: no such field", 1},
		{"permit panics", []Rule{panics("p", Permit)}, false, "", "p failed: the rule panicked", 1},
		{"permit panics, another permits", []Rule{panics("p", Permit), yes}, true, "yes", "", 1},
		{"forbid panics", []Rule{yes, panics("p", Forbid)}, false, "p", "since it failed: the rule panicked", 1},
	}
	for _, tt := range tests {
		v := newPolicy(t, tt.rules...).Decide(call("tools/call", "read"))
		if v.Permit != tt.permit || v.Rule != tt.rule || len(v.Faults) != tt.faults || !strings.Contains(v.Reason, tt.reason) {
			t.Errorf("%s: %+v", tt.name, v)
		}
		if strings.Contains(v.Reason, "pointer") {
			t.Errorf("%s: what a rule panicked with is in the decision: %q", tt.name, v.Reason)
		}
		if v.Permit != (v.Reason == "") {
			t.Errorf("%s: permit %t with reason %q", tt.name, v.Permit, v.Reason)
		}
	}
}

func TestFaultReasonIsShort(t *testing.T) {
	long := errors.New(strings.Repeat("é\xff", 1000))
	v := newPolicy(t, fixed("long", Forbid, Match{}, long)).Decide(call("tools/call", "read"))
	if len(v.Reason) > 1000 || strings.Contains(v.Reason, "\xff") {
		t.Errorf("reason of %d bytes: %q", len(v.Reason), v.Reason)
	}
}

// TestDecideRefuses: what no rule can permit.
func TestDecideRefuses(t *testing.T) {
	p := newPolicy(t, fixed("yes", Permit, Match{Applies: true, Tools: []string{"*"}}, nil))
	if v := p.Decide(call("tools/call", "read")); !v.Permit {
		t.Fatalf("the unchanged call: %+v", v)
	}
	for name, spoil := range map[string]func(*schemas.Event, *schemas.Requested){
		"no payload":        func(e *schemas.Event, _ *schemas.Requested) { e.Data = nil },
		"a nil payload":     func(e *schemas.Event, _ *schemas.Requested) { e.Data = (*schemas.Requested)(nil) },
		"another kind":      func(e *schemas.Event, q *schemas.Requested) { e.Data = &schemas.Authorized{Requested: *q} },
		"no protocol":       func(_ *schemas.Event, q *schemas.Requested) { q.Protocol = "" },
		"unknown protocol":  func(_ *schemas.Event, q *schemas.Requested) { q.Protocol = "smtp" },
		"protocol in caps":  func(_ *schemas.Event, q *schemas.Requested) { q.Protocol = "MCP" },
		"no server":         func(_ *schemas.Event, q *schemas.Requested) { q.Server = "" },
		"unknown server":    func(_ *schemas.Event, q *schemas.Requested) { q.Server = "payroll" },
		"server in caps":    func(_ *schemas.Event, q *schemas.Requested) { q.Server = "Files" },
		"a server's prefix": func(_ *schemas.Event, q *schemas.Requested) { q.Server = "file" },
		"no method":         func(_ *schemas.Event, q *schemas.Requested) { q.Method = "" },
		"name in caps": func(e *schemas.Event, q *schemas.Requested) {
			q.Name, e.Body = "", []byte(`{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{"Name":"read"}}`)
		},
		"a prompt's": func(e *schemas.Event, q *schemas.Requested) {
			q.Method, q.Name, e.Body = "prompts/get", "", []byte(`{"jsonrpc":"2.0","id":1,"method":"prompts/get","params":{"\u004eame":"p"}}`)
		},
		"a resource's": func(e *schemas.Event, q *schemas.Requested) {
			q.Method, q.Name, e.Body = "resources/read", "", []byte(`{"jsonrpc":"2.0","id":1,"method":"resources/read","params":{"URI":"file:///etc"}}`)
		},
	} {
		e := call("tools/call", "read")
		spoil(&e, e.Data.(*schemas.Requested))
		if v := p.Decide(e); v.Permit || v.Reason == "" {
			t.Errorf("%s: %+v", name, v)
		}
	}
	// An empty name in the list does not make the empty server known.
	b, err := NewBundle([]Rule{fixed("yes", Permit, Match{Applies: true}, nil)}, []string{""})
	if err != nil {
		t.Fatal(err)
	}
	e := call("tools/call", "read")
	e.Data.(*schemas.Requested).Server = ""
	if b.Decide(e, Facts{}).Permit {
		t.Error("the empty server is known")
	}
}

func TestNew(t *testing.T) {
	for name, o := range map[string]Options{"no past": {Duplicates: time.Minute}, "no window": {Past: nothing}} {
		if _, err := New(o); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
	ok := fixed("a", Permit, Match{}, nil)
	for name, rules := range map[string][]Rule{
		"no id":        {fixed("", Permit, Match{}, nil)},
		"same id":      {ok, ok},
		"no match":     {{ID: "a", Effect: Permit}},
		"no effect":    {fixed("a", 0, Match{}, nil)},
		"other effect": {fixed("a", 9, Match{}, nil)},
	} {
		if _, err := NewBundle(rules, nil); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
}

// Drawn names and patterns use few letters, so that many of them meet.
var (
	drawName    = rapid.StringOfN(rapid.RuneFrom([]rune("ab*")), 1, 4, -1)
	drawPattern = rapid.Custom(func(t *rapid.T) string {
		return rapid.StringOfN(rapid.RuneFrom([]rune("ab*")), 1, 4, -1).
			Filter(func(s string) bool { return checkPattern(s) == nil }).Draw(t, "pattern")
	})
	drawMethod = rapid.SampledFrom([]string{
		"tools/list", "tools/call", "prompts/get", "server/discover", "ping", "x/new", "Tools/call",
	})
	drawAllow = rapid.Custom(func(t *rapid.T) Allow {
		some := func(label string, g *rapid.Generator[string], least int) []string {
			return rapid.SliceOfN(g, least, 3).Draw(t, label)
		}
		a := Allow{
			Tenants: some("tenants", rapid.SampledFrom([]string{"acme", "*", "other"}), 0),
			Agents:  some("agents", rapid.SampledFrom([]string{"*", "researcher", "res*", "writer"}), 1),
			Servers: some("servers", rapid.SampledFrom([]string{"*", "files", "mail", "f*"}), 1),
			Tools:   some("tools", drawPattern, 0),
		}
		least := 0
		if len(a.Tools) == 0 {
			least = 1
		}
		a.Methods = some("methods", rapid.OneOf(drawMethod, rapid.SampledFrom([]string{"*", "tools/*", "prompts/*"})), least)
		return a
	})
	drawAllows = rapid.SliceOfN(drawAllow, 0, 6)
)

func drawCall(t *rapid.T, method string) schemas.Event {
	e := call(method, rapid.OneOf(rapid.Just(""), drawName).Draw(t, "name"))
	e.Tenant = schemas.Tenant(rapid.SampledFrom([]string{"acme", "other"}).Draw(t, "tenant"))
	e.Agent = schemas.Agent(rapid.SampledFrom([]string{"researcher", "writer", "guest"}).Draw(t, "agent"))
	e.Data.(*schemas.Requested).Server = rapid.SampledFrom([]string{"files", "mail", "payroll"}).Draw(t, "server")
	return e
}

// TestSameInSameOut: neither repeating a decision nor the order of the rules
// changes it, and deciding changes neither event nor rules.
func TestSameInSameOut(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		rules := compile(t, drawAllows.Draw(rt, "allow")...)
		if rapid.Bool().Draw(rt, "fault") {
			rules = append(rules, fixed("bad", Permit, Match{}, errors.New("bad")))
		}
		if rapid.IntRange(0, 3).Draw(rt, "forbid") == 0 {
			rules = append(rules, fixed("no", Forbid, Match{Applies: true}, nil))
		}
		e := drawCall(rt, drawMethod.Draw(rt, "method"))
		before, err := e.MarshalJSON()
		if err != nil {
			rt.Fatal(err)
		}
		p := newPolicy(t, rules...)
		v := p.Decide(e)
		if again := p.Decide(e); !reflect.DeepEqual(v, again) {
			rt.Fatalf("first %+v, then %+v", v, again)
		}
		if after, _ := e.MarshalJSON(); string(after) != string(before) {
			rt.Fatalf("the event changed from %s to %s", before, after)
		}
		shuffled := slices.Clone(rules)
		seed := rapid.Uint64().Draw(rt, "seed")
		rand.New(rand.NewPCG(seed, 0)).Shuffle(len(shuffled), func(i, j int) {
			shuffled[i], shuffled[j] = shuffled[j], shuffled[i]
		})
		s := newPolicy(t, shuffled...).Decide(e)
		if s.Permit != v.Permit || !reflect.DeepEqual(s.Only, v.Only) || s.Reason != v.Reason {
			rt.Fatalf("in order %+v, shuffled %+v", v, s)
		}
	})
}

// TestDefaultDeny: a permit has a rule, and that rule alone permits it too;
// a denial has none that would.
func TestDefaultDeny(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		rules := compile(t, drawAllows.Draw(rt, "allow")...)
		e := drawCall(rt, drawMethod.Draw(rt, "method"))
		v := newPolicy(t, rules...).Decide(e)
		var first string
		for _, r := range rules {
			if newPolicy(t, r).Decide(e).Permit {
				first = r.ID
				break
			}
		}
		if v.Permit != (first != "") || v.Rule != first {
			rt.Fatalf("decided %+v; the first rule that permits it alone is %q", v, first)
		}
	})
}

// TestListedIsCallable: what a permitted list may show is exactly what a call
// by that name is permitted.
func TestListedIsCallable(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		p := newPolicy(t, compile(t, drawAllows.Draw(rt, "allow")...)...)
		list := drawCall(rt, "tools/list")
		v := p.Decide(list)
		if !v.Permit {
			if v.Only != nil {
				rt.Fatalf("denied, and yet %+v", v)
			}
			return
		}
		if !slices.IsSorted(v.Only) || len(slices.Compact(slices.Clone(v.Only))) != len(v.Only) {
			rt.Fatalf("not sorted or not unique: %q", v.Only)
		}
		for range 20 {
			name := rapid.OneOf(drawName, rapid.Just("")).Draw(rt, "tool")
			e := list
			q := *list.Data.(*schemas.Requested)
			q.Method, q.Name = "tools/call", name
			e.Data = &q
			listed := v.Only == nil || slices.ContainsFunc(v.Only, func(p string) bool { return schemas.Match(p, name) })
			if callable := p.Decide(e).Permit; listed != callable {
				rt.Fatalf("tool %q of Only %q: listed %t, callable %t", name, v.Only, listed, callable)
			}
		}
	})
}

// BenchmarkDecide has 200 rules of which the last but one permits the call.
func BenchmarkDecide(b *testing.B) {
	var allows []Allow
	for i := range 200 {
		allows = append(allows, Allow{
			Agents:  []string{fmt.Sprintf("agent-%d", i), fmt.Sprintf("team-%d-*", i)},
			Servers: []string{fmt.Sprintf("server-%d", i), "files"},
			Tools:   []string{"read", "list_*", fmt.Sprintf("tool_%d", i)},
			Methods: []string{"tools/list", "server/discover"},
		})
	}
	all := slices.Clone(allows)
	for i := range all {
		all[i].Agents, all[i].Tools = []string{"*"}, []string{"write", "delete_*", fmt.Sprintf("tool_%d", i)}
	}
	allows[198].Agents = []string{"researcher"}
	for _, bb := range []struct {
		name   string
		allows []Allow
		e      schemas.Event
		permit bool
	}{
		{"call", allows, call("tools/call", "list_all"), true},
		{"list", allows, call("tools/list", ""), true},
		{"deny", allows, call("tools/call", "drop"), false},
		{"deny, every rule of the agent's", all, call("tools/call", "drop"), false},
		{"list, every rule of the agent's", all, call("tools/list", ""), true},
	} {
		b.Run(bb.name, func(b *testing.B) {
			p := newPolicy(b, compile(b, bb.allows...)...)
			b.ReportAllocs()
			for b.Loop() {
				if p.Decide(bb.e).Permit != bb.permit {
					b.Fatal("the other way round")
				}
			}
		})
	}
}
