package schemas

import (
	"encoding/json"
	"errors"
	"fmt"
	"go/ast"
	"net/url"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/jsonschema-go/jsonschema"
	"pgregory.net/rapid"
)

// schemaBase names the schemas to the world; the files lie beside the types,
// in schemas/jsonschema.
const schemaBase = "https://waybill.dev/schemas/v1/"

// TestJSONSchema keeps schemas/jsonschema in step with the types: one file for
// each kind, and event.json for any of them. They are for whoever reads
// exports and feeds in another language, so they tell what may be relied on:
// members may be added, none that is required goes away within a version.
func TestJSONSchema(t *testing.T) {
	all := jsonSchemas(t)
	for name, s := range all {
		text, err := json.MarshalIndent(s, "", "  ")
		if err != nil {
			t.Fatal(err)
		}
		golden(t, "jsonschema/"+name, append(text, '\n'))
	}
	files, err := filepath.Glob("jsonschema/*")
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		if all[filepath.Base(f)] == nil {
			t.Errorf("%s belongs to no kind: remove it", f)
		}
	}
}

// TestEventsFitTheirSchema: what is written is what the files say, and they
// do not say yes to everything.
func TestEventsFitTheirSchema(t *testing.T) {
	resolved := resolveFiles(t)
	fits := func(e Event, name string) error {
		text, err := e.MarshalJSON()
		if err != nil {
			return err
		}
		if err := validate(resolved[name], text); err != nil {
			return fmt.Errorf("%s: %w: %s", name, err, text)
		}
		return nil
	}
	for _, e := range samples() {
		if err := errors.Join(fits(e, string(e.Kind())+".json"), fits(e, "event.json")); err != nil {
			t.Error(err)
		}
	}
	rapid.Check(t, func(t *rapid.T) {
		e := drawEvent(t)
		if f, ok := e.Data.(*Failed); ok {
			f.Code = rapid.SampledFrom(Failures()).Draw(t, "code")
		}
		if err := fits(e, string(e.Kind())+".json"); err != nil {
			t.Fatal(err)
		}
	})

	good, err := anEvent(&Failed{Code: FailUnknown}).MarshalJSON()
	if err != nil {
		t.Fatal(err)
	}
	for what, change := range map[string][2]string{
		"another version":     {`"v":1`, `"v":2`},
		"another kind":        {`"failed"`, `"denied"`},
		"an unknown kind":     {`"failed"`, `"invented"`},
		"an unknown failure":  {`"unknown"`, `"misfortune"`},
		"no failure":          {`,"code":"unknown"`, ``},
		"no call":             {`"call":"c1",`, ``},
		"a tenant with a dot": {`"acme"`, `"ac.me"`},
		"a number for a text": {`"method":""`, `"method":1`},
		"two bodies":          {`"time"`, `"body":"","body_base64":"","time"`},
	} {
		bad := strings.Replace(string(good), change[0], change[1], 1)
		if bad == string(good) {
			t.Fatalf("%s: %s holds no %s", what, good, change[0])
		}
		if validate(resolved["failed.json"], []byte(bad)) == nil {
			t.Errorf("%s fits failed.json: %s", what, bad)
		}
	}
}

func validate(s *jsonschema.Resolved, text []byte) error {
	var v any
	if err := json.Unmarshal(text, &v); err != nil {
		return err
	}
	return s.Validate(v)
}

// resolveFiles reads the files as a consumer would.
func resolveFiles(t *testing.T) map[string]*jsonschema.Resolved {
	t.Helper()
	load := func(name string) (*jsonschema.Schema, error) {
		text, err := os.ReadFile("jsonschema/" + name)
		if err != nil {
			return nil, err
		}
		s := new(jsonschema.Schema)
		return s, json.Unmarshal(text, s)
	}
	resolved := map[string]*jsonschema.Resolved{}
	for name := range jsonSchemas(t) {
		s, err := load(name)
		if err != nil {
			t.Fatalf("%v (go test ./schemas -update writes it)", err)
		}
		resolved[name], err = s.Resolve(&jsonschema.ResolveOptions{
			Loader: func(u *url.URL) (*jsonschema.Schema, error) { return load(strings.TrimPrefix(u.String(), schemaBase)) },
		})
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
	}
	return resolved
}

// jsonSchemas makes the schemas from the types, by file name.
func jsonSchemas(t *testing.T) map[string]*jsonschema.Schema {
	t.Helper()
	d := comments(t)
	all := map[string]*jsonschema.Schema{}
	event := &jsonschema.Schema{
		Schema: "https://json-schema.org/draft/2020-12/schema", ID: schemaBase + "event.json",
		Title: "event", Description: d["Event"],
		Type: "object", Required: []string{"kind"},
		Properties: map[string]*jsonschema.Schema{"kind": {Description: d["envelope.Kind"]}},
	}
	for _, k := range sortedKinds() {
		payload := reflect.TypeOf(kinds[k]()).Elem()
		s := d.object(reflect.TypeFor[envelope]())
		s.Schema, s.ID = event.Schema, schemaBase+string(k)+".json"
		s.Title, s.Description = string(k), d[payload.Name()]
		s.Properties["v"].Const = ptr[any](Version)
		s.Properties["kind"].Const = ptr[any](k)
		if k.OfCall() {
			s.Required = append(s.Required, "call")
		}
		s.Properties["data"] = d.object(payload)
		said := d.object(reflect.TypeFor[said]())
		for name, p := range said.Properties {
			s.Properties[name] = p
		}
		s.Properties["body_base64"].ContentEncoding = "base64"
		s.Not = &jsonschema.Schema{Required: []string{"body", "body_base64"}}
		s.Required = append(s.Required, "data")
		s.PropertyOrder = slices.Concat(s.PropertyOrder, []string{"data"}, said.PropertyOrder)
		all[string(k)+".json"] = s

		event.Properties["kind"].Enum = append(event.Properties["kind"].Enum, k)
		event.OneOf = append(event.OneOf, &jsonschema.Schema{Ref: string(k) + ".json"})
	}
	all["event.json"] = event
	return all
}

func ptr[T any](v T) *T { return &v }

// object is the schema of a struct as encoding/json writes it. It knows the
// few types that events are made of and fails on any other.
func (d docs) object(t reflect.Type) *jsonschema.Schema {
	s := &jsonschema.Schema{Type: "object", Properties: map[string]*jsonschema.Schema{}}
	for _, f := range reflect.VisibleFields(t) {
		if f.Anonymous {
			continue
		}
		name, options, _ := strings.Cut(f.Tag.Get("json"), ",")
		p := d.value(f.Type)
		p.Description = d.field(t, f.Index)
		s.Properties[name] = p
		s.PropertyOrder = append(s.PropertyOrder, name)
		if options == "" {
			s.Required = append(s.Required, name)
		}
	}
	return s
}

func (d docs) value(t reflect.Type) *jsonschema.Schema {
	switch t {
	case reflect.TypeFor[time.Time]():
		return &jsonschema.Schema{Type: "string", Format: "date-time"}
	case reflect.TypeFor[[]byte]():
		return &jsonschema.Schema{Type: "string"}
	case reflect.TypeFor[Tenant](), reflect.TypeFor[Agent](), reflect.TypeFor[SessionKey](),
		reflect.TypeFor[CallID](), reflect.TypeFor[Replica]():
		return &jsonschema.Schema{Type: "string", Pattern: `^[a-z0-9_-]{1,64}$`}
	case reflect.TypeFor[Failure]():
		s := &jsonschema.Schema{Type: "string"}
		for _, f := range Failures() {
			s.Enum = append(s.Enum, f)
		}
		return s
	}
	switch t.Kind() {
	case reflect.Pointer:
		return d.value(t.Elem())
	case reflect.String:
		return &jsonschema.Schema{Type: "string"}
	case reflect.Int:
		return &jsonschema.Schema{Type: "integer"}
	case reflect.Uint64:
		return &jsonschema.Schema{Type: "integer", Minimum: ptr(0.0)}
	case reflect.Bool:
		return &jsonschema.Schema{Type: "boolean"}
	case reflect.Slice:
		return &jsonschema.Schema{Type: "array", Items: d.value(t.Elem())}
	case reflect.Struct:
		return d.object(t)
	case reflect.Map:
		return &jsonschema.Schema{Type: "object", AdditionalProperties: d.value(t.Elem())}
	}
	panic(fmt.Sprintf("no JSON Schema for %s: teach the test", t))
}

// docs are the comments of the source, by type (Target) or field
// (Target.Server).
type docs map[string]string

// field finds the comment where the field is declared, which may be an
// embedded struct, else that of the field's type.
func (d docs) field(t reflect.Type, index []int) string {
	for _, i := range index[:len(index)-1] {
		t = t.Field(i).Type
	}
	f := t.Field(index[len(index)-1])
	if text := d[t.Name()+"."+f.Name]; text != "" {
		return text
	}
	return d[f.Type.Name()]
}

var link = regexp.MustCompile(`\[([A-Za-z.]+)\]`)

func comments(t *testing.T) docs {
	t.Helper()
	d := docs{}
	add := func(key string, groups ...*ast.CommentGroup) {
		for _, g := range groups {
			if text := strings.Join(strings.Fields(g.Text()), " "); text != "" && d[key] == "" {
				d[key] = link.ReplaceAllString(text, "$1")
			}
		}
	}
	for _, file := range source(t) {
		ast.Inspect(file, func(n ast.Node) bool {
			decl, ok := n.(*ast.GenDecl)
			if !ok {
				return true
			}
			for _, spec := range decl.Specs {
				typ, ok := spec.(*ast.TypeSpec)
				if !ok {
					continue
				}
				if !decl.Lparen.IsValid() {
					add(typ.Name.Name, decl.Doc)
				}
				add(typ.Name.Name, typ.Doc, typ.Comment)
				st, ok := typ.Type.(*ast.StructType)
				if !ok {
					continue
				}
				for _, f := range st.Fields.List {
					for _, name := range f.Names {
						add(typ.Name.Name+"."+name.Name, f.Doc, f.Comment)
					}
				}
			}
			return false
		})
	}
	return d
}
