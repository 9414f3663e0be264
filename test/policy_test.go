package test

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"waybill.dev/schemas"
	"waybill.dev/test/gateway"
	"waybill.dev/test/peers"
	"waybill.dev/test/upstream"
)

// ruled is a gateway before the counting upstream, with rules in a file that the
// test can change.
type ruled struct {
	*gateway.Gateway
	t     *testing.T
	up    *upstream.Upstream
	rules string
}

func startRuled(t *testing.T, rules string) *ruled {
	t.Helper()
	r := &ruled{t: t, up: upstream.Start(t), rules: filepath.Join(t.TempDir(), "rules.yaml")}
	r.write(rules)
	r.Gateway = gateway.Start(t, gateway.Config("allow: []\npolicies: ["+r.rules+"]\nservers:\n"+gateway.Native("up", r.up.URL, "")+
		"tenants: [{id: acme}]\nagents: [{id: researcher, tenant: acme, groups: [staff]}]\nauth: {anonymous: researcher}\n"))
	return r
}

// write changes the rules, whole or not at all.
func (r *ruled) write(text string) {
	r.t.Helper()
	if err := os.WriteFile(r.rules+".new", []byte(text), 0o600); err != nil {
		r.t.Fatal(err)
	}
	if err := os.Rename(r.rules+".new", r.rules); err != nil {
		r.t.Fatal(err)
	}
}

// call calls a tool and tells whether it was carried out, and what was said.
func (r *ruled) call(tool, args string) (bool, string) {
	a, err := r.Post(r.t.Context(), "up", "tools/call", tool,
		fmt.Sprintf(`{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{"name":%q,"arguments":%s,%s}}`, tool, args, gateway.Meta))
	if err != nil {
		return false, err.Error()
	}
	return a.Status == http.StatusOK && strings.Contains(string(a.Body), `"result"`), string(a.Body)
}

// later calls in the background.
func (r *ruled) later(tool, args string) <-chan bool {
	done := make(chan bool, 1)
	go func() {
		ok, _ := r.call(tool, args)
		done <- ok
	}()
	return done
}

type asked struct {
	ID, State, Name string
	Calls           int
	Args            json.RawMessage
}

// asked waits until an approval is asked for by n calls with these arguments.
func (r *ruled) asked(args string, n int) asked {
	r.t.Helper()
	end := time.Now().Add(20 * time.Second)
	for {
		out, errs, exit := r.CLI("approvals", "--json")
		if exit != 0 {
			r.t.Fatal(errs)
		}
		for line := range strings.Lines(out) {
			var a asked
			if err := json.Unmarshal([]byte(line), &a); err != nil {
				r.t.Fatal(err)
			}
			if string(a.Args) == args && a.Calls == n {
				return a
			}
		}
		if time.Now().After(end) {
			r.t.Fatalf("%d calls with %s never ask for an approval:\n%s", n, args, out)
		}
		<-time.After(20 * time.Millisecond)
	}
}

func (r *ruled) say(args ...string) {
	r.t.Helper()
	if _, errs, exit := r.CLI(append([]string{"approvals"}, args...)...); exit != 0 {
		r.t.Fatalf("approvals %q: %s", args, errs)
	}
}

func (r *ruled) effects() int { return len(r.up.Effects()) }

func (r *ruled) want(what string, done <-chan bool, carriedOut bool, effects int) {
	r.t.Helper()
	select {
	case ok := <-done:
		if ok != carriedOut {
			r.t.Errorf("%s: carried out is %t", what, ok)
		}
	case <-time.After(30 * time.Second):
		r.t.Errorf("%s: no answer", what)
	}
	if n := r.effects(); n != effects {
		r.t.Errorf("%s: %d effects, want %d", what, n, effects)
	}
}

// TestApprovals: a call that is held goes on when a person grants it, exactly it
// and no other.
func TestApprovals(t *testing.T) {
	r := startRuled(t, `
rules:
  - {id: all, effect: permit, match: {tools: ["*"]}}
  - {id: ask, effect: require_approval, match: {tools: [count]}, reason: somebody has to look, wait: 60s}
  - {id: soon, effect: require_approval, match: {tools: [read]}, wait: 1s}
`)
	one := r.later("count", `{"key":"a"}`)
	a := r.asked(`{"key":"a"}`, 1)
	if out, _, _ := r.CLI("approvals"); !strings.Contains(out, "because  somebody has to look (rule ask)") || !strings.Contains(out, `{"key":"a"}`) {
		t.Errorf("the list does not say what is asked:\n%s", out)
	}
	if _, errs, exit := r.CLI("approvals", "grant", a.ID, "--by", "researcher"); exit == 0 || !strings.Contains(errs, "cannot approve") {
		t.Errorf("approved by who asks: exit %d, %s", exit, errs)
	}
	if _, errs, exit := r.CLI("approvals", "grant", "a0123", "--by", "ann"); exit == 0 {
		t.Errorf("approved what nobody asks for: %s", errs)
	}
	r.say("grant", a.ID, "--by", "ann")
	r.want("granted", one, true, 1)
	// Somebody else has looked at it too, and grants nothing more by that.
	if _, errs, exit := r.CLI("approvals", "grant", a.ID, "--by", "bob"); exit != 1 || !strings.Contains(errs, "ann has granted it already") {
		t.Errorf("granted twice: exit %d, %s", exit, errs)
	}

	two := r.later("count", `{"key":"a"}`) // the same again
	if b := r.asked(`{"key":"a"}`, 1); b.ID != a.ID {
		t.Errorf("the same call asks for %s, then %s", a.ID, b.ID)
	}
	r.say("refuse", a.ID, "--by", "ann")
	r.want("a second use, refused", two, false, 1)
	r.want("refused already", r.later("count", `{"key":"a"}`), false, 1)
	if _, errs, exit := r.CLI("approvals", "grant", a.ID, "--by", "bob"); exit != 1 || !strings.Contains(errs, "ann has refused it already") {
		t.Errorf("granted what was refused: exit %d, %s", exit, errs)
	}

	three := r.later("count", `{"key":"b"}`)
	b := r.asked(`{"key":"b"}`, 1)
	if b.ID == a.ID {
		t.Error("another argument asks for the same approval")
	}
	r.say("grant", b.ID, "--by", "ann", "--uses", "2")
	r.want("another argument", three, true, 2)
	r.want("the second of two uses, without waiting", r.later("count", `{"key":"b"}`), true, 3)
	four, five := r.later("count", `{"key":"b"}`), r.later("count", `{"key":"b"}`)
	r.asked(`{"key":"b"}`, 2) // both wait for one word
	r.say("grant", b.ID, "--by", "ann")
	if !<-four || !<-five {
		t.Error("of two that wait for the same, one was not carried out")
	}
	if n := r.effects(); n != 5 {
		t.Errorf("%d effects, want 5", n)
	}

	r.want("silence", r.later("read", `{"key":"s"}`), false, 5)

	// Who asked for progress is told why nothing happens.
	told := make(chan string, 1)
	go func() {
		a, err := r.Post(t.Context(), "up", "tools/call", "count",
			`{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{"name":"count","arguments":{"key":"p"},`+strings.Replace(gateway.Meta, "{", `{"progressToken":"tok",`, 1)+`}}`)
		told <- fmt.Sprint(err, " ", string(a.Body))
	}()
	p := r.asked(`{"key":"p"}`, 1)
	r.say("refuse", p.ID, "--by", "ann")
	if said := <-told; !strings.Contains(said, `"progressToken":"tok","progress":0,"message":"The call waits for the approval of a person."`) {
		t.Errorf("a client that asked for progress is told %s", said)
	}

	// A grant that has expired says nothing any more.
	six := r.later("count", `{"key":"c"}`)
	c := r.asked(`{"key":"c"}`, 1)
	r.say("grant", c.ID, "--by", "ann", "--for", "1s", "--uses", "9")
	r.want("granted for a second", six, true, 6)
	<-time.After(1100 * time.Millisecond)
	seven := r.later("count", `{"key":"c"}`)
	r.asked(`{"key":"c"}`, 1)
	r.say("refuse", c.ID, "--by", "ann")
	r.want("after it has expired", seven, false, 6)

	// What is held outlives the process.
	r.later("count", `{"key":"d"}`)
	d := r.asked(`{"key":"d"}`, 1)
	r.Kill()
	r.Restart()
	r.asked(`{"key":"d"}`, 1)
	r.say("grant", d.ID, "--by", "ann")
	end := time.Now().Add(20 * time.Second)
	for r.effects() != 7 && time.Now().Before(end) {
		<-time.After(20 * time.Millisecond)
	}
	if n := r.effects(); n != 7 {
		t.Errorf("granted after a crash: %d effects, want 7", n)
	}

	// Every call is accounted for, and each decision can be explained. (An effect comes
	// before the ending of its call.)
	becomes(within, func() bool {
		open := map[schemas.CallID]bool{}
		for _, e := range r.Events() {
			if e.Kind() == schemas.KindHeld {
				open[e.Call] = true
			} else if e.Kind().Ends() {
				delete(open, e.Call)
			}
		}
		return len(open) == 0
	})
	held := map[schemas.CallID]bool{}
	ended := map[schemas.CallID]int{}
	for _, e := range r.Events() {
		switch d := e.Data.(type) {
		case *schemas.Held:
			held[e.Call] = true
			if d.PolicySHA256 == "" || d.ArgsSHA256 == "" || d.Approval == "" {
				t.Errorf("held without digests: %+v", d)
			}
		case *schemas.Denied:
			if d.PolicySHA256 == "" || d.ArgsSHA256 == "" {
				t.Errorf("denied without digests: %+v", d)
			}
		}
		if e.Data.Kind().Ends() {
			ended[e.Call]++
		}
	}
	for call := range held {
		if ended[call] != 1 {
			t.Errorf("call %s was held and has %d endings", call, ended[call])
		}
		out, errs, exit := r.CLI("policy", "explain", string(call))
		if exit != 0 || strings.Contains(out, "DIFFERS") || !strings.Contains(out, "HELD for an approval") {
			t.Errorf("explain: exit %d\n%s%s", exit, out, errs)
		}
	}
}

// TestRateLimits: of many calls at once, exactly as many go on as the limit lets,
// also after a crash; what is denied does not count.
func TestRateLimits(t *testing.T) {
	r := startRuled(t, `
rules:
  - {id: some, effect: permit, match: {tools: [count]}, obligations: {limit: {calls: 5, per: 1h, by: [agent, tool]}}}
  - {id: others, effect: permit, match: {tools: [read]}}
  - {id: no, effect: forbid, match: {tools: [count]}, when: args.key == "no"}
`)
	for range 3 {
		r.want("forbidden", r.later("count", `{"key":"no"}`), false, 0)
	}
	var all sync.WaitGroup
	for range 20 {
		all.Go(func() { r.call("count", `{"key":"x"}`) })
	}
	all.Wait()
	if n := r.effects(); n != 5 {
		t.Errorf("%d effects of 20 calls at once, want 5", n)
	}
	r.Kill()
	r.Restart()
	r.want("after a crash", r.later("count", `{"key":"x"}`), false, 5)
	r.want("another tool", r.later("read", `{"key":"x"}`), true, 6)
	limited := 0
	for _, e := range r.Events() {
		if d, ok := e.Data.(*schemas.Denied); ok && d.Rule == "some" {
			limited++
			if d.Facts["calls some tenant=acme agent=researcher tool=up/count"] != "5" || !strings.Contains(d.Reason, "5 calls in 1h0m0s") {
				t.Errorf("denied by the limit with facts %v: %s", d.Facts, d.Reason)
			}
		}
	}
	if limited != 16 {
		t.Errorf("%d calls denied by the limit, want 16", limited)
	}
}

// TestSessionFacts: rules know what was decided in a session before, also after a
// crash, and of no other session.
func TestSessionFacts(t *testing.T) {
	r := startRuled(t, `
rules:
  - {id: all, effect: permit, match: {tools: [count, read]}}
  - {id: three, effect: forbid, match: {tools: [read]}, when: 'session.calls >= 3 && "up/count" in session.tools'}
  - {id: enough, effect: forbid, match: {tools: [count]}, when: session.denied >= 2}
`)
	meta := strings.TrimSuffix(gateway.Meta, "}") + `,"dev.waybill/session":%q}`
	call := func(session, tool string) bool {
		t.Helper()
		a, err := r.Post(t.Context(), "up", "tools/call", tool, fmt.Sprintf(`{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{"name":%q,"arguments":{"key":"x"},`+meta+`}}`, tool, session))
		if err != nil {
			t.Fatal(err)
		}
		return a.Status == http.StatusOK && strings.Contains(string(a.Body), `"result"`)
	}
	for i, c := range []struct {
		tool string
		want bool
	}{{"read", true}, {"read", true}, {"read", true}, {"read", true}, {"count", true}, {"read", false}, {"count", true}, {"read", false}, {"count", false}} {
		if i == 5 {
			r.Kill()
			r.Restart()
		}
		if got := call("one", c.tool); got != c.want {
			t.Errorf("call %d, of %s: %t", i, c.tool, got)
		}
	}
	if !call("two", "count") || !call("two", "read") {
		t.Error("another session is held to this one's past")
	}
	for _, e := range r.Events() {
		if d, ok := e.Data.(*schemas.Denied); ok && d.Rule == "three" && d.Facts["session.tools"] != `["up/count","up/read"]` {
			t.Errorf("denied with facts %v", d.Facts)
		}
	}
}

// TestConfusion: arguments of other types than the rules expect reach no upstream.
func TestConfusion(t *testing.T) {
	r := startRuled(t, `
rules:
  - {id: all, effect: permit, match: {groups: [staff], tools: ["*"]}}
  - {id: bad, effect: forbid, match: {tools: [count]}, when: 'args.key.startsWith("bad") || args.n > 5'}
`)
	for _, args := range []string{
		`{"key":"bad"}`, `{"key":["bad"]}`, `{"key":{"a":"bad"}}`, `{"key":null}`, `{"key":7}`, `{}`, `{"key":"x"}`, `{"key":"x","n":"9"}`,
		`{"key":"x","n":9}`, `{"key":"x","n":1e9}`, `{"key":"x","n":99999999999999999999}`, `{"key":"x","n":null}`,
		`{"key":"bad","key":"x","n":1}`, `{"key":"x","KEY":"bad","n":1}`, `"bad"`, `["bad"]`,
	} {
		if ok, said := r.call("count", args); ok {
			t.Errorf("%s was carried out: %s", args, said)
		}
	}
	if n := r.effects(); n != 0 {
		t.Errorf("%d effects", n)
	}
	if ok, said := r.call("count", `{"key":"x","n":1}`); !ok {
		t.Errorf("what is well was not carried out: %s", said)
	}
}

// TestReload: rules change under load; each call is decided by one policy, the one
// that its decision names. Rules that do not compile change nothing.
func TestReload(t *testing.T) {
	permit := "rules:\n  - {id: all, effect: permit, match: {tools: ['*']}}\n"
	forbid := permit + "  - {id: none, effect: forbid, match: {tools: ['*']}}\n"
	r := startRuled(t, permit)
	digest := func() string {
		out, errs, exit := r.CLI("policy", "check", "--json")
		var check struct{ SHA256 string }
		if err := json.Unmarshal([]byte(out), &check); exit != 0 || err != nil {
			t.Fatalf("policy check: %s %v", errs, err)
		}
		return check.SHA256
	}
	yes := digest()
	stop, done := context.WithCancel(t.Context())
	var load sync.WaitGroup
	for i := range 8 {
		load.Go(func() {
			for n := 0; stop.Err() == nil; n++ {
				r.call("count", fmt.Sprintf(`{"key":"k%d"}`, i))
			}
		})
	}
	until := func(carriedOut bool) {
		end := time.Now().Add(20 * time.Second)
		for {
			if ok, _ := r.call("count", `{"key":"probe"}`); ok == carriedOut {
				return
			}
			if time.Now().After(end) {
				t.Fatalf("calls are not carried out as %t", carriedOut)
			}
		}
	}
	r.write(forbid)
	no := digest()
	until(false)
	r.write("rules:\n  - {id: all, effect: permit, wen: true}\n")
	broken := time.Now().Add(20 * time.Second)
	for r.metric("waybill_policy_broken") != "1" && time.Now().Before(broken) {
		<-time.After(50 * time.Millisecond)
	}
	if r.metric("waybill_policy_broken") != "1" {
		t.Error("nothing says that the rules are broken")
	}
	if ok, _ := r.call("count", `{"key":"broken"}`); ok {
		t.Error("broken rules opened something")
	}
	r.write(permit)
	until(true)
	done()
	load.Wait()
	seen := map[string]int{}
	for _, e := range r.Events() {
		switch d := e.Data.(type) {
		case *schemas.Authorized:
			seen["authorized "+d.PolicySHA256]++
		case *schemas.Denied:
			seen["denied "+d.PolicySHA256]++
		}
	}
	if len(seen) != 2 || seen["authorized "+yes] == 0 || seen["denied "+no] == 0 {
		t.Errorf("decisions by policy: %v; %s permits and %s denies", seen, yes, no)
	}
}

// metric is the value of a metric without labels.
func (r *ruled) metric(name string) string {
	resp, err := http.Get(r.Admin + "/metrics")
	if err != nil {
		return err.Error()
	}
	defer func() { _ = resp.Body.Close() }()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		return err.Error()
	}
	for line := range strings.Lines(string(b)) {
		if rest, ok := strings.CutPrefix(line, name); ok && (rest[0] == ' ' || rest[0] == '{') {
			return line[strings.LastIndexByte(line, ' ')+1 : len(line)-1]
		}
	}
	return ""
}

// TestListsByRules: a list shows what the rules let be called, name by name, and
// what it does not show is unknown.
func TestListsByRules(t *testing.T) {
	rules := filepath.Join(t.TempDir(), "rules.yaml")
	if err := os.WriteFile(rules, []byte(`
rules:
  - {id: list, effect: permit, match: {methods: [tools/list]}}
  - {id: tests, effect: permit, match: {tools: ["test_*"]}}
  - {id: no-errors, effect: forbid, match: {tools: ["*"]}, when: name.contains("error")}
  - {id: no-big, effect: forbid, match: {tools: [test_simple_text]}, when: has(args.big) && args.big > 3}
`), 0o600); err != nil {
		t.Fatal(err)
	}
	g := gateway.Start(t, gateway.Config("allow: []\npolicies: ["+rules+"]\nservers:\n"+gateway.Server("everything", peers.EverythingServer(t), "")))
	names := func(endpoint string) (names []string) {
		a, err := g.Post(t.Context(), endpoint, "tools/list", "", `{"jsonrpc":"2.0","id":1,"method":"tools/list","params":{`+gateway.Meta+`}}`)
		var list struct {
			Result struct{ Tools []struct{ Name string } }
		}
		if err == nil {
			err = json.Unmarshal(a.Body, &list)
		}
		if err != nil {
			t.Fatalf("%v: %s", err, a.Body)
		}
		for _, tool := range list.Result.Tools {
			names = append(names, tool.Name)
		}
		return names
	}
	shown := names("everything")
	if !slices.Contains(shown, "test_simple_text") || slices.ContainsFunc(shown, func(n string) bool { return strings.Contains(n, "error") || !strings.HasPrefix(n, "test_") }) {
		t.Errorf("shows %q", shown)
	}
	if front := names(""); len(front) != len(shown) {
		t.Errorf("the front shows %q, the server %q", front, shown)
	}
	said := func(tool, args string) string {
		a, err := g.Post(t.Context(), "everything", "tools/call", tool,
			fmt.Sprintf(`{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{"name":%q,"arguments":%s,%s}}`, tool, args, gateway.Meta))
		if err != nil {
			t.Fatal(err)
		}
		return strings.ReplaceAll(string(a.Body), tool, "NAME")
	}
	if hidden, unknown := said("test_error_handling", "{}"), said("no_such_tool", "{}"); hidden != unknown {
		t.Errorf("a hidden tool answers\n%s\nan unknown one\n%s", hidden, unknown)
	}
	if got := said("test_simple_text", "{}"); !strings.Contains(got, `"result"`) {
		t.Errorf("a tool that is shown: %s", got)
	}
	if got := said("test_simple_text", `{"big":4}`); strings.Contains(got, `"result"`) {
		t.Errorf("a tool with arguments that are forbidden: %s", got)
	}
}
