package cli

import (
	"context"
	"fmt"
	"net/http"
	"os"
	"slices"

	"waybill.dev/schemas"
	"waybill.dev/workers/dispatch"
	"waybill.dev/workers/guard"
)

// AnswersConfig are the rules for what servers say, before it is stored: strip (of
// secrets: redact), reject, report or allow. Of a server, where they differ from
// those for all.
type AnswersConfig struct {
	ANSI      dispatch.Action `yaml:"ansi" json:"ansi,omitempty"`           // terminal escapes; default strip
	Bidi      dispatch.Action `yaml:"bidi" json:"bidi,omitempty"`           // characters that turn the direction of text; default strip
	Tags      dispatch.Action `yaml:"tags" json:"tags,omitempty"`           // text that nobody sees: tag characters, variation selectors in a row; default strip
	Control   dispatch.Action `yaml:"control" json:"control,omitempty"`     // other control characters; default allow
	Invisible dispatch.Action `yaml:"invisible" json:"invisible,omitempty"` // zero-width and other characters without an image; default allow
	Secrets   dispatch.Action `yaml:"secrets" json:"secrets,omitempty"`     // default redact
	Depth     int             `yaml:"depth" json:"depth,omitempty"`         // how deep a message may be nested; default 512, which is also the most
	Rules     string          `yaml:"rules" json:"rules,omitempty"`         // a file of the secrets to look for, instead of those built in; not of a server
}

// defaultAnswers are the rules of an empty file.
func defaultAnswers() AnswersConfig {
	d := dispatch.DefaultAnswers()
	return AnswersConfig{
		ANSI: d.ANSI, Bidi: d.Bidi, Tags: d.Tags, Control: d.Control, Invisible: d.Invisible, Secrets: d.Secrets, Depth: d.Depth,
	}
}

func (a AnswersConfig) rules() dispatch.Answers {
	return dispatch.Answers{
		ANSI: a.ANSI, Bidi: a.Bidi, Tags: a.Tags, Control: a.Control, Invisible: a.Invisible, Secrets: a.Secrets, Depth: a.Depth,
	}
}

// secretRules reads the file of secrets; nil stands for those built in.
func (c *Config) secretRules() ([]dispatch.SecretRule, error) {
	if c.Answers.Rules == "" {
		return nil, nil
	}
	text, err := os.ReadFile(c.Answers.Rules)
	if err != nil {
		return nil, fmt.Errorf("answers.rules: %w", err)
	}
	rules, err := dispatch.ParseSecretRules(text)
	if err != nil {
		return nil, fmt.Errorf("answers.rules: %s: %w", c.Answers.Rules, err)
	}
	if rules == nil {
		rules = []dispatch.SecretRule{}
	}
	return rules, nil
}

// GuardConfig is a check outside of the gateway that rules may have asked about
// requests and answers (obligations.guards). It is asked by POST; the package
// comment of workers/guard says how.
type GuardConfig struct {
	Name        string            `yaml:"name" json:"name"`
	URL         string            `yaml:"url" json:"url"`
	Headers     map[string]Secret `yaml:"headers" json:"headers,omitempty"`         // sent with every question
	Timeout     Duration          `yaml:"timeout" json:"timeout,omitzero"`          // for one answer; default 2s
	Concurrency int               `yaml:"concurrency" json:"concurrency,omitempty"` // questions at once, and as many that wait; default 16; more have failed
	Body        int               `yaml:"body" json:"body,omitempty"`               // bytes of a message; of a larger one it is not asked, which is a failure; default 262144
}

// guards are the guards that this process may ask, by name.
type guards map[string]*guard.Guard

// checkAnswers finds what is wrong with the rules for answers and the guards.
func (c *Config) checkAnswers(bad func(string, ...any)) {
	if err := c.Answers.rules().Check(); err != nil {
		bad("answers: %w", err)
	}
	for i, s := range c.Servers {
		if err := s.Answers.rules().Check(); err != nil {
			bad("servers[%d].answers: %w", i, err)
		}
		if s.Answers.Rules != "" {
			bad("servers[%d].answers.rules: is for all servers, at answers.rules", i)
		}
	}
	seen := map[string]bool{}
	for i, w := range c.Guards {
		key := fmt.Sprintf("guards[%d]", i)
		if err := schemas.CheckToken(w.Name); err != nil {
			bad("%s.name: %w", key, err)
		}
		if seen[w.Name] {
			bad("%s.name: %q stands twice", key, w.Name)
		}
		seen[w.Name] = true
		if w.Timeout.bad != nil {
			bad("%s.timeout: %w", key, w.Timeout.bad)
			continue
		}
		for name, s := range w.Headers {
			if (s.Env == "") == (s.File == "") {
				bad("%s.headers.%s: needs env or file, one of them", key, name)
			}
		}
		if _, err := guard.New(w.options(nil)); err != nil {
			bad("%s: %w", key, err)
		}
	}
}

func (w GuardConfig) options(h http.Header) guard.Options {
	return guard.Options{
		Name: w.Name, URL: w.URL, Header: h, Timeout: w.Timeout.Duration, Concurrency: w.Concurrency, Body: w.Body,
	}
}

// guardNames are those that rules may name.
func (c *Config) guardNames() []string {
	var names []string
	for _, w := range c.Guards {
		names = append(names, w.Name)
	}
	slices.Sort(names)
	return names
}

// openGuards makes the guards ready, with their secrets.
func (c *Config) openGuards(secret func(Secret) (string, error)) (guards, error) {
	all := guards{}
	for _, w := range c.Guards {
		h, err := header(w.Headers, secret)
		if err != nil {
			return nil, fmt.Errorf("guard %s: %w", w.Name, err)
		}
		if all[w.Name], err = guard.New(w.options(h)); err != nil {
			return nil, err
		}
	}
	return all, nil
}

// ask is how policy and dispatch ask, about the one side or the other.
func (g guards) ask(side string) func(context.Context, string, schemas.Event, []byte) schemas.Check {
	return func(ctx context.Context, name string, e schemas.Event, said []byte) schemas.Check {
		one := g[name]
		if one == nil {
			return schemas.Check{Guard: name, Said: schemas.CheckFailed, Reason: "this process has no guard of that name"}
		}
		return one.Ask(ctx, side, e, said)
	}
}

func (g guards) close() {
	for _, one := range g {
		one.Close()
	}
}
