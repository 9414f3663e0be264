package bench

import (
	"encoding/json"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats-server/v2/server"

	"waybill.dev/bus"
	"waybill.dev/projections/audit"
	"waybill.dev/schemas"
	"waybill.dev/test/gateway"
)

// BenchmarkAudit stores events of 1 kB while a process that does nothing else makes
// leaves of them, and verifies the whole against the checkpoints afterwards: the
// tree is made again from the log, and each checkpoint has to be of it.
func BenchmarkAudit(b *testing.B) {
	for _, events := range []int{100_000, 1_000_000} {
		b.Run(fmt.Sprint(events), func(b *testing.B) {
			for b.Loop() {
				auditOf(b, events)
			}
		})
	}
}

func auditOf(b *testing.B, events int) {
	srv, err := server.NewServer(&server.Options{Host: "127.0.0.1", Port: server.RANDOM_PORT, JetStream: true, StoreDir: b.TempDir(), MaxPayload: 8 << 20, NoSigs: true, SyncInterval: 100 * time.Millisecond})
	if err != nil {
		b.Fatal(err)
	}
	srv.Start()
	defer srv.WaitForShutdown()
	defer srv.Shutdown()
	if !srv.ReadyForConnections(time.Minute) {
		b.Fatal("no connections")
	}
	g := gateway.Start(b, gateway.Config(fmt.Sprintf("bus: {url: %q, replicas: 1}\nservers:\n", srv.ClientURL())+gateway.Server("none", "http://127.0.0.1:1/", "")), gateway.Roles("audit"))
	defer g.Kill()
	l, err := bus.Open(b.Context(), bus.Options{Dial: bus.URL(srv.ClientURL(), ""), Role: bus.RoleEdge, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		b.Fatal(err)
	}
	defer l.Close()

	body := []byte(`{"said":"` + strings.Repeat("x", 1000) + `"}`)
	before, begun := cpuSeconds(b, g.Pid()), time.Now()
	var storing sync.WaitGroup
	for i := range 64 {
		storing.Go(func() {
			for n := i; n < events; n += 64 {
				call := schemas.NewCallID(time.Now())
				_, err := l.Publish(b.Context(), schemas.Event{
					Tenant: "acme", Session: schemas.NewSessionKey("acme", "researcher", fmt.Sprint(n/1000)), Agent: "researcher",
					Call: call, Root: call, Body: body,
					Data: &schemas.Requested{Target: schemas.Target{Protocol: "mcp", Server: "everything", Method: "tools/call", Name: "echo"}},
				})
				if err != nil {
					b.Error(err)
					return
				}
			}
		})
	}
	storing.Wait()
	stored := time.Since(begun)
	tick := time.NewTicker(200 * time.Millisecond)
	defer tick.Stop()
	for {
		out, errs, exit := g.CLI("audit", "checkpoint")
		var size int
		if lines := strings.Split(out, "\n"); exit == 0 && len(lines) > 1 {
			if _, err := fmt.Sscan(lines[1], &size); err != nil {
				b.Fatal(err)
			}
		}
		if size == events {
			break
		}
		if time.Since(begun) > 20*time.Minute {
			b.Fatalf("signed %d of %d: %s", size, events, errs)
		}
		<-tick.C
	}
	built := time.Since(begun)
	cpu := cpuSeconds(b, g.Pid()) - before
	begun = time.Now()
	out, errs, exit := g.CLI("audit", "verify", "--json")
	verified := time.Since(begun)
	var r audit.Report
	if err := json.Unmarshal([]byte(out), &r); err != nil || exit != 0 || r.Messages != uint64(events) || r.Signed != uint64(events) {
		b.Fatalf("exit %d: %s%s", exit, out, errs)
	}
	b.ReportMetric(cpu*1e6/float64(events), "builder-cpu-µs/event")
	b.ReportMetric(float64(events)/stored.Seconds(), "stored/s")
	b.ReportMetric(float64(events)/built.Seconds(), "leaves/s")
	b.ReportMetric(float64(r.Checkpoints), "checkpoints")
	b.ReportMetric(verified.Seconds(), "verify-s")
}
