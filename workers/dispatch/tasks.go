package dispatch

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"sync"
	"time"

	"github.com/cenkalti/backoff/v4"

	"waybill.dev/schemas"
	"waybill.dev/schemas/jsonrpc"
)

// A call may go on after its request was answered: as a task (the extension
// io.modelcontextprotocol/tasks of 2026-07-28), if the client takes one for an
// answer, which is what schemas.Requested.TaskUntil says. It becomes one
//
//   - when the server answers with a task of its own (resultType "task"), which
//     is then followed: asked how it stands (tasks/get), handed the client's
//     answers (tasks/update), told to stop (tasks/cancel). That task's id is the
//     gateway's alone;
//   - at once, before it is carried out, when its client takes nothing else
//     (schemas.Requested.TaskNow: the core tasks of 2025-11-25), unless client and
//     server have that between themselves;
//   - when a tool of Server.Tasks has not answered after Options.TaskPatience: then
//     the request at the server simply goes on for longer.
//
// The event tasked, of index 0, makes it so, and is stored before anybody is
// told. From then on the call's events are addressed to the task. All that a run
// has to know of it is in the log: after a crash the next one follows the
// server's task further, since to ask is a read, or goes on waiting for the
// client; only a request that was under way at the server is lost, as always.
//
// # What is changed on the way
//
// The result or error in which the server's task ends becomes that of the call,
// byte for byte; the members of the task around it are left out. Where the server
// asks (resultType "input_required") within the task, its keys get the number of
// the round in front, "1.name", since the same must not come twice in a task's
// life; and its requestState stays here: the answers go back with it in the same
// request as the first time, but for these two members. A task of the server's own
// has such keys already. Filters of subscriptions/listen lose taskIds, which are
// names of the gateway's.

const (
	// maxTasks is how many calls are tasks at once, so that other calls have
	// room among what dispatch may have in hand.
	maxTasks = 1024

	maxTaskID = 1 << 10 // of a server's

	// How often a server is asked how its task stands: as it says, within these.
	pollLeast = 250 * time.Millisecond
	pollMost  = time.Minute
	poll      = time.Second

	taskTime   = 30 * time.Second // of one request about a server's task
	revokeTime = 3 * time.Second  // likewise, while the call's ending waits
	taskFails  = 5                // answers in a row that cannot be used, before it is given up
	taskGrace  = 30 * time.Second // in which a server's task ends that its client has taken back

	resultTask = "task"
	working    = "working"
)

// errThinking: the server has asked, within a task, and its place is given to
// others while the client thinks.
var errThinking = errors.New("the call waits for the client's answers")

// errFollow: the server has a task of its own, which is to be followed.
var errFollow = errors.New("the call is a task of the server")

// errCrowded: there are too many tasks for another.
var errCrowded = errors.New("the server has answered with a task, and too many calls are tasks already")

// task is what a run knows of the task that its call is or may become.
type task struct {
	mu     sync.Mutex // guards what follows: a timer may make the call a task
	told   bool       // it is one
	away   bool       // another process carries the call out, and says what it is
	due    bool       // it was to become one meanwhile
	closed bool       // it is none, and will not be: the call is about to end
	index  int        // of the next tasked event
	err    error      // the log did not take the first of them

	// answers are the client's, by the key that it knows; the first counts. Their
	// mutex is one of their own: mu is held while the log takes an event, and who
	// brings an answer brings those of all other calls too.
	answersMu sync.Mutex
	answers   map[string][]byte

	news chan struct{} // of one place: an answer has come

	// Belong to the run's goroutine.
	id     string        // of the server's own task
	in     string        // in which of its sessions that is (coretasks.go); "": of a revision without
	core   *coreTask     // likewise; nil: not yet, or none
	waits  string        // the id of the request that waits there for what it asks; "": none
	every  time.Duration // it is asked
	asked  *asks         // what the client is asked in a repeated call; nil: nothing
	round  int           // how often it has been asked
	last   string        // what the last tasked event said
	body   []byte        // of the request, as it is repeated
	parent context.Context
}

// asks is what a server wants to know before it goes on.
type asks struct {
	keys  []string // as the server wrote them
	front string   // what the client's have in front
	state []byte   // requestState, as JSON; nil: none
}

// isTask tells whether the call is a task by now.
func (t *task) isTask() bool {
	if t == nil {
		return false
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.told
}

// next is an event of the call, addressed to its task if it is one.
func (r *run) next(data schemas.Payload, body []byte) schemas.Event {
	e := r.e.Next(data, body)
	if r.task.isTask() {
		e = e.Task()
	}
	return e
}

// mayTask prepares for a call that may become a task; done must be called when
// the run is over.
func (r *run) mayTask(parent context.Context, ctx context.Context) (done func()) {
	if r.a.TaskUntil.IsZero() || r.a.Method != "tools/call" {
		return func() {}
	}
	t := &task{answers: map[string][]byte{}, news: make(chan struct{}, 1), every: poll, parent: parent}
	r.task = t
	leave := r.d.tasks.enter(r.e, t)
	stop := func() bool { return false }
	if r.up != nil && r.up.tasks(r.a.Name) && !r.a.TaskNow {
		stop = time.AfterFunc(r.d.opt.TaskPatience, func() {
			if ctx.Err() == nil {
				_, _ = r.tell(ctx, working, schemas.Screened{}, nil)
			}
		}).Stop
	}
	return func() {
		stop()
		t.close() // waits for the timer's function
		leave()
		if t.told {
			r.d.tasks.dismiss(r.e.Tenant)
		}
	}
}

// atOnce makes the call a task whose client takes nothing else for an answer. The
// ending is that of a call that cannot become one, and is not carried out. Where
// client and server have the task between themselves, it is none of ours.
func (r *run) atOnce(ctx context.Context) (ending, error) {
	if !r.a.TaskNow || r.task.isTask() || r.task == nil || r.up == nil {
		return ending{}, nil
	}
	if !r.ownTask(ctx) {
		if ordered(&r.a.Orders) {
			// The result would be fetched by a call of its own, which has other orders.
			return r.never(ctx, schemas.FailInvalid, "rules order what is to be done with the result, which cannot be done of a task that is the server's own")
		}
		r.task.close()
		r.task = nil
		return ending{}, nil
	}
	if ctx.Err() != nil || !r.a.Deadline.IsZero() && r.d.opt.Now().After(r.a.Deadline) {
		return ending{}, nil // it will not be carried out, and there is no use for a task
	}
	is, err := r.tell(ctx, working, schemas.Screened{}, nil)
	if err == nil && !is {
		return r.never(ctx, schemas.FailOverloaded, "too many calls are tasks already")
	}
	return ending{}, err
}

// ownTask tells whether the task that a client of 2025-11-25 asks for is the
// gateway's: at every front, where nobody else could say whose it is, and at
// servers that have no such tasks, being of the other era. What is no MCP server
// has not said that it has any.
func (r *run) ownTask(ctx context.Context) bool {
	return r.a.Alias != "" || r.up.mcp != nil && r.up.mcp.eraOf(ctx) == EraModern
}

// away leaves it to another process to make the call a task, until back.
func (r *run) away(ctx context.Context) (back func()) {
	t := r.task
	if t == nil {
		return func() {}
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	t.away = true
	return func() {
		t.mu.Lock()
		due := t.due
		t.away, t.due = false, false
		t.mu.Unlock()
		if due && ctx.Err() == nil {
			_, _ = r.tell(ctx, working, schemas.Screened{}, nil) // its error is kept
		}
	}
}

// mayBeTold tells whether another run may have made the call a task, of which this
// one does not know: a run that died, or one that waited for a place. Then the
// ending is for the task.
func (r *run) mayBeTold() bool {
	return r.task != nil && r.up != nil && r.up.tasks(r.a.Name) && !r.task.isTask() && r.d.opt.Now().Sub(r.e.Stored) > r.d.opt.TaskPatience/2
}

// close says that the call becomes no task any more; it tells whether it is one.
func (t *task) close() bool {
	if t == nil {
		return false
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	t.closed = true
	return t.told
}

// tell makes the call a task, if it is none yet and may become one: from then on
// its client has the task, and the call has the time of one.
func (r *run) tell(ctx context.Context, status string, screened schemas.Screened, body []byte) (bool, error) {
	t := r.task
	if t == nil {
		return false, nil
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	switch {
	case t.told:
		return true, nil
	case t.closed, t.err != nil:
		return false, t.err
	case t.away:
		t.due = true
		return false, nil
	case !r.d.tasks.admit(r.e.Tenant, false):
		return false, nil
	}
	ctx, cancel := sure(ctx, r.d.endTime())
	defer cancel()
	word := r.tasked(status, 0)
	word.Screened = screened
	if _, err := r.emit(ctx, r.e.Next(word, body)); err != nil {
		r.d.tasks.dismiss(r.e.Tenant)
		t.err = fmt.Errorf("making the call a task: %w", err)
		return false, t.err
	}
	t.told, t.index = true, 1
	r.extend()
	return true, nil
}

// tasked is the next event of how the task stands. mu is held.
func (r *run) tasked(status string, round int) *schemas.Tasked {
	return &schemas.Tasked{
		Target: r.a.Target, Index: r.task.index, By: r.by, Status: status, Round: round,
		RequestedAt: r.a.RequestedAt, Until: r.a.TaskUntil, Session: r.task.in, Waits: r.task.waits,
	}
}

// stands stores that the task stands otherwise than before.
func (r *run) stands(ctx context.Context, status string, round int, body []byte) error {
	if r.said += len(body); r.task.index >= maxChunks || r.said > maxSaid {
		return &Fault{Kind: TooLarge, Err: fmt.Errorf("more than %d messages or %d MiB of a task", maxChunks, maxSaid>>20)}
	}
	body, screened, err := r.clean(ctx, body)
	if err != nil {
		return err
	}
	ctx, cancel := sure(ctx, r.d.endTime())
	defer cancel()
	t := r.task
	t.mu.Lock()
	defer t.mu.Unlock()
	word := r.tasked(status, round)
	word.Screened = screened
	// Another run may have stored some since this one looked: its word stands.
	_, err = r.emit(ctx, r.e.Next(word, body).Task())
	if refused(err) {
		return faultf(refusedAs(err), "how the task stands: %w", err)
	}
	if err != nil {
		return fmt.Errorf("storing how the task stands: %w", err)
	}
	t.index++
	return nil
}

// tasks knows the tasks that run here, for the answers of their clients.
type tasks struct {
	draining chan struct{} // closed when the process is being stopped
	drain    sync.Once

	mu      sync.Mutex
	runs    map[callKey][]*task
	open    int                    // how many calls are tasks
	tenants map[schemas.Tenant]int // how many of them; each may have half
}

// admit counts a task in, if there is room for it, or if it must be.
func (s *tasks) admit(tenant schemas.Tenant, must bool) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !must && (s.open >= maxTasks || s.tenants[tenant] >= maxTasks/2) {
		return false
	}
	if s.tenants == nil {
		s.tenants = make(map[schemas.Tenant]int)
	}
	s.open++
	s.tenants[tenant]++
	return true
}

func (s *tasks) dismiss(tenant schemas.Tenant) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.open--
	if s.tenants[tenant]--; s.tenants[tenant] == 0 {
		delete(s.tenants, tenant)
	}
}

// Drain gives tasks back that others can go on with, while calls that are under
// way may still end. It may be called more than once.
func (d *Dispatcher) Drain() { d.tasks.drain.Do(func() { close(d.tasks.draining) }) }

func (s *tasks) enter(e schemas.Event, t *task) (leave func()) {
	key := callKey{e.Tenant, e.Call}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.runs == nil {
		s.runs = map[callKey][]*task{}
	}
	s.runs[key] = append(s.runs[key], t)
	return func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.runs[key] = slices.DeleteFunc(s.runs[key], func(other *task) bool { return other == t })
		if len(s.runs[key]) == 0 {
			delete(s.runs, key)
		}
	}
}

// answered hands the client's answers (tasks/update) to the runs of their task,
// if there is one here.
func (s *tasks) answered(e schemas.Event) {
	s.mu.Lock()
	runs := slices.Clone(s.runs[callKey{e.Tenant, e.Call}])
	s.mu.Unlock()
	for _, t := range runs {
		t.take(e.Body)
	}
}

// take keeps the answers of a tasks/update.
func (t *task) take(body []byte) {
	msg, err := jsonrpc.Decode(body, jsonrpc.Limits{Bytes: max(len(body), 1), Depth: answerDepth, AllowCaseVariants: true})
	if err != nil {
		return // the edge has looked
	}
	t.answersMu.Lock()
	for key, v := range msg.Params().Get("inputResponses").Members() {
		if t.answers[key] == nil {
			t.answers[key] = bytes.Clone(v.Raw())
		}
	}
	t.answersMu.Unlock()
	select {
	case t.news <- struct{}{}:
	default:
	}
}

// given are the answers that there are to these keys of the server.
func (t *task) given(front string, keys []string) map[string][]byte {
	t.answersMu.Lock()
	defer t.answersMu.Unlock()
	all := map[string][]byte{}
	for _, k := range keys {
		if a := t.answers[front+k]; a != nil {
			all[k] = a
		}
	}
	return all
}

// stood takes over what other runs have stored of the task, in order.
func (r *run) stood(events []schemas.Event) {
	t := r.task
	if t == nil {
		return
	}
	for _, e := range events {
		switch d := e.Data.(type) {
		case *schemas.Tasked:
			t.mu.Lock()
			if !t.told {
				t.told = true
				r.d.tasks.admit(r.e.Tenant, true) // more than maxTasks, if it must be
			}
			fresh := d.Index >= t.index
			t.index = max(t.index, d.Index+1)
			t.mu.Unlock()
			if !fresh {
				continue
			}
			msg, err := jsonrpc.Decode(e.Body, jsonrpc.Limits{Bytes: max(len(e.Body), 1), Depth: answerDepth, AllowCaseVariants: true})
			if err != nil {
				continue // it has no body
			}
			result := msg.Result()
			if d.Round > 0 {
				t.asked, t.round = asksOf(result, d.Round), d.Round
			} else if id, of := ownTaskOf(result); id != "" {
				t.id, t.in, t.waits, t.every = id, d.Session, d.Waits, pollOf(of)
				t.restore(result)
			}
		case *schemas.Answered:
			t.take(e.Body)
		}
	}
	if t.isTask() {
		r.extend()
	}
}

// asksOf reads what a server asks for, the round-th time in this call.
func asksOf(result jsonrpc.Value, round int) *asks {
	a := &asks{front: strconv.Itoa(round) + "."}
	for k := range result.Get("inputRequests").Members() {
		a.keys = append(a.keys, k)
	}
	if v := result.Get("requestState"); v.Exists() {
		a.state = bytes.Clone(v.Raw())
	}
	return a
}

func pollOf(result jsonrpc.Value) time.Duration {
	ms, ok := result.Get("pollIntervalMs").Int()
	if !ok {
		ms, ok = result.Get("pollInterval").Int() // 2025-11-25
	}
	if !ok || ms <= 0 {
		return poll
	}
	return min(max(time.Duration(min(ms, pollMost.Milliseconds()))*time.Millisecond, pollLeast), pollMost)
}

// becomes decides what an answer makes of a call: nil if it is the call's answer,
// errFollow or errThinking if the call goes on as a task, and a [*Fault] if the
// server answers with a task to who cannot take one.
func (r *run) becomes(ctx context.Context, a Answer) error {
	switch {
	case a.Result == resultTask:
		msg, err := jsonrpc.Decode(a.Body, jsonrpc.Limits{Bytes: len(a.Body), Depth: answerDepth, AllowCaseVariants: true})
		if err != nil {
			return faultf(Garbled, "its task: %w", err)
		}
		id, of := ownTaskOf(msg.Result())
		if id == "" || len(id) > maxTaskID {
			return faultf(Garbled, "it answers with a task without an id, or with a very long one")
		}
		if r.task == nil {
			r.revoke(ctx, id, a.Session)
			return faultf(Garbled, "it answers with a task to a client that does not take one")
		}
		t := r.task
		already := t.isTask()
		t.in = a.Session
		said, screened, err := r.clean(ctx, a.Body)
		if err != nil {
			r.revoke(ctx, id, a.Session)
			return err
		}
		is, err := r.tell(ctx, working, screened, said)
		switch {
		case err != nil:
			r.lastLog = err
			return err
		case !is:
			r.revoke(ctx, id, a.Session)
			return errCrowded
		case already:
			if err := r.stands(ctx, working, 0, a.Body); err != nil {
				if f := new(Fault); errors.As(err, &f) {
					r.revoke(ctx, id, a.Session)
				} else {
					r.lastLog = err
				}
				return err
			}
		}
		t.id, t.every = id, pollOf(of)
		return errFollow
	case a.Result == inputRequired && r.task != nil && r.task.close():
		msg, err := jsonrpc.Decode(a.Body, jsonrpc.Limits{Bytes: len(a.Body), Depth: answerDepth, AllowCaseVariants: true})
		if err != nil {
			return faultf(Garbled, "what it asks: %w", err)
		}
		r.task.round++
		if err := r.stands(ctx, inputRequired, r.task.round, a.Body); err != nil {
			if f := new(Fault); !errors.As(err, &f) {
				r.lastLog = err
			}
			return err
		}
		r.task.asked = asksOf(msg.Result(), r.task.round)
		return errThinking
	}
	return nil
}

// revoke has the server end a task that is there and of which nobody can be told.
// Whether it does is its business; the call's ending does not wait long for it.
func (r *run) revoke(ctx context.Context, id, in string) {
	if in == "" && legacy(r.a.Revision) {
		return // of such a task nothing is known here
	}
	ctx, cancel := sure(ctx, revokeTime)
	defer cancel()
	if in != "" {
		defer r.d.sessions.keepNot(r.e, r.a.Server, in)
	}
	if _, err := r.aboutIn(ctx, "tasks/cancel", id, in, nil, func([]byte) error { return nil }); err != nil {
		r.d.opt.Log.Debug("a task that nobody knows of is left to its server", "server", r.a.Server, "call", r.e.Call, "error", err)
	}
}

// goesOn carries a call on that is a task, until it ends or stands otherwise.
func (r *run) goesOn(ctx context.Context, why error) (ending, error) {
	if errors.Is(why, errFollow) {
		return r.follow(ctx)
	}
	if end, err := r.awaitInput(ctx); err != nil || end.data != nil {
		return end, err
	}
	return r.byOwner(ctx)
}

// awaitInput waits until the client has answered all that the server asks, and
// makes the next request of it.
func (r *run) awaitInput(ctx context.Context) (ending, error) {
	t := r.task
	var rest <-chan time.Time
	if len(t.asked.keys) == 0 {
		// It asks for nothing but to be called again, which is not to be at once.
		rest = time.After(poll)
	}
	for {
		given := t.given(t.asked.front, t.asked.keys)
		if len(given) == len(t.asked.keys) && rest == nil {
			err := r.repeat(ctx, given)
			if errors.Is(err, errBody) {
				return failed(schemas.FailInternal, err.Error()), nil
			}
			return ending{}, err
		}
		select {
		case <-t.news:
		case <-rest:
			rest = nil
		case <-r.d.tasks.draining:
			// Nothing is under way at the server: whoever comes next waits on.
			return ending{}, schemas.ErrGivenBack
		case <-ctx.Done():
			why := context.Cause(ctx)
			if wish, ok := wishOf(ctx); ok {
				return cancelled(wish), nil
			}
			if errors.Is(why, errDeadline) {
				return failed(schemas.FailUnknown, "the client has not answered what the server asks, and the task's time is over"), nil
			}
			return ending{}, fmt.Errorf("stopped: %w", why)
		}
	}
}

// repeat makes the request again, with the client's answers. It is another
// request: its claim is one of its own.
func (r *run) repeat(ctx context.Context, given map[string][]byte) error {
	t := r.task
	body, err := r.body(ctx)
	if err != nil {
		return err
	}
	msg, err := jsonrpc.Decode(body, jsonrpc.Limits{Bytes: len(body), Depth: answerDepth})
	if err != nil {
		return fmt.Errorf("%w: %w", errBody, err)
	}
	p := msg.Patch().Set(msg.Params(), "inputResponses", objectOf(given))
	if t.asked.state != nil {
		p.Set(msg.Params(), "requestState", t.asked.state)
	} else {
		p.Remove(msg.Params(), "requestState")
	}
	if t.body = p.Bytes(); t.body == nil {
		return fmt.Errorf("%w: %w", errBody, p.Err())
	}
	t.asked = nil
	r.claimed, r.attempt0 = false, t.round
	return nil
}

// objectOf is an object of these, in the order of their names.
func objectOf(of map[string][]byte) []byte {
	b := []byte("{")
	for i, k := range slices.Sorted(maps.Keys(of)) {
		if i > 0 {
			b = append(b, ',')
		}
		b = append(append(append(b, jsonrpc.Quote(k)...), ':'), of[k]...)
	}
	return append(b, '}')
}

// about makes a request about the server's task. It is answered within taskTime.
func (r *run) about(ctx context.Context, method, id string, more []byte) (*jsonrpc.Message, error) {
	ctx, cancel := context.WithTimeout(ctx, taskTime)
	defer cancel()
	return r.aboutIn(ctx, method, id, r.task.in, more, func([]byte) error { return nil })
}

// aboutIn is about for a task in one of the server's sessions, or none; progress is
// given what the server says before it answers.
func (r *run) aboutIn(ctx context.Context, method, id, in string, more []byte, progress func([]byte) error) (*jsonrpc.Message, error) {
	as := string(r.e.Call)
	if in != "" {
		// Of what is asked at once in a session each has an id of its own, and what
		// another process has asked may be under way there.
		as += "-" + rand.Text()[:10]
	}
	return r.aboutAs(ctx, as, method, id, in, more, progress)
}

// aboutAs is aboutIn; as is the id of the request.
func (r *run) aboutAs(ctx context.Context, as, method, id, in string, more []byte, progress func([]byte) error) (*jsonrpc.Message, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	request, err := r.body(ctx)
	if err != nil {
		return nil, err
	}
	msg, err := jsonrpc.Decode(request, jsonrpc.Limits{Bytes: len(request), Depth: answerDepth})
	if err != nil {
		return nil, fmt.Errorf("%w: %w", errBody, err)
	}
	// What the client said of itself, as the server has heard it already.
	meta := []byte("{}")
	if v := msg.Params().Get("_meta"); v.Kind() == jsonrpc.Object {
		if own, err := jsonrpc.Parse(v.Raw(), jsonrpc.Limits{Bytes: len(request), Depth: answerDepth}); err == nil {
			meta = own.Patch().Remove(own, "progressToken").Bytes()
		}
	}
	body := []byte(`{"jsonrpc":"2.0","id":1,"method":"` + method + `","params":{"_meta":`)
	body = append(body, meta...)
	if method == subscribe {
		body = append(append(append(body, `,"notifications":{"taskIds":[`...), jsonrpc.Quote(id)...), "]}"...)
	} else {
		body = append(append(body, `,"taskId":`...), jsonrpc.Quote(id)...)
	}
	body = append(append(body, more...), "}}"...)
	answer, err := r.up.call(ctx, Call{
		ID: schemas.CallID(as), Event: r.e.Task(), Trace: r.onward(), Body: body, In: in, Connected: func() {}, Heard: func() {},
		Requested: &schemas.Requested{
			Target:   schemas.Target{Protocol: r.a.Protocol, Server: r.a.Server, Method: method, Name: id},
			Revision: r.a.Revision, TaskUntil: r.a.TaskUntil, Stream: method == subscribe,
		},
	}, progress)
	if err != nil {
		return nil, err
	}
	if answer.Release != nil {
		answer.Release(cancel)
	}
	return jsonrpc.Decode(answer.Body, jsonrpc.Limits{Bytes: max(len(answer.Body), 1), Depth: answerDepth, AllowCaseVariants: true})
}

// follow asks how the server's task stands until it has ended, which ends the
// call. The wish to cancel is passed on, and what comes of it is the server's
// word: it may still complete.
func (r *run) follow(ctx context.Context) (end ending, err error) {
	t := r.task
	defer func() {
		if end.data != nil && t.in != "" { // nobody goes on with it
			r.d.sessions.keepNot(r.e, r.a.Server, t.in)
		}
	}()
	// A cancel must not end this, only the process or the deadline.
	life, stop := context.WithDeadlineCause(t.parent, time.Now().Add(r.deadline().Sub(r.d.opt.Now())), errDeadline)
	defer stop()
	if t.in != "" {
		defer r.hear(life)()
	} else {
		defer r.listen(life)()
	}
	wished, told := ctx.Done(), false
	var since time.Time // that the client has taken it back
	var fails int
	pauses := backoff.NewExponentialBackOff(backoff.WithInitialInterval(pollLeast), backoff.WithMaxInterval(pollMost/2), backoff.WithMaxElapsedTime(0))
	for {
		reason, wish := wishOf(ctx)
		if wish && since.IsZero() {
			since = time.Now()
		}
		if wish && !told { // a restarted process hears it again
			msg, err := r.about(life, "tasks/cancel", t.id, nil)
			told = err == nil && !msg.Error().Exists()
			wished = nil
		}
		end, wait, err := r.standing(life)
		switch f := new(Fault); {
		case err == nil && end.data != nil:
			return end, nil
		case wish && time.Since(since) > taskGrace:
			return cancelled(reason + "; the server goes on with its task"), nil
		case err == nil:
			fails = 0
			pauses.Reset()
		case r.lastLog != nil:
			return ending{}, r.lastLog
		case life.Err() != nil:
		case errors.Is(err, errForgotten):
			return failed(schemas.FailUnknown, err.Error()), nil
		case errors.As(err, &f) && (f.Kind == TooLarge || f.Kind == Invalid):
			return failed(verdicts[f.Kind].code, f.Error()), nil
		default:
			// It may be there again before the task's time is over; one that
			// says nothing that can be used will not.
			if !errors.As(err, &f) || f.Kind == Garbled {
				if fails++; fails >= taskFails {
					return failed(schemas.FailBadAnswer, "asked how its task stands: "+err.Error()), nil
				}
			}
			r.d.opt.Log.Debug("a server does not say how its task stands", "server", r.a.Server, "call", r.e.Call, "error", err)
			wait = max(wait, pauses.NextBackOff())
		}
		timer := time.NewTimer(wait)
		select {
		case <-timer.C:
		case <-t.news:
		case <-wished:
			wished = nil
		case <-r.d.tasks.draining:
			// Another takes over: to ask is a read.
			timer.Stop()
			return ending{}, schemas.ErrGivenBack
		case <-life.Done():
		}
		timer.Stop()
		if life.Err() == nil {
			continue
		}
		if !errors.Is(context.Cause(life), errDeadline) {
			return ending{}, fmt.Errorf("stopped: %w", context.Cause(life))
		}
		ctx, cancel := sure(ctx, r.d.endTime())
		defer cancel()
		_, _ = r.about(ctx, "tasks/cancel", t.id, nil)
		if r.harmless {
			return failed(schemas.FailTimeout, "the server's task did not end by the deadline"), nil
		}
		return failed(schemas.FailUnknown, "the server's task did not end by the deadline"), nil
	}
}

// errForgotten: the server does not know the task that it has begun.
var errForgotten = errors.New("the server does not know its task any more")

// inquire is the server's answer to how its task stands. It returns errForgotten
// where the server does not know the task.
func (r *run) inquire(ctx context.Context) (*jsonrpc.Message, error) {
	msg, err := r.about(ctx, "tasks/get", r.task.id, nil)
	if err != nil || !msg.Error().Exists() {
		return msg, err
	}
	if code, _ := msg.ErrorCode(); code == jsonrpc.CodeInvalidParams {
		return nil, errForgotten
	}
	return nil, errors.New("it answers with an error")
}

// standing asks the server how its task stands and hands it the client's
// answers. Without an ending or an error, it is asked again after wait.
func (r *run) standing(ctx context.Context) (end ending, wait time.Duration, err error) {
	t := r.task
	if t.core != nil {
		return r.coreStanding(ctx)
	}
	wait = t.every
	msg, err := r.inquire(ctx)
	if err != nil {
		return end, wait, err
	}
	result := msg.Result()
	if result.Get("pollIntervalMs").Exists() {
		t.every = pollOf(result)
	}
	id := []byte(`"` + string(r.e.Call) + `"`)
	status, _ := result.Get("status").Text()
	switch status {
	case "completed":
		of := result.Get("result")
		if of.Kind() != jsonrpc.Object {
			return end, wait, faultf(Garbled, "a task that is completed without a result")
		}
		done := &schemas.Completed{Status: 200}
		if kind, _ := of.Get("resultType").Text(); kind != "" && kind != "complete" {
			done.Result = clip(kind, maxResultType)
		}
		return ending{data: done, body: jsonrpc.ResultResponse(id, of.Raw())}, 0, nil
	case "failed":
		of := result.Get("error")
		code, _ := of.Get("code").Int()
		if of.Kind() != jsonrpc.Object {
			return end, wait, faultf(Garbled, "a task that has failed without an error")
		}
		if code == 0 {
			code = jsonrpc.CodeInternalError
		}
		body := append(append([]byte(`{"jsonrpc":"2.0","id":`), id...), `,"error":`...)
		return ending{data: &schemas.Completed{Status: 200, ErrorCode: int(code)}, body: append(append(body, of.Raw()...), '}')}, 0, nil
	case "cancelled":
		return cancelled("the server has cancelled its task"), 0, nil
	case working, inputRequired:
	default:
		return end, wait, faultf(Garbled, "a task that is %q", clip(status, maxResultType))
	}

	var keys []string
	for k := range result.Get("inputRequests").Members() {
		keys = append(keys, k)
	}
	given := t.given("", keys)
	message, _ := result.Get("statusMessage").Text()
	open := slices.DeleteFunc(slices.Clone(keys), func(k string) bool { return given[k] != nil })
	now := working
	if len(open) > 0 {
		now = inputRequired
	}
	slices.Sort(open)
	if this := fmt.Sprintf("%s %q %q", now, message, open); this != t.last {
		if t.last != "" || now != working { // it is known to work from the first
			if err := r.stands(ctx, now, 0, msg.Raw()); err != nil {
				if f := new(Fault); !errors.As(err, &f) {
					r.lastLog = err
				}
				return end, wait, err
			}
		}
		t.last = this
	}
	if len(given) > 0 {
		_, err = r.about(ctx, "tasks/update", t.id, append([]byte(`,"inputResponses":`), objectOf(given)...))
		wait = min(wait, poll) // it goes on now
	}
	return end, wait, err
}
