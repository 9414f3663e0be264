package cli

import (
	"context"
	"fmt"
)

// whatIf is --policy: it decides the calls of r.session, or all since r.since,
// under the rules in r.policy and prints what would change.
func (r *replaying) whatIf(context.Context, Env) error {
	return fmt.Errorf("--policy: %w", errNotBuilt)
}
