package playback

import (
	"bytes"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"unicode/utf8"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"

	"waybill.dev/schemas"
	"waybill.dev/schemas/jsonrpc"
)

// Difference is something that the client does otherwise than it did in the
// recorded session.
type Difference struct {
	What   string // what is different
	Target schemas.Target
	Seq    uint64   // of the recorded event that it is held against; 0: none
	Diff   []string // lines that begin with - (then) and + (now) and have a place (RFC 6901) and what stands there
	Handed bool     // the call was handed on
}

// message is what the client is told.
func (d Difference) message() string {
	return strings.Join(append([]string{"This differs from the recorded session: " + d.What + "."}, d.Diff...), "\n")
}

// data is what the client is told for programs.
func (d Difference) data() []byte {
	type waybill struct {
		Code string   `json:"code"`
		Seq  uint64   `json:"seq,omitzero"`
		Diff []string `json:"diff,omitempty"`
	}
	b, err := json.Marshal(map[string]waybill{"waybill": {"not_recorded", d.Seq, d.Diff}})
	if err != nil {
		return nil // an error without data is one all the same
	}
	return b
}

// named is a call as people call it.
func named(d *schemas.Requested) string {
	name := d.Name
	if d.Alias != "" {
		name = d.Alias
	}
	return strings.TrimSpace(d.Method + " " + name)
}

// Bounds of a diff.
const (
	maxLines = 20
	maxValue = 200 // bytes of a value
)

// differ says where two values differ, nil if nowhere; but leaves members of the
// outermost object out.
func differ(then, now jsonrpc.Value, but ...string) []string {
	d := &differing{}
	d.values("", then, now, but)
	if d.more > 0 {
		d.lines = append(d.lines, fmt.Sprintf("… and %d more", d.more))
	}
	return d.lines
}

type differing struct {
	lines []string
	more  int
}

func (d *differing) say(sign, place string, v jsonrpc.Value) {
	if !v.Exists() {
		return
	}
	if len(d.lines) == maxLines {
		d.more++
		return
	}
	d.lines = append(d.lines, sign+" "+place+": "+short(string(v.Raw())))
}

func (d *differing) values(place string, then, now jsonrpc.Value, but []string) {
	switch {
	case (then.Exists() == now.Exists() || place == "") && bytes.Equal(canonical(then, but...), canonical(now, but...)):
	case then.Kind() == jsonrpc.Object && now.Kind() == jsonrpc.Object:
		a, b := members(then), members(now)
		all := maps.Clone(a)
		maps.Copy(all, b)
		for _, name := range slices.Sorted(maps.Keys(all)) {
			if !slices.Contains(but, name) {
				d.values(place+"/"+strings.NewReplacer("~", "~0", "/", "~1").Replace(name), a[name], b[name], nil)
			}
		}
	case then.Kind() == jsonrpc.Array && now.Kind() == jsonrpc.Array:
		a, b := slices.Collect(then.Elements()), slices.Collect(now.Elements())
		for i := range max(len(a), len(b)) {
			var x, y jsonrpc.Value
			if i < len(a) {
				x = a[i]
			}
			if i < len(b) {
				y = b[i]
			}
			d.values(place+"/"+strconv.Itoa(i), x, y, nil)
		}
	default:
		d.say("-", place, then)
		d.say("+", place, now)
	}
}

func members(v jsonrpc.Value) map[string]jsonrpc.Value { return maps.Collect(v.Members()) }

func short(s string) string {
	if len(s) <= maxValue {
		return s
	}
	n := maxValue
	for n > 0 && !utf8.RuneStart(s[n]) {
		n--
	}
	return s[:n] + fmt.Sprintf("… (%d bytes)", len(s))
}

// canonical writes a value so that two that say the same are the same bytes (RFC
// 8785). An integer keeps its digits, since those beyond 2^53 are not to be lost.
// Members of the outermost object may be left out. What is not there is as an
// empty object: a client may write params, or not.
func canonical(v jsonrpc.Value, but ...string) []byte {
	raw := bytes.Clone(v.Raw())
	switch v.Kind() {
	case jsonrpc.None:
		return []byte("{}")
	case jsonrpc.Object:
		if len(but) > 0 {
			raw = []byte{'{'}
			for name, m := range v.Members() {
				if slices.Contains(but, name) {
					continue
				}
				if len(raw) > 1 {
					raw = append(raw, ',')
				}
				raw = append(append(append(raw, jsonrpc.Quote(name)...), ':'), m.Raw()...)
			}
			raw = append(raw, '}')
		}
	}
	c := jsontext.Value(raw)
	if c.Canonicalize(jsontext.CanonicalizeRawInts(false)) != nil {
		return raw // it was checked when it was stored; as it is it can be compared too
	}
	return c
}

// answersDiffer says where what a client answers differs from what it answered.
func answersDiffer(then, now schemas.Event) []string {
	a, err1 := jsonrpc.Decode(then.Body, limits)
	b, err2 := jsonrpc.Decode(now.Body, limits)
	if err1 != nil || err2 != nil {
		return []string{"one of the answers cannot be read"}
	}
	if then.ToTask() && a.IsRequest() && b.IsRequest() {
		return differ(a.Params().Get("inputResponses"), b.Params().Get("inputResponses"))
	}
	return differ(a.Root(), b.Root(), "id", "jsonrpc")
}
