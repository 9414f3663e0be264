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
	"net/http/httptest"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/mod/sumdb/note"
	"golang.org/x/mod/sumdb/tlog"
)

// someWitness is a witness's key of a seed.
type someWitness struct {
	name string
	key  ed25519.PrivateKey
}

func witnessOf(name string, seed byte) someWitness {
	return someWitness{name, ed25519.NewKeyFromSeed(slices.Repeat([]byte{seed}, 32))}
}

func (w someWitness) hash() uint32 {
	sum := sha256.Sum256(slices.Concat([]byte(w.name+"\n\x04"), w.key.Public().(ed25519.PublicKey)))
	return binary.BigEndian.Uint32(sum[:])
}

func (w someWitness) vkey() string {
	return fmt.Sprintf("%s+%08x+%s", w.name, w.hash(), base64.StdEncoding.EncodeToString(append([]byte{4}, w.key.Public().(ed25519.PublicKey)...)))
}

func (w someWitness) verifier(t testing.TB) note.Verifier {
	t.Helper()
	k, err := CosignerKey(w.vkey())
	if err != nil {
		t.Fatal(err)
	}
	return k
}

// sign is the line of a signature of a checkpoint's text.
func (w someWitness) sign(text string, at uint64) string {
	sig := binary.BigEndian.AppendUint64(binary.BigEndian.AppendUint32(nil, w.hash()), at)
	sig = append(sig, ed25519.Sign(w.key, fmt.Appendf(nil, "cosignature/v1\ntime %d\n%s", at, text))...)
	return "— " + w.name + " " + base64.StdEncoding.EncodeToString(sig) + "\n"
}

// honest is a witness as the protocol has it. It is asked by one at a time.
type honest struct {
	someWitness
	size  uint64
	root  tlog.Hash
	olds  []uint64 // that it was asked with
	asked atomic.Int32
}

func (h *honest) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	h.asked.Add(1)
	body, err := io.ReadAll(r.Body)
	head, signed, ok := strings.Cut(string(body), "\n\n")
	if err != nil || !ok || r.Method != http.MethodPost || r.URL.Path != "/w/add-checkpoint" {
		http.Error(w, "bad", http.StatusBadRequest)
		return
	}
	lines := strings.Split(head, "\n")
	old, err := strconv.ParseUint(strings.TrimPrefix(lines[0], "old "), 10, 63)
	text := signed[:strings.Index(signed, "\n\n")+1]
	parts := strings.Split(text, "\n")
	size, err2 := strconv.ParseUint(parts[1], 10, 63)
	root, err3 := tlog.ParseHash(parts[2])
	if err := errors.Join(err, err2, err3); err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	h.olds = append(h.olds, old)
	var proof tlog.TreeProof
	for _, line := range lines[1:] {
		hash, err := tlog.ParseHash(line)
		if err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		proof = append(proof, hash)
	}
	switch {
	case old != h.size:
		w.Header().Set("Content-Type", "text/x.tlog.size")
		w.WriteHeader(http.StatusConflict)
		_, _ = fmt.Fprintf(w, "%d\n", h.size)
		return
	case old == size && root != h.root:
		w.WriteHeader(http.StatusConflict)
		return
	case old > 0 && tlog.CheckTree(proof, int64(size), root, int64(old), h.root) != nil:
		w.WriteHeader(http.StatusUnprocessableEntity)
		return
	}
	h.size, h.root = size, root
	// Signatures of keys that nobody here knows are no mistake.
	_, _ = io.WriteString(w, witnessOf("stranger", 99).sign(text, 1)+h.sign(text, 1_800_000_000+size))
}

// witness is a witness at a server of its own.
func (h *honest) serve(t testing.TB) Cosigner {
	t.Helper()
	s := httptest.NewServer(h)
	t.Cleanup(s.Close)
	return Cosigner{URL: s.URL + "/w/", Key: h.verifier(t)}
}

// rounds are such of witnesses, and what they log.
func (m *memory) rounds(t testing.TB, now *time.Time, quorum int, all ...Cosigner) (*Rounds, *bytes.Buffer) {
	t.Helper()
	var said bytes.Buffer
	r, err := NewRounds(CosignOptions{
		Store: m, Keys: keysOf(t, 1).Verifiers, Witnesses: all, Quorum: quorum,
		Log: slog.New(slog.NewTextHandler(&said, nil)), Now: func() time.Time { return *now },
	})
	if err != nil {
		t.Fatal(err)
	}
	if err := r.restore(t.Context()); err != nil {
		t.Fatal(err)
	}
	return r, &said
}

// grow adds messages and signs them.
func (m *memory) grow(t testing.TB, b *Builder, n int) {
	t.Helper()
	for i := range n {
		m.say("s1", request(), fmt.Sprint("more ", i))
	}
	if err := m.all(b); err != nil {
		t.Fatal(err)
	}
}

func ask(t testing.TB, r *Rounds) {
	t.Helper()
	if err := r.round(t.Context()); err != nil {
		t.Fatal(err)
	}
}

// Each witness signs each checkpoint that is the newest when it is asked, with the
// proof that the tree has grown from the one before, also after a restart, and also if
// one of them has forgotten all.
func TestCosigned(t *testing.T) {
	m, now := built(t), time.Now()
	a, b := &honest{someWitness: witnessOf("a.example/w", 1)}, &honest{someWitness: witnessOf("b.example/w", 2)}
	all := []Cosigner{a.serve(t), b.serve(t)}
	r, said := m.rounds(t, &now, 2, all...)
	ask(t, r)
	ask(t, r) // which has nothing new to ask
	builder := m.builder(t, nil)
	if err := builder.Restore(t.Context()); err != nil {
		t.Fatal(err)
	}
	m.grow(t, builder, 700) // so that there are full tiles of it, and some of the edge
	ask(t, r)
	r, _ = m.rounds(t, &now, 2, all...)
	ask(t, r)
	m.grow(t, builder, 3)
	b.size, b.root = 0, tlog.Hash{}
	ask(t, r)
	if want := []uint64{0, 301, 1001}; !slices.Equal(a.olds, want) {
		t.Errorf("a was asked with %v, not %v", a.olds, want)
	}
	if want := []uint64{0, 301, 1001, 0}; !slices.Equal(b.olds, want) {
		t.Errorf("b was asked with %v, not %v", b.olds, want)
	}
	if len(m.cosigned) != 3 || said.Len() > 0 {
		t.Fatalf("%d are stored; %s", len(m.cosigned), said)
	}
	last := m.cosigned[2]
	if !strings.HasPrefix(last, m.checkpoints[len(m.checkpoints)-1]) || strings.Contains(last, "stranger") {
		t.Errorf("stored: %s", last)
	}
	// A reader of signed notes takes it, by the key of any of them.
	for _, k := range []note.Verifier{a.verifier(t), b.verifier(t)} {
		if n, err := note.Open([]byte(last), note.VerifierList(k)); err != nil || len(n.Sigs) != 1 || len(n.UnverifiedSigs) != 2 {
			t.Errorf("%s: %v", k.Name(), err)
		}
	}
	report, err := Verify(t.Context(), each(m.lines(nil, nil)), Check{
		Keys: keysOf(t, 1).Verifiers, Decode: decode, Witnesses: []note.Verifier{a.verifier(t), witnessOf("c", 3).verifier(t)},
	})
	want := []Cosignature{{"a.example/w", 1004, time.Unix(1_800_001_004, 0).UTC()}}
	if err != nil || !report.OK() || report.Cosigned != 3 || report.Unknown != 0 || !slices.Equal(report.Witnessed, want) {
		t.Errorf("%v %+v", err, report)
	}
	if report = m.verify(t, m.lines(nil, nil), last); !report.OK() || report.Unknown != 3 || report.Witnessed != nil {
		t.Errorf("without their keys: %+v", report)
	}
}

// Whatever one of them does, it is asked seldom, is told of once, and what the other
// signs is stored.
func TestLyingWitness(t *testing.T) {
	liar := witnessOf("liar.example", 7)
	var elsewhere atomic.Int32
	other := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { elsewhere.Add(1) }))
	defer other.Close()
	text := func(r *http.Request) string {
		body, _ := io.ReadAll(r.Body)
		_, signed, _ := strings.Cut(string(body), "\n\n")
		return signed[:strings.Index(signed, "\n\n")+1]
	}
	say := func(w http.ResponseWriter, s string) { _, _ = io.WriteString(w, s) }
	for name, c := range map[string]struct {
		does http.HandlerFunc
		want string
		most int32 // requests in a round
	}{
		"another key": {func(w http.ResponseWriter, r *http.Request) { say(w, witnessOf("liar.example", 8).sign(text(r), 1)) }, "none of its signatures is by the key", 1},
		"another checkpoint": {func(w http.ResponseWriter, r *http.Request) {
			say(w, liar.sign(strings.Replace(text(r), "\n301\n", "\n300\n", 1), 1))
		}, "invalid signature", 1},
		"another time": {func(w http.ResponseWriter, r *http.Request) {
			line := liar.sign(text(r), 1)
			raw, _ := base64.StdEncoding.DecodeString(strings.TrimSpace(strings.TrimPrefix(line, "— liar.example ")))
			raw[11]++
			say(w, "— liar.example "+base64.StdEncoding.EncodeToString(raw)+"\n")
		}, "invalid signature", 1},
		"in the year 10000": {func(w http.ResponseWriter, r *http.Request) { say(w, liar.sign(text(r), 253402300800)) }, "invalid signature", 1},
		"another text": {func(w http.ResponseWriter, r *http.Request) {
			say(w, "and more\n\n"+liar.sign(text(r)+"\nand more\n", 1))
		}, "what is signed is more than the checkpoint", 1},
		"an empty line": {func(w http.ResponseWriter, r *http.Request) {
			say(w, "\n"+liar.sign(text(r)+"\n", 1))
		}, "what is signed is more than the checkpoint", 1},
		"nothing":    {func(http.ResponseWriter, *http.Request) {}, "malformed note", 1},
		"garbage":    {func(w http.ResponseWriter, _ *http.Request) { say(w, "\x00\xff— liar.example\n\n\n") }, "malformed note", 1},
		"half a one": {func(w http.ResponseWriter, _ *http.Request) { say(w, "— liar.example AAAA\n") }, "malformed note", 1},
		"endless": {func(w http.ResponseWriter, r *http.Request) {
			for r.Context().Err() == nil {
				if _, err := w.Write(bytes.Repeat([]byte("— liar.example AAAAAAAAAAAA\n"), 1000)); err != nil {
					return
				}
			}
		}, "longer than 16384 bytes", 1},
		"slow":     {func(_ http.ResponseWriter, r *http.Request) { _, _ = io.ReadAll(r.Body); <-r.Context().Done() }, "deadline exceeded", 1},
		"hangs up": {func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) }, "EOF", 1},
		"is away": {func(w http.ResponseWriter, _ *http.Request) {
			http.Error(w, "back soon", http.StatusServiceUnavailable)
		}, "503", 1},
		"unknown log": {func(w http.ResponseWriter, _ *http.Request) { http.Error(w, "who?", http.StatusNotFound) }, "404", 1},
		"another log": {func(w http.ResponseWriter, _ *http.Request) { http.Error(w, "no", http.StatusForbidden) }, "403", 1},
		"redirects": {func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, other.URL, http.StatusTemporaryRedirect)
		}, "307", 1},
		"always another size": {func() http.HandlerFunc {
			n := 0
			return func(w http.ResponseWriter, _ *http.Request) {
				n = n%200 + 1
				w.Header().Set("Content-Type", "text/x.tlog.size")
				w.WriteHeader(http.StatusConflict)
				say(w, fmt.Sprintf("%d\n", n))
			}
		}(), "409", 2},
		"no size": {func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Type", "text/x.tlog.size")
			w.WriteHeader(http.StatusConflict)
			say(w, "-1\n")
		}, "the size that it has signed", 1},
		"its size as a page": {func(w http.ResponseWriter, _ *http.Request) { http.Error(w, "300", http.StatusConflict) }, "409", 1},
	} {
		t.Run(name, func(t *testing.T) {
			m, now := built(t), time.Now()
			var asked atomic.Int32
			s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { asked.Add(1); c.does(w, r) }))
			defer s.Close()
			good := &honest{someWitness: witnessOf("good.example", 1)}
			r, said := m.rounds(t, &now, 1, Cosigner{URL: s.URL, Key: liar.verifier(t), Timeout: 300 * time.Millisecond}, good.serve(t))
			var told []Cosigns
			r.o.Tell = func(all []Cosigns) { told = all }
			ask(t, r)
			if n := asked.Load(); n < 1 || n > c.most && name != "hangs up" { // which a client may try again
				t.Errorf("asked %d times", n)
			}
			first := asked.Load()
			now = now.Add(9 * time.Second)
			ask(t, r)
			if asked.Load() != first {
				t.Error("asked again at once")
			}
			for range 40 { // which is not once for each round
				now = now.Add(10 * time.Second)
				ask(t, r)
			}
			if n := asked.Load() - first; n < 5 || n > 14 {
				t.Errorf("asked %d times in 400 s", n)
			}
			if n := strings.Count(said.String(), "\n"); n != 1 || !strings.Contains(said.String(), c.want) {
				t.Errorf("%d lines: %s", n, said)
			}
			if len(m.cosigned) != 1 || strings.Contains(m.cosigned[0], "liar") || !strings.Contains(m.cosigned[0], "good") {
				t.Errorf("stored: %q", m.cosigned)
			}
			if len(told) != 2 || told[0].Size != 0 || told[0].Failed < 5 || told[0].Split != 0 || told[1] != (Cosigns{Witness: "good.example", Size: 301}) {
				t.Errorf("told %+v", told)
			}
			if elsewhere.Load() > 0 {
				t.Error("it was followed")
			}
		})
	}
}

// With a quorum nothing is stored of which fewer have signed; who is back signs at
// once, and what the others have signed of the same tree is kept with it.
func TestQuorum(t *testing.T) {
	m, now := built(t), time.Now()
	a, b := &honest{someWitness: witnessOf("a", 1)}, &honest{someWitness: witnessOf("b", 2)}
	var away atomic.Bool
	away.Store(true)
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if away.Load() {
			w.WriteHeader(http.StatusBadGateway)
			return
		}
		b.ServeHTTP(w, r)
	}))
	defer s.Close()
	r, said := m.rounds(t, &now, 2, a.serve(t), Cosigner{URL: s.URL + "/w", Key: b.verifier(t)})
	ask(t, r)
	if len(m.cosigned) != 0 {
		t.Error("one signature is stored, of two")
	}
	away.Store(false)
	m.fault = func(what string, done bool) error {
		if what == "put cosigned" {
			return errFault
		}
		return nil
	}
	now = now.Add(time.Minute)
	if err := r.round(t.Context()); !errors.Is(err, errFault) {
		t.Fatal(err)
	}
	m.fault = func(string, bool) error { return nil }
	ask(t, r) // what was not stored is
	if len(m.cosigned) != 1 || !strings.Contains(m.cosigned[0], "— a ") || !strings.Contains(m.cosigned[0], "— b ") {
		t.Errorf("stored: %q", m.cosigned)
	}
	if a.asked.Load() != 1 || b.asked.Load() != 1 {
		t.Errorf("asked %d and %d times", a.asked.Load(), b.asked.Load())
	}
	if !strings.Contains(said.String(), "signs now") {
		t.Errorf("said %s", said)
	}
}

// A witness that has signed another history of the log does not sign this one, and
// that is said each time that it is asked, which is seldom.
func TestWitnessedFork(t *testing.T) {
	key := witnessOf("w.example", 1)
	other := newMemory() // the same key, another log
	ob := other.builder(t, nil)
	if err := ob.Restore(t.Context()); err != nil {
		t.Fatal(err)
	}
	for name, grown := range map[string]int{"shorter": 200, "as long": 301, "longer": 400} {
		t.Run(name, func(t *testing.T) {
			m, now, w := built(t), time.Now(), &honest{someWitness: key}
			at := w.serve(t)
			other.grow(t, ob, grown-int(other.last[Events]))
			ro, _ := other.rounds(t, &now, 1, at)
			if ask(t, ro); w.size != uint64(grown) {
				t.Fatalf("it has %d leaves", w.size)
			}
			r, said := m.rounds(t, &now, 1, at)
			var told []Cosigns
			r.o.Tell = func(all []Cosigns) { told = all }
			for range 31 { // five minutes
				ask(t, r)
				now = now.Add(10 * time.Second)
			}
			if n := strings.Count(said.String(), "level=ERROR"); n != 2 || strings.Count(said.String(), "POSSIBLE FORK") != 2 || told[0].Split != 2 || told[0].Failed != 0 {
				t.Errorf("said %d times, %+v: %s", n, told, said)
			}
			if len(m.cosigned) != 0 {
				t.Errorf("stored: %s", m.cosigned)
			}
		})
		other, ob = newMemory(), nil
		ob = other.builder(t, nil)
		if err := ob.Restore(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
}

// Where the builder that takes over has asked meanwhile, that the witness is ahead is
// no fork.
func TestWitnessAhead(t *testing.T) {
	m, now, w := built(t), time.Now(), &honest{someWitness: witnessOf("w", 1)}
	b := m.builder(t, nil)
	if err := b.Restore(t.Context()); err != nil {
		t.Fatal(err)
	}
	at := w.serve(t)
	other, _ := m.rounds(t, &now, 1, at)
	meanwhile := func() {
		m.grow(t, b, 5)
		ask(t, other)
	}
	m2 := &ahead{memory: m, meanwhile: &meanwhile}
	r, said := m.rounds(t, &now, 1, at)
	r.o.Store = m2
	ask(t, r)
	if strings.Contains(said.String(), "FORK") || !strings.Contains(said.String(), "it has signed a tree of 306 leaves") {
		t.Errorf("said %s", said)
	}
	now = now.Add(time.Minute)
	m.grow(t, b, 1)
	ask(t, r)
	if w.size != 307 || !strings.Contains(said.String(), "signs now") {
		t.Errorf("%d, said %s", w.size, said)
	}
}

// Nor is it where that happens between the two questions of who does not know what the
// witness has signed.
func TestWitnessOvertaken(t *testing.T) {
	m, now, w := built(t), time.Now(), &honest{someWitness: witnessOf("w", 1)}
	b := m.builder(t, nil)
	if err := b.Restore(t.Context()); err != nil {
		t.Fatal(err)
	}
	other, _ := m.rounds(t, &now, 1, w.serve(t))
	questions := 0
	s := httptest.NewServer(http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		if questions++; questions == 2 {
			m.grow(t, b, 5)
			ask(t, other)
		}
		w.ServeHTTP(rw, r)
	}))
	defer s.Close()
	r, said := m.rounds(t, &now, 1, Cosigner{URL: s.URL + "/w", Key: w.verifier(t)})
	ask(t, other)
	ask(t, r)
	if strings.Contains(said.String(), "FORK") || !strings.Contains(said.String(), "it has signed a tree of 306 leaves") {
		t.Errorf("said %s", said)
	}
}

// Nor where a power cut has taken the checkpoint that the witness has signed, but not
// its leaves, which are older: they are signed again.
func TestWitnessedIsLost(t *testing.T) {
	m, now, w := built(t), time.Now(), &honest{someWitness: witnessOf("w", 1)}
	b := m.builder(t, nil)
	if err := b.Restore(t.Context()); err != nil {
		t.Fatal(err)
	}
	m.grow(t, b, 5)
	at := w.serve(t)
	r, _ := m.rounds(t, &now, 1, at)
	ask(t, r)
	m.checkpoints, m.positions, m.cosigned = m.checkpoints[:1], m.positions[:1], nil
	r, said := m.rounds(t, &now, 1, at)
	ask(t, r)
	if strings.Contains(said.String(), "FORK") || !strings.Contains(said.String(), "it has signed a tree of 306 leaves") {
		t.Errorf("said %s", said)
	}
	b = m.builder(t, nil)
	if err := b.Restore(t.Context()); err != nil {
		t.Fatal(err)
	}
	m.grow(t, b, 0)
	now = now.Add(time.Minute)
	ask(t, r)
	if len(m.cosigned) != 1 || w.size != 306 || !strings.Contains(said.String(), "signs now") {
		t.Errorf("%q, %d, said %s", m.cosigned, w.size, said)
	}
}

// ahead is a store in which something happens when a checkpoint has been read.
type ahead struct {
	*memory
	meanwhile *func()
}

func (a *ahead) Checkpoint(ctx context.Context) (string, Position, error) {
	text, at, err := a.memory.Checkpoint(ctx)
	if a.meanwhile != nil {
		do := *a.meanwhile
		a.meanwhile = nil
		do()
	}
	return text, at, err
}

// Who is told to stop waits for no witness.
func TestRoundsStop(t *testing.T) {
	m, now := built(t), time.Now()
	asked := make(chan struct{})
	s := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		_, _ = io.ReadAll(r.Body)
		asked <- struct{}{}
		<-r.Context().Done()
	}))
	defer s.Close()
	r, said := m.rounds(t, &now, 1, Cosigner{URL: s.URL, Key: witnessOf("w", 1).verifier(t), Timeout: time.Minute})
	ctx, stop := context.WithCancel(t.Context())
	ended := make(chan struct{})
	go func() { r.Run(ctx); close(ended) }()
	<-asked
	stop()
	select {
	case <-ended:
	case <-time.After(10 * time.Second):
		t.Fatal("it goes on")
	}
	if said.Len() > 0 {
		t.Errorf("said %s", said)
	}
}

// Of a witness that takes connections and never says anything in them none are left.
func TestDeafWitness(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m, now := built(t), time.Now()
		r, said := m.rounds(t, &now, 1, Cosigner{URL: "https://127.0.0.1/w", Key: witnessOf("w", 1).verifier(t)})
		here, there := net.Pipe()
		r.client.Transport.(*http.Transport).DialContext = func(context.Context, string, string) (net.Conn, error) { return here, nil }
		ask(t, r)
		if !strings.Contains(said.String(), "deadline exceeded") {
			t.Errorf("said %s", said)
		}
		// Where this has no end, the test has none.
		if _, err := io.Copy(io.Discard, there); err != nil {
			t.Error(err)
		}
	})
}

// A cosigned checkpoint that is not of this log is named.
func TestCosignedIsVerified(t *testing.T) {
	w := witnessOf("w.example", 1)
	fork := func(n int) string { // the same key's word for another tree
		tr := tree{}
		for range n {
			tr.add(tlog.Hash{1}, func(tlog.Tile, []byte) {})
		}
		c, err := keysOf(t, 1).sign("test", uint64(n), tr.root())
		if err != nil {
			t.Fatal(err)
		}
		return c.Text
	}
	sign := func(text string) string { return text + w.sign(text[:strings.Index(text, "\n\n")+1], 5) }
	elsewhere, err := keysOf(t, 1).sign("elsewhere", 3, tlog.Hash{})
	if err != nil {
		t.Fatal(err)
	}
	m := built(t)
	mine := m.checkpoints[0]
	for name, c := range map[string]struct{ text, want string }{
		"a fork":          {sign(fork(100)), "fork: the checkpoint cosigned by w.example says that the tree of 100 leaves is "},
		"a cut":           {sign(fork(302)), "cut off: the checkpoint cosigned by w.example is of 302 leaves, and the newest here of 301"},
		"a false one":     {mine + w.sign("other\n", 5), "the cosigned checkpoint of 301 leaves: invalid signature for key w.example"},
		"by nobody known": {fork(100) + witnessOf("x", 2).sign("y\n", 5), "fork: a cosigned checkpoint says that the tree of 100 leaves is "},
		"not of the log":  {"test\n1\nAAAA\n\n" + w.sign("test\n1\nAAAA\n", 5), "a cosigned checkpoint: not a checkpoint of this log"},
		"of another":      {sign(elsewhere.Text), `a cosigned checkpoint: it is of "elsewhere", not "test"`},
	} {
		m.cosigned = []string{sign(mine), c.text}
		r, err := Verify(t.Context(), each(m.lines(nil, nil)), Check{Keys: keysOf(t, 1).Verifiers, Decode: decode, Witnesses: []note.Verifier{w.verifier(t)}})
		if err != nil || len(r.Problems) != 1 || !strings.HasPrefix(r.Problems[0].String(), c.want) {
			t.Errorf("%s: %v, %v", name, err, r.Problems)
		}
		if len(r.Witnessed) != 1 || r.Witnessed[0].Size != 301 {
			t.Errorf("%s: %+v", name, r.Witnessed)
		}
	}
}

func TestCosignerKey(t *testing.T) {
	w := witnessOf("w.example/a", 1)
	good := w.vkey()
	parts := strings.Split(good, "+")
	log := keysOf(t, 1).Verifiers[0]
	for key, want := range map[string]string{
		good:                                  "",
		"":                                    "not a witness's key",
		"w":                                   "not a witness's key",
		log:                                   "its type is 1",
		"x" + good:                            "its hash is",
		"w w+" + strings.Join(parts[1:], "+"): "not a witness's key",
		parts[0] + "+" + parts[1] + "+":       "not a witness's key",
		parts[0] + "+" + parts[1] + "+BA==":   "not a witness's key",
		parts[0] + "+0+" + strings.Join(parts[2:], "+"): "its hash is",
		good + "!": "not a witness's key",
	} {
		k, err := CosignerKey(key)
		if want == "" && (err != nil || k.Name() != w.name || k.KeyHash() != w.hash()) || want != "" && (!errors.Is(err, ErrCosigner) || !strings.Contains(err.Error(), want)) {
			t.Errorf("%q: %v", key, err)
		}
	}
}
