package dispatch

import (
	"io"
	"net/http"
	"strings"
	"testing"

	"waybill.dev/schemas"
	"waybill.dev/schemas/jsonrpc"
)

// TestTraceContext: a server is told that the call is what calls it, in headers
// always and in the body where it has to be; nothing else of the body changes.
func TestTraceContext(t *testing.T) {
	const theirs = "00-11111111111111111111111111111111-2222222222222222-00"
	for _, tt := range []struct {
		what, meta, want string // of _meta; $P and $S: what the server is told
		method           string // default tools/call
		traced           bool
	}{
		{"nobody says anything", `"_meta":{"k":1E400}`, `"_meta":{"k":1E400}`, "", false},
		{"without _meta", `"z":1`, `"z":1`, "", false},
		{"the caller says it in the body", `"_meta":{"k":1E400, "traceparent" : "` + theirs + `" }`, `"_meta":{"k":1E400, "traceparent" : "$P","tracestate":"$S" }`, "", false},
		{"all of it", `"_meta":{"tracestate":"a=b","traceparent":"` + theirs + `"}`, `"_meta":{"tracestate":"$S","traceparent":"$P"}`, "", false},
		{"badly", `"_meta":{"traceparent":7}`, `"_meta":{"traceparent":"$P","tracestate":"$S"}`, "", false},
		{"with escapes", `"_meta":{"\u0074raceparent":"` + theirs + `"}`, `"_meta":{"\u0074raceparent":"$P","tracestate":"$S"}`, "", false},
		{"in another method", `"_meta":{"traceparent":"` + theirs + `"}`, `"_meta":{"traceparent":"$P","tracestate":"$S"}`, "tools/list", false},
		{"under a name that somebody may take for it", `"_meta":{"Traceparent":"x"}`, `"_meta":{"Traceparent":"x"}`, "", true},
		{"the gateway is traced", `"_meta":{"k":1E400}`, `"_meta":{"k":1E400,"traceparent":"$P","tracestate":"$S"}`, "", true},
		{"and there is no _meta", `"z":1`, `"z":1,"_meta":{"traceparent":"$P","tracestate":"$S"}`, "", true},
		{"or one that is none", `"_meta":[]`, `"_meta":[]`, "", true},
		{"and nothing is run", `"_meta":{}`, `"_meta":{}`, "tools/list", true},
	} {
		t.Run(tt.what, func(t *testing.T) {
			var body string
			var header http.Header
			r := newRig(t, func(w http.ResponseWriter, req *http.Request) {
				b, _ := io.ReadAll(req.Body)
				body, header = string(b), req.Header.Clone()
				m, _ := jsonrpc.Decode(b, jsonrpc.Limits{})
				answerJSON(w, http.StatusOK, `{"jsonrpc":"2.0","id":`+string(m.ID().Raw())+`,"result":{"resultType":"complete"}}`)
			}, func(o *Options) { o.Traced = tt.traced })
			method, name := "tools/call", "t"
			if tt.method != "" {
				method, name = tt.method, ""
			}
			said := func(id, meta string) string {
				if name != "" {
					meta = `"name":"t", ` + meta
				}
				return `{"jsonrpc":"2.0","id":` + id + `,"method":"` + method + `","params":{` + meta + `}}`
			}
			e := r.method(method, name, said("1", tt.meta), func(e *schemas.Event) { e.TraceState = "other=1,waybill=0123456789abcdef" })
			r.handle(e)
			r.want("completed")
			parent, state := e.Onward(nil)
			if want := said(`"`+string(e.Call)+`"`, strings.NewReplacer("$P", parent, "$S", state).Replace(tt.want)); body != want {
				t.Errorf("sent %s\nwant %s", body, want)
			}
			if got := header["Traceparent"]; len(got) != 1 || got[0] != parent || !strings.HasPrefix(parent, "00-0af7651916cd43dd8448eb211c80319c-"+e.Call.Span(schemas.PartUpstream)) {
				t.Errorf("traceparent %q, want %s", got, parent)
			}
			if got, want := header["Tracestate"], "waybill="+e.Call.Span(schemas.PartUpstream)+",other=1"; len(got) != 1 || got[0] != want {
				t.Errorf("tracestate %q, want %s", got, want)
			}
		})
	}
}
