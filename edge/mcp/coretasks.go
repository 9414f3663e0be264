package mcp

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"maps"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"time"

	"waybill.dev/edge"
	"waybill.dev/schemas"
	"waybill.dev/schemas/jsonrpc"
	"waybill.dev/schemas/sse"
)

// Revision 2025-11-25 has tasks in its core: a client asks for one by the member
// task of a tools/call (schemas.Requested.TaskNow), and asks about it with
// tasks/get, tasks/result, tasks/list and tasks/cancel. Where dispatch makes the
// call one of the gateway's tasks, which it does at every front and at servers of
// 2026-07-28, these are served here, from the log, like those of the other era:
// same ids, same owner, same events. Where the client and the one server of the
// endpoint are both of this revision the task is between them: what concerns it is
// passed on as it is.
//
// # What is changed on the way
//
// tasks/get and the like are made anew, as in tasks.go, with the names of this
// revision (ttl, pollInterval). A result with isError is a task that has failed,
// as the revision has it. The answer to tasks/result is what the call would have
// been answered with; in a result _meta[io.modelcontextprotocol/related-task] is
// set. What a task asks (input_required) is put to the client on the stream that
// answers tasks/result, by requests with ids of the gateway's, whose _meta has the
// same; what it answers is stored as a tasks/update would be.

const (
	maxListed  = 20               // tasks on a page of tasks/list
	maxScanned = 2000             // events that are looked at for one
	cancelTime = 40 * time.Second // more than dispatch gives a server to cancel its task

	// questionOf begins the ids of what is asked on behalf of a task.
	questionOf = "task/"
)

func ofCoreTask(method string) bool {
	return method == "tasks/get" || method == "tasks/result" || method == "tasks/cancel" || method == "tasks/list"
}

// wantsTask tells whether the params of a tools/call ask for a task, and until when
// it may live. A wish for less than leastTask is not followed: the call would
// be cut off, and it is not what the wish is about.
func (a *Adapter) wantsTask(params jsonrpc.Value, now time.Time) (until time.Time, ok bool) {
	const leastTask = time.Minute
	task := params.Get("task")
	if task.Kind() != jsonrpc.Object || a.o.TaskTime <= 0 {
		return time.Time{}, false
	}
	ttl := a.o.TaskTime
	if ms, ok := task.Get("ttl").Int(); ok && ms >= 0 && ms < ttl.Milliseconds() {
		ttl = min(ttl, max(time.Duration(ms)*time.Millisecond, leastTask))
	}
	return now.Add(ttl), true
}

// core writes the task as members of an object of this revision.
func (s *standing) core(a *Adapter, front *schemas.Front, created bool) []byte {
	o := s.outcome(a, front)
	if created {
		o.status = "working"
	}
	if o.result != nil {
		if v, err := jsonrpc.Parse(o.result, answerLimits); err == nil {
			if failed, _ := v.Get("isError").Bool(); failed {
				o.status = "failed"
			}
		}
	}
	return s.head(o, "ttl", "pollInterval")
}

// over tells whether the task has ended, or is as good as that.
func (s *standing) over(a *Adapter) bool { return s.ended() || s.outcome(a, nil).lost }

// created answers a call that has become a task (CreateTaskResult).
func (c *telling) created(first schemas.Event) error {
	if d := first.Data.(*schemas.Tasked); d.Index != 0 {
		return nil
	}
	s := newStanding(first)
	result := append([]byte(`{"task":{`), s.core(c.a, c.front, true)...)
	err := c.answer(first.Seq, http.StatusOK, jsonrpc.ResultResponse(c.id, append(result, "}}"...)), 0)
	c.cancel(schemas.ErrDetached) // the call goes on
	return err
}

// coreTask serves a request about tasks. It is false where that is none of the
// gateway's, but of the server.
func (a *Adapter) coreTask(ctx context.Context, c *telling, m *jsonrpc.Message, endpoint string, req *schemas.Requested) bool {
	c.id, c.request, c.cancel = m.ID().Raw(), req, func(error) {}
	p := edge.Principal{Tenant: c.s.tenant, Agent: c.s.agent}
	say := func(result []byte) { _ = c.answer(0, http.StatusOK, jsonrpc.ResultResponse(c.id, result), 0) }
	if req.Method == "tasks/list" {
		switch ours, bad := a.servesTasks(ctx, c, endpoint); {
		case bad != nil:
			_ = c.fail(0, ofCall(*bad))
		case !ours:
			return false
		default:
			result, bad := a.listTasks(ctx, c.front, p, endpoint, m.Params().Get("cursor"))
			if bad != nil {
				_ = c.fail(0, ofCall(*bad))
				break
			}
			say(result)
		}
		return true
	}

	id, _ := m.Params().Get("taskId").Text()
	first, bad := a.findTask(ctx, p, c.front, endpoint, id)
	if bad == &unknownTask {
		switch ours, bad := a.servesTasks(ctx, c, endpoint); {
		case bad != nil:
			_ = c.fail(0, ofCall(*bad))
		case !ours:
			return false
		default:
			_ = c.fail(0, unknownTask)
		}
		return true
	}
	var s *standing
	if bad == nil {
		c.call = first.Call
		c.w.Header()["Waybill-Call"] = []string{string(first.Call)}
		c.w.Header()["Waybill-Session-Key"] = []string{string(first.Session)}
		s, bad = a.stands(ctx, first)
	}
	if bad != nil {
		_ = c.fail(0, ofCall(*bad))
		return true
	}
	object := func() []byte { return append(append([]byte{'{'}, s.core(a, c.front, false)...), '}') }
	switch req.Method {
	case "tasks/get":
		say(object())
	case "tasks/result":
		a.taskResult(ctx, c, s)
	case "tasks/cancel":
		if bad := a.cancelTask(ctx, s); bad != nil {
			_ = c.fail(0, ofCall(*bad))
			break
		}
		say(object())
	}
	return true
}

// servesTasks tells whether tasks at an endpoint are the gateway's: at a front, and
// where the server has no sessions, which the session's connection to it says.
func (a *Adapter) servesTasks(ctx context.Context, c *telling, endpoint string) (bool, *reply) {
	if c.front != nil {
		return true, nil
	}
	e, err := a.o.Latest(ctx, c.s.tenant, c.s.key, schemas.KindConnected)
	if errors.Is(err, schemas.ErrNotFound) {
		return false, nil
	}
	if err != nil {
		a.o.Log.Error("cannot read to which server a session is connected", "session", c.s.key, "error", err)
		return false, &cannotRead
	}
	d, ok := e.Data.(*schemas.Connected)
	return ok && d.Server == endpoint && d.Revision >= Revision, nil
}

// listTasks is a page of the caller's tasks at an endpoint, the oldest first.
func (a *Adapter) listTasks(ctx context.Context, front *schemas.Front, p edge.Principal, endpoint string, cursor jsonrpc.Value) ([]byte, *reply) {
	var after uint64
	if cursor.Exists() {
		text, _ := cursor.Text()
		seq, err := strconv.ParseUint(text, 36, 64)
		if err != nil {
			return nil, &reply{status: http.StatusOK, code: jsonrpc.CodeInvalidParams, message: "Invalid cursor"}
		}
		after = seq
	}
	b := []byte(`{"tasks":[`)
	n, looked := 0, 0
	for e, err := range a.o.Tasked(ctx, p.Tenant, after) {
		if n == maxListed || looked == maxScanned {
			return append(strconv.AppendUint(append(b, `],"nextCursor":"`...), after, 36), `"}`...), nil
		}
		if err != nil {
			a.o.Log.Error("cannot read tasks", "tenant", p.Tenant, "error", err)
			return nil, &cannotRead
		}
		after = e.Seq
		looked++
		if d, ok := e.Data.(*schemas.Tasked); !ok || d.Index != 0 || !ownTask(e, d, p, front, endpoint) {
			continue
		}
		s, bad := a.stands(ctx, e)
		if bad != nil {
			return nil, bad
		}
		if n++; n > 1 {
			b = append(b, ',')
		}
		b = append(append(append(b, '{'), s.core(a, front, false)...), '}')
	}
	return append(b, "]}"...), nil
}

// cancelTask has a task cancelled, and waits until it is: the revision wants the
// answer to say so.
func (a *Adapter) cancelTask(ctx context.Context, s *standing) *reply {
	refused := func(status string) *reply {
		return &reply{status: http.StatusOK, code: jsonrpc.CodeInvalidParams, message: "Cannot cancel task in terminal status '" + status + "'"}
	}
	if s.over(a) {
		return refused(s.outcome(a, nil).status)
	}
	e := s.first.Next(&schemas.Cancel{Reason: "tasks/cancel"}, nil).Task()
	e.Time = a.o.Now().UTC()
	if _, err := a.o.Store(ctx, e); err != nil {
		a.o.Log.Error("cannot store what a client says of a task", "call", e.Call, "error", err)
		return storeFailure(err)
	}
	ctx, cancel := context.WithTimeout(ctx, cancelTime)
	defer cancel()
	err := a.o.Follow(ctx, s.first.Task(), s.seen, func(_ context.Context, e schemas.Event) (schemas.Receipt, error) {
		s.see(e)
		return schemas.Receipt{}, nil
	})
	if !s.ended() {
		a.o.Log.Warn("a task that was to be cancelled goes on", "call", e.Call, "error", err)
		return &reply{status: http.StatusOK, code: jsonrpc.CodeInternalError, reason: "cancelling",
			message: "The task is to be cancelled, but has not ended yet. Ask for it again."}
	}
	if o := s.outcome(a, nil); o.status != "cancelled" {
		return refused(o.status) // it was quicker
	}
	return nil
}

// taskResult answers tasks/result: it waits for the end of the task, puts to the
// client meanwhile what the task asks, and says when it stands otherwise.
func (a *Adapter) taskResult(reqCtx context.Context, c *telling, s *standing) {
	w := &c.a.watched
	if !w.add(c.s.tenant, 1) {
		f := failures[schemas.FailOverloaded]
		f.reason = string(schemas.FailOverloaded)
		_ = c.fail(0, ofCall(f))
		return
	}
	defer w.add(c.s.tenant, -1)
	lasting, release := edge.UntilDrain(reqCtx)
	defer release()
	ctx, cancel := context.WithCancelCause(lasting)
	defer cancel(nil)
	c.cancel = cancel
	run := &running{event: schemas.Event{}, reads: true, ctx: ctx, cancel: cancel}
	if !c.s.begin(c.id, run) {
		_ = c.fail(0, reply{status: http.StatusBadRequest, code: jsonrpc.CodeInvalidRequest, message: "A request with this id has not been answered yet: an id must not be used twice in a session."})
		return
	}
	defer c.s.end(c.id, run, false)
	if !s.of.Until.IsZero() {
		late := time.AfterFunc(s.of.Until.Add(grace+time.Second).Sub(a.o.Now()), func() { cancel(errOverdue) })
		defer late.Stop()
	}
	c.begin(0, false)
	defer c.stop()

	put := map[string]bool{}
	status := s.outcome(a, c.front).status
	tell := func() error {
		if now := s.outcome(a, c.front).status; now != status && !s.over(a) && c.stream != nil {
			status = now
			b := append([]byte(`{"jsonrpc":"2.0","method":"notifications/tasks/status","params":{`), s.core(a, c.front, false)...)
			if err := c.stream.Send(sse.Event{Data: append(b, "}}"...)}); err != nil {
				return err
			}
		}
		return c.put(s, put)
	}
	err := tell()
	if err == nil && !s.over(a) {
		err = a.o.Follow(ctx, s.first.Task(), s.seen, func(_ context.Context, e schemas.Event) (schemas.Receipt, error) {
			if !s.see(e) || s.ended() {
				return schemas.Receipt{}, nil
			}
			return schemas.Receipt{}, tell()
		})
	}
	switch cause := context.Cause(ctx); {
	case s.over(a):
		_ = c.answer(0, http.StatusOK, s.answer(c), 0)
	case errors.Is(cause, errTakenBack):
		if c.sse {
			c.quit()
			return
		}
		_ = c.fail(0, cancelled)
	case errors.Is(cause, errClosed):
		_ = c.fail(0, cancelled)
	case errors.Is(cause, edge.ErrDraining):
		c.leave(draining)
	case cause != nil:
		c.leave(goneOn)
	default:
		a.o.Log.Warn("a task is followed no further", "call", s.first.Call, "error", err)
		c.leave(cannotRead)
	}
}

// answer is the message that answers the call of a task that is over.
func (s *standing) answer(c *telling) []byte {
	o := s.outcome(c.a, c.front)
	switch {
	case o.err != nil:
		b := append([]byte(`{"jsonrpc":"2.0","id":`), c.id...)
		return append(append(append(b, `,"error":`...), o.err...), '}')
	case o.result == nil:
		return encode(c.id, cancelled, s.first.Call)
	}
	result := o.result
	if v, err := jsonrpc.Parse(result, answerLimits); err == nil {
		p := v.Patch()
		s.relate(p, v)
		if out := p.Bytes(); out != nil {
			result = out
		}
	}
	return jsonrpc.ResultResponse(c.id, result)
}

// relate says in the _meta of a result or of params whose they are.
func (s *standing) relate(p *jsonrpc.Patch, in jsonrpc.Value) {
	of := append(append([]byte(`{"taskId":`), jsonrpc.Quote(s.id)...), '}')
	if meta := in.Get("_meta"); meta.Kind() == jsonrpc.Object {
		p.Set(meta, relatedTask, of)
		return
	}
	p.Set(in, "_meta", slices.Concat([]byte(`{"`+relatedTask+`":`), of, []byte{'}'}))
}

// put puts to the client what the task asks and it has not been told of here.
func (c *telling) put(s *standing, told map[string]bool) error {
	for key, v := range s.asks() {
		id := questionID(s.id, key)
		if told[id] {
			continue
		}
		told[id] = true
		method := v.Get("method")
		b := append(append([]byte(`{"jsonrpc":"2.0","id":`), jsonrpc.Quote(id)...), `,"method":`...)
		b = append(append(b, method.Raw()...), `,"params":`...)
		params := v.Get("params").Raw()
		if params == nil {
			params = []byte("{}")
		}
		if err := c.putOne(s, append(append(b, params...), '}')); err != nil {
			return err
		}
	}
	if s.ended() {
		return nil
	}
	for _, id := range slices.Sorted(maps.Keys(s.questions)) {
		if told[id] {
			continue
		}
		told[id] = true
		e := s.questions[id]
		m, err := jsonrpc.Decode(e.Body, answerLimits)
		if err != nil || !m.IsRequest() {
			c.a.o.Log.Error("stored request cannot be read", "session", e.Session, "call", e.Call, "error", err)
			continue
		}
		q := &question{event: e, original: string(m.ID().Raw())}
		q.event.Body = nil
		c.s.ask(id, q)
		p := m.Patch().Replace(m.ID(), jsonrpc.Quote(id))
		if !m.Params().Exists() {
			p.Set(m.Root(), "params", []byte("{}"))
		}
		body := p.Bytes()
		if body == nil {
			c.a.o.Log.Error("stored request cannot be patched", "session", e.Session, "call", e.Call, "error", p.Err())
			continue
		}
		if err := c.putOne(s, body); err != nil {
			return err
		}
	}
	return nil
}

func (c *telling) putOne(s *standing, request []byte) error {
	m, err := jsonrpc.Decode(request, answerLimits)
	if err == nil && !m.IsRequest() {
		err = errors.New("not a request")
	}
	if err == nil {
		p := m.Patch()
		s.relate(p, m.Params())
		request, err = p.Bytes(), p.Err()
	}
	if err != nil {
		c.a.o.Log.Error("what a task asks cannot be put to its client", "call", s.first.Call, "error", err)
		return nil
	}
	if c.stream == nil {
		c.a.o.Log.Warn("what a task asks cannot be put to a client that takes no event stream", "call", s.first.Call)
		return nil
	}
	return c.stream.Send(sse.Event{Data: request})
}

// questionID is the id of what a task asks by a key, which may be of any length:
// whoever hears the answer finds by it the task and the key.
func questionID(task, key string) string {
	sum := sha256.Sum256([]byte(key))
	return questionOf + task + "/" + hex.EncodeToString(sum[:12])
}

func cutQuestion(id string) (task, key string, ok bool) {
	rest, ok := strings.CutPrefix(id, questionOf)
	if !ok {
		return "", "", false
	}
	return strings.Cut(rest, "/")
}

// inputInstead are what a tasks/update says where the client has answered with an
// error; of other methods nothing can be said, and the task cannot go on.
var inputInstead = map[string]string{"elicitation/create": `{"action":"cancel"}`}

// answeredTask stores the client's answer to what a task asks.
func (a *Adapter) answeredTask(ctx context.Context, of *lasting, m *jsonrpc.Message, id, hashed string) *reply {
	p := edge.Principal{Tenant: of.tenant, Agent: of.agent}
	front := a.fronts[of.server]
	if of.server == "" {
		front = a.fronts[schemas.Gateway]
	}
	first, bad := a.findTask(ctx, p, front, of.server, id)
	if bad != nil {
		if bad == &unknownTask {
			return badRequest("this is a response to a request that was not made in this session")
		}
		return bad
	}
	s, bad := a.stands(ctx, first)
	if bad != nil {
		return bad
	}
	for key, v := range s.asks() {
		if questionID(s.id, key) != questionOf+id+"/"+hashed {
			continue
		}
		method, _ := v.Get("method").Text()
		answer := m.Result().Raw()
		if m.Error().Exists() {
			answer = []byte(inputInstead[method])
		}
		var e schemas.Event
		if len(answer) == 0 {
			e = first.Next(&schemas.Cancel{Reason: "the client answered " + short(method) + " with an error"}, bytes.Clone(m.Raw())).Task()
		} else {
			body := append([]byte(`{"jsonrpc":"2.0","id":1,"method":"tasks/update","params":{"taskId":`), jsonrpc.Quote(s.id)...)
			body = append(append(append(body, `,"inputResponses":{`...), jsonrpc.Quote(key)...), ':')
			body = append(append(body, answer...), "}}}"...)
			e = first.Next(&schemas.Answered{Target: s.of.Target, ID: string(schemas.NewCallID(a.o.Now()))}, body).Task()
		}
		e.Time = a.o.Now().UTC()
		if _, err := a.o.Store(ctx, e); err != nil {
			a.o.Log.Error("cannot store what a client says of a task", "call", e.Call, "error", err)
			return storeFailure(err)
		}
		return nil
	}
	return nil // it is answered, or is not asked any more
}
