package test

import (
	"context"
	"encoding/json"
	"errors"
	"net"
	"net/url"
	"os"
	"slices"
	"strings"
	"sync"
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
	const echo, front, then, now = "echo", "echo__echo", "as it was", "something else"
	type visit struct {
		at, era string // endpoint below /mcp, "" for all servers; era "": as the program has it
		run     func(t testing.TB, url string) peers.Output
		said    string
		served  *peers.Process
		url     string
	}
	var visits []*visit
	for _, p := range peers.Programs() {
		visits = append(visits, &visit{at: p.Name, run: func(t testing.TB, url string) peers.Output { return p.Run(t, url, p.Name) }})
	}
	echoes := func(era, tool, word string) func(testing.TB, string) peers.Output {
		return func(t testing.TB, url string) peers.Output { return peers.Echoes(t, era, url, tool, word) }
	}
	visits = append(visits, &visit{run: echoes("legacy", front, then)})
	changed := []*visit{{at: echo, era: "modern", run: echoes("modern", echo, then)}, {at: echo, era: "legacy", run: echoes("legacy", echo, then)}}
	visits = append(visits, changed...)

	var g *gateway.Gateway
	var upstream string
	t.Run("recorded", func(rec *testing.T) {
		upstream = peers.ServerEverything(rec)
		config := "servers:\n" + gateway.Server(echo, upstream, "")
		for _, p := range peers.Programs() {
			config += gateway.Server(p.Name, upstream, "")
		}
		g = gateway.Start(t, gateway.Config(config))
		together(visits, func(v *visit) {
			out := v.run(rec, strings.TrimSuffix(g.URL+"/mcp/"+v.at, "/"))
			if v.said = out.Stdout; out.Exit != 0 || !json.Valid([]byte(out.Stdout)) {
				rec.Errorf("%s: exit %d\n%s%s", v.at, out.Exit, out.Stdout, out.Stderr)
			}
		})
		events := g.Events()
		for _, v := range visits {
			session, n := sessionAt(events, v.at, v.era)
			if n != 1 {
				rec.Fatalf("%q %s: %d sessions were recorded", v.at, v.era, n)
			}
			v.served, v.url = serveRecord(t, g, session, "--fast")
			if v.at != echo {
				continue
			}
			// What is not in the record can be made at the gateway instead.
			p, at := serveRecord(t, g, session, "--fast --on-miss live")
			if out := echoes(v.era, echo, now)(rec, at); out.Exit != 0 || !strings.Contains(out.Stdout, "Echo: "+now) {
				rec.Errorf("live: %s: exit %d\n%s%s\n%s", v.era, out.Exit, out.Stdout, out.Stderr, p.Output())
			}
			differs(rec, p, `- /arguments/message: "`+then+`"`, `+ /arguments/message: "`+now+`"`, "made at the running gateway", "1 not recorded, 1 never asked for")
		}
	})
	if t.Failed() {
		return
	}
	if err := g.Stop(); err != nil {
		t.Errorf("stopping: %v", err)
	}
	asked := knocks(t, upstream)
	together(visits, func(v *visit) {
		if v.era != "" {
			diff := `+ /arguments/message: "` + now + `"`
			if out := echoes(v.era, echo, now)(t, v.url); out.Exit == 0 || !strings.Contains(out.Stderr, diff) {
				t.Errorf("changed %s: exit %d\n%s%s", v.era, out.Exit, out.Stdout, out.Stderr)
			}
			differs(t, v.served, `- /arguments/message: "`+then+`"`, diff, "1 not recorded, 1 never asked for; 1 difference")
			return
		}
		if out := v.run(t, v.url); out.Exit != 0 || out.Stdout != v.said {
			t.Errorf("%s: exit %d, recorded\n%s\nagain\n%s%s", v.at, out.Exit, v.said, out.Stdout, out.Stderr)
		}
		if err := v.served.Stop(); err != nil || !strings.Contains(v.served.Output(), " answered from the record, 0 not recorded, 0 never asked for; 0 differences") {
			t.Errorf("%s: %v\n%s", v.at, err, v.served.Output())
		}
	})
	if n := asked.Load(); n != 0 {
		t.Errorf("the server was called %d times", n)
	}
}

// Tasks are served again, of both eras: with new ids, asked and answered, ended and
// cancelled as they were; here at a view, to an agent that brings its token.
func TestTasksServedFromTheRecord(t *testing.T) {
	t.Parallel() // it mostly waits
	awayFromTheHour(t)
	const token = "token one of many"
	g := gateway.Start(t, gateway.Config(twoAgents+"auth: {anonymous: two}\nviews:\n  - {name: some, from: {everything: ['"+research+"', trigger-elicitation-request]}}\n"+
		"servers:\n"+gateway.Server("everything", peers.ServerEverything(t), "")))
	legacy := func(url string) (texts []string) {
		s := peers.RunCoreTasks(t, peers.Endpoint{URL: url, Token: token},
			peers.CoreTask{Tool: research, Args: map[string]any{"topic": "gateways", "ambiguous": true}},
			peers.CoreTask{Tool: research, Args: map[string]any{"topic": "nothing"}, Cancel: true},
			peers.CoreTask{Tool: "trigger-elicitation-request", Args: map[string]any{}},
		)
		if c := s.Calls[0]; !strings.Contains(c.Text, "# Research Report: gateways (") || len(c.Asked) != 1 || c.Related != c.Task {
			t.Errorf("%s: %+v", url, c)
		}
		if c := s.Calls[1]; c.Statuses[0] != "cancelled" || c.Again != -32602 {
			t.Errorf("%s: cancelled: %+v", url, c)
		}
		if c := s.Calls[2]; c.Text == "" || len(c.Asked) != 1 || len(s.Listed) < 3 || s.Unknown != -32602 {
			t.Errorf("%s: %+v, %d listed, an unknown one is %d", url, c, len(s.Listed), s.Unknown)
		}
		for _, c := range s.Calls {
			texts = append(texts, c.Text)
		}
		return texts
	}
	modern := func(url string) (texts []string) {
		for _, r := range peers.RunTasks(t, url, peers.TaskCall{Tool: research, Args: map[string]any{"topic": "official", "ambiguous": true}}) {
			if r.Error != "" || r.Kind != "task" || r.Outcome.Status != "completed" || len(r.Asked) != 1 || !strings.Contains(r.Text(), "# Research Report: official (") {
				t.Errorf("%s: %+v", url, r)
			}
			texts = append(texts, r.Text())
		}
		return texts
	}
	said := [][]string{legacy(g.URL + "/mcp/some"), modern(g.URL + "/mcp/everything")}
	events := g.Events()
	for i, again := range []func(string) []string{legacy, modern} {
		session, n := sessionAt(events, []string{"some", "everything"}[i], "")
		if n != 1 {
			t.Fatalf("%d sessions were recorded", n)
		}
		p, at := serveRecord(t, g, session, "--fast")
		if texts := again(at); !slices.Equal(texts, said[i]) {
			t.Errorf("%s, then %s", texts, said[i])
		}
		if err := p.Stop(); err != nil || !strings.Contains(p.Output(), "0 differences") {
			t.Errorf("%v\n%s", err, p.Output())
		}
	}
}

// together does something with all of them at once.
func together[T any](all []T, do func(T)) {
	var wg sync.WaitGroup
	for _, v := range all {
		wg.Go(func() { do(v) })
	}
	wg.Wait()
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
func differs(t testing.TB, p *peers.Process, want ...string) {
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

// sessionAt is the session whose client called a server, or all of them for "", in
// an era, if that is not ""; n is how many there are.
func sessionAt(events []schemas.Event, server, era string) (session schemas.SessionKey, n int) {
	if server == "" {
		server = schemas.Gateway
	}
	for _, e := range events {
		d, ok := e.Data.(*schemas.Requested)
		if !ok || d.Within(e) || d.Alias != "" || d.Server != server || era != "" && (era == "modern") != (d.Revision >= "2026-07-28") || e.Session == session {
			continue
		}
		session = e.Session
		n++
	}
	return session, n
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
