package projections

import (
	"context"
	"fmt"
	"strings"
	"time"

	"github.com/ClickHouse/clickhouse-go/v2"
)

// prepare makes the database, the tables and the views of this program where
// they are missing, and has bodies kept as long as is wanted (0: for ever).
func prepare(ctx context.Context, o *clickhouse.Options, bodies time.Duration) error {
	conn, err := dial(o, 1)
	if err != nil {
		return err
	}
	defer func() { _ = conn.Close() }()
	err = conn.Exec(ctx, "SELECT 1")
	if isCode(err, codeNoDatabase) {
		err = create(ctx, *o)
	}
	if err != nil {
		return fmt.Errorf("database %s: %w", o.Auth.Database, err)
	}
	for _, sql := range schema() {
		if err := conn.Exec(ctx, sql); err != nil {
			return fmt.Errorf("%.60s…: %w", sql, err)
		}
	}
	for _, t := range Tables() {
		if err := t.keepBodies(ctx, conn, bodies); err != nil {
			return fmt.Errorf("how long %s keeps bodies: %w", t.Name, err)
		}
	}
	return nil
}

// create makes the database, for which one has to be in another.
func create(ctx context.Context, o clickhouse.Options) error {
	name := o.Auth.Database
	o.Auth.Database = ""
	conn, err := dial(&o, 1)
	if err != nil {
		return err
	}
	defer func() { _ = conn.Close() }()
	return conn.Exec(ctx, "CREATE DATABASE IF NOT EXISTS "+name)
}

// keepBodies sets after what time the column of bodies is emptied. To set it
// again, even to the same, makes the server go through all that is there.
func (t Table) keepBodies(ctx context.Context, conn clickhouse.Conn, bodies time.Duration) error {
	if t.Bodies == "" {
		return nil
	}
	var made, column string
	if err := conn.QueryRow(ctx, "SELECT create_table_query FROM system.tables WHERE database = currentDatabase() AND name = ?", t.Name).Scan(&made); err != nil {
		return err
	}
	for _, c := range t.columns() {
		if c.Name == t.Bodies {
			column = c.Name + " " + c.Type
		}
	}
	ttl := fmt.Sprintf("TTL toDateTime(stored) + toIntervalSecond(%d)", int64(bodies.Seconds()))
	switch {
	case bodies == 0 && !strings.Contains(made, "TTL toDateTime(stored) +"), bodies != 0 && strings.Contains(made, ttl):
		return nil
	case bodies == 0:
		return conn.Exec(ctx, fmt.Sprintf("ALTER TABLE %s MODIFY COLUMN %s REMOVE TTL", t.Name, t.Bodies))
	}
	return conn.Exec(ctx, fmt.Sprintf("ALTER TABLE %s MODIFY COLUMN %s %s", t.Name, column, ttl))
}
