package mcp_test

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"iter"
	"net/http"
	"strings"
	"testing"
	"time"

	"waybill.dev/edge/mcp"
	"waybill.dev/schemas"
)

// taskOptions are an adapter's with a front of the server s, where tasks are the
// gateway's.
func (m *memory) taskOptions() mcp.Options {
	o := m.options()
	o.TaskTime = time.Hour
	o.Fronts = []*schemas.Front{{Name: schemas.Gateway, Servers: []string{"s"}}}
	o.Task = func(_ context.Context, first schemas.Event) iter.Seq2[schemas.Event, error] {
		return func(yield func(schemas.Event, error) bool) {
			for _, e := range m.all() {
				if e.Seq > first.Seq && e.Call == first.Call && e.ToTask() && !yield(e, nil) {
					return
				}
			}
		}
	}
	o.Tasked = func(_ context.Context, t schemas.Tenant, after uint64) iter.Seq2[schemas.Event, error] {
		return func(yield func(schemas.Event, error) bool) {
			next, _ := m.since(after)
			for _, e := range next {
				if e.Tenant == t && e.Kind() == schemas.KindTasked && !yield(e, nil) {
					return
				}
			}
		}
	}
	return o
}

// about asks about a task and returns the result, or the error.
func (c *client) about(method, params string) (result, fault string) {
	c.t.Helper()
	res := c.do(c.t.Context(), "POST", "", `{"jsonrpc":"2.0","id":"q","method":"`+method+`","params":{`+params+`}}`)
	defer res.Body.Close()
	body, err := io.ReadAll(res.Body)
	var m struct {
		ID            string
		Result, Error json.RawMessage
	}
	if err == nil {
		err = json.Unmarshal(body, &m)
	}
	if err != nil || res.StatusCode != http.StatusOK || m.ID != "q" {
		c.t.Fatalf("%s: %d %v %s", method, res.StatusCode, err, body)
	}
	return string(m.Result), string(m.Error)
}

// The list of tasks has pages, in which each of the caller's is once, and nobody
// else's.
func TestCoreTasksAreListed(t *testing.T) {
	m := newMemory(t, func(ctx context.Context, e schemas.Event, emit schemas.Emit) error {
		return answering(initialized)(ctx, e, emit)
	})
	const n = 45
	_, ids := m.tasks(t, n)
	addr, _ := up(t, m.taskOptions())
	alice, bob := &client{t: t, addr: addr, token: "alice", path: "/mcp"}, &client{t: t, addr: addr, token: "bob", path: "/mcp"}
	for _, c := range []*client{alice, bob} {
		res := c.do(t.Context(), "POST", "", initialize)
		c.session, c.version = res.Header.Get("Mcp-Session-Id"), "2025-11-25"
		res.Body.Close()
	}
	var listed []string
	pages, cursor := 0, ""
	for {
		result, fault := alice.about("tasks/list", cursor)
		var page struct {
			Tasks      []struct{ TaskID, Status string }
			NextCursor string
		}
		if err := json.Unmarshal([]byte(result), &page); err != nil || fault != "" {
			t.Fatalf("%v %s %s", err, result, fault)
		}
		for _, task := range page.Tasks {
			listed = append(listed, fmt.Sprintf("%q", task.TaskID))
		}
		if pages++; page.NextCursor == "" {
			break
		}
		cursor = `"cursor":"` + page.NextCursor + `"`
	}
	if pages != 3 || strings.Join(listed, " ") != strings.Join(ids, " ") {
		t.Errorf("%d pages, listed %v", pages, listed)
	}
	if result, _ := bob.about("tasks/list", ""); result != `{"tasks":[]}` {
		t.Errorf("another's list: %s", result)
	}
	for _, bad := range []string{`"cursor":"-"`, `"cursor":7`, `"cursor":"` + strings.Repeat("z", 20) + `"`} {
		if _, fault := alice.about("tasks/list", bad); !strings.Contains(fault, "-32602") {
			t.Errorf("%s: %s", bad, fault)
		}
	}
	for _, method := range []string{"tasks/get", "tasks/result", "tasks/cancel"} {
		for _, params := range []string{`"taskId":` + ids[0], `"taskId":7`, `"x":1`, `"taskId":"` + strings.Repeat("9", 4000) + `"`} {
			if result, fault := bob.about(method, params); result != "" || !strings.Contains(fault, `"code":-32602,"message":"Task not found"`) {
				t.Errorf("%s %.40s by another: %s %s", method, params, result, fault)
			}
		}
	}
}

// What a task asks is put to the client where it waits for the result, once, and
// its answer is stored; a client that takes back that it waits has the task go on.
func TestCoreTaskAsks(t *testing.T) {
	m := newMemory(t, func(ctx context.Context, e schemas.Event, emit schemas.Emit) error {
		return answering(initialized)(ctx, e, emit)
	})
	first, ids := m.tasks(t, 1)
	say := func(p schemas.Payload, body string) {
		t.Helper()
		if _, err := m.store(t.Context(), first[0].Next(p, []byte(body)).Task()); err != nil {
			t.Fatal(err)
		}
	}
	target := first[0].Data.(*schemas.Tasked).Target
	say(&schemas.Tasked{Target: target, Index: 1, Status: "input_required", Round: 1},
		`{"jsonrpc":"2.0","id":"c0","result":{"resultType":"input_required","inputRequests":{"k/é":{"method":"elicitation/create","params":{"message":1E400}},"s":{"method":"sampling/createMessage"}}}}`)
	addr, _ := up(t, m.taskOptions())
	c := &client{t: t, addr: addr, token: "alice", path: "/mcp"}
	res := c.do(t.Context(), "POST", "", initialize)
	c.session, c.version = res.Header.Get("Mcp-Session-Id"), "2025-11-25"
	res.Body.Close()

	wait := func(id string) *listener {
		return c.listen("POST", "", `{"jsonrpc":"2.0","id":`+id+`,"method":"tasks/result","params":{"taskId":`+ids[0]+`}}`)
	}
	l := wait("1")
	asked := l.want(t, `"method":"elicitation/create","params":{"message":1E400,"_meta":{"io.modelcontextprotocol/related-task":{"taskId":`+ids[0]+`}}}`)
	l.want(t, `"method":"sampling/createMessage","params":{"_meta":{"io.modelcontextprotocol/related-task":{"taskId":`+ids[0]+`}}}`)
	var q struct{ ID string }
	if err := json.Unmarshal(asked.Data, &q); err != nil {
		t.Fatal(err)
	}
	post := func(body string, status int) {
		t.Helper()
		res := c.do(t.Context(), "POST", "", body)
		defer res.Body.Close()
		if b, _ := io.ReadAll(res.Body); res.StatusCode != status {
			t.Errorf("%s: %d %s", body, res.StatusCode, b)
		}
	}
	for _, bad := range []string{"task/", "task/x/y", "task/" + strings.Trim(ids[0], `"`) + "x/y"} {
		post(`{"jsonrpc":"2.0","id":"`+bad+`","result":{}}`, http.StatusBadRequest)
	}
	post(`{"jsonrpc":"2.0","id":"task/`+strings.Trim(ids[0], `"`)+`/00","result":{}}`, http.StatusAccepted) // asked no more, for all that is known
	for range 2 {
		post(`{"jsonrpc":"2.0","id":"`+q.ID+`","result":{"action":"accept","n":1E400}}`, http.StatusAccepted)
	}
	if n := kinds(m, schemas.KindAnswered); n != 1 {
		t.Errorf("%d answers", n)
	}
	for _, e := range m.all() {
		if e.Kind() == schemas.KindAnswered && (!e.ToTask() || !strings.Contains(string(e.Body), `"inputResponses":{"1.k/é":{"action":"accept","n":1E400}}`)) {
			t.Errorf("answered %s", e.Body)
		}
	}
	post(`{"jsonrpc":"2.0","method":"notifications/cancelled","params":{"requestId":1}}`, http.StatusAccepted)
	l.ends(t)
	if n := kinds(m, schemas.KindCancel); n != 0 {
		t.Errorf("%d wishes to cancel", n)
	}

	// An error in answer to what has no other answer ends the task.
	l = wait("2")
	asked = l.want(t, `"method":"sampling/createMessage"`)
	if err := json.Unmarshal(asked.Data, &q); err != nil {
		t.Fatal(err)
	}
	post(`{"jsonrpc":"2.0","id":"`+q.ID+`","error":{"code":-1,"message":"no"}}`, http.StatusAccepted)
	if n := kinds(m, schemas.KindCancel); n != 1 {
		t.Errorf("%d wishes to cancel", n)
	}
	say(&schemas.Cancelled{}, "")
	l.want(t, `"id":2,"error":{"code":-32603`)
	l.ends(t)
	if _, fault := c.about("tasks/cancel", `"taskId":`+ids[0]); !strings.Contains(fault, "-32602") {
		t.Errorf("cancelled again: %s", fault)
	}
}
