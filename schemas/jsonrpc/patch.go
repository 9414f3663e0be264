package jsonrpc

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
	"unicode/utf8"
)

// Patch rewrites members of a text and leaves every other byte as it was,
// white space and the order of members included.
//
// Edits may be given in any order and each refers to the text as it came, never
// to the outcome of another edit. Of two edits to one value the later counts;
// an edit inside something that is removed or replaced as a whole is void. What
// is put in is checked as strictly as the text was, but nobody counts whether
// the outcome is still within Limits.Bytes and Limits.Depth, nor whether it is
// still a JSON-RPC message.
//
// A patch belongs to one goroutine.
type Patch struct {
	doc   *document
	edits []edit
	boxes []box // few: one for each object or array with something added or removed
	err   error // of the first impossible edit
}

// edit puts raw in the place of a span.
type edit struct {
	start, end int
	raw        []byte
}

// box is what changes among the children of an object or array. The commas are
// sorted out at the end, when it is known who is left.
type box struct {
	of      Value
	removed map[int]bool // by where the child starts
	added   []addition
}

type addition struct {
	name string
	raw  []byte
}

// Replace puts raw in the place of v, which must stem from the patched text.
func (p *Patch) Replace(v Value, raw []byte) *Patch {
	if p.owns(v, "replace") && p.sound(raw) {
		p.edits = append(p.edits, edit{int(v.span.start), int(v.span.end), raw})
	}
	return p
}

// Set replaces the value of the member of an object, or appends the member.
// Unless the text was read with AllowCaseVariants, a name that the object has
// in another case is refused (ErrCaseVariant).
func (p *Patch) Set(object Value, name string, raw []byte) *Patch {
	if !p.owns(object, "set "+name) || !p.is(object, Object) || !p.sound(raw) {
		return p
	}
	if !utf8.ValidString(name) {
		return p.fail(fmt.Errorf("%w: name %q is not UTF-8", ErrPatch, name))
	}
	variant := ""
	w := object.walk()
	for w.next(true) {
		w.skip()
		if nameIs(w.name(), name) {
			if b := p.find(object); b != nil {
				delete(b.removed, w.start)
			}
			p.edits = append(p.edits, edit{w.value, w.end, raw})
			return p
		}
		if !p.doc.lim.AllowCaseVariants && variant == "" {
			if have := unquote(w.name()); strings.EqualFold(have, name) {
				variant = have
			}
		}
	}
	b := p.box(object)
	for i := range b.added {
		if b.added[i].name == name {
			b.added[i].raw = raw
			return p
		}
		if !p.doc.lim.AllowCaseVariants && strings.EqualFold(b.added[i].name, name) {
			variant = b.added[i].name
		}
	}
	if variant != "" {
		return p.fail(fmt.Errorf("%w: %w: cannot set %q beside %q", ErrPatch, ErrCaseVariant, name, variant))
	}
	b.added = append(b.added, addition{name, raw})
	return p
}

// Remove takes a member out of an object, with its comma. It is no error if the
// object has none of that name.
func (p *Patch) Remove(object Value, name string) *Patch {
	if !p.owns(object, "remove "+name) || !p.is(object, Object) {
		return p
	}
	if b := p.find(object); b != nil {
		b.added = slices.DeleteFunc(b.added, func(a addition) bool { return a.name == name })
	}
	w := object.walk()
	for w.next(true) {
		if nameIs(w.name(), name) {
			p.box(object).removed[w.start] = true
			break
		}
		w.skip()
	}
	return p
}

// Filter takes those elements out of an array for which keep says false.
func (p *Patch) Filter(array Value, keep func(i int, element Value) bool) *Patch {
	if !p.owns(array, "filter") || !p.is(array, Array) {
		return p
	}
	i := 0
	for e := range array.Elements() {
		if !keep(i, e) {
			p.box(array).removed[int(e.span.start)] = true
		}
		i++
	}
	return p
}

// Append adds elements to the end of an array.
func (p *Patch) Append(array Value, raw ...[]byte) *Patch {
	if !p.owns(array, "append") || !p.is(array, Array) {
		return p
	}
	for _, r := range raw {
		if p.sound(r) {
			b := p.box(array)
			b.added = append(b.added, addition{raw: r})
		}
	}
	return p
}

// Err returns the first edit that could not be made, nil if there was none. It
// wraps ErrPatch, and ErrSyntax or another sentinel if what was to be put in is
// not sound.
func (p *Patch) Err() error { return p.err }

// Bytes returns the new text, in memory of its own. After an impossible edit it
// is nil, so that a text is never passed on with an edit missing; [Patch.Err]
// says why.
func (p *Patch) Bytes() []byte {
	if p.err != nil || p.doc == nil {
		return nil
	}
	edits := slices.Clone(p.edits)
	for i := range p.boxes {
		edits = p.boxes[i].edits(edits)
	}
	// What encloses comes before what it encloses. Among edits of one span the
	// last given comes last; removals were appended behind everything else.
	slices.SortStableFunc(edits, func(a, b edit) int {
		return cmp.Or(cmp.Compare(a.start, b.start), cmp.Compare(b.end, a.end))
	})
	size := len(p.doc.raw)
	for _, e := range edits {
		size += len(e.raw)
	}
	out := make([]byte, 0, size)
	pos := 0
	for i, e := range edits {
		if i+1 < len(edits) && edits[i+1].start == e.start && edits[i+1].end == e.end {
			continue // overruled
		}
		if e.start < pos {
			continue // inside of what is gone
		}
		out = append(out, p.doc.raw[pos:e.start]...)
		out = append(out, e.raw...)
		pos = e.end
	}
	return append(out, p.doc.raw[pos:]...)
}

// edits appends the removals and the additions of a box.
//
// A removed child takes the comma in front of it along, if anything is left to
// stand before that comma; else everything up to the next child. Neither
// touches a byte between two children that stay.
func (b *box) edits(edits []edit) []edit {
	last := int(b.of.span.start) + 1 // where something may be added
	left := false                    // a child that stays has been seen
	leading := -1                    // index of the removal that reaches to the next child
	w := b.of.walk()
	for w.next(b.of.Kind() == Object) {
		w.skip()
		if leading >= 0 {
			edits[leading].end = w.start
			leading = -1
		}
		switch {
		case !b.removed[w.start]:
			left = true
		case left:
			edits = append(edits, edit{start: w.comma, end: w.end})
		default:
			leading = len(edits)
			edits = append(edits, edit{start: w.start, end: w.end})
		}
		last = w.end
	}
	if len(b.added) == 0 {
		return edits
	}
	var text []byte
	for _, a := range b.added {
		if left {
			text = append(text, ',')
		}
		left = true
		if b.of.Kind() == Object {
			text = append(text, Quote(a.name)...)
			text = append(text, ':')
		}
		text = append(text, a.raw...)
	}
	return append(edits, edit{last, last, text})
}

func (p *Patch) owns(v Value, doing string) bool {
	switch {
	case !v.Exists():
		p.fail(fmt.Errorf("%w: %s: no such value", ErrPatch, doing))
		return false
	case v.doc != p.doc:
		p.fail(fmt.Errorf("%w: %s: a value of another text", ErrPatch, doing))
		return false
	}
	return true
}

func (p *Patch) is(v Value, k Kind) bool {
	if v.Kind() != k {
		p.fail(fmt.Errorf("%w: the %s at byte %d is no %s", ErrPatch, v.Kind(), v.Offset(), k))
		return false
	}
	return true
}

// sound checks what is to be put in. An id or a name that somebody forgot to
// quote must not become structure.
func (p *Patch) sound(raw []byte) bool {
	lim := p.doc.lim
	lim.Bytes = max(lim.Bytes, len(raw))
	var d document
	if err := d.check(raw, lim, nil); err != nil {
		p.fail(fmt.Errorf("%w: what is put in: %w", ErrPatch, err))
		return false
	}
	return true
}

func (p *Patch) fail(err error) *Patch {
	if p.err == nil {
		p.err = err
	}
	return p
}

func (p *Patch) find(v Value) *box {
	for i := range p.boxes {
		if p.boxes[i].of == v {
			return &p.boxes[i]
		}
	}
	return nil
}

func (p *Patch) box(v Value) *box {
	if b := p.find(v); b != nil {
		return b
	}
	p.boxes = append(p.boxes, box{of: v, removed: map[int]bool{}})
	return &p.boxes[len(p.boxes)-1]
}
