// Package dispatch carries authorized calls to their upstreams and ends every
// one of them with exactly one event, whoever crashes.
//
// What it guarantees, for a call that is not known to be idempotent: its
// upstream hears of it at most once; a failure that means "never carried out"
// is only said while holding the call's claim, so that it is true; and where
// the outcome cannot be known the call ends as unknown and is never repeated.
//
// Begin with [Dispatcher.Handle]. The order of things is in run.carry; the
// claim and what the log knows of a call are in claim.go, limits and breakers
// in limit.go. A way of calling an upstream is one file (mcp.go) and one line
// in [kinds].
package dispatch

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"iter"
	"log/slog"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"
	"unicode/utf8"

	"github.com/cenkalti/backoff/v4"

	"waybill.dev/schemas"
	"waybill.dev/schemas/jsonrpc"
)

// kinds lists the ways of calling an upstream, by the protocol it speaks.
var kinds = map[schemas.Protocol]kind{
	"mcp":     {open: openMCP, reads: mcpReads, named: "tools/call"},
	"openapi": {open: openOpenAPI, reads: openapiReads, named: "tools/call"},
	"front":   {open: openFront, reads: frontReads, named: "tools/call"}, // the gateway itself, for several servers
}

// kind is what dispatch has to know of a protocol.
type kind struct {
	open  func(Server, Options) (Connection, error)
	reads map[string]string // methods without an effect, and why they have none
	named string            // the method to which Server.Idempotent applies
}

// Server is one upstream.
type Server struct {
	Name     string           // as the operator's config calls it: schemas.Target.Server
	Protocol schemas.Protocol // "" means mcp
	URL      string           // MCP: the streamable HTTP endpoint
	Era      Era              // MCP: of the server; default: found out

	// Command is an MCP server over stdio, instead of a URL: the program, which
	// is looked for in PATH unless it has a slash, and its arguments. It is
	// started when it is first needed.
	Command   []string
	Env       map[string]string // all that the process sees
	Dir       string            // where it runs; default where this process does
	Process   string            // one for each "session" of revisions that have some, the default, or one for the "server"
	Processes int               // at once, half of them for one tenant; beyond, overloaded; default 64
	Secrets   []string          // are not logged, whoever says them

	// Header is sent with every request: the operator's own credentials for
	// this upstream. Headers that the gateway makes itself are refused.
	Header http.Header

	OpenAPI *OpenAPI // with protocol openapi, which needs no URL

	// Idempotent are patterns ([schemas.Match]) of the tools that may be
	// called again when an answer did not come.
	Idempotent []string

	Concurrency int // calls at once; default 64
	Queue       int // calls that wait for one of these to end; beyond, overloaded; default 256, negative: none
	Streams     int // streams at once, apart from calls, since they may live for an hour; default 256

	// Tasks are patterns of the tools whose calls become tasks when they take
	// long, for clients that take a task for an answer.
	Tasks []string

	// Deadline is what a call may take that a front makes to the server; 0: as
	// long as the call for which it is made.
	Deadline time.Duration

	Answers Answers // rules for what it says, where they differ from those for all
}

// Options are what a [Dispatcher] works with. Servers, Load and Past are
// required.
type Options struct {
	Servers []Server

	// Load reads an event of the log by its sequence.
	Load func(ctx context.Context, seq uint64) (schemas.Event, error)

	// Past reads the history of a call.
	Past schemas.Past

	// Latest reads the newest event of a kind in a session. It returns
	// [schemas.ErrNotFound].
	Latest func(context.Context, schemas.Tenant, schemas.SessionKey, schemas.Kind) (schemas.Event, error)

	// Scan reads all events of a kind in a session, the oldest first. nil: only
	// the latest is known, as Latest gives it.
	Scan func(context.Context, schemas.Tenant, schemas.SessionKey, schemas.Kind) iter.Seq2[schemas.Event, error]

	// MaxSessions is how many sessions may be open at upstreams, for revisions
	// of MCP that have some; beyond, overloaded. Default 10,000.
	MaxSessions int

	// Store stores what belongs to no run: what a server says outside of calls.
	Store schemas.Emit

	// Owners says which process holds what only one can, where several run this
	// worker. nil: this is the only one.
	Owners Owners

	// Ask is the rest of the gateway, for calls that are made for another call.
	Ask schemas.Handler

	// Fronts are the endpoints that show several servers as one. They need Ask.
	Fronts  []*schemas.Front
	Fanout  Fanout
	Version string // of the program, as the fronts say it

	places *places // of the fronts together

	// Shows tells, of an authorized list of which policy has to be asked about each
	// name, what it may show. nil, or an error: nothing.
	Shows func(ctx context.Context, authorized schemas.Event) (func(name string) bool, error)

	// Definitions is what is pinned of what servers show. nil: nothing is, and what
	// they show passes as it is.
	Definitions *Definitions

	// Answers are the rules for what servers say, where they differ from
	// [DefaultAnswers]; SecretRules the secrets that are looked for, nil: those built
	// in.
	Answers     Answers
	SecretRules []SecretRule

	// Guard asks the guard of a name about what the server has said to a call, whose
	// authorized event is given, and returns within the time that it has for that.
	// nil: there is none, so that each has failed.
	Guard func(ctx context.Context, name string, authorized schemas.Event, said []byte) schemas.Check

	// Lost tells whether an event was stored before an unclean boot, after
	// which later events of its call may be gone. nil: never.
	Lost func(schemas.Event) bool

	Instance   string        // names this process in claims; only for people
	Duplicates time.Duration // how long the log recognises a repeated ID; default 2 min

	// Flags are those of a trace that no caller named ([schemas.Event.TraceFlags]);
	// Traced says that somebody looks at such traces too.
	Flags  func(traceID string) string
	Traced bool

	MaxAnswer int64         // the largest answer, and message before it; default 4 MiB
	MaxStream time.Duration // the longest life of a stream, which then ends as cancelled; default 1 h. Also the deadline of a call that has none

	Attempts int           // how often a call is tried at most, where it may be; default 3
	Pause    time.Duration // before the second try; doubles, with jitter; default 100 ms

	Breaker Breaker

	// TaskPatience is how long a tool of Server.Tasks may take before its call
	// becomes a task; default 5 s.
	TaskPatience time.Duration

	Now func() time.Time // default time.Now
	Log *slog.Logger     // default: none

	// StateKey seals what the clients of revisions without sessions bring back to
	// calls that asked for input: 32 bytes, the same for all processes that
	// these may come to. Default: one of its own.
	StateKey []byte

	learning *learning // made by New
	sessions *sessions // likewise, for the upstreams that have some
	parking  *parking  // likewise
	answers  *answers  // likewise
}

const (
	// endTime bounds the storing of an event that has to be stored although
	// the call's own time is over, or the process is being stopped.
	endTime = 10 * time.Second

	// longestPause is how long a call waits for its next try, whatever the
	// upstream asks for: it keeps its place meanwhile.
	longestPause = 30 * time.Second

	// maxChunks bounds what an upstream may say before its answer, except on
	// a stream: each message is an event of the log.
	maxChunks = 10_000
	maxSaid   = 64 << 20 // bytes of them

	// maxWords is how many bytes an ending repeats of what others said. The
	// log holds little beside the body, and an ending must fit.
	maxWords = 500
)

// Dispatcher is the worker. Its methods may be called concurrently.
type Dispatcher struct {
	opt       Options
	upstreams map[string]*upstream
	order     []*upstream // as configured, for Stats
	began     time.Time
	name      string // of this process in claims, unique for each Dispatcher
	runs      atomic.Uint64
	calls     calls
	routes    routes
	sessions  *sessions
	answers   *answers
	tasks     tasks
}

// New makes a Dispatcher. The caller runs Close when no Handle runs any more.
func New(opt Options) (*Dispatcher, error) {
	if opt.Load == nil || opt.Past == nil {
		return nil, errors.New("dispatch: Load and Past are required")
	}
	if opt.Lost == nil {
		opt.Lost = func(schemas.Event) bool { return false }
	}
	if opt.Now == nil {
		opt.Now = time.Now
	}
	if opt.Log == nil {
		opt.Log = slog.New(slog.DiscardHandler)
	}
	opt.Duplicates = positive(opt.Duplicates, 2*time.Minute)
	opt.MaxAnswer = positive(opt.MaxAnswer, 4<<20)
	opt.MaxStream = positive(opt.MaxStream, time.Hour)
	opt.Attempts = positive(opt.Attempts, 3)
	opt.TaskPatience = positive(opt.TaskPatience, 5*time.Second)
	opt.Pause = positive(opt.Pause, 100*time.Millisecond)
	opt.Breaker = opt.Breaker.withDefaults()
	opt.learning = newLearning()

	d := &Dispatcher{opt: opt, upstreams: make(map[string]*upstream), began: opt.Now()}
	// The random part tells two processes of one name apart, and a process
	// from what it was before a restart: nobody may take a dead claimant's
	// claim for its own.
	d.name = opt.Instance + "." + rand.Text()[:13] + "."
	d.tasks.draining = make(chan struct{})
	var err error
	if d.answers, err = newAnswers(opt); err != nil {
		return nil, fmt.Errorf("dispatch: %w", err)
	}
	opt.answers, d.opt.answers = d.answers, d.answers
	d.sessions = newSessions(opt, d.name)
	opt.sessions, d.opt.sessions = d.sessions, d.sessions
	parker := d.name
	if opt.Owners != nil {
		parker = opt.Owners.Name() // others find it by that
	}
	if opt.parking, err = newParking(opt, parker); err != nil {
		return nil, fmt.Errorf("dispatch: %w", err)
	}
	for _, s := range opt.Servers {
		if d.upstreams[s.Name] != nil {
			d.Close()
			return nil, fmt.Errorf("dispatch: server %q is listed twice", s.Name)
		}
		u, err := newUpstream(s, opt)
		if err != nil {
			d.Close()
			return nil, fmt.Errorf("dispatch: server %q: %w", s.Name, err)
		}
		d.upstreams[s.Name] = u
		d.order = append(d.order, u)
	}
	if err := d.openFronts(); err != nil {
		d.Close()
		return nil, err
	}
	return d, nil
}

// Close stops listening to sessions, lets go of the pooled connections, and ends
// the servers that are processes of this one. It does not wait for calls.
func (d *Dispatcher) Close() {
	d.sessions.close()
	var wg sync.WaitGroup
	for _, u := range d.order {
		wg.Go(u.close)
	}
	wg.Wait()
}

// Handle is the [schemas.Handler] for authorized. It returns nil when the call
// has its ending in the log, by this run or by another, and an error when the
// event has to be delivered again: the log did not take or give an event, or
// ctx ended before the call had an effect.
func (d *Dispatcher) Handle(ctx context.Context, e schemas.Event, emit schemas.Emit) error {
	return d.handle(ctx, e, emit, false)
}

// handle is Handle; handed says that another process has handed the call over to
// this one, as its owner.
func (d *Dispatcher) handle(ctx context.Context, e schemas.Event, emit schemas.Emit, handed bool) error {
	a, ok := e.Data.(*schemas.Authorized)
	if !ok {
		// Delivering it again would not make it one.
		d.opt.Log.Error("dispatch was given an event that is not its business", "kind", e.Kind(), "call", e.Call, "seq", e.Seq)
		return nil
	}
	r := &run{
		d: d, e: e, a: a, emit: emit, handed: handed,
		by:    d.name + strconv.FormatUint(d.runs.Add(1), 36),
		up:    d.upstreams[a.Server],
		known: e.Stored,
	}
	r.harmless = r.up != nil && r.up.idempotent(&a.Requested)
	r.repeatable = r.harmless && !a.Stream

	parent := ctx
	ctx, stop, leave := d.calls.enter(ctx, e)
	defer leave()
	defer r.mayTask(parent, ctx)()
	if r.task != nil && (e.Stored.Before(d.began) || r.old() || d.opt.Now().Sub(e.Stored) > d.opt.TaskPatience/2) {
		// If another run has made it a task by now, it has another deadline, and
		// its ending is for the task.
		if _, err := r.recall(ctx); errors.Is(err, errEnded) {
			return nil
		} else if err != nil {
			return fmt.Errorf("call %s: %w", e.Call, err)
		}
	}
	defer r.bound(stop)()

	end, err := r.atOnce(ctx)
	if err == nil && end.data == nil {
		end, err = r.carry(ctx)
	}
	for errors.Is(err, errThinking) || errors.Is(err, errFollow) {
		end, err = r.goesOn(ctx, err)
	}
	if end.release != nil {
		// After the ending is stored, so that nobody waits for it.
		defer end.release(func() { stop(nil) })
	}
	if errors.Is(err, errEnded) {
		return nil
	}
	if errors.Is(err, errClaim) {
		end, err = failed(schemas.FailInternal, err.Error()), nil
	}
	if err == nil {
		err = r.finish(ctx, r.conforms(end))
	}
	if err != nil {
		return fmt.Errorf("call %s: %w", e.Call, err)
	}
	return nil
}

// Cancel is the [schemas.Handler] for cancel. Every dispatcher hears every
// cancel: the one that runs the call stops it, which ends it as cancelled. The
// others remember it for a while, in case the call is still on its way to them.
func (d *Dispatcher) Cancel(_ context.Context, e schemas.Event, _ schemas.Emit) error {
	if c, ok := e.Data.(*schemas.Cancel); ok {
		d.calls.cancel(e, clip(c.Reason, maxWords))
	}
	return nil
}

// Heard are the kinds of events that every dispatcher has to hear, for Hear.
func Heard() []schemas.Kind {
	return []schemas.Kind{schemas.KindCancel, schemas.KindAnswered, schemas.KindClosed, schemas.KindRouted}
}

// Hear is the [schemas.Handler] for all that every dispatcher has to hear
// ([Heard]).
func (d *Dispatcher) Hear(ctx context.Context, e schemas.Event, emit schemas.Emit) error {
	switch e.Kind() {
	case schemas.KindCancel:
		return d.Cancel(ctx, e, emit)
	case schemas.KindAnswered:
		d.tasks.answered(e)
		return d.Answered(ctx, e, emit)
	case schemas.KindClosed:
		return d.Closed(ctx, e, emit)
	case schemas.KindRouted:
		return d.Routed(ctx, e, emit)
	}
	return nil
}

// Why a run's context ended; anything else is the process being stopped.
var (
	errDeadline = errors.New("the call's deadline passed")
	errLifetime = errors.New("the stream reached its longest life")
)

// errEnded: the log has an ending of the call, nothing is left to do.
var errEnded = errors.New("the call has ended")

// errClaim: the log refuses the claim for good, so that nobody may ever call
// the upstream.
var errClaim = errors.New("the call cannot be claimed")

// refused tells whether the log has refused an event for good: to try again
// with the same event is to try for ever.
func refused(err error) bool {
	return errors.Is(err, schemas.ErrTooLarge) || errors.Is(err, schemas.ErrInvalid)
}

// refusedAs is the fault of an upstream whose words made the log refuse an event.
func refusedAs(err error) FaultKind {
	if errors.Is(err, schemas.ErrTooLarge) {
		return TooLarge
	}
	return Garbled
}

// run is one run of Handle. It belongs to one goroutine.
type run struct {
	d    *Dispatcher
	e    schemas.Event
	a    *schemas.Authorized
	emit schemas.Emit
	by   string    // unique for each run
	up   *upstream // nil: no such server

	era    Era    // in which it is made; EraAuto: in whichever the server is of by then
	read   []byte // the request, read to find the owner; nil: not read, or too long ago
	routed int    // how often it was handed over

	handed     bool // by another process, to this one as the owner
	harmless   bool // idempotent
	repeatable bool // may be carried out again: harmless, and not a stream

	// known: what others stored of the call before this time has been seen;
	// what they stored later the log still recognises by its ID. See old.
	known   time.Time
	claimed bool
	lastLog error // the log refused a progressed event

	task     *task // that the call is or may become; nil: none
	again    bool  // another run has claimed it, and it may be repeated
	attempt0 int   // how often the request was made again, with the client's answers

	timeMu sync.Mutex  // guards the next two: a timer may make the call a task
	until  time.Time   // the call's time is over
	timer  *time.Timer // until then; nil if it is

	// For the Summary.
	upstreamAt time.Time
	attempts   int
	chunks     int
	digest     chunkDigest

	said int // bytes of the messages before the answer, in this run
}

// ending is how a run wants the call to end.
type ending struct {
	data    schemas.Payload
	body    []byte
	release func(hangUp func()) // see Answer.Release
}

func failed(code schemas.Failure, detail string) ending {
	return ending{data: &schemas.Failed{Code: code, Detail: clip(detail, maxWords)}}
}

func cancelled(reason string) ending {
	return ending{data: &schemas.Cancelled{Reason: clip(reason, maxWords)}}
}

// unlisted is the ending of a call of something that must not be called: it is
// answered as if there were nothing of the name.
func (e ending) unlisted() ending {
	if f, ok := e.data.(*schemas.Failed); ok && f.Code == schemas.FailInvalid {
		f.Unlisted = true
	}
	return e
}

// clip is s as UTF-8 in at most n bytes, with … where it was cut.
func clip(s string, n int) string {
	const mark = "…"
	s = strings.ToValidUTF8(s, "\uFFFD")
	if len(s) <= n {
		return s
	}
	at := n - len(mark)
	for !utf8.RuneStart(s[at]) {
		at--
	}
	return s[:at] + mark
}

// bound gives the run the time that the call has, after which stop is called.
// The log's clock and ours are compared here; a difference shifts deadlines,
// nothing else.
func (r *run) bound(stop context.CancelCauseFunc) (release func()) {
	now := r.d.opt.Now()
	why := errDeadline
	until := r.a.Deadline
	if r.task.isTask() {
		until = r.a.TaskUntil
	}
	r.timeMu.Lock()
	defer r.timeMu.Unlock()
	r.until = until
	if longest := now.Add(r.d.opt.MaxStream); r.until.IsZero() || r.a.Stream && longest.Before(r.until) {
		r.until = longest // also for a call that came without a deadline: nothing is for ever
		if r.a.Stream {
			why = errLifetime
		}
	}
	left := r.until.Sub(now)
	if left <= 0 {
		stop(why)
		return func() {}
	}
	r.timer = time.AfterFunc(left, func() { stop(why) })
	return func() { r.timer.Stop() }
}

// extend gives the call the time that a task has.
func (r *run) extend() {
	r.timeMu.Lock()
	defer r.timeMu.Unlock()
	if r.timer != nil && r.timer.Stop() {
		r.until = r.a.TaskUntil
		r.timer.Reset(r.until.Sub(r.d.opt.Now()))
	}
}

func (r *run) deadline() time.Time {
	r.timeMu.Lock()
	defer r.timeMu.Unlock()
	return r.until
}

// carry does the call and says how it ended. It is one straight line, because
// the order is the guarantee: look whether it has happened, take a place,
// claim, call.
func (r *run) carry(ctx context.Context) (ending, error) {
	now := r.d.opt.Now()
	lost := r.lost()
	until := r.a.Deadline
	if r.task.isTask() {
		until = r.a.TaskUntil
	}
	late := !until.IsZero() && now.After(until)
	wish, withdrawn := wishOf(ctx)

	// What was stored before this process began may have been carried out by
	// the one before it, whose acknowledgements a crash can take with it.
	inherited := r.e.Stored.Before(r.d.began)
	if lost || late || inherited || r.old() || r.task.isTask() {
		past, err := r.recall(ctx)
		if err != nil {
			return ending{}, err
		}
		if past.started && (!r.repeatable || r.task.isTask()) {
			if !r.repeatable || r.task.id != "" {
				return r.claimLost(ctx)
			}
			r.again = true
		}
		if past.wish != nil && !withdrawn {
			wish, withdrawn = past.wish.Reason, true
		}
		if !lost && !withdrawn && !late && r.up != nil && r.task.isTask() && r.task.asked != nil {
			return ending{}, errThinking
		}
	}
	switch {
	case lost:
		return r.claimLost(ctx)
	case withdrawn:
		return cancelled(wish), nil
	case late:
		return r.never(ctx, schemas.FailExpired, "delivered after the deadline")
	case r.up == nil:
		return r.never(ctx, schemas.FailUnavailable, "no server of this name is configured")
	}

	return r.byOwner(ctx)
}

// byOwner makes the call where it can be made: here, or by the process that alone
// can.
func (r *run) byOwner(ctx context.Context) (ending, error) {
	switch err := r.handOver(ctx); {
	case errors.Is(err, errStopped):
		return r.stopped(ctx, nil)
	case err != nil:
		return ending{}, err
	}
	return r.inPlace(ctx)
}

// request is what the server is asked: the request's body or, within a task, what
// has become of it with the client's answers.
func (r *run) request(ctx context.Context) ([]byte, error) {
	if r.task != nil && r.task.body != nil {
		return r.task.body, nil
	}
	return r.body(ctx)
}

// inPlace makes the call when it has a place at the upstream.
func (r *run) inPlace(ctx context.Context) (ending, error) {
	limit := r.up.calls
	if r.a.Stream {
		limit = r.up.streams
	}
	if limit.full() {
		r.read = nil
	}
	switch err := limit.enter(ctx); {
	case errors.Is(err, schemas.ErrOverloaded):
		return r.never(ctx, schemas.FailOverloaded, "too many calls wait for this upstream")
	case err != nil:
		return r.stopped(ctx, nil)
	}
	defer limit.leave()

	// Only now: bodies are held for as many calls as there are places, however
	// many wait for one.
	body, err := r.read, error(nil)
	if r.read = nil; body == nil {
		body, err = r.request(ctx)
	}
	if errors.Is(err, errBody) {
		return failed(schemas.FailInternal, err.Error()), nil
	}
	if err != nil {
		if context.Cause(ctx) != nil {
			return r.stopped(ctx, nil)
		}
		return ending{}, err
	}
	return r.call(ctx, body)
}

// errBody: the request's body is not the one that was authorized.
var errBody = errors.New("the body of the request is not the one that was authorized")

// body finds the request's body.
func (r *run) body(ctx context.Context) ([]byte, error) {
	if r.a.BodySHA256 == "" {
		return r.e.Body, nil
	}
	req, err := r.d.opt.Load(ctx, r.a.RequestedSeq)
	if err != nil {
		return nil, fmt.Errorf("reading the request at %d: %w", r.a.RequestedSeq, err)
	}
	sum := sha256.Sum256(req.Body)
	if req.Call != r.e.Call || hex.EncodeToString(sum[:]) != r.a.BodySHA256 {
		return nil, fmt.Errorf("%w: event %d", errBody, r.a.RequestedSeq)
	}
	return req.Body, nil
}

// call tries until there is an answer or no further try is allowed.
func (r *run) call(ctx context.Context, body []byte) (ending, error) {
	var pauses backoff.BackOff
	var last *Fault
	if fault := r.learn(ctx, body); fault != nil {
		if context.Cause(ctx) != nil {
			return r.stopped(ctx, fault)
		}
		return r.never(ctx, schemas.FailUnavailable, "what the server has is not known: "+fault.Error())
	}
	if held := r.withheld(body); held != nil && r.attempts == 0 && r.attempt0 == 0 {
		end, err := r.never(ctx, held.Code, held.Detail)
		return end.unlisted(), err
	}
	for {
		settle, err := r.up.breaker.Allow()
		if err != nil {
			detail := "the upstream failed repeatedly and is given a rest"
			if last != nil {
				detail += "; before: " + last.Error()
			}
			if r.attempts > 0 {
				return failed(schemas.FailUnavailable, detail), nil // repeatable, or it would not be tried again
			}
			return r.never(ctx, schemas.FailUnavailable, detail)
		}
		// A call that may become a task is claimed even if it may be repeated:
		// so another run learns that it is one.
		if !r.repeatable || r.task != nil && !r.again {
			mine, err := r.claim(ctx)
			if err == nil && !mine && r.repeatable {
				_, err = r.recall(ctx)
				mine, r.again = r.task.id == "", true
				if err == nil && r.task.asked != nil {
					err = errThinking // what is asked has the place of the body in hand
				}
			}
			if err != nil || !mine {
				settle(errNoVerdict)
				if err != nil {
					return ending{}, err
				}
				return r.claimLost(ctx)
			}
		}
		if context.Cause(ctx) != nil {
			settle(errNoVerdict)
			return r.stopped(ctx, nil)
		}
		// As late as can be: another call may just have seen the definition change.
		// What is under way, such as a task that was answered, goes on.
		if held := r.withheld(body); held != nil && r.attempts == 0 && r.attempt0 == 0 {
			settle(errNoVerdict)
			return ending{data: held}, nil
		} else if held != nil && last != nil {
			settle(errNoVerdict)
			return failed(verdicts[last.Kind].code, last.Error()+"; it is not tried again: "+held.Detail), nil
		}

		answer, fault := r.attempt(ctx, body, settle)
		if r.lastLog != nil {
			return ending{release: answer.Release}, r.lastLog
		}
		if fault == nil {
			err := r.becomes(ctx, answer)
			if err != nil && answer.Release != nil {
				answer.Release(func() {})
			}
			if errors.As(err, &fault) {
				// As if it had not answered.
			} else if errors.Is(err, errCrowded) {
				return failed(schemas.FailUnknown, err.Error()), nil
			} else if err != nil {
				return ending{}, err
			}
		}
		if fault == nil {
			return ending{
				data: &schemas.Completed{
					Status: answer.Status, ErrorCode: answer.ErrorCode, Result: answer.Result,
					Removed: answer.Removed, RemovedMore: answer.RemovedMore,
				},
				body: answer.Body, release: answer.Release,
			}, nil
		}
		last = fault
		if fault.interrupted() && context.Cause(ctx) != nil {
			return r.stopped(ctx, fault)
		}
		v := verdicts[fault.Kind]
		code, again := v.code, v.again
		if r.harmless {
			code, again = v.harmless, v.repeat && (r.repeatable || fault.Kind == Unsent)
		}
		if !again {
			end := failed(code, fault.Error())
			if w := new(withheld); errors.As(fault, &w) {
				end.data.(*schemas.Failed).Screened = w.screened
			}
			return end, nil
		}
		if pauses == nil {
			pauses = backoff.WithMaxRetries(backoff.NewExponentialBackOff(
				backoff.WithInitialInterval(r.d.opt.Pause),
				backoff.WithMultiplier(2),
				backoff.WithMaxElapsedTime(0), // the deadline is the bound
			), uint64(r.d.opt.Attempts-1))
		}
		pause := pauses.NextBackOff()
		if pause == backoff.Stop {
			return failed(code, fault.Error()), nil
		}
		pause = max(pause, fault.After)
		if r.deadline().Sub(r.d.opt.Now()) <= pause || pause > longestPause {
			return failed(code, fault.Error()+"; no time to try again"), nil
		}
		t := time.NewTimer(pause)
		select {
		case <-t.C:
		case <-ctx.Done():
			t.Stop()
			return r.stopped(ctx, fault)
		}
	}
}

// each is [Call].Each.
func (r *run) each(ctx context.Context) func(string) bool {
	if !r.a.Each {
		return nil
	}
	if r.d.opt.Shows != nil {
		shows, err := r.d.opt.Shows(ctx, r.e)
		if err == nil {
			return shows
		}
		r.d.opt.Log.Error("what a list may show is not known, so it shows nothing", "session", r.e.Session, "call", r.e.Call, "error", err)
	}
	return func(string) bool { return false }
}

// attempt calls the upstream once.
func (r *run) attempt(ctx context.Context, body []byte, settle func(error)) (Answer, *Fault) {
	at := r.d.opt.Now()
	settled := false
	report := func(err error) {
		if !settled {
			settled = true
			settle(err)
		}
	}
	e := r.e
	if r.task.isTask() {
		e = e.Task() // what the server asks is asked by the task
	}
	answer, err := r.up.call(ctx, Call{
		ID: r.e.Call, Event: e, Requested: &r.a.Requested, Only: r.a.Only, Each: r.each(ctx), Trace: r.onward(), Body: body, Era: r.era,
		Listed: r.listed(ctx, r.a.Method),
		Connected: func() {
			// One call probes an open breaker, and it may be a long one: a
			// connection is proof enough to let the others go.
			if !settled && r.up.probing() {
				report(nil)
			}
		},
		Heard: func() { report(nil) },
	}, func(msg []byte) error { return r.progress(ctx, msg) })
	if err == nil {
		answer, err = r.introduced(ctx, answer)
	}

	var fault *Fault
	if err != nil && !errors.As(err, &fault) {
		fault = &Fault{Kind: Broken, Err: err}
	}
	if fault == nil && !answer.Local || fault != nil && fault.Kind != Unsent && fault.Kind != Invalid {
		r.attempts++
		if r.upstreamAt.IsZero() {
			r.upstreamAt = at
		}
	}
	switch {
	case fault != nil && fault.Kind == Invalid, fault == nil && answer.Local:
		report(errNoVerdict) // nobody was asked
	case fault == nil || !verdicts[fault.Kind].counts:
		report(nil)
	case context.Cause(ctx) != nil || r.lastLog != nil:
		report(errNoVerdict) // we hung up, not they
	default:
		report(fault)
	}
	return answer, fault
}

// stopped ends a run whose context is over; fault is what the last try met, if
// there was one.
func (r *run) stopped(ctx context.Context, fault error) (ending, error) {
	detail := func(s string) string {
		if fault != nil {
			return s + ": " + fault.Error()
		}
		return s
	}
	why := context.Cause(ctx)
	if wish, ok := wishOf(ctx); ok {
		return cancelled(wish), nil
	}
	switch {
	case errors.Is(why, errLifetime), errors.Is(why, errDeadline) && r.a.Stream:
		return cancelled(why.Error()), nil
	case errors.Is(why, errDeadline) && r.attempts == 0 && fault != nil:
		return r.never(ctx, schemas.FailUnavailable, detail("not reached by the deadline"))
	case errors.Is(why, errDeadline) && r.attempts == 0:
		return r.never(ctx, schemas.FailExpired, "the deadline passed while it waited")
	case errors.Is(why, errDeadline) && r.harmless:
		return failed(schemas.FailTimeout, detail("no answer by the deadline")), nil
	case errors.Is(why, errDeadline):
		return failed(schemas.FailUnknown, detail("no answer by the deadline")), nil
	}
	// The process is being stopped. Whatever another may take over is left to
	// it; a claim may not be, so the claimant says how it stands.
	switch {
	case !r.claimed:
		return ending{}, fmt.Errorf("stopped: %w", why)
	case r.a.Stream:
		return cancelled("the gateway is shutting down"), nil
	case r.attempts == 0:
		return failed(schemas.FailUnavailable, "the gateway is shutting down"), nil
	}
	return failed(schemas.FailUnknown, "the gateway was shut down before the answer came"), nil
}

// never ends the call as not carried out. Of a call that must not happen twice
// only the owner can say that: without the claim, an earlier run may have
// called the upstream and died, or another may be about to.
func (r *run) never(ctx context.Context, code schemas.Failure, detail string) (ending, error) {
	if !r.repeatable {
		mine, err := r.claim(ctx)
		if err != nil {
			return ending{}, err
		}
		if !mine {
			return r.claimLost(ctx)
		}
	}
	return failed(code, detail), nil
}

// finish stores the ending. It does so even when ctx has ended, for a while.
func (r *run) finish(ctx context.Context, end ending) error {
	end = r.screened(ctx, end)
	ctx, cancel := sure(ctx, r.d.endTime())
	defer cancel()

	if r.old() || r.mayBeTold() {
		switch past, err := r.recall(ctx); {
		case errors.Is(err, errEnded):
			return r.keep(ctx, past.end, end)
		case err != nil:
			return err
		}
	}
	r.task.close()
	receipt, err := r.end(ctx, end)
	if refused(err) {
		end = end.instead(err)
		receipt, err = r.end(ctx, end)
	}
	if err != nil {
		return fmt.Errorf("ending the call: %w", err)
	}
	if _, answered := end.data.(*schemas.Completed); !receipt.Duplicate || !answered {
		return nil
	}
	first, err := r.d.opt.Load(ctx, receipt.Seq)
	if err != nil {
		return fmt.Errorf("reading the ending at %d: %w", receipt.Seq, err)
	}
	return r.keep(ctx, first, end)
}

// end stores the ending with its summary.
func (r *run) end(ctx context.Context, end ending) (schemas.Receipt, error) {
	s := schemas.Summary{
		Target:      r.a.Target,
		RequestedAt: r.a.RequestedAt, AuthorizedAt: r.e.Stored, UpstreamAt: r.upstreamAt,
		Attempts: r.attempts, Chunks: r.chunks, ChunksSHA256: r.digest.hex(), By: r.by,
		Revision: r.a.Revision, Back: r.a.Back,
		Permit: r.a.Rule, RequestSize: max(len(r.e.Body), r.a.BodySize),
	}
	switch p := end.data.(type) {
	case *schemas.Completed:
		p.Summary = s
	case *schemas.Failed:
		p.Summary, p.Detail = s, r.d.answers.words(r.a.Server, p.Detail)
	case *schemas.Cancelled:
		p.Summary = s
	}
	return r.emit(ctx, r.next(end.data, end.body))
}

// instead is the ending for one that the log has refused. A failure stays what
// it was, since its code says whether the upstream has acted.
func (e ending) instead(err error) ending {
	code := verdicts[refusedAs(err)].code
	if f, ok := e.data.(*schemas.Failed); ok {
		code = f.Code
	}
	return failed(code, fmt.Sprintf("the log refused a %s: %v", e.data.Kind(), err))
}

// keep stores the answer of a call that another run has ended: late, but not
// lost, unless the log cannot hold it.
func (r *run) keep(ctx context.Context, first schemas.Event, end ending) error {
	if _, answered := end.data.(*schemas.Completed); !answered || endedBy(first) == r.by {
		return nil
	}
	_, err := r.emit(ctx, r.next(&schemas.Late{Target: r.a.Target, Screened: end.data.(*schemas.Completed).Screened, By: r.by}, end.body))
	if refused(err) {
		// The call has its ending. Delivered again it would only be asked again.
		r.d.opt.Log.Error("a late answer is lost", "session", r.e.Session, "call", r.e.Call, "kind", schemas.KindLate, "error", err)
		return nil
	}
	if err != nil {
		return fmt.Errorf("keeping the late answer: %w", err)
	}
	return nil
}

// progress stores what the upstream said before its answer. Where another run
// of the call left events, theirs stay and count, and ours come after.
//
// A run that hears nothing before its answer does not learn of what an
// abandoned one stored a moment ago. Then progressed events remain whose index
// is not below the ending's Chunks; they are not part of the answer, and
// readers leave them out.
func (r *run) progress(ctx context.Context, msg []byte) error {
	if r.pinned() && bytes.Contains(msg, []byte("list_changed")) {
		if m, err := jsonrpc.Decode(msg, jsonrpc.Limits{Bytes: len(msg), Depth: answerDepth, AllowCaseVariants: true}); err == nil {
			r.d.opt.learning.says(r.a.Server, m.Method())
		}
	}
	if r.d.opt.mute(r.a.Server) {
		m, err := jsonrpc.Decode(msg, jsonrpc.Limits{Bytes: len(msg), Depth: answerDepth, AllowCaseVariants: true})
		if err != nil || m.Method() == "notifications/message" || m.Method() == "notifications/progress" {
			return nil
		}
	}
	if r.said += len(msg); !r.a.Stream && (r.chunks >= maxChunks || r.said > maxSaid) {
		return &Fault{Kind: TooLarge, Err: fmt.Errorf("more than %d messages or %d MiB before the answer", maxChunks, maxSaid>>20)}
	}
	msg, screened, err := r.clean(ctx, msg)
	if err != nil {
		return err
	}
	ctx, cancel := sure(ctx, r.d.endTime())
	defer cancel()
	for {
		// The owner of a claim is the only one that emits these.
		if !r.claimed && r.old() {
			if _, err := r.recall(ctx); err != nil {
				r.lastLog = err
				return err
			}
		}
		receipt, err := r.emit(ctx, r.next(&schemas.Progressed{Screened: screened, Index: r.chunks, By: r.by}, msg))
		if refused(err) {
			return faultf(refusedAs(err), "message %d of the upstream: %w", r.chunks, err)
		}
		if err == nil && receipt.Duplicate {
			var there schemas.Event
			if there, err = r.d.opt.Load(ctx, receipt.Seq); err == nil {
				if p, ok := there.Data.(*schemas.Progressed); !ok || p.By != r.by {
					// So there was another run. It may even have ended the call.
					before := r.chunks
					if _, err = r.recall(ctx); err == nil {
						if r.chunks == before {
							r.add(there.Body)
						}
						continue
					}
				}
			}
		}
		if err != nil {
			r.lastLog = fmt.Errorf("storing message %d of the upstream: %w", r.chunks, err)
			return r.lastLog
		}
		r.add(msg)
		return nil
	}
}

func (r *run) add(chunk []byte) {
	r.chunks++
	r.digest.add(chunk)
}

// sure is a context for what has to be stored whatever becomes of ctx.
func sure(ctx context.Context, d time.Duration) (context.Context, context.CancelFunc) {
	return context.WithTimeout(context.WithoutCancel(ctx), d)
}

func positive[T int | int64 | uint32 | time.Duration](v, otherwise T) T {
	if v <= 0 {
		return otherwise
	}
	return v
}
