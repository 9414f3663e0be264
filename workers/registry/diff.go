package registry

import (
	"bytes"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strings"
	"unicode/utf8"
)

// Change is one difference between two definitions.
type Change struct {
	Path string `json:"path"`          // JSON Pointer
	Was  string `json:"was,omitempty"` // JSON, cut if it is long; "": it was not there
	Is   string `json:"is,omitempty"`
}

const (
	maxChanges = 50
	maxChange  = 2000 // bytes
)

// diff says what has changed, in the order of the text. Where there is more than
// fits, the last change says so.
func diff(was, is []byte) []Change {
	a, err1 := parse(was)
	b, err2 := parse(is)
	if err1 != nil || err2 != nil {
		return []Change{{Path: "", Was: clip(string(was), maxChange), Is: clip(string(is), maxChange)}}
	}
	var changes []Change
	add := func(path string, was, is any, hadBefore, hasNow bool) {
		c := Change{Path: path}
		if hadBefore {
			c.Was = written(was)
		}
		if hasNow {
			c.Is = written(is)
		}
		changes = append(changes, c)
	}
	var walk func(path string, a, b any)
	walk = func(path string, a, b any) {
		if len(changes) > maxChanges {
			return
		}
		switch a := a.(type) {
		case map[string]any:
			if b, ok := b.(map[string]any); ok {
				names := maps.Clone(a)
				maps.Copy(names, b)
				for _, k := range slices.Sorted(maps.Keys(names)) {
					before, had := a[k]
					now, has := b[k]
					if at := path + "/" + escape(k); had && has {
						walk(at, before, now)
					} else {
						add(at, before, now, had, has)
					}
				}
				return
			}
		case []any:
			if b, ok := b.([]any); ok {
				for i := range max(len(a), len(b)) {
					at := fmt.Sprintf("%s/%d", path, i)
					switch {
					case i >= len(a):
						add(at, nil, b[i], false, true)
					case i >= len(b):
						add(at, a[i], nil, true, false)
					default:
						walk(at, a[i], b[i])
					}
				}
				return
			}
		}
		if written(a) != written(b) || len(written(a)) > maxChange && !bytes.Equal(whole(a), whole(b)) {
			add(path, a, b, true, true)
		}
	}
	walk("", a, b)
	if len(changes) > maxChanges {
		changes = append(changes[:maxChanges], Change{Path: "…", Was: "and more"})
	}
	return changes
}

func whole(v any) []byte {
	b, err := encode(v)
	if err != nil { // of what was parsed: cannot fail
		return nil
	}
	return b
}

func written(v any) string { return clip(string(whole(v)), maxChange) }

// parse reads JSON and keeps numbers as they are written.
func parse(b []byte) (v any, err error) {
	d := json.NewDecoder(bytes.NewReader(b))
	d.UseNumber()
	err = d.Decode(&v)
	return v, err
}

// escape is a name as a JSON Pointer has it.
func escape(name string) string {
	return strings.NewReplacer("~", "~0", "/", "~1").Replace(name)
}

// clip is s in at most n bytes and a mark.
func clip(s string, n int) string {
	if len(s) <= n {
		return s
	}
	for n > 0 && !utf8.RuneStart(s[n]) {
		n--
	}
	return s[:n] + "…"
}
