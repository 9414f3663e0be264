package dispatch

import (
	"cmp"
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"html"
	"io"
	"log/slog"
	"maps"
	"net"
	"net/http"
	"net/http/httptrace"
	"net/url"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"
	"unicode/utf16"
	"unicode/utf8"

	"waybill.dev/schemas"
	"waybill.dev/schemas/jsonrpc"
)

// openapiReads are the methods that have no effect on anybody: all but
// tools/call are answered here, from the document. Of the calls, those are
// added whose operation is a read; see [restAPI.harmless].
var openapiReads = map[string]string{
	"server/discover": "says what the server is",
	"initialize":      "says what the server is; a REST API has no sessions",
	"ping":            "answered here",
	"tools/list":      "a list, made from the document",
}

// openapiRevisions are the revisions of MCP in which a REST API is offered,
// newest first.
var openapiRevisions = []string{"2026-07-28", "2025-11-25", "2025-06-18", "2025-03-26"}

const (
	// openapiTTL is how long a client may keep a list; a document that has
	// changed is seen after this at the latest.
	openapiTTL = time.Minute

	// recheck is how often the files of a document are looked at, at most.
	recheck = time.Second

	// A page of tools has at most so many, and about so many bytes.
	pageTools = 200
	pageBytes = 1 << 20

	// maxViolations is how many faults of the arguments are told at once.
	maxViolations = 20
)

// OpenAPI makes the operations of a REST API tools.
type OpenAPI struct {
	// Document is the file with the OpenAPI document, 3.0 or 3.1, YAML or
	// JSON. It may refer to files in its own directory and below, nowhere
	// else. It is read again when it changes; a new one that cannot be used,
	// or that wants to be served from elsewhere, is reported and not taken.
	Document string

	// BaseURL is where the API is; "" means the document's first server.
	BaseURL string

	// Auth are the secrets, by the name of the document's security scheme: an
	// API key, a bearer token (OAuth2 and OpenID Connect too), or
	// user:password.
	Auth map[string]string
}

// Untranslated is something of a document that is not, or not fully, part of
// the tools.
type Untranslated struct {
	Operation string `json:"operation,omitempty"` // operation id, or method and path; "" is the whole document
	What      string `json:"what"`
	Why       string `json:"why"`
}

func (u Untranslated) String() string {
	if u.Operation == "" {
		return u.What + ": " + u.Why
	}
	return u.Operation + ": " + u.What + ": " + u.Why
}

// ImportOpenAPI reads the document of a server as the gateway will, and
// reports what of it could not be translated.
func ImportOpenAPI(s Server) ([]Untranslated, error) {
	a, err := newRESTAPI(s, Options{Now: time.Now, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		return nil, err
	}
	a.transport.CloseIdleConnections()
	return a.doc.Load().report, nil
}

// restAPI is an MCP server made of a REST API. It answers everything but
// tools/call by itself, and makes of a call one HTTP request.
//
// What the API says is the answer of the tool, errors included: only what
// happened to the connection is a [Fault], so that its verdict stays true.
type restAPI struct {
	server    Server
	opt       Options
	base      *url.URL // never changes: the operator's secrets go nowhere else
	header    http.Header
	secrets   redactor
	transport *http.Transport

	doc     atomic.Pointer[restDoc] // what is in effect
	checked atomic.Int64            // when the files were last looked at, Unix nanoseconds

	reload  sync.Mutex // held by the one caller that reads the document again; owns what follows
	files   []fileState
	refused string          // why the newest document is not in effect, so that it is said once
	reads   map[string]bool // every tool that has ever been a read
}

// openOpenAPI is the kind openapi.
func openOpenAPI(s Server, opt Options) (Connection, error) {
	a, err := newRESTAPI(s, opt)
	if err != nil {
		return Connection{}, err
	}
	a.log(a.doc.Load(), "")
	return Connection{Call: a.call, Close: a.transport.CloseIdleConnections, Harmless: a.harmless}, nil
}

func newRESTAPI(s Server, opt Options) (*restAPI, error) {
	if s.OpenAPI == nil || s.OpenAPI.Document == "" {
		return nil, errors.New("openapi: no document")
	}
	a := &restAPI{server: s, opt: opt, header: http.Header{}, reads: map[string]bool{}}
	var secrets []string
	for name, values := range s.Header {
		name = http.CanonicalHeaderKey(name)
		if !headerName(name) || ours(name) && name != "Accept" {
			return nil, fmt.Errorf("header %q cannot be set", name)
		}
		for _, v := range values {
			if !headerValue(v) {
				return nil, fmt.Errorf("header %q: its value cannot be sent", name)
			}
			secrets = append(secrets, v, strings.TrimPrefix(v, "Bearer "))
		}
		a.header[name] = values
	}
	for _, secret := range s.OpenAPI.Auth {
		secrets = append(secrets, secret, base64.StdEncoding.EncodeToString([]byte(secret)))
		if _, password, ok := strings.Cut(secret, ":"); ok {
			secrets = append(secrets, password)
		}
	}
	a.secrets = newRedactor(secrets)
	if s.OpenAPI.BaseURL != "" {
		u, err := baseURL(s.OpenAPI.BaseURL)
		if err != nil {
			return nil, err
		}
		a.base = u
	}

	read, files, err := readDocument(s.OpenAPI.Document, opt.Now)
	if err != nil {
		return nil, err
	}
	doc, err := a.translate(read)
	if err != nil {
		return nil, err
	}
	a.base = doc.base
	a.files = files
	a.checked.Store(opt.Now().UnixNano())
	a.take(doc)

	// As in openMCP, which says why each of these is as it is.
	var http1 http.Protocols
	http1.SetHTTP1(true)
	a.transport = &http.Transport{
		Protocols:              &http1,
		DialContext:            (&net.Dialer{Timeout: 5 * time.Second, KeepAlive: 15 * time.Second}).DialContext,
		TLSHandshakeTimeout:    5 * time.Second,
		MaxIdleConnsPerHost:    s.Concurrency,
		IdleConnTimeout:        4 * time.Second,
		DisableCompression:     true,
		MaxResponseHeaderBytes: 64 << 10,
		WriteBufferSize:        8 << 10,
		ReadBufferSize:         8 << 10,
	}
	return a, nil
}

// redactor takes secrets out of texts. An API that repeats the request in its
// answer, in a link to the next page for one, would tell the agent, and the
// log, what only the gateway is to know. What is short is no secret, and would
// be found everywhere.
type redactor []secret

// secret is one of a redactor. Its longest run of letters and digits, which no
// encoder changes, says quickly that it is not there.
type secret struct {
	run           string // "" if there is none
	before, after int    // as far from where the run begins a form of the secret can reach
	form          *regexp.Regexp
}

func newRedactor(secrets []string) redactor {
	const (
		shortest = 6
		longest  = 12 // bytes that a form has for one of the secret
	)
	var r redactor
	// Longer ones first, for a shorter one may be a part of it.
	slices.SortFunc(secrets, func(a, b string) int { return cmp.Or(len(b)-len(a), strings.Compare(a, b)) })
	for _, s := range slices.Compact(secrets) {
		if len(s) < shortest {
			continue
		}
		run := ""
		for _, some := range strings.FieldsFunc(s, func(c rune) bool { return !alphanumeric(c) }) {
			if len(some) > len(run) {
				run = some
			}
		}
		at := strings.Index(s, run)
		r = append(r, secret{run, longest * at, longest * (len(s) - at), regexp.MustCompile(anyForm(s))})
	}
	return r
}

// Replace is the text without the secrets.
func (r redactor) Replace(text string) string {
	for _, s := range r {
		text = s.cut(text)
	}
	return text
}

func (s secret) cut(text string) string {
	const instead = "[redacted]"
	if s.run == "" {
		return s.form.ReplaceAllLiteralString(text, instead)
	}
	var b strings.Builder
	done := 0 // so far the text is in b
	for at := 0; ; {
		i := strings.Index(text[at:], s.run)
		if i < 0 {
			break
		}
		i += at
		at = i + 1
		from := max(done, i-s.before)
		if m := s.form.FindStringIndex(text[from:min(len(text), i+s.after)]); m != nil {
			b.WriteString(text[done:from+m[0]] + instead)
			done = from + m[1]
			at = max(at, done)
		}
	}
	if done == 0 {
		return text
	}
	return b.String() + text[done:]
}

func alphanumeric(r rune) bool {
	return r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9'
}

// anyForm is an expression for a secret in whatever form it comes back: each
// character as it is, with percents, or as an encoder of JSON or HTML writes it.
func anyForm(secret string) string {
	var b strings.Builder
	for len(secret) > 0 {
		r, size := utf8.DecodeRuneInString(secret)
		raw := secret[:size]
		secret = secret[size:]
		if alphanumeric(r) {
			b.WriteString(raw)
			continue
		}
		percents, plain := "", `\x{FFFD}` // what an expression has for a byte that is no text
		for _, c := range []byte(raw) {
			percents += fmt.Sprintf("%%%02x", c)
		}
		forms := []string{percents}
		if r != utf8.RuneError || size > 1 {
			plain = regexp.QuoteMeta(raw)
			units := ""
			for _, u := range utf16.AppendRune(nil, r) {
				units += fmt.Sprintf(`\\u%04x`, u)
			}
			quoted := string(jsonrpc.Quote(raw))
			forms = append(forms, units, fmt.Sprintf("&#0?%d;|&#x0?%x;", r, r), regexp.QuoteMeta(html.EscapeString(raw)), regexp.QuoteMeta(quoted[1:len(quoted)-1]))
		}
		switch r {
		case ' ':
			forms = append(forms, `\+`)
		case '/':
			forms = append(forms, `\\/`)
		case '"':
			forms = append(forms, "&quot;")
		}
		b.WriteString("(?:(?i:" + strings.Join(forms, "|") + ")|" + plain + ")")
	}
	return b.String()
}

// take puts a document into effect. The first, or with a.reload held.
func (a *restAPI) take(d *restDoc) {
	for name, t := range d.tools {
		if t.harmless() {
			a.reads[name] = true
		}
	}
	a.doc.Store(d)
}

// log says once what was read.
func (a *restAPI) log(d *restDoc, before string) {
	args := []any{"server", a.server.Name, "document", a.server.OpenAPI.Document, "sha256", d.pin, "tools", len(d.order)}
	if before != "" {
		args = append(args, "before", before)
	}
	a.opt.Log.Info("read an OpenAPI document", args...)
	if len(d.report) > 0 {
		const most = 50
		lines := make([]string, 0, most)
		for _, u := range d.report[:min(len(d.report), most)] {
			lines = append(lines, u.String())
		}
		a.opt.Log.Warn("not everything of an OpenAPI document could be translated", "server", a.server.Name, "count", len(d.report), "report", lines)
	}
}

// current is the document in effect, after looking whether there is a new one.
// One caller reads that; the others go on with the old one meanwhile.
func (a *restAPI) current() *restDoc {
	now := a.opt.Now().UnixNano()
	if now-a.checked.Load() < int64(recheck) || !a.reload.TryLock() {
		return a.doc.Load()
	}
	defer a.reload.Unlock()
	a.checked.Store(now)
	old := a.doc.Load()
	if unchanged(a.server.OpenAPI.Document, a.files) {
		return old
	}
	read, files, err := readDocument(a.server.OpenAPI.Document, a.opt.Now)
	a.files = files
	if err == nil && read.pin == old.pin {
		a.refused = ""
		return old
	}
	var doc *restDoc
	if err == nil {
		doc, err = a.translate(read)
	}
	if err != nil {
		if text := err.Error(); text != a.refused {
			a.refused = text
			a.opt.Log.Error("a new OpenAPI document cannot be used: the one before stays in effect", "server", a.server.Name,
				"document", a.server.OpenAPI.Document, "sha256", old.pin, "error", a.secrets.Replace(text))
		}
		return old
	}
	a.refused = ""
	a.take(doc)
	a.log(doc, old.pin)
	return doc
}

// harmless tells of calls without an effect. A tool that was a read once stays
// one until a restart (see translate), so that a call which was judged before
// the document changed, and carries no claim, does not become a write.
func (a *restAPI) harmless(r *schemas.Requested) bool {
	if r.Method != "tools/call" {
		return true // nobody is asked
	}
	t := a.current().tools[r.Name]
	return t != nil && t.harmless()
}

func (a *restAPI) call(ctx context.Context, c Call, _ func([]byte) error) (Answer, error) {
	// As for a server that speaks MCP: what policy judged is what is done.
	body, _, err := mcpBody(c)
	if err != nil {
		return Answer{}, &Fault{Kind: Invalid, Err: err}
	}
	msg, err := jsonrpc.Decode(body, jsonrpc.Limits{Bytes: len(body)})
	if err != nil {
		return Answer{}, faultf(Invalid, "the request: %w", err)
	}
	target := c.Requested.Target
	if c.Requested.OneWay {
		return Answer{Local: true}, nil // there is nothing that would have to know
	}
	doc := a.current()
	m := mcpAnswer{id: jsonrpc.Quote(string(c.ID)), revision: c.Requested.Revision, name: a.server.Name, doc: doc}
	var answer Answer
	switch target.Method {
	case "tools/call":
		answer, err = a.callTool(ctx, c, msg, m)
	case "tools/list":
		cursor, ok := "", true
		if v := msg.Params().Get("cursor"); v.Exists() && v.Kind() != jsonrpc.Null {
			cursor, ok = v.Text()
		}
		if !ok {
			return m.fail(jsonrpc.CodeInvalidParams, "Invalid params: cursor must be a string.", nil)
		}
		answer, err = m.list(cursor)
	case "server/discover":
		answer, err = m.discover()
	case "initialize":
		asked, _ := msg.Params().Get("protocolVersion").Text()
		answer, err = m.initialize(asked)
	case "ping":
		answer, err = m.result(map[string]any{})
	default:
		return m.fail(jsonrpc.CodeMethodNotFound, "Method not found", nil)
	}
	if err != nil || answer.ErrorCode != 0 || target.Method != "tools/list" || !c.filters() && c.Listed == nil {
		return answer, err
	}
	// Decoded as an upstream's answer is, and filtered by the same code.
	list, err := jsonrpc.Decode(answer.Body, jsonrpc.Limits{Bytes: len(answer.Body), Depth: answerDepth})
	if err == nil {
		answer.Body, answer.Removed, answer.RemovedMore, err = filterList(list, target.Method, c)
	}
	if err != nil {
		return Answer{}, listFault(fmt.Errorf("the list of tools: %w", err))
	}
	return answer, nil
}

// callTool checks the arguments, and only then asks the API.
func (a *restAPI) callTool(ctx context.Context, c Call, msg *jsonrpc.Message, m mcpAnswer) (Answer, error) {
	t := m.doc.tools[c.Requested.Name]
	if t == nil {
		return m.fail(jsonrpc.CodeInvalidParams, "Unknown tool: "+clip(c.Requested.Name, maxWords), nil)
	}
	arguments := msg.Params().Get("arguments")
	if arguments.Exists() && arguments.Kind() != jsonrpc.Object {
		return m.fail(jsonrpc.CodeInvalidParams, "Invalid params: arguments must be an object.", nil)
	}
	if violations := t.check(arguments); len(violations) > 0 {
		return m.refuse("The arguments do not fit the tool's input schema; nothing was sent.", violations)
	}
	req, err := t.request(arguments, a.header)
	if err != nil {
		return m.refuse("The arguments cannot be sent; nothing was sent.", []string{err.Error()})
	}
	c.Trace.headers(req.Header.Set)
	resp, err := a.send(ctx, c, req)
	if err != nil {
		return Answer{}, a.redacted(err)
	}
	answer, err := a.answer(resp, t, m, arguments)
	if err != nil {
		resp.Body.Close()
		return Answer{}, a.redacted(err)
	}
	answer.Status = resp.StatusCode
	return answer, nil
}

// send makes the request, once. What holds for mcpServer.call holds here: a
// Transport sends again by itself only what it has not written to a reused
// connection, and reads, which are harmless.
func (a *restAPI) send(ctx context.Context, c Call, req *http.Request) (*http.Response, error) {
	reached := false
	resp, err := a.transport.RoundTrip(req.WithContext(httptrace.WithClientTrace(ctx, &httptrace.ClientTrace{
		GotConn: func(httptrace.GotConnInfo) { reached = true; c.Connected() },
	})))
	if err != nil {
		var op *net.OpError
		if !reached || errors.As(err, &op) && op.Op == "dial" {
			return nil, faultf(Unsent, "%w", err)
		}
		return nil, faultf(Broken, "%w", err)
	}
	c.Heard()
	return resp, nil
}

// redacted is a fault whose words hold no secret.
func (a *restAPI) redacted(err error) error {
	var f *Fault
	if !errors.As(err, &f) {
		return err
	}
	if text := a.secrets.Replace(f.Error()); text != f.Error() {
		f = &Fault{Kind: f.Kind, After: f.After, Err: errors.New(text)}
	}
	return f
}

// mcpAnswer makes the answer to one request.
type mcpAnswer struct {
	id       []byte // as JSON
	revision string
	name     string // of the server
	doc      *restDoc
}

// modern tells whether the request is of the revisions without sessions.
func (m mcpAnswer) modern() bool { return m.revision == "" || m.revision >= "2026-07-28" }

// structured tells whether the revision knows structured content and titles.
func (m mcpAnswer) structured() bool { return m.revision == "" || m.revision >= "2025-06-18" }

func (m mcpAnswer) info() map[string]any {
	info := map[string]any{"name": m.name, "version": m.doc.version}
	if m.structured() && m.doc.title != "" {
		info["title"] = m.doc.title
	}
	return info
}

// result is an answer made here. Members that the revision wants in every
// result are added.
func (m mcpAnswer) result(result map[string]any) (Answer, error) {
	if m.modern() {
		result["resultType"] = "complete"
		result["_meta"] = map[string]any{"io.modelcontextprotocol/serverInfo": m.info()}
	}
	b, err := encodeJSON(result)
	if err != nil {
		return Answer{}, faultf(Garbled, "the answer cannot be written as JSON: %w", err)
	}
	return Answer{Local: true, Body: jsonrpc.ResultResponse(m.id, b)}, nil
}

func (m mcpAnswer) fail(code int, message string, data any) (Answer, error) {
	return Answer{Local: true, ErrorCode: code, Body: jsonrpc.ErrorResponse(m.id, code, message, data)}, nil
}

// refuse is the answer to arguments that are not sent: an error of the tool,
// which a model can read and mend, and not of the protocol (MCP 2025-11-25,
// server/tools "Error Handling").
func (m mcpAnswer) refuse(why string, violations []string) (Answer, error) {
	text := why
	for _, v := range violations {
		text += "\n- " + v
	}
	return m.result(map[string]any{"isError": true, "content": []any{textContent(text)}})
}

// cacheable are the members of results that may be kept for a while.
func (m mcpAnswer) cacheable(result map[string]any) map[string]any {
	if m.modern() {
		result["ttlMs"] = openapiTTL.Milliseconds()
		result["cacheScope"] = "private" // policy may show others less
	}
	return result
}

func (m mcpAnswer) discover() (Answer, error) {
	result := map[string]any{"supportedVersions": openapiRevisions, "capabilities": map[string]any{"tools": map[string]any{}}}
	if m.doc.instructions != "" {
		result["instructions"] = m.doc.instructions
	}
	return m.result(m.cacheable(result))
}

// initialize agrees to the revision under which the gateway speaks.
func (m mcpAnswer) initialize(asked string) (Answer, error) {
	version := m.revision
	if !slices.Contains(openapiRevisions[1:], version) {
		version = asked
	}
	if !slices.Contains(openapiRevisions[1:], version) {
		version = openapiRevisions[1]
	}
	result := map[string]any{
		"protocolVersion": version, "serverInfo": m.info(),
		"capabilities": map[string]any{"tools": map[string]any{}},
	}
	if m.doc.instructions != "" {
		result["instructions"] = m.doc.instructions
	}
	return m.result(result)
}

// list is a page of tools. The cursor names the document, since a place in one
// list is none in another.
func (m mcpAnswer) list(cursor string) (Answer, error) {
	at := 0
	if cursor != "" {
		b, err := base64.RawURLEncoding.DecodeString(cursor)
		pin, place, ok := strings.Cut(string(b), " ")
		n, err2 := strconv.Atoi(place)
		switch {
		case err != nil || err2 != nil || !ok || pin == m.doc.pin && (n <= 0 || n >= len(m.doc.order)):
			return m.fail(jsonrpc.CodeInvalidParams, "Invalid params: unknown cursor.", nil)
		case pin != m.doc.pin:
			return m.fail(jsonrpc.CodeInvalidParams, "Invalid params: the tools have changed since this cursor; list them from the start.", nil)
		}
		at = n
	}
	tools, size := []json.RawMessage{}, 0
	for ; at < len(m.doc.order) && len(tools) < pageTools; at++ {
		t := m.doc.order[at]
		b := t.definition
		if !m.structured() {
			b = t.oldDefinition
		}
		if size += len(b); size > pageBytes && len(tools) > 0 {
			break
		}
		tools = append(tools, b)
	}
	result := map[string]any{"tools": tools}
	if at < len(m.doc.order) {
		result["nextCursor"] = base64.RawURLEncoding.EncodeToString([]byte(m.doc.pin + " " + strconv.Itoa(at)))
	}
	return m.result(m.cacheable(result))
}

// encodeJSON writes v without escaping what only HTML would mind.
func encodeJSON(v any) ([]byte, error) {
	var b strings.Builder
	e := json.NewEncoder(&b)
	e.SetEscapeHTML(false)
	if err := e.Encode(v); err != nil {
		return nil, err
	}
	return []byte(strings.TrimSuffix(b.String(), "\n")), nil
}

func textContent(text string) map[string]any {
	return map[string]any{"type": "text", "text": strings.ToValidUTF8(text, "\uFFFD")}
}

// request makes the HTTP request of a call whose arguments fit the schema. An
// error says why they cannot be sent all the same; it is for the caller.
func (t *restTool) request(arguments jsonrpc.Value, header http.Header) (*http.Request, error) {
	values := map[string]any{}
	if arguments.Exists() {
		if err := decodeNumbers(arguments.Raw(), &values); err != nil {
			return nil, err
		}
	}
	w := wire{header: maps.Clone(header), path: t.path}
	if w.header.Get("User-Agent") == "" {
		w.header.Set("User-Agent", "waybill")
	}
	if w.header.Get("Accept") == "" {
		w.header.Set("Accept", t.accept)
	}
	for _, p := range t.params {
		v, given := values[p.property]
		if !given || v == nil {
			if p.in == "path" {
				return nil, fmt.Errorf("%s: a path parameter cannot be left out or null", p.property)
			}
			continue
		}
		if err := w.put(p, v); err != nil {
			return nil, fmt.Errorf("%s: %w", p.property, err)
		}
	}
	for _, c := range t.auth {
		w.authorize(c)
	}
	var body []byte
	if t.body != nil {
		if raw := arguments.Get(t.body.property); raw.Exists() {
			b, contentType, err := t.body.encode(raw, values[t.body.property])
			if err != nil {
				return nil, fmt.Errorf("%s: %w", t.body.property, err)
			}
			body = b
			w.header.Set("Content-Type", contentType)
		}
	}
	u, err := w.url(t.base)
	if err != nil {
		return nil, err
	}
	req := &http.Request{
		Method: t.method, URL: u, Host: u.Host, Header: w.header,
		Proto: "HTTP/1.1", ProtoMajor: 1, ProtoMinor: 1,
	}
	if body != nil {
		req.ContentLength = int64(len(body))
		req.GetBody = func() (io.ReadCloser, error) { return io.NopCloser(strings.NewReader(string(body))), nil }
		req.Body, _ = req.GetBody()
		if len(body) == 0 {
			req.Body = http.NoBody
		}
	}
	return req, nil
}
