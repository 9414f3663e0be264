package bus

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/nats-io/nats.go/jetstream"
)

// Retention says what the log may have forgotten, so that what was deleted can be told
// from it. Where the retention was made longer, what was forgotten under the shorter one
// is gone all the same: that one is kept in the stream's settings.
type Retention struct {
	At       time.Time     // when this was so
	MaxAge   time.Duration // in force, or as it will be again, see Watch
	MaxBytes uint64        // 0 for no limit
	Bytes    uint64        // that the log has

	Until  time.Time     // to then it was shorter; zero if it never was
	Age    time.Duration // and this long
	Before uint64        // and of this many bytes

	Created time.Time // before then nothing was there
}

// What the streams EVENTS and FEED say of themselves: how long it keeps events, and what of that was
// shorter, until when.
const (
	metaKeeps = "waybill-keeps"
	metaKept  = "waybill-kept"
)

// keeping is what a stream says of itself, by its settings and by what it has said
// before they were set.
func keeping(c jetstream.StreamConfig, before map[string]string, now time.Time) map[string]string {
	says := map[string]string{metaKeeps: fmt.Sprintf("%s %d", c.MaxAge, c.MaxBytes)}
	age, bytes, err := keeps(before[metaKeeps])
	shorter := err == nil && (age < c.MaxAge || bytes < uint64(c.MaxBytes))
	kept := before[metaKept]
	switch {
	case shorter:
		// Of two the shorter one, as if it had been in force until now.
		if was, most, _, err := keptUntil(kept); err == nil {
			age, bytes = min(age, was), min(bytes, most)
		}
		says[metaKept] = fmt.Sprintf("%s %d %s", age, bytes, now.UTC().Format(time.RFC3339))
	case kept != "":
		says[metaKept] = kept
	}
	return says
}

func keeps(text string) (age time.Duration, bytes uint64, err error) {
	var t string
	if _, err = fmt.Sscan(text, &t, &bytes); err == nil {
		age, err = time.ParseDuration(t)
	}
	return age, bytes, err
}

func keptUntil(text string) (age time.Duration, bytes uint64, until time.Time, err error) {
	var t, u string
	if _, err = fmt.Sscan(text, &t, &bytes, &u); err == nil {
		if age, err = time.ParseDuration(t); err == nil {
			until, err = time.Parse(time.RFC3339, u)
		}
	}
	return age, bytes, until, err
}

// Retention asks the log what it may have forgotten.
func (a *Audit) Retention(ctx context.Context) (Retention, error) {
	r, err := retention(ctx, a.l, a.ev)
	if err != nil {
		return r, fmt.Errorf("how long the log keeps events: %w", err)
	}
	return r, nil
}

// FeedRetention asks the feed.
func (a *Audit) FeedRetention(ctx context.Context) (Retention, error) {
	r, err := retention(ctx, a.l, a.feed)
	if err != nil {
		return r, fmt.Errorf("how long the feed is kept: %w", err)
	}
	return r, nil
}

func retention(ctx context.Context, l *Log, s jetstream.Stream) (Retention, error) {
	info, err := retry(ctx, l, func(ctx context.Context) (*jetstream.StreamInfo, error) { return s.Info(ctx) })
	if err != nil {
		return Retention{}, err
	}
	r := Retention{Created: info.Created.UTC(), At: info.TimeStamp.UTC(), MaxAge: info.Config.MaxAge, MaxBytes: uint64(max(info.Config.MaxBytes, 0)), Bytes: info.State.Bytes}
	if r.At.IsZero() {
		r.At = time.Now().UTC()
	}
	if age, _, err := keeps(info.Config.Metadata[metaKeeps]); err == nil && r.MaxAge == 0 {
		r.MaxAge = age // suspended
	}
	if age, bytes, until, err := keptUntil(info.Config.Metadata[metaKept]); err == nil {
		r.Age, r.Before, r.Until = age, bytes, until
	}
	return r, nil
}

// said is what a stream says of itself now.
func said(ctx context.Context, js jetstream.JetStream, stream string) (map[string]string, error) {
	s, err := js.Stream(ctx, stream)
	if errors.Is(err, jetstream.ErrStreamNotFound) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	return s.CachedInfo().Config.Metadata, nil
}
