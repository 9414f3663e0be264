package jsonrpc

import (
	"bytes"
	"encoding/binary"
	"hash/maphash"
	"math/bits"
	"strconv"
	"strings"
	"sync"
	"unicode"
	"unicode/utf8"

	"github.com/go-json-experiment/json/jsontext"
)

// scanner checks one JSON text in one pass, without recursion.
//
// It is written by hand, although jsontext.Decoder could do the lexing, for what
// the decoder does not give: which rule was broken (it does not tell bad UTF-8
// and lone surrogates from bad grammar), and names compared without case, for
// which each would have to be taken out, unquoted and hashed again beside it.
// All of this together costs about what that lexing alone does (BenchmarkDecode,
// BenchmarkJsontextTokens). FuzzDecode holds it to jsontext: whatever one
// accepts the other must accept, but for the rules that only we have.
type scanner struct {
	raw []byte
	pos int

	maxDepth int
	fold     bool

	frames []frame // open objects and arrays, outermost first
	names  []name  // names of the open objects, outermost first
	naming bool    // a name is being read, so the last of names is not where we are

	// many finds the names of large objects. Small ones are searched in
	// order. The hash is seeded per process, so nobody can prepare names that
	// collide.
	many map[nameKey]uint32

	key1, key2 []byte // scratch of same and hash
	members    *[memberCount]span
}

type frame struct {
	start  uint32 // of its bracket
	names  uint32 // index in scanner.names of its first name
	index  uint32 // of the element that is being read, in arrays
	object bool
	mapped bool // its names are in scanner.many
}

type name struct {
	hash uint64
	span // with the quotes
}

type nameKey struct {
	hash   uint64
	object uint32 // frame.start
}

// fewNames is up to where searching in order is quicker than a map.
const fewNames = 16

var seed = maphash.MakeSeed()

var scanners = sync.Pool{New: func() any { return new(scanner) }}

// release keeps the scanner's memory for the next text, unless a large text
// made it large: one hostile message must not be paid for by every worker.
func (s *scanner) release() {
	const manyNames, longName = 1 << 10, 1 << 12
	if cap(s.names) > 2*manyNames || cap(s.frames) > manyNames || cap(s.key1)+cap(s.key2) > 2*longName || len(s.many) > manyNames {
		return
	}
	clear(s.many)
	*s = scanner{frames: s.frames[:0], names: s.names[:0], key1: s.key1[:0], key2: s.key2[:0], many: s.many}
	scanners.Put(s)
}

// check fills the document, or says what is wrong. With members it also wants
// an object at the top and notes the members of the envelope.
func (d *document) check(raw []byte, lim Limits, members *[memberCount]span) error {
	lim = lim.withDefaults()
	if len(raw) > lim.Bytes {
		return &Error{Err: ErrTooLarge, Detail: strconv.Itoa(len(raw)) + " bytes, limit " + strconv.Itoa(lim.Bytes), Offset: lim.Bytes}
	}
	s := scanners.Get().(*scanner)
	defer s.release()
	s.raw, s.members = raw, members
	s.maxDepth, s.fold = lim.Depth, !lim.AllowCaseVariants
	root, err := s.text()
	if err != nil {
		return err
	}
	*d = document{raw: raw, root: root, lim: lim}
	return nil
}

// text reads the whole of it.
//
// Strings that are not Unicode are refused and not repaired, although RFC 8259
// §8.2 only warns of them: one parser puts U+FFFD in their place, another keeps
// the bytes, a third drops them, so the name or path that policy compares would
// not be the one that the upstream opens, and two different names may become
// one.
func (s *scanner) text() (root span, err error) {
	if bytes.HasPrefix(s.raw, []byte("\xef\xbb\xbf")) {
		return root, s.fail(ErrSyntax, "byte order mark")
	}
	s.space()
	root.start = uint32(s.pos)
	if s.members != nil && s.peek() == '[' {
		return root, s.fail(ErrBatch, "")
	}
value:
	for {
		start := s.pos
		switch c := s.peek(); c {
		case '{', '[':
			if len(s.frames) >= s.maxDepth {
				return root, s.fail(ErrDepth, "limit "+strconv.Itoa(s.maxDepth))
			}
			s.frames = append(s.frames, frame{start: uint32(start), names: uint32(len(s.names)), object: c == '{'})
			s.pos++
			s.naming = c == '{'
			s.space()
			if s.peek() == c+2 { // '}' is '{'+2, and ']' is '['+2
				s.pos++
				s.close()
				break
			}
			if c == '{' {
				if err := s.name(); err != nil {
					return root, err
				}
			}
			continue
		case '"':
			if _, err := s.string(); err != nil {
				return root, err
			}
		case 't':
			err = s.literal("true")
		case 'f':
			err = s.literal("false")
		case 'n':
			err = s.literal("null")
		case '-', '0', '1', '2', '3', '4', '5', '6', '7', '8', '9':
			err = s.number()
		default:
			err = s.unexpected("a value")
		}
		if err != nil {
			return root, err
		}

		// A value ended. So may the containers around it.
		for {
			if len(s.frames) == 0 {
				root.end = uint32(s.pos)
				s.space()
				if s.pos < len(s.raw) {
					return root, s.fail(ErrSyntax, "something behind the value")
				}
				if s.members != nil && s.raw[root.start] != '{' {
					return root, &Error{Err: ErrNotJSONRPC, Detail: "must be an object", Offset: int(root.start)}
				}
				return root, nil
			}
			f := &s.frames[len(s.frames)-1]
			if len(s.frames) == 1 && s.members != nil {
				if err := s.member(span{uint32(start), uint32(s.pos)}); err != nil {
					return root, err
				}
			}
			s.space()
			c := s.peek()
			switch {
			case c == ',':
				s.pos++
				s.space()
				f.index++
				if f.object {
					if err := s.name(); err != nil {
						return root, err
					}
				}
				continue value
			case c == '}' && f.object, c == ']' && !f.object:
				s.pos++
				start = s.close()
			case f.object:
				return root, s.unexpected("',' or '}'")
			default:
				return root, s.unexpected("',' or ']'")
			}
		}
	}
}

// close leaves the innermost object or array and returns where it began.
func (s *scanner) close() (start int) {
	f := s.frames[len(s.frames)-1]
	s.frames = s.frames[:len(s.frames)-1]
	s.names = s.names[:f.names]
	s.naming = false
	return int(f.start)
}

// member notes a member of the envelope, whose name is the last one read.
//
// A single "Params" is no duplicate of anything, but an upstream that ignores
// case would take it for params while policy saw none; so such names are
// refused here, and only here, where we know the names that count.
func (s *scanner) member(v span) error {
	n := s.names[len(s.names)-1].span
	for i, want := range memberNames {
		if int(n.end-n.start) == len(want)+2 && string(s.raw[n.start+1:n.end-1]) == want {
			s.members[i] = v
			return nil
		}
	}
	key := s.unquote(&s.key1, n)
	for i, want := range memberNames {
		if string(key) == want { // written with escapes
			s.members[i] = v
			return nil
		}
		if s.fold && len(key) <= 3*len(want) && bytes.EqualFold(key, []byte(want)) {
			s.pos = int(n.start)
			return s.fail(ErrCaseVariant, "should be "+want)
		}
	}
	return nil
}

// name reads a name, its colon and the space around, and adds it to its object.
func (s *scanner) name() error {
	s.naming = true
	if s.peek() != '"' {
		return s.unexpected("a name")
	}
	n := name{span: span{start: uint32(s.pos)}}
	escaped, err := s.string()
	if err != nil {
		return err
	}
	n.end = uint32(s.pos)
	n.hash = s.hash(n.span, escaped)

	f := &s.frames[len(s.frames)-1]
	if at, found := s.find(f, n); found {
		sentinel := ErrDuplicateName
		if s.fold && !bytes.Equal(s.unquote(&s.key1, at), s.unquote(&s.key2, n.span)) {
			sentinel = ErrCaseVariant
		}
		s.names = append(s.names, n)
		s.naming = false
		s.pos = int(n.start)
		return s.fail(sentinel, "first at byte "+strconv.Itoa(int(at.start)))
	}
	s.names = append(s.names, n)
	s.naming = false

	s.space()
	if s.peek() != ':' {
		return s.unexpected("':'")
	}
	s.pos++
	s.space()
	return nil
}

// find looks for an earlier name of the object that means the same.
func (s *scanner) find(f *frame, n name) (span, bool) {
	own := s.names[f.names:]
	if len(own) < fewNames {
		for _, o := range own {
			if o.hash == n.hash && s.same(o.span, n.span) {
				return o.span, true
			}
		}
		return span{}, false
	}
	if !f.mapped {
		f.mapped = true
		if s.many == nil {
			s.many = make(map[nameKey]uint32, 4*fewNames)
		}
		for i, o := range own {
			s.many[nameKey{o.hash, f.start}] = uint32(i)
		}
	}
	key := nameKey{n.hash, f.start}
	i, taken := s.many[key]
	if !taken {
		s.many[key] = uint32(len(own))
		return span{}, false
	}
	if o := own[i]; s.same(o.span, n.span) {
		return o.span, true
	}
	// Two names with one 64-bit hash: not to be expected before the sun goes
	// out, but a wrong answer would be worse than a slow one.
	for _, o := range own {
		if o.hash == n.hash && s.same(o.span, n.span) {
			return o.span, true
		}
	}
	return span{}, false
}

func (s *scanner) same(a, b span) bool {
	x, y := s.unquote(&s.key1, a), s.unquote(&s.key2, b)
	if s.fold {
		return bytes.EqualFold(x, y)
	}
	return bytes.Equal(x, y)
}

// unquote returns the text of a name, in the message where it can be, else in
// scratch.
func (s *scanner) unquote(scratch *[]byte, n span) []byte {
	q := s.raw[n.start:n.end]
	if bytes.IndexByte(q, '\\') < 0 {
		return q[1 : len(q)-1]
	}
	*scratch, _ = jsontext.AppendUnquote((*scratch)[:0], q)
	return *scratch
}

func (s *scanner) hash(n span, escaped bool) uint64 {
	q := s.raw[n.start+1 : n.end-1]
	if escaped {
		q = s.unquote(&s.key1, n)
	}
	if s.fold {
		q = fold(&s.key2, q)
	}
	return maphash.Bytes(seed, q)
}

// fold returns, in scratch, the smallest spelling of s under Unicode simple case
// folding. Two strings have the same one exactly if bytes.EqualFold says that
// they are equal; in particular 'K' (U+212A) is "K" and 'ſ' (U+017F) is "S".
func fold(scratch *[]byte, s []byte) []byte {
	dst := append((*scratch)[:0], s...)
	for i, c := range dst {
		if 'a' <= c && c <= 'z' {
			dst[i] = c - ('a' - 'A')
		} else if c >= utf8.RuneSelf {
			dst = foldRunes(dst[:i], s[i:])
			break
		}
	}
	*scratch = dst
	return dst
}

func foldRunes(dst, s []byte) []byte {
	for len(s) > 0 {
		r, n := utf8.DecodeRune(s)
		least := r
		for f := unicode.SimpleFold(r); f != r; f = unicode.SimpleFold(f) {
			least = min(least, f)
		}
		dst = utf8.AppendRune(dst, least)
		s = s[n:]
	}
	return dst
}

// special marks, with the top bit of each byte, the bytes of w that end a plain
// run inside a string: '"', '\\', control characters and all that is not ASCII.
// Marks above the lowest may be false, by borrow; the lowest is exact.
func special(w uint64) uint64 {
	const lows, highs = 0x0101010101010101, 0x8080808080808080
	quote := w ^ '"'*lows
	slash := w ^ '\\'*lows
	return ((quote-lows)&^quote | (slash-lows)&^slash | (w-0x20*lows)&^w | w) & highs
}

// string reads a string from its first quote.
func (s *scanner) string() (escaped bool, err error) {
	raw := s.raw
	i := s.pos + 1
	for {
		for len(raw)-i >= 8 {
			if m := special(binary.LittleEndian.Uint64(raw[i:])); m != 0 {
				i += bits.TrailingZeros64(m) / 8
				break
			}
			i += 8
		}
		if i >= len(raw) {
			s.pos = len(raw)
			return escaped, s.unexpected("the rest of a string")
		}
		switch c := raw[i]; {
		case c == '"':
			s.pos = i + 1
			return escaped, nil
		case c == '\\':
			escaped = true
			s.pos = i
			if err := s.escape(); err != nil {
				return escaped, err
			}
			i = s.pos
		case c < 0x20:
			s.pos = i
			return escaped, s.fail(ErrSyntax, "control character in a string")
		case c < utf8.RuneSelf:
			i++ // one of the last seven bytes
		default:
			r, n := utf8.DecodeRune(raw[i:])
			if r == utf8.RuneError && n == 1 {
				s.pos = i
				return escaped, s.fail(ErrUTF8, "not UTF-8")
			}
			i += n
		}
	}
}

// escape reads one escape, or the two that make a surrogate pair.
func (s *scanner) escape() error {
	rest := s.raw[s.pos:]
	if len(rest) < 2 {
		s.pos = len(s.raw)
		return s.unexpected("the rest of a string")
	}
	switch rest[1] {
	case '"', '\\', '/', 'b', 'f', 'n', 'r', 't':
		s.pos += 2
		return nil
	case 'u':
	default:
		return s.fail(ErrSyntax, "unknown escape")
	}
	r, ok := hex4(rest)
	if !ok {
		return s.fail(ErrSyntax, "unknown escape")
	}
	switch {
	case r < 0xd800 || r > 0xdfff:
		s.pos += 6
		return nil
	case r < 0xdc00:
		if low, ok := hex4(rest[6:]); ok && 0xdc00 <= low && low <= 0xdfff {
			s.pos += 12
			return nil
		}
	}
	return s.fail(ErrUTF8, "half a surrogate pair")
}

// hex4 reads \uXXXX.
func hex4(b []byte) (rune, bool) {
	if len(b) < 6 || b[0] != '\\' || b[1] != 'u' {
		return 0, false
	}
	var r rune
	for _, c := range b[2:6] {
		switch {
		case '0' <= c && c <= '9':
			c -= '0'
		case 'a' <= c && c <= 'f':
			c -= 'a' - 10
		case 'A' <= c && c <= 'F':
			c -= 'A' - 10
		default:
			return 0, false
		}
		r = r<<4 | rune(c)
	}
	return r, true
}

func (s *scanner) literal(want string) error {
	for i := range len(want) {
		if s.peek() != want[i] {
			return s.unexpected(want)
		}
		s.pos++
	}
	return nil
}

// number checks the grammar of RFC 8259 §6. The value is nobody's business
// here: 1E400 is as good as 1.
func (s *scanner) number() error {
	if s.peek() == '-' {
		s.pos++
	}
	if s.peek() == '0' {
		s.pos++
	} else if !s.digits() {
		return s.unexpected("a digit")
	}
	if s.peek() == '.' {
		s.pos++
		if !s.digits() {
			return s.unexpected("a digit")
		}
	}
	if c := s.peek(); c == 'e' || c == 'E' {
		s.pos++
		if c := s.peek(); c == '+' || c == '-' {
			s.pos++
		}
		if !s.digits() {
			return s.unexpected("a digit")
		}
	}
	return nil
}

func (s *scanner) digits() bool {
	i := s.pos
	for i < len(s.raw) && s.raw[i]-'0' < 10 {
		i++
	}
	ok := i > s.pos
	s.pos = i
	return ok
}

func (s *scanner) space() { s.pos = skipSpace(s.raw, s.pos) }

// peek returns the byte that is due, 0 at the end. A NUL in the text is no part
// of any JSON outside strings, so the two need not be told apart.
func (s *scanner) peek() byte {
	if s.pos < len(s.raw) {
		return s.raw[s.pos]
	}
	return 0
}

func (s *scanner) unexpected(want string) error {
	if s.pos >= len(s.raw) {
		return s.fail(ErrSyntax, "the text ends where "+want+" should be")
	}
	return s.fail(ErrSyntax, strconv.Quote(string(s.raw[s.pos:s.pos+1]))+" where "+want+" should be")
}

// fail is the error for where the scanner stands.
func (s *scanner) fail(sentinel error, detail string) error {
	return &Error{Err: sentinel, Detail: detail, Offset: s.pos, Pointer: s.pointer()}
}

// longestPointer keeps errors short, whatever the names.
const longestPointer = 200

func (s *scanner) pointer() string {
	var b strings.Builder
	for i, f := range s.frames {
		last := i == len(s.frames)-1
		if b.Len() > longestPointer {
			break
		}
		if !f.object {
			b.WriteString("/" + strconv.Itoa(int(f.index)))
			continue
		}
		end := len(s.names)
		if !last {
			end = int(s.frames[i+1].names)
		}
		if last && s.naming || end == int(f.names) {
			break
		}
		key := s.unquote(&s.key1, s.names[end-1].span)
		key = key[:min(len(key), longestPointer)]
		b.WriteString("/" + pointerEscapes.Replace(string(key)))
	}
	p := b.String()
	if len(p) > longestPointer {
		p = strings.ToValidUTF8(p[:longestPointer], "") + "…"
	}
	return p
}

var pointerEscapes = strings.NewReplacer("~", "~0", "/", "~1")
