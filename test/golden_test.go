package test

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"flag"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"waybill.dev/projections"
	"waybill.dev/projections/audit"
	"waybill.dev/schemas"
	"waybill.dev/test/gateway"
	"waybill.dev/workers/policy"
)

var recordGolden = flag.String("record-golden", "", "record a golden log of this version under testdata/golden/`NAME`, which must be new")

// TestGoldenLogs: what earlier versions have stored is read to the byte, decided the
// same, and makes the same rows and leaves. A directory of testdata/golden is a log
// that a gateway has written; none is ever changed. When a version writes anything
// new, another is added, by -record-golden.
//
//	events.jsonl    the log, an event a line
//	policies/       the bundles that its decisions name
//	made.jsonl      what was made of it: rows by table, and the hash of each leaf
func TestGoldenLogs(t *testing.T) {
	t.Parallel()
	if *recordGolden != "" {
		goldenRecord(t, filepath.Join("testdata", "golden", *recordGolden))
	}
	dirs, err := filepath.Glob("testdata/golden/*")
	if err != nil || len(dirs) == 0 {
		t.Fatal("no golden logs", err)
	}
	for _, dir := range dirs {
		t.Run(filepath.Base(dir), func(t *testing.T) {
			events := goldenEvents(t, dir)
			decisions := goldenDecisions(t, dir, events)
			for _, want := range []string{"permit", "deny", "hold", "permit after hold", "deny after hold"} {
				if decisions[want] == 0 {
					t.Errorf("no decision is %q: the log says too little: %v", want, decisions)
				}
			}
			want, err := os.ReadFile(filepath.Join(dir, "made.jsonl"))
			if err != nil {
				t.Fatal(err)
			}
			if got := goldenMade(t, events); !bytes.Equal(got, want) {
				have, had := bytes.Split(got, []byte("\n")), bytes.Split(want, []byte("\n"))
				for i := range min(len(have), len(had)) {
					if !bytes.Equal(have[i], had[i]) {
						t.Fatalf("made.jsonl:%d: now\n%s\nwas\n%s", i+1, have[i], had[i])
					}
				}
				t.Fatalf("%d lines are made, there were %d", len(have), len(had))
			}
		})
	}
}

// goldenEvents reads a log: each line must be what it is written as again.
func goldenEvents(t *testing.T, dir string) (events []schemas.Event) {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(dir, "events.jsonl"))
	if err != nil {
		t.Fatal(err)
	}
	for line := range bytes.Lines(text) {
		line = bytes.TrimSuffix(line, []byte("\n"))
		var e schemas.Event
		if err := e.UnmarshalJSON(line); err != nil {
			t.Fatalf("event %d: %v\n%s", len(events)+1, err, line)
		}
		again, err := e.MarshalJSON()
		if err != nil || !bytes.Equal(again, line) {
			t.Fatalf("event %d is written as\n%s\nwas\n%s\n%v", len(events)+1, again, line, err)
		}
		events = append(events, e)
	}
	return events
}

// goldenDecisions takes every decision again, on what was recorded.
func goldenDecisions(t *testing.T, dir string, events []schemas.Event) map[string]int {
	t.Helper()
	bundles := map[string]*policy.Bundle{}
	files, err := filepath.Glob(filepath.Join(dir, "policies", "*.json"))
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		text, err := os.ReadFile(f)
		if err != nil {
			t.Fatal(err)
		}
		b, err := policy.Compile(text)
		if err != nil {
			t.Fatalf("%s: %v", f, err)
		}
		if want := strings.TrimSuffix(filepath.Base(f), ".json"); b.Digest != want {
			t.Errorf("%s has the digest %s", f, b.Digest)
		}
		bundles[b.Digest] = b
	}
	requests := map[schemas.CallID]schemas.Event{}
	seen := map[string]int{}
	for _, e := range events {
		var d schemas.Decision
		var only []string
		switch data := e.Data.(type) {
		case *schemas.Requested:
			requests[e.Call] = e
			continue
		case *schemas.Authorized:
			d, only = data.Decision, data.Only
		case *schemas.Denied:
			d = data.Decision
		case *schemas.Held:
			d = data.Decision
		default:
			continue
		}
		b, request := bundles[d.PolicySHA256], requests[e.Call]
		if b == nil || request.Data == nil {
			t.Fatalf("decision %d of %s: its policy or its request is not there", d.N, e.Call)
		}
		facts, err := policy.FactsOf(d.Facts)
		if err != nil {
			t.Fatalf("decision %d of %s: %v", d.N, e.Call, err)
		}
		v := b.Decide(request, facts)
		if differs := v.Differs(e.Data); differs != "" || v.Reason != d.Reason || v.Outcome() != "deny" && !slices.Equal(v.Obligations.Record(), d.Obligations) {
			t.Errorf("decision %d of %s: %s\nnow %+v\nwas %+v", d.N, e.Call, differs, v, d)
		}
		again, missing := b.DecideAgain(request, facts, false)
		if missing != nil || again.Outcome() != v.Outcome() || again.Rule != v.Rule || !slices.Equal(again.Only, only) {
			t.Errorf("decision %d of %s, again: %+v, without %q", d.N, e.Call, again, missing)
		}
		what := v.Outcome()
		if d.N > 1 {
			what += " after hold"
		}
		seen[what]++
	}
	return seen
}

// goldenMade is what is made of events: rows and leaves, a line each.
func goldenMade(t *testing.T, events []schemas.Event) []byte {
	t.Helper()
	var out bytes.Buffer
	line := func(v any) {
		if err := json.NewEncoder(&out).Encode(v); err != nil {
			t.Fatal(err)
		}
	}
	for _, e := range events {
		for _, table := range projections.Tables() {
			if row := table.Row(nil, e); row != nil {
				line(map[string]any{"seq": e.Seq, "table": table.Name, "row": row})
			}
		}
		envelope, err := e.MarshalString()
		if err != nil {
			t.Fatal(err)
		}
		entry := audit.Entry{
			Stream: audit.Events, Seq: e.Seq, Stored: e.Stored, Body: e.Body, Event: e,
			Subject: fmt.Sprintf("ev.%s.%s.%s.%s", e.Tenant, e.Session, e.Kind(), cmpOr(string(e.Edge), "_")),
			Header:  map[string][]string{"Waybill-Event": {envelope}, "Nats-Msg-Id": {string(e.ID())}},
		}
		salt := audit.Salt(bytes.Repeat([]byte{7}, audit.SecretSize), audit.Events, e.Seq)
		sum := sha256.Sum256(append([]byte{0}, audit.Record(entry, salt)...))
		line(map[string]any{"seq": e.Seq, "leaf": hex.EncodeToString(sum[:])})
	}
	return out.Bytes()
}

func cmpOr(s, other string) string {
	if s == "" {
		return other
	}
	return s
}

// goldenRecord runs a gateway, has it decide in all ways that there are, and keeps
// its log.
func goldenRecord(t *testing.T, dir string) {
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	r := startRuled(t, `
rules:
  - {id: all, effect: permit, match: {tools: ["*"]}}
  - {id: lists, effect: permit, match: {methods: ["tools/list", "server/discover", "prompts/*"]}}
  - {id: outside, effect: forbid, match: {tools: [read]}, when: 'args.key.startsWith("/etc")', reason: not there}
  - {id: few, effect: oblige, match: {tools: [read]}, obligations: {limit: {calls: 4, per: 1h, by: [agent, tool]}, tags: [metered]}}
  - {id: secret, effect: oblige, match: {groups: [staff], tools: [count]}, when: 'has(args.note)', obligations: {redact: [note], deadline: 10s}}
  - {id: often, effect: forbid, match: {tools: [count]}, when: 'session.calls > 18'}
  - {id: ask, effect: require_approval, match: {tools: [count]}, when: 'args.key.startsWith("ask")', reason: somebody has to look, wait: 60s}
  - {id: wrong, effect: forbid, match: {tools: [count]}, when: 'args.key.startsWith("wrong") && args.missing > 3'}
`)
	for i, args := range []string{`{"key":"a"}`, `{"key":"/etc/passwd"}`, `{"key":"é\u0001"}`, `{"key":"b"}`, `{"key":"c"}`, `{"key":"d"}`, `{"key":"e"}`} {
		r.call("read", args)
		r.call("count", strings.Replace(args, "}", fmt.Sprintf(`,"note":"n%d","big":12345678901234567890}`, i), 1))
	}
	r.call("count", `{"key":"wrong"}`)
	r.call("count", `{"key":"large","fill":"`+strings.Repeat("x", schemas.InlineBody)+`"}`)
	r.call("none", `{}`)
	one := r.later("count", `{"key":"ask one"}`)
	r.say("grant", r.asked(`{"key":"ask one"}`, 1).ID, "--by", "ann")
	<-one
	two := r.later("count", `{"key":"ask two"}`)
	r.say("refuse", r.asked(`{"key":"ask two"}`, 1).ID, "--by", "ann")
	<-two
	for _, server := range []string{"up", ""} {
		if a, err := r.Post(t.Context(), server, "tools/list", "", `{"jsonrpc":"2.0","id":"l","method":"tools/list","params":{`+gateway.Meta+`}}`); err != nil {
			t.Fatalf("%d %s %v", a.Status, a.Body, err) // whatever it says
		}
	}
	for range 9 {
		r.call("count", `{"key":"again"}`)
	}
	events := r.Events()
	slices.SortFunc(events, func(a, b schemas.Event) int { return int(a.Seq) - int(b.Seq) })
	var log bytes.Buffer
	bundles := map[string]bool{}
	for _, e := range events {
		line, err := e.MarshalJSON()
		if err != nil {
			t.Fatal(err)
		}
		log.Write(append(line, '\n'))
		switch d := e.Data.(type) {
		case *schemas.Authorized:
			bundles[d.PolicySHA256] = true
		case *schemas.Denied:
			bundles[d.PolicySHA256] = true
		}
	}
	if err := os.Mkdir(filepath.Join(dir, "policies"), 0o755); err != nil {
		t.Fatal(err)
	}
	keep := func(name string, text []byte) {
		if err := os.WriteFile(filepath.Join(dir, name), text, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	for digest := range bundles {
		keep("policies/"+digest+".json", goldenPolicy(t, r, digest))
	}
	keep("events.jsonl", log.Bytes())
	keep("made.jsonl", goldenMade(t, events))
}

// goldenPolicy asks the gateway for a bundle.
func goldenPolicy(t *testing.T, r *ruled, digest string) []byte {
	t.Helper()
	token, err := os.ReadFile(filepath.Join(r.Dir, "data", "admin.token"))
	if err != nil {
		t.Fatal(err)
	}
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, r.Admin+"/api/v1/policies/"+digest, nil)
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Authorization", "Bearer "+strings.TrimSpace(string(token)))
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = resp.Body.Close() }()
	var text bytes.Buffer
	if _, err := text.ReadFrom(resp.Body); err != nil || resp.StatusCode != http.StatusOK {
		t.Fatalf("policy %s: %s %v", digest, resp.Status, err)
	}
	return bytes.TrimSuffix(text.Bytes(), []byte("\n"))
}
