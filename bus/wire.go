package bus

import (
	"errors"
	"fmt"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"waybill.dev/schemas"
)

// The written form: the envelope in one header, its ID where the server
// recognises duplicates, the trace where any NATS tool finds it, and the body
// as the payload, verbatim.
const (
	headerEnvelope = "Waybill-Event"
	headerTrace    = "traceparent"
)

// The server refuses a message whose headers take more than 64 KiB, and the
// envelope is one of them. A request's is held to half of that: what policy
// makes of it repeats it, and must fit too.
const (
	maxEnvelope = 60 << 10
	maxRequest  = 32 << 10
)

// ErrUndecodable is returned for a stored message that is not an event this
// program can read.
var ErrUndecodable = errors.New("undecodable event")

// encode writes an event for the log.
func encode(e schemas.Event) (*nats.Msg, error) {
	if err := e.Check(); err != nil {
		return nil, err
	}
	if len(e.Body) > MaxBody {
		return nil, fmt.Errorf("%w: body of %d bytes, the log takes %d", schemas.ErrTooLarge, len(e.Body), MaxBody)
	}
	envelope, err := e.MarshalString()
	if err != nil {
		return nil, err
	}
	limit := maxEnvelope
	if e.Kind() == schemas.KindRequested {
		limit = maxRequest
	}
	if len(envelope) > limit {
		return nil, fmt.Errorf("%w: envelope of %d bytes, the log takes %d for %s", schemas.ErrTooLarge, len(envelope), limit, e.Kind())
	}
	values := []string{envelope, string(e.ID()), e.Trace}
	h := nats.Header{headerEnvelope: values[0:1:1], jetstream.MsgIDHeader: values[1:2:2]}
	if e.Trace != "" {
		h[headerTrace] = values[2:]
	}
	return &nats.Msg{Subject: subject(e), Header: h, Data: e.Body}, nil
}

// decode reads a stored message. It checks that the event stands where it
// says it stands, so that a message cannot pass for one of another tenant,
// session or kind. Seq and Stored are the caller's to set.
func decode(subj string, h nats.Header, body []byte) (schemas.Event, error) {
	var e schemas.Event
	if err := e.UnmarshalString(h.Get(headerEnvelope)); err != nil {
		return e, fmt.Errorf("%w on %s: %w", ErrUndecodable, subj, err)
	}
	if !standsOn(e, subj) {
		return e, fmt.Errorf("%w: stored on %s, its envelope says %s", ErrUndecodable, subj, subject(e))
	}
	if id := h.Get(jetstream.MsgIDHeader); id != string(e.ID()) {
		return e, fmt.Errorf("%w on %s: Nats-Msg-Id %q, its envelope says %q", ErrUndecodable, subj, id, e.ID())
	}
	if len(body) > 0 {
		e.Body = body
	} else {
		e.Body = nil
	}
	return e, nil
}

// decodeMsg reads a message delivered by a consumer.
func decodeMsg(m jetstream.Msg) (schemas.Event, *jetstream.MsgMetadata, error) {
	md, err := m.Metadata()
	if err != nil {
		return schemas.Event{}, nil, fmt.Errorf("%w: %w", ErrUndecodable, err)
	}
	e, err := decode(m.Subject(), m.Headers(), m.Data())
	e.Seq, e.Stored = md.Sequence.Stream, md.Timestamp.UTC()
	return e, md, err
}
