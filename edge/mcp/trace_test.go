package mcp_test

import (
	"context"
	"errors"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"waybill.dev/edge/mcp"
	"waybill.dev/schemas"
)

// TestMadeFor: a call that comes with the trace context with which a server was
// called has the call to that server for its parent, and its root, if its caller
// may know of that; else it has nothing but the trace.
func TestMadeFor(t *testing.T) {
	root, call := schemas.NewCallID(noon.Add(-2*time.Minute)), schemas.NewCallID(noon.Add(-time.Minute))
	parent := schemas.Event{
		Tenant: "acme", Session: "s-parents", Call: call, Root: root, Agent: "researcher", Edge: "e9", Seq: 7, Stored: noon,
		Data: &schemas.Requested{Target: schemas.Target{Protocol: "mcp", Server: "weather", Method: "tools/call", Name: "forecast"}},
	}
	traceparent, tracestate := parent.Onward(nil)
	// A server that is traced calls back from a span of its own.
	ofItsOwn := strings.Replace(traceparent, call.Span(schemas.PartUpstream), "00f067aa0ba902b7", 1)
	old := parent
	old.Call = schemas.NewCallID(noon.Add(-2 * time.Hour))
	oldTrace, _ := old.Onward(nil)

	none := func(*schemas.Event) {}
	for _, tt := range []struct {
		what          string
		header, meta  string // the latter further members of _meta
		change        func(*schemas.Event)
		looked, found bool
	}{
		{"by header", "traceparent: " + traceparent, "", none, true, true},
		{"by _meta", "X: y", `"traceparent":"` + traceparent + `",`, none, true, true},
		{"_meta is before the header", "traceparent: 00-11111111111111111111111111111111-2222222222222222-01", `"traceparent":"` + traceparent + `",`, none, true, true},
		{"what is malformed in _meta is not there", "traceparent: " + traceparent, `"traceparent":"00-zz",`, none, true, true},
		{"from a span of its own, by tracestate", "traceparent: " + ofItsOwn + "\ntracestate: other=1," + tracestate, "", none, true, true},
		{"likewise in _meta", "X: y", `"traceparent":"` + ofItsOwn + `","tracestate":"` + tracestate + `",`, none, true, true},
		{"a tracestate counts beside its own traceparent", "tracestate: " + tracestate, `"traceparent":"` + ofItsOwn + `",`, none, false, false},
		{"as an agent that the server acts as", "traceparent: " + traceparent, "", func(e *schemas.Event) { e.Agent = "boss" }, true, true},
		{"as another agent", "traceparent: " + traceparent, "", func(e *schemas.Event) { e.Agent = "stranger" }, true, false},
		{"of another tenant", "traceparent: " + traceparent, "", func(e *schemas.Event) { e.Tenant = "evil" }, true, false},
		{"in another trace", "traceparent: " + strings.Replace(traceparent, parent.TraceID(), "11111111111111111111111111111111", 1), "", none, true, false},
		{"of a trace that is nobody's here", "traceparent: 00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01", "", none, false, false},
		{"for a call of long ago", "traceparent: " + oldTrace, "", none, false, false},
		{"no trace", "X: y", "", none, false, false},
	} {
		t.Run(tt.what, func(t *testing.T) {
			var asked, caused []schemas.Event
			looked := 0
			s := newServer(t, mcp.Options{
				Now: func() time.Time { return noon },
				ActsAs: func(server string, as schemas.Agent) bool {
					return server == "weather" && as == "researcher" && parentAgent(tt.change) == "boss"
				},
				BySpan: func(_ context.Context, tenant schemas.Tenant, span string, minted time.Time) (schemas.Event, error) {
					looked++
					if tenant != "acme" || span != call.Span(schemas.PartUpstream) || noon.Add(-time.Minute).Sub(minted) >= schemas.SpanWithin {
						return schemas.Event{}, schemas.ErrNotFound
					}
					e := parent
					tt.change(&e)
					return e, nil
				},
				Store: func(_ context.Context, e schemas.Event) (schemas.Receipt, error) {
					if e.Kind() == schemas.KindCaused {
						caused = append(caused, e)
					}
					return schemas.Receipt{}, errors.Join(e.Check())
				},
				Ask: func(ctx context.Context, e schemas.Event, emit schemas.Emit) error {
					asked = append(asked, e)
					return answering(callAnswer)(ctx, e, emit)
				},
			})
			for range 2 { // the second time it is known
				w := httptest.NewRecorder()
				post(t, s, w, strings.Replace(strings.Replace(callRequest, "\n\n", "\n"+tt.header+"\n\n", 1), "$META",
					strings.Replace(goodMeta, `"_meta":{`, `"_meta":{`+tt.meta, 1), 1))
				if w.Code != 200 {
					t.Fatal(w.Code, w.Body)
				}
			}
			if (looked > 0) != tt.looked || tt.found && looked != 1 {
				t.Errorf("looked for %d times", looked)
			}
			for i, e := range asked {
				back := e.Data.(*schemas.Requested).Back
				if !tt.found {
					if e.Parent != "" || e.Root != e.Call || back || len(caused) != 0 {
						t.Errorf("parent %q, root %q, back %v, %v", e.Parent, e.Root, back, caused)
					}
					continue
				}
				if e.Parent != call || e.Root != root || !back || e.TraceID() != parent.TraceID() {
					t.Errorf("parent %q, root %q, back %v, trace %q", e.Parent, e.Root, back, e.Trace)
				}
				c := caused[i]
				if d := c.Data.(*schemas.Caused); c.Call != call || c.Session != "s-parents" || c.Seq != 0 || c.Edge != "" || d.Call != e.Call || d.Session != e.Session || d.Agent != "researcher" {
					t.Errorf("%+v %+v", c, d)
				}
			}
		})
	}
}

func parentAgent(change func(*schemas.Event)) schemas.Agent {
	var e schemas.Event
	change(&e)
	return e.Agent
}
