package projections

import (
	"context"
	"errors"
	"fmt"
	"time"

	"waybill.dev/schemas"
)

// place is where the writer is in the log.
//
// A log of which the machine lost power may have lost the last of what it
// acknowledged, and gives those sequences again to other events. The record may
// have the lost ones. They stay, as they happened; what the log has in their
// place is written under another name of the log, the place's, which is made of
// how many names there were before, by which they are in order whatever the clock
// said, and of the first such event. So nothing is taken for what it is not.
type place struct {
	created string            // the log's identity
	log     string            // the name under which rows are written: created, or created#n<names before>-<time>; "" until there is an event to name it by
	names   uint64            // that the record has of the log
	after   uint64            // the newest sequence that the record has under the name before
	upTo    uint64            // the record has all events up to here, as far as the log had them
	marks   map[string]uint64 // by table: the greatest sequence that it has under the name
}

// name names the place by the first event that the record does not have.
func (p *place) name(events []schemas.Event) {
	for _, e := range events {
		if p.log == "" && e.Seq > p.after {
			// The letter puts it behind the names of before there were numbers, which are times.
			p.log = fmt.Sprintf("%s#n%06d-%s", p.created, p.names, e.Stored.UTC().Format("2006-01-02T15:04:05.000000000Z"))
		}
	}
}

// find finds the writer's place, by what the tables have and the log says of it.
func (w *Writer) find(ctx context.Context) (*place, error) {
	created, err := w.o.Of.Identity(ctx)
	if err != nil {
		return nil, err
	}
	p := &place{created: created, log: created, marks: map[string]uint64{}}
	if err := w.alone(ctx, p); err != nil {
		return nil, err
	}
	var first, top uint64
	rows, err := w.conn.Query(ctx, "SELECT log, min(seq), max(seq), count() OVER () FROM "+main+" WHERE log = ? OR startsWith(log, ?) GROUP BY log ORDER BY log DESC LIMIT 1", created, created+"#")
	if err != nil {
		return nil, fmt.Errorf("what the record has: %w", err)
	}
	for rows.Next() {
		if err := rows.Scan(&p.log, &first, &top, &p.names); err != nil {
			return nil, errors.Join(err, rows.Close())
		}
	}
	if err := errors.Join(rows.Err(), rows.Close()); err != nil {
		return nil, fmt.Errorf("what the record has: %w", err)
	}
	if top > 0 {
		if p.log != created {
			p.after = first - 1
		}
		fork, lost, err := w.fork(ctx, created, top)
		if err != nil {
			return nil, err
		}
		if fork < top {
			w.o.Log.Error("the log has lost events that the record has: they are kept there, and what follows is recorded under another name of the log",
				"log", p.log, "after_sequence", fork, "events", lost)
			p.log, p.after = "", fork
		}
		p.upTo = fork
	}
	for _, t := range w.tables {
		seq := p.after
		if p.log != "" {
			var has uint64
			if err := w.conn.QueryRow(ctx, "SELECT max(seq) FROM "+t.Name+" WHERE log = ?", p.log).Scan(&has); err != nil {
				return nil, fmt.Errorf("what %s has: %w", t.Name, err)
			}
			seq = max(seq, has)
		}
		p.marks[t.Name] = seq
	}
	return p, nil
}

// fork is the newest sequence of which the record and the log have the same
// event, and how many events the record has after it. The log may have lost more of its
// end than the last time: then it is under one of the names before.
func (w *Writer) fork(ctx context.Context, created string, top uint64) (seq uint64, lost int, err error) {
	last, err := w.o.Of.Last(ctx)
	if err != nil {
		return 0, 0, err
	}
	// Most often it is the first that is looked at, which is found by its place.
	for _, where := range []string{"seq = ?", "seq <= ?"} {
		rows, err := w.conn.Query(ctx, "SELECT seq, id, stored FROM "+main+" WHERE (log = ? OR startsWith(log, ?)) AND "+where+" ORDER BY seq DESC, log DESC LIMIT 1 BY seq", created, created+"#", top)
		if err != nil {
			return 0, 0, fmt.Errorf("what the record has: %w", err)
		}
		lost = 0
		for rows.Next() {
			var id string
			var stored time.Time
			if err := rows.Scan(&seq, &id, &stored); err != nil {
				return 0, 0, errors.Join(err, rows.Close())
			}
			same := false
			if seq <= last {
				e, err := w.o.Of.Load(ctx, seq)
				switch {
				case errors.Is(err, schemas.ErrNotFound):
					same = true // so old that the log has dropped it
				case err != nil:
					return 0, 0, errors.Join(err, rows.Close())
				default:
					same = e.Data != nil && string(e.ID()) == id && e.Stored.Equal(stored)
				}
			}
			if same {
				return seq, lost, rows.Close()
			}
			lost++
		}
		if err := errors.Join(rows.Err(), rows.Close()); err != nil {
			return 0, 0, fmt.Errorf("what the record has: %w", err)
		}
	}
	return 0, lost, nil // nothing of it is the log's
}

// running begins the ids of INSERTs of this record.
func (w *Writer) running(p *place) string { return "waybill/" + w.base + "/" + p.created + "/" }

// alone waits until no INSERT runs any more that a writer began, who is gone or
// did not want to wait longer: what it writes would come after it was looked for.
func (w *Writer) alone(ctx context.Context, p *place) error {
	ctx, cancel := context.WithTimeout(ctx, insertTime)
	defer cancel()
	for {
		var n uint64
		err := w.conn.QueryRow(ctx, "SELECT count() FROM system.processes WHERE startsWith(query_id, ?)", w.running(p)).Scan(&n)
		if isCode(err, codeDenied) {
			if !w.denied {
				w.denied = true
				w.o.Log.Warn("the user of clickhouse.dsn may not read system.processes: after a crash an INSERT that still runs is not seen, and its rows may be there twice until they are merged", "error", err)
			}
			return nil
		}
		if err != nil {
			return fmt.Errorf("what is still being written: %w", err)
		}
		if n == 0 {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%d INSERTs of before are still running", n)
		case <-time.After(50 * time.Millisecond):
		}
	}
}
