package test

import (
	"testing"

	"waybill.dev/test/gateway"
	"waybill.dev/test/peers"
)

// The suite's client has no sessions, everything-server has: 35 of 37 scenarios
// pass, and the two others are impossible.
func TestNewClientConformance(t *testing.T) {
	g := gateway.Start(t, gateway.Config("servers:\n"+gateway.Server("everything", peers.EverythingServer(t, "-stateless=false"), "")))
	peers.ConformanceTranslated(t, g.URL+"/mcp/everything",
		peers.Untranslatable{
			Scenario: "input-required-result-basic-elicitation", Check: "sep-2322-elicitation-incomplete", Message: `missing expected key "user_name"`,
			Why: `2026-07-28, basic/patterns/mrtr, "InputRequests": "Keys are server-assigned string identifiers"; elicitation/create of 2025-11-25 has none, so the gateway has to make one up`,
		},
		peers.Untranslatable{
			Scenario: "input-required-result-multi-round", Check: "sep-2322-multi-round-r2", Message: "Expected new InputRequiredResult",
			Why: `2026-07-28, basic/index, "ResultType": "For backward compatibility with servers implementing earlier protocol versions, which do not include resultType, clients MUST treat an absent resultType as "complete""; in a session the Go SDK's server asks once itself, and then answers with inputRequests and no resultType`,
		},
	)
	if err := g.Stop(); err != nil {
		t.Errorf("stopping: %v", err)
	}
}

// Clients without sessions before server-everything, by itself and behind the
// front of all servers.
func TestNewClientPeers(t *testing.T) {
	g := gateway.Start(t, gateway.Config("servers:\n"+gateway.Server("everything", peers.ServerEverything(t), "")))
	t.Run("peers", func(t *testing.T) { // for these run beside each other
		t.Run("server", func(t *testing.T) { peers.ExerciseModern(t, peers.Endpoint{URL: g.URL + "/mcp/everything"}) })
		t.Run("all servers", func(t *testing.T) {
			peers.ExerciseModern(t, peers.Endpoint{URL: g.URL + "/mcp", Prefix: "everything__"})
		})
	})
	for _, e := range g.Events() {
		if err := e.Check(); err != nil {
			t.Error(err)
		}
	}
	if err := g.Stop(); err != nil {
		t.Errorf("stopping: %v", err)
	}
}
