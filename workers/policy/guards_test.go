package policy

import (
	"context"
	"errors"
	"maps"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"waybill.dev/schemas"
)

const guarded = `
rules:
  - {id: all, effect: permit, match: {tools: ["*"]}}
  - {id: lists, effect: permit, match: {methods: [tools/list]}}
  - id: watched
    effect: oblige
    match: {tools: [pay]}
    obligations:
      redact: [iban]
      redact_result: [structuredContent.iban]
      max_result: 1000
      labels: [untrusted]
      guards: [{name: shield}]
  - id: lit
    effect: oblige
    match: {tools: [pay, look]}
    obligations: {max_result: 500, guards: [{name: lamp, on: [request], failure: allow}]}
  - {id: none, effect: forbid, match: {tools: [never]}}
  - id: careful
    effect: forbid
    match: {tools: [write]}
    when: '"untrusted" in session.labels'
`

// guardDesk is a policy that asks guards, and what was stored.
type guardDesk struct {
	*Policy
	says  map[string]schemas.Check
	asked []string // guard and body
	t     *testing.T
}

func newGuardDesk(t *testing.T, says map[string]schemas.Check) *guardDesk {
	d := &guardDesk{says: says, t: t}
	o := Options{Bundle: bundle(t, guarded), Past: nothing, Duplicates: time.Minute, Now: func() time.Time { return call("", "").Stored }}
	o.Session = func(context.Context, schemas.Event) (*SessionFacts, error) { return &SessionFacts{}, nil }
	if says != nil {
		o.Guard = func(_ context.Context, name string, e schemas.Event, said []byte) schemas.Check {
			if e.Kind() != schemas.KindRequested {
				t.Errorf("asked with %s", e.Kind())
			}
			d.asked = append(d.asked, name+" "+string(said))
			c := d.says[name]
			c.Guard = name
			return c
		}
	}
	p, err := New(o)
	if err != nil {
		t.Fatal(err)
	}
	d.Policy = p
	return d
}

// decision decides on a call and returns what is stored.
func (d *guardDesk) decision(e schemas.Event) schemas.Event {
	d.t.Helper()
	var stored []schemas.Event
	if err := d.Handle(d.t.Context(), e, func(_ context.Context, e schemas.Event) (schemas.Receipt, error) {
		stored = append(stored, e)
		return schemas.Receipt{Seq: 8}, nil
	}); err != nil {
		d.t.Fatal(err)
	}
	if len(stored) != 1 {
		d.t.Fatalf("%d events", len(stored))
	}
	return stored[0]
}

func word(e schemas.Event) schemas.Decision {
	switch p := e.Data.(type) {
	case *schemas.Authorized:
		return p.Decision
	case *schemas.Denied:
		return p.Decision
	}
	return schemas.Decision{}
}

// What guards say decides, is recorded, and is enough to decide again without them.
func TestGuards(t *testing.T) {
	allow := schemas.Check{Said: schemas.CheckAllow, Millis: 3}
	deny := schemas.Check{Said: schemas.CheckDeny, Reason: "no such in time: 5 ms: of a day", Millis: 12}
	failed := schemas.Check{Said: schemas.CheckFailed, Reason: "no answer within 2s", Millis: 2000}
	for _, c := range []struct {
		name, tool string
		says       map[string]schemas.Check
		kind       schemas.Kind
		rule       string
		reason     string
		asked      string
	}{
		{"both allow", "pay", map[string]schemas.Check{"shield": allow, "lamp": allow}, schemas.KindAuthorized, "all", "", "lamp shield"},
		{"one denies", "pay", map[string]schemas.Check{"shield": deny, "lamp": allow}, schemas.KindDenied, "watched", "guard shield says no: no such in time: 5 ms: of a day", "lamp shield"},
		{"the first denies", "pay", map[string]schemas.Check{"shield": allow, "lamp": deny}, schemas.KindDenied, "lit", "guard lamp says no", "lamp"},
		{"one fails", "pay", map[string]schemas.Check{"shield": failed, "lamp": allow}, schemas.KindDenied, "watched", "guard shield has failed: no answer within 2s", "lamp shield"},
		{"one that may fails", "pay", map[string]schemas.Check{"shield": allow, "lamp": failed}, schemas.KindAuthorized, "all", "", "lamp shield"},
		{"says nothing known", "look", map[string]schemas.Check{"lamp": {Said: "perhaps"}}, schemas.KindDenied, "lit", "guard lamp has failed", "lamp"},
		{"nobody can ask", "pay", nil, schemas.KindDenied, "watched", "guard shield has failed: nobody can ask it", ""},
		{"no guard concerns it", "read", map[string]schemas.Check{}, schemas.KindAuthorized, "all", "", ""},
		{"forbidden anyway", "never", map[string]schemas.Check{}, schemas.KindDenied, "none", "", ""},
		{"a long reason", "look", map[string]schemas.Check{"lamp": {Said: schemas.CheckDeny, Reason: strings.Repeat("é", 500)}}, schemas.KindDenied, "lit", "guard lamp says no: éé", "lamp"},
	} {
		t.Run(c.name, func(t *testing.T) {
			d := newGuardDesk(t, c.says)
			e := with(c.tool, `{"iban":"DE1"}`)
			got := d.decision(e)
			w := word(got)
			if got.Kind() != c.kind || w.Rule != c.rule || !strings.HasPrefix(w.Reason, c.reason) {
				t.Errorf("%s by %q: %q", got.Kind(), w.Rule, w.Reason)
			}
			var asked []string
			for _, a := range d.asked {
				name, body, _ := strings.Cut(a, " ")
				asked = append(asked, name)
				if c.tool == "pay" && strings.Contains(body, "DE1") {
					t.Errorf("%s sees what is to be redacted: %s", name, body)
				}
			}
			if strings.Join(asked, " ") != c.asked {
				t.Errorf("asked %q, want %q", asked, c.asked)
			}
			facts, err := FactsOf(w.Facts)
			if err != nil {
				t.Fatal(err)
			}
			for name := range facts.Guards {
				if !slices.Contains([]string{"lamp", "shield"}, name) {
					t.Errorf("facts %v", w.Facts)
				}
			}
			v := d.Bundle().Decide(e, facts)
			if differs := v.Differs(got.Data); differs != "" || v.Reason != w.Reason {
				t.Errorf("decided again: %s, %q for %q", differs, v.Reason, w.Reason)
			}
		})
	}
}

// A decision without the word of a guard is none.
func TestGuardNotAsked(t *testing.T) {
	v := bundle(t, guarded).Decide(with("pay", "{}"), Facts{})
	if v.Permit || v.Hold || !slices.Equal(v.Ask, []string{"lamp", "shield"}) {
		t.Errorf("%+v", v)
	}
}

// What is stopped in the middle of asking decides nothing.
func TestGuardStopped(t *testing.T) {
	d := newGuardDesk(t, map[string]schemas.Check{})
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	err := d.Handle(ctx, with("pay", "{}"), func(context.Context, schemas.Event) (schemas.Receipt, error) {
		t.Error("stored")
		return schemas.Receipt{}, nil
	})
	if !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
}

// What rules order for answers goes to who dispatches, the strictest of several.
func TestOrders(t *testing.T) {
	allow := schemas.Check{Said: schemas.CheckAllow}
	d := newGuardDesk(t, map[string]schemas.Check{"lamp": allow, "shield": allow})
	a := d.decision(with("pay", "{}")).Data.(*schemas.Authorized)
	want := schemas.Orders{
		RedactResult: []string{"structuredContent.iban"}, MaxResult: 500, Labels: []string{"untrusted"},
		Guards: []schemas.GuardOrder{{Guard: "shield"}},
	}
	if !reflect.DeepEqual(a.Orders, want) {
		t.Errorf("%+v, want %+v", a.Orders, want)
	}
	if want := []string{
		"redact iban", "redact_result structuredContent.iban", "max_result 500", "label untrusted",
		"guard lamp on the request, which may fail", "guard shield on the request and on the answer",
	}; !slices.Equal(a.Obligations, want) {
		t.Errorf("%q", a.Obligations)
	}
	once := together([]Guard{{Name: "b", Request: true, Open: true}, {Name: "a", Answer: true, Open: true}, {Name: "b", Answer: true}, {Name: "a", Answer: true, Open: true}})
	if want := []Guard{{Name: "a", Answer: true, Open: true}, {Name: "b", Request: true, Answer: true}}; !slices.Equal(once, want) {
		t.Errorf("%+v", once)
	}
}

// Labels of what the session has seen are facts.
func TestLabels(t *testing.T) {
	d := newGuardDesk(t, nil)
	for _, labels := range [][]string{nil, {"other"}, {"other", "untrusted"}} {
		d.o.Session = func(context.Context, schemas.Event) (*SessionFacts, error) {
			return &SessionFacts{Calls: 1, Tools: []string{"files/read"}, Labels: labels}, nil
		}
		e := with("write", "{}")
		got := d.decision(e)
		if bad := slices.Contains(labels, "untrusted"); (got.Kind() == schemas.KindDenied) != bad {
			t.Errorf("%q: %s", labels, got.Kind())
		}
		facts, err := FactsOf(word(got).Facts)
		if err != nil || facts.Session == nil || !slices.Equal(facts.Session.Labels, labels) {
			t.Errorf("%v: %+v of %v", err, facts.Session, word(got).Facts)
		}
		if v := d.Bundle().Decide(e, facts); v.Differs(got.Data) != "" {
			t.Error(v.Differs(got.Data))
		}
	}
}

// Who decides again under other rules labels the session as these would.
func TestLabelsDecidedAgain(t *testing.T) {
	r := NewRerun(bundle(t, guarded), true, time.Time{})
	r.Opened(schemas.Event{Tenant: "acme", Session: "s1", Data: &schemas.Opened{}})
	allow := map[string]schemas.Check{"lamp": {Said: schemas.CheckAllow}, "shield": {Said: schemas.CheckAllow}}
	for i, want := range []string{"permit", "permit", "deny"} {
		e := with([]string{"write", "pay", "write"}[i], "{}")
		v, missing := r.Decide(e, Decided{N: 1, Facts: Facts{Guards: allow}, At: e.Stored})
		if missing != nil || v.Outcome() != want {
			t.Errorf("%d: %s by %q, %q, missing %q", i, v.Outcome(), v.Rule, v.Reason, missing)
		}
	}
}

// A fact that is no guard's word is an error, and not a yes.
func TestGuardFacts(t *testing.T) {
	for _, text := range []string{"", "allow", "allow in 3", "allow in x ms: ", "in 3 ms: "} {
		if f, err := FactsOf(map[string]string{"guard shield": text}); err == nil && f.Guards["shield"].Said == schemas.CheckAllow {
			t.Errorf("%q is taken for %+v", text, f.Guards)
		}
	}
	f := Facts{Guards: map[string]schemas.Check{"a": {Guard: "a", Said: "allow", Millis: 3}, "b": {Guard: "b", Said: "deny", Reason: "x in 5 ms: y", Millis: 0}}}
	back, err := FactsOf(f.Record())
	if err != nil || !maps.Equal(back.Guards, f.Guards) {
		t.Errorf("%v: %+v", err, back.Guards)
	}
}
