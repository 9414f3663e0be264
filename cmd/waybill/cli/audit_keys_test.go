package cli

import (
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
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
