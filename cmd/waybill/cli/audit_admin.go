package cli

import (
	"bufio"
	"cmp"
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"strconv"
	"strings"
	"time"

	jsonv2 "github.com/go-json-experiment/json"

	"waybill.dev/bus"
	"waybill.dev/projections"
	"waybill.dev/projections/audit"
	"waybill.dev/schemas"
)

// auditReader opens the audit for one request: a connection of the role that may
// read salts, which nobody else may.
func (a *admin) auditReader(ctx context.Context) (*bus.Log, *bus.Audit, audit.Keys, error) {
	l, err := bus.Open(ctx, a.g.options(bus.RoleAudit))
	if err != nil {
		return nil, nil, audit.Keys{}, err
	}
	keys, _, err := a.g.auditKeys(ctx, l)
	var of *bus.Audit
	if err == nil {
		of, err = l.Audit(ctx)
	}
	if err != nil {
		l.Close()
		return nil, nil, audit.Keys{}, err
	}
	return l, of, keys, nil
}

// auditLines writes what `waybill audit verify` reads.
func (a *admin) auditLines(w http.ResponseWriter, r *http.Request) {
	l, of, keys, err := a.auditReader(r.Context())
	if err != nil {
		a.fail(w, err)
		return
	}
	defer l.Close()
	buffered := bufio.NewWriterSize(w, 256<<10)
	begun := false
	for line, err := range everyAuditLine(r.Context(), of, keys.Verifiers, a.auditRows(l)) {
		if err != nil && !begun {
			a.fail(w, err)
			return
		}
		if !begun {
			begun = true
			w.Header().Set("Content-Type", "application/x-ndjson")
		}
		if err == nil {
			err = jsonv2.MarshalWrite(buffered, &line)
		}
		if err == nil {
			err = buffered.WriteByte('\n')
		}
		if err != nil {
			a.g.log.Error("admin API: the audit's lines", "error", err)
			panic(http.ErrAbortHandler) // they have no end, and must not look whole
		}
	}
	_ = buffered.Flush() // the client left
}

// auditRows are the record's rows, where this process knows the record.
func (a *admin) auditRows(l *bus.Log) rowsOf {
	if a.g.server == nil {
		return nil
	}
	return func(ctx context.Context) (projections.Rows, uint64, error) {
		identity, err := l.Identity(ctx)
		if err != nil {
			return projections.Rows{}, 0, err
		}
		// What the record has acknowledged it has, or has lost.
		floor, err := l.Floor(ctx, consumer)
		if err != nil {
			return projections.Rows{}, 0, err
		}
		r, err := projections.OpenRows(ctx, a.g.server, identity)
		r.Last = max(r.Last, floor)
		return r, floor, err
	}
}

// auditState is the answer about the newest checkpoint.
type auditState struct {
	Checkpoint string         `json:"checkpoint"`         // "" for none
	Cosigned   string         `json:"cosigned,omitempty"` // the newest that witnesses have signed too
	Keys       []string       `json:"keys"`
	Leaves     uint64         `json:"leaves"`
	At         audit.Position `json:"at"` // the last messages that have leaves
}

func (a *admin) auditCheckpoint(w http.ResponseWriter, r *http.Request) {
	l, of, keys, err := a.auditReader(r.Context())
	if err != nil {
		a.fail(w, err)
		return
	}
	defer l.Close()
	s := auditState{Keys: keys.Verifiers}
	var at string
	if s.Leaves, at, err = of.Head(r.Context()); err == nil {
		var signed string
		if s.Checkpoint, signed, err = of.Checkpoint(r.Context()); err == nil {
			s.At, err = audit.ParsePosition(cmp.Or(at, signed))
		}
	}
	if err == nil {
		s.Cosigned, err = of.Cosigned(r.Context())
	}
	if err != nil {
		a.fail(w, err)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(s) // the client left
}

// auditProof proves that a message is in the log.
func (a *admin) auditProof(w http.ResponseWriter, r *http.Request) {
	stream, seq, ok := place(r.URL.Query().Get("event"))
	if !ok {
		http.Error(w, "event: not the sequence of an event, or SYSTEM/SEQUENCE", http.StatusBadRequest)
		return
	}
	l, of, keys, err := a.auditReader(r.Context())
	if err != nil {
		a.fail(w, err)
		return
	}
	defer l.Close()
	p, err := prove(r.Context(), of, keys, stream, seq)
	switch {
	case errors.Is(err, schemas.ErrNotFound):
		http.Error(w, fmt.Sprintf("%s %d has no leaf in a signed tree: it is not there (any more), or was stored a moment ago", stream, seq), http.StatusNotFound)
		return
	case err != nil:
		a.fail(w, err)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	out := json.NewEncoder(w)
	out.SetEscapeHTML(false)
	_ = out.Encode(p) // the client left
}

func prove(ctx context.Context, of *bus.Audit, keys audit.Keys, stream string, seq uint64) (audit.Proof, error) {
	number, err := of.Find(ctx, stream, seq)
	if err != nil {
		return audit.Proof{}, err
	}
	r, err := of.Record(ctx, number)
	if err != nil {
		return audit.Proof{}, err
	}
	record, err := audit.CutRecord(r.Payload)
	if err != nil {
		return audit.Proof{}, err
	}
	// Of a message whose leaf the feed has no more, the first leaf that there is was found.
	l, err := audit.ReadRecord(record)
	if err != nil {
		return audit.Proof{}, err
	}
	if !l.Of(stream, seq) {
		return audit.Proof{}, schemas.ErrNotFound
	}
	known, err := audit.Known(keys.Verifiers)
	if err != nil {
		return audit.Proof{}, err
	}
	for range 3 { // the right edge may be replaced while it is read
		var text string
		if text, _, err = of.Checkpoint(ctx); err != nil {
			return audit.Proof{}, err
		}
		if text == "" {
			return audit.Proof{}, schemas.ErrNotFound
		}
		var c audit.Checkpoint
		if c, err = audit.OpenCheckpoint(text, known); err != nil {
			return audit.Proof{}, err
		}
		if c.Size <= number {
			return audit.Proof{}, schemas.ErrNotFound
		}
		var p audit.Proof
		if p, err = proveAt(ctx, of, keys, c, number, record, l); err == nil {
			return p, nil
		}
	}
	// Not as the cause: a tile that is missing is not a leaf that is missing.
	return audit.Proof{}, fmt.Errorf("leaf %d: %v", number, err)
}

func proveAt(ctx context.Context, of *bus.Audit, keys audit.Keys, c audit.Checkpoint, number uint64, record []byte, l audit.Leaf) (audit.Proof, error) {
	var entry *audit.Entry
	var salt []byte
	m, err := of.Message(ctx, l.Stream, l.Seq)
	switch {
	case l.To != 0: // nothing was there
	case err == nil:
		e := audit.Entry(m)
		entry = &e
		salts := saltReader{a: of, secrets: map[string][]byte{}}
		if salt, err = salts.of(ctx, entry, nil); err != nil {
			return audit.Proof{}, err
		}
	case !errors.Is(err, schemas.ErrNotFound):
		return audit.Proof{}, err
	}
	return audit.Prove(c, keys.Verifiers, number, record, entry, salt, hashesOf(ctx, of, c))
}

// auditFeed follows the audit's feed.
func (a *admin) auditFeed(w http.ResponseWriter, r *http.Request) {
	subject := []string{"audit", "*", "*", "*"}
	for i, name := range []string{"tenant", "agent", "kind"} {
		if s := r.URL.Query().Get(name); s != "" {
			if err := schemas.CheckToken(s); err != nil {
				http.Error(w, name+": "+err.Error(), http.StatusBadRequest)
				return
			}
			subject[i+1] = s
		}
	}
	l, of, _, err := a.auditReader(r.Context())
	if err != nil {
		a.fail(w, err)
		return
	}
	defer l.Close()
	heard, err := of.Follow(r.Context(), strings.Join(subject, "."))
	if err != nil {
		a.fail(w, err)
		return
	}
	rc := http.NewResponseController(w)
	w.Header().Set("Content-Type", "application/x-ndjson")
	w.WriteHeader(http.StatusOK)
	_ = rc.Flush()
	for rec, err := range heard {
		if err != nil {
			panic(http.ErrAbortHandler)
		}
		if _, err := w.Write(append(rec.Payload, '\n')); err != nil || rc.Flush() != nil {
			return
		}
	}
}

// erasure is the answer to an erasure.
type erasure struct {
	Session schemas.SessionKey `json:"session"`
	Tenant  schemas.Tenant     `json:"tenant"`
	Seq     uint64             `json:"seq"`  // of the event that says so
	Leaf    uint64             `json:"leaf"` // that proves it
	Events  int                `json:"events"`
}

// erase stores that a session is to be erased, and waits until it is: until a
// checkpoint covers the event, which is signed afterwards.
func (a *admin) erase(w http.ResponseWriter, r *http.Request) {
	key := schemas.SessionKey(r.PathValue("session"))
	if schemas.CheckToken(string(key)) != nil {
		http.Error(w, "not a session's key", http.StatusBadRequest)
		return
	}
	reason := r.URL.Query().Get("reason")
	if len(reason) > 500 {
		http.Error(w, "reason: longer than 500 bytes", http.StatusBadRequest)
		return
	}
	ctx, cancel := context.WithTimeout(r.Context(), eraseWithin)
	defer cancel()
	// What is erased in the middle of a call would leave it without an ending.
	var first schemas.Event
	last := uint64(0)
	open := map[schemas.CallID]time.Time{}
	events := 0
	for e, err := range a.l.Read(ctx, bus.Filter{Session: key}, 0) {
		last = max(last, e.Seq)
		if errors.Is(err, bus.ErrUndecodable) {
			events++
			continue
		}
		if err != nil {
			a.fail(w, err)
			return
		}
		if first.Data == nil {
			first = e
		}
		switch d := e.Data.(type) {
		case *schemas.Erased:
			continue
		case *schemas.Requested:
			open[e.Call] = maxTime(d.Deadline, d.TaskUntil)
		case *schemas.Tasked:
			open[e.Call] = maxTime(open[e.Call], d.Until)
		}
		events++
		if e.Kind().Ends() {
			delete(open, e.Call)
		}
	}
	for call, until := range open {
		if until.IsZero() || time.Now().Before(until.Add(eraseGrace)) {
			http.Error(w, fmt.Sprintf("call %s of the session is still open: try again when it has ended", call), http.StatusConflict)
			return
		}
	}
	l, of, keys, err := a.auditReader(ctx)
	if err != nil {
		a.fail(w, err)
		return
	}
	defer l.Close()
	old, err := a.outlived(ctx, of, key, first.Data != nil)
	if err != nil {
		a.fail(w, err)
		return
	}
	if first.Data == nil {
		first.Tenant, first.Agent = old.tenant, old.agent
	}
	if first.Tenant == "" {
		http.Error(w, "no session "+strconv.Quote(string(key))+" in the log, in the record or in the audit's feed; `waybill sessions` lists them", http.StatusNotFound)
		return
	}
	events = max(events, old.events)
	e := schemas.Event{
		Tenant: first.Tenant, Session: key, Agent: first.Agent,
		Data: &schemas.Erased{ID: strings.ToLower(rand.Text()[:16]), Reason: reason},
	}
	// Nothing may have come since: it could be a call that is open now.
	receipt, err := l.PublishLast(ctx, e, last)
	if errors.Is(err, bus.ErrOvertaken) {
		http.Error(w, "calls of the session are open or have just begun: try again", http.StatusConflict)
		return
	}
	if err != nil {
		a.fail(w, err)
		return
	}
	leaf, err := covered(ctx, of, keys, receipt.Seq)
	if err == nil {
		// What the builder cannot know of, as the log does not: it reads as much of the
		// feed as there is, and so is not for who builds the tree.
		err = of.EraseFeed(ctx, first.Tenant, first.Agent, key, leaf, unsaid(key, receipt.Seq))
	}
	if err == nil && len(a.g.guard) > 0 {
		err = untilRecorded(ctx, l, receipt.Seq)
	}
	if err != nil {
		a.fail(w, fmt.Errorf("the erasure is stored as event %d, and not done yet: %w", receipt.Seq, err))
		return
	}
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(erasure{key, first.Tenant, receipt.Seq, leaf, events}) // the client left
}

// outlived is what there is of a session beside the log, which has lost the oldest
// of it, or all, to its age.
type outlived struct {
	tenant schemas.Tenant // "" for nothing
	agent  schemas.Agent
	events int
}

// outlived looks for a session in the record, and then, where the log has nothing of
// it, in the feed.
func (a *admin) outlived(ctx context.Context, of *bus.Audit, key schemas.SessionKey, logged bool) (o outlived, err error) {
	if a.g.server != nil {
		if o.tenant, o.agent, o.events, err = projections.Whose(ctx, a.g.server, key); err != nil || o.tenant != "" {
			return o, err
		}
	}
	if logged {
		return o, nil
	}
	if o.tenant, o.agent, o.events, err = of.Outlived(ctx, key); errors.Is(err, schemas.ErrNotFound) {
		return outlived{}, nil
	}
	return o, err
}

// unsaid takes out of a record of the feed what a session said before a message.
func unsaid(key schemas.SessionKey, before uint64) func([]byte) ([]byte, bool) {
	return func(payload []byte) ([]byte, bool) { return audit.Unsaid(payload, key, before) }
}

const (
	eraseWithin = 5 * time.Minute
	eraseGrace  = time.Minute // after its deadline a call has long had its ending
)

func maxTime(a, b time.Time) time.Time {
	if a.After(b) {
		return a
	}
	return b
}

// untilRecorded waits until the record has an event, and has done what it says.
func untilRecorded(ctx context.Context, l *bus.Log, seq uint64) error {
	look := time.NewTicker(100 * time.Millisecond)
	defer look.Stop()
	for {
		at, err := l.Floor(ctx, consumer)
		if err != nil || at >= seq {
			return err
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("in the record: %w", ctx.Err())
		case <-look.C:
		}
	}
}

// covered waits for a checkpoint that covers an event, and returns its leaf.
func covered(ctx context.Context, of *bus.Audit, keys audit.Keys, seq uint64) (uint64, error) {
	known, err := audit.Known(keys.Verifiers)
	if err != nil {
		return 0, err
	}
	look := time.NewTicker(50 * time.Millisecond)
	defer look.Stop()
	for {
		leaf, err := of.Find(ctx, audit.Events, seq)
		if err == nil {
			var text string
			if text, _, err = of.Checkpoint(ctx); err == nil && text != "" {
				c, err := audit.OpenCheckpoint(text, known)
				if err != nil {
					return 0, err
				}
				if c.Size > leaf {
					return leaf, nil
				}
			}
		}
		if err != nil && !errors.Is(err, schemas.ErrNotFound) {
			return 0, err
		}
		select {
		case <-ctx.Done():
			return 0, ctx.Err()
		case <-look.C:
		}
	}
}
