package test

import (
	"crypto/sha256"
	"fmt"
	"slices"
	"strings"
	"testing"

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
	with, up := upstream.StartTasks(t, true)
	without, _ := upstream.StartTasks(t, false)
	g := gateway.Start(t, gateway.Config("servers:\n"+gateway.Server("with", with, "")+gateway.Server("without", without, "")))
	for path, prefix := range map[string]string{"/with": "", "/without": "", "": "with__", "/waybill": "without__"} {
		t.Run("mcp"+path, func(t *testing.T) {
			s := peers.RunCoreTasks(t, peers.Endpoint{URL: g.URL + "/mcp" + path},
				peers.CoreTask{Tool: prefix + "slow_compute", Args: map[string]any{"seconds": 1, "label": "it"}},
				peers.CoreTask{Tool: prefix + "multi_input", Args: map[string]any{"filename": "f"}},
				peers.CoreTask{Tool: prefix + "ask_twice", Args: map[string]any{}},
				peers.CoreTask{Tool: prefix + "slow_compute", Args: map[string]any{"seconds": 60}, Cancel: true},
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
			if strings.HasPrefix(prefix+path, "with_") || path == "/with" {
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
	if called(up, "tools/call slow_compute it") != 2 || called(up, "tasks/cancel upstream-task") != 2 {
		t.Errorf("called:\n%s", up.Output())
	}
}

// Such tasks outlive the gateway, and are their agent's alone.
func TestCoreTasksSurvive(t *testing.T) {
	url, up := upstream.StartTasks(t, true)
	g := gateway.Start(t, gateway.Config(twoAgents+"servers:\n"+gateway.Server("tasks", url, "")))
	one := peers.Endpoint{URL: g.URL + "/mcp/tasks", Token: "token one of many"}
	of := peers.BeginCoreTasks(t, one,
		peers.CoreTask{Tool: "slow_compute", Args: map[string]any{"seconds": 4, "label": "it"}},
		peers.CoreTask{Tool: "multi_input", Args: map[string]any{"filename": "f"}},
	)
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
	if c := s.Calls[0]; c.Status != "working" || c.Text != "computed it" || c.After != "completed" {
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
