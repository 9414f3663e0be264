package mcp

import (
	"net/http"
	"strings"
	"sync"
	"time"
	"unicode"
	"unicode/utf8"

	"waybill.dev/edge"
	"waybill.dev/schemas"
	"waybill.dev/schemas/jsonrpc"
)

// session is the session that a call belongs to.
type session struct {
	key    schemas.SessionKey
	name   string // what the key is made from
	client string // what the client calls itself
}

// maxSession bounds the name of a session, in bytes.
const maxSession = 256

// nameSession finds the session that the client names, or else the one that a
// client of this name has in this hour. The protocol has none of its own; any
// replica finds the same.
func nameSession(h http.Header, m meta, p edge.Principal, now time.Time) (session, *reply) {
	var s session
	s.client = clientName(m.client)
	switch values := h["Waybill-Session"]; {
	case len(values) > 1:
		return s, &reply{status: http.StatusBadRequest, code: jsonrpc.CodeInvalidRequest, message: "The Waybill-Session header is there more than once."}
	case len(values) == 1:
		s.name = values[0]
	case m.session.Exists():
		name, ok := m.session.Text()
		if !ok {
			return s, invalid("_meta field %q must be a string", metaSession)
		}
		s.name = name
	default:
		name := s.client
		if name == "" {
			name = string(p.Agent)
		}
		s.name = name + " " + now.Format("2006-01-02T15Z")
		s.key = schemas.NewSessionKey(p.Tenant, p.Agent, s.name)
		return s, nil
	}
	if s.name == "" || len(s.name) > maxSession || !utf8.ValidString(s.name) || strings.ContainsFunc(s.name, unicode.IsControl) {
		return s, invalid("the name of a session must have 1 to %d bytes of printable text", maxSession)
	}
	s.key = schemas.NewSessionKey(p.Tenant, p.Agent, s.name)
	return s, nil
}

// clientName is "name/version" as the client says, made short.
func clientName(info jsonrpc.Value) string {
	name, _ := info.Get("name").Text()
	if version, _ := info.Get("version").Text(); version != "" {
		name += "/" + version
	}
	return short(name)
}

// maxSeen bounds the memory of opened sessions, at some 100 bytes each.
const maxSeen = 1 << 16

// seen is a set that forgets what was not asked for in a long while: when one
// generation is full, or has had its time, it becomes the old one, and the old one
// is dropped.
type seen struct {
	most  int
	lasts time.Duration // a generation

	mu       sync.Mutex // guards what follows
	now, old map[schemas.SessionKey]struct{}
	since    time.Time // when age began the generation
}

func newSeen(most int, lasts time.Duration) *seen {
	return &seen{most: most, lasts: lasts, now: map[schemas.SessionKey]struct{}{}}
}

// age ends a generation that has had its time.
func (s *seen) age(now time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if now.Sub(s.since) >= s.lasts {
		s.old, s.now, s.since = s.now, map[schemas.SessionKey]struct{}{}, now
	}
}

func (s *seen) has(k schemas.SessionKey) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if _, ok := s.now[k]; ok {
		return true
	}
	_, ok := s.old[k]
	if ok {
		s.put(k)
	}
	return ok
}

func (s *seen) add(k schemas.SessionKey) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.put(k)
}

func (s *seen) put(k schemas.SessionKey) {
	if len(s.now) >= s.most/2 {
		s.old, s.now = s.now, make(map[schemas.SessionKey]struct{}, s.most/2)
	}
	// A key that was read from the log holds on to all of its event's envelope.
	s.now[schemas.SessionKey(strings.Clone(string(k)))] = struct{}{}
}
