package dispatch

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptrace"
	"slices"
	"strconv"
	"strings"
	"sync"

	"golang.org/x/time/rate"

	"waybill.dev/schemas/jsonrpc"
	"waybill.dev/schemas/sse"
)

// stdio is a server that runs as a process of its own and speaks MCP over its
// standard input and output, one message a line. It takes the place of the HTTP
// transport of an [mcpServer], which so needs not know: a request is written to
// the process and answered with the messages that belong to it, GET gives those
// of a session that belong to no request, DELETE ends the session, and a session
// whose process has ended is unknown (404).
//
// Of a revision with sessions each session has a process of its own, or, with
// shared, all have one, which the gateway itself initializes. Of 2026-07-28,
// which has none, all calls of a tenant share one, or, with shared, all calls.
// What the gateway asks for itself, of no tenant, is asked of a process that ends
// with the answer. So what a process says can only get to the tenant for which
// it was started, unless the operator wants one for all.
//
// Whose a message is, is known of an answer by its id, of progress by its token,
// and of what a subscription brings by its subscription's id. The protocol does
// not say it of the rest. That belongs to the one request that the process has
// in flight; if there is none, or more than one, to the session. Where there are
// no sessions it is dropped, and the log says so.
//
// What is changed on the way: line ends between the tokens of a message become
// spaces; and where processes are shared the progress token, which two clients
// may choose alike, is another one there.
//
// Nothing is dropped silently, and nothing grows without bound. What a request
// or a session does not read for long holds up the process, as long as that
// serves nobody else; after that, or at once where others would have to wait, the
// request fails, or the session ends, and the process with it if it is the
// session's own.
type stdio struct {
	server  string
	command []string
	env     []string
	dir     string
	shared  bool
	most    int // processes
	limit   int // bytes of a message
	log     *slog.Logger
	hide    *strings.Replacer
	timing  stdioTiming

	threads sync.WaitGroup
	wg      sync.WaitGroup // processes, and goroutines

	mu       sync.Mutex
	closed   bool
	starts   chan func() // to the thread that starts processes; nil before the first
	children map[*process]bool
	sessions map[string]*stdioSession
	modern   map[string]*common  // of revision 2026-07-28, by tenant; "" for all
	legacy   *common             // the one that all sessions share
	ill      map[string]*illness // by tenant; "" for all
}

// common is the place of a process that many share.
type common struct {
	tenant  string        // whose they are; "": all
	opening chan struct{} // held by who starts it
	c       *process      // of the stdio's mu; nil: none runs
}

func newCommon(tenant string) *common {
	return &common{tenant: tenant, opening: make(chan struct{}, 1)}
}

// stdioSession is what a session ID stands for.
type stdioSession struct {
	id  string
	c   *process
	box mailbox // what belongs to no request

	reading bool // somebody has the stream; of c.mu
}

// Headers by which a [session] says whose it is. They do not leave the process.
const (
	headerTenant  = "Waybill-Tenant"
	headerSession = "Waybill-Session"
)

// stdioMethods of MCP that the bridge knows.
const (
	methodInitialized = "notifications/initialized"
	methodProgress    = "notifications/progress"
)

func openStdio(s Server, opt Options) (*stdio, error) {
	if s.Command[0] == "" {
		return nil, errors.New("command: the program's name is empty")
	}
	for _, a := range s.Command {
		if strings.Contains(a, "\x00") {
			return nil, errors.New("command: a NUL character cannot be passed on")
		}
	}
	t := &stdio{
		server: s.Name, command: s.Command, dir: s.Dir, most: positive(s.Processes, 64), limit: int(opt.MaxAnswer),
		log: opt.Log, hide: hidden(s.Secrets), timing: defaultStdioTiming,
		children: map[*process]bool{}, sessions: map[string]*stdioSession{}, modern: map[string]*common{}, legacy: newCommon(""), ill: map[string]*illness{},
	}
	switch s.Process {
	case "", "session":
	case "server":
		t.shared = true
	default:
		return nil, fmt.Errorf("process %q: must be session or server", s.Process)
	}
	for name, value := range s.Env {
		if name == "" || strings.ContainsAny(name, "=\x00") || strings.Contains(value, "\x00") {
			return nil, fmt.Errorf("env %q cannot be set", name)
		}
		t.env = append(t.env, name+"="+value)
	}
	slices.Sort(t.env)
	if t.env == nil {
		t.env = []string{} // nil would be the gateway's own
	}
	return t, nil
}

// close ends all processes and waits until nothing is left of them. Whoever
// calls still has its answer by then.
func (s *stdio) close() {
	s.mu.Lock()
	was := s.closed
	s.closed = true
	var all []*process
	for c := range s.children {
		all = append(all, c)
	}
	s.mu.Unlock()
	for _, c := range all {
		c.end(errStdioDown, true)
	}
	s.wg.Wait()
	if s.starts != nil && !was {
		close(s.starts)
	}
	s.threads.Wait()
}

// spawn runs f unless everything is being closed.
func (s *stdio) spawn(f func()) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return false
	}
	s.wg.Go(f)
	return true
}

func (s *stdio) process(tenant, session string, shared, modern bool) *process {
	return &process{
		s: s, tenant: tenant, session: session, shared: shared, modern: modern,
		turn: make(chan struct{}, 1), lines: make(chan *line, 1),
		ending: make(chan struct{}), exited: make(chan struct{}), gone: make(chan struct{}),
		asides: make(chan struct{}, stdioAside), noise: rate.NewLimiter(1, 10),
		asked: map[string]*pending{}, tokens: map[string]*pending{}, sessions: map[string]*stdioSession{},
	}
}

// RoundTrip is that of [http.RoundTripper], with errors that may be a [*Fault].
func (s *stdio) RoundTrip(req *http.Request) (*http.Response, error) {
	id := req.Header.Get("Mcp-Session-Id")
	switch req.Method {
	case http.MethodPost:
		body, err := io.ReadAll(req.Body) // it is in memory
		req.Body.Close()
		if err != nil {
			return nil, &Fault{Kind: Unsent, Err: err}
		}
		msg, err := jsonrpc.Decode(body, jsonrpc.Limits{Bytes: max(len(body), 1), Depth: answerDepth, AllowCaseVariants: true})
		if err != nil {
			return nil, &Fault{Kind: Invalid, Err: err}
		}
		switch modern := req.Header.Get("Mcp-Protocol-Version") >= mcpRevision; {
		case modern:
			return s.stateless(req, msg)
		case id == "" && msg.Method() == "initialize" && msg.IsRequest() && s.shared:
			return s.join(req, msg)
		case id == "" && msg.Method() == "initialize" && msg.IsRequest():
			return s.initialize(req, msg)
		}
		session := s.session(id)
		if session == nil {
			return response(http.StatusNotFound, nil), nil
		}
		if session.c.shared && msg.Method() == methodInitialized {
			return response(http.StatusAccepted, nil), nil // the gateway has told it
		}
		resp, err := session.c.post(req, msg, nil)
		if errors.Is(err, errLost) {
			return response(http.StatusNotFound, nil), nil
		}
		return resp, err
	case http.MethodGet:
		if session := s.session(id); session != nil {
			return session.stream(req)
		}
		return response(http.StatusNotFound, nil), nil
	case http.MethodDelete:
		if session := s.session(id); session != nil {
			session.leave(errStdioClosed)
			return response(http.StatusOK, nil), nil
		}
		return response(http.StatusNotFound, nil), nil
	}
	return response(http.StatusMethodNotAllowed, nil), nil
}

// response is one without a body, or with one of JSON.
func response(status int, body []byte) *http.Response {
	h := http.Header{}
	if body != nil {
		h.Set("Content-Type", "application/json")
	}
	return &http.Response{
		Status: strconv.Itoa(status) + " " + http.StatusText(status), StatusCode: status,
		Proto: "HTTP/1.1", ProtoMajor: 1, ProtoMinor: 1,
		Header: h, ContentLength: int64(len(body)), Body: io.NopCloser(bytes.NewReader(body)),
	}
}

// session finds the session of an ID whose process runs.
func (s *stdio) session(id string) *stdioSession {
	s.mu.Lock()
	defer s.mu.Unlock()
	session := s.sessions[id]
	if session == nil {
		return nil
	}
	select {
	case <-session.c.ending:
		return nil
	default:
		return session
	}
}

// enrol makes a session in a process.
func (s *stdio) enrol(c *process) *stdioSession {
	session := &stdioSession{id: rand.Text(), c: c}
	session.box.init()
	s.mu.Lock()
	s.sessions[session.id] = session
	s.mu.Unlock()
	c.mu.Lock()
	c.sessions[session.id] = session
	c.joined()
	c.used()
	c.mu.Unlock()
	return session
}

// leave ends a session, and its process if that is its own.
func (s *stdioSession) leave(why error) {
	s.c.s.mu.Lock()
	delete(s.c.s.sessions, s.id)
	s.c.s.mu.Unlock()
	if !s.c.shared {
		s.c.end(why, errors.Is(why, errStdioClosed))
		return
	}
	s.c.mu.Lock()
	delete(s.c.sessions, s.id)
	s.c.used()
	s.c.mu.Unlock()
	s.box.fail(why)
}

// stateless is a request or notification of revision 2026-07-28.
func (s *stdio) stateless(req *http.Request, msg *jsonrpc.Message) (*http.Response, error) {
	tenant := req.Header.Get(headerTenant)
	switch {
	case s.shared:
		tenant = ""
	case tenant == "":
		return s.alone(req, msg)
	}
	s.mu.Lock()
	at := s.modern[tenant]
	if at == nil {
		at = newCommon(tenant) // as many as the configuration has tenants
		s.modern[tenant] = at
	}
	s.mu.Unlock()
	for try := 0; ; try++ {
		c, err := s.common(req.Context(), at, true)
		if err != nil {
			return nil, err
		}
		resp, err := c.post(req, msg, nil)
		if !errors.Is(err, errLost) {
			return resp, err
		}
		if try == 2 { // it ended each time before anything was written
			return nil, faultf(Unsent, "the server's process has just ended, %d times", try+1)
		}
	}
}

// alone is a request or notification of no tenant: of the gateway's own, such as
// the one that finds out the era. Its process ends with it.
func (s *stdio) alone(req *http.Request, msg *jsonrpc.Message) (*http.Response, error) {
	c := s.process("", "", true, true)
	if err := s.start(req.Context(), c); err != nil {
		return nil, err
	}
	defer c.end(errStdioAsked, true)
	var resp *http.Response
	var err error
	if !msg.IsRequest() {
		resp, err = c.post(req, msg, nil)
	} else if p, begun := c.begin(msg); begun != nil {
		err = begun
	} else {
		var raw []byte
		raw, err = p.only(req.Context(), func() { reached(req) })
		resp = response(http.StatusOK, raw)
	}
	if errors.Is(err, errLost) {
		err = faultf(Unsent, "the server's process has ended at once")
	}
	if err != nil {
		return nil, err
	}
	return resp, nil
}

// common returns the process of a place, and starts it if there is none.
func (s *stdio) common(ctx context.Context, at *common, modern bool) (*process, error) {
	running := func() *process {
		s.mu.Lock()
		c := at.c
		s.mu.Unlock()
		if c == nil || !c.usable() {
			return nil
		}
		return c
	}
	if c := running(); c != nil {
		return c, nil
	}
	select {
	case at.opening <- struct{}{}:
	case <-ctx.Done():
		return nil, faultf(Unsent, "the server was being started: %w", context.Cause(ctx))
	}
	defer func() { <-at.opening }()
	if c := running(); c != nil {
		return c, nil
	}
	c := s.process(at.tenant, "", true, modern)
	if err := s.start(ctx, c); err != nil {
		return nil, err
	}
	if !modern {
		if err := c.greet(ctx); err != nil {
			return nil, err
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	select {
	case <-c.gone:
	default:
		at.c = c
	}
	return c, nil
}

// usable tells whether requests may begin, and if so puts off its idle end.
func (c *process) usable() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.used()
	return !c.over
}

// greet initializes a process that the sessions of all clients share. It is told
// of what clients may be asked in the middle of a call. They have no roots in
// common.
func (c *process) greet(ctx context.Context) error {
	id := string(jsonrpc.Quote(rand.Text()))
	msg, err := jsonrpc.Decode([]byte(`{"jsonrpc":"2.0","id":`+id+`,"method":"initialize","params":{"protocolVersion":"`+legacyRevisions[0]+
		`","capabilities":{"sampling":{},"elicitation":{}},"clientInfo":{"name":"waybill","version":"1"}}}`), jsonrpc.Limits{})
	if err != nil {
		return &Fault{Kind: Invalid, Err: err}
	}
	p, err := c.begin(msg)
	if err != nil {
		return faultf(Unsent, "initializing the server: %w", err)
	}
	p.first = true
	raw, err := p.only(ctx, func() {})
	if err != nil {
		return err
	}
	answer, err := jsonrpc.Decode(raw, jsonrpc.Limits{Bytes: len(raw), Depth: answerDepth, AllowCaseVariants: true})
	if err == nil && answer.Error().Exists() {
		err = errStdioRefused
	}
	if err == nil {
		_, err = agreed(raw, int64(c.s.limit))
	}
	if err != nil {
		c.end(err, false)
		return &Fault{Kind: Refused, Err: fmt.Errorf("initializing the server: %w", err)}
	}
	c.mu.Lock()
	c.opened = answer
	c.mu.Unlock()
	if _, err := c.write(ctx, []byte(`{"jsonrpc":"2.0","method":"`+methodInitialized+`"}`), func() {}); err != nil {
		c.end(err, false)
		return faultf(Unsent, "initializing the server: %w", err)
	}
	return nil
}

// join opens a session at a process that all share: what the server said when
// it was initialized is the answer, but for the id, and the revision if the
// client wants an older one.
func (s *stdio) join(req *http.Request, msg *jsonrpc.Message) (*http.Response, error) {
	c, err := s.common(req.Context(), s.legacy, false)
	if err != nil {
		return nil, err
	}
	reached(req)
	c.mu.Lock()
	opened := c.opened
	c.mu.Unlock()
	p := opened.Patch().Replace(opened.ID(), msg.ID().Raw())
	has, _ := opened.Result().Get("protocolVersion").Text()
	if wants, _ := msg.Params().Get("protocolVersion").Text(); wants < has && slices.Contains(legacyRevisions, wants) {
		p.Replace(opened.Result().Get("protocolVersion"), jsonrpc.Quote(wants))
	}
	body := p.Bytes()
	if body == nil {
		return nil, &Fault{Kind: Garbled, Err: p.Err()}
	}
	resp := response(http.StatusOK, body)
	resp.Header.Set("Mcp-Session-Id", s.enrol(c).id)
	return resp, nil
}

// initialize starts a session's process.
func (s *stdio) initialize(req *http.Request, msg *jsonrpc.Message) (*http.Response, error) {
	c := s.process(req.Header.Get(headerTenant), req.Header.Get(headerSession), false, false)
	if err := s.start(req.Context(), c); err != nil {
		return nil, err
	}
	session := s.enrol(c)
	resp, err := c.post(req, msg, func(p *pending) { p.first = true })
	if err != nil {
		c.end(errStdioLeft, true)
		if errors.Is(err, errLost) {
			err = faultf(Unsent, "the server's process has ended at once")
		}
		return nil, err
	}
	resp.Header.Set("Mcp-Session-Id", session.id)
	return resp, nil
}

// reached says to who sends a request that it is about to be written.
func reached(req *http.Request) {
	if t := httptrace.ContextClientTrace(req.Context()); t != nil && t.GotConn != nil {
		t.GotConn(httptrace.GotConnInfo{Reused: true})
	}
}

// pending is a request that the process has not answered.
type pending struct {
	c     *process
	msg   *jsonrpc.Message
	body  []byte
	id    string // as JSON
	token string // the progress token as the process knows it, as JSON; "" if there is none
	given []byte // as the client wrote it; nil if that is the same
	first bool   // it opens the process's only session
	box   mailbox
}

// begin counts a request in. It returns errLost when the process is ending.
func (c *process) begin(msg *jsonrpc.Message) (*pending, error) {
	p := &pending{c: c, msg: msg, body: msg.Raw(), id: string(msg.ID().Raw())}
	p.box.init()
	if msg.Method() != "server/discover" {
		c.needed.Store(true)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	switch {
	case c.over:
		return nil, errLost
	case c.asked[p.id] != nil:
		return nil, faultf(Unsent, "the server is asked the same at the moment")
	}
	if token := msg.Params().Get("_meta", "progressToken"); token.Exists() {
		p.token = string(token.Raw())
		if c.shared {
			c.numbered++
			p.token, p.given = `"w`+strconv.FormatUint(c.numbered, 10)+`"`, token.Raw()
			patch := msg.Patch().Replace(token, []byte(p.token))
			if p.body = patch.Bytes(); p.body == nil {
				return nil, &Fault{Kind: Invalid, Err: patch.Err()}
			}
		}
		c.tokens[p.token] = p
	}
	c.asked[p.id] = p
	c.joined()
	c.used()
	return p, nil
}

// joined tells who waits for room for a message, since nobody else uses the
// process, that somebody does. mu is held.
func (c *process) joined() {
	if c.company != nil {
		close(c.company)
		c.company = nil
	}
}

// others is closed when there is somebody whom it would hold up to wait for the
// reader of a request. It is nil where nobody else can be.
func (c *process) others(p *pending) <-chan struct{} {
	if !c.shared {
		return nil
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.company == nil {
		c.company = make(chan struct{})
	}
	company := c.company
	beside := len(c.asked)
	if c.asked[p.id] == p {
		beside--
	}
	if beside > 0 || len(c.sessions) > 1 {
		c.joined()
	}
	return company
}

// drop counts a request out, and tells whether it had no answer yet. mu is held.
func (c *process) drop(p *pending) bool {
	if c.tokens[p.token] == p {
		delete(c.tokens, p.token)
	}
	if c.asked[p.id] != p {
		return false
	}
	delete(c.asked, p.id)
	c.used()
	return true
}

// leave is what happens when nobody waits for the answer any more. In revisions
// with sessions that means nothing by itself.
func (p *pending) leave() {
	p.c.mu.Lock()
	open := p.c.drop(p)
	p.c.mu.Unlock()
	switch {
	case !open:
	case p.first:
		p.c.end(errStdioLeft, true)
	default:
		p.cancel()
	}
	p.box.fail(io.ErrClosedPipe)
}

// cancel tells a server without sessions that nobody waits for the answer.
func (p *pending) cancel() {
	if p.c.modern {
		p.c.aside([]byte(`{"jsonrpc":"2.0","method":"notifications/cancelled","params":{"requestId":` + p.id + `,"reason":"nobody waits for the answer"}}`))
	}
}

// fault is the end of the process, or of the request, as a fault. What comes as
// a [stdioEnd] does after the writer's end, so that what the line says of how
// much was written is final.
func (p *pending) fault(err error, l *line) *Fault {
	end := new(stdioEnd)
	f := new(Fault)
	switch {
	case errors.As(err, &f):
		return f
	case errors.Is(err, sse.ErrTooLarge):
		return &Fault{Kind: TooLarge, Err: err}
	case errors.As(err, &end) && (p.first || p.msg.Method() == "server/discover"):
		return end.refused()
	case errors.As(err, &end) && l.wrote.Load() == 0:
		return &Fault{Kind: Unsent, Err: err}
	}
	return &Fault{Kind: Broken, Err: err}
}

// send writes the request and waits for the first message of its answer.
func (p *pending) send(ctx context.Context, connected func()) (letter, error) {
	l, err := p.c.write(ctx, p.body, connected)
	if errors.Is(err, errLost) && p.first {
		_, err = p.box.next(ctx) // it says how it ended
		err = p.fault(err, &line{})
	}
	if err != nil {
		p.c.mu.Lock()
		p.c.drop(p)
		p.c.mu.Unlock()
		return letter{}, err
	}
	first, err := p.box.next(ctx)
	if err != nil {
		p.leave()
		if ctx.Err() != nil {
			return letter{}, err
		}
		return letter{}, p.fault(err, l)
	}
	return first, nil
}

// only sends the request and returns the answer. Other messages are left out.
func (p *pending) only(ctx context.Context, connected func()) ([]byte, error) {
	defer p.leave()
	l, err := p.send(ctx, connected)
	heard := new(line)
	heard.wrote.Store(1)
	for err == nil && !l.last {
		p.box.pop()
		if l, err = p.box.next(ctx); err != nil {
			err = p.fault(err, heard)
		}
	}
	return l.raw, err
}

// post is a POST: a request, or a message that has no answer.
func (c *process) post(req *http.Request, msg *jsonrpc.Message, change func(*pending)) (*http.Response, error) {
	ctx, connected := req.Context(), func() { reached(req) }
	if !msg.IsRequest() {
		l, err := c.write(ctx, msg.Raw(), connected)
		if err != nil {
			return nil, err
		}
		select {
		case <-l.done:
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		case <-c.gone: // and the writer before it
		}
		switch n := l.wrote.Load(); {
		case n == 0:
			return nil, errLost
		case n < int64(len(l.b)): // enough, maybe, for who reads a last line without an end
			return nil, faultf(Broken, "the server's process has ended while it was written to")
		}
		return response(http.StatusAccepted, nil), nil
	}
	p, err := c.begin(msg)
	if err != nil {
		return nil, err
	}
	if change != nil {
		change(p)
	}
	first, err := p.send(ctx, connected)
	if err != nil {
		return nil, err
	}
	if first.last {
		return response(http.StatusOK, first.raw), nil
	}
	return events(&stdioBody{ctx: ctx, box: &p.box, leave: p.leave}), nil
}

func events(b *stdioBody) *http.Response {
	resp := response(http.StatusOK, nil)
	resp.Header.Set("Content-Type", "text/event-stream")
	resp.ContentLength, resp.Body = -1, b
	return resp
}

// stream is a GET: what belongs to no request. A message is there until the next
// is asked for, or by the next stream if this one breaks before that.
func (s *stdioSession) stream(req *http.Request) (*http.Response, error) {
	reached(req)
	s.c.mu.Lock()
	defer s.c.mu.Unlock()
	if s.reading {
		return response(http.StatusConflict, nil), nil
	}
	s.reading = true
	if last, err := strconv.ParseUint(req.Header.Get("Last-Event-Id"), 10, 64); err == nil {
		s.box.seen(last)
	}
	return events(&stdioBody{ctx: req.Context(), box: &s.box, numbered: true, leave: func() {
		s.c.mu.Lock()
		defer s.c.mu.Unlock()
		s.reading = false
	}}), nil
}

// stdioBody is a stream of events. It is read and closed by one goroutine.
type stdioBody struct {
	ctx      context.Context
	box      *mailbox
	numbered bool // its events have ids
	leave    func()

	rest  []byte // of the event that is being read
	event []byte
	shown bool // the first of the box has been given
	last  bool // and nothing comes after it
	left  bool
}

func (b *stdioBody) Read(to []byte) (int, error) {
	if len(b.rest) == 0 {
		if b.shown {
			b.box.pop()
			b.shown = false
		}
		if b.last {
			return 0, io.EOF
		}
		l, err := b.box.next(b.ctx)
		if err != nil {
			return 0, err
		}
		e := sse.Event{Data: l.raw}
		if b.numbered {
			e.ID = strconv.FormatUint(l.number, 10)
		}
		b.event = sse.Append(b.event[:0], e)
		b.rest, b.shown, b.last = b.event, true, l.last
	}
	n := copy(to, b.rest)
	b.rest = b.rest[n:]
	return n, nil
}

func (b *stdioBody) Close() error {
	if !b.left {
		b.left = true
		b.leave()
	}
	return nil
}

// message gives a message of the process to whom it belongs.
func (c *process) message(raw []byte) {
	msg, err := jsonrpc.Decode(raw, jsonrpc.Limits{Bytes: len(raw), Depth: answerDepth, AllowCaseVariants: true})
	if err != nil {
		c.garbage(raw, err)
		return
	}
	c.spoke.Store(true)
	if msg.IsResponse() {
		c.answered(string(msg.ID().Raw()), raw, msg.Error().Exists())
		return
	}
	p, known := c.owner(msg)
	switch {
	case p != nil:
		if p.given != nil && msg.Method() == methodProgress {
			patch := msg.Patch().Replace(msg.Params().Get("progressToken"), p.given)
			if raw = patch.Bytes(); raw == nil {
				return // it could be read, so it can be written
			}
		}
		p.put(letter{raw: raw})
	case msg.IsRequest() && c.shared:
		// Whom should it be put to?
		if c.noise.Allow() {
			c.log().Warn("a request of a server that is shared is refused: it was made while not just one call was in flight", "method", clip(msg.Method(), maxWords))
		}
		c.aside(jsonrpc.ErrorResponse(msg.ID().Raw(), jsonrpc.CodeInternalError, "nobody can be asked: the server is shared, and not just one request is in flight", nil))
	case known:
		c.log().Debug("a message of the server is late: what it belongs to is over", "method", clip(msg.Method(), maxWords))
	case c.modern:
		if c.noise.Allow() {
			c.log().Warn("a message of the server is dropped: it does not say which call it belongs to, and not just one is in flight", "method", clip(msg.Method(), maxWords))
		}
	default:
		c.outside(raw)
	}
}

// answered gives an answer to who waits for it.
func (c *process) answered(id string, raw []byte, refused bool) {
	c.mu.Lock()
	p := c.asked[id]
	if p != nil {
		c.drop(p)
	}
	alone := len(c.asked) == 0
	c.mu.Unlock()
	if p == nil {
		c.log().Debug("an answer of the server is late, or to nothing that it was asked")
		return
	}
	p.put(letter{raw: raw, last: true})
	switch {
	case p.first && refused && !c.shared:
		c.end(errStdioRefused, true)
	case refused && alone && c.modern && p.msg.Method() == "server/discover":
		c.end(errStdioProbed, true)
	}
}

// owner finds the request to which a message belongs. known says that the message
// names one, which may be over.
func (c *process) owner(msg *jsonrpc.Message) (p *pending, known bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if token := msg.Params().Get("progressToken"); msg.Method() == methodProgress && token.Exists() {
		p = c.tokens[string(token.Raw())]
		return p, p != nil || c.shared
	}
	if id := msg.Params().Get("_meta", metaSubscription); id.Exists() {
		return c.asked[string(id.Raw())], true
	}
	for _, other := range c.asked {
		switch {
		case other.msg.Method() == "subscriptions/listen":
		case p != nil:
			return nil, false
		default:
			p = other
		}
	}
	return p, false
}

// outside gives a message to the session, or to all that share the process.
func (c *process) outside(raw []byte) {
	c.mu.Lock()
	all := make([]*stdioSession, 0, len(c.sessions))
	for _, s := range c.sessions {
		all = append(all, s)
	}
	c.mu.Unlock()
	for _, s := range all {
		wait := c.s.timing.stall
		if c.shared {
			wait = 0 // the others should not
		}
		if !s.box.put(letter{raw: raw}, wait, c.ending, nil) {
			c.log().Error("a session at a server ends: it has said too much that was not read", "id", s.id)
			s.leave(errStdioSlow)
			s.box.fail(errStdioSlow) // so that nothing of what it still says waits for a reader
		}
	}
}

// put gives a message to who waits for the request, who may be held up by the
// client's, or by the log. It ends the request when that would hold up others.
func (p *pending) put(l letter) {
	if p.box.put(l, 0, nil, nil) || p.box.put(l, p.c.s.timing.stall, p.c.ending, p.c.others(p)) {
		return
	}
	p.c.mu.Lock()
	open := p.c.drop(p)
	p.c.mu.Unlock()
	p.box.fail(errStdioSlow)
	if open {
		p.cancel()
	}
}

// garbage is a line that is no message. If it seems to be the answer to a
// request, that is told so; what cannot be read otherwise is logged.
func (c *process) garbage(raw []byte, why error) {
	var like struct {
		ID     json.RawMessage `json:"id"`
		Method *string         `json:"method"`
	}
	if json.Unmarshal(raw, &like) == nil && like.Method == nil && len(like.ID) > 0 {
		c.mu.Lock()
		p := c.asked[string(like.ID)]
		c.mu.Unlock()
		if p != nil {
			c.spoke.Store(true)
			c.answered(string(like.ID), raw, false) // who reads it will say what is wrong
			return
		}
	}
	if c.noise.Allow() {
		c.log().Warn("a server writes what is no message to its standard output", "line", clip(c.s.hide.Replace(string(raw[:min(len(raw), stdioWords)])), maxWords), "error", why)
	}
}

// tooLong is a line over the limit, of which b is the beginning and the end. It
// ends the request whose answer it is, or else the only one that there is.
func (c *process) tooLong(b []byte) {
	c.spoke.Store(true)
	c.mu.Lock()
	var p *pending
	for id, other := range c.asked {
		if bytes.Contains(b, []byte(id)) {
			p = other
		}
	}
	if p == nil && len(c.asked) == 1 {
		for _, p = range c.asked {
		}
	}
	if p != nil {
		c.drop(p)
	}
	c.mu.Unlock()
	if p == nil {
		c.log().Error("a message of the server is lost: it is too large, and nobody knows whose it is", "limit", c.s.limit)
		return
	}
	p.box.fail(fmt.Errorf("a message of more than %d bytes: %w", c.s.limit, sse.ErrTooLarge))
}
