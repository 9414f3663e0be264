package dispatch

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"waybill.dev/schemas"
	"waybill.dev/schemas/jsonrpc"
)

// plainServer is an MCP server without sessions, as plain as the protocol
// allows, whose answers a test spoils.
type plainServer struct {
	t        testing.TB
	discover string                                                             // its result; "" for the usual one
	call     func(w http.ResponseWriter, req *http.Request, m *jsonrpc.Message) // other requests; nil: an empty result
	listen   func(w http.ResponseWriter, req *http.Request, m *jsonrpc.Message) // nil: what is wanted is acknowledged, and nothing said

	mu      sync.Mutex
	came    []string // methods, in order
	bodies  []string
	headers []http.Header
	ids     map[string]bool
	streams map[string]func(string) // open, by the id of the request
	news    chan struct{}
}

const discovered = `{"resultType":"complete","supportedVersions":["2026-07-28"],"ttlMs":5,"cacheScope":"public","capabilities":{"tools":{"listChanged":true},"resources":{"subscribe":true},"logging":{},"x":{"n":1E400}},` +
	`"instructions":"do","vendor":[1E400],"_meta":{"io.modelcontextprotocol/serverInfo":{"name":"plain","version":"1","z":1E400},"k":1}}`

func (p *plainServer) ServeHTTP(w http.ResponseWriter, req *http.Request) {
	b, _ := io.ReadAll(req.Body)
	m, err := jsonrpc.Decode(b, jsonrpc.Limits{Depth: 512})
	if req.Method != http.MethodPost || err != nil || req.Header.Get("Mcp-Session-Id") != "" || req.Header.Get("Mcp-Protocol-Version") != mcpRevision || req.Header.Get("Mcp-Method") != m.Method() {
		p.t.Errorf("%s %s %v: %v", req.Method, b, req.Header, err)
		http.Error(w, "bad", http.StatusBadRequest)
		return
	}
	version, _ := m.Params().Get("_meta", metaVersion).Text()
	id, _ := m.ID().Text()
	p.mu.Lock()
	if m.IsRequest() && (version != mcpRevision || m.Params().Get("_meta", metaCaps).Kind() != jsonrpc.Object || p.ids[id] && id != "waybill-probe") {
		p.t.Errorf("no request of this revision, or its id was there before: %s", b)
	}
	if p.ids == nil {
		p.ids, p.streams = map[string]bool{}, map[string]func(string){}
	}
	p.ids[id] = true
	p.came = append(p.came, m.Method())
	p.bodies = append(p.bodies, string(b))
	p.headers = append(p.headers, req.Header)
	p.tell()
	p.mu.Unlock()
	switch {
	case !m.IsRequest():
		w.WriteHeader(http.StatusAccepted)
	case m.Method() == "server/discover":
		result := p.discover
		if result == "" {
			result = discovered
		}
		answerJSON(w, 200, `{"jsonrpc":"2.0","id":"`+id+`","result":`+result+`}`)
	case m.Method() == "subscriptions/listen":
		if p.listen != nil {
			p.listen(w, req, m)
		} else {
			p.acknowledge(w, req, m, string(m.Params().Get("notifications").Raw()))
		}
	case p.call != nil:
		p.call(w, req, m)
	default:
		answerJSON(w, 200, result(m))
	}
}

// tell wakes who waits. mu is held.
func (p *plainServer) tell() {
	if p.news != nil {
		close(p.news)
		p.news = nil
	}
}

// acknowledge is a subscription that lives until the client leaves.
func (p *plainServer) acknowledge(w http.ResponseWriter, req *http.Request, m *jsonrpc.Message, agreed string) {
	id, _ := m.ID().Text()
	sseHead(w)
	say(w, `data: {"jsonrpc":"2.0","method":"notifications/subscriptions/acknowledged","params":{"notifications":%s,"_meta":{"%s":"%s"}}}`+"\n\n", agreed, metaSubscription, id)
	out, over := make(chan string, 16), make(chan struct{})
	p.mu.Lock()
	p.streams[id] = func(text string) {
		if text == "" {
			close(over)
			return
		}
		out <- strings.ReplaceAll(text, "$ID", id)
	}
	p.tell()
	p.mu.Unlock()
	defer func() {
		p.mu.Lock()
		defer p.mu.Unlock()
		delete(p.streams, id)
		p.tell()
	}()
	for {
		select {
		case text := <-out:
			say(w, "data: %s\n\n", text)
		case <-over:
			hangUp(w)
			return
		case <-req.Context().Done():
			return
		}
	}
}

// until waits until something is so of the server.
func (p *plainServer) until(what string, so func() bool) {
	p.t.Helper()
	late := time.After(20 * time.Second)
	for {
		p.mu.Lock()
		if p.news == nil {
			p.news = make(chan struct{})
		}
		news, is := p.news, so()
		p.mu.Unlock()
		if is {
			return
		}
		select {
		case <-news:
		case <-late:
			p.mu.Lock()
			defer p.mu.Unlock()
			p.t.Fatalf("%s: came %q, %d streams", what, p.came, len(p.streams))
		}
	}
}

// say says something on all streams, and "" ends them.
func (p *plainServer) say(text string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, say := range p.streams {
		say(text)
	}
}

// of are the bodies of the requests of a method.
func (p *plainServer) of(method string) (bodies []string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for i, m := range p.came {
		if m == method {
			bodies = append(bodies, p.bodies[i])
		}
	}
	return bodies
}

func oldRig(t testing.TB, p *plainServer, change ...func(*Options)) *rig {
	p.t = t
	r := newRig(t, p.ServeHTTP, append([]func(*Options){func(o *Options) { o.Servers[0].Era = EraModern }}, change...)...)
	r.open("s1")
	quick(r.d)
	t.Cleanup(r.http.CloseClientConnections)
	return r
}

// ask stores a request of the session, and hands it over.
func (r *rig) old(method, name, params string) schemas.Event {
	r.t.Helper()
	if params != "" {
		params = `,"params":` + params
	}
	e := r.method(method, name, `{"jsonrpc":"2.0", "id": 9007199254740993,"method":"`+method+`"`+params+`}`, inSession("s1"))
	r.handle(e)
	return e
}

func (r *rig) note(method string) schemas.Event {
	r.t.Helper()
	e := r.method(method, "", `{"jsonrpc":"2.0","method":"`+method+`"}`, inSession("s1"), authorized(func(a *schemas.Authorized) { a.OneWay = true }))
	r.handle(e)
	return e
}

const (
	saidOfClient = `"io.modelcontextprotocol/protocolVersion":"2026-07-28","io.modelcontextprotocol/clientCapabilities":{"sampling":{},"x":1E400},"io.modelcontextprotocol/clientInfo":{"name":"c","version":"1"}`
)

// initialize is answered from what the server says of itself, and the log knows
// of it.
func TestOldClientOpens(t *testing.T) {
	p := &plainServer{}
	r := oldRig(t, p)
	e := r.method("initialize", "", initialize, inSession("s1"))
	r.handle(e)
	end := r.ends(e, "completed")
	want := `{"jsonrpc":"2.0","id":"` + string(e.Call) + `","result":{"protocolVersion":"2025-11-25","instructions":"do","vendor":[1E400],"_meta":{"io.modelcontextprotocol/serverInfo":{"name":"plain","version":"1","z":1E400},"k":1},` +
		`"capabilities":{"tools":{"listChanged":true},"resources":{"subscribe":true},"logging":{},"x":{"n":1E400},"tasks":{"list":{},"cancel":{},"requests":{"tools":{"call":{}}}}},"serverInfo":{"name":"plain","version":"1","z":1E400}}}`
	if string(end.Body) != want {
		t.Errorf("answered %s\nwant     %s", end.Body, want)
	}
	if got := p.of("server/discover"); len(got) != 1 || got[0] != `{"jsonrpc":"2.0","id":"`+string(e.Call)+`","method":"server/discover","params":{"_meta":{`+saidOfClient+`}}}` {
		t.Errorf("asked %q", got)
	}
	connected := r.log.of(schemas.KindConnected)
	if len(connected) != 1 || connected[0].Seq > end.Seq || string(connected[0].Body) != want {
		t.Fatal(r.log)
	}
	if c := connected[0].Data.(*schemas.Connected); c.Revision != mcpRevision || c.Upstream != "" || c.Server != "s" || c.By == "" {
		t.Errorf("%+v", c)
	}
	// Nothing is listened to before the client is ready.
	if n := len(p.of("subscriptions/listen")); n != 0 {
		t.Errorf("%d streams", n)
	}
	r.ends(r.note("notifications/initialized"), "completed")
	p.until("no stream", func() bool { return len(p.streams) == 1 })
	if got := p.of("subscriptions/listen"); !strings.Contains(got[0], `"params":{"notifications":{"toolsListChanged":true},"_meta":{`+saidOfClient+`}}`) {
		t.Errorf("listens %s", got)
	}
	p.say(`{"jsonrpc":"2.0", "method":"notifications/tools/list_changed","params":{"_meta":{"` + metaSubscription + `":"$ID"},"x":1E400}}`)
	p.say(`{"jsonrpc":"2.0","method":"notifications/vendor","params":{"_meta":{"k":1E400, "` + metaSubscription + `":"$ID"}}}`)
	said := r.log.await(t, schemas.KindNotified, 2)
	if string(said[0].Body) != `{"jsonrpc":"2.0", "method":"notifications/tools/list_changed","params":{"x":1E400}}` ||
		string(said[1].Body) != `{"jsonrpc":"2.0","method":"notifications/vendor","params":{"_meta":{"k":1E400}}}` {
		t.Errorf("told %s %s", said[0].Body, said[1].Body)
	}
	if n := said[0].Data.(*schemas.Notified); said[0].Call != "" || n.Server != "s" || n.Method != "notifications/tools/list_changed" {
		t.Errorf("%+v", said[0])
	}
	// A stream that breaks is opened again.
	p.say("")
	p.until("not again", func() bool { return len(p.came) == 3 && len(p.streams) == 1 })
	// With the session all of it ends.
	closed := r.log.add(schemas.Event{Tenant: "acme", Session: "s1", Agent: "a1", Data: &schemas.Closed{}})
	if err := r.d.Hear(t.Context(), closed, r.log.emit); err != nil {
		t.Fatal(err)
	}
	p.until("the stream outlives the session", func() bool { return len(p.streams) == 0 })
	r.ends(r.old("tools/call", "write", `{"name":"write"}`), "invalid")
	if n := r.d.Stats()[0].Sessions; n != 0 {
		t.Errorf("%d sessions", n)
	}
}

func TestIntroduction(t *testing.T) {
	m := &mcpServer{name: "s"}
	for revision, c := range map[string][2]string{
		"2025-06-18": {`{"supportedVersions":["2026-07-28"],"capabilities":{},"instructions":null,"serverInfo":{"name":"n","version":"2"}}`,
			`{"protocolVersion":"2025-06-18","capabilities":{},"serverInfo":{"name":"n","version":"2"}}`},
		"2024-11-05": {`{"supportedVersions":["2026-07-28"],"_meta":{}}`,
			`{"protocolVersion":"2025-11-25","_meta":{},"capabilities":{"tasks":{"list":{},"cancel":{},"requests":{"tools":{"call":{}}}}},"serverInfo":{"name":"s","version":"unknown"}}`},
	} {
		v, err := jsonrpc.Parse([]byte(c[0]), jsonrpc.Limits{})
		if err != nil {
			t.Fatal(err)
		}
		if got := string(m.introduction(v, revision)); got != c[1] {
			t.Errorf("got  %s\nwant %s", got, c[1])
		}
	}
}

// What the server cannot be asked to open is not opened.
func TestOldClientRefused(t *testing.T) {
	p := &plainServer{discover: `{"supportedVersions":["2027-01-01"]}`}
	r := oldRig(t, p)
	e := r.method("initialize", "", initialize, inSession("s1"))
	r.handle(e)
	r.ends(e, "bad_answer")
	e = r.method("initialize", "", strings.Replace(initialize, `"x":1E400`, `"x":"`+strings.Repeat("x", maxClient)+`"`, 1), inSession("s1"))
	r.handle(e)
	r.ends(e, "invalid")
	if n := r.d.Stats()[0].Sessions; n != 0 || len(r.log.of(schemas.KindConnected)) != 0 {
		t.Errorf("%d sessions%v", n, r.log)
	}
}

// What goes out, and what the gateway answers by itself.
func TestOldClientRequests(t *testing.T) {
	p := &plainServer{}
	r := oldRig(t, p)
	e := r.old("tools/list", "", "")
	end := r.ends(e, "completed")
	if !strings.Contains(string(end.Body), `"id":"`+string(e.Call)+`","result":{"ok": 1E400}`) {
		t.Errorf("answered %s", end.Body)
	}
	r.ends(r.old("tools/call", "write", `{"name":"write","zz":1E400,"_meta":{"progressToken":9007199254740993, "io.modelcontextprotocol/protocolVersion":"1"}}`), "completed")
	for level, want := range map[string]string{`"loud"`: "-32602", `7`: "-32602", `"debug"`: `"result":{}`} {
		if end := r.ends(r.old("logging/setLevel", "", `{"level":`+level+`}`), "completed"); !strings.Contains(string(end.Body), want) {
			t.Errorf("%s: %s", level, end.Body)
		}
	}
	r.ends(r.old("prompts/get", "p", `{"name":"p"}`), "completed")
	if end := r.ends(r.old("ping", "", ""), "completed"); string(end.Body) != `{"jsonrpc":"2.0","id":"`+string(end.Call)+`","result":{}}` || summary(end).Attempts != 0 {
		t.Errorf("%s", end.Body)
	}
	for _, method := range []string{"notifications/roots/list_changed", "notifications/cancelled", "notifications/progress", "notifications/vendor"} {
		if end := r.ends(r.note(method), "completed"); end.Data.(*schemas.Completed).Status != http.StatusAccepted {
			t.Errorf("%s: %+v", method, end.Data)
		}
	}
	for _, params := range []string{`[]`, `{"name":"p","_meta":7}`} {
		if end := r.ends(r.old("x/y", "", params), "completed"); !strings.Contains(string(end.Body), "-32602") {
			t.Errorf("%s: %s", params, end.Body)
		}
	}
	id := func(method string) string { return `{"jsonrpc":"2.0", "id": "` }
	for method, want := range map[string]string{
		"tools/list":           `,"method":"tools/list","params":{"_meta":{` + saidOfClient + `}}}`,
		"tools/call":           `,"method":"tools/call","params":{"name":"write","zz":1E400,"_meta":{"progressToken":9007199254740993, "io.modelcontextprotocol/protocolVersion":"2026-07-28",` + strings.SplitN(saidOfClient, ",", 2)[1] + `}}}`,
		"prompts/get":          `,"method":"prompts/get","params":{"name":"p","_meta":{` + saidOfClient + `,"io.modelcontextprotocol/logLevel":"debug"}}}`,
		"notifications/vendor": `{"jsonrpc":"2.0","method":"notifications/vendor"}`,
	} {
		got := p.of(method)
		if len(got) != 1 || !strings.HasSuffix(got[0], want) || !strings.HasPrefix(got[0], id(method)) && method != "notifications/vendor" {
			t.Errorf("%s: sent %s\nwant %s", method, got, want)
		}
	}
	p.until("no stream", func() bool { return len(p.streams) == 1 }) // a session that was not opened by this process
	p.mu.Lock()
	defer p.mu.Unlock()
	for i, method := range p.came {
		if !slices.Contains([]string{"tools/list", "tools/call", "prompts/get", "notifications/vendor", "server/discover", "subscriptions/listen"}, method) {
			t.Errorf("the server was told %s", p.bodies[i])
		}
		if name := p.headers[i].Get("Mcp-Name"); method == "tools/call" && name != "write" || method == "prompts/get" && name != "p" {
			t.Errorf("%s: %v", method, p.headers[i])
		}
	}
}

// inputs answers the nth request of a call with the nth text.
func inputsOf(texts ...string) func(w http.ResponseWriter, req *http.Request, m *jsonrpc.Message) {
	var mu sync.Mutex
	n := 0
	return func(w http.ResponseWriter, _ *http.Request, m *jsonrpc.Message) {
		mu.Lock()
		text := texts[min(n, len(texts)-1)]
		n++
		mu.Unlock()
		switch text {
		case "hang up":
			hangUp(w)
		case "429":
			http.Error(w, "later", http.StatusTooManyRequests)
		default:
			answerJSON(w, 200, `{"jsonrpc":"2.0", "id":`+string(m.ID().Raw())+`,`+text+`}`)
		}
	}
}

func wants(members string) string {
	return `"result":{"resultType":"input_required",` + members + `}`
}

const done = `"result":{"content":[],"n":1E400}`

// answers answers what a call asks, as it comes, with these bodies by the
// method. It returns what was asked.
func (r *rig) answers(e schemas.Event, by map[string]string, n int) []schemas.Event {
	r.t.Helper()
	finished := make(chan error, 1)
	go func() { finished <- r.d.Handle(context.Background(), e, r.log.emit) }()
	for i := range n {
		q := r.log.await(r.t, schemas.KindAsked, i+1)[i]
		a := q.Data.(*schemas.Asked)
		body := strings.ReplaceAll(by[a.Method], "$ID", a.ID)
		answered := r.log.add(q.Next(&schemas.Answered{Target: a.Target, ID: a.ID}, []byte(body)))
		if err := r.d.Hear(context.Background(), answered, r.log.emit); err != nil {
			r.t.Fatal(err)
		}
	}
	if err := <-finished; err != nil {
		r.t.Fatal(err)
	}
	return r.log.of(schemas.KindAsked)
}

// What a server wants to know the client is asked, and the server told, byte for
// byte; the call is one.
func TestOldClientInput(t *testing.T) {
	p := &plainServer{call: inputsOf(
		wants(`"inputRequests":{"a\u0062":{"method":"elicitation/create","params":{"message":"m","n":1E400}},"s":{"method":"sampling/createMessage","params":{"x":[]}},"r":{"method":"roots/list"}},"requestState":"\u0061<&>"`),
		wants(`"requestState":"second"`),
		wants(`"inputRequests":{"e":{"method":"elicitation/create","params":{}}}`),
		done)}
	r := oldRig(t, p)
	e := r.legacy("write", func(e *schemas.Event) {
		e.Body = []byte(`{"jsonrpc":"2.0", "id": 1,"method":"tools/call","params":{"name":"write","arguments":{"x": 1E400}}}`)
	})
	asked := r.answers(e, map[string]string{
		"elicitation/create":     `{"jsonrpc":"2.0","id":"$ID","result":{"action":"accept","content":{"n":1E400, "m":1}}}`,
		"sampling/createMessage": `{"jsonrpc":"2.0","id":"$ID","result":{"role":"assistant"}}`,
		"roots/list":             `{"jsonrpc":"2.0","id":"$ID","result":{"roots":[ ]}}`,
	}, 4)
	end := r.ends(e, "completed")
	if want := `{"jsonrpc":"2.0", "id":"` + string(e.Call) + `",` + done + `}`; string(end.Body) != want {
		t.Errorf("answered %s\nwant     %s", end.Body, want)
	}
	if n := len(r.log.of(schemas.KindStarted)); n != 1 || summary(end).Attempts != 1 {
		t.Errorf("%d claims, %+v", n, end.Data)
	}
	for i, want := range []string{
		`"method":"elicitation/create","params":{"message":"m","n":1E400}}`, `"method":"sampling/createMessage","params":{"x":[]}}`, `"method":"roots/list"}`,
		`"method":"elicitation/create","params":{}}`,
	} {
		a := asked[i].Data.(*schemas.Asked)
		if got := string(asked[i].Body); got != `{"jsonrpc":"2.0","id":"`+a.ID+`",`+want || asked[i].Call != e.Call || asked[i].Edge != e.Edge || a.Server != "s" {
			t.Errorf("asked %+v %s\nwant %s", a, got, want)
		}
	}
	head := func(n string) string {
		return `{"jsonrpc":"2.0", "id": "` + string(e.Call) + n + `","method":"tools/call","params":{"name":"write","arguments":{"x": 1E400},"_meta":{` + saidOfClient + `}`
	}
	for i, want := range []string{
		head("") + `}}`,
		head("-2") + `,"inputResponses":{"ab":{"action":"accept","content":{"n":1E400, "m":1}},"s":{"role":"assistant"},"r":{"roots":[ ]}},"requestState":"\u0061<&>"}}`,
		head("-3") + `,"requestState":"second"}}`,
		head("-4") + `,"inputResponses":{"e":{"action":"accept","content":{"n":1E400, "m":1}}}}}`,
	} {
		if got := p.of("tools/call"); len(got) != 4 || got[i] != want {
			t.Errorf("sent %s\nwant %s", got, want)
		}
	}
	s := r.d.sessions.of[sessionID{"acme", "s1"}]["s"]
	if len(s.asked) != 0 {
		t.Errorf("questions are left: %v", s.asked)
	}
}

// How a call ends whose input cannot be had.
func TestOldClientNoInput(t *testing.T) {
	elicit := wants(`"inputRequests":{"e":{"method":"elicitation/create","params":{}}}`)
	sample := wants(`"inputRequests":{"s":{"method":"sampling/createMessage"}}`)
	failing := map[string]string{
		"elicitation/create":     `{"jsonrpc":"2.0","id":"$ID","error":{"code":-1,"message":"no"}}`,
		"sampling/createMessage": `{"jsonrpc":"2.0","id":"$ID","error":{"code":-1,"message":"no model"}}`,
	}
	for _, c := range []struct {
		name    string
		texts   []string
		answers int
		tool    string
		end     string
		says    string // the answer
		calls   int
	}{
		{"the user does not want to", []string{elicit, done}, 1, "write", "completed", "1E400", 2},
		{"sampling fails", []string{sample}, 1, "write", "completed", "the client answered sampling/createMessage with an error: no model", 1},
		{"something else", []string{wants(`"inputRequests":{"s":{"method":"files/delete"}}`)}, 0, "write", "completed", `files/delete`, 1},
		{"no params", []string{wants(`"inputRequests":{"s":{"method":"roots/list","params":[]}}`)}, 0, "write", "completed", "no object", 1},
		{"no requests", []string{wants(`"inputRequests":[]`)}, 0, "write", "bad_answer", "", 1},
		{"nothing at all", []string{wants(`"x":1`)}, 0, "write", "bad_answer", "", 1},
		{"no end", []string{wants(`"requestState":"s"`)}, 0, "write", "completed", "16 times", 17},
		{"no requests but an empty object", []string{wants(`"inputRequests":{},"requestState":"s"`), done}, 0, "write", "completed", "1E400", 2},
		{"breaks later", []string{elicit, "hang up"}, 1, "write", "unknown", "", 2},
		{"refused later", []string{elicit, "429"}, 1, "write", "unknown", "", 2},
		{"refused at first", []string{"429"}, 0, "write", "overloaded", "", 1},
		{"an error later", []string{elicit, `"error":{"code":-32602,"message":"tampered"}`}, 1, "write", "completed", "tampered", 2},
		{"too many at once", []string{wants(`"inputRequests":{` + strings.Repeat(`"ID":{"method":"roots/list"},`, 64) + `"x":{"method":"roots/list"}}`)}, 0, "write", "completed", "more than 64", 1},
	} {
		t.Run(c.name, func(t *testing.T) {
			for i := range 64 {
				c.texts[0] = strings.Replace(c.texts[0], `"ID"`, fmt.Sprintf(`"k%d"`, i), 1)
			}
			p := &plainServer{call: inputsOf(c.texts...)}
			r := oldRig(t, p)
			e := r.legacy(c.tool)
			r.answers(e, failing, c.answers)
			end := r.ends(e, c.end)
			if !strings.Contains(string(end.Body), c.says) {
				t.Errorf("answered %s", end.Body)
			}
			if got := p.of("tools/call"); len(got) != c.calls || strings.Contains(c.name, "user") && !strings.Contains(got[1], `"inputResponses":{"e":{"action":"cancel"}}`) {
				t.Errorf("sent %s", got)
			}
			if n := len(r.log.of(schemas.KindStarted)); n != 1 {
				t.Errorf("%d claims", n)
			}
		})
	}
}

// Who takes a call back while he is asked ends it, and so does its deadline.
func TestOldClientInputEnds(t *testing.T) {
	p := &plainServer{call: inputsOf(wants(`"inputRequests":{"e":{"method":"elicitation/create"}}`))}
	r := oldRig(t, p)
	e := r.legacy("write")
	finished := make(chan error, 1)
	go func() { finished <- r.d.Handle(context.Background(), e, r.log.emit) }()
	r.log.await(t, schemas.KindAsked, 1)
	if err := r.d.Hear(t.Context(), r.log.add(e.Next(&schemas.Cancel{Reason: "enough"}, nil)), r.log.emit); err != nil {
		t.Fatal(err)
	}
	if err := <-finished; err != nil {
		t.Fatal(err)
	}
	r.ends(e, "cancelled")

	for tool, want := range map[string]string{"write": "unknown", "read": "timeout"} {
		e = r.legacy(tool, authorized(func(a *schemas.Authorized) { a.Deadline = time.Now().Add(200 * time.Millisecond) }))
		r.handle(e)
		r.ends(e, want)
	}
	s := r.d.sessions.of[sessionID{"acme", "s1"}]["s"]
	if len(s.asked) != 0 {
		t.Errorf("questions are left: %v", s.asked)
	}
}

// To take a call back is to close its stream.
func TestOldClientCancels(t *testing.T) {
	left := make(chan struct{})
	begun := make(chan struct{})
	p := &plainServer{call: func(w http.ResponseWriter, req *http.Request, _ *jsonrpc.Message) {
		sseHead(w)
		close(begun)
		<-req.Context().Done()
		close(left)
	}}
	r := oldRig(t, p)
	e := r.legacy("write")
	finished := make(chan error, 1)
	go func() { finished <- r.d.Handle(context.Background(), e, r.log.emit) }()
	<-begun
	if err := r.d.Hear(t.Context(), r.log.add(e.Next(&schemas.Cancel{Reason: "enough"}, nil)), r.log.emit); err != nil {
		t.Fatal(err)
	}
	if err := <-finished; err != nil {
		t.Fatal(err)
	}
	<-left
	r.ends(e, "cancelled")
	if got := p.of("notifications/cancelled"); len(got) != 0 {
		t.Errorf("told %s", got)
	}
}

// Answers that clients of the older revisions would not take.
func TestOldClientAnswers(t *testing.T) {
	for _, c := range []struct{ name, method, tool, answer, want string }{
		{"schemas", "tools/list", "", `"result":{"tools":[{"name":"a","outputSchema":{"type":"array"},"x":1E400},{"name":"b","outputSchema":{"type":"object"}},{"name":"c","outputSchema":true,"execution":{"x":1}},{"name":"d","execution":{"taskSupport":"forbidden"}}],"ttlMs":1,"resultType":"complete"}`,
			`"result":{"tools":[{"name":"a","x":1E400,"execution":{"taskSupport":"optional"}},{"name":"b","outputSchema":{"type":"object"},"execution":{"taskSupport":"optional"}},{"name":"c","execution":{"x":1,"taskSupport":"optional"}},{"name":"d","execution":{"taskSupport":"forbidden"}}],"ttlMs":1,"resultType":"complete"}`},
		{"structured, said as text", "tools/call", "t", `"result":{"content":[{"type":"text","text":"[1E400]"}],"structuredContent":[1E400],"x":1}`,
			`"result":{"content":[{"type":"text","text":"[1E400]"}],"x":1}`},
		{"structured only", "tools/call", "t", `"result":{"structuredContent":[1E400,"\""],"content":[]}`,
			`"result":{"content":[{"type":"text","text":"[1E400,\"\\\"\"]"}]}`},
		{"structured alone", "tools/call", "t", `"result":{"structuredContent":7}`, `"result":{"content":[{"type":"text","text":"7"}]}`},
		{"structured object", "tools/call", "t", `"result":{"structuredContent":{"n":1E400},"resultType":"complete"}`, `"result":{"structuredContent":{"n":1E400},"resultType":"complete"}`},
		{"not there", "resources/read", "a:b", `"error":{"code":-32602,"message":"Resource not found"}`, `"error":{"code":-32002,"message":"Resource not found","data":{"uri":"a:b"}}`},
		{"not there, with data", "resources/read", "a:b", `"error":{"code":-32602,"message":"m","data":{"uri":"a:b","x":1}}`, `"error":{"code":-32002,"message":"m","data":{"uri":"a:b","x":1}}`},
		{"bad uri", "resources/read", "a:b", `"error":{"code":-32602,"message":"not a uri"}`, `"error":{"code":-32602,"message":"not a uri"}`},
		{"capability", "tools/call", "t", `"error":{"code":-32021,"message":"m","data":{"requiredCapabilities":{"sampling":{}}}}`, `"error":{"code":-32021,"message":"m","data":{"requiredCapabilities":{"sampling":{}}}}`},
		{"unheard of", "tools/call", "t", `"result":{"resultType":"unheard-of"}`, `"result":{"resultType":"unheard-of"}`},
		{"input where there is none", "tools/list", "", wants(`"requestState":"x"`), wants(`"requestState":"x"`)},
	} {
		t.Run(c.name, func(t *testing.T) {
			r := oldRig(t, &plainServer{call: inputsOf(c.answer)})
			params := map[string]string{"tools/list": "", "tools/call": `{"name":"t"}`, "resources/read": `{"uri":"a:b"}`}[c.method]
			e := r.old(c.method, c.tool, params)
			end := r.ends(e, "completed")
			if want := `{"jsonrpc":"2.0", "id":"` + string(e.Call) + `",` + c.want + `}`; string(end.Body) != want {
				t.Errorf("answered %s\nwant     %s", end.Body, want)
			}
			if code := end.Data.(*schemas.Completed).ErrorCode; (code != 0) != strings.Contains(c.want, fmt.Sprintf(`"code":%d,`, code)) {
				t.Errorf("code %d", code)
			}
		})
	}
}

// A server that misses a header has not carried out the call: it is asked which,
// once, and called again.
func TestOldClientHeaders(t *testing.T) {
	mismatch := `"error":{"code":-32020,"message":"Header mismatch"}`
	var lists, refusals int
	wantsHeader := true
	p := &plainServer{}
	p.call = func(w http.ResponseWriter, req *http.Request, m *jsonrpc.Message) {
		head := `{"jsonrpc":"2.0","id":` + string(m.ID().Raw()) + `,`
		switch {
		case m.Method() == "tools/list" && m.Params().Get("cursor").Exists():
			answerJSON(w, 200, head+`"result":{"tools":[{"name":"write","inputSchema":{"type":"object","properties":{"x":{"type":"string","x-mcp-header":"X"}}}}]}}`)
		case m.Method() == "tools/list":
			lists++
			answerJSON(w, 200, head+`"result":{"tools":[],"nextCursor":"2"}}`)
		case wantsHeader && req.Header.Get("Mcp-Param-X") != "v":
			refusals++
			answerJSON(w, 400, head+mismatch+`}`)
		default:
			answerJSON(w, 200, head+done+`}`)
		}
	}
	r := oldRig(t, p)
	for range 2 {
		end := r.ends(r.old("tools/call", "write", `{"name":"write","arguments":{"x":"v"}}`), "completed")
		if !strings.Contains(string(end.Body), "1E400") || !strings.Contains(string(end.Body), `"id":"`+string(end.Call)+`"`) {
			t.Errorf("answered %s", end.Body)
		}
	}
	if lists != 1 || refusals != 1 || len(r.log.of(schemas.KindStarted)) != 2 {
		t.Errorf("%d lists, %d refusals", lists, refusals)
	}
	// Of no use: it is not asked a second time.
	if end := r.ends(r.old("tools/call", "write", `{"name":"write","arguments":{"x":"other"}}`), "completed"); !strings.Contains(string(end.Body), "-32020") {
		t.Errorf("answered %s", end.Body)
	}
	if refusals != 2 {
		t.Errorf("%d refusals", refusals)
	}
}

// Resources that are subscribed to are those that the server is listened to for,
// and the one stream is there before the other is gone.
func TestOldClientSubscribes(t *testing.T) {
	p := &plainServer{}
	p.listen = func(w http.ResponseWriter, req *http.Request, m *jsonrpc.Message) {
		switch asked := string(m.Params().Get("notifications").Raw()); {
		case strings.Contains(asked, "bad:1"):
			answerJSON(w, 400, `{"jsonrpc":"2.0","id":`+string(m.ID().Raw())+`,"error":{"code":-32602,"message":"bad uri"}}`)
		case strings.Contains(asked, "deaf:1"):
			p.acknowledge(w, req, m, `{"toolsListChanged":true}`)
		default:
			p.acknowledge(w, req, m, asked)
		}
	}
	r := oldRig(t, p)
	r.ends(r.old("tools/list", "", ""), "completed")
	p.until("no stream", func() bool { return len(p.streams) == 1 })
	subscribe := func(method, uri, want string) {
		t.Helper()
		if end := r.ends(r.old(method, uri, `{"uri":"`+uri+`"}`), "completed"); !strings.Contains(string(end.Body), want) {
			t.Errorf("%s %s: %s", method, uri, end.Body)
		}
	}
	last := func(want string) {
		t.Helper()
		p.until("the other stream stays", func() bool { return len(p.streams) == 1 })
		got := p.of("subscriptions/listen")
		if !strings.Contains(got[len(got)-1], `{"notifications":`+want+`,"_meta":{`) {
			t.Errorf("listens %s\nwant %s", got[len(got)-1], want)
		}
	}
	subscribe("resources/subscribe", "b:1", `"result":{}`)
	last(`{"toolsListChanged":true,"resourceSubscriptions":["b:1"]}`)
	subscribe("resources/subscribe", "a:1", `"result":{}`)
	last(`{"toolsListChanged":true,"resourceSubscriptions":["a:1","b:1"]}`)
	before := len(p.of("subscriptions/listen"))
	subscribe("resources/subscribe", "a:1", `"result":{}`) // it is already
	if n := len(p.of("subscriptions/listen")); n != before {
		t.Error("a stream was opened in vain")
	}
	p.say(`{"jsonrpc":"2.0","method":"notifications/resources/updated","params":{"uri":"a:1","_meta":{"` + metaSubscription + `":"$ID"}}}`)
	if said := r.log.await(t, schemas.KindNotified, 1); string(said[0].Body) != `{"jsonrpc":"2.0","method":"notifications/resources/updated","params":{"uri":"a:1"}}` {
		t.Errorf("told %s", said[0].Body)
	}
	subscribe("resources/subscribe", "bad:1", "bad uri")
	subscribe("resources/subscribe", "deaf:1", "does not tell")
	subscribe("resources/subscribe", strings.Repeat("x", maxURI+1), "-32602")
	subscribe("resources/unsubscribe", "b:1", `"result":{}`)
	last(`{"toolsListChanged":true,"resourceSubscriptions":["a:1"]}`)

	// Another process knows what there was, and what was refused.
	r.ends(r.old("logging/setLevel", "", `{"level":"error"}`), "completed")
	r.ends(r.old("logging/setLevel", "", `{"level":"warning"}`), "completed")
	r.ends(r.old("logging/setLevel", "", `{"level":"loud"}`), "completed")
	r.d.Close()
	p.until("the stream outlives its process", func() bool { return len(p.streams) == 0 })
	r.d = r.fresh()
	quick(r.d)
	r.ends(r.old("prompts/get", "p", `{"name":"p"}`), "completed")
	if got := p.of("prompts/get"); !strings.Contains(got[0], `logLevel":"warning"`) {
		t.Errorf("sent %s", got)
	}
	p.until("no stream", func() bool { return len(p.streams) == 1 })
	last(`{"toolsListChanged":true,"resourceSubscriptions":["a:1"]}`)
	subscribe("resources/unsubscribe", "a:1", `"result":{}`)
	last(`{"toolsListChanged":true}`)
}

// What is said while one stream takes the place of another is told, be it on
// the one, the other, or both; what comes on both after the change, once.
func TestOldClientOverlap(t *testing.T) {
	p := &plainServer{}
	r := oldRig(t, p)
	r.d.sessions.timing.overlap = 2 * time.Second
	r.ends(r.old("tools/list", "", ""), "completed")
	p.until("no stream", func() bool { return len(p.streams) == 1 })
	update := func(uri string) string {
		return `{"jsonrpc":"2.0","method":"notifications/resources/updated","params":{"uri":"` + uri + `","_meta":{"` + metaSubscription + `":"$ID"}}}`
	}
	p.mu.Lock()
	p.listen = func(w http.ResponseWriter, req *http.Request, m *jsonrpc.Message) {
		p.say(update("before:1"))
		p.acknowledge(w, req, m, string(m.Params().Get("notifications").Raw()))
	}
	p.mu.Unlock()
	r.ends(r.old("resources/subscribe", "a:1", `{"uri":"a:1"}`), "completed")
	s := r.d.sessions.of[sessionID{"acme", "s1"}]["s"]
	p.until("the other is not there", func() bool { return len(p.streams) == 2 })
	p.say(update("both:1")) // the streams have changed: the answer says so
	p.until("the first stays", func() bool { return len(p.streams) == 1 })
	p.say(update("after:1"))
	told := map[string]int{}
	for n := 3; !strings.Contains(fmt.Sprint(told), "after:1"); n++ {
		clear(told)
		for _, e := range r.log.await(t, schemas.KindNotified, n) {
			told[string(e.Body)]++
		}
	}
	for _, uri := range []string{"before:1", "both:1", "after:1"} {
		if n := told[`{"jsonrpc":"2.0","method":"notifications/resources/updated","params":{"uri":"`+uri+`"}}`]; n != 1 {
			t.Errorf("%s was told %d times: %v", uri, n, told)
		}
	}
	r.d.Close()
	if s.solo.overlaps != 0 || s.solo.fresh != nil {
		t.Errorf("left: %+v", s.solo)
	}
}

// Of several processes one has the session, whoever is given its calls; when it
// is gone another goes on with all that the client has set.
func TestOldClientReplicas(t *testing.T) {
	p := &plainServer{t: t}
	r := newReplicas(t, p.ServeHTTP, func(o *Options) { o.Servers[0].Era = EraModern })
	t.Cleanup(r.http.CloseClientConnections)
	r.open("s1")
	give := func(d *Dispatcher, method, name, params string) {
		t.Helper()
		e := r.method(method, name, `{"jsonrpc":"2.0", "id": 1,"method":"`+method+`","params":`+params+`}`, inSession("s1"))
		r.handled(r.give(d, e))
		if end := r.ends(e, "completed"); end.Data.(*schemas.Completed).ErrorCode != 0 {
			t.Errorf("%s: %s", method, end.Body)
		}
	}
	sent := func(method, want string) {
		t.Helper()
		if got := p.of(method); len(got) == 0 || !strings.Contains(got[len(got)-1], want) {
			t.Errorf("%s: sent %s, want %s", method, got, want)
		}
	}
	give(r.a, "initialize", "", `{"protocolVersion":"2025-11-25","capabilities":{},"clientInfo":{"name":"c","version":"1"}}`)
	give(r.b, "logging/setLevel", "", `{"level":"error"}`)
	give(r.a, "prompts/get", "p", `{"name":"p"}`)
	sent("prompts/get", `logLevel":"error"`)
	give(r.b, "resources/subscribe", "a:1", `{"uri":"a:1"}`)
	give(r.a, "logging/setLevel", "", `{"level":"info"}`)
	give(r.b, "prompts/get", "p", `{"name":"p"}`)
	sent("prompts/get", `logLevel":"info"`)
	p.until("not one stream", func() bool { return len(p.streams) == 1 })
	// As if the machine that a is on were cut off: it stops first.
	r.ledger.lapse("a")
	r.a.Lapsed()
	p.until("it goes on", func() bool { return len(p.streams) == 0 })
	// It was a short while: nobody has taken it over, and a goes on.
	r.ledger.lapse("")
	r.a.Regained()
	p.until("a does not listen again", func() bool { return len(p.streams) == 1 })
	r.ledger.lapse("a")
	r.a.Lapsed()
	p.until("it goes on", func() bool { return len(p.streams) == 0 })
	r.ledger.die("a")
	r.b.Died(t.Context(), "a")
	p.until("nobody listens", func() bool { return len(p.streams) == 1 })
	sent("subscriptions/listen", `"resourceSubscriptions":["a:1"]`)
	p.say(`{"jsonrpc":"2.0","method":"notifications/resources/updated","params":{"uri":"a:1","_meta":{"` + metaSubscription + `":"$ID"}}}`)
	r.log.await(t, schemas.KindNotified, 1)
	give(r.b, "prompts/get", "p", `{"name":"p"}`)
	sent("prompts/get", `logLevel":"info"`)
	closed := r.log.add(schemas.Event{Tenant: "acme", Session: "s1", Agent: "a1", Data: &schemas.Closed{}})
	if err := r.b.Hear(t.Context(), closed, r.emit); err != nil {
		t.Fatal(err)
	}
	p.until("the stream outlives the session", func() bool { return len(p.streams) == 0 })
}

// A server that offers nothing is not listened to until something is wanted, and
// one that cannot be is left in peace.
func TestOldClientDeaf(t *testing.T) {
	p := &plainServer{discover: `{"supportedVersions":["2026-07-28"],"capabilities":{}}`}
	r := oldRig(t, p)
	e := r.method("initialize", "", initialize, inSession("s1"))
	r.handle(e)
	r.ends(e, "completed")
	r.ends(r.note("notifications/initialized"), "completed")
	r.ends(r.old("resources/subscribe", "a:1", `{"uri":"a:1"}`), "completed")
	p.until("no stream", func() bool { return len(p.streams) == 1 })
	r.ends(r.old("resources/unsubscribe", "a:1", `{"uri":"a:1"}`), "completed")
	p.until("the stream stays", func() bool { return len(p.streams) == 0 })
	p.mu.Lock()
	p.listen = func(w http.ResponseWriter, _ *http.Request, m *jsonrpc.Message) {
		answerJSON(w, 404, `{"jsonrpc":"2.0","id":`+string(m.ID().Raw())+`,"error":{"code":-32601,"message":"Method not found"}}`)
	}
	p.mu.Unlock()
	if end := r.ends(r.old("resources/subscribe", "a:1", `{"uri":"a:1"}`), "completed"); !strings.Contains(string(end.Body), "-32601") {
		t.Errorf("answered %s", end.Body)
	}
	if n := len(p.of("subscriptions/listen")); n > 3 {
		t.Errorf("listened %d times", n)
	}
}

// A server that becomes one of the other era is spoken to as such once that is
// found out, in sessions that go on, with what the client has set in them.
func TestOldClientEraChanges(t *testing.T) {
	p, l := &plainServer{t: t}, &legacyServer{}
	var mu sync.Mutex
	var now http.Handler = l
	become := func(h http.Handler) { mu.Lock(); now = h; mu.Unlock() }
	r := newRig(t, func(w http.ResponseWriter, req *http.Request) {
		mu.Lock()
		h := now
		mu.Unlock()
		if h == p && (req.Method != http.MethodPost || req.Header.Get("Mcp-Protocol-Version") != mcpRevision) {
			_, _ = io.Copy(io.Discard, req.Body)
			answerJSON(w, 400, `{"jsonrpc":"2.0","id":null,"error":{"code":-32022,"message":"m","data":{"supported":["2026-07-28"]}}}`)
			return
		}
		h.ServeHTTP(w, req)
	}, func(o *Options) { o.Servers[0].Era = EraAuto })
	r.open("s1")
	quick(r.d)
	t.Cleanup(r.http.CloseClientConnections)
	r.ends(r.old("resources/subscribe", "a:1", `{"uri":"a:1"}`), "completed")
	r.ends(r.old("logging/setLevel", "", `{"level":"error"}`), "completed")
	if l.came("resources/subscribe") != 1 {
		t.Fatal(l.log)
	}
	for i, h := range []http.Handler{p, l, p} {
		become(h)
		r.http.CloseClientConnections()
		late := time.Now().Add(20 * time.Second)
		for { // until the probe has said so
			e := r.old("tools/list", "", "")
			if got, end := r.outcomeOf(e); got == "completed" && strings.Contains(string(end.Body), "1E400") {
				break
			}
			if time.Now().After(late) {
				t.Fatalf("%d: still in the other era", i)
			}
			if err := r.d.upstreams["s"].mcp.settled(t.Context()); err != nil {
				t.Fatal(err)
			}
		}
		switch h {
		case p:
			p.until("not listened to", func() bool { return len(p.streams) == 1 })
			if got := p.of("subscriptions/listen"); !strings.Contains(got[len(got)-1], `"resourceSubscriptions":["a:1"]`) {
				t.Errorf("listens %s", got)
			}
			if got := p.of("tools/list"); !strings.Contains(got[len(got)-1], `logLevel":"error"`) {
				t.Errorf("sent %s", got)
			}
		case l:
			if l.came("resources/subscribe") < 2 || l.came("logging/setLevel") < 2 {
				t.Errorf("not restored: %v", l.log)
			}
		}
	}
}

// settled waits for a probe that is under way.
func (m *mcpServer) settled(ctx context.Context) error {
	m.eras.mu.Lock()
	probing := m.eras.probing
	m.eras.mu.Unlock()
	if probing == nil {
		return nil
	}
	select {
	case <-probing:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}
