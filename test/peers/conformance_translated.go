package peers

import (
	"slices"
	"strings"
	"testing"
)

// Untranslatable is a scenario that cannot pass where one era stands before the other.
type Untranslatable struct {
	Scenario string
	Check    string // that fails, and the only one
	Message  string // of that check, a part
	Why      string // the sentence of the specification that makes it impossible, and where it stands
}

// ConformanceTranslated demands of an endpoint that stands before a server of the other era that it passes every scenario that
// revision 2026-07-28 requires, and those for its headers, but for these, which must fail in exactly this check.
func ConformanceTranslated(t *testing.T, url string, but ...Untranslatable) {
	t.Helper()
	translated(t, url, modern, requiredModern, modernHeaders, but)
}

func translated(t *testing.T, url, revision string, count int, more []string, but []Untranslatable) {
	t.Helper()
	required := requirements(t, revision)
	if len(required) != count {
		t.Errorf("the suite requires %d server scenarios, not %d", len(required), count)
	}
	result := Conformance(t, url, "--requirements", revision)
	passed := 0
	for _, scenario := range slices.Concat(required, more) {
		t.Run(scenario, func(t *testing.T) {
			i := slices.IndexFunc(but, func(u Untranslatable) bool { return u.Scenario == scenario })
			if i < 0 {
				if err := result.Passed(scenario); err != nil {
					t.Error(err)
				} else if slices.Contains(required, scenario) {
					passed++
				}
				return
			}
			failed := 0
			for _, c := range result.Scenarios[scenario] {
				if c.Status == "SUCCESS" || c.Status == "INFO" {
					continue
				}
				failed++
				if c.ID != but[i].Check || !strings.Contains(c.Message, but[i].Message) {
					t.Errorf("%s %s: %s", c.Status, c.ID, c.Message)
				}
			}
			if failed != 1 {
				t.Errorf("%d checks fail, expected was %s alone, for: %s", failed, but[i].Check, but[i].Why)
			}
			t.Logf("cannot pass: %s", but[i].Why)
		})
	}
	t.Logf("%d of %d required scenarios pass", passed, count)
	if t.Failed() {
		t.Logf("conformance printed:\n%s", result.Output)
	}
}
