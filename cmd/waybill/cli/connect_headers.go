package cli

import (
	"fmt"
	"net/http"

	"waybill.dev/schemas/jsonrpc"
	"waybill.dev/workers/dispatch"
)

// Over HTTP a message of revision 2026-07-28 repeats in headers what those on
// the way want to know of it (streamable HTTP, "Standard Request Headers" and
// "Custom Headers from Tool Parameters"). A client that speaks stdio has none,
// so they are made here, of the message itself.

// modernHeader is that of a message; params are its Mcp-Param headers.
func (r *relay) modernHeader(m *jsonrpc.Message, params map[string]string) http.Header {
	h := http.Header{"Content-Type": {"application/json"}, "Accept": {"application/json, text/event-stream"}}
	version, ok := m.Params().Get("_meta", metaVersion).Text()
	if !ok {
		r.mu.Lock()
		version = r.modern
		r.mu.Unlock()
	}
	h["Mcp-Protocol-Version"] = []string{dispatch.HeaderText(version)}
	h["Mcp-Method"] = []string{dispatch.HeaderText(m.Method())}
	if member := dispatch.NamedIn(m.Method()); member != "" {
		if name, ok := m.Params().Get(member).Text(); ok {
			h["Mcp-Name"] = []string{dispatch.HeaderText(name)}
		}
	}
	for name, value := range params {
		h[name] = []string{value}
	}
	return h
}

// paramHeaders are those of a call of a tool that was listed with arguments to
// be repeated.
func (r *relay) paramHeaders(m *jsonrpc.Message) map[string]string {
	if m.Method() != "tools/call" {
		return nil
	}
	name, _ := m.Params().Get("name").Text()
	r.mu.Lock()
	of := r.mirrors[name]
	r.mu.Unlock()
	return of.Headers(m.Params().Get("arguments"))
}

// learn takes from a list of tools on its way to the client what their calls
// repeat in headers.
func (c *carried) learn(m *jsonrpc.Message) {
	if c.modern && c.method == "tools/list" {
		c.r.learn(m)
	}
}

func (r *relay) learn(m *jsonrpc.Message) {
	tools := m.Result().Get("tools")
	if tools.Kind() != jsonrpc.Array {
		return
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	for tool := range tools.Elements() {
		name, _ := tool.Get("name").Text()
		of, err := dispatch.MirrorsOf(tool)
		switch {
		case err != nil || len(of) == 0:
			delete(r.mirrors, name)
		case r.mirrors[name] != nil || len(r.mirrors) < connectMirrors:
			r.mirrors[name] = of
		}
	}
}

// lookUp lists the tools to find out what a call repeats in headers that was
// refused without; nil when that is nothing else than what it had. What fails
// here shows in the refusal, which the client then gets.
func (r *relay) lookUp(c *carried) map[string]string {
	before := r.paramHeaders(c.m)
	name, _ := c.m.Params().Get("name").Text()
	meta := c.m.Params().Get("_meta")
	said := []byte("{")
	for i, member := range []string{metaVersion, "io.modelcontextprotocol/clientCapabilities", "io.modelcontextprotocol/clientInfo"} {
		if v := meta.Get(member); v.Exists() {
			if i > 0 {
				said = append(said, ',')
			}
			said = append(append(append(said, jsonrpc.Quote(member)...), ':'), v.Raw()...)
		}
	}
	said = append(said, '}')
	cursor := jsonrpc.Value{}
	for page := range 100 {
		body := fmt.Appendf(nil, `{"jsonrpc":"2.0","id":"waybill-connect-%d","method":"tools/list","params":{"_meta":%s`, page, said)
		if cursor.Exists() {
			body = append(append(body, `,"cursor":`...), cursor.Raw()...)
		}
		m, err := jsonrpc.Decode(append(body, "}}"...), jsonrpc.Limits{})
		if err != nil {
			return nil
		}
		list := &carried{r: r, m: m, id: m.ID().Raw(), method: m.Method(), modern: true, ctx: c.ctx, sent: make(chan struct{})}
		resp, err := r.reach(c.ctx, c.until, r.modernHeader(m, nil), m.Raw(), nil, nil)
		if err != nil {
			return nil
		}
		answer, err := list.read(resp, &strand{c: list})
		if err != nil {
			return nil
		}
		a, err := jsonrpc.Decode(answer, connectAnswerLimits)
		if err != nil {
			return nil
		}
		for tool := range a.Result().Get("tools").Elements() {
			if listed, _ := tool.Get("name").Text(); listed == name {
				return other(before, r.paramHeaders(c.m))
			}
		}
		if cursor = a.Result().Get("nextCursor"); cursor.Kind() != jsonrpc.String {
			return nil
		}
	}
	return nil
}

// other is b unless it is the same as a.
func other(a, b map[string]string) map[string]string {
	if len(a) != len(b) {
		return b
	}
	for k, v := range b {
		if w, ok := a[k]; !ok || v != w {
			return b
		}
	}
	return nil
}

// missed tells the client of what a subscription is for that it may have
// changed: the subscription broke off and was made anew, and what was said in
// between nobody has heard. ack is the new acknowledgement, which the client
// does not get a second time.
func (r *relay) missed(ack *jsonrpc.Message) {
	agreed := ack.Params().Get("notifications")
	meta := ""
	if v := ack.Params().Get("_meta"); v.Exists() {
		meta = `"_meta":` + string(v.Raw())
	}
	tell := func(method, params string) {
		if params != "" && meta != "" {
			params += ","
		}
		r.write([]byte(`{"jsonrpc":"2.0","method":"notifications/` + method + `","params":{` + params + meta + `}}`))
	}
	for _, of := range []string{"tools", "prompts", "resources"} {
		if yes, _ := agreed.Get(of + "ListChanged").Bool(); yes {
			tell(of+"/list_changed", "")
		}
	}
	if uris := agreed.Get("resourceSubscriptions"); uris.Kind() == jsonrpc.Array {
		for uri := range uris.Elements() {
			tell("resources/updated", `"uri":`+string(uri.Raw()))
		}
	}
}
