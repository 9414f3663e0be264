package projections

import (
	"slices"

	"waybill.dev/schemas"
)

// calls has one row for each call that has ended, made of its ending, which
// repeats what is to be known. Of two endings, which only a log older than its
// memory for IDs can hold, the first counts.
func calls() Table {
	return Table{
		Name: "calls_v1", View: "calls", Help: "every call that has ended, with its times",
		Columns: slices.Concat(ofCall(), ofTrace(), targetColumns(), []Column{
			{"outcome", "LowCardinality(String)"}, // completed, failed, denied, cancelled
			{"code", "LowCardinality(String)"},    // why it failed
			{"rule", "LowCardinality(String)"},    // that let it go on, or denied it
			{"reason", "String CODEC(ZSTD(1))"},
			{"status", "UInt16"},    // of HTTP, from upstream
			{"error_code", "Int32"}, // of the protocol, when the answer is an error
			{"requested_at", "DateTime64(9, 'UTC') CODEC(Delta, ZSTD(1))"},
			{"total_us", "UInt64 CODEC(T64, ZSTD(1))"}, // requested to ended, which is these three
			{"policy_us", "UInt64 CODEC(T64, ZSTD(1))"},
			{"queue_us", "UInt64 CODEC(T64, ZSTD(1))"},
			{"upstream_us", "UInt64 CODEC(T64, ZSTD(1))"},
			{"attempts", "UInt16"},
			{"chunks", "UInt32"},
			{"request_bytes", "UInt32 CODEC(T64, ZSTD(1))"},
			{"answer_bytes", "UInt32 CODEC(T64, ZSTD(1))"},
		}),
		More: []string{
			// For what is metered at models, which are not called yet.
			"model LowCardinality(String) DEFAULT ''",
			"input_tokens UInt64 DEFAULT 0 CODEC(T64, ZSTD(1))",
			"output_tokens UInt64 DEFAULT 0 CODEC(T64, ZSTD(1))",
			"cost_nanousd Int64 DEFAULT 0 CODEC(T64, ZSTD(1))",
			"INDEX by_trace trace_id TYPE bloom_filter(0.01) GRANULARITY 1",
			"INDEX by_call call TYPE bloom_filter(0.01) GRANULARITY 1",
			"INDEX by_session session TYPE bloom_filter(0.01) GRANULARITY 1",
		},
		Order: "tenant, toStartOfHour(requested_at), session, call",
		Final: true,
		Row: func(row []any, e schemas.Event) []any {
			var s schemas.Summary
			var code, rule, reason string
			var status, errorCode int
			switch p := e.Data.(type) {
			case *schemas.Completed:
				s, status, errorCode = p.Summary, p.Status, p.ErrorCode
			case *schemas.Failed:
				s, code, reason = p.Summary, string(p.Code), p.Detail
			case *schemas.Denied:
				s, rule, reason = p.Summary, p.Rule, p.Reason
			case *schemas.Cancelled:
				s, reason = p.Summary, p.Reason
			default:
				return nil
			}
			if rule == "" {
				rule = s.Permit
			}
			policy, queue, upstream := micros(s.RequestedAt, s.AuthorizedAt), micros(s.AuthorizedAt, s.UpstreamAt), micros(s.UpstreamAt, e.Stored)
			if s.AuthorizedAt.IsZero() {
				policy = micros(s.RequestedAt, e.Stored)
			} else if s.UpstreamAt.IsZero() {
				queue = micros(s.AuthorizedAt, e.Stored)
			}
			row = targetRow(traceRow(callRow(row, e), e), s.Target)
			return append(row, string(e.Kind()), word(code), word(rule), reason, uint16(status), int32(errorCode), at(s.RequestedAt),
				micros(s.RequestedAt, e.Stored), policy, queue, upstream,
				uint16(s.Attempts), uint32(s.Chunks), uint32(s.RequestSize), uint32(len(e.Body)))
		},
	}
}
