package dispatch

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"waybill.dev/schemas"
	"waybill.dev/schemas/jsonrpc"
)

// The upstream of a front ([schemas.Front]) is the gateway itself: what
// concerns the endpoint as a whole is answered here, by asking its servers.
// Each of them is asked by a call of its own (Options.Ask), with a history of
// its own in the log under the call that caused it: policy decides on each for
// the agent that called, and each has its limits, its claim and its ending as
// any other call has. A server whose call is denied is not there for this
// caller, and nothing is said of it.
//
// # Why this cannot come to a standstill
//
// A call at a front keeps a place among the work of dispatch (4096, see
// cmd/waybill) while it waits for its children, which need such places too. So
// the places that fronts take are counted, and are fewer: frontCalls and as
// many that wait, and frontStreams, twice (for the gateway's front, and for all
// views together); childCalls and childStreams for what they ask. That is 3584
// at most in one process, whatever is asked of it; the rest stays with calls
// that wait for nobody.
//
// The order of waiting has no circle: a view may wait for the gateway's front
// (for its own tools), both wait for servers, and what asks a server waits for
// that alone. Policy waits for nobody. Everything has a deadline, but for
// streams, which take their places at once or not at all.
const (
	frontCalls   = 256
	frontStreams = 256
	childCalls   = 512
	childStreams = 1536
)

const (
	listTime   = 10 * time.Second // what a list, and all else that asks every server, may take
	listAtOnce = 64               // servers that one of these asks at once
)

// frontReads are the methods of a front without an effect.
var frontReads = map[string]string{
	"initialize":                       "says what the front is; a session is the edge's",
	"server/discover":                  "says what the front is",
	"ping":                             "nothing",
	"tools/list":                       "a list of lists",
	"prompts/list":                     "a list of lists",
	"resources/list":                   "a list of lists",
	"resources/templates/list":         "a list of lists",
	"logging/setLevel":                 "to set it again changes nothing",
	"subscriptions/listen":             "only listens",
	"notifications/initialized":        "to say it again does no harm",
	"notifications/roots/list_changed": "to say it again does no harm",
}

// places bounds what the fronts of a process do and ask together.
type places struct {
	fronts, frontStreams int // calls and streams at a front (or at all views) at once
	calls, streams       chan struct{}
}

func newPlaces() *places {
	return &places{frontCalls, frontStreams, make(chan struct{}, childCalls), make(chan struct{}, childStreams)}
}

// openFronts makes the upstreams of the fronts, as far as they share places.
func (d *Dispatcher) openFronts() error {
	if len(d.opt.Fronts) > 0 && d.opt.Ask == nil {
		return errors.New("dispatch: fronts need Ask")
	}
	if d.opt.places == nil {
		d.opt.places = newPlaces()
	}
	limits := func() (calls, streams *limit) {
		p := d.opt.places
		return &limit{slots: make(chan struct{}, p.fronts), queue: int64(p.fronts)}, &limit{slots: make(chan struct{}, p.frontStreams)}
	}
	calls, streams := limits()
	for _, f := range d.opt.Fronts {
		if d.upstreams[f.Name] != nil {
			return fmt.Errorf("dispatch: front %q has the name of another or of a server", f.Name)
		}
		u, err := newUpstream(Server{Name: f.Name, Protocol: "front", Idempotent: []string{findTools}}, d.opt)
		if err != nil {
			return fmt.Errorf("dispatch: front %q: %w", f.Name, err)
		}
		if f.Name == schemas.Gateway {
			u.calls, u.streams = limits()
		} else {
			u.calls, u.streams = calls, streams
		}
		d.upstreams[f.Name] = u
		d.order = append(d.order, u)
	}
	return nil
}

// front answers for one front. It is safe for concurrent use and never changes.
type front struct {
	*schemas.Front
	opt      Options
	servers  []string // that are asked, in the order of lists: all but the gateway itself
	deadline map[string]time.Duration
	own      []ownTool // the gateway's own tools; none but at its own front
}

// openFront is the kind front.
func openFront(s Server, opt Options) (Connection, error) {
	at := slices.IndexFunc(opt.Fronts, func(f *schemas.Front) bool { return f.Name == s.Name })
	if at < 0 {
		return Connection{}, errors.New("no such front")
	}
	f := &front{Front: opt.Fronts[at], opt: opt, deadline: map[string]time.Duration{}}
	known := map[string]bool{}
	for _, s := range opt.Servers {
		f.deadline[s.Name] = s.Deadline
		known[s.Name] = true
	}
	for _, name := range f.Servers {
		switch {
		case name == schemas.Gateway:
			continue
		case !known[name]:
			return Connection{}, fmt.Errorf("it shows %q, which is no server", name)
		}
		f.servers = append(f.servers, name)
	}
	if f.Name == schemas.Gateway {
		var err error
		if f.own, err = ownTools(opt.Fanout.Tools); err != nil {
			return Connection{}, err
		}
	}
	return Connection{Call: f.call, Close: func() {}}, nil
}

// call answers one call. What it returns as an error is the end of ctx or a
// request that is not what was authorized: what becomes of the children is part
// of the answer.
func (f *front) call(ctx context.Context, c Call, progress func([]byte) error) (Answer, error) {
	m, err := jsonrpc.Decode(c.Body, jsonrpc.Limits{Bytes: len(c.Body)})
	switch {
	case err != nil:
		return Answer{}, faultf(Invalid, "the request: %w", err)
	case m.Method() != c.Requested.Method:
		return Answer{}, faultf(Invalid, "the request's method is %q, authorized was %q", m.Method(), c.Requested.Method)
	case m.IsRequest() == c.Requested.OneWay:
		return Answer{}, faultf(Invalid, "the request has an id and wants no answer, or has none and wants one")
	case m.Params().Kind() == jsonrpc.Array:
		return f.error(c, jsonrpc.CodeInvalidParams, "params must be an object"), nil
	}
	q := &question{front: f, c: c, m: m, progress: progress, began: f.opt.Now()}
	q.modern = c.Requested.Revision == "" || c.Requested.Revision >= mcpRevision

	var answer Answer
	switch method := c.Requested.Method; {
	case c.Requested.OneWay:
		if !q.modern && (method == "notifications/initialized" || method == "notifications/roots/list_changed") {
			q.everybody(ctx, q.until(listTime))
		}
	case method == "initialize" && !q.modern:
		answer = f.result(c, q.initialize())
	case method == "server/discover" && q.modern:
		answer = f.result(c, q.discover())
	case method == "ping":
		answer = f.result(c, nil)
	case lists[method].array != "":
		answer = q.list(ctx)
	case method == "logging/setLevel":
		answer = q.setLevel(ctx)
	case method == "subscriptions/listen" && c.Requested.Stream:
		answer, err = q.listen(ctx)
	case method == "tools/call" && f.Name == schemas.Gateway:
		answer, err = q.ownCall(ctx)
	default:
		answer = q.unknown()
	}
	if err == nil && ctx.Err() != nil {
		// What was not asked any more must not look as if it were not there.
		err = context.Cause(ctx)
	}
	if err != nil {
		return Answer{}, err
	}
	if int64(len(answer.Body)) > f.opt.MaxAnswer {
		return Answer{}, faultf(TooLarge, "the answer has %d bytes", len(answer.Body))
	}
	return answer, nil
}

// result is an answer; nil is the empty result.
func (f *front) result(c Call, result []byte) Answer {
	return Answer{Body: jsonrpc.ResultResponse(jsonrpc.Quote(string(c.ID)), result)}
}

// error is an answer that says no.
func (f *front) error(c Call, code int, message string) Answer {
	a := Answer{ErrorCode: code, Body: jsonrpc.ErrorResponse(jsonrpc.Quote(string(c.ID)), code, message, nil)}
	switch code {
	case jsonrpc.CodeInvalidParams:
		a.Status = http.StatusBadRequest
	case jsonrpc.CodeMethodNotFound:
		a.Status = http.StatusNotFound
	}
	return a
}

// unknown answers what is not here, like an edge answers what a caller may not
// have: a name that none of the servers has comes to the front itself.
func (q *question) unknown() Answer {
	r := q.c.Requested
	name := cmp.Or(r.Alias, r.Name)
	switch r.Method {
	case "tools/call":
		return q.error(q.c, jsonrpc.CodeInvalidParams, "unknown tool "+strconv.Quote(name))
	case "prompts/get":
		return q.error(q.c, jsonrpc.CodeInvalidParams, "unknown prompt "+strconv.Quote(name))
	case "resources/read":
		a := q.error(q.c, jsonrpc.CodeInvalidParams, "")
		data := slices.Concat([]byte(`{"uri":`), jsonrpc.Quote(name), []byte(`}`))
		a.Body = jsonrpc.ErrorResponse(jsonrpc.Quote(string(q.c.ID)), jsonrpc.CodeInvalidParams, "Resource not found", data)
		return a
	}
	return q.error(q.c, jsonrpc.CodeMethodNotFound, "Method not found")
}

// question is one call at a front, being answered. Its fields do not change;
// progress is called on the goroutine of front.call only.
type question struct {
	*front
	c        Call
	m        *jsonrpc.Message
	modern   bool // a revision without sessions
	progress func([]byte) error
	began    time.Time
}

// until is when what takes this long at most has to be over, a little before
// the call's own deadline so that there is still time to answer.
func (q *question) until(most time.Duration) time.Time {
	end := q.began.Add(most)
	if d := q.c.Requested.Deadline; !d.IsZero() {
		if d = d.Add(-min(d.Sub(q.began)/10, time.Second)); d.Before(end) {
			return d
		}
	}
	return end
}

// child is a call that a front makes for another.
type child struct {
	server, method, name string
	body                 []byte
	headers              map[string]string // that belong to it: Mcp-Param-*
	until                time.Time         // its deadline at the latest; zero for a stream
	oneWay, stream       bool
	detached             bool // nobody waits for its end

	// heard is given what the server says before its answer. An error ends the
	// call. May be nil.
	heard func(msg []byte) error
}

// ended is what became of a child.
type ended struct {
	call   schemas.CallID
	denied bool          // to this caller there is no such thing
	wrong  *trouble      // nobody answered
	answer jsonrpc.Value // the whole answer, when neither
	result jsonrpc.Value // of it; not there in an error
	code   int           // of an error that the server answered
	end    *schemas.Completed
}

// trouble is what a caller is told of a server that could not be asked.
type trouble struct{ code, message string }

// troubles says it by the failure. The detail of a failure is for operators.
var troubles = map[schemas.Failure]string{
	schemas.FailExpired:     "It was not asked in time.",
	schemas.FailUnavailable: "It cannot be reached at the moment.",
	schemas.FailOverloaded:  "It has too many calls at the moment.",
	schemas.FailInvalid:     "It cannot be asked this.",
	schemas.FailUndecodable: "The gateway cannot read its own record of the call, which was not carried out.",
	schemas.FailTimeout:     "It did not answer in time.",
	schemas.FailUnknown:     "The outcome is unknown: it may have been carried out.",
	schemas.FailBadAnswer:   "Its answer does not follow the protocol.",
	schemas.FailTooLarge:    "Its answer is too large.",
	schemas.FailInternal:    "The gateway failed at this call; whether it was carried out is not certain.",
}

func failure(code schemas.Failure) *trouble { return &trouble{string(code), troubles[code]} }

var (
	otherRevision = trouble{"revision", "It speaks another revision of the protocol."}
	wantsInput    = trouble{"input_required", "It asks for input, which can be given only when it is called by itself. This call of it goes on no further."}
)

// errAsks ends a child whose server asks something of the agent: it could not
// be told for which of several calls at once it should answer.
var errAsks = errors.New("the server asks something of the agent, within a call that the gateway made")

// grace is how long after its deadline a child's ending may come.
const grace = 500 * time.Millisecond

// ask makes a child call and follows it to its end, which comes soon after
// until, or when ctx ends.
func (q *question) ask(ctx context.Context, ch child) ended {
	if ctx.Err() != nil {
		return ended{wrong: failure(schemas.FailExpired)}
	}
	now := q.opt.Now()
	deadline := ch.until
	if d := q.deadline[ch.server]; d > 0 && !ch.stream && now.Add(d).Before(deadline) {
		deadline = now.Add(d)
	}
	if !ch.stream {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeoutCause(ctx, deadline.Sub(now)+grace, errDeadline)
		defer cancel()
		select {
		case q.opt.places.calls <- struct{}{}:
			defer func() { <-q.opt.places.calls }()
		case <-ctx.Done():
			return ended{wrong: failure(schemas.FailExpired)}
		}
	}

	leave := context.CancelCauseFunc(func(error) {})
	if ch.detached {
		ctx, leave = context.WithCancelCause(ctx)
		defer leave(nil)
	}
	e := q.c.Event.Next(&schemas.Requested{
		Target:   schemas.Target{Protocol: q.c.Requested.Protocol, Server: ch.server, Method: ch.method, Name: ch.name},
		Revision: q.c.Requested.Revision, Headers: ch.headers, Deadline: deadline, OneWay: ch.oneWay, Stream: ch.stream,
	}, ch.body)
	e.Time, e.Call, e.Parent, e.Root = now.UTC(), schemas.NewCallID(now), q.c.ID, cmp.Or(q.c.Event.Root, q.c.ID)
	e.Trace, e.TraceState = q.c.Event.Onward(q.opt.Flags)
	out := ended{call: e.Call}
	var end schemas.Event
	var asked string
	next := 0
	err := q.opt.Ask(ctx, e, func(_ context.Context, got schemas.Event) (schemas.Receipt, error) {
		switch d := got.Data.(type) {
		case *schemas.Requested:
			if ch.detached {
				leave(schemas.ErrDetached)
			}
		case *schemas.Progressed:
			if d.Index < next || ch.heard == nil {
				return schemas.Receipt{}, nil // seen: a worker that died was replaced
			}
			next = d.Index + 1
			return schemas.Receipt{}, ch.heard(got.Body)
		case *schemas.Asked:
			asked = d.Method
			return schemas.Receipt{}, errAsks
		}
		if got.Data.Kind().Ends() {
			end = got
		}
		return schemas.Receipt{}, nil
	})
	switch d := end.Data.(type) {
	case *schemas.Denied:
		if out.denied = d.Arguments == ""; !out.denied {
			out.wrong = &trouble{"arguments", "The arguments do not fit the tool's input schema: " + d.Arguments + ". The call was not carried out."}
		}
	case *schemas.Failed:
		if d.Unlisted {
			out.denied = true
			break
		}
		out.wrong = failure(d.Code)
		if out.wrong.message == "" {
			out.wrong = failure(schemas.FailInternal)
		}
	case *schemas.Cancelled:
		out.wrong = &trouble{"cancelled", "The call was cancelled."}
	case *schemas.Completed:
		q.answered(&out, d, end.Body, ch)
	default:
		switch {
		case errors.Is(err, errAsks):
			out.wrong = &trouble{wantsInput.code, "It asks for " + clip(asked, 100) +
				", which can be answered only when it is called by itself. The call was begun and has been taken back; it may have had an effect by then."}
		case errors.Is(err, schemas.ErrOverloaded):
			out.wrong = failure(schemas.FailOverloaded)
		case errors.Is(err, schemas.ErrTooLarge), errors.Is(err, schemas.ErrInvalid):
			out.wrong = failure(schemas.FailInvalid)
		default:
			// No ending by the deadline, or the log is gone: the call may
			// have been carried out.
			out.wrong = failure(schemas.FailUnknown)
			if _, reads := mcpReads[ch.method]; reads {
				out.wrong = failure(schemas.FailTimeout)
			}
		}
		if ctx.Err() == nil {
			q.opt.Log.Warn("a call that a front made has no ending", "session", e.Session, "call", e.Call, "parent", e.Parent, "server", ch.server, "error", err)
		}
	}
	return out
}

// answered reads what a server said.
func (q *question) answered(out *ended, d *schemas.Completed, body []byte, ch child) {
	out.end = d
	if ch.oneWay {
		return
	}
	m, err := jsonrpc.Decode(body, jsonrpc.Limits{Bytes: len(body), Depth: answerDepth, AllowCaseVariants: true})
	if err != nil || !m.IsResponse() {
		out.wrong = failure(schemas.FailBadAnswer)
		return
	}
	out.answer, out.result = m.Root(), m.Result()
	if m.Error().Exists() {
		out.code = d.ErrorCode
	}
	// The form of the request is the gateway's own. A server that says "bad
	// request" to it is one that wants a session, or that wants none.
	bad := d.Status == http.StatusBadRequest && out.code <= -32000 && out.code > -32020 || d.Status == http.StatusBadRequest && out.code == jsonrpc.CodeInvalidRequest
	if out.code == jsonrpc.CodeUnsupportedProtocolVersion || bad {
		out.wrong = &otherRevision
	}
}

// text is the message of an error that a server answered, short.
func (o *ended) text() string {
	s, _ := o.answer.Get("error", "message").Text()
	return clip(s, maxWords)
}

// same is the request as it came, without the caller's progress token: what
// the servers say of their progress is not that of the whole. edit may change more.
func (q *question) same(edit func(p *jsonrpc.Patch, params jsonrpc.Value)) ([]byte, error) {
	p := q.m.Patch()
	params := q.m.Params()
	if token := params.Get("_meta", "progressToken"); token.Exists() {
		p.Remove(params.Get("_meta"), "progressToken")
	}
	if edit != nil {
		edit(p, params)
	}
	return p.Bytes(), p.Err()
}

// each does something for every one of the servers, at most so many at once,
// and waits for all of it.
func each(n, atOnce int, do func(i int)) {
	var wg sync.WaitGroup
	turn := make(chan struct{}, atOnce)
	for i := range n {
		turn <- struct{}{}
		wg.Go(func() {
			defer func() { <-turn }()
			do(i)
		})
	}
	wg.Wait()
}

// everybody says to every server what was said to the front.
//
// What wants no answer is left to itself once it is stored, so that a server
// that hangs holds up nobody. It goes to every server, not only to those to which
// the session is connected: with notifications/initialized it is connected
// to all, since a client expects to hear from then on what a server has to say.
func (q *question) everybody(ctx context.Context, until time.Time) []ended {
	out := make([]ended, len(q.servers))
	body, err := q.same(nil)
	each(len(q.servers), listAtOnce, func(i int) {
		if err != nil {
			out[i].wrong = failure(schemas.FailInvalid)
			return
		}
		out[i] = q.ask(ctx, child{
			server: q.servers[i], method: q.c.Requested.Method, body: body, until: until,
			oneWay: q.c.Requested.OneWay, detached: q.c.Requested.OneWay,
		})
	})
	return out
}

// setLevel passes on logging/setLevel. It worked when a server took it: there
// are others that do not log.
func (q *question) setLevel(ctx context.Context) Answer {
	var said *ended
	all := q.everybody(ctx, q.until(listTime))
	for i := range all {
		o := &all[i]
		switch {
		case o.denied || o.wrong != nil:
		case o.result.Exists():
			return q.front.result(q.c, nil)
		case said == nil || said.code == jsonrpc.CodeMethodNotFound:
			said = o
		}
	}
	if said != nil {
		return q.error(q.c, said.code, said.text())
	}
	return q.error(q.c, jsonrpc.CodeInternalError, "None of the servers took the level.")
}

// capabilities are what can be passed on to some server; which of them has what
// is said by the lists.
//
// Tasks are the gateway's own, for whatever tool: those of the client's revision.
func (q *question) capabilities() string {
	var tasks string
	switch {
	case q.modern:
		tasks = `,"extensions":{"` + extensionTasks + `":{}}`
	case q.c.Requested.Revision >= revisionOfTasks:
		tasks = `,"tasks":` + string(coreTasks)
	}
	if q.Exposed != nil {
		return `{"tools":{"listChanged":true}` + tasks + `}`
	}
	return `{"completions":{},"logging":{},"prompts":{"listChanged":true},"resources":{"listChanged":true,"subscribe":true},"tools":{"listChanged":true}` + tasks + `}`
}

// instructions do not name the servers: nobody has been asked yet which of them
// there are for this caller.
func (q *question) instructions() []byte {
	text := "A gateway in front of several servers. Tools and prompts are named server__name, resources waybill://server/uri."
	if q.Exposed != nil {
		text = "A gateway in front of several servers, which shows a selection of their tools."
	}
	if len(q.own) > 0 {
		text += " If they are many, waybill__find_tools searches among the tools that you may use, where it is listed."
	}
	return jsonrpc.Quote(text)
}

func (q *question) serverInfo() string {
	return `{"name":"waybill","version":` + string(jsonrpc.Quote(cmp.Or(q.opt.Version, "(devel)"))) + `}`
}

func (q *question) initialize() []byte {
	return fmt.Appendf(nil, `{"protocolVersion":%s,"capabilities":%s,"serverInfo":%s,"instructions":%s}`,
		jsonrpc.Quote(q.c.Requested.Revision), q.capabilities(), q.serverInfo(), q.instructions())
}

func (q *question) discover() []byte {
	return q.complete(fmt.Appendf(nil, `"supportedVersions":["%s"],"capabilities":%s,"instructions":%s`,
		mcpRevision, q.capabilities(), q.instructions()), "", true)
}

// complete makes a result of its members, and of more for _meta (`"key":value`,
// or nothing). cached says that the method's results say how long they hold.
func (q *question) complete(members []byte, meta string, cached bool) []byte {
	var b strings.Builder
	b.Grow(len(members) + len(meta) + 200)
	b.WriteByte('{')
	b.Write(members)
	if q.modern {
		b.WriteString(`,"resultType":"complete"`)
		if cached {
			b.WriteString(`,"ttlMs":0,"cacheScope":"private"`)
		}
		if meta != "" {
			meta = "," + meta
		}
		meta = `"io.modelcontextprotocol/serverInfo":` + q.serverInfo() + meta
	}
	if meta != "" {
		b.WriteString(`,"_meta":{` + meta + `}`)
	}
	b.WriteByte('}')
	return []byte(b.String())
}
