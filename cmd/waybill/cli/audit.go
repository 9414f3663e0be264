package cli

import (
	"context"
	"encoding/json"
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
	if err := none(parse(env, fs, args)); err != nil {
		return err
	}
	c, err := connect(env)
	if err != nil {
		return err
	}
	if *asJSON {
		for line, err := range lines[json.RawMessage](ctx, c, "/api/v1/events", q) {
			if err != nil {
				return err
			}
			if _, err := fmt.Fprintf(env.Stdout, "%s\n", line); err != nil {
				return err
			}
		}
		return nil
	}
	p := &printer{w: env.Stdout, color: env.Terminal}
	for e, err := range lines[schemas.Event](ctx, c, "/api/v1/events", q) {
		if err != nil && e.Data == nil {
			return err
		}
		what := ""
		if r, ok := e.Data.(*schemas.Requested); ok {
			what = join(visible(r.Method), visible(r.Name), visible(r.Server))
		}
		color := dim
		switch e.Kind() {
		case schemas.KindDenied, schemas.KindFailed:
			color = red
		case schemas.KindCompleted:
			color = green
		}
		p.line("%s %8d %s/%s %s %s %s %s  %s", e.Stored.Local().Format("15:04:05.000"), e.Seq, e.Tenant, e.Agent,
			e.Session, e.Call, p.paint(color, fmt.Sprintf("%-10s", e.Kind())), size(e), join(what, detail(e)))
		if p.err != nil {
			return p.err
		}
	}
	return p.err
}
