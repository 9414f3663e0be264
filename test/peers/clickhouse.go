package peers

import (
	"io"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
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

// ClickHouseServer is a ClickHouse that is not the gateway's: a process of the test's, on ports that stay.
type ClickHouseServer struct {
	*Process
	launcher, dir, http, native string
	t                           testing.TB
	alive                       io.Closer // the server ends with it
}

// StartClickHouse starts one.
func StartClickHouse(t testing.TB) *ClickHouseServer {
	t.Helper()
	s := &ClickHouseServer{launcher: ClickHouse(t), dir: filepath.Join(t.TempDir(), "clickhouse"), http: freeAddr(t), native: freeAddr(t), t: t}
	s.Start()
	return s
}

// Start starts it, again.
func (s *ClickHouseServer) Start() {
	s.t.Helper()
	cmd := exec.Command(s.launcher, "--dir", s.dir, "--http", s.http, "--native", s.native)
	p := &Process{cmd: cmd}
	var err error
	if s.alive, err = cmd.StdinPipe(); err != nil {
		s.t.Fatal(err)
	}
	cmd.Stdout, cmd.Stderr = &p.out, &p.out
	if p.exited, err = start(cmd); err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(p.Kill)
	s.Process = p
	if _, err := p.Await(s.t.Context(), `{"http":`); err != nil {
		s.t.Fatal(err)
	}
}

// DSN is that of a user, gateway or reader, by one of the two protocols, clickhouse or http.
func (s *ClickHouseServer) DSN(scheme, user string) string {
	s.t.Helper()
	password, err := os.ReadFile(filepath.Join(s.dir, user+".password"))
	if err != nil {
		s.t.Fatal(err)
	}
	u := url.URL{Scheme: scheme, Host: s.native, User: url.UserPassword(user, strings.TrimSpace(string(password)))}
	if scheme == "http" {
		u.Host = s.http
	}
	return u.String()
}
