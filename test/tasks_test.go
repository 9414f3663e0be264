package test

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"net/http"
	"strings"
	"testing"
	"time"

	"waybill.dev/test/gateway"
	"waybill.dev/test/peers"
	"waybill.dev/test/upstream"
)

// The suite's scenarios for tasks, through the gateway in front of a server that
// has the extension; and in front of that server, so that a fault is its own.
func TestTasksConformance(t *testing.T) {
	t.Parallel() // the suite mostly waits
	url, _ := upstream.StartTasks(t, true)
	t.Run("direct", func(t *testing.T) {
		t.Parallel()
		peers.ConformanceTasks(t, url)
	})
	g := gateway.Start(t, gateway.Config("servers:\n"+gateway.Server("tasks", url, "")))
	t.Run("gateway", func(t *testing.T) {
		t.Parallel()
		peers.ConformanceTasks(t, g.URL+"/mcp/tasks")
	})
}

// taker is a client that takes tasks for answers. It keeps all that it was told.
type taker struct {
	t      *testing.T
	g      *gateway.Gateway // may be changed between requests
	path   string
	header []string
	heard  *bytes.Buffer
}

func newTaker(t *testing.T, g *gateway.Gateway, path string, header ...string) *taker {
	return &taker{t, g, path, header, &bytes.Buffer{}}
}

const taskMeta = `"_meta":{"io.modelcontextprotocol/protocolVersion":"2026-07-28","io.modelcontextprotocol/clientCapabilities":{"elicitation":{},"extensions":{"io.modelcontextprotocol/tasks":{}}}}`

type taskAnswer struct {
	ResultType, TaskID, Status, StatusMessage string
	TTLMs, PollIntervalMs                     int64
	InputRequests                             map[string]json.RawMessage
	Result                                    struct{ Content []struct{ Text string } }
	Content                                   []struct{ Text string }
	Error                                     *struct {
		Code    int
		Message string
		Data    struct{ Waybill struct{ Code string } }
	}
}

func (a taskAnswer) text() string {
	if len(a.Result.Content) == 0 {
		return ""
	}
	return a.Result.Content[0].Text
}

// ask makes a request; params are members.
func (c *taker) ask(method, name, params string) (taskAnswer, []byte) {
	c.t.Helper()
	a, err := c.g.Post(c.t.Context(), c.path, method, name,
		`{"jsonrpc":"2.0","id":7,"method":"`+method+`","params":{`+params+`,`+taskMeta+`}}`, c.header...)
	if err != nil {
		c.t.Fatal(err)
	}
	c.heard.Write(a.Body)
	body := a.Body
	if i := bytes.Index(body, []byte("data: {")); i >= 0 { // it took long enough to become a stream
		body = bytes.TrimSpace(body[i+len("data: "):])
	}
	var m struct {
		Result taskAnswer
		Error  *struct {
			Code    int
			Message string
			Data    struct{ Waybill struct{ Code string } }
		}
	}
	if err := json.Unmarshal(body, &m); err != nil {
		c.t.Fatalf("%s: %v: %s", method, err, a.Body)
	}
	if m.Error != nil {
		m.Result.Error = m.Error
	}
	return m.Result, a.Body
}

// begin calls a tool that must become a task.
func (c *taker) begin(tool, args string) string {
	c.t.Helper()
	a, body := c.ask("tools/call", tool, `"name":"`+tool+`","arguments":`+args)
	if a.ResultType != "task" || a.TaskID == "" || a.Status != "working" || a.TTLMs != 3_600_000 || a.PollIntervalMs <= 0 {
		c.t.Fatalf("%s is no task: %s", tool, body)
	}
	return a.TaskID
}

func (c *taker) get(id string) (taskAnswer, []byte) {
	c.t.Helper()
	return c.ask("tasks/get", id, `"taskId":"`+id+`"`)
}

// until asks until the task is what it is awaited to be, or has ended.
func (c *taker) until(id, status string) taskAnswer {
	c.t.Helper()
	ctx, cancel := context.WithTimeout(c.t.Context(), time.Minute)
	defer cancel()
	again := time.NewTicker(50 * time.Millisecond)
	defer again.Stop()
	for {
		a, body := c.get(id)
		switch {
		case a.Status == status:
			return a
		case a.Status != "working" && a.Status != "input_required":
			c.t.Fatalf("awaiting %s: %s", status, body)
		}
		select {
		case <-again.C:
		case <-ctx.Done():
			c.t.Fatalf("awaiting %s: %s", status, body)
		}
	}
}

func (c *taker) answer(id, key, content string) {
	c.t.Helper()
	a, body := c.ask("tasks/update", id, fmt.Sprintf(`"taskId":%q,"inputResponses":{%q:{"action":"accept","content":%s}}`, id, key, content))
	if a.ResultType != "complete" {
		c.t.Fatalf("tasks/update: %s", body)
	}
}

// ofTask is what the log has of a task's call, one word an event.
func ofTask(g *gateway.Gateway, id string) (kinds []string) {
	call, _, _ := strings.Cut(id, "-")
	for _, e := range g.Events() {
		if string(e.Call) == call {
			kinds = append(kinds, string(e.Kind()))
		}
	}
	return kinds
}

func called(p *peers.Process, line string) int { return strings.Count(p.Output(), line) }

// A task of the server's own: the gateway is killed in the middle, and stopped, and
// goes on with it; the server was called once, and its name for the task stays here.
func TestTaskOfTheServerSurvives(t *testing.T) {
	url, up := upstream.StartTasks(t, true)
	g := gateway.Start(t, gateway.Config("servers:\n"+gateway.Server("tasks", url, "")))
	c := newTaker(t, g, "tasks")

	id := c.begin("slow_compute", `{"seconds":4,"label":"one"}`)
	both := c.begin("multi_input", `{}`)
	if a := c.until(both, "input_required"); len(a.InputRequests) != 2 {
		t.Errorf("asks %v", a.InputRequests)
	}
	g.Kill()
	g.Restart()
	if a, body := c.get(id); a.Status != "working" {
		t.Errorf("after the first kill: %s", body)
	}
	c.answer(both, "second", `{"n":2}`)
	if a, body := c.get(both); len(a.InputRequests) != 1 || a.InputRequests["first"] == nil || a.Status != "input_required" {
		t.Errorf("half answered: %s", body)
	}
	// Stopped in order, it does not wait for tasks that another can go on with.
	began := time.Now()
	if err := g.Stop(); err != nil || time.Since(began) > 8*time.Second {
		t.Errorf("stopped after %s: %v", time.Since(began), err)
	}
	g.Restart()
	c.answer(both, "first", `{"n":1}`)
	if a := c.until(id, "completed"); a.text() != "computed one" {
		t.Errorf("completed with %q", a.text())
	}
	if a := c.until(both, "completed"); a.text() != " map[first:map[n:1] second:map[n:2]]" {
		t.Errorf("completed with %q", a.text())
	}
	if n := called(up, "tools/call slow_compute"); n != 1 {
		t.Errorf("the server was called %d times", n)
	}
	if strings.Contains(c.heard.String(), "upstream-task") {
		t.Errorf("the server's name of a task is told: %s", c.heard)
	}
	if kinds := ofTask(g, id); strings.Join(kinds, " ") != "requested authorized started tasked completed" {
		t.Errorf("history: %v", kinds)
	}

	// To cancel is a wish that goes on to the server.
	id = c.begin("slow_compute", `{"seconds":60,"label":"two"}`)
	if a, body := c.ask("tasks/cancel", id, `"taskId":"`+id+`"`); a.ResultType != "complete" {
		t.Errorf("tasks/cancel: %s", body)
	}
	c.until(id, "cancelled")
	if called(up, "tasks/cancel upstream-task") != 1 {
		t.Error("the server was not told to cancel")
	}

	// Who has not declared the extension has no task and cannot ask for one.
	a, err := g.Post(t.Context(), "tasks", "tasks/get", id, `{"jsonrpc":"2.0","id":7,"method":"tasks/get","params":{"taskId":"`+id+`",`+gateway.Meta+`}}`)
	if err != nil || a.Status != 400 || !strings.Contains(string(a.Body), "-32021") {
		t.Errorf("not declared: %d %s %v", a.Status, a.Body, err)
	}
	// The front shows the same.
	f := newTaker(t, g, "waybill") // another name of /mcp
	if a := f.until(id, "cancelled"); a.TaskID != id {
		t.Errorf("at the front: %+v", a)
	}
	id = f.begin("tasks__slow_compute", `{"seconds":1,"label":"three"}`)
	f.until(id, "completed")
}

// Tools of a server without the extension become tasks when they take long.
func TestTaskOfTheGateway(t *testing.T) {
	url, up := upstream.StartTasks(t, false)
	config := "limits: {task_patience: 300ms}\nservers:\n" +
		gateway.Server("tasks", url, "tasks: ['*'], concurrency: 2") +
		gateway.Server("again", url, "tasks: [slow_compute], idempotent: [slow_compute]")
	g := gateway.Start(t, gateway.Config(config))
	c, again := newTaker(t, g, "tasks"), newTaker(t, g, "again")

	discover, err := g.Post(t.Context(), "tasks", "server/discover", "", `{"jsonrpc":"2.0","id":7,"method":"server/discover","params":{`+gateway.Meta+`}}`)
	if err != nil || !strings.Contains(string(discover.Body), `"extensions":{"io.modelcontextprotocol/tasks":{}}`) {
		t.Errorf("server/discover: %s %v", discover.Body, err)
	}

	// Soon enough, it is no task.
	if a, body := c.ask("tools/call", "slow_compute", `"name":"slow_compute","arguments":{"seconds":0}`); len(a.Content) != 1 || a.TaskID != "" {
		t.Errorf("at once: %s", body)
	}
	id := c.begin("slow_compute", `{"seconds":1,"label":"one"}`)
	if a := c.until(id, "completed"); a.text() != "computed one" {
		t.Errorf("completed with %q", a.text())
	}
	// What it asks before it is a task is asked of the request.
	if a, body := c.ask("tools/call", "ask_twice", `"name":"ask_twice","arguments":{}`); a.ResultType != "input_required" {
		t.Errorf("asked at once: %s", body)
	}

	// What it asks within the task: the same key, twice, and a kill while the
	// client thinks. Two of them, which hold no place at the server meanwhile.
	twice := c.begin("ask_twice", `{"seconds":0.6}`)
	other := c.begin("ask_twice", `{"seconds":0.6}`)
	if a := c.until(twice, "input_required"); a.InputRequests["1.name"] == nil {
		t.Errorf("asks %v", a.InputRequests)
	}
	c.until(other, "input_required")
	lost := c.begin("slow_compute", `{"seconds":30,"label":"lost"}`)
	repeated := again.begin("slow_compute", `{"seconds":3,"label":"repeated"}`)
	g.Kill()
	g.Restart()
	c.answer(twice, "1.name", `{"name":"Ada"}`)
	c.answer(twice, "1.name", `{"name":"Eve"}`) // the first counts
	if a := c.until(twice, "working"); a.InputRequests != nil {
		t.Errorf("asks %v", a.InputRequests)
	}
	if a := c.until(twice, "input_required"); len(a.InputRequests) != 1 || a.InputRequests["2.name"] == nil {
		t.Errorf("asks %v", a.InputRequests)
	}
	c.answer(twice, "2.name", `{"name":"Bob"}`)
	if a := c.until(twice, "completed"); a.text() != "Ada and Bob" {
		t.Errorf("completed with %q", a.text())
	}
	if kinds := ofTask(g, twice); strings.Join(kinds, " ") != "requested authorized started tasked tasked answered started tasked answered started completed" {
		t.Errorf("history: %v", kinds)
	}
	if n := called(up, "tools/call ask_twice"); n != 6-1 { // one at once, three rounds, and the first of the other
		t.Errorf("the server was called %d times", n)
	}
	if a, body := c.ask("tasks/cancel", other, `"taskId":"`+other+`"`); a.ResultType != "complete" {
		t.Errorf("tasks/cancel: %s", body)
	}
	c.until(other, "cancelled")

	// A request that was under way is lost, and said to be, unless it may be repeated.
	if a := c.until(lost, "failed"); a.Error == nil || a.Error.Data.Waybill.Code != "unknown" || a.StatusMessage == "" {
		t.Errorf("lost: %+v", a)
	}
	if a := again.until(repeated, "completed"); a.text() != "computed repeated" {
		t.Errorf("completed with %q", a.text())
	}
	if n := called(up, "tools/call slow_compute lost"); n != 1 {
		t.Errorf("what may not be repeated was called %d times", n)
	}
	if n := called(up, "tools/call slow_compute repeated"); n != 2 {
		t.Errorf("what may be repeated was called %d times", n)
	}

	// Nobody takes a task who has not said so.
	a, err := g.Post(t.Context(), "tasks", "tools/call", "slow_compute",
		`{"jsonrpc":"2.0","id":7,"method":"tools/call","params":{"name":"slow_compute","arguments":{"seconds":1,"label":"plain"},`+gateway.Meta+`}}`)
	if err != nil || !strings.Contains(string(a.Body), "computed plain") {
		t.Errorf("not declared: %s %v", a.Body, err)
	}
}

// A task is its agent's, at the endpoint of its server, and for all others
// unknown, like what never was.
func TestTasksOfOthers(t *testing.T) {
	url, up := upstream.StartTasks(t, true)
	g := gateway.Start(t, gateway.Config(`tenants: [{id: acme}, {id: other}]
agents:
  - {id: one, tenant: acme, token_sha256: `+fmt.Sprintf("%x", sha256.Sum256([]byte("token one of many")))+`}
  - {id: two, tenant: acme, token_sha256: `+fmt.Sprintf("%x", sha256.Sum256([]byte("token two of many")))+`}
  - {id: three, tenant: other, token_sha256: `+fmt.Sprintf("%x", sha256.Sum256([]byte("token three of many")))+`}
servers:
`+gateway.Server("tasks", url, "")+gateway.Server("elsewhere", url, "")))
	as := func(path, who string) *taker {
		return newTaker(t, g, path, "Authorization: Bearer token "+who+" of many")
	}
	owner := as("tasks", "one")
	id := owner.begin("slow_compute", `{"seconds":60}`)
	_, unknown := owner.get("c0123456789abcdefghijklmnop-zz")
	if !bytes.Contains(unknown, []byte("-32602")) {
		t.Errorf("no task: %s", unknown)
	}
	call, place, _ := strings.Cut(id, "-")
	for _, method := range []string{"tasks/get", "tasks/update", "tasks/cancel"} {
		for _, c := range []*taker{as("tasks", "two"), as("tasks", "three"), as("elsewhere", "one")} {
			if _, body := c.ask(method, id, `"taskId":"`+id+`","inputResponses":{"x":{}}`); !bytes.Equal(body, unknown) {
				t.Errorf("%s of another: %s", method, body)
			}
		}
		for _, bad := range []string{call, place, "-", call + "-", call + "-0" + place, call + "-1", "c" + call[1:26] + "1-" + place, strings.Repeat("9", 4000)} {
			if _, body := owner.ask(method, bad, `"taskId":"`+bad+`","inputResponses":{}`); !bytes.Equal(body, unknown) {
				t.Errorf("%s of %q: %s", method, bad, body)
			}
		}
	}
	if a, body := owner.get(id); a.Status != "working" {
		t.Errorf("the owner's: %s", body)
	}
	if called(up, "tasks/cancel") != 0 {
		t.Error("another has cancelled it")
	}
	if a, body := owner.ask("tasks/update", id, `"taskId":"`+id+`","inputResponses":[]`); a.Error == nil || a.Error.Code != -32602 {
		t.Errorf("no answers: %s", body)
	}
}

// Two gateways on one log: what one has begun the other serves, tells of, and
// ends when the first is killed.
func TestTasksOfReplicas(t *testing.T) {
	addr, dir := gateway.FreeAddr(t), t.TempDir()
	nats := gateway.Child(t, "nats", envNATS+"="+addr, envNATSDir+"="+dir)
	if _, err := nats.Await(t.Context(), "nats listens"); err != nil {
		t.Fatal(err)
	}
	url, up := upstream.StartTasks(t, true)
	config := gateway.Config(fmt.Sprintf("bus: {url: \"nats://%s\", replicas: 1}\nservers:\n", addr) + gateway.Server("tasks", url, ""))
	a, b := gateway.Start(t, config), gateway.Start(t, config)
	first, second := newTaker(t, a, "tasks"), newTaker(t, b, "tasks")
	id := first.begin("confirm_delete", `{"filename":"it"}`)
	slow := first.begin("slow_compute", `{"seconds":3,"label":"it"}`)

	req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, b.URL+"/mcp/tasks", strings.NewReader(
		`{"jsonrpc":"2.0","id":"mine","method":"subscriptions/listen","params":{"notifications":{"taskIds":["`+id+`","unknown-1"]},`+taskMeta+`}}`))
	if err != nil {
		t.Fatal(err)
	}
	for name, v := range map[string]string{
		"Content-Type": "application/json", "Accept": "application/json, text/event-stream", "MCP-Protocol-Version": "2026-07-28", "Mcp-Method": "subscriptions/listen",
	} {
		req.Header.Set(name, v)
	}
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	told := bufio.NewScanner(res.Body)
	next := func(want ...string) {
		t.Helper()
		for told.Scan() {
			if line, ok := strings.CutPrefix(told.Text(), "data: "); ok {
				for _, w := range append(want, `"io.modelcontextprotocol/subscriptionId":"mine"`) {
					if !strings.Contains(line, w) {
						t.Errorf("%s is not in %s", w, line)
					}
				}
				if strings.Contains(line, `"status":"working"`) && !strings.Contains(strings.Join(want, " "), "working") {
					continue
				}
				return
			}
		}
		t.Fatalf("no more is told: %v", told.Err())
	}
	next(`"method":"notifications/subscriptions/acknowledged"`, `"taskIds":["`+id+`"]`)
	second.until(id, "input_required")
	for told.Scan() {
		if strings.Contains(told.Text(), `"status":"input_required"`) {
			break
		}
	}
	if !strings.Contains(told.Text(), `"method":"notifications/tasks"`) || !strings.Contains(told.Text(), `"inputRequests":{"confirm":`) {
		t.Errorf("told %s", told.Text())
	}

	a.Kill() // whichever follows the tasks, one is left
	second.answer(id, "confirm", `{"confirm":true}`)
	for told.Scan() {
		if strings.Contains(told.Text(), `"status":"completed"`) {
			break
		}
	}
	if !strings.Contains(told.Text(), `it map[confirm:map[confirm:true]]`) {
		t.Errorf("told %s", told.Text())
	}
	second.until(id, "completed")
	if s := second.until(slow, "completed"); s.text() != "computed it" {
		t.Errorf("completed with %q", s.text())
	}
	if called(up, "tools/call slow_compute") != 1 || called(up, "tools/call confirm_delete") != 1 {
		t.Errorf("called more than once:\n%s", up.Output())
	}
}

// The tasks that revision 2025-11-25 has in its core are between client and server,
// in the client's session, to which they belong: they pass.
func TestLegacyTasks(t *testing.T) {
	t.Parallel() // it mostly waits
	g := gateway.Start(t, gateway.Config(`tenants: [{id: acme}]
agents:
  - {id: one, tenant: acme, token_sha256: `+fmt.Sprintf("%x", sha256.Sum256([]byte("token one of many")))+`}
  - {id: two, tenant: acme, token_sha256: `+fmt.Sprintf("%x", sha256.Sum256([]byte("token two of many")))+`}
servers:
`+gateway.Server("everything", peers.ServerEverything(t), "")))
	at := peers.Endpoint{URL: g.URL + "/mcp/everything", Token: "token one of many"}
	t.Run("through", func(t *testing.T) { peers.ExerciseLegacyTasks(t, at) })

	task := peers.BeginLegacyTask(t, at)
	g.Kill()
	g.Restart()

	// Another principal's session is another; that of the task is not there for him.
	other, _, err := peers.OpenLegacy(t.Context(), peers.Endpoint{URL: at.URL, Token: "token two of many"}, "2025-11-25", struct{}{})
	if err != nil {
		t.Fatal(err)
	}
	for _, method := range []string{"tasks/get", "tasks/result", "tasks/cancel"} {
		if result, err := other.Call(t.Context(), method, map[string]any{"taskId": task.Task}); err == nil {
			t.Errorf("%s by another: %s", method, result)
		}
	}
	req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, at.URL, strings.NewReader(`{"jsonrpc":"2.0","id":1,"method":"tasks/get","params":{"taskId":"`+task.Task+`"}}`))
	if err != nil {
		t.Fatal(err)
	}
	for name, v := range map[string]string{
		"Content-Type": "application/json", "Accept": "application/json, text/event-stream", "MCP-Protocol-Version": "2025-11-25",
		"Mcp-Session-Id": task.Session, "Authorization": "Bearer token two of many",
	} {
		req.Header.Set(name, v)
	}
	if res, err := http.DefaultClient.Do(req); err != nil || res.StatusCode != http.StatusNotFound {
		t.Errorf("another in the session of the task: %v %v", res, err)
	} else {
		res.Body.Close()
	}
	peers.EndLegacyTask(t, at, task)
}

// The official client of the extension, in front of servers with it and without.
func TestTasksClient(t *testing.T) {
	t.Parallel() // it mostly waits
	with, _ := upstream.StartTasks(t, true)
	without, _ := upstream.StartTasks(t, false)
	g := gateway.Start(t, gateway.Config("limits: {task_patience: 300ms}\nservers:\n"+
		gateway.Server("with", with, "")+gateway.Server("without", without, "tasks: ['*']")))
	t.Run("with", func(t *testing.T) { peers.ExerciseTasks(t, g.URL+"/mcp/with") })
	t.Run("without", func(t *testing.T) { peers.ExerciseTasks(t, g.URL+"/mcp/without") })
}
