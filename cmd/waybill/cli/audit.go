package cli

import (
	"context"
	"flag"
	"fmt"
	"net/url"

	"waybill.dev/schemas"
)

// auditTail is `waybill audit tail`.
func auditTail(ctx context.Context, env Env, args []string) error {
	fs := flag.NewFlagSet("audit tail", flag.ContinueOnError)
	connect := clientFlags(fs)
	q := url.Values{}
	fs.Func("tenant", "only events of `TENANT`", func(s string) error { q.Set("tenant", s); return schemas.CheckToken(s) })
	fs.Func("session", "only events of `SESSION`", func(s string) error { q.Set("session", s); return schemas.CheckToken(s) })
	fs.Func("kind", "only events of `KIND`; may be repeated", func(s string) error {
		if q.Add("kind", s); !schemas.Kind(s).Known() {
			return fmt.Errorf("no such kind of event")
		}
		return nil
	})
	asJSON := fs.Bool("json", false, "print one JSON object per line, bodies included")
	feed := fs.Bool("feed", false, "print the audit's feed: a CloudEvents record for each event that has a leaf in the tree")
	if err := none(parse(env, fs, args)); err != nil {
		return err
	}
	if *feed && (q.Has("session") || len(q["kind"]) > 1) {
		return usagef("--feed goes with --tenant and one --kind only")
	}
	c, err := connect(env)
	if err != nil {
		return err
	}
	c.connected = func() { _, _ = fmt.Fprintf(env.Stderr, "listening at %s; Ctrl-C ends it\n", c.base) }
	// The stream has no end of its own.
	over := fmt.Errorf("the gateway at %s ended the stream: what it stores from now on is not shown", c.base)
	if *feed {
		err = copyLines(ctx, c, env, "/api/v1/audit/feed", q)
	} else if *asJSON {
		err = copyLines(ctx, c, env, "/api/v1/events", q)
	} else {
		err = auditLines(ctx, env, c, q)
	}
	switch {
	case ctx.Err() != nil:
		return nil // Ctrl-C is how one leaves
	case err == nil:
		return over
	}
	return err
}

// auditLines prints one line for each event, in columns.
func auditLines(ctx context.Context, env Env, c *client, q url.Values) error {
	p := &printer{w: env.Stdout, color: env.Color}
	for e, err := range lines[record](ctx, c, "/api/v1/events", q) {
		if err != nil {
			return err
		}
		if e.Undecodable != "" {
			p.line("%12s %8d %s", "", e.Seq, p.paint(red, "undecodable: "+visible(e.Undecodable)))
			continue
		}
		call := string(e.Call)
		if call == "" {
			call = "–"
		}
		p.line("%s %8d  %s %9s  %s/%s  %s  %-27s  %s", e.Stored.Local().Format("15:04:05.000"), e.Seq,
			p.paint(kindColor(e.Event), fmt.Sprintf("%-10s", e.Kind())), size(len(e.Body)), e.Tenant, e.Agent,
			e.Session, call, join(what(e.Event), detail(e.Event)))
		if p.err != nil {
			return p.err
		}
	}
	return p.err
}

// what an event is about, where it says so.
func what(e schemas.Event) string {
	var t schemas.Target
	switch d := e.Data.(type) {
	case *schemas.Requested:
		t = d.Target
	case *schemas.Authorized:
		t = d.Target
	case *schemas.Completed:
		t = d.Target
	case *schemas.Failed:
		t = d.Target
	case *schemas.Denied:
		t = d.Target
	case *schemas.Cancelled:
		t = d.Target
	case *schemas.Opened:
		return visible(d.Client)
	}
	return target(t)
}
