package test

//lint:file-ignore SA1019 the tests are about what the modern era deprecates: roots, sampling, logging, subscriptions

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/modelcontextprotocol/go-sdk/jsonrpc"
	"github.com/modelcontextprotocol/go-sdk/mcp"

	"waybill.dev/schemas"
	"waybill.dev/test/gateway"
	"waybill.dev/test/peers"
)

// Clients with sessions work through the gateway with a server that has none.
func TestOldClients(t *testing.T) {
	t.Parallel() // it mostly waits
	g := gateway.Start(t, gateway.Config("servers:\n"+gateway.Server("everything", peers.EverythingServer(t), "")+gateway.Server("odd", peers.OddServer(t), "")+
		"views: [{name: few, from: {everything: [test_input_required_result_multi_round, test_x_mcp_header]}}]\n"))
	t.Run("conformance", func(t *testing.T) { peers.ConformanceLegacyTranslated(t, g.URL+"/mcp/everything") })
	for _, revision := range []string{"2025-11-25", "2025-06-18", "2025-03-26"} {
		t.Run(revision, func(t *testing.T) { exerciseOld(t, g.URL+"/mcp/everything", "", revision) })
	}
	t.Run("all servers", func(t *testing.T) { exerciseOld(t, g.URL+"/mcp", "everything__", "2025-11-25") })
	t.Run("by others", func(t *testing.T) { peers.ExerciseTranslated(t, g.URL+"/mcp/everything", g.URL+"/mcp/odd") })
	t.Run("view", func(t *testing.T) {
		c := openOld(t, g.URL+"/mcp/few", "2025-11-25")
		c.text(t, "test_input_required_result_multi_round", nil, "Multi-round complete: Ada likes green")
		c.text(t, "test_x_mcp_header", map[string]any{"region": "zürich", "level": 3}, "zürich")
	})
	for _, e := range g.Events() {
		if err := e.Check(); err != nil {
			t.Error(err)
		}
	}
	if err := g.Stop(); err != nil {
		t.Errorf("stopping: %v", err)
	}
}

// oldClient is the Go SDK's client in a session, and what it was told.
type oldClient struct {
	*mcp.ClientSession
	prefix string

	mu    sync.Mutex
	asked []string
	told  map[string]int
	news  chan struct{}
}

func (c *oldClient) tell(what string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.told[what]++
	close(c.news)
	c.news = make(chan struct{})
}

// await waits until something has been told n times.
func (c *oldClient) await(t *testing.T, what string, n int) {
	t.Helper()
	late := time.After(within)
	for {
		c.mu.Lock()
		got, news := c.told[what], c.news
		c.mu.Unlock()
		if got >= n {
			return
		}
		select {
		case <-news:
		case <-late:
			c.mu.Lock()
			defer c.mu.Unlock()
			t.Fatalf("%s was told %d times, want %d; told: %v", what, got, n, c.told)
		}
	}
}

func (c *oldClient) count(what string) int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.told[what]
}

func openOld(t *testing.T, url, revision string) *oldClient {
	t.Helper()
	c := &oldClient{told: map[string]int{}, news: make(chan struct{})}
	asked := func(what string) {
		c.mu.Lock()
		defer c.mu.Unlock()
		c.asked = append(c.asked, what)
	}
	client := mcp.NewClient(&mcp.Implementation{Name: "old", Version: "1"}, &mcp.ClientOptions{
		ElicitationHandler: func(_ context.Context, r *mcp.ElicitRequest) (*mcp.ElicitResult, error) {
			asked(r.Params.Message)
			return &mcp.ElicitResult{Action: "accept", Content: map[string]any{"name": "Ada", "color": "green", "ok": true, "context": "rain"}}, nil
		},
		CreateMessageHandler: func(_ context.Context, r *mcp.CreateMessageRequest) (*mcp.CreateMessageResult, error) {
			text, _ := r.Params.Messages[0].Content.(*mcp.TextContent)
			asked(text.Text)
			return &mcp.CreateMessageResult{Model: "m", Role: "assistant", Content: &mcp.TextContent{Text: "Grüße"}}, nil
		},
		LoggingMessageHandler: func(_ context.Context, r *mcp.LoggingMessageRequest) {
			c.tell(fmt.Sprint("log ", r.Params.Data))
		},
		ProgressNotificationHandler: func(_ context.Context, r *mcp.ProgressNotificationClientRequest) {
			c.tell(fmt.Sprint("progress ", r.Params.ProgressToken))
		},
		ToolListChangedHandler:   func(context.Context, *mcp.ToolListChangedRequest) { c.tell("tools") },
		PromptListChangedHandler: func(context.Context, *mcp.PromptListChangedRequest) { c.tell("prompts") },
		ResourceUpdatedHandler: func(_ context.Context, r *mcp.ResourceUpdatedNotificationRequest) {
			if _, there := r.Params.Meta["io.modelcontextprotocol/subscriptionId"]; there {
				c.tell("a subscription's id")
			}
			c.tell("updated " + r.Params.URI)
		},
	})
	client.AddRoots(&mcp.Root{URI: "file:///waybill/one", Name: "one"})
	s, err := client.Connect(t.Context(), &mcp.StreamableClientTransport{Endpoint: url}, &mcp.ClientSessionOptions{ProtocolVersion: revision})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.Close() }) // the gateway may be down
	c.ClientSession = s
	return c
}

func (c *oldClient) call(t *testing.T, tool string, arguments map[string]any) *mcp.CallToolResult {
	t.Helper()
	if arguments == nil {
		arguments = map[string]any{}
	}
	params := &mcp.CallToolParams{Name: c.prefix + tool, Arguments: arguments}
	params.SetProgressToken("token of " + tool)
	result, err := c.CallTool(t.Context(), params)
	if err != nil {
		t.Errorf("%s: %v", tool, err)
		return &mcp.CallToolResult{}
	}
	return result
}

// text calls a tool whose first text has to hold something.
func (c *oldClient) text(t *testing.T, tool string, arguments map[string]any, want string) {
	t.Helper()
	result := c.call(t, tool, arguments)
	if len(result.Content) == 0 {
		t.Errorf("%s: no content", tool)
		return
	}
	if text, ok := result.Content[0].(*mcp.TextContent); !ok || result.IsError || !strings.Contains(text.Text, want) {
		t.Errorf("%s: %+v, want %q", tool, result.Content[0], want)
	}
}

// exerciseOld takes everything-server's tools that want input to their end, and
// what else a session has that the server has not.
func exerciseOld(t *testing.T, url, prefix, revision string) {
	c := openOld(t, url, revision)
	c.prefix = prefix
	if got := c.InitializeResult().ProtocolVersion; got != revision {
		t.Errorf("revision %s, want %s", got, revision)
	}
	if prefix == "" {
		init := c.InitializeResult()
		if init.ServerInfo == nil || init.ServerInfo.Name != "mcp-conformance-test-server" || init.Capabilities.Tools == nil || !init.Capabilities.Tools.ListChanged || !init.Capabilities.Resources.Subscribe || init.Capabilities.Completions == nil {
			t.Errorf("initialize: %+v %+v", init.ServerInfo, init.Capabilities)
		}
	}
	if err := c.Ping(t.Context(), nil); err != nil {
		t.Errorf("ping: %v", err)
	}

	t.Run("input", func(t *testing.T) {
		c.text(t, "test_input_required_result_elicitation", nil, "Hello, Ada!")
		c.text(t, "test_input_required_result_sampling", nil, "Sampling response: Grüße")
		c.text(t, "test_input_required_result_list_roots", nil, "Client exposed 1 root(s): file:///waybill/one")
		c.text(t, "test_input_required_result_request_state", nil, "state-ok")
		c.text(t, "test_input_required_result_multiple_inputs", nil, "Grüße Ada — 1 root(s) visible")
		c.text(t, "test_input_required_result_multi_round", nil, "Multi-round complete: Ada likes green")
		c.text(t, "test_input_required_result_tampered_state", nil, "state-ok")
		c.text(t, "test_input_required_result_capabilities", nil, "Capability-aware input requests fulfilled")
		c.text(t, "test_missing_capability", nil, "Client declared the sampling capability")
		prompt, err := c.GetPrompt(t.Context(), &mcp.GetPromptParams{Name: prefix + "test_input_required_result_prompt"})
		if err != nil || len(prompt.Messages) != 1 || prompt.Messages[0].Content.(*mcp.TextContent).Text != "Context: rain" {
			t.Errorf("prompt: %+v %v", prompt, err)
		}
		c.mu.Lock()
		defer c.mu.Unlock()
		for _, want := range []string{"What is your name?", "What is the capital of France?", "Step 1: What is your name?", "Step 2: What is your favorite color?"} {
			if !slices.Contains(c.asked, want) {
				t.Errorf("nobody asked %q: %q", want, c.asked)
			}
		}
	})
	t.Run("headers", func(t *testing.T) {
		for range 2 {
			c.text(t, "test_x_mcp_header", map[string]any{"region": "eu", "level": 3}, "eu")
		}
	})
	t.Run("progress", func(t *testing.T) {
		c.text(t, "test_tool_with_progress", nil, "token of test_tool_with_progress")
		c.await(t, "progress token of test_tool_with_progress", 3)
	})
	t.Run("log", func(t *testing.T) {
		c.text(t, "test_tool_with_logging", nil, "logging executed")
		if n := c.count("log Tool execution completed"); n != 0 {
			t.Errorf("%d log messages before a level was set", n)
		}
		if err := c.SetLoggingLevel(t.Context(), &mcp.SetLoggingLevelParams{Level: "error"}); err != nil {
			t.Fatal(err)
		}
		c.text(t, "test_tool_with_logging", nil, "logging executed")
		if err := c.SetLoggingLevel(t.Context(), &mcp.SetLoggingLevelParams{Level: "info"}); err != nil {
			t.Fatal(err)
		}
		c.text(t, "test_tool_with_logging", nil, "logging executed")
		c.await(t, "log Tool execution completed", 1)
		if n := c.count("log Tool execution completed"); n != 1 {
			t.Errorf("%d log messages, want that of the call with the level info", n)
		}
		if err := c.SetLoggingLevel(t.Context(), &mcp.SetLoggingLevelParams{Level: "loud"}); err == nil {
			t.Error("a level that there is not was set")
		}
	})
	t.Run("lists", func(t *testing.T) {
		var tools []string
		for tool, err := range c.Tools(t.Context(), nil) {
			if err != nil {
				t.Fatal(err)
			}
			tools = append(tools, tool.Name)
		}
		if !slices.Contains(tools, prefix+"test_simple_text") {
			t.Errorf("tools: %q", tools)
		}
		read, err := c.ReadResource(t.Context(), &mcp.ReadResourceParams{URI: uriAt(prefix, "test://static-text")})
		if err != nil || len(read.Contents) != 1 || read.Contents[0].Text != "This is the content of the static text resource." {
			t.Errorf("read: %+v %v", read, err)
		}
		_, err = c.ReadResource(t.Context(), &mcp.ReadResourceParams{URI: uriAt(prefix, "test://not-there")})
		if rpc := new(jsonrpc.Error); !errors.As(err, &rpc) || rpc.Code != -32002 {
			t.Errorf("a resource that is not there: %v", err)
		}
	})
	t.Run("listens", func(t *testing.T) {
		tools, prompts := c.count("tools"), c.count("prompts")
		c.text(t, "test_trigger_tool_change", nil, "published")
		c.await(t, "tools", tools+1)
		c.text(t, "test_trigger_prompt_change", nil, "published")
		c.await(t, "prompts", prompts+1)
		// The server says every 3 s that this one has changed.
		uri := uriAt(prefix, "test://watched-resource")
		if err := c.Subscribe(t.Context(), &mcp.SubscribeParams{URI: uri}); err != nil {
			t.Fatal(err)
		}
		c.await(t, "updated "+uri, 1)
		tools = c.count("tools")
		c.text(t, "test_trigger_tool_change", nil, "published")
		c.await(t, "tools", tools+1)
		if err := c.Unsubscribe(t.Context(), &mcp.UnsubscribeParams{URI: uri}); err != nil {
			t.Fatal(err)
		}
		if n := c.count("a subscription's id"); n > 0 {
			t.Errorf("%d messages have the id of a subscription that the client has not made", n)
		}
	})
}

// uriAt is a uri as it is called at an endpoint.
func uriAt(prefix, uri string) string {
	if prefix == "" {
		return uri
	}
	return "waybill://everything/" + uri
}

// What a client has set in its session outlives a gateway that is killed, though
// the server knows nothing of it.
func TestOldClientSurvives(t *testing.T) {
	g := gateway.Start(t, gateway.Config("servers:\n"+gateway.Server("everything", peers.EverythingServer(t), "")))
	s, _, err := peers.OpenLegacy(t.Context(), peers.Endpoint{URL: g.URL + "/mcp/everything"}, "2025-11-25", map[string]any{"elicitation": struct{}{}, "sampling": struct{}{}})
	if err != nil {
		t.Fatal(err)
	}
	do := func(method string, params any) json.RawMessage {
		t.Helper()
		result, err := s.Call(t.Context(), method, params)
		if err != nil {
			t.Fatalf("%s: %v", method, err)
		}
		return result
	}
	do("logging/setLevel", map[string]any{"level": "error"})
	do("logging/setLevel", map[string]any{"level": "info"})
	do("resources/subscribe", map[string]any{"uri": "test://static-text"})
	do("resources/subscribe", map[string]any{"uri": "test://watched-resource"})
	do("resources/unsubscribe", map[string]any{"uri": "test://static-text"})
	for range 2 {
		g.Kill()
		g.Restart()
		stream, err := s.Request(t.Context(), "tools/call", map[string]any{"name": "test_tool_with_logging", "arguments": struct{}{}})
		if err != nil {
			t.Fatal(err)
		}
		logged := 0
		for {
			_, m, err := stream.Message()
			if err != nil {
				t.Fatal(err)
			}
			if m.Method == "" {
				break
			}
			if m.Method == "notifications/message" {
				logged++
			}
		}
		_ = stream.Close() // it has ended
		if logged != 3 {
			t.Errorf("%d log messages after the gateway was killed, want 3", logged)
		}
		// The same for what the server says by itself, every 3 s.
		key := schemas.SessionKey(stream.Header.Get("Waybill-Session-Key"))
		updates := func() (n int) {
			for _, e := range g.Session(key) {
				if d, ok := e.Data.(*schemas.Notified); ok && d.Method == "notifications/resources/updated" {
					if n++; !strings.Contains(string(e.Body), `"params":{"uri":"test://watched-resource"}`) {
						t.Errorf("updated %s", e.Body)
					}
				}
			}
			return n
		}
		before := updates()
		if !becomes(within, func() bool { return updates() > before }) {
			t.Error("nothing is heard any more of the resource that the client has subscribed to")
		}
		// And the client is asked as before.
		stream, err = s.Request(t.Context(), "tools/call", map[string]any{"name": "test_input_required_result_elicitation", "arguments": struct{}{}})
		if err != nil {
			t.Fatal(err)
		}
		_, asked, err := stream.Message()
		if err != nil || asked.Method != "elicitation/create" {
			t.Fatalf("asked %s %v", asked.Method, err)
		}
		if status, err := s.Send(t.Context(), peers.Message{ID: asked.ID, Result: json.RawMessage(`{"action":"accept","content":{"name":"Bob"}}`)}); err != nil || status != http.StatusAccepted {
			t.Fatalf("answering: %d %v", status, err)
		}
		if answer, err := stream.Answer(); err != nil || !strings.Contains(string(answer.Result), "Hello, Bob!") {
			t.Errorf("answered %s %v %v", answer.Result, answer.Error, err)
		}
		_ = stream.Close() // it has ended
	}
	connected := 0
	for _, e := range g.Events() {
		if c, ok := e.Data.(*schemas.Connected); ok {
			connected++
			if c.Revision != "2026-07-28" || c.Upstream != "" {
				t.Errorf("connected %+v", c)
			}
		}
	}
	if connected == 0 {
		t.Error("the log does not know that the session is connected to the server")
	}
}

// A gateway that is killed while it waits for the client: of a tool that may have
// had an effect the outcome is unknown, and it is not called again; a prompt is
// asked for again, and the client too.
func TestOldClientAskedAndKilled(t *testing.T) {
	g := gateway.Start(t, gateway.Config("servers:\n"+gateway.Server("everything", peers.EverythingServer(t), "")))
	s, _, err := peers.OpenLegacy(t.Context(), peers.Endpoint{URL: g.URL + "/mcp/everything"}, "2025-11-25", map[string]any{"elicitation": struct{}{}})
	if err != nil {
		t.Fatal(err)
	}
	begin := func(method, name string) (stream *peers.LegacyStream, asked peers.Message) {
		t.Helper()
		stream, err := s.Request(t.Context(), method, map[string]any{"name": name})
		if err != nil {
			t.Fatal(err)
		}
		if _, asked, err = stream.Message(); err != nil || asked.Method != "elicitation/create" {
			t.Fatalf("asked %s %v", asked.Method, err)
		}
		return stream, asked
	}
	tool, _ := begin("tools/call", "test_input_required_result_elicitation")
	prompt, before := begin("prompts/get", "test_input_required_result_prompt")
	g.Kill()
	_, _ = tool.Close(), prompt.Close() // they were cut off
	g.Restart()
	again := func(stream *peers.LegacyStream) *peers.LegacyStream {
		t.Helper()
		resumed, err := s.Listen(t.Context(), stream.LastID)
		if err != nil {
			t.Fatal(err)
		}
		resumed.ID = stream.ID
		t.Cleanup(func() { _ = resumed.Close() }) // it has ended
		return resumed
	}
	if answer, err := again(tool).Answer(); err != nil || answer.Error == nil || !strings.Contains(string(answer.Error.Data), `"unknown"`) {
		t.Errorf("the tool: %+v %v", answer, err)
	}
	rest := again(prompt)
	_, asked, err := rest.Message()
	if err != nil || asked.Method != "elicitation/create" || string(asked.ID) == string(before.ID) {
		t.Fatalf("asked again %+v %v", asked, err)
	}
	accept := json.RawMessage(`{"action":"accept","content":{"context":"snow"}}`)
	if status, err := s.Send(t.Context(), peers.Message{ID: asked.ID, Result: accept}); err != nil || status != http.StatusAccepted {
		t.Fatalf("answering: %d %v", status, err)
	}
	if answer, err := rest.Answer(); err != nil || !strings.Contains(string(answer.Result), "Context: snow") {
		t.Errorf("the prompt: %+v %v", answer, err)
	}
}

// A client that takes a call back has its stream closed at the server, which is
// told so in no other way.
func TestOldClientCancels(t *testing.T) {
	begun, left := make(chan struct{}), make(chan struct{})
	server := mcp.NewServer(&mcp.Implementation{Name: "slow", Version: "1"}, nil)
	mcp.AddTool(server, &mcp.Tool{Name: "slow"}, func(ctx context.Context, r *mcp.CallToolRequest, _ struct{}) (*mcp.CallToolResult, any, error) {
		_ = r.Session.NotifyProgress(ctx, &mcp.ProgressNotificationParams{ProgressToken: r.Params.GetProgressToken(), Progress: 1}) // the client's await tells
		close(begun)
		<-ctx.Done()
		close(left)
		return nil, nil, ctx.Err()
	})
	up := httptest.NewServer(mcp.NewStreamableHTTPHandler(func(*http.Request) *mcp.Server { return server },
		&mcp.StreamableHTTPOptions{Stateless: true, PropagateRequestCancellation: true}))
	t.Cleanup(func() { up.CloseClientConnections(); up.Close() })
	g := gateway.Start(t, gateway.Config("servers:\n"+gateway.Server("slow", up.URL, "")))
	c := openOld(t, g.URL+"/mcp/slow", "2025-11-25")
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() {
		params := &mcp.CallToolParams{Name: "slow", Arguments: struct{}{}}
		params.SetProgressToken("p")
		_, err := c.CallTool(ctx, params)
		ended <- err
	}()
	<-begun
	c.await(t, "progress p", 1)
	cancel()
	if err := <-ended; err == nil {
		t.Error("the call has an answer")
	}
	select {
	case <-left:
	case <-time.After(within):
		t.Error("the server goes on")
	}
	if !becomes(within, func() bool {
		return slices.ContainsFunc(g.Events(), func(e schemas.Event) bool { return e.Kind() == schemas.KindCancelled })
	}) {
		t.Error("the call is not cancelled in the log")
	}
}
