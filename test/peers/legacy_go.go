package peers

//lint:file-ignore SA1019 the steps are about what the modern era deprecates: roots, sampling, logging, ping, subscriptions

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	mcpgo "github.com/mark3labs/mcp-go/client"
	mcpgotransport "github.com/mark3labs/mcp-go/client/transport"
	mcpgotypes "github.com/mark3labs/mcp-go/mcp"
	"github.com/modelcontextprotocol/go-sdk/jsonrpc"
	"github.com/modelcontextprotocol/go-sdk/mcp"
)

// The clients that are written in Go: two SDKs, and plain HTTP. They share one script, for which each is brought down to
// requests by method; the SDKs' typed methods do the work.

// legacyClient is a client in a session. Its host answers what the server asks.
type legacyClient interface {
	revision() string
	// request returns the result; an error that the server answered is a *RPCError. Cancelling ctx cancels
	// the request.
	request(ctx context.Context, method string, params map[string]any) (json.RawMessage, error)
	// rootsChanged tells the server that the host's roots are others now.
	rootsChanged(ctx context.Context) error
	// end deletes the session.
	end() error
}

// host is the application around a client: it answers the server's questions and keeps what the server tells.
type host struct {
	mu      sync.Mutex
	told    []Message     // notifications, in the order in which the client handed them on
	more    chan struct{} // closed when there is more; nil if nobody waits
	asked   string        // what the last question said
	decline bool          // what the user does when asked
	roots   []root
}

type root struct {
	URI  string `json:"uri"`
	Name string `json:"name"`
}

// tell keeps a notification.
func (h *host) tell(method string, params any) {
	raw, err := json.Marshal(params)
	if err != nil {
		raw = fmt.Append(nil, "unreadable: ", err)
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	h.told = append(h.told, Message{Method: method, Params: raw})
	if h.more != nil {
		close(h.more)
		h.more = nil
	}
}

// await returns the first notification, not counting the first from ones, that fits, and waits for it.
func (h *host) await(ctx context.Context, method string, from int, fits func(params json.RawMessage) bool) (json.RawMessage, error) {
	for {
		h.mu.Lock()
		told := h.told
		if h.more == nil {
			h.more = make(chan struct{})
		}
		more := h.more
		h.mu.Unlock()
		for _, m := range told[from:] {
			if m.Method == method && fits(m.Params) {
				return m.Params, nil
			}
		}
		select {
		case <-more:
		case <-ctx.Done():
			return nil, fmt.Errorf("waiting for %s: %w; came: %s", method, ctx.Err(), told)
		}
	}
}

func (h *host) count() int {
	h.mu.Lock()
	defer h.mu.Unlock()
	return len(h.told)
}

// answer answers a request of the server's.
func (h *host) answer(method string, params any) (any, error) {
	raw, err := json.Marshal(params)
	if err != nil {
		return nil, err
	}
	var p struct {
		Message  string
		Messages []struct{ Content struct{ Text string } }
	}
	if err := json.Unmarshal(raw, &p); err != nil {
		return nil, err
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	switch method {
	case "sampling/createMessage":
		if len(p.Messages) != 1 {
			return nil, fmt.Errorf("%d messages to sample", len(p.Messages))
		}
		h.asked = p.Messages[0].Content.Text
		return map[string]any{"model": "waybill-model", "role": "assistant", "content": map[string]any{"type": "text", "text": "sampled: grüße"}}, nil
	case "elicitation/create":
		h.asked = p.Message
		if h.decline {
			return map[string]any{"action": "decline"}, nil
		}
		return map[string]any{"action": "accept", "content": map[string]any{"name": "Ada", "check": true}}, nil
	case "roots/list":
		return map[string]any{"roots": h.roots}, nil
	case "ping":
		return map[string]any{}, nil
	}
	return nil, fmt.Errorf("the server asks %s", method)
}

// answerAs is answer for an SDK that has types for both.
func answerAs[R any](h *host, method string, params any) (*R, error) {
	answer, err := h.answer(method, params)
	if err != nil {
		return nil, err
	}
	return convert[R](answer)
}

// convert goes from one form of the same JSON to another.
func convert[T any](from any) (*T, error) {
	raw, err := json.Marshal(from)
	if err != nil {
		return nil, err
	}
	to := new(T)
	return to, json.Unmarshal(raw, to)
}

// stepsPatience bounds all steps of one client, which take a few seconds.
const stepsPatience = time.Minute

// script is one run of the steps by a client. What fails there ends the test.
type script struct {
	t      testing.TB
	ctx    context.Context
	e      Endpoint
	host   *host
	client legacyClient
}

// exerciseLegacyGo takes the steps with a client that connect makes, and checks what it saw. One stream is cut, as how says.
func exerciseLegacyGo(t testing.TB, e Endpoint, revision string, how cut, connect func(context.Context, Endpoint, *host) (legacyClient, error)) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), stepsPatience)
	defer cancel()
	tap := newTap(t, e, how)
	through := e
	through.URL = tap.URL
	h := &host{roots: []root{{"file:///waybill/one", "one"}}}
	client, err := connect(ctx, through, h)
	if err != nil {
		t.Fatalf("connecting: %v", err)
	}
	seen := script{t, ctx, e, h, client}.run()
	if err := client.end(); err != nil {
		t.Errorf("ending the session: %v", err)
	}
	seen.check(t, e, revision)
	tap.check(t, e)
}

func (s script) run() (seen legacySeen) {
	s.t.Helper()
	seen.Revision = s.client.revision()

	// Roots come first: the server asks for them when the session begins, over the GET stream, so what it then logs tells
	// that the stream is open.
	s.logged(0, "Roots updated: 1 root")
	seen.Roots[0] = s.text("get-roots-list", nil)
	s.host.mu.Lock()
	s.host.roots = append(s.host.roots, root{"file:///waybill/two", "two"})
	s.host.mu.Unlock()
	if err := s.client.rootsChanged(s.ctx); err != nil {
		s.t.Fatalf("roots/list_changed: %v", err)
	}
	s.logged(0, "Roots updated: 2 root")
	seen.Roots[1] = s.text("get-roots-list", nil)

	seen.Tools = names(s.list("tools/list", "tools"))
	seen.Echo = s.text("echo", map[string]any{"message": "grüße <&> 9007199254740993"})
	seen.Structured = s.call("get-structured-content", map[string]any{"location": "New York"}).StructuredContent
	seen.Failing = s.call("get-resource-reference", map[string]any{"resourceType": "Text", "resourceId": -1}).IsError
	if unknown, err := s.try("no-such-tool", nil, ""); err != nil {
		seen.Unknown = err.Error()
		if rpc := new(RPCError); errors.As(err, &rpc) {
			seen.Unknown = fmt.Sprintf("error %d", rpc.Code)
		}
	} else if seen.Unknown = "result"; unknown.IsError {
		seen.Unknown = "isError"
	}

	seen.Operation, seen.Progress = s.operation(0.2, 4)

	// What is logged below the level must not come. One that is above it tells that there is nothing more to wait for.
	resources := s.list("resources/list", "resources")
	seen.Resources = names(resources)
	document := s.find(resources, "features.md").URI
	s.do("logging/setLevel", map[string]any{"level": "debug"})
	s.text("toggle-simulated-logging", nil)
	log := s.await("notifications/message", 0, func(params json.RawMessage) bool {
		return strings.Contains(strings.ReplaceAll(strings.ToLower(string(params)), " ", "-"), "-level-message")
	})
	s.into(log, &seen.Logged)
	s.text("toggle-simulated-logging", nil)
	s.do("resources/subscribe", map[string]any{"uri": document})
	s.logged(0, "Received Subscribe")
	s.text("toggle-subscriber-updates", nil)
	var updated listed
	s.into(s.await("notifications/resources/updated", 0, func(json.RawMessage) bool { return true }), &updated)
	seen.Updated = updated.URI == document
	s.text("toggle-subscriber-updates", nil)
	s.do("logging/setLevel", map[string]any{"level": "error"})
	s.do("resources/unsubscribe", map[string]any{"uri": document})
	s.do("logging/setLevel", map[string]any{"level": "info"})
	before := s.host.count()
	s.do("resources/subscribe", map[string]any{"uri": s.find(resources, "architecture.md").URI})
	s.logged(before, "Received Subscribe")
	seen.Quiet = true
	s.host.mu.Lock()
	for _, m := range s.host.told {
		seen.Quiet = seen.Quiet && !strings.Contains(string(m.Params), "Received Unsubscribe")
	}
	s.host.mu.Unlock()

	seen.Cancelled = s.cancelled()
	s.do("ping", nil)
	seen.Pinged = true

	seen.Prompts = names(s.list("prompts/list", "prompts"))
	var prompt struct {
		Messages []struct{ Content struct{ Text string } }
	}
	s.into(s.do("prompts/get", map[string]any{"name": s.e.Prefix + "args-prompt", "arguments": map[string]any{"city": "Zürich", "state": "ZH"}}), &prompt)
	if len(prompt.Messages) == 1 {
		seen.Prompt = prompt.Messages[0].Content.Text
	}
	completable := map[string]any{"type": "ref/prompt", "name": s.e.Prefix + "completable-prompt"}
	seen.Completed[0] = s.complete(completable, "department", "S", nil)
	seen.Completed[1] = s.complete(completable, "name", "", map[string]any{"department": "Sales"})

	templates := s.list("resources/templates/list", "resourceTemplates")
	seen.Templates = names(templates)
	read := s.read(document)
	seen.Read, seen.ReadURI = read.Text, read.URI == document
	template := s.find(templates, "Dynamic Text Resource").URITemplate
	seen.Template = s.read(strings.ReplaceAll(template, "{resourceId}", "7")).Text
	seen.Completed[2] = s.complete(map[string]any{"type": "ref/resource", "uri": template}, "resourceId", "7", nil)

	seen.Sampled = s.text("trigger-sampling-request", map[string]any{"prompt": "what is a waybill?"})
	seen.SampledAsked = s.asked(false)
	for _, block := range s.call("trigger-elicitation-request", nil).Content {
		seen.Elicited += block.Text + "\n"
	}
	seen.ElicitedAsked = s.asked(true)
	seen.Declined = s.call("trigger-elicitation-request", nil).Content[0].Text

	file := unique() + ".gz"
	s.call("gzip-file-as-resource", map[string]any{"name": file, "data": "data:text/plain,waybill", "outputType": "resourceLink"})
	s.await("notifications/resources/list_changed", 0, func(json.RawMessage) bool { return true })
	seen.Added = s.read(s.find(s.list("resources/list", "resources"), file).URI).Blob

	// The tap cuts this call's stream after the first progress.
	seen.ResumedOperation, seen.Resumed = s.operation(cutOperation, s.e.cutSteps())
	return seen
}

// listed is an entry of a list, and what is read.
type listed struct{ Name, URI, URITemplate, Text, Blob string }

func names(entries []listed) (names []string) {
	for _, entry := range entries {
		names = append(names, entry.Name)
	}
	return names
}

// callResult is a tool's.
type callResult struct {
	Content           []listed
	StructuredContent map[string]any
	IsError           bool
}

func (s script) into(raw json.RawMessage, to any) {
	s.t.Helper()
	if err := json.Unmarshal(raw, to); err != nil {
		s.t.Fatalf("%v: %s", err, raw)
	}
}

func (s script) do(method string, params map[string]any) json.RawMessage {
	s.t.Helper()
	result, err := s.client.request(s.ctx, method, params)
	if err != nil {
		s.t.Fatalf("%s %v: %v", method, params, err)
	}
	return result
}

func (s script) await(method string, from int, fits func(json.RawMessage) bool) json.RawMessage {
	s.t.Helper()
	params, err := s.host.await(s.ctx, method, from, fits)
	if err != nil {
		s.t.Fatal(err)
	}
	return params
}

// logged waits for a log message that begins so.
func (s script) logged(from int, begins string) {
	s.t.Helper()
	s.await("notifications/message", from, func(params json.RawMessage) bool {
		return strings.Contains(string(params), `"data":"`+begins)
	})
}

func (s script) asked(decline bool) string {
	s.host.mu.Lock()
	defer s.host.mu.Unlock()
	s.host.decline = decline
	return s.host.asked
}

func (s script) list(method, member string) (all []listed) {
	s.t.Helper()
	for params := map[string]any(nil); ; {
		var page map[string]json.RawMessage
		s.into(s.do(method, params), &page)
		var entries []listed
		s.into(page[member], &entries)
		all = append(all, entries...)
		if page["nextCursor"] == nil {
			return all
		}
		params = map[string]any{"cursor": page["nextCursor"]}
	}
}

func (s script) find(entries []listed, name string) listed {
	s.t.Helper()
	for _, entry := range entries {
		if entry.Name == name || entry.Name == s.e.Prefix+name {
			return entry
		}
	}
	s.t.Fatalf("%s is not among %q", name, names(entries))
	return listed{}
}

func (s script) read(uri string) listed {
	s.t.Helper()
	var result struct{ Contents []listed }
	s.into(s.do("resources/read", map[string]any{"uri": uri}), &result)
	if len(result.Contents) != 1 {
		s.t.Fatalf("reading %s: %d contents", uri, len(result.Contents))
	}
	return result.Contents[0]
}

func (s script) complete(ref map[string]any, argument, value string, arguments map[string]any) []string {
	s.t.Helper()
	params := map[string]any{"ref": ref, "argument": map[string]any{"name": argument, "value": value}}
	if arguments != nil {
		params["context"] = map[string]any{"arguments": arguments}
	}
	var result struct{ Completion struct{ Values []string } }
	s.into(s.do("completion/complete", params), &result)
	return result.Completion.Values
}

// try calls a tool, with a progress token if one is given.
func (s script) try(tool string, args map[string]any, token string) (callResult, error) {
	return s.tryUntil(s.ctx, tool, args, token)
}

func (s script) tryUntil(ctx context.Context, tool string, args map[string]any, token string) (result callResult, err error) {
	params := map[string]any{"name": s.e.Prefix + tool, "arguments": map[string]any{}}
	maps.Copy(params["arguments"].(map[string]any), args)
	if token != "" {
		params["_meta"] = map[string]any{"progressToken": token}
	}
	raw, err := s.client.request(ctx, "tools/call", params)
	if err != nil {
		return result, err
	}
	return result, json.Unmarshal(raw, &result)
}

func (s script) call(tool string, args map[string]any) callResult {
	s.t.Helper()
	result, err := s.try(tool, args, "")
	if err != nil || len(result.Content) == 0 {
		s.t.Fatalf("%s %v: %v, %v", tool, args, result, err)
	}
	return result
}

func (s script) text(tool string, args map[string]any) string {
	s.t.Helper()
	return s.call(tool, args).Content[0].Text
}

// operation carries out a long operation and returns its text and what progress was reported for it. A client may
// hand on progress after the answer that it came before, so that is waited for.
func (s script) operation(duration float64, steps int) (text string, progress [][2]float64) {
	s.t.Helper()
	token := unique()
	result, err := s.try("trigger-long-running-operation", map[string]any{"duration": duration, "steps": steps}, token)
	if err != nil || len(result.Content) != 1 {
		s.t.Fatalf("the operation of %d steps: %v, %v", steps, result, err)
	}
	of := func(params json.RawMessage) bool { return strings.Contains(string(params), token) }
	s.await("notifications/progress", 0, func(params json.RawMessage) bool {
		return of(params) && strings.Contains(string(params), fmt.Sprintf(`"progress":%d,`, steps))
	})
	s.host.mu.Lock()
	defer s.host.mu.Unlock()
	for _, m := range s.host.told {
		if m.Method == "notifications/progress" && of(m.Params) {
			var p struct{ Progress, Total float64 }
			s.into(m.Params, &p)
			progress = append(progress, [2]float64{p.Progress, p.Total})
		}
	}
	return result.Content[0].Text, progress
}

// cancelled begins a long operation, cancels it after its first progress and tells whether it ended with an error.
func (s script) cancelled() bool {
	s.t.Helper()
	token := unique()
	ctx, cancel := context.WithCancel(s.ctx)
	defer cancel()
	ended := make(chan error, 1)
	go func() {
		_, err := s.tryUntil(ctx, "trigger-long-running-operation", map[string]any{"duration": 10, "steps": 100}, token)
		ended <- err
	}()
	s.await("notifications/progress", 0, func(params json.RawMessage) bool { return strings.Contains(string(params), token) })
	cancel()
	return <-ended != nil
}

// bearer adds a token to every request, those included that an SDK forgets.
type bearer string

func (b bearer) RoundTrip(r *http.Request) (*http.Response, error) {
	if b != "" {
		r = r.Clone(r.Context())
		r.Header.Set("Authorization", "Bearer "+string(b))
	}
	return http.DefaultTransport.RoundTrip(r)
}

// ExerciseLegacyGoSDK takes the steps with the Go SDK's client, which is told the revision to ask for: by itself it would
// prefer the modern era.
func ExerciseLegacyGoSDK(t testing.TB, e Endpoint, revision string) {
	t.Helper()
	exerciseLegacyGo(t, e, revision, breakOff, func(ctx context.Context, e Endpoint, h *host) (legacyClient, error) {
		return connectGoSDK(ctx, e, h, revision)
	})
}

type goSDK struct {
	client  *mcp.Client
	session *mcp.ClientSession
	host    *host
}

func connectGoSDK(ctx context.Context, e Endpoint, h *host, revision string) (legacyClient, error) {
	client := mcp.NewClient(&mcp.Implementation{Name: "waybill-test-go", Version: "1"}, &mcp.ClientOptions{
		CreateMessageHandler: func(_ context.Context, r *mcp.CreateMessageRequest) (*mcp.CreateMessageResult, error) {
			return answerAs[mcp.CreateMessageResult](h, "sampling/createMessage", r.Params)
		},
		ElicitationHandler: func(_ context.Context, r *mcp.ElicitRequest) (*mcp.ElicitResult, error) {
			return answerAs[mcp.ElicitResult](h, "elicitation/create", r.Params)
		},
		LoggingMessageHandler: func(_ context.Context, r *mcp.LoggingMessageRequest) {
			h.tell("notifications/message", r.Params)
		},
		ProgressNotificationHandler: func(_ context.Context, r *mcp.ProgressNotificationClientRequest) {
			h.tell("notifications/progress", r.Params)
		},
		ResourceUpdatedHandler: func(_ context.Context, r *mcp.ResourceUpdatedNotificationRequest) {
			h.tell("notifications/resources/updated", r.Params)
		},
		ResourceListChangedHandler: func(_ context.Context, r *mcp.ResourceListChangedRequest) {
			h.tell("notifications/resources/list_changed", r.Params)
		},
	})
	for _, r := range h.roots {
		client.AddRoots(&mcp.Root{URI: r.URI, Name: r.Name})
	}
	var transport mcp.Transport = &mcp.StreamableClientTransport{Endpoint: e.URL, HTTPClient: &http.Client{Transport: bearer(e.Token)}}
	if command := e.command(e.URL); command != nil {
		transport = goCommand(command)
	}
	session, err := client.Connect(ctx, transport, &mcp.ClientSessionOptions{ProtocolVersion: revision})
	if err != nil {
		return nil, err
	}
	return goSDK{client, session, h}, nil
}

func (c goSDK) revision() string { return c.session.InitializeResult().ProtocolVersion }

func (c goSDK) end() error { return c.session.Close() }

// The SDK itself keeps the roots, and tells the server when it has more.
func (c goSDK) rootsChanged(context.Context) error {
	c.host.mu.Lock()
	defer c.host.mu.Unlock()
	for _, r := range c.host.roots[1:] {
		c.client.AddRoots(&mcp.Root{URI: r.URI, Name: r.Name})
	}
	return nil
}

func (c goSDK) request(ctx context.Context, method string, params map[string]any) (result json.RawMessage, err error) {
	switch s := c.session; method {
	case "ping":
		err = s.Ping(ctx, nil)
	case "tools/list":
		result, err = typed(ctx, params, s.ListTools)
	case "tools/call":
		result, err = typed(ctx, params, s.CallTool)
	case "prompts/list":
		result, err = typed(ctx, params, s.ListPrompts)
	case "prompts/get":
		result, err = typed(ctx, params, s.GetPrompt)
	case "completion/complete":
		result, err = typed(ctx, params, s.Complete)
	case "resources/list":
		result, err = typed(ctx, params, s.ListResources)
	case "resources/templates/list":
		result, err = typed(ctx, params, s.ListResourceTemplates)
	case "resources/read":
		result, err = typed(ctx, params, s.ReadResource)
	case "resources/subscribe":
		result, err = typed(ctx, params, nothing(s.Subscribe))
	case "resources/unsubscribe":
		result, err = typed(ctx, params, nothing(s.Unsubscribe))
	case "logging/setLevel":
		result, err = typed(ctx, params, nothing(s.SetLoggingLevel))
	default:
		err = fmt.Errorf("no step takes %s", method)
	}
	if rpc := new(jsonrpc.Error); errors.As(err, &rpc) {
		err = &RPCError{Code: rpc.Code, Message: rpc.Message}
	}
	return result, err
}

// typed makes a call of an SDK's typed method.
func typed[P, R any](ctx context.Context, params any, call func(context.Context, *P) (*R, error)) (json.RawMessage, error) {
	p, err := convert[P](params)
	if err != nil {
		return nil, err
	}
	result, err := call(ctx, p)
	if err != nil {
		return nil, err
	}
	return json.Marshal(result)
}

// nothing gives a method without a result an empty one.
func nothing[P any](call func(context.Context, *P) error) func(context.Context, *P) (*struct{}, error) {
	return func(ctx context.Context, p *P) (*struct{}, error) { return &struct{}{}, call(ctx, p) }
}

// ExerciseLegacyMCPGo takes the steps with the client of mark3labs/mcp-go. Over HTTP that one cancels by leaving the
// stream: it sends no notifications/cancelled. And it resumes a stream only if that was ended, not if it broke off.
func ExerciseLegacyMCPGo(t testing.TB, e Endpoint) {
	t.Helper()
	exerciseLegacyGo(t, e, legacy, endEarly, connectMCPGo)
}

type mcpGo struct{ client *mcpgo.Client }

func connectMCPGo(ctx context.Context, e Endpoint, h *host) (legacyClient, error) {
	var transport mcpgotransport.Interface
	transport, err := mcpgotransport.NewStreamableHTTP(e.URL,
		mcpgotransport.WithContinuousListening(), // the GET stream
		mcpgotransport.WithHTTPLogger(slog.New(slog.DiscardHandler)),
		mcpgotransport.WithHTTPBasicClient(&http.Client{Transport: bearer(e.Token)}))
	if err != nil {
		return nil, err
	}
	if command := e.command(e.URL); command != nil {
		transport = mcpgotransport.NewStdio(command[0], nil, command[1:]...)
	}
	client := mcpgo.NewClient(transport, mcpgo.WithProtocolVersion(legacy), mcpgo.WithSamplingHandler(mcpGoHost{h}),
		mcpgo.WithElicitationHandler(mcpGoHost{h}), mcpgo.WithRootsHandler(mcpGoHost{h}))
	client.OnNotification(func(n mcpgotypes.JSONRPCNotification) { h.tell(n.Method, n.Params) })
	if err := client.Start(ctx); err != nil {
		return nil, err
	}
	var hello mcpgotypes.InitializeRequest
	hello.Params.ClientInfo = mcpgotypes.Implementation{Name: "waybill-test-mcp-go", Version: "1"}
	if _, err := client.Initialize(ctx, hello); err != nil {
		return nil, err
	}
	return mcpGo{client}, nil
}

// mcpGoHost is the host in mcp-go's terms.
type mcpGoHost struct{ *host }

func (h mcpGoHost) CreateMessage(_ context.Context, r mcpgotypes.CreateMessageRequest) (*mcpgotypes.CreateMessageResult, error) {
	return answerAs[mcpgotypes.CreateMessageResult](h.host, "sampling/createMessage", r.CreateMessageParams)
}

func (h mcpGoHost) Elicit(_ context.Context, r mcpgotypes.ElicitationRequest) (*mcpgotypes.ElicitationResult, error) {
	return answerAs[mcpgotypes.ElicitationResult](h.host, "elicitation/create", r.Params)
}

func (h mcpGoHost) ListRoots(context.Context, mcpgotypes.ListRootsRequest) (*mcpgotypes.ListRootsResult, error) {
	return answerAs[mcpgotypes.ListRootsResult](h.host, "roots/list", nil)
}

func (c mcpGo) revision() string { return c.client.ProtocolVersion() }

func (c mcpGo) end() error { return c.client.Close() }

func (c mcpGo) rootsChanged(ctx context.Context) error { return c.client.RootListChanges(ctx) }

func (c mcpGo) request(ctx context.Context, method string, params map[string]any) (result json.RawMessage, err error) {
	whole := map[string]any{"params": params} // mcp-go's types are of whole requests
	if params == nil {
		whole = nil
	}
	switch c := c.client; method {
	case "ping":
		err = c.Ping(ctx)
	case "tools/list":
		result, err = typed(ctx, whole, valued(c.ListTools))
	case "tools/call":
		result, err = typed(ctx, whole, valued(c.CallTool))
	case "prompts/list":
		result, err = typed(ctx, whole, valued(c.ListPrompts))
	case "prompts/get":
		result, err = typed(ctx, whole, valued(c.GetPrompt))
	case "completion/complete":
		result, err = typed(ctx, whole, valued(c.Complete))
	case "resources/list":
		result, err = typed(ctx, whole, valued(c.ListResources))
	case "resources/templates/list":
		result, err = typed(ctx, whole, valued(c.ListResourceTemplates))
	case "resources/read":
		result, err = typed(ctx, whole, valued(c.ReadResource))
	case "resources/subscribe":
		result, err = typed(ctx, whole, nothing(pointed(c.Subscribe)))
	case "resources/unsubscribe":
		result, err = typed(ctx, whole, nothing(pointed(c.Unsubscribe)))
	case "logging/setLevel":
		result, err = typed(ctx, whole, nothing(pointed(c.SetLevel)))
	default:
		err = fmt.Errorf("no step takes %s", method)
	}
	if errors.Is(err, mcpgotypes.ErrInvalidParams) { // codes are sentinels there
		err = &RPCError{Code: jsonrpc.CodeInvalidParams, Message: err.Error()}
	}
	return result, err
}

// valued and pointed are for methods that take their request by value.
func valued[P, R any](call func(context.Context, P) (*R, error)) func(context.Context, *P) (*R, error) {
	return func(ctx context.Context, p *P) (*R, error) { return call(ctx, *p) }
}

func pointed[P any](call func(context.Context, P) error) func(context.Context, *P) error {
	return func(ctx context.Context, p *P) error { return call(ctx, *p) }
}

// ExerciseLegacyHTTP takes the steps by plain HTTP, in a session of a revision.
func ExerciseLegacyHTTP(t testing.TB, e Endpoint, revision string) {
	t.Helper()
	exerciseLegacyGo(t, e, revision, breakOff, func(ctx context.Context, e Endpoint, h *host) (legacyClient, error) {
		return connectHTTP(ctx, e, h, revision)
	})
}

type plainHTTP struct {
	session *LegacySession
	host    *host
	listens *LegacyStream
	done    chan struct{} // closed when the GET stream has ended
}

func connectHTTP(ctx context.Context, e Endpoint, h *host, revision string) (legacyClient, error) {
	capabilities := json.RawMessage(`{"sampling":{},"elicitation":{},"roots":{"listChanged":true}}`)
	session, _, err := OpenLegacy(ctx, e, revision, capabilities)
	if err != nil {
		return nil, err
	}
	stream, err := session.Listen(ctx, "")
	if err != nil {
		return nil, err
	}
	if stream.Status != http.StatusOK {
		return nil, fmt.Errorf("the GET stream: status %d", stream.Status)
	}
	c := plainHTTP{session, h, stream, make(chan struct{})}
	go func() {
		defer close(c.done)
		for {
			_, m, err := stream.Message()
			if err != nil {
				return
			}
			if err := c.take(ctx, m); err != nil {
				return
			}
		}
	}()
	return c, nil
}

// take handles a message that is no answer.
func (c plainHTTP) take(ctx context.Context, m Message) error {
	switch {
	case m.Method == "":
		return fmt.Errorf("an answer to no request: %s", m.ID)
	case m.ID == nil:
		c.host.tell(m.Method, m.Params)
		return nil
	}
	answer := Message{ID: m.ID}
	if result, err := c.host.answer(m.Method, m.Params); err != nil {
		answer.Error = &RPCError{Code: jsonrpc.CodeInternalError, Message: err.Error()}
	} else if answer.Result, err = json.Marshal(result); err != nil {
		return err
	}
	if status, err := c.session.Send(ctx, answer); err != nil || status != http.StatusAccepted {
		return fmt.Errorf("answering %s: status %d, %v", m.Method, status, err)
	}
	return nil
}

func (c plainHTTP) revision() string { return c.session.Revision }

func (c plainHTTP) end() error {
	status, err := c.session.Delete(context.Background())
	if err == nil && status/100 != 2 {
		err = fmt.Errorf("status %d", status)
	}
	c.listens.Close()
	<-c.done
	return err
}

func (c plainHTTP) rootsChanged(ctx context.Context) error {
	status, err := c.session.Send(ctx, Message{Method: "notifications/roots/list_changed"})
	if err == nil && status != http.StatusAccepted {
		err = fmt.Errorf("status %d", status)
	}
	return err
}

// request reads the request's stream to its answer, and resumes it if it breaks off.
func (c plainHTTP) request(ctx context.Context, method string, params map[string]any) (json.RawMessage, error) {
	var p any
	if params != nil {
		p = params
	}
	reading, leave := context.WithCancel(context.WithoutCancel(ctx)) // cancelling is more than leaving the stream
	defer leave()
	stream, err := c.session.Request(reading, method, p)
	if err != nil {
		return nil, err
	}
	id := stream.ID
	stop := context.AfterFunc(ctx, func() {
		_, _ = c.session.Send(reading, Message{Method: "notifications/cancelled", Params: fmt.Appendf(nil, `{"requestId":%s}`, id)})
		leave()
	})
	defer stop()
	for {
		_, m, err := stream.Message()
		if err != nil {
			stream.Close()
			if ctx.Err() != nil {
				return nil, ctx.Err()
			}
			if stream.LastID == "" || errors.Is(err, io.EOF) && stream.media != "text/event-stream" {
				return nil, fmt.Errorf("status %d: %w", stream.Status, err)
			}
			if stream, err = c.session.Listen(reading, stream.LastID); err != nil {
				return nil, err
			}
			continue
		}
		if m.Method == "" && bytes.Equal(m.ID, id) {
			stream.Close()
			if m.Error != nil {
				return nil, m.Error
			}
			return m.Result, nil
		}
		if err := c.take(reading, m); err != nil {
			stream.Close()
			return nil, err
		}
	}
}
