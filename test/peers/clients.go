package peers

import (
	"context"
	"encoding/json"
	"errors"
	"os"
	"os/exec"
	"slices"
	"testing"

	"github.com/modelcontextprotocol/go-sdk/jsonrpc"
	"github.com/modelcontextprotocol/go-sdk/mcp"
)

// modern is the revision that the clients must settle on.
const modern = "2026-07-28"

// tools are what a client calls of everything-server, each once and in this order.
var tools = struct {
	Simple   string // answers a text
	Failing  string // answers with isError
	Progress string // reports progress, then answers
	Asking   string // asks for the user's name before it answers: two calls
	Unknown  string // is not there
}{
	"test_simple_text", "test_error_handling", "test_tool_with_progress", "test_input_required_result_elicitation", "no_such_tool",
}

// seen is what a client saw, in the same terms for every client.
type seen struct {
	Revision string    // that it settled on
	Listed   []string  // names of tools
	Simple   string    // text
	Failing  bool      // isError
	Progress []float64 // reported
	Asking   string    // text, the question answered with "Ada"
	Unknown  int64     // code of the JSON-RPC error
}

func (s seen) check(t testing.TB) {
	t.Helper()
	if s.Revision != modern {
		t.Errorf("settled on revision %q, want %s", s.Revision, modern)
	}
	for _, tool := range []string{tools.Simple, tools.Failing, tools.Progress, tools.Asking} {
		if !slices.Contains(s.Listed, tool) {
			t.Errorf("%s is not among the tools listed: %q", tool, s.Listed)
		}
	}
	if s.Simple != simpleText {
		t.Errorf("%s: %q, want %q", tools.Simple, s.Simple, simpleText)
	}
	if !s.Failing {
		t.Errorf("%s: no isError", tools.Failing)
	}
	if want := []float64{0, 50, 100}; !slices.Equal(s.Progress, want) {
		t.Errorf("%s: progress %v, want %v", tools.Progress, s.Progress, want)
	}
	if want := "Hello, Ada!"; s.Asking != want {
		t.Errorf("%s: %q, want %q", tools.Asking, s.Asking, want)
	}
	if s.Unknown != jsonrpc.CodeInvalidParams {
		t.Errorf("%s: error %d, want %d", tools.Unknown, s.Unknown, jsonrpc.CodeInvalidParams)
	}
}

const simpleText = "This is a simple text response for testing."

// ExerciseTypeScript lists and calls everything-server's tools at an endpoint with the TypeScript SDK's client, which
// finds out the revision by itself. A command is started instead and spoken to by stdin and stdout.
func ExerciseTypeScript(t testing.TB, url string, command ...string) {
	t.Helper()
	names, err := json.Marshal(tools)
	if err != nil {
		t.Fatal(err)
	}
	out := NodeScript(t, beside("typescript.mjs"), append([]string{url, string(names)}, command...)...)
	var s seen
	if err := json.Unmarshal([]byte(out.Stdout), &s); err != nil || out.Exit != 0 {
		t.Fatalf("TypeScript client: exit %d\n%s%s", out.Exit, out.Stdout, out.Stderr)
	}
	s.check(t)
}

// ExerciseGoSDK lists and calls everything-server's tools at an endpoint with the Go SDK's client, which finds out
// the revision by itself. A command is started instead and spoken to by stdin and stdout.
func ExerciseGoSDK(t testing.TB, url string, command ...string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	progress := make(chan float64, 16)
	client := mcp.NewClient(&mcp.Implementation{Name: "waybill-test-go", Version: "1"}, &mcp.ClientOptions{
		ElicitationHandler: func(context.Context, *mcp.ElicitRequest) (*mcp.ElicitResult, error) {
			return &mcp.ElicitResult{Action: "accept", Content: map[string]any{"name": "Ada"}}, nil
		},
		ProgressNotificationHandler: func(_ context.Context, r *mcp.ProgressNotificationClientRequest) {
			progress <- r.Params.Progress
		},
	})
	var transport mcp.Transport = &mcp.StreamableClientTransport{Endpoint: url}
	if len(command) > 0 {
		transport = goCommand(command)
	}
	session, err := client.Connect(ctx, transport, nil)
	if err != nil {
		t.Fatalf("Go client: %v", err)
	}
	defer session.Close()

	s := seen{Revision: session.InitializeResult().ProtocolVersion}
	for tool, err := range session.Tools(ctx, nil) {
		if err != nil {
			t.Fatalf("Go client: listing tools: %v", err)
		}
		s.Listed = append(s.Listed, tool.Name)
	}
	call := func(tool string, meta mcp.Meta) *mcp.CallToolResult {
		t.Helper()
		result, err := session.CallTool(ctx, &mcp.CallToolParams{Meta: meta, Name: tool})
		if err != nil {
			t.Fatalf("Go client: %s: %v", tool, err)
		}
		return result
	}
	s.Simple = text(call(tools.Simple, nil))
	s.Failing = call(tools.Failing, nil).IsError
	call(tools.Progress, mcp.Meta{"progressToken": "waybill"})
	for len(s.Progress) < 3 { // the client may hand them on after the call's answer
		select {
		case p := <-progress:
			s.Progress = append(s.Progress, p)
		case <-ctx.Done():
			t.Fatalf("Go client: progress %v, and no more came", s.Progress)
		}
	}
	s.Asking = text(call(tools.Asking, nil))
	_, err = session.CallTool(ctx, &mcp.CallToolParams{Name: tools.Unknown})
	if rpc := new(jsonrpc.Error); errors.As(err, &rpc) {
		s.Unknown = rpc.Code
	} else {
		t.Errorf("Go client: %s: %v, want a JSON-RPC error", tools.Unknown, err)
	}
	s.check(t)
}

// ExercisePython lists and calls everything-server's tools with the Python SDK's client, which finds out the revision by
// itself, speaking to a command by stdin and stdout.
func ExercisePython(t testing.TB, command ...string) {
	t.Helper()
	names, err := json.Marshal(tools)
	if err != nil {
		t.Fatal(err)
	}
	out := python(t, append([]string{beside("modern.py"), string(names)}, command...)...)
	var s seen
	if err := json.Unmarshal([]byte(out.Stdout), &s); err != nil || out.Exit != 0 {
		t.Fatalf("Python client: exit %d\n%s%s", out.Exit, out.Stdout, out.Stderr)
	}
	s.check(t)
}

// goCommand is the Go SDK's way to a command.
func goCommand(command []string) mcp.Transport {
	cmd := exec.Command(command[0], command[1:]...)
	cmd.Stderr = os.Stderr
	dieWithParent(cmd)
	return &mcp.CommandTransport{Command: cmd}
}

// text returns the text of a result that is one text.
func text(r *mcp.CallToolResult) string {
	if len(r.Content) == 1 {
		if c, ok := r.Content[0].(*mcp.TextContent); ok {
			return c.Text
		}
	}
	return ""
}

// Inspector runs the Inspector's command line, which takes the URL of an endpoint first.
func Inspector(t testing.TB, args ...string) Output {
	t.Helper()
	launcher := pkg(t, "@modelcontextprotocol", "inspector", "clients", "launcher", "build", "index.js")
	return node(t, append([]string{launcher, "--cli"}, args...)...)
}

// ExerciseInspector lists everything-server's tools at an endpoint with the Inspector, and calls one. A command is started
// instead and spoken to by stdin and stdout.
func ExerciseInspector(t testing.TB, url string, command ...string) {
	t.Helper()
	inspect := func(into any, method string, args ...string) {
		t.Helper()
		at := []string{url, "--transport", "http"}
		if len(command) > 0 {
			at = command
		}
		out := Inspector(t, slices.Concat(at, []string{"--protocol-era", "modern",
			"--format", "json", "--quiet", "--method", method}, args)...)
		if err := json.Unmarshal([]byte(out.Stdout), into); err != nil || out.Exit != 0 {
			t.Fatalf("Inspector: %s: exit %d\n%s%s", method, out.Exit, out.Stdout, out.Stderr)
		}
	}
	var list struct {
		Result struct{ Tools []struct{ Name string } }
	}
	inspect(&list, "tools/list")
	if !slices.ContainsFunc(list.Result.Tools, func(tool struct{ Name string }) bool { return tool.Name == tools.Simple }) {
		t.Errorf("Inspector: %s is not among the tools listed: %v", tools.Simple, list.Result.Tools)
	}
	var answer struct {
		Result struct{ Content []struct{ Text string } }
	}
	inspect(&answer, "tools/call", "--tool-name", tools.Simple)
	if got := answer.Result.Content; len(got) != 1 || got[0].Text != simpleText {
		t.Errorf("Inspector: %s: %v, want %q", tools.Simple, got, simpleText)
	}
}
