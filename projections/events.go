package projections

import (
	"crypto/sha256"
	"slices"

	"waybill.dev/schemas"
)

// events has every event whole, with all that is asked for as columns. It
// outlives the log: what is in no log any more is replayed from here.
func events() Table {
	return Table{
		Name: "events_v1", View: "events", Help: "every event of the log",
		Columns: slices.Concat([]Column{
			{"kind", "LowCardinality(String)"},
			{"id", "String CODEC(ZSTD(1))"},
			{"time", "DateTime64(9, 'UTC') CODEC(Delta, ZSTD(1))"}, // of whoever emitted it
		}, ofCall(), ofTrace(), targetColumns(), []Column{
			{"edge", "LowCardinality(String)"},
			{"rule", "LowCardinality(String)"},
			{"reason", "String CODEC(ZSTD(1))"},
			{"code", "LowCardinality(String)"},
			{"status", "UInt16"},
			{"error_code", "Int32"},
			{"envelope", "String CODEC(ZSTD(3))"}, // the event but for its body, as the log has it
			{"body_size", "UInt32 CODEC(T64, ZSTD(1))"},
			{"body_sha256", "FixedString(32)"},
			{"body", "String CODEC(ZSTD(3))"},
		}),
		More: []string{
			"INDEX by_session session TYPE bloom_filter(0.01) GRANULARITY 1",
			"INDEX by_call call TYPE bloom_filter(0.01) GRANULARITY 1",
			"INDEX by_trace trace_id TYPE bloom_filter(0.01) GRANULARITY 1",
			"INDEX by_seq seq TYPE minmax GRANULARITY 1",
		},
		Order:  "tenant, toStartOfHour(stored), session, log, seq",
		Bodies: "body",
		Row: func(row []any, e schemas.Event) []any {
			var t schemas.Target
			var d schemas.Decision
			var reason, code string
			var status, errorCode int
			switch p := e.Data.(type) {
			case *schemas.Requested:
				t = p.Target
			case *schemas.Authorized:
				t, d = p.Target, p.Decision
			case *schemas.Denied:
				t, d = p.Target, p.Decision
			case *schemas.Held:
				t, d = p.Target, p.Decision
			case *schemas.Completed:
				t, status, errorCode = p.Target, p.Status, p.ErrorCode
			case *schemas.Failed:
				t, code, reason = p.Target, string(p.Code), p.Detail
			case *schemas.Cancelled:
				t, reason = p.Target, p.Reason
			case *schemas.Cancel:
				reason = p.Reason
			case *schemas.Late:
				t = p.Target
			case *schemas.Opened:
				t = schemas.Target{Protocol: p.Protocol, Server: p.Server, Name: p.Client}
			case *schemas.Closed:
				reason = p.Reason
			case *schemas.Connected:
				t = schemas.Target{Server: p.Server}
			case *schemas.Asked:
				t = p.Target
			case *schemas.Answered:
				t = p.Target
			case *schemas.Notified:
				t = p.Target
			}
			if d.Reason != "" {
				reason = d.Reason
			}
			envelope, _ := e.MarshalString() // of an event that was read from one
			hash := sha256.Sum256(e.Body)
			row = append(row, string(e.Kind()), string(e.ID()), at(e.Time))
			row = targetRow(traceRow(callRow(row, e), e), t)
			return append(row, word(e.Edge), word(d.Rule), reason, word(code), uint16(status), int32(errorCode),
				envelope, uint32(len(e.Body)), hash[:], e.Body)
		},
	}
}
