package dispatch

import (
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"waybill.dev/schemas"
)

// imported are the tools and the report of a document's text.
func imported(t *testing.T, text string, change ...func(*Server)) (*restDoc, string) {
	t.Helper()
	file := filepath.Join(t.TempDir(), "api.yaml")
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	s := Server{Name: "rest", OpenAPI: &OpenAPI{Document: file}}
	for _, f := range change {
		f(&s)
	}
	a, err := newRESTAPI(s, Options{Now: time.Now})
	if err != nil {
		t.Fatal(err)
	}
	doc := a.doc.Load()
	var lines []string
	for _, u := range doc.report {
		lines = append(lines, u.String())
	}
	return doc, strings.Join(lines, "\n")
}

// Names are fit, whatever the ids are, and depend on nothing but the operation.
func TestToolNames(t *testing.T) {
	long := strings.Repeat("a", 70)
	for _, c := range []struct{ id, method, path, want string }{
		{"getPet", "GET", "/pet", "getPet"},
		{"issues/list-for-repo", "GET", "/x", "issues_list-for-repo"},
		{"  get pet é ", "GET", "/x", "get_pet"},
		{"", "GET", "/pets/{petId}/toys", "get_pets_petId_toys"},
		{"", "DELETE", "/", "delete"},
		{"///", "PUT", "/x", "put"},
		{long, "GET", "/x", strings.Repeat("a", 55) + "_84f56f4f"},
	} {
		got := toolName(c.id, c.method, c.path)
		if c.id == long {
			if len(got) != maxToolName || !strings.HasPrefix(got, strings.Repeat("a", 55)+"_") || got == toolName(long+"b", "GET", "/x") {
				t.Errorf("%q: %q", c.id, got)
			}
			continue
		}
		if got != c.want {
			t.Errorf("%q: %q, want %q", c.id, got, c.want)
		}
	}
	names := func(order string) string {
		doc, _ := imported(t, "openapi: 3.0.0\ninfo: {title: t, version: '1'}\nservers: [{url: 'https://a.example'}]\npaths:\n"+order)
		var names []string
		for _, tool := range doc.order {
			names = append(names, tool.name+"="+tool.path)
		}
		return strings.Join(names, " ")
	}
	const a, b, c = "  /a: {get: {operationId: x/y, responses: {}}}\n", "  /b: {get: {operationId: x.y, responses: {}}}\n", "  /c: {get: {operationId: z, responses: {}}}\n"
	if one, two := names(a+b+c), names(c+b+a); one != two || strings.Count(one, "x_y_") != 2 || !strings.Contains(one, "z=/c") {
		t.Errorf("%s\n%s", one, two)
	}
}

// Of the ways to be known the first is taken for which all secrets are there.
func TestSecurity(t *testing.T) {
	const doc = `openapi: 3.0.3
info: {title: t, version: '1'}
servers: [{url: 'https://a.example'}]
security: [{key: []}]
paths:
  /default: {get: {operationId: default, responses: {}}}
  /none: {get: {operationId: none, security: [], responses: {}}}
  /or: {get: {operationId: or, security: [{oauth: [a]}, {query: [], cookie: []}, {key: []}], responses: {}}}
  /maybe: {get: {operationId: maybe, security: [{}, {key: []}], responses: {}}}
  /basic: {get: {operationId: basic, security: [{basic: []}], responses: {}}}
  /digest: {get: {operationId: digest, security: [{digest: []}], responses: {}}}
  /unknown: {get: {operationId: unknown, security: [{nobody: []}], responses: {}}}
components:
  securitySchemes:
    key: {type: apiKey, in: header, name: X-Key}
    query: {type: apiKey, in: query, name: api key}
    cookie: {type: apiKey, in: cookie, name: sid}
    basic: {type: http, scheme: basic}
    oidc: {type: openIdConnect, openIdConnectUrl: 'https://id.example'}
    oauth: {type: oauth2, flows: {}}
    digest: {type: http, scheme: digest}
`
	for name, c := range map[string]struct {
		auth   map[string]string
		header http.Header
		want   map[string]string // tool → its credentials
		report []string
	}{
		"nothing": {
			want: map[string]string{"default": "", "none": "", "or": "", "maybe": "", "basic": ""},
			report: []string{
				"default: security: called without credentials: none of its alternatives is configured: key (not configured)",
				"or: security: called without credentials: none of its alternatives is configured: cookie (not configured), key (not configured), oauth (not configured)",
				"unknown: security: called without credentials: none of its alternatives is configured: nobody (not configured)",
			},
		},
		"all": {
			auth: map[string]string{"key": "k", "query": "q q", "cookie": "c;c", "basic": "u:p", "oauth": "t"},
			want: map[string]string{
				"default": "header X-Key=k", "none": "", "or": "header Authorization=Bearer t", "maybe": "header X-Key=k", "basic": "header Authorization=Basic dTpw",
			},
		},
		"two together": {
			auth: map[string]string{"query": "q q", "cookie": "c;c", "key": "k"},
			want: map[string]string{"or": "cookie sid=c;c, query api key=q q"},
		},
		"half of two": {auth: map[string]string{"query": "q", "key": "k"}, want: map[string]string{"or": "header X-Key=k"}},
		"the operator's header": {
			header: http.Header{"X-Key": {"mine"}, "Authorization": {"Basic xyz"}}, want: map[string]string{"default": "", "or": ""},
			report: []string{"unknown: security: called"},
		},
	} {
		t.Run(name, func(t *testing.T) {
			d, report := imported(t, doc, func(s *Server) { s.OpenAPI.Auth, s.Header = c.auth, c.header })
			for tool, want := range c.want {
				var got []string
				for _, x := range d.tools[tool].auth {
					got = append(got, fmt.Sprintf("%s %s=%s", x.in, x.name, x.value))
				}
				if strings.Join(got, ", ") != want {
					t.Errorf("%s: %v, want %s", tool, got, want)
				}
			}
			for _, want := range c.report {
				if !strings.Contains(report, want) {
					t.Errorf("%q is missing in\n%s", want, report)
				}
			}
			if c.header != nil && strings.Contains(report, "default: security") {
				t.Error(report)
			}
		})
	}
	for scheme, want := range map[string]string{"nobody": "has no security scheme", "digest": "http digest is not supported"} {
		file := filepath.Join(t.TempDir(), "api.yaml")
		if err := os.WriteFile(file, []byte(doc), 0o600); err != nil {
			t.Fatal(err)
		}
		_, err := ImportOpenAPI(Server{OpenAPI: &OpenAPI{Document: file, Auth: map[string]string{scheme: "the-secret"}}})
		if err == nil || !strings.Contains(err.Error(), want) || strings.Contains(err.Error(), "the-secret") {
			t.Errorf("%s: %v", scheme, err)
		}
	}
	file := filepath.Join(t.TempDir(), "api.yaml")
	if err := os.WriteFile(file, []byte(doc), 0o600); err != nil {
		t.Fatal(err)
	}
	for auth, want := range map[string]string{"user-without-password": "must be user:password", "line\nbreak:x": "cannot be sent"} {
		if _, err := ImportOpenAPI(Server{OpenAPI: &OpenAPI{Document: file, Auth: map[string]string{"basic": auth}}}); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v", auth, err)
		}
	}
}

// What cannot be translated is left out, and said: never done wrong.
func TestUntranslated(t *testing.T) {
	const doc = `openapi: 3.1.0
info: {title: t, version: '1'}
servers: [{url: 'https://a.example'}]
webhooks: {new: {post: {responses: {}}}}
paths:
  /trace: {trace: {operationId: trace, responses: {}}}
  /undescribed/{id}: {get: {operationId: undescribed, responses: {}}}
  /braces/{id: {get: {operationId: braces, responses: {}}}
  /query?x=1: {get: {operationId: query, responses: {}}}
  /up/../x: {get: {operationId: up, responses: {}}}
  /xml: {post: {operationId: xml, requestBody: {required: true, content: {application/xml: {}}}, responses: {}}}
  /xmlmaybe: {post: {operationId: xmlmaybe, requestBody: {content: {application/xml: {}}}, responses: {}}}
  /getbody: {get: {operationId: getbody, requestBody: {content: {application/json: {}}}, responses: {}}}
  /header:
    get:
      operationId: header
      parameters: [{name: Host, in: header, schema: {}}, {name: 'b ad', in: header, schema: {}}, {name: Authorization, in: header, schema: {}}, {name: 'c,', in: cookie, schema: {}}]
      responses: {}
  /hostneeded: {get: {operationId: hostneeded, parameters: [{name: Host, in: header, required: true, schema: {}}], responses: {}}}
  /style: {get: {operationId: style, parameters: [{name: a, in: query, style: matrix, schema: {}}, {name: b, in: query, content: {application/xml: {}}}], responses: {}}}
  /pattern: {get: {operationId: pattern, parameters: [{name: a, in: query, schema: {type: string, pattern: '(?=a)b'}}], responses: {}}}
  /type: {get: {operationId: type, parameters: [{name: a, in: query, schema: {type: file}}], responses: {}}}
  /dynamic: {get: {operationId: dynamic, parameters: [{name: a, in: query, schema: {$dynamicRef: '#x'}}, {name: b, in: query, schema: {unheardOf: 1, x-fine: 2}}], responses: {}}}
  /two: {get: {operationId: two, parameters: [{name: a b, in: query, schema: {}}, {name: a_b, in: query, schema: {}}], responses: {}}}
  /own: {servers: [{url: 'https://b.example'}], get: {operationId: own, responses: {}}}
  /here: {servers: [{url: 'https://a.example/v9'}], get: {operationId: here, responses: {}}}
  /callback: {post: {operationId: callback, callbacks: {c: {'{$request.body#/u}': {post: {responses: {}}}}}, responses: {}}}
  /formnoobject: {post: {operationId: formnoobject, requestBody: {content: {application/x-www-form-urlencoded: {schema: {type: string}}}}, responses: {}}}
`
	d, report := imported(t, doc)
	for _, want := range []string{
		"webhooks: are not translated",
		"trace: tool: left out: the method TRACE is not called",
		`undescribed: tool: left out: the path parameter "id" is not described`,
		"braces: tool: left out: ", "query: tool: left out: the path", "up: tool: left out: the path",
		"xml: tool: left out: its body is required and written in none of: application/xml",
		"xmlmaybe: body: left out: it is written in none of: application/xml",
		"getbody: body: left out: a GET with a body is not sent",
		`header: header parameter "Host": left out: the gateway itself decides on this header`,
		`header: header parameter "b ad": left out: it is no header's name`,
		`header: cookie parameter "c,": left out: it is no cookie's name`,
		`hostneeded: tool: left out: the header parameter "Host", which is required: the gateway itself decides on this header`,
		`style: query parameter "a": left out: the style "matrix" is not written in a query`,
		`style: query parameter "b": left out: content application/xml is not written`,
		`pattern: pattern: "(?=a)b" cannot be checked here and is left to the API`,
		"type: tool: left out: its input: ",
		"dynamic: schema: $id, $dynamicRef and $dynamicAnchor are not translated",
		`dynamic: schema: the keyword "unheardOf" is not known and not checked`,
		"own: tool: left out: it has a server of its own, https://b.example",
		"callback: callbacks: are not translated",
		"formnoobject: tool: left out: its application/x-www-form-urlencoded body is no object",
	} {
		if !strings.Contains(report, want) {
			t.Errorf("%q is missing in\n%s", want, report)
		}
	}
	for _, name := range []string{"xmlmaybe", "getbody", "header", "style", "pattern", "dynamic", "two", "here", "callback"} {
		if d.tools[name] == nil {
			t.Errorf("%s is no tool", name)
		}
	}
	if len(d.order) != 9 {
		t.Errorf("%d tools", len(d.order))
	}
	if tool := d.tools["here"]; tool != nil && tool.base.String() != "https://a.example/v9" {
		t.Errorf("here: %s", tool.base)
	}
	if tool := d.tools["two"]; tool != nil && (tool.params[0].property == tool.params[1].property) {
		t.Errorf("two: %+v", tool.params)
	}
}

// Schemas of both versions, as JSON Schema 2020-12.
func TestSchemas(t *testing.T) {
	for _, c := range []struct{ version, in, want string }{
		{"3.0.3", "{type: string, nullable: true}", `{"type":["string","null"]}`},
		{"3.0.3", "{type: string, nullable: true, enum: [a, null]}", `{"anyOf":[{"enum":["a",null],"type":"string"},{"type":"null"}]}`},
		{"3.0.3", "{nullable: true, allOf: [{$ref: '#/components/schemas/S'}]}", `{"anyOf":[{"allOf":[{"$ref":"#/$defs/S"}]},{"type":"null"}]}`},
		{"3.0.3", "{type: integer, minimum: 1, exclusiveMinimum: true, maximum: 9, exclusiveMaximum: false}", `{"exclusiveMinimum":1,"maximum":9,"type":"integer"}`},
		{"3.1.0", "{type: [integer, 'null'], exclusiveMinimum: 1, const: 3}", `{"const":3,"exclusiveMinimum":1,"type":["integer","null"]}`},
		{"3.0.3", "{type: string, format: byte, example: aGk=}", `{"contentEncoding":"base64","examples":["aGk="],"type":"string"}`},
		{"3.0.3", "{type: object, additionalProperties: false, properties: {a: {type: string, readOnly: true}, b: {type: string}}, required: [a, b]}",
			`{"additionalProperties":false,"properties":{"b":{"type":"string"}},"required":["b"],"type":"object"}`},
		{"3.0.3", "{type: object, additionalProperties: {$ref: '#/components/schemas/S'}, discriminator: {propertyName: x}, xml: {name: y}, x-z: 1}",
			`{"additionalProperties":{"$ref":"#/$defs/S"},"type":"object"}`},
		{"3.0.3", "{$ref: '#/components/schemas/Tree'}", `{"$ref":"#/$defs/Tree"}`},
		{"3.1.0", "{$ref: '#/components/schemas/S', description: here}", `{"$ref":"#/$defs/S"}`},
		{"3.1.0", "{type: array, prefixItems: [{type: string}], contains: {const: 1}, minContains: 1, unevaluatedItems: false}",
			`{"contains":{"const":1},"minContains":1,"prefixItems":[{"type":"string"}],"type":"array","unevaluatedItems":false}`},
		{"3.1.0", "{if: {required: [a]}, then: {required: [b]}, dependentRequired: {c: [d]}, propertyNames: {pattern: '^[a-z]+$'}}",
			`{"dependentRequired":{"c":["d"]},"if":{"required":["a"]},"propertyNames":{"pattern":"^[a-z]+$"},"then":{"required":["b"]}}`},
	} {
		d, report := imported(t, "openapi: "+c.version+"\ninfo: {title: t, version: '1'}\nservers: [{url: 'https://a.example'}]\npaths:\n  /x:\n    post:\n      operationId: x\n"+
			"      requestBody: {content: {application/json: {schema: "+c.in+"}}}\n      responses: {'200': {description: ok}}\n"+
			"components: {schemas: {S: {type: string}, Tree: {type: object, properties: {kids: {type: array, items: {$ref: '#/components/schemas/Tree'}}}}}}\n")
		if report != "" {
			t.Errorf("%s: %s", c.in, report)
		}
		_, rest, _ := strings.Cut(string(d.tools["x"].definition), `"properties":{"body":`)
		if !strings.HasPrefix(rest, c.want+`}`) {
			t.Errorf("%s\n     %s\nwant %s", c.in, rest, c.want)
		}
	}
	// Recursion is kept, and judged.
	d, _ := imported(t, "openapi: 3.0.3\ninfo: {title: t, version: '1'}\nservers: [{url: 'https://a.example'}]\npaths: {/x: {post: {operationId: x, requestBody: {content: {application/json: {schema: {$ref: '#/components/schemas/Tree'}}}}, responses: {}}}}\n"+
		"components: {schemas: {Tree: {type: object, additionalProperties: false, properties: {kids: {type: array, items: {$ref: '#/components/schemas/Tree'}}}}}}\n")
	for arguments, want := range map[string]bool{`{"body":{"kids":[{"kids":[{}]}]}}`: true, `{"body":{"kids":[{"kids":[{"x":1}]}]}}`: false} {
		if got := len(d.tools["x"].check(parsed(t, arguments))) == 0; got != want {
			t.Errorf("%s: fits %v", arguments, got)
		}
	}
}

// Pages are spoken of, so that a model asks for the next one.
func TestPaginationHints(t *testing.T) {
	const head = "openapi: 3.0.3\ninfo: {title: t, version: '1'}\nservers: [{url: 'https://a.example'}]\npaths: {/x: {get: {operationId: x, "
	for operation, want := range map[string]string{
		"parameters: [{name: cursor, in: query, schema: {type: string}}], responses: {'200': {description: ok, content: {application/json: {schema: {type: object, properties: {next_cursor: {type: string": "The answer may be one page of several: ask for others with cursor; the answer's next_cursor leads on.",
		"parameters: [{name: Page-Size, in: query, schema: {}}], responses: {":                                                                                         "ask for others with Page-Size.",
		"responses: {'200': {description: ok, content: {application/json: {schema: {type: object, properties: {links: {type: object, properties: {next: {type: string": "one page of several; see its member links.next.",
		"deprecated: true, responses: {": "Deprecated.\\n\\nGET /x",
	} {
		text := head + operation
		d, _ := imported(t, text+strings.Repeat("}", strings.Count(text, "{")-strings.Count(text, "}")))
		if !strings.Contains(string(d.tools["x"].definition), want) {
			t.Errorf("%s\n%s", want, d.tools["x"].definition)
		}
	}
}

// In the dispatcher: a read is asked again and needs no claim, a write is not
// and does, and what is answered here says nothing of the API.
func TestOpenAPIDispatched(t *testing.T) {
	for _, c := range []struct {
		method, tool, arguments string
		hangUps                 int // how often the API hangs up before it answers
		outcome                 string
		requests, claims        int
		attempts                int
	}{
		{"tools/call", "getPetById", `{"petId":1}`, 1, "completed", 2, 0, 2},
		{"tools/call", "deleteOrder", `{"orderId":1}`, 1, "unknown", 1, 1, 1},
		{"tools/call", "deleteOrder", `{"orderId":1}`, 0, "completed", 1, 1, 1},
		{"tools/call", "addPet", `{"body":{"name":"x","photoUrls":[]}}`, 1, "completed", 2, 0, 2}, // named in Idempotent
		{"tools/call", "deleteOrder", `{"orderId":"x"}`, 0, "completed", 0, 1, 0},
		{"tools/call", "nothing", `{}`, 0, "completed", 0, 1, 0},
		{"tools/list", "", `{}`, 0, "completed", 0, 0, 0},
	} {
		t.Run(c.method+" "+c.tool, func(t *testing.T) {
			var requests atomic.Int32
			r := newRig(t, func(w http.ResponseWriter, _ *http.Request) {
				if int(requests.Add(1)) <= c.hangUps {
					hangUp(w)
					return
				}
				answerJSON(w, 200, `{"name":"x","photoUrls":[]}`)
			}, func(o *Options) {
				base := strings.TrimSuffix(o.Servers[0].URL, "/mcp")
				o.Servers = []Server{{Name: "s", Protocol: "openapi", Idempotent: []string{"add*"}, OpenAPI: &OpenAPI{Document: "testdata/openapi/petstore.yaml", BaseURL: base}}}
			})
			e := r.method(c.method, c.tool, fmt.Sprintf(`{"jsonrpc":"2.0","id":1,"method":%q,"params":{"name":%q,"arguments":%s}}`, c.method, c.tool, c.arguments))
			r.handle(e)
			end := r.want(c.outcome)
			if n := int(requests.Load()); n != c.requests || len(r.log.of(schemas.KindStarted)) != c.claims || summary(end).Attempts != c.attempts {
				t.Errorf("%d requests, %d claims, %d attempts: %v", n, len(r.log.of(schemas.KindStarted)), summary(end).Attempts, r.log)
			}
		})
	}
}

// A list does not make a breaker believe that the API is back.
func TestOpenAPILocalAnswersAndTheBreaker(t *testing.T) {
	var d *Dispatcher
	for _, method := range []string{"tools/call", "tools/list", "tools/call"} {
		r := newRig(t, nil, func(o *Options) {
			o.Servers = []Server{{Name: "s", Protocol: "openapi", OpenAPI: &OpenAPI{Document: "testdata/openapi/petstore.yaml", BaseURL: unused(t)}}}
			o.Breaker = Breaker{Failures: 2, Rest: time.Hour}
			o.Attempts = 1
		})
		if d == nil {
			d = r.d
		}
		d.opt.Load, d.opt.Past, r.d = r.log.load, r.log.past, d
		r.handle(r.method(method, "deleteOrder", fmt.Sprintf(`{"jsonrpc":"2.0","id":1,"method":%q,"params":{"name":"deleteOrder","arguments":{"orderId":1}}}`, method)))
	}
	if state := d.Stats()[0].Breaker; state != "open" {
		t.Errorf("the breaker is %s: two failures in a row, and a list between", state)
	}
}
