package test

import (
	"testing"

	"waybill.dev/test/gateway"
	"waybill.dev/test/peers"
	"waybill.dev/test/upstream"
)

// The suite's scenarios for tasks, through the gateway in front of a server that
// has the extension; and in front of that server, so that a fault is its own.
func TestTasksConformance(t *testing.T) {
	url, _ := upstream.StartTasks(t, true)
	t.Run("direct", func(t *testing.T) { peers.ConformanceTasks(t, url) })
	g := gateway.Start(t, gateway.Config("servers:\n"+gateway.Server("tasks", url, "")))
	t.Run("gateway", func(t *testing.T) { peers.ConformanceTasks(t, g.URL+"/mcp/tasks") })
}
