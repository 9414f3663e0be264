package policy

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"unicode/utf8"

	"waybill.dev/schemas"
)

// Source is a policy as it is written: all that its decisions depend on, beside
// events and facts. Its encoded form is kept under its SHA-256, which is what
// decisions name.
type Source struct {
	Version int      `json:"version"` // of this form: 1
	Engine  string   `json:"engine"`  // what evaluates conditions
	Servers []string `json:"servers"` // that exist; a call to any other is denied
	Fronts  []string `json:"fronts"`  // endpoints that show several servers as one
	Allow   []Allow  `json:"allow"`
	Files   []File   `json:"files"` // of rules

	Guards []string `json:"guards,omitempty"` // whom rules may have asked
}

// File is a file of rules.
type File struct {
	Name string `json:"name"` // for messages, and the order
	Text string `json:"text"`
}

// Bounds of a bundle.
const (
	maxBundle = 8 << 20
	maxRules  = 10_000
)

// Encode writes the bundle's one form.
func (s Source) Encode() ([]byte, error) {
	s.Version, s.Engine = 1, Engine
	for _, f := range s.Files {
		if at := strings.IndexRune(strings.ToValidUTF8(f.Text, "\x00"), 0); !utf8.ValidString(f.Text) || at >= 0 {
			// JSON would have others in the place of such characters.
			return nil, fmt.Errorf("%s:%d: it is not UTF-8, or has a zero in it", f.Name, 1+strings.Count(f.Text[:max(at, 0)], "\n"))
		}
	}
	s.Files = slices.Clone(s.Files)
	slices.SortFunc(s.Files, func(a, b File) int { return strings.Compare(a.Name, b.Name) })
	b, err := json.Marshal(s)
	if err == nil && len(b) > maxBundle {
		err = fmt.Errorf("the policy has %d bytes, may have %d", len(b), maxBundle)
	}
	return b, err
}

// Bundle is a policy ready to decide. It never changes.
type Bundle struct {
	Digest string // of its encoded source, hex; "" if it was made of rules
	Source Source

	rules   []*Rule
	servers map[string]bool
	methods map[string]bool // that rules name
	index   map[[2]string][]*Rule
	limits  bool // a rule limits
	session bool // a rule asks what the session did
}

// Compile makes an encoded source ready. Its errors are all that is wrong, each
// with file and line, as far as one does not hide another.
func Compile(encoded []byte) (*Bundle, error) {
	if len(encoded) > maxBundle {
		return nil, fmt.Errorf("the policy has %d bytes, may have %d", len(encoded), maxBundle)
	}
	d := json.NewDecoder(bytes.NewReader(encoded))
	d.DisallowUnknownFields()
	var s Source
	if err := d.Decode(&s); err != nil {
		return nil, fmt.Errorf("the policy cannot be read: %w", err)
	}
	if s.Version != 1 || s.Engine != Engine {
		return nil, fmt.Errorf("the policy is of version %d for %s, this program has version 1 for %s", s.Version, s.Engine, Engine)
	}
	rules, err := s.rules()
	if err != nil {
		return nil, err
	}
	b, err := NewBundle(rules, s.Servers)
	if err != nil {
		return nil, err
	}
	sum := sha256.Sum256(encoded)
	b.Digest, b.Source = hex.EncodeToString(sum[:]), s
	return b, nil
}

// rules are those of all kinds. Every kind stands in this list.
func (s Source) rules() ([]Rule, error) {
	var rules []Rule
	for _, a := range s.Allow {
		r, err := a.Rule()
		if err != nil {
			return nil, err
		}
		rules = append(rules, r)
	}
	if len(s.Fronts) > 0 {
		r, err := Front{ID: "fronts", Names: s.Fronts}.Rule()
		if err != nil {
			return nil, err
		}
		rules = append(rules, r)
	}
	written, err := rulesOf(s.Files)
	var errs []error
	for _, r := range written {
		if slices.ContainsFunc(rules, func(own Rule) bool { return own.ID == r.ID }) {
			errs = append(errs, fmt.Errorf("%s: a rule of the gateway's own is called %s", r.where, r.ID))
		}
		for _, g := range r.Obligations.Guards {
			if !slices.Contains(s.Guards, g.Name) {
				errs = append(errs, fmt.Errorf("%s: rule %s: obligations.guards: no guard is called %q", r.where, r.ID, g.Name))
			}
		}
	}
	if len(errs) > 0 {
		err = errors.Join(append([]error{err}, errs...)...)
	}
	return append(rules, written...), err
}

// NewBundle makes a bundle of rules, which must have an ID, unique among them,
// an effect and a function. Their order decides only which of several agreeing
// rules a decision names. No rules at all is a policy too, which denies
// everything.
func NewBundle(rules []Rule, servers []string) (*Bundle, error) {
	if len(rules) > maxRules {
		return nil, fmt.Errorf("policy: %d rules, may be %d", len(rules), maxRules)
	}
	b := &Bundle{servers: make(map[string]bool, len(servers)), methods: map[string]bool{toolsCall: true, toolsList: true}}
	for _, s := range servers {
		b.servers[s] = true
	}
	seen := make(map[string]bool, len(rules))
	for i, r := range rules {
		switch {
		case r.ID == "":
			return nil, fmt.Errorf("policy: rule %d has no ID", i)
		case seen[r.ID]:
			return nil, fmt.Errorf("policy: two rules are called %s", r.ID)
		case r.Match == nil:
			return nil, fmt.Errorf("policy: rule %s has no Match", r.ID)
		case r.Effect < Permit || r.Effect > Oblige:
			return nil, fmt.Errorf("policy: rule %s neither permits, forbids, requires approval nor obliges", r.ID)
		}
		seen[r.ID] = true
		r.plain = !r.orders() && r.Obligations.limit == nil
		b.rules = append(b.rules, &r)
		for _, m := range r.Methods {
			if !strings.Contains(m, "*") {
				b.methods[m] = true
			}
		}
		b.limits, b.session = b.limits || r.Obligations.limit != nil, b.session || r.asks.session
	}
	// By server and method, as most rules concern few of them. The servers are
	// known; a method that no rule names is found by "".
	b.index = map[[2]string][]*Rule{}
	for server := range b.servers {
		for method := range b.methods {
			b.index[[2]string{server, method}] = b.find(server, func(r *Rule) bool {
				// What a list may show is what calls are decided on.
				return r.concerns(r.Methods, method) || method == toolsList && r.concerns(r.Methods, toolsCall)
			})
		}
		b.index[[2]string{server}] = b.find(server, func(*Rule) bool { return true })
	}
	return b, nil
}

func (b *Bundle) find(server string, fits func(*Rule) bool) (found []*Rule) {
	for _, r := range b.rules {
		if r.concerns(r.Servers, server) && fits(r) {
			found = append(found, r)
		}
	}
	return found
}

func (r *Rule) concerns(patterns []string, name string) bool {
	return len(patterns) == 0 || slices.ContainsFunc(patterns, func(p string) bool { return schemas.Match(p, name) })
}

// concerning are the rules to ask about a request, in their order.
func (b *Bundle) concerning(q *schemas.Requested) []*Rule {
	method := q.Method
	if !b.methods[method] {
		method = ""
	}
	return b.index[[2]string{q.Server, method}]
}

func (b *Bundle) rule(id string) *Rule {
	for _, r := range b.rules {
		if r.ID == id {
			return r
		}
	}
	return nil
}

// Rules tells how many rules there are.
func (b *Bundle) Rules() int { return len(b.rules) }

// Limits tells whether any rule limits, so that calls have to be counted.
func (b *Bundle) Limits() bool { return b.limits }
