package dispatch

import (
	"context"
	"errors"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"waybill.dev/schemas"
	"waybill.dev/schemas/jsonrpc"
)

func ofTenant(name string) func(*schemas.Event) {
	return func(e *schemas.Event) { e.Tenant = schemas.Tenant(name) }
}

// pidOf is the process that answered a call.
func (r *rig) pidOf(e schemas.Event) string {
	r.t.Helper()
	m, err := jsonrpc.Decode(r.ends(e, "completed").Body, jsonrpc.Limits{})
	if err != nil {
		r.t.Fatal(err)
	}
	pid, _ := m.Result().Get("pid").Text()
	return pid
}

func touch(t *testing.T, file string) {
	t.Helper()
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
}

// Of 2026-07-28 each tenant has a process, unless the operator wants one for all.
func TestStdioTenants(t *testing.T) {
	for how, processes := range map[string]int{"session": 2, "server": 1} {
		t.Run(how, func(t *testing.T) {
			nothingLeft(t)
			r, _, words := stdioRig(t, "", func(s *Server) { s.Process = how })
			pids := map[string]bool{}
			for range 2 {
				for _, tenant := range []string{"acme", "globex"} {
					e := r.call("read", ofTenant(tenant))
					r.handle(e)
					pids[r.pidOf(e)] = true
				}
			}
			if len(pids) != processes || len(children(t)) != processes {
				t.Errorf("processes %v %v", pids, children(t))
			}
			if got := strings.Contains(words.String(), "tenant=globex"); got != (how == "session") {
				t.Errorf("the log says whose process it is: %v", got)
			}
			r.d.Close()
		})
	}
}

// What a server still says of a call that is over, and of which it does not say
// so, gets into no call of another tenant's; nor, when two are in flight, into one
// of the same.
func TestStdioMutters(t *testing.T) {
	nothingLeft(t)
	r, _, words := stdioRig(t, "")
	dir := t.TempDir()
	mutter := filepath.Join(dir, "mutter")
	over := r.call("mutter", metered("1"), with("x", mutter))
	wait := r.beside(over)
	r.log.await(t, schemas.KindProgressed, 1)
	wish := r.log.add(over.Next(&schemas.Cancel{Reason: "enough"}, nil))
	if err := r.d.Cancel(t.Context(), wish, r.log.emit); err != nil {
		t.Fatal(err)
	}
	wait()
	r.ends(over, "cancelled")
	var calls []schemas.Event
	var waits []func()
	for i, tenant := range []string{"globex", "acme", "acme"} {
		gate := filepath.Join(dir, strconv.Itoa(i))
		e := r.call("wait", with("x", gate), ofTenant(tenant))
		calls, waits = append(calls, e), append(waits, r.beside(e))
		untilThere(gate + ".began")
	}
	touch(t, mutter)
	untilThere(mutter + ".said")
	for i, wait := range waits {
		touch(t, filepath.Join(dir, strconv.Itoa(i)))
		wait()
		r.ends(calls[i], "completed")
	}
	for _, e := range r.log.of(schemas.KindProgressed) {
		if e.Call != over.Call {
			t.Errorf("call %s was told %s", e.Call, e.Body)
		}
	}
	if text := words.String(); !strings.Contains(text, `level=WARN msg="a message of the server is dropped`) {
		t.Error("the log does not say that messages are dropped")
	}
	r.d.Close()
}

// Processes of tenants count as others do, and one that nobody uses makes room.
func TestStdioTenantProcesses(t *testing.T) {
	nothingLeft(t)
	r, _, _ := stdioRig(t, "", func(s *Server) { s.Processes = 2 })
	dir := t.TempDir()
	var waits []func()
	for _, tenant := range []string{"a", "b"} {
		waits = append(waits, r.beside(r.call("wait", with("x", filepath.Join(dir, tenant)), ofTenant(tenant))))
		untilThere(filepath.Join(dir, tenant+".began"))
	}
	e := r.call("read", ofTenant("c"))
	r.handle(e)
	r.ends(e, "overloaded")
	own := r.legacy("read", func(e *schemas.Event) { e.Session = "s1" })
	r.handle(own)
	r.ends(own, "overloaded")
	touch(t, filepath.Join(dir, "a"))
	waits[0]()
	e = r.call("read", ofTenant("c"))
	r.handle(e)
	r.ends(e, "completed")
	if n := len(children(t)); n != 2 {
		t.Errorf("%d processes", n)
	}
	touch(t, filepath.Join(dir, "b"))
	waits[1]()
	r.d.Close()
}

// The gateway's own question has a process of its own, which ends with the
// answer.
func TestStdioProbeAlone(t *testing.T) {
	nothingLeft(t)
	r, _, words := stdioRig(t, "", func(s *Server) { s.Era, s.Processes = EraAuto, 1 })
	e := r.call("read")
	r.handle(e)
	pid := r.pidOf(e)
	becomes(t, "one process is left", func() bool { return len(children(t)) == 1 })
	if got := strconv.Itoa(children(t)[0]); got != pid {
		t.Errorf("process %s is left, %s answered", got, pid)
	}
	if n := strings.Count(words.String(), "a server was started"); n != 2 {
		t.Errorf("started %d times", n)
	}
	r.d.Close()
}

// How much of a line was written is only read when that is certain: the end of a
// process is told when its writer has ended too.
func TestStdioWriterFirst(t *testing.T) {
	nothingLeft(t)
	_, s, _ := stdioRig(t, "")
	c := s.process("acme", "", true, true)
	if err := s.start(t.Context(), c); err != nil {
		t.Fatal(err)
	}
	release := make(chan struct{})
	c.pipes.Go(func() { <-release }) // as a writer does that has written and does not run
	msg, err := jsonrpc.Decode([]byte(`{"jsonrpc":"2.0","id":"1","method":"tools/call","params":{"name":"die"}}`), jsonrpc.Limits{})
	if err != nil {
		t.Fatal(err)
	}
	p, err := c.begin(msg)
	if err != nil {
		t.Fatal(err)
	}
	told := make(chan error, 1)
	go func() {
		_, err := p.send(context.Background(), func() {})
		told <- err
	}()
	<-c.exited
	select {
	case err := <-told:
		t.Errorf("told before: %v", err)
	case <-c.gone:
		t.Error("gone before")
	case <-time.After(50 * time.Millisecond):
	}
	close(release)
	var f *Fault
	if err := <-told; !errors.As(err, &f) || f.Kind != Broken {
		t.Errorf("%v", err)
	}
	<-c.gone
	s.close()
}

// Where calls share a process, who does not read holds up nobody else, and fails;
// where nobody else is there, the process waits.
func TestStdioSlowReaderAlone(t *testing.T) {
	for _, alone := range []bool{true, false} {
		t.Run(strconv.FormatBool(alone), func(t *testing.T) {
			nothingLeft(t)
			r, s, words := stdioRig(t, "")
			s.timing.stall = time.Hour
			e := r.call("progress", metered("1"), with("x", strconv.Itoa(3*mailboxLetters)))
			free := r.unread(e)
			becomes(t, "no more is taken", func() bool {
				s.mu.Lock()
				c := s.modern["acme"].c
				s.mu.Unlock()
				c.mu.Lock()
				defer c.mu.Unlock()
				for _, p := range c.asked {
					p.box.mu.Lock()
					full := len(p.box.letters) == mailboxLetters
					p.box.mu.Unlock()
					return full && c.company != nil
				}
				return false
			})
			if !alone {
				other := r.call("read")
				r.handle(other)
				r.ends(other, "completed")
			}
			if err := free(); err != nil {
				t.Fatal(err)
			}
			if alone {
				r.ends(e, "completed")
				if n := len(r.log.of(schemas.KindProgressed)); n != 3*mailboxLetters {
					t.Errorf("%d messages", n)
				}
			} else {
				if detail := r.ends(e, "unknown").Data.(*schemas.Failed).Detail; !strings.Contains(detail, errStdioSlow.Error()) {
					t.Error(detail)
				}
				becomes(t, "it is told", func() bool { return strings.Contains(words.String(), "heard notifications/cancelled") })
			}
			if n := len(children(t)); n != 1 {
				t.Errorf("%d processes", n)
			}
			r.d.Close()
		})
	}
}

// A server that says without end what may be said: its call ends, others are
// answered, and the log stays small.
func TestStdioChatter(t *testing.T) {
	nothingLeft(t)
	r, _, words := stdioRig(t, "")
	e := r.call("chatter")
	r.handle(e)
	r.ends(e, "too_large")
	gate := filepath.Join(t.TempDir(), "gate")
	slow := r.call("wait", with("x", gate))
	wait := r.beside(slow)
	untilThere(gate + ".began")
	for range 3 {
		other := r.call("read")
		r.handle(other)
		r.ends(other, "completed")
	}
	r.d.Close()
	wait()
	r.ends(slow, "unknown")
	if text := words.String(); len(text) > 100_000 || !strings.Contains(text, "is dropped") {
		t.Errorf("%d bytes in the log", len(text))
	}
}

// The same in a session of which nobody reads what it says: the session ends, and
// the process with it.
func TestStdioChatterSession(t *testing.T) {
	nothingLeft(t)
	_, s, words := stdioRig(t, "")
	s.timing.stall = 50 * time.Millisecond
	say := func(id, body string) *http.Response {
		t.Helper()
		req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, "stdio://s", strings.NewReader(body))
		if err != nil {
			t.Fatal(err)
		}
		req.Header.Set("Mcp-Session-Id", id)
		resp, err := s.RoundTrip(req)
		if err != nil {
			t.Fatal(err)
		}
		return resp
	}
	id := say("", initialize).Header.Get("Mcp-Session-Id")
	resp := say(id, `{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{"name":"chatter"}}`)
	resp.Body.Close() // which counts the call out, so that the rest is the session's
	becomes(t, "the process is gone", func() bool { return len(children(t)) == 0 })
	s.close()
	if text := words.String(); !strings.Contains(text, errStdioSlow.Error()) || len(text) > 100_000 {
		t.Errorf("%d bytes in the log", len(text))
	}
}

// A process that can say nothing any more is of no use, and ends.
func TestStdioHush(t *testing.T) {
	for how, kind := range map[string]func(*schemas.Event){"session": inSession("s1"), "modern": func(*schemas.Event) {}} {
		t.Run(how, func(t *testing.T) {
			nothingLeft(t)
			r, _, _ := stdioRig(t, "stays") // it does not go when its input ends, either
			before := r.call("write", kind)
			r.handle(before)
			r.ends(before, "completed")
			e := r.call("hush", kind)
			r.handle(e)
			if detail := r.ends(e, "unknown").Data.(*schemas.Failed).Detail; !strings.Contains(detail, "it has closed its standard output") {
				t.Error(detail)
			}
			after := r.call("write", kind)
			r.handle(after)
			r.ends(after, "completed")
			if n := len(children(t)); n != 1 {
				t.Errorf("%d processes", n)
			}
			r.d.Close()
		})
	}
}

// A process that does not read is ended: what it was given a part of may have had
// an effect, what waits behind that has not.
func TestStdioDeaf(t *testing.T) {
	nothingLeft(t)
	r, s, _ := stdioRig(t, "deaf:"+filepath.Join(t.TempDir(), "first"))
	s.timing.stall = 200 * time.Millisecond
	first := r.call("write", with("x", strings.Repeat("x", 1<<20)))
	wait := r.beside(first)
	becomes(t, "it is being written", func() bool {
		s.mu.Lock()
		defer s.mu.Unlock()
		for c := range s.children {
			return len(c.turn) == 1
		}
		return false
	})
	second := r.call("write")
	r.handle(second)
	wait()
	if detail := r.ends(first, "unknown").Data.(*schemas.Failed).Detail; !strings.Contains(detail, "it does not take what is sent to it") {
		t.Error(detail)
	}
	r.ends(second, "completed") // of the process in its place
	r.d.Close()
}
