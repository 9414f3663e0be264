// Package gateway runs the gateway for tests as what it is: a process of its
// own, which can be stopped, killed and started again on the same data. The
// process is the test's own program, started again; [Main] tells them apart.
package gateway

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"

	"waybill.dev/cmd/waybill/cli"
	"waybill.dev/schemas"
	"waybill.dev/test/peers"
)

const (
	envChild  = "WAYBILL_TEST_CHILD" // what the process is to be
	envConfig = "WAYBILL_TEST_CONFIG"
	envRoles  = "WAYBILL_TEST_ROLES"  // "edge,policy"; all when empty
	envFlags  = "WAYBILL_TEST_FLAGS"  // of `waybill up`, by spaces
	envFaults = "WAYBILL_TEST_FAULTS" // "0.01,0.01": shares of publishes that fail, and that fail after they were stored
)

// Main is TestMain for packages that start gateways. children are further
// programs that the test's own program can be started as ([Child]).
func Main(m *testing.M, children map[string]func(context.Context) error) {
	what := os.Getenv(envChild)
	if what == "" {
		os.Exit(m.Run())
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	run := children[what]
	if what == "gateway" {
		run = gateway
	}
	err := fmt.Errorf("no child called %s", what)
	if run != nil {
		err = run(ctx)
	}
	stop()
	if err != nil {
		_, _ = fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(0)
}

func gateway(ctx context.Context) error {
	env := cli.Env{Getenv: os.Getenv, Stdout: os.Stdout, Stderr: os.Stderr}
	roles, flags := os.Getenv(envRoles), os.Getenv(envFlags)
	if roles != "" || flags != "" {
		args := append([]string{"up", "--config", os.Getenv(envConfig)}, strings.Fields(flags)...)
		for r := range strings.FieldsFuncSeq(roles, func(r rune) bool { return r == ',' }) {
			args = append(args, "--role", r)
		}
		if exit := cli.Run(ctx, args, env); exit != 0 {
			return fmt.Errorf("exit %d", exit)
		}
		return nil
	}
	return cli.Up(ctx, os.Getenv(envConfig), env, cli.Test{Fault: faults(os.Getenv(envFaults))})
}

// faults fails a share of the publishes, before or after they are stored.
func faults(spec string) func(schemas.Event, bool) error {
	before, after, ok := strings.Cut(spec, ",")
	if !ok {
		return nil
	}
	b, err1 := strconv.ParseFloat(before, 64)
	a, err2 := strconv.ParseFloat(after, 64)
	if err := errors.Join(err1, err2); err != nil {
		return func(schemas.Event, bool) error { return err }
	}
	var n atomic.Int64
	return func(_ schemas.Event, stored bool) error {
		share := b
		if stored {
			share = a
		}
		if rand.Float64() < share {
			return fmt.Errorf("injected fault %d", n.Add(1))
		}
		return nil
	}
}

// AsChild is the environment that makes the test's own program one of Main's
// children, for others to start it.
func AsChild(name string) string { return envChild + "=" + name }

// Child starts the test's own program as one of Main's children.
func Child(t testing.TB, name string, env ...string) *peers.Process {
	return peers.Self(t, append(env, AsChild(name))...)
}

// Gateway is a gateway and where to reach it; the addresses stay over restarts.
type Gateway struct {
	*peers.Process
	URL   string // http://127.0.0.1:…, of the public listener
	Admin string
	Dir   string // with waybill.yaml and data/
	env   []string
	t     testing.TB
}

// Config is a configuration for tests: one tenant and one anonymous agent who
// may do everything, and no record, unless more (YAML, top level) says otherwise, as it must
// where it has `servers:`. In it {dir} stands for the gateway's directory.
func Config(more string) string {
	if !strings.Contains(more, "tenants:") {
		more += "\ntenants: [{id: acme}]\nagents: [{id: researcher, tenant: acme}]\nauth: {anonymous: researcher}\n"
	}
	if !strings.Contains(more, "allow:") {
		more += "\nallow: [{agents: ['*'], servers: ['*'], tools: ['*']}]\n"
	}
	if !strings.Contains(more, "clickhouse:") {
		more += "\nclickhouse: false\n"
	}
	return more
}

// Native is the line of a server that is spoken to as whoever calls speaks: one
// that serves the revisions with sessions and those without, and is to be heard
// in its own words, whatever these are: unless more says otherwise, nothing of it
// is pinned.
func Native(name, url, more string) string {
	if more != "" {
		more = ", " + more
	}
	if !strings.Contains(more, "approve:") {
		more += ", approve: none"
	}
	return fmt.Sprintf("  - {name: %s, mcp: {url: %q, era: client}%s}\n", name, url, more)
}

// Server is a line of `servers:`.
func Server(name, url, more string) string {
	if more != "" {
		more = ", " + more
	}
	return fmt.Sprintf("  - {name: %s, mcp: {url: %q}%s}\n", name, url, more)
}

// Command is a line of `servers:` for a server over stdio. mcp is what else is
// said of it there.
func Command(name string, command []string, mcp string) string {
	b, err := json.Marshal(command) // which is YAML
	if err != nil {
		return err.Error() // which is no configuration
	}
	if mcp != "" {
		mcp = ", " + mcp
	}
	return fmt.Sprintf("  - {name: %s, mcp: {command: %s%s}}\n", name, b, mcp)
}

// Stdio is a line of `servers:` for one of Main's children, as a server over stdio.
func Stdio(t testing.TB, name, child, more string) string {
	t.Helper()
	program, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	if more != "" {
		more = ", " + more
	}
	return fmt.Sprintf("  - {name: %s, mcp: {command: [%q], env: {%s: %s}}%s}\n", name, program, envChild, child, more)
}

// Start runs a gateway with a configuration (see [Config]) and returns when it
// is ready.
func Start(t testing.TB, config string, env ...string) *Gateway {
	t.Helper()
	g := &Gateway{Dir: t.TempDir(), env: env, t: t}
	listen, admin := FreeAddr(t), FreeAddr(t)
	config = fmt.Sprintf("listen: %s\nadmin: %s\ndata: data\n%s", listen, admin, strings.ReplaceAll(config, "{dir}", g.Dir))
	if err := os.WriteFile(g.File(), []byte(config), 0o600); err != nil {
		t.Fatal(err)
	}
	g.URL, g.Admin = "http://"+listen, "http://"+admin
	g.Restart()
	return g
}

// Faults is the environment with which a share of a gateway's publishes fail,
// and another fail after they were stored.
func Faults(before, after float64) string { return fmt.Sprintf("%s=%g,%g", envFaults, before, after) }

// Roles is the environment of a gateway process that runs only some roles.
func Roles(roles ...string) string { return envRoles + "=" + strings.Join(roles, ",") }

// File is the configuration file.
func (g *Gateway) File() string { return filepath.Join(g.Dir, "waybill.yaml") }

// Restart starts the gateway, again, with flags of `waybill up`, and returns when it is
// ready.
func (g *Gateway) Restart(flags ...string) {
	g.t.Helper()
	g.Launch(flags...)
	if _, err := g.Await(g.t.Context(), "Waybill is ready."); err != nil {
		g.t.Fatal(err)
	}
}

// Launch is Restart that waits for nothing.
func (g *Gateway) Launch(flags ...string) {
	g.t.Helper()
	g.Process = Child(g.t, "gateway", append(g.env, envConfig+"="+g.File(), envFlags+"="+strings.Join(flags, " "))...)
}

// CLI runs a waybill command against the gateway and returns what it printed.
func (g *Gateway) CLI(args ...string) (stdout, stderr string, exit int) {
	var out, errs strings.Builder
	exit = cli.Run(g.t.Context(), append(args, "--config", g.File()), cli.Env{
		Getenv: func(string) string { return "" }, Stdout: &out, Stderr: &errs,
	})
	return out.String(), errs.String(), exit
}

// Events reads all events of the log, session by session, through the admin API.
func (g *Gateway) Events() []schemas.Event {
	g.t.Helper()
	var all []schemas.Event
	out, errs, exit := g.CLI("sessions", "--json", "--limit", "0")
	if exit != 0 {
		g.t.Fatalf("sessions: %s", errs)
	}
	for line := range strings.Lines(out) {
		var s struct{ Session schemas.SessionKey }
		if err := json.Unmarshal([]byte(line), &s); err != nil {
			g.t.Fatal(err)
		}
		all = append(all, g.Session(s.Session)...)
	}
	return all
}

// Session reads the events of one session.
func (g *Gateway) Session(key schemas.SessionKey) []schemas.Event {
	g.t.Helper()
	out, errs, exit := g.CLI("replay", string(key), "--json")
	if exit != 0 {
		g.t.Fatalf("replay %s: %s", key, errs)
	}
	var events []schemas.Event
	for line := range strings.Lines(out) {
		var e schemas.Event
		if err := json.Unmarshal([]byte(line), &e); err != nil {
			g.t.Fatal(err)
		}
		events = append(events, e)
	}
	return events
}

// Answer is what the gateway said to a POST.
type Answer struct {
	Status int
	Header http.Header
	Body   []byte
}

// Meta is the `_meta` member that every request of revision 2026-07-28 needs.
const Meta = `"_meta":{"io.modelcontextprotocol/protocolVersion":"2026-07-28","io.modelcontextprotocol/clientCapabilities":{}}`

// Post sends a body to the endpoint of a server, or of all for "", with the headers that mirror a
// request for method and name; header lines "Name: value" come on top.
func (g *Gateway) Post(ctx context.Context, server, method, name, body string, header ...string) (Answer, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, strings.TrimSuffix(g.URL+"/mcp/"+server, "/"), strings.NewReader(body))
	if err != nil {
		return Answer{}, err
	}
	req.Header.Set("Content-Type", "application/json")
	req.Header.Set("Accept", "application/json, text/event-stream")
	req.Header.Set("MCP-Protocol-Version", "2026-07-28")
	req.Header.Set("Mcp-Method", method)
	if name != "" {
		req.Header.Set("Mcp-Name", name)
	}
	for _, h := range header {
		k, v, _ := strings.Cut(h, ": ")
		req.Header.Set(k, v)
	}
	resp, err := client.Do(req)
	if err != nil {
		return Answer{}, err
	}
	defer func() { _ = resp.Body.Close() }()
	b, err := io.ReadAll(resp.Body)
	return Answer{resp.StatusCode, resp.Header, b}, err
}

var client = &http.Client{Transport: &http.Transport{MaxIdleConnsPerHost: 512}}

// FreeAddr is an address that was free a moment ago.
func FreeAddr(t testing.TB) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	addr := l.Addr().String()
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	return addr
}
