package bus

import (
	"slices"

	"waybill.dev/schemas"
)

// Stored is the message as which the log has an event that was read from it:
// whoever has the event alone can so make its leaf of the audit's tree again.
func Stored(e schemas.Event) (Message, error) {
	m, err := encode(e)
	if err != nil {
		return Message{}, err
	}
	return Message{
		Stream: events, Seq: e.Seq, Stored: e.Stored, Subject: m.Subject,
		Header: m.Header, Body: slices.Clip(e.Body), Event: e,
	}, nil
}
