package cli

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"maps"
	"net/url"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"waybill.dev/schemas"
	"waybill.dev/workers/policy"
)

// policyCheck is `waybill policy check`.
func policyCheck(ctx context.Context, env Env, args []string) error {
	fs := flag.NewFlagSet("policy check", flag.ContinueOnError)
	connect := clientFlags(fs)
	asJSON := fs.Bool("json", false, "print JSON")
	again := fs.Duration("what-if", 0, "decide all traffic of the last `D`, such as 24h, under these rules, and print what would change before they are in force; exits with 3 if anything would, with 4 if nothing is known to but of some it cannot be told")
	full := fs.Bool("full", false, "with --what-if: print each decision that would change")
	if err := none(parse(env, fs, args)); err != nil {
		return err
	}
	if *again < 0 || *full && *again == 0 {
		return usagef("--what-if: a time such as 24h, and --full goes with it")
	}
	file := cmp.Or(fs.Lookup("config").Value.String(), "waybill.yaml")
	c, err := loadConfig(file)
	if err != nil {
		return err
	}
	b, _, err := c.compilePolicy()
	if err != nil {
		return err
	}
	var files []string
	for _, f := range b.Source.Files {
		files = append(files, f.Name)
	}
	if *asJSON {
		err = env.printJSON(map[string]any{"sha256": b.Digest, "rules": b.Rules(), "files": files, "engine": policy.Engine})
	} else {
		_, err = fmt.Fprintf(env.Stdout, "%d rules of %s and %d files are valid.\nsha256  %s\nengine  %s\n", b.Rules(), file, len(files), b.Digest, policy.Engine)
		for _, f := range files {
			_, err = fmt.Fprintf(env.Stdout, "file    %s\n", f)
		}
	}
	if err != nil || *again == 0 {
		return err
	}
	gateway, err := connect(env)
	if err != nil {
		return err
	}
	w := whatIf{bundle: b, env: env, json: *asJSON, full: *full, examples: 3}
	return w.of(ctx, since(ctx, gateway, fromStream, *again, ""))
}

// errTests: some tests of the policy do not pass.
var errTests = errors.New("the policy does not do what its tests expect")

// policyTest is `waybill policy test`.
func policyTest(_ context.Context, env Env, args []string) error {
	fs := flag.NewFlagSet("policy test", flag.ContinueOnError)
	file := fs.String("config", "waybill.yaml", "configuration `FILE`")
	asJSON := fs.Bool("json", false, "print JSON, one test per line")
	verbose := fs.Bool("v", false, "print the tests that pass too")
	if err := none(parse(env, fs, args)); err != nil {
		return err
	}
	c, err := loadConfig(*file)
	if err != nil {
		return err
	}
	b, _, err := c.compilePolicy()
	if err != nil {
		return err
	}
	tests, err := c.ruleFiles(true)
	if err != nil {
		return err
	}
	run, wrong := 0, 0
	for _, f := range tests {
		results, err := b.Test(f)
		if err != nil {
			return err
		}
		for _, r := range results {
			run++
			if r.Wrong != "" {
				wrong++
			}
			switch {
			case *asJSON:
				if err := env.printJSON(r); err != nil {
					return err
				}
			case r.Wrong != "":
				_, _ = fmt.Fprintf(env.Stdout, "FAIL  %s  %s: %s\n", r.Where, r.Name, r.Wrong)
			case *verbose:
				_, _ = fmt.Fprintf(env.Stdout, "ok    %s  %s\n", r.Where, r.Name)
			}
		}
	}
	if !*asJSON {
		_, _ = fmt.Fprintf(env.Stdout, "%d tests of %d files, %d failed\n", run, len(tests), wrong)
	}
	switch {
	case wrong > 0:
		return errTests
	case run == 0:
		return fmt.Errorf("there are no tests: they stand beside the rules, in files named *%s", testFile)
	}
	return nil
}

// explanation is what `policy explain` prints.
type explanation struct {
	Call    schemas.CallID    `json:"call,omitempty"`
	Outcome string            `json:"outcome"`
	Rule    string            `json:"rule,omitempty"`
	Reason  string            `json:"reason,omitempty"`
	Policy  string            `json:"policy_sha256"`
	Facts   map[string]string `json:"facts,omitempty"`
	Rules   []policy.Line     `json:"rules"`
	Differs string            `json:"differs,omitempty"` // from what was decided
	Only    []string          `json:"only,omitempty"`

	target schemas.Target
	who    string
	n      int
}

// policyExplain is `waybill policy explain`.
func policyExplain(ctx context.Context, env Env, args []string) error {
	fs := flag.NewFlagSet("policy explain", flag.ContinueOnError)
	find := clientFlags(fs)
	asJSON := fs.Bool("json", false, "print JSON, one decision per line")
	all := fs.Bool("all", false, "print rules too that have nothing to say of the call")
	var s policy.Supposed
	agent := fs.String("agent", "", "suppose a call of this `AGENT`, without a gateway")
	tenant := fs.String("tenant", "", "of this `TENANT` (default: the agent's)")
	fs.Func("group", "the agent is in this `GROUP`; may be repeated (default: as configured)", func(g string) error {
		s.Groups = append(s.Groups, g)
		return nil
	})
	fs.StringVar(&s.Server, "server", "", "to this `SERVER`")
	tool := fs.String("tool", "", "for this `TOOL`")
	fs.StringVar(&s.Method, "method", "", "for this `METHOD` (default tools/call)")
	arguments := fs.String("args", "{}", "with these arguments, `JSON`")
	fs.IntVar(&s.Calls, "calls", 0, "`N` calls were counted already by each limit")
	at := fs.String("time", "", "at this `TIME`, such as 2026-07-28T12:00:00Z (default: now)")
	args, err := parse(env, fs, args)
	if err != nil {
		return err
	}
	var found []explanation
	switch {
	case len(args) == 1 && *agent == "":
		c, err := find(env)
		if err != nil {
			return err
		}
		if found, err = explainCall(ctx, c, args[0]); err != nil {
			return err
		}
	case len(args) == 0 && *agent != "" && s.Server != "":
		file := cmp.Or(fs.Lookup("config").Value.String(), "waybill.yaml")
		c, err := loadConfig(file)
		if err != nil {
			return err
		}
		b, _, err := c.compilePolicy()
		if err != nil {
			return err
		}
		if !json.Valid([]byte(*arguments)) {
			return usagef("--args: not JSON: %s", *arguments)
		}
		s.Agent, s.Tenant, s.Name, s.Args, s.Time = schemas.Agent(*agent), schemas.Tenant(*tenant), *tool, []byte(*arguments), time.Now()
		if *at != "" {
			if s.Time, err = time.Parse(time.RFC3339, *at); err != nil {
				return usagef("--time: %v", err)
			}
		}
		known := *tenant != ""
		for _, a := range c.Agents {
			if a.ID == s.Agent {
				known = true
				s.Tenant = cmp.Or(s.Tenant, a.Tenant)
				if s.Groups == nil {
					s.Groups = a.Groups
				}
			}
		}
		if !known {
			return usagef("--agent: %s has no agent %q; --tenant too supposes one", file, *agent)
		}
		e, facts := s.Event(b)
		found = []explanation{explain(b, e, facts, nil)}
	default:
		return usagef("name a call in the log, or suppose one with --agent, --server and --tool")
	}
	for i, x := range found {
		if !*all {
			x.Rules = slices.DeleteFunc(x.Rules, func(l policy.Line) bool { return l.Says == policy.SaysNoMatch })
		}
		if *asJSON {
			err = env.printJSON(x)
		} else {
			if i > 0 {
				_, _ = fmt.Fprintln(env.Stdout)
			}
			err = x.print(env.Stdout)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// explain decides on a request and says how it comes. was is what was decided, or
// nil.
func explain(b *policy.Bundle, e schemas.Event, facts policy.Facts, was schemas.Payload) explanation {
	v := b.Decide(e, facts)
	x := explanation{
		Outcome: v.Outcome(), Rule: v.Rule, Reason: v.Reason, Policy: b.Digest, Facts: facts.Record(),
		Rules: b.Explain(e, facts), Only: v.Only, who: fmt.Sprintf("%s of %s", e.Agent, e.Tenant),
	}
	if q, ok := e.Data.(*schemas.Requested); ok {
		x.target = q.Target
	}
	if was != nil {
		x.Call, x.Differs = e.Call, v.Differs(was)
	}
	return x
}

// explainCall explains the decisions of a recorded call, each by the policy and
// the facts that it names.
func explainCall(ctx context.Context, c *client, id string) ([]explanation, error) {
	var request schemas.Event
	var all []explanation
	for r, err := range lines[record](ctx, c, "/api/v1/calls/"+url.PathEscape(id), nil) {
		if err != nil {
			return nil, err
		}
		var d schemas.Decision
		switch data := r.Data.(type) {
		case *schemas.Requested:
			request = r.Event
			continue
		case *schemas.Authorized:
			d = data.Decision
		case *schemas.Denied:
			d = data.Decision
		case *schemas.Held:
			d = data.Decision
		default:
			continue
		}
		facts, err := policy.FactsOf(d.Facts)
		if err != nil {
			return nil, err
		}
		var b *policy.Bundle
		for raw, err := range lines[json.RawMessage](ctx, c, "/api/v1/policies/"+url.PathEscape(d.PolicySHA256), nil) {
			if err == nil {
				b, err = policy.Compile(raw)
			}
			if err != nil {
				return nil, fmt.Errorf("the policy of decision %d: %w", d.N, err)
			}
		}
		if b == nil || request.Data == nil {
			return nil, fmt.Errorf("decision %d of call %s: its request or its policy is not there", d.N, id)
		}
		x := explain(b, request, facts, r.Data)
		x.n = d.N
		all = append(all, x)
	}
	if len(all) == 0 {
		return nil, fmt.Errorf("nothing was decided on call %s", id)
	}
	return all, nil
}

func (x explanation) print(w io.Writer) error {
	word := map[string]string{"permit": "PERMITTED", "deny": "DENIED", "hold": "HELD for an approval"}[x.Outcome]
	p := func(format string, args ...any) { _, _ = fmt.Fprintf(w, format+"\n", args...) }
	p("%s", word)
	if x.n > 1 {
		p("  decision   %d of this call", x.n)
	}
	p("  what       %s by %s", target(x.target), x.who)
	switch {
	case x.Rule != "" && x.Reason != "":
		p("  because    rule %s: %s", x.Rule, visible(x.Reason))
	case x.Rule != "":
		p("  because    rule %s permits it and none says otherwise", x.Rule)
	default:
		p("  because    %s", visible(x.Reason))
	}
	for _, k := range slices.Sorted(maps.Keys(x.Facts)) {
		p("  fact       %s = %s", visible(k), visible(x.Facts[k]))
	}
	p("  policy     %s", cmp.Or(x.Policy, "none"))
	if x.Differs != "" {
		p("  DIFFERS    from what was decided: %s", x.Differs)
	}
	if len(x.Rules) == 0 {
		p("  rules      none concerns this call")
		return nil
	}
	p("  rules")
	var table strings.Builder
	t := tabwriter.NewWriter(&table, 0, 0, 2, ' ', 0)
	for _, l := range x.Rules {
		_, _ = fmt.Fprintf(t, "    %s\t%s\t%s\t%s\n", l.Rule, l.Effect, visible(l.Says), l.Where)
	}
	if err := t.Flush(); err != nil {
		return err
	}
	i := 0
	for line := range strings.Lines(table.String()) { // conditions stand between, and make no column wider
		p("%s", strings.TrimRight(line, " \n"))
		if l := x.Rules[i]; l.When != "" && l.Says != policy.SaysNoMatch {
			p("      when %s", visible(strings.Join(strings.Fields(l.When), " ")))
		}
		i++
	}
	return nil
}
