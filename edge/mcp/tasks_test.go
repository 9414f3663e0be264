package mcp_test

import (
	"context"
	"fmt"
	"io"
	"iter"
	"net/http"
	"strconv"
	"strings"
	"testing"

	"waybill.dev/schemas"
)

// tasks are calls of alice's that have become tasks in this log.
func (m *memory) tasks(t *testing.T, n int) (first []schemas.Event, ids []string) {
	t.Helper()
	for i := range n {
		call := schemas.CallID(fmt.Sprint("c", i))
		e := schemas.Event{
			Tenant: "acme", Session: "s1", Call: call, Root: call, Agent: "alice",
			Data: &schemas.Tasked{Target: schemas.Target{Protocol: "mcp", Server: "s", Method: "tools/call"}, Status: "working"},
		}
		r, err := m.store(t.Context(), e)
		if err != nil {
			t.Fatal(err)
		}
		first, ids = append(first, e), append(ids, fmt.Sprintf("%q", string(call)+"-"+strconv.FormatUint(r.Seq, 36)))
	}
	return first, ids
}

// subscribe listens to tasks, as alice or another.
func subscribe(t *testing.T, ctx context.Context, addr, who string, ids []string) *http.Response {
	t.Helper()
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://"+addr+"/mcp/s", strings.NewReader(
		`{"jsonrpc":"2.0","id":"L","method":"subscriptions/listen","params":{"notifications":{"taskIds":[`+strings.Join(ids, ",")+`]},`+
			`"_meta":{"io.modelcontextprotocol/protocolVersion":"2026-07-28","io.modelcontextprotocol/clientCapabilities":{"extensions":{"io.modelcontextprotocol/tasks":{}}}}}}`))
	if err != nil {
		t.Fatal(err)
	}
	for name, v := range map[string]string{
		"Authorization": "Bearer " + who, "Content-Type": "application/json", "Accept": "application/json, text/event-stream",
		"Mcp-Protocol-Version": "2026-07-28", "Mcp-Method": "subscriptions/listen",
	} {
		req.Header.Set(name, v)
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { resp.Body.Close() })
	return resp
}

// A subscription to tasks alone is told how each ends, and ends with the last.
func TestTaskSubscriptionEnds(t *testing.T) {
	m := newMemory(t, nil)
	o := m.options()
	o.Task = func(context.Context, schemas.Event) iter.Seq2[schemas.Event, error] {
		return func(func(schemas.Event, error) bool) {}
	}
	addr, _ := up(t, o)
	first, ids := m.tasks(t, 2)
	resp := subscribe(t, t.Context(), addr, "alice", ids)
	for _, e := range first {
		if _, err := m.store(t.Context(), e.Next(&schemas.Cancelled{Reason: "enough"}, nil).Task()); err != nil {
			t.Fatal(err)
		}
	}
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	if got := string(b); strings.Count(got, `"status":"cancelled"`) != 2 || !strings.HasSuffix(strings.TrimSpace(got), `"resultType":"complete","_meta":{"io.modelcontextprotocol/subscriptionId":"L"}}}`) {
		t.Errorf("told %s", got)
	}
}

// One tenant has no more readers of the log than so many, and has them again when
// its subscriptions have ended.
func TestTaskSubscriptionsBound(t *testing.T) {
	m := newMemory(t, nil)
	o := m.options()
	o.Task = func(context.Context, schemas.Event) iter.Seq2[schemas.Event, error] {
		return func(func(schemas.Event, error) bool) {}
	}
	addr, _ := up(t, o)
	_, ids := m.tasks(t, 64)
	var leave context.CancelFunc
	for range 1024 / 64 {
		var ctx context.Context
		ctx, leave = context.WithCancel(t.Context())
		defer leave()
		if resp := subscribe(t, ctx, addr, "alice", ids); resp.StatusCode != http.StatusOK {
			t.Fatal(resp.Status)
		}
	}
	if resp := subscribe(t, t.Context(), addr, "alice", ids[:1]); resp.StatusCode != http.StatusServiceUnavailable || resp.Header.Get("Retry-After") == "" {
		t.Errorf("one more: %s %v", resp.Status, resp.Header)
	}
	leave()
	for range 1000 { // the server notices that the client has left when it does
		resp := subscribe(t, t.Context(), addr, "alice", ids[:1])
		resp.Body.Close()
		if resp.StatusCode == http.StatusOK {
			return
		}
	}
	t.Error("what has ended counts for ever")
}
