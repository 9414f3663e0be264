package projections

import (
	"context"
	"fmt"
	"iter"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/ClickHouse/clickhouse-go/v2"

	"waybill.dev/schemas"
)

const (
	// eraseTime is how long the engine may take to rewrite what it holds of a session.
	eraseTime = 5 * time.Minute
	// forgetTime is how long the record waits for what that has replaced to be gone.
	// Whoever reads it keeps it, and must not keep the record.
	forgetTime = 15 * time.Second
)

// erase removes what was said in a session before an erasure: its events, of
// every log, and the texts in what is derived of them; calls, times and names stay.
// It comes behind all of them in the log's order, so nothing is written after it.
func (w *Writer) erase(ctx context.Context, e schemas.Event) error {
	ctx, cancel := context.WithTimeout(clickhouse.Context(ctx, clickhouse.WithSettings(clickhouse.Settings{"mutations_sync": 2})), eraseTime)
	defer cancel()
	of := " WHERE tenant = ? AND session = ? AND (log != ? OR seq < ?)"
	changes := map[string]string{
		main:          "DELETE" + of + " AND kind != '" + string(schemas.KindErased) + "'",
		"calls_v1":    "UPDATE reason = ''" + of + " AND reason != ''",
		"sessions_v1": "UPDATE reason = ''" + of + " AND reason != ''",
	}
	each := func(sql string, args ...any) error {
		for table, change := range changes {
			if err := w.conn.Exec(ctx, "ALTER TABLE "+table+" "+strings.Replace(sql, "CHANGE", change, 1), args...); err != nil {
				return fmt.Errorf("erase session %s in %s: %w", e.Session, table, err)
			}
		}
		return nil
	}
	// What the old parts hold would be there for another 8 minutes.
	if err := each("MODIFY SETTING old_parts_lifetime = 1"); err != nil {
		return err
	}
	if err := each("CHANGE", string(e.Tenant), string(e.Session), w.place.log, e.Seq); err != nil {
		return err
	}
	// The engine looks for old parts when it has something to do, and otherwise
	// every half a minute. There is no such partition.
	look := func() error { return each("DROP PARTITION 190001") }
	waiting, done := context.WithTimeout(ctx, forgetTime)
	defer done()
	switch err := w.forget(waiting, slices.Collect(maps.Keys(changes)), look); {
	case err != nil && waiting.Err() != nil && ctx.Err() == nil:
		w.o.Log.Warn("a session is erased in the record; what was replaced is still read by a query, and goes when that ends", "session", e.Session, "error", err)
		return nil // with the setting, so that it goes at once then
	case isCode(err, codeDenied):
		w.o.Log.Warn("a session is erased in the record; that the engine has removed its old parts cannot be seen without SELECT on system.parts", "session", e.Session, "error", err)
	case err != nil:
		return fmt.Errorf("erase session %s: %w", e.Session, err)
	}
	return each("RESET SETTING old_parts_lifetime")
}

// forget waits until the tables have no old parts any more.
func (w *Writer) forget(ctx context.Context, tables []string, look func() error) error {
	again := time.NewTicker(500 * time.Millisecond)
	defer again.Stop()
	for {
		if err := look(); err != nil {
			return err
		}
		var left uint64
		if err := w.conn.QueryRow(ctx, "SELECT count() FROM system.parts WHERE NOT active AND database = currentDatabase() AND table IN ?", tables).Scan(&left); err != nil {
			return err
		}
		if left == 0 {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%d old parts are still there: %w", left, ctx.Err())
		case <-again.C:
		}
	}
}

// rowsAtOnce is how many events are read with one question.
const rowsAtOnce = 10_000

// Rows are the events of a log that the record has: from which sequence to which,
// and all of them in its order. Of a sequence that the log has given twice
// (place.go) it is the later one, which the log has. A body that has gone by its
// age is absent.
func Rows(ctx context.Context, s Server, log string) (first, last uint64, events iter.Seq2[schemas.Event, error], err error) {
	conn, err := open(ctx, s, true)
	if err != nil {
		return 0, 0, nil, fmt.Errorf("events in the record: %w", err)
	}
	var count uint64
	err = conn.QueryRow(ctx, "SELECT count(), min(seq), max(seq) FROM "+main+" WHERE log = ? OR startsWith(log, ?)", log, log+"#").Scan(&count, &first, &last)
	if err != nil {
		_ = conn.Close()
		return 0, 0, nil, fmt.Errorf("events in the record: %w", refusal(err))
	}
	if count == 0 {
		first, last = 1, 0
	}
	return first, last, func(yield func(schemas.Event, error) bool) {
		defer func() { _ = conn.Close() }()
		ctx, cancel := timeless(ctx)
		defer cancel()
		for from := first; from <= last; from += rowsAtOnce {
			if !someRows(ctx, conn, log, from, yield) {
				return
			}
		}
	}, nil
}

// someRows yields the events of one question; it is false when that was the end.
func someRows(ctx context.Context, conn clickhouse.Conn, log string, from uint64, yield func(schemas.Event, error) bool) bool {
	fail := func(err error) bool {
		yield(schemas.Event{}, fmt.Errorf("events in the record from %d on: %w", from, err))
		return false
	}
	rows, err := conn.Query(ctx, "SELECT seq, stored, envelope, body FROM "+main+" WHERE (log = ? OR startsWith(log, ?)) AND seq >= ? AND seq < ? ORDER BY seq, log DESC LIMIT 1 BY seq", log, log+"#", from, from+rowsAtOnce)
	if err != nil {
		return fail(refusal(err))
	}
	defer func() { _ = rows.Close() }()
	for rows.Next() {
		var e schemas.Event
		var seq uint64
		var stored time.Time
		var envelope string
		var body []byte
		if err := rows.Scan(&seq, &stored, &envelope, &body); err != nil {
			return fail(err)
		}
		// What cannot be read is no event, and is told from what was signed by
		// whoever compares.
		_ = e.UnmarshalString(envelope)
		e.Seq, e.Stored = seq, stored.UTC()
		if len(body) > 0 {
			e.Body = body
		}
		if !yield(e, nil) {
			return false
		}
	}
	if err := rows.Err(); err != nil {
		return fail(refusal(err))
	}
	return true
}
