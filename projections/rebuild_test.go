package projections_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"iter"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/ClickHouse/clickhouse-go/v2"

	"waybill.dev/projections"
	"waybill.dev/schemas"
)

// A row of a derived table takes of a body its size alone: so a rebuild, which has no
// bodies, makes the same.
func TestRowsNeedNoBody(t *testing.T) {
	all := slices.Concat(made(8, day()), crowd(0, 20, day()))
	rows := 0
	for _, table := range projections.Tables() {
		if table.Name == "events_v1" {
			continue
		}
		for _, e := range all {
			row := table.Row(nil, e)
			without := e
			without.Body = bytes.Repeat([]byte{0}, len(e.Body))
			if again := table.Row(nil, without); fmt.Sprint(again) != fmt.Sprint(row) {
				t.Errorf("%s of %d is %v, and of another body %v", table.Name, e.Seq, row, again)
			}
			if row != nil {
				rows++
			}
		}
	}
	if rows < len(all) {
		t.Errorf("only %d rows of %d events", rows, len(all))
	}
}

// derived is what the derived tables hold.
func derived(t *testing.T, s projections.Server) string {
	t.Helper()
	var all []string
	for _, table := range []string{"sessions_v1", "edges_v1", "calls_v1"} {
		all = append(all, table)
		all = append(all, ask(t, s, "SELECT * FROM "+table+" FINAL ORDER BY ALL")...)
	}
	return strings.Join(all, "\n")
}

// sessionsToo is made, with sessions.
func sessionsToo(n int, base time.Time) []schemas.Event {
	all := made(n, base)
	for i, kind := range []schemas.Payload{&schemas.Opened{Protocol: "mcp", Name: "a", Client: "c"}, &schemas.Closed{Reason: "said goodbye"}} {
		last := all[len(all)-1]
		e := schemas.Event{Tenant: "acme", Agent: "researcher", Session: "s0", Data: kind}
		e.Seq, e.Stored, e.Time = last.Seq+1, last.Stored.Add(time.Duration(i+1)*time.Millisecond), base
		all = append(all, e)
	}
	return all
}

func archive(events []schemas.Event) iter.Seq2[schemas.Event, error] {
	return func(yield func(schemas.Event, error) bool) {
		for _, e := range events {
			if !yield(e, nil) {
				return
			}
		}
	}
}

// Derived tables are made anew of events_v1, or of an archive, and are what they
// were; what was damaged is whole again; what would lose or invent anything is
// refused and changes nothing.
func TestRebuild(t *testing.T) {
	e := engine(t)
	// Of two months, and written in pieces.
	all := sessionsToo(60, day().AddDate(0, -1, 0))
	w := writer(t, e, logOf("one", all))
	for some := range slices.Chunk(all[:100], 17) {
		take(t, w, some)
	}
	earlier := slices.Clone(all[:10])
	for i := range earlier {
		earlier[i].Call, earlier[i].Session = "e"+earlier[i].Call, "e"+earlier[i].Session
	}
	take(t, writer(t, e, logOf("before", earlier)), earlier) // another log
	live := derived(t, e)
	exec := func(sql string) {
		t.Helper()
		o, err := e.Options(t.Context(), false)
		if err != nil {
			t.Fatal(err)
		}
		conn, err := clickhouse.Open(o)
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = conn.Close() }()
		if err := conn.Exec(t.Context(), sql+" SETTINGS mutations_sync = 2"); err != nil {
			t.Fatalf("%s: %v", sql, err)
		}
	}
	run := func(o projections.RebuildOptions) []projections.Rebuilt {
		t.Helper()
		tables, err := w.Rebuild(t.Context(), o)
		if err != nil {
			t.Fatal(err)
		}
		if len(tables) != 3 {
			t.Fatalf("%+v", tables)
		}
		return tables
	}
	same := func(what string, tables []projections.Rebuilt, equal bool) {
		t.Helper()
		for _, r := range tables {
			if r.Rows == 0 && r.Table != "sessions_v1" || equal && r.State != r.Live {
				t.Errorf("%s: %+v", what, r)
			}
		}
		if now := derived(t, e); now != live {
			have, had := strings.Split(now, "\n"), strings.Split(live, "\n")
			more := slices.DeleteFunc(slices.Clone(have), func(l string) bool { return slices.Contains(had, l) })
			less := slices.DeleteFunc(slices.Clone(had), func(l string) bool { return slices.Contains(have, l) })
			t.Errorf("%s: %d rows, were %d; more\n%s\nless\n%s", what, len(have), len(had), strings.Join(more, "\n"), strings.Join(less, "\n"))
		}
		if left := ask(t, e, "SHOW TABLES LIKE '%_rebuilt'"); len(left) > 0 {
			t.Errorf("%s: %q are left", what, left)
		}
	}
	told := 0
	same("of events_v1", run(projections.RebuildOptions{Progress: func(done, of uint64) {
		if told++; done > of {
			t.Errorf("%d of %d", done, of)
		}
	}}), true)
	if told == 0 {
		t.Error("no progress is told")
	}
	same("of an archive", run(projections.RebuildOptions{Archive: archive(all[:100])}), true)
	same("of half an archive", run(projections.RebuildOptions{Archive: archive(all[:50])}), true)
	shuffled := slices.Concat(all[40:60], all[:40], all[60:100])
	same("of sessions", run(projections.RebuildOptions{Archive: archive(shuffled)}), true)
	same("dry", run(projections.RebuildOptions{DryRun: true}), true)

	// What was damaged.
	exec("ALTER TABLE calls_v1 DELETE WHERE call IN ('c3', 'c4')")
	exec("ALTER TABLE edges_v1 UPDATE agent = 'another' WHERE call = 'c5'")
	tables := run(projections.RebuildOptions{DryRun: true})
	if tables[1].State == tables[1].Live || tables[2].State == tables[2].Live || tables[0].State != tables[0].Live || tables[0].Swap {
		t.Errorf("damaged, dry: %+v", tables)
	}
	same("damaged", run(projections.RebuildOptions{}), false)

	// The writer goes on where it was.
	take(t, w, all[100:])
	if got := ask(t, e, "SELECT count() FROM calls_v1 WHERE log = 'one'"); !slices.Equal(got, []string{"60"}) {
		t.Errorf("%v calls", got)
	}
	live = derived(t, e)
	same("after all", run(projections.RebuildOptions{}), true)

	// What is missing.
	refused := func(what string, o projections.RebuildOptions, want string) {
		t.Helper()
		tables, err := w.Rebuild(t.Context(), o)
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %+v, %v; want %s", what, tables, err, want)
		}
		same(what, nil, true)
	}
	refused("an archive with a gap", projections.RebuildOptions{Archive: archive(slices.Delete(slices.Clone(all), 30, 33))}, "the source does not have 31 to 33 of log one")
	changed := slices.Clone(all)
	changed[20].Agent = "another"
	refused("an altered archive", projections.RebuildOptions{Archive: archive(changed)}, "sequence 21 is c10/requested there, and not as the record has it")
	longer := slices.Clone(all)
	longer[20].Body = append(slices.Clone(longer[20].Body), "more"...)
	refused("an archive with another body", projections.RebuildOptions{Archive: archive(longer)}, "sequence 21 is c10/requested there, and not as the record has it")
	refused("an altered archive, and the event itself", projections.RebuildOptions{Archive: archive(append(slices.Clone(changed), all[20]))}, "sequence 21 is c10/requested there, and not as the record has it")
	refused("an empty archive", projections.RebuildOptions{Archive: archive(nil)}, "no events")
	refused("a broken archive", projections.RebuildOptions{Archive: func(yield func(schemas.Event, error) bool) {
		yield(schemas.Event{}, errors.New("line 7 breaks off"))
	}}, "line 7 breaks off")

	exec("ALTER TABLE events_v1 DELETE WHERE log = 'one' AND (seq BETWEEN 11 AND 12 OR seq = 40)")
	refused("a record with gaps", projections.RebuildOptions{}, "the source does not have 11 to 12 of log one, 40 of log one")
	if _, err := w.Rebuild(t.Context(), projections.RebuildOptions{}); !errors.As(err, new(*projections.GapsError)) {
		t.Errorf("%v is no GapsError", err)
	}
	tables = run(projections.RebuildOptions{AcceptGaps: true})
	same("accepted gaps", tables, true)
	if tables[1].Taken == 0 || tables[2].Taken == 0 {
		t.Errorf("nothing was taken over: %+v", tables)
	}
	same("gaps that the archive fills", run(projections.RebuildOptions{Archive: archive(all)}), true)

	// An erased session: its events are gone, and who knows says so.
	first := all[len(all)-1]
	erased := schemas.Event{Tenant: "acme", Agent: "researcher", Session: "s0", Seq: first.Seq + 1, Stored: first.Stored.Add(time.Second), Data: &schemas.Erased{ID: "x"}}
	take(t, w, []schemas.Event{erased})
	live = derived(t, e)
	refused("an erased session", projections.RebuildOptions{}, "1 sessions were erased")
	was := map[uint64]bool{11: true, 12: true, 40: true}
	for _, ev := range all {
		was[ev.Seq] = was[ev.Seq] || ev.Session == "s0"
	}
	same("an erased session, known", run(projections.RebuildOptions{Erased: func(_ context.Context, seq uint64, sessions map[schemas.SessionKey]bool) (bool, error) {
		return sessions["s0"] && was[seq], nil
	}}), true)
	same("an erased session of an archive", run(projections.RebuildOptions{Archive: archive(all), AcceptGaps: true}), true)
}

// TestRebuildUnderTraffic: while events are written, tables are made anew again and
// again, and nothing is lost or twice.
func TestRebuildUnderTraffic(t *testing.T) {
	e := engine(t)
	all := crowd(0, 12_000, day().Add(-2*time.Hour))
	w := writer(t, e, logOf("one", all))
	take(t, w, all[:2_000])
	done := make(chan struct{})
	go func() {
		defer close(done)
		for some := range slices.Chunk(all[2_000:], 500) {
			take(t, w, some)
		}
	}()
	n := 0
	for over := false; !over; n++ {
		select {
		case <-done:
			over = true
		default:
		}
		tables, err := w.Rebuild(t.Context(), projections.RebuildOptions{})
		if err != nil {
			t.Fatal(err)
		}
		for _, r := range tables {
			if r.State != r.Live || !r.Swap {
				t.Errorf("%+v", r)
			}
		}
	}
	if n < 2 {
		t.Errorf("only %d rebuilds in that time", n)
	}
	for sql, want := range map[string]string{
		"SELECT count(), uniqExact(call) FROM calls_v1": "6000 6000", "SELECT count(), uniqExact(call) FROM edges_v1": "6000 6000", "SELECT count() FROM events_v1": "12000",
	} {
		if got := ask(t, e, sql); !slices.Equal(got, []string{want}) {
			t.Errorf("%s: %v, want %s", sql, got, want)
		}
	}
}
