package peers

import (
	"encoding/json"
	"testing"
)

// CoreTask is a tools/call as a task of revision 2025-11-25.
type CoreTask struct {
	Tool   string         `json:"tool"`
	Args   map[string]any `json:"args"`
	Cancel bool           `json:"cancel,omitempty"` // as soon as it is a task
	Begun  bool           `json:"begun,omitempty"`  // cancel it when its server has begun it, and has said so
	Wait   bool           `json:"wait,omitempty"`   // for its result, without asking how it stands
}

// CoreTaskRun is what the TypeScript SDK v1 saw of one.
type CoreTaskRun struct {
	Tool, Task    string
	Status, After string   // before its result was asked for, and after; only of EndCoreTasks
	Statuses      []string // that were told, or of the cancel
	Again         int      // the error of a second cancel
	Text, Related string   // of its result
	IsError       bool
	Code          int // of the error instead
	Message       string
	Asked         []string // what it asked
	Strange       int      // how many of these did not name the task
}

// CoreTasks is all that it saw.
type CoreTasks struct {
	Capabilities json.RawMessage   // tasks, of the server's
	Tools        map[string]string // execution.taskSupport
	Calls        []CoreTaskRun
	Listed       []string
	Unknown      int // the error for a task that is not there

	Tasks   []string // of BeginCoreTasks
	Session string
}

func coreTasks(t testing.TB, e Endpoint, step string, calls []CoreTask, of CoreTasks) (s CoreTasks) {
	t.Helper()
	args, err := json.Marshal(map[string]any{"url": e.URL, "token": e.Token, "step": step, "calls": calls, "tasks": of.Tasks, "session": of.Session})
	if err != nil {
		t.Fatal(err)
	}
	out := NodeScript(t, beside("coretasks.mjs"), string(args))
	if err := json.Unmarshal([]byte(out.Stdout), &s); err != nil || out.Exit != 0 {
		t.Fatalf("coretasks.mjs %s: exit %d, %v\n%s%s", step, out.Exit, err, out.Stdout, out.Stderr)
	}
	return s
}

// RunCoreTasks has the TypeScript SDK v1 make calls as tasks, one after the other, and answer what they ask: with a name, n1,
// n2 …, or the first interpretation that it may choose.
func RunCoreTasks(t testing.TB, e Endpoint, calls ...CoreTask) CoreTasks {
	t.Helper()
	return coreTasks(t, e, "", calls, CoreTasks{})
}

// BeginCoreTasks makes tasks and leaves them, and the session, to themselves.
func BeginCoreTasks(t testing.TB, e Endpoint, calls ...CoreTask) CoreTasks {
	t.Helper()
	return coreTasks(t, e, "begin", calls, CoreTasks{})
}

// EndCoreTasks comes back for their results.
func EndCoreTasks(t testing.TB, e Endpoint, of CoreTasks) CoreTasks {
	t.Helper()
	return coreTasks(t, e, "end", nil, of)
}

// AskedAsTasks is what server-everything says of a client that answers what it asks with tasks.
type AskedAsTasks struct {
	Sampling, Elicitation string   // the text of the answers to its tools, without the IDs of tasks
	Made                  []string // the methods for which the client has made tasks
}

// RunAskedAsTasks has the TypeScript SDK v1 call those tools of server-everything that ask it for tasks.
func RunAskedAsTasks(t testing.TB, e Endpoint, prefix string) (s AskedAsTasks) {
	t.Helper()
	args, err := json.Marshal(map[string]any{"url": e.URL, "token": e.Token, "prefix": prefix})
	if err != nil {
		t.Fatal(err)
	}
	out := NodeScript(t, beside("coretasks_asked.mjs"), string(args))
	if err := json.Unmarshal([]byte(out.Stdout), &s); err != nil || out.Exit != 0 {
		t.Fatalf("coretasks_asked.mjs: exit %d, %v\n%s%s", out.Exit, err, out.Stdout, out.Stderr)
	}
	return s
}
