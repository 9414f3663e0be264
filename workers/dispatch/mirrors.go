package dispatch

import "waybill.dev/schemas/jsonrpc"

// What a client that makes the headers of revision 2026-07-28 itself has to
// know of them is known here already; `waybill connect` is one.

// Mirrors are the arguments that calls of one tool repeat in headers.
type Mirrors []mirror

// MirrorsOf reads them from a tool's definition, as tools/list has it. The error
// says what is wrong with the definition.
func MirrorsOf(tool jsonrpc.Value) (Mirrors, error) {
	return mirrors(tool)
}

// Headers are the headers of a call with these arguments.
func (m Mirrors) Headers(arguments jsonrpc.Value) map[string]string {
	return paramHeaders(m, arguments)
}

// HeaderText is a text as a header has it, in the base64 form where it must
// (streamable HTTP, "Value Encoding").
func HeaderText(s string) string { return headerText(s) }

// NamedIn says which member of the params of a method the Mcp-Name header
// repeats; "" if it has none.
func NamedIn(method string) string { return mcpNames[method].member }

// Reads tells whether a method of MCP has no effect, so that it may be asked
// again when nobody knows what became of it.
func Reads(method string) bool { return mcpReads[method] != "" }
