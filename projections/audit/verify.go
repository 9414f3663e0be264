package audit

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"iter"
	"slices"
	"strings"
	"time"

	"golang.org/x/mod/sumdb/note"
	"golang.org/x/mod/sumdb/tlog"

	"waybill.dev/schemas"
)

// Line is one line of what is verified, in this order: one Log; the Checkpoints,
// oldest first; those of them that are Cosigned; the Tiles; the leaves, in their order,
// and before the first of a stream those messages of it whose leaves the feed has no
// more; the messages of the log that the tree does not have yet; and Last, without which
// lines are missing. It is written as JSON, so that what was verified can be kept and
// verified again.
type Line struct {
	Log        *Held     `json:"log,omitempty"`
	Checkpoint string    `json:"checkpoint,omitempty"`
	Stored     time.Time `json:"stored,omitzero"`    // when the checkpoint was
	Cosigned   string    `json:"cosigned,omitempty"` // a checkpoint that witnesses of the log have signed too
	Tile       string    `json:"tile,omitempty"`     // its path: tile/8/0/000
	Data       []byte    `json:"data,omitempty"`     // of the tile
	Early      *Witness  `json:"early,omitempty"`    // a message, with its salt, whose leaf the feed has no more
	Leaf       *Witness  `json:"leaf,omitempty"`
	Stray      *Stray    `json:"stray,omitempty"` // before the leaf that follows it
	Beyond     *Entry    `json:"beyond,omitempty"`
	Last       bool      `json:"last,omitempty"`
}

// Held says what is held.
type Held struct {
	Origin  string           `json:"origin"`
	Keys    []string         `json:"keys"`             // public keys; a verifier should know them from elsewhere
	Leaves  uint64           `json:"leaves"`           // that the feed has had
	First   uint64           `json:"first"`            // the first that it still has
	Streams map[string]Range `json:"streams"`          // what the log holds
	Rows    *Range           `json:"rows,omitempty"`   // of EVENTS as rows; absent where there are none
	Done    uint64           `json:"done,omitempty"`   // of EVENTS, up to which the rows are as it says, erasures included
	Others  uint64           `json:"others,omitempty"` // rows of other logs
	Kept    *Kept            `json:"kept,omitempty"`   // what EVENTS may have forgotten; absent where that is not known
	Feed    *Kept            `json:"feed,omitempty"`   // the same of the feed
}

// Kept is what a stream may have forgotten.
type Kept struct {
	Since    time.Time `json:"since,omitzero"` // nothing in it was stored before
	At       time.Time `json:"at"`             // when this was so
	MaxAge   Seconds   `json:"max_age_s"`
	MaxBytes uint64    `json:"max_bytes"` // 0 for no limit
	Bytes    uint64    `json:"bytes"`     // that it has

	Until  time.Time `json:"until,omitzero"` // to then it was shorter
	Age    Seconds   `json:"age_s,omitempty"`
	Before uint64    `json:"before,omitempty"` // bytes
}

// Seconds is how long, as it is written into lines.
type Seconds int64

func (s Seconds) duration() time.Duration { return time.Duration(s) * time.Second }

// explains tells whether a message may be gone that was stored then, if erasures have
// taken so many bytes. What is gone for the room it took, and is not too old, is
// followed by nothing that is too old: so all is there that took its place.
func (k Kept) explains(stored time.Time, erased uint64) bool {
	const (
		clocks  = time.Minute // may differ by that
		message = 16 << 20    // no message is as large
	)
	full := func(limit uint64) bool { return limit > 0 && k.Bytes+erased+message >= limit }
	return k.At.Sub(stored) >= k.MaxAge.duration()-clocks || full(k.MaxBytes) ||
		stored.Before(k.Until) && (k.Until.Sub(stored) >= k.Age.duration()-clocks || full(k.Before))
}

// Stray says that there are rows of a sequence of EVENTS for which there is no leaf.
type Stray struct {
	Seq uint64 `json:"seq"`
}

// Range is from one sequence to another, both included; First is above Last where
// there is none.
type Range struct {
	First uint64 `json:"first"`
	Last  uint64 `json:"last"`
}

func (r Range) has(seq uint64) bool { return seq >= r.First && seq <= r.Last }

// Witness is a leaf and what is known of it.
type Witness struct {
	Number uint64         `json:"number"`
	Record string         `json:"record,omitempty"` // left out where it is what the entry and its salt make
	Salt   string         `json:"salt,omitempty"`   // hex; "" where it was erased
	Entry  *Entry         `json:"entry,omitempty"`  // the log's message; absent where it has none
	Row    *schemas.Event `json:"row,omitempty"`    // the same in another store

	// What is known of that store. Whoever has read it has held its rows against each
	// other, and says what does not fit: a verifier could not know more of it.
	RowWrong  []string `json:"row_wrong,omitempty"`  // what of the rows is not as Row makes it
	RowGone   int      `json:"row_gone,omitempty"`   // bytes of Row's body, which is kept no more
	RowsTwice int      `json:"rows_twice,omitempty"` // rows that are there again, all the same
	RowsOlder int      `json:"rows_older,omitempty"` // rows of another event, which had this sequence before the log lost it
}

// Problem is one thing that is not as it was signed.
type Problem struct {
	Leaf   *uint64 `json:"leaf,omitempty"`
	Stream string  `json:"stream,omitempty"`
	Seq    uint64  `json:"seq,omitempty"`
	Text   string  `json:"problem"`
}

func (p Problem) String() string {
	var b strings.Builder
	if p.Stream != "" {
		fmt.Fprintf(&b, "%s %d: ", p.Stream, p.Seq)
	}
	if p.Leaf != nil {
		fmt.Fprintf(&b, "leaf %d: ", *p.Leaf)
	}
	return b.String() + p.Text
}

// Report is the outcome of a verification.
type Report struct {
	Origin      string    `json:"origin"`
	Checkpoints int       `json:"checkpoints"`      // whose signatures and trees are right
	Signed      uint64    `json:"signed"`           // leaves in the newest tree
	Messages    uint64    `json:"messages"`         // of the log that are as they were signed
	Rows        uint64    `json:"rows"`             // the same of rows
	Bodiless    uint64    `json:"bodiless"`         // of the rows, those without the body, whose time is over
	Twice       uint64    `json:"twice"`            // rows that are there again, all the same
	Older       uint64    `json:"older"`            // rows of events that the log has lost, and whose sequences it has given again
	Unled       uint64    `json:"unled"`            // sequences of which there are rows, and no leaf to hold them against
	Before      uint64    `json:"before"`           // events of before the first row
	Others      uint64    `json:"others"`           // rows of other logs
	Erased      uint64    `json:"erased"`           // leaves whose body was erased, as an erasure in the tree says
	Aged        uint64    `json:"aged"`             // leaves whose messages are older than the log
	Unsigned    uint64    `json:"unsigned"`         // messages that no checkpoint covers yet
	Gaps        uint64    `json:"gaps"`             // messages that the log did not have when the tree reached them
	Unfed       uint64    `json:"unfed"`            // leaves, the first ones, whose records the feed does not have any more: only their hashes were verified
	Problems    []Problem `json:"problems"`         // in the order of the leaves; the first 100
	More        int       `json:"more,omitempty"`   // problems beside those
	Key         string    `json:"key,omitempty"`    // of the newest checkpoint
	Newest      string    `json:"newest,omitempty"` // the newest checkpoint

	Cosigned  int           `json:"cosigned,omitempty"`  // checkpoints that somebody else has signed too, and whose trees are right
	Unknown   int           `json:"unknown,omitempty"`   // of those, by nobody who is known here
	Witnessed []Cosignature `json:"witnessed,omitempty"` // the last of each witness that is known
}

// OK tells whether nothing was found.
func (r Report) OK() bool { return len(r.Problems) == 0 }

// ErrLines is wrapped by the error for lines that are no record of an audit.
var ErrLines = errors.New("not a whole record of an audit")

// Check is what a verification goes by.
type Check struct {
	// Keys are the public keys that are trusted.
	Keys []string
	// Against are checkpoints of earlier, from elsewhere.
	Against []string
	// Witnesses are the keys of witnesses that are known ([CosignerKey]).
	Witnesses []note.Verifier
	// Decode reads Entry.Event as the tree's builder had it.
	Decode func(*Entry)
	// Header is what the log has of an event as headers; may be nil. It is for rows
	// whose message the log has no more.
	Header func(schemas.Event) map[string][]string
}

// Verify holds lines against the checkpoints in them, and those against the
// trusted keys and the earlier checkpoints. An error means that the lines could
// not be read; what is wrong with the record is in the report.
func Verify(_ context.Context, lines iter.Seq2[Line, error], c Check) (Report, error) {
	known, err := Known(c.Keys)
	if err != nil {
		return Report{}, err
	}
	v := &verifier{c: c, tiles: map[tlog.Tile][]byte{}, at: Position{}, fed: map[string]bool{}, erased: map[string]uint64{}, undone: map[string]uint64{}}
	for _, text := range c.Against {
		cp, err := OpenCheckpoint(text, known)
		if err != nil {
			return v.r, fmt.Errorf("the checkpoint to verify against: %w", err)
		}
		v.against = append(v.against, cp)
	}
	last, leaves := false, false
	for l, err := range lines {
		switch {
		case err != nil:
			return v.r, err
		case v.held.Streams == nil && l.Log == nil, last:
			return v.r, fmt.Errorf("%w: a line stands where none should", ErrLines)
		case l.Log != nil:
			v.held, v.r.Origin = *l.Log, l.Log.Origin
			if v.held.Streams == nil {
				v.held.Streams = map[string]Range{}
			}
			v.next, v.r.Unfed, v.r.Others = v.held.First, v.held.First, v.held.Others
		case l.Checkpoint != "":
			cp, err := OpenCheckpoint(l.Checkpoint, known)
			switch {
			case err != nil:
				v.problem(Problem{Text: fmt.Sprintf("checkpoint %d: %v", len(v.checkpoints)+1, err)})
			case cp.Origin != v.held.Origin:
				v.problem(Problem{Text: fmt.Sprintf("checkpoint of %d leaves: it is of %q, not %q", cp.Size, cp.Origin, v.held.Origin)})
			default:
				if n := len(v.checkpoints); n > 0 && v.checkpoints[n-1].Size > cp.Size {
					v.problem(Problem{Text: fmt.Sprintf("checkpoint of %d leaves: it stands behind one of %d", cp.Size, v.checkpoints[n-1].Size)})
				}
				v.checkpoints = append(v.checkpoints, cp)
				if cp.Size < v.held.First && l.Stored.After(v.before) {
					v.before = l.Stored
				}
			}
		case l.Cosigned != "":
			v.cosigned(l.Cosigned, known)
		case l.Tile != "":
			t, err := tlog.ParseTilePath(l.Tile)
			if err != nil || t.H != tileHeight || len(l.Data) != t.W*tlog.HashSize {
				return v.r, fmt.Errorf("%w: tile %q of %d bytes", ErrLines, l.Tile, len(l.Data))
			}
			v.tiles[t] = l.Data
		case l.Leaf != nil:
			if !leaves {
				leaves = true
				v.trees()
			}
			v.leaf(*l.Leaf)
		case l.Early != nil && l.Early.Entry != nil:
			v.earlier(*l.Early)
		case l.Stray != nil:
			v.stray(l.Stray.Seq)
		case l.Beyond != nil:
			v.beyond(*l.Beyond)
		case l.Last:
			last = true
		}
	}
	if !last {
		return v.r, fmt.Errorf("%w: it breaks off", ErrLines)
	}
	if !leaves {
		v.trees()
	}
	v.end()
	return v.r, nil
}

// verifier is the state of one verification.
type verifier struct {
	c           Check
	r           Report
	held        Held
	checkpoints []Checkpoint
	against     []Checkpoint
	witnessed   []witnessed
	tiles       map[tlog.Tile][]byte
	size        uint64    // of the newest signed tree
	before      time.Time // the newest leaf that the feed has no more was not stored much earlier

	next    uint64            // number of the next leaf
	at      Position          // last sequence of each stream in the tree; none before the first leaf
	fed     map[string]bool   // streams of which the feed has leaves
	gap     Range             // of EVENTS, the last
	early   []early           // messages whose leaves the feed has no more
	system  uint64            // the last of those of SYSTEM
	missing []lost            // leaves whose messages the log should have
	erased  map[string]uint64 // by session: the last erasure's place
	undone  map[string]uint64 // the same of erasures that were being done while this was read
}

// witnessed is a checkpoint that somebody else has signed too.
type witnessed struct {
	Checkpoint
	by []Cosignature // whom is known
}

type lost struct {
	Problem
	stored  time.Time
	size    int
	session string // "" for what no erasure excuses
	what    what
}

// early is a message whose leaf the feed has no more.
type early struct {
	Problem
	hash tlog.Hash
}

// what is missing.
type what int

const (
	message what = iota
	aged         // a message of before the log begins
	row
	unsalted // a message that is there, of which the salt is not
	rowAsIs  // what has to go or to change with an erasure
)

func (v *verifier) problem(p Problem) {
	if len(v.r.Problems) < 100 {
		v.r.Problems = append(v.r.Problems, p)
	} else {
		v.r.More++
	}
}

// cosigned reads a checkpoint that witnesses have signed. Its tree is held against the
// log's with those of the others.
func (v *verifier) cosigned(text string, known note.Verifiers) {
	c, err := OpenCheckpoint(text, known)
	if err == nil && c.Origin != v.held.Origin {
		err = fmt.Errorf("it is of %q, not %q", c.Origin, v.held.Origin)
	}
	if err != nil {
		v.problem(Problem{Text: fmt.Sprintf("a cosigned checkpoint: %v", err)})
		return
	}
	by, _, err := cosigned(text, c, note.VerifierList(v.c.Witnesses...))
	if err != nil {
		v.problem(Problem{Text: fmt.Sprintf("the cosigned checkpoint of %d leaves: %v", c.Size, err)})
	}
	c.Text = "" // there may be many
	v.witnessed = append(v.witnessed, witnessed{c, by})
}

// String names who has cosigned a checkpoint.
func (w witnessed) String() string {
	if len(w.by) == 0 {
		return "a cosigned checkpoint"
	}
	names := make([]string, len(w.by))
	for i, s := range w.by {
		names[i] = s.Witness
	}
	return "the checkpoint cosigned by " + strings.Join(names, ", ")
}

// witness adds up what witnesses have signed that fits.
func (v *verifier) witness(w *witnessed) {
	v.r.Cosigned++
	if len(w.by) == 0 {
		v.r.Unknown++
	}
	for _, s := range w.by {
		i := slices.IndexFunc(v.r.Witnessed, func(o Cosignature) bool { return o.Witness == s.Witness })
		if i < 0 {
			v.r.Witnessed = append(v.r.Witnessed, s)
		} else { // they come in the order of their sizes
			v.r.Witnessed[i] = s
		}
	}
}

// trees makes the tree again from the hashes of its leaves, and holds it against
// each checkpoint of its size on the way, and against the tiles.
func (v *verifier) trees() {
	type word struct {
		Checkpoint
		whose     string // "" for the log's own, as it is stored
		witnessed *witnessed
	}
	var words []word
	for _, c := range v.checkpoints {
		words = append(words, word{Checkpoint: c})
		v.size = max(v.size, c.Size)
	}
	for i, w := range v.witnessed {
		words = append(words, word{w.Checkpoint, w.String(), &v.witnessed[i]})
	}
	for _, c := range v.against {
		if c.Origin != v.held.Origin {
			v.problem(Problem{Text: fmt.Sprintf("the earlier checkpoint is of %q, this log is %q", c.Origin, v.held.Origin)})
			continue
		}
		words = append(words, word{Checkpoint: c, whose: "an earlier checkpoint"})
	}
	slices.SortStableFunc(words, func(a, b word) int {
		if a.Size < b.Size {
			return -1
		} else if a.Size > b.Size {
			return 1
		}
		return 0
	})
	var t tree
	fits := uint64(0) // the largest tree that is as it was signed
	bad := false      // of what follows, one word is enough
	look := func() {
		for len(words) > 0 && words[0].Size == t.size {
			c := words[0]
			words = words[1:]
			switch root := t.root(); {
			case root == c.Root:
				fits = c.Size
				switch {
				case c.witnessed != nil:
					v.witness(c.witnessed)
				case c.whose == "":
					v.r.Checkpoints++
				}
			case c.whose != "":
				v.problem(Problem{Text: fmt.Sprintf("fork: %s says that the tree of %d leaves is %s, and it is %s here; the last that fits has %d leaves", c.whose, c.Size, c.Root, root, fits)})
			case !bad:
				bad = true
				v.problem(Problem{Text: fmt.Sprintf("the tree of %d leaves is %s, and %s was signed; the last that fits has %d leaves", c.Size, root, c.Root, fits)})
			}
		}
	}
	for look(); t.size < v.size; look() {
		h, ok := v.hash(t.size)
		if !ok {
			n := t.size
			v.problem(Problem{Leaf: &n, Text: "the tile with its hash is missing"})
			break
		}
		t.add(h, func(full tlog.Tile, data []byte) {
			if stored, ok := v.tiles[full]; ok && string(stored) != string(data) {
				v.problem(Problem{Text: full.Path() + " is not of the tiles below it"})
			}
		})
	}
	for _, c := range words {
		if c.Size > v.size {
			v.problem(Problem{Text: fmt.Sprintf("cut off: %s is of %d leaves, and the newest here of %d", c.whose, c.Size, v.size)})
		}
	}
	v.r.Signed = v.size
	if n := len(v.checkpoints); n > 0 {
		v.r.Newest = v.checkpoints[n-1].Text
	}
}

// hash is the hash of a leaf in the tiles.
func (v *verifier) hash(n uint64) (tlog.Hash, bool) {
	at := int(n % tileWidth)
	t := tlog.Tile{H: tileHeight, L: 0, N: int64(n / tileWidth), W: tileWidth}
	data, ok := v.tiles[t]
	// The edge may be of a later tree than the newest checkpoint, and there may be
	// more than one tile of it: any that is wide enough has the hash.
	for t.W = at + 1; !ok && t.W < tileWidth; t.W++ {
		data, ok = v.tiles[t]
	}
	if !ok {
		return tlog.Hash{}, false
	}
	return tlog.Hash(data[at*tlog.HashSize : (at+1)*tlog.HashSize]), true
}

// leaf holds a leaf against the tree and what is stored against the leaf.
func (v *verifier) leaf(w Witness) {
	n := w.Number
	say := func(stream string, seq uint64, format string, args ...any) {
		v.problem(Problem{&n, stream, seq, fmt.Sprintf(format, args...)})
	}
	switch {
	case n < v.next:
		say("", 0, "it stands twice")
		return
	case n > v.next:
		say("", 0, "the feed has lost the %d before it", n-v.next)
	}
	v.next = n + 1

	var made []byte
	if w.Entry != nil {
		v.c.Decode(w.Entry)
		if salt, err := hex.DecodeString(w.Salt); err == nil && w.Salt != "" {
			made = Record(*w.Entry, salt)
		}
	}
	record := []byte(w.Record)
	var l Leaf
	var open schemas.Event
	var isEvent bool
	if w.Record == "" && made != nil {
		// What it says is known: it was made of the entry just now.
		e := w.Entry
		record = made
		l = Leaf{V: leafVersion, Stream: e.Stream, Seq: e.Seq, Stored: e.Stored, Subject: e.Subject, Size: len(e.Body)}
		open, isEvent = e.Event, e.Event.Data != nil
		if v.held.Rows != nil && isEvent {
			l, _ = ReadRecord(record)
		}
	} else {
		var err error
		if l, err = ReadRecord(record); err != nil {
			say("", 0, "%v", err)
			return
		}
		open, isEvent = l.Opened()
	}
	signed := n < v.size
	if h, ok := v.hash(n); signed && ok && h != hashOf(record) {
		switch {
		case w.Record == "" && w.Entry != nil:
			say(l.Stream, l.Seq, "the message is not the one that was signed")
		case made != nil && h == hashOf(made):
			say(l.Stream, l.Seq, "the feed's record is not the one that was signed; the message is")
		default:
			say(l.Stream, l.Seq, "neither the feed's record nor the tile is right: one of them was changed")
		}
	}
	if at, ok := v.at[l.Stream]; ok && l.Seq != at+1 {
		say(l.Stream, l.Seq, "it follows %d in the tree", at)
	}
	if l.Stream == System && !v.fed[System] && v.held.First > 0 && v.held.Feed != nil {
		v.recorded(l.Seq)
	}
	v.at[l.Stream], v.fed[l.Stream] = max(l.Seq, l.To), true
	if l.To != 0 {
		v.r.Gaps += l.To - l.Seq + 1
		if l.Stream == Events {
			v.gap = Range{l.Seq, l.To}
		}
		if w.Row != nil || len(w.RowWrong) > 0 {
			v.r.Unled++
		}
		return
	}
	if isEvent && open.Kind() == schemas.KindErased {
		v.erased[string(open.Tenant)+"."+string(open.Session)] = l.Seq
		if !signed { // which it is when the log's messages are gone
			v.undone[string(open.Tenant)+"."+string(open.Session)] = l.Seq
		}
	}
	session := ""
	if t, s := owner(l.Stream, l.Subject); t != "" && (!isEvent || open.Kind() != schemas.KindErased) {
		session = string(t) + "." + string(s)
	}
	about := func() string {
		if isEvent {
			return fmt.Sprintf("%s of session %s", open.ID(), open.Session)
		}
		return l.Subject
	}
	held := v.held.Streams[l.Stream]
	switch {
	case w.Entry == nil && l.Seq < held.First && l.Stream == Events:
		// Erased, too old, or deleted: the log begins behind it in all cases. Of SYSTEM
		// nothing ever becomes too old.
		v.missing = append(v.missing, lost{Problem{&n, l.Stream, l.Seq, about()}, l.Stored, l.Size, session, aged})
	case w.Entry == nil:
		how := "deleted from the log: "
		if l.Seq > held.Last {
			how = "cut off the end of the log: "
		}
		v.missing = append(v.missing, lost{Problem{&n, l.Stream, l.Seq, how + about()}, l.Stored, l.Size, session, message})
	case w.Entry.Stream != l.Stream || w.Entry.Seq != l.Seq:
		say(l.Stream, l.Seq, "in its place stands %s %d", w.Entry.Stream, w.Entry.Seq)
	case made == nil:
		v.missing = append(v.missing, lost{Problem{&n, l.Stream, l.Seq, "its salt is gone, and the message is not: " + about()}, l.Stored, l.Size, session, unsalted})
	case string(made) != string(record):
		say(l.Stream, l.Seq, "the message was changed: %s: %s", about(), difference(record, made))
	case !signed:
		v.r.Unsigned++
	default:
		v.r.Messages++
	}
	if v.held.Rows != nil {
		v.row(w, l, open, isEvent, about(), session)
	}
}

// earlier makes the leaf of a message again whose record the feed has no more. Its
// hash has to be one of those that are left of such.
func (v *verifier) earlier(w Witness) {
	e := w.Entry
	v.c.Decode(e)
	p := Problem{Stream: e.Stream, Seq: e.Seq, Text: "the message was changed: it is none of those that were signed"}
	if e.Stream == System {
		v.recorded(e.Seq)
	}
	salt, err := hex.DecodeString(w.Salt)
	if err != nil || w.Salt == "" {
		p.Text = "its salt is gone, and the message is not"
		v.problem(p)
		return
	}
	v.early = append(v.early, early{p, hashOf(Record(*e, salt))})
}

// recorded looks for messages of SYSTEM that are missing before one, of which the feed
// has the leaves no more: nothing of SYSTEM ever becomes too old.
func (v *verifier) recorded(seq uint64) {
	if seq > v.system+1 {
		v.problem(Problem{Stream: System, Seq: v.system + 1, Text: fmt.Sprintf("deleted from the log, with all up to %d", seq-1)})
	}
	v.system = seq
}

// settle looks for the leaves of messages among those of which the hashes are left.
// Behind the last that has one, and without one that follows it in the feed, they may
// be too new to have any.
func (v *verifier) settle() {
	if last := v.held.Streams[System].Last; !v.fed[System] && v.held.First > 0 && v.held.Feed != nil {
		v.recorded(max(last, v.system) + 1)
	}
	left := map[tlog.Hash]bool{}
	for n := range min(v.held.First, v.size) {
		if h, ok := v.hash(n); ok {
			left[h] = true
		}
	}
	followed := map[string]uint64{} // the last of a stream that has a leaf
	for _, e := range v.early {
		if left[e.hash] {
			followed[e.Stream] = e.Seq
		}
	}
	for stream, at := range v.at {
		if v.fed[stream] {
			followed[stream] = at
		}
	}
	for _, e := range v.early {
		switch {
		case left[e.hash]:
			v.r.Messages++
			v.r.Unfed--
		case e.Seq < followed[e.Stream]:
			v.problem(e.Problem)
		default:
			v.r.Unsigned++
		}
	}
}

// row holds a row against its leaf.
func (v *verifier) row(w Witness, l Leaf, open schemas.Event, isEvent bool, about, session string) {
	if l.Stream != Events {
		return
	}
	n := w.Number
	say := func(text string) { v.problem(Problem{&n, l.Stream, l.Seq, text + ": " + about}) }
	v.r.Twice += uint64(w.RowsTwice)
	v.r.Older += uint64(w.RowsOlder)
	defer func() { // what the event of it itself is comes first
		for _, what := range w.RowWrong {
			v.missing = append(v.missing, lost{Problem{&n, l.Stream, l.Seq, "the record is not what was signed: " + what + ": " + about}, l.Stored, 0, session, rowAsIs})
		}
	}()
	switch {
	case w.Row == nil && (!isEvent || len(w.RowWrong) > 0):
		return
	case !isEvent:
		say("it is no event, and there is a row of it")
		return
	case w.Row == nil && l.Seq < v.held.Rows.First:
		v.r.Before++
		return
	case w.Row == nil:
		if v.held.Rows.has(l.Seq) && open.Kind() != schemas.KindErased {
			v.missing = append(v.missing, lost{Problem{&n, l.Stream, l.Seq, "its row is missing: " + about}, l.Stored, 0, session, row})
		}
		return
	}
	salt, err := hex.DecodeString(w.Salt)
	if w.Salt == "" {
		err = ErrRecord
	}
	text, _ := w.Row.Open().MarshalString()
	switch {
	case text != string(l.Event), !w.Row.Stored.Equal(l.Stored):
		say("the row was changed")
	case err != nil:
		v.missing = append(v.missing, lost{Problem{&n, l.Stream, l.Seq, "the row's salt is gone, and the row is not: " + about}, l.Stored, 0, session, rowAsIs})
	case !v.whole(w, l, salt):
		say("the row was changed, in what is not open")
	case w.RowGone > 0 && w.RowGone == l.Size:
		v.r.Rows++
		v.r.Bodiless++
	case hex.EncodeToString(bodyDigest(salt, w.Row.Body)) != l.Body:
		say("the row's body was changed")
	default:
		v.r.Rows++
	}
}

// whole tells whether all of a row but its body is as it was signed, also what is
// not open.
func (v *verifier) whole(w Witness, l Leaf, salt []byte) bool {
	if w.Entry != nil && w.Entry.Event.Data != nil {
		is, _ := w.Row.MarshalString()
		was, _ := w.Entry.Event.MarshalString()
		return is == was
	}
	if v.c.Header == nil || w.Row.Kind() == schemas.KindErased { // which has a header that is not the event's
		return true
	}
	return hex.EncodeToString(headDigest(salt, v.c.Header(*w.Row))) == l.Head
}

// stray looks at rows for which there is no leaf.
func (v *verifier) stray(seq uint64) {
	at, any := v.at[Events]
	switch {
	case v.gap.has(seq), !any && v.held.First > 0:
		v.r.Unled++ // the log had lost it when the tree came, or the feed has lost its leaf
	case any && seq > at && seq <= v.held.Streams[Events].Last:
		// Too new to have one.
	default:
		v.problem(Problem{Stream: Events, Seq: seq, Text: "there is a row of it, and it was never in the log"})
	}
}

// difference names the members in which two records differ.
func difference(signed, now []byte) string {
	a, err := ReadRecord(signed)
	b, err2 := ReadRecord(now)
	if err != nil || err2 != nil {
		return "unreadable"
	}
	var what []string
	for _, m := range []struct {
		name string
		same bool
	}{
		{"subject", a.Subject == b.Subject}, {"time", a.Stored.Equal(b.Stored)}, {"headers", a.Head == b.Head},
		{"body", a.Body == b.Body && a.Size == b.Size}, {"event", string(a.Event) == string(b.Event)},
	} {
		if !m.same {
			what = append(what, m.name)
		}
	}
	return strings.Join(what, ", ")
}

// beyond is a message for which the tree has no leaf yet.
func (v *verifier) beyond(e Entry) {
	if at, ok := v.at[e.Stream]; ok && e.Seq <= at {
		v.problem(Problem{Stream: e.Stream, Seq: e.Seq, Text: "the tree has no leaf for this message, and is past it"})
		return
	}
	v.at[e.Stream] = e.Seq
	v.r.Unsigned++
	if v.c.Decode(&e); erases(e) {
		of := string(e.Event.Tenant) + "." + string(e.Event.Session)
		v.erased[of], v.undone[of] = e.Seq, e.Seq
	}
}

// end settles what is missing: erased, or lost.
func (v *verifier) end() {
	if v.next < v.held.Leaves || v.next < v.size {
		n := v.next
		v.problem(Problem{Leaf: &n, Text: fmt.Sprintf("the feed ends before it; %d leaves were signed", v.size)})
	}
	var gone []Problem
	erases := func(m lost) bool {
		if m.session == "" {
			return false
		}
		switch by := v.erased[m.session]; m.what {
		case unsalted: // the messages went before it; this was read in between
			return v.undone[m.session] > m.Seq
		case rowAsIs: // the rows go last
			return by > m.Seq && v.held.Done > 0 && by > v.held.Done
		default:
			return by > m.Seq
		}
	}
	room := uint64(0) // that erasures have made in the log
	for _, m := range v.missing {
		if m.what == message && erases(m) {
			room += uint64(m.size) + 64<<10 // its headers are no more
		}
	}
	v.settle()
	v.unfed(6 * room) // as much is a body there that is all escapes
	for _, m := range v.missing {
		erased := erases(m)
		switch k := v.held.Kept; {
		case erased && m.what != row && m.what != rowAsIs:
			v.r.Erased++
		case erased:
		case m.what == aged && (k == nil || k.explains(m.stored, room)):
			v.r.Aged++
		case m.what == aged:
			m.Text = fmt.Sprintf("deleted from the log before its time: it would be %s old, and the log keeps %s or %d MB, and has %d: %s",
				k.At.Sub(m.stored).Round(time.Second), k.MaxAge.duration(), k.MaxBytes>>20, k.Bytes>>20, m.Text)
			gone = append(gone, m.Problem)
		default:
			gone = append(gone, m.Problem)
		}
	}
	rest := v.r.Problems
	v.r.Problems = []Problem{}
	// Those that name no leaf come first: they are of the whole tree.
	slices.SortStableFunc(gone, byLeaf)
	all := append(rest, gone...)
	slices.SortStableFunc(all, byLeaf)
	v.r.More += max(0, len(all)-100)
	v.r.Problems = append(v.r.Problems, all[:min(len(all), 100)]...)
}

// unfed looks whether the feed may have forgotten the first leaves, of which nothing
// but the hashes is left: who has removed them could have removed the messages too.
// The newest of them followed the last checkpoint that is of fewer leaves.
func (v *verifier) unfed(erased uint64) {
	const signing = time.Hour // what follows a checkpoint may have been stored before it, never by that much
	k := v.held.Feed
	if v.held.First == 0 || k == nil {
		return
	}
	oldest := k.Since
	if t := v.before.Add(-signing); t.After(oldest) {
		oldest = t
	}
	if oldest.IsZero() || k.explains(oldest, erased) {
		return
	}
	n := v.held.First - 1
	v.problem(Problem{Leaf: &n, Text: fmt.Sprintf("the feed has lost it and all before it before their time: it was stored after %s, and the feed keeps %s or %d MB, and has %d",
		oldest.Format(time.RFC3339), k.MaxAge.duration(), k.MaxBytes>>20, k.Bytes>>20)})
}

func byLeaf(a, b Problem) int {
	place := func(p Problem) int64 {
		if p.Leaf == nil {
			return -1
		}
		return int64(*p.Leaf)
	}
	switch x, y := place(a), place(b); {
	case x < y:
		return -1
	case x > y:
		return 1
	}
	return 0
}
