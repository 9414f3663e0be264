package test

import (
	"testing"

	"waybill.dev/test/gateway"
	"waybill.dev/test/peers"
)

func TestModernClientLegacyServerConformance(t *testing.T) {
	g := gateway.Start(t, gateway.Config("servers:\n"+gateway.Server("everything", peers.EverythingServer(t, "-stateless=false"), "")))
	peers.ConformanceModern(t, g.URL+"/mcp/everything")
	if err := g.Stop(); err != nil {
		t.Errorf("stopping: %v", err)
	}
}
