package jsonrpc

import (
	"bytes"
	"encoding/json"
	"iter"
	"strconv"

	"github.com/go-json-experiment/json/jsontext"
)

// Kind is what a [Value] is.
type Kind uint8

const (
	None Kind = iota // the zero Value
	Null
	Bool
	Number
	String
	Array
	Object
)

func (k Kind) String() string {
	return [...]string{"none", "null", "bool", "number", "string", "array", "object"}[min(k, Object)]
}

// Value is a piece of a checked text: its bytes and where they stand. It is
// small and meant to be copied. The zero Value stands for what is not there;
// every method may be called on it.
//
// A value is found by reading on from its container, not by an index, since
// most messages are asked a few questions once. Do not Get one member after the
// other from a large object: range over [Value.Members].
type Value struct {
	doc  *document
	span span
}

func (d *document) value(s span) Value {
	if !s.exists() {
		return Value{}
	}
	return Value{d, s}
}

// Exists reports whether the value is there. A null exists.
func (v Value) Exists() bool { return v.doc != nil }

// Raw returns the bytes of the value, nil if it does not exist. They must not
// be modified.
func (v Value) Raw() []byte {
	if v.doc == nil {
		return nil
	}
	return v.doc.raw[v.span.start:v.span.end:v.span.end]
}

// Offset returns where in its text the value begins.
func (v Value) Offset() int { return int(v.span.start) }

// Kind returns what the value is.
func (v Value) Kind() Kind {
	if v.doc == nil {
		return None
	}
	switch v.doc.raw[v.span.start] {
	case '{':
		return Object
	case '[':
		return Array
	case '"':
		return String
	case 't', 'f':
		return Bool
	case 'n':
		return Null
	}
	return Number
}

// Get returns the member that is reached by the names, one object after the
// other. It is the zero Value when a name is missing or something on the way is
// no object. Names are compared exactly, after resolving escapes. Get does not
// allocate, but for names written with escapes.
func (v Value) Get(path ...string) Value {
	if v.doc == nil || len(path) == 0 {
		return v
	}
	raw, at := v.doc.raw, int(v.span.start)
	for _, name := range path {
		if raw[at] != '{' {
			return Value{}
		}
		w := walk{raw: raw, pos: at + 1}
		for {
			if !w.next(true) {
				return Value{}
			}
			if nameIs(w.name(), name) {
				at = w.value
				break
			}
			w.skip()
		}
	}
	return v.doc.value(span{uint32(at), uint32(skipValue(raw, at))})
}

// Members returns the members of an object in their order, the names with their
// escapes resolved; nothing if the value is no object.
func (v Value) Members() iter.Seq2[string, Value] {
	return func(yield func(string, Value) bool) {
		if v.Kind() != Object {
			return
		}
		w := v.walk()
		for w.next(true) {
			w.skip()
			if !yield(unquote(w.name()), v.doc.value(w.span())) {
				return
			}
		}
	}
}

// Elements returns the elements of an array in their order; nothing if the
// value is no array.
func (v Value) Elements() iter.Seq[Value] {
	return func(yield func(Value) bool) {
		if v.Kind() != Array {
			return
		}
		w := v.walk()
		for w.next(false) {
			w.skip()
			if !yield(v.doc.value(w.span())) {
				return
			}
		}
	}
}

// Text returns the text of a string, escapes resolved; false if the value is
// none.
func (v Value) Text() (string, bool) {
	if v.Kind() != String {
		return "", false
	}
	return unquote(v.Raw()), true
}

// Int returns a number that is written as an integer and fits; false for
// everything else, 1.0 and 1e3 included, since parsers do not agree on whether
// these are integers.
func (v Value) Int() (int64, bool) {
	if v.Kind() != Number {
		return 0, false
	}
	i, err := strconv.ParseInt(string(v.Raw()), 10, 64)
	return i, err == nil
}

// Bool returns a bool; ok is false if the value is none.
func (v Value) Bool() (b, ok bool) {
	return v.Kind() == Bool && v.doc.raw[v.span.start] == 't', v.Kind() == Bool
}

// Plain returns the value as encoding/json decodes it with UseNumber; nil if it does
// not exist. It reads the value once, where going down by Members and Elements reads
// what lies innermost as often as it lies deep.
func (v Value) Plain() any {
	if v.doc == nil {
		return nil
	}
	p, _ := v.doc.plain(int(v.span.start))
	return p
}

// plain also returns the end of the value that begins at i.
func (d *document) plain(i int) (any, int) {
	w := walk{raw: d.raw, pos: i + 1}
	switch d.raw[i] {
	case '{':
		o := map[string]any{}
		for w.next(true) {
			o[unquote(w.name())], w.pos = d.plain(w.value)
		}
		return o, w.pos + 1
	case '[':
		a := []any{}
		for w.next(false) {
			var e any
			e, w.pos = d.plain(w.value)
			a = append(a, e)
		}
		return a, w.pos + 1
	}
	end := skipValue(d.raw, i)
	switch text := d.raw[i:end]; text[0] {
	case '"':
		return unquote(text), end
	case 't', 'f':
		return text[0] == 't', end
	case 'n':
		return nil, end
	default:
		return json.Number(text), end
	}
}

// Size counts the values in a value, itself included, and the bytes of those that are
// strings, until there are more than enough; 0 if it does not exist. Like Plain it
// reads nothing twice.
func (v Value) Size(enough int) int {
	n := 0
	for b, i := v.Raw(), 0; i < len(b) && n <= enough; {
		switch b[i] {
		case '"':
			end := skipString(b, i)
			if next := skipSpace(b, end); next < len(b) && b[next] == ':' { // a name
				i = next + 1
				continue
			}
			n += 1 + len(unquote(b[i:end]))
			i = end
		case '{', '[':
			n++
			i++
		case '}', ']', ',', ' ', '\n', '\t', '\r':
			i++
		default:
			n++
			i = skipValue(b, i)
		}
	}
	return n
}

// Patch starts a rewrite of the whole text that the value stands in.
func (v Value) Patch() *Patch { return &Patch{doc: v.doc} }

// What follows reads texts that the scanner has accepted, and so checks
// nothing.

// walk goes through the children of an object or array.
type walk struct {
	raw   []byte
	pos   int // where to read on
	start int // of the child, its name included
	nameE int // end of its name, in objects
	value int // start of its value
	end   int // of its value, once skipped
	comma int // in front of the child; 0 for the first
}

func (v Value) walk() walk { return walk{raw: v.doc.raw, pos: int(v.span.start) + 1} }

// next goes to the beginning of the next child; it must be skipped before the
// one after it.
func (w *walk) next(object bool) bool {
	w.pos = skipSpace(w.raw, w.pos)
	switch w.raw[w.pos] {
	case '}', ']':
		return false
	case ',':
		w.comma = w.pos
		w.pos = skipSpace(w.raw, w.pos+1)
	}
	w.start, w.value = w.pos, w.pos
	if object {
		w.nameE = skipString(w.raw, w.pos)
		w.value = skipSpace(w.raw, skipSpace(w.raw, w.nameE)+1)
	}
	return true
}

func (w *walk) skip() {
	w.end = skipValue(w.raw, w.value)
	w.pos = w.end
}

func (w *walk) name() []byte { return w.raw[w.start:w.nameE] }

func (w *walk) span() span { return span{uint32(w.value), uint32(w.end)} }

func skipSpace(b []byte, i int) int {
	for i < len(b) && (b[i] == ' ' || b[i] == '\n' || b[i] == '\t' || b[i] == '\r') {
		i++
	}
	return i
}

// skipString returns the end of the string that begins at i.
func skipString(b []byte, i int) int {
	from := i + 1
	for {
		i++
		i += bytes.IndexByte(b[i:], '"')
		// A quote is escaped by an odd number of backslashes before it. No
		// backslash is counted twice, for they stand between two quotes.
		n := 0
		for i-1-n >= from && b[i-1-n] == '\\' {
			n++
		}
		if n%2 == 0 {
			return i + 1
		}
	}
}

// skipValue returns the end of the value that begins at i.
func skipValue(b []byte, i int) int {
	switch b[i] {
	case '"':
		return skipString(b, i)
	case '{', '[':
		for depth := 0; ; {
			switch b[i] {
			case '"':
				i = skipString(b, i)
				continue
			case '{', '[':
				depth++
			case '}', ']':
				if depth--; depth == 0 {
					return i + 1
				}
			}
			i++
		}
	}
	for i < len(b) {
		switch b[i] {
		case ',', '}', ']', ' ', '\n', '\t', '\r':
			return i
		}
		i++
	}
	return i
}

func nameIs(quoted []byte, name string) bool {
	if bytes.IndexByte(quoted, '\\') < 0 {
		return string(quoted[1:len(quoted)-1]) == name
	}
	return unquote(quoted) == name
}

func unquote(quoted []byte) string {
	if bytes.IndexByte(quoted, '\\') < 0 {
		return string(quoted[1 : len(quoted)-1])
	}
	text, _ := jsontext.AppendUnquote(nil, quoted)
	return string(text)
}
