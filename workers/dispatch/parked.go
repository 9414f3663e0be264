package dispatch

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"sync"
	"time"

	"waybill.dev/schemas"
	"waybill.dev/schemas/jsonrpc"
)

// In the revisions with sessions a server asks the client while a call is under
// way, and waits. In those without, the call ends there: its answer says what is
// asked (input_required), and the client makes the call once more with what it
// was asked for. Between the two the exchange with the server is parked: its
// connection is held open, and the next call goes on with it.
//
// What is parked belongs to this process and is lost with it. Nothing of the log
// is wrong then: the first call has ended, as one that asked for input. How the
// exchange with the server went, nobody knows, and whoever comes back for it is
// told that.

const (
	maxParked       = 1024     // exchanges
	maxParkedTenant = 256      // of them of one tenant
	maxParkedBytes  = 64 << 20 // of questions, together
	maxOpen         = 64       // questions of one exchange that have no answer
	maxTurns        = 100      // in which one exchange asks, or one call that is made anew for each
)

// errParked ends an exchange for which nobody has come back.
var errParked = &wish{"nobody has answered in time"}

// errAlone ends one in which the server asks something of nobody.
var errAlone = &wish{"the server asks something, and nobody can answer"}

// errRounds ends one that would ask for ever.
var errRounds = fmt.Errorf("the server has asked for input %d times", maxTurns)

// parking is the table of the exchanges that can be gone on with.
type parking struct {
	*sealer
	owner string // this dispatcher
	now   func() time.Time

	mu      sync.Mutex
	of      map[string]*errand
	tenants map[schemas.Tenant]int
	bytes   int
}

func newParking(opt Options, owner string) (*parking, error) {
	s, err := newSealer(opt.StateKey)
	if err != nil {
		return nil, err
	}
	return &parking{sealer: s, owner: owner, now: opt.Now, of: map[string]*errand{}, tenants: map[schemas.Tenant]int{}}, nil
}

// put takes an exchange in, or what waits of it, if there is room. The caller holds
// its mu.
func (p *parking) put(e *errand, size int) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.of[e.id] == nil {
		if len(p.of) >= maxParked || p.tenants[e.bound.tenant] >= maxParkedTenant {
			return false
		}
		p.of[e.id] = e
		p.tenants[e.bound.tenant]++
	}
	if p.bytes += size - e.size; p.bytes > maxParkedBytes && size > e.size {
		p.bytes -= size - e.size
		return false
	}
	e.size = size
	return true
}

func (p *parking) drop(e *errand) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.of[e.id] != e {
		return
	}
	delete(p.of, e.id)
	p.bytes -= e.size
	if p.tenants[e.bound.tenant]--; p.tenants[e.bound.tenant] == 0 {
		delete(p.tenants, e.bound.tenant)
	}
}

func (p *parking) get(id string) *errand {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.of[id]
}

// query is something that a server asks of the client.
type query struct {
	key    string
	s      *session // in which it was asked
	own    bool     // within the exchange that holds it; else outside of any call
	id     []byte   // as the server wrote it
	method string
	params []byte // as the server wrote them; nil: none
}

// piece is what the exchange hands to the call that is attached to it: one of
// these.
type piece struct {
	msg   []byte     // comes before the answer
	event func(Call) // of the connection
	end   *outcomeOf
}

// outcomeOf is how an exchange ended.
type outcomeOf struct {
	answer Answer
	err    error
}

// errand is an exchange with a server that may be parked. One call at a time is
// attached to it. The request is made in a goroutine of its own, which hands over
// what comes and waits meanwhile, and so the server does, too.
type errand struct {
	p     *parking
	g     *guest
	id    string
	bound binding
	asks  bool // the method is one that may be answered by a question
	alone bool // it is for a call that the gateway made: nobody comes back to answer
	life  context.Context
	stop  context.CancelCauseFunc

	said      chan piece
	news      chan struct{} // holds one: there are questions that were not put
	abandoned chan struct{} // closed when nobody will attach any more
	size      int           // of what waits; owned by parking.mu

	mu       sync.Mutex
	sent     bool           // the request, to the server
	call     schemas.CallID // its id there
	level    int            // that the attached call wants to be told of; -1: of none
	token    []byte         // of the attached call's progress
	attached bool
	over     bool
	round    int
	numbered int
	open     []*query // that have no answer
	put      int      // of these have been put to the client, the first ones
	bytes    int      // of all of them
	timer    *time.Timer
	unhook   func() bool // from the end of the process, if nothing else would notice that
}

// newErrand makes one to which the caller is attached.
func (g *guest) newErrand(c Call, b binding, asks bool) *errand {
	e := &errand{
		p: g.m.parking, g: g, id: rand.Text(), bound: b, asks: asks, alone: c.Requested.Within(c.Event), level: -1,
		said: make(chan piece), news: make(chan struct{}, 1), abandoned: make(chan struct{}), attached: true,
	}
	e.life, e.stop = context.WithCancelCause(context.Background())
	g.mu.Lock()
	defer g.mu.Unlock()
	g.errands = append(g.errands, e)
	// What the server has asked outside of any call goes first.
	if asks && !e.alone {
		for _, q := range g.pending {
			e.add(q)
		}
		g.pending = nil
	}
	return e
}

// begin sends the request. The errand ends with what becomes of it.
func (e *errand) begin(c Call, s *session, body []byte) bool {
	e.mu.Lock()
	e.sent, e.call = true, c.ID
	e.mu.Unlock()
	hand := func(m piece) error {
		select {
		case e.said <- m:
			return nil
		case <-e.abandoned:
			return context.Cause(e.life)
		}
	}
	connected, heard := false, false
	own := c
	// The caller's functions are for the goroutine of the call.
	own.Connected = func() {
		if !connected {
			connected = true
			_ = hand(piece{event: func(c Call) { c.Connected() }})
		}
	}
	own.Heard = func() {
		if !heard {
			heard = true
			_ = hand(piece{event: func(c Call) { c.Heard() }})
		}
	}
	return e.g.t.spawn(func() {
		answer, err := e.g.send(e.life, s, own, body, func(msg []byte) error {
			if m, err := jsonrpc.Decode(msg, jsonrpc.Limits{Bytes: len(msg), Depth: answerDepth, AllowCaseVariants: true}); err == nil && e.g.elsewhere(s, m) {
				return nil
			}
			select {
			case e.said <- piece{msg: msg}:
				return nil
			case <-e.life.Done():
				return context.Cause(e.life)
			}
		})
		// A shutdown stops what is attached; nobody comes for the rest.
		defer context.AfterFunc(e.g.t.ctx, e.abandon)()
		if hand(piece{end: &outcomeOf{answer, err}}) != nil && answer.Release != nil {
			answer.Release(func() {})
		}
		e.finish()
	})
}

// abandon says that nobody will come any more, unless somebody is there.
func (e *errand) abandon() {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.attached || e.over {
		return
	}
	e.over = true
	close(e.abandoned)
}

// finish takes it out of the tables. No question is left without an answer: what
// was asked outside of it goes to the next call, unless the client was given its
// time for it, and the rest is refused.
func (e *errand) finish() {
	e.mu.Lock()
	late := e.over
	e.over = true
	open := e.open
	e.open, e.put, e.bytes = nil, 0, 0
	if e.timer != nil {
		e.timer.Stop()
	}
	if e.unhook != nil {
		e.unhook()
	}
	e.mu.Unlock()
	e.p.drop(e)
	var refused []*query
	e.g.mu.Lock()
	e.g.errands = slices.DeleteFunc(e.g.errands, func(o *errand) bool { return o == e })
	for _, q := range open {
		switch {
		case q.s.ctx.Err() != nil: // its session is lost, and who waits for it too
		case late || q.own:
			refused = append(refused, q)
		default:
			refused = append(refused, e.g.keep(q)...)
		}
	}
	e.g.mu.Unlock()
	for _, q := range refused {
		q.refuse("nobody has answered in time")
	}
	e.stop(nil)
	e.g.leave()
}

// add takes a question in. mu is not held.
func (e *errand) add(q *query) bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	size := len(q.params) + 256
	if e.over || len(e.open) >= maxOpen || e.bytes+size > int(e.g.m.maxAnswer)/2 {
		return false
	}
	if !e.attached && !e.p.put(e, e.bytes+size) { // it is parked, and what waits is counted
		return false
	}
	e.numbered++
	q.key = q.method + "-" + strconv.Itoa(e.numbered)
	e.open = append(e.open, q)
	e.bytes += size
	select {
	case e.news <- struct{}{}:
	default:
	}
	return true
}

// withdraw forgets a question that the server does not want answered any more.
func (e *errand) withdraw(s *session, id []byte) bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	for i, q := range e.open {
		if q.s == s && bytes.Equal(q.id, id) {
			e.open = slices.Delete(e.open, i, i+1)
			e.bytes -= len(q.params) + 256
			if i < e.put {
				e.put--
			}
			return true
		}
	}
	return false
}

// waits tells whether there are questions that were not put to the client.
func (e *errand) waits() bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	return len(e.open) > e.put
}

// follow hands on what comes of the exchange until it ends, or the server asks
// something: then the answer asks it, and the exchange is parked. The caller is
// attached, and is not afterwards.
func (e *errand) follow(ctx context.Context, c Call, progress func([]byte) error) (answer Answer, parked bool, err error) {
	gather := e.g.t.timing.gather
	late := time.NewTimer(gather)
	defer late.Stop()
	var failed error
	var asking *Answer
	fail := func(err error) { failed = err; e.stop(err) }
	done := ctx.Done()
	for {
		select {
		case m := <-e.said:
			switch {
			case m.end != nil && failed != nil && !(m.end.err == nil && done == nil):
				if m.end.answer.Release != nil {
					m.end.answer.Release(func() {})
				}
				if asking != nil {
					return *asking, true, nil
				}
				return Answer{}, false, failed
			case m.end != nil:
				// Also where it came together with the end of ctx: it is there.
				return m.end.answer, false, m.end.err
			case failed != nil:
			case m.event != nil:
				m.event(c)
			default:
				if err := progress(m.msg); err != nil {
					fail(err)
				}
			}
		case <-e.news:
			// A server may ask several things at once, in as many messages.
			late.Reset(gather)
		case <-late.C:
			if failed == nil && e.waits() {
				if e.alone {
					if a, err := e.last(c); err == nil {
						asking = &a
					}
					fail(errAlone)
					break
				}
				if answer, ok := e.park(c); ok {
					return answer, true, nil
				}
			}
		case <-done:
			done = nil
			if failed == nil {
				fail(faultf(Broken, "%w", context.Cause(ctx)))
			}
		}
	}
}

// park puts the questions to the client and lets go of the exchange. Where there
// is no room, or it was asked often enough, it refuses them in the client's place,
// and the exchange goes on; so it does where the server has withdrawn them.
func (e *errand) park(c Call) (Answer, bool) {
	answer, parked, refused, why := e.tryPark(c)
	for _, q := range refused {
		q.refuse(why)
	}
	return answer, parked
}

// tryPark is park without refusing.
func (e *errand) tryPark(c Call) (answer Answer, parked bool, refused []*query, why string) {
	e.mu.Lock()
	defer e.mu.Unlock()
	switch {
	case len(e.open) == 0:
		return Answer{}, false, nil, ""
	case e.round >= maxTurns:
		why = errRounds.Error()
	case !e.p.put(e, e.bytes):
		why = "too many calls wait for their clients already"
	default:
		e.round++
		e.put = len(e.open)
		var err error
		if answer, err = e.ask(c); err != nil {
			e.g.log().Error("a question cannot be put to the client", "call", c.ID, "error", err)
			why = "the question cannot be put to the client"
		}
	}
	if why != "" {
		// The caller has them to itself: others come into e.open meanwhile.
		refused = e.open
		e.open, e.put, e.bytes = nil, 0, 0
		return Answer{}, false, refused, why
	}
	e.attached = false
	switch {
	case !e.sent: // no goroutine waits that would notice the end
		if e.unhook == nil {
			e.unhook = context.AfterFunc(e.g.t.ctx, func() { e.expire(-1) })
		}
	case e.g.t.ctx.Err() != nil:
		e.over = true
		close(e.abandoned)
		return answer, true, nil, ""
	}
	e.rest()
	return answer, true, nil, ""
}

// rest gives the client its time, from now on. mu is held.
func (e *errand) rest() {
	if e.timer != nil {
		e.timer.Stop()
	}
	round := e.round
	e.timer = time.AfterFunc(e.g.t.timing.park, func() { e.expire(round) })
}

// last is the answer that asks, of an exchange that ends with it.
func (e *errand) last(c Call) (Answer, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.put = len(e.open)
	e.round++
	return e.ask(c)
}

// is tells whether it is the exchange that a call has begun.
func (e *errand) is(call schemas.CallID) bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.sent && e.call == call
}

// begun tells whether the request was sent.
func (e *errand) begun() bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.sent
}

// ask makes the answer that asks. mu is held.
func (e *errand) ask(c Call) (Answer, error) {
	text, err := e.p.seal(state{Owner: e.p.owner, ID: e.id, Round: e.round, Expires: e.p.now().Add(e.g.t.timing.park).UTC()}, e.bound)
	if err != nil {
		return Answer{}, err
	}
	b := []byte(`{"resultType":"input_required","inputRequests":{`)
	for i, q := range e.open[:e.put] {
		if i > 0 {
			b = append(b, ',')
		}
		b = append(append(b, jsonrpc.Quote(q.key)...), `:{"method":`...)
		b = append(b, jsonrpc.Quote(q.method)...)
		// There are clients that cannot do without.
		params := q.params
		if params == nil {
			params = []byte("{}")
		}
		b = append(append(append(b, `,"params":`...), params...), '}')
	}
	b = append(append(b, `},"requestState":`...), jsonrpc.Quote(text)...)
	b = append(b, e.g.tail()...)
	return Answer{
		Status: 200, Result: inputRequired, Local: !e.sent,
		Body: jsonrpc.ResultResponse(jsonrpc.Quote(string(c.ID)), append(b, '}')),
	}, nil
}

// inputRequired is the type of a result that asks.
const inputRequired = "input_required"

// expire gives up an exchange for which nobody comes back in a round, or in any if
// that is -1.
func (e *errand) expire(round int) {
	e.mu.Lock()
	if e.attached || e.over || round >= 0 && round != e.round {
		e.mu.Unlock()
		return
	}
	e.over = true
	sent := e.sent
	close(e.abandoned)
	e.mu.Unlock()
	e.stop(errParked)
	if !sent {
		e.finish()
	}
}

// Why a retry cannot go on with the exchange.
var (
	errUsed = errors.New("the requestState has been used: the call went on with another answer to it")
	errGone = errors.New("the gateway does not hold the call any more that the requestState goes on with: it was restarted, or gave the call up. The outcome of that call is unknown; find out what happened before trying again")
)

// attach takes the client's answers and attaches a call. again says that nothing
// was answered, so that the same is to be asked once more.
func (e *errand) attach(c Call, round int, responses jsonrpc.Value) (answers []answered, again *Answer, err error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	switch {
	case e.over:
		return nil, nil, errGone
	case e.attached || round != e.round:
		return nil, nil, errUsed
	}
	given := make(map[string]jsonrpc.Value, e.put)
	for name, v := range responses.Members() {
		given[name] = v
	}
	var left []*query
	for i, q := range e.open {
		v, ok := given[q.key]
		switch {
		case i >= e.put || !ok:
			left = append(left, q)
		case v.Kind() != jsonrpc.Object:
			return nil, nil, fmt.Errorf("the response to %s is no object", q.key)
		default:
			answers = append(answers, answered{q, slices.Concat([]byte(`{"jsonrpc":"2.0","id":`), q.id, []byte(`,"result":`), v.Raw(), []byte(`}`))})
		}
	}
	if len(answers) == 0 && e.put > 0 {
		a, err := e.ask(c)
		if err == nil {
			e.rest()
		}
		return nil, &a, err
	}
	// What has no answer, and what was asked since, is put in the next round.
	e.open, e.put, e.bytes = left, 0, 0
	for _, q := range left {
		e.bytes += len(q.params) + 256
	}
	e.attached = true
	e.timer.Stop()
	return answers, nil, nil
}

// answered is a question with the client's answer, as a message.
type answered struct {
	*query
	body []byte
}

// bring takes the answers to the server.
func (e *errand) bring(answers []answered) {
	for _, a := range answers {
		if !e.g.t.spawn(func() {
			if err := a.s.answer(a.id, a.body); err != nil && e.life.Err() == nil {
				e.g.log().Error("an answer of the client did not reach the server", "method", a.method, "error", err)
				e.stop(fmt.Errorf("the client's answer did not reach the server: %w", err))
			}
		}) {
			return
		}
	}
}

// refuse answers a server in place of the client. No mu is held.
func (q *query) refuse(why string) {
	q.s.t.spawn(func() { q.s.refuse(q.s.ctx, q.id, why) })
}
