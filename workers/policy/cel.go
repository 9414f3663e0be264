package policy

import (
	"errors"
	"fmt"
	"math"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"unicode"

	"cel.dev/cel-go/cel"
	"cel.dev/cel-go/common"
	"cel.dev/cel-go/common/ast"
	"cel.dev/cel-go/common/operators"
	"cel.dev/cel-go/common/types"
	"cel.dev/cel-go/common/types/ref"
	"cel.dev/cel-go/common/types/traits"
	"cel.dev/cel-go/ext"
	"cel.dev/cel-go/parser"

	"waybill.dev/schemas/jsonrpc"
)

// Engine is what evaluates conditions. A bundle names it, since another might
// decide otherwise.
const Engine = "cel.dev/cel-go v0.33.2"

// Bounds of a condition.
const (
	maxCondition = 4 << 10 // characters
	maxNesting   = 2       // of loops (all, exists, map, filter) within each other

	// maxCost bounds a condition that loops, which may take as long as the caller's
	// arguments make it: past it, it fails. Counting is dear, and left out where there
	// are no more than fewValues to loop over, or no more than fewSteps to do, all of
	// them cheap. The rest takes as long as it is written.
	maxCost   = 200_000
	fewValues = 100
	fewSteps  = 20_000 // of the parts of a condition, each as often as its loops may come to it
)

// variables are what a condition may speak of; anything else is an error when
// the rule is loaded. There is no clock among them, nor anything else that is not
// the request itself or a fact that the decision records.
func variables() []cel.EnvOption {
	var all []cel.EnvOption
	for _, v := range []struct {
		name string
		of   *cel.Type
	}{
		{"agent.id", cel.StringType}, {"agent.tenant", cel.StringType}, {"agent.groups", cel.ListType(cel.StringType)},
		{"protocol", cel.StringType}, {"revision", cel.StringType},
		{"server", cel.StringType}, {"method", cel.StringType}, {"name", cel.StringType},
		{"args", cel.DynType}, {"time", cel.TimestampType},
		{"session.id", cel.StringType}, {"session.calls", cel.IntType}, {"session.denied", cel.IntType},
		{"session.tools", cel.ListType(cel.StringType)}, {"session.labels", cel.ListType(cel.StringType)},
		{"tool.digest", cel.StringType}, {"tool.read_only", cel.BoolType}, {"tool.destructive", cel.BoolType},
		{"tool.idempotent", cel.BoolType}, {"tool.open_world", cel.BoolType},
	} {
		all = append(all, cel.Variable(v.name, v.of))
	}
	return all
}

// environment is what conditions are checked against.
func environment() (*cel.Env, error) {
	return cel.NewCustomEnv(append(variables(),
		cel.StdLib(),
		cel.ClearMacros(),
		cel.Macros(hasMember, cel.AllMacro, cel.ExistsMacro, cel.ExistsOneMacro, cel.FilterMacro, cel.MapMacro, cel.MapFilterMacro),
		ext.Strings(),
		cel.CrossTypeNumericComparisons(true),
		cel.DefaultUTCTimeZone(true),
		cel.ParserExpressionSizeLimit(maxCondition),
		cel.ParserRecursionLimit(64),
		cel.ASTValidators(
			cel.ValidateRegexLiterals(), cel.ValidateDurationLiterals(), cel.ValidateTimestampLiterals(),
			cel.ValidateHomogeneousAggregateLiterals(), cel.ValidateComprehensionNestingLimit(maxNesting),
		),
		cel.Function(objectOnly, cel.Overload(objectOnly, []*cel.Type{cel.DynType}, cel.DynType, cel.UnaryBinding(object))),
	)...)
}

// objectOnly is a function that no condition can name.
const objectOnly = "@object"

// hasMember is has(), but for one thing: of what is no object it fails, where
// CEL says no. A caller that sends a text where a rule expects an object would
// else pass the rule.
var hasMember = parser.NewGlobalMacro("has", 1, func(eh parser.ExprHelper, _ ast.Expr, args []ast.Expr) (ast.Expr, *common.Error) {
	if args[0].Kind() != ast.SelectKind {
		return nil, eh.NewError(args[0].ID(), "has() takes a member, such as has(args.amount)")
	}
	s := args[0].AsSelect()
	of := s.Operand()
	if of.Kind() == ast.IdentKind && of.AsIdent() == "args" {
		return eh.NewPresenceTest(of, s.FieldName()), nil // an object, or an error anyway
	}
	return eh.NewPresenceTest(eh.NewCall(objectOnly, of), s.FieldName()), nil
})

func object(v ref.Val) ref.Val {
	switch v.(type) {
	case traits.Mapper, *types.Unknown, *types.Err:
		return v
	}
	return types.NewErr("no object: %s", v.Type().TypeName())
}

// condition is a compiled `when`.
type condition struct {
	text    string
	program cel.Program
	counted cel.Program     // the same, held to maxCost; nil: it does not loop
	few     int             // values, up to which it need not be counted
	uses    map[string]bool // of the variables
}

// conditionError is what is wrong with a condition, and where in its text.
type conditionError struct {
	line, column int // from 1
	what         string
}

func (e *conditionError) Error() string { return e.what }

// compileCondition checks a condition and makes it ready.
func compileCondition(env *cel.Env, text string) (_ *condition, err error) {
	checked, issues := env.Compile(text)
	if err := issues.Err(); err != nil {
		first := issues.Errors()[0]
		return nil, &conditionError{first.Location.Line(), first.Location.Column() + 1, first.Message}
	}
	if !checked.OutputType().IsExactType(cel.BoolType) && !checked.OutputType().IsExactType(cel.DynType) {
		return nil, &conditionError{1, 1, "a condition is true or false, this is " + checked.OutputType().String()}
	}
	c := &condition{text: text, uses: map[string]bool{}}
	loops, parts, cheap := 0, 0, true
	ast.PreOrderVisit(checked.NativeRep().Expr(), ast.NewExprVisitor(func(e ast.Expr) {
		parts++
		switch e.Kind() {
		case ast.ComprehensionKind:
			loops++
		case ast.CallKind:
			cheap = cheap && isCheap(e.AsCall())
		case ast.LiteralKind:
			if text, ok := e.AsLiteral().(types.String); ok {
				parts += len(text) / 10 // as counting has it
			}
		}
	}))
	c.few = fewValues
	if loops == 1 && cheap {
		c.few = max(fewValues, fewSteps/parts)
	}
	for _, r := range checked.NativeRep().ReferenceMap() {
		if r.Name != "" {
			c.uses[r.Name] = true
		}
	}
	optimize := cel.EvalOptions(cel.OptOptimize)
	if c.program, err = env.Program(checked, optimize); err == nil && loops > 0 {
		c.counted, err = env.Program(checked, optimize, cel.CostLimit(maxCost))
	}
	if err != nil {
		return nil, &conditionError{1, 1, err.Error()}
	}
	return c, nil
}

// isCheap tells of a call that it takes no longer than reading what it is given, and
// gives no more. Of such, as often as fewSteps allows, maxCost could stop none. Others
// a caller can make dear with few values: a pattern that is one of the arguments, or a
// text that is put between all letters of another, in each round.
func isCheap(c ast.CallExpr) bool {
	switch c.FunctionName() {
	case operators.LogicalAnd, operators.LogicalOr, operators.LogicalNot, operators.NotStrictlyFalse, operators.Conditional,
		operators.Equals, operators.NotEquals, operators.Less, operators.LessEquals, operators.Greater, operators.GreaterEquals,
		operators.Subtract, operators.Multiply, operators.Divide, operators.Modulo, operators.Negate,
		operators.Index, objectOnly, "size", "startsWith", "endsWith":
		return true
	case operators.Add: // else of a text to a text, or a list to a list
		of := c.Args()[0]
		return of.Kind() == ast.IdentKind && of.AsIdent() == parser.HiddenAccumulatorName
	case "contains": // counted as the product of both
		return len(c.Args()) == 1 && c.Args()[0].Kind() == ast.LiteralKind
	case operators.In: // its elements are parts
		return c.Args()[1].Kind() == ast.ListKind
	}
	return false
}

// truth is what a condition says of a request.
type truth int

const (
	no truth = iota
	yes
	maybe // it depends on arguments, which are not known
)

// errNotBool: a condition of a type that is known only when it is evaluated.
var errNotBool = errors.New("the condition is neither true nor false")

// eval evaluates the condition. Values that it cannot work with make an error,
// never a word.
func (c *condition) eval(in *Input) (truth, error) {
	program := c.program
	if c.counted != nil && in.moreThan(c.few) {
		program = c.counted
	}
	v, _, err := program.Eval(in)
	switch v := v.(type) {
	case types.Bool:
		if err == nil && v {
			return yes, nil
		}
	case *types.Unknown:
		if err == nil {
			return maybe, nil
		}
	default:
		if err == nil {
			err = errNotBool
		}
	}
	return no, err
}

// ResolveName and Parent make an Input what a condition reads (cel.Activation).
func (in *Input) ResolveName(name string) (any, bool) {
	switch name {
	case "agent.id":
		return types.String(in.Event.Agent), true
	case "agent.tenant":
		return types.String(in.Event.Tenant), true
	case "agent.groups":
		if in.Facts.Groups != nil {
			return in.Facts.Groups, true
		}
	case "protocol":
		return types.String(in.Request.Protocol), true
	case "revision":
		return types.String(in.Request.Revision), true
	case "server":
		return types.String(in.Request.Server), true
	case "method":
		return types.String(in.Request.Method), true
	case "name":
		return types.String(in.Request.Name), true
	case "args":
		if in.anyArgs {
			in.open.touch(argumentsFact)
		}
		return in.arguments(), true
	case "time":
		return types.Timestamp{Time: in.Event.Stored.UTC()}, true
	case "session.id":
		return types.String(in.Event.Session), true
	}
	if s := in.Facts.Session; s != nil {
		switch name {
		case "session.calls":
			return types.Int(s.Calls), true
		case "session.denied":
			return types.Int(s.Denied), true
		case "session.tools":
			return s.Tools, true
		case "session.labels":
			return append([]string{}, s.Labels...), true
		}
	}
	if t := in.Facts.Tool; t != nil {
		switch name {
		case "tool.digest":
			return types.String(t.SHA256), true
		case "tool.read_only":
			return types.Bool(t.ReadOnly), true
		case "tool.destructive":
			return types.Bool(t.Destructive), true
		case "tool.idempotent":
			return types.Bool(t.Idempotent), true
		case "tool.open_world":
			return types.Bool(t.OpenWorld), true
		}
	}
	if in.open != nil && isFact(name) {
		in.open.touch(name)
		return types.NewUnknown(2, types.NewAttributeTrail(name)), true
	}
	return nil, false
}

// Parent is none.
func (in *Input) Parent() cel.Activation { return nil }

// arguments are what the request asks with, read once. They are a value, an
// unknown, or an error, which any condition that looks at them comes to.
func (in *Input) arguments() ref.Val {
	if in.args == nil {
		in.args = in.readArguments()
	}
	return in.args
}

func (in *Input) readArguments() ref.Val {
	if in.anyArgs {
		return types.NewUnknown(1, types.NewAttributeTrail("args"))
	}
	if in.read == nil {
		in.read = readRequest(in.Request.Method, in.Event.Body)
	}
	v, err := in.read.args, in.read.err
	if err != nil {
		return types.NewErr("the arguments cannot be read: %s", err.Error())
	}
	if !v.Exists() {
		return types.NewStringInterfaceMap(types.DefaultTypeAdapter, map[string]any{})
	}
	return celValue(v)
}

// moreThan tells whether there is more than so much that a condition may loop over.
func (in *Input) moreThan(few int) bool {
	few -= len(in.Facts.Groups)
	if in.Facts.Session != nil {
		few -= len(in.Facts.Session.Tools) + len(in.Facts.Session.Labels)
	}
	args := 0
	if in.arguments() != nil && in.read != nil && in.read.err == nil {
		args = len(in.read.args.Raw()) // no less than their size
	}
	if args > few {
		if in.size == 0 {
			in.size = in.read.args.Size(fewSteps) // strings too, which a condition may split
		}
		args = in.size
	}
	return args > few
}

// read is what a request asks with, or why that cannot be read: then a rule that
// looks at it fails. What is there but no object is in args all the same.
type read struct {
	args jsonrpc.Value
	err  error
}

// digest is that of the arguments, or, of a request that cannot be read at all, of
// its body: only what has no arguments may pass for it, since an approval is bound
// to this.
func (r *read) digest(body []byte) string {
	if r.err != nil && !r.args.Exists() {
		return digest(body)
	}
	return digest(r.args.Raw())
}

func readRequest(method string, body []byte) *read {
	v, err := argumentsOf(method, body)
	return &read{v, err}
}

// argumentsOf finds the arguments in a request: of a tool or a prompt those
// themselves, of any other method the params. It may find none. If they are no
// object they come with an error.
func argumentsOf(method string, body []byte) (jsonrpc.Value, error) {
	m, err := jsonrpc.Decode(body, jsonrpc.Limits{})
	if err != nil {
		return jsonrpc.Value{}, err
	}
	return askedWith(method, m.Params())
}

// Arguments are what a tools/call has its tool asked with; nil: nothing. The error is
// of what policy would not take for arguments either.
func Arguments(body []byte) ([]byte, error) {
	v, err := argumentsOf(toolsCall, body)
	return v.Raw(), err
}

// askedWith is argumentsOf of the params.
func askedWith(method string, v jsonrpc.Value) (jsonrpc.Value, error) {
	if (method == toolsCall || method == promptsGet) && (v.Kind() == jsonrpc.Object || !v.Exists()) {
		for name := range v.Members() {
			// There are servers to which this is the same.
			if name != "arguments" && strings.EqualFold(name, "arguments") {
				return v.Get(name), fmt.Errorf("they are named %q, not \"arguments\"", name)
			}
		}
		v = v.Get("arguments")
	}
	if v.Exists() && v.Kind() != jsonrpc.Object {
		return v, fmt.Errorf("they are no object but %s", v.Kind())
	}
	return v, nil
}

// misnamed tells of a request without a name, as far as rules can see, whether there
// is one all the same, of which a server might think that it is it.
func misnamed(method string, body []byte) bool {
	member := "name"
	switch method {
	case toolsCall, promptsGet:
	case "resources/read", "resources/subscribe", "resources/unsubscribe":
		member = "uri"
	default:
		return false
	}
	m, err := jsonrpc.Decode(body, jsonrpc.Limits{})
	if err != nil {
		return false // nor will a server read it
	}
	for name := range m.Params().Members() {
		if name != member && strings.EqualFold(name, member) {
			return true
		}
	}
	return false
}

// celValue is a piece of JSON as a condition sees it. A number is an int if it is
// written as one and fits, else a double; one that is neither is an error to
// whoever looks at it.
func celValue(v jsonrpc.Value) ref.Val {
	switch v.Kind() {
	case jsonrpc.Bool:
		b, _ := v.Bool()
		return types.Bool(b)
	case jsonrpc.String:
		s, _ := v.Text()
		return types.String(s)
	case jsonrpc.Number:
		if i, ok := v.Int(); ok {
			return types.Int(i)
		}
		text := string(v.Raw())
		f, err := strconv.ParseFloat(text, 64)
		if err != nil || !strings.ContainsAny(text, ".eE") && math.Abs(f) >= 1<<53 {
			return types.NewErr("a number cannot be held: %s", text[:min(len(text), 40)])
		}
		return types.Double(f)
	case jsonrpc.Array:
		list := make([]ref.Val, 0, 8)
		for e := range v.Elements() {
			list = append(list, celValue(e))
		}
		return types.NewRefValList(types.DefaultTypeAdapter, list)
	case jsonrpc.Object:
		return &members{object: v}
	}
	return types.NullValue
}

// members is an object. It is read when a condition asks for a member, and a member
// when it is asked for, since conditions look at few of them. They are gone through in
// the order in which they are written, as a map's own order is chance; and a map for
// each costs more than looking at a few names. What is rarely asked for is asked of a
// map all the same.
type members struct {
	object jsonrpc.Value
	list   []member          // see all
	at     map[string]int    // of many names, where they are
	folded map[string]string // of many names, these by what they are but for case; nil: nobody has asked
}

type member struct {
	name  string
	raw   jsonrpc.Value
	value ref.Val // nil: nobody has asked
}

var _ traits.Mapper = (*members)(nil)

func (m *members) all() []member {
	if m.list != nil {
		return m.list
	}
	m.list = make([]member, 0, 8)
	for name, v := range m.object.Members() {
		m.list = append(m.list, member{name: name, raw: v})
	}
	if len(m.list) > 16 {
		m.at = make(map[string]int, len(m.list))
		for i := range m.list {
			m.at[m.list[i].name] = i
		}
	}
	return m.list
}

func (m *member) get() ref.Val {
	if m.value == nil {
		m.value = celValue(m.raw)
	}
	return m.value
}

// Find finds a member by its name. That one is there whose name is another only by
// its case is an error: there are servers to which this is the same, and a caller
// would pass by it the rule that asks whether there is such a member.
func (m *members) Find(key ref.Val) (ref.Val, bool) {
	name, ok := key.(types.String)
	if !ok {
		return nil, false
	}
	if len(m.object.Raw()) < 256 && m.list == nil { // read again in less time than it takes to keep it
		if v := m.object.Get(string(name)); v.Exists() {
			return celValue(v), true
		}
	}
	all := m.all()
	i, ok := m.at[string(name)]
	if m.at == nil {
		i = slices.IndexFunc(all, func(one member) bool { return one.name == string(name) })
		ok = i >= 0
	}
	if ok {
		return all[i].get(), true
	}
	if like, ok := m.like(string(name)); ok {
		return types.WrapErr(errVariant(like, string(name))), false
	}
	return nil, false
}

// like finds the name that is another only by its case. Of two that are alike the
// request would not have been read.
func (m *members) like(name string) (string, bool) {
	if m.at == nil {
		for i := range m.list {
			if strings.EqualFold(m.list[i].name, name) {
				return m.list[i].name, true
			}
		}
		return "", false
	}
	if m.folded == nil {
		m.folded = make(map[string]string, len(m.list))
		for i := range m.list {
			m.folded[fold(m.list[i].name)] = m.list[i].name
		}
	}
	like, ok := m.folded[fold(name)]
	return like, ok
}

// fold is the same for names that are equal but for case ([strings.EqualFold]).
func fold(name string) string {
	return strings.Map(func(r rune) rune {
		least := r
		for f := unicode.SimpleFold(r); f != r; f = unicode.SimpleFold(f) {
			least = min(least, f)
		}
		return least
	}, name)
}

// errVariant says that something is named otherwise than it should be.
func errVariant(is, should string) error {
	return fmt.Errorf("it is named %q, not %q", is, should)
}

// Contains tells whether there is a member of a name.
func (m *members) Contains(key ref.Val) ref.Val {
	v, ok := m.Find(key)
	if !ok && v != nil {
		return v
	}
	return types.Bool(ok)
}

// Get is the member of a name.
func (m *members) Get(key ref.Val) ref.Val {
	v, ok := m.Find(key)
	if !ok && v == nil {
		return types.NewErr("no such key: %v", key)
	}
	return v
}

// Iterator yields the names.
func (m *members) Iterator() traits.Iterator {
	names := make([]string, 0, 8)
	for _, one := range m.all() {
		names = append(names, one.name)
	}
	return types.NewStringList(types.DefaultTypeAdapter, names).Iterator()
}

func (m *members) asMap() traits.Mapper {
	all := map[string]any{}
	for i := range m.all() {
		all[m.list[i].name] = m.list[i].get()
	}
	return types.NewStringInterfaceMap(types.DefaultTypeAdapter, all)
}

func (m *members) Type() ref.Type                              { return types.MapType }
func (m *members) Size() ref.Val                               { return types.Int(len(m.all())) }
func (m *members) Equal(other ref.Val) ref.Val                 { return m.asMap().Equal(other) }
func (m *members) Value() any                                  { return m.asMap().Value() }
func (m *members) ConvertToType(t ref.Type) ref.Val            { return m.asMap().ConvertToType(t) }
func (m *members) ConvertToNative(t reflect.Type) (any, error) { return m.asMap().ConvertToNative(t) }

// usesAny tells whether a condition speaks of any of the variables.
func (c *condition) usesAny(names ...string) bool {
	return c != nil && slices.ContainsFunc(names, func(n string) bool { return c.uses[n] })
}
