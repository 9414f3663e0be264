package test

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/modelcontextprotocol/go-sdk/mcp"
	coltracepb "go.opentelemetry.io/proto/otlp/collector/trace/v1"
	tracepb "go.opentelemetry.io/proto/otlp/trace/v1"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"

	"waybill.dev/schemas"
	"waybill.dev/test/gateway"
)

// collector is a receiver of OTLP: the official service, over HTTP and gRPC.
type collector struct {
	coltracepb.UnimplementedTraceServiceServer
	t *testing.T

	mu   sync.Mutex
	got  []*tracepb.ResourceSpans
	news chan struct{} // closed when there is more
}

func newCollector(t *testing.T) *collector { return &collector{t: t, news: make(chan struct{})} }

func (c *collector) Export(_ context.Context, r *coltracepb.ExportTraceServiceRequest) (*coltracepb.ExportTraceServiceResponse, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.got = append(c.got, r.ResourceSpans...)
	close(c.news)
	c.news = make(chan struct{})
	return &coltracepb.ExportTraceServiceResponse{}, nil
}

// http serves it at /v1/traces, as protobuf.
func (c *collector) http() (url string) {
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(r.Body)
		req := &coltracepb.ExportTraceServiceRequest{}
		if err == nil {
			err = proto.Unmarshal(body, req)
		}
		if err != nil || r.URL.Path != "/v1/traces" || r.Header.Get("Content-Type") != "application/x-protobuf" || r.Header.Get("X-Team") != "tools" {
			c.t.Errorf("%s %s %s: %v", r.Method, r.URL, r.Header, err)
			http.Error(w, "no", http.StatusBadRequest)
			return
		}
		resp, _ := c.Export(r.Context(), req)
		b, _ := proto.Marshal(resp)
		w.Header().Set("Content-Type", "application/x-protobuf")
		_, _ = w.Write(b)
	}))
	c.t.Cleanup(s.Close)
	return s.URL
}

// grpc serves it over gRPC.
func (c *collector) grpc() (url string) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		c.t.Fatal(err)
	}
	s := grpc.NewServer()
	coltracepb.RegisterTraceServiceServer(s, c)
	done := make(chan error, 1)
	go func() { done <- s.Serve(ln) }()
	c.t.Cleanup(func() { s.Stop(); <-done })
	return "http://" + ln.Addr().String()
}

// span is one as a test reads it.
type span struct {
	*tracepb.Span
	service string
	at      map[string]string // its attributes
}

func (s span) id() string     { return hex.EncodeToString(s.SpanId) }
func (s span) parent() string { return hex.EncodeToString(s.ParentSpanId) }
func (s span) trace() string  { return hex.EncodeToString(s.TraceId) }

// spans are all that have come, by id.
func (c *collector) spans() (all map[string]span, news <-chan struct{}) {
	c.mu.Lock()
	defer c.mu.Unlock()
	all = map[string]span{}
	for _, r := range c.got {
		service := ""
		for _, kv := range r.Resource.Attributes {
			if kv.Key == "service.name" {
				service = kv.Value.GetStringValue()
			}
		}
		for _, in := range r.ScopeSpans {
			for _, s := range in.Spans {
				at := map[string]string{}
				for _, kv := range s.Attributes {
					if at[kv.Key] = kv.Value.GetStringValue(); at[kv.Key] == "" {
						at[kv.Key] = fmt.Sprint(kv.Value.GetIntValue())
					}
				}
				one := span{s, service, at}
				if _, twice := all[one.id()]; twice {
					c.t.Errorf("span %s of %q came twice", one.id(), s.Name)
				}
				all[one.id()] = one
			}
		}
	}
	return all, c.news
}

// call waits for the spans of a call's parts: the call, and those of policy and
// upstream that it is to have.
func (c *collector) call(call schemas.CallID, parts ...schemas.Part) (of map[schemas.Part]span) {
	c.t.Helper()
	ctx, cancel := context.WithTimeout(c.t.Context(), tracePatience)
	defer cancel()
	for {
		all, news := c.spans()
		of = map[schemas.Part]span{}
		for _, p := range []schemas.Part{schemas.PartCall, schemas.PartPolicy, schemas.PartUpstream} {
			if s, ok := all[call.Span(p)]; ok {
				of[p] = s
			}
		}
		if len(of) == len(parts) {
			for _, p := range parts {
				if of[p].Span == nil {
					c.t.Fatalf("call %s has spans %v, want %v", call, of, parts)
				}
			}
			return of
		}
		select {
		case <-news:
		case <-ctx.Done():
			c.t.Fatalf("call %s has spans %v, want %v", call, of, parts)
		}
	}
}

// whole are all parts of a call that reached its server.
var whole = []schemas.Part{schemas.PartCall, schemas.PartPolicy, schemas.PartUpstream}

// says holds a span's attributes against what it has to say, "" for nothing.
func says(t *testing.T, s span, want map[string]string) {
	t.Helper()
	for k, v := range want {
		if s.at[k] != v {
			t.Errorf("%s (%s): %s is %q, want %q", s.Name, s.Kind, k, s.at[k], v)
		}
	}
}

// under checks that a span is in another, in time too.
func under(t *testing.T, s, parent span) {
	t.Helper()
	if s.parent() != parent.id() || s.trace() != parent.trace() {
		t.Errorf("%s (%s) is under %s in trace %s, want %s (%s %s) in %s", s.Name, s.Kind, s.parent(), s.trace(), parent.id(), parent.Name, parent.Kind, parent.trace())
	}
	if s.StartTimeUnixNano < parent.StartTimeUnixNano || s.EndTimeUnixNano > parent.EndTimeUnixNano || s.StartTimeUnixNano > s.EndTimeUnixNano {
		t.Errorf("%s (%s) lasts from %d to %d, %s from %d to %d", s.Name, s.Kind, s.StartTimeUnixNano, s.EndTimeUnixNano, parent.Name, parent.StartTimeUnixNano, parent.EndTimeUnixNano)
	}
}

// relayServer is a server of the Go SDK whose tool relay calls a tool of another
// server through the gateway, with the trace context that it was called with: as
// HTTP headers or in _meta. It says with what it was called.
func relayServer(t *testing.T, gatewayURL *string, o *mcp.StreamableHTTPOptions) (url string) {
	s := mcp.NewServer(&mcp.Implementation{Name: "relay", Version: "1"}, nil)
	type echo struct {
		Text string `json:"text"`
	}
	mcp.AddTool(s, &mcp.Tool{Name: "echo"}, func(_ context.Context, req *mcp.CallToolRequest, in echo) (*mcp.CallToolResult, any, error) {
		said, _ := json.Marshal(map[string]any{"header": req.Extra.Header.Get("Traceparent"), "meta": req.Params.GetMeta()["traceparent"]})
		return &mcp.CallToolResult{Content: []mcp.Content{&mcp.TextContent{Text: string(said)}}, IsError: in.Text == "fail"}, nil, nil
	})
	type relay struct {
		Via    string `json:"via"`
		Server string `json:"server"`
		Tool   string `json:"tool"`
		Token  string `json:"token,omitempty"`
	}
	mcp.AddTool(s, &mcp.Tool{Name: "relay"}, func(ctx context.Context, req *mcp.CallToolRequest, in relay) (*mcp.CallToolResult, any, error) {
		headers, params := http.Header{}, &mcp.CallToolParams{Name: in.Tool, Arguments: echo{"back"}}
		if in.Token != "" {
			headers.Set("Authorization", "Bearer "+in.Token)
		}
		for _, name := range []string{"traceparent", "tracestate"} {
			switch in.Via {
			case "header":
				headers.Set(name, req.Extra.Header.Get(name))
			case "meta":
				if params.Meta == nil {
					params.Meta = mcp.Meta{}
				}
				params.Meta[name] = req.Params.GetMeta()[name]
			case "its own span": // as a server that is traced itself
				v := req.Extra.Header.Get(name)
				if name == "traceparent" {
					v = v[:36] + "00f067aa0ba902b7" + v[52:]
				}
				headers.Set(name, v)
			}
		}
		c := mcp.NewClient(&mcp.Implementation{Name: "relay", Version: "1"}, nil)
		session, err := c.Connect(ctx, &mcp.StreamableClientTransport{
			Endpoint: *gatewayURL + "/mcp/" + in.Server, DisableStandaloneSSE: true,
			HTTPClient: &http.Client{Transport: sayingAlways{headers}},
		}, nil)
		if err != nil {
			return nil, nil, err
		}
		defer func() { _ = session.Close() }()
		r, err := session.CallTool(ctx, params)
		return r, nil, err
	})
	h := httptest.NewServer(mcp.NewStreamableHTTPHandler(func(*http.Request) *mcp.Server { return s }, o))
	t.Cleanup(h.Close)
	return h.URL
}

type sayingAlways struct{ http.Header }

func (w sayingAlways) RoundTrip(r *http.Request) (*http.Response, error) {
	r = r.Clone(r.Context())
	for k, v := range w.Header {
		r.Header[k] = v
	}
	return http.DefaultTransport.RoundTrip(r)
}

// traced is a gateway before a server of each era; more is further configuration.
// The first server acts as the agent helper when it calls back.
func traced(t *testing.T, more string, env ...string) *gateway.Gateway {
	if !strings.Contains(more, "clickhouse:") {
		more += "clickhouse: false\n"
	}
	var url string
	modern, old := relayServer(t, &url, &mcp.StreamableHTTPOptions{Stateless: true}), relayServer(t, &url, nil)
	agents := "tenants: [{id: acme}]\nauth: {anonymous: researcher}\nagents:\n  - {id: researcher, tenant: acme}\n"
	for _, id := range []string{"helper", "stranger"} {
		agents += fmt.Sprintf("  - {id: %s, tenant: acme, token_sha256: %x}\n", id, sha256.Sum256([]byte(tokenOf(id))))
	}
	g := gateway.Start(t, agents+"servers:\n"+gateway.Server("relay", modern, "acts_as: [helper]")+gateway.Server("old", old, "")+
		"allow:\n  - {agents: ['*'], servers: ['*'], tools: [echo, relay, ghost, call_many], methods: ['server/discover', 'tools/list', initialize, 'notifications/*']}\n"+
		"fanout: {tools: [call_many]}\n"+more, env...)
	url = g.URL
	return g
}

func tokenOf(agent string) string { return agent + "'s token of random bytes" }

// tracedTool calls a tool in the session "traced"; meta is more of _meta, which begins
// with a comma.
func tracedTool(t *testing.T, g *gateway.Gateway, server, name, arguments, meta string, header ...string) (schemas.CallID, gateway.Answer) {
	t.Helper()
	a, err := g.Post(t.Context(), server, "tools/call", name, fmt.Sprintf(`{"jsonrpc":"2.0","id":"i","method":"tools/call","params":{"name":%q,"arguments":%s,%s%s}}}`,
		name, arguments, strings.TrimSuffix(gateway.Meta, "}"), meta), append(header, "Waybill-Session: traced")...)
	if err != nil {
		t.Fatal(err)
	}
	id := schemas.CallID(a.Header.Get("Waybill-Call"))
	if id == "" {
		t.Fatalf("no call: %d %s", a.Status, a.Body)
	}
	return id, a
}

// heard is what the tool echo says that it was called with.
func heard(t *testing.T, a gateway.Answer) (header, meta string) {
	t.Helper()
	var answer struct {
		Result struct{ Content []struct{ Text string } }
	}
	var said struct{ Header, Meta string }
	err := json.Unmarshal(a.Body, &answer)
	if err == nil && len(answer.Result.Content) == 1 {
		err = json.Unmarshal([]byte(answer.Result.Content[0].Text), &said)
	}
	if err != nil || len(answer.Result.Content) != 1 {
		t.Fatalf("%v: %d %s", err, a.Status, a.Body)
	}
	return said.Header, said.Meta
}

// tracePatience is how long a test waits for what has to come.
const tracePatience = 20 * time.Second

const (
	theirTrace = "0af7651916cd43dd8448eb211c80319c"
	theirSpan  = "b7ad6b7169203331"
)

// TestTraces: a receiver of OTLP sees the spans of every kind of call, each under
// the one that caused it, with what the conventions for MCP want them to say.
func TestTraces(t *testing.T) {
	c := newCollector(t)
	g := traced(t, fmt.Sprintf("traces: {endpoint: %q, headers: {X-Team: {env: TEAM}}}\n", c.http()), "TEAM=tools", "OTEL_BSP_SCHEDULE_DELAY=20")

	t.Run("call", func(t *testing.T) {
		id, a := tracedTool(t, g, "relay", "echo", `{"text":"a"}`, "", "traceparent: 00-"+theirTrace+"-"+theirSpan+"-01", "tracestate: other=1")
		of := c.call(id, whole...)
		call, policy, upstream := of[schemas.PartCall], of[schemas.PartPolicy], of[schemas.PartUpstream]
		if call.trace() != theirTrace || call.parent() != theirSpan || call.Kind != tracepb.Span_SPAN_KIND_SERVER || call.Name != "tools/call echo" || call.TraceState != "other=1" || call.service != "waybill" {
			t.Errorf("call: %v of %s", call.Span, call.service)
		}
		under(t, policy, call)
		under(t, upstream, call)
		if policy.Name != "waybill.policy" || policy.Kind != tracepb.Span_SPAN_KIND_INTERNAL || upstream.Name != "tools/call echo" || upstream.Kind != tracepb.Span_SPAN_KIND_CLIENT {
			t.Errorf("policy %s %s, upstream %s %s", policy.Name, policy.Kind, upstream.Name, upstream.Kind)
		}
		says(t, call, map[string]string{
			"mcp.method.name": "tools/call", "mcp.protocol.version": "2026-07-28", "gen_ai.operation.name": "execute_tool", "gen_ai.tool.name": "echo",
			"gen_ai.agent.id": "researcher", "waybill.tenant": "acme", "waybill.call": string(id), "waybill.root": string(id), "waybill.server": "relay", "waybill.outcome": "completed",
			"error.type": "", "mcp.session.id": "", "waybill.parent": "",
		})
		says(t, policy, map[string]string{"waybill.decision": "authorized", "waybill.call": string(id)})
		if policy.at["waybill.rule"] == "" {
			t.Error("no rule")
		}
		says(t, upstream, map[string]string{
			"mcp.method.name": "tools/call", "jsonrpc.request.id": string(id), "network.transport": "tcp", "server.address": "127.0.0.1",
			"http.response.status_code": "200", "waybill.attempts": "1", "error.type": "",
		})
		if call.Status.Code != tracepb.Status_STATUS_CODE_UNSET {
			t.Errorf("status %v", call.Status)
		}
		// What the server was told, in both places.
		want := "00-" + theirTrace + "-" + upstream.id() + "-01"
		if header, meta := heard(t, a); header != want || meta != want {
			t.Errorf("the server was called by %q and %q, want %q", header, meta, want)
		}
	})
	t.Run("that nobody traces yet", func(t *testing.T) {
		id, _ := tracedTool(t, g, "relay", "echo", `{"text":"a"}`, "")
		call := c.call(id, whole...)[schemas.PartCall]
		if want := (schemas.Event{Call: id}).TraceID(); call.trace() != want || call.parent() != "" {
			t.Errorf("trace %s under %q, want %s", call.trace(), call.parent(), want)
		}
	})
	t.Run("denied", func(t *testing.T) {
		id, _ := tracedTool(t, g, "relay", "secret", `{}`, "")
		of := c.call(id, schemas.PartCall, schemas.PartPolicy)
		under(t, of[schemas.PartPolicy], of[schemas.PartCall])
		says(t, of[schemas.PartCall], map[string]string{"waybill.outcome": "denied", "error.type": "denied", "gen_ai.tool.name": "secret"})
		says(t, of[schemas.PartPolicy], map[string]string{"waybill.decision": "denied"})
		if s := of[schemas.PartCall].Status; s.Code != tracepb.Status_STATUS_CODE_ERROR {
			t.Errorf("status %v", s)
		}
	})
	t.Run("a tool that fails", func(t *testing.T) {
		id, _ := tracedTool(t, g, "relay", "echo", `{"text":"fail"}`, "")
		of := c.call(id, whole...)
		for _, p := range []schemas.Part{schemas.PartCall, schemas.PartUpstream} {
			says(t, of[p], map[string]string{"error.type": "tool_error"})
			if of[p].Status.Code != tracepb.Status_STATUS_CODE_ERROR {
				t.Errorf("%s: status %v", p, of[p].Status)
			}
		}
	})
	t.Run("in a session", func(t *testing.T) {
		client := mcp.NewClient(&mcp.Implementation{Name: "sessions", Version: "1"}, nil)
		session, err := client.Connect(t.Context(), &mcp.StreamableClientTransport{Endpoint: g.URL + "/mcp/old", DisableStandaloneSSE: true}, &mcp.ClientSessionOptions{ProtocolVersion: "2025-11-25"})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := session.CallTool(t.Context(), &mcp.CallToolParams{Name: "echo", Arguments: map[string]any{"text": "a"},
			Meta: mcp.Meta{"traceparent": "00-" + theirTrace + "-" + theirSpan + "-01"}}); err != nil {
			t.Fatal(err)
		}
		_ = session.Close()
		e := requested(t, g, func(e schemas.Event, r *schemas.Requested) bool {
			return r.Revision == "2025-11-25" && r.Method == "tools/call"
		})[0]
		of := c.call(e.Call, whole...)
		if call := of[schemas.PartCall]; call.trace() != theirTrace || call.parent() != theirSpan {
			t.Errorf("trace %s under %s", call.trace(), call.parent())
		}
		under(t, of[schemas.PartUpstream], of[schemas.PartCall])
		says(t, of[schemas.PartCall], map[string]string{"mcp.session.id": string(e.Session), "mcp.protocol.version": "2025-11-25"})
	})
	t.Run("translated", func(t *testing.T) {
		id, a := tracedTool(t, g, "old", "echo", `{"text":"a"}`, `,"traceparent":"00-`+theirTrace+`-`+theirSpan+`-01"`)
		of := c.call(id, whole...)
		under(t, of[schemas.PartUpstream], of[schemas.PartCall])
		want := "00-" + theirTrace + "-" + of[schemas.PartUpstream].id() + "-01"
		if header, meta := heard(t, a); header != want || meta != want {
			t.Errorf("the server was called by %q and %q, want %q", header, meta, want)
		}
	})
	t.Run("call_many", func(t *testing.T) {
		id, _ := tracedTool(t, g, schemas.Gateway, "waybill__call_many", `{"tool":"echo","servers":["*"],"arguments":{"text":"a"}}`, "")
		of := c.call(id, whole...)
		front := of[schemas.PartUpstream]
		under(t, front, of[schemas.PartCall])
		if front.Name != "waybill.front" || front.Kind != tracepb.Span_SPAN_KIND_INTERNAL {
			t.Errorf("%s %s", front.Name, front.Kind)
		}
		children := requested(t, g, func(e schemas.Event, r *schemas.Requested) bool { return e.Parent == id && r.Method == "tools/call" })
		if len(children) != 2 {
			t.Fatalf("%d children", len(children))
		}
		for _, e := range children {
			of := c.call(e.Call, whole...)
			under(t, of[schemas.PartCall], front)
			under(t, of[schemas.PartUpstream], of[schemas.PartCall])
			if k := of[schemas.PartCall].Kind; k != tracepb.Span_SPAN_KIND_INTERNAL {
				t.Errorf("a call that the gateway made is %s", k)
			}
			says(t, of[schemas.PartCall], map[string]string{"waybill.parent": string(id), "waybill.root": string(id), "gen_ai.tool.name": "echo"})
		}
	})
	t.Run("called back", func(t *testing.T) {
		for _, tt := range []struct {
			via, as string
			found   bool
		}{{"header", "", true}, {"meta", "", true}, {"its own span", "", true}, {"header", "helper", true}, {"header", "stranger", false}} {
			arguments := fmt.Sprintf(`{"via":%q,"server":"old","tool":"echo"}`, tt.via)
			if tt.as != "" {
				arguments = fmt.Sprintf(`{"via":%q,"server":"old","tool":"echo","token":%q}`, tt.via, tokenOf(tt.as))
			}
			id, a := tracedTool(t, g, "relay", "relay", arguments, "")
			if !strings.Contains(string(a.Body), "traceparent") && !strings.Contains(string(a.Body), "header") {
				t.Fatalf("%+v: %d %s", tt, a.Status, a.Body)
			}
			trace := (schemas.Event{Call: id}).TraceID()
			backs := requested(t, g, func(e schemas.Event, r *schemas.Requested) bool {
				return e.TraceID() == trace && e.Call != id && r.Method == "tools/call"
			})
			if len(backs) != 1 {
				t.Fatalf("%+v: %d calls in its trace", tt, len(backs))
			}
			back := backs[0]
			of, up := c.call(back.Call, whole...), c.call(id, whole...)[schemas.PartUpstream]
			call := of[schemas.PartCall]
			if call.Kind != tracepb.Span_SPAN_KIND_SERVER || call.trace() != up.trace() {
				t.Errorf("%+v: %s in %s", tt, call.Kind, call.trace())
			}
			if tt.via != "its own span" {
				under(t, call, up)
			}
			parent, root := id, id
			if !tt.found {
				parent, root = "", back.Call
			}
			if back.Parent != parent || back.Root != root || back.Data.(*schemas.Requested).Back != tt.found {
				t.Errorf("%+v: parent %q, root %q", tt, back.Parent, back.Root)
			}
			says(t, call, map[string]string{"waybill.parent": string(parent), "waybill.root": string(root)})

			// In the replay of the caller's session it stands under the call.
			of1 := requested(t, g, func(e schemas.Event, _ *schemas.Requested) bool { return e.Call == id })[0]
			out, errs, exit := g.CLI("replay", string(of1.Session))
			if exit != 0 {
				t.Fatal(errs)
			}
			at := strings.Index(out, string(id))
			inside := strings.Index(out[max(at, 0):], "tools/call echo → old")
			if shown := at >= 0 && strings.Contains(out[at:], string(back.Call)) && inside >= 0; shown != tt.found {
				t.Errorf("%+v: shown %v in\n%s", tt, shown, out)
			}
			if tt.found && !strings.Contains(out, "in session "+string(back.Session)) {
				t.Errorf("%+v: no word of session %s in\n%s", tt, back.Session, out)
			}
			// Both sessions are made again, and a file has what was called in the other.
			file := filepath.Join(t.TempDir(), "caused.waybill")
			if _, errs, exit := g.CLI("export", string(of1.Session), "-o", file); exit != 0 {
				t.Errorf("%+v: export: %s", tt, errs)
			}
			if again, errs, _ := g.CLI("replay", string(of1.Session), "--from", file); again != out {
				t.Errorf("%+v: from a file %s\n%s\nfrom the log\n%s", tt, errs, again, out)
			}
			for _, args := range [][]string{{string(of1.Session)}, {string(back.Session)}, {"--from", file}} {
				if v, exit := remake(t, g, args...); exit != 0 {
					t.Errorf("%+v: %v is not made again: %+v", tt, args, v.Differences)
				}
			}
		}
	})
	t.Run("a caller that does not want it", func(t *testing.T) {
		quiet, _ := tracedTool(t, g, "relay", "echo", `{"text":"a"}`, "", "traceparent: 00-"+theirTrace+"-"+theirSpan+"-00")
		loud, _ := tracedTool(t, g, "relay", "echo", `{"text":"a"}`, "")
		c.call(loud, whole...)
		c.call(quiet)
	})
	// What was sent is counted, at the end too.
	if err := g.Stop(); err != nil {
		t.Error(err)
	}
}

// requested are the requests in the log that fit, the newest session's last.
func requested(t *testing.T, g *gateway.Gateway, fits func(schemas.Event, *schemas.Requested) bool) (all []schemas.Event) {
	t.Helper()
	for _, e := range g.Events() {
		if r, ok := e.Data.(*schemas.Requested); ok && fits(e, r) {
			all = append(all, e)
		}
	}
	return all
}

// TestTracesGRPC: the same over gRPC, by the standard variables alone.
func TestTracesGRPC(t *testing.T) {
	c := newCollector(t)
	g := traced(t, "", "OTEL_EXPORTER_OTLP_ENDPOINT="+c.grpc(), "OTEL_EXPORTER_OTLP_PROTOCOL=grpc", "OTEL_SERVICE_NAME=gate", "OTEL_BSP_SCHEDULE_DELAY=20")
	id, _ := tracedTool(t, g, "relay", "echo", `{"text":"a"}`, "")
	if call := c.call(id, whole...)[schemas.PartCall]; call.service != "gate" {
		t.Errorf("service %q", call.service)
	}
}

// TestTracesCollectorAway: calls go on while nobody takes their spans, which are
// dropped and counted, and nothing waits for them at the end.
func TestTracesCollectorAway(t *testing.T) {
	g := traced(t, fmt.Sprintf("traces: {endpoint: %q}\n", "http://"+gateway.FreeAddr(t)), "OTEL_BSP_MAX_QUEUE_SIZE=8", "OTEL_BSP_SCHEDULE_DELAY=10")
	var dropped float64
	for deadline := time.Now().Add(tracePatience); dropped == 0 && time.Now().Before(deadline); {
		if _, a := tracedTool(t, g, "relay", "echo", `{"text":"a"}`, ""); a.Status != http.StatusOK {
			t.Fatalf("%d %s", a.Status, a.Body)
		}
		_, after, _ := strings.Cut(get(t, g.Admin+"/metrics"), "\nwaybill_traces_spans_total{state=\"dropped\"} ")
		_, _ = fmt.Sscan(after, &dropped)
	}
	if dropped == 0 {
		t.Error("nothing was dropped")
	}
	if err := g.Stop(); err != nil {
		t.Error(err)
	}
}

// TestTracesOff: without traces nobody connects to anywhere, and a body keeps its
// bytes; a call back finds its parent all the same.
func TestTracesOff(t *testing.T) {
	g := traced(t, "", "OTEL_EXPORTER_OTLP_ENDPOINT=http://127.0.0.1:1", "OTEL_SDK_DISABLED=true")
	_, a := tracedTool(t, g, "relay", "echo", `{"text":"a"}`, "")
	if header, meta := heard(t, a); header == "" || meta != "" {
		t.Errorf("the server was called by %q and %q", header, meta)
	}
	id, _ := tracedTool(t, g, "relay", "relay", `{"via":"header","server":"old","tool":"echo"}`, "")
	if backs := requested(t, g, func(e schemas.Event, r *schemas.Requested) bool { return e.Parent == id && r.Method == "tools/call" }); len(backs) != 1 {
		t.Errorf("%d calls back", len(backs))
	}
}
