package peers

import (
	"encoding/json"
	"slices"
	"strings"
	"testing"
)

// LegacyTask is a task of revision 2025-11-25 that goes on without its client.
type LegacyTask struct{ Task, Session string }

func tasksScript(t testing.TB, e Endpoint, step string, of LegacyTask, into any) {
	t.Helper()
	args, err := json.Marshal(map[string]any{"url": e.URL, "prefix": e.Prefix, "token": e.Token, "step": step, "task": of.Task, "session": of.Session})
	if err != nil {
		t.Fatal(err)
	}
	out := NodeScript(t, beside("tasks.mjs"), string(args))
	if err := json.Unmarshal([]byte(out.Stdout), into); err != nil || out.Exit != 0 {
		t.Fatalf("tasks.mjs %s: exit %d, %v\n%s%s", step, out.Exit, err, out.Stdout, out.Stderr)
	}
}

// ExerciseLegacyTasks has the TypeScript SDK v1 drive the tasks of revision 2025-11-25 that server-everything has: one that
// asks (tasks/result brings the question), its result twice, a list, a cancel and a task that is not there.
func ExerciseLegacyTasks(t testing.TB, e Endpoint) {
	t.Helper()
	var s struct {
		Created, Text, Error, Cancelled string
		Statuses                        []string
		Elicited                        []struct{ Message, Related string }
		Again                           struct{ Text, Related string }
		Listed, Unknown                 int
	}
	tasksScript(t, e, "all", LegacyTask{}, &s)
	if s.Created == "" || s.Error != "" || !slices.Contains(s.Statuses, "working") || !slices.Contains(s.Statuses, "input_required") {
		t.Errorf("task %q, statuses %v, error %q", s.Created, s.Statuses, s.Error)
	}
	if len(s.Elicited) != 1 || s.Elicited[0].Related != s.Created {
		t.Errorf("asked %+v of task %s", s.Elicited, s.Created)
	}
	if !strings.Contains(s.Text, "# Research Report: gateways (") || s.Again.Text != s.Text || s.Again.Related != s.Created {
		t.Errorf("result %q, again %+v", s.Text, s.Again)
	}
	if s.Cancelled != "cancelled" || s.Listed != 2 || s.Unknown != -32602 {
		t.Errorf("cancelled %q, %d of 2 listed, an unknown one is error %d", s.Cancelled, s.Listed, s.Unknown)
	}
}

// BeginLegacyTask begins a task and leaves it, and its session, to themselves.
func BeginLegacyTask(t testing.TB, e Endpoint) (task LegacyTask) {
	t.Helper()
	if tasksScript(t, e, "begin", LegacyTask{}, &task); task.Task == "" || task.Session == "" {
		t.Fatalf("no task: %+v", task)
	}
	return task
}

// EndLegacyTask comes back for a task's result.
func EndLegacyTask(t testing.TB, e Endpoint, task LegacyTask) {
	t.Helper()
	var s struct{ Status, Text, Related string }
	if tasksScript(t, e, "end", task, &s); s.Status == "" || !strings.Contains(s.Text, "# Research Report: restarts") || s.Related != task.Task {
		t.Errorf("task %s: %+v", task.Task, s)
	}
}

// TaskCall is a tools/call by a client that takes tasks for answers, and what it saw of it.
type TaskCall struct {
	Tool   string         `json:"tool"`
	Args   map[string]any `json:"args"`
	Cancel bool           `json:"cancel,omitempty"`
}

// TaskRun is what it saw of one: how it was answered (Kind is immediate or task), ended, and what it was asked.
type TaskRun struct {
	Kind, Error string
	Asked       []string
	Outcome     struct {
		Status string
		Result struct{ Content []struct{ Text string } }
	}
}

func (r TaskRun) Text() string {
	if c := r.Outcome.Result.Content; len(c) > 0 {
		return c[0].Text
	}
	return ""
}

// RunTasks has the client of @modelcontextprotocol/ext-tasks make calls, one after the other, whose every answer it holds
// against its schemas.
func RunTasks(t testing.TB, url string, calls ...TaskCall) []TaskRun {
	t.Helper()
	args, err := json.Marshal(map[string]any{"url": url, "calls": calls})
	if err != nil {
		t.Fatal(err)
	}
	out := NodeScript(t, beside("tasks_modern.mjs"), string(args))
	var s struct {
		Era   string
		Calls []TaskRun
	}
	if err := json.Unmarshal([]byte(out.Stdout), &s); err != nil || out.Exit != 0 || s.Era != "modern" || len(s.Calls) != len(calls) {
		t.Fatalf("tasks_modern.mjs: exit %d, %v\n%s%s", out.Exit, err, out.Stdout, out.Stderr)
	}
	return s.Calls
}

// ExerciseTasks has it drive one task that ends, one that is cancelled, one that asks two things, one that asks twice, and
// what is no task at all. The endpoint has the tools of the upstream package's server for tasks.
func ExerciseTasks(t testing.TB, url string) {
	t.Helper()
	calls := []TaskCall{
		{"greet", map[string]any{"name": "Ada"}, false},
		{"slow_compute", map[string]any{"seconds": 1, "label": "it"}, false},
		{"slow_compute", map[string]any{"seconds": 60}, true},
		{"multi_input", map[string]any{"seconds": 0.7}, false},
		{"ask_twice", map[string]any{"seconds": 0.7}, false},
	}
	want := []struct{ kind, status, text, asked string }{
		{"immediate", "completed", "Hello, Ada!", ""},
		{"task", "completed", "computed it", ""},
		{"task", "cancelled", "", ""},
		{"task", "completed", "name:n2", "First? Second?"},
		{"", "completed", "n1 and n2", "First name? Second name?"}, // a task only where the server has none of its own
	}
	for i, got := range RunTasks(t, url, calls...) {
		w := want[i]
		if got.Error != "" || w.kind != "" && got.Kind != w.kind || got.Outcome.Status != w.status || !strings.Contains(got.Text(), w.text) || strings.Join(got.Asked, " ") != w.asked {
			t.Errorf("%s %v: %+v", calls[i].Tool, calls[i].Args, got)
		}
	}
}
