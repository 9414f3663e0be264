package mcp_test

import (
	"context"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"waybill.dev/schemas"
)

// FuzzLegacy: whatever comes with a session, the answer is JSON, an event stream
// or nothing, what is stored is sound, and a body that is stored is as it came.
func FuzzLegacy(f *testing.F) {
	f.Add([]byte(slowCall), "2025-11-25", "application/json, text/event-stream", "POST", "")
	f.Add([]byte(`{"jsonrpc":"2.0","method":"notifications/cancelled","params":{"requestId":7}}`), "2025-11-25", "*/*", "POST", "")
	f.Add([]byte(`{"jsonrpc":"2.0","id":"q","result":{}}`), "", "", "POST", "")
	f.Add([]byte(`{"jsonrpc":"2.0","id":1,"method":"resources/read","params":{"uri":"waybill://files/x"}}`), "2025-06-18", "text/event-stream", "POST", "")
	f.Add([]byte(`{"jsonrpc":"2.0","id":1,"method":"completion/complete","params":{"ref":{"name":"files__x_00000000"}}}`), "2025-11-25", "", "POST", "")
	f.Add([]byte(initialize), "2025-11-25", "", "POST", "")
	f.Add([]byte(nil), "2025-11-25", "text/event-stream", "GET", "4-4")
	f.Add([]byte(nil), "2025-11-25", "text/event-stream", "DELETE", "")
	f.Fuzz(func(t *testing.T, body []byte, version, accept, method, last string) {
		log := newMemory(t, func(ctx context.Context, e schemas.Event, emit schemas.Emit) error {
			if e.Data.(*schemas.Requested).Method != "initialize" {
				_, _ = emit(ctx, e.Next(&schemas.Asked{ID: "q"}, []byte(`{"jsonrpc":"2.0","id":1,"method":"roots/list"}`)))
			}
			return answering(initialized)(ctx, e, emit)
		})
		o := log.options()
		store := o.Store
		o.Store = func(ctx context.Context, e schemas.Event) (schemas.Receipt, error) {
			if len(e.Body) > 0 && string(e.Body) != string(body) && string(e.Body) != initialize {
				t.Errorf("body changed: %q", e.Body)
			}
			return store(ctx, e)
		}
		o.Fronts = []*schemas.Front{{Name: schemas.Gateway, Servers: []string{"files"}}}
		s := newServer(t, o)
		opening := httptest.NewRequest("POST", "http://localhost/mcp", strings.NewReader(initialize))
		opening.Header = http.Header{"Content-Type": {"application/json"}}
		w := httptest.NewRecorder()
		s.ServeHTTP(w, opening)
		switch method {
		case "POST", "GET", "DELETE":
		default:
			method = "POST"
		}
		// A stream of the session would last: its client has left already.
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		if method == "GET" {
			cancel()
		}
		r := httptest.NewRequestWithContext(ctx, method, "http://localhost/mcp", strings.NewReader(string(body)))
		r.Header = http.Header{
			"Content-Type": {"application/json"}, "Accept": {accept}, "Mcp-Protocol-Version": {version},
			"Mcp-Session-Id": w.Header()["Mcp-Session-Id"], "Last-Event-Id": {last},
		}
		w = httptest.NewRecorder()
		s.ServeHTTP(w, r)
		switch kind := w.Header().Get("Content-Type"); {
		case w.Code == 202 && w.Body.Len() == 0, w.Code == 204 && w.Body.Len() == 0 && method == "DELETE":
		case kind == "application/json" && (strings.HasPrefix(w.Body.String(), `{"jsonrpc":"2.0",`) || w.Code == 405):
		case kind == "text/event-stream" && w.Code == 200:
		default:
			t.Errorf("%d %q: %s", w.Code, kind, w.Body)
		}
		if s.Stats().Panics != 0 {
			t.Error("panicked")
		}
		for _, e := range log.all() {
			raw, err := e.MarshalJSON()
			if err != nil {
				t.Fatal(err)
			}
			var back schemas.Event
			if err := back.UnmarshalJSON(raw); err != nil {
				t.Errorf("event %s: %v", raw, err)
			}
		}
	})
}
