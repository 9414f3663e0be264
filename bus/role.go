package bus

import (
	"slices"

	"github.com/nats-io/nats.go"

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
	RoleAudit    Role = "audit"    // keeps the tree and its feed, and erases
	RoleAdmin    Role = "admin"    // sets up the streams; no part of a running call
	RoleObserver Role = "observer" // reads, for auditors and tests; stores nothing
)

// Roles lists them all.
func Roles() []Role {
	return []Role{RoleEdge, RolePolicy, RoleDispatch, RoleProject, RoleTraces, RoleAudit, RoleOperator, RoleAdmin, RoleObserver}
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
	RoleAudit: {schemas.KindErased},
}

// records is the table of kinds of records ([System]) that a role may store.
// Who may store any may store contents too, which count only by their digest.
//
// A grant is an operator's alone: policy cannot approve what it holds, nor dispatch
// a definition that it has seen.
var records = map[Role][]string{
	RolePolicy:   {"policy", "use"},
	RoleDispatch: {"tool"},
	RoleOperator: {"policy", "approval", "pin"},
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

// inbox is where answers to a role go. Each has its own: the roles share an
// account, and who heard what another is answered would read what only that one
// may. The observer has the client's own, as it is there for any client.
func (r Role) inbox() string {
	if r == RoleObserver {
		return "_INBOX"
	}
	return "_PRIV." + string(r)
}

// Inbox makes a connection's answers go where only its role hears them. Every
// [Dialer] has to use it.
func (r Role) Inbox() nats.Option { return nats.CustomInboxPrefix(r.inbox()) }

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
		Subscribe: []string{r.inbox() + ".>", "ev.>", "sys.>", "dead.>", "audit.>", "tlog.>"},
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
	if r == RoleDispatch || r == RoleAudit {
		p.Publish = append(p.Publish, "key.*")
	} else {
		p.Never = append(p.Never,
			"$JS.API.STREAM.MSG.GET."+keys, "$JS.API.DIRECT.GET."+keys, "$JS.API.DIRECT.GET."+keys+".>",
			"$JS.API.CONSUMER.CREATE."+keys+".>", "$JS.API.CONSUMER.MSG.NEXT."+keys+".>")
	}
	if r == RoleAudit {
		p.Publish = append(p.Publish, "audit.>", "tlog.>", "salt.>")
		for _, s := range []string{events, dead, feedStream, stateStream} {
			p.Publish = append(p.Publish, "$JS.API.STREAM.MSG.DELETE."+s)
		}
	} else {
		p.Never = append(p.Never,
			"$JS.API.STREAM.MSG.GET."+stateStream, "$JS.API.DIRECT.GET."+stateStream, "$JS.API.DIRECT.GET."+stateStream+".>",
			"$JS.API.CONSUMER.CREATE."+stateStream+".>", "$JS.API.CONSUMER.MSG.NEXT."+stateStream+".>")
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
	switch r { // see Leases; reading them is everybody's
	case RoleDispatch:
		p.Publish = append(p.Publish, "$KV."+owners+".>")
	case RoleAudit:
		p.Publish = append(p.Publish, leaseNames+"*", leaseKeys+BuilderLease)
	}
	slices.Sort(p.Never)
	return p
}

// BuilderLease is the lease of the process that builds the audit's tree.
const BuilderLease = "audit.builder"

// SubscriberHears are the subjects on which a subscriber of a tenant hears the
// audit as it is stored.
func SubscriberHears(tenant string) []string {
	return []string{"audit." + tenant + ".>", checkpointSubject, cosignedSubject}
}

// SubscriberAsks are the subjects on which a subscriber asks: for what its own
// durable consumer has for it ([Audit.Subscriber]), and for checkpoints and tiles, also
// those that are not full: of the stream in which these lie nothing else can be asked
// for under their subjects.
func SubscriberAsks(name string) []string {
	return []string{
		"$JS.API.CONSUMER.INFO." + feedStream + "." + name,
		"$JS.API.CONSUMER.MSG.NEXT." + feedStream + "." + name,
		"$JS.ACK." + feedStream + "." + name + ".>",
		"$JS.API.DIRECT.GET." + auditStream + ".>",
		"$JS.API.DIRECT.GET." + stateStream + "." + edgeSubject + "*",
	}
}
