package cli

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"iter"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"slices"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sync/errgroup"

	"waybill.dev/bus"
	"waybill.dev/bus/embed"
	"waybill.dev/edge"
	"waybill.dev/edge/mcp"
	"waybill.dev/projections"
	"waybill.dev/schemas"
	"waybill.dev/schemas/jsonrpc"
	"waybill.dev/workers/dispatch"
)

// gateway is one process of the gateway: the parts of the data flow, in the
// order in which a call passes them.
//
//	agent → edge → log → policy → log → dispatch → log → edge → agent
//	               log → projections → ClickHouse
//
// A part is a blocking Run(ctx) error. The edges stop first, so that the calls
// they hold can end; then the workers; the log's server is last.
type gateway struct {
	c     *Config
	env   Env
	roles map[bus.Role]bool
	log   *slog.Logger
	fault func(e schemas.Event, stored bool) error // for tests, see bus.Options

	edges, workers []part
	logs           []*bus.Log
	front          *edge.Server
	agents         *mcp.Adapter
	dispatcher     *dispatch.Dispatcher
	policy         *rules // nil without that role
	pins           *pins
	metrics        *metrics
	server         projections.Server      // of the record; nil without
	engine         *projections.Engine     // the server, where it is the one inside
	record         *projections.Writer     // nil in a process that does not write it
	ready          map[string]*atomic.Bool // fixed before anything runs

	guards   guards   // who is asked about requests and answers
	guard    []string // what must have read the log before it may forget
	auditKey string   // the public key that signs
	keyring  auditKeyring
	anew     bool // the audit is begun anew
	dial     bus.Dialer
	lost     uint64 // newest sequence before an unclean boot, or 0
	instance string
}

type part struct {
	name string
	run  func(context.Context) error
}

// run builds the roles and keeps them until ctx is done or a part fails.
// started is called when every role works.
func (g *gateway) run(ctx context.Context, started func(*gateway, net.Addr, net.Addr)) (err error) {
	tune(g.env)
	g.ready = map[string]*atomic.Bool{}
	g.instance = string(schemas.NewReplica())
	if err := g.findRecord(ctx); err != nil {
		return err
	}
	closeLog, err := g.openLog(ctx)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, closeLog()) }()
	defer func() {
		for _, l := range g.logs {
			l.Close()
		}
	}()
	if g.metrics, err = newMetrics(g); err != nil {
		return err
	}
	if g.guards, err = g.c.openGuards(g.c.secret(g.env.Getenv)); err != nil {
		return err
	}
	defer g.guards.close()

	if err := g.addPins(ctx); err != nil {
		return fmt.Errorf("registry: %w", err)
	}
	public, admin, err := g.listeners()
	if err != nil {
		return err
	}
	for _, role := range []struct {
		name bus.Role
		add  func(context.Context, net.Listener) error
	}{
		{bus.RolePolicy, g.addPolicy},
		{bus.RoleDispatch, g.addDispatch},
		{bus.RoleAudit, g.addAudit},
		{bus.RoleEdge, g.addEdge},
		{bus.RoleProject, g.addRecord},
	} {
		if !g.roles[role.name] {
			continue
		}
		if err := role.add(ctx, public); err != nil {
			return fmt.Errorf("role %s: %w", role.name, err)
		}
	}
	if g.roles[bus.RoleProject] {
		if err := g.addTraces(ctx); err != nil {
			return fmt.Errorf("traces: %w", err)
		}
	}
	if err := g.addAdmin(ctx, admin); err != nil {
		return fmt.Errorf("admin: %w", err)
	}

	// Edges, then workers: each group ends before the next is told to.
	failed, fail := context.WithCancelCause(ctx)
	defer fail(nil)
	lasting, stopWorkers := context.WithCancel(context.WithoutCancel(ctx))
	defer stopWorkers()
	var edges, workers errgroup.Group
	spawn := func(group *errgroup.Group, ctx context.Context, p part) {
		group.Go(func() error {
			err := p.run(ctx)
			if err != nil {
				err = fmt.Errorf("%s: %w", p.name, err)
			} else if ctx.Err() == nil {
				err = fmt.Errorf("%s ended by itself", p.name)
			}
			fail(err)
			return err
		})
	}
	for _, p := range g.workers {
		spawn(&workers, lasting, p)
	}
	for _, p := range g.edges {
		spawn(&edges, failed, p)
	}
	if g.awaitReady(failed) && started != nil {
		var at net.Addr
		if public != nil {
			at = public.Addr()
		}
		started(g, at, admin.Addr())
	}
	<-failed.Done()
	if ctx.Err() != nil {
		g.log.Info("stopping: calls in flight may finish", "within", g.c.Limits.Drain.Duration)
	}
	edgesErr := edges.Wait()
	stopWorkers()
	return errors.Join(edgesErr, workers.Wait())
}

// openLog starts the embedded server, or takes the external one, and sets up
// the streams.
func (g *gateway) openLog(ctx context.Context) (func() error, error) {
	if g.c.Bus.URL != "" {
		g.dial = bus.URL(g.c.Bus.URL, g.c.Bus.Creds)
		return func() error { return nil }, bus.Setup(ctx, g.options(bus.RoleAdmin))
	}
	e := g.c.Bus.Embedded
	every, always, err := e.sync()
	if err != nil {
		return nil, err
	}
	var subscribers []embed.Subscriber
	for _, s := range g.c.Audit.Subscribers {
		subscribers = append(subscribers, embed.Subscriber{Name: s.Name, Tenant: string(s.Tenant)})
	}
	srv, err := embed.Start(embed.Options{
		Subscribers: subscribers,
		Dir:         filepath.Join(g.c.Data, "log"), Sync: every, SyncAlways: always,
		Listen: e.Listen, KeyFile: e.KeyFile, Log: g.log,
	})
	if err != nil {
		return nil, err
	}
	g.dial = srv.Connect
	if g.anew {
		if err := g.anewAudit(ctx); err != nil {
			return nil, errors.Join(err, srv.Close())
		}
	}
	if err = bus.Setup(ctx, g.options(bus.RoleAdmin)); err == nil && srv.Unclean() && !always {
		var l *bus.Log
		if l, err = g.open(ctx, bus.RoleObserver); err == nil {
			g.lost, err = l.Last(ctx)
			g.log.Warn("the machine went down while the gateway ran: calls of then that cannot be repeated will end as unknown", "up_to_sequence", g.lost)
		}
	}
	if err != nil {
		return nil, errors.Join(err, srv.Close())
	}
	return srv.Close, nil
}

func (g *gateway) options(r bus.Role) bus.Options {
	return bus.Options{
		Dial: g.dial, Role: r, Replicas: g.c.Bus.Replicas,
		MaxBytes: g.c.Bus.MaxBytes, MaxAge: g.c.Bus.MaxAge.Duration,
		FeedBytes: g.c.Audit.MaxBytes, FeedAge: g.c.Audit.Keep.Duration,
		Guard: g.guard, Leases: g.c.Bus.URL != "",
		Log: g.log, Fault: g.fault,
	}
}

func (g *gateway) open(ctx context.Context, r bus.Role) (*bus.Log, error) {
	l, err := bus.Open(ctx, g.options(r))
	if err == nil {
		g.logs = append(g.logs, l)
	}
	return l, err
}

// listeners takes the sockets before anything runs, so that a port in use is
// said at once.
func (g *gateway) listeners() (public, admin net.Listener, err error) {
	if g.roles[bus.RoleEdge] {
		if public, err = net.Listen("tcp", g.c.Listen); err != nil {
			return nil, nil, inUse("listen", g.c.Listen, err)
		}
	}
	if admin, err = net.Listen("tcp", g.c.Admin); err != nil {
		if public != nil {
			_ = public.Close()
		}
		return nil, nil, inUse("admin", g.c.Admin, err)
	}
	return public, admin, nil
}

// inUse words the usual error of a listener.
func inUse(key, addr string, err error) error {
	if errors.Is(err, syscall.EADDRINUSE) {
		return fmt.Errorf("%s: %s is in use: stop what listens there, or set another `%s:`", key, addr, key)
	}
	return fmt.Errorf("%s: %w", key, err)
}

// up makes a flag of readiness.
func (g *gateway) up(name string) *atomic.Bool {
	b := new(atomic.Bool)
	g.ready[name] = b
	return b
}

// awaitReady waits until every part works.
func (g *gateway) awaitReady(ctx context.Context) bool {
	t := time.NewTicker(10 * time.Millisecond)
	defer t.Stop()
	for g.notReady() != "" {
		select {
		case <-ctx.Done():
			return false
		case <-t.C:
		}
	}
	return true
}

// notReady names what does not work, or "".
func (g *gateway) notReady() string {
	for name, up := range g.ready {
		if !up.Load() {
			return name
		}
	}
	for _, l := range g.logs {
		if !l.Connected() {
			return "log"
		}
		if why := l.Stuck(); why != "" {
			return why
		}
	}
	return ""
}

// addDispatch: authorized → (started) → (progressed)* → an ending.
func (g *gateway) addDispatch(ctx context.Context, _ net.Listener) error {
	l, err := g.open(ctx, bus.RoleDispatch)
	if err != nil {
		return err
	}
	servers, err := g.c.upstreams(g.env.Getenv, g.c.secret(g.env.Getenv))
	if err != nil {
		return err
	}
	ask, err := g.addFronts(ctx)
	if err != nil {
		return err
	}
	stateKey, err := g.stateKey(ctx, l)
	if err != nil {
		return err
	}
	owners, leases, err := g.addLeases(ctx, l)
	if err != nil {
		return err
	}
	judge, err := newJudge(ctx, l, g.pins)
	if err != nil {
		return err
	}
	if err := g.pins.storeWith(ctx, l); err != nil {
		return err
	}
	secrets, err := g.c.secretRules()
	if err != nil {
		return err
	}
	d, err := dispatch.New(dispatch.Options{
		Definitions: g.pins.definitions(),
		StateKey:    stateKey, Owners: owners, Flags: g.traceFlags(), Traced: g.c.Traces.on(g.env.Getenv),
		Servers: servers, Load: l.Load, Past: l.Past, Latest: l.Latest, Store: l.Publish,
		Scan: func(ctx context.Context, t schemas.Tenant, s schemas.SessionKey, k schemas.Kind) iter.Seq2[schemas.Event, error] {
			return l.Read(ctx, bus.Filter{Tenant: t, Session: s, Kinds: []schemas.Kind{k}}, 1)
		},
		Answers: g.c.Answers.rules(), SecretRules: secrets, Guard: g.guards.ask("answer"),
		Ask: ask, Fronts: g.c.fronts(), Fanout: g.c.fanout(), Version: programVersion(),
		// A tenant has half of them: with one server, one for each session it may have.
		TaskPatience: g.c.Limits.TaskPatience.Duration,
		MaxSessions:  max(10_000, 2*g.c.Limits.SessionsPerTenant),
		Shows:        judge.shows,
		Lost:         func(e schemas.Event) bool { return e.Seq <= g.lost },
		Instance:     g.instance, Duplicates: bus.Duplicates, Now: time.Now, Log: g.log,
	})
	if err != nil {
		return err
	}
	g.dispatcher = d
	// The leases go last: what is held is let go of before others may take over.
	holding, letGo := context.WithCancel(context.WithoutCancel(ctx))
	if leases != nil {
		ready := g.up("leases")
		g.workers = append(g.workers, part{"leases", func(context.Context) error {
			return leases.Run(holding, func(up bool) {
				if ready.Store(up); up {
					d.Regained()
				} else {
					d.Lapsed()
				}
			}, d.Died)
		}})
	}
	ready, cancels := g.up("dispatch"), g.up("cancel")
	g.workers = append(g.workers,
		part{"dispatch", func(ctx context.Context) error {
			defer letGo()
			defer d.Close()
			defer context.AfterFunc(ctx, d.Drain)()
			if !g.pins.await(ctx) {
				return nil
			}
			return l.Run(ctx, bus.Work{
				Name: "dispatch", Kinds: []schemas.Kind{schemas.KindAuthorized}, InFlight: 4096,
				Drain: g.c.Limits.Drain.Duration, Up: ready.Store,
			}, d.Handle)
		}},
		part{"cancel", func(ctx context.Context) error {
			// Wishes that were stored while nobody listened count for the
			// calls that are still open; and sessions that were closed then
			// are still open at the upstreams.
			after, err := l.Floor(ctx, "dispatch")
			if err != nil {
				return err
			}
			return l.Follow(ctx, bus.Filter{Kinds: dispatch.Heard()}, after, cancels.Store,
				func(ctx context.Context, e schemas.Event) error { return d.Hear(ctx, e, l.Publish) })
		}},
	)
	return nil
}

// addLeases: what only one of several dispatchers may hold. With a log of its own
// this process is the only one.
func (g *gateway) addLeases(ctx context.Context, l *bus.Log) (dispatch.Owners, *bus.Leases, error) {
	if g.c.Bus.URL == "" {
		return nil, nil, nil
	}
	leases, err := l.Leases(ctx, g.instance)
	if err != nil {
		return nil, nil, err
	}
	return leases, leases, nil
}

// addFronts: requested → … → an ending, for the calls that a front makes of the
// servers behind it. They are requested as an edge requests, and their endings
// addressed to this process, under a name that no other has had.
func (g *gateway) addFronts(ctx context.Context) (schemas.Handler, error) {
	l, err := g.open(ctx, bus.RoleEdge)
	if err != nil {
		return nil, err
	}
	asker := l.Asker(schemas.Replica(g.instance))
	ready := g.up("fronts")
	stopping, stop := context.WithCancelCause(context.WithoutCancel(ctx))
	g.workers = append(g.workers, part{"fronts", func(ctx context.Context) error {
		// Nobody hears of the calls' endings any more, so nobody waits for them.
		defer stop(errStopping)
		return asker.Run(ctx, ready.Store)
	}})
	return g.metrics.children(func(ctx context.Context, e schemas.Event, emit schemas.Emit) error {
		ctx, cancel := context.WithCancelCause(ctx)
		defer cancel(nil)
		defer context.AfterFunc(stopping, func() { cancel(errStopping) })()
		return asker.Ask(ctx, e, emit)
	}), nil
}

// addEdge: the listener, and one adapter for each protocol.
func (g *gateway) addEdge(ctx context.Context, ln net.Listener) error {
	l, err := g.open(ctx, bus.RoleEdge)
	if err != nil {
		return err
	}
	replica, err := g.replica()
	if err != nil {
		return err
	}
	asker := l.Asker(replica)
	deadline := map[string]time.Duration{}
	for _, s := range g.c.Servers {
		deadline[s.Name] = s.Deadline.Duration
	}
	actsAs := map[string][]string{}
	for _, s := range g.c.Servers {
		actsAs[s.Name] = s.ActsAs
	}
	// Every protocol stands in this list.
	var routes []edge.Route
	g.agents = mcp.New(mcp.Options{
		Ask: g.metrics.observe(asker.Ask), Store: l.Publish, Edge: replica,
		Follow: asker.Follow, Load: l.Load, Latest: l.Latest, Shared: g.c.Bus.URL != "",
		Asked: func(ctx context.Context, t schemas.Tenant, s schemas.SessionKey, id string) (schemas.Event, error) {
			for e, err := range l.Read(ctx, bus.Filter{Tenant: t, Session: s, Kinds: []schemas.Kind{schemas.KindAsked}}, 0) {
				if err != nil && !errors.Is(err, bus.ErrUndecodable) {
					return schemas.Event{}, err
				}
				if a, ok := e.Data.(*schemas.Asked); err == nil && ok && a.ID == id {
					return e, nil
				}
			}
			return schemas.Event{}, schemas.ErrNotFound
		},
		Scan: func(ctx context.Context, t schemas.Tenant, s schemas.SessionKey, k schemas.Kind, after uint64) iter.Seq2[schemas.Event, error] {
			return l.Read(ctx, bus.Filter{Tenant: t, Session: s, Kinds: []schemas.Kind{k}}, after+1)
		},
		Sessions: func(ctx context.Context, emit schemas.Emit) error {
			return l.Follow(ctx, bus.Filter{Kinds: []schemas.Kind{schemas.KindOpened, schemas.KindClosed}}, 0, nil,
				func(ctx context.Context, e schemas.Event) error { _, err := emit(ctx, e); return err })
		},
		Task: func(ctx context.Context, first schemas.Event) iter.Seq2[schemas.Event, error] {
			return l.Read(ctx, bus.Filter{Tenant: first.Tenant, Session: first.Session, To: first.Edge}, first.Seq+1)
		},
		Tasked: func(ctx context.Context, t schemas.Tenant, after uint64) iter.Seq2[schemas.Event, error] {
			return l.Read(ctx, bus.Filter{Tenant: t, Kinds: []schemas.Kind{schemas.KindTasked}}, after+1)
		},
		TaskTime: g.c.Limits.Task.Duration, Tasks: g.c.tasksAt(),
		BySpan: l.BySpan, Flags: g.traceFlags(),
		ActsAs: func(server string, as schemas.Agent) bool { return slices.Contains(actsAs[server], string(as)) },
		Fronts: g.c.fronts(),
		SessionLimits: mcp.SessionLimits{
			Idle: g.c.Limits.SessionIdle.Duration, Max: g.c.Limits.SessionMax.Duration,
			PerAgent: g.c.Limits.SessionsPerAgent, PerTenant: g.c.Limits.SessionsPerTenant,
		},
		Deadline: func(server, _ string) time.Duration {
			if d := deadline[server]; d > 0 {
				return d
			}
			return g.c.Limits.Deadline.Duration
		},
		Now: time.Now, Limits: jsonrpc.Limits{Bytes: int(g.c.Limits.Body)}, Log: g.log,
	})
	routes = append(routes, g.agents.Routes()...)

	tokens, anonymous := g.c.principals()
	g.front, err = edge.New(edge.Options{
		Hosts: g.c.Hosts, Origins: g.c.Origins, Tokens: tokens, Anonymous: anonymous,
		MaxBody: g.c.Limits.Body, MaxInFlight: g.c.Limits.InFlight, MaxInFlightTenant: g.c.Limits.InFlightTenant,
		MaxStreams: g.c.Limits.Streams, MaxStreamsTenant: g.c.Limits.StreamsTenant,
		DrainTimeout: g.c.Limits.Drain.Duration, Log: g.log,
	}, routes...)
	if err != nil {
		return err
	}
	ready := g.up("edge")
	g.workers = append(g.workers,
		part{"answers", func(ctx context.Context) error { return asker.Run(ctx, ready.Store) }},
		part{"sessions", g.agents.Run},
		part{"watch", func(ctx context.Context) error { return l.Watch(ctx, time.Second) }},
	)
	g.edges = append(g.edges, part{"edge", func(ctx context.Context) error { return g.front.Run(ctx, ln) }})
	return nil
}

// stateKey is the key that seals what clients bring back to calls that asked for
// input. It is kept, so that a client that comes back after a restart is told
// what became of its call, and not that it made something up.
func (g *gateway) stateKey(ctx context.Context, l *bus.Log) ([]byte, error) {
	const size = 32
	if g.c.Bus.URL != "" {
		return l.Key(ctx, "state", size) // the same for all replicas
	}
	file := filepath.Join(g.c.Data, "state.key")
	b, err := os.ReadFile(file)
	switch {
	case err == nil && len(b) == size:
		return b, nil
	case err == nil:
		return nil, fmt.Errorf("%s: has %d bytes, not %d: remove it, and what clients are about to bring back is lost", file, len(b), size)
	case !errors.Is(err, os.ErrNotExist):
		return nil, fmt.Errorf("the key of requestState: %w", err)
	}
	if err := os.MkdirAll(g.c.Data, 0o700); err != nil {
		return nil, fmt.Errorf("the key of requestState: %w", err)
	}
	b = make([]byte, size)
	_, _ = rand.Read(b) // never fails
	// Whole or not at all: a part of it would stop the next start.
	if err := os.WriteFile(file+".new", b, 0o600); err != nil {
		return nil, fmt.Errorf("the key of requestState: %w", err)
	}
	return b, os.Rename(file+".new", file)
}

// replica is this edge's name, kept over restarts.
func (g *gateway) replica() (schemas.Replica, error) {
	file := filepath.Join(g.c.Data, "replica")
	b, err := os.ReadFile(file)
	if err == nil && schemas.CheckToken(string(b)) == nil {
		return schemas.Replica(b), nil
	}
	r := schemas.NewReplica()
	if err := os.MkdirAll(g.c.Data, 0o700); err != nil {
		return "", err
	}
	return r, os.WriteFile(file, []byte(r), 0o600)
}
