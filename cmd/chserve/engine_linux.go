package main

import (
	"bytes"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"time"
	"unsafe"

	"github.com/ebitengine/purego"
	"golang.org/x/sys/unix"
)

// engine is clickhouse-local, running inside this process.
type engine struct {
	stdin, stdout *os.File // what were this process's own; the engine has others
	prompt        *os.File // the terminal at which the engine believes to sit
	done          chan int
	listening     chan addresses

	mu    sync.Mutex
	typed []byte
}

// addresses of the two servers.
type addresses struct {
	HTTP   string `json:"http"`
	Native string `json:"native"`
}

// start runs the engine. Its two statements start the servers; then it waits at
// a prompt, which is how it stays.
//
// It sits at a terminal (a pty) because only there is clickhouse-local
// interactive, and only if interactive an exception in a connection's thread
// (a wrong password over the native protocol, garbage over HTTP) ends the
// connection and not the process.
func start(o options, config string) (*engine, error) {
	http, native, err := o.ports()
	if err != nil {
		return nil, err
	}
	e := &engine{done: make(chan int, 1), listening: make(chan addresses, 1)}
	if e.stdin, err = moved(0, "stdin"); err != nil {
		return nil, err
	}
	if e.stdout, err = moved(1, "stdout"); err != nil {
		return nil, err
	}
	unix.CloseOnExec(promptFD)
	e.prompt = os.NewFile(promptFD, "prompt") // see confine
	for fd := range 2 {
		if err := unix.Dup3(slaveFD, fd, 0); err != nil {
			return nil, fmt.Errorf("file descriptor %d: %w", fd, err)
		}
	}
	if err := unix.Close(slaveFD); err != nil {
		return nil, fmt.Errorf("the engine's terminal: %w", err)
	}
	go e.watch()

	// Calls come first: whatever is asked of the record, the gateway beside it is
	// not to wait for a processor.
	if err := yield(); err != nil {
		return nil, fmt.Errorf("priority: %w", err)
	}
	before := sockets()
	library, err := purego.Dlopen(o.library, purego.RTLD_NOW|purego.RTLD_GLOBAL)
	if err != nil {
		return nil, fmt.Errorf("load the engine: %w", err)
	}
	var handlers func(int32)
	var main func(int32, **byte) uintptr
	for name, f := range map[string]any{"chdb_set_signal_handlers_enabled": &handlers, "chdb_query_cmdline": &main} {
		at, err := purego.Dlsym(library, name)
		if err != nil {
			return nil, fmt.Errorf("%s is not the engine's library, or another version: %w", o.library, err)
		}
		purego.RegisterFunc(f, at)
	}
	handlers(0) // signals are Go's

	args := []string{
		"clickhouse", "--path=" + filepath.Join(o.dir, "store"), "--config-file=" + config, "--log-level=warning",
		"--listen_host=127.0.0.1", "--http_port=" + http, "--tcp_port=" + native,
		"--interactive", "--progress=off", "--history_file=/dev/null", "--disable_suggestion",
		"--query=SYSTEM START LISTEN HTTP; SYSTEM START LISTEN TCP",
	}
	argv := make([]*byte, len(args)+1)
	for i, a := range args {
		argv[i] = &append([]byte(a), 0)[0]
	}
	go func() {
		runtime.LockOSThread() // the engine keeps things with its thread
		code := 0
		if main(int32(len(args)), unsafe.SliceData(argv)) == 0 {
			code = 1
		}
		runtime.KeepAlive(argv)
		e.done <- code
	}()
	go e.find(before)
	return e, nil
}

// yield lowers the priority of this process, which Linux keeps for each thread;
// new ones inherit it.
func yield() error {
	threads, err := os.ReadDir("/proc/self/task")
	if err != nil {
		return err
	}
	for _, t := range threads {
		id, err := strconv.Atoi(t.Name())
		if err != nil {
			return err
		}
		if err := unix.Setpriority(unix.PRIO_PROCESS, id, 3); err != nil && err != unix.ESRCH {
			return err
		}
	}
	return nil
}

// ports are those of the addresses, which must be loopback's.
func (o options) ports() (http, native string, err error) {
	for addr, port := range map[*string]*string{&o.http: &http, &o.native: &native} {
		host, p, err := net.SplitHostPort(*addr)
		if err != nil {
			return "", "", err
		}
		if host != "127.0.0.1" {
			return "", "", fmt.Errorf("%s: the engine listens on 127.0.0.1 only", *addr)
		}
		*port = p
	}
	return http, native, nil
}

// moved gives a standard file another number, not to be inherited.
func moved(fd int, name string) (*os.File, error) {
	n, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 10)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	return os.NewFile(uintptr(n), name), nil
}

// newTerminal makes a pty.
func newTerminal() (t terminal, err error) {
	if t.prompt, err = os.OpenFile("/dev/ptmx", os.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC, 0); err != nil {
		return t, err
	}
	if err := unix.IoctlSetPointerInt(int(t.prompt.Fd()), unix.TIOCSPTLCK, 0); err != nil {
		return t, err
	}
	n, err := unix.IoctlGetInt(int(t.prompt.Fd()), unix.TIOCGPTN)
	if err != nil {
		return t, err
	}
	t.slave, err = os.OpenFile("/dev/pts/"+strconv.Itoa(n), os.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC, 0)
	return t, err
}

// terminal is a pty: the engine sits at the slave.
type terminal struct{ prompt, slave *os.File }

// Where the program that is confined finds them.
const (
	promptFD = 30
	slaveFD  = 31
)

// watch reads what the engine types at its terminal, and keeps the end of it.
func (e *engine) watch() {
	b := make([]byte, 4096)
	for {
		n, err := e.prompt.Read(b)
		if err != nil {
			return
		}
		e.mu.Lock()
		e.typed = append(e.typed, b[:n]...)
		e.typed = e.typed[max(0, len(e.typed)-2000):]
		e.mu.Unlock()
	}
}

// said is what the engine last typed, as one line.
func (e *engine) said() string {
	e.mu.Lock()
	defer e.mu.Unlock()
	return strings.Join(strings.FieldsFunc(string(e.typed), func(r rune) bool { return r < ' ' }), " ")
}

// exit asks the engine to leave its prompt.
func (e *engine) exit() { _, _ = io.WriteString(e.prompt, "exit\n") } // where it is not at it, time runs out

// find waits until both servers listen and tells which is which. The engine
// says nowhere which ports it was given, so they are found among the sockets of
// this process.
func (e *engine) find(before map[string]bool) {
	var at addresses
	for at.HTTP == "" || at.Native == "" {
		time.Sleep(5 * time.Millisecond)
		for addr := range sockets() {
			if before[addr] || addr == at.HTTP || addr == at.Native {
				continue
			}
			switch http, err := isHTTP(addr); {
			case err != nil: // not yet
			case http:
				at.HTTP = addr
			default:
				at.Native = addr
			}
		}
	}
	seal()
	e.listening <- at
	for range time.Tick(time.Second) { // there may be more of them
		seal()
	}
}

// seal makes the pipes of this process such that nobody can open them: what has them
// open goes on. The engine opens what a query names, /proc/self/fd/8 too, and would
// wait for ever at what it is itself to read; to keep it to its directory (Landlock)
// does not keep it from those, which are in none.
func seal() {
	fds, _ := os.ReadDir("/proc/self/fd") // of what is not seen now, more is seen later
	for _, fd := range fds {
		if to, err := os.Readlink("/proc/self/fd/" + fd.Name()); err == nil && strings.HasPrefix(to, "pipe:") {
			if n, err := strconv.Atoi(fd.Name()); err == nil {
				_ = unix.Fchmod(n, 0) // it may be closed by now
			}
		}
	}
}

// isHTTP asks a server for what only the HTTP server answers. It is no query:
// those of the engine's own user are counted (users.go).
func isHTTP(addr string) (bool, error) {
	c, err := net.DialTimeout("tcp", addr, time.Second)
	if err != nil {
		return false, err
	}
	defer func() { _ = c.Close() }()
	_ = c.SetDeadline(time.Now().Add(2 * time.Second))
	if _, err := io.WriteString(c, "GET /ping HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"); err != nil {
		return false, err
	}
	all, err := io.ReadAll(io.LimitReader(c, 4096)) // all, or the server complains
	line, _, _ := strings.Cut(string(all), "\n")
	return strings.Contains(line, " 200 "), err
}

// sockets are the addresses on which this process listens.
func sockets() map[string]bool {
	mine := map[string]bool{}
	fds, _ := os.ReadDir("/proc/self/fd") // of nothing, nothing is found, and found again later
	for _, fd := range fds {
		if to, err := os.Readlink("/proc/self/fd/" + fd.Name()); err == nil {
			if inode, ok := strings.CutPrefix(to, "socket:["); ok {
				mine[strings.TrimSuffix(inode, "]")] = true
			}
		}
	}
	found := map[string]bool{}
	table, _ := os.ReadFile("/proc/self/net/tcp")
	for line := range bytes.Lines(table) {
		f := strings.Fields(string(line)) // sl local remote state … inode
		if len(f) < 10 || f[3] != "0A" || !mine[f[9]] {
			continue
		}
		_, port, _ := strings.Cut(f[1], ":")
		if n, err := strconv.ParseUint(port, 16, 16); err == nil {
			found[net.JoinHostPort("127.0.0.1", strconv.FormatUint(n, 10))] = true
		}
	}
	return found
}
