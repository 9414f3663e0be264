package mcp

import (
	"bytes"
	"context"
	"net/http"
	"sync"
	"time"

	"waybill.dev/schemas"
	"waybill.dev/schemas/jsonrpc"
)

// endpoint is what the path names: the front, nil when it is the endpoint of one
// server, and the name, "" for all servers together.
func (a *Adapter) endpoint(r *http.Request) (*schemas.Front, string) {
	name := r.PathValue("server")
	if name == schemas.Gateway {
		name = "" // the gateway's own name for /mcp
	}
	if name == "" {
		return a.fronts[schemas.Gateway], name
	}
	return a.fronts[name], name
}

// resolve finds out which server a request at a front is for, and what the name
// in it is there. The body stays as it came; [schemas.Requested].Alias is what
// it says. A name that the front does not have names no server: such a call, like
// all that concern no single server, is one for the front itself.
func (a *Adapter) resolve(ctx context.Context, e schemas.Event, front *schemas.Front, params jsonrpc.Value) {
	r := e.Data.(*schemas.Requested)
	named := func(alias, list, in string) {
		if front.Exposed != nil && r.Method != "tools/call" {
			return // a view shows tools only
		}
		server, name, shortened, ok := front.Resolve(alias)
		if !ok {
			return
		}
		if shortened {
			name = a.lengthen(ctx, e, front, server, name, alias, list, in)
		}
		r.Server, r.Alias, r.Name = server, alias, name
	}
	located := func(alias string) {
		if server, uri, ok := front.ResolveURI(alias); ok {
			r.Server, r.Alias, r.Name = server, alias, uri
		}
	}
	switch r.Method {
	case "tools/call":
		named(r.Name, "tools/list", "tools")
	case "prompts/get":
		named(r.Name, "prompts/list", "prompts")
	case "resources/read":
		located(r.Name)
	case "resources/subscribe", "resources/unsubscribe":
		r.Name, _ = params.Get("uri").Text()
		located(r.Name)
	case "completion/complete":
		if alias, ok := params.Get("ref", "name").Text(); ok {
			named(alias, "prompts/list", "prompts")
		} else if alias, ok := params.Get("ref", "uri").Text(); ok && len(alias) <= maxName {
			located(alias)
		}
	}
}

// asWritten is the target under the name that the caller knows.
func asWritten(r *schemas.Requested) schemas.Target {
	t := r.Target
	if r.Alias != "" && t.Name != "" {
		t.Name = r.Alias
	}
	return t
}

// maxPages bounds the pages of a list in which a shortened name is looked for.
const maxPages = 20

// lengthen finds the name that a shortened one stands for, by looking through
// the server's list on the caller's behalf: calls of their own, caused by e,
// which are decided on like any other. Without any it stands for itself. All of
// them together may take what one may, since the call that waits has a deadline.
func (a *Adapter) lengthen(ctx context.Context, e schemas.Event, front *schemas.Front, server, literal, alias, list, in string) string {
	key := server + "\x00" + list + "\x00" + alias
	if name, ok := a.long.get(key); ok {
		return name
	}
	var until time.Time
	if limit := a.o.Deadline(server, list); limit > 0 {
		until = a.o.Now().UTC().Add(limit)
	}
	var cursor []byte
	for range maxPages {
		body, ok := a.listPage(ctx, e, server, list, cursor, until)
		if !ok {
			return literal
		}
		m, err := jsonrpc.Decode(body, answerLimits)
		if err != nil {
			return literal
		}
		for v := range m.Result().Get(in).Elements() {
			name, _ := v.Get("name").Text()
			if front.Alias(server, name) == alias && len(name) <= maxName {
				a.long.put(key, name)
				return name
			}
		}
		next := m.Result().Get("nextCursor")
		if text, ok := next.Text(); !ok || text == "" {
			return literal
		}
		cursor = bytes.Clone(next.Raw())
	}
	return literal
}

// listPage asks for one page of a list; until is its deadline, zero: none.
func (a *Adapter) listPage(ctx context.Context, e schemas.Event, server, list string, cursor []byte, until time.Time) (body []byte, ok bool) {
	caused := e.Data.(*schemas.Requested)
	r := &schemas.Requested{Target: schemas.Target{Protocol: Protocol, Server: server, Method: list}, Revision: caused.Revision, Deadline: until}
	params := []byte("{")
	if caused.Revision >= Revision {
		params = append(params, `"_meta":{"`+metaVersion+`":"`+Revision+`","`+metaCapabilities+`":{}}`...)
	}
	if cursor != nil {
		if len(params) > 1 {
			params = append(params, ',')
		}
		params = append(append(params, `"cursor":`...), cursor...)
	}
	request := append([]byte(`{"jsonrpc":"2.0","id":1,"method":"`+list+`","params":`), params...)
	now := a.o.Now().UTC()
	if !until.IsZero() {
		if !now.Before(until) {
			return nil, false
		}
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, until.Sub(now)+grace)
		defer cancel()
	}
	child := e.Next(r, append(request, "}}"...))
	child.Call, child.Parent, child.Time = schemas.NewCallID(now), e.Call, now
	child.Trace, child.TraceState = e.Onward(a.o.Flags)
	err := a.o.Ask(ctx, child, func(_ context.Context, e schemas.Event) (schemas.Receipt, error) {
		if _, done := e.Data.(*schemas.Completed); done {
			body, ok = e.Body, true
		}
		return schemas.Receipt{}, nil
	})
	if err != nil {
		a.o.Log.Warn("list not heard to its end", "call", child.Call, "server", server, "error", err)
	}
	return body, ok
}

// outward makes the uris of a message that comes before the answer, or outside
// of any call, those of the front.
func (a *Adapter) outward(front *schemas.Front, server string, body []byte) []byte {
	if front == nil || front.Exposed != nil || server == "" || server == front.Name || !bytes.Contains(body, []byte("updated")) {
		return body
	}
	m, err := jsonrpc.Decode(body, answerLimits)
	if err != nil || m.Method() != "notifications/resources/updated" {
		return body
	}
	p := m.Patch()
	outwardURI(p, front, server, m.Params().Get("uri"))
	if out := p.Bytes(); out != nil {
		return out
	}
	return body
}

// outwardResult makes the uris in a result those of the front.
func outwardResult(p *jsonrpc.Patch, front *schemas.Front, t schemas.Target, result jsonrpc.Value) {
	if front == nil || front.Exposed != nil || t.Server == front.Name || result.Kind() != jsonrpc.Object {
		return
	}
	content := func(v jsonrpc.Value) {
		switch kind, _ := v.Get("type").Text(); kind {
		case "resource_link":
			outwardURI(p, front, t.Server, v.Get("uri"))
		case "resource":
			outwardURI(p, front, t.Server, v.Get("resource", "uri"))
		}
	}
	switch t.Method {
	case "resources/read":
		for v := range result.Get("contents").Elements() {
			outwardURI(p, front, t.Server, v.Get("uri"))
		}
	case "tools/call":
		for v := range result.Get("content").Elements() {
			content(v)
		}
	case "prompts/get":
		for v := range result.Get("messages").Elements() {
			content(v.Get("content"))
		}
	}
}

func outwardURI(p *jsonrpc.Patch, front *schemas.Front, server string, uri jsonrpc.Value) {
	if text, ok := uri.Text(); ok {
		p.Replace(uri, jsonrpc.Quote(front.URI(server, text)))
	}
}

// maxLong bounds the memory of names that were looked up, at some 200 bytes
// each.
const maxLong = 4096

// names is a map that is emptied when it is full.
type names struct {
	mu sync.Mutex
	m  map[string]string // guarded by mu
}

func (n *names) get(key string) (string, bool) {
	n.mu.Lock()
	defer n.mu.Unlock()
	name, ok := n.m[key]
	return name, ok
}

func (n *names) put(key, name string) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.m == nil || len(n.m) >= maxLong {
		n.m = map[string]string{}
	}
	n.m[key] = name
}
