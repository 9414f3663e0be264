package dispatch

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"waybill.dev/schemas"
	"waybill.dev/schemas/jsonrpc"
)

const fanMeta = `"_meta":{"io.modelcontextprotocol/protocolVersion":"2026-07-28","io.modelcontextprotocol/clientCapabilities":{},"progressToken":"p"}`

// said is what a server of a test answers: a result, or a whole HTTP answer.
type said struct {
	result string
	status int
	err    string // an error object
	sse    []string
	hang   bool
}

type script func(method string, m *jsonrpc.Message) said

// town is a front with servers, and the rest of the gateway as a function: a
// rule that lets calls through, places for so many calls at once, and the
// dispatcher itself, as Run would feed it.
type town struct {
	t      *testing.T
	log    *memLog
	d      *Dispatcher
	allow  func(*schemas.Requested) (bool, []string)
	places chan struct{} // as bus.Work.InFlight
	most   atomic.Int64  // calls that were at a server at once
	ready  atomic.Int64  // servers that were told that the client is ready
}

func newTown(t *testing.T, servers map[string]script, change ...func(*Options)) *town {
	t.Helper()
	w := &town{t: t, log: &memLog{}, places: make(chan struct{}, 4096)}
	w.allow = func(*schemas.Requested) (bool, []string) { return true, nil }
	opt := Options{
		Load: w.log.load, Past: w.log.past, Instance: "test", Pause: time.Millisecond, Attempts: 1,
		Ask: w.ask, Version: "1", Latest: w.log.latest, Store: w.log.emit,
	}
	w.log.add(schemas.Event{
		Tenant: "acme", Session: "s1", Agent: "a1",
		Data: &schemas.Opened{Protocol: "mcp", Name: "c", Revision: "2025-11-25"}, Body: []byte(initialize),
	})
	var names []string
	var now atomic.Int64
	for name := range servers {
		names = append(names, name)
	}
	slices.Sort(names)
	for _, name := range names {
		serve := servers[name]
		srv := httptest.NewServer(http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
			b, _ := io.ReadAll(r.Body)
			if r.Method != http.MethodPost {
				rw.WriteHeader(http.StatusMethodNotAllowed)
				return
			}
			m, err := jsonrpc.Decode(b, jsonrpc.Limits{})
			if err != nil {
				http.Error(rw, err.Error(), http.StatusBadRequest)
				return
			}
			switch {
			case m.Method() == "initialize":
				rw.Header().Set("Mcp-Session-Id", "up")
				answerJSON(rw, 200, `{"jsonrpc":"2.0","id":`+string(m.ID().Raw())+`,"result":{"protocolVersion":"2025-11-25","capabilities":{},"serverInfo":{"name":"s","version":"1"}}}`)
				return
			case m.Method() == "notifications/initialized":
				w.ready.Add(1)
				rw.WriteHeader(http.StatusAccepted)
				return
			}
			for n := now.Add(1); ; {
				most := w.most.Load()
				if n <= most || w.most.CompareAndSwap(most, n) {
					break
				}
			}
			a := serve(m.Method(), m)
			now.Add(-1)
			if a.hang {
				<-r.Context().Done()
				return
			}
			id := string(m.ID().Raw())
			if a.sse != nil {
				rw.Header().Set("Content-Type", "text/event-stream")
				for _, msg := range a.sse {
					fmt.Fprintf(rw, "data: %s\n\n", strings.ReplaceAll(msg, "ID", id))
				}
				_ = http.NewResponseController(rw).Flush()
				if a.result == "" {
					<-r.Context().Done()
					return
				}
				fmt.Fprintf(rw, "data: {\"jsonrpc\":\"2.0\",\"id\":%s,\"result\":%s}\n\n", id, strings.ReplaceAll(a.result, "ID", id))
				return
			}
			status := max(a.status, 200)
			switch {
			case a.err != "":
				answerJSON(rw, status, `{"jsonrpc":"2.0","id":`+id+`,"error":`+a.err+`}`)
			case a.result != "":
				answerJSON(rw, status, `{"jsonrpc":"2.0","id":`+id+`,"result":`+a.result+`}`)
			default:
				rw.WriteHeader(status)
			}
		}))
		t.Cleanup(srv.Close)
		opt.Servers = append(opt.Servers, Server{Name: name, URL: srv.URL + "/mcp", Era: EraClient})
	}
	opt.Fronts = []*schemas.Front{{Name: schemas.Gateway, Servers: append(names, schemas.Gateway)}}
	opt.Fanout.Tools = []string{findTools, callMany}
	for _, f := range change {
		f(&opt)
	}
	d, err := New(opt)
	if err != nil {
		t.Fatal(err)
	}
	w.d = d
	t.Cleanup(d.Close)
	return w
}

// ask is what bus.Asker.Ask, policy and bus.Log.Run are together.
func (w *town) ask(ctx context.Context, e schemas.Event, emit schemas.Emit) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	e.Edge = "edge"
	e = w.log.add(e)
	if _, err := emit(ctx, e); err != nil {
		return err
	}
	q := e.Data.(*schemas.Requested)
	ok, only := w.allow(q)
	if !ok {
		_, err := emit(ctx, w.log.add(e.Next(&schemas.Denied{Decision: schemas.Decision{N: 1}}, nil)))
		return err
	}
	a := w.log.add(e.Next(&schemas.Authorized{Requested: *q, Decision: schemas.Decision{N: 1}, RequestedSeq: e.Seq, RequestedAt: e.Stored, Only: only}, e.Body))
	heard := make(chan schemas.Event, 10_000)
	handled := make(chan error, 1)
	go func() {
		w.places <- struct{}{}
		defer func() { <-w.places }()
		handled <- w.d.Handle(context.Background(), a, func(ctx context.Context, e schemas.Event) (schemas.Receipt, error) {
			r, err := w.log.emit(ctx, e)
			if err == nil && !r.Duplicate {
				heard <- e
			}
			return r, err
		})
	}()
	give := func(got schemas.Event) (over bool, err error) {
		if _, err = emit(ctx, got); err == nil || got.Kind().Ends() {
			return got.Kind().Ends(), err
		}
		// As in bus.Asker.Ask: nobody is left to tell, so the call is not to go on.
		if !errors.Is(context.Cause(ctx), schemas.ErrDetached) {
			_ = w.d.Cancel(ctx, w.log.add(e.Next(&schemas.Cancel{Reason: err.Error()}, nil)), nil)
		}
		return true, err
	}
	for {
		select {
		case got := <-heard:
			if over, err := give(got); over {
				return err
			}
		case err := <-handled:
			select {
			case got := <-heard:
				handled <- err
				if over, err := give(got); over {
					return err
				}
			default:
				return fmt.Errorf("no ending: %w", err)
			}
		case <-ctx.Done():
			if errors.Is(context.Cause(ctx), schemas.ErrDetached) {
				return ctx.Err()
			}
			return w.d.Cancel(ctx, w.log.add(e.Next(&schemas.Cancel{Reason: context.Cause(ctx).Error()}, nil)), nil)
		}
	}
}

// reply is what came of a call.
type reply struct {
	end      schemas.Event
	progress []string
	call     schemas.CallID
}

// call makes a call at a front, as an edge would.
func (w *town) call(ctx context.Context, server, method, name, params string, change ...func(*schemas.Requested)) reply {
	w.t.Helper()
	now := time.Now()
	q := &schemas.Requested{
		Target:   schemas.Target{Protocol: "mcp", Server: server, Method: method, Name: name},
		Revision: "2026-07-28", Deadline: now.Add(20 * time.Second),
	}
	for _, f := range change {
		f(q)
	}
	id := `"id":1,`
	if q.OneWay {
		id = ""
	}
	e := schemas.Event{
		Tenant: "acme", Session: "s1", Call: schemas.NewCallID(now), Agent: "a1", Time: now, Data: q,
		Body: []byte(`{"jsonrpc":"2.0",` + id + `"method":"` + method + `","params":` + params + `}`),
	}
	e.Root = e.Call
	r := reply{call: e.Call}
	err := w.ask(ctx, e, func(_ context.Context, e schemas.Event) (schemas.Receipt, error) {
		if e.Kind() == schemas.KindProgressed {
			r.progress = append(r.progress, string(e.Body))
		}
		if e.Kind().Ends() {
			r.end = e
		}
		return schemas.Receipt{}, nil
	})
	if err != nil {
		w.t.Errorf("%s: %v", method, err)
	}
	return r
}

// result is the result of a call at the front that completes.
func (w *town) result(server, method, name, params string, change ...func(*schemas.Requested)) string {
	w.t.Helper()
	r := w.call(context.Background(), server, method, name, params, change...)
	if _, ok := r.end.Data.(*schemas.Completed); !ok {
		w.t.Fatalf("%s ended as %+v", method, r.end.Data)
	}
	prefix := `{"jsonrpc":"2.0","id":"` + string(r.call) + `",`
	body, ok := strings.CutPrefix(string(r.end.Body), prefix)
	if !ok {
		w.t.Fatalf("%s: %s", method, r.end.Body)
	}
	return strings.TrimSuffix(body, "}")
}

func older(q *schemas.Requested) { q.Revision = "2025-11-25" }

const info = `"_meta":{"io.modelcontextprotocol/serverInfo":{"name":"waybill","version":"1"}`

func lister(tools string) script {
	return func(method string, _ *jsonrpc.Message) said {
		if method == "tools/list" {
			return said{result: `{"tools":` + tools + `,"resultType":"complete"}`}
		}
		return said{status: 404, err: `{"code":-32601,"message":"Method not found"}`}
	}
}

// What the servers list is put together in order, with every byte of an element
// but its name; who cannot contribute is told of, who has nothing is not, and of
// whom the caller may not use nothing is said.
func TestFrontLists(t *testing.T) {
	w := newTown(t, map[string]script{
		"a":      lister(`[{ "x":1.50, "name" : "one","_meta":{"k":[]}},{"name":"two words"}]`),
		"b":      lister(`[{"title":"no name"},{"name":"n","Name":"m"},{"name":"good"},{"name":"good","v":2},{"name":""},{"name":5}]`),
		"c":      lister(`[]`),
		"denied": lister(`[{"name":"secret"}]`),
		"fails":  func(string, *jsonrpc.Message) said { return said{err: `{"code":-32000,"message":"out of order"}`} },
		"hangs":  func(string, *jsonrpc.Message) said { return said{hang: true} },
		"none":   func(string, *jsonrpc.Message) said { return said{status: 404, err: `{"code":-32601,"message":"no"}`} },
		"old": func(string, *jsonrpc.Message) said {
			return said{status: 400, err: `{"code":-32000,"message":"no session"}`}
		},
		"text": func(string, *jsonrpc.Message) said { return said{result: `{"tools":"none"}`} },
	}, func(o *Options) {
		for i := range o.Servers {
			if o.Servers[i].Name == "hangs" {
				o.Servers[i].Deadline = 300 * time.Millisecond
			}
		}
	})
	w.allow = func(q *schemas.Requested) (bool, []string) {
		if q.Server == schemas.Gateway {
			return true, []string{}
		}
		return q.Server != "denied", nil
	}
	want := `"result":{"tools":[{ "x":1.50, "name" : "a__one","_meta":{"k":[]}},{"name":"a__two_words_` + w.digits("two words") + `"},{"name":"b__good"}],` +
		`"resultType":"complete","ttlMs":0,"cacheScope":"private",` + info + `,"dev.waybill/servers":{` +
		`"b":{"error":"invalid_elements","message":"5 of its elements are left out. The first: it has no name."},` +
		`"fails":{"error":"upstream_error","message":"It answered with error -32000: out of order"},` +
		`"hangs":{"error":"timeout","message":"It did not answer in time."},` +
		`"old":{"error":"revision","message":"It speaks another revision of the protocol."},` +
		`"text":{"error":"bad_answer","message":"Its answer does not follow the protocol."}}}}`
	if got := w.result(schemas.Gateway, "tools/list", "", `{`+fanMeta+`}`); got != want {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
	// Every child is a call under the one that caused it, with the caller's
	// _meta but for the progress token.
	children := w.children()
	if len(children) != 9 {
		t.Errorf("%d children", len(children))
	}
	for _, e := range children {
		q := e.Data.(*schemas.Requested)
		if q.Method != "tools/list" || q.Revision != "2026-07-28" || e.Root != e.Parent || e.Agent != "a1" || e.Session != "s1" || q.Deadline.IsZero() ||
			string(e.Body) != `{"jsonrpc":"2.0","id":1,"method":"tools/list","params":{`+strings.Replace(fanMeta, `,"progressToken":"p"`, "", 1)+`}}` {
			t.Errorf("%+v %s", e, e.Body)
		}
	}
}

func (w *town) digits(name string) string {
	alias := (&schemas.Front{Name: schemas.Gateway}).Alias("a", name)
	return alias[len(alias)-8:]
}

// children are the requests that fronts made.
func (w *town) children() (found []schemas.Event) {
	for _, e := range w.log.of(schemas.KindRequested) {
		if e.Parent != "" {
			found = append(found, e)
		}
	}
	return found
}

// Resources and prompts keep their bytes too, and other revisions have no
// members that theirs does not know.
func TestFrontOtherLists(t *testing.T) {
	w := newTown(t, map[string]script{"a": func(method string, m *jsonrpc.Message) said {
		return said{result: map[string]string{
			"prompts/list":             `{"prompts":[{"name":"p"}]}`,
			"resources/list":           `{"resources":[{"uri":"file:///x?a=b","name":"x"}]}`,
			"resources/templates/list": `{"resourceTemplates":[{"name":"t","uriTemplate":"x://{id}/y"}]}`,
		}[method]}
	}}, func(o *Options) { o.Fanout.Tools = nil })
	for method, want := range map[string]string{
		"prompts/list":             `"result":{"prompts":[{"name":"a__p"}]}`,
		"resources/list":           `"result":{"resources":[{"uri":"waybill://a/file:///x?a=b","name":"x"}]}`,
		"resources/templates/list": `"result":{"resourceTemplates":[{"name":"t","uriTemplate":"waybill://a/x://{id}/y"}]}`,
	} {
		if got := w.result(schemas.Gateway, method, "", `{}`, older); got != want {
			t.Errorf("got\n%s\nwant\n%s", got, want)
		}
	}
}

// paged is a server with a list of n tools, two on a page.
func paged(prefix string, n int, pad string) script {
	return func(method string, m *jsonrpc.Message) said {
		at := 0
		if c := m.Params().Get("cursor"); c.Exists() {
			text, _ := c.Text()
			if _, err := fmt.Sscanf(text, "at %d", &at); err != nil {
				return said{err: `{"code":-32602,"message":"bad cursor"}`}
			}
		}
		var tools []string
		for i := at; i < min(at+2, n); i++ {
			tools = append(tools, fmt.Sprintf(`{"name":"%s%d","pad":"%s"}`, prefix, i, pad))
		}
		next := ""
		if at+2 < n {
			next = fmt.Sprintf(`,"nextCursor":"at %d"`, at+2)
		}
		return said{result: `{"tools":[` + strings.Join(tools, ",") + `]` + next + `}`}
	}
}

func (w *town) walk(t *testing.T, method string) (names []string, pages int) {
	params := `{` + fanMeta + `}`
	for {
		var l struct {
			Result struct {
				Tools      []struct{ Name string }
				NextCursor string
			}
		}
		if err := json.Unmarshal([]byte(`{`+w.result(schemas.Gateway, method, "", params)+`}`), &l); err != nil {
			t.Fatal(err)
		}
		pages++
		for _, tool := range l.Result.Tools {
			names = append(names, tool.Name)
		}
		if l.Result.NextCursor == "" {
			return names, pages
		}
		params = `{"cursor":"` + l.Result.NextCursor + `",` + fanMeta + `}`
	}
}

// Each tool is on one of the pages, whatever the servers' own pages are, and
// what does not fit on one comes on the next.
func TestFrontPages(t *testing.T) {
	w := newTown(t, map[string]script{"a": paged("a", 5, ""), "b": paged("b", 1, ""), "c": paged("c", 3, "")})
	names, pages := w.walk(t, "tools/list")
	if want := "a__a0 a__a1 b__b0 c__c0 c__c1 waybill__find_tools waybill__call_many a__a2 a__a3 c__c2 a__a4"; strings.Join(names, " ") != want || pages != 3 {
		t.Errorf("%d pages: %s", pages, names)
	}

	w = newTown(t, map[string]script{"a": paged("a", 2, strings.Repeat("x", 40<<10)), "b": paged("b", 4, strings.Repeat("x", 40<<10)), "huge": paged("h", 2, strings.Repeat("x", 90<<10))},
		func(o *Options) { o.MaxAnswer, o.Fanout.Tools = 256<<10, nil })
	names, pages = w.walk(t, "tools/list")
	if want := "a__a0 a__a1 b__b0 b__b1 b__b2 b__b3 huge__h0 huge__h1"; strings.Join(names, " ") != want || pages < 2 {
		t.Errorf("%d pages: %s", pages, names)
	}
	w = newTown(t, map[string]script{"a": paged("a", 2, ""), "huge": paged("h", 2, strings.Repeat("x", 110<<10))}, func(o *Options) { o.MaxAnswer, o.Fanout.Tools = 256<<10, nil })
	if got := w.result(schemas.Gateway, "tools/list", "", `{`+fanMeta+`}`); !strings.Contains(got, `"huge":{"error":"too_large"`) || !strings.Contains(got, "a__a1") {
		t.Errorf("%.500s", got)
	}
}

func TestFrontBadCursor(t *testing.T) {
	w := newTown(t, map[string]script{"a": paged("a", 5, ""), "b": paged("b", 5, "")})
	ok := writeCursor("tools/list", []cursor{{"a", "at 2"}, {"b", ""}})
	enc := func(s string) string { return base64.RawURLEncoding.EncodeToString([]byte(s)) }
	for _, c := range []string{
		`""`, `1`, `null`, `"x"`, `"` + ok + `="`, `"` + ok + `A"`, `"` + strings.ToUpper(ok) + `"`,
		`"` + enc(`["prompts/list","a","at 2"]`) + `"`, `"` + enc(`["tools/list"]`) + `"`, `"` + enc(`["tools/list","a"]`) + `"`,
		`"` + enc(`["tools/list","c","x"]`) + `"`, `"` + enc(`["tools/list","b","x","a","x"]`) + `"`, `"` + enc(`["tools/list","a","x","a","x"]`) + `"`,
		`"` + enc(`["tools/list", "a","x"]`) + `"`, `"` + enc(`["tools/list","a",1]`) + `"`, `"` + enc(`{"tools/list":"a"}`) + `"`,
		`"` + enc(`["tools/list","a","`+strings.Repeat("x", maxCursor+1)+`"]`) + `"`,
	} {
		r := w.call(context.Background(), schemas.Gateway, "tools/list", "", `{"cursor":`+c+`,`+fanMeta+`}`)
		if d, ok := r.end.Data.(*schemas.Completed); !ok || d.ErrorCode != jsonrpc.CodeInvalidParams || !strings.Contains(string(r.end.Body), "Invalid cursor: ") {
			t.Errorf("%s: %+v %s", c, r.end.Data, r.end.Body)
		}
	}
	if n := len(w.children()); n != 0 {
		t.Errorf("%d servers were asked", n)
	}
	if got := w.result(schemas.Gateway, "tools/list", "", `{"cursor":"`+ok+`",`+fanMeta+`}`); !strings.Contains(got, "a__a2") || !strings.Contains(got, "b__b0") || strings.Contains(got, "a__a0") {
		t.Error(got)
	}
}

// FuzzCursor: what is read as a cursor is one that would be written.
func FuzzCursor(f *testing.F) {
	servers := []string{"a", "b", "c"}
	for _, c := range [][]cursor{{{"a", ""}}, {{"a", "x"}, {"c", "é\"\n"}}, {{"c", strings.Repeat("y", 300)}}} {
		f.Add(writeCursor("tools/list", c))
	}
	f.Add("")
	f.Add(base64.RawURLEncoding.EncodeToString([]byte(`["tools/list","a","\u0061"]`)))
	f.Add(base64.RawURLEncoding.EncodeToString([]byte(strings.Repeat("[", 100))))
	f.Fuzz(func(t *testing.T, text string) {
		all, err := readCursor(text, "tools/list", servers)
		if err != nil {
			return
		}
		if writeCursor("tools/list", all) != text || len(all) == 0 || len(all) > 3 {
			t.Errorf("%q is %v", text, all)
		}
		if _, err := readCursor(text, "prompts/list", servers); err == nil {
			t.Error("a cursor of two lists")
		}
	})
}

// A view shows what it names, in its order, under its names; the gateway's own
// tools where the caller may call them.
func TestFrontView(t *testing.T) {
	view := &schemas.Front{Name: "v", Servers: []string{"a", "b", schemas.Gateway}, Exposed: []schemas.Exposed{
		{Server: "a", Tool: "a3", As: "third"}, {Server: "a", Tool: "a0", Description: "zero \"0\""}, {Server: "a", Tool: "gone"},
		{Server: "b", Tool: "b0"}, {Server: schemas.Gateway, Tool: findTools}, {Server: schemas.Gateway, Tool: callMany, As: "many"},
	}}
	w := newTown(t, map[string]script{"a": paged("a", 5, "x"), "b": paged("b", 1, "y")},
		func(o *Options) { o.Fronts = append(o.Fronts, view) })
	only := []string{callMany}
	hidden := false
	w.allow = func(q *schemas.Requested) (bool, []string) {
		switch {
		case q.Server == schemas.Gateway:
			return true, only
		case q.Server == "b" && hidden:
			return true, []string{}
		}
		return true, nil
	}
	got := w.result("v", "tools/list", "", `{`+fanMeta+`}`)
	if want := `"result":{"tools":[{"name":"third","pad":"x"},{"name":"a0","pad":"x","description":"zero \"0\""},{"name":"b0","pad":"y"},{"name":"many",`; !strings.HasPrefix(got, want) {
		t.Error(got)
	}
	if want := `,"dev.waybill/servers":{"a":{"error":"missing_tools","message":"It has no tool gone."}}}}`; !strings.HasSuffix(got, want) || strings.Contains(got, findTools) {
		t.Error(got)
	}
	hidden = true
	if got := w.result("v", "tools/list", "", `{`+fanMeta+`}`); strings.Contains(got, "b0") || strings.Contains(got, `"b"`) {
		t.Errorf("what is kept from the caller is told: %s", got)
	}
	if got := w.result("v", "prompts/list", "", `{`+fanMeta+`}`); !strings.HasPrefix(got, `"result":{"prompts":[],`) {
		t.Error(got)
	}
	if got := w.result("v", "server/discover", "", `{`+fanMeta+`}`); !strings.Contains(got, `"capabilities":{"tools":{"listChanged":true},"extensions":{"io.modelcontextprotocol/tasks":{}}}`) {
		t.Error(got)
	}
	r := w.call(context.Background(), "v", "tools/call", findTools, `{"name":"find_tools",`+fanMeta+`}`)
	if d := r.end.Data.(*schemas.Completed); d.ErrorCode != jsonrpc.CodeInvalidParams || !strings.Contains(string(r.end.Body), `unknown tool \"find_tools\"`) {
		t.Errorf("%+v", d)
	}
}

// What a front answers by itself asks nobody.
func TestFrontItself(t *testing.T) {
	w := newTown(t, map[string]script{"a": lister(`[]`)})
	for _, c := range []struct {
		method, params, want string
		change               []func(*schemas.Requested)
	}{
		{"ping", `{}`, `"result":{}`, []func(*schemas.Requested){older}},
		{"initialize", `{"protocolVersion":"2025-11-25","capabilities":{},"clientInfo":{"name":"c","version":"1"}}`,
			`"result":{"protocolVersion":"2025-11-25","capabilities":{"completions":{},"logging":{},"prompts":{"listChanged":true},"resources":{"listChanged":true,"subscribe":true},"tools":{"listChanged":true},"tasks":{"list":{},"cancel":{},"requests":{"tools":{"call":{}}}}},"serverInfo":{"name":"waybill","version":"1"},"instructions":"`,
			[]func(*schemas.Requested){older}},
		{"server/discover", `{` + fanMeta + `}`, `"result":{"supportedVersions":["2026-07-28"],"capabilities":{`, nil},
		{"initialize", `{` + fanMeta + `}`, `"error":{"code":-32601,`, nil},
		{"server/discover", `{}`, `"error":{"code":-32601,`, []func(*schemas.Requested){older}},
		{"resources/read", `{"uri":"x"}`, `"error":{"code":-32602,"message":"Resource not found","data":{"uri":"`, nil},
		{"prompts/get", `{"name":"x"}`, `"error":{"code":-32602,"message":"unknown prompt`, nil},
		{"completion/complete", `{}`, `"error":{"code":-32601,`, nil},
		{"what/ever", `{}`, `"error":{"code":-32601,`, nil},
		{"tools/list", `[]`, `"error":{"code":-32602,`, nil},
	} {
		if got := w.result(schemas.Gateway, c.method, "", c.params, c.change...); !strings.HasPrefix(got, c.want) {
			t.Errorf("%s: %s", c.method, got)
		}
	}
	for _, method := range []string{"notifications/initialized", "notifications/progress"} {
		r := w.call(context.Background(), schemas.Gateway, method, "", `{}`, func(q *schemas.Requested) { q.OneWay = true })
		if d, ok := r.end.Data.(*schemas.Completed); !ok || r.end.Body != nil {
			t.Errorf("%s: %+v %s", method, d, r.end.Body)
		}
	}
	if n := len(w.children()); n != 0 {
		t.Errorf("%d children", n)
	}
}

// What is said to all servers.
func TestFrontEverybody(t *testing.T) {
	var roots atomic.Int64
	took := func(method string, _ *jsonrpc.Message) said {
		if method == "notifications/roots/list_changed" {
			roots.Add(1)
			return said{status: 202}
		}
		return said{result: `{}`}
	}
	none := func(method string, _ *jsonrpc.Message) said {
		if method == "notifications/roots/list_changed" {
			roots.Add(1)
			return said{status: 202}
		}
		return said{err: `{"code":-32601,"message":"Method not found"}`}
	}
	bad := func(string, *jsonrpc.Message) said { return said{err: `{"code":-32602,"message":"no such level"}`} }
	w := newTown(t, map[string]script{"a": none, "b": took, "c": bad})
	if got := w.result(schemas.Gateway, "logging/setLevel", "", `{"level":"debug"}`, older); got != `"result":{}` {
		t.Error(got)
	}
	w = newTown(t, map[string]script{"a": none, "c": bad})
	if got := w.result(schemas.Gateway, "logging/setLevel", "", `{"level":"loud"}`, older); got != `"error":{"code":-32602,"message":"no such level"}` {
		t.Error(got)
	}
	w = newTown(t, map[string]script{"a": none, "b": took})
	for _, method := range []string{"notifications/initialized", "notifications/roots/list_changed"} {
		r := w.call(context.Background(), schemas.Gateway, method, "", `{}`, older, func(q *schemas.Requested) { q.OneWay = true })
		if _, ok := r.end.Data.(*schemas.Completed); !ok {
			t.Errorf("%+v", r.end.Data)
		}
	}
	// Nobody waits for it, but it is done.
	late := time.After(10 * time.Second)
	for roots.Load() != 2 || w.ready.Load() != 2 {
		select {
		case <-late:
			t.Fatalf("%d servers told, %d ready", roots.Load(), w.ready.Load())
		case <-time.After(time.Millisecond):
		}
	}
}

// A subscription is acknowledged once, passes on what each server says as its
// own, and goes on without one that fails.
func TestFrontListen(t *testing.T) {
	leaks(t)
	hears := func(agreed string, say ...string) script {
		return func(method string, m *jsonrpc.Message) said {
			msgs := []string{`{"jsonrpc":"2.0","method":"notifications/subscriptions/acknowledged","params":{"notifications":` + agreed + `,"_meta":{"io.modelcontextprotocol/subscriptionId":ID}}}`}
			for _, s := range say {
				msgs = append(msgs, `{"jsonrpc":"2.0","method":"notifications/`+s)
			}
			return said{sse: msgs, result: `{"resultType":"complete","_meta":{"io.modelcontextprotocol/subscriptionId":ID}}`}
		}
	}
	var asked sync.Map
	note := func(name string, s script) script {
		return func(method string, m *jsonrpc.Message) said {
			asked.Store(name, string(m.Params().Get("notifications").Raw()))
			return s(method, m)
		}
	}
	w := newTown(t, map[string]script{
		"a": note("a", hears(`{"toolsListChanged":true,"resourceSubscriptions":["file:///1"]}`,
			`resources/updated","params":{"uri":"file:///1","_meta":{"io.modelcontextprotocol/subscriptionId":ID}}}`,
			`tools/list_changed","params":{"_meta":{"x":1.0,"io.modelcontextprotocol/subscriptionId":ID}}}`)),
		"b": note("b", hears(`{"promptsListChanged":true}`)),
		"c": func(string, *jsonrpc.Message) said { return said{status: 500} },
	})
	w.d.sessions.timing.front = time.Minute // none is opened again
	params := `{"notifications":{"toolsListChanged":true,"promptsListChanged":true,"resourcesListChanged":true,"resourceSubscriptions":["waybill://a/file:///1","waybill://b/x","other"]},` + fanMeta + `}`
	streaming := func(q *schemas.Requested) { q.Stream, q.Deadline = true, time.Time{} }
	r := w.call(context.Background(), schemas.Gateway, "subscriptions/listen", "", params, streaming)
	id := `"io.modelcontextprotocol/subscriptionId":"` + string(r.call) + `"`
	want := []string{
		`{"jsonrpc":"2.0","method":"notifications/subscriptions/acknowledged","params":{"notifications":{"toolsListChanged":true,"promptsListChanged":true,"resourceSubscriptions":["waybill://a/file:///1"]},"_meta":{` + id + `}}}`,
		`{"jsonrpc":"2.0","method":"notifications/resources/updated","params":{"uri":"waybill://a/file:///1","_meta":{` + id + `}}}`,
		`{"jsonrpc":"2.0","method":"notifications/tools/list_changed","params":{"_meta":{"x":1.0,` + id + `}}}`,
	}
	if !slices.Equal(r.progress, want) {
		t.Errorf("got\n%s\nwant\n%s", strings.Join(r.progress, "\n"), strings.Join(want, "\n"))
	}
	if got := string(r.end.Body); !strings.HasSuffix(got, `"result":{"resultType":"complete","_meta":{`+id+`}}}`) {
		t.Errorf("%+v %s", r.end.Data, got)
	}
	if a, _ := asked.Load("a"); a != `{"toolsListChanged":true,"promptsListChanged":true,"resourcesListChanged":true,"resourceSubscriptions":["file:///1"]}` {
		t.Error(a)
	}
	if b, _ := asked.Load("b"); b != `{"toolsListChanged":true,"promptsListChanged":true,"resourcesListChanged":true,"resourceSubscriptions":["x"]}` {
		t.Error(b)
	}

	// The client leaves: so do we, everywhere.
	stays := func(string, *jsonrpc.Message) said {
		return said{sse: []string{`{"jsonrpc":"2.0","method":"notifications/subscriptions/acknowledged","params":{"notifications":{"toolsListChanged":true}}}`}}
	}
	w = newTown(t, map[string]script{"a": stays, "b": stays})
	ctx, leave := context.WithCancel(context.Background())
	acked := make(chan schemas.Kind, 1000)
	w.log.stored = acked
	done := make(chan struct{})
	go func() {
		defer close(done)
		w.call(ctx, schemas.Gateway, "subscriptions/listen", "", params, streaming)
	}()
	for n := 0; n < 3; { // of both servers, and the front's
		if <-acked == schemas.KindProgressed {
			n++
		}
	}
	leave()
	<-done
	for n := 0; n < 3; {
		if <-acked == schemas.KindCancelled {
			n++
		}
	}
	w.log.stored = nil

	w = newTown(t, map[string]script{"a": func(string, *jsonrpc.Message) said { return said{status: 404, err: `{"code":-32601,"message":"no"}`} }})
	if got := w.result(schemas.Gateway, "subscriptions/listen", "", params, streaming); !strings.HasPrefix(got, `"error":{"code":-32601,`) {
		t.Error(got)
	}
	if got := w.result(schemas.Gateway, "subscriptions/listen", "", `{}`, streaming); !strings.HasPrefix(got, `"error":{"code":-32602,`) {
		t.Error(got)
	}
}

// A stream to a server that fails or ends while another goes on is opened again;
// one of a server that has none, or that the caller may not use, is not.
func TestFrontListenAgain(t *testing.T) {
	leaks(t)
	ack := `{"jsonrpc":"2.0","method":"notifications/subscriptions/acknowledged","params":{"notifications":{"toolsListChanged":true}}}`
	const changed = `{"jsonrpc":"2.0","method":"notifications/tools/list_changed","params":{"n":%d}}`
	var asked, none, old atomic.Int32
	back := make(chan struct{})
	w := newTown(t, map[string]script{
		"a": func(string, *jsonrpc.Message) said { return said{sse: []string{ack}} },
		"b": func(string, *jsonrpc.Message) said {
			switch n := asked.Add(1); n {
			case 1:
				return said{status: 500}
			case 2, 3:
				return said{sse: []string{ack, fmt.Sprintf(changed, n)}, result: `{"resultType":"complete"}`}
			case 4:
				return said{err: `{"code":-32603,"message":"not now"}`}
			default:
				close(back)
				return said{sse: []string{ack}}
			}
		},
		"none": func(string, *jsonrpc.Message) said {
			none.Add(1)
			return said{status: 404, err: `{"code":-32601,"message":"no"}`}
		},
		"old": func(string, *jsonrpc.Message) said {
			old.Add(1)
			return said{status: 400, err: `{"code":-32000,"message":"no session"}`}
		},
		"secret": func(string, *jsonrpc.Message) said { return said{sse: []string{ack}} },
	})
	w.d.sessions.timing.front, w.d.sessions.timing.fronts = time.Millisecond, 10*time.Millisecond
	w.allow = func(q *schemas.Requested) (bool, []string) { return q.Server != "secret", nil }
	ctx, leave := context.WithCancel(context.Background())
	done := make(chan reply)
	go func() {
		done <- w.call(ctx, schemas.Gateway, "subscriptions/listen", "", `{"notifications":{"toolsListChanged":true},`+fanMeta+`}`,
			func(q *schemas.Requested) { q.Stream, q.Deadline = true, time.Time{} })
	}()
	<-back
	ends := make(chan schemas.Kind, 1000)
	w.log.mu.Lock()
	w.log.stored = ends
	w.log.mu.Unlock()
	leave()
	r := <-done
	for n := 0; n < 3; { // of both servers, and the front's
		if <-ends == schemas.KindCancelled {
			n++
		}
	}
	var said []string
	for _, e := range w.log.of(schemas.KindProgressed) {
		if e.Call == r.call {
			said = append(said, string(e.Body))
		}
	}
	if len(said) != 3 || !strings.Contains(said[0], `"toolsListChanged":true`) || said[1] != fmt.Sprintf(changed, 2) || said[2] != fmt.Sprintf(changed, 3) {
		t.Errorf("%q", said)
	}
	of := map[string]int{}
	for _, e := range w.children() {
		of[e.Data.(*schemas.Requested).Server]++
	}
	if want := map[string]int{"a": 1, "b": 5, "none": 1, "old": 1, "secret": 1}; !maps.Equal(of, want) || none.Load() != 1 || old.Load() != 1 {
		t.Errorf("%v", of)
	}
}

// Names that are there twice: on a page the second is left out; one on a later
// page is shown, and calls what the first does, since a name is one server's and
// means one thing there.
func TestFrontDuplicates(t *testing.T) {
	pages := map[string]string{
		"":  `{"tools":[{"name":"x","n":1},{"name":"x","n":2},{"name":"x y","n":3}],"nextCursor":"2"}`,
		"2": `{"tools":[{"name":"x","n":4},{"name":"x_y_DIGITS","n":5},{"name":"z","n":6}]}`,
	}
	var w *town
	var called sync.Map
	serve := func(name string) script {
		return func(method string, m *jsonrpc.Message) said {
			if method == "tools/call" {
				tool, _ := m.Params().Get("name").Text()
				called.Store(name+" "+tool, true)
				return said{result: `{"content":[]}`}
			}
			cursor, _ := m.Params().Get("cursor").Text()
			return said{result: strings.ReplaceAll(pages[cursor], "DIGITS", w.digits("x y"))}
		}
	}
	w = newTown(t, map[string]script{"a": serve("a"), "a_a": serve("a_a")}, func(o *Options) { o.Fanout.Tools = []string{callMany} })
	names, n := w.walk(t, "tools/list")
	short := "x_y_" + w.digits("x y")
	if want := "a__x a__" + short + " a_a__x a_a__" + short + " waybill__call_many a__x a__" + short + " a__z a_a__x a_a__" + short + " a_a__z"; strings.Join(names, " ") != want || n != 2 {
		t.Errorf("%d pages: %s", n, names)
	}
	m := w.many(t, `{"calls":[{"tool":"a__x"},{"tool":"a__`+short+`"},{"tool":"a_a__x"}]}`)
	if m.StructuredContent.OK != 3 {
		t.Errorf("%+v", m)
	}
	var all []string
	called.Range(func(k, _ any) bool { all = append(all, k.(string)); return true })
	if slices.Sort(all); strings.Join(all, ", ") != "a x, a x y, a_a x" {
		t.Errorf("%q", all)
	}
}
