package cli

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/gowebpki/jcs"
	"pgregory.net/rapid"

	"waybill.dev/schemas"
	"waybill.dev/schemas/jsonrpc"
	"waybill.dev/workers/policy"
	"waybill.dev/workers/registry"
)

// Rules and registry together, as the roles join them: whatever servers show, people
// say and rules order, in whatever order,
//
//   - a tool is in a list exactly if the caller can call it with some arguments, or
//     ask a person to let it;
//   - what is listed, or called, is what was approved, to the byte;
//   - what was decided on before a definition changed is not carried out after.
func TestListedIsCallable(t *testing.T) {
	seen := map[string]int{}
	check := func(t *rapid.T) {
		s := newStand(t)
		for range rapid.IntRange(1, 8).Draw(t, "steps") {
			server := rapid.SampledFrom(standServers).Draw(t, "server")
			if rapid.IntRange(0, 2).Draw(t, "step") > 0 {
				var tools []definition
				for _, name := range rapid.SliceOfNDistinct(rapid.SampledFrom(standTools), 0, 3, rapid.ID).Draw(t, "tools") {
					tools = append(tools, draw(t, name))
				}
				s.lists(server, tools, seen)
			} else {
				s.says(server)
			}
			s.calls(seen)
		}
	}
	for range 3 { // so that what is rare is drawn often enough
		rapid.Check(t, check)
	}
	for _, what := range []string{"shown", "hidden by rules", "hidden by the registry", "called", "held", "carried out late", "not carried out late"} {
		if seen[what] < 20 {
			t.Errorf("%q only %d times: what is drawn says too little: %v", what, seen[what], seen)
		}
	}
}

var (
	standServers = []string{"files", "mail"} // first-use and trusted; by hand
	standTools   = []string{"t1", "t2", "u1"}
	standAgents  = []schemas.Agent{"ann", "bob"}

	// What permits and what restricts is drawn from: no two of them are at odds about
	// every value of an argument, since a list asks each rule for itself.
	permitsWhen = []string{"", "args.n > 3", `agent.id == "ann"`, "tool.read_only", `name.startsWith("t")`, `tool.digest != ""`}
	forbidsWhen = []string{"", `has(args.n) && args.n > 100`, `args.s == "x"`, `agent.id == "bob"`, "tool.destructive", `"staff" in agent.groups`}
	standArgs   = []string{`{"n":9,"s":"y"}`, `{"n":9,"s":"x"}`, `{"n":101,"s":"y"}`, `{}`, `{"n":"9","s":"y"}`}
)

// definition is a tool as a server shows it.
type definition struct{ name, text, sha256 string }

func draw(t *rapid.T, name string) definition {
	d := definition{name: name, text: fmt.Sprintf(
		`{"name":%q,"inputSchema":{"type":"object","properties":{"n":{"type":"number","description":"version %d"},"s":{"type":"string"}}},"annotations":{"readOnlyHint":%t,"destructiveHint":%t}}`,
		name, rapid.IntRange(0, 2).Draw(t, "version"), rapid.Bool().Draw(t, "reads"), rapid.Bool().Draw(t, "destroys"))}
	canonical, err := jcs.Transform([]byte(d.text))
	if err != nil {
		t.Fatal(err)
	}
	sum := sha256.Sum256(canonical)
	d.sha256 = hex.EncodeToString(sum[:])
	return d
}

// stand is rules and registry of one process, and what is expected of them.
type stand struct {
	t       *rapid.T
	pins    *pins
	records uint64
	bundle  *policy.Bundle
	judge   *judge

	is   map[registry.Ref]string // the digest that was seen last
	open map[registry.Ref]bool   // it is approved
	late map[registry.Ref]late   // the newest call that may go on
}

// late is a call that was authorized.
type late struct {
	q      *schemas.Requested
	sha256 string
	body   []byte
}

func newStand(t *rapid.T) *stand {
	s := &stand{t: t, pins: &pins{}, is: map[registry.Ref]string{}, open: map[registry.Ref]bool{}, late: map[registry.Ref]late{}}
	var err error
	s.pins.Registry, err = registry.New(registry.Options{
		Servers: map[string]registry.Mode{"files": registry.FirstUse, "mail": registry.Manual}, Trusted: map[string]bool{"files": true}, By: "test",
		Store: func(_ context.Context, name string, body []byte) (uint64, error) {
			return s.record(registry.SeenKind, name, body), nil
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	encoded, err := policy.Source{Servers: standServers, Files: []policy.File{{Name: "rules.yaml", Text: drawRules(t)}}}.Encode()
	if err != nil {
		t.Fatal(err)
	}
	if s.bundle, err = policy.Compile(encoded); err != nil {
		t.Fatal(err)
	}
	s.judge = &judge{pins: s.pins, bundles: map[string]*policy.Bundle{s.bundle.Digest: s.bundle}}
	return s
}

func drawRules(t *rapid.T) string {
	var b strings.Builder
	b.WriteString("rules:\n  - {id: list, effect: permit, match: {methods: [tools/list]}}\n")
	for i := range rapid.IntRange(1, 5).Draw(t, "rules") {
		effect := rapid.SampledFrom([]string{"permit", "permit", "permit", "forbid", "require_approval", "oblige"}).Draw(t, "effect")
		when := permitsWhen
		if effect != "permit" {
			when = forbidsWhen
		}
		some := func(what string, from ...string) string {
			return "[" + strings.Join(rapid.SliceOfNDistinct(rapid.SampledFrom(from), 1, 2, rapid.ID).Draw(t, what), ", ") + "]"
		}
		fmt.Fprintf(&b, "  - {id: r%d, effect: %s, match: {agents: %s, servers: %s, tools: %s}, when: '%s'", i, effect,
			some("agents", "ann", "'*'"), some("servers", "files", "mail", "'*'"), some("names", "t1", "'t*'", "'*'"), rapid.SampledFrom(when).Draw(t, "when"))
		if effect == "oblige" {
			b.WriteString(", obligations: {tags: [seen]}")
		}
		b.WriteString("}\n")
	}
	return strings.ReplaceAll(b.String(), ", when: ''", "")
}

func (s *stand) record(kind, name string, body []byte) uint64 {
	s.records++
	if err := s.pins.Record(kind, name, s.records, body); err != nil {
		s.t.Fatal(err)
	}
	return s.records
}

// decide is what the policy role stores for a request.
func (s *stand) decide(agent schemas.Agent, server, method, name, args string) schemas.Event {
	at := time.Unix(1e9, 0).UTC()
	e := schemas.Event{
		Tenant: "acme", Session: "s1", Call: "c1", Root: "c1", Agent: agent, Edge: "e1", Time: at, Stored: at, Seq: 7,
		Trace: "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
		Data: &schemas.Requested{
			Target: schemas.Target{Protocol: "mcp", Server: server, Method: method, Name: name}, Revision: "2026-07-28", Deadline: at.Add(time.Minute),
		},
		Body: fmt.Appendf(nil, `{"jsonrpc":"2.0","id":1,"method":%q,"params":{"name":%q,"arguments":%s}}`, method, name, args),
	}
	none := errors.New("not in this test")
	p, err := policy.New(policy.Options{
		Bundle: s.bundle, Duplicates: time.Minute, Now: func() time.Time { return at },
		Past: func(context.Context, schemas.Event) ([]schemas.Event, error) { return nil, none },
		Groups: func(_ schemas.Tenant, a schemas.Agent) []string {
			return map[schemas.Agent][]string{"ann": {}, "bob": {"staff"}}[a]
		},
		Defined: s.pins.defined,
		Load:    func(context.Context, uint64) (schemas.Event, error) { return schemas.Event{}, none },
		Store:   func(context.Context, schemas.Event) (schemas.Receipt, error) { return schemas.Receipt{}, none },
		Claim:   func(context.Context, string, []byte, uint64) (uint64, error) { return 0, none },
	})
	if err != nil {
		s.t.Fatal(err)
	}
	var out schemas.Event
	if err := p.Handle(context.Background(), e, func(_ context.Context, e schemas.Event) (schemas.Receipt, error) {
		out = e
		return schemas.Receipt{}, nil
	}); err != nil || out.Data == nil {
		s.t.Fatalf("%s of %s: %v", method, server, err)
	}
	return out
}

// lists is each agent's list of what a server shows.
func (s *stand) lists(server string, tools []definition, seen map[string]int) {
	var texts []string
	for _, d := range tools {
		texts = append(texts, d.text)
		ref := registry.Ref{Server: server, Kind: registry.Tool, Name: d.name}
		switch was, known := s.is[ref]; {
		case !known:
			s.open[ref] = server == "files"
		case was != d.sha256:
			s.open[ref] = false
		}
		s.is[ref] = d.sha256
	}
	result, err := jsonrpc.Parse([]byte(`{"tools":[`+strings.Join(texts, ",")+`]}`), jsonrpc.Limits{})
	if err != nil {
		s.t.Fatal(err)
	}
	for _, agent := range standAgents {
		decision := s.decide(agent, server, "tools/list", "", "{}")
		a, ok := decision.Data.(*schemas.Authorized)
		if !ok {
			s.t.Fatalf("the list: %+v", decision.Data)
		}
		may, err := s.pins.definitions().Listed(context.Background(), server, "tools/list", result)
		if err != nil || len(may) != len(tools) {
			s.t.Fatal(may, err)
		}
		shows, err := s.judge.shows(context.Background(), decision)
		if err != nil {
			s.t.Fatal(err)
		}
		for i, d := range tools {
			ref := registry.Ref{Server: server, Kind: registry.Tool, Name: d.name}
			// As dispatch filters a list ([dispatch.Call].shows).
			byRules := a.Only == nil || slices.ContainsFunc(a.Only, func(p string) bool { return schemas.Match(p, d.name) })
			byRules = byRules && (!a.Each || shows(d.name))
			shown := byRules && may[i]
			if may[i] != s.open[ref] {
				s.t.Errorf("%s/%s: the registry shows it: %t, approved as it is: %t", server, d.name, may[i], s.open[ref])
			}
			callable := slices.ContainsFunc(standArgs, func(args string) bool { return s.goesOn(agent, server, d.name, args) != "" })
			if shown != callable {
				s.t.Errorf("%s/%s of %s is shown: %t (by rules %t), callable: %t\n%s", server, d.name, agent, shown, byRules, callable, s.bundle.Source.Files[0].Text)
			}
			switch {
			case shown:
				seen["shown"]++
			case may[i]:
				seen["hidden by rules"]++
			default:
				seen["hidden by the registry"]++
			}
		}
	}
}

// goesOn tells whether a call is carried out or held, "" if neither. What goes on is
// what was approved.
func (s *stand) goesOn(agent schemas.Agent, server, tool, args string) string {
	e := s.decide(agent, server, "tools/call", tool, args)
	ref := registry.Ref{Server: server, Kind: registry.Tool, Name: tool}
	digest, how := "", ""
	switch d := e.Data.(type) {
	case *schemas.Authorized:
		if why, unlisted := s.pins.definitions().Admit(&d.Requested, d.ToolSHA256, e.Body); why != "" || unlisted {
			if d.ToolSHA256 != "" {
				s.t.Errorf("%s/%s is authorized, and not called: %s", server, tool, why)
			}
			return "" // nothing is known of it: it has to be listed first
		}
		digest, how = d.ToolSHA256, "called"
		s.late[ref] = late{&d.Requested, d.ToolSHA256, e.Body}
	case *schemas.Held:
		if digest, how = d.ToolSHA256, "held"; digest == "" {
			return ""
		}
	default:
		return ""
	}
	if !s.open[ref] || digest != s.is[ref] {
		s.t.Errorf("%s/%s is %s as %q; seen was %q, approved: %t", server, tool, how, digest, s.is[ref], s.open[ref])
	}
	return how
}

// calls tries all there is, and again what was authorized before.
func (s *stand) calls(seen map[string]int) {
	for ref, l := range s.late {
		why, unlisted := s.pins.definitions().Admit(l.q, l.sha256, l.body)
		if goes := why == "" && !unlisted; goes != (s.open[ref] && s.is[ref] == l.sha256) {
			s.t.Errorf("%s/%s, authorized as %s, goes on: %t; it is %s, approved: %t", ref.Server, ref.Name, l.sha256, goes, s.is[ref], s.open[ref])
		} else if goes {
			seen["carried out late"]++
		} else {
			seen["not carried out late"]++
		}
	}
	for _, server := range standServers {
		for _, tool := range standTools {
			for _, agent := range standAgents {
				for _, args := range standArgs[:2] {
					seen[s.goesOn(agent, server, tool, args)]++
				}
			}
		}
	}
}

// says is what an operator says of something, or of what it was.
func (s *stand) says(server string) {
	entries := slices.DeleteFunc(s.pins.Entries(false), func(e registry.Entry) bool { return e.Server != server })
	if len(entries) == 0 {
		return
	}
	e := rapid.SampledFrom(entries).Draw(s.t, "entry")
	w := registry.Word{Ref: e.Ref, Said: rapid.SampledFrom([]string{registry.Approved, registry.Approved, registry.Quarantined}).Draw(s.t, "said"), By: "ann", SHA256: e.SHA256}
	if rapid.IntRange(0, 3).Draw(s.t, "of another") == 0 {
		w.SHA256 = draw(s.t, e.Name).sha256
	}
	body, err := registry.EncodeWord(w)
	if err != nil {
		s.t.Fatal(err)
	}
	s.record(registry.WordKind, registry.RecordName(server), body)
	switch {
	case w.Said == registry.Quarantined:
		s.open[e.Ref] = false
	case w.SHA256 == s.is[e.Ref]:
		s.open[e.Ref] = true
	}
}
