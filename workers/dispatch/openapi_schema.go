package dispatch

import (
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"math"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/getkin/kin-openapi/openapi3"
	"github.com/santhosh-tekuri/jsonschema/v6"
)

const (
	// maxSchemaDepth bounds the schema of one tool, however the document's
	// parts refer to each other.
	maxSchemaDepth = 100

	// A definition is read by every model that is offered the tool.
	maxInputSchema  = 256 << 10
	maxOutputSchema = 32 << 10

	// schemaNode is what a subschema has at least: {"type":"null"} and a name.
	schemaNode = 12
)

// schemaWriter writes schemas of OpenAPI 3.0 and 3.1 as JSON Schema 2020-12
// that stands for itself: what is referred to is copied into $defs, once, so
// recursion stays recursion.
type schemaWriter struct {
	request bool // what only answers have is left out, or the other way round
	note    func(what, why string)

	limit int // bytes
	defs  map[string]any
	names map[*openapi3.Schema]string
	nodes int
	err   error // the schema is too large; nothing more is written
}

func newSchemaWriter(request bool, note func(what, why string)) *schemaWriter {
	limit := maxOutputSchema
	if request {
		limit = maxInputSchema
	}
	return &schemaWriter{request: request, note: note, limit: limit, defs: map[string]any{}, names: map[*openapi3.Schema]string{}}
}

var errSchemaSize = errors.New("the schema is too large")

var defName = regexp.MustCompile(`[^A-Za-z0-9_.-]+`)

// ref writes a schema where it is used.
func (w *schemaWriter) ref(s *openapi3.SchemaRef, depth int) any {
	if s == nil {
		return map[string]any{}
	}
	if s.Value == nil {
		w.note("schema", fmt.Sprintf("%q is not resolved: anything is taken there", s.Ref))
		return map[string]any{}
	}
	if w.nodes++; w.nodes*schemaNode > w.limit || depth > maxSchemaDepth {
		w.err = errSchemaSize
	}
	if w.err != nil {
		return map[string]any{}
	}
	if s.Ref == "" {
		return w.schema(s.Value, depth)
	}
	name, known := w.names[s.Value]
	if !known {
		base := s.Ref[strings.LastIndexAny(s.Ref, "/#")+1:]
		base = strings.Trim(defName.ReplaceAllString(base, "_"), "_")
		if base == "" {
			base = "schema"
		}
		name = base
		for i := 2; w.defs[name] != nil; i++ {
			name = base + "_" + strconv.Itoa(i)
		}
		w.names[s.Value] = name
		w.defs[name] = map[string]any{} // taken; recursion ends here
		w.defs[name] = w.schema(s.Value, depth+1)
	}
	return map[string]any{"$ref": "#/$defs/" + name}
}

// schema writes the keywords. What says nothing about validity and nothing to
// a reader (xml, discriminator, externalDocs, x-…) is left out without a note.
func (w *schemaWriter) schema(s *openapi3.Schema, depth int) map[string]any {
	out := map[string]any{}
	text := func(key, v string) {
		if v != "" {
			out[key] = v
		}
	}
	text("title", s.Title)
	text("description", s.Description)
	text("format", s.Format)
	text("contentMediaType", s.ContentMediaType)
	text("contentEncoding", s.ContentEncoding)
	switch s.Format {
	case "byte":
		out["contentEncoding"] = "base64"
		delete(out, "format")
	case "binary":
		delete(out, "format")
	}
	if s.Pattern != "" {
		// Patterns are of ECMA-262. What RE2 cannot do (look around, refer
		// back) is left to the API.
		if _, err := regexp.Compile(s.Pattern); err != nil {
			w.note("pattern", fmt.Sprintf("%q cannot be checked here and is left to the API", clip(s.Pattern, 80)))
		} else {
			out["pattern"] = s.Pattern
		}
	}
	if s.Deprecated {
		out["deprecated"] = true
	}
	if s.ReadOnly && !w.request {
		out["readOnly"] = true
	}
	if s.WriteOnly && w.request {
		out["writeOnly"] = true
	}
	if s.Enum != nil {
		out["enum"] = s.Enum
	}
	if s.Const != nil {
		out["const"] = s.Const
	}
	if s.Default != nil {
		out["default"] = s.Default
	}
	switch {
	case s.Examples != nil:
		out["examples"] = s.Examples
	case s.Example != nil:
		out["examples"] = []any{s.Example}
	}

	types := s.Type.Slice()
	switch len(types) {
	case 0:
	case 1:
		out["type"] = types[0]
	default:
		out["type"] = types
	}

	number := func(key string, v *float64) {
		if v != nil && !math.IsInf(*v, 0) && !math.IsNaN(*v) {
			out[key] = *v
		}
	}
	number("minimum", s.Min)
	number("maximum", s.Max)
	number("exclusiveMinimum", s.ExclusiveMin.Value)
	number("exclusiveMaximum", s.ExclusiveMax.Value)
	if b := s.ExclusiveMin.Bool; b != nil && *b && s.Min != nil {
		delete(out, "minimum")
		number("exclusiveMinimum", s.Min)
	}
	if b := s.ExclusiveMax.Bool; b != nil && *b && s.Max != nil {
		delete(out, "maximum")
		number("exclusiveMaximum", s.Max)
	}
	if s.MultipleOf != nil && *s.MultipleOf > 0 {
		number("multipleOf", s.MultipleOf)
	}
	least := func(key string, n uint64) {
		if n > 0 {
			out[key] = n
		}
	}
	most := func(key string, n *uint64) {
		if n != nil {
			out[key] = *n
		}
	}
	least("minLength", s.MinLength)
	most("maxLength", s.MaxLength)
	least("minItems", s.MinItems)
	most("maxItems", s.MaxItems)
	least("minProperties", s.MinProps)
	most("maxProperties", s.MaxProps)
	most("minContains", s.MinContains)
	most("maxContains", s.MaxContains)
	if s.UniqueItems {
		out["uniqueItems"] = true
	}

	one := func(key string, v *openapi3.SchemaRef) {
		if v != nil {
			out[key] = w.ref(v, depth+1)
		}
	}
	many := func(key string, v openapi3.SchemaRefs) {
		if len(v) == 0 {
			return
		}
		list := make([]any, len(v))
		for i, e := range v {
			list[i] = w.ref(e, depth+1)
		}
		out[key] = list
	}
	named := func(key string, v openapi3.Schemas, hidden func(*openapi3.SchemaRef) bool) {
		if len(v) == 0 {
			return
		}
		m := map[string]any{}
		for _, name := range slices.Sorted(maps.Keys(v)) { // in order, since the names of $defs depend on it
			if hidden == nil || !hidden(v[name]) {
				m[name] = w.ref(v[name], depth+1)
			}
		}
		out[key] = m
	}
	either := func(key string, v openapi3.BoolSchema) {
		switch {
		case v.Has != nil:
			out[key] = *v.Has
		case v.Schema != nil:
			out[key] = w.ref(v.Schema, depth+1)
		}
	}
	one("items", s.Items)
	one("not", s.Not)
	one("if", s.If)
	one("then", s.Then)
	one("else", s.Else)
	one("contains", s.Contains)
	one("propertyNames", s.PropertyNames)
	many("oneOf", s.OneOf)
	many("anyOf", s.AnyOf)
	many("allOf", s.AllOf)
	many("prefixItems", s.PrefixItems)
	hidden := func(p *openapi3.SchemaRef) bool {
		return p != nil && p.Value != nil && (w.request && p.Value.ReadOnly || !w.request && p.Value.WriteOnly)
	}
	named("properties", s.Properties, hidden)
	named("patternProperties", s.PatternProperties, nil)
	named("dependentSchemas", s.DependentSchemas, nil)
	either("additionalProperties", s.AdditionalProperties)
	either("unevaluatedItems", s.UnevaluatedItems)
	either("unevaluatedProperties", s.UnevaluatedProperties)
	for pattern := range s.PatternProperties {
		if _, err := regexp.Compile(pattern); err != nil {
			w.note("patternProperties", fmt.Sprintf("%q cannot be checked here and is left to the API", clip(pattern, 80)))
			delete(out["patternProperties"].(map[string]any), pattern)
			delete(out, "additionalProperties")
			delete(out, "unevaluatedProperties")
		}
	}
	required := slices.DeleteFunc(slices.Clone(s.Required), func(name string) bool { return hidden(s.Properties[name]) })
	if len(required) > 0 {
		slices.Sort(required)
		out["required"] = slices.Compact(required)
	}
	if len(s.DependentRequired) > 0 {
		out["dependentRequired"] = s.DependentRequired
	}
	if s.DynamicRef != "" || s.DynamicAnchor != "" || s.SchemaID != "" {
		w.note("schema", "$id, $dynamicRef and $dynamicAnchor are not translated: anything is taken where they lead")
	}
	for _, key := range slices.Sorted(maps.Keys(s.Extensions)) {
		if !strings.HasPrefix(key, "x-") && key != "id" {
			w.note("schema", fmt.Sprintf("the keyword %q is not known and not checked", clip(key, 60)))
		}
	}
	if s.Nullable {
		return orNull(out)
	}
	return out
}

// orNull is a schema that takes null too, which is what nullable of OpenAPI 3.0
// says.
func orNull(out map[string]any) map[string]any {
	t, typed := out["type"]
	_, enum := out["enum"]
	if typed && !enum && out["const"] == nil && out["allOf"] == nil && out["anyOf"] == nil && out["oneOf"] == nil && out["not"] == nil {
		switch t := t.(type) {
		case string:
			out["type"] = []string{t, "null"}
		case []string:
			if !slices.Contains(t, "null") {
				out["type"] = append(slices.Clone(t), "null")
			}
		}
		return out
	}
	either := map[string]any{"anyOf": []any{out, map[string]any{"type": "null"}}}
	for _, key := range []string{"title", "description"} {
		if v, ok := out[key]; ok {
			either[key] = v
			delete(out, key)
		}
	}
	return either
}

// finish adds the definitions, and checks by compiling that the schema is one.
func (w *schemaWriter) finish(schema map[string]any) (json.RawMessage, *jsonschema.Schema, error) {
	if w.err != nil {
		return nil, nil, w.err
	}
	if len(w.defs) > 0 {
		schema["$defs"] = w.defs
	}
	b, err := encodeJSON(schema)
	if err != nil {
		return nil, nil, err
	}
	if len(b) > w.limit {
		return nil, nil, fmt.Errorf("%w: %d bytes, the most is %d", errSchemaSize, len(b), w.limit)
	}
	compiled, err := compileSchema(b)
	return b, compiled, err
}

// compileSchema compiles what is published, so that it is what is checked.
func compileSchema(b []byte) (_ *jsonschema.Schema, err error) {
	defer func() {
		if p := recover(); p != nil { // as in load
			err = fmt.Errorf("the schema cannot be compiled: %v", p)
		}
	}()
	doc, err := jsonschema.UnmarshalJSON(strings.NewReader(string(b)))
	if err != nil {
		return nil, err
	}
	c := jsonschema.NewCompiler()
	c.DefaultDraft(jsonschema.Draft2020)
	c.AssertFormat()
	c.UseLoader(noSchemas{})
	const here = "urn:waybill:tool"
	if err := c.AddResource(here, doc); err != nil {
		return nil, err
	}
	return c.Compile(here)
}

// noSchemas loads nothing: a schema stands for itself.
type noSchemas struct{}

func (noSchemas) Load(url string) (any, error) {
	return nil, fmt.Errorf("the schema refers to %s, which is not fetched", clip(url, 100))
}

// violations says in words what does not fit, the most telling first.
func violations(s *jsonschema.Schema, v any) []string {
	err := s.Validate(v)
	if err == nil {
		return nil
	}
	var bad *jsonschema.ValidationError
	if !errors.As(err, &bad) {
		return []string{err.Error()}
	}
	var list []string
	var walk func(e *jsonschema.ValidationError)
	walk = func(e *jsonschema.ValidationError) {
		if len(list) > maxViolations {
			return
		}
		for _, cause := range e.Causes {
			walk(cause)
		}
		if len(e.Causes) > 0 {
			return
		}
		where := "arguments"
		for _, step := range e.InstanceLocation {
			where += "." + step
		}
		leaf := jsonschema.ValidationError{SchemaURL: e.SchemaURL, InstanceLocation: e.InstanceLocation, ErrorKind: e.ErrorKind}
		if line := clip(where+": "+leaf.BasicOutput().Error.String(), maxWords); !slices.Contains(list, line) {
			list = append(list, line)
		}
	}
	walk(bad)
	if len(list) > maxViolations {
		list = append(list[:maxViolations], "… and more")
	}
	return list
}
