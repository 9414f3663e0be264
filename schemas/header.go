package schemas

import (
	"encoding/json"
	"maps"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"time"
)

// Every step of every call writes and reads the form that lies in the log's
// headers: the written form without a body. Here it is written to the letter as
// encoding/json writes it, and what is written so is read, for a fifth of the
// cost. Anything else, broken or not, is left to encoding/json. Both follow
// lists of the members that are made from the structs and their tags, so that
// nothing has to be added here when a member is added there.

// member is one member of a struct as JSON, its own or one of a struct that it
// embeds.
type member struct {
	key  string   // `"name":`
	at   []int    // index of the field
	omit string   // omitempty, omitzero or ""
	of   []member // of each, where it is a list of structs
}

// Of all that is written; never modified.
var (
	ofEnvelope = membersOf(reflect.TypeFor[envelope]())
	ofPayload  = func() map[Kind][]member {
		of := map[Kind][]member{}
		for k, empty := range kinds {
			of[k] = membersOf(reflect.TypeOf(empty()).Elem())
		}
		return of
	}()
)

// membersOf lists the members of a struct in the order in which encoding/json
// writes them.
func membersOf(t reflect.Type) (all []member) {
	for i := range t.NumField() {
		f := t.Field(i)
		if f.Anonymous {
			for _, m := range membersOf(f.Type) {
				m.at = append([]int{i}, m.at...)
				all = append(all, m)
			}
			continue
		}
		name, omit, _ := strings.Cut(f.Tag.Get("json"), ",")
		m := member{key: `"` + name + `":`, at: []int{i}, omit: omit}
		if f.Type.Kind() == reflect.Slice && f.Type.Elem().Kind() == reflect.Struct {
			m.of = membersOf(f.Type.Elem())
		}
		all = append(all, m)
	}
	return all
}

// header appends the written form to b; ok is false when encoding/json has to
// make it.
func (w *written) header(b []byte) (_ []byte, ok bool) {
	if b, ok = appendMembers(append(b, '{'), &w.envelope, ofEnvelope); !ok {
		return nil, false
	}
	if b, ok = appendMembers(append(b, `,"data":{`...), w.Data, ofPayload[w.Kind]); !ok {
		return nil, false
	}
	return append(b, "}}"...), true
}

// appendMembers writes the members of the struct that p points to.
func appendMembers(b []byte, p any, all []member) (_ []byte, ok bool) {
	v := reflect.ValueOf(p).Elem()
	if !v.IsValid() {
		return nil, false
	}
	start := len(b)
	for i := range all {
		m := &all[i]
		f := v.FieldByIndex(m.at)
		if m.omit != "" && f.IsZero() {
			continue
		}
		before := len(b)
		if before > start {
			b = append(b, ',')
		}
		b = append(b, m.key...)
		value := len(b)
		switch f.Kind() {
		case reflect.String:
			b = appendText(b, f.String())
		case reflect.Int:
			b = strconv.AppendInt(b, f.Int(), 10)
		case reflect.Uint64:
			b = strconv.AppendUint(b, f.Uint(), 10)
		case reflect.Bool:
			b = strconv.AppendBool(b, f.Bool())
		default:
			if m.of != nil {
				b, ok = appendList(b, f, m.of)
			} else {
				b, ok = appendOther(b, f.Addr().Interface())
			}
			if !ok {
				return nil, false
			}
			if m.omit == "omitempty" && len(b) == value+2 { // [] or {}
				b = b[:before]
			}
		}
	}
	return b, true
}

// appendList writes a list of structs.
func appendList(b []byte, list reflect.Value, of []member) (_ []byte, ok bool) {
	if list.IsNil() {
		return nil, false
	}
	b = append(b, '[')
	for i := range list.Len() {
		if i > 0 {
			b = append(b, ',')
		}
		if b, ok = appendMembers(append(b, '{'), list.Index(i).Addr().Interface(), of); !ok {
			return nil, false
		}
		b = append(b, '}')
	}
	return append(b, ']'), true
}

func appendOther(b []byte, p any) (_ []byte, ok bool) {
	switch p := p.(type) {
	case *time.Time:
		if p.IsZero() && p.Location() != time.UTC {
			return nil, false // zero for omitzero, though not all of its fields are
		}
		b, err := p.AppendText(append(b, '"'))
		return append(b, '"'), err == nil
	case *[]string:
		if *p == nil {
			return nil, false
		}
		b = append(b, '[')
		for i, s := range *p {
			if i > 0 {
				b = append(b, ',')
			}
			b = appendText(b, s)
		}
		return append(b, ']'), true
	case *map[string]string:
		if *p == nil {
			return nil, false
		}
		b = append(b, '{')
		for i, k := range slices.Sorted(maps.Keys(*p)) {
			if i > 0 {
				b = append(b, ',')
			}
			b = append(appendText(b, k), ':')
			b = appendText(b, (*p)[k])
		}
		return append(b, '}'), true
	}
	return nil, false
}

// appendText writes a string.
func appendText(b []byte, s string) []byte {
	for i := range len(s) {
		if c := s[i]; c < 0x20 || c > 0x7e || c == '"' || c == '\\' || c == '<' || c == '>' || c == '&' {
			q, _ := json.Marshal(s) // a string: cannot fail
			return append(b, q...)
		}
	}
	return append(append(append(b, '"'), s...), '"')
}

// plain is the number of characters that s begins with that stand for
// themselves in a JSON string: printable ASCII.
func plain(s string) int {
	for i := range len(s) {
		if c := s[i]; c < 0x20 || c > 0x7e || c == '"' || c == '\\' {
			return i
		}
	}
	return len(s)
}

// readHeader reads what header writes, unless a string needed other escapes than
// those of quotes, which facts have.
func readHeader(s string) (w written, ok bool) {
	t := text(s)
	if !t.next("{") || !t.members(&w.envelope, ofEnvelope) || w.V != Version || kinds[w.Kind] == nil {
		return w, false
	}
	w.Data = kinds[w.Kind]()
	w.Kind = w.Data.Kind() // no part of s
	return w, t.next(`,"data":{`) && t.members(w.Data, ofPayload[w.Kind]) && t == "}}"
}

// text is what is left to read. A method that returns false has read part of it.
type text string

// next reads s, if it is next.
func (t *text) next(s string) bool {
	rest, ok := strings.CutPrefix(string(*t), s)
	if ok {
		*t = text(rest)
	}
	return ok
}

// members reads those that are there into the struct that p points to.
func (t *text) members(p any, all []member) bool {
	v := reflect.ValueOf(p).Elem()
	for i, first := 0, true; i < len(all); i++ {
		m, before := &all[i], *t
		if !first && !t.next(",") || !t.next(m.key) {
			*t = before
			continue
		}
		first = false
		ok := false
		switch f := v.FieldByIndex(m.at); f.Kind() {
		case reflect.String:
			var s string
			s, ok = t.string()
			f.SetString(s)
		case reflect.Int:
			n, err := strconv.ParseInt(t.digits(), 10, 64)
			ok = err == nil
			f.SetInt(n)
		case reflect.Uint64:
			n, err := strconv.ParseUint(t.digits(), 10, 64)
			ok = err == nil
			f.SetUint(n)
		case reflect.Bool:
			f.SetBool(t.next("true"))
			ok = f.Bool() || t.next("false")
		default:
			if m.of != nil {
				ok = t.list(f, m.of)
			} else {
				ok = t.other(f.Addr().Interface())
			}
		}
		if !ok {
			return false
		}
	}
	return true
}

// string reads a string that is plain but for quotes.
func (t *text) string() (s string, ok bool) {
	if !t.next(`"`) {
		return "", false
	}
	s = string((*t)[:plain(string(*t))])
	*t = (*t)[len(s):]
	if t.next(`"`) {
		return s, true
	}
	b := make([]byte, 0, 2*len(s)+64)
	for b = append(b, s...); !t.next(`"`); {
		switch {
		case t.next(`\"`):
			b = append(b, '"')
		case t.next(`\\`):
			b = append(b, '\\')
		default:
			n := plain(string(*t))
			if n == 0 {
				return "", false
			}
			b = append(b, (*t)[:n]...)
			*t = (*t)[n:]
		}
	}
	return string(b), true
}

// digits reads a number without fraction and exponent; "" if there is none.
func (t *text) digits() string {
	s := string(*t)
	n := 0
	for n < len(s) && (s[n] >= '0' && s[n] <= '9' || s[n] == '-' && n == 0) {
		n++
	}
	if n > 1 && s[0] == '0' || n > 2 && s[:2] == "-0" {
		return ""
	}
	*t = text(s[n:])
	return s[:n]
}

// list reads what appendList writes.
func (t *text) list(list reflect.Value, of []member) bool {
	list.Set(reflect.MakeSlice(list.Type(), 0, 1))
	return t.elements("[", "]", func() bool {
		list.Set(reflect.Append(list, reflect.Zero(list.Type().Elem())))
		return t.next("{") && t.members(list.Index(list.Len()-1).Addr().Interface(), of) && t.next("}")
	})
}

func (t *text) other(p any) bool {
	switch p := p.(type) {
	case *time.Time:
		s, ok := t.string()
		return ok && p.UnmarshalText([]byte(s)) == nil
	case *[]string:
		*p = []string{}
		return t.elements("[", "]", func() bool {
			s, ok := t.string()
			*p = append(*p, s)
			return ok
		})
	case *map[string]string:
		*p = map[string]string{}
		return t.elements("{", "}", func() bool {
			k, ok := t.string()
			if !ok || !t.next(":") {
				return false
			}
			(*p)[k], ok = t.string()
			return ok
		})
	}
	return false
}

// elements reads what stands between commas and two braces.
func (t *text) elements(from, to string, read func() bool) bool {
	if !t.next(from) {
		return false
	}
	if t.next(to) {
		return true
	}
	for read() {
		if t.next(to) {
			return true
		}
		if !t.next(",") {
			return false
		}
	}
	return false
}
