// Package projections makes of the log a record that people query: rows of
// ClickHouse. A [Table] says what of an event is a row; the [Writer] writes all
// tables, each event exactly once; [Query] asks, as a user who can only read;
// an [Engine] is the ClickHouse inside. Begin with [Tables] and [Questions],
// which list what there is.
package projections

import (
	"fmt"
	"strings"
	"time"

	"waybill.dev/schemas"
)

// Database is where everything of ours is, unless a [DSN] names another.
const Database = "waybill"

// Table is a table of the record. Its name carries its version: when what a
// table holds changes, the next version is made beside it from the log or from
// events_v1, and the view of the plain name is pointed at it.
type Table struct {
	Name    string
	View    string // plain name under which people find the newest version
	Help    string
	Columns []Column
	More    []string // columns with defaults, and indexes, that no row has
	Order   string   // ORDER BY; it ends in what is unique
	Final   bool     // the view shows one row for each key: the first event counts
	Bodies  string   // the column that is emptied when bodies are no longer kept, if any

	// Row appends what the table holds of an event, a value for each column,
	// from the event alone, so that the same event is the same row for ever; it
	// returns nil where that is nothing. The log's identity, sequence and time
	// come first, see placed.
	Row func(row []any, e schemas.Event) []any
}

// Column is a column of a table.
type Column struct{ Name, Type string }

// word is a value of a LowCardinality column. None costs the driver no look-up.
func word[S ~string](s S) any {
	if s == "" {
		return nil
	}
	return string(s)
}

// Tables are all tables.
func Tables() []Table { return []Table{sessions(), edges(), calls(), events()} }

// main is the table that is written last, so that what it holds, the others
// hold, and which tells what the record has.
const main = "events_v1"

// placed are the first columns of every table: which log, where in it, since
// when.
func placed() []Column {
	return []Column{
		{"log", "LowCardinality(String)"}, // a log that begins anew counts from 1 again
		{"seq", "UInt64 CODEC(Delta, ZSTD(1))"},
		{"stored", "DateTime64(9, 'UTC') CODEC(Delta, ZSTD(1))"},
	}
}

// ofCall are the columns by which events and calls are found alike.
func ofCall() []Column {
	return []Column{
		{"tenant", "LowCardinality(String)"},
		{"session", "String CODEC(ZSTD(1))"},
		{"call", "String CODEC(ZSTD(1))"},
		{"parent", "String CODEC(ZSTD(1))"},
		{"root", "String CODEC(ZSTD(1))"},
		{"agent", "LowCardinality(String)"},
	}
}

// ofTrace are the ids of the trace that a call belongs to, of its span, and of
// the span by which it was made.
func ofTrace() []Column {
	return []Column{
		{"trace_id", "String CODEC(ZSTD(1))"},
		{"span_id", "String CODEC(ZSTD(1))"},
		{"parent_span_id", "String CODEC(ZSTD(1))"},
	}
}

func traceRow(row []any, e schemas.Event) []any {
	return append(row, e.TraceID(), e.SpanID(), e.ParentSpan())
}

func callRow(row []any, e schemas.Event) []any {
	return append(row, word(e.Tenant), string(e.Session), string(e.Call), string(e.Parent), string(e.Root), word(e.Agent))
}

func targetColumns() []Column {
	return []Column{
		{"protocol", "LowCardinality(String)"},
		{"server", "LowCardinality(String)"},
		{"method", "LowCardinality(String)"},
		{"name", "LowCardinality(String)"},
	}
}

func targetRow(row []any, t schemas.Target) []any {
	return append(row, word(t.Protocol), word(t.Server), word(t.Method), word(t.Name))
}

// at is a time as a column takes it; none is the beginning of 1970.
func at(t time.Time) time.Time {
	if t.IsZero() {
		return time.Unix(0, 0).UTC()
	}
	return t.UTC()
}

// micros is how long something took; the log's clock may have been set back.
func micros(from, to time.Time) uint64 {
	if from.IsZero() || to.IsZero() || to.Before(from) {
		return 0
	}
	return uint64(to.Sub(from).Microseconds())
}

// window is how many blocks of a table ClickHouse remembers by their tokens:
// those of an hour at full speed.
const window = 10000

// ddl makes the table. A month is a partition, by the log's time: it never
// changes, and grows with the sequence, so that a batch is one block of one
// partition, which is there whole or not at all. What is written is on disk when
// it is acknowledged, since the log will not have it for ever.
//
// The engine drops rows of the same key when it merges. No such rows come of
// the writer; this is the second net.
func (t Table) ddl() string {
	var lines []string
	for _, c := range t.columns() {
		lines = append(lines, c.Name+" "+c.Type)
	}
	lines = append(lines, t.More...)
	engine := "ReplacingMergeTree"
	if t.Final {
		lines = append(lines, "first UInt64 MATERIALIZED 18446744073709551615 - seq") // the first in sequence wins
		engine = "ReplacingMergeTree(first)"
	}
	return fmt.Sprintf("CREATE TABLE IF NOT EXISTS %s (\n  %s\n) ENGINE = %s PARTITION BY toYYYYMM(stored) ORDER BY (%s)\n"+
		"SETTINGS non_replicated_deduplication_window = %d, fsync_after_insert = 1, fsync_part_directory = 1",
		t.Name, strings.Join(lines, ",\n  "), engine, t.Order, window)
}

func (t Table) view() string {
	final := ""
	if t.Final {
		final = " FINAL"
	}
	return fmt.Sprintf("CREATE OR REPLACE VIEW %s AS SELECT * FROM %s%s", t.View, t.Name, final)
}

func (t Table) columns() []Column { return append(placed(), t.Columns...) }

func (t Table) insert() string {
	var names []string
	for _, c := range t.columns() {
		names = append(names, c.Name)
	}
	return fmt.Sprintf("INSERT INTO %s (%s)", t.Name, strings.Join(names, ", "))
}
