package policy

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"reflect"
	"strings"
	"testing"
	"time"

	"waybill.dev/schemas"
)

func nothing(context.Context, schemas.Event) ([]schemas.Event, error) { return nil, nil }

// run hands one event to a policy that permits the tool read, at the given
// time after it was stored, and returns what it emitted.
func run(t *testing.T, e schemas.Event, after time.Duration, past schemas.Past) ([]schemas.Event, error) {
	t.Helper()
	b, err := NewBundle(compile(t, Allow{Agents: []string{"*"}, Servers: []string{"*"}, Tools: []string{"read"}, Methods: []string{"tools/list"}}), []string{"files"})
	if err != nil {
		t.Fatal(err)
	}
	p, err := New(Options{
		Bundle: b, Past: past, Duplicates: 40 * time.Second,
		Now: func() time.Time { return e.Stored.Add(after) },
	})
	if err != nil {
		t.Fatal(err)
	}
	var out []schemas.Event
	err = p.Handle(t.Context(), e, func(_ context.Context, e schemas.Event) (schemas.Receipt, error) {
		if err := e.Check(); err != nil {
			t.Errorf("emits what cannot be stored: %v", err)
		}
		out = append(out, e)
		return schemas.Receipt{}, nil
	})
	return out, err
}

func TestHandle(t *testing.T) {
	decided := func(args string) schemas.Decision {
		return schemas.Decision{N: 1, Rule: "allow[0]", Matches: []string{"allow[0]"}, ArgsSHA256: args}
	}
	yes, no := call("tools/call", "read"), call("tools/call", "write")
	list := call("tools/list", "")
	large := call("tools/call", "read")
	large.Body = bytes.Repeat([]byte("x"), schemas.InlineBody+1)
	fits := call("tools/call", "read")
	fits.Body = large.Body[1:]
	digest := sha256.Sum256(large.Body)
	stream := call("tools/call", "read")
	stream.Data.(*schemas.Requested).Deadline = time.Time{}

	short := sha256.Sum256(fits.Body)

	target := func(e schemas.Event) schemas.Target { return e.Data.(*schemas.Requested).Target }
	// None of the bodies is a request that can be read: the whole stands for its arguments.
	whole := sha256.Sum256(yes.Body)
	args := hex.EncodeToString(whole[:])
	read, listed := decided(args), decided("")
	for _, tt := range []struct {
		name  string
		e     schemas.Event
		after time.Duration
		data  schemas.Payload
		body  []byte
	}{
		{"permitted", yes, time.Second, &schemas.Authorized{
			Requested: *yes.Data.(*schemas.Requested), Decision: read, RequestedSeq: 7, RequestedAt: yes.Stored,
		}, yes.Body},
		{"list", list, time.Second, &schemas.Authorized{
			Requested: *list.Data.(*schemas.Requested), Decision: listed, RequestedSeq: 7, RequestedAt: yes.Stored,
			Only: []string{"read"},
		}, list.Body},
		{"body at the limit", fits, time.Second, &schemas.Authorized{
			Requested: *yes.Data.(*schemas.Requested), Decision: decided(hex.EncodeToString(short[:])), RequestedSeq: 7, RequestedAt: yes.Stored,
		}, fits.Body},
		{"body past the limit", large, time.Second, &schemas.Authorized{
			Requested: *yes.Data.(*schemas.Requested), Decision: decided(hex.EncodeToString(digest[:])), RequestedSeq: 7, RequestedAt: yes.Stored,
			BodySize: len(large.Body), BodySHA256: hex.EncodeToString(digest[:]),
		}, nil},
		{"denied", no, time.Second, &schemas.Denied{
			Summary:  schemas.Summary{Target: target(no), RequestedAt: no.Stored, RequestSize: len(no.Body), Revision: "2026-07-28"},
			Decision: schemas.Decision{N: 1, Reason: "no rule permits this call", ArgsSHA256: args},
		}, nil},
		{"expired", yes, time.Minute, &schemas.Failed{
			Summary: schemas.Summary{Target: target(yes), RequestedAt: yes.Stored, RequestSize: len(yes.Body), Revision: "2026-07-28"},
			Code:    schemas.FailExpired, Detail: "the deadline passed before policy decided",
		}, nil},
		{"expired before it could be denied", no, time.Hour, &schemas.Failed{
			Summary: schemas.Summary{Target: target(no), RequestedAt: yes.Stored, RequestSize: len(no.Body), Revision: "2026-07-28"},
			Code:    schemas.FailExpired, Detail: "the deadline passed before policy decided",
		}, nil},
		{"old but in time", yes, 59 * time.Second, &schemas.Authorized{
			Requested: *yes.Data.(*schemas.Requested), Decision: read, RequestedSeq: 7, RequestedAt: yes.Stored,
		}, yes.Body},
		{"without deadline", stream, time.Hour, &schemas.Authorized{
			Requested: *stream.Data.(*schemas.Requested), Decision: read, RequestedSeq: 7, RequestedAt: yes.Stored,
		}, stream.Body},
	} {
		out, err := run(t, tt.e, tt.after, nothing)
		if err != nil || len(out) != 1 {
			t.Errorf("%s: %d events, %v", tt.name, len(out), err)
			continue
		}
		if want := tt.e.Next(tt.data, tt.body); !reflect.DeepEqual(out[0], want) {
			t.Errorf("%s:\ngot  %+v %+v\nwant %+v %+v", tt.name, out[0], out[0].Data, want, want.Data)
		}
	}
}

// TestRedelivery: when the log no longer drops a repeated decision, its past
// is read; when it does, that is not paid for.
func TestRedelivery(t *testing.T) {
	e := call("tools/call", "read")
	summary := schemas.Summary{Target: e.Data.(*schemas.Requested).Target}
	word := schemas.Decision{N: 1}
	other := e.Next(&schemas.Authorized{}, nil)
	other.Call = "c2"
	authorized := e.Next(&schemas.Authorized{Decision: word}, nil)
	const fresh, old, expired = 20 * time.Second, 21 * time.Second, time.Minute
	for _, tt := range []struct {
		name  string
		past  []schemas.Event
		after time.Duration
		want  schemas.Kind
	}{
		{"fresh, decided: the log drops it", []schemas.Event{e, authorized}, fresh, schemas.KindAuthorized},
		{"old, nothing yet", []schemas.Event{e}, old, schemas.KindAuthorized},
		{"old, authorized", []schemas.Event{e, authorized}, old, ""},
		{"old, denied", []schemas.Event{e, e.Next(&schemas.Denied{Summary: summary, Decision: word}, nil)}, old, ""},
		{"old, held", []schemas.Event{e, e.Next(&schemas.Held{Decision: word}, nil)}, old, ""},
		{"old, failed", []schemas.Event{e, e.Next(&schemas.Failed{Code: schemas.FailExpired}, nil)}, old, ""},
		{"old, cancelled", []schemas.Event{e, e.Next(&schemas.Cancelled{}, nil)}, old, ""},
		{"old, only a wish to cancel", []schemas.Event{e, e.Next(&schemas.Cancel{}, nil)}, old, schemas.KindAuthorized},
		{"old, another call decided", []schemas.Event{e, other}, old, schemas.KindAuthorized},
		{"expired, nothing yet", []schemas.Event{e}, expired, schemas.KindFailed},
		{"expired, authorized", []schemas.Event{e, authorized}, expired, ""},
		{"expired, completed", []schemas.Event{e, authorized, e.Next(&schemas.Completed{}, nil)}, expired, ""},
		{"expired, only a wish to cancel", []schemas.Event{e, e.Next(&schemas.Cancel{}, nil)}, expired, schemas.KindFailed},
	} {
		asked := 0
		out, err := run(t, e, tt.after, func(_ context.Context, of schemas.Event) ([]schemas.Event, error) {
			asked++
			if of.Call != e.Call {
				t.Errorf("%s: asks for the past of %s", tt.name, of.Call)
			}
			return tt.past, nil
		})
		if err != nil {
			t.Errorf("%s: %v", tt.name, err)
		}
		if want := tt.after != fresh; want != (asked == 1) {
			t.Errorf("%s: the past was read %d times", tt.name, asked)
		}
		switch {
		case tt.want == "" && len(out) > 0:
			t.Errorf("%s: emits %s, want nothing", tt.name, out[0].Kind())
		case tt.want != "" && (len(out) != 1 || out[0].Kind() != tt.want):
			t.Errorf("%s: emits %v, want %s", tt.name, out, tt.want)
		}
	}
}

// TestHandleFails: without the log's word nothing goes on, and the event comes
// again.
func TestHandleFails(t *testing.T) {
	broken := errors.New("no answer")
	e := call("tools/call", "read")
	for _, after := range []time.Duration{30 * time.Second, time.Hour} {
		out, err := run(t, e, after, func(context.Context, schemas.Event) ([]schemas.Event, error) { return nil, broken })
		if !errors.Is(err, broken) || len(out) != 0 {
			t.Errorf("past unreadable after %s: emits %v, returns %v", after, out, err)
		}
	}
	for _, e := range []schemas.Event{call("tools/call", "read"), call("tools/call", "write")} {
		stored := 0
		p := newPolicy(t, compile(t, Allow{Agents: []string{"*"}, Servers: []string{"*"}, Tools: []string{"read"}})...)
		p.o.Now = func() time.Time { return e.Stored }
		err := p.Handle(t.Context(), e, func(context.Context, schemas.Event) (schemas.Receipt, error) {
			stored++
			return schemas.Receipt{}, broken
		})
		if !errors.Is(err, broken) || !strings.Contains(err.Error(), "c1") || stored != 1 {
			t.Errorf("log refuses: %d tries, returns %v", stored, err)
		}
		// Failed, but persisted: the next delivery says the same under the same ID.
		var ids []schemas.EventID
		for range 2 {
			if err := p.Handle(t.Context(), e, func(_ context.Context, e schemas.Event) (schemas.Receipt, error) {
				ids = append(ids, e.ID())
				return schemas.Receipt{}, nil
			}); err != nil {
				t.Error(err)
			}
		}
		if len(ids) != 2 || ids[0] != ids[1] || ids[0] != "c1/decision/1" {
			t.Errorf("deliveries decide under %v", ids)
		}
	}
}

// TestRefused: a decision that the log refuses for good ends the call, which
// nobody may carry out; unless an earlier delivery decided otherwise.
func TestRefused(t *testing.T) {
	yes, no := call("tools/call", "read"), call("tools/call", "write")
	decided := yes.Next(&schemas.Authorized{Decision: schemas.Decision{N: 1}}, nil)
	broken := errors.New("no answer")
	for _, tt := range []struct {
		name    string
		e       schemas.Event
		after   time.Duration
		why     error
		past    []schemas.Event
		unread  error // of the past
		again   error // of the second event
		failed  bool
		returns error
	}{
		{"authorized, too large", yes, 0, schemas.ErrTooLarge, nil, nil, nil, true, nil},
		{"authorized, invalid", yes, 0, schemas.ErrInvalid, nil, nil, nil, true, nil},
		{"denied, too large", no, 0, schemas.ErrTooLarge, nil, nil, nil, true, nil},
		{"denied, invalid", no, 0, schemas.ErrInvalid, nil, nil, nil, true, nil},
		{"decided before", yes, 0, schemas.ErrTooLarge, []schemas.Event{yes, decided}, nil, nil, false, nil},
		{"past unreadable", yes, 0, schemas.ErrTooLarge, nil, broken, nil, false, broken},
		{"ending not stored", yes, 0, schemas.ErrTooLarge, nil, nil, broken, true, broken},
		{"ending refused", yes, 0, schemas.ErrTooLarge, nil, nil, schemas.ErrTooLarge, true, schemas.ErrTooLarge},
		{"expired, refused", yes, time.Hour, schemas.ErrTooLarge, nil, nil, nil, false, schemas.ErrTooLarge},
	} {
		t.Run(tt.name, func(t *testing.T) {
			p := newPolicy(t, compile(t, Allow{Agents: []string{"*"}, Servers: []string{"*"}, Tools: []string{"read"}})...)
			p.o.Now = func() time.Time { return tt.e.Stored.Add(tt.after) }
			p.o.Past = func(context.Context, schemas.Event) ([]schemas.Event, error) { return tt.past, tt.unread }
			var out []schemas.Event
			err := p.Handle(t.Context(), tt.e, func(_ context.Context, e schemas.Event) (schemas.Receipt, error) {
				if out = append(out, e); len(out) > 1 {
					return schemas.Receipt{}, tt.again
				}
				return schemas.Receipt{}, fmt.Errorf("publish: %w: %s", tt.why, strings.Repeat("x", 1000))
			})
			if !errors.Is(err, tt.returns) || tt.returns == nil && err != nil {
				t.Errorf("returns %v, want %v", err, tt.returns)
			}
			if (len(out) == 2) != tt.failed {
				t.Fatalf("emits %d events", len(out))
			}
			if !tt.failed {
				return
			}
			f, ok := out[1].Data.(*schemas.Failed)
			if !ok || f.Code != schemas.FailInvalid || f.Name != tt.e.Data.(*schemas.Requested).Name || f.RequestedAt != tt.e.Stored ||
				f.Detail == "" || len(f.Detail) > 100 || out[1].Body != nil {
				t.Errorf("%+v", out[1])
			}
		})
	}
}

func TestHandleLeavesOthersAlone(t *testing.T) {
	e := call("tools/call", "read")
	for _, data := range []schemas.Payload{
		&schemas.Authorized{}, &schemas.Completed{}, &schemas.Cancel{}, &schemas.Opened{}, (*schemas.Requested)(nil), nil,
	} {
		e.Data = data
		p := newPolicy(t)
		if err := p.Handle(t.Context(), e, func(context.Context, schemas.Event) (schemas.Receipt, error) {
			t.Errorf("%T: emits", data)
			return schemas.Receipt{}, nil
		}); err != nil {
			t.Errorf("%T: %v", data, err)
		}
	}
}

func TestFaultsAreLogged(t *testing.T) {
	var out bytes.Buffer
	e := call("tools/call", "read")
	b, err := NewBundle([]Rule{panics("broken", Permit), fixed("yes", Permit, Match{Applies: true}, nil)}, []string{"files"})
	if err != nil {
		t.Fatal(err)
	}
	p, err := New(Options{
		Bundle: b, Past: nothing, Duplicates: time.Minute,
		Now: func() time.Time { return e.Stored },
		Log: slog.New(slog.NewTextHandler(&out, nil)),
	})
	if err != nil {
		t.Fatal(err)
	}
	if err := p.Handle(t.Context(), e, func(context.Context, schemas.Event) (schemas.Receipt, error) {
		return schemas.Receipt{}, nil
	}); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"rule=broken", "nil pointer", "session=s1", "call=c1", "kind=requested"} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("no %s in %s", want, out.String())
		}
	}
}

func BenchmarkHandle(b *testing.B) {
	e := call("tools/call", "read")
	p := newPolicy(b, compile(b, Allow{Agents: []string{"*"}, Servers: []string{"*"}, Tools: []string{"*"}})...)
	p.o.Now = func() time.Time { return e.Stored }
	emit := func(context.Context, schemas.Event) (schemas.Receipt, error) { return schemas.Receipt{}, nil }
	b.ReportAllocs()
	for b.Loop() {
		if err := p.Handle(b.Context(), e, emit); err != nil {
			b.Fatal(err)
		}
	}
}

// Without any policy, and with one of no rules, everything is denied.
func TestNoPolicy(t *testing.T) {
	empty, err := NewBundle(nil, []string{"files"})
	if err != nil {
		t.Fatal(err)
	}
	for name, b := range map[string]*Bundle{"none": nil, "empty": empty} {
		p, err := New(Options{Bundle: b, Past: nothing, Duplicates: time.Minute, Now: func() time.Time { return call("", "").Stored }})
		if err != nil {
			t.Fatal(err)
		}
		var kinds []schemas.Kind
		err = p.Handle(t.Context(), call("tools/call", "read"), func(_ context.Context, e schemas.Event) (schemas.Receipt, error) {
			kinds = append(kinds, e.Kind())
			return schemas.Receipt{}, nil
		})
		if err != nil || len(kinds) != 1 || kinds[0] != schemas.KindDenied {
			t.Errorf("%s: %v, %v", name, kinds, err)
		}
	}
}
