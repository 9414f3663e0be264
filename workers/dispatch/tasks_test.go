package dispatch

import (
	"context"
	"errors"
	"slices"
	"sync"
	"testing"
	"time"

	"waybill.dev/schemas"
)

// wantsRoots is what a server says that wants input within a task.
var wantsRoots = []byte(`{"jsonrpc":"2.0","id":"c1","result":{"resultType":"input_required","inputRequests":{"k":{"method":"roots/list"}}}}`)

// asleep is a run that was paused for longer than the log knows IDs, before the
// claim of its second request, and what the log has of its call by now.
func asleep(t *testing.T, lost bool, more ...schemas.Payload) (*run, *memLog) {
	t.Helper()
	l := &memLog{}
	began := time.Now()
	l.now = func() time.Time { return began.Add(-5 * time.Minute) }
	e := l.add(schemas.Event{
		Tenant: "acme", Session: "s1", Call: "c1", Root: "c1", Agent: "a1",
		Data: &schemas.Authorized{Requested: schemas.Requested{TaskUntil: began.Add(time.Hour)}, Decision: schemas.Decision{N: 1}},
	})
	for _, p := range slices.Concat([]schemas.Payload{
		&schemas.Started{Attempt: 1, By: "a"},
		&schemas.Tasked{Index: 0, By: "a", Status: working},
		&schemas.Tasked{Index: 1, By: "a", Status: inputRequired, Round: 1},
	}, more) {
		var body []byte
		if p, ok := p.(*schemas.Tasked); ok && p.Round > 0 {
			body = wantsRoots
		}
		l.add(e.Next(p, body))
	}
	l.now = nil
	d, err := New(Options{Load: l.load, Past: l.past, Lost: func(schemas.Event) bool { return lost }})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(d.Close)
	return &run{
		d: d, e: e, a: e.Data.(*schemas.Authorized), by: "a", emit: l.emit, up: &upstream{}, known: began.Add(-3 * time.Minute), attempt0: 1,
		task: &task{told: true, index: 2, round: 1, answers: map[string][]byte{}, news: make(chan struct{}, 1), body: []byte("round 1")},
	}, l
}

// A paused run does not claim a round that it has no request for: another has gone
// on meanwhile.
func TestStaleRound(t *testing.T) {
	second := []schemas.Payload{&schemas.Started{Attempt: 2, By: "b"}, &schemas.Tasked{Index: 2, By: "b", Status: inputRequired, Round: 2}}
	third := append(slices.Clone(second), &schemas.Started{Attempt: 3, By: "b"})
	for name, c := range map[string]struct {
		more []schemas.Payload
		lost bool
		want error // of claimLost; nil: the call ends as unknown
		mine bool
	}{
		"nothing happened":           {mine: true},
		"asked again":                {more: second, want: errThinking},
		"asked again, unclean boot":  {more: second, lost: true},
		"asked again, and under way": {more: third},
		"under way":                  {more: second[:1]},
	} {
		t.Run(name, func(t *testing.T) {
			r, l := asleep(t, c.lost, c.more...)
			before := len(l.of(schemas.KindStarted))
			mine, err := r.claim(t.Context())
			if err != nil || mine != c.mine {
				t.Fatalf("claimed: %t, %v", mine, err)
			}
			if mine {
				return
			}
			if n := len(l.of(schemas.KindStarted)); n != before {
				t.Errorf("%d claims, before %d", n, before)
			}
			end, err := r.claimLost(t.Context())
			if f, ok := end.data.(*schemas.Failed); !errors.Is(err, c.want) || c.want == nil && (!ok || f.Code != schemas.FailUnknown) {
				t.Errorf("it goes on with %v, %+v", err, end.data)
			}
		})
	}
}

// Delivered after an unclean boot, a task that waits for input has one ending, and
// one that is the server's is followed.
func TestLostTask(t *testing.T) {
	r, l := asleep(t, true)
	r.d.upstreams["s"] = &upstream{
		idempotent: func(*schemas.Requested) bool { return false }, tasks: func(string) bool { return false },
		calls: &limit{slots: make(chan struct{}, 1)}, close: func() {},
	}
	e := r.e
	a := *r.a
	a.Server, a.Method = "s", "tools/call"
	e.Data = &a
	if err := r.d.Handle(t.Context(), e, l.emit); err != nil {
		t.Fatal(err)
	}
	if end := l.ending(t); outcome(end) != "unknown" || !end.ToTask() {
		t.Errorf("ended %s, addressed to %q", outcome(end), end.Edge)
	}
}

// A task that its client cannot be told of is cancelled at the server, and the
// answer's connection given back.
func TestRefusedTask(t *testing.T) {
	r := newRig(t, nil)
	var mu sync.Mutex
	var asked []string
	released := 0
	r.use(r.d, func(_ context.Context, c Call, _ func([]byte) error) (Answer, error) {
		mu.Lock()
		defer mu.Unlock()
		asked = append(asked, c.Requested.Method+" "+c.Requested.Name)
		a := Answer{Status: 200, Body: []byte(`{"jsonrpc":"2.0","id":"x","result":{}}`)}
		if c.Requested.Method == "tools/call" {
			a.Result, a.Body = resultTask, []byte(`{"jsonrpc":"2.0","id":"x","result":{"resultType":"task","taskId":"t7"}}`)
		}
		a.Release = func(func()) { released++ }
		return a, nil
	})
	body := `{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{"name":"write"}}`
	r.handle(r.method("tools/call", "write", body))
	r.want("bad_answer")
	if !slices.Equal(asked, []string{"tools/call write", "tasks/cancel t7"}) || released != 2 {
		t.Errorf("asked %q, %d answers given back", asked, released)
	}
	// Likewise where there are too many.
	r.log, asked, released = &memLog{}, nil, 0
	r.opt.Load, r.opt.Past = r.log.load, r.log.past
	r.d.opt.Load, r.d.opt.Past = r.log.load, r.log.past
	r.d.tasks.open = maxTasks
	r.handle(r.method("tools/call", "write", body, authorized(func(a *schemas.Authorized) { a.TaskUntil = time.Now().Add(time.Hour) })))
	r.want("unknown")
	if !slices.Equal(asked, []string{"tools/call write", "tasks/cancel t7"}) || released != 2 {
		t.Errorf("asked %q, %d answers given back", asked, released)
	}
}

// While the log takes an event of one task, who brings the answers of all does not
// wait for it.
func TestAnswersDoNotWait(t *testing.T) {
	r, l := asleep(t, false)
	defer r.d.tasks.enter(r.e, r.task)()
	heard := false
	r.emit = func(ctx context.Context, e schemas.Event) (schemas.Receipt, error) {
		answer := r.e.Next(&schemas.Answered{ID: "x"}, []byte(`{"jsonrpc":"2.0","id":1,"method":"tasks/update","params":{"inputResponses":{"1.k":{"roots":[]}}}}`)).Task()
		done := make(chan struct{})
		go func() { defer close(done); _ = r.d.Hear(ctx, answer, l.emit) }()
		select {
		case <-done:
			heard = true
		case <-time.After(10 * time.Second):
			t.Error("the answer waits for the log")
		}
		return l.emit(ctx, e)
	}
	if err := r.stands(t.Context(), inputRequired, 2, wantsRoots); err != nil {
		t.Fatal(err)
	}
	if !heard || r.task.given("1.", []string{"k"})["k"] == nil {
		t.Error("the answer is not there")
	}
}
