package traces

import (
	"context"
	"encoding/hex"
	"errors"
	"slices"
	"strconv"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	tracepb "go.opentelemetry.io/proto/otlp/trace/v1"
	"google.golang.org/protobuf/proto"

	"waybill.dev/schemas"
)

var at = time.Date(2026, 11, 28, 12, 0, 0, 0, time.UTC)

func ending(data schemas.Payload, body string) schemas.Event {
	call := schemas.NewCallID(at)
	return schemas.Event{
		Tenant: "acme", Session: "s1", Call: call, Root: call, Agent: "a1", Data: data, Body: []byte(body), Stored: at.Add(30 * time.Millisecond),
	}
}

func summary(method, name string) schemas.Summary {
	return schemas.Summary{
		Target:      schemas.Target{Protocol: "mcp", Server: "s", Method: method, Name: name},
		RequestedAt: at, AuthorizedAt: at.Add(5 * time.Millisecond), UpstreamAt: at.Add(10 * time.Millisecond), Attempts: 2, Permit: "allow[0]", Revision: "2026-07-28",
	}
}

func attributes(s *tracepb.Span) map[string]string {
	all := map[string]string{}
	for _, kv := range s.Attributes {
		if all[kv.Key] = kv.Value.GetStringValue(); all[kv.Key] == "" {
			all[kv.Key] = strconv.FormatInt(kv.Value.GetIntValue(), 10)
		}
	}
	return all
}

// TestSpans: what each way to end is as spans. The same event makes the same ones.
func TestSpans(t *testing.T) {
	never := summary("tools/call", "t")
	never.UpstreamAt, never.Attempts = time.Time{}, 0
	denied := never
	denied.AuthorizedAt, denied.Permit = time.Time{}, ""
	session := summary("initialize", "")
	session.Revision = "2025-11-25"
	for _, tt := range []struct {
		what   string
		e      schemas.Event
		name   string
		spans  int
		error  string
		policy map[string]string
		call   map[string]string
	}{
		{"an answer", ending(&schemas.Completed{Summary: summary("tools/call", "t"), Status: 200}, `{"result":{"isError":false}}`), "tools/call t", 3, "",
			map[string]string{"waybill.rule": "allow[0]", "waybill.decision": "authorized"}, map[string]string{"gen_ai.tool.name": "t", "gen_ai.operation.name": "execute_tool"}},
		{"a tool's error", ending(&schemas.Completed{Summary: summary("tools/call", "t")}, `{"jsonrpc":"2.0","id":1,"result":{"isError":true}}`), "tools/call t", 3, "tool_error", nil, nil},
		{"words about errors", ending(&schemas.Completed{Summary: summary("tools/call", "t")}, `{"jsonrpc":"2.0","id":1,"result":{"text":"isError\":true"}}`), "tools/call t", 3, "", nil, nil},
		{"an error of the protocol", ending(&schemas.Completed{Summary: summary("prompts/get", "p"), ErrorCode: -32602}, ``), "prompts/get p", 3, "-32602", nil,
			map[string]string{"rpc.response.status_code": "-32602", "gen_ai.prompt.name": "p", "gen_ai.tool.name": ""}},
		{"a failure", ending(&schemas.Failed{Summary: never, Code: schemas.FailUnavailable, Detail: "secret"}, ``), "tools/call t", 2, "unavailable", nil, nil},
		{"of which nothing is known", ending(&schemas.Failed{Code: schemas.FailUndecodable}, ``), "", 1, "undecodable", nil, nil},
		{"denied", ending(&schemas.Denied{Summary: denied, Decision: schemas.Decision{Rule: "no", Reason: "because"}}, ``), "tools/call t", 2, "denied",
			map[string]string{"waybill.rule": "no", "waybill.reason": "because", "waybill.decision": "denied"}, nil},
		{"cancelled", ending(&schemas.Cancelled{Summary: summary("resources/read", "a:b")}, ``), "resources/read", 3, "cancelled", nil, map[string]string{"mcp.resource.uri": "a:b"}},
		{"in a session", ending(&schemas.Completed{Summary: session}, ``), "initialize", 3, "", nil, map[string]string{"mcp.session.id": "s1", "mcp.protocol.version": "2025-11-25"}},
		{"no ending", ending(&schemas.Requested{}, ``), "", 0, "", nil, nil},
	} {
		t.Run(tt.what, func(t *testing.T) {
			spans := Spans(tt.e, Peer{Address: "host", Port: 1, Transport: "tcp"}, nil)
			if len(spans) != tt.spans {
				t.Fatalf("%d spans", len(spans))
			}
			if again := Spans(tt.e, Peer{Address: "host", Port: 1, Transport: "tcp"}, nil); !slices.EqualFunc(spans, again, func(a, b *tracepb.Span) bool { return proto.Equal(a, b) }) {
				t.Error("the same event makes other spans")
			}
			for i, s := range spans {
				if hex.EncodeToString(s.TraceId) != tt.e.TraceID() || s.EndTimeUnixNano < s.StartTimeUnixNano || i > 0 && hex.EncodeToString(s.ParentSpanId) != tt.e.SpanID() {
					t.Errorf("%v", s)
				}
			}
			if tt.spans == 0 {
				return
			}
			got := attributes(spans[0])
			if spans[0].Name != tt.name || got["error.type"] != tt.error || (spans[0].Status.Code == tracepb.Status_STATUS_CODE_ERROR) != (tt.error != "") {
				t.Errorf("%q with %v, %v", spans[0].Name, got, spans[0].Status)
			}
			for k, v := range tt.call {
				if got[k] != v {
					t.Errorf("%s is %q, want %q", k, got[k], v)
				}
			}
			if tt.policy != nil {
				got := attributes(spans[1])
				for k, v := range tt.policy {
					if got[k] != v {
						t.Errorf("%s is %q, want %q", k, got[k], v)
					}
				}
			}
		})
	}
}

// TestSample: a share of the traces is decided on by their ids alone, and what a
// caller has said counts before it.
func TestSample(t *testing.T) {
	n := 0
	for range 2000 {
		e := schemas.Event{Call: schemas.NewCallID(time.Now())}
		if e.TraceFlags(Sample(0.25).Flags) == schemas.Sampled {
			n++
		}
		if e.TraceFlags(Sample(1).Flags) != schemas.Sampled || e.TraceFlags(Sample(0).Flags) != schemas.NotSampled {
			t.Fatal("all is not all, or none not none")
		}
	}
	if n < 400 || n > 600 {
		t.Errorf("%d of 2000", n)
	}
}

// taker is a collector that takes what it is told to.
type taker struct {
	mu    sync.Mutex
	takes bool
	got   int
	block chan struct{}
}

func (c *taker) Start(context.Context) error { return nil }
func (c *taker) Stop(context.Context) error  { return nil }
func (c *taker) UploadTraces(ctx context.Context, all []*tracepb.ResourceSpans) error {
	if c.block != nil {
		select {
		case <-c.block:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.takes {
		return errors.New("no")
	}
	c.got += len(all[0].ScopeSpans[0].Spans)
	return nil
}

// TestExporter: spans are sent together and at the end; what a collector refuses,
// or is too slow for, is dropped and counted, and whoever brings it never waits.
func TestExporter(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := &taker{takes: true}
		x := New(Options{Client: c, Sample: 1, Queue: 30, Batch: 10})
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- x.Run(ctx) }()
		end := func() { x.Take(ending(&schemas.Completed{Summary: summary("tools/call", "t")}, "")) }
		is := func(want Stats) {
			t.Helper()
			synctest.Wait()
			if got := x.Stats(); got != want {
				t.Fatalf("%+v, want %+v", got, want)
			}
		}
		end()
		is(Stats{0, 0, 0})
		time.Sleep(time.Second)
		is(Stats{3, 0, 0})
		for range 3 {
			end()
		}
		is(Stats{3, 0, 0}) // 9 of a batch of 10 wait
		time.Sleep(time.Second)
		is(Stats{12, 0, 0})

		c.mu.Lock()
		c.takes = false
		c.mu.Unlock()
		end()
		time.Sleep(time.Second)
		is(Stats{12, 3, 0})

		c.mu.Lock()
		c.takes, c.block = true, make(chan struct{})
		c.mu.Unlock()
		for range 20 { // 60 spans: 10 are being sent, 30 wait
			end()
			synctest.Wait()
		}
		is(Stats{12, 23, 30})
		close(c.block)
		time.Sleep(2 * time.Second)
		is(Stats{52, 23, 0})

		x.Take(schemas.Event{Data: &schemas.Requested{}})
		quiet := ending(&schemas.Completed{Summary: summary("tools/call", "t")}, "")
		quiet.Trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-02"
		x.Take(quiet)
		end()
		cancel() // what is left is sent
		if err := <-done; err != nil {
			t.Error(err)
		}
		is(Stats{55, 23, 0})
	})
}

// BenchmarkSpans is what tracing costs for each call, beside reading its ending.
func BenchmarkSpans(b *testing.B) {
	e := ending(&schemas.Completed{Summary: summary("tools/call", "t"), Status: 200}, `{"jsonrpc":"2.0","id":1,"result":{"content":[]}}`)
	b.ReportAllocs()
	for b.Loop() {
		Spans(e, Peer{Address: "host", Port: 1, Transport: "tcp"}, nil)
	}
}
