package test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"waybill.dev/cmd/waybill/cli"
	"waybill.dev/test/gateway"
	"waybill.dev/test/peers"
)

const (
	// clientLegChild is the name under which the test's own program is the command that the conformance suite runs for
	// each of its client scenarios.
	clientLegChild = "client-leg"
	envClient      = "WAYBILL_TEST_CLIENT" // the client that the child puts behind a gateway
)

// runClientLeg is a gateway in front of the server whose URL is the last argument, with the client as its child, for as
// long as the client takes. It fails if the client did.
func runClientLeg(ctx context.Context) (err error) {
	// The suite gives up after 30 s, but then kills only the shell that it started this by.
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	dir, err := os.MkdirTemp("", "client-leg")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	listen, err1 := unusedAddr()
	admin, err2 := unusedAddr()
	if err := errors.Join(err1, err2); err != nil {
		return err
	}
	config := fmt.Sprintf("listen: %s\nadmin: %s\ndata: data\n", listen, admin) +
		// A scenario wants arguments passed on that its own tool's schema does not allow (null for a string).
		gateway.Config("servers:\n"+gateway.Server("up", os.Args[len(os.Args)-1], "approve: none"))
	file := filepath.Join(dir, "waybill.yaml")
	if err := os.WriteFile(file, []byte(config), 0o600); err != nil {
		return err
	}

	stopping, stop := context.WithCancel(ctx)
	defer stop()
	printed, stdout := io.Pipe()
	ended := make(chan error, 1)
	go func() {
		exit := cli.Run(stopping, []string{"up", "--config", file}, cli.Env{Getenv: os.Getenv, Stdout: stdout, Stderr: os.Stderr})
		err := stdout.Close()
		if exit != 0 {
			err = fmt.Errorf("gateway: exit %d", exit)
		}
		ended <- err
	}()
	ready := make(chan struct{})
	go func() {
		for lines := bufio.NewScanner(printed); lines.Scan(); {
			if strings.HasPrefix(lines.Text(), "Waybill is ready.") {
				close(ready)
				break
			}
		}
		_, _ = io.Copy(io.Discard, printed) // a pipe that nobody reads would stop the gateway
	}()
	select {
	case <-ready:
	case err := <-ended:
		return fmt.Errorf("the gateway ended before it was ready: %w", err)
	case <-ctx.Done():
		return ctx.Err()
	}

	client := exec.CommandContext(ctx, os.Getenv(envClient), "http://"+listen+"/mcp/up")
	client.Stdout, client.Stderr = os.Stdout, os.Stderr
	err = client.Run()
	var heard strings.Builder
	if exit := cli.Run(ctx, []string{"sessions", "--json", "--config", file}, cli.Env{Getenv: os.Getenv, Stdout: &heard, Stderr: os.Stderr}); exit != 0 || heard.Len() == 0 {
		err = errors.Join(err, fmt.Errorf("the gateway has heard nothing of the client (sessions: exit %d)", exit))
	}
	stop()
	return errors.Join(err, <-ended)
}

func unusedAddr() (string, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", err
	}
	return l.Addr().String(), l.Close()
}

// clientLegScenario is a client scenario of the suite that needs no authorization server.
type clientLegScenario struct {
	name   string
	passes int      // checks of the suite; it makes as many without the gateway
	left   []string // checks that it leaves out because there is nothing to check, without the gateway too; never a failure
}

// clientLeg are the suite's client scenarios for a revision, and how many others there are, which the suite names auth/….
//
// In those the scenario's server has an authorization server beside it, and checks what the client makes of the token
// that it gets there. Between such a client and its server there is no place for a gateway: "MCP servers MUST NOT accept
// or transit any other tokens" than those for their own resources (basic/authorization), so that the client's token is
// for the gateway and the server never sees it.
var clientLeg = []struct {
	revision      string
	authorization int
	scenarios     []clientLegScenario
}{
	// The client begins with server/discover, and finds at the gateway what it does not find at these servers: the
	// revision without sessions. So the gateway has the sessions with them, and translates.
	{"2025-11-25", 20, []clientLegScenario{
		{name: "initialize", passes: 1},
		{name: "tools_call", passes: 2},
		{name: "elicitation-sep1034-client-defaults", passes: 5},
		{name: "sse-retry", passes: 3},
		{name: "json-schema-2020-12-preservation", passes: 9}, // not scored
	}},
	{"2026-07-28", 31, []clientLegScenario{
		{name: "tools_call", passes: 2},
		// "Clients that support sampling MUST declare the sampling capability" (client/sampling), and so it is with
		// elicitation. In this scenario the client supports neither.
		{name: "request-metadata", passes: 6, left: []string{
			"Client declares valid sampling capability if present",
			"Client declares valid elicitation capability if present",
		}},
		{name: "sep-2322-client-request-state", passes: 5},
		// "Make MCP stateless: remove the initialize/notifications/initialized handshake" (changelog).
		{name: "http-standard-headers", passes: 9, left: []string{
			"Client sends correct Mcp-Method header on initialize request",
			"Client sends correct Mcp-Method header on notifications/initialized request",
		}},
		{name: "http-custom-headers", passes: 18},
		{name: "http-invalid-tool-headers", passes: 12},
		{name: "json-schema-ref-no-deref", passes: 1},
		{name: "json-schema-2020-12-preservation", passes: 9}, // not scored
	}},
}

// The suite's client scenarios, each with a server that checks what it is sent, hold with a gateway between that server
// and the Go SDK's client: what is checked is then what the gateway sends.
func TestConformanceOfTheClientLeg(t *testing.T) {
	t.Parallel() // likewise: see TestTasksConformance
	program, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	client := peers.EverythingClient(t)
	for _, leg := range clientLeg {
		t.Run(leg.revision, func(t *testing.T) {
			authorization := 0
			for _, name := range peers.ClientScenarios(t, leg.revision) {
				if strings.HasPrefix(name, "auth/") {
					authorization++
				} else if !slices.ContainsFunc(leg.scenarios, func(s clientLegScenario) bool { return s.name == name }) {
					t.Errorf("the suite has a scenario %s, which is not run here", name)
				}
			}
			if authorization != leg.authorization {
				t.Errorf("%d scenarios with an authorization server, not %d", authorization, leg.authorization)
			}
			for _, s := range leg.scenarios {
				t.Run(s.name, func(t *testing.T) {
					t.Parallel()
					s.holds(t, "through the gateway", peers.ConformanceClient(t, program, leg.revision, s.name,
						gateway.AsChild(clientLegChild), envClient+"="+client))
					if len(s.left) > 0 {
						s.holds(t, "without the gateway", peers.ConformanceClient(t, client, leg.revision, s.name))
					}
				})
			}
		})
	}
}

// holds demands of a run that it made as many checks as it should, that all hold, and that it left out those of s.left.
func (s clientLegScenario) holds(t *testing.T, how string, r peers.Result) {
	t.Helper()
	passed, left := 0, []string(nil)
	for _, c := range r.Scenarios[s.name] {
		switch c.Status {
		case "SUCCESS":
			passed++
		case "INFO":
		case "SKIPPED":
			left = append(left, c.Description)
		default:
			t.Errorf("%s: %s %s: %s\n\t%s", how, c.Status, c.ID, c.Description, c.Message)
		}
	}
	if passed != s.passes || !slices.Equal(left, s.left) {
		t.Errorf("%s: %d checks hold, not %d; left out: %q, not %q", how, passed, s.passes, left, s.left)
	}
	if r.Exit != 0 {
		t.Errorf("%s: conformance: exit %d", how, r.Exit)
	}
	if t.Failed() {
		t.Logf("%s conformance printed:\n%s", how, r.Output)
	}
}
