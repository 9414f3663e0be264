package schemas

import (
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"strings"
	"time"
)

// A call belongs to a trace (W3C Trace Context): the one that its caller named
// ([Event.Trace]), or one whose id is that of the call at the root. The spans of
// a call have ids that are derived from the call's, as all its ids are, so that
// every replica and every replay comes to the same, and nothing has to be kept:
// not even to find, given the span under which a server was called, the call
// that it is of ([CallID.Span], [SpanTime]).

// Part is a part of a call that is a span.
type Part string

const (
	PartCall     Part = "call"     // all of it, as its caller sees it
	PartPolicy   Part = "policy"   // its decision
	PartUpstream Part = "upstream" // the server's part: what the server is told that it is called by
)

// Of the 64 bits of a span, the upper ones are the time of the call's id in
// units of 64 ms, which come round after 34 years, and the rest a hash.
const (
	spanUnit = 6 // bits of milliseconds
	spanHash = 30
	spanWrap = uint64(1)<<(64-spanHash) - 1
)

// Span is the id of a part's span: 16 hexadecimal digits.
func (c CallID) Span(p Part) string {
	var room [128]byte // on the stack: each call comes through here
	text := append(append(append(append(room[:0], "waybill span\x00"...), p...), 0), c...)
	sum := sha256.Sum256(text)
	n := binary.BigEndian.Uint64(sum[:]) >> (64 - spanHash)
	if id, ok := c.bytes(); ok {
		n |= binary.BigEndian.Uint64(id[:8]) >> (16 + spanUnit) << spanHash
	}
	if n == 0 {
		n = 1 // none is all zero
	}
	var b [8]byte
	var digits [16]byte
	binary.BigEndian.PutUint64(b[:], n)
	hex.Encode(digits[:], b[:])
	return string(digits[:])
}

// SpanTime is when the call was minted that has the span, within [SpanWithin] from
// then on, if it is one of a call's at all: what is none has a time that is
// anywhere in 34 years. now is any later time in these years, and a clock that is
// behind by less than SpanWithin may be asked too.
func SpanTime(span string, now time.Time) (time.Time, bool) {
	b, err := hex.DecodeString(span)
	if err != nil || len(b) != 8 {
		return time.Time{}, false
	}
	units := uint64(now.Add(SpanWithin).UnixMilli()) >> spanUnit
	ago := (units - binary.BigEndian.Uint64(b)>>spanHash) & spanWrap
	return time.UnixMilli(int64(units-ago) << spanUnit), true
}

// SpanWithin is how exactly a span tells the time.
const SpanWithin = 64 * time.Millisecond

// bytes undoes what [NewCallID] wrote.
func (c CallID) bytes() (id [16]byte, ok bool) {
	if len(c) != 27 || c[0] != 'c' {
		return id, false
	}
	var all [17]byte // 26 digits are 16 bytes and 2 bits
	n, err := token32.Decode(all[:], []byte(c[1:]))
	return [16]byte(all[:16]), err == nil && n == 16
}

// Minted is when the call's id was made, to the millisecond; zero for an id that
// is none of [NewCallID]'s.
func (c CallID) Minted() time.Time {
	id, ok := c.bytes()
	if !ok {
		return time.Time{}
	}
	return time.UnixMilli(int64(binary.BigEndian.Uint64(id[:8]) >> 16)).UTC()
}

// TraceID is the trace that the event's call belongs to: 32 hexadecimal digits,
// or "" outside of calls where none was named.
func (e Event) TraceID() string {
	if t, ok := Traceparent(e.Trace); ok {
		return t[3:35]
	}
	root := e.Root
	if root == "" {
		root = e.Call
	}
	if root == "" {
		return ""
	}
	id, ok := root.bytes()
	if !ok {
		sum := sha256.Sum256([]byte("waybill trace\x00" + string(root)))
		id = [16]byte(sum[:16])
	}
	return hex.EncodeToString(id[:])
}

// SpanID is the span of the event's call; "" outside of calls.
func (e Event) SpanID() string {
	if e.Call == "" {
		return ""
	}
	return e.Call.Span(PartCall)
}

// ParentSpan is the span by which the call was made, or "".
func (e Event) ParentSpan() string {
	if t, ok := Traceparent(e.Trace); ok {
		return t[36:52]
	}
	return ""
}

// TraceFlags are those of the call's trace: what its caller said, or what the
// function makes of the trace's id; of nil, [Sampled].
func (e Event) TraceFlags(of func(id string) string) string {
	if t, ok := Traceparent(e.Trace); ok {
		return t[53:]
	}
	if of == nil {
		return Sampled
	}
	return of(e.TraceID())
}

// Sampled and NotSampled are flags of a trace.
const (
	Sampled    = "01" // who calls may have recorded it, and wants it recorded
	NotSampled = "00"
)

// stateKey is our member of a tracestate: the span under which a server was
// called. A server that is traced calls back from a span of its own, and this is
// what it passes on as it is.
const stateKey = "waybill"

// Onward is the trace context with which the call's server is called:
// traceparent, whose span is that of the call's part at the server, and
// tracestate. flags is as for [Event.TraceFlags].
func (e Event) Onward(flags func(id string) string) (traceparent, tracestate string) {
	span := e.Call.Span(PartUpstream)
	traceparent = "00-" + e.TraceID() + "-" + span + "-" + e.TraceFlags(flags)
	own := stateKey + "=" + span
	if e.TraceState == "" {
		return traceparent, own
	}
	members := []string{own}
	for m := range strings.SplitSeq(e.TraceState, ",") {
		if m != "" && !strings.HasPrefix(m, stateKey+"=") {
			members = append(members, m)
		}
	}
	return traceparent, fitState(members)
}

// MadeFor are the spans by which an event's trace context may name the call for
// which it was made, the better first.
func (e Event) MadeFor() []string {
	var spans []string
	if parent := e.ParentSpan(); parent != "" {
		spans = append(spans, parent)
	}
	for m := range strings.SplitSeq(e.TraceState, ",") {
		if span, ok := strings.CutPrefix(m, stateKey+"="); ok && (len(spans) == 0 || span != spans[0]) {
			spans = append(spans, span)
		}
	}
	return spans
}

// Traceparent reads a traceparent (W3C Trace Context §3.2) and writes it as this
// version has it; ok is false for what is to be treated as if it were not there.
func Traceparent(s string) (normal string, ok bool) {
	const size = 55
	if len(s) < size || s[2] != '-' || s[35] != '-' || s[52] != '-' {
		return "", false
	}
	for i := range size {
		if c := s[i]; (c < '0' || c > '9') && (c < 'a' || c > 'f') && i != 2 && i != 35 && i != 52 {
			return "", false
		}
	}
	switch version := s[:2]; {
	case version == "ff", version == "00" && len(s) > size, len(s) > size && s[size] != '-', // a later version may have more
		strings.Trim(s[3:35], "0") == "", strings.Trim(s[36:52], "0") == "":
		return "", false
	}
	// Of the flags only "sampled" and "random" are known, and no others may be
	// passed on.
	flags, _ := hex.DecodeString(s[53:55])
	return "00-" + s[3:53] + hex.EncodeToString([]byte{flags[0] & 3}), true
}

// Bounds of a tracestate (§3.3.1). What is longer than 512 bytes need not be
// passed on.
const (
	maxState       = 512
	maxStateMember = 128
	maxStateList   = 32
)

// Tracestate reads the lines of a tracestate header, or the one text of another
// carrier, and writes them as one; ok is false for what is to be treated as if it
// were not there.
func Tracestate(lines ...string) (normal string, ok bool) {
	var members []string
	seen := map[string]bool{}
	for _, line := range lines {
		for m := range strings.SplitSeq(line, ",") {
			if m = strings.Trim(m, " \t"); m == "" {
				continue
			}
			key, value, there := strings.Cut(m, "=")
			if !there || !stateKeyOK(key) || !stateValueOK(value) || seen[key] || len(members) == maxStateList {
				return "", false
			}
			seen[key] = true
			members = append(members, m)
		}
	}
	return fitState(members), true
}

func stateKeyOK(key string) bool {
	tenant, system, two := strings.Cut(key, "@")
	if two && (len(tenant) > 241 || len(system) > 14 || !stateNameOK(system)) {
		return false
	}
	return len(key) <= 256 && stateNameOK(tenant)
}

func stateNameOK(s string) bool {
	return s != "" && strings.IndexFunc(s, func(r rune) bool {
		return (r < 'a' || r > 'z') && (r < '0' || r > '9') && !strings.ContainsRune("_-*/", r)
	}) < 0 && !strings.ContainsRune("_-*/", rune(s[0]))
}

func stateValueOK(s string) bool {
	return s != "" && len(s) <= 256 && strings.IndexFunc(s, func(r rune) bool {
		return r < ' ' || r > '~' || r == ',' || r == '='
	}) < 0
}

// fitState joins members, the newest first, as far as there is room: long ones go
// first, then the oldest.
func fitState(members []string) string {
	size := -1
	for _, m := range members {
		size += len(m) + 1
	}
	for i := len(members) - 1; i >= 0 && size > maxState; i-- {
		if len(members[i]) > maxStateMember {
			size -= len(members[i]) + 1
			members = append(members[:i:i], members[i+1:]...)
		}
	}
	for size > maxState {
		last := len(members) - 1
		size -= len(members[last]) + 1
		members = members[:last]
	}
	return strings.Join(members, ",")
}
