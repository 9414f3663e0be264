package mcp

import (
	"context"
	"time"

	"waybill.dev/schemas"
	"waybill.dev/schemas/jsonrpc"
)

// A call that is held waits for a person. Its deadline is not about persons: the
// client waits until Held.Expires, when policy says what becomes of the call, and
// for as long as the call had from its request on, which it has again then. A
// client that asked for progress is told why nothing happens.

// hold sets the timer of a call's deadline to how long its client waits at most.
func (a *Adapter) hold(late *time.Timer, q *schemas.Requested, d *schemas.Held) {
	switch {
	case late == nil:
	case d.Expires.IsZero():
		late.Stop()
	default:
		late.Reset(a.remains(d.Expires.Add(max(q.Deadline.Sub(d.RequestedAt), 0))) + grace)
	}
}

// waiting is the notification that says that a call is held; nil if its client
// did not ask for any.
func (a *Adapter) waiting(ctx context.Context, call schemas.CallID, d *schemas.Held) []byte {
	if d.RequestedSeq == 0 {
		return nil
	}
	e, err := a.o.Load(ctx, d.RequestedSeq)
	if err != nil || e.Call != call {
		return nil // it waits all the same
	}
	m, err := jsonrpc.Decode(e.Body, jsonrpc.Limits{})
	if err != nil {
		return nil
	}
	token := m.Params().Get("_meta", "progressToken")
	if k := token.Kind(); k != jsonrpc.String && k != jsonrpc.Number {
		return nil
	}
	b := append([]byte(`{"jsonrpc":"2.0","method":"notifications/progress","params":{"progressToken":`), token.Raw()...)
	return append(b, `,"progress":0,"message":"The call waits for the approval of a person."}}`...)
}
