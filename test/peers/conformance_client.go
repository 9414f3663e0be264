package peers

import (
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/goccy/go-yaml"
)

// EverythingClient returns the path of the Go SDK's client for the suite: it does what MCP_CONFORMANCE_SCENARIO names with
// the server whose URL is its one argument.
func EverythingClient(t testing.TB) string {
	t.Helper()
	return installed(t, "bin", "everything-client")
}

// ConformanceClient runs one of the suite's client scenarios at a revision: the suite starts the scenario's server, and
// the command, whose path may have no space in it, with the server's URL as last argument. The environment of this
// process and env are the command's too.
func ConformanceClient(t testing.TB, command, revision, scenario string, env ...string) Result {
	t.Helper()
	dir := t.TempDir()
	suite := pkg(t, "@modelcontextprotocol", "conformance", "dist", "index.js")
	cmd := exec.Command(Node(t), suite, "client", "--command", command, "--spec-version", revision, "--scenario", scenario, "--output-dir", dir)
	cmd.Env = append(append(os.Environ(), "HOME="+t.TempDir(), "NO_COLOR=1", "NODE_OPTIONS="), env...)
	out := run(t, cmd)
	result := Result{Scenarios: map[string][]Check{}, Output: out.Stdout + out.Stderr, Exit: out.Exit}
	files, err := filepath.Glob(filepath.Join(dir, "*", "checks.json"))
	if err != nil || len(files) != 1 {
		t.Fatalf("conformance: %d results of %s, not one (%v):\n%s", len(files), scenario, err, result.Output)
	}
	var checks []Check
	text, err := os.ReadFile(files[0])
	if err == nil {
		err = json.Unmarshal(text, &checks)
	}
	if err != nil {
		t.Fatalf("conformance: reading %s: %v", files[0], err)
	}
	result.Scenarios[scenario] = checks
	return result
}

// ClientScenarios returns the names of the client scenarios that the suite runs for a revision: those that it requires
// and those that it runs without scoring them.
func ClientScenarios(t testing.TB, revision string) []string {
	t.Helper()
	text, err := os.ReadFile(pkg(t, "@modelcontextprotocol", "conformance", "requirements", revision+".yaml"))
	if err != nil {
		t.Fatal(err)
	}
	var set struct {
		Client    []string
		NotScored []struct{ Scenario, Leg string } `yaml:"not_scored"`
	}
	if err := yaml.Unmarshal(text, &set); err != nil {
		t.Fatalf("conformance: reading the requirements of %s: %v", revision, err)
	}
	names := set.Client
	for _, more := range set.NotScored {
		if more.Leg == "client" {
			names = append(names, more.Scenario)
		}
	}
	return names
}
