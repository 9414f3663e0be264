package test

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"waybill.dev/edge"
	"waybill.dev/edge/mcp"
	"waybill.dev/schemas"
	"waybill.dev/test/gateway"
)

// A call that is in order, for the raw server.
const (
	soundHead   = "Mcp-Method: tools/call\nMcp-Name: a"
	soundBody   = `{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{"name":"a",` + gateway.Meta + `}}`
	soundAnswer = `{"jsonrpc":"2.0","id":"$CALL","result":{"resultType":"complete","content":[]}}`
)

// How much a gateway may grow by garbage, in bytes. What is alive must be next
// to nothing: no body of a call that is over. What is resident may be some
// bodies of the largest size and their parts that the collector has not given
// back yet, and the race detector's notes on them; it does not depend on how
// many there were.
const (
	mostAlive    = 96 << 20
	mostResident = 1 << 30
)

// TestGarbage sends what no client should send, of testdata/garbage/*.txt, to a
// gateway. Each is refused with the words of the file; the upstream hears
// nothing, the log is told nothing, and nothing is left of it in the gateway.
func TestGarbage(t *testing.T) {
	up := newRawServer(t)
	up.serve(answering(soundAnswer))
	g := gateway.Start(t, gateway.Config("servers:\n"+gateway.Native("raw", up.url(), "")+"agents: [{id: researcher, tenant: acme, token_sha256: cd747cb74256709ce755d64f388e4dd9ea251c5ea412f48779dab222aaeae98a}]\ntenants: [{id: acme}]\nauth: {anonymous: researcher}\n"))
	serving(t, g, up) // and everything is warm
	before := measure(t, g)

	files, err := filepath.Glob("testdata/garbage/*.txt")
	if err != nil || len(files) == 0 {
		t.Fatal("no files", err)
	}
	for _, file := range files {
		t.Run(strings.TrimSuffix(filepath.Base(file), ".txt"), func(t *testing.T) {
			golden(t, file, "got", func(t *testing.T, name string, section map[string]string) string {
				calls := up.called()
				got := refused(t, g, section)
				if n := up.called() - calls; n != 0 {
					t.Errorf("the upstream was called %d times", n)
				}
				return got
			})
		})
	}
	// A name that is not served is denied like any other that is not allowed,
	// and so there is a record of it; and one of what names no server, to which the
	// gateway itself says no. Nothing else is in the log.
	asked, itself := 0, map[schemas.CallID]bool{}
	for _, e := range g.Events() {
		switch {
		case e.Session == sound, e.Kind() == schemas.KindOpened:
		case e.Kind() == schemas.KindRequested && e.Data.(*schemas.Requested).Server == schemas.Gateway:
			itself[e.Call] = true
		case itself[e.Call]:
			if c, ok := e.Data.(*schemas.Completed); e.Kind().Ends() && (!ok || c.ErrorCode == 0) {
				t.Errorf("garbage was taken: %s", e.ID())
			}
		case e.Kind() == schemas.KindRequested:
			asked++
		case e.Kind() == schemas.KindDenied:
			asked--
		default:
			t.Errorf("garbage was acted on: %s", e.ID())
		}
	}
	if asked != 0 {
		t.Errorf("%d requests are not denied", asked)
	}
	before.compare(t, g)
	serving(t, g, up)
}

// answering is an upstream that gives every call one answer.
func answering(answer string) func(net.Conn, *received) {
	return func(c net.Conn, r *received) {
		b := strings.ReplaceAll(answer, "$CALL", r.call())
		_, _ = fmt.Fprintf(c, "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s", len(b), b)
	}
}

// call is the call id that the upstream was told.
func (r *received) call() string {
	if m := callID.FindSubmatch(r.body); m != nil {
		return string(m[1])
	}
	return ""
}

// refused is one case of garbage: NAME/request is a head and a body, NAME/wire
// all the bytes. It returns the status, the headers that matter, and the body.
func refused(t *testing.T, g *gateway.Gateway, section map[string]string) string {
	var text string
	if wire, ok := section["wire"]; ok {
		text, _ = unmark(strings.ReplaceAll(strings.TrimSuffix(wire, "\n"), "$HOST", strings.TrimPrefix(g.URL, "http://")))
	} else {
		head, body := split(strings.TrimSuffix(section["request"], "\n"))
		head, _ = unmark(head)
		body, _ = unmark(strings.NewReplacer("␀", "\x00", "␢", "\ufeff", "␦", "\xff").Replace(body))
		text = raw(g, "garbage", head, body)
	}
	conn := dial(t, g)
	var sending sync.WaitGroup
	sending.Go(func() {
		_, _ = io.WriteString(conn, text) // it may well be refused before its end
	})
	resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
	if err != nil {
		t.Fatal(err)
	}
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Error(err)
	}
	_ = conn.Close()
	sending.Wait()
	var out strings.Builder
	fmt.Fprintln(&out, resp.Status)
	for _, k := range []string{"Allow", "Connection", "Location", "Retry-After", "Www-Authenticate"} {
		if v := resp.Header.Get(k); v != "" {
			fmt.Fprintf(&out, "%s: %s\n", k, v)
		}
	}
	if resp.Close && resp.Header.Get("Connection") == "" {
		fmt.Fprintln(&out, "Connection: close")
	}
	return out.String() + strings.TrimSuffix(string(body), "\n") + "\n"
}

// footprint is what a gateway holds.
type footprint struct {
	goroutines map[string]int // by where they stand
	alive      int            // bytes of the heap that are in use
	resident   int            // bytes; 0 where the system does not say
}

func measure(t *testing.T, g *gateway.Gateway) (f footprint) {
	t.Helper()
	http.DefaultClient.CloseIdleConnections() // the CLI's, to the admin API
	f.goroutines = map[string]int{}
	for group := range strings.SplitSeq(profile(t, g, "goroutine?debug=1"), "\n\n") {
		head, stack, _ := strings.Cut(group, "\n")
		if strings.HasPrefix(head, "goroutine profile:") {
			head, stack, _ = strings.Cut(stack, "\n")
		}
		n, _, _ := strings.Cut(head, " @ ")
		count, _ := strconv.Atoi(n) // digits
		where := ""
		for line := range strings.Lines(stack) {
			if at := strings.Split(strings.TrimSpace(line), "\t"); len(at) > 2 {
				name, _, _ := strings.Cut(at[2], "+0x")
				where += "\t" + name + "\n"
			}
		}
		switch {
		case where == "", strings.Contains(where, "admin).guard"): // this request
		case strings.Contains(where, "bus.(*runner).keep") && !strings.Contains(where, "bus.(*runner).handle"):
			// Goroutines that wait for the next event, at most so many however
			// many events there were at once.
		case strings.Contains(where, "server.(*consumer)"), strings.Contains(where, "server.(*consumerFileStore)"):
			// When this test reads a session, the log's server keeps the
			// reader's place for half a minute.
		default:
			f.goroutines[where] += count
		}
	}
	if f.count() == 0 {
		t.Fatal("no goroutines")
	}
	if b, err := os.ReadFile(fmt.Sprintf("/proc/%d/statm", g.Pid())); err == nil {
		pages, _ := strconv.Atoi(strings.Fields(string(b))[1])
		f.resident = pages * os.Getpagesize()
	}
	if m := heapAlloc.FindStringSubmatch(profile(t, g, "heap?gc=1&debug=1")); m != nil {
		f.alive, _ = strconv.Atoi(m[1]) // digits
	}
	return f
}

func (f footprint) count() (n int) {
	for _, c := range f.goroutines {
		n += c
	}
	return n
}

// more lists where there are more goroutines than before.
func (f footprint) more(before footprint) (out string) {
	for _, where := range slices.Sorted(maps.Keys(f.goroutines)) {
		if n := f.goroutines[where] - before.goroutines[where]; n > 0 {
			out += fmt.Sprintf("%d more at\n%s", n, where)
		}
	}
	return out
}

var heapAlloc = regexp.MustCompile(`(?m)^# HeapAlloc = (\d+)$`)

// profile reads one of the gateway's profiles over a connection of its own.
func profile(t *testing.T, g *gateway.Gateway, what string) string {
	t.Helper()
	token, err := os.ReadFile(filepath.Join(g.Dir, "data", "admin.token"))
	if err != nil {
		t.Fatal(err)
	}
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, g.Admin+"/debug/pprof/"+what, nil)
	if err != nil {
		t.Fatal(err)
	}
	req.Close = true
	req.Header.Set("Authorization", "Bearer "+strings.TrimSpace(string(token)))
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = resp.Body.Close() }()
	b, err := io.ReadAll(resp.Body)
	if err != nil || resp.StatusCode != http.StatusOK {
		t.Fatalf("%s: %s %v", what, resp.Status, err)
	}
	return string(b)
}

// compare waits until the gateway holds no more goroutines than before, and
// looks at its memory.
func (f footprint) compare(t *testing.T, g *gateway.Gateway) {
	t.Helper()
	var now footprint
	if !becomes(20*time.Second, func() bool {
		now = measure(t, g)
		return now.count() <= f.count()
	}) {
		t.Errorf("%d goroutines, before there were %d:\n%s", now.count(), f.count(), now.more(f))
	}
	t.Logf("goroutines %d, then %d; alive %d MB, then %d MB; resident %d MB, then %d MB",
		f.count(), now.count(), f.alive>>20, now.alive>>20, f.resident>>20, now.resident>>20)
	if now.alive-f.alive > mostAlive || now.resident-f.resident > mostResident {
		t.Errorf("the gateway has grown by %d MB alive, %d MB resident", (now.alive-f.alive)>>20, (now.resident-f.resident)>>20)
	}
}

// becomes asks again and again whether something has become true.
func becomes(d time.Duration, so func() bool) bool {
	again := time.NewTicker(20 * time.Millisecond)
	defer again.Stop()
	end := time.After(d)
	for !so() {
		select {
		case <-again.C:
		case <-end:
			return false
		}
	}
	return true
}

// sound is the session of the calls that are in order.
var sound = schemas.NewSessionKey("acme", "researcher", "sound")

// serving: a call that is in order is carried out.
func serving(t *testing.T, g *gateway.Gateway, up *rawServer) {
	t.Helper()
	up.serve(answering(soundAnswer))
	calls := up.called()
	resp, body := post(t, g, "sound", soundHead, soundBody)
	if want := strings.ReplaceAll(soundAnswer, `"$CALL"`, "1"); resp.StatusCode != http.StatusOK || body != want || up.called() != calls+1 {
		t.Errorf("not serving any more: %s %s", resp.Status, clip(body))
	}
}

// ended waits for the one ending of the only call of a session, and returns it.
func ended(t *testing.T, g *gateway.Gateway, session string) schemas.Event {
	t.Helper()
	key := schemas.NewSessionKey("acme", "researcher", session)
	var ends []schemas.Event
	if !becomes(20*time.Second, func() bool {
		ends = nil
		for _, e := range g.Session(key) {
			if e.Kind().Ends() {
				ends = append(ends, e)
			}
		}
		return len(ends) > 0
	}) {
		t.Fatalf("the call of session %q has not ended", session)
	}
	if len(ends) != 1 {
		t.Fatalf("the call of session %q has %d endings", session, len(ends))
	}
	return ends[0]
}

// TestLeaving breaks connections at every point of a call.
func TestLeaving(t *testing.T) {
	up := newRawServer(t)
	g := gateway.Start(t, gateway.Config("servers:\n"+gateway.Native("raw", up.url(), "")))
	serving(t, g, up)
	before := measure(t, g)

	unheard := func(name string, run func(t *testing.T)) {
		t.Run(name, func(t *testing.T) {
			calls, events := up.called(), len(g.Events())
			run(t)
			before.compare(t, g)
			if c, e := up.called()-calls, len(g.Events())-events; c != 0 || e != 0 {
				t.Errorf("%d calls of the upstream, %d events", c, e)
			}
		})
	}
	for name, part := range map[string]float64{"nothing sent": 0, "in the request line": 0.01, "in the header": 0.3, "in the body": 0.9} {
		text := raw(g, "leaving", soundHead, soundBody)
		text = text[:int(part*float64(len(text)))]
		unheard(name, func(t *testing.T) {
			conn := dial(t, g)
			if _, err := io.WriteString(conn, text); err != nil {
				t.Fatal(err)
			}
			_ = conn.Close()
		})
		unheard(name+", half closed", func(t *testing.T) {
			conn := dial(t, g)
			if _, err := io.WriteString(conn, text); err != nil {
				t.Fatal(err)
			}
			if err := conn.CloseWrite(); err != nil {
				t.Fatal(err)
			}
			b, err := io.ReadAll(conn)
			if err != nil {
				t.Fatal(err)
			}
			if strings.HasSuffix(name, "body") && !strings.Contains(string(b), "the body ended before it was complete") || !strings.HasSuffix(name, "body") && len(b) > 0 && !bytes.HasPrefix(b, []byte("HTTP/1.1 400 ")) {
				t.Errorf("got %q", b)
			}
		})
		unheard(name+", reset", func(t *testing.T) {
			conn := dial(t, g)
			if _, err := io.WriteString(conn, text); err != nil {
				t.Fatal(err)
			}
			_ = conn.SetLinger(0)
			_ = conn.Close()
		})
	}

	// From here on the upstream has the call when the client goes.
	for _, half := range []bool{false, true} {
		t.Run(fmt.Sprintf("waiting for the answer, half closed %t", half), func(t *testing.T) {
			has, gone := holding(up, "")
			conn := dial(t, g)
			session := t.Name()
			if _, err := io.WriteString(conn, raw(g, session, soundHead, soundBody)); err != nil {
				t.Fatal(err)
			}
			await(t, has)
			if half {
				if err := conn.CloseWrite(); err != nil {
					t.Fatal(err)
				}
				resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
				if err != nil {
					t.Fatal(err)
				}
				if b, _ := io.ReadAll(resp.Body); resp.StatusCode != 400 || !strings.Contains(string(b), "closed before the answer") {
					t.Errorf("%s %s", resp.Status, b)
				}
			} else {
				_ = conn.Close()
			}
			await(t, gone)
			if e := ended(t, g, session); e.Kind() != schemas.KindCancelled {
				t.Errorf("the call ended %s", e.Kind())
			}
			before.compare(t, g)
		})
	}
	t.Run("in a stream", func(t *testing.T) {
		has, gone := holding(up, "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\ndata: {\"jsonrpc\":\"2.0\",\"method\":\"n\"}\n\n")
		conn := dial(t, g)
		session := t.Name()
		if _, err := io.WriteString(conn, raw(g, session, soundHead, soundBody)); err != nil {
			t.Fatal(err)
		}
		await(t, has)
		br := bufio.NewReader(conn)
		for line := ""; !strings.Contains(line, "data: "); {
			var err error
			if line, err = br.ReadString('\n'); err != nil {
				t.Fatal(err)
			}
		}
		_ = conn.Close()
		await(t, gone)
		if e := ended(t, g, session); e.Kind() != schemas.KindCancelled {
			t.Errorf("the call ended %s", e.Kind())
		}
		before.compare(t, g)
	})
	serving(t, g, up)
}

// holding has the upstream say something and then nothing more; has is closed
// when it was called, gone when its client hung up.
func holding(up *rawServer, say string) (has, gone chan struct{}) {
	has, gone = make(chan struct{}), make(chan struct{})
	up.serve(func(c net.Conn, _ *received) {
		_, _ = io.WriteString(c, say)
		close(has)
		_, _ = c.Read(make([]byte, 1)) // nothing comes but the end
		close(gone)
		_ = c.Close()
	})
	return has, gone
}

func await(t *testing.T, ch <-chan struct{}) {
	t.Helper()
	select {
	case <-ch:
	case <-time.After(30 * time.Second):
		t.Fatal("waited in vain")
	}
}

// TestTwoRequestsOrOne sends bytes that somebody in front of the gateway might
// count otherwise. None of them makes a second call.
func TestTwoRequestsOrOne(t *testing.T) {
	up := newRawServer(t)
	g := gateway.Start(t, gateway.Config("servers:\n"+gateway.Native("raw", up.url(), "")))
	serving(t, g, up)
	sound := raw(g, "two", soundHead, soundBody)
	// all sends text and reads as many answers as are due, and what comes beyond.
	all := func(t *testing.T, text string, due int) (statuses []int, calls int) {
		n := up.called()
		conn := dial(t, g)
		if _, err := io.WriteString(conn, text); err != nil {
			t.Fatal(err)
		}
		for br := bufio.NewReader(conn); ; {
			if len(statuses) == due {
				_ = conn.SetReadDeadline(time.Now().Add(200 * time.Millisecond))
			}
			resp, err := http.ReadResponse(br, nil)
			if err != nil {
				break // closed, or nothing more comes
			}
			_, _ = io.Copy(io.Discard, resp.Body)
			statuses = append(statuses, resp.StatusCode)
		}
		return statuses, up.called() - n
	}
	pieces := raw(g, "two", soundHead+"\nTransfer-Encoding: chunked", soundBody)
	for _, tt := range []struct {
		name, text string
		statuses   []int
		calls      int
	}{
		{"pipelined", sound + sound + sound, []int{200, 200, 200}, 3},
		{"pipelined after garbage", strings.Replace(sound, `{"jsonrpc"`, `["jsonrpc"`, 1) + sound, []int{400, 200}, 1},
		{"pipelined after a refusal", strings.Replace(sound, "Content-Type: application/json", "Content-Type: text/plain", 1) + sound, []int{415}, 0},
		// A front that counts by length takes what follows for the body's rest.
		{"length and pieces", pieces + sound, []int{200}, 1},
		{"pieces alone", strings.Replace(pieces, "Content-Length", "X-Length", 1) + sound, []int{200}, 1},
		{"two lengths", strings.Replace(sound, "Content-Length", "Content-Length: 4\r\nContent-Length", 1) + sound, []int{400}, 0},
		{"one length twice", strings.Replace(sound, "Content-Length:", fmt.Sprintf("Content-Length: %d\r\nContent-Length:", len(soundBody)), 1), []int{200}, 1},
		{"a length too short", strings.Replace(sound, fmt.Sprintf("Content-Length: %d", len(soundBody)), "Content-Length: 10", 1), []int{400}, 0},
		{"bare CR in a header", strings.Replace(sound, "Mcp-Name: a", "Mcp-Name: a\rX: y", 1) + sound, []int{400}, 0},
		{"space before the colon", strings.Replace(sound, "Content-Length:", "Content-Length :", 1) + sound, []int{400}, 0},
		{"folded header", strings.Replace(sound, "Mcp-Name: a", "Mcp-Name:\r\n a", 1), []int{200}, 1},
		{"unknown coding", strings.Replace(pieces, "Encoding: chunked", "Encoding: gzip, chunked", 1), []int{501}, 0},
		{"coding twice", strings.Replace(pieces, "Transfer-Encoding", "Transfer-Encoding: identity\r\nTransfer-Encoding", 1), []int{501}, 0},
		{"a piece of negative length", strings.Replace(pieces, "\r\n\r\n7\r\n", "\r\n\r\n-7\r\n", 1), []int{400}, 0},
		{"a piece of endless length", strings.Replace(pieces, "\r\n\r\n7\r\n", "\r\n\r\nfffffffffffffffff\r\n", 1), []int{400}, 0},
	} {
		t.Run(tt.name, func(t *testing.T) {
			statuses, calls := all(t, tt.text, len(tt.statuses))
			if !slices.Equal(statuses, tt.statuses) || calls != tt.calls {
				t.Errorf("%d, %d calls; want %d, %d", statuses, calls, tt.statuses, tt.calls)
			}
		})
	}
}

// TestCrowd: who comes when the gateway is full is told so, and when to come
// again; too many connections are closed; afterwards there is room.
func TestCrowd(t *testing.T) {
	up := newRawServer(t)
	g := gateway.Start(t, gateway.Config("servers:\n"+gateway.Native("raw", up.url(), "")+`
limits: {in_flight: 4, in_flight_per_tenant: 3, streams: 4}
tenants: [{id: acme}, {id: other}]
agents: [{id: researcher, tenant: acme}, {id: second, tenant: other, token_sha256: cd747cb74256709ce755d64f388e4dd9ea251c5ea412f48779dab222aaeae98a}]
auth: {anonymous: researcher}
`))
	serving(t, g, up)
	before := measure(t, g)
	var has atomic.Int64
	free := make(chan struct{})
	up.serve(func(c net.Conn, r *received) {
		has.Add(1)
		<-free
		answering(soundAnswer)(c, r)
	})
	var inside []net.Conn
	enter := func(header string) {
		conn := dial(t, g)
		if _, err := io.WriteString(conn, raw(g, "crowd", soundHead+header, soundBody)); err != nil {
			t.Fatal(err)
		}
		inside = append(inside, conn)
		n := int64(len(inside))
		if !becomes(20*time.Second, func() bool { return has.Load() == n }) {
			t.Fatal("the upstream was not called")
		}
	}
	full := func(header string, status int, what string) {
		t.Helper()
		resp, body := post(t, g, "crowd", soundHead+header, soundBody)
		if resp.StatusCode != status || resp.Header.Get("Retry-After") == "" || !strings.Contains(body, what) || !strings.HasPrefix(body, `{"jsonrpc":"2.0",`) {
			t.Errorf("%s, Retry-After %q, %s", resp.Status, resp.Header.Get("Retry-After"), body)
		}
	}
	for range 3 {
		enter("")
	}
	full("", http.StatusTooManyRequests, "the tenant acme has 3 calls in flight")
	enter("\nAuthorization: Bearer token-of-the-second")
	full("\nAuthorization: Bearer token-of-the-second", http.StatusServiceUnavailable, "the gateway has 4 calls in flight")
	full("", http.StatusServiceUnavailable, "the gateway has 4 calls in flight")

	// Connections beyond four times the calls, and the streams, are closed as they come.
	var conns []net.Conn
	for range 300 {
		conn, err := net.Dial("tcp", strings.TrimPrefix(g.URL, "http://"))
		if err != nil {
			t.Fatal(err)
		}
		conns = append(conns, conn)
	}
	closed := 0
	for _, conn := range conns {
		_ = conn.SetReadDeadline(time.Now().Add(50 * time.Millisecond))
		if _, err := conn.Read(make([]byte, 1)); !errors.Is(err, os.ErrDeadlineExceeded) {
			closed++
		}
		if closed == len(conns)-20 {
			break
		}
	}
	if closed < len(conns)-20 {
		t.Errorf("%d of %d connections were closed, 20 may be open", closed, len(conns))
	}
	for _, conn := range conns {
		_ = conn.Close()
	}
	close(free)
	for _, conn := range inside {
		if resp, err := http.ReadResponse(bufio.NewReader(conn), nil); err != nil || resp.StatusCode != http.StatusOK {
			t.Errorf("who was inside: %v, %v", resp, err)
		}
		_ = conn.Close()
	}
	before.compare(t, g)
	serving(t, g, up)
}

// TestSlow: who sends or reads a byte now and then is cut off, and leaves
// nothing behind. In this process, with times shorter than any config has.
func TestSlow(t *testing.T) {
	asked := atomic.Int64{}
	large := []byte(`{"jsonrpc":"2.0","id":"x","result":{"s":"` + strings.Repeat("x", 16<<20) + `"}}`)
	s, err := edge.New(edge.Options{
		Anonymous:     &edge.Principal{Tenant: "acme", Agent: "researcher"},
		HeaderTimeout: 200 * time.Millisecond, BodyTimeout: 200 * time.Millisecond, WriteTimeout: 200 * time.Millisecond,
		DrainTimeout: 5 * time.Second,
	}, mcp.New(mcp.Options{
		Ask: func(ctx context.Context, e schemas.Event, emit schemas.Emit) error {
			asked.Add(1)
			_, err := emit(ctx, e.Next(&schemas.Completed{Status: 200}, large))
			return err
		},
		Store: func(context.Context, schemas.Event) (r schemas.Receipt, err error) { return },
		Edge:  "e1",
	}).Routes()...)
	if err != nil {
		t.Fatal(err)
	}
	ln, err := new(net.ListenConfig).Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx, ln) }()
	g := &gateway.Gateway{URL: "http://" + ln.Addr().String()}
	text := raw(g, "slow", soundHead, soundBody)
	warm := dial(t, g)
	if _, err := io.WriteString(warm, text); err != nil {
		t.Fatal(err)
	}
	if n, err := io.CopyN(io.Discard, warm, int64(len(large))); err != nil {
		t.Fatal(n, err)
	}
	_ = warm.Close()
	if !becomes(10*time.Second, func() bool { return s.Stats().Connections == 0 }) {
		t.Fatal("the connection is still open")
	}
	asked.Store(0)
	left := func(t *testing.T, before int) {
		t.Helper()
		if !becomes(10*time.Second, func() bool { return runtime.NumGoroutine() <= before && s.Stats().Connections == 0 }) {
			t.Errorf("%d goroutines, before there were %d; %d connections", runtime.NumGoroutine(), before, s.Stats().Connections)
		}
	}
	for name, at := range map[string]int{"header": 10, "body": strings.Index(text, "\r\n\r\n") + 4} {
		t.Run(name, func(t *testing.T) {
			before := runtime.NumGoroutine()
			conn := dial(t, g)
			if _, err := io.WriteString(conn, text[:at]); err != nil {
				t.Fatal(err)
			}
			var out []byte
			drip := time.NewTicker(20 * time.Millisecond)
			defer drip.Stop()
			reading := make(chan struct{})
			go func() { defer close(reading); out, _ = io.ReadAll(conn) }()
			for i := at; ; i++ {
				select {
				case <-drip.C:
					if i < len(text)-1 {
						_, _ = conn.Write([]byte{text[i]})
					}
					continue
				case <-reading:
				}
				break
			}
			_ = conn.Close()
			if name == "body" && !strings.Contains(string(out), "408 Request Timeout") {
				t.Errorf("got %q", out)
			}
			left(t, before)
		})
	}
	if n := asked.Load(); n != 0 {
		t.Errorf("%d calls were made of what never came", n)
	}
	t.Run("reader", func(t *testing.T) {
		before := runtime.NumGoroutine()
		conn := dial(t, g)
		if _, err := io.WriteString(conn, text); err != nil {
			t.Fatal(err)
		}
		// A byte now and then; in the end there is no whole answer.
		n := 0
		drip := time.NewTicker(20 * time.Millisecond)
		defer drip.Stop()
		for one := make([]byte, 1); n < 50; n++ {
			<-drip.C
			if _, err := conn.Read(one); err != nil {
				break
			}
		}
		if !becomes(10*time.Second, func() bool { return s.Stats().Connections == 0 }) {
			t.Error("the connection is still open")
		}
		if rest, err := io.Copy(io.Discard, conn); err == nil && int(rest)+n >= len(large) {
			t.Error("the answer came whole")
		}
		_ = conn.Close()
		left(t, before)
	})
	stop()
	if err := <-done; err != nil {
		t.Error(err)
	}
}

// TestHostileUpstream: whatever an upstream does, the client is told in words,
// the call has one ending, and nothing is left. testdata/hostile.txt has the
// bytes that the upstream writes (NAME/answer), or the name of what it does
// (below), and what came of it, once for a tool that may have had an effect and
// once for one that is idempotent.
func TestHostileUpstream(t *testing.T) {
	up, elsewhere := newRawServer(t), newRawServer(t)
	elsewhere.serve(answering(soundAnswer))
	const file = "testdata/hostile.txt"
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	// A server of its own for each case and tool, as each has its circuit
	// breaker. Where only the deadline ends a call, it is short.
	var servers strings.Builder
	for i, m := range regexp.MustCompile(`(?m)^-- (.*)/answer --$`).FindAllSubmatch(text, -1) {
		deadline := "60s"
		switch string(m[1]) {
		case "silence", "drip", "drip in the header", "comments for ever":
			deadline = "1s"
		}
		for tool := range 2 {
			servers.WriteString(gateway.Native(fmt.Sprintf("s%d", 2*i+tool), up.url(), "deadline: "+deadline+", idempotent: [again]"))
		}
	}
	g := gateway.Start(t, gateway.Config("servers:\n"+gateway.Native("raw", up.url(), "")+servers.String()+unscreened))
	serving(t, g, up)
	before := measure(t, g)

	write := func(c net.Conn, head string, pieces ...string) {
		_, _ = io.WriteString(c, strings.ReplaceAll(head, "\n", "\r\n"))
		for _, p := range pieces {
			if _, err := io.WriteString(c, p); err != nil {
				return
			}
		}
		_ = c.Close()
	}
	endless := func(c net.Conn, head, piece string, most int) {
		_, _ = io.WriteString(c, strings.ReplaceAll(head, "\n", "\r\n"))
		for n := 0; n < most; n += len(piece) {
			if _, err := io.WriteString(c, piece); err != nil {
				return
			}
		}
	}
	const plain, stream = "HTTP/1.1 200 OK\nContent-Type: application/json\n\n", "HTTP/1.1 200 OK\nContent-Type: text/event-stream\n\n"
	kb := strings.Repeat("x", 64<<10)
	does := map[string]func(c net.Conn, r *received){
		"100 MB": func(c net.Conn, _ *received) { endless(c, plain+`{"jsonrpc":"2.0","result":"`, kb, 100<<20) },
		"100 MB declared": func(c net.Conn, _ *received) {
			endless(c, "HTTP/1.1 200 OK\nContent-Type: application/json\nContent-Length: 104857600\n\n", kb, 100<<20)
		},
		"100 MB in one line": func(c net.Conn, _ *received) { endless(c, stream+"data: ", kb, 100<<20) },
		"100 MB of a header": func(c net.Conn, _ *received) { endless(c, "HTTP/1.1 200 OK\nX: ", kb, 100<<20) },
		"comments for ever":  func(c net.Conn, _ *received) { endless(c, stream, ": "+kb[:100]+"\n\n", 1<<40) },
		"messages for ever": func(c net.Conn, _ *received) {
			endless(c, stream, "data: {\"jsonrpc\":\"2.0\",\"method\":\"n\"}\n\n", 1<<40)
		},
		"answer, then more": func(c net.Conn, r *received) {
			a := strings.ReplaceAll(soundAnswer, "$CALL", r.call())
			endless(c, stream+"data: "+a+"\n\n", "data: "+a+"\n\n", 1<<20)
			_ = c.Close()
		},
		"drip": func(c net.Conn, _ *received) {
			_, _ = io.WriteString(c, strings.ReplaceAll(plain, "\n", "\r\n"))
			drip := time.NewTicker(50 * time.Millisecond)
			defer drip.Stop()
			for range drip.C {
				if _, err := c.Write([]byte(" ")); err != nil {
					return
				}
			}
		},
		"drip in the header": func(c net.Conn, _ *received) {
			_, _ = io.WriteString(c, "HTTP/1.1 200 OK\r\nX: ")
			drip := time.NewTicker(50 * time.Millisecond)
			defer drip.Stop()
			for range drip.C {
				if _, err := c.Write([]byte("y")); err != nil {
					return
				}
			}
		},
		"silence": func(c net.Conn, _ *received) { _, _ = c.Read(make([]byte, 1)); _ = c.Close() },
		"closes":  func(c net.Conn, _ *received) { _ = c.Close() },
		"resets":  func(c net.Conn, _ *received) { _ = c.(*net.TCPConn).SetLinger(0); _ = c.Close() },
		"resets late": func(c net.Conn, _ *received) {
			_, _ = io.WriteString(c, "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 1000\r\n\r\n{")
			_ = c.(*net.TCPConn).SetLinger(0)
			_ = c.Close()
		},
		"redirects": func(c net.Conn, _ *received) {
			write(c, "HTTP/1.1 307 Temporary Redirect\nLocation: "+elsewhere.url()+"\nContent-Length: 0\n\n")
		},
		"asks for the body again": func(c net.Conn, _ *received) {
			write(c, "HTTP/1.1 408 Request Timeout\nContent-Length: 0\nConnection: close\n\n")
		},
	}

	n := 0
	golden(t, file, "got", func(t *testing.T, name string, section map[string]string) string {
		var out strings.Builder
		for _, tool := range []string{"once", "again"} {
			h := does[strings.TrimSpace(section["answer"])]
			if h == nil {
				text := section["answer"]
				if !strings.Contains(text, "text/event-stream") { // which ends with an empty line
					text = strings.TrimSuffix(text, "\n")
				}
				head, body := split(text)
				body, _ = unmark(body)
				body = strings.NewReplacer("␦", "\xff").Replace(body)
				head, _ = unmark(head)
				h = func(c net.Conn, r *received) { write(c, head+"\n\n", strings.ReplaceAll(body, "$CALL", r.call())) }
			}
			up.serve(h)
			session := t.Name() + " " + tool
			calls := up.called()
			began := time.Now()
			resp, body := post(t, g, session, fmt.Sprintf("POST /mcp/s%d HTTP/1.1\nMcp-Method: tools/call\nMcp-Name: %s", n, tool),
				`{"jsonrpc":"2.0","id":"mine","method":"tools/call","params":{"name":"`+tool+`",`+gateway.Meta+`}}`)
			n++
			if took := time.Since(began); took > 40*time.Second {
				t.Errorf("%s: took %s", tool, took)
			}
			if strings.HasPrefix(resp.Header.Get("Content-Type"), "text/event-stream") {
				all := messages(body)
				body = all[len(all)-1]
			}
			fmt.Fprintf(&out, "%s: called %d, %s", tool, up.called()-calls, resp.Status)
			if v := resp.Header.Get("Retry-After"); v != "" {
				fmt.Fprintf(&out, ", again in %s s", v)
			}
			var a struct {
				ID     string
				Result json.RawMessage
				Error  *struct {
					Code    int
					Message string
					Data    struct{ Waybill struct{ Code, Call string } }
				}
			}
			if err := json.Unmarshal([]byte(body), &a); err != nil || a.ID != "mine" {
				t.Fatalf("%s: the client got %s (%v)", tool, clip(body), err)
			}
			if a.Error != nil {
				fmt.Fprintf(&out, ", %d %s\n%s\n", a.Error.Code, a.Error.Data.Waybill.Code, a.Error.Message)
			} else {
				fmt.Fprintf(&out, ", %s\n", a.Result)
			}
			switch e := ended(t, g, session); d := e.Data.(type) {
			case *schemas.Failed:
				fmt.Fprintf(&out, "failed %s: %s\n", d.Code, ports.ReplaceAllString(d.Detail, ":PORT"))
			case *schemas.Completed:
				fmt.Fprintf(&out, "completed %d\n", d.Status)
			default:
				fmt.Fprintf(&out, "%s\n", e.Kind())
			}
		}
		return out.String()
	})
	if n := elsewhere.called(); n != 0 {
		t.Errorf("a redirect was followed %d times", n)
	}
	if !becomes(20*time.Second, func() bool { return up.open() == 0 }) {
		t.Errorf("%d connections to the upstream are left", up.open())
	}
	before.compare(t, g)
	serving(t, g, up)
}

var ports = regexp.MustCompile(`:\d{4,5}\b`)
