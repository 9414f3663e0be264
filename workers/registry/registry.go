// Package registry knows what servers say that they have: tools, prompts,
// resources, and what they tell a model to do (instructions). Each definition is
// pinned by the SHA-256 of its canonical JSON (RFC 8785): what a server shows is
// passed on, and can be called, only while it is what was approved. What is seen
// for the first time is approved at once where the operator's config says so
// (first-use), unless something is wrong with it, and else by a person; what is
// seen to have changed is quarantined until a person says otherwise.
//
// The pins are records of the system, so that every process has the same:
//
//	tool.<server>   an [Observation], stored by whoever sees a list, before it is shown
//	pin.<server>    a [Word], which only an operator can store
//
// Begin with [Registry.Record], which makes the state out of them: it depends on
// nothing but the records in their order. [Registry.Listed] is for whoever passes
// on a list, [Registry.Admit] for whoever lets a call go on.
package registry

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"waybill.dev/schemas"
)

// Kind is what a definition defines.
type Kind string

const (
	Tool         Kind = "tool"
	Prompt       Kind = "prompt"
	Resource     Kind = "resource"
	Template     Kind = "template"     // of resources
	Instructions Kind = "instructions" // of the server; their name is ""
)

// Mode is how a server's definitions are approved that are seen for the first time.
type Mode string

const (
	FirstUse Mode = "first-use"
	Manual   Mode = "manual"
)

// Kinds of records.
const (
	SeenKind = "tool"
	WordKind = "pin"
)

// Ref names a definition.
type Ref struct {
	Server string `json:"server"` // as the operator's config calls it
	Kind   Kind   `json:"kind"`
	Name   string `json:"name,omitempty"` // as the server has it; the URI of a resource
}

// Observation is what a process has seen of a server that was not known yet.
type Observation struct {
	Server  string    `json:"server"`
	Approve Mode      `json:"approve"` // the server's mode
	By      string    `json:"by"`      // the process
	At      time.Time `json:"at"`
	Seen    []Seen    `json:"seen"`
}

// Seen is a definition as it was seen.
type Seen struct {
	Kind       Kind            `json:"kind"`
	Name       string          `json:"name,omitempty"`
	SHA256     string          `json:"sha256"`               // hex; of the canonical form
	Was        string          `json:"was,omitempty"`        // hex; what was seen before it
	Definition json.RawMessage `json:"definition,omitempty"` // canonical; none where the server has said too much already
	Flaws      []string        `json:"flaws,omitempty"`      // why a person has to look at it first, whatever the mode
	Notes      []string        `json:"notes,omitempty"`      // advice to that person
	Diff       []Change        `json:"diff,omitempty"`       // from what was approved; the first changes
}

// What a Word says, and how an [Entry] stands.
const (
	Approved    = "approved"
	Quarantined = "quarantined"
	Waiting     = "waiting" // for a person, since it was first seen
)

// Word is what an operator says of a definition.
type Word struct {
	Ref
	Said   string    `json:"said"`
	SHA256 string    `json:"sha256"` // the definition that is meant, and no other
	By     string    `json:"by"`
	Note   string    `json:"note,omitempty"`
	At     time.Time `json:"at"`
}

// Bounds of what is kept of one server. A definition beyond them is not known, and
// so not shown.
const (
	maxDefinition = 256 << 10
	maxNames      = 4096
	maxName       = 4 << 10
	maxSaid       = 32 << 20 // bytes of definitions since an operator has last said something of the server
	maxRecord     = 2 << 20  // bytes of definitions in one record
)

// Options are what a Registry works with.
type Options struct {
	Servers map[string]Mode // whose definitions are pinned; those of others pass as they are

	// Trusted are those whose annotations count ([Admission].Hints).
	Trusted map[string]bool

	// Store stores an Observation, under the name of its server, and returns its
	// sequence. nil: this process sees nothing.
	Store func(ctx context.Context, name string, observation []byte) (uint64, error)

	By  string           // names this process in records
	Now func() time.Time // default time.Now
	Log *slog.Logger     // default: none
}

// Registry is safe for concurrent use.
type Registry struct {
	o    Options
	look *lookalikes

	observing map[string]chan struct{} // of a server: holds one, who stores what it has seen
	maxSaid   int                      // the constant, but in tests

	mu      sync.RWMutex
	servers map[string]*server
	looks   map[look][]Ref // of tools and prompts
	applied uint64         // the newest record
	more    chan struct{}  // closed when it changes
}

// server is what is known of one. Registry.mu guards it.
type server struct {
	pins map[Ref]*pin
	said int // bytes
}

// pin is a definition. What it consists of never changes but by records, the rest
// is memory.
type pin struct {
	seen     Seen   // last
	approved string // hex; "": nothing was yet
	before   []byte // the definition that was approved
	withheld bool
	why      string
	by       string // who approved or quarantined
	since    time.Time

	// ahead is a definition that this process has seen and that no record says yet.
	// It counts at once.
	ahead string

	raw   [32]byte // of the bytes that were last found to be the definition seen
	hints Hints    // of the definition seen

	// checkers are of the definition seen; nil if it has no schema, or none that can
	// be used, which is a flaw. The function is nil where it is no tool.
	checkers func() (input, output *checker)
}

// Hints are a tool's annotations, or what is to be feared where it has none or
// they are not trusted.
type Hints struct{ ReadOnly, Destructive, Idempotent, OpenWorld bool }

// New makes a Registry that knows nothing yet.
func New(o Options) (*Registry, error) {
	if o.Now == nil {
		o.Now = time.Now
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	likes, err := newLookalikes()
	if err != nil {
		return nil, err
	}
	r := &Registry{o: o, look: likes, maxSaid: maxSaid, observing: map[string]chan struct{}{}, servers: map[string]*server{}, looks: map[look][]Ref{}, more: make(chan struct{})}
	for name, mode := range o.Servers {
		if mode != FirstUse && mode != Manual {
			return nil, fmt.Errorf("registry: server %s: %q is neither %s nor %s", name, mode, FirstUse, Manual)
		}
		r.observing[name] = make(chan struct{}, 1)
	}
	return r, nil
}

// Pins tells whether a server's definitions are pinned.
func (r *Registry) Pins(server string) bool {
	_, ok := r.o.Servers[server]
	return ok
}

// RecordName is the name of the records of a server.
func RecordName(server string) string {
	sum := sha256.Sum256([]byte(server))
	return "s" + hex.EncodeToString(sum[:])[:32]
}

// Record takes a record; the error is of one that says nothing that can be
// understood, and changes nothing.
func (r *Registry) Record(kind, _ string, seq uint64, body []byte) error {
	var err error
	r.mu.Lock()
	defer r.mu.Unlock()
	switch kind {
	case SeenKind:
		var o Observation
		if err = json.Unmarshal(body, &o); err == nil {
			err = r.observed(o)
		}
	case WordKind:
		var w Word
		if err = json.Unmarshal(body, &w); err == nil {
			err = r.word(w)
		}
	}
	r.applied = max(r.applied, seq)
	close(r.more)
	r.more = make(chan struct{})
	return err
}

// observed is a transition: what is new is approved or waits, what has changed is
// withheld, what is known already says nothing.
func (r *Registry) observed(o Observation) error {
	s := r.servers[o.Server]
	if s == nil {
		s = &server{pins: map[Ref]*pin{}}
		r.servers[o.Server] = s
	}
	var errs []error
	for _, seen := range o.Seen {
		if len(seen.Definition) > 0 && digest(seen.Definition) != seen.SHA256 {
			errs = append(errs, fmt.Errorf("the %s %q of %s is not what its digest says", seen.Kind, seen.Name, o.Server))
			continue
		}
		ref := Ref{o.Server, seen.Kind, seen.Name}
		p := s.pins[ref]
		switch {
		case p == nil:
			p = &pin{since: o.At}
			s.pins[ref] = p
			if l, ok := r.look.of(ref); ok {
				r.looks[l] = append(r.looks[l], ref)
			}
			switch {
			case len(seen.Flaws) > 0:
				p.withheld, p.why = true, strings.Join(seen.Flaws, "; ")
			case o.Approve == FirstUse && len(seen.Definition) > 0:
				p.approved, p.before, p.by = seen.SHA256, seen.Definition, string(FirstUse)
			default:
				p.withheld, p.why = true, "it was never approved"
			}
		case p.seen.SHA256 == seen.SHA256:
			if len(p.seen.Definition) > 0 || len(seen.Definition) == 0 {
				continue
			}
			// Only the text was missing.
		default:
			p.withheld, p.by, p.since = true, "", o.At
			p.why = "it has changed"
			if p.approved == "" {
				p.why = "it was never approved, and has changed since it was first seen"
			}
			if len(seen.Flaws) > 0 {
				p.why += "; " + strings.Join(seen.Flaws, "; ")
			}
		}
		s.said += len(seen.Definition)
		p.take(seen, r.o.Trusted[o.Server])
	}
	return errors.Join(errs...)
}

// take makes a definition the one that was seen last.
func (p *pin) take(seen Seen, trusted bool) {
	p.seen, p.raw, p.checkers = seen, [32]byte{}, nil
	p.hints = Hints{Destructive: true, OpenWorld: true}
	if seen.Kind != Tool {
		return
	}
	var t struct {
		Input  json.RawMessage `json:"inputSchema"`
		Output json.RawMessage `json:"outputSchema"`
		Hints  struct {
			ReadOnly    *bool `json:"readOnlyHint"`
			Destructive *bool `json:"destructiveHint"`
			Idempotent  *bool `json:"idempotentHint"`
			OpenWorld   *bool `json:"openWorldHint"`
		} `json:"annotations"`
	}
	if err := json.Unmarshal(seen.Definition, &t); err != nil {
		trusted = false // its annotations are not what they should be; the schemas have been read
	}
	p.checkers = sync.OnceValues(func() (input, output *checker) {
		input, err := compile(t.Input)
		if err != nil {
			input = nil
		}
		if output, err = compile(t.Output); err != nil {
			output = nil
		}
		return input, output
	})
	if trusted {
		for _, h := range []struct {
			said *bool
			hint *bool
		}{{t.Hints.ReadOnly, &p.hints.ReadOnly}, {t.Hints.Destructive, &p.hints.Destructive}, {t.Hints.Idempotent, &p.hints.Idempotent}, {t.Hints.OpenWorld, &p.hints.OpenWorld}} {
			if h.said != nil {
				*h.hint = *h.said
			}
		}
	}
}

// word is a transition: exactly the definition of its digest is approved, if that
// is what was seen last; or it is withheld.
func (r *Registry) word(w Word) error {
	s := r.servers[w.Server]
	if s == nil || s.pins[w.Ref] == nil {
		return fmt.Errorf("the %s %q of %s is not known", w.Kind, w.Name, w.Server)
	}
	s.said = 0
	p := s.pins[w.Ref]
	switch w.Said {
	case Approved:
		if w.SHA256 != p.seen.SHA256 || len(p.seen.Definition) == 0 {
			// It has changed on the way: nobody has looked at what it is now.
			return nil
		}
		p.approved, p.before = w.SHA256, p.seen.Definition
		p.withheld, p.why = false, ""
	case Quarantined:
		p.withheld, p.why = true, "an operator has quarantined it"
		if w.Note != "" {
			p.why += ": " + w.Note
		}
	default:
		return fmt.Errorf("a word of the %s %q of %s says %q", w.Kind, w.Name, w.Server, w.Said)
	}
	p.by, p.since = w.By, w.At
	return nil
}

// open tells whether the definition may be shown and called: it is what was
// approved, and nothing speaks against it.
func (p *pin) open() bool {
	return p.approved != "" && !p.withheld && p.seen.SHA256 == p.approved && (p.ahead == "" || p.ahead == p.approved)
}

// reason says why it is not open.
func (p *pin) reason() string {
	switch {
	case p.why != "":
		return p.why
	case p.ahead != "":
		return "it has changed"
	}
	return "it is not what was approved"
}

// Await waits until the record of a sequence has been taken.
func (r *Registry) Await(ctx context.Context, seq uint64) error {
	for {
		r.mu.RLock()
		done, more := r.applied >= seq, r.more
		r.mu.RUnlock()
		if done {
			return nil
		}
		select {
		case <-more:
		case <-ctx.Done():
			return fmt.Errorf("await record %d: %w", seq, context.Cause(ctx))
		}
	}
}

// Entry is a definition as operators see it.
type Entry struct {
	Ref
	State    string          `json:"state"` // approved, waiting or quarantined
	Why      string          `json:"why,omitempty"`
	SHA256   string          `json:"sha256"`
	Approved string          `json:"approved,omitempty"` // the digest, where it is another
	By       string          `json:"by,omitempty"`
	Since    time.Time       `json:"since"`
	Flaws    []string        `json:"flaws,omitempty"`
	Notes    []string        `json:"notes,omitempty"`
	Diff     []Change        `json:"diff,omitempty"` // from what was approved
	Now      json.RawMessage `json:"definition,omitempty"`
}

// Entries are all that are known, by server, kind and name; with the definitions,
// if so.
func (r *Registry) Entries(definitions bool) []Entry {
	r.mu.RLock()
	defer r.mu.RUnlock()
	var all []Entry
	for _, name := range slices.Sorted(maps.Keys(r.servers)) {
		for ref, p := range r.servers[name].pins {
			e := Entry{Ref: ref, State: Quarantined, Why: p.why, SHA256: p.seen.SHA256, By: p.by, Since: p.since, Flaws: p.seen.Flaws, Notes: p.seen.Notes}
			switch {
			case p.open():
				e.State = Approved
			case p.approved == "" && p.by == "" && len(p.seen.Flaws) == 0:
				e.State = Waiting
			}
			if p.approved != p.seen.SHA256 {
				e.Approved = p.approved
				if p.approved != "" {
					e.Diff = diff(p.before, p.seen.Definition)
				}
			}
			if definitions {
				e.Now = p.seen.Definition
			}
			all = append(all, e)
		}
	}
	slices.SortFunc(all, func(a, b Entry) int {
		return slices.Compare([]string{a.Server, string(a.Kind), a.Name}, []string{b.Server, string(b.Kind), b.Name})
	})
	return all
}

// encode writes a record. The definitions in it keep their bytes.
func encode(v any) ([]byte, error) {
	var b bytes.Buffer
	e := json.NewEncoder(&b)
	e.SetEscapeHTML(false)
	if err := e.Encode(v); err != nil {
		return nil, err
	}
	return bytes.TrimSuffix(b.Bytes(), []byte("\n")), nil
}

// EncodeWord writes a Word, or says what is wrong with it.
func EncodeWord(w Word) ([]byte, error) {
	switch {
	case w.Said != Approved && w.Said != Quarantined:
		return nil, fmt.Errorf("%w: said %q, which is neither %s nor %s", schemas.ErrInvalid, w.Said, Approved, Quarantined)
	case strings.TrimSpace(w.By) == "":
		return nil, fmt.Errorf("%w: nobody is named who says so", schemas.ErrInvalid)
	case len(w.By)+len(w.Note) > 4<<10:
		return nil, fmt.Errorf("%w: by and note may have %d bytes together", schemas.ErrInvalid, 4<<10)
	}
	return encode(w)
}

func digest(b []byte) string {
	sum := sha256.Sum256(b)
	return hex.EncodeToString(sum[:])
}
