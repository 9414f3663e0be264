package projections

import (
	"slices"

	"waybill.dev/schemas"
)

// edges is the call graph: one row for each call, from whoever made it, which
// is another call or, at the top, the agent. It is written when the call is
// requested, so that what has no ending yet is in the graph.
func edges() Table {
	return Table{
		Name: "edges_v1", View: "edges", Help: "the call graph: each call under the one that caused it",
		Columns: slices.Concat(ofCall(), targetColumns()),
		More: []string{
			"INDEX by_call call TYPE bloom_filter(0.01) GRANULARITY 1",
			"INDEX by_root root TYPE bloom_filter(0.01) GRANULARITY 1",
		},
		Order: "tenant, session, root, call",
		Final: true,
		Row: func(row []any, e schemas.Event) []any {
			r, ok := e.Data.(*schemas.Requested)
			if !ok {
				return nil
			}
			if e.Root == "" {
				e.Root = e.Call
			}
			return targetRow(callRow(row, e), r.Target)
		},
	}
}
