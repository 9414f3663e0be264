package projections

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/ClickHouse/clickhouse-go/v2"
	"github.com/ClickHouse/clickhouse-go/v2/lib/column"

	"waybill.dev/schemas"
)

// ResultColumn is a column of an answer.
type ResultColumn struct {
	Name string `json:"name"`
	Type string `json:"type"`
}

// Progress is how far a query is.
type Progress struct {
	Rows, Bytes, Total uint64 // read, read, to be read as far as is known
}

// Answer is told what a query yields: its columns first, then row by row, which
// is only lent. Progress comes in between, never at the same time.
type Answer struct {
	Columns  func([]ResultColumn) error
	Row      func([]any) error
	Progress func(Progress) // may be nil
}

// ErrQuery is wrapped by errors of whoever asked: the query was understood and
// not carried out.
var ErrQuery = errors.New("the query is refused")

// reading are the words with which a statement may begin.
var reading = []string{"SELECT", "WITH", "FROM", "SHOW", "DESCRIBE", "DESC", "EXPLAIN", "EXISTS"}

// blank is what may stand before a statement's first word.
var blank = regexp.MustCompile(`^(?s:\s|\(|--[^\n]*(\n|$)|#[^\n]*(\n|$)|/\*.*?\*/)*`)

// reads tells whether a statement is of those that read. The server decides what
// its user may do; this is for users who may do more than they are asked to
// here, such as to kill their own queries.
func reads(sql string) bool {
	rest := sql[len(blank.FindString(sql)):]
	word := rest[:len(rest)-len(strings.TrimLeft(rest, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ_"))]
	return slices.Contains(reading, strings.ToUpper(word))
}

// Query asks one question as the user who can only read.
func Query(ctx context.Context, s Server, sql string, a Answer) error {
	if !reads(sql) {
		return fmt.Errorf("%w: it is none that reads; these begin with %s", ErrQuery, strings.Join(reading, ", "))
	}
	conn, err := open(ctx, s, true)
	if err != nil {
		return err
	}
	defer func() { _ = conn.Close() }()
	ctx, cancel := timeless(ctx)
	defer cancel()
	// The driver tells progress from a goroutine of its own, which may be late.
	var turn sync.Mutex
	over := false
	defer func() { turn.Lock(); over = true; turn.Unlock() }()
	if a.Progress != nil {
		var sum Progress
		ctx = clickhouse.Context(ctx, clickhouse.WithProgress(func(p *clickhouse.Progress) {
			turn.Lock()
			defer turn.Unlock()
			if over {
				return
			}
			sum.Rows += p.Rows
			sum.Bytes += p.Bytes
			sum.Total += p.TotalRows
			a.Progress(sum)
		}))
	}
	rows, err := conn.Query(ctx, sql)
	if err != nil {
		return refusal(err)
	}
	defer func() {
		cancel() // or the rest of the answer would be read
		_ = rows.Close()
	}()
	var columns []ResultColumn
	var dest []any
	for _, c := range rows.ColumnTypes() {
		columns = append(columns, ResultColumn{c.Name(), c.DatabaseTypeName()})
		dest = append(dest, reflect.New(c.ScanType()).Interface())
	}
	turn.Lock()
	err = a.Columns(columns)
	turn.Unlock()
	if err != nil {
		return err
	}
	values := make([]any, len(dest))
	for rows.Next() {
		if err := rows.Scan(dest...); err != nil {
			return fmt.Errorf("read the answer: %w", err)
		}
		for i, d := range dest {
			values[i] = reflect.ValueOf(d).Elem().Interface()
		}
		turn.Lock()
		err := a.Row(values)
		turn.Unlock()
		if err != nil {
			return err
		}
	}
	return refusal(rows.Err())
}

// timeless is a context that ends with ctx and says nothing of when that is: the
// driver would make a setting of it, and who can only read may change none.
func timeless(ctx context.Context) (context.Context, context.CancelFunc) {
	own, cancel := context.WithCancel(context.WithoutCancel(ctx))
	stop := context.AfterFunc(ctx, cancel)
	return own, func() { stop(); cancel() }
}

// refusal marks what the server itself said.
func refusal(err error) error {
	var e *clickhouse.Exception
	if errors.As(err, &e) {
		text := []rune(e.Message) // of a syntax error it lists all that could stand there
		if len(text) > 400 {
			text = append(text[:400], '…')
		}
		hint := ""
		if e.Code == codeNoColumns || e.Code == codeNoParameter {
			hint = asked(e.Message)
		}
		return fmt.Errorf("%w (code %d): %s%s", ErrQuery, e.Code, string(text), hint)
	}
	if t := new(column.UnsupportedColumnTypeError); errors.As(err, &t) {
		return fmt.Errorf("%w: a column of the answer has no form outside of ClickHouse: %w; of the state of an aggregate function finalizeAggregation() makes a value, of others toString()", ErrQuery, t)
	}
	return err
}

// What the server says of a prepared question that lacks its parameters.
const (
	codeNoColumns   = 51  // EMPTY_LIST_OF_COLUMNS_QUERIED
	codeNoParameter = 456 // UNKNOWN_QUERY_PARAMETER
)

// from is what a query asks.
var from = regexp.MustCompile(`(?i)\bfrom\s+(?:\w+\.)?(\w+)`)

// asked says how the prepared question is asked of which an error speaks.
func asked(message string) string {
	for _, m := range from.FindAllStringSubmatch(message, -1) {
		for _, q := range Questions() {
			if q.Name == m[1] {
				return fmt.Sprintf(". %s is a prepared question and wants its parameters: %s", q.Name, q.Example)
			}
		}
	}
	return ""
}

// BodyGone is yielded with an event whose body the record no longer keeps.
type BodyGone struct{ Size int }

func (g *BodyGone) Error() string {
	return fmt.Sprintf("the body of %d bytes is no longer kept", g.Size)
}

// ErrUnreadable is wrapped by what is yielded in the place of an event that this
// program cannot read: a newer one has written it.
var ErrUnreadable = errors.New("unreadable event")

// Session yields the events of a session from the record, in the order in which
// the log had them, some with a [BodyGone] or an [ErrUnreadable].
func Session(ctx context.Context, s Server, key schemas.SessionKey) iter.Seq2[schemas.Event, error] {
	return func(yield func(schemas.Event, error) bool) {
		fail := func(err error) { yield(schemas.Event{}, fmt.Errorf("session %s in the record: %w", key, err)) }
		conn, err := open(ctx, s, true)
		if err != nil {
			fail(err)
			return
		}
		defer func() { _ = conn.Close() }()
		ctx, cancel := timeless(ctx)
		defer cancel()
		// Two logs may both have the session; the older comes first.
		rows, err := conn.Query(ctx, "SELECT seq, stored, envelope, body_size, body FROM "+main+" WHERE session = ? ORDER BY log, seq LIMIT 1 BY log, seq", string(key))
		if err != nil {
			fail(refusal(err))
			return
		}
		defer func() { _ = rows.Close() }()
		for rows.Next() {
			var seq uint64
			var stored time.Time
			var envelope string
			var size uint32
			var body []byte
			if err := rows.Scan(&seq, &stored, &envelope, &size, &body); err != nil {
				fail(err)
				return
			}
			var e schemas.Event
			if err := e.UnmarshalString(envelope); err != nil {
				odd := schemas.Event{Seq: seq, Stored: stored.UTC()}
				if !yield(odd, fmt.Errorf("%w: %w", ErrUnreadable, err)) {
					return
				}
				continue
			}
			e.Seq, e.Stored = seq, stored.UTC()
			if len(body) > 0 {
				e.Body = body
			}
			var gone error
			if len(body) == 0 && size > 0 {
				gone = &BodyGone{Size: int(size)}
			}
			if !yield(e, gone) {
				return
			}
		}
		if err := rows.Err(); err != nil {
			fail(refusal(err))
		}
	}
}
