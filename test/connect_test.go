package test

import (
	"context"
	"errors"
	"net/url"
	"os"
	"strings"
	"testing"

	"waybill.dev/cmd/waybill/cli"
	"waybill.dev/test/gateway"
	"waybill.dev/test/peers"
)

// connectChild is the name under which the test's own program is `waybill
// connect`, and envConnect has its arguments.
const (
	connectChild = "connect"
	envConnect   = "WAYBILL_TEST_CONNECT"
)

func runConnect(ctx context.Context) error {
	args := append([]string{"connect"}, strings.Fields(os.Getenv(envConnect))...)
	if exit := cli.Run(ctx, args, cli.Env{Getenv: os.Getenv, Stdin: os.Stdin, Stdout: os.Stdout, Stderr: os.Stderr}); exit != 0 {
		return errors.New("connect failed")
	}
	return nil
}

// connects is the command line with which a client starts `waybill connect` for
// the endpoint at a URL. Clients pass on little of their environment, so that it
// is in the command.
func connects(t testing.TB, more ...string) func(endpoint string) []string {
	t.Helper()
	program, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	return func(endpoint string) []string {
		u, err := url.Parse(endpoint)
		if err != nil {
			t.Fatal(err)
		}
		args := "--url " + u.Scheme + "://" + u.Host
		if server, ok := strings.CutPrefix(u.Path, "/mcp/"); ok {
			args += " --server " + server
		}
		return append(append([]string{"/usr/bin/env", gateway.AsChild(connectChild), envConnect + "=" + args}, more...), program)
	}
}

// Clients that nobody here has written, by stdin and stdout, of both eras, do
// what they do by HTTP: the twenty steps with sessions and a stream that breaks,
// and the tools of the era without.
func TestConnectPeers(t *testing.T) {
	g := gateway.Start(t, gateway.Config("servers:\n"+
		gateway.Server("everything", peers.ServerEverything(t), "")+
		gateway.Server("modern", peers.EverythingServer(t), "")))
	command := connects(t)
	t.Run("modern", func(t *testing.T) {
		at := g.URL + "/mcp/modern"
		t.Run("TypeScript", func(t *testing.T) { t.Parallel(); peers.ExerciseTypeScript(t, at, command(at)...) })
		t.Run("Go SDK", func(t *testing.T) { t.Parallel(); peers.ExerciseGoSDK(t, at, command(at)...) })
		t.Run("Python", func(t *testing.T) { t.Parallel(); peers.ExercisePython(t, command(at)...) })
		t.Run("Inspector", func(t *testing.T) { t.Parallel(); peers.ExerciseInspector(t, at, command(at)...) })
	})
	t.Run("legacy", func(t *testing.T) {
		peers.ExerciseLegacy(t, peers.Endpoint{URL: g.URL + "/mcp/everything", Command: command})
	})
	if err := g.Stop(); err != nil {
		t.Errorf("stopping: %v", err)
	}
}
