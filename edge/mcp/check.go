package mcp

import (
	"encoding/base64"
	"fmt"
	"net/http"
	"strings"
	"unicode/utf8"

	"waybill.dev/schemas"
	"waybill.dev/schemas/jsonrpc"
)

// Members of _meta (2026-07-28, basic/index, "_meta").
const (
	metaVersion      = "io.modelcontextprotocol/protocolVersion"
	metaCapabilities = "io.modelcontextprotocol/clientCapabilities"
	metaClient       = "io.modelcontextprotocol/clientInfo"
	metaSubscription = "io.modelcontextprotocol/subscriptionId"
	metaSession      = "dev.waybill/session"
)

// nameMember says which member of a method's params is mirrored in Mcp-Name
// (streamable HTTP, "Standard Request Headers"; the tasks extension for the
// last three). It is the name that a call has in events, too.
var nameMember = map[string]string{
	"tools/call":     "name",
	"prompts/get":    "name",
	"resources/read": "uri",
	"tasks/get":      "taskId",
	"tasks/update":   "taskId",
	"tasks/cancel":   "taskId",
}

// request is a message that may go on, and its _meta.
type request struct {
	schemas.Requested
	meta meta
}

// meta is what the adapter reads of a message's _meta.
type meta struct {
	version, capabilities, client, session, traceparent, tracestate jsonrpc.Value
}

func readMeta(v jsonrpc.Value) (m meta) {
	for name, v := range v.Members() {
		switch name {
		case metaVersion:
			m.version = v
		case metaCapabilities:
			m.capabilities = v
		case metaClient:
			m.client = v
		case metaSession:
			m.session = v
		case "traceparent":
			m.traceparent = v
		case "tracestate":
			m.tracestate = v
		}
	}
	return m
}

// check holds the headers against the body, for a front that routes by the one
// and a server that acts on the other must not be told different things
// (streamable HTTP, "Server Validation").
//
// The order is that of the conformance suite: is it said twice, is it of this
// era, does _meta name a version, is it that of the header, is it served, and
// then the rest.
func check(m *jsonrpc.Message, h http.Header) (req request, bad *reply) {
	method := m.Method()
	params := m.Params()
	req.Protocol, req.Method, req.Revision = Protocol, method, Revision
	req.meta = readMeta(params.Get("_meta"))
	for _, name := range []string{headerVersion, headerMethod, headerName} {
		if _, bad = header(h, name); bad != nil {
			return req, bad
		}
	}
	if bad = checkVersion(m, h, req.meta); bad != nil {
		return req, bad
	}
	if m.IsRequest() && req.meta.capabilities.Kind() != jsonrpc.Object {
		return req, invalid("missing or invalid _meta field %q", metaCapabilities)
	}
	if v, _ := header(h, headerMethod); v != method && (m.IsRequest() || v != "") {
		return req, disagrees("Mcp-Method", v, method)
	}
	if member := nameMember[method]; member != "" {
		req.Name, _ = params.Get(member).Text()
		if m.IsRequest() {
			v, _ := header(h, headerName)
			if text, ok := decodeValue(v); !ok {
				return req, mismatch("Mcp-Name header value %q is not valid base64 of UTF-8", v)
			} else if text == "" || text != req.Name {
				return req, disagrees("Mcp-Name", v, req.Name)
			}
		}
	}
	req.Headers, bad = paramHeaders(h)
	return req, bad
}

// checkVersion finds out whether the message is of the revision that is served.
// Requests must say so twice; of notifications the revision asks only for the
// header.
func checkVersion(m *jsonrpc.Message, h http.Header, meta meta) *reply {
	inHeader, _ := header(h, headerVersion)
	inBody, ok := meta.version.Text()
	switch {
	case !ok && inHeader != "" && inHeader < Revision:
		return unsupported(inHeader)
	case inHeader == "":
		return mismatch("MCP-Protocol-Version header is missing: this gateway serves %s", Revision)
	case m.IsRequest() && !ok:
		return invalid("missing or invalid _meta field %q", metaVersion)
	case ok && inHeader != inBody:
		return disagrees("MCP-Protocol-Version", inHeader, inBody)
	case inHeader != Revision:
		return unsupported(inHeader)
	}
	return nil
}

// As [http.Header] spells them.
const (
	headerVersion = "Mcp-Protocol-Version"
	headerMethod  = "Mcp-Method"
	headerName    = "Mcp-Name"
	paramPrefix   = "Mcp-Param-"
)

// header returns the one value of a header. It refuses a second one, of which
// somebody on the way may read the other, and characters that no header may
// have (RFC 9110 §5.5, without obs-text).
func header(h http.Header, name string) (string, *reply) {
	values := h[name]
	if len(values) == 0 {
		return "", nil
	}
	if len(values) > 1 {
		return "", mismatch("%s header is there %d times", name, len(values))
	}
	if !visible(values[0]) {
		return "", mismatch("%s header contains invalid characters: use the =?base64?…?= form", name)
	}
	return values[0], nil
}

func visible(s string) bool {
	for i := range len(s) {
		if (s[i] < ' ' || s[i] > '~') && s[i] != '\t' {
			return false
		}
	}
	return true
}

// Bounds of the Mcp-Param-* headers of one request, which go into the envelope
// of its event as the name does (see [maxName]).
const (
	maxParams     = 64
	maxParamBytes = 8 << 10
)

// paramHeaders takes along all Mcp-Param-* headers, known or not, as they are.
// Whether they agree with the arguments only the upstream can tell: the
// gateway has no schema of the tool at hand, and must not invent what a client
// left out (streamable HTTP, "Server Behavior for Custom Headers").
func paramHeaders(h http.Header) (map[string]string, *reply) {
	var out map[string]string
	size := 0
	for name := range h {
		if !strings.HasPrefix(name, paramPrefix) {
			continue
		}
		v, bad := header(h, name)
		if bad != nil {
			return nil, bad
		}
		if out == nil {
			out = map[string]string{}
		}
		out[name] = v
		if size += len(name) + len(v); size > maxParamBytes || len(out) > maxParams {
			return nil, mismatch("there may be at most %d Mcp-Param headers, with names and values of %d bytes together", maxParams, maxParamBytes)
		}
	}
	return out, nil
}

// decodeValue undoes the base64 form of a header's value (streamable HTTP,
// "Value Encoding").
func decodeValue(v string) (string, bool) {
	const prefix, suffix = "=?base64?", "?="
	if len(v) < len(prefix)+len(suffix) || !strings.HasPrefix(v, prefix) || !strings.HasSuffix(v, suffix) {
		return v, true
	}
	text, err := base64.StdEncoding.Strict().DecodeString(v[len(prefix) : len(v)-len(suffix)])
	return string(text), err == nil && utf8.Valid(text)
}

func invalid(format string, args ...any) *reply {
	return &reply{status: http.StatusBadRequest, code: jsonrpc.CodeInvalidParams, message: fmt.Sprintf(format, args...)}
}

func mismatch(format string, args ...any) *reply {
	return &reply{status: http.StatusBadRequest, code: jsonrpc.CodeHeaderMismatch, message: "Header mismatch: " + fmt.Sprintf(format, args...)}
}

func disagrees(name, inHeader, inBody string) *reply {
	if inHeader == "" {
		return mismatch("%s header is missing", name)
	}
	return mismatch("%s header value %q does not match body value %q", name, short(inHeader), short(inBody))
}

func unsupported(asked string) *reply {
	data := append([]byte(`{"supported":["`+Revision+`"],"requested":`), jsonrpc.Quote(short(asked))...)
	return &reply{
		status: http.StatusBadRequest, code: jsonrpc.CodeUnsupportedProtocolVersion, data: append(data, '}'),
		message: "Unsupported protocol version: this gateway serves " + Revision,
	}
}

// short keeps what a client sent short enough to be repeated to it.
func short(s string) string {
	const most = 200
	if len(s) <= most {
		return s
	}
	n := most
	for n > 0 && !utf8.RuneStart(s[n]) {
		n--
	}
	return s[:n] + "…"
}

// accepts tells which of the two forms of an answer the client takes (RFC 9110
// §12.5.1); without the header, or with an empty one, both.
func accepts(values []string) (json, sse bool) {
	if len(values) == 0 || len(values) == 1 && values[0] == "" {
		return true, true
	}
	if len(values) == 1 && values[0] == "application/json, text/event-stream" {
		return true, true
	}
	var j, s preference
	for _, v := range values {
		for part := range strings.SplitSeq(v, ",") {
			kind, rest, _ := strings.Cut(part, ";")
			refused := false
			for p := range strings.SplitSeq(rest, ";") {
				name, q, _ := strings.Cut(p, "=")
				if strings.EqualFold(strings.TrimSpace(name), "q") {
					refused = strings.Trim(strings.TrimSpace(q), "0.") == ""
				}
			}
			kind = strings.ToLower(strings.TrimSpace(kind))
			j.see(kind, "application/", "json", refused)
			s.see(kind, "text/", "event-stream", refused)
		}
	}
	return j.yes, s.yes
}

// preference is what the most specific range so far says of a media type.
type preference struct {
	specific int
	yes      bool
}

func (p *preference) see(kind, top, sub string, refused bool) {
	specific := 0
	switch kind {
	case "*/*":
		specific = 1
	case top + "*":
		specific = 2
	case top + sub:
		specific = 3
	}
	if specific > 0 && specific >= p.specific {
		*p = preference{specific, !refused}
	}
}
