package policy

import (
	"context"
	"strings"
	"testing"
	"time"

	"waybill.dev/schemas"
)

// What the registry says comes before the rules, is part of the decision, and is
// told only to who could list the tool.
func TestDefined(t *testing.T) {
	const digest = "5ca1ab1e"
	for name, c := range map[string]struct {
		allow   []Allow
		rules   string
		defined Defined
		args    string
		want    string // permit or deny
		reason  string
		told    string
	}{
		"fits":           {nil, "", Defined{SHA256: digest}, `{"n":1}`, "permit", "", ""},
		"refused":        {nil, "", Defined{SHA256: digest, Refused: "the tool is quarantined: it has changed"}, `{"n":1}`, "deny", "the tool is quarantined", ""},
		"does not fit":   {nil, "", Defined{SHA256: digest, Arguments: "/n must be number and is string"}, `{"n":"1"}`, "deny", "do not fit the tool's input schema: /n", "/n must be number and is string"},
		"no object":      {nil, "", Defined{SHA256: digest}, `[1]`, "deny", "cannot be read as an object", "they cannot be read as an object"},
		"not to be told": {[]Allow{{Agents: []string{"*"}, Servers: []string{"*"}, Tools: []string{"other"}}}, "", Defined{SHA256: digest, Arguments: "/n must be number and is string"}, `{"n":"1"}`, "deny", "do not fit", ""},
		"both":           {nil, "", Defined{SHA256: digest, Refused: "the tool is quarantined", Arguments: "/n"}, `{"n":"1"}`, "deny", "quarantined", ""},
		"a fact that a rule asks for": {[]Allow{}, `rules: [{id: reads, effect: permit, match: {agents: ["*"], servers: ["*"], tools: ["*"]}, when: tool.read_only}]`,
			Defined{SHA256: digest, Tool: &ToolFacts{SHA256: digest, ReadOnly: true}}, `{"n":1}`, "permit", "", ""},
		"and that is not so": {[]Allow{}, `rules: [{id: reads, effect: permit, match: {agents: ["*"], servers: ["*"], tools: ["*"]}, when: tool.read_only}]`,
			Defined{SHA256: digest, Tool: &ToolFacts{SHA256: digest, Destructive: true}}, `{"n":1}`, "deny", "no rule permits", ""},
		"and that is not known": {[]Allow{}, `rules: [{id: reads, effect: permit, match: {agents: ["*"], servers: ["*"], tools: ["*"]}, when: tool.read_only}]`,
			Defined{}, `{"n":1}`, "deny", "no rule permits", ""},
	} {
		t.Run(name, func(t *testing.T) {
			if c.allow == nil {
				c.allow = []Allow{{Agents: []string{"*"}, Servers: []string{"*"}, Tools: []string{"*"}}}
			}
			for i := range c.allow {
				c.allow[i].ID = "allow"
			}
			e := with("t", c.args)
			e.Tenant, e.Agent, e.Stored = "acme", "ann", time.Unix(1e9, 0)
			server := e.Data.(*schemas.Requested).Server
			s := Source{Servers: []string{server}, Allow: c.allow}
			if c.rules != "" {
				s.Files = []File{{"rules.yaml", c.rules}}
			}
			encoded, err := s.Encode()
			if err != nil {
				t.Fatal(err)
			}
			b, err := Compile(encoded)
			if err != nil {
				t.Fatal(err)
			}
			p, err := New(Options{Bundle: b, Past: nothing, Duplicates: time.Minute, Now: func() time.Time { return e.Stored },
				Defined: func(q *schemas.Requested, arguments []byte) Defined {
					if q.Name != "t" || string(arguments) != c.args {
						t.Errorf("asked about %s of %s", arguments, q.Name)
					}
					return c.defined
				}})
			if err != nil {
				t.Fatal(err)
			}
			var out schemas.Event
			if err := p.Handle(t.Context(), e, func(_ context.Context, e schemas.Event) (schemas.Receipt, error) {
				out = e
				return schemas.Receipt{}, nil
			}); err != nil {
				t.Fatal(err)
			}
			var d schemas.Decision
			got, told := "deny", ""
			switch data := out.Data.(type) {
			case *schemas.Authorized:
				got, d = "permit", data.Decision
			case *schemas.Denied:
				d, told = data.Decision, data.Arguments
			}
			if got != c.want || !strings.Contains(d.Reason, c.reason) || told != c.told || d.ToolSHA256 != c.defined.SHA256 {
				t.Errorf("%s, told %q: %+v", got, told, d)
			}
			// Replay has the same facts, and so decides the same.
			facts, err := FactsOf(d.Facts)
			if err != nil {
				t.Fatal(err)
			}
			if diff := b.Decide(e, facts).Differs(out.Data); diff != "" {
				t.Error(diff)
			}
		})
	}
}
