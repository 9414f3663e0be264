package upstream

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"fmt"
	"net/http"
	"slices"
	"strconv"
	"sync"
	"time"
)

// legacy is the part of the server that speaks 2025-11-25, with sessions. Its
// tools are those of the other part, with the same arguments, and two more:
//
//	notify  sends Args.Progress numbered log messages to the session's GET stream
//	ask     asks the client by elicitation/create, and answers what it was told
//
// The answers' streams have no event ids: one that breaks is lost, and whatever a
// client can resume is the gateway's doing. The GET stream has some, and begins
// after the one that is asked for.
type legacy struct {
	mu       sync.Mutex
	sessions map[string]*session
	opened   int
}

type session struct {
	said    []string                 // to the GET stream, all of it; event n is said[n-1]
	more    chan struct{}            // closed when there is more
	answers map[string]chan<- string // what the client was asked, by id
	asked   int
}

// Sessions is how many sessions it holds and has ever opened.
type Sessions struct{ Open, Opened int }

// Sessions asks it.
func (u *Upstream) Sessions() (n Sessions) {
	u.t.Helper()
	u.control(http.MethodGet, "/sessions", "", &n)
	return n
}

// Forget makes it forget its sessions, as a server does that is restarted.
func (u *Upstream) Forget() {
	u.t.Helper()
	u.control(http.MethodPost, "/forget", "", nil)
}

func (l *legacy) count(w http.ResponseWriter, _ *http.Request) {
	l.mu.Lock()
	defer l.mu.Unlock()
	_ = json.NewEncoder(w).Encode(Sessions{len(l.sessions), l.opened}) // to a test that will say if it broke off
}

func (l *legacy) forget(http.ResponseWriter, *http.Request) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.sessions = nil
}

const headerSession = "Mcp-Session-Id"

// of finds the session of a request, or answers that there is none.
func (l *legacy) of(w http.ResponseWriter, r *http.Request) *session {
	l.mu.Lock()
	defer l.mu.Unlock()
	s := l.sessions[r.Header.Get(headerSession)]
	if s == nil {
		w.Header().Set("Content-Type", "application/json")
		w.WriteHeader(http.StatusNotFound)
		_, _ = fmt.Fprint(w, `{"jsonrpc":"2.0","id":null,"error":{"code":-32001,"message":"Session not found"}}`)
	}
	return s
}

// open answers initialize.
func (l *legacy) open(w http.ResponseWriter, id json.RawMessage, revision string) {
	name := rand.Text()
	l.mu.Lock()
	if l.sessions == nil {
		l.sessions = map[string]*session{}
	}
	l.sessions[name] = &session{more: make(chan struct{}), answers: map[string]chan<- string{}}
	l.opened++
	l.mu.Unlock()
	w.Header().Set(headerSession, name)
	w.Header().Set("Content-Type", "application/json")
	_, _ = fmt.Fprintf(w, `{"jsonrpc":"2.0","id":%s,"result":{"protocolVersion":%q,"capabilities":{"tools":{},"logging":{}},"serverInfo":{"name":"counting","version":"1"}}}`, id, revision)
}

// follow is the GET stream of a session.
func (l *legacy) follow(w http.ResponseWriter, r *http.Request) {
	s := l.of(w, r)
	if s == nil {
		return
	}
	w.Header().Set("Content-Type", "text/event-stream")
	w.WriteHeader(http.StatusOK)
	rc := http.NewResponseController(w)
	_ = rc.Flush()
	next, _ := strconv.Atoi(r.Header.Get("Last-Event-Id"))
	for {
		l.mu.Lock()
		said, more := s.said[min(next, len(s.said)):], s.more
		l.mu.Unlock()
		for _, m := range said {
			next++
			if _, err := fmt.Fprintf(w, "id: %d\ndata: %s\n\n", next, m); err != nil || rc.Flush() != nil {
				return
			}
		}
		select {
		case <-more:
		case <-r.Context().Done():
			return
		}
	}
}

func (l *legacy) end(w http.ResponseWriter, r *http.Request) {
	if l.of(w, r) == nil {
		return
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	delete(l.sessions, r.Header.Get(headerSession))
}

// answered takes what a client says to what it was asked.
func (s *session) answered(l *legacy, id json.RawMessage, said string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if to := s.answers[string(id)]; to != nil {
		delete(s.answers, string(id))
		to <- said
	}
}

// ask puts a question to the client, in the stream of a call.
func (s *session) ask(ctx context.Context, l *legacy, say func(string) error) (string, error) {
	answer := make(chan string, 1)
	l.mu.Lock()
	s.asked++
	id := strconv.Itoa(s.asked)
	s.answers[id] = answer
	l.mu.Unlock()
	if err := say(`{"jsonrpc":"2.0","id":` + id + `,"method":"elicitation/create","params":{"message":"Who are you?","requestedSchema":{"type":"object","properties":{"name":{"type":"string"}}}}}`); err != nil {
		return "", err
	}
	select {
	case text := <-answer:
		return text, nil
	case <-ctx.Done():
		return "", ctx.Err()
	}
}

// notify puts n numbered messages into the GET stream.
func (s *session) notify(l *legacy, key string, n int, wait time.Duration) {
	for i := range n {
		<-time.After(wait)
		s.say(l, fmt.Sprintf(`{"jsonrpc":"2.0","method":"notifications/message","params":{"level":"info","data":{"key":%q,"n":%d}}}`, key, i+1))
	}
}

func (s *session) say(l *legacy, m string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	s.said = append(s.said, m)
	close(s.more)
	s.more = make(chan struct{})
}

// revisions are those of this era, all of which it takes.
var revisions = []string{"2025-11-25", "2025-06-18", "2025-03-26"}

// legacyRequest tells whether a request is of this era.
func legacyRequest(r *http.Request, method string) bool {
	return method == "initialize" || r.Header.Get(headerSession) != "" || slices.Contains(revisions, r.Header.Get("Mcp-Protocol-Version"))
}
