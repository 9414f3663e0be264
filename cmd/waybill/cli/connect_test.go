package cli

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"sync"
	"testing"
	"time"

	"waybill.dev/schemas/jsonrpc"
)

// connected is a relay to a gateway that does what the test says: what a real
// one does only when it is stopped, cut off or out of room. What it does by
// itself is tested with a real one, in test/connect_test.go.
type connected struct {
	t     *testing.T
	in    *io.PipeWriter
	lines chan string
	said  output
	out   *io.PipeReader
	ended chan error

	mu  sync.Mutex
	got []string // method, and of the headers what tells how it came: "POST tools/call s1"
}

// quick are times that a test can wait for.
var quick = relayTimes{
	patience: 5 * time.Second, resume: 5 * time.Second, pause: time.Millisecond, pauses: 20 * time.Millisecond,
	silence: 5 * time.Second, steady: 50 * time.Millisecond, order: time.Second, finish: time.Second, stop: 300 * time.Millisecond, farewell: time.Second,
}

// connectTo runs one with a gateway.
func connectTo(t *testing.T, times relayTimes, gateway func(c *connected, w http.ResponseWriter, r *http.Request, m *jsonrpc.Message)) *connected {
	t.Helper()
	c := &connected{t: t, lines: make(chan string, 4096), ended: make(chan error, 1)}
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body) // an empty one is no message
		m, _ := jsonrpc.Decode(body, jsonrpc.Limits{})
		method := ""
		if m != nil {
			method = m.Method()
		}
		c.mu.Lock()
		c.got = append(c.got, strings.TrimSpace(strings.Join([]string{r.Method, method, r.Header.Get("Mcp-Session-Id"), r.Header.Get("Last-Event-Id")}, " ")))
		c.mu.Unlock()
		gateway(c, w, r, m)
	}))
	t.Cleanup(server.Close)
	c.run(server.URL, times)
	return c
}

func (c *connected) run(base string, times relayTimes) {
	c.t.Helper()
	endpoint, err := url.Parse(base + "/mcp/s")
	if err != nil {
		c.t.Fatal(err)
	}
	in, stdin := io.Pipe()
	stdout, out := io.Pipe()
	c.in, c.out = stdin, stdout
	transport := newConnectTransport()
	r := newRelay(endpoint, "", transport, out, func(format string, args ...any) { _, _ = fmt.Fprintf(&c.said, format+"\n", args...) }, times)
	ctx, stop := context.WithCancel(context.Background())
	go func() {
		err := r.run(ctx, in)
		_ = out.Close()
		c.ended <- err
	}()
	go func() {
		for s := bufio.NewScanner(stdout); s.Scan(); {
			c.lines <- s.Text()
		}
		close(c.lines)
	}()
	c.t.Cleanup(func() {
		stop()
		_ = stdin.Close()
		for range c.lines { // until it has ended
		}
		transport.CloseIdleConnections()
		if c.t.Failed() {
			c.t.Logf("said:\n%sthe gateway got %q", &c.said, c.requests())
		}
	})
}

func (c *connected) requests() []string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return append([]string(nil), c.got...)
}

// count is how many of the gateway's requests are this one.
func (c *connected) count(request string) (n int) {
	for _, got := range c.requests() {
		if got == request {
			n++
		}
	}
	return n
}

func (c *connected) say(lines ...string) {
	c.t.Helper()
	for _, line := range lines {
		if _, err := io.WriteString(c.in, line+"\n"); err != nil {
			c.t.Fatal(err)
		}
	}
}

// hear reads the next line, which must have this in it.
func (c *connected) hear(want ...string) string {
	c.t.Helper()
	select {
	case line, ok := <-c.lines:
		for _, w := range want {
			if !strings.Contains(line, w) {
				c.t.Fatalf("%s\nhas no %s", line, w)
			}
		}
		if !ok {
			c.t.Fatal("the end")
		}
		return line
	case <-time.After(30 * time.Second):
		c.t.Fatalf("nothing came, want %q", want)
	}
	return ""
}

// end closes stdin; nothing more may come.
func (c *connected) end() {
	c.t.Helper()
	_ = c.in.Close()
	for line := range c.lines {
		c.t.Errorf("at the end came %s", line)
	}
	select {
	case err := <-c.ended:
		if err != nil {
			c.t.Error(err)
		}
	case <-time.After(30 * time.Second):
		c.t.Fatal("it does not end")
	}
}

const (
	initializeLine  = `{"jsonrpc":"2.0","id":0,"method":"initialize","params":{"protocolVersion":"2025-11-25","capabilities":{},"clientInfo":{"name":"t","version":"1"}}}`
	initializedLine = `{"jsonrpc":"2.0","method":"notifications/initialized"}`
	modernMeta      = `"_meta":{"io.modelcontextprotocol/protocolVersion":"2026-07-28","io.modelcontextprotocol/clientCapabilities":{}}`
)

// legacyGateway answers what opens a session, s1, s2 and so on, and gives all
// else to next.
func legacyGateway(next func(c *connected, w http.ResponseWriter, r *http.Request, m *jsonrpc.Message)) func(*connected, http.ResponseWriter, *http.Request, *jsonrpc.Message) {
	return func(c *connected, w http.ResponseWriter, r *http.Request, m *jsonrpc.Message) {
		switch {
		case m != nil && m.Method() == "initialize":
			w.Header().Set("Mcp-Session-Id", fmt.Sprintf("s%d", c.count("POST initialize")))
			answer(w, m, `{"protocolVersion":"2025-11-25","capabilities":{},"serverInfo":{"name":"g","version":"1"}}`)
		case m != nil && !m.IsRequest():
			w.WriteHeader(http.StatusAccepted)
		case r.Method == http.MethodDelete:
			w.WriteHeader(http.StatusNoContent)
		default:
			next(c, w, r, m)
		}
	}
}

// held is a stream that says nothing until its client leaves.
func held(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("Content-Type", "text/event-stream")
	w.WriteHeader(http.StatusOK)
	_ = http.NewResponseController(w).Flush()
	<-r.Context().Done()
}

func answer(w http.ResponseWriter, m *jsonrpc.Message, result string) {
	w.Header().Set("Content-Type", "application/json")
	_, _ = w.Write(jsonrpc.ResultResponse(m.ID().Raw(), []byte(result)))
}

func event(w http.ResponseWriter, text string) {
	w.Header().Set("Content-Type", "text/event-stream")
	_, _ = io.WriteString(w, text+"\n\n")
	_ = http.NewResponseController(w).Flush()
}

func callLine(id, tool string) string {
	return `{"jsonrpc":"2.0","id":` + id + `,"method":"tools/call","params":{"name":"` + tool + `"}}`
}

func modernLine(id, method, more string) string {
	return `{"jsonrpc":"2.0","id":` + id + `,"method":"` + method + `","params":{` + more + modernMeta + `}}`
}

// broken cuts a connection.
func broken() { panic(http.ErrAbortHandler) }

// A laptop that slept: the stream of a call says nothing more, without an end.
// It is asked for again from where it was; so is the session's own. What the
// server said is told once.
func TestConnectSilence(t *testing.T) {
	times := quick
	times.silence = 300 * time.Millisecond
	c := connectTo(t, times, legacyGateway(func(c *connected, w http.ResponseWriter, r *http.Request, m *jsonrpc.Message) {
		switch last := r.Header.Get("Last-Event-Id"); {
		case r.Method == http.MethodPost:
			event(w, "id: 7-8\ndata: {\"jsonrpc\":\"2.0\",\"method\":\"notifications/progress\",\"params\":{\"n\":1}}")
			<-r.Context().Done()
		case last == "7-8":
			event(w, "retry: 1\nid: 7-9\ndata: {\"jsonrpc\":\"2.0\",\"method\":\"notifications/progress\",\"params\":{\"n\":2}}")
			broken()
		case last == "7-9":
			event(w, "id: 7-10\ndata: {\"jsonrpc\":\"2.0\",\"id\":1,\"result\":{\"n\":3}}")
		case last == "":
			event(w, "id: 1-2\ndata:")
			<-r.Context().Done()
		case last == "1-2":
			event(w, "id: 1-3\ndata: {\"jsonrpc\":\"2.0\",\"method\":\"notifications/message\",\"params\":{}}")
			<-r.Context().Done()
		default:
			held(w, r)
		}
	}))
	c.say(initializeLine, initializedLine)
	c.hear(`"id":0`)
	c.say(callLine("1", "x"))
	seen := ""
	for range 4 {
		seen += c.hear() + "\n"
	}
	for _, want := range []string{`"n":1`, `"n":2`, `"n":3`, "notifications/message"} {
		if strings.Count(seen, want) != 1 {
			t.Errorf("%s is not there once:\n%s", want, seen)
		}
	}
	c.end()
	if n := c.count("DELETE  s1"); n != 1 {
		t.Errorf("the session was ended %d times", n)
	}
}

// What may have an effect and broke off before an event had an id is not sent
// again, and its client is told that nobody knows; what only reads is.
func TestConnectBroken(t *testing.T) {
	for _, era := range []string{"legacy", "modern"} {
		t.Run(era, func(t *testing.T) {
			c := connectTo(t, quick, legacyGateway(func(c *connected, w http.ResponseWriter, r *http.Request, m *jsonrpc.Message) {
				switch {
				case r.Method == http.MethodGet:
					held(w, r)
				case m.Method() == "tools/list" && c.count("POST tools/list s1")+c.count("POST tools/list") > 2:
					answer(w, m, `{"tools":[]}`)
				default:
					broken()
				}
			}))
			if era == "legacy" {
				c.say(initializeLine, initializedLine)
				c.hear(`"id":0`)
				c.say(callLine("1", "x"))
				c.hear(`"id":1`, `"code":"unknown"`, "was not sent again")
				c.say(`{"jsonrpc":"2.0","id":2,"method":"tools/list"}`)
			} else {
				c.say(modernLine("1", "tools/call", `"name":"x",`))
				c.hear(`"id":1`, `"code":"unknown"`, "was not sent again")
				c.say(modernLine("2", "tools/list", ""))
			}
			c.hear(`"id":2`, `"result":{"tools":[]}`)
			if n := c.count("POST tools/call s1") + c.count("POST tools/call"); n != 1 {
				t.Errorf("the call was sent %d times", n)
			}
			c.end()
		})
	}
}

// A gateway that is not there gets what waits for it when it comes; who waits
// too long is told, and that it is safe to try again.
func TestConnectLater(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	addr := ln.Addr().String()
	if err := ln.Close(); err != nil {
		t.Fatal(err)
	}
	times := quick
	times.patience = 200 * time.Millisecond
	c := &connected{t: t, lines: make(chan string, 64), ended: make(chan error, 1)}
	c.run("http://"+addr, times)
	c.say(modernLine("1", "tools/call", `"name":"x",`))
	c.hear(`"id":1`, `"code":"unreachable"`, "It is safe to try again", addr)
	if !strings.Contains(c.said.String(), "no gateway answers at http://"+addr) {
		t.Errorf("it said %q", &c.said)
	}
	c.say(modernLine("2", "tools/call", `"name":"x",`), `{"jsonrpc":"2.0","method":"notifications/cancelled","params":{"requestId":2}}`)
	c.end()

	c = &connected{t: t, lines: make(chan string, 64), ended: make(chan error, 1)}
	c.run("http://"+addr, quick)
	c.say(modernLine("3", "tools/call", `"name":"x",`))
	for !strings.Contains(c.said.String(), "no gateway answers") {
		<-time.After(time.Millisecond)
	}
	if ln, err = net.Listen("tcp", addr); err != nil {
		t.Fatal(err)
	}
	server := &httptest.Server{Listener: ln, Config: &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		if m, err := jsonrpc.Decode(body, jsonrpc.Limits{}); err == nil {
			answer(w, m, "{}")
		}
	})}}
	server.Start()
	t.Cleanup(server.Close)
	c.hear(`"id":3`, `"result":{}`)
	c.end()
}

// A session that the gateway has ended is opened again, unnoticed: with what the
// client said when it opened the first, its level and its subscriptions. What
// was under way in the old one ends with an error that says so.
func TestConnectSessionEnded(t *testing.T) {
	begun := make(chan struct{})
	over := make(chan struct{})
	again := make(chan struct{}, 1) // the second session has its stream
	c := connectTo(t, quick, legacyGateway(func(c *connected, w http.ResponseWriter, r *http.Request, m *jsonrpc.Message) {
		old := r.Header.Get("Mcp-Session-Id") == "s1"
		select {
		case <-over:
			if old {
				w.WriteHeader(http.StatusNotFound)
				_, _ = io.WriteString(w, `{"jsonrpc":"2.0","id":null,"error":{"code":-32001,"message":"Session not found"}}`)
				return
			}
		default:
		}
		switch {
		case r.Method == http.MethodGet && r.Header.Get("Last-Event-Id") == "":
			select {
			case <-over:
			case <-r.Context().Done():
			}
			if !old {
				again <- struct{}{}
				held(w, r)
			}
		case m != nil && m.Method() == "tools/call" && strings.Contains(string(m.Raw()), "slow"):
			event(w, "id: 7-8\ndata:")
			close(begun)
			<-over
			broken()
		default:
			answer(w, m, `{"in":"`+r.Header.Get("Mcp-Session-Id")+`"}`)
		}
	}))
	c.say(initializeLine, initializedLine)
	c.hear(`"id":0`)
	for i, line := range []string{
		`{"jsonrpc":"2.0","id":1,"method":"logging/setLevel","params":{"level":"debug"}}`,
		`{"jsonrpc":"2.0","id":2,"method":"resources/subscribe","params":{"uri":"a"}}`,
		`{"jsonrpc":"2.0","id":3,"method":"resources/subscribe","params":{"uri":"b"}}`,
		`{"jsonrpc":"2.0","id":4,"method":"resources/unsubscribe","params":{"uri":"a"}}`,
	} {
		c.say(line)
		c.hear(fmt.Sprintf(`"id":%d`, i+1), `"in":"s1"`)
	}
	c.say(callLine("5", "slow"))
	<-begun
	close(over)
	c.hear(`"id":5`, `"code":"session_ended"`)
	c.say(callLine("6", "quick"))
	c.hear(`"id":6`, `"in":"s2"`)
	<-again
	c.end()
	for request, n := range map[string]int{
		"POST initialize": 2, "POST notifications/initialized s2": 1, "POST logging/setLevel s2": 1, "POST resources/subscribe s2": 1,
		"POST resources/unsubscribe s2": 0, "GET  s2": 1, "DELETE  s2": 1, "DELETE  s1": 0,
	} {
		if got := c.count(request); got != n {
			t.Errorf("%d times %s, want %d", got, request, n)
		}
	}
}

// Who is sent away at the door comes again; what is refused inside is for the
// client to judge, in the gateway's bytes.
func TestConnectTurnedAway(t *testing.T) {
	c := connectTo(t, quick, func(c *connected, w http.ResponseWriter, r *http.Request, m *jsonrpc.Message) {
		name, _ := m.Params().Get("name").Text()
		w.Header().Set("Content-Type", "application/json")
		switch {
		case name == "door" && c.count("POST tools/call") < 3:
			w.Header().Set("Retry-After", "0")
			w.WriteHeader(http.StatusServiceUnavailable)
			_, _ = io.WriteString(w, `{"jsonrpc":"2.0","error":{"code":-32603,"message":"the gateway is shutting down: try again"}}`)
		case name == "door":
			answer(w, m, "{}")
		case name == "inside":
			w.Header().Set("Retry-After", "1")
			w.WriteHeader(http.StatusServiceUnavailable)
			_, _ = fmt.Fprintf(w, "{\"jsonrpc\":\"2.0\",\n\t\"id\":%s,\"error\":{\"code\":-32603,\"message\":\"overloaded\",\"data\":1.0}}", m.ID().Raw())
		case name == "token":
			w.WriteHeader(http.StatusUnauthorized)
			_, _ = io.WriteString(w, `{"jsonrpc":"2.0","error":{"code":-32600,"message":"no such token","data":{"a":1.0}}}`)
		case name == "page":
			w.WriteHeader(http.StatusForbidden)
			_, _ = io.WriteString(w, "<html>\x1b[2J")
		case name == "elsewhere":
			w.Header().Set("Location", "http://127.0.0.1:1/")
			w.WriteHeader(http.StatusTemporaryRedirect)
		case name == "other":
			_, _ = io.WriteString(w, `{"jsonrpc":"2.0","id":99,"result":{}}`)
		case name == "nothing":
			w.WriteHeader(http.StatusAccepted)
		}
	})
	for _, k := range []struct{ name, want string }{
		{"door", `{"jsonrpc":"2.0","id":1,"result":{}}`},
		{"inside", "{\"jsonrpc\":\"2.0\", \t" + `"id":1,"error":{"code":-32603,"message":"overloaded","data":1.0}}`},
		{"token", `{"jsonrpc":"2.0","error":{"code":-32600,"message":"no such token","data":{"a":1.0}},"id":1}`},
		{"page", `"message":"The request was not carried out: the gateway refuses it: HTTP 403 <html>`},
		{"elsewhere", `the gateway refuses it: HTTP 307`},
		{"other", `it answers another request`},
		{"nothing", `HTTP 202 without an answer`},
	} {
		c.say(modernLine("1", "tools/call", `"name":"`+k.name+`",`))
		c.hear(k.want)
	}
	c.end()
}

// A subscription goes on over whatever happens to the gateway. The client is
// told of what it may have missed.
func TestConnectListens(t *testing.T) {
	const ack = `data: {"jsonrpc":"2.0","method":"notifications/subscriptions/acknowledged","params":{"notifications":{"toolsListChanged":true,"resourceSubscriptions":["x:1"]},"_meta":{"io.modelcontextprotocol/subscriptionId":"l"}}}`
	left := make(chan struct{})
	c := connectTo(t, quick, func(c *connected, w http.ResponseWriter, r *http.Request, m *jsonrpc.Message) {
		if m.Method() != "subscriptions/listen" {
			answer(w, m, "{}")
			return
		}
		switch c.count("POST subscriptions/listen") {
		case 1:
			event(w, ack)
			broken()
		case 2: // the gateway shuts down
			event(w, ack)
			<-time.After(100 * time.Millisecond)
			event(w, `data: {"jsonrpc":"2.0","id":"l","result":{"resultType":"complete"}}`)
			return
		case 3:
			w.Header().Set("Retry-After", "0")
			w.WriteHeader(http.StatusServiceUnavailable)
			_, _ = io.WriteString(w, `{"jsonrpc":"2.0","error":{"code":-32603,"message":"the gateway is shutting down: try again"}}`)
			return
		}
		event(w, ack)
		event(w, `data: {"jsonrpc":"2.0","method":"notifications/tools/list_changed","params":{"n":2}}`)
		<-r.Context().Done()
		close(left)
	})
	c.say(modernLine(`"l"`, "subscriptions/listen", `"notifications":{"toolsListChanged":true},`))
	c.hear("acknowledged")
	for range 2 {
		c.hear(`"method":"notifications/tools/list_changed"`, `"_meta":{"io.modelcontextprotocol/subscriptionId":"l"}`)
		c.hear(`"method":"notifications/resources/updated","params":{"uri":"x:1",`)
	}
	c.hear(`"n":2`)
	c.say(`{"jsonrpc":"2.0","method":"notifications/cancelled","params":{"requestId":"l"}}`)
	<-left
	c.say(modernLine("2", "tools/call", `"name":"x",`))
	c.hear(`"id":2`)
	c.end()
	if n := c.count("POST notifications/cancelled"); n != 0 {
		t.Errorf("the client's wish was forwarded %d times", n)
	}
}

// What is too much is refused, and what goes on goes on.
func TestConnectBounds(t *testing.T) {
	release := make(chan struct{})
	c := connectTo(t, quick, func(_ *connected, w http.ResponseWriter, r *http.Request, m *jsonrpc.Message) {
		select {
		case <-release:
		case <-r.Context().Done():
		}
		answer(w, m, "{}")
	})
	for i := range connectCalls {
		c.say(modernLine(fmt.Sprint(i), "tools/call", `"name":"x",`))
	}
	c.say(modernLine("0", "tools/call", `"name":"x",`))
	c.hear(`"id":0,`, "must not be used twice")
	c.say(modernLine(`"more"`, "tools/call", `"name":"x",`))
	c.hear(`"id":"more"`, "Too many requests")
	c.say(strings.Repeat("x", connectLine+1), `{"a":"`+strings.Repeat("x", 3*connectLine)+`"}`)
	c.hear(`"id":null`, "longer than")
	c.hear(`"id":null`, "longer than")
	c.say("", "\t\r", `[]`, `{"jsonrpc":"2.0","id":1,"method":"x"`, `{"jsonrpc":"2.0","id":{},"method":"x"}`)
	c.hear(`"id":null`, "-32600")
	c.hear(`"id":null`, "-32700")
	c.hear(`"id":null`, "-32600")
	close(release)
	for range connectCalls {
		c.hear(`"result":{}`)
	}
	c.end()
}

// A client that is gone ends the program, with its session.
func TestConnectStdoutBroken(t *testing.T) {
	c := connectTo(t, quick, legacyGateway(func(_ *connected, w http.ResponseWriter, r *http.Request, m *jsonrpc.Message) {
		if r.Method == http.MethodGet {
			held(w, r)
			return
		}
		answer(w, m, "{}")
	}))
	c.say(initializeLine, initializedLine)
	c.hear(`"id":0`)
	_ = c.out.CloseWithError(io.ErrClosedPipe)
	c.say(callLine("1", "x"))
	select {
	case err := <-c.ended:
		if !errors.Is(err, io.ErrClosedPipe) {
			t.Errorf("it ends with %v", err)
		}
	case <-time.After(30 * time.Second):
		t.Fatal("it does not end")
	}
	if n := c.count("DELETE  s1"); n != 1 {
		t.Errorf("the session was ended %d times", n)
	}
}

// Lines of any length, with any end, in any pieces.
func TestReadLines(t *testing.T) {
	for _, k := range []struct{ in, want string }{
		{"", ""},
		{"a\nb\r\n\n c \nd", "a|b||c|d"},
		{strings.Repeat("x", 10) + "\n" + strings.Repeat("y", 11) + "\nz", strings.Repeat("x", 10) + "|too long|z"},
		{strings.Repeat("y", 200_000) + "\nz\n", "too long|z"},
		{strings.Repeat("y", 200_000), "too long"},
		{strings.Repeat("x", 10) + "\r\n", strings.Repeat("x", 10)},
	} {
		var got []string
		err := readLines(strings.NewReader(k.in), 10, func(l stdinLine) bool {
			if l.tooLong {
				l.text = []byte("too long")
			}
			got = append(got, string(l.text))
			return true
		})
		if err != nil || strings.Join(got, "|") != k.want {
			t.Errorf("%.20q: %q, %v", k.in, got, err)
		}
	}
}

// FuzzConnect: whatever a client writes and whatever the gateway answers, each
// line that comes out is one message, and each request has one answer at most.
func FuzzConnect(f *testing.F) {
	for _, in := range []string{
		initializeLine + "\n" + initializedLine + "\n" + callLine("1", "x"),
		modernLine("1.0", "tools/call", `"name":"ü\r\n",`) + "\n" + modernLine("2", "tools/list", ""),
		`{"jsonrpc":"2.0","method":"notifications/cancelled","params":{"requestId":1}}`,
		`{"jsonrpc":"2.0","id":"q","result":{}}`, "[]\nx\n{\n\xff",
	} {
		f.Add([]byte(in), []byte(`{"jsonrpc":"2.0","id":1,"result":{"tools":[{"name":"x","inputSchema":{"properties":{"a":{"type":"string","x-mcp-header":"A"}}}}]}}`), false)
		f.Add([]byte(in), []byte("data: {\"jsonrpc\":\"2.0\",\ndata: \"id\":1,\"error\":{}}\n\n"), true)
	}
	f.Fuzz(func(t *testing.T, in, out []byte, stream bool) {
		var stdout bytes.Buffer
		endpoint, _ := url.Parse("http://gateway.invalid/mcp") // a constant
		r := newRelay(endpoint, "", roundTripper(func(req *http.Request) (*http.Response, error) {
			h := http.Header{"Content-Type": {"application/json"}, "Mcp-Session-Id": {"s"}}
			if stream {
				h.Set("Content-Type", "text/event-stream")
			}
			return &http.Response{StatusCode: http.StatusOK, Header: h, Body: io.NopCloser(bytes.NewReader(out)), Request: req}, nil
		}), &stdout, func(string, ...any) {}, relayTimes{
			patience: 20 * time.Millisecond, resume: 5 * time.Millisecond, pause: time.Millisecond, pauses: time.Millisecond,
			order: 5 * time.Millisecond, finish: 50 * time.Millisecond, stop: 20 * time.Millisecond, farewell: 50 * time.Millisecond,
		})
		r.at = nil
		if err := r.run(t.Context(), bytes.NewReader(in)); err != nil {
			t.Fatal(err)
		}
		asked := map[string]int{}
		for line := range bytes.Lines(in) {
			if m, err := jsonrpc.Decode(bytes.TrimSpace(line), jsonrpc.Limits{}); err == nil && m.IsRequest() {
				asked[string(m.ID().Raw())]++
			}
		}
		for line := range bytes.Lines(stdout.Bytes()) {
			m, err := jsonrpc.Decode(bytes.TrimSuffix(line, []byte("\n")), connectAnswerLimits)
			if err != nil || !json.Valid(line) {
				t.Fatalf("%q: %v", line, err)
			}
			if id := string(m.ID().Raw()); m.IsResponse() && id != "null" {
				if asked[id]--; asked[id] < 0 {
					t.Fatalf("an answer too many: %q", line)
				}
			}
		}
	})
}

type roundTripper func(*http.Request) (*http.Response, error)

func (f roundTripper) RoundTrip(r *http.Request) (*http.Response, error) { return f(r) }

// A call is made again with other headers only when the status says that it was
// refused for those: the code alone may come from who has begun it.
func TestConnectMismatch(t *testing.T) {
	for _, status := range []int{http.StatusOK, http.StatusBadRequest} {
		c := connectTo(t, quick, func(c *connected, w http.ResponseWriter, r *http.Request, m *jsonrpc.Message) {
			switch {
			case m.Method() == "tools/list":
				answer(w, m, `{"tools":[{"name":"x","inputSchema":{"type":"object","properties":{"a":{"type":"string","x-mcp-header":"A"}}}}]}`)
			case r.Header.Get("Mcp-Param-A") == "1":
				answer(w, m, `{}`)
			default:
				w.Header().Set("Content-Type", "application/json")
				w.WriteHeader(status)
				_, _ = w.Write(jsonrpc.ErrorResponse(m.ID().Raw(), jsonrpc.CodeHeaderMismatch, "Header mismatch", nil))
			}
		})
		c.say(modernLine("1", "tools/call", `"name":"x","arguments":{"a":"1"},`))
		want, calls := `"result":{}`, 2
		if status == http.StatusOK {
			want, calls = `"code":-32020`, 1
		}
		c.hear(`"id":1`, want)
		if n := c.count("POST tools/call"); n != calls {
			t.Errorf("after HTTP %d the call was sent %d times, want %d", status, n, calls)
		}
		c.end()
	}
}

// Where a gateway offers HTTP/2 it is not taken: see newConnectTransport.
func TestConnectHTTP1(t *testing.T) {
	protos := make(chan string, 1)
	server := httptest.NewUnstartedServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) { protos <- r.Proto }))
	server.EnableHTTP2 = true
	server.StartTLS()
	t.Cleanup(server.Close)
	transport := newConnectTransport()
	defer transport.CloseIdleConnections()
	transport.TLSClientConfig = &tls.Config{RootCAs: x509.NewCertPool()}
	transport.TLSClientConfig.RootCAs.AddCert(server.Certificate())
	resp, err := (&http.Client{Transport: transport}).Post(server.URL, "application/json", strings.NewReader("{}"))
	if err != nil {
		t.Fatal(err)
	}
	_ = resp.Body.Close()
	if proto := <-protos; proto != "HTTP/1.1" {
		t.Errorf("it speaks %s", proto)
	}
}
