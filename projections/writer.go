package projections

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"sync"
	"time"

	"github.com/ClickHouse/clickhouse-go/v2"
	"github.com/ClickHouse/clickhouse-go/v2/lib/driver"
	"golang.org/x/sync/errgroup"

	"waybill.dev/schemas"
)

// Log is the log of which the record is made.
type Log interface {
	// Identity is the log's: other for one that begins anew.
	Identity(context.Context) (string, error)
	// Last is its newest sequence.
	Last(context.Context) (uint64, error)
	// Load returns the event at a sequence, or an error that wraps [schemas.ErrNotFound].
	Load(ctx context.Context, seq uint64) (schemas.Event, error)
}

// WriterOptions of the writer.
type WriterOptions struct {
	Server Server
	Of     Log
	Bodies time.Duration // how long bodies are kept; 0: for ever
	Now    func() time.Time
	Log    *slog.Logger
}

// Writer writes the tables. Each event is in each table once, whoever dies:
//
//   - the log's batches come in order and are acknowledged after they are
//     written, so that nothing is left out;
//   - a batch, or what of it falls into one month, is one INSERT of one block
//     into each table, which is there whole or not at all;
//   - what a table has already, it says itself (the greatest sequence of this
//     log), each time the writer connects; by then no INSERT of before is
//     running any more. What comes again is left out, and what it should have
//     and has not is asked for ([Missing]);
//   - an INSERT of which nobody knows how it went is sent again with the same
//     rows and the same token, by which ClickHouse knows it;
//   - sequences that the log has given a second time, after its machine lost
//     power, are found by their events and kept apart (place.go).
type Writer struct {
	o      WriterOptions
	tables []Table

	turn   sync.Mutex // of Prepare and Take, for these:
	conn   clickhouse.Conn
	base   string  // name of the database
	place  *place  // nil until it is found, which is once for each connection
	asked  *uint64 // what Missing was last returned for on this connection
	denied bool    // it has been said that running queries cannot be seen

	rebuilding sync.Mutex // while derived tables are made anew

	prepared     chan struct{} // closed when the tables are there
	havePrepared sync.Once

	mu    sync.Mutex
	stats Stats
}

// Stats is how the writer is doing.
type Stats struct {
	Rows    map[string]uint64 // written by this process, by table
	Events  uint64            // taken from the log
	Failed  uint64            // tries that failed
	Seq     uint64            // the newest event that is written
	Stored  time.Time         // when the log had it
	Written time.Time         // when it was written
	Down    string            // why the latest try failed; "" when it did not
}

// Missing is the error of a record that has less of the log than is given to it:
// it needs what comes after After.
type Missing struct{ After uint64 }

func (m *Missing) Error() string {
	return fmt.Sprintf("the record has only what is before %d", m.After+1)
}

// NewWriter makes a writer. Take is given to the log's batches.
func NewWriter(o WriterOptions) *Writer {
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	return &Writer{o: o, tables: Tables(), prepared: make(chan struct{}), stats: Stats{Rows: map[string]uint64{}}}
}

// Stats may be asked at any time.
func (w *Writer) Stats() Stats {
	w.mu.Lock()
	defer w.mu.Unlock()
	s := w.stats
	s.Rows = maps.Clone(w.stats.Rows)
	return s
}

// insertTime is how long one INSERT may take.
const insertTime = time.Minute

// Take writes the events of the log from first to last, in order. After an
// error it has to be called with the same again; it is not known what of it is
// written. After a [Missing] it has to be called with what is missing, or, where
// the log has not got that any more, with what comes next.
func (w *Writer) Take(ctx context.Context, first, last uint64, events []schemas.Event) error {
	w.turn.Lock()
	defer w.turn.Unlock()
	err := w.take(ctx, first, last, events)
	w.mu.Lock()
	defer w.mu.Unlock()
	if missing := new(Missing); errors.As(err, &missing) {
		return err
	}
	if err != nil {
		w.close()
		w.stats.Failed++
		w.stats.Down = err.Error()
		return err
	}
	if w.stats.Down != "" {
		w.o.Log.Info("the record is written again", "up_to_sequence", last)
	}
	w.stats.Down = ""
	w.stats.Events += uint64(len(events))
	w.stats.Seq, w.stats.Written = last, w.o.Now()
	if n := len(events); n > 0 {
		w.stats.Stored = events[n-1].Stored
	}
	return nil
}

// Prepare makes the tables, as soon as there is a server, so that they can be
// asked before anything has happened. Take does the same where it comes first.
func (w *Writer) Prepare(ctx context.Context) {
	for wait := 100 * time.Millisecond; ; wait = min(2*wait, 10*time.Second) {
		w.turn.Lock()
		var err error
		if w.conn == nil {
			err = w.connect(ctx)
		}
		w.turn.Unlock()
		if err == nil || ctx.Err() != nil {
			return
		}
		w.o.Log.Warn("the record's tables cannot be made, trying again", "in", wait, "error", err)
		select {
		case <-ctx.Done():
			return
		case <-time.After(wait):
		}
	}
}

// Prepared waits until the tables are there, once, or ctx is done.
func (w *Writer) Prepared(ctx context.Context) {
	select {
	case <-w.prepared:
	case <-ctx.Done():
	}
}

// Close lets the connection go.
func (w *Writer) Close() {
	w.turn.Lock()
	defer w.turn.Unlock()
	w.close()
}

func (w *Writer) close() {
	if w.conn != nil {
		_ = w.conn.Close() // nothing of it is needed any more
		w.conn = nil
	}
}

// connect finds the server with its tables.
func (w *Writer) connect(ctx context.Context) error {
	waiting, cancel := context.WithTimeout(ctx, starting)
	defer cancel()
	o, err := w.o.Server.Options(waiting, false)
	if err != nil {
		return err
	}
	if _, ours := w.o.Server.(*Engine); !ours { // which does it before it serves
		if err := prepare(ctx, o, w.o.Bodies); err != nil {
			return err
		}
	}
	if w.conn, err = dial(o, len(w.tables)); err != nil {
		return err
	}
	w.base, w.place, w.asked = o.Auth.Database, nil, nil
	w.havePrepared.Do(func() { close(w.prepared) })
	return nil
}

func (w *Writer) take(ctx context.Context, first, last uint64, events []schemas.Event) (err error) {
	if w.conn == nil {
		if err := w.connect(ctx); err != nil {
			return err
		}
	}
	if w.place == nil {
		if w.place, err = w.find(ctx); err != nil {
			return err
		}
	}
	if has := w.place.upTo; first > has+1 {
		if w.asked == nil || *w.asked != has {
			w.asked = &has
			return &Missing{After: has}
		}
		if has > 0 {
			w.o.Log.Warn("events are missing in the record: the log does not have them any more", "after_sequence", has, "before_sequence", first)
		}
	}
	for len(events) > 0 {
		n := 1
		for n < len(events) && month(events[n]) == month(events[0]) {
			n++
		}
		if err := w.write(ctx, events[:n]); err != nil {
			return fmt.Errorf("write %d to %d: %w", first, last, err)
		}
		for _, e := range events[:n] {
			if e.Kind() == schemas.KindErased {
				if err := w.erase(ctx, e); err != nil {
					return err
				}
			}
		}
		events = events[n:]
	}
	w.place.upTo = max(w.place.upTo, last)
	return nil
}

// month is the partition of an event.
func month(e schemas.Event) int {
	y, m, _ := e.Stored.UTC().Date()
	return 12*y + int(m)
}

// write writes what the tables do not have of events of one month. All tables
// are written at once, but for events_v1, which is there when the others are:
// what it has, they have.
func (w *Writer) write(ctx context.Context, events []schemas.Event) error {
	// The log's batches are bounded, but their clock is not ours: what is slow
	// is tried again, under the same token.
	ctx, cancel := context.WithTimeout(ctx, insertTime)
	defer cancel()
	w.place.name(events)
	var others errgroup.Group
	blocks := make([]*block, len(w.tables))
	for i, t := range w.tables {
		if t.Name == main {
			continue
		}
		others.Go(func() (err error) {
			if blocks[i], err = w.build(ctx, t, events); err == nil {
				err = blocks[i].send()
			}
			return err
		})
	}
	for i, t := range w.tables {
		if t.Name != main {
			continue
		}
		all, err := w.build(ctx, t, events)
		if err := errors.Join(err, others.Wait()); err != nil {
			return errors.Join(err, all.abort())
		}
		if err := all.send(); err != nil {
			return err
		}
		blocks[i] = all
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	for i, t := range w.tables {
		if b := blocks[i]; b != nil {
			w.place.marks[t.Name] = b.last
			w.stats.Rows[t.Name] += uint64(b.rows)
		}
	}
	return nil
}

// block is one INSERT; nil inserts nothing.
type block struct {
	table string
	batch driver.Batch
	rows  int
	last  uint64 // sequence of the newest event that it accounts for
}

func (b *block) send() error {
	if b == nil {
		return nil
	}
	if err := b.batch.Send(); err != nil {
		return fmt.Errorf("%s: %w", b.table, err)
	}
	return nil
}

func (b *block) abort() error {
	if b == nil {
		return nil
	}
	return b.batch.Abort()
}

// build makes the block of what a table does not have.
func (w *Writer) build(ctx context.Context, t Table, events []schemas.Event) (*block, error) {
	mark := w.place.marks[t.Name]
	row := make([]any, 0, len(t.columns()))
	fill := func(e schemas.Event) []any {
		if e.Seq <= mark {
			return nil
		}
		return t.Row(append(row, w.place.log, e.Seq, at(e.Stored)), e)
	}
	n := 0
	for n < len(events) && fill(events[n]) == nil {
		n++
	}
	if events = events[n:]; len(events) == 0 {
		return nil, nil
	}
	first, last := events[0].Seq, events[len(events)-1].Seq
	batch, err := w.conn.PrepareBatch(clickhouse.Context(ctx, clickhouse.WithSettings(clickhouse.Settings{
		"async_insert":               0,
		"insert_deduplicate":         1,
		"insert_deduplication_token": fmt.Sprintf("%s/%s:%d-%d", w.place.log, t.Name, first, last),
	}), clickhouse.WithQueryID(fmt.Sprintf("%s%s/%d-%d/%s", w.running(w.place), t.Name, first, last, rand.Text()))), t.insert())
	if err != nil {
		return nil, fmt.Errorf("%s: %w", t.Name, err)
	}
	b := &block{table: t.Name, batch: batch, last: last}
	for _, e := range events {
		values := fill(e)
		if values == nil {
			continue
		}
		if err := batch.Append(values...); err != nil {
			return nil, errors.Join(fmt.Errorf("%s of %d: %w", t.Name, e.Seq, err), batch.Abort())
		}
		b.rows++
	}
	return b, nil
}
