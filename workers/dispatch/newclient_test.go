package dispatch

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"waybill.dev/schemas"
	"waybill.dev/schemas/jsonrpc"
)

// host is a server with sessions whose tools ask: what a client without any gets
// to see of it is the gateway's doing.
type host struct {
	legacyServer
	caps  string                         // of initialize
	tools func(*visit, *jsonrpc.Message) // nil: an empty result

	mu      sync.Mutex
	answers map[string]chan string // to what was asked, by id
	out     chan string            // the session's stream; nil: 405
}

// visit is one request to a host.
type visit struct {
	h *host
	w http.ResponseWriter
	r *http.Request
	m *jsonrpc.Message
}

func (v *visit) say(text string) { say(v.w, "data: %s", text) }

func (v *visit) end(result string) {
	v.say(string(jsonrpc.ResultResponse(v.m.ID().Raw(), []byte(result))))
}

// wait is the answer to what was asked; "" if the caller has left.
func (v *visit) wait(id string) string {
	select {
	case a := <-v.h.answer(id):
		return a
	case <-v.r.Context().Done():
		return ""
	}
}

func (h *host) answer(id string) chan string {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.answers == nil {
		h.answers = map[string]chan string{}
	}
	if h.answers[id] == nil {
		h.answers[id] = make(chan string, 1)
	}
	return h.answers[id]
}

func (h *host) ServeHTTP(w http.ResponseWriter, req *http.Request) {
	if req.Method == http.MethodPost {
		b, _ := io.ReadAll(req.Body)
		req.Body = io.NopCloser(bytes.NewReader(b))
		if m, err := jsonrpc.Decode(b, jsonrpc.Limits{Depth: 512}); err == nil && m.IsResponse() {
			select {
			case h.answer(string(m.ID().Raw())) <- string(b):
			case <-req.Context().Done():
			}
		}
	}
	h.legacyServer.ServeHTTP(w, req)
}

const whoQuestion = `{"jsonrpc":"2.0","id":7,"method":"elicitation/create","params":{"message":"Who?","requestedSchema":{"type":"object","x":1E400}}}`

func newHost(t testing.TB, h *host, change ...func(*Options)) *rig {
	if h.caps == "" {
		h.caps = `{"logging":{},"tools":{"listChanged":true},"resources":{"subscribe":true,"listChanged":true},"tasks":{"list":{}},"x":1E400}`
	}
	h.init = func(w http.ResponseWriter, m *jsonrpc.Message) bool {
		h.legacyServer.mu.Lock()
		h.opened++
		id := fmt.Sprintf("up-%d", h.opened)
		h.live[id] = true
		h.legacyServer.mu.Unlock()
		w.Header().Set("Mcp-Session-Id", id)
		answerJSON(w, 200, `{"jsonrpc":"2.0","id":`+string(m.ID().Raw())+`,"result":{"protocolVersion":"2025-11-25","capabilities":`+h.caps+
			`,"serverInfo":{"name":"host","version":"1"},"instructions":"Ask.","vendor":[1E400]}}`)
		return true
	}
	h.call = func(w http.ResponseWriter, req *http.Request, m *jsonrpc.Message) {
		if h.tools == nil || !mayAsk[m.Method()] && m.Method() != "x/y" && lists[m.Method()].array == "" {
			answerJSON(w, 200, string(jsonrpc.ResultResponse(m.ID().Raw(), nil)))
			return
		}
		sseHead(w)
		h.tools(&visit{h, w, req, m}, m)
	}
	if h.out != nil {
		h.get = func(w http.ResponseWriter, req *http.Request) {
			sseHead(w)
			say(w, ": open")
			for {
				select {
				case text := <-h.out:
					say(w, "data: %s", text)
				case <-req.Context().Done():
					return
				}
			}
		}
	}
	r := newRig(t, h.ServeHTTP, append([]func(*Options){func(o *Options) { o.Servers[0].Era = EraLegacy }}, change...)...)
	quick(r.d)
	r.d.sessions.timing.gather = 20 * time.Millisecond
	t.Cleanup(r.http.CloseClientConnections)
	return r
}

const allCaps = `{"elicitation":{"form":{},"url":{}},"sampling":{},"roots":{}}`

// modern makes a call of a client with these capabilities; more are members of
// the params, each with a comma in front.
func (r *rig) modern(method, name, caps, more string, change ...func(*schemas.Event)) schemas.Event {
	at := ""
	if member := mcpNames[method].member; member != "" {
		at = `"` + member + `":"` + name + `",`
	}
	return r.method(method, name, `{"jsonrpc":"2.0", "id": 1,"method":"`+method+`","params":{`+at+
		`"_meta":{"io.modelcontextprotocol/protocolVersion":"2026-07-28","io.modelcontextprotocol/clientCapabilities":`+caps+
		`,"io.modelcontextprotocol/clientInfo":{"name":"c","version":"2"}`+more+`}`, change...) // more closes _meta
}

// answered runs a call to its end.
func (r *rig) answered(e schemas.Event) (*schemas.Completed, jsonrpc.Value) {
	r.t.Helper()
	r.handle(e)
	end := r.ends(e, "completed")
	m, err := jsonrpc.Decode(end.Body, jsonrpc.Limits{Depth: 512, AllowCaseVariants: true})
	if err != nil {
		r.t.Fatal(err)
	}
	if id, _ := m.ID().Text(); id != string(e.Call) && !e.Data.(*schemas.Authorized).OneWay {
		r.t.Fatalf("the answer of %s: %s", e.Call, end.Body)
	}
	return end.Data.(*schemas.Completed), m.Root()
}

// oneWay is a notification of a client without sessions.
func (r *rig) oneWay(method string) schemas.Event {
	return r.method(method, "", `{"jsonrpc":"2.0","method":"`+method+`","params":{"_meta":{"io.modelcontextprotocol/protocolVersion":"2026-07-28"}}}`,
		authorized(func(a *schemas.Authorized) { a.OneWay = true }))
}

// stateOf is what an answer that asks gives out, and its questions.
func (r *rig) stateOf(v jsonrpc.Value) (state string, keys []string) {
	r.t.Helper()
	kind, _ := v.Get("result", "resultType").Text()
	state, ok := v.Get("result", "requestState").Text()
	if kind != inputRequired || !ok {
		r.t.Fatalf("it does not ask: %s", v.Raw())
	}
	for key := range v.Get("result", "inputRequests").Members() {
		keys = append(keys, key)
	}
	return state, keys
}

// retry is what a call comes back with, as further params.
func retry(state string, responses ...string) string {
	return `},"inputResponses":{` + strings.Join(responses, ",") + `},"requestState":` + string(jsonrpc.Quote(state)) + `}`
}

const accept = `{"action":"accept","content":{"name":"Ada","n":1E400}}`

// What goes to the server and what comes back, member by member.
func TestNewClientTranslates(t *testing.T) {
	leaks(t)
	h := &host{tools: func(v *visit, m *jsonrpc.Message) { v.end(`{"content":[],"n":1E400,"_meta":{"k":1}}`) }}
	r := newHost(t, h)
	e := r.modern("tools/call", "t", allCaps, `,"progressToken":9007199254740993,"vendor/k":[1E400]},"arguments":{"x": 1E400},"zz":null,"inputResponses":{}}`)
	done, v := r.answered(e)
	if got, want := string(v.Get("result").Raw()), `{"content":[],"n":1E400,"_meta":{"k":1,"io.modelcontextprotocol/serverInfo":{"name":"host","version":"1"}},"resultType":"complete"}`; got != want || done.Result != "" {
		t.Errorf("answer %s\nwant   %s (%+v)", got, want, done)
	}
	body := strings.Replace(string(e.Body), `"id": 1`, `"id": "`+string(e.Call)+`"`, 1)
	for _, gone := range []string{`"io.modelcontextprotocol/protocolVersion":"2026-07-28",`, `"io.modelcontextprotocol/clientCapabilities":` + allCaps + `,`, `"io.modelcontextprotocol/clientInfo":{"name":"c","version":"2"},`} {
		body = strings.Replace(body, gone, "", 1)
	}
	if got := h.body("tools/call"); got != body {
		t.Errorf("sent %s\nwant %s", got, body)
	}
	if got := h.body("initialize"); !strings.Contains(got, `"params":{"protocolVersion":"2025-11-25","capabilities":`+allCaps+`,"clientInfo":{"name":"c","version":"2"}}`) {
		t.Errorf("opened with %s", got)
	}
	if c := r.log.of(schemas.KindConnected); len(c) != 1 || c[0].Session != e.Session || c[0].Data.(*schemas.Connected).Upstream != "up-1" {
		t.Errorf("connected %v", c)
	}

	// Without anything else in it _meta goes; who says something else of itself
	// has another session, who says the same has the same.
	_, _ = r.answered(r.modern("tools/list", "", allCaps, `}}`))
	if got := h.body("tools/list"); !strings.HasSuffix(got, `"params":{}}`) {
		t.Errorf("sent %s", got)
	}
	_, _ = r.answered(r.modern("tools/list", "", `{}`, `}}`))
	if h.came("initialize") != 2 || h.came("notifications/initialized") != 2 {
		t.Errorf("%v", h.log)
	}

	_, v = r.answered(r.modern("server/discover", "", allCaps, `}}`))
	want := `{"capabilities":{"logging":{},"tools":{"listChanged":true},"resources":{"subscribe":true,"listChanged":true},"x":1E400},"instructions":"Ask.","vendor":[1E400],` +
		`"supportedVersions":["2026-07-28"],"resultType":"complete","ttlMs":0,"cacheScope":"private","_meta":{"io.modelcontextprotocol/serverInfo":{"name":"host","version":"1"}}}`
	if got := string(v.Get("result").Raw()); got != want || h.came("server/discover") != 0 {
		t.Errorf("discover %s\nwant     %s", got, want)
	}
	r.d.Close()
	if h.came("DELETE") != 2 {
		t.Errorf("at the end: %v", h.log)
	}
}

// What the revision does not have does not go to the server, and what it does not
// know does.
func TestNewClientMethods(t *testing.T) {
	h := &host{tools: func(v *visit, m *jsonrpc.Message) { v.end(`{}`) }}
	r := newHost(t, h)
	for method := range bygone {
		if done, v := r.answered(r.modern(method, "", allCaps, `}}`)); done.Status != 404 || done.ErrorCode != -32601 || !v.Get("error").Exists() {
			t.Errorf("%s: %+v %s", method, done, v.Raw())
		}
	}
	if done, _ := r.answered(r.modern("tools/list", "", allCaps, `,"io.modelcontextprotocol/logLevel":"loud"}}`)); done.ErrorCode != -32602 {
		t.Errorf("%+v", done)
	}
	if len(h.log) != 0 {
		t.Errorf("the server heard %v", h.log)
	}
	r.answered(r.modern("x/y", "", allCaps, `}}`))
	if h.came("x/y") != 1 {
		t.Errorf("%v", h.log)
	}
	// A server says of an unknown method only that it does not like the request.
	h.call = func(w http.ResponseWriter, _ *http.Request, _ *jsonrpc.Message) { http.Error(w, "unsupported", 400) }
	if done, _ := r.answered(r.modern("x/z", "", allCaps, `}}`)); done.ErrorCode != -32601 {
		t.Errorf("%+v", done)
	}
	e := r.modern("tools/list", "", allCaps, `}}`)
	r.handle(e)
	r.ends(e, "bad_answer")

	// One-way messages go to the session that there is.
	for _, method := range []string{"notifications/roots/list_changed", "notifications/cancelled", "notifications/x"} {
		e := r.oneWay(method)
		r.handle(e)
		r.ends(e, "completed")
	}
	if h.came("notifications/roots/list_changed") != 1 || h.came("notifications/cancelled") != 0 || h.came("notifications/x") != 1 {
		t.Errorf("%v", h.log)
	}
}

// Errors that the revision does not have.
func TestNewClientErrors(t *testing.T) {
	answer := ""
	h := &host{tools: func(v *visit, m *jsonrpc.Message) {
		v.say(`{"jsonrpc":"2.0","id":` + string(m.ID().Raw()) + `,` + answer + `}`)
	}}
	r := newHost(t, h)
	answer = `"error":{"code":-32002,"message":"Resource not found","data":{"uri":"u"}}`
	if done, v := r.answered(r.modern("resources/read", "u", allCaps, `}}`)); done.ErrorCode != -32602 || string(v.Get("error").Raw()) != `{"code":-32602,"message":"Resource not found","data":{"uri":"u"}}` {
		t.Errorf("%+v %s", done, v.Raw())
	}
	answer = `"error":{"code":-32042,"message":"m","data":{"elicitations":[{"mode":"url","url":"https://e.example/","elicitationId":"e1","message":"Go"}]}}`
	done, v := r.answered(r.modern("tools/call", "t", allCaps, `}}`))
	state, keys := r.stateOf(v)
	if q := v.Get("result", "inputRequests", keys[0]); done.Result != inputRequired || done.ErrorCode != 0 || string(q.Get("params", "elicitationId").Raw()) != `"e1"` {
		t.Errorf("%+v %s", done, v.Raw())
	}
	answer = `"result":{"content":[]}`
	if done, _ := r.answered(r.modern("tools/call", "t", allCaps, retry(state, `"elicitation/create-1":{"action":"accept"}`))); done.ErrorCode != 0 {
		t.Errorf("%+v", done)
	}
	if got := h.body("tools/call"); strings.Contains(got, "requestState") || strings.Contains(got, "inputResponses") {
		t.Errorf("sent %s", got)
	}
	answer = `"error":{"code":-32042,"message":"m","data":{"elicitations":[]}}`
	if done, v := r.answered(r.modern("tools/call", "t", `{"elicitation":{}}`, `}}`)); done.ErrorCode != -32021 || done.Status != 400 || !v.Get("error", "data", "requiredCapabilities", "elicitation", "url").Exists() {
		t.Errorf("%+v %s", done, v.Raw())
	}

	// A server of these revisions that asks as one of the later ones does.
	answer = `"result":{"resultType":"input_required","inputRequests":{"k":{"method":"roots/list"}},"requestState":"its own"}`
	_, v = r.answered(r.modern("tools/call", "t", allCaps, `}}`))
	state, keys = r.stateOf(v)
	if state == "its own" || !slices.Equal(keys, []string{"k"}) {
		t.Errorf("%s", v.Raw())
	}
	answer = `"result":{}`
	r.answered(r.modern("tools/call", "t", allCaps, retry(state, `"k":{"roots":[]}`)))
	if got := h.body("tools/call"); !strings.Contains(got, `"requestState":"its own"`) || !strings.Contains(got, `"inputResponses":{"k":{"roots":[]}}`) {
		t.Errorf("sent %s", got)
	}
}

// A call that asks, comes back, asks again, and ends.
func TestParked(t *testing.T) {
	leaks(t)
	h := &host{tools: func(v *visit, m *jsonrpc.Message) {
		v.say(`{"jsonrpc":"2.0","method":"notifications/progress","params":{"progress":1}}`)
		v.say(whoQuestion)
		v.say(`{"jsonrpc":"2.0","id":"r","method":"roots/list"}`)
		first, second := v.wait("7"), v.wait(`"r"`)
		v.say(`{"jsonrpc":"2.0","method":"notifications/progress","params":{"progress":2}}`)
		v.say(`{"jsonrpc":"2.0","id":8,"method":"sampling/createMessage","params":{"maxTokens":1}}`)
		v.end(`{"heard":[` + first + `,` + second + `,` + v.wait("8") + `]}`)
	}}
	r := newHost(t, h)
	done, v := r.answered(r.modern("tools/call", "t", allCaps, `},"arguments":{"a":1,"b":"é"}}`))
	state, keys := r.stateOf(v)
	if len(keys) != 2 || done.Result != inputRequired || done.Chunks != 1 ||
		string(v.Get("result", "inputRequests", "elicitation/create-1").Raw()) != `{"method":"elicitation/create","params":{"message":"Who?","requestedSchema":{"type":"object","x":1E400}}}` ||
		string(v.Get("result", "inputRequests", "roots/list-2").Raw()) != `{"method":"roots/list","params":{}}` {
		t.Fatalf("%+v %s", done, v.Raw())
	}
	// The arguments are the same, however they are written.
	same := `},"arguments":{"b":"\u00e9", "a":1}` + strings.TrimPrefix(retry(state, `"elicitation/create-1":`+accept, `"roots/list-2":{"roots":[]}`, `"more":1`), "}")
	done, v = r.answered(r.modern("tools/call", "t", allCaps, same))
	next, keys := r.stateOf(v)
	if !slices.Equal(keys, []string{"sampling/createMessage-3"}) || done.Chunks != 1 || next == state {
		t.Fatalf("%+v %s", done, v.Raw())
	}
	// Nothing was answered: the same is asked once more, and either state is good.
	again := func(s string, responses ...string) (*schemas.Completed, jsonrpc.Value) {
		return r.answered(r.modern("tools/call", "t", allCaps, `},"arguments":{"a":1,"b":"é"}`+strings.TrimPrefix(retry(s, responses...), "}")))
	}
	_, v = again(next, `"wrong":{}`)
	if _, keys := r.stateOf(v); !slices.Equal(keys, []string{"sampling/createMessage-3"}) {
		t.Errorf("%s", v.Raw())
	}
	if done, _ := again(next, `"sampling/createMessage-3":12345`); done.ErrorCode != -32602 {
		t.Errorf("%+v", done)
	}
	// What was used cannot be used again.
	if done, v := again(state, `"elicitation/create-1":`+accept, `"roots/list-2":{"roots":[]}`); done.ErrorCode != -32602 || !strings.Contains(string(v.Raw()), "has been used") {
		t.Errorf("%+v %s", done, v.Raw())
	}
	done, v = again(next, `"sampling/createMessage-3":{"role":"assistant"}`)
	want := `[{"jsonrpc":"2.0","id":7,"result":` + accept + `},{"jsonrpc":"2.0","id":"r","result":{"roots":[]}},{"jsonrpc":"2.0","id":8,"result":{"role":"assistant"}}]`
	if string(v.Get("result", "heard").Raw()) != want || done.Result != "" {
		t.Errorf("%+v %s", done, v.Raw())
	}
	if done, v := again(next, `"sampling/createMessage-3":{"role":"assistant"}`); done.ErrorCode != -32602 || !strings.Contains(string(v.Raw()), "unknown") {
		t.Errorf("%+v %s", done, v.Raw())
	}
	if h.came("tools/call") != 1 || h.came("notifications/cancelled") != 0 {
		t.Errorf("%v", h.log)
	}
	empty(t, r)
}

// empty checks that nothing is kept of exchanges that have ended.
func empty(t *testing.T, r *rig) {
	t.Helper()
	m := r.d.upstreams["s"].mcp
	for end := time.Now().Add(10 * time.Second); ; runtime.Gosched() {
		m.parking.mu.Lock()
		n, bytes, tenants := len(m.parking.of), m.parking.bytes, len(m.parking.tenants)
		m.parking.mu.Unlock()
		for _, s := range m.sessions.visited(m, sessionID{"acme", "s1"}) {
			s.guest.mu.Lock()
			n += len(s.guest.errands) + s.guest.busy + len(s.guest.subs) + len(s.guest.uris)
			s.guest.mu.Unlock()
		}
		if n+bytes+tenants == 0 {
			return
		}
		if time.Now().After(end) {
			t.Fatalf("%d things and %d bytes of %d tenants are left", n, bytes, tenants)
		}
	}
}

// A requestState in the wrong hands, or changed, or late.
func TestRequestState(t *testing.T) {
	h := &host{tools: func(v *visit, m *jsonrpc.Message) {
		v.say(whoQuestion)
		v.end(`{"heard":` + v.wait("7") + `}`)
	}}
	now := time.Now()
	var mu sync.Mutex
	clock := func() time.Time { mu.Lock(); defer mu.Unlock(); return now }
	key := bytes.Repeat([]byte{1}, 32)
	r := newHost(t, h, func(o *Options) { o.Now, o.StateKey = clock, key })
	_, v := r.answered(r.modern("tools/call", "t", allCaps, `},"arguments":{"a":[1,{"b":2}]}}`))
	state, _ := r.stateOf(v)
	const yes = `"elicitation/create-1":` + accept
	come := func(e schemas.Event) string {
		t.Helper()
		done, v := r.answered(e)
		if done.ErrorCode != -32602 || done.Status != 400 || done.Attempts != 0 {
			t.Errorf("%+v %s", done, v.Raw())
		}
		text, _ := v.Get("error", "message").Text()
		return text
	}
	with := func(method, tool, arguments, state string, change ...func(*schemas.Event)) schemas.Event {
		return r.modern(method, tool, allCaps, `},"arguments":`+arguments+strings.TrimPrefix(retry(state, yes), "}"), change...)
	}
	const right = `{"a":[1,{"b":2}]}`
	m := r.d.upstreams["s"].mcp
	b := binding{"acme", "a1", "s", [32]byte{}}
	if msg, err := jsonrpc.Decode(with("tools/call", "t", right, state).Body, jsonrpc.Limits{}); err != nil {
		t.Fatal(err)
	} else {
		b.digest = requestDigest(msg)
	}
	if _, err := m.parking.open(state, b, clock()); err != nil {
		t.Fatal(err)
	}
	// Every byte.
	for i := range state {
		for _, c := range []byte{state[i] ^ 1, 'A', '_', '=', 0} {
			if c == state[i] {
				continue
			}
			changed := state[:i] + string(c) + state[i+1:]
			if st, err := m.parking.open(changed, b, clock()); err == nil {
				t.Fatalf("byte %d as %q: %+v", i, c, st)
			}
		}
		if _, err := m.parking.open(state[:i], b, clock()); err == nil {
			t.Fatalf("%d bytes are enough", i)
		}
	}
	garbage := come(with("tools/call", "t", right, "garbage"))
	for what, e := range map[string]schemas.Event{
		"tampered":        with("tools/call", "t", right, state+"-TAMPERED"),
		"empty":           with("tools/call", "t", right, ""),
		"another tool":    with("tools/call", "u", right, state),
		"other arguments": with("tools/call", "t", `{"a":[1,{"b":3}]}`, state),
		"another order":   with("tools/call", "t", `{"a":[{"b":2},1]}`, state),
		"another method":  with("prompts/get", "t", right, state),
		"another agent":   with("tools/call", "t", right, state, func(e *schemas.Event) { e.Agent = "a2" }),
		"another tenant":  with("tools/call", "t", right, state, func(e *schemas.Event) { e.Tenant = "b" }),
	} {
		if got := come(e); got != garbage {
			t.Errorf("%s: %q, garbage: %q", what, got, garbage)
		}
	}
	if done, _ := r.answered(r.modern("tools/call", "t", allCaps, `},"arguments":`+right+`,"requestState":7}`)); done.ErrorCode != -32602 {
		t.Errorf("%+v", done)
	}
	if done, _ := r.answered(r.modern("tools/call", "t", allCaps, `},"arguments":`+right+`,"inputResponses":[],"requestState":"`+state+`"}`)); done.ErrorCode != -32602 {
		t.Errorf("%+v", done)
	}
	// Too late.
	mu.Lock()
	now = now.Add(10 * time.Minute)
	mu.Unlock()
	if got := come(with("tools/call", "t", right, state, authorized(func(a *schemas.Authorized) { a.Deadline = time.Time{} }))); !strings.Contains(got, "expired") {
		t.Errorf("late: %q", got)
	}
	mu.Lock()
	now = now.Add(-10 * time.Minute)
	mu.Unlock()
	// Another process with the same key knows that it was its like; one with
	// another knows nothing.
	before := r.d
	r.d = r.fresh()
	if got := come(with("tools/call", "t", right, state)); !strings.Contains(got, "does not hold the call any more") {
		t.Errorf("after a restart: %q", got)
	}
	r.opt.StateKey = bytes.Repeat([]byte{2}, 32)
	r.d = r.fresh()
	if got := come(with("tools/call", "t", right, state)); got != garbage {
		t.Errorf("with another key: %q", got)
	}
	r.d = before
	if h.came("tools/call") != 1 || h.came("response") != 0 || h.came("prompts/get") != 0 {
		t.Errorf("the server heard %v", h.log)
	}
	if done, v := r.answered(with("tools/call", "t", right, state)); done.ErrorCode != 0 || !strings.Contains(string(v.Raw()), "Ada") {
		t.Errorf("%+v %s", done, v.Raw())
	}
	r.opt.StateKey = []byte("short")
	if _, err := New(r.opt); err == nil {
		t.Error("a short key")
	}
}

func FuzzRequestState(f *testing.F) {
	s, err := newSealer(nil) // another in each process: what one sealed is garbage to the others
	if err != nil {
		f.Fatal(err)
	}
	own := binding{tenant: "acme", agent: "a1", server: "s"}
	text, err := s.seal(state{Owner: "o", ID: "i", Round: 1, Expires: time.Now().Add(time.Hour)}, own)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(text, `{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{"name":"t","arguments":{"a":[1,{"b":"c"}]}}}`)
	f.Add("wb1.", `{"jsonrpc":"2.0","id":1,"method":"m"}`)
	f.Fuzz(func(t *testing.T, got, request string) {
		st, err := s.open(got, own, time.Now())
		if err == nil && (got != text || st.ID != "i") {
			t.Fatalf("%q opens: %+v", got, st)
		}
		m, err := jsonrpc.Decode([]byte(request), jsonrpc.Limits{})
		if err != nil || !m.IsRequest() {
			return
		}
		b := own
		b.digest = requestDigest(m)
		if sealed, err := s.seal(state{ID: got, Expires: time.Now().Add(time.Hour)}, b); err == nil && len(got) < maxServerState {
			if st, err := s.open(sealed, b, time.Now()); err != nil || strings.ToValidUTF8(got, "") == got && st.ID != got {
				t.Fatalf("%q: %+v, %v", got, st, err)
			}
			if _, err := s.open(sealed, own, time.Now()); err == nil {
				t.Fatal("it opens for another request")
			}
		}
	})
}

// What the client has not declared it is not asked, nor what it cannot be.
func TestNewClientDeclines(t *testing.T) {
	h := &host{tools: func(v *visit, m *jsonrpc.Message) {
		var heard []string
		for i, method := range []string{"elicitation/create", "roots/list", "tasks/get", "ping"} {
			id := fmt.Sprint(100 + i)
			v.say(`{"jsonrpc":"2.0","id":` + id + `,"method":"` + method + `"}`)
			heard = append(heard, v.wait(id))
		}
		v.end(`{"heard":[` + strings.Join(heard, ",") + `]}`)
	}}
	r := newHost(t, h)
	_, v := r.answered(r.modern("tools/call", "t", `{"sampling":{}}`, `}}`))
	got := string(v.Get("result", "heard").Raw())
	if strings.Count(got, "-32601") != 3 || strings.Count(got, `"result":{}`) != 1 {
		t.Errorf("%s", got)
	}
}

// A call taken back while it is attached is taken back at the server; one for
// which nobody comes back is so after its time.
func TestParkedCancelled(t *testing.T) {
	leaks(t)
	asked := make(chan struct{}, 8)
	h := &host{tools: func(v *visit, m *jsonrpc.Message) {
		if name, _ := m.Params().Get("name").Text(); name == "ask" {
			v.say(whoQuestion)
		}
		asked <- struct{}{}
		<-v.r.Context().Done()
	}}
	r := newHost(t, h)
	r.d.sessions.timing.park = time.Millisecond
	e := r.modern("tools/call", "wait", allCaps, `}}`)
	ended := make(chan struct{})
	go func() { defer close(ended); r.handle(e) }()
	<-asked
	cancel := e.Next(&schemas.Cancel{Reason: "no more"}, nil)
	if err := r.d.Cancel(t.Context(), cancel, nil); err != nil {
		t.Fatal(err)
	}
	<-ended
	r.ends(e, "cancelled")
	if got := h.body("notifications/cancelled"); !strings.Contains(got, string(e.Call)) || !strings.Contains(got, "no more") {
		t.Errorf("%s", got)
	}
	first := r.modern("tools/call", "ask", allCaps, `}}`)
	_, v := r.answered(first)
	state, _ := r.stateOf(v)
	h.await(t, "notifications/cancelled", 2)
	if got := h.body("notifications/cancelled"); !strings.Contains(got, string(first.Call)) {
		t.Errorf("%s", got)
	}
	if a := <-h.answer("7"); !strings.Contains(a, "nobody has answered in time") {
		t.Errorf("the question was answered with %s", a)
	}
	if done, _ := r.answered(r.modern("tools/call", "ask", allCaps, retry(state, `"elicitation/create-1":`+accept))); done.ErrorCode != -32602 {
		t.Errorf("%+v", done)
	}
	empty(t, r)
}

// A child of a front cannot ask anybody.
func TestParkedChild(t *testing.T) {
	h := &host{tools: func(v *visit, m *jsonrpc.Message) {
		v.say(whoQuestion)
		<-v.r.Context().Done()
	}}
	r := newHost(t, h)
	done, _ := r.answered(r.modern("tools/call", "t", allCaps, `}}`, func(e *schemas.Event) { e.Parent = "c0000000000000000000000000p" }))
	if done.Result != inputRequired {
		t.Errorf("%+v", done)
	}
	h.await(t, "notifications/cancelled", 1)
	empty(t, r)
}

// What a server asks outside of any call goes to the next that can ask, before
// that is sent.
func TestAskedOutside(t *testing.T) {
	h := &host{out: make(chan string), tools: func(v *visit, m *jsonrpc.Message) { v.end(`{"n":1}`) }}
	r := newHost(t, h)
	r.answered(r.modern("tools/list", "", allCaps, `}}`))
	h.out <- whoQuestion
	m := r.d.upstreams["s"].mcp
	g := m.sessions.visited(m, sessionID{"acme", "s1"})[0].guest
	for pending := 0; pending == 0; runtime.Gosched() {
		g.mu.Lock()
		pending = len(g.pending)
		g.mu.Unlock()
	}
	r.answered(r.modern("tools/list", "", allCaps, `}}`)) // which cannot
	done, v := r.answered(r.modern("tools/call", "t", allCaps, `}}`))
	state, _ := r.stateOf(v)
	if h.came("tools/call") != 0 || done.Attempts != 0 {
		t.Errorf("%+v, sent %v", done, h.log)
	}
	e := r.modern("tools/call", "t", allCaps, retry(state, `"elicitation/create-1":`+accept))
	if _, v := r.answered(e); !v.Get("result", "n").Exists() {
		t.Errorf("%s", v.Raw())
	}
	if a := <-h.answer("7"); !strings.Contains(a, "Ada") {
		t.Errorf("%s", a)
	}
	if got := h.body("tools/call"); strings.Contains(got, "requestState") || strings.Contains(got, "inputResponses") || !strings.Contains(got, string(e.Call)) {
		t.Errorf("sent %s", got)
	}
	empty(t, r)
}

// The level of the log is each call's own.
func TestNewClientLevel(t *testing.T) {
	h := &host{tools: func(v *visit, m *jsonrpc.Message) {
		for _, level := range []string{"debug", "warning", "error"} {
			v.say(`{"jsonrpc":"2.0","method":"notifications/message","params":{"level":"` + level + `","data":1E400}}`)
		}
		v.end(`{}`)
	}}
	r := newHost(t, h)
	for _, c := range []struct {
		level string
		want  int
		set   int // how often the server was told
	}{{"", 0, 0}, {"warning", 2, 1}, {"warning", 2, 1}, {"debug", 3, 2}, {"", 0, 2}, {"error", 1, 3}} {
		more := `}}`
		if c.level != "" {
			more = `,"io.modelcontextprotocol/logLevel":"` + c.level + `"}}`
		}
		if done, _ := r.answered(r.modern("tools/call", "t", allCaps, more)); done.Chunks != c.want || h.came("logging/setLevel") != c.set {
			t.Errorf("%q: %d messages, set %d times", c.level, done.Chunks, h.came("logging/setLevel"))
		}
	}
	if got := h.body("logging/setLevel"); !strings.Contains(got, `{"level":"error"}`) {
		t.Errorf("%s", got)
	}
}

// Several listen at once; each is told what it asked for, of what there is.
func TestNewClientListens(t *testing.T) {
	leaks(t)
	h := &host{out: make(chan string)}
	r := newHost(t, h)
	listen := func(filter string) (schemas.Event, context.CancelFunc, chan struct{}) {
		e := r.modern("subscriptions/listen", "", allCaps, `},"notifications":`+filter+`}`, stream)
		ctx, cancel := context.WithCancel(t.Context())
		ended := make(chan struct{})
		go func() { defer close(ended); _ = r.d.Handle(ctx, e, r.log.emit) }()
		return e, cancel, ended
	}
	heard := func(e schemas.Event, n int) []string {
		t.Helper()
		for end := time.Now().Add(10 * time.Second); time.Now().Before(end); runtime.Gosched() {
			var all []string
			for _, p := range r.log.of(schemas.KindProgressed) {
				if p.Call == e.Call {
					all = append(all, string(p.Body))
				}
			}
			if len(all) == n {
				return all
			}
		}
		t.Fatalf("not %d messages%v", n, r.log)
		return nil
	}
	tools, stopTools, toolsEnded := listen(`{"toolsListChanged":true,"promptsListChanged":true,"resourceSubscriptions":["a:1","a:2"]}`)
	id := `"io.modelcontextprotocol/subscriptionId":"` + string(tools.Call) + `"`
	if got := heard(tools, 1)[0]; got != `{"jsonrpc":"2.0","method":"notifications/subscriptions/acknowledged","params":{"_meta":{`+id+`},"notifications":{"toolsListChanged":true,"resourceSubscriptions":["a:1","a:2"]}}}` {
		t.Errorf("%s", got)
	}
	other, stopOther, otherEnded := listen(`{"resourcesListChanged":true,"resourceSubscriptions":["a:1"]}`)
	heard(other, 1)
	if h.came("resources/subscribe") != 2 {
		t.Errorf("%v", h.log)
	}
	h.out <- `{"jsonrpc":"2.0","method":"notifications/tools/list_changed"}`
	h.out <- `{"jsonrpc":"2.0","method":"notifications/message","params":{"level":"error"}}`
	h.out <- `{"jsonrpc":"2.0","method":"notifications/resources/updated","params":{"uri":"a:2","x":1E400}}`
	h.out <- `{"jsonrpc":"2.0","method":"notifications/resources/updated","params":{"uri":"a:1","_meta":{"k":1}}}`
	if got, want := heard(tools, 4)[1:], []string{
		`{"jsonrpc":"2.0","method":"notifications/tools/list_changed","params":{"_meta":{` + id + `}}}`,
		`{"jsonrpc":"2.0","method":"notifications/resources/updated","params":{"uri":"a:2","x":1E400,"_meta":{` + id + `}}}`,
		`{"jsonrpc":"2.0","method":"notifications/resources/updated","params":{"uri":"a:1","_meta":{"k":1,` + id + `}}}`,
	}; !slices.Equal(got, want) {
		t.Errorf("%q\nwant %q", got, want)
	}
	heard(other, 2)
	// The server restarts: it is told again, and so are they.
	h.forget()
	r.http.CloseClientConnections()
	h.await(t, "resources/subscribe", 4)
	h.out <- `{"jsonrpc":"2.0","method":"notifications/resources/updated","params":{"uri":"a:1"}}`
	heard(tools, 5)
	heard(other, 3)
	stopTools()
	<-toolsEnded
	h.await(t, "resources/unsubscribe", 1)
	if got := h.body("resources/unsubscribe"); !strings.Contains(got, "a:2") {
		t.Errorf("%s", got)
	}
	stopOther()
	<-otherEnded
	h.await(t, "resources/unsubscribe", 2)
	empty(t, r)
}

// A server without a stream of its own cannot be listened to.
func TestNewClientListensInVain(t *testing.T) {
	h := &host{}
	r := newHost(t, h)
	e := r.modern("subscriptions/listen", "", allCaps, `},"notifications":{"toolsListChanged":true}}`, stream)
	_, v := r.answered(e)
	p := r.log.of(schemas.KindProgressed)
	if len(p) != 1 || !strings.Contains(string(p[0].Body), `"notifications":{}`) {
		t.Errorf("%v", p)
	}
	if got, _ := v.Get("result", "resultType").Text(); got != "complete" || !v.Get("result", "_meta", metaSubscription).Exists() {
		t.Errorf("%s", v.Raw())
	}
	if done, _ := r.answered(r.modern("subscriptions/listen", "", allCaps, `}}`, stream)); done.ErrorCode != -32602 {
		t.Errorf("%+v", done)
	}
}

// A session that the server has lost is opened again, and one that nobody uses is
// closed.
func TestGuestSessions(t *testing.T) {
	leaks(t)
	h := &host{tools: func(v *visit, m *jsonrpc.Message) { v.end(`{}`) }}
	r := newHost(t, h)
	r.answered(r.modern("tools/call", "t", allCaps, `}}`))
	h.forget()
	r.answered(r.modern("tools/call", "t", allCaps, `}}`))
	if h.came("initialize") != 2 || h.came("tools/call") != 3 {
		t.Errorf("%v", h.log)
	}
	h = &host{tools: func(v *visit, m *jsonrpc.Message) { v.end(`{}`) }}
	r = newHost(t, h)
	r.d.sessions.timing.idle = time.Millisecond
	for i := range 2 {
		r.answered(r.modern("tools/call", "t", allCaps, `}}`))
		h.await(t, "DELETE", i+1)
		if n := r.d.sessions.count("s"); n != 0 {
			t.Errorf("%d sessions", n)
		}
	}
	if h.came("initialize") != 2 {
		t.Errorf("%v", h.log)
	}
}

// A client that says something else of itself each time has so many sessions, and
// one that could not be opened is none.
func TestGuestLimit(t *testing.T) {
	leaks(t)
	h := &host{}
	r := newHost(t, h)
	for i := range maxGuests + 5 {
		r.answered(r.modern("tools/list", "", fmt.Sprintf(`{"x":%d}`, i), `}}`))
	}
	h.await(t, "DELETE", 5)
	if n := r.d.sessions.count("s"); n != maxGuests {
		t.Errorf("%d sessions", n)
	}
	e := r.modern("tools/list", "", `{"x":"`+strings.Repeat("x", maxGuest)+`"}`, `}}`)
	r.handle(e)
	r.ends(e, "invalid")
	h.init = func(w http.ResponseWriter, m *jsonrpc.Message) bool { http.Error(w, "no", 400); return true }
	e = r.modern("tools/list", "", `{"y":1}`, `}}`)
	r.handle(e)
	r.ends(e, "unavailable")
	if n := r.d.sessions.count("s"); n >= maxGuests {
		t.Errorf("%d sessions", n)
	}
}

// At most so many wait; what is asked beyond that is refused at the server.
func TestParkedLimit(t *testing.T) {
	h := &host{tools: func(v *visit, m *jsonrpc.Message) {
		v.say(strings.Replace(whoQuestion, `"id":7`, `"id":`+string(m.ID().Raw()), 1))
		v.end(`{"heard":` + v.wait(string(m.ID().Raw())) + `}`)
	}}
	r := newHost(t, h)
	m := r.d.upstreams["s"].mcp
	m.parking.mu.Lock()
	m.parking.tenants["acme"] = maxParkedTenant - 1
	m.parking.mu.Unlock()
	_, v := r.answered(r.modern("tools/call", "t", allCaps, `}}`))
	r.stateOf(v)
	if _, v := r.answered(r.modern("tools/call", "t", allCaps, `}}`)); !strings.Contains(string(v.Get("result", "heard").Raw()), "too many calls wait") {
		t.Errorf("%s", v.Raw())
	}
}

// Headers that a tool asks for are checked, since the server does not know them.
func TestNewClientHeaders(t *testing.T) {
	h := &host{tools: func(v *visit, m *jsonrpc.Message) {
		v.end(`{"tools":[{"name":"t","inputSchema":{"type":"object","properties":{"r":{"type":"string","x-mcp-header":"Region"},"n":{"type":"integer","x-mcp-header":"N"}}}}]}`)
	}}
	r := newHost(t, h)
	r.answered(r.modern("tools/list", "", allCaps, `}}`))
	for _, c := range []struct {
		headers map[string]string
		code    int
	}{
		{map[string]string{"Mcp-Param-Region": "=?base64?w6k=?=", "Mcp-Param-N": "1"}, 0},
		{map[string]string{"Mcp-Param-Region": "=?base64?w6k=?=", "mcp-param-n": "1.0"}, 0},
		{map[string]string{"Mcp-Param-Region": "=?base64?w6k?=", "Mcp-Param-N": "1"}, -32020},
		{map[string]string{"Mcp-Param-Region": "e", "Mcp-Param-N": "1"}, -32020},
		{map[string]string{"Mcp-Param-N": "1"}, -32020},
	} {
		done, v := r.answered(r.modern("tools/call", "t", allCaps, `},"arguments":{"r":"é","n":1}}`, authorized(func(a *schemas.Authorized) { a.Headers = c.headers })))
		if done.ErrorCode != c.code {
			t.Errorf("%v: %s", c.headers, v.Raw())
		}
	}
	if done, _ := r.answered(r.modern("tools/call", "t", allCaps, `}}`, authorized(func(a *schemas.Authorized) { a.Headers = map[string]string{"Mcp-Param-N": "1"} }))); done.ErrorCode != -32020 {
		t.Errorf("%+v", done)
	}
}

// The session of a guest ends with the process, so that no other takes it over.
func TestGuestIsNotTakenOver(t *testing.T) {
	h := &host{out: make(chan string)}
	r := newHost(t, h, func(o *Options) { o.Owners = holder{&ledger{}, "a"} })
	r.answered(r.modern("tools/list", "", allCaps, `}}`))
	h.await(t, "GET", 1)
	if keys, _ := r.opt.Owners.Owned(t.Context(), "a"); len(keys) != 0 {
		t.Errorf("who takes over finds %v", keys)
	}
}

// unreached is a network over which some sessions' notifications do not get out.
type unreached struct {
	http.RoundTripper
	mu    sync.Mutex
	heard map[string]int // by session, what got out
	lost  map[string]int // how often nothing does
}

func (u *unreached) RoundTrip(req *http.Request) (*http.Response, error) {
	u.mu.Lock()
	id := req.Header.Get("Mcp-Session-Id")
	if u.lost[id] > 0 {
		u.lost[id]--
		u.mu.Unlock()
		return nil, &net.OpError{Op: "dial", Err: errors.New("no route")}
	}
	u.heard[id]++
	u.mu.Unlock()
	return u.RoundTripper.RoundTrip(req)
}

// A notification that one session has heard is not said to it again because
// another could not be reached; one that none has heard is.
func TestNewClientNotifiesOnce(t *testing.T) {
	h := &host{}
	r := newHost(t, h)
	r.answered(r.modern("tools/list", "", `{}`, `}}`))
	r.answered(r.modern("tools/list", "", allCaps, `}}`))
	h.await(t, "GET", 2)
	m := r.d.upstreams["s"].mcp
	u := &unreached{RoundTripper: m.transport}
	m.transport = u
	for _, c := range []struct {
		lost, heard map[string]int
		end         string
	}{
		{map[string]int{"up-1": 9}, map[string]int{"up-2": 1}, "unknown"},
		{map[string]int{"up-2": 9}, map[string]int{"up-1": 1}, "unknown"},
		{map[string]int{"up-1": 1, "up-2": 1}, map[string]int{"up-1": 1, "up-2": 1}, "completed"},
		{map[string]int{}, map[string]int{"up-1": 1, "up-2": 1}, "completed"},
	} {
		u.mu.Lock()
		u.heard, u.lost = map[string]int{}, maps.Clone(c.lost)
		u.mu.Unlock()
		e := r.oneWay("notifications/roots/list_changed")
		r.handle(e)
		r.ends(e, c.end)
		u.mu.Lock()
		if !maps.Equal(u.heard, c.heard) {
			t.Errorf("lost %v: heard %v, want %v", c.lost, u.heard, c.heard)
		}
		u.mu.Unlock()
	}
}
