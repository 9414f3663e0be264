package dispatch

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"time"

	"github.com/cenkalti/backoff/v4"
	"golang.org/x/time/rate"

	"waybill.dev/schemas/jsonrpc"
	"waybill.dev/schemas/sse"
)

// maxRash is how many sessions lost in a row make the pause before the next longer.
const maxRash = 16

// maxGarbage is how many messages of a session's stream that cannot be read are
// passed over before the connection is given up.
const maxGarbage = 16

// What a server may say on a session's stream, which nobody has asked for: the
// log keeps it and has an end. Beyond that it is read no faster, so that the
// server waits and nothing is lost.
const (
	paceRate    = 256 << 10 // bytes a second, in the long run
	paceBurst   = 8 << 20
	paceMessage = 1 << 10 // that a message counts for beside its own
)

// listener follows a session's own stream, on which the server speaks outside of
// calls. It belongs to one goroutine and holds one connection, beside what the
// limits of the server count: it lives as long as the session, of which there
// are at most Options.MaxSessions. It reads on when the log has what it read,
// so that a server that floods it waits; one message is in memory at a time.
type listener struct {
	s     *session
	ctx   context.Context // of run
	last  string          // event ID
	retry time.Duration
	pace  *rate.Limiter
	was   bool // there has been a stream
	moved bool // a message was stored since the stream was asked for
}

// listen begins to follow the session's stream, if nobody does.
func (s *session) listen() {
	s.alone(func() {
		l := &listener{s: s, pace: rate.NewLimiter(s.t.timing.pace, paceBurst)}
		s.own(l.run)
	})
}

// alone runs what listens for the session to its end, unless something does already.
func (s *session) alone(listen func()) {
	s.mu.Lock()
	was := s.listening
	s.listening = true
	s.mu.Unlock()
	if !was {
		s.t.spawn(func() {
			listen()
			s.mu.Lock()
			s.listening = false
			s.mu.Unlock()
		})
	}
}

// errNoStream: the server has none, or will not give it.
var errNoStream = errors.New("the session has no stream of its own")

// run follows the stream until ctx is done, or there is none to be followed any
// more, which is true.
func (l *listener) run(ctx context.Context) bool {
	l.ctx = ctx
	t := l.s.t.timing
	pauses := backoff.NewExponentialBackOff(
		backoff.WithInitialInterval(t.pause), backoff.WithMultiplier(2), backoff.WithMaxInterval(t.rest), backoff.WithMaxElapsedTime(0))
	if l.s.shared() || l.was {
		// Another may have listened before.
		err := l.s.patiently(ctx, func() error {
			last, err := l.s.lastEvent(ctx)
			if last != "" {
				l.last, l.was = last, true
			}
			return err
		})
		if err != nil && ctx.Err() == nil {
			l.s.log().Warn("where another stopped listening is not known: what was said since may be missed", "error", err)
		}
	}
	for range min(l.s.rash, maxRash) {
		pauses.NextBackOff()
	}
	for {
		l.moved = false
		err := l.once()
		switch {
		case ctx.Err() != nil || errors.Is(err, errNoStream):
			if ctx.Err() == nil {
				l.s.log().Debug("not listening to the server", "why", err)
				l.s.guest.streams(false)
			}
			return l.s.ctx.Err() != nil || errors.Is(err, errNoStream)
		case errors.Is(err, errLost):
			// It is opened again at once, and where that fails, later: a client may do
			// nothing but listen. A server that loses one after the other is given
			// longer and longer.
			if l.s.rash > 0 && !pause(ctx, pauses.NextBackOff()) {
				return false
			}
			_, again := l.s.t.again(l.s.t.ctx, l.s)
			if f := new(Fault); again == nil || l.s.t.ctx.Err() != nil || errors.As(again, &f) && f.Kind == Invalid {
				return true
			}
			l.s.log().Warn("a session that the server lost is not open again yet", "error", again)
			l.s.guest.streams(false)
		}
		if l.moved {
			pauses.Reset()
		}
		l.s.log().Debug("the server's stream ended, asking for it again", "why", err)
		if !pause(ctx, max(pauses.NextBackOff(), min(l.retry, t.retry))) {
			return false
		}
	}
}

// share notes that another process has listened to the session's stream, or does.
func (s *session) share() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.elsewhere = true
}

// shared tells whether another process may have listened to the session's stream.
func (s *session) shared() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.openedBy != s.by || s.elsewhere
}

// unknown asks the server whether it does not know the session, which may be why it
// gives no stream. With an error nobody knows.
func (s *session) unknown(ctx context.Context) (bool, error) {
	ctx, cancel := context.WithTimeout(ctx, s.t.timing.answer)
	defer cancel()
	err := s.tell(ctx, []byte(`{"jsonrpc":"2.0","id":"`+s.number()+`","method":"ping"}`))
	if f := new(Fault); errors.As(err, &f) && f.Kind != Garbled {
		return false, err // nobody knows
	}
	return errors.Is(err, errLost), nil
}

// once asks for the stream and reads it to its end.
func (l *listener) once() error {
	s := l.s
	resp, err := s.get(l.ctx, l.last)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	resumed := l.last != ""
	if !eventStream(resp) {
		switch code := resp.StatusCode; {
		case code == http.StatusConflict, code == http.StatusTooManyRequests, code == http.StatusRequestTimeout, code >= 500 && code != http.StatusNotImplemented:
			return fmt.Errorf("HTTP %d", code)
		case code == http.StatusNotFound, code == http.StatusBadRequest:
			// A server that has no such stream may say so too, in which case
			// there has never been one.
			gone, err := s.gone(resp, "")
			if gone && !l.was {
				if gone = s.shared(); gone {
					gone, err = s.unknown(l.ctx)
				}
			}
			if err != nil {
				return err
			} else if gone {
				return errLost
			}
			if resumed { // it may be the event that it does not know
				l.last = ""
				return fmt.Errorf("HTTP %d", code)
			}
		}
		if l.was { // so there is one, which will be given again
			return fmt.Errorf("HTTP %d", resp.StatusCode)
		}
		return fmt.Errorf("%w: HTTP %d", errNoStream, resp.StatusCode)
	}
	l.was = true
	s.guest.streams(true)
	garbage := 0
	for event, err := range sse.Read(resp.Body, 2*int(s.m.maxAnswer)) {
		if errors.Is(err, sse.ErrTooLarge) {
			// With what came before it would come again, for ever.
			l.last = ""
			s.log().Error("a message of the server is lost: it is too large")
		}
		if err != nil {
			return err
		}
		if o := s.t.opt.Owners; o != nil && !o.Holds() {
			return errors.New("another may listen by now")
		}
		if event.Retry != 0 {
			l.retry = max(event.Retry, 0)
		}
		id := event.ID != "" && len(event.ID) <= maxEventID && headerValue(event.ID)
		known := id && resumed && s.knows(event.ID)
		if len(event.Data) > 0 && (event.Name == "" || event.Name == "message") && !known {
			eventID := ""
			if id {
				eventID = event.ID
			}
			msg, err := jsonrpc.Decode(event.Data, jsonrpc.Limits{Bytes: int(s.m.maxAnswer), Depth: answerDepth, AllowCaseVariants: true})
			switch {
			case err != nil:
				if garbage++; garbage == 1 && !resumed {
					s.log().Warn("a message of the server's stream cannot be read and is left out", "error", err)
				}
				err = nil
				if garbage == maxGarbage {
					err = errors.New("too many messages cannot be read")
				}
			case msg.IsRequest():
				err = s.ask(s.ctx, s.base, msg, eventID)
			case msg.IsNotification():
				err = s.notify(msg, eventID)
			}
			if err == nil {
				err = l.pace.WaitN(l.ctx, min(len(event.Data)+paceMessage, paceBurst))
			}
			if err != nil {
				// The event ID stays what it was, so that the message comes
				// again if the server can repeat it.
				return fmt.Errorf("a message of the server's stream: %w", err)
			}
			l.moved = l.moved || garbage == 0
		}
		if id {
			s.saw(event.ID)
			l.last = event.ID
		}
	}
	return errCut
}
