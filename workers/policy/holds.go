package policy

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"
	"unicode"

	"waybill.dev/schemas"
	"waybill.dev/schemas/jsonrpc"
)

// Approvals. A call that a rule wants approved is stored as held, under an id that
// is the same for the same call of the same caller ([approvalID]): who repeats
// a call does not ask twice. What people say are records of the system, and so
// are the uses of what they grant:
//
//	approval.<id>   a [Word], which only an operator can store
//	use.<id>        a [Use], claimed before the call is authorized
//
// A use is claimed by a record after the last one of the same id, so that of
// several workers one has it: a grant of one use is used once. Every policy worker
// knows all that is held and goes on with it when something is said, or at the
// time until which it waits; what several do, the log takes once.

// Word is what a person says of an approval that was asked for.
type Word struct {
	Said    string    `json:"said"` // granted or refused
	By      string    `json:"by"`   // who; never the agent that asks
	Uses    int       `json:"uses,omitempty"`
	Expires time.Time `json:"expires"` // then it says nothing any more
	Note    string    `json:"note,omitempty"`
}

// Use is a use that was made of a grant.
type Use struct {
	Grant uint64         `json:"grant"` // the sequence of its record
	Call  schemas.CallID `json:"call"`
}

// Kinds of records.
const (
	WordKind = "approval"
	UseKind  = "use"
)

// CheckWord tells what is wrong with what somebody says of an agent's call.
func CheckWord(w Word, agent schemas.Agent) error {
	switch {
	case w.Said != ApprovalGranted && w.Said != ApprovalRefused:
		return fmt.Errorf("said %q, which is neither %s nor %s", w.Said, ApprovalGranted, ApprovalRefused)
	case strings.TrimSpace(w.By) == "":
		return errors.New("nobody is named who says so")
	case strings.IndexFunc(w.By, func(r rune) bool { return r != '\t' && !unicode.IsPrint(r) }) >= 0:
		return fmt.Errorf("%q has a character that nobody sees", w.By)
	case strings.EqualFold(strings.TrimSpace(w.By), string(agent)):
		return fmt.Errorf("%s asks for it and cannot approve it", agent)
	case w.Said == ApprovalGranted && (w.Uses < 1 || w.Uses > maxUses):
		return fmt.Errorf("%d uses, may be 1 to %d", w.Uses, maxUses)
	case w.Expires.IsZero():
		return errors.New("it never expires")
	}
	return nil
}

const maxUses = 1000

// approvalID is what an approval is bound to: caller, tool, its definition, the
// arguments, and what the call asks with beside them.
func approvalID(e schemas.Event, q *schemas.Requested, word schemas.Decision) string {
	args := word.ArgsSHA256
	if args == "" {
		args, _ = digestParams(e.Body, func(member string) bool { return member != "_meta" })
	}
	bound := []string{string(e.Tenant), string(e.Agent), string(q.Protocol), q.Server, q.Method, q.Name, word.ToolSHA256, args}
	if q.Method == toolsCall {
		if beside, some := digestParams(e.Body, Beside); some {
			bound = append(bound, beside)
		}
	}
	b, _ := json.Marshal(bound) // of strings: cannot fail
	return "a" + digest(b)[:24]
}

// Beside tells of a member of the params of a tools/call whether it is something that
// the call asks with beside its arguments, such as what its client answers to what the
// server has asked (inputResponses). Who approves has to see it.
func Beside(member string) bool {
	switch member {
	case "name", "arguments", "_meta", "task": // task: for how long the result is kept
		return false
	}
	return true
}

// digestParams is the digest of those members of a request's params that count, and
// whether there are any; of params that have no members, of all of them. The request's
// id never counts, nor does its _meta: both may be others each time, and who asks for
// the same again is not to wait for another approval.
func digestParams(body []byte, counts func(member string) bool) (_ string, some bool) {
	m, err := jsonrpc.Decode(body, jsonrpc.Limits{})
	if err != nil {
		return digest(body), true
	}
	p := m.Params()
	if p.Kind() != jsonrpc.Object {
		return digest(p.Raw()), p.Exists()
	}
	var all [][]byte
	for name, v := range p.Members() {
		if counts(name) {
			key, _ := json.Marshal(name) // a string: cannot fail
			all = append(all, slices.Concat(key, []byte(":"), v.Raw()))
		}
	}
	return digest(slices.Concat([]byte("{"), bytes.Join(all, []byte(",")), []byte("}"))), len(all) > 0
}

// holds is what is held, and what was said.
type holds struct {
	mu      sync.Mutex
	pending map[schemas.CallID]schemas.Event // held
	agents  map[schemas.Agent]int            // of pending
	gone    map[schemas.CallID]bool          // of pending; the caller has taken it back
	words   map[string]said                  // the newest of each id
	wake    chan struct{}                    // something was said
}

// said is the newest word of an id, and what was made of it.
type said struct {
	Word
	seq   uint64
	last  uint64 // of the uses, the newest
	calls map[schemas.CallID]bool
}

func newHolds() *holds {
	return &holds{
		pending: map[schemas.CallID]schemas.Event{}, agents: map[schemas.Agent]int{}, gone: map[schemas.CallID]bool{},
		words: map[string]said{}, wake: make(chan struct{}, 1),
	}
}

// What may be held at once; more is denied.
const (
	maxHeld      = 10_000
	maxHeldAgent = 100
)

func (h *holds) room(a schemas.Agent) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	return len(h.pending) < maxHeld && h.agents[a] < maxHeldAgent
}

func (h *holds) add(e schemas.Event) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if _, known := h.pending[e.Call]; !known {
		h.pending[e.Call] = e
		h.agents[e.Agent]++
	}
	h.rouse()
}

func (h *holds) drop(call schemas.CallID) {
	h.mu.Lock()
	defer h.mu.Unlock()
	e, ok := h.pending[call]
	if !ok {
		return
	}
	delete(h.pending, call)
	delete(h.gone, call)
	if h.agents[e.Agent]--; h.agents[e.Agent] == 0 {
		delete(h.agents, e.Agent)
	}
}

func (h *holds) rouse() {
	select {
	case h.wake <- struct{}{}:
	default:
	}
}

// Record takes a record of the system: of [WordKind] or [UseKind], in their
// order. One that cannot be read says nothing.
func (p *Policy) Record(kind, id string, seq uint64, body []byte) error {
	h := p.holds
	h.mu.Lock()
	defer h.mu.Unlock()
	s := h.words[id]
	switch kind {
	case WordKind:
		var w Word
		if err := json.Unmarshal(body, &w); err != nil {
			w = Word{Said: ApprovalRefused, By: "a record that cannot be read", Expires: p.o.Now().Add(time.Hour)}
		}
		s.Word, s.seq, s.calls = w, seq, map[schemas.CallID]bool{}
	case UseKind:
		s.last = seq
		var u Use
		if err := json.Unmarshal(body, &u); err != nil {
			s.Uses = 0
		} else if u.Grant == s.seq && s.calls != nil {
			s.calls[u.Call] = true
		}
	default:
		return nil
	}
	h.words[id] = s
	h.rouse()
	return nil
}

// approval is what became of one that was asked for: its id, and the fact.
type approval struct{ id, fact string }

// approval is what is known of the approval of a call: "" if it has to be asked
// for. A use of a grant is claimed for the call.
func (p *Policy) approval(ctx context.Context, e schemas.Event, id string) (string, error) {
	if p.o.Claim == nil {
		return "", nil
	}
	h := p.holds
	h.mu.Lock()
	s, ok := h.words[id]
	used, n := s.calls[e.Call], len(s.calls)
	h.mu.Unlock()
	if !ok || s.seq == 0 || CheckWord(s.Word, e.Agent) != nil {
		return "", nil
	}
	text := fmt.Sprintf("%s by %s, record %d", s.Said, brief(errors.New(s.By)), s.seq)
	switch {
	case s.Said == ApprovalGranted && used:
		return text, nil // claimed by an earlier try
	case !p.o.Now().Before(s.Expires):
		return "", nil
	case s.Said == ApprovalRefused:
		return text, nil
	case n >= s.Uses:
		return "", nil
	}
	use, err := json.Marshal(Use{Grant: s.seq, Call: e.Call})
	if err != nil {
		return "", err
	}
	seq, err := p.o.Claim(ctx, id, use, s.last)
	if err != nil {
		return "", fmt.Errorf("claim the approval %s for call %s: %w", id, e.Call, err)
	}
	return text, p.Record(UseKind, id, seq, use)
}

// Heard takes what the log says of calls that are held or counted, whoever has
// decided: held, authorized, cancel and closed ([Heard]).
func (p *Policy) Heard(ctx context.Context, e schemas.Event) error {
	switch d := e.Data.(type) {
	case *schemas.Authorized:
		p.limits.heard(e, d)
		p.holds.drop(e.Call)
	case *schemas.Held:
		p.holds.add(e)
	case *schemas.Cancel, *schemas.Closed:
		h := p.holds
		h.mu.Lock()
		defer h.mu.Unlock()
		for call, held := range h.pending {
			if call == e.Call || e.Kind() == schemas.KindClosed && held.Tenant == e.Tenant && held.Session == e.Session {
				h.gone[call] = true
				h.rouse()
			}
		}
	}
	return nil
}

// Heard are the kinds of events that [Policy.Heard] is for.
func Heard() []schemas.Kind {
	return []schemas.Kind{schemas.KindHeld, schemas.KindAuthorized, schemas.KindCancel, schemas.KindClosed}
}

// Run goes on with what is held when something is said of it, or when nobody has
// in time, until ctx is done.
func (p *Policy) Run(ctx context.Context) error {
	for {
		next := p.resumeAll(ctx)
		t := time.NewTimer(next)
		select {
		case <-ctx.Done():
			t.Stop()
			return nil
		case <-p.holds.wake:
			t.Stop()
		case <-t.C:
		}
	}
}

// resumeAll goes on with what can be gone on with, and tells when to look again.
func (p *Policy) resumeAll(ctx context.Context) time.Duration {
	const longest, again = time.Minute, time.Second
	h := p.holds
	h.mu.Lock()
	all := make([]schemas.Event, 0, len(h.pending))
	for _, e := range h.pending {
		all = append(all, e)
	}
	h.mu.Unlock()
	next := longest
	for _, e := range all {
		held := e.Data.(*schemas.Held)
		left := held.Expires.Sub(p.o.Now())
		h.mu.Lock()
		s, gone := h.words[held.Approval], h.gone[e.Call]
		h.mu.Unlock()
		spoken := s.seq > 0 && (s.calls[e.Call] || p.o.Now().Before(s.Expires) && (s.Said == ApprovalRefused || len(s.calls) < s.Uses)) &&
			CheckWord(s.Word, e.Agent) == nil
		if left > 0 && !spoken && !gone {
			next = min(next, left)
			continue
		}
		if err := p.resume(ctx, e, held, gone, left <= 0); err != nil {
			if ctx.Err() == nil {
				p.o.Log.Warn("a call that is held cannot be gone on with yet", "session", e.Session, "call", e.Call, "error", err)
			}
			next = again
		}
	}
	return max(next, 10*time.Millisecond)
}

// resume decides again on a call that was held.
func (p *Policy) resume(ctx context.Context, e schemas.Event, held *schemas.Held, gone, late bool) error {
	e.Seq = held.RequestedSeq
	past, err := p.o.Past(ctx, e)
	if err != nil {
		return fmt.Errorf("read the past of call %s: %w", e.Call, err)
	}
	for _, before := range past {
		if before.Call == e.Call && (before.Kind() == schemas.KindAuthorized || before.Kind().Ends()) {
			p.holds.drop(e.Call)
			return nil
		}
		gone = gone || before.Call == e.Call && before.Kind() == schemas.KindCancel
	}
	request, err := p.o.Load(ctx, held.RequestedSeq)
	if errors.Is(err, schemas.ErrNotFound) {
		late = true // it has aged out of the log with what was to be done
		request, err = e, nil
		request.Data = &schemas.Requested{Target: held.Target}
	}
	if err != nil {
		return fmt.Errorf("read the request of call %s: %w", e.Call, err)
	}
	q, ok := request.Data.(*schemas.Requested)
	if !ok || q == nil || request.Call != e.Call {
		return fmt.Errorf("sequence %d is not the request of call %s", held.RequestedSeq, e.Call)
	}
	word := ""
	if !gone {
		if word, err = p.approval(ctx, e, held.Approval); err != nil {
			return err
		}
	}
	switch {
	case word != "":
	case gone:
		word = ApprovalGone
	case late:
		word = ApprovalSilence
	default:
		return nil
	}
	if err := p.decide(ctx, request, q, held.N+1, approval{held.Approval, word}, p.o.Store); err != nil {
		return err
	}
	p.holds.drop(e.Call)
	return nil
}
