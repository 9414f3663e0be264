package projections

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"time"

	"github.com/ClickHouse/clickhouse-go/v2"

	"waybill.dev/schemas"
)

// Traffic yields the events of some kinds that were stored at a time or after it,
// of one tenant or ("") of all, in the order in which the log had them, some with a
// [BodyGone] or an [ErrUnreadable]. whole is from when on the record has all; zero if that is since the
// log began.
func Traffic(ctx context.Context, s Server, t schemas.Tenant, kinds []schemas.Kind, from time.Time) (whole time.Time, events iter.Seq2[schemas.Event, error], err error) {
	conn, err := open(ctx, s, true)
	if err != nil {
		return whole, nil, fmt.Errorf("traffic in the record: %w", err)
	}
	var first uint64
	var begun time.Time
	// Of several logs, one after the other, it is the first that may have begun earlier.
	if err := conn.QueryRow(ctx, "SELECT argMin(seq, stored), min(stored) FROM "+main).Scan(&first, &begun); err != nil {
		_ = conn.Close()
		return whole, nil, fmt.Errorf("traffic in the record: %w", refusal(err))
	}
	switch begun = begun.UTC(); {
	case begun.Before(from):
		whole = from
	case first > 1:
		whole = begun
	}
	return whole, func(yield func(schemas.Event, error) bool) {
		defer func() { _ = conn.Close() }()
		ctx, cancel := timeless(ctx)
		defer cancel()
		fail := func(err error) { yield(schemas.Event{}, fmt.Errorf("traffic in the record: %w", err)) }
		var names []string
		for _, k := range kinds {
			names = append(names, string(k))
		}
		// An hour at a time, by the table's order: what is sorted is bounded.
		var last time.Time
		if err := conn.QueryRow(ctx, "SELECT max(stored) FROM "+main).Scan(&last); err != nil {
			fail(refusal(err))
			return
		}
		if from.Before(begun) {
			from = begun
		}
		for !from.After(last) {
			to := from.Truncate(time.Hour).Add(time.Hour)
			more, err := hour(ctx, conn, t, names, from, to, yield)
			if err != nil {
				fail(err)
			}
			if err != nil || !more {
				return
			}
			from = to
		}
	}, nil
}

// hour yields the events of a span of time; more is false when no more are wanted.
func hour(ctx context.Context, conn clickhouse.Conn, t schemas.Tenant, kinds []string, from, to time.Time, yield func(schemas.Event, error) bool) (more bool, err error) {
	sql := "SELECT seq, stored, envelope, body_size, body FROM " + main + " WHERE stored >= fromUnixTimestamp64Nano(toInt64(?)) AND stored < fromUnixTimestamp64Nano(toInt64(?)) AND kind IN ?"
	args := []any{from.UnixNano(), to.UnixNano(), kinds}
	if t != "" {
		sql, args = sql+" AND tenant = ?", append(args, string(t))
	}
	rows, err := conn.Query(ctx, sql+" ORDER BY stored, log, seq LIMIT 1 BY log, seq", args...)
	if err != nil {
		return false, refusal(err)
	}
	defer func() { _ = rows.Close() }()
	for rows.Next() {
		e, err := scanEvent(rows.Scan)
		if gone := new(BodyGone); err != nil && !errors.As(err, &gone) && !errors.Is(err, ErrUnreadable) {
			return false, err
		}
		if !yield(e, err) {
			return false, nil
		}
	}
	return true, refusal(rows.Err())
}

// scanEvent reads a row of seq, stored, envelope, body_size and body. Besides an
// event there may be a [BodyGone]; in the place of one, an [ErrUnreadable].
func scanEvent(scan func(...any) error) (e schemas.Event, err error) {
	var seq uint64
	var stored time.Time
	var envelope string
	var size uint32
	var body []byte
	if err := scan(&seq, &stored, &envelope, &size, &body); err != nil {
		return e, err
	}
	if err := e.UnmarshalString(envelope); err != nil {
		return schemas.Event{Seq: seq, Stored: stored.UTC()}, fmt.Errorf("%w: sequence %d: %w", ErrUnreadable, seq, err)
	}
	e.Seq, e.Stored = seq, stored.UTC()
	if len(body) > 0 {
		e.Body = body
	} else if size > 0 {
		return e, &BodyGone{Size: int(size)}
	}
	return e, nil
}
