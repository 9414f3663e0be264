package test

import (
	"encoding/json"
	"errors"
	"fmt"
	"go/ast"
	"go/importer"
	"go/parser"
	"go/token"
	"go/types"
	"io"
	"maps"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// What replay recomputes must come out the same, today and in years: so it may look
// at no clock, draw no chance, go through no map in the map's own order, start or
// hear no goroutine, and touch nothing outside. This follows every function that is
// reached from detRoots through the program, by its types, and names what of it does.
//
// What is reached in other modules is not read: detModules are those that are
// trusted to be functions of their arguments.

// detRoots are the functions by which replay recomputes: pkg.Func or pkg.Type.Method,
// below waybill.dev.
var detRoots = []string{
	// Events, their ids and their written form.
	"schemas.Event.ID", "schemas.Event.Check", "schemas.Event.Next", "schemas.Event.MarshalJSON", "schemas.Event.MarshalString",
	"schemas.Event.UnmarshalString", "schemas.Event.Open", "schemas.NewSessionKey", "schemas.Match",
	"schemas.Event.TraceID", "schemas.Event.SpanID", "schemas.Event.ParentSpan",
	"schemas/jsonrpc.Decode",
	// Decisions.
	"workers/policy.Compile", "workers/policy.Source.Encode", "workers/policy.Bundle.Decide", "workers/policy.Bundle.decide", "workers/policy.Bundle.Shows",
	"workers/policy.Bundle.Explain", "workers/policy.Bundle.NeedsOf", "workers/policy.Bundle.DecideAgain", "workers/policy.Bundle.Again", "workers/policy.Rerun.Decide",
	"workers/policy.FactsOf", "workers/policy.Facts.Record", "workers/policy.Verdict.Differs",
	"workers/policy.approvalID", "workers/policy.redact", "workers/policy.read.digest",
	// What replay --verify makes again of a session.
	"replay.New", "replay.Compare", "replay.History.Check",
	// Rows and leaves.
	"projections.Tables",
	"projections/audit.Record", "projections/audit.Salt", "projections/audit.ReadRecord", "projections/audit.hashOf", "projections/audit.gapRecord",
	"projections/audit.tree.add", "projections/audit.tree.root", "projections/audit.Proof.Check",
}

// detModules are what may be called of other modules.
var detModules = []string{
	"cel.dev/cel-go/", "github.com/goccy/go-yaml", "github.com/go-json-experiment/json", "golang.org/x/mod/sumdb/",
}

// detExceptions: function → why it may do what is forbidden.
var detExceptions = map[string]string{
	"schemas/jsonrpc.seed":           "hashes find names that may be equal, and equal is what their bytes are",
	"schemas/jsonrpc.scanner.hash":   "the same",
	"schemas/jsonrpc.document.check": "a scanner is empty when it comes from the pool",
	"replay.found.compare":           "the names are sorted before they are used",
}

// detForbidden are packages of the standard library of which nothing may be used,
// and single functions, methods and variables.
var detForbidden = []string{
	"os", "os/exec", "os/signal", "os/user", "net", "net/http", "syscall", "io/fs", "io/ioutil", "path/filepath", "plugin",
	"math/rand", "math/rand/v2", "crypto/rand", "hash/maphash", "runtime", "runtime/debug", "log", "log/slog", "unique", "weak",
	"time.Now", "time.Since", "time.Until", "time.After", "time.AfterFunc", "time.Tick", "time.NewTicker", "time.NewTimer", "time.Sleep", "time.Local", "time.LoadLocation",
	"time.Time.Local", "reflect.Value.MapRange", "reflect.Value.MapKeys", "sync.Map.Range", "sync.Pool.Get", "context.WithTimeout", "context.WithDeadline",
	"crypto/ecdsa.GenerateKey", "crypto/ed25519.GenerateKey", "crypto/rsa.GenerateKey",
}

// detProgram is the program, with its types.
type detProgram struct {
	fset  *token.FileSet
	decls map[types.Object]detDecl
	types []*types.Named // of ours, for calls through interfaces
}

// detDecl is where something is declared.
type detDecl struct {
	node ast.Node // *ast.FuncDecl, or the values of a variable
	info *types.Info
	name string // pkg.Type.Method
}

// detFinding is something that is forbidden.
type detFinding struct {
	at   token.Position
	in   string // function
	what string
	by   string // the function by which it is reached
}

func (f detFinding) String() string {
	return fmt.Sprintf("%s:%d: %s, in %s, which replay recomputes with (reached by %s)", filepath.Base(f.at.Filename), f.at.Line, f.what, f.in, f.by)
}

// add takes a package that was checked.
func (p *detProgram) add(pkg *types.Package, files []*ast.File, info *types.Info) {
	short := strings.TrimPrefix(pkg.Path(), archModule+"/")
	for _, f := range files {
		for _, d := range f.Decls {
			switch d := d.(type) {
			case *ast.FuncDecl:
				obj := info.Defs[d.Name]
				name := short + "." + d.Name.Name
				if fn, ok := obj.(*types.Func); ok {
					if recv := detReceiver(fn); recv != "" {
						name = short + "." + recv + "." + d.Name.Name
					}
				}
				p.decls[obj] = detDecl{d, info, name}
			case *ast.GenDecl:
				for _, s := range d.Specs {
					switch s := s.(type) {
					case *ast.ValueSpec:
						for _, n := range s.Names {
							p.decls[info.Defs[n]] = detDecl{s, info, short + "." + n.Name}
						}
					case *ast.TypeSpec:
						if named, ok := info.Defs[s.Name].Type().(*types.Named); ok {
							p.types = append(p.types, named)
						}
					}
				}
			}
		}
	}
}

// detReceiver is the name of a method's type.
func detReceiver(f *types.Func) string {
	recv := f.Signature().Recv()
	if recv == nil {
		return ""
	}
	t := recv.Type()
	if p, ok := t.(*types.Pointer); ok {
		t = p.Elem()
	}
	if n, ok := t.(*types.Named); ok {
		return n.Obj().Name()
	}
	return ""
}

// check follows the roots and returns what is forbidden. Exceptions that excuse
// nothing are findings.
func (p *detProgram) check(roots []string, exceptions map[string]string) (found []detFinding, reached []string) {
	byName := map[string]types.Object{}
	for obj, d := range p.decls {
		byName[d.name] = obj
	}
	type step struct {
		obj types.Object
		by  string
	}
	var queue []step
	seen := map[types.Object]bool{}
	enqueue := func(obj types.Object, by string) {
		if _, ours := p.decls[obj]; ours && !seen[obj] {
			seen[obj] = true
			queue = append(queue, step{obj, by})
		}
	}
	for _, r := range roots {
		obj := byName[r]
		if obj == nil {
			found = append(found, detFinding{in: r, what: "there is no such function: correct detRoots", by: r})
			continue
		}
		enqueue(obj, r)
	}
	unused := maps.Clone(exceptions)
	for len(queue) > 0 {
		next := queue[0]
		queue = queue[1:]
		d := p.decls[next.obj]
		reached = append(reached, d.name)
		report := func(n ast.Node, what string) {
			if _, ok := exceptions[d.name]; ok {
				delete(unused, d.name)
				return
			}
			found = append(found, detFinding{p.fset.Position(n.Pos()), d.name, what, next.by})
		}
		p.look(d, report, func(obj types.Object) { enqueue(obj, d.name) })
	}
	for name := range unused {
		found = append(found, detFinding{in: name, what: "an exception that is no longer needed", by: name})
	}
	slices.SortFunc(found, func(a, b detFinding) int { return strings.Compare(a.String(), b.String()) })
	slices.Sort(reached)
	return found, reached
}

// look reports what a declaration does that is forbidden, and what it uses of ours.
func (p *detProgram) look(d detDecl, report func(ast.Node, string), uses func(types.Object)) {
	sorted := map[ast.Node]bool{} // maps.Keys and the like, which are sorted at once
	ast.Inspect(d.node, func(n ast.Node) bool {
		switch n := n.(type) {
		case *ast.CallExpr:
			if f := detCallee(d.info, n); f != nil && f.Pkg() != nil && f.Pkg().Path() == "slices" && strings.HasPrefix(f.Name(), "Sorted") {
				ast.Inspect(n.Args[0], func(n ast.Node) bool {
					if c, ok := n.(*ast.CallExpr); ok {
						sorted[c.Fun] = true
					}
					return true
				})
			}
		case *ast.GoStmt:
			report(n, "a goroutine is started")
		case *ast.SelectStmt:
			report(n, "it depends on which channel is ready")
		case *ast.SendStmt:
			report(n, "it sends to a channel")
		case *ast.UnaryExpr:
			if n.Op == token.ARROW {
				report(n, "it hears a channel")
			}
		case *ast.RangeStmt:
			switch t := d.info.TypeOf(n.X); t.Underlying().(type) {
			case *types.Map:
				if !detOrderless(d, n) {
					report(n, "it goes through a map in the map's own order")
				}
			case *types.Chan:
				report(n, "it hears a channel")
			}
		case *ast.SelectorExpr:
			if f, ok := d.info.Uses[n.Sel].(*types.Func); ok && f.Pkg() != nil && f.Pkg().Path() == "maps" && slices.Contains([]string{"Keys", "Values", "All"}, f.Name()) && !sorted[n] {
				report(n, "maps."+f.Name()+" is in the map's own order, and is not sorted")
			}
		case *ast.Ident:
			obj := d.info.Uses[n]
			switch o := obj.(type) {
			case *types.Func:
				o = o.Origin()
				if what := detOutside(o, detReceiver(o)); what != "" {
					report(n, what)
				}
				uses(o)
				p.implementers(o, uses)
			case *types.Var:
				if o.Pkg() != nil && o.Parent() == o.Pkg().Scope() { // of a package
					if what := detOutside(o, ""); what != "" {
						report(n, what)
					}
					uses(o)
				}
			}
		}
		return true
	})
}

// detCallee is the function that is called by its name.
func detCallee(info *types.Info, c *ast.CallExpr) *types.Func {
	fun := ast.Unparen(c.Fun)
	if i, ok := fun.(*ast.IndexExpr); ok {
		fun = i.X
	}
	switch fun := fun.(type) {
	case *ast.Ident:
		f, _ := info.Uses[fun].(*types.Func)
		return f
	case *ast.SelectorExpr:
		f, _ := info.Uses[fun.Sel].(*types.Func)
		return f
	}
	return nil
}

// detOutside says what is wrong with the use of something of another package.
func detOutside(o types.Object, recv string) string {
	if o.Pkg() == nil || strings.HasPrefix(o.Pkg().Path(), archModule+"/") {
		return ""
	}
	pkg := o.Pkg().Path()
	name := o.Name()
	if recv != "" {
		name = recv + "." + name
	}
	switch {
	case slices.Contains(detForbidden, pkg), slices.Contains(detForbidden, pkg+"."+name):
		return "it uses " + pkg + "." + name
	case !standard(pkg) && !slices.ContainsFunc(detModules, func(m string) bool { return strings.HasPrefix(pkg, m) }):
		return "it uses " + pkg + ", which is not among detModules"
	}
	return ""
}

// implementers are the methods of ours that a call through an interface may mean.
func (p *detProgram) implementers(f *types.Func, uses func(types.Object)) {
	recv := f.Signature().Recv()
	if recv == nil {
		return
	}
	i, ok := recv.Type().Underlying().(*types.Interface)
	if !ok {
		return
	}
	for _, t := range p.types {
		if _, isInterface := t.Underlying().(*types.Interface); isInterface || !types.Implements(types.NewPointer(t), i) {
			continue
		}
		if m, _, _ := types.LookupFieldOrMethod(types.NewPointer(t), true, f.Pkg(), f.Name()); m != nil {
			uses(m)
		}
	}
}

// detOrderless tells whether it does not matter in which order a map is gone
// through: what is done with each is put under its key into another map, counted, or
// put into a list that is sorted behind.
func detOrderless(d detDecl, r *ast.RangeStmt) bool {
	var harmless func(s ast.Stmt) bool
	harmless = func(s ast.Stmt) bool {
		switch s := s.(type) {
		case *ast.AssignStmt:
			if s.Tok == token.DEFINE {
				return true
			}
			if len(s.Lhs) != 1 {
				return false
			}
			if i, ok := s.Lhs[0].(*ast.IndexExpr); ok {
				_, isMap := d.info.TypeOf(i.X).Underlying().(*types.Map)
				return isMap && s.Tok == token.ASSIGN
			}
			if b, ok := d.info.TypeOf(s.Lhs[0]).Underlying().(*types.Basic); ok && b.Info()&types.IsInteger != 0 && s.Tok == token.ADD_ASSIGN {
				return true
			}
			return detAppends(d, s) && detSortedBehind(d, s.Lhs[0], r.End())
		case *ast.IncDecStmt, *ast.EmptyStmt:
			return true
		case *ast.ExprStmt:
			c, ok := s.X.(*ast.CallExpr)
			if !ok {
				return false
			}
			id, ok := c.Fun.(*ast.Ident)
			return ok && id.Name == "delete"
		case *ast.BranchStmt:
			return s.Tok == token.CONTINUE
		case *ast.IfStmt:
			return (s.Init == nil || harmless(s.Init)) && harmless(s.Body) && (s.Else == nil || harmless(s.Else))
		case *ast.BlockStmt:
			return !slices.ContainsFunc(s.List, func(s ast.Stmt) bool { return !harmless(s) })
		case *ast.RangeStmt:
			return harmless(s.Body)
		}
		return false
	}
	return harmless(r.Body)
}

func detAppends(d detDecl, s *ast.AssignStmt) bool {
	c, ok := s.Rhs[0].(*ast.CallExpr)
	if !ok {
		return false
	}
	id, ok := c.Fun.(*ast.Ident)
	return ok && id.Name == "append" && len(c.Args) > 0 && types.ExprString(c.Args[0]) == types.ExprString(s.Lhs[0])
}

// detSortedBehind tells whether a list is sorted after a place.
func detSortedBehind(d detDecl, list ast.Expr, after token.Pos) bool {
	found := false
	ast.Inspect(d.node, func(n ast.Node) bool {
		if c, ok := n.(*ast.CallExpr); ok && c.Pos() > after && len(c.Args) > 0 {
			if f := detCallee(d.info, c); f != nil && f.Pkg() != nil && f.Pkg().Path() == "slices" && strings.HasPrefix(f.Name(), "Sort") {
				found = found || types.ExprString(c.Args[0]) == types.ExprString(list)
			}
		}
		return true
	})
	return found
}

// detPackage is what `go list` says.
type detPackage struct {
	ImportPath, Dir, Export string
	GoFiles                 []string
	Standard                bool
}

// detLoad checks the types of our packages, from their sources, with what the
// compiler knows of the others.
func detLoad(t *testing.T) (p *detProgram, std types.Importer) {
	t.Helper()
	want := map[string]bool{}
	for _, r := range detRoots {
		dir, last := path.Split(r)
		pkg, _, _ := strings.Cut(last, ".")
		want[archModule+"/"+dir+pkg] = true
	}
	args := append([]string{"list", "-export", "-deps", "-json=ImportPath,Dir,Export,GoFiles,Standard"}, slices.Sorted(maps.Keys(want))...)
	// What the test plants uses these.
	args = append(args, "math/rand/v2", "os", "time", "maps", "slices", "net/http", "crypto/rand", "log/slog")
	cmd := exec.CommandContext(t.Context(), "go", args...)
	cmd.Dir, cmd.Stderr = "..", t.Output()
	out, err := cmd.Output()
	if err != nil {
		t.Fatal("go list:", err)
	}
	fset := token.NewFileSet()
	exports := map[string]string{}
	std = importer.ForCompiler(fset, "gc", func(path string) (io.ReadCloser, error) {
		if exports[path] == "" {
			return nil, fmt.Errorf("nothing is known of %s", path)
		}
		return os.Open(exports[path])
	})
	p = &detProgram{fset: fset, decls: map[types.Object]detDecl{}}
	imports := detImporter{std, map[string]*types.Package{}}
	for d := json.NewDecoder(strings.NewReader(string(out))); ; {
		var l detPackage
		if err := d.Decode(&l); errors.Is(err, io.EOF) {
			return p, std
		} else if err != nil {
			t.Fatal("go list:", err)
		}
		exports[l.ImportPath] = l.Export
		if !strings.HasPrefix(l.ImportPath, archModule+"/") {
			continue
		}
		var files []*ast.File
		for _, name := range l.GoFiles {
			f, err := parser.ParseFile(fset, filepath.Join(l.Dir, name), nil, parser.SkipObjectResolution)
			if err != nil {
				t.Fatal(err)
			}
			files = append(files, f)
		}
		imports.ours[l.ImportPath] = p.typed(t, l.ImportPath, files, imports)
	}
}

func (p *detProgram) typed(t *testing.T, path string, files []*ast.File, imports types.Importer) *types.Package {
	t.Helper()
	info := &types.Info{Defs: map[*ast.Ident]types.Object{}, Uses: map[*ast.Ident]types.Object{}, Types: map[ast.Expr]types.TypeAndValue{}}
	pkg, err := (&types.Config{Importer: imports}).Check(path, p.fset, files, info)
	if err != nil {
		t.Fatal(err)
	}
	p.add(pkg, files, info)
	return pkg
}

// detImporter knows our packages from their sources.
type detImporter struct {
	std  types.Importer
	ours map[string]*types.Package
}

func (i detImporter) Import(path string) (*types.Package, error) {
	if p := i.ours[path]; p != nil {
		return p, nil
	}
	return i.std.Import(path)
}

func TestDeterminism(t *testing.T) {
	t.Parallel()
	p, std := detLoad(t)
	found, reached := p.check(detRoots, detExceptions)
	for _, f := range found {
		t.Error(f)
	}
	// What reaches nothing finds nothing.
	for _, must := range []string{
		"schemas.Requested.id", "schemas.readAny", "schemas/jsonrpc.scanner", "workers/policy.selectors.matcher", "workers/policy.celValue", "workers/policy.Bundle.conclude",
		"workers/policy.allow.match", "projections.micros", "projections.calls", "projections/audit.bodyDigest",
	} {
		if !slices.ContainsFunc(reached, func(r string) bool { return r == must || strings.HasPrefix(r, must+".") }) {
			t.Errorf("%s is not reached", must)
		}
	}
	t.Logf("%d functions and variables are recomputed with", len(reached))
	t.Run("catches", func(t *testing.T) { detCatches(t, p.fset, std) })
}

// detCatches plants what is forbidden, so that a guard that no longer sees anything
// is noticed.
func detCatches(t *testing.T, fset *token.FileSet, std types.Importer) {
	const head = "package planted\nimport (\"crypto/rand\"; chance \"math/rand/v2\"; \"maps\"; \"net/http\"; \"os\"; \"slices\"; \"time\")\n" +
		"var _, _, _, _, _, _, _ = rand.Text, chance.Int, maps.Keys[map[int]int], http.Get, os.Getenv, slices.Max[[]int], time.Now\n"
	for _, tt := range []struct{ body, want string }{
		{`func root(m map[string]int) int { return len(m) + m["a"] }`, ""},
		{`func root(m map[string]int) (l []string) { return slices.Sorted(maps.Keys(m)) }`, ""},
		{`func root(m map[string]int) (l []string) { for k := range m { l = append(l, k) }; slices.Sort(l); return l }`, ""},
		{`func root(m map[string]int) map[string]int { o := map[string]int{}; for k, v := range m { if v > 1 { o[k] = v } }; return o }`, ""},
		{`func root(m map[string]int) (n int) { for range m { n++ }; return n }`, ""},
		{`func root() time.Time { return time.Unix(1, 0).UTC() }`, ""},

		{`func root() time.Time { return time.Now() }`, "time.Now"},
		{`func root() func() time.Time { return time.Now }`, "time.Now"},
		{`func root(t time.Time) string { return t.Local().String() }`, "time.Time.Local"},
		{`func root(t time.Time) string { return t.In(time.Local).String() }`, "time.Local"},
		{`func root() int { return chance.Int() }`, "math/rand/v2"},
		{`func root() string { return rand.Text() }`, "crypto/rand"},
		{`func root() string { return os.Getenv("A") }`, "os.Getenv"},
		{`func root() any { r, _ := http.Get("x"); return r }`, "net/http"},
		{`func root(m map[string]int) (l []string) { for k := range m { l = append(l, k) }; return l }`, "map's own order"},
		{`func root(m map[string]int) string { for k := range m { return k }; return "" }`, "map's own order"},
		{`func root(m map[string]int) (s string) { for k := range m { s += k }; return s }`, "map's own order"},
		{`type set map[string]bool; func root(m set) (s string) { for k := range m { s = k }; return s }`, "map's own order"},
		{`func root(m map[string]int) []string { return slices.Collect(maps.Keys(m)) }`, "maps.Keys"},
		{`func root() { go root() }`, "goroutine"},
		{`func root(c chan int) int { return <-c }`, "channel"},
		{`func root(c chan int) { select { case c <- 1: default: } }`, "channel"},
		// By ways round.
		{`func root() int { return one() }; func one() int { return two() }; func two() int { return time.Now().Day() }`, "time.Now"},
		{`type t struct{}; func (*t) m() int { return time.Now().Day() }; func root() int { return new(t).m() }`, "time.Now"},
		{`type i interface{ m() int }; type t struct{}; func (t) m() int { return time.Now().Day() }; func root(x i) int { return x.m() }`, "time.Now"},
		{`var clock = func() int { return time.Now().Day() }; func root() int { return clock() }`, "time.Now"},
		{`type r struct{ f func() int }; func root() r { return r{f: func() int { return time.Now().Day() }} }`, "time.Now"},
		{`func gen[T any](x T) T { _ = time.Now(); return x }; func root() int { return gen(1) }`, "time.Now"},
		{`func other() int { return time.Now().Day() }; func root() int { return 1 }`, ""}, // not reached
	} {
		f, err := parser.ParseFile(fset, "planted.go", head+tt.body, parser.SkipObjectResolution)
		if err != nil {
			t.Fatal(err)
		}
		p := &detProgram{fset: fset, decls: map[types.Object]detDecl{}}
		p.typed(t, archModule+"/planted", []*ast.File{f}, std)
		found, _ := p.check([]string{"planted.root"}, nil)
		switch {
		case tt.want == "" && len(found) > 0:
			t.Errorf("%s: %v", tt.body, found)
		case tt.want != "" && (len(found) == 0 || !strings.Contains(found[0].String(), tt.want)):
			t.Errorf("%s: found %v, want %s", tt.body, found, tt.want)
		}
	}
	f, err := parser.ParseFile(fset, "planted.go", head+`func root() int { return time.Now().Day() }`, 0)
	if err != nil {
		t.Fatal(err)
	}
	p := &detProgram{fset: fset, decls: map[types.Object]detDecl{}}
	p.typed(t, archModule+"/planted", []*ast.File{f}, std)
	if found, _ := p.check([]string{"planted.root"}, map[string]string{"planted.root": "planted"}); len(found) > 0 {
		t.Errorf("excused, and yet %v", found)
	}
	if found, _ := p.check([]string{"planted.root"}, map[string]string{"planted.root": "planted", "planted.none": "stale"}); len(found) != 1 {
		t.Errorf("a stale exception: %v", found)
	}
	if found, _ := p.check([]string{"planted.gone"}, nil); len(found) != 1 {
		t.Errorf("a root that is not there: %v", found)
	}
}
