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
	"strings"
)

// Env is what the process has around it.
type Env struct {
	Getenv         func(string) string
	Stdout, Stderr io.Writer
	Terminal       bool // Stdout is a terminal that may have colours
}

// command is one entry of the table.
type command struct {
	name string // may have two words
	args string
	help string
	run  func(ctx context.Context, env Env, args []string) error
}

// commands in the order in which help shows them.
func commands() []command {
	return []command{
		{"up", "[--config FILE] [--role ROLE]...", "run the gateway, or some of its roles", up},
		{"config check", "[--config FILE] [--json]", "check the configuration and print what is in effect", configCheck},
		{"sessions", "[--tenant T] [--limit N] [--json]", "list the sessions in the log, newest last", sessions},
		{"replay", "SESSION [--full] [--json]", "print a session from the log, as a tree of calls", replay},
		{"audit tail", "[--tenant T] [--session S] [--json]", "print events as they are stored", auditTail},
		{"version", "", "print the version", version},
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
	if len(args) == 0 {
		usage(env.Stderr)
		return exitUsage
	}
	if args[0] == "help" || args[0] == "--help" || args[0] == "-h" {
		usage(env.Stdout)
		return exitOK
	}
	for _, c := range commands() {
		words := strings.Fields(c.name)
		if len(args) < len(words) || strings.Join(args[:len(words)], " ") != c.name {
			continue
		}
		err := c.run(ctx, env, args[len(words):])
		switch {
		case err == nil:
			return exitOK
		case errors.Is(err, flag.ErrHelp):
			return exitOK
		case errors.Is(err, errUsage):
			_, _ = fmt.Fprintf(env.Stderr, "waybill %s: %s\nusage: waybill %s %s\n", c.name, strings.TrimPrefix(err.Error(), "usage: "), c.name, c.args)
			return exitUsage
		default:
			_, _ = fmt.Fprintf(env.Stderr, "waybill %s: %v\n", c.name, err)
			return exitError
		}
	}
	_, _ = fmt.Fprintf(env.Stderr, "waybill: no command %q\n\n", strings.Join(args, " "))
	usage(env.Stderr)
	return exitUsage
}

func usage(w io.Writer) {
	_, _ = fmt.Fprint(w, "Waybill is a gateway for AI agents: every call is stored before it is done.\n\nusage:\n")
	for _, c := range commands() {
		_, _ = fmt.Fprintf(w, "  waybill %-52s %s\n", strings.TrimSpace(c.name+" "+c.args), c.help)
	}
	_, _ = fmt.Fprint(w, "\nwaybill COMMAND --help shows the flags of a command. Flags stand before or after arguments.\n")
}

// parse reads flags that stand before, between or after the arguments, and
// returns the arguments.
func parse(env Env, fs *flag.FlagSet, args []string) ([]string, error) {
	fs.SetOutput(io.Discard)
	var rest []string
	for {
		switch err := fs.Parse(args); {
		case errors.Is(err, flag.ErrHelp):
			fs.SetOutput(env.Stdout)
			for _, c := range commands() {
				if c.name == fs.Name() {
					_, _ = fmt.Fprintf(env.Stdout, "waybill %s %s\n  %s\n\nflags:\n", c.name, c.args, c.help)
				}
			}
			fs.PrintDefaults()
			return nil, flag.ErrHelp
		case err != nil:
			return nil, usagef("%v", err)
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
