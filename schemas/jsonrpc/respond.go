package jsonrpc

import (
	"strconv"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"
)

// Quote returns s as a JSON string. Bytes that are not UTF-8 become U+FFFD.
func Quote(s string) []byte { return appendQuote(make([]byte, 0, len(s)+2), s) }

func appendQuote(dst []byte, s string) []byte {
	dst, _ = jsontext.AppendQuote(dst, s) // the error only says that something was replaced
	return dst
}

// ErrorResponse returns an error answer. The id is given as its bytes, as
// [Message.ID] keeps them; nil means null, for requests whose id is not known.
//
// The data may be nil for none, a []byte or jsontext.Value that is JSON already
// and goes in as it is, or anything that marshals to JSON, with map keys in
// order so that the same answer always has the same bytes. Data that cannot be
// marshalled is left out: the error itself must get through.
func ErrorResponse(id []byte, code int, message string, data any) []byte {
	dst := appendHead(make([]byte, 0, 96+len(id)+len(message)), id)
	dst = append(dst, `"error":{"code":`...)
	dst = strconv.AppendInt(dst, int64(code), 10)
	dst = append(dst, `,"message":`...)
	dst = appendQuote(dst, message)
	if raw := marshalData(data); len(raw) > 0 {
		dst = append(dst, `,"data":`...)
		dst = append(dst, raw...)
	}
	return append(dst, "}}"...)
}

// ResultResponse returns an answer with the given result, which must be JSON and
// goes in as it is; nil means an empty object, the empty result of MCP.
func ResultResponse(id []byte, result []byte) []byte {
	dst := appendHead(make([]byte, 0, 40+len(id)+len(result)), id)
	dst = append(dst, `"result":`...)
	if len(result) == 0 {
		result = []byte("{}")
	}
	dst = append(dst, result...)
	return append(dst, '}')
}

func appendHead(dst, id []byte) []byte {
	if len(id) == 0 {
		id = []byte("null")
	}
	dst = append(dst, `{"jsonrpc":"2.0","id":`...)
	dst = append(dst, id...)
	return append(dst, ',')
}

func marshalData(data any) []byte {
	switch d := data.(type) {
	case nil:
		return nil
	case []byte:
		return d
	case jsontext.Value:
		return d
	}
	raw, err := json.Marshal(data, json.Deterministic(true))
	if err != nil {
		return nil
	}
	return raw
}
