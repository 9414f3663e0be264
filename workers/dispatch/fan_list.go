package dispatch

import (
	"bytes"
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"waybill.dev/schemas"
	"waybill.dev/schemas/jsonrpc"
)

const (
	maxPages      = 64       // of one server, where all of them are read
	maxCursor     = 16 << 10 // bytes of a server's cursor
	maxCursors    = 256 << 10
	maxListedName = 4 << 10 // bytes of a name that can be called
	listReserve   = 64 << 10
)

// listing is what a server contributes to a list.
type listing struct {
	server   string
	denied   bool
	wrong    *trouble
	elements []listed
	next     string   // the server's own cursor
	left     []left   // elements that were left out
	removed  []string // names that policy took out
	more     bool     // and others
}

// left is an element that was left out of a list, and why.
type left struct{ name, why string }

// listed is an element of a list, in the server's bytes.
type listed struct {
	server, name string
	raw          []byte
	at           span     // where in raw the name stands, quotes included
	mirrors      []mirror // of a tool
}

type span struct{ start, end int }

// renamed is the element under another name.
func (l *listed) renamed(alias string) []byte {
	return slices.Concat(l.raw[:l.at.start], jsonrpc.Quote(alias), l.raw[l.at.end:])
}

// read asks a server for a list: for the page at cursor, or for all its pages
// from there. They are read no further once enough says so.
func (q *question) read(ctx context.Context, server, method, cursor string, until time.Time, all bool, enough func(*listing) bool) listing {
	l := listing{server: server, next: cursor}
	size := 0
	for range maxPages {
		asked := l.next
		body, err := q.listRequest(method, asked)
		if err != nil {
			l.wrong = failure(schemas.FailInvalid)
			return l
		}
		o := q.ask(ctx, child{server: server, method: method, body: body, until: until})
		l.next = ""
		switch {
		case o.denied:
			l.denied = true
			return l
		case o.wrong != nil:
			l.wrong = o.wrong
			return l
		case o.code == jsonrpc.CodeMethodNotFound:
			return l // it has none
		case o.code != 0:
			l.wrong = &trouble{"upstream_error", fmt.Sprintf("It answered with error %d: %s", o.code, o.text())}
			return l
		}
		l.removed, l.more = append(l.removed, o.end.Removed...), l.more || o.end.RemovedMore > 0
		l.take(o.result, method, q.modern)
		if l.wrong != nil || l.next == "" {
			return l
		}
		if size += len(o.answer.Raw()); all && size > int(q.opt.MaxAnswer) {
			l.next, l.wrong = "", &trouble{string(schemas.FailTooLarge), "Its list is longer than is read."}
			return l
		}
		if l.next == asked || len(l.next) > maxCursor {
			l.next, l.wrong = "", &trouble{string(schemas.FailBadAnswer), "Its list has a next page that cannot be asked for."}
			return l
		}
		if !all || enough != nil && enough(&l) {
			return l
		}
	}
	return l
}

// listRequest is the request for a page of a list. It is the caller's own,
// but for the cursor; or one of ours with the caller's _meta.
func (q *question) listRequest(method, cursor string) ([]byte, error) {
	if q.m.Method() == method {
		return q.same(func(p *jsonrpc.Patch, params jsonrpc.Value) {
			switch {
			case cursor != "" && params.Exists():
				p.Set(params, "cursor", jsonrpc.Quote(cursor))
			case cursor != "":
				p.Set(q.m.Root(), "params", slices.Concat([]byte(`{"cursor":`), jsonrpc.Quote(cursor), []byte(`}`)))
			case params.Exists():
				p.Remove(params, "cursor")
			}
		})
	}
	var params []byte
	if cursor != "" {
		params = slices.Concat([]byte(`"cursor":`), jsonrpc.Quote(cursor))
	}
	return q.request(method, params)
}

// request is a request of our own, with the caller's _meta: what revision it is
// of, who calls, and what of.
func (q *question) request(method string, params []byte) ([]byte, error) {
	var b bytes.Buffer
	b.WriteString(`{"jsonrpc":"2.0","id":1,"method":`)
	b.Write(jsonrpc.Quote(method))
	b.WriteString(`,"params":{`)
	b.Write(params)
	if meta := q.m.Params().Get("_meta"); meta.Kind() == jsonrpc.Object {
		raw := meta.Raw()
		extensions := meta.Get(metaCaps, "extensions")
		if meta.Get("progressToken").Exists() || extensions.Get("io.modelcontextprotocol/tasks").Exists() {
			own, err := jsonrpc.Parse(raw, jsonrpc.Limits{Bytes: len(raw)})
			if err != nil {
				return nil, err
			}
			p := own.Patch().Remove(own, "progressToken")
			// Nobody takes a task for the answer to what a front asks.
			if extensions := own.Get(metaCaps, "extensions"); extensions.Kind() == jsonrpc.Object {
				p.Remove(extensions, "io.modelcontextprotocol/tasks")
			}
			if raw = p.Bytes(); raw == nil {
				return nil, errors.New("no _meta")
			}
		}
		if len(params) > 0 {
			b.WriteByte(',')
		}
		b.WriteString(`"_meta":`)
		b.Write(raw)
	}
	b.WriteString(`}}`)
	return b.Bytes(), nil
}

// take reads a page. An element that is not clear in what it is called is left
// out: a client might call another than policy judged.
func (l *listing) take(result jsonrpc.Value, method string, modern bool) {
	at := lists[method]
	array := jsonrpc.Value{}
	for name, v := range result.Members() {
		switch {
		case name == at.array:
			array = v
		case name == "nextCursor":
			l.next, _ = v.Text()
		case strings.EqualFold(name, at.array), strings.EqualFold(name, "nextCursor"):
			l.wrong = failure(schemas.FailBadAnswer)
			return
		}
	}
	if array.Kind() != jsonrpc.Array {
		l.wrong, l.next = failure(schemas.FailBadAnswer), ""
		return
	}
	for element := range array.Elements() {
		name, why := jsonrpc.Value{}, ""
		for n, v := range element.Members() {
			if n == at.name {
				name = v
			} else if strings.EqualFold(n, at.name) {
				why = fmt.Sprintf("it has a %q too", n)
			}
		}
		text, ok := name.Text()
		switch {
		case why != "":
		case !ok || text == "":
			why = "it has no " + at.name
		case len(text) > maxListedName:
			why = fmt.Sprintf("its %s has more than %d bytes", at.name, maxListedName)
		}
		var headers []mirror
		if why == "" && modern && method == "tools/list" {
			// Clients would leave it out too, without a word to anybody (MCP
			// 2026-07-28, streamable HTTP, "Custom Headers from Tool
			// Parameters"); older revisions do not know of it.
			var err error
			if headers, err = mirrors(element); err != nil {
				why = clip(text, 100) + ": " + err.Error()
			}
		}
		if why != "" {
			l.left = append(l.left, left{text, why})
			continue
		}
		raw, start := element.Raw(), name.Offset()-element.Offset()
		l.elements = append(l.elements, listed{l.server, text, raw, span{start, start + len(name.Raw())}, headers})
	}
}

// note is what the caller is told of a server in _meta; nil: nothing.
func (l *listing) note() *trouble {
	if l.wrong != nil || len(l.left) == 0 {
		return l.wrong
	}
	return &trouble{"invalid_elements", fmt.Sprintf("%d of its elements are left out. The first: %s.", len(l.left), clip(l.left[0].why, 200))}
}

// list answers one of the lists, put together of what all servers list.
func (q *question) list(ctx context.Context) Answer {
	method := q.c.Requested.Method
	if q.Exposed != nil {
		if q.m.Params().Get("cursor").Exists() {
			return q.error(q.c, jsonrpc.CodeInvalidParams, "Invalid cursor: this list has one page.")
		}
		if method != "tools/list" {
			return q.listAnswer(nil, "", nil)
		}
		return q.view(ctx)
	}
	if q.c.Requested.Within(q.c.Event) {
		// A view asks for the gateway's own tools.
		elements, removed := q.ownListed(method)
		a := q.listAnswer(elements, "", nil)
		a.Removed = removed
		return a
	}
	wanted, err := q.cursors()
	if err != nil {
		return q.error(q.c, jsonrpc.CodeInvalidParams, "Invalid cursor: "+err.Error()+".")
	}
	until := q.until(listTime)
	got := make([]listing, len(wanted))
	each(len(wanted), listAtOnce, func(i int) {
		if wanted[i].server != schemas.Gateway {
			got[i] = q.read(ctx, wanted[i].server, method, wanted[i].at, until, false, nil)
		}
	})

	var elements [][]byte
	var notes []noted
	var next []cursor
	var removed []string
	size, room := 0, int(q.opt.MaxAnswer)-listReserve
	for i := range got {
		l := &got[i]
		var raw [][]byte
		if wanted[i].server == schemas.Gateway {
			raw, removed = q.ownListed(method)
		} else {
			raw = q.shown(l, method)
		}
		bytes := 0
		for _, r := range raw {
			bytes += len(r) + 1
		}
		switch {
		case size+bytes <= room:
		case bytes > room:
			l.wrong, l.next, raw, bytes = failure(schemas.FailTooLarge), "", nil, 0
		default:
			// Its turn comes on the next page, from where it was now.
			next = append(next, wanted[i])
			continue
		}
		elements, size = append(elements, raw...), size+bytes
		if t := l.note(); t != nil {
			notes = append(notes, noted{l.server, *t})
		}
		if l.next != "" {
			next = append(next, cursor{l.server, l.next})
		}
	}
	a := q.listAnswer(elements, writeCursor(method, next), notes)
	a.Removed = removed
	return a
}

// shown are a server's elements under the names that they have at this front.
// The second of one name is left out: it could not be called, and there are
// clients that take no list with a name twice. One on a later page of its server
// is listed, for nothing is remembered from page to page; it can shadow nothing,
// since a name says whose it is, and means there the first that has it.
func (q *question) shown(l *listing, method string) [][]byte {
	seen := make(map[string]bool, len(l.elements))
	raw := make([][]byte, 0, len(l.elements))
	for i := range l.elements {
		e := &l.elements[i]
		alias := q.alias(method, e.server, e.name)
		if seen[alias] {
			l.left = append(l.left, left{e.name, fmt.Sprintf("another is called %s too", alias)})
			continue
		}
		seen[alias] = true
		raw = append(raw, e.renamed(alias))
	}
	return raw
}

func (q *question) alias(method, server, name string) string {
	if method == "tools/list" || method == "prompts/list" {
		return q.Alias(server, name)
	}
	return q.URI(server, name)
}

// view answers tools/list of a view: the tools it exposes, in its order, as far
// as they are there and the caller may use them.
func (q *question) view(ctx context.Context) Answer {
	const method = "tools/list"
	until := q.until(listTime)
	servers := slices.Clone(q.servers)
	if slices.ContainsFunc(q.Exposed, func(e schemas.Exposed) bool { return e.Server == schemas.Gateway }) {
		servers = append(servers, schemas.Gateway)
	}
	got := make([]listing, len(servers))
	each(len(servers), listAtOnce, func(i int) {
		got[i] = q.read(ctx, servers[i], method, "", until, true, func(l *listing) bool {
			return !slices.ContainsFunc(q.Exposed, func(e schemas.Exposed) bool { return e.Server == l.server && l.find(e.Tool) == nil })
		})
	})
	var elements [][]byte
	for _, e := range q.Exposed {
		l := &got[slices.Index(servers, e.Server)]
		element := l.find(e.Tool)
		if element == nil {
			// Of a tool that is kept from this caller it is not said that the
			// view would have it.
			out := slices.ContainsFunc(l.left, func(o left) bool { return o.name == e.Tool })
			if !l.denied && l.wrong == nil && !out && !l.more && !slices.Contains(l.removed, clip(e.Tool, maxRemovedName)) {
				l.wrong = &trouble{"missing_tools", "It has no tool " + e.Tool + "."}
			}
			continue
		}
		raw, err := exposed(element, e)
		if err != nil {
			l.left = append(l.left, left{e.Tool, fmt.Sprintf("%s: %v", e.Tool, err)})
			continue
		}
		elements = append(elements, raw)
	}
	var notes []noted
	for i := range got {
		if t := got[i].note(); t != nil {
			notes = append(notes, noted{got[i].server, *t})
		}
	}
	return q.listAnswer(elements, "", notes)
}

func (l *listing) find(name string) *listed {
	for i := range l.elements {
		if l.elements[i].name == name {
			return &l.elements[i]
		}
	}
	return nil
}

// exposed is a tool as a view shows it.
func exposed(l *listed, e schemas.Exposed) ([]byte, error) {
	raw := l.renamed(e.Shown())
	if e.Description == "" {
		return raw, nil
	}
	tool, err := jsonrpc.Parse(raw, jsonrpc.Limits{Bytes: len(raw), Depth: answerDepth})
	if err != nil {
		return nil, err
	}
	p := tool.Patch().Set(tool, "description", jsonrpc.Quote(e.Description))
	return p.Bytes(), p.Err()
}

// noted is what is told of a server.
type noted struct {
	server string
	trouble
}

// listAnswer is the answer to a list.
func (q *question) listAnswer(elements [][]byte, next string, notes []noted) Answer {
	var b bytes.Buffer
	b.WriteString(`"` + lists[q.c.Requested.Method].array + `":[`)
	for i, e := range elements {
		if i > 0 {
			b.WriteByte(',')
		}
		b.Write(e)
	}
	b.WriteByte(']')
	if next != "" {
		b.WriteString(`,"nextCursor":"` + next + `"`)
	}
	return q.result(q.c, q.complete(b.Bytes(), writeNotes(notes), true))
}

// metaServers is the member of a result's _meta that says which servers could
// not contribute to it: {"files":{"error":"timeout","message":"…"}}.
const metaServers = "dev.waybill/servers"

func writeNotes(notes []noted) string {
	if len(notes) == 0 {
		return ""
	}
	b := []byte(`"` + metaServers + `":{`)
	for i, n := range notes {
		if i > 0 {
			b = append(b, ',')
		}
		b = append(append(b, jsonrpc.Quote(n.server)...), `:{"error":`...)
		b = append(append(b, jsonrpc.Quote(n.code)...), `,"message":`...)
		b = append(append(b, jsonrpc.Quote(n.message)...), '}')
	}
	return string(append(b, '}'))
}

// cursor is where the list of a server goes on; "" at its beginning.
type cursor struct{ server, at string }

// cursors are the servers to be asked for this page, and where each goes on.
func (q *question) cursors() ([]cursor, error) {
	v := q.m.Params().Get("cursor")
	if !v.Exists() {
		all := make([]cursor, len(q.Servers))
		for i, s := range q.Servers {
			all[i].server = s
		}
		return all, nil
	}
	text, ok := v.Text()
	if !ok {
		return nil, errors.New("it is no string")
	}
	return readCursor(text, q.c.Requested.Method, q.Servers)
}

// writeCursor makes one cursor of those of several servers: base64url of
// ["tools/list","git","…","files",""]. It is no secret: who makes one up asks
// servers for a page, each by a call on which policy decides.
func writeCursor(method string, all []cursor) string {
	if len(all) == 0 {
		return ""
	}
	b := append([]byte{'['}, jsonrpc.Quote(method)...)
	for _, c := range all {
		b = append(append(b, ','), jsonrpc.Quote(c.server)...)
		b = append(append(b, ','), jsonrpc.Quote(c.at)...)
	}
	return base64.RawURLEncoding.EncodeToString(append(b, ']'))
}

// readCursor undoes writeCursor. It takes nothing that writeCursor would not
// have made: servers are those of the front, in their order, each once.
func readCursor(text, method string, servers []string) ([]cursor, error) {
	bad := errors.New("it is none of this list's")
	if len(text) > maxCursors {
		return nil, bad
	}
	raw, err := base64.RawURLEncoding.Strict().DecodeString(text)
	if err != nil {
		return nil, bad
	}
	v, err := jsonrpc.Parse(raw, jsonrpc.Limits{Bytes: maxCursors, Depth: 1})
	if err != nil || v.Kind() != jsonrpc.Array {
		return nil, bad
	}
	var texts []string
	for e := range v.Elements() {
		s, ok := e.Text()
		if !ok {
			return nil, bad
		}
		texts = append(texts, s)
	}
	if len(texts) < 3 || len(texts)%2 == 0 || texts[0] != method {
		return nil, bad
	}
	var all []cursor
	last := -1
	for i := 1; i < len(texts); i += 2 {
		at := slices.Index(servers, texts[i])
		if at <= last || len(texts[i+1]) > maxCursor {
			return nil, bad
		}
		last = at
		all = append(all, cursor{texts[i], texts[i+1]})
	}
	if writeCursor(method, all) != text {
		return nil, bad
	}
	return all, nil
}
