package dispatch

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"waybill.dev/schemas"
	"waybill.dev/schemas/jsonrpc"
)

// Definitions is what is pinned of what servers show (workers/registry). Whatever
// a server lists goes through Listed before anybody is told, and a call that names
// what is pinned goes on only while Admit has nothing to say: policy has asked the
// same, and the server may have shown something else since.
type Definitions struct {
	// Pins tells whether a server's definitions are pinned.
	Pins func(server string) bool

	// Listed tells of each element of a list, in the result of a method, whether it
	// may be shown. nil: all of them.
	Listed func(ctx context.Context, server, method string, result jsonrpc.Value) ([]bool, error)

	// Said tells whether a server's instructions may be passed on, which the result
	// of initialize or server/discover has.
	Said func(ctx context.Context, server string, result jsonrpc.Value) (bool, error)

	// Presents tells whether a server may say of itself what it is: its name, title
	// and the like, which come with every answer.
	Presents func(server string) bool

	// Heard tells whether anything of a server is approved. Of one of which nothing is,
	// agents hear neither what it asks of them, nor its log, nor its progress.
	Heard func(server string) bool

	// Admit says why what a request names must not be called now; "": nothing speaks
	// against it. sha256 is the definition by which the call was decided on; if that
	// was not known, the arguments are looked at too. unlisted: nothing is known of
	// it. It asks nobody.
	Admit func(q *schemas.Requested, sha256 string, body []byte) (why string, unlisted bool)

	// Answered says what is wrong with the answer of a tool; "": nothing.
	Answered func(server, name string, answer []byte) string
}

// listing says by which method a thing is listed that a method names.
var listingOf = map[string]string{"tools/call": "tools/list", "prompts/get": "prompts/list"}

// pinned tells whether the call's server is one whose definitions are pinned.
func (r *run) pinned() bool {
	d := r.d.opt.Definitions
	return d != nil && r.up != nil && d.Pins(r.a.Server)
}

// mute tells whether agents may hear nothing that a server says by itself.
func (o *Options) mute(server string) bool {
	d := o.Definitions
	return d != nil && d.Pins(server) && !d.Heard(server)
}

// withheld says why the call must not be made now. A call that ends so is answered
// as if there were nothing of the name.
func (r *run) withheld(body []byte) *schemas.Failed {
	if !r.pinned() {
		return nil
	}
	why, unlisted := r.d.opt.Definitions.Admit(&r.a.Requested, r.a.ToolSHA256, body)
	if why == "" && unlisted {
		why = "the server lists nothing of this name"
	}
	if why == "" {
		return nil
	}
	return &schemas.Failed{Code: schemas.FailInvalid, Detail: clip(why, maxWords), Unlisted: true}
}

// learn lists what the call's server has, if nothing is known of what the call
// names, or the server has said that it has changed: who calls a tool by its name
// need not have asked for the list. The list is that of the call's own session, and
// goes through Listed as any other.
func (r *run) learn(ctx context.Context, body []byte) *Fault {
	method := listingOf[r.a.Method]
	if method == "" || !r.pinned() {
		return nil
	}
	l, key := r.d.opt.learning, r.a.Server+" "+method
	unlisted := func() bool {
		_, is := r.d.opt.Definitions.Admit(&r.a.Requested, r.a.ToolSHA256, body)
		return is
	}
	if !unlisted() && !l.stale(key) {
		return nil
	}
	leave, err := l.enter(ctx, key)
	if err != nil {
		return faultf(Broken, "it waited for the server's list: %w", err)
	}
	began, whole := r.d.opt.Now(), false
	defer func() { leave(whole, began) }()
	missing := unlisted()
	if !missing && !l.stale(key) || l.recent(key, began, missing) {
		return nil
	}
	cursor := ""
	for range maxPages {
		next, fault := r.learnPage(ctx, method, cursor, body)
		if fault != nil && missing {
			return fault
		}
		if fault != nil {
			r.d.opt.Log.Warn("a server has said that its list has changed, and does not give it", "server", r.a.Server, "call", r.e.Call, "error", fault)
			return nil
		}
		if next == "" || next == cursor || len(next) > maxCursor {
			break
		}
		cursor = next
	}
	whole = true
	return nil
}

// learnPage asks for one page of a list.
func (r *run) learnPage(ctx context.Context, method, cursor string, body []byte) (next string, fault *Fault) {
	call, err := jsonrpc.Decode(body, jsonrpc.Limits{Bytes: len(body)})
	if err != nil {
		return "", faultf(Invalid, "the request: %w", err)
	}
	var params []byte
	if cursor != "" {
		params = slices.Concat([]byte(`"cursor":`), jsonrpc.Quote(cursor))
	}
	request, err := (&question{m: call}).request(method, params)
	if err != nil {
		return "", faultf(Invalid, "the request for a list: %w", err)
	}
	q := schemas.Requested{
		Target:   schemas.Target{Protocol: r.a.Protocol, Server: r.a.Server, Method: method},
		Revision: r.a.Revision, Deadline: r.a.Deadline,
	}
	answer, err := r.up.call(ctx, Call{
		ID: r.e.Call, Event: r.e, Requested: &q, Trace: r.onward(), Body: request, Era: r.era,
		Listed: r.listed(ctx, method), Connected: func() {}, Heard: func() {},
	}, func([]byte) error { return nil })
	if answer.Release != nil {
		defer answer.Release(func() {})
	}
	if errors.As(err, &fault) {
		return "", fault
	} else if err != nil {
		return "", faultf(Broken, "its list: %w", err)
	}
	m, err := jsonrpc.Decode(answer.Body, jsonrpc.Limits{Bytes: len(answer.Body), Depth: answerDepth, AllowCaseVariants: true})
	if err != nil {
		return "", faultf(Garbled, "its list: %w", err)
	}
	next, _ = m.Result().Get("nextCursor").Text()
	return next, nil
}

// listed is [Call].Listed.
func (r *run) listed(ctx context.Context, method string) func(jsonrpc.Value) ([]bool, error) {
	if _, ok := lists[method]; !ok || !r.pinned() {
		return nil
	}
	return func(result jsonrpc.Value) ([]bool, error) {
		result, err := r.asTold(result)
		if err != nil {
			return nil, err
		}
		return r.d.opt.Definitions.Listed(ctx, r.a.Server, method, result)
	}
}

// asTold is a result as agents will be told it, looked through: what is pinned is
// stored too, and must not hold what the log does not.
func (r *run) asTold(result jsonrpc.Value) (jsonrpc.Value, error) {
	clean, _, err := r.d.answers.screen(r.a.Server, nil, result.Raw())
	if err != nil {
		return jsonrpc.Value{}, err
	}
	return jsonrpc.Parse(clean, jsonrpc.Limits{Bytes: len(clean), Depth: answerDepth, AllowCaseVariants: true})
}

// introduced takes out of an answer that says what a server is or has what the
// server must not say of itself: its instructions, and, as long as nobody has
// approved anything of the kind, all else that is text of its own.
func (r *run) introduced(ctx context.Context, a Answer) (Answer, error) {
	method := r.a.Method
	_, list := lists[method]
	says := method == "initialize" || method == "server/discover"
	if !r.pinned() || a.Body == nil || !list && !says {
		return a, nil
	}
	presents := func() bool { return r.d.opt.Definitions.Presents(r.a.Server) }
	if list && presents() {
		return a, nil
	}
	m, err := jsonrpc.Decode(a.Body, jsonrpc.Limits{Bytes: len(a.Body), Depth: answerDepth, AllowCaseVariants: true})
	if err != nil {
		return a, faultf(Garbled, "what the server says of itself: %w", err)
	}
	p, may := m.Patch(), true
	if says && m.Result().Exists() { // an error says nothing of the kind
		told, err := r.asTold(m.Result())
		if err != nil {
			return a, &Fault{Kind: Withheld, Err: err}
		}
		if may, err = r.d.opt.Definitions.Said(ctx, r.a.Server, told); err != nil {
			return a, faultf(Gateway, "%w", err) // of the log: it may be asked again
		}
		if !may {
			p.Remove(m.Result(), "instructions")
		}
	}
	switch {
	case !presents():
		r.unpresented(p, m)
	case may:
		return a, nil
	}
	if a.Body = p.Bytes(); a.Body == nil {
		return a, faultf(Garbled, "what the server says of itself: %w", p.Err())
	}
	return a, nil
}

// unpresented makes an answer of one of a server that has but the name that the
// operator's config gives it.
func (r *run) unpresented(p *jsonrpc.Patch, m *jsonrpc.Message) {
	info := slices.Concat([]byte(`{"name":`), jsonrpc.Quote(r.a.Server), []byte(`,"version":"unknown"}`))
	if failed := m.Error(); failed.Exists() {
		p.Set(failed, "message", []byte(`"The server answers with an error."`)).Remove(failed, "data")
		return
	}
	result := m.Result()
	if v := result.Get("serverInfo"); v.Exists() {
		p.Replace(v, info)
	}
	if v := result.Get("_meta"); v.Get(metaServerInfo).Exists() {
		p.Replace(v, slices.Concat([]byte(`{"`+metaServerInfo+`":`), info, []byte("}")))
	} else {
		p.Remove(result, "_meta")
	}
}

// conforms is the ending with which a call ends that would end as end: an answer
// that does not fit the tool's output schema is not passed on.
func (r *run) conforms(end ending) ending {
	done, ok := end.data.(*schemas.Completed)
	if !ok || done.ErrorCode != 0 || done.Result != "" || r.a.Method != "tools/call" || !r.pinned() {
		return end
	}
	wrong := r.d.opt.Definitions.Answered(r.a.Server, r.a.Name, end.body)
	if wrong == "" {
		return end
	}
	bad := failed(schemas.FailBadAnswer, fmt.Sprintf("the result does not fit the tool's output schema: %s", wrong))
	bad.release = end.release
	return bad
}

// learning is who lists what of a server, one at a time for each list, and when it
// was last done: a name that is not there is not looked for again at once, however
// often it is called. Keys are server and method.
type learning struct {
	mu      sync.Mutex
	held    map[string]chan struct{}
	last    map[string]time.Time
	changed map[string]int // how often the server has said so since it was listed
}

// How soon a list is asked for again: for a name that was not there, and because
// the server has said that it has changed.
const (
	learnAgain = 5 * time.Second
	staleAgain = time.Second
)

func newLearning() *learning {
	return &learning{held: map[string]chan struct{}{}, last: map[string]time.Time{}, changed: map[string]int{}}
}

// enter waits for its turn; leave says whether the whole list was read, and when
// that was begun.
func (l *learning) enter(ctx context.Context, key string) (leave func(whole bool, began time.Time), err error) {
	l.mu.Lock()
	turn := l.held[key]
	if turn == nil { // as many as there are servers and kinds of lists
		turn = make(chan struct{}, 1)
		l.held[key] = turn
	}
	l.mu.Unlock()
	select {
	case turn <- struct{}{}:
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
	l.mu.Lock()
	said := l.changed[key]
	l.mu.Unlock()
	return func(whole bool, began time.Time) {
		if whole {
			l.mu.Lock()
			l.last[key] = began
			l.changed[key] -= said // what it has said since counts
			l.mu.Unlock()
		}
		<-turn
	}, nil
}

// says hears what a server says by itself.
func (l *learning) says(server, method string) {
	var list string
	switch method {
	case "notifications/tools/list_changed":
		list = "tools/list"
	case "notifications/prompts/list_changed":
		list = "prompts/list"
	default:
		return
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.changed[server+" "+list]++
}

// stale tells whether the server has said that the list has changed.
func (l *learning) stale(key string) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.changed[key] > 0
}

// recent tells whether the list was read a moment ago.
func (l *learning) recent(key string, now time.Time, missing bool) bool {
	again := staleAgain
	if missing {
		again = learnAgain
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	return !l.last[key].IsZero() && now.Sub(l.last[key]) < again
}
