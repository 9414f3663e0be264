package jsonrpc

import (
	"bytes"
	"errors"
	"fmt"
	"strings"
	"testing"
)

func TestPatch(t *testing.T) {
	const text = `{ "jsonrpc":"2.0" , "id" : 9007199254740993,
  "method":"tools/call",
  "params":{"name":"a__b", "arguments":{"n":1E400,"x":[1, 2 ,3]} , "_meta":{} , "e":[ ]},"z":0 }`
	type v = func(m *Message, path ...string) Value
	get := func(m *Message, path ...string) Value { return m.Root().Get(path...) }
	raw := func(s string) []byte { return []byte(s) }
	for _, c := range []struct {
		name     string
		edit     func(p *Patch, m *Message, v v)
		old, new string // pairs of what is different, separated by §
		err      error
	}{
		{"nothing", func(p *Patch, m *Message, v v) {}, "", "", nil},
		{"id and name", func(p *Patch, m *Message, v v) {
			p.Replace(v(m, "params", "name"), raw(`"b"`)).Replace(m.ID(), raw(`7`))
		}, `9007199254740993§"a__b"`, `7§"b"`, nil},
		{"set existing", func(p *Patch, m *Message, v v) { p.Set(m.Params(), "name", raw(`"b"`)) }, `"a__b"`, `"b"`, nil},
		{"set twice", func(p *Patch, m *Message, v v) {
			p.Set(m.Params(), "name", raw(`"b"`)).Set(m.Params(), "name", raw(`"c"`))
		}, `"a__b"`, `"c"`, nil},
		{"set new", func(p *Patch, m *Message, v v) {
			p.Set(m.Params(), "n\"", raw(`1`)).Set(m.Params(), "o", raw(`[2]`)).Set(m.Params(), "n\"", raw(`3`))
		}, `[ ]`, `[ ],"n\"":3,"o":[2]`, nil},
		{"set in empty", func(p *Patch, m *Message, v v) {
			p.Set(v(m, "params", "_meta"), "a/b", raw(`"t"`)).Set(v(m, "params", "_meta"), "c", raw(`1`))
		}, `"_meta":{}`, `"_meta":{"a/b":"t","c":1}`, nil},
		{"remove first", func(p *Patch, m *Message, v v) { p.Remove(m.Params(), "name") }, `"name":"a__b", `, ``, nil},
		{"remove middle", func(p *Patch, m *Message, v v) { p.Remove(m.Params(), "_meta") }, `, "_meta":{} `, ` `, nil},
		{"remove last", func(p *Patch, m *Message, v v) { p.Remove(m.Root(), "z") }, `,"z":0`, ``, nil},
		{"remove missing", func(p *Patch, m *Message, v v) { p.Remove(m.Root(), "y") }, ``, ``, nil},
		{"remove first two", func(p *Patch, m *Message, v v) {
			p.Remove(m.Params(), "name").Remove(m.Params(), "arguments")
		}, `"name":"a__b", "arguments":{"n":1E400,"x":[1, 2 ,3]} , `, ``, nil},
		{"remove all", func(p *Patch, m *Message, v v) {
			a := v(m, "params", "arguments")
			p.Remove(a, "x").Remove(a, "n")
		}, `"n":1E400,"x":[1, 2 ,3]`, ``, nil},
		{"remove all and set", func(p *Patch, m *Message, v v) {
			a := v(m, "params", "arguments")
			p.Remove(a, "x").Remove(a, "n").Set(a, "m", raw(`1`)).Set(a, "n", raw(`2`))
		}, `"n":1E400,"x":[1, 2 ,3]`, `"n":2,"m":1`, nil},
		{"remove and set again", func(p *Patch, m *Message, v v) {
			p.Remove(m.Params(), "name").Set(m.Params(), "name", raw(`0`))
		}, `"a__b"`, `0`, nil},
		{"set and remove again", func(p *Patch, m *Message, v v) {
			p.Set(m.Params(), "name", raw(`0`)).Set(m.Params(), "new", raw(`0`)).Remove(m.Params(), "new").Remove(m.Params(), "name")
		}, `"name":"a__b", `, ``, nil},
		{"remove last and set", func(p *Patch, m *Message, v v) { p.Remove(m.Root(), "z").Set(m.Root(), "y", raw(`1`)) }, `,"z":0`, `,"y":1`, nil},
		{"filter first", func(p *Patch, m *Message, v v) {
			p.Filter(v(m, "params", "arguments", "x"), func(i int, _ Value) bool { return i > 0 })
		}, `[1, 2 ,3]`, `[2 ,3]`, nil},
		{"filter middle, append", func(p *Patch, m *Message, v v) {
			x := v(m, "params", "arguments", "x")
			p.Filter(x, func(_ int, e Value) bool { return string(e.Raw()) != "2" }).Append(x, raw(`4`), raw(` 5`))
		}, `[1, 2 ,3]`, `[1 ,3,4, 5]`, nil},
		{"filter last", func(p *Patch, m *Message, v v) {
			p.Filter(v(m, "params", "arguments", "x"), func(i int, _ Value) bool { return i < 1 })
		}, `[1, 2 ,3]`, `[1 ]`, nil},
		{"filter all, append", func(p *Patch, m *Message, v v) {
			x := v(m, "params", "arguments", "x")
			p.Filter(x, func(int, Value) bool { return false }).Append(x, raw(`9`))
		}, `[1, 2 ,3]`, `[9]`, nil},
		{"filter the only one left that was replaced", func(p *Patch, m *Message, v v) {
			x := v(m, "params", "arguments", "x")
			for e := range x.Elements() {
				p.Replace(e, raw(`{}`))
			}
			p.Filter(x, func(i int, _ Value) bool { return i == 1 })
		}, `[1, 2 ,3]`, `[{} ]`, nil},
		{"append to empty", func(p *Patch, m *Message, v v) { p.Append(v(m, "params", "e"), raw(`{}`), raw(`1`)) }, `[ ]`, `[{},1 ]`, nil},
		{"inside of what is replaced", func(p *Patch, m *Message, v v) {
			p.Set(v(m, "params", "arguments"), "n", raw(`1`)).Set(v(m, "params", "arguments"), "new", raw(`1`))
			p.Replace(v(m, "params", "arguments"), raw(`null`)).Append(v(m, "params", "arguments", "x"), raw(`4`))
		}, `{"n":1E400,"x":[1, 2 ,3]}`, `null`, nil},
		{"inside of what is removed", func(p *Patch, m *Message, v v) {
			p.Replace(v(m, "params", "arguments", "x"), raw(`[]`)).Remove(m.Params(), "arguments").Remove(m.Params(), "e")
		}, `, "arguments":{"n":1E400,"x":[1, 2 ,3]} §, "e":[ ]`, ` §`, nil},
		{"everything", func(p *Patch, m *Message, v v) { p.Replace(m.Root(), raw(`{}`)).Set(m.Root(), "a", raw("1")) }, text, `{}`, nil},

		{"missing value", func(p *Patch, m *Message, v v) { p.Replace(v(m, "nope"), raw(`1`)) }, "", "", ErrPatch},
		{"set in what is missing", func(p *Patch, m *Message, v v) { p.Set(v(m, "nope"), "a", raw(`1`)) }, "", "", ErrPatch},
		{"set in an array", func(p *Patch, m *Message, v v) { p.Set(v(m, "params", "e"), "a", raw(`1`)) }, "", "", ErrPatch},
		{"filter an object", func(p *Patch, m *Message, v v) { p.Filter(m.Params(), nil) }, "", "", ErrPatch},
		{"unquoted", func(p *Patch, m *Message, v v) { p.Replace(m.ID(), raw(`abc`)) }, "", "", ErrSyntax},
		{"structure", func(p *Patch, m *Message, v v) { p.Set(m.Root(), "a", raw(`1,"b":2`)) }, "", "", ErrSyntax},
		{"empty", func(p *Patch, m *Message, v v) { p.Append(v(m, "params", "e"), nil) }, "", "", ErrSyntax},
		{"duplicates inside", func(p *Patch, m *Message, v v) { p.Set(m.Root(), "a", raw(`{"b":1,"b":2}`)) }, "", "", ErrDuplicateName},
		{"case variant", func(p *Patch, m *Message, v v) { p.Set(m.Params(), "Name", raw(`1`)) }, "", "", ErrCaseVariant},
		{"case variant of new", func(p *Patch, m *Message, v v) {
			p.Set(m.Params(), "new", raw(`1`)).Set(m.Params(), "New", raw(`1`))
		}, "", "", ErrCaseVariant},
		{"bad name", func(p *Patch, m *Message, v v) { p.Set(m.Params(), "\xff", raw(`1`)) }, "", "", ErrPatch},
		{"another message", func(p *Patch, m *Message, v v) {
			o, _ := Decode([]byte(text), Limits{})
			p.Replace(o.ID(), raw(`1`))
		}, "", "", ErrPatch},
	} {
		t.Run(c.name, func(t *testing.T) {
			input := []byte(text)
			m, err := Decode(input, Limits{})
			if err != nil {
				t.Fatal(err)
			}
			p := m.Patch()
			c.edit(p, m, get)
			got := p.Bytes()
			if !bytes.Equal(input, []byte(text)) {
				t.Error("the original was changed")
			}
			if c.err != nil {
				if got != nil || !errors.Is(p.Err(), c.err) || !errors.Is(p.Err(), ErrPatch) {
					t.Errorf("%s, %v", got, p.Err())
				}
				return
			}
			want := text
			news := strings.Split(c.new, "§")
			for i, old := range strings.Split(c.old, "§") {
				if !strings.Contains(want, old) {
					t.Fatalf("no %s", old)
				}
				if old != "" {
					want = strings.Replace(want, old, news[i], 1)
				}
			}
			if string(got) != want || p.Err() != nil {
				t.Errorf("got  %s\nwant %s\n%v", got, want, p.Err())
			}
			if again := p.Bytes(); !bytes.Equal(again, got) {
				t.Errorf("second time: %s", again)
			}
			if len(got) > 0 {
				got[0] = 'x'
				if input[0] == 'x' {
					t.Error("output shares memory with the original")
				}
			}
			if len(c.name) > 0 && c.name != "everything" {
				if _, err := Parse([]byte(want), Limits{}); err != nil {
					t.Error(err)
				}
			}
		})
	}
}

func TestPatchVariantsAllowed(t *testing.T) {
	v, err := Parse([]byte(`{"a":1,"A":2}`), Limits{AllowCaseVariants: true})
	if err != nil {
		t.Fatal(err)
	}
	p := v.Patch().Set(v, "A", []byte("3")).Set(v, "\u212a", []byte("4")).Set(v, "k", []byte(`{"b":1,"B":2}`))
	if got, want := string(p.Bytes()), `{"a":1,"A":3,"`+"\u212a"+`":4,"k":{"b":1,"B":2}}`; got != want {
		t.Errorf("got %s want %s: %v", got, want, p.Err())
	}
	var none Value
	if p := none.Patch().Set(none, "a", []byte("1")); p.Bytes() != nil || !errors.Is(p.Err(), ErrPatch) {
		t.Errorf("patch of nothing: %v", p.Err())
	}
}

// model is a text as a tree, to which edits are applied the slow and plain way.
type model struct {
	v        Value
	name     string
	children []*model
	removed  bool
	replaced []byte
	added    []*model // with replaced and, in objects, name
}

func newModel(v Value) *model {
	m := &model{v: v}
	for n, c := range v.Members() {
		cm := newModel(c)
		cm.name = n
		m.children = append(m.children, cm)
	}
	for c := range v.Elements() {
		m.children = append(m.children, newModel(c))
	}
	return m
}

func (m *model) all() []*model {
	out := []*model{m}
	for _, c := range m.children {
		out = append(out, c.all()...)
	}
	return out
}

func (m *model) touched() bool {
	if m.removed || m.replaced != nil || len(m.added) > 0 {
		return true
	}
	for _, c := range m.children {
		if c.touched() {
			return true
		}
	}
	return false
}

// compare says how got differs from what the edited model should be.
func (m *model) compare(got Value) error {
	if m.replaced != nil {
		if !bytes.Equal(bytes.TrimSpace(m.replaced), got.Raw()) {
			return fmt.Errorf("replaced by %s, got %s", m.replaced, got.Raw())
		}
		return nil
	}
	if !m.touched() {
		if !bytes.Equal(m.v.Raw(), got.Raw()) {
			return fmt.Errorf("untouched %s became %s", m.v.Raw(), got.Raw())
		}
		return nil
	}
	if m.v.Kind() != got.Kind() {
		return fmt.Errorf("%s became %s", m.v.Raw(), got.Raw())
	}
	var want []*model
	for _, c := range m.children {
		if !c.removed {
			want = append(want, c)
		}
	}
	want = append(want, m.added...)
	i := 0
	check := func(name string, v Value) error {
		if i >= len(want) || want[i].name != name {
			return fmt.Errorf("child %d %q too many in %s", i, name, got.Raw())
		}
		i++
		return want[i-1].compare(v)
	}
	for n, v := range got.Members() {
		if err := check(n, v); err != nil {
			return err
		}
	}
	for v := range got.Elements() {
		if err := check("", v); err != nil {
			return err
		}
	}
	if i != len(want) {
		return fmt.Errorf("%d children of %d in %s", i, len(want), got.Raw())
	}
	return nil
}

// FuzzPatch edits a text as the second argument says, three bytes for each
// edit. The outcome must be sound and have exactly the edits, all else with
// the bytes it had.
func FuzzPatch(f *testing.F) {
	for _, s := range goodTexts {
		f.Add([]byte(s), []byte{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11})
	}
	f.Add(call1K, []byte{3, 4, 1, 2, 5, 0, 1, 9, 2, 0, 7, 1})
	f.Add([]byte(`{ "a" : [ 1 , {} , 2 ] , "b" : { "c" : 1 , "d" : [] } }`), []byte{2, 1, 0, 3, 1, 1, 1, 4, 0, 4, 2, 1, 5, 2, 6})
	f.Fuzz(func(t *testing.T, raw, ops []byte) {
		root, err := Parse(raw, Limits{Bytes: 1 << 14})
		if err != nil || len(ops) > 90 {
			return
		}
		before := bytes.Clone(raw)
		top := newModel(root)
		nodes := top.all()
		fragments := []string{`0`, ` "é\u0000" `, `{}`, `{"x":[1, 2]}`, `[]`, "\n[ {\"a\":1E400} ]", `null`, `""`}
		p := root.Patch()
		for ; len(ops) >= 3; ops = ops[3:] {
			n := nodes[int(ops[1])%len(nodes)]
			arg := int(ops[2])
			frag := []byte(fragments[arg%len(fragments)])
			switch ops[0] % 6 {
			case 0:
				p.Replace(n.v, frag)
				n.replaced = frag
			case 1: // set a member that is there
				if n.v.Kind() == Object && len(n.children) > 0 {
					c := n.children[arg%len(n.children)]
					p.Set(n.v, c.name, frag)
					c.replaced, c.removed = frag, false
				}
			case 2: // set one that is not, or not yet
				if n.v.Kind() == Object {
					name := []string{"new", "new \"2\"\\", "é\n"}[arg%3]
					p.Set(n.v, name, frag)
					n.set(name, frag)
				}
			case 3:
				if n.v.Kind() == Object && len(n.children) > 0 {
					c := n.children[arg%len(n.children)]
					p.Remove(n.v, c.name)
					c.removed = true
				}
			case 4:
				if n.v.Kind() == Array {
					p.Filter(n.v, func(i int, _ Value) bool { return arg>>(i%8)&1 == 1 })
					for i, c := range n.children {
						c.removed = c.removed || arg>>(i%8)&1 == 0
					}
				}
			case 5:
				if n.v.Kind() == Array {
					p.Append(n.v, frag, frag)
					n.added = append(n.added, &model{replaced: frag}, &model{replaced: frag})
				}
			}
		}
		out := p.Bytes()
		if !bytes.Equal(raw, before) {
			t.Fatal("the original was changed")
		}
		if p.Err() != nil {
			if !errors.Is(p.Err(), ErrCaseVariant) || out != nil {
				t.Fatalf("%s: %v", out, p.Err())
			}
			return
		}
		got, err := Parse(out, Limits{Depth: 2 * DefaultDepth, Bytes: 1 << 20})
		if err != nil {
			t.Fatalf("%s\n%s: %v", raw, out, err)
		}
		if err := top.compare(got); err != nil {
			t.Fatalf("%s\n%s: %v", raw, out, err)
		}
		if !top.touched() && !bytes.Equal(raw, out) {
			t.Fatalf("%q became %q", raw, out)
		}
	})
}

func (m *model) set(name string, frag []byte) {
	for _, c := range m.children {
		if c.name == name {
			c.replaced, c.removed = frag, false
			return
		}
	}
	for _, a := range m.added {
		if a.name == name {
			a.replaced = frag
			return
		}
	}
	m.added = append(m.added, &model{name: name, replaced: frag})
}

// FuzzDecode holds Decode to jsontext, and what it found to what stands there.
func FuzzDecode(f *testing.F) {
	for _, s := range append(goodTexts, badTexts...) {
		f.Add([]byte(s))
		f.Add([]byte(`{"jsonrpc":"2.0","id":1,"method":"m","params":{"x":` + s + `}}`))
	}
	f.Add(call1K)
	f.Add([]byte(`{"a":0,"b":0,"c":0,"d":0,"e":0,"f":0,"g":0,"h":0,"i":0,"j":0,"k":0,"l":0,"m":0,"n":0,"o":0,"p":0,"q":0,"\u0072":0}`))
	f.Fuzz(func(t *testing.T, raw []byte) {
		if len(raw) > 1<<14 {
			return
		}
		before := bytes.Clone(raw)
		for _, lim := range []Limits{{}, {Depth: 3}, {AllowCaseVariants: true}} {
			if err := agree(raw, lim); err != nil {
				t.Fatal(err)
			}
		}
		if v, err := Parse(raw, Limits{}); err == nil {
			sane(t, v)
		} else if m, err := Decode(raw, Limits{}); err == nil {
			t.Fatalf("Decode accepts what Parse refuses: %s", m.Raw())
		}
		m, err := Decode(raw, Limits{})
		if err != nil {
			var e *Error
			if !errors.As(err, &e) || e.Offset < 0 || e.Offset > len(raw) || len(err.Error()) > 2000 {
				t.Fatalf("odd error %v", err)
			}
			return
		}
		kinds := 0
		for _, is := range []bool{m.IsRequest(), m.IsNotification(), m.IsResponse()} {
			if is {
				kinds++
			}
		}
		if kinds != 1 || m.Result().Exists() && m.Error().Exists() {
			t.Fatalf("%d kinds: %s", kinds, raw)
		}
		for name, v := range map[string]Value{"id": m.ID(), "params": m.Params(), "result": m.Result(), "error": m.Error()} {
			if v != m.Root().Get(name) {
				t.Fatalf("%s: %s, by Get %s", name, v.Raw(), m.Root().Get(name).Raw())
			}
		}
		if text, _ := m.Root().Get("method").Text(); text != m.Method() {
			t.Fatalf("method %q, by Get %q", m.Method(), text)
		}
		if !bytes.Equal(raw, before) || !bytes.Equal(raw, m.Raw()) {
			t.Fatal("the bytes were changed")
		}
	})
}

// sane checks that each value stands where it says, is itself a sound text, and
// is found again under its name.
func sane(t *testing.T, v Value) {
	if !bytes.Equal(v.Raw(), v.doc.raw[v.Offset():v.Offset()+len(v.Raw())]) {
		t.Fatalf("not at %d: %s", v.Offset(), v.Raw())
	}
	if w, err := Parse(v.Raw(), Limits{}); err != nil || w.Kind() != v.Kind() || v.Kind() == None {
		t.Fatalf("%s: %v", v.Raw(), err)
	}
	if _, ok := v.Text(); ok != (v.Kind() == String) {
		t.Fatalf("%s: text %v", v.Raw(), ok)
	}
	v.Int()
	n := 0
	for name, c := range v.Members() {
		if v.Get(name) != c {
			t.Fatalf("%q in %s: found %s", name, v.Raw(), v.Get(name).Raw())
		}
		sane(t, c)
		if n++; n > 64 {
			break
		}
	}
	for c := range v.Elements() {
		sane(t, c)
		if n++; n > 64 {
			break
		}
	}
}
