package dispatch

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"net/http"
	"net/http/httptest"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"waybill.dev/schemas"
)

var errLog = errors.New("the log is away")

// memLog is a log in memory. Like the real one it drops a second event of an
// ID; beyond its window it has forgotten the ID and stores it again.
type memLog struct {
	mu     sync.Mutex
	events []schemas.Event
	ids    map[schemas.EventID]int // index of the latest
	window time.Duration           // 0: for ever
	now    func() time.Time
	fail   func(e schemas.Event) error // nothing is stored
	lose   func(e schemas.Event) error // stored, but the receipt is lost
	again  func(e schemas.Event) bool  // stored, the receipt is lost, and a retry within emit succeeds
	stored chan schemas.Kind           // when set: told of every event
	reads  int                         // of Past
	news   chan struct{}               // closed when something is stored
}

func (l *memLog) emit(ctx context.Context, e schemas.Event) (schemas.Receipt, error) {
	if err := ctx.Err(); err != nil {
		return schemas.Receipt{}, err
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.fail != nil {
		if err := l.fail(e); err != nil {
			return schemas.Receipt{}, err
		}
	}
	r := l.put(e)
	if l.lose != nil {
		if err := l.lose(e); err != nil {
			return schemas.Receipt{}, err
		}
	}
	if l.again != nil && l.again(e) {
		return l.put(e), nil
	}
	return r, nil
}

func (l *memLog) put(e schemas.Event) schemas.Receipt {
	if err := e.Check(); err != nil {
		panic(err)
	}
	now := l.time()
	if i, ok := l.ids[e.ID()]; ok && (l.window == 0 || now.Sub(l.events[i].Stored) < l.window) {
		return schemas.Receipt{Seq: l.events[i].Seq, Duplicate: true}
	}
	e.Seq, e.Stored, e.Time = uint64(len(l.events)+1), now, now
	l.events = append(l.events, e)
	if l.ids == nil {
		l.ids = make(map[schemas.EventID]int)
	}
	l.ids[e.ID()] = len(l.events) - 1
	if l.stored != nil {
		l.stored <- e.Kind()
	}
	if l.news != nil {
		close(l.news)
		l.news = nil
	}
	return schemas.Receipt{Seq: e.Seq}
}

func (l *memLog) time() time.Time {
	if l.now != nil {
		return l.now()
	}
	return time.Now()
}

// add stores an event and returns it as read from the log.
func (l *memLog) add(e schemas.Event) schemas.Event {
	l.mu.Lock()
	defer l.mu.Unlock()
	r := l.put(e)
	return l.events[r.Seq-1]
}

func (l *memLog) load(_ context.Context, seq uint64) (schemas.Event, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if seq == 0 || seq > uint64(len(l.events)) {
		return schemas.Event{}, fmt.Errorf("no event %d", seq)
	}
	return l.events[seq-1], nil
}

// past returns the whole session: whoever asks has to look at the call.
func (l *memLog) past(_ context.Context, e schemas.Event) ([]schemas.Event, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.reads++
	return append([]schemas.Event(nil), l.events...), nil
}

// of returns the events of a kind that count: the first of each ID.
func (l *memLog) of(k schemas.Kind) (found []schemas.Event) {
	l.mu.Lock()
	defer l.mu.Unlock()
	seen := map[schemas.EventID]bool{}
	for _, e := range l.events {
		if !seen[e.ID()] && e.Kind() == k {
			found = append(found, e)
		}
		seen[e.ID()] = true
	}
	return found
}

// ending returns the one ending of the only call, and complains of any other
// number.
func (l *memLog) ending(t testing.TB) schemas.Event {
	t.Helper()
	var ends []schemas.Event
	for _, k := range []schemas.Kind{schemas.KindCompleted, schemas.KindFailed, schemas.KindCancelled, schemas.KindDenied} {
		ends = append(ends, l.of(k)...)
	}
	if len(ends) != 1 {
		t.Fatalf("%d endings: %v", len(ends), l)
	}
	return ends[0]
}

// await waits until there are n events of a kind, and returns them.
func (l *memLog) await(t testing.TB, k schemas.Kind, n int) []schemas.Event {
	t.Helper()
	late := time.After(20 * time.Second)
	for {
		l.mu.Lock()
		if l.news == nil {
			l.news = make(chan struct{})
		}
		news := l.news
		l.mu.Unlock()
		if found := l.of(k); len(found) >= n {
			return found
		}
		select {
		case <-news:
		case <-late:
			t.Fatalf("no %d events of kind %s come:%v", n, k, l)
		}
	}
}

func (l *memLog) latest(_ context.Context, tenant schemas.Tenant, s schemas.SessionKey, k schemas.Kind) (found schemas.Event, err error) {
	err = schemas.ErrNotFound
	for e := range l.scan(context.Background(), tenant, s, k) {
		found, err = e, nil
	}
	return found, err
}

func (l *memLog) scan(_ context.Context, tenant schemas.Tenant, s schemas.SessionKey, k schemas.Kind) iter.Seq2[schemas.Event, error] {
	return func(yield func(schemas.Event, error) bool) {
		for _, e := range l.of(k) {
			if e.Tenant == tenant && e.Session == s && !yield(e, nil) {
				return
			}
		}
	}
}

func (l *memLog) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	var b strings.Builder
	for _, e := range l.events {
		fmt.Fprintf(&b, "\n%d %s %+v %s", e.Seq, e.ID(), e.Data, e.Body)
	}
	return b.String()
}

// outcome names an ending in a word.
func outcome(e schemas.Event) string {
	switch p := e.Data.(type) {
	case *schemas.Failed:
		return string(p.Code)
	default:
		return string(e.Kind())
	}
}

func summary(e schemas.Event) schemas.Summary {
	switch p := e.Data.(type) {
	case *schemas.Completed:
		return p.Summary
	case *schemas.Failed:
		return p.Summary
	case *schemas.Cancelled:
		return p.Summary
	}
	panic(e.Kind())
}

// rig is a dispatcher, its log and one upstream named s, whose tool "read" is
// idempotent.
type rig struct {
	t    testing.TB
	log  *memLog
	d    *Dispatcher
	opt  Options
	http *httptest.Server
}

func newRig(t testing.TB, h http.HandlerFunc, change ...func(*Options)) *rig {
	t.Helper()
	r := &rig{t: t, log: &memLog{}}
	url := "http://127.0.0.1:1/mcp"
	if h != nil {
		r.http = httptest.NewServer(h)
		t.Cleanup(r.http.Close)
		url = r.http.URL + "/mcp"
	}
	r.opt = Options{
		Servers:  []Server{{Name: "s", URL: url, Era: EraClient, Idempotent: []string{"read*"}}},
		Load:     r.log.load,
		Past:     r.log.past,
		Latest:   r.log.latest,
		Scan:     r.log.scan,
		Store:    r.log.emit,
		Instance: "test",
		Pause:    time.Millisecond,
	}
	for _, f := range change {
		f(&r.opt)
	}
	r.d = r.fresh()
	return r
}

// fresh is the dispatcher of a process that was just started.
func (r *rig) fresh() *Dispatcher {
	r.t.Helper()
	d, err := New(r.opt)
	if err != nil {
		r.t.Fatal(err)
	}
	r.t.Cleanup(d.Close)
	return d
}

// call stores an authorized call of a tool. The ways are changes to it.
func (r *rig) call(tool string, change ...func(*schemas.Event)) schemas.Event {
	return r.method("tools/call", tool, `{"jsonrpc":"2.0", "id": 9007199254740993,"method":"tools/call","params":{"name":"`+tool+`","arguments":{"x": 1E400}}}`, change...)
}

func (r *rig) method(method, name, body string, change ...func(*schemas.Event)) schemas.Event {
	call := schemas.NewCallID(time.Now())
	e := schemas.Event{
		Tenant: "acme", Session: "s1", Call: call, Root: call, Agent: "a1", Edge: "e1",
		Trace: "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
		Body:  []byte(body),
		Data: &schemas.Authorized{
			Requested: schemas.Requested{
				Target:   schemas.Target{Protocol: "mcp", Server: "s", Method: method, Name: name},
				Revision: "2026-07-28",
				Deadline: r.log.time().Add(30 * time.Second),
			},
			Decision:    schemas.Decision{N: 1},
			RequestedAt: r.log.time().Add(-time.Millisecond),
		},
	}
	for _, f := range change {
		f(&e)
	}
	return r.log.add(e)
}

func authorized(f func(*schemas.Authorized)) func(*schemas.Event) {
	return func(e *schemas.Event) { f(e.Data.(*schemas.Authorized)) }
}

var stream = authorized(func(a *schemas.Authorized) { a.Stream, a.Deadline = true, time.Time{} })

func (r *rig) handle(e schemas.Event) {
	r.t.Helper()
	if err := r.d.Handle(context.Background(), e, r.log.emit); err != nil {
		r.t.Fatal(err)
	}
}

// want checks how the call ended.
func (r *rig) want(outcomes ...string) schemas.Event {
	r.t.Helper()
	e := r.log.ending(r.t)
	for _, o := range outcomes {
		if outcome(e) == o {
			return e
		}
	}
	r.t.Fatalf("ended %s (%+v), want %v%v", outcome(e), e.Data, outcomes, r.log)
	return e
}

// leaks fails the test if goroutines of the rig's connections outlive it.
func leaks(t testing.TB) {
	before := runtime.NumGoroutine()
	t.Cleanup(func() {
		end := time.Now().Add(5 * time.Second)
		for runtime.NumGoroutine() > before {
			if time.Now().After(end) {
				buf := make([]byte, 1<<20)
				t.Errorf("goroutines are left:\n%s", buf[:runtime.Stack(buf, true)])
				return
			}
			runtime.Gosched()
		}
	})
}
