package jsonrpc

import (
	"errors"
	"fmt"
)

// Why a message is refused. Each is comparable with errors.Is; the error itself
// is an [*Error] and says where.
var (
	// ErrTooLarge: more bytes than Limits.Bytes.
	ErrTooLarge = errors.New("message too large")
	// ErrSyntax: not JSON as in RFC 8259, a byte order mark in front, or
	// something behind the value.
	ErrSyntax = errors.New("invalid JSON")
	// ErrUTF8: bytes that are not UTF-8, or a \u escape that is half of a
	// surrogate pair. See scanner.text for why it is not repaired.
	ErrUTF8 = errors.New("invalid Unicode text")
	// ErrDepth: nested deeper than Limits.Depth.
	ErrDepth = errors.New("nested too deep")
	// ErrDuplicateName: an object has a name twice, escapes resolved.
	ErrDuplicateName = errors.New("duplicate name")
	// ErrCaseVariant: an object has two names that are equal but for case, or
	// the envelope has a member such as "Method" that a parser which ignores
	// case would take for one of its own.
	ErrCaseVariant = errors.New("name equal but for case")
	// ErrBatch: an array at the top. MCP removed batches in 2025-06-18, A2A
	// never had them.
	ErrBatch = errors.New("batches are not supported")
	// ErrNotJSONRPC: sound JSON that is no JSON-RPC 2.0 message.
	ErrNotJSONRPC = errors.New("not a JSON-RPC 2.0 message")
	// ErrPatch: an edit that cannot be made, see [Patch.Err].
	ErrPatch = errors.New("impossible patch")
)

// Error is what [Decode] and [Parse] return, and where.
type Error struct {
	Err     error  // one of the sentinels
	Detail  string // what exactly is wrong; may be empty
	Offset  int    // of the byte at or after which it is wrong
	Pointer string // RFC 6901, the value that was being read; "" is the whole text. Cut when long.
}

func (e *Error) Error() string {
	s := e.Err.Error()
	if e.Detail != "" {
		s += ": " + e.Detail
	}
	// Quoted, since the names in it are the sender's and may end up in a log.
	if e.Pointer != "" {
		return fmt.Sprintf("%s, at byte %d (%q)", s, e.Offset, e.Pointer)
	}
	return fmt.Sprintf("%s, at byte %d", s, e.Offset)
}

func (e *Error) Unwrap() error { return e.Err }

// Error codes.
const (
	// JSON-RPC 2.0 §5.1.
	CodeParseError     = -32700 // the bytes are no JSON
	CodeInvalidRequest = -32600 // the JSON is no request
	CodeMethodNotFound = -32601
	CodeInvalidParams  = -32602
	CodeInternalError  = -32603

	// MCP 2026-07-28, basic/index "Error Codes": -32020 to -32099 belong to
	// the specification.
	CodeHeaderMismatch                  = -32020 // a header does not say what the body says; HTTP 400
	CodeMissingRequiredClientCapability = -32021 // data.requiredCapabilities; HTTP 400
	CodeUnsupportedProtocolVersion      = -32022 // data.supported, data.requested; HTTP 400

	// MCP 2025-11-25, schema: URL_ELICITATION_REQUIRED.
	CodeURLElicitationRequired = -32042 // data.elicitations
	// MCP up to 2025-11-25, server/resources; since then it is CodeInvalidParams.
	CodeResourceNotFound = -32002
)

// Code returns the error code with which a message that Decode refused is to be
// answered: CodeParseError for what is not JSON text (RFC 8259 wants UTF-8),
// CodeInvalidRequest for everything else.
func Code(err error) int {
	if errors.Is(err, ErrSyntax) || errors.Is(err, ErrUTF8) {
		return CodeParseError
	}
	return CodeInvalidRequest
}
