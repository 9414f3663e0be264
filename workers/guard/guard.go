// Package guard asks checks outside of the gateway about what agents and servers
// say: a service of the operator's that looks at a message and says yes or no.
//
// It makes no decision. What a guard says, or that it has said nothing that counts,
// is a fact ([schemas.Check]) which a decision or an ending records, and which rules
// draw their consequence from: so no guard is ever asked again by who decides again.
//
// A guard is asked by POST, with the request as its body (all but message are texts):
//
//	{"version": 1, "side": "request", "tenant": …, "agent": …, "session": …, "call": …,
//	 "server": …, "method": …, "name": …, "message": {the message of MCP, as it is}}
//
// side is request or answer. It answers with status 200 and
//
//	{"allow": true}    or    {"allow": false, "reason": "why"}
//
// Anything else, and an answer that does not come in time, is a failure. Nothing of
// an agent's or a server's credentials is sent, nor is a redirect followed.
package guard

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"sync/atomic"
	"time"
	"unicode/utf8"

	"waybill.dev/schemas"
	"waybill.dev/schemas/jsonrpc"
)

// Options say where a guard is and what it may cost.
type Options struct {
	Name        string
	URL         string        // http or https
	Header      http.Header   // sent with every question: the operator's own credentials
	Timeout     time.Duration // for one answer, waiting for a place included; default 2 s
	Concurrency int           // questions at once, and as many that wait; more have failed; default 16
	Body        int           // bytes of a message; of a larger one nobody is asked; default 262144
}

// Guard is safe for concurrent use.
type Guard struct {
	o         Options
	slots     chan struct{}
	waiting   atomic.Int64
	transport *http.Transport
}

// Bounds of an answer.
const (
	maxAnswer = 64 << 10
	maxReason = 200 // bytes
)

// New checks the options.
func New(o Options) (*Guard, error) {
	u, err := url.Parse(o.URL)
	switch {
	case err != nil:
		return nil, fmt.Errorf("guard %s: %w", o.Name, err)
	case u.Scheme != "http" && u.Scheme != "https" || u.Host == "":
		return nil, fmt.Errorf("guard %s: %q is not an http or https URL", o.Name, u.Redacted())
	case o.Timeout < 0 || o.Concurrency < 0 || o.Body < 0:
		return nil, fmt.Errorf("guard %s: timeout, concurrency and body cannot be negative", o.Name)
	}
	if o.Timeout == 0 {
		o.Timeout = 2 * time.Second
	}
	if o.Concurrency == 0 {
		o.Concurrency = 16
	}
	if o.Body == 0 {
		o.Body = 256 << 10
	}
	return &Guard{o: o, slots: make(chan struct{}, o.Concurrency), transport: &http.Transport{
		DialContext:            (&net.Dialer{Timeout: o.Timeout, KeepAlive: 15 * time.Second}).DialContext,
		TLSHandshakeTimeout:    o.Timeout,
		MaxIdleConnsPerHost:    o.Concurrency,
		IdleConnTimeout:        4 * time.Second,
		MaxResponseHeaderBytes: 16 << 10,
		DisableCompression:     true,
	}}, nil
}

// Close lets go of the pooled connections.
func (g *Guard) Close() { g.transport.CloseIdleConnections() }

type question struct {
	Version int                `json:"version"`
	Side    string             `json:"side"`
	Tenant  schemas.Tenant     `json:"tenant"`
	Agent   schemas.Agent      `json:"agent"`
	Session schemas.SessionKey `json:"session"`
	Call    schemas.CallID     `json:"call"`
	Server  string             `json:"server"`
	Method  string             `json:"method"`
	Name    string             `json:"name,omitempty"`
	Message json.RawMessage    `json:"message"`
}

// Ask asks about a message of a call, of which e is the request or what authorized
// it. It never fails: that the guard has is what it returns then. It returns within
// the guard's time.
func (g *Guard) Ask(ctx context.Context, side string, e schemas.Event, message []byte) schemas.Check {
	began := time.Now()
	c := schemas.Check{Guard: g.o.Name, Said: schemas.CheckFailed}
	allow, reason, err := g.ask(ctx, side, e, message)
	switch {
	case err != nil:
		reason = err.Error()
	case allow:
		c.Said = schemas.CheckAllow
	default:
		c.Said = schemas.CheckDeny
	}
	c.Reason = short(reason)
	c.Millis = int(time.Since(began).Milliseconds())
	return c
}

func (g *Guard) ask(ctx context.Context, side string, e schemas.Event, message []byte) (allow bool, reason string, err error) {
	q := question{
		Version: 1, Side: side, Tenant: e.Tenant, Agent: e.Agent, Session: e.Session, Call: e.Call, Message: message,
	}
	switch d := e.Data.(type) {
	case *schemas.Requested:
		q.Server, q.Method, q.Name = d.Server, d.Method, d.Name
	case *schemas.Authorized:
		q.Server, q.Method, q.Name = d.Server, d.Method, d.Name
	}
	if len(message) > g.o.Body {
		return false, "", fmt.Errorf("the message has %d bytes, and it is asked about %d at most", len(message), g.o.Body)
	}
	body, err := marshal(q)
	if err != nil {
		return false, "", fmt.Errorf("the message cannot be sent: %w", err)
	}
	ctx, cancel := context.WithTimeout(ctx, g.o.Timeout)
	defer cancel()
	if err := g.enter(ctx); err != nil {
		return false, "", err
	}
	defer func() { <-g.slots }()
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, g.o.URL, bytes.NewReader(body))
	if err != nil {
		return false, "", errors.New("the question cannot be made") // the URL, which the error holds, was checked
	}
	for name, values := range g.o.Header {
		req.Header[name] = values
	}
	req.Header.Set("Content-Type", "application/json")
	req.Header.Set("Accept", "application/json")
	req.Header.Set("User-Agent", "waybill")
	resp, err := g.transport.RoundTrip(req) // which follows no redirect
	if err != nil {
		return false, "", g.late(ctx, "it cannot be asked")
	}
	defer func() { _ = resp.Body.Close() }()
	if resp.StatusCode != http.StatusOK {
		return false, "", fmt.Errorf("HTTP %d", resp.StatusCode)
	}
	b, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswer+1))
	switch {
	case err != nil:
		return false, "", g.late(ctx, "its answer broke off")
	case len(b) > maxAnswer:
		return false, "", fmt.Errorf("its answer has more than %d bytes", maxAnswer)
	}
	v, err := jsonrpc.Parse(b, jsonrpc.Limits{})
	if err != nil {
		return false, "", errors.New("its answer is not JSON")
	}
	allow, ok := v.Get("allow").Bool()
	if !ok {
		return false, "", errors.New("its answer has no allow that is true or false")
	}
	reason, _ = v.Get("reason").Text()
	return allow, reason, nil
}

// late says that the guard had no time left, or else what else there was: not in
// the words of the network, which name addresses.
func (g *Guard) late(ctx context.Context, otherwise string) error {
	if errors.Is(ctx.Err(), context.DeadlineExceeded) {
		return fmt.Errorf("no answer within %s", g.o.Timeout)
	}
	return errors.New(otherwise)
}

// enter waits for a place; the caller gives it back.
func (g *Guard) enter(ctx context.Context) error {
	select {
	case g.slots <- struct{}{}:
		return nil
	default:
	}
	defer g.waiting.Add(-1)
	if g.waiting.Add(1) > int64(g.o.Concurrency) {
		return fmt.Errorf("it has %d questions to answer, and as many wait", g.o.Concurrency)
	}
	select {
	case g.slots <- struct{}{}:
		return nil
	case <-ctx.Done():
		return g.late(ctx, "the gateway is being stopped")
	}
}

// marshal writes the question with the message as it is, byte for byte.
func marshal(q question) ([]byte, error) {
	message := q.Message
	q.Message = json.RawMessage("null")
	b, err := json.Marshal(q)
	if err != nil {
		return nil, err
	}
	if len(message) == 0 {
		return b, nil
	}
	if _, err := jsonrpc.Parse(message, jsonrpc.Limits{Bytes: len(message), Depth: 512, AllowCaseVariants: true}); err != nil {
		return nil, err
	}
	b = bytes.TrimSuffix(b, []byte("null}"))
	return append(append(b, message...), '}'), nil
}

// short is a reason as an event may have it: some text that can be printed.
func short(s string) string {
	s = strings.Map(func(r rune) rune {
		if !strconv.IsPrint(r) {
			return ' '
		}
		return r
	}, strings.ToValidUTF8(s, "\uFFFD"))
	if len(s) <= maxReason {
		return s
	}
	at := maxReason - len("…")
	for !utf8.RuneStart(s[at]) {
		at--
	}
	return s[:at] + "…"
}
