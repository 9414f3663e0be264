package dispatch

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"waybill.dev/schemas"
	"waybill.dev/schemas/jsonrpc"
)

// idOf reads the id under which the gateway asks.
func idOf(r *http.Request) string {
	b, _ := io.ReadAll(r.Body)
	m, err := jsonrpc.Decode(b, jsonrpc.Limits{})
	if err != nil {
		return err.Error()
	}
	return string(m.ID().Raw())
}

func answerJSON(w http.ResponseWriter, status int, body string) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	_, _ = io.WriteString(w, body)
}

// hangUp drops the connection without an answer.
func hangUp(w http.ResponseWriter) {
	c, _, err := w.(http.Hijacker).Hijack()
	if err == nil {
		c.Close()
	}
}

// Every way in which an upstream can fail: how the call ends, and how often
// the upstream was called. tool "write" may have an effect, "read" not.
func TestFaults(t *testing.T) {
	const big = 64 << 10
	ok := func(id string) string { return `{"jsonrpc":"2.0","id":` + id + `,"result":{"resultType":"complete"}}` }
	fail := func(id string, code int) string {
		return fmt.Sprintf(`{"jsonrpc":"2.0","id":%s,"error":{"code":%d,"message":"no"}}`, id, code)
	}
	status := func(s int) func(http.ResponseWriter, string) {
		return func(w http.ResponseWriter, _ string) { http.Error(w, "sorry", s) }
	}
	later := func(s int, after string) func(http.ResponseWriter, string) {
		return func(w http.ResponseWriter, id string) {
			w.Header().Set("Retry-After", after)
			answerJSON(w, s, fail(id, -32000))
		}
	}
	text := func(s int, body func(id string) string) func(http.ResponseWriter, string) {
		return func(w http.ResponseWriter, id string) { answerJSON(w, s, body(id)) }
	}
	events := func(body func(id string) string) func(http.ResponseWriter, string) {
		return func(w http.ResponseWriter, id string) {
			w.Header().Set("Content-Type", "text/event-stream; charset=utf-8")
			_, _ = io.WriteString(w, body(id))
		}
	}
	for _, c := range []struct {
		name  string
		serve func(w http.ResponseWriter, id string)
		write string // ending and number of calls
		read  string
	}{
		{"answer", text(200, ok), "completed 1", "completed 1"},
		{"error 200", text(200, func(id string) string { return fail(id, -32602) }), "completed 1", "completed 1"},
		{"error 404", text(404, func(id string) string { return fail(id, -32601) }), "completed 1", "completed 1"},
		{"error 500", text(500, func(id string) string { return fail(id, -32603) }), "completed 1", "completed 1"},
		{"error 400 for null", text(400, func(string) string { return fail("null", -32600) }), "completed 1", "completed 1"},
		{"error 503 for null", text(503, func(string) string { return fail("null", -32600) }), "unknown 1", "unavailable 3"},
		{"error 200 for null", text(200, func(string) string { return fail("null", -32600) }), "bad_answer 1", "bad_answer 1"},
		{"hangs up", func(w http.ResponseWriter, _ string) { hangUp(w) }, "unknown 1", "unavailable 3"},
		{"404", status(404), "bad_answer 1", "bad_answer 1"},
		{"401", status(401), "bad_answer 1", "bad_answer 1"},
		{"429", status(429), "overloaded 1", "overloaded 3"},
		{"429 at once", later(429, "0"), "overloaded 1", "overloaded 3"},
		{"429 too late", later(429, "3600"), "overloaded 1", "overloaded 1"},
		{"503 at once", later(503, "0"), "unavailable 1", "unavailable 3"},
		{"503 too late", later(503, "3600"), "unavailable 1", "unavailable 1"},
		{"503", status(503), "unknown 1", "unavailable 3"},
		{"502", status(502), "unknown 1", "unavailable 3"},
		{"504", status(504), "unknown 1", "unavailable 3"},
		{"500", status(500), "unknown 1", "bad_answer 1"},
		{"redirect", func(w http.ResponseWriter, _ string) {
			w.Header().Set("Location", "/elsewhere")
			w.WriteHeader(http.StatusTemporaryRedirect)
		}, "bad_answer 1", "bad_answer 1"},
		{"202", status(202), "bad_answer 1", "bad_answer 1"},
		{"not JSON", text(200, func(string) string { return "<html>" }), "bad_answer 1", "bad_answer 1"},
		{"duplicate names", text(200, func(id string) string {
			return `{"jsonrpc":"2.0","id":` + id + `,"result":{"a":1,"a":2}}`
		}), "bad_answer 1", "bad_answer 1"},
		{"case variants", text(200, func(id string) string {
			return `{"jsonrpc":"2.0","id":` + id + `,"result":{"a":1,"A":2}}`
		}), "completed 1", "completed 1"},
		{"foreign id", text(200, func(string) string { return ok(`"other"`) }), "bad_answer 1", "bad_answer 1"},
		{"number id", text(200, func(string) string { return ok(`1`) }), "bad_answer 1", "bad_answer 1"},
		{"a request", text(200, func(id string) string {
			return `{"jsonrpc":"2.0","id":` + id + `,"method":"sampling/createMessage"}`
		}), "bad_answer 1", "bad_answer 1"},
		{"too large", text(200, func(id string) string {
			return `{"jsonrpc":"2.0","id":` + id + `,"result":"` + strings.Repeat("x", big) + `"}`
		}), "too_large 1", "too_large 1"},
		{"too large, chunked", func(w http.ResponseWriter, id string) {
			w.(http.Flusher).Flush()
			_, _ = io.WriteString(w, `{"jsonrpc":"2.0","id":`+id+`,"result":"`+strings.Repeat("x", big)+`"}`)
		}, "too_large 1", "too_large 1"},
		{"cut body", func(w http.ResponseWriter, id string) {
			w.Header().Set("Content-Length", "1000")
			answerJSON(w, 200, ok(id))
		}, "unknown 1", "unavailable 3"},
		{"stream", events(func(id string) string { return ": hi\n\ndata: " + ok(id) + "\n\n" }), "completed 1", "completed 1"},
		{"stream without answer", events(func(string) string { return ": hi\n\n" }), "unknown 1", "unavailable 3"},
		{"stream cut", events(func(id string) string { return "data: " + ok(id) }), "unknown 1", "unavailable 3"},
		{"stream garbled", events(func(string) string { return "data: {\n\n" }), "bad_answer 1", "bad_answer 1"},
		{"stream foreign id", events(func(string) string { return "data: " + ok(`"x"`) + "\n\n" }), "bad_answer 1", "bad_answer 1"},
		{"stream asks", events(func(string) string {
			return `data: {"jsonrpc":"2.0","id":1,"method":"roots/list"}` + "\n\n"
		}), "bad_answer 1", "bad_answer 1"},
		{"stream too large", events(func(id string) string {
			return "data: " + `{"jsonrpc":"2.0","id":` + id + `,"result":"` + strings.Repeat("x", big) + "\"}\n\n"
		}), "too_large 1", "too_large 1"},
		{"stream a bit too large", events(func(id string) string {
			return "data: " + `{"jsonrpc":"2.0","id":` + id + `,"result":"` + strings.Repeat("x", big/4) + "\"}\n\n"
		}), "too_large 1", "too_large 1"},
	} {
		for tool, want := range map[string]string{"write": c.write, "read": c.read} {
			t.Run(c.name+"/"+tool, func(t *testing.T) {
				t.Parallel()
				var calls atomic.Int32
				r := newRig(t, func(w http.ResponseWriter, req *http.Request) {
					if req.URL.Path != "/mcp" {
						t.Errorf("called %s", req.URL)
					}
					calls.Add(1)
					c.serve(w, idOf(req))
				}, func(o *Options) { o.MaxAnswer = big / 4 })
				e := r.call(tool)
				r.handle(e)
				end := r.log.ending(t)
				if got := outcome(end) + " " + strconv.Itoa(int(calls.Load())); got != want {
					t.Errorf("got %s, want %s: %+v", got, want, end.Data)
				}
				s := summary(end)
				if s.Attempts != int(calls.Load()) || s.UpstreamAt.IsZero() || s.By == "" || s.Target != e.Data.(*schemas.Authorized).Target ||
					!s.AuthorizedAt.Equal(e.Stored) || s.RequestedAt.IsZero() {
					t.Errorf("summary %+v", s)
				}
				if n := len(r.log.of(schemas.KindStarted)); (tool == "write") != (n == 1) {
					t.Errorf("%d claims", n)
				}
				// Delivered again, to this process and to another: nothing more.
				r.handle(e)
				if err := r.fresh().Handle(t.Context(), e, r.log.emit); err != nil {
					t.Fatal(err)
				}
				if tool == "write" && int(calls.Load()) != 1 {
					t.Errorf("called %d times", calls.Load())
				}
				if r.log.ending(t).Seq != end.Seq {
					t.Error("another ending")
				}
			})
		}
	}
}

// Nothing listens: nothing can have been written, so that even a call with an
// effect is tried again, and the claim is made once.
func TestUnreachable(t *testing.T) {
	for _, tool := range []string{"write", "read"} {
		r := newRig(t, nil)
		r.handle(r.call(tool))
		s := summary(r.want("unavailable"))
		if s.Attempts != 0 || !s.UpstreamAt.IsZero() {
			t.Errorf("said to be called: %+v", s)
		}
	}
}

// A kept-alive connection that the server closes after it has read the request
// is the case in which net/http sends some requests again by itself.
func TestTransportDoesNotRepeat(t *testing.T) {
	leaks(t)
	var calls atomic.Int32
	r := newRig(t, func(w http.ResponseWriter, req *http.Request) {
		id := idOf(req)
		if calls.Add(1) > 1 {
			hangUp(w)
			return
		}
		answerJSON(w, 200, `{"jsonrpc":"2.0","id":`+id+`,"result":{}}`)
	})
	first, second := r.call("write"), r.call("write")
	r.handle(first)
	r.handle(second)
	if n := calls.Load(); n != 2 {
		t.Errorf("the server read %d requests, want 2", n)
	}
	if ends := r.log.of(schemas.KindFailed); len(ends) != 1 || outcome(ends[0]) != "unknown" || ends[0].Call != second.Call {
		t.Error(r.log)
	}
	r.d.Close()
	r.http.Close()
}

// noisy is a fake upstream with two messages before its answer.
func noisy(effects *atomic.Int32) Upstream {
	return func(ctx context.Context, c Call, progress func([]byte) error) (Answer, error) {
		effects.Add(1)
		for i := range 2 {
			if err := progress(fmt.Appendf(nil, "message %d", i)); err != nil {
				return Answer{}, err
			}
		}
		return Answer{Status: 200, Body: []byte("answer")}, nil
	}
}

func (r *rig) use(d *Dispatcher, u Upstream) { d.upstreams["s"].call = u }

func digestHex(s string) string {
	sum := sha256.Sum256([]byte(s))
	return hex.EncodeToString(sum[:])
}

func digestOf(chunks ...string) string {
	h := sha256.New()
	for _, c := range chunks {
		_ = binary.Write(h, binary.BigEndian, uint64(len(c)))
		io.WriteString(h, c)
	}
	return hex.EncodeToString(h.Sum(nil))
}

func TestProgress(t *testing.T) {
	var effects atomic.Int32
	r := newRig(t, nil)
	r.use(r.d, noisy(&effects))
	r.handle(r.call("write"))
	s := summary(r.want("completed"))
	if s.Chunks != 2 || s.ChunksSHA256 != digestOf("message 0", "message 1") {
		t.Errorf("%+v", s)
	}
	for i, e := range r.log.of(schemas.KindProgressed) {
		if p := e.Data.(*schemas.Progressed); p.Index != i || string(e.Body) != "message "+strconv.Itoa(i) || p.By != s.By {
			t.Errorf("%+v %s", p, e.Body)
		}
	}
}

// crash is what the emit of a dying process panics with.
type crash struct{}

// A process dies before, or after, storing any of its events; another one gets
// the event again, now or when the log has forgotten the IDs. Always exactly
// one ending; for a call with an effect, at most one.
func TestCrash(t *testing.T) {
	for _, tool := range []string{"write", "read", "stream"} {
		for _, stored := range []bool{false, true} {
			for _, wait := range []time.Duration{0, time.Minute + time.Second, 10 * time.Minute} {
				for cut := range 5 {
					t.Run(fmt.Sprintf("%s/stored=%v/%v/%d", tool, stored, wait, cut), func(t *testing.T) {
						now := time.Now()
						clock := func() time.Time { return now }
						r := newRig(t, nil, func(o *Options) { o.Now = clock })
						r.log.now, r.log.window = clock, 2*time.Minute
						var effects atomic.Int32
						r.use(r.d, noisy(&effects))
						e := r.call(tool, authorized(func(a *schemas.Authorized) {
							a.Deadline = now.Add(time.Hour)
							if tool == "stream" {
								a.Stream, a.Deadline = true, time.Time{}
							}
						}))
						n := 0
						dying := func(ctx context.Context, e schemas.Event) (schemas.Receipt, error) {
							n++
							if n-1 == cut && !stored {
								panic(crash{})
							}
							receipt, err := r.log.emit(ctx, e)
							if n-1 == cut {
								panic(crash{})
							}
							return receipt, err
						}
						died := true
						func() {
							defer func() {
								if v := recover(); v != nil && v != (crash{}) {
									panic(v)
								}
							}()
							if err := r.d.Handle(t.Context(), e, dying); err != nil {
								t.Error(err)
							}
							died = false
						}()
						now = now.Add(wait)
						second := r.fresh()
						r.use(second, noisy(&effects))
						for range 2 {
							if err := second.Handle(t.Context(), e, r.log.emit); err != nil {
								t.Fatal(err)
							}
							now = now.Add(wait)
						}
						end := r.log.ending(t)
						if tool != "read" && effects.Load() > 1 {
							t.Errorf("%d effects", effects.Load())
						}
						claimedBefore := cut > 0 || stored
						var want string
						switch {
						case !died, tool == "read", !claimedBefore, cut == 3 && stored:
							want = "completed"
						case tool == "write":
							want = "unknown"
						default:
							want = "cancelled"
						}
						if outcome(end) != want {
							t.Errorf("%s, want %s%v", outcome(end), want, r.log)
						}
						// The ending vouches for every chunk of the log, and
						// none comes after it.
						var chunks []string
						for _, c := range r.log.of(schemas.KindProgressed) {
							chunks = append(chunks, string(c.Body))
							if c.Seq > end.Seq {
								t.Errorf("a chunk after the ending%v", r.log)
							}
						}
						s := summary(end)
						sum := digestOf(chunks...)
						if len(chunks) == 0 {
							sum = ""
						}
						if s.Chunks != len(chunks) || s.ChunksSHA256 != sum {
							t.Errorf("%d chunks %s, the log has %q%v", s.Chunks, s.ChunksSHA256, chunks, r.log)
						}
					})
				}
			}
		}
	}
}

// Each publish fails once, in three forms: not stored; stored, and Handle does
// not learn of it; stored, and emit's own retry finds its own event.
func TestPublishFails(t *testing.T) {
	for _, tool := range []string{"write", "read"} {
		for _, kind := range []schemas.Kind{schemas.KindStarted, schemas.KindProgressed, schemas.KindCompleted} {
			for _, form := range []string{"fail", "lose", "again"} {
				t.Run(fmt.Sprintf("%s/%s/%s", tool, kind, form), func(t *testing.T) {
					r := newRig(t, nil)
					var effects atomic.Int32
					r.use(r.d, noisy(&effects))
					hit := false
					once := func(e schemas.Event) bool {
						was := hit
						hit = hit || e.Kind() == kind
						return hit && !was
					}
					onceErr := func(e schemas.Event) error {
						if once(e) {
							return errLog
						}
						return nil
					}
					switch form {
					case "fail":
						r.log.fail = onceErr
					case "lose":
						r.log.lose = onceErr
					case "again":
						r.log.again = once
					}
					e := r.call(tool)
					err := r.d.Handle(t.Context(), e, r.log.emit)
					if wantErr := hit && form != "again"; errors.Is(err, errLog) != wantErr {
						t.Fatalf("%v", err)
					}
					if err != nil {
						if kind == schemas.KindStarted && effects.Load() > 0 {
							t.Error("called without a claim")
						}
						r.handle(e)
					}
					end := r.log.ending(t)
					if tool == "write" && effects.Load() > 1 {
						t.Errorf("%d effects", effects.Load())
					}
					want := "completed"
					if tool == "write" && (form == "lose" && kind != schemas.KindCompleted || form == "fail" && kind != schemas.KindStarted) {
						want = "unknown"
					}
					if outcome(end) != want {
						t.Errorf("%s, want %s%v", outcome(end), want, r.log)
					}
					if n := len(r.log.of(schemas.KindLate)); n > 0 && !(tool == "read" && kind == schemas.KindCompleted) {
						t.Errorf("%d late answers%v", n, r.log)
					}
				})
			}
		}
	}
}

// A run meets the chunks of an abandoned one: they stay, and ours follow.
func TestForeignChunks(t *testing.T) {
	r := newRig(t, nil)
	var effects atomic.Int32
	r.use(r.d, noisy(&effects))
	e := r.call("read")
	r.log.add(e.Next(&schemas.Progressed{Index: 0, By: "other"}, []byte("theirs")))
	r.handle(e)
	s := summary(r.want("completed"))
	if s.Chunks != 3 || s.ChunksSHA256 != digestOf("theirs", "message 0", "message 1") {
		t.Errorf("%+v%v", s, r.log)
	}
}

func never(t *testing.T) Upstream {
	return func(context.Context, Call, func([]byte) error) (Answer, error) {
		t.Error("the upstream was called")
		return Answer{}, nil
	}
}

// What a run does that finds the call old, expired or lost, without calling
// anything.
func TestHistory(t *testing.T) {
	past := authorized(func(a *schemas.Authorized) { a.Deadline = time.Now().Add(-time.Second) })
	open := authorized(func(a *schemas.Authorized) { a.Deadline = time.Time{} })
	started := &schemas.Started{Attempt: 1, By: "other"}
	for _, c := range []struct {
		name   string
		tool   string
		change func(*schemas.Event)
		after  []schemas.Payload // stored by others
		age    time.Duration
		lost   bool
		want   string // "" for nothing more
	}{
		{"expired", "write", past, nil, 0, false, "expired"},
		{"expired read", "read", past, nil, 0, false, "expired"},
		{"expired after start", "write", past, []schemas.Payload{started}, 0, false, "unknown"},
		{"expired stream after start", "write", func(e *schemas.Event) { stream(e); past(e) }, []schemas.Payload{started}, 0, false, "cancelled"},
		{"expired after ending", "write", past, []schemas.Payload{&schemas.Failed{Code: "unknown"}}, 0, false, ""},
		{"old after start", "write", open, []schemas.Payload{started}, time.Hour, false, "unknown"},
		{"old stream after start", "write", stream, []schemas.Payload{started}, time.Hour, false, "cancelled"},
		{"old after completed", "write", open, []schemas.Payload{started, &schemas.Completed{}}, time.Hour, false, ""},
		{"old read after completed", "read", open, []schemas.Payload{&schemas.Completed{}}, time.Hour, false, ""},
		{"old after cancelled", "read", open, []schemas.Payload{&schemas.Cancelled{}}, time.Hour, false, ""},
		{"old after cancel", "write", open, []schemas.Payload{&schemas.Cancel{}}, time.Hour, false, "cancelled"},
		{"old after denied, which came second", "write", past, []schemas.Payload{&schemas.Denied{Decision: schemas.Decision{N: 1}}}, time.Hour, false, "expired"},
		{"lost", "write", open, nil, 0, true, "unknown"},
		{"lost and expired", "write", past, nil, 0, true, "unknown"},
		{"lost stream", "write", stream, nil, 0, true, "cancelled"},
		{"lost after ending", "write", open, []schemas.Payload{&schemas.Completed{}}, 0, true, ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			now := time.Now()
			r := newRig(t, nil, func(o *Options) {
				o.Now = func() time.Time { return now }
				o.Lost = func(schemas.Event) bool { return c.lost }
			})
			r.log.now, r.log.window = r.opt.Now, 2*time.Minute
			r.use(r.d, never(t))
			// Another call of the session has all of it behind itself.
			other := r.call("write")
			r.log.add(other.Next(started, nil))
			r.log.add(other.Next(&schemas.Completed{}, nil))

			e := r.call(c.tool, c.change)
			for _, p := range c.after {
				r.log.add(e.Next(p, nil))
			}
			now = now.Add(c.age)
			n := len(r.log.events)
			r.handle(e)
			if c.want == "" {
				if len(r.log.events) != n {
					t.Errorf("something was stored%v", r.log)
				}
				return
			}
			ends := append(r.log.of(schemas.KindFailed), r.log.of(schemas.KindCancelled)...)
			if len(ends) == 0 || outcome(ends[0]) != c.want || ends[0].Call != e.Call {
				t.Errorf("want %s%v", c.want, r.log)
			}
		})
	}
}

// An old delivery that nobody has touched is carried out.
func TestOldIsCarriedOut(t *testing.T) {
	now := time.Now()
	r := newRig(t, nil, func(o *Options) { o.Now = func() time.Time { return now } })
	var effects atomic.Int32
	r.use(r.d, noisy(&effects))
	e := r.call("write", authorized(func(a *schemas.Authorized) { a.Deadline = now.Add(24 * time.Hour) }))
	now = now.Add(time.Hour)
	r.handle(e)
	r.want("completed")
	if effects.Load() != 1 || r.log.reads == 0 {
		t.Error(effects.Load(), r.log.reads)
	}
}

// Two deliveries at once: one carries the call out, the other ends it as
// unknown, and the answer is kept as late.
func TestLate(t *testing.T) {
	r := newRig(t, nil)
	called, answer := make(chan bool), make(chan bool)
	r.use(r.d, func(context.Context, Call, func([]byte) error) (Answer, error) {
		called <- true
		<-answer
		return Answer{Status: 200, Body: []byte("the answer")}, nil
	})
	e := r.call("write")
	done := make(chan error)
	go func() { done <- r.d.Handle(t.Context(), e, r.log.emit) }()
	<-called
	other := r.fresh()
	r.use(other, never(t))
	if err := other.Handle(t.Context(), e, r.log.emit); err != nil {
		t.Fatal(err)
	}
	close(answer)
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	r.want("unknown")
	late := r.log.of(schemas.KindLate)
	if len(late) != 1 || string(late[0].Body) != "the answer" || late[0].Data.(*schemas.Late).By != r.log.of(schemas.KindStarted)[0].Data.(*schemas.Started).By {
		t.Error(r.log)
	}
}

// "Never carried out" is only said by the owner of the claim: here the first
// run is at work while the second finds the queue full.
func TestOverloadedIsTrue(t *testing.T) {
	r := newRig(t, nil)
	called, answer := make(chan bool), make(chan bool)
	r.use(r.d, func(context.Context, Call, func([]byte) error) (Answer, error) {
		called <- true
		<-answer
		return Answer{Status: 200}, nil
	})
	e := r.call("write")
	done := make(chan error)
	go func() { done <- r.d.Handle(t.Context(), e, r.log.emit) }()
	<-called
	full := r.fresh()
	full.upstreams["s"].calls = &limit{slots: make(chan struct{})}
	unconfigured := r.fresh()
	delete(unconfigured.upstreams, "s")
	for _, other := range []*Dispatcher{full, unconfigured} {
		if err := other.Handle(t.Context(), e, r.log.emit); err != nil {
			t.Fatal(err)
		}
		r.want("unknown")
	}
	close(answer)
	if err := <-done; err != nil {
		t.Fatal(err)
	}
}

func TestBodyByReference(t *testing.T) {
	var got []byte
	r := newRig(t, nil)
	r.use(r.d, func(_ context.Context, c Call, _ func([]byte) error) (Answer, error) {
		got = c.Body
		return Answer{}, nil
	})
	ref := func(body string, sum [32]byte) func(*schemas.Event) {
		return func(e *schemas.Event) {
			a := e.Data.(*schemas.Authorized)
			a.RequestedSeq = r.log.add(e.Next(&a.Requested, []byte(body))).Seq
			a.BodySHA256 = hex.EncodeToString(sum[:])
			e.Body = nil
		}
	}
	r.handle(r.call("read", ref("large", sha256.Sum256([]byte("large")))))
	r.want("completed")
	if string(got) != "large" {
		t.Errorf("%q", got)
	}
	r.log.events, r.log.ids = nil, nil
	got = nil
	r.handle(r.call("write", ref("larger", sha256.Sum256([]byte("large")))))
	r.want("internal")
	if got != nil {
		t.Error("sent")
	}
}

func TestDeadline(t *testing.T) {
	leaks(t)
	for tool, want := range map[string]string{"write": "unknown", "read": "timeout"} {
		gone := make(chan bool, 1)
		r := newRig(t, func(w http.ResponseWriter, req *http.Request) {
			_ = idOf(req)
			<-req.Context().Done()
			gone <- true
		})
		r.handle(r.call(tool, authorized(func(a *schemas.Authorized) { a.Deadline = time.Now().Add(50 * time.Millisecond) })))
		s := summary(r.want(want))
		if s.Attempts != 1 {
			t.Errorf("%+v", s)
		}
		<-gone
		r.d.Close()
		r.http.Close()
	}
}

// The process is stopped in each state that a call can be in.
func TestShutdown(t *testing.T) {
	for _, c := range []struct {
		tool string
		want string // "" for an error and no ending
	}{{"write", "unknown"}, {"read", ""}, {"stream", "cancelled"}} {
		r := newRig(t, nil)
		called := make(chan bool, 1)
		r.use(r.d, func(ctx context.Context, _ Call, _ func([]byte) error) (Answer, error) {
			called <- true
			<-ctx.Done()
			return Answer{}, ctx.Err()
		})
		ctx, stop := context.WithCancel(t.Context())
		var change []func(*schemas.Event)
		if c.tool == "stream" {
			change = append(change, stream)
		}
		e := r.call(c.tool, change...)
		go func() { <-called; stop() }()
		err := r.d.Handle(ctx, e, r.log.emit)
		if c.want == "" {
			if !errors.Is(err, context.Canceled) || len(r.log.events) != 1 {
				t.Error(err, r.log)
			}
			continue
		}
		if err != nil {
			t.Error(err)
		}
		r.want(c.want)

		// And before anything was done: left to another.
		e = r.call(c.tool, change...)
		n := len(r.log.events)
		if err := r.d.Handle(ctx, e, r.log.emit); !errors.Is(err, context.Canceled) || len(r.log.events) != n {
			t.Error(err, r.log)
		}
	}
}

func TestUnreachableAtShutdown(t *testing.T) {
	r := newRig(t, nil)
	ctx, stop := context.WithCancel(t.Context())
	r.use(r.d, func(context.Context, Call, func([]byte) error) (Answer, error) {
		stop()
		return Answer{}, faultf(Unsent, "no way")
	})
	if err := r.d.Handle(ctx, r.call("write"), r.log.emit); err != nil {
		t.Fatal(err)
	}
	r.want("unavailable")
}

func TestCancel(t *testing.T) {
	leaks(t)
	gone := make(chan bool, 1)
	called := make(chan bool)
	r := newRig(t, func(w http.ResponseWriter, req *http.Request) {
		_ = idOf(req)
		w.Header().Set("Content-Type", "text/event-stream")
		w.(http.Flusher).Flush()
		called <- true
		<-req.Context().Done()
		gone <- true
	})
	wish := func(d *Dispatcher, e schemas.Event) {
		if err := d.Cancel(t.Context(), e.Next(&schemas.Cancel{Reason: "enough"}, nil), r.log.emit); err != nil {
			t.Error(err)
		}
	}
	// While it runs, twice over; the other call of the tenant goes on.
	e := r.call("write", stream)
	done := make(chan error)
	go func() { done <- r.d.Handle(t.Context(), e, r.log.emit) }()
	<-called
	wish(r.d, e)
	wish(r.d, e)
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	<-gone
	if p := r.want("cancelled").Data.(*schemas.Cancelled); p.Reason != "enough" || p.Attempts != 1 {
		t.Errorf("%+v", p)
	}
	// Of another tenant: nothing. Before the call: not called.
	e = r.call("write")
	foreign := e
	foreign.Tenant = "other"
	wish(r.d, foreign)
	wish(r.d, e)
	r.handle(e)
	if ends := r.log.of(schemas.KindCancelled); len(ends) != 2 || summary(ends[1]).Attempts != 0 {
		t.Error(r.log)
	}
	if len(r.d.calls.running) != 0 {
		t.Error("runs are left")
	}
	r.d.Close()
	r.http.Close()
}

// The answer came before the wish: it stands.
func TestAnswerWins(t *testing.T) {
	r := newRig(t, nil)
	e := r.call("write")
	r.use(r.d, func(context.Context, Call, func([]byte) error) (Answer, error) {
		_ = r.d.Cancel(t.Context(), e.Next(&schemas.Cancel{}, nil), nil)
		return Answer{Status: 200}, nil
	})
	r.handle(e)
	r.want("completed")
}

func TestLimits(t *testing.T) {
	r := newRig(t, nil, func(o *Options) {
		o.Servers[0].Concurrency, o.Servers[0].Queue = 1, 1
		o.Servers = append(o.Servers, Server{Name: "other", URL: "http://127.0.0.1:1"})
	})
	called, answer := make(chan bool), make(chan bool)
	slow := func(context.Context, Call, func([]byte) error) (Answer, error) {
		called <- true
		<-answer
		return Answer{Status: 200}, nil
	}
	r.use(r.d, slow)
	r.d.upstreams["other"].call = func(context.Context, Call, func([]byte) error) (Answer, error) { return Answer{}, nil }
	var all sync.WaitGroup
	first, second, third := r.call("write"), r.call("write"), r.call("write")
	all.Go(func() { r.handle(first) })
	<-called
	// The second waits, and is cancelled there.
	all.Go(func() { r.handle(second) })
	for r.d.Stats()[0].Waiting == 0 {
		runtime.Gosched() // until it has arrived
	}
	r.handle(third)
	if ends := r.log.of(schemas.KindFailed); len(ends) != 1 || outcome(ends[0]) != "overloaded" || ends[0].Call != third.Call {
		t.Fatal(r.log)
	}
	// Nobody else is held up.
	r.handle(r.call("write", authorized(func(a *schemas.Authorized) { a.Server = "other" })))
	if s := r.d.Stats(); s[0].InFlight != 1 || s[0].Waiting != 1 || s[1].InFlight != 0 {
		t.Errorf("%+v", s)
	}
	_ = r.d.Cancel(t.Context(), second.Next(&schemas.Cancel{}, nil), nil)
	for r.d.Stats()[0].Waiting != 0 {
		runtime.Gosched()
	}
	// One that waits until its deadline has expired.
	r.handle(r.call("write", authorized(func(a *schemas.Authorized) { a.Deadline = time.Now().Add(5 * time.Millisecond) })))
	close(answer)
	all.Wait()
	if ends := r.log.of(schemas.KindFailed); len(ends) != 2 || outcome(ends[1]) != "expired" || summary(ends[1]).Attempts != 0 {
		t.Error(r.log)
	}
	if n := len(r.log.of(schemas.KindCancelled)); n != 1 {
		t.Error(r.log)
	}
	if s := r.d.Stats(); s[0].InFlight != 0 {
		t.Errorf("%+v", s)
	}
}

func TestConfig(t *testing.T) {
	load, past := (&memLog{}).load, (&memLog{}).past
	for name, s := range map[string][]Server{
		"twice":    {{Name: "s", URL: "http://h/"}, {Name: "s", URL: "http://h/"}},
		"protocol": {{Name: "s", Protocol: "gopher", URL: "http://h/"}},
		"scheme":   {{Name: "s", URL: "file:///etc/passwd"}},
		"host":     {{Name: "s", URL: "http:///mcp"}},
		"replay":   {{Name: "s", URL: "http://h/", Header: http.Header{"Idempotency-Key": {"1"}}}},
		"mirror":   {{Name: "s", URL: "http://h/", Header: http.Header{"mcp-name": {"1"}}}},
		"newline":  {{Name: "s", URL: "http://h/", Header: http.Header{"X-A": {"1\r\nB: 2"}}}},
	} {
		if _, err := New(Options{Servers: s, Load: load, Past: past}); err == nil {
			t.Error(name)
		}
	}
	if _, err := New(Options{}); err == nil {
		t.Error("without a log")
	}
}

// Without the log nothing is done and nothing is said.
func TestLogAway(t *testing.T) {
	for name, c := range map[string]struct {
		tool   string
		change func(*schemas.Event)
		fault  func(*rig)
	}{
		"past of an expired call": {"write", authorized(func(a *schemas.Authorized) { a.Deadline = time.Unix(1, 0) }), func(r *rig) {
			r.opt.Past = func(context.Context, schemas.Event) ([]schemas.Event, error) { return nil, errLog }
		}},
		"claim": {"write", nil, func(r *rig) { r.log.fail = func(schemas.Event) error { return errLog } }},
		"foreign claim": {"write", nil, func(r *rig) {
			// Stored while this process runs, or it would look at the past first.
			r.opt.Past = func(context.Context, schemas.Event) ([]schemas.Event, error) { return nil, nil }
			r.log.add(r.log.events[0].Next(&schemas.Started{Attempt: 1, By: "other"}, nil))
			r.opt.Load = func(context.Context, uint64) (schemas.Event, error) { return schemas.Event{}, errLog }
		}},
		"body": {"read", authorized(func(a *schemas.Authorized) { a.BodySHA256 = "00" }), func(r *rig) {
			r.opt.Load = func(context.Context, uint64) (schemas.Event, error) { return schemas.Event{}, errLog }
		}},
	} {
		t.Run(name, func(t *testing.T) {
			r := newRig(t, nil)
			change := c.change
			if change == nil {
				change = func(*schemas.Event) {}
			}
			e := r.call(c.tool, change)
			c.fault(r)
			n := len(r.log.events)
			d := r.fresh()
			r.use(d, never(t))
			if err := d.Handle(t.Context(), e, r.log.emit); !errors.Is(err, errLog) || !strings.Contains(err.Error(), string(e.Call)) {
				t.Error(err)
			}
			if len(r.log.events) != n {
				t.Error(r.log)
			}
		})
	}
}

// An event of another kind is nobody's business here, and not to be delivered
// for ever.
func TestOtherKind(t *testing.T) {
	r := newRig(t, nil, func(o *Options) { o.Log = slog.New(slog.DiscardHandler) })
	e := r.call("read")
	r.handle(e.Next(&schemas.Cancel{}, nil))
	if len(r.log.events) != 1 {
		t.Error(r.log)
	}
}

// A call that waits for a place does not hold its body meanwhile.
func TestBodyAfterPlace(t *testing.T) {
	r := newRig(t, nil)
	e := r.call("read", authorized(func(a *schemas.Authorized) { a.BodySHA256 = digestHex("large") }))
	a := e.Data.(*schemas.Authorized)
	a.RequestedSeq = r.log.add(e.Next(&a.Requested, []byte("large"))).Seq
	var loads atomic.Int32
	r.opt.Load = func(ctx context.Context, seq uint64) (schemas.Event, error) {
		loads.Add(1)
		return r.log.load(ctx, seq)
	}
	r.d = r.fresh()
	r.use(r.d, func(context.Context, Call, func([]byte) error) (Answer, error) { return Answer{Status: 200}, nil })
	slots := make(chan struct{}, 1)
	slots <- struct{}{}
	r.d.upstreams["s"].calls = &limit{slots: slots, queue: 1}
	done := make(chan error)
	go func() { done <- r.d.Handle(t.Context(), e, r.log.emit) }()
	for r.d.Stats()[0].Waiting == 0 {
		runtime.Gosched()
	}
	if n := loads.Load(); n != 0 {
		t.Errorf("%d reads of the body before there is a place", n)
	}
	<-slots
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	r.want("completed")
	if loads.Load() != 1 || len(slots) != 0 {
		t.Error(loads.Load(), len(slots))
	}
}

// Stopped while it waits for a place: nothing has happened, another may do it.
func TestStoppedInQueue(t *testing.T) {
	r := newRig(t, nil)
	r.use(r.d, never(t))
	r.d.upstreams["s"].calls = &limit{slots: make(chan struct{}), queue: 1}
	ctx, stop := context.WithCancel(t.Context())
	done := make(chan error)
	e := r.call("write")
	go func() { done <- r.d.Handle(ctx, e, r.log.emit) }()
	for r.d.Stats()[0].Waiting == 0 {
		runtime.Gosched()
	}
	stop()
	if err := <-done; !errors.Is(err, context.Canceled) || len(r.log.events) != 1 {
		t.Error(err, r.log)
	}
}

// A stream that breaks is not taken up again here; the client asks again.
func TestBrokenStream(t *testing.T) {
	for method, want := range map[string]string{"subscriptions/listen": "unavailable", "tools/call": "unknown"} {
		r := newRig(t, nil)
		calls := 0
		r.use(r.d, func(context.Context, Call, func([]byte) error) (Answer, error) {
			calls++
			return Answer{}, errors.New("reset")
		})
		r.handle(r.method(method, "write", "", stream))
		r.want(want)
		if calls != 1 {
			t.Errorf("%s: %d calls", method, calls)
		}
	}
}
