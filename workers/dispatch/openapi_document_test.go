package dispatch

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// minimal is a document with one operation, which returns what is put in.
func minimal(operation string) string {
	return "openapi: 3.0.3\ninfo: {title: t, version: '1'}\nservers: [{url: 'https://api.example/v1'}]\npaths:\n  /x:\n    get:\n" +
		"      operationId: x\n      responses: {'200': {description: ok}}\n" + operation
}

// What cannot be read is refused in words, whatever it is.
func TestDocumentRefused(t *testing.T) {
	dir := t.TempDir()
	outside := filepath.Join(t.TempDir(), "outside.yaml")
	write := func(name, text string) {
		t.Helper()
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(outside, []byte("{type: string}"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(os.Symlink(outside, filepath.Join(dir, "link.yaml")), syscall.Mkfifo(filepath.Join(dir, "pipe.yaml"), 0o600), os.Mkdir(filepath.Join(dir, "dir.yaml"), 0o700)); err != nil {
		t.Fatal(err)
	}
	with := func(ref string) string {
		return minimal(fmt.Sprintf("      parameters: [{name: p, in: query, schema: {$ref: '%s'}}]\n", ref))
	}
	bomb := "a: &a [x,x,x,x,x,x,x,x,x]\n"
	for c := 'b'; c < 'k'; c++ {
		bomb += fmt.Sprintf("%c: &%c [*%c,*%c,*%c,*%c,*%c,*%c,*%c,*%c,*%c]\n", c, c, c-1, c-1, c-1, c-1, c-1, c-1, c-1, c-1, c-1)
	}
	for name, c := range map[string]struct{ text, want string }{
		"empty.yaml":    {"", `no member "openapi"`},
		"list.yaml":     {"[]", "cannot unmarshal"},
		"broken.yaml":   {"openapi: [", "yaml"},
		"binary.yaml":   {"\x00\x01", "control characters"},
		"swagger.yaml":  {"swagger: '2.0'", "Swagger 2.0 is not read"},
		"three.yaml":    {"openapi: 3.2.0\npaths: {}", "neither 3.0 nor 3.1"},
		"nothing.yaml":  {"openapi: 3.1.0\ninfo: {title: t, version: '1'}", "no paths"},
		"http.yaml":     {with("http://127.0.0.1:1/s.yaml#/x"), "refers to http://127.0.0.1:1/s.yaml: nothing is fetched"},
		"host.yaml":     {with("//127.0.0.1/s.yaml"), "nothing is fetched"},
		"file.yaml":     {with("file:///etc/passwd"), "nothing is fetched"},
		"absolute.yaml": {with("/etc/passwd"), "only files in its own directory are read"},
		"up.yaml":       {with("../outside.yaml"), "only files in its own directory are read"},
		"linked.yaml":   {with("link.yaml"), "only files in its own directory are read"},
		"piped.yaml":    {with("pipe.yaml"), "not a file"},
		"absent.yaml":   {with("absent/s.yaml"), "no such file"},
		"dangling.yaml": {with("#/components/schemas/None"), "not found"},
		"bomb.yaml":     {bomb + "openapi: 3.0.0\n", ""},
		"relative.yaml": {strings.Replace(minimal(""), "https://api.example/v1", "/v1", 1), "relative; set the url"},
		"nowhere.yaml":  {strings.Replace(minimal(""), "servers: [{url: 'https://api.example/v1'}]", "", 1), "does not say where the API is; set its url"},
		"ftp.yaml":      {strings.Replace(minimal(""), "https:", "ftp:", 1), "must be http or https"},
		"user.yaml":     {strings.Replace(minimal(""), "https://", "https://u:password@", 1), "holds credentials"},
		"notool.yaml":   {"openapi: 3.0.0\ninfo: {title: t, version: '1'}\nservers: [{url: 'https://a.example'}]\npaths: {/x: {trace: {responses: {}}}}", "no operation of the document can be made a tool; "},
		"pipe.yaml":     {"", "not a file"},
		"dir.yaml":      {"", "not a file"},
		"none.yaml":     {"", "no such file"},
	} {
		t.Run(name, func(t *testing.T) {
			if c.text != "" {
				write(name, c.text)
			} else if name == "empty.yaml" {
				write(name, "")
			}
			_, err := ImportOpenAPI(Server{OpenAPI: &OpenAPI{Document: filepath.Join(dir, name)}})
			if err == nil || !strings.Contains(err.Error(), c.want) || len(err.Error()) > 2*maxWords || strings.Contains(err.Error(), "password") {
				t.Errorf("%v\nwant %s", err, c.want)
			}
		})
	}
}

// A document in several files is one: pinned as a whole, read again when any of
// them changes.
func TestDocumentReadAgain(t *testing.T) {
	a := newAPI(t, minimal("      parameters: [{$ref: 'parts/p.yaml'}]\n"), answerWith(200, "text/plain", "ok"), func(s *Server, _ *Options) {
		dir := filepath.Join(filepath.Dir(s.OpenAPI.Document), "parts")
		if err := errors.Join(os.Mkdir(dir, 0o700), os.WriteFile(filepath.Join(dir, "p.yaml"), []byte("{name: p, in: query, schema: {type: string}}"), 0o600)); err != nil {
			t.Fatal(err)
		}
		s.OpenAPI.Auth = map[string]string{}
	})
	part := filepath.Join(filepath.Dir(a.file), "parts", "p.yaml")
	list := func() string { return string(a.result(modernRevision, "tools/list", `{}`).Raw()) }
	later := func() { a.now = a.now.Add(2 * recheck) }
	first := list()

	// A part changes.
	if err := os.WriteFile(part, []byte("{name: q, in: query, required: true, schema: {type: string}}"), 0o600); err != nil {
		t.Fatal(err)
	}
	if list() != first {
		t.Error("the files are looked at more often than once in a while")
	}
	later()
	second := list()
	if !strings.Contains(second, `"required":["q"]`) || !strings.Contains(a.logs.String(), "before=") {
		t.Errorf("%s\n%s", second, a.logs)
	}
	if text, r := a.tool("x", `{"q":"1"}`); text != "ok" || isError(r) {
		t.Error(text)
	}

	// What cannot be used is not taken, and said once.
	for what, text := range map[string]string{
		"broken":    "openapi: [",
		"elsewhere": strings.Replace(minimal(""), "api.example", "evil.example", 1),
		"remote":    minimal("      parameters: [{$ref: 'https://evil.example/p.yaml'}]\n"),
	} {
		before := strings.Count(a.logs.String(), "cannot be used")
		a.write(text)
		for range 3 {
			later()
			// The address is configured in this test, so a document may say another.
			if got := list(); got != second && what != "elsewhere" {
				t.Errorf("%s: %s", what, got)
			}
		}
		if n := strings.Count(a.logs.String(), "cannot be used") - before; n != 1 && what != "elsewhere" {
			t.Errorf("%s: said %d times\n%s", what, n, a.logs)
		}
		a.write(minimal("      parameters: [{$ref: 'parts/p.yaml'}]\n"))
		later()
		if list() != second {
			t.Errorf("after %s: %s", what, list())
		}
	}
	// Gone, and back.
	if err := os.Remove(a.file); err != nil {
		t.Fatal(err)
	}
	later()
	if list() != second {
		t.Error("the document is gone, and so are the tools")
	}
	a.write(minimal(""))
	later()
	if third := list(); third == second {
		t.Errorf("the document is back, and not read: %s", third)
	}
}

// Without an address of the configuration the first document decides, and no
// later one can have the secrets sent elsewhere.
func TestDocumentCannotMove(t *testing.T) {
	a := newAPI(t, minimal(""), nil, func(s *Server, _ *Options) { s.OpenAPI.BaseURL = "" })
	before := a.result(modernRevision, "tools/list", `{}`)
	a.write(strings.ReplaceAll(strings.Replace(minimal(""), "api.example", "evil.example", 1), "operationId: x", "operationId: y"))
	a.now = a.now.Add(2 * recheck)
	if after := a.result(modernRevision, "tools/list", `{}`); string(after.Raw()) != string(before.Raw()) {
		t.Errorf("taken: %s", after.Raw())
	}
	if log := a.logs.String(); !strings.Contains(log, "its server is now https://evil.example/v1, and was https://api.example/v1: restart") {
		t.Error(log)
	}
	// Another path of the same place is well.
	a.write(strings.ReplaceAll(strings.Replace(minimal(""), "/v1", "/v2", 1), "operationId: x", "operationId: y"))
	a.now = a.now.Add(2 * recheck)
	if after := a.result(modernRevision, "tools/list", `{}`); !strings.Contains(string(after.Raw()), `"name":"y"`) {
		t.Errorf("not taken: %s", after.Raw())
	}
}

// A tool that was a read does not become a write while calls to it may be on
// their way without a claim.
func TestReadDoesNotBecomeWrite(t *testing.T) {
	a := newAPI(t, minimal(""), answerWith(204, "", ""))
	a.write(strings.Replace(minimal(""), "    get:", "    delete:", 1) + "  /y: {get: {operationId: y, responses: {'200': {description: ok}}}}\n")
	a.now = a.now.Add(2 * recheck)
	list := string(a.result(modernRevision, "tools/list", `{}`).Raw())
	if strings.Contains(list, `"name":"x"`) || !strings.Contains(list, `"name":"y"`) || !strings.Contains(a.logs.String(), "it was a read and is one no longer") {
		t.Errorf("%s\n%s", list, a.logs)
	}
	// Not even when it was away for a while.
	a.write(strings.ReplaceAll(minimal(""), "operationId: x", "operationId: z"))
	a.now = a.now.Add(2 * recheck)
	a.result(modernRevision, "tools/list", `{}`)
	a.write(strings.Replace(minimal(""), "    get:", "    delete:", 1) + "  /y: {get: {operationId: y, responses: {'200': {description: ok}}}}\n")
	a.now = a.now.Add(2 * recheck)
	if list := string(a.result(modernRevision, "tools/list", `{}`).Raw()); strings.Contains(list, `"name":"x"`) {
		t.Error(list)
	}
}

// A file that changes within a tick of its clock is noticed.
func TestDocumentSameTick(t *testing.T) {
	a := newAPI(t, minimal(""), nil, func(_ *Server, o *Options) { o.Now = time.Now })
	info, err := os.Stat(a.file)
	if err != nil {
		t.Fatal(err)
	}
	_, files, err := readDocument(a.file, func() time.Time { return info.ModTime().Add(fileClock / 2) })
	if err != nil {
		t.Fatal(err)
	}
	if unchanged(a.file, files) {
		t.Error("it was read right after it was written, and counts as known")
	}
	_, files, err = readDocument(a.file, func() time.Time { return info.ModTime().Add(2 * fileClock) })
	if err != nil || !unchanged(a.file, files) {
		t.Errorf("it counts as changed: %v", err)
	}
}

// FuzzDocument: whatever a document says, it is refused in words, or its tools
// can be listed and called with nothing, and no call is made of what does not
// fit.
func FuzzDocument(f *testing.F) {
	for _, s := range []string{
		minimal("      parameters: [{name: p, in: query, schema: {$ref: '#/components/schemas/A'}}]\ncomponents: {schemas: {A: {$ref: '#/components/schemas/A'}}}"),
		minimal("      parameters: [{name: p, in: query, schema: {$ref: '#/components/schemas/A'}}]\ncomponents: {schemas: {A: {allOf: [{$ref: '#/components/schemas/A'}]}}}"),
		minimal("      requestBody: {content: {multipart/form-data: {schema: {type: object, properties: {a: {type: string, format: binary}}}}}}"),
		minimal("      parameters: [null, {}]"), minimal("      security: [null, {a: null}]"), minimal("      requestBody: {}"),
		"openapi: 3.1.0\npaths: {/{a}: {get: {parameters: [{name: a, in: path, schema: {type: [string, 'null']}}]}}}",
		"openapi: 3.1.0\npaths: {/: null, /a: {get: null, servers: [null]}}",
	} {
		f.Add(s)
	}
	real, err := filepath.Glob("testdata/openapi/*.yaml")
	if err != nil || len(real) == 0 {
		f.Fatal("no documents", err)
	}
	for _, file := range real {
		text, err := os.ReadFile(file)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(string(text))
	}
	f.Fuzz(func(t *testing.T, text string) {
		file := filepath.Join(t.TempDir(), "api.yaml")
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		api, err := newRESTAPI(Server{Name: "f", OpenAPI: &OpenAPI{Document: file, BaseURL: "https://api.example"}}, Options{Now: time.Now})
		if err != nil {
			if err.Error() == "" {
				t.Fatal("refused without a word")
			}
			return
		}
		doc := api.doc.Load()
		for _, tool := range doc.order {
			if len(tool.name) > maxToolName || toolName(tool.name, "", "") != tool.name {
				t.Errorf("a tool is called %q", tool.name)
			}
			m := mcpAnswer{id: []byte("1"), doc: doc}
			if _, err := m.list(""); err != nil {
				t.Error(err)
			}
			checkRequest(t, tool, `{}`)
		}
	})
}
