package cli

import (
	"context"
	"fmt"
)

// answer is --serve: it answers an agent from the record, at r.serve, until ctx
// ends.
func (r *replaying) answer(context.Context, Env) error {
	return fmt.Errorf("--serve: %w", errNotBuilt)
}
