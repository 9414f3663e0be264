package dispatch

import (
	"bytes"
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net"
	"net/http"
	"net/http/httptrace"
	"net/url"
	"strconv"
	"strings"
	"time"

	"waybill.dev/schemas/jsonrpc"
	"waybill.dev/schemas/sse"
)

// mcpReads are the methods of MCP that have no effect, and so may be asked
// again. What is not here may have one, methods that nobody has heard of
// included.
var mcpReads = map[string]string{
	"server/discover":          "says what the server is",
	"tools/list":               "a list",
	"prompts/list":             "a list",
	"resources/list":           "a list",
	"resources/templates/list": "a list",
	"prompts/get":              "fills in a template; input for it comes with a request of its own",
	"resources/read":           "reads; a resource is read by uri, like a GET",
	"completion/complete":      "suggests values",
	"tasks/get":                "asks how a task stands",
	"subscriptions/listen":     "only listens; as a stream it is asked again by the client alone",

	// Of the revisions with sessions.
	"initialize":            "opens a session, in the place of one whose answer nobody heard",
	"ping":                  "asks whether anybody is there",
	"logging/setLevel":      "sets the same again",
	"resources/subscribe":   "a resource is subscribed to once",
	"resources/unsubscribe": "likewise",
	"tasks/list":            "a list",
	"tasks/result":          "waits for what a task comes to; the task does not depend on who waits",
}

// mcpNames says which member of the params the Mcp-Name header repeats.
// Without required, an event may leave the name out.
var mcpNames = map[string]struct {
	member   string
	required bool
}{
	"tools/call":            {"name", true},
	"prompts/get":           {"name", true},
	"resources/read":        {"uri", true},
	"resources/subscribe":   {"uri", false},
	"resources/unsubscribe": {"uri", false},
	"tasks/get":             {"taskId", false},
	"tasks/update":          {"taskId", false},
	"tasks/cancel":          {"taskId", false},
}

// mcpRevision is sent when an event names none.
const mcpRevision = "2026-07-28"

// answerDepth is how deep what a server says may be nested. A request that is
// too deep is refused and nothing has happened; an answer that is refused is
// lost after the tool has acted. So there is room for any that is meant.
const answerDepth = 512

// maxResultType is the longest result type that is taken for one: it becomes
// part of an event's envelope, where little fits.
const maxResultType = 64

// linger is what a server gets to end a response whose answer has been read.
const linger = 20 * time.Millisecond

// mcpServer calls one MCP server over streamable HTTP, revision 2026-07-28 or,
// in legacy.go, one with sessions. What is said in terms of HTTP holds for a
// server over stdio too: see [stdio].
//
// Of the request only the JSON-RPC id is replaced, by the call id as a string,
// the name by the server's where a front has given it another, and the trace
// context in _meta where it has to be there ([onward]);
// the answer is returned as it came, and so still has it. The headers that
// mirror the body are made anew from the event. Nothing of the caller's
// credentials can get here: the event has none.
type mcpServer struct {
	name      string
	sessions  *sessions
	parking   *parking
	url       *url.URL
	header    http.Header       // the same for every request; never modified
	transport http.RoundTripper // an error of it may be a [*Fault]
	maxAnswer int64
	held      bool // its sessions are in this process of the gateway, and end with it
	eras      eras
	life      context.Context // ends with the connection
	log       *slog.Logger
}

// openMCP is the kind mcp.
func openMCP(s Server, opt Options) (Connection, error) {
	if len(s.Command) > 0 {
		if s.URL != "" || len(s.Header) > 0 {
			return Connection{}, errors.New("a command has neither url nor headers")
		}
		t, err := openStdio(s, opt)
		if err != nil {
			return Connection{}, err
		}
		m := &mcpServer{
			name: s.Name, sessions: opt.sessions, parking: opt.parking, url: &url.URL{Scheme: "stdio", Host: s.Name}, header: http.Header{},
			transport: t, held: true, maxAnswer: opt.MaxAnswer, log: opt.Log,
		}
		m.eras.fixed, m.eras.time = s.Era, probeStart
		var end context.CancelFunc
		m.life, end = context.WithCancel(context.Background())
		return Connection{Call: m.call, Close: func() { end(); t.close() }, Owner: m.ownerOf, mcp: m}, nil
	}
	u, err := url.Parse(s.URL)
	if err != nil {
		return Connection{}, err
	}
	if u.Scheme != "http" && u.Scheme != "https" || u.Host == "" {
		return Connection{}, fmt.Errorf("url %q: must be http or https", u.Redacted())
	}
	m := &mcpServer{name: s.Name, sessions: opt.sessions, parking: opt.parking, url: u, header: http.Header{}, maxAnswer: opt.MaxAnswer, log: opt.Log}
	m.eras.fixed, m.eras.time = s.Era, probeTime
	for name, values := range s.Header {
		name = http.CanonicalHeaderKey(name)
		if !headerName(name) || ours(name) {
			return Connection{}, fmt.Errorf("header %q cannot be set", name)
		}
		for _, v := range values {
			if !headerValue(v) {
				return Connection{}, fmt.Errorf("header %q: its value cannot be sent", name)
			}
		}
		m.header[name] = values
	}
	if user := u.User; user != nil && m.header.Get("Authorization") == "" {
		password, _ := user.Password()
		m.header.Set("Authorization", "Basic "+base64.StdEncoding.EncodeToString([]byte(user.Username()+":"+password)))
	}
	m.header.Set("Content-Type", "application/json")
	m.header.Set("Accept", "application/json, text/event-stream")
	m.header.Set("User-Agent", "waybill")

	// A Transport used directly follows no redirect, which could lead the
	// operator's credentials, or the gateway's place in the network, to
	// somewhere else; and it keeps no cookies.
	//
	// It may send a request a second time by itself. Over HTTP/1.1 that is
	// when a reused connection failed and either nothing of the request was
	// written to it (net/http counts the bytes), or the request is one that
	// RFC 9110 or an Idempotency-Key header calls idempotent. A POST without
	// that header, which ours refuses, is only ever sent again in the first
	// case, for which GetBody is given. HTTP/2 also sends again what a server
	// reset with PROTOCOL_ERROR, when it may have been carried out; so it is
	// left out.
	var http1 http.Protocols
	http1.SetHTTP1(true)
	t := &http.Transport{
		Protocols: &http1,
		Proxy:     nil, // not from the environment: the operator names the endpoint
		DialContext: (&net.Dialer{
			Timeout:   5 * time.Second,
			KeepAlive: 15 * time.Second,
		}).DialContext,
		TLSHandshakeTimeout: 5 * time.Second,
		MaxIdleConnsPerHost: s.Concurrency,
		// Less than the 5 s after which a Node server, the usual one, closes
		// an idle connection. To be closed while the next request is on its
		// way would make the outcome of that unknown, and nobody wants that
		// for the price of a handshake.
		IdleConnTimeout:        4 * time.Second,
		DisableCompression:     true, // the bytes are kept
		MaxResponseHeaderBytes: 64 << 10,
		WriteBufferSize:        8 << 10, // headers and an inline body in one write
		ReadBufferSize:         8 << 10,
		// No ResponseHeaderTimeout: a call may take long, its deadline is the
		// bound.
	}
	m.transport = t
	var end context.CancelFunc
	m.life, end = context.WithCancel(context.Background())
	return Connection{Call: m.call, Close: func() { end(); t.CloseIdleConnections() }, Owner: m.ownerOf, mcp: m}, nil
}

// ours tells whether the gateway itself decides on a header.
func ours(name string) bool {
	switch name {
	case "Content-Type", "Content-Length", "Content-Encoding", "Transfer-Encoding", "Trailer", "Host",
		"Connection", "Keep-Alive", "Te", "Upgrade", "Expect", "Accept", "Accept-Encoding", "Traceparent", "Tracestate",
		"Idempotency-Key", "X-Idempotency-Key": // see openMCP
		return true
	}
	return strings.HasPrefix(name, "Mcp-")
}

// call makes a call in the era of the server, whichever the client is of.
func (m *mcpServer) call(ctx context.Context, c Call, progress func([]byte) error) (Answer, error) {
	if c.In != "" {
		return m.inSession(ctx, c, progress)
	}
	era := c.Era
	if era == EraAuto {
		era = m.eraOf(ctx)
	}
	switch old := legacy(c.Requested.Revision); {
	case old && era == EraModern:
		return m.oldClient(ctx, c, progress)
	case !old && era == EraLegacy:
		return m.newClient(ctx, c, progress)
	case old:
		return m.legacy(ctx, c, progress)
	}
	return m.modern(ctx, c, progress)
}

// modern makes a call of a revision without sessions at a server of one.
func (m *mcpServer) modern(ctx context.Context, c Call, progress func([]byte) error) (Answer, error) {
	body, header, err := m.request(c)
	if err != nil {
		return Answer{}, &Fault{Kind: Invalid, Err: err}
	}
	resp, err := m.send(ctx, http.MethodPost, header, body, c.Connected)
	if err != nil {
		return Answer{}, err
	}
	c.Heard()
	answer, err := m.answer(resp, c, func() (Answer, error) { return m.stream(resp.Body, c, progress) })
	if err != nil {
		resp.Body.Close() // which hangs up, unless all was read
		return Answer{}, err
	}
	answer.Status = resp.StatusCode
	return answer, nil
}

// send sends one request and returns when the answer has begun. The error is a
// [*Fault]. body may be nil.
func (m *mcpServer) send(ctx context.Context, method string, header http.Header, body []byte, connected func()) (*http.Response, error) {
	reached := false
	req := &http.Request{
		Method: method, URL: m.url, Host: m.url.Host, Header: header,
		Proto: "HTTP/1.1", ProtoMajor: 1, ProtoMinor: 1,
	}
	if body != nil {
		req.Body, req.ContentLength = io.NopCloser(bytes.NewReader(body)), int64(len(body))
		req.GetBody = func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(body)), nil }
	}
	resp, err := m.transport.RoundTrip(req.WithContext(httptrace.WithClientTrace(ctx, &httptrace.ClientTrace{
		// Before the first byte is written. With HTTP/1.1 it is called on the
		// goroutine of RoundTrip.
		GotConn: func(httptrace.GotConnInfo) { reached = true; connected() },
	})))
	if f := new(Fault); errors.As(err, &f) {
		return nil, f
	}
	if err != nil {
		// A connection is dialled again after one was had only when nothing
		// had been written to that.
		var op *net.OpError
		if !reached || errors.As(err, &op) && op.Op == "dial" {
			return nil, faultf(Unsent, "%w", err)
		}
		return nil, faultf(Broken, "%w", err)
	}
	return resp, nil
}

// request makes the body and the headers. What policy judged is what the
// upstream is going to read: an event whose body says something else than its
// target is not sent.
func (m *mcpServer) request(c Call) ([]byte, http.Header, error) {
	body, name, err := mcpBody(c)
	if err != nil {
		return nil, nil, err
	}
	target := c.Requested.Target

	h := make(http.Header, len(m.header)+6+len(c.Requested.Headers))
	maps.Copy(h, m.header)
	values := make([]string, 0, 6+len(c.Requested.Headers)) // one allocation for all of them
	set := func(name, value string) {                       // canonical names only
		values = append(values, value)
		h[name] = values[len(values)-1 : len(values) : len(values)]
	}
	set("Mcp-Protocol-Version", mcpRevision)
	if c.Requested.Revision != "" {
		set("Mcp-Protocol-Version", headerText(c.Requested.Revision))
	}
	set("Mcp-Method", headerText(target.Method))
	if name != "" {
		set("Mcp-Name", headerText(name))
	}
	c.Trace.headers(set)
	if m.held {
		set(headerTenant, string(c.Event.Tenant))
	}
	// They belong to the body and are encoded already. Nothing else that an
	// event might hold is passed on.
	for name, value := range c.Requested.Headers {
		name = http.CanonicalHeaderKey(name)
		if !strings.HasPrefix(name, "Mcp-Param-") {
			continue
		}
		if !headerName(name) || !headerValue(value) {
			return nil, nil, fmt.Errorf("header %q cannot be sent", name)
		}
		set(name, value)
	}
	return body, h, nil
}

// answer reads the answer from a response; what comes as a stream of events is
// read by stream.
func (m *mcpServer) answer(resp *http.Response, c Call, stream func() (Answer, error)) (Answer, error) {
	ok := resp.StatusCode >= 200 && resp.StatusCode < 300
	kind, _, _ := strings.Cut(resp.Header.Get("Content-Type"), ";")
	if ok && strings.EqualFold(strings.TrimSpace(kind), "text/event-stream") {
		if c.Requested.OneWay {
			return Answer{}, faultf(Garbled, "a stream in answer to a one-way message")
		}
		a, err := stream()
		a.Release = drain(resp)
		return a, err
	}
	if ok && c.Requested.OneWay {
		// Nothing is expected in the body, so nothing waits for it to end.
		return Answer{Release: drain(resp)}, nil
	}
	body, err := m.read(resp)
	resp.Body.Close()
	if err != nil {
		return Answer{}, err
	}
	refused := refusal(resp)
	if refused != nil && refused.After > 0 {
		return Answer{}, refused
	}
	// Other statuses may carry an answer of the protocol too: 404 comes with
	// "method not found", 400 with what is wrong.
	msg, err := m.decode(body, c)
	if err == nil {
		switch id, _ := msg.ID().Text(); {
		case !msg.IsResponse():
			err = errors.New("it is a request")
		case id == string(c.ID) && msg.ID().Kind() == jsonrpc.String:
			return m.done(msg, c)
		case msg.ID().Kind() <= jsonrpc.Null && resp.StatusCode >= 400 && resp.StatusCode < 500:
			// The server could or would not read the id. From a 5xx the same
			// may be anybody's, a proxy's for one.
			return m.done(msg, c)
		default:
			err = errors.New("it answers another request")
		}
	}
	switch resp.StatusCode {
	case http.StatusMovedPermanently, http.StatusFound, http.StatusSeeOther, http.StatusTemporaryRedirect, http.StatusPermanentRedirect:
		err = errors.New("redirects are not followed; set the url of the server to where it is")
	case http.StatusUnauthorized, http.StatusForbidden, http.StatusProxyAuthRequired:
		err = errors.New("it did not accept the gateway; see the headers that are set for the server")
	}
	if refused == nil {
		refused = &Fault{Kind: Garbled}
	}
	refused.Err = fmt.Errorf("%w: %w", unanswered(resp.StatusCode), err)
	return Answer{}, refused
}

// unanswered is the HTTP status of a response that has no answer to the call.
type unanswered int

func (u unanswered) Error() string {
	return fmt.Sprintf("HTTP %d without an answer to the call", int(u))
}

// refusal is what a status means when there is no answer; nil if nothing in
// particular.
func refusal(resp *http.Response) *Fault {
	if resp.StatusCode < 400 {
		return nil
	}
	f := faultf(Garbled, "HTTP %d", resp.StatusCode)
	after := resp.Header.Get("Retry-After")
	switch s := resp.StatusCode; {
	case s == http.StatusTooManyRequests:
		f.Kind, f.After = Busy, retryAfter(after)
	case s == http.StatusServiceUnavailable && after != "":
		f.Kind, f.After = Refused, retryAfter(after)
	case s == http.StatusBadGateway, s == http.StatusServiceUnavailable, s == http.StatusGatewayTimeout:
		f.Kind = Gateway
	case s >= 500:
		f.Kind = Crashed
	default:
		return nil
	}
	return f
}

// retryAfter reads the header, in seconds or as a date; 0 if there is none. Now
// is a time too, and a header that cannot be read still asks for patience.
func retryAfter(v string) time.Duration {
	if v == "" {
		return 0
	}
	if s, err := strconv.ParseUint(v, 10, 31); err == nil {
		return max(time.Duration(s)*time.Second, 1)
	}
	if at, err := http.ParseTime(v); err == nil {
		return max(time.Until(at), 1)
	}
	return 1
}

// drain is the Release of a response: only one that was read to its end leaves
// a connection that can be used again.
func drain(resp *http.Response) func(hangUp func()) {
	return func(hangUp func()) {
		t := time.AfterFunc(linger, hangUp)
		defer t.Stop()
		defer resp.Body.Close()
		_, _ = io.CopyN(io.Discard, resp.Body, 4<<10)
	}
}

func (m *mcpServer) read(resp *http.Response) ([]byte, error) {
	if resp.ContentLength > m.maxAnswer {
		return nil, faultf(TooLarge, "HTTP %d with %d bytes", resp.StatusCode, resp.ContentLength)
	}
	var buf bytes.Buffer
	if resp.ContentLength > 0 {
		buf.Grow(int(resp.ContentLength) + bytes.MinRead)
	}
	n, err := buf.ReadFrom(io.LimitReader(resp.Body, m.maxAnswer+1))
	switch {
	case err != nil:
		return nil, faultf(Broken, "reading the answer: %w", err)
	case n > m.maxAnswer:
		return nil, faultf(TooLarge, "HTTP %d with more than %d bytes", resp.StatusCode, m.maxAnswer)
	}
	return buf.Bytes(), nil
}

// stream reads messages until the one that answers.
func (m *mcpServer) stream(body io.Reader, c Call, progress func([]byte) error) (Answer, error) {
	// The bound on the data is decode's; this one leaves room for the framing.
	for event, err := range sse.Read(body, 2*int(m.maxAnswer)) {
		switch {
		case errors.Is(err, sse.ErrTooLarge):
			return Answer{}, faultf(TooLarge, "a message of the stream: %w", err)
		case err != nil:
			return Answer{}, faultf(Broken, "reading the stream: %w", err)
		case len(event.Data) == 0, event.Name != "" && event.Name != "message":
			continue // a keepalive, or no message of MCP
		}
		msg, err := m.decode(event.Data, c)
		if errors.Is(err, jsonrpc.ErrTooLarge) {
			return Answer{}, faultf(TooLarge, "a message of the stream: %w", err)
		}
		if err != nil {
			return Answer{}, faultf(Garbled, "a message of the stream: %w", err)
		}
		switch id, _ := msg.ID().Text(); {
		case msg.IsNotification():
			if err := progress(event.Data); err != nil {
				return Answer{}, err
			}
		case msg.IsRequest():
			// Gone since this revision; nobody could answer, and the server
			// would wait for it.
			return Answer{}, faultf(Garbled, "the server asks %q of the client, which this revision does not have", msg.Method())
		case id == string(c.ID) && msg.ID().Kind() == jsonrpc.String:
			return m.done(msg, c)
		default:
			return Answer{}, faultf(Garbled, "the stream answers another request")
		}
	}
	return Answer{}, faultf(Broken, "the stream ended without an answer")
}

func (m *mcpServer) decode(b []byte, c Call) (*jsonrpc.Message, error) {
	return jsonrpc.Decode(b, jsonrpc.Limits{Bytes: int(m.maxAnswer), Depth: answerDepth, AllowCaseVariants: !c.filters()})
}

// done makes the answer of the message that answers.
func (m *mcpServer) done(msg *jsonrpc.Message, c Call) (Answer, error) {
	var a Answer
	var err error
	if a.Body, a.Removed, a.RemovedMore, err = filterList(msg, c.Requested.Method, c); err != nil {
		return Answer{}, listFault(err)
	}
	a.ErrorCode, _ = msg.ErrorCode()
	if a.ErrorCode == 0 && msg.Error().Exists() {
		a.ErrorCode = jsonrpc.CodeInternalError // an error all the same, whatever its code is
	}
	if result, _ := msg.Result().Get("resultType").Text(); result != "complete" {
		if len(result) > maxResultType {
			return Answer{}, faultf(Garbled, "its resultType has %d bytes", len(result))
		}
		a.Result = result
	}
	return a, nil
}

// headerText writes a value for a header: as it is if it is visible ASCII, with
// spaces and tabs inside but not at its ends, and could not be taken for the
// encoded form; else in that form.
func headerText(s string) string {
	const prefix, suffix = "=?base64?", "?="
	plain := s != "" && s == strings.Trim(s, " \t") &&
		!(strings.HasPrefix(s, prefix) && strings.HasSuffix(s, suffix)) &&
		strings.IndexFunc(s, func(r rune) bool { return r < 0x20 || r > 0x7e }) < 0
	if plain {
		return s
	}
	return prefix + base64.StdEncoding.EncodeToString([]byte(s)) + suffix
}

// headerValue tells whether net/http would send s.
func headerValue(s string) bool {
	return strings.IndexFunc(s, func(r rune) bool { return r < 0x20 && r != '\t' || r == 0x7f }) < 0
}

// headerName tells whether s is a token of RFC 9110.
func headerName(s string) bool {
	return s != "" && strings.IndexFunc(s, func(r rune) bool {
		return r <= ' ' || r >= 0x7f || strings.ContainsRune(`"(),/:;<=>?@[\]{}`, r)
	}) < 0
}
