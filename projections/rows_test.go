package projections_test

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/ClickHouse/clickhouse-go/v2"

	"waybill.dev/projections"
	"waybill.dev/schemas"
)

// recorded is what OpenRows finds, a line for each sequence of which something is
// to be said.
func recorded(t *testing.T, s projections.Server) (lines []string, r projections.Rows) {
	t.Helper()
	r, err := projections.OpenRows(t.Context(), s, "one")
	if err != nil {
		t.Fatal(err)
	}
	last := uint64(0)
	for row, err := range r.All {
		if err != nil {
			t.Fatal(err)
		}
		if row.Seq < last {
			t.Errorf("%d comes behind %d", row.Seq, last)
		}
		last = row.Seq
		if len(row.Wrong) > 0 || row.Twice > 0 || row.Older > 0 || !row.Main || row.Gone > 0 {
			lines = append(lines, strings.TrimSuffix(fmt.Sprintf("%d main=%v gone=%d twice=%d older=%d %s", row.Seq, row.Main, row.Gone, row.Twice, row.Older, strings.Join(row.Wrong, "; ")), " "))
		}
	}
	return lines, r
}

// Every column of every table is held against the event, and every row, however many
// there are of a sequence.
func TestRowsAreTheEvents(t *testing.T) {
	e := engine(t)
	all := made(8, day())
	again := all[1] // an ending of the first call, once more, as an old log can have it
	again.Seq, again.Stored = 17, all[15].Stored.Add(1)
	all = append(all, again)
	take(t, writer(t, e, logOf("one", all)), all)
	o, err := e.Options(t.Context(), false)
	if err != nil {
		t.Fatal(err)
	}
	conn, err := clickhouse.Open(o)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close() }()
	write := func(sql string) {
		t.Helper()
		ctx := clickhouse.Context(context.WithoutCancel(t.Context()), clickhouse.WithSettings(clickhouse.Settings{"mutations_sync": 2, "insert_deduplicate": 0}))
		if err := conn.Exec(ctx, sql); err != nil {
			t.Fatalf("%s: %v", sql, err)
		}
	}
	expect := func(want ...string) {
		t.Helper()
		if got, _ := recorded(t, e); !slices.Equal(got, want) {
			t.Errorf("found\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
		}
	}
	expect()
	write("OPTIMIZE TABLE calls_v1 FINAL") // of the two endings one is left
	expect()

	for _, table := range []string{"events_v1", "calls_v1", "edges_v1"} { // or what is there twice would be merged away
		write("ALTER TABLE " + table + " MODIFY SETTING max_bytes_to_merge_at_max_space_in_pool = 1, max_bytes_to_merge_at_min_space_in_pool = 1")
	}
	write("ALTER TABLE events_v1 UPDATE rule = 'other', edge = 'x' WHERE seq = 3")
	write("ALTER TABLE calls_v1 UPDATE queue_us = 7, outcome = 'failed' WHERE seq = 4")
	write("ALTER TABLE edges_v1 DELETE WHERE seq = 5")
	write("INSERT INTO edges_v1 SELECT * REPLACE ('nobody' AS agent) FROM edges_v1 WHERE seq = 7")
	write("INSERT INTO events_v1 SELECT * REPLACE ('other' AS body) FROM events_v1 WHERE seq = 9")
	write("INSERT INTO calls_v1 SELECT * FROM calls_v1 WHERE seq = 10")
	write("INSERT INTO calls_v1 SELECT * REPLACE (11 AS seq) FROM calls_v1 WHERE call = 'c4' LIMIT 1")
	write("ALTER TABLE events_v1 UPDATE body = '' WHERE seq = 13")
	write("INSERT INTO calls_v1 SELECT * REPLACE (4000000000000 AS seq) FROM calls_v1 WHERE call = 'c4' LIMIT 1")
	write("ALTER TABLE events_v1 UPDATE envelope = '{}' WHERE seq = 14")
	write("INSERT INTO edges_v1 SELECT * REPLACE ('one#2026' AS log) FROM edges_v1 WHERE seq = 15")
	const not = " is not what the event says"
	got, r := recorded(t, e)
	for i, want := range []string{
		"3 main=true gone=0 twice=0 older=0 events_v1: the column edge" + not + "; events_v1: the column rule" + not,
		"4 main=true gone=0 twice=0 older=0 calls_v1: the column outcome" + not + "; calls_v1: the column queue_us" + not,
		"5 main=true gone=0 twice=0 older=0 edges_v1 has no row of it",
		"7 main=true gone=0 twice=0 older=0 edges_v1: the column agent" + not,
		"9 main=true gone=0 twice=0 older=0 events_v1", // which of the two is the one that differs is not said
		"10 main=true gone=0 twice=1 older=0",
		"11 main=true gone=0 twice=0 older=0 calls_v1 has a row of it, which its event does not make",
		"13 main=true gone=15 twice=0 older=0",
		"14 main=true gone=0 twice=0 older=0 events_v1 has an envelope that is no event's",
		"15 main=true gone=0 twice=0 older=1",
		"4000000000000 main=false gone=0 twice=0 older=0",
	} {
		if i >= len(got) || !strings.HasPrefix(got[i], want) {
			t.Errorf("found\n%s\nwant in line %d\n%s", strings.Join(got, "\n"), i, want)
		}
	}
	if r.First != 1 || r.Last != 17 || r.Others != 0 {
		t.Errorf("%d to %d, %d others", r.First, r.Last, r.Others)
	}
}

// Of an erased session what is left is held against what the tree has of it.
func TestRowsOfErased(t *testing.T) {
	e := engine(t)
	all := made(4, day())
	last := all[len(all)-1]
	erased := schemas.Event{Tenant: "acme", Agent: "researcher", Session: "s0", Seq: last.Seq + 1, Stored: last.Stored.Add(1), Time: last.Time, Data: &schemas.Erased{ID: "x"}}
	all = append(all, erased)
	take(t, writer(t, e, logOf("one", all)), all)
	check := func() (wrong []string) {
		r, err := projections.OpenRows(t.Context(), e, "one")
		if err != nil {
			t.Fatal(err)
		}
		orphans := 0
		for row, err := range r.All {
			if err != nil {
				t.Fatal(err)
			}
			of := all[row.Seq-1]
			if row.Main != (of.Session != "s0" || of.Kind() == schemas.KindErased) {
				t.Errorf("%d: %+v", row.Seq, row)
			}
			if !row.Main {
				orphans++
				wrong = append(wrong, row.Erased(of.Open(), len(of.Body))...)
			}
			wrong = append(wrong, row.Wrong...)
		}
		if orphans == 0 {
			t.Error("nothing is left of what was erased: this test would find nothing")
		}
		return wrong
	}
	if wrong := check(); len(wrong) > 0 {
		t.Error(wrong)
	}
	o, err := e.Options(t.Context(), false)
	if err != nil {
		t.Fatal(err)
	}
	conn, err := clickhouse.Open(o)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close() }()
	ctx := clickhouse.Context(t.Context(), clickhouse.WithSettings(clickhouse.Settings{"mutations_sync": 2}))
	if err := conn.Exec(ctx, "ALTER TABLE calls_v1 UPDATE reason = 'said', status = 7 WHERE seq = 2"); err != nil {
		t.Fatal(err)
	}
	if wrong := check(); !slices.Equal(wrong, []string{"calls_v1: its reason is there, and was erased", "calls_v1: the column status is not what the event says"}) {
		t.Error(wrong)
	}
}
