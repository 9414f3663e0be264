package bus

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/nats-io/nats.go/jetstream"
)

// Lag is how far a durable consumer is behind the log.
type Lag struct {
	Consumer string
	Events   uint64 // not delivered, or delivered and not acknowledged
	Waiting  uint64 // not delivered
	Reached  uint64 // the newest sequence that was delivered
	Bytes    uint64 // of the log from its oldest such event on, estimated from the mean size
}

// Status is what the log holds.
type Status struct {
	Events, Bytes, MaxBytes uint64
	FirstSeq, LastSeq       uint64
	Lags                    []Lag
	Refusing                string // why new calls are refused, or ""
}

// Status asks the log how it is.
func (l *Log) Status(ctx context.Context) (Status, error) {
	info, err := l.stream.Info(ctx)
	if err != nil {
		return Status{}, fmt.Errorf("state of the log: %w", err)
	}
	s := Status{
		Events: info.State.Msgs, Bytes: info.State.Bytes, MaxBytes: uint64(info.Config.MaxBytes),
		FirstSeq: info.State.FirstSeq, LastSeq: info.State.LastSeq,
	}
	if why := l.full.Load(); why != nil {
		s.Refusing = *why
	}
	consumers := l.stream.ListConsumers(ctx)
	for c := range consumers.Info() {
		if c.Config.Durable == "" {
			continue
		}
		lag := Lag{Consumer: c.Name, Events: c.NumPending + uint64(c.NumAckPending), Waiting: c.NumPending, Reached: c.Delivered.Stream}
		if lag.Events > 0 && s.Events > 0 {
			oldest := max(c.AckFloor.Stream+1, s.FirstSeq)
			lag.Bytes = uint64(float64(s.Bytes) / float64(s.Events) * float64(s.LastSeq+1-oldest))
		}
		s.Lags = append(s.Lags, lag)
	}
	if err := consumers.Err(); err != nil && !errors.Is(err, jetstream.ErrEndOfData) {
		return s, fmt.Errorf("state of the log's consumers: %w", err)
	}
	return s, nil
}

// Age is how long ago the oldest event was stored that a durable consumer has
// not settled; nothing for one that has settled all.
func (l *Log) Age(ctx context.Context, name string) (time.Duration, error) {
	c, err := l.stream.Consumer(ctx, name)
	if errors.Is(err, jetstream.ErrConsumerNotFound) {
		return 0, nil
	}
	if err != nil {
		return 0, fmt.Errorf("age of what waits for %s: %w", name, err)
	}
	info := c.CachedInfo()
	if info.NumPending == 0 && info.NumAckPending == 0 {
		return 0, nil
	}
	m, err := l.stream.GetMsg(ctx, info.AckFloor.Stream+1, jetstream.WithGetMsgSubject("ev.>")) // or the next that is left
	if errors.Is(err, jetstream.ErrMsgNotFound) {
		return 0, nil
	}
	if err != nil {
		return 0, fmt.Errorf("age of what waits for %s: %w", name, err)
	}
	return max(0, time.Since(m.Time)), nil
}

// Watch keeps the refusal rule: while the unread events of a guarded consumer
// hold more than 80 % of what the log may hold, Ask takes no new call, so that
// nothing ages out unread. And it notices work that stands still ([Log.Stuck]).
// It looks every period until ctx is done.
func (l *Log) Watch(ctx context.Context, period time.Duration) error {
	guard := map[string]bool{}
	for _, g := range l.o.Guard {
		guard[g] = true
	}
	still := map[string]standstill{}
	for {
		s, err := l.Status(ctx)
		if err != nil {
			if ctx.Err() == nil {
				l.o.Log.Warn("watch the log", "error", err)
			}
		} else {
			l.stuck.Store(stands(still, s.Lags, time.Now()))
			var why *string
			for _, lag := range s.Lags {
				if guard[lag.Consumer] && s.MaxBytes > 0 && lag.Bytes > s.MaxBytes/10*8 {
					text := fmt.Sprintf("%s is %d MB behind and the log holds %d MB", lag.Consumer, lag.Bytes>>20, s.MaxBytes>>20)
					why = &text
				}
			}
			if before := l.full.Swap(why); (before == nil) != (why == nil) {
				if why != nil {
					l.o.Log.Error("new calls are refused until the log is read", "cause", *why)
				} else {
					l.o.Log.Info("new calls are taken again")
				}
			}
		}
		if !pause(ctx, period) {
			return nil
		}
	}
}

// standstill is since when a consumer with events waiting has taken none.
type standstill struct {
	at    uint64
	since time.Time
}

// patienceWithWork is how long a kind of work may take nothing, although
// something waits: its workers are gone, paused, or all held up.
const patienceWithWork = 10 * time.Second

// stands names the work that stands still, or nil.
func stands(still map[string]standstill, lags []Lag, now time.Time) *string {
	var why *string
	for _, lag := range lags {
		if lag.Consumer == durables[RoleProject] {
			continue // no call waits for the record
		}
		before, ok := still[lag.Consumer]
		if !ok || lag.Waiting == 0 || lag.Reached != before.at {
			still[lag.Consumer] = standstill{lag.Reached, now}
			continue
		}
		if idle := now.Sub(before.since); idle >= patienceWithWork {
			text := fmt.Sprintf("%s has taken none of %d waiting events for %s", lag.Consumer, lag.Waiting, idle.Round(time.Second))
			why = &text
		}
	}
	return why
}

// Stuck says which work stands still, as Watch last saw it, or "".
func (l *Log) Stuck() string {
	if why := l.stuck.Load(); why != nil {
		return *why
	}
	return ""
}
