package test

import (
	"bytes"
	crand "crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
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
	return recordingIn(t, "{embedded: true, launcher: "+peers.ClickHouse(t)+"}", "")
}

// recordingIn is the same in a ClickHouse of the configuration's.
func recordingIn(t *testing.T, clickhouse, more string) *gateway.Gateway {
	t.Helper()
	u := upstream.Start(t)
	g := gateway.Start(t, gateway.Config(
		"clickhouse: "+clickhouse+"\n"+more+"servers:\n"+
			gateway.Server("counter", u.URL, "idempotent: [read], deadline: 20s")+
			gateway.Server("hasty", u.URL, "idempotent: [read], deadline: 400ms")))
	eventually(t, g, "SELECT count() AS n FROM events", `{"n":0}`) // it serves
	return g
}

// byDSN is the configuration of a ClickHouse that is not the gateway's.
func byDSN(t *testing.T, write, read string) string {
	t.Helper()
	dir := t.TempDir()
	config := "{"
	for key, dsn := range map[string]string{"dsn": write, "read_dsn": read} {
		if dsn == "" {
			continue
		}
		file := filepath.Join(dir, key)
		if err := os.WriteFile(file, []byte(dsn), 0o600); err != nil {
			t.Fatal(err)
		}
		config += key + ": {file: " + file + "}, "
	}
	return config + "bodies: 720h}"
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
	eventually(t, g, "SELECT caused, servers, root_server FROM fan_out(hours=1)", `{"caused":2,"servers":2,"root_server":"waybill"}`)
	// Its own end, too, which comes after theirs.
	eventually(t, g, "SELECT count() AS n FROM calls WHERE parent = ''", `{"n":2}`)
	eventually(t, g, "SELECT count() AS n FROM events", fmt.Sprintf(`{"n":%d}`, len(g.Events())))

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
	// Values of every kind are shown as what they are.
	for sql, want := range map[string]string{
		"SELECT [1, 2, 3] AS v":     `{"v":[1,2,3]}`,
		"SELECT [toUInt8(65)] AS v": `{"v":[65]}`,
		"SELECT [[1], []] AS v":     `{"v":[[1],[]]}`,
		"SELECT map('k', [7]) AS v": `{"v":{"k":[7]}}`,
		"SELECT (1, [2, 3]) AS v":   `{"v":[1,[2,3]]}`,
		"SELECT 'text' AS v, unhex('ff') AS w, toFixedString('ab', 2) AS x":                  `{"v":"text","w":"0xff","x":"ab"}`,
		`SELECT '{"a":{"b":1,"c":[1,"x"]},"d":null,"e":"t"}'::JSON AS v`:                     `{"v":{"a":{"b":1,"c":[1,"x"]},"e":"t"}}`,
		`SELECT ['{"a":1}'::JSON] AS v`:                                                      `{"v":[{"a":1}]}`,
		"SELECT toUInt8(7)::Dynamic AS v, NULL::Dynamic AS w":                                `{"v":7,"w":null}`,
		"SELECT [1]::Variant(String, Array(UInt8)) AS v":                                     `{"v":[1]}`,
		"SELECT sumState(toUInt64(1)) AS v":                                                  "finalizeAggregation()",
		"SELECT finalizeAggregation(sumState(toUInt64(1))) AS v":                             `{"v":1}`,
		"SELECT toDate('2026-11-28') AS v, toIPv4('10.0.0.1') AS w, 1.5::Decimal(9, 2) AS x": `{"v":"2026-11-28 00:00:00","w":"10.0.0.1","x":"1.5"}`,
	} {
		out, errs, _ := g.CLI("query", "--json", sql)
		if got := strings.TrimSpace(out); got != want && (got != "" || !strings.Contains(errs, want)) {
			t.Errorf("%s: %s%s, want %s", sql, out, errs, want)
		}
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
// once, to the byte.
func TestRecordKills(t *testing.T) {
	g := recording(t)
	recordKilled(t, g, recordKills, func() { kill(t, engineOf(t, g), syscall.SIGKILL) })
}

// The same with a server that is not the gateway's and lives when that dies, by
// either of its protocols.
func TestRecordKillsByDSN(t *testing.T) {
	for _, scheme := range []string{"clickhouse", "http"} {
		t.Run(scheme, func(t *testing.T) {
			s := peers.StartClickHouse(t)
			g := recordingIn(t, byDSN(t, s.DSN(scheme, "gateway"), s.DSN(scheme, "reader")), "")
			recordKilled(t, g, max(recordKills/5, 3), func() { s.Kill(); s.Start() })
		})
	}
	if given := os.Getenv("WAYBILL_TEST_CLICKHOUSE_DSN"); given != "" {
		t.Run("given", func(t *testing.T) {
			u, err := url.Parse(given)
			if err != nil {
				t.Fatal("WAYBILL_TEST_CLICKHOUSE_DSN:", err)
			}
			u.Path = "/waybill_test_" + strings.ToLower(crand.Text())
			recordKilled(t, recordingIn(t, byDSN(t, u.String(), ""), ""), max(recordKills/5, 3), nil) // it is not ours to kill
		})
	}
}

// recordKilled kills at random under load and compares then.
func recordKilled(t *testing.T, g *gateway.Gateway, n int, killEngine func()) {
	t.Helper()
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	chance := rand.New(rand.NewPCG(seed, 1))
	c := callers(t, g, 16, seed)
	killed := map[string]int{}
	for range n {
		c.made(t, 10+chance.IntN(60))
		who := []string{"engine", "gateway", "both"}[chance.IntN(3)]
		if killEngine == nil {
			who = "gateway"
		}
		killed[who]++
		if who != "gateway" {
			killEngine()
		}
		if who != "engine" {
			c.shut(false)
			g.Kill()
			g.Restart()
			c.open()
		}
	}
	c.made(t, 60)
	c.shut(true)
	c.wait()
	sameAsLog(t, g)
	t.Logf("killed: %v", killed)
}

// A log that has lost its end, which the record has, gives its sequences to other
// events. The record has all: what was lost, and what came in its place.
func TestRecordAfterPowerLoss(t *testing.T) {
	g := recording(t)
	call := func(key string) {
		t.Helper()
		if r := ask(t.Context(), g, tool{"counter", "count", upstream.Args{Key: key}}); !r.answered() {
			t.Fatal(r.err)
		}
	}
	for i := range 5 {
		call(fmt.Sprint("kept", i))
	}
	sameAsLog(t, g)
	kept := len(g.Events())
	if err := g.Stop(); err != nil {
		t.Fatal(err)
	}
	// A checkpoint is kept beside the log when it has settled in the log: what takes the
	// log's end takes that checkpoint too.
	log, saved := filepath.Join(g.Dir, "data", "log"), filepath.Join(t.TempDir(), "log")
	if err := os.CopyFS(saved, os.DirFS(log)); err != nil {
		t.Fatal(err)
	}
	last, err := os.ReadFile(filepath.Join(g.Dir, "data", "audit.last"))
	if err != nil {
		t.Fatal(err)
	}
	g.Restart()
	for i := range 5 {
		call(fmt.Sprint("lost", i))
	}
	sameAsLog(t, g)
	lost := len(g.Events()) - kept
	g.Kill()
	if err := os.RemoveAll(log); err != nil {
		t.Fatal(err)
	}
	if err := os.CopyFS(log, os.DirFS(saved)); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(g.Dir, "data", "audit.last"), last, 0o600); err != nil {
		t.Fatal(err)
	}
	g.Restart()
	for i := range 8 {
		call(fmt.Sprint("new", i))
	}
	settled(t, g)
	for round := range 2 { // as it goes on, and after a restart
		events := g.Events()
		eventually(t, g, "SELECT count() AS n, uniqExact(log, seq) AS u, uniqExact(log) AS logs FROM events_v1", fmt.Sprintf(`{"n":%d,"u":%[1]d,"logs":2}`, len(events)+lost))
		for _, e := range events {
			want := fmt.Sprintf(`{"n":1,"kind":%q}`, e.Kind())
			if got := strings.TrimSpace(query(t, g, fmt.Sprintf("SELECT count() AS n, any(kind) AS kind FROM events_v1 WHERE id = '%s'", e.ID()))); got != want {
				t.Errorf("%s: %s, want %s", e.ID(), got, want)
			}
		}
		eventually(t, g, "SELECT count() AS n FROM calls", `{"n":18}`)
		if round == 0 {
			if !strings.Contains(g.Output(), "the log has lost events that the record has") {
				t.Errorf("it was not said that events are lost:\n%s", g.Output())
			}
			if err := g.Stop(); err != nil {
				t.Fatal(err)
			}
			g.Restart()
		}
	}
}

// A ClickHouse that is new, or has lost what it had, gets all that the log holds.
func TestRecordAnew(t *testing.T) {
	g := recording(t)
	for i := range 5 {
		if r := ask(t.Context(), g, tool{"counter", "count", upstream.Args{Key: fmt.Sprint("k", i)}}); !r.answered() {
			t.Fatal(r.err)
		}
	}
	sameAsLog(t, g)
	if err := g.Stop(); err != nil {
		t.Fatal(err)
	}
	if err := os.RemoveAll(filepath.Join(g.Dir, "data", "clickhouse")); err != nil {
		t.Fatal(err)
	}
	g.Restart()
	sameAsLog(t, g) // without a further call
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

// An engine that stands still, or falls, holds up and fails no call; what it
// missed it gets.
func TestRecordAway(t *testing.T) {
	g := recording(t)
	away(t, g, 10*time.Second/slowdown, 100)
	var slowest time.Duration
	for i := range 300 {
		if i%100 == 50 {
			kill(t, engineOf(t, g), syscall.SIGKILL)
		}
		begun := time.Now()
		if r := ask(t.Context(), g, tool{"counter", "count", upstream.Args{Key: fmt.Sprint("f", i)}}); !r.answered() {
			t.Fatalf("call %d: %v", i, r.err)
		}
		slowest = max(slowest, time.Since(begun))
	}
	sameAsLog(t, g)
	t.Logf("while the engine fell the slowest call took %s", slowest.Round(time.Millisecond))
}

// The same at 300 calls a second for as long as WAYBILL_TEST_LONG says (10m).
func TestRecordAwayLong(t *testing.T) {
	long := os.Getenv("WAYBILL_TEST_LONG")
	if long == "" {
		return // TestRecordAway is the same, for less long
	}
	d, err := time.ParseDuration(long)
	if err != nil {
		t.Fatal("WAYBILL_TEST_LONG:", err)
	}
	away(t, recording(t), d, 300)
}

// away stops the engine for a time, under calls.
func away(t *testing.T, g *gateway.Gateway, d time.Duration, rate int) {
	t.Helper()
	pid := engineOf(t, g)
	kill(t, pid, syscall.SIGSTOP)
	defer kill(t, pid, syscall.SIGCONT)
	type took struct {
		time.Duration
		err error
	}
	all := make(chan took, int(d*time.Duration(rate)/time.Second)+rate) // for all of them: nobody receives before the end
	var calls sync.WaitGroup
	tick := time.NewTicker(time.Second / time.Duration(rate))
	defer tick.Stop()
	look := time.NewTicker(d / 20)
	defer look.Stop()
	var lags, memory []float64
	made := 0
	for begun := time.Now(); time.Since(begun) < d; {
		select {
		case <-tick.C:
			made++
			key := fmt.Sprint("a", made)
			calls.Go(func() {
				began := time.Now()
				r := ask(t.Context(), g, tool{"counter", "count", upstream.Args{Key: key}})
				all <- took{time.Since(began), r.err}
			})
		case <-look.C:
			lags = append(lags, measured(t, g, `waybill_record_lag_seconds`))
			memory = append(memory, rss(t, g.Pid()))
		}
	}
	calls.Wait()
	close(all)
	var times []time.Duration
	for c := range all {
		if c.err != nil {
			t.Errorf("a call failed: %v", c.err)
		}
		times = append(times, c.Duration)
	}
	slices.Sort(times)
	behind, size := measured(t, g, `waybill_queue_depth\{work="project"\}`), measured(t, g, `waybill_queue_size_bytes\{work="project"\}`)
	if behind < float64(4*made) || size == 0 {
		t.Errorf("%g events of %g bytes wait to be recorded, of %d calls", behind, size, made)
	}
	if first, last := lags[0], lags[len(lags)-1]; last <= first || last < d.Seconds()*0.8 {
		t.Errorf("the lag did not rise: %g", lags)
	}
	if resp, err := http.Get(g.Admin + "/readyz"); err != nil || resp.StatusCode != http.StatusOK {
		t.Errorf("not ready without ClickHouse: %v %v", resp, err)
	}
	kill(t, pid, syscall.SIGCONT)
	begun := time.Now()
	var falling []float64
	for lag := 1.0; lag > 0; <-look.C {
		look.Reset(time.Second / 4)
		if lag = measured(t, g, `waybill_record_lag_seconds`); len(falling) == 0 || lag != falling[len(falling)-1] {
			falling = append(falling, lag)
		}
		memory = append(memory, rss(t, g.Pid()))
		if time.Since(begun) > 10*time.Minute {
			t.Fatalf("not caught up: %g", falling)
		}
	}
	caught := time.Since(begun)
	// What is not recorded lies in the log, not in memory: after some minutes, in
	// which the log's memory for ids fills, it does not grow. To catch up takes
	// two batches and what is made of them.
	if n := len(lags) / 2; d > 5*time.Minute {
		early, late, most := slices.Max(memory[:n]), slices.Max(memory[n:len(lags)]), slices.Max(memory)
		if late > 1.25*early || most > late+300 {
			t.Errorf("memory: up to %.0f MB, then %.0f, and %.0f to catch up", early, late, most)
		}
	}
	t.Logf("%d calls in %s with the engine away: p50 %s, p99 %s, slowest %s; %g events (%.0f MB) behind; caught up in %s; lag %.0f, then %.0f; memory %.0f MB",
		made, d, times[len(times)/2].Round(time.Millisecond), times[len(times)*99/100].Round(time.Millisecond), times[len(times)-1].Round(time.Millisecond),
		behind, size/1e6, caught.Round(100*time.Millisecond), lags, falling, memory)
	sameAsLog(t, g)
}

// rss is a process's memory in MB.
func rss(t *testing.T, pid int) float64 {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		t.Fatal(err)
	}
	m := regexp.MustCompile(`VmRSS:\s+(\d+) kB`).FindSubmatch(b)
	if m == nil {
		t.Fatalf("no VmRSS in %s", b)
	}
	n, err := strconv.ParseFloat(string(m[1]), 64)
	if err != nil {
		t.Fatal(err)
	}
	return n / 1000
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
