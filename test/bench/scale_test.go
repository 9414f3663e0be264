package bench

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"waybill.dev/bus"
	"waybill.dev/bus/embed"
	"waybill.dev/schemas"
	"waybill.dev/test/gateway"
	"waybill.dev/test/peers"
)

// The log that BenchmarkScale starts on.
const (
	sessions        = 100_000
	callsOfASession = 6 // of three events, and one opened and one cancel: 20 events
)

// BenchmarkScale prints what a full log costs: filling it, starting after
// SIGKILL and after a clean stop, memory, and reading one session.
func BenchmarkScale(b *testing.B) {
	g := gateway.Start(b, gateway.Config("servers: []"))
	if err := g.Stop(); err != nil {
		b.Fatal(err)
	}
	start := time.Now()
	fill(b, filepath.Join(g.Dir, "data", "log"))
	fmt.Printf("\n%d events of %d sessions stored in %s", sessions*(callsOfASession*3+2), sessions, time.Since(start).Round(time.Second))

	restart := func(what string) {
		start := time.Now()
		g.Restart()
		took := time.Since(start)
		fmt.Printf("\n%-28s ready after %6s, RSS %4d MB", what, took.Round(10*time.Millisecond), rss(b, g.Process)>>20)
		b.ReportMetric(took.Seconds(), strings.ReplaceAll(what, " ", "-")+"-s")
	}
	restart("after a clean stop")
	g.Kill()
	restart("after SIGKILL")

	key := func(i int) string {
		return string(schemas.NewSessionKey("acme", "researcher", "session "+strconv.Itoa(i)))
	}
	for _, i := range []int{0, sessions / 2, sessions - 1} {
		start := time.Now()
		out, errs, exit := g.CLI("replay", key(i))
		if exit != 0 || !strings.Contains(out, fmt.Sprintf("%d calls", callsOfASession)) {
			b.Fatalf("replay: %s%s", out, errs)
		}
		fmt.Printf("\nreplay of session %-6d      %6s", i, time.Since(start).Round(100*time.Microsecond))
	}
	start = time.Now()
	if out, errs, exit := g.CLI("sessions", "--limit", "0"); exit != 0 || strings.Count(out, "\n") != sessions+1 {
		b.Fatalf("sessions: %d lines, %s", strings.Count(out, "\n"), errs)
	}
	fmt.Printf("\nall sessions listed           %6s, RSS %4d MB", time.Since(start).Round(time.Millisecond), rss(b, g.Process)>>20)
	start = time.Now()
	if _, errs, exit := g.CLI("sessions"); exit != 0 {
		b.Fatal(errs)
	}
	fmt.Printf("\nthe newest 50 listed          %6s", time.Since(start).Round(time.Millisecond))
}

// fill stores the events as the roles would.
func fill(b *testing.B, dir string) {
	srv, err := embed.Start(embed.Options{Dir: dir})
	if err != nil {
		b.Fatal(err)
	}
	defer func() {
		if err := srv.Close(); err != nil {
			b.Error(err)
		}
	}()
	// The workers' consumers are there and have nothing left to do, as in a
	// log that was worked on; the admin role may store every kind.
	l, err := bus.Open(b.Context(), bus.Options{Dial: srv.Connect, Role: bus.RoleAdmin})
	if err != nil {
		b.Fatal(err)
	}
	defer l.Close()
	ctx, cancel := context.WithCancel(b.Context())
	var workers sync.WaitGroup
	var seen atomic.Int64
	count := func(context.Context, schemas.Event, schemas.Emit) error { seen.Add(1); return nil }
	for name, kind := range map[string]schemas.Kind{"policy": schemas.KindRequested, "dispatch": schemas.KindAuthorized} {
		workers.Go(func() {
			if err := l.Run(ctx, bus.Work{Name: name, Kinds: []schemas.Kind{kind}, InFlight: 4096}, count); err != nil {
				b.Error(err)
			}
		})
	}
	body := []byte(`{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{"name":"echo","arguments":{"text":"` + strings.Repeat("x", 200) + `"}}}`)
	var next atomic.Int64
	var publishers sync.WaitGroup
	for range 64 {
		publishers.Go(func() {
			for i := next.Add(1) - 1; i < sessions; i = next.Add(1) - 1 {
				if err := fillSession(b.Context(), l, int(i), body); err != nil {
					b.Error(err)
					return
				}
			}
		})
	}
	publishers.Wait()
	for deadline := time.Now().Add(time.Minute); seen.Load() < 2*sessions*callsOfASession && time.Now().Before(deadline); {
		if s, err := l.Status(b.Context()); err != nil {
			b.Fatal(err)
		} else if len(s.Lags) == 2 && s.Lags[0].Events+s.Lags[1].Events == 0 {
			break
		}
	}
	cancel()
	workers.Wait()
}

func fillSession(ctx context.Context, l *bus.Log, i int, body []byte) error {
	name := "session " + strconv.Itoa(i)
	e := schemas.Event{Tenant: "acme", Agent: "researcher", Session: schemas.NewSessionKey("acme", "researcher", name), Edge: "e1"}
	put := func(p schemas.Payload, body []byte) error {
		_, err := l.Publish(ctx, e.Next(p, body))
		return err
	}
	if err := put(&schemas.Opened{Protocol: "mcp", Name: name, Client: "bench"}, nil); err != nil {
		return err
	}
	target := schemas.Target{Protocol: "mcp", Server: "up", Method: "tools/call", Name: "echo"}
	req := schemas.Requested{Target: target, Revision: "2026-07-28"}
	for range callsOfASession {
		e.Call = schemas.NewCallID(time.Now())
		e.Root = e.Call
		if err := put(&req, body); err != nil {
			return err
		}
		if err := put(&schemas.Authorized{Requested: req, Decision: schemas.Decision{N: 1, Rule: "allow[0]"}}, body); err != nil {
			return err
		}
		if err := put(&schemas.Completed{Summary: schemas.Summary{Target: target}, Status: 200}, body); err != nil {
			return err
		}
	}
	return put(&schemas.Cancel{Reason: "bench"}, nil)
}

// rss is the memory of a process in bytes.
func rss(b *testing.B, p *peers.Process) int64 {
	statm, err := os.ReadFile(fmt.Sprintf("/proc/%d/statm", p.Pid()))
	if err != nil {
		b.Fatal(err)
	}
	var size, resident int64
	if _, err := fmt.Sscan(string(statm), &size, &resident); err != nil {
		b.Fatal(err)
	}
	return resident * int64(os.Getpagesize())
}
