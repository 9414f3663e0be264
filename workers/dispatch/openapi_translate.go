package dispatch

import (
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"mime"
	"net/http"
	"net/url"
	"regexp"
	"slices"
	"strings"

	"github.com/getkin/kin-openapi/openapi3"
	"github.com/santhosh-tekuri/jsonschema/v6"

	"waybill.dev/schemas/jsonrpc"
)

const (
	maxToolName    = 64
	maxDescription = 4 << 10
	maxTitle       = 100
)

// restDoc is what a document became. It is never changed.
type restDoc struct {
	pin          string
	base         *url.URL
	title        string
	version      string
	instructions string
	tools        map[string]*restTool
	order        []*restTool // by name
	report       []Untranslated
}

// restTool is one operation.
type restTool struct {
	name   string
	method string
	path   string // template; escaped but for the braces
	base   *url.URL
	params []restParam
	body   *restBody
	auth   []credential
	accept string
	pages  []string // properties that lead to further pages

	input  *jsonschema.Schema
	output *jsonschema.Schema // nil: none is promised

	definition    json.RawMessage
	oldDefinition json.RawMessage // for 2025-03-26, which has no titles and no output schemas
}

// harmless: RFC 9110 §9.2.1 calls these methods safe.
func (t *restTool) harmless() bool {
	return t.method == http.MethodGet || t.method == http.MethodHead || t.method == http.MethodOptions
}

// restParam is a parameter, and the property of the arguments that is its value.
type restParam struct {
	property string
	name     string
	in       string // path, query, header, cookie
	style    string
	explode  bool
	reserved bool // reserved characters are not escaped
	json     bool // its value is JSON text
}

// restBody is a request's body, and the property that is its value.
type restBody struct {
	property string
	media    string
	kind     bodyKind
	fields   map[string]bodyField // of form and multipart
}

type bodyKind int

const (
	bodyJSON bodyKind = iota
	bodyForm
	bodyMultipart
	bodyText
	bodyBinary // as base64
)

// bodyField says how a member of a form is written.
type bodyField struct {
	style   string // "" is form
	explode bool
	media   string // of its part; application/json also in urlencoded forms
	binary  bool   // base64 of what is sent
}

// credential is what an operation's security requirement adds.
type credential struct {
	in    string // header, query, cookie
	name  string
	value string
}

// check tells what of the arguments does not fit.
func (t *restTool) check(arguments jsonrpc.Value) []string {
	raw := []byte("{}")
	if arguments.Exists() {
		raw = arguments.Raw()
	}
	v, err := jsonschema.UnmarshalJSON(bytes.NewReader(raw))
	if err != nil {
		return []string{err.Error()}
	}
	return violations(t.input, v)
}

// translation is the making of a restDoc.
type translation struct {
	api     *restAPI
	doc     *readAPI
	origin  string // scheme and host of the document's own first server, if it has one
	out     *restDoc
	op      string // of which is reported
	schemes map[string]*openapi3.SecurityScheme
	outputs map[*openapi3.Schema]*outputSchema // many operations answer with the same
}

// outputSchema is a schema of answers, or why there is none.
type outputSchema struct {
	raw      json.RawMessage
	compiled *jsonschema.Schema
	err      error
	notes    []Untranslated
}

// translate makes tools of a document. What it cannot say in a tool, it says
// in the report: a parameter that may be left out is left out, else the tool is.
func (a *restAPI) translate(doc *readAPI) (*restDoc, error) {
	t := &translation{
		api: a, doc: doc, schemes: map[string]*openapi3.SecurityScheme{}, outputs: map[*openapi3.Schema]*outputSchema{},
		out: &restDoc{pin: doc.pin, tools: map[string]*restTool{}},
	}
	if doc.Info != nil {
		t.out.title, t.out.version = clip(doc.Info.Title, maxTitle), clip(doc.Info.Version, maxTitle)
		t.out.instructions = clip(strings.TrimSpace(doc.Info.Description), maxDescription)
	}
	if err := t.where(); err != nil {
		return nil, err
	}
	if err := t.security(); err != nil {
		return nil, err
	}
	// What does not keep to the specification is said; whether a tool can be
	// made of it is seen below.
	if err := t.doc.Validate(context.Background(), openapi3.DisableExamplesValidation(), openapi3.DisableSchemaDefaultsValidation(),
		openapi3.DisableSchemaPatternValidation(), openapi3.DisableSchemaFormatValidation(), openapi3.IsOpenAPI31OrLater()); err != nil {
		t.note("document", "not valid: "+clip(strings.ReplaceAll(err.Error(), "\n", " "), maxWords))
	}
	if len(doc.Webhooks) > 0 {
		t.note("webhooks", "are not translated")
	}

	var tools []*restTool
	ids := map[*restTool]string{}
	paths := doc.Paths.Map()
	for _, path := range slices.Sorted(maps.Keys(paths)) {
		if paths[path] == nil {
			continue
		}
		operations := paths[path].Operations()
		for _, method := range slices.Sorted(maps.Keys(operations)) {
			op := operations[method]
			t.op = cmp.Or(op.OperationID, method+" "+path)
			tool, err := t.tool(method, path, paths[path], op)
			if err != nil {
				t.note("tool", "left out: "+err.Error())
				continue
			}
			ids[tool] = t.op
			tools = append(tools, tool)
		}
	}
	// Operations whose names became the same all get a longer one, so that no
	// name depends on the order, or on what else there is.
	count := map[string]int{}
	for _, tool := range tools {
		count[tool.name]++
	}
	for _, tool := range tools {
		if count[tool.name] > 1 {
			tool.name = distinct(tool.name, tool.method+" "+tool.path)
		}
	}
	slices.SortFunc(tools, func(a, b *restTool) int { return cmp.Compare(a.name, b.name) })
	for _, tool := range tools {
		t.op = ids[tool]
		switch {
		case t.out.tools[tool.name] != nil:
			t.note("tool", "left out: there is another of the name "+tool.name)
			continue
		case a.reads[tool.name] && !tool.harmless():
			t.note("tool", "left out: it was a read and is one no longer; restart the gateway to take it as it is now")
			continue
		}
		t.out.tools[tool.name] = tool
	}
	for _, name := range slices.Sorted(maps.Keys(t.out.tools)) {
		tool := t.out.tools[name]
		if err := tool.named(); err != nil {
			return nil, fmt.Errorf("tool %s: %w", name, err)
		}
		t.out.order = append(t.out.order, tool)
	}
	if len(t.out.order) == 0 {
		why := ""
		if len(t.out.report) > 0 {
			why = "; " + t.out.report[0].String()
		}
		return nil, fmt.Errorf("no operation of the document can be made a tool%s", why)
	}
	return t.out, nil
}

func (t *translation) note(what, why string) {
	u := Untranslated{Operation: clip(t.op, maxWords), What: what, Why: clip(why, maxWords)}
	if !slices.Contains(t.out.report, u) {
		t.out.report = append(t.out.report, u)
	}
}

// where finds out where the API is. What was read first decides: a document
// that is changed later cannot send the operator's secrets elsewhere.
func (t *translation) where() error {
	first, err := serverURL(t.doc.Servers)
	if first != nil {
		t.origin = first.Scheme + "://" + first.Host
	}
	fixed := t.api.doc.Load() != nil || t.api.server.OpenAPI.BaseURL != ""
	switch {
	case t.api.server.OpenAPI.BaseURL != "":
		t.out.base = t.api.base
	case err != nil:
		return err
	case fixed && (first.Scheme != t.api.base.Scheme || first.Host != t.api.base.Host):
		return fmt.Errorf("its server is now %s, and was %s: restart the gateway to take it", first, t.api.base)
	default:
		t.out.base = first
	}
	return nil
}

// serverURL is the first server, its variables at their defaults.
func serverURL(servers openapi3.Servers) (*url.URL, error) {
	if len(servers) == 0 || servers[0] == nil {
		return nil, errors.New("the document does not say where the API is; set its url")
	}
	text := servers[0].URL
	for name, v := range servers[0].Variables {
		if v != nil {
			text = strings.ReplaceAll(text, "{"+name+"}", v.Default)
		}
	}
	if !strings.Contains(text, "://") {
		return nil, fmt.Errorf("the document's server %q is relative; set the url of the API", clip(text, 100))
	}
	return baseURL(text)
}

// security collects the schemes. A secret for one that does not exist is the
// operator's mistake, when the document is read first.
func (t *translation) security() error {
	if t.doc.Components != nil {
		for name, ref := range t.doc.Components.SecuritySchemes {
			if ref != nil && ref.Value != nil {
				t.schemes[name] = ref.Value
			}
		}
	}
	for _, name := range slices.Sorted(maps.Keys(t.api.server.OpenAPI.Auth)) {
		if t.schemes[name] != nil {
			if _, err := t.credential(name); err != nil {
				return fmt.Errorf("auth: scheme %s: %w", name, err)
			}
			continue
		}
		why := fmt.Sprintf("auth: the document has no security scheme %q, it has: %s", name, strings.Join(slices.Sorted(maps.Keys(t.schemes)), ", "))
		if t.api.doc.Load() == nil {
			return errors.New(why)
		}
		t.note("document", why)
	}
	return nil
}

// credential is what a configured scheme adds to a request.
func (t *translation) credential(name string) (credential, error) {
	secret, ok := t.api.server.OpenAPI.Auth[name]
	if !ok {
		return credential{}, errors.New("not configured")
	}
	s := t.schemes[name]
	if s == nil {
		return credential{}, errors.New("the document does not define it")
	}
	if secret == "" || !headerValue(secret) {
		return credential{}, errors.New("its secret cannot be sent")
	}
	switch {
	case s.Type == "apiKey" && slices.Contains([]string{"header", "query", "cookie"}, s.In):
		if s.In == "header" && (!headerName(s.Name) || ours(http.CanonicalHeaderKey(s.Name))) {
			return credential{}, fmt.Errorf("the header %q cannot be set", s.Name)
		}
		if s.In == "cookie" && !headerName(s.Name) || s.Name == "" {
			return credential{}, fmt.Errorf("the %s %q cannot be set", s.In, s.Name)
		}
		return credential{s.In, s.Name, secret}, nil
	case s.Type == "http" && strings.EqualFold(s.Scheme, "basic"):
		if !strings.Contains(secret, ":") {
			return credential{}, errors.New("http basic: the secret must be user:password")
		}
		return credential{"header", "Authorization", "Basic " + base64Text(secret)}, nil
	case s.Type == "http" && strings.EqualFold(s.Scheme, "bearer"), s.Type == "oauth2", s.Type == "openIdConnect":
		return credential{"header", "Authorization", "Bearer " + secret}, nil
	}
	return credential{}, fmt.Errorf("%s is not supported", strings.TrimSpace(s.Type+" "+s.Scheme))
}

// auth chooses of an operation's alternatives the first that is configured
// whole; calling without credentials comes last. What the operator's own
// headers say counts as configured.
func (t *translation) auth(op *openapi3.Operation) []credential {
	alternatives := t.doc.Security
	if op.Security != nil {
		alternatives = *op.Security
	}
	if len(alternatives) == 0 {
		return nil
	}
	anonymous := false
	var missing []string
next:
	for _, alternative := range alternatives {
		if len(alternative) == 0 {
			anonymous = true
			continue
		}
		var all []credential
		for _, name := range slices.Sorted(maps.Keys(alternative)) {
			c, err := t.credential(name)
			if err == nil {
				all = append(all, c)
				continue
			}
			if s := t.schemes[name]; s != nil {
				header := "Authorization"
				if s.Type == "apiKey" {
					header = ""
					if s.In == "header" {
						header = http.CanonicalHeaderKey(s.Name)
					}
				}
				if t.api.header.Get(header) != "" {
					continue
				}
			}
			missing = append(missing, fmt.Sprintf("%s (%s)", name, err))
			continue next
		}
		return all
	}
	if !anonymous {
		slices.Sort(missing)
		t.note("security", "called without credentials: none of its alternatives is configured: "+strings.Join(slices.Compact(missing), ", "))
	}
	return nil
}

// tool translates one operation. An error is why it cannot be one.
func (t *translation) tool(method, path string, item *openapi3.PathItem, op *openapi3.Operation) (*restTool, error) {
	switch method {
	case http.MethodGet, http.MethodHead, http.MethodOptions, http.MethodPost, http.MethodPut, http.MethodPatch, http.MethodDelete:
	default:
		return nil, fmt.Errorf("the method %s is not called", method)
	}
	tool := &restTool{name: toolName(op.OperationID, method, path), method: method, auth: t.auth(op)}
	var err error
	if tool.base, err = t.base(item, op); err != nil {
		return nil, err
	}
	if tool.path, err = pathTemplate(path); err != nil {
		return nil, err
	}
	if len(op.Callbacks) > 0 {
		t.note("callbacks", "are not translated; nothing of the gateway hears them")
	}

	in := newSchemaWriter(true, t.note)
	properties, required := map[string]any{}, []string{}
	if err := t.parameters(tool, item, op, in, properties, &required); err != nil {
		return nil, err
	}
	if err := t.requestBody(tool, op, in, properties, &required); err != nil {
		return nil, err
	}
	schema := map[string]any{"type": "object", "properties": properties, "additionalProperties": false}
	if len(required) > 0 {
		slices.Sort(required)
		schema["required"] = required
	}
	input, compiled, err := in.finish(schema)
	if err != nil {
		return nil, fmt.Errorf("its input: %w", clipped(err))
	}
	tool.input = compiled
	output, more := t.responses(tool, op)

	definition := map[string]any{"inputSchema": input}
	if d := describe(tool, op, method, path, more); d != "" {
		definition["description"] = d
	}
	readOnly, idempotent := tool.harmless(), method != http.MethodPost && method != http.MethodPatch
	definition["annotations"] = map[string]any{
		"readOnlyHint": readOnly, "idempotentHint": idempotent, "openWorldHint": true,
		"destructiveHint": !readOnly && method != http.MethodPost, // a POST adds, as a rule; PUT, PATCH and DELETE change what is there
	}
	if tool.oldDefinition, err = encodeJSON(definition); err != nil {
		return nil, err
	}
	if s := strings.Join(strings.Fields(op.Summary), " "); s != "" {
		definition["title"] = clip(s, maxTitle)
	}
	if output != nil {
		definition["outputSchema"] = output
	}
	if tool.definition, err = encodeJSON(definition); err != nil {
		return nil, err
	}
	return tool, nil
}

// named puts the name into the definitions, once it is known.
func (t *restTool) named() error {
	for _, d := range []*json.RawMessage{&t.definition, &t.oldDefinition} {
		b := append([]byte(`{"name":`), jsonrpc.Quote(t.name)...)
		*d = append(append(b, ','), (*d)[1:]...)
		if !json.Valid(*d) {
			return errors.New("its definition is no JSON")
		}
	}
	return nil
}

func clipped(err error) error {
	return errors.New(clip(strings.Join(strings.Fields(err.Error()), " "), 200))
}

var notInNames = regexp.MustCompile(`[^A-Za-z0-9_-]+`)

// toolName makes an operation's id fit.
func toolName(id, method, path string) string {
	if id == "" {
		id = strings.ToLower(method) + "_" + strings.Trim(path, "/")
	}
	name := strings.Trim(notInNames.ReplaceAllString(id, "_"), "_")
	if name == "" {
		name = strings.ToLower(method)
	}
	if len(name) > maxToolName {
		name = distinct(name, id)
	}
	return name
}

// distinct is a name with a digest of what it stands for.
func distinct(name, of string) string {
	sum := sha256.Sum256([]byte(of))
	return name[:min(len(name), maxToolName-9)] + "_" + hex.EncodeToString(sum[:4])
}

// base is where an operation is served.
func (t *translation) base(item *openapi3.PathItem, op *openapi3.Operation) (*url.URL, error) {
	servers := item.Servers
	if op.Servers != nil && len(*op.Servers) > 0 {
		servers = *op.Servers
	}
	if len(servers) == 0 {
		return t.out.base, nil
	}
	u, err := serverURL(servers)
	if err != nil {
		return nil, fmt.Errorf("it has a server of its own: %w", err)
	}
	// The secrets are for one place.
	if origin := u.Scheme + "://" + u.Host; t.api.server.OpenAPI.BaseURL != "" || origin != t.out.base.Scheme+"://"+t.out.base.Host {
		return nil, fmt.Errorf("it has a server of its own, %s; make that a server of the configuration", u.Redacted())
	}
	return u, nil
}

// pathTemplate checks a path and escapes what is not a parameter.
func pathTemplate(path string) (string, error) {
	if !strings.HasPrefix(path, "/") || strings.ContainsAny(path, "?#") {
		return "", fmt.Errorf("the path %q is not one", path)
	}
	var b strings.Builder
	for i := 0; i < len(path); i++ {
		switch c := path[i]; {
		case c == '{':
			end := strings.IndexByte(path[i:], '}')
			if end < 2 || strings.Contains(path[i+1:i+end], "{") {
				return "", fmt.Errorf("the path %q has braces that do not match", path)
			}
			b.WriteString(path[i : i+end+1])
			i += end
		case c == '}':
			return "", fmt.Errorf("the path %q has braces that do not match", path)
		case c == '%' && i+2 < len(path) && isHex(path[i+1]) && isHex(path[i+2]):
			b.WriteByte(c)
		default:
			b.WriteString(escape(string(c), "/!$&'()*+,;=:@"))
		}
	}
	for _, s := range strings.Split(path, "/") {
		if s == "." || s == ".." {
			return "", fmt.Errorf("the path %q has steps up", path)
		}
	}
	return b.String(), nil
}

func isHex(c byte) bool {
	return c >= '0' && c <= '9' || c >= 'a' && c <= 'f' || c >= 'A' && c <= 'F'
}

var templateParam = regexp.MustCompile(`\{([^{}]+)\}`)

// parameters translates the parameters of an operation and its path.
func (t *translation) parameters(tool *restTool, item *openapi3.PathItem, op *openapi3.Operation, in *schemaWriter, properties map[string]any, required *[]string) error {
	// Those of the operation stand instead of those of the path.
	type key struct{ in, name string }
	merged := map[key]*openapi3.Parameter{}
	var order []key
	for _, list := range []openapi3.Parameters{item.Parameters, op.Parameters} {
		for _, ref := range list {
			if ref == nil || ref.Value == nil {
				return errors.New("a parameter is not resolved")
			}
			k := key{ref.Value.In, ref.Value.Name}
			if merged[k] == nil {
				order = append(order, k)
			}
			merged[k] = ref.Value
		}
	}
	inPath := map[string]bool{}
	for _, m := range templateParam.FindAllStringSubmatch(tool.path, -1) {
		inPath[m[1]] = false
	}
	// Properties have the parameter's name; where that stands for several, all
	// of them say where they are, and have a digest if that is not enough.
	spelled, placed := map[string]int{}, map[string]int{}
	for _, k := range order {
		spelled[propertyName(k.name)]++
		placed[propertyName(k.name+"_"+k.in)]++
	}
	for _, k := range order {
		p := merged[k]
		rp, err := t.parameter(p, inPath)
		if err == nil {
			for _, c := range tool.auth {
				if c.in == p.In && (c.name == p.Name || c.in == "header" && strings.EqualFold(c.name, p.Name)) {
					err = errors.New("the gateway sets it, with the operator's secret")
				}
			}
		}
		if err != nil {
			if p.Required && !strings.Contains(err.Error(), "sets it") {
				return fmt.Errorf("the %s parameter %q, which is required: %w", p.In, p.Name, err)
			}
			t.note(fmt.Sprintf("%s parameter %q", p.In, p.Name), "left out: "+err.Error())
			continue
		}
		if p.In == "path" {
			inPath[p.Name] = true
		}
		rp.property = propertyName(p.Name)
		if spelled[rp.property] > 1 {
			if rp.property = propertyName(p.Name + "_" + p.In); placed[rp.property] > 1 {
				rp.property = distinct(rp.property, p.In+" "+p.Name)
			}
		}
		if properties[rp.property] != nil {
			return fmt.Errorf("two parameters would both be called %s", rp.property)
		}
		schema := p.Schema
		if schema == nil {
			for _, media := range p.Content {
				if media != nil {
					schema = media.Schema
				}
			}
		}
		properties[rp.property] = described(in.ref(schema, 1), p)
		if p.Required || p.In == "path" {
			*required = append(*required, rp.property)
		}
		if isPageParam(p) {
			tool.pages = append(tool.pages, rp.property)
		}
		tool.params = append(tool.params, rp)
	}
	for name, there := range inPath {
		if !there {
			return fmt.Errorf("the path parameter %q is not described", name)
		}
	}
	return nil
}

// described adds to a schema what its parameter says. Keywords beside $ref are
// annotations here, which JSON Schema 2020-12 has.
func described(schema any, p *openapi3.Parameter) any {
	m, ok := schema.(map[string]any)
	if !ok {
		return schema
	}
	if d := strings.TrimSpace(p.Description); d != "" {
		m["description"] = clip(d, maxDescription)
	}
	if p.Deprecated {
		m["deprecated"] = true
	}
	if _, there := m["examples"]; !there && p.Example != nil {
		m["examples"] = []any{p.Example}
	}
	return m
}

var notInProperties = regexp.MustCompile(`[^A-Za-z0-9_.-]+`)

// propertyName makes of a parameter's name one that every model's API takes.
func propertyName(name string) string {
	name = strings.Trim(notInProperties.ReplaceAllString(name, "_"), "_")
	if name == "" {
		name = "parameter"
	}
	if len(name) > maxToolName {
		name = distinct(name, name)
	}
	return name
}

func (t *translation) parameter(p *openapi3.Parameter, inPath map[string]bool) (restParam, error) {
	out := restParam{name: p.Name, in: p.In, reserved: p.AllowReserved}
	if p.Name == "" {
		return out, errors.New("it has no name")
	}
	for name := range p.Content {
		if media, _, _ := mime.ParseMediaType(name); len(p.Content) != 1 || !jsonMedia(media) {
			return out, fmt.Errorf("content %s is not written", name)
		}
		out.json = true
	}
	m, err := p.SerializationMethod()
	if err != nil {
		return out, err
	}
	out.style, out.explode = m.Style, m.Explode
	styles := map[string][]string{
		"path": {"simple", "label", "matrix"}, "query": {"form", "spaceDelimited", "pipeDelimited", "deepObject"},
		"header": {"simple"}, "cookie": {"form"},
	}[p.In]
	if !slices.Contains(styles, out.style) {
		return out, fmt.Errorf("the style %q is not written in a %s", out.style, p.In)
	}
	switch p.In {
	case "path":
		if _, there := inPath[p.Name]; !there {
			return out, fmt.Errorf("the path has no {%s}", p.Name)
		}
	case "header":
		name := http.CanonicalHeaderKey(p.Name)
		switch {
		case name == "Accept", name == "Content-Type", name == "Authorization":
			return out, errors.New("the gateway sets it") // OpenAPI: such definitions are ignored
		case !headerName(name):
			return out, errors.New("it is no header's name")
		case ours(name) && !strings.HasSuffix(name, "Idempotency-Key"):
			return out, errors.New("the gateway itself decides on this header")
		case t.api.header.Get(name) != "":
			return out, errors.New("the gateway sets it, as configured")
		}
	case "cookie":
		if !headerName(p.Name) {
			return out, errors.New("it is no cookie's name")
		}
	}
	return out, nil
}

// requestBody translates the body, in the first form that can be written.
func (t *translation) requestBody(tool *restTool, op *openapi3.Operation, in *schemaWriter, properties map[string]any, required *[]string) error {
	if op.RequestBody == nil {
		return nil
	}
	b := op.RequestBody.Value
	if b == nil {
		return errors.New("its body is not resolved")
	}
	media, content, kind := chooseBody(b.Content)
	if content == nil {
		offered := strings.Join(slices.Sorted(maps.Keys(b.Content)), ", ")
		if b.Required {
			return fmt.Errorf("its body is required and written in none of: %s", offered)
		}
		t.note("body", "left out: it is written in none of: "+offered)
		return nil
	}
	if tool.harmless() {
		// RFC 9110 §9.3.1 gives it no meaning, and servers refuse it.
		if b.Required {
			return fmt.Errorf("a %s with a body is not sent", tool.method)
		}
		t.note("body", fmt.Sprintf("left out: a %s with a body is not sent", tool.method))
		return nil
	}
	tool.body = &restBody{property: "body", media: media, kind: kind}
	for properties[tool.body.property] != nil {
		tool.body.property = "request_" + tool.body.property
	}
	schema := in.ref(content.Schema, 1)
	switch kind {
	case bodyForm, bodyMultipart:
		if err := t.fields(tool.body, content); err != nil {
			return err
		}
	case bodyText:
		schema = map[string]any{"type": "string"}
	case bodyBinary:
		schema = map[string]any{"type": "string", "contentEncoding": "base64", "contentMediaType": media, "description": "The bytes to send, in base64."}
	}
	if m, ok := schema.(map[string]any); ok {
		if d := strings.TrimSpace(b.Description); d != "" {
			m["description"] = clip(d, maxDescription)
		}
	}
	properties[tool.body.property] = schema
	if b.Required {
		*required = append(*required, tool.body.property)
	}
	return nil
}

// chooseBody prefers what holds most: JSON, then forms, then text, then bytes.
func chooseBody(content openapi3.Content) (media string, c *openapi3.MediaType, kind bodyKind) {
	best := -1
	for _, name := range slices.Sorted(maps.Keys(content)) {
		m, _, err := mime.ParseMediaType(name)
		if err != nil || content[name] == nil {
			continue
		}
		rank, k, as := -1, bodyJSON, name
		switch {
		case m == "application/json":
			rank = 9
		case jsonMedia(m):
			rank = 8
		case m == "*/*" || m == "application/*":
			rank, as = 7, "application/json"
		case m == "application/x-www-form-urlencoded":
			rank, k = 6, bodyForm
		case m == "multipart/form-data":
			rank, k = 5, bodyMultipart
		case m == "text/plain":
			rank, k = 4, bodyText
		case m == "text/*":
			rank, k, as = 3, bodyText, "text/plain"
		case strings.HasPrefix(m, "text/"):
			rank, k = 2, bodyText
		case m == "application/octet-stream", strings.HasPrefix(m, "image/"), strings.HasPrefix(m, "audio/"), strings.HasPrefix(m, "video/"),
			m == "application/pdf", m == "application/zip", m == "application/gzip":
			if rank, k = 1, bodyBinary; strings.Contains(m, "*") {
				as = "application/octet-stream"
			}
		}
		if rank > best {
			best, media, c, kind = rank, as, content[name], k
		}
	}
	return media, c, kind
}

// jsonMedia tells whether a media type is JSON: application/json, or a +json.
func jsonMedia(m string) bool {
	return m == "application/json" || strings.HasSuffix(m, "+json")
}

// fields says how the members of a form are written.
func (t *translation) fields(b *restBody, content *openapi3.MediaType) error {
	b.fields = map[string]bodyField{}
	if content.Schema == nil || content.Schema.Value == nil {
		return fmt.Errorf("its %s body has no schema", b.media)
	}
	schema := content.Schema.Value
	if !schema.Type.Permits("object") {
		return fmt.Errorf("its %s body is no object", b.media)
	}
	for name, ref := range schema.Properties {
		f := bodyField{explode: true}
		if ref != nil && ref.Value != nil {
			v := ref.Value
			if v.Type.Includes("array") && v.Items != nil && v.Items.Value != nil {
				v = v.Items.Value
			}
			f.binary = v.Format == "binary" || v.ContentEncoding == "base64" || v.ContentMediaType == "application/octet-stream"
			if v.Type.Includes("object") {
				f.media = "application/json"
			}
		}
		if e := content.Encoding[name]; e != nil {
			if e.Style != "" {
				f.style, f.explode, f.media = e.Style, e.Style == "form", ""
			}
			if e.Explode != nil {
				f.explode = *e.Explode
			}
			if e.ContentType != "" {
				first, _, _ := strings.Cut(e.ContentType, ",")
				m, _, err := mime.ParseMediaType(strings.TrimSpace(first))
				if err != nil {
					return fmt.Errorf("the contentType of its member %q cannot be read", name)
				}
				f.media = m
			}
			if len(e.Headers) > 0 {
				t.note(fmt.Sprintf("body member %q", name), "headers of its own are not sent")
			}
		}
		b.fields[name] = f
	}
	return nil
}

// responses finds what a successful call answers. It is promised only where
// every success answers with a JSON object.
func (t *translation) responses(tool *restTool, op *openapi3.Operation) (output json.RawMessage, more []string) {
	accepts := map[string]bool{}
	var objects []*openapi3.SchemaRef
	promise := true
	codes := op.Responses.Map()
	for _, code := range slices.Sorted(maps.Keys(codes)) {
		success := strings.HasPrefix(code, "2")
		if code == "default" && len(objects) == 0 && !slices.ContainsFunc(slices.Collect(maps.Keys(codes)), func(c string) bool { return strings.HasPrefix(c, "2") }) {
			success = true // there is no other
			promise = false
		}
		if !success || codes[code] == nil || codes[code].Value == nil {
			continue
		}
		r := codes[code].Value
		object := false
		for _, name := range slices.Sorted(maps.Keys(r.Content)) {
			m, _, err := mime.ParseMediaType(name)
			if err != nil {
				continue
			}
			accepts[m] = true
			c := r.Content[name]
			if !jsonMedia(m) || c == nil || c.Schema == nil || c.Schema.Value == nil {
				continue
			}
			more = append(more, nextMembers(c.Schema.Value)...)
			if isObject(c.Schema.Value, 0) && !object {
				object = true
				if !slices.ContainsFunc(objects, func(o *openapi3.SchemaRef) bool { return o.Value == c.Schema.Value }) {
					objects = append(objects, c.Schema)
				}
			}
		}
		if !object || len(r.Content) > 1 && !onlyJSON(r.Content) {
			promise = false
		}
		for name := range r.Headers {
			if strings.EqualFold(name, "Link") {
				more = append(more, "Link")
			}
		}
	}
	types := slices.SortedFunc(maps.Keys(accepts), func(a, b string) int {
		return cmp.Or(boolOrder(jsonMedia(b), jsonMedia(a)), cmp.Compare(a, b))
	})
	types = slices.DeleteFunc(types, func(m string) bool { return m == "*/*" })
	for _, m := range []string{"application/json", "application/problem+json"} {
		if !accepts[m] {
			types = append(types, m+";q=0.9")
		}
	}
	tool.accept = strings.Join(append(types, "*/*;q=0.5"), ", ")
	slices.Sort(more)
	more = slices.Compact(more)
	if !promise || len(objects) == 0 || tool.method == http.MethodHead {
		return nil, more
	}
	known := t.outputs[objects[0].Value]
	if known == nil || len(objects) > 1 {
		known = newOutputSchema(objects)
		if len(objects) == 1 {
			t.outputs[objects[0].Value] = known
		}
	}
	for _, n := range known.notes {
		t.note(n.What, n.Why)
	}
	if known.err != nil {
		t.note("answer", "its schema is left out: "+clipped(known.err).Error())
		return nil, more
	}
	tool.output = known.compiled
	return known.raw, more
}

// newOutputSchema is the schema of answers that are one of the given, all of
// which are objects.
func newOutputSchema(objects []*openapi3.SchemaRef) *outputSchema {
	out := &outputSchema{}
	w := newSchemaWriter(false, func(what, why string) {
		out.notes = append(out.notes, Untranslated{What: "answer: " + what, Why: why})
	})
	var written []any
	for _, o := range objects {
		written = append(written, w.ref(o, 1))
	}
	schema := map[string]any{}
	if m, ok := written[0].(map[string]any); ok && len(written) == 1 && m["$ref"] == nil {
		schema = m
	} else if len(written) == 1 {
		schema["allOf"] = written
	} else {
		schema["anyOf"] = written
	}
	schema["type"] = "object"
	out.raw, out.compiled, out.err = w.finish(schema)
	return out
}

func onlyJSON(c openapi3.Content) bool {
	for name := range c {
		if m, _, err := mime.ParseMediaType(name); err != nil || !jsonMedia(m) {
			return false
		}
	}
	return true
}

func boolOrder(a, b bool) int {
	switch {
	case a == b:
		return 0
	case a:
		return 1
	}
	return -1
}

// isObject tells whether a schema takes objects and nothing else.
func isObject(s *openapi3.Schema, depth int) bool {
	switch {
	case s == nil || depth > 10 || s.Nullable:
		return false
	case s.Type != nil:
		return s.Type.Is("object")
	}
	for _, list := range []openapi3.SchemaRefs{s.AllOf} {
		for _, e := range list {
			if e != nil && isObject(e.Value, depth+1) {
				return true
			}
		}
	}
	for _, list := range []openapi3.SchemaRefs{s.OneOf, s.AnyOf} {
		if len(list) > 0 {
			return !slices.ContainsFunc(list, func(e *openapi3.SchemaRef) bool { return e == nil || !isObject(e.Value, depth+1) })
		}
	}
	return false
}

// pageParams are names under which APIs ask for pages.
var pageParams = []string{
	"page", "page_token", "pagetoken", "page_number", "cursor", "next_cursor", "offset", "skip", "start", "after", "starting_after", "before",
	"limit", "per_page", "perpage", "page_size", "pagesize", "max_results", "maxresults", "count", "since_id", "continuation_token", "marker",
}

func isPageParam(p *openapi3.Parameter) bool {
	return p.In == "query" && slices.Contains(pageParams, strings.ToLower(strings.ReplaceAll(p.Name, "-", "_")))
}

// nextMembers are members of an answer that lead to the next page.
func nextMembers(s *openapi3.Schema) []string {
	var found []string
	for name, ref := range s.Properties {
		n := strings.ToLower(name)
		if strings.HasPrefix(n, "next") || n == "pagination" || n == "has_more" || n == "hasmore" {
			found = append(found, name)
		} else if n == "links" || n == "_links" || n == "paging" || n == "meta" {
			if ref != nil && ref.Value != nil {
				for _, inner := range nextMembers(ref.Value) {
					found = append(found, name+"."+inner)
				}
			}
		}
	}
	return found
}

// describe is what a model reads about the tool.
func describe(tool *restTool, op *openapi3.Operation, method, path string, more []string) string {
	var parts []string
	summary, text := strings.TrimSpace(op.Summary), strings.TrimSpace(op.Description)
	if op.Deprecated {
		parts = append(parts, "Deprecated.")
	}
	if summary != "" {
		parts = append(parts, summary)
	}
	if text != "" && text != summary {
		parts = append(parts, text)
	}
	if len(parts) == 0 || len(parts) == 1 && op.Deprecated {
		parts = append(parts, method+" "+path)
	}
	parts = []string{clip(strings.Join(parts, "\n\n"), maxDescription)}
	switch link := slices.Contains(more, "Link"); {
	case len(tool.pages) == 0 && len(more) == 0:
	case len(tool.pages) == 0:
		if members := slices.DeleteFunc(slices.Clone(more), func(m string) bool { return m == "Link" }); len(members) > 0 {
			parts = append(parts, "The answer may be one page of several; see its member "+strings.Join(members, ", ")+".")
		}
	default:
		hint := "The answer may be one page of several: ask for others with " + strings.Join(tool.pages, ", ")
		if members := slices.DeleteFunc(slices.Clone(more), func(m string) bool { return m == "Link" }); len(members) > 0 {
			hint += "; the answer's " + strings.Join(members, ", ") + " leads on"
		} else if link {
			hint += "; the answer ends with the arguments of the next page"
		}
		parts = append(parts, hint+".")
	}
	return strings.Join(parts, "\n\n")
}
