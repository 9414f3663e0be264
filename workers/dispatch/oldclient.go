// Package dispatch brings clients of one era to servers of the other.
//
// # A client with a session at a server that has none
//
// An agent of 2025-11-25, 2025-06-18 or 2025-03-26 may call a server of
// 2026-07-28 (oldclient.go, oldclient_input.go, oldclient_listen.go). The log
// holds what the agent said and is told, in the words of its own revision.
// What is changed on the way, beside the id and the name as in [mcpServer]:
//
// Of a request, to the server:
//
//  1. params is added where there is none, and params._meta likewise. In _meta
//     io.modelcontextprotocol/protocolVersion is set, and /clientCapabilities
//     and /clientInfo to what the client said in initialize; /logLevel, once it
//     has set one. What else the client wrote in _meta stays.
//  2. Headers: Mcp-Method, Mcp-Name and, when the server has refused the call
//     for want of them, Mcp-Param-*.
//  3. A request that is sent again because the server wants input has another
//     id, inputResponses and requestState.
//     In a call that its client wants to be a task (params.task, which is left
//     out) clientCapabilities have the extension io.modelcontextprotocol/tasks too.
//  4. initialize becomes server/discover. ping, logging/setLevel,
//     resources/subscribe, resources/unsubscribe and the notifications of the
//     older revisions are not sent: this revision has none of them.
//
// Of an answer, to the client:
//
//  5. The result of server/discover becomes that of initialize: without
//     supportedVersions, resultType, ttlMs and cacheScope, with protocolVersion
//     and with serverInfo from its _meta; everything else stays. To a client of
//     2025-11-25 its capabilities have tasks, which the gateway has.
//  6. resultType "input_required" is not passed on: what it asks for becomes
//     requests to the client (asked), with an id and "jsonrpc" of the
//     gateway's; method and params stay.
//  7. outputSchema of a tool in tools/list is left out where its type is not
//     "object", which these revisions do not allow; execution.taskSupport is
//     "optional" where a client of 2025-11-25 is not told of any.
//  8. structuredContent that is no object is left out for the same reason; where
//     content has no text, it is put there as text.
//  9. The error -32602 to resources/read becomes -32002 where it says that there
//     is no such resource, and data.uri is added if it has no data.
//
// Of a notification from subscriptions/listen: _meta's subscriptionId is left
// out, and the acknowledgement is not passed on.
//
// Everything else keeps its bytes, members that these revisions do not know
// included.
package dispatch

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/time/rate"

	"waybill.dev/schemas"
	"waybill.dev/schemas/jsonrpc"
)

const (
	maxClient     = 64 << 10 // bytes of what a client says of itself, which go with each of its requests
	maxHeaderList = 20       // pages of a list in which a tool's headers are looked for
	maxRemembered = 1000     // tools of a session whose headers are remembered
)

// legacyNotifications are those of a client that have no place in the revision
// without sessions.
var legacyNotifications = map[string]string{
	"notifications/initialized":        "there is nothing to be ready for; the session's stream begins",
	"notifications/cancelled":          "the call's stream is closed instead",
	"notifications/progress":           "of what the server has asked, and it asks nothing any more",
	"notifications/roots/list_changed": "who wants the roots asks for them",
	"notifications/tasks/status":       "of what the server has asked",
}

// solo is what a session has beside all else when its server is one without
// sessions: then it is one of the gateway's making, of which the server knows
// nothing. Without ready it is not one yet.
type solo struct {
	client []member      // of _meta in each request: what the client said of itself
	pace   *rate.Limiter // of what the server says on its stream
	turn   chan struct{} // held by who opens a stream
	news   chan struct{} // the client wants to hear of something else

	// Guarded by the session's mu.
	known   bool     // the server has said what it can tell of
	offers  []string // of listenable
	stream  *hearing // that is open; nil: none
	mirrors map[string][]mirror

	overlaps int             // streams that were replaced and are heard still
	fresh    map[string]bool // what was told since the first of them was
}

// member is a member of an object.
type member struct {
	name string
	raw  []byte
}

// oldClient makes a call of a client with a session at a server that has none.
func (m *mcpServer) oldClient(ctx context.Context, c Call, progress func([]byte) error) (Answer, error) {
	if m.sessions == nil || m.sessions.opt.Latest == nil || m.sessions.opt.Store == nil {
		return Answer{}, faultf(Invalid, "this gateway keeps no sessions")
	}
	if _, _, err := mcpBody(c); err != nil {
		return Answer{}, &Fault{Kind: Invalid, Err: err}
	}
	method := c.Requested.Method
	switch {
	case method == "initialize":
		return m.welcome(ctx, c)
	case method == "ping" && !c.Requested.OneWay:
		return local(c, nil), nil
	case strings.HasPrefix(method, "tasks/") && !c.Requested.OneWay && c.Requested.TaskUntil.IsZero():
		// Those of the gateway's own the edge knows, and the server has none of
		// which this client could.
		return rejected(c, jsonrpc.CodeInvalidParams, "Task not found"), nil
	case c.Requested.OneWay && legacyNotifications[method] != "" && method != "notifications/initialized":
		return Answer{Status: http.StatusAccepted, Local: true}, nil
	}
	s, err := m.sessions.solo(ctx, m, c.Event)
	if err != nil {
		return Answer{}, err
	}
	defer s.leave()
	switch method {
	case "notifications/initialized":
		s.attend()
		return Answer{Status: http.StatusAccepted, Local: true}, nil
	case "logging/setLevel":
		return s.setLevel(c), nil
	case "resources/subscribe", "resources/unsubscribe":
		return s.subscribe(ctx, c)
	}
	if c.Requested.OneWay {
		c.Requested = modernly(c.Requested)
		return m.modern(ctx, c, progress)
	}
	return s.rounds(ctx, c, progress)
}

// local is an answer that the gateway gives by itself; nil is the empty result.
func local(c Call, result []byte) Answer {
	return Answer{Local: true, Status: http.StatusOK, Body: jsonrpc.ResultResponse(jsonrpc.Quote(string(c.ID)), result)}
}

// rejected is one that says no.
func rejected(c Call, code int, format string, a ...any) Answer {
	return Answer{
		Local: true, Status: http.StatusOK, ErrorCode: code,
		Body: jsonrpc.ErrorResponse(jsonrpc.Quote(string(c.ID)), code, clip(fmt.Sprintf(format, a...), maxWords), nil),
	}
}

// modernly is a request as one of the revision without sessions.
func modernly(r *schemas.Requested) *schemas.Requested {
	n := *r
	n.Revision, n.Headers = mcpRevision, nil
	return &n
}

func newSolo(pace rate.Limit) *solo {
	return &solo{turn: make(chan struct{}, 1), news: make(chan struct{}, 1), pace: rate.NewLimiter(pace, paceBurst)}
}

// solo returns the session at a server without sessions in which a call is
// made, and counts the call in. Who comes first looks in the log for what is to
// be known of it.
func (t *sessions) solo(ctx context.Context, m *mcpServer, e schemas.Event) (*session, error) {
	for {
		t.mu.Lock()
		s := t.of[idOfSession(e)][m.name]
		// Of the era that the server was of before, or one that another process
		// may have had meanwhile (Lapsed).
		var other *session
		if s != nil && (s.solo == nil || s.ctx.Err() != nil) {
			other, s = s, nil
		}
		logged := other == nil || other.solo != nil // what the client has set is to be looked for
		if s == nil {
			var err error
			if s, err = t.add(m, e, nil, nil); err != nil {
				t.mu.Unlock()
				return nil, err
			}
			s.solo = newSolo(t.timing.pace)
			s.unfollow = s.stop
			if !logged {
				other.handOver(s)
			}
			t.wg.Go(func() { t.admit(s, logged) })
		}
		t.mu.Unlock()
		if other != nil {
			other.stop()
			other.retire()
		}
		if _, err := s.wait(ctx); err != nil {
			return nil, err
		}
		if s.enter() {
			return s, nil
		}
		if s.over.Err() != nil {
			return nil, faultf(Invalid, "%w", errSessionClosed)
		}
	}
}

// admit opens a solo on behalf of a call that needs it. The server is not
// asked for anything: it knows no sessions. past says that what the client has
// set before is to be looked for in the log.
func (t *sessions) admit(s *session, past bool) {
	ctx, cancel := context.WithTimeout(s.ctx, t.timing.open)
	defer cancel()
	err := t.admitting(ctx, s, past)
	if err != nil && t.ctx.Err() == nil && s.over.Err() != nil {
		err = faultf(Invalid, "%w", errSessionClosed)
	}
	if err != nil {
		s.done(unsent(err))
		return
	}
	s.done(nil)
	if s.need != "notifications/initialized" {
		s.attend()
	}
}

func (t *sessions) admitting(ctx context.Context, s *session, past bool) error {
	switch _, err := t.opt.Latest(ctx, s.id.tenant, s.id.key, schemas.KindClosed); {
	case err == nil:
		return faultf(Invalid, "%w", errSessionClosed)
	case !errors.Is(err, schemas.ErrNotFound):
		return faultf(Unsent, "reading whether the session is closed: %w", err)
	}
	opened, err := t.opt.Latest(ctx, s.id.tenant, s.id.key, schemas.KindOpened)
	if errors.Is(err, schemas.ErrNotFound) {
		return faultf(Invalid, "the log does not hold (any more) how the session was opened")
	}
	if err != nil {
		return faultf(Unsent, "reading how the session was opened: %w", err)
	}
	if s.solo.client, err = clientMembers(opened.Body); err != nil {
		return &Fault{Kind: Invalid, Err: err}
	}
	before, found, err := t.connected(ctx, s.id, s.m.name)
	if err != nil {
		return faultf(Unsent, "reading of the session at the server: %w", err)
	}
	if past && found {
		// What the client has set in a session that was connected before: by
		// another process, or in the other era.
		if err := t.remember(ctx, s); err != nil {
			return faultf(Unsent, "reading what the client has set: %w", err)
		}
	}
	s.upstream, s.revision = "", mcpRevision
	s.initialized = found && before.Revision == mcpRevision
	return nil
}

// remember finds in the log what the client has set in the session: the last
// log level, and the resources that it has subscribed to. What counts are the
// calls that were answered without an error, in the order in which they were
// authorized.
func (t *sessions) remember(ctx context.Context, s *session) error {
	if t.opt.Scan == nil {
		return nil
	}
	type setting struct {
		call   schemas.CallID
		method string
		body   []byte
	}
	var settings []setting
	for e, err := range t.opt.Scan(ctx, s.id.tenant, s.id.key, schemas.KindAuthorized) {
		if err != nil {
			return err
		}
		a, ok := e.Data.(*schemas.Authorized)
		if !ok || a.Server != s.m.name {
			continue
		}
		switch a.Method {
		case "logging/setLevel":
			settings = append(settings, setting{e.Call, a.Method, bytes.Clone(e.Body)})
		case "resources/subscribe", "resources/unsubscribe":
			// The name is the server's, which a front may have given another.
			settings = append(settings, setting{e.Call, a.Method, slices.Concat(
				[]byte(`{"jsonrpc":"2.0","method":"-","params":{"uri":`), jsonrpc.Quote(a.Name), []byte(`}}`))})
		}
	}
	if len(settings) == 0 {
		return nil
	}
	worked := make(map[schemas.CallID]bool, len(settings))
	for e, err := range t.opt.Scan(ctx, s.id.tenant, s.id.key, schemas.KindCompleted) {
		if err != nil {
			return err
		}
		if c, ok := e.Data.(*schemas.Completed); ok && c.ErrorCode == 0 {
			worked[e.Call] = true
		}
	}
	for _, set := range settings {
		if worked[set.call] {
			s.note(set.method, set.body)
		}
	}
	return nil
}

// clientMembers reads what a client says of itself in initialize.
func clientMembers(initialize []byte) ([]member, error) {
	msg, err := jsonrpc.Decode(initialize, jsonrpc.Limits{Bytes: max(len(initialize), 1)})
	if err != nil {
		return nil, fmt.Errorf("the request that opened the session: %w", err)
	}
	if msg.Method() != "initialize" || !msg.IsRequest() || msg.Params().Kind() != jsonrpc.Object {
		return nil, errors.New("the request that opened the session is no initialize")
	}
	capabilities, client := msg.Params().Get("capabilities"), msg.Params().Get("clientInfo")
	if n := len(capabilities.Raw()) + len(client.Raw()); n > maxClient {
		return nil, fmt.Errorf("what the client says of itself has %d bytes, more than %d", n, maxClient)
	}
	all := []member{{metaCaps, []byte("{}")}}
	if capabilities.Kind() == jsonrpc.Object {
		all[0].raw = bytes.Clone(capabilities.Raw())
	}
	if client.Kind() == jsonrpc.Object {
		all = append(all, member{metaClient, bytes.Clone(client.Raw())})
	}
	return all, nil
}

// welcome is the method initialize: the server says what it is, and the session
// is opened here. A second one opens another, as nobody may have heard the
// answer to the first.
func (m *mcpServer) welcome(ctx context.Context, c Call) (Answer, error) {
	client, err := clientMembers(c.Body)
	if err != nil {
		return Answer{}, &Fault{Kind: Invalid, Err: err}
	}
	t := m.sessions
	t.mu.Lock()
	old := t.of[idOfSession(c.Event)][m.name]
	s, err := t.add(m, c.Event, nil, nil)
	if err == nil {
		s.solo = newSolo(t.timing.pace)
		s.solo.client, s.unfollow = client, s.stop
	}
	t.mu.Unlock()
	if err != nil {
		return Answer{}, err
	}
	if old != nil {
		old.end()
	}
	answer, err := s.discover(ctx, c)
	switch {
	case err == nil && answer.ErrorCode != 0:
		s.done(faultf(Refused, "the server refused to say what it is"))
	case err != nil:
		s.done(unsent(err))
	default:
		s.initialized = true
		s.done(nil)
	}
	return answer, err
}

// discover asks the server what it is and stores that there is a session with
// it. The answer is one to initialize. It may be an error of the server's.
func (s *session) discover(ctx context.Context, c Call) (Answer, error) {
	ctx, hangUp := context.WithCancel(ctx)
	r := modernly(c.Requested)
	r.Method, r.Name, r.Alias, r.OneWay = "server/discover", "", "", false
	ask := c
	ask.Requested, ask.Only, ask.Each = r, nil, nil
	ask.Body = []byte(`{"jsonrpc":"2.0","id":"-","method":"server/discover","params":{"_meta":` + string(s.meta()) + `}}`)
	answer, err := s.m.modern(ctx, ask, s.say)
	if err != nil {
		hangUp()
		return Answer{}, err
	}
	release := answer.Release
	answer.Release = func(h func()) {
		if release != nil {
			release(func() { h(); hangUp() })
		}
		hangUp()
	}
	if answer.ErrorCode != 0 {
		s.suspect(answer)
		return answer, nil
	}
	refuse := func(err error) (Answer, error) {
		answer.Release(func() {})
		return Answer{}, err
	}
	msg, err := s.m.decode(answer.Body, ask)
	if err != nil || msg.Result().Kind() != jsonrpc.Object {
		return refuse(faultf(Garbled, "the server's answer to server/discover is no object"))
	}
	if v := msg.Result().Get("supportedVersions"); v.Kind() == jsonrpc.Array && !speaks(v) {
		s.m.doubt()
		return refuse(faultf(Garbled, "the server does not speak %s any more", mcpRevision))
	}
	s.mu.Lock()
	s.solo.known, s.solo.offers = true, offered(msg.Result().Get("capabilities"))
	s.mu.Unlock()
	answer.Body = jsonrpc.ResultResponse(jsonrpc.Quote(string(c.ID)), s.m.introduction(msg.Result(), c.Requested.Revision))
	answer.Result = ""
	store, cancel := sure(ctx, endTime)
	defer cancel()
	e, err := s.t.opt.answers.screenedEvent(s.m.name, s.base.Next(&schemas.Connected{Server: s.m.name, Revision: mcpRevision, By: s.by}, answer.Body))
	if err == nil {
		_, err = s.t.opt.Store(store, e)
	}
	if err != nil {
		kind := Broken
		if refused(err) {
			kind = refusedAs(err)
		}
		return refuse(faultf(kind, "storing the session at the server: %w", err))
	}
	return answer, nil
}

// offered is what a server says that it can tell of.
func offered(capabilities jsonrpc.Value) (offers []string) {
	for _, name := range listenable {
		kind, _ := strings.CutSuffix(name, "ListChanged")
		if yes, _ := capabilities.Get(kind, "listChanged").Bool(); yes {
			offers = append(offers, name)
		}
	}
	return offers
}

// introduction is the result of initialize for that of server/discover.
func (m *mcpServer) introduction(discovered jsonrpc.Value, revision string) []byte {
	if !slices.Contains(legacyRevisions, revision) {
		revision = legacyRevisions[0]
	}
	b := append([]byte(`{"protocolVersion":`), jsonrpc.Quote(revision)...)
	capabilities, info := []byte("{}"), discovered.Get("_meta", metaServerInfo)
	for name, v := range discovered.Members() {
		switch name {
		case "supportedVersions", "protocolVersion", "resultType", "ttlMs", "cacheScope":
		case "capabilities":
			if v.Kind() == jsonrpc.Object {
				capabilities = v.Raw()
			}
		case "serverInfo":
			if info.Kind() != jsonrpc.Object {
				info = v
			}
		case "instructions":
			if v.Kind() != jsonrpc.String {
				break // such as null
			}
			fallthrough
		default:
			b = append(append(append(append(b, ','), jsonrpc.Quote(name)...), ':'), v.Raw()...)
		}
	}
	server := info.Raw()
	if name, _ := info.Get("name").Text(); name == "" {
		server = slices.Concat([]byte(`{"name":`), jsonrpc.Quote(m.name), []byte(`,"version":"unknown"}`))
	}
	if revision >= revisionOfTasks {
		capabilities = withMember(capabilities, "tasks", coreTasks)
	}
	return slices.Concat(b, []byte(`,"capabilities":`), capabilities, []byte(`,"serverInfo":`), server, []byte(`}`))
}

// suspect has the era found out again if an answer is one of a server that has
// sessions, or does not speak the revision.
func (s *session) suspect(a Answer) {
	switch {
	case a.ErrorCode == jsonrpc.CodeUnsupportedProtocolVersion,
		a.ErrorCode == -32000 && a.Status == http.StatusBadRequest,
		a.ErrorCode == codeNoSession && a.Status == http.StatusNotFound:
		s.m.doubt()
	}
}

// suspectFault likewise of what is no answer at all, such as 400 with a text.
func (s *session) suspectFault(err error) {
	if f := new(Fault); errors.As(err, &f) && f.Kind == Garbled {
		s.m.doubt()
	}
}

// setLevel is the method logging/setLevel. From now on each request says it,
// until the session ends; a process that takes the session over finds it in
// the log (remember).
func (s *session) setLevel(c Call) Answer {
	msg, err := jsonrpc.Decode(c.Body, jsonrpc.Limits{Bytes: len(c.Body)})
	if err != nil {
		return rejected(c, jsonrpc.CodeInternalError, "%v", err) // mcpBody has decoded it
	}
	if level, _ := msg.Params().Get("level").Text(); !slices.Contains(levels, level) {
		return rejected(c, jsonrpc.CodeInvalidParams, "level must be one of %s", strings.Join(levels, ", "))
	}
	s.note(c.Requested.Method, c.Body)
	return local(c, nil)
}

// members are those of _meta that the session adds to a request.
func (s *session) members() []member {
	all := append([]member{{metaVersion, []byte(`"` + mcpRevision + `"`)}}, s.solo.client...)
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.level != nil {
		all = append(all, member{metaLevel, s.level})
	}
	return all
}

// meta is the _meta of a request that the gateway makes itself.
func (s *session) meta() []byte { return objectOfMembers(s.members()) }

func objectOfMembers(members []member) []byte {
	b := []byte{'{'}
	for i, m := range members {
		if i > 0 {
			b = append(b, ',')
		}
		b = append(append(append(b, jsonrpc.Quote(m.name)...), ':'), m.raw...)
	}
	return append(b, '}')
}

// modernBody is the client's request as the server has to be asked it, but for
// id and name. With given it is asked again, with these answers to what the
// server wanted to know.
func (s *session) modernBody(c Call, given *inputs) ([]byte, error) {
	msg, err := jsonrpc.Decode(c.Body, jsonrpc.Limits{Bytes: len(c.Body)})
	if err != nil {
		return nil, fmt.Errorf("the request: %w", err)
	}
	p, params := msg.Patch(), msg.Params()
	members := s.members()
	if !c.Requested.TaskUntil.IsZero() {
		for i := range members {
			if members[i].name == metaCaps {
				members[i].raw = withExtension(members[i].raw)
			}
		}
		if params.Get("task").Exists() {
			p.Remove(params, "task")
		}
	}
	switch meta := params.Get("_meta"); {
	case !params.Exists():
		object := slices.Concat([]byte(`{"_meta":`), s.meta(), given.members(), []byte(`}`))
		p.Set(msg.Root(), "params", object)
		return p.Bytes(), p.Err()
	case params.Kind() != jsonrpc.Object:
		return nil, errParams
	case !meta.Exists():
		p.Set(params, "_meta", objectOfMembers(members))
	case meta.Kind() != jsonrpc.Object:
		return nil, errMeta
	default:
		for _, m := range members {
			p.Set(meta, m.name, m.raw)
		}
	}
	if given != nil {
		given.set(p, params)
	}
	return p.Bytes(), p.Err()
}

var (
	errParams = errors.New("params must be an object")
	errMeta   = errors.New("params._meta must be an object")
)

// sendModern asks the server once, as nth request of the call, with the headers that
// repeat arguments. given is what it wanted to know; nil at first.
func (s *session) sendModern(ctx context.Context, c Call, nth int, given *inputs, headers map[string]string, progress func([]byte) error) (Answer, error) {
	body, err := s.modernBody(c, given)
	if err != nil {
		return Answer{}, &Fault{Kind: Invalid, Err: err}
	}
	r := modernly(c.Requested)
	r.Headers = headers
	c.Requested, c.Body = r, body
	if nth > 0 {
		c.ID = schemas.CallID(string(c.ID) + "-" + strconv.Itoa(nth+1))
	}
	return s.m.modern(ctx, c, progress)
}

// mirrored asks the server which arguments of a tool are repeated in headers, of
// which the client knows nothing: it has been refused for want of them, so
// nothing has been carried out. What the server says of other tools is not
// looked at.
func (s *session) mirrored(ctx context.Context, c Call) ([]mirror, error) {
	ctx, hangUp := context.WithTimeout(ctx, listTime)
	defer hangUp()
	var cursor []byte
	for page := range maxHeaderList {
		params := []byte(`{"_meta":`)
		params = append(params, s.meta()...)
		if cursor != nil {
			params = append(append(params, `,"cursor":`...), cursor...)
		}
		list := Call{
			ID: schemas.CallID(string(c.ID) + "-list-" + strconv.Itoa(page+1)), Event: c.Event, Trace: c.Trace,
			Requested: &schemas.Requested{Target: schemas.Target{Protocol: c.Requested.Protocol, Server: s.m.name, Method: "tools/list"}, Revision: mcpRevision},
			Body:      slices.Concat([]byte(`{"jsonrpc":"2.0","id":"-","method":"tools/list","params":`), params, []byte(`}}`)),
			Connected: func() {}, Heard: func() {},
		}
		answer, err := s.m.modern(ctx, list, func([]byte) error { return nil })
		if err != nil {
			return nil, err
		}
		if answer.Release != nil {
			answer.Release(func() {})
		}
		msg, err := s.m.decode(answer.Body, list)
		if err != nil {
			return nil, err
		}
		for tool := range msg.Result().Get("tools").Elements() {
			if name, _ := tool.Get("name").Text(); name == c.Requested.Name {
				found, err := mirrors(tool)
				return slices.Clone(found), err
			}
		}
		next := msg.Result().Get("nextCursor")
		if text, _ := next.Text(); text == "" {
			return nil, nil
		}
		cursor = bytes.Clone(next.Raw())
	}
	return nil, nil
}

// headers are those of a call that the session has learned of its tool.
func (s *session) headers(c Call) map[string]string {
	if c.Requested.Method != "tools/call" {
		return nil
	}
	s.mu.Lock()
	found := s.solo.mirrors[c.Requested.Name]
	s.mu.Unlock()
	if len(found) == 0 {
		return nil
	}
	msg, err := jsonrpc.Decode(c.Body, jsonrpc.Limits{Bytes: len(c.Body)})
	if err != nil {
		return nil
	}
	return paramHeaders(found, msg.Params().Get("arguments"))
}

// learn finds out the headers of a call that was refused for want of them, and
// tells whether they are others than it had.
func (s *session) learn(ctx context.Context, c Call, had map[string]string) (map[string]string, bool) {
	found, err := s.mirrored(ctx, c)
	if err != nil {
		s.log().Debug("the headers of a tool were not found out", "tool", c.Requested.Name, "error", err)
		return nil, false
	}
	s.mu.Lock()
	if s.solo.mirrors == nil || len(s.solo.mirrors) >= maxRemembered {
		s.solo.mirrors = map[string][]mirror{}
	}
	s.solo.mirrors[c.Requested.Name] = found
	s.mu.Unlock()
	headers := s.headers(c)
	same := len(headers) == len(had)
	for name, value := range headers {
		same = same && had[name] == value
	}
	return headers, !same
}

// older is an answer as a client with a session has to be given it.
func (s *session) older(a Answer, c Call) (Answer, error) {
	method := c.Requested.Method
	// Most answers stay as they are, and are not looked through for it. An
	// escape may hide a name.
	has := func(name string) bool {
		return bytes.Contains(a.Body, []byte(name)) || bytes.Contains(a.Body, []byte(`\u`))
	}
	switch {
	case !bytes.Contains(a.Body, []byte(`"`+string(c.ID)+`"`)):
	case method == "tools/list" && (has("outputSchema") || c.Requested.Revision >= revisionOfTasks):
	case method == "tasks/get" && has("structuredContent"), method == "tools/call" && has("structuredContent"), a.ErrorCode != 0:
	default:
		return a, nil
	}
	msg, err := s.m.decode(a.Body, c)
	if err != nil {
		return Answer{}, &Fault{Kind: Garbled, Err: err}
	}
	p, changed := msg.Patch(), false
	if id, _ := msg.ID().Text(); id != string(c.ID) && msg.ID().Kind() == jsonrpc.String {
		p.Replace(msg.ID(), jsonrpc.Quote(string(c.ID)))
		changed = true
	}
	switch {
	case method == "tools/list":
		for tool := range msg.Result().Get("tools").Elements() {
			schema := tool.Get("outputSchema")
			if kind, _ := schema.Get("type").Text(); schema.Exists() && kind != "object" {
				p.Remove(tool, "outputSchema")
				changed = true
			}
			if c.Requested.Revision < revisionOfTasks || tool.Kind() != jsonrpc.Object {
				continue
			}
			switch of := tool.Get("execution"); {
			case !of.Exists():
				p.Set(tool, "execution", []byte(`{"taskSupport":"optional"}`))
				changed = true
			case of.Kind() == jsonrpc.Object && !of.Get("taskSupport").Exists():
				p.Set(of, "taskSupport", []byte(`"optional"`))
				changed = true
			}
		}
	case method == "tools/call", method == "tasks/get":
		result := msg.Result()
		if method == "tasks/get" {
			result = result.Get("result")
		}
		if v := result.Get("structuredContent"); v.Exists() && v.Kind() != jsonrpc.Object {
			p.Remove(result, "structuredContent")
			asText(p, result, v)
			changed = true
		}
	case method == "resources/read" && a.ErrorCode == jsonrpc.CodeInvalidParams && missing(msg.Error(), c.Requested.Name):
		p.Replace(msg.Error().Get("code"), strconv.AppendInt(nil, jsonrpc.CodeResourceNotFound, 10))
		if data := msg.Error().Get("data"); !data.Exists() {
			p.Set(msg.Error(), "data", slices.Concat([]byte(`{"uri":`), jsonrpc.Quote(c.Requested.Name), []byte(`}`)))
		}
		a.ErrorCode, changed = jsonrpc.CodeResourceNotFound, true
	}
	if !changed {
		return a, nil
	}
	if a.Body = p.Bytes(); a.Body == nil {
		return Answer{}, faultf(Garbled, "the answer cannot be made one of the client's revision: %w", p.Err())
	}
	return a, nil
}

// asText keeps what a tool has answered and what the client cannot be given in
// its own place: as text, unless the server has done that, as it should.
func asText(p *jsonrpc.Patch, result, structured jsonrpc.Value) {
	block := slices.Concat([]byte(`{"type":"text","text":`), jsonrpc.Quote(string(structured.Raw())), []byte(`}`))
	content := result.Get("content")
	if content.Kind() != jsonrpc.Array {
		p.Set(result, "content", slices.Concat([]byte{'['}, block, []byte{']'}))
		return
	}
	for v := range content.Elements() {
		if kind, _ := v.Get("type").Text(); kind == "text" {
			return
		}
	}
	p.Append(content, block)
}

// missing tells whether an error surely says that there is no resource of this
// uri, and not that something else is wrong with the request.
func missing(e jsonrpc.Value, uri string) bool {
	if data := e.Get("data"); data.Exists() {
		text, _ := data.Get("uri").Text()
		return text == uri
	}
	text, _ := e.Get("message").Text()
	text = strings.ToLower(text)
	return strings.Contains(text, "resource not found") || strings.Contains(text, "unknown resource")
}
