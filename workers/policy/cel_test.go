package policy

import (
	"encoding/json"
	"fmt"
	"strings"
	"testing"

	"cel.dev/cel-go/common/types"
	"pgregory.net/rapid"

	"waybill.dev/schemas/jsonrpc"
)

// anyJSON draws a piece of JSON, written in one of the ways that there are.
func anyJSON(depth int) *rapid.Generator[string] {
	return rapid.Custom(func(t *rapid.T) string {
		switch kind := rapid.IntRange(0, 7).Draw(t, "kind"); {
		case kind == 0:
			return rapid.SampledFrom([]string{"null", "true", "false", "0", "-1", "1e400", "9007199254740993", "0.5"}).Draw(t, "scalar")
		case kind < 4 || depth == 0:
			s := rapid.SampledFrom([]string{`""`, `"a"`, `"\n\\\""`, `"\u00e9"`, `"é"`, `"\ud83d\ude00"`, `"😀"`, `"\u0000"`}).Draw(t, "string")
			return s
		case kind < 6:
			return "[" + strings.Join(rapid.SliceOfN(anyJSON(depth-1), 0, 6).Draw(t, "array"), ", ") + "]"
		default:
			var all []string
			for i, v := range rapid.SliceOfN(anyJSON(depth-1), 0, 20).Draw(t, "object") {
				all = append(all, fmt.Sprintf(`"m%d\"" : %s`, i, v))
			}
			return "{" + strings.Join(all, ",") + "}"
		}
	})
}

func argsOf(t interface{ Fatal(...any) }, args string) *Input {
	e := with("transfer", args)
	r := readRequest(toolsCall, e.Body)
	if r.err != nil {
		t.Fatal(args, r.err)
	}
	return &Input{Event: &e, read: r}
}

// sizeOf is what Size counts, going down value by value.
func sizeOf(v jsonrpc.Value) int {
	s, _ := v.Text()
	n := 1 + len(s)
	for e := range v.Elements() {
		n += sizeOf(e)
	}
	for _, e := range v.Members() {
		n += sizeOf(e)
	}
	return n
}

// No piece of JSON has more to loop over than bytes, which is why short arguments
// need not be looked at; and what is counted does not depend on where it stops.
func TestSize(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		text := `{"a":` + anyJSON(3).Draw(t, "args") + `}`
		v := argsOf(t, text).read.args
		all := v.Size(1 << 30)
		if n := sizeOf(v); n != all {
			t.Fatalf("%d, want %d: %s", all, n, text)
		}
		if all > len(v.Raw()) {
			t.Fatalf("%d in %d bytes: %s", all, len(v.Raw()), text)
		}
		enough := rapid.IntRange(0, 50).Draw(t, "enough")
		if n := v.Size(enough); min(n, enough+1) != min(all, enough+1) {
			t.Fatalf("%d where %d are enough, %d in all: %s", n, enough, all, text)
		}
	})
}

// A condition sees the same whether an object is short and looked through each time,
// or long and kept, and as encoding/json sees it.
func TestMembers(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		member := anyJSON(2).Draw(t, "member")
		var values []any
		for _, more := range []int{0, 300} {
			text := `{"x":{"a":` + member + `,"B":1,"pad":"` + strings.Repeat("p", more) + `"}}`
			x, ok := celValue(argsOf(t, text).read.args).(*members).Find(types.String("x"))
			if !ok {
				t.Fatal(text)
			}
			o := x.(*members)
			if _, ok := o.Find(types.String("c")); ok || o.Contains(types.String("c")) != types.False {
				t.Fatal("a member that is not there")
			}
			if v, ok := o.Find(types.String("b")); ok || !types.IsError(v) {
				t.Fatal("B passes for b, or is not seen")
			}
			v, ok := o.Find(types.String("a"))
			again, _ := o.Find(types.String("a"))
			if !ok || types.IsError(v) != types.IsError(again) || !types.IsError(v) && v.Equal(again) != types.True {
				t.Fatalf("%v, then %v: %s", v, again, text)
			}
			values = append(values, v)
			var std struct{ X struct{ A any } }
			if err := json.Unmarshal([]byte(text), &std); err == nil {
				if s, is := std.X.A.(string); is && v.Equal(types.String(s)) != types.True {
					t.Fatalf("%v for %q", v, s)
				}
			}
		}
		if a, b := fmt.Sprintf("%T", values[0]), fmt.Sprintf("%T", values[1]); a != b {
			t.Fatalf("%s when short, %s when long", a, b)
		}
	})
}

// Whether a loop is counted changes how long it may take, not what it says.
func TestCounted(t *testing.T) {
	env, err := environment()
	if err != nil {
		t.Fatal(err)
	}
	list := func(n int) string {
		return `{"l":[` + strings.TrimSuffix(strings.Repeat(`{"q":1},`, n), ",") + `]}`
	}
	for text, most := range map[string]int{
		`args.l.exists(i, i.q > 1)`:                                fewSteps,
		`args.l.all(i, args.l.exists(j, i.q == j.q + 1 || false))`: fewValues,
	} {
		c, err := compileCondition(env, text)
		if err != nil {
			t.Fatal(err)
		}
		if c.few < fewValues || c.few > most {
			t.Errorf("%s is not counted up to %d values", text, c.few)
		}
		for n := range 40 {
			in := argsOf(t, list(n))
			plain, _, err1 := c.program.Eval(in)
			counted, _, err2 := c.counted.Eval(in)
			if err1 != nil || err2 != nil || plain != counted {
				t.Fatalf("%s of %d: %v %v, counted %v %v", text, n, plain, err1, counted, err2)
			}
		}
		in := argsOf(t, list(100_000))
		if word, err := c.eval(in); err == nil {
			t.Errorf("%s of 100,000: %v, want an error", text, word)
		}
		if !in.moreThan(c.few) || argsOf(t, list(10)).moreThan(c.few) {
			t.Errorf("%s is counted up to %d values, and these are told wrong", text, c.few)
		}
	}
}

// What is not counted could not have cost too much: what a condition says of few
// values is the same, counted or not. What a caller can make dear is counted.
func TestCheap(t *testing.T) {
	env, err := environment()
	if err != nil {
		t.Fatal(err)
	}
	x := strings.Repeat
	list := func(n int) string { return "[1" + x(",1", n) + "]" }
	compile := func(text string) *condition {
		c, err := compileCondition(env, text)
		if err != nil {
			t.Fatal(text, err)
		}
		return c
	}
	for _, body := range []string{
		`i == 7`, `i in [1, 2, 3]`, `args.s == args.t`, `args.l == args.m`, `args.o == args.p`, `args.l in [args.l, args.m]`, `size(args.s) == 3`,
		`args.s.startsWith(args.t)`, `args.s.startsWith("` + x("a", 1000) + `")`, `args.s.contains("a")`, `args.s.contains("` + x("a", 150) + `")`,
	} {
		for _, loop := range []string{`args.l.exists(i, %s)`, `args.l.map(i, %s) == args.m`, `args.l.filter(i, !(%s)).size() == 0`, `args.l.exists_one(i, %s && %[1]s)`, `[args.l, args.m].exists(i, %s)`} {
			c := compile(fmt.Sprintf(loop, body))
			for _, part := range [][4]int{{9, 0, 0, 0}, {5, 4, 0, 0}, {3, 3, 3, 0}, {2, 5, 2, 0}, {5, 2, 2, 0}, {5, 0, 0, 4}, {5, 0, 0, 1}} {
				n := func(i int) int { return part[i] * (c.few - 30) / 9 }
				in := argsOf(t, fmt.Sprintf(`{"l":%s,"s":"%s","t":"%s","m":%s,"o":{"a":%[4]s},"p":{"a":[]}}`, list(n(0)), x("a", n(1)), x("a", n(2)), list(n(3)/2)))
				if in.moreThan(c.few) {
					t.Fatalf("%s: more than %d", c.text, c.few)
				}
				plain, _, err1 := c.program.Eval(in)
				counted, _, err2 := c.counted.Eval(in)
				if plain != counted || (err1 == nil) != (err2 == nil) {
					t.Errorf("%s, %v of %d values: %v %v, counted %v %v", c.text, part, c.few, plain, err1, counted, err2)
				}
			}
		}
	}
	for _, body := range []string{
		`args.s.matches(args.t)`, `args.s.contains(args.t)`, `args.s.indexOf(args.t) > 0`, `args.s.replace("", args.t) == ""`, `args.s.split("") == []`,
		`i in args.m`, `args.s + args.s == ""`,
	} {
		if c := compile(`args.l.exists(i, ` + body + `)`); c.few != fewValues {
			t.Errorf("%s is not counted up to %d values", c.text, c.few)
		}
	}
}
