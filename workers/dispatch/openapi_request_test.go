package dispatch

import (
	"encoding/json"
	"fmt"
	"io"
	"mime"
	"mime/multipart"
	"net/http"
	"net/url"
	"strings"
	"sync/atomic"
	"testing"
	"unicode/utf8"

	"waybill.dev/schemas/jsonrpc"
)

// checkRequest makes a request of arguments, if they fit, and checks that it
// keeps to its place.
func checkRequest(t *testing.T, tool *restTool, arguments string) {
	t.Helper()
	v, err := jsonrpc.Parse([]byte(arguments), jsonrpc.Limits{})
	if err != nil || v.Kind() != jsonrpc.Object || len(tool.check(v)) > 0 {
		return
	}
	req, err := tool.request(v, http.Header{"X-Operator": {"o"}})
	if err != nil {
		if err.Error() == "" {
			t.Error("refused without a word")
		}
		return
	}
	where := fmt.Sprintf("%s with %s: %s %s", tool.name, arguments, req.Method, req.URL)
	if req.URL.Scheme != tool.base.Scheme || req.URL.Host != tool.base.Host || req.URL.User != nil || req.URL.Fragment != "" || req.Method != tool.method {
		t.Errorf("%s: not the API", where)
	}
	again, err := url.Parse(req.URL.String())
	if err != nil || again.EscapedPath() != req.URL.EscapedPath() || again.RawQuery != req.URL.RawQuery {
		t.Errorf("%s: read again it is %v, %v", where, again, err)
	}
	if got, want := strings.Count(req.URL.EscapedPath(), "/"), strings.Count(tool.base.EscapedPath()+tool.path, "/"); got != want {
		t.Errorf("%s: %d segments instead of %d", where, got, want)
	}
	for step := range strings.SplitSeq(req.URL.Path, "/") {
		if step == "." || step == ".." {
			t.Errorf("%s: a step up", where)
		}
	}
	if req.Header.Get("X-Operator") != "o" {
		t.Errorf("%s: the operator's header is %q", where, req.Header.Get("X-Operator"))
	}
	for name, values := range req.Header {
		for _, value := range values {
			if !headerName(name) || !headerValue(value) {
				t.Errorf("%s: header %q: %q", where, name, value)
			}
		}
	}
	if err := req.Write(io.Discard); err != nil {
		t.Errorf("%s: it cannot be written: %v", where, err)
	}
}

// styled is a tool with a parameter of every style.
const styled = `openapi: 3.0.3
info: {title: styles, version: '1'}
paths:
  /simple/{a}: {get: {operationId: simple, parameters: [{name: a, in: path, required: true, schema: {}}], responses: {}}}
  /simple/x{a}: {get: {operationId: simpleExplode, parameters: [{name: a, in: path, required: true, explode: true, schema: {}}], responses: {}}}
  /label/{a}: {get: {operationId: label, parameters: [{name: a, in: path, required: true, style: label, schema: {}}], responses: {}}}
  /label/x{a}: {get: {operationId: labelExplode, parameters: [{name: a, in: path, required: true, style: label, explode: true, schema: {}}], responses: {}}}
  /matrix/{a}: {get: {operationId: matrix, parameters: [{name: a, in: path, required: true, style: matrix, schema: {}}], responses: {}}}
  /matrix/x{a}: {get: {operationId: matrixExplode, parameters: [{name: a, in: path, required: true, style: matrix, explode: true, schema: {}}], responses: {}}}
  /form: {get: {operationId: form, parameters: [{name: a, in: query, explode: false, schema: {}}], responses: {}}}
  /formx: {get: {operationId: formExplode, parameters: [{name: a, in: query, schema: {}}], responses: {}}}
  /space: {get: {operationId: space, parameters: [{name: a, in: query, style: spaceDelimited, explode: false, schema: {}}], responses: {}}}
  /pipe: {get: {operationId: pipe, parameters: [{name: a, in: query, style: pipeDelimited, explode: false, schema: {}}], responses: {}}}
  /deep: {get: {operationId: deep, parameters: [{name: a, in: query, style: deepObject, explode: true, schema: {}}], responses: {}}}
  /reserved: {get: {operationId: reserved, parameters: [{name: a, in: query, allowReserved: true, schema: {}}], responses: {}}}
  /json: {get: {operationId: json, parameters: [{name: a, in: query, content: {application/json: {schema: {}}}}], responses: {}}}
  /header: {get: {operationId: header, parameters: [{name: X-A, in: header, schema: {}}], responses: {}}}
  /headerx: {get: {operationId: headerExplode, parameters: [{name: X-A, in: header, explode: true, schema: {}}], responses: {}}}
  /cookie: {get: {operationId: cookie, parameters: [{name: a, in: cookie, schema: {}}, {name: b, in: cookie, schema: {}}], responses: {}}}
  /names: {get: {operationId: names, parameters: [{name: 'filter[x]', in: query, schema: {}}, {name: id, in: query, schema: {}}, {name: id, in: header, schema: {}}], responses: {}}}
  /key: {post: {operationId: key, parameters: [{name: Idempotency-Key, in: header, schema: {}}], responses: {}}}
`

// Every style, with a scalar, a list and an object (OpenAPI 3.0.4, "Style
// Examples").
func TestParameterStyles(t *testing.T) {
	a := newAPI(t, styled, answerWith(204, "", ""))
	const scalarA, listA, objectA, emptyList, nested = `"b l&/?ü"`, `["blue","bl,k",1.50,true]`, `{"R":100,"G":"2 0"}`, `[]`, `[["x"]]`
	for _, c := range []struct{ tool, value, want string }{
		{"simple", scalarA, "/simple/b%20l%26%2F%3F%C3%BC"}, {"simple", listA, "/simple/blue,bl%2Ck,1.50,true"}, {"simple", objectA, "/simple/G,2%200,R,100"},
		{"simpleExplode", listA, "/simple/xblue,bl%2Ck,1.50,true"}, {"simpleExplode", objectA, "/simple/xG=2%200,R=100"},
		{"label", scalarA, "/label/.b%20l%26%2F%3F%C3%BC"}, {"label", listA, "/label/.blue,bl%2Ck,1.50,true"}, {"label", objectA, "/label/.G,2%200,R,100"},
		{"labelExplode", listA, "/label/x.blue.bl%2Ck.1.50.true"}, {"labelExplode", objectA, "/label/x.G=2%200.R=100"},
		{"matrix", scalarA, "/matrix/;a=b%20l%26%2F%3F%C3%BC"}, {"matrix", listA, "/matrix/;a=blue,bl%2Ck,1.50,true"}, {"matrix", objectA, "/matrix/;a=G,2%200,R,100"},
		{"matrixExplode", listA, "/matrix/x;a=blue;a=bl%2Ck;a=1.50;a=true"}, {"matrixExplode", objectA, "/matrix/x;G=2%200;R=100"},
		{"form", scalarA, "/form?a=b%20l%26%2F%3F%C3%BC"}, {"form", listA, "/form?a=blue,bl%2Ck,1.50,true"}, {"form", objectA, "/form?a=G,2%200,R,100"},
		{"form", emptyList, "/form"}, {"form", `""`, "/form?a="}, {"form", `null`, "/form"},
		{"formExplode", listA, "/formx?a=blue&a=bl%2Ck&a=1.50&a=true"}, {"formExplode", objectA, "/formx?G=2%200&R=100"},
		{"space", listA, "/space?a=blue%20bl%2Ck%201.50%20true"}, {"pipe", listA, "/pipe?a=blue%7Cbl%2Ck%7C1.50%7Ctrue"},
		{"deep", objectA, "/deep?a%5BG%5D=2%200&a%5BR%5D=100"}, {"deep", `{"x":{"y":[1,2]}}`, "/deep?a%5Bx%5D%5By%5D=1&a%5Bx%5D%5By%5D=2"},
		{"reserved", `"a/b:c?d&e=f#g+h"`, "/reserved?a=a/b:c?d%26e%3Df%23g%2Bh"},
		{"json", `{"b":[1,"x"],"a":9007199254740993}`, "/json?a=%7B%22a%22%3A9007199254740993%2C%22b%22%3A%5B1%2C%22x%22%5D%7D"},
		{"form", `1E400`, "/form?a=1E400"}, {"form", `9007199254740993`, "/form?a=9007199254740993"},
		{"form", nested, ""}, {"deep", `{"x":[[1]]}`, ""}, {"simple", nested, ""}, {"simple", `null`, ""}, {"simple", emptyList, ""}, {"simple", `".."`, ""}, {"simple", `"..;a=b"`, ""}, {"label", `"."`, ""},
	} {
		arguments := `{"a":` + c.value + `}`
		text, r := a.tool(c.tool, arguments)
		seen := a.requests()
		switch {
		case c.want == "" && (len(seen) > 0 || !isError(r)):
			t.Errorf("%s %s: %v, %s", c.tool, c.value, seen, text)
		case c.want != "" && (len(seen) != 1 || seen[0].line != "GET "+c.want):
			t.Errorf("%s %s: %v, %s\nwant %s", c.tool, c.value, seen, text, c.want)
		}
	}
	for _, c := range []struct{ tool, arguments, header, want string }{
		{"header", `{"X-A":["a",1]}`, "X-A", "a,1"}, {"header", `{"X-A":{"k":"v","j":1}}`, "X-A", "j,1,k,v"}, {"headerExplode", `{"X-A":{"k":"v","j":1}}`, "X-A", "j=1,k=v"},
		{"cookie", `{"a":"x; y=z","b":[1,2]}`, "Cookie", "a=x%3B%20y%3Dz; b=1,2"},
		{"names", `{"filter_x":1,"id_query":"q","id_header":"h"}`, "Id", "h"},
		{"key", `{"Idempotency-Key":"k1"}`, "Idempotency-Key", "k1"},
	} {
		text, _ := a.tool(c.tool, c.arguments)
		seen := a.requests()
		if len(seen) != 1 || seen[0].header.Get(c.header) != c.want {
			t.Errorf("%s: %v, %s", c.tool, seen, text)
		}
		if c.tool == "names" && seen[0].line != "GET /names?filter%5Bx%5D=1&id=q" {
			t.Errorf("names: %s", seen[0].line)
		}
	}
	for _, wrong := range []string{`"a\nX-Evil: 1"`, `"ü"`, `"\u0000"`} {
		if text, r := a.tool("header", `{"X-A":`+wrong+`}`); !isError(r) || !strings.Contains(text, "visible ASCII") {
			t.Errorf("header %s: %s", wrong, text)
		}
	}
	if n := len(a.requests()); n != 0 {
		t.Errorf("%d requests were made", n)
	}
}

// An Idempotency-Key is for the API: net/http does not send again because of it.
// No argument brings another value under the name of a credential.
func TestAuthorizeAlone(t *testing.T) {
	w := &wire{header: http.Header{}, path: "/x", query: []string{"key=mine", "keys=1", "a=key"}, cookie: []string{"sid=mine", "a=sid"}}
	w.authorize(credential{in: "query", name: "key", value: "s&t"})
	w.authorize(credential{in: "cookie", name: "sid", value: "c"})
	u, err := w.url(&url.URL{Scheme: "http", Host: "h"})
	if err != nil || u.RawQuery != "keys=1&a=key&key=s%26t" || w.header.Get("Cookie") != "a=sid; sid=c" {
		t.Errorf("%v %v %v", u, w.header, err)
	}
}

func TestIdempotencyKeyIsNotRepeated(t *testing.T) {
	var tries atomic.Int32
	a := newAPI(t, styled, func(w http.ResponseWriter, _ *http.Request) {
		if tries.Add(1) > 1 {
			hangUp(w)
		}
	})
	call := func() error {
		_, err := a.ask(modernRevision, "tools/call", `{"name":"key","arguments":{"Idempotency-Key":"k"}}`)
		return err
	}
	if err := call(); err != nil { // leaves a connection to reuse
		t.Fatal(err)
	}
	if err := call(); err == nil || tries.Load() != 2 {
		t.Errorf("%d requests, %v", tries.Load(), err)
	}
}

const bodies = `openapi: 3.1.0
info: {title: bodies, version: '1'}
paths:
  /form:
    post:
      operationId: form
      requestBody:
        content:
          application/xml: {schema: {type: object}}
          application/x-www-form-urlencoded:
            schema: {type: object, properties: {a: {type: string}, list: {type: array, items: {type: string}}, joined: {type: array}, o: {type: object}, deep: {type: object}}}
            encoding: {joined: {style: form, explode: false}, deep: {style: deepObject, explode: true}}
      responses: {}
  /multipart:
    post:
      operationId: multipart
      requestBody:
        content:
          multipart/form-data:
            schema: {type: object, properties: {note: {type: string}, file: {type: string, format: binary}, pics: {type: array, items: {type: string, format: binary}}, meta: {type: object}}}
            encoding: {file: {contentType: 'image/png, image/jpeg'}}
      responses: {}
  /text: {post: {operationId: text, requestBody: {content: {text/plain: {}}}, responses: {}}}
  /patch: {patch: {operationId: patch, requestBody: {content: {application/merge-patch+json: {schema: {type: object}}}}, responses: {}}}
  /any: {put: {operationId: any, parameters: [{name: body, in: query, schema: {type: string}}], requestBody: {content: {'*/*': {schema: {}}}}, responses: {}}}
`

func TestBodies(t *testing.T) {
	a := newAPI(t, bodies, answerWith(204, "", ""))
	for _, c := range []struct{ tool, arguments, media, body string }{
		{"form", `{"body":{"a":"x y&=ü+","list":["1","2"],"joined":["a","b,c"],"o":{"k":[1]},"deep":{"k":"v"},"other":1,"none":null}}`, "application/x-www-form-urlencoded",
			"a=x%20y%26%3D%C3%BC%2B&deep%5Bk%5D=v&joined=a,b%2Cc&list=1&list=2&none=&o=%7B%22k%22%3A%5B1%5D%7D&other=1"},
		{"text", `{"body":"grüße\n"}`, "text/plain; charset=utf-8", "grüße\n"},
		{"patch", `{"body":{"a": null, "n":1.0}}`, "application/merge-patch+json", `{"a": null, "n":1.0}`},
		{"any", `{"body":"q","request_body":[ 1 ]}`, "application/json", `[ 1 ]`},
		{"any", `{"request_body":null}`, "application/json", `null`},
		{"text", `{}`, "", ""},
	} {
		text, _ := a.tool(c.tool, c.arguments)
		seen := a.requests()
		if len(seen) != 1 || seen[0].header.Get("Content-Type") != c.media || seen[0].body != c.body {
			t.Errorf("%s %s: %+v, %s", c.tool, c.arguments, seen, text)
		}
	}

	a.tool("multipart", `{"body":{"note":"hi","file":"iVBORw==","pics":["AA==","AQ=="],"meta":{"a":1},"x\"y":true}}`)
	seen := a.requests()
	if len(seen) != 1 {
		t.Fatal(seen)
	}
	_, params, err := mime.ParseMediaType(seen[0].header.Get("Content-Type"))
	if err != nil {
		t.Fatal(err)
	}
	var parts []string
	for r := multipart.NewReader(strings.NewReader(seen[0].body), params["boundary"]); ; {
		p, err := r.NextPart()
		if err == io.EOF {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		b, _ := io.ReadAll(p)
		parts = append(parts, fmt.Sprintf("%s|%s|%s|%q", p.FormName(), p.FileName(), p.Header.Get("Content-Type"), b))
	}
	want := []string{
		`file|file|image/png|"\x89PNG"`, `meta||application/json|"{\"a\":1}"`, `note|||"hi"`,
		`pics|pics|application/octet-stream|"\x00"`, `pics|pics|application/octet-stream|"\x01"`, `x%22y|||"true"`,
	}
	if strings.Join(parts, "\n") != strings.Join(want, "\n") {
		t.Errorf("%s", strings.Join(parts, "\n"))
	}
	for _, c := range [][2]string{{"multipart", `{"body":{"file":"no base64"}}`}, {"form", `{"body":{"a":[["x"]]}}`}, {"form", `{"body":[1]}`}} {
		if _, r := a.tool(c[0], c[1]); !isError(r) || len(a.requests()) != 0 {
			t.Errorf("%s %s: %s", c[0], c[1], r.Raw())
		}
	}
}

// FuzzArguments: whatever the arguments are, a request stays in its place: the
// API, the path's segments, the names of parameters, one line for a header.
func FuzzArguments(f *testing.F) {
	for _, s := range []string{"a", "", ".", "..", "a/../b", "%2e%2e", "a%00", "\r\nX: y", "?q#f", "ü€", "a;b=c", "{a}", "\\..\\", " ", "\u2028"} {
		f.Add(s, "key", 3)
	}
	var tools []*restTool
	for _, text := range []string{styled, bodies} {
		tools = append(tools, toolsOf(f, text)...)
	}
	f.Fuzz(func(t *testing.T, value, key string, form int) {
		if !utf8.ValidString(value) || !utf8.ValidString(key) {
			return
		}
		var v any = value
		switch form & 7 {
		case 1:
			v = []string{value, key}
		case 2:
			v = map[string]any{key: value}
		case 3:
			v = map[string]any{key: []any{value, 1, nil}}
		case 4:
			v = map[string]any{"a": value, "file": value, "list": []string{value}, "deep": map[string]any{key: value}}
		}
		for _, tool := range tools {
			arguments := map[string]any{}
			for _, p := range tool.params {
				arguments[p.property] = v
			}
			if tool.body != nil {
				arguments[tool.body.property] = v
			}
			b, err := json.Marshal(arguments)
			if err != nil {
				t.Fatal(err)
			}
			checkRequest(t, tool, string(b))
			if tool.name == "formExplode" && form&7 == 0 {
				p, _ := jsonrpc.Parse(b, jsonrpc.Limits{})
				req, err := tool.request(p, http.Header{})
				if err != nil || req.URL.Query().Get("a") != value {
					t.Errorf("sent %q, read %v (%v)", value, req.URL, err)
				}
			}
		}
	})
}
