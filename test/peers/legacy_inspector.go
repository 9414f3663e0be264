package peers

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"testing"
)

// ExerciseLegacyInspector takes the steps with the Inspector's command line as far as it reaches: initialize, tools/list,
// tools/call (one that answers, one that fails), prompts/get, resources/list and resources/read. Each of its runs is a
// session of its own, which it does not delete, and it answers nothing that a server asks; so the steps that need a session are
// taken by plain HTTP: roots, the list of tools that they and sampling bring, progress, logging, cancelling, ping,
// completion, subscriptions, sampling, elicitation, what a session adds to its resources, resuming and deleting. So are
// the other lists, because a run takes a second of the processor.
func ExerciseLegacyInspector(t testing.TB, e Endpoint) {
	t.Helper()
	var began struct{ ProtocolVersion string }
	inspector{t: t, endpoint: e}.run(&began, "initialize")
	if began.ProtocolVersion != legacy {
		t.Errorf("the Inspector settled on revision %q, want %s", began.ProtocolVersion, legacy)
	}
	var list struct{ Tools []listed }
	inspector{t: t, endpoint: e}.run(&list, "tools/list")
	for _, tool := range []string{"echo", "get-structured-content", "trigger-long-running-operation"} {
		if !slices.Contains(names(list.Tools), e.Prefix+tool) {
			t.Errorf("the Inspector does not list %s: %q", tool, names(list.Tools))
		}
	}
	exerciseLegacyGo(t, e, legacy, breakOff, func(ctx context.Context, through Endpoint, h *host) (legacyClient, error) {
		client, err := connectHTTP(ctx, through, h, legacy)
		if err != nil {
			return nil, err
		}
		// The Inspector goes past the tap: that is for the session by plain HTTP.
		return &inspector{plainHTTP: client.(plainHTTP), t: t, endpoint: e}, nil
	})
}

type inspector struct {
	plainHTTP
	t        testing.TB
	endpoint Endpoint
	done     []string // methods for which it has been run; what is listed or read later may be the session's own
}

func (i *inspector) request(ctx context.Context, method string, params map[string]any) (json.RawMessage, error) {
	var args []string
	switch method {
	case "tools/call":
		name, _ := params["name"].(string)
		if name != i.endpoint.Prefix+"echo" && name != i.endpoint.Prefix+"get-resource-reference" {
			return i.plainHTTP.request(ctx, method, params)
		}
		arguments, err := json.Marshal(params["arguments"])
		if err != nil {
			return nil, err
		}
		args = []string{"--tool-name", name, "--tool-args-json", string(arguments)}
	case "prompts/get":
		args = []string{"--prompt-name", fmt.Sprint(params["name"]), "--prompt-args"}
		arguments, _ := params["arguments"].(map[string]any)
		for _, name := range slices.Sorted(maps.Keys(arguments)) {
			args = append(args, fmt.Sprintf("%s=%v", name, arguments[name]))
		}
	case "resources/list", "resources/read":
		if slices.Contains(i.done, method) {
			return i.plainHTTP.request(ctx, method, params)
		}
		if method == "resources/read" {
			args = []string{"--uri", fmt.Sprint(params["uri"])}
		}
	default:
		return i.plainHTTP.request(ctx, method, params)
	}
	var result json.RawMessage
	i.run(&result, method, args...)
	i.done = append(i.done, method)
	return result, nil
}

// run runs the Inspector for one method and decodes its result. It exits with 5 if that has isError.
func (i inspector) run(into any, method string, args ...string) {
	i.t.Helper()
	at := i.endpoint.command(i.endpoint.URL)
	if at == nil {
		at = []string{i.endpoint.URL, "--transport", "http"}
	}
	common := append(slices.Clip(at), "--protocol-era", "legacy", "--format", "json", "--quiet", "--method", method)
	if i.endpoint.Token != "" {
		common = append(common, "--header", "Authorization: Bearer "+i.endpoint.Token)
	}
	out := Inspector(i.t, append(common, args...)...)
	var answer struct{ Result json.RawMessage }
	if err := json.Unmarshal([]byte(out.Stdout), &answer); err != nil || out.Exit != 0 && out.Exit != 5 {
		i.t.Fatalf("Inspector: %s: exit %d, %v\n%s%s", method, out.Exit, err, out.Stdout, out.Stderr)
	}
	if err := json.Unmarshal(answer.Result, into); err != nil {
		i.t.Fatalf("Inspector: %s: %v: %s", method, err, answer.Result)
	}
}
