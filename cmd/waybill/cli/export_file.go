package cli

import (
	"bufio"
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"hash"
	"io"
	"iter"
	"os"
	"strings"
	"time"

	"golang.org/x/mod/sumdb/note"

	"waybill.dev/projections"
	"waybill.dev/projections/audit"
	"waybill.dev/schemas"
)

// An exported session is a file of lines, each a JSON object with one member that
// says what it is:
//
//	{"waybill": …}     first: version, session, who made it, public keys
//	{"checkpoint": …}  signed, of a tree that has the events; absent where there is none yet
//	{"policy": …}      the contents of the bundles that decisions name, as they lie under their digest
//	{"event": …, "proof": …}  in the order of the log: the event, and its leaf with the way to the checkpoint
//	{"missing": …}     a leaf of the session whose event was not there
//	{"recorded": …}    up to which sequence the record has the log, and
//	{"row": …}         what it has of the session: only where it is asked for
//	{"error": …}       last, of the admin API alone: why it cannot go on
//	{"end": …}         last: how many events, and the SHA-256 of every byte before this line, signed by
//	                   the key of the checkpoints: what no proof shows is that no event was left out
//
// The admin API writes the same, so that there is one verification for what lies in
// a file and for what the gateway says.
const exportVersion = 1

type exportLine struct {
	Head       *exportHead            `json:"waybill,omitempty"`
	Checkpoint string                 `json:"checkpoint,omitempty"`
	Policy     *exportPolicy          `json:"policy,omitempty"`
	Event      json.RawMessage        `json:"event,omitempty"`
	Proof      *exportProof           `json:"proof,omitempty"`
	Missing    *exportProof           `json:"missing,omitempty"`
	Recorded   *uint64                `json:"recorded,omitempty"`
	Row        *projections.StoredRow `json:"row,omitempty"`
	Error      string                 `json:"error,omitempty"`
	End        *exportEnd             `json:"end,omitempty"`
}

type exportHead struct {
	Version  int                `json:"version"`
	Session  schemas.SessionKey `json:"session"`
	Tenant   schemas.Tenant     `json:"tenant"`
	From     string             `json:"from"` // stream or clickhouse
	Exported time.Time          `json:"exported"`
	Origin   string             `json:"origin"`             // of the checkpoints
	Keys     []string           `json:"keys"`               // public keys; a verifier should know them from elsewhere
	Redacted bool               `json:"redacted,omitempty"` // what was said is left out
	Rows     bool               `json:"rows,omitempty"`     // the record's rows are in it
}

type exportPolicy struct {
	SHA256 string `json:"sha256"`
	Source string `json:"source"`
}

// exportProof shows that an event is in the tree. Its leaf is Record; see
// audit.Proof.
type exportProof struct {
	Leaf   uint64   `json:"leaf"`
	Record string   `json:"record"`
	Path   []string `json:"path"`           // base64
	Salt   string   `json:"salt,omitempty"` // hex; absent where what was said is left out

	// Entry is the message as the log has it, where that does not follow from the event.
	Entry *audit.Entry `json:"message,omitempty"`
}

type exportEnd struct {
	Events int    `json:"events"`
	SHA256 string `json:"sha256"`
	Signed string `json:"signed,omitempty"` // a signed note of what text says
}

// text is what is signed. It is no checkpoint, whose second line is a number.
func (e exportEnd) text(of schemas.SessionKey) string {
	return fmt.Sprintf("waybill export\n%s\n%d\n%s\n", of, e.Events, e.SHA256)
}

// signed says what the signature is of and what it should be of: that nothing was
// left out is the word of who exported it.
func (e exportEnd) signed(of schemas.SessionKey, keys []string) (is, should string, err error) {
	should = e.text(of)
	if e.Signed == "" {
		return "signed by nobody", "whoever exports signs the whole of it: without, it cannot be told whether events were left out", nil
	}
	known, err := audit.Known(keys)
	if err != nil {
		return "", "", err
	}
	n, err := note.Open([]byte(e.Signed), known)
	if err != nil {
		return strings.TrimSpace(e.Signed), err.Error(), nil
	}
	return n.Text, should, nil
}

// Errors of files.
var (
	errNoExport  = errors.New("not an exported session")
	errTruncated = errors.New("it breaks off: lines are missing at its end")
	errAltered   = errors.New("it was altered after it was written")
)

// exportWriter writes lines and counts their digest.
type exportWriter struct {
	w      io.Writer
	digest hash.Hash
	events int
}

func newExportWriter(w io.Writer) *exportWriter { return &exportWriter{w: w, digest: sha256.New()} }

func (w *exportWriter) write(l exportLine) error {
	if l.Event != nil {
		w.events++
	}
	text, err := marshal(l)
	if err != nil {
		return err
	}
	text = append(text, '\n')
	w.digest.Write(text)
	_, err = w.w.Write(text)
	return err
}

// end writes the last line.
func (w *exportWriter) end(of schemas.SessionKey, keys []note.Signer) error {
	e := exportEnd{Events: w.events, SHA256: hex.EncodeToString(w.digest.Sum(nil))}
	text, err := note.Sign(&note.Note{Text: e.text(of)}, keys...)
	if err != nil {
		return fmt.Errorf("sign the export: %w", err)
	}
	e.Signed = string(text)
	return w.write(exportLine{End: &e})
}

// exportLines reads lines and holds them against the last of them. An error is the
// last that it yields: what came before it was there.
func exportLines(lines iter.Seq2[[]byte, error]) iter.Seq2[exportLine, error] {
	return func(yield func(exportLine, error) bool) {
		fail := func(err error) { yield(exportLine{}, err) }
		digest := sha256.New()
		n, events, ended := 0, 0, false
		for text, err := range lines {
			if err != nil {
				fail(err)
				return
			}
			n++
			whole := bytes.HasSuffix(text, []byte("\n"))
			var l exportLine
			switch err := json.Unmarshal(text, &l); {
			case ended:
				fail(fmt.Errorf("%w: there is more behind its end", errAltered))
				return
			case err != nil && n == 1, n == 1 && l.Head == nil:
				fail(errNoExport)
				return
			case !whole:
				fail(errTruncated)
				return
			case err != nil:
				fail(fmt.Errorf("%w: line %d: %w", errAltered, n, err))
				return
			case n == 1 && l.Head.Version != exportVersion:
				fail(fmt.Errorf("it is of version %d of exported sessions, this program reads %d: use a newer waybill", l.Head.Version, exportVersion))
				return
			case n == 1 && schemas.CheckToken(string(l.Head.Session)) != nil:
				fail(fmt.Errorf("%w: its session %.100q is none", errNoExport, l.Head.Session))
				return
			case l.Error != "":
				fail(fmt.Errorf("it breaks off: %s", visible(l.Error)))
				return
			case l.Proof != nil && l.Event == nil:
				fail(fmt.Errorf("%w: line %d has a proof and no event", errAltered, n))
				return
			case n > 1 && l.Head != nil:
				fail(fmt.Errorf("%w: line %d begins another session", errAltered, n))
				return
			}
			if l.Event != nil {
				events++
			}
			if l.End != nil {
				ended = true
				switch sum := hex.EncodeToString(digest.Sum(nil)); {
				case l.End.Events != events:
					fail(fmt.Errorf("%w: it had %d events and has %d", errAltered, l.End.Events, events))
					return
				case l.End.SHA256 != sum:
					fail(fmt.Errorf("%w: its SHA-256 was %s and is %s", errAltered, l.End.SHA256, sum))
					return
				}
			}
			digest.Write(text)
			if !yield(l, nil) {
				return
			}
		}
		switch {
		case n == 0:
			fail(errNoExport)
		case !ended:
			fail(errTruncated)
		}
	}
}

// fileLines are the lines of a file, with their ends.
func fileLines(name string) iter.Seq2[[]byte, error] {
	return func(yield func([]byte, error) bool) {
		f, err := os.Open(name)
		if err != nil {
			yield(nil, err)
			return
		}
		defer func() { _ = f.Close() }() // it is only read
		in := bufio.NewReaderSize(f, 256<<10)
		for {
			text, err := readLine(in)
			if err != nil && err != io.EOF {
				yield(nil, err)
				return
			}
			if len(text) == 0 || !yield(text, nil) || err == io.EOF {
				return
			}
		}
	}
}

// maxLine bounds a line of a file that somebody else may have written: a body of 4
// MiB takes at most six bytes for each of its own.
const maxLine = 64 << 20

var errLongLine = fmt.Errorf("a line of more than %d MiB", maxLine>>20)

// readLine reads a line with its end, which the last of all may lack: that comes with
// [io.EOF].
func readLine(in *bufio.Reader) ([]byte, error) {
	var line []byte
	for {
		piece, err := in.ReadSlice('\n')
		if len(line)+len(piece) > maxLine {
			return nil, errLongLine
		}
		if line = append(line, piece...); err != bufio.ErrBufferFull {
			return line, err
		}
	}
}

// exported reads a file; its errors name it.
func exported(name string) iter.Seq2[exportLine, error] {
	return func(yield func(exportLine, error) bool) {
		for l, err := range exportLines(fileLines(name)) {
			if err != nil {
				err = fmt.Errorf("%s: %w", name, err)
			}
			if !yield(l, err) || err != nil {
				return
			}
		}
	}
}

// exportedEvents are the events of a session in a file, "" for that of which it is,
// as lines of the events API.
func exportedEvents(name string, key schemas.SessionKey) iter.Seq2[json.RawMessage, error] {
	return func(yield func(json.RawMessage, error) bool) {
		found, of := false, schemas.SessionKey("")
		for l, err := range exported(name) {
			switch {
			case err != nil:
				yield(nil, err)
				return
			case l.Head != nil:
				of = l.Head.Session
				if key == "" {
					key = of
				}
			case l.Event != nil:
				var e struct{ Session schemas.SessionKey }
				if err := json.Unmarshal(l.Event, &e); err != nil {
					yield(nil, fmt.Errorf("%s: %w: %w", name, errAltered, err))
					return
				}
				if e.Session != key && (e.Session != "" || key != of) {
					continue
				}
				found = true
				if !yield(l.Event, nil) {
					return
				}
			}
		}
		if !found {
			yield(nil, fmt.Errorf("%s is of session %s and has nothing of %s", name, of, key))
		}
	}
}

// checkArchive holds the exported sessions in a file against their ends, and these
// against the keys, if there are any: of what is altered nothing may be made. A file
// has one session after the other, or events that nobody has signed.
func checkArchive(name string, keys []string) error {
	next, stop := iter.Pull2(fileLines(name))
	defer stop()
	for n := 1; ; n++ {
		text, err, ok := next()
		switch {
		case !ok:
			return nil
		case err != nil:
			return fmt.Errorf("%s: %w", name, err)
		case !bytes.HasPrefix(text, []byte(`{"waybill":`)):
			var l archiveLine
			if err := json.Unmarshal(text, &l); err == nil && l.Event != nil {
				return fmt.Errorf("%s: %w: line %d is of an exported session, whose beginning is not there", name, errAltered, n)
			}
			continue // who makes something of it says what is wrong with it
		}
		session := func(yield func([]byte, error) bool) {
			for ok && yield(text, err) && err == nil && !bytes.HasPrefix(text, []byte(`{"end":`)) {
				text, err, ok = next()
				n++
			}
		}
		var head exportHead
		for l, err := range exportLines(session) {
			is, should := "", ""
			switch {
			case err != nil:
			case l.Head != nil && l.Head.Redacted:
				err = errors.New("what was said is left out of it, and with that what rows are made of")
			case l.Head != nil:
				head = *l.Head
			case l.End != nil && len(keys) > 0:
				is, should, err = l.End.signed(head.Session, keys)
			}
			if err == nil && is != should {
				err = fmt.Errorf("%w: its end: %s: %s", errAltered, is, should)
			}
			if err != nil {
				return fmt.Errorf("%s: line %d: %w", name, n, err)
			}
		}
	}
}
