package projections

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"slices"
	"strings"
	"time"

	"github.com/ClickHouse/clickhouse-go/v2"

	"waybill.dev/schemas"
)

// A rebuild makes the derived tables, all but events_v1, anew beside those in use,
// and puts them in their place at once:
//
//   - rows come of events: of an archive as far as that goes, of events_v1 else. A
//     derived row is a function of its event and of its body's size (a test of the
//     package holds every table to that), so bodies are neither read nor missed;
//   - a source in which sequences are missing is refused ([GapsError]). What was
//     erased is missing on purpose ([RebuildOptions].Erased). What the tables in use
//     hold of a sequence that no source has is taken over as it is, so that a
//     rebuild loses nothing;
//   - the writer goes on meanwhile. It waits only for the end: what has come since,
//     the states of both (see state), and the exchange;
//   - events_v1 is read and never written, exchanged or dropped.
//
// A rebuild that fails, or is killed, leaves the tables in use as they are, or some
// of them exchanged: each is whole.

// RebuildOptions of [Writer.Rebuild].
type RebuildOptions struct {
	// Archive are events of the log that is being recorded, in its order; nil: none.
	// One without its body comes with a [BodyGone].
	Archive iter.Seq2[schemas.Event, error]

	AcceptGaps bool // go on where sequences are missing in the source
	DryRun     bool // exchange nothing

	// Erased tells of a sequence that is missing whether it was an event of one of the
	// sessions that were erased; nil where nobody knows.
	Erased func(ctx context.Context, seq uint64, sessions map[schemas.SessionKey]bool) (bool, error)

	// Progress is told how many events are read, of how many; may be nil.
	Progress func(done, of uint64)
}

// Rebuilt is what became of a table.
type Rebuilt struct {
	Table string `json:"table"`
	Rows  uint64 `json:"rows"`
	State string `json:"state"`     // of the table that was made
	Live  string `json:"live"`      // of the one in use before
	Taken uint64 `json:"taken"`     // of the rows, those that were taken over from it
	Swap  bool   `json:"exchanged"` // it is in use now
}

// Gap are sequences of a log that a source does not have, both ends included.
type Gap struct {
	Log  string `json:"log"`
	From uint64 `json:"from"`
	To   uint64 `json:"to"`
}

func (g Gap) String() string {
	if g.From == g.To {
		return fmt.Sprintf("%d of log %s", g.From, g.Log)
	}
	return fmt.Sprintf("%d to %d of log %s", g.From, g.To, g.Log)
}

// GapsError is the error of a source in which sequences are missing.
type GapsError struct {
	Gaps   []Gap // the first hundred
	More   bool
	Erased int // sessions that were erased
}

func (e *GapsError) Error() string {
	var all []string
	for _, g := range e.Gaps[:min(len(e.Gaps), 10)] {
		all = append(all, g.String())
	}
	if len(e.Gaps) > 10 || e.More {
		all = append(all, "more")
	}
	text := "the source does not have " + strings.Join(all, ", ")
	if e.Erased > 0 {
		text += fmt.Sprintf("; %d sessions were erased, of which the events are gone, and it is not known whether that is all", e.Erased)
	}
	return text
}

const (
	rebuilt     = "_rebuilt" // ends the name of a table that is being made
	mostGaps    = 100        // that are named
	rebuildTime = 5 * time.Minute
)

// Rebuild makes the derived tables anew, one rebuild at a time. It returns
// [GapsError], and an error that wraps [ErrArchive] for an archive that is not of
// this log.
func (w *Writer) Rebuild(ctx context.Context, o RebuildOptions) ([]Rebuilt, error) {
	if !w.rebuilding.TryLock() {
		return nil, errors.New("the tables are being rebuilt already")
	}
	defer w.rebuilding.Unlock()
	r := &rebuild{w: w, o: o, at: map[string]uint64{}, taken: map[string]uint64{}}
	for _, t := range w.tables {
		if t.Name != main {
			made := t
			made.Name += rebuilt
			r.tables = append(r.tables, made)
		}
	}
	waiting, cancel := context.WithTimeout(ctx, starting)
	defer cancel()
	w.Prepared(waiting)
	opts, err := w.o.Server.Options(waiting, false)
	if err != nil {
		return nil, err
	}
	if r.conn, err = dial(opts, 2+len(r.tables)); err != nil {
		return nil, err
	}
	defer func() { _ = r.conn.Close() }()
	if r.log, err = w.o.Of.Identity(ctx); err != nil {
		return nil, err
	}
	defer func() { _ = r.drop(context.WithoutCancel(ctx)) }()
	all, err := r.run(ctx)
	if err != nil {
		return nil, fmt.Errorf("rebuild: %w", err)
	}
	return all, nil
}

// ErrArchive is wrapped by the error for events that are not of the log that is
// recorded, or not in its order.
var ErrArchive = errors.New("not an archive of this log")

// rebuild is one that goes on.
type rebuild struct {
	w      *Writer
	o      RebuildOptions
	conn   clickhouse.Conn
	log    string  // that is being recorded
	tables []Table // that are made

	archived []Gap             // what the archive has: ranges
	at       map[string]uint64 // up to where each log of events_v1 was read
	erasures []placedEvent
	done, of uint64
	taken    map[string]uint64
}

func (r *rebuild) run(ctx context.Context) ([]Rebuilt, error) {
	if err := r.drop(ctx); err != nil {
		return nil, err
	}
	for _, t := range r.tables {
		if err := r.conn.Exec(ctx, t.ddl()); err != nil {
			return nil, fmt.Errorf("%s: %w", t.Name, err)
		}
	}
	if err := r.conn.QueryRow(ctx, "SELECT count() FROM "+main).Scan(&r.of); err != nil {
		return nil, err
	}
	if r.o.Archive != nil {
		if err := r.archive(ctx); err != nil {
			return nil, err
		}
	}
	// What is refused is refused before the long work.
	if _, err := r.missing(ctx); err != nil {
		return nil, err
	}
	if err := r.read(ctx); err != nil {
		return nil, err
	}
	return r.finish(ctx)
}

// finish does what the writer has to wait for.
func (r *rebuild) finish(ctx context.Context) ([]Rebuilt, error) {
	w := r.w
	w.turn.Lock()
	defer w.turn.Unlock()
	ctx, cancel := context.WithTimeout(ctx, rebuildTime)
	defer cancel()
	// No INSERT runs any more whose fate was not known.
	if w.conn == nil {
		if err := w.connect(ctx); err != nil {
			return nil, err
		}
	}
	if err := w.alone(ctx, &place{created: r.log}); err != nil {
		return nil, err
	}
	if err := r.read(ctx); err != nil {
		return nil, err
	}
	gaps, err := r.missing(ctx)
	if err != nil {
		return nil, err
	}
	if err := r.carry(ctx, gaps); err != nil {
		return nil, err
	}
	if err := r.erase(ctx); err != nil {
		return nil, err
	}
	var all []Rebuilt
	for _, t := range r.tables {
		live := strings.TrimSuffix(t.Name, rebuilt)
		b := Rebuilt{Table: live, Taken: r.taken[t.Name]}
		var err error
		if b.Live, _, err = t.state(ctx, r.conn, live); err != nil {
			return nil, err
		}
		if b.State, b.Rows, err = t.state(ctx, r.conn, t.Name); err != nil {
			return nil, err
		}
		all = append(all, b)
	}
	if r.o.DryRun {
		return all, nil
	}
	w.place, w.asked = nil, nil // what the tables have is asked again
	for i, b := range all {
		if err := r.conn.Exec(ctx, "EXCHANGE TABLES "+b.Table+" AND "+b.Table+rebuilt); err != nil {
			return nil, fmt.Errorf("exchange %s: %w", b.Table, err)
		}
		all[i].Swap = true
	}
	return all, nil
}

// drop removes what is made, or, after the exchange, what was in use before.
func (r *rebuild) drop(ctx context.Context) error {
	for _, t := range r.tables {
		if err := r.conn.Exec(ctx, "DROP TABLE IF EXISTS "+t.Name+" SYNC"); err != nil {
			return fmt.Errorf("drop %s: %w", t.Name, err)
		}
	}
	return nil
}

// archive fills in what the archive has, which may be in any order: of several
// exported sessions, one after the other.
func (r *rebuild) archive(ctx context.Context) error {
	var some []placedEvent
	var seqs []uint64
	for e, err := range r.o.Archive {
		gone := new(BodyGone)
		switch {
		case err != nil && !errors.As(err, &gone):
			return fmt.Errorf("%w: %w", ErrArchive, err)
		case e.Data == nil || e.Seq == 0 || e.Stored.IsZero():
			return fmt.Errorf("%w: an event without its place in the log", ErrArchive)
		case len(seqs) == mostArchived:
			return fmt.Errorf("%w: it has more than %d events", ErrArchive, mostArchived)
		}
		size := len(e.Body) + gone.Size
		e.Body = nil
		seqs = append(seqs, e.Seq)
		if some = append(some, placedEvent{e, r.log, size}); len(some) == rowsAtOnce {
			if err := r.known(ctx, some); err != nil {
				return err
			}
			some = some[:0]
		}
	}
	if err := r.known(ctx, some); err != nil {
		return err
	}
	if len(seqs) == 0 {
		return fmt.Errorf("%w: it has no events", ErrArchive)
	}
	slices.Sort(seqs)
	bad := &GapsError{}
	for _, seq := range seqs {
		n := len(r.archived)
		if n > 0 && seq <= r.archived[n-1].To+1 {
			r.archived[n-1].To = seq
			continue
		}
		if n > 0 && len(bad.Gaps) < mostGaps {
			bad.Gaps = append(bad.Gaps, Gap{r.log, r.archived[n-1].To + 1, seq - 1})
		} else if n > 0 {
			bad.More = true
		}
		r.archived = append(r.archived, Gap{r.log, seq, seq})
	}
	if len(bad.Gaps) > 0 && !r.o.AcceptGaps {
		return bad
	}
	return nil
}

// mostArchived bounds the events of an archive, whose sequences are kept.
const mostArchived = 50_000_000

// known fills in events of the archive, unless the record knows them otherwise.
func (r *rebuild) known(ctx context.Context, events []placedEvent) error {
	if len(events) == 0 {
		return nil
	}
	of := map[uint64][]placedEvent{} // the same may be there twice: of two sessions
	seqs := make([]uint64, len(events))
	for i, e := range events {
		seqs[i] = e.Seq
		of[e.Seq] = append(of[e.Seq], e)
	}
	rows, err := r.conn.Query(ctx, "SELECT seq, stored, envelope, body_size FROM "+main+" WHERE log = ? AND seq IN ?", r.log, seqs)
	if err != nil {
		return err
	}
	defer func() { _ = rows.Close() }()
	for rows.Next() {
		var seq uint64
		var stored time.Time
		var envelope string
		var size uint32
		if err := rows.Scan(&seq, &stored, &envelope, &size); err != nil {
			return err
		}
		for _, e := range of[seq] {
			text, err := e.MarshalString()
			if err != nil {
				return fmt.Errorf("%w: sequence %d: %w", ErrArchive, seq, err)
			}
			if text != envelope || !stored.Equal(e.Stored) || e.size != int(size) {
				return fmt.Errorf("%w: sequence %d is %s there, and not as the record has it", ErrArchive, seq, e.ID())
			}
		}
	}
	if err := rows.Err(); err != nil {
		return err
	}
	r.done += uint64(len(events))
	return r.fill(ctx, events)
}

// has tells whether the archive has a sequence.
func (r *rebuild) has(log string, seq uint64) bool {
	if log != r.log {
		return false
	}
	_, found := slices.BinarySearchFunc(r.archived, seq, func(g Gap, seq uint64) int {
		switch {
		case seq < g.From:
			return 1
		case seq > g.To:
			return -1
		}
		return 0
	})
	return found
}

// placedEvent is an event with the log that has it, and the size of its body.
type placedEvent struct {
	schemas.Event
	log  string
	size int
}

// span is what events_v1 has of a log.
type span struct {
	log              string
	first, last, has uint64
}

// spans are all logs of the record, the oldest first.
func (r *rebuild) spans(ctx context.Context) ([]span, error) {
	rows, err := r.conn.Query(ctx, "SELECT log, min(seq), max(seq), uniqExact(seq) FROM "+main+" GROUP BY log ORDER BY min(stored), log")
	if err != nil {
		return nil, fmt.Errorf("what the record has: %w", err)
	}
	defer func() { _ = rows.Close() }()
	var all []span
	for rows.Next() {
		var s span
		if err := rows.Scan(&s.log, &s.first, &s.last, &s.has); err != nil {
			return nil, fmt.Errorf("what the record has: %w", err)
		}
		all = append(all, s)
	}
	return all, rows.Err()
}

// read fills in what events_v1 has that was not read yet.
func (r *rebuild) read(ctx context.Context) error {
	spans, err := r.spans(ctx)
	if err != nil {
		return err
	}
	for _, s := range spans {
		for from := max(s.first, r.at[s.log]+1); from <= s.last; from += rowsAtOnce {
			if err := r.some(ctx, s.log, from, min(from+rowsAtOnce-1, s.last)); err != nil {
				return fmt.Errorf("events %d to %d of log %s: %w", from, from+rowsAtOnce-1, s.log, err)
			}
			r.at[s.log] = min(from+rowsAtOnce-1, s.last)
		}
	}
	return nil
}

// some fills in some sequences of a log.
func (r *rebuild) some(ctx context.Context, log string, from, to uint64) error {
	rows, err := r.conn.Query(ctx, "SELECT seq, stored, envelope, body_size FROM "+main+" WHERE log = ? AND seq >= ? AND seq <= ? ORDER BY seq LIMIT 1 BY seq", log, from, to)
	if err != nil {
		return err
	}
	defer func() { _ = rows.Close() }()
	var all []placedEvent
	for rows.Next() {
		e := placedEvent{log: log}
		var seq uint64
		var stored time.Time
		var envelope string
		var size uint32
		if err := rows.Scan(&seq, &stored, &envelope, &size); err != nil {
			return err
		}
		if err := e.UnmarshalString(envelope); err != nil {
			return fmt.Errorf("sequence %d: %w", seq, err)
		}
		e.Seq, e.Stored, e.size = seq, stored.UTC(), int(size)
		if e.Kind() == schemas.KindErased {
			r.erasures = append(r.erasures, e)
		}
		if !r.has(log, seq) {
			all = append(all, e)
		}
		r.done++
	}
	if err := rows.Err(); err != nil {
		return err
	}
	return r.fill(ctx, all)
}

// fill writes the rows of events.
func (r *rebuild) fill(ctx context.Context, events []placedEvent) error {
	body := make([]byte, slices.MaxFunc(append(events, placedEvent{}), func(a, b placedEvent) int { return a.size - b.size }).size)
	for _, t := range r.tables {
		batch, err := r.conn.PrepareBatch(clickhouse.Context(ctx, clickhouse.WithSettings(clickhouse.Settings{"async_insert": 0})), t.insert())
		if err != nil {
			return fmt.Errorf("%s: %w", t.Name, err)
		}
		n := 0
		row := make([]any, 0, len(t.columns()))
		for _, e := range events {
			e.Body = body[:e.size]
			values := t.Row(append(row, e.log, e.Seq, at(e.Stored)), e.Event)
			if values == nil {
				continue
			}
			n++
			if err := batch.Append(values...); err != nil {
				return errors.Join(fmt.Errorf("%s of %d: %w", t.Name, e.Seq, err), batch.Abort())
			}
		}
		if n == 0 {
			err = batch.Abort()
		} else {
			err = batch.Send()
		}
		if err != nil {
			return fmt.Errorf("%s: %w", t.Name, err)
		}
	}
	if r.o.Progress != nil && len(events) > 0 {
		r.o.Progress(r.done, max(r.of, r.done))
	}
	return nil
}

// missing are the gaps in what the source has. It is an error if they are neither
// accepted nor of what was erased.
func (r *rebuild) missing(ctx context.Context) ([]Gap, error) {
	spans, err := r.spans(ctx)
	if err != nil {
		return nil, err
	}
	var gaps []Gap
	for i, s := range spans {
		// A log that has lost its end goes on under another name (place.go).
		if base, _, again := strings.Cut(s.log, "#"); again && i > 0 {
			if before := spans[i-1]; strings.HasPrefix(before.log, base) && s.first > before.last+1 {
				gaps = append(gaps, r.unarchived(Gap{before.log, before.last + 1, s.first - 1})...)
			}
		}
		if s.has == s.last-s.first+1 {
			continue
		}
		some, err := r.gaps(ctx, s)
		if err != nil {
			return nil, err
		}
		gaps = append(gaps, some...)
	}
	sessions, err := r.erased(ctx)
	if err != nil {
		return nil, err
	}
	bad := &GapsError{Erased: len(sessions)}
	for _, g := range gaps {
		ok, err := r.onPurpose(ctx, g, sessions)
		switch {
		case err != nil:
			return nil, err
		case ok:
		case len(bad.Gaps) == mostGaps:
			bad.More = true
		default:
			bad.Gaps = append(bad.Gaps, g)
		}
	}
	if len(bad.Gaps) > 0 && !r.o.AcceptGaps {
		return nil, bad
	}
	return gaps, nil
}

// gaps are those of one log.
func (r *rebuild) gaps(ctx context.Context, s span) ([]Gap, error) {
	rows, err := r.conn.Query(ctx, "SELECT seq, next FROM (SELECT seq, leadInFrame(seq) OVER (ORDER BY seq ROWS BETWEEN CURRENT ROW AND UNBOUNDED FOLLOWING) AS next FROM "+
		"(SELECT DISTINCT seq FROM "+main+" WHERE log = ?)) WHERE next > seq + 1 ORDER BY seq", s.log)
	if err != nil {
		return nil, fmt.Errorf("what is missing in the record: %w", err)
	}
	defer func() { _ = rows.Close() }()
	var all []Gap
	for rows.Next() {
		var before, after uint64
		if err := rows.Scan(&before, &after); err != nil {
			return nil, fmt.Errorf("what is missing in the record: %w", err)
		}
		all = append(all, r.unarchived(Gap{s.log, before + 1, after - 1})...)
	}
	return all, rows.Err()
}

// unarchived is what of a gap the archive does not have either.
func (r *rebuild) unarchived(g Gap) (rest []Gap) {
	if g.Log == r.log {
		for _, a := range r.archived {
			if a.To < g.From || a.From > g.To {
				continue
			}
			if a.From > g.From {
				rest = append(rest, Gap{g.Log, g.From, a.From - 1})
			}
			if g.From = a.To + 1; g.From > g.To {
				return rest
			}
		}
	}
	return append(rest, g)
}

// erased are the sessions that were erased.
func (r *rebuild) erased(ctx context.Context) (map[schemas.SessionKey]bool, error) {
	rows, err := r.conn.Query(ctx, "SELECT DISTINCT session FROM "+main+" WHERE kind = ?", string(schemas.KindErased))
	if err != nil {
		return nil, fmt.Errorf("what was erased: %w", err)
	}
	defer func() { _ = rows.Close() }()
	all := map[schemas.SessionKey]bool{}
	for rows.Next() {
		var s string
		if err := rows.Scan(&s); err != nil {
			return nil, fmt.Errorf("what was erased: %w", err)
		}
		all[schemas.SessionKey(s)] = true
	}
	return all, rows.Err()
}

// onPurpose tells whether all of a gap was erased.
func (r *rebuild) onPurpose(ctx context.Context, g Gap, sessions map[schemas.SessionKey]bool) (bool, error) {
	if r.o.Erased == nil || len(sessions) == 0 || g.Log != r.log || g.To-g.From > rowsAtOnce {
		return false, nil
	}
	for seq := g.From; seq <= g.To; seq++ {
		if ok, err := r.o.Erased(ctx, seq, sessions); err != nil || !ok {
			return false, err
		}
	}
	return true, nil
}

// carry takes over what the tables in use have of what the source does not have:
// of the gaps, and of what lies outside of all that events_v1 has.
func (r *rebuild) carry(ctx context.Context, gaps []Gap) error {
	spans, err := r.spans(ctx)
	if err != nil {
		return err
	}
	for _, t := range r.tables {
		live := strings.TrimSuffix(t.Name, rebuilt)
		rows, err := r.conn.Query(ctx, "SELECT log, min(seq), max(seq) FROM "+live+" GROUP BY log")
		if err != nil {
			return fmt.Errorf("%s: %w", live, err)
		}
		var held []span
		for rows.Next() {
			var s span
			if err := rows.Scan(&s.log, &s.first, &s.last); err != nil {
				return errors.Join(fmt.Errorf("%s: %w", live, err), rows.Close())
			}
			held = append(held, s)
		}
		if err := errors.Join(rows.Err(), rows.Close()); err != nil {
			return fmt.Errorf("%s: %w", live, err)
		}
		for _, h := range held {
			var beside []Gap
			i := slices.IndexFunc(spans, func(s span) bool { return s.log == h.log })
			if i < 0 {
				beside = []Gap{{h.log, h.first, h.last}}
			} else {
				if s := spans[i]; h.first < s.first {
					beside = append(beside, Gap{h.log, h.first, s.first - 1})
				}
				for _, g := range gaps {
					if g.Log == h.log {
						beside = append(beside, g)
					}
				}
				if s := spans[i]; h.last > s.last {
					beside = append(beside, Gap{h.log, s.last + 1, h.last})
				}
			}
			var rest []Gap
			for _, g := range beside {
				rest = append(rest, r.unarchived(g)...)
			}
			if err := r.takeOver(ctx, t, live, rest); err != nil {
				return err
			}
		}
	}
	return nil
}

// takeOver copies rows of some sequences that the source does not have.
func (r *rebuild) takeOver(ctx context.Context, t Table, live string, of []Gap) error {
	for some := range slices.Chunk(of, 500) {
		var conds []string
		for _, g := range some {
			conds = append(conds, fmt.Sprintf("seq >= %d AND seq <= %d", g.From, g.To))
		}
		where := " WHERE log = ? AND (" + strings.Join(conds, " OR ") + ")"
		var n uint64
		if err := r.conn.QueryRow(ctx, "SELECT count() FROM "+live+where, some[0].Log).Scan(&n); err != nil {
			return fmt.Errorf("%s: %w", live, err)
		}
		if n == 0 {
			continue
		}
		if err := r.conn.Exec(ctx, t.insert()+" SELECT "+t.names()+" FROM "+live+where, some[0].Log); err != nil {
			return fmt.Errorf("%s: %w", t.Name, err)
		}
		r.taken[t.Name] += n
	}
	return nil
}

// erase takes out of the new tables what erased sessions had said, where an event
// was read before the writer removed it, or is in the archive.
func (r *rebuild) erase(ctx context.Context) error {
	ctx = clickhouse.Context(ctx, clickhouse.WithSettings(clickhouse.Settings{"mutations_sync": 2}))
	for some := range slices.Chunk(r.erasures, 100) {
		var conds []string
		var args []any
		for _, e := range some {
			conds = append(conds, "(tenant = ? AND session = ? AND (log != ? OR seq < ?))")
			args = append(args, string(e.Tenant), string(e.Session), e.log, e.Seq)
		}
		where := " WHERE reason != '' AND (" + strings.Join(conds, " OR ") + ")"
		for _, t := range r.tables {
			if !slices.ContainsFunc(t.Columns, func(c Column) bool { return c.Name == "reason" }) {
				continue
			}
			var n uint64
			err := r.conn.QueryRow(ctx, "SELECT count() FROM "+t.Name+where, args...).Scan(&n)
			if err == nil && n > 0 {
				err = r.conn.Exec(ctx, "ALTER TABLE "+t.Name+" UPDATE reason = ''"+where, args...)
			}
			if err != nil {
				return fmt.Errorf("what was erased, in %s: %w", t.Name, err)
			}
		}
	}
	return nil
}

// names are the columns that rows have.
func (t Table) names() string {
	var all []string
	for _, c := range t.columns() {
		all = append(all, c.Name)
	}
	return strings.Join(all, ", ")
}

// state is a hash of all that a table of t's form holds, whatever lies where and
// however often a row was written: two sums over the hashes of its rows, and their
// number. It tells what differs by chance, and is no proof against who wants to
// deceive; that is what the audit is for.
func (t Table) state(ctx context.Context, conn clickhouse.Conn, name string) (state string, rows uint64, err error) {
	var sum, xor uint64
	err = conn.QueryRow(ctx, "SELECT count(), sum(cityHash64("+t.names()+")), groupBitXor(sipHash64("+t.names()+")) FROM "+name+" FINAL").Scan(&rows, &sum, &xor)
	if err != nil {
		return "", 0, fmt.Errorf("state of %s: %w", name, err)
	}
	return fmt.Sprintf("%016x%016x", sum, xor), rows, nil
}
