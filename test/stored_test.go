package test

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"waybill.dev/schemas/sse"
	"waybill.dev/test/gateway"
	"waybill.dev/test/upstream"
)

// endings is any of them, for a witness.
const endings = "completed|failed|denied|cancelled"

// client has a connection for each of many callers.
var client = &http.Client{Transport: &http.Transport{MaxIdleConnsPerHost: 512}}

// tool is one call of a tool of [upstream].
type tool struct {
	server string // as the gateway's config names it
	name   string
	args   upstream.Args
}

// reply is what a caller knows of its call.
type reply struct {
	tool
	call     string          // as the gateway calls it; "" when it did not say
	status   int             // of HTTP; 0 when no answer began
	body     json.RawMessage // the answer, when all of it came
	progress int             // messages before it
	at       time.Time       // when the answer was there
	err      error           // why there is none
}

// answer is a JSON-RPC response.
type answer struct {
	ID     string
	Result json.RawMessage
	Error  *struct {
		Code int
		Data struct{ Waybill struct{ Code string } }
	}
}

// answered tells whether the caller knows how its call ended.
func (r reply) answered() bool { return r.err == nil }

// parsed is the answer taken apart.
func (r reply) parsed() (a answer, err error) {
	if err = json.Unmarshal(r.body, &a); err == nil && a.ID != r.args.Key && a.ID != "" {
		err = fmt.Errorf("answers %q, asked was %q", a.ID, r.args.Key)
	}
	return a, err
}

// ask makes a call. The key of its arguments is its JSON-RPC id.
func ask(ctx context.Context, g *gateway.Gateway, what tool) (r reply) {
	r = reply{tool: what}
	args, err := json.Marshal(what.args)
	if err != nil {
		return reply{err: err}
	}
	body := fmt.Sprintf(`{"jsonrpc":"2.0","id":%q,"method":"tools/call","params":{"name":%q,"arguments":%s,%s}}`,
		what.args.Key, what.name, args, gateway.Meta)
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, g.URL+"/mcp/"+what.server, strings.NewReader(body))
	if err != nil {
		return reply{err: err}
	}
	for k, v := range map[string]string{
		"Content-Type": "application/json", "Accept": "application/json, text/event-stream",
		"MCP-Protocol-Version": "2026-07-28", "Mcp-Method": "tools/call", "Mcp-Name": what.name,
	} {
		req.Header.Set(k, v)
	}
	resp, err := client.Do(req)
	if err != nil {
		r.err = err
		return r
	}
	defer func() { _ = resp.Body.Close() }()
	r.status, r.call, r.at = resp.StatusCode, resp.Header.Get("Waybill-Call"), time.Now()
	if resp.Header.Get("Content-Type") != "text/event-stream" {
		r.body, r.err = io.ReadAll(resp.Body)
		return r
	}
	for e, err := range sse.Read(resp.Body, 8<<20) {
		if err != nil {
			r.err = err
			return r
		}
		if len(e.Data) == 0 {
			continue
		}
		if r.body != nil {
			r.progress++
		}
		r.body, r.at = bytes.Clone(e.Data), time.Now()
	}
	// The stream is whole only when its last message is the answer.
	if a, err := r.parsed(); err != nil || a.ID == "" {
		r.err = fmt.Errorf("the stream broke off: %w", io.ErrUnexpectedEOF)
	}
	return r
}

// observer is the URL by which a gateway's log may be watched.
func observer(t testing.TB, g *gateway.Gateway) string {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(g.Dir, "data", "log", "observer.url"))
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(string(b))
}

// counting starts a counting upstream and a gateway in front of it, whose log
// can be watched.
func counting(t testing.TB, env ...string) (*upstream.Upstream, *gateway.Gateway) {
	t.Helper()
	u := upstream.Start(t)
	return u, gateway.Start(t, gateway.Config(
		"bus: {embedded: {listen: "+gateway.FreeAddr(t)+"}}\nservers:\n"+
			gateway.Native("counter", u.URL, "idempotent: [read], deadline: 20s")+
			gateway.Native("hasty", u.URL, "idempotent: [read], deadline: 400ms")), env...)
}

// Promise 1: at the moment an upstream is called, the call's events are in the
// log; at the moment a caller has the answer, the ending is.
func TestStoredBeforeDone(t *testing.T) {
	const callers, calls = 50, 600
	u, g := counting(t)
	u.Observe(observer(t, g), "count")
	w, err := upstream.Watch(observer(t, g))
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()

	work := make(chan tool)
	var replies, streams, large int
	var mu sync.Mutex
	var crowd sync.WaitGroup
	for range callers {
		crowd.Go(func() {
			for what := range work {
				r := ask(t.Context(), g, what)
				a, err := r.parsed()
				switch {
				case r.err != nil:
					t.Errorf("%s: %v", what.args.Key, r.err)
				case err != nil || a.Result == nil:
					t.Errorf("%s: HTTP %d, %v: %.300s", what.args.Key, r.status, err, r.body)
				case r.progress != what.args.Progress:
					t.Errorf("%s: %d messages before the answer, want %d", what.args.Key, r.progress, what.args.Progress)
				default:
					want := []string{"requested", "authorized", endings}
					if what.args.Progress > 0 {
						want = append(want, "progressed")
					}
					if err := w.Check(t.Context(), r.call, r.at, want...); err != nil {
						t.Errorf("the caller has the answer: %v", err)
					}
				}
				mu.Lock()
				replies++
				if what.args.Progress > 0 {
					streams++
				}
				if len(what.args.Pad) > 4096 {
					large++
				}
				mu.Unlock()
			}
		})
	}
	for i := range calls {
		what := tool{server: "counter", name: "count", args: upstream.Args{Key: fmt.Sprint("k", i)}}
		if i%2 == 0 {
			what.name = "read"
		}
		if i%3 == 0 {
			what.args.Pad = strings.Repeat("0123456789abcdef", 400)
		}
		if i%5 == 0 {
			what.args.Progress, what.args.Wait = 3, 20
		}
		work <- what
	}
	close(work)
	crowd.Wait()

	seen := u.Testimony()
	for _, v := range seen.Violations {
		t.Errorf("the upstream was called: %s", v)
	}
	if seen.Checked != calls || len(u.Effects()) != calls {
		t.Errorf("%d calls were checked and %d carried out, want %d", seen.Checked, len(u.Effects()), calls)
	}
	t.Logf("%d calls of %d callers, %d with more than 4 KB, %d streams: %d violations at the upstream", replies, callers, large, streams, len(seen.Violations))

	// The witness finds what is wrong.
	for _, c := range []struct {
		what, call string
		at         time.Time
		want       string
	}{
		{"a call that nobody stored", "0fabricated0", time.Now(), "requested"},
		{"an event that its call lacks", u.Effects()[0].Call, time.Now(), "denied"},
		{"an event that came after the act", u.Effects()[0].Call, u.Effects()[0].At, endings},
	} {
		if err := w.Check(t.Context(), c.call, c.at, c.want); err == nil {
			t.Errorf("%s passes", c.what)
		}
	}
	// And so does the upstream, which is called without the gateway here.
	resp, err := http.Post(u.URL, "application/json", strings.NewReader(
		`{"jsonrpc":"2.0","id":"0fabricated0","method":"tools/call","params":{"name":"read","arguments":{"key":"direct"}}}`))
	if err != nil {
		t.Fatal(err)
	}
	_ = resp.Body.Close()
	if seen := u.Testimony(); len(seen.Violations) != 1 || !strings.Contains(seen.Violations[0], "0fabricated0") {
		t.Errorf("a call past the gateway: violations %v, want one", seen.Violations)
	}
}
