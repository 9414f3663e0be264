package projections_test

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"waybill.dev/projections"
	"waybill.dev/test/peers"
)

// An engine that can never run on this machine is not started again, and who waits for
// it is told so at once. The launcher's exit code says it.
func TestEngineUnsupported(t *testing.T) {
	dir := t.TempDir()
	launcher := filepath.Join(dir, "chserve")
	script := "#!/bin/sh\necho started >>" + filepath.Join(dir, "starts") + "\necho 'chserve: no Landlock here' >&2\nexit 3\n"
	if err := os.WriteFile(launcher, []byte(script), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := projections.Supported(t.Context(), launcher); !errors.Is(err, projections.ErrUnsupported) || !strings.Contains(err.Error(), "no Landlock here") {
		t.Errorf("asked: %v", err)
	}
	if err := projections.Supported(t.Context(), peers.ClickHouse(t)); err != nil {
		t.Errorf("the real one: %v", err)
	}
	var said strings.Builder
	e := projections.NewEngine(projections.EngineOptions{Launcher: launcher, Dir: dir, Log: slog.New(slog.NewTextHandler(&said, &slog.HandlerOptions{Level: slog.LevelError}))})
	ctx, stop := context.WithCancel(t.Context())
	var running sync.WaitGroup
	running.Go(func() {
		if err := e.Run(ctx); err != nil {
			t.Error(err)
		}
	})
	waiting, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	begun := time.Now()
	if _, err := e.Options(waiting, true); !errors.Is(err, projections.ErrDown) || !errors.Is(err, projections.ErrUnsupported) {
		t.Errorf("who waits is told: %v", err)
	}
	if time.Since(begun) > patience/2 {
		t.Error("who waits is told late")
	}
	stop()
	running.Wait()
	if b, err := os.ReadFile(filepath.Join(dir, "starts")); err != nil || strings.Count(string(b), "started") != 2 { // asked, and run
		t.Errorf("%v: started %q", err, b)
	}
	if strings.Count(said.String(), "\n") != 1 {
		t.Errorf("it says %s", said.String())
	}
}

// The file that says where to read is there while the engine serves, and no longer.
func TestReaderURL(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "clickhouse")
	e := projections.NewEngine(projections.EngineOptions{Launcher: peers.ClickHouse(t), Dir: dir})
	if err := os.MkdirAll(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(e.URLFile(), []byte("of one that was killed"), 0o600); err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(t.Context())
	var running sync.WaitGroup
	running.Go(func() {
		if err := e.Run(ctx); err != nil {
			t.Error(err)
		}
	})
	if _, err := e.Options(ctx, true); err != nil {
		t.Error(err)
	}
	if b, err := os.ReadFile(e.URLFile()); err != nil || !strings.HasPrefix(string(b), "http://reader:") {
		t.Errorf("while it serves: %v %s", err, b)
	}
	stop()
	running.Wait()
	if _, err := os.Stat(e.URLFile()); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("afterwards: %v", err)
	}
}
