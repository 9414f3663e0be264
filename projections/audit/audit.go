// Package audit makes the log's record one that cannot be altered unnoticed: a
// Merkle tree (RFC 6962) with a leaf for every message of the log, checkpoints
// (C2SP tlog-checkpoint) that are signed, and a feed with one CloudEvents record
// for each leaf. It knows neither the log nor a disk: what it needs of them is
// [Store].
//
// Begin with [Record], which makes the leaf of a message, then [Builder], which
// grows the tree, and [Verify], which holds everything stored against the signed
// checkpoints.
package audit

import (
	"bytes"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"golang.org/x/mod/sumdb/tlog"

	"waybill.dev/schemas"
)

// Streams that the tree covers.
const (
	Events = "EVENTS"
	System = "SYSTEM"
)

// Entry is one message of the log, as it is stored.
type Entry struct {
	Stream  string              `json:"stream"`
	Seq     uint64              `json:"seq"`
	Stored  time.Time           `json:"stored"`
	Subject string              `json:"subject"`
	Header  map[string][]string `json:"header,omitempty"`
	Body    []byte              `json:"body,omitempty"`

	// Event is the message read as an event; without Data where it is none.
	Event schemas.Event `json:"-"`
}

// SecretSize is the size of the secret from which the salts of a session come.
const SecretSize = 32

// Salt is what the digests of one message are salted with. Whoever learns it can
// check what the message said, and learns nothing of other messages; when the
// session's secret is destroyed nobody can guess what was said by trying.
func Salt(secret []byte, stream string, seq uint64) []byte {
	m := hmac.New(sha256.New, secret)
	m.Write(strconv.AppendUint(append([]byte(stream), '/'), seq, 10))
	return m.Sum(nil)
}

// Leaf is what the tree's leaf says, read from a record. The order of the members
// and every byte between them are the record's; this is for reading only.
type Leaf struct {
	V       int             `json:"v"`               // version of this form
	Stream  string          `json:"stream"`          // EVENTS or SYSTEM
	Seq     uint64          `json:"seq"`             // the message's place there
	To      uint64          `json:"to,omitempty"`    // of a gap: the last of the messages that were not there when the tree reached them
	Stored  time.Time       `json:"stored,omitzero"` // when the log had it
	Subject string          `json:"subject,omitempty"`
	Size    int             `json:"size,omitempty"`  // of the body, in bytes
	Head    string          `json:"head,omitempty"`  // hex SHA-256 of salt, 00, and the headers
	Body    string          `json:"body,omitempty"`  // hex SHA-256 of salt, 01, and the body
	Event   json.RawMessage `json:"event,omitempty"` // the event, open to all: schemas.Event.Open; absent where the message is none
}

const leafVersion = 1

// Record is the text of a message's leaf: its hash in the tree is SHA-256 of 00
// and this text.
func Record(e Entry, salt []byte) []byte { return appendRecord(make([]byte, 0, 1024), e, salt) }

func appendRecord(b []byte, e Entry, salt []byte) []byte {
	b = appendQuoted(append(strconv.AppendInt(append(b, `{"v":`...), leafVersion, 10), `,"stream":`...), e.Stream)
	b = append(strconv.AppendUint(append(b, `,"seq":`...), e.Seq, 10), `,"stored":"`...)
	b = e.Stored.UTC().AppendFormat(b, time.RFC3339Nano)
	b = appendQuoted(append(b, `","subject":`...), e.Subject)
	b = strconv.AppendInt(append(b, `,"size":`...), int64(len(e.Body)), 10)
	b = append(b, `,"head":"`...)
	b = hex.AppendEncode(b, headDigest(salt, e.Header))
	b = append(b, `","body":"`...)
	b = hex.AppendEncode(b, bodyDigest(salt, e.Body))
	b = append(b, '"')
	if e.Event.Data != nil {
		if with, err := e.Event.Open().AppendString(append(b, `,"event":`...)); err == nil {
			b = with
		}
	}
	return append(b, '}')
}

// gapRecord is the leaf that stands for messages that the log did not have (any
// more) when the tree reached them.
func gapRecord(stream string, from, to uint64) []byte {
	return fmt.Appendf(nil, `{"v":%d,"stream":%s,"seq":%d,"to":%d}`, leafVersion, appendQuoted(nil, stream), from, to)
}

// appendQuoted appends a string as encoding/json writes it, nearly always without
// asking that.
func appendQuoted(b []byte, s string) []byte {
	if !utf8.ValidString(s) || strings.ContainsFunc(s, func(r rune) bool { return r < ' ' || r > '~' || strings.ContainsRune(`"\<>&`, r) }) {
		text, _ := json.Marshal(s) // a string: cannot fail
		return append(b, text...)
	}
	return append(append(append(b, '"'), s...), '"')
}

// headDigest covers every header of a message, in the order of their names.
func headDigest(salt []byte, header map[string][]string) []byte {
	b := append(append(make([]byte, 0, 2048), salt...), 0)
	names := make([]string, 0, 16)
	for name := range header {
		names = append(names, name)
	}
	slices.Sort(names)
	for _, name := range names {
		for _, value := range header[name] {
			b = binary.BigEndian.AppendUint32(b, uint32(len(name)))
			b = binary.BigEndian.AppendUint32(b, uint32(len(value)))
			b = append(append(b, name...), value...)
		}
	}
	digest := sha256.Sum256(b)
	return digest[:]
}

func bodyDigest(salt, body []byte) []byte {
	h := sha256.New()
	h.Write(salt)
	h.Write([]byte{1})
	h.Write(body)
	return h.Sum(nil)
}

// ErrRecord is wrapped by the error for a record that cannot be read.
var ErrRecord = errors.New("unreadable record")

// ReadRecord reads a record.
func ReadRecord(record []byte) (Leaf, error) {
	var l Leaf
	if err := json.Unmarshal(record, &l); err != nil {
		return l, fmt.Errorf("%w: %w", ErrRecord, err)
	}
	if l.V != leafVersion {
		return l, fmt.Errorf("%w: version %d, this program reads %d", ErrRecord, l.V, leafVersion)
	}
	return l, nil
}

// Of tells whether a leaf is of a message, or of a gap in which the message was.
func (l Leaf) Of(stream string, seq uint64) bool {
	return l.Stream == stream && l.Seq <= seq && seq <= max(l.Seq, l.To)
}

// Opened reads the event that a leaf has; false where the message was none.
func (l Leaf) Opened() (schemas.Event, bool) {
	var e schemas.Event
	if l.Event == nil || e.UnmarshalJSON(l.Event) != nil {
		return schemas.Event{}, false
	}
	e.Seq, e.Stored = l.Seq, l.Stored
	return e, true
}

// owner is the tenant and session to which a subject of the log belongs, "" and
// "" for what belongs to none.
func owner(stream, subject string) (schemas.Tenant, schemas.SessionKey) {
	if t := strings.Split(subject, "."); stream == Events && len(t) == 5 {
		return schemas.Tenant(t[1]), schemas.SessionKey(t[2])
	}
	return "", ""
}

// Item is one record of the feed: where it is published, and what.
type Item struct {
	Subject string
	Number  uint64 // of the leaf
	Payload []byte // CloudEvents 1.0, structured JSON
	Said    bool   // the payload has the body
	At      Position

	leaf int // bytes of the leaf in the payload
}

// record is the leaf, as [CutRecord] finds it.
func (i *Item) record() []byte {
	end := len(i.Payload) - len("}}")
	return i.Payload[end-i.leaf : end]
}

// Position is the last message of each stream that the tree has.
type Position map[string]uint64

// String is what ParsePosition reads.
func (p Position) String() string {
	streams := make([]string, 0, 2)
	for stream := range p {
		streams = append(streams, stream)
	}
	slices.Sort(streams)
	b := make([]byte, 0, 64)
	for i, stream := range streams {
		if i > 0 {
			b = append(b, ' ')
		}
		b = strconv.AppendUint(append(append(b, stream...), '='), p[stream], 10)
	}
	return string(b)
}

// ParsePosition reads a Position.
func ParsePosition(s string) (Position, error) {
	p := Position{}
	for part := range strings.FieldsSeq(s) {
		stream, seq, _ := strings.Cut(part, "=")
		n, err := strconv.ParseUint(seq, 10, 64)
		if err != nil {
			return nil, fmt.Errorf("position %q: %w", s, err)
		}
		p[stream] = n
	}
	return p, nil
}

// feedSchema is the JSON Schema of the feed's records.
const feedSchema = "https://waybill.dev/schemas/v1/audit.json"

// item makes the feed's record of a leaf. The leaf comes last, so that its exact
// bytes can be cut out: they begin behind the first `,"leaf":` and end before the
// last two characters.
func item(origin string, n uint64, e Entry, record []byte, salt []byte, said bool) Item {
	subject, kind, about := "audit.LOG."+strings.ToLower(e.Stream)+".gap", "gap", ""
	switch tenant, session := owner(e.Stream, e.Subject); {
	case e.Event.Data != nil:
		kind = string(e.Event.Kind())
		subject = "audit." + string(e.Event.Tenant) + "." + string(e.Event.Agent) + "." + kind
		about = string(e.Event.Session)
		if e.Event.Call != "" {
			about += "/" + string(e.Event.Call)
		}
	case tenant != "":
		kind, about = "undecodable", string(session)
		subject = "audit." + string(tenant) + "._.undecodable"
	case e.Subject != "":
		kind = "system"
		if t := strings.Split(e.Subject, "."); len(t) > 1 && schemas.CheckToken(t[1]) == nil {
			kind = t[1]
		}
		subject, about = "audit.SYSTEM._."+kind, e.Subject
		kind = "system." + kind
	}
	b := make([]byte, 0, len(record)+512)
	b = append(append(append(b, `{"specversion":"1.0","id":"`...), e.Stream...), '/')
	b = appendQuoted(append(strconv.AppendUint(b, e.Seq, 10), `","source":`...), "/waybill/"+origin)
	b = append(append(append(b, `,"type":"dev.waybill.`...), kind...), '"')
	if about != "" {
		b = appendQuoted(append(b, `,"subject":`...), about)
	}
	if !e.Stored.IsZero() {
		b = e.Stored.UTC().AppendFormat(append(b, `,"time":"`...), time.RFC3339Nano)
		b = append(b, '"')
	}
	b = append(b, `,"datacontenttype":"application/json","dataschema":"`+feedSchema+`","data":{"number":`...)
	b = strconv.AppendUint(b, n, 10)
	if said {
		b = hex.AppendEncode(append(b, `,"salt":"`...), salt)
		b = append(b, '"')
		if utf8.Valid(e.Body) {
			b = appendQuoted(append(b, `,"body":`...), string(e.Body))
		} else {
			text, _ := json.Marshal(e.Body) // bytes: cannot fail
			b = append(append(b, `,"body_base64":`...), text...)
		}
	}
	b = append(append(append(b, `,"leaf":`...), record...), "}}"...)
	return Item{Subject: subject, Number: n, Payload: b, Said: said, leaf: len(record)}
}

// CutRecord is the leaf's record in a payload of the feed, byte for byte.
func CutRecord(payload []byte) ([]byte, error) {
	_, after, ok := strings.Cut(string(payload), `,"leaf":`)
	if !ok || !strings.HasSuffix(after, "}}") {
		return nil, fmt.Errorf("%w: no leaf in the feed's record", ErrRecord)
	}
	return []byte(after[:len(after)-2]), nil
}

// Unsaid is a payload of the feed without the body and the salt of what a session
// said before a message of EVENTS; false where it has none, or is not of that.
func Unsaid(payload []byte, session schemas.SessionKey, before uint64) ([]byte, bool) {
	at := bytes.Index(payload, []byte(`,"salt":"`))
	leaf := bytes.Index(payload, []byte(`,"leaf":`))
	if at < 0 || leaf < at {
		return nil, false
	}
	record, err := CutRecord(payload)
	if err != nil {
		return nil, false
	}
	l, err := ReadRecord(record)
	if err != nil || l.Stream != Events || l.Seq >= before {
		return nil, false
	}
	if _, of := owner(l.Stream, l.Subject); of != session {
		return nil, false
	}
	return slices.Concat(payload[:at], payload[leaf:]), true
}

// PlaceOf is the message that a record is of: stream and sequence.
func PlaceOf(record []byte) (string, uint64) {
	// As Record writes it, which is every record of this version.
	if s, ok := strings.CutPrefix(string(record[:min(len(record), 80)]), `{"v":1,"stream":"`); ok {
		if stream, s, ok := strings.Cut(s, `","seq":`); ok {
			digits := s[:len(s)-len(strings.TrimLeft(s, "0123456789"))]
			if seq, err := strconv.ParseUint(digits, 10, 64); err == nil {
				return stream, seq
			}
		}
	}
	l, err := ReadRecord(record)
	if err != nil {
		return "", 0
	}
	return l.Stream, l.Seq
}

// Hex writes a digest or a salt.
func Hex(b []byte) string { return hex.EncodeToString(b) }

// hashOf is the leaf's hash.
func hashOf(record []byte) tlog.Hash { return tlog.RecordHash(record) }
