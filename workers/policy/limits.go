package policy

import (
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"waybill.dev/schemas"
)

// limiter counts the calls that rate limits let go on. It is exact for what it
// decides itself: a limit of n never has more than n calls authorized within its
// window, whatever happens at the same time. What others decide it hears from
// the log ([Policy.Heard]), a moment later: several policy workers may together
// let through as many more as they decide in that moment.
//
// What it knows is in the log: each decision that was counted says so in its
// facts. A worker that starts reads the longest window ([LongestLimit]) first.
type limiter struct {
	mu      sync.Mutex
	keys    map[string]*window     // by Limit.key
	tenants map[schemas.Tenant]int // how many of the keys each has
	swept   time.Time
}

// window is the calls that are counted under a key, in the order of their times.
type window struct {
	tenant schemas.Tenant
	per    time.Duration // of the rule, as far as it is known
	calls  []counted
	known  map[schemas.CallID]bool
}

type counted struct {
	at   time.Time
	call schemas.CallID
}

func newLimiter() *limiter {
	return &limiter{keys: map[string]*window{}, tenants: map[schemas.Tenant]int{}}
}

// LongestLimit is the longest window that a rule may have.
const LongestLimit = time.Hour

// Bounds of what is counted; beyond them nothing more can be, and is denied. No
// tenant alone can take from the others all that there is.
const (
	maxLimitKeys       = 100_000
	maxLimitKeysTenant = maxLimitKeys / 2
)

// sweepEvery is how often it is looked for keys to forget, which takes long when
// there are many: not at each call that finds no room.
const sweepEvery = time.Second

// decide counts the calls of the limits into the facts, has it decided, and
// counts this one for those limits that let it go on. release takes it back.
func (l *limiter) decide(limits []Limit, call schemas.CallID, at time.Time, facts *Facts, decide func() Verdict) (v Verdict, release func()) {
	if len(limits) == 0 {
		return decide(), func() {}
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	counts := map[string]int{}
	for _, limit := range limits {
		if n, ok := l.count(limit, call, at); ok {
			counts[limit.key()] = n
		}
	}
	facts.Counts = counts
	v = decide()
	// What was not looked at was not a reason, and is not counted.
	facts.Counts = map[string]int{}
	var added []string // keys
	for _, limit := range v.Limits {
		key := limit.key()
		if n, ok := counts[key]; ok {
			facts.Counts[key] = n
		}
		if v.Permit && l.add(key, limit.tenant, limit.Per, call, at) {
			added = append(added, key)
		}
	}
	return v, func() {
		l.mu.Lock()
		defer l.mu.Unlock()
		for _, k := range added {
			l.keys[k].remove(call)
		}
	}
}

// count is how many other calls the window has; ok is false if it has no room.
func (l *limiter) count(limit Limit, call schemas.CallID, at time.Time) (n int, ok bool) {
	w := l.keys[limit.key()]
	if w == nil {
		return 0, l.room(limit.tenant, at)
	}
	w.per = limit.Per // what was heard of does not say it, and the rule may have changed
	w.forget(at)
	for _, c := range w.calls[w.after(at.Add(-limit.Per)):] {
		if c.call != call {
			n++
		}
	}
	return n, true
}

// room tells whether another key of a tenant can be counted.
func (l *limiter) room(t schemas.Tenant, at time.Time) bool {
	full := func() bool { return len(l.keys) >= maxLimitKeys || l.tenants[t] >= maxLimitKeysTenant }
	if full() && at.Sub(l.swept) >= sweepEvery {
		l.swept = at
		l.sweep(at)
	}
	return !full()
}

// add counts a call, once.
func (l *limiter) add(key string, t schemas.Tenant, per time.Duration, call schemas.CallID, at time.Time) bool {
	w := l.keys[key]
	if w == nil {
		w = &window{tenant: t, per: per, known: map[schemas.CallID]bool{}}
		l.keys[key] = w
		l.tenants[t]++
	}
	if w.known[call] {
		return false
	}
	w.known[call] = true
	w.calls = slices.Insert(w.calls, w.after(at), counted{at, call})
	return true
}

// after is the place of the first call after a time.
func (w *window) after(at time.Time) int {
	i, _ := slices.BinarySearchFunc(w.calls, at, func(c counted, at time.Time) int {
		if c.at.After(at) {
			return 1
		}
		return -1
	})
	return i
}

// forget drops what no window has any more, and what no limit can reach.
func (w *window) forget(at time.Time) {
	n := max(w.after(at.Add(-LongestLimit)), len(w.calls)-maxLimit-1)
	for _, c := range w.calls[:max(n, 0)] {
		delete(w.known, c.call)
	}
	w.calls = w.calls[max(n, 0):]
}

func (w *window) remove(call schemas.CallID) {
	if w == nil || !w.known[call] {
		return
	}
	delete(w.known, call)
	w.calls = slices.DeleteFunc(w.calls, func(c counted) bool { return c.call == call })
}

// sweep forgets the keys that count no more. A call may come late, and counts when
// it was asked for: so what is just over its time stays.
func (l *limiter) sweep(at time.Time) {
	const late = time.Minute
	maps.DeleteFunc(l.keys, func(_ string, w *window) bool {
		if w.after(at.Add(-w.per-late)) < len(w.calls) {
			return false
		}
		if l.tenants[w.tenant]--; l.tenants[w.tenant] == 0 {
			delete(l.tenants, w.tenant)
		}
		return true
	})
}

// heard counts what was authorized, by whomever.
func (l *limiter) heard(e schemas.Event, a *schemas.Authorized) {
	at := a.RequestedAt
	if a.N > 1 {
		at = e.Stored
	}
	for fact := range a.Facts {
		key, ok := strings.CutPrefix(fact, limitFact)
		if !ok {
			continue
		}
		l.mu.Lock()
		if _, known := l.keys[key]; known || l.room(e.Tenant, at) {
			l.add(key, e.Tenant, LongestLimit, e.Call, at)
		}
		l.mu.Unlock()
	}
}
