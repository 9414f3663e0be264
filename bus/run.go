package bus

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"waybill.dev/schemas"
)

// Work is one kind of work: a durable consumer, shared by all processes that
// run the same name.
type Work struct {
	Name     string         // of the durable consumer
	Kinds    []schemas.Kind // what it handles
	InFlight int            // handlers at once, over all processes; default 256. The rest waits in the log
	Drain    time.Duration  // how long handlers may finish after ctx is done; default 10 s
	Up       func(bool)     // told when the work begins and when it is interrupted; may be nil
}

// deliveries is how often a handler may fail on one event before it is put
// among the dead letters and its call is ended.
const deliveries = 8

// patience multiplies that where the log itself is what failed and may be back
// soon, and where the deliveries may have been to processes that died.
const patience = 10

// Run gives every event of the work's kinds to the handler, each at least
// once, and acknowledges it when the handler has returned nil. Work that runs
// longer than the AckWait is kept alive; work of a process that died is given
// to another. Run blocks until ctx is done and the handlers have returned.
//
// What cannot be decoded, and what a handler keeps failing on, is stored as a
// dead letter (DEAD, dead.<name>) and its call ends as failed, so that
// nobody waits for it.
func (l *Log) Run(ctx context.Context, w Work, h schemas.Handler) error {
	if w.InFlight == 0 {
		w.InFlight = 256
	}
	if w.Drain == 0 {
		w.Drain = 10 * time.Second
	}
	subjects, err := Filter{Kinds: w.Kinds}.subjects()
	if err != nil {
		return err
	}
	r := &runner{
		l: l, w: w, h: h, busy: map[jetstream.Msg]bool{},
		next: make(chan jetstream.Msg), spare: make(chan struct{}, spareHandlers),
	}
	work, stop := context.WithCancel(context.WithoutCancel(ctx))
	defer stop()

	var beats sync.WaitGroup
	beats.Go(func() { r.beat(work) })
	defer beats.Wait()
	defer stop()

	for ctx.Err() == nil {
		c, err := l.js.CreateOrUpdateConsumer(ctx, events, jetstream.ConsumerConfig{
			Durable:        w.Name,
			FilterSubjects: subjects,
			AckPolicy:      jetstream.AckExplicitPolicy,
			AckWait:        l.o.AckWait,
			MaxAckPending:  w.InFlight,
			MaxDeliver:     -1,
		})
		if err == nil {
			err = r.consume(ctx, work, c)
		}
		if ctx.Err() == nil && err != nil {
			l.o.Log.Warn("consumer interrupted, opening it again", "work", w.Name, "error", err)
			pause(ctx, 250*time.Millisecond)
		}
	}
	done := make(chan struct{})
	go func() { r.handlers.Wait(); close(done) }()
	select {
	case <-done:
	case <-time.After(w.Drain):
		stop() // a handler that is cut off returns an error; its event is delivered again
		<-done
	}
	return nil
}

// runner is the state of one Run.
type runner struct {
	l *Log
	w Work
	h schemas.Handler

	handlers sync.WaitGroup
	next     chan jetstream.Msg // to a goroutine that has handled one and waits for another
	spare    chan struct{}      // one for each that waits

	mu   sync.Mutex
	busy map[jetstream.Msg]bool // true once a heartbeat has passed over it
}

// consume pulls until ctx is done or the consumer is lost.
func (r *runner) consume(ctx, work context.Context, c jetstream.Consumer) error {
	// What is pulled is handled at once: MaxAckPending bounds it for all.
	it, err := c.Messages(jetstream.PullMaxMessages(min(r.w.InFlight, 512)), jetstream.PullExpiry(5*time.Second))
	if err != nil {
		return err
	}
	defer it.Stop()
	if r.w.Up != nil {
		r.w.Up(true)
		defer r.w.Up(false)
	}
	defer context.AfterFunc(ctx, it.Stop)()
	for {
		m, err := it.Next()
		switch {
		case err == nil:
		case ctx.Err() != nil || errors.Is(err, jetstream.ErrMsgIteratorClosed):
			return nil
		case errors.Is(err, jetstream.ErrNoHeartbeat) && r.l.nc.IsConnected():
			continue
		default:
			return err
		}
		r.mu.Lock()
		r.busy[m] = false
		r.mu.Unlock()
		select {
		case r.next <- m:
		default:
			r.handlers.Go(func() { r.keep(ctx, work, m) })
		}
	}
}

// spareHandlers is how many goroutines wait for the next event. One that has
// handled an event has the stack for it; a new one has to grow it.
const spareHandlers = 64

// keep handles m and then others, until ctx is done or enough others wait.
func (r *runner) keep(ctx, work context.Context, m jetstream.Msg) {
	for {
		r.handle(work, m)
		select {
		case r.spare <- struct{}{}:
		default:
			return
		}
		select {
		case m = <-r.next:
			<-r.spare
		case <-ctx.Done():
			return
		}
	}
}

// beat tells the server which events are still being worked on.
func (r *runner) beat(ctx context.Context) {
	for pause(ctx, r.l.o.AckWait/4) {
		var late []jetstream.Msg
		r.mu.Lock()
		for m, seen := range r.busy {
			if seen {
				late = append(late, m)
			}
			r.busy[m] = true
		}
		r.mu.Unlock()
		for _, m := range late {
			if err := m.InProgress(); err != nil && !errors.Is(err, jetstream.ErrMsgAlreadyAckd) {
				r.l.o.Log.Warn("heartbeat", "work", r.w.Name, "error", err)
			}
		}
	}
}

// handle gives one message to the handler and settles it.
func (r *runner) handle(ctx context.Context, m jetstream.Msg) {
	defer func() {
		r.mu.Lock()
		delete(r.busy, m)
		r.mu.Unlock()
	}()
	e, md, err := decodeMsg(m)
	switch {
	case md == nil:
		err = m.Term() // no message of a stream: nothing to keep
	case err != nil:
		// A newer program may have begun what this one cannot read.
		code := schemas.FailUndecodable
		if _, _, kind, ok := parts(m.Subject()); !ok || kind == schemas.KindAuthorized {
			code = schemas.FailUnknown
		}
		err = r.bury(ctx, m, md, e, code, err)
	default:
		err = r.guarded(ctx, e)
		switch {
		case err == nil:
			err = m.Ack()
		case ctx.Err() != nil || errors.Is(err, schemas.ErrGivenBack):
			err = m.Nak() // shutting down: another takes it now
		case md.NumDelivered >= deliveries*patience, md.NumDelivered >= deliveries && !passing(err):
			// A call that was authorized may have been carried out.
			code := schemas.FailInternal
			if e.Kind() == schemas.KindAuthorized {
				code = schemas.FailUnknown
			}
			err = r.bury(ctx, m, md, e, code, err)
		default:
			r.l.o.Log.Warn("handler failed, event will be delivered again", "work", r.w.Name,
				"session", e.Session, "call", e.Call, "kind", e.Kind(), "delivery", md.NumDelivered, "error", err)
			err = m.NakWithDelay(again(r.l.o.AckWait, md.NumDelivered))
		}
	}
	if err != nil {
		// Not settled, so it will be delivered again; that is harmless.
		r.l.o.Log.Warn("settle event", "work", r.w.Name, "subject", m.Subject(), "error", err)
	}
}

// guarded runs the handler. A panic there is a fault of ours and must not
// take the other calls with it.
func (r *runner) guarded(ctx context.Context, e schemas.Event) (err error) {
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("handler panicked: %v", p)
		}
	}()
	return r.h(ctx, e, r.l.Publish)
}

// again is the pause before the next delivery to a handler that failed: from
// a 25th of the AckWait, doubling up to all of it.
func again(ackWait time.Duration, delivered uint64) time.Duration {
	return min(ackWait/50<<min(delivered, 6), ackWait)
}

// bury ends the call of a message that cannot be worked on, stores the message
// among the dead letters and takes it off the work. Until the ending is stored
// the message comes again; a dead letter that the log refuses for good is left
// out, as a place among the work in hand must not be lost to it.
func (r *runner) bury(ctx context.Context, m jetstream.Msg, md *jetstream.MsgMetadata, e schemas.Event, code schemas.Failure, cause error) error {
	r.l.o.Log.Error("dead letter", "work", r.w.Name, "seq", md.Sequence.Stream, "subject", m.Subject(), "error", cut(cause.Error()))
	if e.Data == nil {
		e = salvage(m)
	}
	if e.Call != "" {
		end := e.Next(&schemas.Failed{Code: code, Detail: cut(cause.Error())}, nil)
		switch is, err := r.isTask(ctx, m, md, e); {
		case err != nil:
			return errors.Join(err, m.NakWithDelay(r.l.o.AckWait))
		case is:
			end = end.Task()
		}
		if _, err := r.l.Publish(ctx, end); err != nil && !errors.Is(err, schemas.ErrInvalid) && !errors.Is(err, schemas.ErrTooLarge) {
			return errors.Join(err, m.NakWithDelay(r.l.o.AckWait))
		}
	}
	if err := r.l.bury(ctx, r.w.Name, m, md.Sequence.Stream, cause); err != nil {
		if passing(err) {
			return errors.Join(err, m.NakWithDelay(r.l.o.AckWait))
		}
		r.l.o.Log.Error("dead letter not stored", "work", r.w.Name, "seq", md.Sequence.Stream, "error", err)
	}
	return m.Term()
}

// isTask tells whether the call of a message is a task by now. Then no edge waits
// for its ending: who asks how the task stands reads what is addressed to it.
func (r *runner) isTask(ctx context.Context, m jetstream.Msg, md *jetstream.MsgMetadata, e schemas.Event) (bool, error) {
	if _, _, kind, ok := parts(m.Subject()); !ok || kind != schemas.KindAuthorized {
		return false, nil // nobody has begun it
	}
	if a, ok := e.Data.(*schemas.Authorized); ok && a.TaskUntil.IsZero() {
		return false, nil // its client takes none for an answer
	}
	e.Seq = md.Sequence.Stream // which one that cannot be read has not
	past, err := r.l.Past(ctx, e)
	if err != nil {
		return false, err
	}
	return slices.ContainsFunc(past, func(e schemas.Event) bool { return e.Data != nil && e.Kind() == schemas.KindTasked }), nil
}

// What of a message goes into its dead letter: the rest can be read at its
// sequence, as long as that is there.
const (
	deadBody   = 64 << 10
	deadHeader = 32 << 10
)

// bury stores a message under dead.<name>.
func (l *Log) bury(ctx context.Context, name string, m jetstream.Msg, seq uint64, cause error) error {
	letter := nats.NewMsg("dead." + name)
	if len(m.Data()) <= deadBody {
		letter.Data = m.Data()
	}
	for k, v := range m.Headers() {
		if len(k)+len(strings.Join(v, "")) <= deadHeader/4 {
			letter.Header["Dead-"+k] = v
		}
	}
	if size := len(m.Headers().Get(headerEnvelope)); size <= deadHeader {
		letter.Header.Set("Dead-"+headerEnvelope, m.Headers().Get(headerEnvelope))
	}
	letter.Header.Set("Dead-Subject", m.Subject())
	letter.Header.Set("Dead-Sequence", fmt.Sprint(seq))
	letter.Header.Set("Dead-Cause", cut(cause.Error()))
	letter.Header.Set(jetstream.MsgIDHeader, fmt.Sprintf("dead/%s/%d", name, seq))
	if _, err := l.js.PublishMsg(ctx, letter); err != nil {
		return fmt.Errorf("store dead letter of sequence %d: %w", seq, err)
	}
	return nil
}

// cut shortens a text that goes into an envelope or a header. What others said
// may be in it.
func cut(text string) string {
	const most = 500
	text = strings.Map(func(r rune) rune {
		if r < ' ' || r == 0x7f {
			return ' '
		}
		return r
	}, strings.ToValidUTF8(text, "�"))
	if len(text) <= most {
		return text
	}
	return strings.ToValidUTF8(text[:most], "") + "…"
}
