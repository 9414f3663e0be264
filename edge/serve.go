package edge

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"os"
	"runtime/debug"
	"strconv"
	"sync/atomic"
	"time"
)

// Shared between all answers; nobody may change a header value in place.
var (
	noStore  = []string{"no-store"}
	nosniff  = []string{"nosniff"}
	jsonType = []string{"application/json"}
	closing  = []string{"close"}
)

// ServeHTTP is the way in for every request, whatever its path.
func (s *Server) ServeHTTP(hw http.ResponseWriter, r *http.Request) {
	w := &response{ResponseWriter: hw, rc: http.NewResponseController(hw), timeout: s.o.WriteTimeout}
	defer s.recovered(w, r)

	// From here until the body has come, or the server has thrown the rest of
	// a refused one away.
	_ = w.rc.SetReadDeadline(time.Now().Add(s.o.BodyTimeout))
	w.extend()

	h := w.Header()
	h["Cache-Control"] = noStore
	h["X-Content-Type-Options"] = nosniff
	if len(r.TransferEncoding) > 0 {
		// There may have been a Content-Length beside it, which net/http
		// drops without a word. Somebody in front who went by that takes
		// what follows on the connection for the rest of this request, and
		// we would take it for another (RFC 9112 §6.1).
		h["Connection"] = closing
	}
	f := s.checkHost(r)
	if !f.yes() {
		f = s.checkOrigin(r)
	}
	if f.yes() {
		s.refuse(w, r, Route{}, f)
		return
	}
	s.mux.ServeHTTP(&muxWriter{response: w, s: s, r: r}, r)
}

// serve takes a request for a route through the rest of the gates.
func (s *Server) serve(hw http.ResponseWriter, r *http.Request, route Route) {
	w := hw.(*muxWriter).response
	select {
	case <-s.draining:
		retryAfter(w, 1)
		s.refuse(w, r, route, refusal{http.StatusServiceUnavailable, CauseDraining, "the gateway is shutting down: try again"})
		return
	default:
	}
	p, f := s.who(w, r)
	if !f.yes() {
		f = checkContent(r)
	}
	if f.yes() {
		s.refuse(w, r, route, f)
		return
	}
	leave, f := s.enter(w, p, route)
	if f.yes() {
		s.refuse(w, r, route, f)
		return
	}
	defer leave()
	taken, f := s.reserve(w, r, p)
	if f.yes() {
		s.refuse(w, r, route, f)
		return
	}
	defer func() { taken.shrink(0) }()
	body, f := s.readBody(w, r)
	if f.yes() {
		s.refuse(w, r, route, f)
		return
	}
	taken.shrink(int64(len(body)))
	// The connection is read on from here only to see the client leave.
	_ = w.rc.SetReadDeadline(time.Time{})
	r.Body = &whole{*bytes.NewReader(body), body}
	route.Serve(w, r, p)
}

// enter counts a call in; leave counts it out. Only tenants with a principal
// come this far, and each of them has a counter.
func (s *Server) enter(w http.ResponseWriter, p Principal, route Route) (leave func(), f refusal) {
	if route.Stream {
		return s.enterStream(w, p)
	}
	if s.stats.inFlight.Add(1) > int64(s.o.MaxInFlight) {
		s.stats.inFlight.Add(-1)
		retryAfter(w, 1)
		return nil, refusal{http.StatusServiceUnavailable, CauseInFlight, fmt.Sprintf("the gateway has %d calls in flight and takes no more: try again", s.o.MaxInFlight)}
	}
	mine := &s.tenants[p.Tenant].inFlight
	if mine.Add(1) > int64(s.o.MaxInFlightTenant) {
		mine.Add(-1)
		s.stats.inFlight.Add(-1)
		retryAfter(w, 1)
		return nil, refusal{http.StatusTooManyRequests, CauseInFlightTenant, fmt.Sprintf("the tenant %s has %d calls in flight, its limit: try again when one has ended", p.Tenant, s.o.MaxInFlightTenant)}
	}
	return func() {
		mine.Add(-1)
		s.stats.inFlight.Add(-1)
		s.stats.served.Add(1)
	}, refusal{}
}

// enterStream counts a stream in, as enter does a call.
func (s *Server) enterStream(w http.ResponseWriter, p Principal) (leave func(), f refusal) {
	if s.stats.streams.Add(1) > int64(s.o.MaxStreams) {
		s.stats.streams.Add(-1)
		retryAfter(w, 5)
		return nil, refusal{http.StatusServiceUnavailable, CauseStreams, fmt.Sprintf("the gateway has %d streams open and takes no more: try again", s.o.MaxStreams)}
	}
	mine := &s.tenants[p.Tenant].streams
	if mine.Add(1) > int64(s.o.MaxStreamsTenant) {
		mine.Add(-1)
		s.stats.streams.Add(-1)
		retryAfter(w, 5)
		return nil, refusal{http.StatusTooManyRequests, CauseStreamsTenant, fmt.Sprintf("the tenant %s has %d streams open, its limit: try again when one has ended", p.Tenant, s.o.MaxStreamsTenant)}
	}
	return func() {
		mine.Add(-1)
		s.stats.streams.Add(-1)
		s.stats.served.Add(1)
	}, refusal{}
}

// reserve takes the bytes that the body will have, before any of it is read.
func (s *Server) reserve(w http.ResponseWriter, r *http.Request, p Principal) (share, refusal) {
	n := r.ContentLength
	switch {
	case n == 0:
		return share{}, refusal{}
	case n > s.o.MaxBody:
		return share{}, s.tooLarge()
	case n < 0: // chunked
		n = s.o.MaxBody
	}
	taken, ok, ofTenant := s.take(s.tenants[p.Tenant], n)
	if ok {
		return taken, refusal{}
	}
	retryAfter(w, 1)
	if ofTenant {
		return share{}, refusal{http.StatusTooManyRequests, CauseBodyBudgetTenant, fmt.Sprintf("the bodies of the calls that the tenant %s has in flight leave no room for this one, of %d bytes in all: try again when one has ended", p.Tenant, s.o.MaxBodiesTenant)}
	}
	return share{}, refusal{http.StatusServiceUnavailable, CauseBodyBudget, fmt.Sprintf("the bodies of the calls in flight leave no room for this one, of %d bytes in all: try again", s.o.MaxBodies)}
}

// readBody reads the body whole, within what [Server.reserve] took and
// BodyTimeout.
func (s *Server) readBody(w http.ResponseWriter, r *http.Request) ([]byte, refusal) {
	if r.ContentLength == 0 {
		return nil, refusal{}
	}
	// A length that is only promised buys no memory. Once the beginning has
	// come the rest gets its place in one piece: a buffer that doubles would
	// take, with what it leaves behind, several times the body.
	const beginning = 64 << 10
	buf := bytes.NewBuffer(make([]byte, 0, min(max(r.ContentLength+bytes.MinRead, 1<<10), beginning+bytes.MinRead)))
	in := http.MaxBytesReader(w, r.Body, s.o.MaxBody)
	_, err := buf.ReadFrom(io.LimitReader(in, beginning))
	if err == nil && buf.Len() == beginning {
		if rest := r.ContentLength - beginning; rest > 0 {
			buf.Grow(int(rest) + bytes.MinRead)
		}
		_, err = buf.ReadFrom(in)
	}
	var over *http.MaxBytesError
	switch {
	case err == nil:
		return buf.Bytes(), refusal{}
	case errors.As(err, &over):
		return nil, s.tooLarge()
	case errors.Is(err, os.ErrDeadlineExceeded):
		return nil, refusal{http.StatusRequestTimeout, CauseBodyTimeout, fmt.Sprintf("the body did not come within %s", s.o.BodyTimeout)}
	case errors.Is(err, io.ErrUnexpectedEOF), errors.Is(err, io.EOF):
		return nil, refusal{http.StatusBadRequest, CauseBody, "the body ended before it was complete"}
	}
	return nil, refusal{http.StatusBadRequest, CauseBody, "the body cannot be read"}
}

func (s *Server) tooLarge() refusal {
	return refusal{http.StatusRequestEntityTooLarge, CauseBodySize, fmt.Sprintf("the body may have at most %d bytes", s.o.MaxBody)}
}

// refuse answers instead of the adapter.
func (s *Server) refuse(w http.ResponseWriter, r *http.Request, route Route, f refusal) {
	s.stats.refused[f.cause].Add(1)
	if s.o.Log.Enabled(r.Context(), slog.LevelDebug) {
		s.o.Log.Debug("refused", "cause", f.cause, "status", f.status, "path", cut(r.URL.Path), "remote", r.RemoteAddr)
	}
	if r.ContentLength != 0 {
		// The body has not been read to its end, so nobody knows where the
		// next request would begin without reading what was just refused.
		w.Header().Set("Connection", "close")
	}
	var body []byte
	if route.Refuse != nil {
		body = route.Refuse(f.status, f.cause, f.message)
	} else {
		body = plainError(f.cause.String(), f.message)
	}
	WriteJSON(w, f.status, body)
}

func plainError(code, message string) []byte {
	type e struct {
		Code    string `json:"code"`
		Message string `json:"message"`
	}
	body, _ := json.Marshal(map[string]e{"error": {code, message}}) // two strings: cannot fail
	return body
}

func retryAfter(w http.ResponseWriter, seconds int) {
	w.Header().Set("Retry-After", strconv.Itoa(seconds))
}

// WriteJSON writes a whole JSON answer. A client that is gone is no error: its
// call has ended, and that is stored.
func WriteJSON(w http.ResponseWriter, status int, body []byte) {
	h := w.Header()
	h["Content-Type"] = jsonType
	h["Content-Length"] = []string{strconv.Itoa(len(body))}
	w.WriteHeader(status)
	_, _ = w.Write(body)
}

// Body returns the body of a request that was given to a [Route], without
// copying it. It belongs to the route.
func Body(r *http.Request) []byte {
	if b, ok := r.Body.(*whole); ok {
		return b.raw
	}
	return nil
}

// whole is a request body that has been read.
type whole struct {
	bytes.Reader
	raw []byte
}

func (*whole) Close() error { return nil }

// recovered turns a panic of a handler into a 500, or, when the answer had
// begun, into a broken connection: a client must not take half an answer for a
// whole one.
func (s *Server) recovered(w *response, r *http.Request) {
	p := recover()
	if p == nil {
		return
	}
	if err, ok := p.(error); ok && errors.Is(err, http.ErrAbortHandler) {
		panic(http.ErrAbortHandler)
	}
	s.stats.panics.Add(1)
	s.o.Log.Error("handler panicked", "panic", p, "method", r.Method, "path", cut(r.URL.Path), "stack", string(debug.Stack()))
	if w.begun.Load() {
		panic(http.ErrAbortHandler)
	}
	clear(w.Header())
	w.Header()["Cache-Control"] = noStore
	WriteJSON(w, http.StatusInternalServerError, plainError("internal", "the gateway failed at this request and has logged why"))
}

// response sets a deadline for each write, and knows whether anything was
// written.
type response struct {
	http.ResponseWriter
	rc      *http.ResponseController
	timeout time.Duration
	begun   atomic.Bool
}

func (w *response) extend() { _ = w.rc.SetWriteDeadline(time.Now().Add(w.timeout)) }

func (w *response) WriteHeader(status int) {
	w.begun.Store(true)
	w.extend()
	w.ResponseWriter.WriteHeader(status)
}

func (w *response) Write(b []byte) (int, error) {
	w.begun.Store(true)
	w.extend()
	return w.ResponseWriter.Write(b)
}

func (w *response) FlushError() error {
	w.extend()
	return w.rc.Flush()
}

// Unwrap is for [http.ResponseController].
func (w *response) Unwrap() http.ResponseWriter { return w.ResponseWriter }

// muxWriter turns the text with which [http.ServeMux] answers by itself, to a
// method that a path does not have and to paths it would rather see cleaned,
// into JSON. A route never writes to it, but to the response inside.
type muxWriter struct {
	*response
	s    *Server
	r    *http.Request
	done bool
}

func (w *muxWriter) WriteHeader(status int) {
	w.done = true
	f := refusal{status, CausePath, "nothing is served at this path"}
	switch status {
	case http.StatusBadRequest: // OPTIONS *
		f.status = http.StatusNotFound
	case http.StatusMethodNotAllowed:
		f = refusal{status, CauseMethod, fmt.Sprintf("the method %s is not served at this path", cut(w.r.Method))}
	case http.StatusMovedPermanently, http.StatusTemporaryRedirect, http.StatusPermanentRedirect:
		f.message = "the path must be written in its clean form"
		f.status = http.StatusNotFound
		w.Header().Del("Location")
	}
	w.s.refuse(w.response, w.r, Route{}, f)
}

func (w *muxWriter) Write(b []byte) (int, error) {
	if !w.done {
		return w.response.Write(b)
	}
	return len(b), nil
}
