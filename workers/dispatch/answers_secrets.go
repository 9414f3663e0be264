package dispatch

import (
	_ "embed"
	"errors"
	"fmt"
	"iter"
	"regexp"
	"slices"
	"strings"
	"sync"

	"github.com/goccy/go-yaml"
	re2 "github.com/wasilibs/go-re2/experimental"
)

// builtInSecrets are the secrets that are looked for where no other file is named.
//
//go:embed secrets.yaml
var builtInSecrets []byte

// builtIn makes them ready, once: they never change.
var builtIn = sync.OnceValues(func() (*secrets, error) {
	rules, err := ParseSecretRules(builtInSecrets)
	if err != nil {
		return nil, fmt.Errorf("the secrets that are built in: %w", err)
	}
	return newSecrets(rules)
})

// SecretRule is a form of secrets: what it matches, of which the first group is the
// secret, or all of it if there is none.
type SecretRule struct {
	ID     string   `yaml:"id"`
	Match  string   `yaml:"match"`
	Except []string `yaml:"except"` // what is not one, as examples have it
}

// Bounds of a file of secrets.
const (
	maxSecretRules = 1000
	maxSecretMatch = 2000 // characters of an expression
)

var secretID = regexp.MustCompile(`^[a-z0-9][a-z0-9._-]{0,47}$`)

// ParseSecretRules reads a file of secrets, strictly. The error is all that is wrong
// with it.
func ParseSecretRules(text []byte) ([]SecretRule, error) {
	var file struct {
		Secrets *[]SecretRule `yaml:"secrets"`
	}
	if err := yaml.UnmarshalWithOptions(text, &file, yaml.Strict()); err != nil {
		return nil, errors.New(strings.TrimSpace(yaml.FormatError(err, false, false)))
	}
	if file.Secrets == nil {
		return nil, errors.New("it has no secrets; of a file that is to have none, `secrets: []` says so")
	}
	rules := *file.Secrets
	if len(rules) > maxSecretRules {
		return nil, fmt.Errorf("it has %d rules, may have %d", len(rules), maxSecretRules)
	}
	var errs []error
	seen := map[string]bool{}
	for i, r := range rules {
		switch _, err := regexp.Compile(r.Match); {
		case !secretID.MatchString(r.ID):
			errs = append(errs, fmt.Errorf("secrets[%d].id: %q is not 1 to 48 small letters, digits, dots, hyphens and underscores", i, r.ID))
		case seen[r.ID]:
			errs = append(errs, fmt.Errorf("secrets[%d].id: %q stands twice", i, r.ID))
		case r.Match == "" || len(r.Match) > maxSecretMatch:
			errs = append(errs, fmt.Errorf("secrets[%d].match: must have 1 to %d characters", i, maxSecretMatch))
		case err != nil:
			errs = append(errs, fmt.Errorf("secrets[%d].match: %w", i, err))
		case regexp.MustCompile(r.Match).MatchString(""):
			errs = append(errs, fmt.Errorf("secrets[%d].match: %q matches nothing at all", i, r.Match))
		}
		seen[r.ID] = true
	}
	return rules, errors.Join(errs...)
}

// secrets looks for secrets in texts. Which of the forms are in a text is found in
// one go over it, whatever their number ([re2.Set]): that costs a fraction of what
// one after the other would. Where one is, its own expression says.
type secrets struct {
	set   *re2.Set
	forms []form
}

type form struct {
	rule    string
	instead string
	match   *regexp.Regexp
	except  []string
}

func newSecrets(rules []SecretRule) (*secrets, error) {
	s := &secrets{}
	var all []string
	for _, r := range rules {
		match, err := regexp.Compile(r.Match)
		if err != nil {
			return nil, fmt.Errorf("secret %s: %w", r.ID, err)
		}
		s.forms = append(s.forms, form{"secret " + r.ID, "[redacted: " + r.ID + "]", match, r.Except})
		all = append(all, r.Match)
	}
	if len(all) == 0 {
		return s, nil
	}
	var err error
	if s.set, err = re2.CompileSet(all); err != nil {
		return nil, fmt.Errorf("the secrets together: %w", err)
	}
	return s, nil
}

// A text is gone over in windows, since the set keeps the memory that the longest
// has needed, for each that was looked through at once. What is on the edge of two
// is whole in one of them: nothing has a form of which more than lap is needed to
// know it.
const (
	window = 64 << 10
	lap    = 8 << 10
)

// windows are those of a text.
func windows(text []byte) iter.Seq[[]byte] {
	return func(yield func([]byte) bool) {
		for len(text) > window {
			if !yield(text[:window]) {
				return
			}
			text = text[window-lap:]
		}
		yield(text)
	}
}

// in tells which forms a text may hold, or, with n 1, whether it holds any. Where
// the set has no answer, for want of memory, it may be all of them.
func (s *secrets) in(text []byte, n int) (hits []int) {
	if s.set == nil {
		return nil
	}
	for part := range windows(text) {
		found, err := s.set.FindAllWithError(part, n)
		if err != nil {
			hits = hits[:0]
			for i := range s.forms {
				hits = append(hits, i)
			}
			return hits
		}
		if hits = append(hits, found...); n == 1 && len(hits) > 0 {
			return hits
		}
	}
	slices.Sort(hits)
	return slices.Compact(hits)
}

// mayHold tells whether a text may hold a secret.
func (s *secrets) mayHold(text []byte) bool { return len(s.in(text, 1)) > 0 }

// find finds the secrets in a text, the value of a member of this name: of
// {"password": "hunter2"} the value alone says nothing, and that it is in quotes must
// not hide what is found in password: hunter2.
func (s *secrets) find(member string, text []byte, did Action, cuts []cut) ([]cut, error) {
	cuts = s.after(0, text, did, cuts)
	if member != "" {
		cuts = s.after(len(member)+len(called), slices.Concat([]byte(member), []byte(called), text), did, cuts)
	}
	if len(cuts) < 2 {
		return cuts, nil
	}
	// Where two overlap, both go, under the name of the first.
	slices.SortFunc(cuts, func(a, b cut) int {
		if a.from != b.from {
			return a.from - b.from
		}
		return b.to - a.to
	})
	apart := cuts[:1]
	for _, c := range cuts[1:] {
		last := &apart[len(apart)-1]
		if c.from >= last.to {
			apart = append(apart, c)
			continue
		}
		last.to = max(last.to, c.to)
	}
	return apart, nil
}

// after finds the secrets in a text beyond its head.
func (s *secrets) after(head int, text []byte, did Action, cuts []cut) []cut {
	for _, i := range s.in(text, -1) {
		f := &s.forms[i]
		for _, m := range f.match.FindAllSubmatchIndex(text, -1) {
			from, to := m[0], m[1]
			if len(m) > 2 && m[2] >= 0 {
				from, to = m[2], m[3]
			}
			if from == to || to <= head || slices.Contains(f.except, string(text[from:to])) {
				continue
			}
			cuts = append(cuts, cut{from: max(from, head) - head, to: to - head, rule: f.rule, did: did, instead: f.instead})
		}
	}
	return cuts
}
