package schemas

import (
	"encoding/json"
	"fmt"
	"time"
	"unicode/utf8"
)

// Version is the version of the envelope's written form. A reader refuses a
// higher one.
const Version = 1

// envelope is the part of the written form that every kind has. Members that
// a reader does not know it ignores, here and in the payloads, so that a later
// program may add some without a new version.
type envelope struct {
	V       int        `json:"v"`               // version of this form; a reader refuses a higher one
	Kind    Kind       `json:"kind"`            // what happened; decides the form of data
	ID      EventID    `json:"id"`              // derived from what the event is about, unique in the log
	Seq     uint64     `json:"seq,omitempty"`   // place in the log; absent while it has none
	Stored  time.Time  `json:"stored,omitzero"` // when the log had it
	Time    time.Time  `json:"time"`            // UTC, set by whoever emitted it
	Tenant  Tenant     `json:"tenant"`
	Session SessionKey `json:"session"`          // hash of tenant, principal and the session's name
	Call    CallID     `json:"call,omitempty"`   // minted by the gateway; absent for the events of a session
	Parent  CallID     `json:"parent,omitempty"` // the call that caused this one
	Root    CallID     `json:"root,omitempty"`   // the first call of the tree; the call itself at the top
	Agent   Agent      `json:"agent"`
	Edge    Replica    `json:"edge,omitempty"`  // the edge process that waits for the answer
	Trace   string     `json:"trace,omitempty"` // W3C traceparent with which the call was made

	TraceState string `json:"tracestate,omitempty"` // W3C tracestate that came with it
}

// said is the body in the written form.
type said struct {
	Body   *string `json:"body,omitempty"`        // what was said, byte for byte, when it is UTF-8
	Base64 []byte  `json:"body_base64,omitempty"` // what was said, when it is not UTF-8
}

// written is the one written form of an event: in the log's header without
// body, seq and stored; with them in `--json` output, exports and feeds.
type written struct {
	envelope
	Data Payload `json:"data"`
	said
}

// written is the event without its body.
func (e Event) written() written {
	return written{
		envelope: envelope{
			V: Version, Kind: e.Kind(), ID: e.ID(), Seq: e.Seq, Stored: e.Stored, Time: e.Time,
			Tenant: e.Tenant, Session: e.Session, Call: e.Call, Parent: e.Parent, Root: e.Root,
			Agent: e.Agent, Edge: e.Edge, Trace: e.Trace, TraceState: e.TraceState,
		},
		Data: e.Data,
	}
}

// MarshalJSON writes the event whole: envelope, place in the log, body. Where
// it matters, call it directly: json.Marshal goes over the result again.
func (e Event) MarshalJSON() ([]byte, error) {
	if e.Data == nil {
		return nil, fmt.Errorf("%w: no payload", ErrInvalid)
	}
	w := e.written()
	if e.Body == nil {
		if b, ok := w.header(make([]byte, 0, 1024)); ok {
			return b, nil
		}
	}
	if utf8.Valid(e.Body) && e.Body != nil {
		s := string(e.Body)
		w.Body = &s
	} else {
		w.Base64 = e.Body
	}
	return json.Marshal(&w)
}

// MarshalString is MarshalJSON of the event without its body and its place in
// the log, as it lies in the log's headers.
func (e Event) MarshalString() (string, error) {
	b, err := e.AppendString(make([]byte, 0, 1024)) // most have less; a pool would be no business of replay
	return string(b), err
}

// AppendString appends what MarshalString returns. With an error it returns b as it was.
func (e Event) AppendString(b []byte) ([]byte, error) {
	e.Body, e.Seq, e.Stored = nil, 0, time.Time{}
	if e.Data != nil {
		w := e.written()
		if with, ok := w.header(b); ok {
			return with, nil
		}
	}
	text, err := e.MarshalJSON()
	if err != nil {
		return b, err
	}
	return append(b, text...), nil
}

// WrongID is the error of an event that was read, but for its ID, which is not the
// one that follows from it.
type WrongID struct{ ID, Derived EventID }

func (w *WrongID) Error() string { return fmt.Sprintf("id %q, derived %q", w.ID, w.Derived) }

// UnmarshalJSON reads what MarshalJSON wrote. It returns an error that wraps
// [ErrInvalid] for a newer version, an unknown kind, an envelope that breaks
// its rules, and an ID that is not the derived one ([WrongID]).
func (e *Event) UnmarshalJSON(b []byte) error { return e.UnmarshalString(string(b)) }

// UnmarshalString is UnmarshalJSON of a string, of which the event then keeps
// parts.
func (e *Event) UnmarshalString(s string) error {
	w, ok := readHeader(s)
	if !ok {
		var err error
		if w, err = readAny([]byte(s)); err != nil {
			return fmt.Errorf("%w: %w", ErrInvalid, err)
		}
	}
	*e = Event{
		Tenant: w.Tenant, Session: w.Session, Call: w.Call, Parent: w.Parent, Root: w.Root,
		Agent: w.Agent, Edge: w.Edge, Time: w.Time, Trace: w.Trace, TraceState: w.TraceState, Data: w.Data,
		Body: w.Base64, Seq: w.Seq, Stored: w.Stored,
	}
	if w.Body != nil {
		e.Body = []byte(*w.Body)
	}
	if err := e.Check(); err != nil {
		return err
	}
	if id := e.ID(); id != w.ID {
		return fmt.Errorf("%w: %w", ErrInvalid, &WrongID{w.ID, id})
	}
	return nil
}

// readAny reads the written form however it is laid out.
func readAny(b []byte) (w written, err error) {
	var r struct {
		envelope
		Data json.RawMessage `json:"data"`
		said
	}
	if err := json.Unmarshal(b, &r); err != nil {
		return w, err
	}
	if r.V != Version {
		return w, fmt.Errorf("envelope version %d, this program reads %d", r.V, Version)
	}
	empty, ok := kinds[r.Kind]
	if !ok {
		return w, fmt.Errorf("unknown kind %q", r.Kind)
	}
	if len(r.Data) == 0 || r.Data[0] != '{' {
		return w, fmt.Errorf("no %s payload", r.Kind)
	}
	if r.Body != nil && r.Base64 != nil {
		return w, fmt.Errorf("two bodies")
	}
	w = written{envelope: r.envelope, Data: empty(), said: r.said}
	if err := json.Unmarshal(r.Data, w.Data); err != nil {
		return w, fmt.Errorf("%s payload: %w", r.Kind, err)
	}
	return w, nil
}
