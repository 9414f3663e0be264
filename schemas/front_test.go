package schemas

import (
	"strings"
	"testing"

	"pgregory.net/rapid"
)

func TestFrontNames(t *testing.T) {
	f := &Front{Name: Gateway, Servers: []string{"git", "git_hub"}}
	for _, tt := range []struct{ server, name, want string }{
		{"git", "log", "git__log"},
		{"git_hub", "a__b", "git_hub__a__b"},
		{"git", "with.dot", "git__with_dot_ff994925"},
		{"git", strings.Repeat("x", 60), "git__" + strings.Repeat("x", 50) + "_42f2d973"},
	} {
		if got := f.Alias(tt.server, tt.name); got != tt.want {
			t.Errorf("%s of %s is %s, want %s", tt.name, tt.server, got, tt.want)
		}
	}
	for _, alias := range []string{"log", "git__", "svn__log", "__log", ""} {
		if server, name, _, ok := f.Resolve(alias); ok {
			t.Errorf("%q is %s of %s, want nothing", alias, name, server)
		}
	}
	rapid.Check(t, func(t *rapid.T) {
		server, name := rapid.SampledFrom(f.Servers).Draw(t, "server"), rapid.StringN(1, 80, -1).Draw(t, "name")
		alias := f.Alias(server, name)
		if len(alias) > 64 || strings.ContainsFunc(alias, notInAlias) {
			t.Fatalf("alias %q does not fit", alias)
		}
		s, n, shortened, ok := f.Resolve(alias)
		if !ok || s != server || n != name && !shortened {
			t.Fatalf("%q of %s has the alias %q, which is %q of %s (%v, %v)", name, server, alias, n, s, shortened, ok)
		}
		uri := f.URI(server, "test://"+name)
		if s, u, ok := f.ResolveURI(uri); !ok || s != server || u != "test://"+name {
			t.Fatalf("%q resolves to %q of %s", uri, u, s)
		}
	})
}

func TestFrontView(t *testing.T) {
	f := &Front{Name: "support", Servers: []string{"git"}, Exposed: []Exposed{
		{Server: "git", Tool: "log", As: "history"}, {Server: "git", Tool: "show"},
	}}
	for _, tt := range []struct{ tool, want string }{{"log", "history"}, {"show", "show"}, {"push", ""}} {
		if got := f.Alias("git", tt.tool); got != tt.want {
			t.Errorf("%s is shown as %q, want %q", tt.tool, got, tt.want)
		}
	}
	if s, n, _, ok := f.Resolve("history"); !ok || s != "git" || n != "log" {
		t.Errorf("history is %s of %s", n, s)
	}
	for _, alias := range []string{"log", "git__log", "push"} {
		if _, _, _, ok := f.Resolve(alias); ok {
			t.Errorf("%s is in the view", alias)
		}
	}
	if _, _, ok := f.ResolveURI("waybill://git/file:///x"); ok {
		t.Error("a view shows resources")
	}
}
