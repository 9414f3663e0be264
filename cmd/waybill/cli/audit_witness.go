package cli

import (
	"context"
	"fmt"
	"net/url"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/mod/sumdb/note"

	"waybill.dev/bus"
	"waybill.dev/projections/audit"
)

// WitnessConfig is a witness of the audit (C2SP tlog-witness): somebody else, who signs
// each checkpoint only if its tree has grown from the last.
type WitnessConfig struct {
	URL     string   `yaml:"url" json:"url"`                  // below which is add-checkpoint
	Key     string   `yaml:"key" json:"key"`                  // its public key, cosignature/v1: name+hash+base64
	Timeout Duration `yaml:"timeout" json:"timeout,omitzero"` // of an answer; default 5s
}

// mostWitnesses keeps a cosigned checkpoint one that every reader of signed notes takes.
const mostWitnesses = 20

func (a AuditConfig) checkWitnesses(bad func(format string, args ...any)) {
	names := map[string]bool{}
	for i, w := range a.Witnesses {
		u, err := url.Parse(w.URL)
		switch {
		case err != nil || u.Hostname() == "" || u.Scheme != "http" && u.Scheme != "https":
			bad("audit.witnesses[%d].url: %q is not an http or https URL", i, w.URL)
		case u.User != nil || strings.ContainsAny(w.URL, "?#"): // also where nothing follows
			bad("audit.witnesses[%d].url: it has more than a host and a path", i)
		}
		k, err := audit.CosignerKey(w.Key)
		switch {
		case err != nil:
			bad("audit.witnesses[%d].key: %w", i, err)
		case names[k.Name()]:
			bad("audit.witnesses[%d].key: witness %q is there twice", i, k.Name())
		default:
			names[k.Name()] = true
		}
		switch t := w.Timeout; {
		case t.bad != nil:
			bad("audit.witnesses[%d].timeout: %w", i, t.bad)
		case t.Duration < 0 || t.Duration > time.Minute:
			bad("audit.witnesses[%d].timeout: %s is not up to 1m", i, t)
		}
	}
	switch every := a.WitnessEvery; {
	case every.bad != nil:
		bad("audit.witness_every: %w", every.bad)
	case every != (Duration{}) && (every.Duration < time.Second || every.Duration > time.Hour):
		bad("audit.witness_every: %s is not from 1s to 1h", every)
	}
	switch n := len(a.Witnesses); {
	case n > mostWitnesses:
		bad("audit.witnesses: %d are more than %d", n, mostWitnesses)
	case a.Quorum < 0 || a.Quorum > n:
		bad("audit.quorum: %d is not one of 0 to %d, as many as there are witnesses", a.Quorum, n)
	}
}

// cosigners are the witnesses of a configuration that was checked.
func (a AuditConfig) cosigners() ([]audit.Cosigner, error) {
	all := make([]audit.Cosigner, len(a.Witnesses))
	for i, w := range a.Witnesses {
		k, err := audit.CosignerKey(w.Key)
		if err != nil {
			return nil, fmt.Errorf("audit.witnesses[%d].key: %w", i, err)
		}
		all[i] = audit.Cosigner{URL: w.URL, Key: k, Timeout: w.Timeout.Duration}
	}
	return all, nil
}

// witnessed has the witnesses asked while the tree is built, and only then: of several
// processes it is one that asks. It never has the builder wait.
func (g *gateway) witnessed(ctx context.Context, l *bus.Log, keys audit.Keys, build func(context.Context) error) (func(context.Context) error, error) {
	all, err := g.c.Audit.cosigners()
	if err != nil || len(all) == 0 {
		return build, err
	}
	// The builder goes by the checkpoint that it has read itself.
	own, err := l.Audit(ctx)
	if err != nil {
		return nil, err
	}
	if err := g.metrics.watchWitnesses(); err != nil {
		return nil, err
	}
	rounds, err := audit.NewRounds(audit.CosignOptions{
		Store: auditStore{own}, Keys: keys.Verifiers, Witnesses: all, Quorum: g.c.Audit.Quorum, Every: g.c.Audit.WitnessEvery.Duration,
		Tell: g.metrics.cosigns, Log: g.log,
	})
	if err != nil {
		return nil, err
	}
	return func(ctx context.Context) error {
		asking, stop := context.WithCancel(ctx)
		var beside sync.WaitGroup
		defer beside.Wait()
		defer stop()
		beside.Go(func() { rounds.Run(asking) })
		return build(ctx)
	}, nil
}

// addWitnesses adds a witness's key, or those in a file, to some.
func addWitnesses(known []note.Verifier, s string) ([]note.Verifier, error) {
	texts := []string{s}
	if _, err := os.Stat(s); err == nil {
		if texts, err = publicKeys(s); err != nil {
			return nil, err
		}
		if len(texts) == 0 {
			return nil, fmt.Errorf("%s: there is no key in it", s)
		}
	}
	for _, text := range texts {
		k, err := audit.CosignerKey(text)
		switch {
		case err != nil && text == s:
			return nil, fmt.Errorf("no such file, and %w", err)
		case err != nil:
			return nil, fmt.Errorf("%s: %q: %w", s, text, err)
		}
		if !slices.ContainsFunc(known, func(o note.Verifier) bool { return o.Name() == k.Name() && o.KeyHash() == k.KeyHash() }) {
			known = append(known, k)
		}
	}
	return known, nil
}

// printWitnessed says who has signed the log beside the gateway.
func printWitnessed(p *printer, r audit.Report, known []note.Verifier) {
	for _, w := range r.Witnessed {
		p.line("witnessed     %d leaves by %s, at %s", w.Size, visible(w.Witness), w.Time.Format(time.RFC3339))
	}
	switch {
	case r.Unknown > 0 && len(known) == 0:
		p.line("              %d checkpoints are cosigned, by nobody who is known here: name the witnesses with --witness", r.Unknown)
	case r.Unknown > 0:
		p.line("              %d of the %d cosigned checkpoints are by nobody who is known here", r.Unknown, r.Cosigned)
	}
	for _, k := range known {
		if !slices.ContainsFunc(r.Witnessed, func(w audit.Cosignature) bool { return w.Witness == k.Name() }) {
			p.line("              nothing is cosigned by %s", visible(k.Name()))
		}
	}
}
