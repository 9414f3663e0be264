package projections

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"maps"
	"reflect"
	"slices"
	"strings"
	"time"

	"github.com/ClickHouse/clickhouse-go/v2"

	"waybill.dev/schemas"
)

// Rows are the rows of one log, in all tables, to be held against the log.
type Rows struct {
	First, Last uint64 // sequences of events_v1; First is above Last where it has none
	Others      uint64 // events of other logs, of which this one says nothing

	// All yields what there is of each sequence, in their order. It is read once.
	All iter.Seq2[Recorded, error]
}

// Recorded is what the tables have of one sequence of a log.
type Recorded struct {
	Seq   uint64
	Main  bool          // events_v1 has it
	Event schemas.Event // that it has; without Data where it cannot be read
	Gone  int           // bytes of the body, which is not kept any more
	Wrong []string      // what of the rows is not what the event makes, in words
	Twice int           // rows that are there again, all the same
	Older int           // rows of an event that the log has lost, and has given its sequence again (place.go)

	orphans []found // rows of other tables without the one of events_v1
}

// compared is a table with its columns at hand.
type compared struct {
	Table
	columns []Column
	reason  int // which of them is; -1 for none
}

// found is a row as it was found: the values of its columns.
type found struct {
	table  *compared
	values []any // pointers
}

// at is where in which log, by its name, a row is.
func (f found) at() (seq uint64, log string) { return *f.values[1].(*uint64), *f.values[0].(*string) }

const (
	// rowsAtOnce is over how many sequences a question reaches.
	rowsAtOnce = 10_000
	// searches is how many missing rows are looked for elsewhere, if none is found.
	searches = 1000
)

// OpenRows finds the rows of a log. All tables are read whole, and what they have of
// a sequence is held against what the event in events_v1 makes of itself, column by
// column. So it is enough to hold that event against the log. Of a sequence that
// the log has given twice it is the later one, which the log has. A body that has
// gone by its age is absent.
func OpenRows(ctx context.Context, s Server, log string) (Rows, error) {
	conn, err := open(ctx, s, true)
	if err != nil {
		return Rows{}, fmt.Errorf("events in the record: %w", err)
	}
	defer func() { _ = conn.Close() }()
	c := comparer{conn: conn, log: log}
	for _, t := range Tables() {
		of := compared{t, t.columns(), -1}
		of.reason = slices.IndexFunc(of.columns, func(c Column) bool { return c.Name == "reason" })
		c.tables = append(c.tables, of)
	}
	var r Rows
	var from, to uint64
	for _, t := range c.tables {
		var count, all, first, last uint64
		err := conn.QueryRow(ctx, "SELECT countIf(ours), count(), minIf(seq, ours), maxIf(seq, ours) FROM (SELECT seq, "+ours+" AS ours FROM "+t.Name+")", c.args()...).
			Scan(&count, &all, &first, &last)
		if err != nil {
			return Rows{}, fmt.Errorf("events in the record: %w", refusal(err))
		}
		if t.Name == main {
			r.First, r.Last, r.Others = first, last, all-count
			if count == 0 {
				r.First, r.Last = 1, 0
			}
		}
		if count > 0 && to == 0 {
			from, to = first, last
		} else if count > 0 {
			from, to = min(from, first), max(to, last)
		}
	}
	r.All = func(yield func(Recorded, error) bool) {
		// Its own connections, as nobody may ever want it: one looks for what is missing
		// while the other reads.
		conn, err := openSome(ctx, s, true, 2)
		if err != nil {
			yield(Recorded{}, fmt.Errorf("events in the record: %w", err))
			return
		}
		defer func() { _ = conn.Close() }()
		c := c
		c.conn = conn
		ctx, cancel := timeless(ctx)
		defer cancel()
		for from <= to && to > 0 {
			end := from + min(to-from, rowsAtOnce-1)
			err := c.some(ctx, from, end, func(r Recorded) bool { return yield(r, nil) })
			if err == nil && end < to {
				// There may be nothing for long, which nobody but a forger makes.
				from, err = c.next(ctx, end+1, to)
			}
			if err != nil && !errors.Is(err, errEnough) {
				yield(Recorded{}, fmt.Errorf("events in the record from %d on: %w", from, err))
			}
			if err != nil || end == to {
				return
			}
		}
	}
	return r, nil
}

// ours are the rows of a log, by [comparer.args].
const ours = "(log = ? OR startsWith(log, ?))"

// comparer reads rows and compares them. It is used by one goroutine.
type comparer struct {
	conn   clickhouse.Conn
	log    string
	tables []compared
	looked int // for missing rows, since one was found
}

func (c *comparer) args(more ...any) []any { return append([]any{c.log, c.log + "#"}, more...) }

// next is the first sequence from one on, up to another, that a table has.
func (c *comparer) next(ctx context.Context, from, to uint64) (uint64, error) {
	first := to
	for _, t := range c.tables {
		var n, seq uint64
		err := c.conn.QueryRow(ctx, "SELECT count(), min(seq) FROM "+t.Name+" WHERE "+ours+" AND seq >= ? AND seq <= ?", c.args(from, to)...).Scan(&n, &seq)
		if err != nil {
			return 0, refusal(err)
		}
		if n > 0 {
			first = min(first, seq)
		}
	}
	return first, nil
}

// errEnough ends a reading early.
var errEnough = errors.New("nobody wants more")

// read reads a table's rows from one sequence to another, by sequence, of one
// sequence those of the latest name of the log first.
func (c *comparer) read(ctx context.Context, t *compared, from, to uint64, take func(found) error) error {
	var names []string
	for _, col := range t.columns {
		names = append(names, col.Name)
	}
	rows, err := c.conn.Query(ctx, "SELECT "+strings.Join(names, ", ")+" FROM "+t.Name+" WHERE "+ours+" AND seq >= ? AND seq <= ? ORDER BY seq, log DESC", c.args(from, to)...)
	if err != nil {
		return refusal(err)
	}
	defer func() { _ = rows.Close() }()
	for rows.Next() {
		f := found{table: t, values: make([]any, len(names))}
		for i, of := range rows.ColumnTypes() {
			f.values[i] = reflect.New(of.ScanType()).Interface()
		}
		if err := rows.Scan(f.values...); err != nil {
			return err
		}
		if err := take(f); err != nil {
			return err
		}
	}
	return refusal(rows.Err())
}

// some yields what there is from one sequence to another. It returns errEnough when
// nobody wants more.
func (c *comparer) some(ctx context.Context, from, to uint64, yield func(Recorded) bool) error {
	// The events come one by one, since they have bodies, and the rest is at hand.
	others := map[uint64][]found{}
	var events *compared
	for i := range c.tables {
		t := &c.tables[i]
		if t.Name == main {
			events = t
			continue
		}
		err := c.read(ctx, t, from, to, func(f found) error {
			seq, _ := f.at()
			others[seq] = append(others[seq], f)
			return nil
		})
		if err != nil {
			return err
		}
	}
	seqs := slices.Sorted(maps.Keys(others))
	alone := func(before uint64) error { // those without an event
		for len(seqs) > 0 && seqs[0] < before {
			seq := seqs[0]
			seqs = seqs[1:]
			if !yield(Recorded{Seq: seq, orphans: others[seq]}) {
				return errEnough
			}
		}
		return nil
	}
	var group []found // events of one sequence
	compare := func() error {
		if len(group) == 0 {
			return nil
		}
		seq, _ := group[0].at()
		if err := alone(seq); err != nil {
			return err
		}
		if len(seqs) > 0 && seqs[0] == seq {
			seqs = seqs[1:]
		}
		r, err := c.compare(ctx, seq, group, others[seq])
		if err != nil {
			return err
		}
		group = group[:0]
		if !yield(r) {
			return errEnough
		}
		return nil
	}
	err := c.read(ctx, events, from, to, func(f found) error {
		if len(group) > 0 {
			before, _ := group[0].at()
			if seq, _ := f.at(); seq != before {
				if err := compare(); err != nil {
					return err
				}
			}
		}
		group = append(group, f)
		return nil
	})
	if err == nil {
		err = compare()
	}
	if err == nil {
		err = alone(to + 1)
	}
	return err
}

// compare holds the rows of a sequence against its events, of which there is more
// than one only where the log has given the sequence again, or somebody has added
// one.
func (c *comparer) compare(ctx context.Context, seq uint64, events, others []found) (Recorded, error) {
	r := Recorded{Seq: seq, Main: true}
	_, newest := events[0].at()
	for i, f := range events {
		_, log := f.at()
		first := i == 0
		if !first {
			if _, before := events[i-1].at(); before == log {
				// The one of these that is compared below is the first.
				if f.equal(events[i-1]) {
					r.Twice++
				} else {
					r.Wrong = append(r.Wrong, main+" has rows of it that differ")
				}
				continue
			}
			r.Older++
		}
		e, gone := event(f)
		if first {
			r.Event, r.Gone = e, gone
		}
		if e.Data == nil {
			r.Wrong = append(r.Wrong, main+" has an envelope that is no event's")
			continue
		}
		full := e
		except := []string{}
		if gone > 0 {
			full.Body = make([]byte, gone) // of which only the size counts
			except = []string{"body", "body_sha256"}
		}
		for _, what := range f.differs(f.row(full), except...) {
			r.Wrong = append(r.Wrong, main+": "+what)
		}
		var mine []found
		for _, o := range others {
			if _, of := o.at(); of == log {
				mine = append(mine, o)
			}
		}
		wrong, twice, err := c.derived(ctx, log, full, mine)
		if err != nil {
			return r, err
		}
		if log == newest {
			r.Twice += twice
		}
		r.Wrong = append(r.Wrong, wrong...)
	}
	for _, o := range others {
		_, log := o.at()
		if !slices.ContainsFunc(events, func(f found) bool { _, of := f.at(); return of == log }) {
			r.Older++
		}
	}
	return r, nil
}

// derived holds the rows of the other tables, under one name of the log, against
// their event.
func (c *comparer) derived(ctx context.Context, log string, e schemas.Event, rows []found) (wrong []string, twice int, err error) {
	for i := range c.tables {
		t := &c.tables[i]
		if t.Name == main {
			continue
		}
		want := t.Row([]any{log, e.Seq, at(e.Stored)}, e)
		n := 0
		for _, f := range rows {
			if f.table.Name != t.Name {
				continue
			}
			n++
			if want == nil {
				wrong = append(wrong, t.Name+" has a row of it, which its event does not make")
				continue
			}
			differs := f.differs(want)
			if n > 1 && len(differs) == 0 {
				twice++
			}
			for _, what := range differs {
				wrong = append(wrong, t.Name+": "+what)
			}
		}
		if want == nil || n > 0 {
			continue
		}
		// Of two with the same key one is left: the first.
		there := false
		if t.Final && c.looked < searches {
			c.looked++
			if there, err = c.merged(ctx, t, e); err != nil {
				return nil, 0, err
			}
			if there {
				c.looked = 0
			}
		}
		if !there {
			wrong = append(wrong, t.Name+" has no row of it")
		}
	}
	return wrong, twice, nil
}

// merged tells whether a table has another row of an event's call.
func (c *comparer) merged(ctx context.Context, t *compared, e schemas.Event) (bool, error) {
	var n uint64
	err := c.conn.QueryRow(ctx, "SELECT count() FROM "+t.Name+" WHERE tenant = ? AND session = ? AND call = ? AND seq != ?", string(e.Tenant), string(e.Session), string(e.Call), e.Seq).Scan(&n)
	return n > 0, refusal(err)
}

// Erased holds the rows that are left of an event which is in events_v1 no more,
// since its session was erased, against what the log's tree has of the event: all but
// the texts, which went with it. size is that of its body.
func (r Recorded) Erased(e schemas.Event, size int) (wrong []string) {
	e.Body = make([]byte, size) // only its size counts
	for i, f := range r.orphans {
		_, log := f.at()
		if _, newest := r.orphans[0].at(); log != newest {
			continue // of an event that the log has lost
		}
		if i > 0 && f.equal(r.orphans[i-1]) {
			continue
		}
		want := f.row(e)
		if want == nil {
			wrong = append(wrong, f.table.Name+" has a row of it, which its event does not make")
			continue
		}
		if i := f.table.reason; i >= 0 && !same(f.values[i], "") {
			wrong = append(wrong, f.table.Name+": its reason is there, and was erased")
		}
		for _, what := range f.differs(want, "reason") {
			wrong = append(wrong, f.table.Name+": "+what)
		}
	}
	return wrong
}

// event is the event of a row of events_v1, without Data if it cannot be read, and
// the size of its body, if that is kept no more.
func event(f found) (e schemas.Event, gone int) {
	of := map[string]any{}
	for i, c := range f.table.columns {
		switch c.Name {
		case "envelope", "body", "body_size":
			of[c.Name] = f.values[i]
		}
	}
	_ = e.UnmarshalString(*of["envelope"].(*string))
	e.Seq, _ = f.at()
	e.Stored = f.values[2].(*time.Time).UTC()
	if body := *of["body"].(*string); body != "" {
		e.Body = []byte(body)
	} else {
		gone = int(*of["body_size"].(*uint32))
	}
	return e, gone
}

// row is the row that an event makes in the same table, under the same name of the
// log.
func (f found) row(e schemas.Event) []any {
	_, log := f.at()
	return f.table.Row(append(make([]any, 0, len(f.values)), log, e.Seq, at(e.Stored)), e)
}

// differs names the columns in which a row is not as it should be.
func (f found) differs(want []any, except ...string) (what []string) {
	for i, c := range f.table.columns {
		if !slices.Contains(except, c.Name) && !same(f.values[i], want[i]) {
			what = append(what, "the column "+c.Name+" is not what the event says")
		}
	}
	return what
}

func (f found) equal(g found) bool {
	return f.table.Name == g.table.Name && slices.EqualFunc(f.values, g.values, func(a, b any) bool {
		return same(a, reflect.ValueOf(b).Elem().Interface())
	})
}

// same compares what was read of a column with what is written into one.
func same(have, want any) bool {
	switch h := have.(type) {
	case *string:
		switch w := want.(type) {
		case nil:
			return *h == ""
		case string:
			return *h == w
		case []byte:
			return *h == string(w)
		}
		return false
	case *time.Time:
		w, ok := want.(time.Time)
		return ok && h.Equal(w)
	case *uint64:
		return *h == want
	case *uint32:
		return *h == want
	}
	return reflect.ValueOf(have).Elem().Interface() == want
}
