package cli

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"mime"
	"net"
	"net/http"
	"net/http/httptrace"
	"net/url"
	"strconv"
	"time"

	"github.com/cenkalti/backoff/v4"

	"waybill.dev/schemas/jsonrpc"
)

// Of the connections to the gateway.
const (
	connectDial      = 10 * time.Second
	connectKeepAlive = 15 * time.Second
	connectIdle      = 60 * time.Second // less than the gateway's, so that it closes none that is about to be used
	connectHeader    = 2 * time.Minute  // an answer begins before; the gateway opens a stream after 5 s
)

// connectAnswer bounds a message of the gateway's: more than what it takes from
// its servers.
const connectAnswer = 64 << 20

// connectAnswerLimits are those of messages that the gateway has decided to pass
// on.
var connectAnswerLimits = jsonrpc.Limits{Bytes: connectAnswer, Depth: 1 << 20, AllowCaseVariants: true}

// relayTimes are how long a relay waits for what; zero is the default.
type relayTimes struct {
	patience time.Duration // for the gateway to come (back), of one message; default 45 s, for clients themselves wait for 60
	resume   time.Duration // the same, to ask for the rest of an answer that broke off; default 5 min
	pause    time.Duration // before the second try, then twice as long each time; default 100 ms
	pauses   time.Duration // at most; default 2 s, and of streams five times that
	silence  time.Duration // of a stream, after which it counts as broken: three comments of the gateway have not come; default 50 s
	steady   time.Duration // a subscription that lasted so long and was ended is made anew; default 10 s
	order    time.Duration // a request waits for the notifications before it; default 5 s
	finish   time.Duration // what is under way may end when stdin has; default 5 s
	stop     time.Duration // the same when the process is told to end; default 500 ms
	farewell time.Duration // for the session to be ended; default 1 s
}

func (t relayTimes) withDefaults() relayTimes {
	for _, d := range []struct {
		of    *time.Duration
		value time.Duration
	}{
		{&t.patience, 45 * time.Second}, {&t.resume, 5 * time.Minute}, {&t.pause, 100 * time.Millisecond}, {&t.pauses, 2 * time.Second},
		{&t.silence, 50 * time.Second}, {&t.steady, 10 * time.Second},
		{&t.order, 5 * time.Second}, {&t.finish, 5 * time.Second}, {&t.stop, 500 * time.Millisecond}, {&t.farewell, time.Second},
	} {
		if *d.of <= 0 {
			*d.of = d.value
		}
	}
	return t
}

// errUnsent: the gateway did not get what was sent, for certain.
var errUnsent = errors.New("no gateway answers")

// errBroken: the connection broke, and nobody knows whether the gateway got
// what was sent.
var errBroken = errors.New("the connection to the gateway broke")

// send makes one HTTP request. gotten, which may be nil, is told before the
// first byte is written, and written after the last. The error wraps errUnsent
// or errBroken, or is the context's cause.
func (r *relay) send(ctx context.Context, method string, h http.Header, body []byte, gotten, written func()) (*http.Response, error) {
	r.refresh()
	req, err := http.NewRequestWithContext(ctx, method, r.url, nil)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", errUnsent, err)
	}
	req.Header = h
	if r.token != "" {
		h.Set("Authorization", "Bearer "+r.token)
	}
	if body != nil {
		req.ContentLength = int64(len(body))
		req.GetBody = func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(body)), nil }
		req.Body = io.NopCloser(bytes.NewReader(body))
	}
	reached := false
	resp, err := r.http.Do(req.WithContext(httptrace.WithClientTrace(ctx, &httptrace.ClientTrace{
		GotConn: func(httptrace.GotConnInfo) {
			reached = true
			if gotten != nil {
				gotten()
			}
		},
		WroteRequest: func(httptrace.WroteRequestInfo) {
			if written != nil {
				written()
			}
		},
	})))
	if err == nil {
		r.reached()
		return resp, nil
	}
	if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	if outer := new(url.Error); errors.As(err, &outer) {
		err = outer.Err // the rest of it repeats the address
	}
	// After a connection was had another is dialled only when nothing had been
	// written to the first.
	if op := new(net.OpError); !reached || errors.As(err, &op) && op.Op == "dial" {
		return nil, fmt.Errorf("%w at %s: %w", errUnsent, r.base(), err)
	}
	return nil, fmt.Errorf("%w: %w", errBroken, err)
}

// refresh drops idle connections of before the machine slept: what is written
// to them would be neither heard nor known to be lost.
func (r *relay) refresh() {
	now := time.Now().Round(0) // the clock on the wall goes on in sleep
	r.mu.Lock()
	last := r.used
	r.used = now
	r.mu.Unlock()
	if now.Sub(last) > connectIdle/2 {
		r.http.CloseIdleConnections()
	}
}

// reach sends until the gateway has got it: what has certainly not reached it
// is sent again, until the time is over. It returns what the gateway answered;
// errors are those of send.
func (r *relay) reach(ctx context.Context, until time.Time, h http.Header, body []byte, gotten, written func()) (*http.Response, error) {
	pauses := r.backoff(r.t.pauses)
	for {
		wait := time.Duration(0)
		resp, err := r.send(ctx, http.MethodPost, h.Clone(), body, gotten, written)
		switch {
		case err == nil:
			if wait = r.turnedAway(resp); wait == 0 {
				return resp, nil
			}
		case errors.Is(err, errUnsent):
			r.unreachable(err)
		default:
			return nil, err
		}
		wait = max(wait, pauses.NextBackOff())
		if r.now().Add(wait).After(until) {
			return resp, err
		}
		if resp != nil {
			_ = resp.Body.Close()
		}
		if !r.pauseUntilUp(ctx, wait) {
			return nil, context.Cause(ctx)
		}
	}
}

// turnedAway tells whether the gateway's front has sent a request away for lack
// of room, or because it is about to end, before anybody looked at it: then the
// answer has no id. It returns how long to wait before the next try.
func (r *relay) turnedAway(resp *http.Response) time.Duration {
	if resp.StatusCode != http.StatusServiceUnavailable && resp.StatusCode != http.StatusTooManyRequests {
		return 0
	}
	body, err := readAnswer(resp)
	if err != nil {
		return 0
	}
	resp.Body = io.NopCloser(bytes.NewReader(body))
	m, err := jsonrpc.Decode(body, connectAnswerLimits)
	if err != nil || !m.Error().Exists() || m.ID().Exists() {
		return 0
	}
	seconds, err := strconv.Atoi(resp.Header.Get("Retry-After"))
	if err != nil || seconds <= 0 {
		return time.Second
	}
	return time.Duration(min(seconds, 30)) * time.Second
}

// readAnswer reads a body that is no stream.
func readAnswer(resp *http.Response) ([]byte, error) {
	defer func() { _ = resp.Body.Close() }()
	body, err := io.ReadAll(io.LimitReader(resp.Body, connectAnswer+1))
	switch {
	case err != nil:
		return nil, fmt.Errorf("%w: %w", errBroken, err)
	case len(body) > connectAnswer:
		return nil, fmt.Errorf("the answer has more than %d bytes", connectAnswer)
	}
	return body, nil
}

// isStream tells whether an answer is a stream of events.
func isStream(resp *http.Response) bool {
	kind, _, _ := mime.ParseMediaType(resp.Header.Get("Content-Type"))
	return resp.StatusCode == http.StatusOK && kind == "text/event-stream"
}

// backoff is the pauses between tries.
func (r *relay) backoff(most time.Duration) *backoff.ExponentialBackOff {
	return backoff.NewExponentialBackOff(backoff.WithInitialInterval(r.t.pause), backoff.WithMultiplier(2),
		backoff.WithMaxInterval(most), backoff.WithMaxElapsedTime(0))
}

// pause waits. It is false when ctx has ended.
func (r *relay) pause(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(min(d, math.MaxInt64/2))
	defer t.Stop()
	select {
	case <-t.C:
		return ctx.Err() == nil
	case <-ctx.Done():
		return false
	}
}

// pauseUntilUp waits too, but no longer than until somebody has reached the
// gateway again.
func (r *relay) pauseUntilUp(ctx context.Context, d time.Duration) bool {
	r.mu.Lock()
	up := r.up // nil while the gateway answers
	r.mu.Unlock()
	if up == nil {
		return r.pause(ctx, d)
	}
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-up:
	case <-t.C:
	case <-ctx.Done():
		return false
	}
	return true
}

func (r *relay) now() time.Time { return time.Now() }

// base is the gateway's address as it is shown.
func (r *relay) base() string { return r.url }

// unreachable says, once, that the gateway is not there.
func (r *relay) unreachable(err error) {
	r.mu.Lock()
	was := r.up != nil
	if !was {
		r.up = make(chan struct{})
	}
	r.mu.Unlock()
	if !was {
		r.say("%v; is `waybill up` running? Trying on", err)
	}
}

// missing says so if that is what an error means. A stream that merely broke is
// asked for again without a word.
func (r *relay) missing(err error) {
	if errors.Is(err, errUnsent) {
		r.unreachable(err)
	}
}

// reached says that it is there again.
func (r *relay) reached() {
	r.mu.Lock()
	was := r.up
	r.up = nil
	r.mu.Unlock()
	if was != nil {
		close(was)
		r.say("the gateway at %s answers", r.base())
	}
}

// probe finds out, before the client has said anything, whether the gateway is
// there, for the client's log to say so.
func (r *relay) probe(ctx context.Context, endpoint *url.URL) {
	if proxy, err := http.ProxyFromEnvironment(&http.Request{URL: endpoint}); err != nil || proxy != nil {
		return // whose answer says nothing of the gateway's
	}
	port := endpoint.Port()
	if port == "" {
		port = map[string]string{"http": "80", "https": "443"}[endpoint.Scheme]
	}
	pauses := r.backoff(r.t.pauses)
	for ctx.Err() == nil {
		conn, err := (&net.Dialer{Timeout: connectDial}).DialContext(ctx, "tcp", net.JoinHostPort(endpoint.Hostname(), port))
		if err == nil {
			_ = conn.Close()
			r.reached()
			return
		}
		if ctx.Err() != nil {
			return
		}
		r.unreachable(fmt.Errorf("%w at %s: %w", errUnsent, r.base(), err))
		if !r.pause(ctx, pauses.NextBackOff()) {
			return
		}
	}
}
