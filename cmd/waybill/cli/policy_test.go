package cli

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"waybill.dev/bus"
	"waybill.dev/bus/embed"
	"waybill.dev/schemas"
	"waybill.dev/workers/policy"
)

// The example rules do what their tests say, and the tests notice when they do
// not.
func TestExamplePolicies(t *testing.T) {
	dir, err := filepath.Abs("../../../deploy/policies")
	if err != nil {
		t.Fatal(err)
	}
	run := func(policies string) (int, string) {
		file := filepath.Join(t.TempDir(), "waybill.yaml")
		text := "tenants: [{id: acme}]\nagents: [{id: researcher, tenant: acme, groups: [analysts]}]\n" +
			"servers: [{name: everything, mcp: {url: 'http://127.0.0.1:1/mcp'}}]\npolicies: ['" + policies + "']\n"
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		var out strings.Builder
		code := Run(t.Context(), []string{"policy", "test", "--config", file}, Env{Stdout: &out, Stderr: &out, Getenv: os.Getenv})
		return code, out.String()
	}
	if code, out := run(filepath.Join(dir, "*.yaml")); code != exitOK || !strings.Contains(out, "12 tests of 1 files, 0 failed") {
		t.Errorf("exit %d\n%s", code, out)
	}
	// Each rule is needed by some test.
	text, err := os.ReadFile(filepath.Join(dir, "tools.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	tests, err := os.ReadFile(filepath.Join(dir, "tools_test.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	rules := strings.Split(string(text), "\n  - id: ")
	for i := 1; i < len(rules); i++ {
		id, _, _ := strings.Cut(rules[i], "\n")
		if id == "account-numbers" || id == "the-web" {
			continue // they order and decide nothing
		}
		less := append(append([]string{}, rules[:i]...), rules[i+1:]...)
		other := t.TempDir()
		for name, text := range map[string][]byte{"tools.yaml": []byte(strings.Join(less, "\n  - id: ")), "tools_test.yaml": tests} {
			if err := os.WriteFile(filepath.Join(other, name), text, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		if code, out := run(filepath.Join(other, "*.yaml")); code == exitOK {
			t.Errorf("without rule %s all tests pass\n%s", id, out)
		}
	}
}

// Where files of rules are missing or not finished, nothing is put in force.
func TestRulesMidSave(t *testing.T) {
	dir := t.TempDir()
	write := func(name, text string) {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write("waybill.yaml", "tenants: [{id: acme}]\nservers: [{name: up, mcp: {url: 'http://127.0.0.1:1/mcp'}}]\npolicies: ['r/*.yaml']\n")
	if err := os.Mkdir(filepath.Join(dir, "r"), 0o700); err != nil {
		t.Fatal(err)
	}
	check := func(want string, bad bool) {
		t.Helper()
		c, err := loadConfig(filepath.Join(dir, "waybill.yaml"))
		if err != nil {
			t.Fatal(err)
		}
		_, _, err = c.compilePolicy()
		if want == "" && err != nil || want != "" && (err == nil || !strings.Contains(err.Error(), want)) {
			t.Errorf("%v, want %q", err, want)
		}
		if errors.As(err, new(badRules)) != bad {
			t.Errorf("%v: the rules are wrong: %t", err, !bad)
		}
		// What is wrong with the rules is not tried again, nor are files that are away.
		r := &rules{g: &gateway{c: c}}
		r.files = r.look()
		if err != nil && r.worthAnother(err) {
			t.Errorf("%v: is tried again", err)
		}
		var out strings.Builder
		code := Run(t.Context(), []string{"config", "check", "--config", filepath.Join(dir, "waybill.yaml")}, Env{Stdout: &out, Stderr: &out, Getenv: os.Getenv})
		if (code == exitOK) != (want == "") {
			t.Errorf("config check: exit %d\n%s", code, out.String())
		}
	}
	check("fits no file of rules", false)
	write("r/a_test.yaml", "tests: []\n")
	check("fits no file of rules", false)
	write("r/a.yaml", "")
	check("r/a.yaml:1: has no rules", true)
	write("r/a.yaml", "rules: []\n")
	check("", false)
	// One of several is away while it is saved, or there in part: what the others say
	// is not put in force.
	write("r/b.yaml", "rules:\n- {id: b, effect: forbid}\n- {id: c, effect: forbid}\n")
	c, err := loadConfig(filepath.Join(dir, "waybill.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	r := &rules{g: &gateway{c: c}, p: new(policy.Policy)}
	r.files = r.look()
	whole := r.files
	r.before = whole
	for i, step := range []struct {
		text string // of b.yaml; "": it is away
		due  bool
	}{
		{"rules:\n- {id: b, effect: forbid}\n- {id: c, effect: forbid}\n", false},
		{"", false},
		{"rules:\n- {id: b, effect: forbid}\n", false},
		{"rules:\n- {id: b, effect: forbid}\n- {id: c, effect: forbid}\n", false},
		{"rules:\n- {id: b, effect: forbid}\n", false},
		{"rules:\n- {id: b, effect: forbid}\n", true},
		{"", false},
		{"", true},
	} {
		if write("r/b.yaml", step.text); step.text == "" {
			if err := os.Remove(filepath.Join(dir, "r/b.yaml")); err != nil {
				t.Fatal(err)
			}
		}
		if due := r.due(r.look(), false); due != step.due {
			t.Errorf("look %d: due is %t", i, due)
		}
	}
	if !r.due(whole, true) {
		t.Error("who asks for it is not heeded")
	}
	if err := r.reload(t.Context(), whole, false); !errors.Is(err, errMoving) {
		t.Errorf("what was read is not what was looked at: %v", err)
	}
	if r := (&rules{files: "0a"}); !r.worthAnother(errors.New("the log is away")) {
		t.Error("what the log refused is not tried again")
	}
}

func TestWasSeen(t *testing.T) {
	for _, tt := range []struct {
		err          error
		seen, passes bool
	}{{nil, true, true}, {fmt.Errorf("x: %w", schemas.ErrNotFound), false, true}, {errors.New("the log is away"), false, false}} {
		if seen, err := wasSeen(tt.err); seen != tt.seen || (err == nil) != tt.passes {
			t.Errorf("%v: %t, %v", tt.err, seen, err)
		}
	}
}

// Who approves sees all that the call asks with.
func TestShownArgs(t *testing.T) {
	for _, tt := range []struct{ method, params, want string }{
		{"tools/call", `{"name":"x","arguments":{"a":1}}`, `{"a":1}`},
		{"tools/call", `{"name":"x","arguments":[1]}`, `[1]`},
		{"tools/call", `{"name":"x","arguments":{"a":1},"_meta":{},"task":{"ttl":1}}`, `{"a":1}`},
		{"tools/call", `{"name":"x","arguments":{"a":1},"inputResponses":{"sure":true}}`, `{"name":"x","arguments":{"a":1},"inputResponses":{"sure":true}}`},
		{"prompts/get", `{"name":"x","arguments":{"a":1}}`, `{"a":1}`},
		{"prompts/get", `{"name":"x"}`, `{"name":"x"}`},
		{"resources/read", `{"uri":"file:///etc","arguments":{}}`, `{"uri":"file:///etc","arguments":{}}`},
	} {
		body := fmt.Sprintf(`{"jsonrpc":"2.0","id":1,"method":%q,"params":%s}`, tt.method, tt.params)
		if got := string(shownArgs(tt.method, []byte(body))); got != tt.want {
			t.Errorf("%s %s: shows %s", tt.method, tt.params, got)
		}
	}
}

// A policy that is put in force and cannot be had is in force when it can, and one
// that came after it stays.
func TestPolicyThatComesLate(t *testing.T) {
	srv, err := embed.Start(embed.Options{Dir: filepath.Join(t.TempDir(), "log"), Sync: time.Minute})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = srv.Close() }()
	o := bus.Options{Dial: srv.Connect, Role: bus.RolePolicy, Log: slog.New(slog.DiscardHandler)}
	if err := bus.Setup(t.Context(), o); err != nil {
		t.Fatal(err)
	}
	l, err := bus.Open(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	sys, err := l.System(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	p, err := policy.New(policy.Options{
		Past: l.Past, Duplicates: bus.Duplicates, Now: time.Now,
		Groups:  func(schemas.Tenant, schemas.Agent) []string { return nil },
		Session: func(context.Context, schemas.Event) (*policy.SessionFacts, error) { return nil, nil },
		Load:    l.Load, Store: l.Publish,
	})
	if err != nil {
		t.Fatal(err)
	}
	r := &rules{g: &gateway{log: slog.New(slog.DiscardHandler)}, l: l, sys: sys, p: p, known: make(chan struct{}), limits: make(chan uint64, 1)}
	bundle := func(id string) (content []byte, digest string) {
		content, err := policy.Source{Servers: []string{"up"}, Files: []policy.File{{Name: "r.yaml", Text: "rules: [{id: " + id + ", effect: permit, match: {tools: [t]}}]\n"}}}.Encode()
		if err != nil {
			t.Fatal(err)
		}
		b, err := policy.Compile(content)
		if err != nil {
			t.Fatal(err)
		}
		return content, b.Digest
	}
	record := func(seq uint64, digest string) bus.Record {
		return bus.Record{Seq: seq, Kind: policyKind, Name: activePolicy, Body: fmt.Appendf(nil, `{"sha256":%q}`, digest)}
	}
	one, first := bundle("one")
	if err := r.take(t.Context(), record(1, first)); err == nil || p.Bundle() != nil || r.late == nil {
		t.Fatalf("%v, in force %v", err, p.Bundle())
	}
	two, second := bundle("two")
	if _, err := sys.Put(t.Context(), two); err != nil {
		t.Fatal(err)
	}
	late := *r.late
	if err := r.take(t.Context(), record(2, second)); err != nil || p.Bundle().Digest != second || r.late != nil {
		t.Fatalf("%v, in force %v", err, p.Bundle())
	}
	if _, err := sys.Put(t.Context(), one); err != nil {
		t.Fatal(err)
	}
	if err := r.take(t.Context(), late); err != nil || p.Bundle().Digest != second {
		t.Errorf("%v, in force is %s", err, p.Bundle().Digest)
	}
	three, third := bundle("three")
	if err := r.take(t.Context(), record(3, third)); err == nil || p.Bundle().Digest != second {
		t.Errorf("%v, in force is %s", err, p.Bundle().Digest)
	}
	if _, err := sys.Put(t.Context(), three); err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	again := make(chan error, 1)
	go func() { again <- r.retake(ctx) }()
	for p.Bundle().Digest != third {
		runtime.Gosched()
	}
	stop()
	<-again
}
