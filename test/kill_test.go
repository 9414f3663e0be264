package test

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"waybill.dev/bus"
	"waybill.dev/schemas"
	"waybill.dev/test/gateway"
	"waybill.dev/test/peers"
	"waybill.dev/test/upstream"
)

// within is the time in which every call must have its ending after the gateway
// was killed and is ready again. Half of it is the log's patience with a worker
// that says nothing. (Under the race detector the gateway does a fraction of its
// work in that time; slowdown allows for that.)
const within = 10 * time.Second * slowdown

// Promises 1 to 3 over crashes: 64 callers, and a gateway that is killed
// manyKills times and started again on the same data.
func TestKills(t *testing.T) { kills(t, manyKills) }

// The same with a log of which 1 % of the publishes fail, and a further 1 % fail
// after they were stored.
func TestKillsWithFaults(t *testing.T) { kills(t, manyKills, gateway.Faults(0.01, 0.01)) }

func kills(t *testing.T, n int, env ...string) {
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	chance := rand.New(rand.NewPCG(seed, 1))

	begun := time.Now()
	u, g := counting(t, env...)
	processes := []*peers.Process{g.Process}
	c := callers(t, g, 64, seed)
	var l ledger
	var longest time.Duration
	settle := func(upTo uint64) {
		t.Helper()
		took, err := l.settle(t, g, upTo)
		if longest = max(longest, took); err != nil {
			t.Errorf("after kill %d: %v", len(processes)-1, err)
		}
	}
	for i := range n {
		c.made(t, 40+chance.IntN(240))
		last := i == n-1
		if i%10 == 9 {
			l.read(t, g) // all this has been seen in the log and must stay
		}
		c.shut(last)
		g.Kill()
		g.Restart()
		processes = append(processes, g.Process)
		c.open()
		if i%10 == 9 && !last {
			settle(l.last(t, g)) // under load
		}
	}
	replies := c.wait()
	settle(1 << 62)

	if unknown := l.audit(t, g, replies, u.Effects()); unknown == 0 {
		t.Error("no call ended as unknown: no kill came between a claim and its ending")
	}
	redelivered, dead := l.inspect(t, g)
	if dead != 0 {
		t.Errorf("%d dead letters", dead)
	}
	if err := g.Stop(); err != nil {
		t.Errorf("stopping: %v", err)
	}
	for _, p := range processes {
		output := foreignRaces(p.Output())
		for _, bad := range []string{"DATA RACE", "panic", "dead letter", "fatal error"} {
			if strings.Contains(output, bad) {
				t.Errorf("a gateway printed %q:\n%s", bad, p.Output())
			}
		}
	}
	t.Logf("%d kills in %s; calls open after a kill ended within %s of ready; %d deliveries were repeated, %d dead letters",
		n, time.Since(begun).Round(time.Second), longest.Round(10*time.Millisecond), redelivered, dead)
}

// race is a report of the race detector, and accesses the innermost function
// of each of the two accesses it is about.
var (
	race     = regexp.MustCompile(`(?s)==================\nWARNING: DATA RACE.*?\n==================\n`)
	accesses = regexp.MustCompile(`(?m)^(?:Read|Write|Previous read|Previous write) at .*\n +(\S+)\(`)
)

// foreignRaces takes out the reports on accesses that are both the NATS
// server's own: it sets its sync timer without a lock when it starts
// (v2.15.2, filestore.go, setSyncTimer), and the detector's slowness lets the
// timer fire before that is done.
func foreignRaces(output string) string {
	return race.ReplaceAllStringFunc(output, func(report string) string {
		at := accesses.FindAllStringSubmatch(report, -1)
		for _, a := range at {
			if !strings.HasPrefix(a[1], "github.com/nats-io/nats-server/") {
				return report
			}
		}
		if len(at) != 2 {
			return report
		}
		return ""
	})
}

func TestForeignRaces(t *testing.T) {
	report := func(one, other string) string {
		return "x\n==================\nWARNING: DATA RACE\nRead at 0x1 by goroutine 1:\n  " + one + "()\n      a.go:1\n\n" +
			"Previous write at 0x1 by goroutine 2:\n  " + other + "()\n      b.go:1\n\n==================\ny\n"
	}
	const nats, ours = "github.com/nats-io/nats-server/v2/server.(*fileStore).setSyncTimer", "waybill.dev/bus.(*Log).Publish"
	for _, c := range []struct {
		one, other string
		want       bool
	}{{nats, nats, false}, {nats, ours, true}, {ours, nats, true}, {ours, ours, true}} {
		text := report(c.one, c.other)
		if got := foreignRaces(text + report(nats, nats)); strings.Contains(got, "DATA RACE") != c.want || !strings.HasSuffix(got, "y\n") {
			t.Errorf("%s and %s: left %q", c.one, c.other, got)
		}
	}
}

// SIGTERM under load: who has a call in flight gets its answer or is told, and
// nothing stays open.
func TestDrain(t *testing.T) {
	u, g := counting(t)
	var l ledger
	var replies []reply
	for round := range 3 {
		c := callers(t, g, 64, uint64(round))
		c.made(t, 400)
		// They go on calling while the gateway is on its way out.
		leave := time.AfterFunc(100*time.Millisecond, func() { c.shut(true) })
		if err := g.Stop(); err != nil {
			t.Errorf("stopping: %v", err)
		}
		leave.Stop()
		c.shut(true)
		g.Restart()
		l.read(t, g)
		if open := l.open(1 << 62); len(open) > 0 {
			t.Errorf("round %d: %d calls are open: %v", round, len(open), open)
		}
		c.open()
		replies = append(replies, c.wait()...)
	}
	l.audit(t, g, replies, u.Effects())
	asked := map[string]schemas.CallID{}
	for call, h := range l.calls {
		asked[keyOf(h.requested)] = call
		// Where the deadline is long, there was time for an answer.
		if f, ok := h.end.Data.(*schemas.Failed); ok && f.Code == schemas.FailUnknown && f.Server == "counter" {
			t.Errorf("call %s: nobody knows how it went, and nobody was killed", call)
		}
	}
	cut := 0
	for _, r := range replies {
		if r.answered() {
			continue
		}
		// A connection that the gateway closed before it read the request.
		if cut++; asked[r.args.Key] != "" {
			t.Errorf("call %s was taken and its caller left without an answer: %v", asked[r.args.Key], r.err)
		}
	}
	t.Logf("%d calls found the connection closed, none of which was taken", cut)
	if _, dead := l.inspect(t, g); dead != 0 {
		t.Errorf("%d dead letters", dead)
	}
}

// Two gateways on one data directory would write one log twice.
func TestSecondProcessIsRefused(t *testing.T) {
	g := gateway.Start(t, gateway.Config(""))
	file := filepath.Join(g.Dir, "second.yaml")
	config, err := os.ReadFile(g.File())
	if err != nil {
		t.Fatal(err)
	}
	for _, addr := range []string{g.URL, g.Admin} {
		config = bytes.ReplaceAll(config, []byte(strings.TrimPrefix(addr, "http://")), []byte(gateway.FreeAddr(t)))
	}
	if err := os.WriteFile(file, config, 0o600); err != nil {
		t.Fatal(err)
	}
	second := gateway.Child(t, "gateway", "WAYBILL_TEST_CONFIG="+file)
	if _, err := second.Await(t.Context(), "Waybill is ready."); err == nil || !strings.Contains(err.Error(), "another waybill uses this data directory") {
		t.Errorf("a second gateway on the same data: %v", err)
	}
	if out, errs, exit := g.CLI("sessions"); exit != 0 {
		t.Errorf("the first one: exit %d, %s%s", exit, out, errs)
	}
}

// crowd is callers at work.
type crowd struct {
	mu    sync.Mutex
	door  chan struct{} // closed while the gateway may be called
	stop  bool
	ended []reply
	work  sync.WaitGroup

	awaited int           // how many are to have ended …
	enough  chan struct{} // … when this is closed; nil if nobody waits
}

// callers starts n callers, who call until the door is shut for good. One who
// gets no answer waits at the door and goes on with a new call.
func callers(t *testing.T, g *gateway.Gateway, n int, seed uint64) *crowd {
	c := &crowd{door: make(chan struct{})}
	close(c.door)
	for who := range n {
		chance := rand.New(rand.NewPCG(seed, uint64(who)+2))
		c.work.Go(func() {
			for i := 0; c.enter(); i++ {
				what := tool{server: "counter", name: "count", args: upstream.Args{Key: fmt.Sprintf("s%x-c%d-%d", seed, who, i)}}
				if chance.IntN(5) < 2 {
					what.name = "read"
				}
				if chance.IntN(5) == 0 {
					what.server = "hasty"
				}
				switch chance.IntN(4) {
				case 0:
					what.args.Wait = chance.IntN(300)
				case 1:
					what.args.Wait, what.args.Progress = chance.IntN(300), 1+chance.IntN(4)
				case 2:
					what.args.Wait = chance.IntN(30)
				}
				if chance.IntN(8) == 0 {
					what.args.Pad = strings.Repeat("0123456789abcdef", 400)
				}
				r := ask(t.Context(), g, what)
				c.mu.Lock()
				if c.ended = append(c.ended, r); c.enough != nil && len(c.ended) >= c.awaited {
					close(c.enough)
					c.enough = nil
				}
				c.mu.Unlock()
			}
		})
	}
	t.Cleanup(func() { c.shut(true); c.open(); c.work.Wait() })
	return c
}

// made waits until n more calls have ended, well or not.
func (c *crowd) made(t *testing.T, n int) {
	t.Helper()
	enough := make(chan struct{})
	c.mu.Lock()
	c.awaited, c.enough = len(c.ended)+n, enough
	c.mu.Unlock()
	select {
	case <-enough:
	case <-time.After(time.Minute * slowdown):
		t.Fatalf("%d calls have not ended in time", n)
	}
}

// enter waits for the door and tells whether there is another call to make.
func (c *crowd) enter() bool {
	c.mu.Lock()
	door, stop := c.door, c.stop
	c.mu.Unlock()
	if stop {
		return false
	}
	<-door
	c.mu.Lock()
	defer c.mu.Unlock()
	return !c.stop
}

// shut lets nobody call any more; for good ends the work.
func (c *crowd) shut(forGood bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	select {
	case <-c.door:
		c.door = make(chan struct{})
	default:
	}
	c.stop = c.stop || forGood
}

func (c *crowd) open() {
	c.mu.Lock()
	defer c.mu.Unlock()
	select {
	case <-c.door:
	default:
		close(c.door)
	}
}

// wait returns what came of all calls, after the last has ended.
func (c *crowd) wait() []reply {
	c.work.Wait()
	return c.ended
}

// history is a call as the log has it.
type history struct {
	requested, decided, end schemas.Event
	started                 int
	ends                    int
	progressed              []schemas.Event
	late                    int
}

// ledger is a copy of the log.
type ledger struct {
	events []schemas.Event
	calls  map[schemas.CallID]*history
}

// dial connects to the gateway's log as an observer.
func (l *ledger) dial(t *testing.T, g *gateway.Gateway) *bus.Log {
	t.Helper()
	log, err := bus.Open(t.Context(), bus.Options{Dial: bus.URL(observer(t, g), ""), Role: bus.RoleObserver})
	if err != nil {
		t.Fatal(err)
	}
	return log
}

// last is the newest sequence.
func (l *ledger) last(t *testing.T, g *gateway.Gateway) uint64 {
	t.Helper()
	log := l.dial(t, g)
	defer log.Close()
	seq, err := log.Last(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return seq
}

// read copies what is new. That every event can be decoded, stands where it
// says and has the ID that it should have, the log's reader checks.
func (l *ledger) read(t *testing.T, g *gateway.Gateway) {
	t.Helper()
	log := l.dial(t, g)
	defer log.Close()
	l.take(t, log)
}

func (l *ledger) take(t *testing.T, log *bus.Log) {
	t.Helper()
	if l.calls == nil {
		l.calls = map[schemas.CallID]*history{}
	}
	for e, err := range log.Read(t.Context(), bus.Filter{}, uint64(len(l.events))+1) {
		if err != nil {
			t.Fatalf("reading event %d: %v", len(l.events)+1, err)
		}
		l.events = append(l.events, e)
		if e.Seq != uint64(len(l.events)) {
			t.Fatalf("event %d has sequence %d", len(l.events), e.Seq)
		}
		if e.Call == "" {
			continue
		}
		h := l.calls[e.Call]
		if h == nil {
			h = &history{}
			l.calls[e.Call] = h
		}
		switch e.Kind() {
		case schemas.KindRequested:
			h.requested = e
		case schemas.KindAuthorized, schemas.KindDenied:
			h.decided = e
		case schemas.KindStarted:
			h.started++
		case schemas.KindProgressed:
			h.progressed = append(h.progressed, e)
		case schemas.KindLate:
			h.late++
		}
		if e.Kind().Ends() {
			h.end = e
			h.ends++
		}
	}
}

// open are the calls requested up to a sequence that have no ending.
func (l *ledger) open(upTo uint64) (open []schemas.CallID) {
	for call, h := range l.calls {
		if h.ends == 0 && h.requested.Seq <= upTo {
			open = append(open, call)
		}
	}
	return open
}

// settle waits until the calls that were requested up to a sequence have ended,
// and returns how long that took. The gateway is ready when it begins.
func (l *ledger) settle(t *testing.T, g *gateway.Gateway, upTo uint64) (time.Duration, error) {
	t.Helper()
	ready := time.Now()
	log := l.dial(t, g)
	defer log.Close()
	for tick := time.Tick(100 * time.Millisecond); ; <-tick {
		l.take(t, log)
		open, took := l.open(upTo), time.Since(ready)
		if len(open) == 0 {
			return took, nil
		}
		if took > within {
			return took, fmt.Errorf("%s after it is ready again %d calls are open: %v", took, len(open), open)
		}
	}
}

// streams connects to a log as it is, without the gateway's own code.
func streams(t testing.TB, url string, o ...nats.Option) (js jetstream.JetStream, closing func()) {
	t.Helper()
	nc, err := nats.Connect(url, o...)
	if err != nil {
		t.Fatal(err)
	}
	if js, err = jetstream.New(nc); err != nil {
		nc.Close()
		t.Fatal(err)
	}
	return js, nc.Close
}

// inspect counts the deliveries that were repeated, as far as the consumers
// know after a crash, and the dead letters.
func (l *ledger) inspect(t *testing.T, g *gateway.Gateway) (redelivered, dead int) {
	t.Helper()
	js, closing := streams(t, observer(t, g))
	defer closing()
	system, err := js.Stream(t.Context(), "DEAD")
	if err != nil {
		t.Fatal(err)
	}
	info, err := system.Info(t.Context(), jetstream.WithSubjectFilter("dead.>"))
	if err != nil {
		t.Fatal(err)
	}
	for _, work := range []string{"policy", "dispatch"} {
		c, err := js.Consumer(t.Context(), "EVENTS", work)
		if err != nil {
			t.Fatal(err)
		}
		i := c.CachedInfo()
		// The server counts what it sent, again or not, and the last sequence.
		redelivered += int(i.Delivered.Consumer) - count(l.events, i.Delivered.Stream, work)
		if i.NumAckPending+int(i.NumPending) > 0 {
			t.Errorf("%s has %d events not settled and %d not delivered", work, i.NumAckPending, i.NumPending)
		}
	}
	return redelivered, len(info.State.Subjects)
}

// count is how many of the events up to a sequence are the work's.
func count(events []schemas.Event, upTo uint64, work string) (n int) {
	of := map[string]schemas.Kind{"policy": schemas.KindRequested, "dispatch": schemas.KindAuthorized}[work]
	for _, e := range events {
		if e.Seq <= upTo && e.Kind() == of {
			n++
		}
	}
	return n
}

// audit checks the whole log against what the callers know and what the
// upstream did, and returns how many calls ended as unknown.
func (l *ledger) audit(t *testing.T, g *gateway.Gateway, replies []reply, effects []upstream.Effect) int {
	t.Helper()
	// What was in the log once is in it now.
	var again ledger
	again.read(t, g)
	if len(again.events) < len(l.events) {
		t.Errorf("the log had %d events and has %d", len(l.events), len(again.events))
	}
	for i, e := range l.events[:min(len(l.events), len(again.events))] {
		if now := again.events[i]; now.ID() != e.ID() || !bytes.Equal(now.Body, e.Body) || !now.Stored.Equal(e.Stored) {
			t.Errorf("event %d was %s and is %s", i+1, e.ID(), now.ID())
		}
	}
	*l = again

	ids := map[schemas.EventID]uint64{}
	for _, e := range l.events {
		// A session is opened by each process that sees it, and the log
		// recognises that for a while only; the first counts.
		if first := ids[e.ID()]; first != 0 && e.Kind() != schemas.KindOpened {
			t.Errorf("%s is stored at %d and at %d", e.ID(), first, e.Seq)
		}
		ids[e.ID()] = e.Seq
	}

	done := map[schemas.CallID]int{}
	did := map[string]int{} // by key, not idempotent
	repeated := 0
	for _, e := range effects {
		call := schemas.CallID(e.Call)
		h := l.calls[call]
		if h == nil || h.requested.Data == nil || h.decided.Data == nil {
			t.Errorf("%s was carried out for call %s, which the log does not have", e.Key, call)
			continue
		}
		if done[call]++; done[call] == 2 {
			repeated++
		}
		if e.Tool == "count" {
			if did[e.Key]++; did[e.Key] > 1 || done[call] > 1 {
				t.Errorf("call %s, %s: carried out %d times", call, e.Key, did[e.Key])
			}
			if h.started == 0 {
				t.Errorf("call %s was carried out without a claim", call)
			}
		}
		// A request that was on its way arrives when this machine has time for
		// it; one that is carried out late is so by seconds.
		if over := e.At.Sub(h.requested.Data.(*schemas.Requested).Deadline); over > time.Second {
			t.Errorf("call %s was carried out %s after its deadline", call, over)
		}
	}

	outcome := map[string]int{}
	unknown := map[schemas.CallID]bool{}
	late, unknownDone := 0, 0
	for call, h := range l.calls {
		late += h.late
		if h.requested.Data == nil {
			// A caller who left before its request was known to be stored wishes
			// for an end in any case.
			outcome["cancel without a request"]++
			continue
		}
		if h.ends != 1 {
			t.Errorf("call %s has %d endings", call, h.ends)
			continue
		}
		what := string(h.end.Kind())
		target := h.requested.Data.(*schemas.Requested).Target
		switch d := h.end.Data.(type) {
		case *schemas.Completed:
			if done[call] == 0 {
				t.Errorf("call %s is completed and was not carried out", call)
			}
			wholeChunks(t, h, d.Summary)
		case *schemas.Failed:
			what += " " + string(d.Code)
			switch d.Code {
			case schemas.FailUnknown:
				unknown[call] = true
				unknownDone += done[call]
			case schemas.FailExpired, schemas.FailUnavailable, schemas.FailOverloaded, schemas.FailInvalid, schemas.FailUndecodable:
				if target.Name == "count" && done[call] > 0 {
					t.Errorf("call %s is said not to be carried out (%s) and was", call, d.Code)
				}
			}
		}
		outcome[what]++
	}

	knows := map[string]int{}
	for _, r := range replies {
		h := l.calls[schemas.CallID(r.call)]
		if r.call != "" && (h == nil || h.requested.Data == nil) && r.status != 503 {
			t.Errorf("%s: call %s was answered with HTTP %d and is not in the log", r.args.Key, r.call, r.status)
			continue
		}
		if !r.answered() {
			knows["nothing"]++
			continue
		}
		a, err := r.parsed()
		switch {
		case err != nil:
			t.Errorf("%s: HTTP %d, %v: %.300s", r.args.Key, r.status, err, r.body)
		case a.Result != nil:
			knows["success"]++
			l.success(t, r, h)
			if unknown[schemas.CallID(r.call)] {
				t.Errorf("call %s ended as unknown and was reported as success", r.call)
			}
		case a.Error != nil:
			code := a.Error.Data.Waybill.Code
			knows[code]++
			// What the caller is told is the ending. Only where it is told that
			// nobody knows, there may be one that came too late for it.
			switch {
			case slices.Contains([]string{"overdue", "draining", "lost"}, code):
			case h != nil && h.ends == 1:
				if f, ok := h.end.Data.(*schemas.Failed); ok && string(f.Code) == code || h.end.Kind() == schemas.KindCancelled && code == "cancelled" {
					continue
				}
				t.Errorf("call %s ended as %s, its caller was told %q", r.call, h.end.Kind(), code)
			}
		default:
			t.Errorf("%s: HTTP %d: %.300s", r.args.Key, r.status, r.body)
		}
	}
	t.Logf("%d calls of the callers, who know %s", len(replies), counts(knows))
	t.Logf("%d events, %d calls: %s; %d late answers", len(l.events), len(l.calls), counts(outcome), late)
	t.Logf("%d effects; of the unknown %d were carried out; %d idempotent calls more than once", len(effects), unknownDone, repeated)
	return len(unknown)
}

// success holds an answer against the ending in the log.
func (l *ledger) success(t *testing.T, r reply, h *history) {
	t.Helper()
	if h == nil || h.end.Kind() != schemas.KindCompleted {
		t.Errorf("call %s was answered and has no completed event", r.call)
		return
	}
	// The id is the one thing that the gateway changes.
	want := bytes.Replace(h.end.Body, []byte(`"id":"`+r.call+`"`), []byte(`"id":"`+r.args.Key+`"`), 1)
	if !bytes.Equal(r.body, want) {
		t.Errorf("call %s was answered with\n%.300s\nand ended with\n%.300s", r.call, r.body, want)
	}
	if r.progress != r.args.Progress {
		t.Errorf("call %s: its caller had %d messages before the answer, the upstream sent %d", r.call, r.progress, r.args.Progress)
	}
}

// wholeChunks checks what an ending says of the events before it.
func wholeChunks(t *testing.T, h *history, s schemas.Summary) {
	t.Helper()
	sum := sha256.New()
	n := 0
	for _, e := range h.progressed {
		if e.Data.(*schemas.Progressed).Index != n || n == s.Chunks {
			continue // of another run, which died
		}
		n++
		sum.Write(binary.BigEndian.AppendUint64(nil, uint64(len(e.Body))))
		sum.Write(e.Body)
	}
	if n != s.Chunks || n > 0 && hex.EncodeToString(sum.Sum(nil)) != s.ChunksSHA256 {
		t.Errorf("call %s: %d progressed events, its ending says %d or has another digest", h.end.Call, n, s.Chunks)
	}
}

// keyOf is the key in a request's arguments.
func keyOf(e schemas.Event) string {
	_, rest, _ := strings.Cut(string(e.Body), `"id":"`)
	key, _, _ := strings.Cut(rest, `"`)
	return key
}

func counts(m map[string]int) string {
	var all []string
	for _, k := range slices.Sorted(maps.Keys(m)) {
		all = append(all, fmt.Sprintf("%s %d", k, m[k]))
	}
	return strings.Join(all, ", ")
}
