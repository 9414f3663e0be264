package schemas

import (
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"
)

const (
	aTrace = "0af7651916cd43dd8448eb211c80319c"
	aSpan  = "b7ad6b7169203331"
)

// TestTraceparent: what W3C Trace Context §3.2 and §4.3 say of values that are
// not of this version, or not well-formed.
func TestTraceparent(t *testing.T) {
	for in, want := range map[string]string{
		"00-" + aTrace + "-" + aSpan + "-01":                   "00-" + aTrace + "-" + aSpan + "-01",
		"00-" + aTrace + "-" + aSpan + "-00":                   "00-" + aTrace + "-" + aSpan + "-00",
		"00-" + aTrace + "-" + aSpan + "-ff":                   "00-" + aTrace + "-" + aSpan + "-03", // unknown flags are not passed on
		"cc-" + aTrace + "-" + aSpan + "-01":                   "00-" + aTrace + "-" + aSpan + "-01", // a later version is read as this one
		"cc-" + aTrace + "-" + aSpan + "-01-what-comes":        "00-" + aTrace + "-" + aSpan + "-01",
		"cc-" + aTrace + "-" + aSpan + "-01.what-comes":        "",
		"ff-" + aTrace + "-" + aSpan + "-01":                   "",
		"00-" + aTrace + "-" + aSpan + "-01-more":              "",
		"00-" + strings.ToUpper(aTrace) + "-" + aSpan + "-01":  "",
		"00-" + strings.Repeat("0", 32) + "-" + aSpan + "-01":  "",
		"00-" + aTrace + "-" + strings.Repeat("0", 16) + "-01": "",
		"00-" + aTrace + "-" + aSpan + "-1":                    "",
		"00-" + aTrace[:31] + "--" + aSpan + "-01":             "",
		"00-" + aTrace[:31] + "g-" + aSpan + "-01":             "",
		" 00-" + aTrace + "-" + aSpan + "-01":                  "",
		"":                                                     "",
	} {
		got, ok := Traceparent(in)
		if got != want || ok != (want != "") {
			t.Errorf("Traceparent(%q) = %q, %v; want %q", in, got, ok, want)
		}
	}
}

func TestTracestate(t *testing.T) {
	long := strings.Repeat("v", 200)
	many := strings.Repeat("a", 100)
	for _, tt := range []struct {
		in   []string
		want string
		ok   bool
	}{
		{[]string{"a=1,b=2"}, "a=1,b=2", true},
		{[]string{"a=1 , ,\tb=2", "c=3"}, "a=1,b=2,c=3", true},
		{[]string{"tenant@system=x,0-x/*_=y"}, "tenant@system=x,0-x/*_=y", true},
		{nil, "", true},
		{[]string{"a=1,a=2"}, "", false},
		{[]string{"A=1"}, "", false},
		{[]string{"a"}, "", false},
		{[]string{"a="}, "", false},
		{[]string{"a=b=c"}, "", false},
		{[]string{"a=\x01"}, "", false},
		{[]string{"=1"}, "", false},
		{[]string{strings.Repeat("a=1,", 33)}, "", false},
		{[]string{"n=1,big=" + long + ",c=" + many + ",d=" + many + ",e=" + many + ",f=" + many + ",g=1"}, "n=1,c=" + many + ",d=" + many + ",e=" + many + ",f=" + many + ",g=1", true},
		{[]string{"a=" + many + ",b=" + many + ",c=" + many + ",d=" + many + ",e=" + many + ",f=1"}, "a=" + many + ",b=" + many + ",c=" + many + ",d=" + many, true},
	} {
		if got, ok := Tracestate(tt.in...); got != tt.want || ok != tt.ok {
			t.Errorf("Tracestate(%q) = %q, %v; want %q, %v", tt.in, got, ok, tt.want, tt.ok)
		}
	}
}

// TestSpans: a call's spans tell its time and nothing else of it, are never the
// same, and go with their trace from one call to the next.
func TestSpans(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		at := time.UnixMilli(rapid.Int64Range(1_700_000_000_000, 4_000_000_000_000).Draw(t, "at"))
		c := NewCallID(at)
		if got := c.Minted(); !got.Equal(at) {
			t.Fatalf("minted at %v, says %v", at, got)
		}
		later := at.Add(time.Duration(rapid.Int64Range(-int64(SpanWithin)+1, int64(30*365*24*time.Hour)).Draw(t, "later")))
		seen := map[string]bool{}
		for _, p := range []Part{PartCall, PartPolicy, PartUpstream} {
			span := c.Span(p)
			if len(span) != 16 || span != c.Span(p) || seen[span] {
				t.Fatalf("span %q of %s", span, p)
			}
			seen[span] = true
			if got, ok := SpanTime(span, later); !ok || at.Before(got) || at.Sub(got) >= SpanWithin {
				t.Fatalf("span of %v says %v (asked at %v)", at, got, later)
			}
		}
		e := Event{Call: c, Root: c}
		parent, state := e.Onward(nil)
		if normal, ok := Traceparent(parent); !ok || normal != parent {
			t.Fatalf("traceparent %q", parent)
		}
		back := Event{Call: NewCallID(at), Trace: parent, TraceState: state}
		if back.TraceID() != e.TraceID() || back.ParentSpan() != c.Span(PartUpstream) {
			t.Fatalf("called back in trace %s under %s, want %s under %s", back.TraceID(), back.ParentSpan(), e.TraceID(), c.Span(PartUpstream))
		}
		if spans := back.MadeFor(); len(spans) != 1 || spans[0] != c.Span(PartUpstream) {
			t.Fatalf("made for %q", spans)
		}
	})
}

// TestOnward: the caller's trace goes on, with our span in the place of its own,
// and what other systems said of it.
func TestOnward(t *testing.T) {
	c := NewCallID(time.Now())
	e := Event{Call: c, Root: "c0", Trace: "00-" + aTrace + "-" + aSpan + "-00", TraceState: "waybill=0123456789abcdef,other=x"}
	parent, state := e.Onward(nil)
	span := c.Span(PartUpstream)
	if want := "00-" + aTrace + "-" + span + "-00"; parent != want {
		t.Errorf("traceparent %q, want %q", parent, want)
	}
	if want := "waybill=" + span + ",other=x"; state != want {
		t.Errorf("tracestate %q, want %q", state, want)
	}
	if got := e.MadeFor(); len(got) != 2 || got[0] != aSpan || got[1] != "0123456789abcdef" {
		t.Errorf("made for %q", got)
	}
	if got := (Event{Call: "c1", Trace: "nonsense"}).TraceID(); len(got) != 32 {
		t.Errorf("a stored trace that is none: id %q", got)
	}
}
