package playback

import (
	"cmp"
	"crypto/sha256"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"waybill.dev/schemas"
	"waybill.dev/schemas/jsonrpc"
)

// ErrUnplayable is returned for a session of which something is missing that would
// have to be made up.
var ErrUnplayable = errors.New("cannot be played")

// tape is a recorded session as it can be played. It never changes.
type tape struct {
	tenant   schemas.Tenant
	agent    schemas.Agent
	opened   uint64 // where its opened event is; 0: none
	endpoint string // of a session with an ID, if it is not all servers

	calls  []*take                     // what the client asked for, in its order
	index  map[[sha256.Size]byte][]int // of calls, by what they ask for
	within []*take                     // lists that the gateway asked for by itself
	side   []cue                       // what belongs to no call

	questions map[string]schemas.Event // by schemas.Asked.ID
	answers   map[string]schemas.Event // to them
	did       []schemas.Event          // what the client did, in its order, without bodies
	times     map[uint64]time.Time     // of did

	servers []string        // upstreams that were called
	front   map[string]bool // endpoints that showed several of them
	tasked  bool
	notes   []string
}

// take is a recorded call.
type take struct {
	request
	first schemas.Event // its requested event
	d     *schemas.Requested
	cues  []cue // what came of it, in its order
}

// cue is one event of what came of a call, or of a session.
type cue struct {
	e      schemas.Event
	client bool   // the client did it, and what comes next waits for it
	after  uint64 // the last thing that the client had done before
}

func (t *take) ended() bool { return len(t.cues) > 0 && t.cues[len(t.cues)-1].e.Kind().Ends() }

// end is where the call had its ending; 0: it has none.
func (t *take) end() uint64 {
	if !t.ended() {
		return 0
	}
	return t.cues[len(t.cues)-1].e.Seq
}

// cancelled is where the client took the call back, of the cues from one on; -1: it
// did not.
func (t *take) cancelled(from int) int {
	i := slices.IndexFunc(t.cues[from:], func(c cue) bool { return c.client && c.e.Kind() == schemas.KindCancel })
	if i < 0 {
		return -1
	}
	return from + i
}

// limits are wider than any under which an event was stored.
var limits = jsonrpc.Limits{Bytes: 1 << 30, Depth: 1 << 20, AllowCaseVariants: true}

// newTape puts the events of a session in order.
func newTape(events []schemas.Event) (*tape, error) {
	t := &tape{
		questions: map[string]schemas.Event{}, answers: map[string]schemas.Event{},
		times: map[uint64]time.Time{}, front: map[string]bool{}, index: map[[sha256.Size]byte][]int{},
	}
	if len(events) == 0 {
		return nil, fmt.Errorf("%w: the session has no events", ErrUnplayable)
	}
	events = slices.Clone(events)
	slices.SortStableFunc(events, func(a, b schemas.Event) int { return cmp.Compare(a.Seq, b.Seq) })
	of := events[0]
	t.tenant, t.agent = of.Tenant, of.Agent

	seen := map[schemas.EventID]bool{} // the first of an ID counts
	calls := map[schemas.CallID]*take{}
	servers, orphans := map[string]bool{}, map[schemas.CallID]bool{}
	for _, e := range events {
		switch {
		case e.Data == nil || e.Seq == 0:
			return nil, fmt.Errorf("%w: an event without its place in the log", ErrUnplayable)
		case e.Session != of.Session || e.Tenant != of.Tenant || e.Agent != of.Agent:
			return nil, fmt.Errorf("%w: events of two sessions", ErrUnplayable)
		case e.Kind() == schemas.KindErased:
			return nil, fmt.Errorf("%w: what was said in the session until event %d has been erased", ErrUnplayable, e.Seq)
		case seen[e.ID()]:
			continue
		}
		seen[e.ID()] = true
		d, isCall := e.Data.(*schemas.Requested)
		switch {
		case isCall && d.Back:
			// Made by a server, which is not there now.
			calls[e.Call] = nil
		case isCall:
			c := &take{first: e, d: d}
			var err error
			if c.request, err = read(e, d); err != nil {
				return nil, fmt.Errorf("%w: the request of event %d cannot be read, or is not there any more: %w", ErrUnplayable, e.Seq, err)
			}
			calls[e.Call] = c
			if d.Within(e) {
				t.within = append(t.within, c)
				if p := calls[e.Parent]; p != nil && p.d.Server != d.Server && p.d.Alias == "" {
					t.front[p.d.Server] = true
				}
			} else {
				t.index[c.digest] = append(t.index[c.digest], len(t.calls))
				t.calls = append(t.calls, c)
				t.act(e)
			}
			servers[d.Server] = true
		case e.Call != "":
			c, known := calls[e.Call]
			if !known {
				orphans[e.Call] = true
			}
			if c == nil || c.ended() {
				continue
			}
			if err := t.cue(c, e); err != nil {
				return nil, err
			}
		default:
			if err := t.aside(e); err != nil {
				return nil, err
			}
		}
	}
	if t.endpoint != "" && slices.ContainsFunc(t.calls, func(c *take) bool { return c.d.Alias != "" }) {
		t.front[t.endpoint] = true
	}
	delete(servers, schemas.Gateway)
	for name := range t.front {
		delete(servers, name)
	}
	t.servers = slices.Sorted(maps.Keys(servers))
	if n := len(orphans); n > 0 {
		t.notes = append(t.notes, fmt.Sprintf("of %d calls the request is not there any more: they cannot be asked for", n))
	}
	open := 0
	for _, c := range t.calls {
		if !c.ended() && !c.d.Stream {
			open++
		}
	}
	if open > 0 {
		t.notes = append(t.notes, fmt.Sprintf("%d calls have no ending there: they end with an error", open))
	}
	return t, nil
}

// act notes something that the client did.
func (t *tape) act(e schemas.Event) {
	e.Body = nil
	t.did = append(t.did, e)
	t.times[e.Seq] = at(e)
}

// last is the last thing that the client has done so far.
func (t *tape) last() uint64 {
	if len(t.did) == 0 {
		return 0
	}
	return t.did[len(t.did)-1].Seq
}

// cue adds an event to a call.
func (t *tape) cue(c *take, e schemas.Event) error {
	q := cue{e: e, after: t.last()}
	needed := true // the body is
	switch d := e.Data.(type) {
	case *schemas.Progressed, *schemas.Asked:
	case *schemas.Notified:
		if d.ToServer {
			return nil
		}
	case *schemas.Completed:
		needed = !c.d.OneWay
	case *schemas.Tasked:
		t.tasked = true
		needed = false // dispatch may have made it one by itself
	case *schemas.Denied, *schemas.Held, *schemas.Failed, *schemas.Cancelled:
		needed = false
	case *schemas.Answered:
		q.client = true
	case *schemas.Cancel:
		if !byClient(d, e) {
			return nil
		}
		q.client, needed = true, false
	default:
		return nil // nothing that an edge tells of
	}
	if err := body(e, needed); err != nil {
		return err
	}
	t.exchange(e)
	if q.client && !c.d.Within(c.first) {
		t.act(e)
	}
	c.cues = append(c.cues, q)
	return nil
}

// aside takes in an event of no call.
func (t *tape) aside(e schemas.Event) error {
	q := cue{e: e, after: t.last()}
	switch d := e.Data.(type) {
	case *schemas.Opened:
		if t.opened == 0 {
			t.opened, t.endpoint = e.Seq, d.Server
			t.act(e)
		}
		return nil
	case *schemas.Answered:
		t.exchange(e)
		t.act(e)
		return body(e, true)
	case *schemas.Notified:
		if d.ToServer {
			return nil
		}
	case *schemas.Asked:
		t.exchange(e)
	case *schemas.Connected:
		t.side = append(t.side, q)
		return nil
	default:
		return nil
	}
	t.side = append(t.side, q)
	return body(e, true)
}

// exchange notes a question, or the answer to one.
func (t *tape) exchange(e schemas.Event) {
	switch d := e.Data.(type) {
	case *schemas.Asked:
		t.questions[d.ID] = e
	case *schemas.Answered:
		if _, ok := t.questions[d.ID]; ok {
			t.answers[d.ID] = e
		}
	}
}

// body checks that an event has the message that it is about.
func body(e schemas.Event, needed bool) error {
	if len(e.Body) == 0 {
		if needed {
			return fmt.Errorf("%w: event %d (%s) is without its body", ErrUnplayable, e.Seq, e.Kind())
		}
		return nil
	}
	if _, err := jsonrpc.Decode(e.Body, limits); err != nil {
		return fmt.Errorf("%w: event %d (%s): %w", ErrUnplayable, e.Seq, e.Kind(), err)
	}
	return nil
}

// notTheClients are the reasons of wishes that the gateway had by itself: it gave
// up, or was shut down. They are those of edge and edge/mcp.
var notTheClients = []string{"no ending by the deadline", "the gateway is shutting down", "its request is not known to be stored"}

// byClient tells whether it was the client that took a call back, or left it.
func byClient(d *schemas.Cancel, e schemas.Event) bool {
	return len(e.Body) > 0 || !slices.Contains(notTheClients, d.Reason)
}

// fronts are the endpoints that showed several servers. They show what was called
// there, which is all that can be called now.
func (t *tape) fronts() []*schemas.Front {
	all := []*schemas.Front{{Name: schemas.Gateway, Servers: t.servers}}
	for _, name := range slices.Sorted(maps.Keys(t.front)) {
		if name == schemas.Gateway {
			continue
		}
		f := &schemas.Front{Name: name, Servers: t.servers, Exposed: []schemas.Exposed{}}
		for _, c := range t.calls {
			e := schemas.Exposed{Server: c.d.Server, Tool: c.d.Name, As: c.d.Alias}
			if c.d.Alias != "" && c.d.Method == "tools/call" && !slices.Contains(f.Exposed, e) {
				f.Exposed = append(f.Exposed, e)
			}
		}
		all = append(all, f)
	}
	return all
}

// paths are where the client called, as far as the record says: of a call of one
// of several servers it does not say at which endpoint it came.
func (t *tape) paths() []string {
	var all []string
	for _, c := range t.calls {
		path := t.path(c)
		if !slices.Contains(all, path) {
			all = append(all, path)
		}
	}
	slices.Sort(all)
	return all
}

// path is where a call came.
func (t *tape) path(c *take) string {
	path := "/mcp/" + c.d.Server
	switch {
	case c.d.Alias != "" && len(t.front) == 1:
		for name := range t.front {
			path = "/mcp/" + name
		}
	case c.d.Alias != "":
		path = "/mcp"
	}
	return strings.TrimSuffix(path, "/"+schemas.Gateway)
}

// request is what a client asks for, as it is compared.
type request struct {
	modern bool              // its era
	digest [sha256.Size]byte // of era, method and canonical params: requests with the same ask for the same
	params jsonrpc.Value
	token  []byte // of progress; nil: none
}

// modern tells of which era a revision is.
func modern(revision string) bool { return revision >= "2026-07-28" }

// read reads a request.
func read(e schemas.Event, d *schemas.Requested) (request, error) {
	m, err := jsonrpc.Decode(e.Body, limits)
	if err != nil {
		return request{}, err
	}
	q := request{modern: modern(d.Revision), params: m.Params(), token: m.Params().Get("_meta", "progressToken").Raw()}
	h := sha256.New()
	_, _ = fmt.Fprintf(h, "%t %d %s", q.modern, len(d.Method), d.Method) // a hash takes all
	_, _ = h.Write(canonical(q.params, beside(d.Method)...))
	h.Sum(q.digest[:0])
	return q, nil
}

// beside are the members of a method's params that do not say what is asked.
func beside(method string) []string {
	switch method {
	case "initialize":
		return []string{"_meta", "clientInfo"}
	case "notifications/cancelled":
		return []string{"_meta", "requestId"}
	}
	return []string{"_meta"}
}
