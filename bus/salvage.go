package bus

import (
	"encoding/json"
	"strings"

	"github.com/nats-io/nats.go/jetstream"

	"waybill.dev/schemas"
)

// salvage takes from a message that is no readable event what is needed to end
// its call: a newer version's envelope, say. The call is "" when even that is
// not there.
func salvage(m jetstream.Msg) schemas.Event {
	token := strings.Split(m.Subject(), ".")
	if len(token) != 5 {
		return schemas.Event{}
	}
	var w struct {
		Call, Parent, Root schemas.CallID
		Agent              schemas.Agent
		Edge               schemas.Replica
	}
	// Whatever it holds is good enough, and nothing is too.
	if err := json.Unmarshal([]byte(m.Headers().Get(headerEnvelope)), &w); err != nil {
		w.Agent = ""
	}
	if w.Call == "" {
		call, _, _ := strings.Cut(m.Headers().Get(jetstream.MsgIDHeader), "/")
		w.Call = schemas.CallID(call)
	}
	if schemas.CheckToken(string(w.Agent)) != nil {
		w.Agent = "unknown"
	}
	return schemas.Event{
		Tenant: schemas.Tenant(token[1]), Session: schemas.SessionKey(token[2]),
		Call: w.Call, Parent: w.Parent, Root: w.Root, Agent: w.Agent, Edge: w.Edge,
	}
}
