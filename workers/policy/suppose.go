package policy

import (
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"github.com/goccy/go-yaml"
	"github.com/goccy/go-yaml/ast"

	"waybill.dev/schemas"
)

// Supposed is a call that somebody thinks of, to ask what the policy would say.
type Supposed struct {
	Tenant schemas.Tenant
	Agent  schemas.Agent
	Groups []string
	Server string
	Method string // default tools/call
	Name   string
	Args   []byte // JSON; default {}
	Time   time.Time

	Calls    int           // that each limit has counted already
	Session  *SessionFacts // default: nothing before
	Tool     *ToolFacts    // default: not known
	Approval string
	Guards   map[string]string // what they say: allow, deny or failed; default allow
}

// Event is the request that the call would make, and the facts of its decision.
func (s Supposed) Event(b *Bundle) (schemas.Event, Facts) {
	if s.Method == "" {
		s.Method = toolsCall
	}
	if len(s.Args) == 0 {
		s.Args = []byte("{}")
	}
	name, _ := json.Marshal(s.Name) // a string: cannot fail
	params := fmt.Sprintf(`{"name":%s,"arguments":%s}`, name, s.Args)
	if s.Name == "" {
		params = string(s.Args)
	}
	method, _ := json.Marshal(s.Method)
	e := schemas.Event{
		Tenant: s.Tenant, Agent: s.Agent, Session: "supposed", Call: "supposed", Root: "supposed", Time: s.Time, Stored: s.Time,
		Data: &schemas.Requested{Target: schemas.Target{Protocol: "mcp", Server: s.Server, Method: s.Method, Name: s.Name}},
		Body: fmt.Appendf(nil, `{"jsonrpc":"2.0","id":1,"method":%s,"params":%s}`, method, params),
	}
	f := Facts{Groups: append([]string{}, s.Groups...), Session: s.Session, Tool: s.Tool, Approval: s.Approval}
	if f.Session == nil {
		f.Session = &SessionFacts{Tools: []string{}}
	}
	_, _, _, limits := b.NeedsOf(e)
	for _, l := range limits {
		if f.Counts == nil {
			f.Counts = map[string]int{}
		}
		f.Counts[l.key()] = s.Calls
	}
	for _, name := range b.Source.Guards {
		if f.Guards == nil {
			f.Guards = map[string]schemas.Check{}
		}
		f.Guards[name] = schemas.Check{Guard: name, Said: cmp.Or(s.Guards[name], schemas.CheckAllow), Reason: "as is supposed"}
	}
	return e, f
}

// A file of tests stands beside the rules:
//
//	tests:
//	  - name: a large transfer
//	    call: {tenant: acme, agent: ann, groups: [payers], server: payments, tool: transfer, args: {amount: 9000}}
//	    expect: deny          # permit, hold, deny
//	    rule: large           # that decides; may be left out
type testFileYAML struct {
	Tests []testYAML `yaml:"tests"`
}

type testYAML struct {
	Name   written  `yaml:"name"`
	Call   callYAML `yaml:"call"`
	Expect written  `yaml:"expect"`
	Rule   written  `yaml:"rule"`
}

type callYAML struct {
	Tenant   string   `yaml:"tenant"`
	Agent    string   `yaml:"agent"`
	Groups   []string `yaml:"groups"`
	Server   string   `yaml:"server"`
	Tool     string   `yaml:"tool"`
	Method   string   `yaml:"method"`
	Name     string   `yaml:"name"`
	Args     rawJSON  `yaml:"args"`
	Time     string   `yaml:"time"`
	Calls    int      `yaml:"calls"`    // that each limit has counted
	Approval string   `yaml:"approval"` // granted or refused

	Annotations *annotationsYAML `yaml:"annotations"` // of the tool, as rules see them; left out: they are not known

	Guards  map[string]string `yaml:"guards"` // what they say of the request: allow, the default, deny or failed
	Session *struct {
		Calls  int      `yaml:"calls"`
		Denied int      `yaml:"denied"`
		Tools  []string `yaml:"tools"`
		Labels []string `yaml:"labels"`
	} `yaml:"session"`
}

// annotationsYAML are what rules see as tool.read_only and its like. What is left out
// is as of a tool that says nothing of itself.
type annotationsYAML struct {
	ReadOnly    bool  `yaml:"read_only"`
	Destructive *bool `yaml:"destructive"`
	Idempotent  bool  `yaml:"idempotent"`
	OpenWorld   *bool `yaml:"open_world"`
}

func (y *annotationsYAML) facts() *ToolFacts {
	if y == nil {
		return nil
	}
	feared := func(said *bool) bool { return said == nil || *said }
	return &ToolFacts{ReadOnly: y.ReadOnly, Destructive: feared(y.Destructive), Idempotent: y.Idempotent, OpenWorld: feared(y.OpenWorld)}
}

// rawJSON is a value of YAML as JSON.
type rawJSON []byte

// UnmarshalYAML converts it.
func (r *rawJSON) UnmarshalYAML(n ast.Node) error {
	b, err := yaml.YAMLToJSON([]byte(n.String()))
	*r = bytes.TrimSpace(b)
	return err
}

// Result is what became of one test.
type Result struct {
	Name  string `json:"name"`
	Where string `json:"where"`
	Wrong string `json:"wrong,omitempty"` // "": it passes
}

// Test runs the tests of a file against a bundle. The error is of a file that
// cannot be read.
func (b *Bundle) Test(f File) ([]Result, error) {
	var y testFileYAML
	tree, err := f.tree("tests")
	if err == nil {
		err = f.into(tree, &y)
	}
	if err != nil {
		return nil, err
	}
	var results []Result
	var errs []error
	for i, t := range y.Tests {
		r := Result{Name: t.Name.text, Where: fmt.Sprintf("%s:%d", f.Name, max(t.Name.line, t.Expect.line))}
		if r.Name == "" {
			r.Name = fmt.Sprintf("test %d", i+1)
		}
		s := Supposed{
			Tenant: schemas.Tenant(t.Call.Tenant), Agent: schemas.Agent(t.Call.Agent), Groups: t.Call.Groups,
			Server: t.Call.Server, Method: t.Call.Method, Name: t.Call.Name, Args: t.Call.Args, Calls: t.Call.Calls, Approval: t.Call.Approval, Guards: t.Call.Guards,
			Tool: t.Call.Annotations.facts(),
		}
		if t.Call.Tool != "" {
			s.Method, s.Name = toolsCall, t.Call.Tool
		}
		if x := t.Call.Session; x != nil {
			s.Session = &SessionFacts{Calls: x.Calls, Denied: x.Denied, Tools: append([]string{}, x.Tools...), Labels: x.Labels}
		}
		if t.Call.Time != "" {
			var err error
			if s.Time, err = time.Parse(time.RFC3339, t.Call.Time); err != nil {
				errs = append(errs, fmt.Errorf("%s: time: %w", r.Where, err))
			}
		}
		if a := t.Call.Approval; a != "" && a != ApprovalGranted && a != ApprovalRefused {
			errs = append(errs, fmt.Errorf("%s: approval: %q is neither granted nor refused", r.Where, a))
		}
		for _, said := range t.Call.Guards {
			if said != schemas.CheckAllow && said != schemas.CheckDeny && said != schemas.CheckFailed {
				errs = append(errs, fmt.Errorf("%s: guards: %q is none of allow, deny and failed", r.Where, said))
			}
		}
		switch t.Expect.text {
		case "permit", "hold", "deny":
		default:
			errs = append(errs, fmt.Errorf("%s: expect: %q is none of permit, hold and deny", r.Where, t.Expect.text))
			continue
		}
		v := b.Decide(s.Event(b))
		if v.Outcome() != t.Expect.text || t.Rule.text != "" && t.Rule.text != v.Rule {
			r.Wrong = fmt.Sprintf("is %s by rule %q (%s), expected %s", v.Outcome(), v.Rule, v.Reason, t.Expect.text)
			if t.Rule.text != "" {
				r.Wrong += fmt.Sprintf(" by rule %q", t.Rule.text)
			}
			if !b.servers[t.Call.Server] {
				r.Wrong += fmt.Sprintf("; no server is configured as %q", t.Call.Server)
			}
		}
		results = append(results, r)
	}
	return results, errors.Join(errs...)
}
