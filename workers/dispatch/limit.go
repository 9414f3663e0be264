package dispatch

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync/atomic"
	"time"

	"github.com/sony/gobreaker/v2"

	"waybill.dev/schemas"
)

// upstream is a server with what guards it. Each has limits and connections of
// its own, so that a slow one holds up nobody else.
type upstream struct {
	name       string
	call       Upstream
	close      func()
	mcp        *mcpServer // nil: of another kind
	owner      func(Call) (key, owner string)
	idempotent func(*schemas.Requested) bool
	tasks      func(tool string) bool
	calls      *limit
	streams    *limit
	breaker    *gobreaker.TwoStepCircuitBreaker[struct{}]
}

func newUpstream(s Server, opt Options) (*upstream, error) {
	if s.Protocol == "" {
		s.Protocol = "mcp"
	}
	k, ok := kinds[s.Protocol]
	if !ok {
		return nil, fmt.Errorf("protocol %q is not known", s.Protocol)
	}
	s.Concurrency = positive(s.Concurrency, 64)
	s.Streams = positive(s.Streams, 256)
	if s.Queue == 0 {
		s.Queue = 256
	}
	c, err := k.open(s, opt)
	if err != nil {
		return nil, err
	}
	return &upstream{
		name: s.Name, call: c.Call, close: c.Close, mcp: c.mcp, owner: c.Owner,
		idempotent: func(r *schemas.Requested) bool {
			if _, ok := k.reads[r.Method]; ok || c.Harmless != nil && c.Harmless(r) {
				return true
			}
			return r.Method == k.named && slices.ContainsFunc(s.Idempotent, func(pattern string) bool {
				return schemas.Match(pattern, r.Name)
			})
		},
		tasks: func(tool string) bool {
			return slices.ContainsFunc(s.Tasks, func(pattern string) bool { return schemas.Match(pattern, tool) })
		},
		calls:   &limit{slots: make(chan struct{}, s.Concurrency), queue: int64(max(s.Queue, 0))},
		streams: &limit{slots: make(chan struct{}, s.Streams)},
		breaker: gobreaker.NewTwoStepCircuitBreaker[struct{}](gobreaker.Settings{
			Name:        s.Name,
			Timeout:     opt.Breaker.Rest,
			ReadyToTrip: func(c gobreaker.Counts) bool { return c.ConsecutiveFailures >= opt.Breaker.Failures },
			IsExcluded:  func(err error) bool { return errors.Is(err, errNoVerdict) },
		}),
	}, nil
}

// probing tells whether the breaker waits for the outcome of a probe.
func (u *upstream) probing() bool { return u.breaker.State() == gobreaker.StateHalfOpen }

// Breaker says when an upstream is left alone. Only faults of the transport
// count: an upstream that answers, be it with errors, is there.
type Breaker struct {
	Failures uint32        // in a row, before calls are refused at once; default 5
	Rest     time.Duration // until one call may try again; default 5 s
}

func (b Breaker) withDefaults() Breaker {
	b.Failures = positive(b.Failures, 5)
	b.Rest = positive(b.Rest, 5*time.Second)
	return b
}

// errNoVerdict tells the breaker that a call says nothing about the upstream.
var errNoVerdict = errors.New("no verdict")

// limit lets so many in at once, and so many more wait, first come first
// served.
type limit struct {
	slots   chan struct{}
	queue   int64
	waiting atomic.Int64
}

// enter waits for a place. It returns schemas.ErrOverloaded when as many wait
// as may, and ctx's cause when that ends first.
func (l *limit) enter(ctx context.Context) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	select {
	case l.slots <- struct{}{}:
		return nil
	default:
	}
	defer l.waiting.Add(-1)
	if l.waiting.Add(1) > l.queue {
		return schemas.ErrOverloaded
	}
	select {
	case l.slots <- struct{}{}:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// full tells whether who enters now has to wait.
func (l *limit) full() bool { return len(l.slots) == cap(l.slots) }

func (l *limit) leave() { <-l.slots }

// Stat is the state of one upstream.
type Stat struct {
	Server   string
	InFlight int // calls
	Waiting  int // calls
	Streams  int
	Sessions int    // open there, for revisions that have some
	Breaker  string // closed, half-open, open
}

// Stats returns the state of each upstream, in the order of the config.
func (d *Dispatcher) Stats() []Stat {
	stats := make([]Stat, 0, len(d.order))
	for _, u := range d.order {
		stats = append(stats, Stat{
			Server:   u.name,
			InFlight: len(u.calls.slots),
			Waiting:  int(u.calls.waiting.Load()),
			Streams:  len(u.streams.slots),
			Sessions: d.sessions.count(u.name),
			Breaker:  u.breaker.State().String(),
		})
	}
	return stats
}
