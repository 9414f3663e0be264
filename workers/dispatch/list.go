package dispatch

import (
	"errors"
	"fmt"
	"strings"

	"waybill.dev/schemas"
	"waybill.dev/schemas/jsonrpc"
)

// lists says where the names in an MCP list stand.
var lists = map[string]struct{ array, name string }{
	"tools/list":               {"tools", "name"},
	"prompts/list":             {"prompts", "name"},
	"resources/list":           {"resources", "uri"},
	"resources/templates/list": {"resourceTemplates", "uriTemplate"},
}

// What an ending names of the removed elements: with every byte escaped by
// JSON this is 38 KB, of some 60 that the log takes beside the body.
const (
	maxRemoved     = 50
	maxRemovedName = 128
)

var errList = errors.New("a list that cannot be filtered")

// filterList takes out of a list what the caller may not see, and says what,
// and how much more.
// The other elements and everything around them keep their bytes. What has no
// name cannot be allowed and goes too. Answers of other methods, and answers
// that are errors, pass as they are.
//
// m must have been decoded without AllowCaseVariants: otherwise a client that
// ignores case could read another name than was judged here.
func filterList(m *jsonrpc.Message, method string, c Call) (body []byte, removed []string, more int, err error) {
	at, ok := lists[method]
	if !ok || !c.filters() && c.Listed == nil || !m.Result().Exists() {
		return m.Raw(), nil, 0, nil
	}
	var may []bool
	if c.Listed != nil {
		if may, err = c.Listed(m.Result()); err != nil {
			return nil, nil, 0, err
		}
	}
	array := m.Result().Get(at.array)
	if array.Kind() != jsonrpc.Array {
		// No list at all is well, such as in an answer that asks for input;
		// one that only a careless client would find is not.
		for name := range m.Result().Members() {
			if strings.EqualFold(name, at.array) {
				return nil, nil, 0, fmt.Errorf("%w: %q is no array", errList, name)
			}
		}
		return m.Raw(), nil, 0, nil
	}
	patch := m.Patch().Filter(array, func(i int, element jsonrpc.Value) bool {
		name, ok := element.Get(at.name).Text()
		if (ok && c.shows(name) || !c.filters()) && (may == nil || i < len(may) && may[i]) {
			return true
		}
		if len(removed) < maxRemoved {
			removed = append(removed, clip(name, maxRemovedName))
		} else {
			more++
		}
		return false
	})
	if removed == nil {
		return m.Raw(), nil, 0, nil
	}
	if err := patch.Err(); err != nil {
		return nil, nil, 0, fmt.Errorf("%w: %w", errList, err)
	}
	return patch.Bytes(), removed, more, nil
}

// listFault is a list that cannot be passed on: the server's fault, or else the
// log's, and then it may be asked for again.
func listFault(err error) *Fault {
	if w := new(withheld); errors.As(err, &w) {
		return w.fault()
	}
	if errors.Is(err, errList) || errors.Is(err, schemas.ErrInvalid) {
		return &Fault{Kind: Garbled, Err: err}
	}
	return &Fault{Kind: Gateway, Err: err}
}
