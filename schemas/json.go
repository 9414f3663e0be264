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

// written is the one written form of an event: in the log's header without
// body, seq and stored; with them in `--json` output, exports and feeds.
type written struct {
	V       int             `json:"v"`
	Kind    Kind            `json:"kind"`
	ID      EventID         `json:"id"`
	Seq     uint64          `json:"seq,omitempty"`
	Stored  time.Time       `json:"stored,omitzero"`
	Time    time.Time       `json:"time"`
	Tenant  Tenant          `json:"tenant"`
	Session SessionKey      `json:"session"`
	Call    CallID          `json:"call,omitempty"`
	Parent  CallID          `json:"parent,omitempty"`
	Root    CallID          `json:"root,omitempty"`
	Agent   Agent           `json:"agent"`
	Edge    Replica         `json:"edge,omitempty"`
	Trace   string          `json:"trace,omitempty"`
	Data    json.RawMessage `json:"data"`
	Body    *string         `json:"body,omitempty"`        // when it is UTF-8
	Base64  []byte          `json:"body_base64,omitempty"` // otherwise
}

// MarshalJSON writes the event whole: envelope, place in the log, body.
func (e Event) MarshalJSON() ([]byte, error) {
	if e.Data == nil {
		return nil, fmt.Errorf("%w: no payload", ErrInvalid)
	}
	data, err := json.Marshal(e.Data)
	if err != nil {
		return nil, err
	}
	w := written{
		V: Version, Kind: e.Kind(), ID: e.ID(), Seq: e.Seq, Stored: e.Stored, Time: e.Time,
		Tenant: e.Tenant, Session: e.Session, Call: e.Call, Parent: e.Parent, Root: e.Root,
		Agent: e.Agent, Edge: e.Edge, Trace: e.Trace, Data: data,
	}
	if utf8.Valid(e.Body) && e.Body != nil {
		s := string(e.Body)
		w.Body = &s
	} else {
		w.Base64 = e.Body
	}
	return json.Marshal(w)
}

// UnmarshalJSON reads what MarshalJSON wrote. It returns an error that wraps
// [ErrInvalid] for a newer version, an unknown kind, an envelope that breaks
// its rules, and an ID that is not the derived one.
func (e *Event) UnmarshalJSON(b []byte) error {
	var w written
	if err := json.Unmarshal(b, &w); err != nil {
		return fmt.Errorf("%w: %w", ErrInvalid, err)
	}
	if w.V != Version {
		return fmt.Errorf("%w: envelope version %d, this program reads %d", ErrInvalid, w.V, Version)
	}
	empty, ok := kinds[w.Kind]
	if !ok {
		return fmt.Errorf("%w: unknown kind %q", ErrInvalid, w.Kind)
	}
	data := empty()
	if err := json.Unmarshal(w.Data, data); err != nil {
		return fmt.Errorf("%w: %s payload: %w", ErrInvalid, w.Kind, err)
	}
	*e = Event{
		Tenant: w.Tenant, Session: w.Session, Call: w.Call, Parent: w.Parent, Root: w.Root,
		Agent: w.Agent, Edge: w.Edge, Time: w.Time, Trace: w.Trace, Data: data,
		Body: w.Base64, Seq: w.Seq, Stored: w.Stored,
	}
	if w.Body != nil {
		e.Body = []byte(*w.Body)
	}
	if err := e.Check(); err != nil {
		return err
	}
	if id := e.ID(); id != w.ID {
		return fmt.Errorf("%w: id %q, derived %q", ErrInvalid, w.ID, id)
	}
	return nil
}
