package mcp

import (
	"bytes"
	"net/http"
	"slices"
	"strconv"

	"waybill.dev/edge"
	"waybill.dev/schemas"
	"waybill.dev/schemas/jsonrpc"
)

// reply is an error that the gateway answers by itself.
type reply struct {
	status  int    // of the HTTP answer, if it has not begun as a stream
	code    int    // of JSON-RPC
	reason  string // data.waybill.code; "" leaves data out
	message string
	retry   int    // seconds; 0: no Retry-After
	data    []byte // instead of data.waybill
}

// failures says what a caller is told when the gateway has no answer. It tells
// what is certain about the call's effect, since that decides what to do next,
// and nothing of what went wrong inside: that is in the event.
//
// Most are HTTP 200: the exchange itself worked, and clients of this revision
// look for a JSON-RPC error in the body; many take 5xx for a broken transport
// and send the message again, which must not happen to a call that may have
// been carried out.
var failures = map[schemas.Failure]reply{
	schemas.FailExpired: {status: 200, code: jsonrpc.CodeInternalError,
		message: "The deadline passed before the server was called. The call was not carried out; it is safe to try again."},
	schemas.FailUnavailable: {status: 503, code: jsonrpc.CodeInternalError, retry: 5,
		message: "The server cannot be reached at the moment. It is safe to try again later."},
	schemas.FailOverloaded: {status: 503, code: jsonrpc.CodeInternalError, retry: 1,
		message: "Too many calls at the moment. The call was not carried out; try again later."},
	schemas.FailInvalid: {status: 400, code: jsonrpc.CodeInvalidRequest,
		message: "The call cannot be sent to the server as it is. It was not carried out; trying again will not help."},
	schemas.FailUndecodable: {status: 200, code: jsonrpc.CodeInternalError,
		message: "The gateway cannot read its own record of this call. The call was not carried out; name it to the operator."},
	schemas.FailTimeout: {status: 200, code: jsonrpc.CodeInternalError,
		message: "The server did not answer in time. The tool is declared idempotent; it is safe to try again."},
	schemas.FailUnknown: {status: 200, code: jsonrpc.CodeInternalError,
		message: "The outcome of this call is unknown: the server may have carried it out. The gateway has not repeated it; find out what happened before trying again."},
	schemas.FailBadAnswer: {status: 200, code: jsonrpc.CodeInternalError,
		message: "The server was called, but its answer does not follow the protocol and was not passed on."},
	schemas.FailTooLarge: {status: 200, code: jsonrpc.CodeInternalError,
		message: "The server was called, but its answer is larger than the gateway passes on."},
	schemas.FailWithheld: {status: 200, code: jsonrpc.CodeInternalError,
		message: "The server was called, but a rule keeps its answer back. Trying again will not help."},
	schemas.FailInternal: {status: 200, code: jsonrpc.CodeInternalError,
		message: "The gateway failed at this call. Whether it was carried out is not certain; name the call to the operator."},
}

// What can happen to a call at this edge, beside the failures of the others.
var (
	tooLargeToStore = reply{status: 413, code: jsonrpc.CodeInvalidRequest, reason: "request_too_large",
		message: "The request is larger than the log can hold: its body, or its name and Mcp-Param headers together. The call was not carried out."}
	cannotStore = reply{status: 503, code: jsonrpc.CodeInternalError, reason: "not_stored", retry: 1,
		message: "The gateway cannot write to its log. The call was not carried out; try again later."}
	cannotRead = reply{status: 503, code: jsonrpc.CodeInternalError, reason: "not_read", retry: 1,
		message: "The gateway cannot read its log. Nothing was done; try again later."}
	goneOn = reply{status: 400, code: codeBadRequest, reason: "left",
		message: "The connection was closed, or taken over by another, before the answer. The call goes on."}
	lostTrack = reply{status: 200, code: jsonrpc.CodeInternalError, reason: "lost",
		message: "The gateway lost track of this call and its outcome is unknown; name the call to the operator."}
	overdue = reply{status: 200, code: jsonrpc.CodeInternalError, reason: "overdue",
		message: "The call had no ending by its deadline and was cancelled. Its outcome is unknown; find out what happened before trying again."}
	cancelled = reply{status: 200, code: jsonrpc.CodeInternalError, reason: "cancelled",
		message: "The call was cancelled."}
	halfClosed = reply{status: 400, code: jsonrpc.CodeInvalidRequest, reason: "cancelled",
		message: "The connection was closed before the answer, which cancels the call."}
	draining = reply{status: 503, code: jsonrpc.CodeInternalError, reason: "draining", retry: 1,
		message: "The gateway is shutting down and cut off this call, whose outcome is unknown; find out what happened before trying again."}
)

// deniedReply answers like a server that has no such name, in the words, the
// code and the status of the Go SDK's server, so that what is forbidden cannot
// be told from what is not there. Nothing of it comes from the decision.
func deniedReply(t schemas.Target) reply {
	unknown := reply{status: http.StatusBadRequest, code: jsonrpc.CodeInvalidParams}
	switch t.Method {
	case "tools/call":
		unknown.message = "unknown tool " + strconv.Quote(t.Name)
	case "prompts/get":
		unknown.message = "unknown prompt " + strconv.Quote(t.Name)
	case "resources/read":
		unknown.message = "Resource not found"
		unknown.data = append(append([]byte(`{"uri":`), jsonrpc.Quote(t.Name)...), '}')
	default:
		unknown.status, unknown.code, unknown.message = http.StatusNotFound, jsonrpc.CodeMethodNotFound, "Method not found"
	}
	return unknown
}

// misfit is the answer to a call whose arguments do not fit, of a tool that the
// caller may list: a result, so that whoever chose them reads it and mends them (MCP,
// server/tools, "Error Handling").
func misfit(e schemas.Event, d *schemas.Denied, revision string) (*schemas.Completed, []byte) {
	text := jsonrpc.Quote("Invalid arguments: " + d.Arguments + ". The call was not carried out.")
	result := slices.Concat([]byte(`{"content":[{"type":"text","text":`), text, []byte(`}],"isError":true`))
	if revision == "" || revision >= "2026-07-28" {
		result = append(result, `,"resultType":"complete"`...)
	}
	return &schemas.Completed{Status: http.StatusOK}, jsonrpc.ResultResponse(jsonrpc.Quote(string(e.Call)), append(result, '}'))
}

// refuse puts a refusal of the shell into the form of an error response. It has
// no id, as the message was not read (streamable HTTP, "Security & Endpoint").
func refuse(status int, cause edge.Cause, message string) []byte {
	code := jsonrpc.CodeInvalidRequest
	if status >= 500 || status == http.StatusTooManyRequests {
		code = jsonrpc.CodeInternalError
	}
	return encode(withoutID, reply{code: code, message: message, reason: cause.String()}, "")
}

// withoutID stands for the id of what has none: a notification, or a message
// that was not read. Such an error response has no id member.
var withoutID = []byte{}

// encode writes an error response. A nil id is written as null.
func encode(id []byte, f reply, call schemas.CallID) []byte {
	data := f.data
	if data == nil && f.reason != "" {
		data = append(append(data, `{"waybill":{"code":"`...), f.reason...)
		if call != "" {
			data = append(append(data, `","call":"`...), call...)
		}
		data = append(data, `"}}`...)
	}
	body := jsonrpc.ErrorResponse(id, f.code, f.message, data)
	if id != nil && len(id) == 0 {
		body = bytes.Replace(body, []byte(`"id":null,`), nil, 1)
	}
	return body
}

// write answers with f before there is a call.
func write(w http.ResponseWriter, id []byte, f reply) {
	if f.retry > 0 {
		w.Header().Set("Retry-After", strconv.Itoa(f.retry))
	}
	edge.WriteJSON(w, f.status, encode(id, f, ""))
}
