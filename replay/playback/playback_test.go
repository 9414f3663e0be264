package playback_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"waybill.dev/replay/playback"
	"waybill.dev/schemas"
)

var noon = time.Date(2026, 11, 28, 12, 0, 0, 0, time.UTC)

// recording is a session as the log has it, second by second.
type recording struct {
	revision string
	events   []schemas.Event
	at       time.Duration
}

const key = schemas.SessionKey("s0")

func newRecording(revision string) *recording {
	r := &recording{revision: revision}
	if revision < "2026-07-28" {
		r.add("", &schemas.Opened{Protocol: "mcp", Name: "x", Server: "files", Revision: revision}, `{"jsonrpc":"2.0","id":1,"method":"initialize"}`)
	}
	return r
}

// add adds an event, a second after the one before.
func (r *recording) add(call schemas.CallID, data schemas.Payload, body string) *recording {
	r.at += time.Second
	e := schemas.Event{
		Tenant: "acme", Session: key, Call: call, Root: call, Agent: "researcher", Data: data,
		Seq: uint64(len(r.events)+1) * 10, Stored: noon.Add(r.at), Time: noon.Add(r.at),
	}
	if body != "" {
		e.Body = []byte(body)
	}
	r.events = append(r.events, e)
	return r
}

// asked adds a request.
func (r *recording) asked(call schemas.CallID, method, name, params string) *recording {
	return r.add(call, requested(r.revision, method, name), request(method, params))
}

// call adds a request and its answer.
func (r *recording) call(call schemas.CallID, method, name, params, result string) *recording {
	return r.asked(call, method, name, params).done(call, result)
}

func (r *recording) done(call schemas.CallID, result string) *recording {
	return r.add(call, &schemas.Completed{Status: 200}, `{"jsonrpc":"2.0","id":"`+string(call)+`","result":`+result+`}`)
}

func requested(revision, method, name string) *schemas.Requested {
	return &schemas.Requested{
		Target: schemas.Target{Protocol: "mcp", Server: "files", Method: method, Name: name}, Revision: revision,
		OneWay: strings.HasPrefix(method, "notifications/"), Stream: method == "subscriptions/listen",
	}
}

func request(method, params string) string {
	id := `"id":7,`
	if strings.HasPrefix(method, "notifications/") {
		id = ""
	}
	return `{"jsonrpc":"2.0",` + id + `"method":"` + method + `","params":` + params + `}`
}

// agent is a client of a Log: what the edge would be.
type agent struct {
	t        *testing.T
	l        *playback.Log
	revision string
	session  schemas.SessionKey
	n        int
	reported *[]playback.Difference
}

// again plays a recording to an agent, in a session of its own.
func (r *recording) again(t *testing.T, o playback.Options) *agent {
	t.Helper()
	var reported []playback.Difference
	o.Report = func(d playback.Difference) { reported = append(reported, d) }
	l, err := playback.New(r.events, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(l.Close)
	a := &agent{t: t, l: l, revision: r.revision, session: "s1", reported: &reported}
	a.open()
	return a
}

func (a *agent) open() {
	if a.revision < "2026-07-28" {
		a.say("", &schemas.Opened{Protocol: "mcp", Name: "x", Server: "files", Revision: a.revision}, `{}`)
	}
}

func (a *agent) event(call schemas.CallID, data schemas.Payload, body string) schemas.Event {
	e := schemas.Event{Tenant: "acme", Session: a.session, Call: call, Root: call, Agent: "researcher", Edge: "e1", Data: data}
	if body != "" {
		e.Body = []byte(body)
	}
	return e
}

func (a *agent) say(call schemas.CallID, data schemas.Payload, body string) {
	a.t.Helper()
	if _, err := a.l.Store(a.t.Context(), a.event(call, data, body)); err != nil {
		a.t.Error(err)
	}
}

// call makes a call and returns what came of it; told sees each event.
func (a *agent) call(ctx context.Context, method, name, params string, told func(schemas.Event)) []schemas.Event {
	a.t.Helper()
	a.n++
	id := schemas.CallID(fmt.Sprintf("c%d", 100+a.n))
	var all []schemas.Event
	err := a.l.Ask(ctx, a.event(id, requested(a.revision, method, name), request(method, params)), func(_ context.Context, e schemas.Event) (schemas.Receipt, error) {
		if e.Call != id || e.Session != a.session || e.Edge != "e1" && !e.ToTask() {
			a.t.Errorf("an event of somebody else: %+v", e)
		}
		all = append(all, e)
		if told != nil {
			told(e)
		}
		return schemas.Receipt{}, nil
	})
	if err != nil && ctx.Err() == nil {
		a.t.Error(err)
	}
	return all
}

// answer is the body of the ending of a call.
func (a *agent) answer(method, name, params string) string {
	a.t.Helper()
	all := a.call(a.t.Context(), method, name, params, nil)
	if len(all) == 0 || !all[len(all)-1].Kind().Ends() {
		a.t.Fatalf("no ending: %v", all)
	}
	return string(all[len(all)-1].Body)
}

func (a *agent) says(method, name, params, want string) {
	a.t.Helper()
	if got := a.answer(method, name, params); !strings.Contains(got, want) {
		a.t.Errorf("%s %s: %s, want %s", name, params, got, want)
	}
}

// ended checks the summary.
func (a *agent) ended(want playback.Summary) {
	a.t.Helper()
	synctest.Wait()
	if got := a.l.Summary(); fmt.Sprint(got) != fmt.Sprint(want) {
		a.t.Errorf("summary %+v, want %+v\n%+v", got, want, *a.reported)
	}
}

const modern, legacy = "2026-07-28", "2025-11-25"

// Each recorded call answers once, in its order, to params that say the same,
// however they are written and whatever _meta says.
func TestMatch(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := newRecording(modern).
			call("c1", "tools/call", "get", `{"name":"get","arguments":{"a":1,"b":"é"},"_meta":{"x":1}}`, `"first"`).
			call("c2", "tools/call", "get", `{"arguments":{"a":1,"b":"é"},"name":"get"}`, `"second"`).
			call("c3", "tools/call", "get", `{"name":"get","arguments":{"a":9007199254740993}}`, `"large"`).
			call("c4", "tools/list", "", `{}`, `"list"`).
			asked("c5", "notifications/x", "", `{}`).add("c5", &schemas.Completed{Status: 202}, "").
			add("c6", &schemas.Requested{Target: schemas.Target{Protocol: "mcp", Server: "files", Method: "tools/call", Name: "get"}, Revision: modern, Back: true}, request("tools/call", `{}`)).
			again(t, playback.Options{})
		a.says("tools/call", "get", `{"name":"get","arguments":{"b":"\u00e9","a":1}}`, `"first"`)
		a.says("tools/call", "get", ` { "name":"get","arguments":{"a":1, "b":"é"}, "_meta":{}}`, `"second"`)
		a.says("tools/call", "get", `{"name":"get","arguments":{"a":9007199254740992}}`, `+ /arguments/a: 9007199254740992`)
		a.says("tools/call", "get", `{"name":"get","arguments":{"a":9007199254740993}}`, `"large"`)
		a.says("tools/call", "get", `{"name":"get","arguments":{"a":1,"b":"é"}}`, `was asked for 2 times then, and now once more`)
		if all := a.call(t.Context(), "notifications/x", "", `{}`, nil); len(all) != 2 || all[1].Kind() != schemas.KindCompleted {
			t.Errorf("a notification: %v", all)
		}
		if all := a.call(t.Context(), "notifications/y", "", `{}`, nil); len(all) != 2 || all[1].Kind() != schemas.KindCompleted {
			t.Errorf("a notification that was not recorded: %v", all)
		}
		a.says("prompts/list", "", `{}`, `what comes next there is tools/list`)
		a.ended(playback.Summary{Served: 4, Reordered: 1, Missed: 4, Differences: 4, Never: 1, Unasked: []string{"tools/list (event 70)"}})
	})
}

// What was asked for elsewhere, or by another revision, is said to be just that.
func TestElsewhere(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRecording(modern).call("c1", "tools/call", "a", `{}`, `"a"`)
		for i := range r.events {
			if d, ok := r.events[i].Data.(*schemas.Requested); ok {
				d.Server = "mail"
			}
		}
		a := r.again(t, playback.Options{})
		a.says("tools/call", "a", `{}`, "tools/call a was asked for at another endpoint then: at /mcp/mail")
		a.revision = legacy
		a.says("tools/call", "a", `{}`, "tools/call a was asked for by revision 2026-07-28 of the protocol then, and now by 2025-11-25")
	})
}

// A session without an ID that is asked in another order is answered all the same.
func TestOrder(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := newRecording(modern).call("c1", "tools/call", "a", `{}`, `"a"`).call("c2", "tools/call", "b", `{"x":1}`, `"b"`).again(t, playback.Options{})
		a.says("tools/call", "b", `{"x":1}`, `"b"`)
		a.says("tools/call", "a", `{}`, `"a"`)
		a.ended(playback.Summary{Served: 2, Reordered: 1})
	})
}

// Everything takes the time that it took, or none.
func TestTimes(t *testing.T) {
	for _, fast := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			a := newRecording(modern).
				asked("c1", "tools/call", "a", `{"_meta":{"progressToken":"then"}}`).
				add("c1", &schemas.Authorized{}, "").
				add("c1", &schemas.Progressed{Index: 0}, `{"jsonrpc":"2.0","method":"notifications/progress","params":{"progressToken":"then","progress":1}}`).
				add("c1", &schemas.Progressed{Index: 1}, `{"jsonrpc":"2.0","method":"notifications/message","params":{"data":"c1"}}`).
				done("c1", `"a"`).
				again(t, playback.Options{Fast: fast})
			var times []time.Duration
			start := time.Now()
			all := a.call(t.Context(), "tools/call", "a", `{"_meta":{"progressToken":5}}`, func(schemas.Event) { times = append(times, time.Since(start)) })
			want := []time.Duration{0, 2 * time.Second, 3 * time.Second, 4 * time.Second}
			if fast {
				want = make([]time.Duration, 4)
			}
			if !slices.Equal(times, want) {
				t.Errorf("fast %v: told after %v, want %v", fast, times, want)
			}
			if len(all) == 4 && (!strings.Contains(string(all[1].Body), `"progressToken":5,`) || !strings.Contains(string(all[2].Body), `"data":"c1"`)) {
				t.Errorf("told %s and %s", all[1].Body, all[2].Body)
			}
		})
	}
}

// What was not answered then, or is not what it was, ends as it did.
func TestEndings(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := newRecording(modern).
			asked("c1", "tools/call", "denied", `{}`).add("c1", &schemas.Denied{Decision: schemas.Decision{N: 1}}, "").
			asked("c2", "tools/call", "failed", `{"n":2}`).add("c2", &schemas.Failed{Code: schemas.FailUnknown}, "").
			asked("c3", "tools/call", "open", `{"n":3}`).
			asked("c4", "tools/call", "held", `{"n":4}`).
			add("c4", &schemas.Held{Decision: schemas.Decision{N: 1}, RequestedSeq: 70, RequestedAt: noon, Expires: noon.Add(time.Hour)}, "").
			add("c4", &schemas.Authorized{Decision: schemas.Decision{N: 2}}, "").done("c4", `"granted"`).
			again(t, playback.Options{Fast: true})
		kinds := func(name, params string) (kinds []schemas.Kind) {
			for _, e := range a.call(t.Context(), "tools/call", name, params, nil) {
				kinds = append(kinds, e.Kind())
				if h, ok := e.Data.(*schemas.Held); ok && (!h.Expires.After(time.Now()) || h.RequestedSeq == 70) {
					t.Errorf("held until %v, by the request at %d", h.Expires, h.RequestedSeq)
				}
			}
			return kinds
		}
		for _, c := range []struct {
			name, params string
			want         []schemas.Kind
		}{
			{"denied", `{}`, []schemas.Kind{schemas.KindRequested, schemas.KindDenied}},
			{"failed", `{"n":2}`, []schemas.Kind{schemas.KindRequested, schemas.KindFailed}},
			{"held", `{"n":4}`, []schemas.Kind{schemas.KindRequested, schemas.KindHeld, schemas.KindCompleted}},
		} {
			if got := kinds(c.name, c.params); !slices.Equal(got, c.want) {
				t.Errorf("%s: %v, want %v", c.name, got, c.want)
			}
		}
		a.says("tools/call", "open", `{"n":3}`, "the record has no ending of this call")
	})
}

// A question in a call waits for the client's answer; what comes after a different
// one was not recorded.
func TestQuestion(t *testing.T) {
	ask := func() *recording {
		return newRecording(legacy).
			asked("c1", "tools/call", "ask", `{}`).
			add("c1", &schemas.Asked{Target: schemas.Target{Method: "elicitation/create"}, ID: "q1"}, `{"jsonrpc":"2.0","id":1,"method":"elicitation/create","params":{}}`).
			add("c1", &schemas.Answered{Target: schemas.Target{Method: "elicitation/create"}, ID: "q1"}, `{"jsonrpc":"2.0","id":"q1","result":{"action":"accept","content":{"name":"Ada"}}}`).
			done("c1", `"Hello, Ada"`)
	}
	for name, c := range map[string]struct {
		answer, want string
		took         time.Duration
	}{
		"the same":  {`{"jsonrpc":"2.0","id":"q1","result":{"content":{"name":"Ada"},"action":"accept"}}`, `"Hello, Ada"`, 12 * time.Second},
		"another":   {`{"jsonrpc":"2.0","id":"q1","result":{"action":"accept","content":{"name":"Eve"}}}`, `+ /result/content/name: \"Eve\"`, 11 * time.Second},
		"an error":  {`{"jsonrpc":"2.0","id":"q1","error":{"code":-1,"message":"no"}}`, `+ /error: {\"code\":-1`, 11 * time.Second},
		"no answer": {"", "the client answered then, and does not now", 61 * time.Second},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				a := ask().again(t, playback.Options{Patience: time.Minute})
				start := time.Now()
				all := a.call(t.Context(), "tools/call", "ask", `{}`, func(e schemas.Event) {
					if e.Kind() == schemas.KindAsked && c.answer != "" {
						time.AfterFunc(10*time.Second, func() { a.say("c101", &schemas.Answered{ID: "q1"}, c.answer) })
					}
				})
				if end := string(all[len(all)-1].Body); !strings.Contains(end, c.want) {
					t.Errorf("%s, want %s", end, c.want)
				}
				if took := time.Since(start); took != c.took {
					t.Errorf("took %v, want %v", took, c.took)
				}
				if n := len(*a.reported); (n == 0) != (name == "the same") {
					t.Errorf("reported %v", *a.reported)
				}
			})
		})
	}
}

// A call that was taken back waits to be, and one that was not says so.
func TestTakenBack(t *testing.T) {
	progress := `{"jsonrpc":"2.0","method":"notifications/progress","params":{"progressToken":1,"progress":1}}`
	record := func() *recording {
		return newRecording(modern).
			asked("c1", "tools/call", "long", `{}`).
			add("c1", &schemas.Progressed{Index: 0}, progress).
			add("c1", &schemas.Progressed{Index: 1}, progress).
			add("c1", &schemas.Cancel{Reason: "the caller left"}, "").
			add("c1", &schemas.Cancelled{}, "").
			call("c2", "tools/call", "short", `{"n":2}`, `"done"`)
	}
	for _, after := range []int{0, 1} { // progress, of which it saw one more then
		synctest.Test(t, func(t *testing.T) {
			a := record().again(t, playback.Options{Fast: true})
			ctx, leave := context.WithCancel(t.Context())
			a.call(ctx, "tools/call", "long", `{}`, func(e schemas.Event) {
				if p, ok := e.Data.(*schemas.Progressed); ok && p.Index == after {
					leave()
				}
			})
			a.says("tools/call", "short", `{"n":2}`, `"done"`)
			a.ended(playback.Summary{Served: 2})
		})
	}
	synctest.Test(t, func(t *testing.T) {
		a := record().again(t, playback.Options{})
		ctx, leave := context.WithTimeout(t.Context(), time.Second/2)
		defer leave()
		a.call(ctx, "tools/call", "short", `{"n":2}`, nil)
		a.call(t.Context(), "tools/call", "long", `{}`, nil) // is never taken back
		a.ended(playback.Summary{Served: 2, Reordered: 1, Differences: 2})
	})
}

// What is told of no call, and on a stream that only listens, comes when the
// client has done what it had done before, and not earlier.
func TestBesideCalls(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := newRecording(legacy).
			call("c1", "initialize", "", `{"clientInfo":{"name":"x","version":"1"}}`, `{}`).
			add("", &schemas.Connected{Server: "files", Upstream: "secret", Revision: legacy, By: "b"}, `{}`).
			add("", &schemas.Asked{Target: schemas.Target{Method: "roots/list"}, ID: "q1"}, `{"jsonrpc":"2.0","id":1,"method":"roots/list"}`).
			add("", &schemas.Answered{Target: schemas.Target{Method: "roots/list"}, ID: "q1"}, `{"jsonrpc":"2.0","id":"q1","result":{"roots":[]}}`).
			add("", &schemas.Notified{ID: "n1"}, `{"jsonrpc":"2.0","method":"notifications/message","params":{"data":1}}`).
			call("c2", "tools/call", "a", `{}`, `"a"`).
			add("", &schemas.Notified{ID: "n2"}, `{"jsonrpc":"2.0","method":"notifications/message","params":{"data":2}}`).
			again(t, playback.Options{})
		stored := func(k schemas.Kind) (n int) {
			synctest.Wait()
			for e := range a.l.Scan(t.Context(), "acme", "s1", k, 0) {
				if c, ok := e.Data.(*schemas.Connected); ok && c.Upstream != "" {
					t.Errorf("somebody could go on with the session of then: %+v", c)
				}
				n++
			}
			return n
		}
		see := func(when string, asked, notified int) {
			t.Helper()
			if a, n := stored(schemas.KindAsked), stored(schemas.KindNotified); a != asked || n != notified {
				t.Errorf("%s: %d asked, %d notified; want %d, %d", when, a, n, asked, notified)
			}
		}
		a.says("initialize", "", `{"clientInfo":{"name":"x","version":"2"}}`, `{}`)
		see("at once", 0, 0)
		time.Sleep(2 * time.Second)
		see("two seconds later", 1, 0)
		if stored(schemas.KindConnected) != 1 {
			t.Error("no connection")
		}
		time.Sleep(time.Hour)
		see("without an answer", 1, 0)
		a.say("", &schemas.Answered{ID: "q1"}, `{"jsonrpc":"2.0","id":"q1","result":{"roots":[]}}`)
		time.Sleep(time.Second)
		see("after the answer", 1, 1)
		time.Sleep(time.Hour)
		a.says("tools/call", "a", `{}`, `"a"`)
		see("when the call has ended", 1, 1)
		time.Sleep(time.Second)
		see("later", 1, 2)
		a.ended(playback.Summary{Served: 2})

		// Another session has it from the beginning.
		a.session = "s2"
		a.open()
		a.says("initialize", "", `{}`, `{}`)
		a.ended(playback.Summary{Served: 3, Never: 1, Unasked: []string{"tools/call a (event 80)"}})
	})
	synctest.Test(t, func(t *testing.T) {
		a := newRecording(modern).
			asked("c1", "subscriptions/listen", "", `{}`).
			add("c1", &schemas.Progressed{Index: 0}, `{"jsonrpc":"2.0","method":"notifications/subscriptions/acknowledged","params":{"_meta":{"io.modelcontextprotocol/subscriptionId":"c1"}}}`).
			call("c2", "tools/call", "a", `{}`, `"a"`).
			add("c1", &schemas.Notified{ID: "n1"}, `{"jsonrpc":"2.0","method":"notifications/tools/list_changed"}`).
			add("c1", &schemas.Cancel{Reason: "the caller left"}, "").
			again(t, playback.Options{Fast: true})
		var told []schemas.Event
		ctx, leave := context.WithCancel(t.Context())
		ended := make(chan struct{})
		go func() {
			defer close(ended)
			a.call(ctx, "subscriptions/listen", "", `{}`, func(e schemas.Event) { told = append(told, e) })
		}()
		synctest.Wait()
		time.Sleep(time.Hour)
		if len(told) != 2 || !strings.Contains(string(told[1].Body), `subscriptionId":"c101"`) {
			t.Fatalf("told %v", told)
		}
		a.says("tools/call", "a", `{}`, `"a"`)
		synctest.Wait()
		if len(told) != 3 {
			t.Errorf("told %v", told)
		}
		time.Sleep(time.Hour)
		leave()
		<-ended
		a.ended(playback.Summary{Served: 2})
	})
}

// A task is the call, under its new name, and has its time from now on.
func TestTask(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRecording(modern).asked("c1", "tools/call", "slow", `{}`)
		r.add("c1", &schemas.Tasked{Status: "working", RequestedAt: noon, Until: noon.Add(time.Hour)}, "")
		r.add("c1", &schemas.Tasked{Index: 1, Status: "input_required", Round: 1, RequestedAt: noon, Until: noon.Add(time.Hour)}, `{"jsonrpc":"2.0","id":"c1","result":{"inputRequests":{}}}`)
		r.add("c1", &schemas.Answered{ID: "x"}, `{"jsonrpc":"2.0","id":1,"method":"tasks/update","params":{"taskId":"c1-k","inputResponses":{"1.a":1}}}`)
		r.done("c1", `"done"`)
		for i := range r.events[2:] {
			r.events[2+i] = r.events[2+i].Task()
		}
		a := r.again(t, playback.Options{Fast: true})
		if !a.l.Tasked() {
			t.Error("no tasks")
		}
		all := a.call(t.Context(), "tools/call", "slow", `{}`, func(e schemas.Event) {
			if d, ok := e.Data.(*schemas.Tasked); ok {
				if d.Until.Before(time.Now()) || e.ToTask() != (d.Index > 0) {
					t.Errorf("a task until %v at %s", d.Until, e.Edge)
				}
				if d.Index == 1 {
					u := a.event("c101", &schemas.Answered{ID: "y"}, `{"jsonrpc":"2.0","id":9,"method":"tasks/update","params":{"taskId":"c101-2","inputResponses":{"1.a":1}}}`)
					if _, err := a.l.Store(t.Context(), u.Task()); err != nil {
						t.Error(err)
					}
				}
			}
		})
		if len(all) != 4 || !strings.Contains(string(all[3].Body), `"done"`) {
			t.Errorf("%v", all)
		}
		var n int
		for e := range a.l.Task(t.Context(), all[1].Task()) {
			if n++; !e.ToTask() {
				t.Errorf("%+v is not of the task", e)
			}
		}
		if n != 3 {
			t.Errorf("%d events of the task, want 3", n)
		}
		a.ended(playback.Summary{Served: 1})
	})
}

// At an endpoint that shows several servers a call has the name that it has there.
func TestFronts(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRecording(modern)
		list := requested(modern, "tools/list", "")
		list.Server = "support"
		r.add("c1", list, request("tools/list", `{}`))
		r.asked("c2", "tools/list", "", `{}`)
		r.events[1].Parent = "c1"
		r.done("c2", `{"tools":[]}`).done("c1", `{"tools":[]}`)
		d := requested(modern, "tools/call", "echo")
		d.Alias = "say"
		r.add("c3", d, request("tools/call", `{"name":"say"}`)).done("c3", `"said"`)
		a := r.again(t, playback.Options{Fast: true})
		fronts := a.l.Fronts()
		if len(fronts) != 2 || fronts[1].Name != "support" || fronts[1].Alias("files", "echo") != "say" || !slices.Equal(fronts[0].Servers, []string{"files"}) {
			t.Errorf("fronts %+v", fronts)
		}
		if paths := a.l.Paths(); !slices.Equal(paths, []string{"/mcp/support"}) {
			t.Errorf("paths %v", paths)
		}
		say := func(alias, server string) string {
			q := requested(modern, "tools/call", "echo")
			q.Alias, q.Server = alias, server
			var end schemas.Event
			a.n++
			err := a.l.Ask(t.Context(), a.event(schemas.CallID(fmt.Sprintf("c%d", 100+a.n)), q, request("tools/call", `{"name":"say"}`)), func(_ context.Context, e schemas.Event) (schemas.Receipt, error) {
				end = e
				return schemas.Receipt{}, nil
			})
			if err != nil {
				t.Error(err)
			}
			return string(end.Body)
		}
		if got := say("", "files"); !strings.Contains(got, "not asked for then") {
			t.Errorf("at the server itself: %s", got)
		}
		if got := say("say", "files"); !strings.Contains(got, "said") {
			t.Errorf("at the view: %s", got)
		}
	})
}

// What would have to be made up is not played.
func TestUnplayable(t *testing.T) {
	whole := func() *recording { return newRecording(modern).call("c1", "tools/call", "a", `{}`, `"a"`) }
	for name, spoil := range map[string]func(*recording){
		"nothing":      func(r *recording) { r.events = nil },
		"erased":       func(r *recording) { r.add("", &schemas.Erased{ID: "x"}, "") },
		"no request":   func(r *recording) { r.events[0].Body = nil },
		"no answer":    func(r *recording) { r.events[1].Body = nil },
		"garbage":      func(r *recording) { r.events[1].Body = []byte("{") },
		"two sessions": func(r *recording) { r.events[1].Session = "s9" },
		"no place":     func(r *recording) { r.events[1].Seq = 0 },
	} {
		r := whole()
		spoil(r)
		if _, err := playback.New(r.events, playback.Options{}); !errors.Is(err, playback.ErrUnplayable) {
			t.Errorf("%s: %v", name, err)
		}
	}
	r := whole().done("c9", `"an answer to what has aged out"`).asked("c2", "tools/call", "b", `{}`)
	r.events = append(r.events, r.events[1]) // twice in the log
	l, err := playback.New(r.events, playback.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if len(l.Notes()) != 2 || l.Recorded() != 2 {
		t.Errorf("%d calls, notes %q", l.Recorded(), l.Notes())
	}
}

// What is not recorded is handed on, and reported all the same.
func TestLive(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := newRecording(modern).call("c1", "tools/call", "a", `{}`, `"a"`).again(t, playback.Options{Live: func(ctx context.Context, e schemas.Event, emit schemas.Emit) error {
			_, err := emit(ctx, e.Next(&schemas.Completed{}, []byte(`{"jsonrpc":"2.0","id":1,"result":"live"}`)))
			return err
		}})
		a.says("tools/call", "a", `{"x":1}`, `"live"`)
		a.ended(playback.Summary{Missed: 1, Differences: 1, Never: 1, Unasked: []string{"tools/call a (event 10)"}})
		if !(*a.reported)[0].Handed {
			t.Errorf("%+v", *a.reported)
		}
	})
}
