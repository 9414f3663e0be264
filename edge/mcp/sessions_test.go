package mcp

import (
	"context"
	"fmt"
	"net/http"
	"runtime"
	"testing"
	"time"

	"waybill.dev/schemas"
)

// 10,000 sessions are held at less than 2 KB each, and nothing stays of them.
func TestSessionBytes(t *testing.T) {
	store := func(context.Context, schemas.Event) (schemas.Receipt, error) { return schemas.Receipt{Seq: 1}, nil }
	a := New(Options{Store: store})
	heap := func() int64 {
		for range 2 {
			runtime.GC()
		}
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		return int64(m.HeapAlloc)
	}
	const n = 10000
	before := heap()
	for i := range n {
		agent := schemas.Agent(fmt.Sprint("a", i%20))
		now := time.Now()
		s, bad := a.table.add(&lasting{
			key: schemas.NewSessionKey("acme", agent, newSessionID()), tenant: "acme", agent: agent, server: "everything",
			opened: 1, openedAt: now, used: now, revision: revision2025Nov, checked: true,
		}, true)
		if bad != nil {
			t.Fatal(bad.message)
		}
		// It has made a call, and was asked something.
		id := fmt.Appendf(nil, "%d", i)
		r := &running{}
		s.begin(id, r)
		_, _, release := s.take("c", func(error) {})
		s.ask("q", &question{event: schemas.Event{Data: &schemas.Asked{ID: "q"}}})
		s.answered("q")
		release()
		s.end(id, r, false)
	}
	held := heap()
	if each := (held - before) / n; each > 2048 {
		t.Errorf("%d bytes a session", each)
	} else {
		t.Logf("%d bytes a session", each)
	}
	a.table.mu.Lock()
	all := make([]*lasting, 0, n)
	for _, s := range a.table.all {
		all = append(all, s)
	}
	a.table.mu.Unlock()
	for _, s := range all {
		if err := a.end(t.Context(), s, reasonClient); err != nil {
			t.Fatal(err)
		}
	}
	all = nil
	if a.table.size() != 0 || len(a.table.agents) != 0 || len(a.table.tenants) != 0 {
		t.Errorf("left: %d sessions, %v, %v", a.table.size(), a.table.agents, a.table.tenants)
	}
	// Of those that ended the keys are kept for a while.
	if left := (heap() - before) / n; left > 512 {
		t.Errorf("%d bytes left of a session that has ended", left)
	}
	runtime.KeepAlive(a)
}

// What is kept of one session is bounded.
func TestSessionBounds(t *testing.T) {
	s := &lasting{}
	for i := range 1000 {
		id := fmt.Appendf(nil, "%d", i)
		r := &running{event: schemas.Event{Call: schemas.CallID(id)}, cancel: func(error) {}}
		if !s.begin(id, r) {
			t.Fatal("refused")
		}
		s.end(id, r, true)
		s.ask(string(id), &question{event: schemas.Event{Data: &schemas.Asked{ID: string(id)}}, answered: i%2 == 0})
		s.served(uint64(i+1), time.Time{})
	}
	if len(s.calls) != maxLeft || len(s.left) != maxLeft || len(s.asked) != maxAsked || len(s.fresh) > 256 {
		t.Errorf("%d calls, %d left, %d questions, %d marks", len(s.calls), len(s.left), len(s.asked), len(s.fresh))
	}
	newest, _ := s.call([]byte("999"))
	if oldest, over := s.call([]byte("1")); newest == nil || oldest != nil || over {
		t.Error("the newest are kept")
	}
	for i := range 1000 {
		id := fmt.Appendf(nil, "answered %d", i)
		r := &running{event: schemas.Event{Call: schemas.CallID(id)}, cancel: func(error) {}}
		s.begin(id, r)
		s.end(id, r, false)
	}
	_, first := s.call([]byte("answered 0"))
	if _, last := s.call([]byte("answered 999")); len(s.over) != maxOver || first || !last {
		t.Errorf("%d calls that were answered, of the first %t, of the last %t", len(s.over), first, last)
	}
	if _, ok := s.question("999"); !ok {
		t.Error("the newest question was dropped")
	}
}

// What a server takes back is the latest question under its id.
func TestTakenBackQuestion(t *testing.T) {
	s := &lasting{}
	for i, q := range []struct {
		server, original string
		answered         bool
	}{{"a", "0", false}, {"a", "0", false}, {"a", "0", true}, {"b", "0", false}, {"a", "1", true}} {
		s.ask(fmt.Sprint("q", i), &question{
			event:    schemas.Event{Seq: uint64(i + 1), Data: &schemas.Asked{Target: schemas.Target{Server: q.server}}},
			original: q.original, answered: q.answered,
		})
	}
	for range 20 { // a map has no order
		for of, want := range map[[2]string]string{{"a", "0"}: "q1", {"b", "0"}: "q3", {"a", "1"}: "", {"c", "0"}: ""} {
			if id, ok := s.known(of[0], of[1]); id != want || ok != (want != "") {
				t.Fatalf("%v: %q %v, want %q", of, id, ok, want)
			}
		}
	}
}

// A session that was found in the log takes the revision that the first header
// says, if it may have agreed on it.
func TestAgree(t *testing.T) {
	for _, c := range []struct {
		have   string
		agreed bool
		header []string
		want   string // "": refused
	}{
		{revision2025Nov, true, nil, revision2025Nov},
		{revision2025Nov, true, []string{revision2025Nov}, revision2025Nov},
		{revision2025Nov, true, []string{revision2025Jun}, ""},
		{revision2025Nov, false, []string{revision2025Jun}, revision2025Jun},
		{revision2025Jun, false, []string{revision2025Nov}, ""},
		{revision2025Nov, false, []string{"2024-11-05"}, "2024-11-05"},
		{revision2025Nov, false, []string{"2024-10-07"}, ""},
		{"2024-11-05", true, []string{"2024-11-05"}, "2024-11-05"}, // what the upstream said
		{revision2025Nov, true, []string{revision2025Nov, revision2025Nov}, ""},
	} {
		s := &lasting{revision: c.have, agreed: c.agreed}
		h := http.Header{}
		if c.header != nil {
			h[headerVersion] = c.header
		}
		got, bad := s.agree(h)
		if got != c.want || (bad == nil) != (c.want != "") {
			t.Errorf("%+v: %q %v", c, got, bad)
		}
		if again := s.version(); c.want != "" && again != c.want {
			t.Errorf("%+v: then %q", c, again)
		}
	}
}

// FuzzLastEventID: what is taken for an id is one that telling writes, and says
// the same.
func FuzzLastEventID(f *testing.F) {
	for _, s := range []string{"1-1", "12-99", "", "0-0", "1-", "-1", "01-2", "2-1", "18446744073709551616-1", "1-1\n", "+1-1", "1-1-1"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, id string) {
		anchor, after, back, bad := lastEvent(http.Header{headerLast: {id}})
		switch {
		case bad != nil && (back || bad.status != 400):
			t.Errorf("%q: %v %+v", id, back, bad)
		case bad == nil && !back && id != "":
			t.Errorf("%q is taken for none", id)
		case back:
			if c := (&telling{anchor: anchor}); c.at(after) != id || anchor == 0 || anchor > after {
				t.Errorf("%q read as %d-%d", id, anchor, after)
			}
		}
		if _, _, _, bad := lastEvent(http.Header{headerLast: {id, id}}); bad == nil {
			t.Error("two are one too many")
		}
	})
}
