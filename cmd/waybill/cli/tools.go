package cli

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"net/url"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"waybill.dev/schemas"
	"waybill.dev/workers/registry"
)

// toolsCommand is `waybill tools`.
func toolsCommand(ctx context.Context, env Env, args []string) error {
	fs := flag.NewFlagSet("tools", flag.ContinueOnError)
	find := clientFlags(fs)
	asJSON := fs.Bool("json", false, "print JSON, one definition per line")
	kind := fs.String("kind", "", "`KIND` of definition: tool, prompt, resource, template or instructions (default: all)")
	server := fs.String("server", "", "those of one `SERVER`")
	by := fs.String("by", "", "`NAME` of who says so (default: $USER)")
	note := fs.String("note", "", "`TEXT` to keep with it")
	args, err := parse(env, fs, args)
	if err != nil {
		return err
	}
	kinds := []registry.Kind{"", registry.Tool, registry.Prompt, registry.Resource, registry.Template, registry.Instructions}
	if !slices.Contains(kinds, registry.Kind(*kind)) {
		return usagef("--kind: %q is none of tool, prompt, resource, template and instructions", *kind)
	}
	verb, name := "list", ""
	switch {
	case len(args) == 0, len(args) == 1 && args[0] == "list":
	case !slices.Contains([]string{"list", "diff", "approve", "quarantine"}, args[0]):
		return usagef("no %q; there are list, diff, approve and quarantine", args[0])
	case len(args) != 2 || args[0] == "list":
		return usagef("%s takes one NAME, as `waybill tools` lists them; * stands for any run of characters", args[0])
	default:
		verb, name = args[0], args[1]
	}
	c, err := find(env)
	if err != nil {
		return err
	}
	q := url.Values{}
	if verb != "list" {
		q.Set("definitions", "1")
	}
	var all []registry.Entry
	for e, err := range lines[registry.Entry](ctx, c, "/api/v1/tools", q) {
		if err != nil {
			return err
		}
		if (*server == "" || e.Server == *server) && (*kind == "" || e.Kind == registry.Kind(*kind)) {
			all = append(all, e)
		}
	}
	if verb == "list" {
		return listTools(env, all, *asJSON)
	}
	found := registry.Find(all, "", schemas.Match, name)
	switch {
	case len(found) == 0:
		return fmt.Errorf("nothing is called %q; `waybill tools` lists what is known", name)
	case len(found) > 1 && !strings.Contains(name, "*"):
		return fmt.Errorf("%q may be each of %s; say which", name, naming(found))
	}
	if verb == "diff" {
		for i, e := range found {
			if *asJSON {
				if err := printEntry(env, e); err != nil {
					return err
				}
				continue
			}
			if i > 0 {
				_, _ = fmt.Fprintln(env.Stdout) // the writer is the caller's business
			}
			printDiff(env.Stdout, e)
		}
		return nil
	}
	said := registry.Approved
	if verb == "quarantine" {
		said = registry.Quarantined
	}
	if *by == "" {
		*by = env.Getenv("USER")
	}
	if *by == "" {
		return usagef("--by: say who does it")
	}
	for _, e := range found {
		if len(found) > 1 && (e.State == registry.Approved) == (said == registry.Approved) {
			continue // it is so already
		}
		body, err := json.Marshal(registry.Word{Ref: e.Ref, Said: said, SHA256: e.SHA256, By: *by, Note: *note})
		if err != nil {
			return err
		}
		answer, err := c.post(ctx, "/api/v1/tools", body)
		if err != nil {
			return fmt.Errorf("%s: %w", full(e), err)
		}
		var now registry.Entry
		if err := json.Unmarshal(answer, &now); err != nil {
			return fmt.Errorf("the gateway's answer: %w", errors.Join(err, errUnread))
		}
		if *asJSON {
			err = env.printLine(bytes.TrimSpace(answer))
		} else {
			_, err = fmt.Fprintf(env.Stdout, "%s %s is %s, as %s\n", now.Kind, full(now), now.State, now.SHA256)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

func printEntry(env Env, e registry.Entry) error {
	b, err := json.Marshal(e)
	if err != nil {
		return err
	}
	return env.printLine(b)
}

// full is a definition's name as people write it.
func full(e registry.Entry) string {
	return visible(e.Server + "/" + cmp.Or(e.Name, string(e.Kind)))
}

func naming(found []registry.Entry) string {
	var names []string
	for _, e := range found[:min(len(found), 5)] {
		names = append(names, fmt.Sprintf("%s (--kind %s)", full(e), e.Kind))
	}
	if len(found) > 5 {
		names = append(names, "…")
	}
	return strings.Join(names, ", ")
}

func listTools(env Env, all []registry.Entry, asJSON bool) error {
	if asJSON {
		for _, e := range all {
			if err := printEntry(env, e); err != nil {
				return err
			}
		}
		return nil
	}
	if len(all) == 0 {
		_, err := fmt.Fprintln(env.Stdout, "No server has shown anything yet: its definitions are known once they are listed.")
		return err
	}
	t := tabwriter.NewWriter(env.Stdout, 0, 0, 2, ' ', 0)
	_, _ = fmt.Fprintln(t, "STATE\tKIND\tNAME\tSHA256\tSINCE\tREMARKS") // flushed below
	for _, e := range all {
		remarks := e.Why
		if remarks == "" && e.By != "" {
			remarks = "by " + e.By
		}
		if n := len(e.Notes); n > 0 {
			remarks += fmt.Sprintf("; %d notes, see diff", n)
		}
		_, _ = fmt.Fprintf(t, "%s\t%s\t%s\t%s\t%s\t%s\n", e.State, e.Kind, full(e), short(e.SHA256), e.Since.Local().Format(time.DateTime), visible(strings.TrimPrefix(remarks, "; ")))
	}
	return t.Flush()
}

func short(digest string) string { return digest[:min(len(digest), 12)] }

// printDiff is all that a person needs to decide on a definition.
func printDiff(w io.Writer, e registry.Entry) {
	p := func(format string, args ...any) { _, _ = fmt.Fprintf(w, format, args...) } // the writer is the caller's business
	p("%s %s is %s", e.Kind, full(e), e.State)
	if e.Why != "" {
		p(": %s", visible(e.Why))
	}
	p("\n  sha256    %s\n", e.SHA256)
	if e.Approved != "" {
		p("  approved  %s\n", e.Approved)
	}
	p("  since     %s", e.Since.Local().Format(time.DateTime))
	if e.By != "" {
		p(" by %s", visible(e.By))
	}
	p("\n")
	for _, f := range e.Flaws {
		p("  flaw      %s\n", visible(f))
	}
	for _, n := range e.Notes {
		p("  note      %s\n", visible(n))
	}
	if len(e.Diff) == 0 {
		var b bytes.Buffer
		if json.Indent(&b, e.Now, "  ", "  ") == nil {
			for line := range bytes.Lines(b.Bytes()) {
				p("  %s\n", escaped(bytes.TrimSuffix(line, []byte("\n"))))
			}
		}
		return
	}
	for _, c := range e.Diff {
		p("  @ %s\n", visible(cmp.Or(c.Path, "(all of it)")))
		if c.Was != "" {
			p("  - %s\n", escaped([]byte(c.Was)))
		}
		if c.Is != "" {
			p("  + %s\n", escaped([]byte(c.Is)))
		}
	}
}
