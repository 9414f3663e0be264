package mcp

import (
	"bytes"
	"context"
	"errors"
	"iter"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"waybill.dev/edge"
	"waybill.dev/schemas"
	"waybill.dev/schemas/jsonrpc"
	"waybill.dev/schemas/sse"
)

// Tasks are the extension io.modelcontextprotocol/tasks of 2026-07-28: a
// tools/call is answered with a task when dispatch has made it one
// ([schemas.Tasked]), and its client then asks for it by the task's id, which is
// the call's with the place of that event in the log. So any replica, after any
// restart, finds it, and there is no table to lose. The call's 80 random bits
// make the id one that nobody guesses; tenant and agent must be the call's all
// the same, and for anybody else a task is unknown, like one that never was, or
// that the log has forgotten.
//
// What a client says of a task is no call: tasks/get reads what is stored, as who
// comes back for the rest of a stream does; tasks/update is the answer to what
// was asked (answered) and tasks/cancel the wish that a call end (cancel), both
// events of the call itself, on which policy has decided. Neither begins
// anything, so there is nothing else to decide than whose the task is.
//
// # What is changed on the way
//
// Of a task all is the gateway's, but statusMessage and pollIntervalMs, which are
// the server's where it has some; inputRequests, with the keys that dispatch gives
// them; result and error, which are what the call would have been answered with
// (in a result _meta loses io.modelcontextprotocol/related-task, which is the
// other era's). At a server with tools that become tasks, server/discover
// declares the extension, and the acknowledgement of a subscription names the
// tasks in it.

const (
	extensionTasks = "io.modelcontextprotocol/tasks"
	relatedTask    = "io.modelcontextprotocol/related-task"

	// pollInterval is how long a client is asked to wait before it asks again,
	// where the server does not say; in ms.
	pollInterval = 2000

	// maxTaskIDs is how many tasks may be in one subscription: each is a reader
	// of the log.
	maxTaskIDs = 64

	// maxWatched is how many such readers one tenant may have, over all of its
	// subscriptions at this replica.
	maxWatched = 1024

	maxListen = time.Hour // the life of a subscription to nothing but tasks
)

// ofTask are the methods that concern a task.
func ofTask(method string) bool {
	return method == "tasks/get" || method == "tasks/update" || method == "tasks/cancel"
}

// takesTasks tells whether the client has declared the extension in this request;
// what it said in others does not count.
func (m meta) takesTasks() bool {
	return m.capabilities.Get("extensions", extensionTasks).Kind() == jsonrpc.Object
}

// undeclared refuses what only a client may ask that has declared the extension.
var undeclared = reply{
	status: http.StatusBadRequest, code: jsonrpc.CodeMissingRequiredClientCapability, message: "Missing required client capability",
	data: []byte(`{"requiredCapabilities":{"extensions":{"` + extensionTasks + `":{}}}}`),
}

// unknownTask is the one answer to all who do not have the task.
var unknownTask = reply{status: http.StatusOK, code: jsonrpc.CodeInvalidParams, message: "Task not found"}

// taskID names the task that a call has become by the event of index 0.
func taskID(e schemas.Event) string {
	return string(e.Call) + "-" + strconv.FormatUint(e.Seq, 36)
}

// findTask finds the event by which a call became the task of this id, for the
// caller at this endpoint. Without bad, a zero event means that he has none.
func (a *Adapter) findTask(ctx context.Context, p edge.Principal, front *schemas.Front, endpoint, id string) (e schemas.Event, bad *reply) {
	call, place, ok := strings.Cut(id, "-")
	seq, err := strconv.ParseUint(place, 36, 64)
	if !ok || err != nil || schemas.CheckToken(call) != nil || strconv.FormatUint(seq, 36) != place {
		return e, &unknownTask
	}
	e, err = a.o.Load(ctx, seq)
	if err != nil && !errors.Is(err, schemas.ErrNotFound) {
		a.o.Log.Error("cannot read a task", "seq", seq, "error", err)
		return e, &cannotRead
	}
	t, ok := e.Data.(*schemas.Tasked)
	if err != nil || !ok || t.Index != 0 || string(e.Call) != call || !ownTask(e, t, p, front, endpoint) {
		return schemas.Event{}, &unknownTask
	}
	return e, nil
}

// ownTask tells whether a task is the caller's, and one of this endpoint.
func ownTask(e schemas.Event, t *schemas.Tasked, p edge.Principal, front *schemas.Front, endpoint string) bool {
	if e.Tenant != p.Tenant || e.Agent != p.Agent {
		return false
	}
	if front == nil {
		return t.Server == endpoint
	}
	return slices.Contains(front.Servers, t.Server)
}

// standing is how a task stands, as far as its events have been seen.
type standing struct {
	id       string
	first    schemas.Event // by which it became one
	of       *schemas.Tasked
	status   string
	updated  time.Time
	said     jsonrpc.Value // the server's last word of it: a result; may not exist
	front    string        // of the keys in it, see schemas.Tasked.Round
	answered map[string]bool
	end      schemas.Event

	// What the server asks beside that, by schemas.Asked.ID, and has no answer to:
	// only of a client that has a session.
	questions map[string]schemas.Event
	seen      uint64 // sequence
}

func newStanding(first schemas.Event) *standing {
	s := &standing{id: taskID(first), first: first, of: first.Data.(*schemas.Tasked), answered: map[string]bool{}}
	s.see(first)
	return s
}

// see takes the next event of the task; it tells whether it stands otherwise now.
func (s *standing) see(e schemas.Event) bool {
	if s.ended() || e.Call != s.first.Call || e.Seq <= s.seen {
		return false
	}
	s.seen = e.Seq
	switch d := e.Data.(type) {
	case *schemas.Tasked:
		s.status = d.Status
		if m, err := jsonrpc.Decode(e.Body, answerLimits); err == nil {
			s.said, s.front = m.Result(), ""
			if of := s.said.Get("task"); of.Kind() == jsonrpc.Object {
				s.said = of // a task of 2025-11-25, as it was created
			}
			if d.Round > 0 {
				s.front = strconv.Itoa(d.Round) + "."
			}
		}
	case *schemas.Asked:
		if s.questions == nil {
			s.questions = map[string]schemas.Event{}
		}
		s.questions[d.ID] = e
	case *schemas.Answered:
		if _, ok := s.questions[d.ID]; ok {
			delete(s.questions, d.ID)
			break
		}
		m, err := jsonrpc.Decode(e.Body, answerLimits)
		if err != nil {
			return false
		}
		for k := range m.Params().Get("inputResponses").Members() {
			s.answered[k] = true
		}
	default:
		if !e.Kind().Ends() {
			return false
		}
		s.end = e
	}
	s.updated = e.Stored
	return true
}

func (s *standing) ended() bool { return s.end.Data != nil }

// asks are the questions that are not answered, by the keys that the client knows.
func (s *standing) asks() iter.Seq2[string, jsonrpc.Value] {
	return func(yield func(string, jsonrpc.Value) bool) {
		if s.status != "input_required" || s.ended() {
			return
		}
		for k, v := range s.said.Get("inputRequests").Members() {
			if k = s.front + k; !s.answered[k] && !yield(k, v) {
				return
			}
		}
	}
}

// stands reads how a task stands now.
func (a *Adapter) stands(ctx context.Context, first schemas.Event) (*standing, *reply) {
	s := newStanding(first)
	for e, err := range a.o.Task(ctx, first.Task()) {
		if err != nil {
			a.o.Log.Error("cannot read a task", "call", first.Call, "error", err)
			return nil, &cannotRead
		}
		s.see(e)
	}
	return s, nil
}

// outcome is what has become of a task, as its client is told it.
type outcome struct {
	status, message string
	result, err     []byte // of the call; at most one of them, and none before it has ended or if it was cancelled
	lost            bool   // whoever had to end it has not
}

func (s *standing) outcome(a *Adapter, front *schemas.Front) outcome {
	o := outcome{status: s.status}
	fail := func(raw []byte) {
		o.status, o.err = "failed", raw
		if v, err := jsonrpc.Parse(raw, answerLimits); err == nil {
			o.message, _ = v.Get("message").Text()
		}
	}
	own := func(f reply) {
		if m, err := jsonrpc.Decode(encode([]byte("1"), f, s.first.Call), answerLimits); err == nil {
			fail(m.Error().Raw())
		}
	}
	switch d := s.end.Data.(type) {
	case nil:
		o.message, _ = s.said.Get("statusMessage").Text()
		switch {
		case !s.of.Until.IsZero() && a.o.Now().After(s.of.Until.Add(grace)):
			own(lostTrack)
			o.lost = true
		case s.waits():
			o.status = "input_required"
		case s.status == "input_required":
			o.status = "working" // all is answered
		}
	case *schemas.Completed:
		m, err := jsonrpc.Decode(s.end.Body, answerLimits)
		switch {
		case err != nil:
			own(failures[schemas.FailBadAnswer])
		case m.Error().Exists():
			fail(m.Error().Raw())
		default:
			o.status, o.result = "completed", taskResult(m, front, s.of.Target)
		}
	case *schemas.Failed:
		if d.Unlisted {
			own(deniedReply(s.of.Target))
			break
		}
		f, ok := failures[d.Code]
		if !ok {
			f, d.Code = failures[schemas.FailInternal], schemas.FailInternal
		}
		f.reason = string(d.Code)
		own(f)
	case *schemas.Cancelled:
		o.status, o.message = "cancelled", d.Reason
	default:
		own(failures[schemas.FailInternal])
	}
	return o
}

// waits tells whether the client is asked something.
func (s *standing) waits() bool {
	for range s.asks() {
		return true
	}
	return !s.ended() && len(s.questions) > 0
}

// members writes the task as members of an object. Created, it is only said
// that it is there.
func (s *standing) members(a *Adapter, front *schemas.Front, created bool) []byte {
	o := s.outcome(a, front)
	var more []byte
	add := func(name string, raw []byte) {
		if raw != nil {
			more = append(append(more, `,"`+name+`":`...), raw...)
		}
	}
	switch {
	case o.err != nil, o.result != nil:
		add("error", o.err)
		add("result", o.result)
	case created:
		o.status = s.status
	case o.status == "input_required":
		asks := []byte{'{'}
		for k, v := range s.asks() {
			if len(asks) > 1 {
				asks = append(asks, ',')
			}
			asks = append(append(append(asks, jsonrpc.Quote(k)...), ':'), v.Raw()...)
		}
		add("inputRequests", append(asks, '}'))
	}
	return append(s.head(o, "ttlMs", "pollIntervalMs"), more...)
}

// head writes what tasks have in both eras, which differ in two names.
func (s *standing) head(o outcome, ttlName, pollName string) []byte {
	const iso = "2006-01-02T15:04:05.000Z"
	b := append([]byte(`"taskId":`), jsonrpc.Quote(s.id)...)
	b = append(b, `,"status":"`+o.status+`"`...)
	if o.message != "" {
		b = append(append(b, `,"statusMessage":`...), jsonrpc.Quote(o.message)...)
	}
	b = append(b, `,"createdAt":"`+s.of.RequestedAt.UTC().Format(iso)+`","lastUpdatedAt":"`+s.updated.UTC().Format(iso)+`","`+ttlName+`":`...)
	if s.of.Until.IsZero() {
		b = append(b, "null"...)
	} else {
		ttl := s.of.Until.Sub(s.of.RequestedAt).Round(time.Second)
		b = strconv.AppendInt(b, max(ttl, time.Second).Milliseconds(), 10)
	}
	every, ok := s.said.Get("pollIntervalMs").Int()
	if !ok {
		every, ok = s.said.Get("pollInterval").Int() // of the other era
	}
	if !ok || every <= 0 {
		every = pollInterval
	}
	return strconv.AppendInt(append(b, `,"`+pollName+`":`...), every, 10)
}

// taskResult is the result of the call, as a task has it.
func taskResult(m *jsonrpc.Message, front *schemas.Front, t schemas.Target) []byte {
	p := m.Patch()
	outwardResult(p, front, t, m.Result())
	if meta := m.Result().Get("_meta"); meta.Get(relatedTask).Exists() {
		p.Remove(meta, relatedTask)
	}
	if out := p.Bytes(); out != nil {
		if changed, err := jsonrpc.Decode(out, answerLimits); err == nil {
			return changed.Result().Raw()
		}
	}
	return m.Result().Raw()
}

// created answers a call that has become a task (CreateTaskResult).
func (c *caller) created(first schemas.Event) error {
	s := newStanding(first)
	result := append([]byte(`{"resultType":"task",`), s.members(c.a, c.front, true)...)
	err := c.answer(http.StatusOK, jsonrpc.ResultResponse(c.id, append(result, '}')), 0)
	c.cancel(schemas.ErrDetached) // the call goes on
	return err
}

// task serves tasks/get, tasks/update and tasks/cancel.
func (c *caller) task(ctx context.Context, p edge.Principal, endpoint string, m *jsonrpc.Message) *reply {
	first, bad := c.a.findTask(ctx, p, c.front, endpoint, c.request.Name)
	if bad != nil {
		return bad
	}
	c.w.Header()["Waybill-Call"] = []string{string(first.Call)}
	c.w.Header()["Waybill-Session-Key"] = []string{string(first.Session)}
	s, bad := c.a.stands(ctx, first)
	if bad != nil {
		return bad
	}
	result := []byte(`{"resultType":"complete"`)
	var say schemas.Payload
	switch c.request.Method {
	case "tasks/get":
		result = append(append(result, ','), s.members(c.a, c.front, false)...)
	case "tasks/cancel":
		if !s.ended() {
			say = &schemas.Cancel{Reason: "tasks/cancel"}
		}
	case "tasks/update":
		answers := m.Params().Get("inputResponses")
		if answers.Kind() != jsonrpc.Object {
			return invalid("inputResponses must be an object")
		}
		// What was not asked, or is answered, is nothing to keep.
		for k := range s.asks() {
			if answers.Get(k).Exists() {
				say = &schemas.Answered{Target: s.of.Target, ID: string(schemas.NewCallID(c.a.o.Now()))}
			}
		}
	}
	if say != nil {
		e := first.Next(say, bytes.Clone(m.Raw())).Task()
		e.Time = c.a.o.Now().UTC()
		if _, err := c.a.o.Store(ctx, e); err != nil {
			c.a.o.Log.Error("cannot store what a client says of a task", "call", e.Call, "error", err)
			r := notStoredReply(err)
			return &r
		}
	}
	_ = c.answer(http.StatusOK, jsonrpc.ResultResponse(c.id, append(result, '}')), 0)
	return nil
}

// watching are the tasks of which a subscription tells (notifications/tasks).
type watching struct {
	c     *caller
	ids   [][]byte // as they are acknowledged
	tasks []schemas.Event
	once  sync.Once
	wg    sync.WaitGroup
}

// watched counts the tasks in subscriptions, by tenant.
type watched struct {
	mu sync.Mutex
	of map[schemas.Tenant]int
}

// add takes n more in, if there is room.
func (w *watched) add(t schemas.Tenant, n int) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.of[t]+n > maxWatched {
		return false
	}
	if w.of == nil {
		w.of = map[schemas.Tenant]int{}
	}
	if w.of[t] += n; w.of[t] == 0 {
		delete(w.of, t)
	}
	return true
}

// watch finds the tasks that a subscription names; those that the caller does not
// have are left out of what is agreed. They count as the tenant's until ctx is done.
func (c *caller) watch(ctx context.Context, p edge.Principal, endpoint string, ids jsonrpc.Value) (*watching, *reply) {
	w := &watching{c: c}
	n := 0
	for v := range ids.Elements() {
		id, ok := v.Text()
		if n++; !ok || n > maxTaskIDs {
			return nil, invalid("taskIds must be a list of at most %d strings", maxTaskIDs)
		}
		e, bad := c.a.findTask(ctx, p, c.front, endpoint, id)
		if bad == &unknownTask || slices.ContainsFunc(w.tasks, func(other schemas.Event) bool { return other.Seq == e.Seq }) {
			continue
		}
		if bad != nil {
			return nil, bad
		}
		w.tasks, w.ids = append(w.tasks, e), append(w.ids, jsonrpc.Quote(id))
	}
	if n := len(w.tasks); n > 0 {
		if !c.a.watched.add(p.Tenant, n) {
			f := failures[schemas.FailOverloaded]
			f.reason = string(schemas.FailOverloaded)
			return nil, &f
		}
		context.AfterFunc(ctx, func() { c.a.watched.add(p.Tenant, -n) })
	}
	return w, nil
}

// agreed is the list of the tasks, as JSON.
func (w *watching) agreed() []byte {
	return append(append([]byte{'['}, bytes.Join(w.ids, []byte{','})...), ']')
}

// begin tells how each task stands, and from then on whenever it stands otherwise.
// It is called when the subscription has been acknowledged.
func (w *watching) begin(ctx context.Context) {
	w.once.Do(func() {
		for _, first := range w.tasks {
			w.wg.Go(func() { w.follow(ctx, first) })
		}
	})
}

func (w *watching) follow(ctx context.Context, first schemas.Event) {
	c := w.c
	s, bad := c.a.stands(ctx, first)
	if bad != nil {
		return // logged
	}
	tell := func() error {
		b := []byte(`{"jsonrpc":"2.0","method":"notifications/tasks","params":{"_meta":{"` + metaSubscription + `":`)
		b = append(append(append(b, c.id...), "},"...), s.members(c.a, c.front, false)...)
		return c.stream.Send(sse.Event{Data: append(b, "}}"...)})
	}
	if tell() != nil || s.ended() {
		return
	}
	err := c.a.o.Follow(ctx, first.Task(), s.seen, func(_ context.Context, e schemas.Event) (schemas.Receipt, error) {
		if !s.see(e) {
			return schemas.Receipt{}, nil
		}
		return schemas.Receipt{}, tell()
	})
	if err != nil && ctx.Err() == nil {
		c.a.o.Log.Warn("a task is followed no further", "call", first.Call, "error", err)
	}
}

// acknowledge adds the tasks to the acknowledgement of a subscription.
func (w *watching) acknowledge(body []byte) []byte {
	m, err := jsonrpc.Decode(body, answerLimits)
	if err != nil || m.Method() != acknowledged {
		return body
	}
	n := m.Params().Get("notifications")
	if n.Kind() != jsonrpc.Object {
		return body
	}
	if out := m.Patch().Set(n, "taskIds", w.agreed()).Bytes(); out != nil {
		return out
	}
	return body
}

const acknowledged = "notifications/subscriptions/acknowledged"

// alone serves a subscription to nothing but tasks: no server has to be asked. It
// ends when there is nothing more to tell of any.
func (w *watching) alone(ctx context.Context) {
	c := w.c
	ctx, cancel := context.WithTimeout(ctx, maxListen)
	defer cancel()
	ack := []byte(`{"jsonrpc":"2.0","method":"` + acknowledged + `","params":{"_meta":{"` + metaSubscription + `":`)
	ack = append(append(append(ack, c.id...), `},"notifications":{"taskIds":`...), w.agreed()...)
	if c.stream.Send(sse.Event{Data: append(ack, "}}}"...)}) != nil {
		return
	}
	w.begin(ctx)
	w.wg.Wait() // each ends with its task, or with ctx
	c.drain()   // a client that has left does not hear it
}

// onlyTasks tells whether a subscription's filter names nothing but tasks.
func onlyTasks(notifications jsonrpc.Value) bool {
	for name, v := range notifications.Members() {
		yes, isBool := v.Bool()
		if name != "taskIds" && (!isBool || yes) {
			return false
		}
	}
	return true
}

// declareTasks makes the answer to server/discover say that there may be tasks.
func declareTasks(p *jsonrpc.Patch, result jsonrpc.Value) {
	capabilities := result.Get("capabilities")
	extensions := capabilities.Get("extensions")
	switch {
	case extensions.Kind() == jsonrpc.Object && !extensions.Get(extensionTasks).Exists():
		p.Set(extensions, extensionTasks, []byte("{}"))
	case capabilities.Kind() == jsonrpc.Object && !extensions.Exists():
		p.Set(capabilities, "extensions", []byte(`{"`+extensionTasks+`":{}}`))
	}
}
