package dispatch

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"unicode/utf8"

	"github.com/modelcontextprotocol/go-sdk/mcp"

	"waybill.dev/schemas"
	"waybill.dev/schemas/jsonrpc"
)

// What a tool says of headers, and the headers that a call gets.
func TestMirrors(t *testing.T) {
	for _, tt := range []struct{ schema, arguments, want string }{
		{`{"properties":{"a":{"type":"string"}}}`, `{"a":"x"}`, `map[]`},
		{`{"properties":{"a":{"type":"string","x-mcp-header":"Region"}}}`, `{"a":"eu west"}`, `map[Mcp-Param-Region:eu west]`},
		{`{"properties":{"a":{"type":"string","x-mcp-header":"rEGION"}}}`, `{"a":" x"}`, `map[Mcp-Param-Region:=?base64?IHg=?=]`},
		{`{"properties":{"a":{"type":"string","\u0078-mcp-header":"A"}}}`, `{"a":""}`, `map[Mcp-Param-A:=?base64??=]`},
		{`{"properties":{"a":{"type":"string","x-mcp-header":"A"}}}`, `{"a":"日本"}`, `map[Mcp-Param-A:=?base64?5pel5pys?=]`},
		{`{"properties":{"a":{"type":"string","x-mcp-header":"A"}}}`, `{"a":"1\r\nX: 2"}`, `map[Mcp-Param-A:=?base64?MQ0KWDogMg==?=]`},
		{`{"properties":{"a":{"type":"string","x-mcp-header":"A"}}}`, `{"a":"=?base64?eA==?="}`, `map[Mcp-Param-A:=?base64?PT9iYXNlNjQ/ZUE9PT89?=]`},
		{`{"properties":{"a":{"type":"string","x-mcp-header":"A"}}}`, `{"a":null}`, `map[]`},
		{`{"properties":{"a":{"type":"string","x-mcp-header":"A"}}}`, `{"a":{"b":1}}`, `map[]`},
		{`{"properties":{"a":{"type":"boolean","x-mcp-header":"A"},"b":{"x-mcp-header":"B","type":"integer"}}}`, `{"a":false,"b":-12}`, `map[Mcp-Param-A:false Mcp-Param-B:-12]`},
		{`{"properties":{"a":{"type":"integer","x-mcp-header":"A"},"b":{"type":"integer","x-mcp-header":"B"}}}`, `{"a":1.0,"b":1.5}`, `map[Mcp-Param-A:1]`},
		{`{"properties":{"a":{"type":"integer","x-mcp-header":"A"},"b":{"type":"integer","x-mcp-header":"B"}}}`, `{"a":9007199254740992,"b":9007199254740991}`, `map[Mcp-Param-B:9007199254740991]`},
		{`{"properties":{"o":{"type":"object","properties":{"in.ner":{"type":"string","x-mcp-header":"A"}}}}}`, `{"o":{"in.ner":"x"},"in.ner":"y"}`, `map[Mcp-Param-A:x]`},
		{`{"properties":{"a":{"type":"string","x-mcp-header":"A"}}}`, `{"a":"` + strings.Repeat("x", maxParamBytes) + `"}`, `map[]`},
		// What only looks like it: an argument of that name, and data.
		{`{"properties":{"x-mcp-header":{"type":"string"},"a":{"type":"object","default":{"x-mcp-header":5},"enum":[{"x-mcp-header":""}]}}}`, `{"x-mcp-header":"x"}`, `map[]`},
		{`true`, `{}`, `map[]`},

		{`{"properties":{"a":{"type":"number","x-mcp-header":"A"}}}`, ``, `its argument a has an x-mcp-header and is no string, integer or boolean`},
		{`{"properties":{"a":{"type":["string","null"],"x-mcp-header":"A"}}}`, ``, `its argument a has an x-mcp-header and is no string, integer or boolean`},
		{`{"properties":{"a":{"x-mcp-header":"A"}}}`, ``, `its argument a has an x-mcp-header and is no string, integer or boolean`},
		{`{"properties":{"a":{"type":"string","x-mcp-header":""}}}`, ``, `the x-mcp-header of its argument a is no name of a header`},
		{`{"properties":{"a":{"type":"string","x-mcp-header":5}}}`, ``, `the x-mcp-header of its argument a is no name of a header`},
		{`{"properties":{"o":{"properties":{"a":{"type":"string","x-mcp-header":"A: b"}}}}}`, ``, `the x-mcp-header of its argument o.a is no name of a header`},
		{`{"properties":{"a":{"type":"string","x-mcp-header":"A"},"b":{"type":"string","x-mcp-header":"a"}}}`, ``, `two of its arguments have the header Mcp-Param-A`},
		{`{"properties":{"a":{"type":"string","x-mcp-header":"A"},"o":{"properties":{"b":{"type":"string","x-mcp-header":"a"}}}}}`, ``, `two of its arguments have the header Mcp-Param-A`},
		{`{"type":"string","x-mcp-header":"A"}`, ``, `it has an x-mcp-header where there is no argument`},
		{`{"properties":{"a":{"type":"array","items":{"type":"string","x-mcp-header":"A"}}}}`, ``, `it has an x-mcp-header where there is no argument`},
		{`{"properties":{"a":{"anyOf":[{"type":"string","x-mcp-header":"A"}]}}}`, ``, `it has an x-mcp-header where there is no argument`},
		{`{"$defs":{"a":{"properties":{"b":{"type":"string","x-mcp-header":"A"}}}}}`, ``, `it has an x-mcp-header where there is no argument`},
		{strings.Repeat(`{"not":`, 100) + `{"x-mcp-header":1}` + strings.Repeat(`}`, 100), ``, `its input schema is nested too deeply`},
	} {
		tool := `{"name":"t","inputSchema":` + tt.schema + `}`
		v, err := jsonrpc.Parse([]byte(tool), jsonrpc.Limits{Depth: answerDepth})
		if err != nil {
			t.Fatal(err)
		}
		found, err := mirrors(v)
		got := fmt.Sprint(err)
		if err == nil {
			arguments, err := jsonrpc.Parse([]byte(tt.arguments), jsonrpc.Limits{})
			if err != nil {
				t.Fatal(err)
			}
			headers := paramHeaders(found, arguments)
			got = fmt.Sprint(headers)
			for name, value := range headers {
				if !headerName(name) || !headerValue(value) {
					t.Errorf("%s: %q cannot be sent", name, value)
				}
			}
		}
		if got != tt.want {
			t.Errorf("%s with %.100s:\ngot  %s\nwant %s", tt.schema, tt.arguments, got, tt.want)
		}
	}
}

// FuzzMirrors: whatever a definition and arguments say, the headers can be sent,
// are told apart without regard to case, and say what the arguments say.
func FuzzMirrors(f *testing.F) {
	f.Add(`{"properties":{"a":{"type":"string","x-mcp-header":"A"},"o":{"properties":{"b":{"type":"integer","x-mcp-header":"B"}}}}}`, `{"a":"x","o":{"b":-1e2}}`)
	f.Add(`{"properties":{"a":{"type":"boolean","x-mcp-header":"a-\u0041"}},"items":{"x-mcp-header":1}}`, `{"a":true}`)
	f.Add(`{"\u0070roperties":{"a\ud800":{"type":"string","x-mcp-header":"~"}},"$defs":{"a":{"anyOf":[{}]}}}`, `{"a\ud800":"=?base64??="}`)
	f.Add(strings.Repeat(`{"properties":{"a":`, 100)+`{"type":"string","x-mcp-header":"A"}`+strings.Repeat(`}}`, 100), `{}`)
	f.Fuzz(func(t *testing.T, schema, arguments string) {
		tool, err := jsonrpc.Parse([]byte(`{"inputSchema":`+schema+`}`), jsonrpc.Limits{Depth: answerDepth})
		if err != nil {
			return
		}
		args, err := jsonrpc.Parse([]byte(arguments), jsonrpc.Limits{})
		if err != nil {
			return
		}
		all, err := mirrors(tool)
		if err != nil {
			if all != nil || !utf8.ValidString(err.Error()) {
				t.Errorf("%q with %v", err, all)
			}
			return
		}
		headers := paramHeaders(all, args)
		if len(headers) > maxParams {
			t.Errorf("%d headers", len(headers))
		}
		seen := map[string]bool{}
		for _, m := range all {
			value, sent := headers[m.header]
			if lower := strings.ToLower(m.header); seen[lower] || !headerName(m.header) || !strings.HasPrefix(m.header, paramPrefix) || !headerValue(value) {
				t.Errorf("%q: %q", m.header, value)
			} else {
				seen[lower] = true
			}
			text, isText := args.Get(m.path...).Text()
			if isText != (sent && args.Get(m.path...).Kind() == jsonrpc.String) && headers != nil {
				t.Errorf("%q: %q of %q", m.header, value, text)
			}
			if sent && isText {
				if b, ok := strings.CutPrefix(value, "=?base64?"); ok && strings.HasSuffix(b, "?=") {
					raw, err := base64.StdEncoding.DecodeString(strings.TrimSuffix(b, "?="))
					if value = string(raw); err != nil {
						t.Error(err)
					}
				}
				if value != text {
					t.Errorf("%q says %q of %q", m.header, value, text)
				}
			}
		}
	})
}

// A server of the official SDK, which refuses a call without the headers that
// its tools want, gets them from call_many: by one more call, after one list for
// all of them.
func TestCallManyHeaders(t *testing.T) {
	leaks(t)
	var acted atomic.Int32
	server := mcp.NewServer(&mcp.Implementation{Name: "upstream", Version: "1"}, nil)
	for name, schema := range map[string]string{
		"plain": `{"type":"object"}`,
		"mirror": `{"type":"object","properties":{"region":{"type":"string","x-mcp-header":"Region"},
			"size":{"type":"object","properties":{"n":{"type":"integer","x-mcp-header":"N"}}},"now":{"type":"boolean","x-mcp-header":"Now"}}}`,
	} {
		server.AddTool(&mcp.Tool{Name: name, InputSchema: json.RawMessage(schema)}, func(_ context.Context, req *mcp.CallToolRequest) (*mcp.CallToolResult, error) {
			acted.Add(1)
			return &mcp.CallToolResult{Content: []mcp.Content{&mcp.TextContent{Text: string(req.Params.Arguments)}}}, nil
		})
	}
	h := httptest.NewServer(mcp.NewStreamableHTTPHandler(func(*http.Request) *mcp.Server { return server }, &mcp.StreamableHTTPOptions{Stateless: true}))
	defer h.Close()
	w := newTown(t, nil, func(o *Options) {
		o.Servers = append(o.Servers, Server{Name: "a", URL: h.URL, Era: EraClient})
		o.Fronts[0].Servers = []string{"a", schemas.Gateway}
	})
	defer w.d.Close()
	const arguments = `{"region":"Zürich","size":{"n":1e3},"now":true}`
	m := w.many(t, `{"calls":[{"tool":"a__mirror","arguments":`+arguments+`},{"tool":"a__plain","arguments":`+arguments+`},{"tool":"a__mirror","arguments":{"region":"x"}},{"tool":"a__mirror"}]}`)
	s := m.StructuredContent
	if s.OK != 4 || acted.Load() != 4 || !strings.Contains(string(s.Results[0].Result), `Zürich`) {
		t.Fatalf("%d acted: %+v", acted.Load(), m)
	}
	var came []string
	for _, e := range w.children() {
		q := e.Data.(*schemas.Requested)
		came = append(came, fmt.Sprint(q.Method, " ", q.Name, " ", q.Headers))
		if len(q.Headers) > 0 && string(e.Call) != s.Results[0].Call && string(e.Call) != s.Results[2].Call {
			t.Errorf("%s is not the call that is answered", e.Call)
		}
	}
	slices.Sort(came)
	want := []string{
		"tools/call mirror map[Mcp-Param-N:1000 Mcp-Param-Now:true Mcp-Param-Region:=?base64?WsO8cmljaA==?=]",
		"tools/call mirror map[Mcp-Param-Region:x]",
		"tools/call mirror map[]", "tools/call mirror map[]", "tools/call mirror map[]",
		"tools/call plain map[]",
		"tools/list  map[]",
	}
	if !slices.Equal(came, want) {
		t.Errorf("got\n%s\nwant\n%s", strings.Join(came, "\n"), strings.Join(want, "\n"))
	}

	// A list that the caller may not see gives no headers: the refusal stands.
	w.allow = func(q *schemas.Requested) (bool, []string) { return q.Method != "tools/list", nil }
	m = w.many(t, `{"tool":"mirror","servers":["a"],"arguments":{"region":"x"}}`)
	if r := m.StructuredContent.Results[0]; r.OK || r.Error == nil || fmt.Sprint(r.Error.Code) != "-32020" || acted.Load() != 4 {
		t.Errorf("%+v %+v", m, r.Error)
	}
}

// A definition whose headers are wrong is left out of every list of tools, which
// is told, and only where the revision knows of them.
func TestFrontInvalidHeaders(t *testing.T) {
	const (
		good   = `{"name":"good","inputSchema":{"properties":{"a":{"type":"string","x-mcp-header":"A"}}}}`
		number = `{"name":"number","inputSchema":{"properties":{"a":{"type":"number","x-mcp-header":"A"}}}}`
		twice  = `{"name":"twice","inputSchema":{"properties":{"a":{"type":"string","x-mcp-header":"A"},"b":{"type":"string","x-mcp-header":"a"}}}}`
		space  = `{"name":"space","inputSchema":{"properties":{"a":{"type":"string","x-mcp-header":"A b"}}}}`
		note   = `"dev.waybill/servers":{"a":{"error":"invalid_elements","message":"3 of its elements are left out. The first: number: its argument a has an x-mcp-header and is no string, integer or boolean."}}}}`
	)
	view := &schemas.Front{Name: "v", Servers: []string{"a"}, Exposed: []schemas.Exposed{{Server: "a", Tool: "twice"}, {Server: "a", Tool: "good"}}}
	w := newTown(t, map[string]script{"a": lister(`[` + number + `,` + good + `,` + twice + `,` + space + `]`)},
		func(o *Options) { o.Fronts = append(o.Fronts, view); o.Fanout.Tools = []string{findTools} })
	w.allow = func(q *schemas.Requested) (bool, []string) { return true, nil }
	shown := strings.Replace(good, "good", "a__good", 1)
	got := w.result(schemas.Gateway, "tools/list", "", `{`+fanMeta+`}`)
	if !strings.HasPrefix(got, `"result":{"tools":[`+shown+`,{"name":"waybill__find_tools"`) || !strings.HasSuffix(got, note) {
		t.Error(got)
	}
	got = w.result("v", "tools/list", "", `{`+fanMeta+`}`)
	if !strings.HasPrefix(got, `"result":{"tools":[`+good+`],`) || !strings.HasSuffix(got, note) {
		t.Error(got)
	}
	got = w.result(schemas.Gateway, "tools/call", findTools, `{"name":"find_tools","arguments":{"query":"number good twice space"},`+fanMeta+`}`)
	if !strings.Contains(got, "1 of 1 tools fit") || !strings.Contains(got, "invalid_elements") {
		t.Error(got)
	}
	got = w.result(schemas.Gateway, "tools/list", "", `{}`, older)
	for _, tool := range []string{number, good, twice, space} {
		if !strings.Contains(got, strings.Replace(tool, `{"name":"`, `{"name":"a__`, 1)) {
			t.Errorf("%s is not in %s", tool, got)
		}
	}
}

// Only a refusal in the protocol's form says that nothing was carried out, and a
// server that goes on refusing is not called a third time.
func TestCallManyHeadersOnce(t *testing.T) {
	var other, refused atomic.Int32
	answer := func(status int, n *atomic.Int32) script {
		list := lister(`[{"name":"t","inputSchema":{"properties":{"a":{"type":"string","x-mcp-header":"A"}}}}]`)
		return func(method string, m *jsonrpc.Message) said {
			if method != "tools/call" {
				return list(method, m)
			}
			n.Add(1)
			return said{status: status, err: `{"code":-32020,"message":"Header mismatch"}`}
		}
	}
	w := newTown(t, map[string]script{"other": answer(200, &other), "refuses": answer(400, &refused)})
	m := w.many(t, `{"tool":"t","servers":["*"],"arguments":{"a":"x"}}`)
	if m.StructuredContent.Failed != 2 || other.Load() != 1 || refused.Load() != 2 {
		t.Errorf("%d and %d calls: %+v", other.Load(), refused.Load(), m)
	}
	for _, r := range m.StructuredContent.Results {
		if r.Error == nil || fmt.Sprint(r.Error.Code) != "-32020" {
			t.Errorf("%+v", r)
		}
	}
	// What it wants is not there to be sent.
	if m = w.many(t, `{"tool":"t","servers":["refuses"],"arguments":{"a":null}}`); m.StructuredContent.Failed != 1 || refused.Load() != 3 {
		t.Errorf("%d calls: %+v", refused.Load(), m)
	}
}
