package test

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"waybill.dev/schemas"
	"waybill.dev/test/gateway"
	"waybill.dev/test/peers"
	"waybill.dev/test/upstream"
)

// hanging takes connections and never says a word.
func hanging(t *testing.T) string {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var mu sync.Mutex
	var held []net.Conn
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			mu.Lock()
			held = append(held, c)
			mu.Unlock()
		}
	}()
	t.Cleanup(func() {
		_ = ln.Close()
		<-done
		for _, c := range held {
			_ = c.Close()
		}
	})
	return "http://" + ln.Addr().String() + "/mcp"
}

// federation is a gateway in front of 18 servers that work, one that hangs and
// one that refuses, in between.
func federation(t *testing.T, more string) *gateway.Gateway {
	var servers strings.Builder
	servers.WriteString("servers:\n")
	for i := range 20 {
		name := fmt.Sprintf("s%02d", i)
		switch i {
		case 7:
			servers.WriteString(gateway.Native("hangs", hanging(t), "deadline: 1s"))
		case 13:
			servers.WriteString(gateway.Server("refuses", "http://"+gateway.FreeAddr(t)+"/mcp", ""))
		default:
			servers.WriteString(gateway.Server(name, peers.EverythingServer(t), ""))
		}
	}
	return gateway.Start(t, gateway.Config(servers.String()+more))
}

// atFront is a request at a front.
func atFront(t *testing.T, g *gateway.Gateway, server, method, name, params string, header ...string) json.RawMessage {
	t.Helper()
	if params != "" {
		params += ","
	}
	a, err := g.Post(t.Context(), server, method, name,
		fmt.Sprintf(`{"jsonrpc":"2.0","id":7,"method":%q,"params":{%s%s}}`, method, params, gateway.Meta), header...)
	if err != nil {
		t.Fatal(err)
	}
	body := a.Body
	for line := range strings.Lines(string(a.Body)) { // a stream: the last message is the answer
		if data, ok := strings.CutPrefix(line, "data:"); ok {
			body = []byte(data)
		}
	}
	var m struct {
		ID     int
		Result json.RawMessage
		Error  any
	}
	if err := json.Unmarshal(body, &m); err != nil || m.ID != 7 || m.Error != nil {
		t.Fatalf("%s: HTTP %d, %v\n%.2000s", method, a.Status, err, a.Body)
	}
	return m.Result
}

type toolList struct {
	Tools []struct {
		Name, Description string
		InputSchema       json.RawMessage
	}
	NextCursor string
	Meta       struct {
		Servers map[string]struct{ Error, Message string } `json:"dev.waybill/servers"`
	} `json:"_meta"`
}

// One server of twenty hangs and one refuses: the list comes within the
// deadline and says so, and a call to a server that works is none the slower.
func TestFederatedList(t *testing.T) {
	g := federation(t, `
views:
  - name: support
    from:
      s02: [{tool: test_simple_text, as: say, description: "Says \"hello\"."}, nothing]
      s01: [test_image_content]
`)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()

	// Beside everything that follows.
	var calls sync.WaitGroup
	var slowest time.Duration
	calls.Go(func() {
		for ctx.Err() == nil {
			began := time.Now()
			a, err := g.Post(ctx, "s05", "tools/call", "test_simple_text",
				`{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{"name":"test_simple_text",`+gateway.Meta+`}}`)
			if ctx.Err() != nil {
				return
			}
			if err != nil || !strings.Contains(string(a.Body), "simple text response") {
				t.Errorf("HTTP %d, %v: %s", a.Status, err, a.Body)
				return
			}
			slowest = max(slowest, time.Since(began))
		}
	})

	began := time.Now()
	var l toolList
	raw := atFront(t, g, schemas.Gateway, "tools/list", "", "")
	if err := json.Unmarshal(raw, &l); err != nil {
		t.Fatal(err)
	}
	if took := time.Since(began); took > 5*time.Second*slowdown {
		t.Errorf("the list took %v", took)
	} else {
		t.Logf("the list took %v", took)
	}
	var servers []string
	for _, tool := range l.Tools {
		server, _, _ := strings.Cut(tool.Name, "__")
		if len(servers) == 0 || servers[len(servers)-1] != server {
			servers = append(servers, server)
		}
	}
	if len(servers) != 18 || !slices.IsSorted(servers) || slices.Contains(servers, "hangs") {
		t.Errorf("of %d servers: %v", len(servers), servers)
	}
	if m := l.Meta.Servers; len(m) != 2 || m["hangs"].Error != "timeout" || m["refuses"].Error != "unavailable" {
		t.Errorf("%+v", m)
	}

	// Again, and in another order of answers: the same.
	if again := atFront(t, g, schemas.Gateway, "tools/list", "", ""); string(again) != string(raw) {
		t.Errorf("first\n%s\nthen\n%s", raw, again)
	}
	for method, array := range map[string]string{
		"prompts/list": `"prompts":[{`, "resources/list": `"resources":[{`, "resources/templates/list": `"resourceTemplates":[{`,
	} {
		if got := string(atFront(t, g, schemas.Gateway, method, "", "")); !strings.HasPrefix(got, "{"+array) {
			t.Errorf("%s: %s", method, got)
		}
	}

	l = toolList{}
	raw = atFront(t, g, "support", "tools/list", "", "")
	if err := json.Unmarshal(raw, &l); err != nil {
		t.Fatal(err)
	}
	if len(l.Tools) != 2 || l.Tools[0].Name != "test_image_content" || l.Tools[1].Name != "say" || l.Tools[1].Description != `Says "hello".` {
		t.Errorf("%s", raw)
	}
	if m := l.Meta.Servers; len(m) != 1 || m["s02"].Error != "missing_tools" {
		t.Errorf("%+v", m)
	}
	atFront(t, g, schemas.Gateway, "server/discover", "", "")

	cancel()
	calls.Wait()
	t.Logf("the slowest call on a healthy server took %v", slowest)
	if slowest > time.Second*slowdown {
		t.Error("a call on a healthy server was held up")
	}
	metrics := get(t, g.Admin+"/metrics")
	for _, want := range []string{
		`waybill_front_calls_total{code="timeout",method="tools/list",outcome="failed",server="hangs"} `,
		`waybill_front_calls_total{code="unavailable",method="tools/list",outcome="failed",server="refuses"} `,
	} {
		if !strings.Contains(metrics, want) {
			t.Errorf("metrics lack %s", want)
		}
	}
}

func get(t *testing.T, url string) string {
	t.Helper()
	resp, err := http.Get(url)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = resp.Body.Close() }()
	b, err := io.ReadAll(resp.Body)
	if err != nil || resp.StatusCode != http.StatusOK {
		t.Fatalf("%s: HTTP %d, %v", url, resp.StatusCode, err)
	}
	return string(b)
}

// One call to twenty servers: one answer, twenty calls in the log under the one,
// and the slowest of them decides how long it takes, not their sum.
func TestCallMany(t *testing.T) {
	u := upstream.Start(t)
	var servers strings.Builder
	servers.WriteString("servers:\n")
	for i := range 20 {
		servers.WriteString(gateway.Native(fmt.Sprintf("s%02d", i), u.URL, ""))
	}
	g := gateway.Start(t, gateway.Config(servers.String()+"fanout: {tools: [find_tools, call_many], concurrency: 20}\n"))

	const each = 1500 // milliseconds that every one of them takes
	began := time.Now()
	raw := atFront(t, g, schemas.Gateway, "tools/call", "waybill__call_many",
		fmt.Sprintf(`"name":"waybill__call_many","arguments":{"tool":"count","servers":["*"],"arguments":{"key":"k","wait":%d}}`, each), "Waybill-Session: many")
	took := time.Since(began)
	t.Logf("20 calls of %d ms each took %v", each, took)
	if took > 4*each*time.Millisecond*slowdown {
		t.Error("the calls waited for each other")
	}
	var m struct {
		StructuredContent struct {
			Results []struct {
				Tool, Server string
				OK           bool
				Call         schemas.CallID
				Result       json.RawMessage
			}
			OK, Failed int
		}
	}
	if err := json.Unmarshal(raw, &m); err != nil {
		t.Fatal(err)
	}
	s := m.StructuredContent
	if len(s.Results) != 20 || s.OK != 20 || s.Failed != 0 {
		t.Fatalf("%s", raw)
	}
	effects := u.Effects()
	if len(effects) != 20 {
		t.Errorf("%d effects", len(effects))
	}
	for i, r := range s.Results {
		if r.Server != fmt.Sprintf("s%02d", i) || r.Tool != "count" || !r.OK || !strings.Contains(string(r.Result), "count k for the ") {
			t.Errorf("%d: %+v", i, r)
		}
		if !slices.ContainsFunc(effects, func(e upstream.Effect) bool { return e.Call == string(r.Call) }) {
			t.Errorf("no effect of %s", r.Call)
		}
	}

	// The log has them as what they are.
	var parent schemas.CallID
	children := map[schemas.CallID]bool{}
	ended := map[schemas.CallID]schemas.Kind{}
	for _, e := range g.Events() {
		switch q, ok := e.Data.(*schemas.Requested); {
		case ok && e.Parent == "":
			parent = e.Call
		case ok:
			if e.Parent != parent || e.Root != parent || q.Name != "count" {
				t.Errorf("%+v %+v", e, q)
			}
			children[e.Call] = true
		case e.Kind().Ends():
			ended[e.Call] = e.Kind()
		}
	}
	if len(children) != 20 || len(ended) != 21 || ended[parent] != schemas.KindCompleted {
		t.Errorf("%d children, %d endings", len(children), len(ended))
	}
	out, errs, exit := g.CLI("replay", string(g.Events()[0].Session))
	if exit != 0 || strings.Count(out, "├─ ")+strings.Count(out, "└─ ") < 20 {
		t.Errorf("exit %d, %s\n%s", exit, errs, out)
	}
	tree := regexp.MustCompile(`(?m)^ +[├└]─ .*tools/call count → s\d\d +completed`).FindAllString(out, -1)
	if len(tree) != 20 || strings.Count(out, "tools/call call_many → waybill") != 1 {
		t.Errorf("%d calls under the one:\n%s", len(tree), out)
	}
}

// The official server refuses a call without the headers that its tool wants; in
// call_many it gets them by one more call.
func TestCallManyHeaders(t *testing.T) {
	url := peers.EverythingServer(t)
	g := gateway.Start(t, gateway.Config("servers:\n"+gateway.Server("a", url, "")+gateway.Server("b", url, "")+"fanout: {tools: [call_many]}\n"))
	raw := atFront(t, g, schemas.Gateway, "tools/call", "waybill__call_many",
		`"name":"waybill__call_many","arguments":{"tool":"test_x_mcp_header","servers":["*"],"arguments":{"region":"日本","level":3}}`, "Waybill-Session: many")
	if !strings.Contains(string(raw), `"ok":2,"failed":0`) {
		t.Errorf("%s", raw)
	}
	sent := map[string]int{}
	for _, e := range g.Events() {
		if q, ok := e.Data.(*schemas.Requested); ok && e.Parent != "" {
			sent[q.Method+" "+q.Headers["Mcp-Param-Region"]]++
		}
	}
	if want := map[string]int{"tools/call ": 2, "tools/list ": 2, "tools/call =?base64?5pel5pys?=": 2}; !maps.Equal(sent, want) {
		t.Errorf("%v", sent)
	}
}

// The caller goes away: every call that was made for it is cancelled.
func TestCallManyIsCancelled(t *testing.T) {
	u := upstream.Start(t)
	g := gateway.Start(t, gateway.Config("servers:\n"+gateway.Native("a", u.URL, "")+gateway.Native("b", u.URL, "")+
		"fanout: {tools: [call_many]}\n"))
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	left := make(chan struct{})
	go func() {
		defer close(left)
		_, err := g.Post(ctx, schemas.Gateway, "tools/call", "waybill__call_many",
			`{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{"name":"waybill__call_many","arguments":{"tool":"count","servers":["*"],"arguments":{"key":"k","wait":30000}},`+gateway.Meta+`}}`)
		if err == nil {
			t.Error("an answer to who left")
		}
	}()
	poll(t, func() bool { return len(u.Effects()) == 2 })
	cancel()
	<-left
	poll(t, func() bool {
		n := 0
		for _, e := range g.Events() {
			if e.Kind() == schemas.KindCancelled {
				n++
			}
		}
		return n == 3
	})
}

// poll waits until done, but not for ever.
func poll(t *testing.T, done func() bool) {
	t.Helper()
	again := time.NewTicker(50 * time.Millisecond)
	defer again.Stop()
	late := time.After(time.Minute)
	for !done() {
		select {
		case <-again.C:
		case <-late:
			t.Fatal("waited in vain")
		}
	}
}

// One of the calls asks for input, of a client of either era: the others work, and
// what became of the one is said, and in the log.
func TestCallManyAsks(t *testing.T) {
	g := gateway.Start(t, gateway.Config("servers:\n"+gateway.Server("everything", peers.ServerEverything(t), "")+"fanout: {tools: [call_many]}\n"))
	const calls = `"name":"waybill__call_many","arguments":{"calls":[{"tool":"everything__trigger-elicitation-request"},{"tool":"everything__echo","arguments":{"message":"it"}}]}`
	check := func(era string, raw json.RawMessage, want string) {
		t.Helper()
		var m struct {
			StructuredContent struct {
				Results []struct {
					OK    bool
					Call  schemas.CallID
					Error struct{ Code, Message string }
				}
				OK, Failed int
			}
		}
		if err := json.Unmarshal(raw, &m); err != nil {
			t.Fatalf("%s: %v: %s", era, err, raw)
		}
		s := m.StructuredContent
		if s.OK != 1 || s.Failed != 1 || len(s.Results) != 2 || !s.Results[1].OK || s.Results[0].Error.Code != "input_required" || !strings.Contains(s.Results[0].Error.Message, want) {
			t.Fatalf("%s: %s", era, raw)
		}
		ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
		defer cancel()
		again := time.NewTicker(100 * time.Millisecond)
		defer again.Stop()
		for {
			for _, e := range g.Events() {
				if e.Call == s.Results[0].Call && e.Kind().Ends() {
					return
				}
			}
			select {
			case <-again.C:
			case <-ctx.Done():
				t.Fatalf("%s: call %s has no ending", era, s.Results[0].Call)
			}
		}
	}
	old, _, err := peers.OpenLegacy(t.Context(), peers.Endpoint{URL: g.URL + "/mcp"}, "2025-11-25", map[string]any{"elicitation": map[string]any{}})
	if err != nil {
		t.Fatal(err)
	}
	raw, err := old.Call(t.Context(), "tools/call", json.RawMessage(`{`+calls+`}`))
	if err != nil {
		t.Fatal(err)
	}
	check("with a session", raw, "It asks for elicitation/create, which can be answered only when it is called by itself. The call was begun and has been taken back")
	a, err := g.Post(t.Context(), schemas.Gateway, "tools/call", "waybill__call_many",
		`{"jsonrpc":"2.0","id":7,"method":"tools/call","params":{`+calls+`,"_meta":{"io.modelcontextprotocol/protocolVersion":"2026-07-28","io.modelcontextprotocol/clientCapabilities":{"elicitation":{}}}}}`)
	if err != nil {
		t.Fatal(err)
	}
	body := a.Body
	if i := strings.LastIndex(string(body), "data: {"); i >= 0 {
		body = body[i+len("data: "):]
	}
	var m struct{ Result json.RawMessage }
	if err := json.Unmarshal(body, &m); err != nil {
		t.Fatalf("%v: %s", err, a.Body)
	}
	check("without", m.Result, "It asks for input, which can be given only when it is called by itself. This call of it goes on no further.")
}
