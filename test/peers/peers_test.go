package peers

import (
	"errors"
	"net"
	"os/exec"
	"strings"
	"testing"
)

// The peers among themselves, with no gateway: what they report through the gateway is worth something only if this holds.

// Not in parallel: the suite gives single answers no more than half a second.
func TestConformanceDirect(t *testing.T) {
	ConformanceModern(t, EverythingServer(t))
}

// Not in parallel, for the same reason.
func TestConformanceLegacyDirect(t *testing.T) {
	ConformanceLegacy(t, EverythingServer(t, "-stateless=false"))
}

func TestInspectorDirect(t *testing.T) {
	t.Parallel()
	ExerciseInspector(t, EverythingServer(t))
}

func TestTypeScriptDirect(t *testing.T) {
	t.Parallel()
	ExerciseTypeScript(t, EverythingServer(t))
}

func TestGoSDKDirect(t *testing.T) {
	t.Parallel()
	ExerciseGoSDK(t, EverythingServer(t))
}

// A server that is not up to it must be found out: without sessions there is nobody to ask, so a stateless server fails what
// revision 2025-11-25 demands of sampling.
func TestConformanceTells(t *testing.T) {
	t.Parallel()
	result := Conformance(t, EverythingServer(t), "--scenario", "tools-call-sampling", "--spec-version", "2025-11-25")
	if err := result.Passed("tools-call-sampling"); err == nil || result.Exit == 0 {
		t.Errorf("passed (exit %d):\n%s", result.Exit, result.Output)
	}
	if err := result.Passed("caching"); err == nil {
		t.Error("a scenario that was not run passed")
	}
}

func TestStartReportsTheEnd(t *testing.T) {
	t.Parallel()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	addr := l.Addr().String()
	cmd := exec.Command(installed(t, "bin", "everything-server"), "-http", addr)
	var output strings.Builder
	cmd.Stderr = &output
	exited, err := start(cmd)
	if err != nil {
		t.Fatal(err)
	}
	ended := new(exec.ExitError)
	if err := <-exited; !errors.As(err, &ended) || !strings.Contains(output.String(), "address already in use") {
		t.Errorf("on a port in use: %v, %q", err, &output)
	}
	l.Close()
	if err := answers(t.Context(), addr, exited); err == nil || !strings.Contains(err.Error(), "exited") {
		t.Errorf("waiting for a program that has exited: %v", err)
	}
}
