package dispatch

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"slices"
	"strconv"
	"sync"
	"time"

	"waybill.dev/schemas"
	"waybill.dev/schemas/jsonrpc"
)

// The tasks of revision 2025-11-25 (edge/mcp/coretasks.go says what is the edge's).
//
// A server of that revision makes a task of a call that asks for it (params.task),
// of a tool whose execution.taskSupport allows it. For a call that may be one of
// the gateway's tasks, the gateway asks, and follows the server's as it does those
// of the extension; so a call survives a restart of the gateway here that it would
// not otherwise, and tools that want nothing else can be called at all. Such a task
// is in a session at the server: that of the client, or, of a client without
// sessions, one that the gateway has opened for it. Which it is stands in the log
// (schemas.Tasked.Session), so that another process goes on in the same one; it is
// not closed while a task is in it.
//
// # What is changed on the way
//
// task is set in params of tools/call, with the time that the task has here, or is
// left out, where the tool does not allow it. While the server's task is
// input_required, tasks/result is asked too, in the answer of which the server's
// requests come. What the server asks becomes an input request of the task,
// by a key made of the server's id of it; its _meta loses
// io.modelcontextprotocol/related-task, which is the server's name for the task.

// revisionOfTasks is the only revision that has tasks in its core.
const revisionOfTasks = "2025-11-25"

const (
	extensionTasks = "io.modelcontextprotocol/tasks"
	relatedTask    = "io.modelcontextprotocol/related-task"
	taskStatus     = "notifications/tasks/status"
)

// coreTasks is what the gateway says of itself to clients of that revision where
// tasks are its own.
var coreTasks = []byte(`{"list":{},"cancel":{},"requests":{"tools":{"call":{}}}}`)

// withMember is an object with one of its members set; another value stays.
func withMember(object []byte, name string, raw []byte) []byte {
	v, err := jsonrpc.Parse(object, jsonrpc.Limits{Bytes: max(len(object), 1), Depth: answerDepth, AllowCaseVariants: true})
	if err != nil || v.Kind() != jsonrpc.Object {
		return object
	}
	if out := v.Patch().Set(v, name, raw).Bytes(); out != nil {
		return out
	}
	return object
}

// withExtension are a client's capabilities with the extension for tasks.
func withExtension(capabilities []byte) []byte {
	v, err := jsonrpc.Parse(capabilities, jsonrpc.Limits{Bytes: max(len(capabilities), 1), Depth: answerDepth, AllowCaseVariants: true})
	if err != nil {
		return capabilities
	}
	extensions := []byte(`{}`)
	if e := v.Get("extensions"); e.Kind() == jsonrpc.Object {
		extensions = e.Raw()
	}
	return withMember(capabilities, "extensions", withMember(extensions, extensionTasks, []byte("{}")))
}

// withoutTaskSupport leaves out of a tool what only sessions know.
func withoutTaskSupport(p *jsonrpc.Patch, tool jsonrpc.Value) {
	execution := tool.Get("execution")
	if !execution.Get("taskSupport").Exists() {
		return
	}
	for name := range execution.Members() {
		if name != "taskSupport" {
			p.Remove(execution, "taskSupport")
			return
		}
	}
	p.Remove(tool, "execution")
}

// ownTaskOf is the server's name for its task in a result that says how it stands,
// and that: of a task that was just made it is a member.
func ownTaskOf(result jsonrpc.Value) (id string, of jsonrpc.Value) {
	of = result
	if made := result.Get("task"); made.Kind() == jsonrpc.Object {
		of = made
	}
	id, _ = of.Get("taskId").Text()
	return id, of
}

// taskSupport is what the server says of a tool's calls as tasks: "optional" or
// "required", or "" for neither, also where it cannot be found out. It looks through
// the server's list once, if anything comes of it.
func (s *session) taskSupport(ctx context.Context, c Call) string {
	name := c.Requested.Name
	s.mu.Lock()
	known := s.tools
	s.mu.Unlock()
	if known == nil {
		known = s.listTaskSupport(ctx, c)
	}
	return known[name]
}

func (s *session) listTaskSupport(ctx context.Context, c Call) map[string]string {
	ctx, cancel := context.WithTimeout(ctx, listTime)
	defer cancel()
	if s.revision < revisionOfTasks {
		return nil
	}
	var caps jsonrpc.Value
	if s.guest != nil {
		caps = s.guest.server.Load().caps
	} else {
		of, err := s.t.connection(ctx, s.id, s.m.name, s.openedBy)
		if err != nil {
			s.log().Debug("what the server said of itself was not found", "error", err)
			return nil
		}
		opened, err := jsonrpc.Decode(of.Body, jsonrpc.Limits{Bytes: max(len(of.Body), 1), Depth: answerDepth, AllowCaseVariants: true})
		if err != nil {
			return nil
		}
		caps = opened.Result().Get("capabilities")
	}
	found := map[string]string{}
	if caps.Get("tasks", "requests", "tools", "call").Kind() == jsonrpc.Object {
		var cursor []byte
		for range maxHeaderList {
			list := Call{
				ID: schemas.CallID(s.number()), Event: c.Event, Trace: c.Trace,
				Requested: &schemas.Requested{Target: schemas.Target{Method: "tools/list"}}, Connected: func() {}, Heard: func() {},
			}
			list.Body = []byte(`{"jsonrpc":"2.0","id":` + string(jsonrpc.Quote(string(list.ID))) + `,"method":"tools/list","params":{` + string(cursor) + `}}`)
			answer, err := s.call(ctx, list, list.Body, func([]byte) error { return nil })
			if answer.Release != nil {
				answer.Release(func() {})
			}
			var msg *jsonrpc.Message
			if err == nil {
				msg, err = s.m.decode(answer.Body, list)
			}
			if err != nil {
				s.log().Debug("which tools may be tasks was not found out", "error", err)
				return nil
			}
			for tool := range msg.Result().Get("tools").Elements() {
				name, _ := tool.Get("name").Text()
				if support, _ := tool.Get("execution", "taskSupport").Text(); (support == "optional" || support == "required") && len(found) < maxRemembered {
					found[name] = support
				}
			}
			next := msg.Result().Get("nextCursor")
			if text, _ := next.Text(); text == "" {
				break
			}
			cursor = slices.Concat([]byte(`"cursor":`), next.Raw())
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.tools = found
	return found
}

// callAsTask makes a tools/call as a task of the server's, in this session or, where
// the server has lost it, in the one in its place, which is returned. An answer with
// a Session is such a task; a server may answer otherwise.
func (s *session) callAsTask(ctx context.Context, c Call, body []byte, progress func([]byte) error) (Answer, *session, error) {
	msg, err := jsonrpc.Decode(body, jsonrpc.Limits{Bytes: len(body)})
	if err != nil {
		return Answer{}, s, faultf(Invalid, "the request: %w", err)
	}
	ttl := max(c.Requested.TaskUntil.Sub(s.t.opt.Now()), time.Second).Milliseconds()
	if body = msg.Patch().Set(msg.Params(), "task", []byte(`{"ttl":`+strconv.FormatInt(ttl, 10)+`}`)).Bytes(); body == nil {
		return Answer{}, s, faultf(Invalid, "the request cannot be made one for a task")
	}
	answer, s, err := s.callAgain(ctx, c, body, progress)
	if err != nil || answer.ErrorCode != 0 {
		return answer, s, err
	}
	if msg, err = s.m.decode(answer.Body, c); err != nil {
		return answer, s, nil // it was decoded before
	}
	if of := msg.Result().Get("task"); of.Kind() == jsonrpc.Object && msg.Result().Kind() == jsonrpc.Object {
		answer.Result, answer.Session = resultTask, s.openedBy
		s.guest.hold(c.Event.Call)
	}
	return answer, s, nil
}

// callAgain makes a call, once more where the server does not know the session.
func (s *session) callAgain(ctx context.Context, c Call, body []byte, progress func([]byte) error) (Answer, *session, error) {
	answer, err := s.call(ctx, c, body, progress)
	if !errors.Is(err, errLost) {
		return answer, s, err
	}
	again, err := s.t.again(ctx, s)
	if err != nil {
		return Answer{}, s, err
	}
	if answer, err = again.call(ctx, c, body, progress); errors.Is(err, errLost) {
		err = faultf(Refused, "%w, which it has just opened", errLost)
	}
	return answer, again, err
}

// ownTask makes a call that its client with a session wants to be a task, and that
// is one of the gateway's: as one of the server's where the tool allows it.
func (s *session) ownTask(ctx context.Context, c Call, body []byte, progress func([]byte) error) (answer Answer, err error) {
	if s.taskSupport(ctx, c) != "" {
		answer, _, err = s.callAsTask(ctx, c, body, progress)
		return answer, err
	}
	msg, err := jsonrpc.Decode(body, jsonrpc.Limits{Bytes: len(body)})
	if err != nil {
		return Answer{}, faultf(Invalid, "the request: %w", err)
	}
	if body = msg.Patch().Remove(msg.Params(), "task").Bytes(); body == nil {
		return Answer{}, faultf(Invalid, "the request cannot be made one for no task")
	}
	answer, _, err = s.callAgain(ctx, c, body, progress)
	return answer, err
}

// connection finds in the log how a session at a server was opened.
func (t *sessions) connection(ctx context.Context, id sessionID, server, by string) (found schemas.Event, err error) {
	if t.opt.Scan == nil {
		return found, schemas.ErrNotFound
	}
	err = schemas.ErrNotFound
	for e, bad := range t.opt.Scan(ctx, id.tenant, id.key, schemas.KindConnected) {
		if bad != nil {
			return found, bad
		}
		if c, ok := e.Data.(*schemas.Connected); ok && c.Server == server && c.By == by {
			found, err = e, nil
		}
	}
	return found, err
}

// inSession makes a request about a task in the session that it was made in.
func (m *mcpServer) inSession(ctx context.Context, c Call, progress func([]byte) error) (Answer, error) {
	if m.sessions == nil || m.sessions.opt.Latest == nil {
		return Answer{}, faultf(Invalid, "this gateway keeps no sessions")
	}
	body, _, err := mcpBody(c)
	if err != nil {
		return Answer{}, &Fault{Kind: Invalid, Err: err}
	}
	s, leave, err := m.sessions.back(ctx, m, c)
	if err != nil {
		return Answer{}, err
	}
	defer leave()
	s.guest.hold(c.Event.Call)
	if s.guest != nil {
		msg, err := jsonrpc.Decode(body, jsonrpc.Limits{Bytes: len(body)})
		if err == nil {
			body, err = sessionBody(msg, nil)
		}
		if err != nil {
			return Answer{}, faultf(Invalid, "the request: %w", err)
		}
	}
	answer, err := s.call(ctx, c, body, progress)
	if errors.Is(err, errLost) {
		return Answer{}, errForgotten // with the session
	}
	return answer, err
}

// back returns the session at a server in which a task was made: that of the client,
// or that of a guest, which another process may have opened. leave must be called.
func (t *sessions) back(ctx context.Context, m *mcpServer, c Call) (_ *session, leave func(), err error) {
	if legacy(c.Requested.Revision) {
		s, err := t.get(ctx, m, c.Event)
		return s, func() {}, err
	}
	id := idOfSession(c.Event)
	if s := t.guestIn(id, m, c.In); s != nil && s.guest.enter() {
		return s, s.guest.leave, nil
	}
	if m.held {
		return nil, nil, errForgotten // it ended with its process
	}
	of, err := t.connection(ctx, id, m.name, c.In)
	switch {
	case errors.Is(err, schemas.ErrNotFound):
		return nil, nil, errForgotten
	case err != nil:
		return nil, nil, faultf(Unsent, "reading of the session at the server: %w", err)
	}
	d := of.Data.(*schemas.Connected)
	if !mayAgree(d.Revision) || !sessionIDOK(d.Upstream) {
		return nil, nil, errForgotten
	}
	g := &guest{
		t: t, m: m, id: id, slot: m.name + "\x00" + c.In, caps: []byte("{}"), info: []byte(`{"name":"waybill","version":"1"}`), busy: 1,
		leveling: make(chan struct{}, 1), wishing: make(chan struct{}, 1), told: make(chan struct{}),
	}
	if msg, err := jsonrpc.Decode(c.Body, jsonrpc.Limits{Bytes: len(c.Body), Depth: answerDepth}); err == nil {
		if v := msg.Params().Get("_meta", metaCaps); v.Kind() == jsonrpc.Object {
			g.caps = bytes.Clone(v.Raw())
		}
		if v := msg.Params().Get("_meta", metaClient); v.Kind() == jsonrpc.Object {
			g.info = bytes.Clone(v.Raw())
		}
	}
	h := &hosted{}
	if msg, err := jsonrpc.Decode(of.Body, jsonrpc.Limits{Bytes: max(len(of.Body), 1), Depth: answerDepth, AllowCaseVariants: true}); err == nil {
		h.result, h.caps = msg.Result().Raw(), msg.Result().Get("capabilities")
		if v := msg.Result().Get("serverInfo"); v.Kind() == jsonrpc.Object {
			h.info = v.Raw()
		}
	}
	g.server.Store(h)
	t.mu.Lock()
	if s := t.of[id][g.slot]; s != nil && s.guest.enter() { // another task of the same session was quicker
		t.mu.Unlock()
		if s, err = s.wait(ctx); err != nil {
			return nil, nil, err
		}
		return s, s.guest.leave, nil
	}
	s, err := t.add(m, c.Event, nil, g)
	if err != nil {
		t.mu.Unlock()
		return nil, nil, err
	}
	g.base = s.base
	s.upstream, s.revision, s.openedBy, s.initialized = d.Upstream, d.Revision, d.By, true
	close(s.ready) // nobody has to open it
	t.mu.Unlock()
	s.listen()
	return s, g.leave, nil
}

// guestIn finds the guest's session of this name, if this process is in it.
func (t *sessions) guestIn(id sessionID, m *mcpServer, by string) *session {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, s := range t.of[id] {
		if s.m != m || s.guest == nil {
			continue
		}
		select {
		case <-s.ready:
			if s.fault == nil && s.openedBy == by {
				return s
			}
		default:
		}
	}
	return nil
}

// hold says that a call is a task in the session, which stays open for it; g may be
// nil, since a client keeps its own.
func (g *guest) hold(call schemas.CallID) {
	if g == nil {
		return
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.keeps == nil {
		g.keeps = map[schemas.CallID]bool{}
	}
	g.keeps[call] = true
}

// keepNot says that a task in a guest's session is over.
func (t *sessions) keepNot(e schemas.Event, server, by string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, s := range t.of[idOfSession(e)] {
		if s.guest == nil || s.m.name != server {
			continue
		}
		select {
		case <-s.ready:
			if s.openedBy == by {
				s.guest.mu.Lock()
				delete(s.guest.keeps, e.Call)
				s.guest.mu.Unlock()
			}
		default:
		}
	}
}

// cores are the tasks of servers that are followed here, by what the servers call
// them, for what these say of them anywhere in a session.
type cores struct {
	mu     sync.Mutex
	byName map[coreKey]*coreTask
}

type coreKey struct {
	session sessionID
	server  string
	task    string
}

// of finds the one that a server names; nil: none.
func (c *cores) of(s *session, id jsonrpc.Value) *coreTask {
	text, ok := id.Text()
	if !ok {
		return nil
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.byName[coreKey{s.id, s.m.name, text}]
}

func (c *cores) enter(k coreKey, t *coreTask) (leave func()) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.byName == nil {
		c.byName = map[coreKey]*coreTask{}
	}
	c.byName[k] = t
	return func() {
		c.mu.Lock()
		defer c.mu.Unlock()
		if c.byName[k] == t {
			delete(c.byName, k)
		}
	}
}

// coreTask is what is heard of a server's task beside the answers to tasks/get.
type coreTask struct {
	news chan struct{} // of one place

	// Belong to the run's goroutine.
	stop  func()          // the request that waits; nil: there is none
	ended <-chan struct{} // closed when it has ended

	mu        sync.Mutex
	answer    *jsonrpc.Message     // to tasks/result
	questions map[string]coreQuery // that have no answer, by the keys that the client knows
	bytes     int
}

// coreQuery is something that a server asks within its task.
type coreQuery struct {
	id     []byte // the server's
	method string
	params []byte // nil: none
}

// ask takes what the server asks.
func (t *coreTask) ask(ctx context.Context, s *session, msg *jsonrpc.Message) {
	q := coreQuery{id: bytes.Clone(msg.ID().Raw()), method: msg.Method()}
	p, params := msg.Patch(), msg.Params()
	if params.Kind() == jsonrpc.Object {
		if meta := params.Get("_meta"); meta.Kind() == jsonrpc.Object {
			p.Remove(meta, relatedTask)
			n := 0
			for range meta.Members() {
				n++
			}
			if n == 1 {
				p = msg.Patch().Remove(params, "_meta")
			}
		}
		if out, err := jsonrpc.Decode(p.Bytes(), jsonrpc.Limits{Bytes: max(len(msg.Raw()), 1), Depth: answerDepth, AllowCaseVariants: true}); err == nil {
			q.params = bytes.Clone(out.Params().Raw())
		} else {
			q.params = bytes.Clone(params.Raw())
		}
	}
	if s.guest != nil {
		if code, why := s.guest.declines(msg); why != "" {
			s.guest.reply(ctx, s, jsonrpc.ErrorResponse(q.id, code, why, nil))
			return
		}
	}
	t.mu.Lock()
	key, size := q.key(), len(q.params)+256
	_, again := t.questions[key]
	full := !again && (len(t.questions) >= maxOpen || t.bytes+size > int(s.m.maxAnswer)/2)
	if !again && !full {
		if t.questions == nil {
			t.questions = map[string]coreQuery{}
		}
		t.questions[key] = q
		t.bytes += size
	}
	t.mu.Unlock()
	if full {
		s.refuse(ctx, q.id, "too many requests wait for the client already")
		return
	}
	poke(t.news)
}

// key is the name of a question for the client: the server's ids are unique in the
// session, and so in the task.
func (q coreQuery) key() string {
	id := string(q.id)
	if len(id) > 64 {
		sum := sha256.Sum256(q.id)
		id = hex.EncodeToString(sum[:16])
	}
	return q.method + "-" + id
}

// open are the questions without an answer.
func (t *coreTask) open() map[string]coreQuery {
	t.mu.Lock()
	defer t.mu.Unlock()
	return maps.Clone(t.questions)
}

func (t *coreTask) close(key string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if q, ok := t.questions[key]; ok {
		t.bytes -= len(q.params) + 256
		delete(t.questions, key)
	}
}

func (t *coreTask) result() *jsonrpc.Message {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.answer
}

// restore takes over what another run has stored that the server asks.
func (t *task) restore(result jsonrpc.Value) {
	if t.in == "" {
		return
	}
	if t.core == nil {
		t.core = &coreTask{news: t.news}
	}
	t.core.mu.Lock()
	defer t.core.mu.Unlock()
	t.core.questions, t.core.bytes = map[string]coreQuery{}, 0
	for key, v := range result.Get("inputRequests").Members() {
		id := result.Get("requestIds", key)
		if !id.Exists() {
			continue
		}
		q := coreQuery{id: bytes.Clone(id.Raw())}
		q.method, _ = v.Get("method").Text()
		q.params = bytes.Clone(v.Get("params").Raw())
		t.core.questions[key] = q
		t.core.bytes += len(q.params) + 256
	}
}

// hear has what the server says of its task heard, until stop. What another process
// has asked and nobody hears the answer of is taken back: the server would put there
// what the task asks.
func (r *run) hear(ctx context.Context) (stop func()) {
	t := r.task
	if t.core == nil {
		t.core = &coreTask{news: t.news}
	}
	leave := r.d.sessions.cores.enter(coreKey{idOfSession(r.e), r.a.Server, t.id}, t.core)
	if t.waits != "" {
		if err := r.tellServer(ctx, []byte(`{"jsonrpc":"2.0","method":"notifications/cancelled","params":{"requestId":`+string(jsonrpc.Quote(t.waits))+`}}`)); err != nil {
			r.d.opt.Log.Debug("a request of another process is not taken back", "server", r.a.Server, "call", r.e.Call, "error", err)
		}
		t.waits = ""
	}
	return func() {
		r.waitNot()
		leave()
	}
}

// wait asks the server for the result of its task, which it is to answer when there
// is one; until then it says on this stream what it wants to know (2025-11-25,
// basic/utilities/tasks, "Input Required Status"). Not before it wants to know
// something: what it puts there is lost with this process, while what nobody asks
// for waits at the server.
func (r *run) wait() {
	core, id, in, waits := r.task.core, r.task.id, r.task.in, r.task.waits
	ctx, cancel := context.WithCancelCause(r.task.parent)
	done := make(chan struct{})
	core.stop = func() {
		cancel(&wish{"it is asked for again when there is something to say"}) // which tells the server
		<-done
	}
	core.ended = done
	go func() {
		defer close(done)
		msg, err := r.aboutAs(ctx, waits, "tasks/result", id, in, nil, func([]byte) error { poke(core.news); return nil })
		if err != nil {
			if ctx.Err() == nil {
				r.d.opt.Log.Debug("a server does not let its task be waited for", "server", r.a.Server, "call", r.e.Call, "error", err)
			}
			return // tasks/get will tell
		}
		core.mu.Lock()
		core.answer = msg
		core.mu.Unlock()
		poke(core.news)
	}()
}

// waits tells whether tasks/result is being waited for.
func (t *coreTask) waits() bool {
	if t.ended == nil {
		return false
	}
	select {
	case <-t.ended:
		return false
	default:
		return true
	}
}

func (r *run) waitNot() {
	if core := r.task.core; core.stop != nil {
		core.stop()
		core.stop, core.ended = nil, nil
	}
	r.task.waits = ""
}

// coreStanding is standing for a task of revision 2025-11-25.
func (r *run) coreStanding(ctx context.Context) (end ending, wait time.Duration, err error) {
	t := r.task
	wait = t.every
	msg, err := r.inquire(ctx)
	if err != nil {
		return end, wait, err
	}
	result := msg.Result()
	if result.Get("pollInterval").Exists() {
		t.every = pollOf(result)
		wait = t.every
	}
	status, _ := result.Get("status").Text()
	switch status {
	case "completed", "failed":
		final := t.core.result()
		if final == nil {
			if final, err = r.about(ctx, "tasks/result", t.id, nil); err != nil {
				return end, wait, err
			}
		}
		return r.coreEnd(final)
	case "cancelled":
		return cancelled("the server has cancelled its task"), 0, nil
	case working, inputRequired:
	default:
		return end, wait, faultf(Garbled, "a task that is %q", clip(status, maxResultType))
	}

	open := t.core.open()
	keys := slices.Sorted(maps.Keys(open))
	given := t.given("", keys)
	keys = slices.DeleteFunc(keys, func(k string) bool { return given[k] != nil })
	now := working
	if len(keys) > 0 {
		now = inputRequired
	}
	message, _ := result.Get("statusMessage").Text()
	switch {
	case status == working && len(open) == 0:
		r.waitNot()
	case !t.core.waits():
		r.waitNot()
		t.waits = string(r.e.Call) + "-" + rand.Text()[:10]
	}
	if this := fmt.Sprintf("%s %q %q %s", now, message, keys, t.waits); this != t.last {
		if t.last != "" || now != working || t.waits != "" { // it is known to work from the first
			body := msg.Raw()
			if now == inputRequired {
				body = coreAsks(r.e.Call, t.id, message, keys, open)
			}
			if err := r.stands(ctx, now, 0, body); err != nil {
				if f := new(Fault); !errors.As(err, &f) {
					r.lastLog = err
				}
				return end, wait, err
			}
		}
		t.last = this
	}
	if t.waits != "" && t.core.stop == nil {
		r.wait()
		wait = max(wait, poll) // it is heard what comes, and a server that does not answer is not hurried
	}
	for _, key := range slices.Sorted(maps.Keys(given)) {
		if err := r.bring(ctx, open[key].id, given[key]); err != nil {
			return end, min(wait, poll), err
		}
		t.core.close(key)
		wait = min(wait, poll) // it goes on now
	}
	return end, wait, nil
}

// coreAsks says what a task asks, as the extension has it; and by which ids the
// server knows it, for who goes on with the task.
func coreAsks(call schemas.CallID, id, message string, keys []string, open map[string]coreQuery) []byte {
	b := append([]byte(`{"taskId":`), jsonrpc.Quote(id)...)
	b = append(b, `,"status":"input_required"`...)
	if message != "" {
		b = append(append(b, `,"statusMessage":`...), jsonrpc.Quote(message)...)
	}
	asks, ids := []byte(`,"inputRequests":{`), []byte(`,"requestIds":{`)
	for i, k := range keys {
		if i > 0 {
			asks, ids = append(asks, ','), append(ids, ',')
		}
		q := open[k]
		params := q.params
		if params == nil {
			params = []byte("{}")
		}
		asks = append(append(asks, jsonrpc.Quote(k)...), `:{"method":`...)
		asks = append(append(append(append(asks, jsonrpc.Quote(q.method)...), `,"params":`...), params...), '}')
		ids = append(append(append(ids, jsonrpc.Quote(k)...), ':'), q.id...)
	}
	b = append(append(append(b, asks...), '}'), ids...)
	return jsonrpc.ResultResponse(jsonrpc.Quote(string(call)), append(b, "}}"...))
}

// bring brings the client's answer to the server.
func (r *run) bring(ctx context.Context, id, answer []byte) error {
	return r.tellServer(ctx, jsonrpc.ResultResponse(id, answer))
}

// tellServer says something in the session of the server's task.
func (r *run) tellServer(ctx context.Context, body []byte) error {
	ctx, cancel := context.WithTimeout(ctx, taskTime)
	defer cancel()
	request, err := r.body(ctx)
	if err != nil {
		return err
	}
	s, leave, err := r.d.sessions.back(ctx, r.up.mcp, Call{Event: r.e, Requested: &r.a.Requested, Body: request, In: r.task.in})
	if err != nil {
		return err
	}
	defer leave()
	err = s.tell(ctx, body)
	if errors.Is(err, errLost) {
		return errForgotten
	}
	return err
}

// coreEnd makes the ending of the answer to tasks/result.
func (r *run) coreEnd(final *jsonrpc.Message) (end ending, wait time.Duration, err error) {
	done := &schemas.Completed{Status: http.StatusOK}
	p := final.Patch()
	if final.ID().Exists() {
		p.Replace(final.ID(), jsonrpc.Quote(string(r.e.Call)))
	}
	switch result := final.Result(); {
	case final.Error().Exists():
		code, _ := final.ErrorCode()
		if code == 0 {
			code = jsonrpc.CodeInternalError
		}
		done.ErrorCode = code
	case result.Kind() != jsonrpc.Object:
		return end, wait, faultf(Garbled, "a task whose result is no object")
	case !legacy(r.a.Revision) && !result.Get("resultType").Exists():
		p.Set(result, "resultType", []byte(`"complete"`))
	}
	body := p.Bytes()
	if body == nil {
		return end, wait, faultf(Garbled, "the result of its task: %w", p.Err())
	}
	return ending{data: done, body: body}, 0, nil
}
