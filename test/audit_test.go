package test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"golang.org/x/mod/sumdb/tlog"

	"waybill.dev/projections/audit"
	"waybill.dev/schemas"
	"waybill.dev/test/gateway"
	"waybill.dev/test/peers"
	"waybill.dev/test/upstream"
)

// say makes a call in a session of that name, of which the upstream repeats what
// is said.
func say(t *testing.T, g *gateway.Gateway, session, key, what string, header ...string) {
	t.Helper()
	args, err := json.Marshal(upstream.Args{Key: key, Pad: what})
	if err != nil {
		t.Fatal(err)
	}
	body := fmt.Sprintf(`{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{"name":"count","arguments":%s,%s}}`, args, gateway.Meta)
	a, err := g.Post(t.Context(), "counter", "tools/call", "count", body, append(header, "Waybill-Session: "+session)...)
	if err != nil || a.Status != http.StatusOK || !bytes.Contains(a.Body, []byte(what)) {
		t.Fatalf("%d %s %v", a.Status, a.Body, err)
	}
}

// sessionNamed is the key of the session of a name.
func sessionNamed(name string) schemas.SessionKey {
	return schemas.NewSessionKey("acme", "researcher", name)
}

// auditState is what `audit checkpoint --json` prints.
type auditState struct {
	Checkpoint string
	Keys       []string
	Leaves     uint64
	At         audit.Position
}

func stateOf(t *testing.T, g *gateway.Gateway) auditState {
	t.Helper()
	out, errs, exit := g.CLI("audit", "checkpoint", "--json")
	if exit != 0 {
		t.Fatalf("audit checkpoint: %s", errs)
	}
	var s auditState
	if err := json.Unmarshal([]byte(out), &s); err != nil {
		t.Fatal(err)
	}
	return s
}

// size is how many leaves a checkpoint is of.
func size(t *testing.T, checkpoint string) (n uint64) {
	t.Helper()
	if lines := strings.Split(checkpoint, "\n"); len(lines) > 2 {
		if _, err := fmt.Sscan(lines[1], &n); err != nil {
			t.Fatal(err)
		}
	}
	return n
}

// signed waits until all that the log has is signed.
func signed(t *testing.T, g *gateway.Gateway) auditState {
	t.Helper()
	tick := time.NewTicker(100 * time.Millisecond)
	defer tick.Stop()
	for begun := time.Now(); ; <-tick.C {
		s := stateOf(t, g)
		if n := size(t, s.Checkpoint); n > 0 && n == s.Leaves {
			if r, exit := verify(t, g); exit == 0 && r.Unsigned == 0 || exit != 0 {
				return s
			}
		}
		if time.Since(begun) > 30*time.Second*slowdown {
			t.Fatalf("not signed: %+v", s)
		}
	}
}

// verify runs `audit verify`.
func verify(t *testing.T, g *gateway.Gateway, args ...string) (r audit.Report, exit int) {
	t.Helper()
	out, errs, exit := g.CLI(append([]string{"audit", "verify", "--json"}, args...)...)
	if err := json.Unmarshal([]byte(out), &r); err != nil {
		t.Fatalf("audit verify: exit %d: %s%s", exit, out, errs)
	}
	return r, exit
}

func first(r audit.Report) string {
	if r.OK() {
		return "nothing"
	}
	return r.Problems[0].String()
}

// A record is signed, proved to a verifier in another language, kept and verified
// without the gateway; a row that is changed is named; and what is erased is in
// no file and in no row, while all of the rest still fits what was signed.
func TestAudit(t *testing.T) {
	g := recording(t)
	canary := "canary-" + strings.Repeat("of what nobody may find ", 4)
	for i := range 4 {
		say(t, g, "stays", fmt.Sprint("a", i), "said and kept")
		say(t, g, "goes", fmt.Sprint("b", i), canary)
	}
	s := signed(t, g)
	events := s.At[audit.Events]
	eventually(t, g, "SELECT count() AS n FROM events", fmt.Sprintf(`{"n":%d}`, events))
	r, exit := verify(t, g)
	if exit != 0 || r.Messages != s.Leaves || r.Rows != events || r.Checkpoints == 0 {
		t.Fatalf("exit %d, %+v", exit, r)
	}
	file := func(name, text string) string {
		name = filepath.Join(g.Dir, name)
		if err := os.WriteFile(name, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return name
	}
	earlier := file("checkpoint.txt", s.Checkpoint)

	// A proof stands alone.
	proof := filepath.Join(g.Dir, "proof.json")
	if _, errs, exit := g.CLI("audit", "prove", "2", "--out", proof); exit != 0 {
		t.Fatal(errs)
	}
	key := s.Keys[len(s.Keys)-1]
	node := func(proof, key string) (string, error) {
		out, err := exec.Command("node", "testdata/audit/verify.mjs", proof, key).CombinedOutput()
		return string(out), err
	}
	text, err := os.ReadFile(proof)
	if err != nil {
		t.Fatal(err)
	}
	var p audit.Proof
	if err := json.Unmarshal(text, &p); err != nil {
		t.Fatal(err)
	}
	if out, err := node(proof, key); err != nil || !strings.HasPrefix(out, fmt.Sprintf("proved: EVENTS 2 is leaf %d of %d", p.Number, s.Leaves)) {
		t.Errorf("node: %v %s", err, out)
	}
	for _, change := range [][2]string{{`\"tenant\":\"acme\"`, `\"tenant\":\"acne\"`}, {fmt.Sprintf(`"number":%d`, p.Number), fmt.Sprintf(`"number":%d`, p.Number+1)}, {`"path":["`, `"path":["A`}, {`"header":{"`, `"header":{"X`}} {
		bad := strings.Replace(string(text), change[0], change[1], 1)
		if bad == string(text) {
			t.Fatalf("the proof has no %s", change[0])
		}
		if out, err := node(file("bad.json", bad), key); err == nil {
			t.Errorf("node takes %s for %s: %s", change[1], change[0], out)
		}
	}
	if _, other, err := audit.NewKey(strings.Split(key, "+")[0], make([]byte, 32)); err != nil {
		t.Error(err)
	} else if out, err := node(proof, other); err == nil {
		t.Errorf("node takes another key: %s", out)
	}

	// Kept, it is verified without the gateway; changed, it is told.
	saved := filepath.Join(g.Dir, "saved.jsonl")
	if r, exit = verify(t, g, "--save", saved); exit != 0 {
		t.Fatal(first(r))
	}
	if r, exit = verify(t, g, saved, "--key", key, "--against", earlier); exit != 0 || r.Rows != events {
		t.Errorf("the kept one: %+v", r)
	}
	lines, err := os.ReadFile(saved)
	if err != nil {
		t.Fatal(err)
	}
	changed := bytes.Replace(lines, []byte(`"name":"count"`), []byte(`"name":"cound"`), 1) // a row's
	if r, exit = verify(t, g, file("changed.jsonl", string(changed)), "--key", key); exit != 1 {
		t.Errorf("exit %d of a kept one that was changed: %s", exit, first(r))
	}
	if _, errs, exit := g.CLI("audit", "verify", file("short.jsonl", string(lines[:len(lines)-20])), "--key", key); exit != 1 || !strings.Contains(errs, "breaks off") && !strings.Contains(errs, "line ") {
		t.Errorf("a part of one: exit %d %s", exit, errs)
	}

	// A row that is changed, or dropped.
	write := writer(t, g)
	write("ALTER TABLE waybill.calls_v1 UPDATE rule = concat(rule, 'x') WHERE 1 SETTINGS mutations_sync = 1")
	if r, exit = verify(t, g); exit != 1 || len(r.Problems) != 8 || !strings.Contains(first(r), "calls_v1: the column rule is not what the event says") {
		t.Errorf("a changed row of another table: exit %d, %v", exit, r.Problems)
	}
	write("ALTER TABLE waybill.calls_v1 UPDATE rule = substring(rule, 1, length(rule) - 1) WHERE 1 SETTINGS mutations_sync = 1")
	write("ALTER TABLE waybill.events_v1 UPDATE body = 'other' WHERE seq = 3 SETTINGS mutations_sync = 1")
	if r, exit = verify(t, g); exit != 1 || !strings.HasPrefix(first(r), "EVENTS 3: ") || !strings.Contains(first(r), "the row's body was changed") {
		t.Errorf("a changed row: exit %d, %s", exit, first(r))
	}
	write("ALTER TABLE waybill.events_v1 DELETE WHERE seq = 3 SETTINGS mutations_sync = 1")
	if r, exit = verify(t, g); exit != 1 || !strings.HasPrefix(first(r), "EVENTS 3: ") || !strings.Contains(first(r), "its row is missing") {
		t.Errorf("a dropped row: exit %d, %s", exit, first(r))
	}

	// Erased.
	has := func() (files []string) { return filesWith(t, filepath.Join(g.Dir, "data"), "canary-") }
	if len(has()) == 0 {
		t.Fatal("the canary is in no file: this test would find nothing")
	}
	parts := partsOf(t, g)
	begun := time.Now()
	out, errs, exit := g.CLI("erase", string(sessionNamed("goes")), "--reason", "asked for", "--json")
	t.Logf("erased in %s", time.Since(begun))
	if exit != 0 {
		t.Fatalf("erase: %s", errs)
	}
	if files := has(); len(files) > 0 {
		t.Errorf("after the erasure the canary is in %v", files)
	}
	if n := strings.TrimSpace(query(t, g, "SELECT count() AS n FROM events WHERE body LIKE '%canary%' OR envelope LIKE '%canary%'")); n != `{"n":0}` {
		t.Errorf("rows with the canary: %s", n)
	}
	if n := strings.TrimSpace(query(t, g, fmt.Sprintf("SELECT count() AS n FROM events WHERE session = '%s' AND kind != 'erased'", sessionNamed("goes")))); n != `{"n":0}` {
		t.Errorf("rows of the session: %s", n)
	}
	for _, part := range partsOf(t, g) {
		if slices.Contains(parts, part) {
			t.Errorf("the old part %s is still there", part)
		}
	}
	var done struct{ Seq, Leaf uint64 }
	if err := json.Unmarshal([]byte(out), &done); err != nil {
		t.Fatal(err)
	}
	r, _ = verify(t, g, "--against", earlier)
	if len(r.Problems) != 1 || !strings.HasPrefix(first(r), "EVENTS 3: ") || !strings.Contains(first(r), "its row is missing") { // which was dropped above
		t.Errorf("after the erasure: %v", r.Problems)
	}
	if r.Erased == 0 || r.Erased+r.Messages != r.Signed {
		t.Errorf("%d erased, %d others, of %d", r.Erased, r.Messages, r.Signed)
	}
	// That it was erased is an event, which can be proved, as can the digests.
	if _, errs, exit := g.CLI("audit", "prove", fmt.Sprint(done.Seq), "--out", proof); exit != 0 {
		t.Error(errs)
	} else if out, err := node(proof, key); err != nil {
		t.Errorf("node: %v %s", err, out)
	}
	for _, e := range g.Session(sessionNamed("goes")) {
		if d, ok := e.Data.(*schemas.Erased); !ok || d.Reason != "asked for" {
			t.Errorf("the session has %s", e.ID())
		}
	}
	if _, errs, exit := g.CLI("audit", "prove", fmt.Sprint(done.Seq-1), "--out", proof); exit != 0 {
		t.Error(errs)
	} else if out, err := node(proof, key); err != nil {
		t.Errorf("node, of an erased one: %v %s", err, out)
	}
	t.Logf("until here %s", time.Since(begun))
	// Nothing comes back with a restart.
	if err := g.Stop(); err != nil {
		t.Error(err)
	}
	if files := has(); len(files) > 0 {
		t.Errorf("after a stop the canary is in %v", files)
	}
	// What the log has lost to its age can be erased all the same.
	block := filepath.Join(g.Dir, "data", "log", "jetstream", "$G", "streams", "EVENTS", "msgs", "1.blk")
	all := readBlock(t, block)
	aged := 0
	for i := range all {
		if strings.Contains(all[i].subject, string(sessionNamed("stays"))) {
			all[i].time -= uint64(25 * time.Hour)
			aged++
		}
	}
	writeBlock(t, block, "EVENTS", 1, all)
	g.Restart()
	if r, _ = verify(t, g, "--against", earlier); r.Erased == 0 || r.Unsigned > 2 {
		t.Errorf("after a restart: %+v", r)
	}
	if out, _, exit := g.CLI("replay", string(sessionNamed("stays")), "--json"); aged == 0 || exit == 0 {
		t.Fatalf("the log still has %s", out)
	}
	out, errs, exit = g.CLI("erase", string(sessionNamed("stays")), "--json")
	if exit != 0 || !strings.Contains(out, `"events":`) {
		t.Fatalf("erase what the log has lost: %s %s", out, errs)
	}
	files := filesWith(t, filepath.Join(g.Dir, "data"), "said and kept")
	files = slices.DeleteFunc(files, func(f string) bool { return f == block }) // what is too old goes with its block
	if len(files) > 0 {
		t.Errorf("after the second erasure it is in %v", files)
	}
	if n := strings.TrimSpace(query(t, g, fmt.Sprintf("SELECT count() AS n FROM events WHERE session = '%s' AND kind != 'erased'", sessionNamed("stays")))); n != `{"n":0}` {
		t.Errorf("rows of the session: %s", n)
	}
	if _, errs, exit := g.CLI("erase", "nobody"); exit != 1 || !strings.Contains(errs, "no session") {
		t.Errorf("a session that nobody knows: %d %s", exit, errs)
	}
}

// writer is a connection to the record that may write, as who has the disk may.
func writer(t *testing.T, g *gateway.Gateway) func(sql string) {
	t.Helper()
	dir := filepath.Join(g.Dir, "data", "clickhouse")
	url, err := os.ReadFile(filepath.Join(dir, "reader.url"))
	if err != nil {
		t.Fatal(err)
	}
	password, err := os.ReadFile(filepath.Join(dir, "gateway.password"))
	if err != nil {
		t.Fatal(err)
	}
	_, host, _ := strings.Cut(strings.TrimSpace(string(url)), "@")
	return func(sql string) {
		t.Helper()
		resp, err := http.Post("http://gateway:"+strings.TrimSpace(string(password))+"@"+host, "text/plain", strings.NewReader(sql))
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = resp.Body.Close() }()
		if b, _ := io.ReadAll(resp.Body); resp.StatusCode != http.StatusOK {
			t.Fatalf("%s: %s", sql, b)
		}
	}
}

// partsOf are the directories of the table of events, which are never changed and
// so hold what they held until they go.
func partsOf(t *testing.T, g *gateway.Gateway) (all []string) {
	t.Helper()
	root := filepath.Join(g.Dir, "data", "clickhouse")
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err == nil && d.Name() == "body.bin" {
			all = append(all, path)
		}
		if err == nil && d.Name() == "data.bin" {
			if b, err := os.ReadFile(filepath.Join(filepath.Dir(path), "columns.txt")); err == nil && bytes.Contains(b, []byte("`envelope`")) {
				all = append(all, path)
			}
		}
		return nil
	})
	if err != nil || len(all) == 0 {
		t.Fatalf("%v: no parts of the table of events below %s", err, root)
	}
	return all
}

// filesWith are the files below a directory that have a text.
func filesWith(t *testing.T, dir, text string) (all []string) {
	t.Helper()
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return nil // it went while we looked
		}
		if b, err := os.ReadFile(path); err == nil && bytes.Contains(b, []byte(text)) {
			all = append(all, path)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return all
}

// Who has the disk can write what they like into the log, with checksums that are
// right; the verifier names what is not as it was signed.
func TestAuditTamper(t *testing.T) {
	u := upstream.Start(t)
	g := gateway.Start(t, gateway.Config("servers:\n"+gateway.Server("counter", u.URL, "deadline: 20s")))
	for i := range 5 {
		for _, session := range []string{"one", "two", "three"} {
			say(t, g, session, session+fmt.Sprint(i), "said in "+session)
		}
	}
	earlier := filepath.Join(t.TempDir(), "checkpoint.txt")
	if err := os.WriteFile(earlier, []byte(signed(t, g).Checkpoint), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := g.Stop(); err != nil {
		t.Fatal(err)
	}
	data, kept := filepath.Join(g.Dir, "data"), filepath.Join(g.Dir, "kept")
	if err := os.Rename(data, kept); err != nil {
		t.Fatal(err)
	}
	block := filepath.Join(data, "log", "jetstream", "$G", "streams", "EVENTS", "msgs", "1.blk")
	again := func() {
		t.Helper()
		if err := errors.Join(os.RemoveAll(data), os.CopyFS(data, os.DirFS(kept))); err != nil {
			t.Fatal(err)
		}
		_ = os.Chmod(filepath.Join(data, "admin.token"), 0o600)
		_ = os.Chmod(filepath.Join(data, "audit.key"), 0o600)
	}
	at := func(all []blockRecord, seq uint64) int {
		return slices.IndexFunc(all, func(r blockRecord) bool { return r.seq == seq })
	}
	of := func(session string) func(blockRecord) bool {
		return func(r blockRecord) bool { return strings.Contains(r.subject, string(sessionNamed(session))) }
	}
	for _, tt := range []struct {
		name   string
		tamper func([]blockRecord) []blockRecord
		want   []string
	}{
		{"nothing", func(all []blockRecord) []blockRecord { return all }, nil},
		{"a byte of a body", func(all []blockRecord) []blockRecord {
			i := slices.IndexFunc(all, func(r blockRecord) bool { return bytes.Contains(r.body, []byte("said in two")) })
			all[i].body = bytes.Replace(all[i].body, []byte("said in two"), []byte("said in tvo"), 1)
			return all
		}, []string{"the message was changed", "body", string(sessionNamed("two"))}},
		{"a byte of an envelope", func(all []blockRecord) []blockRecord {
			i := at(all, 7)
			all[i].header = bytes.Replace(all[i].header, []byte(`"agent":"researcher"`), []byte(`"agent":"researchex"`), 1)
			return all
		}, []string{"EVENTS 7: ", "the message was changed", "headers"}},
		{"a time", func(all []blockRecord) []blockRecord { all[at(all, 9)].time++; return all }, []string{"EVENTS 9: ", "the message was changed", "time"}},
		{"one deleted", func(all []blockRecord) []blockRecord { i := at(all, 12); return slices.Delete(all, i, i+1) },
			[]string{"EVENTS 12: ", "deleted from the log"}},
		{"the oldest deleted", func(all []blockRecord) []blockRecord { return all[2:] },
			[]string{"EVENTS 1: ", "deleted from the log before its time", string(sessionNamed("one"))}},
		{"two swapped", func(all []blockRecord) []blockRecord {
			i, j := at(all, 10), at(all, 15)
			all[i], all[j] = all[j], all[i]
			all[i].seq, all[j].seq = all[j].seq, all[i].seq
			return all
		}, []string{"EVENTS 10: ", "the message was changed", "subject"}},
		{"a session dropped", func(all []blockRecord) []blockRecord { return slices.DeleteFunc(all, of("two")) },
			[]string{"deleted from the log", string(sessionNamed("two"))}},
		{"the tail cut off", func(all []blockRecord) []blockRecord { return all[:len(all)-3] }, []string{"cut off the end of the log"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			again()
			all := readBlock(t, block)
			before := len(all)
			writeBlock(t, block, "EVENTS", 1, tt.tamper(all))
			g.Restart()
			r, exit := verify(t, g, "--against", earlier)
			if tt.want == nil {
				if exit != 0 || r.Messages < uint64(before) {
					t.Errorf("exit %d: %+v", exit, r)
				}
			} else {
				for _, want := range tt.want {
					if exit != 1 || !strings.Contains(first(r), want) {
						t.Errorf("exit %d, found %q, want %q in it", exit, first(r), want)
					}
				}
				t.Logf("found: %s", first(r))
			}
			g.Kill()
		})
	}

	// With its leaves, of which the tree has the hashes only, nothing would be missed.
	t.Run("the beginning of log and feed deleted", func(t *testing.T) {
		again()
		all := readBlock(t, block)
		writeBlock(t, block, "EVENTS", 1, all[at(all, 6):])
		feed := filepath.Join(data, "log", "jetstream", "$G", "streams", "FEED", "msgs", "1.blk")
		records := readBlock(t, feed)
		begin := slices.IndexFunc(records, func(r blockRecord) bool { return bytes.Contains(r.body, []byte(`"stream":"EVENTS","seq":6,`)) })
		writeBlock(t, feed, "FEED", 1, records[begin:])
		g.Restart()
		r, exit := verify(t, g, "--against", earlier)
		found := first(r)
		if exit != 1 || len(r.Problems) != 1 || !strings.HasPrefix(found, fmt.Sprintf("leaf %d: the feed has lost it and all before it before their time", begin-1)) {
			t.Errorf("exit %d: %v", exit, r.Problems)
		}
		if r.Unfed != 5 { // of EVENTS; those of SYSTEM are held against the hashes
			t.Errorf("%d leaves are known by their hashes only", r.Unfed)
		}
		if _, errs, exit := g.CLI("audit", "prove", "3"); exit != 1 || !strings.Contains(errs, "EVENTS 3 has no leaf") {
			t.Errorf("a proof of what is gone: exit %d %s", exit, errs)
		}
		t.Logf("found: %s", found)
		g.Kill()
	})

	// Without its checkpoints the tree is not signed again, until somebody says that
	// there is to be another.
	t.Run("the checkpoints deleted", func(t *testing.T) {
		again()
		if err := os.RemoveAll(filepath.Join(data, "log", "jetstream", "$G", "streams", "AUDIT")); err != nil {
			t.Fatal(err)
		}
		g.Launch()
		defer func() { g.Kill() }()
		tick := time.NewTicker(50 * time.Millisecond)
		defer tick.Stop()
		for begun := time.Now(); !strings.Contains(g.Output(), "checkpoints are lost"); <-tick.C {
			if time.Since(begun) > 10*time.Second*slowdown {
				t.Fatalf("it says nothing of lost checkpoints: %s", g.Output())
			}
		}
		g.Kill()
		g.Restart("--audit-anew")
		say(t, g, "four", "f0", "in a new audit")
		s := signed(t, g)
		if r, exit := verify(t, g); exit != 0 || r.Signed != s.Leaves || r.Messages == 0 {
			t.Errorf("exit %d: %s", exit, first(r))
		}
		if _, errs, exit := g.CLI("audit", "verify", "--against", earlier); exit != 1 || !strings.Contains(errs, "not a checkpoint of this log") {
			t.Errorf("the new audit has the name or the key of the old one: exit %d, %s", exit, errs)
		}
		old, err := filepath.Glob(filepath.Join(data, "audit.key.*"))
		if err != nil || len(old) != 1 {
			t.Errorf("%v: the former key is in %v", err, old)
		}
	})

	// Everything cut off at once, and other calls in the place of those, signed with
	// the same key: all of it fits, but not what was signed before.
	t.Run("a fork", func(t *testing.T) {
		again()
		g.Restart()
		say(t, g, "four", "f1", "what was")
		s := signed(t, g)
		if err := os.WriteFile(earlier, []byte(s.Checkpoint), 0o600); err != nil {
			t.Fatal(err)
		}
		g.Kill()
		again()
		g.Restart()
		say(t, g, "four", "f2", "what was not")
		say(t, g, "four", "f3", "what was not")
		signed(t, g)
		if r, exit := verify(t, g); exit != 0 {
			t.Errorf("by itself: %s", first(r))
		}
		r, exit := verify(t, g, "--against", earlier)
		if exit != 1 || !strings.HasPrefix(first(r), "fork: an earlier checkpoint says that the tree of ") {
			t.Errorf("exit %d: %s", exit, first(r))
		}
		t.Logf("found: %s", first(r))
		g.Kill()
		again()
		g.Restart()
		if r, exit := verify(t, g, "--against", earlier); exit != 1 || !strings.HasPrefix(first(r), "cut off: ") {
			t.Errorf("cut off everywhere: exit %d: %s", exit, first(r))
		}
	})
}

// The gateway, and the builder in it, is killed again and again under load: no
// message is without a leaf, none has two, and each checkpoint is of a tree that
// grew from the one before.
func TestAuditKills(t *testing.T) {
	_, g := counting(t)
	ctx, stop := context.WithCancel(t.Context())
	var calling sync.WaitGroup
	for i := range 8 {
		calling.Go(func() {
			for n := 0; ctx.Err() == nil; n++ {
				ask(ctx, g, tool{"counter", "count", upstream.Args{Key: fmt.Sprint(i, "-", n)}})
			}
		})
	}
	chance := rand.New(rand.NewPCG(1, 2))
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for range manyKills / 5 {
		// Wherever it is: at the beginning, in the middle of a batch, about to sign.
		for range chance.IntN(40) {
			<-tick.C
		}
		g.Kill()
		g.Restart()
	}
	stop()
	calling.Wait()
	s := signed(t, g)
	r, exit := verify(t, g)
	if exit != 0 || r.Gaps != 0 || r.Unsigned != 0 || r.Signed != s.Leaves || r.Messages != s.At[audit.Events]+s.At[audit.System] {
		t.Errorf("exit %d: %s; %+v; %d leaves, at %v", exit, first(r), r, s.Leaves, s.At)
	}
	t.Logf("%d kills: %d leaves, %d checkpoints", manyKills/5, s.Leaves, r.Checkpoints)
}

// A builder in a process of its own is killed, and another takes over, also to ask the
// witness, which nobody does beside it.
func TestAuditTakeover(t *testing.T) {
	t.Parallel() // it mostly waits
	addr, dir := gateway.FreeAddr(t), t.TempDir()
	p := gateway.Child(t, "nats", envNATS+"="+addr, envNATSDir+"="+dir)
	if _, err := p.Await(t.Context(), "nats listens"); err != nil {
		t.Fatal(err)
	}
	u := upstream.Start(t)
	w := peers.Litewitness(t, "witness.example")
	config := gateway.Config(fmt.Sprintf("bus: {url: \"nats://%s\", replicas: 1}\naudit: {witness_every: 1s, witnesses: [{url: %q, key: %q}]}\nservers:\n", addr, w.URL, w.Key) + gateway.Server("counter", u.URL, ""))
	g := gateway.Start(t, config, gateway.Roles("edge", "policy", "dispatch"))
	builders := []*gateway.Gateway{gateway.Start(t, config, gateway.Roles("audit")), gateway.Start(t, config, gateway.Roles("audit"))}
	say(t, g, "one", "k1", "before")
	key := signed(t, g).Keys[0]
	origin, _, _ := strings.Cut(key, "+")
	w.Know(origin, key)
	cosigned(t, g, 1)
	asking := 0
	for _, b := range builders {
		asking += strings.Count(get(t, b.Admin+"/metrics"), "\nwaybill_audit_cosigned{")
	}
	if asking != 1 {
		t.Errorf("%d processes ask the witness", asking)
	}
	js, closing := streams(t, "nats://"+addr)
	defer closing()
	s, err := js.Stream(t.Context(), "KV_OWNERS")
	if err != nil {
		t.Fatal(err)
	}
	owner := func() string {
		m, err := s.GetLastMsgForSubject(t.Context(), "$KV.OWNERS.own.audit.builder")
		if err != nil {
			t.Fatal(err)
		}
		return string(m.Data)
	}
	before := owner()
	// Whichever it is: until it was the one that builds.
	for i, b := range builders {
		b.Kill()
		say(t, g, "one", fmt.Sprint("k2", i), "without one of them")
		signed(t, g)
		b.Restart()
		if owner() != before {
			break
		}
	}
	if owner() == before {
		t.Error("who was killed is still said to build")
	}
	last := cosigned(t, g, signed(t, g).Leaves)
	if r, exit := verify(t, g); exit != 0 || r.Unsigned != 0 || len(r.Witnessed) != 1 || r.Witnessed[0].Size != size(t, last) {
		t.Errorf("exit %d: %s; %v", exit, first(r), r.Witnessed)
	}
}

// proveAlone proves a record of the feed by what its subscriber can read, and by the
// public key alone.
func proveAlone(t *testing.T, g *gateway.Gateway, name, payload string) {
	t.Helper()
	url, err := os.ReadFile(filepath.Join(g.Dir, "data", "log", "subscribers", name+".url"))
	if err != nil {
		t.Fatal(err)
	}
	key, err := os.ReadFile(filepath.Join(g.Dir, "data", "audit.pub"))
	if err != nil {
		t.Fatal(err)
	}
	known, err := audit.Known(strings.Fields(string(key)))
	if err != nil {
		t.Fatal(err)
	}
	nc, err := nats.Connect(strings.TrimSpace(string(url)))
	if err != nil {
		t.Fatal(err)
	}
	defer nc.Close()
	get := func(what string) (*nats.Msg, error) {
		m, err := nc.Request("$JS.API.DIRECT.GET."+what, nil, 5*time.Second)
		if err != nil {
			return &nats.Msg{}, err
		}
		if m.Header.Get("Status") != "" {
			err = schemas.ErrNotFound
		}
		return m, err
	}
	m, err := get("AUDIT.audit.checkpoint")
	if err != nil {
		t.Fatal(err)
	}
	c, err := audit.OpenCheckpoint(string(m.Data), known)
	if err != nil {
		t.Fatal(err)
	}
	hashes := audit.Reader(tlog.Tree{N: int64(c.Size), Hash: c.Root}, func(tile tlog.Tile) ([]byte, error) {
		if tile.W == 1<<tile.H {
			m, err := get("AUDIT.tlog." + strings.ReplaceAll(tile.Path(), "/", "."))
			return m.Data, err
		}
		m, err := get(fmt.Sprintf("AUDIT_STATE.tlog.edge.%d", tile.L))
		if err == nil && !strings.HasPrefix(m.Header.Get("Waybill-Tile"), fmt.Sprintf("tile/8/%d/", tile.L)) {
			err = schemas.ErrNotFound
		}
		return m.Data, err
	})
	var event struct{ Data struct{ Number int64 } }
	if err := json.Unmarshal([]byte(payload), &event); err != nil {
		t.Fatal(err)
	}
	record, err := audit.CutRecord([]byte(payload))
	if err != nil {
		t.Fatal(err)
	}
	path, err := tlog.ProveRecord(int64(c.Size), event.Data.Number, hashes)
	if err == nil {
		err = tlog.CheckRecord(path, int64(c.Size), c.Root, event.Data.Number, tlog.RecordHash(record))
	}
	if err != nil {
		t.Errorf("leaf %d of %d, the newest of the subscriber: %v", event.Data.Number, c.Size, err)
	}
}

// The feed over NATS: a subscriber that was away misses nothing, and proves that
// a record is in the tree by what it has heard alone.
func TestAuditFeed(t *testing.T) {
	u := upstream.Start(t)
	g := gateway.Start(t, gateway.Config(`
tenants: [{id: acme}, {id: other}]
agents: [{id: researcher, tenant: acme}, {id: spy, tenant: other, token_sha256: "`+fmt.Sprintf("%x", sha256.Sum256([]byte("spy")))+`"}]
auth: {anonymous: researcher}
bus: {embedded: {listen: "`+gateway.FreeAddr(t)+`"}}
audit: {bodies: [acme], subscribers: [{name: acme-siem, tenant: acme}, {name: other-siem, tenant: other}]}
servers:
`+gateway.Server("counter", u.URL, "")))
	say(t, g, "one", "k1", "said to acme")
	say(t, g, "one", "k2", "said to other", "Authorization: Bearer spy")
	signed(t, g)
	pull := func(name string) (records []string) {
		url, err := os.ReadFile(filepath.Join(g.Dir, "data", "log", "subscribers", name+".url"))
		if err != nil {
			t.Fatal(err)
		}
		js, closing := streams(t, strings.TrimSpace(string(url)))
		defer closing()
		c, err := js.Consumer(t.Context(), "FEED", name)
		if err != nil {
			t.Fatal(err)
		}
		for {
			batch, err := c.Fetch(100, jetstream.FetchMaxWait(500*time.Millisecond))
			if err != nil {
				t.Fatal(err)
			}
			n := len(records)
			for m := range batch.Messages() {
				records = append(records, string(m.Data()))
				if err := m.DoubleAck(t.Context()); err != nil {
					t.Error(err)
				}
			}
			if len(records) == n {
				return records
			}
		}
	}
	records := pull("acme-siem")
	all := strings.Join(records, "\n")
	proveAlone(t, g, "acme-siem", records[len(records)-1])
	for _, want := range []string{`"type":"dev.waybill.requested"`, `"type":"dev.waybill.completed"`, "said to acme", `"specversion":"1.0"`} {
		if !strings.Contains(all, want) {
			t.Errorf("acme's feed has no %s: %s", want, all)
		}
	}
	others := strings.Join(pull("other-siem"), "\n")
	if strings.Contains(all, `"tenant":"other"`) || strings.Contains(others, `"tenant":"acme"`) || !strings.Contains(others, `"tenant":"other"`) {
		t.Error("a feed has another's records, or lacks its own")
	}
	if strings.Contains(others, "said to other") {
		t.Error("bodies are in the feed of a tenant that has none")
	}
	// Away while the gateway goes on, is killed and comes back.
	say(t, g, "one", "k3", "while away")
	g.Kill()
	g.Restart()
	say(t, g, "one", "k4", "after a crash")
	signed(t, g)
	all = strings.Join(pull("acme-siem"), "\n")
	if !strings.Contains(all, "while away") || !strings.Contains(all, "after a crash") {
		t.Errorf("missed: %s", all)
	}
	// The log is erased out of the feed, too.
	if _, errs, exit := g.CLI("erase", string(sessionNamed("one"))); exit != 0 {
		t.Fatal(errs)
	}
	if files := filesWith(t, filepath.Join(g.Dir, "data"), "while away"); len(files) > 0 {
		t.Errorf("after the erasure it is in %v", files)
	}
	if r, exit := verify(t, g); exit != 0 || r.Erased == 0 {
		t.Errorf("exit %d: %s; %+v", exit, first(r), r)
	}
}
