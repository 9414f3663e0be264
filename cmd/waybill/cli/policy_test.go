package cli

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// The example rules do what their tests say, and the tests notice when they do
// not.
func TestExamplePolicies(t *testing.T) {
	dir, err := filepath.Abs("../../../deploy/policies")
	if err != nil {
		t.Fatal(err)
	}
	run := func(policies string) (int, string) {
		file := filepath.Join(t.TempDir(), "waybill.yaml")
		text := "tenants: [{id: acme}]\nagents: [{id: researcher, tenant: acme, groups: [analysts]}]\n" +
			"servers: [{name: everything, mcp: {url: 'http://127.0.0.1:1/mcp'}}]\npolicies: ['" + policies + "']\n"
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		var out strings.Builder
		code := Run(t.Context(), []string{"policy", "test", "--config", file}, Env{Stdout: &out, Stderr: &out, Getenv: os.Getenv})
		return code, out.String()
	}
	if code, out := run(filepath.Join(dir, "*.yaml")); code != exitOK || !strings.Contains(out, "11 tests of 1 files, 0 failed") {
		t.Errorf("exit %d\n%s", code, out)
	}
	// Each rule is needed by some test.
	text, err := os.ReadFile(filepath.Join(dir, "tools.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	tests, err := os.ReadFile(filepath.Join(dir, "tools_test.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	rules := strings.Split(string(text), "\n  - id: ")
	for i := 1; i < len(rules); i++ {
		id, _, _ := strings.Cut(rules[i], "\n")
		if id == "account-numbers" {
			continue // it orders and decides nothing
		}
		less := append(append([]string{}, rules[:i]...), rules[i+1:]...)
		other := t.TempDir()
		for name, text := range map[string][]byte{"tools.yaml": []byte(strings.Join(less, "\n  - id: ")), "tools_test.yaml": tests} {
			if err := os.WriteFile(filepath.Join(other, name), text, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		if code, out := run(filepath.Join(other, "*.yaml")); code == exitOK {
			t.Errorf("without rule %s all tests pass\n%s", id, out)
		}
	}
}
