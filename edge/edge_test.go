package edge_test

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"runtime"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"waybill.dev/edge"
	"waybill.dev/schemas/sse"
)

// TestMain fails when a test leaves a goroutine behind.
func TestMain(m *testing.M) {
	before := runtime.NumGoroutine()
	code := m.Run()
	deadline := time.Now().Add(5 * time.Second)
	fuzzing := flag.Lookup("test.fuzz").Value.String() != "" // has goroutines of its own
	for code == 0 && !fuzzing && runtime.NumGoroutine() > before {
		if time.Now().After(deadline) {
			buf := make([]byte, 1<<20)
			fmt.Printf("goroutines left:\n%s\n", buf[:runtime.Stack(buf, true)])
			code = 1
		}
		runtime.Gosched()
	}
	os.Exit(code)
}

var who = edge.Principal{Tenant: "acme", Agent: "researcher"}

func echo(w http.ResponseWriter, r *http.Request, p edge.Principal) {
	_, _ = fmt.Fprintf(w, "%s/%s %s", p.Tenant, p.Agent, edge.Body(r))
}

// start runs a server on loopback. When it has been stopped nothing is left.
func start(t *testing.T, o edge.Options, routes ...edge.Route) (s *edge.Server, addr string, stop func()) {
	t.Helper()
	if len(routes) == 0 {
		routes = []edge.Route{{Pattern: "POST /x", Serve: echo}}
	}
	if o.Anonymous == nil && o.Tokens == nil {
		o.Anonymous = &who
	}
	s, err := edge.New(o, routes...)
	if err != nil {
		t.Fatal(err)
	}
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx, ln) }()
	stop = sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
		if st := s.Stats(); st.InFlight != 0 || st.Connections != 0 || st.Tenants["acme"] != 0 || st.Bodies != 0 {
			t.Errorf("left behind: %+v", st)
		}
	})
	t.Cleanup(stop)
	return s, ln.Addr().String(), stop
}

func dial(t *testing.T, addr string) net.Conn {
	t.Helper()
	conn, err := net.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	if err := conn.SetDeadline(time.Now().Add(20 * time.Second)); err != nil {
		t.Fatal(err)
	}
	return conn
}

// talk sends bytes and reads one answer, "status body".
func talk(t *testing.T, addr, request string) (*http.Response, string) {
	t.Helper()
	conn := dial(t, addr)
	if _, err := io.WriteString(conn, strings.ReplaceAll(request, "\n", "\r\n")); err != nil {
		t.Fatal(err)
	}
	return read(t, conn)
}

func read(t *testing.T, conn io.Reader) (*http.Response, string) {
	t.Helper()
	res, err := http.ReadResponse(bufio.NewReader(conn), nil)
	if err != nil {
		t.Fatal(err)
	}
	body, err := io.ReadAll(res.Body)
	if err != nil {
		t.Fatal(err)
	}
	return res, string(body)
}

const post = "POST /x HTTP/1.1\nContent-Type: application/json\nContent-Length: 2\n"

// What the shell lets pass and what it refuses, and with what.
func TestGates(t *testing.T) {
	token := func(s string) [32]byte { return sha256.Sum256([]byte(s)) }
	s, addr, _ := start(t, edge.Options{
		Hosts: []string{"gw.example", "Other.Example:8443"}, Origins: []string{"https://console.example"}, MaxBody: 10,
		Anonymous: &who,
		Tokens:    map[[32]byte]edge.Principal{token("good"): {Tenant: "globex", Agent: "bot"}},
	})
	_, port, _ := net.SplitHostPort(addr)
	for _, c := range []struct {
		request string
		status  int
		body    string // contained in the answer
	}{
		{post + "Host: localhost\n\n{}", 200, "acme/researcher {}"},
		{post + "Host: LOCALHOST.:1\n\n{}", 200, ""},
		{post + "Host: 127.0.0.1:9\n\n{}", 200, ""},
		{post + "Host: 127.8.8.8\n\n{}", 200, ""},
		{post + "Host: [::1]:9\n\n{}", 200, ""},
		{post + "Host: gw.example:7\n\n{}", 200, ""},
		{post + "Host: other.example:8443\n\n{}", 200, ""},
		{post + "Host: other.example:8444\n\n{}", 403, `"code":"host"`},
		{post + "Host: evil.example\n\n{}", 403, `"code":"host"`},
		{post + "Host: localhost.evil.example\n\n{}", 403, `"code":"host"`},
		{post + "Host: 10.0.0.1\n\n{}", 403, `"code":"host"`},
		{post + "Host: localhost:" + port + "\nOrigin: http://localhost:" + port + "\n\n{}", 200, ""},
		{post + "Host: localhost:" + port + "\nOrigin: http://127.0.0.1:" + port + "\n\n{}", 200, ""},
		{post + "Host: localhost\nOrigin: https://console.example\n\n{}", 200, ""},
		{post + "Host: gw.example\nOrigin: https://gw.example\n\n{}", 200, ""},
		{post + "Host: localhost:" + port + "\nOrigin: http://localhost:1\n\n{}", 403, `"code":"origin"`},
		{post + "Host: localhost:" + port + "\nOrigin: http://evil.example:" + port + "\n\n{}", 403, `"code":"origin"`},
		{post + "Host: localhost\nOrigin: null\n\n{}", 403, `"code":"origin"`},
		{post + "Host: localhost\nOrigin: https://console.example\nOrigin: https://console.example\n\n{}", 403, `"code":"origin"`},
		{post + "Host: localhost\nOrigin: https://console.example.evil.example\n\n{}", 403, `"code":"origin"`},
		{post + "Host: localhost\nAuthorization: Bearer good\n\n{}", 200, "globex/bot"},
		{post + "Host: localhost\nAuthorization: bearer  good\n\n{}", 200, "globex/bot"},
		{post + "Host: localhost\nAuthorization: Bearer bad\n\n{}", 401, `"code":"token"`},
		{post + "Host: localhost\nAuthorization: Bearer\n\n{}", 401, `"code":"token"`},
		{post + "Host: localhost\nAuthorization: \n\n{}", 401, `"code":"token"`},
		{post + "Host: localhost\nAuthorization: Basic good\n\n{}", 401, `"code":"token"`},
		{post + "Host: localhost\nAuthorization: Bearer good\nAuthorization: Bearer good\n\n{}", 401, `"code":"token"`},
		{"POST /x HTTP/1.1\nHost: localhost\nContent-Length: 2\n\n{}", 415, `"code":"content_type"`},
		{"POST /x HTTP/1.1\nHost: localhost\nContent-Type: text/plain\nContent-Length: 2\n\n{}", 415, `"code":"content_type"`},
		{"POST /x HTTP/1.1\nHost: localhost\nContent-Type: application/json; charset=utf-8\nContent-Length: 2\n\n{}", 200, ""},
		{post + "Host: localhost\nContent-Encoding: gzip\n\n{}", 415, "uncompressed"},
		{post + "Host: localhost\nContent-Encoding: identity\n\n{}", 200, ""},
		{"POST /x HTTP/1.1\nContent-Type: application/json\nHost: localhost\nContent-Length: 11\n\n0123456789A", 413, "at most 10 bytes"},
		{"POST /x HTTP/1.1\nContent-Type: application/json\nHost: localhost\nContent-Length: 104857600\n\n", 413, "at most 10 bytes"},
		{"POST /x HTTP/1.1\nContent-Type: application/json\nHost: localhost\nTransfer-Encoding: chunked\n\n5\n01234\n6\n567890\n0\n\n", 413, "at most 10 bytes"},
		{"POST /x HTTP/1.1\nContent-Type: application/json\nHost: localhost\nTransfer-Encoding: chunked\n\n2\n{}\n0\n\n", 200, "{}"},
		{"POST /x HTTP/1.1\nContent-Type: application/json\nHost: localhost\nTransfer-Encoding: chunked\n\nzz\n", 400, `"code":"body"`},
		{"GET /x HTTP/1.1\nHost: localhost\n\n", 405, `"code":"method"`},
		{"DELETE /x HTTP/1.1\nHost: localhost\n\n", 405, ""},
		{"GET /nothing HTTP/1.1\nHost: localhost\n\n", 404, `"code":"path"`},
		{"GET //x HTTP/1.1\nHost: localhost\n\n", 404, `"code":"path"`},
		{"OPTIONS * HTTP/1.1\nHost: localhost\n\n", 404, `"code":"path"`},
	} {
		res, body := talk(t, addr, c.request)
		if res.StatusCode != c.status || !strings.Contains(body, c.body) {
			t.Errorf("%s\ngot %d %s, want %d %s", c.request, res.StatusCode, body, c.status, c.body)
		}
		if res.Header.Get("Cache-Control") != "no-store" || res.Header.Get("X-Content-Type-Options") != "nosniff" {
			t.Errorf("%s\nheaders %v", c.request, res.Header)
		}
		if c.status >= 400 && res.Header.Get("Content-Type") != "application/json" {
			t.Errorf("%s\nheaders %v", c.request, res.Header)
		}
		if (c.status == 401) != strings.HasPrefix(res.Header.Get("Www-Authenticate"), "Bearer ") {
			t.Errorf("%s\nheaders %v", c.request, res.Header)
		}
		if (c.status == 405) != (res.Header.Get("Allow") == "POST") {
			t.Errorf("%s\nheaders %v", c.request, res.Header)
		}
	}
	st := s.Stats()
	if st.Refused[edge.CauseHost] != 4 || st.Refused[edge.CauseToken] != 5 || st.Refused[edge.CauseBodySize] != 3 || st.Served == 0 {
		t.Errorf("%+v", st)
	}
}

// Without an anonymous principal a token is needed, and a route may word the
// refusal in its own way.
func TestNoAnonymous(t *testing.T) {
	_, addr, _ := start(t, edge.Options{Tokens: map[[32]byte]edge.Principal{{}: who}}, edge.Route{
		Pattern: "POST /x", Serve: echo,
		Refuse: func(status int, c edge.Cause, m string) []byte {
			return fmt.Appendf(nil, "%d %s %s", status, c, m)
		},
	})
	if res, body := talk(t, addr, post+"Host: localhost\n\n{}"); res.StatusCode != 401 || !strings.HasPrefix(body, "401 token a bearer") {
		t.Errorf("%d %s", res.StatusCode, body)
	}
}

// Where any token will do, who brings one that is not known is nobody in
// particular, and not refused.
func TestAnyToken(t *testing.T) {
	_, addr, _ := start(t, edge.Options{Anonymous: &who, AnyToken: true, Tokens: map[[32]byte]edge.Principal{sha256.Sum256([]byte("good")): {Tenant: "globex", Agent: "bot"}}})
	for header, want := range map[string]string{"": "acme/researcher", "Authorization: Bearer bad\n": "acme/researcher", "Authorization: Bearer good\n": "globex/bot"} {
		if res, body := talk(t, addr, post+"Host: localhost\n"+header+"\n{}"); res.StatusCode != 200 || !strings.HasPrefix(body, want) {
			t.Errorf("%q: %d %s", header, res.StatusCode, body)
		}
	}
}

// Options that cannot be meant are refused at once.
func TestNewRefuses(t *testing.T) {
	ok := edge.Route{Pattern: "/x", Serve: echo}
	for name, err := range map[string]error{
		"host":      second(edge.New(edge.Options{Hosts: []string{"http://x"}}, ok)),
		"origin":    second(edge.New(edge.Options{Origins: []string{"console.example"}}, ok)),
		"path":      second(edge.New(edge.Options{Origins: []string{"https://console.example/"}}, ok)),
		"principal": second(edge.New(edge.Options{Anonymous: &edge.Principal{Tenant: "Acme"}}, ok)),
		"pattern":   second(edge.New(edge.Options{}, edge.Route{Pattern: "x", Serve: echo})),
		"twice":     second(edge.New(edge.Options{}, ok, ok)),
	} {
		if err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
	s, err := edge.New(edge.Options{Anonymous: &who}, ok)
	if err != nil {
		t.Fatal(err)
	}
	ln, err := net.Listen("tcp", "0.0.0.0:0")
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Run(t.Context(), ln); err == nil || !strings.Contains(err.Error(), "loopback") {
		t.Errorf("anonymous for everybody: %v", err)
	}
}

func second(_ *edge.Server, err error) error { return err }

// Garbage and what is cut off get a 4xx or a closed connection.
func TestGarbage(t *testing.T) {
	_, addr, _ := start(t, edge.Options{})
	for request, want := range map[string]string{
		"\x16\x03\x01\x02\x00garbage\n\n":                 "400",
		"GET\n\n":                                         "400",
		"POST /x HTTP/1.1\n\n":                            "400", // no Host
		"POST /x HTTP/1.1\nHost: a\nHost: b\n\n":          "400",
		post + "Host: localhost\nContent-Length: 3\n\n{}": "400",
		post + "Host: localhost\nBig: " + strings.Repeat("x", 80<<10) + "\n\n{}":            "431",
		"POST /x HTTP/1.1\nHost: localhost\nTransfer-Encoding: gzip\nContent-Length: 2\n\n": "501",
	} {
		if res, body := talk(t, addr, request); !strings.HasPrefix(res.Status, want) {
			t.Errorf("%.60q: %s %s", request, res.Status, body)
		}
	}
	// Half closed before the body is whole.
	conn := dial(t, addr)
	fmt.Fprint(conn, "POST /x HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 9\r\n\r\n{}")
	conn.(*net.TCPConn).CloseWrite()
	if res, body := read(t, conn); res.StatusCode != 400 || !strings.Contains(body, "ended before it was complete") {
		t.Errorf("half closed: %s %s", res.Status, body)
	}
}

// A slow header closes the connection, a slow body is answered 408, and so is
// one that nobody wanted to read. None keeps the server busy.
func TestSlowLoris(t *testing.T) {
	const limit = 300 * time.Millisecond
	_, addr, _ := start(t, edge.Options{HeaderTimeout: limit, BodyTimeout: limit, IdleTimeout: limit})
	for name, c := range map[string]struct{ send, want string }{
		"nothing":      {"", ""},
		"header":       {"POST /x HTTP/1.1\r\nHost: loc", ""},
		"body":         {"POST /x HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 9\r\n\r\n{", "HTTP/1.1 408 "},
		"refused body": {"POST /x HTTP/1.1\r\nHost: evil\r\nContent-Type: application/json\r\nContent-Length: 9\r\n\r\n{", "HTTP/1.1 403 "},
		"idle":         {"POST /x HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}", "HTTP/1.1 200 "},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			conn := dial(t, addr)
			if _, err := io.WriteString(conn, c.send); err != nil {
				t.Fatal(err)
			}
			got, err := io.ReadAll(conn) // until the server closes
			if err != nil && !errors.Is(err, io.EOF) && !strings.Contains(err.Error(), "reset") {
				t.Error(err)
			}
			if !strings.HasPrefix(string(got), c.want) || c.want == "" && strings.Contains(string(got), "200") {
				t.Errorf("got %q", got)
			}
		})
	}
}

// Calls beyond the limits are refused, and streams count as long as they last.
func TestInFlight(t *testing.T) {
	hold, held := make(chan struct{}), make(chan struct{}, 10)
	token := func(s string) [32]byte { return sha256.Sum256([]byte(s)) }
	s, addr, _ := start(t, edge.Options{
		MaxInFlight: 3, MaxInFlightTenant: 2,
		Tokens: map[[32]byte]edge.Principal{
			token("a"): {Tenant: "acme", Agent: "a"}, token("b"): {Tenant: "globex", Agent: "b"}, token("c"): {Tenant: "initech", Agent: "c"},
		},
	}, edge.Route{Pattern: "POST /x", Serve: func(w http.ResponseWriter, r *http.Request, p edge.Principal) {
		st := edge.NewStream(w, edge.StreamOptions{})
		_ = st.Open()
		held <- struct{}{}
		<-hold
		_, _ = st.Last(&sse.Event{Data: []byte("bye")})
	}})
	request := func(token string) string { return post + "Host: localhost\nAuthorization: Bearer " + token + "\n\n{}" }
	for _, token := range []string{"a", "a", "b"} {
		if token == "b" { // the tenant's limit, before the gateway's is reached
			if res, body := talk(t, addr, request("a")); res.StatusCode != 429 || res.Header.Get("Retry-After") == "" || !strings.Contains(body, "acme") {
				t.Errorf("%s %s", res.Status, body)
			}
		}
		fmt.Fprint(dial(t, addr), strings.ReplaceAll(request(token), "\n", "\r\n"))
		<-held
	}
	if res, body := talk(t, addr, request("c")); res.StatusCode != 503 || res.Header.Get("Retry-After") == "" {
		t.Errorf("%s %s", res.Status, body)
	}
	if st := s.Stats(); st.InFlight != 3 || st.Tenants["acme"] != 2 || st.Refused[edge.CauseInFlight] != 1 || st.Refused[edge.CauseInFlightTenant] != 1 {
		t.Errorf("%+v", st)
	}
	close(hold)
}

// Streams that are only listened to have limits of their own, and take no place
// from the calls.
func TestStreams(t *testing.T) {
	hold, held := make(chan struct{}), make(chan struct{}, 10)
	token := func(s string) [32]byte { return sha256.Sum256([]byte(s)) }
	s, addr, _ := start(t, edge.Options{
		MaxInFlight: 1, MaxStreams: 3, MaxStreamsTenant: 2,
		Tokens: map[[32]byte]edge.Principal{
			token("a"): {Tenant: "acme", Agent: "a"}, token("b"): {Tenant: "globex", Agent: "b"}, token("c"): {Tenant: "initech", Agent: "c"},
		},
	}, edge.Route{Pattern: "POST /x", Serve: echo}, edge.Route{Pattern: "GET /x", Stream: true, Serve: func(w http.ResponseWriter, r *http.Request, p edge.Principal) {
		st := edge.NewStream(w, edge.StreamOptions{})
		_ = st.Open()
		held <- struct{}{}
		<-hold
		st.Stop()
	}})
	request := func(token string) string {
		return "GET /x HTTP/1.1\nHost: localhost\nAuthorization: Bearer " + token + "\n\n"
	}
	for _, token := range []string{"a", "a", "b"} {
		if token == "b" {
			if res, body := talk(t, addr, request("a")); res.StatusCode != 429 || res.Header.Get("Retry-After") == "" || !strings.Contains(body, "acme has 2 streams open") {
				t.Errorf("%s %s", res.Status, body)
			}
		}
		fmt.Fprint(dial(t, addr), strings.ReplaceAll(request(token), "\n", "\r\n"))
		<-held
	}
	if res, body := talk(t, addr, request("c")); res.StatusCode != 503 || res.Header.Get("Retry-After") == "" || !strings.Contains(body, "has 3 streams open") {
		t.Errorf("%s %s", res.Status, body)
	}
	if st := s.Stats(); st.Streams != 3 || st.InFlight != 0 || st.Refused[edge.CauseStreams] != 1 || st.Refused[edge.CauseStreamsTenant] != 1 {
		t.Errorf("%+v", st)
	}
	if res, body := talk(t, addr, post+"Host: localhost\nAuthorization: Bearer a\n\n{}"); res.StatusCode != 200 {
		t.Errorf("a call: %s %s", res.Status, body)
	}
	close(hold)
}

// Connections beyond the limit are closed as they come.
func TestMaxConns(t *testing.T) {
	s, addr, _ := start(t, edge.Options{MaxConns: 1})
	first := dial(t, addr)
	fmt.Fprint(first, strings.ReplaceAll(post+"Host: localhost\n\n{}", "\n", "\r\n"))
	read(t, first)
	if _, err := dial(t, addr).Read(make([]byte, 1)); err == nil {
		t.Error("second connection was served")
	}
	if s.Stats().Refused[edge.CauseConns] != 1 {
		t.Errorf("%+v", s.Stats())
	}
}

// A panic is a 500, or a broken connection when the answer had begun; the
// server goes on either way.
func TestPanics(t *testing.T) {
	var log bytes.Buffer
	s, addr, stop := start(t, edge.Options{Log: slog.New(slog.NewTextHandler(&log, nil))}, edge.Route{
		Pattern: "POST /x", Serve: func(w http.ResponseWriter, r *http.Request, p edge.Principal) {
			if string(edge.Body(r)) == "{}" {
				w.Header().Set("X-Half", "done")
				panic("boom")
			}
			_, _ = io.WriteString(w, strings.Repeat("x", 10000))
			panic("late")
		}})
	if res, body := talk(t, addr, post+"Host: localhost\n\n{}"); res.StatusCode != 500 || strings.Contains(body, "boom") || res.Header.Get("X-Half") != "" {
		t.Errorf("%s %s %v", res.Status, body, res.Header)
	}
	conn := dial(t, addr)
	fmt.Fprint(conn, strings.ReplaceAll(post+"Host: localhost\n\n[]", "\n", "\r\n"))
	res, err := http.ReadResponse(bufio.NewReader(conn), nil)
	if err == nil {
		_, err = io.ReadAll(res.Body)
	}
	if err == nil {
		t.Error("half an answer was taken for a whole one")
	}
	stop()
	if s.Stats().Panics != 2 || strings.Count(log.String(), "handler panicked") != 2 || !strings.Contains(log.String(), "boom") {
		t.Errorf("%+v %s", s.Stats(), log.String())
	}
}

// Shutdown lets calls end, refuses new ones, and does not wait for connections
// that never asked for anything.
func TestDrain(t *testing.T) {
	asked, hold := make(chan struct{}), make(chan struct{})
	_, addr, stop := start(t, edge.Options{DrainTimeout: time.Minute}, edge.Route{
		Pattern: "POST /x", Serve: func(w http.ResponseWriter, r *http.Request, p edge.Principal) {
			ctx, release := edge.UntilDrain(r.Context())
			defer release()
			close(asked)
			<-ctx.Done()
			if !errors.Is(context.Cause(ctx), edge.ErrDraining) || r.Context().Err() != nil {
				t.Errorf("%v, %v", context.Cause(ctx), r.Context().Err())
			}
			<-hold
			echo(w, r, p)
		}})
	fresh := dial(t, addr)
	conn := dial(t, addr)
	fmt.Fprint(conn, strings.ReplaceAll(post+"Host: localhost\n\n{}", "\n", "\r\n"))
	<-asked
	stopped := make(chan struct{})
	go func() { stop(); close(stopped) }()
	if _, err := fresh.Read(make([]byte, 1)); err == nil {
		t.Error("fresh connection was left open")
	}
	close(hold)
	if res, body := read(t, conn); res.StatusCode != 200 || body != "acme/researcher {}" {
		t.Errorf("%s %s", res.Status, body)
	}
	<-stopped
}

// What does not end within DrainTimeout has its context ended, and may say so.
func TestDrainCutsOff(t *testing.T) {
	asked := make(chan struct{})
	_, addr, stop := start(t, edge.Options{DrainTimeout: time.Millisecond}, edge.Route{
		Pattern: "POST /x", Serve: func(w http.ResponseWriter, r *http.Request, p edge.Principal) {
			close(asked)
			<-r.Context().Done()
			fmt.Fprint(w, context.Cause(r.Context()))
		}})
	conn := dial(t, addr)
	fmt.Fprint(conn, strings.ReplaceAll(post+"Host: localhost\n\n{}", "\n", "\r\n"))
	<-asked
	go stop()
	if _, body := read(t, conn); body != edge.ErrDraining.Error() {
		t.Error(body)
	}
	stop()
}

// A client that does not read is given up after the write timeout.
func TestSlowReader(t *testing.T) {
	lost := make(chan error, 1)
	_, addr, _ := start(t, edge.Options{WriteTimeout: 50 * time.Millisecond}, edge.Route{
		Pattern: "POST /x", Serve: func(w http.ResponseWriter, r *http.Request, p edge.Principal) {
			st := edge.NewStream(w, edge.StreamOptions{Lost: func(err error) { lost <- err }})
			defer st.Stop()
			big := bytes.Repeat([]byte("x"), 1<<20)
			for st.Send(sse.Event{Data: big}) == nil {
			}
		}})
	fmt.Fprint(dial(t, addr), strings.ReplaceAll(post+"Host: localhost\n\n{}", "\n", "\r\n"))
	if err := <-lost; !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Error(err)
	}
}

// recorder can be read between writes.
type recorder struct {
	mu sync.Mutex
	*httptest.ResponseRecorder
}

func (r *recorder) Write(b []byte) (int, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.ResponseRecorder.Write(b)
}

// The stream's life: nothing, then on its own a comment, then events, and
// nothing after the end.
func TestStream(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := &recorder{ResponseRecorder: httptest.NewRecorder()}
		st := edge.NewStream(w, edge.StreamOptions{Patience: 5 * time.Second, KeepAlive: 15 * time.Second})
		at := func(d time.Duration, want string) {
			t.Helper()
			<-time.After(d)
			synctest.Wait()
			w.mu.Lock()
			defer w.mu.Unlock()
			if w.Body.String() != want {
				t.Errorf("%q, want %q", w.Body, want)
			}
		}
		at(4*time.Second, "")
		at(time.Second, ":\n\n")
		_ = st.Send(sse.Event{Data: []byte("a\nb")})
		at(14*time.Second, ":\n\ndata: a\ndata: b\n\n")
		at(time.Second, ":\n\ndata: a\ndata: b\n\n:\n\n")
		if opened, err := st.Last(&sse.Event{Data: []byte("end")}); !opened || err != nil {
			t.Error(opened, err)
		}
		at(time.Hour, ":\n\ndata: a\ndata: b\n\n:\n\ndata: end\n\n")
		if err := st.Send(sse.Event{}); !errors.Is(err, edge.ErrStreamStopped) {
			t.Error(err)
		}
		h := w.Result().Header
		if h.Get("Content-Type") != "text/event-stream" || h.Get("X-Accel-Buffering") != "no" || !w.Flushed {
			t.Error(h)
		}
	})
}

// What a stream begins with takes the place of the comment that opens it.
func TestStreamFirst(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := &recorder{ResponseRecorder: httptest.NewRecorder()}
		st := edge.NewStream(w, edge.StreamOptions{Patience: time.Second, KeepAlive: time.Second, First: func() *sse.Event {
			w.Header().Set("X-First", "yes")
			return &sse.Event{ID: "1", Data: []byte{}}
		}})
		<-time.After(2 * time.Second)
		synctest.Wait()
		_, _ = st.Last(&sse.Event{Data: []byte("end")})
		if got := w.Body.String(); got != "id: 1\ndata:\n\n:\n\ndata: end\n\n" || w.Result().Header.Get("X-First") != "yes" {
			t.Errorf("%q", got)
		}
	})
}

// A stream that never began leaves the answer to its caller.
func TestStreamNotOpened(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := httptest.NewRecorder()
		st := edge.NewStream(w, edge.StreamOptions{Patience: 5 * time.Second})
		if opened, err := st.Last(&sse.Event{Data: []byte("end")}); opened || err != nil {
			t.Error(opened, err)
		}
		<-time.After(time.Hour)
		edge.WriteJSON(w, 404, []byte("{}"))
		if w.Code != 404 || w.Body.String() != "{}" {
			t.Error(w.Code, w.Body)
		}
	})
}
