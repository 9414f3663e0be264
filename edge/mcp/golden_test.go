package mcp_test

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"waybill.dev/edge"
	"waybill.dev/edge/mcp"
	"waybill.dev/schemas"
)

var update = flag.Bool("update", false, "rewrite the golden sections of testdata/*.txt")

// TestGolden runs the exchanges of testdata/*.txt over real connections. For
// each exchange NAME a file has the sections
//
//	NAME/request   what the client sends: the request line, headers, body
//	NAME/ask       what the rest of the gateway does, one event a line
//	NAME/stored    golden, in stored.txt only: the requested event
//	NAME/response  golden: what the client gets
//
// The headers every client sends are added unless the request has them, or
// takes one away with a line "-Name". $META is the _meta of a client that does
// it right, $CALL the call id.
func TestGolden(t *testing.T) {
	files, err := filepath.Glob("testdata/*.txt")
	if err != nil || len(files) == 0 {
		t.Fatal("no files", err)
	}
	for _, file := range files {
		t.Run(strings.TrimSuffix(filepath.Base(file), ".txt"), func(t *testing.T) {
			raw, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			sections, names := map[string]string{}, []string{}
			var out strings.Builder
			keep := func(name, data string) { fmt.Fprintf(&out, "-- %s --\n%s", name, data) }
			section := ""
			for line := range strings.Lines(string(raw)) {
				name, ok := strings.CutPrefix(strings.TrimSuffix(line, " --\n"), "-- ")
				switch {
				case ok:
					section = name
					sections[name] = ""
					if name, ok := strings.CutSuffix(name, "/request"); ok {
						names = append(names, name)
					}
				case section == "":
					out.WriteString(line)
				default:
					sections[section] += line
				}
			}
			for _, name := range names {
				stored, response := exchange(t, sections[name+"/request"], sections[name+"/ask"])
				keep(name+"/request", sections[name+"/request"])
				if ask, ok := sections[name+"/ask"]; ok {
					keep(name+"/ask", ask)
				}
				if filepath.Base(file) != "stored.txt" {
					stored = ""
				}
				if stored != "" {
					keep(name+"/stored", stored)
				}
				keep(name+"/response", response)
				if *update {
					continue
				}
				if stored != sections[name+"/stored"] {
					t.Errorf("%s: stored\n%s\nwant\n%s", name, stored, sections[name+"/stored"])
				}
				if response != sections[name+"/response"] {
					t.Errorf("%s: response\n%s\nwant\n%s", name, response, sections[name+"/response"])
				}
			}
			if *update {
				if err := os.WriteFile(file, []byte(out.String()), 0o644); err != nil {
					t.Fatal(err)
				}
			}
		})
	}
}

const goodMeta = `"_meta":{"io.modelcontextprotocol/protocolVersion":"2026-07-28",` +
	`"io.modelcontextprotocol/clientInfo":{"name":"golden","version":"1"},"io.modelcontextprotocol/clientCapabilities":{}}`

var goodHeaders = []string{
	"Host: localhost", "Content-Type: application/json", "Accept: application/json, text/event-stream",
	"MCP-Protocol-Version: 2026-07-28",
}

// wire writes the request of a golden file as bytes of HTTP.
func wire(text string) []byte {
	head, body, _ := strings.Cut(text, "\n\n")
	body = strings.TrimSuffix(strings.ReplaceAll(body, "$META", goodMeta), "\n")
	lines := strings.Split(strings.TrimSpace(head), "\n")
	has := func(name string) bool {
		return slices.ContainsFunc(lines, func(l string) bool {
			l, _, _ = strings.Cut(strings.TrimPrefix(l, "-"), ":")
			return strings.EqualFold(l, name)
		})
	}
	var b bytes.Buffer
	for _, l := range lines {
		if !strings.HasPrefix(l, "-") {
			fmt.Fprintf(&b, "%s\r\n", l)
		}
	}
	for _, l := range goodHeaders {
		if name, _, _ := strings.Cut(l, ":"); !has(name) {
			fmt.Fprintf(&b, "%s\r\n", l)
		}
	}
	fmt.Fprintf(&b, "Content-Length: %d\r\nConnection: close\r\n\r\n%s", len(body), body)
	return b.Bytes()
}

// scripted is an Ask that emits what the lines say.
func scripted(script string, saw func(schemas.Event)) schemas.Handler {
	return func(ctx context.Context, e schemas.Event, emit schemas.Emit) error {
		saw(e)
		n := 0
		say := func(p schemas.Payload, body string) error {
			var b []byte
			if body != "" {
				body = strings.NewReplacer("$CALL", string(e.Call), `\r`, "\r").Replace(body)
				b = []byte(body)
			}
			_, err := emit(ctx, e.Next(p, b))
			return err
		}
		for line := range strings.Lines(script) {
			verb, rest, _ := strings.Cut(strings.TrimSpace(line), " ")
			var err error
			switch verb {
			case "progressed":
				err = say(&schemas.Progressed{Index: n}, rest)
				n++
			case "again":
				err = say(&schemas.Progressed{Index: n - 1}, rest)
			case "notified":
				err = say(&schemas.Notified{ID: "1"}, rest)
			case "asked":
				method, rest, _ := strings.Cut(rest, " ")
				id, body, _ := strings.Cut(rest, " ")
				if id == "" {
					id = "1"
				}
				err = say(&schemas.Asked{Target: schemas.Target{Server: "everything", Method: method}, ID: id}, body)
			case "beside": // an event of the session, of a server
				server, body, _ := strings.Cut(rest, " ")
				b := e
				b.Call, b.Root, b.Edge = "", "", ""
				_, err = emit(ctx, b.Next(&schemas.Notified{Target: schemas.Target{Server: server}, ID: fmt.Sprint("n", n)}, []byte(body)))
				n++
			case "question": // the same, to be answered
				id, body, _ := strings.Cut(rest, " ")
				b := e
				b.Call, b.Root, b.Edge = "", "", ""
				_, err = emit(ctx, b.Next(&schemas.Asked{Target: schemas.Target{Server: "everything", Method: "roots/list"}, ID: id}, []byte(body)))
			case "held":
				err = say(&schemas.Held{}, "")
			case "completed":
				status, body, _ := strings.Cut(rest, " ")
				c := &schemas.Completed{}
				fmt.Sscan(status, &c.Status)
				err = say(c, body)
			case "denied":
				err = say(&schemas.Denied{Decision: schemas.Decision{N: 1, Rule: "secret", Reason: "secret"}}, "")
			case "failed":
				err = say(&schemas.Failed{Code: schemas.Failure(rest), Detail: "secret"}, "")
			case "cancelled":
				err = say(&schemas.Cancelled{Reason: "secret"}, "")
			case "error":
				switch rest {
				case "overloaded":
					return fmt.Errorf("secret: %w", schemas.ErrOverloaded)
				case "invalid":
					return fmt.Errorf("secret: %w", schemas.ErrInvalid)
				case "too large":
					return fmt.Errorf("secret: %w", schemas.ErrTooLarge)
				}
				return errors.New("secret")
			}
			if err != nil {
				return err
			}
		}
		return nil
	}
}

var noon = time.Date(2026, 11, 22, 12, 34, 56, 0, time.UTC)

func exchange(t *testing.T, request, script string) (stored, response string) {
	t.Helper()
	var mu sync.Mutex
	var event *schemas.Event
	addr := serve(t, mcp.Options{
		Ask:      scripted(script, func(e schemas.Event) { mu.Lock(); defer mu.Unlock(); event = &e }),
		Now:      func() time.Time { return noon },
		Deadline: func(string, string) time.Duration { return time.Minute },
	})
	conn, err := net.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if _, err := conn.Write(wire(request)); err != nil {
		t.Fatal(err)
	}
	res, err := http.ReadResponse(bufio.NewReader(conn), nil)
	if err != nil {
		t.Fatal(err)
	}
	body, err := io.ReadAll(res.Body)
	if err != nil {
		t.Fatal(err)
	}
	var b strings.Builder
	fmt.Fprintln(&b, res.Status)
	for _, name := range slices.Sorted(func(yield func(string) bool) {
		for name := range res.Header {
			if !yield(name) {
				return
			}
		}
	}) {
		switch name {
		case "Date", "Cache-Control", "X-Content-Type-Options", "Content-Length", "Connection":
			continue // the same everywhere; tested in edge
		}
		for _, v := range res.Header[name] {
			fmt.Fprintf(&b, "%s: %s\n", name, v)
		}
	}
	fmt.Fprintf(&b, "\n%s\n", strings.ReplaceAll(string(body), "\r", `\r`))
	mu.Lock()
	defer mu.Unlock()
	var hide func(string) string
	if event != nil {
		if sent := wire(request); !bytes.HasSuffix(sent, append([]byte("\r\n\r\n"), event.Body...)) {
			t.Errorf("stored body %q, sent %q", event.Body, sent)
		}
		if err := event.Check(); err != nil {
			t.Error(err)
		}
		hide = func(s string) string { return strings.ReplaceAll(s, string(event.Call), "$CALL") }
		raw, err := json.MarshalIndent(*event, "", "  ")
		if err != nil {
			t.Fatal(err)
		}
		stored = hide(string(raw)) + "\n"
	} else {
		hide = func(s string) string { return callID.ReplaceAllString(s, "$$CALL") }
	}
	if strings.Contains(b.String(), "secret") {
		t.Errorf("operator's detail shown to the caller:\n%s", b.String())
	}
	return stored, hide(b.String())
}

var callID = regexp.MustCompile(`\bc[0-9a-v]{26}\b`)

// serve runs a server for the test and checks that nothing is left of it.
func serve(t *testing.T, o mcp.Options) (addr string) {
	t.Helper()
	s := newServer(t, o)
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	run(t, s, ln)
	return ln.Addr().String()
}

func run(t *testing.T, s *edge.Server, ln net.Listener) (stop func()) {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx, ln) }()
	stop = sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
		if st := s.Stats(); st.InFlight != 0 || st.Connections != 0 || st.Panics != 0 {
			t.Errorf("left behind: %+v", st)
		}
	})
	t.Cleanup(stop)
	return stop
}
