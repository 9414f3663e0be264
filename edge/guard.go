package edge

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"mime"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"strings"
)

// refusal is an answer of the shell instead of the adapter's.
type refusal struct {
	status  int
	cause   Cause
	message string
}

func (f refusal) yes() bool { return f.status != 0 }

// checkHost refuses requests for other names: a page that has had its own name
// pointed at 127.0.0.1 still sends that name (DNS rebinding).
func (s *Server) checkHost(r *http.Request) refusal {
	name, port := splitHost(r.Host)
	if loopback(name) || s.hosts[name] || port != "" && s.hosts[joinHost(name, port)] {
		return refusal{}
	}
	return refusal{http.StatusForbidden, CauseHost, fmt.Sprintf(
		"the gateway is not known as %q: use a loopback name or one of the configured hosts", cut(r.Host))}
}

// checkOrigin refuses pages of other origins (MCP 2026-07-28, streamable HTTP,
// "Security & Endpoint"). Of the gateway's own origin are the pages with the
// Host of the request, and on loopback those with its port, whatever the name;
// a page of another local port is another program's.
func (s *Server) checkOrigin(r *http.Request) refusal {
	values := r.Header["Origin"]
	if len(values) == 0 {
		return refusal{}
	}
	if len(values) == 1 {
		if origin, err := parseOrigin(values[0]); err == nil {
			if s.orig[origin.String()] {
				return refusal{}
			}
			name, port := splitHost(r.Host)
			if port == "" {
				port = origin.defaultPort()
			}
			if origin.port == port && (origin.name == name || loopback(origin.name) && loopback(name)) {
				return refusal{}
			}
		}
	}
	return refusal{http.StatusForbidden, CauseOrigin, fmt.Sprintf(
		"pages of the origin %q may not call the gateway: add it to the configured origins if they shall", cut(strings.Join(values, ", ")))}
}

// who finds the principal. The token is hashed before it is looked up, so how
// long the comparison takes says nothing about any token.
func (s *Server) who(w http.ResponseWriter, r *http.Request) (Principal, refusal) {
	values := r.Header["Authorization"]
	if len(values) == 0 {
		if s.o.Anonymous != nil {
			return *s.o.Anonymous, refusal{}
		}
		w.Header()["Www-Authenticate"] = challenge
		return Principal{}, refusal{http.StatusUnauthorized, CauseToken, "a bearer token is needed: Authorization: Bearer <token>"}
	}
	if len(values) == 1 {
		scheme, token, _ := strings.Cut(values[0], " ")
		if strings.EqualFold(scheme, "Bearer") {
			if p, ok := s.o.Tokens[sha256.Sum256([]byte(strings.Trim(token, " ")))]; ok {
				return p, refusal{}
			}
		}
	}
	if s.o.AnyToken && s.o.Anonymous != nil {
		return *s.o.Anonymous, refusal{}
	}
	w.Header()["Www-Authenticate"] = challengeInvalid
	return Principal{}, refusal{http.StatusUnauthorized, CauseToken, "the bearer token is not known, or was revoked"}
}

// RFC 6750 §3.
var (
	challenge        = []string{`Bearer realm="waybill"`}
	challengeInvalid = []string{`Bearer realm="waybill", error="invalid_token"`}
)

// checkContent refuses bodies that are not plain JSON. Compressed ones are
// refused and not inflated, since what is stored and forwarded is what came.
func checkContent(r *http.Request) refusal {
	switch {
	case r.Method == http.MethodPost:
	case r.ContentLength == 0, r.Method == http.MethodGet, r.Method == http.MethodHead, r.Method == http.MethodDelete:
		return refusal{} // a body has no meaning there (RFC 9110 §9.3), and nobody looks at it
	}
	for _, v := range r.Header["Content-Encoding"] {
		if v != "" && !strings.EqualFold(v, "identity") {
			return refusal{http.StatusUnsupportedMediaType, CauseContent, fmt.Sprintf("Content-Encoding %q: send the body uncompressed", cut(v))}
		}
	}
	types := r.Header["Content-Type"]
	if len(types) == 1 {
		if types[0] == "application/json" {
			return refusal{}
		}
		if t, _, err := mime.ParseMediaType(types[0]); err == nil && t == "application/json" {
			return refusal{}
		}
	}
	return refusal{http.StatusUnsupportedMediaType, CauseContent, fmt.Sprintf("Content-Type %q: must be application/json", cut(strings.Join(types, ", ")))}
}

// splitHost takes "name", "name:port", "[v6]:port" apart, in lower case and
// without the dot of an absolute name.
func splitHost(s string) (name, port string) {
	name = s
	if h, p, err := net.SplitHostPort(s); err == nil {
		name, port = h, p
	} else if len(s) > 2 && s[0] == '[' && s[len(s)-1] == ']' {
		name = s[1 : len(s)-1]
	}
	return strings.TrimSuffix(strings.ToLower(name), "."), port
}

func joinHost(name, port string) string {
	if port == "" {
		return name
	}
	return name + ":" + port
}

func loopback(name string) bool {
	if name == "localhost" || name == "127.0.0.1" {
		return true
	}
	ip, err := netip.ParseAddr(name)
	return err == nil && ip.Unmap().IsLoopback()
}

// local tells whether only this machine can reach the address.
func local(a net.Addr) bool {
	if tcp, ok := a.(*net.TCPAddr); ok {
		return tcp.IP.IsLoopback()
	}
	return a.Network() == "unix" || a.Network() == "pipe"
}

// origin is a web origin (RFC 6454 §4) with its port written out.
type origin struct{ scheme, name, port string }

func parseOrigin(s string) (origin, error) {
	u, err := url.Parse(s)
	if err != nil {
		return origin{}, errors.New("not an origin")
	}
	if u.Scheme != "http" && u.Scheme != "https" || u.Host == "" || u.Path != "" || u.RawQuery != "" || u.Fragment != "" || u.User != nil {
		return origin{}, errors.New("must be http:// or https:// and a host, nothing more")
	}
	o := origin{scheme: u.Scheme}
	o.name, o.port = splitHost(u.Host)
	if o.port == "" {
		o.port = o.defaultPort()
	}
	return o, nil
}

func (o origin) defaultPort() string {
	if o.scheme == "https" {
		return "443"
	}
	return "80"
}

func (o origin) String() string { return o.scheme + "://" + o.name + ":" + o.port }

// cut keeps what a client sent short enough to be repeated to it.
func cut(s string) string {
	if len(s) > 100 {
		return s[:100] + "…"
	}
	return s
}
