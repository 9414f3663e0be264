package projections

import (
	"context"
	"fmt"
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

// Whose is the tenant and the agent of a session, and how many events of it the record
// has, erasures left out; 0 for a session that it does not know.
func Whose(ctx context.Context, s Server, key schemas.SessionKey) (t schemas.Tenant, a schemas.Agent, events int, err error) {
	conn, err := open(ctx, s, true)
	if err != nil {
		return "", "", 0, fmt.Errorf("session %s in the record: %w", key, err)
	}
	defer func() { _ = conn.Close() }()
	ctx, cancel := timeless(ctx)
	defer cancel()
	var tenant, agent string
	var n uint64
	err = conn.QueryRow(ctx, "SELECT any(tenant), any(agent), countIf(kind != '"+string(schemas.KindErased)+"') FROM "+main+" WHERE session = ?", string(key)).Scan(&tenant, &agent, &n)
	if err != nil {
		return "", "", 0, fmt.Errorf("session %s in the record: %w", key, refusal(err))
	}
	return schemas.Tenant(tenant), schemas.Agent(agent), int(n), nil
}
