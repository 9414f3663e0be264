package test

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"waybill.dev/projections"
	"waybill.dev/schemas"
	"waybill.dev/test/gateway"
	"waybill.dev/test/upstream"
)

// TestRebuildCommand: the derived tables are made anew while calls go on, of the
// record and of sessions that are exported meanwhile, and are what they were.
func TestRebuildCommand(t *testing.T) {
	t.Parallel()
	g := recording(t)
	stop, stopped := make(chan struct{}), make(chan int)
	go func() {
		tick := time.NewTicker(20 * time.Millisecond) // what there is has to be read a few times
		defer tick.Stop()
		for n := 0; ; n++ {
			select {
			case <-stop:
				stopped <- n
				return
			case <-tick.C:
				ask(t.Context(), g, tool{"counter", "read", upstream.Args{Key: "k"}})
				body := `{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{"name":"count","arguments":{"key":"k"},` + gateway.Meta + `}}`
				if _, err := g.Post(t.Context(), "counter", "tools/call", "count", body, fmt.Sprintf("Waybill-Session: s%d", n%4)); err != nil {
					t.Error(err)
				}
			}
		}
	}()
	rebuilt := func(args ...string) {
		t.Helper()
		out, errs, exit := g.CLI(append([]string{"rebuild", "--json"}, args...)...)
		if exit != 0 {
			t.Fatalf("rebuild %q: exit %d, %s%s", args, exit, out, errs)
		}
		names := []string{}
		for line := range strings.Lines(out) {
			var r projections.Rebuilt
			if err := json.Unmarshal([]byte(line), &r); err != nil {
				t.Fatal(err)
			}
			if names = append(names, r.Table); r.State != r.Live || r.Swap == slices.Contains(args, "--dry-run") {
				t.Errorf("rebuild %q: %+v", args, r)
			}
		}
		if !slices.Equal(names, []string{"sessions_v1", "edges_v1", "calls_v1"}) {
			t.Errorf("rebuild %q: %q", args, names)
		}
	}
	rebuilt()
	// What was exported one after the other lacks what has come between.
	during := exportAll(t, g)
	rebuilt(append(during, "--accept-gaps")...)
	rebuilt()
	close(stop)
	calls := <-stopped
	if calls < 10 {
		t.Errorf("only %d calls meanwhile", calls)
	}

	settled(t, g)
	after := exportAll(t, g)
	rebuilt(append(after, "--dry-run")...)
	rebuilt(after...)
	for name, c := range map[string]struct {
		args []string
		says string
	}{
		"without a session": {after[2:], "the source does not have "},
		"redacted":          {[]string{"--from", redacted(t, g)}, "what was said is left out of it"},
		"truncated":         {[]string{"--from", spoiled(t, after[1], func(b []byte) []byte { return b[:len(b)*2/3] })}, "it breaks off"},
		"altered":           {[]string{"--from", spoiled(t, after[1], func(b []byte) []byte { return bytes.Replace(b, []byte(`"status":200`), []byte(`"status":201`), 1) })}, "it was altered"},
	} {
		if out, errs, exit := g.CLI(append([]string{"rebuild"}, c.args...)...); exit != 1 || out != "" || !strings.Contains(errs, c.says) {
			t.Errorf("%s: exit %d, %s%s", name, exit, out, errs)
		}
	}

	events := g.Events()
	slices.SortFunc(events, func(a, b schemas.Event) int { return int(a.Seq) - int(b.Seq) })
	var text bytes.Buffer
	for _, e := range events {
		line, err := e.MarshalJSON()
		if err != nil {
			t.Fatal(err)
		}
		text.Write(append(line, '\n'))
	}
	whole, part := filepath.Join(t.TempDir(), "whole"), filepath.Join(t.TempDir(), "part")
	lines := bytes.SplitAfter(text.Bytes(), []byte("\n"))
	for file, some := range map[string][][]byte{whole: lines, part: slices.Delete(slices.Clone(lines), 4, 6)} {
		if err := os.WriteFile(file, bytes.Join(some, nil), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	rebuilt("--from", whole, "--dry-run")
	rebuilt("--from", part, "--accept-gaps")
	if out, errs, exit := g.CLI("rebuild", "--from", part); exit != 1 || !strings.Contains(errs, "the source does not have 5 to 6 of log ") {
		t.Errorf("with a gap: exit %d, %s%s", exit, out, errs)
	}
	if out, errs, exit := g.CLI("rebuild", "--from", whole); exit != 0 || strings.Count(out, "equal to what was in use") != 3 {
		t.Errorf("exit %d, %s%s", exit, out, errs)
	}
}

// exportAll exports every session, as arguments of a rebuild.
func exportAll(t *testing.T, g *gateway.Gateway) (args []string) {
	t.Helper()
	out, errs, exit := g.CLI("sessions", "--json", "--limit", "0")
	if exit != 0 {
		t.Fatal(errs)
	}
	dir := t.TempDir()
	var all sync.WaitGroup
	defer all.Wait()
	for line := range strings.Lines(out) {
		var s struct{ Session schemas.SessionKey }
		if err := json.Unmarshal([]byte(line), &s); err != nil {
			t.Fatal(err)
		}
		file := filepath.Join(dir, string(s.Session))
		all.Go(func() { // each waits until the tree has what was stored last
			if _, errs, exit := g.CLI("export", string(s.Session), "-o", file); exit != 0 {
				t.Errorf("export %s: exit %d, %s", s.Session, exit, errs)
			}
		})
		args = append(args, "--from", file)
	}
	return args
}

// redacted exports a session without what was said.
func redacted(t *testing.T, g *gateway.Gateway) string {
	t.Helper()
	file := filepath.Join(t.TempDir(), "redacted")
	if _, errs, exit := g.CLI("export", string(sessionNamed("s1")), "-o", file, "--redact-bodies"); exit != 0 {
		t.Fatal(errs)
	}
	return file
}

// spoiled is a copy of a file that is not what it was.
func spoiled(t *testing.T, file string, how func([]byte) []byte) string {
	t.Helper()
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	bad := filepath.Join(t.TempDir(), "bad")
	if err := os.WriteFile(bad, how(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return bad
}
