package policy

import (
	"cmp"
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strings"
	"time"

	"cel.dev/cel-go/cel"
	"github.com/goccy/go-yaml"
	"github.com/goccy/go-yaml/ast"
	"github.com/goccy/go-yaml/parser"
)

// A file of rules is a kind of rule too: YAML, read strictly.
//
//	rules:
//	  - id: large-transfers          # unique; decisions name it
//	    effect: forbid               # permit, forbid, require_approval, oblige
//	    match:                       # patterns, * stands for any run of characters; left out: any
//	      tenants: [acme]
//	      agents: ["*"]
//	      groups: [payers]           # the agent is in one of them
//	      servers: [payments]
//	      tools: ["transfer*"]       # tools/call of these; else methods:
//	    when: has(args.amount) && args.amount > 5000
//	    reason: amounts over 5000 go another way
//	    obligations:                 # not of a forbid
//	      redact: [to.iban]
//	      tags: [money]
//	      deadline: 10s
//	      limit: {calls: 60, per: 1m, by: [agent, tool]}
//	      redact_result: [structuredContent.iban, content.*.text]   # of the result
//	      max_result: 65536        # bytes that the server may say
//	      labels: [untrusted]      # session.labels of what is asked in the session later
//	      guards:                  # of the configuration, whom to ask
//	        - {name: shield, on: [request, answer], failure: deny}
//	    wait: 5m                     # of require_approval: how long it waits
//
// All rules are asked; default deny; forbid over require_approval over permit. A
// condition that fails makes its rule fire, but for a permit, which then does not.
// A file is one document and has the key rules; a key has a value or is left out.

type fileYAML struct {
	Rules *[]ruleYAML `yaml:"rules"`
}

type ruleYAML struct {
	ID          written          `yaml:"id"`
	Effect      written          `yaml:"effect"`
	Match       matchYAML        `yaml:"match"`
	When        written          `yaml:"when"`
	Reason      written          `yaml:"reason"`
	Obligations *obligationsYAML `yaml:"obligations"`
	Wait        written          `yaml:"wait"`

	line int
}

type matchYAML struct {
	Tenants *[]name `yaml:"tenants"`
	Agents  *[]name `yaml:"agents"`
	Groups  *[]name `yaml:"groups"`
	Servers *[]name `yaml:"servers"`
	Methods *[]name `yaml:"methods"`
	Tools   *[]name `yaml:"tools"`
}

type obligationsYAML struct {
	Redact   []name     `yaml:"redact"`
	Tags     []name     `yaml:"tags"`
	Deadline written    `yaml:"deadline"`
	Limit    *limitYAML `yaml:"limit"`

	RedactResult []name      `yaml:"redact_result"`
	MaxResult    *int        `yaml:"max_result"`
	Labels       []name      `yaml:"labels"`
	Guards       []guardYAML `yaml:"guards"`
}

type guardYAML struct {
	Name    written  `yaml:"name"`
	On      []string `yaml:"on"`
	Failure string   `yaml:"failure"`
}

type limitYAML struct {
	Calls int      `yaml:"calls"`
	Per   written  `yaml:"per"`
	By    []string `yaml:"by"`
}

// written is a text, and where it stands.
type written struct {
	text string
	line int
}

// UnmarshalYAML reads a text.
func (w *written) UnmarshalYAML(n ast.Node) error {
	w.line = n.GetToken().Position.Line
	if l, ok := n.(*ast.LiteralNode); ok {
		w.line = l.Start.Position.Line + 1
	}
	var err error
	w.text, err = textOf(n)
	return err
}

// name is a text in a list.
type name string

// UnmarshalYAML reads a text.
func (w *name) UnmarshalYAML(n ast.Node) error {
	text, err := textOf(n)
	*w = name(text)
	return err
}

// textOf is a text as it is written, also where YAML would read something else: the
// tool 0x10 is not the tool 16.
func textOf(n ast.Node) (text string, err error) {
	switch n.(type) {
	case *ast.IntegerNode, *ast.FloatNode, *ast.BoolNode, *ast.InfinityNode, *ast.NanNode:
		return n.GetToken().Value, nil
	}
	err = yaml.NodeToValue(n, &text, yaml.Strict())
	return text, err
}

func texts(words []name) (all []string) {
	for _, w := range words {
		all = append(all, string(w))
	}
	return all
}

// UnmarshalYAML reads a rule.
func (w *ruleYAML) UnmarshalYAML(n ast.Node) error {
	type plain ruleYAML
	err := yaml.NodeToValue(n, (*plain)(w), yaml.Strict())
	w.line = n.GetToken().Position.Line
	return err
}

// rulesOf compiles files of rules, in the order of their IDs. The error is all
// that is wrong with them.
func rulesOf(files []File) ([]Rule, error) {
	if len(files) == 0 {
		return nil, nil
	}
	env, err := environment()
	if err != nil {
		return nil, fmt.Errorf("conditions: %w", err)
	}
	var rules []Rule
	var errs []error
	at := map[string]string{}
	for _, f := range files {
		list, bad := f.read()
		errs = append(errs, bad...)
		for i := range list {
			w := &list[i]
			r, bad := w.rule(env, f.Name)
			errs = append(errs, bad...)
			if other := at[w.ID.text]; other != "" && w.ID.text != "" {
				errs = append(errs, fmt.Errorf("%s:%d: another rule at %s is called %s", f.Name, w.line, other, w.ID.text))
			}
			at[w.ID.text] = fmt.Sprintf("%s:%d", f.Name, w.line)
			rules = append(rules, r)
		}
	}
	slices.SortStableFunc(rules, func(a, b Rule) int { return cmp.Compare(a.ID, b.ID) })
	return rules, errors.Join(errs...)
}

// read reads the rules of a file. What the reader of YAML would pass over in
// silence is refused here, since a rule that is not read, or is read without its
// match, may be the one that forbids.
func (f File) read() ([]ruleYAML, []error) {
	tree, err := f.tree("rules")
	if err != nil {
		return nil, []error{err}
	}
	var errs []error
	for _, d := range tree.Docs {
		if d.Body == nil {
			continue
		}
		for _, n := range nulls(d.Body) {
			errs = append(errs, fmt.Errorf("%s:%d: %s: has no value; leave the key out if that is what is meant", f.Name, n.GetToken().Position.Line, strings.TrimPrefix(n.GetPath(), "$.")))
		}
	}
	var y fileYAML
	if len(errs) == 0 {
		if err := f.into(tree, &y); err != nil {
			errs = append(errs, err)
		} else if y.Rules == nil {
			// As it looks while it is being written.
			errs = append(errs, fmt.Errorf("%s:1: has no rules; of a file that is to have none, `rules: []` says so", f.Name))
		}
	}
	if len(errs) > 0 {
		return nil, errs
	}
	return *y.Rules, nil
}

// tree parses a file of rules, or of tests, which is one document.
func (f File) tree(what string) (*ast.File, error) {
	tree, err := parser.ParseBytes([]byte(strings.TrimPrefix(f.Text, "\ufeff")), 0)
	if err != nil {
		return nil, inFile(f.Name, err)
	}
	if len(tree.Docs) > 1 {
		line := 1
		if start := tree.Docs[1].Start; start != nil {
			line = start.Position.Line
		}
		return nil, fmt.Errorf("%s:%d: another document begins, and a file of %s is one, without directives", f.Name, line, what)
	}
	return tree, nil
}

// into reads what was parsed.
func (f File) into(tree *ast.File, v any) (err error) {
	for _, d := range tree.Docs {
		if d.Body == nil {
			continue
		}
		for _, t := range ast.Filter(ast.TagType, d.Body) { // which the decoder cannot take everywhere
			return fmt.Errorf("%s:%d: has a tag (%s); there are none here", f.Name, t.GetToken().Position.Line, t.GetToken().Value)
		}
	}
	defer func() {
		if recover() != nil { // the decoder's
			err = fmt.Errorf("%s: cannot be read as YAML", f.Name)
		}
	}()
	if err := yaml.UnmarshalWithOptions([]byte(strings.TrimPrefix(f.Text, "\ufeff")), v, yaml.Strict()); err != nil {
		return inFile(f.Name, err)
	}
	return nil
}

// nulls are the places where a key or an element has no value, by whatever spelling.
func nulls(n ast.Node) []ast.Node {
	all := ast.Filter(ast.NullType, n)
	for _, t := range ast.Filter(ast.TagType, n) {
		if t.(*ast.TagNode).Start.Value == "!!null" {
			all = append(all, t)
		}
	}
	return all
}

var (
	yamlPlace = regexp.MustCompile(`^\[(\d+):(\d+)\] `)
	yamlType  = regexp.MustCompile(`cannot unmarshal (.*) into Go .* of type (\S+)`)
	ruleID    = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$`)
)

// inFile words what yaml says with the file's name and the line.
func inFile(name string, err error) error {
	text := strings.TrimSpace(yaml.FormatError(err, false, false))
	text = yamlType.ReplaceAllString(text, "wrong type: $1 for $2")
	if at := yamlPlace.FindStringSubmatch(text); at != nil {
		return fmt.Errorf("%s:%s: %s", name, at[1], text[len(at[0]):])
	}
	return fmt.Errorf("%s: %s", name, text)
}

// rule compiles one rule; what comes beside errors is of no use.
func (w *ruleYAML) rule(env *cel.Env, file string) (Rule, []error) {
	var errs []error
	bad := func(line int, format string, args ...any) {
		where := fmt.Sprintf("%s:%d: ", file, cmp.Or(line, w.line))
		if w.ID.text != "" {
			where += "rule " + w.ID.text + ": "
		}
		errs = append(errs, fmt.Errorf(where+format, args...))
	}
	r := Rule{ID: w.ID.text, Reason: w.Reason.text, where: fmt.Sprintf("%s:%d", file, w.line), when: strings.TrimSpace(w.When.text)}
	if !ruleID.MatchString(w.ID.text) {
		bad(w.ID.line, "id: %q is not 1 to 64 letters, digits, dots, hyphens and underscores", w.ID.text)
	}
	switch w.Effect.text {
	case "permit":
		r.Effect = Permit
	case "forbid":
		r.Effect = Forbid
	case "require_approval":
		r.Effect = Approve
	case "oblige":
		r.Effect = Oblige
	default:
		bad(w.Effect.line, "effect: %q is none of permit, forbid, require_approval and oblige", w.Effect.text)
	}
	if len(r.Reason) > 500 {
		bad(w.Reason.line, "reason: has %d bytes, may have 500", len(r.Reason))
	}
	s := selectors{tools: patterns{all: true}}
	choose := func(key string, words *[]name) (_ patterns, list []string, _ bool) {
		if words == nil {
			return patterns{}, nil, false
		}
		list = texts(*words)
		if len(list) == 0 {
			bad(w.line, "match.%s: is empty, so the rule would concern nothing; leave it out for any", key)
		}
		for _, p := range list {
			if err := checkPattern(p); err != nil {
				bad(w.line, "match.%s: %q: %v", key, p, err)
			}
		}
		return ready(list), list, true
	}
	s.tenants, _, s.byTenant = choose("tenants", w.Match.Tenants)
	s.agents, _, s.byAgent = choose("agents", w.Match.Agents)
	s.groups, _, s.byGroup = choose("groups", w.Match.Groups)
	s.servers, r.Servers, s.byServer = choose("servers", w.Match.Servers)
	s.methods, r.Methods, s.byMethod = choose("methods", w.Match.Methods)
	if p, list, ok := choose("tools", w.Match.Tools); ok {
		if s.byMethod {
			bad(w.line, "match: tools and methods exclude each other: tools means tools/call of these")
		}
		s.tools, s.toolList = p, list
		s.methods, s.byMethod, r.Methods = ready([]string{toolsCall}), true, []string{toolsCall}
		if p.all {
			s.toolList = []string{"*"}
		}
	} else {
		s.toolList = []string{"*"}
	}
	if w.When.line > 0 {
		c, err := compileCondition(env, w.When.text)
		if e := new(conditionError); errors.As(err, &e) {
			bad(w.When.line+e.line-1, "when: column %d: %s", e.column, e.what)
		} else if err != nil {
			bad(w.When.line, "when: %v", err)
		}
		s.when = c
		if c.usesAny("args") && !s.byMethod {
			bad(w.When.line, "when: speaks of args, which differ from method to method: match needs tools or methods")
		}
	}
	r.Obligations = w.obligations(&r, bad)
	if w.Wait.line > 0 {
		d, err := duration(w.Wait.text, time.Second, 24*time.Hour)
		if err != nil {
			bad(w.Wait.line, "wait: %v", err)
		}
		if r.Effect != Approve {
			bad(w.Wait.line, "wait: is for require_approval")
		}
		r.Obligations.Wait = d
	}
	s.arm(&r)
	return r, errs
}

func (w *ruleYAML) obligations(r *Rule, bad func(int, string, ...any)) (o Obligations) {
	y := w.Obligations
	if y == nil {
		return o
	}
	if r.Effect == Forbid {
		bad(w.line, "obligations: a forbid lets nothing go on that they could be for")
	}
	paths := func(key string, list []name, such string) (all []string) {
		for _, p := range texts(list) {
			if p == "" || len(p) > 200 || slices.Contains(strings.Split(p, "."), "") {
				bad(w.line, "obligations.%s: %q is no path such as %s", key, p, such)
			}
			all = append(all, p)
		}
		return all
	}
	o.Redact = paths("redact", y.Redact, "to.iban or items.*.note")
	o.RedactResult = paths("redact_result", y.RedactResult, "structuredContent.iban or content.*.text")
	words := func(key string, list []name) (all []string) {
		for _, t := range texts(list) {
			if !ruleID.MatchString(t) {
				bad(w.line, "obligations.%s: %q is not 1 to 64 letters, digits, dots, hyphens and underscores", key, t)
			}
			all = append(all, t)
		}
		return all
	}
	o.Tags, o.Labels = words("tags", y.Tags), words("labels", y.Labels)
	if m := y.MaxResult; m != nil {
		if *m < 1 || *m > maxResult {
			bad(w.line, "obligations.max_result: %d is not between 1 and %d bytes", *m, maxResult)
		}
		o.MaxResult = *m
	}
	for _, g := range y.Guards {
		if !ruleID.MatchString(g.Name.text) {
			bad(g.Name.line, "obligations.guards: %q is not the name of a guard", g.Name.text)
		}
		it := Guard{Name: g.Name.text, Request: g.On == nil, Answer: g.On == nil, Open: g.Failure == "allow"}
		for _, on := range g.On {
			switch on {
			case "request":
				it.Request = true
			case "answer":
				it.Answer = true
			default:
				bad(g.Name.line, "obligations.guards: on: %q is neither request nor answer", on)
			}
		}
		if !it.Request && !it.Answer {
			bad(g.Name.line, "obligations.guards: %s is asked about nothing; leave `on` out for both", g.Name.text)
		}
		if g.Failure != "" && g.Failure != "deny" && g.Failure != "allow" {
			bad(g.Name.line, "obligations.guards: failure: %q is neither deny nor allow", g.Failure)
		}
		o.Guards = append(o.Guards, it)
	}
	if len(y.Guards) > maxGuards {
		bad(w.line, "obligations.guards: %d, may be %d", len(y.Guards), maxGuards)
	}
	if y.Deadline.line > 0 {
		d, err := duration(y.Deadline.text, time.Millisecond, 24*time.Hour)
		if err != nil {
			bad(y.Deadline.line, "obligations.deadline: %v", err)
		}
		o.Deadline = d
	}
	if l := y.Limit; l != nil {
		per, err := duration(l.Per.text, time.Second, time.Hour)
		if err != nil {
			bad(l.Per.line, "obligations.limit.per: %v", err)
		}
		if l.Calls < 1 || l.Calls > maxLimit {
			bad(w.line, "obligations.limit.calls: %d is not between 1 and %d", l.Calls, maxLimit)
		}
		if len(l.By) == 0 {
			bad(w.line, "obligations.limit.by: name whose calls are counted: agent, tenant, server, tool or session")
		}
		for _, by := range l.By {
			if !slices.Contains([]string{"agent", "tenant", "server", "tool", "session"}, by) {
				bad(w.line, "obligations.limit.by: %q is none of agent, tenant, server, tool and session", by)
			}
		}
		o.limit = &limitRule{Calls: l.Calls, Per: per, By: slices.Clone(l.By)}
	}
	return o
}

// maxLimit bounds the calls of a limit: the time of each is kept while it counts.
const maxLimit = 10_000

// Bounds of what rules order for answers.
const (
	maxResult = 4 << 20 // bytes; more is not passed on in any case
	maxGuards = 4       // of one rule
)

func duration(text string, least, most time.Duration) (time.Duration, error) {
	d, err := time.ParseDuration(text)
	if err == nil && (d < least || d > most) {
		err = fmt.Errorf("%s is not between %s and %s", d, least, most)
	}
	return d, err
}

// selectors are the match and the condition of a rule, made ready.
type selectors struct {
	tenants, agents, groups, servers, methods, tools patterns
	byTenant, byAgent, byGroup, byServer, byMethod   bool
	toolList                                         []string // of tools, for Match.Tools
	when                                             *condition
}

// arm makes a rule of them.
func (s *selectors) arm(r *Rule) {
	r.Match = s.matcher(r.Effect)
	r.needs = s.needs(r)
}

// who tells whether the rule concerns the caller and the server, as far as that
// can be told without its groups.
func (s *selectors) who(in *Input) bool {
	return (!s.byTenant || s.tenants.match(string(in.Event.Tenant))) &&
		(!s.byAgent || s.agents.match(string(in.Event.Agent))) &&
		(!s.byServer || s.servers.match(in.Request.Server))
}

// what tells whether the rule concerns what is asked.
func (s *selectors) what(method, name string) bool {
	if s.byMethod && !s.methods.match(method) {
		return false
	}
	return method != toolsCall || s.tools.all || name != "" && s.tools.match(name)
}

// errGroups: a rule asks for the caller's groups and nobody knows them.
var errGroups = errors.New("the groups of the agent are not known")

func (s *selectors) inGroup(in *Input) (bool, error) {
	if !s.byGroup {
		return true, nil
	}
	if in.Facts.Groups == nil {
		return false, errGroups
	}
	return slices.ContainsFunc(in.Facts.Groups, func(g string) bool { return s.groups.match(g) }), nil
}

// matcher is the rule's Match.
func (s *selectors) matcher(effect Effect) func(*Input) (Match, error) {
	return func(in *Input) (m Match, err error) {
		if !s.who(in) {
			return m, nil
		}
		q := in.Request
		list := q.Method == toolsList && (!s.byMethod || s.methods.match(toolsCall))
		direct := s.what(q.Method, q.Name)
		if !list && !direct {
			return m, nil
		}
		in1, err := s.inGroup(in)
		open := in.open != nil && err != nil
		if open { // it may be in one, or not
			in.open.touch(groupsFact)
			in.open.list = in.open.list || list
			in1, err = true, nil
			defer func() { m.Applies, m.Maybe = false, m.Applies || m.Maybe || err != nil }()
		}
		if list && (in1 || err != nil) {
			switch effect {
			case Permit:
				if err == nil {
					m.Tools, m.Each = s.toolList, s.when != nil
				}
			case Forbid:
				m.Each = true
			}
		}
		if err != nil && !direct {
			return m, nil // it has nothing to say of the listing itself; Shows fails on it for each tool
		}
		if err != nil || !in1 || !direct {
			return m, err
		}
		if s.when == nil {
			m.Applies = true
			return m, nil
		}
		t, err := s.when.eval(in)
		if err != nil {
			return m, err
		}
		m.Applies, m.Maybe, m.Selected = t == yes, t == maybe, true
		return m, nil
	}
}

// needs tells which facts the rule may look at.
func (s *selectors) needs(r *Rule) func(*Input) needs {
	fixed := needs{
		groups:  s.byGroup || s.when.usesAny("agent.groups"),
		session: s.when.usesAny("session.calls", "session.denied", "session.tools", "session.labels"),
		tool:    s.when.usesAny("tool.digest", "tool.read_only", "tool.destructive", "tool.idempotent", "tool.open_world"),
	}
	r.asks = fixed
	limited := *r
	return func(in *Input) needs {
		q := in.Request
		if !s.who(in) || !s.what(q.Method, q.Name) && (q.Method != toolsList || s.byMethod && !s.methods.match(toolsCall)) {
			return needs{}
		}
		n := fixed
		if l, ok := limited.limit(in); ok && s.what(q.Method, q.Name) {
			n.limits = []Limit{l}
		}
		return n
	}
}
