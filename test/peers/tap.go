package peers

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log"
	"mime"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

// tap stands between a client and an endpoint, so that what a client does on the wire is seen alike for every client, and
// so that its stream can be cut where it hurts: that of cutOperation after its first progress, once. It passes on
// everything else as it is.
type tap struct {
	URL string
	how cut

	mu        sync.Mutex
	sessions  []string // that the endpoint handed out
	listened  int      // GET streams opened without Last-Event-ID
	cutAt     string   // id of the last event before the cut
	cutTime   time.Time
	resumedAt []string // Last-Event-IDs of the GET streams opened since
	deleted   []string // sessions whose DELETE was answered well
	heads     []string // of all answers, to be shown if the test fails
}

// cutOperation is the long operation whose stream is cut, told from others by its number of steps.
const cutOperation = 0.6 // seconds

// afterCut is when server-everything may be asked to resume: it sends on a resumed stream only what was stored before, so
// the operation has to be over. Others are asked at once.
const afterCut = time.Second

// cut is how a stream is cut: broken off, as by a network that fails, or ended before its time, as by a server that wants its
// client to come back. Not every SDK resumes a stream that broke off.
type cut bool

const (
	breakOff cut = true
	endEarly cut = false
)

var errBrokenOff = errors.New("broken off on purpose")

// cutKey marks the context of the request whose answer is to be cut.
type cutKey struct{}

func newTap(t testing.TB, e Endpoint, how cut) *tap {
	t.Helper()
	target, err := url.Parse(e.URL)
	if err != nil {
		t.Fatal(err)
	}
	tap := &tap{how: how}
	quiet := log.New(io.Discard, "", 0) // streams that clients leave are none of our errors
	transport := &http.Transport{}
	proxy := &httputil.ReverseProxy{
		Rewrite: func(r *httputil.ProxyRequest) {
			r.Out.URL, r.Out.Host = target, target.Host
		},
		Transport:      transport,
		FlushInterval:  -1,
		ErrorLog:       quiet,
		ModifyResponse: tap.answered,
	}
	server := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method == http.MethodGet && r.Header.Get("Last-Event-ID") != "" && !e.resumesLive() {
			tap.mu.Lock()
			wait := time.Until(tap.cutTime.Add(afterCut))
			tap.mu.Unlock()
			select {
			case <-time.After(wait):
			case <-r.Context().Done():
				return
			}
		}
		if r.Method == http.MethodPost {
			body, err := io.ReadAll(r.Body)
			if err != nil {
				http.Error(w, "reading the request: "+err.Error(), http.StatusBadRequest)
				return
			}
			r.Body = io.NopCloser(bytes.NewReader(body))
			if tap.toCut(body, e.cutSteps()) {
				r = r.WithContext(context.WithValue(r.Context(), cutKey{}, true))
			}
		}
		proxy.ServeHTTP(w, r)
	}))
	server.Config.ErrorLog = quiet
	server.Start()
	t.Cleanup(func() {
		server.CloseClientConnections()
		server.Close()
		transport.CloseIdleConnections()
		tap.mu.Lock()
		defer tap.mu.Unlock()
		if t.Failed() {
			t.Logf("the endpoint answered:\n%s", strings.Join(tap.heads, "\n"))
		}
	})
	tap.URL = server.URL + target.Path
	return tap
}

// toCut tells whether a request is the operation to be cut, and has not been cut yet.
func (p *tap) toCut(body []byte, steps int) bool {
	var call struct {
		Method string
		Params struct{ Arguments struct{ Steps float64 } }
	}
	if json.Unmarshal(body, &call) != nil || call.Method != "tools/call" || call.Params.Arguments.Steps != float64(steps) {
		return false
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.cutTime.IsZero()
}

// answered sees every answer's head, and puts the knife into the one to be cut.
func (p *tap) answered(r *http.Response) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	session := r.Header.Get("Mcp-Session-Id")
	if session != "" && !slices.Contains(p.sessions, session) {
		p.sessions = append(p.sessions, session)
	}
	media, _, _ := mime.ParseMediaType(r.Header.Get("Content-Type"))
	stream := r.StatusCode == http.StatusOK && media == "text/event-stream"
	p.heads = append(p.heads, fmt.Sprintf("%s %s after %q: %s", time.Now().Format("05.000"), r.Request.Method, r.Request.Header.Get("Last-Event-ID"), r.Status))
	switch r.Request.Method {
	case http.MethodGet:
		if after := r.Request.Header.Get("Last-Event-ID"); stream && after == "" {
			p.listened++
		} else if stream && !p.cutTime.IsZero() {
			p.resumedAt = append(p.resumedAt, after)
		}
	case http.MethodDelete:
		if r.StatusCode/100 == 2 {
			p.deleted = append(p.deleted, r.Request.Header.Get("Mcp-Session-Id"))
		}
	case http.MethodPost:
		if stream && r.Request.Context().Value(cutKey{}) != nil {
			r.Body = &knife{tap: p, body: r.Body, lines: bufio.NewReader(r.Body)}
		}
	}
	return nil
}

// knife reads a stream up to the end of its first event that reports progress, and then fails.
type knife struct {
	tap   *tap
	body  io.Closer
	lines *bufio.Reader

	rest     []byte
	id       string
	progress bool
	done     bool
}

func (k *knife) Read(b []byte) (int, error) {
	if len(k.rest) == 0 {
		if k.done {
			if k.tap.how == breakOff {
				return 0, errBrokenOff
			}
			return 0, io.EOF
		}
		line, err := k.lines.ReadBytes('\n')
		if err != nil && len(line) == 0 {
			return 0, err
		}
		k.rest = line
		switch text := strings.TrimRight(string(line), "\r\n"); {
		case strings.HasPrefix(text, "id:"):
			k.id = strings.TrimSpace(text[len("id:"):])
		case strings.HasPrefix(text, "data:"):
			k.progress = k.progress || strings.Contains(text, `"notifications/progress"`)
		case text == "" && k.progress:
			k.done = true
			k.tap.mu.Lock()
			k.tap.cutAt, k.tap.cutTime = k.id, time.Now()
			k.tap.mu.Unlock()
		}
	}
	n := copy(b, k.rest)
	k.rest = k.rest[n:]
	return n, nil
}

func (k *knife) Close() error { return k.body.Close() }

// check holds what a client did on the wire against what it must do in a session, and asks the endpoint whether the
// sessions are gone.
func (p *tap) check(t testing.TB, e Endpoint) {
	t.Helper()
	p.mu.Lock()
	defer p.mu.Unlock()
	if len(p.sessions) != 1 {
		t.Errorf("the endpoint handed out %d session ids, want 1", len(p.sessions))
	}
	if p.listened != 1 {
		t.Errorf("the client opened %d GET streams, want 1", p.listened)
	}
	if p.cutTime.IsZero() {
		t.Error("nothing was cut")
	} else if p.cutAt == "" {
		t.Error("the stream that was cut had no event ids")
	} else if !slices.Contains(p.resumedAt, p.cutAt) {
		t.Errorf("cut after event %q, resumed after %q", p.cutAt, p.resumedAt)
	}
	for _, session := range p.sessions {
		if !slices.Contains(p.deleted, session) {
			t.Errorf("session %q was not deleted", session)
		}
		gone := &LegacySession{Endpoint: e, ID: session, Revision: legacy}
		stream, err := gone.Request(t.Context(), "ping", nil)
		if err != nil {
			t.Errorf("after DELETE: %v", err)
			continue
		}
		stream.Close()
		if want := e.gone(); stream.Status != want {
			t.Errorf("after DELETE the session answers with status %d, want %d", stream.Status, want)
		}
	}
}
