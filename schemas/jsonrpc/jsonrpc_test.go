package jsonrpc

import (
	"bytes"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/go-json-experiment/json/jsontext"
	"pgregory.net/rapid"
)

var update = flag.Bool("update", false, "rewrite the golden files")

// TestDecodeGolden reads testdata/decode.txt: an input as a Go string, a tab,
// and what Decode says of it. With -update the outcomes are written anew; new
// inputs are lines of their own.
func TestDecodeGolden(t *testing.T) {
	const file = "testdata/decode.txt"
	old, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	var out strings.Builder
	for i, line := range strings.Split(strings.TrimSuffix(string(old), "\n"), "\n") {
		if line == "" || line[0] == '#' {
			out.WriteString(line + "\n")
			continue
		}
		quoted, want, _ := strings.Cut(line, "\t")
		raw, err := strconv.Unquote(quoted)
		if err != nil {
			t.Fatalf("line %d: %v", i+1, err)
		}
		got := outcome([]byte(raw))
		if got != want && !*update {
			t.Errorf("line %d: %s\n got %s\nwant %s", i+1, quoted, got, want)
		}
		out.WriteString(quoted + "\t" + got + "\n")
	}
	if *update {
		if err := os.WriteFile(file, []byte(out.String()), 0o644); err != nil {
			t.Fatal(err)
		}
	}
}

func outcome(raw []byte) string {
	m, err := Decode(raw, Limits{})
	if err != nil {
		return fmt.Sprintf("%d %v", Code(err), err)
	}
	kind := "response"
	if m.IsRequest() {
		kind = "request"
	} else if m.IsNotification() {
		kind = "notification"
	}
	s := fmt.Sprintf("%s id=%s method=%q params=%s result=%s error=%s", kind,
		m.ID().Raw(), m.Method(), m.Params().Raw(), m.Result().Raw(), m.Error().Raw())
	if code, ok := m.ErrorCode(); ok {
		s += fmt.Sprintf(" code=%d", code)
	}
	return s
}

// Each sentinel, and where the error is.
func TestDecodeErrors(t *testing.T) {
	envelope := func(params string) string {
		return `{"jsonrpc":"2.0","id":1,"method":"m","params":` + params + `}`
	}
	const at = 46 // where params begin
	nested := func(n int) string { return strings.Repeat("[", n) + strings.Repeat("]", n) }
	for _, c := range []struct {
		name, raw string
		lim       Limits
		want      error
		offset    int
		pointer   string
	}{
		{name: "good", raw: envelope(`{}`)},
		{name: "batch", raw: ` [{"jsonrpc":"2.0"}]`, want: ErrBatch, offset: 1},
		{name: "bom", raw: "\ufeff" + envelope(`{}`), want: ErrSyntax},
		{name: "trailing", raw: envelope(`{}`) + " {}", want: ErrSyntax, offset: at + 4},
		{name: "trailing nul", raw: envelope(`{}`) + "\x00", want: ErrSyntax, offset: at + 3},
		{name: "duplicate", raw: envelope(`{"a":1,"a":2}`), want: ErrDuplicateName, offset: at + 7, pointer: "/params/a"},
		{name: "duplicate escaped", raw: envelope(`{"a":1,"\u0061":2}`), want: ErrDuplicateName, offset: at + 7, pointer: "/params/a"},
		{name: "duplicate pair", raw: envelope(`{"😀":1,"\ud83d\ude00":2}`), want: ErrDuplicateName, offset: at + 10, pointer: "/params/😀"},
		{name: "duplicate empty", raw: envelope(`{"":1,"":2}`), want: ErrDuplicateName, offset: at + 6, pointer: "/params/"},
		{name: "duplicate deep", raw: envelope(`[0,{"x~/":[{"b":{},"b":[]}]}]`), want: ErrDuplicateName, offset: at + 19, pointer: "/params/1/x~0~1/0/b"},
		{name: "duplicate in envelope", raw: `{"jsonrpc":"2.0","method":"a","method":"b"}`, want: ErrDuplicateName, offset: 30, pointer: "/method"},
		{name: "same name elsewhere", raw: envelope(`{"a":{"a":{"a":[{"a":1},{"a":2}]}},"b":{"a":1}}`)},
		{name: "case", raw: envelope(`{"path":1,"Path":2}`), want: ErrCaseVariant, offset: at + 10, pointer: "/params/Path"},
		{name: "case escaped", raw: envelope(`{"path":1,"\u0050ath":2}`), want: ErrCaseVariant, offset: at + 10, pointer: "/params/Path"},
		{name: "case kelvin", raw: envelope(`{"key":1,"\u212aey":2}`), want: ErrCaseVariant, offset: at + 9, pointer: "/params/\u212aey"},
		{name: "case long s", raw: envelope(`{"ſum":1,"sum":2}`), want: ErrCaseVariant, offset: at + 10, pointer: "/params/sum"},
		{name: "case greek", raw: envelope(`{"ς":1,"Σ":2}`), want: ErrCaseVariant, offset: at + 8, pointer: "/params/Σ"},
		{name: "no case: full folding", raw: envelope(`{"ß":1,"ss":2,"SS ":3}`)},
		{name: "no case: dotless", raw: envelope(`{"ı":1,"i":2,"İ":3}`)},
		{name: "case allowed", raw: envelope(`{"path":1,"Path":2}`), lim: Limits{AllowCaseVariants: true}},
		{name: "duplicate, case allowed", raw: envelope(`{"path":1,"\u0070ath":2}`), lim: Limits{AllowCaseVariants: true}, want: ErrDuplicateName, offset: at + 10, pointer: "/params/path"},
		{name: "variant of envelope", raw: `{"jsonrpc":"2.0","id":1,"method":"m","Params":{}}`, want: ErrCaseVariant, offset: 37, pointer: "/Params"},
		{name: "variant of envelope, kelvin-like", raw: `{"jſonrpc":"2.0","id":1,"method":"m"}`, want: ErrCaseVariant, offset: 1, pointer: "/jſonrpc"},
		{name: "variant of envelope allowed", raw: `{"jsonrpc":"2.0","id":1,"method":"m","Params":{}}`, lim: Limits{AllowCaseVariants: true}},
		{name: "utf8", raw: envelope("{\"a\":\"\xff\"}"), want: ErrUTF8, offset: at + 6, pointer: "/params/a"},
		{name: "utf8 in name", raw: envelope("{\"a\":1,\"\xc3\":2}"), want: ErrUTF8, offset: at + 8, pointer: "/params"},
		{name: "utf8 surrogate", raw: envelope("[\"\xed\xa0\x80\"]"), want: ErrUTF8, offset: at + 2, pointer: "/params/0"},
		{name: "utf8 overlong", raw: envelope("[\"\xc0\xaf\"]"), want: ErrUTF8, offset: at + 2, pointer: "/params/0"},
		{name: "utf8 beyond", raw: envelope("[\"\xf4\x90\x80\x80\"]"), want: ErrUTF8, offset: at + 2, pointer: "/params/0"},
		{name: "surrogate high", raw: envelope(`["\ud800"]`), want: ErrUTF8, offset: at + 2, pointer: "/params/0"},
		{name: "surrogate low", raw: envelope(`["\uDC00"]`), want: ErrUTF8, offset: at + 2, pointer: "/params/0"},
		{name: "surrogate high high", raw: envelope(`["\ud800\ud800"]`), want: ErrUTF8, offset: at + 2, pointer: "/params/0"},
		{name: "surrogate cut", raw: envelope(`["\ud800\udc0"]`), want: ErrUTF8, offset: at + 2, pointer: "/params/0"},
		{name: "replacement character itself", raw: envelope(`["\ufffd","` + "\ufffd" + `","\u0000"]`)},
		{name: "depth ok", raw: envelope(nested(63))},
		{name: "depth", raw: envelope(nested(64)), want: ErrDepth, offset: at + 63, pointer: "/params" + strings.Repeat("/0", 63)},
		{name: "depth given", raw: envelope(`{"a":{}}`), lim: Limits{Depth: 2}, want: ErrDepth, offset: at + 5, pointer: "/params/a"},
		{name: "size ok", raw: envelope(`{}`), lim: Limits{Bytes: at + 3}},
		{name: "size", raw: envelope(`{}`), lim: Limits{Bytes: at + 2}, want: ErrTooLarge, offset: at + 2},
		{name: "huge numbers", raw: `{"jsonrpc":"2.0","id":1E400,"method":"m","params":[1e400,-0,9007199254740993]}`},
	} {
		t.Run(c.name, func(t *testing.T) {
			_, err := Decode([]byte(c.raw), c.lim)
			if !errors.Is(err, c.want) {
				t.Fatalf("got %v, want %v", err, c.want)
			}
			if c.want == nil {
				return
			}
			var e *Error
			if !errors.As(err, &e) || e.Offset != c.offset || e.Pointer != c.pointer {
				t.Errorf("at %d %q, want %d %q", e.Offset, e.Pointer, c.offset, c.pointer)
			}
		})
	}
}

func TestErrorsStayShort(t *testing.T) {
	long := strings.Repeat("é", 100_000)
	for _, raw := range []string{
		`{"` + long + `":{"` + long + `":x`,
		`{"` + long + `":1,"` + long + `":1}`,
		strings.Repeat(`[{"a":`, 30) + "x",
	} {
		_, err := Parse([]byte(raw), Limits{})
		if err == nil || len(err.Error()) > 1000 {
			t.Errorf("error of %d bytes", len(err.Error()))
		}
	}
}

// The lists are in the manner of well-known conformance suites: what RFC 8259
// makes valid, what it does not, and what it leaves open and we refuse.
var goodTexts = []string{
	`{}`, `[]`, `""`, `0`, `-0`, `null`, `true`, `false`, ` [] `, "\t[\r\n]\n", `[[],[[]],{}]`,
	`[1,-1,0.5,-0.0,1e1,1E1,1e+1,1e-1,10.01E-05,1E400,-1E400,1e-400,123456789012345678901234567890]`,
	`[0e1,0E+1,0.0000000000000000000000000000000000000000000000000001]`,
	`["\"\\\/\b\f\n\r\t","\u0000","\u001F","\u00e9","\uD834\uDd1e","\ud83d\ude39","\uffff","\ufffe","\u2028"]`,
	"[\"\x7f\",\"é\",\"€\",\"𝄞\",\"\ufeff\",\"\u2028\u2029\",\"\U0010ffff\",\"\ufdd0\"]",
	`{"":0}`, `{"a\u0000b":1,"a":2}`, `{"a":[],"b":{"a":[]}}`, `{"\\":1,"\\\\":2,"\"":3}`,
	`["aaaaaaa\"","aaaaaaaa\"","aaaaaaaaa\\","\\\\\\\\","12345678é12345678"]`,
	"{\n  \"a\" : 1 ,\r\n\t\"b\":[ 1 , 2 ] }",
}

var badTexts = []string{
	``, ` `, `nul`, `nulll`, `True`, `NaN`, `Infinity`, `-Infinity`, `undefined`, `tru`, `falsé`,
	`-`, `+1`, `01`, `-01`, `1.`, `.5`, `-.5`, `1e`, `1e+`, `1E-`, `1.e1`, `0x1`, `1_000`, `1,2`, `--1`, `1a`, `0.1.2`, `1 2`, `00`, `２`,
	`"`, `"a`, `"\`, `"\"`, `"\u`, `"\u00`, `"\u00"`, `"\u00g0"`, `"\x41"`, `"\'"`, `"\U0041"`, `'a'`, `"a"b`, `"a""b"`, `"\ud800\`, `"\ud800\u`, `"\ud834\udd"`,
	"\"\x00\"", "\"\n\"", "\"\t\"", "\"1234567\x1f89\"", "\"\x1f\"",
	"\"\x80\"", "\"\xc3\"", "\"\xc3(\"", "\"\xe2\x82\"", "\"\xf0\x28\x8c\xbc\"", "\"\xfe\"", "\"\xf8\x88\x80\x80\x80\"", "\"\xed\xb0\x80\"", "\"\xc1\x81\"",
	`"\ud800"`, `"\udc00"`, `"\udc00\ud800"`, `"\ud800x"`, `"\ud800\n"`, `"\ud800\u0041"`,
	`[`, `]`, `[1`, `[1,`, `[1,]`, `[,1]`, `[,]`, `[1,,2]`, `[1 2]`, `[1}`, `[1:2]`, `[]]`, `[[]`, `[1];`, `[//c
1]`, `[/*c*/1]`, `[#1]`,
	`{`, `}`, `{"a"`, `{"a":`, `{"a":1`, `{"a":1,`, `{"a":1,}`, `{,}`, `{"a"}`, `{"a":}`, `{:1}`, `{a:1}`, `{'a':1}`, `{1:1}`, `{null:1}`, `{"a":1]`, `{"a" 1}`, `{"a"::1}`, `{"a",1}`, `{"a":1 "b":2}`, `{"a":1;"b":2}`, `{"a":1}}`, `{"a":1,,"b":2}`, `{[]:1}`,
	"\ufeff{}", "\xff\xfe{\x00}\x00", "{}\x00", "\x00{}", "[\x0b]", "[\x0c]", "[\u00a0]", "[\u2028]", "[1\x00]", "{}\xff", "\xef\xbb{}", "{\"a\":1}\ufeff",
	`{"a":1,"a":1}`, `{"a":1,"\u0061":1}`, `{"x":{"a":1,"b":2,"a":3}}`, `[{"":0,"":0}]`,
	`{"a":1,"A":1}`, `{"é":1,"É":1}`, `{"k":1,"K":1}`, `{"ǆ":1,"ǅ":1}`,
}

func TestTexts(t *testing.T) {
	for _, s := range goodTexts {
		if err := agree([]byte(s), Limits{}); err != nil {
			t.Error(err)
		}
		if _, err := Parse([]byte(s), Limits{}); err != nil {
			t.Errorf("%q: %v", s, err)
		}
		if _, err := Decode([]byte(`{"jsonrpc":"2.0","id":"x","result":`+s+`}`), Limits{}); err != nil {
			t.Errorf("%q as a result: %v", s, err)
		}
	}
	for _, s := range badTexts {
		if err := agree([]byte(s), Limits{}); err != nil {
			t.Error(err)
		}
		if _, err := Parse([]byte(s), Limits{}); err == nil {
			t.Errorf("%q: accepted", s)
		}
		if _, err := Decode([]byte(`{"jsonrpc":"2.0","id":"x","result":`+s+`}`), Limits{}); err == nil {
			t.Errorf("%q as a result: accepted", s)
		}
	}
	// Every beginning of a good text is a bad one, unless it is a number.
	for n := range call1K {
		if err := agree(call1K[:n], Limits{}); err != nil {
			t.Error(err)
		}
		want := ErrSyntax
		if !utf8.Valid(call1K[:n]) {
			want = ErrUTF8 // cut within a rune
		}
		if _, err := Decode(call1K[:n], Limits{}); !errors.Is(err, want) {
			t.Errorf("first %d bytes: %v", n, err)
		}
	}
}

// Every single byte, inside a string and outside, at every place of a word of
// the quick loop.
func TestEveryByte(t *testing.T) {
	for c := range 256 {
		for pad := range 10 {
			for _, s := range []string{
				`["` + strings.Repeat("x", pad) + string([]byte{byte(c)}) + `yyyyyyyyy"]`,
				`["` + strings.Repeat("x", pad) + `\` + string([]byte{byte(c)}) + `000 "]`,
				`[1` + string([]byte{byte(c)}) + `]`,
			} {
				if err := agree([]byte(s), Limits{}); err != nil {
					t.Error(err)
				}
			}
		}
	}
}

func TestValue(t *testing.T) {
	raw := []byte(`{ "jsonrpc" : "2.0", "id" : 9007199254740993, "method" : "tools\/call", "params" :
		{ "name" : "a\"b\\", "n\u0061me2" : [ 1, "two", null, true, {"k":[]} ], "": -7, "f": 1.0, "big": 123456789012345678901234567890,
		  "esc\\": {"\"": "😀\ud83d\ude00"}, "ok" : false } } `)
	m, err := Decode(raw, Limits{})
	if err != nil {
		t.Fatal(err)
	}
	if !m.IsRequest() || m.IsNotification() || m.IsResponse() {
		t.Error("not a request")
	}
	if m.Method() != "tools/call" || string(m.ID().Raw()) != "9007199254740993" {
		t.Errorf("method %q id %s", m.Method(), m.ID().Raw())
	}
	if !bytes.Equal(m.Raw(), raw) || string(m.Root().Raw()) != strings.TrimSpace(string(raw)) {
		t.Error("Raw or Root differ")
	}
	p := m.Params()
	for _, c := range []struct {
		path []string
		raw  string
		kind Kind
	}{
		{[]string{"name"}, `"a\"b\\"`, String},
		{[]string{"name2"}, `[ 1, "two", null, true, {"k":[]} ]`, Array},
		{[]string{""}, `-7`, Number},
		{[]string{"f"}, `1.0`, Number},
		{[]string{`esc\`, `"`}, `"😀\ud83d\ude00"`, String},
		{[]string{"ok"}, `false`, Bool},
		{[]string{"Name"}, "", None},
		{[]string{"name", "x"}, "", None},
		{[]string{"name2", "0"}, "", None},
		{[]string{"esc\\", "x", "y"}, "", None},
	} {
		v := p.Get(c.path...)
		if string(v.Raw()) != c.raw || v.Kind() != c.kind || v.Exists() != (c.kind != None) {
			t.Errorf("%q: %s %q", c.path, v.Kind(), v.Raw())
		}
		if v.Exists() && string(raw[v.Offset():v.Offset()+len(c.raw)]) != c.raw {
			t.Errorf("%q: offset %d", c.path, v.Offset())
		}
	}
	if s, ok := p.Get(`esc\`, `"`).Text(); !ok || s != "😀😀" {
		t.Errorf("text %q", s)
	}
	for path, want := range map[string]int64{"": -7} {
		if i, ok := p.Get(path).Int(); !ok || i != want {
			t.Errorf("%q: %d %v", path, i, ok)
		}
	}
	for _, name := range []string{"f", "big", "ok", "name", "missing"} {
		if _, ok := p.Get(name).Int(); ok {
			t.Errorf("%q is an int", name)
		}
	}
	if b, ok := p.Get("ok").Bool(); b || !ok {
		t.Error("bool")
	}
	var names, elements []string
	for n := range p.Members() {
		names = append(names, n)
	}
	for e := range p.Get("name2").Elements() {
		elements = append(elements, e.Kind().String()+" "+string(e.Raw()))
	}
	if got, want := fmt.Sprintf("%q", names), `["name" "name2" "" "f" "big" "esc\\" "ok"]`; got != want {
		t.Errorf("got %s want %s", got, want)
	}
	if got, want := strings.Join(elements, "|"), `number 1|string "two"|null null|bool true|object {"k":[]}`; got != want {
		t.Errorf("got %s want %s", got, want)
	}
	for range p.Members() { // leaving early must be possible
		break
	}
	for e := range p.Get("name2").Elements() {
		if string(e.Raw()) != "1" {
			t.Error("went on")
		}
		break
	}
	for range p.Elements() {
		t.Error("an object has elements")
	}

	// The zero Value, and appending to what Raw returns.
	var zero Value
	if zero.Exists() || zero.Raw() != nil || zero.Get("a").Exists() || zero.Kind() != None || zero.Kind().String() != "none" {
		t.Error("zero Value")
	}
	for range zero.Members() {
		t.Error("member of nothing")
	}
	if _, ok := zero.Text(); ok {
		t.Error("text of nothing")
	}
	before := bytes.Clone(raw)
	_ = append(m.ID().Raw(), "xxxx"...)
	_ = append(m.Raw()[:3], p.Raw()...)[0]
	_ = append(m.Raw(), 'x')
	copy(raw, before)
}

func TestGetDoesNotAllocate(t *testing.T) {
	m, err := Decode(call1K, Limits{})
	if err != nil {
		t.Fatal(err)
	}
	if n := testing.AllocsPerRun(100, func() {
		if !m.Params().Get("_meta", "io.modelcontextprotocol/clientInfo", "name").Exists() {
			t.Error("not found")
		}
		m.Params().Get("missing")
		m.ID().Int()
	}); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

// Large texts, each of which takes minutes if anything in the way is quadratic.
// There is no clock in it: the test binary's own time limit is the guard.
// TestManyNamesAreHashed counts.
func TestLinear(t *testing.T) {
	size := 1 << 20
	if raceEnabled {
		size = 1 << 16
	}
	fill := func(head string, unit func(i int) string, tail string) []byte {
		var b bytes.Buffer
		b.WriteString(head)
		for i := 0; ; i++ {
			u := unit(i)
			if b.Len()+len(u)+len(tail) > size {
				break
			}
			b.WriteString(u)
		}
		b.WriteString(tail)
		return b.Bytes()
	}
	same := func(s string) func(int) string { return func(int) string { return s } }
	const head = `{"jsonrpc":"2.0","id":1,"result":`
	for name, raw := range map[string][]byte{
		"backslashes":   fill(head+`"`, same(`\\`), `"}`),
		"quotes":        fill(head+`"`, same(`\"`), `"}`),
		"runes":         fill(head+`"`, same(`€`), `"}`),
		"digits":        fill(head, same(`1`), `}`),
		"spaces":        fill(head, same(" \n"), `0}`),
		"elements":      fill(head+`[0`, same(`,0`), `]}`),
		"objects":       fill(head+`[0`, same(`,{"a":{}}`), `]}`),
		"names":         fill(head+`{"":0`, func(i int) string { return fmt.Sprintf(`,"%x":0`, i) }, `}}`),
		"names escaped": fill(head+`{"":0`, func(i int) string { return fmt.Sprintf(`,"\u0061%x":0`, i) }, `}}`),
		"names folded":  fill(head+`{"":0`, func(i int) string { return fmt.Sprintf(`,"ſ%x":0`, i) }, `}}`),
		"long names": fill(head+`{"":0`, func(i int) string {
			return fmt.Sprintf(`,"%s%d":0`, strings.Repeat("long", 50), i)
		}, `}}`),
		"deep": []byte(head + strings.Repeat("[", size/2) + strings.Repeat("]", size/2) + `}`),
		"middling objects": fill(head+`[0`, func(i int) string {
			return `,{"a":0,"b":0,"c":0,"d":0,"e":0,"f":0,"g":0,"h":0,"i":0,"j":0,"k":0,"l":0,"m":0,"n":0,"o":0,"p":0,"q":0,"r":0}`
		}, `]}`),
	} {
		t.Run(name, func(t *testing.T) {
			m, err := Decode(raw, Limits{Depth: size})
			if err != nil {
				t.Fatal(err)
			}
			r := m.Result()
			if r.Plain() == nil || r.Size(len(raw)) == 0 {
				t.Error("not read")
			}
			n := 0
			for range r.Members() {
				n++
			}
			for range r.Elements() {
				n++
			}
			p := m.Patch().Replace(m.ID(), []byte(`"x"`))
			switch r.Kind() {
			case Array:
				p.Filter(r, func(i int, _ Value) bool { return i%2 == 0 })
			case Object:
				for _, v := range r.Members() {
					p.Replace(v, []byte("1"))
				}
				p.Set(r, "new", []byte("1")).Remove(r, "")
			}
			if p.Bytes() == nil {
				t.Error(p.Err())
			}
		})
	}
}

// Beyond a few names, none is compared with all the others: each is found
// under its own hash.
func TestManyNamesAreHashed(t *testing.T) {
	const n = 10_000
	var b bytes.Buffer
	b.WriteString(`{"0":0`)
	for i := 1; i < n; i++ {
		fmt.Fprintf(&b, `,"%d":{"0":0}`, i)
	}
	b.WriteString(`}`)
	s := scanner{raw: b.Bytes(), maxDepth: 3, fold: true}
	if _, err := s.text(); err != nil {
		t.Fatal(err)
	}
	if len(s.many) != n {
		t.Errorf("%d of %d names in the map", len(s.many), n)
	}
	for _, last := range []string{"9999", "0", "5000"} { // also among many
		raw := append(bytes.Clone(b.Bytes()[:b.Len()-1]), `,"`+last+`":0}`...)
		if _, err := Parse(raw, Limits{}); !errors.Is(err, ErrDuplicateName) {
			t.Errorf("%s: %v", last, err)
		}
	}
}

// The hash of a name and the comparison of names agree on what case is.
func TestFold(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		a := rapid.StringOf(rapid.SampledFrom([]rune("aAkKKsSſßéÉσςΣǆǅǄıİiI_"))).Draw(t, "a")
		b := rapid.StringOf(rapid.SampledFrom([]rune("aAkKKsSſßéÉσςΣǆǅǄıİiI_"))).Draw(t, "b")
		if rapid.Bool().Draw(t, "related") {
			b = strings.ToUpper(a)
		}
		var x, y []byte
		same := bytes.Equal(fold(&x, []byte(a)), fold(&y, []byte(b)))
		if same != strings.EqualFold(a, b) {
			t.Fatalf("%q %q: %v", a, b, same)
		}
	})
}

// Any text that can be written in any odd way comes back as it was meant.
func TestDecodeProperty(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		raw, want := drawText(t)
		v, err := Parse(raw, Limits{})
		if err != nil {
			t.Fatalf("%s: %v", raw, err)
		}
		if got := canon(v); got != want {
			t.Fatalf("%s\n got %s\nwant %s", raw, got, want)
		}
	})
}

// Plain is what encoding/json makes of the same text.
func TestPlain(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		raw, _ := drawText(t)
		v, err := Parse(raw, Limits{})
		if err != nil {
			t.Fatalf("%s: %v", raw, err)
		}
		var want any
		d := json.NewDecoder(bytes.NewReader(raw))
		d.UseNumber()
		if err := d.Decode(&want); err != nil {
			t.Fatalf("%s: %v", raw, err)
		}
		if got := v.Plain(); !reflect.DeepEqual(got, want) {
			t.Fatalf("%s\n got %#v\nwant %#v", raw, got, want)
		}
	})
	if v := (Value{}).Plain(); v != nil {
		t.Error(v)
	}
}

// drawText draws a value of random spelling and its canonical form.
func drawText(t *rapid.T) (raw []byte, canonical string) {
	space := func() string {
		return rapid.SampledFrom([]string{"", "", "", " ", "\n", "\r\n\t"}).Draw(t, "space")
	}
	quote := func(s string) string {
		var b strings.Builder
		b.WriteByte('"')
		for _, r := range s {
			switch how := rapid.IntRange(0, 3).Draw(t, "how"); {
			case how == 0 && r > 0xffff:
				r -= 0x10000
				fmt.Fprintf(&b, `\u%04x\u%04X`, 0xd800+r>>10, 0xdc00+r&0x3ff)
			case how == 0:
				fmt.Fprintf(&b, `\u%04x`, r)
			case r < 0x20 || r == '"' || r == '\\':
				q := strconv.Quote(string(r))
				if strings.Contains(q, "x") || strings.ContainsAny(q[2:3], "av") {
					q = fmt.Sprintf(`"\u%04X"`, r)
				}
				b.WriteString(q[1 : len(q)-1])
			case r == '/' && how == 1:
				b.WriteString(`\/`)
			default:
				b.WriteRune(r)
			}
		}
		b.WriteByte('"')
		return b.String()
	}
	text := rapid.StringOf(rapid.RuneFrom([]rune("abcxyz /\"\\\x00\x1f\n\té€😀\ufffd\u2028")))
	var value func(depth int) (string, string)
	value = func(depth int) (string, string) {
		kind := rapid.IntRange(0, 6).Draw(t, "kind")
		if depth > 4 {
			kind = min(kind, 4)
		}
		switch kind {
		case 0, 1:
			s := text.Draw(t, "text")
			return quote(s), strconv.Quote(s)
		case 2:
			n := rapid.StringMatching(`-?(0|[1-9][0-9]{0,20})(\.[0-9]{1,5})?([eE][+-]?[0-9]{1,4})?`).Draw(t, "number")
			return n, n
		case 3, 4:
			s := rapid.SampledFrom([]string{"null", "true", "false"}).Draw(t, "literal")
			return s, s
		case 5:
			r, c := "["+space(), "["
			for i := range rapid.IntRange(0, 4).Draw(t, "n") {
				if i > 0 {
					r += "," + space()
				}
				vr, vc := value(depth + 1)
				r += vr + space()
				c += vc + ";"
			}
			return r + "]", c + "]"
		default:
			r, c := "{"+space(), "{"
			names := rapid.SliceOfNDistinct(text, 0, 20, strings.ToUpper).Draw(t, "names")
			for i, n := range names {
				if i > 0 {
					r += "," + space()
				}
				vr, vc := "0", "0"
				if i < 4 {
					vr, vc = value(depth + 1)
				}
				r += quote(n) + space() + ":" + space() + vr + space()
				c += strconv.Quote(n) + ":" + vc + ";"
			}
			return r + "}", c + "}"
		}
	}
	r, c := value(0)
	return []byte(space() + r + space()), c
}

// canon writes a value so that its spelling no longer matters.
func canon(v Value) string {
	var b strings.Builder
	var write func(v Value)
	write = func(v Value) {
		switch v.Kind() {
		case Object:
			b.WriteByte('{')
			for n, m := range v.Members() {
				b.WriteString(strconv.Quote(n) + ":")
				write(m)
				b.WriteByte(';')
			}
			b.WriteByte('}')
		case Array:
			b.WriteByte('[')
			for e := range v.Elements() {
				write(e)
				b.WriteByte(';')
			}
			b.WriteByte(']')
		case String:
			s, _ := v.Text()
			b.WriteString(strconv.Quote(s))
		default:
			b.Write(v.Raw())
		}
	}
	write(v)
	return b.String()
}

func TestResponses(t *testing.T) {
	type data struct {
		Supported []string `json:"supported"`
	}
	for _, c := range []struct{ got, want string }{
		{string(Quote("a\"\n\x00é\xff</script>")), `"a\"\n\u0000é` + "\ufffd" + `</script>"`},
		{string(ErrorResponse(nil, CodeParseError, "no", nil)), `{"jsonrpc":"2.0","id":null,"error":{"code":-32700,"message":"no"}}`},
		{string(ErrorResponse([]byte(`9007199254740993`), CodeUnsupportedProtocolVersion, `un"supported`, data{[]string{"2026-07-28"}})),
			`{"jsonrpc":"2.0","id":9007199254740993,"error":{"code":-32022,"message":"un\"supported","data":{"supported":["2026-07-28"]}}}`},
		{string(ErrorResponse([]byte(`"a"`), 1, "", map[string]any{"z": 1, "a": []int{}, "m": nil})),
			`{"jsonrpc":"2.0","id":"a","error":{"code":1,"message":"","data":{"a":[],"m":null,"z":1}}}`},
		{string(ErrorResponse([]byte(`1`), 1, "x", []byte(`{"a": 1E400}`))), `{"jsonrpc":"2.0","id":1,"error":{"code":1,"message":"x","data":{"a": 1E400}}}`},
		{string(ErrorResponse([]byte(`1`), 1, "x", jsontext.Value(`[ ]`))), `{"jsonrpc":"2.0","id":1,"error":{"code":1,"message":"x","data":[ ]}}`},
		{string(ErrorResponse([]byte(`1`), 1, "x", make(chan int))), `{"jsonrpc":"2.0","id":1,"error":{"code":1,"message":"x"}}`},
		{string(ResultResponse([]byte(`"x"`), []byte(`{"a" : 1}`))), `{"jsonrpc":"2.0","id":"x","result":{"a" : 1}}`},
		{string(ResultResponse([]byte(`0`), nil)), `{"jsonrpc":"2.0","id":0,"result":{}}`},
	} {
		if c.got != c.want {
			t.Errorf("got %s\nwant %s", c.got, c.want)
		}
		if _, err := Parse([]byte(c.got), Limits{}); err != nil {
			t.Error(err)
		}
	}
}

func TestCode(t *testing.T) {
	for _, err := range []error{ErrSyntax, ErrUTF8} {
		if Code(&Error{Err: err}) != CodeParseError {
			t.Error(err)
		}
	}
	for _, err := range []error{ErrBatch, ErrDuplicateName, ErrCaseVariant, ErrDepth, ErrTooLarge, ErrNotJSONRPC, errors.New("x")} {
		if Code(err) != CodeInvalidRequest {
			t.Error(err)
		}
	}
}

// agree compares Parse with jsontext and, for case, with a list of all names.
func agree(raw []byte, lim Limits) error {
	lim = lim.withDefaults()
	_, err := Parse(raw, lim)
	valid, unique, depth, variants := reference(raw)
	switch {
	case err == nil && (!valid || !unique || depth > lim.Depth || variants && !lim.AllowCaseVariants):
		return fmt.Errorf("%q: accepted; valid %v, names unique %v, depth %d, case variants %v", raw, valid, unique, depth, variants)
	case err != nil && valid && unique && depth <= lim.Depth && (!variants || lim.AllowCaseVariants) && len(raw) <= lim.Bytes:
		return fmt.Errorf("%q: refused: %w", raw, err)
	case (errors.Is(err, ErrSyntax) || errors.Is(err, ErrUTF8)) && valid:
		return fmt.Errorf("%q: valid, but: %w", raw, err)
	case errors.Is(err, ErrDuplicateName) && unique && valid,
		errors.Is(err, ErrCaseVariant) && !variants && unique && valid,
		errors.Is(err, ErrDepth) && depth <= lim.Depth && valid:
		return fmt.Errorf("%q: wrong cause: %w", raw, err)
	}
	return nil
}

// reference is what jsontext says of a text.
func reference(raw []byte) (valid, unique bool, depth int, variants bool) {
	valid = jsontext.Value(raw).IsValid(jsontext.AllowDuplicateNames(true))
	unique = jsontext.Value(raw).IsValid()
	if !valid {
		return
	}
	d := jsontext.NewDecoder(bytes.NewReader(raw), jsontext.AllowDuplicateNames(true))
	names := [][]string{nil}
	for {
		tok, err := d.ReadToken()
		if err != nil {
			return
		}
		depth = max(depth, d.StackDepth())
		for len(names) <= d.StackDepth() {
			names = append(names, nil)
		}
		if tok.Kind() == '{' {
			names[d.StackDepth()] = nil
		}
		kind, n := d.StackIndex(d.StackDepth())
		if kind == '{' && n%2 == 1 && tok.Kind() == '"' {
			s := tok.String()
			own := names[d.StackDepth()]
			if slices.ContainsFunc(own, func(o string) bool { return o != s && strings.EqualFold(o, s) }) {
				variants = true
			}
			names[d.StackDepth()] = append(own, s)
		}
	}
}
