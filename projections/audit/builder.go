package audit

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"iter"
	"log/slog"
	"maps"
	"slices"
	"time"

	"golang.org/x/mod/sumdb/note"
	"golang.org/x/mod/sumdb/tlog"

	"waybill.dev/schemas"
)

// Store is where the tree lies, and the log that it is of. What a method has
// written is there when it has returned nil.
type Store interface {
	// Head is how many records the feed has had, and the position behind the last; no
	// position where the feed has that record no more.
	Head(ctx context.Context) (uint64, Position, error)
	// Append adds items to the feed, numbered from n on, one behind the other. It
	// returns an error that wraps ErrOvertaken, and has then perhaps stored some of
	// them, where the feed does not end at n: another builder is at work.
	Append(ctx context.Context, n uint64, items []Item) error
	// Records are the leaves' records of the feed from one number up to another, but
	// for the first ones, which may be too old to be there.
	Records(ctx context.Context, from, to uint64) iter.Seq2[[]byte, error]

	// Tile reads a full tile; it returns schemas.ErrNotFound.
	Tile(ctx context.Context, t tlog.Tile) ([]byte, error)
	PutTile(ctx context.Context, t tlog.Tile, data []byte) error
	// PutEdge stores the tiles that are not full, in the place of the last ones, which
	// Edge reads.
	PutEdge(ctx context.Context, tiles map[tlog.Tile][]byte) error
	Edge(ctx context.Context) (map[tlog.Tile][]byte, error)

	// Checkpoint is the newest one, "" for none, and the position of its tree, if that
	// is known.
	Checkpoint(ctx context.Context) (string, Position, error)
	// PutCheckpoint adds one; ErrOvertaken where the newest is not the one that
	// Checkpoint or PutCheckpoint had last.
	PutCheckpoint(ctx context.Context, text string, at Position) error
	// Cosigned is the newest checkpoint that witnesses have signed too, "" for none.
	Cosigned(ctx context.Context) (string, error)
	PutCosigned(ctx context.Context, text string) error

	// Entry reads one message of the log; it returns schemas.ErrNotFound.
	Entry(ctx context.Context, stream string, seq uint64) (Entry, error)
	// Last is the sequence of a stream's last message, also of one that is gone.
	Last(ctx context.Context, stream string) (uint64, error)
	// Follow yields every message behind a position, each stream in its order, until
	// ctx is done or the reading fails: not each by itself, as its record would be a
	// write, an acknowledgement and some wakeups of its own, and at once no more than
	// what the memory has room for four times.
	Follow(ctx context.Context, after Position) iter.Seq2[[]Entry, error]

	// Secret is a session's secret, made when there is none. That of "" and "" is
	// the log's own.
	Secret(ctx context.Context, t schemas.Tenant, s schemas.SessionKey) ([]byte, error)
	// Erase destroys what was said in a session before a message of EVENTS, and
	// its secret. It may be asked to do so again.
	Erase(ctx context.Context, t schemas.Tenant, s schemas.SessionKey, before uint64) error
}

// ErrOvertaken: another builder has written meanwhile.
var ErrOvertaken = errors.New("another builder is at work")

// ErrFork: what is stored is not what was signed. A builder that finds this signs
// nothing any more.
var ErrFork = errors.New("the tree is not the one that was signed")

// ErrLost: checkpoints are gone that were signed. It wraps ErrFork.
var ErrLost = fmt.Errorf("%w: checkpoints are lost", ErrFork)

// Options of a builder.
type Options struct {
	Store  Store
	Origin string // of the checkpoints
	Keys   Keys
	Said   func(schemas.Tenant) bool // whether a tenant's feed has the bodies; may be nil

	// Every and Each say when a tree is signed: after that time and that many
	// leaves, whichever is first. Default 1 s and 1000.
	Every time.Duration
	Each  uint64
	// Settle is how old a leaf is when it is signed: older than what a power cut
	// may take with it, or the tree would be of what is not there. Default 250 ms.
	Settle time.Duration

	// Keep keeps a checkpoint where the tree is not, when it has been stored for Settle,
	// and Kept is the last that it was given, "" for none: without it a tree whose
	// checkpoints are gone would be taken for one that was never signed. Both may be nil.
	Keep func(context.Context, Checkpoint) error
	Kept func(context.Context) (string, error)
	Lost string // what there is to do after ErrLost, for whoever reads the log

	// Signed is told of each checkpoint that is stored; may be nil.
	Signed func(context.Context, Checkpoint, tlog.HashReader)
	Up     func(bool)       // told when the tree grows, and when it does not; may be nil
	Tree   func(State)      // told how far the tree is; may be nil
	Log    *slog.Logger     // default none
	Now    func() time.Time // default time.Now
}

// State is how far a tree is.
type State struct {
	Leaves, Signed uint64
	At             Position
}

// Builder grows the tree. It is used by one goroutine.
type Builder struct {
	o     Options
	known note.Verifiers

	tree    tree
	at      Position
	signed  uint64
	taken   uint64     // leaves in the newest snapshot
	begun   time.Time  // when the oldest leaf came that is in no snapshot
	waiting []snapshot // to be signed, oldest first
	secrets map[string][]byte
	lost    error // the log ends, or has ended, before the tree
	unkept  *unkept
}

// snapshot is a tree that is to be signed when it has settled.
type snapshot struct {
	at    time.Time
	upTo  Position // nil where it is not known
	size  uint64
	root  tlog.Hash
	tiles map[tlog.Tile][]byte
}

// unkept is a checkpoint that is to be kept elsewhere when it has settled: a power cut
// that took it here, and not there, would look as if it had been removed.
type unkept struct {
	Checkpoint
	since time.Time
}

// New makes a builder.
func New(o Options) (*Builder, error) {
	if o.Every == 0 {
		o.Every = time.Second
	}
	if o.Each == 0 {
		o.Each = 1000
	}
	if o.Settle == 0 {
		o.Settle = 250 * time.Millisecond
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	if o.Now == nil {
		o.Now = time.Now
	}
	if o.Up == nil {
		o.Up = func(bool) {}
	}
	known, err := Known(o.Keys.Verifiers)
	return &Builder{o: o, known: known}, err
}

// Run grows the tree until ctx is done, over every interruption. After
// [ErrFork] it looks again from time to time, and does not grow the tree.
func (b *Builder) Run(ctx context.Context) error {
	for ctx.Err() == nil {
		err := b.grow(ctx)
		// A log that has lost its end serves on: nothing is signed, which is said, and
		// there is nothing that waiting would bring back.
		b.o.Up(ctx.Err() == nil && errors.Is(err, ErrFork) && b.lost != nil)
		if ctx.Err() != nil {
			return nil
		}
		pause := time.Second
		if errors.Is(err, ErrFork) {
			todo := []any{"error", err}
			if errors.Is(err, ErrLost) && b.o.Lost != "" {
				todo = append(todo, "what_to_do", b.o.Lost)
			}
			b.o.Log.Error("audit: nothing is signed any more", todo...)
			pause = 30 * time.Second
		} else {
			b.o.Log.Warn("audit interrupted, reading on from what is stored", "error", err)
		}
		t := time.NewTimer(pause)
		select {
		case <-ctx.Done():
		case <-t.C:
		}
		t.Stop()
	}
	return nil
}

// grow restores the tree and takes what comes.
func (b *Builder) grow(ctx context.Context) error {
	if err := b.Restore(ctx); err != nil {
		return err
	}
	b.o.Up(true)
	reading, stop := context.WithCancel(ctx)
	defer stop()
	bursts, failed := make(chan []Entry), make(chan error, 1)
	after := Position{}
	for stream, seq := range b.at {
		after[stream] = seq
	}
	go func() {
		defer close(bursts)
		for burst, err := range b.o.Store.Follow(reading, after) {
			if err != nil {
				failed <- err
				return
			}
			select {
			case bursts <- burst:
			case <-reading.Done():
				return
			}
		}
	}()
	defer func() {
		stop()
		for range bursts { // until it has ended
		}
	}()
	tick := time.NewTicker(min(b.o.Settle, b.o.Every) / 2)
	defer tick.Stop()
	for {
		select {
		case burst, ok := <-bursts:
			if !ok {
				select {
				case err := <-failed:
					return err
				default:
				}
				if ctx.Err() != nil {
					return b.finish(context.WithoutCancel(ctx))
				}
				return errors.New("the log's messages have an end")
			}
			if err := b.Take(ctx, burst); err != nil {
				if ctx.Err() != nil {
					return b.finish(context.WithoutCancel(ctx)) // of what it has; the rest is there for the next
				}
				return err
			}
		case <-ctx.Done():
			return b.finish(context.WithoutCancel(ctx))
		case <-tick.C:
		}
		if err := b.Sign(ctx); err != nil {
			return err
		}
	}
}

// finish signs what is left when the builder is told to stop: its records may be too
// old to be there when the next one comes. It waits for what has not settled, but
// not for long.
func (b *Builder) finish(ctx context.Context) error {
	// Where another builder has taken over the tree is another by now, and so is its
	// edge.
	if n, _, err := b.o.Store.Head(ctx); err != nil || n != b.tree.size || n == b.signed && b.unkept == nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, finishing)
	defer cancel()
	if b.tree.size > b.taken {
		b.snap(b.at)
	}
	tick := time.NewTicker(b.o.Settle / 8)
	defer tick.Stop()
	for b.signed < b.tree.size || b.unkept != nil {
		if err := b.Sign(ctx); err != nil {
			return err
		}
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
	}
	return nil
}

// finishing is how long a builder that is told to stop may still sign.
const finishing = time.Second

// Restore reads where the tree is: its right edge at the last checkpoint, and
// the leaves that the feed has had since. What is not as it was signed, or not as
// the log has it, is [ErrFork].
func (b *Builder) Restore(ctx context.Context) error {
	n, at, err := b.o.Store.Head(ctx)
	if err != nil {
		return err
	}
	text, of, err := b.o.Store.Checkpoint(ctx)
	if err != nil {
		return err
	}
	last := Checkpoint{Origin: b.o.Origin, Root: emptyRoot}
	if text != "" {
		if last, err = OpenCheckpoint(text, b.known); err != nil {
			return fmt.Errorf("%w: %w", ErrFork, err)
		}
		if last.Origin != b.o.Origin {
			return fmt.Errorf("%w: it is of %q, this is %q", ErrFork, last.Origin, b.o.Origin)
		}
	}
	if last.Size > n {
		return fmt.Errorf("%w: %d leaves were signed, and there are %d", ErrFork, last.Size, n)
	}
	if at == nil && n > 0 {
		// The feed's last record is too old to be there. The tree is where the last
		// checkpoint is, if that has all of it.
		switch at = of; {
		case n > last.Size:
			return fmt.Errorf("%w: the feed has had %d leaves of which it has none any more, and %d of them were signed", ErrFork, n, last.Size)
		case at == nil:
			return fmt.Errorf("%w: the feed's last record is too old to be there, and the last checkpoint does not say what of the log it covers", ErrFork)
		}
	}
	if at == nil {
		at = Position{}
	}
	b.tree, b.at, b.signed, b.taken, b.waiting = tree{}, at, last.Size, last.Size, nil
	b.secrets = map[string][]byte{}
	if b.tree, err = b.edge(ctx, last.Size); err != nil {
		return err
	}
	if root := b.tree.root(); root != last.Root {
		return fmt.Errorf("%w: of %d leaves, the tree is %s, and %s was signed", ErrFork, last.Size, root, last.Root)
	}
	if err := b.asKept(ctx, last); err != nil {
		return err
	}
	if err := b.ends(ctx); err != nil {
		return err
	}
	number := last.Size
	for record, err := range b.o.Store.Records(ctx, last.Size, n) {
		if err != nil {
			return fmt.Errorf("leaf %d: %w", number, err)
		}
		if err := b.recheck(ctx, number, record, number == n-1); err != nil {
			return err
		}
		// Of what lies between, the position is not known here.
		var upTo Position
		if number == n-1 {
			upTo = b.at
		}
		if err := b.add(ctx, record, upTo); err != nil {
			return err
		}
		number++
	}
	if number != n {
		return fmt.Errorf("%w: the feed has no leaf %d", ErrFork, number)
	}
	b.begun = b.o.Now()
	b.tell()
	return nil
}

// asKept holds the last checkpoint against the one that is kept elsewhere, of which its
// tree has to have grown.
func (b *Builder) asKept(ctx context.Context, last Checkpoint) error {
	if b.o.Kept == nil {
		return nil
	}
	text, err := b.o.Kept(ctx)
	if err != nil || text == "" {
		return err
	}
	kept, err := OpenCheckpoint(text, b.known)
	switch {
	case err != nil:
		return fmt.Errorf("%w: the last one that is kept elsewhere: %w", ErrFork, err)
	case kept.Origin != b.o.Origin:
		return fmt.Errorf("%w: the last one that is kept elsewhere is of %q, this is %q", ErrFork, kept.Origin, b.o.Origin)
	case kept.Size > last.Size:
		return fmt.Errorf("%w: a tree of %d leaves was signed, and the newest that is stored has %d", ErrLost, kept.Size, last.Size)
	}
	t, err := b.edge(ctx, kept.Size)
	if err != nil {
		return err
	}
	if root := t.root(); root != kept.Root {
		return fmt.Errorf("%w: of %d leaves, the tree is %s, and the checkpoint that is kept elsewhere says %s", ErrFork, kept.Size, root, kept.Root)
	}
	return nil
}

// keep keeps the newest checkpoint elsewhere, as soon as it has settled.
func (b *Builder) keep(ctx context.Context, now time.Time) {
	if b.unkept == nil || now.Sub(b.unkept.since) < b.o.Settle {
		return
	}
	if err := b.o.Keep(ctx, b.unkept.Checkpoint); err != nil {
		// The one that is kept is older, and as true.
		b.o.Log.Error("audit: a checkpoint is not kept beside the key", "size", b.unkept.Size, "error", err)
	}
	b.unkept = nil
}

// ends finds out whether the log has what the tree ends with. If it ends before
// it (an older copy of it was put back, or a power cut has taken its end), what is
// stored now takes sequences for which there are leaves, and would have none. It
// stays so in this process: soon the log is as long as it was.
func (b *Builder) ends(ctx context.Context) error {
	for stream, seq := range b.at {
		last, err := b.o.Store.Last(ctx, stream)
		if err != nil {
			return err
		}
		if seq > last && b.lost == nil {
			b.lost = fmt.Errorf("%w: %s ends at %d, and the tree has leaves of it up to %d: the end of the log is lost, or an older copy of it was put back, and what is stored now takes the numbers of what was there",
				ErrFork, stream, last, seq)
		}
	}
	return b.lost
}

// recheck holds a leaf that is not signed yet against the log. The erasure that
// the last one is of is done again.
func (b *Builder) recheck(ctx context.Context, n uint64, record []byte, last bool) error {
	l, err := ReadRecord(record)
	if err != nil {
		return fmt.Errorf("%w: leaf %d: %w", ErrFork, n, err)
	}
	e, err := b.o.Store.Entry(ctx, l.Stream, l.Seq)
	switch {
	case l.To != 0, errors.Is(err, schemas.ErrNotFound):
		// Aged out or erased since.
	case err != nil:
		return err
	default:
		salt, err := b.salt(ctx, e)
		if err != nil {
			return err
		}
		if !bytes.Equal(Record(e, salt), record) {
			return fmt.Errorf("%w: leaf %d is not of what the log has at %s %d", ErrFork, n, l.Stream, l.Seq)
		}
	}
	if e, ok := l.Opened(); ok && last && e.Kind() == schemas.KindErased {
		return b.erase(ctx, e)
	}
	return nil
}

// edge reads the right edge of a tree of size leaves: from the feed, and what that
// has no more, from the tiles. What both have has to be the same.
func (b *Builder) edge(ctx context.Context, size uint64) (tree, error) {
	t := tree{size: size}
	for level, count := 0, size; count > 0; level, count = level+1, count>>tileHeight {
		hashes := make([]tlog.Hash, 0, tileWidth)
		from := count &^ (tileWidth - 1)
		if level == 0 {
			for record, err := range b.o.Store.Records(ctx, from, count) {
				if err != nil {
					return t, err
				}
				hashes = append(hashes, hashOf(record))
			}
			var err error
			if hashes, err = b.kept(ctx, hashes, from, count); err != nil {
				return t, err
			}
		} else {
			for i := from; i < count; i++ {
				data, err := b.tile(ctx, tlog.Tile{H: tileHeight, L: level - 1, N: int64(i), W: tileWidth})
				if err != nil {
					return t, err
				}
				hashes = append(hashes, perfect(tileHashes(data)))
			}
		}
		t.edges = append(t.edges, hashes)
	}
	return t, nil
}

// kept are the hashes of the leaves from one number up to another, of which the feed
// has the last ones.
func (b *Builder) kept(ctx context.Context, fed []tlog.Hash, from, to uint64) ([]tlog.Hash, error) {
	missing := int(to-from) - len(fed)
	if missing == 0 {
		return fed, nil
	}
	short := fmt.Errorf("%w: the feed has %d of the leaves from %d to %d, and no tile has the others", ErrFork, len(fed), from, to)
	if missing < 0 {
		return nil, short
	}
	// The tile is full by now, or one of the edge, which may be of a later tree.
	full := tlog.Tile{H: tileHeight, L: 0, N: int64(from / tileWidth), W: tileWidth}
	data, err := b.o.Store.Tile(ctx, full)
	if errors.Is(err, schemas.ErrNotFound) {
		var edge map[tlog.Tile][]byte
		if edge, err = b.o.Store.Edge(ctx); err == nil {
			for t, part := range edge {
				if t.L == 0 && t.N == full.N {
					data = part
				}
			}
		}
	}
	if err != nil {
		return nil, err
	}
	hashes := tileHashes(data)
	if len(hashes) < int(to-from) {
		return nil, short
	}
	hashes = hashes[:to-from]
	if !slices.Equal(hashes[missing:], fed) {
		return nil, fmt.Errorf("%w: the feed's leaves from %d to %d are not those of the tiles", ErrFork, from+uint64(missing), to)
	}
	return slices.Clone(hashes), nil
}

// tile reads a full tile, or makes it of what lies below it where a crash has
// come before it was stored.
func (b *Builder) tile(ctx context.Context, t tlog.Tile) ([]byte, error) {
	data, err := b.o.Store.Tile(ctx, t)
	if err == nil && len(data) != tileWidth*tlog.HashSize {
		return nil, fmt.Errorf("%w: %s has %d bytes", ErrFork, t.Path(), len(data))
	}
	if !errors.Is(err, schemas.ErrNotFound) {
		return data, err
	}
	var hashes []tlog.Hash
	first := uint64(t.N) * tileWidth
	if t.L == 0 {
		for record, err := range b.o.Store.Records(ctx, first, first+tileWidth) {
			if err != nil {
				return nil, err
			}
			hashes = append(hashes, hashOf(record))
		}
	} else {
		for i := first; i < first+tileWidth; i++ {
			below, err := b.tile(ctx, tlog.Tile{H: tileHeight, L: t.L - 1, N: int64(i), W: tileWidth})
			if err != nil {
				return nil, err
			}
			hashes = append(hashes, perfect(tileHashes(below)))
		}
	}
	if len(hashes) != tileWidth {
		return nil, fmt.Errorf("%w: %s is missing, and so is what it is made of", ErrFork, t.Path())
	}
	data = tileData(hashes)
	return data, b.o.Store.PutTile(ctx, t, data)
}

// Take makes leaves of messages: the feed has them, then the tree. An erasure is
// done when the feed has its leaf, and before anything that comes after it has
// one; and nothing that covers it is signed before. So one that a crash cuts off
// is the feed's last leaf, and is done again.
func (b *Builder) Take(ctx context.Context, entries []Entry) error {
	for len(entries) > 0 {
		n := len(entries)
		at := slices.IndexFunc(entries, func(e Entry) bool { return erases(e) && e.Seq > b.at[e.Stream] })
		if at >= 0 {
			n = at + 1
		}
		if err := b.take(ctx, entries[:n]); err != nil {
			return err
		}
		if at >= 0 {
			if err := b.erase(ctx, entries[at].Event); err != nil {
				return err
			}
		}
		entries = entries[n:]
	}
	b.tell()
	return nil
}

func erases(e Entry) bool { return e.Event.Data != nil && e.Event.Kind() == schemas.KindErased }

func (b *Builder) take(ctx context.Context, entries []Entry) error {
	items := make([]Item, 0, len(entries))
	put := func(e Entry, record, salt []byte, said bool) {
		i := item(b.o.Origin, b.tree.size+uint64(len(items)), e, record, salt, said)
		i.At = maps.Clone(b.at)
		items = append(items, i)
	}
	var record []byte // of one after the other
	for _, e := range entries {
		seen := b.at[e.Stream]
		if e.Seq <= seen {
			continue // it was given again
		}
		if e.Seq > seen+1 {
			gap := Entry{Stream: e.Stream, Seq: seen + 1}
			b.at[e.Stream] = e.Seq - 1
			put(gap, gapRecord(e.Stream, seen+1, e.Seq-1), nil, false)
		}
		salt, err := b.salt(ctx, e)
		if err != nil {
			return err
		}
		record = appendRecord(record[:0], e, salt)
		b.at[e.Stream] = e.Seq
		if e.Event.Data != nil && e.Event.Kind() == schemas.KindClosed {
			delete(b.secrets, secretKey(e)) // its last, nearly always
		}
		said := b.o.Said != nil && e.Event.Data != nil && len(e.Body) > 0 && b.o.Said(e.Event.Tenant)
		put(e, record, salt, said)
	}
	if len(items) == 0 {
		return nil
	}
	if err := b.o.Store.Append(ctx, b.tree.size, items); err != nil {
		return fmt.Errorf("leaves from %d on: %w", b.tree.size, err)
	}
	for _, i := range items {
		if err := b.add(ctx, i.record(), i.At); err != nil {
			return err
		}
	}
	return nil
}

// add adds a leaf that the feed has, and with which the tree is at a position.
func (b *Builder) add(ctx context.Context, record []byte, upTo Position) error {
	if b.tree.size == b.taken {
		b.begun = b.o.Now()
	}
	var err error
	b.tree.add(hashOf(record), func(t tlog.Tile, data []byte) {
		if err == nil {
			err = b.o.Store.PutTile(ctx, t, data)
		}
	})
	if err == nil && b.tree.size-b.taken >= b.o.Each {
		b.snap(upTo)
	}
	return err
}

func (b *Builder) snap(upTo Position) {
	b.waiting = append(b.waiting, snapshot{b.o.Now(), maps.Clone(upTo), b.tree.size, b.tree.root(), b.tree.partial()})
	b.taken = b.tree.size
}

func (b *Builder) erase(ctx context.Context, e schemas.Event) error {
	delete(b.secrets, string(e.Tenant)+"."+string(e.Session))
	if err := b.o.Store.Erase(ctx, e.Tenant, e.Session, e.Seq); err != nil {
		return fmt.Errorf("erase session %s: %w", e.Session, err)
	}
	b.o.Log.Info("session erased", "tenant", e.Tenant, "session", e.Session, "before", e.Seq)
	return nil
}

// Sign signs what has settled, if it is time.
func (b *Builder) Sign(ctx context.Context) error {
	now := b.o.Now()
	b.keep(ctx, now)
	if b.tree.size > b.taken && now.Sub(b.begun) >= b.o.Every-b.o.Settle {
		b.snap(b.at)
	}
	for len(b.waiting) > 0 && now.Sub(b.waiting[0].at) >= b.o.Settle {
		s := b.waiting[0]
		c, err := b.o.Keys.sign(b.o.Origin, s.size, s.root)
		if err != nil {
			return err
		}
		// The edge first: who reads a checkpoint finds all of its tree.
		if err := b.o.Store.PutEdge(ctx, s.tiles); err != nil {
			return fmt.Errorf("edge of the tree of %d: %w", s.size, err)
		}
		if err := b.o.Store.PutCheckpoint(ctx, c.Text, s.upTo); err != nil {
			return fmt.Errorf("checkpoint of %d: %w", s.size, err)
		}
		b.waiting, b.signed = b.waiting[1:], s.size
		if b.o.Keep != nil && b.unkept == nil {
			b.unkept = &unkept{c, now}
		}
		if b.o.Signed != nil {
			b.o.Signed(ctx, c, b.reader(ctx, s))
		}
		b.tell()
	}
	return nil
}

// reader reads the hashes of a tree as it was signed.
func (b *Builder) reader(ctx context.Context, s snapshot) tlog.HashReader {
	return Reader(tlog.Tree{N: int64(s.size), Hash: s.root}, func(t tlog.Tile) ([]byte, error) {
		if data, ok := s.tiles[t]; ok {
			return data, nil
		}
		return b.o.Store.Tile(ctx, t)
	})
}

func (b *Builder) tell() {
	if b.o.Tree != nil {
		at := Position{}
		for stream, seq := range b.at {
			at[stream] = seq
		}
		b.o.Tree(State{b.tree.size, b.signed, at})
	}
}

// SecretOf is whose secret salts a message: its session's, or "" and "" for the
// log's own. An erasure is salted by the log's, as it is no part of what it erases.
func SecretOf(e Entry) (schemas.Tenant, schemas.SessionKey) {
	if erases(e) {
		return "", ""
	}
	return owner(e.Stream, e.Subject)
}

// remembered is how many secrets are kept at hand.
const remembered = 20_000

func secretKey(e Entry) string {
	t, s := SecretOf(e)
	return string(t) + "." + string(s)
}

func (b *Builder) salt(ctx context.Context, e Entry) ([]byte, error) {
	t, s := SecretOf(e)
	key := secretKey(e)
	secret := b.secrets[key]
	if secret == nil {
		var err error
		if secret, err = b.o.Store.Secret(ctx, t, s); err != nil {
			return nil, fmt.Errorf("secret of session %s: %w", s, err)
		}
		if len(b.secrets) >= remembered {
			clear(b.secrets)
		}
		b.secrets[key] = secret
	}
	return Salt(secret, e.Stream, e.Seq), nil
}

// Reader reads the hashes of a tree from its tiles, checked against the root.
// tile reads one: full, or the last of the tree, of the width asked for.
func Reader(of tlog.Tree, tile func(tlog.Tile) ([]byte, error)) tlog.HashReader {
	return tlog.TileHashReader(of, tiles(tile))
}

type tiles func(tlog.Tile) ([]byte, error)

func (tiles) Height() int { return tileHeight }

func (r tiles) ReadTiles(all []tlog.Tile) ([][]byte, error) {
	data := make([][]byte, len(all))
	for i, t := range all {
		b, err := r(t)
		if err != nil && t.W < tileWidth {
			// It is full by now.
			b, err = r(tlog.Tile{H: t.H, L: t.L, N: t.N, W: tileWidth})
		}
		if err != nil {
			return nil, fmt.Errorf("%s: %w", t.Path(), err)
		}
		if len(b) < t.W*tlog.HashSize {
			return nil, fmt.Errorf("%s has %d bytes", t.Path(), len(b))
		}
		data[i] = b[:t.W*tlog.HashSize]
	}
	return data, nil
}

func (tiles) SaveTiles([]tlog.Tile, [][]byte) {}
