package test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/nats-io/nats.go"

	"waybill.dev/bus"
	"waybill.dev/schemas"
	"waybill.dev/test/gateway"
	"waybill.dev/test/peers"
	"waybill.dev/test/upstream"
)

// cluster is three NATS servers, each a process with a store of its own.
type cluster struct {
	t     testing.TB
	addrs []string // for clients
	env   [][]string
	nodes []*peers.Process
}

func startCluster(t testing.TB) *cluster {
	t.Helper()
	c := &cluster{t: t, nodes: make([]*peers.Process, 3)}
	var routes []string
	for range c.nodes {
		c.addrs = append(c.addrs, gateway.FreeAddr(t))
		routes = append(routes, gateway.FreeAddr(t))
	}
	for i := range c.nodes {
		c.env = append(c.env, []string{
			envNATS + "=" + c.addrs[i], envNATSDir + "=" + t.TempDir(),
			fmt.Sprintf("%s=n%d %s %s", envNATSCluster, i, routes[i], strings.Join(routes, " ")),
		})
		c.start(i)
	}
	for i := range c.nodes {
		c.listens(i)
	}
	return c
}

func (c *cluster) start(i int) { c.nodes[i] = gateway.Child(c.t, "nats", c.env[i]...) }

func (c *cluster) listens(i int) {
	c.t.Helper()
	if _, err := c.nodes[i].Await(c.t.Context(), "nats listens"); err != nil {
		c.t.Fatal(err)
	}
}

// url names all nodes.
func (c *cluster) url() string { return "nats://" + strings.Join(c.addrs, ",nats://") }

// leader is the node that leads the stream of events, once there is one and the
// others have all that it has.
func (c *cluster) leader() int {
	c.t.Helper()
	js, closing := streams(c.t, c.url(), nats.MaxReconnects(-1), nats.ReconnectWait(100*time.Millisecond))
	defer closing()
	leader, last := -1, ""
	if !becomes(within, func() bool {
		ctx, cancel := context.WithTimeout(c.t.Context(), time.Second)
		defer cancel()
		s, err := js.Stream(ctx, "EVENTS")
		if err != nil {
			last = err.Error()
			return false
		}
		in := s.CachedInfo().Cluster
		current := 0
		for _, r := range in.Replicas {
			if r.Current && !r.Offline {
				current++
			}
		}
		last = fmt.Sprintf("%+v", in)
		_, err = fmt.Sscanf(in.Leader, "n%d", &leader)
		return err == nil && current == 2
	}) {
		c.t.Fatalf("the cluster is not whole: %s", last)
	}
	return leader
}

// balancer is an http.RoundTripper that sends each request to another replica
// than the last, and one that cannot be sent there to the next, as a load
// balancer in front of the replicas does.
type balancer struct {
	gates []*gateway.Gateway
	inner http.RoundTripper
	turn  atomic.Int64
}

func (b *balancer) RoundTrip(r *http.Request) (*http.Response, error) {
	first := int(b.turn.Add(1))
	for i := 0; ; i++ {
		to := r.Clone(r.Context())
		to.URL.Host = strings.TrimPrefix(b.gates[(first+i)%len(b.gates)].URL, "http://")
		to.Host = to.URL.Host
		if r.GetBody != nil {
			var err error
			if to.Body, err = r.GetBody(); err != nil {
				return nil, err
			}
		}
		resp, err := b.inner.RoundTrip(to)
		// Refused: nothing was sent.
		if err == nil || i+1 == len(b.gates) || !isDial(err) {
			return resp, err
		}
	}
}

func isDial(err error) bool {
	op := new(net.OpError)
	return errors.As(err, &op) && op.Op == "dial"
}

// trip is what one client does in one session.
type trip struct {
	server string
	call   aTool // answers at once
	asks   aTool // elicits within the call
	slow   aTool // reports progress, then answers
	// endless is slow for longer than anybody waits, to be taken back; its first
	// message comes soon.
	endless aTool
	// notify makes the server say 10 numbered messages on the GET stream.
	notify *aTool
	answer string // to what it elicits
}

// aTool is a tools/call and what its answer has in it. KEY stands for what is
// new in each session.
type aTool struct {
	name, args, want string
}

var trips = []trip{
	{
		server: "counting", call: aTool{"count", `{"key":"KEY call"}`, "count KEY call for the "},
		asks: aTool{"ask", `{"key":"KEY"}`, "Ada"}, slow: aTool{"count", `{"key":"KEY slow","progress":20,"wait":600}`, "count KEY slow for the "},
		endless: aTool{"count", `{"key":"KEY endless","progress":100,"wait":20000}`, ""},
		notify:  &aTool{"notify", `{"key":"KEY","progress":10,"wait":200}`, "notify KEY"},
		answer:  `{"action":"accept","content":{"name":"Ada"}}`,
	},
	{
		server: "everything", call: aTool{"echo", `{"message":"KEY"}`, "Echo: KEY"},
		asks: aTool{"trigger-elicitation-request", `{}`, "Ada"}, slow: aTool{"trigger-long-running-operation", `{"duration":0.6,"steps":10}`, "completed"},
		endless: aTool{"trigger-long-running-operation", `{"duration":60,"steps":300}`, ""},
		answer:  `{"action":"accept","content":{"name":"Ada","check":true}}`,
	},
	{
		server: "conformance", call: aTool{"test_simple_text", `{}`, "simple text response"},
		asks: aTool{"test_elicitation", `{"message":"who?"}`, "accept"}, slow: aTool{"test_tool_with_progress", `{}`, `"result"`},
		answer: `{"action":"accept","content":{"username":"Ada","email":"ada@example.org"}}`,
	},
}

// traveller takes trips.
type traveller struct {
	t     *testing.T
	gates []*gateway.Gateway
	// rough: replicas and log may be killed meanwhile, so that a call may end
	// without an answer and is made again, as its client would.
	rough bool
	again atomic.Int64 // calls that were made again
}

func (tr *traveller) travel(ctx context.Context, p trip, key string) error {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Minute)
	defer cancel()
	transport := &http.Transport{}
	defer transport.CloseIdleConnections()
	s := &peers.LegacySession{
		Endpoint: peers.Endpoint{URL: tr.gates[0].URL + "/mcp/" + p.server},
		Client:   &http.Client{Transport: &balancer{gates: tr.gates, inner: transport}},
	}
	step := func(what string, do func() error) error {
		for try := 1; ; try++ {
			err := do()
			if err == nil {
				return nil
			}
			if !tr.rough || try == 30 || ctx.Err() != nil {
				return fmt.Errorf("%s: %w", what, err)
			}
			tr.t.Logf("%s: %s, again: %v", key, what, err)
			tr.again.Add(1)
			select {
			case <-ctx.Done():
			case <-time.After(200 * time.Millisecond):
			}
		}
	}
	with := func(c aTool) map[string]any {
		return map[string]any{
			"name": c.name, "arguments": json.RawMessage(strings.ReplaceAll(c.args, "KEY", key)),
			"_meta": map[string]any{"progressToken": key},
		}
	}
	ends := func(c aTool, m peers.Message) error {
		if want := strings.ReplaceAll(c.want, "KEY", key); m.Error != nil || !strings.Contains(`"result":`+string(m.Result), want) {
			return fmt.Errorf("%s answered %s, error %v", c.name, m.Result, m.Error)
		}
		return nil
	}
	if err := step("initialize", func() error {
		s.ID, s.Revision = "", ""
		_, err := s.Open(ctx, "2025-11-25", map[string]any{"elicitation": struct{}{}})
		return err
	}); err != nil {
		return err
	}
	if err := step("list", func() error {
		list, err := s.Call(ctx, "tools/list", nil)
		if rpc := new(peers.RPCError); p.server == "counting" && errors.As(err, &rpc) && rpc.Code == -32601 {
			return nil // it has no lists
		}
		if err == nil && !strings.Contains(string(list), `"`+p.call.name+`"`) {
			err = fmt.Errorf("%s is not in %s", p.call.name, list)
		}
		return err
	}); err != nil {
		return err
	}
	if err := step("call", func() error {
		result, err := s.Call(ctx, "tools/call", with(p.call))
		if err != nil {
			return err
		}
		return ends(p.call, peers.Message{Result: result})
	}); err != nil {
		return err
	}

	// The GET stream, which is cut and resumed elsewhere all the time.
	var beside sync.WaitGroup
	defer beside.Wait()
	listening, hangUp := context.WithCancel(ctx)
	defer hangUp()
	heard := make(chan error, 1)
	notified := make(chan struct{})
	if p.notify != nil {
		stream, err := s.Listen(listening, "")
		if err == nil && stream.Status != http.StatusOK {
			err = fmt.Errorf("HTTP %d", stream.Status)
		}
		if err != nil && !tr.rough {
			return fmt.Errorf("GET stream: %w", err)
		}
		beside.Go(func() { heard <- tr.hear(listening, s, stream, key, notified) })
	}

	if err := step("elicitation", func() error {
		stream, err := s.Request(ctx, "tools/call", with(p.asks))
		if err != nil {
			return err
		}
		end, err := tr.toTheEnd(ctx, s, stream, 0, func(m peers.Message) error {
			if m.Method != "elicitation/create" {
				return nil
			}
			status, err := s.Send(ctx, peers.Message{ID: m.ID, Result: json.RawMessage(p.answer)})
			if err == nil && status != http.StatusAccepted {
				err = fmt.Errorf("the answer: HTTP %d", status)
			}
			return err
		})
		if err != nil {
			return err
		}
		return ends(p.asks, end)
	}); err != nil {
		return err
	}

	if err := step("cut", func() error {
		stream, err := s.Request(ctx, "tools/call", with(p.slow))
		if err != nil {
			return err
		}
		last := -1.0
		if p.server == "counting" {
			last = 0
		}
		end, err := tr.toTheEnd(ctx, s, stream, 400, func(m peers.Message) error {
			if m.Method != "notifications/progress" {
				return nil
			}
			var progress struct{ Progress float64 }
			if err := json.Unmarshal(m.Params, &progress); err != nil {
				return err
			}
			if p.server == "counting" && progress.Progress != last+1 && !(tr.rough && progress.Progress == 1) || progress.Progress <= last && !tr.rough {
				return fmt.Errorf("progress %v after %v", progress.Progress, last)
			}
			last = progress.Progress
			return nil
		})
		if err != nil {
			return err
		}
		return ends(p.slow, end)
	}); err != nil {
		return err
	}

	if p.endless.name != "" {
		if err := step("cancel", func() error {
			stream, err := s.Request(ctx, "tools/call", with(p.endless))
			if err != nil {
				return err
			}
			defer stream.Close()
			if _, _, err = stream.Message(); err != nil {
				return fmt.Errorf("first message: %w", err)
			}
			call := stream.Header.Get("Waybill-Call")
			status, err := s.Send(ctx, peers.Message{Method: "notifications/cancelled", Params: json.RawMessage(`{"requestId":` + string(stream.ID) + `}`)})
			if err != nil || status != http.StatusAccepted {
				return fmt.Errorf("cancelled: HTTP %d, %v", status, err)
			}
			at := time.Now()
			for err == nil {
				_, _, err = stream.Message()
			}
			if took := time.Since(at); took > 10*time.Second && !tr.rough {
				return fmt.Errorf("%s went on for %s after it was taken back", call, took)
			}
			return nil
		}); err != nil {
			return err
		}
	}
	if p.notify != nil {
		if err := step("notify", func() error {
			result, err := s.Call(ctx, "tools/call", with(*p.notify))
			if err != nil {
				return err
			}
			return ends(*p.notify, peers.Message{Result: result})
		}); err != nil {
			return err
		}
		close(notified)
		select {
		case err := <-heard:
			if err != nil {
				return fmt.Errorf("GET stream: %w", err)
			}
		case <-time.After(30 * time.Second):
			return errors.New("GET stream: not all was heard")
		}
		hangUp()
	}
	return step("close", func() error {
		status, err := s.Delete(ctx)
		if err == nil && status >= 300 && !(tr.rough && status == http.StatusNotFound) {
			err = fmt.Errorf("HTTP %d", status)
		}
		return err
	})
}

// toTheEnd reads a call's stream to its answer, and resumes it wherever it is
// cut. cut is after how many bytes it is cut on purpose, once; 0: never.
func (tr *traveller) toTheEnd(ctx context.Context, s *peers.LegacySession, stream *peers.LegacyStream, cut int64, take func(peers.Message) error) (peers.Message, error) {
	id, last := stream.ID, ""
	if cut > 0 {
		stream.CutAfter(cut)
	}
	for {
		_, m, err := stream.Message()
		if stream.LastID != "" {
			last = stream.LastID
		}
		switch {
		case err == nil && m.Method != "":
			if err := take(m); err != nil {
				return m, errors.Join(err, stream.Close())
			}
			continue
		case err == nil:
			if len(m.ID) > 0 && string(m.ID) != string(id) {
				err = fmt.Errorf("answer to %s", m.ID)
			}
			return m, errors.Join(err, stream.Close())
		}
		_ = stream.Close()
		if last == "" || ctx.Err() != nil {
			return m, fmt.Errorf("before the first event: HTTP %d, %w", stream.Status, err)
		}
		for try := 0; ; try++ {
			stream, err = s.Listen(ctx, last)
			if err == nil && stream.Status == http.StatusOK {
				break
			}
			if err == nil {
				err = fmt.Errorf("HTTP %d", stream.Status)
				_ = stream.Close()
			}
			if !tr.rough || try == 50 {
				return m, fmt.Errorf("resuming after %s: %w", last, err)
			}
			<-time.After(200 * time.Millisecond)
		}
	}
}

// hear reads 10 numbered messages from the session's GET stream, which it drops
// after each second one, to go on at the other replica.
func (tr *traveller) hear(ctx context.Context, s *peers.LegacySession, stream *peers.LegacyStream, key string, notified <-chan struct{}) error {
	last, next := "", 1
	for {
		for read := 0; stream != nil; {
			_, m, err := stream.Message()
			if stream.LastID != "" {
				last = stream.LastID
			}
			if err != nil {
				break
			}
			var p struct {
				Data struct {
					Key string
					N   int
				}
			}
			if err := json.Unmarshal(m.Params, &p); err != nil {
				return err
			}
			if p.Data.Key != key || p.Data.N != next && !(tr.rough && p.Data.N == 1) {
				return fmt.Errorf("message %d of %q, want %d of %q", p.Data.N, p.Data.Key, next, key)
			}
			if next = p.Data.N + 1; next == 11 {
				return stream.Close()
			}
			if read++; read == 2 {
				break
			}
		}
		if stream != nil {
			_ = stream.Close()
		}
		for {
			var err error
			stream, err = s.Listen(ctx, last)
			if err == nil && stream.Status == http.StatusOK {
				break
			}
			if err == nil {
				err = fmt.Errorf("HTTP %d", stream.Status)
				_ = stream.Close()
			}
			if ctx.Err() != nil || !tr.rough {
				return err
			}
			<-time.After(200 * time.Millisecond)
		}
	}
}

// all takes n trips to each server, a few at a time, and returns how many came
// to their end.
func (tr *traveller) all(name string, n int, meanwhile func(ctx context.Context, trips func() int64)) {
	tr.t.Helper()
	tr.take(name, n, trips, meanwhile)
}

// take is all for some of the servers.
func (tr *traveller) take(name string, n int, trips []trip, meanwhile func(ctx context.Context, trips func() int64)) {
	tr.t.Helper()
	var done, failed atomic.Int64
	next := atomic.Int64{}
	var clients sync.WaitGroup
	at := time.Now()
	for range 3 {
		clients.Go(func() {
			for i := int(next.Add(1)) - 1; i < n*len(trips); i = int(next.Add(1)) - 1 {
				key := fmt.Sprintf("%s-%d", name, i)
				if err := tr.travel(tr.t.Context(), trips[i%len(trips)], key); err != nil {
					failed.Add(1)
					tr.t.Errorf("%s, at %s: %v", key, trips[i%len(trips)].server, err)
					continue
				}
				done.Add(1)
			}
		})
	}
	if meanwhile != nil {
		ctx, stop := context.WithCancel(tr.t.Context())
		over := make(chan struct{})
		go func() { defer close(over); meanwhile(ctx, func() int64 { return done.Load() + failed.Load() }) }()
		clients.Wait()
		stop()
		<-over
	}
	clients.Wait()
	tr.t.Logf("%s: %d of %d trips to their end in %s, %d calls made again", name, done.Load(), n*len(trips), time.Since(at).Round(time.Millisecond), tr.again.Swap(0))
}

// Two replicas on three NATS nodes: whatever a client does may be done at
// either, while replicas and nodes are killed and come back.
func TestReplicas(t *testing.T) {
	c := startCluster(t)
	counting := upstream.Start(t)
	config := gateway.Config(fmt.Sprintf("bus: {url: %q, replicas: 3}\nservers:\n", c.url()) +
		gateway.Server("counting", counting.URL, "") +
		gateway.Server("everything", peers.ServerEverything(t), "") +
		gateway.Server("conformance", peers.EverythingServer(t, "-stateless=false"), ""))
	gates := []*gateway.Gateway{gateway.Start(t, config), gateway.Start(t, config)}
	tr := &traveller{t: t, gates: gates}
	const n = 5 // to each server, 15 in all
	tr.all("calm", n, nil)
	if t.Failed() {
		return
	}
	tr.rough = true
	tr.all("replica", n, func(ctx context.Context, trips func() int64) {
		for i := 0; ctx.Err() == nil && i < 4; i++ {
			g := gates[i%2]
			g.Kill()
			g.Restart()
			at := trips()
			becomes(within, func() bool { return ctx.Err() != nil || trips() > at })
		}
	})
	tr.all("node", n, func(ctx context.Context, trips func() int64) {
		for i := 0; ctx.Err() == nil && i < 3; i++ {
			at := trips()
			node := i
			if i != 1 {
				node = c.leader()
			}
			c.nodes[node].Kill()
			becomes(within, func() bool { return ctx.Err() != nil || trips() > at })
			c.start(node)
			c.listens(node)
			c.leader()
		}
	})
	oneEnding(t, gates[0])
}

// A server over stdio is a child of one of the replicas: what comes to another is
// carried out there, and when it dies the sessions begin anew elsewhere.
func TestReplicasStdio(t *testing.T) {
	t.Parallel() // it mostly waits
	addr := gateway.FreeAddr(t)
	server := gateway.Child(t, "nats", envNATS+"="+addr, envNATSDir+"="+t.TempDir())
	if _, err := server.Await(t.Context(), "nats listens"); err != nil {
		t.Fatal(err)
	}
	config := gateway.Config(fmt.Sprintf("bus: {url: \"nats://%s\", replicas: 1}\nservers:\n", addr) +
		gateway.Command("everything", peers.ServerEverythingCommand(t), ""))
	gates := []*gateway.Gateway{gateway.Start(t, config), gateway.Start(t, config)}
	tr := &traveller{t: t, gates: gates}
	tr.take("calm", 6, trips[1:2], nil)
	if t.Failed() {
		return
	}
	routed := 0
	for _, e := range gates[0].Events() {
		if e.Kind() == schemas.KindRouted {
			routed++
		}
	}
	if routed == 0 {
		t.Error("no call was handed to the replica that has the process")
	}
	tr.rough = true
	tr.take("killed", 6, trips[1:2], func(ctx context.Context, trips func() int64) {
		for _, g := range gates {
			g.Kill()
			g.Restart()
			at := trips()
			becomes(within, func() bool { return ctx.Err() != nil || trips() > at })
		}
	})
	oneEnding(t, gates[0])
}

// Each role in processes of its own, of which any may be killed and come back.
func TestRolesApart(t *testing.T) {
	t.Parallel() // it mostly waits
	addr := gateway.FreeAddr(t)
	server := gateway.Child(t, "nats", envNATS+"="+addr, envNATSDir+"="+t.TempDir())
	if _, err := server.Await(t.Context(), "nats listens"); err != nil {
		t.Fatal(err)
	}
	counting := upstream.Start(t)
	config := gateway.Config(fmt.Sprintf("bus: {url: \"nats://%s\", replicas: 1}\nservers:\n", addr) +
		gateway.Server("counting", counting.URL, "") +
		gateway.Server("everything", peers.ServerEverything(t), "") +
		gateway.Server("conformance", peers.EverythingServer(t, "-stateless=false"), ""))
	edges := []*gateway.Gateway{gateway.Start(t, config, gateway.Roles("edge")), gateway.Start(t, config, gateway.Roles("edge"))}
	workers := []*gateway.Gateway{
		gateway.Start(t, config, gateway.Roles("policy")),
		gateway.Start(t, config, gateway.Roles("dispatch")), gateway.Start(t, config, gateway.Roles("dispatch")),
	}
	tr := &traveller{t: t, gates: edges}
	tr.all("calm", 3, nil)
	if t.Failed() {
		return
	}
	tr.rough = true
	tr.all("killed", 5, func(ctx context.Context, trips func() int64) {
		for _, g := range append(workers, edges...) {
			if ctx.Err() != nil {
				return
			}
			g.Kill()
			g.Restart()
			at := trips()
			becomes(within, func() bool { return ctx.Err() != nil || trips() > at })
		}
	})
	oneEnding(t, edges[0])
}

// The replica that listens to a server for a session stops, is killed, or stands
// still and comes back: the other takes over, and the client hears each message
// once.
func TestTakeOver(t *testing.T) {
	for _, c := range []struct {
		name  string
		leave func(*gateway.Gateway)
		most  time.Duration
	}{
		{"stopped", func(g *gateway.Gateway) { _ = g.Stop() }, 5 * time.Second},
		{"killed", func(g *gateway.Gateway) { g.Kill() }, 25 * time.Second},
		{"paused", func(g *gateway.Gateway) { _ = syscall.Kill(g.Pid(), syscall.SIGSTOP) }, 25 * time.Second},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			addr := gateway.FreeAddr(t)
			server := gateway.Child(t, "nats", envNATS+"="+addr, envNATSDir+"="+t.TempDir())
			if _, err := server.Await(t.Context(), "nats listens"); err != nil {
				t.Fatal(err)
			}
			u := upstream.Start(t)
			config := gateway.Config(fmt.Sprintf("bus: {url: \"nats://%s\", replicas: 1}\nservers:\n", addr) + gateway.Server("counting", u.URL, ""))
			first := gateway.Start(t, config)
			s, _, err := peers.OpenLegacy(t.Context(), peers.Endpoint{URL: first.URL + "/mcp/counting"}, "2025-11-25", struct{}{})
			if err != nil {
				t.Fatal(err)
			}
			notify := func(key string, n int) {
				t.Helper()
				if _, err := s.Call(t.Context(), "tools/call", map[string]any{"name": "notify", "arguments": upstream.Args{Key: key, Progress: n}}); err != nil {
					t.Errorf("%s: %v", key, err)
				}
			}
			notify("before", 3)
			second := gateway.Start(t, config)
			s.Endpoint.URL = second.URL + "/mcp/counting"
			stream, err := s.Listen(t.Context(), "")
			if err != nil {
				t.Fatal(err)
			}
			defer func() { _ = stream.Close() }()
			hear := func(key string, n int) {
				t.Helper()
				for i := range n {
					_, m, err := stream.Message()
					if want := fmt.Sprintf(`"key":%q,"n":%d}`, key, i+1); err != nil || !strings.Contains(string(m.Params), want) {
						t.Fatalf("heard %s, %v; want %s", m.Params, err, want)
					}
				}
			}
			hear("before", 3)
			c.leave(first)
			at := time.Now()
			notify("meanwhile", 5)
			hear("meanwhile", 5)
			took := time.Since(at)
			t.Logf("%s: the other listened after %s", c.name, took.Round(10*time.Millisecond))
			if took > c.most*slowdown {
				t.Errorf("it took %s", took)
			}
			if c.name == "paused" {
				if err := syscall.Kill(first.Pid(), syscall.SIGCONT); err != nil {
					t.Fatal(err)
				}
				ready := func() bool {
					a, err := (&http.Client{Timeout: time.Second}).Get(first.Admin + "/readyz")
					if err != nil {
						return false
					}
					_ = a.Body.Close()
					return a.StatusCode == http.StatusOK
				}
				if !becomes(within, ready) {
					t.Error("it is not ready again")
				}
			}
			notify("after", 5)
			hear("after", 5)
			oneEnding(t, second)
		})
	}
}

// oneEnding checks that each call in the log has one ending.
func oneEnding(t *testing.T, g *gateway.Gateway) {
	t.Helper()
	endings := map[schemas.CallID]int{}
	var open []schemas.CallID
	if !becomes(within, func() bool {
		clear(endings)
		open = nil
		for _, e := range g.Events() {
			if e.Kind() == schemas.KindRequested {
				endings[e.Call] += 0
			} else if e.Kind().Ends() {
				endings[e.Call]++
			}
		}
		for id, n := range endings {
			if n == 0 {
				open = append(open, id)
			}
		}
		return len(open) == 0
	}) {
		t.Errorf("%d of %d calls have no ending: %v", len(open), len(endings), open)
	}
	for id, n := range endings {
		if n > 1 {
			t.Errorf("call %s has %d endings", id, n)
		}
	}
}

// What replicas cost: an event stored, and something owned and given up, in one
// NATS server and in three.
func BenchmarkCluster(b *testing.B) {
	for _, replicas := range []int{1, 3} {
		b.Run(fmt.Sprintf("R%d", replicas), func(b *testing.B) {
			url := ""
			if replicas == 3 {
				url = startCluster(b).url()
			} else {
				addr := gateway.FreeAddr(b)
				p := gateway.Child(b, "nats", envNATS+"="+addr, envNATSDir+"="+b.TempDir())
				if _, err := p.Await(b.Context(), "nats listens"); err != nil {
					b.Fatal(err)
				}
				url = "nats://" + addr
			}
			o := bus.Options{Dial: bus.URL(url, ""), Role: bus.RoleDispatch, Replicas: replicas, Leases: true}
			if err := bus.Setup(b.Context(), o); err != nil {
				b.Fatal(err)
			}
			l, err := bus.Open(b.Context(), o)
			if err != nil {
				b.Fatal(err)
			}
			defer l.Close()
			b.Run("publish", func(b *testing.B) {
				body := make([]byte, 1024)
				for b.Loop() {
					call := schemas.NewCallID(time.Now())
					e := schemas.Event{Tenant: "acme", Session: "s", Agent: "a", Call: call, Root: call, Data: &schemas.Started{Attempt: 1, By: "me"}, Body: body}
					if _, err := l.Publish(b.Context(), e); err != nil {
						b.Fatal(err)
					}
				}
			})
			b.Run("latest", func(b *testing.B) {
				for b.Loop() {
					if _, err := l.Latest(b.Context(), "acme", "s", schemas.KindStarted); err != nil {
						b.Fatal(err)
					}
				}
			})
			leases, err := l.Leases(b.Context(), "bench")
			if err != nil {
				b.Fatal(err)
			}
			ctx, stop := context.WithCancel(b.Context())
			alive, over := make(chan bool, 8), make(chan error, 1)
			go func() {
				over <- leases.Run(ctx, func(up bool) { alive <- up }, func(context.Context, string) {})
			}()
			<-alive
			b.Run("acquire", func(b *testing.B) {
				n := 0
				for b.Loop() {
					n++
					if _, err := leases.Acquire(b.Context(), fmt.Sprintf("k%d", n)); err != nil {
						b.Fatal(err)
					}
				}
			})
			stop()
			if err := <-over; err != nil {
				b.Error(err)
			}
		})
	}
}
