package test

import (
	"context"
	"encoding/json"
	"errors"
	"net"
	"net/url"
	"os"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"waybill.dev/cmd/waybill/cli"
	"waybill.dev/schemas"
	"waybill.dev/test/gateway"
	"waybill.dev/test/peers"
)

// serveChild is the name under which the test's own program is `waybill replay`,
// and envServe has its arguments.
const (
	serveChild = "serve"
	envServe   = "WAYBILL_TEST_SERVE"
)

func runServe(ctx context.Context) error {
	args := append([]string{"replay"}, strings.Fields(os.Getenv(envServe))...)
	if exit := cli.Run(ctx, args, cli.Env{Getenv: os.Getenv, Stdout: os.Stdout, Stderr: os.Stderr}); exit != 0 {
		return errors.New("replay failed")
	}
	return nil
}

// serveRecord serves a session from the record of a gateway, and returns where.
func serveRecord(t *testing.T, g *gateway.Gateway, session schemas.SessionKey, flags string) (*peers.Process, string) {
	t.Helper()
	args := string(session) + " --config " + g.File() + " --serve 127.0.0.1:0 " + flags
	p := gateway.Child(t, serveChild, envServe+"="+args)
	at, err := p.Await(t.Context(), "  MCP endpoint ")
	if err != nil {
		t.Fatal(err)
	}
	return p, at
}

// What clients that nobody here has written were told by server-everything through
// the gateway they are told again from the record, in both eras: their output is
// the same, byte for byte, while neither the server nor the gateway runs. What
// they ask otherwise is named.
func TestServedFromTheRecord(t *testing.T) {
	t.Parallel()
	awayFromTheHour(t)
	const echo, front = "echo", "echo__echo"
	programs := peers.Programs()
	said := make([]string, len(programs))
	type served struct {
		*peers.Process
		at, era string
	}
	var g *gateway.Gateway
	var upstream, frontSaid string
	var changed []served // replays for clients that do something else
	serve := func(of recorded) served {
		p, at := serveRecord(t, g, of.key, "--fast")
		return served{p, at, of.era}
	}
	t.Run("recorded", func(rec *testing.T) {
		upstream = peers.ServerEverything(rec)
		config := "servers:\n" + gateway.Server(echo, upstream, "")
		for _, p := range programs {
			config += gateway.Server(p.Name, upstream, "")
		}
		g = gateway.Start(t, gateway.Config(config))
		for i, p := range programs {
			rec.Run(p.Name, func(t *testing.T) {
				t.Parallel()
				out := p.Run(t, g.URL+"/mcp/"+p.Name, p.Name)
				if said[i] = out.Stdout; out.Exit != 0 || !json.Valid([]byte(out.Stdout)) {
					t.Errorf("exit %d\n%s%s", out.Exit, out.Stdout, out.Stderr)
				}
			})
		}
		rec.Run("all servers", func(t *testing.T) {
			t.Parallel()
			out := peers.Echoes(t, "legacy", g.URL+"/mcp", front, "as it was")
			if frontSaid = out.Stdout; out.Exit != 0 {
				t.Errorf("exit %d\n%s%s", out.Exit, out.Stdout, out.Stderr)
			}
		})
		rec.Run(echo, func(t *testing.T) {
			t.Parallel()
			for _, era := range []string{"modern", "legacy"} {
				if out := peers.Echoes(t, era, g.URL+"/mcp/"+echo, echo, "as it was"); out.Exit != 0 {
					t.Errorf("%s: exit %d\n%s%s", era, out.Exit, out.Stdout, out.Stderr)
				}
			}
			sessions := sessionsAt(g, echo)
			for _, of := range sessions {
				changed = append(changed, serve(of))
			}
			// What is not in the record can be made at the gateway instead.
			for _, of := range sessions {
				p, at := serveRecord(t, g, of.key, "--fast --on-miss live")
				if out := peers.Echoes(t, of.era, at, echo, "something else"); out.Exit != 0 || !strings.Contains(out.Stdout, "Echo: something else") {
					t.Errorf("live: %s: exit %d\n%s%s\n%s", of.era, out.Exit, out.Stdout, out.Stderr, p.Output())
				}
				differs(t, p, `- /arguments/message: "as it was"`, `+ /arguments/message: "something else"`, "made at the running gateway", "1 not recorded, 1 never asked for")
			}
		})
	})
	if t.Failed() {
		return
	}

	again := map[string][]served{}
	for _, p := range programs {
		for _, of := range sessionsAt(g, p.Name) {
			again[p.Name] = append(again[p.Name], serve(of))
		}
	}
	all := sessionsAt(g, schemas.Gateway)
	if len(all) != 1 {
		t.Fatalf("sessions at all servers: %v", all)
	}
	together := serve(all[0])
	if err := g.Stop(); err != nil {
		t.Errorf("stopping: %v", err)
	}
	asked := knocks(t, upstream)
	t.Run("again", func(t *testing.T) {
		for i, program := range programs {
			t.Run(program.Name, func(t *testing.T) {
				t.Parallel()
				if n := len(again[program.Name]); n != 1 {
					t.Fatalf("%d sessions were recorded", n)
				}
				p := again[program.Name][0]
				out := program.Run(t, p.at, program.Name)
				if out.Exit != 0 || out.Stdout != said[i] {
					t.Errorf("exit %d, recorded\n%s\nagain\n%s%s", out.Exit, said[i], out.Stdout, out.Stderr)
				}
				if err := p.Stop(); err != nil || !strings.Contains(p.Output(), " answered from the record, 0 not recorded, 0 never asked for; 0 differences") {
					t.Errorf("%v\n%s", err, p.Output())
				}
			})
		}
		t.Run("all servers", func(t *testing.T) {
			t.Parallel()
			if out := peers.Echoes(t, "legacy", together.at, front, "as it was"); out.Exit != 0 || out.Stdout != frontSaid {
				t.Errorf("exit %d, recorded\n%s\nagain\n%s%s", out.Exit, frontSaid, out.Stdout, out.Stderr)
			}
			if err := together.Stop(); err != nil {
				t.Errorf("%v\n%s", err, together.Output())
			}
		})
		for _, p := range changed {
			t.Run("changed "+p.era, func(t *testing.T) {
				t.Parallel()
				const diff = `+ /arguments/message: "something else"`
				out := peers.Echoes(t, p.era, p.at, echo, "something else")
				if out.Exit == 0 || !strings.Contains(out.Stderr, diff) {
					t.Errorf("exit %d\n%s%s", out.Exit, out.Stdout, out.Stderr)
				}
				differs(t, p.Process, `- /arguments/message: "as it was"`, diff, "1 not recorded, 1 never asked for; 1 difference")
			})
		}
	})
	if n := asked.Load(); n != 0 {
		t.Errorf("the server was called %d times", n)
	}
}

// awayFromTheHour waits out the end of an hour: clients without a session ID have
// a session for each.
func awayFromTheHour(t *testing.T) {
	t.Helper()
	now := time.Now().UTC()
	if left := now.Truncate(time.Hour).Add(time.Hour).Sub(now); left < 45*time.Second {
		select {
		case <-time.After(left):
		case <-t.Context().Done():
		}
	}
}

// differs checks that a replay ends with 1 and has said these things.
func differs(t *testing.T, p *peers.Process, want ...string) {
	t.Helper()
	if err := p.Stop(); err == nil {
		t.Error("exit 0")
	}
	for _, w := range want {
		if !strings.Contains(p.Output(), w) {
			t.Errorf("not said: %s\n%s", w, p.Output())
		}
	}
}

// recorded is a session in the log.
type recorded struct {
	key schemas.SessionKey
	era string
}

// sessionsAt are the sessions whose client called a server, the first recorded of
// each era.
func sessionsAt(g *gateway.Gateway, server string) (all []recorded) {
	seen := map[schemas.SessionKey]bool{}
	eras := map[string]bool{}
	for _, e := range g.Events() {
		d, ok := e.Data.(*schemas.Requested)
		if !ok || d.Within(e) || d.Server != server || seen[e.Session] {
			continue
		}
		seen[e.Session] = true
		era := "legacy"
		if d.Revision >= "2026-07-28" {
			era = "modern"
		}
		if !eras[era] {
			all = append(all, recorded{e.Session, era})
		}
		eras[era] = true
	}
	return all
}

// knocks counts who wants to connect to where a server was.
func knocks(t *testing.T, at string) *atomic.Int64 {
	t.Helper()
	u, err := url.Parse(at)
	if err != nil {
		t.Fatal(err)
	}
	ln, err := net.Listen("tcp", u.Host)
	if err != nil {
		t.Fatal(err)
	}
	var n atomic.Int64
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			n.Add(1)
			_ = c.Close()
		}
	}()
	t.Cleanup(func() { _ = ln.Close(); <-done })
	return &n
}
