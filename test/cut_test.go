package test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"waybill.dev/test/gateway"
	"waybill.dev/test/peers"
	"waybill.dev/test/upstream"
)

// wire is a network between a gateway and NATS that can be cut.
type wire struct {
	l  net.Listener
	to string

	mu    sync.Mutex
	cut   chan struct{} // closed when it is whole again; nil: it is whole
	conns map[net.Conn]bool
	wg    sync.WaitGroup
}

func newWire(t *testing.T, to string) *wire {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	w := &wire{l: l, to: to, conns: map[net.Conn]bool{}}
	w.wg.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			w.wg.Go(func() { w.serve(c) })
		}
	})
	t.Cleanup(func() {
		w.mend()
		_ = l.Close()
		w.drop()
		w.wg.Wait()
	})
	return w
}

func (w *wire) serve(c net.Conn) {
	w.passes() // nobody answers while it is cut
	s, err := net.Dial("tcp", w.to)
	if err != nil {
		_ = c.Close()
		return
	}
	w.mu.Lock()
	w.conns[c], w.conns[s] = true, true
	w.mu.Unlock()
	w.wg.Go(func() { w.copy(s, c) })
	w.copy(c, s)
}

func (w *wire) copy(to, from net.Conn) {
	defer func() {
		_, _ = to.Close(), from.Close()
		w.mu.Lock()
		defer w.mu.Unlock()
		delete(w.conns, to)
		delete(w.conns, from)
	}()
	b := make([]byte, 32<<10)
	for {
		n, err := from.Read(b)
		w.passes()
		if n > 0 {
			if _, err := to.Write(b[:n]); err != nil {
				return
			}
		}
		if err != nil {
			return
		}
	}
}

// passes waits while it is cut.
func (w *wire) passes() {
	w.mu.Lock()
	cut := w.cut
	w.mu.Unlock()
	if cut != nil {
		<-cut
	}
}

// cutOff lets nothing pass any more, without a word.
func (w *wire) cutOff() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.cut = make(chan struct{})
}

func (w *wire) mend() {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.cut != nil {
		close(w.cut)
		w.cut = nil
	}
}

// drop closes what is open, as a network does that says so.
func (w *wire) drop() {
	w.mu.Lock()
	defer w.mu.Unlock()
	for c := range w.conns {
		_ = c.Close()
	}
}

// The network between a gateway and NATS goes away and comes back: calls are
// refused or finished, by that gateway or by another, never lost, doubled or
// answered after their time; and sessions go on.
func TestNetworkCut(t *testing.T) {
	t.Parallel() // it mostly waits
	addr, dir := gateway.FreeAddr(t), t.TempDir()
	nats := gateway.Child(t, "nats", envNATS+"="+addr, envNATSDir+"="+dir)
	if _, err := nats.Await(t.Context(), "nats listens"); err != nil {
		t.Fatal(err)
	}
	w := newWire(t, addr)
	u := upstream.Start(t)
	config := func(addr string) string {
		return gateway.Config(fmt.Sprintf("bus: {url: \"nats://%s\", replicas: 1}\nservers:\n", addr) + gateway.Server("counting", u.URL, "deadline: 8s, idempotent: [read]"))
	}
	far, near := gateway.Start(t, config(w.l.Addr().String())), gateway.Start(t, config(addr))
	s, _, err := peers.OpenLegacy(t.Context(), peers.Endpoint{URL: far.URL + "/mcp/counting"}, "2025-11-25", struct{}{})
	if err != nil {
		t.Fatal(err)
	}
	stream, err := s.Listen(t.Context(), "")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = stream.Close() }()
	for _, c := range []struct {
		name   string
		length time.Duration
		said   bool // the connections are closed, too
	}{{"5 s", 5 * time.Second, false}, {"5 s, connections reset", 5 * time.Second, true}, {"30 s", 30 * time.Second, false}} {
		t.Run(c.name, func(t *testing.T) {
			o := outcomes{t: t, said: map[string]int{}, ok: map[string]bool{}, not: map[string]bool{}}
			ctx, stop := context.WithCancel(t.Context())
			var callers sync.WaitGroup
			for n := range 4 {
				for _, g := range []*gateway.Gateway{far, near} {
					callers.Go(func() {
						for i := 0; ctx.Err() == nil; i++ {
							o.call(g, fmt.Sprintf("%s %s %d %d", strings.ReplaceAll(c.name, " ", ""), g.URL[len(g.URL)-4:], n, i))
						}
					})
				}
			}
			<-time.After(500 * time.Millisecond)
			w.cutOff()
			if c.said {
				w.drop()
			}
			<-time.After(c.length)
			w.mend()
			mended := time.Now()
			if _, err := s.Call(t.Context(), "tools/call", map[string]any{"name": "read", "arguments": upstream.Args{Key: "after " + c.name}}); err != nil {
				t.Errorf("the session does not go on: %v", err)
			}
			back := time.Since(mended)
			if !becomes(within, func() bool {
				a, err := (&http.Client{Timeout: time.Second}).Get(far.Admin + "/readyz")
				if err != nil {
					return false
				}
				_ = a.Body.Close()
				return a.StatusCode == http.StatusOK
			}) {
				t.Error("the gateway is not ready again")
			}
			ready := time.Since(mended)
			stop()
			callers.Wait()
			o.check(u, far)
			t.Logf("%d calls: %v; the longest took %s; a call in a session %s after the cut, ready after %s",
				o.n.Load(), o.said, time.Duration(o.longest.Load()).Round(time.Millisecond), back.Round(time.Millisecond), ready.Round(time.Millisecond))
		})
	}
	// What the server says outside of calls still comes, once.
	if _, err := s.Call(t.Context(), "tools/call", map[string]any{"name": "notify", "arguments": upstream.Args{Key: "n", Progress: 5}}); err != nil {
		t.Fatal(err)
	}
	next, last := 1, ""
	for deadline := time.Now().Add(30 * time.Second); next <= 5; {
		// A stream on which nothing comes must not keep the test for ever.
		silent := time.AfterFunc(10*time.Second, func() { _ = stream.Close() })
		_, m, err := stream.Message()
		silent.Stop()
		if stream.LastID != "" {
			last = stream.LastID
		}
		switch {
		case err == nil && strings.Contains(string(m.Params), fmt.Sprintf(`"n":%d`, next)):
			next++
		case err == nil:
			t.Fatalf("%s, want message %d", m.Params, next)
		case time.Now().After(deadline):
			t.Fatalf("message %d does not come: %v", next, err)
		default:
			_ = stream.Close()
			if stream, err = s.Listen(t.Context(), last); err != nil {
				t.Fatal(err)
			}
		}
	}
}

// outcomes is what became of calls.
type outcomes struct {
	t       *testing.T
	n       atomic.Int64
	longest atomic.Int64

	mu   sync.Mutex
	said map[string]int
	ok   map[string]bool // by key: it was carried out, the caller was told
	not  map[string]bool // it was not, the caller was told
}

func (o *outcomes) call(g *gateway.Gateway, key string) {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	at := time.Now()
	a, err := g.Post(ctx, "counting", "tools/call", "count", fmt.Sprintf(
		`{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{"name":"count","arguments":{"key":%q,"wait":50},%s}}`, key, gateway.Meta))
	took := time.Since(at)
	o.n.Add(1)
	for was := o.longest.Load(); int64(took) > was && !o.longest.CompareAndSwap(was, int64(took)); was = o.longest.Load() {
	}
	// The deadline of 8 s, the edge's patience of 5 for the ending's way, and 2 in
	// which NATS's client connects anew and lets nobody publish.
	if took > 17*time.Second*slowdown {
		o.t.Errorf("%s took %s", key, took)
	}
	body := string(a.Body)
	o.mu.Lock()
	defer o.mu.Unlock()
	switch {
	case err != nil && !errors.Is(err, io.EOF):
		o.t.Errorf("%s: %v", key, err)
	case a.Status == http.StatusOK && strings.Contains(body, `"result"`):
		o.said["answered"]++
		o.ok[key] = true
	case a.Status == http.StatusServiceUnavailable && a.Header.Get("Retry-After") != "":
		o.said["refused: "+reason(body)]++
		o.not[key] = true
	case strings.Contains(body, `"error"`):
		o.said[fmt.Sprintf("%d %s", a.Status, reason(body))]++
		if strings.Contains(body, "was not carried out") {
			o.not[key] = true
		}
	default:
		o.t.Errorf("%s: HTTP %d %s", key, a.Status, body)
	}
}

// reason is the word in an error of the gateway.
func reason(body string) string {
	_, r, _ := strings.Cut(body, `"code":"`)
	r, _, _ = strings.Cut(r, `"`)
	if r == "" {
		return body
	}
	return r
}

// check holds what callers were told against what the server did, and the log.
func (o *outcomes) check(u *upstream.Upstream, g *gateway.Gateway) {
	o.t.Helper()
	effects := map[string]int{}
	for _, e := range u.Effects() {
		effects[e.Key]++
	}
	for key, n := range effects {
		if n > 1 && !strings.HasPrefix(key, "after ") {
			o.t.Errorf("%s was carried out %d times", key, n)
		}
	}
	for key := range o.ok {
		if effects[key] != 1 {
			o.t.Errorf("%s was answered and carried out %d times", key, effects[key])
		}
	}
	for key := range o.not {
		if effects[key] != 0 {
			o.t.Errorf("%s was refused and carried out", key)
		}
	}
	oneEnding(o.t, g)
}
