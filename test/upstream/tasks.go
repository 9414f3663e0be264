package upstream

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"waybill.dev/test/gateway"
	"waybill.dev/test/peers"
)

// TasksChild is the name under which RunTasks is listed.
const TasksChild = "tasks"

const envWithout = "WAYBILL_TEST_WITHOUT_TASKS"

// StartTasks starts a server of 2026-07-28 whose tools take long: with the extension
// io.modelcontextprotocol/tasks, as its specification and the conformance suite
// describe it, or without, when it makes each client wait for the answer and asks
// for input by input_required. It returns its URL.
func StartTasks(t testing.TB, with bool) (url string, p *peers.Process) {
	t.Helper()
	addr := gateway.FreeAddr(t)
	env := []string{envListen + "=" + addr}
	if !with {
		env = append(env, envWithout+"=1")
	}
	p = gateway.Child(t, TasksChild, env...)
	if _, err := p.Await(t.Context(), "Tasks are served."); err != nil {
		t.Fatal(err)
	}
	return "http://" + addr + "/mcp", p
}

// RunTasks is the server's process. It prints a line for each tools/call and each
// request about a task.
func RunTasks(ctx context.Context) error {
	ln, err := net.Listen("tcp", os.Getenv(envListen))
	if err != nil {
		return err
	}
	s := &taskServer{extension: os.Getenv(envWithout) == "", tasks: map[string]*serverTask{}}
	mux := http.NewServeMux()
	mux.HandleFunc("POST /mcp", s.serve)
	srv := &http.Server{Handler: mux, ReadHeaderTimeout: 10 * time.Second}
	failed := make(chan error, 1)
	go func() { failed <- srv.Serve(ln) }()
	if _, err := fmt.Println("Tasks are served."); err != nil {
		return err
	}
	select {
	case err := <-failed:
		return err
	case <-ctx.Done():
	}
	err = srv.Close()
	<-failed
	return err
}

const tasksExtension = "io.modelcontextprotocol/tasks"

type object = map[string]any

type rpcError struct {
	Code    int    `json:"code"`
	Message string `json:"message"`
	Data    any    `json:"data,omitempty"`
}

type taskRequest struct {
	ID     json.RawMessage
	Method string
	Params struct {
		Meta struct {
			Capabilities struct {
				Extensions map[string]any
			} `json:"io.modelcontextprotocol/clientCapabilities"`
		} `json:"_meta"`
		Name           string
		Notifications  struct{ TaskIDs []string }
		Arguments      taskArgs
		TaskID         string `json:"taskId"`
		InputResponses map[string]struct {
			Action  string
			Content map[string]any
		}
		RequestState string
	}
}

type taskArgs struct {
	Name, Label, Filename string
	Seconds               float64
	Poll                  int // pollIntervalMs; default 100
}

type taskServer struct {
	extension bool

	mu    sync.Mutex
	tasks map[string]*serverTask
	count int
}

// serverTask is a task; mu of the server guards it.
type serverTask struct {
	id       string
	status   string
	created  time.Time
	updated  time.Time
	result   object
	err      *rpcError
	asks     object
	answers  map[string]map[string]any
	answered chan struct{}
	cancel   context.CancelFunc
	poll     int
	changed  chan struct{} // closed when it stands otherwise
}

// stands says that it stands otherwise; mu is held.
func (t *serverTask) stands() {
	t.updated = time.Now()
	close(t.changed)
	t.changed = make(chan struct{})
}

func (s *taskServer) serve(w http.ResponseWriter, r *http.Request) {
	body, err := io.ReadAll(r.Body)
	var m taskRequest
	if err == nil {
		err = json.Unmarshal(body, &m)
	}
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	if len(m.ID) == 0 {
		w.WriteHeader(http.StatusAccepted)
		return
	}
	name := ""
	switch m.Method { // those that have a name in a header; tasks/result is no method of this revision
	case "tools/call":
		name = m.Params.Name
	case "tasks/get", "tasks/update", "tasks/cancel":
		name = m.Params.TaskID
	}
	if r.Header.Get("Mcp-Method") != m.Method || name != "" && r.Header.Get("Mcp-Name") != name {
		w.Header().Set("Content-Type", "application/json")
		w.WriteHeader(http.StatusBadRequest)
		_, _ = fmt.Fprintf(w, `{"jsonrpc":"2.0","id":%s,"error":{"code":-32020,"message":"Header mismatch"}}`, m.ID)
		return
	}
	if m.Method == "tools/call" || strings.HasPrefix(m.Method, "tasks/") {
		_, _ = fmt.Println(m.Method, m.Params.Name+m.Params.TaskID, m.Params.Arguments.Label)
	}
	if m.Method == "subscriptions/listen" && s.extension {
		s.listen(w, r, &m)
		return
	}
	result, fault := s.answer(r.Context(), &m)
	answer := object{"jsonrpc": "2.0", "id": m.ID, "result": result}
	status := http.StatusOK
	if fault != nil {
		delete(answer, "result")
		answer["error"] = fault
		switch fault.Code {
		case -32601:
			status = http.StatusNotFound
		case -32021:
			status = http.StatusBadRequest
		}
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	_ = json.NewEncoder(w).Encode(answer) // to a client that may have left
}

// listen tells of tasks for as long as the client listens.
func (s *taskServer) listen(w http.ResponseWriter, r *http.Request, m *taskRequest) {
	_, _ = fmt.Println(m.Method, strings.Join(m.Params.Notifications.TaskIDs, " "))
	w.Header().Set("Content-Type", "text/event-stream")
	var writing sync.Mutex
	say := func(method string, params object) {
		params["_meta"] = object{"io.modelcontextprotocol/subscriptionId": m.ID}
		text, err := json.Marshal(object{"jsonrpc": "2.0", "method": method, "params": params})
		if err != nil {
			return
		}
		writing.Lock()
		defer writing.Unlock()
		_, _ = fmt.Fprintf(w, "data: %s\n\n", text) // to a client that may have left
		_ = http.NewResponseController(w).Flush()
	}
	s.mu.Lock()
	var known []*serverTask
	var ids []string
	for _, id := range m.Params.Notifications.TaskIDs {
		if t := s.tasks[id]; t != nil {
			known, ids = append(known, t), append(ids, id)
		}
	}
	s.mu.Unlock()
	say("notifications/subscriptions/acknowledged", object{"notifications": object{"taskIds": ids}})
	var all sync.WaitGroup
	for _, t := range known {
		all.Go(func() {
			for {
				s.mu.Lock()
				changed, task := t.changed, s.task(t)
				s.mu.Unlock()
				say("notifications/tasks", task)
				select {
				case <-changed:
				case <-r.Context().Done():
					return
				}
			}
		})
	}
	all.Wait()
}

var missing = &rpcError{-32021, "Missing required client capability", object{"requiredCapabilities": object{"extensions": object{tasksExtension: object{}}}}}

func (s *taskServer) answer(ctx context.Context, m *taskRequest) (object, *rpcError) {
	_, declared := m.Params.Meta.Capabilities.Extensions[tasksExtension]
	switch m.Method {
	case "server/discover":
		capabilities := object{"tools": object{}}
		if s.extension {
			capabilities["extensions"] = object{tasksExtension: object{}}
		}
		return object{
			"resultType": "complete", "supportedVersions": []string{"2026-07-28"}, "capabilities": capabilities, "ttlMs": 0, "cacheScope": "public",
			"serverInfo": object{"name": "tasks", "version": "1"},
		}, nil
	case "tools/list":
		var tools []object
		for _, name := range []string{"greet", "slow_compute", "failing_job", "protocol_error_job", "confirm_delete", "multi_input", "test_tool_with_task", "ask_twice"} {
			tools = append(tools, object{"name": name, "inputSchema": object{"type": "object"}})
		}
		return object{"resultType": "complete", "tools": tools, "ttlMs": 0, "cacheScope": "public"}, nil
	case "tools/call":
		return s.call(ctx, m, declared && s.extension)
	case "tasks/get", "tasks/update", "tasks/cancel":
		if !s.extension {
			break
		}
		if !declared {
			return nil, missing
		}
		return s.about(m)
	}
	return nil, &rpcError{Code: -32601, Message: "Method not found"}
}

func said(text string) object {
	return object{"resultType": "complete", "content": []object{{"type": "text", "text": text}}}
}

func elicit(message string) object {
	return object{"method": "elicitation/create", "params": object{"mode": "form", "message": message, "requestedSchema": object{
		"type": "object", "properties": object{"name": object{"type": "string"}, "confirm": object{"type": "boolean"}},
	}}}
}

// call is what the tools do. task: the client takes a task for an answer.
func (s *taskServer) call(ctx context.Context, m *taskRequest, task bool) (object, *rpcError) {
	args := m.Params.Arguments
	compute := func(ctx context.Context, _ *serverTask) (object, *rpcError, error) {
		select {
		case <-time.After(time.Duration(args.Seconds * float64(time.Second))):
			return said("computed " + args.Label), nil, nil
		case <-ctx.Done():
			return nil, nil, ctx.Err()
		}
	}
	switch m.Params.Name {
	case "greet":
		return said("Hello, " + args.Name + "!"), nil
	case "slow_compute":
		if task {
			return s.begin(args, compute), nil
		}
		result, fault, err := compute(ctx, nil)
		if err != nil {
			return nil, &rpcError{Code: -32603, Message: err.Error()}
		}
		return result, fault
	case "failing_job", "protocol_error_job":
		if !task {
			return nil, missing
		}
		return s.begin(args, func(ctx context.Context, t *serverTask) (object, *rpcError, error) {
			<-time.After(300 * time.Millisecond)
			if m.Params.Name == "protocol_error_job" {
				return nil, &rpcError{Code: -32603, Message: "the job broke the protocol"}, nil
			}
			return object{"content": []object{{"type": "text", "text": "the job failed"}}, "isError": true}, nil, nil
		}), nil
	case "confirm_delete", "multi_input":
		asks := object{"confirm": elicit("Delete " + args.Filename + "?")}
		if m.Params.Name == "multi_input" {
			asks = object{"first": elicit("First?"), "second": elicit("Second?")}
		}
		if task {
			return s.begin(args, func(ctx context.Context, t *serverTask) (object, *rpcError, error) {
				answers, err := s.ask(ctx, t, asks)
				if err != nil {
					return nil, nil, err
				}
				return said(fmt.Sprintf("%s %v", args.Filename, answers)), nil, nil
			}), nil
		}
		<-time.After(time.Duration(args.Seconds * float64(time.Second)))
		if len(m.Params.InputResponses) < len(asks) {
			return object{"resultType": "input_required", "inputRequests": asks, "requestState": "asked"}, nil
		}
		return said(fmt.Sprintf("%s %v state %s", args.Filename, m.Params.InputResponses, m.Params.RequestState)), nil
	case "test_tool_with_task":
		name, _ := m.Params.InputResponses["user_name"].Content["name"].(string)
		if name == "" {
			return object{"resultType": "input_required", "inputRequests": object{"user_name": elicit("What is your name?")}, "requestState": "one"}, nil
		}
		if !task {
			return nil, missing
		}
		return s.begin(args, func(context.Context, *serverTask) (object, *rpcError, error) {
			<-time.After(200 * time.Millisecond)
			return said("Hello, " + name), nil, nil
		}), nil
	case "ask_twice":
		// Twice the same key, as is allowed outside of tasks.
		<-time.After(time.Duration(args.Seconds * float64(time.Second)))
		name, _ := m.Params.InputResponses["name"].Content["name"].(string)
		switch state := m.Params.RequestState; {
		case state == "" || name == "":
			return object{"resultType": "input_required", "inputRequests": object{"name": elicit("First name?")}, "requestState": "1"}, nil
		case state == "1":
			return object{"resultType": "input_required", "inputRequests": object{"name": elicit("Second name?")}, "requestState": "2 " + name}, nil
		default:
			return said(strings.TrimPrefix(state, "2 ") + " and " + name), nil
		}
	}
	return nil, &rpcError{Code: -32602, Message: "unknown tool " + m.Params.Name}
}

// begin makes a task of work.
func (s *taskServer) begin(args taskArgs, work func(context.Context, *serverTask) (object, *rpcError, error)) object {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.count++
	ctx, cancel := context.WithCancel(context.Background())
	now := time.Now()
	t := &serverTask{
		id: fmt.Sprintf("upstream-task-%d", s.count), status: "working", created: now, updated: now,
		answers: map[string]map[string]any{}, answered: make(chan struct{}, 1), cancel: cancel,
		poll: cmp.Or(args.Poll, 100), changed: make(chan struct{}),
	}
	s.tasks[t.id] = t
	go func() {
		defer cancel()
		result, fault, err := work(ctx, t)
		s.mu.Lock()
		defer s.mu.Unlock()
		t.asks = nil
		defer t.stands()
		switch {
		case errors.Is(err, context.Canceled):
			t.status = "cancelled"
		case fault != nil:
			t.status, t.err = "failed", fault
		default:
			t.status, t.result = "completed", result
		}
	}()
	made := s.task(t)
	made["resultType"] = "task"
	return made
}

// ask waits for the client's answers.
func (s *taskServer) ask(ctx context.Context, t *serverTask, asks object) (map[string]map[string]any, error) {
	s.mu.Lock()
	t.status, t.asks = "input_required", asks
	t.stands()
	s.mu.Unlock()
	for {
		select {
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-t.answered:
		}
		s.mu.Lock()
		done := len(t.answers) == len(asks)
		if done {
			t.status, t.asks = "working", nil
			t.stands()
		}
		s.mu.Unlock()
		if done {
			return t.answers, nil
		}
	}
}

// task is its members; mu is held.
func (s *taskServer) task(t *serverTask) object {
	return object{
		"taskId": t.id, "status": t.status, "createdAt": t.created.UTC().Format(time.RFC3339), "lastUpdatedAt": t.updated.UTC().Format(time.RFC3339),
		"ttlMs": 3_600_000, "pollIntervalMs": t.poll, "statusMessage": "it is " + t.status,
	}
}

func (s *taskServer) about(m *taskRequest) (object, *rpcError) {
	s.mu.Lock()
	defer s.mu.Unlock()
	t := s.tasks[m.Params.TaskID]
	if t == nil {
		return nil, &rpcError{Code: -32602, Message: "Task not found"}
	}
	result := object{"resultType": "complete"}
	switch m.Method {
	case "tasks/get":
		result = s.task(t)
		result["resultType"] = "complete"
		open := object{}
		for k, v := range t.asks {
			if t.answers[k] == nil {
				open[k] = v
			}
		}
		switch {
		case t.err != nil:
			result["error"] = t.err
		case t.result != nil:
			result["result"] = t.result
		case len(open) > 0:
			result["inputRequests"] = open
		}
	case "tasks/update":
		for k, v := range m.Params.InputResponses {
			if _, asked := t.asks[k]; asked && t.answers[k] == nil {
				t.answers[k] = v.Content
				if v.Content == nil {
					t.answers[k] = map[string]any{}
				}
			}
		}
		select {
		case t.answered <- struct{}{}:
		default:
		}
	case "tasks/cancel":
		t.cancel()
	}
	return result, nil
}
