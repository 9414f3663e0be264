package test

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"flag"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"waybill.dev/schemas"
	"waybill.dev/test/gateway"
	"waybill.dev/test/peers"
)

var update = flag.Bool("update", false, "rewrite the golden sections of testdata/*/*.txt")

// TestZeroLoss sends the requests of testdata/zeroloss/*.txt through a gateway
// to an upstream, and the answers back, both written byte by byte. What comes
// out at either end, and what the log holds, must be what went in, but for the
// bytes that the file marks. rewrites.txt says how the files are read.
func TestZeroLoss(t *testing.T) {
	up := newRawServer(t)
	g := gateway.Start(t, gateway.Config("servers:\n"+gateway.Native("raw", up.url(), "")+
		`  - {name: modern, mcp: {url: "`+up.url()+`", era: modern}, approve: none}`+"\n"+unscreened))
	files, err := filepath.Glob("testdata/zeroloss/*.txt")
	if err != nil || len(files) == 0 {
		t.Fatal("no files", err)
	}
	for _, file := range files {
		t.Run(strings.TrimSuffix(filepath.Base(file), ".txt"), func(t *testing.T) {
			golden(t, file, "got", func(t *testing.T, name string, section map[string]string) string {
				return exchange(t, g, up, name, section["request"], section["answer"])
			})
		})
	}
	if err := g.Stop(); err != nil {
		t.Errorf("stopping: %v", err)
	}
}

// golden runs the cases of a file of sections, "-- NAME/what --" in front of
// each, and compares what run returns with the section called result.
func golden(t *testing.T, file, result string, run func(t *testing.T, name string, section map[string]string) string) {
	raw, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	var out strings.Builder
	var names []string
	sections := map[string]map[string]string{}
	order := map[string][]string{}
	name, what := "", ""
	for line := range strings.Lines(string(raw)) {
		if head, ok := strings.CutPrefix(strings.TrimSuffix(line, " --\n"), "-- "); ok && strings.HasSuffix(line, " --\n") {
			name, what, _ = strings.Cut(head, "/")
			if sections[name] == nil {
				sections[name] = map[string]string{}
				names = append(names, name)
			}
			order[name] = append(order[name], what)
			continue
		}
		if name == "" {
			out.WriteString(line)
			continue
		}
		sections[name][what] += line
	}
	for _, name := range names {
		s := sections[name]
		for _, what := range order[name] {
			if what != result {
				fmt.Fprintf(&out, "-- %s/%s --\n%s", name, what, s[what])
			}
		}
		t.Run(name, func(t *testing.T) {
			got := run(t, name, s)
			fmt.Fprintf(&out, "-- %s/%s --\n%s", name, result, got)
			if got != s[result] && !*update {
				t.Errorf("got\n%s\nwant\n%s", got, s[result])
			}
		})
	}
	if *update && !t.Failed() {
		if err := os.WriteFile(file, []byte(out.String()), 0o644); err != nil {
			t.Fatal(err)
		}
	}
}

// exchange is one case: a request and its answer. It returns what the golden
// section is to say; all bodies it has compared itself.
func exchange(t *testing.T, g *gateway.Gateway, up *rawServer, name, request, answer string) string {
	t.Helper()
	var out strings.Builder
	head, body := split(strings.TrimSuffix(request, "\n"))
	sent, wantUp := unmark(body)
	oneWay := !strings.Contains(body, "⟦")

	streamed := strings.Contains(answer, "text/event-stream")
	if !streamed { // which ends with an empty line
		answer = strings.TrimSuffix(answer, "\n")
	}
	answerHead, answerBody := split(answer)
	answered, wantDown := unmark(answerBody)

	legacy := strings.Contains(head, "$SESSION")
	stays := answered // what the log is to hold of it
	if legacy {
		server := "raw"
		if strings.Contains(head, "/mcp/modern ") {
			// What is translated is stored in the client's revision, with the call's id.
			server = "modern"
			stays, _ = unmark(mark.ReplaceAllStringFunc(answerBody, func(s string) string {
				if strings.HasPrefix(s, `⟦"$CALL"→`) {
					return s
				}
				return mark.ReplaceAllString(s, "$2")
			}))
		}
		head = strings.ReplaceAll(head, "$SESSION", openRaw(t, g, up, server))
	}

	// The upstream keeps what it got and says what the file says.
	var seen *received
	id := ""
	up.serve(func(c net.Conn, r *received) {
		if r.method != http.MethodPost { // the gateway looks for the stream of a session
			_, _ = io.WriteString(c, notAllowed)
			return
		}
		seen = r
		if m := callID.FindSubmatch(r.body); m != nil {
			id = string(m[1])
		}
		b := strings.ReplaceAll(answered, "$CALL", id)
		h := strings.ReplaceAll(answerHead, "\n", "\r\n") + "\r\n"
		if !strings.Contains(h, "Transfer-Encoding") {
			h += fmt.Sprintf("Content-Length: %d\r\n", len(b))
		} else {
			b = chunked(b)
		}
		_, _ = io.WriteString(c, h+"\r\n"+b) // the client's end will show
	})

	session := "zero loss, " + t.Name()
	resp, got := post(t, g, session, head, sent)

	if seen == nil {
		t.Fatalf("the upstream was not called; the client got %s\n%s", resp.Status, clip(got))
	}
	if !oneWay && id == "" {
		t.Fatalf("the upstream got no call id: %s", clip(string(seen.body)))
	}
	of := schemas.Event{Call: schemas.CallID(resp.Header.Get("Waybill-Call"))}
	span := of.Call.Span(schemas.PartUpstream)
	same(t, "what the upstream received", string(seen.body), strings.NewReplacer("$CALL", id, "$SPAN", span).Replace(wantUp))
	if call := resp.Header.Get("Waybill-Call"); !oneWay && call != id {
		t.Errorf("Waybill-Call %q, the upstream was told %q", call, id)
	}

	// A stream is compared message by message: its frames are not the messages'.
	want := strings.ReplaceAll(wantDown, "$CALL", id)
	said := []string{strings.ReplaceAll(stays, "$CALL", id)} // by the upstream; the last is the answer
	if streamed {
		said = messages(said[0])
	}
	if strings.HasPrefix(resp.Header.Get("Content-Type"), "text/event-stream") {
		wants := []string{want}
		if streamed {
			wants = messages(want)
		}
		gots := messages(got)
		if len(gots) != len(wants) {
			t.Errorf("the client got %d messages, want %d:\n%s", len(gots), len(wants), clip(got))
		}
		for i := range min(len(gots), len(wants)) {
			same(t, fmt.Sprintf("message %d that the client received", i), gots[i], wants[i])
		}
	} else {
		if streamed { // the client takes no stream, or nothing came before the answer
			wants := messages(want)
			want = wants[len(wants)-1]
		}
		same(t, "what the client received", got, want)
	}

	lines := func(who string, h http.Header) {
		for _, k := range slices.Sorted(maps.Keys(h)) {
			switch k {
			case "Date", "Content-Length", "Host", "Waybill-Session-Key":
				continue
			}
			for _, v := range h[k] {
				if id != "" {
					v = strings.ReplaceAll(v, id, "$CALL")
				} else if k == "Waybill-Call" {
					v = "$CALL"
				}
				v = strings.NewReplacer(span, "$SPAN", of.TraceID(), "$TRACE").Replace(v)
				fmt.Fprintf(&out, "%s %s: %s\n", who, k, v)
			}
		}
	}
	lines("upstream <", seen.header)
	fmt.Fprintf(&out, "client < %s\n", resp.Status)
	lines("client <", resp.Header)
	for _, e := range g.Session(schemas.SessionKey(resp.Header.Get("Waybill-Session-Key"))) {
		if legacy && string(e.Call) != resp.Header.Get("Waybill-Call") {
			continue // of the session's opening
		}
		fmt.Fprintf(&out, "log %s%s\n", e.Kind(), stored(t, e, sent, said))
	}
	return out.String()
}

const (
	notAllowed = "HTTP/1.1 405 Method Not Allowed\r\nContent-Length: 0\r\n\r\n"
	accepted   = "HTTP/1.1 202 Accepted\r\nContent-Length: 0\r\n\r\n"
)

// openRaw opens a session of the revision 2025-11-25 at an endpoint and returns
// its ID. The upstream answers in either era.
func openRaw(t *testing.T, g *gateway.Gateway, up *rawServer, server string) string {
	t.Helper()
	up.serve(func(c net.Conn, r *received) {
		answer := accepted
		switch id := callID.FindSubmatch(r.body); {
		case r.method != http.MethodPost:
			answer = notAllowed
		case id != nil:
			result := `{"jsonrpc":"2.0","id":` + string(id[0]) + `,"result":{"protocolVersion":"2025-11-25","capabilities":{},"serverInfo":{"name":"raw","version":"1"}}}`
			if bytes.Contains(r.body, []byte("server/discover")) {
				result = `{"jsonrpc":"2.0","id":` + string(id[0]) + `,"result":{"resultType":"complete","supportedVersions":["2026-07-28"],"capabilities":{}}}`
			}
			answer = fmt.Sprintf("HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nMcp-Session-Id: upstream-session\r\nContent-Length: %d\r\n\r\n%s", len(result), result)
		}
		_, _ = io.WriteString(c, answer) // the other end will show
	})
	s, _, err := peers.OpenLegacy(t.Context(), peers.Endpoint{URL: g.URL + "/mcp/" + server}, "2025-11-25", struct{}{})
	if err != nil {
		t.Fatal(err)
	}
	return s.ID
}

// split parts the lines of a header from the body.
func split(text string) (head, body string) {
	head, body, _ = strings.Cut("\n"+text, "\n\n")
	return strings.Trim(head, "\n"), body
}

// stored compares the body of an event with what was said, and tells in a word
// what the event says besides.
func stored(t *testing.T, e schemas.Event, request string, said []string) string {
	what := "what is stored as " + string(e.Kind())
	body := string(e.Body)
	switch d := e.Data.(type) {
	case *schemas.Requested:
		same(t, what, body, request)
		return fmt.Sprintf(" %s %s", d.Method, strconv.QuoteToASCII(d.Name))
	case *schemas.Authorized:
		if d.BodySHA256 == "" {
			same(t, what, body, request)
			return ""
		}
		sum := sha256.Sum256([]byte(request))
		if d.BodySHA256 != hex.EncodeToString(sum[:]) || d.BodySize != len(request) || body != "" {
			t.Errorf("authorized: %d bytes with digest %s, not those of the request", d.BodySize, d.BodySHA256)
		}
		return ", the body by its digest"
	case *schemas.Progressed:
		if d.Index >= len(said)-1 {
			t.Errorf("progressed %d: the upstream said %d messages", d.Index, len(said))
			return ""
		}
		same(t, what, body, said[d.Index])
		return fmt.Sprintf(" %d", d.Index)
	case *schemas.Completed:
		if d.Chunks != len(said)-1 {
			t.Errorf("completed after %d messages, the upstream said %d before its answer", d.Chunks, len(said)-1)
		}
		same(t, what, body, said[len(said)-1])
		return fmt.Sprintf(" status=%d code=%d result=%q", d.Status, d.ErrorCode, d.Result)
	default:
		same(t, what, body, "")
	}
	return ""
}

// same compares bytes and shows where they part.
func same(t *testing.T, what, got, want string) {
	t.Helper()
	if got == want {
		return
	}
	i := 0
	for i < min(len(got), len(want)) && got[i] == want[i] {
		i++
	}
	around := func(s string) string { return strconv.QuoteToASCII(s[max(0, i-60):min(len(s), i+60)]) }
	t.Errorf("%s differs at byte %d (%d bytes, want %d):\n got %s\nwant %s", what, i, len(got), len(want), around(got), around(want))
}

func clip(s string) string {
	if len(s) > 2000 {
		return s[:2000] + "…"
	}
	return s
}

var (
	mark   = regexp.MustCompile(`(?s)⟦(.*?)→(.*?)⟧`)
	times  = regexp.MustCompile(`«(\d+)×([^»]+)»`)
	callID = regexp.MustCompile(`"(c[0-9a-v]{26})"`)
	signs  = strings.NewReplacer("␍", "\r", "␊", "\n", "␉", "\t", "$META", gateway.Meta)
)

// unmark gives the text of a file as it is sent, and as it is to arrive.
func unmark(text string) (sent, arrives string) {
	text = times.ReplaceAllStringFunc(signs.Replace(text), func(s string) string {
		m := times.FindStringSubmatch(s)
		n, _ := strconv.Atoi(m[1]) // digits
		return strings.Repeat(m[2], n)
	})
	return mark.ReplaceAllString(text, "$1"), mark.ReplaceAllString(text, "$2")
}

// messages takes the data out of an event stream.
func messages(stream string) (all []string) {
	stream = strings.ReplaceAll(strings.ReplaceAll(stream, "\r\n", "\n"), "\r", "\n")
	for event := range strings.SplitSeq(stream, "\n\n") {
		var data []string
		other := false
		for line := range strings.SplitSeq(event, "\n") {
			if name, ok := strings.CutPrefix(line, "event: "); ok && name != "message" {
				other = true // no message of MCP
			}
			if d, ok := strings.CutPrefix(line, "data:"); ok {
				data = append(data, strings.TrimPrefix(d, " "))
			}
		}
		if text := strings.Join(data, "\n"); text != "" && !other { // an event without data only names its id
			all = append(all, text)
		}
	}
	return all
}

// post writes a request: the headers that every client sends, unless head has
// them or takes one away with a line "-Name", those of head, and the body.
func post(t *testing.T, g *gateway.Gateway, session, head, body string) (*http.Response, string) {
	t.Helper()
	conn := dial(t, g)
	if _, err := io.WriteString(conn, raw(g, session, head, body)); err != nil {
		t.Fatal(err)
	}
	resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
	if err != nil {
		t.Fatal(err)
	}
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp, string(b)
}

// dial connects to a gateway, for a while.
func dial(t *testing.T, g *gateway.Gateway) *net.TCPConn {
	t.Helper()
	conn, err := net.Dial("tcp", strings.TrimPrefix(g.URL, "http://"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	if err := conn.SetDeadline(time.Now().Add(time.Minute)); err != nil {
		t.Fatal(err)
	}
	return conn.(*net.TCPConn)
}

// raw is a request as it stands on the wire. head may begin with a request
// line of its own.
func raw(g *gateway.Gateway, session, head, body string) string {
	line := "POST /mcp/raw HTTP/1.1"
	var own []string
	for l := range strings.SplitSeq(signs.Replace(head), "\n") {
		switch {
		case strings.HasSuffix(l, " HTTP/1.1"), strings.HasSuffix(l, " HTTP/1.0"):
			line = l
		case l != "":
			own = append(own, l)
		}
	}
	var b strings.Builder
	b.WriteString(line + "\r\n")
	for _, h := range []string{
		"Host: " + strings.TrimPrefix(g.URL, "http://"), "Content-Type: application/json", "Accept: application/json, text/event-stream",
		"MCP-Protocol-Version: 2026-07-28", "Waybill-Session: " + session, "Content-Length: " + strconv.Itoa(len(body)),
	} {
		k, _, _ := strings.Cut(h, ":")
		if !slices.ContainsFunc(own, func(l string) bool {
			return strings.HasPrefix(strings.ToLower(strings.TrimPrefix(l, "-")), strings.ToLower(k))
		}) {
			b.WriteString(h + "\r\n")
		}
	}
	for _, h := range own {
		if !strings.HasPrefix(h, "-") {
			b.WriteString(h + "\r\n")
		}
	}
	if slices.Contains(own, "Transfer-Encoding: chunked") {
		body = chunked(body)
	}
	b.WriteString("\r\n" + body)
	return b.String()
}

// chunked is a body in pieces that heed no border of a token or character.
func chunked(body string) string {
	var b strings.Builder
	b.Grow(len(body))
	size := 7
	if len(body) > 1<<20 {
		size = 64<<10 - 1
	}
	for piece := range slices.Chunk([]byte(body), size) {
		fmt.Fprintf(&b, "%x\r\n%s\r\n", len(piece), piece)
	}
	return b.String() + "0\r\n\r\n"
}

// received is a request as an upstream got it.
type received struct {
	method string
	header http.Header
	body   []byte
}

// rawServer is an upstream whose answers are written by the test, connection
// and all.
type rawServer struct {
	ln net.Listener

	mu      sync.Mutex
	handler func(net.Conn, *received)
	calls   int
	conns   map[net.Conn]bool
	all     sync.WaitGroup
}

func newRawServer(t testing.TB) *rawServer {
	t.Helper()
	ln, err := new(net.ListenConfig).Listen(context.Background(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := &rawServer{ln: ln, conns: map[net.Conn]bool{}}
	s.all.Go(func() {
		for {
			conn, err := ln.Accept()
			if err != nil {
				return
			}
			s.mu.Lock()
			s.conns[conn] = true
			s.mu.Unlock()
			s.all.Go(func() { s.run(conn) })
		}
	})
	t.Cleanup(func() {
		_ = ln.Close()
		s.mu.Lock()
		for conn := range s.conns {
			_ = conn.Close()
		}
		s.mu.Unlock()
		s.all.Wait()
	})
	return s
}

func (s *rawServer) url() string { return "http://" + s.ln.Addr().String() + "/mcp" }

// serve says how the next requests are answered.
func (s *rawServer) serve(h func(net.Conn, *received)) {
	s.mu.Lock()
	s.handler = h
	s.mu.Unlock()
}

// called is how many requests there have been.
func (s *rawServer) called() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.calls
}

// open is how many connections there are.
func (s *rawServer) open() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.conns)
}

func (s *rawServer) run(conn net.Conn) {
	defer func() {
		_ = conn.Close()
		s.mu.Lock()
		delete(s.conns, conn)
		s.mu.Unlock()
	}()
	for br := bufio.NewReader(conn); ; {
		r, err := http.ReadRequest(br)
		if err != nil {
			return
		}
		body, err := io.ReadAll(r.Body)
		if err != nil {
			return
		}
		s.mu.Lock()
		h := s.handler
		s.calls++
		s.mu.Unlock()
		h(conn, &received{r.Method, r.Header, body})
		if _, err := conn.Write(nil); errors.Is(err, net.ErrClosed) {
			return
		}
	}
}
