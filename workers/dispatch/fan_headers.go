package dispatch

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"waybill.dev/schemas/jsonrpc"
)

// A tool may say in its input schema that an argument is repeated in a header,
// for those on the way who read no bodies (MCP 2026-07-28, streamable HTTP,
// "Custom Headers from Tool Parameters"):
//
//	"properties": {"region": {"type": "string", "x-mcp-header": "Region"}}
//
// A call then has the header Mcp-Param-Region, and a server refuses one without
// it. Who calls by itself has read the list and sends it; for calls that the
// gateway makes it has to find out.

const (
	mirrorKey   = "x-mcp-header"
	paramPrefix = "Mcp-Param-"

	maxMirrorDepth = 64      // of schemas in schemas
	maxParams      = 64      // headers of one call, as at the edge
	maxParamBytes  = 8 << 10 // of them together
	safeInteger    = 1<<53 - 1
)

// mirror is an argument that is repeated in a header.
type mirror struct {
	header string   // canonical
	path   []string // to the argument
}

// schemaKeywords are those of JSON Schema below which there are schemas, but for
// properties: whether what stands there speaks of an argument depends on the
// arguments, so none of it may be mirrored. The value is a schema, a list of
// schemas, or, where it is true, an object of schemas.
var schemaKeywords = map[string]bool{
	"items": false, "prefixItems": false, "contains": false, "unevaluatedItems": false,
	"additionalProperties": false, "unevaluatedProperties": false, "propertyNames": false,
	"allOf": false, "anyOf": false, "oneOf": false, "not": false, "if": false, "then": false, "else": false,
	"patternProperties": true, "dependentSchemas": true, "$defs": true, "definitions": true,
}

// mirrors reads from a tool's definition what of its arguments is repeated in
// headers. A definition that is wrong in this is to be left out of lists, the
// specification says; the error says why.
func mirrors(tool jsonrpc.Value) ([]mirror, error) {
	var found []mirror
	var visit func(schema jsonrpc.Value, path []string, reachable bool, depth int) error
	visit = func(schema jsonrpc.Value, path []string, reachable bool, depth int) error {
		// Few tools have any; the rest of a list is not looked through. An
		// escape may hide one.
		if raw := schema.Raw(); !bytes.Contains(raw, []byte(mirrorKey)) && !bytes.Contains(raw, []byte(`\u`)) {
			return nil
		}
		if depth > maxMirrorDepth {
			return errors.New("its input schema is nested too deeply")
		}
		for keyword, v := range schema.Members() {
			var err error
			named, applies := schemaKeywords[keyword]
			switch {
			case keyword == mirrorKey:
				var m mirror
				if m, err = newMirror(schema, v, path, reachable); err == nil {
					if slices.ContainsFunc(found, func(o mirror) bool { return strings.EqualFold(o.header, m.header) }) {
						return fmt.Errorf("two of its arguments have the header %s", m.header)
					}
					found = append(found, m)
				}
			case keyword == "properties":
				for name, property := range v.Members() {
					if err = visit(property, append(slices.Clip(path), name), reachable, depth+1); err != nil {
						break
					}
				}
			case applies && named:
				for _, sub := range v.Members() {
					if err = visit(sub, path, false, depth+1); err != nil {
						break
					}
				}
			case applies && v.Kind() == jsonrpc.Array:
				for sub := range v.Elements() {
					if err = visit(sub, path, false, depth+1); err != nil {
						break
					}
				}
			case applies:
				err = visit(v, path, false, depth+1)
			}
			if err != nil {
				return err
			}
		}
		return nil
	}
	if err := visit(tool.Get("inputSchema"), nil, true, 0); err != nil {
		return nil, err
	}
	return found, nil
}

func newMirror(schema, name jsonrpc.Value, path []string, reachable bool) (mirror, error) {
	text, _ := name.Text()
	kind, _ := schema.Get("type").Text()
	argument := clip(strings.Join(path, "."), 100)
	switch {
	case !reachable || len(path) == 0:
		return mirror{}, errors.New("it has an x-mcp-header where there is no argument")
	case !headerName(text):
		return mirror{}, fmt.Errorf("the x-mcp-header of its argument %s is no name of a header", argument)
	case kind != "string" && kind != "integer" && kind != "boolean":
		return mirror{}, fmt.Errorf("its argument %s has an x-mcp-header and is no string, integer or boolean", argument)
	}
	return mirror{http.CanonicalHeaderKey(paramPrefix + text), path}, nil
}

// paramHeaders are the headers of a call with these arguments. What is absent or
// null has none, and neither has what no header can say: then it is for the
// server to refuse the call.
func paramHeaders(all []mirror, arguments jsonrpc.Value) map[string]string {
	headers := map[string]string{}
	size := 0
	for _, m := range all {
		v := arguments.Get(m.path...)
		var text string
		switch v.Kind() {
		case jsonrpc.String:
			text, _ = v.Text()
		case jsonrpc.Bool:
			text = string(v.Raw())
		case jsonrpc.Number:
			// 1.0 and 1e3 are integers to a JSON Schema.
			f, err := strconv.ParseFloat(string(v.Raw()), 64)
			if err != nil || f != math.Trunc(f) || math.Abs(f) > safeInteger {
				continue
			}
			text = strconv.FormatInt(int64(f), 10)
		default:
			continue
		}
		headers[m.header] = headerText(text)
		if size += len(m.header) + len(headers[m.header]); size > maxParamBytes || len(headers) > maxParams {
			return nil
		}
	}
	return headers
}

// mirrored says what the tools of a server repeat in headers. It asks the server
// once, when it is first needed. Policy judges that call as any other: who may
// not see a tool learns nothing of it.
func (q *question) mirrored(ctx context.Context, server string, until time.Time) func() map[string][]mirror {
	return sync.OnceValue(func() map[string][]mirror {
		if end := q.opt.Now().Add(listTime); end.Before(until) {
			until = end
		}
		l := q.read(ctx, server, "tools/list", "", until, true, nil)
		of := map[string][]mirror{}
		for i := range l.elements {
			if e := &l.elements[i]; len(e.mirrors) > 0 && of[e.name] == nil {
				of[e.name] = e.mirrors
			}
		}
		return of
	})
}
