package audit

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"crypto/sha256"
	"encoding/base64"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"
	"unicode"
	"unicode/utf8"

	"golang.org/x/mod/sumdb/note"
	"golang.org/x/mod/sumdb/tlog"
)

// Cosigner is a witness of the log (C2SP tlog-witness): somebody else, who signs a
// checkpoint only if its tree has grown from the last one that it signed. Whoever
// trusts it knows that there is one history, also where nobody has kept an earlier
// checkpoint.
type Cosigner struct {
	URL     string        // below which is add-checkpoint
	Key     note.Verifier // of CosignerKey
	Timeout time.Duration // of one answer, default 5 s
}

// Cosignature is what a witness has signed.
type Cosignature struct {
	Witness string    `json:"witness"`
	Size    uint64    `json:"size"` // of the tree
	Time    time.Time `json:"time"` // by the witness's clock
}

// ErrCosigner is wrapped by the error for what is no key of a witness.
var ErrCosigner = errors.New("not a witness's key (cosignature/v1: name+hash+base64 of a byte 04 and an Ed25519 public key)")

const cosignatureV1 = 4 // type of a key, as signed notes number them

type cosignerKey struct {
	name string
	hash uint32
	key  ed25519.PublicKey
}

// CosignerKey reads the public key of a witness (C2SP tlog-cosignature). It returns
// ErrCosigner.
func CosignerKey(vkey string) (note.Verifier, error) {
	parts := strings.SplitN(vkey, "+", 3)
	if len(parts) != 3 || parts[0] == "" || !utf8.ValidString(parts[0]) || strings.ContainsFunc(parts[0], unicode.IsSpace) {
		return nil, ErrCosigner
	}
	key, err := base64.StdEncoding.DecodeString(parts[2])
	switch {
	case err != nil || len(key) == 0:
		return nil, ErrCosigner
	case key[0] != cosignatureV1:
		return nil, fmt.Errorf("%w: its type is %d", ErrCosigner, key[0])
	case len(key) != 1+ed25519.PublicKeySize:
		return nil, ErrCosigner
	}
	sum := sha256.Sum256(slices.Concat([]byte(parts[0]+"\n"), key))
	k := cosignerKey{parts[0], binary.BigEndian.Uint32(sum[:]), key[1:]}
	if parts[1] != fmt.Sprintf("%08x", k.hash) {
		return nil, fmt.Errorf("%w: its hash is %08x, not %q", ErrCosigner, k.hash, parts[1])
	}
	return k, nil
}

func (k cosignerKey) Name() string    { return k.name }
func (k cosignerKey) KeyHash() uint32 { return k.hash }

// latest is the end of the year 9999, behind which a time cannot be written.
const latest = 253402300799

// Verify verifies the signature of a checkpoint: eight bytes of time, and Ed25519.
func (k cosignerKey) Verify(msg, sig []byte) bool {
	if len(sig) != 8+ed25519.SignatureSize {
		return false
	}
	at := binary.BigEndian.Uint64(sig)
	return at <= latest && ed25519.Verify(k.key, fmt.Appendf(nil, "cosignature/v1\ntime %d\n%s", at, msg), sig[8:])
}

// cosigned are the signatures of a checkpoint by witnesses that are known, and their
// lines. It returns an error where one of them is wrong. One is, too, where the text is
// more than the checkpoint: its line would be false behind the checkpoint alone.
func cosigned(text string, c Checkpoint, witnesses note.Verifiers) (all []Cosignature, lines []string, err error) {
	n, err := note.Open([]byte(text), witnesses)
	if unknown := new(note.UnverifiedNoteError); errors.As(err, &unknown) {
		return nil, nil, nil
	}
	if err != nil {
		return nil, nil, err
	}
	if n.Text != c.body() {
		return nil, nil, errors.New("what is signed is more than the checkpoint")
	}
	for _, s := range n.Sigs {
		raw, err := base64.StdEncoding.DecodeString(s.Base64)
		if err != nil || len(raw) < 12 {
			return nil, nil, fmt.Errorf("signature of %s: %w", s.Name, ErrCheckpoint) // which was verified: never
		}
		all = append(all, Cosignature{s.Name, c.Size, time.Unix(int64(binary.BigEndian.Uint64(raw[4:])), 0).UTC()})
		lines = append(lines, "— "+s.Name+" "+s.Base64+"\n")
	}
	return all, lines, nil
}

// ErrSplit: a witness has signed a tree that this one has not grown from.
var ErrSplit = errors.New("POSSIBLE FORK: the witness has signed another history of this log")

// CosignOptions are what a round of witnesses goes by.
type CosignOptions struct {
	Store     Store // not the builder's own, which goes by what it has read itself
	Keys      []string
	Witnesses []Cosigner
	Quorum    int             // as many have to sign what is stored as cosigned; default 1
	Every     time.Duration   // at most one round in it; default 10 s
	Tell      func([]Cosigns) // told of each round; may be nil
	Log       *slog.Logger    // default none
	Now       func() time.Time
}

// Cosigns is how a witness does.
type Cosigns struct {
	Witness       string
	Size          uint64 // of the newest tree that it has cosigned
	Failed, Split uint64 // rounds in which it did not sign: for ErrSplit, and for anything else
}

// Rounds asks witnesses to sign the newest checkpoint, all at the same time, from time
// to time. It runs beside the builder, which never waits for it.
type Rounds struct {
	o        CosignOptions
	log      note.Verifiers
	client   *http.Client
	all      []*cosigner
	unstored bool // somebody has signed since the last that is stored
}

// cosigner is a witness, and how it does. In a round it belongs to the goroutine that
// asks it.
type cosigner struct {
	Cosigner
	Cosigns
	line   string    // its signature of the tree of Size
	tries  int       // that failed since it signed
	until  time.Time // it is not asked before
	said   string    // what was logged last of it: "" for nothing wrong
	answer error     // of this round
}

// longest is how long a witness is left alone at most, largest how much of an answer is
// read, and connecting how long either half of making a connection may take.
const (
	longest    = 5 * time.Minute
	largest    = 16 << 10
	connecting = 10 * time.Second
)

// NewRounds makes them.
func NewRounds(o CosignOptions) (*Rounds, error) {
	if o.Every == 0 {
		o.Every = 10 * time.Second
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	if o.Now == nil {
		o.Now = time.Now
	}
	if o.Tell == nil {
		o.Tell = func([]Cosigns) {}
	}
	o.Quorum = max(o.Quorum, 1)
	r := &Rounds{o: o, client: &http.Client{
		// A connection is made for whoever comes next, too: it is not given up with the
		// question that it was made for, and has limits of its own.
		Transport: &http.Transport{
			Proxy: http.ProxyFromEnvironment, DialContext: (&net.Dialer{Timeout: connecting}).DialContext, TLSHandshakeTimeout: connecting,
			ForceAttemptHTTP2: true, MaxResponseHeaderBytes: largest, IdleConnTimeout: 90 * time.Second,
		},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}}
	for _, w := range o.Witnesses {
		if w.Timeout == 0 {
			w.Timeout = 5 * time.Second
		}
		r.all = append(r.all, &cosigner{Cosigner: w, Cosigns: Cosigns{Witness: w.Key.Name()}})
	}
	var err error
	r.log, err = Known(o.Keys)
	return r, err
}

// Run asks until ctx is done.
func (r *Rounds) Run(ctx context.Context) {
	defer r.client.CloseIdleConnections()
	if err := r.restore(ctx); err != nil && ctx.Err() == nil {
		r.o.Log.Warn("audit: the newest cosigned checkpoint cannot be read", "error", err) // they say themselves what they have signed
	}
	r.tell()
	tick := time.NewTicker(r.o.Every)
	defer tick.Stop()
	for ctx.Err() == nil {
		if err := r.round(ctx); err != nil && ctx.Err() == nil {
			r.o.Log.Warn("audit: the witnesses are not asked, or what they signed is not stored; in a while again", "error", err)
		}
		select {
		case <-ctx.Done():
		case <-tick.C:
		}
	}
}

// restore reads what was signed last, perhaps for another process.
func (r *Rounds) restore(ctx context.Context) error {
	text, err := r.o.Store.Cosigned(ctx)
	if err != nil || text == "" {
		return err
	}
	c, err := OpenCheckpoint(text, r.log)
	if err != nil {
		return err
	}
	for _, w := range r.all {
		if _, lines, err := cosigned(text, c, note.VerifierList(w.Key)); err == nil && len(lines) > 0 {
			w.Size, w.line = c.Size, lines[0]
		}
	}
	return nil
}

// round has those sign the newest checkpoint who have not, and are not left alone.
func (r *Rounds) round(ctx context.Context) error {
	text, _, err := r.o.Store.Checkpoint(ctx)
	if err != nil || text == "" {
		return err
	}
	c, err := OpenCheckpoint(text, r.log)
	if err != nil || c.Size == 0 {
		return err
	}
	var asked []*cosigner
	for _, w := range r.all {
		if w.Size < c.Size && !r.o.Now().Before(w.until) {
			asked = append(asked, w)
		}
	}
	if len(asked) > 0 {
		hashes, err := r.hashes(ctx, c)
		if err != nil {
			return err
		}
		var all sync.WaitGroup
		for _, w := range asked {
			all.Go(func() { w.answer = w.ask(ctx, r.client, c, hashes) })
		}
		all.Wait()
	}
	if ctx.Err() != nil {
		return nil
	}
	for _, w := range asked {
		if ahead := errAhead(0); errors.As(w.answer, &ahead) {
			// Not if there are as many leaves: then another process has signed their tree
			// meanwhile, or a power cut has taken the checkpoint, and it is signed again.
			if n, _, err := r.o.Store.Head(ctx); err == nil && n < uint64(ahead) {
				w.answer = fmt.Errorf("%w: it has signed a tree of %d leaves, and there are %d here; either an older copy of the log was put back, or somebody has the key", ErrSplit, uint64(ahead), n)
			}
		}
		r.settle(w, c)
	}
	err = r.store(ctx, c)
	r.tell()
	return err
}

func (r *Rounds) tell() {
	told := make([]Cosigns, len(r.all))
	for i, w := range r.all {
		told[i] = w.Cosigns
	}
	r.o.Tell(told)
}

// settle draws the conclusions from an answer.
func (r *Rounds) settle(w *cosigner, c Checkpoint) {
	of := []any{"witness", w.Witness, "url", w.URL, "size", c.Size}
	if w.answer == nil {
		w.Size, w.tries, r.unstored = c.Size, 0, true
		if w.said != "" {
			r.o.Log.Info("audit: the witness signs now", of...)
		}
		w.said = ""
		return
	}
	pause := min(r.o.Every<<min(w.tries, 16), longest)
	w.tries++
	what := "failed"
	if status := errStatus(""); errors.As(w.answer, &status) {
		what = string(status)
	}
	of = append(of, "error", w.answer)
	switch {
	case errors.Is(w.answer, ErrSplit):
		// This is said each time: it does not go away, and nothing is worse.
		what, pause = "fork", max(longest, r.o.Every)
		w.Split++
		r.o.Log.Error("audit: a witness refuses the checkpoint", of...)
	default:
		w.Failed++
		if w.said != what {
			r.o.Log.Warn("audit: a witness does not sign; the audit goes on without it, and asks it again", of...)
		}
	}
	w.said, w.until = what, r.o.Now().Add(pause)
}

// store stores the newest checkpoint with what the witnesses have signed, if it is
// enough and there is more of it than is stored.
func (r *Rounds) store(ctx context.Context, c Checkpoint) error {
	text, n := c.Text, 0
	for _, w := range r.all {
		if w.Size == c.Size {
			text, n = text+w.line, n+1
		}
	}
	if !r.unstored || n < r.o.Quorum {
		return nil
	}
	err := r.o.Store.PutCosigned(ctx, text)
	r.unstored = err != nil
	return err
}

// hashes reads the hashes of a checkpoint's tree. The edge may be of a later one, whose
// tiles are wider, or full by now.
func (r *Rounds) hashes(ctx context.Context, c Checkpoint) (tlog.HashReader, error) {
	edge, err := r.o.Store.Edge(ctx)
	return Reader(tlog.Tree{N: int64(c.Size), Hash: c.Root}, func(t tlog.Tile) ([]byte, error) {
		for e, data := range edge {
			if e.L == t.L && e.N == t.N && e.W >= t.W {
				return data, nil
			}
		}
		return r.o.Store.Tile(ctx, tlog.Tile{H: t.H, L: t.L, N: t.N, W: tileWidth})
	}), err
}

// errAhead says that a witness has signed a tree of that size, which is larger than the newest here.
type errAhead uint64

func (e errAhead) Error() string { return fmt.Sprintf("it has signed a tree of %d leaves", uint64(e)) }

// errStatus is an answer that is none.
type errStatus string

func (e errStatus) Error() string { return "it answers " + string(e) }

// ask has the witness sign a checkpoint. It returns ErrSplit, errAhead or errStatus.
func (w *cosigner) ask(ctx context.Context, client *http.Client, c Checkpoint, hashes tlog.HashReader) error {
	ctx, cancel := context.WithTimeout(ctx, w.Timeout)
	defer cancel()
	old, another := w.Size, fmt.Errorf("%w: it has signed another tree of %d leaves", ErrSplit, c.Size)
	for again := false; ; again = true {
		resp, answer, err := w.post(ctx, client, old, c, hashes)
		if err != nil {
			return err
		}
		switch {
		case resp.StatusCode == http.StatusOK:
			_, lines, err := cosigned(c.body()+"\n"+answer, c, note.VerifierList(w.Key))
			if err == nil && len(lines) == 0 {
				err = errors.New("none of its signatures is by the key that is configured")
			}
			if err != nil {
				return fmt.Errorf("its signature: %w", err)
			}
			w.line = lines[0]
			return nil
		case resp.StatusCode == http.StatusConflict && resp.Header.Get("Content-Type") == "text/x.tlog.size":
			size, err := strconv.ParseUint(strings.TrimSuffix(answer, "\n"), 10, 63)
			switch {
			case err != nil:
				return fmt.Errorf("the size that it has signed: %q", answer[:min(len(answer), 100)])
			case size > c.Size:
				return errAhead(size)
			case size == old && size == c.Size:
				return another
			case again:
				return fmt.Errorf("%w: it has signed trees of %d leaves, and of %d", errStatus(resp.Status), old, size)
			}
			old = size
		case resp.StatusCode == http.StatusConflict && old == c.Size:
			return another
		case resp.StatusCode == http.StatusUnprocessableEntity && old > 0:
			return fmt.Errorf("%w: the tree of %d leaves has not grown from the one of %d leaves that it has signed", ErrSplit, c.Size, old)
		default:
			return fmt.Errorf("%w: %q", errStatus(resp.Status), answer[:min(len(answer), 200)])
		}
	}
}

// post sends a checkpoint to a witness that has signed the tree of the old size.
func (w *cosigner) post(ctx context.Context, client *http.Client, old uint64, c Checkpoint, hashes tlog.HashReader) (*http.Response, string, error) {
	body := fmt.Appendf(nil, "old %d\n", old)
	if old > 0 {
		proof, err := tlog.ProveTree(int64(c.Size), int64(old), hashes)
		if err != nil {
			return nil, "", fmt.Errorf("prove that the tree of %d leaves has grown from that of %d: %w", c.Size, old, err)
		}
		for _, h := range proof {
			body = append(base64.StdEncoding.AppendEncode(body, h[:]), '\n')
		}
	}
	body = append(append(body, '\n'), c.Text...)
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, strings.TrimSuffix(w.URL, "/")+"/add-checkpoint", bytes.NewReader(body))
	if err != nil {
		return nil, "", err
	}
	req.Header.Set("Content-Type", "text/plain; charset=utf-8")
	req.Header.Set("User-Agent", "waybill")
	resp, err := client.Do(req)
	if err != nil {
		return nil, "", err
	}
	defer func() { _ = resp.Body.Close() }()
	answer, err := io.ReadAll(io.LimitReader(resp.Body, largest+1))
	if err == nil && len(answer) > largest {
		err = fmt.Errorf("its answer is longer than %d bytes", largest)
	}
	return resp, string(answer), err
}
