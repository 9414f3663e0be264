// Package traces makes spans of calls, and exports them to a collector of
// OpenTelemetry. A call's ending accounts for the call, so its spans are made of
// that event alone ([Spans]): the same event makes the same spans, wherever and
// how often it is read. What they are called is in names.go; an [Exporter] sends
// them, and drops what there is no room for.
package traces

import (
	"bytes"
	"encoding/hex"
	"time"

	"go.opentelemetry.io/otel/attribute"
	commonpb "go.opentelemetry.io/proto/otlp/common/v1"
	tracepb "go.opentelemetry.io/proto/otlp/trace/v1"

	"waybill.dev/schemas"
	"waybill.dev/schemas/jsonrpc"
)

// Peer is what the configuration says of a server.
type Peer struct {
	Address   string // host, or the program
	Port      int
	Transport string // tcp or pipe; "" where nothing is called
	Front     bool   // the gateway itself, for several servers
}

// lastWithSessions: later revisions of MCP have none.
const withoutSessions = "2026-07-28"

// call is what the spans of a call are made of.
type call struct {
	schemas.Summary
	event        schemas.Event // that ended it
	peer         Peer
	status       int // of HTTP
	toolError    bool
	rule, reason string // of the decision, where the ending says it
}

// Spans are those of the call that the event ends, the first of which is the
// whole of it; none for other events. flags are as for
// [schemas.Event.TraceFlags].
//
//	call      of its caller's span: SERVER, or INTERNAL where the gateway made the call for another
//	├ policy  until it was decided: INTERNAL
//	└ upstream  from the first time that the server was called: CLIENT, and what the server is told that it is called by
func Spans(end schemas.Event, peer Peer, flags func(id string) string) []*tracepb.Span {
	c := &call{event: end, peer: peer}
	switch d := end.Data.(type) {
	case *schemas.Completed:
		c.Summary, c.status = d.Summary, d.Status
		c.toolError = d.ErrorCode == 0 && d.Method == "tools/call" && isError(end.Body)
	case *schemas.Failed:
		c.Summary = d.Summary
	case *schemas.Cancelled:
		c.Summary = d.Summary
	case *schemas.Denied:
		c.Summary, c.rule, c.reason = d.Summary, d.Rule, d.Reason
	default:
		return nil
	}
	if c.rule == "" {
		c.rule = c.Permit
	}
	ended := end.Stored
	began := c.RequestedAt
	if began.IsZero() { // nothing is known of it but that it has ended
		began = end.Call.Minted()
	}
	if began.IsZero() || ended.Before(began) {
		began = ended
	}
	flag, _ := hex.DecodeString(end.TraceFlags(flags))
	span := func(part schemas.Part, of on, name string, kind tracepb.Span_SpanKind, from, to time.Time) *tracepb.Span {
		s := &tracepb.Span{
			TraceId: raw(end.TraceID()), SpanId: raw(end.Call.Span(part)), ParentSpanId: raw(end.Call.Span(schemas.PartCall)),
			Flags: uint32(flag[0]), Name: valid(name), Kind: kind,
			StartTimeUnixNano: nano(from), EndTimeUnixNano: nano(to),
			Attributes: values(c.attributes(of)), Status: &tracepb.Status{},
		}
		if of != onPolicy && c.errorType() != "" {
			s.Status.Code = tracepb.Status_STATUS_CODE_ERROR
			s.Status.Message = c.message()
		}
		return s
	}

	kind := tracepb.Span_SPAN_KIND_SERVER
	if end.Parent != "" && !c.Back {
		kind = tracepb.Span_SPAN_KIND_INTERNAL
	}
	whole := span(schemas.PartCall, onCall, nameCall(c.Target), kind, began, ended)
	whole.ParentSpanId, whole.TraceState = raw(end.ParentSpan()), end.TraceState
	all := []*tracepb.Span{whole}

	if !c.RequestedAt.IsZero() {
		decided := c.AuthorizedAt
		if decided.IsZero() {
			decided = ended
		}
		all = append(all, span(schemas.PartPolicy, onPolicy, namePolicy, tracepb.Span_SPAN_KIND_INTERNAL, began, decided))
	}
	if !c.UpstreamAt.IsZero() {
		kind, name := tracepb.Span_SPAN_KIND_CLIENT, nameCall(c.Target)
		if peer.Front {
			kind, name = tracepb.Span_SPAN_KIND_INTERNAL, nameFront
		}
		// By another clock, that of who called it.
		from := c.UpstreamAt
		if from.Before(began) {
			from = began
		}
		if from.After(ended) {
			from = ended
		}
		all = append(all, span(schemas.PartUpstream, onUpstream, name, kind, from, ended))
	}
	return all
}

// decision is what policy said.
func (c *call) decision() string {
	switch {
	case c.event.Kind() == schemas.KindDenied:
		return "denied"
	case !c.AuthorizedAt.IsZero():
		return "authorized"
	}
	return "none" // it expired, or could not be read
}

// message is what a status says beside the error's type: nothing that a caller or
// a server has said, which belongs into the record.
func (c *call) message() string {
	switch c.event.Data.(type) {
	case *schemas.Completed:
		return "the server answered with an error"
	case *schemas.Failed:
		return "the gateway has no answer"
	case *schemas.Denied:
		return "policy did not permit the call"
	}
	return "the call was cancelled"
}

func (c *call) inSession() bool { return c.Revision != "" && c.Revision < withoutSessions }

func (c *call) resource() bool {
	switch c.Method {
	case "resources/read", "resources/subscribe", "resources/unsubscribe":
		return true
	}
	return false
}

// isError tells whether a tool says that it has failed.
func isError(answer []byte) bool {
	if !bytes.Contains(answer, []byte("isError")) {
		return false
	}
	m, err := jsonrpc.Decode(answer, jsonrpc.Limits{Bytes: len(answer), Depth: 512, AllowCaseVariants: true})
	return err == nil && string(m.Result().Get("isError").Raw()) == "true"
}

// raw is an id as OTLP has it.
func raw(id string) []byte {
	b, _ := hex.DecodeString(id)
	if len(b) == 0 {
		return nil
	}
	return b
}

func nano(t time.Time) uint64 { return uint64(max(0, t.UnixNano())) }

func values(of []attribute.KeyValue) []*commonpb.KeyValue {
	all := make([]*commonpb.KeyValue, 0, len(of))
	for _, kv := range of {
		v := &commonpb.AnyValue{}
		switch kv.Value.Type() {
		case attribute.INT64:
			v.Value = &commonpb.AnyValue_IntValue{IntValue: kv.Value.AsInt64()}
		case attribute.BOOL:
			v.Value = &commonpb.AnyValue_BoolValue{BoolValue: kv.Value.AsBool()}
		case attribute.FLOAT64:
			v.Value = &commonpb.AnyValue_DoubleValue{DoubleValue: kv.Value.AsFloat64()}
		case attribute.STRINGSLICE:
			list := &commonpb.ArrayValue{}
			for _, s := range kv.Value.AsStringSlice() {
				list.Values = append(list.Values, &commonpb.AnyValue{Value: &commonpb.AnyValue_StringValue{StringValue: s}})
			}
			v.Value = &commonpb.AnyValue_ArrayValue{ArrayValue: list}
		default:
			v.Value = &commonpb.AnyValue_StringValue{StringValue: valid(kv.Value.AsString())}
		}
		all = append(all, &commonpb.KeyValue{Key: string(kv.Key), Value: v})
	}
	return all
}
