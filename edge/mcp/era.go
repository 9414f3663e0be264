package mcp

import (
	"net/http"
	"slices"

	"waybill.dev/schemas/jsonrpc"
)

// Revisions with sessions, newest first: the legacy era. A client of one of
// them opens a session with initialize; the revision that is served without
// sessions is [Revision], and whatever comes after it is of that era.
const (
	revision2025Nov = "2025-11-25"
	revision2025Jun = "2025-06-18"
	revision2025Mar = "2025-03-26"

	// revision2024 is served to nobody who asks for it: over HTTP it is another
	// transport. But a server may know no other, and the client agree.
	revision2024 = "2024-11-05"
)

// Revisions are the revisions that are served, the newest first.
func Revisions() []string { return append([]string{Revision}, legacyRevisions()...) }

// legacyRevisions is the closed set; batches, which only 2025-03-26 has, are
// refused there too.
func legacyRevisions() []string {
	return []string{revision2025Nov, revision2025Jun, revision2025Mar}
}

// agreeable is the revision that the gateway expects to agree on with a client
// that asks for this one, until the upstream's answer says it.
func agreeable(asked string) string {
	if slices.Contains(legacyRevisions(), asked) {
		return asked
	}
	return revision2025Nov
}

// primes tells whether a client of this revision expects a stream to begin with
// an event that has an id and no data (2025-11-25, transports, "Sending
// Messages to the Server" 6). Older ones would take it for a message.
func primes(revision string) bool { return revision >= revision2025Nov }

// modernHeader tells whether the header says that the request is of the era
// without sessions. For such a request the body is not looked at.
func modernHeader(h http.Header) bool {
	for _, v := range h[headerVersion] {
		if v >= Revision {
			return true
		}
	}
	return false
}

// isLegacy tells whether a message is of the era with sessions.
func isLegacy(m *jsonrpc.Message, h http.Header) bool {
	switch {
	case modernHeader(h):
		return false
	case len(h[headerSession]) > 0:
		return true
	case m.IsResponse(), m.Method() == "server/discover":
		return false
	}
	return !m.Params().Get("_meta", metaVersion).Exists()
}

const (
	headerSession = "Mcp-Session-Id"
	headerLast    = "Last-Event-Id"
)

// codeBadRequest and codeNoSession are what the TypeScript SDK's server answers
// with; clients go by the HTTP status.
const (
	codeBadRequest = -32000
	codeNoSession  = -32001
)

func badRequest(message string) *reply {
	return &reply{status: http.StatusBadRequest, code: codeBadRequest, message: "Bad Request: " + message}
}

// sessionUnknown is the one answer to every session that the caller does not
// have here: never opened, ended, of another endpoint, of another principal.
// A client that sees the status opens a new one (2025-11-25, transports,
// "Session Management" 4).
func sessionUnknown() *reply {
	return &reply{status: http.StatusNotFound, code: codeNoSession, message: "Session not found"}
}
