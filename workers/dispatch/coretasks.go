package dispatch

import (
	"waybill.dev/schemas/jsonrpc"
)

// The tasks of revision 2025-11-25 (edge/mcp/coretasks.go says what is the edge's).

// revisionOfTasks is the only revision that has tasks in its core.
const revisionOfTasks = "2025-11-25"

const extensionTasks = "io.modelcontextprotocol/tasks"

// coreTasks is what the gateway says of itself to clients of that revision where
// tasks are its own.
var coreTasks = []byte(`{"list":{},"cancel":{},"requests":{"tools":{"call":{}}}}`)

// withMember is an object with one of its members set; another value stays.
func withMember(object []byte, name string, raw []byte) []byte {
	v, err := jsonrpc.Parse(object, jsonrpc.Limits{Bytes: max(len(object), 1), Depth: answerDepth, AllowCaseVariants: true})
	if err != nil || v.Kind() != jsonrpc.Object {
		return object
	}
	if out := v.Patch().Set(v, name, raw).Bytes(); out != nil {
		return out
	}
	return object
}

// withExtension are a client's capabilities with the extension for tasks.
func withExtension(capabilities []byte) []byte {
	v, err := jsonrpc.Parse(capabilities, jsonrpc.Limits{Bytes: max(len(capabilities), 1), Depth: answerDepth, AllowCaseVariants: true})
	if err != nil {
		return capabilities
	}
	extensions := []byte(`{}`)
	if e := v.Get("extensions"); e.Kind() == jsonrpc.Object {
		extensions = e.Raw()
	}
	return withMember(capabilities, "extensions", withMember(extensions, extensionTasks, []byte("{}")))
}
