package dispatch

import (
	"bytes"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"unicode/utf16"
	"unicode/utf8"

	"waybill.dev/schemas/jsonrpc"
)

// Here the strings of a message are looked through, names of members included.
// First all of them together are read into one text ([reading]), which is all that
// happens to most messages. Only where something may be found are they gone through
// one by one ([rewrite]), and only the strings in which it was are written anew,
// what is left of them as it was, escapes included.

// class is a set of classes of characters.
type class uint8

const (
	classANSI class = 1 << iota
	classControl
	classBidi
	classTags
	classInvisible
)

// classes are those that the rules look for.
func (a Answers) classes() (all class) {
	for c := classANSI; c <= classInvisible; c <<= 1 {
		if a.action(c) != Allow {
			all |= c
		}
	}
	return all
}

func (a Answers) action(c class) Action {
	switch c {
	case classANSI:
		return a.ANSI
	case classControl:
		return a.Control
	case classBidi:
		return a.Bidi
	case classTags:
		return a.Tags
	}
	return a.Invisible
}

func (c class) String() string {
	switch c {
	case classANSI:
		return "ansi"
	case classControl:
		return "control"
	case classBidi:
		return "bidi"
	case classTags:
		return "tags"
	}
	return "invisible"
}

// suspects are the bytes with which a character of a class may begin. No other byte
// of a character is one of them.
var suspects = func() (is [256]bool) {
	for c := range 0x20 {
		is[c] = c != '\t' && c != '\n' && c != '\r'
	}
	for _, c := range []byte{0x7f, 0xc2, 0xcd, 0xd8, 0xe1, 0xe2, 0xe3, 0xef, 0xf3} {
		is[c] = true
	}
	return is
}()

// classAt tells of what class the character is that begins at i, and how much of
// the text belongs to it: a terminal's escape is one with its parameters. The class
// is 0 for what is fit to be read. selected says that the character before selects a
// variant.
func classAt(text []byte, i int, selected bool) (c class, n int) {
	r, n := utf8.DecodeRune(text[i:])
	switch {
	case r == 0x1b, r == 0x90, r == 0x98, r == 0x9b, r >= 0x9d && r <= 0x9f:
		return classANSI, escapeAt(text, i, r, n)
	case r == '\t', r == '\n', r == '\r':
	case r < 0x20, r >= 0x7f && r < 0xa0:
		return classControl, n
	case r >= 0x202a && r <= 0x202e, r >= 0x2066 && r <= 0x2069:
		return classBidi, n
	case r >= 0xe0000 && r <= 0xe007f:
		if f := flagAt(text, i); f > 0 {
			return 0, f
		}
		return classTags, n
	case selects(r):
		if selected {
			return classTags, n
		}
	case r == 0xad, r == 0x34f, r == 0x61c, r == 0x115f, r == 0x1160, r == 0x180e, r >= 0x200b && r <= 0x200f,
		r >= 0x2060 && r <= 0x2064, r >= 0x206a && r <= 0x206f, r == 0x3164, r == 0xfeff, r >= 0xfff9 && r <= 0xfffb:
		return classInvisible, n
	}
	return 0, n
}

// selects tells whether a character selects a variant of the one before. One does;
// a row of them is a way to write what nobody sees.
func selects(r rune) bool { return r >= 0xfe00 && r <= 0xfe0f || r >= 0xe0100 && r <= 0xe01ef }

// maxEscape bounds the text that belongs to one escape: more is not part of it.
const maxEscape = 4096

// escapeAt is the length of a terminal's escape (ECMA-48) that begins at i with r,
// which has n bytes: with the parameters of a control sequence, or the text of a
// command up to its end. Of one that does not end it is only how it begins, without
// which the rest is mere text.
func escapeAt(text []byte, i int, r rune, n int) int {
	at := i + n
	kind := r
	if r == 0x1b {
		if at == len(text) {
			return n
		}
		switch c := text[at]; {
		case c == '[':
			kind, at = 0x9b, at+1
		case c == 'P' || c == 'X' || c == ']' || c == '^' || c == '_':
			kind, at = rune(c)+0x40, at+1
		default: // intermediates and a final byte
			for at < len(text) && text[at] >= 0x20 && text[at] <= 0x2f {
				at++
			}
			if at < len(text) && text[at] >= 0x30 && text[at] <= 0x7e {
				return at + 1 - i
			}
			return n
		}
	}
	begun := at - i
	if kind == 0x9b {
		for at < len(text) && text[at] >= 0x20 && text[at] <= 0x3f {
			at++
		}
		if at < len(text) && text[at] >= 0x40 && text[at] <= 0x7e {
			return at + 1 - i
		}
		return begun
	}
	for j, end := at, min(len(text), at+maxEscape); j < end; j++ {
		switch {
		case text[j] == 0x07:
			return j + 1 - i
		case text[j] == 0xc2 && j+1 < end && text[j+1] == 0x9c:
			return j + 2 - i
		case text[j] == 0xc2 && j+1 < end && text[j+1] >= 0x90 && text[j+1] <= 0x9f:
			return begun // another one begins
		case text[j] == 0x1b:
			if j+1 < end && text[j+1] == '\\' {
				return j + 2 - i
			}
			return begun
		}
	}
	return begun
}

// flags are the ends of the flags that are written in tag characters, after a black
// flag: England, Scotland, Wales. There are no others in use.
var flags = func() (all [][]byte) {
	for _, of := range []string{"gbeng", "gbsct", "gbwls"} {
		var b []byte
		for _, c := range of {
			b = utf8.AppendRune(b, 0xe0000+c)
		}
		all = append(all, utf8.AppendRune(b, 0xe007f))
	}
	return all
}()

// flagAt is the length of the rest of a flag that is written from i on, or 0.
func flagAt(text []byte, i int) int {
	const black = "🏴"
	if !bytes.HasSuffix(text[:i], []byte(black)) {
		return 0
	}
	for _, f := range flags {
		if bytes.HasPrefix(text[i:], f) {
			return len(f)
		}
	}
	return 0
}

// characters finds what is not fit to be read in a text.
func (a Answers) characters(text []byte, cuts []cut) []cut {
	selected := false
	for i := 0; i < len(text); {
		if !suspects[text[i]] {
			selected = false
			i++
			continue
		}
		c, n := classAt(text, i, selected)
		switch act := a.action(c); {
		case c == 0:
			r, _ := utf8.DecodeRune(text[i:])
			selected = selects(r)
		case act == Allow:
			selected = selected && c == classTags
		default:
			cuts = append(cuts, cut{from: i, to: i + n, rule: c.String(), did: act})
		}
		i += n
	}
	return cuts
}

// finder is [Answers.characters], wherever the text stands.
func (a Answers) finder(_ string, text []byte, cuts []cut) ([]cut, error) {
	return a.characters(text, cuts), nil
}

// reading is the text of all strings of a message, one on a line.
type reading struct{ text []byte }

// maxKept is how large a text may be whose room is kept for the next.
const maxKept = 1 << 20

// errDepth: a message is nested too deep.
var errDepth = errors.New("it is nested too deep")

// errJSON: a message is not JSON. It was read by others before, so this is rare.
var errJSON = errors.New("it is not JSON")

// read reads the strings of a message, whose nesting is bounded.
func (t *reading) read(raw []byte, depth int) error {
	if cap(t.text) > maxKept {
		t.text = nil
	}
	t.text = t.text[:0]
	return t.more(raw, depth, 0)
}

// maxQuoted is how often JSON may be quoted in a string of JSON and is still looked
// into: a tool's answer often is a text that is JSON.
const maxQuoted = 3

// quotes tells whether a text may be JSON that has escapes of its own, in which
// something may stand that is not seen in the text itself.
func quotes(text []byte) bool {
	at := bytes.TrimLeft(text, " \t\r\n")
	return len(at) > 1 && (at[0] == '{' || at[0] == '[') && bytes.IndexByte(at, '\\') >= 0
}

// more reads on, in JSON that is quoted as often as quoted says.
func (t *reading) more(raw []byte, depth, quoted int) error {
	deep := 0
	for i := 0; i < len(raw); i++ {
		switch raw[i] {
		case '{', '[':
			if deep++; deep > depth {
				return fmt.Errorf("%w: more than %d levels", errDepth, depth)
			}
		case '}', ']':
			deep--
		case '"':
			end, plain := stringEnd(raw, i)
			if end < 0 {
				return errJSON
			}
			begin := len(t.text)
			if plain {
				t.text = append(t.text, raw[i+1:end-1]...)
			} else {
				var ok bool
				if t.text, ok = appendText(t.text, raw[i+1:end-1]); !ok {
					return errJSON
				}
			}
			inner := t.text[begin:]
			if names(raw[end:]) {
				t.text = append(t.text, called...) // as find reads a value
			} else {
				t.text = append(t.text, '\n')
			}
			if quoted < maxQuoted && quotes(inner) {
				_ = t.more(inner, len(inner), quoted+1) // what is no JSON has been read as the text that it is
			}
			i = end - 1
		}
	}
	return nil
}

// called stands between the name of a member and its value where both are read as one
// text: what some secrets are is only said by what they are called.
const called = ": "

// names tells whether a string of JSON is the name of a member, by what follows it.
func names(rest []byte) bool {
	rest = bytes.TrimLeft(rest, " \t\r\n")
	return len(rest) > 0 && rest[0] == ':'
}

// classes are those of which characters are in the text.
func (t *reading) classes() (all class) {
	selected := false
	for i := 0; i < len(t.text); {
		if !suspects[t.text[i]] {
			selected = false
			i++
			continue
		}
		c, n := classAt(t.text, i, selected)
		if all |= c; c == 0 {
			r, _ := utf8.DecodeRune(t.text[i:])
			selected = selects(r)
		}
		i += n
	}
	return all
}

// stringEnd is the end of the JSON string that begins at i, or -1; plain says that
// it has no escapes.
func stringEnd(raw []byte, i int) (end int, plain bool) {
	plain = true
	for at := i + 1; ; {
		n := bytes.IndexByte(raw[at:], '"')
		if n < 0 {
			return -1, false
		}
		if plain = plain && bytes.IndexByte(raw[at:at+n], '\\') < 0; plain {
			return at + n + 1, true
		}
		// A quote counts if an even number of backslashes stands before it.
		slashes := 0
		for j := at + n - 1; j > i && raw[j] == '\\'; j-- {
			slashes++
		}
		if at += n + 1; slashes%2 == 0 {
			return at, false
		}
	}
}

// appendText appends what stands between the quotes of a JSON string; ok is false if
// that cannot be.
func appendText(dst, inside []byte) (_ []byte, ok bool) {
	for {
		n := bytes.IndexByte(inside, '\\')
		if n < 0 {
			return append(dst, inside...), true
		}
		dst = append(dst, inside[:n]...)
		var size int
		if dst, size = appendUnit(dst, inside, n); size == 0 {
			return dst, false
		}
		inside = inside[n+size:]
	}
}

// appendUnit appends what the byte or escape at i of a JSON string stands for; size
// is how long it is, 0 if it is neither. Half a pair of surrogates stands for
// nothing that could be written, and is read as U+FFFD.
func appendUnit(dst, raw []byte, i int) (_ []byte, size int) {
	c := raw[i]
	if c != '\\' {
		return append(dst, c), 1
	}
	if i+1 >= len(raw) {
		return dst, 0
	}
	switch c = raw[i+1]; c {
	case '"', '\\', '/':
		return append(dst, c), 2
	case 'b':
		return append(dst, '\b'), 2
	case 'f':
		return append(dst, '\f'), 2
	case 'n':
		return append(dst, '\n'), 2
	case 'r':
		return append(dst, '\r'), 2
	case 't':
		return append(dst, '\t'), 2
	case 'u':
		r, ok := hex4(raw, i+2)
		if !ok {
			return dst, 0
		}
		if utf16.IsSurrogate(r) {
			if i+7 < len(raw) && raw[i+6] == '\\' && raw[i+7] == 'u' {
				if low, ok := hex4(raw, i+8); ok {
					if both := utf16.DecodeRune(r, low); both != utf8.RuneError {
						return utf8.AppendRune(dst, both), 12
					}
				}
			}
			r = utf8.RuneError
		}
		return utf8.AppendRune(dst, r), 6
	}
	return dst, 0
}

func hex4(raw []byte, i int) (r rune, ok bool) {
	if i+4 > len(raw) {
		return 0, false
	}
	n, err := strconv.ParseUint(string(raw[i:i+4]), 16, 16)
	return rune(n), err == nil
}

// cut is a part of a text that a rule has found. Those of one text are in order
// and do not overlap.
type cut struct {
	from, to int
	rule     string
	did      Action
	instead  string // of plain ASCII; where it is redacted
}

// opaque are the members that are no text but tokens of the protocol: what a server
// gives out to have it brought back. Nor are a message's id and its method a text.
var opaque = map[string]bool{
	"/jsonrpc": true, "/id": true, "/method": true,
	"/result/requestState": true, "/result/nextCursor": true, "/result/taskId": true, "/result/task/taskId": true,
	"/params/requestState": true, "/params/progressToken": true, "/params/taskId": true, "/params/requestId": true,
}

// level is an object or array that has begun.
type level struct {
	object bool
	value  bool   // of an object: the next is a value
	name   string // of an object: of the member
	index  int    // of an array
}

// finder finds what is to be taken out of a text, which is the value of a member of
// this name, or not of a member's own: "".
type finder func(member string, text []byte, cuts []cut) ([]cut, error)

// rewrite has every string of a message looked through by find, takes out what it
// finds, and counts it. The error is that of find, or says that a rule rejects the
// message.
func rewrite(raw []byte, found *findings, find finder) ([]byte, error) {
	out, err := rewriteIn(raw, "", 0, found, find)
	if err == nil {
		err = found.rejected()
	}
	return out, err
}

// rewriteIn is rewrite of JSON that is quoted as often as quoted says, in the string
// at within, and does not yet look whether something is to be rejected.
func rewriteIn(raw []byte, within string, quoted int, found *findings, find finder) ([]byte, error) {
	var out []byte // nil: nothing was taken out so far
	var levels []level
	var text []byte
	var cuts []cut
	copied, named := 0, false
	next := func() {
		if n := len(levels); n > 0 && !levels[n-1].object {
			levels[n-1].index++
		}
	}
	for i := 0; i < len(raw); i++ {
		n := len(levels)
		switch raw[i] {
		case '{', '[':
			levels = append(levels, level{object: raw[i] == '{'})
		case '}', ']':
			if n == 0 {
				return nil, errJSON
			}
			levels = levels[:n-1]
		case ':':
			if n > 0 {
				levels[n-1].value = true
			}
		case ',':
			if n > 0 {
				levels[n-1].value = false
			}
			next()
		case '"':
			end, _ := stringEnd(raw, i)
			if end < 0 {
				return nil, errJSON
			}
			var ok bool
			if text, ok = appendText(text[:0], raw[i+1:end-1]); !ok {
				return nil, errJSON
			}
			name := n > 0 && levels[n-1].object && !levels[n-1].value
			if !name && quoted < maxQuoted && quotes(text) && valid(text) && !opaque[pointer(levels)] {
				where := within
				if quoted == 0 {
					where = pointer(levels)
				}
				inner, err := rewriteIn(bytes.Clone(text), where, quoted+1, found, find)
				if err != nil {
					return nil, err
				}
				if !bytes.Equal(inner, text) {
					out = append(append(out, raw[copied:i]...), jsonrpc.Quote(string(inner))...)
					copied = end
				}
				i = end - 1
				continue
			}
			member := ""
			if !name && n > 0 && levels[n-1].object {
				member = levels[n-1].name
			}
			var err error
			if cuts, err = find(member, text, cuts[:0]); err != nil {
				return nil, err
			}
			left := text
			if len(cuts) > 0 {
				left = without(text, cuts)
			}
			if name {
				levels[n-1].name = string(left)
			}
			if len(cuts) == 0 {
				i = end - 1
				continue
			}
			at := pointer(levels)
			if quoted > 0 {
				at = within
			} else if opaque[at] && !name {
				i = end - 1
				continue
			}
			takes := false
			for _, c := range cuts {
				found.add(c.rule, c.did, brief(at))
				takes = takes || c.did == Strip || c.did == Redact
			}
			if takes {
				named = named || name
				if out == nil {
					out = make([]byte, 0, len(raw)+64)
				}
				out = append(out, raw[copied:i]...)
				out = appendWithout(out, raw[i:end], cuts)
				copied = end
			}
			i = end - 1
		}
	}
	if out == nil {
		return raw, nil
	}
	out = append(out, raw[copied:]...)
	if named && !valid(out) {
		// Names that differed only by what nobody sees are one now.
		return nil, errors.New("two names are one without what nobody sees, or what is secret")
	}
	return out, nil
}

// valid tells whether a text is JSON that everybody reads alike.
func valid(text []byte) bool {
	_, err := jsonrpc.Parse(text, jsonrpc.Limits{Bytes: max(len(text), 1), Depth: answerDepth, AllowCaseVariants: true})
	return err == nil
}

// without is a name as a pointer may have it, without what was found in it, which
// may have been only reported.
func without(text []byte, cuts []cut) []byte {
	var left []byte
	at := 0
	for _, c := range cuts {
		left = append(append(left, text[at:c.from]...), c.instead...)
		at = c.to
	}
	return append(left, text[at:]...)
}

// appendWithout appends a JSON string without what was cut of its text, and all else
// as it was written.
func appendWithout(dst, quoted []byte, cuts []cut) []byte {
	dst = append(dst, '"')
	inside := quoted[:len(quoted)-1]
	var unit []byte
	for i, at := 1, 0; i < len(inside); {
		var size int
		unit, size = appendUnit(unit[:0], inside, i)
		for len(cuts) > 0 && (at >= cuts[0].to || cuts[0].did != Strip && cuts[0].did != Redact) {
			cuts = cuts[1:]
		}
		switch {
		case len(cuts) == 0 || at < cuts[0].from:
			dst = append(dst, inside[i:i+size]...)
		case at == cuts[0].from:
			dst = append(dst, cuts[0].instead...)
		}
		at += len(unit)
		i += size
	}
	return append(dst, '"')
}

// pointer is the JSON pointer of where a walk stands: of the member whose name it
// has just read, or of the value.
func pointer(levels []level) string {
	var b strings.Builder
	for _, l := range levels {
		b.WriteByte('/')
		if l.object {
			b.WriteString(token(l.name))
		} else {
			b.WriteString(strconv.Itoa(l.index))
		}
	}
	return b.String()
}

// token is a name as a part of a JSON pointer.
func token(name string) string {
	return strings.NewReplacer("~", "~0", "/", "~1").Replace(name)
}

// brief is a pointer as an event may have it: short, of what can be seen.
func brief(pointer string) string {
	return clip(strings.Map(func(r rune) rune {
		if !strconv.IsPrint(r) {
			return '?'
		}
		return r
	}, pointer), maxPointer)
}
