package test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"waybill.dev/schemas"
	"waybill.dev/schemas/jsonrpc"
	"waybill.dev/test/gateway"
	"waybill.dev/test/peers"
	"waybill.dev/test/upstream"
)

// kindsOfSessions are those that TestVerifyEverySession must have had.
var kindsOfSessions = []string{
	"denied", "held", "granted", "refused", "not decided", "cancelled", "MRTR", "translated from old", "translated from new",
	"asked", "unknown", "expired", "killed", "of many servers", "large", "progressed", "no such tool",
}

// TestVerifyEverySession: whatever becomes of sessions, in a gateway of which
// publishes fail and which is killed, everything in them is made again as it was
// recorded; and what is changed in one of any kind is named. WAYBILL_TEST_SESSIONS
// says how many there are (10000).
func TestVerifyEverySession(t *testing.T) {
	t.Parallel()
	n, kills := manySessions, 2
	if given := os.Getenv("WAYBILL_TEST_SESSIONS"); given != "" {
		var err error
		if n, err = strconv.Atoi(given); err != nil {
			t.Fatal("WAYBILL_TEST_SESSIONS:", err)
		}
		kills = max(kills, n/1000)
	}
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	m := startMixed(t)
	killed := m.run(t, n, kills)

	settled(t, m.Gateway)
	signed(t, m.Gateway)
	var l ledger
	l.read(t, m.Gateway)
	eventually(t, m.Gateway, "SELECT max(seq) AS n FROM events", fmt.Sprintf(`{"n":%d}`, len(l.events)))
	sessions := sessionsOf(l.events)
	of := map[string][]schemas.SessionKey{}
	for _, key := range slices.Sorted(maps.Keys(sessions)) {
		for kind := range kindsIn(sessions[key], killed) {
			of[kind] = append(of[kind], key)
		}
	}
	for _, kind := range kindsOfSessions {
		if len(of[kind]) == 0 {
			t.Errorf("no session is %s", kind)
		}
	}
	if len(sessions) < n {
		t.Errorf("%d sessions are in the log, want %d", len(sessions), n)
	}

	sum := m.verify(t, sessions)
	var counts []string
	for _, kind := range kindsOfSessions {
		counts = append(counts, fmt.Sprintf("%d %s", len(of[kind]), kind))
	}
	t.Logf("%d sessions verified in %s: %d events of %d calls, %d decisions, %d endings, %d leaves, %d rows; %d events of an id that was there before; %d kills; sessions: %s",
		len(sessions), sum.took.Round(time.Millisecond), sum.Events, sum.Calls, sum.Decisions, sum.Endings, sum.Leaves, sum.Rows, sum.Repeated, len(killed), strings.Join(counts, ", "))

	chance := rand.New(rand.NewPCG(seed, 1))
	done := map[schemas.SessionKey]bool{} // one may be of several kinds
	for _, kind := range kindsOfSessions {
		all := of[kind]
		if len(all) == 0 || slices.ContainsFunc(all, func(key schemas.SessionKey) bool { return done[key] }) {
			continue
		}
		key := all[chance.IntN(len(all))]
		done[key] = true
		t.Run("altered "+kind, func(t *testing.T) { alteredAnywhere(t, m.Gateway, key, chance) })
	}
	if err := m.Stop(); err != nil {
		t.Errorf("stopping: %v", err)
	}
}

// kindsIn tells of what kinds a session is.
func kindsIn(events []schemas.Event, kills []time.Time) map[string]bool {
	is := map[string]bool{}
	revision := "" // of a client with a session
	begun := map[schemas.CallID]schemas.Event{}
	for _, e := range events {
		switch d := e.Data.(type) {
		case *schemas.Opened:
			revision = d.Revision
		case *schemas.Requested:
			begun[e.Call] = e
			is["large"] = is["large"] || len(e.Body) > schemas.InlineBody
		case *schemas.Held:
			is["held"] = true
		case *schemas.Authorized:
			is["granted"] = is["granted"] || d.N > 1
		case *schemas.Denied:
			is["denied"] = true
			is["refused"] = is["refused"] || strings.Contains(d.Reason, "refused by")
			is["not decided"] = is["not decided"] || d.N > 1 && !strings.Contains(d.Reason, "refused by")
		case *schemas.Progressed:
			is["progressed"] = true
		case *schemas.Asked:
			is["asked"] = is["asked"] || revision != ""
		case *schemas.Cancelled:
			is["cancelled"] = true
		case *schemas.Failed:
			is[string(d.Code)] = true
			is["no such tool"] = is["no such tool"] || d.Name == "nothing" && d.Code == schemas.FailInvalid
		case *schemas.Completed:
			is["MRTR"] = is["MRTR"] || d.Result == "input_required"
			is["translated from old"] = is["translated from old"] || d.Server == "modern" && d.Name != "" && revision != ""
			is["translated from new"] = is["translated from new"] || d.Server == "legacy" && d.Name != "" && revision == ""
			is["of many servers"] = is["of many servers"] || d.Server == schemas.Gateway
		}
		for _, at := range kills {
			if q, ok := begun[e.Call]; ok && e.Kind().Ends() && q.Stored.Before(at) && e.Stored.After(at) {
				is["killed"] = true
			}
		}
	}
	maps.DeleteFunc(is, func(_ string, so bool) bool { return !so })
	return is
}

// mixed is a gateway before servers of both eras, and those who call them.
type mixed struct {
	*gateway.Gateway
	up *upstream.Upstream
}

// startMixed starts a gateway of which 1 % of the publishes fail, and a further 1 %
// fail after they were stored.
func startMixed(t *testing.T) *mixed {
	t.Helper()
	u := upstream.Start(t)
	rules := filepath.Join(t.TempDir(), "rules.yaml")
	if err := os.WriteFile(rules, []byte(`
rules:
  - {id: never, effect: forbid, match: {tools: [count]}, when: 'has(args.key) && args.key.startsWith("no")', reason: not this one}
  - {id: look, effect: require_approval, match: {tools: [count]}, when: 'has(args.key) && args.key.startsWith("ask") && !args.key.endsWith("leave")', reason: somebody has to look, wait: 15s}
  - {id: unseen, effect: require_approval, match: {tools: [count]}, when: 'has(args.key) && args.key.startsWith("ask") && args.key.endsWith("leave")', reason: nobody does, wait: 2s}
  - {id: blank, effect: oblige, match: {tools: [read]}, obligations: {redact: [pad], tags: [private]}}
  - {id: quick, effect: oblige, match: {servers: [narrow], tools: [read]}, obligations: {deadline: 200ms}}
  - {id: few, effect: oblige, match: {servers: [counter], tools: [read]}, obligations: {limit: {calls: 10000, per: 1m, by: [agent]}}}
`), 0o600); err != nil {
		t.Fatal(err)
	}
	server := func(name, mcp, more string) string {
		return fmt.Sprintf("  - {name: %s, mcp: {url: %q%s}%s}\n", name, u.URL, mcp, more)
	}
	g := gateway.Start(t, gateway.Config("clickhouse: {embedded: true, launcher: "+peers.ClickHouse(t)+"}\n"+
		"bus: {embedded: {listen: "+gateway.FreeAddr(t)+"}}\nlimits: {sessions_per_agent: 100000, sessions_per_tenant: 100000}\n"+
		"policies: ["+rules+"]\nservers:\n"+
		server("counter", "", ", idempotent: [read], deadline: 20s")+
		gateway.Server("modern", peers.EverythingServer(t), "")+
		server("legacy", ", era: legacy", ", idempotent: [read], deadline: 20s")+
		server("hasty", "", ", deadline: 400ms")+
		server("narrow", "", ", deadline: 20s, concurrency: 1")), gateway.Faults(0.01, 0.01))
	eventually(t, g, "SELECT count() AS n FROM events", `{"n":0}`) // it serves
	return &mixed{Gateway: g, up: u}
}

// run has n sessions of all kinds, and kills the gateway so often among them. It
// returns when that was.
func (m *mixed) run(t *testing.T, n, kills int) (killed []time.Time) {
	t.Helper()
	kinds := []func(ctx context.Context, session string){
		m.plain, m.denied, m.held, m.left, m.input, m.old, m.asked, m.unknown, m.expired, m.lists, m.cancelled, m.unlisted, m.long,
	}
	c := &crowd{door: make(chan struct{})}
	close(c.door)
	var begun, ended atomic.Int64
	var crowd, beside sync.WaitGroup
	for range 24 {
		crowd.Go(func() {
			for c.enter() {
				i := int(begun.Add(1)) - 1
				if i >= n {
					return
				}
				ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
				kinds[i%len(kinds)](ctx, fmt.Sprint("s", i))
				cancel()
				ended.Add(1)
			}
		})
	}
	over, done := context.WithCancel(t.Context())
	beside.Go(func() { // somebody has the narrow server's only place
		for i := 0; over.Err() == nil; i++ {
			if !c.enter() {
				return
			}
			m.call(over, "narrow", fmt.Sprint("narrow", i), "count", upstream.Args{Key: fmt.Sprint("n", i), Wait: 1000})
		}
	})
	beside.Go(func() { m.approve(over) })
	defer func() {
		c.shut(true)
		c.open()
		crowd.Wait()
		done()
		beside.Wait()
	}()
	for k := range kills {
		if !becomes(time.Hour, func() bool { return int(ended.Load()) >= n*(k+1)/(kills+1) }) {
			t.Fatal("they come to a standstill")
		}
		key := fmt.Sprint("killed", k)
		crowd.Go(func() {
			m.call(t.Context(), "counter", key, "count", upstream.Args{Key: key, Wait: 3000})
		})
		is := func(e upstream.Effect) bool { return e.Key == key }
		if !becomes(within, func() bool { return slices.ContainsFunc(m.up.Effects(), is) }) {
			t.Fatalf("call %s is not carried out", key)
		}
		c.shut(false)
		killed = append(killed, time.Now())
		m.Kill()
		m.Restart()
		c.open()
	}
	crowd.Wait()
	// One of each that no kill can spoil.
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	for i, kind := range kinds {
		crowd.Go(func() { kind(ctx, fmt.Sprint("last", i)) })
	}
	crowd.Wait()
	return killed
}

// call calls a tool and returns what was said, "" if nothing was: publishes fail,
// and the gateway is killed, so none of them can be sure of an answer.
func (m *mixed) call(ctx context.Context, server, session, tool string, args upstream.Args) string {
	text, err := json.Marshal(args)
	if err != nil {
		return ""
	}
	return m.send(ctx, server, session, tool, fmt.Sprintf(`"name":%q,"arguments":%s,%s`, tool, text, gateway.Meta))
}

func (m *mixed) send(ctx context.Context, server, session, tool, params string) string {
	a, err := m.Post(ctx, server, "tools/call", tool, `{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{`+params+`}}`, "Waybill-Session: "+session)
	if err != nil {
		return ""
	}
	return string(a.Body)
}

func (m *mixed) plain(ctx context.Context, s string) {
	m.call(ctx, "counter", s, "count", upstream.Args{Key: s, Progress: 2})
	m.call(ctx, "counter", s, "read", upstream.Args{Key: s, Pad: "hidden"})
}

func (m *mixed) denied(ctx context.Context, s string) {
	m.call(ctx, "counter", s, "count", upstream.Args{Key: "no" + s})
	m.call(ctx, "counter", s, "count", upstream.Args{Key: s, Pad: strings.Repeat("long ", 1000)})
}

func (m *mixed) held(ctx context.Context, s string) {
	var all sync.WaitGroup
	for _, what := range []string{"grant", "refuse", "leave"} {
		all.Go(func() { m.call(ctx, "counter", s, "count", upstream.Args{Key: "ask" + s + " to " + what}) })
	}
	all.Wait()
}

// left leaves in the middle of a call, which without a session is to cancel it.
func (m *mixed) left(ctx context.Context, s string) {
	ctx, cancel := context.WithTimeout(ctx, 500*time.Millisecond*slowdown)
	defer cancel()
	m.call(ctx, "counter", s, "count", upstream.Args{Key: s, Wait: 3000 * slowdown, Progress: 2})
}

// input is asked for something, and brings it.
func (m *mixed) input(ctx context.Context, s string) {
	params := `"name":"ask","arguments":{"key":"` + s + `"},` + strings.Replace(gateway.Meta, `Capabilities":{}`, `Capabilities":{"elicitation":{}}`, 1)
	a, err := jsonrpc.Decode([]byte(m.send(ctx, "legacy", s, "ask", params)), jsonrpc.Limits{})
	if err != nil {
		return
	}
	if state, ok := a.Root().Get("result", "requestState").Text(); ok {
		m.send(ctx, "legacy", s, "ask", params+`,"inputResponses":{"elicitation/create-1":{"action":"accept","content":{"name":"Ada"}}},"requestState":"`+state+`"`)
	}
}

// open opens a session of an older revision, does something in it and ends it.
func (m *mixed) open(ctx context.Context, server string, do func(*peers.LegacySession)) {
	o, _, err := peers.OpenLegacy(ctx, peers.Endpoint{URL: m.URL + "/mcp/" + server}, "2025-11-25", map[string]any{"elicitation": struct{}{}})
	if err != nil {
		return
	}
	o.Client = client
	do(o)
	_, _ = o.Delete(ctx) // or it stays
}

func (m *mixed) old(ctx context.Context, _ string) {
	m.open(ctx, "modern", func(o *peers.LegacySession) {
		_, _ = o.Call(ctx, "tools/call", map[string]any{"name": "test_simple_text", "arguments": struct{}{}})
		answerIn(ctx, o, "test_input_required_result_elicitation")
	})
}

func (m *mixed) asked(ctx context.Context, _ string) {
	m.open(ctx, "legacy", func(o *peers.LegacySession) { answerIn(ctx, o, "ask") })
}

// answerIn calls a tool and answers what is asked meanwhile.
func answerIn(ctx context.Context, o *peers.LegacySession, tool string) {
	stream, err := o.Request(ctx, "tools/call", map[string]any{"name": tool, "arguments": struct{}{}})
	if err != nil {
		return
	}
	defer func() { _ = stream.Close() }()
	if _, q, err := stream.Message(); err == nil && q.Method == "elicitation/create" {
		_, _ = o.Send(ctx, peers.Message{ID: q.ID, Result: json.RawMessage(`{"action":"accept","content":{"name":"Ada"}}`)})
		_, _ = stream.Answer()
	}
}

// cancelled says that it does not want the answer any more.
func (m *mixed) cancelled(ctx context.Context, s string) {
	m.open(ctx, "legacy", func(o *peers.LegacySession) {
		stream, err := o.Request(ctx, "tools/call", map[string]any{"name": "count", "arguments": upstream.Args{Key: s, Wait: 3000, Progress: 5}, "_meta": map[string]any{"progressToken": s}})
		if err != nil {
			return
		}
		defer func() { _ = stream.Close() }()
		if _, _, err := stream.Message(); err == nil {
			_, _ = o.Send(ctx, peers.Message{Method: "notifications/cancelled", Params: json.RawMessage(`{"requestId":` + string(stream.ID) + `,"reason":"enough"}`)})
		}
	})
}

func (m *mixed) unknown(ctx context.Context, s string) {
	m.call(ctx, "hasty", s, "count", upstream.Args{Key: s, Wait: 1000})
}

func (m *mixed) expired(ctx context.Context, s string) {
	m.call(ctx, "narrow", s, "read", upstream.Args{Key: s})
	m.call(ctx, "narrow", s, "read", upstream.Args{Key: s})
}

func (m *mixed) lists(ctx context.Context, s string) {
	_, _ = m.Post(ctx, "", "tools/list", "", `{"jsonrpc":"2.0","id":1,"method":"tools/list","params":{`+gateway.Meta+`}}`, "Waybill-Session: "+s)
}

func (m *mixed) unlisted(ctx context.Context, s string) {
	m.call(ctx, "counter", s, "nothing", upstream.Args{Key: s})
	_, _ = m.Post(ctx, "counter", "tools/call", "read", `{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{"name":"read","arguments":{"key":7},`+gateway.Meta+`}}`, "Waybill-Session: "+s)
}

// long is likely to be in the middle when the gateway is killed.
func (m *mixed) long(ctx context.Context, s string) {
	m.call(ctx, "counter", s, "count", upstream.Args{Key: s, Wait: 800, Progress: 4})
	m.call(ctx, "counter", s, "read", upstream.Args{Key: s})
}

// approve says of what is waited for what its key asks for.
func (m *mixed) approve(ctx context.Context) {
	tick := time.NewTicker(100 * time.Millisecond)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		out, _, _ := m.CLI("approvals", "--json") // nothing, where it was killed
		for line := range strings.Lines(out) {
			var a asked
			if err := json.Unmarshal([]byte(line), &a); err != nil {
				continue
			}
			for _, what := range []string{"grant", "refuse"} {
				if strings.Contains(string(a.Args), " to "+what) {
					_, _, _ = m.CLI("approvals", what, a.ID, "--by", "ann")
				}
			}
		}
	}
}

// verified is what came of all sessions.
type verified struct {
	remade
	Repeated int
	took     time.Duration
}

// verify runs `replay --verify` for each session.
func (m *mixed) verify(t *testing.T, sessions map[schemas.SessionKey][]schemas.Event) (sum verified) {
	t.Helper()
	begun := time.Now()
	keys := slices.Sorted(maps.Keys(sessions))
	var mu sync.Mutex
	var next, failed atomic.Int64
	var workers sync.WaitGroup
	for range 4 {
		workers.Go(func() {
			for i := int(next.Add(1)) - 1; i < len(keys) && failed.Load() < 10; i = int(next.Add(1)) - 1 {
				out, errs, exit := m.CLI("replay", string(keys[i]), "--verify", "--json")
				var v verified
				if err := json.Unmarshal([]byte(out), &v); err != nil {
					t.Errorf("replay --verify %s: exit %d, %s%s", keys[i], exit, out, errs)
					failed.Add(1)
					continue
				}
				events := len(sessions[keys[i]])
				if exit != 0 || !v.Verified || v.Events < events || v.Leaves < events || v.Rows < events-v.Repeated || len(v.Left)+len(v.Notes) > 0 {
					t.Errorf("session %s of %d events: exit %d, %+v", keys[i], events, exit, v)
					failed.Add(1)
				}
				mu.Lock()
				sum.Events, sum.Calls, sum.Decisions, sum.Endings = sum.Events+v.Events, sum.Calls+v.Calls, sum.Decisions+v.Decisions, sum.Endings+v.Endings
				sum.Leaves, sum.Rows, sum.Repeated = sum.Leaves+v.Leaves, sum.Rows+v.Rows, sum.Repeated+v.Repeated
				mu.Unlock()
			}
		})
	}
	workers.Wait()
	sum.took = time.Since(begun)
	return sum
}

// alteredAnywhere changes one value of each event of an exported session, whichever,
// and expects that this event is named.
func alteredAnywhere(t *testing.T, g *gateway.Gateway, key schemas.SessionKey, chance *rand.Rand) {
	file := filepath.Join(t.TempDir(), "s.waybill")
	if _, errs, exit := g.CLI("export", string(key), "-o", file); exit != 0 {
		t.Fatalf("export: %s", errs)
	}
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	lines := bytes.SplitAfter(bytes.TrimSuffix(text, []byte("\n")), []byte("\n"))
	check := func(at int, line []byte) (remade, int) {
		t.Helper()
		all := slices.Clone(lines[:len(lines)-1])
		if at >= 0 {
			all[at] = line
		}
		events := 0
		for _, l := range all {
			if bytes.HasPrefix(l, []byte(`{"event":`)) {
				events++
			}
		}
		body := bytes.Join(all, nil)
		sum := sha256.Sum256(body)
		end := fmt.Sprintf(`{"end":{"events":%d,"sha256":"%s"}}`+"\n", events, hex.EncodeToString(sum[:]))
		if err := os.WriteFile(file, append(body, end...), 0o600); err != nil {
			t.Fatal(err)
		}
		return remake(t, g, "--from", file)
	}
	// All that is wrong with it then is that nobody has signed its end.
	if v, exit := check(-1, nil); exit != 1 || len(v.Differences) != 1 || v.Differences[0].Field != "end" {
		t.Fatalf("as it is: exit %d, %+v", exit, v)
	}
	for at, line := range lines {
		if !bytes.HasPrefix(line, []byte(`{"event":`)) {
			continue
		}
		seq, what, changed, err := alter(line, chance)
		if err != nil {
			t.Fatal(err)
		}
		v, exit := check(at, changed)
		if exit != 1 || v.Verified || len(v.Differences) < 2 || what != "seq" && v.Differences[0].Seq != seq {
			t.Errorf("%s of event %d: exit %d, %+v\nwas %s\nis  %s", what, seq, exit, v.Differences, line, changed)
		}
	}
}

// alter changes one value in a line of an event, and says which.
func alter(line []byte, chance *rand.Rand) (seq uint64, what string, changed []byte, err error) {
	var l map[string]json.RawMessage
	if err := json.Unmarshal(line, &l); err != nil {
		return 0, "", nil, err
	}
	d := json.NewDecoder(bytes.NewReader(l["event"]))
	d.UseNumber()
	var event map[string]any
	if err := d.Decode(&event); err != nil {
		return 0, "", nil, err
	}
	n, _ := event["seq"].(json.Number)
	if seq, err = strconv.ParseUint(n.String(), 10, 64); err != nil {
		return 0, "", nil, err
	}
	type place struct {
		name string
		set  func()
	}
	var places []place
	var walk func(name string, v any, set func(any))
	walk = func(name string, v any, set func(any)) {
		switch v := v.(type) {
		case map[string]any:
			for _, k := range slices.Sorted(maps.Keys(v)) {
				walk(strings.TrimPrefix(name+"."+k, "."), v[k], func(to any) { v[k] = to })
			}
		case []any:
			for i := range v {
				walk(fmt.Sprintf("%s.%d", name, i), v[i], func(to any) { v[i] = to })
			}
		default:
			places = append(places, place{name, func() { set(another(v)) }})
		}
	}
	walk("", event, nil)
	if len(places) == 0 {
		return seq, "", nil, errors.New("an event that says nothing")
	}
	p := places[chance.IntN(len(places))]
	p.set()
	if l["event"], err = json.Marshal(event); err != nil {
		return seq, p.name, nil, err
	}
	changed, err = json.Marshal(l)
	return seq, p.name, append(changed, '\n'), err
}

// another is a value that is not v.
func another(v any) any {
	switch v := v.(type) {
	case bool:
		return !v
	case json.Number:
		n, err := v.Int64()
		if err != nil {
			return 7
		}
		return n + 1
	case string:
		first := "x"
		if strings.HasPrefix(v, first) {
			first = "y"
		}
		if v == "" {
			return first
		}
		return first + v[len(string([]rune(v)[:1])):]
	}
	return "x"
}
