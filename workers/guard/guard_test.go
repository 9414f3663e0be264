package guard

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"time"

	"waybill.dev/schemas"
)

func event() schemas.Event {
	return schemas.Event{
		Tenant: "acme", Session: "s1", Call: "c1", Root: "c1", Agent: "ann",
		Data: &schemas.Requested{Target: schemas.Target{Protocol: "mcp", Server: "files", Method: "tools/call", Name: "read"}},
	}
}

func ask(t *testing.T, o Options, h http.HandlerFunc, message string) schemas.Check {
	t.Helper()
	s := httptest.NewServer(h)
	t.Cleanup(s.Close)
	o.Name, o.URL = "shield", s.URL
	g, err := New(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(g.Close)
	return g.Ask(t.Context(), "request", event(), []byte(message))
}

// What a guard is asked: who and what, and the message byte for byte.
func TestQuestion(t *testing.T) {
	const message = `{"jsonrpc":"2.0", "id":9007199254740993,"params":{"a":1E400,"\u0062":"<é>"}} `
	var got []byte
	var header http.Header
	c := ask(t, Options{Header: http.Header{"Authorization": {"Bearer mine"}}}, func(w http.ResponseWriter, r *http.Request) {
		got, _ = io.ReadAll(r.Body)
		header = r.Header
		_, _ = io.WriteString(w, `{"allow":true,"more":1}`)
	}, message)
	if c.Said != schemas.CheckAllow || c.Guard != "shield" {
		t.Errorf("%+v", c)
	}
	want := `{"version":1,"side":"request","tenant":"acme","agent":"ann","session":"s1","call":"c1","server":"files","method":"tools/call","name":"read","message":` + message + `}`
	if string(got) != want {
		t.Errorf("got  %s\nwant %s", got, want)
	}
	if !json.Valid(got) || header.Get("Authorization") != "Bearer mine" || header.Get("Content-Type") != "application/json" {
		t.Errorf("%v", header)
	}
}

// Whatever is not a clear word is a failure.
func TestAnswers(t *testing.T) {
	say := func(status int, body string) http.HandlerFunc {
		return func(w http.ResponseWriter, _ *http.Request) {
			w.WriteHeader(status)
			_, _ = io.WriteString(w, body)
		}
	}
	for _, c := range []struct {
		name         string
		h            http.HandlerFunc
		said, reason string
	}{
		{"yes", say(200, `{"allow":true}`), "allow", ""},
		{"no", say(200, `{"allow":false,"reason":"it is \u001b[1m rude"}`), "deny", "it is  [1m rude"},
		{"a long no", say(200, `{"allow":false,"reason":"`+strings.Repeat("é", 300)+`"}`), "deny", strings.Repeat("é", 98) + "…"},
		{"both", say(200, `{"allow":false,"allow":true}`), "failed", "its answer is not JSON"},
		{"a yes in another case", say(200, `{"allow":false,"Allow":true}`), "failed", "its answer is not JSON"},
		{"a text", say(200, `{"allow":"true"}`), "failed", "its answer has no allow that is true or false"},
		{"nothing", say(200, ``), "failed", "its answer is not JSON"},
		{"a list", say(200, `[true]`), "failed", "its answer has no allow that is true or false"},
		{"not found", say(404, `{"allow":true}`), "failed", "HTTP 404"},
		{"created", say(201, `{"allow":true}`), "failed", "HTTP 201"},
		{"elsewhere", func(w http.ResponseWriter, r *http.Request) { http.Redirect(w, r, "/other", http.StatusFound) }, "failed", "HTTP 302"},
		{"too much", say(200, `{"allow":true,"x":"`+strings.Repeat("x", maxAnswer)+`"}`), "failed", "its answer has more than 65536 bytes"},
		{"hangs up", func(w http.ResponseWriter, _ *http.Request) {
			if c, _, err := w.(http.Hijacker).Hijack(); err == nil {
				_ = c.Close()
			}
		}, "failed", "it cannot be asked"},
		{"breaks off", func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Length", "100")
			_, _ = io.WriteString(w, `{"allow":true}`)
		}, "failed", "its answer broke off"},
		{"is silent", func(_ http.ResponseWriter, r *http.Request) { // who has read all is told that the other has left
			_, _ = io.Copy(io.Discard, r.Body)
			<-r.Context().Done()
		}, "failed", "no answer within 200ms"},
		{"is slow", func(w http.ResponseWriter, r *http.Request) {
			_, _ = io.Copy(io.Discard, r.Body)
			_, _ = io.WriteString(w, `{"allow"`)
			w.(http.Flusher).Flush()
			<-r.Context().Done()
		}, "failed", "no answer within 200ms"},
	} {
		t.Run(c.name, func(t *testing.T) {
			got := ask(t, Options{Timeout: 200 * time.Millisecond}, c.h, `{"a":1}`)
			if got.Said != c.said || got.Reason != c.reason || got.Guard != "shield" || got.Millis < 0 {
				t.Errorf("%+v, want %s %q", got, c.said, c.reason)
			}
		})
	}
	never := func(http.ResponseWriter, *http.Request) { t.Error("asked") }
	if got := ask(t, Options{Body: 10}, never, `{"a":"0123456789"}`); got.Said != schemas.CheckFailed || got.Reason != "the message has 18 bytes, and it is asked about 10 at most" {
		t.Errorf("%+v", got)
	}
	if got := ask(t, Options{}, never, `{"a":`); got.Said != schemas.CheckFailed {
		t.Errorf("%+v", got)
	}
	gone, err := New(Options{Name: "gone", URL: "http://127.0.0.1:1/"})
	if err != nil {
		t.Fatal(err)
	}
	if got := gone.Ask(t.Context(), "answer", event(), []byte(`1`)); got.Said != schemas.CheckFailed || got.Reason != "it cannot be asked" {
		t.Errorf("%+v", got)
	}
}

// Of more questions than there are places, as many wait, and the rest have failed
// at once.
func TestCrowd(t *testing.T) {
	const places = 3
	arrived, go_ := make(chan struct{}, 100), make(chan struct{})
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		arrived <- struct{}{}
		<-go_
		_, _ = io.WriteString(w, `{"allow":true}`)
	}))
	defer s.Close()
	g, err := New(Options{Name: "g", URL: s.URL, Concurrency: places, Timeout: time.Minute})
	if err != nil {
		t.Fatal(err)
	}
	defer g.Close()
	said := make(chan schemas.Check, 100)
	var all sync.WaitGroup
	one := func() { said <- g.Ask(context.WithoutCancel(t.Context()), "request", event(), []byte(`{}`)) }
	for range places {
		all.Go(one)
		<-arrived
	}
	for range places + 5 {
		all.Go(one)
	}
	for range 5 { // those for whom there is no room
		if c := <-said; c.Said != schemas.CheckFailed || c.Reason != fmt.Sprintf("it has %d questions to answer, and as many wait", places) {
			t.Errorf("%+v", c)
		}
	}
	close(go_)
	all.Wait()
	close(said)
	n := 0
	for c := range said {
		if n++; c.Said != schemas.CheckAllow {
			t.Errorf("%+v", c)
		}
	}
	if n != 2*places {
		t.Errorf("%d were asked, want %d", n, 2*places)
	}
}

func TestOptions(t *testing.T) {
	for _, o := range []Options{{}, {URL: "ftp://x"}, {URL: "http://"}, {URL: "://"}, {URL: "http://x", Timeout: -1}, {URL: "http://x", Body: -1}, {URL: "http://x", Concurrency: -1}} {
		if _, err := New(o); err == nil {
			t.Errorf("%+v is accepted", o)
		}
	}
}
