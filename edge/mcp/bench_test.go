package mcp_test

import (
	"bytes"
	"context"
	"io"
	"net"
	"net/http"
	"syscall"
	"testing"
	"time"

	"waybill.dev/edge"
	"waybill.dev/edge/mcp"
	"waybill.dev/schemas"
)

func answering(body string) schemas.Handler {
	return func(ctx context.Context, e schemas.Event, emit schemas.Emit) error {
		_, err := emit(ctx, e.Next(&schemas.Completed{Status: 200}, []byte(body)))
		return err
	}
}

func stored(context.Context, schemas.Event) (schemas.Receipt, error) { return schemas.Receipt{}, nil }

const callBody = `{"jsonrpc":"2.0","id":7,"method":"tools/call","params":{"name":"echo","arguments":{"text":"hello"},` +
	`"_meta":{"io.modelcontextprotocol/protocolVersion":"2026-07-28","io.modelcontextprotocol/clientCapabilities":{},` +
	`"io.modelcontextprotocol/clientInfo":{"name":"bench","version":"1"}}}}`

const callAnswer = `{"jsonrpc":"2.0","id":"c0","result":{"resultType":"complete","content":[{"type":"text","text":"hello"}]}}`

func newServer(tb testing.TB, o mcp.Options) *edge.Server {
	if o.Store == nil {
		o.Store = stored
	}
	o.Edge = "e0"
	return serverOf(tb, mcp.New(o))
}

func serverOf(tb testing.TB, a *mcp.Adapter) *edge.Server {
	s, err := edge.New(edge.Options{Anonymous: &edge.Principal{Tenant: "acme", Agent: "researcher"}}, a.Routes()...)
	if err != nil {
		tb.Fatal(err)
	}
	return s
}

func newRequest(url string) *http.Request {
	r, _ := http.NewRequest("POST", url, bytes.NewReader([]byte(callBody)))
	r.Header = http.Header{
		"Content-Type": {"application/json"}, "Accept": {"application/json, text/event-stream"},
		"Mcp-Protocol-Version": {"2026-07-28"}, "Mcp-Method": {"tools/call"}, "Mcp-Name": {"echo"},
	}
	return r
}

// discard is the cheapest ResponseWriter there is.
type discard struct{ h http.Header }

func (discard) SetReadDeadline(time.Time) error  { return nil }
func (discard) SetWriteDeadline(time.Time) error { return nil }

func (d discard) Header() http.Header       { return d.h }
func (discard) Write(b []byte) (int, error) { return len(b), nil }
func (discard) WriteHeader(int)             {}

// cpu is what the process has used, in nanoseconds: on a busy machine the one
// figure to compare.
func cpu() int64 {
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		return 0
	}
	return u.Utime.Nano() + u.Stime.Nano()
}

// BenchmarkHandler is the shell and the adapter without the HTTP server.
func BenchmarkHandler(b *testing.B) {
	s := newServer(b, mcp.Options{Ask: answering(callAnswer)})
	r := newRequest("http://localhost/mcp/everything")
	body := bytes.NewReader([]byte(callBody))
	b.ReportAllocs()
	before := cpu()
	for b.Loop() {
		_, _ = body.Seek(0, io.SeekStart)
		r.Body = io.NopCloser(body)
		s.ServeHTTP(discard{http.Header{}}, r)
	}
	b.ReportMetric(float64(cpu()-before)/float64(b.N), "cpu-ns/op")
}

// BenchmarkPost is a POST over a loopback connection, the client's side
// included: a raw one, which costs little.
func BenchmarkPost(b *testing.B) {
	s := newServer(b, mcp.Options{Ask: answering(callAnswer)})
	ctx, cancel := context.WithCancel(b.Context())
	ln := listen(b)
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx, ln) }()
	defer func() { cancel(); <-done }()
	benchPosts(b, ln.Addr().String())
}

// BenchmarkPlain is the same with a server that does nothing but answer, to
// tell what net/http and the connection cost from what the gateway does.
func BenchmarkPlain(b *testing.B) {
	ln := listen(b)
	srv := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		_, _ = io.Copy(io.Discard, r.Body)
		_, _ = io.WriteString(w, callAnswer)
	})}
	done := make(chan error, 1)
	go func() { done <- srv.Serve(ln) }()
	defer func() { srv.Close(); <-done }()
	benchPosts(b, ln.Addr().String())
}

func listen(b *testing.B) net.Listener {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		b.Fatal(err)
	}
	return ln
}

func benchPosts(b *testing.B, addr string) {
	conn, err := net.Dial("tcp", addr)
	if err != nil {
		b.Fatal(err)
	}
	defer conn.Close()
	var req bytes.Buffer
	if err := newRequest("http://" + addr + "/mcp/everything").Write(&req); err != nil {
		b.Fatal(err)
	}
	buf := make([]byte, 4096)
	b.ReportAllocs()
	before := cpu()
	for b.Loop() {
		if _, err := conn.Write(req.Bytes()); err != nil {
			b.Fatal(err)
		}
		if n, err := conn.Read(buf); err != nil || !bytes.HasPrefix(buf[:n], []byte("HTTP/1.1 200 OK")) {
			b.Fatal(err, string(buf[:n]))
		}
	}
	b.ReportMetric(float64(cpu()-before)/float64(b.N), "cpu-ns/op")
}
