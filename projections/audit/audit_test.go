package audit

import (
	"context"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"iter"
	"math/rand/v2"
	"os"
	"reflect"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/santhosh-tekuri/jsonschema/v6"
	"golang.org/x/mod/sumdb/tlog"
	"pgregory.net/rapid"

	"waybill.dev/schemas"
)

// built is a log of some sessions and its tree.
func built(t testing.TB) *memory {
	t.Helper()
	m := newMemory()
	for i := range 300 {
		session := fmt.Sprintf("s%d", i%7)
		switch i % 5 {
		case 0:
			m.say(session, request(), fmt.Sprintf("said %d", i))
		case 4:
			m.store(System, "sys.registry.tool", schemas.Event{}, fmt.Appendf(nil, "tool %d", i))
		default:
			m.say(session, &schemas.Completed{Status: i}, fmt.Sprintf("answer %d", i))
		}
	}
	m.store(Events, "ev.acme.s1.requested._", schemas.Event{}, []byte("no event"))
	b := m.builder(t, nil)
	if err := errors.Join(b.Restore(t.Context()), m.all(b)); err != nil {
		t.Fatal(err)
	}
	return m
}

func (m *memory) verify(t testing.TB, lines []Line, against ...string) Report {
	t.Helper()
	r, err := Verify(t.Context(), each(lines), Check{Keys: keysOf(t, 1).Verifiers, Against: against, Decode: decode})
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func TestVerifies(t *testing.T) {
	m := built(t)
	r := m.verify(t, m.lines(nil, nil), m.checkpoints...)
	if !r.OK() || r.Messages != 301 || r.Signed != 301 || r.Checkpoints != 1 || r.Unsigned != 0 {
		t.Errorf("%+v", r)
	}
	// What comes after is told from what is signed.
	m.say("s1", request(), "later")
	if r = m.verify(t, m.lines(nil, nil)); !r.OK() || r.Unsigned != 1 {
		t.Errorf("%+v", r)
	}
}

// Whatever fails, before or after it was done, and wherever the builder is cut
// off: no leaf is missing, none is there twice, and every checkpoint is of the
// same tree, which is the one of the log.
func TestFaults(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		m := newMemory()
		rate := rapid.SampledFrom([]int{0, 5, 30}).Draw(rt, "rate")
		chance := rand.New(rand.NewPCG(rapid.Uint64().Draw(rt, "seed"), 0))
		quiet := false
		m.fault = func(string, bool) error {
			if !quiet && chance.IntN(100) < rate {
				return errFault
			}
			return nil
		}
		b := m.builder(t, func(o *Options) { o.Each = 20 })
		restored := false
		step := func() {
			if !restored {
				if err := b.Restore(context.Background()); err != nil {
					if errors.Is(err, ErrFork) {
						rt.Fatal(err)
					}
					return
				}
				restored = true
			}
			if err := m.all(b); err != nil {
				if errors.Is(err, ErrFork) {
					rt.Fatal(err)
				}
				restored = false
				if chance.IntN(2) == 0 { // another process
					b = m.builder(t, func(o *Options) { o.Each = 20 })
				}
			}
		}
		for i := range rapid.IntRange(1, 6).Draw(rt, "rounds") {
			for j := range rapid.IntRange(0, 70).Draw(rt, "messages") {
				if j%11 == 3 {
					m.store(System, "sys.policy.x", schemas.Event{}, fmt.Append(nil, i, j))
				} else {
					m.say(fmt.Sprintf("s%d", j%3), &schemas.Completed{Status: j}, fmt.Sprint(i, j))
				}
			}
			if rapid.IntRange(0, 4).Draw(rt, "erase") == 0 {
				m.say("s1", &schemas.Erased{ID: fmt.Sprint(i)}, "")
			}
			step()
		}
		quiet = true
		step()
		step()
		if !restored {
			rt.Fatal("never restored")
		}
		r, err := Verify(context.Background(), each(m.lines(nil, nil)), Check{Keys: keysOf(rt, 1).Verifiers, Decode: decode})
		if err != nil || !r.OK() || r.Unsigned != 0 || r.Messages+r.Erased != m.last[Events]+m.last[System] || r.Signed != uint64(len(m.feed)) {
			rt.Fatalf("%v: %+v; %d leaves of %d messages", err, r, len(m.feed), m.last[Events]+m.last[System])
		}
	})
}

// A builder that was overtaken adds nothing to the other's tree.
func TestTwoBuilders(t *testing.T) {
	m := newMemory()
	a, b := m.builder(t, nil), m.builder(t, nil)
	m.say("s1", request(), "one")
	if err := errors.Join(a.Restore(t.Context()), b.Restore(t.Context()), m.all(a)); err != nil {
		t.Fatal(err)
	}
	if err := m.all(b); !errors.Is(err, ErrOvertaken) {
		t.Errorf("the other: %v, want %v", err, ErrOvertaken)
	}
	m.say("s1", request(), "two")
	if err := errors.Join(b.Restore(t.Context()), m.all(b)); err != nil {
		t.Fatal(err)
	}
	if err := m.all(a); !errors.Is(err, ErrOvertaken) {
		t.Errorf("the first: %v, want %v", err, ErrOvertaken)
	}
	if r := m.verify(t, m.lines(nil, nil)); !r.OK() || r.Messages != 2 {
		t.Errorf("%+v", r)
	}
}

// A builder signs nothing over what is not as it was signed, or not as the log
// has it.
func TestForkIsRefused(t *testing.T) {
	for name, change := range map[string]func(m *memory){
		"a signed record was changed": func(m *memory) {
			m.feed[299].Payload = []byte(strings.Replace(string(m.feed[299].Payload), `"size":`, `"size":1`, 1))
		},
		"signed records are gone": func(m *memory) { m.feed = m.feed[:280] },
		"a tile was changed": func(m *memory) {
			for _, data := range m.tiles {
				data[100]++
			}
		},
		"a record that is not signed is not of the log": func(m *memory) {
			e := m.log[Events][m.last[Events]]
			e.Body = append(slices.Clone(e.Body), '!')
			m.log[Events][e.Seq] = e
		},
		"the checkpoint is signed by another": func(m *memory) {
			c, err := keysOf(t, 2).sign("test", 301, tlog.Hash{})
			if err != nil {
				t.Error(err)
			}
			m.checkpoints = append(m.checkpoints, c.Text)
		},
		"the checkpoint is of another log": func(m *memory) {
			c, err := keysOf(t, 1).sign("other", 301, tlog.Hash{})
			if err != nil {
				t.Error(err)
			}
			m.checkpoints = append(m.checkpoints, c.Text)
		},
		"the checkpoint is of another tree": func(m *memory) {
			c, err := keysOf(t, 1).sign("test", 301, tlog.Hash{1})
			if err != nil {
				t.Error(err)
			}
			m.checkpoints = append(m.checkpoints, c.Text)
		},
	} {
		t.Run(name, func(t *testing.T) {
			m := built(t)
			m.say("s1", request(), "not signed yet")
			b := m.builder(t, nil)
			if err := b.Restore(t.Context()); err != nil {
				t.Fatal(err)
			}
			m.fault = func(what string, _ bool) error {
				if what == "edge" {
					return errFault
				}
				return nil
			}
			if err := m.all(b); !errors.Is(err, errFault) {
				t.Fatal(err)
			}
			change(m)
			signed := len(m.checkpoints)
			b = m.builder(t, nil)
			if err := b.Restore(t.Context()); !errors.Is(err, ErrFork) {
				t.Errorf("%v, want %v", err, ErrFork)
			}
			if len(m.checkpoints) != signed {
				t.Error("it was signed")
			}
		})
	}
}

// Each way to tamper is found, and the first record that is wrong is named.
func TestTampering(t *testing.T) {
	leaf := func(lines []Line, n uint64) *Witness {
		for _, l := range lines {
			if l.Leaf != nil && l.Leaf.Number == n {
				return l.Leaf
			}
		}
		return nil
	}
	drop := func(lines []Line, gone func(Line) bool) []Line { return slices.DeleteFunc(lines, gone) }
	for name, tt := range map[string]struct {
		change func(m *memory)
		lines  func([]Line) []Line
		want   string
	}{
		"a byte of a body": {change: func(m *memory) {
			e := m.log[Events][17]
			e.Body = []byte("answer X7")
			m.log[Events][17] = e
		}, want: "EVENTS 17: leaf 76: the message was changed"},
		"a byte of an envelope": {change: func(m *memory) {
			e := m.log[Events][17]
			e.Header = map[string][]string{"Waybill-Event": {strings.Replace(e.Header["Waybill-Event"][0], "researcher", "researchex", 1)}}
			m.log[Events][17] = e
		}, want: "EVENTS 17: leaf 76: the message was changed"},
		"a time": {change: func(m *memory) {
			e := m.log[System][3]
			e.Stored = e.Stored.Add(1)
			m.log[System][3] = e
		}, want: "SYSTEM 3: leaf 2: the message was changed"},
		"a deleted one":  {change: func(m *memory) { delete(m.log[Events], 20) }, want: "EVENTS 20: leaf 79: deleted from the log: c1/end of session s2"},
		"a deleted tail": {change: func(m *memory) { delete(m.log[Events], m.last[Events]); m.last[Events]-- }, want: "EVENTS 241: leaf 300: cut off the end of the log"},
		"two swapped": {change: func(m *memory) {
			a, b := m.log[Events][30], m.log[Events][40]
			a.Seq, b.Seq = 40, 30
			m.log[Events][30], m.log[Events][40] = b, a
		}, want: "EVENTS 30: leaf 89: the message was changed"},
		"a whole session": {change: func(m *memory) {
			for seq, e := range m.log[Events] {
				if strings.Contains(e.Subject, ".s3.") {
					delete(m.log[Events], seq)
				}
			}
		}, want: "EVENTS 4: leaf 63: deleted from the log: c1/end of session s3"},
		"an erasure before": {change: func(m *memory) { // it excuses what was before it only
			m.log[Events][1] = Entry{}
			delete(m.log[Events], 1)
			delete(m.log[Events], 2)
			m.log[Events][0] = Entry{Stream: Events} // the log begins before
		}, want: "EVENTS 1: leaf 60: deleted from the log"},
		"a record of the feed": {change: func(m *memory) {
			m.feed[50].Payload = []byte(strings.Replace(string(m.feed[50].Payload), `"size":`, `"size":1`, 1))
		}, want: "leaf 50: the feed's record is not the one that was signed; the message is"},
		"a lost record of the feed": {lines: func(lines []Line) []Line {
			return drop(lines, func(l Line) bool { return l.Leaf != nil && l.Leaf.Number == 50 })
		}, want: "leaf 51: the feed has lost the 1 before it"},
		"the feed's end": {lines: func(lines []Line) []Line {
			return drop(lines, func(l Line) bool { return l.Leaf != nil && l.Leaf.Number > 290 })
		}, want: "leaf 291: the feed ends before it"},
		"a tile": {change: func(m *memory) {
			for _, data := range m.tiles {
				data[40*32]++
			}
		}, want: "the tree of 301 leaves is"},
		"a missing tile": {change: func(m *memory) { clear(m.tiles) }, want: "leaf 0: the tile with its hash is missing"},
		"another's signature": {change: func(m *memory) {
			c, _ := keysOf(t, 2).sign("test", 301, tlog.Hash{})
			m.checkpoints = append(m.checkpoints, c.Text)
		}, want: "checkpoint 2: not a checkpoint of this log"},
		"a message without a leaf": {lines: func(lines []Line) []Line {
			extra := *leaf(lines, 100).Entry
			return slices.Insert(lines, len(lines)-1, Line{Beyond: &extra})
		}, want: "the tree has no leaf for this message, and is past it"},
		"a leaf twice": {lines: func(lines []Line) []Line {
			again := *leaf(lines, 100)
			i := slices.IndexFunc(lines, func(l Line) bool { return l.Leaf != nil && l.Leaf.Number == 101 })
			return slices.Insert(lines, i, Line{Leaf: &again})
		}, want: "leaf 100: it stands twice"},
		"another message in its place": {lines: func(lines []Line) []Line {
			w := leaf(lines, 100)
			w.Entry = leaf(lines, 101).Entry
			return lines
		}, want: "leaf 100: "},
	} {
		t.Run(name, func(t *testing.T) {
			m := built(t)
			if tt.change != nil {
				tt.change(m)
			}
			lines := m.lines(nil, nil)
			if tt.lines != nil {
				lines = tt.lines(lines)
			}
			r := m.verify(t, lines)
			if r.OK() || !strings.Contains(r.Problems[0].String(), tt.want) {
				t.Errorf("found %v, want first: %s", r.Problems, tt.want)
			}
		})
	}
}

// The tail that is cut off everywhere, and another tree that is signed with the
// same key, are found with a checkpoint of earlier.
func TestAgainst(t *testing.T) {
	m := built(t)
	m.say("s1", request(), "one more")
	b := m.builder(t, nil)
	if err := errors.Join(b.Restore(t.Context()), m.all(b)); err != nil {
		t.Fatal(err)
	}
	earlier := m.checkpoints[1]
	if r := m.verify(t, m.lines(nil, nil), m.checkpoints...); !r.OK() {
		t.Fatalf("%+v", r)
	}
	if r := built(t).verify(t, built(t).lines(nil, nil), earlier); r.OK() || !strings.HasPrefix(r.Problems[0].Text, "cut off: an earlier checkpoint is of 302 leaves") {
		t.Errorf("cut off: %+v", r.Problems)
	}
	fork := built(t) // its secrets are others, so its tree is
	if r := fork.verify(t, fork.lines(nil, nil), m.checkpoints[0]); r.OK() || !strings.HasPrefix(r.Problems[0].Text, "fork: an earlier checkpoint says that the tree of 301 leaves is") {
		t.Errorf("fork: %+v", r.Problems)
	}
	if _, err := Verify(t.Context(), each(m.lines(nil, nil)), Check{Keys: keysOf(t, 1).Verifiers, Against: []string{"nonsense"}, Decode: decode}); !errors.Is(err, ErrCheckpoint) {
		t.Errorf("%v", err)
	}
}

// Lines that are not whole are no verification.
func TestTruncatedLines(t *testing.T) {
	m := built(t)
	lines := m.lines(nil, nil)
	for _, n := range []int{0, 1, 5, len(lines) - 1} {
		if _, err := Verify(t.Context(), each(lines[:n]), Check{Keys: keysOf(t, 1).Verifiers, Decode: decode}); !errors.Is(err, ErrLines) {
			t.Errorf("%d of %d lines: %v", n, len(lines), err)
		}
	}
}

func TestErasure(t *testing.T) {
	m := newMemory()
	b := m.builder(t, func(o *Options) { o.Said = func(schemas.Tenant) bool { return true } })
	m.say("s1", request(), "canary-body")
	m.say("s2", request(), "stays")
	if err := errors.Join(b.Restore(t.Context()), m.all(b)); err != nil {
		t.Fatal(err)
	}
	rows := map[uint64]schemas.Event{1: m.log[Events][1].Event, 2: m.log[Events][2].Event}
	if r := m.verify(t, m.lines(nil, rows)); !r.OK() || r.Rows != 2 {
		t.Fatalf("%+v", r)
	}
	before := m.secrets["acme.s1"]
	m.say("s1", &schemas.Erased{ID: "x", Reason: "asked for"}, "")
	m.say("s1", request(), "said afterwards")
	if err := m.all(b); err != nil {
		t.Fatal(err)
	}
	if string(m.secrets["acme.s1"]) == string(before) {
		t.Error("what is said afterwards has the secret of before")
	}
	rows = map[uint64]schemas.Event{2: rows[2], 4: m.log[Events][4].Event}
	r := m.verify(t, m.lines(nil, rows))
	if !r.OK() || r.Erased != 1 || r.Messages != 3 || r.Rows != 2 {
		t.Errorf("%+v", r)
	}
	for _, item := range m.feed {
		for _, word := range []string{"canary", Hex(Salt(before, Events, 1))} {
			if strings.Contains(string(item.Payload), word) {
				t.Errorf("the feed has %s: %s", word, item.Payload)
			}
		}
	}
	if !strings.Contains(string(m.feed[3].Payload), "said afterwards") {
		t.Error("what was said afterwards is erased too")
	}
	// A row that stays is told, and so is one that goes without an erasure.
	rows[1] = schemas.Event{}
	if r = m.verify(t, m.lines(nil, map[uint64]schemas.Event{1: m.log[Events][2].Event, 2: rows[2], 4: rows[4]})); r.OK() {
		t.Error("a row of an erased session is not told")
	}
	if r = m.verify(t, m.lines(nil, map[uint64]schemas.Event{4: rows[4]})); r.OK() || !strings.Contains(r.Problems[0].String(), "EVENTS 2: leaf 1: its row is missing") {
		t.Errorf("%+v", r.Problems)
	}
	changed := rows[2]
	changed.Body = []byte("other")
	if r = m.verify(t, m.lines(nil, map[uint64]schemas.Event{2: changed, 4: rows[4]})); r.OK() || !strings.Contains(r.Problems[0].String(), "EVENTS 2: leaf 1: the row's body was changed") {
		t.Errorf("%+v", r.Problems)
	}
}

// What is said of the record's rows is told, where there is a leaf and where there is
// none.
func TestRows(t *testing.T) {
	m := newMemory()
	b := m.builder(t, nil)
	for i := range 6 {
		m.say("s1", &schemas.Failed{Code: schemas.FailUnknown, Detail: fmt.Sprint("why ", i)}, "said")
	}
	m.store(Events, "ev.acme.s1.requested._", schemas.Event{}, []byte("no event")) // 7
	if err := errors.Join(b.Restore(t.Context()), m.all(b)); err != nil {
		t.Fatal(err)
	}
	lines := func(change func(w *Witness)) []Line {
		rows := map[uint64]schemas.Event{}
		for seq, e := range m.log[Events] {
			if e.Event.Data != nil {
				rows[seq] = e.Event
			}
		}
		lines := m.lines(nil, rows)
		for _, l := range lines {
			if l.Leaf != nil && l.Leaf.Number == 3 {
				change(l.Leaf)
			}
		}
		return lines
	}
	header := func(e schemas.Event) map[string][]string {
		text, _ := e.MarshalString()
		return map[string][]string{"Waybill-Event": {text}}
	}
	verify := func(lines []Line) Report {
		t.Helper()
		r, err := Verify(t.Context(), each(lines), Check{Keys: keysOf(t, 1).Verifiers, Decode: decode, Header: header})
		if err != nil {
			t.Fatal(err)
		}
		return r
	}
	other := func(w *Witness) {
		e := *w.Row
		e.Data = &schemas.Failed{Code: schemas.FailUnknown, Detail: "another reason"}
		w.Row = &e
	}
	for name, tt := range map[string]struct {
		change func(w *Witness)
		want   string // "" for nothing
	}{
		"nothing":                     {func(*Witness) {}, ""},
		"no body, whose time is over": {func(w *Witness) { e := *w.Row; e.Body = nil; w.Row, w.RowGone = &e, 4 }, ""},
		"no body, of another size":    {func(w *Witness) { e := *w.Row; e.Body = nil; w.Row, w.RowGone = &e, 5 }, "the row's body was changed"},
		"a time":                      {func(w *Witness) { e := *w.Row; e.Stored = e.Stored.Add(1); w.Row = &e }, "the row was changed"},
		"what is not open":            {other, "the row was changed, in what is not open"},
		"the same, aged out":          {func(w *Witness) { w.Record = string(Record(*w.Entry, saltOf(w))); w.Entry = nil; other(w) }, "the row was changed, in what is not open"},
		"a column":                    {func(w *Witness) { w.RowWrong = []string{"calls_v1: the column x"} }, "the record is not what was signed: calls_v1: the column x: c1/end of session s1"},
		"a row that cannot be read":   {func(w *Witness) { w.Row, w.RowWrong = nil, []string{"no event"} }, "the record is not what was signed: no event"},
		"rows twice, and older ones":  {func(w *Witness) { w.RowsTwice, w.RowsOlder = 1, 2 }, ""},
	} {
		t.Run(name, func(t *testing.T) {
			r := verify(lines(tt.change))
			if tt.want == "" {
				if len(r.Problems) > 0 && !strings.Contains(name, "aged") || r.Rows != 6 {
					t.Errorf("%+v", r)
				}
				return
			}
			if len(r.Problems) == 0 || !slices.ContainsFunc(r.Problems, func(p Problem) bool { return p.Seq == 4 && strings.Contains(p.Text, tt.want) }) {
				t.Errorf("found %v, want %s", r.Problems, tt.want)
			}
		})
	}
	for seq, want := range map[uint64]string{1000: "EVENTS 1000: there is a row of it, and it was never in the log", 7: ""} {
		all := lines(func(*Witness) {})
		all = slices.Insert(all, len(all)-1, Line{Stray: &Stray{Seq: seq}})
		if seq == 7 { // for which there is a leaf, of no event
			for _, l := range all {
				if l.Leaf != nil && l.Leaf.Number == 6 {
					l.Leaf.Row = &schemas.Event{Tenant: "acme", Session: "s1", Seq: 7, Data: &schemas.Failed{}}
				}
			}
			want = "EVENTS 7: leaf 6: it is no event, and there is a row of it"
		}
		if r := verify(all); len(r.Problems) == 0 || !slices.ContainsFunc(r.Problems, func(p Problem) bool { return strings.HasPrefix(p.String(), want) }) {
			t.Errorf("found %v, want %s", r.Problems, want)
		}
	}
}

// saltOf is the salt that a witness has.
func saltOf(w *Witness) []byte {
	b, _ := hex.DecodeString(w.Salt)
	return b
}

// A gap is a leaf of its own: what the log lost before the tree saw it is told.
func TestGap(t *testing.T) {
	m := newMemory()
	for range 10 {
		m.say("s1", request(), "x")
	}
	for seq := range uint64(4) {
		delete(m.log[Events], seq+1)
	}
	b := m.builder(t, nil)
	if err := errors.Join(b.Restore(t.Context()), m.all(b)); err != nil {
		t.Fatal(err)
	}
	if r := m.verify(t, m.lines(nil, nil)); !r.OK() || r.Gaps != 4 || r.Messages != 6 || r.Signed != 7 {
		t.Errorf("%+v", r)
	}
	if m.feed[0].Subject != "audit.LOG.events.gap" {
		t.Errorf("the gap is on %s", m.feed[0].Subject)
	}
}

// A proof holds, and no byte of it can be changed.
func TestProof(t *testing.T) {
	m := built(t)
	keys := keysOf(t, 1).Verifiers
	known, err := Known(keys)
	if err != nil {
		t.Fatal(err)
	}
	c, err := OpenCheckpoint(m.checkpoints[0], known)
	if err != nil {
		t.Fatal(err)
	}
	hashes := Reader(tlog.Tree{N: int64(c.Size), Hash: c.Root}, func(t tlog.Tile) ([]byte, error) {
		if data, ok := m.edge[t]; ok {
			return data, nil
		}
		return m.Tile(context.Background(), t)
	})
	rapid.Check(t, func(t *rapid.T) {
		n := rapid.Uint64Range(0, c.Size-1).Draw(t, "leaf")
		record, err := CutRecord(m.feed[n].Payload)
		if err != nil {
			t.Fatal(err)
		}
		stream, seq := PlaceOf(record)
		e := m.log[stream][seq]
		tenant, session := SecretOf(e)
		p, err := Prove(c, keys, n, record, &e, Salt(m.secrets[string(tenant)+"."+string(session)], stream, seq), hashes)
		if err != nil {
			t.Fatal(err)
		}
		change := func(s string) string {
			i := rapid.IntRange(0, len(s)-1).Draw(t, "at")
			return s[:i] + string(s[i]^1) + s[i+1:]
		}
		switch rapid.IntRange(0, 8).Draw(t, "what") {
		case 0:
			p.Record = change(p.Record)
		case 1:
			if len(p.Path) == 0 {
				return
			}
			h, _ := base64.StdEncoding.DecodeString(p.Path[0])
			h[5]++
			p.Path[0] = base64.StdEncoding.EncodeToString(h)
		case 2:
			p.Number++
		case 3:
			p.Salt = strings.Repeat("00", 32)
		case 4:
			body := base64.StdEncoding.EncodeToString([]byte("other"))
			p.Body = &body
		case 5:
			p.Checkpoint = strings.Replace(p.Checkpoint, "\n301\n", "\n300\n", 1)
		case 6:
			p.Size++
		case 7:
			p.Origin += "x"
		case 8: // also where the body is left out
			p.Header, p.Body = map[string][]string{"Waybill-Event": {"other"}}, nil
		}
		if err := p.Check(keys); !errors.Is(err, ErrProof) {
			t.Fatalf("a changed proof: %v", err)
		}
	})
}

// Two keys sign while one replaces the other, and either verifies.
func TestRotation(t *testing.T) {
	m := built(t)
	first, second := keysOf(t, 1), keysOf(t, 2)
	both := Keys{append(first.Signers, second.Signers...), append(first.Verifiers, second.Verifiers...)}
	m.say("s1", request(), "both")
	b := m.builder(t, func(o *Options) { o.Keys = both })
	if err := errors.Join(b.Restore(t.Context()), m.all(b)); err != nil {
		t.Fatal(err)
	}
	m.say("s1", request(), "the second")
	b = m.builder(t, func(o *Options) { o.Keys = Keys{second.Signers, both.Verifiers} })
	if err := errors.Join(b.Restore(t.Context()), m.all(b)); err != nil {
		t.Fatal(err)
	}
	for _, keys := range [][]string{first.Verifiers, second.Verifiers} {
		known, err := Known(keys)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := OpenCheckpoint(m.checkpoints[1], known); err != nil {
			t.Errorf("the checkpoint of both: %v", err)
		}
	}
	r, err := Verify(t.Context(), each(m.lines(nil, nil)), Check{Keys: both.Verifiers, Decode: decode})
	if err != nil || !r.OK() || r.Checkpoints != 3 {
		t.Errorf("%v %+v", err, r)
	}
}

// The feed's records are CloudEvents as the published schema says, and carry their
// leaf byte for byte.
func TestFeedFitsItsSchema(t *testing.T) {
	text, err := os.ReadFile("feed.json")
	if err != nil {
		t.Fatal(err)
	}
	doc, err := jsonschema.UnmarshalJSON(strings.NewReader(string(text)))
	if err != nil {
		t.Fatal(err)
	}
	c := jsonschema.NewCompiler()
	c.AssertFormat()
	if err := c.AddResource(feedSchema, doc); err != nil {
		t.Fatal(err)
	}
	schema, err := c.Compile(feedSchema)
	if err != nil {
		t.Fatal(err)
	}
	fits := func(payload []byte) error {
		v, err := jsonschema.UnmarshalJSON(strings.NewReader(string(payload)))
		if err != nil {
			return err
		}
		return schema.Validate(v)
	}
	m := newMemory()
	for range 3 {
		m.say("s1", request(), "x")
	}
	delete(m.log[Events], 1)
	m.say("s1", &schemas.Completed{}, "\xff\x00")
	m.say("s1", request(), `quotes ","leaf":{} "`)
	m.store(Events, "ev.acme.s1.requested._", schemas.Event{}, []byte("no event"))
	m.store(System, "sys.registry.tool", schemas.Event{}, []byte("{}"))
	b := m.builder(t, func(o *Options) { o.Said = func(schemas.Tenant) bool { return true } })
	if err := errors.Join(b.Restore(t.Context()), m.all(b)); err != nil {
		t.Fatal(err)
	}
	for i, item := range m.feed {
		if err := fits(item.Payload); err != nil {
			t.Errorf("%s\n%v", item.Payload, err)
		}
		var ce struct {
			Data struct {
				Number uint64
				Leaf   json.RawMessage
			}
		}
		if err := json.Unmarshal(item.Payload, &ce); err != nil {
			t.Fatal(err)
		}
		record, err := CutRecord(item.Payload)
		if err != nil || string(record) != string(ce.Data.Leaf) || ce.Data.Number != uint64(i) {
			t.Errorf("cut %s of %s: %v", record, item.Payload, err)
		}
		t.Logf("%s %s", item.Subject, item.Payload)
		for _, change := range [][2]string{{`"1.0"`, `"0.3"`}, {`"number":`, `"numeral":`}, {`"v":1`, `"v":2`}, {`"stream":"`, `"stream":"X`}, {`"seq":`, `"seq":-`}} {
			if bad := strings.Replace(string(item.Payload), change[0], change[1], 1); fits([]byte(bad)) == nil {
				t.Errorf("fits: %s", bad)
			}
		}
	}
	// The schema knows every member of a leaf, and no others.
	var s struct {
		Properties struct {
			Data struct {
				Properties struct {
					Leaf struct{ Properties map[string]any }
				}
			}
		}
	}
	if err := json.Unmarshal(text, &s); err != nil {
		t.Fatal(err)
	}
	var members []string
	for f := range reflect.TypeFor[Leaf]().NumField() {
		name, _, _ := strings.Cut(reflect.TypeFor[Leaf]().Field(f).Tag.Get("json"), ",")
		members = append(members, name)
		delete(s.Properties.Data.Properties.Leaf.Properties, name)
	}
	if left := s.Properties.Data.Properties.Leaf.Properties; len(left) > 0 || len(members) != 10 {
		t.Errorf("the schema's %v are not among %v", left, members)
	}
}

// What may repeat what was said is in no leaf.
func TestOpenSaysNothing(t *testing.T) {
	m := newMemory()
	m.say("s1", request(), "canary")
	m.say("s1", &schemas.Failed{Code: schemas.FailUnknown, Detail: "canary"}, "canary")
	m.say("s1", &schemas.Cancelled{Reason: "canary"}, "")
	m.say("s1", &schemas.Cancel{Reason: "canary"}, "canary")
	// Of digests without salt one finds by trying what they are of.
	digests := schemas.Decision{ArgsSHA256: "canary", Approval: "canary"}
	m.say("s1", &schemas.Authorized{Requested: *request(), Decision: digests, BodySHA256: "canary"}, "canary")
	m.say("s1", &schemas.Held{Decision: digests}, "")
	m.say("s1", &schemas.Tasked{}, "canary")
	of := schemas.Summary{ChunksSHA256: "canary"}
	m.say("s1", &schemas.Denied{Summary: of, Decision: digests}, "")
	m.say("s1", &schemas.Completed{Summary: of}, "canary")
	m.say("s1", &schemas.Failed{Summary: of, Code: schemas.FailUnknown}, "")
	m.say("s1", &schemas.Cancelled{Summary: of}, "")
	b := m.builder(t, nil)
	if err := errors.Join(b.Restore(t.Context()), m.all(b)); err != nil {
		t.Fatal(err)
	}
	for _, item := range m.feed {
		if strings.Contains(string(item.Payload), "canary") {
			t.Errorf("%s", item.Payload)
		}
	}
	// They are covered all the same.
	if r := m.verify(t, m.lines(nil, nil)); !r.OK() {
		t.Errorf("%+v", r)
	}
	e := m.log[Events][m.last[Events]]
	e.Header["Waybill-Event"][0] = strings.Replace(e.Header["Waybill-Event"][0], "canary", "Canary", 1)
	if r := m.verify(t, m.lines(nil, nil)); len(r.Problems) != 1 || !strings.HasSuffix(r.Problems[0].Text, ": headers") {
		t.Errorf("%+v", r.Problems)
	}
}

// What was read of a tree that grew meanwhile is right: the edge may be of a later
// tree than the newest checkpoint.
func TestVerifiesWhileGrowing(t *testing.T) {
	m := built(t)
	checkpoints := slices.Clone(m.checkpoints)
	for i := range 20 {
		m.say("s1", request(), fmt.Sprint("later ", i))
	}
	b := m.builder(t, nil)
	if err := errors.Join(b.Restore(t.Context()), m.all(b)); err != nil {
		t.Fatal(err)
	}
	m.checkpoints = checkpoints
	if r := m.verify(t, m.lines(nil, nil)); !r.OK() || r.Signed != 301 || r.Unsigned != 20 {
		t.Errorf("%+v", r)
	}
}

// SYSTEM keeps all: what it does not have of its beginning was deleted. And the
// report says how many leaves the feed has lost to its age.
func TestNothingAgesUnseen(t *testing.T) {
	m := built(t)
	lines := slices.DeleteFunc(m.lines(nil, nil), func(l Line) bool { return l.Leaf != nil && l.Leaf.Number < 5 })
	lines[0].Log.First = 5
	if r := m.verify(t, lines); !r.OK() || r.Unfed != 5 {
		t.Errorf("%+v", r)
	}
	delete(m.log[System], 1)
	delete(m.log[Events], 1)
	if r := m.verify(t, m.lines(nil, nil)); len(r.Problems) != 1 || r.Problems[0].Stream != System || r.Aged != 1 {
		t.Errorf("%+v", r)
	}
}

// What the log's age or size does not explain was deleted, also at its beginning.
func TestDeletedBeforeItsTime(t *testing.T) {
	m := built(t)
	stored := m.log[Events][3].Stored
	m.say("s1", &schemas.Erased{ID: "x"}, "")
	b := m.builder(t, nil)
	if err := errors.Join(b.Restore(t.Context()), m.all(b)); err != nil {
		t.Fatal(err)
	}
	for seq := range uint64(3) {
		delete(m.log[Events], seq+1)
	}
	for name, tt := range map[string]struct {
		kept Kept
		aged uint64
	}{
		"old enough":                           {Kept{At: stored.Add(25 * time.Hour), MaxAge: 24 * 3600}, 2},
		"younger":                              {Kept{At: stored.Add(23 * time.Hour), MaxAge: 24 * 3600}, 0},
		"younger, and the log is full":         {Kept{At: stored.Add(time.Hour), MaxAge: 24 * 3600, MaxBytes: 1 << 30, Bytes: 1<<30 - 100}, 2},
		"younger, and the log has room":        {Kept{At: stored.Add(time.Hour), MaxAge: 24 * 3600, MaxBytes: 1 << 30, Bytes: 1 << 29}, 0},
		"while less was kept":                  {Kept{At: stored.Add(3 * time.Hour), MaxAge: 24 * 3600, Age: 3600, Until: stored.Add(2 * time.Hour)}, 2},
		"while less was kept, and it is young": {Kept{At: stored.Add(3 * time.Hour), MaxAge: 24 * 3600, Age: 3600, Until: stored.Add(30 * time.Minute)}, 0},
	} {
		t.Run(name, func(t *testing.T) {
			lines := m.lines(nil, nil)
			lines[0].Log.Kept = &tt.kept
			r := m.verify(t, lines)
			if r.Aged != tt.aged || uint64(len(r.Problems)) != 2-tt.aged || r.Erased == 0 {
				t.Errorf("%d aged, %d erased, %v", r.Aged, r.Erased, r.Problems)
			}
			for _, p := range r.Problems {
				if !strings.HasPrefix(p.Text, "deleted from the log before its time: it would be ") {
					t.Error(p)
				}
			}
		})
	}
}

// Where the log ends before the tree, what comes takes the numbers of what was
// signed: nothing is signed then, and not later, either, when there is enough.
func TestLogCutOff(t *testing.T) {
	m := built(t)
	for seq := m.last[Events] - 2; seq <= m.last[Events]; seq++ {
		delete(m.log[Events], seq)
	}
	m.last[Events] -= 3
	leaves := len(m.feed)
	b := m.builder(t, nil)
	for i := range 5 {
		if err := b.Restore(t.Context()); !errors.Is(err, ErrFork) {
			t.Errorf("with %d of 3 stored anew: %v", i, err)
		}
		m.say("s9", request(), "anew")
	}
	if len(m.feed) != leaves {
		t.Errorf("%d leaves more", len(m.feed)-leaves)
	}
}

// Run follows the log until it is told to stop, and signs what it has taken.
func TestRun(t *testing.T) {
	m := newMemory()
	signed := make(chan uint64, 100)
	b := m.builder(t, func(o *Options) {
		o.Signed = func(_ context.Context, c Checkpoint, _ tlog.HashReader) { signed <- c.Size }
	})
	ctx, stop := context.WithCancel(t.Context())
	done := make(chan error)
	go func() { done <- b.Run(ctx) }()
	for range 500 {
		m.say("s1", request(), "x")
	}
	for size := uint64(0); size < 500; {
		select {
		case size = <-signed:
		case <-t.Context().Done():
			t.Fatal("not signed")
		}
	}
	stop()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	if r := m.verify(t, m.lines(nil, nil)); !r.OK() || r.Messages != 500 {
		t.Errorf("%+v", r)
	}
}

// A feed of which all is too old to be there ends nothing: the tree goes on from the
// last checkpoint, wherever in a tile that is.
func TestGoesOnWithoutFeed(t *testing.T) {
	for _, n := range []int{1, 255, 256, 257, 700} {
		m := newMemory()
		for i := range n {
			m.say("s1", request(), fmt.Sprint("said ", i))
		}
		b := m.builder(t, nil)
		if err := errors.Join(b.Restore(t.Context()), m.all(b)); err != nil {
			t.Fatal(err)
		}
		for _, left := range []uint64{0, 1, 100} {
			m.old = uint64(len(m.feed)) - min(left, uint64(n))
			b = m.builder(t, nil)
			m.say("s1", request(), "later")
			if err := errors.Join(b.Restore(t.Context()), m.all(b)); err != nil {
				t.Fatalf("%d leaves, %d in the feed: %v", n, left, err)
			}
		}
		m.old = 0 // it was only hidden
		if r := m.verify(t, m.lines(nil, nil), m.checkpoints...); !r.OK() || r.Messages != uint64(n+3) {
			t.Errorf("%d leaves: %+v", n, r)
		}
		// What no checkpoint says is not guessed.
		m.old = uint64(len(m.feed))
		for _, data := range m.edge {
			data[0]++
		}
		if err := m.builder(t, nil).Restore(t.Context()); !errors.Is(err, ErrFork) {
			t.Errorf("%d leaves, with an edge that was changed: %v", n, err)
		}
		m.positions[len(m.positions)-1] = nil
		if err := m.builder(t, nil).Restore(t.Context()); !errors.Is(err, ErrFork) {
			t.Errorf("%d leaves, without a position: %v", n, err)
		}
	}
}

// A builder that is told to stop signs what it has taken.
func TestStopSigns(t *testing.T) {
	m := newMemory()
	b := m.builder(t, func(o *Options) { o.Now, o.Every, o.Settle = time.Now, time.Hour, 10*time.Millisecond })
	ctx, stop := context.WithCancel(t.Context())
	taken := make(chan bool, 1)
	b.o.Tree = func(s State) {
		if s.Leaves == 5 {
			select {
			case taken <- true:
			default:
			}
		}
	}
	for range 5 {
		m.say("s1", request(), "x")
	}
	done := make(chan error)
	go func() { done <- b.Run(ctx) }()
	<-taken
	stop()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	if r := m.verify(t, m.lines(nil, nil)); !r.OK() || r.Signed != 5 {
		t.Errorf("%+v", r)
	}
}

// A tree whose checkpoints are gone, or of which an older copy was put back, is not
// signed anew: the last checkpoint is kept where the tree is not.
func TestLostCheckpoints(t *testing.T) {
	kept, fails := "", false
	keeping := func(o *Options) {
		o.Keep = func(_ context.Context, c Checkpoint) error {
			if fails {
				return errFault
			}
			kept = c.Text
			return nil
		}
		o.Kept = func(context.Context) (string, error) { return kept, nil }
	}
	m := newMemory()
	b := m.builder(t, keeping)
	for i := range 3 {
		for j := range 100 {
			m.say("s1", request(), fmt.Sprint(i, j))
		}
		fails = i == 2 // it is as true as before, and older
		if err := errors.Join(b.Restore(t.Context()), m.all(b), b.Sign(t.Context())); err != nil {
			t.Fatal(err)
		}
	}
	if kept != m.checkpoints[1] {
		t.Fatalf("kept is\n%s", kept)
	}
	restore := func() error { return m.builder(t, keeping).Restore(t.Context()) }
	if err := restore(); err != nil {
		t.Error(err)
	}
	all, last := m.checkpoints, kept
	for n, want := range map[int]error{0: ErrLost, 1: ErrLost, 2: nil} {
		m.checkpoints, m.positions = all[:n:n], nil
		if err := restore(); !errors.Is(err, want) {
			t.Errorf("with %d checkpoints: %v, want %v", n, err, want)
		}
	}
	m.checkpoints = all
	c, err := keysOf(t, 1).sign("test", 200, tlog.Hash{1})
	if err != nil {
		t.Fatal(err)
	}
	kept = c.Text
	if err := restore(); !errors.Is(err, ErrFork) {
		t.Errorf("of another tree: %v", err)
	}
	kept = strings.Replace(last, "test", "best", 1)
	if err := restore(); !errors.Is(err, ErrFork) {
		t.Errorf("not signed by us: %v", err)
	}
	kept = last
	if err := restore(); err != nil {
		t.Error(err)
	}
}

// followed counts what is read of the log.
type followed struct {
	*memory
	read atomic.Int64
}

func (f *followed) Follow(ctx context.Context, after Position) iter.Seq2[[]Entry, error] {
	return func(yield func([]Entry, error) bool) {
		for burst, err := range f.memory.Follow(ctx, after) {
			f.read.Add(int64(len(burst)))
			if !yield(burst, err) {
				return
			}
		}
	}
}

// However large the messages are, no more of them is held than there is room for.
func TestReadsAheadByBytes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := newMemory()
		body := strings.Repeat("x", 1<<20)
		for range 100 {
			m.say("s1", request(), body)
		}
		slow := make(chan bool)
		var stuck atomic.Bool
		m.fault = func(what string, done bool) error {
			if what == "append" && !done && !stuck.Swap(true) {
				m.mu.Unlock() // others go on
				<-slow
				m.mu.Lock()
			}
			return nil
		}
		f := &followed{memory: m}
		signed := make(chan uint64, 1000)
		b := m.builder(t, func(o *Options) {
			o.Store = f
			o.Signed = func(_ context.Context, c Checkpoint, _ tlog.HashReader) { signed <- c.Size }
		})
		ctx, stop := context.WithCancel(t.Context())
		done := make(chan error)
		go func() { done <- b.Run(ctx) }()
		synctest.Wait()
		if n := f.read.Load(); n > 17 {
			t.Errorf("%d MiB are read ahead", n)
		}
		close(slow)
		for size := uint64(0); size < 100; {
			size = <-signed
		}
		stop()
		if err := <-done; err != nil {
			t.Fatal(err)
		}
	})
}

// What the feed's age or size does not explain was removed from its beginning, with
// which the log's beginning can be removed unseen.
func TestFeedCutBeforeItsTime(t *testing.T) {
	m := built(t)
	begun := time.Date(2026, 11, 28, 12, 0, 0, 0, time.UTC)
	const cut = 40
	cutOff := func(kept *Kept, signed time.Time) []Line {
		lines := m.lines(nil, nil)
		lines[0].Log.First, lines[0].Log.Feed = cut, kept
		for i, l := range lines {
			if l.Leaf != nil && l.Leaf.Number < cut { // all of SYSTEM, which is not too old
				lines[i] = Line{Early: &Witness{Entry: l.Leaf.Entry, Salt: l.Leaf.Salt}}
			}
			if lines[i].Checkpoint != "" {
				lines[i].Stored = signed
			}
		}
		return lines
	}
	for name, tt := range map[string]struct {
		kept   *Kept
		signed time.Time // a tree of fewer leaves
		found  bool
	}{
		"old enough":                   {&Kept{Since: begun, At: begun.Add(25 * time.Hour), MaxAge: 24 * 3600}, time.Time{}, false},
		"before it can be so old":      {&Kept{Since: begun, At: begun.Add(23 * time.Hour), MaxAge: 24 * 3600}, time.Time{}, true},
		"the feed is full":             {&Kept{Since: begun, At: begun.Add(time.Hour), MaxAge: 24 * 3600, MaxBytes: 1 << 30, Bytes: 1 << 30}, time.Time{}, false},
		"signed a short time ago":      {&Kept{Since: begun, At: begun.Add(50 * time.Hour), MaxAge: 24 * 3600}, begun.Add(45 * time.Hour), true},
		"signed long ago":              {&Kept{Since: begun, At: begun.Add(50 * time.Hour), MaxAge: 24 * 3600}, begun.Add(20 * time.Hour), false},
		"what it keeps is not known":   {nil, time.Time{}, false},
		"while it kept less than that": {&Kept{Since: begun, At: begun.Add(10 * time.Hour), MaxAge: 24 * 3600, Age: 3600, Until: begun.Add(9 * time.Hour)}, time.Time{}, false},
	} {
		t.Run(name, func(t *testing.T) {
			lines := cutOff(tt.kept, time.Time{})
			if !tt.signed.IsZero() {
				// The tree as it was before the last of them.
				hashes := tree{}
				for _, item := range m.feed[:cut-1] {
					record, err := CutRecord(item.Payload)
					if err != nil {
						t.Fatal(err)
					}
					hashes.add(hashOf(record), func(tlog.Tile, []byte) {})
				}
				c, err := keysOf(t, 1).sign("test", cut-1, hashes.root())
				if err != nil {
					t.Fatal(err)
				}
				lines = slices.Insert(lines, 1, Line{Checkpoint: c.Text, Stored: tt.signed})
			}
			r := m.verify(t, lines)
			found := slices.ContainsFunc(r.Problems, func(p Problem) bool {
				return p.Leaf != nil && *p.Leaf == cut-1 && strings.Contains(p.Text, "before their time")
			})
			if found != tt.found || r.OK() == tt.found {
				t.Error(r.Problems)
			}
		})
	}
}

// What the log still has, and the feed has no more, is held against the hashes that
// are left of it: records of SYSTEM outlive the feed.
func TestEarlierThanTheFeed(t *testing.T) {
	m := built(t)
	const cut = 150
	lines := m.lines(nil, nil)
	early := uint64(0)
	for i, l := range lines {
		if l.Leaf != nil && l.Leaf.Number < cut {
			early++
			lines[i] = Line{Early: &Witness{Entry: l.Leaf.Entry, Salt: l.Leaf.Salt}}
		}
	}
	lines[0].Log.First = cut
	if r := m.verify(t, lines); !r.OK() || r.Messages != uint64(len(m.feed)) || r.Unfed != 0 || early != cut {
		t.Fatalf("%d early; %+v", early, r)
	}
	change := func(name string, want string, do func([]Line) []Line) {
		t.Run(name, func(t *testing.T) {
			changed := slices.Clone(lines)
			r := m.verify(t, do(changed))
			if len(r.Problems) != 1 || !strings.Contains(r.Problems[0].String(), want) {
				t.Errorf("%v", r.Problems)
			}
		})
	}
	at := slices.IndexFunc(lines, func(l Line) bool { return l.Early != nil && l.Early.Entry.Stream == System && l.Early.Entry.Seq == 7 })
	change("a record", "SYSTEM 7: the message was changed", func(lines []Line) []Line {
		e := *lines[at].Early.Entry
		e.Body = []byte("another")
		lines[at].Early = &Witness{Entry: &e, Salt: lines[at].Early.Salt}
		return lines
	})
	change("deleted", "SYSTEM 7: deleted", func(lines []Line) []Line { return slices.Delete(lines, at, at+1) })
	change("without its salt", "SYSTEM 7: its salt is gone", func(lines []Line) []Line {
		lines[at].Early = &Witness{Entry: lines[at].Early.Entry}
		return lines
	})
}

// What is read while a session is being erased is neither lost nor changed: the salt may
// be gone that a message was read with, the message of which the leaf was read, and the
// rows later than both.
func TestErasedMeanwhile(t *testing.T) {
	m := newMemory()
	b := m.builder(t, nil)
	m.say("s1", request(), "said")
	m.say("s2", request(), "stays")
	if err := errors.Join(b.Restore(t.Context()), m.all(b)); err != nil {
		t.Fatal(err)
	}
	rows := map[uint64]schemas.Event{1: m.log[Events][1].Event, 2: m.log[Events][2].Event}
	erased := m.say("s1", &schemas.Erased{ID: "x"}, "")
	// As it is read: the message, and the salt, which is gone by then.
	lines := func(done uint64, change func(*Witness)) []Line {
		all := m.lines(nil, rows)
		all[0].Log.Done = done
		for _, l := range all {
			if l.Leaf != nil && l.Leaf.Number == 0 {
				record, err := CutRecord(m.feed[0].Payload)
				if err != nil {
					t.Fatal(err)
				}
				l.Leaf.Record = string(record)
				change(l.Leaf)
			}
		}
		return all
	}
	unsalted := func(w *Witness) { w.Salt = "" }
	if r := m.verify(t, lines(2, unsalted)); !r.OK() || r.Erased != 1 {
		t.Errorf("the salt gone: %+v", r)
	}
	if r := m.verify(t, lines(2, func(w *Witness) { w.Salt, w.Entry = "", nil })); !r.OK() || r.Erased != 1 {
		t.Errorf("the message gone, too: %+v", r)
	}
	if r := m.verify(t, lines(2, func(w *Witness) { w.RowWrong = []string{"a reason"} })); !r.OK() {
		t.Errorf("rows of which some have changed: %+v", r)
	}
	// Where the erasure is long done it excuses nothing.
	if r := m.verify(t, lines(erased.Seq, unsalted)); len(r.Problems) != 1 || !strings.Contains(r.Problems[0].Text, "the row's salt is gone") {
		t.Errorf("the record has done it: %+v", r.Problems)
	}
	if err := m.all(b); err != nil {
		t.Fatal(err)
	}
	m.log[Events][1] = Entry{Stream: Events, Seq: 1, Stored: rows[1].Stored, Subject: "ev.acme.s1.requested._", Header: map[string][]string{}, Body: []byte("other")}
	if r := m.verify(t, lines(erased.Seq-1, unsalted)); len(r.Problems) != 1 || !strings.Contains(r.Problems[0].Text, "its salt is gone, and the message is not") {
		t.Errorf("it is signed: %+v", r.Problems)
	}
}
