// Package test holds what no single package can test.
package test

import (
	"cmp"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"maps"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// The shape of the program, checked by machine: who may import whom, and what
// no code of ours does. ARCHITECTURE.md says why; each rule says what to do.
//
// To add a rule, add it to archRules and plant a violation of it in
// TestArchCatches, which fails until you do. To make an exception, add it to
// archExceptions with its reason; one that is no longer needed fails too.

const archModule = "waybill.dev"

// archLayout is where Go code may lie: top-level directories. A new one is a
// decision.
var archLayout = []string{"bus", "cmd", "deploy", "edge", "projections", "replay", "schemas", "test", "workers"}

// archOutside says which of our packages may import the modules that only one
// place is to know. The rest is free to all but schemas.
var archOutside = map[string][]string{
	"github.com/nats-io/":    {"bus", "test"},
	"github.com/ClickHouse/": {"projections", "test"},
	"github.com/mark3labs/":  {"test"},
}

// archVocabulary says what schemas and its subpackages may import beside the
// standard library and schemas itself.
var archVocabulary = map[string][]string{
	"schemas":         nil,
	"schemas/jsonrpc": {"github.com/go-json-experiment/"},
	"schemas/sse":     {"github.com/go-json-experiment/"},
}

// archPolicy is what a decision may depend on, beyond its event and its rules:
// nothing. So these imports do not occur where decisions are made.
var archPolicy = []string{
	"context", "crypto/rand", "io", "io/fs", "log", "log/slog", "math/rand", "math/rand/v2", "net", "net/http",
	"os", "os/exec", "path/filepath", "runtime", "sync", "sync/atomic", "syscall", "unsafe",
}

// archAroundPolicy are the files of workers/policy that make no decisions: they
// find out the facts before one, and store it.
var archAroundPolicy = []string{"policy.go", "limits.go", "holds.go"}

// archExceptions: "rule path" → why it is right there.
var archExceptions = map[string]string{}

type archRule struct {
	name  string
	do    string // what to do about a violation
	check func(f *archFile, report func(ast.Node, string))
}

var archRules = []archRule{
	{
		"layout", "move it, or add the directory to the design and to archLayout",
		func(f *archFile, report func(ast.Node, string)) {
			if !slices.Contains(archLayout, f.top()) {
				report(f.Name, fmt.Sprintf("Go code in %s", f.dir()))
			}
		},
	},
	{
		"name", "name the package after what it is for",
		func(f *archFile, report func(ast.Node, string)) {
			for _, n := range append(strings.Split(f.dir(), "/"), strings.TrimSuffix(f.Name.Name, "_test")) {
				switch n {
				case "base", "common", "helper", "helpers", "misc", "shared", "types", "util", "utils":
					report(f.Name, fmt.Sprintf("package %s in %s", f.Name.Name, f.dir()))
					return
				}
			}
		},
	},
	{
		"star", "let both know schemas only, and join them in cmd",
		func(f *archFile, report func(ast.Node, string)) {
			for _, i := range f.Imports {
				if to, ok := ours(i); ok && !archMayImport(f, to) {
					report(i, fmt.Sprintf("%s imports %s", f.component(), to))
				}
			}
		},
	},
	{
		"outside", "hide it behind the package that knows it",
		func(f *archFile, report func(ast.Node, string)) {
			for _, i := range f.Imports {
				for prefix, who := range archOutside {
					if strings.HasPrefix(importPath(i), prefix) && !slices.Contains(who, f.top()) {
						report(i, fmt.Sprintf("%s imports %s; only %s may", f.component(), importPath(i), strings.Join(who, " and ")))
					}
				}
			}
		},
	},
	{
		"vocabulary", "keep the vocabulary free of dependencies; put the code where its library is known",
		func(f *archFile, report func(ast.Node, string)) {
			if f.top() != "schemas" || f.test() {
				return
			}
			for _, i := range f.Imports {
				p := importPath(i)
				free := standard(p) || f.dir() != "schemas" && (p == archModule+"/schemas" || strings.HasPrefix(p, archModule+"/schemas/"))
				if !free && !slices.ContainsFunc(archVocabulary[f.dir()], func(a string) bool { return strings.HasPrefix(p, a) }) {
					report(i, fmt.Sprintf("%s imports %s", f.dir(), p))
				}
			}
		},
	},
	{
		"dot import", "import it by its name; this checker and readers look for names",
		func(f *archFile, report func(ast.Node, string)) {
			for _, i := range f.Imports {
				if i.Name != nil && i.Name.Name == "." {
					report(i, importPath(i)+" is imported into the file's own names")
				}
			}
		},
	},
	{
		"init", "build it where it is used and pass it in; order that matters is a list in cmd",
		func(f *archFile, report func(ast.Node, string)) {
			for _, d := range f.Decls {
				if fn, ok := d.(*ast.FuncDecl); ok && fn.Recv == nil && fn.Name.Name == "init" {
					report(fn, "func init")
				}
			}
		},
	},
	{
		"exit", "return an error; main decides how the process ends",
		func(f *archFile, report func(ast.Node, string)) {
			if f.Name.Name == "main" || f.test() {
				return
			}
			f.calls(func(call *ast.CallExpr, pkg, name string) {
				switch {
				case pkg == "" && name == "panic" && f.aborts(call):
					// net/http's way to break off an answer that has begun.
				case pkg == "" && name == "panic",
					pkg == "os" && name == "Exit",
					pkg == "runtime" && name == "Goexit",
					pkg == "log" && (strings.HasPrefix(name, "Fatal") || strings.HasPrefix(name, "Panic")):
					report(call, strings.TrimPrefix(pkg+"."+name, ".")+" outside main")
				}
			})
		},
	},
	{
		"logger", "take a *slog.Logger as a parameter",
		func(f *archFile, report func(ast.Node, string)) {
			if f.test() {
				return
			}
			for _, d := range f.Decls {
				if g, ok := d.(*ast.GenDecl); ok && g.Tok == token.VAR {
					for _, s := range g.Specs {
						f.names(s, func(n ast.Node, pkg, name string) {
							if (pkg == "log" || pkg == "log/slog") && (name == "Logger" || name == "New" || name == "Default" || name == "With") {
								report(n, "a logger in a package variable")
							}
						})
					}
				}
			}
			f.calls(func(call *ast.CallExpr, pkg, name string) {
				if pkg == "log" && name != "New" || pkg == "log/slog" && slices.Contains([]string{
					"Debug", "DebugContext", "Info", "InfoContext", "Warn", "WarnContext", "Error", "ErrorContext",
					"Log", "LogAttrs", "Default", "SetDefault", "With",
				}, name) {
					report(call, fmt.Sprintf("%s.%s uses the process's logger", path.Base(pkg), name))
				}
			})
		},
	},
	{
		"testing", "put it into a _test.go file, or below test/",
		func(f *archFile, report func(ast.Node, string)) {
			if f.test() {
				return
			}
			for _, i := range f.Imports {
				if p := importPath(i); p == "testing" || strings.HasPrefix(p, "testing/") {
					report(i, "the program imports "+p)
				}
			}
		},
	},
	{
		"skip", "make what the test needs a dependency of `make test`; a skipped test passes for a good one",
		func(f *archFile, report func(ast.Node, string)) {
			if !f.test() {
				return
			}
			ast.Inspect(f.File, func(n ast.Node) bool {
				if call, ok := n.(*ast.CallExpr); ok {
					if sel, ok := call.Fun.(*ast.SelectorExpr); ok {
						switch sel.Sel.Name {
						case "Skip", "Skipf", "SkipNow":
							report(call, sel.Sel.Name)
						}
					}
				}
				return true
			})
			f.calls(func(call *ast.CallExpr, pkg, name string) {
				if pkg == "testing" && name == "Short" {
					report(call, "testing.Short")
				}
			})
		},
	},
	{
		"pure", "pass it in with the event, or do it in policy.go, before the decision: replay must come to the same decision",
		func(f *archFile, report func(ast.Node, string)) {
			// The order of a map is chance too, but it takes types to see
			// what is a map; the property tests of the package look for it.
			if f.component() != "workers/policy" || f.test() || slices.Contains(archAroundPolicy, path.Base(f.path)) {
				return
			}
			for _, i := range f.Imports {
				if slices.Contains(archPolicy, importPath(i)) {
					report(i, "a decision may depend on "+importPath(i))
				}
			}
			f.names(f.File, func(n ast.Node, pkg, name string) {
				if pkg == "time" && slices.Contains([]string{
					"Now", "Since", "Until", "After", "AfterFunc", "Tick", "NewTicker", "NewTimer", "Sleep", "Local",
				}, name) {
					report(n, "a decision may depend on time."+name)
				}
			})
			ast.Inspect(f.File, func(n ast.Node) bool {
				switch n := n.(type) {
				case *ast.GoStmt:
					report(n, "a decision may depend on a goroutine's speed")
				case *ast.SelectStmt:
					report(n, "a decision may depend on which channel is ready")
				}
				return true
			})
		},
	},
}

// archMayImport is the star: everything may know the vocabulary; cmd and test
// know everything; an adapter knows its shell; nothing else knows another.
func archMayImport(f *archFile, to string) bool {
	switch from := f.component(); {
	case component(to) == from:
		return true
	case component(to) == "test":
		return f.test()
	case component(to) == "cmd":
		return from == "test"
	case component(to) == "schemas":
		return true // what schemas itself may import is the rule vocabulary
	case from == "test", from == "cmd":
		return true
	case component(to) == "edge":
		return f.top() == "edge"
	}
	return false
}

// component is the part of the program that a directory belongs to. The parts
// of workers and edge are parts of their own.
func component(dir string) string {
	parts := strings.SplitN(dir, "/", 3)
	if len(parts) > 1 && (parts[0] == "workers" || parts[0] == "edge") {
		return parts[0] + "/" + parts[1]
	}
	return parts[0]
}

// ours is the directory that an import of this module names.
func ours(i *ast.ImportSpec) (string, bool) {
	return strings.CutPrefix(importPath(i), archModule+"/")
}

func importPath(i *ast.ImportSpec) string {
	p, _ := strconv.Unquote(i.Path.Value) // the parser has checked it
	return p
}

func standard(importPath string) bool {
	first, _, _ := strings.Cut(importPath, "/")
	return !strings.Contains(first, ".")
}

// archFile is one source file of the module.
type archFile struct {
	*ast.File
	path string // from the module's root, with slashes
	fset *token.FileSet
}

func (f *archFile) dir() string       { return path.Dir(f.path) }
func (f *archFile) top() string       { return strings.Split(f.path, "/")[0] }
func (f *archFile) component() string { return component(f.dir()) }

// test tells whether the file is no part of the program.
func (f *archFile) test() bool { return strings.HasSuffix(f.path, "_test.go") || f.top() == "test" }

// names visits each name below n that the file takes from a package, with the
// package's path.
func (f *archFile) names(n ast.Node, visit func(n ast.Node, pkg, name string)) {
	ast.Inspect(n, func(n ast.Node) bool {
		if sel, ok := n.(*ast.SelectorExpr); ok {
			if id, ok := sel.X.(*ast.Ident); ok {
				if pkg := f.imported(id.Name); pkg != "" {
					visit(sel, pkg, sel.Sel.Name)
				}
			}
		}
		return true
	})
}

// calls visits each call of a package's function, and of a bare name with ""
// for the package.
func (f *archFile) calls(visit func(call *ast.CallExpr, pkg, name string)) {
	ast.Inspect(f.File, func(n ast.Node) bool {
		call, ok := n.(*ast.CallExpr)
		if !ok {
			return true
		}
		switch fun := call.Fun.(type) {
		case *ast.Ident:
			visit(call, "", fun.Name)
		case *ast.SelectorExpr:
			if id, ok := fun.X.(*ast.Ident); ok {
				if pkg := f.imported(id.Name); pkg != "" {
					visit(call, pkg, fun.Sel.Name)
				}
			}
		}
		return true
	})
}

// aborts tells whether the call's only argument is http.ErrAbortHandler.
func (f *archFile) aborts(call *ast.CallExpr) bool {
	found := false
	if len(call.Args) == 1 {
		f.names(call.Args[0], func(n ast.Node, pkg, name string) {
			found = found || n == call.Args[0] && pkg == "net/http" && name == "ErrAbortHandler"
		})
	}
	return found
}

// imported is the path of the package that the file calls name, or "".
func (f *archFile) imported(name string) string {
	for _, i := range f.Imports {
		p := importPath(i)
		local := path.Base(p)
		if i.Name != nil {
			local = i.Name.Name
		}
		if local == name {
			return p
		}
	}
	return ""
}

// archViolation is one finding.
type archViolation struct {
	path     string
	line     int
	rule, do string
	what     string
}

func (v archViolation) String() string {
	return fmt.Sprintf("%s:%d: %s: %s. %s.", v.path, v.line, v.rule, v.what, strings.ToUpper(v.do[:1])+v.do[1:])
}

// archCheck holds every file against every rule. Exceptions that excuse
// nothing are findings themselves.
func archCheck(files []*archFile, exceptions map[string]string) []archViolation {
	var found []archViolation
	unused := maps.Clone(exceptions)
	for _, f := range files {
		for _, r := range archRules {
			r.check(f, func(n ast.Node, what string) {
				key := r.name + " " + f.path
				if _, ok := exceptions[key]; ok {
					delete(unused, key)
					return
				}
				found = append(found, archViolation{f.path, f.fset.Position(n.Pos()).Line, r.name, r.do, what})
			})
		}
	}
	for key := range unused {
		rule, file, _ := strings.Cut(key, " ")
		found = append(found, archViolation{file, 0, rule, "remove it from archExceptions", "an exception that is no longer needed"})
	}
	slices.SortFunc(found, func(a, b archViolation) int {
		return cmp.Or(cmp.Compare(a.path, b.path), cmp.Compare(a.line, b.line), cmp.Compare(a.rule, b.rule))
	})
	return found
}

func archParse(name string, src any) (*archFile, error) {
	fset := token.NewFileSet()
	file, err := parser.ParseFile(fset, name, src, parser.SkipObjectResolution)
	if err != nil {
		return nil, err
	}
	return &archFile{file, name, fset}, nil
}

// archSources parses the Go files of the module below root, whatever they are
// built for. A directory with a go.mod of its own is another module.
func archSources(root string) ([]*archFile, error) {
	var files []*archFile
	err := filepath.WalkDir(root, func(name string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(root, name)
		if err != nil {
			return err
		}
		rel = filepath.ToSlash(rel)
		if d.IsDir() {
			if rel == "." {
				return nil
			}
			base := d.Name()
			if base[0] == '.' || base[0] == '_' || base == "testdata" || base == "node_modules" || rel == "build" || rel == "bin" {
				return fs.SkipDir
			}
			if _, err := os.Stat(filepath.Join(name, "go.mod")); err == nil {
				return fs.SkipDir
			}
			return nil
		}
		if !strings.HasSuffix(rel, ".go") {
			return nil
		}
		src, err := os.ReadFile(name)
		if err != nil {
			return err
		}
		f, err := archParse(rel, src)
		if err != nil {
			return err
		}
		files = append(files, f)
		return nil
	})
	return files, err
}

func TestArchitecture(t *testing.T) {
	files, err := archSources("..")
	if err != nil {
		t.Fatal(err)
	}
	// What finds no files finds no violations.
	for _, must := range []string{"schemas/schemas.go", "workers/policy/decide.go", "test/arch_test.go"} {
		if !slices.ContainsFunc(files, func(f *archFile) bool { return f.path == must }) {
			t.Errorf("%s was not read", must)
		}
	}
	for _, v := range archCheck(files, archExceptions) {
		t.Error(v)
	}
}

// TestArchCatches plants what the rules are against, so that a rule that no
// longer sees anything is noticed.
func TestArchCatches(t *testing.T) {
	const (
		stdlib = `import ("fmt"; "encoding/json"); var _, _ = fmt.Sprint, json.Valid`
		star   = `import _ "waybill.dev/schemas"; import _ "waybill.dev/schemas/jsonrpc"`
	)
	tests := []struct {
		path, src string
		want      []string // "line rule", in order
	}{
		// What is right.
		{"schemas/a.go", "package schemas\n" + stdlib, nil},
		{"schemas/jsonrpc/a.go", "package jsonrpc\nimport _ \"waybill.dev/schemas\"\nimport _ \"github.com/go-json-experiment/json/jsontext\"", nil},
		{"schemas/a_test.go", "package schemas\nimport _ \"pgregory.net/rapid\"\nimport _ \"testing\"\nfunc f() { panic(1) }", nil},
		{"workers/policy/a.go", "package policy\n" + star, nil},
		{"workers/policy/policy.go", "package policy\nimport (\"time\"; \"log/slog\"; \"context\")\nvar _ = time.Now\nfunc f(context.Context, *slog.Logger) {}", nil},
		{"edge/mcp/a.go", "package mcp\n" + star + "\nimport _ \"waybill.dev/edge\"", nil},
		{"edge/a_test.go", "package edge\nimport _ \"waybill.dev/test/peers\"", nil},
		{"bus/a.go", "package bus\nimport _ \"github.com/nats-io/nats.go\"\nimport _ \"waybill.dev/bus/embed\"", nil},
		{"projections/a.go", "package projections\nimport _ \"github.com/ClickHouse/clickhouse-go/v2\"", nil},
		{"cmd/waybill/main.go", "package main\nimport \"os\"\nimport _ \"waybill.dev/bus\"\nimport _ \"waybill.dev/workers/policy\"\nimport _ \"waybill.dev/cmd/waybill/cli\"\nfunc main() { os.Exit(1) }", nil},
		{"test/a.go", "package test\nimport \"testing\"\nimport _ \"waybill.dev/cmd/waybill/cli\"\nimport _ \"github.com/nats-io/nats.go\"\nfunc F(t *testing.T) { panic(1) }", nil},
		{"replay/a.go", "package replay\ntype t struct{}\nfunc (t) init() {}\nfunc (t) Exit() {}\nfunc f(os t) { os.Exit() }", nil},

		{"edge/a.go", "package edge\nimport \"net/http\"\nfunc f() { panic(http.ErrAbortHandler) }", nil},

		{"tools/a.go", "package tools", []string{"1 layout"}},
		{"a.go", "package waybill", []string{"1 layout"}},
		{"workers/util/a.go", "package util", []string{"1 name"}},
		{"bus/types/a.go", "package kinds", []string{"1 name"}},
		{"bus/a.go", "// c\npackage common", []string{"2 name"}},

		{"workers/policy/a.go", "package policy\nimport _ \"waybill.dev/bus\"", []string{"2 star"}},
		{"workers/policy/a_test.go", "package policy_test\nimport _ \"waybill.dev/bus\"", []string{"2 star"}},
		{"workers/policy/a.go", "package policy\n\nimport _ \"waybill.dev/workers/dispatch\"", []string{"3 star"}},
		{"workers/dispatch/a.go", "package dispatch\nimport _ \"waybill.dev/edge\"", []string{"2 star"}},
		{"edge/mcp/a.go", "package mcp\nimport _ \"waybill.dev/edge/a2a\"", []string{"2 star"}},
		{"edge/a.go", "package edge\nimport _ \"waybill.dev/edge/mcp\"", []string{"2 star"}},
		{"bus/a.go", "package bus\nimport _ \"waybill.dev/cmd/waybill/cli\"", []string{"2 star"}},
		{"bus/a.go", "package bus\nimport _ \"waybill.dev/edge\"", []string{"2 star"}},
		{"cmd/waybill/a.go", "package main\nimport _ \"waybill.dev/test/peers\"", []string{"2 star"}},
		{"replay/a.go", "package replay\nimport _ \"waybill.dev/projections\"", []string{"2 star"}},

		{"workers/dispatch/a.go", "package dispatch\nimport _ \"github.com/nats-io/nats.go\"", []string{"2 outside"}},
		{"cmd/waybill/a.go", "package main\nimport _ \"github.com/nats-io/nats.go/jetstream\"", []string{"2 outside"}},
		{"replay/a.go", "package replay\nimport _ \"github.com/ClickHouse/clickhouse-go/v2\"", []string{"2 outside"}},

		{"schemas/a.go", "package schemas\nimport _ \"golang.org/x/sync/errgroup\"", []string{"2 vocabulary"}},
		{"schemas/a.go", "package schemas\nimport _ \"github.com/go-json-experiment/json\"", []string{"2 vocabulary"}},
		{"schemas/a.go", "package schemas\nimport _ \"waybill.dev/schemas/sse\"", []string{"2 vocabulary"}},
		{"schemas/sse/a.go", "package sse\nimport _ \"github.com/google/uuid\"", []string{"2 vocabulary"}},
		{"schemas/a.go", "package schemas\nimport _ \"waybill.dev/bus\"", []string{"2 star", "2 vocabulary"}},

		{"edge/a.go", "package edge\nimport . \"fmt\"\nvar _ = Sprint", []string{"2 dot import"}},
		{"edge/a.go", "package edge\nfunc init() {}", []string{"2 init"}},
		{"edge/a_test.go", "package edge\nfunc init() {}", []string{"2 init"}},

		{"edge/a.go", "package edge\nimport \"os\"\nfunc f() {\n\tos.Exit(1)\n}", []string{"4 exit"}},
		{"edge/a.go", "package edge\nimport sys \"os\"\nfunc f() { sys.Exit(1) }", []string{"3 exit"}},
		{"edge/a.go", "package edge\nfunc f() { panic(`no`) }", []string{"2 exit"}},
		{"edge/a.go", "package edge\nimport \"net/http\"\nfunc f() { panic(http.ErrServerClosed) }", []string{"3 exit"}},
		{"edge/a.go", "package edge\nimport \"log\"\nfunc f() { log.Fatalf(``) }", []string{"3 exit", "3 logger"}},
		{"cmd/waybill/cli/a.go", "package cli\nimport \"os\"\nfunc f() { os.Exit(2) }", []string{"3 exit"}},

		{"edge/a.go", "package edge\nimport \"log/slog\"\nvar log *slog.Logger", []string{"3 logger"}},
		{"edge/a.go", "package edge\nimport \"log/slog\"\nvar (\n\ta int\n\tl = slog.New(nil)\n)", []string{"5 logger"}},
		{"edge/a.go", "package edge\nimport \"log/slog\"\nfunc f() { slog.Info(``) }", []string{"3 logger"}},
		{"edge/a.go", "package edge\nimport \"log\"\nfunc f() { log.Println() }", []string{"3 logger"}},

		{"edge/a.go", "package edge\nimport _ \"testing\"", []string{"2 testing"}},
		{"edge/a.go", "package edge\nimport _ \"testing/iotest\"", []string{"2 testing"}},

		{"edge/a_test.go", "package edge\nimport \"testing\"\nfunc TestX(t *testing.T) {\n\tt.Skip()\n}", []string{"4 skip"}},
		{"test/a.go", "package test\nimport \"testing\"\nfunc f(tb testing.TB) { tb.Skipf(``); tb.SkipNow() }", []string{"3 skip", "3 skip"}},
		{"test/a_test.go", "package test\nimport \"testing\"\nvar _ = testing.Short()", []string{"3 skip"}},

		{"workers/policy/a.go", "package policy\nimport \"time\"\nvar now = time.Now", []string{"3 pure"}},
		{"workers/policy/a.go", "package policy\nimport _ \"math/rand/v2\"", []string{"2 pure"}},
		{"workers/policy/decide.go", "package policy\nimport \"os\"\nvar _ = os.Getenv", []string{"2 pure"}},
		{"workers/policy/a.go", "package policy\nfunc f() {\n\tgo f()\n\tselect {}\n}", []string{"3 pure", "4 pure"}},
	}
	caught := map[string]bool{}
	for _, tt := range tests {
		f, err := archParse(tt.path, tt.src)
		if err != nil {
			t.Fatal(err)
		}
		var got []string
		for _, v := range archCheck([]*archFile{f}, nil) {
			got = append(got, fmt.Sprintf("%d %s", v.line, v.rule))
			caught[v.rule] = true
			if !strings.HasPrefix(v.String(), fmt.Sprintf("%s:%d: %s: ", tt.path, v.line, v.rule)) {
				t.Errorf("the report does not begin with the place: %s", v)
			}
		}
		if !slices.Equal(got, tt.want) {
			t.Errorf("%s\n%s\n: found %q, want %q", tt.path, tt.src, got, tt.want)
		}
	}
	for _, r := range archRules {
		if !caught[r.name] {
			t.Errorf("nothing is planted against the rule %s", r.name)
		}
	}
}

func TestArchExceptions(t *testing.T) {
	f, err := archParse("edge/a.go", "package edge\nfunc f() { panic(1) }")
	if err != nil {
		t.Fatal(err)
	}
	if got := archCheck([]*archFile{f}, map[string]string{"exit edge/a.go": "planted"}); len(got) != 0 {
		t.Errorf("excused, and yet %v", got)
	}
	got := archCheck([]*archFile{f}, map[string]string{"exit edge/a.go": "planted", "init edge/a.go": "stale"})
	if len(got) != 1 || got[0].rule != "init" || !strings.Contains(got[0].String(), "no longer needed") {
		t.Errorf("a stale exception: %v", got)
	}
}

// TestArchReads: the walk sees what lies there, and leaves out what is not
// ours.
func TestArchReads(t *testing.T) {
	root := t.TempDir()
	for _, name := range []string{
		"bus/a.go", "bus/a_windows.go", "bus/deep/b.go", "bus/testdata/no.go", ".git/no.go", "build/no.go",
		"tools/no.go", "tools/go.mod", "test/node_modules/x/no.go", "bus/readme.md",
	} {
		file := filepath.Join(root, filepath.FromSlash(name))
		if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(file, []byte("package a\n"), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	files, err := archSources(root)
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, f := range files {
		got = append(got, f.path)
	}
	if want := []string{"bus/a.go", "bus/a_windows.go", "bus/deep/b.go"}; !slices.Equal(got, want) {
		t.Errorf("read %q, want %q", got, want)
	}
}
