package bus

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"waybill.dev/schemas"
)

// Leases say who holds what only one process can hold, such as the stream of a
// session at a server. They are a KV bucket with two sorts of keys:
//
//	live.<name>   the process lives: written every 2 s, and gone 15 s (Options.LeaseTTL) after the last time
//	own.<key>     who owns it: the name of a process
//
// What a process owns is its own until it releases it, or has not lived for
// that time: then whoever comes first takes over. By its own clock a process
// stops being an owner earlier ([Leases.Holds]), so that there are never two.
// A key costs one write when it is acquired, and one reading and one write when it
// is released.
type Leases struct {
	l      *Log
	name   string
	stream jetstream.Stream

	ttl, beats time.Duration
	// spare is how much earlier a process takes itself for dead than others may:
	// what it does in that time it does as the owner.
	spare time.Duration

	mu    sync.Mutex
	holds time.Time        // until when this process lives for all the others, by its own clock
	since uint64           // the log's position when it began to, without a break
	peers map[string]*peer // others, alive as far as is known here
}

// peer is another process.
type peer struct {
	heard time.Time
	gone  chan struct{}
}

const (
	owners     = "OWNERS"
	ownersKV   = "KV_" + owners
	leaseKeys  = "$KV." + owners + ".own."
	leaseNames = "$KV." + owners + ".live."

	// leaseTTL is longer than the election of a new leader takes (up to 9 s):
	// the death of a NATS server must not look like that of a gateway.
	leaseTTL = 15 * time.Second
	// ownedFor is when a key goes that nobody has released.
	ownedFor = 48 * time.Hour
)

// ErrNotHeld: this process is not known to live, and owns nothing.
var ErrNotHeld = errors.New("this process has lost its leases")

func (o Options) owners() jetstream.StreamConfig {
	return jetstream.StreamConfig{
		Name: ownersKV, Description: "which process holds what only one can hold",
		Subjects: []string{"$KV." + owners + ".>"}, MaxMsgsPerSubject: 1,
		Discard: jetstream.DiscardNew, DenyDelete: true, AllowRollup: true, AllowMsgTTL: true,
		// Not AllowDirect: a node that is behind would give the word of a
		// former owner.
		MaxBytes: 64 << 20, MaxMsgSize: 4 << 10, MaxAge: ownedFor,
		Storage: jetstream.FileStorage, Replicas: max(o.Replicas, 1), MaxConsumers: -1,
	}
}

// Leases opens the leases for the process of a name, which no other has and
// which is new each time that it starts. Its Run must run while it is used.
func (l *Log) Leases(ctx context.Context, name string) (*Leases, error) {
	if err := schemas.CheckToken(name); err != nil {
		return nil, fmt.Errorf("name of the process: %w", err)
	}
	s, err := l.js.Stream(ctx, ownersKV)
	if err != nil {
		return nil, fmt.Errorf("open the leases: %w", err)
	}
	ttl := leaseTTL
	if l.o.LeaseTTL > 0 {
		ttl = l.o.LeaseTTL
	}
	return &Leases{l: l, name: name, stream: s, ttl: ttl, beats: ttl * 2 / 15, spare: ttl / 5, peers: map[string]*peer{}}, nil
}

// Name is this process's.
func (o *Leases) Name() string { return o.name }

// Run keeps this process alive for the others and notices when one of them is
// not, until ctx is done; then it is gone for them at once. up (may be nil) is
// told when it lives. dead is called, one at a time, with the name of each that
// has died, and of those that had died before Run and still own something.
func (o *Leases) Run(ctx context.Context, up func(bool), dead func(ctx context.Context, name string)) error {
	if up == nil {
		up = func(bool) {}
	}
	var others sync.WaitGroup
	defer others.Wait()
	others.Go(func() { o.listen(ctx) })
	// The beat waits for nothing but itself: neither for who looks after the
	// others, nor for what comes of their deaths.
	deaths := &mourning{more: make(chan struct{}, 1)}
	others.Go(func() {
		for {
			select {
			case <-ctx.Done():
				return
			case <-deaths.more:
			}
			for _, name := range deaths.take() {
				if ctx.Err() == nil {
					dead(ctx, name)
				}
			}
		}
	})
	beaten := make(chan struct{}, 1)
	others.Go(func() {
		begun := false
		for {
			select {
			case <-ctx.Done():
				return
			case <-beaten:
			}
			if !begun {
				begun = o.orphans(ctx, deaths)
			}
			o.look(ctx, deaths)
		}
	})
	lives := false
	for {
		err := o.beat(ctx)
		if now := o.Holds(); now != lives {
			lives = now
			up(lives)
			if !lives {
				o.l.o.Log.Warn("this process has lost its leases: others may take over what it held", "error", err)
			}
		}
		if lives {
			select {
			case beaten <- struct{}{}:
			default: // it looks
			}
		}
		wait := o.beats
		if err != nil {
			wait = o.beats / 4
		}
		if !pause(ctx, wait) {
			break
		}
	}
	o.mu.Lock()
	o.holds = time.Time{}
	o.mu.Unlock()
	up(false)
	bye, cancel := context.WithTimeout(context.WithoutCancel(ctx), 2*time.Second)
	defer cancel()
	if err := o.purge(bye, leaseNames+o.name); err != nil {
		o.l.o.Log.Debug("leases are left to expire", "error", err)
	}
	return nil
}

// mourning is who has died and was not reported yet. It never makes anybody wait;
// there are no more names in it than there were processes.
type mourning struct {
	more  chan struct{} // of one place: there are some
	mu    sync.Mutex
	names []string
}

func (d *mourning) put(name string) {
	d.mu.Lock()
	d.names = append(d.names, name)
	d.mu.Unlock()
	select {
	case d.more <- struct{}{}:
	default:
	}
}

func (d *mourning) take() []string {
	d.mu.Lock()
	defer d.mu.Unlock()
	names := d.names
	d.names = nil
	return names
}

// beat says that this process lives. One that stood still for longer than it may has
// lost its leases even if nobody has noticed: that is [ErrNotHeld], so that it is
// told of before the next beat gives them back.
func (o *Leases) beat(ctx context.Context) error {
	at := time.Now()
	ctx, cancel := context.WithTimeout(ctx, o.beats)
	defer cancel()
	ack, err := o.l.js.PublishMsg(ctx, nats.NewMsg(leaseNames+o.name), jetstream.WithMsgTTL(o.ttl), jetstream.WithRetryAttempts(0))
	if err != nil {
		return fmt.Errorf("say that this process lives: %w", err)
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	switch {
	case o.holds.IsZero():
		o.since = ack.Sequence
	case !o.holding():
		o.holds = time.Time{}
		return ErrNotHeld
	}
	o.holds = at.Add(o.ttl - o.spare)
	return nil
}

// Holds tells whether what this process has acquired is still its own. A
// process that was stopped, or cut off from the log, finds here that it is not,
// before another may have taken over.
func (o *Leases) Holds() bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.holding()
}

// holding is Holds with mu held.
func (o *Leases) holding() bool {
	now := time.Now()
	// By the wall clock too: the other does not go on while a machine sleeps.
	return now.Before(o.holds) && now.Round(0).Before(o.holds.Round(0))
}

// listen hears who lives, and who says good-bye.
func (o *Leases) listen(ctx context.Context) {
	for ctx.Err() == nil {
		err := func() error {
			c, err := o.stream.OrderedConsumer(ctx, jetstream.OrderedConsumerConfig{
				FilterSubjects: []string{leaseNames + ">"}, DeliverPolicy: jetstream.DeliverLastPerSubjectPolicy,
			})
			if err != nil {
				return err
			}
			it, err := c.Messages(jetstream.PullExpiry(10*time.Second), jetstream.PullHeartbeat(2*time.Second))
			if err != nil {
				return err
			}
			defer it.Stop()
			defer context.AfterFunc(ctx, it.Stop)()
			for {
				m, err := it.Next()
				switch {
				case errors.Is(err, jetstream.ErrNoHeartbeat) && ctx.Err() == nil:
					continue
				case err != nil:
					return err
				}
				name := m.Subject()[len(leaseNames):]
				if name == o.name {
					continue
				}
				o.hear(name, m.Headers().Get(jetstream.MsgRollup) == "")
			}
		}()
		if ctx.Err() == nil {
			o.l.o.Log.Debug("hearing who lives was interrupted", "error", err)
			pause(ctx, 250*time.Millisecond)
		}
	}
}

// hear notes that another lives, or has said good-bye.
func (o *Leases) hear(name string, lives bool) {
	o.mu.Lock()
	defer o.mu.Unlock()
	p := o.peers[name]
	switch {
	case lives && p == nil:
		o.peers[name] = &peer{heard: time.Now(), gone: make(chan struct{})}
	case lives:
		p.heard = time.Now()
	case p != nil:
		p.heard = time.Time{} // look asks, and finds it gone
	}
}

// look finds out who of the others has died: who is not heard of any more is
// asked for at the leader of the bucket, whose clock decides.
func (o *Leases) look(ctx context.Context, deaths *mourning) {
	o.mu.Lock()
	var silent []string
	for name, p := range o.peers {
		if time.Since(p.heard) > o.ttl {
			silent = append(silent, name)
		}
	}
	o.mu.Unlock()
	for _, name := range silent {
		lives, err := o.lives(ctx, name)
		if err != nil {
			return // at the next beat
		}
		o.mu.Lock()
		p := o.peers[name]
		if lives {
			p.heard = time.Now()
		} else {
			close(p.gone)
			delete(o.peers, name)
		}
		o.mu.Unlock()
		if !lives {
			deaths.put(name)
		}
	}
}

// orphans reports owners that do not live: those that died while nobody looked.
// It is true when it has seen them all.
func (o *Leases) orphans(ctx context.Context, deaths *mourning) bool {
	all, err := o.owned(ctx, "")
	if err != nil {
		o.l.o.Log.Warn("who owned something and died before is asked for again", "error", err)
		return false
	}
	known := map[string]bool{o.name: true}
	for _, owner := range all {
		if known[owner] {
			continue
		}
		known[owner] = true
		lives, err := o.lives(ctx, owner)
		if err != nil {
			return false
		}
		if !lives {
			deaths.put(owner)
		}
	}
	return ctx.Err() == nil
}

// lives asks whether a process lives.
func (o *Leases) lives(ctx context.Context, name string) (bool, error) {
	if name == o.name {
		return o.Holds(), nil
	}
	ctx, cancel := context.WithTimeout(ctx, o.beats)
	defer cancel()
	m, err := o.stream.GetLastMsgForSubject(ctx, leaseNames+name)
	if errors.Is(err, jetstream.ErrMsgNotFound) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("whether %s lives: %w", name, err)
	}
	return m.Header.Get(jetstream.MsgRollup) == "", nil
}

// Gone is closed when the process of a name lives no more, as soon as that is
// known here.
func (o *Leases) Gone(name string) <-chan struct{} {
	o.mu.Lock()
	defer o.mu.Unlock()
	p := o.peers[name]
	if p == nil {
		// One that has just begun, or has ended: look asks.
		p = &peer{gone: make(chan struct{})}
		o.peers[name] = p
	}
	return p.gone
}

// Acquire makes this process the owner of a key, unless another is that lives;
// it returns the owner. It returns [ErrNotHeld] while this process is not known
// to live.
func (o *Leases) Acquire(ctx context.Context, key string) (owner string, err error) {
	subject := leaseKeys + key
	revision := uint64(0)
	for range 8 {
		if !o.Holds() {
			return "", ErrNotHeld
		}
		_, err := o.l.js.PublishMsg(ctx, &nats.Msg{Subject: subject, Data: []byte(o.name)},
			jetstream.WithExpectLastSequencePerSubject(revision), jetstream.WithRetryAttempts(0))
		if err == nil {
			return o.name, nil
		}
		if !overtaken(err) {
			return "", fmt.Errorf("acquire %s: %w", key, err)
		}
		m, err := o.stream.GetLastMsgForSubject(ctx, subject)
		if errors.Is(err, jetstream.ErrMsgNotFound) {
			revision = 0
			continue
		}
		if err != nil {
			return "", fmt.Errorf("who owns %s: %w", key, err)
		}
		owner, revision = string(m.Data), m.Sequence
		if owner == "" { // released
			continue
		}
		if owner == o.name && o.before(revision) {
			continue // another may be about to take it over: only who writes next owns it
		}
		lives, err := o.lives(ctx, owner)
		if err != nil {
			return "", err
		}
		if lives {
			return owner, nil
		}
	}
	return "", fmt.Errorf("acquire %s: others are faster", key)
}

// before tells whether something was written before this process began to live without
// a break.
func (o *Leases) before(revision uint64) bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	return revision < o.since
}

// Release gives a key up, unless it is another's by now.
func (o *Leases) Release(ctx context.Context, key string) error {
	subject := leaseKeys + key
	m, err := o.stream.GetLastMsgForSubject(ctx, subject)
	if errors.Is(err, jetstream.ErrMsgNotFound) || err == nil && string(m.Data) != o.name {
		return nil
	}
	if err != nil {
		return fmt.Errorf("who owns %s: %w", key, err)
	}
	err = o.purge(ctx, subject, jetstream.WithExpectLastSequencePerSubject(m.Sequence))
	if overtaken(err) {
		return nil
	}
	return err
}

// overtaken tells whether the log has refused to write since another has written
// before.
func overtaken(err error) bool {
	api := new(jetstream.APIError)
	return errors.As(err, &api) &&
		(api.ErrorCode == jetstream.JSErrCodeStreamWrongLastSequence || api.ErrorCode == jetstream.JSErrCodeStreamWrongLastSequenceConstant)
}

// purge removes a key; the mark that it leaves goes by itself.
func (o *Leases) purge(ctx context.Context, subject string, more ...jetstream.PublishOpt) error {
	m := nats.NewMsg(subject)
	m.Header.Set("KV-Operation", "PURGE")
	m.Header.Set(jetstream.MsgRollup, jetstream.MsgRollupSubject)
	if _, err := o.l.js.PublishMsg(ctx, m, append(more, jetstream.WithMsgTTL(o.ttl))...); err != nil {
		return fmt.Errorf("remove %s: %w", subject, err)
	}
	return nil
}

// Owned lists the keys that a process owns, dead or alive. With an error it is what
// was read until then.
func (o *Leases) Owned(ctx context.Context, name string) ([]string, error) {
	all, err := o.owned(ctx, name)
	return slices.Collect(maps.Keys(all)), err
}

// owned reads who owns what: all that one owns, or, if name is "", everything.
// With an error it is what was read until then.
func (o *Leases) owned(ctx context.Context, name string) (map[string]string, error) {
	all := map[string]string{}
	c, err := o.stream.OrderedConsumer(ctx, jetstream.OrderedConsumerConfig{
		FilterSubjects: []string{leaseKeys + ">"}, DeliverPolicy: jetstream.DeliverLastPerSubjectPolicy,
	})
	if err != nil {
		return all, fmt.Errorf("reading who owns what: %w", err)
	}
	defer func() {
		if now := c.CachedInfo(); now != nil && o.l.nc.IsConnected() {
			bye, cancel := context.WithTimeout(context.WithoutCancel(ctx), 2*time.Second)
			defer cancel()
			_ = o.l.js.DeleteConsumer(bye, ownersKV, now.Name) // it would go by itself
		}
	}()
	info, err := c.Info(ctx)
	if err != nil {
		return all, fmt.Errorf("reading who owns what: %w", err)
	}
	if info.NumPending == 0 {
		return all, nil
	}
	it, err := c.Messages(jetstream.PullExpiry(10*time.Second), jetstream.PullHeartbeat(2*time.Second))
	if err != nil {
		return all, fmt.Errorf("reading who owns what: %w", err)
	}
	defer it.Stop()
	for {
		m, err := it.Next(jetstream.NextContext(ctx))
		if err != nil {
			return all, fmt.Errorf("reading who owns what: %w", err)
		}
		if owner := string(m.Data()); owner != "" && (name == "" || owner == name) {
			all[m.Subject()[len(leaseKeys):]] = owner
		}
		if md, err := m.Metadata(); err != nil || md.NumPending == 0 {
			return all, nil
		}
	}
}
