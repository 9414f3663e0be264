package dispatch

import "context"

// oldClient makes a call of a client with a session at a server that has none.
func (m *mcpServer) oldClient(ctx context.Context, c Call, progress func([]byte) error) (Answer, error) {
	return m.legacy(ctx, c, progress)
}
