package mcp_test

import (
	"context"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"waybill.dev/edge/mcp"
	"waybill.dev/schemas"
)

// two are the addresses of two replicas on one log.
func two(t *testing.T, log *memory) (first, second string) {
	t.Helper()
	o := log.options()
	o.Shared = true
	first, _ = up(t, o)
	o.Edge = "e1"
	second, _ = up(t, o)
	return first, second
}

// The newest stream of a session wins at whichever replica it is, and goes on
// where the one before it had got, also if its client does not say where.
func TestNewestStreamWinsElsewhere(t *testing.T) {
	log := newMemory(t, newStepwise().handle)
	first, second := two(t, log)
	c := open(t, first, "bob")
	beside(log, c, 1)
	old := c.listen("GET", "", "")
	old.want(t, "")
	at := old.want(t, "beside 1")

	c.addr = second
	young := c.listen("GET", at.ID, "")
	old.ends(t)
	beside(log, c, 2)
	young.want(t, "beside 2") // and not 1 again
	c.addr = first
	third := c.listen("GET", "", "")
	young.ends(t)
	third.want(t, "")
	// It may be told again what was written just before, which may not have arrived.
	beside(log, c, 3)
	if e, _ := third.next(); strings.Contains(string(e.Data), "beside 2") {
		third.want(t, "beside 3")
	} else if !strings.Contains(string(e.Data), "beside 3") {
		t.Errorf("%s", e.Data)
	}
}

// A call can be taken back at another replica than the one where it was made.
func TestTakeBackElsewhere(t *testing.T) {
	rest := newStepwise()
	log := newMemory(t, rest.handle)
	first, second := two(t, log)
	c := open(t, first, "alice")
	go rest.progress(0)
	l := c.listen("POST", "", slowCall)
	l.want(t, "")
	l.want(t, `"progress":0`)
	c.addr = second
	for _, id := range []string{"8", `"7"`, "null"} { // not its own
		if status, _ := c.say("POST", `{"jsonrpc":"2.0","method":"notifications/cancelled","params":{"requestId":`+id+`}}`); status != 202 {
			t.Error(status)
		}
	}
	if n := kinds(log, schemas.KindCancel); n != 0 {
		t.Errorf("%d calls taken back", n)
	}
	other := open(t, second, "alice")
	const cancel = `{"jsonrpc":"2.0","method":"notifications/cancelled","params":{"requestId":7,"reason":"enough"}}`
	for _, by := range []*client{other, c} {
		if status, _ := by.say("POST", cancel); status != 202 {
			t.Error(status)
		}
	}
	if n := kinds(log, schemas.KindCancel); n != 1 {
		t.Errorf("%d calls taken back", n)
	}
	rest.cancelled()
}

// A stream that is open at one replica is a use for the others, too; and one
// that is not any more is not.
func TestOpenStreamIsUseElsewhere(t *testing.T) {
	test := func(t *testing.T) {
		log := newMemory(t, newStepwise().handle)
		o := log.options()
		o.Now, o.Shared = time.Now, true
		o.SessionLimits = mcp.SessionLimits{Idle: 10 * time.Minute, Max: 24 * time.Hour}
		here, there := mcp.New(o), mcp.New(o)
		s := serverOf(t, here)
		ctx, cancel := context.WithCancel(t.Context())
		var ran sync.WaitGroup
		for _, a := range []*mcp.Adapter{here, there} {
			ran.Go(func() { _ = a.Run(ctx) })
		}
		w := httptest.NewRecorder()
		r := httptest.NewRequestWithContext(t.Context(), "POST", "http://localhost/mcp", strings.NewReader(initialize))
		r.Header = http.Header{"Content-Type": {"application/json"}}
		s.ServeHTTP(w, r)
		listening, leave := context.WithTimeout(t.Context(), 3*time.Hour)
		defer leave()
		r = httptest.NewRequestWithContext(listening, "GET", "http://localhost/mcp", nil)
		r.Header = http.Header{"Accept": {"text/event-stream"}, "Mcp-Session-Id": w.Header()["Mcp-Session-Id"]}
		start := time.Now()
		s.ServeHTTP(&recorder{h: http.Header{}}, r)
		if took := time.Since(start); took < 3*time.Hour {
			t.Errorf("the stream ended after %s", took)
		}
		if n := kinds(log, schemas.KindAttached); n > 3*6*3+2 {
			t.Errorf("it was said %d times that it is open", n)
		}
		<-time.After(30 * time.Minute)
		if there.Sessions() != 0 || here.Sessions() != 0 {
			t.Error("the session was not ended when it was idle")
		}
		cancel()
		ran.Wait()
	}
	synctest.Test(t, test)
}
