package peers

import (
	"encoding/json"
	"testing"
)

// Program is a program of others that does the same whenever it is run, and prints what it saw: what it is told, not when.
type Program struct {
	Name string
	run  func(t testing.TB, args string) Output
	word string // which of its arguments that is
	args map[string]any
}

// Run runs it at the endpoint at a URL. word is one that no other run uses, but for one that is to be the same.
func (p Program) Run(t testing.TB, url, word string) Output {
	t.Helper()
	args := map[string]any{"url": url, "prefix": "", p.word: word}
	for name, v := range p.args {
		args[name] = v
	}
	b, err := json.Marshal(args)
	if err != nil {
		t.Fatal(err)
	}
	return p.run(t, string(b))
}

// Programs are the scripts of the TypeScript and Python SDKs for server-everything, in both eras.
func Programs() []Program {
	node := func(file string) func(testing.TB, string) Output {
		return func(t testing.TB, args string) Output { return NodeScript(t, beside(file), args) }
	}
	snake := func(file string) func(testing.TB, string) Output {
		return func(t testing.TB, args string) Output { return python(t, beside(file), args) }
	}
	session := func(sdk string) map[string]any {
		return map[string]any{"sdk": sdk, "token": "", "command": nil, "duration": cutOperation, "steps": 3}
	}
	return []Program{
		{"typescript-legacy", node("legacy.mjs"), "unique", session("v2")},
		{"typescript-modern", node("modern.mjs"), "name", nil},
		{"python-legacy", snake("legacy.py"), "unique", session("python")},
		{"python-modern", snake("modern_session.py"), "name", nil},
	}
}

// Echoes is a program of the TypeScript SDK that lists tools and calls one that is echo once, with the word.
func Echoes(t testing.TB, era, url, tool, word string) Output {
	t.Helper()
	b, err := json.Marshal(map[string]any{"era": era, "visits": []Visit{{URL: url, Calls: []Call{{Tool: tool, Args: map[string]any{"message": word}}}}}})
	if err != nil {
		t.Fatal(err)
	}
	return NodeScript(t, beside("calls.mjs"), string(b))
}
