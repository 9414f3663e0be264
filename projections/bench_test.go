package projections_test

import (
	"flag"
	"fmt"
	"runtime"
	"slices"
	"testing"
	"time"

	"waybill.dev/projections"
	"waybill.dev/schemas"
)

var benchCalls = flag.Int("calls", 1_000_000, "how many calls the benchmark records")

// BenchmarkRecord writes a million calls and asks every question of them. It
// reports rows and events a second, and the CPU of our side for each event.
func BenchmarkRecord(b *testing.B) {
	const batch = 20_000
	callsTotal := uint64(*benchCalls)
	e := engine(b)
	w := writer(b, e, &log{name: "bench"})
	w.Prepare(b.Context())
	base := day().Add(-20 * time.Hour)
	rows, events, seq := 0, 0, uint64(0)
	var took time.Duration
	for b.Loop() {
		for rows = 0; seq < 2*callsTotal; {
			made := crowd(seq, batch, base)
			begun := time.Now()
			take(b, w, made)
			took += time.Since(begun)
			seq = made[len(made)-1].Seq
			events += len(made)
		}
	}
	for _, n := range w.Stats().Rows {
		rows += int(n)
	}
	b.ReportMetric(float64(rows)/took.Seconds(), "rows/s")
	b.ReportMetric(float64(events)/took.Seconds(), "events/s")
	for _, q := range projections.Questions() {
		var times []time.Duration
		for range 3 {
			begun := time.Now()
			ask(b, e, q.Example+" LIMIT 100")
			times = append(times, time.Since(begun))
		}
		b.Logf("%-18s %s", q.Name, slices.Min(times).Round(time.Millisecond))
	}
	runtime.KeepAlive(e)
}

// crowd is a batch of the events of many agents, tools and sessions, each of one
// agent; a tenth of the calls is caused by others.
func crowd(after uint64, n int, base time.Time) []schemas.Event {
	all := make([]schemas.Event, 0, n)
	body := fmt.Appendf(nil, `{"jsonrpc":"2.0","id":1,"result":{"content":[{"type":"text","text":"%0200d"}]}}`, 7)
	for seq := after; len(all) < n; {
		i := int(seq / 2)
		e := schemas.Event{
			Tenant: schemas.Tenant(fmt.Sprint("t", i/100%20)), Agent: schemas.Agent(fmt.Sprint("a", i/100%200)),
			Session: schemas.SessionKey(fmt.Sprint("s", i/100)), Call: schemas.CallID(fmt.Sprint("c", i)),
		}
		if e.Root = e.Call; i%10 == 9 {
			e.Parent = schemas.CallID(fmt.Sprint("c", i-1))
			e.Root = e.Parent
		}
		target := schemas.Target{Protocol: "mcp", Server: fmt.Sprint("server", i%10), Method: "tools/call", Name: fmt.Sprint("tool", i%100)}
		at := base.Add(time.Duration(i) * 60 * time.Millisecond)
		request := e.Next(&schemas.Requested{Target: target}, body)
		seq++
		request.Seq, request.Stored, request.Time = seq, at, at
		took := time.Duration(1+i%97) * time.Millisecond
		ending := e.Next(&schemas.Completed{Summary: schemas.Summary{
			Target: target, RequestedAt: at, AuthorizedAt: at.Add(took / 4), UpstreamAt: at.Add(took / 2), Attempts: 1,
		}, Status: 200}, body)
		seq++
		ending.Seq, ending.Stored, ending.Time = seq, at.Add(took), at
		all = append(all, request, ending)
	}
	return all
}
