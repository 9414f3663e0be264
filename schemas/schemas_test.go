package schemas

import (
	"errors"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"
)

// anEvent is an event of the kind whose payload data is, valid but otherwise
// as empty as it can be.
func anEvent(data Payload) Event {
	e := Event{
		Tenant: "acme", Session: "s1", Call: "c1", Root: "c1", Agent: "researcher",
		Time: time.Date(2026, 7, 28, 12, 0, 0, 5000, time.UTC), Data: data,
	}
	if !data.Kind().OfCall() {
		e.Call, e.Root = "", ""
	}
	return e
}

func TestIDs(t *testing.T) {
	tests := []struct {
		data Payload
		want EventID
	}{
		{&Requested{}, "c1/requested"},
		{&Authorized{Decision: Decision{N: 1}}, "c1/decision/1"},
		{&Denied{Decision: Decision{N: 2}}, "c1/decision/2"},
		{&Held{Decision: Decision{N: 1}}, "c1/decision/1"},
		{&Started{Attempt: 3, By: "me"}, "c1/started/3"},
		{&Progressed{Index: 0, By: "me"}, "c1/progressed/0"},
		{&Tasked{Index: 2, By: "me"}, "c1/tasked/2"},
		{&Completed{}, "c1/end"},
		{&Failed{Code: FailUnknown}, "c1/end"},
		{&Cancelled{}, "c1/end"},
		{&Cancel{}, "c1/cancel"},
		{&Late{By: "me"}, "c1/late/me"},
		{&Caused{Call: "c2", Session: "s2"}, "c1/caused/c2"},
		{&Attached{By: "g1", N: 2, Over: true}, "s1/attached/g1/2"},
		{&Routed{To: "b", From: "a", By: "a.1"}, "c1/routed/a.1"},
		{&Routed{To: "a", From: "b", By: "a.1", Back: true}, "c1/back/a.1"},
		{&Opened{}, "s1/opened"},
		{&Closed{}, "s1/closed"},
		{&Connected{By: "n1"}, "s1/connected/n1"},
		{&Asked{ID: "n7"}, "s1/asked/n7"},
		{&Answered{ID: "n7"}, "s1/answered/n7"},
		{&Notified{ID: "n1"}, "s1/notified/n1"},
		{&Erased{ID: "n1"}, "s1/erased/n1"},
	}
	seen := map[Kind]bool{}
	for _, tt := range tests {
		e := anEvent(tt.data)
		if got := e.ID(); got != tt.want {
			t.Errorf("%s: ID %q, want %q", e.Kind(), got, tt.want)
		}
		if again := e.Next(tt.data, []byte("other")).ID(); again != tt.want {
			t.Errorf("%s: done twice it is %q, want %q again", e.Kind(), again, tt.want)
		}
		seen[e.Kind()] = true
	}
	for k := range kinds {
		if !seen[k] {
			t.Errorf("kind %s is not in this test", k)
		}
	}
}

// TestClosedSets reads the source, since a constant that nothing lists is
// invisible to a running program.
func TestClosedSets(t *testing.T) {
	consts, methods := declared(t)
	for _, name := range consts["Kind"] {
		k := Kind(name)
		empty, ok := kinds[k]
		if !ok {
			t.Errorf("kind %q has no payload in kinds", k)
			continue
		}
		if got := empty().Kind(); got != k {
			t.Errorf("the payload of %q says it is %q", k, got)
		}
		if !k.Known() {
			t.Errorf("%q is not Known", k)
		}
	}
	if len(consts["Kind"]) != len(kinds) {
		t.Errorf("%d kinds are declared, kinds lists %d", len(consts["Kind"]), len(kinds))
	}
	var payloads []string
	for _, empty := range kinds {
		payloads = append(payloads, reflect.TypeOf(empty()).Elem().Name())
	}
	slices.Sort(payloads)
	slices.Sort(methods)
	if !slices.Equal(payloads, methods) {
		t.Errorf("types with a Kind method %v, payloads in kinds %v", methods, payloads)
	}
	var failures []string
	for _, f := range Failures() {
		failures = append(failures, string(f))
	}
	if !slices.Equal(failures, consts["Failure"]) {
		t.Errorf("Failures() lists %v, declared are %v", failures, consts["Failure"])
	}
	if Kind("").Known() || Kind("nonsense").Known() {
		t.Error("a kind outside the set is Known")
	}
}

// declared reads the values of the string constants by type, and the types
// whose pointer has a method Kind.
func declared(t *testing.T) (consts map[string][]string, payloads []string) {
	t.Helper()
	consts = map[string][]string{}
	for _, file := range source(t) {
		for _, d := range file.Decls {
			switch d := d.(type) {
			case *ast.GenDecl:
				for _, s := range d.Specs {
					v, ok := s.(*ast.ValueSpec)
					if !ok || d.Tok != token.CONST || v.Type == nil {
						continue
					}
					typ := v.Type.(*ast.Ident).Name
					consts[typ] = append(consts[typ], strings.Trim(v.Values[0].(*ast.BasicLit).Value, `"`))
				}
			case *ast.FuncDecl:
				if d.Recv == nil || d.Name.Name != "Kind" {
					continue
				}
				if star, ok := d.Recv.List[0].Type.(*ast.StarExpr); ok {
					payloads = append(payloads, star.X.(*ast.Ident).Name)
				}
			}
		}
	}
	return consts, payloads
}

// source parses the package without its tests.
func source(t *testing.T) []*ast.File {
	t.Helper()
	fset := token.NewFileSet()
	var files []*ast.File
	for _, name := range []string{"schemas.go", "kind.go", "payload.go", "failure.go", "front.go", "key.go", "json.go"} {
		f, err := parser.ParseFile(fset, name, nil, parser.ParseComments)
		if err != nil {
			t.Fatal(err)
		}
		files = append(files, f)
	}
	return files
}

func TestEndings(t *testing.T) {
	var ends []Kind
	for k := range kinds {
		if k.Ends() {
			ends = append(ends, k)
			if !k.OfCall() || !k.ToEdge() {
				t.Errorf("%s ends a call and must belong to it and reach the edge that waits", k)
			}
		}
	}
	slices.Sort(ends)
	if want := []Kind{KindCancelled, KindCompleted, KindDenied, KindFailed}; !slices.Equal(ends, want) {
		t.Errorf("endings are %v, want %v", ends, want)
	}
}

func TestSessionKey(t *testing.T) {
	if a, b := NewSessionKey("a", "bc", "x"), NewSessionKey("ab", "c", "x"); a == b {
		t.Error("tenant a, agent bc and tenant ab, agent c share a session")
	}
	rapid.Check(t, func(t *rapid.T) {
		part := rapid.StringN(0, 6, -1)
		a := [3]string{part.Draw(t, "tenant"), part.Draw(t, "agent"), part.Draw(t, "name")}
		b := [3]string{part.Draw(t, "tenant"), part.Draw(t, "agent"), part.Draw(t, "name")}
		key := func(p [3]string) SessionKey { return NewSessionKey(Tenant(p[0]), Agent(p[1]), p[2]) }
		if (a == b) != (key(a) == key(b)) {
			t.Fatalf("%q and %q: keys %s and %s", a, b, key(a), key(b))
		}
		if err := CheckToken(string(key(a))); err != nil {
			t.Fatalf("key %s is not a token: %v", key(a), err)
		}
	})
	// Sessions are found again after an update only while this holds.
	if got, want := NewSessionKey("acme", "researcher", "x"), SessionKey("suvm06tq7udsj8afqvgqqf8o6kk"); got != want {
		t.Errorf("the derivation changed: %s, was %s", got, want)
	}
}

func TestCallID(t *testing.T) {
	at := time.UnixMilli(1_785_000_000_000)
	seen := map[CallID]bool{}
	last := CallID("")
	for i := range 1000 {
		id := NewCallID(at.Add(time.Duration(i) * time.Millisecond))
		if err := CheckToken(string(id)); err != nil {
			t.Fatalf("%s is not a token: %v", id, err)
		}
		if seen[id] {
			t.Fatalf("%s was minted twice", id)
		}
		if id <= last {
			t.Fatalf("%s is younger than %s and sorts before it", id, last)
		}
		seen[id], last = true, id
	}
	if a, b := NewCallID(at), NewCallID(at); a == b {
		t.Error("two calls of the same millisecond share an id")
	}
	if a, b := NewReplica(), NewReplica(); a == b || CheckToken(string(a)) != nil {
		t.Errorf("replicas %s and %s", a, b)
	}
}

func TestCheckToken(t *testing.T) {
	for _, s := range []string{"a", "0", "_", "-", "a-b_c9", strings.Repeat("x", 64)} {
		if err := CheckToken(s); err != nil {
			t.Errorf("%q: %v", s, err)
		}
	}
	for _, s := range []string{
		"", strings.Repeat("x", 65), "A", "a.b", "*", ">", "a b", "a\n", "é", "\xff", "a\x00", "a/b",
	} {
		if CheckToken(s) == nil {
			t.Errorf("%q passes for a token", s)
		}
	}
	if err := CheckToken("aéb"); err == nil || !strings.Contains(err.Error(), `'é' at 1`) {
		t.Errorf("the error does not show the character: %v", err)
	}
}

func TestCheck(t *testing.T) {
	tests := []struct {
		name  string
		spoil func(*Event)
	}{
		{"no payload", func(e *Event) { e.Data = nil }},
		{"no tenant", func(e *Event) { e.Tenant = "" }},
		{"tenant with a dot", func(e *Event) { e.Tenant = "a.b" }},
		{"no session", func(e *Event) { e.Session = "" }},
		{"wildcard for a session", func(e *Event) { e.Session = "*" }},
		{"no agent", func(e *Event) { e.Agent = "" }},
		{"no call", func(e *Event) { e.Call = "" }},
		{"call with a slash", func(e *Event) { e.Call = "c1/end" }},
		{"parent with a space", func(e *Event) { e.Parent = "c 0" }},
		{"root in upper case", func(e *Event) { e.Root = "C1" }},
		{"edge with a dot", func(e *Event) { e.Edge = "e.1" }},
		{"id with a line break", func(e *Event) { e.Data = &Late{By: "x\r\nNats-Rollup: all"} }},
		{"id that is not UTF-8", func(e *Event) { e.Data = &Notified{ID: "\xff"} }},
		{"id without end", func(e *Event) { e.Data = &Notified{ID: strings.Repeat("x", 300)} }},
	}
	if err := anEvent(&Requested{}).Check(); err != nil {
		t.Fatal(err)
	}
	if err := anEvent(&Opened{}).Check(); err != nil {
		t.Fatalf("an event of a session has no call: %v", err)
	}
	for _, tt := range tests {
		e := anEvent(&Requested{})
		tt.spoil(&e)
		if err := e.Check(); !errors.Is(err, ErrInvalid) {
			t.Errorf("%s: %v, want ErrInvalid", tt.name, err)
		}
	}
}

func TestNext(t *testing.T) {
	e := anEvent(&Requested{})
	e.Edge, e.Trace, e.Parent, e.Body, e.Seq, e.Stored = "e1", "00-aa-bb-01", "c0", []byte("{}"), 9, time.Now()
	n := e.Next(&Completed{}, []byte("answer"))
	want := e
	want.Data, want.Body = &Completed{}, []byte("answer")
	want.Time, want.Seq, want.Stored = time.Time{}, 0, time.Time{}
	if !reflect.DeepEqual(n, want) {
		t.Errorf("got %+v, want %+v", n, want)
	}
}

func TestMatch(t *testing.T) {
	for _, tt := range []struct {
		pattern, name string
		want          bool
	}{
		{"", "", true},
		{"", "a", false},
		{"*", "", true},
		{"*", "anything/at all", true},
		{"a", "A", false},
		{"a*a", "a", false},
		{"a*a", "aa", true},
		{"*ab", "aab", true},
		{"*ab*", "xxabyy", true},
		{"a*b*c", "a-b-b-c", true},
		{"a*b*c", "a-c-b", false},
		{"a.c", "abc", false},
		{"[a]", "a", false},
		{"?", "a", false},
	} {
		if got := Match(tt.pattern, tt.name); got != tt.want {
			t.Errorf("Match(%q, %q) = %t", tt.pattern, tt.name, got)
		}
	}
}

func TestMatchIsTheRegexp(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		// Few letters, so that many draws match, and one of two bytes.
		pattern := rapid.StringOfN(rapid.RuneFrom([]rune("ab*é")), 0, 8, -1).Draw(t, "pattern")
		name := rapid.StringOfN(rapid.RuneFrom([]rune("ab*é\n")), 0, 12, -1).Draw(t, "name")
		ref := regexp.MustCompile(`(?s)\A` + strings.ReplaceAll(regexp.QuoteMeta(pattern), `\*`, `.*`) + `\z`)
		if got, want := Match(pattern, name), ref.MatchString(name); got != want {
			t.Fatalf("Match(%q, %q) = %t, the regexp says %t", pattern, name, got, want)
		}
	})
}

// TestImports: the vocabulary drags nothing behind it.
func TestImports(t *testing.T) {
	for _, f := range source(t) {
		for _, i := range f.Imports {
			if path := strings.Trim(i.Path.Value, `"`); strings.Contains(strings.Split(path, "/")[0], ".") {
				t.Errorf("imports %s; schemas has the standard library only", path)
			}
		}
	}
}

func ExampleMatch() {
	fmt.Println(Match("files_*", "files_read"), Match("files_*", "mail_send"))
	// Output: true false
}
