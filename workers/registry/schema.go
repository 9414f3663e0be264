package registry

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"net/url"
	"regexp"
	"regexp/syntax"
	"slices"
	"strconv"
	"strings"
	"sync"

	"github.com/santhosh-tekuri/jsonschema/v6"
	"github.com/santhosh-tekuri/jsonschema/v6/kind"

	"waybill.dev/schemas/jsonrpc"
)

// A schema is a program of somebody who is not trusted, and so is what it is
// given. It is bounded in three ways: by its size when it is read; nothing is ever
// fetched for it, as references lead nowhere but into itself; and a check has a
// number of steps. A step is taken by every schema that is held against a value,
// before it goes on to others: each schema gets a format of our own, which counts.
// So all that is reached must have been seen here first: references lead to
// schemas that walk has seen, and nothing in a schema has a base of its own. What
// takes long before a schema has taken its step is bounded beforehand ([weigh]):
// numbers, which are read as exact fractions, and what values are compared with.

const (
	maxSchemas    = 4096 // in one
	maxSchemaDeep = 64
	maxPattern    = 2000 // instructions of a regular expression
	maxSteps      = 2_000_000
	leastSteps    = 20_000
	stepsPerByte  = 16 // of what is checked

	maxDigits   = 1000       // of a number, and what its exponent may be: a double's is less
	maxExponent = 1_000_000  // of all numbers of a value together
	maxCompared = 20_000_000 // values times what they may be compared with
)

// checker holds values against a schema, one at a time.
type checker struct {
	schema   *jsonschema.Schema
	compared int // the weight of all that values are compared with (enum, const)

	mu    sync.Mutex
	left  int  // steps of the check under way
	spent bool // they did not suffice
}

// applicators are the keywords below which there are schemas, and how they stand
// there.
var applicators = map[string]string{
	"items": "one or list", "prefixItems": "list", "additionalItems": "one", "contains": "one", "unevaluatedItems": "one",
	"properties": "named", "patternProperties": "named", "additionalProperties": "one", "propertyNames": "one", "unevaluatedProperties": "one",
	"allOf": "list", "anyOf": "list", "oneOf": "list", "not": "one", "if": "one", "then": "one", "else": "one",
	"dependentSchemas": "named", "dependencies": "named or names", "$defs": "named", "definitions": "named", "contentSchema": "one",
}

// dialects are those of which a schema may be.
var dialects = []string{
	"https://json-schema.org/draft/2020-12/schema", "https://json-schema.org/draft/2019-09/schema",
	"http://json-schema.org/draft-07/schema", "https://json-schema.org/draft-07/schema", "http://json-schema.org/draft-06/schema",
}

const stepFormat = "waybill-step"

var errSteps = errors.New("it takes too long")

// compile makes a schema ready; none, if there is no text. The error says why it
// cannot be used.
func compile(text []byte) (_ *checker, err error) {
	if len(text) == 0 {
		return nil, nil
	}
	defer func() {
		if p := recover(); p != nil { // the library's
			err = fmt.Errorf("it cannot be compiled: %v", p)
		}
	}()
	doc, err := jsonschema.UnmarshalJSON(bytes.NewReader(text))
	if err != nil {
		return nil, err
	}
	w := walker{at: map[string]bool{}}
	if root, ok := doc.(map[string]any); ok {
		if id, ok := root["$id"].(string); ok && !strings.Contains(id, "#") {
			delete(root, "$id") // what it refers to is in it
		}
		if s, ok := root["$schema"].(string); ok && !slices.Contains(dialects, strings.TrimSuffix(s, "#")) {
			return nil, fmt.Errorf("its dialect %q is not known", clip(s, 100))
		} else if strings.HasPrefix(s, "https://json-schema.org/draft-07/") {
			root["$schema"] = "http://json-schema.org/draft-07/schema#"
		}
	}
	if err := w.schema(doc, "", 0); err != nil {
		return nil, err
	}
	for _, ref := range w.refs {
		if !w.at[ref] {
			return nil, fmt.Errorf("it refers to %q, where there is no schema", clip("#"+ref, 100))
		}
	}
	c := &checker{left: maxSteps, compared: w.compared}
	lib := jsonschema.NewCompiler()
	lib.DefaultDraft(jsonschema.Draft2020)
	lib.UseLoader(nothing{})
	lib.UseRegexpEngine(c.regexp)
	lib.RegisterFormat(&jsonschema.Format{Name: stepFormat, Validate: c.step})
	lib.AssertFormat()
	const here = "urn:waybill:definition"
	if err := lib.AddResource(here, doc); err != nil {
		return nil, err
	}
	if c.schema, err = lib.Compile(here); err != nil {
		var bad *jsonschema.SchemaValidationError
		if errors.As(err, &bad) {
			return nil, errors.New("it is no schema of its dialect")
		}
		return nil, errors.New(clip(err.Error(), 300))
	}
	return c, nil
}

// nothing is fetched for a schema.
type nothing struct{}

func (nothing) Load(url string) (any, error) {
	return nil, fmt.Errorf("it refers to %s, which is not fetched", clip(url, 100))
}

// walker goes through the schemas in a schema.
type walker struct {
	at       map[string]bool // where there are schemas, as JSON Pointers
	refs     []string        // JSON Pointers that are referred to
	compared int
}

func (w *walker) schema(v any, at string, depth int) error {
	m, ok := v.(map[string]any)
	if _, is := v.(bool); !ok && !is {
		return fmt.Errorf("there is no schema at %q", clip("#"+at, 100))
	}
	w.at[at] = true
	switch {
	case len(w.at) > maxSchemas:
		return fmt.Errorf("it has more than %d schemas", maxSchemas)
	case depth > maxSchemaDeep:
		return fmt.Errorf("it is nested more than %d deep", maxSchemaDeep)
	case !ok:
		return nil
	}
	for k, v := range m {
		var err error
		here := at + "/" + escape(k)
		switch k {
		case "$ref", "$dynamicRef", "$recursiveRef":
			err = w.reference(v)
		case "$id", "id":
			if _, ok := v.(string); ok {
				err = errors.New("a schema in it has a base of its own ($id)")
			}
		case "enum", "const":
			var n int
			n, err = weigh(v)
			w.compared += n
		case "$schema":
			if at != "" {
				err = errors.New("a schema in it is of a dialect of its own ($schema)")
			}
		}
		if err != nil {
			return err
		}
		how := applicators[k]
		switch v := v.(type) {
		case []any:
			if how != "list" && how != "one or list" {
				continue // not what the keyword takes, as the library will say
			}
			for i, sub := range v {
				if err := w.schema(sub, here+"/"+strconv.Itoa(i), depth+1); err != nil {
					return err
				}
			}
		case map[string]any:
			switch how {
			case "one", "one or list":
				err = w.schema(v, here, depth+1)
			case "named", "named or names":
				for name, sub := range v {
					if _, names := sub.([]any); names && how == "named or names" {
						continue
					}
					if err = w.schema(sub, here+"/"+escape(name), depth+1); err != nil {
						break
					}
				}
			}
			if err != nil {
				return err
			}
		case bool:
			if how == "one" || how == "one or list" {
				w.at[here] = true
			}
		}
	}
	m["format"] = stepFormat // in the place of one that the dialect only notes
	return nil
}

func (w *walker) reference(v any) error {
	ref, ok := v.(string)
	if !ok {
		return nil // 2019-09 and the library: it will say what is wrong
	}
	fragment, local := strings.CutPrefix(ref, "#")
	if !local {
		return fmt.Errorf("it refers to %q, which is outside of it", clip(ref, 100))
	}
	if fragment == "" || fragment[0] == '/' {
		at, err := url.PathUnescape(fragment)
		if err != nil {
			return fmt.Errorf("it refers to %q: %w", clip(ref, 100), err)
		}
		w.refs = append(w.refs, at)
	}
	return nil
}

// spend takes steps. It tells whether there were enough.
func (c *checker) spend(n int) bool {
	if c.left -= n; c.left < 0 {
		c.spent = true
	}
	return !c.spent
}

// step is the format that every schema has.
func (c *checker) step(v any) error {
	n := 1
	switch v := v.(type) {
	case map[string]any:
		n += len(v)
	case []any:
		n += len(v)
	case string:
		n += len(v) / 64
	}
	if !c.spend(n) {
		return errSteps
	}
	return nil
}

// pattern is a regular expression that takes steps.
type pattern struct {
	c    *checker
	text string
	re   *regexp.Regexp // nil: it cannot be said in RE2, and matches everything
	size int
}

func (p *pattern) String() string { return p.text }

func (p *pattern) MatchString(s string) bool {
	if !p.c.spend(1 + len(s)*p.size/256) {
		return false
	}
	return p.re == nil || p.re.MatchString(s)
}

// regexp makes a pattern. What RE2 has not, such as looking ahead, is left to the
// server: many schemas of good servers have it, and whoever could write such a
// pattern could as well write none.
func (c *checker) regexp(text string) (jsonschema.Regexp, error) {
	p := &pattern{c: c, text: text}
	parsed, err := syntax.Parse(text, syntax.Perl)
	if err != nil {
		return p, nil
	}
	program, err := syntax.Compile(parsed.Simplify())
	if err != nil || len(program.Inst) > maxPattern {
		return p, nil
	}
	if p.re, err = regexp.Compile(text); err != nil {
		p.re = nil
	}
	p.size = len(program.Inst)
	return p, nil
}

var (
	errNumber = errors.New("it has a number that cannot be held")
	errHeavy  = errors.New("it cannot be checked in the time that there is")
)

// weigh tells how much there is in a value: of numbers, which are dear to compare, more.
// The error is of numbers that it would take too long to read.
func weigh(v any) (weight int, err error) {
	exponents := 0
	var walk func(v any) error
	walk = func(v any) error {
		weight++
		switch v := v.(type) {
		case []any:
			for _, e := range v {
				if err := walk(e); err != nil {
					return err
				}
			}
		case map[string]any:
			for _, e := range v {
				if err := walk(e); err != nil {
					return err
				}
			}
		case json.Number:
			weight += 50
			text, exponent := string(v), 0
			if i := strings.IndexAny(text, "eE"); i >= 0 {
				var err error
				if exponent, err = strconv.Atoi(text[i+1:]); err != nil {
					return errNumber
				}
				text = text[:i]
			}
			if len(text) > maxDigits || exponent > maxDigits || exponent < -maxDigits {
				return errNumber
			}
			if exponents += max(exponent, -exponent); exponents > maxExponent {
				return errHeavy
			}
		}
		return nil
	}
	err = walk(v)
	return weight, err
}

// check says where a value does not fit, in words that hold nothing of the value
// but names of members; "" if it fits.
func (c *checker) check(text []byte) (wrong string) {
	read, err := jsonrpc.Parse(text, jsonrpc.Limits{Bytes: len(text), Depth: answerDepth, AllowCaseVariants: true})
	if err != nil {
		return "it cannot be read"
	}
	v := read.Plain() // as jsonschema.UnmarshalJSON would, in three times as long
	weight, err := weigh(v)
	if err == nil && c.compared > 0 && weight > maxCompared/c.compared {
		err = errHeavy
	}
	if err != nil {
		return err.Error()
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.left, c.spent = min(leastSteps+stepsPerByte*len(text), maxSteps), false
	defer func() {
		if recover() != nil { // the library's
			wrong = "it cannot be checked"
		}
	}()
	err = c.schema.Validate(v)
	if c.spent {
		return errHeavy.Error()
	}
	if err == nil {
		return ""
	}
	var bad *jsonschema.ValidationError
	if !errors.As(err, &bad) {
		return "it does not fit"
	}
	for range 2 * maxSchemaDeep {
		if len(bad.Causes) == 0 {
			break
		}
		// Which of several is chance where they are members of an object.
		bad = slices.MinFunc(bad.Causes, func(a, b *jsonschema.ValidationError) int {
			return strings.Compare(pointer(a.InstanceLocation), pointer(b.InstanceLocation))
		})
	}
	at := pointer(bad.InstanceLocation)
	if at == "" {
		at = "the whole"
	}
	at = clip(at, 200)
	switch k := bad.ErrorKind.(type) {
	case *kind.Type:
		return fmt.Sprintf("%s must be %s and is %s", at, strings.Join(k.Want, " or "), k.Got)
	case *kind.Required:
		return fmt.Sprintf("%s has no %s", at, clip(strings.Join(slices.Sorted(slices.Values(k.Missing)), ", "), 200))
	case *kind.AdditionalProperties:
		return fmt.Sprintf("%s may not have %s", at, clip(strings.Join(slices.Sorted(slices.Values(k.Properties)), ", "), 200))
	}
	if _, ok := bad.ErrorKind.(*kind.RefCycle); ok {
		return at + " cannot be checked, since the schema refers to itself for ever"
	}
	keyword := strings.Join(bad.ErrorKind.KeywordPath(), "/")
	if keyword == "" {
		keyword = "not"
	}
	return fmt.Sprintf("%s does not fit the schema's %s", at, clip(keyword, 100))
}

func pointer(path []string) string {
	var b strings.Builder
	for _, p := range path {
		b.WriteString("/" + escape(p))
	}
	return b.String()
}

// schemaFlaws says why a tool's schemas cannot be used.
func schemaFlaws(definition []byte) (flaws []string) {
	var t map[string]json.RawMessage
	if err := json.Unmarshal(definition, &t); err != nil {
		return []string{"its definition is no object"}
	}
	for _, s := range []struct{ member, what string }{{"inputSchema", "input"}, {"outputSchema", "output"}} {
		if raw, ok := t[s.member]; ok {
			if _, err := compile(raw); err != nil {
				flaws = append(flaws, fmt.Sprintf("its %s schema cannot be used: %s", s.what, err))
			}
		}
	}
	return flaws
}
