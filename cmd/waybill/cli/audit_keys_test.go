package cli

import (
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"golang.org/x/mod/sumdb/note"

	"waybill.dev/bus"
	"waybill.dev/bus/embed"
	"waybill.dev/projections/audit"
)

// keyless is a gateway that has no more than a data directory.
func keyless(dir string) *gateway {
	return &gateway{c: &Config{Data: dir}, log: slog.New(slog.DiscardHandler)}
}

// The keys are read, and made, once, by however many at the same time.
func TestAuditKeysOnce(t *testing.T) {
	g := keyless(t.TempDir())
	errs := make([]error, 40)
	origins := make([]string, len(errs))
	var all sync.WaitGroup
	for i := range errs {
		all.Go(func() { _, origins[i], errs[i] = g.auditKeys(t.Context(), nil) })
	}
	all.Wait()
	if err := errors.Join(errs...); err != nil {
		t.Fatal(err)
	}
	for _, o := range origins {
		if o != origins[0] {
			t.Errorf("the log is %s, and %s", origins[0], o)
		}
	}
}

// A key that is lost is not replaced unasked.
func TestAuditKeyLost(t *testing.T) {
	dir := t.TempDir()
	first, origin, err := keyless(dir).auditKeys(t.Context(), nil)
	if err != nil {
		t.Fatal(err)
	}
	key := filepath.Join(dir, auditKeyFile)
	if err := os.Remove(key); err != nil {
		t.Fatal(err)
	}
	if _, _, err := keyless(dir).auditKeys(t.Context(), nil); err == nil || !strings.Contains(err.Error(), "put the key back") {
		t.Errorf("without the key: %v", err)
	}
	if err := os.WriteFile(key+".old", nil, 0o600); err != nil {
		t.Fatal(err)
	}
	second, same, err := keyless(dir).auditKeys(t.Context(), nil)
	if err != nil || same != origin || len(second.Verifiers) != 2 || second.Verifiers[0] != first.Verifiers[0] || len(second.Signers) != 1 {
		t.Errorf("%v: of %s, then of %s: %v", err, origin, same, second.Verifiers)
	}
}

// With a log that replicas share, its keys are changed one after the other: who has
// only the former knows what both have signed, and who has the new one knows all.
func TestSharedAuditKeys(t *testing.T) {
	srv, err := embed.Start(embed.Options{Dir: t.TempDir()})
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := srv.Close(); err != nil {
			t.Error(err)
		}
	}()
	o := bus.Options{Dial: srv.Connect, Role: bus.RoleAudit, Leases: true}
	if err := bus.Setup(t.Context(), o); err != nil {
		t.Fatal(err)
	}
	l, err := bus.Open(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	keys := func(sign ...int) audit.Keys {
		t.Helper()
		g := &gateway{c: &Config{Audit: AuditConfig{Keys: sign}}, log: slog.New(slog.DiscardHandler)}
		g.c.Bus.URL = "nats://shared"
		k, origin, err := g.auditKeys(t.Context(), l)
		if err != nil || origin != "waybill" {
			t.Fatal(origin, err)
		}
		return k
	}
	known := func(by, signed audit.Keys) bool {
		t.Helper()
		verifiers, err := audit.Known(by.Verifiers)
		if err != nil {
			t.Fatal(err)
		}
		text, err := note.Sign(&note.Note{Text: "waybill\n0\n47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU=\n"}, signed.Signers...)
		if err != nil {
			t.Fatal(err)
		}
		_, err = audit.OpenCheckpoint(string(text), verifiers)
		return err == nil
	}
	first, same, both, second := keys(), keys(1), keys(1, 2), keys(2)
	if !slices.Equal(first.Verifiers, same.Verifiers) || len(both.Verifiers) != 2 || !slices.Equal(both.Verifiers, second.Verifiers) {
		t.Errorf("%v, then %v, then %v", first.Verifiers, both.Verifiers, second.Verifiers)
	}
	for _, tt := range []struct {
		what       string
		by, signed audit.Keys
		want       bool
	}{
		{"the former knows what both have signed", first, both, true},
		{"both know what the former has signed", both, first, true},
		{"both know what the new one has signed", both, second, true},
		{"the new one knows what the former has signed", second, first, true},
		{"the former does not know the new one", first, second, false},
	} {
		if known(tt.by, tt.signed) != tt.want {
			t.Errorf("not so: %s", tt.what)
		}
	}
}

// A copy of the checkpoints that cannot be written is said at the start.
func TestCheckpointFile(t *testing.T) {
	dir := t.TempDir()
	for name, want := range map[string]string{"": "", filepath.Join(dir, "checkpoints"): "", filepath.Join(dir, "none", "checkpoints"): "audit.checkpoints: open ", dir: "audit.checkpoints: open "} {
		err := (&checkpointFile{name: name}).check()
		if (err == nil) != (want == "") || err != nil && !strings.HasPrefix(err.Error(), want) {
			t.Errorf("%q: %v", name, err)
		}
	}
}
