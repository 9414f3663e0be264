package bus

import (
	"slices"

	"waybill.dev/schemas"
)

// Role is a user of the log. Who may write which kind of event is a rule of
// the server, not of our good manners: only policy can authorize, only policy
// and dispatch can end a call.
type Role string

const (
	RoleEdge     Role = "edge"
	RolePolicy   Role = "policy"
	RoleDispatch Role = "dispatch"
	RoleProject  Role = "project"
	RoleTraces   Role = "traces"   // exports spans; stores nothing
	RoleOperator Role = "operator" // carries out what people order through the admin API
	RoleAdmin    Role = "admin"    // sets up the streams; no part of a running call
	RoleObserver Role = "observer" // reads, for auditors and tests; stores nothing
)

// Roles lists them all.
func Roles() []Role {
	return []Role{RoleEdge, RolePolicy, RoleDispatch, RoleProject, RoleTraces, RoleOperator, RoleAdmin, RoleObserver}
}

// writes is the table of kinds that a role may store.
var writes = map[Role][]schemas.Kind{
	RoleEdge: {
		schemas.KindRequested, schemas.KindCancel, schemas.KindOpened, schemas.KindClosed,
		schemas.KindAnswered, schemas.KindNotified, schemas.KindAttached, schemas.KindCaused,
	},
	RolePolicy: {
		schemas.KindAuthorized, schemas.KindDenied, schemas.KindHeld, schemas.KindFailed,
	},
	RoleDispatch: {
		schemas.KindStarted, schemas.KindProgressed, schemas.KindTasked, schemas.KindCompleted, schemas.KindFailed,
		schemas.KindCancelled, schemas.KindLate, schemas.KindConnected, schemas.KindAsked, schemas.KindNotified,
		schemas.KindRouted,
	},
}

// records is the table of kinds of records ([System]) that a role may store.
// Who may store any may store contents too, which count only by their digest.
//
// A grant is an operator's alone: policy cannot approve what it holds.
var records = map[Role][]string{
	RolePolicy:   {"policy"},
	RoleDispatch: {"tool"},
	RoleOperator: {"policy", "approval", "tool"},
}

// durables are the consumers that a role works through. Nobody else may pull
// from them, acknowledge, change or delete them: whoever could, could make
// calls vanish.
var durables = map[Role]string{
	RolePolicy:   "policy",
	RoleDispatch: "dispatch",
	RoleProject:  "project",
	RoleTraces:   "traces",
}

// Subjects are what a role may and may not publish to, and subscribe to.
type Subjects struct{ Publish, Never, Subscribe []string }

// Permissions are the subjects of a role.
func (r Role) Permissions() Subjects {
	if r == RoleAdmin {
		return Subjects{Publish: []string{">"}, Subscribe: []string{">"}}
	}
	p := Subjects{
		// Reading, through consumers of one's own that need no acknowledging.
		Publish: []string{
			"$JS.API.INFO", "$JS.API.STREAM.INFO.*", "$JS.API.STREAM.NAMES",
			"$JS.API.STREAM.MSG.GET.*", "$JS.API.DIRECT.GET.>",
			"$JS.API.CONSUMER.CREATE.*.>", "$JS.API.CONSUMER.DELETE.*.*",
			"$JS.API.CONSUMER.INFO.*.*", "$JS.API.CONSUMER.LIST.*", "$JS.API.CONSUMER.NAMES.*",
			"$JS.API.CONSUMER.MSG.NEXT.*.*",
		},
		Subscribe: []string{"_INBOX.>", "ev.>", "sys.>", "dead.>"},
	}
	for role, name := range durables {
		if role == r {
			p.Publish = append(p.Publish, "$JS.ACK."+events+"."+name+".>", "$JS.API.CONSUMER.RESET."+events+"."+name, "dead."+name)
			continue
		}
		p.Never = append(p.Never,
			"$JS.API.CONSUMER.CREATE.*."+name, "$JS.API.CONSUMER.CREATE.*."+name+".>",
			"$JS.API.CONSUMER.DELETE.*."+name, "$JS.API.CONSUMER.MSG.NEXT.*."+name)
	}
	if r == RoleDispatch {
		p.Publish = append(p.Publish, "key.*")
	} else {
		p.Never = append(p.Never,
			"$JS.API.STREAM.MSG.GET."+keys, "$JS.API.DIRECT.GET."+keys, "$JS.API.DIRECT.GET."+keys+".>",
			"$JS.API.CONSUMER.CREATE."+keys+".>", "$JS.API.CONSUMER.MSG.NEXT."+keys+".>")
	}
	for _, k := range writes[r] {
		p.Publish = append(p.Publish, "ev.*.*."+string(k)+".*")
	}
	for _, k := range records[r] {
		p.Publish = append(p.Publish, "sys."+k+".*")
	}
	if len(records[r]) > 0 {
		p.Publish = append(p.Publish, "sys."+contentKind+".*")
	}
	if r == RoleDispatch {
		p.Publish = append(p.Publish, "$KV."+owners+".>") // see Leases; reading it is everybody's
	}
	slices.Sort(p.Never)
	return p
}
