package projections

import (
	"bufio"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/ClickHouse/clickhouse-go/v2"
)

// EngineOptions of the ClickHouse inside.
type EngineOptions struct {
	Launcher string        // the program chserve
	Dir      string        // of tables, passwords and, while it runs, reader.url
	HTTP     string        // loopback address of its HTTP server; default a free port
	Memory   int64         // at most; default 1 GB
	Bodies   time.Duration // how long bodies are kept; 0: for ever
	Log      *slog.Logger
}

// Engine is a ClickHouse in a child process, started again when it falls.
type Engine struct {
	o EngineOptions

	mu      sync.Mutex
	at      *engineAt     // nil while it does not serve
	failed  error         // why it never will
	changed chan struct{} // closed when at changes
}

// engineAt is what the launcher says when the engine serves.
type engineAt struct {
	HTTP   string `json:"http"`
	Native string `json:"native"`
}

// NewEngine describes an engine; Run runs it.
func NewEngine(o EngineOptions) *Engine {
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	return &Engine{o: o, changed: make(chan struct{})}
}

const (
	slowest = 30 * time.Second // between two starts of an engine that keeps falling
	startup = time.Minute      // in which it has to serve
	parting = 8 * time.Second  // in which it has to go
)

// Run keeps the engine until ctx is done. An engine that does not start is
// tried again; nobody but who asks it is worse off meanwhile.
func (e *Engine) Run(ctx context.Context) error {
	for wait := 100 * time.Millisecond; ; {
		begun := time.Now()
		err := e.serve(ctx)
		if ctx.Err() != nil {
			return nil
		}
		if errors.Is(err, ErrUnsupported) {
			e.o.Log.Error("ClickHouse cannot run here, and is not tried again", "error", err)
			e.never(err)
			<-ctx.Done()
			return nil
		}
		if time.Since(begun) > time.Minute {
			wait = 100 * time.Millisecond
		}
		e.o.Log.Warn("ClickHouse ended, starting it again", "in", wait, "error", err)
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(wait):
		}
		wait = min(2*wait, slowest)
	}
}

// serve runs the engine once.
func (e *Engine) serve(ctx context.Context) error {
	e.up(nil) // what the one before has left, if we were killed with it
	args := []string{"--dir", e.o.Dir, "--memory", strconv.FormatInt(cmp.Or(e.o.Memory, 1e9), 10)}
	if e.o.HTTP != "" {
		args = append(args, "--http", e.o.HTTP)
	}
	cmd := exec.Command(e.o.Launcher, args...)
	separate(cmd)
	var ours, theirs [3]*os.File // of stdin, which ends when we end, however that is, stdout and stderr
	defer func() {
		for _, f := range append(ours[:], theirs[:]...) {
			if f != nil {
				_ = f.Close()
			}
		}
	}()
	for i, name := range []string{"stdin", "stdout", "stderr"} {
		var err error
		if ours[i], theirs[i], err = connection(name); err != nil {
			return err
		}
	}
	cmd.Stdin, cmd.Stdout, cmd.Stderr = theirs[0], theirs[1], theirs[2]
	stdin, stdout, stderr := ours[0], ours[1], ours[2]
	// The kernel kills the child when the thread is gone that started it.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("start %s: %w", e.o.Launcher, err)
	}
	for i := range theirs {
		_ = theirs[i].Close() // the child has its own
		theirs[i] = nil
	}
	late := time.AfterFunc(startup, func() { _ = cmd.Process.Kill() })
	defer late.Stop()
	defer context.AfterFunc(ctx, func() {
		_ = stdin.Close()
		late.Reset(parting)
	})()
	var readers sync.WaitGroup
	var last string
	var unprepared error
	readers.Go(func() { last = e.listen(stderr) })
	readers.Go(func() {
		var at engineAt
		if json.NewDecoder(stdout).Decode(&at) == nil && ctx.Err() == nil {
			// Who asks finds the tables: until then it does not serve.
			if unprepared = e.prepare(ctx, at); unprepared == nil {
				late.Stop()
				e.up(&at)
			} else {
				_ = cmd.Process.Kill() // it may have ended
			}
		}
		_, _ = io.Copy(io.Discard, stdout)
	})
	readers.Wait()
	err := cmd.Wait()
	e.up(nil)
	if unprepared != nil {
		return unprepared
	}
	if err == nil {
		return errors.New("it ended by itself")
	}
	if last != "" {
		err = fmt.Errorf("%w: %s", err, last)
	}
	return unsupported(err)
}

// ErrUnsupported is returned for a machine on which the engine cannot run, now or
// later.
var ErrUnsupported = errors.New("the ClickHouse inside cannot run on this machine")

// exitUnsupported is how the launcher says so.
const exitUnsupported = 3

func unsupported(err error) error {
	if exit := new(exec.ExitError); errors.As(err, &exit) && exit.ExitCode() == exitUnsupported {
		return fmt.Errorf("%w: %w", ErrUnsupported, err)
	}
	return err
}

// Supported asks a launcher whether its engine can run on this machine, and returns
// [ErrUnsupported] where it cannot. Of a launcher that falls it says nothing.
func Supported(ctx context.Context, launcher string) error {
	ctx, cancel := context.WithTimeout(ctx, startup)
	defer cancel()
	out, err := exec.CommandContext(ctx, launcher, "--check").CombinedOutput()
	if errors.Is(unsupported(err), ErrUnsupported) {
		return fmt.Errorf("%w: %s", ErrUnsupported, strings.TrimPrefix(strings.TrimSpace(string(out)), "chserve: "))
	}
	return nil
}

// never tells who waits that the engine will not serve.
func (e *Engine) never(err error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.failed = err
	close(e.changed)
	e.changed = make(chan struct{})
}

// prepare makes the tables of an engine that has just started.
func (e *Engine) prepare(ctx context.Context, at engineAt) error {
	ctx, cancel := context.WithTimeout(ctx, startup)
	defer cancel()
	password, err := e.password("gateway")
	if err != nil {
		return err
	}
	return prepare(ctx, local(at.Native, "gateway", password), e.o.Bodies)
}

// listen passes on what the engine complains of, and returns the last of it.
func (e *Engine) listen(r io.Reader) (last string) {
	in := bufio.NewReaderSize(r, 4096)
	for {
		line, more, err := in.ReadLine()
		if err != nil {
			return last
		}
		text := strings.ToValidUTF8(string(line), "?")
		for more && err == nil {
			_, more, err = in.ReadLine()
		}
		switch {
		case strings.Contains(text, "<Fatal>"), strings.HasPrefix(text, "chserve:"):
			last = text
			e.o.Log.Warn("ClickHouse", "says", text)
		case text != "":
			e.o.Log.Debug("ClickHouse", "says", text) // an error is also whoever's it is
		}
	}
}

// up tells who waits that the engine serves, or does not.
func (e *Engine) up(at *engineAt) {
	err := os.Remove(e.URLFile()) // of an engine that is gone
	if at != nil {
		err = e.leave(*at)
	}
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		e.o.Log.Warn("ClickHouse: where it is read", "error", err)
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.at = at; at != nil {
		e.o.Log.Info("ClickHouse serves", "http", at.HTTP, "native", at.Native)
	}
	close(e.changed)
	e.changed = make(chan struct{})
}

// leave writes where a reader finds the engine.
func (e *Engine) leave(at engineAt) error {
	password, err := e.password("reader")
	if err != nil {
		return err
	}
	u := url.URL{Scheme: "http", Host: at.HTTP, User: url.UserPassword("reader", password), Path: "/"}
	return os.WriteFile(e.URLFile(), []byte(u.String()+"\n"), 0o600)
}

// URLFile is the file with the URL, password included, by which anybody who may
// read the file can query over HTTP.
func (e *Engine) URLFile() string { return filepath.Join(e.o.Dir, "reader.url") }

func (e *Engine) password(user string) (string, error) {
	b, err := os.ReadFile(filepath.Join(e.o.Dir, user+".password"))
	if err != nil {
		return "", fmt.Errorf("ClickHouse's password of %s: %w", user, err)
	}
	return strings.TrimSpace(string(b)), nil
}

// ErrDown is returned for a server that does not serve now.
var ErrDown = errors.New("ClickHouse does not serve now")

// Options waits until the engine serves. When ctx ends before, it returns
// [ErrDown].
func (e *Engine) Options(ctx context.Context, readOnly bool) (*clickhouse.Options, error) {
	for {
		e.mu.Lock()
		at, changed, failed := e.at, e.changed, e.failed
		e.mu.Unlock()
		if failed != nil {
			return nil, fmt.Errorf("%w: %w", ErrDown, failed)
		}
		if at != nil {
			user := "gateway"
			if readOnly {
				user = "reader"
			}
			password, err := e.password(user)
			if err != nil {
				return nil, err
			}
			return local(at.Native, user, password), nil
		}
		select {
		case <-ctx.Done():
			return nil, fmt.Errorf("%w: %w", ErrDown, ctx.Err())
		case <-changed:
		}
	}
}
