package playback

import (
	"bytes"
	"cmp"
	"context"
	"fmt"
	"slices"
	"time"

	"waybill.dev/schemas"
	"waybill.dev/schemas/jsonrpc"
)

// run is one time that the record is played: to a session with an ID, or to all
// that have none. The Log's mu guards it.
type run struct {
	tape    *tape
	session schemas.Event // of which it is; zero without an ID
	stop    chan struct{} // closed when the session is; nil without an ID

	served  []bool               // of tape.calls
	next    int                  // the first of these that is not
	reached uint64               // up to where the client has done what it did then
	times   map[uint64]time.Time // when it did that, by its place in the record
	answers map[string]schemas.Event
}

// reach notes that the client has done what it did at a place of the record.
func (r *run) reach(seq uint64, now time.Time) {
	if _, ok := r.times[seq]; !ok {
		r.times[seq] = now
	}
	r.reached = max(r.reached, seq)
}

// maxBefore bounds how many calls are looked at to tell whether one is early.
const maxBefore = 1000

// match finds the recorded call that answers a request; early says that one which
// had ended before that was asked has not been asked for yet.
func (r *run) match(q request, d *schemas.Requested) (t *take, early bool) {
	for _, i := range r.tape.index[q.digest] {
		c := r.tape.calls[i]
		if r.served[i] || !r.tape.fits(c.d, d) {
			continue
		}
		r.served[i] = true
		for r.next < len(r.served) && r.served[r.next] {
			r.next++
		}
		for j := r.next; j < min(i, r.next+maxBefore); j++ {
			if end := r.tape.calls[j].end(); !r.served[j] && end > 0 && end < c.first.Seq {
				return c, true
			}
		}
		return c, false
	}
	return nil, false
}

// fits tells whether a request comes to where a recorded one came.
func (t *tape) fits(then, now *schemas.Requested) bool {
	if then.Server == now.Server {
		return (then.Alias == "") == (now.Alias == "")
	}
	// A view of which the record says no more than what was called there.
	return then.Alias != "" && now.Alias == "" && now.Server != schemas.Gateway && !t.front[now.Server] && !slices.Contains(t.servers, now.Server)
}

// unmatched says how a request differs from what was recorded: from the first call
// of the same name that was not asked for yet, if there is one.
func (r *run) unmatched(q request, d *schemas.Requested) Difference {
	diff := Difference{Target: d.Target}
	if d.Alias != "" {
		diff.Target.Name = d.Alias
	}
	times := 0
	for _, i := range r.tape.index[q.digest] {
		if r.tape.fits(r.tape.calls[i].d, d) {
			times++
		}
	}
	var like, next, elsewhere *take
	asked := false // like was asked for
	for i, c := range r.tape.calls {
		if next == nil && !r.served[i] && c.d.Method != "ping" {
			next = c
		}
		switch {
		case named(c.d) != named(d):
		case c.modern != q.modern || !r.tape.fits(c.d, d):
			elsewhere = cmp.Or(elsewhere, c)
		case like == nil || asked && !r.served[i]:
			like, asked = c, r.served[i]
		}
	}
	switch {
	case times > 0:
		diff.What = fmt.Sprintf("%s with these params was asked for %s then, and now once more", named(d), count(times))
	case like != nil:
		diff.What = "the params are not those of then"
		diff.Seq = like.first.Seq
		diff.Diff = differ(like.params, q.params, beside(d.Method)...)
	case elsewhere != nil && elsewhere.modern != q.modern:
		diff.What = fmt.Sprintf("%s was asked for by revision %s of the protocol then, and now by %s", named(d), elsewhere.d.Revision, d.Revision)
		diff.Seq = elsewhere.first.Seq
	case elsewhere != nil:
		diff.What = fmt.Sprintf("%s was asked for at another endpoint then: at %s", named(d), r.tape.path(elsewhere))
		diff.Seq = elsewhere.first.Seq
	case next != nil:
		diff.What = fmt.Sprintf("%s was not asked for then; what comes next there is %s", named(d), named(next.d))
		diff.Seq = next.first.Seq
	default:
		diff.What = named(d) + " was not asked for then"
	}
	return diff
}

func count(n int) string {
	if n == 1 {
		return "once"
	}
	return fmt.Sprintf("%d times", n)
}

// playing is a recorded call that is played to a call of now.
type playing struct {
	l *Log
	r *run
	t *take
	e schemas.Event // the request of now

	token, was []byte // of progress: now and then

	// Of the goroutine of play: the last thing that the client did, now and then.
	live, then time.Time

	gone chan struct{} // closed when the client has taken the call back

	// Of the Log's mu.
	at      uint64          // the place that comes next
	wish    schemas.Event   // by which the client has taken it back
	updates []schemas.Event // what it said of the task
}

// play tells what came of the call, to its ending.
func (p *playing) play() {
	l := p.l
	defer func() {
		l.mu.Lock()
		defer l.mu.Unlock()
		delete(l.playing, p.e.Call)
		l.change()
	}()
	back := false // the client has taken it back, and that is dealt with
	updates := 0  // that the client has made of the task
	for i := 0; i < len(p.t.cues); i++ {
		c := p.t.cues[i]
		p.goTo(c.e.Seq)
		if !c.client {
			p.await(c)
		}
		if l.life.Err() != nil {
			return
		}
		if !back && p.isGone() {
			back = true
			if i = p.t.cancelled(i); i < 0 {
				p.takenBack()
				return
			}
			p.base(p.t.cues[i])
			continue
		}
		if !c.client {
			l.tell(p.now(c.e))
			if c.e.Kind().Ends() {
				return
			}
			continue
		}
		switch d := c.e.Data.(type) {
		case *schemas.Cancel:
			if !back && !p.patiently(p.isGoneLocked) {
				if l.life.Err() != nil {
					return
				}
				p.differs(Difference{What: "the client took the call back then, and does not now", Seq: c.e.Seq})
			}
			back = true
		case *schemas.Answered:
			if back {
				break
			}
			switch on, over := p.answer(c.e, d, &updates); {
			case over:
				return
			case !on:
				i-- // it was taken back, which is dealt with above
				continue
			}
		}
		p.base(c)
	}
	p.over(back)
}

// over ends a call that has no ending in the record.
func (p *playing) over(back bool) {
	if p.t.d.Stream && !back {
		if !p.l.until(p.l.life, nil, p.isGoneLocked) {
			return
		}
	}
	if back || p.isGone() {
		p.end(&schemas.Cancelled{Summary: summary(p.e, p.t.d)})
		return
	}
	p.fail(Difference{What: "the record has no ending of this call", Target: p.t.d.Target, Seq: p.t.first.Seq})
}

// await waits until it is time for something that was told.
func (p *playing) await(c cue) {
	live, then := p.live, p.then
	if p.t.d.Stream && c.after > p.t.first.Seq {
		// What comes on it depends on what the client does elsewhere.
		if !p.l.until(p.l.life, p.gone, func() bool { return p.r.reached >= c.after }) {
			return
		}
		live, then = p.l.when(p.r, c.after)
	}
	p.l.pause(live, at(c.e).Sub(then), p.gone)
}

// when is when the client did something: now, and then.
func (l *Log) when(r *run, seq uint64) (live, then time.Time) {
	l.mu.Lock()
	defer l.mu.Unlock()
	live, ok := r.times[seq]
	if !ok {
		live = l.o.Now()
	}
	return live, l.tape.times[seq]
}

// pause waits until so long after a time.
func (l *Log) pause(since time.Time, d time.Duration, stop <-chan struct{}) {
	if l.o.Fast {
		return
	}
	if d -= l.o.Now().Sub(since); d <= 0 {
		return
	}
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
	case <-stop:
	case <-l.life.Done():
	}
}

// base begins to count time anew, from what the client has just done.
func (p *playing) base(c cue) { p.live, p.then = p.l.o.Now(), at(c.e) }

func (p *playing) goTo(seq uint64) {
	p.l.mu.Lock()
	defer p.l.mu.Unlock()
	p.at = seq
	p.l.change()
}

// isGoneLocked tells whether the client has taken the call back; mu is held.
func (p *playing) isGoneLocked() bool { return p.wish.Data != nil }

func (p *playing) isGone() bool {
	select {
	case <-p.gone:
		return true
	default:
		return false
	}
}

// patiently waits for the client; on a stream for as long as that takes.
func (p *playing) patiently(done func() bool) bool {
	ctx, cancel := p.l.life, context.CancelFunc(func() {})
	if !p.t.d.Stream {
		ctx, cancel = context.WithTimeout(ctx, p.l.o.Patience)
	}
	defer cancel()
	return p.l.until(ctx, nil, done)
}

// answer waits for the client's answer and holds it against the recorded one. With
// another, or none, nothing that is recorded can go on: the call is over then. on
// says that it goes on; neither, that it was taken back.
func (p *playing) answer(then schemas.Event, d *schemas.Answered, updates *int) (on, over bool) {
	var now schemas.Event
	_, question := p.l.tape.questions[d.ID]
	heard := p.patiently(func() bool {
		if question {
			now = p.r.answers[d.ID]
		} else if len(p.updates) > *updates {
			now = p.updates[*updates]
		}
		return now.Data != nil || p.wish.Data != nil
	})
	target := d.Target
	switch {
	case !heard && p.l.life.Err() == nil:
		p.fail(p.differs(Difference{What: "the client answered then, and does not now", Target: target, Seq: then.Seq}))
		return false, true
	case !heard:
		return false, true // all ends
	case now.Data == nil:
		return false, false
	}
	if !question {
		*updates++
		p.l.mu.Lock()
		p.r.reach(then.Seq, now.Stored)
		p.l.mu.Unlock()
	}
	if lines := answersDiffer(then, now); lines != nil {
		p.fail(p.differs(Difference{What: "answered otherwise than then, so how the call goes on was not recorded", Target: target, Seq: then.Seq, Diff: lines}))
		return false, true
	}
	return true, false
}

// takenBack ends a call that was not taken back then. A stream ends when its client
// leaves, and it does not matter when.
func (p *playing) takenBack() {
	p.l.mu.Lock()
	d, _ := p.wish.Data.(*schemas.Cancel)
	byItself := byClient(d, p.wish)
	p.l.mu.Unlock()
	if byItself && !p.t.d.Stream {
		p.differs(Difference{What: "the client takes the call back, which it did not then", Seq: p.t.first.Seq})
	}
	p.end(&schemas.Cancelled{Summary: summary(p.e, p.t.d)})
}

// differs reports a difference of the call.
func (p *playing) differs(d Difference) Difference {
	if d.Target.Method == "" {
		d.Target = p.t.d.Target
	}
	p.l.mu.Lock()
	defer p.l.mu.Unlock()
	p.l.report(d)
	return d
}

// fail ends the call with an error that says why.
func (p *playing) fail(d Difference) {
	q, _ := p.e.Data.(*schemas.Requested)
	p.l.mu.Lock()
	defer p.l.mu.Unlock()
	p.l.answerWith(p.e, q, &d)
}

func (p *playing) end(data schemas.Payload) { p.l.tell(p.e.Next(data, nil)) }

// now is a recorded event as one of the call of now.
func (p *playing) now(then schemas.Event) schemas.Event {
	shift := p.e.Stored.Sub(at(p.t.first))
	moved := func(t time.Time) time.Time {
		if t.IsZero() {
			return t
		}
		return t.Add(shift)
	}
	data := then.Data
	switch d := data.(type) {
	case *schemas.Held:
		c := *d
		c.RequestedSeq, c.RequestedAt, c.Expires = p.e.Seq, p.e.Stored, moved(d.Expires)
		data = &c
	case *schemas.Tasked:
		c := *d
		c.RequestedAt, c.Until = p.e.Stored, moved(d.Until)
		data = &c
	case *schemas.Failed:
		c := *d
		data = &c
	}
	e := p.e.Next(data, p.body(then))
	if then.ToTask() {
		e = e.Task()
	}
	return e
}

// body is what was said, with the names that the call has now.
func (p *playing) body(then schemas.Event) []byte {
	b := then.Body
	if p.t.d.Stream {
		b = bytes.ReplaceAll(b, []byte(then.Call), []byte(p.e.Call))
	}
	if p.token == nil || bytes.Equal(p.token, p.was) || !bytes.Contains(b, []byte("notifications/progress")) {
		return b
	}
	m, err := jsonrpc.Decode(b, limits)
	if err != nil || m.Method() != "notifications/progress" {
		return b
	}
	token := m.Params().Get("progressToken")
	if !bytes.Equal(token.Raw(), p.was) {
		return b
	}
	if out := m.Patch().Replace(token, p.token).Bytes(); out != nil {
		return out
	}
	return b
}

// beside tells a session what was told of no call.
func (l *Log) beside(r *run) {
	for _, c := range l.tape.side {
		if !l.until(l.life, r.stop, func() bool { return r.reached >= c.after }) {
			return
		}
		live, then := l.when(r, c.after)
		l.pause(live, at(c.e).Sub(then), r.stop)
		// What calls had told by then has been told.
		if !l.until(l.life, r.stop, func() bool {
			for _, p := range l.playing {
				if p.r == r && p.at < c.e.Seq {
					return false
				}
			}
			return true
		}) {
			return
		}
		data := c.e.Data
		if d, ok := data.(*schemas.Connected); ok {
			// Nobody may go on with a session that was at a server then.
			data = &schemas.Connected{Server: d.Server, Revision: d.Revision, By: Replayed + d.By}
		}
		e := r.session.Next(data, c.e.Body)
		e.Time = time.Time{}
		l.tell(e)
	}
}

// Replayed begins the By of connections that were opened then.
const Replayed = "then-"
