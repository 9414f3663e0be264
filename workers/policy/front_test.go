package policy

import (
	"testing"

	"waybill.dev/schemas"
)

// Everybody may ask a front what is there; what acts, and what a server holds,
// is left to the other rules.
func TestFront(t *testing.T) {
	rule, err := Front{ID: "fronts", Names: []string{schemas.Gateway, "support"}}.Rule()
	if err != nil {
		t.Fatal(err)
	}
	allow, err := Allow{ID: "allow[0]", Agents: []string{"a"}, Servers: []string{schemas.Gateway}, Tools: []string{"find_tools"}}.Rule()
	if err != nil {
		t.Fatal(err)
	}
	b, err := NewBundle([]Rule{allow, rule}, []string{schemas.Gateway, "support", "files"})
	if err != nil {
		t.Fatal(err)
	}
	decide := func(agent schemas.Agent, server, method, name string) Verdict {
		return b.Decide(schemas.Event{Agent: agent, Data: &schemas.Requested{
			Target: schemas.Target{Protocol: "mcp", Server: server, Method: method, Name: name},
		}}, Facts{})
	}
	for _, method := range []string{
		"initialize", "server/discover", "ping", "tools/list", "prompts/list", "resources/list", "resources/templates/list",
		"logging/setLevel", "subscriptions/listen", "notifications/initialized", "notifications/roots/list_changed",
	} {
		for _, server := range []string{schemas.Gateway, "support"} {
			if v := decide("b", server, method, ""); !v.Permit || v.Rule != "fronts" {
				t.Errorf("%s at %s: %+v", method, server, v)
			}
		}
		if v := decide("b", "files", method, ""); v.Permit {
			t.Errorf("%s at a server: %+v", method, v)
		}
	}
	for _, method := range []string{"tools/call", "prompts/get", "resources/read", "resources/subscribe", "completion/complete", "tasks/get", "notifications", ""} {
		if v := decide("b", schemas.Gateway, method, "find_tools"); v.Permit {
			t.Errorf("%s: %+v", method, v)
		}
	}
	// Of the gateway's own tools, a list shows those that can be called.
	if v := decide("a", schemas.Gateway, "tools/call", "find_tools"); !v.Permit || v.Rule != "allow[0]" {
		t.Errorf("%+v", v)
	}
	if v := decide("a", schemas.Gateway, "tools/list", ""); !v.Permit || len(v.Only) != 1 || v.Only[0] != "find_tools" {
		t.Errorf("%+v", v)
	}
	if v := decide("b", schemas.Gateway, "tools/list", ""); !v.Permit || v.Only == nil || len(v.Only) != 0 {
		t.Errorf("%+v", v)
	}
	if _, err := (Front{ID: "fronts"}).Rule(); err == nil {
		t.Error("a rule for no endpoint")
	}
}
