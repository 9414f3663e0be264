package peers

//lint:file-ignore SA1019 the steps are about what the modern era deprecates: roots, sampling, logging

import (
	"context"
	"encoding/json"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/modelcontextprotocol/go-sdk/mcp"
)

// The clients of the modern era against server-everything, which has sessions only: they find a gateway in between that
// speaks for each to the other.

// modernSeen is what a client saw.
type modernSeen struct {
	Revision string   // that it settled on
	Tools    []string // names as listed

	Roots      string         // text of get-roots-list; the server asked when the session began, outside of any call
	Echo       string         // text
	Structured map[string]any // of get-structured-content
	Progress   [][2]float64   // progress and total of a long operation, in order
	Operation  string         // its text

	Sampled, SampledAsked   string // trigger-sampling-request: its text; what the client was asked
	Elicited, ElicitedAsked string // trigger-elicitation-request: its text; what the client was asked
	Declined                string // its text when the user declines

	Quiet  bool     // a call that did not ask for them was given no log messages
	Logged []string // the levels of those that one was given that did

	Read    string // text of features.md
	Granted bool   // subscriptions/listen was acknowledged with all that was asked for
	Updated bool   // notifications/resources/updated came, and named that URI

	Cancelled bool   // a long operation that was cancelled after its first progress ended with an error
	After     string // text of echo after that
}

func (s modernSeen) check(t testing.TB, e Endpoint) {
	t.Helper()
	same := func(what string, got, want any) {
		t.Helper()
		g, _ := json.Marshal(got)
		w, _ := json.Marshal(want)
		if string(g) != string(w) {
			t.Errorf("%s: %s, want %s", what, g, w)
		}
	}
	has := func(what, got string, want ...string) {
		t.Helper()
		for _, w := range want {
			if !strings.Contains(got, w) {
				t.Errorf("%s: %q lacks %q", what, got, w)
			}
		}
	}
	same("revision", s.Revision, modern)
	for _, tool := range everythingTools {
		if !slices.Contains(s.Tools, e.Prefix+tool) {
			t.Errorf("%s is not among the tools listed: %q", tool, s.Tools)
		}
	}
	has("roots", s.Roots, "(1 total)", "file:///waybill/one")
	same("echo", s.Echo, "Echo: grüße <&> 9007199254740993")
	same("get-structured-content", s.Structured, map[string]any{"temperature": 33, "conditions": "Cloudy", "humidity": 82})
	same("progress", s.Progress, [][2]float64{{1, 4}, {2, 4}, {3, 4}, {4, 4}})
	same("trigger-long-running-operation", s.Operation, "Long running operation completed. Duration: 0.2 seconds, Steps: 4.")
	has("trigger-sampling-request", s.Sampled, "sampled: grüße", "waybill-model")
	has("what the client was asked to sample", s.SampledAsked, "what is a waybill?")
	has("trigger-elicitation-request", s.Elicited, "- Name: Ada", "- Agreed to terms: true", `"action": "accept"`)
	has("what the user was asked", s.ElicitedAsked, "provide inputs")
	has("trigger-elicitation-request, declined", s.Declined, "declined")
	same("quiet without a level", s.Quiet, true)
	if len(s.Logged) == 0 {
		t.Error("no log messages came to a call that asked for them")
	}
	has("features.md", s.Read, "# Everything Server - Features")
	same("the filter is granted", s.Granted, true)
	same("the updated resource is the one listened to", s.Updated, true)
	same("cancelled", s.Cancelled, true)
	same("echo after the cancellation", s.After, "Echo: still here")
}

// ExerciseModern takes the steps with every client, each a subtest beside the others.
func ExerciseModern(t *testing.T, e Endpoint) {
	t.Helper()
	for name, exercise := range map[string]func(testing.TB, Endpoint){
		"TypeScript": func(t testing.TB, e Endpoint) {
			exerciseModernScript(t, e, func(args string) Output { return NodeScript(t, beside("modern.mjs"), args) })
		},
		"Python SDK": func(t testing.TB, e Endpoint) {
			exerciseModernScript(t, e, func(args string) Output { return python(t, beside("modern_session.py"), args) })
		},
		"Go SDK":    exerciseModernGoSDK,
		"Inspector": exerciseModernInspector,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			exercise(t, e)
		})
	}
}

// exerciseModernScript runs a script and checks what it printed.
func exerciseModernScript(t testing.TB, e Endpoint, run func(args string) Output) {
	t.Helper()
	args, err := json.Marshal(map[string]string{"url": e.URL, "prefix": e.Prefix, "name": unique()})
	if err != nil {
		t.Fatal(err)
	}
	out := run(string(args))
	var s modernSeen
	if err := json.Unmarshal([]byte(out.Stdout), &s); err != nil || out.Exit != 0 {
		t.Fatalf("exit %d, %v\n%s%s", out.Exit, err, out.Stdout, out.Stderr)
	}
	s.check(t, e)
}

func exerciseModernGoSDK(t testing.TB, e Endpoint) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	var mu sync.Mutex
	var s modernSeen
	progress := make(chan [2]float64, 256)
	updates := make(chan string, 64)
	var levels []string
	elicit := &mcp.ElicitResult{Action: "accept", Content: map[string]any{"name": "Ada", "check": true}}
	client := mcp.NewClient(&mcp.Implementation{Name: unique(), Version: "1"}, &mcp.ClientOptions{
		ElicitationHandler: func(_ context.Context, r *mcp.ElicitRequest) (*mcp.ElicitResult, error) {
			s.ElicitedAsked = r.Params.Message
			return elicit, nil
		},
		CreateMessageHandler: func(_ context.Context, r *mcp.CreateMessageRequest) (*mcp.CreateMessageResult, error) {
			if c, ok := r.Params.Messages[0].Content.(*mcp.TextContent); ok {
				s.SampledAsked = c.Text
			}
			return &mcp.CreateMessageResult{Model: "waybill-model", Role: "assistant", Content: &mcp.TextContent{Text: "sampled: grüße"}}, nil
		},
		ProgressNotificationHandler: func(_ context.Context, r *mcp.ProgressNotificationClientRequest) {
			progress <- [2]float64{r.Params.Progress, r.Params.Total}
		},
		LoggingMessageHandler: func(_ context.Context, r *mcp.LoggingMessageRequest) {
			mu.Lock()
			defer mu.Unlock()
			levels = append(levels, string(r.Params.Level))
		},
		ResourceUpdatedHandler: func(_ context.Context, r *mcp.ResourceUpdatedNotificationRequest) {
			updates <- r.Params.URI
		},
	})
	client.AddRoots(&mcp.Root{URI: "file:///waybill/one", Name: "one"})
	session, err := client.Connect(ctx, &mcp.StreamableClientTransport{Endpoint: e.URL}, nil)
	if err != nil {
		t.Fatalf("Go client: %v", err)
	}
	defer session.Close()
	s.Revision = session.InitializeResult().ProtocolVersion
	for tool, err := range session.Tools(ctx, nil) {
		if err != nil {
			t.Fatalf("Go client: listing tools: %v", err)
		}
		s.Tools = append(s.Tools, tool.Name)
	}
	result := func(tool string, args map[string]any, meta mcp.Meta) *mcp.CallToolResult {
		t.Helper()
		if args == nil {
			args = map[string]any{} // a nil map would be written as null
		}
		r, err := session.CallTool(ctx, &mcp.CallToolParams{Meta: meta, Name: e.Prefix + tool, Arguments: args})
		if err != nil {
			t.Fatalf("Go client: %s: %v", tool, err)
		}
		return r
	}
	call := func(tool string, args map[string]any, meta mcp.Meta) string {
		t.Helper()
		var all []string
		for _, c := range result(tool, args, meta).Content {
			if c, ok := c.(*mcp.TextContent); ok {
				all = append(all, c.Text)
			}
		}
		return strings.Join(all, "\n")
	}
	s.Roots = call("get-roots-list", nil, nil)
	s.Echo = call("echo", map[string]any{"message": "grüße <&> 9007199254740993"}, nil)
	s.Structured, _ = result("get-structured-content", map[string]any{"location": "New York"}, nil).StructuredContent.(map[string]any)
	s.Operation = call("trigger-long-running-operation", map[string]any{"duration": 0.2, "steps": 4}, mcp.Meta{"progressToken": "p"})
	for len(s.Progress) < 4 {
		select {
		case p := <-progress:
			s.Progress = append(s.Progress, p)
		case <-ctx.Done():
			t.Fatalf("Go client: progress %v, and no more came", s.Progress)
		}
	}
	s.Sampled = call("trigger-sampling-request", map[string]any{"prompt": "what is a waybill?", "maxTokens": 10}, nil)
	s.Elicited = call("trigger-elicitation-request", nil, nil)
	elicit = &mcp.ElicitResult{Action: "decline"}
	s.Declined = call("trigger-elicitation-request", nil, nil)

	long := map[string]any{"duration": 5.3, "steps": 1}
	call("toggle-simulated-logging", nil, nil)
	call("trigger-long-running-operation", long, nil)
	mu.Lock()
	s.Quiet = len(levels) == 0
	mu.Unlock()
	call("trigger-long-running-operation", long, mcp.Meta{mcp.MetaKeyLogLevel: "debug"})
	mu.Lock()
	s.Logged = slices.Clone(levels)
	mu.Unlock()
	call("toggle-simulated-logging", nil, nil)

	document := ""
	for r, err := range session.Resources(ctx, nil) {
		if err != nil {
			t.Fatalf("Go client: listing resources: %v", err)
		}
		if strings.HasSuffix(r.Name, "features.md") {
			document = r.URI
		}
	}
	read, err := session.ReadResource(ctx, &mcp.ReadResourceParams{URI: document})
	if err != nil {
		t.Fatalf("Go client: reading %q: %v", document, err)
	}
	s.Read = read.Contents[0].Text
	if err := session.Subscribe(ctx, &mcp.SubscribeParams{URI: document}); err != nil {
		t.Fatalf("Go client: subscribing: %v", err)
	}
	s.Granted = true // or it would be an error
	call("toggle-subscriber-updates", nil, nil)
	select {
	case uri := <-updates:
		s.Updated = uri == document
	case <-ctx.Done():
		t.Fatal("Go client: no resource was updated")
	}
	call("toggle-subscriber-updates", nil, nil)
	if err := session.Unsubscribe(ctx, &mcp.UnsubscribeParams{URI: document}); err != nil {
		t.Errorf("Go client: unsubscribing: %v", err)
	}

	one, stop := context.WithCancel(ctx)
	defer stop()
	ended := make(chan error, 1)
	go func() {
		_, err := session.CallTool(one, &mcp.CallToolParams{
			Meta: mcp.Meta{"progressToken": "q"}, Name: e.Prefix + "trigger-long-running-operation", Arguments: map[string]any{"duration": 20, "steps": 100},
		})
		ended <- err
	}()
	select {
	case <-progress:
	case <-ctx.Done():
		t.Fatal("Go client: no progress of what is to be cancelled")
	}
	stop()
	s.Cancelled = <-ended != nil
	s.After = call("echo", map[string]any{"message": "still here"}, nil)
	s.check(t, e)
}

func exerciseModernInspector(t testing.TB, e Endpoint) {
	t.Helper()
	inspect := func(into any, method string, args ...string) {
		t.Helper()
		out := Inspector(t, append([]string{e.URL, "--transport", "http", "--protocol-era", "modern",
			"--format", "json", "--quiet", "--method", method}, args...)...)
		if err := json.Unmarshal([]byte(out.Stdout), into); err != nil || out.Exit != 0 {
			t.Fatalf("Inspector: %s: exit %d\n%s%s", method, out.Exit, out.Stdout, out.Stderr)
		}
	}
	var list struct {
		Result struct{ Tools []struct{ Name string } }
	}
	inspect(&list, "tools/list")
	if !slices.ContainsFunc(list.Result.Tools, func(tool struct{ Name string }) bool { return tool.Name == e.Prefix+"echo" }) {
		t.Errorf("Inspector: echo is not among the tools listed: %v", list.Result.Tools)
	}
	var answer struct {
		Result struct{ Content []struct{ Text string } }
	}
	inspect(&answer, "tools/call", "--tool-name", e.Prefix+"echo", "--tool-arg", "message=inspected")
	if got := answer.Result.Content; len(got) != 1 || got[0].Text != "Echo: inspected" {
		t.Errorf("Inspector: echo: %v", got)
	}
	var resources struct {
		Result struct{ Resources []struct{ Name string } }
	}
	inspect(&resources, "resources/list")
	if len(resources.Result.Resources) == 0 {
		t.Error("Inspector: no resources are listed")
	}
}
