package cli

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"iter"
	"os"
	"reflect"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"waybill.dev/schemas"
	"waybill.dev/workers/policy"
)

// decided are the events of one call: its request and its decision.
func decided(n int, agent schemas.Agent, tool, args string, d schemas.Decision) (schemas.Event, schemas.Event) {
	at := time.Date(2026, 7, 28, 12, 0, 0, 0, time.UTC).Add(time.Duration(n) * time.Millisecond)
	q := &schemas.Requested{Target: schemas.Target{Protocol: "mcp", Server: fmt.Sprint("s", n%50), Method: "tools/call", Name: tool}, Revision: "2026-07-28", Deadline: at.Add(time.Minute)}
	e := schemas.Event{
		Tenant: "acme", Session: schemas.SessionKey(fmt.Sprint("s", n/100)), Call: schemas.CallID(fmt.Sprint("c", n)), Root: schemas.CallID(fmt.Sprint("c", n)), Agent: agent, Edge: "e1",
		Trace: "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01", Time: at, Stored: at, Seq: uint64(2*n + 1), Data: q,
		Body: fmt.Appendf(nil, `{"jsonrpc":"2.0","id":%d,"method":"tools/call","params":{"name":%q,"arguments":%s}}`, n, tool, args),
	}
	if d.N == 0 {
		d.N = 1
	}
	v := e.Next(&schemas.Authorized{Requested: *q, Decision: d, RequestedSeq: e.Seq, RequestedAt: e.Stored}, e.Body)
	v.Time, v.Stored, v.Seq = at, at, e.Seq+1
	return e, v
}

// A line of the traffic is read as it was written.
func TestTraffic(t *testing.T) {
	e, v := decided(7, "ann", "read", `{"a":1}`, schemas.Decision{Rule: "r", Facts: map[string]string{"agent.groups": `["a"]`}})
	for _, body := range []string{`{"a":"\"\\"}`, "", "é\u2028<>&\x00\"\\", "\xff\xfe", `,"event":{"v":1}}`, "a\nb", strings.Repeat(`\`, 7)} {
		for _, e := range []schemas.Event{e, v} {
			if e.Body = []byte(body); body == "" {
				e.Body = nil
			}
			line, err := appendTraffic(nil, e, 0)
			if err != nil || strings.Count(string(line), "\n") != 1 || !json.Valid(line) {
				t.Fatalf("%q, %v", line, err)
			}
			got, err := readTraffic(line)
			want := record{Event: e}
			if e.Kind() != schemas.KindRequested {
				want.Body = nil // it is nobody's business
			}
			if err != nil || !reflect.DeepEqual(got, want) {
				t.Errorf("%s\nread as %+v, %v\nwant %+v", line, got, err, want)
			}
		}
	}
	e.Body = nil
	line, err := appendTraffic(nil, e, 12)
	if got, err2 := readTraffic(line); err != nil || err2 != nil || got.Gone != 12 || got.Call != e.Call {
		t.Errorf("%s: %+v, %v, %v", line, got, err, err2)
	}
	for _, line := range []string{"", "{}", `{"event":{}}`, `{"body":"x}`, `{"body":"x"}`, `{"body":"x","event":{"v":9}}`, `{"body_base64":"?","event":{}}`, `{"body":`, `{"body":"\`, "[1]"} {
		if got, err := readTraffic([]byte(line)); err == nil {
			t.Errorf("%s is read as %+v", line, got)
		}
	}
}

// fed is what a what-if says of some lines.
func fed(t testing.TB, b *policy.Bundle, full bool, events ...schemas.Event) (out string, r report, err error) {
	t.Helper()
	var text strings.Builder
	w := whatIf{bundle: b, env: Env{Stdout: &text}, full: full, examples: 3}
	err = w.of(t.Context(), traffic{all: true, head: func() trafficHead { return trafficHead{} }, events: inBatches(t.Context(), func(context.Context) iter.Seq2[json.RawMessage, error] {
		return func(yield func(json.RawMessage, error) bool) {
			for _, e := range events {
				line, err := appendTraffic(nil, e, 0)
				if !yield(line, err) {
					return
				}
			}
		}
	}, readTraffic)})
	return text.String(), w.report, err
}

func compiled(t testing.TB, rules string) *policy.Bundle {
	t.Helper()
	s := policy.Source{Files: []policy.File{{Name: "r.yaml", Text: rules}}}
	for i := range 50 {
		s.Servers = append(s.Servers, fmt.Sprint("s", i))
	}
	encoded, err := s.Encode()
	if err != nil {
		t.Fatal(err)
	}
	b, err := policy.Compile(encoded)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func TestWhatIfReport(t *testing.T) {
	b := compiled(t, `
rules:
- {id: p, effect: permit, match: {tools: [read, write, list]}}
- {id: staff, effect: forbid, match: {groups: [guests], tools: [write]}, reason: guests only read}
- {id: x, effect: forbid, match: {tools: [read]}, when: 'args.n > 3'}
- {id: t, effect: oblige, match: {tools: [list]}, obligations: {tags: [listed]}}
- {id: h, effect: require_approval, match: {agents: [eve]}}
`)
	known := schemas.Decision{Rule: "old", Facts: map[string]string{"agent.groups": `["guests"]`}}
	var events []schemas.Event
	add := func(n int, agent schemas.Agent, tool, args string, d schemas.Decision) {
		q, v := decided(n, agent, tool, args, d)
		events = append(events, q, v)
	}
	add(1, "ann", "read", `{"n":1}`, schemas.Decision{Rule: "p"})
	add(2, "ann", "read", `{"n":1}`, known) // the same by another rule
	add(3, "ann", "read", `{"n":5}`, known)
	add(4, "ann", "read", `{"n":6}`, known)
	add(5, "ann", "write", `{}`, known)
	add(6, "ann", "write", `{}`, schemas.Decision{Rule: "old"}) // its groups are not known
	add(7, "ann", "none", `{}`, known)
	add(8, "ann", "list", `{}`, known)
	add(9, "eve", "read", `{"n":1}`, known)
	add(10, "ann", "read", `{"n":1}`, known)
	events = append(events[:len(events)-2], events[len(events)-1]) // without its request
	// Held, and granted: under the new rules neither.
	q, v := decided(11, "ann", "read", `{"n":1}`, known)
	held := q.Next(&schemas.Held{Target: q.Data.(*schemas.Requested).Target, Decision: schemas.Decision{N: 1, Rule: "ask"}}, nil)
	held.Time, held.Stored, held.Seq = v.Time, v.Stored, v.Seq
	v.Data.(*schemas.Authorized).N, v.Seq = 2, v.Seq+1
	events = append(events, q, held, v)

	out, r, err := fed(t, b, false, events...)
	end := new(outcome)
	if !errors.As(err, &end) || end.code != exitChanges {
		t.Errorf("ends with %v", err)
	}
	if r.Decisions != 10 || r.Changed != 7 || r.Undecided != 1 || r.Same != 2 || r.OtherRule != 1 || r.NoRequest != 1 {
		t.Errorf("%+v", r)
	}
	for _, line := range []string{
		"       2  permit → deny  by x (was by old)",
		"       1  permit → deny  by staff (was by old)\n          guests only read\n",
		"       1  permit → deny  as no rule permits it (was by old)",
		"       1  permit → hold  by h (was by old)",
		"       1  hold → permit  by p (was by ask)",
		"       1  permit, other obligations",
		"       1  cannot be decided: fact agent.groups was not recorded",
		"c6  tools/call write → s6  by ann of acme in session s0",
		"10 decisions under 5 rules (policy " + b.Digest[:12] + "…): 7 would change, 1 cannot be decided, 2 stay (1 of them by another rule)\n1 decision beside, whose request is not there any more\n",
	} {
		if !strings.Contains(out, line) {
			t.Errorf("it does not say %q:\n%s", line, out)
		}
	}
	if out, _, _ := fed(t, b, true, events...); !strings.Contains(out, "permit → ?\n    ") || !strings.Contains(out, ": cannot be decided: fact agent.groups was not recorded\n") {
		t.Errorf("not one by one:\n%s", out)
	}
	if _, r, err := fed(t, b, false, events[:4]...); err != nil || r.Same != 2 {
		t.Errorf("nothing changes: %v, %+v", err, r)
	}
	if _, _, err := fed(t, b, false, events[10:12]...); !errors.As(err, &end) || end.code != exitUndecided {
		t.Errorf("not known: %v", err)
	}
	if _, r, err := fed(t, b, false); err != nil || r.Decisions != 0 {
		t.Errorf("no traffic: %v, %+v", err, r)
	}
}

// What waits for decisions that never come is bounded.
func TestWhatIfForgets(t *testing.T) {
	b := compiled(t, "rules: []")
	var events []schemas.Event
	for n := range 40 {
		q, _ := decided(n, "ann", "read", `"`+strings.Repeat("x", 4<<20)+`"`, schemas.Decision{})
		events = append(events, q)
	}
	_, first := decided(0, "ann", "read", `{}`, schemas.Decision{})
	_, last := decided(39, "ann", "read", `{}`, schemas.Decision{})
	_, r, err := fed(t, b, false, append(events, first, last)...)
	if r.Changed != 1 || r.NoRequest != 1 {
		t.Errorf("%v, %+v", err, r)
	}
}

var benchCalls = flag.Int("calls", 1_000_000, "how many recorded calls the benchmark decides again")

// BenchmarkWhatIf decides recorded calls again by 200 rules, of which each concerns
// one of 50 servers, from the lines that the gateway sends.
func BenchmarkWhatIf(b *testing.B) {
	var rules strings.Builder
	rules.WriteString("rules:\n")
	for i := range 120 {
		fmt.Fprintf(&rules, "- {id: p%d, effect: permit, match: {groups: [team%d, payers], servers: [s%d], tools: [transfer, 't%d*']}, when: 'has(args.amount) && args.amount < %d'}\n", i, i, i%50, i, 1000+i)
	}
	for i := range 50 {
		fmt.Fprintf(&rules, "- {id: f%d, effect: forbid, match: {servers: [s%d], tools: ['*']}, when: '%s'}\n", i, i, []string{
			`has(args.amount) && args.amount > 900`, `has(args.path) && (args.path.startsWith("/etc") || args.path.contains(".."))`,
			`has(args.to) && has(args.to.country) && args.to.country in ["KP", "IR", "SY"]`, `has(args.items) && args.items.exists(i, i.qty > 1000)`, `agent.id == "rogue"`,
		}[i%5])
	}
	for i := range 30 {
		fmt.Fprintf(&rules, "- {id: o%d, effect: oblige, match: {agents: ['res*', a%d], tools: [transfer]}, when: 'args.amount > %d', obligations: {tags: [t%d]}}\n", i, i, i, i)
	}
	bundle := compiled(b, rules.String())
	tune(Env{Getenv: os.Getenv}) // as every command is
	const made = 5000
	var lines []json.RawMessage
	for n := range made {
		q, v := decided(n, "researcher", "transfer", fmt.Sprintf(`{"amount":%d,"to":{"name":"Ann","iban":"DE02120300000000202051","country":"DE"},"path":"/home/ann/report.txt","items":[{"sku":"A-1000","qty":3}]}`, n%1000),
			schemas.Decision{Rule: "p0", Matches: []string{"p0"}, Facts: map[string]string{"agent.groups": `["payers","staff"]`}, PolicySHA256: strings.Repeat("ab", 32), ArgsSHA256: strings.Repeat("cd", 32)})
		for _, e := range []schemas.Event{q, v} {
			line, err := appendTraffic(nil, e, 0)
			if err != nil {
				b.Fatal(err)
			}
			lines = append(lines, line)
		}
	}
	for b.Loop() {
		begun, before := time.Now(), cpuTime(b)
		w := whatIf{bundle: bundle, env: Env{Stdout: new(strings.Builder)}, examples: 3}
		_ = w.of(b.Context(), traffic{all: true, head: func() trafficHead { return trafficHead{} }, events: inBatches(b.Context(), func(context.Context) iter.Seq2[json.RawMessage, error] {
			return func(yield func(json.RawMessage, error) bool) {
				for n := 0; n < *benchCalls; n += made {
					for _, line := range lines {
						if !yield(line, nil) {
							return
						}
					}
				}
			}
		}, readTraffic)})
		if w.report.Decisions != *benchCalls || w.report.Undecided > 0 || w.report.NoRequest > 0 || w.report.Changed == 0 {
			b.Fatalf("%+v", w.report)
		}
		b.ReportMetric(float64(w.report.Decisions)/time.Since(begun).Seconds(), "decisions/s")
		b.ReportMetric(float64(cpuTime(b)-before)/1e3/float64(w.report.Decisions), "cpu-µs/decision")
	}
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	b.ReportMetric(float64(m.HeapSys)/1e6, "heap-MB")
}

// cpuTime is the process's CPU time.
func cpuTime(b *testing.B) time.Duration {
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		b.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}
