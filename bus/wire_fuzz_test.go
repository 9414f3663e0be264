package bus

import (
	"bytes"
	"errors"
	"net/http"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"waybill.dev/schemas"
)

// FuzzWire feeds decode, and the salvage of what decode refuses, with messages
// as anybody who can write to the stream could leave them there. What decode
// accepts must come back the same after another trip over the wire, header
// lines included, and must be found where it is read.
func FuzzWire(f *testing.F) {
	at := time.Date(2026, 7, 28, 12, 0, 0, 5000, time.UTC)
	target := schemas.Target{Protocol: "mcp", Server: "everything", Method: "tools/call", Name: "écho \U0001f600\r\n"}
	requested := schemas.Requested{Target: target, Revision: "2026-07-28", Headers: map[string]string{"Mcp-Param-Region": " eu \t"}, Deadline: at}
	for _, data := range []schemas.Payload{
		&requested,
		&schemas.Authorized{Requested: requested, Decision: schemas.Decision{N: 1, Rule: "allow[0]"}, RequestedSeq: 1 << 60, Only: []string{}},
		&schemas.Denied{Decision: schemas.Decision{N: 2}},
		&schemas.Started{Attempt: 1, By: "me"},
		&schemas.Progressed{Index: 3, By: "me"},
		&schemas.Completed{Summary: schemas.Summary{Target: target, Chunks: 2}, ErrorCode: -32603, Removed: []string{"a"}},
		&schemas.Failed{Code: schemas.FailUnknown, Detail: "line\nbreak"},
		&schemas.Cancelled{Reason: "\x00"},
		&schemas.Opened{Protocol: "mcp", Name: "researcher 2026-07-28T12Z"},
		&schemas.Notified{Target: target, ID: "n1"},
	} {
		e := schemas.Event{
			Tenant: "acme", Session: "s1", Call: "c1", Root: "c1", Agent: "researcher", Edge: "e1", Time: at,
			Trace: "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01", Data: data, Body: []byte("{\"jsonrpc\":\r\n\"2.0\"}\x00\xff"),
		}
		if !e.Kind().OfCall() {
			e.Call, e.Root = "", ""
		}
		m, err := encode(e)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(m.Subject, m.Header.Get(headerEnvelope), m.Header.Get(jetstream.MsgIDHeader), m.Data)
		f.Add("ev.other.s1.completed._", m.Header.Get(headerEnvelope), "c1/end", m.Data)
	}
	f.Add("ev.acme.s1.requested._", `{"v":2,"call":"c9","agent":"A B","edge":"e1"}`, "c9/requested", []byte(nil))
	f.Add("ev.acme.s1", `{"v":1`, "/", []byte("x"))

	f.Fuzz(func(t *testing.T, subj, envelope, id string, body []byte) {
		h := nats.Header{headerEnvelope: {envelope}, jetstream.MsgIDHeader: {id}}
		e, err := decode(subj, h, body)
		if err != nil {
			if !errors.Is(err, ErrUndecodable) {
				t.Fatalf("%v does not wrap ErrUndecodable", err)
			}
			salvaged(t, subj, h, body)
			return
		}
		if !bytes.Equal(e.Body, body) {
			t.Fatalf("body %q became %q", body, e.Body)
		}
		if tenant, session, kind, ok := parts(subj); !ok || tenant != e.Tenant || session != e.Session || kind != e.Kind() {
			t.Fatalf("%s: an event of %s, %s, %s", subj, e.Tenant, e.Session, e.Kind())
		}
		m, err := encode(e)
		if err != nil {
			t.Fatalf("what was read cannot be stored: %v", err)
		}
		if m.Subject != subj || m.Header.Get(jetstream.MsgIDHeader) != id {
			t.Fatalf("%s %q became %s %q", subj, id, m.Subject, m.Header.Get(jetstream.MsgIDHeader))
		}
		again, err := decode(m.Subject, overTheWire(t, m), m.Data)
		if err != nil {
			t.Fatalf("what was stored cannot be read: %v", err)
		}
		e.Seq, e.Stored = 0, time.Time{} // not the sender's to set, and not written
		if once, twice := written(t, e), written(t, again); once != twice || !reflect.DeepEqual(e.Body, again.Body) {
			t.Fatalf("%s\nbecame\n%s", once, twice)
		}
	})
}

// overTheWire writes a message's header as the NATS client does and reads it
// back.
func overTheWire(t *testing.T, m *nats.Msg) nats.Header {
	var b bytes.Buffer
	b.WriteString("NATS/1.0\r\n")
	if err := http.Header(m.Header).Write(&b); err != nil {
		t.Fatal(err)
	}
	b.WriteString("\r\n")
	h, err := nats.DecodeHeadersMsg(b.Bytes())
	if err != nil {
		t.Fatalf("%q: %v", b.String(), err)
	}
	if len(h) != len(m.Header) {
		t.Fatalf("headers %q became %q", m.Header, h)
	}
	return h
}

func written(t *testing.T, e schemas.Event) string {
	b, err := e.MarshalJSON()
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// salvaged: what is left of an unreadable event ends its call where the event
// stood, or cannot be stored at all; never another tenant's or session's.
func salvaged(t *testing.T, subj string, h nats.Header, body []byte) {
	e := salvage(message{subject: subj, header: h, data: body})
	if e.Call == "" {
		return
	}
	m, err := encode(e.Next(&schemas.Failed{Code: schemas.FailUndecodable, Detail: "x"}, nil))
	if err != nil {
		if !errors.Is(err, schemas.ErrInvalid) {
			t.Fatal(err)
		}
		return
	}
	was, is := strings.Split(subj, "."), strings.Split(m.Subject, ".")
	if len(is) != 5 || is[1] != was[1] || is[2] != was[2] || is[3] != string(schemas.KindFailed) {
		t.Fatalf("an unreadable message on %s ends a call on %s", subj, m.Subject)
	}
}

// message is a stored message as far as salvage looks at it.
type message struct {
	jetstream.Msg
	subject string
	header  nats.Header
	data    []byte
}

func (m message) Subject() string      { return m.subject }
func (m message) Headers() nats.Header { return m.header }
func (m message) Data() []byte         { return m.data }
