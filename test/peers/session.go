package peers

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"mime"
	"net/http"
	"strings"
	"sync/atomic"
)

// Endpoint is where a client of the legacy era goes, and what is peculiar to the place.
type Endpoint struct {
	URL    string
	Prefix string // what stands before the names of tools and prompts, such as "everything__"
	Token  string // bearer token, if one is needed

	// Command, if it is there, is what clients start and speak to by stdin and stdout: a program that is the client of the
	// endpoint at a URL.
	Command func(url string) []string

	// dropsLast says that the client forgets who waits for progress when the answer comes with the last of it in one piece.
	dropsLast bool

	// MCPGo says that the server, here or behind the gateway, is MCPGoServer, not server-everything.
	MCPGo bool
	// Direct says that the URL is the server's own, with no gateway in between, and excuses what is peculiar to it.
	Direct bool
}

// command is the command line for the endpoint at a URL; nil without.
func (e Endpoint) command(url string) []string {
	if e.Command == nil {
		return nil
	}
	return e.Command(url)
}

// gone is the status of an answer to who names a session that is gone.
func (e Endpoint) gone() int {
	if e.Direct && !e.MCPGo {
		return http.StatusBadRequest
	}
	return http.StatusNotFound
}

// resumesLive tells whether a stream that is resumed goes on, and does not end with what was stored before.
func (e Endpoint) resumesLive() bool { return !e.Direct || e.MCPGo }

// cutSteps is how many steps [cutOperation] has. mcp-go puts each report of progress on the stream of the call or on the
// GET stream, by chance, so it takes many to have one to cut after.
func (e Endpoint) cutSteps() int {
	if e.MCPGo {
		return 24
	}
	return 3
}

// LegacySession is a session of revision 2025-11-25 or older by plain HTTP, for what SDKs cannot do or hide: cut a
// stream at any byte, resume after any event, answer a question twice, use another's session id. Its methods may be
// called concurrently. Whatever the endpoint answers is handed on as it is; only what is no answer of the protocol
// is an error.
type LegacySession struct {
	Endpoint Endpoint
	ID       string       // the Mcp-Session-Id; "" leaves the header out
	Revision string       // the MCP-Protocol-Version; "" leaves the header out
	Client   *http.Client // nil for http.DefaultClient

	lastID atomic.Int64
}

// OpenLegacy opens a session: initialize with the client's capabilities, and notifications/initialized. It returns the
// result of initialize too. The revision is what the endpoint chose.
func OpenLegacy(ctx context.Context, e Endpoint, revision string, capabilities any) (*LegacySession, json.RawMessage, error) {
	s := &LegacySession{Endpoint: e}
	result, err := s.Open(ctx, revision, capabilities)
	if err != nil {
		return nil, nil, err
	}
	return s, result, nil
}

// Open is OpenLegacy for a session with a client of its own.
func (s *LegacySession) Open(ctx context.Context, revision string, capabilities any) (json.RawMessage, error) {
	stream, err := s.Request(ctx, "initialize", map[string]any{
		"protocolVersion": revision,
		"capabilities":    capabilities,
		"clientInfo":      map[string]any{"name": "waybill-test-http", "version": "1"},
	})
	if err != nil {
		return nil, err
	}
	defer stream.Close()
	answer, err := stream.Answer()
	if err != nil {
		return nil, fmt.Errorf("initialize: %w", err)
	}
	if answer.Error != nil {
		return nil, fmt.Errorf("initialize: %w", answer.Error)
	}
	var chosen struct{ ProtocolVersion string }
	if err := json.Unmarshal(answer.Result, &chosen); err != nil {
		return nil, fmt.Errorf("initialize: %w", err)
	}
	s.ID, s.Revision = stream.Header.Get("Mcp-Session-Id"), chosen.ProtocolVersion
	if s.ID == "" {
		return nil, errors.New("initialize: no Mcp-Session-Id")
	}
	if status, err := s.Send(ctx, Message{Method: "notifications/initialized"}); err != nil || status != http.StatusAccepted {
		return nil, fmt.Errorf("notifications/initialized: status %d, %v", status, err)
	}
	return answer.Result, nil
}

// Message is a JSON-RPC message, either way. Params and Result stay as they came.
type Message struct {
	JSONRPC string          `json:"jsonrpc"`
	ID      json.RawMessage `json:"id,omitempty"`
	Method  string          `json:"method,omitempty"`
	Params  json.RawMessage `json:"params,omitempty"`
	Result  json.RawMessage `json:"result,omitempty"`
	Error   *RPCError       `json:"error,omitempty"`
}

// RPCError is the error of an answer.
type RPCError struct {
	Code    int64           `json:"code"`
	Message string          `json:"message"`
	Data    json.RawMessage `json:"data,omitempty"`
}

func (e *RPCError) Error() string { return fmt.Sprintf("JSON-RPC error %d: %s", e.Code, e.Message) }

// Request posts a request with an id of its own and returns what comes in answer, from its head on. The stream must be closed.
func (s *LegacySession) Request(ctx context.Context, method string, params any) (*LegacyStream, error) {
	id := s.lastID.Add(1)
	message := Message{ID: fmt.Append(nil, id), Method: method}
	if params != nil {
		raw, err := json.Marshal(params)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", method, err)
		}
		message.Params = raw
	}
	stream, err := s.post(ctx, message)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", method, err)
	}
	return stream, nil
}

// Call posts a request and returns its answer; other messages of its stream are dropped. An error that the endpoint
// answers is an [*RPCError].
func (s *LegacySession) Call(ctx context.Context, method string, params any) (json.RawMessage, error) {
	stream, err := s.Request(ctx, method, params)
	if err != nil {
		return nil, err
	}
	defer stream.Close()
	answer, err := stream.Answer()
	if err != nil {
		return nil, fmt.Errorf("%s: %w", method, err)
	}
	if answer.Error != nil {
		return nil, fmt.Errorf("%s: %w", method, answer.Error)
	}
	return answer.Result, nil
}

// Send posts a notification or an answer and returns the status, which ought to be 202.
func (s *LegacySession) Send(ctx context.Context, message Message) (status int, err error) {
	stream, err := s.post(ctx, message)
	if err != nil {
		return 0, err
	}
	return stream.Status, stream.Close()
}

// Listen opens the session's GET stream; after an event id, it resumes the stream which that event is of.
func (s *LegacySession) Listen(ctx context.Context, after string) (*LegacyStream, error) {
	stream, err := s.do(ctx, http.MethodGet, "", nil, after)
	if err != nil {
		return nil, fmt.Errorf("listening after %q: %w", after, err)
	}
	return stream, nil
}

// Delete ends the session and returns the status.
func (s *LegacySession) Delete(ctx context.Context) (status int, err error) {
	stream, err := s.do(ctx, http.MethodDelete, "", nil, "")
	if err != nil {
		return 0, fmt.Errorf("deleting the session: %w", err)
	}
	return stream.Status, stream.Close()
}

func (s *LegacySession) post(ctx context.Context, message Message) (*LegacyStream, error) {
	message.JSONRPC = "2.0"
	body, err := json.Marshal(message)
	if err != nil {
		return nil, err
	}
	stream, err := s.do(ctx, http.MethodPost, "application/json", body, "")
	if err != nil {
		return nil, err
	}
	stream.ID = message.ID
	return stream, nil
}

func (s *LegacySession) do(ctx context.Context, method, contentType string, body []byte, after string) (*LegacyStream, error) {
	r, err := http.NewRequestWithContext(ctx, method, s.Endpoint.URL, bytes.NewReader(body))
	if err != nil {
		return nil, err
	}
	r.Header.Set("Accept", "application/json, text/event-stream")
	for name, value := range map[string]string{
		"Content-Type":         contentType,
		"Mcp-Session-Id":       s.ID,
		"MCP-Protocol-Version": s.Revision,
		"Last-Event-ID":        after,
	} {
		if value != "" {
			r.Header.Set(name, value)
		}
	}
	if s.Endpoint.Token != "" {
		r.Header.Set("Authorization", "Bearer "+s.Endpoint.Token)
	}
	client := s.Client
	if client == nil {
		client = http.DefaultClient
	}
	resp, err := client.Do(r)
	if err != nil {
		return nil, err
	}
	return newLegacyStream(resp), nil
}

// ErrCut ends a stream of which the bytes that [LegacyStream.CutAfter] allowed have been read.
var ErrCut = errors.New("cut on purpose")

// LegacyStream is what an endpoint answers: a stream of events, or one JSON document, which is then the only event. It
// is for one goroutine.
type LegacyStream struct {
	ID     json.RawMessage // of the request that it answers
	Status int
	Header http.Header
	LastID string // id of the last event that was read whole; what to resume after

	resp  *http.Response
	media string
	in    *bufio.Reader
	left  *int64 // bytes until the cut; nil for no cut
}

// LegacyEvent is one event of a stream.
type LegacyEvent struct {
	ID    string // "" if it came without
	Retry string
	Data  []byte // empty for an event that only names its id
}

func newLegacyStream(resp *http.Response) *LegacyStream {
	media, _, _ := mime.ParseMediaType(resp.Header.Get("Content-Type"))
	s := &LegacyStream{Status: resp.StatusCode, Header: resp.Header, resp: resp, media: media}
	s.in = bufio.NewReader(readerFunc(s.read))
	return s
}

type readerFunc func([]byte) (int, error)

func (f readerFunc) Read(b []byte) (int, error) { return f(b) }

func (s *LegacyStream) read(b []byte) (int, error) {
	if s.left == nil {
		return s.resp.Body.Read(b)
	}
	if *s.left <= 0 {
		_ = s.resp.Body.Close() // this is the cut: the connection goes, because the body was not read to its end
		return 0, ErrCut
	}
	n, err := s.resp.Body.Read(b[:min(int64(len(b)), *s.left)])
	*s.left -= int64(n)
	return n, err
}

// CutAfter closes the connection once n more bytes of the stream's body have come: [LegacyStream.Next] then
// returns [ErrCut]. It is to be called before the first event is read.
func (s *LegacyStream) CutAfter(n int64) { s.left = &n }

// Next returns the next event. At the stream's end that is io.EOF; a stream that breaks off within an event is
// io.ErrUnexpectedEOF, and the event is lost.
func (s *LegacyStream) Next() (LegacyEvent, error) {
	if s.media != "text/event-stream" {
		data, err := io.ReadAll(s.in)
		if err == nil && len(data) == 0 {
			err = io.EOF
		}
		return LegacyEvent{Data: data}, err
	}
	var event LegacyEvent
	begun := false
	for {
		line, err := s.in.ReadString('\n')
		if err != nil {
			if err == io.EOF && (begun || line != "") {
				err = io.ErrUnexpectedEOF
			}
			return LegacyEvent{}, err
		}
		line = strings.TrimSuffix(strings.TrimSuffix(line, "\n"), "\r")
		if line == "" {
			if !begun {
				continue
			}
			if event.ID != "" {
				s.LastID = event.ID
			}
			event.Data = bytes.TrimSuffix(event.Data, []byte("\n"))
			return event, nil
		}
		name, value, _ := strings.Cut(line, ":")
		value = strings.TrimPrefix(value, " ")
		switch name {
		case "": // a comment
			continue
		case "id":
			event.ID = value
		case "retry":
			event.Retry = value
		case "data":
			event.Data = append(append(event.Data, value...), '\n')
		case "event":
			if value != "message" {
				return LegacyEvent{}, fmt.Errorf("an event of type %q", value)
			}
		default:
			return LegacyEvent{}, fmt.Errorf("a line that is no field of an event: %q", line)
		}
		begun = true
	}
}

// Message returns the next event that carries a message, and the message.
func (s *LegacyStream) Message() (LegacyEvent, Message, error) {
	for {
		event, err := s.Next()
		if err != nil {
			return event, Message{}, err
		}
		if len(event.Data) == 0 {
			continue
		}
		var m Message
		if err := json.Unmarshal(event.Data, &m); err != nil {
			return event, m, fmt.Errorf("status %d, no JSON-RPC message: %w: %.200q", s.Status, err, event.Data)
		}
		return event, m, nil
	}
}

// Answer reads on to the answer of the stream's request and returns it.
func (s *LegacyStream) Answer() (Message, error) {
	for {
		_, m, err := s.Message()
		if err != nil {
			return m, err
		}
		if m.Method == "" && (bytes.Equal(m.ID, s.ID) || s.media != "text/event-stream") {
			return m, nil
		}
	}
}

// Close leaves the stream. One that has not ended is cut off with that.
func (s *LegacyStream) Close() error { return s.resp.Body.Close() }
