package edge

import (
	"errors"
	"net/http"
	"sync"
	"time"

	"waybill.dev/schemas/sse"
)

// StreamOptions of a [Stream].
type StreamOptions struct {
	Patience  time.Duration // open the stream when nothing was sent for so long; 0: do not open it unasked
	KeepAlive time.Duration // a comment when nothing was sent for so long; 0: none

	// First is asked for the event that a stream begins with, once, before its
	// header is written; nil, and a nil function: none.
	First func() *sse.Event

	// Lost is told, once, that the client cannot be written to any more. It
	// must not call the stream.
	Lost func(error)
}

// ErrStreamStopped is returned for what is sent after a stream's end.
var ErrStreamStopped = errors.New("stream has stopped")

// Stream answers a request with server-sent events, if it comes to that: until
// the first event nothing is written, and the caller may still answer with
// something else. Between events it keeps the connection alive by itself.
//
// Send may be called from any goroutine. Each event is written, under the
// server's write deadline, and flushed before it returns. A stream must be
// stopped before its handler returns; from then on its timer touches nothing.
type Stream struct {
	o StreamOptions

	mu      sync.Mutex // guards what follows, and w
	w       http.ResponseWriter
	rc      *http.ResponseController
	timer   *time.Timer
	opened  bool
	stopped bool
	err     error // of the first failed write; final
	buf     []byte
}

// NewStream prepares a stream and starts its timer.
func NewStream(w http.ResponseWriter, o StreamOptions) *Stream {
	s := &Stream{o: o, w: w, rc: http.NewResponseController(w)}
	if o.Patience > 0 {
		s.mu.Lock() // the timer may fire before it is assigned
		s.timer = time.AfterFunc(o.Patience, s.tick)
		s.mu.Unlock()
	}
	return s
}

// Open begins the answer, if that has not happened yet.
func (s *Stream) Open() error { return s.write(nil) }

// Send writes one event, and begins the answer before if need be. It returns
// the error of the first write that failed, and [ErrStreamStopped] after Stop.
func (s *Stream) Send(e sse.Event) error { return s.write(&e) }

func (s *Stream) write(e *sse.Event) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.stopped {
		return ErrStreamStopped
	}
	return s.put(e)
}

// put writes with mu held.
func (s *Stream) put(e *sse.Event) error {
	if s.err != nil {
		return s.err
	}
	s.buf = s.buf[:0]
	if !s.opened {
		s.opened = true
		if s.o.First != nil {
			if first := s.o.First(); first != nil {
				s.buf = sse.Append(s.buf, *first)
			}
		}
		h := s.w.Header()
		h["Content-Type"] = streamType
		h["X-Accel-Buffering"] = noBuffering
		s.w.WriteHeader(http.StatusOK)
	}
	if e != nil && (len(s.buf) == 0 || !isBare(e)) {
		s.buf = sse.Append(s.buf, *e)
	}
	if len(s.buf) > 0 {
		if _, err := s.w.Write(s.buf); err != nil {
			return s.fail(err)
		}
		if cap(s.buf) > 64<<10 {
			s.buf = nil // one large event, and then perhaps an hour of small ones
		}
	}
	if err := s.rc.Flush(); err != nil && !errors.Is(err, http.ErrNotSupported) {
		return s.fail(err)
	}
	s.rearm()
	return nil
}

// isBare tells whether e is a bare comment, which says nothing once something
// else stands before it.
func isBare(e *sse.Event) bool {
	return e.ID == "" && !e.HasID && e.Name == "" && e.Data == nil && e.Retry == 0 && e.Comment == ""
}

var (
	streamType = []string{"text/event-stream"}
	// Asks a reverse proxy in front (nginx) to pass each event on at once.
	noBuffering = []string{"no"}
)

func (s *Stream) fail(err error) error {
	s.err = err
	if s.timer != nil {
		s.timer.Stop()
	}
	if s.o.Lost != nil {
		s.o.Lost(err)
	}
	return err
}

// rearm starts the time to the next keep-alive, with mu held.
func (s *Stream) rearm() {
	switch {
	case s.o.KeepAlive <= 0:
		if s.timer != nil {
			s.timer.Stop()
		}
	case s.timer == nil:
		s.timer = time.AfterFunc(s.o.KeepAlive, s.tick)
	default:
		s.timer.Reset(s.o.KeepAlive)
	}
}

// tick is the timer's: a first comment opens the stream, a later one keeps it.
func (s *Stream) tick() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.stopped {
		_ = s.put(&sse.Event{}) // a bare comment; the error is kept and Lost was told
	}
}

// Last ends the stream with one more event, if it has been opened, and stops
// it; it tells whether it had been. If not, nothing was written and nothing
// will be, and the caller answers in another way.
func (s *Stream) Last(e *sse.Event) (opened bool, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.stopped {
		return s.opened, ErrStreamStopped
	}
	if s.opened && e != nil {
		err = s.put(e)
	}
	s.stop()
	return s.opened, err
}

// Stop ends the stream without another word. It may be called more than once.
func (s *Stream) Stop() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.stop()
}

func (s *Stream) stop() {
	s.stopped = true
	if s.timer != nil {
		s.timer.Stop()
	}
}
