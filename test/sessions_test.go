package test

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"waybill.dev/schemas"
	"waybill.dev/test/gateway"
	"waybill.dev/test/peers"
	"waybill.dev/test/upstream"
)

// The official peers of the revisions with sessions work through the gateway as
// they do without it, on the URL on which the newer ones work.
func TestLegacyPeersThroughTheGateway(t *testing.T) {
	t.Parallel() // it mostly waits
	g := gateway.Start(t, gateway.Config("servers:\n"+
		gateway.Server("conformance", peers.EverythingServer(t, "-stateless=false"), "")+
		gateway.Server("everything", peers.ServerEverything(t), "")+
		gateway.Native("mcp-go", peers.MCPGoServer(t), "")))
	t.Run("conformance", func(t *testing.T) { peers.ConformanceLegacy(t, g.URL+"/mcp/conformance") })
	t.Run("one server", func(t *testing.T) {
		peers.ExerciseLegacy(t, peers.Endpoint{URL: g.URL + "/mcp/everything"})
	})
	t.Run("a server by others", func(t *testing.T) {
		peers.ExerciseLegacy(t, peers.Endpoint{URL: g.URL + "/mcp/mcp-go", MCPGo: true})
	})
	for _, e := range g.Events() {
		if err := e.Check(); err != nil {
			t.Error(err)
		}
	}
	if err := g.Stop(); err != nil {
		t.Errorf("stopping: %v", err)
	}
}

// All servers at one URL, for the same peers.
func TestLegacyPeersThroughAllServers(t *testing.T) {
	t.Parallel() // it mostly waits
	g := gateway.Start(t, gateway.Config("servers:\n"+
		gateway.Server("everything", peers.ServerEverything(t), "")+
		gateway.Server("conformance", peers.EverythingServer(t, "-stateless=false"), "")))
	t.Run("all servers", func(t *testing.T) {
		peers.ExerciseLegacy(t, peers.Endpoint{URL: g.URL + "/mcp", Prefix: "everything__"})
	})
	if err := g.Stop(); err != nil {
		t.Errorf("stopping: %v", err)
	}
}

// A session outlives the gateway: it is in the log. The upstream's does too, and
// where that is lost, a new one takes its place, since a server that does not
// know the session has not carried out the call.
func TestSessionSurvives(t *testing.T) {
	u := upstream.Start(t)
	g := gateway.Start(t, gateway.Config("servers:\n"+gateway.Native("counting", u.URL, "")))
	end := peers.Endpoint{URL: g.URL + "/mcp/counting"}
	s, _, err := peers.OpenLegacy(t.Context(), end, "2025-11-25", struct{}{})
	if err != nil {
		t.Fatal(err)
	}
	count := func(key string) {
		t.Helper()
		result, err := s.Call(t.Context(), "tools/call", map[string]any{"name": "count", "arguments": upstream.Args{Key: key}})
		if err != nil || !strings.Contains(string(result), "count "+key+" for the 1. time") {
			t.Errorf("%s: %s %v", key, result, err)
		}
	}
	count("before")
	g.Kill()
	g.Restart()
	count("after the gateway was killed")
	// The edge counts what it has found in the log, and who listens.
	measured := func(sessions, streams int) {
		t.Helper()
		var metrics string
		if !becomes(within, func() bool {
			metrics = get(t, g.Admin+"/metrics")
			return strings.Contains(metrics, fmt.Sprintf("\nwaybill_edge_sessions %d\n", sessions)) && strings.Contains(metrics, fmt.Sprintf("\nwaybill_edge_streams %d\n", streams))
		}) {
			t.Errorf("not %d sessions and %d streams in\n%s", sessions, streams, metrics)
		}
	}
	measured(1, 0)
	stream, err := s.Listen(t.Context(), "")
	if err != nil {
		t.Fatal(err)
	}
	defer stream.Close()
	measured(1, 1)
	if n := u.Sessions(); n.Opened != 1 {
		t.Errorf("%d upstream sessions were opened, want 1", n.Opened)
	}
	u.Forget()
	count("after the upstream forgot")
	if n := u.Sessions(); n.Opened != 2 || n.Open != 1 {
		t.Errorf("%d upstream sessions were opened, %d are open, want 2 and 1", n.Opened, n.Open)
	}
	if status, err := s.Delete(t.Context()); err != nil || status >= 300 {
		t.Errorf("DELETE: %d %v", status, err)
	}
	if !becomes(within, func() bool { return u.Sessions().Open == 0 }) {
		t.Error("the upstream's session outlives the client's")
	}
	measured(0, 0)
	if _, err := s.Call(t.Context(), "tools/list", nil); err == nil || !strings.Contains(fmt.Sprint(err), "-32001") {
		t.Errorf("a session that was deleted: %v", err)
	}
	if got := len(u.Effects()); got != 3 {
		t.Errorf("%d effects, want 3", got)
	}
}

// What is asked in the middle of a call reaches the client, and the answer the
// server; both are in the log, and nobody else can answer.
func TestAsked(t *testing.T) {
	u := upstream.Start(t)
	g := gateway.Start(t, gateway.Config("servers:\n"+gateway.Native("counting", u.URL, "")))
	s, _, err := peers.OpenLegacy(t.Context(), peers.Endpoint{URL: g.URL + "/mcp/counting"}, "2025-11-25", map[string]any{"elicitation": struct{}{}})
	if err != nil {
		t.Fatal(err)
	}
	stream, err := s.Request(t.Context(), "tools/call", map[string]any{"name": "ask", "arguments": upstream.Args{Key: "k"}})
	if err != nil {
		t.Fatal(err)
	}
	_, asked, err := stream.Message()
	if err != nil || asked.Method != "elicitation/create" {
		t.Fatalf("asked %s %v", asked.Method, err)
	}
	other, _, err := peers.OpenLegacy(t.Context(), s.Endpoint, "2025-11-25", struct{}{})
	if err != nil {
		t.Fatal(err)
	}
	answer := func(by *peers.LegacySession, text string) int {
		t.Helper()
		status, err := by.Send(t.Context(), peers.Message{ID: asked.ID, Result: json.RawMessage(text)})
		if err != nil {
			t.Fatal(err)
		}
		return status
	}
	if status := answer(other, `{"action":"accept","content":{"name":"Mallory"}}`); status != http.StatusBadRequest {
		t.Errorf("another session's answer: HTTP %d", status)
	}
	if status := answer(s, `{"action":"accept","content":{"name":"Ada"},"unknown":1e400}`); status != http.StatusAccepted {
		t.Errorf("the answer: HTTP %d", status)
	}
	end, err := stream.Answer()
	if err != nil || end.Error != nil {
		t.Fatalf("%v %v", end.Error, err)
	}
	if text := string(end.Result); !strings.Contains(text, `Ada`) || !strings.Contains(text, "1e400") || strings.Contains(text, "Mallory") {
		t.Errorf("the server was told %s", text)
	}
	kinds := map[schemas.Kind]int{}
	for _, e := range g.Events() {
		kinds[e.Kind()]++
	}
	if kinds[schemas.KindAsked] != 1 || kinds[schemas.KindAnswered] != 1 {
		t.Errorf("the log has %v", kinds)
	}
}

// Sessions that were opened and ended leave nothing behind, and those that are
// held cost little. With WAYBILL_TEST_SESSIONS there are so many, three times over,
// and after each time 11 minutes pass, in which all that is kept of them for a while
// ages out. What the first time leaves is Go's own, of that many goroutines at once.
func TestManySessions(t *testing.T) {
	many, first, rounds, rest, more := 1000, 50, 1, time.Duration(0), ""
	if given := os.Getenv("WAYBILL_TEST_SESSIONS"); given != "" {
		var err error
		if many, err = strconv.Atoi(given); err != nil {
			t.Fatal("WAYBILL_TEST_SESSIONS:", err)
		}
		first, rounds, rest, more = many, 2, 11*time.Minute, ", session_max: 4m, session_idle: 3m}\nbus: {max_age: 5m"
	}
	u := upstream.Start(t)
	g := gateway.Start(t, gateway.Config("servers:\n"+gateway.Native("counting", u.URL, "")+
		fmt.Sprintf("limits: {sessions_per_agent: %d, sessions_per_tenant: %[1]d, streams: %[1]d, streams_per_tenant: %[1]d", 2*many)+more+"}\n"))
	end := peers.Endpoint{URL: g.URL + "/mcp/counting"}
	round := func(n int, do func([]*peers.LegacySession)) (footprint, int) {
		hold(t, end, n, do)
		<-time.After(rest)
		now, fds := measure(t, g), descriptors(t, g)
		t.Logf("after %d sessions were opened and ended: %d B alive, %d goroutines, %d descriptors", n, now.alive, now.count(), fds)
		return now, fds
	}
	before, fds := round(first, func([]*peers.LegacySession) {}) // what is made once
	for range rounds {
		round(many, func(held []*peers.LegacySession) {
			now := measure(t, g)
			t.Logf("%d sessions held: %d B each alive, %d B resident, %.1f goroutines, %.1f descriptors", len(held),
				(now.alive-before.alive)/many, (now.resident-before.resident)/many, float64(now.count()-before.count())/float64(many), float64(descriptors(t, g)-fds)/float64(many))
		})
	}
	before.compare(t, g)
	if !becomes(within, func() bool { return descriptors(t, g) <= fds+20 }) {
		t.Errorf("%d descriptors, before there were %d", descriptors(t, g), fds)
	}
	if n := u.Sessions(); n.Open != 0 {
		t.Errorf("%d upstream sessions are open", n.Open)
	}
}

// hold opens sessions, gives them to do, and ends them.
func hold(t *testing.T, end peers.Endpoint, n int, do func([]*peers.LegacySession)) {
	t.Helper()
	transport := &http.Transport{MaxIdleConnsPerHost: 32}
	defer transport.CloseIdleConnections()
	client := &http.Client{Transport: transport}
	held := make([]*peers.LegacySession, n)
	each := func(do func(context.Context, int) error) {
		t.Helper()
		var next atomic.Int64
		var workers sync.WaitGroup
		for range 32 {
			workers.Go(func() {
				for i := int(next.Add(1)) - 1; i < n && !t.Failed(); i = int(next.Add(1)) - 1 {
					if err := do(t.Context(), i); err != nil {
						t.Errorf("session %d of %d: %v", i, n, err)
					}
				}
			})
		}
		workers.Wait()
	}
	each(func(ctx context.Context, i int) (err error) {
		held[i], _, err = peers.OpenLegacy(ctx, end, "2025-11-25", struct{}{})
		if err == nil {
			held[i].Client = client
		}
		return err
	})
	if t.Failed() {
		return
	}
	do(held)
	each(func(ctx context.Context, i int) error {
		status, err := held[i].Delete(ctx)
		if err == nil && status >= 300 {
			err = fmt.Errorf("DELETE: HTTP %d", status)
		}
		return err
	})
}

// descriptors is how many the gateway's process has open; 0 where the system
// does not say.
func descriptors(t *testing.T, g *gateway.Gateway) int {
	t.Helper()
	open, err := os.ReadDir(filepath.Join("/proc", fmt.Sprint(g.Pid()), "fd"))
	if err != nil {
		t.Logf("descriptors are not counted: %v", err)
	}
	return len(open)
}
