package traces

import (
	"strconv"

	"go.opentelemetry.io/otel/attribute"
	semconv "go.opentelemetry.io/otel/semconv/v1.41.0"

	"waybill.dev/schemas"
)

// All that a span is called by stands here: the conventions for GenAI and MCP are
// in development and have moved out of the core ones after 1.41.0, the last
// version with names for Go, so that they will have to be followed.

// schemaURL is the version of the conventions that the names are of.
const schemaURL = semconv.SchemaURL

// Names of spans. A call is named by its method and what it is for, of the tools
// and prompts, which are few; the same is its server's part.
const (
	namePolicy = "waybill.policy"
	nameFront  = "waybill.front" // the gateway's own part, of what it answers for several servers
)

func nameCall(t schemas.Target) string {
	if t.Name != "" && (t.Method == "tools/call" || t.Method == "prompts/get") {
		return t.Method + " " + t.Name
	}
	return t.Method
}

// on are the spans that say something.
type on int

const (
	onCall on = 1 << iota
	onPolicy
	onUpstream
	onBoth = onCall | onUpstream
	onAll  = onBoth | onPolicy
)

// names is what spans say, by what the conventions call it. A value that is not
// there is left out. Arguments and results are not said: they are in the record,
// for those who may read them.
var names = []struct {
	key attribute.Key
	on  on
	of  func(*call) attribute.Value
}{
	{semconv.McpMethodNameKey, onBoth, func(c *call) attribute.Value { return text(c.Method) }},
	{semconv.McpProtocolVersionKey, onBoth, func(c *call) attribute.Value { return text(c.Revision) }},
	{semconv.McpSessionIDKey, onCall, func(c *call) attribute.Value { return text(onlyIf(c.inSession(), string(c.event.Session))) }}, // the key: the ID itself is a secret
	{semconv.McpResourceURIKey, onBoth, func(c *call) attribute.Value { return text(onlyIf(c.resource(), c.Name)) }},
	{semconv.JSONRPCRequestIDKey, onUpstream, func(c *call) attribute.Value { return text(string(c.event.Call)) }}, // the caller's own is in the request's body, which no ending repeats
	{semconv.RPCResponseStatusCodeKey, onBoth, func(c *call) attribute.Value { return text(c.rpcError()) }},
	{semconv.ErrorTypeKey, onBoth, func(c *call) attribute.Value { return text(c.errorType()) }},
	{semconv.GenAIOperationNameKey, onBoth, func(c *call) attribute.Value { return text(onlyIf(c.Method == "tools/call", "execute_tool")) }},
	{semconv.GenAIToolNameKey, onBoth, func(c *call) attribute.Value { return text(onlyIf(c.Method == "tools/call", c.Name)) }},
	{semconv.GenAIPromptNameKey, onBoth, func(c *call) attribute.Value { return text(onlyIf(c.Method == "prompts/get", c.Name)) }},
	{semconv.GenAIConversationIDKey, onCall, func(c *call) attribute.Value { return text(string(c.event.Session)) }},
	{semconv.GenAIAgentIDKey, onCall, func(c *call) attribute.Value { return text(string(c.event.Agent)) }},
	{semconv.NetworkTransportKey, onUpstream, func(c *call) attribute.Value { return text(c.peer.Transport) }},
	{semconv.ServerAddressKey, onUpstream, func(c *call) attribute.Value { return text(c.peer.Address) }},
	{semconv.ServerPortKey, onUpstream, func(c *call) attribute.Value { return number(c.peer.Port) }},
	{semconv.HTTPResponseStatusCodeKey, onUpstream, func(c *call) attribute.Value { return number(c.status) }},

	// What no convention has a name for.
	{"waybill.tenant", onAll, func(c *call) attribute.Value { return text(string(c.event.Tenant)) }},
	{"waybill.call", onAll, func(c *call) attribute.Value { return text(string(c.event.Call)) }},
	{"waybill.parent", onCall, func(c *call) attribute.Value { return text(string(c.event.Parent)) }},
	{"waybill.root", onCall, func(c *call) attribute.Value { return text(string(c.event.Root)) }},
	{"waybill.server", onBoth, func(c *call) attribute.Value { return text(c.Server) }},
	{"waybill.outcome", onCall, func(c *call) attribute.Value { return text(string(c.event.Kind())) }},
	{"waybill.decision", onPolicy, func(c *call) attribute.Value { return text(c.decision()) }},
	{"waybill.rule", onPolicy, func(c *call) attribute.Value { return text(c.rule) }},
	{"waybill.reason", onPolicy, func(c *call) attribute.Value { return text(c.reason) }},
	{"waybill.attempts", onUpstream, func(c *call) attribute.Value { return number(c.Attempts) }},
	{"waybill.messages", onUpstream, func(c *call) attribute.Value { return number(c.Chunks) }},
}

func text(s string) attribute.Value {
	if s == "" {
		return attribute.Value{}
	}
	return attribute.StringValue(s)
}

func number(n int) attribute.Value {
	if n == 0 {
		return attribute.Value{}
	}
	return attribute.IntValue(n)
}

func onlyIf(is bool, s string) string {
	if is {
		return s
	}
	return ""
}

// attributes are what a span says.
func (c *call) attributes(of on) []attribute.KeyValue {
	var all []attribute.KeyValue
	for _, n := range names {
		if n.on&of == 0 {
			continue
		}
		if v := n.of(c); v.Type() != attribute.EMPTY {
			all = append(all, attribute.KeyValue{Key: n.key, Value: v})
		}
	}
	return all
}

// toolError is the error.type of a tool's answer that says isError.
const toolError = "tool_error"

// errorType is error.type: the code of an error that the server answered,
// tool_error, the code of a failure ([schemas.Failure]), denied or cancelled.
func (c *call) errorType() string {
	switch d := c.event.Data.(type) {
	case *schemas.Completed:
		if c.toolError {
			return toolError
		}
		return c.rpcError()
	case *schemas.Failed:
		return string(d.Code)
	}
	return string(c.event.Kind())
}

// rpcError is the code of an error that the server answered.
func (c *call) rpcError() string {
	if d, ok := c.event.Data.(*schemas.Completed); ok && d.ErrorCode != 0 {
		return strconv.Itoa(d.ErrorCode)
	}
	return ""
}
