package policy

import (
	"reflect"
	"strings"
	"testing"

	"waybill.dev/schemas"
)

func TestAllow(t *testing.T) {
	anyone := []string{"*"}
	everything := Allow{Agents: anyone, Servers: anyone, Tools: []string{"*"}}
	reads := Allow{Agents: []string{"res*"}, Servers: []string{"files"}, Tools: []string{"read", "list_*"}}
	lists := Allow{Agents: anyone, Servers: anyone, Methods: []string{"tools/list", "server/discover"}}
	methods := Allow{Agents: anyone, Servers: anyone, Methods: []string{"*"}}
	tests := []struct {
		name         string
		rules        []Allow
		method, tool string
		want         string // the rule that permits; "" for none
	}{
		{"everything: a tool", []Allow{everything}, "tools/call", "read", "allow[0]"},
		{"everything: no tool", []Allow{everything}, "tools/call", "", "allow[0]"},
		{"everything: an unknown method", []Allow{everything}, "future/thing", "", "allow[0]"},
		{"star beside names", []Allow{{Agents: anyone, Servers: anyone, Tools: []string{"read", "*"}}}, "prompts/get", "p", "allow[0]"},
		{"star as a part is a pattern", []Allow{{Agents: anyone, Servers: anyone, Tools: []string{"r*"}}}, "prompts/get", "r", ""},
		{"a tool of the list", []Allow{reads}, "tools/call", "read", "allow[0]"},
		{"a tool of the pattern", []Allow{reads}, "tools/call", "list_all", "allow[0]"},
		{"another tool", []Allow{reads}, "tools/call", "write", ""},
		{"another case", []Allow{reads}, "tools/call", "Read", ""},
		{"a longer name", []Allow{reads}, "tools/call", "read\n", ""},
		{"no tool", []Allow{reads}, "tools/call", "", ""},
		{"tools do not open the list", []Allow{reads}, "tools/list", "", ""},
		{"tools do not open methods", []Allow{reads}, "server/discover", "", ""},
		{"a tool's name elsewhere", []Allow{reads}, "prompts/get", "read", ""},
		{"methods open themselves", []Allow{lists}, "server/discover", "", "allow[0]"},
		{"methods open no other", []Allow{lists}, "ping", "", ""},
		{"all methods open any", []Allow{methods}, "future/thing", "", "allow[0]"},
		{"methods never open tools/call", []Allow{methods}, "tools/call", "read", ""},
		{"not even by name", []Allow{{Agents: anyone, Servers: anyone, Methods: []string{"tools/call"}}}, "tools/call", "read", ""},
		{"the second permits", []Allow{lists, reads}, "tools/call", "read", "allow[1]"},
		{"rules do not add up", []Allow{
			{Agents: []string{"researcher"}, Servers: []string{"mail"}, Tools: []string{"*"}},
			{Agents: []string{"writer"}, Servers: []string{"files"}, Tools: []string{"*"}},
		}, "tools/call", "read", ""},
		{"another tenant's", []Allow{{Tenants: []string{"other"}, Agents: anyone, Servers: anyone, Tools: anyone}}, "tools/call", "read", ""},
		{"the tenant's", []Allow{{Tenants: []string{"other", "acme"}, Agents: anyone, Servers: anyone, Tools: anyone}}, "tools/call", "read", "allow[0]"},
	}
	for _, tt := range tests {
		v := newPolicy(t, compile(t, tt.rules...)...).Decide(call(tt.method, tt.tool))
		if v.Permit != (tt.want != "") || v.Rule != tt.want {
			t.Errorf("%s: %+v, want rule %q", tt.name, v, tt.want)
		}
	}
}

func TestAllowOnly(t *testing.T) {
	anyone := []string{"*"}
	list := Allow{Agents: anyone, Servers: anyone, Methods: []string{"tools/list"}}
	tools := func(patterns ...string) Allow {
		return Allow{Agents: anyone, Servers: []string{"files"}, Tools: patterns}
	}
	mail := Allow{Agents: anyone, Servers: []string{"mail"}, Tools: []string{"send"}}
	tests := []struct {
		name  string
		rules []Allow
		want  []string
	}{
		{"everything", []Allow{tools("*")}, nil},
		{"everything, by another rule", []Allow{list, tools("read"), tools("write", "*")}, nil},
		{"list alone", []Allow{list}, []string{}},
		{"another server's tools", []Allow{list, mail}, []string{}},
		{"sorted and once", []Allow{list, tools("write", "read"), tools("list_*", "read")}, []string{"list_*", "read", "write"}},
		{"rules before the one that permits", []Allow{tools("read"), list}, []string{"read"}},
	}
	for _, tt := range tests {
		v := newPolicy(t, compile(t, tt.rules...)...).Decide(call("tools/list", ""))
		if !v.Permit || !reflect.DeepEqual(v.Only, tt.want) {
			t.Errorf("%s: permit %t, Only %#v, want %#v", tt.name, v.Permit, v.Only, tt.want)
		}
	}
	v := newPolicy(t, compile(t, list, tools("read"))...).Decide(call("tools/call", "read"))
	if v.Only != nil {
		t.Errorf("a call has Only %q", v.Only)
	}
}

func TestAllowRefuses(t *testing.T) {
	anyone := []string{"*"}
	for want, a := range map[string]Allow{
		"agents":  {Servers: anyone, Tools: anyone},
		"servers": {Agents: anyone, Tools: anyone},
		"neither": {Agents: anyone, Servers: anyone},
		"tools":   {Agents: anyone, Servers: anyone, Tools: []string{"**"}},
		"empty":   {Agents: anyone, Servers: anyone, Tools: []string{""}},
		"tenants": {Tenants: []string{""}, Agents: anyone, Servers: anyone, Tools: anyone},
		"methods": {Agents: anyone, Servers: anyone, Methods: []string{"***"}},
	} {
		a.ID = "allow[3]"
		if _, err := a.Rule(); err == nil || !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), a.ID) {
			t.Errorf("%+v: %v, want an error with %q", a, err, want)
		}
	}
}

func TestAllowKeepsItsLists(t *testing.T) {
	tools := []string{"read"}
	p := newPolicy(t, compile(t, Allow{
		Agents: []string{"*"}, Servers: []string{"*"}, Tools: tools, Methods: []string{"tools/list"},
	})...)
	tools[0] = "*"
	if v := p.Decide(call("tools/list", "")); !reflect.DeepEqual(v.Only, []string{"read"}) {
		t.Errorf("the list changed behind the policy's back: %+v", v)
	}
	if v := p.Decide(call("tools/call", "write")); v.Permit {
		t.Errorf("the rule changed behind the policy's back: %+v", v)
	}
	if got := p.Decide(call("tools/call", "read")); !got.Permit {
		t.Errorf("%+v", got)
	}
	var _ schemas.Handler = p.Handle
}
