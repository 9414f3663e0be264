package policy

import (
	"bytes"
	"errors"
	"strings"
	"testing"
	"testing/synctest"

	"waybill.dev/schemas"
)

// again says what of a stored decision is not as it is made again, "" for nothing.
func again(b *Bundle, request, was schemas.Event) string {
	made, err := b.Again(request, was)
	if err != nil {
		return err.Error()
	}
	made.Time = was.Time
	x, err1 := was.MarshalString()
	y, err2 := made.MarshalString()
	if err := errors.Join(err1, err2); err != nil {
		return err.Error()
	}
	if x != y {
		return "recorded " + x + "\nmade     " + y
	}
	if string(was.Body) != string(made.Body) {
		return "recorded " + string(was.Body) + "\nmade     " + string(made.Body)
	}
	return ""
}

// remake makes every decision that a test stores again, from its request.
func (d *desk) remake(e schemas.Event) {
	switch e.Data.(type) {
	case *schemas.Authorized, *schemas.Denied, *schemas.Held:
	default:
		return
	}
	for _, request := range d.events {
		if request.Call != e.Call || request.Kind() != schemas.KindRequested {
			continue
		}
		if what := again(d.p.Bundle(), request, e); what != "" {
			d.t.Errorf("%s is not made again: %s", e.ID(), what)
		}
	}
}

// Whatever is decided is made again from what is recorded of it.
func TestAgain(t *testing.T) {
	rules := `
rules:
  - {id: all, effect: permit, match: {tools: ["*"]}}
  - {id: never, effect: forbid, match: {tools: ["*"]}, when: args.n == 0, reason: not this}
  - {id: ask, effect: require_approval, match: {tools: ["*"]}, when: args.n == 1, wait: 5m}
  - {id: some, effect: oblige, match: {tools: ["*"]}, obligations: {redact: [secret], tags: [money], deadline: 10s, limit: {calls: 5, per: 1m, by: [agent]}}}
`
	synctest.Test(t, func(t *testing.T) {
		d := newDesk(t, rules)
		d.p.o.Defined = func(_ *schemas.Requested, args []byte) Defined {
			switch {
			case bytes.Contains(args, []byte("quarantined")):
				return Defined{SHA256: "ab", Refused: "it has changed"}
			case bytes.Contains(args, []byte("misfit")):
				return Defined{SHA256: "ab", Arguments: "misfit: not a member"}
			}
			return Defined{SHA256: "ab"}
		}
		hand := func(call schemas.CallID, args string) schemas.Event {
			e := d.request(call, args)
			if err := d.p.Handle(t.Context(), e, d.store); err != nil {
				t.Fatal(err)
			}
			return e
		}
		hand("c0", `{"n":0}`)
		request := hand("c1", `{"n":1}`)
		hand("c2", `{"n":2,"secret":"s"}`)
		hand("c3", `{"n":3,"pad":"`+strings.Repeat("long ", 2000)+`"}`)
		hand("c4", `"no object"`)
		for _, call := range []schemas.CallID{"c5", "c6", "c7", "c8"} {
			hand(call, `{"n":9}`) // the last is over the limit
		}
		hand("c9", `{"n":9,"quarantined":1}`)
		hand("c10", `{"n":9,"misfit":1}`)
		held := d.events[len(d.events)-1]
		for _, e := range d.events {
			if e.Call == "c1" && e.Kind() == schemas.KindHeld {
				held = e
			}
		}
		d.say(d.id("c1"), Word{Said: ApprovalRefused, By: "ann"})
		d.p.resumeAll(t.Context())

		kinds, requests := map[schemas.Kind]int{}, map[schemas.CallID]schemas.Event{}
		for _, e := range d.events {
			kinds[e.Kind()]++
			if e.Kind() == schemas.KindRequested {
				requests[e.Call] = e
				continue
			}
			if what := again(d.p.Bundle(), requests[e.Call], e); what != "" {
				t.Errorf("%s: %s", e.ID(), what)
			}
		}
		if kinds[schemas.KindDenied] < 6 || kinds[schemas.KindHeld] != 1 || kinds[schemas.KindAuthorized] < 3 {
			t.Errorf("decided: %v", kinds)
		}

		// What is not as it was decided is not made again.
		h := *held.Data.(*schemas.Held)
		h.Rule = "all"
		other := held
		other.Data = &h
		if what := again(d.p.Bundle(), request, other); !strings.Contains(what, `"rule":"ask"`) {
			t.Errorf("another rule: %q", what)
		}
		if _, err := d.p.Bundle().Again(request, d.events[0]); !errors.Is(err, ErrNoDecision) {
			t.Errorf("of another call: %v", err)
		}
	})
}
