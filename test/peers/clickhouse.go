package peers

import (
	"os"
	"os/exec"
	"path/filepath"
	"testing"
)

// ClickHouse returns the path of chserve, the launcher of the ClickHouse inside, with the engine's library beside it.
func ClickHouse(t testing.TB) string {
	t.Helper()
	library := installed(t, "chdb", "libchdb.so")
	dir := t.TempDir()
	launcher := filepath.Join(dir, "chserve")
	cmd := exec.Command("go", "build", "-o", launcher, "./cmd/chserve")
	cmd.Dir = Root(t)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("build cmd/chserve: %v\n%s", err, out)
	}
	if err := os.Symlink(library, filepath.Join(dir, "libchdb.so")); err != nil {
		t.Fatal(err)
	}
	return launcher
}
