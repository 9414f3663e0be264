package mcp_test

import (
	"context"
	"errors"
	"io"
	"net/http"
	"strings"
	"testing"

	"waybill.dev/schemas/sse"
)

// client is one agent's, with a session.
type client struct {
	t       *testing.T
	addr    string // may be changed between requests
	path    string
	token   string
	session string
	version string
}

var plain = &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}

func (c *client) do(ctx context.Context, method, last, body string) *http.Response {
	c.t.Helper()
	res := c.try(ctx, method, last, body)
	if res == nil {
		c.t.Fatal("no answer")
	}
	return res
}

// try is do for a client that may be cut off before there is an answer: then
// there is none.
func (c *client) try(ctx context.Context, method, last, body string) *http.Response {
	c.t.Helper()
	path := c.path
	if path == "" {
		path = "/mcp/everything"
	}
	r, err := http.NewRequestWithContext(ctx, method, "http://"+c.addr+path, strings.NewReader(body))
	if err != nil {
		c.t.Fatal(err)
	}
	r.Header.Set("Accept", "text/event-stream")
	if method == "POST" {
		r.Header.Set("Accept", "application/json, text/event-stream")
		r.Header.Set("Content-Type", "application/json")
	}
	for name, v := range map[string]string{
		"Last-Event-ID": last, "Mcp-Session-Id": c.session, "MCP-Protocol-Version": c.version,
	} {
		if v != "" {
			r.Header.Set(name, v)
		}
	}
	if c.token != "" {
		r.Header.Set("Authorization", "Bearer "+c.token)
	}
	res, err := plain.Do(r)
	if err != nil {
		if ctx.Err() == nil {
			c.t.Error(err)
		}
		return nil
	}
	return res
}

const initialize = `{"jsonrpc":"2.0","id":0,"method":"initialize","params":{"protocolVersion":"2025-11-25","capabilities":{},"clientInfo":{"name":"test","version":"1"}}}`

const initialized = `{"jsonrpc":"2.0","id":"c0","result":{"protocolVersion":"2025-11-25","capabilities":{},"serverInfo":{"name":"s","version":"1"}}}`

// open opens a session.
func open(t *testing.T, addr, token string) *client {
	t.Helper()
	c := &client{t: t, addr: addr, token: token}
	res := c.do(t.Context(), "POST", "", initialize)
	body, _ := io.ReadAll(res.Body)
	res.Body.Close()
	if res.StatusCode != 200 || res.Header.Get("Mcp-Session-Id") == "" {
		t.Fatalf("initialize: %s %s", res.Status, body)
	}
	c.session, c.version = res.Header.Get("Mcp-Session-Id"), "2025-11-25"
	return c
}

// say sends one message and reads the whole answer.
func (c *client) say(method, body string) (status int, text string) {
	c.t.Helper()
	res := c.do(c.t.Context(), method, "", body)
	defer res.Body.Close()
	b, err := io.ReadAll(res.Body)
	if err != nil {
		c.t.Fatal(err)
	}
	return res.StatusCode, string(b)
}

// listener is a stream that is being read.
type listener struct {
	*http.Response
	cancel context.CancelFunc
	next   func() (sse.Event, bool)
}

// listen begins to read a stream; next returns its events, without comments.
func (c *client) listen(method, last, body string) *listener {
	c.t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	l := &listener{Response: c.do(ctx, method, last, body), cancel: cancel}
	events := make(chan sse.Event)
	done := make(chan struct{})
	go func() {
		defer close(events)
		for e, err := range sse.Read(l.Body, 0) {
			if err != nil {
				if ctx.Err() == nil && !errors.Is(err, io.ErrUnexpectedEOF) {
					c.t.Error(err)
				}
				return
			}
			if e.Comment == "" && e.Data == nil && e.ID == "" {
				continue
			}
			select {
			case events <- e:
			case <-done:
				return
			}
		}
	}()
	l.next = func() (sse.Event, bool) { e, ok := <-events; return e, ok }
	leave := l.cancel
	l.cancel = func() {
		leave()
		l.Body.Close()
		select {
		case <-done:
		default:
			close(done)
		}
		for range events {
		}
	}
	c.t.Cleanup(l.cancel)
	return l
}

// want reads one event.
func (l *listener) want(t *testing.T, what string) sse.Event {
	t.Helper()
	e, ok := l.next()
	if !ok || !strings.Contains(string(e.Data), what) {
		t.Fatalf("%v %q %q, want %q", ok, e.ID, e.Data, what)
	}
	return e
}

// ends wants nothing more.
func (l *listener) ends(t *testing.T) {
	t.Helper()
	if e, ok := l.next(); ok {
		t.Fatalf("one more: %q %q", e.ID, e.Data)
	}
}
