package schemas

import (
	"crypto/sha256"
	"encoding/hex"
	"slices"
	"strings"
)

// Gateway is the name of the server that the gateway itself is: what it answers
// for several servers together, and its own tools. No upstream may have it.
const Gateway = "waybill"

// Front is an endpoint that shows several servers as one: all of them at /mcp,
// a chosen set at /mcp/{name} (a view). Edge and dispatch share it, so that a
// name means the same in a list and in a call.
//
// Names are pure functions of server and name: any replica, after any restart,
// makes the same. A Front never changes.
type Front struct {
	Name    string   // in the path, and the server of the calls that concern it as a whole; [Gateway] for /mcp
	Servers []string // whose things it shows, in the order of its lists

	// Exposed are the tools that it shows, under their own names. nil: those of
	// all servers, as server__tool, and prompts and resources too.
	Exposed []Exposed
}

// Exposed is a tool that a view shows.
type Exposed struct {
	Server, Tool string
	As           string // its name in the view; "" for Tool
	Description  string // instead of the server's; "" for that
}

// Shown is the tool's name in its view.
func (e Exposed) Shown() string {
	if e.As != "" {
		return e.As
	}
	return e.Tool
}

const (
	between  = "__" // server and name; a server's name does not contain it
	maxAlias = 64   // characters of a name that all clients take
	uriStart = "waybill://"
)

// Alias is the name that the front gives to a tool or prompt of a server: of
// [A-Za-z0-9_-] and at most 64 characters. What does not fit is shortened and
// ends in 8 hexadecimal digits of its SHA-256 ([Front.Resolve]). In a view it is
// the tool's name there, "" when the view does not show it.
func (f *Front) Alias(server, name string) string {
	if f.Exposed != nil {
		for _, e := range f.Exposed {
			if e.Server == server && e.Tool == name {
				return e.Shown()
			}
		}
		return ""
	}
	alias := server + between + name
	if len(alias) <= maxAlias && strings.IndexFunc(alias, notInAlias) < 0 {
		return alias
	}
	sum := sha256.Sum256([]byte(name))
	digits := "_" + hex.EncodeToString(sum[:4])
	alias = strings.Map(func(r rune) rune {
		if notInAlias(r) {
			return '_'
		}
		return r
	}, alias)
	return alias[:min(len(alias), maxAlias-len(digits))] + digits
}

func notInAlias(r rune) bool {
	return (r < 'a' || r > 'z') && (r < 'A' || r > 'Z') && (r < '0' || r > '9') && r != '_' && r != '-'
}

// Resolve undoes Alias. shortened says that the name may be one that was
// shortened: then what name it stands for is known only to who looks through
// the server's list for a name with this alias, and if there is none it stands
// for itself.
func (f *Front) Resolve(alias string) (server, name string, shortened, ok bool) {
	if f.Exposed != nil {
		for _, e := range f.Exposed {
			if e.Shown() == alias {
				return e.Server, e.Tool, false, true
			}
		}
		return "", "", false, false
	}
	server, name, ok = strings.Cut(alias, between)
	if !ok || name == "" || !slices.Contains(f.Servers, server) {
		return "", "", false, false
	}
	if at := len(name) - 9; at >= 0 && name[at] == '_' {
		_, err := hex.DecodeString(name[at+1:])
		shortened = err == nil
	}
	return server, name, shortened, true
}

// URI is the name that the front gives to a resource, or to a template of such:
// what stands in braces stays what it is.
func (f *Front) URI(server, uri string) string { return uriStart + server + "/" + uri }

// ResolveURI undoes URI.
func (f *Front) ResolveURI(alias string) (server, uri string, ok bool) {
	rest, ok := strings.CutPrefix(alias, uriStart)
	if !ok || f.Exposed != nil {
		return "", "", false
	}
	server, uri, ok = strings.Cut(rest, "/")
	if !ok || uri == "" || !slices.Contains(f.Servers, server) {
		return "", "", false
	}
	return server, uri, true
}
