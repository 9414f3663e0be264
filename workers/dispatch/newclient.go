package dispatch

import (
	"bytes"
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"waybill.dev/schemas/jsonrpc"
)

// A client without sessions (2026-07-28) at a server that has them.
//
// For each session of the log, server, and what the client says of itself and of
// its capabilities, the gateway holds a session at the server, in which the
// client is a guest: it is opened by the first call that needs it, and closed
// when none has for a while or the process ends. It is in the log (connected),
// but no other process goes on with it.
//
// # What is changed on the way
//
// Of a request, beside its id (and its name, where a front has another for it):
//
//   - _meta loses io.modelcontextprotocol/protocolVersion, clientInfo,
//     clientCapabilities and logLevel; it goes when nothing else was in it.
//   - requestState, and inputResponses beside it: they are the gateway's, and are
//     brought to the server as the answers to what it asked. Without a
//     requestState, inputResponses stays: nobody here has asked.
//   - Headers that mirror the body (Mcp-Method, Mcp-Name, Mcp-Param-*) are left
//     out. Those that a tool asks for by x-mcp-header, which a server of these
//     revisions does not look at, are held against the arguments here, once the
//     client has listed the tool.
//
// logLevel becomes logging/setLevel in the session. What these revisions do not
// have any more (ping, initialize, logging/setLevel, resources/subscribe and
// unsubscribe, tasks/list, tasks/result) is answered here, with -32601, and so is
// server/discover, from what the server said when the session was opened: its
// answer without protocolVersion and serverInfo, its capabilities without tasks,
// in whose place the extension io.modelcontextprotocol/tasks is where tools may be;
// supportedVersions, resultType, ttlMs, cacheScope and
// _meta["io.modelcontextprotocol/serverInfo"] are added.
//
// Of an answer, beside its id:
//
//   - resultType "complete" is added to a result that has none.
//   - _meta["io.modelcontextprotocol/serverInfo"] is added where it is missing.
//   - ttlMs and cacheScope are added by the edge, as for any server.
//   - The error code -32002 becomes -32602; -32042 becomes a result that asks for
//     what its data name, or -32021 where the client has no such capability.
//   - A requestState of the server's own is sealed into one of ours.
//   - execution.taskSupport of a tool is left out. Where a tool has it, its calls
//     are tasks at the server for clients of the extension (coretasks.go).
//
// Of what comes before it: notifications/message is left out below the level of
// the call, and for one that has not asked for any; list_changed and
// resources/updated go to subscriptions/listen; notifications/cancelled and
// notifications/elicitation/complete are left out, since nothing is asked on a
// stream. What the server asks becomes an answer that asks (parked.go), its params as
// they came, or {} where it gave none.
//
// Everything else keeps its bytes.

// Members of _meta that only revisions without sessions have.
const (
	metaPrefix     = "io.modelcontextprotocol/"
	metaVersion    = metaPrefix + "protocolVersion"
	metaClient     = metaPrefix + "clientInfo"
	metaCaps       = metaPrefix + "clientCapabilities"
	metaLevel      = metaPrefix + "logLevel"
	metaServerInfo = metaPrefix + "serverInfo"
)

// bygone are the methods that the revisions without sessions do not have any more.
var bygone = map[string]bool{
	"initialize": true, "ping": true, "logging/setLevel": true, "resources/subscribe": true, "resources/unsubscribe": true,
	"tasks/list": true, "tasks/result": true,
}

// mayAsk are the methods that may be answered by a question (2026-07-28, basic/patterns/mrtr,
// "Supported Requests").
var mayAsk = map[string]bool{"tools/call": true, "prompts/get": true, "resources/read": true}

// shared tells whether both eras have a method. All others are unknown ones.
func shared(method string) bool {
	return mayAsk[method] || lists[method].array != "" || method == "completion/complete" || strings.HasPrefix(method, "tasks/")
}

// levels of a server's log, the least important first.
var levels = []string{"debug", "info", "notice", "warning", "error", "critical", "alert", "emergency"}

const (
	maxGuests    = 16              // sessions of one client at one server
	maxGuest     = 64 << 10        // bytes of what it says of itself and its capabilities
	maxPending   = 16              // questions asked outside of any call that wait for one
	handTime     = time.Second     // for a message outside of calls to be taken by one
	farewellTime = 2 * time.Second // in which the sessions of guests are closed at the end
	serverState  = time.Hour       // for which a server's own requestState is kept in ours
)

// newClient makes a call of a client without sessions at a server that has them.
func (m *mcpServer) newClient(ctx context.Context, c Call, progress func([]byte) error) (Answer, error) {
	if m.sessions == nil || m.sessions.opt.Store == nil {
		return Answer{}, faultf(Invalid, "this gateway keeps no sessions")
	}
	body, _, err := mcpBody(c)
	if err != nil {
		return Answer{}, &Fault{Kind: Invalid, Err: err}
	}
	msg, err := jsonrpc.Decode(body, jsonrpc.Limits{Bytes: len(body)})
	if err != nil {
		return Answer{}, faultf(Invalid, "the request: %w", err)
	}
	params := msg.Params()
	meta := params.Get("_meta")
	level := -1
	if v := meta.Get(metaLevel); v.Exists() {
		text, _ := v.Text()
		if level = slices.Index(levels, text); level < 0 {
			return m.misused(c, "io.modelcontextprotocol/logLevel is no level"), nil
		}
	}
	switch method := c.Requested.Method; {
	case c.Requested.OneWay:
		return m.oneWay(ctx, c, msg)
	case bygone[method]:
		return notFound(c), nil
	}

	// A retry goes on with the session that its first call was made in.
	b := bind(c, msg)
	var st *state
	if v := params.Get("requestState"); v.Exists() && mayAsk[c.Requested.Method] {
		text, ok := v.Text()
		if !ok {
			return m.misused(c, errState.Error()), nil
		}
		opened, err := m.parking.open(text, b, m.parking.now())
		if err != nil {
			return m.misused(c, err.Error()), nil
		}
		if r := params.Get("inputResponses"); r.Exists() && r.Kind() != jsonrpc.Object {
			return m.misused(c, "inputResponses must be an object"), nil
		}
		st = &opened
	}
	if st != nil && !st.Again {
		return m.goOn(ctx, c, msg, *st, level, progress)
	}

	s, err := m.sessions.visit(ctx, m, c, meta)
	if err != nil {
		return Answer{}, err
	}
	g := s.guest
	switch c.Requested.Method {
	case "server/discover":
		defer g.leave()
		return g.discover(c)
	case "subscriptions/listen":
		defer g.leave()
		return g.listen(ctx, s, c, msg, progress)
	}
	if wrong := g.misheaded(c, params.Get("arguments")); wrong != "" {
		g.leave()
		return localError(c, http.StatusBadRequest, jsonrpc.CodeHeaderMismatch, "Header mismatch: "+wrong, nil), nil
	}
	if body, err = sessionBody(msg, st); err != nil {
		g.leave()
		return Answer{}, faultf(Invalid, "the request: %w", err)
	}
	if st == nil && c.Requested.Method == "tools/call" {
		switch support := s.taskSupport(ctx, c); {
		case support == "":
		case !c.Requested.TaskUntil.IsZero():
			defer g.leave()
			answer, _, err := s.callAsTask(ctx, c, body, func(msg []byte) error {
				if !wanted(msg, level) {
					return nil
				}
				return progress(msg)
			})
			if err != nil || answer.Session != "" {
				return answer, err
			}
			return g.translate(answer, c, b, 1)
		case support == "required":
			g.leave()
			return localError(c, http.StatusBadRequest, jsonrpc.CodeMissingRequiredClientCapability, "The tool's calls are tasks.",
				[]byte(`{"requiredCapabilities":{"extensions":{"`+extensionTasks+`":{}}}}`)), nil
		}
	}
	e := g.newErrand(c, b, mayAsk[c.Requested.Method])
	if st != nil {
		e.round = st.Round
	}
	if e.waits() {
		if answer, ok := e.park(c); ok {
			return answer, nil // nothing is sent until that is answered
		}
	}
	return e.run(ctx, c, s, body, level, meta.Get("progressToken").Raw(), progress)
}

// goOn goes on with an exchange that is parked.
func (m *mcpServer) goOn(ctx context.Context, c Call, msg *jsonrpc.Message, st state, level int, progress func([]byte) error) (Answer, error) {
	e := m.parking.get(st.ID)
	if e == nil || st.Owner != m.parking.owner {
		return m.misused(c, errGone.Error()), nil
	}
	answers, again, err := e.attach(c, st.Round, msg.Params().Get("inputResponses"))
	switch {
	case err != nil:
		return m.misused(c, err.Error()), nil
	case again != nil:
		return *again, nil
	}
	e.bring(answers)
	token := msg.Params().Get("_meta", "progressToken").Raw()
	if e.begun() {
		return e.goOn(ctx, c, level, token, progress)
	}
	var s *session
	body, err := sessionBody(msg, &state{Again: true})
	if err == nil {
		s, err = e.g.session(ctx)
	}
	if err != nil {
		e.finish()
		return Answer{}, err
	}
	return e.run(ctx, c, s, body, level, token, progress)
}

// run sends the request and follows what comes of it.
func (e *errand) run(ctx context.Context, c Call, s *session, body []byte, level int, token []byte, progress func([]byte) error) (Answer, error) {
	if level >= 0 {
		e.g.setLevel(ctx, s, e, level)
	}
	if !e.begin(c, s, body) {
		e.finish()
		return Answer{}, faultf(Unsent, "the gateway is shutting down")
	}
	return e.goOn(ctx, c, level, token, progress)
}

// goOn follows what comes of the exchange for a call with these wishes.
func (e *errand) goOn(ctx context.Context, c Call, level int, token []byte, progress func([]byte) error) (Answer, error) {
	e.mu.Lock()
	e.level, e.token = level, token
	e.mu.Unlock()
	answer, parked, err := e.follow(ctx, c, func(msg []byte) error {
		if !wanted(msg, level) {
			return nil
		}
		return progress(msg)
	})
	if status := unanswered(0); errors.As(err, &status) && status == http.StatusBadRequest && !shared(c.Requested.Method) {
		// There are servers that say only so much of a method that they do not have.
		own := notFound(c)
		own.Local = false
		return own, nil
	}
	if err != nil || parked {
		return answer, err
	}
	e.mu.Lock()
	round := e.round + 1
	e.mu.Unlock()
	return e.g.translate(answer, c, e.bound, round)
}

// wanted tells whether a call with this level is given a message.
func wanted(raw []byte, level int) bool {
	if !bytes.Contains(raw, []byte("notifications")) && !bytes.Contains(raw, []byte(`\u`)) {
		return true
	}
	m, err := jsonrpc.Decode(raw, jsonrpc.Limits{Bytes: len(raw), Depth: answerDepth, AllowCaseVariants: true})
	if err != nil || m.Method() != "notifications/message" {
		return err == nil
	}
	text, _ := m.Params().Get("level").Text()
	// A level that nobody knows is none below the call's.
	at := slices.Index(levels, text)
	return level >= 0 && (at < 0 || at >= level)
}

// localError is an answer made here.
func localError(c Call, status, code int, message string, data []byte) Answer {
	return Answer{
		Status: status, ErrorCode: code, Local: true,
		Body: jsonrpc.ErrorResponse(jsonrpc.Quote(string(c.ID)), code, message, data),
	}
}

func notFound(c Call) Answer {
	return localError(c, http.StatusNotFound, jsonrpc.CodeMethodNotFound, "Method not found", nil)
}

func (m *mcpServer) misused(c Call, message string) Answer {
	return localError(c, http.StatusBadRequest, jsonrpc.CodeInvalidParams, message, nil)
}

// sessionBody is a request as a session takes it. st is what a retry came with.
func sessionBody(m *jsonrpc.Message, st *state) ([]byte, error) {
	p := m.Patch()
	params := m.Params()
	if meta := params.Get("_meta"); meta.Kind() == jsonrpc.Object {
		left := false
		for name := range meta.Members() {
			switch name {
			case metaVersion, metaClient, metaCaps, metaLevel:
				p.Remove(meta, name)
			default:
				left = true
			}
		}
		if !left {
			p.Remove(params, "_meta")
		}
	}
	if st != nil {
		switch {
		case st.Server != nil:
			p.Set(params, "requestState", jsonrpc.Quote(*st.Server))
		default:
			p.Remove(params, "requestState")
		}
		if !st.Keep {
			p.Remove(params, "inputResponses")
		}
	}
	return p.Bytes(), p.Err()
}

// oneWay passes a notification on to the sessions that are open: those whose
// members changed, and all that is not about the client's own sessions, which it
// has none of. Where none is open nobody has to know. A fault of one session does
// not keep the others from hearing it; once one has, or may have, the fault is
// none after which it would be said again to all.
func (m *mcpServer) oneWay(ctx context.Context, c Call, msg *jsonrpc.Message) (Answer, error) {
	accepted := Answer{Status: http.StatusAccepted, Local: true}
	switch c.Requested.Method {
	case "notifications/initialized", "notifications/cancelled":
		return accepted, nil
	}
	body, err := sessionBody(msg, nil)
	if err != nil {
		return Answer{}, faultf(Invalid, "the request: %w", err)
	}
	all := m.sessions.visited(m, idOfSession(c.Event))
	reached, again := 0, true
	var failed error
	for _, s := range all {
		g := s.guest
		if !g.enter() {
			continue
		}
		err := g.notify(ctx, s, c, body)
		g.leave()
		if err == nil {
			reached++
			continue
		}
		f := new(Fault)
		unheard := errors.As(err, &f) && verdicts[f.Kind].again
		if failed == nil || again && !unheard {
			failed = err
		}
		again = again && unheard
	}
	switch {
	case failed != nil && reached > 0:
		return Answer{}, faultf(Broken, "%d of the client's %d sessions at the server have heard it: %w", reached, len(all), failed)
	case failed != nil:
		return Answer{}, failed
	}
	accepted.Local = reached == 0
	return accepted, nil
}

func (g *guest) notify(ctx context.Context, s *session, c Call, body []byte) error {
	s, err := s.wait(ctx)
	if err != nil {
		return err
	}
	a, err := s.call(ctx, c, body, func([]byte) error { return nil })
	if errors.Is(err, errLost) {
		return nil // and so is what it would have had to know
	}
	if err == nil && a.Release != nil {
		a.Release(func() {})
	}
	return err
}

// discover answers server/discover.
func (g *guest) discover(c Call) (Answer, error) {
	h := g.server.Load()
	v, err := jsonrpc.Parse(h.result, jsonrpc.Limits{Bytes: len(h.result), Depth: answerDepth, AllowCaseVariants: true})
	if err != nil || v.Kind() != jsonrpc.Object {
		return Answer{}, faultf(Garbled, "what the server said of itself: %w", cmpErr(err))
	}
	p := v.Patch()
	p.Remove(v, "protocolVersion").Remove(v, "serverInfo")
	p.Set(v, "supportedVersions", []byte(`["`+mcpRevision+`"]`)).Set(v, "resultType", []byte(`"complete"`))
	p.Set(v, "ttlMs", []byte("0")).Set(v, "cacheScope", []byte(`"private"`))
	switch caps := v.Get("capabilities"); caps.Kind() {
	case jsonrpc.Object:
		p.Remove(caps, "tasks")
		if caps.Get("tasks", "requests", "tools", "call").Kind() == jsonrpc.Object {
			switch of := caps.Get("extensions"); of.Kind() {
			case jsonrpc.Object:
				p.Set(of, extensionTasks, []byte("{}"))
			default:
				p.Set(caps, "extensions", []byte(`{"`+extensionTasks+`":{}}`))
			}
		}
	default:
		p.Set(v, "capabilities", []byte("{}"))
	}
	g.identify(p, v)
	result := p.Bytes()
	if result == nil {
		return Answer{}, faultf(Garbled, "what the server said of itself: %w", p.Err())
	}
	return Answer{Status: http.StatusOK, Local: true, Body: jsonrpc.ResultResponse(jsonrpc.Quote(string(c.ID)), result)}, nil
}

func cmpErr(err error) error {
	if err == nil {
		return errors.New("it is no object")
	}
	return err
}

// identify says in a result's _meta which server it is of.
func (g *guest) identify(p *jsonrpc.Patch, result jsonrpc.Value) {
	h := g.server.Load()
	if h == nil || h.info == nil {
		return
	}
	switch meta := result.Get("_meta"); meta.Kind() {
	case jsonrpc.None:
		p.Set(result, "_meta", slices.Concat([]byte(`{"`+metaServerInfo+`":`), h.info, []byte(`}`)))
	case jsonrpc.Object:
		if !meta.Get(metaServerInfo).Exists() {
			p.Set(meta, metaServerInfo, h.info)
		}
	}
}

// translate makes the answer of a session one for its guest. round counts what
// the client has been asked, should the answer ask.
func (g *guest) translate(a Answer, c Call, b binding, round int) (Answer, error) {
	fault := func(err error) (Answer, error) {
		if a.Release != nil {
			a.Release(func() {})
		}
		return Answer{}, faultf(Garbled, "translating the answer: %w", err)
	}
	m, err := jsonrpc.Decode(a.Body, jsonrpc.Limits{Bytes: len(a.Body), Depth: answerDepth, AllowCaseVariants: true})
	if err != nil {
		return fault(err)
	}
	p := m.Patch()
	if id := m.ID(); id.Exists() {
		p.Replace(id, jsonrpc.Quote(string(c.ID)))
	}
	switch a.ErrorCode {
	case codeNoResource:
		a.ErrorCode = jsonrpc.CodeInvalidParams
		p.Replace(m.Error().Get("code"), []byte("-32602"))
	case jsonrpc.CodeURLElicitationRequired:
		return g.byURL(a, c, m, b, round)
	}
	result := m.Result()
	if result.Kind() == jsonrpc.Object {
		kind := result.Get("resultType")
		if !kind.Exists() {
			p.Set(result, "resultType", []byte(`"complete"`))
		}
		if a.Result == inputRequired {
			if round > maxTurns {
				return fault(errRounds)
			}
			st := state{Owner: g.m.parking.owner, Round: round, Expires: g.m.parking.now().Add(serverState).UTC(), Again: true, Keep: true}
			if v := result.Get("requestState"); v.Exists() {
				text, ok := v.Text()
				if !ok || len(text) > maxServerState {
					return fault(fmt.Errorf("its requestState is no text of at most %d bytes", maxServerState))
				}
				st.Server = &text
			}
			text, err := g.m.parking.seal(st, b)
			if err != nil {
				return fault(err)
			}
			p.Set(result, "requestState", jsonrpc.Quote(text))
		}
		g.identify(p, result)
		if c.Requested.Method == "tools/list" {
			g.learn(result)
			for tool := range result.Get("tools").Elements() {
				withoutTaskSupport(p, tool)
			}
		}
	}
	if a.Body = p.Bytes(); a.Body == nil {
		return fault(p.Err())
	}
	return a, nil
}

// codeNoResource is what the revisions with sessions answer where there is no
// such resource.
const codeNoResource = -32002

// byURL makes of an error that says that the user has to go to some URLs first
// (2025-11-25, client/elicitation) an answer that asks for it. The retry makes
// the call anew.
func (g *guest) byURL(a Answer, c Call, m *jsonrpc.Message, b binding, round int) (Answer, error) {
	list := m.Error().Get("data", "elicitations")
	caps, err := jsonrpc.Parse(g.caps, jsonrpc.Limits{Bytes: len(g.caps), Depth: answerDepth, AllowCaseVariants: true})
	if err != nil || !caps.Get("elicitation", "url").Exists() || !mayAsk[c.Requested.Method] || list.Kind() != jsonrpc.Array {
		message, _ := m.Error().Get("message").Text()
		own := localError(c, http.StatusBadRequest, jsonrpc.CodeMissingRequiredClientCapability, message, []byte(`{"requiredCapabilities":{"elicitation":{"url":{}}}}`))
		own.Release, own.Local = a.Release, false
		return own, nil
	}
	text, err := g.m.parking.seal(state{Owner: g.m.parking.owner, Round: round, Expires: g.m.parking.now().Add(serverState).UTC(), Again: true}, b)
	if round > maxTurns {
		err = errRounds
	}
	if err != nil {
		if a.Release != nil {
			a.Release(func() {})
		}
		return Answer{}, faultf(Garbled, "asking for what the server's error names: %w", err)
	}
	out := []byte(`{"resultType":"input_required","inputRequests":{`)
	n := 0
	for v := range list.Elements() {
		if v.Kind() != jsonrpc.Object {
			continue
		}
		if n++; n > 1 {
			out = append(out, ',')
		}
		out = fmt.Appendf(out, `"elicitation/create-%d":{"method":"elicitation/create","params":%s}`, n, v.Raw())
	}
	out = fmt.Appendf(out, `},"requestState":%s%s}`, jsonrpc.Quote(text), g.tail())
	return Answer{
		Status: http.StatusOK, Result: inputRequired, Release: a.Release,
		Body: jsonrpc.ResultResponse(jsonrpc.Quote(string(c.ID)), out),
	}, nil
}

// maxMirrored is of how many tools it is known what they repeat in headers.
const maxMirrored = 1000

// learn reads from a list of tools what they repeat in headers.
func (g *guest) learn(result jsonrpc.Value) {
	for tool := range result.Get("tools").Elements() {
		name, _ := tool.Get("name").Text()
		all, err := mirrors(tool)
		g.mu.Lock()
		switch {
		case err != nil || len(all) == 0: // what is wrong the client leaves out
			delete(g.mirrors, name)
		case len(g.mirrors) < maxMirrored:
			if g.mirrors == nil {
				g.mirrors = map[string][]mirror{}
			}
			g.mirrors[name] = all
		}
		g.mu.Unlock()
	}
}

// misheaded tells what is wrong with the headers of a call of a tool: a server
// that reads the body must not carry out a call whose headers say something else
// (2026-07-28, basic/transports/streamable-http, "Server Behavior for Custom
// Headers").
func (g *guest) misheaded(c Call, arguments jsonrpc.Value) string {
	if c.Requested.Method != "tools/call" || c.Requested.Within(c.Event) {
		return ""
	}
	g.mu.Lock()
	all := g.mirrors[c.Requested.Name]
	g.mu.Unlock()
	if len(all) == 0 {
		return ""
	}
	want := paramHeaders(all, arguments)
	have := make(map[string]string, len(c.Requested.Headers))
	for name, v := range c.Requested.Headers {
		have[http.CanonicalHeaderKey(name)] = v
	}
	for _, m := range all {
		w, wanted := want[m.header]
		h, there := have[m.header]
		switch {
		case wanted && !there:
			return m.header + " header is missing"
		case !wanted && there && want != nil:
			return m.header + " header is there, and the argument is not"
		case !wanted:
			continue
		}
		text, ok := headerDecoded(h)
		if !ok {
			return m.header + " header value is not valid base64 of UTF-8"
		}
		said, _ := headerDecoded(w)
		if text != said && !sameInteger(arguments.Get(m.path...), text, said) {
			return m.header + " header value does not match the argument"
		}
	}
	return ""
}

func sameInteger(v jsonrpc.Value, a, b string) bool {
	if v.Kind() != jsonrpc.Number {
		return false
	}
	x, err1 := strconv.ParseFloat(a, 64)
	y, err2 := strconv.ParseFloat(b, 64)
	return err1 == nil && err2 == nil && x == y
}

// headerDecoded undoes headerText.
func headerDecoded(v string) (string, bool) {
	const prefix, suffix = "=?base64?", "?="
	if len(v) < len(prefix)+len(suffix) || !strings.HasPrefix(v, prefix) || !strings.HasSuffix(v, suffix) {
		return v, true
	}
	text, err := base64.StdEncoding.Strict().DecodeString(v[len(prefix) : len(v)-len(suffix)])
	return string(text), err == nil && utf8.Valid(text)
}
