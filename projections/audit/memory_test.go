package audit

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/mod/sumdb/note"
	"golang.org/x/mod/sumdb/tlog"

	"waybill.dev/schemas"
)

// memory is a Store and the log it is of, with the doors through which tests make
// it fail and change what it holds.
type memory struct {
	mu          sync.Mutex
	more        chan struct{} // closed when the log has grown
	log         map[string]map[uint64]Entry
	last        map[string]uint64
	feed        []Item
	old         uint64 // records of the feed that are too old to be there
	tiles       map[tlog.Tile][]byte
	edge        map[tlog.Tile][]byte
	checkpoints []string
	positions   []Position // of their trees
	cosigned    []string
	seen        int // checkpoints when the newest was last read or written
	secrets     map[string][]byte

	// fault may fail an operation, before or after it has done its work.
	fault func(what string, done bool) error
}

func newMemory() *memory {
	return &memory{
		more: make(chan struct{}), log: map[string]map[uint64]Entry{Events: {}, System: {}}, last: map[string]uint64{},
		tiles: map[tlog.Tile][]byte{}, secrets: map[string][]byte{},
		fault: func(string, bool) error { return nil },
	}
}

// store adds a message to the log.
func (m *memory) store(stream, subject string, e schemas.Event, body []byte) Entry {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.last[stream]++
	entry := Entry{
		Stream: stream, Seq: m.last[stream], Subject: subject, Body: body,
		Stored: time.Date(2026, 11, 28, 12, 0, 0, int(m.last[stream]), time.UTC), Header: map[string][]string{},
	}
	if e.Data != nil {
		e.Seq, e.Stored, e.Body = entry.Seq, entry.Stored, body
		entry.Event = e
		text, err := e.MarshalString()
		if err != nil {
			text = err.Error()
		}
		entry.Header["Waybill-Event"] = []string{text}
	}
	m.log[stream][entry.Seq] = entry
	close(m.more)
	m.more = make(chan struct{})
	return entry
}

// say stores an event of a session.
func (m *memory) say(session string, data schemas.Payload, body string) Entry {
	e := schemas.Event{
		Tenant: "acme", Session: schemas.SessionKey(session), Agent: "researcher", Data: data,
		Time: time.Date(2026, 11, 28, 11, 0, 0, 0, time.UTC),
	}
	if e.Kind().OfCall() {
		e.Call, e.Root = "c1", "c1"
	}
	return m.store(Events, "ev.acme."+session+"."+string(e.Kind())+"._", e, []byte(body))
}

func request() *schemas.Requested {
	return &schemas.Requested{
		Target:  schemas.Target{Protocol: "mcp", Server: "s", Method: "tools/call", Name: "echo"},
		Headers: map[string]string{"Mcp-Param-Who": "canary-header"},
	}
}

// decode reads an entry's event, as the memory wrote it.
func decode(e *Entry) {
	e.Event = schemas.Event{}
	if h := e.Header["Waybill-Event"]; e.Stream == Events && len(h) == 1 {
		var ev schemas.Event
		if ev.UnmarshalString(h[0]) == nil {
			ev.Seq, ev.Stored, ev.Body = e.Seq, e.Stored, e.Body
			e.Event = ev
		}
	}
}

// do runs an operation between the faults.
func (m *memory) do(what string, op func() error) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if err := m.fault(what, false); err != nil {
		return err
	}
	if err := op(); err != nil {
		return err
	}
	return m.fault(what, true)
}

func (m *memory) Head(context.Context) (n uint64, at Position, err error) {
	err = m.do("head", func() error {
		n, at = uint64(len(m.feed)), Position{}
		if n > 0 && n == m.old {
			at = nil
		} else if n > 0 {
			at, err = ParsePosition(m.feed[n-1].At.String())
		}
		return err
	})
	return n, at, err
}

func (m *memory) Append(_ context.Context, n uint64, items []Item) error {
	return m.do("append", func() error {
		for i, item := range items {
			if uint64(len(m.feed)) != n+uint64(i) {
				return ErrOvertaken
			}
			if i > 0 {
				if err := m.fault("append more", false); err != nil {
					return err
				}
			}
			if item.Number != uint64(len(m.feed)) {
				return fmt.Errorf("item %d is numbered %d", len(m.feed), item.Number)
			}
			m.feed = append(m.feed, item)
		}
		return nil
	})
}

func (m *memory) Records(_ context.Context, from, to uint64) iter.Seq2[[]byte, error] {
	return func(yield func([]byte, error) bool) {
		m.mu.Lock()
		items := slices.Clone(m.feed[min(max(from, m.old), to, uint64(len(m.feed))):min(to, uint64(len(m.feed)))])
		m.mu.Unlock()
		for _, i := range items {
			record, err := CutRecord(i.Payload)
			if !yield(record, err) {
				return
			}
		}
	}
}

func (m *memory) Tile(_ context.Context, t tlog.Tile) (data []byte, err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	data, ok := m.tiles[t]
	if !ok {
		return nil, schemas.ErrNotFound
	}
	return data, nil
}

func (m *memory) PutTile(_ context.Context, t tlog.Tile, data []byte) error {
	return m.do("tile", func() error {
		if before, ok := m.tiles[t]; ok && string(before) != string(data) {
			return fmt.Errorf("%s: another is stored", t.Path())
		}
		m.tiles[t] = slices.Clone(data)
		return nil
	})
}

func (m *memory) PutEdge(_ context.Context, tiles map[tlog.Tile][]byte) error {
	return m.do("edge", func() error { m.edge = tiles; return nil })
}

func (m *memory) Edge(context.Context) (map[tlog.Tile][]byte, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.edge, nil
}

func (m *memory) Checkpoint(context.Context) (text string, at Position, err error) {
	err = m.do("last", func() error {
		m.seen = len(m.checkpoints)
		if m.seen > 0 {
			text = m.checkpoints[m.seen-1]
			if len(m.positions) == m.seen { // a test may add others
				at = m.positions[m.seen-1]
			}
		}
		return nil
	})
	return text, at, err
}

func (m *memory) PutCheckpoint(_ context.Context, text string, at Position) error {
	return m.do("checkpoint", func() error {
		if m.seen != len(m.checkpoints) {
			return ErrOvertaken
		}
		m.checkpoints, m.positions = append(m.checkpoints, text), append(m.positions, at)
		m.seen++
		return nil
	})
}

func (m *memory) Cosigned(context.Context) (text string, err error) {
	err = m.do("cosigned", func() error {
		if n := len(m.cosigned); n > 0 {
			text = m.cosigned[n-1]
		}
		return nil
	})
	return text, err
}

func (m *memory) PutCosigned(_ context.Context, text string) error {
	return m.do("put cosigned", func() error { m.cosigned = append(m.cosigned, text); return nil })
}

func (m *memory) Entry(_ context.Context, stream string, seq uint64) (Entry, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	e, ok := m.log[stream][seq]
	if !ok {
		return Entry{}, schemas.ErrNotFound
	}
	return e, nil
}

func (m *memory) Last(_ context.Context, stream string) (uint64, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.last[stream], nil
}

func (m *memory) Follow(ctx context.Context, after Position) iter.Seq2[[]Entry, error] {
	return func(yield func([]Entry, error) bool) {
		at := map[string]uint64{Events: after[Events], System: after[System]}
		for {
			m.mu.Lock()
			more := m.more
			var next []Entry
			for _, stream := range []string{System, Events} {
				for seq := at[stream] + 1; seq <= m.last[stream]; seq++ {
					if e, ok := m.log[stream][seq]; ok {
						next = append(next, e)
					}
				}
				at[stream] = m.last[stream]
			}
			m.mu.Unlock()
			for len(next) > 0 {
				n := min(len(next), 8)
				if !yield(next[:n], nil) {
					return
				}
				next = next[n:]
			}
			select {
			case <-ctx.Done():
				return
			case <-more:
			}
		}
	}
}

func (m *memory) Secret(_ context.Context, t schemas.Tenant, s schemas.SessionKey) (secret []byte, err error) {
	err = m.do("secret", func() error {
		key := string(t) + "." + string(s)
		if m.secrets[key] == nil {
			m.secrets[key] = make([]byte, SecretSize)
			for i := range m.secrets[key] {
				m.secrets[key][i] = byte(rand.Uint32())
			}
		}
		secret = m.secrets[key]
		return nil
	})
	return secret, err
}

func (m *memory) Erase(_ context.Context, t schemas.Tenant, s schemas.SessionKey, before uint64) error {
	return m.do("erase", func() error {
		for seq, e := range m.log[Events] {
			if strings.HasPrefix(e.Subject, "ev."+string(t)+"."+string(s)+".") && seq < before && !strings.Contains(e.Subject, ".erased.") {
				delete(m.log[Events], seq)
			}
		}
		for i := range m.feed {
			if without, said := Unsaid(m.feed[i].Payload, s, before); said {
				m.feed[i].Payload = without
			}
		}
		delete(m.secrets, string(t)+"."+string(s))
		return nil
	})
}

// lines are what is verified.
func (m *memory) lines(keys []string, rows map[uint64]schemas.Event) []Line {
	m.mu.Lock()
	defer m.mu.Unlock()
	held := Held{Origin: "test", Keys: keys, Leaves: uint64(len(m.feed)), Streams: map[string]Range{}}
	for stream, all := range m.log {
		r := Range{First: m.last[stream] + 1}
		for seq := range all {
			r.First, r.Last = min(r.First, seq), max(r.Last, seq)
		}
		r.Last = max(r.Last, m.last[stream])
		held.Streams[stream] = r
	}
	if rows != nil {
		held.Rows = &Range{First: 1, Last: m.last[Events]}
	}
	lines := []Line{{Log: &held}}
	for _, c := range m.checkpoints {
		lines = append(lines, Line{Checkpoint: c})
	}
	for _, c := range m.cosigned {
		lines = append(lines, Line{Cosigned: c})
	}
	for _, tiles := range []map[tlog.Tile][]byte{m.tiles, m.edge} {
		for t, data := range tiles {
			lines = append(lines, Line{Tile: t.Path(), Data: slices.Clone(data)})
		}
	}
	at := map[string]uint64{}
	for n, item := range m.feed {
		record, err := CutRecord(item.Payload)
		if err != nil {
			record = nil
		}
		w := Witness{Number: uint64(n), Record: string(record)}
		stream, seq := PlaceOf(record)
		at[stream] = seq
		of := Entry{}
		if e, ok := m.log[stream][seq]; ok {
			e.Body = slices.Clone(e.Body)
			w.Entry, of = &e, e
		}
		if row, ok := rows[seq]; ok && stream == Events {
			w.Row = &row
			of = Entry{Stream: Events, Subject: "ev." + string(row.Tenant) + "." + string(row.Session) + ".x.y", Event: row, Seq: seq}
		}
		if of.Stream != "" {
			t, s := SecretOf(of)
			if secret := m.secrets[string(t)+"."+string(s)]; secret != nil {
				salt := Salt(secret, stream, seq)
				w.Salt = Hex(salt)
				if w.Entry != nil && string(Record(*w.Entry, salt)) == w.Record {
					w.Record = ""
				}
			}
		}
		lines = append(lines, Line{Leaf: &w})
	}
	for stream, all := range m.log {
		for seq := at[stream] + 1; seq <= m.last[stream]; seq++ {
			if e, ok := all[seq]; ok {
				lines = append(lines, Line{Beyond: &e})
			}
		}
	}
	return append(lines, Line{Last: true})
}

func each(lines []Line) iter.Seq2[Line, error] {
	return func(yield func(Line, error) bool) {
		for _, l := range lines {
			if !yield(l, nil) {
				return
			}
		}
	}
}

// keysOf makes keys of a seed.
func keysOf(t interface {
	Helper()
	Fatal(...any)
}, seed byte) Keys {
	t.Helper()
	private, public, err := NewKey("test", slices.Repeat([]byte{seed}, 32))
	if err != nil {
		t.Fatal(err)
	}
	signer, err := note.NewSigner(private)
	if err != nil {
		t.Fatal(err)
	}
	return Keys{Signers: []note.Signer{signer}, Verifiers: []string{public}}
}

// clock goes on by a second each time that it is asked, so that all is old enough
// to be signed.
type clock struct{ now time.Time }

func (c *clock) tick() time.Time {
	c.now = c.now.Add(time.Second)
	return c.now
}

// builder is a builder on m.
func (m *memory) builder(t testing.TB, change func(*Options)) *Builder {
	t.Helper()
	c := &clock{time.Date(2026, 11, 28, 12, 0, 0, 0, time.UTC)}
	o := Options{Store: m, Origin: "test", Keys: keysOf(t, 1), Now: c.tick}
	if change != nil {
		change(&o)
	}
	b, err := New(o)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// all takes what the log has that the tree has not, and signs it.
func (m *memory) all(b *Builder) error {
	m.mu.Lock()
	var batch []Entry
	for _, stream := range []string{System, Events} {
		for seq := b.at[stream] + 1; seq <= m.last[stream]; seq++ {
			if e, ok := m.log[stream][seq]; ok {
				batch = append(batch, e)
			}
		}
	}
	m.mu.Unlock()
	if err := b.Take(context.Background(), batch); err != nil {
		return err
	}
	for range 3 { // taken, settled, signed
		if err := b.Sign(context.Background()); err != nil {
			return err
		}
	}
	return nil
}

var errFault = errors.New("injected fault")
