package cli

import (
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"maps"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/goccy/go-yaml"
	"github.com/goccy/go-yaml/ast"
	"github.com/goccy/go-yaml/lexer"
	"github.com/goccy/go-yaml/parser"
	"github.com/goccy/go-yaml/token"

	"waybill.dev/bus/embed"
	"waybill.dev/edge"
	"waybill.dev/schemas"
	"waybill.dev/workers/dispatch"
	"waybill.dev/workers/policy"
	"waybill.dev/workers/registry"
)

// Config is the configuration file: strict YAML, in which an unknown key is an
// error. Every key is shown with its default in deploy/waybill.yaml. It is
// read and checked once and never changed. Relative paths are relative to the
// file.
type Config struct {
	Listen  string   `yaml:"listen" json:"listen"`             // agents; default 127.0.0.1:8080
	Admin   string   `yaml:"admin" json:"admin"`               // operators; default 127.0.0.1:8081
	Data    string   `yaml:"data" json:"data"`                 // directory; default ./data
	Hosts   []string `yaml:"hosts" json:"hosts,omitempty"`     // Host names served beside loopback's
	Origins []string `yaml:"origins" json:"origins,omitempty"` // web origins that may call

	Bus        BusConfig      `yaml:"bus" json:"bus"`
	ClickHouse RecordConfig   `yaml:"clickhouse" json:"clickhouse"`  // the record; or false
	Traces     TracesConfig   `yaml:"traces" json:"traces,omitzero"` // spans of calls, over OTLP; or false
	Tenants    []TenantConfig `yaml:"tenants" json:"tenants,omitempty"`
	Agents     []AgentConfig  `yaml:"agents" json:"agents,omitempty"`
	Auth       AuthConfig     `yaml:"auth" json:"auth,omitzero"`
	Servers    []ServerConfig `yaml:"servers" json:"servers,omitempty"`
	Allow      []AllowConfig  `yaml:"allow" json:"allow,omitempty"` // nothing is allowed that no rule allows
	Limits     LimitsConfig   `yaml:"limits" json:"limits"`
	Views      []ViewConfig   `yaml:"views" json:"views,omitempty"`
	Fanout     FanoutConfig   `yaml:"fanout" json:"fanout,omitzero"`
	Audit      AuditConfig    `yaml:"audit" json:"audit"` // audit_role.go

	Answers AnswersConfig `yaml:"answers" json:"answers,omitzero"` // rules for what servers say; answers.go
	Guards  []GuardConfig `yaml:"guards" json:"guards,omitempty"`  // checks outside of the gateway that rules may have asked

	Policies []string `yaml:"policies" json:"policies,omitempty"` // files of rules, * and ? stand for characters of a name; beside them may lie tests, *_test.yaml

	dir string // of the file
}

// BusConfig says where the log is: embedded, or at a url. There the users and their
// rights are the server's: each role (bus.Role.Permissions says what it needs) hears
// its answers on _PRIV.<role>.>, to which its user must be allowed to subscribe.
type BusConfig struct {
	Embedded *EmbeddedConfig `yaml:"embedded" json:"embedded,omitempty"`
	URL      string          `yaml:"url" json:"url,omitempty"`           // nats://…; excludes embedded
	Creds    string          `yaml:"creds" json:"creds,omitempty"`       // NATS credentials file, with url
	Replicas int             `yaml:"replicas" json:"replicas,omitempty"` // of the streams, with url; default 3
	MaxBytes int64           `yaml:"max_bytes" json:"max_bytes"`         // of the event stream; default 4294967296
	MaxAge   Duration        `yaml:"max_age" json:"max_age"`             // of the event stream; default 24h
}

// EmbeddedConfig is the NATS server inside the process.
type EmbeddedConfig struct {
	Sync    string         `yaml:"sync" json:"sync"`                   // a duration (default 100ms), or always: fsync each event
	Listen  string         `yaml:"listen" json:"listen,omitempty"`     // host:port of a NATS socket for subscribers; default none
	KeyFile string         `yaml:"key_file" json:"key_file,omitempty"` // encrypts the log at rest; must lie outside data
	Cluster map[string]any `yaml:"cluster" json:"-"`                   // not built yet
}

// TenantConfig names a tenant.
type TenantConfig struct {
	ID schemas.Tenant `yaml:"id" json:"id"`
}

// AgentConfig is a caller: who it is, not what it may do.
type AgentConfig struct {
	ID     schemas.Agent  `yaml:"id" json:"id"`
	Tenant schemas.Tenant `yaml:"tenant" json:"tenant"`
	Groups []string       `yaml:"groups" json:"groups,omitempty"`
	Token  string         `yaml:"token_sha256" json:"token_sha256,omitempty"` // hex SHA-256 of the bearer token
}

// AuthConfig is for callers without a token.
type AuthConfig struct {
	Anonymous schemas.Agent `yaml:"anonymous" json:"anonymous,omitempty"` // they are this agent; loopback listeners only
}

// ServerConfig is an upstream.
type ServerConfig struct {
	Name       string         `yaml:"name" json:"name"`
	MCP        *MCPConfig     `yaml:"mcp" json:"mcp,omitempty"`
	OpenAPI    *OpenAPIConfig `yaml:"openapi" json:"openapi,omitempty"`                     // a REST API, instead of mcp
	Approve    string         `yaml:"approve" json:"approve,omitempty"`                     // of its definitions that are seen for the first time: first-use, the default, or manual; none: they are not pinned
	Idempotent []string       `yaml:"idempotent" json:"idempotent,omitempty"`               // tools (* stands for any run) that may be called again when the outcome is unknown
	Tasks      []string       `yaml:"tasks" json:"tasks,omitempty"`                         // tools whose calls become tasks when they take long, for clients that take a task for an answer
	ActsAs     []string       `yaml:"acts_as" json:"acts_as,omitempty"`                     // agents as which the server itself calls the gateway: what they call for a call of this server is put under that
	Trust      bool           `yaml:"trust_annotations" json:"trust_annotations,omitempty"` // rules may rely on what it says of its tools: tool.read_only and the like
	Deadline   Duration       `yaml:"deadline" json:"deadline,omitzero"`                    // of one call; default limits.deadline
	Concurrent int            `yaml:"concurrency" json:"concurrency,omitempty"`             // calls at once; default 64
	Queue      int            `yaml:"queue" json:"queue,omitempty"`                         // calls waiting for their turn; default 256; more are refused
	Answers    AnswersConfig  `yaml:"answers" json:"answers,omitzero"`                      // rules for what it says, where they differ from those for all
}

// MCPConfig says how to reach an MCP server: at a url, or as a process that is
// started by command and speaks over its standard input and output.
type MCPConfig struct {
	URL     string            `yaml:"url" json:"url,omitempty"`         // streamable HTTP endpoint; excludes command
	Headers map[string]Secret `yaml:"headers" json:"headers,omitempty"` // sent with every request; with url
	Era     string            `yaml:"era" json:"era,omitempty"`         // auto, modern, legacy, client; default auto

	Command   []string            `yaml:"command" json:"command,omitempty"`     // program, looked for in PATH unless it has a slash, and arguments; started when first needed
	Env       map[string]EnvValue `yaml:"env" json:"env,omitempty"`             // what the process sees beside PATH, HOME, TMPDIR and LANG of the gateway
	Cwd       string              `yaml:"cwd" json:"cwd,omitempty"`             // where it runs; default the directory of the configuration file
	Process   string              `yaml:"process" json:"process,omitempty"`     // session, the default: one for each session of revisions that have some, one for each tenant of 2026-07-28; server: one for all
	Processes int                 `yaml:"processes" json:"processes,omitempty"` // at once, half of them for one tenant; default 64; more are refused
}

// EnvValue is a value of an environment: a text, or a secret that does not stand
// in the file.
type EnvValue struct {
	Text   string
	Secret Secret
	kind   ast.NodeType
}

// UnmarshalYAML reads either.
func (v *EnvValue) UnmarshalYAML(n ast.Node) error {
	switch v.kind = n.Type(); v.kind {
	case ast.MappingType:
		return yaml.NodeToValue(n, &v.Secret, yaml.Strict())
	case ast.IntegerType, ast.FloatType, ast.BoolType:
		v.Text = n.GetToken().Value // 1.50 is not 1.5
		return nil
	}
	return yaml.NodeToValue(n, &v.Text, yaml.Strict())
}

func (v EnvValue) secret() bool { return v.kind == ast.MappingType }

// MarshalJSON writes it as the file has it.
func (v EnvValue) MarshalJSON() ([]byte, error) {
	if !v.secret() {
		return json.Marshal(v.Text)
	}
	return json.Marshal(v.Secret)
}

// stdioEnv are the variables of the gateway's own environment that the processes
// it starts see. Nothing else of it may get there: it holds secrets.
var stdioEnv = []string{"PATH", "HOME", "TMPDIR", "LANG"}

// OpenAPIConfig says how to reach a REST API, whose operations are the server's
// tools.
type OpenAPIConfig struct {
	Document string            `yaml:"document" json:"document"`         // file with an OpenAPI 3.0 or 3.1 document; read again when it changes
	URL      string            `yaml:"url" json:"url,omitempty"`         // of the API; default the document's first server
	Auth     map[string]Secret `yaml:"auth" json:"auth,omitempty"`       // by the document's security scheme: API key, bearer token, or user:password
	Headers  map[string]Secret `yaml:"headers" json:"headers,omitempty"` // sent with every request
}

// Secret is a value that does not stand in the file.
type Secret struct {
	Env  string `yaml:"env" json:"env,omitempty"`   // of this environment variable
	File string `yaml:"file" json:"file,omitempty"` // or in this file, white space around it removed
}

// AllowConfig is a rule of the simplest policy. Each list is of names, in
// which * stands for any run of characters; an agents, servers or tools list
// that is missing matches nothing.
type AllowConfig struct {
	Agents  []string `yaml:"agents" json:"agents"`
	Servers []string `yaml:"servers" json:"servers"`
	Tools   []string `yaml:"tools" json:"tools,omitempty"`     // "*": every method of the server; else tools/call of these
	Methods []string `yaml:"methods" json:"methods,omitempty"` // other methods, beside a list of tools
}

// LimitsConfig bounds what one process takes on.
type LimitsConfig struct {
	Body           int64    `yaml:"body" json:"body"`                                 // bytes of a request; default 4194304, which is also the most
	InFlight       int      `yaml:"in_flight" json:"in_flight"`                       // calls at once; default 1024
	InFlightTenant int      `yaml:"in_flight_per_tenant" json:"in_flight_per_tenant"` // default 512
	Deadline       Duration `yaml:"deadline" json:"deadline"`                         // of one call; default 60s
	Drain          Duration `yaml:"drain" json:"drain"`                               // how long calls may finish at shutdown; default 10s
	Task           Duration `yaml:"task" json:"task"`                                 // how long a call may go on as a task; default 1h, or bus.max_age if that is less, which is also the most
	TaskPatience   Duration `yaml:"task_patience" json:"task_patience"`               // after it a call of servers.tasks becomes a task; default 5s

	// Of sessions with an ID, of MCP revisions before 2026-07-28, and the streams
	// that their clients hold open.
	Streams           int      `yaml:"streams" json:"streams"`                         // at once; default 4096
	StreamsTenant     int      `yaml:"streams_per_tenant" json:"streams_per_tenant"`   // default 2048
	SessionIdle       Duration `yaml:"session_idle" json:"session_idle"`               // after it a session ends that is not in use; default 1h
	SessionMax        Duration `yaml:"session_max" json:"session_max"`                 // after it every session ends; default 12h, or bus.max_age if that is less, which is also the most
	SessionsPerAgent  int      `yaml:"sessions_per_agent" json:"sessions_per_agent"`   // open at once; default 1000
	SessionsPerTenant int      `yaml:"sessions_per_tenant" json:"sessions_per_tenant"` // default 10000
}

// Duration is written as Go writes it, 90s or 1h30m, in the file and in what
// `config check` prints alike.
type Duration struct {
	time.Duration
	bad error // what is wrong with the text, for check to say with the key
}

// UnmarshalText reads a duration.
func (d *Duration) UnmarshalText(text []byte) error {
	d.Duration, d.bad = time.ParseDuration(string(text))
	return nil
}

// MarshalText writes a duration.
func (d Duration) MarshalText() ([]byte, error) { return []byte(d.String()), nil }

// defaults is the configuration of an empty file.
func defaults() Config {
	return Config{
		Listen: "127.0.0.1:8080", Admin: "127.0.0.1:8081", Data: "data",
		Bus:        BusConfig{MaxBytes: 4 << 30, MaxAge: Duration{Duration: 24 * time.Hour}},
		ClickHouse: RecordConfig{Bodies: Duration{Duration: bodiesKept}},
		Limits: LimitsConfig{
			Body: 4 << 20, InFlight: 1024, InFlightTenant: 512, Deadline: Duration{Duration: time.Minute}, Drain: Duration{Duration: 10 * time.Second},
			TaskPatience: Duration{Duration: 5 * time.Second},
			Streams:      4096, StreamsTenant: 2048, SessionIdle: Duration{Duration: time.Hour},
			SessionsPerAgent: 1000, SessionsPerTenant: 10000,
		},
		Audit:   AuditConfig{Keep: Duration{Duration: 90 * 24 * time.Hour}, MaxBytes: 8 << 30},
		Answers: defaultAnswers(),
	}
}

// loadConfig reads and checks a file. All errors found are returned together,
// those of syntax with line and column.
func loadConfig(file string) (*Config, error) {
	b, err := os.ReadFile(file)
	if errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("%s: no such file; deploy/waybill.yaml is an example to copy", file)
	}
	if err != nil {
		return nil, err
	}
	c, err := parseConfig(b, filepath.Dir(file))
	if err != nil {
		return nil, fmt.Errorf("%s: %w", file, err)
	}
	return c, nil
}

// parseConfig decodes and checks a configuration.
func parseConfig(b []byte, dir string) (*Config, error) {
	c := defaults()
	worded := func(err error) error {
		text := strings.TrimSpace(yaml.FormatError(err, false, true))
		if strings.Contains(text, "not implemented Unmarshaler") { // what yaml says of a list or map for a text
			text = "a duration is a text such as 30s"
		}
		return errors.New(wrongType.ReplaceAllString(text, "wrong type: it must be $1"))
	}
	tokens := lexer.Tokenize(string(b))
	tag := slices.IndexFunc(tokens, func(t *token.Token) bool { return t.Type == token.TagType })
	f, err := parser.Parse(tokens, 0)
	switch {
	case err != nil:
		return nil, worded(err)
	case tag >= 0: // the decoder cannot take them everywhere
		at := tokens[tag].Position
		return nil, fmt.Errorf("[%d:%d] a configuration has no tags (!name)", at.Line, at.Column)
	case len(f.Docs) > 1:
		second := f.Docs[1]
		at := second.Start // nil where the document before has ended with "..."
		if second.Body != nil {
			at = second.GetToken()
		}
		if at == nil {
			return nil, errors.New("there is a second YAML document; a configuration is one")
		}
		return nil, fmt.Errorf("[%d:1] a second YAML document begins here; a configuration is one", at.Position.Line)
	case len(f.Docs) == 1 && !empty(f.Docs[0].Body): // of nothing, yaml makes a Config of zeroes
		if err := yaml.UnmarshalWithOptions(b, &c, yaml.Strict()); err != nil {
			return nil, worded(err)
		}
	}
	abs, err := filepath.Abs(dir)
	if err != nil {
		return nil, err
	}
	c.dir = abs
	if c.Bus.Embedded == nil && c.Bus.URL == "" {
		c.Bus.Embedded = &EmbeddedConfig{}
	}
	if e := c.Bus.Embedded; e != nil && e.Sync == "" {
		e.Sync = "100ms"
	}
	if c.Bus.URL != "" && c.Bus.Replicas == 0 {
		c.Bus.Replicas = 3
	}
	if c.Limits.SessionMax == (Duration{}) && c.Bus.MaxAge.bad == nil {
		c.Limits.SessionMax.Duration = min(12*time.Hour, c.Bus.MaxAge.Duration)
	}
	if c.Limits.Task == (Duration{}) && c.Bus.MaxAge.bad == nil {
		c.Limits.Task.Duration = min(time.Hour, c.Bus.MaxAge.Duration)
	}
	for _, p := range []*string{&c.Data, &c.Bus.Creds, &c.ClickHouse.Launcher, &c.Answers.Rules} {
		*p = c.path(*p)
	}
	if e := c.Bus.Embedded; e != nil {
		e.KeyFile = c.path(e.KeyFile)
	}
	for _, s := range c.Servers {
		if s.OpenAPI != nil {
			s.OpenAPI.Document = c.path(s.OpenAPI.Document)
		}
		if m := s.MCP; m != nil && len(m.Command) > 0 {
			if strings.Contains(m.Command[0], "/") {
				m.Command[0] = c.path(m.Command[0])
			}
			m.Cwd = cmp.Or(c.path(m.Cwd), c.dir)
		}
	}
	return &c, c.check()
}

// wrongType is what yaml says of a value that does not fit its field.
var wrongType = regexp.MustCompile(`cannot unmarshal .* into Go .* of type (\S+)`)

// empty tells whether a document says nothing.
func empty(n ast.Node) bool {
	switch n.(type) {
	case nil, *ast.NullNode, *ast.CommentGroupNode:
		return true
	}
	return false
}

func (c *Config) path(p string) string {
	if p == "" || filepath.IsAbs(p) {
		return p
	}
	return filepath.Join(c.dir, p)
}

// check finds what is wrong beyond the syntax.
func (c *Config) check() error {
	var errs []error
	bad := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }
	notBuilt := func(key string, there bool) {
		if there {
			bad("%s: not built yet", key)
		}
	}
	c.ClickHouse.check(bad)
	c.Traces.check(bad)
	if e := c.Bus.Embedded; e != nil {
		notBuilt("bus.embedded.cluster", len(e.Cluster) > 0)
		if _, _, err := e.sync(); err != nil {
			bad("bus.embedded.sync: %w", err)
		}
		if c.Bus.URL != "" {
			bad("bus: embedded and url exclude each other")
		}
		if e.KeyFile != "" {
			// The log may be a link out of the data directory.
			err := embed.KeyOutside(e.KeyFile, c.Data)
			if err == nil {
				err = embed.KeyOutside(e.KeyFile, filepath.Join(c.Data, "log"))
			}
			if err != nil {
				bad("bus.embedded.key_file: %w", err)
			}
		}
	}
	if c.Bus.MaxBytes < 64<<20 {
		bad("bus.max_bytes: %d is less than 67108864", c.Bus.MaxBytes)
	}
	badly := func(key string, d Duration) bool {
		if d.bad != nil {
			bad("%s: %w", key, d.bad)
		}
		return d.bad != nil
	}
	if !badly("bus.max_age", c.Bus.MaxAge) && c.Bus.MaxAge.Duration < 5*time.Minute {
		bad("bus.max_age: %s is less than 5m", c.Bus.MaxAge)
	}
	type listener struct{ key, addr string }
	listeners := []listener{{"listen", c.Listen}, {"admin", c.Admin}}
	if c.Bus.Embedded != nil && c.Bus.Embedded.Listen != "" {
		listeners = append(listeners, listener{"bus.embedded.listen", c.Bus.Embedded.Listen})
	}
	taken := map[string]string{}
	for _, l := range listeners {
		_, port, err := net.SplitHostPort(l.addr)
		if err != nil {
			bad("%s: %q is not host:port", l.key, l.addr)
			continue
		}
		if n, err := strconv.ParseUint(port, 10, 16); err != nil {
			bad("%s: port %q is not a number up to 65535", l.key, port)
		} else if n == 0 {
			continue // a free one, of the system's choice
		}
		if other := taken[l.addr]; other != "" {
			bad("%s: %s is the address of %s too", l.key, l.addr, other)
		}
		taken[l.addr] = l.key
	}

	tenants := map[schemas.Tenant]bool{}
	for i, t := range c.Tenants {
		if err := schemas.CheckToken(string(t.ID)); err != nil {
			bad("tenants[%d].id: %w", i, err)
		}
		if tenants[t.ID] {
			bad("tenants[%d].id: %q stands twice", i, t.ID)
		}
		tenants[t.ID] = true
	}
	c.checkAudit(bad, tenants)
	agents, tokens := map[schemas.Agent]bool{}, map[string]bool{}
	for i, a := range c.Agents {
		if err := schemas.CheckToken(string(a.ID)); err != nil {
			bad("agents[%d].id: %w", i, err)
		}
		if agents[a.ID] {
			bad("agents[%d].id: %q stands twice", i, a.ID)
		}
		agents[a.ID] = true
		if !tenants[a.Tenant] {
			bad("agents[%d].tenant: %q is not one of the tenants", i, a.Tenant)
		}
		if a.Token != "" {
			if b, err := hex.DecodeString(a.Token); err != nil || len(b) != sha256.Size {
				bad("agents[%d].token_sha256: not a SHA-256 in hex (64 characters); make one with: printf %%s TOKEN | sha256sum", i)
			} else if word, known := wellKnown(b); known {
				bad("agents[%d].token_sha256: this is the SHA-256 of %q, which anybody would try: make a token of random bytes", i, word)
			}
			if tokens[strings.ToLower(a.Token)] {
				bad("agents[%d].token_sha256: another agent has the same token", i)
			}
			tokens[strings.ToLower(a.Token)] = true
		}
	}
	if a := c.Auth.Anonymous; a != "" {
		if !agents[a] {
			bad("auth.anonymous: %q is not one of the agents", a)
		}
		if host, _, err := net.SplitHostPort(c.Listen); err == nil && !loopback(host) {
			bad("auth.anonymous: only for a loopback listener, and listen is %s", c.Listen)
		}
	}

	names := map[string]bool{}
	for i, s := range c.Servers {
		key := fmt.Sprintf("servers[%d]", i)
		if err := schemas.CheckToken(s.Name); err != nil {
			bad("%s.name: %w", key, err)
		}
		if names[s.Name] {
			bad("%s.name: %q stands twice", key, s.Name)
		}
		names[s.Name] = true
		if why := serverName(s.Name); why != "" {
			bad("%s.name: %q %s", key, s.Name, why)
		}
		for _, a := range s.ActsAs {
			if !agents[schemas.Agent(a)] {
				bad("%s.acts_as: %q is not one of the agents", key, a)
			}
		}
		if s.Approve != "" && s.Approve != approveNone && s.Approve != string(registry.FirstUse) && s.Approve != string(registry.Manual) {
			bad("%s.approve: %q is neither first-use nor manual, nor none", key, s.Approve)
		}
		badly(key+".deadline", s.Deadline)
		if s.Deadline.Duration < 0 || s.Concurrent < 0 || s.Queue < 0 {
			bad("%s: deadline, concurrency and queue cannot be negative", key)
		}
		address := func(key, text, headers string) {
			u, err := url.Parse(text)
			if err != nil || u.Host == "" || (u.Scheme != "http" && u.Scheme != "https") {
				bad("%s: %q is not an http or https URL", key, text)
			} else if u.User != nil {
				bad("%s: holds credentials; use %s with env or file", key, headers)
			}
		}
		secrets := func(key string, all map[string]Secret) {
			for _, name := range slices.Sorted(maps.Keys(all)) {
				if secret := all[name]; (secret.Env == "") == (secret.File == "") {
					bad("%s.%s: needs env or file, one of them", key, name)
				}
			}
		}
		headers := func(key string, all map[string]Secret) {
			spelled := map[string]string{}
			for _, name := range slices.Sorted(maps.Keys(all)) {
				canonical := http.CanonicalHeaderKey(name)
				if other := spelled[canonical]; other != "" {
					bad("%s.%s: stands there as %s already; only one of them would be sent", key, name, other)
				}
				spelled[canonical] = name
			}
			secrets(key, all)
		}
		switch {
		case s.MCP == nil && s.OpenAPI == nil:
			bad("%s: needs mcp or openapi, which say how to reach the server", key)
		case s.MCP != nil && s.OpenAPI != nil:
			bad("%s: mcp and openapi exclude each other", key)
		}
		if m := s.MCP; m != nil {
			c.checkMCP(key+".mcp", m, bad)
			if m.Command == nil && m.URL != "" {
				address(key+".mcp.url", m.URL, "mcp.headers")
			}
			headers(key+".mcp.headers", m.Headers)
			if _, err := dispatch.ParseEra(m.Era); err != nil {
				bad("%s.mcp.era: %v", key, err)
			}
		}
		if o := s.OpenAPI; o != nil {
			if o.Document == "" {
				bad("%s.openapi.document: missing; it is the file that describes the API", key)
			}
			if o.URL != "" {
				address(key+".openapi.url", o.URL, "openapi.auth")
			}
			secrets(key+".openapi.auth", o.Auth)
			headers(key+".openapi.headers", o.Headers)
		}
	}
	c.checkViews(names, bad)
	c.checkAnswers(bad)
	for i, a := range c.Allow {
		if len(a.Agents) == 0 || len(a.Servers) == 0 || len(a.Tools)+len(a.Methods) == 0 {
			bad("allow[%d]: needs agents, servers, and tools or methods; as it is it allows nothing", i)
		}
	}
	for _, d := range []struct {
		key string
		d   Duration
	}{
		{"limits.deadline", c.Limits.Deadline}, {"limits.drain", c.Limits.Drain},
		{"limits.task", c.Limits.Task}, {"limits.task_patience", c.Limits.TaskPatience},
		{"limits.session_idle", c.Limits.SessionIdle}, {"limits.session_max", c.Limits.SessionMax},
	} {
		if badly(d.key, d.d) {
			return together(errs)
		}
	}
	if l := c.Limits; l.Streams <= 0 || l.StreamsTenant <= 0 || l.SessionIdle.Duration < time.Second || l.SessionMax.Duration < time.Second || l.SessionsPerAgent <= 0 || l.SessionsPerTenant <= 0 {
		bad("limits: streams, streams_per_tenant, sessions_per_agent and sessions_per_tenant must be positive, session_idle and session_max at least 1s")
	}
	if l := c.Limits; c.Bus.MaxAge.bad == nil && l.SessionMax.Duration > c.Bus.MaxAge.Duration {
		bad("limits.session_max: %s is longer than the log keeps what a session needs, bus.max_age of %s", l.SessionMax, c.Bus.MaxAge)
	}
	if l := c.Limits; l.Task.Duration < time.Second || l.TaskPatience.Duration <= 0 {
		bad("limits: task must be at least 1s, and task_patience positive")
	} else if c.Bus.MaxAge.bad == nil && l.Task.Duration > c.Bus.MaxAge.Duration {
		bad("limits.task: %s is longer than the log keeps what a task is made of, bus.max_age of %s", l.Task, c.Bus.MaxAge)
	}
	if l := c.Limits; l.Body <= 0 || l.Body > 4<<20 || l.InFlight <= 0 || l.InFlightTenant <= 0 || l.Deadline.Duration <= 0 || l.Drain.Duration < 0 {
		bad("limits: body must be 1 to 4194304, in_flight, in_flight_per_tenant and deadline positive, drain not negative")
	}
	if len(errs) == 0 {
		errs = append(errs, c.build())
	}
	return together(errs)
}

// checkMCP finds what is wrong with how an MCP server is to be reached, other than
// its url and headers themselves.
func (c *Config) checkMCP(key string, m *MCPConfig, bad func(string, ...any)) {
	switch {
	case m.Command == nil && m.URL == "":
		bad("%s: needs url or command, which say how to reach the server", key)
	case m.Command != nil && m.URL != "":
		bad("%s: url and command exclude each other", key)
	case m.Command == nil:
		if len(m.Env) > 0 || m.Cwd != "" || m.Process != "" || m.Processes != 0 {
			bad("%s: env, cwd, process and processes are for a command", key)
		}
		return
	case len(m.Command) == 0 || m.Command[0] == "":
		bad("%s.command: is empty; it is a list of the program and its arguments", key)
	}
	if len(m.Headers) > 0 {
		bad("%s.headers: are for a url; a command has env", key)
	}
	if m.Process != "" && m.Process != "session" && m.Process != "server" {
		bad("%s.process: %q is neither session nor server", key, m.Process)
	}
	if m.Processes < 0 {
		bad("%s.processes: cannot be negative", key)
	}
	for _, name := range slices.Sorted(maps.Keys(m.Env)) {
		if name == "" || strings.ContainsAny(name, "=\x00") {
			bad("%s.env: %q is no name of a variable", key, name)
		}
		v := m.Env[name]
		switch {
		case v.secret() && (v.Secret.Env == "") == (v.Secret.File == ""):
			bad("%s.env.%s: needs env or file, one of them", key, name)
		case v.kind == ast.UnknownNodeType, v.kind == ast.NullType:
			bad("%s.env.%s: has no value; an empty one is \"\"", key, name)
		case strings.Contains(v.Text, "\x00"):
			bad("%s.env.%s: a NUL character cannot be passed on", key, name)
		}
	}
}

// environment is what a process of an MCP server sees, and what of it is secret.
func (m *MCPConfig) environment(getenv func(string) string, secret func(Secret) (string, error)) (env map[string]string, secrets []string, err error) {
	env = map[string]string{}
	for _, name := range stdioEnv {
		if v := getenv(name); v != "" {
			env[name] = v
		}
	}
	for _, name := range slices.Sorted(maps.Keys(m.Env)) {
		v := m.Env[name]
		env[name] = v.Text
		if !v.secret() {
			continue
		}
		if env[name], err = secret(v.Secret); err != nil {
			return nil, nil, fmt.Errorf("env %s: %w", name, err)
		}
		secrets = append(secrets, env[name])
	}
	return env, secrets, nil
}

// together is one error of many, each on a line of its own.
func together(errs []error) error {
	if len(errs) < 2 {
		return errors.Join(errs...)
	}
	return fmt.Errorf("%d errors:\n  %s", len(errs), strings.ReplaceAll(errors.Join(errs...).Error(), "\n", "\n  "))
}

// build makes of a configuration what the roles will make of it, and throws it
// away: what one of them refuses must not wait until the gateway starts. The
// secrets are left out, since they may be on another machine.
func (c *Config) build() error {
	// Without the rules in files: who talks to a running gateway must not be kept
	// from it by one that is being written.
	if _, _, err := (&Config{Allow: c.Allow, Servers: c.Servers, Views: c.Views, Fanout: c.Fanout}).compilePolicy(); err != nil {
		return err
	}
	if _, err := edge.New(edge.Options{Hosts: c.Hosts, Origins: c.Origins}); err != nil {
		return err
	}
	servers, err := c.upstreams(noEnv, anySecret)
	if err != nil {
		return err
	}
	d, err := dispatch.New(dispatch.Options{
		Servers: servers, Fronts: c.fronts(), Fanout: c.fanout(),
		Answers: c.Answers.rules(), SecretRules: []dispatch.SecretRule{}, // those are read when they are needed
		Ask:  func(context.Context, schemas.Event, schemas.Emit) error { return errors.ErrUnsupported },
		Load: func(context.Context, uint64) (e schemas.Event, err error) { return e, errors.ErrUnsupported },
		Past: func(context.Context, schemas.Event) ([]schemas.Event, error) { return nil, errors.ErrUnsupported },
	})
	if err != nil {
		return err
	}
	d.Close()
	return nil
}

// policySource is the policy as it is written. Every place where rules are written
// stands in this list.
func (c *Config) policySource() (policy.Source, error) {
	s := policy.Source{Servers: c.frontNames(), Fronts: c.frontNames(), Guards: c.guardNames()}
	for _, up := range c.Servers {
		s.Servers = append(s.Servers, up.Name)
	}
	for i, a := range c.Allow {
		s.Allow = append(s.Allow, policy.Allow{
			ID: fmt.Sprintf("allow[%d]", i), Agents: a.Agents, Servers: a.Servers, Tools: a.Tools, Methods: a.Methods,
		})
	}
	var err error
	s.Files, err = c.ruleFiles(false)
	return s, err
}

// compilePolicy makes the policy ready, and returns its encoded form too.
func (c *Config) compilePolicy() (*policy.Bundle, []byte, error) {
	s, err := c.policySource()
	if err != nil {
		return nil, nil, err
	}
	encoded, err := s.Encode()
	if err != nil {
		return nil, nil, badRules{err}
	}
	b, err := policy.Compile(encoded)
	if err != nil {
		return nil, nil, fmt.Errorf("policies: %w", badRules{err})
	}
	return b, encoded, nil
}

// badRules is what is wrong with rules that could be read: the same files would
// have the same error again.
type badRules struct{ error }

func (b badRules) Unwrap() error { return b.error }

// testFile ends the name of a file with tests for rules, which stands beside them.
const testFile = "_test.yaml"

// ruleFiles reads the files of rules, or those with tests for them, named as
// from the configuration's directory. A pattern that fits no file of rules is an
// error: a file that is away while it is saved must not take what it forbids with
// it.
func (c *Config) ruleFiles(tests bool) ([]policy.File, error) {
	seen := map[string]bool{}
	var files []policy.File
	for i, pattern := range c.Policies {
		found, err := filepath.Glob(c.path(pattern))
		if err != nil {
			return nil, fmt.Errorf("policies[%d]: %q: %w", i, pattern, err)
		}
		if len(found) == 0 && !strings.ContainsAny(pattern, "*?[") {
			return nil, fmt.Errorf("policies[%d]: %s: no such file", i, c.path(pattern))
		}
		isRules := func(name string) bool { return !strings.HasSuffix(name, testFile) }
		if !tests && isRules(pattern) && !slices.ContainsFunc(found, isRules) {
			return nil, fmt.Errorf("policies[%d]: %s: fits no file of rules", i, c.path(pattern))
		}
		for _, name := range found {
			if seen[name] || isRules(name) == tests {
				continue
			}
			seen[name] = true
			text, err := os.ReadFile(name)
			if err != nil {
				return nil, fmt.Errorf("policies[%d]: %w", i, err)
			}
			if rel, err := filepath.Rel(c.dir, name); err == nil {
				name = filepath.ToSlash(rel)
			}
			files = append(files, policy.File{Name: name, Text: string(text)})
		}
	}
	return files, nil
}

// sync is how often, or always, the embedded log is flushed to disk.
func (e *EmbeddedConfig) sync() (every time.Duration, always bool, err error) {
	if e.Sync == "always" {
		return 0, true, nil
	}
	d, err := time.ParseDuration(e.Sync)
	if err == nil && (d < time.Millisecond || d > 10*time.Minute) {
		err = fmt.Errorf("%s is not between 1ms and 10m", d)
	}
	return d, false, err
}

func loopback(host string) bool {
	ip := net.ParseIP(host)
	return host == "localhost" || ip != nil && ip.IsLoopback()
}

// principals are the agents by the hash of their token, and the anonymous one.
func (c *Config) principals() (tokens map[[32]byte]edge.Principal, anonymous *edge.Principal) {
	tokens = map[[32]byte]edge.Principal{}
	for _, a := range c.Agents {
		p := edge.Principal{Tenant: a.Tenant, Agent: a.ID, Groups: a.Groups}
		if a.ID == c.Auth.Anonymous {
			anonymous = &p
		}
		if b, err := hex.DecodeString(a.Token); err == nil && len(b) == sha256.Size {
			tokens[[32]byte(b)] = p
		}
	}
	return tokens, anonymous
}

// upstreams are the servers as dispatch takes them. Every kind of upstream
// stands here.
func (c *Config) upstreams(getenv func(string) string, secret func(Secret) (string, error)) ([]dispatch.Server, error) {
	var servers []dispatch.Server
	for _, s := range c.Servers {
		up := dispatch.Server{Name: s.Name, Idempotent: s.Idempotent, Tasks: s.Tasks, Concurrency: s.Concurrent, Queue: s.Queue, Deadline: s.Deadline.Duration, Answers: s.Answers.rules()}
		var err error
		switch {
		case s.OpenAPI != nil:
			up.Protocol = "openapi"
			up.OpenAPI = &dispatch.OpenAPI{Document: s.OpenAPI.Document, BaseURL: s.OpenAPI.URL, Auth: map[string]string{}}
			for _, name := range slices.Sorted(maps.Keys(s.OpenAPI.Auth)) {
				if up.OpenAPI.Auth[name], err = secret(s.OpenAPI.Auth[name]); err != nil {
					return nil, fmt.Errorf("server %s: auth %s: %w", s.Name, name, err)
				}
			}
			up.Header, err = header(s.OpenAPI.Headers, secret)
		case len(s.MCP.Command) > 0:
			up.Command, up.Dir, up.Process, up.Processes = s.MCP.Command, s.MCP.Cwd, s.MCP.Process, s.MCP.Processes
			up.Env, up.Secrets, err = s.MCP.environment(getenv, secret)
		default:
			up.URL = s.MCP.URL
			up.Header, err = header(s.MCP.Headers, secret)
		}
		if err == nil && s.MCP != nil {
			if up.Era, err = dispatch.ParseEra(s.MCP.Era); err != nil {
				err = fmt.Errorf("era: %w", err)
			}
		}
		if err != nil {
			return nil, fmt.Errorf("server %s: %w", s.Name, err)
		}
		servers = append(servers, up)
	}
	return servers, nil
}

// tasksAt tells of an endpoint whether tools there become tasks by the gateway's
// doing: of a server that has some, or of a front that shows such a server.
func (c *Config) tasksAt() func(string) bool {
	at := map[string]bool{}
	for _, s := range c.Servers {
		at[s.Name] = len(s.Tasks) > 0
	}
	for _, f := range c.fronts() {
		at[f.Name] = slices.ContainsFunc(f.Servers, func(name string) bool { return at[name] })
	}
	return func(name string) bool { return at[name] }
}

// header are the operator's headers for an upstream, with their secrets.
func header(headers map[string]Secret, secret func(Secret) (string, error)) (http.Header, error) {
	h := http.Header{}
	for _, name := range slices.Sorted(maps.Keys(headers)) {
		value, err := secret(headers[name])
		if err != nil {
			return nil, fmt.Errorf("header %s: %w", name, err)
		}
		h.Set(name, value)
	}
	return h, nil
}

// secret reads secrets, which are never empty.
func (c *Config) secret(getenv func(string) string) func(Secret) (string, error) {
	return func(s Secret) (string, error) {
		value := getenv(s.Env)
		if s.File != "" {
			b, err := os.ReadFile(c.path(s.File))
			if err != nil {
				return "", err
			}
			value = strings.TrimSpace(string(b))
		}
		if value == "" {
			return "", fmt.Errorf("%s%s is empty", s.Env, s.File)
		}
		return value, nil
	}
}

// noEnv is an environment of nothing.
func noEnv(string) string { return "" }

// anySecret stands for every secret, user and password included, where they
// are not read.
func anySecret(Secret) (string, error) { return "secret:secret", nil }

// wellKnown tells whether a token's hash is that of a word found in examples.
func wellKnown(hash []byte) (word string, known bool) {
	for _, w := range []string{"", "test", "token", "secret", "password", "changeme"} {
		if h := sha256.Sum256([]byte(w)); bytes.Equal(h[:], hash) {
			return w, true
		}
	}
	return "", false
}

// notes are what is valid and still hardly meant.
func (c *Config) notes() []string {
	var notes []string
	if !slices.ContainsFunc(c.Agents, func(a AgentConfig) bool { return a.Token != "" || a.ID == c.Auth.Anonymous }) {
		notes = append(notes, "no agent has a token and none is auth.anonymous, so nobody can call")
	}
	if len(c.Servers) == 0 {
		notes = append(notes, "there are no servers to call")
	}
	if len(c.Allow) == 0 && len(c.Policies) == 0 {
		notes = append(notes, "there is no rule in allow or policies, so every call is denied")
	}
	for i, a := range c.Allow {
		unknown := func(key string, names []string, known func(string) bool) {
			for _, n := range names {
				if !strings.Contains(n, "*") && !known(n) {
					notes = append(notes, fmt.Sprintf("allow[%d].%s: %q is not configured, so this allows nothing", i, key, n))
				}
			}
		}
		unknown("agents", a.Agents, func(n string) bool {
			return slices.ContainsFunc(c.Agents, func(a AgentConfig) bool { return string(a.ID) == n })
		})
		unknown("servers", a.Servers, func(n string) bool {
			return n == schemas.Gateway || slices.ContainsFunc(c.Servers, func(s ServerConfig) bool { return s.Name == n })
		})
	}
	notes = append(notes, c.untranslated()...)
	if host, _, err := net.SplitHostPort(c.Admin); err == nil && !loopback(host) {
		notes = append(notes, fmt.Sprintf("admin: %s is not a loopback address: /metrics, /healthz and /readyz are open to whoever reaches it, "+
			"its Host header is not checked, and the admin token crosses the network in plain text", c.Admin))
	}
	return notes
}

// untranslated is what of the REST APIs could not be made part of tools. What
// is the same for many operations is one note.
func (c *Config) untranslated() []string {
	const mostNotes, mostNames = 30, 3
	servers, err := c.upstreams(noEnv, anySecret)
	if err != nil {
		return []string{err.Error()}
	}
	var notes []string
	for _, s := range servers {
		if s.OpenAPI == nil {
			continue
		}
		report, err := dispatch.ImportOpenAPI(s)
		if err != nil {
			notes = append(notes, fmt.Sprintf("server %s: %s", s.Name, err))
			continue
		}
		operations, order := map[string][]string{}, []string{}
		for _, u := range report {
			text := strings.Join(strings.Fields(u.What+": "+u.Why), " ")
			if operations[text] == nil {
				order = append(order, text)
			}
			operations[text] = append(operations[text], cmp.Or(u.Operation, "document"))
		}
		for i, text := range order {
			if i == mostNotes {
				notes = append(notes, fmt.Sprintf("server %s: … and %d more; the log has them when the gateway starts", s.Name, len(order)-i))
				break
			}
			names := operations[text]
			who := strings.Join(names[:min(len(names), mostNames)], ", ")
			if n := len(names) - mostNames; n > 0 {
				who += fmt.Sprintf(" and %d more", n)
			}
			notes = append(notes, fmt.Sprintf("server %s: %s: %s", s.Name, who, strings.TrimSuffix(text, ".")))
		}
	}
	return notes
}

// configCheck is `waybill config check`.
func configCheck(_ context.Context, env Env, args []string) error {
	fs := flag.NewFlagSet("config check", flag.ContinueOnError)
	file := fs.String("config", "waybill.yaml", "configuration `FILE`")
	asJSON := fs.Bool("json", false, "print JSON")
	if err := none(parse(env, fs, args)); err != nil {
		return err
	}
	c, err := loadConfig(*file)
	if err == nil {
		_, _, err = c.compilePolicy()
	}
	if err == nil {
		_, err = c.secretRules()
	}
	if err != nil {
		return err
	}
	if *asJSON {
		return env.printJSON(c)
	}
	out, err := json.Marshal(c) // the JSON form leaves out what is not built yet
	if err == nil {
		out, err = yaml.JSONToYAML(out)
	}
	if err != nil {
		return err
	}
	if _, err = fmt.Fprintf(env.Stdout, "# %s is valid.\n", *file); err != nil {
		return err
	}
	for _, n := range c.notes() {
		if _, err = fmt.Fprintf(env.Stdout, "# Note: %s.\n", n); err != nil {
			return err
		}
	}
	_, err = fmt.Fprintf(env.Stdout, "# In effect:\n%s", out)
	return err
}
