package test

import (
	"testing"

	"waybill.dev/test/gateway"
	"waybill.dev/test/peers"
)

func TestOldConformance(t *testing.T) {
	g := gateway.Start(t, gateway.Config("servers:\n"+gateway.Server("everything", peers.EverythingServer(t), "")))
	r := peers.Conformance(t, g.URL+"/mcp/everything", "--requirements", "2025-11-25")
	t.Log(r.Exit, r.Output)
	if err := g.Stop(); err != nil {
		t.Errorf("stopping: %v", err)
	}
}
