package cli

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"iter"
	"maps"
	"net/url"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/mod/sumdb/tlog"

	"waybill.dev/bus"
	"waybill.dev/projections"
	"waybill.dev/projections/audit"
	"waybill.dev/replay"
	"waybill.dev/schemas"
	"waybill.dev/workers/policy"
)

// verification is what came of a session that was made again.
type verification struct {
	Session  schemas.SessionKey `json:"session"`
	From     string             `json:"from"` // stream, clickhouse or the name of a file
	Verified bool               `json:"verified"`
	replay.Counts
	Leaves      int                 `json:"leaves"`             // as they were signed
	Size        uint64              `json:"size,omitempty"`     // of the signed tree
	Rows        int                 `json:"rows"`               // of the record that are as the events make them
	Policies    []string            `json:"policies,omitempty"` // under which decisions were made again
	Left        map[string]int      `json:"left,omitempty"`     // what could not be made again, and why
	Notes       []string            `json:"notes,omitempty"`
	Differences []replay.Difference `json:"differences"` // in the order of the log; the first 100
	More        int                 `json:"more,omitempty"`
}

// mostDifferences is how many are told.
const mostDifferences = 100

// verified is --verify.
func (r *replaying) verified(ctx context.Context, env Env) error {
	keys, err := r.trusted()
	if err != nil {
		return err
	}
	lines, err := r.exportOf(ctx, url.Values{"rows": {"1"}})
	if err != nil {
		return err
	}
	v, err := verifyExport(lines, keys, r.file())
	if err != nil {
		return err
	}
	v.From = r.from
	if r.session != "" && v.Session != r.session {
		return fmt.Errorf("%s is of session %s, not of %s", r.from, v.Session, r.session)
	}
	if r.json {
		err = env.printJSON(v)
	} else {
		err = v.print(env)
	}
	return cmp.Or(err, v.err())
}

// exportOf is the session as an exported file has it, from wherever it is read.
func (r *replaying) exportOf(ctx context.Context, q url.Values) (iter.Seq2[exportLine, error], error) {
	if r.file() {
		return exported(r.from), nil
	}
	c, err := r.connect()
	if err != nil {
		return nil, err
	}
	q.Set("from", r.from)
	return exportLines(rawLines(ctx, c, "/api/v1/sessions/"+string(r.session)+"/export", q)), nil
}

// keyFlag adds the flag for the public keys that are trusted.
func keyFlag(fs *flag.FlagSet, help string) *[]string {
	keys := new([]string)
	fs.Func("key", "public `KEY`, or a file of some, that is trusted"+help+"; may be repeated (default: "+auditPubFile+" in the data directory)", func(s string) error {
		*keys = append(*keys, s)
		return nil
	})
	return keys
}

// trustedKeys reads the keys that were given, or else those in the data directory.
func trustedKeys(given []string, data func() (string, error)) ([]string, error) {
	var all []string
	for _, k := range given {
		if _, err := audit.Known([]string{k}); err == nil {
			all = append(all, k)
			continue
		}
		some, err := publicKeys(k)
		if err == nil && len(some) == 0 {
			err = fmt.Errorf("%s: there is no key in it", k)
		}
		if err != nil {
			return nil, fmt.Errorf("--key: %w", err)
		}
		all = append(all, some...)
	}
	if len(given) > 0 {
		return all, nil
	}
	dir, err := data()
	if err != nil || dir == "" { // what lies beside a file is as foreign as the file
		return nil, err
	}
	return publicKeys(filepath.Join(dir, auditPubFile))
}

// trusted are the public keys by which --verify goes; none where it is a file and no
// gateway is known here.
func (r *replaying) trusted() ([]string, error) {
	return trustedKeys(r.keys, func() (string, error) {
		c, err := r.connect()
		if r.file() && err != nil {
			return "", nil
		}
		if err != nil {
			return "", err
		}
		return c.data, nil
	})
}

// err is the error of a session that is not as it was recorded.
func (v *verification) err() error {
	if len(v.Differences) == 0 {
		return nil
	}
	return fmt.Errorf("the session is not as it was recorded: %s", visible(v.Differences[0].String()))
}

func (v *verification) print(env Env) error {
	p := &printer{w: env.Stdout, color: env.Color}
	p.line("session       %s, from %s", v.Session, visible(v.From))
	p.line("events        %s of %s; %d have the id, the session and the cause that follow from what came before", count(v.Events, "event"), count(v.Calls, "call"), v.Causes)
	p.line("decisions     %d made again", v.Decisions)
	for _, digest := range v.Policies {
		p.line("              under policy %s", digest)
	}
	p.line("endings       %d made again; %d digests of what was said", v.Endings, v.Digests)
	if v.Size > 0 {
		p.line("leaves        %d of the signed tree of %d", v.Leaves, v.Size)
	}
	if v.Rows > 0 {
		p.line("rows          %d of the record", v.Rows)
	}
	for _, why := range slices.Sorted(maps.Keys(v.Left)) {
		p.line("not made      %d: %s", v.Left[why], visible(why))
	}
	for _, note := range v.Notes {
		p.line("note          %s", visible(note))
	}
	for _, d := range v.Differences {
		p.line("%s %s", p.paint(red, "✗"), visible(d.String()))
	}
	if v.More > 0 {
		p.line("%s and %d more", p.paint(red, "✗"), v.More)
	}
	if len(v.Differences) == 0 {
		text := "verified      everything is as it was recorded"
		if len(v.Left) > 0 {
			text += ", but for what is named above"
		}
		p.line("%s", text)
	}
	return p.err
}

// verifier makes a session again.
type verifier struct {
	v        verification
	head     exportHead
	keys     []string
	h        *replay.History
	sources  map[string]string // of policies
	bundles  map[string]*policy.Bundle
	c        audit.Checkpoint // zero: none that is signed by a key that is known
	rows     map[rowKey]map[string]string
	events   map[uint64]replay.Recorded // of which rows are looked for; without bodies
	erased   uint64
	why      string
	missing  []replay.Difference
	unproven []replay.Difference
	file     bool
	unsealed bool               // it is said already that the checkpoint is none
	seal     *replay.Difference // of the end
	first    schemas.Kind
	newest   map[schemas.SessionKey]uint64 // the sequence that came last
	oldest   uint64                        // of events, the lowest
	recorded uint64                        // up to where the record has come
}

type rowKey struct {
	table string
	seq   uint64
}

// verifyExport verifies what a file or the gateway says of a session. The keys are
// those that are trusted; without any, those in the lines are, which is noted. An
// error means that it could not be read. Of a file everything has to be proven.
func verifyExport(lines iter.Seq2[exportLine, error], keys []string, file bool) (*verification, error) {
	v := &verifier{
		keys: keys, file: file, sources: map[string]string{}, bundles: map[string]*policy.Bundle{},
		rows: map[rowKey]map[string]string{}, events: map[uint64]replay.Recorded{}, newest: map[schemas.SessionKey]uint64{},
	}
	for l, err := range lines {
		if errors.Is(err, errAltered) && len(v.v.Differences) > 0 {
			v.v.Notes = append(v.v.Notes, err.Error())
			break // what was altered is known
		}
		if err != nil {
			return nil, err
		}
		switch {
		case l.Head != nil:
			err = v.begin(*l.Head)
		case l.Checkpoint != "":
			v.checkpoint(l.Checkpoint)
		case l.Policy != nil:
			v.sources[l.Policy.SHA256] = l.Policy.Source
		case l.Event != nil:
			err = v.event(l.Event, l.Proof)
		case l.Missing != nil:
			v.lost(l.Missing)
		case l.Recorded != nil:
			v.recorded = max(v.recorded, *l.Recorded)
		case l.Row != nil:
			v.row(*l.Row)
		case l.End != nil:
			err = v.sealed(*l.End)
		}
		if err != nil {
			return nil, err
		}
	}
	v.end()
	return &v.v, nil
}

func (v *verifier) add(all ...replay.Difference) {
	for _, d := range all {
		if len(v.v.Differences) < mostDifferences {
			v.v.Differences = append(v.v.Differences, d)
		} else {
			v.v.More++
		}
	}
}

func (v *verifier) begin(h exportHead) error {
	v.head = h
	v.v.Session, v.v.From, v.v.Differences = h.Session, h.From, []replay.Difference{}
	v.h = replay.New(h.Session, v.decide)
	v.v.Left = v.h.Left
	if len(v.keys) == 0 {
		v.keys = h.Keys
		v.v.Notes = append(v.v.Notes, "the public keys are the file's own word: name the one that you know with --key")
	}
	return nil
}

func (v *verifier) checkpoint(text string) {
	known, err := audit.Known(v.keys)
	var c audit.Checkpoint
	if err == nil {
		c, err = audit.OpenCheckpoint(text, known)
	}
	if err != nil {
		v.unsealed = true
		v.add(replay.Difference{Field: "checkpoint", Recorded: strings.TrimSpace(text), Recomputed: err.Error()})
		return
	}
	v.c, v.v.Size = c, c.Size
}

// sealed holds the end against its signature.
func (v *verifier) sealed(e exportEnd) error {
	recorded, recomputed, err := e.signed(v.head.Session, v.keys)
	if recorded != recomputed {
		v.seal = &replay.Difference{Field: "end", Recorded: recorded, Recomputed: recomputed}
	}
	return err
}

// decide makes a decision again, under the policy that it names.
func (v *verifier) decide(request, was schemas.Event) (schemas.Event, error) {
	digest := schemas.DecisionOf(was.Data).PolicySHA256
	b := v.bundles[digest]
	if b == nil && digest != "" {
		source, ok := v.sources[digest]
		if !ok {
			return schemas.Event{}, fmt.Errorf("there is no policy %s", digest)
		}
		if sum := sha256.Sum256([]byte(source)); hex.EncodeToString(sum[:]) != digest {
			return schemas.Event{}, fmt.Errorf("what passes for policy %s has the SHA-256 %x", digest, sum)
		}
		var err error
		if b, err = policy.Compile([]byte(source)); err != nil {
			return schemas.Event{}, fmt.Errorf("%w: their policy is not one of this program: %w", replay.ErrCannot, err)
		}
		v.bundles[digest] = b
		v.v.Policies = append(v.v.Policies, digest)
	}
	if b == nil {
		b = &policy.Bundle{}
	}
	return b.Again(request, was)
}

// What is said of what is cut or gone.
const (
	cutRedacted = "what was said is left out of this file"
	leftUnproof = "events that no signed tree has yet"
	leftRows    = "events that the record does not have yet"
	leftSalt    = "digests of what was said, without the salt that they are made with"
	leftOdd     = "messages that this program cannot read"
)

func (v *verifier) event(line json.RawMessage, p *exportProof) error {
	var id struct {
		ID  schemas.EventID
		Seq uint64
		Odd string `json:"undecodable"`
	}
	if err := json.Unmarshal(line, &id); err != nil {
		return err
	}
	r := record{}
	wrong := new(schemas.WrongID) // it can be read all the same
	if err := r.UnmarshalJSON(line); err != nil && !errors.As(err, &wrong) {
		of := replay.Recorded{ID: id.ID}
		of.Seq = id.Seq
		v.odd(of, err.Error(), p)
		return nil
	}
	of := replay.Recorded{Event: r.Event, ID: id.ID, Gone: r.Gone}
	if r.Undecodable != "" {
		of.Seq = r.Seq
		v.odd(of, r.Undecodable, p)
		return nil
	}
	if v.head.Redacted {
		of.Cut, of.Gone = cutRedacted, r.Gone
	}
	if e, ok := of.Data.(*schemas.Erased); ok && of.Session == v.head.Session {
		v.erased, v.why = of.Seq, e.Reason
	}
	if v.first == "" && of.Session == v.head.Session {
		v.first = of.Kind()
	}
	if last := v.newest[of.Session]; of.Seq <= last && v.head.From == fromStream { // the record may have two logs of a session
		v.add(replay.Difference{Seq: of.Seq, ID: of.ID, Field: "seq", Recorded: fmt.Sprintf("%d behind %d", of.Seq, last), Recomputed: "each once, in the order of the log"})
	}
	v.newest[of.Session] = of.Seq
	v.add(v.h.Check(of)...)
	v.add(v.leaf(of, p)...)
	if v.head.Rows && of.Session == v.head.Session {
		v.expect(of)
	}
	return nil
}

// odd is a message that is no event that this program can read. It may be proven
// all the same.
func (v *verifier) odd(of replay.Recorded, what string, p *exportProof) {
	v.h.Unreadable()
	v.h.Counts.Events++
	before := len(v.v.Differences)
	v.add(v.leaf(of, p)...)
	switch {
	case p != nil && p.Entry != nil && len(v.v.Differences) == before:
		v.h.Left[leftOdd]++
		v.v.Notes = append(v.v.Notes, fmt.Sprintf("event %d: %s", of.Seq, what))
	case p == nil:
		v.h.Left[leftOdd]++
		v.v.Notes = append(v.v.Notes, fmt.Sprintf("event %d: %s", of.Seq, what))
	case len(v.v.Differences) == before:
		l, err := audit.ReadRecord([]byte(p.Record))
		e, ok := l.Opened()
		if err != nil || !ok {
			v.h.Left[leftOdd]++
			break
		}
		of.ID = e.ID()
		v.add(replay.Difference{Seq: of.Seq, ID: of.ID, Field: "event", Recorded: "one that was read when it was signed", Recomputed: what})
	}
}

// leaf holds an event against its leaf, and that against the signed tree.
func (v *verifier) leaf(of replay.Recorded, p *exportProof) []replay.Difference {
	differs := func(field, recorded, recomputed string) []replay.Difference {
		return []replay.Difference{{Seq: of.Seq, ID: of.ID, Field: field, Recorded: recorded, Recomputed: recomputed}}
	}
	if p == nil {
		v.unproven = append(v.unproven, differs("proof", "none", "it is in no signed tree")...)
		return nil
	}
	if v.c.Text == "" {
		return nil // said of the checkpoint
	}
	// What the tree has of the log is the log's beginning.
	v.unproven = slices.DeleteFunc(v.unproven, func(d replay.Difference) bool {
		if d.Seq < of.Seq {
			v.add(d)
		}
		return d.Seq < of.Seq
	})
	l, err := v.proven(p)
	if err != nil {
		return differs("leaf", fmt.Sprintf("leaf %d of the tree of %d", p.Leaf, v.v.Size), err.Error())
	}
	if l.Stream != audit.Events || l.Seq != of.Seq {
		return differs("seq", fmt.Sprintf("%s %d", l.Stream, l.Seq), fmt.Sprintf("%s %d", audit.Events, of.Seq))
	}
	salt, err := hex.DecodeString(p.Salt)
	if err != nil {
		return differs("salt", "a hexadecimal number", err.Error())
	}
	var entry audit.Entry
	bare := p.Entry == nil // its headers are those that follow from it
	switch {
	case p.Entry != nil:
		entry = *p.Entry
		if of.Data != nil {
			entry.Body = of.Body
		}
		decodeEntry(&entry)
		if of.Data != nil && (entry.Event.Data == nil || !sameEvent(entry.Event, of.Event)) {
			return differs("message", "the event as it is here", "another in the message's headers")
		}
	case of.Data == nil:
		return nil // of a message that was no event its sequence alone is known here
	default:
		m, err := bus.Stored(of.Event)
		if err != nil {
			return differs("event", "one that the log takes", err.Error())
		}
		entry = audit.Entry(m)
	}
	made, err := audit.ReadRecord(audit.Record(entry, salt))
	if err != nil {
		return differs("leaf", "one of this version", err.Error())
	}
	if of.Cut != "" || of.Gone > 0 {
		made.Size = of.Gone
	}
	var all []replay.Difference
	compare := func(field string, recorded, recomputed any) {
		all = append(all, replay.Compare(of, field, recorded, recomputed)...)
	}
	compare("subject", l.Subject, made.Subject)
	compare("stored", l.Stored.UTC(), made.Stored.UTC())
	compare("", l.Event, made.Event)
	compare("size of the body", l.Size, made.Size)
	if p.Salt == "" && !v.head.Redacted {
		v.h.Left[leftSalt]++
	}
	if p.Salt != "" && of.Gone == 0 {
		compare("salted digest of the body", l.Body, made.Body)
	}
	erased := of.Data != nil && of.Kind() == schemas.KindErased && bare && v.head.From == fromRecord // stored with headers of its own
	if p.Salt != "" && !erased {
		compare("salted digest of the headers", l.Head, made.Head)
	}
	if len(all) == 0 {
		v.v.Leaves++
	}
	return all
}

// proven is the leaf that a proof proves.
func (v *verifier) proven(p *exportProof) (audit.Leaf, error) {
	path := make(tlog.RecordProof, len(p.Path))
	for i, text := range p.Path {
		var err error
		if path[i], err = tlog.ParseHash(text); err != nil {
			return audit.Leaf{}, fmt.Errorf("hash %d of its path: %w", i, err)
		}
	}
	if err := tlog.CheckRecord(path, int64(v.c.Size), v.c.Root, int64(p.Leaf), tlog.RecordHash([]byte(p.Record))); err != nil {
		return audit.Leaf{}, fmt.Errorf("it is not in the signed tree: %w", err)
	}
	return audit.ReadRecord([]byte(p.Record))
}

// lost is a leaf without its event.
func (v *verifier) lost(p *exportProof) {
	if v.c.Text == "" {
		return // said of the checkpoint
	}
	l, err := v.proven(p)
	if err != nil {
		v.add(replay.Difference{Field: "leaf", Recorded: fmt.Sprintf("leaf %d", p.Leaf), Recomputed: err.Error()})
		return
	}
	d := replay.Difference{Seq: l.Seq, Field: "event", Recorded: "it was signed", Recomputed: "it is not there"}
	if e, ok := l.Opened(); ok {
		d.ID = e.ID()
	}
	v.missing = append(v.missing, d)
}

// expect keeps an event for the rows that come behind the events.
func (v *verifier) expect(of replay.Recorded) {
	for _, row := range projections.RowsOf(of.Event) {
		v.rows[rowKey{row.Table, row.Seq}] = inShort(row.Values)
	}
	of.Body = nil
	if v.events[of.Seq] = of; v.oldest == 0 || of.Seq < v.oldest {
		v.oldest = of.Seq
	}
}

// inShort keeps of long values their digest.
func inShort(values map[string]string) map[string]string {
	for name, s := range values {
		if len(s) > 512 {
			values[name] = fmt.Sprintf("%d bytes of SHA-256 %x", len(s), sha256.Sum256([]byte(s)))
		}
	}
	return values
}

// row holds a row of the record against the one that its event makes.
func (v *verifier) row(r projections.StoredRow) {
	if r.Table == "events_v1" {
		v.recorded = max(v.recorded, r.Seq)
	}
	of, known := v.events[r.Seq]
	key := rowKey{r.Table, r.Seq}
	want, ok := v.rows[key]
	if !known || !ok {
		if v.erased > r.Seq || len(v.events) == 0 || r.Seq < v.oldest {
			return // of what is not there any more, which is said
		}
		v.add(replay.Difference{Seq: r.Seq, ID: of.ID, Field: r.Table, Recorded: "a row", Recomputed: "no event makes it"})
		return
	}
	delete(v.rows, key)
	have := inShort(r.Values)
	if of.Gone > 0 {
		for _, name := range []string{"body", "body_size", "body_sha256", "answer_bytes"} {
			delete(have, name)
			delete(want, name)
		}
	}
	d := replay.Compare(of, r.Table, have, want)
	if len(d) == 0 {
		v.v.Rows++
	}
	v.add(d...)
}

// end settles what is missing, and puts everything in the order of the log.
func (v *verifier) end() {
	erased := 0
	for _, d := range v.missing {
		if d.Seq < v.erased {
			erased++
		} else {
			v.add(d)
		}
	}
	if v.head.Rows {
		late := map[uint64]bool{}
		for key := range v.rows {
			of := v.events[key.seq]
			switch {
			case key.seq > v.recorded:
				late[key.seq] = true
			case projections.FirstOnly(key.table) && of.Kind() != schemas.KindRequested && v.h.Counts.Repeated > 0:
				// The engine keeps the first of two.
			default:
				v.add(replay.Difference{Seq: key.seq, ID: of.ID, Field: key.table, Recorded: "no row", Recomputed: "a row"})
			}
		}
		if len(late) > 0 {
			v.h.Left[leftRows] = len(late)
		}
	}
	if v.c.Text == "" && !v.unsealed {
		v.add(replay.Difference{Field: "checkpoint", Recorded: "none", Recomputed: "the tree is signed within seconds: nothing proves what this says"})
	}
	switch {
	case v.file:
		v.add(v.unproven...)
	case len(v.unproven) > 0:
		v.h.Left[leftUnproof] = len(v.unproven)
	}
	switch {
	case v.erased > 0:
		text := fmt.Sprintf("what was said before event %d was erased", v.erased)
		if v.why != "" {
			text += " (" + v.why + ")"
		}
		if erased > 0 {
			text += fmt.Sprintf("; %d leaves of it are in the tree", erased)
		}
		v.v.Notes = append(v.v.Notes, text)
	case v.first != "" && v.first != schemas.KindOpened:
		v.v.Notes = append(v.v.Notes, halfAged(v.head.From))
	}
	v.v.Counts = v.h.Counts
	slices.SortStableFunc(v.v.Differences, func(a, b replay.Difference) int { return cmp.Compare(a.Seq, b.Seq) })
	if v.seal != nil { // the last line is the last thing that is wrong
		v.add(*v.seal)
	}
	v.v.Verified = len(v.v.Differences) == 0
}

// halfAged is said of a session that does not begin with its beginning.
func halfAged(from string) string {
	text := "the beginning of the session is not there any more"
	if from == fromStream {
		text += " in the log, which keeps events for its time only: --from clickhouse has what the record keeps"
	}
	return text
}
