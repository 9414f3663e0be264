package bus

import "waybill.dev/schemas"

// Role is a user of the log. Who may write which kind of event is a rule of
// the server, not of our good manners: only policy can authorize, only policy
// and dispatch can end a call.
type Role string

const (
	RoleEdge     Role = "edge"
	RolePolicy   Role = "policy"
	RoleDispatch Role = "dispatch"
	RoleProject  Role = "project"
	RoleAdmin    Role = "admin"    // sets up the streams; no part of a running call
	RoleObserver Role = "observer" // reads, for auditors and tests; stores nothing
)

// Roles lists them all.
func Roles() []Role {
	return []Role{RoleEdge, RolePolicy, RoleDispatch, RoleProject, RoleAdmin, RoleObserver}
}

// writes is the table of kinds that a role may store.
var writes = map[Role][]schemas.Kind{
	RoleEdge: {
		schemas.KindRequested, schemas.KindCancel, schemas.KindOpened, schemas.KindClosed,
		schemas.KindAnswered, schemas.KindNotified,
	},
	RolePolicy: {
		schemas.KindAuthorized, schemas.KindDenied, schemas.KindHeld, schemas.KindFailed,
	},
	RoleDispatch: {
		schemas.KindStarted, schemas.KindProgressed, schemas.KindCompleted, schemas.KindFailed,
		schemas.KindCancelled, schemas.KindLate, schemas.KindAsked, schemas.KindNotified,
	},
}

// Permissions are the subjects that a role may publish and subscribe to.
func (r Role) Permissions() (publish, subscribe []string) {
	if r == RoleAdmin {
		return []string{">"}, []string{">"}
	}
	publish = []string{
		"$JS.API.INFO", "$JS.API.STREAM.INFO.*", "$JS.API.STREAM.NAMES",
		"$JS.API.STREAM.MSG.GET.*", "$JS.API.DIRECT.GET.>",
		"$JS.API.CONSUMER.>", "$JS.ACK.>", "$JS.FC.>",
	}
	for _, k := range writes[r] {
		publish = append(publish, "ev.*.*."+string(k)+".*")
	}
	if r != RoleObserver {
		publish = append(publish, "sys.dead.>")
	}
	return publish, []string{"_INBOX.>", "ev.>", "sys.>"}
}
