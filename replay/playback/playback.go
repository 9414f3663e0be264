// Package playback answers an agent from the record of a session, so that the
// agent can be run again without one upstream call.
//
// [Log] is in the place of the log, and of all that is behind it: an edge asks
// it, and what the edge is told are the events of the recorded session, under
// the names that the session has now. So there is one implementation of the
// protocol, the edge's, and none of its own here; nothing of this package can
// reach a server.
//
// # What is matched with what
//
// A call is answered with the first recorded call that was not asked for yet and
// has the same method, the same endpoint and the same params. Params are compared
// in their canonical form (RFC 8785, but integers keep all their digits), without
// _meta, which says how a call is made and not what is asked; of initialize
// without clientInfo, so that a new version of an agent is the same agent.
// Each session with an ID has the record for itself, from its beginning; all
// calls of revisions without sessions have it together.
//
// # When it is answered
//
// Events of a call come in the order of the record and, unless [Options].Fast is
// set, after the time that they took. What the client did in the middle of a call
// (it answered a question, it took the call back) is waited for, and held against
// what it did then. What is of no call, or comes on a stream that only listens,
// comes when the client has done all that it had done before it in the record.
//
// # What is changed on the way
//
// The id of the call where a body has it as the id of a subscription; the progress
// token, if the client has another now; times in events, so that what has not run
// out then has not run out now. The edge gives everything else its new name.
//
// Begin with [New]; [Log.Ask] is a [schemas.Handler] for requests.
package playback

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"
	"time"

	"waybill.dev/schemas"
	"waybill.dev/schemas/jsonrpc"
)

// Options of a [Log].
type Options struct {
	// Fast leaves the time out that things took.
	Fast bool

	// Live carries out a call that was not recorded: it is given the requested
	// event and ends the call. nil: such a call ends with an error.
	Live schemas.Handler

	// Report is told each difference when it is found. It must not call the Log.
	Report func(Difference)

	// Patience is how long the client may take to do in the middle of a call what it
	// did then. Default 10 minutes: it may ask a person.
	Patience time.Duration

	Now func() time.Time // default time.Now
}

// maxBytes bounds what is kept of the events of now, for clients that come back
// for the rest of a stream; the oldest go first.
const maxBytes = 256 << 20

// Log plays a recorded session. Its methods may be called concurrently. What is
// stored in it is its own: the record is only read.
type Log struct {
	o    Options
	tape *tape

	life context.Context // of what plays
	end  context.CancelFunc
	work sync.WaitGroup

	mu      sync.Mutex // guards what follows, and what runs have
	first   uint64     // sequence of events[0]
	events  []schemas.Event
	ids     map[schemas.EventID]uint64
	bytes   int
	changed chan struct{} // closed at the next change

	runs    map[schemas.SessionKey]*run // of sessions with an ID; all others under ""
	began   bool                        // the first of them has
	playing map[schemas.CallID]*playing
	sum     Summary
}

// New makes a Log of the events of one session, in any order. The caller runs
// Close. It returns an error that wraps [ErrUnplayable] when something of the
// session is missing that would have to be made up.
func New(events []schemas.Event, o Options) (*Log, error) {
	t, err := newTape(events)
	if err != nil {
		return nil, err
	}
	if o.Now == nil {
		o.Now = time.Now
	}
	if o.Report == nil {
		o.Report = func(Difference) {}
	}
	if o.Patience <= 0 {
		o.Patience = 10 * time.Minute
	}
	l := &Log{o: o, tape: t, first: 1, ids: map[schemas.EventID]uint64{}, changed: make(chan struct{}), runs: map[schemas.SessionKey]*run{}, playing: map[schemas.CallID]*playing{}}
	l.life, l.end = context.WithCancel(context.Background())
	return l, nil
}

// Close ends what is being played and waits for it. Nobody may ask any more.
func (l *Log) Close() {
	l.end()
	l.work.Wait()
}

// Recorded is how many calls of the client, notifications among them, the session
// has.
func (l *Log) Recorded() int { return len(l.tape.calls) }

// Who is whose session it was.
func (l *Log) Who() (schemas.Tenant, schemas.Agent) { return l.tape.tenant, l.tape.agent }

// Fronts are the endpoints of the session that show several servers as one.
func (l *Log) Fronts() []*schemas.Front { return l.tape.fronts() }

// Paths are the endpoints that the session's client called, as paths of the gateway.
func (l *Log) Paths() []string { return l.tape.paths() }

// Tasked tells whether calls of the session became tasks.
func (l *Log) Tasked() bool { return l.tape.tasked }

// Notes say what of the session cannot be played.
func (l *Log) Notes() []string { return l.tape.notes }

// Ask is a [schemas.Handler] for a request: it emits what the record has of it.
// Otherwise it is as bus.Asker.Ask.
func (l *Log) Ask(ctx context.Context, e schemas.Event, emit schemas.Emit) error {
	l.mu.Lock()
	receipt, err := l.store(e)
	if err == nil {
		e = l.events[receipt.Seq-l.first]
		l.begin(e)
	}
	l.mu.Unlock()
	if err != nil {
		return err
	}
	if _, err = emit(ctx, e); err == nil {
		err = l.follow(ctx, e, e.Seq, func(e schemas.Event) bool { return e.Kind().ToEdge() }, emit)
	}
	why := context.Cause(ctx)
	if err == nil || errors.Is(why, schemas.ErrDetached) {
		return err
	}
	if why == nil {
		why = err
	}
	_, _ = l.Store(ctx, e.Next(&schemas.Cancel{Reason: why.Error()}, nil)) // it is refused only when all ends
	return err
}

// begin starts what answers a call. mu is held.
func (l *Log) begin(e schemas.Event) {
	d, ok := e.Data.(*schemas.Requested)
	if !ok {
		return
	}
	r := l.run(e, d)
	q, err := read(e, d)
	if err != nil { // the edge has read it before
		l.answerWith(e, d, &Difference{What: "a request that cannot be read: " + err.Error()})
		return
	}
	if d.Within(e) {
		l.within(e, d, q)
		return
	}
	t, more := r.match(q, d)
	switch {
	case t != nil:
		if l.sum.Served++; more {
			l.sum.Reordered++
		}
		p := &playing{l: l, r: r, t: t, e: e, gone: make(chan struct{}), at: t.first.Seq}
		p.live, p.then = e.Stored, at(t.first)
		p.token, p.was = q.token, t.token
		l.playing[e.Call] = p
		r.reach(t.first.Seq, e.Stored)
		l.work.Go(p.play)
	case d.Method == "ping":
		// Asks whether anybody is there, and somebody is.
		l.put(e.Next(&schemas.Completed{Summary: summary(e, d)}, jsonrpc.ResultResponse([]byte("0"), nil)))
	default:
		l.sum.Missed++
		diff := r.unmatched(q, d)
		diff.Handed = l.o.Live != nil
		l.report(diff)
		if l.o.Live == nil {
			l.answerWith(e, d, &diff)
			return
		}
		l.work.Go(func() {
			if err := l.o.Live(l.life, e, l.Store); err != nil {
				l.tell(e.Next(&schemas.Failed{Summary: summary(e, d), Code: schemas.FailUnavailable, Detail: err.Error()}, nil))
			}
		})
	}
}

// within answers a call that the edge makes for another, to look for what a name
// stands for: the record may have such a list, and if not, the name stands for
// itself. mu is held.
func (l *Log) within(e schemas.Event, d *schemas.Requested, q request) {
	for _, t := range l.tape.within {
		if t.digest == q.digest && t.d.Server == d.Server && len(t.cues) > 0 {
			if c, ok := t.cues[len(t.cues)-1].e.Data.(*schemas.Completed); ok {
				l.put(e.Next(&schemas.Completed{Summary: summary(e, d), Status: c.Status, ErrorCode: c.ErrorCode}, t.cues[len(t.cues)-1].e.Body))
				return
			}
		}
	}
	l.put(e.Next(&schemas.Failed{Summary: summary(e, d), Code: schemas.FailUnavailable, Detail: "not recorded"}, nil))
}

// answerWith ends a call with an error that says what is different. mu is held.
func (l *Log) answerWith(e schemas.Event, d *schemas.Requested, diff *Difference) {
	if d.OneWay {
		// Nobody awaits an answer, and nothing depends on it.
		l.put(e.Next(&schemas.Completed{Summary: summary(e, d)}, nil))
		return
	}
	const code = jsonrpc.CodeInternalError
	l.put(e.Next(&schemas.Completed{Summary: summary(e, d), ErrorCode: code}, jsonrpc.ErrorResponse([]byte("0"), code, diff.message(), diff.data())))
}

func summary(e schemas.Event, d *schemas.Requested) schemas.Summary {
	return schemas.Summary{Target: d.Target, RequestedAt: e.Stored, Revision: d.Revision}
}

// run is the run that a call is of. mu is held.
func (l *Log) run(e schemas.Event, d *schemas.Requested) *run {
	if !modern(d.Revision) {
		if r := l.runs[e.Session]; r != nil {
			return r
		}
	}
	if l.runs[""] == nil {
		l.runs[""] = l.newRun()
	}
	return l.runs[""]
}

func (l *Log) newRun() *run {
	r := &run{
		tape: l.tape, served: make([]bool, len(l.tape.calls)), times: map[uint64]time.Time{},
		answers: map[string]schemas.Event{},
	}
	l.began = true
	return r
}

// report counts a difference and tells it. mu is held.
func (l *Log) report(d Difference) {
	l.sum.Differences++
	l.o.Report(d)
}

// heed takes in what the client does beside calls. mu is held.
func (l *Log) heed(e schemas.Event) {
	r := l.runs[e.Session]
	if r == nil {
		r = l.runs[""]
	}
	switch d := e.Data.(type) {
	case *schemas.Opened:
		if d.Revision == "" || l.runs[e.Session] != nil {
			return // of a session without an ID, or told again
		}
		r = l.newRun()
		r.session = e.Next(nil, nil)
		r.stop = make(chan struct{})
		l.runs[e.Session] = r
		r.reach(l.tape.opened, e.Stored)
		l.work.Go(func() { l.beside(r) })
	case *schemas.Closed:
		if r := l.runs[e.Session]; r != nil {
			delete(l.runs, e.Session)
			close(r.stop)
			l.sum.unasked(r)
		}
	case *schemas.Answered:
		if r != nil {
			l.answered(r, e, d)
		}
	case *schemas.Cancel:
		p := l.playing[e.Call]
		if p == nil || p.wish.Data != nil {
			return
		}
		p.wish = e
		close(p.gone)
		if i := p.t.cancelled(0); i >= 0 {
			p.r.reach(p.t.cues[i].e.Seq, e.Stored)
		}
	}
}

// answered takes in the client's answer to a question, or what it says of a task.
// mu is held.
func (l *Log) answered(r *run, e schemas.Event, d *schemas.Answered) {
	q, ok := l.tape.questions[d.ID]
	if !ok {
		if p := l.playing[e.Call]; p != nil && e.ToTask() && len(p.updates) < len(p.t.cues) {
			p.updates = append(p.updates, e)
		}
		return
	}
	if _, twice := r.answers[d.ID]; twice {
		return
	}
	r.answers[d.ID] = e
	then, ok := l.tape.answers[d.ID]
	if !ok {
		l.report(Difference{What: "answered, which it was not then", Target: d.Target, Seq: q.Seq})
		return
	}
	r.reach(then.Seq, e.Stored)
	if then.Call == "" { // else who plays the call looks
		if lines := answersDiffer(then, e); lines != nil {
			l.report(Difference{What: "answered otherwise than then", Target: d.Target, Seq: then.Seq, Diff: lines})
		}
	}
}

// Summary is what has come of it all.
type Summary struct {
	Served      int // calls that were answered from the record
	Reordered   int // of these, those that were asked for before one that had ended before them
	Missed      int // calls that were not recorded
	Differences int // that were reported, what was missed among them

	Never   int      // recorded calls that were never asked for, in each session that was opened
	Unasked []string // the first of these
}

// Same tells whether nothing was different.
func (s Summary) Same() bool { return s.Differences == 0 && s.Never == 0 }

// Summary may be asked at any time.
func (l *Log) Summary() Summary {
	l.mu.Lock()
	defer l.mu.Unlock()
	s := l.sum
	s.Unasked = slices.Clone(s.Unasked)
	for _, key := range slices.Sorted(maps.Keys(l.runs)) {
		s.unasked(l.runs[key])
	}
	if !l.began { // nobody came
		s.unasked(&run{tape: l.tape, served: make([]bool, len(l.tape.calls))})
	}
	return s
}

// maxUnasked is how many calls that were never asked for are named.
const maxUnasked = 100

// unasked adds what was never asked for in a run. The Log's mu is held.
func (s *Summary) unasked(r *run) {
	for i, t := range r.tape.calls {
		if r.served[i] || t.d.Method == "ping" {
			continue
		}
		if s.Never++; len(s.Unasked) < maxUnasked {
			s.Unasked = append(s.Unasked, fmt.Sprintf("%s (event %d)", named(t.d), t.first.Seq))
		}
	}
}
