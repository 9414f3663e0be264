package cli

import (
	"bufio"
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"iter"
	"net/http"
	"slices"
	"strings"
	"time"

	"golang.org/x/mod/sumdb/tlog"

	"waybill.dev/bus"
	"waybill.dev/projections"
	"waybill.dev/projections/audit"
	"waybill.dev/schemas"
)

// export writes a session as a file has it (export_file.go).
func (a *admin) export(w http.ResponseWriter, r *http.Request) {
	key := schemas.SessionKey(r.PathValue("session"))
	if schemas.CheckToken(string(key)) != nil {
		http.Error(w, "not a session's key", http.StatusBadRequest)
		return
	}
	q := r.URL.Query()
	x := &exporter{a: a, key: key, from: q.Get("from"), redact: q.Get("redact") != "", rows: q.Get("rows") != ""}
	if x.from == "" {
		x.from = fromStream
	}
	if x.from != fromStream && x.from != fromRecord {
		http.Error(w, "from: neither stream nor clickhouse", http.StatusBadRequest)
		return
	}
	if a.g.server == nil && x.from == fromRecord {
		http.Error(w, noRecord, http.StatusNotFound)
		return
	}
	l, of, keys, err := a.auditReader(r.Context())
	if err != nil {
		a.fail(w, err)
		return
	}
	defer l.Close()
	x.l, x.of, x.keys = l, of, keys
	if err := x.look(r.Context()); err != nil {
		if errors.Is(err, schemas.ErrNotFound) {
			http.Error(w, strings.TrimSuffix(err.Error(), ": "+schemas.ErrNotFound.Error()), http.StatusNotFound)
			return
		}
		a.fail(w, err)
		return
	}
	w.Header().Set("Content-Type", "application/x-ndjson")
	out := bufio.NewWriterSize(w, 256<<10)
	lines := newExportWriter(out)
	if err := x.write(r.Context(), lines); err != nil {
		if r.Context().Err() == nil {
			a.g.log.Error("admin API: a session's export", "session", key, "error", err)
			_ = errors.Join(lines.write(exportLine{Error: err.Error()}), out.Flush(), http.NewResponseController(w).Flush()) // it is told if it can be
		}
		panic(http.ErrAbortHandler) // it has no end, and must not look whole
	}
	_ = out.Flush() // the client left
}

// exporter exports one session. It reads it twice: to find out what there is, and
// to write it.
type exporter struct {
	a            *admin
	l            *bus.Log
	of           *bus.Audit
	keys         audit.Keys
	key          schemas.SessionKey
	from         string
	redact, rows bool

	// Of look.
	tenant   schemas.Tenant
	ranges   []exportRange
	policies []string // digests, in the order in which decisions name them

	proofs *proofs
}

// exportRange is a session and from which to which sequence it is.
type exportRange struct {
	key         schemas.SessionKey
	first, last uint64
	calls       map[schemas.CallID]bool // that are wanted; nil: everything
}

// one is an event, or what is said of a message that is none.
type one struct {
	e    schemas.Event
	odd  string // what is wrong with a message
	gone int    // size of a body that is not kept any more
}

// events reads a session from where it is to be read.
func (x *exporter) events(ctx context.Context, key schemas.SessionKey) iter.Seq2[one, error] {
	all := x.a.l.Read(ctx, bus.Filter{Session: key}, 0)
	if x.from == fromRecord {
		all = projections.Session(ctx, x.a.g.server, key)
	}
	return func(yield func(one, error) bool) {
		for e, err := range all {
			o := one{e: e}
			gone := new(projections.BodyGone)
			switch {
			case errors.As(err, &gone):
				o.gone, err = gone.Size, nil
			case errors.Is(err, bus.ErrUndecodable), errors.Is(err, projections.ErrUnreadable):
				o.odd, err = err.Error(), nil
			}
			if !yield(o, err) || err != nil {
				return
			}
		}
	}
}

// look finds out what there is.
func (x *exporter) look(ctx context.Context) error {
	calls := map[schemas.CallID]bool{}
	others := map[schemas.SessionKey]bool{x.key: true}
	var next []schemas.SessionKey
	seen := map[string]bool{}
	for key := x.key; ; {
		r := exportRange{key: key}
		for o, err := range x.events(ctx, key) {
			if err != nil {
				return err
			}
			main := key == x.key
			switch {
			case o.odd != "" && main:
			case o.odd != "":
				continue
			case !main && !calls[o.e.Call] && (o.e.Parent == "" || !calls[o.e.Parent]), !main && o.e.Call == "":
				continue
			}
			if r.first == 0 {
				r.first = o.e.Seq
			}
			r.last = max(r.last, o.e.Seq)
			if o.odd != "" {
				continue
			}
			if x.tenant == "" {
				x.tenant = o.e.Tenant
			}
			if o.e.Call != "" {
				calls[o.e.Call] = true
			}
			if c, ok := o.e.Data.(*schemas.Caused); ok && !others[c.Session] && len(others) <= maxCaused {
				others[c.Session] = true
				next = append(next, c.Session)
			}
			if digest := schemas.DecisionOf(o.e.Data).PolicySHA256; digest != "" && !seen[digest] {
				seen[digest] = true
				x.policies = append(x.policies, digest)
			}
		}
		if r.first != 0 {
			if key != x.key {
				r.calls = calls
			}
			x.ranges = append(x.ranges, r)
		}
		if len(x.ranges) == 0 {
			where := "log"
			if x.from == fromRecord {
				where = "record"
			}
			return fmt.Errorf("no session %q in the %s; `waybill sessions` lists them: %w", key, where, schemas.ErrNotFound)
		}
		if len(next) == 0 {
			return nil
		}
		slices.Sort(next)
		key, next = next[0], next[1:]
	}
}

// exportWait is how long it is waited for that the tree, and the record, have what
// was stored a moment ago.
const exportWait = 10 * time.Second

func (x *exporter) write(ctx context.Context, out *exportWriter) error {
	origin, _ := originOf(x.keys.Verifiers)
	head := exportHead{
		Version: exportVersion, Session: x.key, Tenant: x.tenant, From: x.from, Exported: time.Now().UTC(),
		Origin: origin, Keys: x.keys.Verifiers, Redacted: x.redact, Rows: x.rows && x.a.g.server != nil,
	}
	last := uint64(0)
	for _, r := range x.ranges {
		last = max(last, r.last)
	}
	var err error
	if x.proofs, err = x.prover(ctx, last); err != nil {
		return err
	}
	if err := out.write(exportLine{Head: &head}); err != nil {
		return err
	}
	if x.proofs.c.Text != "" {
		if err := out.write(exportLine{Checkpoint: x.proofs.c.Text}); err != nil {
			return err
		}
	}
	sys, err := x.l.System(ctx)
	if err != nil {
		return err
	}
	for _, digest := range x.policies {
		source, err := sys.Get(ctx, digest)
		if errors.Is(err, schemas.ErrNotFound) {
			continue // said by whoever misses it
		}
		if err != nil {
			return err
		}
		if err := out.write(exportLine{Policy: &exportPolicy{digest, string(source)}}); err != nil {
			return err
		}
	}
	for _, r := range x.ranges {
		if err := x.writeSession(ctx, r, out); err != nil {
			return err
		}
	}
	if head.Rows {
		if err := x.writeRows(ctx, last, out); err != nil {
			return err
		}
	}
	return out.end(x.key, x.keys.Signers)
}

func (x *exporter) writeSession(ctx context.Context, r exportRange, out *exportWriter) error {
	leaves := newCursor(x.proofs.leaves(ctx, r))
	defer leaves.stop()
	number := func(l leafOf) uint64 { return l.seq }
	missing := func(to uint64) error {
		for l := leaves.peek(); l != nil && l.seq < to; l = leaves.peek() {
			leaves.ahead = nil
			if r.calls != nil {
				continue // of another session only some is wanted
			}
			p, err := x.proofs.prove(l.number, l.record)
			if err == nil {
				err = out.write(exportLine{Missing: p})
			}
			if err != nil {
				return err
			}
		}
		return leaves.err
	}
	for o, err := range x.events(ctx, r.key) {
		switch {
		case err != nil:
			return err
		case o.e.Seq > r.last:
			return missing(r.last + 1) // it was stored since
		case r.calls != nil && (o.odd != "" || o.e.Call == "" || !r.calls[o.e.Call]):
			continue
		}
		if err := missing(o.e.Seq); err != nil {
			return err
		}
		leaf, err := leaves.upTo(o.e.Seq, number)
		if err != nil {
			return err
		}
		line, err := x.line(ctx, o, leaf)
		if err == nil {
			err = out.write(line)
		}
		if err != nil {
			return err
		}
	}
	return missing(r.last + 1)
}

// line is an event with its proof.
func (x *exporter) line(ctx context.Context, o one, leaf *leafOf) (exportLine, error) {
	var l exportLine
	if leaf != nil {
		var err error
		if l.Proof, err = x.proofs.prove(leaf.number, leaf.record); err != nil {
			return l, err
		}
	}
	if o.odd != "" {
		odd := map[string]any{"seq": o.e.Seq, "undecodable": o.odd}
		var err error
		if l.Event, err = marshal(odd); err != nil || x.redact {
			return l, err
		}
		return l, x.salt(ctx, o, &l)
	}
	e := o.e
	if x.redact {
		e = e.Open()
	}
	text, err := e.MarshalJSON()
	if err != nil {
		return l, err
	}
	if size := max(o.gone, len(o.e.Body)); o.gone > 0 || x.redact && size > 0 {
		text = fmt.Appendf(text[:len(text)-1], `,"body_gone":%d}`, size)
	}
	l.Event = text
	if x.redact || l.Proof == nil {
		return l, nil
	}
	return l, x.salt(ctx, o, &l)
}

// salt gives the proof the salt, and the message where it does not follow from the
// event.
func (x *exporter) salt(ctx context.Context, o one, l *exportLine) error {
	if l.Proof == nil {
		return nil
	}
	var entry audit.Entry
	if o.odd == "" {
		m, err := bus.Stored(o.e)
		if err != nil {
			return err
		}
		entry = audit.Entry(m)
	} else {
		entry = audit.Entry{Stream: audit.Events, Seq: o.e.Seq}
		if leaf, err := audit.ReadRecord([]byte(l.Proof.Record)); err == nil {
			entry.Subject = leaf.Subject
		}
	}
	salt, err := x.proofs.salts.of(ctx, &entry, nil)
	if err != nil {
		return err
	}
	l.Proof.Salt = audit.Hex(salt)
	if salt == nil || o.odd == "" && string(audit.Record(entry, salt)) == l.Proof.Record {
		return nil
	}
	m, err := x.of.Message(ctx, audit.Events, o.e.Seq)
	switch {
	case errors.Is(err, schemas.ErrNotFound):
		return nil // of the record alone: its headers are not known
	case err != nil:
		return err
	case x.from == fromRecord && !sameEvent(m.Event, o.e):
		return nil // what differs is to be seen
	}
	e := audit.Entry(m)
	if o.odd == "" {
		e.Body = nil // it is the event's
	}
	l.Proof.Entry = &e
	return nil
}

// sameEvent tells whether two events have the same envelope and body.
func sameEvent(a, b schemas.Event) bool {
	x, err1 := a.MarshalString()
	y, err2 := b.MarshalString()
	return err1 == nil && err2 == nil && x == y && string(a.Body) == string(b.Body)
}

// writeRows writes what the record has, when it has come as far as the session.
func (x *exporter) writeRows(ctx context.Context, last uint64, out *exportWriter) error {
	waiting, stop := context.WithTimeout(ctx, exportWait)
	defer stop()
	if err := untilRecorded(waiting, x.l, last); err != nil && ctx.Err() != nil {
		return ctx.Err()
	}
	at, err := x.l.Floor(ctx, consumer)
	if err != nil {
		return err
	}
	if err := out.write(exportLine{Recorded: &at}); err != nil {
		return err
	}
	identity, err := x.l.Identity(ctx)
	if err != nil {
		return err
	}
	for row, err := range projections.SessionRows(ctx, x.a.g.server, identity, x.tenant, x.key) {
		if err != nil {
			return err
		}
		if err := out.write(exportLine{Row: &row}); err != nil {
			return err
		}
	}
	return nil
}

// proofs makes the proofs of leaves under one checkpoint.
type proofs struct {
	of     *bus.Audit
	c      audit.Checkpoint
	first  uint64 // leaf that the feed still has
	hashes tlog.HashReader
	salts  saltReader
}

// prover waits for a checkpoint that covers an event, not for ever, and takes the
// newest.
func (x *exporter) prover(ctx context.Context, last uint64) (*proofs, error) {
	p := &proofs{of: x.of, salts: saltReader{a: x.of, secrets: map[string][]byte{}}}
	waiting, stop := context.WithTimeout(ctx, exportWait)
	defer stop()
	if _, err := covered(waiting, x.of, x.keys, last); err != nil && waiting.Err() == nil && !errors.Is(err, schemas.ErrNotFound) {
		return nil, err
	}
	known, err := audit.Known(x.keys.Verifiers)
	if err != nil {
		return nil, err
	}
	if p.first, err = x.of.First(ctx); err != nil {
		return nil, err
	}
	for range 3 { // the right edge may be replaced while it is read
		var text string
		if text, _, err = x.of.Checkpoint(ctx); err != nil || text == "" {
			return p, err
		}
		if p.c, err = audit.OpenCheckpoint(text, known); err != nil {
			return nil, err
		}
		var edge map[string][]byte
		if edge, err = x.of.Edge(ctx); err != nil {
			return nil, err
		}
		p.hashes = p.reader(ctx, edge)
		if p.c.Size == 0 {
			return p, nil
		}
		if _, err = tlog.ProveRecord(int64(p.c.Size), int64(p.c.Size-1), p.hashes); err == nil {
			return p, nil
		}
	}
	return nil, fmt.Errorf("the tree's edge: %w", err)
}

// reader reads hashes; tiles that are full are read once.
func (p *proofs) reader(ctx context.Context, edge map[string][]byte) tlog.HashReader {
	const most = 256
	full := map[string][]byte{}
	return audit.Reader(tlog.Tree{N: int64(p.c.Size), Hash: p.c.Root}, func(t tlog.Tile) ([]byte, error) {
		path := t.Path()
		if data, ok := edge[path]; ok {
			return data, nil
		}
		if t.W < 1<<t.H {
			return nil, schemas.ErrNotFound
		}
		data, ok := full[path]
		if !ok {
			var err error
			if data, err = p.of.Tile(ctx, path); err != nil {
				return nil, err
			}
			if len(full) >= most {
				clear(full)
			}
			full[path] = data
		}
		return data, nil
	})
}

func (p *proofs) prove(number uint64, record string) (*exportProof, error) {
	path, err := tlog.ProveRecord(int64(p.c.Size), int64(number), p.hashes)
	if err != nil {
		return nil, fmt.Errorf("prove leaf %d: %w", number, err)
	}
	x := &exportProof{Leaf: number, Record: record, Path: []string{}}
	for _, h := range path {
		x.Path = append(x.Path, base64.StdEncoding.EncodeToString(h[:]))
	}
	return x, nil
}

// leafOf is a leaf of a session.
type leafOf struct {
	number uint64
	seq    uint64
	record string
}

// leaves yields the leaves that the signed tree has of a session between its first
// event and its last, also those whose events are not there.
func (p *proofs) leaves(ctx context.Context, r exportRange) iter.Seq2[leafOf, error] {
	return func(yield func(leafOf, error) bool) {
		if p.c.Size == 0 {
			return
		}
		from, err := p.of.Find(ctx, audit.Events, r.first)
		if errors.Is(err, schemas.ErrNotFound) {
			return // it is so new that it has none
		}
		if err != nil {
			yield(leafOf{}, err)
			return
		}
		for f, err := range p.of.Feed(ctx, max(from, p.first), p.c.Size) {
			if err != nil {
				yield(leafOf{}, err)
				return
			}
			record, err := audit.CutRecord(f.Payload)
			if err != nil {
				yield(leafOf{}, err)
				return
			}
			stream, seq := audit.PlaceOf(record)
			if stream != audit.Events {
				continue
			}
			if seq > r.last {
				return
			}
			if !strings.Contains(string(record), "."+string(r.key)+".") {
				continue
			}
			leaf, err := audit.ReadRecord(record)
			if err != nil {
				yield(leafOf{}, err)
				return
			}
			if t := strings.Split(leaf.Subject, "."); len(t) != 5 || t[2] != string(r.key) {
				continue
			}
			if !yield(leafOf{f.Number, seq, string(record)}, nil) {
				return
			}
		}
	}
}
