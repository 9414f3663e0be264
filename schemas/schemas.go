// Package schemas is Waybill's vocabulary: the events of which a call's
// history is made, and the one function type that reacts to them. It holds
// data and names only; nothing here talks to a network, a clock or a disk, and
// it imports nothing but the standard library.
//
// Begin with [Event], then [Handler]. The kinds of event and the order in
// which they may follow each other are drawn in kind.go.
package schemas

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"
)

// Domain strings. Each is a token: 1 to 64 characters of [a-z0-9_-], so that
// it can stand in a subject of the log. [CheckToken] is the test.
type (
	Tenant     string // who pays and who may see; the first token of every subject
	Agent      string // a principal: who calls
	SessionKey string // made by [NewSessionKey] only
	CallID     string // minted at an edge, never taken from a client
	Replica    string // one edge process, kept over restarts; "" when nobody waits
	Protocol   string // the edge adapter's name: mcp, a2a, llm
)

// EventID is the derived identity of an event, `<call>/<what>`. The log drops
// a second event of the same ID within its Duplicates window; beyond it the
// first in sequence wins, for every reader.
type EventID string

// Event is one line of a call's history. The envelope is everything but Body,
// Seq and Stored; Body is what agent or upstream said, byte for byte.
type Event struct {
	Tenant  Tenant
	Session SessionKey
	Call    CallID // "" for the events of a session
	Parent  CallID // the call that caused this one, or ""
	Root    CallID // the first call of the tree; Call itself at the top
	Agent   Agent
	Edge    Replica   // the edge replica that waits for the answer; of a task, see Task
	Time    time.Time // UTC, set by whoever emitted it; the log's own time is Stored
	Trace   string    // W3C traceparent with which the call was made ([Traceparent]), or ""
	Data    Payload   // decides Kind and ID; never nil
	Body    []byte    // nil when the kind carries none

	TraceState string // W3C tracestate that came with Trace ([Tracestate]), or ""

	// Set by the log when the event is read from it; zero before.
	Seq    uint64
	Stored time.Time
}

// Kind is the kind of the event's payload.
func (e Event) Kind() Kind { return e.Data.Kind() }

// ID derives the event's identity from what it is about, so that doing a thing
// twice makes the same ID.
func (e Event) ID() EventID { return e.Data.id(e) }

// Next is a further event of the same call (or session), caused by e. Time is
// left zero: whoever stores the event sets it.
func (e Event) Next(data Payload, body []byte) Event {
	n := e
	n.Time, n.Seq, n.Stored = time.Time{}, 0, time.Time{}
	n.Data, n.Body = data, body
	return n
}

// Task is e addressed to the task that its call is. No edge waits for it: who
// asks how the task stands reads what is addressed to it, and need not read the
// session for that.
func (e Event) Task() Event {
	e.Edge = Replica(e.Call)
	return e
}

// ToTask tells whether the event is addressed to the task that its call is,
// which events of all kinds may be.
func (e Event) ToTask() bool { return e.Call != "" && string(e.Edge) == string(e.Call) }

// Check says what is wrong with an envelope before it is stored or after it
// was read. It returns an error that wraps [ErrInvalid].
func (e Event) Check() error {
	if e.Data == nil {
		return fmt.Errorf("%w: no payload", ErrInvalid)
	}
	for _, f := range []struct {
		name, value string
		needed      bool
	}{
		{"tenant", string(e.Tenant), true},
		{"session", string(e.Session), true},
		{"agent", string(e.Agent), true},
		{"call", string(e.Call), e.Kind().OfCall()},
		{"parent", string(e.Parent), false},
		{"root", string(e.Root), false},
		{"edge", string(e.Edge), false},
	} {
		if f.value == "" && !f.needed {
			continue
		}
		if err := CheckToken(f.value); err != nil {
			return fmt.Errorf("%w: %s: %w", ErrInvalid, f.name, err)
		}
	}
	// The log compares IDs as header values, which have no room for the rest.
	if id := e.ID(); len(id) > 256 || strings.ContainsFunc(string(id), func(r rune) bool { return r <= ' ' || r > '~' }) {
		return fmt.Errorf("%w: id %q is not short printable ASCII", ErrInvalid, id[:min(len(id), 256)])
	}
	return nil
}

// ErrInvalid is returned for an event that breaks the envelope's rules.
var ErrInvalid = errors.New("invalid event")

// Receipt is the log's word for an event: where it is stored.
type Receipt struct {
	Seq       uint64
	Duplicate bool // an event of this ID was there before; Seq is that one's
}

// Emit stores an event and returns when it is in the log. Failures that may
// pass are retried inside with the same ID; an error means that it is not
// known to be stored and that the caller must not act on it.
type Emit func(context.Context, Event) (Receipt, error)

// Handler reacts to one event by emitting further ones. It may be called
// again with the same event, after a crash or beside a slow first call, and
// must then do no harm: derived IDs make repeated events vanish, and what
// must happen at most once is claimed first by an event of its own.
// A returned error means "deliver it again later"; what can never succeed is
// ended with an event instead.
type Handler func(ctx context.Context, e Event, emit Emit) error

// Past reads what the log holds of e's call, oldest first, e among it. It is
// for the rare event that may have been handled before: a delivery so old that
// the log no longer recognises repeated IDs, or one past its deadline.
type Past func(ctx context.Context, e Event) ([]Event, error)

// ErrOverloaded is returned by whoever takes a new call when a bounded queue
// is full: nothing was stored, try again later.
var ErrOverloaded = errors.New("overloaded")

// ErrDetached is the cause with which the context of a caller ends who leaves
// while the call goes on: its ending can be read later.
var ErrDetached = errors.New("the caller has left the call to itself")

// ErrGivenBack is returned by a [Handler] whose process is being stopped, and that
// has nothing under way that only it can end: the event is for another at once.
var ErrGivenBack = errors.New("given back")

// ErrNotFound is returned where something of the log is asked for that it does
// not hold (any more).
var ErrNotFound = errors.New("not in the log")

// ErrTooLarge is returned for an event that the log cannot hold.
var ErrTooLarge = errors.New("too large")

// Match tells whether name fits pattern, in which each * stands for any run of
// characters and everything else for itself.
func Match(pattern, name string) bool {
	head, rest, star := strings.Cut(pattern, "*")
	if !star {
		return pattern == name
	}
	if !strings.HasPrefix(name, head) {
		return false
	}
	name = name[len(head):]
	for {
		part, more, star := strings.Cut(rest, "*")
		if !star {
			return strings.HasSuffix(name, part)
		}
		i := strings.Index(name, part)
		if i < 0 {
			return false
		}
		name, rest = name[i+len(part):], more
	}
}

// CheckToken tells whether s may stand in a subject.
func CheckToken(s string) error {
	if s == "" || len(s) > 64 {
		return fmt.Errorf("must have 1 to 64 characters, has %d", len(s))
	}
	for i, r := range s {
		if (r < 'a' || r > 'z') && (r < '0' || r > '9') && r != '_' && r != '-' {
			return fmt.Errorf("character %q at %d is not one of a-z, 0-9, _ and -", r, i)
		}
	}
	return nil
}
