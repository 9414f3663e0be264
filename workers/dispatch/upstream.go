package dispatch

import (
	"context"
	"fmt"
	"time"

	"waybill.dev/schemas"
	"waybill.dev/schemas/jsonrpc"
)

// Upstream carries one call to one server and brings back the answer. It hands
// every message that comes before the answer to progress, verbatim and in
// order, and gives up with progress's error when that fails. It calls the
// server once: whether to try again is decided by whoever calls it. When ctx
// ends it hangs up, which tells the server, and returns soon.
//
// An error that wraps a [*Fault] says what is known of the call; any other
// counts as [Broken]. Connected, Heard and progress are called on the goroutine
// on which Upstream was called.
type Upstream func(ctx context.Context, c Call, progress func(msg []byte) error) (Answer, error)

// Connection is an upstream that can be called.
type Connection struct {
	Call  Upstream
	Close func() // lets go of what it holds; does not wait for calls

	// Harmless tells of calls that have no effect, beside the reads of the
	// upstream's kind and the tools that Server.Idempotent names; nil: of none.
	Harmless func(*schemas.Requested) bool

	// Owner tells what a call needs that only one process holds: by a key, whose
	// owner is who acquires it first ([Owners]), or by the name of the process;
	// both "": nothing. A call is carried out by the owner, wherever it is
	// delivered; by whom it was delivered to, if a process that is named has
	// died. It must not block. nil: no call needs any.
	Owner func(Call) (key, owner string)

	mcp *mcpServer // of that kind, to close its sessions
}

// Call is what an upstream is asked.
type Call struct {
	ID        schemas.CallID
	Event     schemas.Event // that authorized it: whose call it is
	Requested *schemas.Requested
	Only      []string               // see schemas.Authorized; nil: everything
	Each      func(name string) bool // and of that, what it says; nil: all of it

	// Listed tells of each element of a list whether it may be shown, beside Only and
	// Each. nil, or what it says is nil: all of them.
	Listed func(result jsonrpc.Value) ([]bool, error)

	Trace onward // zero: none
	Body  []byte

	// In is the session at the server in which it is to be made
	// ([schemas.Connected].By): of a request about a task that was made there.
	// "": any.
	In string

	// Era is that in which it is made, where it was decided who makes it by that;
	// EraAuto: in whichever the server is of.
	Era Era

	Connected func() // there is a connection
	Heard     func() // the answer has begun
}

// filters tells whether a list must not be shown as it is.
func (c Call) filters() bool { return c.Only != nil || c.Each != nil }

// shows tells whether a list may show a name.
func (c Call) shows(name string) bool {
	return allowed(c.Only, name) && (c.Each == nil || c.Each(name))
}

// Answer is what the upstream said.
type Answer struct {
	Status      int
	ErrorCode   int
	Result      string   // its result type, when it is not "complete"; short
	Removed     []string // what Call.Only took out of it, as far as there is room
	RemovedMore int      // how many more
	Body        []byte   // otherwise verbatim; nil for a one-way call
	Session     string   // with a task of the server's own (Result is "task"): in which of its sessions it is, see Call.In
	Local       bool     // made here: the server was not asked, and this says nothing of it

	// Release gives the connection back. It may take a moment and is called
	// once the answer is stored, before ctx is cancelled; hangUp cancels ctx.
	// May be nil.
	Release func(hangUp func())
}

// Fault is why there is no answer.
type Fault struct {
	Kind  FaultKind
	After time.Duration // the upstream asked to be left alone so long
	Err   error
}

func (f *Fault) Error() string { return f.Err.Error() }
func (f *Fault) Unwrap() error { return f.Err }

func faultf(k FaultKind, format string, a ...any) *Fault {
	return &Fault{Kind: k, Err: fmt.Errorf(format, a...)}
}

// interrupted tells whether the fault may be nothing but the end of the
// context; what the upstream itself said stands beside that.
func (f *Fault) interrupted() bool { return f.Kind == Unsent || f.Kind == Broken }

// FaultKind says what is known of a call that has no answer.
type FaultKind int

const (
	Unsent   FaultKind = iota // not one byte was written to the upstream
	Invalid                   // nothing was written, and trying again would not help
	Busy                      // refused, too many requests: HTTP 429
	Refused                   // refused for now, and it said for how long: 503 with Retry-After
	Broken                    // the connection failed after something may have been written
	Gateway                   // something between here and there gave up: 502, 503, 504
	Crashed                   // the upstream failed without an answer of the protocol: other 5xx
	Garbled                   // it said something, which is not the protocol
	TooLarge                  // its answer passes the limit
	Withheld                  // its answer is kept back ([Answers])
)

// verdicts is what becomes of a fault. The left half is for calls that may
// have an effect: only what is certain not to have been carried out is tried
// again, and a 503 without a date may come from a proxy that had passed the
// request on. The right half is for calls that are idempotent.
var verdicts = [...]struct {
	code     schemas.Failure
	again    bool
	harmless schemas.Failure
	repeat   bool
	counts   bool // towards the circuit breaker: only faults of the transport
}{
	Unsent:   {schemas.FailUnavailable, true, schemas.FailUnavailable, true, true},
	Invalid:  {schemas.FailInvalid, false, schemas.FailInvalid, false, false},
	Busy:     {schemas.FailOverloaded, false, schemas.FailOverloaded, true, false},
	Refused:  {schemas.FailUnavailable, false, schemas.FailUnavailable, true, false},
	Broken:   {schemas.FailUnknown, false, schemas.FailUnavailable, true, true},
	Gateway:  {schemas.FailUnknown, false, schemas.FailUnavailable, true, false},
	Crashed:  {schemas.FailUnknown, false, schemas.FailBadAnswer, false, false},
	Garbled:  {schemas.FailBadAnswer, false, schemas.FailBadAnswer, false, false},
	TooLarge: {schemas.FailTooLarge, false, schemas.FailTooLarge, false, false},
	Withheld: {schemas.FailWithheld, false, schemas.FailWithheld, false, false},
}
