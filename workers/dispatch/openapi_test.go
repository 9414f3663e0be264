package dispatch

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"html"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"waybill.dev/schemas"
	"waybill.dev/schemas/jsonrpc"
)

var update = flag.Bool("update", false, "rewrite the golden files of testdata")

// api is a REST API, and the connection to it that is tested.
type api struct {
	t    testing.TB
	http *httptest.Server
	conn Connection
	file string // of the document, if it is the test's own
	now  time.Time
	logs *lockedBuffer

	mu   sync.Mutex
	seen []seenRequest
}

type seenRequest struct {
	line   string // GET /path?query
	header http.Header
	body   string
}

// lockedBuffer is written by the code and read by the test.
type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lockedBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lockedBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// newAPI serves h and makes tools of a document: a file of testdata/openapi, or
// the text of one.
func newAPI(t testing.TB, document string, h http.HandlerFunc, change ...func(*Server, *Options)) *api {
	t.Helper()
	a := &api{t: t, now: time.Now().Add(time.Hour), logs: &lockedBuffer{}}
	a.http = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(r.Body)
		if err != nil {
			t.Errorf("reading the request: %v", err)
		}
		a.mu.Lock()
		a.seen = append(a.seen, seenRequest{r.Method + " " + r.RequestURI, r.Header, string(body)})
		a.mu.Unlock()
		r.Body = io.NopCloser(bytes.NewReader(body))
		if h == nil {
			t.Errorf("a request came: %s %s", r.Method, r.RequestURI)
			return
		}
		h(w, r)
	}))
	t.Cleanup(a.http.Close)
	if strings.Contains(document, "\n") {
		a.file = filepath.Join(t.TempDir(), "api.yaml")
		a.write(document)
	} else {
		a.file = filepath.Join("testdata", "openapi", document)
	}
	s := Server{Name: "rest", Concurrency: 8, OpenAPI: &OpenAPI{Document: a.file, BaseURL: a.http.URL}}
	opt := Options{
		MaxAnswer: 1 << 20, Now: func() time.Time { return a.now },
		Log: slog.New(slog.NewTextHandler(a.logs, nil)),
	}
	for _, f := range change {
		f(&s, &opt)
	}
	conn, err := openOpenAPI(s, opt)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(conn.Close)
	a.conn = conn
	return a
}

func (a *api) write(document string) {
	a.t.Helper()
	if err := os.WriteFile(a.file, []byte(document), 0o600); err != nil {
		a.t.Fatal(err)
	}
}

// requests are those that came since it was last asked.
func (a *api) requests() []seenRequest {
	a.mu.Lock()
	defer a.mu.Unlock()
	seen := a.seen
	a.seen = nil
	return seen
}

const modernRevision = "2026-07-28"

// ask asks the connection and returns the answer, or the fault.
func (a *api) ask(revision, method, params string, change ...func(*Call)) (Answer, error) {
	name := ""
	var p struct {
		Name string `json:"name"`
	}
	if method == "tools/call" && json.Unmarshal([]byte(params), &p) == nil {
		name = p.Name
	}
	c := Call{
		ID:        "01J9ZW3K5Q8V7T2M4N6P0R1S2T",
		Requested: &schemas.Requested{Target: schemas.Target{Protocol: "mcp", Server: "rest", Method: method, Name: name}, Revision: revision},
		Body:      fmt.Appendf(nil, `{"jsonrpc":"2.0","id":7,"method":%q,"params":%s}`, method, params),
		Connected: func() {}, Heard: func() {},
	}
	for _, f := range change {
		f(&c)
	}
	return a.conn.Call(a.t.Context(), c, func([]byte) error { a.t.Error("progress"); return nil })
}

// result is the result of a call that must have one.
func (a *api) result(revision, method, params string) jsonrpc.Value {
	a.t.Helper()
	answer, err := a.ask(revision, method, params)
	if err != nil {
		a.t.Fatalf("%s: %v", method, err)
	}
	m, err := jsonrpc.Decode(answer.Body, jsonrpc.Limits{Depth: answerDepth})
	if err != nil {
		a.t.Fatalf("%s: %v\n%s", method, err, answer.Body)
	}
	if id, _ := m.ID().Text(); id != "01J9ZW3K5Q8V7T2M4N6P0R1S2T" {
		a.t.Errorf("%s: the answer has id %s", method, m.ID().Raw())
	}
	if !m.Result().Exists() {
		a.t.Fatalf("%s: %s", method, answer.Body)
	}
	return m.Result()
}

// tool calls a tool and returns the text of its content, and the result.
func (a *api) tool(name, arguments string) (string, jsonrpc.Value) {
	a.t.Helper()
	r := a.result(modernRevision, "tools/call", fmt.Sprintf(`{"name":%q,"arguments":%s}`, name, arguments))
	var texts []string
	for c := range r.Get("content").Elements() {
		if text, ok := c.Get("text").Text(); ok {
			texts = append(texts, text)
		}
	}
	return strings.Join(texts, "\n"), r
}

func isError(r jsonrpc.Value) bool { b, _ := r.Get("isError").Bool(); return b }

func answerWith(status int, contentType, body string) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) {
		if contentType != "" {
			w.Header().Set("Content-Type", contentType)
		}
		w.WriteHeader(status)
		_, _ = io.WriteString(w, body)
	}
}

// What becomes of whole documents: the tools, and what the report says.
func TestOpenAPIGolden(t *testing.T) {
	for _, name := range []string{"petstore", "github", "open-meteo", "nws"} {
		t.Run(name, func(t *testing.T) {
			a := newAPI(t, name+".yaml", nil)
			var out bytes.Buffer
			report, err := ImportOpenAPI(Server{OpenAPI: &OpenAPI{Document: a.file, BaseURL: "https://api.example"}})
			if err != nil {
				t.Fatal(err)
			}
			for _, u := range report {
				fmt.Fprintf(&out, "// %s\n", u)
			}
			list := a.result("2025-11-25", "tools/list", `{}`)
			if err := json.Indent(&out, list.Raw(), "", "\t"); err != nil {
				t.Fatal(err)
			}
			out.WriteByte('\n')
			golden(t, filepath.Join("testdata", "openapi", name+".golden"), out.Bytes())
		})
	}
}

func golden(t *testing.T, file string, got []byte) {
	t.Helper()
	if *update {
		if err := os.WriteFile(file, got, 0o666); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		t.Errorf("%s differs; see with -update and git diff. Now:\n%s", file, got)
	}
}

// Both eras hear what their revision has for it.
func TestOpenAPIEras(t *testing.T) {
	a := newAPI(t, "petstore.yaml", nil)
	for _, c := range []struct{ revision, method, params, want string }{
		{modernRevision, "server/discover", `{}`, `{"_meta":{"io.modelcontextprotocol/serverInfo":{"name":"rest","title":"Petstore","version":"1.0.27"}},` +
			`"cacheScope":"private","capabilities":{"tools":{}},"instructions":"Pets, orders for pets, and the people who order them.",` +
			`"resultType":"complete","supportedVersions":["2026-07-28","2025-11-25","2025-06-18","2025-03-26"],"ttlMs":60000}`},
		{"2025-11-25", "initialize", `{"protocolVersion":"2025-11-25"}`, `{"capabilities":{"tools":{}},"instructions":"Pets, orders for pets, and the people who order them.",` +
			`"protocolVersion":"2025-11-25","serverInfo":{"name":"rest","title":"Petstore","version":"1.0.27"}}`},
		{"2025-03-26", "initialize", `{"protocolVersion":"2025-03-26"}`, `{"capabilities":{"tools":{}},"instructions":"Pets, orders for pets, and the people who order them.",` +
			`"protocolVersion":"2025-03-26","serverInfo":{"name":"rest","version":"1.0.27"}}`},
		{"2025-06-18", "ping", `{}`, `{}`},
	} {
		if got := string(a.result(c.revision, c.method, c.params).Raw()); got != c.want {
			t.Errorf("%s %s:\n%s\nwant\n%s", c.revision, c.method, got, c.want)
		}
	}
	list := func(revision string) jsonrpc.Value { return a.result(revision, "tools/list", `{}`) }
	if l := list(modernRevision); string(l.Get("ttlMs").Raw()) != "60000" || string(l.Get("cacheScope").Raw()) != `"private"` || string(l.Get("resultType").Raw()) != `"complete"` {
		t.Errorf("a list of now: %s", l.Raw())
	}
	for tool := range list("2025-03-26").Get("tools").Elements() {
		if tool.Get("outputSchema").Exists() || tool.Get("title").Exists() {
			t.Errorf("2025-03-26 hears of %s", tool.Raw())
		}
	}
	for _, method := range []string{"resources/list", "prompts/list", "completion/complete", "subscriptions/listen", "logging/setLevel", "x/y"} {
		answer, err := a.ask("2025-11-25", method, `{}`)
		if err != nil || answer.ErrorCode != jsonrpc.CodeMethodNotFound || !answer.Local {
			t.Errorf("%s: %+v, %v", method, answer, err)
		}
	}
	answer, err := a.ask("2025-11-25", "notifications/initialized", `{}`, func(c *Call) {
		c.Requested.OneWay = true
		c.Body = []byte(`{"jsonrpc":"2.0","method":"notifications/initialized"}`)
	})
	if err != nil || answer.Body != nil {
		t.Errorf("a notification: %+v, %v", answer, err)
	}
}

// What policy judged is what is carried out.
func TestOpenAPIOtherThanAuthorized(t *testing.T) {
	a := newAPI(t, "petstore.yaml", nil)
	for what, change := range map[string]func(*Call){
		"another tool":   func(c *Call) { c.Requested.Name = "getInventory" },
		"another method": func(c *Call) { c.Requested.Method = "tools/list" },
		"no answer":      func(c *Call) { c.Requested.OneWay = true },
		"no JSON":        func(c *Call) { c.Body = []byte(`{"jsonrpc":"2.0",`) },
	} {
		_, err := a.ask(modernRevision, "tools/call", `{"name":"deleteOrder","arguments":{"orderId":1}}`, change)
		var f *Fault
		if !errors.As(err, &f) || f.Kind != Invalid {
			t.Errorf("%s: %v", what, err)
		}
	}
}

// A tool may have another name for the caller; the body has that one.
func TestOpenAPIAlias(t *testing.T) {
	a := newAPI(t, "petstore.yaml", answerWith(204, "", ""))
	alias := func(c *Call) { c.Requested.Name, c.Requested.Alias = "deleteOrder", "rest__deleteOrder" }
	if answer, err := a.ask(modernRevision, "tools/call", `{"name":"rest__deleteOrder","arguments":{"orderId":1}}`, alias); err != nil || answer.Status != 204 {
		t.Errorf("%+v, %v", answer, err)
	}
	var f *Fault
	if _, err := a.ask(modernRevision, "tools/call", `{"name":"deletePet","arguments":{"petId":1}}`, alias); !errors.As(err, &f) || f.Kind != Invalid {
		t.Errorf("another tool: %v", err)
	}
	if seen := a.requests(); len(seen) != 1 || seen[0].line != "DELETE /store/order/1" {
		t.Errorf("%v", seen)
	}
}

// A list in pages, of what the caller may see, by cursors that say when they are old.
func TestOpenAPIPages(t *testing.T) {
	doc := func(n int) string {
		var b strings.Builder
		b.WriteString("openapi: 3.0.0\ninfo: {title: many, version: '1'}\npaths:\n")
		for i := range n {
			fmt.Fprintf(&b, "  /t%03d: {get: {operationId: t%03d, responses: {'200': {description: ok}}}}\n", i, i)
		}
		return b.String()
	}
	a := newAPI(t, doc(450), nil)
	var names []string
	cursor, first := "", ""
	for page := 0; page < 4; page++ {
		params := `{}`
		if cursor != "" {
			params = fmt.Sprintf(`{"cursor":%q}`, cursor)
		}
		l := a.result(modernRevision, "tools/list", params)
		for tool := range l.Get("tools").Elements() {
			name, _ := tool.Get("name").Text()
			names = append(names, name)
		}
		if cursor, _ = l.Get("nextCursor").Text(); cursor == "" {
			break
		}
		if first == "" {
			first = cursor
		}
	}
	if len(names) != 450 || !slices.IsSorted(names) || names[0] != "t000" || names[449] != "t449" {
		t.Errorf("%d names: %q", len(names), names)
	}
	for _, cursor := range []string{`"nonsense"`, `"!"`, `7`, `""`} {
		answer, err := a.ask(modernRevision, "tools/list", `{"cursor":`+cursor+`}`)
		if err != nil || (answer.ErrorCode != jsonrpc.CodeInvalidParams) != (cursor == `""`) {
			t.Errorf("cursor %s: %+v, %v", cursor, answer, err)
		}
	}
	answer, err := a.ask(modernRevision, "tools/list", `{}`, func(c *Call) { c.Only = []string{"t00*"} })
	if err != nil || strings.Count(string(answer.Body), `"inputSchema"`) != 10 || len(answer.Removed)+answer.RemovedMore != 190 {
		t.Errorf("filtered: %d removed and %d more, %v", len(answer.Removed), answer.RemovedMore, err)
	}
	a.write(doc(449))
	a.now = a.now.Add(2 * recheck)
	answer, err = a.ask(modernRevision, "tools/list", fmt.Sprintf(`{"cursor":%q}`, first))
	if err != nil || answer.ErrorCode != jsonrpc.CodeInvalidParams || !strings.Contains(string(answer.Body), "changed since") {
		t.Errorf("an old cursor: %s, %v", answer.Body, err)
	}
}

// Wrong input is refused in words that a model can use, and nobody is asked.
func TestOpenAPIWrongInput(t *testing.T) {
	petstore, github := newAPI(t, "petstore.yaml", nil), newAPI(t, "github.yaml", nil)
	for _, c := range []struct {
		api       *api
		name      string
		arguments string
		want      []string
	}{
		{petstore, "getPetById", `{}`, []string{"missing property 'petId'"}},
		{petstore, "getPetById", `{"petId":"12"}`, []string{"arguments.petId: got string, want integer"}},
		{petstore, "getPetById", `{"petId":0}`, []string{"arguments.petId: minimum: got 0, want 1"}},
		{petstore, "getPetById", `{"petId":1,"verbose":true}`, []string{"additional properties 'verbose' not allowed"}},
		{petstore, "findPetsByStatus", `{"status":"lost"}`, []string{"arguments.status: value must be one of 'available', 'pending', 'sold'"}},
		{petstore, "addPet", `{"body":{"name":1}}`, []string{"arguments.body: missing property 'photoUrls'", "arguments.body.name: got number, want string"}},
		{petstore, "addPet", `{}`, []string{"missing property 'body'"}},
		{petstore, "placeOrder", `{"body":{"shipDate":"tomorrow"}}`, []string{"arguments.body.shipDate: 'tomorrow' is not valid date-time"}},
		{petstore, "uploadFile", `{"petId":1,"body":"=not base64="}`, []string{"not base64"}},
		{github, "issues_get", `{"owner":"..","repo":"r","issue_number":1}`, []string{"owner", "step up"}},
		{github, "issues_get", `{"owner":"a/../b","repo":"r","issue_number":1}`, []string{"step up"}},
		{github, "issues_get", `{"owner":"%2e%2E","repo":"r","issue_number":1}`, []string{"step up"}},
		{github, "issues_get", `{"owner":"a%252f..%252fb","repo":"r","issue_number":1}`, []string{"step up"}},
		{github, "issues_get", `{"owner":"","repo":"r","issue_number":1}`, []string{"owner", "empty"}},
	} {
		text, r := c.api.tool(c.name, c.arguments)
		if !isError(r) || !strings.Contains(text, "nothing was sent") {
			t.Errorf("%s %s: %s", c.name, c.arguments, r.Raw())
		}
		for _, want := range c.want {
			if !strings.Contains(text, want) {
				t.Errorf("%s %s: %q is missing in:\n%s", c.name, c.arguments, want, text)
			}
		}
	}
	for params, want := range map[string]string{
		`{"name":"nobody","arguments":{}}`:           "Unknown tool: nobody",
		`{"name":"getInventory","arguments":[]}`:     "arguments must be an object",
		`{"name":"getInventory","arguments":null}`:   "arguments must be an object",
		`{"name":"getInventory","arguments":"text"}`: "arguments must be an object",
	} {
		answer, err := petstore.ask(modernRevision, "tools/call", params)
		if err != nil || answer.ErrorCode != jsonrpc.CodeInvalidParams || !strings.Contains(string(answer.Body), want) {
			t.Errorf("%s: %s, %v", params, answer.Body, err)
		}
	}
	if n := len(petstore.requests()) + len(github.requests()); n != 0 {
		t.Errorf("%d requests were made", n)
	}
}

// A call as the real API would see it, and what it makes of the answer.
func TestOpenAPICalls(t *testing.T) {
	secrets := func(auth map[string]string) func(*Server, *Options) {
		return func(s *Server, _ *Options) { s.OpenAPI.Auth = auth }
	}
	header := func(name, value string) func(*Server, *Options) {
		return func(s *Server, _ *Options) {
			if s.Header == nil {
				s.Header = http.Header{}
			}
			s.Header.Set(name, value)
		}
	}
	for _, c := range []struct {
		name      string
		doc       string
		change    []func(*Server, *Options)
		tool      string
		arguments string
		answer    http.HandlerFunc

		line   string
		header map[string]string
		body   string
		result string // the result but for _meta and resultType
	}{
		{
			name: "path", doc: "petstore.yaml", change: []func(*Server, *Options){secrets(map[string]string{"api_key": "special-key"})},
			tool: "getPetById", arguments: `{"petId":9007199254740993}`,
			answer: answerWith(200, "application/json", `{"id":9007199254740993,"name":"rex","photoUrls":[]}`),
			line:   "GET /pet/9007199254740993", header: map[string]string{"Api_key": "special-key", "User-Agent": "waybill", "Authorization": ""},
			result: `{"content":[{"text":"{\"id\":9007199254740993,\"name\":\"rex\",\"photoUrls\":[]}","type":"text"}],"structuredContent":{"id":9007199254740993,"name":"rex","photoUrls":[]}}`,
		},
		{
			name: "the second of two ways", doc: "petstore.yaml", change: []func(*Server, *Options){secrets(map[string]string{"petstore_auth": "token-of-oauth"})},
			tool: "getPetById", arguments: `{"petId":1}`, answer: answerWith(404, "text/plain", "Pet not found"),
			line: "GET /pet/1", header: map[string]string{"Authorization": "Bearer token-of-oauth", "Api_key": ""},
			result: `{"content":[{"text":"HTTP 404 Not Found\n\nPet not found","type":"text"}],"isError":true}`,
		},
		{
			name: "a body, as it came", doc: "petstore.yaml", tool: "addPet", arguments: `{"body":{ "name":"a\u00e9", "photoUrls":[],"id":1e2, "more":null}}`,
			answer: answerWith(200, "application/json", `{"name":"aé","photoUrls":[]}`),
			line:   "POST /pet", header: map[string]string{"Content-Type": "application/json"}, body: `{ "name":"a\u00e9", "photoUrls":[],"id":1e2, "more":null}`,
			result: `{"content":[{"text":"{\"name\":\"aé\",\"photoUrls\":[]}","type":"text"}],"structuredContent":{"name":"aé","photoUrls":[]}}`,
		},
		{
			name: "bytes", doc: "petstore.yaml", tool: "uploadFile", arguments: `{"petId":3,"additionalMetadata":"a & b","body":"AAEC/w=="}`,
			answer: answerWith(200, "application/json", `{"code":200}`),
			line:   "POST /pet/3/uploadImage?additionalMetadata=a%20%26%20b", header: map[string]string{"Content-Type": "application/octet-stream"}, body: "\x00\x01\x02\xff",
			result: `{"content":[{"text":"{\"code\":200}","type":"text"}],"structuredContent":{"code":200}}`,
		},
		{
			name: "a list, repeated", doc: "petstore.yaml", tool: "findPetsByTags", arguments: `{"tags":["a b","ü,&"]}`,
			answer: answerWith(200, "application/json", `[]`), line: "GET /pet/findByTags?tags=a%20b&tags=%C3%BC%2C%26",
			result: `{"content":[{"text":"[]","type":"text"}]}`,
		},
		{
			name: "a list, joined", doc: "open-meteo.yaml", tool: "get_v1_forecast", arguments: `{"latitude":52.52,"longitude":13.4100,"hourly":["temperature_2m","precipitation"]}`,
			answer: answerWith(200, "application/json", `{"latitude":52.52,"hourly":{"time":["2026-01-01T00:00"],"temperature_2m":[1.50]}}`),
			line:   "GET /v1/forecast?hourly=temperature_2m,precipitation&latitude=52.52&longitude=13.4100",
			result: `{"content":[{"text":"{\"latitude\":52.52,\"hourly\":{\"time\":[\"2026-01-01T00:00\"],\"temperature_2m\":[1.50]}}","type":"text"}],` +
				`"structuredContent":{"latitude":52.52,"hourly":{"time":["2026-01-01T00:00"],"temperature_2m":[1.50]}}}`,
		},
		{
			name: "a reason", doc: "open-meteo.yaml", tool: "get_v1_forecast", arguments: `{"latitude":1,"longitude":2,"daily":["sunrise"]}`,
			answer: answerWith(400, "application/json", `{"error":true,"reason":"Timezone is required"}`), line: "GET /v1/forecast?daily=sunrise&latitude=1&longitude=2",
			result: `{"content":[{"text":"HTTP 400 Bad Request: Timezone is required\n\n{\"error\":true,\"reason\":\"Timezone is required\"}","type":"text"}],"isError":true}`,
		},
		{
			name: "a problem", doc: "nws.yaml", change: []func(*Server, *Options){header("User-Agent", "acme@example.com")},
			tool: "point", arguments: `{"latitude":39.7456,"longitude":-97.0892}`,
			answer: answerWith(404, "application/problem+json", `{"type":"https://api.weather.gov/problems/InvalidPoint","title":"Data Unavailable For Requested Point","status":404,"detail":"Unable to provide data"}`),
			line:   "GET /points/39.7456,-97.0892", header: map[string]string{"User-Agent": "acme@example.com", "Accept": "application/geo+json, application/json;q=0.9, application/problem+json;q=0.9, */*;q=0.5"},
			result: `{"content":[{"text":"HTTP 404 Not Found: Data Unavailable For Requested Point: Unable to provide data\n\n` +
				`{\"type\":\"https://api.weather.gov/problems/InvalidPoint\",\"title\":\"Data Unavailable For Requested Point\",\"status\":404,\"detail\":\"Unable to provide data\"}","type":"text"}],"isError":true}`,
		},
		{
			name: "a header", doc: "nws.yaml", change: []func(*Server, *Options){header("User-Agent", "acme@example.com")},
			tool: "station_observation_list", arguments: `{"stationId":"KA/BC","limit":1,"Feature-Flags":["obs_station_provider","forecast_temperature_qv"]}`,
			answer: answerWith(200, "application/geo+json", `{"type":"FeatureCollection","features":[]}`),
			line:   "GET /stations/KA%2FBC/observations?limit=1", header: map[string]string{"Feature-Flags": "obs_station_provider,forecast_temperature_qv"},
			result: `{"content":[{"text":"{\"type\":\"FeatureCollection\",\"features\":[]}","type":"text"}],"structuredContent":{"type":"FeatureCollection","features":[]}}`,
		},
		{
			name: "the next page", doc: "github.yaml", change: []func(*Server, *Options){header("Authorization", "Bearer github-token")},
			tool: "issues_list-for-repo", arguments: `{"owner":"o","repo":"r.x","labels":"bug,help wanted","page":1}`,
			answer: func(w http.ResponseWriter, r *http.Request) {
				w.Header().Set("Link", `<https://api.github.com/repositories/1/issues?labels=bug%2Chelp+wanted&page=2>; rel="next", <https://api.github.com/x?page=9>; rel="last"`)
				answerWith(200, "application/json; charset=utf-8", `[]`)(w, r)
			},
			line: "GET /repos/o/r.x/issues?labels=bug%2Chelp%20wanted&page=1", header: map[string]string{"Authorization": "Bearer github-token"},
			result: `{"content":[{"text":"[]","type":"text"},{"text":"There is a next page: the same call with page=2.","type":"text"}]}`,
		},
		{
			name: "text", doc: "github.yaml", tool: "markdown_render", arguments: `{"body":{"text":"*hi*"}}`,
			answer: answerWith(200, "text/html; charset=utf-8", "<p><em>hi</em></p>"), line: "POST /markdown", body: `{"text":"*hi*"}`,
			result: `{"content":[{"text":"<p><em>hi</em></p>","type":"text"}]}`,
		},
		{
			name: "nothing", doc: "petstore.yaml", tool: "deleteOrder", arguments: `{"orderId":4}`, answer: answerWith(204, "", ""), line: "DELETE /store/order/4",
			result: `{"content":[{"text":"HTTP 204 No Content, without a body.","type":"text"}]}`,
		},
		{
			name: "other than promised", doc: "github.yaml", tool: "issues_get", arguments: `{"owner":"o","repo":"r","issue_number":1}`,
			answer: answerWith(200, "application/json", `{"number":"1","title":"t","state":"open","user":null}`), line: "GET /repos/o/r/issues/1",
			result: `{"content":[{"text":"{\"number\":\"1\",\"title\":\"t\",\"state\":\"open\",\"user\":null}","type":"text"},` +
				`{"text":"The API did what was asked (HTTP 200 OK), but its answer, above, is not what its description promises:\n- answer.number: got string, want integer","type":"text"}],"isError":true}`,
		},
		{
			name: "a redirect", doc: "github.yaml", tool: "issues_get", arguments: `{"owner":"o","repo":"r","issue_number":1}`,
			answer: func(w http.ResponseWriter, r *http.Request) { http.Redirect(w, r, "/elsewhere", http.StatusFound) }, line: "GET /repos/o/r/issues/1",
			result: `{"content":[{"text":"HTTP 302 Found: redirects are not followed; the url of the API, or the arguments, have to be those of where it is\n\n(a page of HTML, 33 bytes)","type":"text"}],"isError":true}`,
		},
		{
			name: "an image", doc: "petstore.yaml", tool: "getInventory", arguments: `{}`, answer: answerWith(200, "image/png", "\x89PNG"), line: "GET /store/inventory",
			result: `{"content":[{"data":"iVBORw==","mimeType":"image/png","type":"image"},{"text":"The API did what was asked (HTTP 200 OK), but its answer is not the JSON that its description promises.","type":"text"}],"isError":true}`,
		},
	} {
		t.Run(c.name, func(t *testing.T) {
			a := newAPI(t, c.doc, c.answer, c.change...)
			_, r := a.tool(c.tool, c.arguments)
			seen := a.requests()
			if len(seen) != 1 {
				t.Fatalf("%d requests; %s", len(seen), r.Raw())
			}
			if seen[0].line != c.line {
				t.Errorf("sent %s\nwant %s", seen[0].line, c.line)
			}
			for name, want := range c.header {
				if got := seen[0].header.Get(name); got != want {
					t.Errorf("%s: %q, want %q", name, got, want)
				}
			}
			if seen[0].body != c.body {
				t.Errorf("body %q, want %q", seen[0].body, c.body)
			}
			got := string(r.Patch().Remove(r, "_meta").Remove(r, "resultType").Bytes())
			m, _ := jsonrpc.Decode([]byte(got), jsonrpc.Limits{})
			if got = string(m.Result().Raw()); got != c.result {
				t.Errorf("result %s\nwant   %s", got, c.result)
			}
		})
	}
}

// What happened to the connection is a fault, and its kind is the truth.
func TestOpenAPIFaults(t *testing.T) {
	for name, c := range map[string]struct {
		answer http.HandlerFunc
		change func(*Server, *Options)
		kind   FaultKind
		after  time.Duration
	}{
		"busy":    {answer: func(w http.ResponseWriter, _ *http.Request) { w.Header().Set("Retry-After", "3"); w.WriteHeader(429) }, kind: Busy, after: 3 * time.Second},
		"refused": {answer: func(w http.ResponseWriter, _ *http.Request) { w.Header().Set("Retry-After", "1"); w.WriteHeader(503) }, kind: Refused, after: time.Second},
		"hung up": {answer: func(w http.ResponseWriter, _ *http.Request) { hangUp(w) }, kind: Broken},
		"cut off": {answer: func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Length", "10")
			_, _ = io.WriteString(w, "{")
			panic(http.ErrAbortHandler)
		}, kind: Broken},
		"too large": {answer: answerWith(200, "text/plain", strings.Repeat("x", 1<<20+1)), kind: TooLarge},
		"grows":     {answer: answerWith(200, "text/plain", strings.Repeat("\x01", 1<<19)), kind: TooLarge},
		"encoded": {answer: func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Encoding", "gzip")
			_, _ = io.WriteString(w, "x")
		}, kind: Garbled},
		"nobody there": {change: func(s *Server, _ *Options) { s.OpenAPI.BaseURL = unused(t) }, kind: Unsent},
	} {
		t.Run(name, func(t *testing.T) {
			change := c.change
			if change == nil {
				change = func(*Server, *Options) {}
			}
			a := newAPI(t, "petstore.yaml", c.answer, change)
			_, err := a.ask(modernRevision, "tools/call", `{"name":"deleteOrder","arguments":{"orderId":1}}`)
			var f *Fault
			if !errors.As(err, &f) || f.Kind != c.kind || f.After != c.after {
				t.Errorf("%+v: %v", f, err)
			}
		})
	}
	t.Run("a call that is withdrawn", func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		a := newAPI(t, "petstore.yaml", func(_ http.ResponseWriter, r *http.Request) { cancel(); <-r.Context().Done() })
		_, err := a.conn.Call(ctx, Call{
			ID: "c", Requested: &schemas.Requested{Target: schemas.Target{Method: "tools/call", Name: "deleteOrder"}}, Connected: func() {}, Heard: func() {},
			Body: []byte(`{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{"name":"deleteOrder","arguments":{"orderId":1}}}`),
		}, nil)
		var f *Fault
		if !errors.As(err, &f) || f.Kind != Broken {
			t.Errorf("%v", err)
		}
	})
}

// unused is the address of nobody.
func unused(t testing.TB) string {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return "http://" + l.Addr().String()
}

// toolsOf are the tools of a document's text.
func toolsOf(t testing.TB, text string) []*restTool {
	t.Helper()
	file := filepath.Join(t.TempDir(), "api.yaml")
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	a, err := newRESTAPI(Server{Name: "rest", OpenAPI: &OpenAPI{Document: file, BaseURL: "https://api.example/v1"}}, Options{Now: time.Now})
	if err != nil {
		t.Fatal(err)
	}
	return a.doc.Load().order
}

// parsed is JSON as the arguments of a call.
func parsed(t testing.TB, text string) jsonrpc.Value {
	t.Helper()
	v, err := jsonrpc.Parse([]byte(text), jsonrpc.Limits{})
	if err != nil {
		t.Fatal(err)
	}
	return v
}

// The API may repeat what only the gateway knows; the agent does not hear it.
func TestOpenAPISecrets(t *testing.T) {
	const doc = `openapi: 3.0.3
info: {title: t, version: '1'}
paths:
  /x: {get: {operationId: x, security: [{q: [], basic: []}], parameters: [{name: page, in: query, schema: {type: integer}}], responses: {'200': {description: ok}}}}
components: {securitySchemes: {q: {type: apiKey, in: query, name: api_key}, basic: {type: http, scheme: basic}}}
`
	const key, password, header = "s3cr3t+k&y/é", `user:pa"ss word`, "Bearer operator-token"
	answer := func(status int, kind, body string) http.HandlerFunc {
		return func(w http.ResponseWriter, r *http.Request) {
			if u, p, ok := r.BasicAuth(); !ok || u+":"+p != password || r.URL.Query().Get("api_key") != key || r.Header.Get("X-Operator") != header {
				t.Errorf("%s %v", r.URL, r.Header)
			}
			w.Header().Set("Link", "<https://a.example/x?"+r.URL.RawQuery+"&page=2>; rel=next")
			w.Header().Set("Location", r.URL.String())
			answerWith(status, kind, body)(w, r)
		}
	}
	escaped := "s3cr3t%2Bk%26y%2F%C3%A9"
	for name, h := range map[string]http.HandlerFunc{
		"json":     answer(200, "application/json", `{"next":"https://a.example/x?api_key=`+escaped+`","authorization":"Basic `+base64Text(password)+`","raw":"`+key+`","quoted":"user:pa\"ss word","password":"pa\"ss word","h":"operator-token"}`),
		"text":     answer(200, "text/plain", key+" "+password+" "+header),
		"problem":  answer(403, "application/problem+json", `{"title":"no `+key+`","detail":"`+escaped+`"}`),
		"nothing":  answer(201, "", ""),
		"redirect": answer(302, "text/plain", "go to ?api_key="+escaped),
	} {
		t.Run(name, func(t *testing.T) {
			a := newAPI(t, doc, h, func(s *Server, _ *Options) {
				s.OpenAPI.Auth = map[string]string{"q": key, "basic": password}
				s.Header = http.Header{"X-Operator": {header}}
			})
			text, r := a.tool("x", `{}`)
			for _, secret := range []string{"s3cr3t", "pa\"ss", `pa\"ss`, base64Text(password), "operator-token"} {
				if strings.Contains(string(r.Raw())+a.logs.String(), secret) {
					t.Errorf("%q in %s\n%s", secret, r.Raw(), a.logs)
				}
			}
			if !strings.Contains(text, "[redacted]") {
				t.Error(text)
			}
		})
	}
	// Nor does the log of what happened to the connection.
	a := newAPI(t, doc, nil, func(s *Server, _ *Options) {
		s.OpenAPI.Auth, s.OpenAPI.BaseURL = map[string]string{"q": key, "basic": password}, unused(t)
	})
	if _, err := a.ask(modernRevision, "tools/call", `{"name":"x"}`); err == nil || strings.Contains(err.Error(), "s3cr3t") {
		t.Error(err)
	}
}

// A secret is found in whatever form it comes back, and what is around it stays.
func TestOpenAPIRedactor(t *testing.T) {
	secret := "aB1/+=&<\"\\; é😀\xff-Z"
	r := newRedactor([]string{"short", secret, "aB1/+=&<", "token-1", "token-1"})
	text := strings.ToValidUTF8(secret, "\uFFFD")
	marshalled, err := json.Marshal(text)
	if err != nil {
		t.Fatal(err)
	}
	cookie := escape(secret, "!#$&'()*+/:<=>?@[]^`{|}")
	for _, form := range []string{
		secret, text, string(jsonrpc.Quote(text)), string(marshalled), strings.ReplaceAll(string(jsonrpc.Quote(text)), "/", `\/`),
		strings.NewReplacer("/", `\/`, "é", `\u00E9`, "😀", `\uD83D\uDE00`).Replace(string(jsonrpc.Quote(text))),
		url.QueryEscape(secret), url.PathEscape(secret), escape(secret, ""), cookie,
		html.EscapeString(text), strings.ReplaceAll(html.EscapeString(text), "/", "&#x2F;"), "token-1", "token%2d1",
	} {
		form = strings.Trim(form, `"`)
		if got := r.Replace("<" + form + ">"); got != "<[redacted]>" {
			t.Errorf("%q became %q", form, got)
		}
	}
	for _, other := range []string{"", "short", "aB1/+=&", "token 1", "Token-1"} {
		if got := r.Replace(other); got != other || (redactor{}).Replace(other) != other {
			t.Errorf("%q became %q", other, got)
		}
	}
	if got := newRedactor([]string{"?=&/+!"}).Replace("x ?%3d&/+! y"); got != "x [redacted] y" {
		t.Error(got)
	}
	if got := r.Replace("tokentoken-1token%2D1 aB1/+=&<\""); got != "token[redacted][redacted] [redacted]\"" {
		t.Error(got)
	}
}

// More kinds of answers.
func TestOpenAPIAnswers(t *testing.T) {
	for _, c := range []struct {
		name  string
		tool  string
		h     http.HandlerFunc
		want  []string // in the result
		error bool
	}{
		{"JSON without a type", "x", func(w http.ResponseWriter, _ *http.Request) {
			w.Header()["Content-Type"] = nil
			_, _ = io.WriteString(w, ` {"a":1}`)
		}, []string{`"structuredContent":{"a":1}`}, false},
		{"JSON that says a name twice", "x", answerWith(200, "application/json", `{"a":1,"a":2}`), []string{`{\"a\":1,\"a\":2}`}, false},
		{"JSON with a byte order mark", "x", answerWith(200, "application/json", "\ufeff{\"a\":1}"), []string{`"structuredContent":{"a":1}`}, false},
		{"broken JSON", "x", answerWith(200, "application/json", `{"a":`), []string{`{\"a\":`}, false},
		{"broken text", "x", answerWith(200, "text/plain", "a\xffb"), []string{"a\uFFFDb"}, false},
		{"Latin-1", "x", answerWith(200, "text/plain; charset=ISO-8859-1", "caf\xe9"), []string{"café"}, false},
		{"lines", "x", answerWith(200, "application/x-ndjson", "{}\n{}\n"), []string{`{}\n{}\n`}, false},
		{"bytes", "x", answerWith(200, "application/pdf", "%PDF\x00"), []string{`"blob":"JVBERgA="`, `"mimeType":"application/pdf"`}, false},
		{"sound", "x", answerWith(200, "audio/wav", "RIFF"), []string{`"type":"audio"`, `"data":"UklGRg=="`}, false},
		{"many bytes", "x", func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Type", "image/png")
			_, _ = w.Write(make([]byte, maxBlob+1))
		}, []string{"1048577 bytes of image/png, which are too many to show"}, false},
		{"deep JSON", "x", answerWith(200, "application/json", `{"a":`+strings.Repeat("[", 600)+strings.Repeat("]", 600)+`}`), []string{`"type":"text"`}, false},
		{"created", "x", func(w http.ResponseWriter, _ *http.Request) { w.Header().Set("Location", "/x/7"); w.WriteHeader(201) }, []string{`HTTP 201 Created, without a body.\nLocation: /x/7`}, false},
		{"not modified", "x", answerWith(304, "", ""), []string{"HTTP 304 Not Modified"}, true},
		{"a status of nobody", "x", answerWith(599, "", ""), []string{`"HTTP 599"`}, true},
		{"unavailable", "x", answerWith(503, "text/html", "<html><title> Down for\n maintenance</title>"), []string{"HTTP 503 Service Unavailable: Down for maintenance", "a page of HTML"}, true},
		{"too many", "x", answerWith(429, "application/json", `{"error":{"message":"slow down"}}`), []string{"HTTP 429 Too Many Requests: slow down"}, true},
		{"gateway, read", "x", answerWith(504, "", ""), []string{`HTTP 504 Gateway Timeout"`}, true},
		{"gateway, write", "w", answerWith(504, "", ""), []string{"it is not known whether it was carried out"}, true},
		{"unauthorized", "x", answerWith(401, "application/json", `{"error":"invalid_token","error_description":"expired"}`), []string{"HTTP 401 Unauthorized (the gateway sent no credentials): expired"}, true},
		{"a long problem", "x", answerWith(500, "text/plain", strings.Repeat("x", 100_000)), []string{"xxx…"}, true},
		{"bytes of an error", "x", answerWith(500, "image/png", "x"), []string{"(1 bytes of image/png)"}, true},
		{"head", "h", func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Type", "text/csv")
			w.Header().Set("Content-Length", "12")
		}, []string{`HTTP 200 OK, without a body.\nContent-Type: text/csv\nContent-Length: 12`}, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			a := newAPI(t, minimal("    post: {operationId: w, responses: {}}\n    head: {operationId: h, responses: {}}\n"), c.h, func(_ *Server, o *Options) { o.MaxAnswer = 4 << 20 })
			_, r := a.tool(c.tool, `{}`)
			if isError(r) != c.error {
				t.Errorf("isError %v: %s", isError(r), clip(string(r.Raw()), 2000))
			}
			for _, want := range c.want {
				if !strings.Contains(string(r.Raw()), want) {
					t.Errorf("%s is missing in %s", want, clip(string(r.Raw()), 2000))
				}
			}
		})
	}
}

// An answer that is too large twice is given once.
func TestOpenAPILargeAnswer(t *testing.T) {
	body := `{"a":"` + strings.Repeat("x", 700_000) + `"}`
	a := newAPI(t, minimal(""), answerWith(200, "application/json", body))
	r := a.result(modernRevision, "tools/call", `{"name":"x"}`)
	if string(r.Get("structuredContent").Raw()) != body || !strings.Contains(string(r.Get("content").Raw()), "the answer is in structuredContent") {
		t.Error(clip(string(r.Raw()), 200))
	}
}
