package test

import (
	"bytes"
	"crypto/sha256"
	"fmt"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"waybill.dev/schemas"
	"waybill.dev/test/gateway"
	"waybill.dev/test/peers"
	"waybill.dev/test/upstream"
)

// twoAgents are the tenant, with agents one and two, whose tokens are "token one of many" and so on.
var twoAgents = `tenants: [{id: acme}]
agents:
  - {id: one, tenant: acme, token_sha256: ` + fmt.Sprintf("%x", sha256.Sum256([]byte("token one of many"))) + `}
  - {id: two, tenant: acme, token_sha256: ` + fmt.Sprintf("%x", sha256.Sum256([]byte("token two of many"))) + `}
`

// A client of 2025-11-25 that asks for tasks at servers of 2026-07-28, which have
// the extension or do not, each by itself and behind the front: the official client
// sees the tasks of its revision, served by the gateway.
func TestCoreTasksOfModernServers(t *testing.T) {
	t.Parallel() // it mostly waits, as all that have tasks do
	with, up := upstream.StartTasks(t, true)
	without, _ := upstream.StartTasks(t, false)
	g := gateway.Start(t, gateway.Config("servers:\n"+gateway.Server("with", with, "")+gateway.Server("without", without, "")))
	t.Run("mcp", func(t *testing.T) {
		for path, prefix := range map[string]string{"/with": "", "/without": "", "": "with__", "/waybill": "without__"} {
			t.Run(strings.TrimPrefix(path, "/"), func(t *testing.T) {
				t.Parallel()
				has := strings.HasPrefix(prefix+path, "with_") || path == "/with" // its server has tasks, and says what it does
				s := peers.RunCoreTasks(t, peers.Endpoint{URL: g.URL + "/mcp" + path},
					peers.CoreTask{Tool: prefix + "slow_compute", Args: map[string]any{"seconds": 1, "label": "it"}},
					peers.CoreTask{Tool: prefix + "multi_input", Args: map[string]any{"filename": "f"}},
					peers.CoreTask{Tool: prefix + "ask_twice", Args: map[string]any{}},
					peers.CoreTask{Tool: prefix + "slow_compute", Args: map[string]any{"seconds": 60}, Cancel: true, Begun: has},
					peers.CoreTask{Tool: prefix + "no_such_tool", Args: map[string]any{}},
					peers.CoreTask{Tool: prefix + "failing_job", Args: map[string]any{}},
				)
				if string(s.Capabilities) != `{"list":{},"cancel":{},"requests":{"tools":{"call":{}}}}` || s.Tools[prefix+"slow_compute"] != "optional" || s.Unknown != -32602 {
					t.Errorf("capabilities %s, tools %v, unknown %d", s.Capabilities, s.Tools, s.Unknown)
				}
				slow, multi, twice, cancelled, none, failing := s.Calls[0], s.Calls[1], s.Calls[2], s.Calls[3], s.Calls[4], s.Calls[5]
				if slow.Text != "computed it" || slow.Related != slow.Task || !slices.Contains(slow.Statuses, "working") {
					t.Errorf("slow: %+v", slow)
				}
				slices.Sort(multi.Asked)
				if !strings.Contains(multi.Text, "name:n1") || !strings.Contains(multi.Text, "name:n2") || strings.Join(multi.Asked, " ") != "First? Second?" || multi.Strange != 0 {
					t.Errorf("two questions: %+v", multi)
				}
				if twice.Text != "n1 and n2" || strings.Join(twice.Asked, " ") != "First name? Second name?" || !slices.Contains(twice.Statuses, "input_required") {
					t.Errorf("asked twice: %+v", twice)
				}
				if cancelled.Statuses[0] != "cancelled" || cancelled.Again != -32602 || cancelled.Code == 0 {
					t.Errorf("cancelled: %+v", cancelled)
				}
				if none.Code != -32602 || none.Task == "" {
					t.Errorf("no such tool: %+v", none)
				}
				if has {
					if !failing.IsError || failing.Text != "the job failed" {
						t.Errorf("failing: %+v", failing)
					}
				}
				for _, c := range s.Calls {
					if !slices.Contains(s.Listed, c.Task) {
						t.Errorf("%s is not in the list of %d", c.Task, len(s.Listed))
					}
				}
			})
		}
	})
	if called(up, "tools/call slow_compute it") != 2 || called(up, "tasks/cancel upstream-task") != 2 {
		t.Errorf("called:\n%s", up.Output())
	}
}

// Such tasks outlive the gateway, and are their agent's alone.
func TestCoreTasksSurvive(t *testing.T) {
	t.Parallel() // it mostly waits
	url, up := upstream.StartTasks(t, true)
	g := gateway.Start(t, gateway.Config(twoAgents+"servers:\n"+gateway.Server("tasks", url, "")))
	one := peers.Endpoint{URL: g.URL + "/mcp/tasks", Token: "token one of many"}
	of := peers.BeginCoreTasks(t, one,
		peers.CoreTask{Tool: "slow_compute", Args: map[string]any{"seconds": 4, "label": "it"}},
		peers.CoreTask{Tool: "multi_input", Args: map[string]any{"filename": "f"}},
	)
	becomeTheServers(t, g, of.Tasks, func(e schemas.Event) bool { return bytes.Contains(e.Body, []byte("upstream-task")) })
	g.Kill()
	g.Restart()

	two := peers.Endpoint{URL: one.URL, Token: "token two of many"}
	other, _, err := peers.OpenLegacy(t.Context(), two, "2025-11-25", struct{}{})
	if err != nil {
		t.Fatal(err)
	}
	_, unknown := other.Call(t.Context(), "tasks/get", map[string]any{"taskId": "c0123456789abcdefghijklmnop-zz"})
	for _, method := range []string{"tasks/get", "tasks/result", "tasks/cancel"} {
		if result, err := other.Call(t.Context(), method, map[string]any{"taskId": of.Tasks[0]}); err == nil || strings.TrimPrefix(err.Error(), method) != strings.TrimPrefix(unknown.Error(), "tasks/get") {
			t.Errorf("%s by another: %s %v", method, result, err)
		}
	}
	if result, err := other.Call(t.Context(), "tasks/list", nil); err != nil || string(result) != `{"tasks":[]}` {
		t.Errorf("tasks/list by another: %s %v", result, err)
	}

	s := peers.EndCoreTasks(t, one, of)
	if c := s.Calls[0]; c.Text != "computed it" || c.After != "completed" {
		t.Errorf("slow: %+v", c)
	}
	if c := s.Calls[1]; c.Status != "input_required" || !strings.Contains(c.Text, "name:n2") || c.After != "completed" {
		t.Errorf("with questions: %+v", c)
	}
	if !slices.Equal(s.Listed, of.Tasks) {
		t.Errorf("listed %v of %v", s.Listed, of.Tasks)
	}
	if n := called(up, "tools/call"); n != 2 {
		t.Errorf("the server was called %d times", n)
	}
}

// becomeTheServers waits until the log has of each task that the server has one, too.
// If the gateway is killed before, nobody knows what has become of the call.
func becomeTheServers(t *testing.T, g *gateway.Gateway, tasks []string, says func(tasked schemas.Event) bool) {
	t.Helper()
	for _, task := range tasks {
		call, _, _ := strings.Cut(task, "-")
		if !becomes(within, func() bool {
			return slices.ContainsFunc(g.Events(), func(e schemas.Event) bool {
				return e.Kind() == schemas.KindTasked && string(e.Root) == call && says(e)
			})
		}) {
			t.Fatalf("the server has no task for %s", task)
		}
	}
}

const research = "simulate-research-query"

// A server of 2025-11-25 whose tool wants to be called as a task, and a client of
// 2026-07-28 that takes tasks: it sees the extension, over kills and stops of the
// gateway, and the server was called once.
func TestTasksOfLegacyServers(t *testing.T) {
	t.Parallel() // it mostly waits
	g := gateway.Start(t, gateway.Config("servers:\n"+gateway.Server("everything", peers.ServerEverything(t), "")))
	c := newTaker(t, g, "everything")
	for method, want := range map[string][]string{
		"server/discover": {`"extensions":{"io.modelcontextprotocol/tasks":{}}`, `"capabilities":{`},
		"tools/list":      {`"name":"` + research + `"`, `"inputSchema"`},
	} {
		_, body := c.ask(method, "", `"x":0`)
		for _, w := range want {
			if !strings.Contains(string(body), w) {
				t.Errorf("%s: %s is not in %s", method, w, body)
			}
		}
		if strings.Contains(string(body), "taskSupport") || strings.Contains(string(body), `"requests"`) {
			t.Errorf("%s: what the revision does not have is told: %s", method, body)
		}
	}
	begin := func(c *taker, tool, args string) string {
		t.Helper()
		a, body := c.ask("tools/call", tool, `"name":"`+tool+`","arguments":`+args)
		if a.ResultType != "task" || a.Status != "working" || a.PollIntervalMs != 1000 {
			t.Fatalf("no task: %s", body)
		}
		return a.TaskID
	}
	question := func(a taskAnswer) (key string) {
		t.Helper()
		for key, v := range a.InputRequests {
			if s := string(v); strings.HasPrefix(key, "elicitation/create-") && strings.Contains(s, "could have multiple interpretations") && !strings.Contains(s, "related-task") {
				return key
			}
		}
		t.Fatalf("asks %s", a.InputRequests)
		return ""
	}

	// One that is asked about while the gateway is killed, one over the kill, and one
	// whose answer is given to a gateway that was stopped in order.
	first, plain, second := begin(c, research, `{"topic":"first","ambiguous":true}`), begin(c, research, `{"topic":"plain"}`), begin(c, research, `{"topic":"second","ambiguous":true}`)
	key := question(c.until(first, "input_required"))
	c.until(second, "input_required") // on its way to a gateway that is killed, it would be lost: that server asks once
	g.Kill()
	g.Restart()
	c.answer(first, key, `{"interpretation":"technical"}`)
	if a := c.until(plain, "completed"); !strings.Contains(a.text(), "# Research Report: plain") {
		t.Errorf("completed with %q", a.text())
	}
	if a := c.until(first, "completed"); !strings.Contains(a.text(), "# Research Report: first (technical)") {
		t.Errorf("completed with %q", a.text())
	}
	key = question(c.until(second, "input_required"))
	if err := g.Stop(); err != nil {
		t.Fatal(err)
	}
	g.Restart()
	c.answer(second, key, `{"interpretation":"current"}`)
	if a := c.until(second, "completed"); !strings.Contains(a.text(), "# Research Report: second (current)") {
		t.Errorf("completed with %q", a.text())
	}
	if kinds := ofTask(g, plain); strings.Join(kinds, " ") != "requested authorized started tasked tasked tasked completed" && strings.Count(strings.Join(kinds, " "), "started") != 1 {
		t.Errorf("history: %v", kinds)
	}
	id := begin(c, research, `{"topic":"taken back"}`)
	c.ask("tasks/cancel", id, `"taskId":"`+id+`"`)
	c.until(id, "cancelled")

	// Without the extension it is said what is missing.
	a, err := g.Post(t.Context(), "everything", "tools/call", research, `{"jsonrpc":"2.0","id":7,"method":"tools/call","params":{"name":"`+research+`","arguments":{"topic":"x"},`+gateway.Meta+`}}`)
	if err != nil || !strings.Contains(string(a.Body), `"requiredCapabilities":{"extensions":{"io.modelcontextprotocol/tasks":{}}}`) {
		t.Errorf("not declared: %s %v", a.Body, err)
	}

	// The official client, at the server and at the front.
	for path, prefix := range map[string]string{"/everything": "", "": "everything__"} {
		for _, r := range peers.RunTasks(t, g.URL+"/mcp"+path, peers.TaskCall{Tool: prefix + research, Args: map[string]any{"topic": "official", "ambiguous": true}}) {
			if r.Error != "" || r.Kind != "task" || r.Outcome.Status != "completed" || len(r.Asked) != 1 || !strings.Contains(r.Text(), "# Research Report: official (") {
				t.Errorf("at %q: %+v", path, r)
			}
		}
	}
}

// A client and a server of 2025-11-25 with the front between: there the tasks are
// the gateway's, also of tools that the server does not make tasks of.
func TestCoreTasksOfLegacyServers(t *testing.T) {
	t.Parallel() // it mostly waits
	g := gateway.Start(t, gateway.Config(twoAgents+"views:\n  - {name: some, from: {everything: ['"+research+"', trigger-elicitation-request]}}\n"+
		"servers:\n"+gateway.Server("everything", peers.ServerEverything(t), "")))
	for path, prefix := range map[string]string{"": "everything__", "/some": ""} {
		at := peers.Endpoint{URL: g.URL + "/mcp" + path, Token: "token one of many"}
		s := peers.RunCoreTasks(t, at,
			peers.CoreTask{Tool: prefix + research, Args: map[string]any{"topic": "gateways", "ambiguous": true}},
			peers.CoreTask{Tool: prefix + research, Args: map[string]any{"topic": "nothing"}, Cancel: true},
			peers.CoreTask{Tool: prefix + "trigger-elicitation-request", Args: map[string]any{}},
		)
		if c := s.Calls[0]; s.Tools[prefix+research] != "required" || !strings.Contains(c.Text, "# Research Report: gateways (") || len(c.Asked) != 1 || c.Strange != 0 || c.Related != c.Task {
			t.Errorf("%s: %+v", path, c)
		}
		if c := s.Calls[1]; c.Statuses[0] != "cancelled" || c.Again != -32602 {
			t.Errorf("%s: cancelled: %+v", path, c)
		}
		if c := s.Calls[2]; c.Text == "" || len(c.Asked) != 1 || c.Strange != 0 || !slices.Contains(c.Statuses, "input_required") {
			t.Errorf("%s: no task of the server's: %+v", path, c)
		}
		if len(s.Listed) < 3 || s.Unknown != -32602 {
			t.Errorf("%s: %d listed, an unknown one is %d", path, len(s.Listed), s.Unknown)
		}
	}
	at := peers.Endpoint{URL: g.URL + "/mcp", Token: "token one of many"}
	of := peers.BeginCoreTasks(t, at, peers.CoreTask{Tool: "everything__" + research, Args: map[string]any{"topic": "restarts", "ambiguous": true}})
	becomeTheServers(t, g, of.Tasks, func(e schemas.Event) bool { return e.Data.(*schemas.Tasked).Session != "" })
	g.Kill()
	g.Restart()
	other, _, err := peers.OpenLegacy(t.Context(), peers.Endpoint{URL: at.URL, Token: "token two of many"}, "2025-11-25", struct{}{})
	if err != nil {
		t.Fatal(err)
	}
	if result, err := other.Call(t.Context(), "tasks/get", map[string]any{"taskId": of.Tasks[0]}); err == nil {
		t.Errorf("tasks/get by another: %s", result)
	}
	if c := peers.EndCoreTasks(t, at, of).Calls[0]; !strings.Contains(c.Text, "# Research Report: restarts (") || c.After != "completed" {
		t.Errorf("after a restart: %+v", c)
	}
}

// A server that tells when its task stands otherwise is heard at once, in both
// directions: it asks to be asked once a minute only.
func TestTasksAreListenedTo(t *testing.T) {
	t.Parallel() // it mostly waits
	url, up := upstream.StartTasks(t, true)
	g := gateway.Start(t, gateway.Config("servers:\n"+gateway.Server("tasks", url, "")))
	began := time.Now()
	c := newTaker(t, g, "tasks")
	slow := c.begin("slow_compute", `{"seconds":1,"label":"it","poll":60000}`)
	asks := c.begin("confirm_delete", `{"filename":"f","poll":60000}`)
	c.until(asks, "input_required")
	c.answer(asks, "confirm", `{"confirm":true}`)
	c.until(asks, "completed")
	if a := c.until(slow, "completed"); a.text() != "computed it" {
		t.Errorf("completed with %q", a.text())
	}
	s := peers.RunCoreTasks(t, peers.Endpoint{URL: g.URL + "/mcp/tasks"}, peers.CoreTask{Tool: "slow_compute", Args: map[string]any{"seconds": 1, "label": "core", "poll": 60000}, Wait: true})
	if s.Calls[0].Text != "computed core" {
		t.Errorf("%+v", s.Calls[0])
	}
	if d := time.Since(began); d > 30*time.Second {
		t.Errorf("it took %s", d)
	}
	if n := called(up, "subscriptions/listen upstream-task"); n != 3 {
		t.Errorf("%d subscriptions:\n%s", n, up.Output())
	}
}

// What a server asks a client that answers with tasks of its own (tasks of sampling and
// elicitation), and how it asks after them, goes through as it is; behind the front too.
func TestAskedAsTasks(t *testing.T) {
	t.Parallel() // it mostly waits
	server := peers.ServerEverything(t)
	g := gateway.Start(t, gateway.Config("servers:\n"+gateway.Server("everything", server, "")))
	want := peers.RunAskedAsTasks(t, peers.Endpoint{URL: server}, "")
	if !strings.Contains(want.Sampling, "[COMPLETED]") || !strings.Contains(want.Elicitation, "[COMPLETED]") || len(want.Made) != 2 {
		t.Fatalf("of the server itself: %+v", want)
	}
	for path, prefix := range map[string]string{"/everything": "", "": "everything__"} {
		t.Run("mcp"+path, func(t *testing.T) {
			t.Parallel()
			if got := peers.RunAskedAsTasks(t, peers.Endpoint{URL: g.URL + "/mcp" + path}, prefix); !reflect.DeepEqual(got, want) {
				t.Errorf("through the gateway: %+v\nof the server: %+v", got, want)
			}
		})
	}
}
