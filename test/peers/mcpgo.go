package peers

//lint:file-ignore SA1019 the steps are about what the modern era deprecates, sampling among it

import (
	"bytes"
	"compress/gzip"
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/mark3labs/mcp-go/mcp"
	"github.com/mark3labs/mcp-go/server"
)

// mcpGoTools are the tools of [MCPGoServer]: those of server-everything that the clients' steps call.
var mcpGoTools = []string{
	"echo", "get-resource-reference", "get-roots-list", "get-structured-content", "gzip-file-as-resource",
	"toggle-simulated-logging", "toggle-subscriber-updates", "trigger-elicitation-request",
	"trigger-long-running-operation", "trigger-sampling-request",
}

// MCPGoServer starts an MCP server made with mark3labs/mcp-go on a free port and returns the URL of its MCP endpoint. It
// does what the steps of the legacy clients ask of server-everything, in sessions, with streams that can be resumed; but
// the protocol's implementation is another one, and unlike server-everything's it goes on sending on a stream that was
// resumed. It asks the client over the GET stream, where server-everything uses the stream of the call.
func MCPGoServer(t testing.TB) string {
	t.Helper()
	quiet := slog.New(slog.DiscardHandler)
	running, stop := context.WithCancel(context.Background())
	s := &mcpGoServer{sessions: map[string]*mcpGoSession{}, running: running}
	hooks := &server.Hooks{}
	// A session is registered once, when it begins.
	hooks.AddOnRegisterSession(func(_ context.Context, session server.ClientSession) { s.session(session.SessionID()) })
	hooks.AddAfterSubscribe(func(ctx context.Context, _ any, r *mcp.SubscribeRequest, _ *mcp.EmptyResult) {
		s.subscribe(ctx, r.Params.URI)
	})
	hooks.AddAfterUnsubscribe(func(ctx context.Context, _ any, r *mcp.UnsubscribeRequest, _ *mcp.EmptyResult) {
		s.unsubscribe(ctx, r.Params.URI)
	})
	s.MCPServer = server.NewMCPServer("waybill-test-mcp-go", "1",
		server.WithHooks(hooks), server.WithLogging(), server.WithElicitation(), server.WithRoots(), server.WithCompletions(),
		server.WithToolCapabilities(true), server.WithPromptCapabilities(true), server.WithResourceCapabilities(true, true),
		server.WithPaginationLimit(4), // so that every list has pages
		server.WithPromptCompletionProvider(mcpGoCompletions{}), server.WithResourceCompletionProvider(mcpGoCompletions{}))
	s.EnableSampling()
	s.addTools()
	s.addPrompts()
	s.addResources()
	for _, method := range []string{"notifications/initialized", "notifications/roots/list_changed"} {
		s.AddNotificationHandler(method, func(ctx context.Context, _ mcp.JSONRPCNotification) {
			s.working.Go(func() { s.askRoots(context.WithoutCancel(ctx)) }) // the answer comes with another request
		})
	}

	handler := server.NewStreamableHTTPServer(s.MCPServer, server.WithStateful(true),
		server.WithEventStore(server.NewInMemoryEventStore()), server.WithStreamableHTTPLogger(quiet))
	mux := http.NewServeMux()
	mux.Handle("/mcp", handler)
	listener := httptest.NewServer(mux)
	t.Cleanup(func() {
		stop()
		listener.CloseClientConnections()
		listener.Close()
		_ = handler.Shutdown(context.Background()) // it has nothing left to shut down
		s.working.Wait()
	})
	return listener.URL + "/mcp"
}

type mcpGoServer struct {
	*server.MCPServer
	working sync.WaitGroup  // questions that await their answers
	running context.Context // done when the server closes

	mu       sync.Mutex
	sessions map[string]*mcpGoSession
}

// mcpGoSession is what is kept for a session. The server's mu guards it.
type mcpGoSession struct {
	roots      []mcp.Root
	subscribed []string
	updating   bool
	logging    bool
}

// rootsPatience bounds a question for roots: a client that has gone does not answer.
const rootsPatience = 5 * time.Second

func (s *mcpGoServer) session(id string) *mcpGoSession {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.sessions[id] == nil {
		s.sessions[id] = &mcpGoSession{}
	}
	return s.sessions[id]
}

func sessionID(ctx context.Context) string { return server.ClientSessionFromContext(ctx).SessionID() }

func (s *mcpGoServer) askRoots(ctx context.Context) {
	// As server-everything, which waits as long: what is asked before the GET stream is there, mcp-go loses.
	select {
	case <-time.After(350 * time.Millisecond):
	case <-s.running.Done():
		return
	}
	ctx, cancel := context.WithTimeout(ctx, rootsPatience)
	defer cancel()
	defer context.AfterFunc(s.running, cancel)()
	id := sessionID(ctx)
	answer, err := s.RequestRoots(ctx, mcp.ListRootsRequest{})
	if err != nil {
		return // the client has no roots, or has gone
	}
	session := s.session(id)
	s.mu.Lock()
	session.roots = answer.Roots
	s.mu.Unlock()
	// Not through the log level, which is error in mcp-go before the client sets it.
	later(func() error {
		return s.SendNotificationToSpecificClient(id, "notifications/message", map[string]any{
			"level": "info", "data": fmt.Sprintf("Roots updated: %d root(s) received from client", len(answer.Roots)),
		})
	})
}

func (s *mcpGoServer) subscribe(ctx context.Context, uri string) {
	session := s.session(sessionID(ctx))
	s.mu.Lock()
	session.subscribed = append(session.subscribed, uri)
	s.mu.Unlock()
	s.log(ctx, "Received Subscribe Resource request for URI: "+uri)
}

func (s *mcpGoServer) unsubscribe(ctx context.Context, uri string) {
	session := s.session(sessionID(ctx))
	s.mu.Lock()
	session.subscribed = slices.DeleteFunc(session.subscribed, func(u string) bool { return u == uri })
	s.mu.Unlock()
	// At once: it is for the level of this moment to keep it back.
	n := mcp.NewLoggingMessageNotification(mcp.LoggingLevelInfo, "", "Received Unsubscribe Resource request: "+uri)
	_ = s.SendLogMessageToSpecificClient(sessionID(ctx), n)
}

// log sends a message of level info over the GET stream.
func (s *mcpGoServer) log(ctx context.Context, text string) {
	n, id := mcp.NewLoggingMessageNotification(mcp.LoggingLevelInfo, "", text), sessionID(ctx)
	later(func() error { return s.SendLogMessageToSpecificClient(id, n) })
}

// later says something a moment later, when the request that it comes of has its answer: mcp-go gives a notification to
// whichever stream takes it first, and one whose answer is just being written drops it.
func later(say func() error) {
	time.AfterFunc(50*time.Millisecond, func() { _ = say() }) // a session that has no stream misses it
}

func (s *mcpGoServer) addTools() {
	add := func(name, properties string, handle func(context.Context, mcp.CallToolRequest) (*mcp.CallToolResult, error)) {
		tool := mcp.NewToolWithRawSchema(name, "As in server-everything.", json.RawMessage(`{"type":"object","properties":{`+properties+`}}`))
		if name == "get-structured-content" {
			tool.RawOutputSchema = json.RawMessage(`{"type":"object","properties":{"temperature":{"type":"number"},"conditions":{"type":"string"},"humidity":{"type":"number"}}}`)
		}
		s.AddTool(tool, handle)
	}
	add("echo", `"message":{"type":"string"}`, func(_ context.Context, r mcp.CallToolRequest) (*mcp.CallToolResult, error) {
		return mcp.NewToolResultText("Echo: " + r.GetString("message", "")), nil
	})
	add("get-structured-content", `"location":{"type":"string"}`, func(context.Context, mcp.CallToolRequest) (*mcp.CallToolResult, error) {
		weather := map[string]any{"temperature": 33, "conditions": "Cloudy", "humidity": 82}
		return mcp.NewToolResultStructured(weather, "cloudy"), nil
	})
	add("get-resource-reference", `"resourceType":{"type":"string"},"resourceId":{"type":"number"}`, func(context.Context, mcp.CallToolRequest) (*mcp.CallToolResult, error) {
		return mcp.NewToolResultError("Invalid resourceId"), nil
	})
	add("get-roots-list", ``, s.rootsList)
	add("gzip-file-as-resource", `"name":{"type":"string"},"data":{"type":"string"},"outputType":{"type":"string"}`, s.gzip)
	add("toggle-simulated-logging", ``, func(ctx context.Context, _ mcp.CallToolRequest) (*mcp.CallToolResult, error) {
		session := s.session(sessionID(ctx))
		s.mu.Lock()
		session.logging = !session.logging
		on := session.logging
		s.mu.Unlock()
		if on {
			s.log(ctx, "Info-level message")
		}
		return mcp.NewToolResultText(fmt.Sprintf("logging: %v", on)), nil
	})
	add("toggle-subscriber-updates", ``, func(ctx context.Context, _ mcp.CallToolRequest) (*mcp.CallToolResult, error) {
		session := s.session(sessionID(ctx))
		s.mu.Lock()
		session.updating = !session.updating
		on, subscribed := session.updating, slices.Clone(session.subscribed)
		s.mu.Unlock()
		for _, uri := range subscribed {
			if id := sessionID(ctx); on {
				later(func() error {
					return s.SendNotificationToSpecificClient(id, "notifications/resources/updated", map[string]any{"uri": uri})
				})
			}
		}
		return mcp.NewToolResultText(fmt.Sprintf("updates: %v", on)), nil
	})
	add("trigger-long-running-operation", `"duration":{"type":"number"},"steps":{"type":"number"}`, s.operate)
	add("trigger-sampling-request", `"prompt":{"type":"string"}`, func(ctx context.Context, r mcp.CallToolRequest) (*mcp.CallToolResult, error) {
		sampled, err := s.RequestSampling(ctx, mcp.CreateMessageRequest{CreateMessageParams: mcp.CreateMessageParams{
			Messages:  []mcp.SamplingMessage{{Role: mcp.RoleUser, Content: mcp.NewTextContent("context: " + r.GetString("prompt", ""))}},
			MaxTokens: 100,
		}})
		if err != nil {
			return nil, err
		}
		return indented("LLM sampling result: \n", sampled)
	})
	add("trigger-elicitation-request", ``, func(ctx context.Context, _ mcp.CallToolRequest) (*mcp.CallToolResult, error) {
		answer, err := s.RequestElicitation(ctx, mcp.ElicitationRequest{Params: mcp.ElicitationParams{
			Message: "Please provide inputs for the following fields:",
			RequestedSchema: json.RawMessage(`{"type":"object","properties":{"name":{"type":"string"},` +
				`"check":{"type":"boolean"}},"required":["name"]}`),
		}})
		if err != nil {
			return nil, err
		}
		if answer.Action != mcp.ElicitationResponseActionAccept {
			return mcp.NewToolResultText("User declined"), nil
		}
		user, _ := answer.Content.(map[string]any)
		return indented(fmt.Sprintf("- Name: %v\n- Agreed to terms: %v\n", user["name"], user["check"]), answer.ElicitationResponse)
	})
}

func indented(before string, v any) (*mcp.CallToolResult, error) {
	text, err := json.MarshalIndent(v, "", "  ")
	if err != nil {
		return nil, err
	}
	return mcp.NewToolResultText(before + string(text)), nil
}

func (s *mcpGoServer) rootsList(ctx context.Context, _ mcp.CallToolRequest) (*mcp.CallToolResult, error) {
	session := s.session(sessionID(ctx))
	s.mu.Lock()
	defer s.mu.Unlock()
	text := fmt.Sprintf("Current MCP Roots (%d total):\n", len(session.roots))
	for _, root := range session.roots {
		text += root.Name + " " + root.URI + "\n"
	}
	return mcp.NewToolResultText(text), nil
}

// gzip makes a resource of the session's own out of a data URL, and its list of resources changes with that.
func (s *mcpGoServer) gzip(ctx context.Context, r mcp.CallToolRequest) (*mcp.CallToolResult, error) {
	text, ok := strings.CutPrefix(r.GetString("data", ""), "data:text/plain,")
	if !ok {
		return nil, errors.New("no data URL of plain text")
	}
	var zipped bytes.Buffer
	w := gzip.NewWriter(&zipped)
	if _, err := w.Write([]byte(text)); err != nil {
		return nil, err
	}
	if err := w.Close(); err != nil {
		return nil, err
	}
	name := r.GetString("name", "")
	uri := "demo://resource/session/" + name
	contents := mcp.BlobResourceContents{URI: uri, MIMEType: "application/gzip", Blob: base64.StdEncoding.EncodeToString(zipped.Bytes())}
	id := sessionID(ctx)
	later(func() error { // which tells the client that the list has changed
		return s.AddSessionResource(id, mcp.NewResource(uri, name), func(context.Context, mcp.ReadResourceRequest) ([]mcp.ResourceContents, error) {
			return []mcp.ResourceContents{contents}, nil
		})
	})
	return &mcp.CallToolResult{Content: []mcp.Content{mcp.NewResourceLink(uri, name, "zipped", "application/gzip")}}, nil
}

// operate takes its time and reports progress on the stream of the call. It does not end with its context, because mcp-go
// cancels that too when a client leaves a stream, who may come back; so, as server-everything's, it is not stopped by
// notifications/cancelled either.
func (s *mcpGoServer) operate(ctx context.Context, r mcp.CallToolRequest) (*mcp.CallToolResult, error) {
	ctx = context.WithoutCancel(ctx)
	duration, steps := r.GetFloat("duration", 1), r.GetInt("steps", 1)
	if steps < 1 {
		return nil, fmt.Errorf("%d steps", steps)
	}
	tick := time.NewTicker(time.Duration(duration * float64(time.Second) / float64(steps)))
	defer tick.Stop()
	for i := 1; i <= steps; i++ {
		select {
		case <-tick.C:
		case <-s.running.Done():
			return nil, errors.New("the server is closing")
		}
		if r.Params.Meta != nil && r.Params.Meta.ProgressToken != nil {
			if err := s.SendNotificationToClient(ctx, "notifications/progress", map[string]any{
				"progressToken": r.Params.Meta.ProgressToken, "progress": i, "total": steps,
			}); err != nil {
				return nil, err
			}
		}
	}
	return mcp.NewToolResultText(fmt.Sprintf("Long running operation completed. Duration: %v seconds, Steps: %d.", duration, steps)), nil
}

func (s *mcpGoServer) addPrompts() {
	for _, name := range []string{"simple-prompt", "args-prompt", "completable-prompt", "resource-prompt"} {
		s.AddPrompt(mcp.NewPrompt(name), func(_ context.Context, r mcp.GetPromptRequest) (*mcp.GetPromptResult, error) {
			text := fmt.Sprintf("What's weather in %s, %s?", r.Params.Arguments["city"], r.Params.Arguments["state"])
			return &mcp.GetPromptResult{Messages: []mcp.PromptMessage{mcp.NewPromptMessage(mcp.RoleUser, mcp.NewTextContent(text))}}, nil
		})
	}
}

func (s *mcpGoServer) addResources() {
	for _, name := range []string{"architecture.md", "features.md", "instructions.md", "startup.md", "structure.md"} {
		s.AddResource(mcp.NewResource("demo://resource/static/document/"+name, name), func(_ context.Context, r mcp.ReadResourceRequest) ([]mcp.ResourceContents, error) {
			return textOf(r, "# Everything Server - Features\n\ntrigger-sampling-request"), nil
		})
	}
	for name, uri := range map[string]string{"Dynamic Text Resource": "text", "Dynamic Blob Resource": "blob"} {
		s.AddResourceTemplate(mcp.NewResourceTemplate("demo://resource/dynamic/"+uri+"/{resourceId}", name), func(_ context.Context, r mcp.ReadResourceRequest) ([]mcp.ResourceContents, error) {
			id := r.Params.URI[strings.LastIndex(r.Params.URI, "/")+1:]
			return textOf(r, "Resource "+id+": This is a plaintext resource created at some time"), nil
		})
	}
}

func textOf(r mcp.ReadResourceRequest, text string) []mcp.ResourceContents {
	return []mcp.ResourceContents{mcp.TextResourceContents{URI: r.Params.URI, MIMEType: "text/plain", Text: text}}
}

// mcpGoCompletions completes as server-everything does.
type mcpGoCompletions struct{}

func (mcpGoCompletions) CompletePromptArgument(_ context.Context, prompt string, a mcp.CompleteArgument, c mcp.CompleteContext) (*mcp.Completion, error) {
	options := []string{}
	switch {
	case prompt == "completable-prompt" && a.Name == "department":
		options = []string{"Engineering", "Sales", "Marketing", "Support"}
	case prompt == "completable-prompt" && a.Name == "name" && c.Arguments["department"] == "Sales":
		options = []string{"David", "Eve", "Frank"}
	}
	return &mcp.Completion{Values: slices.DeleteFunc(options, func(o string) bool { return !strings.HasPrefix(o, a.Value) })}, nil
}

func (mcpGoCompletions) CompleteResourceArgument(_ context.Context, _ string, a mcp.CompleteArgument, _ mcp.CompleteContext) (*mcp.Completion, error) {
	return &mcp.Completion{Values: []string{a.Value}}, nil
}
