package replay

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"waybill.dev/schemas"
)

// told is a session as it should be: a call with two chunks that causes another, and
// one that is denied. Each event can be spoiled before it is checked.
func told() []schemas.Event {
	key := schemas.NewSessionKey("acme", "ann", "s")
	at := time.Date(2026, 11, 28, 9, 0, 0, 0, time.UTC)
	var all []schemas.Event
	add := func(e schemas.Event, data schemas.Payload, body string) schemas.Event {
		e.Tenant, e.Session, e.Agent, e.Data, e.Body = "acme", key, "ann", data, nil
		if body != "" {
			e.Body = []byte(body)
		}
		e.Seq = uint64(len(all) + 1)
		e.Stored = at.Add(time.Duration(e.Seq) * time.Millisecond)
		all = append(all, e)
		return e
	}
	target := schemas.Target{Protocol: "mcp", Server: "up", Method: "tools/call", Name: "x"}
	add(schemas.Event{}, &schemas.Opened{Protocol: "mcp", Name: "s"}, "")
	q := schemas.Requested{Target: target, Revision: "2026-07-28"}
	one := schemas.Event{Call: "c1", Root: "c1", Edge: "e1"}
	r := add(one, &q, "{}")
	a := add(one, &schemas.Authorized{Requested: q, Decision: schemas.Decision{N: 1, Rule: "all"}, RequestedSeq: r.Seq, RequestedAt: r.Stored}, "{}")
	add(one, &schemas.Started{Attempt: 1, By: "d"}, "")
	sub := q
	sub.Server = "other"
	two := schemas.Event{Call: "c2", Parent: "c1", Root: "c1", Edge: "e1"}
	r2 := add(two, &sub, "[]")
	add(two, &schemas.Denied{Summary: schemas.Summary{Target: sub.Target, RequestedAt: r2.Stored, RequestSize: 2, Revision: q.Revision}, Decision: schemas.Decision{N: 1}}, "")
	var c chunks
	for i, body := range []string{"a", "b"} {
		add(one, &schemas.Progressed{Index: i, By: "d"}, body)
		c.add(i, []byte(body))
	}
	digest, _ := c.digest(2)
	add(one, &schemas.Completed{Summary: schemas.Summary{
		Target: target, RequestedAt: r.Stored, AuthorizedAt: a.Stored, UpstreamAt: a.Stored.Add(time.Microsecond), Attempts: 1,
		Chunks: 2, ChunksSHA256: digest, By: "d", Revision: q.Revision, Permit: "all", RequestSize: 2,
	}, Status: 200}, "answer")
	add(schemas.Event{}, &schemas.Closed{}, "")
	return all
}

// check takes a history and returns the first difference as "sequence field".
func check(all []schemas.Event, spoil func(i int, r *Recorded)) (string, *History) {
	h := New(all[0].Session, func(_, was schemas.Event) (schemas.Event, error) {
		if d := schemas.DecisionOf(was.Data); d.Rule == "lost" {
			return schemas.Event{}, fmt.Errorf("%w: lost", ErrCannot)
		} else if d.Rule == "broken" {
			return schemas.Event{}, fmt.Errorf("no such policy")
		}
		was.Body = append([]byte(nil), was.Body...)
		return was, nil
	})
	first := ""
	for i, e := range all {
		r := Recorded{Event: e, ID: e.ID()}
		if spoil != nil {
			spoil(i, &r)
		}
		if r.Event.Data == nil {
			continue
		}
		for _, d := range h.Check(r) {
			if first == "" {
				first = fmt.Sprintf("%d %s", d.Seq, d.Field)
			}
		}
	}
	return first, h
}

func TestHistory(t *testing.T) {
	first, h := check(told(), nil)
	want := Counts{Events: 10, Calls: 2, Causes: 10, Decisions: 2, Endings: 1, Digests: 3}
	if first != "" || h.Counts != want || len(h.Left) > 0 {
		t.Errorf("%s, %+v, left %v; want %+v", first, h.Counts, h.Left, want)
	}
}

// Of each kind of difference the first is named.
func TestDifferences(t *testing.T) {
	on := func(i int, do func(r *Recorded)) func(int, *Recorded) {
		return func(at int, r *Recorded) {
			if at == i {
				do(r)
			}
		}
	}
	completed := func(do func(c *schemas.Completed)) func(int, *Recorded) {
		return on(8, func(r *Recorded) { do(r.Data.(*schemas.Completed)) })
	}
	for _, tt := range []struct {
		name  string
		spoil func(int, *Recorded)
		want  string
	}{
		{"id", on(3, func(r *Recorded) { r.ID = "c1/started/2" }), "4 id"},
		{"session's key", on(0, func(r *Recorded) { r.Data.(*schemas.Opened).Name = "t" }), "1 session"},
		{"tenant", on(2, func(r *Recorded) { r.Tenant = "other" }), "3 tenant"},
		{"agent", on(2, func(r *Recorded) { r.Agent = "bob" }), "3 agent"},
		{"root", on(4, func(r *Recorded) { r.Root = "c2" }), "5 root"},
		{"parent", on(4, func(r *Recorded) { r.Parent = "c9" }), "5 parent"},
		{"parent of a decision", on(5, func(r *Recorded) { r.Parent = "" }), "6 parent"},
		{"edge", on(2, func(r *Recorded) { r.Edge = "e2" }), "3 edge"},
		{"trace", on(2, func(r *Recorded) { r.Trace = "00-1" }), "3 trace"},
		{"no request", on(1, func(r *Recorded) { r.Data = nil }), "3 cause"},
		{"no decision", on(2, func(r *Recorded) { r.Data = nil }), "4 cause"},
		{"number", on(2, func(r *Recorded) { r.Data.(*schemas.Authorized).N = 2; r.ID = r.Event.ID() }), "3 data.n"},
		{"policy", on(2, func(r *Recorded) { r.Data.(*schemas.Authorized).Rule = "broken" }), "3 data"},
		{"chunk left out", on(6, func(r *Recorded) { r.Data = nil }), "9 data.chunks"},
		{"chunk", on(7, func(r *Recorded) { r.Body = []byte("c") }), "9 data.chunks_sha256"},
		{"time of the request", completed(func(c *schemas.Completed) { c.RequestedAt = c.RequestedAt.Add(1) }), "9 data.requested_at"},
		{"time of the decision", completed(func(c *schemas.Completed) { c.AuthorizedAt = c.AuthorizedAt.Add(1) }), "9 data.authorized_at"},
		{"rule", completed(func(c *schemas.Completed) { c.Permit = "none" }), "9 data.permit"},
		{"size", completed(func(c *schemas.Completed) { c.RequestSize = 3 }), "9 data.request_size"},
		{"target", completed(func(c *schemas.Completed) { c.Name = "y" }), "9 data.name"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if first, _ := check(told(), tt.spoil); first != tt.want {
				t.Errorf("%q, want %q", first, tt.want)
			}
		})
	}
	t.Run("second ending", func(t *testing.T) {
		all := told()
		again := all[8]
		again.Call, again.Parent, again.Seq = "c2", "c1", 10
		if first, _ := check(append(all[:9], again), nil); first != "10 cause" {
			t.Errorf("%q", first)
		}
	})
}

// What is not there is said, and neither guessed nor taken for a difference.
func TestLeft(t *testing.T) {
	for _, tt := range []struct {
		name  string
		from  int
		spoil func(int, *Recorded)
		left  string
	}{
		{"half aged out", 3, nil, beginning},
		{"redacted", 0, func(_ int, r *Recorded) { r.Event, r.Cut = r.Open(), "left out" }, "decisions: left out"},
		{"body gone", 0, func(_ int, r *Recorded) { r.Gone, r.Body = len(r.Body), nil }, "decisions: the request's body is not kept any more"},
		{"policy of another program", 0, func(i int, r *Recorded) {
			if i == 2 {
				r.Data.(*schemas.Authorized).Rule = "lost"
			}
			if i == 8 {
				r.Data.(*schemas.Completed).Permit = "lost"
			}
		}, "decisions: lost"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			first, h := check(told()[tt.from:], tt.spoil)
			if first != "" || h.Left[tt.left] == 0 {
				t.Errorf("%q, left %v", first, h.Left)
			}
		})
	}
	// Nor is an event of an id that was there before one of its own.
	all := told()
	again := all[8]
	again.Seq, again.Body = 11, []byte("other")
	if first, h := check(append(all, again), nil); first != "" || h.Counts.Repeated != 1 {
		t.Errorf("%q, %+v", first, h.Counts)
	}
}

func TestCompare(t *testing.T) {
	type s struct {
		A int            `json:"a"`
		B map[string]any `json:"b,omitempty"`
	}
	d := Compare(Recorded{ID: "c/end"}, "data", s{1, map[string]any{"x": 1, "y": strings.Repeat("long", 200)}}, s{2, map[string]any{"y": 2, "z": 3}})
	var fields []string
	for _, one := range d {
		fields = append(fields, one.Field)
		if len(one.Recorded) > 310 {
			t.Errorf("%d characters", len(one.Recorded))
		}
	}
	if got := strings.Join(fields, " "); got != "data.a data.b.x data.b.y data.b.z" {
		t.Error(got)
	}
}
