package peers

import "testing"

// taskScenarios are the suite's scenarios for the extension io.modelcontextprotocol/tasks, which no revision requires.
// Left out is tasks-status-notifications: of it the suite says by itself that it makes no check, since it has yet to
// listen where the notifications come (subscriptions/listen).
var taskScenarios = []string{
	"tasks-lifecycle", "tasks-capability-negotiation", "tasks-wire-fields", "tasks-request-state-removal", "tasks-mrtr-input",
	"tasks-request-headers", "tasks-dispatch-and-envelope", "tasks-required-task-error", "tasks-mrtr-composition",
}

// ConformanceTasks demands of an endpoint with the tools that these scenarios ask for that it passes all of them. Each is a
// subtest.
func ConformanceTasks(t *testing.T, url string) {
	t.Helper()
	for _, scenario := range taskScenarios {
		t.Run(scenario, func(t *testing.T) {
			result := Conformance(t, url, "--scenario", scenario, "--spec-version", modern, "--force")
			if err := result.Passed(scenario); err != nil {
				t.Errorf("%v\n%s", err, result.Output)
			}
		})
	}
}
