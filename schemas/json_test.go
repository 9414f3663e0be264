package schemas

import (
	"bytes"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"
)

var update = flag.Bool("update", false, "write the golden files anew")

// golden compares got with a file, or writes it under -update.
func golden(t *testing.T, path string, got []byte) {
	t.Helper()
	if *update {
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, got, 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatalf("%v (go test ./schemas -update writes it)", err)
	}
	if !bytes.Equal(got, want) {
		t.Errorf("%s differs; if that is meant, go test ./schemas -update\ngot:\n%s\nwant:\n%s", path, got, want)
	}
}

// sortedKinds is the closed set in a fixed order.
func sortedKinds() []Kind { return slices.Sorted(maps.Keys(kinds)) }

// fill sets every field of a payload by what gives: a function of the field's
// name for a sample, a draw for a property.
func fill(v reflect.Value, path string, text func(string) string, number func(string) int64, size func(string, reflect.StructTag) int) {
	var tag reflect.StructTag
	var walk func(reflect.Value, string)
	walk = func(v reflect.Value, path string) {
		if v.Type() == reflect.TypeFor[time.Time]() {
			if n := number(path); n != 0 {
				v.Set(reflect.ValueOf(time.Unix(n&0xffffffff, n&0xfffff).UTC()))
			}
			return
		}
		switch v.Kind() {
		case reflect.Struct:
			for i := range v.NumField() {
				f := v.Type().Field(i)
				tag = f.Tag
				walk(v.Field(i), f.Name)
			}
		case reflect.String:
			v.SetString(text(path))
		case reflect.Int:
			v.SetInt(number(path))
		case reflect.Uint64:
			v.SetUint(uint64(number(path)))
		case reflect.Bool:
			v.SetBool(number(path)%2 == 1)
		case reflect.Slice:
			if n := size(path, tag); n >= 0 {
				s := reflect.MakeSlice(v.Type(), n, n)
				for i := range n {
					walk(s.Index(i), path)
				}
				v.Set(s)
			}
		case reflect.Map:
			if n := size(path, tag); n >= 0 {
				m := reflect.MakeMap(v.Type())
				for range n {
					m.SetMapIndex(reflect.ValueOf(text(path)), reflect.ValueOf(text(path)))
				}
				v.Set(m)
			}
		default:
			panic(fmt.Sprintf("fill does not know %s at %s", v.Type(), path))
		}
	}
	walk(v, path)
}

// samples are two events per kind: one with every member set, one with none
// but those that must be.
func samples() []Event {
	var all []Event
	for _, k := range sortedKinds() {
		data := kinds[k]()
		fill(reflect.ValueOf(data).Elem(), "", sampleText,
			func(string) int64 { return 1_785_000_001 },
			func(string, reflect.StructTag) int { return 1 })
		if f, ok := data.(*Failed); ok {
			f.Code = FailUnknown
		}
		full := Event{
			Tenant: "acme", Session: "s1", Call: "c1", Parent: "c0", Root: "c0", Agent: "researcher", Edge: "e1",
			Time:       time.Date(2026, 7, 28, 12, 0, 0, 5000, time.UTC),
			Trace:      "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
			TraceState: "rojo=00f067aa0ba902b7",
			Data:       data, Body: []byte(`{"n": 1E400, "s": "<é>"}`), Seq: 9007199254740993,
			Stored: time.Date(2026, 7, 28, 12, 0, 0, 7000, time.UTC),
		}
		data = kinds[k]()
		if f, ok := data.(*Failed); ok {
			f.Code = FailUnknown
		}
		all = append(all, full, anEvent(data))
	}
	bytes := anEvent(&Completed{})
	bytes.Body = []byte{0xff, 0x00}
	nothing := anEvent(&Authorized{Only: []string{}})
	return append(all, bytes, nothing)
}

func sampleText(field string) string { return "some-" + strings.ToLower(field) }

// TestWrittenForm pins the form in which logs and exports lie about: a change
// here is a new Version, unless it adds a member.
func TestWrittenForm(t *testing.T) {
	var out bytes.Buffer
	for _, e := range samples() {
		text, err := e.MarshalJSON()
		if err != nil {
			t.Fatal(err)
		}
		out.Write(append(text, '\n'))
		var back Event
		if err := back.UnmarshalJSON(text); err != nil {
			t.Errorf("%s: %v", text, err)
		} else if !reflect.DeepEqual(back, e) {
			t.Errorf("got %+v\nwant %+v", back, e)
		}
	}
	golden(t, "testdata/events.jsonl", out.Bytes())
}

// drawEvent draws any event that Check accepts.
func drawEvent(t *rapid.T) Event {
	token := rapid.StringMatching(`[a-z0-9_-]{1,12}`)
	maybe := rapid.OneOf(rapid.Just(""), token)
	text := rapid.String()
	printable := rapid.StringMatching(`[!-~]{0,20}`)
	number := rapid.Int64Range(0, 1<<62)
	when := func(label string) time.Time {
		return time.Unix(rapid.Int64Range(0, 1<<33).Draw(t, label), rapid.Int64Range(0, 999_999_999).Draw(t, label)).UTC()
	}
	data := kinds[rapid.SampledFrom(sortedKinds()).Draw(t, "kind")]()
	fill(reflect.ValueOf(data).Elem(), "",
		func(f string) string {
			switch f {
			case "ID", "By", "After": // part of the event's ID
				return printable.Draw(t, f)
			case "Call", "Session", "Agent":
				return token.Draw(t, f)
			}
			return text.Draw(t, f)
		},
		func(f string) int64 { return number.Draw(t, f) },
		func(f string, tag reflect.StructTag) int {
			n := rapid.IntRange(-1, 3).Draw(t, f)
			if n == 0 && strings.Contains(string(tag), "omitempty") {
				n = -1 // empty and absent are one there
			}
			return n
		})
	e := Event{
		Tenant: Tenant(token.Draw(t, "tenant")), Session: SessionKey(token.Draw(t, "session")),
		Parent: CallID(maybe.Draw(t, "parent")), Root: CallID(maybe.Draw(t, "root")),
		Agent: Agent(token.Draw(t, "agent")), Edge: Replica(maybe.Draw(t, "edge")),
		Time: when("time"), Trace: text.Draw(t, "trace"), TraceState: text.Draw(t, "tracestate"), Data: data,
		Body: rapid.OneOf(
			rapid.Just([]byte(nil)), rapid.SliceOf(rapid.Byte()), rapid.Map(text, func(s string) []byte { return []byte(s) }),
		).Draw(t, "body"),
	}
	if data.Kind().OfCall() {
		e.Call = CallID(token.Draw(t, "call"))
	} else {
		e.Call = CallID(maybe.Draw(t, "call"))
	}
	if rapid.Bool().Draw(t, "stored") {
		e.Seq, e.Stored = rapid.Uint64().Draw(t, "seq"), when("stored")
	}
	return e
}

func TestRoundTrip(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		e := drawEvent(t)
		if err := e.Check(); err != nil {
			t.Fatal(err)
		}
		text, err := e.MarshalJSON()
		if err != nil {
			t.Fatal(err)
		}
		var back Event
		if err := back.UnmarshalJSON(text); err != nil {
			t.Fatalf("%s: %v", text, err)
		}
		if !reflect.DeepEqual(back, e) {
			t.Fatalf("%s\ngot  %+v\nwant %+v", text, back, e)
		}
		// The log's header: without body, seq and stored.
		e.Body, e.Seq, e.Stored = nil, 0, time.Time{}
		if text, err = e.MarshalJSON(); err != nil {
			t.Fatal(err)
		}
		back = Event{}
		if err := back.UnmarshalJSON(text); err != nil || !reflect.DeepEqual(back, e) {
			t.Fatalf("%s: %v\ngot  %+v\nwant %+v", text, err, back, e)
		}
		sameAsSlow(t, text)
		if s, err := e.MarshalString(); err != nil || s != string(text) {
			t.Fatalf("MarshalString: %s, %v", s, err)
		}
		w := e.written()
		if slow, err := json.Marshal(&w); err != nil || !bytes.Equal(text, slow) {
			t.Fatalf("header:        %s\nencoding/json: %s, %v", text, slow, err)
		}
	})
}

// TestHeaderIsFast: what the log holds takes the short way. Nothing would
// fail if it did not; every call would only cost more.
func TestHeaderIsFast(t *testing.T) {
	for _, e := range samples() {
		e.Body, e.Seq, e.Stored = nil, 0, time.Time{}
		text, err := e.MarshalJSON()
		if err != nil {
			t.Fatal(err)
		}
		if _, ok := readHeader(string(text)); !ok {
			t.Errorf("not read by readHeader: %s", text)
		}
		w := e.written()
		if fast, ok := w.header(nil); !ok || !bytes.Equal(fast, text) {
			t.Errorf("not written by header: %s", text)
		}
		sameAsSlow(t, text)
	}
}

// sameAsSlow fails when readHeader reads something else than readAny.
func sameAsSlow(t interface {
	Helper()
	Fatalf(string, ...any)
}, text []byte) {
	t.Helper()
	fast, ok := readHeader(string(text))
	if !ok {
		return
	}
	slow, err := readAny(text)
	if err != nil {
		t.Fatalf("readHeader reads what readAny refuses: %s: %v", text, err)
	}
	if !reflect.DeepEqual(fast, slow) {
		t.Fatalf("%s\nreadHeader: %+v %+v\nreadAny:    %+v %+v", text, fast, fast.Data, slow, slow.Data)
	}
}

func TestUnmarshalRefuses(t *testing.T) {
	good, err := anEvent(&Requested{}).MarshalJSON()
	if err != nil {
		t.Fatal(err)
	}
	change := func(from, to string) string {
		t.Helper()
		out := strings.Replace(string(good), from, to, 1)
		if out == string(good) {
			t.Fatalf("%s holds no %s", good, from)
		}
		return out
	}
	data := string(good[bytes.Index(good, []byte(`"data":`)):])
	for name, text := range map[string]string{
		"nothing":                "",
		"null":                   "null",
		"an array":               "[]",
		"cut short":              string(good[:len(good)-1]),
		"something after it":     string(good) + "{}",
		"a newer version":        change(`"v":1`, `"v":2`),
		"no version":             change(`"v":1,`, ``),
		"a second version":       change(`"kind"`, `"v":2,"kind"`),
		"a version at the end":   change(data, data[:len(data)-1]+`,"v":2}`),
		"an unknown kind":        change(`"requested"`, `"invented"`),
		"a second kind":          change(`"id"`, `"kind":"denied","id"`),
		"another event's id":     change(`c1/requested`, `c2/requested`),
		"another kind's id":      change(`c1/requested`, `c1/end`),
		"another call":           change(`"call":"c1"`, `"call":"c2"`),
		"no call":                change(`"call":"c1",`, ``),
		"no tenant":              change(`"tenant":"acme",`, ``),
		"a tenant with a dot":    change(`"acme"`, `"ac.me"`),
		"a time that is none":    change(`"time":"2026-`, `"time":"2026`),
		"no data":                change(`,`+data, `}`),
		"null data":              change(data, `"data":null}`),
		"data of the wrong type": change(data, `"data":[]}`),
		"two bodies":             change(data, data[:len(data)-1]+`,"body":"a","body_base64":"/w=="}`),
		"base64 that is none":    change(data, data[:len(data)-1]+`,"body_base64":"§"}`),
	} {
		var e Event
		if err := e.UnmarshalJSON([]byte(text)); !errors.Is(err, ErrInvalid) {
			t.Errorf("%s: %v, want ErrInvalid: %s", name, err, text)
		}
	}
	if err := new(Event).UnmarshalJSON(good); err != nil {
		t.Errorf("the unchanged one: %v", err)
	}
	var e Event
	if err := e.UnmarshalJSON([]byte(change(`"v":1`, `"v":2`))); !strings.Contains(fmt.Sprint(err), "version 2") {
		t.Errorf("the error of a newer version does not say so: %v", err)
	}
	if _, err := (Event{}).MarshalJSON(); !errors.Is(err, ErrInvalid) {
		t.Errorf("an event without payload is written: %v", err)
	}
}

// TestUnknownMembers: a later program may add members, in the envelope and in
// a payload, without shutting out an earlier one.
func TestUnknownMembers(t *testing.T) {
	want := anEvent(&Requested{Revision: "2026-07-28"})
	text, err := want.MarshalJSON()
	if err != nil {
		t.Fatal(err)
	}
	more := strings.Replace(string(text), `"time"`, `"region":{"a":[1]},"time"`, 1)
	more = strings.Replace(more, `"revision"`, `"weight":9,"revision"`, 1)
	more = "\n" + strings.Replace(more, `{"v":1,`, `{ "v" : 1 , `, 1) + " "
	var got Event
	if err := json.Unmarshal([]byte(more), &got); err != nil {
		t.Fatalf("%s: %v", more, err)
	}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("got %+v, want %+v", got, want)
	}
}

func FuzzEvent(f *testing.F) {
	for _, e := range samples() {
		text, err := e.MarshalJSON()
		if err != nil {
			f.Fatal(err)
		}
		f.Add(text)
	}
	f.Add([]byte(`{"kind":"opened","v":1,"id":"s/opened","time":"2026-07-28T12:00:00+01:00","tenant":"a","session":"s","agent":"b","data":{}}`))
	f.Fuzz(func(t *testing.T, text []byte) {
		sameAsSlow(t, text)
		var e Event
		if err := e.UnmarshalJSON(text); err != nil {
			if !errors.Is(err, ErrInvalid) {
				t.Fatalf("%v does not wrap ErrInvalid", err)
			}
			return
		}
		once, err := e.MarshalJSON()
		if err != nil {
			t.Fatalf("what was read cannot be written: %s: %v", text, err)
		}
		var again Event
		if err := again.UnmarshalJSON(once); err != nil {
			t.Fatalf("what was written cannot be read: %s: %v", once, err)
		}
		if !bytes.Equal(e.Body, again.Body) {
			t.Fatalf("body %q became %q", e.Body, again.Body)
		}
		w := again.written()
		if fast, ok := w.header(nil); ok {
			if slow, err := json.Marshal(&w); err != nil || !bytes.Equal(fast, slow) {
				t.Fatalf("header:        %s\nencoding/json: %s, %v", fast, slow, err)
			}
		}
		twice, err := again.MarshalJSON()
		if err != nil || !bytes.Equal(once, twice) {
			t.Fatalf("%s\nbecame %s (%v)", once, twice, err)
		}
	})
}
