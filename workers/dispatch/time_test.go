package dispatch

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"
	"time"

	"waybill.dev/schemas"
)

// A stream has no deadline, and ends all the same.
func TestStreamLifetime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, nil)
		r.use(r.d, func(ctx context.Context, _ Call, _ func([]byte) error) (Answer, error) {
			<-ctx.Done()
			return Answer{}, ctx.Err()
		})
		start := time.Now()
		e := r.method("subscriptions/listen", "", "", stream)
		r.handle(e)
		s := summary(r.want("cancelled"))
		if time.Since(start) != time.Hour || s.Attempts != 1 {
			t.Error(time.Since(start), s)
		}
		// An hour is longer than the log remembers: the past was read.
		if r.log.reads != 1 {
			t.Error(r.log.reads)
		}
	})
}

// Pauses grow, and are as long as the upstream asks.
func TestPauses(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, nil, func(o *Options) { o.Pause, o.Attempts = 100*time.Millisecond, 4 })
		var at []time.Duration
		start := time.Now()
		r.use(r.d, func(context.Context, Call, func([]byte) error) (Answer, error) {
			at = append(at, time.Since(start))
			switch len(at) {
			case 3:
				return Answer{}, &Fault{Kind: Busy, After: 7 * time.Second, Err: errors.New("busy")}
			case 4:
				return Answer{Status: 200}, nil
			}
			return Answer{}, errors.New("broken")
		})
		r.handle(r.call("read"))
		s := summary(r.want("completed"))
		if s.Attempts != 4 || at[1] < 50*time.Millisecond || at[1] > 150*time.Millisecond ||
			at[2]-at[1] < 100*time.Millisecond || at[2]-at[1] > 300*time.Millisecond || at[3]-at[2] < 7*time.Second {
			t.Error(at, s)
		}
	})
}

// The deadline passes, or a cancel comes, during the pause between two tries.
func TestStoppedInPause(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, nil, func(o *Options) { o.Pause = 10 * time.Second })
		r.use(r.d, func(context.Context, Call, func([]byte) error) (Answer, error) {
			return Answer{}, faultf(Unsent, "dial")
		})
		e := r.call("write")
		go func() {
			time.Sleep(time.Second)
			_ = r.d.Cancel(t.Context(), e.Next(&schemas.Cancel{}, nil), nil)
		}()
		r.handle(e)
		r.want("cancelled")
		start := time.Now()
		r.handle(r.call("write", authorized(func(a *schemas.Authorized) { a.Deadline = time.Now().Add(time.Second) })))
		if ends := r.log.of(schemas.KindFailed); len(ends) != 1 || outcome(ends[0]) != "unavailable" || time.Since(start) != 0 {
			t.Error(time.Since(start), r.log) // no need to wait for what cannot be
		}
	})
}

func TestBreaker(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, nil, func(o *Options) { o.Attempts = 1 })
		calls := 0
		err := error(faultf(Garbled, "rubbish"))
		connected := make(chan bool)
		r.use(r.d, func(ctx context.Context, c Call, _ func([]byte) error) (Answer, error) {
			calls++
			if err == nil {
				c.Connected()
				close(connected)
				<-ctx.Done()
				return Answer{}, ctx.Err()
			}
			return Answer{}, err
		})
		call := func() {
			t.Helper()
			r.handle(r.call("write"))
		}
		state := func(want string, n int) {
			t.Helper()
			if s := r.d.Stats()[0].Breaker; s != want || calls != n {
				t.Fatalf("%s after %d calls, want %s after %d", s, calls, want, n)
			}
		}
		// What an upstream says does not count, nor does our hanging up.
		for range 10 {
			call()
		}
		state("closed", 10)
		err = errors.New("reset")
		for range 5 {
			call()
		}
		state("open", 15)
		call()
		state("open", 15)
		failed := r.log.of(schemas.KindFailed)
		if o := outcome(failed[len(failed)-1]); o != "unavailable" {
			t.Error(o)
		}
		time.Sleep(5*time.Second + 1)
		state("half-open", 15)
		call() // the probe fails
		state("open", 16)
		time.Sleep(5*time.Second + 1)
		// The next probe is a long call; its connection is enough.
		err = nil
		go call()
		<-connected
		state("closed", 17)
		synctest.Wait()
		time.Sleep(time.Minute)
		state("closed", 17)
	})
}

// A call that could not be sent says nothing about the upstream.
func TestBreakerUnsendable(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, nil, func(o *Options) { o.Attempts, o.Breaker.Failures = 1, 2 })
		call := func(err error, want string) {
			t.Helper()
			r.use(r.d, func(context.Context, Call, func([]byte) error) (Answer, error) { return Answer{}, err })
			r.handle(r.call("write"))
			if s := r.d.Stats()[0].Breaker; s != want {
				t.Errorf("%s, want %s", s, want)
			}
		}
		call(errors.New("reset"), "closed")
		call(faultf(Invalid, "no header"), "closed")
		call(errors.New("reset"), "open") // the second in a row
		<-time.After(5*time.Second + 1)
		for range 3 {
			call(faultf(Invalid, "no header"), "half-open") // the probe is still to come
		}
		call(nil, "closed")
	})
}

// Cancels are remembered for a while, and not without bound.
func TestWishesAge(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var c calls
		e := schemas.Event{Tenant: "acme", Call: "c"}
		remembered := func() bool {
			ctx, _, leave := c.enter(t.Context(), e)
			defer leave()
			_, ok := wishOf(ctx)
			return ok
		}
		other := func(n int) {
			for i := range n {
				c.cancel(schemas.Event{Tenant: "acme", Call: schemas.CallID(string(rune('a'+i%26)) + time.Duration(i).String())}, "")
			}
		}
		c.cancel(e, "why")
		time.Sleep(4 * time.Minute)
		other(1)
		if !remembered() {
			t.Error("forgotten after 4 minutes")
		}
		time.Sleep(11 * time.Minute)
		other(1)
		if remembered() {
			t.Error("remembered after 15 minutes")
		}
		other(5 * wishes)
		if n := len(c.young) + len(c.older); n > 2*wishes {
			t.Errorf("%d are remembered", n)
		}
		if len(c.running) != 0 {
			t.Error("runs are left")
		}
	})
}
