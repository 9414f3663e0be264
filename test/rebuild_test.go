package test

import (
	"bytes"
	"encoding/json"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"waybill.dev/projections"
	"waybill.dev/schemas"
	"waybill.dev/test/upstream"
)

// TestRebuildCommand: the derived tables are made anew while calls go on, of the
// record and of what was exported, and are what they were.
func TestRebuildCommand(t *testing.T) {
	t.Parallel()
	g := recording(t)
	stop, stopped := make(chan struct{}), make(chan int)
	go func() {
		for n := 0; ; n++ {
			select {
			case <-stop:
				stopped <- n
				return
			default:
				ask(t.Context(), g, tool{"counter", "read", upstream.Args{Key: "k"}})
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
	rebuilt()
	close(stop)
	calls := <-stopped
	if calls < 10 {
		t.Errorf("only %d calls meanwhile", calls)
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
