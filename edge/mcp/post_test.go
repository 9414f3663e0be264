package mcp_test

import (
	"bufio"
	"context"
	"errors"
	"flag"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"waybill.dev/edge"
	"waybill.dev/edge/mcp"
	"waybill.dev/schemas"
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
			println("goroutines left:\n" + string(buf[:runtime.Stack(buf, true)]))
			code = 1
		}
		runtime.Gosched()
	}
	os.Exit(code)
}

// recorder is a ResponseWriter that can be read while it is written.
type recorder struct {
	mu   sync.Mutex
	code int
	h    http.Header
	body strings.Builder
	fail error
}

func (r *recorder) Header() http.Header { return r.h }
func (r *recorder) WriteHeader(c int)   { r.mu.Lock(); defer r.mu.Unlock(); r.code = c }
func (r *recorder) Flush()              {}
func (r *recorder) Write(b []byte) (int, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.fail != nil {
		return 0, r.fail
	}
	return r.body.Write(b)
}
func (r *recorder) text() string { r.mu.Lock(); defer r.mu.Unlock(); return r.body.String() }

// post runs one request without a network, and returns when it has ended.
func post(t *testing.T, s http.Handler, w http.ResponseWriter, request string) {
	t.Helper()
	r, err := http.ReadRequest(bufio.NewReader(strings.NewReader(string(wire(request)))))
	if err != nil {
		t.Fatal(err)
	}
	s.ServeHTTP(w, r.WithContext(t.Context()))
}

const callRequest = "POST /mcp/everything HTTP/1.1\nMcp-Method: tools/call\nMcp-Name: echo\n\n" +
	`{"jsonrpc":"2.0","id":7,"method":"tools/call","params":{"name":"echo",$META}}`

const listenRequest = "POST /mcp/everything HTTP/1.1\nMcp-Method: subscriptions/listen\n\n" +
	`{"jsonrpc":"2.0","id":"L","method":"subscriptions/listen","params":{$META}}`

// A slow call turns into a stream after 5 s and gets a comment each 15 s.
func TestSlowCallBecomesStream(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := &recorder{h: http.Header{}}
		at := func(d time.Duration, want string) {
			<-time.After(d)
			synctest.Wait()
			if got := w.text(); got != want {
				t.Errorf("after %s more: %q, want %q", d, got, want)
			}
		}
		s := newServer(t, mcp.Options{Ask: func(ctx context.Context, e schemas.Event, emit schemas.Emit) error {
			at(4999*time.Millisecond, "")
			at(time.Millisecond, ":\n\n")
			at(15*time.Second, ":\n\n:\n\n")
			at(10*time.Second, ":\n\n:\n\n")
			_, _ = emit(ctx, e.Next(&schemas.Progressed{}, []byte(`{"p":1}`)))
			at(14*time.Second, ":\n\n:\n\ndata: {\"p\":1}\n\n")
			return answering(callAnswer)(ctx, e, emit)
		}})
		post(t, s, w, callRequest)
		synctest.Wait()
		if got := w.text(); !strings.HasSuffix(got, "data: "+strings.Replace(callAnswer, `"c0"`, "7", 1)+"\n\n") {
			t.Errorf("got %q", got)
		}
		before := w.text()
		<-time.After(time.Hour)
		if w.text() != before {
			t.Error("something was written after the end")
		}
	})
}

// A client that takes JSON only waits for its answer.
func TestSlowCallJSONOnly(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := &recorder{h: http.Header{}}
		s := newServer(t, mcp.Options{Ask: func(ctx context.Context, e schemas.Event, emit schemas.Emit) error {
			<-time.After(time.Minute)
			return answering(callAnswer)(ctx, e, emit)
		}})
		post(t, s, w, strings.Replace(callRequest, "\n\n", "\nAccept: application/json\n\n", 1))
		if want := strings.Replace(callAnswer, `"c0"`, "7", 1); w.text() != want {
			t.Errorf("got %q", w.text())
		}
	})
}

// A call whose ending does not come is cancelled after its deadline, unless a
// person is asked.
func TestOverdue(t *testing.T) {
	for name, held := range map[string]bool{"overdue": false, "held": true} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := &recorder{h: http.Header{}}
				var took time.Duration
				s := newServer(t, mcp.Options{
					Deadline: func(string, string) time.Duration { return 2 * time.Second },
					Ask: func(ctx context.Context, e schemas.Event, emit schemas.Emit) error {
						start := time.Now()
						if held {
							_, _ = emit(ctx, e.Next(&schemas.Held{}, nil))
						}
						select {
						case <-ctx.Done():
						case <-time.After(time.Hour):
							return answering(callAnswer)(ctx, e, emit)
						}
						took = time.Since(start)
						return ctx.Err()
					}})
				post(t, s, w, callRequest)
				if got := w.text(); held != strings.Contains(got, `"result"`) || held == strings.Contains(got, `"overdue"`) {
					t.Errorf("got %q", got)
				}
				if !held && took != 7*time.Second {
					t.Errorf("cancelled after %s", took)
				}
			})
		})
	}
}

// Looking for the name that a shortened one stands for takes no longer than a
// call may, however many pages there are, and its time is the call's own.
func TestOverdueLookup(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		pages := 0
		s := newServer(t, mcp.Options{
			Fronts:   []*schemas.Front{{Name: schemas.Gateway, Servers: []string{"everything"}}},
			Deadline: func(string, string) time.Duration { return 2 * time.Second },
			Ask: func(ctx context.Context, e schemas.Event, emit schemas.Emit) error {
				if e.Data.(*schemas.Requested).Method == "tools/call" {
					<-ctx.Done()
					return ctx.Err()
				}
				pages++
				<-time.After(1500 * time.Millisecond)
				return answering(`{"jsonrpc":"2.0","id":"c0","result":{"tools":[],"nextCursor":"more"}}`)(ctx, e, emit)
			}})
		w := &recorder{h: http.Header{}}
		start := time.Now()
		post(t, s, w, strings.NewReplacer("/mcp/everything", "/mcp", "echo", "everything__x_01234567").Replace(callRequest))
		if took := time.Since(start); pages != 2 || took != 8*time.Second || !strings.Contains(w.text(), `"overdue"`) {
			t.Errorf("after %s and %d pages: %s", took, pages, w.text())
		}
	})
}

// A write that fails ends the call's context and is what emit returns.
func TestWriteError(t *testing.T) {
	broken := errors.New("broken pipe")
	w := &recorder{h: http.Header{}, fail: broken}
	s := newServer(t, mcp.Options{Ask: func(ctx context.Context, e schemas.Event, emit schemas.Emit) error {
		if _, err := emit(ctx, e.Next(&schemas.Progressed{}, []byte(`{}`))); !errors.Is(err, broken) {
			t.Errorf("emit: %v", err)
		}
		if context.Cause(ctx) != broken {
			t.Errorf("cause %v", context.Cause(ctx))
		}
		return ctx.Err()
	}})
	post(t, s, w, callRequest)
}

// A panic in the rest of the gateway is one failed request.
func TestPanic(t *testing.T) {
	w := httptest.NewRecorder()
	s := newServer(t, mcp.Options{Ask: func(context.Context, schemas.Event, schemas.Emit) error { panic("boom") }})
	post(t, s, w, callRequest)
	if w.Code != 500 || s.Stats().Panics != 1 || s.Stats().InFlight != 0 {
		t.Errorf("%d %+v", w.Code, s.Stats())
	}
}

// What goes into the envelope is bounded, and who is beyond the bound is told it.
func TestBounds(t *testing.T) {
	s := newServer(t, mcp.Options{Ask: answering(callAnswer)})
	for name, c := range map[string]struct {
		name, param int // bytes
		want        string
	}{
		"at the bounds":   {4 << 10, 8<<10 - len("Mcp-Param-P"), `"result"`},
		"name beyond":     {4<<10 + 1, 0, "may have at most 4096 bytes"},
		"param beyond":    {4 << 10, 8<<10 + 1 - len("Mcp-Param-P"), "values of 8192 bytes together"},
		"nearly a header": {10, 40 << 10, "values of 8192 bytes together"},
	} {
		tool := strings.Repeat("<", c.name)
		w := httptest.NewRecorder()
		post(t, s, w, "POST /mcp/everything HTTP/1.1\nMcp-Method: tools/call\nMcp-Name: "+tool+"\nMcp-Param-P: "+strings.Repeat("<", c.param)+"\n\n"+
			`{"jsonrpc":"2.0","id":7,"method":"tools/call","params":{"name":"`+tool+`",$META}}`)
		if (w.Code == 200) != (name == "at the bounds") || w.Code != 200 && w.Code != 400 || !strings.Contains(w.Body.String(), c.want) {
			t.Errorf("%s: %d %s", name, w.Code, w.Body)
		}
	}
}

func dial(t *testing.T, addr, request string) net.Conn {
	t.Helper()
	conn, err := net.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	if _, err := conn.Write(wire(request)); err != nil {
		t.Fatal(err)
	}
	return conn
}

// Closing the connection cancels the call (streamable HTTP, "Cancellation"),
// before a stream has begun and after.
func TestClientLeaves(t *testing.T) {
	for _, streaming := range []bool{false, true} {
		asked, ended := make(chan struct{}), make(chan error)
		addr := serve(t, mcp.Options{Ask: func(ctx context.Context, e schemas.Event, emit schemas.Emit) error {
			if streaming {
				_, _ = emit(ctx, e.Next(&schemas.Progressed{}, []byte(`{}`)))
			}
			close(asked)
			<-ctx.Done()
			ended <- ctx.Err()
			return ctx.Err()
		}})
		conn := dial(t, addr, callRequest)
		<-asked
		conn.Close()
		if err := <-ended; !errors.Is(err, context.Canceled) {
			t.Error(err)
		}
	}
}

// A client that closes its half only is told that this cancelled its call.
func TestHalfClose(t *testing.T) {
	asked := make(chan struct{})
	addr := serve(t, mcp.Options{Ask: func(ctx context.Context, e schemas.Event, emit schemas.Emit) error {
		close(asked)
		<-ctx.Done()
		return ctx.Err()
	}})
	conn := dial(t, addr, callRequest)
	<-asked
	conn.(*net.TCPConn).CloseWrite()
	got, err := io.ReadAll(conn)
	if err != nil || !strings.HasPrefix(string(got), "HTTP/1.1 400 ") || !strings.Contains(string(got), `"code":"cancelled"`) {
		t.Errorf("%v: %s", err, got)
	}
}

// At shutdown a subscription ends at once and with a result; a call gets the
// time to end, and then an error.
func TestDrain(t *testing.T) {
	for name, c := range map[string]struct{ request, want string }{
		"listen": {listenRequest, `data: {"jsonrpc":"2.0","id":"L","result":{"resultType":"complete","_meta":{"io.modelcontextprotocol/subscriptionId":"L"}}}`},
		"call":   {callRequest, `"waybill":{"code":"draining"`},
	} {
		t.Run(name, func(t *testing.T) {
			asked := make(chan struct{})
			a := mcp.New(mcp.Options{Store: stored, Ask: func(ctx context.Context, e schemas.Event, emit schemas.Emit) error {
				close(asked)
				<-ctx.Done()
				return ctx.Err()
			}})
			s, err := edge.New(edge.Options{Anonymous: &edge.Principal{Tenant: "acme", Agent: "a"}, DrainTimeout: 50 * time.Millisecond}, a.Routes()...)
			if err != nil {
				t.Fatal(err)
			}
			ln, err := net.Listen("tcp", "127.0.0.1:0")
			if err != nil {
				t.Fatal(err)
			}
			stop := run(t, s, ln)
			conn := dial(t, ln.Addr().String(), c.request)
			<-asked
			go stop()
			got, err := io.ReadAll(conn)
			if err != nil || !strings.Contains(string(got), c.want) {
				t.Errorf("%v: %s", err, got)
			}
			stop()
		})
	}
}

// The opened event is stored once for each session, before its first call, and
// again after a failure.
func TestOpened(t *testing.T) {
	var stores, asks atomic.Int32
	var fail atomic.Bool
	s := newServer(t, mcp.Options{
		Now: func() time.Time { return noon },
		Store: func(_ context.Context, e schemas.Event) (schemas.Receipt, error) {
			if fail.Load() {
				return schemas.Receipt{}, errors.New("no log")
			}
			stores.Add(1)
			o := e.Data.(*schemas.Opened)
			if err := e.Check(); err != nil || e.Call != "" || o.Name != "golden/1 2026-11-22T12Z" || o.Client != "golden/1" {
				t.Errorf("%v %+v %+v", err, e, o)
			}
			return schemas.Receipt{}, nil
		},
		Ask: func(ctx context.Context, e schemas.Event, emit schemas.Emit) error {
			asks.Add(1)
			return answering(callAnswer)(ctx, e, emit)
		},
	})
	fail.Store(true)
	w := httptest.NewRecorder()
	post(t, s, w, callRequest)
	if w.Code != 503 || asks.Load() != 0 || w.Header().Get("Retry-After") == "" {
		t.Errorf("no log: %d %s", w.Code, w.Body)
	}
	fail.Store(false)
	for range 3 {
		post(t, s, httptest.NewRecorder(), callRequest)
	}
	if stores.Load() != 1 || asks.Load() != 3 {
		t.Errorf("%d stores, %d calls", stores.Load(), asks.Load())
	}
}

// FuzzPost: whatever comes, the answer is JSON or an event stream, and what is
// asked is a sound event that holds the body as it came.
func FuzzPost(f *testing.F) {
	f.Add([]byte(callBody), "2026-07-28", "tools/call", "echo", "Region", "x", "application/json")
	f.Add([]byte(`{"jsonrpc":"2.0","method":"n"}`), "2026-07-28", "", "", "", "", "*/*;q=0.1")
	f.Add([]byte(`[]`), "", "initialize", "=?base64?ZWNobw==?=", "\x00", "\xff", "")
	f.Fuzz(func(t *testing.T, body []byte, version, method, name, param, value, accept string) {
		s := newServer(t, mcp.Options{Ask: func(ctx context.Context, e schemas.Event, emit schemas.Emit) error {
			if string(e.Body) != string(body) {
				t.Errorf("body changed: %q", e.Body)
			}
			raw, err := e.MarshalJSON()
			if err != nil {
				t.Fatal(err)
			}
			var back schemas.Event
			if err := back.UnmarshalJSON(raw); err != nil {
				t.Errorf("event %s: %v", raw, err)
			}
			return answering(callAnswer)(ctx, e, emit)
		}})
		r := httptest.NewRequest("POST", "http://localhost/mcp/everything", strings.NewReader(string(body)))
		r.Header = http.Header{
			"Content-Type": {"application/json"}, "Accept": {accept}, "Mcp-Protocol-Version": {version},
			"Mcp-Method": {method}, "Mcp-Name": {name}, http.CanonicalHeaderKey("Mcp-Param-" + param): {value},
		}
		w := httptest.NewRecorder()
		s.ServeHTTP(w, r)
		switch kind := w.Header().Get("Content-Type"); {
		case w.Code == 202 && w.Body.Len() == 0:
		case kind == "application/json" && strings.HasPrefix(w.Body.String(), `{"jsonrpc":"2.0",`):
		case kind == "text/event-stream" && w.Code == 200:
		default:
			t.Errorf("%d %q: %s", w.Code, kind, w.Body)
		}
		if s.Stats().Panics != 0 {
			t.Error("panicked")
		}
	})
}
