package dispatch

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"time"

	"github.com/cenkalti/backoff/v4"

	"waybill.dev/schemas"
	"waybill.dev/schemas/jsonrpc"
)

// What a server without sessions has to say outside of calls it says to who
// listens: to a request subscriptions/listen that names what is wanted, and
// whose answer is a stream. So for each session there is one such stream, of
// what the server offers and the resources that the client has subscribed to.
// When these change another takes its place, once the server has acknowledged
// that. For a moment both are heard, so that nothing is missed, and what comes
// on both is told once: such messages say that something is not any more what
// it was, and the later of two that are alike says all.

const (
	// overlap is how long the stream that was replaced is heard after the server
	// has acknowledged the other: what it said before is on its way.
	overlap = 100 * time.Millisecond

	maxLater = 256 // messages of a stream that was replaced, held until the overlap is over
)

// hearing is one stream of a session.
type hearing struct {
	uris []string // that it asks for, sorted
	stop context.CancelFunc
	ack  chan struct{} // closed when it is acknowledged
	done chan struct{} // closed when it has ended

	// Guarded by the session's mu.
	replaced bool     // another has taken its place
	later    [][]byte // what has come since

	granted map[string]bool // of uris; fixed once ack is closed
	nothing bool            // nothing at all was granted; likewise
	err     error           // why it ended; fixed once done is closed. nil: the server has ended it
	answer  Answer          // the error with which it did; likewise
}

func (h *hearing) alive() bool {
	select {
	case <-h.done:
		return false
	default:
		return true
	}
}

// attend begins to listen for the session, if nobody does.
func (s *session) attend() { s.alone(s.attending) }

// attending keeps a stream open for as long as the session lives.
func (s *session) attending() {
	t := s.t.timing
	pauses := backoff.NewExponentialBackOff(
		backoff.WithInitialInterval(t.pause), backoff.WithMultiplier(2), backoff.WithMaxInterval(t.rest), backoff.WithMaxElapsedTime(0))
	for {
		began := time.Now()
		h, err := s.tune(s.ctx)
		for err == nil && h != nil {
			select {
			case <-h.done:
			case <-s.ctx.Done():
				return
			}
			s.mu.Lock()
			now := s.solo.stream
			s.mu.Unlock()
			if now == h {
				err = h.err
				break
			}
			h = now
		}
		switch {
		case s.ctx.Err() != nil:
			return
		case h == nil && err == nil || errors.Is(err, errNoStream):
			select {
			case <-s.solo.news:
				pauses.Reset()
				continue
			case <-s.ctx.Done():
				return
			}
		}
		if time.Since(began) > t.rest {
			pauses.Reset() // it did live, so this is no server that always ends it
		}
		s.log().Debug("the server's stream ended, asking for it again", "why", err)
		if !pause(s.ctx, pauses.NextBackOff()) {
			return
		}
	}
}

// tune returns the stream that says what is wanted of the server now, which it
// opens if there is none; nil: nothing is wanted. The error is errNoStream where
// the server has none, or a *Fault.
func (s *session) tune(ctx context.Context) (*hearing, error) {
	g := s.solo
	select {
	case g.turn <- struct{}{}:
		defer func() { <-g.turn }()
	case <-ctx.Done():
		return nil, faultf(Broken, "waiting for another change of what is listened to: %w", context.Cause(ctx))
	}
	s.mu.Lock()
	known := g.known
	s.mu.Unlock()
	if !known {
		if err := s.inform(ctx); err != nil {
			return nil, err
		}
	}
	s.mu.Lock()
	was, offers := g.stream, g.offers
	uris := make([]string, 0, len(s.subscribed))
	for uri := range s.subscribed {
		uris = append(uris, uri)
	}
	s.mu.Unlock()
	slices.Sort(uris)
	if was != nil && was.alive() && slices.Equal(was.uris, uris) {
		return was, nil
	}
	if len(uris) == 0 && len(offers) == 0 {
		s.switchTo(nil)
		return nil, nil
	}
	h, err := s.hear(offers, uris)
	if err != nil {
		return nil, err
	}
	late := time.NewTimer(s.t.timing.open)
	defer late.Stop()
	err = nil
	select {
	case <-h.ack:
		s.switchTo(h)
		return h, nil
	case <-h.done:
		if err = h.err; err == nil {
			err = faultf(Garbled, "the server ended the stream without an acknowledgement")
		}
		return h, err
	case <-late.C:
		err = faultf(Broken, "the server has not acknowledged the stream")
	case <-ctx.Done():
		err = faultf(Broken, "the server has not acknowledged the stream: %w", context.Cause(ctx))
	}
	h.stop()
	return nil, err
}

// switchTo puts a stream into the place of the one before, which is heard a
// moment longer.
func (s *session) switchTo(h *hearing) {
	g := s.solo
	s.mu.Lock()
	was := g.stream
	g.stream = h
	if was != nil {
		was.replaced = true
		g.overlaps++
	}
	s.mu.Unlock()
	if was != nil && !s.t.spawn(func() { pause(s.ctx, s.t.timing.overlap); s.replace(was) }) {
		was.stop()
	}
}

// replace ends a stream that was replaced, and tells what came on it alone.
func (s *session) replace(was *hearing) {
	was.stop()
	<-was.done
	g := s.solo
	s.mu.Lock()
	var left [][]byte
	for _, raw := range was.later {
		if !g.fresh[string(raw)] {
			left = append(left, raw)
			s.freshen(raw) // it may come on the next as well
		}
	}
	was.later = nil
	if g.overlaps--; g.overlaps == 0 {
		g.fresh = nil
	}
	s.mu.Unlock()
	for _, raw := range left {
		if err := s.say(raw); err != nil {
			s.log().Error("a message of the server is lost", "error", err)
		}
	}
}

// freshen notes a message that has been told while streams overlap. mu is held.
func (s *session) freshen(raw []byte) {
	if g := s.solo; g.overlaps > 0 && len(g.fresh) < maxLater {
		if g.fresh == nil {
			g.fresh = map[string]bool{}
		}
		g.fresh[string(raw)] = true
	}
}

// inform asks the server what it offers, for a session that this process has
// not opened itself.
func (s *session) inform(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, s.t.timing.open)
	defer cancel()
	nobody := func() {}
	c := Call{
		ID: schemas.CallID(s.by + ".discover"), Event: s.base, Connected: nobody, Heard: nobody,
		Requested: &schemas.Requested{Target: schemas.Target{Protocol: "mcp", Server: s.m.name, Method: "server/discover"}},
	}
	answer, err := s.discover(ctx, c)
	if err != nil {
		return err
	}
	answer.Release(func() {})
	if answer.ErrorCode != 0 {
		return faultf(Refused, "the server does not say what it is: error %d", answer.ErrorCode)
	}
	return nil
}

// hear asks for a stream. It returns before the server has acknowledged it.
func (s *session) hear(offers, uris []string) (*hearing, error) {
	ctx, stop := context.WithCancel(s.ctx)
	h := &hearing{uris: uris, stop: stop, ack: make(chan struct{}), done: make(chan struct{})}
	if !s.t.spawn(func() {
		defer close(h.done)
		defer stop()
		h.err = s.hearing(ctx, h, offers)
	}) {
		stop()
		return nil, faultf(Unsent, "the gateway is shutting down")
	}
	return h, nil
}

// hearing reads a stream to its end.
func (s *session) hearing(ctx context.Context, h *hearing, offers []string) error {
	filter := []byte{'{'}
	for _, name := range offers {
		filter = append(filter, `"`+name+`":true,`...)
	}
	if len(h.uris) > 0 {
		filter = append(filter, `"resourceSubscriptions":[`...)
		for i, uri := range h.uris {
			if i > 0 {
				filter = append(filter, ',')
			}
			filter = append(filter, jsonrpc.Quote(uri)...)
		}
		filter = append(filter, `],`...)
	}
	filter[len(filter)-1] = '}' // instead of the last comma
	s.mu.Lock()
	s.numbered++
	id := schemas.CallID(s.by + ".listen." + strconv.FormatUint(s.numbered, 10))
	s.mu.Unlock()
	nobody := func() {}
	answer, err := s.m.modern(ctx, Call{
		ID: id, Event: s.base, Connected: nobody, Heard: nobody,
		Requested: &schemas.Requested{
			Target:   schemas.Target{Protocol: "mcp", Server: s.m.name, Method: "subscriptions/listen"},
			Revision: mcpRevision, Stream: true,
		},
		Body: slices.Concat([]byte(`{"jsonrpc":"2.0","id":"-","method":"subscriptions/listen","params":{"notifications":`), filter,
			[]byte(`,"_meta":`), s.meta(), []byte(`}}`)),
	}, func(raw []byte) error { return s.overheard(ctx, h, raw) })
	if err != nil {
		return err
	}
	if answer.Release != nil {
		answer.Release(h.stop)
	}
	switch {
	case answer.ErrorCode != 0:
		h.answer = answer
		s.suspect(answer)
		err = faultf(Refused, "the server cannot be listened to: error %d", answer.ErrorCode)
		if answer.ErrorCode == jsonrpc.CodeMethodNotFound || answer.ErrorCode == jsonrpc.CodeInvalidParams && len(h.uris) == 0 {
			err = fmt.Errorf("%w: %w", errNoStream, err)
		}
	case h.nothing:
		err = fmt.Errorf("%w: it tells of nothing", errNoStream)
	}
	return err
}

// overheard takes one message of a stream.
func (s *session) overheard(ctx context.Context, h *hearing, raw []byte) error {
	msg, err := jsonrpc.Decode(raw, jsonrpc.Limits{Bytes: len(raw), Depth: answerDepth, AllowCaseVariants: true})
	if err != nil {
		return err // it was decoded before
	}
	if o := s.t.opt.Owners; o != nil && !o.Holds() {
		return errors.New("another may listen by now")
	}
	if msg.Method() == acknowledged {
		select {
		case <-h.ack:
			return nil // said before
		default:
		}
		agreed := msg.Params().Get("notifications")
		h.granted, h.nothing = map[string]bool{}, true
		for v := range agreed.Get("resourceSubscriptions").Elements() {
			uri, _ := v.Text()
			h.granted[uri], h.nothing = true, false
		}
		for _, name := range listenable {
			if yes, _ := agreed.Get(name).Bool(); yes {
				h.nothing = false
			}
		}
		close(h.ack)
		return nil
	}
	if meta := msg.Params().Get("_meta"); meta.Get(metaSubscription).Exists() {
		p := msg.Patch()
		others := 0
		for range meta.Members() {
			others++
		}
		if others > 1 {
			p.Remove(meta, metaSubscription)
		} else {
			p.Remove(msg.Params(), "_meta")
		}
		if raw = p.Bytes(); raw == nil {
			return p.Err()
		}
		if msg, err = jsonrpc.Decode(raw, jsonrpc.Limits{Bytes: len(raw), Depth: answerDepth, AllowCaseVariants: true}); err != nil {
			return err
		}
	}
	s.mu.Lock()
	if h.replaced && len(h.later) < maxLater {
		h.later = append(h.later, bytes.Clone(raw))
		s.mu.Unlock()
		return nil
	}
	s.freshen(raw)
	s.mu.Unlock()
	if err := s.notify(msg, ""); err != nil {
		return err
	}
	return s.solo.pace.WaitN(ctx, min(len(raw)+paceMessage, paceBurst))
}

// subscribe is the methods resources/subscribe and resources/unsubscribe. It
// answers once the server has acknowledged that it will say so, or that it
// will not any more.
func (s *session) subscribe(ctx context.Context, c Call) (Answer, error) {
	// The name is the server's, which a front may have given another.
	uri, method := c.Requested.Name, c.Requested.Method
	switch {
	case uri == "":
		return rejected(c, jsonrpc.CodeInvalidParams, "missing required \"uri\""), nil
	case len(uri) > maxURI:
		return rejected(c, jsonrpc.CodeInvalidParams, "the uri has more than %d bytes", maxURI), nil
	}
	s.mu.Lock()
	was := s.subscribed[uri]
	if method == "resources/unsubscribe" {
		delete(s.subscribed, uri)
	} else if !was && len(s.subscribed) >= maxSubscriptions {
		s.mu.Unlock()
		return rejected(c, jsonrpc.CodeInvalidParams, "there may be %d subscriptions in a session", maxSubscriptions), nil
	} else {
		s.put(uri)
	}
	s.mu.Unlock()
	// Who keeps the stream open may have given up on what is wanted now or was.
	defer func() {
		select {
		case s.solo.news <- struct{}{}:
		default:
		}
	}()
	undo := func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		if was {
			s.put(uri)
		} else {
			delete(s.subscribed, uri)
		}
	}
	s.attend()
	h, err := s.tune(ctx)
	if err != nil {
		undo()
		if h != nil && h.answer.ErrorCode != 0 {
			return s.refusedAs(c, h.answer), nil
		}
		if errors.Is(err, errNoStream) {
			return rejected(c, jsonrpc.CodeMethodNotFound, "The server tells of no changes."), nil
		}
		return Answer{}, err
	}
	if method == "resources/subscribe" && (h == nil || !h.granted[uri]) {
		undo()
		return rejected(c, jsonrpc.CodeInvalidParams, "The server does not tell of changes of this resource."), nil
	}
	return local(c, nil), nil
}

// put notes a subscription. mu is held.
func (s *session) put(uri string) {
	if s.subscribed == nil {
		s.subscribed = make(map[string]bool)
	}
	s.subscribed[uri] = true
}

// refusedAs is the error with which a server has refused to be listened to, as
// the answer to a call.
func (s *session) refusedAs(c Call, a Answer) Answer {
	msg, err := s.m.decode(a.Body, c)
	if err != nil {
		return rejected(c, jsonrpc.CodeInternalError, "The server cannot be listened to.")
	}
	text, _ := msg.Error().Get("message").Text()
	return rejected(c, a.ErrorCode, "%s", text)
}
