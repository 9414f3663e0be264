package test

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"waybill.dev/schemas"
	"waybill.dev/test/gateway"
	"waybill.dev/test/peers"
	"waybill.dev/test/upstream"
)

// recording is counting with the record, in a ClickHouse inside.
func recording(t *testing.T) *gateway.Gateway {
	t.Helper()
	u := upstream.Start(t)
	g := gateway.Start(t, gateway.Config(
		"clickhouse: {embedded: true, launcher: "+peers.ClickHouse(t)+"}\nservers:\n"+
			gateway.Server("counter", u.URL, "idempotent: [read], deadline: 20s")+
			gateway.Server("hasty", u.URL, "idempotent: [read], deadline: 400ms")))
	eventually(t, g, "SELECT count() AS n FROM events", `{"n":0}`) // it serves
	return g
}

// query asks the record and returns the rows, one JSON object a line.
func query(t *testing.T, g *gateway.Gateway, sql string) string {
	t.Helper()
	out, errs, exit := g.CLI("query", "--json", sql)
	if exit != 0 {
		t.Fatalf("query %s: %s", sql, errs)
	}
	return out
}

// eventually waits until the record answers so, and tells how long that took.
func eventually(t *testing.T, g *gateway.Gateway, sql, want string) time.Duration {
	t.Helper()
	begun := time.Now()
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for {
		got, errs, exit := g.CLI("query", "--json", sql)
		if exit == 0 && strings.TrimSpace(got) == want {
			return time.Since(begun)
		}
		if time.Since(begun) > time.Minute*slowdown {
			t.Fatalf("%s: %s%s, want %s", sql, got, errs, want)
		}
		<-tick.C
	}
}

// A call is in the record, and can be asked for, within two seconds, also by
// any HTTP client; and what it caused is under it.
func TestRecord(t *testing.T) {
	g := recording(t)
	if r := ask(t.Context(), g, tool{"counter", "count", upstream.Args{Key: "k"}}); !r.answered() {
		t.Fatal(r.err)
	}
	if took := eventually(t, g, "SELECT outcome, name, calls FROM (SELECT outcome, name, count() AS calls FROM calls GROUP BY ALL)",
		`{"outcome":"completed","name":"count","calls":1}`); took > 2*time.Second*slowdown {
		t.Errorf("the call was in the record after %s", took)
	}

	// The list of all servers is a call that causes one for each.
	body := `{"jsonrpc":"2.0","id":1,"method":"tools/list","params":{` + gateway.Meta + `}}`
	if a, err := g.Post(t.Context(), "", "tools/list", "", body); err != nil || a.Status != http.StatusOK {
		t.Fatalf("%d %s %v", a.Status, a.Body, err)
	}
	eventually(t, g, "SELECT caused, servers, root_server FROM fan_out(hours=1)", `{"caused":2,"servers":3,"root_server":"waybill"}`)

	url, err := os.ReadFile(filepath.Join(g.Dir, "data", "clickhouse", "reader.url"))
	if err != nil {
		t.Fatal(err)
	}
	resp, err := http.Post(strings.TrimSpace(string(url)), "text/plain", strings.NewReader("SELECT count() FROM calls WHERE parent = ''"))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = resp.Body.Close() }()
	if b, err := io.ReadAll(resp.Body); err != nil || string(b) != "2\n" {
		t.Errorf("over HTTP: %q, %v", b, err)
	}
	if out, errs, exit := g.CLI("query", "DROP TABLE events_v1"); exit != 1 || !strings.Contains(errs, "refused") {
		t.Errorf("DROP: exit %d, %s%s", exit, out, errs)
	}
	for key := range sessionsOf(g.Events()) {
		fromLog, _, _ := g.CLI("replay", string(key), "--json")
		fromRecord, errs, exit := g.CLI("replay", string(key), "--json", "--from", "clickhouse")
		if exit != 0 || fromRecord != fromLog {
			t.Errorf("replay from the record: %s\n%s\nfrom the log\n%s", errs, fromRecord, fromLog)
		}
	}
	if err := g.Stop(); err != nil {
		t.Errorf("stopping: %v", err)
	}
}

func sessionsOf(events []schemas.Event) map[schemas.SessionKey][]schemas.Event {
	all := map[schemas.SessionKey][]schemas.Event{}
	for _, e := range events {
		all[e.Session] = append(all[e.Session], e)
	}
	return all
}

// Whoever is killed, gateway, engine or both, the record is the log: each event
// once, to the byte. The engine's death fails no call.
func TestRecordKills(t *testing.T) {
	g := recording(t)
	c := callers(t, g, 16, uint64(time.Now().UnixNano()))
	for i := range 6 {
		c.made(t, 60)
		switch i % 3 {
		case 0: // the engine
			kill(t, engineOf(t, g), syscall.SIGKILL)
			continue
		case 1: // the gateway; the kernel kills its engine
			c.shut(false)
			g.Kill()
		case 2:
			c.shut(false)
			kill(t, engineOf(t, g), syscall.SIGKILL)
			g.Kill()
		}
		g.Restart()
		c.open()
	}
	c.made(t, 60)
	c.shut(true)
	c.wait()
	sameAsLog(t, g)
}

// sameAsLog compares the record with the log, when it has caught up.
func sameAsLog(t *testing.T, g *gateway.Gateway) {
	t.Helper()
	settled(t, g)
	events := g.Events()
	took := eventually(t, g, "SELECT count() AS n, uniqExact(seq) AS u FROM events_v1", fmt.Sprintf(`{"n":%d,"u":%[1]d}`, len(events)))
	digests := map[uint64]string{}
	for line := range strings.Lines(query(t, g, "SELECT seq, lower(hex(SHA256(concat(envelope, body)))) AS digest FROM events_v1")) {
		var row struct {
			Seq    uint64
			Digest string
		}
		if err := json.Unmarshal([]byte(line), &row); err != nil {
			t.Fatal(err)
		}
		digests[row.Seq] = row.Digest
	}
	ended := map[schemas.CallID]bool{}
	requested := 0
	for _, e := range events {
		envelope, err := e.MarshalString()
		if err != nil {
			t.Fatal(err)
		}
		hash := sha256.Sum256(append([]byte(envelope), e.Body...))
		if got := digests[e.Seq]; got != hex.EncodeToString(hash[:]) {
			t.Errorf("event %d, %s: not in the record as it is in the log", e.Seq, e.ID())
		}
		if e.Kind().Ends() {
			ended[e.Call] = true
		}
		if e.Kind() == schemas.KindRequested {
			requested++
		}
	}
	eventually(t, g, "SELECT (SELECT count() FROM calls_v1) AS calls, (SELECT count() FROM edges_v1) AS edges", fmt.Sprintf(`{"calls":%d,"edges":%d}`, len(ended), requested))
	t.Logf("%d events, %d calls in the record, %s after the last call", len(events), len(ended), took.Round(time.Millisecond))
}

// settled waits until no event waits to be recorded and no call is open.
func settled(t *testing.T, g *gateway.Gateway) {
	t.Helper()
	tick := time.NewTicker(100 * time.Millisecond)
	defer tick.Stop()
	for begun := time.Now(); ; <-tick.C {
		waiting := 0.0
		for _, work := range []string{"policy", "dispatch", "project"} {
			waiting += measured(t, g, `waybill_queue_depth\{work="`+work+`"\}`)
		}
		if waiting == 0 {
			return
		}
		if time.Since(begun) > time.Minute*slowdown {
			t.Fatalf("%g events wait still", waiting)
		}
	}
}

// measured reads a metric.
func measured(t *testing.T, g *gateway.Gateway, name string) float64 {
	t.Helper()
	resp, err := http.Get(g.Admin + "/metrics")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = resp.Body.Close() }()
	all, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	m := regexp.MustCompile(`(?m)^` + name + ` (\S+)$`).FindSubmatch(all)
	if m == nil {
		t.Fatalf("no metric %s", name)
	}
	v, err := strconv.ParseFloat(string(m[1]), 64)
	if err != nil {
		t.Fatal(err)
	}
	return v
}

// An engine that stands still holds up no call; what it missed it gets.
func TestRecordAway(t *testing.T) {
	g := recording(t)
	pid := engineOf(t, g)
	kill(t, pid, syscall.SIGSTOP)
	defer kill(t, pid, syscall.SIGCONT)
	var slowest time.Duration
	for i := range 300 {
		begun := time.Now()
		if r := ask(t.Context(), g, tool{"counter", "count", upstream.Args{Key: fmt.Sprint("a", i)}}); !r.answered() {
			t.Fatalf("call %d: %v", i, r.err)
		}
		slowest = max(slowest, time.Since(begun))
	}
	if n := measured(t, g, `waybill_queue_depth\{work="project"\}`); n < 1200 {
		t.Errorf("%g events wait to be recorded, want 1200 at least", n)
	}
	if lag, size := measured(t, g, `waybill_record_lag_seconds`), measured(t, g, `waybill_queue_size_bytes\{work="project"\}`); lag == 0 || size == 0 {
		t.Errorf("the lag is %g s and %g bytes", lag, size)
	}
	if resp, err := http.Get(g.Admin + "/readyz"); err != nil || resp.StatusCode != http.StatusOK {
		t.Errorf("not ready without ClickHouse: %v %v", resp, err)
	}
	kill(t, pid, syscall.SIGCONT)
	sameAsLog(t, g)
	if lag := measured(t, g, `waybill_record_lag_seconds`); lag != 0 {
		t.Errorf("the lag is %g s", lag)
	}
	t.Logf("the slowest call took %s", slowest.Round(time.Millisecond))
}

// engineOf finds the process of a gateway's engine.
func engineOf(t *testing.T, g *gateway.Gateway) int {
	t.Helper()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for begun := time.Now(); time.Since(begun) < time.Minute; <-tick.C {
		all, err := filepath.Glob("/proc/[0-9]*/stat")
		if err != nil {
			t.Fatal(err)
		}
		for _, file := range all {
			b, _ := os.ReadFile(file) // it may have ended
			if end := bytes.LastIndexByte(b, ')'); end > 0 && bytes.Contains(b[:end], []byte("(chserve")) {
				if f := strings.Fields(string(b[end+1:])); len(f) > 1 && f[1] == strconv.Itoa(g.Pid()) {
					pid, err := strconv.Atoi(strings.Fields(string(b))[0])
					if err != nil {
						t.Fatal(err)
					}
					return pid
				}
			}
		}
	}
	t.Fatal("the gateway has no engine")
	return 0
}

func kill(t *testing.T, pid int, sig syscall.Signal) {
	if err := syscall.Kill(pid, sig); err != nil && err != syscall.ESRCH {
		t.Errorf("signal %s: %v", sig, err)
	}
}

// When what is not recorded fills the log, calls are refused, nothing is lost,
// and it goes on by itself.
func TestRecordLimit(t *testing.T) {
	u := upstream.Start(t)
	g := gateway.Start(t, gateway.Config(
		"clickhouse: {embedded: true, launcher: "+peers.ClickHouse(t)+"}\nbus: {max_bytes: 67108864}\nservers:\n"+
			gateway.Server("counter", u.URL, "deadline: 20s")))
	eventually(t, g, "SELECT count() AS n FROM events", `{"n":0}`)
	pid := engineOf(t, g)
	kill(t, pid, syscall.SIGSTOP)
	defer kill(t, pid, syscall.SIGCONT)
	post := func(i int) gateway.Answer {
		t.Helper()
		pad := 100_000
		if i < 40 { // most of it quickly; the last part in steps that are small beside what is left
			pad = 400_000
		}
		a, err := g.Post(t.Context(), "counter", "tools/call", "count", fmt.Sprintf(
			`{"jsonrpc":"2.0","id":"l%d","method":"tools/call","params":{"name":"count","arguments":{"key":"l%[1]d","pad":%q},%s}}`,
			i, strings.Repeat("x", pad), gateway.Meta))
		if err != nil {
			t.Fatal(err)
		}
		return a
	}
	i, a := 0, gateway.Answer{Status: http.StatusOK}
	for ; a.Status == http.StatusOK && i < 2000; i++ {
		a = post(i)
	}
	if a.Status != http.StatusServiceUnavailable || a.Header.Get("Retry-After") == "" {
		t.Fatalf("call %d: %d %v %.300s", i, a.Status, a.Header, a.Body)
	}
	if lost := len(u.Effects()) - (i - 1); lost != 0 {
		t.Errorf("%d calls were refused and carried out", lost)
	}
	kill(t, pid, syscall.SIGCONT)
	tick := time.NewTicker(200 * time.Millisecond)
	defer tick.Stop()
	for begun := time.Now(); a.Status != http.StatusOK; <-tick.C {
		if i++; time.Since(begun) > time.Minute*slowdown {
			t.Fatalf("calls are refused still: %d %s", a.Status, a.Body)
		}
		a = post(i)
	}
	sameAsLog(t, g)
}
