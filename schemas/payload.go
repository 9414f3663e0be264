package schemas

import (
	"strconv"
	"time"
)

// Payload is what an event says beyond its envelope: one type per kind, always
// used as a pointer. The set is closed.
type Payload interface {
	Kind() Kind
	id(Event) EventID
}

// Target is what a call is for.
type Target struct {
	Protocol Protocol `json:"protocol"`
	Server   string   `json:"server"`         // as the operator's config names it
	Method   string   `json:"method"`         // as the protocol names it: tools/call
	Name     string   `json:"name,omitempty"` // the tool, prompt or resource, where the method has one
}

// Requested: an agent asks for something. Body: the request, verbatim.
type Requested struct {
	Target
	Revision string            `json:"revision,omitempty"` // of the protocol: 2026-07-28
	Headers  map[string]string `json:"headers,omitempty"`  // HTTP headers that belong to the message, canonical names: Mcp-Param-*
	Deadline time.Time         `json:"deadline,omitzero"`  // after it the call is not carried out; zero for a stream
	OneWay   bool              `json:"one_way,omitempty"`  // a notification: no answer is expected
	Stream   bool              `json:"stream,omitempty"`   // lives until either side closes it, and no longer than the connection it answers

	// TaskUntil is set where the caller takes a task for an answer ([Tasked]): until
	// then the call may go on as one.
	TaskUntil time.Time `json:"task_until,omitzero"`

	// TaskNow says that the caller takes nothing else for an answer (MCP 2025-11-25,
	// which has tasks that their caller asks for): the call becomes a task before it
	// is carried out.
	TaskNow bool `json:"task_now,omitempty"`

	// Alias is the name as the caller wrote it, where the endpoint has another
	// than the server ([Front]): the body has this one, Target.Name the server's.
	Alias string `json:"alias,omitempty"`

	// Back is set where a server that carries out the parent call made this one,
	// through an edge like any caller; not where the gateway made it by itself.
	Back bool `json:"back,omitempty"`
}

// Within tells whether the gateway made the call by itself, for the call that is
// its parent.
func (p *Requested) Within(e Event) bool { return e.Parent != "" && !p.Back }

// Authorized: policy lets the call go on. It says all that dispatch needs.
// Body: the request again when it has at most [InlineBody] bytes; else it is
// read at RequestedSeq and must have the digest. What a rule ordered to be
// redacted is not in it, and then it is always here.
type Authorized struct {
	Requested
	Decision
	Orders
	RequestedSeq uint64    `json:"requested_seq"`         // where the log has the request
	RequestedAt  time.Time `json:"requested_at"`          // when the log had it
	BodySize     int       `json:"body_size,omitempty"`   // set when the body stayed behind
	BodySHA256   string    `json:"body_sha256,omitempty"` // hex; set when the body stayed behind
	Only         []string  `json:"only,omitzero"`         // patterns ([Match]) of what a list may show the caller; nil: all of it; empty: nothing
	Each         bool      `json:"each,omitempty"`        // of these, only what the policy that decided says of each name may be shown
}

// Orders are what rules order for the answer of a call that they let go on.
type Orders struct {
	RedactResult []string     `json:"redact_result,omitempty"` // what to take out of the result, by path: structuredContent.iban, content.*.text
	MaxResult    int          `json:"max_result,omitempty"`    // bytes that the answer may have; 0: as many as any
	Labels       []string     `json:"labels,omitempty"`        // what the session carries from now on: untrusted
	Guards       []GuardOrder `json:"guards,omitempty"`        // who is asked about the answer before it is stored
}

// GuardOrder has a guard asked about an answer.
type GuardOrder struct {
	Guard string `json:"guard"`          // as the operator's config names it
	Open  bool   `json:"open,omitempty"` // an answer of which the guard says nothing passes
}

// Screened says what became of what an upstream said before it was stored: the
// body is what is left. What was taken out stands nowhere.
type Screened struct {
	Found     []Finding `json:"found,omitempty"`      // at most 16
	FoundMore int       `json:"found_more,omitempty"` // how many besides
	Checks    []Check   `json:"checks,omitempty"`     // what guards said of it, in the order in which they were asked
}

// Screening is the part of a payload that says it.
func (s Screened) Screening() Screened { return s }

// Finding is what one rule for answers found.
type Finding struct {
	Rule  string   `json:"rule"`            // ansi, control, bidi, tags, invisible, secret NAME, redact PATH
	Did   string   `json:"did"`             // stripped, redacted, reported, or rejected: the whole
	Count int      `json:"count"`           // how often
	Where []string `json:"where,omitempty"` // JSON pointers into the body, the first few of them
}

// Check is what a guard said.
type Check struct {
	Guard  string `json:"guard"`
	Said   string `json:"said"`             // allow, deny, or failed: it said nothing that counts
	Reason string `json:"reason,omitempty"` // its own, or why it failed
	Millis int    `json:"ms"`               // how long it took
}

// What a guard says.
const (
	CheckAllow  = "allow"
	CheckDeny   = "deny"
	CheckFailed = "failed"
)

// InlineBody is the size in bytes up to which a request's body travels with
// its authorization. Every stored copy of a byte costs about 2 ns of CPU.
const InlineBody = 4096

// Decision is how policy came to its word. It is a function of the request, of
// Facts and of the policy that it names, so that it can be found again.
type Decision struct {
	N      int    `json:"n"`                // 1; the next after held
	Rule   string `json:"rule,omitempty"`   // what decided; "" for default deny
	Reason string `json:"reason,omitempty"` // for operators, not for the caller

	Matches     []string          `json:"matches,omitempty"`      // the rules that spoke, in order of their names; at most 32
	MatchesMore int               `json:"matches_more,omitempty"` // how many besides
	Obligations []string          `json:"obligations,omitempty"`  // what was ordered with the permission: tag pii, redact to.iban
	Facts       map[string]string `json:"facts,omitempty"`        // what policy knew beyond the request, and used

	PolicySHA256 string `json:"policy_sha256,omitempty"` // hex; of the bundle of rules, whole
	ToolSHA256   string `json:"tool_sha256,omitempty"`   // hex; of the tool's definition, where that is known
	ArgsSHA256   string `json:"args_sha256,omitempty"`   // hex; of the arguments of tools/call, as the request has them
	Approval     string `json:"approval,omitempty"`      // what a person was asked, and may have granted: the same for the same call of the same caller
}

// Denied ends a call that policy refused. Body: none.
type Denied struct {
	Summary
	Decision

	// Arguments says what is wrong with the arguments of a tool that the caller may
	// list, and so may be told. It holds nothing of them but names.
	Arguments string `json:"arguments,omitempty"`
}

// Held: a person has to approve the call first. The next decision, with a higher
// N, follows from what that one says, or from silence at Expires.
type Held struct {
	Target
	Decision
	RequestedSeq uint64    `json:"requested_seq,omitempty"` // where the log has the request
	RequestedAt  time.Time `json:"requested_at,omitzero"`   // when the log had it
	Expires      time.Time `json:"expires,omitzero"`
}

// Started is the claim on a call that must not happen twice, stored before the
// upstream hears of it. Who stored it first owns the call.
type Started struct {
	Attempt int    `json:"attempt"`
	By      string `json:"by"` // the claimant, unique for each run of a handler
}

// Progressed is something the upstream said before its answer. Body: that
// message, verbatim but for what [Screened] says.
type Progressed struct {
	Screened
	Index int    `json:"index"` // 0, 1, 2 … within the call
	By    string `json:"by"`    // the claimant that saw it
}

// Tasked: the call goes on as a task, which its caller asks about; and, with a
// higher index, that the task stands otherwise than before. The first, of index
// 0, is stored before the caller is told, who may name the task by it from then
// on; what comes later of the call is addressed to the task ([Event.Edge]).
// Body: what the upstream said that made it so, verbatim; none where it is only
// that the call takes long.
type Tasked struct {
	Target
	Screened
	Index       int       `json:"index"`
	By          string    `json:"by"`              // the claimant
	Status      string    `json:"status"`          // working or input_required
	Round       int       `json:"round,omitempty"` // which question of the call to which the upstream awaits the answer in a repeated call; 0: it has a task of its own
	RequestedAt time.Time `json:"requested_at"`    // when the log had the request
	Until       time.Time `json:"until,omitzero"`  // when the task ends in any case

	// Session is, where the server has a task of its own in one of its sessions,
	// that session's [Connected].By.
	Session string `json:"session,omitempty"`

	// Waits is the id of a request that is about to be made there, which waits for
	// what the task asks: whoever goes on with the task has to take it back.
	Waits string `json:"waits,omitempty"`
}

// Summary is what every ending repeats of its call, so that one event is
// enough to account for it.
type Summary struct {
	Target
	RequestedAt  time.Time `json:"requested_at,omitzero"`   // when the log had the request
	AuthorizedAt time.Time `json:"authorized_at,omitzero"`  // when the log had the decision
	UpstreamAt   time.Time `json:"upstream_at,omitzero"`    // when the upstream was first called; zero: never
	Attempts     int       `json:"attempts,omitempty"`      // calls made to the upstream
	Chunks       int       `json:"chunks,omitempty"`        // progressed events before this ending
	ChunksSHA256 string    `json:"chunks_sha256,omitempty"` // hex; of their bodies, each after its length in 8 bytes, big endian
	By           string    `json:"by,omitempty"`            // the claimant
	Revision     string    `json:"revision,omitempty"`      // of the protocol, as requested
	Back         bool      `json:"back,omitempty"`          // as requested
	Permit       string    `json:"permit,omitempty"`        // the rule that let the call go on
	RequestSize  int       `json:"request_size,omitempty"`  // of the request's body, in bytes
}

// Completed: the upstream answered, be it with an error of its own.
// Body: the answer, verbatim but for what [Screened] and Removed say; none for a
// one-way call.
type Completed struct {
	Summary
	Screened
	Labels []string `json:"labels,omitempty"` // that rules put on the answer ([Orders])

	Status    int    `json:"status,omitempty"`     // the upstream's HTTP status
	ErrorCode int    `json:"error_code,omitempty"` // of the protocol, when the answer is an error
	Result    string `json:"result,omitempty"`     // its result type, when it is not "complete"

	// Removed names what Authorized.Only took out of a list; the body is then
	// the answer without these and otherwise verbatim. It has at most 50 names,
	// long ones cut and ending in …, since an envelope has little room.
	Removed     []string `json:"removed,omitempty"`
	RemovedMore int      `json:"removed_more,omitempty"` // how many were taken out besides those named
}

// Failed: the gateway could not get an answer, or keeps it back.
type Failed struct {
	Summary
	Screened
	Code   Failure `json:"code"`
	Detail string  `json:"detail,omitempty"` // for operators; never shown to the caller

	// Unlisted: what the call names is not, or no more, what may be called. The
	// caller is answered as of a name that does not exist.
	Unlisted bool `json:"unlisted,omitempty"`
}

// Cancelled: the caller took the call back, or what it answered is gone.
type Cancelled struct {
	Summary
	Reason string `json:"reason,omitempty"`
}

// Cancel is the wish that a call end. Body: the client's message, if it was one.
type Cancel struct {
	Reason string `json:"reason,omitempty"`
}

// Caused: a server that carries out the call has called the gateway for it, in
// another session. It stands in the call's own session, so that who reads that
// finds the other; what is there of it says the other call itself.
type Caused struct {
	Call    CallID     `json:"call,omitempty"`
	Session SessionKey `json:"session,omitempty"`
	Agent   Agent      `json:"agent,omitempty"` // as which the server called
}

// Late keeps an answer that came after the call's ending. Body: the answer; none
// if it was to be kept back.
type Late struct {
	Target
	Screened
	By string `json:"by"`
}

// Routed hands an authorized call to another process, which alone can carry it
// out, as it holds what the call needs: the child process of a server, a
// connection that waits. Who hands it over keeps the authorized event, so that it
// is carried out after all if the owner dies; it goes back when the call has its
// ending, or cannot be given one there.
type Routed struct {
	To   string `json:"to"`             // the process that is to act
	From string `json:"from"`           // the process that waits
	Seq  uint64 `json:"seq"`            // where the log has the authorized event
	By   string `json:"by"`             // unique for each time that a call is handed over, also by one run
	Back bool   `json:"back,omitempty"` // To is told that From is done with the call, which may have no ending all the same
}

// Opened: the first event of a session. Body: the client's initialize request,
// where the protocol has one.
type Opened struct {
	Protocol Protocol `json:"protocol"`
	Name     string   `json:"name"`               // what the key was made from; for a session with an ID of its own, which is a secret, the client's name
	Client   string   `json:"client,omitempty"`   // what the client calls itself; not to be trusted
	Server   string   `json:"server,omitempty"`   // the endpoint to which a session with an ID belongs; "" for all servers together
	Revision string   `json:"revision,omitempty"` // of the protocol, as agreed; set exactly for sessions with an ID
}

// Closed: the session ended. Nothing of it is carried out after this.
type Closed struct {
	Reason string `json:"reason,omitempty"`
}

// Attached: the client of a session listens, at one of several replicas, to what
// is said outside of calls. The latest with N 0 counts: older streams end. It is
// said again with a higher N while the stream lasts, so that nobody takes the
// session for idle, and at the stream's end.
type Attached struct {
	By   string `json:"by"`             // the stream, unique
	N    int    `json:"n"`              // 0 when it begins
	Sent uint64 `json:"sent,omitempty"` // how far the client had been served when it began, and by its end
	Over bool   `json:"over,omitempty"` // the stream has ended
}

// Connected: the gateway has opened a session of its own at an upstream, on
// behalf of this one. The latest for a server counts. Body: what the upstream
// answered to initialize.
type Connected struct {
	Screened
	Server   string `json:"server"`
	Upstream string `json:"upstream,omitempty"` // the upstream's session ID; "" where it has none
	Revision string `json:"revision"`           // of the protocol, as the upstream agreed
	By       string `json:"by"`                 // who opened it, unique for each time

	// After is By of the one in whose place it comes, or the server's name where there
	// was none; "" where the client itself has had it opened. Several processes may
	// find at once that it is needed: the first whose event is stored has opened it.
	After string `json:"after,omitempty"`
}

// Asked: the upstream wants something of the agent, within a call or outside of
// any. Body: its request, verbatim.
type Asked struct {
	Target // Method: what it asks, sampling/createMessage
	Screened
	ID    string `json:"id"`              // unique within the session, by whoever heard it
	Event string `json:"event,omitempty"` // its id in the server's stream, outside of calls: what comes after it can be asked for
}

// Answered is the agent's answer to Asked of the same ID; the first counts.
// Body: the answer, verbatim. Of a task it answers what the task says that it
// asks ([Tasked]), under an ID of its own; the first answer to each key counts.
// Body: the request that brought it, verbatim; or, of revisions in which that is
// a response, a tasks/update of the gateway's with what the response says.
type Answered struct {
	Target
	ID string `json:"id"`
}

// Notified is a message outside any call. Body: the message.
type Notified struct {
	Target
	Screened
	ID       string `json:"id"`              // unique within the session, by whoever saw it
	Event    string `json:"event,omitempty"` // its id in the server's stream: what comes after it can be asked for
	ToServer bool   `json:"to_server,omitempty"`
}

// Erased: an operator had what was said in the session destroyed: every event of
// it that the log had before this one, but for erasures. The event is stored
// first, and the erasure done by whoever keeps the audit's tree, which keeps the
// digests.
type Erased struct {
	ID     string `json:"id"`               // unique within the session
	Reason string `json:"reason,omitempty"` // the operator's
}

func (*Requested) Kind() Kind  { return KindRequested }
func (*Authorized) Kind() Kind { return KindAuthorized }
func (*Denied) Kind() Kind     { return KindDenied }
func (*Held) Kind() Kind       { return KindHeld }
func (*Started) Kind() Kind    { return KindStarted }
func (*Progressed) Kind() Kind { return KindProgressed }
func (*Tasked) Kind() Kind     { return KindTasked }
func (*Completed) Kind() Kind  { return KindCompleted }
func (*Failed) Kind() Kind     { return KindFailed }
func (*Cancelled) Kind() Kind  { return KindCancelled }
func (*Cancel) Kind() Kind     { return KindCancel }
func (*Late) Kind() Kind       { return KindLate }
func (*Caused) Kind() Kind     { return KindCaused }
func (*Routed) Kind() Kind     { return KindRouted }
func (*Opened) Kind() Kind     { return KindOpened }
func (*Closed) Kind() Kind     { return KindClosed }
func (*Attached) Kind() Kind   { return KindAttached }
func (*Connected) Kind() Kind  { return KindConnected }
func (*Asked) Kind() Kind      { return KindAsked }
func (*Answered) Kind() Kind   { return KindAnswered }
func (*Notified) Kind() Kind   { return KindNotified }
func (*Erased) Kind() Kind     { return KindErased }

// All endings share one ID: that is what makes a second one vanish. Denied is
// a decision before it is an ending and shares its ID with authorized; a call
// that is denied never gets as far as the other.
const end = "/end"

func (c CallID) event(what string, n int) EventID {
	return EventID(string(c) + what + strconv.Itoa(n))
}

func (p *Requested) id(e Event) EventID  { return EventID(e.Call) + "/requested" }
func (p *Authorized) id(e Event) EventID { return e.Call.event("/decision/", p.N) }
func (p *Denied) id(e Event) EventID     { return e.Call.event("/decision/", p.N) }
func (p *Held) id(e Event) EventID       { return e.Call.event("/decision/", p.N) }
func (p *Started) id(e Event) EventID    { return e.Call.event("/started/", p.Attempt) }
func (p *Progressed) id(e Event) EventID { return e.Call.event("/progressed/", p.Index) }
func (p *Tasked) id(e Event) EventID     { return e.Call.event("/tasked/", p.Index) }
func (p *Completed) id(e Event) EventID  { return EventID(e.Call) + end }
func (p *Failed) id(e Event) EventID     { return EventID(e.Call) + end }
func (p *Cancelled) id(e Event) EventID  { return EventID(e.Call) + end }
func (p *Cancel) id(e Event) EventID     { return EventID(e.Call) + "/cancel" }
func (p *Late) id(e Event) EventID       { return EventID(e.Call) + EventID("/late/"+p.By) }
func (p *Caused) id(e Event) EventID     { return EventID(e.Call) + EventID("/caused/"+p.Call) }
func (p *Routed) id(e Event) EventID {
	if p.Back {
		return EventID(e.Call) + EventID("/back/"+p.By)
	}
	return EventID(e.Call) + EventID("/routed/"+p.By)
}
func (p *Opened) id(e Event) EventID { return EventID(e.Session) + "/opened" }
func (p *Closed) id(e Event) EventID { return EventID(e.Session) + "/closed" }
func (p *Attached) id(e Event) EventID {
	return EventID(e.Session) + EventID("/attached/"+p.By+"/"+strconv.Itoa(p.N))
}
func (p *Connected) id(e Event) EventID {
	if p.After != "" {
		return EventID(e.Session) + EventID("/connected/after/"+p.After)
	}
	return EventID(e.Session) + EventID("/connected/"+p.By)
}
func (p *Asked) id(e Event) EventID { return EventID(e.Session) + EventID("/asked/"+p.ID) }

// Answers to what a task asks are of its call: who reads its past finds them.
func (p *Answered) id(e Event) EventID {
	if e.ToTask() {
		return EventID(e.Call) + EventID("/answered/"+p.ID)
	}
	return EventID(e.Session) + EventID("/answered/"+p.ID)
}

func (p *Erased) id(e Event) EventID { return EventID(e.Session) + EventID("/erased/"+p.ID) }

func (p *Notified) id(e Event) EventID { return EventID(e.Session) + EventID("/notified/"+p.ID) }

// DecisionOf is the decision that a payload is; of any other the zero one.
func DecisionOf(p Payload) Decision {
	switch d := p.(type) {
	case *Authorized:
		return d.Decision
	case *Held:
		return d.Decision
	case *Denied:
		return d.Decision
	}
	return Decision{}
}

// SummaryOf is what an ending repeats of its call; of any other payload the zero one.
func SummaryOf(p Payload) Summary {
	switch d := p.(type) {
	case *Completed:
		return d.Summary
	case *Failed:
		return d.Summary
	case *Cancelled:
		return d.Summary
	case *Denied:
		return d.Summary
	}
	return Summary{}
}
