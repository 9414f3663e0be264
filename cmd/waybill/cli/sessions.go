package cli

import (
	"context"
	"flag"
	"fmt"
	"net/url"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"

	"waybill.dev/schemas"
)

// sessions is `waybill sessions`.
func sessions(ctx context.Context, env Env, args []string) error {
	fs := flag.NewFlagSet("sessions", flag.ContinueOnError)
	connect := clientFlags(fs)
	tenant := fs.String("tenant", "", "only sessions of `TENANT`")
	limit := fs.Int("limit", 50, "show the newest `N` only; 0 shows all")
	asJSON := fs.Bool("json", false, "print one JSON object per line")
	if err := none(parse(env, fs, args)); err != nil {
		return err
	}
	if *tenant != "" {
		if err := schemas.CheckToken(*tenant); err != nil {
			return usagef("--tenant %q: %v", *tenant, err)
		}
	}
	if *limit < 0 {
		return usagef("--limit %d: cannot be negative", *limit)
	}
	c, err := connect(env)
	if err != nil {
		return err
	}
	out := tabwriter.NewWriter(env.Stdout, 0, 0, 2, ' ', 0)
	n := 0
	for s, err := range lines[sessionLine](ctx, c, "/api/v1/sessions", url.Values{"tenant": {*tenant}, "limit": {strconv.Itoa(*limit)}}) {
		if err != nil {
			return err
		}
		if n++; *asJSON {
			if err := env.printJSON(s); err != nil {
				return err
			}
			continue
		}
		if n == 1 {
			_, _ = fmt.Fprintln(out, "SESSION\tOPENED\tTENANT\tAGENT\tCALLS\tOPEN\tDENIED\tFAILED\tEVENTS\tNAME")
		}
		var events, ended uint64
		for kind, k := range s.Events {
			if events += k; kind.Ends() {
				ended += k
			}
		}
		calls := max(s.Events[schemas.KindRequested], ended) // of old calls only the ending may be left
		name := s.Name
		if !strings.HasPrefix(name, s.Client) {
			name += " (" + s.Client + ")"
		}
		_, _ = fmt.Fprintf(out, "%s\t%s\t%s\t%s\t%d\t%d\t%d\t%d\t%d\t%s\n", s.Session, s.Opened.Local().Format(time.DateTime),
			s.Tenant, s.Agent, calls, calls-ended, s.Events[schemas.KindDenied], s.Events[schemas.KindFailed],
			events, visible(name))
	}
	if err := out.Flush(); err != nil {
		return err
	}
	switch {
	case *asJSON:
	case n == 0 && *tenant != "":
		_, _ = fmt.Fprintf(env.Stderr, "no sessions of tenant %s\n", *tenant)
	case n == 0:
		_, _ = fmt.Fprintln(env.Stderr, "no sessions yet; connect a client to the gateway's MCP endpoint")
	case n == *limit:
		_, _ = fmt.Fprintf(env.Stderr, "the newest %d; --limit 0 shows all\n", n)
	}
	return nil
}
