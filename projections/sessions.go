package projections

import "waybill.dev/schemas"

// sessions has a row for each beginning and end of a session; the question
// slowest_sessions and the view put them together.
func sessions() Table {
	return Table{
		Name: "sessions_v1", View: "session_events", Help: "beginnings and ends of sessions; see sessions",
		Columns: []Column{
			{"tenant", "LowCardinality(String)"},
			{"session", "String CODEC(ZSTD(1))"},
			{"agent", "LowCardinality(String)"},
			{"kind", "LowCardinality(String)"}, // opened, closed
			{"protocol", "LowCardinality(String)"},
			{"name", "String CODEC(ZSTD(1))"},
			{"client", "LowCardinality(String)"},
			{"server", "LowCardinality(String)"},
			{"revision", "LowCardinality(String)"},
			{"reason", "String CODEC(ZSTD(1))"},
		},
		Order: "tenant, session, log, seq",
		Row: func(row []any, e schemas.Event) []any {
			var o schemas.Opened
			reason := ""
			switch p := e.Data.(type) {
			case *schemas.Opened:
				o = *p
			case *schemas.Closed:
				reason = p.Reason
			default:
				return nil
			}
			return append(row, word(e.Tenant), string(e.Session), word(e.Agent), string(e.Kind()),
				word(o.Protocol), o.Name, word(o.Client), word(o.Server), word(o.Revision), reason)
		},
	}
}
