package dispatch

import (
	"cmp"
	"context"
	"fmt"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"time"

	"waybill.dev/schemas"
	"waybill.dev/schemas/jsonrpc"
)

const callManyDefinition = `"title":"Call many tools","description":"Calls several tools at once, or one tool on several servers, and returns all results together, in the order of the calls. One that fails does not keep the others from working. Each is a call like any other: it needs the same permission, and is not repeated.",` +
	`"inputSchema":{"type":"object","properties":{` +
	`"calls":{"type":"array","description":"The calls. Instead of tool and servers.","minItems":1,"maxItems":100,"items":{"type":"object","properties":{"tool":{"type":"string","description":"The tool's name as it is listed here: server__tool."},"arguments":{"type":"object"}},"required":["tool"],"additionalProperties":false}},` +
	`"tool":{"type":"string","description":"The name of a tool that several servers have, as these call it: without server__."},` +
	`"servers":{"type":"array","description":"The servers to call it on; \"*\" for all on which you may.","minItems":1,"maxItems":100,"items":{"type":"string"}},` +
	`"arguments":{"type":"object","description":"With tool and servers: the same for all."}},` +
	`"additionalProperties":false},` +
	`"outputSchema":{"type":"object","properties":{` +
	`"results":{"type":"array","items":{"type":"object","properties":{"tool":{"type":"string"},"server":{"type":"string"},"ok":{"type":"boolean"},"result":{"type":"object"},"error":{"type":"object","properties":{"code":{"type":["string","integer"]},"message":{"type":"string"}},"required":["code","message"]},"cut":{"type":"boolean"},"bytes":{"type":"integer"},"call":{"type":"string"}},"required":["tool","ok"]}},` +
	`"ok":{"type":"integer"},"failed":{"type":"integer"}},"required":["results","ok","failed"]},` +
	`"annotations":{"readOnlyHint":false,"destructiveHint":true,"idempotentHint":false,"openWorldHint":true}`

const (
	maxMany  = 100
	leastCut = 64 << 10 // results up to this size are kept, as long as all of them together have room
)

// item is one of the calls of call_many.
type item struct {
	tool         string // as the caller names it
	server, name string // server "": there is none
	arguments    []byte // JSON, or nil
	shortened    bool   // name may stand for another, see schemas.Front.Resolve
	unnamed      bool   // the caller has not named the server but said "*"

	out    ended
	result []byte // that is kept
	size   int    // of it, also when it is not
	failed bool   // the tool says so
	said   string // the message of an error
}

// callMany makes several calls at once. It has no effect itself, so it may be
// called only once for the sake of what it calls; each of these has its own
// permission, claim and ending, whatever becomes of the others or of this one.
func (q *question) callMany(ctx context.Context, arguments jsonrpc.Value) (Answer, error) {
	items, wrong := q.items(arguments)
	if wrong != "" {
		return q.misused("%s Nothing was called.", wrong), nil
	}
	room := int(q.opt.MaxAnswer) - listReserve
	keep := max(room/len(items), leastCut)
	until := q.until(q.opt.MaxStream)
	mirrored := map[string]func() map[string][]mirror{}
	for i := range items {
		if s := items[i].server; mirrored[s] == nil {
			mirrored[s] = q.mirrored(ctx, s, until)
		}
	}
	total := fmt.Sprintf(`,"total":%d`, len(items))
	if slices.ContainsFunc(items, func(it item) bool { return it.unnamed }) {
		total = "" // it would tell how many servers there are
	}
	done := make(chan *item, len(items))
	go each(len(items), positive(q.opt.Fanout.Concurrency, 16), func(i int) {
		q.callOne(ctx, &items[i], keep, until, mirrored[items[i].server])
		done <- &items[i]
	})
	token := q.m.Params().Get("_meta", "progressToken")
	var lost error
	n := 0
	for range items { // for every one: none is left running
		if (<-done).hidden() {
			continue
		}
		n++
		if token.Exists() && lost == nil && ctx.Err() == nil {
			lost = q.progress(fmt.Appendf(nil, `{"jsonrpc":"2.0","method":"notifications/progress","params":{"progressToken":%s,"progress":%d%s}}`,
				token.Raw(), n, total))
		}
	}
	if lost != nil {
		return Answer{}, lost
	}
	items = slices.DeleteFunc(items, func(it item) bool { return it.hidden() })
	if len(items) == 0 {
		return q.misused("There is no server on which you could call this tool. Nothing was called."), nil
	}

	failed := 0
	var b []byte
	var said strings.Builder
	for i := range items {
		it := &items[i]
		why := it.why()
		if why != nil || it.failed {
			if failed++; failed <= 20 {
				says := "the tool reports an error"
				if why != nil {
					says = why.message
				}
				fmt.Fprintf(&said, "\n%d. %s %s: %s", i+1, it.server, clip(it.tool, 100), says)
			}
		}
		written := it.write(why, true)
		if len(b)+len(written) > room {
			written = it.write(why, false)
		}
		b = append(append(b, written...), ',')
	}
	structured := slices.Concat([]byte(`{"results":[`), b[:len(b)-1],
		fmt.Appendf(nil, `],"ok":%d,"failed":%d}`, len(items)-failed, failed))
	text := fmt.Sprintf("%d calls: %d worked, %d failed.%s", len(items), len(items)-failed, failed, said.String())
	return q.toolResult(text, structured, failed == len(items)), nil
}

// items reads the arguments, or says what is wrong with them.
func (q *question) items(arguments jsonrpc.Value) (items []item, wrong string) {
	var calls, tool, servers, shared jsonrpc.Value
	for name, v := range arguments.Members() {
		switch name {
		case "calls":
			calls = v
		case "tool":
			tool = v
		case "servers":
			servers = v
		case "arguments":
			shared = v
		default:
			return nil, fmt.Sprintf("There is no argument %q; there are calls, or tool, servers and arguments.", clip(name, 100))
		}
	}
	switch {
	case calls.Exists() && (tool.Exists() || servers.Exists() || shared.Exists()):
		return nil, "Give either calls, or tool and servers."
	case calls.Exists():
		if calls.Kind() != jsonrpc.Array {
			return nil, "The argument calls must be a list of objects with tool and arguments."
		}
		for v := range calls.Elements() {
			if len(items) == maxMany {
				return nil, fmt.Sprintf("There may be %d calls at most.", maxMany)
			}
			var it item
			ok := v.Kind() == jsonrpc.Object
			for name, v := range v.Members() {
				switch name {
				case "tool":
					it.tool, _ = v.Text()
				case "arguments":
					it.arguments, ok = v.Raw(), ok && v.Kind() == jsonrpc.Object
				default:
					ok = false
				}
			}
			if !ok || it.tool == "" || len(it.tool) > maxListedName {
				return nil, fmt.Sprintf("calls[%d] must have a tool, the name of one, and may have arguments, an object; nothing else.", len(items))
			}
			it.server, it.name, it.shortened, ok = q.Resolve(it.tool)
			if !ok {
				// A server that does not exist is answered like one that the
				// caller may not use: by policy.
				it.server, it.name, _ = strings.Cut(it.tool, "__")
				if it.name == "" || len(it.server) > maxRemovedName {
					it.server = ""
				}
			}
			items = append(items, it)
		}
	case tool.Exists() && servers.Exists():
		name, ok := tool.Text()
		if !ok || name == "" || len(name) > maxListedName {
			return nil, "The argument tool must be the name of a tool."
		}
		if shared.Exists() && shared.Kind() != jsonrpc.Object {
			return nil, "The argument arguments must be an object."
		}
		for v := range servers.Elements() {
			server, ok := v.Text()
			if !ok || server == "" || len(server) > maxRemovedName {
				return nil, "The argument servers must be a list of names."
			}
			named, all := []string{server}, server == "*"
			if all {
				named = q.servers
			}
			for _, server := range named {
				if i := slices.IndexFunc(items, func(it item) bool { return it.server == server }); i >= 0 {
					items[i].unnamed = items[i].unnamed && all
				} else {
					items = append(items, item{tool: name, server: server, name: name, arguments: shared.Raw(), unnamed: all})
				}
			}
			if len(items) > maxMany {
				return nil, fmt.Sprintf("There may be %d calls at most.", maxMany)
			}
		}
	default:
		return nil, "Give calls, or tool and servers."
	}
	if len(items) == 0 {
		return nil, "There is nothing to call."
	}
	for i := range items {
		if items[i].server == schemas.Gateway {
			return nil, fmt.Sprintf("The gateway's own tools (%s) cannot be called from within call_many.", clip(items[i].tool, 100))
		}
	}
	return items, ""
}

// callOne makes one of the calls.
//
// A server that finds a header missing says so before anything else, and has not
// carried out the call. Only then it is asked what headers its tools want, and
// called once more: by another call, with an event, a decision and a claim of
// its own. So nothing is asked for the sake of the many tools that want none.
func (q *question) callOne(ctx context.Context, it *item, keep int, until time.Time, mirrored func() map[string][]mirror) {
	if it.server == "" {
		it.out.denied = true
		return
	}
	if it.shortened {
		l := q.read(ctx, it.server, "tools/list", "", until, true, func(l *listing) bool { return l.aliased(q, it.tool) != nil })
		if e := l.aliased(q, it.tool); e != nil {
			it.name = e.name
		}
	}
	params := slices.Concat([]byte(`"name":`), jsonrpc.Quote(it.name))
	if it.arguments != nil {
		params = slices.Concat(params, []byte(`,"arguments":`), it.arguments)
	}
	body, err := q.request("tools/call", params)
	if err != nil {
		it.out.wrong = failure(schemas.FailInvalid)
		return
	}
	call := child{server: it.server, method: "tools/call", name: it.name, body: body, until: until}
	it.out = q.ask(ctx, call)
	if q.modern && it.out.code == jsonrpc.CodeHeaderMismatch && it.out.end.Status == http.StatusBadRequest {
		if arguments, err := jsonrpc.Parse(it.arguments, jsonrpc.Limits{Bytes: len(it.arguments)}); err == nil {
			if call.headers = paramHeaders(mirrored()[it.name], arguments); len(call.headers) > 0 {
				it.out = q.ask(ctx, call)
			}
		}
	}
	if r := it.out.result; r.Exists() && it.out.wrong == nil {
		it.failed, _ = r.Get("isError").Bool()
		it.size = len(r.Raw())
		switch {
		case it.out.end.Result == "input_required":
			it.out.wrong = &wantsInput
		case it.out.end.Result != "" && q.modern:
			it.out.wrong = &trouble{"result_type", "It answered with a result of the type " + it.out.end.Result + ", which can be had only when it is called by itself."}
		case r.Kind() == jsonrpc.Object && it.size <= keep:
			it.result = slices.Clone(r.Raw()) // not all that it stands in
		}
	}
	it.said = it.out.text()
	it.out.answer, it.out.result = jsonrpc.Value{}, jsonrpc.Value{} // let go of
}

// aliased is the tool that has this name at the front.
func (l *listing) aliased(q *question, alias string) *listed {
	for i := range l.elements {
		if q.Alias(l.server, l.elements[i].name) == alias {
			return &l.elements[i]
		}
	}
	return nil
}

// hidden tells whether the caller must not learn of an item: of a server that he
// has not named and on which he may not call the tool.
func (it *item) hidden() bool { return it.unnamed && it.out.denied }

// why says why an item has no result; nil if it has one. What is denied is
// answered in the words and with the code of what does not exist.
func (it *item) why() *rpcTrouble {
	switch {
	case it.out.denied:
		return &rpcTrouble{rpc: jsonrpc.CodeInvalidParams, message: "unknown tool " + strconv.Quote(cmp.Or(it.name, it.tool))}
	case it.out.wrong != nil:
		return &rpcTrouble{code: it.out.wrong.code, message: it.out.wrong.message}
	case it.out.code != 0:
		return &rpcTrouble{rpc: it.out.code, message: it.said}
	}
	return nil
}

// rpcTrouble is an error with a word of ours, or a number of JSON-RPC.
type rpcTrouble struct {
	code    string
	rpc     int
	message string
}

// write is the item as the answer has it; whole: with the result, if it is kept.
func (it *item) write(why *rpcTrouble, whole bool) []byte {
	b := append([]byte(`{"tool":`), jsonrpc.Quote(it.tool)...)
	if it.server != "" {
		b = append(append(b, `,"server":`...), jsonrpc.Quote(it.server)...)
	}
	b = strconv.AppendBool(append(b, `,"ok":`...), why == nil && !it.failed)
	switch {
	case why != nil && why.code != "":
		b = append(append(b, `,"error":{"code":`...), jsonrpc.Quote(why.code)...)
		b = append(append(append(b, `,"message":`...), jsonrpc.Quote(why.message)...), '}')
	case why != nil:
		b = strconv.AppendInt(append(b, `,"error":{"code":`...), int64(why.rpc), 10)
		b = append(append(append(b, `,"message":`...), jsonrpc.Quote(why.message)...), '}')
	case it.result != nil && whole:
		b = append(append(b, `,"result":`...), it.result...)
	default:
		b = fmt.Appendf(b, `,"cut":true,"bytes":%d`, it.size)
	}
	if it.out.call != "" {
		b = append(append(b, `,"call":`...), jsonrpc.Quote(string(it.out.call))...)
	}
	return append(b, '}')
}
