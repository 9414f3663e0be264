package cli

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/signal"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"waybill.dev/bus"
	"waybill.dev/schemas"
	"waybill.dev/workers/policy"
)

// The policy in force is a record of the system: policy.active, with the digest
// of a bundle, which is a content of it. Who has files of rules stores the bundle
// and the record when they change; every policy worker follows the records, and
// so all have the same, each call being decided by one.
const (
	policyKind   = "policy"
	activePolicy = "active"
)

// activation is a record that puts a bundle in force.
type activation struct {
	SHA256 string    `json:"sha256"`
	By     string    `json:"by"` // the process
	Rules  int       `json:"rules"`
	At     time.Time `json:"at"`
}

// addPolicy: requested → authorized | denied | held → authorized | denied.
func (g *gateway) addPolicy(ctx context.Context, _ net.Listener) error {
	l, err := g.open(ctx, bus.RolePolicy)
	if err != nil {
		return err
	}
	sys, err := l.System(ctx)
	if err != nil {
		return err
	}
	groups := map[schemas.Agent][]string{}
	tenants := map[schemas.Agent]schemas.Tenant{}
	for _, a := range g.c.Agents {
		groups[a.ID], tenants[a.ID] = append([]string{}, a.Groups...), a.Tenant
	}
	p, err := policy.New(policy.Options{
		Past: l.Past, Duplicates: bus.Duplicates,
		Groups: func(t schemas.Tenant, a schemas.Agent) []string {
			if tenants[a] != t {
				return nil
			}
			return groups[a]
		},
		Session: (&counted{l: l, of: map[sessionOf]*countedSession{}}).session,
		Defined: g.pins.defined,
		Guard:   g.guards.ask("request"),
		Load:    l.Load, Store: l.Publish,
		Claim: func(ctx context.Context, id string, use []byte, last uint64) (uint64, error) {
			return sys.AppendAfter(ctx, policy.UseKind, id, use, last)
		},
		Now: time.Now, Log: g.log,
	})
	if err != nil {
		return err
	}
	r := &rules{g: g, l: l, sys: sys, p: p, known: make(chan struct{}), limits: make(chan uint64, 1)}
	if g.policy, err = r, r.load(ctx); err != nil {
		return err
	}
	ready, following, held := g.up("policy"), g.up("policy rules"), g.up("approvals")
	g.workers = append(g.workers,
		part{"rules", func(ctx context.Context) error { return r.follow(ctx, following.Store) }},
		part{"late rules", r.retake},
		part{"rule files", r.watch},
		part{"limits", r.count},
		part{"held", func(ctx context.Context) error {
			return l.Follow(ctx, bus.Filter{Kinds: []schemas.Kind{schemas.KindHeld, schemas.KindCancel, schemas.KindClosed}}, 0, held.Store, p.Heard)
		}},
		part{"approvals", func(ctx context.Context) error {
			select {
			case <-ctx.Done():
				return nil
			case <-r.known:
				return p.Run(ctx)
			}
		}},
		part{"policy", func(ctx context.Context) error {
			select { // what is in force and what was approved is known first
			case <-ctx.Done():
				return nil
			case <-r.known:
			}
			if !g.pins.await(ctx) {
				return nil
			}
			return l.Run(ctx, bus.Work{
				Name: "policy", Kinds: []schemas.Kind{schemas.KindRequested}, InFlight: 256,
				Drain: g.c.Limits.Drain.Duration, Up: ready.Store,
			}, p.Handle)
		}},
	)
	return nil
}

// counted is what was decided in sessions, as far as the log was read for it. Rules
// that ask for it read only what has come since.
type counted struct {
	l *bus.Log

	mu sync.Mutex
	of map[sessionOf]*countedSession
}

type sessionOf struct {
	tenant schemas.Tenant
	key    schemas.SessionKey
}

type countedSession struct {
	mu    sync.Mutex
	upTo  uint64 // the sequence
	facts policy.SessionFacts
}

// maxCounted is of how many sessions the counts are kept.
const maxCounted = 10_000

// session counts what was decided in the session of a request so far.
func (c *counted) session(ctx context.Context, e schemas.Event) (*policy.SessionFacts, error) {
	id := sessionOf{e.Tenant, e.Session}
	c.mu.Lock()
	s := c.of[id]
	if s == nil {
		if len(c.of) >= maxCounted {
			clear(c.of)
		}
		s = &countedSession{}
		c.of[id] = s
	}
	c.mu.Unlock()
	s.mu.Lock()
	defer s.mu.Unlock()
	of := bus.Filter{Tenant: e.Tenant, Session: e.Session, Kinds: []schemas.Kind{schemas.KindAuthorized, schemas.KindDenied}}
	for e, err := range c.l.Read(ctx, of, s.upTo+1) {
		if errors.Is(err, bus.ErrUndecodable) {
			continue
		}
		if err != nil {
			return nil, err
		}
		s.upTo = e.Seq
		switch d := e.Data.(type) {
		case *schemas.Authorized:
			for _, label := range d.Labels {
				s.facts.Labels = with(s.facts.Labels, label)
			}
			if d.Method == "tools/call" {
				s.facts.Calls++
				s.facts.Tools = with(s.facts.Tools, d.Server+"/"+d.Name)
			}
		case *schemas.Denied:
			s.facts.Denied++
		}
	}
	f := s.facts
	f.Tools, f.Labels = append([]string{}, f.Tools...), slices.Clone(f.Labels)
	return &f, nil
}

// with is a sorted list with a value that it has once.
func with(sorted []string, value string) []string {
	at, found := slices.BinarySearch(sorted, value)
	if found {
		return sorted
	}
	return slices.Insert(sorted, at, value)
}

// rules keeps the policy of one process: its files, and what is in force.
type rules struct {
	g      *gateway
	l      *bus.Log
	sys    *bus.System
	p      *policy.Policy
	known  chan struct{} // closed when the records that there were are known
	limits chan uint64   // told from where on decisions are to be counted, when rules first limit

	counting atomic.Bool
	broken   atomic.Pointer[string] // what is wrong with the files; nil: nothing
	loads    atomic.Int64           // bundles put in force
	failures atomic.Int64           // times that one could not be

	taking sync.Mutex  // held while an activation is taken
	newest uint64      // sequence of the newest one
	late   *bus.Record // it, if its bundle could not be had

	// Owned by watch, after load.
	files  string // how the files looked when they were last read
	before string // how they looked the last time
	again  bool   // what was tried then has failed, and may not the next time
}

// load reads the files when the process starts, and puts them in force, unless
// others have come after them: a process that starts again with what was
// replaced long ago must not bring it back.
func (r *rules) load(ctx context.Context) error {
	r.files = r.look()
	r.before = r.files
	b, encoded, err := r.g.c.compilePolicy()
	if err != nil {
		return err
	}
	active, err := r.sys.Latest(ctx, policyKind, activePolicy)
	switch {
	case errors.Is(err, schemas.ErrNotFound):
	case err != nil:
		return err
	default:
		var now activation
		if err := json.Unmarshal(active.Body, &now); err == nil && now.SHA256 == b.Digest {
			return r.activate(ctx, b)
		}
		if r.g.c.Bus.URL != "" {
			_, err := r.sys.Get(ctx, b.Digest)
			seen, err := wasSeen(err)
			if err != nil {
				return fmt.Errorf("whether the rules of this process are new: %w", err)
			}
			if seen {
				r.g.log.Warn("the rules of this process were replaced by others, which stay in force; SIGHUP puts these in force again",
					"these", b.Digest, "in_force", now.SHA256)
				return nil
			}
		}
	}
	return r.publish(ctx, b, encoded)
}

// wasSeen tells of the error with which a bundle was looked for whether the log has
// had it. Only that it has not makes it new: one that cannot be read may be an old
// one.
func wasSeen(err error) (bool, error) {
	if errors.Is(err, schemas.ErrNotFound) {
		return false, nil
	}
	return err == nil, err
}

// publish stores a bundle and puts it in force everywhere.
func (r *rules) publish(ctx context.Context, b *policy.Bundle, encoded []byte) error {
	if _, err := r.sys.Put(ctx, encoded); err != nil {
		return fmt.Errorf("store the policy: %w", err)
	}
	body, err := json.Marshal(activation{SHA256: b.Digest, By: r.g.instance, Rules: b.Rules(), At: time.Now().UTC()})
	if err != nil {
		return err
	}
	if _, err := r.sys.Append(ctx, policyKind, activePolicy, body); err != nil {
		return fmt.Errorf("put the policy in force: %w", err)
	}
	return nil
}

// activate puts a bundle in force here. The first that limits waits until what
// was decided before is counted.
func (r *rules) activate(ctx context.Context, b *policy.Bundle) error {
	if before := r.p.Bundle(); before != nil && before.Digest == b.Digest {
		return nil
	}
	if b.Limits() && !r.counting.Load() {
		from, err := r.l.Last(ctx)
		if err != nil {
			return err
		}
		since := time.Now().Add(-policy.LongestLimit)
		for e, err := range r.l.ReadSince(ctx, bus.Filter{Kinds: []schemas.Kind{schemas.KindAuthorized}}, since) {
			if errors.Is(err, bus.ErrUndecodable) {
				continue
			}
			if err == nil {
				err = r.p.Heard(ctx, e)
			}
			if err != nil {
				return fmt.Errorf("count what was decided before: %w", err)
			}
		}
		r.counting.Store(true)
		r.limits <- from
	}
	r.p.Activate(b)
	r.loads.Add(1)
	r.g.log.Info("policy in force", "sha256", b.Digest, "rules", b.Rules())
	return nil
}

// count hears what others decide, once there are limits.
func (r *rules) count(ctx context.Context) error {
	select {
	case <-ctx.Done():
		return nil
	case from := <-r.limits:
		return r.l.Follow(ctx, bus.Filter{Kinds: []schemas.Kind{schemas.KindAuthorized}}, from, nil, r.p.Heard)
	}
}

// follow takes the records of the system.
func (r *rules) follow(ctx context.Context, up func(bool)) error {
	caught := sync.OnceFunc(func() { close(r.known) })
	var latest *bus.Record // of the activations, until all are known: only the last counts
	all := false
	take := func(ctx context.Context, rec bus.Record) error {
		if rec.Kind != policyKind {
			return r.p.Record(rec.Kind, rec.Name, rec.Seq, rec.Body)
		}
		if latest = &rec; !all {
			return nil
		}
		return r.take(ctx, rec)
	}
	return r.sys.Watch(ctx, []string{policyKind, policy.WordKind, policy.UseKind}, func(known bool) {
		if all = known; known {
			if latest != nil {
				for ctx.Err() == nil {
					err := r.take(ctx, *latest)
					if err == nil || r.p.Bundle() != nil {
						break
					}
					r.g.log.Error("the policy in force cannot be had, so nothing is decided", "error", err)
					select {
					case <-ctx.Done():
					case <-time.After(time.Second):
					}
				}
			}
			if r.p.Bundle() != nil {
				caught()
			}
		}
		up(known && r.p.Bundle() != nil)
	}, take)
}

// take puts in force what a record says, unless a newer one was taken. If it
// cannot, what is in force stays; where that is not the record's or the bundle's
// fault, it is tried again.
func (r *rules) take(ctx context.Context, rec bus.Record) error {
	if rec.Name != activePolicy {
		return nil
	}
	r.taking.Lock()
	defer r.taking.Unlock()
	if rec.Seq < r.newest {
		return nil
	}
	r.newest, r.late = rec.Seq, nil
	worthAnother, err := r.obey(ctx, rec)
	if err == nil {
		return nil
	}
	if worthAnother {
		r.late = &rec
	}
	r.failures.Add(1)
	return fmt.Errorf("policy of record %d: %w", rec.Seq, err)
}

func (r *rules) obey(ctx context.Context, rec bus.Record) (worthAnother bool, err error) {
	var a activation
	if err := json.Unmarshal(rec.Body, &a); err != nil {
		return false, err
	}
	encoded, err := r.sys.Get(ctx, a.SHA256)
	if err != nil {
		return true, err
	}
	b, err := policy.Compile(encoded)
	if err != nil {
		return false, err
	}
	return true, r.activate(ctx, b)
}

// retake takes an activation that could not be taken, until it can.
func (r *rules) retake(ctx context.Context) error {
	t := time.NewTicker(time.Second)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-t.C:
		}
		r.taking.Lock()
		late := r.late
		r.taking.Unlock()
		if late == nil {
			continue
		}
		if err := r.take(ctx, *late); err != nil && ctx.Err() == nil {
			r.g.log.Error("another policy was put in force and cannot be had; the former is in force here still", "error", err)
		}
	}
}

func bundleOf(ctx context.Context, sys *bus.System, digest string) (*policy.Bundle, error) {
	encoded, err := sys.Get(ctx, digest)
	if err != nil {
		return nil, err
	}
	return policy.Compile(encoded)
}

// lookEvery is how often it is looked at the files.
const lookEvery = 500 * time.Millisecond

// watch reads the files again when they have changed, or on SIGHUP. Files that
// do not compile change nothing; what fails for another reason is tried again.
func (r *rules) watch(ctx context.Context) error {
	hup := make(chan os.Signal, 1)
	signal.Notify(hup, syscall.SIGHUP)
	defer signal.Stop(hup)
	t := time.NewTicker(lookEvery)
	defer t.Stop()
	for {
		asked := false
		select {
		case <-ctx.Done():
			return nil
		case <-hup:
			asked = true
		case <-t.C:
		}
		now := r.look()
		if !r.due(now, asked) {
			continue
		}
		err := r.reload(ctx, now, asked)
		if errors.Is(err, errMoving) {
			continue
		}
		r.files, r.again = now, false
		if err != nil && ctx.Err() == nil {
			text := err.Error()
			r.again = r.worthAnother(err)
			r.broken.Store(&text)
			r.failures.Add(1)
			r.g.log.Error("the rules were changed and cannot be put in force; the former stay", "error", err)
			continue
		}
		r.broken.Store(nil)
	}
}

// due tells whether the files are to be read again, by how they look now: otherwise
// than when they were last read, and as they did the time before. While they are being
// saved, one may be away or half written, and what is there without it be whole rules,
// of which nothing forbids what it forbids.
func (r *rules) due(now string, asked bool) bool {
	settled := now == r.before
	r.before = now
	return asked || settled && (now != r.files || r.again)
}

// errMoving: the files have changed between two looks at them.
var errMoving = errors.New("the files of rules are being changed")

// worthAnother tells whether to try again what has failed, though the files stay as
// they are: not if it is they that are wrong, or that cannot be read, which look
// sees the end of.
func (r *rules) worthAnother(err error) bool {
	return !errors.As(err, new(badRules)) && !strings.HasPrefix(r.files, unreadable)
}

func (r *rules) reload(ctx context.Context, look string, asked bool) error {
	b, encoded, err := r.g.c.compilePolicy()
	if err != nil {
		return err
	}
	if !asked && len(r.g.c.Policies) > 0 && lookOf(b.Source.Files) != look {
		return errMoving
	}
	if now := r.p.Bundle(); now != nil && now.Digest == b.Digest {
		if asked {
			r.g.log.Info("the rules are what is in force already", "sha256", b.Digest)
		}
		return nil
	}
	return r.publish(ctx, b, encoded)
}

// unreadable begins how files look that cannot be read.
const unreadable = "error: "

// look is how the files look from outside, to see that they have changed.
func (r *rules) look() string {
	if len(r.g.c.Policies) == 0 {
		return ""
	}
	files, err := r.g.c.ruleFiles(false)
	if err != nil {
		return unreadable + err.Error()
	}
	return lookOf(files)
}

func lookOf(files []policy.File) string {
	files = slices.SortedFunc(slices.Values(files), func(a, b policy.File) int { return strings.Compare(a.Name, b.Name) })
	h := sha256.New()
	for _, f := range files {
		_, _ = fmt.Fprintf(h, "%q %d %s", f.Name, len(f.Text), f.Text)
	}
	return hex.EncodeToString(h.Sum(nil))
}

// judge tells of single tools whether a list may show them, as the bundle says by
// which the list was permitted.
type judge struct {
	sys  *bus.System
	pins *pins

	mu      sync.Mutex
	bundles map[string]*policy.Bundle // some of them, by digest
}

func newJudge(ctx context.Context, l *bus.Log, p *pins) (*judge, error) {
	sys, err := l.System(ctx)
	return &judge{sys: sys, pins: p, bundles: map[string]*policy.Bundle{}}, err
}

// shows is dispatch.Options.Shows.
func (j *judge) shows(ctx context.Context, authorized schemas.Event) (func(string) bool, error) {
	a, ok := authorized.Data.(*schemas.Authorized)
	if !ok {
		return nil, fmt.Errorf("call %s is not authorized", authorized.Call)
	}
	b, err := j.bundle(ctx, a.PolicySHA256)
	if err != nil {
		return nil, fmt.Errorf("the policy of call %s: %w", authorized.Call, err)
	}
	facts, err := policy.FactsOf(a.Facts)
	if err != nil {
		return nil, fmt.Errorf("call %s: %w", authorized.Call, err)
	}
	authorized.Stored = a.RequestedAt // the time that its request was decided on
	return func(name string) bool {
		facts := facts
		facts.Tool = j.pins.facts(a.Server, name)
		return b.Shows(authorized, facts, name)
	}, nil
}

func (j *judge) bundle(ctx context.Context, digest string) (*policy.Bundle, error) {
	j.mu.Lock()
	b := j.bundles[digest]
	j.mu.Unlock()
	if b != nil {
		return b, nil
	}
	b, err := bundleOf(ctx, j.sys, digest)
	if err != nil {
		return nil, err
	}
	j.mu.Lock()
	defer j.mu.Unlock()
	if len(j.bundles) >= 8 {
		clear(j.bundles)
	}
	j.bundles[digest] = b
	return b, nil
}
