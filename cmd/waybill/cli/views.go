package cli

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	"waybill.dev/schemas"
	"waybill.dev/workers/dispatch"
)

// ViewConfig is a selection of tools, served under their own names at
// /mcp/{name} as if one server had them.
type ViewConfig struct {
	Name string                  `yaml:"name" json:"name"`
	From map[string][]ViewedTool `yaml:"from" json:"from"` // by server; waybill stands for the gateway's own tools
}

// ViewedTool is a tool of a view: its name, or more.
type ViewedTool struct {
	Tool        string `yaml:"tool" json:"tool"`
	As          string `yaml:"as" json:"as,omitempty"`                   // its name in the view
	Description string `yaml:"description" json:"description,omitempty"` // instead of the server's
}

// UnmarshalYAML reads a tool, which may be only its name.
func (t *ViewedTool) UnmarshalYAML(decode func(any) error) error {
	if err := decode(&t.Tool); err == nil {
		return nil
	}
	type plain ViewedTool
	*t = ViewedTool{}
	return decode((*plain)(t))
}

// FanoutConfig offers tools of the gateway's own.
type FanoutConfig struct {
	Tools       []string `yaml:"tools" json:"tools,omitempty"`             // find_tools, call_many; at /mcp as waybill__find_tools and so on
	Concurrency int      `yaml:"concurrency" json:"concurrency,omitempty"` // calls that one call_many has under way at once; default 16
}

const (
	maxServerName = 32 // of the 64 characters that a tool's name at /mcp may have
	maxViews      = 64
)

// serverName says why a server cannot be called so; "" if it can. Its tools are
// called server__tool at /mcp, which must be one server's in one way only.
func serverName(name string) string {
	switch {
	case name == schemas.Gateway:
		return "is the gateway's own name"
	case len(name) > maxServerName:
		return fmt.Sprintf("has more than %d characters", maxServerName)
	case strings.Contains(name, "__"), strings.HasSuffix(name, "_"):
		return `has "__" in it or "_" at its end, which separates a server's name from a tool's`
	}
	return ""
}

// checkViews finds what is wrong with views and fanout.
func (c *Config) checkViews(servers map[string]bool, bad func(string, ...any)) {
	if len(c.Views) > maxViews {
		bad("views: there are %d, the most is %d", len(c.Views), maxViews)
	}
	views := map[string]bool{}
	for i, v := range c.Views {
		key := fmt.Sprintf("views[%d]", i)
		if err := schemas.CheckToken(v.Name); err != nil {
			bad("%s.name: %w", key, err)
		}
		switch {
		case v.Name == schemas.Gateway:
			bad("%s.name: %q is the gateway's own name", key, v.Name)
		case servers[v.Name]:
			bad("%s.name: %q is the name of a server", key, v.Name)
		case views[v.Name]:
			bad("%s.name: %q stands twice", key, v.Name)
		}
		views[v.Name] = true
		if len(v.From) == 0 {
			bad("%s.from: missing; it says which tools of which servers are shown", key)
		}
		shown := map[string]string{}
		for _, server := range c.viewed(v) {
			at := fmt.Sprintf("%s.from.%s", key, server)
			if server != schemas.Gateway && !servers[server] {
				bad("%s: there is no such server", at)
			}
			if len(v.From[server]) == 0 {
				bad("%s: names no tool", at)
			}
			for j, t := range v.From[server] {
				at := fmt.Sprintf("%s[%d]", at, j)
				switch {
				case t.Tool == "":
					bad("%s: names no tool", at)
					continue
				case strings.Contains(t.Tool, "*"):
					bad("%s: %q: tools are named one by one, there are no patterns", at, t.Tool)
				case server == schemas.Gateway && !slices.Contains(c.Fanout.Tools, t.Tool):
					bad("%s: %q is not among fanout.tools", at, t.Tool)
				}
				if t.As != "" && !clean(t.As) {
					bad("%s.as: %q is not 1 to 64 characters of A-Z, a-z, 0-9, _ and -", at, t.As)
				}
				name := exposed(server, t).Shown()
				if other := shown[name]; other != "" {
					bad("%s: %q is the name of %s too", at, name, other)
				}
				shown[name] = at
			}
		}
	}
	for i, t := range c.Fanout.Tools {
		if slices.Contains(c.Fanout.Tools[:i], t) {
			bad("fanout.tools: %q stands twice", t)
		}
	}
	if n := c.Fanout.Concurrency; n < 0 || n > 100 {
		bad("fanout.concurrency: %d is not 1 to 100", n)
	}
}

// clean tells whether all clients take a tool of this name.
func clean(name string) bool {
	return len(name) <= 64 && strings.IndexFunc(name, func(r rune) bool {
		return (r < 'a' || r > 'z') && (r < 'A' || r > 'Z') && (r < '0' || r > '9') && r != '_' && r != '-'
	}) < 0
}

// viewed are the servers of a view in the order of its list: that of `servers:`,
// for a map has none, then the gateway, then what is not there at all.
func (c *Config) viewed(v ViewConfig) []string {
	rank := func(name string) int {
		if i := slices.IndexFunc(c.Servers, func(s ServerConfig) bool { return s.Name == name }); i >= 0 {
			return i
		}
		if name == schemas.Gateway {
			return len(c.Servers)
		}
		return len(c.Servers) + 1
	}
	names := make([]string, 0, len(v.From))
	for name := range v.From {
		names = append(names, name)
	}
	slices.SortFunc(names, func(a, b string) int {
		if a, b := rank(a), rank(b); a != b {
			return a - b
		}
		return strings.Compare(a, b)
	})
	return names
}

func exposed(server string, t ViewedTool) schemas.Exposed {
	return schemas.Exposed{Server: server, Tool: t.Tool, As: t.As, Description: t.Description}
}

// fronts are the endpoints that show several servers as one: all of them at
// /mcp, then the views. Edge and dispatch get the same.
func (c *Config) fronts() []*schemas.Front {
	all := &schemas.Front{Name: schemas.Gateway}
	for _, s := range c.Servers {
		all.Servers = append(all.Servers, s.Name)
	}
	if len(c.Fanout.Tools) > 0 {
		all.Servers = append(all.Servers, schemas.Gateway)
	}
	fronts := []*schemas.Front{all}
	for _, v := range c.Views {
		f := &schemas.Front{Name: v.Name, Servers: c.viewed(v), Exposed: []schemas.Exposed{}}
		for _, server := range f.Servers {
			for _, t := range v.From[server] {
				f.Exposed = append(f.Exposed, exposed(server, t))
			}
		}
		fronts = append(fronts, f)
	}
	return fronts
}

func (c *Config) frontNames() []string {
	names := []string{schemas.Gateway}
	for _, v := range c.Views {
		names = append(names, v.Name)
	}
	return names
}

func (c *Config) fanout() dispatch.Fanout {
	return dispatch.Fanout{Tools: c.Fanout.Tools, Concurrency: c.Fanout.Concurrency}
}

// errStopping is why a call that a front makes ends with the process.
var errStopping = errors.New("the gateway is shutting down")
