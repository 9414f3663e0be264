package dispatch

import (
	"context"
	"fmt"

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

func ownTools(names []string) ([]ownTool, error) {
	var tools []ownTool
	for _, name := range names {
		return nil, fmt.Errorf("the gateway has no tool %q of its own", name)
	}
	return tools, nil
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
		if !allowed(q.c.Only, t.name) {
			removed = append(removed, t.name)
			continue
		}
		name := t.name
		if q.c.Event.Parent == "" {
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
	for _, t := range q.own {
		if t.name == q.c.Requested.Name {
			return t.call(q, ctx, q.m.Params().Get("arguments"))
		}
	}
	return q.error(q.c, jsonrpc.CodeInvalidParams, fmt.Sprintf("unknown tool %q", q.c.Requested.Name)), nil
}
