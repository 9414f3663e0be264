package dispatch

import "context"

// newClient makes a call of a client without sessions at a server that has them.
func (m *mcpServer) newClient(ctx context.Context, c Call, progress func([]byte) error) (Answer, error) {
	return m.modern(ctx, c, progress)
}
