package cli

import (
	"bufio"
	"bytes"
	"crypto/rand"
	"errors"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/mod/sumdb/note"

	"waybill.dev/schemas"
)

// exportedFile is an exported session of one call, signed, without proofs; and the
// public key.
func exportedFile(t *testing.T, redacted bool) (text []byte, key string) {
	t.Helper()
	secret, public, err := note.GenerateKey(rand.Reader, "waybill-test")
	if err != nil {
		t.Fatal(err)
	}
	signer, err := note.NewSigner(secret)
	if err != nil {
		t.Fatal(err)
	}
	q, v := decided(1, "ann", "read", `{"a":1}`, schemas.Decision{Rule: "all"})
	opened := q
	opened.Call, opened.Root, opened.Edge, opened.Trace, opened.Body, opened.Data = "", "", "", "", nil, &schemas.Opened{Protocol: "mcp", Name: "n"}
	opened.Seq--
	var out bytes.Buffer
	w := newExportWriter(&out)
	if err := w.write(exportLine{Head: &exportHead{Version: exportVersion, Session: q.Session, Tenant: q.Tenant, From: fromStream, Keys: []string{public}, Redacted: redacted}}); err != nil {
		t.Fatal(err)
	}
	for _, e := range []schemas.Event{opened, q, v} {
		line, err := e.MarshalJSON()
		if err != nil {
			t.Fatal(err)
		}
		if err := w.write(exportLine{Event: line}); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.end(q.Session, []note.Signer{signer}); err != nil {
		t.Fatal(err)
	}
	return out.Bytes(), public
}

func fileOf(t *testing.T, text []byte) string {
	t.Helper()
	name := filepath.Join(t.TempDir(), "s.waybill")
	if err := os.WriteFile(name, text, 0o600); err != nil {
		t.Fatal(err)
	}
	return name
}

// Wherever a file is cut off, whatever byte of it is another, it is told.
func TestExportCutAndAltered(t *testing.T) {
	text, key := exportedFile(t, false)
	if err := checkArchive(fileOf(t, text), []string{key}); err != nil {
		t.Fatal(err)
	}
	read := func(text []byte) (err error) {
		lines := func(yield func([]byte, error) bool) {
			for line := range bytes.Lines(text) {
				if !yield(line, nil) {
					return
				}
			}
		}
		for l, failed := range exportLines(lines) {
			if err = failed; err == nil && l.End != nil {
				is, should, failed := l.End.signed("s0", []string{key})
				if err = failed; is != should {
					err = errAltered
				}
			}
		}
		return err
	}
	if err := read(text); err != nil {
		t.Fatal(err)
	}
	head := bytes.IndexByte(text, '\n')
	for n := range text {
		err := read(text[:n])
		if n < head && !errors.Is(err, errNoExport) || n >= head && !errors.Is(err, errTruncated) {
			t.Fatalf("the first %d bytes: %v", n, err)
		}
		if n > len(text)-20 {
			continue // the last bits of the signature's base64 say nothing
		}
		other := bytes.Clone(text)
		other[n] ^= 1
		if err := read(other); err == nil {
			t.Fatalf("byte %d is another: %s", n, other)
		}
	}
	twice := append(bytes.Clone(text), text...)
	if err := read(twice); !errors.Is(err, errAltered) {
		t.Errorf("two of them: %v", err)
	}
	if err := read([]byte("\x1f\x8b\x08\x00garbage\n\x00")); !errors.Is(err, errNoExport) {
		t.Errorf("another format: %v", err)
	}
}

// Of an archive that is altered no rows are made: what an exported session says is
// held against its signature before.
func TestArchiveIsChecked(t *testing.T) {
	text, key := exportedFile(t, false)
	lines := slices.Collect(bytes.Lines(text))
	whole := func(lines ...[]byte) []byte { return bytes.Join(lines, nil) }
	plain, _ := decided(1, "ann", "read", `{}`, schemas.Decision{})
	bare, err := plain.MarshalJSON()
	if err != nil {
		t.Fatal(err)
	}
	redacted, own := exportedFile(t, true)
	_, foreign := exportedFile(t, false)
	for _, tt := range []struct {
		name string
		text []byte
		key  string
		want string // "": it is taken
	}{
		{"as it is", text, key, ""},
		{"one after the other", whole(text, text), key, ""},
		{"without a key at hand", text, "", ""},
		{"events that nobody has signed", append(bare, '\n'), key, ""},
		{"cut off", whole(lines[:len(lines)-1]...), key, "it breaks off"},
		{"cut off before another", whole(whole(lines[:2]...), text), key, "begins another session"},
		{"altered", bytes.Replace(text, []byte(`"agent":"ann"`), []byte(`"agent":"bob"`), 1), key, "it was altered"},
		{"of another gateway", text, foreign, "it was altered"},
		{"without its beginning", whole(lines[1:]...), key, "line 1 is of an exported session, whose beginning is not there"},
		{"with its beginning written otherwise", bytes.Replace(text, []byte(`{"waybill":`), []byte(`{ "waybill":`), 1), key, "whose beginning is not there"},
		{"redacted", redacted, own, "what was said is left out"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var keys []string
			if tt.key != "" {
				keys = []string{tt.key}
			}
			err := checkArchive(fileOf(t, tt.text), keys)
			if tt.want == "" && err != nil || tt.want != "" && (err == nil || !strings.Contains(err.Error(), tt.want)) {
				t.Errorf("%v, want %q", err, tt.want)
			}
		})
	}
}

// zeros has no end, and no line has one in it.
type zeros struct{}

func (zeros) Read(b []byte) (int, error) { clear(b); return len(b), nil }

func TestLongLine(t *testing.T) {
	if line, err := readLine(bufio.NewReader(zeros{})); !errors.Is(err, errLongLine) {
		t.Errorf("%d bytes, %v", len(line), err)
	}
	in := bufio.NewReaderSize(strings.NewReader(strings.Repeat("a", 5000)+"\nrest"), 16)
	one, err1 := readLine(in)
	two, err2 := readLine(in)
	if len(one) != 5001 || err1 != nil || string(two) != "rest" || err2 != io.EOF {
		t.Errorf("%d bytes, %v; %q, %v", len(one), err1, two, err2)
	}
}

// What stands in a file reaches the terminal as text, whatever member of it: whoever
// wrote it has chosen the rules' names, too. A call that names itself as its cause is
// shown all the same.
func TestTreeShowsNoControls(t *testing.T) {
	const evil = "\x1b]0;owned\x07\x1b[2J\u202egnp.exe"
	q, v := decided(1, "ann", "read", `{"x":"`+"\u202e"+`"}`, schemas.Decision{
		Rule: evil, Reason: evil, Facts: map[string]string{"approval": evil, evil: evil}, Matches: []string{evil}, Obligations: []string{evil}, PolicySHA256: evil,
	})
	q.Parent = q.Call
	q.Data.(*schemas.Requested).Alias, q.Data.(*schemas.Requested).Name = evil, evil
	next := func(data schemas.Payload) schemas.Event {
		e := q.Next(data, []byte(evil))
		e.Seq, e.Stored = v.Seq+1, v.Stored.Add(time.Millisecond)
		return e
	}
	held := v
	held.Data = &schemas.Held{Decision: schemas.Decision{N: 2, Rule: evil, Reason: evil, Approval: evil}}
	opened := q
	opened.Call, opened.Parent, opened.Root, opened.Data = "", "", "", &schemas.Opened{Protocol: evil, Name: evil, Client: evil}
	s := newStory(true)
	for _, e := range []schemas.Event{
		opened, q, v, held, next(&schemas.Caused{Call: schemas.CallID(evil), Agent: evil, Session: evil}),
		next(&schemas.Failed{Code: evil, Detail: evil, Screened: schemas.Screened{Checks: []schemas.Check{{Guard: evil, Said: evil, Reason: evil}}}}),
	} {
		s.add(record{Event: e})
	}
	s.add(record{Undecodable: evil})
	s.notes = append(s.notes, evil)
	var out bytes.Buffer
	if err := s.print(Env{Stdout: &out}); err != nil {
		t.Fatal(err)
	}
	for _, r := range out.String() {
		if r != '\n' && visible(string(r)) != string(r) {
			t.Errorf("%q is printed", r)
		}
	}
	if !strings.Contains(out.String(), "requested") {
		t.Errorf("no call is shown:\n%s", out.String())
	}
	if t.Failed() {
		t.Log(out.String())
	}
}

// A file is there whole or not at all; what is no file stays what it is.
func TestWriteFile(t *testing.T) {
	dir := t.TempDir()
	name := filepath.Join(dir, "f")
	for _, text := range []string{"one", "again"} {
		if err := writeFile(name, func(w io.Writer) error { _, err := io.WriteString(w, text); return err }); err != nil {
			t.Fatal(err)
		}
	}
	link := filepath.Join(t.TempDir(), "l")
	if err := os.Symlink(name, link); err != nil {
		t.Fatal(err)
	}
	if err := writeFile(link, func(w io.Writer) error { _, err := io.WriteString(w, "two"); return err }); err != nil {
		t.Fatal(err)
	}
	if st, err := os.Lstat(link); err != nil || st.Mode().Type() != os.ModeSymlink {
		t.Errorf("the link is %v, %v", st.Mode(), err)
	}
	broken := errors.New("broken")
	if err := writeFile(name, func(w io.Writer) error { _, _ = io.WriteString(w, "three"); return broken }); !errors.Is(err, broken) {
		t.Error(err)
	}
	if err := writeFile(os.DevNull, func(io.Writer) error { t.Error("is written"); return nil }); err == nil || !strings.Contains(err.Error(), "is no file") {
		t.Error(err)
	}
	text, err := os.ReadFile(name)
	all, err2 := os.ReadDir(dir)
	if string(text) != "two" || err != nil || len(all) != 1 || err2 != nil {
		t.Errorf("%s, %v; %v, %v", text, err, all, err2)
	}
	if st, err := os.Stat(name); err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("%v, %v", st.Mode(), err)
	}
}
