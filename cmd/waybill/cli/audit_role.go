package cli

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/mod/sumdb/note"
	"golang.org/x/mod/sumdb/tlog"

	"waybill.dev/bus"
	"waybill.dev/projections/audit"
	"waybill.dev/schemas"
)

// AuditConfig is for the signed record.
type AuditConfig struct {
	Origin      string             `yaml:"origin" json:"origin,omitempty"`           // name of the log in its checkpoints; default one that is made at the first start
	Keep        Duration           `yaml:"keep" json:"keep"`                         // of the feed; default 2160h, 90 days
	MaxBytes    int64              `yaml:"max_bytes" json:"max_bytes"`               // of the feed; default 8589934592
	Bodies      []schemas.Tenant   `yaml:"bodies" json:"bodies,omitempty"`           // tenants whose feed has what was said, and not digests of it only
	Checkpoints string             `yaml:"checkpoints" json:"checkpoints,omitempty"` // file to which each checkpoint is appended
	Keys        []int              `yaml:"keys" json:"keys,omitempty"`               // with bus.url: the numbers of the log's keys that sign; default [1]
	Subscribers []SubscriberConfig `yaml:"subscribers" json:"subscribers,omitempty"` // who may read a tenant's feed at bus.embedded.listen

	Witnesses    []WitnessConfig `yaml:"witnesses" json:"witnesses,omitempty"`        // who sign the checkpoints too; audit_witness.go
	Quorum       int             `yaml:"quorum" json:"quorum,omitempty"`              // how many of them have to have signed what is kept as cosigned; default 1
	WitnessEvery Duration        `yaml:"witness_every" json:"witness_every,omitzero"` // at most once in this time they are asked; default 10s
}

// SubscriberConfig is a NATS user.
type SubscriberConfig struct {
	Name   string         `yaml:"name" json:"name"`
	Tenant schemas.Tenant `yaml:"tenant" json:"tenant"`
}

func (c *Config) checkAudit(bad func(format string, args ...any), tenants map[schemas.Tenant]bool) {
	a := c.Audit
	if a.Origin != "" && strings.ContainsFunc(a.Origin, func(r rune) bool { return r <= ' ' || r > '~' || r == '+' || r == '"' || r == '\\' }) {
		bad("audit.origin: %q has a character that may not be in it: printable ASCII without space, +, \" and \\", a.Origin)
	}
	if a.Keep.bad != nil {
		bad("audit.keep: %w", a.Keep.bad)
	} else if a.Keep.Duration < c.Bus.MaxAge.Duration {
		bad("audit.keep: %s is less than bus.max_age", a.Keep)
	}
	if a.MaxBytes < 64<<20 {
		bad("audit.max_bytes: %d is less than 67108864", a.MaxBytes)
	}
	for i, t := range a.Bodies {
		if !tenants[t] {
			bad("audit.bodies[%d]: no tenant %q", i, t)
		}
	}
	names := map[string]bool{}
	for i, s := range a.Subscribers {
		switch err := schemas.CheckToken(s.Name); {
		case err != nil:
			bad("audit.subscribers[%d].name: %w", i, err)
		case slices.Contains(bus.Roles(), bus.Role(s.Name)):
			bad("audit.subscribers[%d].name: %q is a role of the gateway", i, s.Name)
		case names[s.Name]:
			bad("audit.subscribers[%d].name: %q is there twice", i, s.Name)
		}
		names[s.Name] = true
		if !tenants[s.Tenant] {
			bad("audit.subscribers[%d].tenant: no tenant %q", i, s.Tenant)
		}
	}
	for i, n := range a.Keys {
		switch {
		case n < 1 || n > maxAuditKeys:
			bad("audit.keys[%d]: %d is not from 1 to %d", i, n, maxAuditKeys)
		case i > 0 && n <= a.Keys[i-1]:
			bad("audit.keys[%d]: %d does not come after %d", i, n, a.Keys[i-1])
		}
	}
	a.checkWitnesses(bad)
	if len(a.Keys) > 0 && c.Bus.URL == "" {
		bad("audit.keys: they are the log's with bus.url; with a log of its own the gateway has its key in the data directory, in %s", auditKeyFile)
	}
	if len(a.Subscribers) > 0 && (c.Bus.Embedded == nil || c.Bus.Embedded.Listen == "") {
		bad("audit.subscribers: they need bus.embedded.listen; with bus.url the users are the server's")
	}
}

// addAudit: every event → a leaf, the feed, checkpoints.
func (g *gateway) addAudit(ctx context.Context, _ net.Listener) error {
	l, err := g.open(ctx, bus.RoleAudit)
	if err != nil {
		return err
	}
	a, err := l.Audit(ctx)
	if err != nil {
		return err
	}
	for _, s := range g.c.Audit.Subscribers {
		if err := a.Subscriber(ctx, s.Name, s.Tenant); err != nil {
			return err
		}
	}
	keys, origin, err := g.auditKeys(ctx, l)
	if err != nil {
		return err
	}
	g.auditKey = keys.Verifiers[len(keys.Verifiers)-1]
	lease, err := g.auditLease(ctx, l)
	if err != nil {
		return err
	}
	last := lastCheckpoint(filepath.Join(g.c.Data, auditLastFile))
	out := &checkpointFile{name: g.c.path(g.c.Audit.Checkpoints), log: g.log}
	if err := out.check(); err != nil {
		return err
	}
	ready := g.up("audit")
	b, err := audit.New(audit.Options{
		Store: auditStore{a}, Origin: origin, Keys: keys,
		Said: func(t schemas.Tenant) bool { return slices.Contains(g.c.Audit.Bodies, t) },
		Keep: last.keep, Kept: last.kept,
		Lost:   "put the stream AUDIT back as it was; or have `waybill up --audit-anew` begin a new audit, with a new name and key (the last checkpoint is in " + string(last) + ")",
		Signed: out.put, Up: ready.Store, Tree: g.metrics.tree, Log: g.log, Settle: g.c.settle(),
	})
	if err != nil {
		return err
	}
	build, err := g.witnessed(ctx, l, keys, b.Run)
	if err != nil {
		return err
	}
	g.workers = append(g.workers, part{"audit", func(ctx context.Context) error {
		return lease(ctx, ready.Store, build)
	}})
	return nil
}

// settle is how old a leaf is when it is signed: what is younger than the log's
// flushing to disk a power cut may take, and twice that is on the safe side.
func (c *Config) settle() time.Duration {
	const least = 250 * time.Millisecond
	if c.Bus.Embedded == nil {
		return least
	}
	every, _, err := c.Bus.Embedded.sync()
	if err != nil { // refused when the configuration was read
		return least
	}
	return max(least, 2*every)
}

// auditLease makes this process the only one that builds, or has it stand by: it
// is ready then too. With a log of its own it is the only one anyway.
func (g *gateway) auditLease(ctx context.Context, l *bus.Log) (func(ctx context.Context, up func(bool), build func(context.Context) error) error, error) {
	if g.c.Bus.URL == "" {
		return func(ctx context.Context, _ func(bool), build func(context.Context) error) error { return build(ctx) }, nil
	}
	leases, err := l.Leases(ctx, g.instance+"-audit")
	if err != nil {
		return nil, err
	}
	const key = bus.BuilderLease
	return func(ctx context.Context, up func(bool), build func(context.Context) error) error {
		holding, letGo := context.WithCancel(context.WithoutCancel(ctx))
		lost := make(chan struct{}, 1) // what was held may be another's
		ended := make(chan error, 1)
		go func() {
			ended <- leases.Run(holding, func(lives bool) {
				if !lives {
					select {
					case lost <- struct{}{}:
					default:
					}
				}
			}, func(context.Context, string) {})
		}()
		defer func() { letGo(); <-ended }()
		for ctx.Err() == nil {
			switch owner, err := leases.Acquire(ctx, key); {
			case err == nil && owner == leases.Name():
				// Should another take over too early, the feed takes nothing from
				// two.
				building, stop := context.WithCancel(ctx)
				done := make(chan error, 1)
				go func() { done <- build(building) }()
				select {
				case <-lost:
				case <-ctx.Done():
				}
				stop()
				<-done // it ends by ctx only
			case err == nil:
				up(true) // another builds
			case !errors.Is(err, bus.ErrNotHeld):
				g.log.Warn("audit: who builds the tree", "error", err)
			}
			wait := time.NewTimer(time.Second)
			select {
			case <-ctx.Done():
			case <-wait.C:
			}
			wait.Stop()
		}
		bye, cancel := context.WithTimeout(context.WithoutCancel(ctx), 2*time.Second)
		defer cancel()
		return leases.Release(bye, key)
	}, nil
}

// checkpointFile appends checkpoints to a file, an empty line between them: a copy
// that the log has no hold on.
type checkpointFile struct {
	name string // "" for none
	log  *slog.Logger
}

// check finds out at the start whether the file can be written: later it would be said
// of each checkpoint, and stop nothing.
func (f *checkpointFile) check() error {
	if f.name == "" {
		return nil
	}
	out, err := os.OpenFile(f.name, os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o644)
	if err == nil {
		err = out.Close()
	}
	if err != nil {
		return fmt.Errorf("audit.checkpoints: %w", err)
	}
	return nil
}

func (f *checkpointFile) put(_ context.Context, c audit.Checkpoint, _ tlog.HashReader) {
	if f.name == "" {
		return
	}
	out, err := os.OpenFile(f.name, os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o644)
	if err == nil {
		_, err = out.WriteString(c.Text + "\n")
		err = errors.Join(err, out.Close())
	}
	if err != nil {
		f.log.Error("audit.checkpoints: not written", "size", c.Size, "error", err)
	}
}

// Files of the audit's keys in the data directory. To change the key, the file of
// the private one is renamed to end in .old before a start: then a new one is
// made, and both sign until the old one is removed.
const (
	auditKeyFile  = "audit.key"
	auditPubFile  = "audit.pub"
	auditLastFile = "audit.last" // the newest checkpoint but for a moment, where the log has no hold on it
)

// lastCheckpoint is the file of the last checkpoint. Of several processes with one
// log each has its own, of what it has signed itself.
type lastCheckpoint string

func (f lastCheckpoint) kept(context.Context) (string, error) {
	b, err := os.ReadFile(string(f))
	if errors.Is(err, os.ErrNotExist) {
		return "", nil
	}
	return string(b), err
}

func (f lastCheckpoint) keep(_ context.Context, c audit.Checkpoint) error {
	return writeWhole(string(f), c.Text, 0o600)
}

// anewAudit sets the audit that there was aside, for a new one under another name and
// with another key: nobody is to have two words of the same key. The keys stay in the
// data directory, the tree and the feed go.
func (g *gateway) anewAudit(ctx context.Context) error {
	pub := filepath.Join(g.c.Data, auditPubFile)
	keys, err := publicKeys(pub)
	if err != nil {
		return err
	}
	if origin, ok := originOf(keys); ok && origin == g.c.Audit.Origin {
		return fmt.Errorf("--audit-anew: the new audit needs another name than %s: change audit.origin", origin)
	}
	if err := bus.ForgetAudit(ctx, g.dial); err != nil {
		return fmt.Errorf("--audit-anew: %w", err)
	}
	// The public keys last: with them, and without the private one, nothing starts.
	aside := time.Now().UTC().Format("20060102T150405Z")
	for _, name := range []string{auditLastFile, auditKeyFile + ".old", auditKeyFile, auditPubFile} {
		file := filepath.Join(g.c.Data, name)
		if err := os.Rename(file, file+"."+aside); err != nil && !errors.Is(err, os.ErrNotExist) {
			return fmt.Errorf("--audit-anew: %w", err)
		}
	}
	g.log.Warn("a new audit is begun; of the former the keys are left", "in", pub+"."+aside)
	return nil
}

// auditKeyring is the audit's keys, read once: to read them may make one, and
// writes down the public ones.
type auditKeyring struct {
	mu     sync.Mutex
	keys   audit.Keys
	origin string // "" before they are read
}

// auditKeys are the keys that this gateway signs with, and all public keys that
// it has had. It may be called by many at once.
func (g *gateway) auditKeys(ctx context.Context, l *bus.Log) (audit.Keys, string, error) {
	r := &g.keyring
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.origin == "" {
		keys, origin, err := g.readAuditKeys(ctx, l)
		if err != nil {
			return audit.Keys{}, "", err
		}
		r.keys, r.origin = keys, origin
	}
	return r.keys, r.origin, nil
}

func (g *gateway) readAuditKeys(ctx context.Context, l *bus.Log) (keys audit.Keys, origin string, err error) {
	add := func(private, public string) error {
		s, err := note.NewSigner(private)
		if err != nil {
			return fmt.Errorf("key of the audit: %w", err)
		}
		keys.Signers = append(keys.Signers, s)
		keys.Verifiers = append(slices.DeleteFunc(keys.Verifiers, func(k string) bool { return k == public }), public)
		return nil
	}
	if g.c.Bus.URL != "" {
		origin = g.c.Audit.Origin
		if origin == "" {
			origin = "waybill"
		}
		sign := g.c.Audit.Keys
		if len(sign) == 0 {
			sign = []int{1}
		}
		for n := range sign[len(sign)-1] {
			seed, err := l.Key(ctx, sharedKey(n+1), audit.SecretSize)
			if err != nil {
				return keys, "", err
			}
			private, public, err := audit.NewKey(origin, seed)
			if err == nil && slices.Contains(sign, n+1) {
				err = add(private, public)
			}
			if err != nil {
				return keys, "", err
			}
			if !slices.Contains(keys.Verifiers, public) { // it may have signed
				keys.Verifiers = append(keys.Verifiers, public)
			}
		}
		return keys, origin, nil
	}
	pub := filepath.Join(g.c.Data, auditPubFile)
	if keys.Verifiers, err = publicKeys(pub); err != nil {
		return keys, "", err
	}
	origin = g.c.Audit.Origin
	if before, ok := originOf(keys.Verifiers); ok {
		if origin != "" && origin != before {
			return keys, "", fmt.Errorf("audit.origin: %q, and the log has been signed as %q", origin, before)
		}
		origin = before
	}
	if origin == "" {
		origin = "waybill-" + strings.ToLower(rand.Text()[:10])
	}
	key, old := filepath.Join(g.c.Data, auditKeyFile), filepath.Join(g.c.Data, auditKeyFile+".old")
	if len(keys.Verifiers) > 0 && missing(key) && missing(old) {
		// A key that is made now would go on where another has signed, which nobody
		// wants who has only lost a file on the way.
		return keys, "", fmt.Errorf("%s has keys that have signed the audit, and neither %s nor %s is there: put the key back; if it is lost, make %s an empty file of mode 600, and a new key is made",
			pub, key, old, old)
	}
	for _, file := range []string{old, key} {
		private, err := g.auditPrivate(file, origin)
		if err != nil {
			return keys, "", err
		}
		if private == "" {
			continue
		}
		public, err := audit.PublicKey(private)
		if err == nil {
			err = add(private, public)
		}
		if err != nil {
			return keys, "", fmt.Errorf("%s: %w", file, err)
		}
	}
	return keys, origin, writeWhole(pub, strings.Join(keys.Verifiers, "\n")+"\n", 0o644)
}

// maxAuditKeys bounds audit.keys: all up to the greatest are made, and none ever goes.
const maxAuditKeys = 20

// sharedKey is the name of a key that the processes of a gateway share. To change the
// key the next number is added on every replica, one after the other: each knows the
// checkpoints of the others by the key that both have. Later the former is left out.
func sharedKey(n int) string {
	if n == 1 {
		return "audit"
	}
	return fmt.Sprintf("audit-%d", n)
}

func missing(file string) bool {
	_, err := os.Stat(file)
	return errors.Is(err, os.ErrNotExist)
}

// auditPrivate reads a private key; the current one is made where there is none.
func (g *gateway) auditPrivate(file, origin string) (string, error) {
	b, err := os.ReadFile(file)
	switch {
	case err == nil:
		if st, err := os.Stat(file); err == nil && st.Mode().Perm()&0o077 != 0 {
			return "", fmt.Errorf("%s can be read by others (mode %o): chmod 600", file, st.Mode().Perm())
		}
		return strings.TrimSpace(string(b)), nil
	case !errors.Is(err, os.ErrNotExist):
		return "", fmt.Errorf("key of the audit: %w", err)
	case strings.HasSuffix(file, ".old"):
		return "", nil
	}
	seed := make([]byte, audit.SecretSize)
	_, _ = rand.Read(seed) // never fails
	private, public, err := audit.NewKey(origin, seed)
	if err != nil {
		return "", err
	}
	g.log.Info("made the key that signs the audit", "file", file, "public", public)
	return private, writeWhole(file, private+"\n", 0o600)
}

// publicKeys reads a file of public keys, one a line.
func publicKeys(file string) ([]string, error) {
	b, err := os.ReadFile(file)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	var keys []string
	for line := range strings.Lines(string(b)) {
		if line = strings.TrimSpace(line); line != "" {
			keys = append(keys, line)
		}
	}
	return keys, nil
}

// originOf is the name in public keys.
func originOf(keys []string) (string, bool) {
	if len(keys) == 0 {
		return "", false
	}
	name, _, ok := strings.Cut(keys[0], "+")
	return name, ok
}

// writeWhole writes a file whole or not at all.
func writeWhole(file, text string, mode os.FileMode) error {
	if err := os.MkdirAll(filepath.Dir(file), 0o700); err != nil {
		return err
	}
	if err := os.WriteFile(file+".new", []byte(text), mode); err != nil {
		return err
	}
	return os.Rename(file+".new", file)
}

// hashesOf reads the hashes of a checkpoint's tree from what is stored.
func hashesOf(ctx context.Context, a *bus.Audit, c audit.Checkpoint) tlog.HashReader {
	edge := map[string][]byte{}
	read := false
	return audit.Reader(tlog.Tree{N: int64(c.Size), Hash: c.Root}, func(t tlog.Tile) ([]byte, error) {
		if t.W == 1<<t.H {
			return a.Tile(ctx, t.Path())
		}
		if !read {
			read = true
			var err error
			if edge, err = a.Edge(ctx); err != nil {
				return nil, err
			}
		}
		if data, ok := edge[t.Path()]; ok {
			return data, nil
		}
		return nil, schemas.ErrNotFound
	})
}
