package dispatch

import (
	"bytes"
	"strings"

	"waybill.dev/schemas/jsonrpc"
)

// onward is the trace context that goes with a call to its server
// ([schemas.Event.Onward]): in the headers of HTTP always, and in _meta
// (2026-07-28, SEP-414), which is what servers of MCP look at first,
//
//   - in the place of the caller's, where that is there: a server would take the
//     caller for who calls it;
//   - else for methods that run something at the server, where the gateway is
//     traced itself, or there are no headers, over stdio. All other bodies keep
//     their bytes.
type onward struct {
	parent, state string
	inMeta        bool
}

// runs are the methods that run something at a server, which may have to do with
// others in its turn.
var runs = map[string]bool{"tools/call": true, "prompts/get": true, "resources/read": true, "completion/complete": true}

func (r *run) onward() onward {
	var t onward
	t.parent, t.state = r.e.Onward(r.d.opt.Flags)
	t.inMeta = r.d.opt.Traced || r.up.mcp != nil && r.up.mcp.held
	return t
}

// headers hands the headers on, by their canonical names.
func (t onward) headers(set func(name, value string)) {
	if t.parent != "" {
		set("Traceparent", t.parent)
		set("Tracestate", t.state)
	}
}

// mayName tells whether there may be a name of a trace's in a _meta, in whatever
// letters or escapes: nearly always there is not, and nobody has to look.
func mayName(meta []byte) bool {
	for rest := meta; ; {
		i := bytes.IndexAny(rest, "tT\\")
		if i < 0 {
			return false
		}
		if rest[i] == '\\' || len(rest) >= i+5 && bytes.EqualFold(rest[i:i+5], []byte("trace")) {
			return true
		}
		rest = rest[i+1:]
	}
}

// write puts the context into a request's _meta, if it belongs there, and tells
// whether it did.
func (t onward) write(p *jsonrpc.Patch, msg *jsonrpc.Message) bool {
	if t.parent == "" {
		return false
	}
	params := msg.Params()
	meta, has := params.Get("_meta"), false
	if mayName(meta.Raw()) {
		for name := range meta.Members() {
			switch {
			case name == "traceparent", name == "tracestate":
				has = true
			case strings.EqualFold(name, "traceparent"), strings.EqualFold(name, "tracestate"):
				return false // whatever that is: beside it nothing can be put that all read alike
			}
		}
	}
	if !has && !(t.inMeta && runs[msg.Method()] && msg.IsRequest()) {
		return false
	}
	parent, state := jsonrpc.Quote(t.parent), jsonrpc.Quote(t.state)
	switch {
	case meta.Kind() == jsonrpc.Object:
		p.Set(meta, "traceparent", parent).Set(meta, "tracestate", state)
	case meta.Exists(), params.Kind() != jsonrpc.Object:
		return false // for the server to say
	default:
		b := append([]byte(`{"traceparent":`), parent...)
		b = append(append(b, `,"tracestate":`...), state...)
		p.Set(params, "_meta", append(b, '}'))
	}
	return true
}
