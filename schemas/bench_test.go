package schemas_test

import (
	"testing"
	"time"

	"waybill.dev/schemas"
)

// authorized is a typical event of the hot path: the envelope as the log's
// header holds it, without the body.
func authorized() schemas.Event {
	at := time.Date(2026, 7, 28, 12, 34, 56, 123456789, time.UTC)
	call := schemas.NewCallID(at)
	return schemas.Event{
		Tenant:  "acme",
		Session: schemas.NewSessionKey("acme", "researcher", "client 2026-07-28T12"),
		Call:    call, Root: call, Agent: "researcher", Edge: schemas.NewReplica(),
		Time:  at.Add(time.Millisecond),
		Trace: "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
		Data: &schemas.Authorized{
			Requested: schemas.Requested{
				Target:   schemas.Target{Protocol: "mcp", Server: "everything", Method: "tools/call", Name: "echo"},
				Revision: "2026-07-28",
				Headers:  map[string]string{"Mcp-Param-Region": "eu-west-1"},
				Deadline: at.Add(time.Minute),
			},
			Decision:     schemas.Decision{N: 1, Rule: "allow[0]"},
			RequestedSeq: 1234567,
			RequestedAt:  at.Add(200 * time.Microsecond),
		},
	}
}

func BenchmarkMarshal(b *testing.B) {
	e := authorized()
	b.ReportAllocs()
	for b.Loop() {
		if _, err := e.MarshalJSON(); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkUnmarshal(b *testing.B) {
	text, err := authorized().MarshalJSON()
	if err != nil {
		b.Fatal(err)
	}
	b.SetBytes(int64(len(text)))
	b.ReportAllocs()
	for b.Loop() {
		var e schemas.Event
		if err := e.UnmarshalJSON(text); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkCheck(b *testing.B) {
	e := authorized()
	b.ReportAllocs()
	for b.Loop() {
		if err := e.Check(); err != nil {
			b.Fatal(err)
		}
	}
}
