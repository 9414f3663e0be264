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
	Settled  uint64 // up to here everything is
	Bytes    uint64 // of the log from its oldest such event on, estimated from the mean size
}

// Status is what the log holds.
type Status struct {
	Events, Bytes, MaxBytes uint64
	FirstSeq, LastSeq       uint64
	MaxAge                  time.Duration // 0 while nothing ages out, see Watch
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
		FirstSeq: info.State.FirstSeq, LastSeq: info.State.LastSeq, MaxAge: info.Config.MaxAge,
	}
	if why := l.full.Load(); why != nil {
		s.Refusing = *why
	}
	consumers := l.stream.ListConsumers(ctx)
	for c := range consumers.Info() {
		if c.Config.Durable == "" {
			continue
		}
		lag := Lag{Consumer: c.Name, Events: c.NumPending + uint64(c.NumAckPending), Waiting: c.NumPending, Reached: c.Delivered.Stream, Settled: c.AckFloor.Stream}
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
	s, err := l.Status(ctx)
	if err != nil {
		return 0, err
	}
	for _, lag := range s.Lags {
		if lag.Consumer == name {
			return l.age(ctx, lag, s.FirstSeq)
		}
	}
	return 0, nil
}

func (l *Log) age(ctx context.Context, lag Lag, first uint64) (time.Duration, error) {
	if lag.Events == 0 {
		return 0, nil
	}
	m, err := l.stream.GetMsg(ctx, max(lag.Settled+1, first), jetstream.WithGetMsgSubject("ev.>")) // or the next that is left
	if errors.Is(err, jetstream.ErrMsgNotFound) {
		return 0, nil
	}
	if err != nil {
		return 0, fmt.Errorf("age of what waits for %s: %w", lag.Consumer, err)
	}
	return max(0, time.Since(m.Time)), nil
}

// Watch keeps the rule that nothing is dropped which a guarded consumer has not
// read. While its unread events hold more than 80 % of what the log may hold,
// Ask takes no new call. While the oldest of them is older than a quarter of the
// log's MaxAge, nothing ages out at all; where the server does not let us say
// so, Ask takes no new call from 80 % of MaxAge on. A consumer that is not there
// yet has read nothing.
//
// And it notices work that stands still ([Log.Stuck]). It looks every period
// until ctx is done.
func (l *Log) Watch(ctx context.Context, period time.Duration) error {
	still := map[string]standstill{}
	for {
		s, err := l.Status(ctx)
		if err == nil {
			l.stuck.Store(stands(still, s.Lags, time.Now()))
			err = l.protect(ctx, s)
		}
		if err != nil && ctx.Err() == nil {
			l.o.Log.Warn("watch the log", "error", err)
		}
		if !pause(ctx, period) {
			return nil
		}
	}
}

// protect looks after what guarded consumers have not read.
func (l *Log) protect(ctx context.Context, s Status) error {
	var why *string
	refuse := func(format string, a ...any) { text := fmt.Sprintf(format, a...); why = &text }
	var oldest time.Duration
	for _, name := range l.o.Guard {
		lag := Lag{Consumer: name, Events: s.Events, Bytes: s.Bytes}
		for _, l := range s.Lags {
			if l.Consumer == name {
				lag = l
			}
		}
		if s.MaxBytes > 0 && s.Bytes > s.MaxBytes/10*8 && lag.Events > 0 { // what is unread is no more than all
			size, err := l.sampled(ctx, lag, s)
			if err != nil {
				return err
			}
			lag.Bytes = max(lag.Bytes, size)
		}
		if s.MaxBytes > 0 && lag.Bytes > s.MaxBytes/10*8 {
			refuse("%s is %d MB behind and the log holds %d MB", name, lag.Bytes>>20, s.MaxBytes>>20)
		}
		age, err := l.age(ctx, lag, s.FirstSeq)
		if err != nil {
			return err
		}
		oldest = max(oldest, age)
	}
	most := l.o.events().MaxAge // where it is not suspended
	var err error
	switch {
	case s.MaxAge != 0 && oldest > most/4:
		if err = l.setMaxAge(ctx, 0); err == nil {
			l.o.Log.Warn("nothing ages out of the log until it is read", "unread_since", oldest.Round(time.Second))
		} else if oldest > most/10*8 {
			refuse("events unread for %s would be dropped after %s", oldest.Round(time.Second), most)
		}
	case s.MaxAge == 0 && oldest < most/8:
		if err = l.setMaxAge(ctx, most); err == nil {
			l.o.Log.Info("events age out of the log again", "after", most)
		}
	}
	if before := l.full.Swap(why); (before == nil) != (why == nil) {
		if why != nil {
			l.o.Log.Error("new calls are refused until the log is read", "cause", *why)
		} else {
			l.o.Log.Info("new calls are taken again")
		}
	}
	return err
}

// samples are how many unread events are looked at to tell their size.
const samples = 16

// sampled is about how many bytes a consumer has not read. The mean of the whole
// log would not do: a few large events may be behind many small ones that are
// read, and these are gone at once when the log is full.
func (l *Log) sampled(ctx context.Context, lag Lag, s Status) (uint64, error) {
	oldest := max(lag.Settled+1, s.FirstSeq)
	count := s.LastSeq + 1 - oldest
	if count*MaxBody <= s.MaxBytes/10*8 {
		return 0, nil // however large they are
	}
	sum, n := uint64(0), uint64(0)
	for i := range uint64(samples) {
		m, err := l.stream.GetMsg(ctx, oldest+(2*i+1)*count/(2*samples), jetstream.WithGetMsgSubject("ev.>"))
		if errors.Is(err, jetstream.ErrMsgNotFound) {
			continue
		}
		if err != nil {
			return 0, fmt.Errorf("size of what waits for %s: %w", lag.Consumer, err)
		}
		sum += uint64(len(m.Data) + len(m.Subject) + len(m.Header.Get(headerEnvelope)))
		n++
	}
	return sum / max(n, 1) * count, nil
}

// setMaxAge says when the log drops an event; 0: never.
func (l *Log) setMaxAge(ctx context.Context, age time.Duration) error {
	nc, err := l.o.Dial(RoleAdmin)
	if err != nil {
		return fmt.Errorf("change how long the log keeps events: %w", err)
	}
	defer nc.Close()
	js, err := jetstream.New(nc)
	if err != nil {
		return err
	}
	c := l.o.events()
	before, err := said(ctx, js, events)
	if err != nil {
		return fmt.Errorf("change how long the log keeps events: %w", err)
	}
	c.Metadata = keeping(c, before, time.Now())
	c.MaxAge = age
	if _, err := js.UpdateStream(ctx, c); err != nil {
		return fmt.Errorf("change how long the log keeps events: %w", err)
	}
	return nil
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
		if lag.Consumer == durables[RoleProject] || lag.Consumer == durables[RoleTraces] {
			continue // no call waits for the record, nor for what is seen of it
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
