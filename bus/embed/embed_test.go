package embed_test

import (
	"bytes"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"waybill.dev/bus"
	"waybill.dev/bus/embed"
	"waybill.dev/schemas"
)

// canary is what must not be found on disk.
const canary = "canary-5f0e7c1a-in-the-log"

// begin starts a server that has no reason to sync in the time of a test. One that
// opens a store which is there sets its first sync timer without a lock (NATS
// 2.15.2, filestore.go, setSyncTimer); on a slow machine that timer fires before
// this is done, and the race detector fails the test.
func begin(o embed.Options) (*embed.Server, error) {
	o.Sync = time.Minute
	return embed.Start(o)
}

// store stores an event and closes the server, unless keep is set.
func store(t *testing.T, o embed.Options, keep bool) *embed.Server {
	t.Helper()
	s, err := begin(o)
	if err != nil {
		t.Fatal(err)
	}
	l := open(t, s, bus.RoleEdge)
	defer l.Close()
	call := schemas.NewCallID(time.Now())
	if _, err := l.Publish(t.Context(), schemas.Event{
		Tenant: "acme", Session: "s1", Agent: "researcher", Call: call, Root: call, Body: []byte(canary),
		Data: &schemas.Requested{Target: schemas.Target{Protocol: "mcp", Server: canary, Method: "m"}},
	}); err != nil {
		t.Fatal(err)
	}
	if keep {
		t.Cleanup(func() { closed(t, s) })
		return s
	}
	closed(t, s)
	return nil
}

func open(t *testing.T, s *embed.Server, r bus.Role) *bus.Log {
	t.Helper()
	o := bus.Options{Dial: s.Connect, Role: r}
	if err := bus.Setup(t.Context(), o); err != nil {
		t.Fatal(err)
	}
	l, err := bus.Open(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	return l
}

func closed(t *testing.T, s *embed.Server) {
	t.Helper()
	if err := s.Close(); err != nil {
		t.Error(err)
	}
}

// stored counts the events in the log of a directory, all of which must be the
// canary's.
func stored(t *testing.T, o embed.Options) (n int) {
	t.Helper()
	s, err := begin(o)
	if err != nil {
		t.Fatal(err)
	}
	defer closed(t, s)
	l := open(t, s, bus.RoleObserver)
	defer l.Close()
	for e, err := range l.Read(t.Context(), bus.Filter{}, 0) {
		if err != nil || string(e.Body) != canary {
			t.Errorf("event %d holds %q, %v", e.Seq, e.Body, err)
		}
		n++
	}
	return n
}

// found tells whether the canary stands in a file below dir.
func found(t *testing.T, dir string) (in string) {
	t.Helper()
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		b, err := os.ReadFile(path)
		if bytes.Contains(b, []byte(canary)) {
			in = path
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return in
}

func TestEncryptionAtRest(t *testing.T) {
	dir := t.TempDir()
	o := embed.Options{Dir: filepath.Join(dir, "log"), KeyFile: filepath.Join(dir, "keys", "log.key")}
	store(t, o, false)
	if in := found(t, o.Dir); in != "" {
		t.Errorf("the canary stands in %s", in)
	}
	bare := embed.Options{Dir: filepath.Join(dir, "bare")}
	store(t, bare, false)
	// That it would be found, were it not encrypted:
	plain := embed.Options{Dir: filepath.Join(dir, "plain")}
	store(t, plain, false)
	if found(t, plain.Dir) == "" {
		t.Error("the canary is not found in a log without encryption either")
	}
	if st, err := os.Stat(o.KeyFile); err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("key file: %v, %v", st, err)
	}
	if n := stored(t, o); n != 1 {
		t.Errorf("%d events after a restart with the key, want 1", n)
	}

	// A log may be encrypted later on.
	if n := stored(t, embed.Options{Dir: plain.Dir, KeyFile: o.KeyFile}); n != 1 {
		t.Errorf("%d events after a log was encrypted, want 1", n)
	}

	key, err := os.ReadFile(o.KeyFile)
	if err != nil {
		t.Fatal(err)
	}
	refused := func(what, because string, o embed.Options) {
		t.Helper()
		s, err := begin(o)
		if err == nil {
			l := open(t, s, bus.RoleObserver)
			last, _ := l.Last(t.Context())
			l.Close()
			closed(t, s)
			t.Errorf("%s: starts, with %d events", what, last)
		} else if !strings.Contains(err.Error(), because) {
			t.Errorf("%s: %v", what, err)
		}
	}
	write := func(content string, mode os.FileMode) {
		t.Helper()
		if err := os.WriteFile(o.KeyFile, []byte(content), mode); err != nil {
			t.Fatal(err)
		}
		if err := os.Chmod(o.KeyFile, mode); err != nil {
			t.Fatal(err)
		}
	}
	write(strings.Repeat("wrong", 10), 0o600)
	refused("the wrong key", "another key", o)
	refused("no key", "is encrypted", embed.Options{Dir: o.Dir})
	write("short", 0o600)
	refused("a short key", "at least 32", o)
	write(string(key), 0o644)
	refused("a key that all can read", "chmod 600", o)
	if err := os.Remove(o.KeyFile); err != nil {
		t.Fatal(err)
	}
	refused("a key that is gone", "restore the key", o)
	for link, to := range map[string]string{"link": o.Dir, "log.link": filepath.Join("log", "new.key")} {
		if err := os.Symlink(to, filepath.Join(dir, link)); err != nil {
			t.Fatal(err)
		}
	}
	refused("a key on a log that is not encrypted", "is not encrypted so far", embed.Options{Dir: bare.Dir, KeyFile: filepath.Join(dir, "bare.key")})
	for _, inside := range []string{"log.key", "deeper/log.key", "../log/log.key", "../link/log.key", "../link/new/log.key", "../log.link"} {
		refused("a key inside the data", "lies in the data directory", embed.Options{Dir: o.Dir, KeyFile: filepath.Join(o.Dir, inside)})
	}
	write(string(key), 0o600)
	if n := stored(t, o); n != 1 {
		t.Errorf("%d events after all that, with the right key again, want 1", n)
	}
}

// Two servers on one directory would write one log twice.
func TestSecondServerIsRefused(t *testing.T) {
	o := embed.Options{Dir: filepath.Join(t.TempDir(), "log")}
	s := store(t, o, true)
	if second, err := begin(o); err == nil {
		closed(t, second)
		t.Error("a second server starts on the same directory")
	} else if !strings.Contains(err.Error(), "another waybill uses this data directory") {
		t.Error(err)
	}
	closed(t, s)
	if n := stored(t, o); n != 1 {
		t.Errorf("%d events, want 1", n)
	}
}

// What a crash leaves is what lies on disk while the server runs.
func TestEventsSurviveACrash(t *testing.T) {
	for _, encrypted := range []bool{false, true} {
		dir := t.TempDir()
		o := embed.Options{Dir: filepath.Join(dir, "log")}
		if encrypted {
			o.KeyFile = filepath.Join(dir, "log.key")
		}
		store(t, o, false)
		store(t, o, true)
		after := o
		after.Dir = filepath.Join(dir, "after")
		if err := os.CopyFS(after.Dir, os.DirFS(o.Dir)); err != nil {
			t.Fatal(err)
		}
		if n := stored(t, after); n != 2 {
			t.Errorf("encrypted %t: %d events after the crash, want 2", encrypted, n)
		}
	}
}

// A crash of the process is no crash of the machine, after which the log's last
// moments may be gone.
func TestUnclean(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "log")
	unclean := func() bool {
		t.Helper()
		s, err := begin(embed.Options{Dir: dir})
		if err != nil {
			t.Fatal(err)
		}
		defer closed(t, s)
		return s.Unclean()
	}
	boot := filepath.Join(dir, "boot")
	if unclean() {
		t.Error("a first start passes for unclean")
	}
	if unclean() {
		t.Error("a start after a clean end passes for unclean")
	}
	this, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		left    string
		unclean bool
	}{{string(this), false}, {"00000000-0000-0000-0000-000000000000\n", true}} {
		if err := os.WriteFile(boot, []byte(c.left), 0o600); err != nil {
			t.Fatal(err)
		}
		if got := unclean(); got != c.unclean {
			t.Errorf("killed in boot %q: unclean is %t", c.left, got)
		}
	}
}

// The socket is for observers: it takes the URL in the file and nothing else.
func TestObserver(t *testing.T) {
	s, err := embed.Start(embed.Options{Dir: filepath.Join(t.TempDir(), "log"), Listen: "127.0.0.1:0"})
	if err != nil {
		t.Fatal(err)
	}
	defer closed(t, s)
	open(t, s, bus.RoleAdmin).Close()
	b, err := os.ReadFile(s.ObserverFile())
	if err != nil {
		t.Fatal(err)
	}
	if st, err := os.Stat(s.ObserverFile()); err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("observer file: %v, %v", st, err)
	}
	url := strings.TrimSpace(string(b))
	l, err := bus.Open(t.Context(), bus.Options{Dial: bus.URL(url, ""), Role: bus.RoleObserver})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if _, err := l.Last(t.Context()); err != nil {
		t.Error(err)
	}
	if nc, err := bus.URL("nats://"+s.Addr(), "")(bus.RoleObserver); err == nil {
		nc.Close()
		t.Error("the socket takes who has no password")
	}
}
