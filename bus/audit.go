package bus

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"iter"
	"maps"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"waybill.dev/schemas"
)

// The audit has three streams of its own:
//
//	AUDIT        audit.checkpoint, audit.cosigned with those that witnesses have signed too, and the full
//	             tiles of the tree, tlog.tile.…; kept for good
//	FEED         audit.<tenant>.<agent>.<kind>: one record for each leaf, in the order of the tree
//	AUDIT_STATE  what is replaced or goes: the tiles that are not full, tlog.edge.<level>, of which the header
//	             Waybill-Tile has the path, and salt.<tenant>.<session>
//
// A record of FEED has the number of its leaf plus one for its sequence, since
// each is stored only directly behind the one before. So the feed is the tree's
// journal, in which no number can be missing or there twice, whoever writes.
const (
	auditStream = "AUDIT"
	feedStream  = "FEED"
	stateStream = "AUDIT_STATE"

	checkpointSubject = "audit.checkpoint"
	cosignedSubject   = "audit.cosigned"
	edgeSubject       = "tlog.edge."
	headerPosition    = "Waybill-Position"
	headerTile        = "Waybill-Tile"
)

func (o Options) audit() []jetstream.StreamConfig {
	feed := jetstream.StreamConfig{
		Name: feedStream, Description: "the audit's feed: a record for each leaf of the tree",
		Subjects: []string{"audit.*.*.*"}, DenyPurge: true, AllowDirect: o.Replicas <= 1,
		MaxBytes: o.FeedBytes, MaxAge: o.FeedAge, Discard: jetstream.DiscardOld,
		Duplicates: time.Second, // it goes by the sequence
		Storage:    jetstream.FileStorage, Compression: jetstream.S2Compression, Replicas: max(o.Replicas, 1), MaxConsumers: -1,
	}
	if feed.MaxBytes == 0 {
		feed.MaxBytes = 8 << 30
	}
	if feed.MaxAge == 0 {
		feed.MaxAge = 90 * 24 * time.Hour
	}
	return []jetstream.StreamConfig{
		{
			Name: auditStream, Description: "the audit: signed checkpoints and the tree's tiles",
			Subjects: []string{checkpointSubject, cosignedSubject, "tlog.tile.>"}, DenyDelete: true, DenyPurge: true, AllowDirect: o.Replicas <= 1,
			Storage: jetstream.FileStorage, Replicas: max(o.Replicas, 1), MaxConsumers: -1,
		},
		feed,
		{
			Name: stateStream, Description: "the audit: the tree's right edge, and the secrets of sessions",
			Subjects: []string{edgeSubject + "*", "salt.>"}, MaxMsgsPerSubject: 1, DenyPurge: true,
			// By their subjects, which is how a subscriber may read the edge, and not the salts.
			AllowDirect: o.Replicas <= 1,
			Storage:     jetstream.FileStorage, Replicas: max(o.Replicas, 1), MaxConsumers: -1,
		},
	}
}

// ForgetAudit removes the tree, its checkpoints and the feed, for another audit to be
// begun. It needs the admin role, and comes before [Setup].
func ForgetAudit(ctx context.Context, dial Dialer) error {
	nc, err := dial(RoleAdmin)
	if err != nil {
		return fmt.Errorf("connect to the log: %w", err)
	}
	defer nc.Close()
	js, err := jetstream.New(nc)
	if err != nil {
		return err
	}
	state, err := js.Stream(ctx, stateStream)
	if err != nil && !errors.Is(err, jetstream.ErrStreamNotFound) {
		return fmt.Errorf("stream %s: %w", stateStream, err)
	}
	for _, subject := range []string{edgeSubject + "*", replacedSubject + "*"} {
		for state != nil {
			m, err := state.GetLastMsgForSubject(ctx, subject)
			if errors.Is(err, jetstream.ErrMsgNotFound) {
				break
			}
			if err == nil {
				err = state.DeleteMsg(ctx, m.Sequence)
			}
			if err != nil {
				return fmt.Errorf("stream %s: %w", stateStream, err)
			}
		}
	}
	for _, name := range []string{feedStream, auditStream} {
		if err := js.DeleteStream(ctx, name); err != nil && !errors.Is(err, jetstream.ErrStreamNotFound) {
			return fmt.Errorf("stream %s: %w", name, err)
		}
	}
	return nil
}

// Message is a message of the log as it lies there.
type Message struct {
	Stream  string
	Seq     uint64
	Stored  time.Time
	Subject string
	Header  map[string][]string
	Body    []byte

	Event schemas.Event // the message read as an event; without Data where it is none
}

// Decode reads Event of a message of EVENTS.
func (m *Message) Decode() {
	m.Event = schemas.Event{}
	if m.Stream != events {
		return
	}
	if e, err := decode(m.Subject, m.Header, m.Body); err == nil {
		e.Seq, e.Stored = m.Seq, m.Stored
		m.Event = e
	}
}

// Header is what the log has of an event beside its body, nil for what it would not
// take.
func Header(e schemas.Event) map[string][]string {
	m, err := encode(e)
	if err != nil {
		return nil
	}
	return m.Header
}

// Subject is where the log has an event.
func Subject(e schemas.Event) string { return subject(e) }

// FeedRecord is a record of the feed.
type FeedRecord struct {
	Number   uint64 // of the leaf
	Subject  string
	Payload  []byte
	Position string // the last messages of the log that the tree has with this leaf
}

// Audit is the streams of the audit. What a method has written is stored when it
// returns.
type Audit struct {
	l                           *Log
	audit, feed, state, sys, ev jetstream.Stream

	mu         sync.Mutex
	checkpoint uint64 // sequence of the newest checkpoint that this process has seen
}

// Audit opens them.
func (l *Log) Audit(ctx context.Context) (*Audit, error) {
	a := &Audit{l: l, ev: l.stream}
	for name, s := range map[string]*jetstream.Stream{auditStream: &a.audit, feedStream: &a.feed, stateStream: &a.state, system: &a.sys} {
		var err error
		if *s, err = l.js.Stream(ctx, name); err != nil {
			return nil, fmt.Errorf("open stream %s: %w", name, err)
		}
	}
	return a, nil
}

// Head is how many records the feed has had, and the position of the last, "" where
// that is too old to be there.
func (a *Audit) Head(ctx context.Context) (uint64, string, error) {
	info, err := retry(ctx, a.l, func(ctx context.Context) (*jetstream.StreamInfo, error) { return a.feed.Info(ctx) })
	if err != nil {
		return 0, "", fmt.Errorf("the feed's last record: %w", err)
	}
	if info.State.LastSeq == 0 {
		return 0, "", nil
	}
	r, err := a.Record(ctx, info.State.LastSeq-1)
	if errors.Is(err, schemas.ErrNotFound) {
		err = nil
	}
	return info.State.LastSeq, r.Position, err
}

// First is the number of the first record that the feed still has. Those that were
// replaced are no more in the stream of the others, but there.
func (a *Audit) First(ctx context.Context) (uint64, error) {
	info, err := a.feed.Info(ctx)
	if err != nil {
		return 0, fmt.Errorf("the feed's first record: %w", err)
	}
	n := max(info.State.FirstSeq, 1) - 1
	for n > 0 {
		_, err := a.replacement(ctx, n-1)
		if errors.Is(err, schemas.ErrNotFound) {
			break
		}
		if err != nil {
			return 0, err
		}
		n--
	}
	return n, nil
}

// Append adds records to the feed, the first as number n. The server takes none
// that does not follow the one before it here: not only in its place, as what
// another has stored there could do, too. So who is not alone finds out.
func (a *Audit) Append(ctx context.Context, n uint64, records []FeedRecord) error {
	batch := rand.Text()
	id := func(i int) string { return batch + "/" + strconv.Itoa(i) }
	for i, r := range records {
		m := nats.NewMsg(r.Subject)
		m.Data = r.Payload
		m.Header.Set("Content-Type", "application/cloudevents+json; charset=UTF-8")
		m.Header.Set(headerPosition, r.Position)
		m.Header.Set(jetstream.ExpectedLastSeqHeader, strconv.FormatUint(n+uint64(i), 10))
		m.Header.Set(jetstream.MsgIDHeader, id(i))
		if i > 0 {
			m.Header.Set(jetstream.ExpectedLastMsgIDHeader, id(i-1))
		}
		if i < len(records)-1 {
			// Its acknowledgement is that of the last, which needs it.
			if err := a.l.nc.PublishMsg(m); err != nil {
				return fmt.Errorf("record %d of the feed: %w", n+uint64(i), err)
			}
			continue
		}
		if _, err := a.l.acks.publish(ctx, m); err != nil {
			return fmt.Errorf("record %d of the feed: %w", n+uint64(i), err)
		}
	}
	return nil
}

// Record reads one; [schemas.ErrNotFound].
func (a *Audit) Record(ctx context.Context, n uint64) (FeedRecord, error) {
	m, err := get(ctx, a.l, a.feed, n+1)
	if errors.Is(err, schemas.ErrNotFound) {
		return a.replacement(ctx, n)
	}
	if err != nil {
		return FeedRecord{}, fmt.Errorf("record %d of the feed: %w", n, err)
	}
	return feedRecord(m.Sequence, m.Subject, m.Header, m.Data), nil
}

func feedRecord(seq uint64, subject string, h nats.Header, data []byte) FeedRecord {
	return FeedRecord{Number: seq - 1, Subject: subject, Payload: data, Position: h.Get(headerPosition)}
}

// Feed yields the records from one number up to another, those that there are.
// One whose body was erased is as it was but for that.
func (a *Audit) Feed(ctx context.Context, from, to uint64) iter.Seq2[FeedRecord, error] {
	return func(yield func(FeedRecord, error) bool) {
		var others []uint64 // numbers of those that were replaced
		for m, err := range read(ctx, a.l, a.state, replacedSubject+"*", 1, 0) {
			if err != nil {
				yield(FeedRecord{}, fmt.Errorf("the feed's replaced records: %w", err))
				return
			}
			n, err := strconv.ParseUint(strings.TrimPrefix(m.Subject, replacedSubject), 10, 64)
			if err == nil && n >= from && n < to {
				others = append(others, n)
			}
		}
		slices.Sort(others)
		next, begun := from, false
		// fill yields the replaced ones up to a number. Those that have been replaced since
		// are asked for, behind the first that is there: what is before that may be too old.
		fill := func(to uint64) bool {
			for missed := 0; next < to; next++ {
				known := len(others) > 0 && others[0] < to
				switch {
				case known && others[0] == next:
				case begun && missed < manyMissed:
				case known:
					next = others[0]
				default:
					next = to
					return true
				}
				if known && others[0] == next {
					others = others[1:]
				}
				r, err := a.replacement(ctx, next)
				if errors.Is(err, schemas.ErrNotFound) {
					missed++
					continue
				}
				if missed, begun = 0, true; !yield(r, err) || err != nil {
					return false
				}
			}
			return true
		}
		for m, err := range read(ctx, a.l, a.feed, "", from+1, to) {
			if err != nil {
				yield(FeedRecord{}, fmt.Errorf("the feed from %d on: %w", from, err))
				return
			}
			if !fill(m.Seq-1) || !yield(feedRecord(m.Seq, m.Subject, m.Header, m.Body), nil) {
				return
			}
			next, begun = m.Seq, true
			for len(others) > 0 && others[0] < next { // it is there itself, as yet
				others = others[1:]
			}
		}
		fill(to)
	}
}

// manyMissed is how many records are looked for in a row that are not there.
const manyMissed = 1000

// replacement is the record that stands for one whose body was erased;
// [schemas.ErrNotFound].
func (a *Audit) replacement(ctx context.Context, n uint64) (FeedRecord, error) {
	m, err := retry(ctx, a.l, func(ctx context.Context) (*jetstream.RawStreamMsg, error) {
		return a.state.GetLastMsgForSubject(ctx, replacedSubject+strconv.FormatUint(n, 10))
	})
	if errors.Is(err, jetstream.ErrMsgNotFound) {
		err = schemas.ErrNotFound
	}
	if err != nil {
		return FeedRecord{}, fmt.Errorf("record %d of the feed: %w", n, err)
	}
	return feedRecord(n+1, m.Header.Get("Waybill-Subject"), m.Header, m.Data), nil
}

// replacedSubject is where records without their bodies are. No tenant's salt is
// there, whose names have no upper case.
const replacedSubject = "salt.FEED."

// Follow yields the records of the feed that are stored from now on.
func (a *Audit) Follow(ctx context.Context, subject string) (iter.Seq2[FeedRecord, error], error) {
	c, err := a.feed.OrderedConsumer(ctx, jetstream.OrderedConsumerConfig{
		FilterSubjects: []string{subject}, DeliverPolicy: jetstream.DeliverNewPolicy, InactiveThreshold: 30 * time.Second,
	})
	if err != nil {
		return nil, fmt.Errorf("follow the feed: %w", err)
	}
	it, err := c.Messages(a.l.pulling()...)
	if err != nil {
		return nil, fmt.Errorf("follow the feed: %w", err)
	}
	return func(yield func(FeedRecord, error) bool) {
		defer it.Stop()
		defer context.AfterFunc(ctx, it.Stop)()
		for {
			m, err := it.Next()
			switch {
			case ctx.Err() != nil:
				return
			case errors.Is(err, jetstream.ErrNoHeartbeat):
				continue
			case err != nil:
				yield(FeedRecord{}, fmt.Errorf("follow the feed: %w", err))
				return
			}
			md, err := m.Metadata()
			if err != nil {
				continue
			}
			if !yield(feedRecord(md.Sequence.Stream, m.Subject(), m.Headers(), m.Data()), nil) {
				return
			}
		}
	}, nil
}

// Find is the number of the leaf that covers a message; [schemas.ErrNotFound].
func (a *Audit) Find(ctx context.Context, stream string, seq uint64) (uint64, error) {
	first, err := a.First(ctx)
	if err != nil {
		return 0, err
	}
	end, _, err := a.Head(ctx)
	if err != nil {
		return 0, err
	}
	return a.find(ctx, stream, seq, first, end)
}

// find is Find among the leaves from one number up to another.
func (a *Audit) find(ctx context.Context, stream string, seq, first, end uint64) (uint64, error) {
	last := end
	for first < last { // the first that has it
		mid := first + (last-first)/2
		has, err := a.covers(ctx, mid, stream, seq)
		if err != nil {
			return 0, err
		}
		if has {
			last = mid
		} else {
			first = mid + 1
		}
	}
	if first == end {
		return 0, fmt.Errorf("leaf of %s %d: %w", stream, seq, schemas.ErrNotFound)
	}
	return first, nil
}

// covers tells whether the tree has a message when it has a leaf.
func (a *Audit) covers(ctx context.Context, n uint64, stream string, seq uint64) (bool, error) {
	r, err := a.Record(ctx, n)
	return reached(r.Position, stream) >= seq, err
}

// leaves yields the numbers of the leaves of messages of EVENTS, whose sequences are
// in their order, as far as the feed has them. Most often one lies as far behind the
// one before as in the log, so that it costs little to find.
func (a *Audit) leaves(ctx context.Context, seqs []uint64) iter.Seq2[uint64, error] {
	return func(yield func(uint64, error) bool) {
		first, err := a.First(ctx)
		if err != nil {
			yield(0, err)
			return
		}
		end, _, err := a.Head(ctx)
		if err != nil {
			yield(0, err)
			return
		}
		before := uint64(0)
		for i, seq := range seqs {
			n := first
			if i > 0 {
				n = before + seq - seqs[i-1]
			}
			there, earlier := false, false
			if n > first && n < end && i > 0 {
				if there, err = a.covers(ctx, n, events, seq); err == nil && there {
					earlier, err = a.covers(ctx, n-1, events, seq)
				}
			}
			if err == nil && (!there || earlier) {
				n, err = a.find(ctx, events, seq, first, end)
			}
			if errors.Is(err, schemas.ErrNotFound) {
				return // it is too old, or too new, and so is what follows: nothing of either is in the feed
			}
			if err != nil {
				yield(0, err)
				return
			}
			if before = n; !yield(n, nil) {
				return
			}
		}
	}
}

// reached is how far a position is in a stream.
func reached(position, stream string) uint64 {
	for part := range strings.FieldsSeq(position) {
		if n, ok := strings.CutPrefix(part, stream+"="); ok {
			seq, _ := strconv.ParseUint(n, 10, 64) // 0: not there
			return seq
		}
	}
	return 0
}

// Subscriber makes the durable consumer from which a subscriber pulls its tenant's
// feed: what it has not acknowledged is kept for it, as long as the feed is.
func (a *Audit) Subscriber(ctx context.Context, name string, t schemas.Tenant) error {
	_, err := a.l.js.CreateOrUpdateConsumer(ctx, feedStream, jetstream.ConsumerConfig{
		Durable: name, Description: "subscriber " + name + " of tenant " + string(t), FilterSubject: "audit." + string(t) + ".>",
		AckPolicy: jetstream.AckExplicitPolicy, AckWait: 30 * time.Second, MaxAckPending: 1000, MaxDeliver: -1,
	})
	if err != nil {
		return fmt.Errorf("consumer of subscriber %s: %w", name, err)
	}
	return nil
}

// tileSubject is where the tile of a path (tile/8/0/x001/234) is.
func tileSubject(path string) string { return "tlog." + strings.ReplaceAll(path, "/", ".") }

// Tile reads a full tile; [schemas.ErrNotFound].
func (a *Audit) Tile(ctx context.Context, path string) ([]byte, error) {
	m, err := retry(ctx, a.l, func(ctx context.Context) (*jetstream.RawStreamMsg, error) {
		return a.audit.GetLastMsgForSubject(ctx, tileSubject(path))
	})
	if errors.Is(err, jetstream.ErrMsgNotFound) {
		return nil, fmt.Errorf("%s: %w", path, schemas.ErrNotFound)
	}
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return m.Data, nil
}

// PutTile stores a full tile, once.
func (a *Audit) PutTile(ctx context.Context, path string, data []byte) error {
	m := nats.NewMsg(tileSubject(path))
	m.Data = data
	m.Header.Set(jetstream.ExpectedLastSubjSeqHeader, "0")
	_, err := a.l.acks.publish(ctx, m)
	if err == nil {
		return nil
	}
	if overtaken(err) {
		before, err := a.Tile(ctx, path)
		if err != nil {
			return err
		}
		if bytes.Equal(before, data) {
			return nil
		}
		return fmt.Errorf("%s: another is stored in its place", path)
	}
	return fmt.Errorf("%s: %w", path, err)
}

// PutEdge stores the tiles that are not full, by path, in the place of the last.
func (a *Audit) PutEdge(ctx context.Context, tiles map[string][]byte) error {
	for path, data := range tiles {
		m := nats.NewMsg(edgeSubject + strings.Split(path, "/")[2])
		m.Data = data
		m.Header.Set(headerTile, path)
		if _, err := a.l.acks.publish(ctx, m); err != nil {
			return fmt.Errorf("%s: %w", path, err)
		}
	}
	return nil
}

// edgeLevels is how many levels a tree can have whose leaves 64 bits count.
const edgeLevels = 8

// Edge reads the tiles that are not full, by path. Each is asked for by its
// subject: a reader that goes on from one to the next misses what is replaced
// before it comes there.
func (a *Audit) Edge(ctx context.Context) (map[string][]byte, error) {
	tiles := map[string][]byte{}
	for level := range edgeLevels {
		m, err := retry(ctx, a.l, func(ctx context.Context) (*jetstream.RawStreamMsg, error) {
			return a.state.GetLastMsgForSubject(ctx, edgeSubject+strconv.Itoa(level))
		})
		if errors.Is(err, jetstream.ErrMsgNotFound) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("edge of the tree: %w", err)
		}
		tiles[m.Header.Get(headerTile)] = m.Data
	}
	return tiles, nil
}

// Tiles yields all tiles by their paths, those that are not full first: a tile
// that takes the place of one of them, since it is full, was stored before it was
// replaced, and is found behind it.
func (a *Audit) Tiles(ctx context.Context) iter.Seq2[Tile, error] {
	return func(yield func(Tile, error) bool) {
		edge, err := a.Edge(ctx)
		if err != nil {
			yield(Tile{}, err)
			return
		}
		for path, data := range edge {
			if !yield(Tile{path, data}, nil) {
				return
			}
		}
		for m, err := range read(ctx, a.l, a.audit, "tlog.tile.>", 1, 0) {
			path := strings.ReplaceAll(strings.TrimPrefix(m.Subject, "tlog."), ".", "/")
			if !yield(Tile{path, m.Body}, err) || err != nil {
				return
			}
		}
	}
}

// Tile is a tile of the tree.
type Tile struct {
	Path string
	Data []byte
}

// Checkpoint is the newest one, "" for none, and the last messages of the log that its
// tree has, "" where that is not known.
func (a *Audit) Checkpoint(ctx context.Context) (text, position string, err error) {
	m, err := retry(ctx, a.l, func(ctx context.Context) (*jetstream.RawStreamMsg, error) {
		return a.audit.GetLastMsgForSubject(ctx, checkpointSubject)
	})
	if errors.Is(err, jetstream.ErrMsgNotFound) {
		return "", "", nil
	}
	if err != nil {
		return "", "", fmt.Errorf("newest checkpoint: %w", err)
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	a.checkpoint = m.Sequence
	return string(m.Data), m.Header.Get(headerPosition), nil
}

// PutCheckpoint adds one behind the one that this process saw last, or fails.
func (a *Audit) PutCheckpoint(ctx context.Context, text, position string) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	m := nats.NewMsg(checkpointSubject)
	m.Data = []byte(text)
	if position != "" {
		m.Header.Set(headerPosition, position)
	}
	m.Header.Set(jetstream.ExpectedLastSubjSeqHeader, strconv.FormatUint(a.checkpoint, 10))
	ack, err := a.l.acks.publish(ctx, m)
	if err != nil {
		return fmt.Errorf("store the checkpoint: %w", err)
	}
	a.checkpoint = ack.Sequence
	return nil
}

// Cosigned is the newest checkpoint that witnesses have signed too, "" for none.
func (a *Audit) Cosigned(ctx context.Context) (string, error) {
	m, err := retry(ctx, a.l, func(ctx context.Context) (*jetstream.RawStreamMsg, error) {
		return a.audit.GetLastMsgForSubject(ctx, cosignedSubject)
	})
	if errors.Is(err, jetstream.ErrMsgNotFound) {
		return "", nil
	}
	if err != nil {
		return "", fmt.Errorf("newest cosigned checkpoint: %w", err)
	}
	return string(m.Data), nil
}

// PutCosigned adds one. It is behind its checkpoint, with which it is kept.
func (a *Audit) PutCosigned(ctx context.Context, text string) error {
	m := nats.NewMsg(cosignedSubject)
	m.Data = []byte(text)
	if _, err := a.l.acks.publish(ctx, m); err != nil {
		return fmt.Errorf("store the cosigned checkpoint: %w", err)
	}
	return nil
}

// AllCosigned yields those up to a place ([Audit.Signed]), in the order in which they
// were stored.
func (a *Audit) AllCosigned(ctx context.Context, to uint64) iter.Seq2[Checkpointed, error] {
	return a.checkpoints(ctx, cosignedSubject, to)
}

// Signed is where the stream of checkpoints and tiles ends. Asked for before
// [Audit.Head], it bounds [Audit.Checkpoints] to trees of which the feed has all.
func (a *Audit) Signed(ctx context.Context) (uint64, error) {
	info, err := retry(ctx, a.l, func(ctx context.Context) (*jetstream.StreamInfo, error) { return a.audit.Info(ctx) })
	if err != nil {
		return 0, fmt.Errorf("the newest checkpoint: %w", err)
	}
	return info.State.LastSeq, nil
}

// Checkpointed is a checkpoint, and when it was stored.
type Checkpointed struct {
	Text   string
	Stored time.Time
}

// Checkpoints yields those up to a place ([Audit.Signed]), oldest first.
func (a *Audit) Checkpoints(ctx context.Context, to uint64) iter.Seq2[Checkpointed, error] {
	return a.checkpoints(ctx, checkpointSubject, to)
}

func (a *Audit) checkpoints(ctx context.Context, subject string, to uint64) iter.Seq2[Checkpointed, error] {
	return func(yield func(Checkpointed, error) bool) {
		if to == 0 {
			return
		}
		for m, err := range read(ctx, a.l, a.audit, subject, 1, to) {
			if !yield(Checkpointed{string(m.Body), m.Stored}, err) || err != nil {
				return
			}
		}
	}
}

func (a *Audit) of(stream string) (jetstream.Stream, string, error) {
	switch stream {
	case events:
		return a.ev, "ev.>", nil
	case system:
		return a.sys, "sys.>", nil
	}
	return nil, "", fmt.Errorf("the tree has no stream %q", stream)
}

// Range is the first and the last message of a stream of the log; the first is
// above the last where there is none.
func (a *Audit) Range(ctx context.Context, stream string) (first, last uint64, err error) {
	s, _, err := a.of(stream)
	if err != nil {
		return 0, 0, err
	}
	info, err := s.Info(ctx)
	if err != nil {
		return 0, 0, fmt.Errorf("stream %s: %w", stream, err)
	}
	if info.State.Msgs == 0 {
		return info.State.LastSeq + 1, info.State.LastSeq, nil
	}
	return info.State.FirstSeq, info.State.LastSeq, nil
}

// Message reads one message of the log; [schemas.ErrNotFound].
func (a *Audit) Message(ctx context.Context, stream string, seq uint64) (Message, error) {
	s, _, err := a.of(stream)
	if err != nil {
		return Message{}, err
	}
	raw, err := get(ctx, a.l, s, seq)
	if err != nil {
		return Message{}, fmt.Errorf("%s %d: %w", stream, seq, err)
	}
	m := Message{Stream: stream, Seq: raw.Sequence, Stored: raw.Time.UTC(), Subject: raw.Subject, Header: raw.Header, Body: raw.Data}
	// A server that answers directly says by headers where the message was; no
	// program of ours stores such.
	for _, name := range []string{jetstream.StreamHeader, jetstream.SubjectHeader, jetstream.SequenceHeader, jetstream.TimeStampHeaer, jetstream.LastSequenceHeader} {
		delete(m.Header, name)
	}
	m.Decode()
	return m, nil
}

// Messages yields the messages of a stream of the log from a sequence on, up to
// the newest at the time of the call.
func (a *Audit) Messages(ctx context.Context, stream string, from uint64) iter.Seq2[Message, error] {
	s, _, err := a.of(stream)
	if err != nil {
		return func(yield func(Message, error) bool) { yield(Message{}, err) }
	}
	return func(yield func(Message, error) bool) {
		for m, err := range read(ctx, a.l, s, "", from, 0) {
			m.Stream = stream
			m.Decode()
			if !yield(m, err) || err != nil {
				return
			}
		}
	}
}

// Erasures yields the events from a sequence on that say that a session was erased.
func (a *Audit) Erasures(ctx context.Context, from uint64) iter.Seq2[Message, error] {
	return func(yield func(Message, error) bool) {
		for m, err := range read(ctx, a.l, a.ev, "ev.*.*."+string(schemas.KindErased)+".*", from, 0) {
			m.Stream = events
			m.Decode()
			if !yield(m, err) || err != nil {
				return
			}
		}
	}
}

// After yields every message of the log behind a position, each stream in its order,
// until ctx is done: the first that comes at once, and what comes in the moment after
// it together, since each by itself would cost several wakeups more. All that is read
// ahead is one such burst of each stream.
func (a *Audit) After(ctx context.Context, at map[string]uint64) iter.Seq2[[]Message, error] {
	return func(yield func([]Message, error) bool) {
		ctx, stop := context.WithCancel(ctx)
		var readers sync.WaitGroup
		defer readers.Wait()
		defer stop()
		heard, failed := make(chan []Message), make(chan error, 2)
		for _, stream := range []string{events, system} {
			s, subject, err := a.of(stream)
			if err != nil {
				yield(nil, err)
				return
			}
			readers.Go(func() {
				if err := a.after(ctx, s, stream, subject, at[stream], heard); err != nil && ctx.Err() == nil {
					failed <- fmt.Errorf("read %s behind %d: %w", stream, at[stream], err)
				}
			})
		}
		for {
			select {
			case <-ctx.Done():
				return
			case err := <-failed:
				yield(nil, err)
				return
			case burst := <-heard:
				if !yield(burst, nil) {
					return
				}
			}
		}
	}
}

// Bounds of a burst, and how long its first message waits for others.
const (
	burst      = 1000
	burstBytes = 8 << 20
	gather     = 25 * time.Millisecond

	anew = 500 * time.Millisecond // until a reader that read nothing is opened again
)

// after reads one stream, over what may become of its consumer.
func (a *Audit) after(ctx context.Context, s jetstream.Stream, stream, subject string, after uint64, heard chan<- []Message) error {
	for {
		c, err := retry(ctx, a.l, func(ctx context.Context) (jetstream.Consumer, error) {
			return s.CreateConsumer(ctx, jetstream.ConsumerConfig{
				FilterSubject: subject, DeliverPolicy: jetstream.DeliverByStartSequencePolicy, OptStartSeq: after + 1,
				AckPolicy: jetstream.AckNonePolicy, InactiveThreshold: 30 * time.Second, MemoryStorage: true, Replicas: 1,
			})
		})
		if err != nil {
			return err
		}
		r := bursts{a: a, c: c, stream: stream, after: after, heard: heard}
		err = r.read(ctx)
		a.l.letGo(ctx, c)
		if ctx.Err() != nil {
			return err
		}
		a.l.o.Log.Warn("reader interrupted, opening it again", "stream", stream, "behind", r.after, "error", err)
		if r.after == after && !pause(ctx, anew) { // else it would spin
			return ctx.Err()
		}
		after = r.after
	}
}

// bursts reads a stream through one consumer.
type bursts struct {
	a          *Audit
	c          jetstream.Consumer
	stream     string
	after      uint64 // sequence of the last message
	deliveries uint64 // none may be missing
	heard      chan<- []Message
}

func (r *bursts) read(ctx context.Context) error {
	beat := jetstream.FetchHeartbeat(5 * time.Second)
	if r.a.l.o.Replicas > 1 { // its node may die
		beat = jetstream.FetchHeartbeat(time.Second)
	}
	// A deadline of ctx is not one of the requests, which need time for some beats.
	waiting, stop := context.WithCancel(context.WithoutCancel(ctx))
	defer stop()
	defer context.AfterFunc(ctx, stop)()
	for {
		some, much, err := r.fetch(ctx, 1, jetstream.FetchContext(waiting), beat)
		if !some && err == nil {
			err = r.missed(ctx)
		}
		for some && err == nil {
			if !much && !pause(ctx, gather) {
				return ctx.Err()
			}
			some, much, err = r.fetch(ctx, burst, jetstream.FetchMaxWait(time.Millisecond), jetstream.FetchMaxBytes(burstBytes))
		}
		if err != nil {
			return err
		}
	}
}

// missed is an error if what was sent did not come, as may be when a connection breaks:
// nothing is sent again, and while all is quiet no later message tells.
func (r *bursts) missed(ctx context.Context) error {
	info, err := retry(ctx, r.a.l, r.c.Info)
	if err == nil && info.Delivered.Consumer != r.deliveries {
		err = fmt.Errorf("%d were delivered, %d came", info.Delivered.Consumer, r.deliveries)
	}
	return err
}

// fetch gives on what comes, and says whether that was something, and whether it was
// so much that there will be more already.
func (r *bursts) fetch(ctx context.Context, most int, how ...jetstream.FetchOpt) (some, much bool, err error) {
	got, err := r.c.Fetch(most, how...)
	if err != nil {
		return false, false, err
	}
	var all []Message
	size := 0
	for m := range got.Messages() {
		md, err := m.Metadata()
		if err != nil {
			return false, false, err
		}
		if r.deliveries++; md.Sequence.Consumer != r.deliveries {
			return false, false, fmt.Errorf("delivery %d came where %d was due", md.Sequence.Consumer, r.deliveries)
		}
		one := Message{Stream: r.stream, Seq: md.Sequence.Stream, Stored: md.Timestamp.UTC(), Subject: m.Subject(), Header: m.Headers(), Body: m.Data()}
		one.Decode()
		all, size = append(all, one), size+len(one.Body)
	}
	if len(all) == 0 {
		return false, false, got.Error()
	}
	select {
	case r.heard <- all:
	case <-ctx.Done():
		return false, false, ctx.Err()
	}
	r.after = all[len(all)-1].Seq
	return true, len(all) >= burst/2 || size >= burstBytes/2, nil
}

// get reads one message; [schemas.ErrNotFound].
func get(ctx context.Context, l *Log, s jetstream.Stream, seq uint64) (*jetstream.RawStreamMsg, error) {
	m, err := retry(ctx, l, func(ctx context.Context) (*jetstream.RawStreamMsg, error) { return s.GetMsg(ctx, seq) })
	if errors.Is(err, jetstream.ErrMsgNotFound) {
		return nil, schemas.ErrNotFound
	}
	return m, err
}

// read yields a stream's messages on a subject, "" for all, from a sequence up to
// another, or, for 0, to the newest at the time of the call. Messages may be deleted
// meanwhile: then those that are left are not as many as were counted.
func read(ctx context.Context, l *Log, s jetstream.Stream, subject string, from, to uint64) iter.Seq2[Message, error] {
	return func(yield func(Message, error) bool) {
		info, err := retry(ctx, l, func(ctx context.Context) (*jetstream.StreamInfo, error) { return s.Info(ctx) })
		if err != nil {
			yield(Message{}, err)
			return
		}
		if to == 0 || to > info.State.LastSeq {
			to = info.State.LastSeq
		}
		if info.State.Msgs == 0 {
			return
		}
		for next, more := max(from, 1), true; more && next <= to; {
			if next, more, err = readOnce(ctx, l, s, subject, next, to, func(m Message) bool { return yield(m, nil) }); err != nil {
				yield(Message{}, err)
				return
			}
		}
	}
}

// uncounted is how long a reader waits for a message that was counted.
const uncounted = 2 * time.Second

// readOnce reads through one consumer, and tells where to go on if there may be more.
func readOnce(ctx context.Context, l *Log, s jetstream.Stream, subject string, from, to uint64, yield func(Message) bool) (next uint64, more bool, err error) {
	cfg := jetstream.OrderedConsumerConfig{
		DeliverPolicy: jetstream.DeliverByStartSequencePolicy, OptStartSeq: from, InactiveThreshold: 30 * time.Second,
	}
	if subject != "" {
		cfg.FilterSubjects = []string{subject}
	}
	c, err := retry(ctx, l, func(ctx context.Context) (jetstream.Consumer, error) { return s.OrderedConsumer(ctx, cfg) })
	if err != nil {
		return from, false, err
	}
	defer func() {
		if now := c.CachedInfo(); now != nil && l.nc.IsConnected() {
			bye, cancel := context.WithTimeout(context.WithoutCancel(ctx), 2*time.Second)
			defer cancel()
			_ = l.js.DeleteConsumer(bye, now.Stream, now.Name) // it would go by itself
		}
	}()
	left, err := retry(ctx, l, c.Info)
	if err != nil || left.NumPending == 0 {
		return from, false, err
	}
	it, err := c.Messages(l.pulling()...)
	if err != nil {
		return from, false, err
	}
	defer it.Stop()
	for next = from; ; {
		waiting, stop := context.WithTimeout(ctx, uncounted)
		m, err := it.Next(jetstream.NextContext(waiting))
		late := waiting.Err() != nil && ctx.Err() == nil
		stop()
		if err != nil && late {
			return next, true, nil
		}
		if err != nil {
			return next, false, err
		}
		md, err := m.Metadata()
		if err != nil {
			return next, false, err
		}
		if md.Sequence.Stream > to {
			return next, false, nil
		}
		next = md.Sequence.Stream + 1
		if !yield(Message{Seq: md.Sequence.Stream, Stored: md.Timestamp.UTC(), Subject: m.Subject(), Header: m.Headers(), Body: m.Data()}) {
			return next, false, nil
		}
		if md.NumPending == 0 || next > to {
			return next, true, nil // counted anew: it is none, nearly always
		}
	}
}

func secretSubject(t schemas.Tenant, s schemas.SessionKey) string {
	if t == "" {
		return "salt.LOG"
	}
	return "salt." + string(t) + "." + string(s)
}

// Secret is a session's secret of size random bytes; "" and "" for the log's own.
// It is made when there is none, unless found is all that is asked for: then it
// is nil.
func (a *Audit) Secret(ctx context.Context, t schemas.Tenant, s schemas.SessionKey, size int, found bool) ([]byte, error) {
	subject := secretSubject(t, s)
	for {
		m, err := retry(ctx, a.l, func(ctx context.Context) (*jetstream.RawStreamMsg, error) {
			return a.state.GetLastMsgForSubject(ctx, subject)
		})
		if err == nil {
			if len(m.Data) != size {
				return nil, fmt.Errorf("%s has %d bytes, not %d", subject, len(m.Data), size)
			}
			return m.Data, nil
		}
		if !errors.Is(err, jetstream.ErrMsgNotFound) {
			return nil, fmt.Errorf("%s: %w", subject, err)
		}
		if found {
			return nil, nil
		}
		secret := make([]byte, size)
		_, _ = rand.Read(secret) // never fails
		put := nats.NewMsg(subject)
		put.Data = secret
		put.Header.Set(jetstream.ExpectedLastSubjSeqHeader, "0")
		switch _, err := a.l.acks.publish(ctx, put); {
		case err == nil:
			return secret, nil
		case !overtaken(err):
			return nil, fmt.Errorf("%s: %w", subject, err)
		}
	}
}

// Outlived finds a session of which the log has nothing any more: its tenant by its
// secret, and by what the feed has of it the agent, "_" where that has nothing, and how
// many records. It returns [schemas.ErrNotFound].
func (a *Audit) Outlived(ctx context.Context, s schemas.SessionKey) (t schemas.Tenant, of schemas.Agent, records int, err error) {
	m, err := retry(ctx, a.l, func(ctx context.Context) (*jetstream.RawStreamMsg, error) {
		return a.state.GetLastMsgForSubject(ctx, secretSubject("*", s))
	})
	if errors.Is(err, jetstream.ErrMsgNotFound) {
		err = schemas.ErrNotFound
	}
	if err != nil {
		return "", "", 0, fmt.Errorf("secret of session %s: %w", s, err)
	}
	t = schemas.Tenant(strings.Split(m.Subject, ".")[1])
	if schemas.CheckToken(string(t)) != nil {
		return "", "", 0, fmt.Errorf("%s: %w", m.Subject, schemas.ErrNotFound) // a record of the feed that was replaced
	}
	of = "_"
	for m, err := range read(ctx, a.l, a.feed, "audit."+string(t)+".*.*", 1, 0) {
		if err != nil {
			return "", "", 0, fmt.Errorf("feed of session %s: %w", s, err)
		}
		if bytes.Contains(m.Body, []byte(`"subject":"ev.`+string(t)+"."+string(s)+".")) {
			records++
			if agent := strings.Split(m.Subject, ".")[2]; agent != "_" {
				of = schemas.Agent(agent)
			}
		}
	}
	return t, of, records, nil
}

// Erase overwrites what the log has of a session before a message of EVENTS, but
// for erasures: its events, its dead letters, the bodies in the feed, and its
// secret, which goes last. Done again, it finds less.
func (a *Audit) Erase(ctx context.Context, t schemas.Tenant, s schemas.SessionKey, before uint64, cut func(payload []byte) (without []byte, said bool)) error {
	of, err := Filter{Tenant: t, Session: s}.subjects()
	if err != nil {
		return err
	}
	var seqs, deadSeqs []uint64
	for m, err := range read(ctx, a.l, a.ev, of[0], 1, before-1) {
		if err != nil {
			return fmt.Errorf("events of session %s: %w", s, err)
		}
		if _, _, kind, _ := parts(m.Subject); kind != schemas.KindErased {
			seqs = append(seqs, m.Seq)
		}
	}
	// The feed first: its records are made of what else is erased.
	for n, err := range a.leaves(ctx, seqs) {
		if err == nil {
			err = a.eraseRecord(ctx, n, cut)
		}
		if err != nil {
			return fmt.Errorf("feed of session %s: %w", s, err)
		}
	}
	letters, err := a.l.js.Stream(ctx, dead)
	if err != nil {
		return fmt.Errorf("dead letters: %w", err)
	}
	for m, err := range read(ctx, a.l, letters, "", 1, 0) {
		if err != nil {
			return fmt.Errorf("dead letters: %w", err)
		}
		tenant, session, _, _ := parts(nats.Header(m.Header).Get("Dead-Subject"))
		if tenant == t && session == s {
			deadSeqs = append(deadSeqs, m.Seq)
		}
	}
	for stream, all := range map[jetstream.Stream][]uint64{letters: deadSeqs, a.ev: seqs} {
		for _, seq := range all {
			if err := overwrite(ctx, stream, seq); err != nil {
				return err
			}
		}
	}
	m, err := a.state.GetLastMsgForSubject(ctx, secretSubject(t, s))
	if errors.Is(err, jetstream.ErrMsgNotFound) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("secret of session %s: %w", s, err)
	}
	return overwrite(ctx, a.state, m.Sequence)
}

// eraseRecord replaces a record that has a body by one without.
func (a *Audit) eraseRecord(ctx context.Context, n uint64, cut func([]byte) ([]byte, bool)) error {
	m, err := get(ctx, a.l, a.feed, n+1)
	if errors.Is(err, schemas.ErrNotFound) {
		return nil // replaced, or too old
	}
	if err != nil {
		return fmt.Errorf("record %d of the feed: %w", n, err)
	}
	without, said := cut(m.Data)
	if !said {
		return nil
	}
	put := nats.NewMsg(replacedSubject + strconv.FormatUint(n, 10))
	put.Data = without
	put.Header = maps.Clone(m.Header)
	for _, name := range []string{
		jetstream.ExpectedLastSeqHeader, jetstream.ExpectedLastMsgIDHeader, jetstream.MsgIDHeader,
		jetstream.StreamHeader, jetstream.SubjectHeader, jetstream.SequenceHeader, jetstream.TimeStampHeaer, jetstream.LastSequenceHeader,
	} {
		put.Header.Del(name)
	}
	put.Header.Set("Waybill-Subject", m.Subject)
	if _, err := a.l.acks.publish(ctx, put); err != nil {
		return fmt.Errorf("record %d of the feed: %w", n, err)
	}
	return overwrite(ctx, a.feed, m.Sequence)
}

// EraseFeed replaces the records of a session that have bodies and are of events
// which the log has lost to their age, by records without. [Audit.Erase] does those
// of the log. It reads what the feed has of the agent, up to a leaf.
func (a *Audit) EraseFeed(ctx context.Context, t schemas.Tenant, of schemas.Agent, s schemas.SessionKey, to uint64, cut func([]byte) ([]byte, bool)) error {
	for _, agent := range []string{string(of), "_"} { // of nobody, what cannot be read
		for m, err := range read(ctx, a.l, a.feed, "audit."+string(t)+"."+agent+".*", 1, to) {
			if err == nil && bytes.Contains(m.Body, []byte(string(s))) {
				err = a.eraseRecord(ctx, m.Seq-1, cut)
			}
			if err != nil {
				return fmt.Errorf("feed of session %s: %w", s, err)
			}
		}
	}
	return nil
}

// overwrite deletes a message so that its bytes are gone from the disk.
func overwrite(ctx context.Context, s jetstream.Stream, seq uint64) error {
	err := s.SecureDeleteMsg(ctx, seq)
	if err != nil {
		if _, gone := s.GetMsg(ctx, seq); errors.Is(gone, jetstream.ErrMsgNotFound) {
			return nil
		}
		return fmt.Errorf("overwrite %s %d: %w", s.CachedInfo().Config.Name, seq, err)
	}
	return nil
}
