package test

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"waybill.dev/schemas"
	"waybill.dev/test/gateway"
	"waybill.dev/test/upstream"
)

// TestReplayOfHalf: of a session whose beginning the log has dropped, and in which a
// newer version has written, every way of replay says so, and makes nothing up. The
// log is a NATS server of the test's own, since a gateway lets nobody at its own.
func TestReplayOfHalf(t *testing.T) {
	t.Parallel()
	addr := gateway.FreeAddr(t)
	if _, err := gateway.Child(t, "nats", envNATS+"="+addr, envNATSDir+"="+t.TempDir()).Await(t.Context(), "nats listens"); err != nil {
		t.Fatal(err)
	}
	u := upstream.Start(t)
	g := gateway.Start(t, gateway.Config(fmt.Sprintf("bus: {url: \"nats://%s\", replicas: 1}\nservers:\n", addr)+gateway.Server("counter", u.URL, "")))
	call := func(session, key string) {
		t.Helper()
		body := `{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{"name":"count","arguments":{"key":"` + key + `"},` + gateway.Meta + `}}`
		if a, err := g.Post(t.Context(), "counter", "tools/call", "count", body, "Waybill-Session: "+session); err != nil || !strings.Contains(string(a.Body), "for the 1. time") {
			t.Fatalf("%s %v", a.Body, err)
		}
	}
	call("gone", "a")
	for _, key := range []string{"b", "c", "d"} {
		call("half", key)
	}
	signed(t, g)
	gone, half := string(sessionNamed("gone")), string(sessionNamed("half"))
	whole := filepath.Join(t.TempDir(), "whole.waybill")
	if _, errs, exit := g.CLI("export", half, "-o", whole); exit != 0 {
		t.Fatal(errs)
	}
	events := g.Session(schemas.SessionKey(half))
	at := slices.IndexFunc(events, func(e schemas.Event) bool { return e.Kind() == schemas.KindStarted })
	if at < 0 {
		t.Fatalf("no call was claimed: %v", events)
	}

	js, closing := streams(t, "nats://"+addr)
	defer closing()
	log, err := js.Stream(t.Context(), "EVENTS")
	if err != nil {
		t.Fatal(err)
	}
	config := log.CachedInfo().Config
	keep := config
	keep.MaxMsgs = int64(log.CachedInfo().State.LastSeq - events[at].Seq + 1)
	for _, c := range []jetstream.StreamConfig{keep, config} {
		if _, err := js.UpdateStream(t.Context(), c); err != nil {
			t.Fatal(err)
		}
	}

	says := func(want int, args []string, words ...string) string {
		t.Helper()
		out, errs, exit := g.CLI(args...)
		for _, w := range words {
			if !strings.Contains(out+errs, w) {
				t.Errorf("%q does not say %q:\n%s%s", args, w, out, errs)
			}
		}
		if exit != want {
			t.Errorf("%q: exit %d, want %d:\n%s%s", args, exit, want, out, errs)
		}
		return out + errs
	}
	const beginning = "the beginning of the session is not there any more"
	rules := t.TempDir()
	if err := os.WriteFile(filepath.Join(rules, "rules.yaml"), []byte("rules: [{id: all, effect: permit, match: {tools: ['*']}}, {id: never, effect: forbid, match: {tools: [count]}}]\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "half.waybill")
	says(1, []string{"replay", gone}, "no session", "in the log")
	says(1, []string{"replay", gone, "--verify"}, "no session", "in the log")
	says(1, []string{"export", gone, "-o", file}, "no session", "in the log")
	says(0, []string{"replay", half}, beginning)
	says(0, []string{"replay", half, "--verify"}, beginning, "calls whose beginning is not there", "but for what is named above")
	says(0, []string{"export", half, "-o", file}, beginning)
	says(0, []string{"replay", "--from", file}, beginning)
	says(0, []string{"replay", "--from", file, "--verify"}, beginning, "but for what is named above")
	says(3, []string{"replay", half, "--policy", rules}, beginning)
	// What was exported before is whole still.
	if out := says(0, []string{"replay", "--from", whole, "--verify"}, "everything is as it was recorded"); strings.Contains(out, beginning) {
		t.Errorf("a whole file: %s", out)
	}

	// A newer version has written two events that this one cannot read.
	last, err := log.GetMsg(t.Context(), events[len(events)-1].Seq)
	if err != nil {
		t.Fatal(err)
	}
	for i, change := range []func(m *nats.Msg){
		func(m *nats.Msg) {
			m.Header.Set("Waybill-Event", strings.Replace(m.Header.Get("Waybill-Event"), `"v":1`, `"v":2`, 1))
		},
		func(m *nats.Msg) {
			m.Header.Set("Waybill-Event", strings.Replace(m.Header.Get("Waybill-Event"), `"kind":"completed"`, `"kind":"teleported"`, 1))
			m.Subject = strings.Replace(m.Subject, ".completed.", ".teleported.", 1)
		},
	} {
		m := &nats.Msg{Subject: last.Subject, Header: nats.Header{}, Data: last.Data}
		m.Header.Set("Waybill-Event", last.Header.Get("Waybill-Event"))
		m.Header.Set(jetstream.MsgIDHeader, fmt.Sprint("newer-", i))
		change(m)
		if _, err := js.PublishMsg(t.Context(), m); err != nil {
			t.Fatal(err)
		}
	}
	signed(t, g)
	const newer, unknown = "envelope version 2, this program reads 1", "teleported"
	says(0, []string{"replay", half}, newer, unknown)
	says(0, []string{"replay", half, "--json"}, newer, unknown)
	says(0, []string{"replay", half, "--verify"}, newer, unknown, "2: messages that this program cannot read")
	says(0, []string{"export", half, "-o", file}, newer, unknown)
	says(0, []string{"replay", "--from", file}, newer, unknown)
	says(0, []string{"replay", "--from", file, "--verify"}, newer, unknown, "2: messages that this program cannot read")
	says(3, []string{"replay", half, "--policy", rules}, "2 events that this program cannot read")
	says(1, []string{"replay", half, "--serve", "127.0.0.1:0"}, newer, "so the session cannot be played")
}
