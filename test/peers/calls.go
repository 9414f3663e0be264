package peers

import (
	"context"
	"encoding/json"
	"strings"
	"testing"

	"github.com/modelcontextprotocol/go-sdk/mcp"
)

// A Visit is a list of tools and calls at an endpoint, one after the other, by a client that leaves then.
type Visit struct {
	URL   string `json:"url"`
	Calls []Call `json:"calls"`
}

// A Call is one of a tool.
type Call struct {
	Tool string         `json:"tool"`
	Args map[string]any `json:"args"`
}

// Answered is what a client got in a visit.
type Answered struct {
	Revision string   // that it settled on
	Tools    []string // names as listed
	Texts    []string // of each call
	Failed   []bool   // isError of each call
}

// Visitor is a client of an SDK, in one of the eras.
type Visitor struct {
	Name     string
	Revision string // that it must settle on
	visit    func(testing.TB, []Visit) []Answered
}

// Visitors are the TypeScript, Python and Go SDKs, each in both eras.
func Visitors() (all []Visitor) {
	script := func(era string, run func(t testing.TB, args string) Output) func(testing.TB, []Visit) []Answered {
		return func(t testing.TB, visits []Visit) (answered []Answered) {
			t.Helper()
			args, err := json.Marshal(map[string]any{"era": era, "visits": visits})
			if err != nil {
				t.Fatal(err)
			}
			out := run(t, string(args))
			if err := json.Unmarshal([]byte(out.Stdout), &answered); err != nil || out.Exit != 0 {
				t.Fatalf("exit %d, %v\n%s%s", out.Exit, err, out.Stdout, out.Stderr)
			}
			return answered
		}
	}
	for era, revision := range map[string]string{"modern": modern, "legacy": legacy} {
		all = append(all,
			Visitor{"TypeScript " + era, revision, script(era, func(t testing.TB, args string) Output { return NodeScript(t, beside("calls.mjs"), args) })},
			Visitor{"Python " + era, revision, script(era, func(t testing.TB, args string) Output { return python(t, beside("calls.py"), args) })},
			Visitor{"Go " + era, revision, func(t testing.TB, visits []Visit) []Answered { return visitGoSDK(t, revision, visits) }},
		)
	}
	return all
}

// Visit goes to several endpoints, one after the other. What a client says of it all is checked for its form, and left
// to the caller to judge.
func (v Visitor) Visit(t testing.TB, visits ...Visit) []Answered {
	t.Helper()
	answered := v.visit(t, visits)
	if len(answered) != len(visits) {
		t.Fatalf("%d of %d visits", len(answered), len(visits))
	}
	for i, a := range answered {
		if a.Revision != v.Revision {
			t.Errorf("%s: revision %q, want %s", visits[i].URL, a.Revision, v.Revision)
		}
		if len(a.Texts) != len(visits[i].Calls) || len(a.Failed) != len(a.Texts) {
			t.Fatalf("%s: %d calls, answered: %+v", visits[i].URL, len(visits[i].Calls), a)
		}
	}
	return answered
}

func visitGoSDK(t testing.TB, revision string, visits []Visit) (all []Answered) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	var options *mcp.ClientSessionOptions
	if revision != modern {
		options = &mcp.ClientSessionOptions{ProtocolVersion: revision}
	}
	for _, visit := range visits {
		session, err := mcp.NewClient(&mcp.Implementation{Name: "waybill-test-calls", Version: "1"}, nil).
			Connect(ctx, &mcp.StreamableClientTransport{Endpoint: visit.URL}, options)
		if err != nil {
			t.Fatal(err)
		}
		defer session.Close() // again, which is nothing, unless the test ends before
		a := Answered{Revision: session.InitializeResult().ProtocolVersion}
		for tool, err := range session.Tools(ctx, nil) {
			if err != nil {
				t.Fatalf("listing tools: %v", err)
			}
			a.Tools = append(a.Tools, tool.Name)
		}
		for _, call := range visit.Calls {
			result, err := session.CallTool(ctx, &mcp.CallToolParams{Name: call.Tool, Arguments: call.Args})
			if err != nil {
				t.Fatalf("%s: %v", call.Tool, err)
			}
			var texts []string
			for _, c := range result.Content {
				if c, ok := c.(*mcp.TextContent); ok {
					texts = append(texts, c.Text)
				}
			}
			a.Texts, a.Failed = append(a.Texts, strings.Join(texts, "\n")), append(a.Failed, result.IsError)
		}
		if err := session.Close(); err != nil {
			t.Errorf("leaving: %v", err)
		}
		all = append(all, a)
	}
	return all
}
