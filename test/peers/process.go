package peers

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// Process is a running child. It ends with the test, and with the test's
// process should that be killed.
type Process struct {
	cmd    *exec.Cmd
	exited <-chan error
	out    output

	once sync.Once
	end  error
}

// Self starts the test's own program again, with additions to its environment
// that tell it what to be.
func Self(t testing.TB, env ...string) *Process {
	t.Helper()
	program, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(program)
	cmd.Env = append(os.Environ(), env...)
	p := &Process{cmd: cmd}
	cmd.Stdout, cmd.Stderr = &p.out, &p.out
	if p.exited, err = start(cmd); err != nil {
		t.Fatalf("starting %v: %v", env, err)
	}
	t.Cleanup(func() {
		p.Kill()
		if t.Failed() {
			t.Logf("process %v printed:\n%s", env, tail(p.Output(), 6000))
		}
	})
	return p
}

// Kill ends the process with SIGKILL, if it runs, and returns when it is gone.
func (p *Process) Kill() {
	_ = p.cmd.Process.Kill() // it may have ended already, which is as good
	_ = p.wait()             // how it ended is what we just did
}

// Stop asks the process to end (SIGTERM) and returns how it ended.
func (p *Process) Stop() error {
	if err := p.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		return err
	}
	return p.wait()
}

func (p *Process) wait() error {
	p.once.Do(func() { p.end = <-p.exited })
	return p.end
}

// Pid is the process's id.
func (p *Process) Pid() int { return p.cmd.Process.Pid }

// Output is what it has printed so far, both streams.
func (p *Process) Output() string { return p.out.String() }

// Await waits until a line that starts with prefix has been printed, and
// returns the rest of that line.
func (p *Process) Await(ctx context.Context, prefix string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	for {
		text, more := p.out.watch()
		for line := range strings.Lines(text) {
			if rest, ok := strings.CutPrefix(line, prefix); ok && strings.HasSuffix(rest, "\n") {
				return strings.TrimSpace(rest), nil
			}
		}
		select {
		case <-more:
		case <-time.After(time.Second): // to see that it ended
			select {
			case err := <-p.exited:
				p.once.Do(func() { p.end = err })
				return "", fmt.Errorf("ended before it printed %q: %v\n%s", prefix, err, tail(p.Output(), 4000))
			default:
			}
		case <-ctx.Done():
			return "", fmt.Errorf("did not print %q: %w\n%s", prefix, ctx.Err(), tail(p.Output(), 4000))
		}
	}
}

func tail(s string, n int) string {
	if len(s) > n {
		return "…" + s[len(s)-n:]
	}
	return s
}

// output collects what a process prints and wakes who waits for it.
type output struct {
	mu   sync.Mutex
	buf  bytes.Buffer
	more chan struct{}
}

func (o *output) Write(b []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.more != nil {
		close(o.more)
		o.more = nil
	}
	return o.buf.Write(b)
}

func (o *output) String() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.buf.String()
}

// watch returns what there is and a channel that closes when there is more.
func (o *output) watch() (string, <-chan struct{}) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.more == nil {
		o.more = make(chan struct{})
	}
	return o.buf.String(), o.more
}
