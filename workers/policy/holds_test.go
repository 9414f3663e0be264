package policy

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"waybill.dev/schemas"
)

// desk is a policy with a log, and records of the system, in memory.
type desk struct {
	t *testing.T
	p *Policy

	mu     sync.Mutex
	events []schemas.Event
	last   map[string]uint64 // sequence of the newest use
	seq    uint64
	claim  func(stored bool) error // fails a claim, before or after it is stored
}

const holding = `
rules:
  - {id: all, effect: permit, match: {tools: ["*"]}}
  - {id: ask, effect: require_approval, match: {tools: [pay]}, wait: 5m}
`

func newDesk(t *testing.T, rules string) *desk {
	d := &desk{t: t, last: map[string]uint64{}}
	p, err := New(Options{
		Bundle: bundle(t, rules), Duplicates: 2 * time.Minute,
		Past: func(_ context.Context, e schemas.Event) (past []schemas.Event, err error) {
			d.mu.Lock()
			defer d.mu.Unlock()
			for _, p := range d.events {
				if p.Call == e.Call {
					past = append(past, p)
				}
			}
			return past, nil
		},
		Load: func(_ context.Context, seq uint64) (schemas.Event, error) {
			d.mu.Lock()
			defer d.mu.Unlock()
			if seq == 0 || seq > uint64(len(d.events)) {
				return schemas.Event{}, schemas.ErrNotFound
			}
			return d.events[seq-1], nil
		},
		Store: d.store, Claim: d.use,
	})
	if err != nil {
		t.Fatal(err)
	}
	d.p = p
	return d
}

func (d *desk) store(_ context.Context, e schemas.Event) (schemas.Receipt, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if err := e.Check(); err != nil {
		return schemas.Receipt{}, err
	}
	for _, p := range d.events {
		if p.ID() == e.ID() {
			return schemas.Receipt{Seq: p.Seq, Duplicate: true}, nil
		}
	}
	e.Seq, e.Stored = uint64(len(d.events)+1), time.Now()
	d.remake(e)
	d.events = append(d.events, e)
	return schemas.Receipt{Seq: e.Seq}, nil
}

func (d *desk) use(_ context.Context, id string, use []byte, last uint64) (uint64, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.claim != nil {
		if err := d.claim(false); err != nil {
			return 0, err
		}
	}
	if d.last[id] != last {
		return 0, errors.New("overtaken")
	}
	d.seq++
	d.last[id] = d.seq
	seq := d.seq
	if d.claim != nil {
		if err := d.claim(true); err != nil {
			go d.p.Record(UseKind, id, seq, use) // the watch brings it
			return 0, err
		}
	}
	return seq, nil
}

// request asks for a payment.
func (d *desk) request(call schemas.CallID, args string) schemas.Event {
	e := with("pay", args)
	e.Call, e.Root = call, call
	q := *e.Data.(*schemas.Requested)
	q.Deadline = time.Now().Add(time.Minute)
	e.Data, e.Stored = &q, time.Now()
	r, err := d.store(d.t.Context(), e)
	if err != nil {
		d.t.Fatal(err)
	}
	e.Seq = r.Seq
	return e
}

func (d *desk) say(id string, w Word) {
	d.mu.Lock()
	d.seq++
	seq := d.seq
	d.mu.Unlock()
	if w.Expires.IsZero() {
		w.Expires = time.Now().Add(10 * time.Minute)
	}
	body, err := json.Marshal(w)
	if err != nil {
		d.t.Fatal(err)
	}
	if err := d.p.Record(WordKind, id, seq, body); err != nil {
		d.t.Fatal(err)
	}
}

// of is what was decided of a call: kinds and numbers, in order.
func (d *desk) of(call schemas.CallID) string {
	d.mu.Lock()
	defer d.mu.Unlock()
	var all []string
	for _, e := range d.events {
		if e.Call != call {
			continue
		}
		switch p := e.Data.(type) {
		case *schemas.Held:
			all = append(all, fmt.Sprintf("held %d", p.N))
		case *schemas.Authorized:
			all = append(all, fmt.Sprintf("authorized %d", p.N))
		case *schemas.Denied:
			all = append(all, fmt.Sprintf("denied %d", p.N))
		}
	}
	return strings.Join(all, ", ")
}

func (d *desk) id(call schemas.CallID) string {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, e := range d.events {
		if h, ok := e.Data.(*schemas.Held); ok && e.Call == call {
			return h.Approval
		}
	}
	d.t.Fatalf("call %s is not held", call)
	return ""
}

func TestHolds(t *testing.T) {
	grant := Word{Said: ApprovalGranted, By: "ann", Uses: 1}
	for _, tt := range []struct {
		name string
		do   func(d *desk)
		want map[schemas.CallID]string
	}{
		{"granted", func(d *desk) { d.say(d.id("c1"), grant) }, map[schemas.CallID]string{"c1": "held 1, authorized 2"}},
		{"refused", func(d *desk) { d.say(d.id("c1"), Word{Said: ApprovalRefused, By: "ann"}) }, map[schemas.CallID]string{"c1": "held 1, denied 2"}},
		{"silence", func(d *desk) { time.Sleep(6 * time.Minute) }, map[schemas.CallID]string{"c1": "held 1, denied 2"}},
		{"not yet", func(d *desk) { time.Sleep(4 * time.Minute) }, map[schemas.CallID]string{"c1": "held 1"}},
		{"by who asks", func(d *desk) {
			w := grant
			w.By = "researcher"
			d.say(d.id("c1"), w)
		}, map[schemas.CallID]string{"c1": "held 1"}},
		{"by nobody", func(d *desk) { d.say(d.id("c1"), Word{Said: ApprovalGranted, Uses: 1}) }, map[schemas.CallID]string{"c1": "held 1"}},
		{"no uses", func(d *desk) { d.say(d.id("c1"), Word{Said: ApprovalGranted, By: "ann"}) }, map[schemas.CallID]string{"c1": "held 1"}},
		{"expired before it is heard", func(d *desk) {
			w := grant
			w.Expires = time.Now().Add(-time.Second)
			d.say(d.id("c1"), w)
		}, map[schemas.CallID]string{"c1": "held 1"}},
		{"another approval", func(d *desk) { d.say("a0", grant) }, map[schemas.CallID]string{"c1": "held 1"}},
		{"nonsense", func(d *desk) { _ = d.p.Record(WordKind, d.id("c1"), 99, []byte("{")) }, map[schemas.CallID]string{"c1": "held 1, denied 2"}},
		{"one use for two", func(d *desk) {
			d.hand("c2", `{"n":1}`)
			d.say(d.id("c1"), grant)
		}, map[schemas.CallID]string{"": "one of c1 c2"}},
		{"two uses for two, a third waits", func(d *desk) {
			d.hand("c2", `{"n":1}`)
			w := grant
			w.Uses = 2
			d.say(d.id("c1"), w)
			synctest.Wait()
			d.hand("c3", `{"n":1}`)
		}, map[schemas.CallID]string{"c1": "held 1, authorized 2", "c2": "held 1, authorized 2", "c3": "held 1"}},
		{"other arguments", func(d *desk) {
			d.hand("c2", `{"n":2}`)
			d.say(d.id("c1"), grant)
		}, map[schemas.CallID]string{"c1": "held 1, authorized 2", "c2": "held 1"}},
		{"granted before it is asked again", func(d *desk) {
			w := grant
			w.Uses = 2
			d.say(d.id("c1"), w)
			synctest.Wait()
			d.hand("c2", `{"n":1}`)
		}, map[schemas.CallID]string{"c1": "held 1, authorized 2", "c2": "authorized 1"}},
		{"taken back, then granted", func(d *desk) {
			d.hear("c1", &schemas.Cancel{})
			synctest.Wait()
			d.say(d.id("c1"), grant)
		}, map[schemas.CallID]string{"c1": "held 1, denied 2"}},
		{"the session is closed", func(d *desk) { d.hear("", &schemas.Closed{}) }, map[schemas.CallID]string{"c1": "held 1, denied 2"}},
		{"forbidden by now", func(d *desk) {
			d.p.Activate(bundle(d.t, holding+"  - {id: none, effect: forbid, match: {tools: [pay]}}\n"))
			d.say(d.id("c1"), grant)
		}, map[schemas.CallID]string{"c1": "held 1, denied 2"}},
		{"the tool has changed", func(d *desk) {
			d.p.o.Defined = func(*schemas.Requested, []byte) Defined { return Defined{SHA256: "other"} }
			d.say(d.id("c1"), grant)
		}, map[schemas.CallID]string{"c1": "held 1, denied 2"}},
		{"a claim that fails", func(d *desk) {
			n := 0
			d.claim = func(stored bool) error {
				if n++; !stored && n < 3 {
					return errors.New("injected")
				}
				return nil
			}
			d.say(d.id("c1"), grant)
			time.Sleep(10 * time.Second)
		}, map[schemas.CallID]string{"c1": "held 1, authorized 2"}},
		{"a claim that fails after it is stored", func(d *desk) {
			once := false
			d.claim = func(stored bool) error {
				if stored && !once {
					once = true
					return errors.New("injected")
				}
				return nil
			}
			d.say(d.id("c1"), grant)
			time.Sleep(10 * time.Second)
			d.hand("c2", `{"n":1}`) // the use is gone
		}, map[schemas.CallID]string{"c1": "held 1, authorized 2", "c2": "held 1"}},
		{"delivered again while it is held", func(d *desk) {
			e := d.events[0]
			if err := d.p.Handle(d.t.Context(), e, d.store); err != nil {
				d.t.Error(err)
			}
			d.say(d.id("c1"), grant)
		}, map[schemas.CallID]string{"c1": "held 1, authorized 2"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				d := newDesk(t, holding)
				ctx, stop := context.WithCancel(t.Context())
				var running sync.WaitGroup
				running.Go(func() {
					if err := d.p.Run(ctx); err != nil {
						t.Error(err)
					}
				})
				d.hand("c1", `{"n":1}`)
				synctest.Wait()
				tt.do(d)
				synctest.Wait()
				stop()
				running.Wait()
				for call, want := range tt.want {
					if call == "" {
						if one, two := d.of("c1"), d.of("c2"); (one == "held 1, authorized 2") == (two == "held 1, authorized 2") {
							t.Errorf("c1: %s; c2: %s", one, two)
						}
						continue
					}
					if got := d.of(call); got != want {
						t.Errorf("%s: %s, want %s", call, got, want)
					}
				}
				for _, e := range d.events {
					if a, ok := e.Data.(*schemas.Authorized); ok && a.Name == "pay" {
						if !strings.HasPrefix(a.Facts["approval"], "granted by ann, record ") || a.Approval == "" {
							t.Errorf("authorized by %v, approval %q", a.Facts, a.Approval)
						}
						if a.N == 2 && time.Until(a.Deadline) <= 0 && tt.name == "granted" {
							t.Errorf("its deadline has passed when it is granted: %s", a.Deadline)
						}
					}
				}
			})
		})
	}
}

// hand has a call decided.
func (d *desk) hand(call schemas.CallID, args string) {
	if err := d.p.Handle(d.t.Context(), d.request(call, args), d.store); err != nil {
		d.t.Error(err)
	}
}

// hear tells of an event of c1's session.
func (d *desk) hear(call schemas.CallID, data schemas.Payload) {
	e := d.events[0].Next(data, nil)
	e.Call = call
	if err := d.p.Heard(d.t.Context(), e); err != nil {
		d.t.Error(err)
	}
}

// Another process takes over what is held, from the log alone.
func TestHoldsAreTakenOver(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		one := newDesk(t, holding)
		one.hand("c1", `{"n":1}`)
		two := newDesk(t, holding)
		two.events = one.events
		for _, e := range two.events {
			if err := two.p.Heard(t.Context(), e); err != nil {
				t.Fatal(err)
			}
		}
		two.say(two.id("c1"), Word{Said: ApprovalGranted, By: "ann", Uses: 1})
		two.p.resumeAll(t.Context())
		if got := two.of("c1"); got != "held 1, authorized 2" {
			t.Error(got)
		}
		// What was settled is not touched again.
		for _, e := range two.events {
			if _, ok := e.Data.(*schemas.Held); ok {
				_ = two.p.Heard(t.Context(), e)
			}
		}
		time.Sleep(time.Hour)
		two.p.resumeAll(t.Context())
		if got := two.of("c1"); got != "held 1, authorized 2" {
			t.Error(got)
		}
	})
}

// Nobody can be made to wait without bound.
func TestHoldsAreBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := newDesk(t, holding)
		for i := range maxHeldAgent + 1 {
			d.hand(schemas.CallID(fmt.Sprintf("c%d", i)), fmt.Sprintf(`{"n":%d}`, i))
		}
		if got := d.of("c99"); got != "held 1" {
			t.Errorf("call 99: %s", got)
		}
		if got := d.of("c100"); got != "denied 1" {
			t.Errorf("call 100: %s", got)
		}
		bare, err := New(Options{Bundle: bundle(t, holding), Past: nothing, Duplicates: time.Minute})
		if err != nil {
			t.Fatal(err)
		}
		d.p = bare
		d.hand("c200", `{"n":1}`)
		if got := d.of("c200"); got != "denied 1" {
			t.Errorf("where nobody can be asked: %s", got)
		}
	})
}

// TestLimiter: exactly as many as the limit lets, at once and within any window;
// what is not stored does not count; a call counts once.
func TestLimiter(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := newDesk(t, `
rules:
  - {id: some, effect: permit, match: {tools: [pay]}, obligations: {limit: {calls: 3, per: 1m, by: [agent]}}}
`)
		count := func(from, to int) (n int) {
			for i := from; i < to; i++ {
				if d.of(schemas.CallID(fmt.Sprintf("c%d", i))) == "authorized 1" {
					n++
				}
			}
			return n
		}
		var all sync.WaitGroup
		for i := range 20 {
			all.Go(func() { d.hand(schemas.CallID(fmt.Sprintf("c%d", i)), `{}`) })
		}
		all.Wait()
		if n := count(0, 20); n != 3 {
			t.Errorf("%d of 20 at once", n)
		}
		time.Sleep(59 * time.Second)
		d.hand("c20", `{}`)
		time.Sleep(2 * time.Second)
		d.hand("c21", `{}`)
		if d.of("c20") != "denied 1" || d.of("c21") != "authorized 1" {
			t.Errorf("after 59s %s, after 61s %s", d.of("c20"), d.of("c21"))
		}
		// A decision that is not stored lets another go on.
		time.Sleep(2 * time.Minute)
		e := d.request("c22", `{}`)
		for range 5 {
			if err := d.p.Handle(t.Context(), e, func(context.Context, schemas.Event) (schemas.Receipt, error) {
				return schemas.Receipt{}, errors.New("injected")
			}); err == nil {
				t.Error("an error is swallowed")
			}
		}
		for i := 23; i < 30; i++ {
			d.hand(schemas.CallID(fmt.Sprintf("c%d", i)), `{}`)
		}
		if n := count(22, 30); n != 3 {
			t.Errorf("%d after some that were not stored", n)
		}
		// Who hears of what others decide counts it, once.
		other := newDesk(t, holding)
		other.p.Activate(d.p.Bundle())
		for range 2 {
			for _, e := range d.events {
				if err := other.p.Heard(t.Context(), e); err != nil {
					t.Fatal(err)
				}
			}
		}
		other.hand("c90", `{}`)
		if got := other.of("c90"); got != "denied 1" {
			t.Errorf("another worker: %s", got)
		}
	})
}

// Arguments of any form are what an approval is bound to: a grant for none is not
// one for an array.
func TestApprovalIsBound(t *testing.T) {
	id := func(method, params string) string {
		e := call(method, "x")
		e.Body = fmt.Appendf(nil, `{"jsonrpc":"2.0","id":%d,"method":%q%s}`, rand.Int(), method, params)
		q := e.Data.(*schemas.Requested)
		var d schemas.Decision
		if method == toolsCall {
			d.ArgsSHA256 = readRequest(method, e.Body).digest(e.Body)
		}
		return approvalID(e, q, d)
	}
	for _, tt := range []struct {
		method, what string
		params       []string
	}{
		{toolsCall, `,"params":{"name":"x","arguments":%s}`, []string{`{}`, `[]`, `[1]`, `"a"`, `1`, `null`, `{"a":1}`}},
		{"resources/read", `,"params":%s`, []string{`{"uri":"a"}`, `{"uri":"b"}`, `{}`, `[1]`, `{"uri":"a","arguments":{}}`}},
		{promptsGet, `,"params":%s`, []string{`{"name":"x"}`, `{"name":"x","arguments":{}}`, `{"name":"x","arguments":[]}`}},
	} {
		seen := map[string]string{id(tt.method, ""): "nothing"}
		for _, p := range tt.params {
			got := id(tt.method, fmt.Sprintf(tt.what, p))
			if other, ok := seen[got]; ok {
				t.Errorf("%s: %s passes for %s", tt.method, p, other)
			}
			seen[got] = p
			// The same again, as another request.
			if again := id(tt.method, fmt.Sprintf(tt.what, p)); again != got {
				t.Errorf("%s: %s is %s, then %s", tt.method, p, got, again)
			}
		}
	}
	// So is what a call asks with beside them, and nothing that differs each time.
	plain := id(toolsCall, `,"params":{"name":"x","arguments":{}}`)
	seen := map[string]bool{plain: true}
	for _, more := range []string{`"inputResponses":{"sure":true}`, `"inputResponses":{"sure":false}`, `"requestState":"a"`, `"other":1`} {
		got := id(toolsCall, `,"params":{"name":"x",`+more+`,"arguments":{}}`)
		if seen[got] {
			t.Errorf("%s passes for something else", more)
		}
		seen[got] = true
	}
	for _, more := range []string{`"_meta":{"progressToken":7}`, `"task":{"ttl":1}`} {
		if got := id(toolsCall, `,"params":{"name":"x",`+more+`,"arguments":{}}`); got != plain {
			t.Errorf("%s asks for another approval", more)
		}
	}
	with := id("resources/read", `,"params":{"_meta":{"progressToken":7},"uri":"a"}`)
	if got := id("resources/read", `,"params":{"uri":"a"}`); got != with {
		t.Errorf("%s without a progress token, %s with one", got, with)
	}
}

// Who asks cannot approve under another spelling of its name.
func TestNobodyApprovesItself(t *testing.T) {
	for by, ok := range map[string]bool{"ann": true, "researcher": false, " Researcher\t": false, "RESEARCHER": false, " ": false, "re\u200bsearcher": false, "researcher\u00ad": false, "Zoë Ångström": true} {
		w := Word{Said: ApprovalGranted, By: by, Uses: 1, Expires: time.Now()}
		if err := CheckWord(w, "researcher"); (err == nil) != ok {
			t.Errorf("%q: %v", by, err)
		}
	}
}

// A call that becomes a task has its time from when it is granted, too.
func TestTaskTimeIsRenewed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := newDesk(t, holding)
		e := d.request("c1", `{}`)
		e.Data.(*schemas.Requested).TaskUntil = time.Now().Add(2 * time.Minute) // as the log has it, too
		if err := d.p.Handle(t.Context(), e, d.store); err != nil {
			t.Fatal(err)
		}
		later := time.Now().Add(4 * time.Minute)
		d.p.o.Now = func() time.Time { return later }
		d.say(d.id("c1"), Word{Said: ApprovalGranted, By: "ann", Uses: 1})
		d.p.resumeAll(t.Context())
		a, ok := d.events[len(d.events)-1].Data.(*schemas.Authorized)
		if !ok || a.Deadline.Sub(later) != time.Minute || a.TaskUntil.Sub(later) != 2*time.Minute {
			t.Errorf("%+v", d.events[len(d.events)-1].Data)
		}
	})
}

// One tenant cannot take all that can be counted, and a key is forgotten when its
// own rule no longer counts it.
func TestLimiterIsShared(t *testing.T) {
	l, at := newLimiter(), time.Unix(1_800_000_000, 0)
	counted := func(tenant schemas.Tenant, who string, at time.Time) bool {
		limit := Limit{Rule: "r", Who: who, Calls: 1, Per: time.Minute, tenant: tenant}
		l.decide([]Limit{limit}, schemas.CallID(who), at, &Facts{}, func() Verdict {
			return Verdict{Permit: true, Limits: []Limit{limit}}
		})
		return l.keys[limit.key()] != nil && l.keys[limit.key()].known[schemas.CallID(who)]
	}
	for i := range maxLimitKeysTenant {
		l.add(fmt.Sprintf("r k%d", i), "acme", time.Minute, "c", at)
	}
	room := func(tenant schemas.Tenant, at time.Time) bool {
		_, ok := l.count(Limit{Rule: "r", Who: "another", Per: time.Minute, tenant: tenant}, "c", at)
		return ok
	}
	if room("acme", at) || !room("globex", at) || !counted("globex", "g", at) {
		t.Error("one tenant has it all, or too much")
	}
	at = at.Add(3 * time.Minute)
	l.swept = at.Add(-sweepEvery / 2)
	if room("acme", at) {
		t.Error("swept twice within a second")
	}
	if at = at.Add(sweepEvery); !room("acme", at) || len(l.keys) != 0 || len(l.tenants) != 0 {
		t.Errorf("%d keys of %d tenants are left", len(l.keys), len(l.tenants))
	}
}
