package registry

import (
	_ "embed"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"unicode"

	"golang.org/x/text/unicode/norm"

	"waybill.dev/schemas"
)

//go:embed confusables.txt
var confusables string

// lookalikes says what names look like (Unicode Technical Standard #39).
type lookalikes struct{ as map[rune]string }

// look is what the name of a tool or prompt looks like.
type look struct {
	kind     Kind
	skeleton string
}

// of is what a name looks like; only the names of tools and prompts matter.
func (l *lookalikes) of(ref Ref) (look, bool) {
	if ref.Kind != Tool && ref.Kind != Prompt {
		return look{}, false
	}
	return look{ref.Kind, l.skeleton(ref.Name)}, true
}

func newLookalikes() (*lookalikes, error) {
	l := &lookalikes{make(map[rune]string, 7000)}
	for line := range strings.Lines(confusables) {
		if line = strings.TrimSpace(line); line == "" || line[0] == '#' {
			continue
		}
		var runes []rune
		for field := range strings.FieldsSeq(line) {
			n, err := strconv.ParseUint(field, 16, 21)
			if err != nil {
				return nil, fmt.Errorf("registry: confusables.txt: %q: %w", line, err)
			}
			runes = append(runes, rune(n))
		}
		l.as[runes[0]] = string(runes[1:])
	}
	return l, nil
}

// skeleton is the same for names that look the same (UTS #39, 4). What nobody
// sees is not of it.
func (l *lookalikes) skeleton(name string) string {
	var b strings.Builder
	for _, r := range norm.NFD.String(name) {
		if hidden(r) {
			continue
		}
		if to, ok := l.as[r]; ok {
			b.WriteString(to)
		} else {
			b.WriteRune(r)
		}
	}
	return norm.NFD.String(b.String())
}

// hidden tells whether a character shows nothing by itself: control and format
// characters (zero width, direction, tags), variation selectors, fillers.
func hidden(r rune) bool {
	switch {
	case unicode.Is(unicode.Cc, r), unicode.Is(unicode.Cf, r), unicode.Is(unicode.Co, r), unicode.Is(unicode.Variation_Selector, r):
		return true
	}
	switch r {
	case 0x034F, 0x115F, 0x1160, 0x17B4, 0x17B5, 0x2028, 0x2029, 0x2800, 0x3164, 0xFFA0, unicode.ReplacementChar:
		return true
	}
	return false
}

func ascii(s string) bool {
	return strings.IndexFunc(s, func(r rune) bool { return r > unicode.MaxASCII }) < 0
}

// naming says what is wrong with a name, beside the names that are known and those
// of beside, to which it adds the name. Registry.mu is held.
func (r *Registry) naming(ref Ref, beside map[look]Ref) (flaws []string) {
	for _, c := range ref.Name {
		if hidden(c) {
			flaws = append(flaws, fmt.Sprintf("its name has a character that is not seen, U+%04X", c))
			break
		}
	}
	l, ok := r.look.of(ref)
	if !ok {
		return flaws
	}
	lower := strings.ToLower(ref.Name)
	for _, name := range slices.Sorted(maps.Keys(r.o.Servers)) {
		if name != ref.Server && strings.HasPrefix(lower, name+"__") {
			flaws = append(flaws, fmt.Sprintf("its name begins as the gateway names what is of the server %s", name))
		}
	}
	if strings.HasPrefix(lower, schemas.Gateway+"__") {
		flaws = append(flaws, "its name begins as the gateway names its own tools")
	}
	if !ascii(ref.Name) && ascii(l.skeleton) {
		flaws = append(flaws, "its name looks Latin and is written in other letters")
	}
	like := func(other Ref) {
		if other.Name != ref.Name && len(flaws) < 4 {
			flaws = append(flaws, fmt.Sprintf("its name looks like %q of the server %s", clip(other.Name, 100), other.Server))
		}
	}
	for _, other := range r.looks[l] {
		if p := r.pin(other); p != nil && len(p.seen.Flaws) == 0 { // an imitation makes none of what it imitates
			like(other)
		}
	}
	if other, ok := beside[l]; ok {
		like(other)
	} else {
		beside[l] = ref
	}
	return flaws
}
