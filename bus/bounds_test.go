package bus

import (
	"errors"
	"strings"
	"testing"
	"time"

	"waybill.dev/schemas"
)

func TestAgain(t *testing.T) {
	const ackWait = 5 * time.Second
	last := time.Duration(0)
	for n := range uint64(200) {
		d := again(ackWait, n)
		if d <= 0 || d > ackWait || d < last {
			t.Fatalf("delivery %d: pause %s after %s", n, d, last)
		}
		last = d
	}
	if last != ackWait {
		t.Errorf("the longest pause is %s", last)
	}
}

func TestCut(t *testing.T) {
	for text, want := range map[string]string{
		"plain": "plain", "two\r\nlines": "two  lines", "bad\xffbyte": "bad�byte",
		strings.Repeat("é", 400): strings.Repeat("é", 250) + "…",
	} {
		if got := cut(text); got != want {
			t.Errorf("cut(%.20q) = %q", text, got)
		}
	}
}

// What fits as a request fits as its authorization.
func TestEnvelopeIsBounded(t *testing.T) {
	e := schemas.Event{Tenant: "acme", Session: "s", Agent: "a", Call: "c", Root: "c"}
	largest := 0
	for n := 1000; ; n += 500 {
		req := schemas.Requested{Target: schemas.Target{Protocol: "mcp", Server: "s", Method: "tools/call", Name: strings.Repeat("<", n)}}
		if _, err := encode(e.Next(&req, nil)); err != nil {
			if !errors.Is(err, schemas.ErrTooLarge) {
				t.Fatal(err)
			}
			break
		}
		largest = n
		authorized := schemas.Authorized{Requested: req, Decision: schemas.Decision{N: 1, Rule: "allow[0]"}, BodySHA256: strings.Repeat("0", 64)}
		if _, err := encode(e.Next(&authorized, nil)); err != nil {
			t.Fatalf("a request with a name of %d fits, its authorization does not: %v", n, err)
		}
		ending := schemas.Completed{Summary: schemas.Summary{Target: req.Target}}
		if _, err := encode(e.Next(&ending, nil)); err != nil {
			t.Fatalf("a request with a name of %d fits, its ending does not: %v", n, err)
		}
	}
	if largest < 4<<10 {
		t.Errorf("the longest name that fits has %d bytes", largest)
	}
}

func TestStands(t *testing.T) {
	still := map[string]standstill{}
	at := time.Unix(0, 0)
	step := func(after time.Duration, waiting, reached uint64) bool {
		at = at.Add(after)
		return stands(still, []Lag{{Consumer: "policy", Waiting: waiting, Reached: reached}}, at) != nil
	}
	for i, c := range []struct {
		after            time.Duration
		waiting, reached uint64
		want             bool
	}{
		{0, 5, 10, false}, {9 * time.Second, 5, 10, false}, {time.Second, 6, 10, true}, // nothing taken for 10 s
		{time.Second, 5, 11, false}, {9 * time.Second, 5, 11, false}, // one taken
		{time.Second, 0, 11, false}, {time.Hour, 0, 11, false}, {time.Second, 1, 11, false}, // idle is not stuck
		{10 * time.Second, 1, 11, true},
	} {
		if got := step(c.after, c.waiting, c.reached); got != c.want {
			t.Errorf("step %d: stuck %v", i, got)
		}
	}
}
