// Package replay makes again, from the recorded events of a session, what in them
// follows from others: the ids, the causes, the decisions, and what an ending
// repeats of its call; and names what is not as it was recorded. It is pure: the
// same events give the same word, and nothing here looks at a clock, at chance or
// at the world.
//
// Begin with [History.Check]. What cannot be made again from what there is (a body
// that was erased, a request that the log has dropped) is counted in
// [History.Left] and never guessed.
package replay

import (
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"reflect"
	"slices"
	"strings"
	"time"

	"waybill.dev/schemas"
)

// Recorded is an event as it was recorded.
type Recorded struct {
	schemas.Event
	ID schemas.EventID // as recorded

	// Cut says that what was said is not there, nor what of the envelope repeats it
	// ([schemas.Event.Open]); it is "" or why.
	Cut string
	// Gone is the size of a body that alone is not there.
	Gone int
}

// Difference is one thing that is not as it was recorded.
type Difference struct {
	Seq        uint64          `json:"seq"`
	ID         schemas.EventID `json:"id"`
	Field      string          `json:"field"`
	Recorded   string          `json:"recorded"`
	Recomputed string          `json:"recomputed"`
}

func (d Difference) String() string {
	return fmt.Sprintf("event %d (%s), %s: recorded %s, recomputed %s", d.Seq, d.ID, d.Field, d.Recorded, d.Recomputed)
}

// ErrCannot is wrapped by the error of a [Decide] that lacks what it takes.
var ErrCannot = errors.New("cannot be decided again")

// Decide makes a decision again: the event that policy would store now for a
// request, on the facts and under the policy that the stored one names.
type Decide func(request, was schemas.Event) (schemas.Event, error)

// Counts are what was made again and held against what was recorded.
type Counts struct {
	Events    int `json:"events"`
	Calls     int `json:"calls"`
	Causes    int `json:"causes"`    // events whose cause, session and tree are right
	Decisions int `json:"decisions"` // made again
	Endings   int `json:"endings"`   // whose summary was made again
	Digests   int `json:"digests"`   // of bodies and chunks
	Repeated  int `json:"repeated"`  // events of an id that was there before, which count nothing
}

// History is what is known of a session's events, taken in their order.
type History struct {
	Decide Decide
	Counts Counts
	Left   map[string]int // what could not be made again: why, and how often

	session schemas.SessionKey
	first   schemas.Event
	whole   bool // it begins with the session's first event
	seen    map[schemas.EventID]bool
	calls   map[schemas.CallID]*call
	asked   map[string]bool
}

type call struct {
	request  *Recorded
	decision *Recorded // the latest: authorized, held or denied
	permit   *Recorded // authorized
	ended    bool
	odd      bool // not all of it is known
	chunks   chunks
}

// New is the history of a session. Events of others may be among what it is
// given, where they were caused by this one's.
func New(session schemas.SessionKey, decide Decide) *History {
	return &History{
		whole: true, Decide: decide, Left: map[string]int{}, session: session,
		seen: map[schemas.EventID]bool{}, calls: map[schemas.CallID]*call{}, asked: map[string]bool{},
	}
}

// found collects the differences of one event.
type found struct {
	of  Recorded
	all []Difference
}

func (f *found) add(field, recorded, recomputed string) {
	f.all = append(f.all, Difference{f.of.Seq, f.of.ID, field, short(recorded), short(recomputed)})
}

// same compares two values by their JSON.
func (f *found) same(field string, recorded, recomputed any) bool {
	// Most are equal as they are, which is told at a hundredth of the cost.
	if t := reflect.TypeOf(recorded); t != nil && t.Comparable() && recorded == recomputed {
		return true
	}
	n := len(f.all)
	a, b := plain(recorded), plain(recomputed)
	f.compare(field, a, b)
	return len(f.all) == n
}

// compare names each member in which two values differ, in the order of their
// names.
func (f *found) compare(field string, recorded, recomputed any) {
	a, ok1 := recorded.(map[string]any)
	b, ok2 := recomputed.(map[string]any)
	if !ok1 || !ok2 {
		if x, y := text(recorded), text(recomputed); x != y {
			f.add(cmp.Or(field, "event"), x, y)
		}
		return
	}
	names := slices.Collect(maps.Keys(a))
	for name := range maps.Keys(b) {
		if _, ok := a[name]; !ok {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	for _, name := range names {
		of := field + "." + name
		if field == "" {
			of = name
		}
		x, inA := a[name]
		y, inB := b[name]
		switch {
		case !inA:
			f.add(of, "nothing", text(y))
		case !inB:
			f.add(of, text(x), "nothing")
		default:
			f.compare(of, x, y)
		}
	}
}

// Compare names the members in which two values differ, by their JSON.
func Compare(of Recorded, field string, recorded, recomputed any) []Difference {
	f := &found{of: of}
	f.same(field, recorded, recomputed)
	return f.all
}

// plain is a value as JSON has it.
func plain(v any) any {
	b, err := json.Marshal(v)
	if err != nil {
		return err.Error()
	}
	d := json.NewDecoder(bytes.NewReader(b))
	d.UseNumber()
	var p any
	if err := d.Decode(&p); err != nil {
		return err.Error()
	}
	return p
}

func text(v any) string {
	b, err := json.Marshal(v)
	if err != nil {
		return err.Error()
	}
	return string(b)
}

// short makes of a long value one for a message.
func short(s string) string {
	const most = 300
	if len(s) > most {
		s = strings.ToValidUTF8(s[:most], "") + "…"
	}
	return s
}

// Check holds an event against those before it, and takes it in. It returns what
// is not as it follows from them, in the order of the event's members.
func (h *History) Check(r Recorded) []Difference {
	f := &found{of: r}
	h.Counts.Events++
	if h.first.Data == nil && r.Session == h.session {
		h.first, h.whole = r.Event, h.whole && r.Kind() == schemas.KindOpened
	}
	if id := r.Event.ID(); r.ID != id {
		f.add("id", text(r.ID), text(id))
		return f.all // it is not what it passes for, and nothing follows from it
	}
	if h.seen[r.ID] {
		h.Counts.Repeated++
		return nil
	}
	h.seen[r.ID] = true
	before := len(f.all)
	if r.Session == h.session {
		f.same("tenant", r.Tenant, h.first.Tenant)
		if r.Kind() != schemas.KindFailed { // of what could not be read the agent may not be known
			f.same("agent", r.Agent, h.first.Agent)
		}
	}
	if r.Call == "" {
		h.ofSession(f, r)
	} else {
		h.ofCall(f, r)
	}
	if len(f.all) == before {
		h.Counts.Causes++
	}
	return f.all
}

// Unreadable says that in this place of the history stands what is no event that
// this program can read: what follows may be caused by it.
func (h *History) Unreadable() { h.whole = false }

func (h *History) left(why string) { h.Left[why]++ }

func (h *History) ofSession(f *found, r Recorded) {
	switch d := r.Data.(type) {
	case *schemas.Opened:
		// The name of a session with an ID of its own is not what its key is of.
		if d.Revision == "" {
			f.same("session", r.Session, schemas.NewSessionKey(r.Tenant, r.Agent, d.Name))
		}
	case *schemas.Asked:
		h.asked[d.ID] = true
	case *schemas.Answered:
		h.answered(f, d.ID)
	}
}

// answered holds an answer against its question.
func (h *History) answered(f *found, id string) {
	if !h.asked[id] && h.whole && f.of.Session == h.session {
		f.add("cause", "answer to "+text(id), "nothing was asked under this id")
	}
}

// beginning is said of what lacks its beginning.
const beginning = "calls whose beginning is not there (any more)"

func (h *History) ofCall(f *found, r Recorded) {
	c := h.calls[r.Call]
	if c == nil {
		c = &call{}
		h.calls[r.Call] = c
	}
	if d, ok := r.Data.(*schemas.Requested); ok {
		h.requested(f, r, c, d)
		return
	}
	if c.request == nil {
		switch {
		case r.Kind() == schemas.KindCancel, r.Kind() == schemas.KindFailed && schemas.SummaryOf(r.Data).RequestedAt.IsZero():
			// A wish for what was never asked; a message that is no request.
		case h.whole && r.Session == h.session && !h.older(r.Call):
			f.add("cause", string(r.Kind()), "no request of the call before it")
		case !c.odd:
			h.left(beginning)
		}
		c.odd = true
		return
	}
	q := c.request
	if r.Kind() == schemas.KindFailed && schemas.SummaryOf(r.Data).RequestedAt.IsZero() {
		// It was made where the events of the call could not be read, or handled.
		c.ended = true
		return
	}
	f.same("session", r.Session, q.Session)
	f.same("parent", r.Parent, q.Parent)
	f.same("root", r.Root, q.Root)
	if r.Session != h.session {
		f.same("agent", r.Agent, q.Agent)
	}
	f.same("trace", r.Trace, q.Trace)
	f.same("tracestate", r.TraceState, q.TraceState)
	if !r.ToTask() && r.Kind() != schemas.KindCaused {
		f.same("edge", r.Edge, q.Edge)
	}
	switch d := r.Data.(type) {
	case *schemas.Authorized, *schemas.Held, *schemas.Denied:
		h.decided(f, r, c)
	case *schemas.Started, *schemas.Progressed, *schemas.Tasked:
		if c.permit == nil {
			f.add("cause", string(r.Kind()), "nothing has authorized the call before it")
			break
		}
		switch d := d.(type) {
		case *schemas.Progressed:
			if r.Cut != "" || r.Gone > 0 {
				c.odd = true
			}
			c.chunks.add(d.Index, r.Body)
		case *schemas.Tasked:
			f.same("data.requested_at", d.RequestedAt, q.Stored)
			h.target(f, d.Target, c)
		}
	case *schemas.Routed:
		if !d.Back && c.permit != nil {
			f.same("data.seq", d.Seq, c.permit.Seq)
		}
	case *schemas.Late:
		h.target(f, d.Target, c)
		if !c.ended {
			f.add("cause", "late", "the call has no ending before it")
		}
	case *schemas.Asked:
		h.asked[d.ID] = true
	case *schemas.Answered:
		if !r.ToTask() {
			h.answered(f, d.ID)
		}
	case *schemas.Completed, *schemas.Failed, *schemas.Cancelled:
		h.ending(f, r, c)
	}
}

// older tells whether a call was made well before the first event that is there,
// which may be a session's beginning that was said again.
func (h *History) older(c schemas.CallID) bool {
	at := c.Minted()
	return !at.IsZero() && at.Before(h.first.Stored.Add(-time.Minute))
}

func (h *History) target(f *found, t schemas.Target, c *call) {
	f.same("data", t, c.request.Data.(*schemas.Requested).Target)
}

func (h *History) requested(f *found, r Recorded, c *call, d *schemas.Requested) {
	h.Counts.Calls++
	c.request = &r
	switch parent := h.calls[r.Parent]; {
	case r.Parent == "":
		f.same("root", r.Root, schemas.CallID(r.Call))
	case parent == nil && d.Back:
		h.left("causes of calls that a server made, which are in the session that it was called in")
	case parent == nil || parent.request == nil:
		if h.whole && !h.older(r.Parent) {
			f.add("parent", text(r.Parent), "no such call before it")
		} else {
			h.left(beginning)
		}
	default:
		root := parent.request.Root
		if root == "" {
			root = r.Parent
		}
		f.same("root", r.Root, root)
	}
}

// decided makes a decision again.
func (h *History) decided(f *found, r Recorded, c *call) {
	n, before := schemas.DecisionOf(r.Data).N, 0
	if c.decision != nil {
		before = schemas.DecisionOf(c.decision.Data).N
		if c.decision.Kind() != schemas.KindHeld {
			f.add("cause", string(r.Kind()), "the call was "+string(c.decision.Kind())+" before")
		}
	}
	f.same("data.n", n, before+1)
	c.decision = &r
	switch r.Kind() {
	case schemas.KindAuthorized:
		c.permit = &r
	case schemas.KindDenied:
		h.ends(f, c)
	}
	switch q := c.request; {
	case q.Cut != "":
		h.left("decisions: " + q.Cut)
		return
	case q.Gone > 0 || r.Gone > 0:
		h.left("decisions: the request's body is not kept any more")
		return
	}
	again, err := h.Decide(c.request.Event, r.Event)
	if errors.Is(err, ErrCannot) {
		h.left("decisions: " + strings.TrimPrefix(err.Error(), ErrCannot.Error()+": "))
		return
	}
	if err != nil {
		f.add("data", text(r.Data), err.Error())
		return
	}
	if again.Kind() != r.Kind() {
		d := schemas.DecisionOf(again.Data)
		f.add("kind", string(r.Kind())+" by rule "+text(schemas.DecisionOf(r.Data).Rule), string(again.Kind())+" by rule "+text(d.Rule)+" "+d.Reason)
		return
	}
	f.same("data", r.Data, again.Data)
	if !bytes.Equal(r.Body, again.Body) {
		f.add("body", text(string(r.Body)), text(string(again.Body)))
	}
	h.Counts.Decisions++
	h.Counts.Digests++
}

func (h *History) ends(f *found, c *call) {
	if c.ended {
		f.add("cause", string(f.of.Kind()), "the call had ended before")
	}
	c.ended = true
}

// ending makes again what an ending repeats of its call. When the upstream was
// called, how often, and what came of it only the ending knows.
func (h *History) ending(f *found, r Recorded, c *call) {
	h.ends(f, c)
	was := schemas.SummaryOf(r.Data)
	q := c.request.Data.(*schemas.Requested)
	s := was
	s.Target, s.Revision, s.Back, s.RequestedAt = q.Target, q.Revision, q.Back, c.request.Stored
	sized := c.request
	if c.permit != nil {
		a := c.permit.Data.(*schemas.Authorized)
		s.AuthorizedAt, s.Permit = c.permit.Stored, a.Rule
		sized = c.permit
		s.RequestSize = max(size(*sized), a.BodySize)
	} else {
		if r.Kind() != schemas.KindFailed {
			f.add("cause", string(r.Kind()), "nothing has authorized the call before it")
		}
		s.AuthorizedAt, s.Permit, s.RequestSize = time.Time{}, "", size(*sized)
	}
	if sized.Cut != "" {
		s.RequestSize = was.RequestSize
		h.left("sizes and digests: " + sized.Cut)
	}
	switch digest, ok := c.chunks.digest(was.Chunks); {
	case !ok:
		s.Chunks = c.chunks.n
	case r.Cut != "" || c.odd:
		if was.Chunks > 0 {
			h.left("digests of what came before answers, not all of which is there")
		}
	default:
		s.ChunksSHA256 = digest
		h.Counts.Digests++
	}
	if f.same("data", was, s) {
		h.Counts.Endings++
	}
}

// size is that of a body, be it there or not.
func size(r Recorded) int { return max(len(r.Body), r.Gone) }
