package bus_test

import (
	"testing"
	"time"

	"waybill.dev/bus"
	"waybill.dev/bus/embed"
)

// What the log may have forgotten is known over changes of how much it keeps.
func TestRetention(t *testing.T) {
	w := start(t, embed.Options{})
	at := func(o bus.Options) bus.Retention {
		t.Helper()
		o.Dial = w.srv.Connect
		if err := bus.Setup(t.Context(), o); err != nil {
			t.Fatal(err)
		}
		o.Role = bus.RoleAudit
		a, err := w.open(o).Audit(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		r, err := a.Retention(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		return r
	}
	first := at(bus.Options{MaxAge: 48 * time.Hour, MaxBytes: 1 << 30})
	less := at(bus.Options{MaxAge: time.Hour, MaxBytes: 1 << 30})
	if less.MaxAge != time.Hour || less.MaxBytes != 1<<30 || less.Before < first.Before || time.Since(less.At).Abs() > time.Minute {
		t.Errorf("made shorter: %+v", less)
	}
	for range 2 {
		more := at(bus.Options{MaxAge: 24 * time.Hour, MaxBytes: 2 << 30})
		if more.MaxAge != 24*time.Hour || more.Age != time.Hour || more.Before != 1<<30 || time.Since(more.Until).Abs() > time.Minute {
			t.Errorf("made longer: %+v", more)
		}
	}

	// Of the feed, too.
	feed := func(age time.Duration, bytes int64) bus.Retention {
		t.Helper()
		a, err := w.open(bus.Options{Role: bus.RoleAudit, FeedAge: age, FeedBytes: bytes}).Audit(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		r, err := a.FeedRetention(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		return r
	}
	feed(48*time.Hour, 1<<30)
	for range 2 {
		more := feed(96*time.Hour, 1<<30)
		if more.MaxAge != 96*time.Hour || more.Age != 48*time.Hour || more.MaxBytes != 1<<30 || more.Created.IsZero() || more.Created.After(more.At) {
			t.Errorf("the feed's made longer: %+v", more)
		}
	}
}
