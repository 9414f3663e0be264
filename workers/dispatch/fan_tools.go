package dispatch

import (
	"context"
	"fmt"
	"slices"

	"waybill.dev/schemas"
	"waybill.dev/schemas/jsonrpc"
)

// Fanout says which tools of its own the gateway has at its front.
type Fanout struct {
	Tools       []string // find_tools, call_many; none: no such tools
	Concurrency int      // calls that one call_many has under way at once; default 16
}

// The gateway's own tools.
const (
	findTools = "find_tools"
	callMany  = "call_many"
)

// ownTool is a tool of the gateway's own.
type ownTool struct {
	name string
	rest string // its definition, but for the name
	call func(*question, context.Context, jsonrpc.Value) (Answer, error)
}

// ownTools are those that the config names, in the order of this list.
func ownTools(names []string) ([]ownTool, error) {
	known := []ownTool{
		{findTools, findToolsDefinition, (*question).findTools},
		{callMany, callManyDefinition, (*question).callMany},
	}
	for _, name := range names {
		if !slices.ContainsFunc(known, func(t ownTool) bool { return t.name == name }) {
			return nil, fmt.Errorf("the gateway has no tool %q of its own", name)
		}
	}
	return slices.DeleteFunc(known, func(t ownTool) bool { return !slices.Contains(names, t.name) }), nil
}

// ownListed are the gateway's own tools in a list, and the names of those that
// this caller may not call.
//
// The call that lists is one to the server [schemas.Gateway], and so says in
// Only what the rules let the caller call on that server: exactly these tools.
func (q *question) ownListed(method string) (raw [][]byte, removed []string) {
	if method != "tools/list" {
		return nil, nil
	}
	for _, t := range q.own {
		if !q.c.shows(t.name) {
			removed = append(removed, t.name)
			continue
		}
		name := t.name
		if !q.c.Requested.Within(q.c.Event) {
			name = q.Alias(schemas.Gateway, name)
		}
		raw = append(raw, []byte(`{"name":"`+name+`",`+t.rest+`}`))
	}
	return raw, removed
}

// allowed tells whether a name fits what a list may show.
func allowed(only []string, name string) bool {
	if only == nil {
		return true
	}
	for _, pattern := range only {
		if schemas.Match(pattern, name) {
			return true
		}
	}
	return false
}

// ownCall answers tools/call.
func (q *question) ownCall(ctx context.Context) (Answer, error) {
	r := q.c.Requested
	if name, ok := q.m.Params().Get("name").Text(); !ok || name != r.Name && (r.Alias == "" || name != r.Alias) {
		return Answer{}, faultf(Invalid, "the request's name is %q, authorized was %q", name, r.Name)
	}
	for _, t := range q.own {
		if t.name != r.Name {
			continue
		}
		arguments := q.m.Params().Get("arguments")
		if k := arguments.Kind(); k != jsonrpc.Object && k != jsonrpc.None {
			return q.error(q.c, jsonrpc.CodeInvalidParams, "arguments must be an object"), nil
		}
		return t.call(q, ctx, arguments)
	}
	return q.unknown(), nil
}

// misused answers a tool's call whose arguments are wrong: as a result, so that
// whoever chose them reads it and mends them (MCP, server/tools, "Error Handling").
func (q *question) misused(format string, args ...any) Answer {
	return q.toolResult(fmt.Sprintf(format, args...), nil, true)
}

// textToo is up to which size a structured result is repeated as text, for
// clients that look at the content only (2025-11-25, server/tools, "Structured
// Content"). It fits into listReserve.
const textToo = 24 << 10

// toolResult is the result of one of the gateway's own tools. A client of
// 2025-03-26 knows no structured content and gets all of it as text, as far as
// an answer has room.
func (q *question) toolResult(text string, structured []byte, isError bool) Answer {
	b := append([]byte(`"content":[{"type":"text","text":`), jsonrpc.Quote(text)...)
	most := textToo
	textOnly := q.c.Requested.Revision == "2025-03-26"
	if textOnly {
		most = int(q.opt.MaxAnswer) - listReserve
	}
	if quoted := jsonrpc.Quote(string(structured)); structured != nil && len(quoted) <= most {
		b = append(append(b, `},{"type":"text","text":`...), quoted...)
	}
	b = append(b, `}]`...)
	if structured != nil && !textOnly {
		b = append(append(b, `,"structuredContent":`...), structured...)
	}
	if isError {
		b = append(b, `,"isError":true`...)
	}
	return q.result(q.c, q.complete(b, "", false))
}
