package peers

import "testing"

// The legacy clients against server-everything itself, with no gateway.

func TestLegacyDirect(t *testing.T) {
	t.Parallel()
	ExerciseLegacy(t, Endpoint{URL: ServerEverything(t), Direct: true})
}

// The legacy clients against a server that is made with mcp-go.
func TestLegacyMCPGoServer(t *testing.T) {
	t.Parallel()
	ExerciseLegacy(t, Endpoint{URL: MCPGoServer(t), MCPGo: true, Direct: true})
}
