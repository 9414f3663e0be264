package cli

import (
	"context"
	"iter"
	"time"

	"golang.org/x/mod/sumdb/tlog"

	"waybill.dev/bus"
	"waybill.dev/projections"
	"waybill.dev/projections/audit"
	"waybill.dev/schemas"
)

// auditStore is the log as the audit's store.
type auditStore struct{ a *bus.Audit }

func (s auditStore) Head(ctx context.Context) (uint64, audit.Position, error) {
	n, at, err := s.a.Head(ctx)
	if err != nil {
		return 0, nil, err
	}
	if at == "" && n > 0 {
		return n, nil, nil
	}
	p, err := audit.ParsePosition(at)
	return n, p, err
}

func (s auditStore) Append(ctx context.Context, n uint64, items []audit.Item) error {
	records := make([]bus.FeedRecord, len(items))
	for i, item := range items {
		records[i] = bus.FeedRecord{Number: item.Number, Subject: item.Subject, Payload: item.Payload, Position: item.At.String()}
	}
	return s.a.Append(ctx, n, records)
}

func (s auditStore) Records(ctx context.Context, from, to uint64) iter.Seq2[[]byte, error] {
	return func(yield func([]byte, error) bool) {
		if from >= to {
			return
		}
		for r, err := range s.a.Feed(ctx, from, to) {
			var record []byte
			if err == nil {
				record, err = audit.CutRecord(r.Payload)
			}
			if !yield(record, err) || err != nil {
				return
			}
		}
	}
}

func (s auditStore) Tile(ctx context.Context, t tlog.Tile) ([]byte, error) {
	return s.a.Tile(ctx, t.Path())
}

func (s auditStore) PutTile(ctx context.Context, t tlog.Tile, data []byte) error {
	return s.a.PutTile(ctx, t.Path(), data)
}

func (s auditStore) PutEdge(ctx context.Context, tiles map[tlog.Tile][]byte) error {
	byPath := map[string][]byte{}
	for t, data := range tiles {
		byPath[t.Path()] = data
	}
	return s.a.PutEdge(ctx, byPath)
}

func (s auditStore) Edge(ctx context.Context) (map[tlog.Tile][]byte, error) {
	byPath, err := s.a.Edge(ctx)
	tiles := map[tlog.Tile][]byte{}
	for path, data := range byPath {
		if t, err := tlog.ParseTilePath(path); err == nil { // else it is none
			tiles[t] = data
		}
	}
	return tiles, err
}

func (s auditStore) Checkpoint(ctx context.Context) (string, audit.Position, error) {
	text, at, err := s.a.Checkpoint(ctx)
	if err != nil || at == "" {
		return text, nil, err
	}
	p, err := audit.ParsePosition(at)
	return text, p, err
}

func (s auditStore) PutCheckpoint(ctx context.Context, text string, at audit.Position) error {
	return s.a.PutCheckpoint(ctx, text, at.String())
}

func (s auditStore) Cosigned(ctx context.Context) (string, error) { return s.a.Cosigned(ctx) }

func (s auditStore) PutCosigned(ctx context.Context, text string) error {
	return s.a.PutCosigned(ctx, text)
}

func (s auditStore) Entry(ctx context.Context, stream string, seq uint64) (audit.Entry, error) {
	m, err := s.a.Message(ctx, stream, seq)
	return audit.Entry(m), err
}

func (s auditStore) Last(ctx context.Context, stream string) (uint64, error) {
	_, last, err := s.a.Range(ctx, stream)
	return last, err
}

func (s auditStore) Follow(ctx context.Context, after audit.Position) iter.Seq2[[]audit.Entry, error] {
	return func(yield func([]audit.Entry, error) bool) {
		for burst, err := range s.a.After(ctx, after) {
			all := make([]audit.Entry, len(burst))
			for i, m := range burst {
				all[i] = audit.Entry(m)
			}
			if !yield(all, err) {
				return
			}
		}
	}
}

func (s auditStore) Secret(ctx context.Context, t schemas.Tenant, k schemas.SessionKey) ([]byte, error) {
	return s.a.Secret(ctx, t, k, audit.SecretSize, false)
}

func (s auditStore) Erase(ctx context.Context, t schemas.Tenant, k schemas.SessionKey, before uint64) error {
	return s.a.Erase(ctx, t, k, before, unsaid(k, before))
}

// headerOf is what the log has of an event beside its body.
func headerOf(e schemas.Event) map[string][]string { return bus.Header(e) }

// decodeEntry reads an entry's event as the log does.
func decodeEntry(e *audit.Entry) {
	m := bus.Message(*e)
	m.Decode()
	e.Event = m.Event
}

// everyAuditLine yields the whole of the audit, for verification.
func everyAuditLine(ctx context.Context, a *bus.Audit, keys []string, rows rowsOf) iter.Seq2[audit.Line, error] {
	return func(yield func(audit.Line, error) bool) {
		if err := writeAudit(ctx, a, keys, rows, func(l audit.Line) bool { return yield(l, nil) }); err != nil {
			yield(audit.Line{}, err)
		}
	}
}

// rowsOf opens the rows that the record has of EVENTS, and says how far the record has
// done what these say. It may be nil.
type rowsOf func(ctx context.Context) (projections.Rows, uint64, error)

// writeAudit writes the lines that audit.Verify reads. It ends early where yield
// wants no more.
func writeAudit(ctx context.Context, a *bus.Audit, keys []string, rows rowsOf, yield func(audit.Line) bool) error {
	held := audit.Held{Keys: keys, Streams: map[string]audit.Range{}}
	held.Origin, _ = originOf(keys)
	// All of this moves while it is read. A checkpoint is of leaves that the feed
	// had before, and of messages that the log had before them: so in this order,
	// what one has of the tree all that is read after it has too.
	signed, err := a.Signed(ctx)
	if err != nil {
		return err
	}
	if held.First, err = a.First(ctx); err != nil {
		return err
	}
	if held.Leaves, _, err = a.Head(ctx); err != nil {
		return err
	}
	// The rows before the log: what they are of, that has.
	var recorded projections.Rows
	var row *cursor[projections.Recorded]
	if rows != nil {
		if recorded, held.Done, err = rows(ctx); err != nil {
			return err
		}
		held.Rows, held.Others = &audit.Range{First: recorded.First, Last: recorded.Last}, recorded.Others
		row = newCursor(recorded.All)
		defer row.stop()
	}
	// The tree before it: what is stored meanwhile is in the log, and not in the tree.
	cursors := map[string]*cursor[bus.Message]{}
	for _, stream := range []string{audit.Events, audit.System} {
		var r audit.Range
		if r.First, r.Last, err = a.Range(ctx, stream); err != nil {
			return err
		}
		held.Streams[stream] = r
		c := newCursor(a.Messages(ctx, stream, r.First))
		defer c.stop()
		cursors[stream] = c
	}
	keeps, err := a.Retention(ctx)
	if err != nil {
		return err
	}
	held.Kept = keptBy(keeps)
	if keeps, err = a.FeedRetention(ctx); err != nil {
		return err
	}
	held.Feed = keptBy(keeps)
	if !yield(audit.Line{Log: &held}) {
		return nil
	}
	for c, err := range a.Checkpoints(ctx, signed) {
		if err != nil {
			return err
		}
		if !yield(audit.Line{Checkpoint: c.Text, Stored: c.Stored}) {
			return nil
		}
	}
	for c, err := range a.AllCosigned(ctx, signed) {
		if err != nil {
			return err
		}
		if !yield(audit.Line{Cosigned: c.Text, Stored: c.Stored}) {
			return nil
		}
	}
	for t, err := range a.Tiles(ctx) {
		if err != nil {
			return err
		}
		if !yield(audit.Line{Tile: t.Path, Data: t.Data}) {
			return nil
		}
	}
	salts := saltReader{a: a, secrets: map[string][]byte{}}
	// Of a message whose record the feed has no more, the tree has the hash.
	early := func(m bus.Message) (more bool, err error) {
		e := audit.Entry(m)
		salt, err := salts.of(ctx, &e, nil)
		return err == nil && yield(audit.Line{Early: &audit.Witness{Entry: &e, Salt: audit.Hex(salt)}}), err
	}
	fed := map[string]bool{}
	for r, err := range a.Feed(ctx, held.First, held.Leaves) {
		if err != nil {
			return err
		}
		record, err := audit.CutRecord(r.Payload)
		if err != nil {
			return err
		}
		w := audit.Witness{Number: r.Number, Record: string(record)}
		stream, seq := audit.PlaceOf(record)
		if c := cursors[stream]; c != nil {
			at := func(m bus.Message) uint64 { return m.Seq }
			for !fed[stream] && held.First > 0 {
				m := c.before(seq, at)
				if m == nil {
					break
				}
				if more, err := early(*m); !more {
					return err
				}
			}
			fed[stream] = true
			m, err := c.upTo(seq, at)
			if err != nil {
				return err
			}
			if m != nil {
				e := audit.Entry(*m)
				w.Entry = &e
			}
		}
		if row != nil && stream == audit.Events {
			at := func(r projections.Recorded) uint64 { return r.Seq }
			for r := row.before(seq, at); r != nil; r = row.before(seq, at) {
				if !yield(audit.Line{Stray: &audit.Stray{Seq: r.Seq}}) {
					return nil
				}
			}
			r, err := row.upTo(seq, at)
			if err != nil {
				return err
			}
			if r != nil && (r.Main || r.Seq <= recorded.Last) { // what follows it is being written
				rowOf(&w, *r, record)
			}
		}
		salt, err := salts.of(ctx, w.Entry, w.Row)
		if err != nil {
			return err
		}
		w.Salt = audit.Hex(salt)
		if w.Entry != nil && salt != nil && string(audit.Record(*w.Entry, salt)) == w.Record {
			w.Record = ""
		}
		if !yield(audit.Line{Leaf: &w}) {
			return nil
		}
	}
	if row != nil {
		for r, err := range row.rest() {
			if err != nil {
				return err
			}
			if !yield(audit.Line{Stray: &audit.Stray{Seq: r.Seq}}) {
				return nil
			}
		}
	}
	last := held.Streams[audit.Events].Last
	for _, stream := range []string{audit.Events, audit.System} {
		for m, err := range cursors[stream].rest() {
			if err != nil {
				return err
			}
			if stream == audit.Events {
				last = max(last, m.Seq)
			}
			if !fed[stream] && held.First > 0 {
				if more, err := early(m); !more {
					return err
				}
				continue
			}
			e := audit.Entry(m)
			if !yield(audit.Line{Beyond: &e}) {
				return nil
			}
		}
	}
	// What was erased while this was read has its event behind all of that.
	for m, err := range a.Erasures(ctx, last+1) {
		if err != nil {
			return err
		}
		e := audit.Entry(m)
		if !yield(audit.Line{Beyond: &e}) {
			return nil
		}
	}
	yield(audit.Line{Last: true})
	return nil
}

func keptBy(r bus.Retention) *audit.Kept {
	return &audit.Kept{
		Since: r.Created, At: r.At, MaxAge: audit.Seconds(r.MaxAge / time.Second), MaxBytes: r.MaxBytes, Bytes: r.Bytes,
		Until: r.Until, Age: audit.Seconds(r.Age / time.Second), Before: r.Before,
	}
}

// rowOf adds to what is known of a leaf what the record has of it.
func rowOf(w *audit.Witness, r projections.Recorded, record []byte) {
	w.RowWrong, w.RowsTwice, w.RowsOlder, w.RowGone = r.Wrong, r.Twice, r.Older, r.Gone
	if r.Main {
		if r.Event.Data != nil {
			w.Row = &r.Event
		}
		return
	}
	l, err := audit.ReadRecord(record)
	if err != nil {
		return // as is said of the record
	}
	if e, ok := l.Opened(); ok {
		w.RowWrong = r.Erased(e, l.Size)
	} else {
		w.RowWrong = []string{"there is a row of it, and it is no event"}
	}
}

// saltReader reads the salts of messages. It is used by one goroutine.
type saltReader struct {
	a       *bus.Audit
	secrets map[string][]byte
}

// of is the salt of a message, or of a row where the log has none; nil where its
// session was erased.
func (r *saltReader) of(ctx context.Context, e *audit.Entry, row *schemas.Event) ([]byte, error) {
	var of audit.Entry
	switch {
	case e != nil:
		of = *e
	case row != nil:
		of = audit.Entry{Stream: audit.Events, Seq: row.Seq, Subject: bus.Subject(*row), Event: *row}
	default:
		return nil, nil
	}
	t, s := audit.SecretOf(of)
	key := string(t) + "." + string(s)
	secret, ok := r.secrets[key]
	if !ok {
		var err error
		if secret, err = r.a.Secret(ctx, t, s, audit.SecretSize, true); err != nil {
			return nil, err
		}
		if len(r.secrets) > 20_000 {
			clear(r.secrets)
		}
		r.secrets[key] = secret
	}
	if secret == nil {
		return nil, nil
	}
	return audit.Salt(secret, of.Stream, of.Seq), nil
}

// cursor reads a sequence beside another.
type cursor[T any] struct {
	next  func() (T, error, bool)
	stop  func()
	ahead *T
	err   error
	done  bool
}

func newCursor[T any](all iter.Seq2[T, error]) *cursor[T] {
	c := &cursor[T]{}
	c.next, c.stop = iter.Pull2(all)
	return c
}

func (c *cursor[T]) peek() *T {
	if c.ahead == nil && !c.done {
		v, err, ok := c.next()
		switch {
		case !ok:
			c.done = true
		case err != nil:
			c.err, c.done = err, true
		default:
			c.ahead = &v
		}
	}
	return c.ahead
}

// upTo is the element at a sequence, nil if there is none; those before it are
// passed over.
func (c *cursor[T]) upTo(seq uint64, at func(T) uint64) (*T, error) {
	for {
		v := c.peek()
		if v == nil || at(*v) > seq {
			return nil, c.err
		}
		c.ahead = nil
		if at(*v) == seq {
			return v, nil
		}
	}
}

// before is the next element if it is before a sequence, and nil if it is not.
func (c *cursor[T]) before(seq uint64, at func(T) uint64) *T {
	v := c.peek()
	if v == nil || at(*v) >= seq {
		return nil
	}
	c.ahead = nil
	return v
}

// rest yields what is left.
func (c *cursor[T]) rest() iter.Seq2[T, error] {
	return func(yield func(T, error) bool) {
		for v := c.peek(); v != nil; v = c.peek() {
			c.ahead = nil
			if !yield(*v, nil) {
				return
			}
		}
		if c.err != nil {
			var none T
			yield(none, c.err)
		}
	}
}
