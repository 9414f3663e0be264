package projections

import (
	"context"
	"encoding/hex"
	"fmt"
	"iter"
	"reflect"
	"slices"
	"strings"
	"time"

	"github.com/ClickHouse/clickhouse-go/v2"

	"waybill.dev/schemas"
)

// StoredRow is a row of a table as text, by column: what the record has, or what it
// should have.
type StoredRow struct {
	Table  string            `json:"table"`
	Seq    uint64            `json:"seq"`
	Values map[string]string `json:"values"`
}

// RowsOf are the rows that the tables should have of an event. It is pure.
func RowsOf(e schemas.Event) []StoredRow {
	var rows []StoredRow
	for _, t := range Tables() {
		values := t.Row(nil, e)
		if values == nil {
			continue
		}
		r := StoredRow{Table: t.Name, Seq: e.Seq, Values: map[string]string{"stored": inText(e.Stored)}}
		for i, c := range t.Columns {
			r.Values[c.Name] = inText(values[i])
		}
		rows = append(rows, r)
	}
	return rows
}

// FirstOnly tells of a table that it keeps, of the rows that are about the same, the
// first only.
func FirstOnly(table string) bool {
	return slices.ContainsFunc(Tables(), func(t Table) bool { return t.Name == table && t.Final })
}

// inText is a value as ClickHouse writes it with toString; what is no text in
// hexadecimal.
func inText(v any) string {
	switch v := v.(type) {
	case nil:
		return ""
	case string:
		return v
	case []byte:
		return hex.EncodeToString(v)
	case time.Time:
		return at(v).Format("2006-01-02 15:04:05.000000000")
	}
	switch r := reflect.ValueOf(v); r.Kind() {
	case reflect.String:
		return r.String()
	default:
		return fmt.Sprint(v)
	}
}

// select is the question for a table's rows of a session as text.
func (t Table) ofSession() string {
	var columns []string
	for _, c := range t.columns() {
		switch {
		case c.Name == "log":
		case c.Name == "body" || strings.HasPrefix(c.Type, "FixedString"):
			columns = append(columns, "lower(hex("+c.Name+"))")
		default:
			columns = append(columns, "toString("+c.Name+")")
		}
	}
	return "SELECT seq AS place, [" + strings.Join(columns, ", ") + "] AS texts FROM " + t.Name +
		" WHERE tenant = ? AND session = ? AND (log = ? OR startsWith(log, ?)) ORDER BY seq, log DESC LIMIT 1 BY seq"
}

// SessionRows are the rows of a session that the record has of a log, table by
// table, each in the order of the log. Of a sequence that the log has given twice
// it is the later one.
func SessionRows(ctx context.Context, s Server, log string, tenant schemas.Tenant, key schemas.SessionKey) iter.Seq2[StoredRow, error] {
	return func(yield func(StoredRow, error) bool) {
		conn, err := open(ctx, s, true)
		if err != nil {
			yield(StoredRow{}, fmt.Errorf("rows of session %s in the record: %w", key, err))
			return
		}
		defer func() { _ = conn.Close() }()
		ctx, cancel := timeless(ctx)
		defer cancel()
		for _, t := range Tables() {
			if !t.yieldRows(ctx, conn, log, tenant, key, yield) {
				return
			}
		}
	}
}

func (t Table) yieldRows(ctx context.Context, conn clickhouse.Conn, log string, tenant schemas.Tenant, key schemas.SessionKey, yield func(StoredRow, error) bool) bool {
	fail := func(err error) bool {
		yield(StoredRow{}, fmt.Errorf("rows of session %s in %s: %w", key, t.Name, err))
		return false
	}
	rows, err := conn.Query(ctx, t.ofSession(), string(tenant), string(key), log, log+"#")
	if err != nil {
		return fail(refusal(err))
	}
	defer func() { _ = rows.Close() }()
	for rows.Next() {
		r := StoredRow{Table: t.Name, Values: map[string]string{}}
		var texts []string
		if err := rows.Scan(&r.Seq, &texts); err != nil {
			return fail(err)
		}
		i := 0
		for _, c := range t.columns() {
			if c.Name == "log" {
				continue
			}
			if c.Name != "seq" {
				r.Values[c.Name] = texts[i]
			}
			i++
		}
		if !yield(r, nil) {
			return false
		}
	}
	if err := rows.Err(); err != nil {
		return fail(refusal(err))
	}
	return true
}
