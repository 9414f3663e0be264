package bus_test

import (
	"errors"
	"testing"
	"time"

	"waybill.dev/bus"
	"waybill.dev/bus/embed"
	"waybill.dev/schemas"
)

// TestBySpan: a call is found by the span that its server was told, among others
// of its tenant and of another, without an index, and nothing else is.
func TestBySpan(t *testing.T) {
	l := start(t, embed.Options{}).open(bus.Options{Role: bus.RoleEdge})
	now := time.Now()
	var calls []schemas.Event
	for i := range 300 {
		e := request(`{"jsonrpc":"2.0"}`)
		if i%3 == 0 {
			e.Tenant = "umbrella"
		}
		if _, err := l.Publish(t.Context(), e); err != nil {
			t.Fatal(err)
		}
		calls = append(calls, e)
	}
	find := func(tenant schemas.Tenant, span string) (schemas.Event, error) {
		minted, ok := schemas.SpanTime(span, time.Now())
		if !ok {
			t.Fatalf("span %q tells no time", span)
		}
		return l.BySpan(t.Context(), tenant, span, minted)
	}
	for _, e := range []schemas.Event{calls[0], calls[1], calls[299]} {
		got, err := find(e.Tenant, e.Call.Span(schemas.PartUpstream))
		if err != nil || got.Call != e.Call || got.Agent != e.Agent || got.Session != e.Session {
			t.Errorf("call %s: found %s of %s: %v", e.Call, got.Call, got.Agent, err)
		}
	}
	for what, span := range map[string]string{
		"of another part":   calls[1].Call.Span(schemas.PartCall),
		"of another tenant": calls[0].Call.Span(schemas.PartUpstream),
		// The same time, but nobody's.
		"of no call":      schemas.NewCallID(now).Span(schemas.PartUpstream),
		"of a later call": schemas.NewCallID(now.Add(time.Hour)).Span(schemas.PartUpstream),
	} {
		if got, err := l.BySpan(t.Context(), "acme", span, now.Truncate(schemas.SpanWithin)); !errors.Is(err, schemas.ErrNotFound) {
			t.Errorf("a span %s: found %s: %v", what, got.Call, err)
		}
	}
}
