// Package embed runs the NATS server inside the process, so that there is
// nothing to install. It opens no socket unless it is told to; the bus reaches
// it through an in-process connection, with a user of its own for each role.
package embed

import (
	"context"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"

	"waybill.dev/bus"
)

// Options of the embedded server. The zero value of a field is its default.
type Options struct {
	Dir         string        // where it stores; required
	Sync        time.Duration // how often written events are fsynced; default 100 ms. A power cut loses at most that much
	SyncAlways  bool          // fsync every event before it is acknowledged
	Listen      string        // host:port of a NATS socket for subscribers; "" opens none
	KeyFile     string        // encrypts what is stored (AES-GCM) with the key in this file, which must not be in Dir; made when missing
	MaxPayload  int           // bytes of one message; default 8 MiB
	Subscribers []Subscriber  // who reads the audit's feed at the socket; needs Listen
	Log         *slog.Logger
}

// Server is a running NATS server. Close it last.
type Server struct {
	ns       *server.Server
	dir      string
	users    map[bus.Role]string // passwords
	unclean  bool                // the machine went down while the last server ran
	observer string
	ready    atomic.Bool
	unlock   func()
}

// Start starts the server and returns when it takes connections. It fails when
// another process holds the directory, when the key does not fit what is
// stored, or when the socket is taken.
func Start(o Options) (*Server, error) {
	if o.Sync == 0 {
		o.Sync = 100 * time.Millisecond
	}
	if o.MaxPayload == 0 {
		o.MaxPayload = 8 << 20
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	if err := os.MkdirAll(o.Dir, 0o700); err != nil {
		return nil, fmt.Errorf("data directory: %w", err)
	}
	s := &Server{dir: o.Dir, users: map[bus.Role]string{}}
	key, err := o.key()
	if err != nil {
		return nil, err
	}
	unlock, err := lock(filepath.Join(o.Dir, "lock"))
	if err != nil {
		return nil, err
	}
	keep := false
	defer func() {
		if !keep {
			unlock()
		}
	}()
	if err := checkKey(filepath.Join(o.Dir, keyCheck), key); err != nil {
		return nil, err
	}
	if s.unclean, err = markBoot(filepath.Join(o.Dir, "boot")); err != nil {
		return nil, err
	}

	opts := &server.Options{
		ServerName:   "waybill",
		DontListen:   true,
		NoSigs:       true,
		NoLog:        false,
		JetStream:    true,
		StoreDir:     o.Dir,
		SyncInterval: o.Sync,
		SyncAlways:   o.SyncAlways,
		MaxPayload:   int32(o.MaxPayload),
		MaxPending:   256 << 20,
		// What is published and not yet stored. The edge lets in half of that,
		// and answers come beside it.
		StreamMaxBufferedSize: 256 << 20,
		Users:                 []*server.User{},
		// A reader, and a call that a client has come back for, has one each; how
		// many there may be is the edge's to say. The default would be 1000.
		JetStreamLimits: server.JSLimitOpts{DefaultMaxConsumers: -1},
	}
	if key != "" {
		opts.JetStreamKey, opts.JetStreamCipher = key, server.AES
	}
	if o.Listen != "" {
		host, port, err := net.SplitHostPort(o.Listen)
		if err != nil {
			return nil, fmt.Errorf("bus.embedded.listen: %w", err)
		}
		opts.DontListen, opts.Host = false, host
		if opts.Port, err = strconv.Atoi(port); err != nil {
			return nil, fmt.Errorf("bus.embedded.listen: port %q: %w", port, err)
		}
		if opts.Port == 0 {
			opts.Port = server.RANDOM_PORT
		}
	}
	for _, r := range bus.Roles() {
		pass := rand.Text()
		s.users[r] = pass
		may := r.Permissions()
		opts.Users = append(opts.Users, &server.User{Username: string(r), Password: pass, Permissions: &server.Permissions{
			Publish:   &server.SubjectPermission{Allow: may.Publish, Deny: may.Never},
			Subscribe: &server.SubjectPermission{Allow: may.Subscribe},
		}})
	}
	passwords, err := o.passwords()
	if err != nil {
		return nil, err
	}
	addSubscribers(opts, o.Subscribers, passwords)
	if s.ns, err = server.NewServer(opts); err != nil {
		return nil, fmt.Errorf("embedded NATS: %w", err)
	}
	if err := share(s.ns, o.Subscribers); err != nil {
		return nil, err
	}
	lg := &logger{log: o.Log}
	s.ns.SetLoggerV2(lg, false, false, false)
	s.ns.Start()
	if !s.ns.ReadyForConnections(time.Minute) {
		s.ns.Shutdown()
		return nil, fmt.Errorf("embedded NATS did not start: %s", lg.last())
	}
	if !s.ns.JetStreamEnabled() {
		s.ns.Shutdown()
		return nil, fmt.Errorf("embedded NATS started without JetStream: %s", lg.last())
	}
	if len(o.Subscribers) > 0 {
		if err := enable(s.ns); err != nil {
			s.ns.Shutdown()
			return nil, err
		}
	}
	if o.Listen != "" {
		u := fmt.Sprintf("nats://%s:%s@%s\n", bus.RoleObserver, s.users[bus.RoleObserver], s.ns.Addr())
		s.observer = filepath.Join(o.Dir, "observer.url")
		err := os.WriteFile(s.observer, []byte(u), 0o600)
		if err == nil {
			err = o.writeSubscribers(s.ns.Addr().String(), passwords)
		}
		if err != nil {
			s.ns.Shutdown()
			return nil, err
		}
	}
	keep, s.unlock = true, unlock
	s.ready.Store(true)
	return s, nil
}

// Unclean tells whether the machine went down (its boot id changed) without
// the last server having been closed: what it stored in its last moments may
// be gone. Always false with SyncAlways, by the caller's choice to ignore it.
func (s *Server) Unclean() bool { return s.unclean }

// Addr is the address of the socket, or "".
func (s *Server) Addr() string {
	if s.observer == "" {
		return ""
	}
	return s.ns.Addr().String()
}

// ObserverFile is the file with the URL and credentials of the read-only user,
// or "" when there is no socket.
func (s *Server) ObserverFile() string { return s.observer }

// Connect opens an in-process connection for a role. It is a [bus.Dialer].
func (s *Server) Connect(r bus.Role, opts ...nats.Option) (*nats.Conn, error) {
	opts = append([]nats.Option{nats.InProcessServer(s.ns), nats.UserInfo(string(r), s.users[r]), nats.Name("waybill " + string(r)), r.Inbox()}, opts...)
	return nats.Connect("", opts...)
}

// Close stops the server after everything is on disk, and notes that it was
// closed.
func (s *Server) Close() error {
	if !s.ready.Swap(false) {
		return nil
	}
	s.ns.Shutdown()
	s.ns.WaitForShutdown()
	defer s.unlock()
	return os.WriteFile(filepath.Join(s.dir, "boot"), []byte("clean\n"), 0o600)
}

// key reads or makes the key of encryption at rest.
func (o Options) key() (string, error) {
	if o.KeyFile == "" {
		return "", nil
	}
	dir, err := filepath.Abs(o.Dir)
	if err != nil {
		return "", err
	}
	file, err := filepath.Abs(o.KeyFile)
	if err != nil {
		return "", err
	}
	if err := KeyOutside(file, dir); err != nil {
		return "", fmt.Errorf("bus.embedded.key_file: %w", err)
	}
	b, err := os.ReadFile(file)
	switch {
	case errors.Is(err, os.ErrNotExist):
		if _, err := os.Stat(filepath.Join(dir, "jetstream")); err == nil {
			if _, err := os.Stat(filepath.Join(dir, keyCheck)); errors.Is(err, os.ErrNotExist) {
				return "", fmt.Errorf("bus.embedded.key_file %s is missing, and the log in %s is not encrypted so far: to have it encrypted, make the key first, with: (umask 077; head -c 48 /dev/urandom | base64 -w0 > %[1]s)", file, dir)
			}
			return "", fmt.Errorf("bus.embedded.key_file %s is missing, and the log in %s is encrypted: restore the key, or start with an empty data directory", file, dir)
		}
		if err := os.MkdirAll(filepath.Dir(file), 0o700); err != nil {
			return "", err
		}
		k := base64.StdEncoding.EncodeToString([]byte(rand.Text() + rand.Text()))
		return k, os.WriteFile(file, []byte(k+"\n"), 0o600)
	case err != nil:
		return "", fmt.Errorf("bus.embedded.key_file: %w", err)
	}
	if st, err := os.Stat(file); err == nil && st.Mode().Perm()&0o077 != 0 {
		return "", fmt.Errorf("bus.embedded.key_file %s can be read by others (mode %o): chmod 600", file, st.Mode().Perm())
	}
	k := strings.TrimSpace(string(b))
	if len(k) < 32 {
		return "", fmt.Errorf("bus.embedded.key_file %s holds %d characters; it needs at least 32", file, len(k))
	}
	return k, nil
}

// keyCheck holds a fingerprint of the key, where there is one.
const keyCheck = "key.check"

// KeyOutside refuses a key file that lies in a directory it is to protect,
// there or behind symbolic links. Neither needs to exist.
func KeyOutside(file, dir string) error {
	at, err := resolve(filepath.Clean(file), 0)
	if err != nil {
		return err
	}
	in, err := resolve(filepath.Clean(dir), 0)
	if err != nil {
		return err
	}
	if rel, err := filepath.Rel(in, at); err == nil && rel != ".." && !strings.HasPrefix(rel, ".."+string(filepath.Separator)) {
		return fmt.Errorf("%s lies in the data directory %s: whoever takes the data would take the key", file, dir)
	}
	return nil
}

// resolve takes the symbolic links out of an absolute path, of which the end may
// not exist yet.
func resolve(path string, links int) (string, error) {
	whole, err := filepath.EvalSymlinks(path)
	if !errors.Is(err, os.ErrNotExist) {
		return whole, err
	}
	parent, name := filepath.Split(strings.TrimRight(path, string(filepath.Separator)))
	if name == "" || links > 40 {
		return "", err
	}
	// A link to what does not exist is where a file would be made.
	if to, err := os.Readlink(filepath.Join(parent, name)); err == nil {
		if !filepath.IsAbs(to) {
			to = parent + to
		}
		return resolve(to, links+1)
	}
	if parent, err = resolve(parent, links); err != nil {
		return "", err
	}
	return filepath.Join(parent, name), nil
}

// checkKey refuses a key that is not the one of the stored data, of which file
// keeps a fingerprint. The server would not refuse it: it leaves out the
// streams that it cannot read, and making them anew then destroys them.
func checkKey(file, key string) error {
	mac := hmac.New(sha256.New, []byte(key))
	mac.Write([]byte("waybill.dev: the key of this log"))
	print := hex.EncodeToString(mac.Sum(nil)) + "\n"
	before, err := os.ReadFile(file)
	switch {
	case errors.Is(err, os.ErrNotExist) && key == "":
		return nil
	case errors.Is(err, os.ErrNotExist):
		return os.WriteFile(file, []byte(print), 0o600)
	case err != nil:
		return err
	case key == "":
		return fmt.Errorf("the log in %s is encrypted: set bus.embedded.key_file", filepath.Dir(file))
	case !hmac.Equal(before, []byte(print)):
		return fmt.Errorf("bus.embedded.key_file holds another key than the one that encrypts %s", filepath.Dir(file))
	}
	return nil
}

// markBoot notes in file that a server runs in this boot of the machine, and
// tells whether the one before was cut off by an earlier boot's end.
func markBoot(file string) (unclean bool, err error) {
	id, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		id = []byte("no boot id\n") // not Linux: a crash of the machine cannot be told from one of the process
	}
	before, err := os.ReadFile(file)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return false, err
	}
	unclean = err == nil && string(before) != "clean\n" && string(before) != string(id)
	return unclean, os.WriteFile(file, id, 0o600)
}

// logger passes the server's words on: warnings and errors only, as they end
// here and nowhere else.
type logger struct {
	log  *slog.Logger
	text atomic.Pointer[string]
}

func (l *logger) last() string {
	if t := l.text.Load(); t != nil {
		return *t
	}
	return "no reason given"
}

func (l *logger) say(level slog.Level, f string, v []any) {
	t := fmt.Sprintf(f, v...)
	l.text.Store(&t)
	l.log.Log(context.Background(), level, "nats: "+t)
}

func (l *logger) Noticef(string, ...any) {}
func (l *logger) Debugf(string, ...any)  {}
func (l *logger) Tracef(string, ...any)  {}
func (l *logger) Warnf(f string, v ...any) {
	// The roles' passwords are made at start and never leave the process; hashing
	// them would cost a second at every start and protect nothing.
	if !strings.HasPrefix(f, "Plaintext passwords") {
		l.say(slog.LevelWarn, f, v)
	}
}
func (l *logger) Errorf(f string, v ...any) { l.say(slog.LevelError, f, v) }
func (l *logger) Fatalf(f string, v ...any) { l.say(slog.LevelError, f, v) }
