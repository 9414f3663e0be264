package test

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/modelcontextprotocol/go-sdk/mcp"

	"waybill.dev/schemas"
	"waybill.dev/test/gateway"
	"waybill.dev/test/peers"
	"waybill.dev/test/upstream"
)

// remade is what `replay --verify --json` prints.
type remade struct {
	Session     schemas.SessionKey
	Verified    bool
	Events      int
	Calls       int
	Decisions   int
	Endings     int
	Leaves      int
	Rows        int
	Left        map[string]int
	Notes       []string
	Differences []difference
}

type difference struct {
	Seq                             uint64
	ID, Field, Recorded, Recomputed string
}

// names tells whether a difference in a field is among those found.
func (r remade) names(field string) bool {
	return slices.ContainsFunc(r.Differences, func(d difference) bool { return d.Field == field })
}

func remake(t *testing.T, g *gateway.Gateway, args ...string) (r remade, exit int) {
	t.Helper()
	out, errs, exit := g.CLI(append([]string{"replay", "--verify", "--json"}, args...)...)
	if err := json.Unmarshal([]byte(out), &r); err != nil {
		t.Fatalf("replay --verify %v: exit %d: %s%s", args, exit, out, errs)
	}
	return r, exit
}

// Sessions with calls of every fate are made again, from the log, from the record
// and from a file, and print the same; what is changed in any of them is named.
func TestReplay(t *testing.T) {
	t.Parallel()
	u := upstream.Start(t)
	rules := filepath.Join(t.TempDir(), "rules.yaml")
	if err := os.WriteFile(rules, []byte(`
rules:
  - {id: all, effect: permit, match: {tools: ["*"]}}
  - {id: talk, effect: permit, match: {methods: [initialize, "notifications/*"]}}
  - {id: never, effect: forbid, match: {tools: [count]}, when: 'has(args.key) && args.key == "no"', reason: not this one}
  - {id: look, effect: require_approval, match: {tools: [count]}, when: 'has(args.key) && args.key.startsWith("ask")', reason: somebody has to look, wait: 30s}
  - {id: blank, effect: oblige, match: {tools: [read]}, obligations: {redact: [pad], tags: [private]}}
  - {id: quick, effect: oblige, match: {servers: [hasty], tools: [read]}, obligations: {deadline: 200ms}}
  - {id: few, effect: oblige, match: {servers: [counter], tools: [read]}, obligations: {limit: {calls: 100, per: 1m, by: [agent]}}}
`), 0o600); err != nil {
		t.Fatal(err)
	}
	g := gateway.Start(t, gateway.Config("clickhouse: {embedded: true, launcher: "+peers.ClickHouse(t)+"}\n"+
		"tenants: [{id: acme}]\nagents: [{id: researcher, tenant: acme, groups: [staff]}]\nauth: {anonymous: researcher}\n"+
		"allow: [{agents: ['*'], servers: [everything, hasty], tools: ['*']}]\npolicies: ["+rules+"]\nservers:\n"+
		gateway.Server("counter", u.URL, "idempotent: [read], deadline: 20s")+
		gateway.Server("hasty", u.URL, "deadline: 700ms, concurrency: 1")+
		gateway.Server("everything", peers.EverythingServer(t), "")))
	call := func(server, session, tool, args string) string {
		t.Helper()
		a, err := g.Post(t.Context(), server, "tools/call", tool,
			fmt.Sprintf(`{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{"name":%q,"arguments":%s,%s}}`, tool, args, gateway.Meta), "Waybill-Session: "+session)
		if err != nil {
			t.Error(err)
		}
		return string(a.Body)
	}
	has := func(said, want string) {
		t.Helper()
		if !strings.Contains(said, want) {
			t.Errorf("%q is not in %.300s", want, said)
		}
	}
	carriedOut := func(key string) {
		t.Helper()
		done := func(e upstream.Effect) bool { return e.Key == key }
		if !becomes(within, func() bool { return slices.ContainsFunc(u.Effects(), done) }) {
			t.Fatalf("call %s is not carried out", key)
		}
	}
	has(call("counter", "plain", "count", `{"key":"a","progress":3}`), "count a")
	has(call("counter", "plain", "count", `{"key":"b","pad":"`+strings.Repeat("long ", 2000)+`"}`), "count b")
	has(call("counter", "plain", "read", `{"key":"c","pad":"hidden"}`), "[redacted]")
	has(call("counter", "plain", "count", `{"key":"no"}`), "error")
	body := `{"jsonrpc":"2.0","id":1,"method":"tools/list","params":{` + gateway.Meta + `}}`
	if a, err := g.Post(t.Context(), "", "tools/list", "", body, "Waybill-Session: plain"); err != nil || a.Status != http.StatusOK {
		t.Fatalf("%d %s %v", a.Status, a.Body, err)
	}

	// Held, granted and refused.
	r := &ruled{Gateway: g, t: t, up: u}
	for key, say := range map[string]string{"ask1": "grant", "ask2": "refuse"} {
		done := make(chan string, 1)
		go func() { done <- call("counter", "held", "count", `{"key":"`+key+`"}`) }()
		r.say(say, r.asked(`{"key":"`+key+`"}`, 1).ID, "--by", "ann")
		has(<-done, map[string]string{"grant": "count " + key, "refuse": "error"}[say])
	}

	// One takes the server's only place for longer than another has time.
	unknown, expired := make(chan string, 1), make(chan string, 1)
	go func() { unknown <- call("hasty", "late", "count", `{"key":"d","wait":3000}`) }()
	carriedOut("d")
	go func() { expired <- call("hasty", "late", "read", `{"key":"e"}`) }()
	has(<-unknown, `"code":"unknown"`)
	<-expired

	// A client with a session, and a server without: translated, asked, taken back.
	old := openOld(t, g.URL+"/mcp/everything", "2025-11-25")
	old.text(t, "test_input_required_result_multi_round", nil, "Multi-round complete")
	slow := openOld(t, g.URL+"/mcp/counter", "2025-11-25")
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() {
		_, err := slow.CallTool(ctx, &mcp.CallToolParams{Name: "count", Arguments: upstream.Args{Key: "f", Wait: 8000}})
		ended <- err
	}()
	carriedOut("f")
	cancel()
	<-ended
	for _, c := range []*oldClient{old, slow} { // nothing more is to come
		if err := c.Close(); err != nil {
			t.Error(err)
		}
	}

	// The gateway dies in the middle of a call.
	killed := make(chan struct{})
	go func() {
		defer close(killed)
		_, _ = g.Post(context.WithoutCancel(t.Context()), "counter", "tools/call", "count",
			`{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{"name":"count","arguments":{"key":"g","wait":2000},`+gateway.Meta+`}}`, "Waybill-Session: killed") // which has no answer
	}()
	carriedOut("g")
	g.Kill()
	<-killed
	g.Restart()
	settled(t, g)

	ends := map[string]int{}
	all := sessionsOf(g.Events())
	last := uint64(0)
	for _, events := range all {
		for _, e := range events {
			last = max(last, e.Seq)
			switch d := e.Data.(type) {
			case *schemas.Failed:
				ends[string(d.Code)]++
			case *schemas.Authorized:
				if d.N > 1 {
					ends["granted"]++
				}
			}
			ends[string(e.Kind())]++
		}
	}
	for _, what := range []string{"completed", "denied", "held", "granted", "cancelled", "unknown", "expired", "asked", "answered", "progressed"} {
		if ends[what] == 0 {
			t.Errorf("no call is %s: %v", what, ends)
		}
	}
	signed(t, g)
	eventually(t, g, "SELECT max(seq) AS n FROM events", fmt.Sprintf(`{"n":%d}`, last))

	files := map[schemas.SessionKey]string{}
	for key, events := range all {
		var trees []string
		file := filepath.Join(t.TempDir(), "s.waybill")
		if _, errs, exit := g.CLI("export", string(key), "-o", file); exit != 0 {
			t.Fatalf("export: %s", errs)
		}
		files[key] = file
		for _, from := range []string{"stream", "clickhouse", file} {
			v, exit := remake(t, g, string(key), "--from", from)
			if exit != 0 || !v.Verified || v.Leaves < len(events) || v.Decisions == 0 && len(events) > 6 || len(v.Left) > 0 || len(v.Notes) > 0 {
				t.Errorf("%s from %s: exit %d, %+v", key, from, exit, v)
			}
			if from == "stream" && v.Rows <= len(events) {
				t.Errorf("%s: %d rows of %d events", key, v.Rows, len(events))
			}
			tree, errs, exit := g.CLI("replay", string(key), "--full", "--from", from)
			if exit != 0 {
				t.Error(errs)
			}
			lines, _, _ := g.CLI("replay", string(key), "--json", "--from", from)
			trees = append(trees, tree+lines)
		}
		if trees[0] != trees[1] || trees[0] != trees[2] {
			t.Errorf("%s is printed otherwise from the log, from the record and from the file:\n%s\n%s\n%s", key, trees[0], trees[1], trees[2])
		}
	}
	plain, held := sessionNamed("plain"), sessionNamed("held")
	tree, _, _ := g.CLI("replay", string(held), "--full")
	for _, want := range []string{
		`held .* by look; somebody has to look; approval a[0-9a-f]{24} is waited for until`, `authorized .* granted by ann, record \d+`,
		`denied .* refused by ann`, `completed .*; policy \S+ ms, queue \S+ ms, upstream \S+ ms`, `rules that spoke: all, look`,
	} {
		if !regexp.MustCompile(want).MatchString(tree) {
			t.Errorf("no %s in\n%s", want, tree)
		}
	}

	t.Run("altered files", func(t *testing.T) { alteredFiles(t, g, files[plain]) })
	t.Run("redacted", func(t *testing.T) {
		file := filepath.Join(t.TempDir(), "r.waybill")
		if _, errs, exit := g.CLI("export", string(plain), "-o", file, "--redact-bodies"); exit != 0 {
			t.Fatal(errs)
		}
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		for _, said := range []string{"long long", "hidden", "for the 1. time"} {
			if strings.Contains(string(text), said) {
				t.Errorf("%q is in the redacted file", said)
			}
		}
		v, exit := remake(t, g, "--from", file)
		if exit != 0 || v.Leaves < len(all[plain]) || v.Decisions != 0 || len(v.Left) == 0 {
			t.Errorf("exit %d, %+v", exit, v)
		}
		out, errs, exit := g.CLI("import", file)
		if exit != 0 {
			t.Fatal(errs)
		}
		kept, _, _ := strings.Cut(out, ":")
		if tree, errs, exit := g.CLI("replay", "--from", kept); exit != 0 || !strings.Contains(tree, "left out when they were exported") {
			t.Errorf("exit %d: %s%s", exit, tree, errs)
		}
	})
	t.Run("rows", func(t *testing.T) {
		sql := writer(t, g)
		for _, c := range []struct{ change, field string }{
			{"ALTER TABLE waybill.calls_v1 UPDATE policy_us = policy_us + 1 WHERE session = '%s' AND name = 'read'", "calls_v1.policy_us"},
			{"ALTER TABLE waybill.edges_v1 DELETE WHERE session = '%s' AND name = 'read'", "edges_v1"},
			{"ALTER TABLE waybill.events_v1 UPDATE body = 'other' WHERE session = '%s' AND kind = 'completed' AND name = 'read'", "events_v1.body"},
		} {
			sql(fmt.Sprintf(c.change, plain) + " SETTINGS mutations_sync = 2")
			v, exit := remake(t, g, string(plain))
			if exit != 1 || !v.names(c.field) {
				t.Errorf("%s: exit %d, %+v", c.change, exit, v.Differences)
			}
		}
		newest := all[plain][len(all[plain])-1].Seq
		sql(fmt.Sprintf("ALTER TABLE waybill.events_v1 DELETE WHERE session = '%s' AND seq = %d SETTINGS mutations_sync = 2", plain, newest))
		if v, exit := remake(t, g, string(plain)); exit != 1 || !v.names("events_v1") || len(v.Left) > 0 {
			t.Errorf("without the newest row: exit %d, %+v", exit, v)
		}
		// The record alone does not say so of itself; the signed leaf does.
		v, exit := remake(t, g, string(plain), "--from", "clickhouse")
		if exit != 1 || !v.names("salted digest of the body") {
			t.Errorf("from the record: exit %d, %+v", exit, v.Differences)
		}
	})
	t.Run("erased", func(t *testing.T) {
		if _, errs, exit := g.CLI("erase", string(held), "--reason", "request 12"); exit != 0 {
			t.Fatal(errs)
		}
		v, exit := remake(t, g, string(held))
		if exit != 0 || len(v.Notes) == 0 || !strings.Contains(v.Notes[0], "was erased (request 12)") {
			t.Errorf("exit %d, %+v", exit, v)
		}
		if tree, _, _ := g.CLI("replay", string(held)); !strings.Contains(tree, "was erased; request 12") {
			t.Errorf("the tree does not say that it is erased:\n%s", tree)
		}
		if v, exit := remake(t, g, "--from", files[held]); exit != 0 || v.Decisions == 0 {
			t.Errorf("the file of before: exit %d, %+v", exit, v)
		}
	})
	if err := g.Stop(); err != nil {
		t.Errorf("stopping: %v", err)
	}
}

// alteredFiles plants a difference of each kind in an exported session, with the
// end of the file made to fit, and expects that its place and its field are named.
func alteredFiles(t *testing.T, g *gateway.Gateway, file string) {
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	lines := slices.Collect(strings.Lines(string(text)))
	write := func(t *testing.T, lines []string) string {
		t.Helper()
		name := filepath.Join(t.TempDir(), "altered.waybill")
		if err := os.WriteFile(name, []byte(strings.Join(lines, "")), 0o600); err != nil {
			t.Fatal(err)
		}
		return name
	}
	// sealed makes the last line fit.
	sealed := func(lines []string) []string {
		body, events := strings.Join(lines[:len(lines)-1], ""), 0
		for _, l := range lines {
			if strings.HasPrefix(l, `{"event":`) {
				events++
			}
		}
		sum := sha256.Sum256([]byte(body))
		return append(slices.Clone(lines[:len(lines)-1]), fmt.Sprintf(`{"end":{"events":%d,"sha256":"%s"}}`+"\n", events, hex.EncodeToString(sum[:])))
	}
	change := func(t *testing.T, has, from, to string) []string {
		t.Helper()
		re := regexp.MustCompile(from)
		out := slices.Clone(lines)
		for i, l := range out {
			if strings.Contains(l, has) && re.MatchString(l) {
				loc := re.FindStringSubmatchIndex(l)
				out[i] = l[:loc[0]] + string(re.ExpandString(nil, to, l, loc)) + l[loc[1]:]
				return out
			}
		}
		t.Fatalf("no line with %s and %s", has, from)
		return nil
	}
	for _, c := range []struct{ name, has, from, to, field string }{
		{"id", `"kind":"completed"`, `"id":"c(\w+)/end"`, `"id":"c$1/started/1"`, "id"},
		{"session", `"kind":"opened"`, `"name":"plain"`, `"name":"plein"`, "session"},
		{"cause", `"kind":"requested","id"`, `"root":"c\w+"`, `"root":"cother"`, "root"},
		{"parent", `"kind":"authorized"`, `"agent":"researcher"`, `"agent":"another"`, "agent"},
		{"decision", `"kind":"authorized"`, `"rule":"all"`, `"rule":"never"`, "data.rule"},
		{"fact", `"kind":"authorized"`, `"facts":\{"calls few [^"]*":"0"`, `"facts":{"calls few tenant=acme agent=researcher":"100"`, "kind"},
		{"denial", `"kind":"denied"`, `"reason":"not this one"`, `"reason":"as one likes"`, "data.reason"},
		{"arguments", `"kind":"authorized"`, `"args_sha256":"\w{4}`, `"args_sha256":"0000`, "data.args_sha256"},
		{"redaction", `"kind":"authorized"`, `\[redacted\]`, `hidden`, "body"},
		{"digest of a body", `"kind":"authorized"`, `"body_sha256":"\w{4}`, `"body_sha256":"0000`, "data.body_sha256"},
		{"digest of chunks", `"kind":"completed"`, `"chunks_sha256":"\w{4}`, `"chunks_sha256":"0000`, "data.chunks_sha256"},
		{"chunk", `"kind":"progressed"`, `progress\\":1`, `progress\":7`, "salted digest of the body"},
		{"ending", `"kind":"completed"`, `"request_size":\d`, `"request_size":9`, "data.request_size"},
		{"times", `"kind":"completed"`, `"authorized_at":"2`, `"authorized_at":"3`, "data.authorized_at"},
		{"answer", `"kind":"completed"`, `count a for the 1. time`, `count a for the 2. time`, "salted digest of the body"},
		{"status", `"kind":"completed"`, `"status":200`, `"status":201`, "data.status"},
		{"stored", `"kind":"completed"`, `"stored":"2`, `"stored":"3`, "stored"},
		{"leaf", `"kind":"completed"`, `\\"status\\":200`, `\"status\":201`, "leaf"},
		{"policy", `{"policy":`, `not this one`, `not that one`, "data"},
		{"checkpoint", `{"checkpoint":`, `\\n\d+\\n`, "\\n9\\n", "checkpoint"},
	} {
		t.Run(c.name, func(t *testing.T) {
			v, exit := remake(t, g, "--from", write(t, sealed(change(t, c.has, c.from, c.to))))
			if exit != 1 || v.Verified || len(v.Differences) == 0 || v.Differences[0].Field != c.field {
				t.Errorf("exit %d, want %s first: %+v", exit, c.field, v.Differences)
			}
			if c.has[0] != '{' && len(v.Differences) > 0 && (v.Differences[0].Seq == 0 || v.Differences[0].ID == "") {
				t.Errorf("no event is named: %+v", v.Differences[0])
			}
		})
	}
	// Where its beginning is not there, nothing is made up, and nothing called wrong.
	late := sealed(slices.DeleteFunc(slices.Clone(lines), func(l string) bool {
		return strings.Contains(l, `"kind":"opened"`) || strings.Contains(l, `\"a\"`) && strings.Contains(l, `"kind":"requested"`)
	}))
	v, exit := remake(t, g, "--from", write(t, late))
	if exit != 1 || len(v.Notes) != 1 || !strings.Contains(v.Notes[0], "the beginning of the session is not there any more") || len(v.Left) == 0 || len(v.Differences) != 1 || v.Differences[0].Field != "end" {
		t.Errorf("without its beginning: exit %d, %+v", exit, v)
	}
	// The signature is of all that was there.
	resealed := func(lines []string) []string {
		out := sealed(lines)
		was := regexp.MustCompile(`"signed":".*"`).FindString(lines[len(lines)-1])
		out[len(out)-1] = strings.Replace(out[len(out)-1], `"}}`, `",`+was+`}}`, 1)
		return out
	}
	denied := regexp.MustCompile(`"id":"(c\w+)/decision/1".*not this one`).FindStringSubmatch(string(text))[1]
	without := slices.DeleteFunc(slices.Clone(lines), func(l string) bool { return strings.Contains(l, denied) })
	turned := slices.Clone(lines)
	for i, l := range lines {
		if strings.HasPrefix(l, `{"event"`) {
			turned[i], turned[i+1] = lines[i+1], l
			break
		}
	}
	drop := slices.DeleteFunc(slices.Clone(lines), func(l string) bool { return strings.Contains(l, `"kind":"requested"`) && strings.Contains(l, `\"a\"`) })
	for _, c := range []struct {
		name  string
		lines []string
		want  string
	}{
		{"cut off", lines[:len(lines)-1], "it breaks off"},
		{"cut off in the middle of a line", append(slices.Clone(lines[:4]), lines[4][:20]), "it breaks off"},
		{"altered", change(t, `"kind":"completed"`, `"status":200`, `"status":201`), "it was altered"},
		{"without an event", sealed(drop), "no request of the call before it"},
		{"without a proof", sealed(change(t, `"kind":"completed"`, `,"proof":.*`, "}")), "recorded none, recomputed it is in no signed tree"},
		{"without a checkpoint", sealed(slices.DeleteFunc(slices.Clone(lines), func(l string) bool { return strings.HasPrefix(l, `{"checkpoint"`) })), "nothing proves what this says"},
		{"with a hole", sealed(change(t, `"kind":"completed"`, `^.*"proof":(.*)\}`, `{"missing":$1}`)), "recorded it was signed, recomputed it is not there"},
		{"without a call, signed", resealed(without), "waybill export"},
		{"without a call and a signature", sealed(without), "signed by nobody"},
		{"in another order", sealed(turned), "each once, in the order of the log"},
		{"an event twice", sealed(slices.Insert(slices.Clone(lines), len(lines)-1, lines[len(lines)-2])), "each once, in the order of the log"},
		{"a proof alone", sealed(change(t, `"kind":"completed"`, `^.*"proof":(.*)\}`, `{"proof":$1}`)), "has a proof and no event"},
		{"with two beginnings", sealed(slices.Insert(slices.Clone(lines), 3, lines[0])), "begins another session"},
		{"of no session", sealed(change(t, `{"waybill":`, `"session":"`, `"session":"../`)), "not an exported session"},
		{"more behind it", append(slices.Clone(lines), lines[2]), "more behind its end"},
		{"of a newer version", sealed(change(t, `{"waybill":`, `"version":1`, `"version":2`)), "it is of version 2"},
		{"with a newer event", sealed(change(t, `"kind":"completed"`, `"event":\{"v":1`, `"event":{"v":2`)), "envelope version 2, this program reads 1"},
		{"no export", []string{"{}\n"}, "not an exported session"},
		{"empty", nil, "not an exported session"},
	} {
		t.Run(c.name, func(t *testing.T) {
			file := write(t, c.lines)
			out, errs, exit := g.CLI("replay", "--verify", "--from", file)
			if exit != 1 || !strings.Contains(out+errs, c.want) {
				t.Errorf("exit %d, want %q: %s%s", exit, c.want, out, errs)
			}
			if _, errs, exit := g.CLI("import", file); exit != 1 {
				t.Errorf("import: exit %d, %s", exit, errs)
			}
		})
	}
}
