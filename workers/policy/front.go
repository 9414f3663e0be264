package policy

import (
	"errors"
	"slices"
	"strings"
)

// Front is a kind of rule that belongs to the program, not to the operator: it
// permits, at the endpoints that show several servers as one ([schemas.Front]),
// what such an endpoint answers of itself or puts together of what single
// servers say, to everybody who is known at all.
//
// It opens nothing: each server is asked by a call of its own, for the same
// agent, on which the other rules decide, and what these deny is not shown.
// Whatever acts (tools/call on the gateway's own tools, for one) is not among
// the methods and stays with the other rules. Nor does it show any tool of the
// gateway's own: of those a list shows what the other rules let the caller call.
type Front struct {
	ID    string
	Names []string // of the endpoints
}

// Rule compiles it.
func (f Front) Rule() (Rule, error) {
	if len(f.Names) == 0 {
		return Rule{}, errors.New("no endpoints are named")
	}
	names := slices.Clone(f.Names)
	return Rule{ID: f.ID, Effect: Permit, Servers: names, Match: func(in *Input) (Match, error) {
		return Match{Applies: slices.Contains(names, in.Request.Server) && hollow(in.Request.Method)}, nil
	}}, nil
}

// hollow tells of a method of MCP whether it holds nothing of its own at a front.
func hollow(method string) bool {
	switch method {
	case "initialize", "server/discover", "ping", "tools/list", "prompts/list", "resources/list",
		"resources/templates/list", "logging/setLevel", "subscriptions/listen":
		return true
	}
	return strings.HasPrefix(method, "notifications/")
}
