package peers

import "testing"

// The legacy clients against server-everything itself, with no gateway.

func TestLegacyDirect(t *testing.T) {
	t.Parallel()
	ExerciseLegacy(t, Endpoint{URL: ServerEverything(t), Direct: true})
}
