package cli

import (
	"context"
	"errors"
	"sync"

	"waybill.dev/bus"
	"waybill.dev/schemas"
	"waybill.dev/schemas/jsonrpc"
	"waybill.dev/workers/dispatch"
	"waybill.dev/workers/policy"
	"waybill.dev/workers/registry"
)

// approveNone is `approve:` of a server whose definitions are not pinned.
const approveNone = "none"

// pins is the registry of one process, for all its roles. It follows the records of
// the system; what dispatch sees of servers it stores with dispatch's rights.
type pins struct {
	*registry.Registry
	known chan struct{} // closed when the records that there were are known

	mu    sync.Mutex
	store *bus.System // as dispatch; nil without that role
}

// addPins: every process knows what is pinned before it decides, calls or shows.
func (g *gateway) addPins(ctx context.Context) error {
	l, err := g.open(ctx, bus.RoleObserver)
	if err != nil {
		return err
	}
	sys, err := l.System(ctx)
	if err != nil {
		return err
	}
	p := &pins{known: make(chan struct{})}
	o := registry.Options{
		Servers: map[string]registry.Mode{}, Trusted: map[string]bool{}, By: g.instance, Log: g.log,
		Store: func(ctx context.Context, name string, observation []byte) (uint64, error) {
			p.mu.Lock()
			sys := p.store
			p.mu.Unlock()
			if sys == nil {
				return 0, errNotStored
			}
			return sys.Append(ctx, registry.SeenKind, name, observation)
		},
	}
	for _, s := range g.c.Servers {
		switch s.Approve {
		case approveNone:
			continue
		case "":
			o.Servers[s.Name] = registry.FirstUse
		default:
			o.Servers[s.Name] = registry.Mode(s.Approve)
		}
		o.Trusted[s.Name] = s.Trust
	}
	if p.Registry, err = registry.New(o); err != nil {
		return err
	}
	g.pins = p
	up := g.up("registry")
	caught := sync.OnceFunc(func() { close(p.known) })
	g.workers = append(g.workers, part{"registry", func(ctx context.Context) error {
		return sys.Watch(ctx, []string{registry.SeenKind, registry.WordKind}, func(known bool) {
			if known {
				caught()
			}
			up.Store(known)
		}, func(_ context.Context, rec bus.Record) error {
			return p.Record(rec.Kind, rec.Name, rec.Seq, rec.Body)
		})
	}})
	return nil
}

// errNotStored: only dispatch hears servers, and so only it can record what they show.
var errNotStored = errors.New("this process has no role that may record what servers show")

// storeWith stores what is seen with the rights of dispatch.
func (p *pins) storeWith(ctx context.Context, l *bus.Log) error {
	sys, err := l.System(ctx)
	p.mu.Lock()
	defer p.mu.Unlock()
	p.store = sys
	return err
}

// await waits until the pins are known; false: ctx is done before.
func (p *pins) await(ctx context.Context) bool {
	select {
	case <-p.known:
		return true
	case <-ctx.Done():
		return false
	}
}

// defined is policy.Options.Defined.
func (p *pins) defined(q *schemas.Requested, arguments []byte) policy.Defined {
	a := p.Admit(q.Server, q.Method, q.Name, arguments)
	d := policy.Defined{SHA256: a.SHA256, Refused: a.Refused, Arguments: a.Arguments}
	if a.SHA256 != "" {
		d.Tool = toolFacts(a)
	}
	return d
}

func toolFacts(a registry.Admission) *policy.ToolFacts {
	h := a.Hints
	return &policy.ToolFacts{SHA256: a.SHA256, ReadOnly: h.ReadOnly, Destructive: h.Destructive, Idempotent: h.Idempotent, OpenWorld: h.OpenWorld}
}

// facts are those of a tool, or nil.
func (p *pins) facts(server, tool string) *policy.ToolFacts {
	a := p.Known(server, tool)
	if a.SHA256 == "" {
		return nil
	}
	return toolFacts(a)
}

// definitions are dispatch.Options.Definitions.
func (p *pins) definitions() *dispatch.Definitions {
	return &dispatch.Definitions{
		Pins: p.Pins, Listed: p.Listed, Said: p.Said, Presents: p.Presents, Heard: p.Heard, Answered: p.Answered,
		Admit: func(q *schemas.Requested, sha256 string, body []byte) (why string, unlisted bool) {
			if q.Method == "completion/complete" {
				return p.completes(q, body), false
			}
			if sha256 != "" {
				// Its arguments were looked at when it was decided on.
				a := p.Known(q.Server, q.Name)
				switch {
				case q.Method != "tools/call":
					a = p.Admit(q.Server, q.Method, q.Name, nil)
				case a.Refused == "" && a.SHA256 != sha256:
					a.Refused = "the tool has changed since the call was decided on"
				}
				return a.Refused, a.Unlisted
			}
			var args []byte
			var err error
			if q.Method == "tools/call" {
				args, err = policy.Arguments(body)
			}
			a := p.Admit(q.Server, q.Method, q.Name, args)
			if err != nil && a.SHA256 != "" && a.Arguments == "" {
				a.Arguments = "they cannot be read as an object"
			}
			if a.Refused == "" && a.Arguments != "" {
				a.Refused = "the arguments do not fit the tool's input schema: " + a.Arguments
			}
			return a.Refused, a.Unlisted
		},
	}
}

// completes says why a request for the values of an argument must not be made now.
func (p *pins) completes(q *schemas.Requested, body []byte) string {
	m, err := jsonrpc.Decode(body, jsonrpc.Limits{Bytes: len(body)})
	if err != nil {
		return "the request cannot be read"
	}
	ref := m.Params().Get("ref")
	kind, member := registry.Prompt, "name"
	if t, _ := ref.Get("type").Text(); t == "ref/resource" {
		kind, member = registry.Template, "uri"
	}
	name := q.Name // behind a front it is not as the request has it
	if name == "" {
		name, _ = ref.Get(member).Text()
	}
	return p.Completes(q.Server, kind, name)
}
