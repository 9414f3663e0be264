package cli

import (
	"cmp"
	"context"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"math"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"strings"

	"waybill.dev/bus"
	"waybill.dev/edge/mcp"
	"waybill.dev/schemas"
)

// up is `waybill up`.
func up(ctx context.Context, env Env, args []string) error {
	fs := flag.NewFlagSet("up", flag.ContinueOnError)
	file := fs.String("config", "waybill.yaml", "configuration `FILE`")
	level := slog.LevelInfo
	fs.TextVar(&level, "log-level", level, "`LEVEL` of the process log: debug, info, warn or error")
	asJSON := fs.Bool("log-json", false, "write the process log as JSON")
	anew := fs.Bool("audit-anew", false, "begin a new audit, with a new name and key, where the former cannot go on; the former's tree and feed are deleted, its keys kept")
	roles := map[bus.Role]bool{}
	fs.Func("role", "`ROLE` to run: all, edge, policy, dispatch, audit or project; may be repeated (default: all)", func(s string) error {
		switch r := bus.Role(s); {
		case s == "all":
			roles = everyRole()
		case everyRole()[r]:
			roles[r] = true
		default:
			return fmt.Errorf("no such role; there are all, edge, policy, dispatch, audit and project")
		}
		return nil
	})
	if err := none(parse(env, fs, args)); err != nil {
		return err
	}
	if len(roles) == 0 {
		roles = everyRole()
	}
	c, err := loadConfig(*file)
	if err != nil {
		return err
	}
	if c.Bus.URL == "" && len(roles) < len(everyRole()) {
		return usagef("--role: one role alone needs a log that others reach too: set bus.url")
	}
	if c.Bus.URL != "" && *anew {
		return usagef("--audit-anew: with bus.url the streams AUDIT and FEED are yours to remove, and %s in the data directory of each process", auditLastFile)
	}
	g := &gateway{c: c, env: env, roles: roles, log: newLog(env.Stderr, level, *asJSON), anew: *anew}
	return g.run(ctx, func(g *gateway, public, admin net.Addr) { banner(env.Stdout, g, *file, public, admin) })
}

// everyRole is what a process does that is told nothing else.
func everyRole() map[bus.Role]bool {
	return map[bus.Role]bool{bus.RoleEdge: true, bus.RolePolicy: true, bus.RoleDispatch: true, bus.RoleAudit: true, bus.RoleProject: true}
}

// Test is what a test may put between the program's parts.
type Test struct {
	// Fault is bus.Options.Fault for every role.
	Fault func(e schemas.Event, stored bool) error
}

// Up runs the gateway with doors for tests, and prints like `waybill up`.
func Up(ctx context.Context, file string, env Env, test Test) error {
	c, err := loadConfig(file)
	if err != nil {
		return err
	}
	g := &gateway{
		c: c, env: env, fault: test.Fault, log: newLog(env.Stderr, slog.LevelInfo, false),
		roles: everyRole(),
	}
	return g.run(ctx, func(g *gateway, public, admin net.Addr) { banner(env.Stdout, g, file, public, admin) })
}

func newLog(w io.Writer, level slog.Level, asJSON bool) *slog.Logger {
	o := &slog.HandlerOptions{Level: level}
	if asJSON {
		return slog.New(slog.NewJSONHandler(w, o))
	}
	return slog.New(slog.NewTextHandler(w, o))
}

// tune sets the garbage collector where the operator has not: a call makes 130 kB
// of garbage and leaves next to nothing, as does an event that a command reads, so
// collecting at five times the small live heap instead of at twice costs little
// memory and saves some CPU, of `replay --policy` a fifth. The
// memory limit is what the caches of the embedded log, which a reader of the
// whole log would fill with all of it, have to keep to: 1 GiB, or half of a
// small machine.
func tune(env Env) {
	if env.Getenv("GOGC") == "" {
		debug.SetGCPercent(400)
	}
	if env.Getenv("GOMEMLIMIT") != "" {
		return
	}
	b, err := os.ReadFile("/proc/meminfo")
	if err != nil {
		return // not Linux: the runtime's own default
	}
	var kb int64
	if _, err := fmt.Sscanf(string(b), "MemTotal: %d kB", &kb); err == nil && kb > 0 && kb < math.MaxInt64>>11 {
		debug.SetMemoryLimit(min(kb<<10/2, 1<<30))
	}
}

// banner says where everything is and what to try.
func banner(w io.Writer, g *gateway, file string, public, admin net.Addr) {
	p := func(format string, args ...any) { _, _ = fmt.Fprintf(w, format+"\n", args...) }
	p("Waybill is ready.")
	p("")
	if public != nil {
		p("  MCP endpoint   http://%s/mcp (all servers together)", public)
		for _, s := range g.c.Servers {
			p("  MCP endpoint   http://%s/mcp/%s", public, s.Name)
		}
		for _, v := range g.c.Views {
			p("  MCP view       http://%s/mcp/%s", public, v.Name)
		}
	}
	if a := g.c.Auth.Anonymous; a != "" && public != nil {
		p("  callers        without a token they are the agent %s", a)
	}
	p("  operators      http://%s  (/healthz /readyz /metrics)", admin)
	p("  admin token    %s", filepath.Join(g.c.Data, tokenFile))
	if g.auditKey != "" {
		p("  audit key      %s", g.auditKey)
		if g.c.Bus.URL == "" {
			p("                 public, in %s; the private one is in %s", filepath.Join(g.c.Data, auditPubFile), filepath.Join(g.c.Data, auditKeyFile))
		}
	}
	if g.c.Bus.URL != "" {
		p("  log            %s", g.c.Bus.URL)
	} else {
		p("  log            %s", filepath.Join(g.c.Data, "log"))
	}
	switch {
	case g.engine != nil:
		p("  record         ClickHouse inside; by curl: curl \"$(cat %s)\" -d 'SHOW TABLES'", shellQuote(g.engine.URLFile()))
	case g.server != nil:
		p("  record         ClickHouse at clickhouse.dsn")
	default:
		p("  projections    off: the log keeps %s or %d MB, whichever is less; older events are gone", g.c.Bus.MaxAge, g.c.Bus.MaxBytes>>20)
	}
	for _, n := range g.c.notes() {
		p("  note           %s", n)
	}
	if public != nil && len(g.c.Servers) > 0 {
		name := g.c.Servers[0].Name
		p("")
		p("Connect a client of MCP, revision %s. Many read this form:", strings.Join(mcp.Revisions(), ", "))
		p(`  {"mcpServers": {%q: {"url": "http://%s/mcp/%s"}}}`, name, public, name)
		if g.c.Auth.Anonymous == "" {
			p("with a header for the agent's token: Authorization: Bearer TOKEN")
		}
	}
	p("")
	p("Look into it:")
	for _, c := range []string{"sessions", "replay SESSION", "audit tail"} {
		p("  %s %s --config %s", shellQuote(cmp.Or(g.env.Program, "waybill")), c, shellQuote(file))
	}
	p("")
	p("Ctrl-C stops it.")
}

func shellQuote(s string) string {
	if strings.IndexFunc(s, func(r rune) bool { return strings.ContainsRune(" '\"$&|;<>()*?`\\", r) }) < 0 {
		return s
	}
	return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'"
}

// programVersion is the version of this program's module.
func programVersion() string {
	if b, ok := debug.ReadBuildInfo(); ok {
		return b.Main.Version
	}
	return "(devel)"
}

// version is `waybill version`.
func version(_ context.Context, env Env, args []string) error {
	fs := flag.NewFlagSet("version", flag.ContinueOnError)
	if err := none(parse(env, fs, args)); err != nil {
		return err
	}
	v, commit := programVersion(), ""
	if b, ok := debug.ReadBuildInfo(); ok {
		for _, s := range b.Settings {
			if s.Key == "vcs.revision" {
				commit = ", commit " + s.Value[:min(12, len(s.Value))]
			}
		}
	}
	_, err := fmt.Fprintf(env.Stdout, "waybill %s (%s %s/%s%s)\n", v, runtime.Version(), runtime.GOOS, runtime.GOARCH, commit)
	return err
}
