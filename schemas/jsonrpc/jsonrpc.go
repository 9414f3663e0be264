// Package jsonrpc is the JSON-RPC 2.0 envelope of the gateway: it checks a
// message strictly, says where its parts stand, and leaves every byte as it
// came.
//
// A gateway decides on what it reads and forwards what it received. The two
// must be one thing: if an upstream could read the same bytes differently
// (another of two duplicate members, a key that differs by case, a broken
// string repaired in another way), a policy would have judged a call that is
// not the one carried out. So [Decode] accepts only messages that every
// sensible parser reads alike, and nothing here ever re-encodes: numbers stay
// digits, unknown members stay in place, and a [Patch] replaces the members
// that it names and copies the rest.
//
// Begin with [Decode]; read with [Message.Method], [Message.Params] and
// [Value.Get]; rewrite with [Message.Patch]; answer with [ErrorResponse] and
// [ResultResponse]. [Parse] applies the same strictness to JSON that is no
// JSON-RPC message, such as the body of a REST call.
package jsonrpc

import "math"

// Defaults of [Limits].
const (
	DefaultBytes = 4 << 20
	DefaultDepth = 64
)

// Limits bound what [Decode] accepts. The zero value means the defaults.
type Limits struct {
	// Bytes is the largest message, white space included. Zero or less means
	// DefaultBytes; nothing beyond 2 GiB is ever accepted.
	Bytes int

	// Depth is the deepest nesting of objects and arrays; the message itself
	// is the first level. Zero or less means DefaultDepth.
	Depth int

	// AllowCaseVariants accepts objects with names that are equal but for
	// case. Policy decides on requests, so a request is never decoded with
	// it. Answers are decided on less than they are carried: a tool may
	// rightly return a map of words. Even then names that are exactly equal
	// are rejected.
	AllowCaseVariants bool
}

func (l Limits) withDefaults() Limits {
	if l.Bytes <= 0 {
		l.Bytes = DefaultBytes
	}
	l.Bytes = min(l.Bytes, math.MaxInt32)
	if l.Depth <= 0 {
		l.Depth = DefaultDepth
	}
	return l
}

// A document is a checked JSON text. Values and patches point to it.
type document struct {
	raw  []byte
	root span
	lim  Limits
}

// A span is a piece of a document; the zero span stands for "not there", since
// no member of an object begins at byte 0.
type span struct{ start, end uint32 }

func (s span) exists() bool { return s.end != 0 }

// The members of the envelope, in the order of Message.members.
const (
	memberVersion = iota
	memberID
	memberMethod
	memberParams
	memberResult
	memberError
	memberCount
)

var memberNames = [memberCount]string{"jsonrpc", "id", "method", "params", "result", "error"}

// Message is one decoded JSON-RPC message. It is immutable and may be read by
// many goroutines at once.
type Message struct {
	doc     document
	members [memberCount]span
	method  string
}

// Decode checks raw and locates its members.
//
// The message keeps raw, without a copy: the caller must not change it
// afterwards. Decode itself and everything that is reached from the message
// never change it.
//
// Whatever the size of the input, the time is proportional to it and the stack
// is bounded. The error is always an [*Error], which says where the fault is,
// and wraps one of the sentinels of this package: ErrTooLarge, ErrSyntax,
// ErrUTF8, ErrDepth, ErrDuplicateName, ErrCaseVariant, ErrBatch or
// ErrNotJSONRPC.
func Decode(raw []byte, lim Limits) (*Message, error) {
	m := &Message{}
	if err := m.doc.check(raw, lim, &m.members); err != nil {
		return nil, err
	}
	if err := m.checkEnvelope(); err != nil {
		return nil, err
	}
	return m, nil
}

// Parse checks any JSON text as strictly as [Decode] does, but for the
// envelope, and returns its value. An array is welcome at the top. Errors and
// ownership of raw are those of Decode.
func Parse(raw []byte, lim Limits) (Value, error) {
	d := &document{}
	if err := d.check(raw, lim, nil); err != nil {
		return Value{}, err
	}
	return d.value(d.root), nil
}

// checkEnvelope applies JSON-RPC 2.0 §4, §5 and what MCP adds to them
// (basic/index: an id is a string or a number, and never null in a request).
func (m *Message) checkEnvelope() error {
	kind := func(i int) Kind { return m.value(i).Kind() }
	wrong := func(i int, detail string) error {
		s := m.members[i]
		if !s.exists() {
			s = m.doc.root
		}
		return &Error{Err: ErrNotJSONRPC, Detail: detail, Offset: int(s.start), Pointer: "/" + memberNames[i]}
	}

	// Compared as bytes: an escaped "2\u002e0" is the same string, but nobody
	// honest sends it, and not every scanner in front of us would see it.
	if string(m.value(memberVersion).Raw()) != `"2.0"` {
		return wrong(memberVersion, `must be "2.0"`)
	}

	hasMethod := m.members[memberMethod].exists()
	hasResult := m.members[memberResult].exists()
	hasError := m.members[memberError].exists()
	switch {
	case hasMethod && hasResult:
		return wrong(memberResult, "stands beside method")
	case hasMethod && hasError:
		return wrong(memberError, "stands beside method")
	case hasResult && hasError:
		return wrong(memberError, "stands beside result")
	case !hasMethod && !hasResult && !hasError:
		return wrong(memberMethod, "missing, and no result or error either")
	}

	if hasMethod {
		text, ok := m.value(memberMethod).Text()
		if !ok {
			return wrong(memberMethod, "must be a string")
		}
		m.method = text
	}
	switch kind(memberID) {
	case String, Number:
	case Null:
		if hasMethod {
			return wrong(memberID, "must not be null in a request")
		}
	case None:
		if hasResult {
			return wrong(memberID, "missing in a result")
		}
	default:
		return wrong(memberID, "must be a string or a number")
	}
	switch kind(memberParams) {
	case None, Object, Array:
	default:
		return wrong(memberParams, "must be an object or an array")
	}
	if hasError && kind(memberError) != Object {
		return wrong(memberError, "must be an object")
	}
	return nil
}

// Raw returns the message as it came. It must not be modified.
func (m *Message) Raw() []byte { return m.doc.raw[:len(m.doc.raw):len(m.doc.raw)] }

// IsRequest reports whether the message asks for an answer: method and id.
func (m *Message) IsRequest() bool {
	return m.members[memberMethod].exists() && m.members[memberID].exists()
}

// IsNotification reports whether the message has a method and no id.
func (m *Message) IsNotification() bool {
	return m.members[memberMethod].exists() && !m.members[memberID].exists()
}

// IsResponse reports whether the message has a result or an error; it never
// has both.
//
// A result always has an id. The id of an error may be null (JSON-RPC 2.0 §5:
// the request's id could not be read) or absent, as the MCP schema 2026-07-28
// allows (JSONRPCErrorResponse); neither answers a request in particular.
func (m *Message) IsResponse() bool { return !m.members[memberMethod].exists() }

// ID returns the id as it came ("1.5", "9007199254740993" and "\"7\"" stay
// what they are), or the zero Value. Ids are compared as bytes: an upstream
// that answers 1.0 to 1 has answered another request.
func (m *Message) ID() Value { return m.value(memberID) }

// Method returns the method, "" in a response.
func (m *Message) Method() string { return m.method }

// Params returns the params, an object or an array, or the zero Value.
func (m *Message) Params() Value { return m.value(memberParams) }

// Result returns the result, which may be any kind of value (null too), or the
// zero Value.
func (m *Message) Result() Value { return m.value(memberResult) }

// Error returns the error object or the zero Value.
func (m *Message) Error() Value { return m.value(memberError) }

// ErrorCode returns the code of the error object. It is false in messages that
// are no error, and where the code is no integer.
func (m *Message) ErrorCode() (int, bool) {
	code, ok := m.Error().Get("code").Int()
	return int(code), ok
}

// Root returns the whole message as a value, without surrounding white space.
func (m *Message) Root() Value { return m.doc.value(m.doc.root) }

// Patch starts a rewrite of the message.
func (m *Message) Patch() *Patch { return &Patch{doc: &m.doc} }

func (m *Message) value(i int) Value { return m.doc.value(m.members[i]) }
