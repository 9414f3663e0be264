// Package cli is the waybill program with its surroundings as parameters, so
// that tests run the same program. Begin with the table of commands below;
// roles.go is the gateway's data flow as code.
package cli

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"slices"
	"strings"
	"text/tabwriter"
)

// Env is what the process has around it.
type Env struct {
	Program        string // how it was called; default waybill. For commands to copy
	Getenv         func(string) string
	Stdin          io.Reader // may be nil, where no command reads it
	Stdout, Stderr io.Writer
	Terminal       bool // Stdout is a terminal, which must not be given control characters of others
	Color          bool // and may have colours
}

// command is one entry of the table.
type command struct {
	name string // may have two words
	args string
	help string
	run  func(ctx context.Context, env Env, args []string) error // nil: not built yet
}

// commands in the order in which help shows them.
func commands() []command {
	return []command{
		{"up", "[--config FILE] [--role ROLE]...", "run the gateway, or some of its roles", up},
		{"config check", "[--config FILE] [--json]", "check the configuration and print what is in effect", configCheck},
		{"sessions", "[--tenant T] [--limit N] [--json]", "list the sessions in the log, newest last", sessions},
		{"replay", "SESSION [--from F] [--verify | --policy DIR | --serve ADDR]", "print a session as a tree of calls, verify it, decide it anew, or answer from it", replayCommand},
		{"export", "SESSION [-o FILE] [--redact-bodies] [--from F]", "write a session to a file that proves itself", exportCommand},
		{"import", "FILE", "keep an exported session beside the data, never in the log", importCommand},
		{"audit tail", "[--tenant T] [--session S] [--kind K]... [--json] [--feed]", "print events as they are stored", auditTail},
		{"audit verify", "[FILE] [--against FILE] [--key KEY]... [--json]", "hold the log and the record against the signed checkpoints", auditVerify},
		{"audit prove", "SEQ [--out FILE]", "prove that an event is in the log, to whoever has the public key", auditProve},
		{"audit checkpoint", "[--witnessed] [--json]", "print the newest signed checkpoint", auditCheckpoint},
		{"policy check", "[--config FILE] [--what-if D] [--json]", "check the rules and print the digest of the policy, and what they would change", policyCheck},
		{"policy test", "[--config FILE] [-v] [--json]", "run the tests that stand beside the rules", policyTest},
		{"policy explain", "CALL | --agent A --server S --tool T [--args A]", "say which rule decides a call, and why", policyExplain},
		{"approvals", "[list | grant ID | refuse ID] [--by NAME]", "list the calls that wait for a person, grant or refuse one", approvalsCommand},
		{"tools", "[list | diff NAME | approve NAME | quarantine NAME]", "list what servers offer, show what has changed, approve or quarantine it", toolsCommand},
		{"erase", "SESSION [--reason TEXT] [--json]", "destroy what was said in a session; its digests stay", erase},
		{"rebuild", "[--from FILE]... [--dry-run] [--accept-gaps] [--json]", "make the derived tables of the record anew beside those in use, and exchange them", rebuildCommand},
		{"connect", "[--server NAME] [--url URL]", "be a stdio MCP server: the running gateway's, or one of its servers", connect},
		{"query", "'SQL' | --list [--json | --csv]", "ask the record, in ClickHouse's SQL", query},
		{"version", "", "print the version", version},
	}
}

// later are the commands to come: who types one learns that it is not a
// mistake of theirs.
func later() []string {
	return []string{
		"agents",
	}
}

// Exit codes.
const (
	exitOK    = 0
	exitError = 1
	exitUsage = 2
)

// errUsage is wrapped by errors that are the caller's; they exit with 2.
var errUsage = errors.New("usage")

// usagef is an error of usage.
func usagef(format string, args ...any) error {
	return fmt.Errorf("%w: %s", errUsage, fmt.Sprintf(format, args...))
}

// Run runs one command and returns the exit code.
func Run(ctx context.Context, args []string, env Env) int {
	if env.Program == "" {
		env.Program = "waybill"
	}
	lead, words := leading(args)
	if len(words) > 0 && words[0] == "help" {
		lead, words = append(lead, "--help"), words[1:]
	}
	for _, c := range commands() {
		rest, ok := named(c.name, words)
		if !ok {
			continue
		}
		tune(env)
		err := c.run(ctx, env, slices.Concat(lead, rest))
		out := new(outcome)
		switch {
		case err == nil, errors.Is(err, flag.ErrHelp):
			return exitOK
		case errors.As(err, &out):
			return out.code
		case errors.Is(err, errUsage):
			_, _ = fmt.Fprintf(env.Stderr, "waybill %s: %s\nusage: %s\n", c.name, strings.TrimPrefix(err.Error(), "usage: "), c.usage())
			return exitUsage
		default:
			_, _ = fmt.Fprintf(env.Stderr, "waybill %s: %v\n", c.name, err)
			return exitError
		}
	}
	asked := slices.ContainsFunc(slices.Concat(lead, words), func(a string) bool { return a == "--help" || a == "-help" || a == "-h" })
	switch {
	case len(words) == 0 && slices.ContainsFunc(lead, func(a string) bool { return a == "--version" || a == "-version" }):
		_ = version(ctx, env, nil) // the writer is the caller's business
		return exitOK
	case len(words) == 0 && asked:
		usage(env.Stdout, commands())
		return exitOK
	case len(args) == 0:
		usage(env.Stderr, commands())
		return exitUsage
	case len(words) == 0:
		_, _ = fmt.Fprintf(env.Stderr, "waybill: %s: no command; `waybill --help` lists them\n", strings.Join(args, " "))
		return exitUsage
	}
	for _, name := range later() {
		if _, ok := named(name, words); ok {
			_, _ = fmt.Fprintf(env.Stderr, "waybill %s: not built yet\n", name)
			return exitUsage
		}
	}
	// The first word of a command of two.
	family := slices.DeleteFunc(commands(), func(c command) bool { return !strings.HasPrefix(c.name, words[0]+" ") })
	switch {
	case len(family) > 0 && asked:
		usage(env.Stdout, family)
		return exitOK
	case len(family) > 0:
		_, _ = fmt.Fprintf(env.Stderr, "waybill: no command %q\n\n", strings.Join(words[:min(2, len(words))], " "))
		usage(env.Stderr, family)
	default:
		_, _ = fmt.Fprintf(env.Stderr, "waybill: no command %q; `waybill --help` lists them\n", words[0])
	}
	return exitUsage
}

// named tells whether words begin with a command's name, and what follows.
func named(name string, words []string) (rest []string, ok bool) {
	n := strings.Count(name, " ") + 1
	if len(words) < n || strings.Join(words[:n], " ") != name {
		return nil, false
	}
	return words[n:], true
}

// leading takes off the flags that stand before the command. Of all flags only
// these have no value.
func leading(args []string) (lead, rest []string) {
	n := 0
	for n < len(args) && strings.HasPrefix(args[n], "-") {
		switch flag := strings.TrimLeft(args[n], "-"); {
		case strings.Contains(flag, "="):
		case slices.Contains([]string{"json", "csv", "list", "full", "feed", "all", "v", "verify", "fast", "redact-bodies", "accept-gaps", "dry-run", "log-json", "help", "h", "version"}, flag):
		default:
			n++ // and its value
		}
		n++
	}
	n = min(n, len(args))
	return slices.Clone(args[:n]), args[n:]
}

func (c command) usage() string { return strings.TrimSpace("waybill " + c.name + " " + c.args) }

func usage(w io.Writer, list []command) {
	_, _ = fmt.Fprint(w, "Waybill is a gateway for AI agents: every call is stored before it is done.\n\nusage:\n")
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	for _, c := range list {
		_, _ = fmt.Fprintf(t, "  %s\t%s\n", c.usage(), c.help)
	}
	_ = t.Flush() // the writer is the caller's business
	_, _ = fmt.Fprint(w, "\n`waybill COMMAND --help` shows all flags of a command. Flags stand before or after arguments.\n")
}

// help prints what a command is for, and its flags.
func help(w io.Writer, name string, fs *flag.FlagSet) {
	for _, c := range commands() {
		if c.name == name {
			_, _ = fmt.Fprintf(w, "usage: %s\n\n  %s\n", c.usage(), c.help)
		}
	}
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	n := 0
	fs.VisitAll(func(f *flag.Flag) {
		if n++; n == 1 {
			_, _ = fmt.Fprint(t, "\nflags:\n")
		}
		value, text := flag.UnquoteUsage(f)
		if d := strings.ToLower(f.DefValue); d != "" && d != "false" {
			text += " (default " + d + ")"
		}
		_, _ = fmt.Fprintf(t, "  %s\t%s\n", strings.TrimSpace("--"+f.Name+" "+value), text)
	})
	_ = t.Flush() // the writer is the caller's business
}

// parse reads flags that stand before, between or after the arguments, and
// returns the arguments.
func parse(env Env, fs *flag.FlagSet, args []string) ([]string, error) {
	fs.SetOutput(io.Discard)
	var rest []string
	for {
		switch err := fs.Parse(args); {
		case errors.Is(err, flag.ErrHelp):
			help(env.Stdout, fs.Name(), fs)
			return nil, flag.ErrHelp
		case err != nil:
			// flag writes names with one hyphen, all else here with two.
			return nil, usagef("%s", strings.NewReplacer(
				"flag provided but not defined: -", "no such flag: --",
				"for flag -", "for --", "flag needs an argument: -", "a value is missing after --",
			).Replace(err.Error()))
		}
		if fs.NArg() == 0 {
			return rest, nil
		}
		// flag stops at the first argument, or behind "--".
		if n := len(args) - fs.NArg(); n > 0 && args[n-1] == "--" {
			return append(rest, fs.Args()...), nil
		}
		rest, args = append(rest, fs.Arg(0)), fs.Args()[1:]
	}
}

// none is for commands without arguments.
func none(args []string, err error) error {
	if err == nil && len(args) > 0 {
		return usagef("unexpected argument %q", args[0])
	}
	return err
}
