package projections

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"github.com/ClickHouse/clickhouse-go/v2"

	"waybill.dev/schemas"
)

// WriterOptions of the writer.
type WriterOptions struct {
	Server Server
	// Identity is the log's: other for one that begins anew.
	Identity func(context.Context) (string, error)
	Now      func() time.Time
	Log      *slog.Logger
}

// Writer writes the tables. Each event is in each table once, whoever dies:
//
//   - the log's batches come in order and are acknowledged after they are
//     written, so that nothing is left out;
//   - a batch, or what of it falls into one month, is one INSERT of one block
//     into each table, which is there whole or not at all;
//   - what a table has already, it says itself (the greatest sequence of this
//     log), each time the writer connects. What comes again is left out;
//   - an INSERT of which nobody knows how it went is sent again with the same
//     rows and the same token, by which ClickHouse knows it.
type Writer struct {
	o      WriterOptions
	tables []Table

	turn  sync.Mutex // of Prepare and Take, for these:
	conn  clickhouse.Conn
	log   string            // identity
	marks map[string]uint64 // by table: the greatest sequence that it has
	gap   bool              // it has not been looked whether the log goes on where the record ends

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

// NewWriter makes a writer. Take is given to the log's batches.
func NewWriter(o WriterOptions) *Writer {
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	return &Writer{o: o, tables: Tables(), stats: Stats{Rows: map[string]uint64{}}}
}

// Stats may be asked at any time.
func (w *Writer) Stats() Stats {
	w.mu.Lock()
	defer w.mu.Unlock()
	s := w.stats
	s.Rows = make(map[string]uint64, len(w.stats.Rows))
	for t, n := range w.stats.Rows {
		s.Rows[t] = n
	}
	return s
}

// insertTime is how long one INSERT may take.
const insertTime = time.Minute

// Take writes the events of the log from first to last, in order. After an
// error it has to be called with the same again; it is not known what of it is
// written.
func (w *Writer) Take(ctx context.Context, first, last uint64, events []schemas.Event) error {
	w.turn.Lock()
	defer w.turn.Unlock()
	err := w.take(ctx, first, last, events)
	w.mu.Lock()
	defer w.mu.Unlock()
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

func (w *Writer) take(ctx context.Context, first, last uint64, events []schemas.Event) error {
	if w.conn == nil {
		if err := w.connect(ctx); err != nil {
			return err
		}
	}
	if had := w.marks["events_v1"]; w.gap && had > 0 && first > had+1 {
		w.o.Log.Warn("events are missing in the record: the log did not keep them, or could not read them", "after_sequence", had, "before_sequence", first)
	}
	w.gap = false
	for len(events) > 0 {
		n := 1
		for n < len(events) && month(events[n]) == month(events[0]) {
			n++
		}
		for _, t := range w.tables {
			if err := w.insert(ctx, t, events[:n]); err != nil {
				return fmt.Errorf("write %s of %d to %d: %w", t.Name, first, last, err)
			}
		}
		events = events[n:]
	}
	return nil
}

// month is the partition of an event.
func month(e schemas.Event) int {
	y, m, _ := e.Stored.UTC().Date()
	return 12*y + int(m)
}

// connect makes the tables where they are missing and asks them what they have.
func (w *Writer) connect(ctx context.Context) (err error) {
	if w.log, err = w.o.Identity(ctx); err != nil {
		return err
	}
	conn, err := open(ctx, w.o.Server, false)
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			_ = conn.Close()
		}
	}()
	for _, sql := range schema() {
		if err := conn.Exec(ctx, sql); err != nil {
			return fmt.Errorf("%.60s…: %w", sql, err)
		}
	}
	marks := map[string]uint64{}
	for _, t := range w.tables {
		var seq uint64
		if err := conn.QueryRow(ctx, "SELECT max(seq) FROM "+Database+"."+t.Name+" WHERE log = ?", w.log).Scan(&seq); err != nil {
			return fmt.Errorf("what %s has: %w", t.Name, err)
		}
		marks[t.Name] = seq
	}
	w.conn, w.marks, w.gap = conn, marks, true
	return nil
}

// insert writes the rows that the table does not have.
func (w *Writer) insert(ctx context.Context, t Table, events []schemas.Event) error {
	mark := w.marks[t.Name]
	var rows [][]any
	var first, last uint64
	for _, e := range events {
		if e.Seq <= mark {
			continue
		}
		row := t.Row(e)
		if row == nil {
			continue
		}
		if first == 0 {
			first = e.Seq
		}
		last = e.Seq
		rows = append(rows, append([]any{w.log, e.Seq, at(e.Stored)}, row...))
	}
	if len(rows) == 0 {
		return nil
	}
	// The log's batches are bounded, but their clock is not ours: what is slow
	// is tried again, under the same token.
	ctx, cancel := context.WithTimeout(clickhouse.Context(ctx, clickhouse.WithSettings(clickhouse.Settings{
		"async_insert":               0,
		"insert_deduplicate":         1,
		"insert_deduplication_token": fmt.Sprintf("%s/%s:%d-%d", w.log, t.Name, first, last),
	})), insertTime)
	defer cancel()
	batch, err := w.conn.PrepareBatch(ctx, t.insert())
	if err != nil {
		return err
	}
	for _, row := range rows {
		if err := batch.Append(row...); err != nil {
			return errors.Join(err, batch.Abort())
		}
	}
	if err := batch.Send(); err != nil {
		return err
	}
	w.marks[t.Name] = last
	w.mu.Lock()
	defer w.mu.Unlock()
	w.stats.Rows[t.Name] += uint64(len(rows))
	return nil
}
