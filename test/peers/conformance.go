package peers

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/goccy/go-yaml"
)

// Result is one run of the conformance suite.
type Result struct {
	Scenarios map[string][]Check // by name; a scenario that the suite could not carry out is absent
	Output    string             // everything the suite printed
	Exit      int                // 0 if all that is scored passed
}

// Check is one line of a scenario.
type Check struct {
	ID          string
	Description string
	Status      string // SUCCESS, FAILURE, WARNING (a SHOULD that is not met), SKIPPED or INFO
	Message     string `json:"errorMessage"`
}

// resultDir is how the suite names the folder of a server scenario's results: with the time, to the millisecond.
var resultDir = regexp.MustCompile(`^server-(.+)-\d{4}-\d\d-\d\dT\d\d-\d\d-\d\d-\d{3}Z$`)

// Conformance runs the suite's server scenarios against an MCP endpoint. Its args choose them, and go to the suite
// as they are: "--requirements", "2026-07-28", or "--scenario", "caching".
// The endpoint must be named localhost or 127.0.0.1: the suite tests protection against DNS rebinding only there.
func Conformance(t testing.TB, url string, args ...string) Result {
	t.Helper()
	dir := t.TempDir()
	suite := pkg(t, "@modelcontextprotocol", "conformance", "dist", "index.js")
	out := node(t, append([]string{suite, "server", "--url", url, "--output-dir", dir}, args...)...)

	result := Result{Scenarios: map[string][]Check{}, Output: out.Stdout + out.Stderr, Exit: out.Exit}
	files, err := filepath.Glob(filepath.Join(dir, "*", "checks.json"))
	if err != nil {
		t.Fatal(err)
	}
	for _, file := range files {
		name := resultDir.FindStringSubmatch(filepath.Base(filepath.Dir(file)))
		if name == nil {
			t.Fatalf("conformance: result folder of an unknown form: %s", file)
		}
		var checks []Check
		text, err := os.ReadFile(file)
		if err == nil {
			err = json.Unmarshal(text, &checks)
		}
		if err != nil {
			t.Fatalf("conformance: reading %s: %v", file, err)
		}
		result.Scenarios[name[1]] = checks
	}
	if len(result.Scenarios) == 0 {
		t.Fatalf("conformance: no scenario was carried out (exit %d):\n%s", result.Exit, result.Output)
	}
	return result
}

// Passed returns nil if the scenario was carried out and all its checks hold. It is stricter than the
// suite's score: a warning, or a check that was left out, is an error too, because everything-server itself earns
// neither, and a gateway that loses a capability would otherwise be let off the checks for it.
func (r Result) Passed(scenario string) error {
	checks, ok := r.Scenarios[scenario]
	if !ok || len(checks) == 0 {
		return fmt.Errorf("%s: no check was made", scenario)
	}
	var faults []string
	for _, c := range checks {
		if c.Status != "SUCCESS" && c.Status != "INFO" {
			faults = append(faults, fmt.Sprintf("%s %s: %s\n\t%s", c.Status, c.ID, c.Description, c.Message))
		}
	}
	if len(faults) > 0 {
		return fmt.Errorf("%s: %d of %d checks:\n%s", scenario, len(faults), len(checks), strings.Join(faults, "\n"))
	}
	return nil
}

// requiredModern and requiredLegacy are how many server scenarios revisions 2026-07-28 and 2025-11-25 require. The
// suite froze these sets; the numbers are here so that a suite that runs fewer is noticed.
const (
	requiredModern = 37
	requiredLegacy = 30
)

// modernHeaders are the scenarios for the headers that mirror the body. The suite does not score them, so they
// are asked for by name.
var modernHeaders = []string{"http-header-validation", "http-custom-header-server-validation"}

// ConformanceModern demands of an endpoint with everything-server's contents that it passes every scenario that revision
// 2026-07-28 requires, and those for its headers. Each is a subtest.
func ConformanceModern(t *testing.T, url string) {
	t.Helper()
	conforms(t, url, modern, requiredModern, modernHeaders...)
}

// ConformanceModernScored is ConformanceModern without the scenarios for the headers, which a server over stdio does not
// see: the protocol has them over HTTP only.
func ConformanceModernScored(t *testing.T, url string) {
	t.Helper()
	conforms(t, url, modern, requiredModern)
}

// ConformanceLegacy demands of an endpoint with the contents of everything-server's sessions ("-stateless=false") that it
// passes every scenario that revision 2025-11-25 requires. Each is a subtest.
func ConformanceLegacy(t *testing.T, url string) {
	t.Helper()
	conforms(t, url, legacy, requiredLegacy)
}

// serverMode says why everything-server without sessions ("-stateless=true") cannot do what a scenario of revision
// 2025-11-25 is about. Its tools test_sampling and test_elicitation* ask the client by a request of the server's own,
// which revision 2026-07-28 has removed ("Servers MUST send server-to-client requests using the MRTR pattern. The
// previous pattern of server-initiated requests is no longer supported", basic/patterns/mrtr), so that the tools
// answer with an error, whoever asks.
var serverMode = []string{"tools-call-sampling", "tools-call-elicitation", "elicitation-sep1034-defaults", "elicitation-sep1330-enums"}

// ConformanceLegacyTranslated demands of an endpoint with the contents of everything-server without sessions that it
// passes every scenario that revision 2025-11-25 requires, but for the four that this server refuses in that mode; that
// it refuses them is demanded too. Each is a subtest.
func ConformanceLegacyTranslated(t *testing.T, url string) {
	t.Helper()
	required := requirements(t, legacy)
	if len(required) != requiredLegacy {
		t.Errorf("the suite requires %d server scenarios, not %d", len(required), requiredLegacy)
	}
	result := Conformance(t, url, "--requirements", legacy)
	for _, scenario := range required {
		t.Run(scenario, func(t *testing.T) {
			err := result.Passed(scenario)
			switch refuses := slices.Contains(serverMode, scenario); {
			case !refuses && err != nil:
				t.Error(err)
			case refuses && err == nil:
				t.Error("it passes: the server does more than it did, so take it off the list")
			case refuses && !strings.Contains(err.Error(), "1 of 2 checks"):
				t.Errorf("it fails in another way than by the server's refusal: %v", err)
			}
		})
	}
	if t.Failed() {
		t.Logf("conformance printed:\n%s", result.Output)
	}
}

// conforms runs the scenarios that a revision requires, which are count, and demands these and more to be passed.
func conforms(t *testing.T, url, revision string, count int, more ...string) {
	t.Helper()
	required := requirements(t, revision)
	if len(required) != count {
		t.Errorf("the suite requires %d server scenarios, not %d", len(required), count)
	}
	result := Conformance(t, url, "--requirements", revision)
	for _, scenario := range slices.Concat(required, more) {
		t.Run(scenario, func(t *testing.T) {
			if err := result.Passed(scenario); err != nil {
				t.Error(err)
			}
		})
	}
	if result.Exit != 0 {
		t.Errorf("conformance: exit %d", result.Exit)
	}
	if t.Failed() {
		t.Logf("conformance printed:\n%s", result.Output)
	}
}

// requirements returns the names of the server scenarios that a revision requires, as the suite lists them.
func requirements(t testing.TB, revision string) []string {
	t.Helper()
	text, err := os.ReadFile(pkg(t, "@modelcontextprotocol", "conformance", "requirements", revision+".yaml"))
	if err != nil {
		t.Fatal(err)
	}
	var set struct{ Server []string }
	if err := yaml.Unmarshal(text, &set); err != nil {
		t.Fatalf("conformance: reading the requirements of %s: %v", revision, err)
	}
	return set.Server
}
