// Package upstream is an MCP server for tests that counts: it keeps a record of
// everything it was made to do, in a process of its own, so that the record
// outlives the gateway. On demand it is a witness too: it looks into the log
// through a NATS connection of its own, at the moment it is called, whether the
// call is there.
//
// It speaks revision 2026-07-28 over streamable HTTP, and of that as much as a
// tools/call needs, and 2025-11-25 with sessions (legacy.go). Begin with [Start]; [Run] is the process, to be listed among
// the children of gateway.Main.
package upstream

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"waybill.dev/test/gateway"
	"waybill.dev/test/peers"
)

// Child is the name under which Run is listed.
const Child = "upstream"

const envListen = "WAYBILL_TEST_UPSTREAM"

// Args are the arguments of its tools, which are called count and read and do
// the same: which of them is idempotent is for the gateway's config to say.
type Args struct {
	Key      string `json:"key"`                // names the effect
	Wait     int    `json:"wait,omitempty"`     // milliseconds between effect and answer
	Progress int    `json:"progress,omitempty"` // messages before the answer, which is then a stream
	Pad      string `json:"pad,omitempty"`      // repeated in the answer
}

// Effect is one thing that it did.
type Effect struct {
	Tool, Key string
	Call      string    // the JSON-RPC id
	At        time.Time // when the request came
}

// Testimony is what it saw in the log.
type Testimony struct {
	Checked    int
	Violations []string
}

// Upstream is a running server.
type Upstream struct {
	*peers.Process
	URL  string // of the MCP endpoint
	base string
	t    testing.TB
}

// Start runs a server and returns when it listens.
func Start(t testing.TB) *Upstream {
	t.Helper()
	addr := gateway.FreeAddr(t)
	u := &Upstream{Process: gateway.Child(t, Child, envListen+"="+addr), base: "http://" + addr, URL: "http://" + addr + "/mcp", t: t}
	if _, err := u.Await(t.Context(), "Upstream is ready."); err != nil {
		t.Fatal(err)
	}
	return u
}

// Effects is what it has done so far, in order.
func (u *Upstream) Effects() (all []Effect) {
	u.t.Helper()
	u.control(http.MethodGet, "/effects", "", &all)
	return all
}

// Observe makes it look into the log at url at every call from now on: that of
// a tool in claimed must have been claimed.
func (u *Upstream) Observe(url string, claimed ...string) {
	u.t.Helper()
	body, err := json.Marshal(observation{url, claimed})
	if err != nil {
		u.t.Fatal(err)
	}
	u.control(http.MethodPost, "/observe", string(body), nil)
}

// Testimony is what it has seen so far.
func (u *Upstream) Testimony() (seen Testimony) {
	u.t.Helper()
	u.control(http.MethodGet, "/testimony", "", &seen)
	return seen
}

func (u *Upstream) control(method, path, body string, into any) {
	u.t.Helper()
	req, err := http.NewRequestWithContext(u.t.Context(), method, u.base+path, bytes.NewReader([]byte(body)))
	if err != nil {
		u.t.Fatal(err)
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		u.t.Fatal(err)
	}
	b, err := io.ReadAll(resp.Body)
	err = errors.Join(err, resp.Body.Close())
	if err != nil || resp.StatusCode != http.StatusOK {
		u.t.Fatalf("upstream %s: HTTP %d, %v: %s", path, resp.StatusCode, err, b)
	}
	if into != nil {
		if err := json.Unmarshal(b, into); err != nil {
			u.t.Fatal(err)
		}
	}
}

// Run is the server's process.
func Run(ctx context.Context) error {
	ln, err := net.Listen("tcp", os.Getenv(envListen))
	if err != nil {
		return err
	}
	s := &server{counts: map[string]int{}}
	mux := http.NewServeMux()
	mux.HandleFunc("POST /mcp", s.mcp)
	mux.HandleFunc("GET /mcp", s.legacy.follow)
	mux.HandleFunc("DELETE /mcp", s.legacy.end)
	mux.HandleFunc("GET /sessions", s.legacy.count)
	mux.HandleFunc("POST /forget", s.legacy.forget)
	mux.HandleFunc("POST /observe", s.observe)
	mux.HandleFunc("GET /effects", func(w http.ResponseWriter, _ *http.Request) {
		s.mu.Lock()
		defer s.mu.Unlock()
		_ = json.NewEncoder(w).Encode(s.effects) // to a test that will say if it broke off
	})
	mux.HandleFunc("GET /testimony", func(w http.ResponseWriter, _ *http.Request) {
		s.mu.Lock()
		defer s.mu.Unlock()
		_ = json.NewEncoder(w).Encode(s.seen)
	})
	srv := &http.Server{Handler: mux, ReadHeaderTimeout: 10 * time.Second}
	failed := make(chan error, 1)
	go func() { failed <- srv.Serve(ln) }()
	if _, err := fmt.Println("Upstream is ready."); err != nil {
		return err
	}
	select {
	case err := <-failed:
		return err
	case <-ctx.Done():
	}
	err = srv.Close()
	<-failed
	if s.witness != nil {
		s.witness.Close()
	}
	return err
}

type observation struct {
	URL     string
	Claimed []string
}

type server struct {
	legacy legacy

	mu      sync.Mutex
	effects []Effect
	counts  map[string]int // by tool and key
	seen    Testimony
	witness *Witness // nil: it does not look
	claimed []string
}

func (s *server) observe(w http.ResponseWriter, r *http.Request) {
	var o observation
	err := json.NewDecoder(r.Body).Decode(&o)
	var witness *Witness
	if err == nil {
		witness, err = Watch(o.URL)
	}
	if err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.witness != nil {
		s.witness.Close()
	}
	s.witness, s.claimed = witness, o.Claimed
}

// listed are the definitions of its tools.
func listed(session bool) string {
	names := []string{"count", "read"}
	if session {
		names = append(names, "notify", "ask")
	}
	for i, name := range names {
		names[i] = fmt.Sprintf(`{"name":%q,"inputSchema":{"type":"object","properties":{"key":{"type":"string"},"wait":{"type":"integer"},"progress":{"type":"integer"},"pad":{"type":"string"}}}}`, name)
	}
	return strings.Join(names, ",")
}

func (s *server) mcp(w http.ResponseWriter, r *http.Request) {
	at := time.Now() // before anything else: what is stored later, was stored too late
	var m struct {
		ID     json.RawMessage
		Method string
		Params struct {
			Name            string
			Arguments       Args
			ProtocolVersion string
		}
	}
	body, err := io.ReadAll(r.Body)
	if err == nil {
		err = json.Unmarshal(body, &m)
	}
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	tool, args := m.Params.Name, m.Params.Arguments
	var in *session
	if legacyRequest(r, m.Method) {
		if m.Method == "initialize" {
			s.legacy.open(w, m.ID, m.Params.ProtocolVersion)
			return
		}
		if in = s.legacy.of(w, r); in == nil {
			return
		}
		if m.Method == "" {
			in.answered(&s.legacy, m.ID, string(body))
		}
		if m.Method == "" || len(m.ID) == 0 {
			w.WriteHeader(http.StatusAccepted)
			return
		}
	}
	if m.Method == "tools/list" {
		w.Header().Set("Content-Type", "application/json")
		_, _ = fmt.Fprintf(w, `{"jsonrpc":"2.0","id":%s,"result":{"resultType":"complete","ttlMs":0,"cacheScope":"public","tools":[%s]}}`, m.ID, listed(in != nil))
		return
	}
	if known := []string{"count", "read", "notify", "ask"}; m.Method != "tools/call" || !slices.Contains(known[:2], tool) && (in == nil || !slices.Contains(known, tool)) {
		w.Header().Set("Content-Type", "application/json")
		w.WriteHeader(http.StatusNotFound)
		_, _ = fmt.Fprintf(w, `{"jsonrpc":"2.0","id":%s,"error":{"code":-32601,"message":"Method not found"}}`, m.ID)
		return
	}
	call, err := strconv.Unquote(string(m.ID))
	if err != nil {
		call = string(m.ID)
	}
	s.mu.Lock()
	s.effects = append(s.effects, Effect{tool, args.Key, call, at})
	s.counts[tool+" "+args.Key]++
	nth := s.counts[tool+" "+args.Key]
	witness, claimed := s.witness, s.claimed
	s.mu.Unlock()
	if witness != nil {
		want := []string{"requested", "authorized"}
		if slices.Contains(claimed, tool) {
			want = append(want, "started")
		}
		err := witness.Check(r.Context(), call, at, want...)
		s.mu.Lock()
		s.seen.Checked++
		if err != nil {
			s.seen.Violations = append(s.seen.Violations, err.Error())
		}
		s.mu.Unlock()
	}

	// It goes on when the caller hangs up, as servers do; its effect is done.
	wait := time.Duration(args.Wait) * time.Millisecond / time.Duration(args.Progress+1)
	rc := http.NewResponseController(w)
	if tool == "notify" {
		in.notify(&s.legacy, args.Key, args.Progress, wait)
		args.Progress = 0
	}
	told := ""
	if tool == "ask" {
		w.Header().Set("Content-Type", "text/event-stream")
		var err error
		told, err = in.ask(r.Context(), &s.legacy, func(m string) error {
			_, _ = fmt.Fprintf(w, "data: %s\n\n", m)
			return rc.Flush()
		})
		if err != nil {
			return
		}
	}
	if args.Progress > 0 {
		w.Header().Set("Content-Type", "text/event-stream")
		for i := range args.Progress {
			<-time.After(wait)
			_, _ = fmt.Fprintf(w, "data: {\"jsonrpc\":\"2.0\",\"method\":\"notifications/progress\",\"params\":{\"progressToken\":%q,\"progress\":%d}}\n\n", args.Key, i+1)
			if rc.Flush() != nil {
				return
			}
		}
	} else if tool != "ask" {
		w.Header().Set("Content-Type", "application/json")
	}
	<-time.After(wait)
	text, _ := json.Marshal(fmt.Sprintf("%s %s for the %d. time %s%s", tool, args.Key, nth, args.Pad, told)) // a string: cannot fail
	answer := fmt.Sprintf(`{"jsonrpc":"2.0","id":%s,"result":{"resultType":"complete","content":[{"type":"text","text":%s}]}}`, m.ID, text)
	if args.Progress > 0 || tool == "ask" {
		answer = "data: " + answer + "\n\n"
	}
	_, _ = io.WriteString(w, answer)
}
