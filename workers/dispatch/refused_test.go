package dispatch

import (
	"context"
	"fmt"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"waybill.dev/schemas"
)

// refuse makes the log refuse every event of a kind for good.
func refuse(l *memLog, k schemas.Kind, why error) {
	l.fail = func(e schemas.Event) error {
		if e.Kind() == k {
			return fmt.Errorf("publish: %w: %s", why, strings.Repeat("x", 1000))
		}
		return nil
	}
}

// What the log refuses for good ends the call, at once and truly.
func TestRefused(t *testing.T) {
	for _, c := range []struct {
		kind    schemas.Kind
		why     error
		tool    string
		want    string
		effects int32
	}{
		{schemas.KindCompleted, schemas.ErrTooLarge, "write", "too_large", 1},
		{schemas.KindCompleted, schemas.ErrTooLarge, "read", "too_large", 1},
		{schemas.KindCompleted, schemas.ErrInvalid, "write", "bad_answer", 1},
		{schemas.KindCompleted, schemas.ErrInvalid, "read", "bad_answer", 1},
		{schemas.KindProgressed, schemas.ErrTooLarge, "write", "too_large", 1},
		{schemas.KindProgressed, schemas.ErrTooLarge, "read", "too_large", 1},
		{schemas.KindProgressed, schemas.ErrInvalid, "write", "bad_answer", 1},
		{schemas.KindStarted, schemas.ErrTooLarge, "write", "internal", 0},
		{schemas.KindStarted, schemas.ErrInvalid, "write", "internal", 0},
	} {
		t.Run(fmt.Sprintf("%s/%s/%s", c.kind, c.why, c.tool), func(t *testing.T) {
			var effects atomic.Int32
			r := newRig(t, nil)
			r.use(r.d, noisy(&effects))
			refuse(r.log, c.kind, c.why)
			e := r.call(c.tool)
			r.handle(e)
			f := r.want(c.want).Data.(*schemas.Failed)
			if effects.Load() != c.effects || f.Attempts != int(c.effects) || f.By == "" || f.Target.Name != c.tool || len(f.Detail) > maxWords {
				t.Errorf("%d effects, %+v", effects.Load(), f)
			}
			if !strings.Contains(f.Detail, c.why.Error()) {
				t.Errorf("the detail does not say why: %s", f.Detail)
			}
		})
	}
}

// The claim of a call that could only be said to be never carried out.
func TestRefusedClaimOfExpired(t *testing.T) {
	r := newRig(t, nil)
	r.use(r.d, never(t))
	refuse(r.log, schemas.KindStarted, schemas.ErrTooLarge)
	r.handle(r.call("write", authorized(func(a *schemas.Authorized) { a.Deadline = time.Now().Add(-time.Second) })))
	r.want("internal")
}

// A failure that is refused keeps its code: it says whether anything happened.
func TestRefusedFailure(t *testing.T) {
	r := newRig(t, nil)
	r.use(r.d, func(context.Context, Call, func([]byte) error) (Answer, error) {
		return Answer{}, faultf(Unsent, "no way")
	})
	tries := 0
	r.log.fail = func(e schemas.Event) error {
		if e.Kind() == schemas.KindFailed {
			if tries++; tries == 1 {
				return schemas.ErrTooLarge
			}
		}
		return nil
	}
	r.handle(r.call("write"))
	r.want("unavailable")
}

// A late answer that the log cannot hold is given up: the call has its ending.
func TestRefusedLate(t *testing.T) {
	r := newRig(t, nil)
	e := r.call("read")
	calls := 0
	r.use(r.d, func(context.Context, Call, func([]byte) error) (Answer, error) {
		calls++
		r.log.add(e.Next(&schemas.Failed{Code: schemas.FailTimeout, Summary: schemas.Summary{By: "other"}}, nil))
		return Answer{Status: 200, Body: []byte("answer")}, nil
	})
	refuse(r.log, schemas.KindLate, schemas.ErrTooLarge)
	r.handle(e)
	r.want("timeout")
	if calls != 1 || len(r.log.of(schemas.KindLate)) != 0 {
		t.Error(calls, r.log)
	}
}
