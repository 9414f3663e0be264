package cli

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"iter"
	"net/http"
	"net/url"
	"os"
	"strings"
	"time"

	"waybill.dev/bus"
	"waybill.dev/projections"
	"waybill.dev/projections/audit"
	"waybill.dev/schemas"
)

// rebuildLine is a line of the answer to a rebuild: progress, then each table; at
// last done or an error, with the gaps if it is about these.
type rebuildLine struct {
	Read  uint64               `json:"read,omitempty"` // events, of
	Of    uint64               `json:"of,omitempty"`
	Table *projections.Rebuilt `json:"table,omitempty"`
	Gaps  []projections.Gap    `json:"gaps,omitempty"`
	Error string               `json:"error,omitempty"`
	Done  bool                 `json:"done,omitempty"`
}

// archiveLine is a line of an archive: an event, as the events API or an exported
// file has it; other lines of such a file are passed over.
type archiveLine struct {
	Event json.RawMessage `json:"event"`
	Kind  schemas.Kind    `json:"kind"`
	Gone  int             `json:"body_gone"`
}

// rebuild makes the derived tables anew. What is sent is an archive, if anything.
func (a *admin) rebuild(w http.ResponseWriter, r *http.Request) {
	q := r.URL.Query()
	if a.g.record == nil {
		http.Error(w, "this process does not write the record: ask the one that has the role project; "+noRecord, http.StatusNotFound)
		return
	}
	o := projections.RebuildOptions{AcceptGaps: q.Get("gaps") == "accept", DryRun: q.Get("dry") != ""}
	rc := http.NewResponseController(w)
	if q.Get("archive") != "" {
		// Progress is told while the archive is still coming.
		if err := rc.EnableFullDuplex(); err != nil {
			a.fail(w, err)
			return
		}
		o.Archive = archived(bufio.NewReaderSize(patientReader{r.Body, rc}, 64<<10))
	}
	if l, of, _, err := a.auditReader(r.Context()); err == nil {
		defer l.Close()
		o.Erased = erasedBy(of)
	} else {
		a.g.log.Warn("rebuild: the audit cannot say what was erased", "error", err)
	}
	w.Header().Set("Content-Type", "application/x-ndjson")
	out := json.NewEncoder(w)
	say := func(l rebuildLine) {
		_ = out.Encode(l) // who left is found out by the rebuild's context
		_ = rc.Flush()
	}
	last := time.Now()
	o.Progress = func(done, of uint64) {
		if time.Since(last) > 500*time.Millisecond {
			last = time.Now()
			say(rebuildLine{Read: done, Of: of})
		}
	}
	tables, err := a.g.record.Rebuild(r.Context(), o)
	for i := range tables {
		say(rebuildLine{Table: &tables[i]})
	}
	gaps := new(projections.GapsError)
	switch {
	case errors.As(err, &gaps):
		say(rebuildLine{Error: err.Error(), Gaps: gaps.Gaps})
	case err != nil:
		say(rebuildLine{Error: err.Error()})
	default:
		say(rebuildLine{Done: true}) // without it the answer is not whole
	}
}

// patientReader gives who sends an archive a time for each piece of it.
type patientReader struct {
	io.Reader
	rc *http.ResponseController
}

// Read reads a piece.
func (p patientReader) Read(b []byte) (int, error) {
	_ = p.rc.SetReadDeadline(time.Now().Add(patience)) // it fails on a closed connection only
	return p.Reader.Read(b)
}

// archived are the events in the lines of an archive.
func archived(in *bufio.Reader) iter.Seq2[schemas.Event, error] {
	return func(yield func(schemas.Event, error) bool) {
		for n := 1; ; n++ {
			line, err := readLine(in)
			if err == io.EOF && len(line) == 0 {
				return
			}
			var l archiveLine
			if len(bytes.TrimSpace(line)) == 0 && err == nil {
				continue
			}
			if err == nil || err == io.EOF {
				err = json.Unmarshal(line, &l)
			}
			text := l.Event
			if l.Kind != "" {
				text = line
			}
			var e schemas.Event
			if err == nil && text == nil {
				continue
			}
			if err == nil {
				if l.Kind == "" { // what an exported file has may say it inside
					_ = json.Unmarshal(text, &l)
				}
				err = e.UnmarshalJSON(text)
			}
			if err != nil {
				yield(e, fmt.Errorf("line %d: %w", n, err))
				return
			}
			if l.Gone > 0 {
				err = &projections.BodyGone{Size: l.Gone}
			}
			if !yield(e, err) {
				return
			}
		}
	}
}

// erasedBy tells by the audit's leaves, which stay, of which session an event was.
func erasedBy(of *bus.Audit) func(context.Context, uint64, map[schemas.SessionKey]bool) (bool, error) {
	return func(ctx context.Context, seq uint64, sessions map[schemas.SessionKey]bool) (bool, error) {
		n, err := of.Find(ctx, audit.Events, seq)
		if errors.Is(err, schemas.ErrNotFound) {
			return false, nil
		}
		if err != nil {
			return false, err
		}
		rec, err := of.Record(ctx, n)
		if errors.Is(err, schemas.ErrNotFound) {
			return false, nil
		}
		if err != nil {
			return false, err
		}
		record, err := audit.CutRecord(rec.Payload)
		if err != nil {
			return false, err
		}
		leaf, err := audit.ReadRecord(record)
		if err != nil {
			return false, err
		}
		token := strings.Split(leaf.Subject, ".")
		return leaf.Seq == seq && len(token) > 2 && sessions[schemas.SessionKey(token[2])], nil
	}
}

// rebuildCommand is `waybill rebuild`.
func rebuildCommand(ctx context.Context, env Env, args []string) error {
	fs := flag.NewFlagSet("rebuild", flag.ContinueOnError)
	connect := clientFlags(fs)
	var files []string
	fs.Func("from", "an archive, `FILE`, that rows are made of as far as it goes: what `waybill export` wrote, or lines of events; may be repeated (default: events_v1 alone)", func(s string) error {
		files = append(files, s)
		return nil
	})
	gaps := fs.Bool("accept-gaps", false, "go on where sequences are missing in the source; what the tables have of these is taken over")
	dry := fs.Bool("dry-run", false, "make the tables and print their states, but leave those in use")
	asJSON := fs.Bool("json", false, "print JSON, one table per line")
	if err := none(parse(env, fs, args)); err != nil {
		return err
	}
	c, err := connect(env)
	if err != nil {
		return err
	}
	q := url.Values{}
	if *gaps {
		q.Set("gaps", "accept")
	}
	if *dry {
		q.Set("dry", "1")
	}
	var body io.Reader
	if len(files) > 0 {
		keys, err := trustedKeys(nil, func() (string, error) { return c.data, nil })
		if err != nil {
			return err
		}
		for _, f := range files {
			if err := checkArchive(f, keys); err != nil {
				return fmt.Errorf("--from: %w", err)
			}
		}
		q.Set("archive", "1")
		body = &oneByOne{files: files}
	}
	done, differ, shown := false, 0, false
	for line, err := range c.exchange(ctx, http.MethodPost, "/api/v1/rebuild?"+q.Encode(), body) {
		var l rebuildLine
		if err == nil {
			err = json.Unmarshal(line, &l)
		}
		if shown && (err != nil || l.Of == 0) {
			_, _ = fmt.Fprint(env.Stderr, "\r\x1b[K")
			shown = false
		}
		switch {
		case err != nil:
			return err
		case l.Error != "":
			return errors.New(visible(l.Error))
		case l.Done:
			done = true
		case l.Table != nil:
			if l.Table.State != l.Table.Live {
				differ++
			}
			if err := printRebuilt(env, *l.Table, *asJSON); err != nil {
				return err
			}
		case l.Of > 0 && env.Terminal:
			shown = true
			_, _ = fmt.Fprintf(env.Stderr, "\r%d of %d events read\x1b[K", l.Read, l.Of)
		}
	}
	switch {
	case !done:
		return errors.New("the gateway's answer broke off: the tables in use are whole, old or new")
	case differ > 0 && *dry:
		return fmt.Errorf("%s would differ from those in use", count(differ, "table"))
	}
	return nil
}

func printRebuilt(env Env, t projections.Rebuilt, asJSON bool) error {
	if asJSON {
		return env.printJSON(t)
	}
	text := "equal to what was in use"
	if t.State != t.Live {
		text = "not what was in use, which was " + t.Live
	}
	if t.Taken > 0 {
		text += fmt.Sprintf("; %s taken over", count(int(t.Taken), "row"))
	}
	if !t.Swap {
		text += "; not exchanged"
	}
	_, err := fmt.Fprintf(env.Stdout, "%-12s %10d rows  state %s, %s\n", t.Table, t.Rows, t.State, text)
	return err
}

// oneByOne reads files one after the other, each opened when it is its turn.
type oneByOne struct {
	files []string
	now   *os.File
}

// Read reads on.
func (o *oneByOne) Read(b []byte) (int, error) {
	for {
		if o.now == nil {
			if len(o.files) == 0 {
				return 0, io.EOF
			}
			f, err := os.Open(o.files[0])
			if err != nil {
				return 0, err
			}
			o.now, o.files = f, o.files[1:]
		}
		n, err := o.now.Read(b)
		if err == io.EOF {
			_ = o.now.Close() // it was only read
			o.now, err = nil, nil
			if n < len(b) { // its last line may have no end
				b[n] = '\n'
				n++
			}
		}
		if n > 0 || err != nil {
			return n, err
		}
	}
}
