package cli

import (
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"strconv"
	"strings"
	"time"
	"unicode"

	"waybill.dev/schemas"
)

// replay is `waybill replay`.
func replay(ctx context.Context, env Env, args []string) error {
	fs := flag.NewFlagSet("replay", flag.ContinueOnError)
	connect := clientFlags(fs)
	full := fs.Bool("full", false, "print the bodies too")
	asJSON := fs.Bool("json", false, "print one event per line, bodies included")
	rest, err := parse(env, fs, args)
	if err != nil {
		return err
	}
	if len(rest) != 1 {
		return usagef("name one session; `waybill sessions` lists them")
	}
	if err := schemas.CheckToken(rest[0]); err != nil {
		return usagef("%q is no session key: %v", rest[0], err)
	}
	c, err := connect(env)
	if err != nil {
		return err
	}
	path := "/api/v1/sessions/" + rest[0] + "/events"
	if *asJSON {
		for line, err := range lines[json.RawMessage](ctx, c, path, nil) {
			if err != nil {
				return err
			}
			if _, err := fmt.Fprintf(env.Stdout, "%s\n", line); err != nil {
				return err
			}
		}
		return nil
	}
	s := newStory()
	for e, err := range lines[schemas.Event](ctx, c, path, nil) {
		if err != nil && e.Data == nil {
			return err
		}
		s.add(e)
	}
	return s.print(env, *full)
}

// story is a session as a tree: calls under the calls that caused them, the
// events of a call in the order of the log.
type story struct {
	first  schemas.Event
	opened *schemas.Opened
	beside []schemas.Event // of no call
	roots  []*call
	calls  map[schemas.CallID]*call
	events int
	last   time.Time
}

type call struct {
	id     schemas.CallID
	events []schemas.Event
	caused []*call
}

func newStory() *story { return &story{calls: map[schemas.CallID]*call{}} }

func (s *story) add(e schemas.Event) {
	if s.events++; s.events == 1 {
		s.first = e
	}
	s.last = e.Stored
	if o, ok := e.Data.(*schemas.Opened); ok && s.opened == nil {
		s.opened = o
		return
	}
	if e.Call == "" {
		s.beside = append(s.beside, e)
		return
	}
	c := s.calls[e.Call]
	if c == nil {
		c = &call{id: e.Call}
		s.calls[e.Call] = c
		if p := s.calls[e.Parent]; p != nil {
			p.caused = append(p.caused, c)
		} else {
			s.roots = append(s.roots, c)
		}
	}
	c.events = append(c.events, e)
}

// printer writes lines and keeps the first error.
type printer struct {
	w     io.Writer
	color bool
	err   error
}

func (p *printer) line(format string, args ...any) {
	if p.err == nil {
		_, p.err = fmt.Fprintf(p.w, format+"\n", args...)
	}
}

// paint colours text on a terminal.
func (p *printer) paint(code int, text string) string {
	if !p.color {
		return text
	}
	return "\x1b[" + strconv.Itoa(code) + "m" + text + "\x1b[0m"
}

const (
	bold   = 1
	dim    = 2
	red    = 31
	green  = 32
	yellow = 33
)

func (s *story) print(env Env, full bool) error {
	p := &printer{w: env.Stdout, color: env.Terminal}
	f := s.first
	p.line("%s  %s/%s", p.paint(bold, "session "+string(f.Session)), f.Tenant, f.Agent)
	if s.opened != nil {
		p.line("%s %s, client %s", s.opened.Protocol, strconv.Quote(s.opened.Name), visible(s.opened.Client))
	}
	p.line("%s to %s, %d calls, %d events", f.Stored.Local().Format("2006-01-02 15:04:05.000"), s.last.Local().Format("15:04:05.000"), len(s.calls), s.events)
	for _, e := range s.beside {
		p.line("%s %s  %s", e.Stored.Local().Format("15:04:05.000"), e.Kind(), size(e))
	}
	for i, c := range s.roots {
		c.print(p, "", i == len(s.roots)-1, full)
	}
	return p.err
}

// print writes a call, its events and what it caused.
func (c *call) print(p *printer, indent string, last, full bool) {
	branch, below := "├─ ", "│  "
	if last {
		branch, below = "└─ ", "   "
	}
	p.line("%s%s%s", indent, branch, c.title(p))
	indent += below
	start := c.events[0].Stored
	for i := 0; i < len(c.events); i++ {
		e := c.events[i]
		mark := "├─ "
		// Progress is folded into one line, unless bodies are wanted.
		n := 1
		for !full && e.Kind() == schemas.KindProgressed && i+1 < len(c.events) && c.events[i+1].Kind() == schemas.KindProgressed {
			i++
			n++
		}
		if i == len(c.events)-1 && len(c.caused) == 0 {
			mark = "└─ "
		}
		text := fmt.Sprintf("%-10s %10s %9s", e.Kind(), "+"+duration(e.Stored.Sub(start)), size(e))
		if n > 1 {
			text += fmt.Sprintf("  and %d more until +%s", n-1, duration(c.events[i].Stored.Sub(start)))
		}
		if d := detail(e); d != "" {
			text += "  " + d
		}
		p.line("%s%s%s", indent, mark, strings.TrimRight(text, " "))
		if full && len(e.Body) > 0 {
			p.line("%s   %s", indent, p.paint(dim, visible(string(e.Body))))
		}
	}
	for i, sub := range c.caused {
		sub.print(p, indent, i == len(c.caused)-1, full)
	}
}

// title says what the call was and how it ended.
func (c *call) title(p *printer) string {
	first := c.events[0]
	what := string(first.Kind())
	if r, ok := first.Data.(*schemas.Requested); ok {
		what = strings.TrimSpace(visible(r.Method)+" "+visible(r.Name)) + " → " + visible(r.Server)
	}
	end, color := "open", yellow
	var took time.Duration
	for _, e := range c.events {
		if !e.Kind().Ends() {
			continue
		}
		took = e.Stored.Sub(first.Stored)
		end, color = string(e.Kind()), red
		switch d := e.Data.(type) {
		case *schemas.Completed:
			if color = green; d.ErrorCode != 0 {
				end, color = fmt.Sprintf("completed with error %d", d.ErrorCode), red
			}
		case *schemas.Failed:
			end = "failed: " + string(d.Code)
		}
		break // the first ending counts
	}
	text := fmt.Sprintf("%s  %s  %s", first.Stored.Local().Format("15:04:05.000"), p.paint(bold, what), p.paint(color, end))
	if took > 0 {
		text += " in " + duration(took)
	}
	return text + "  " + p.paint(dim, string(c.id))
}

// detail is what a line says beyond kind, time and size.
func detail(e schemas.Event) string {
	switch d := e.Data.(type) {
	case *schemas.Authorized:
		return join("by "+d.Rule, d.Reason)
	case *schemas.Denied:
		if d.Rule == "" {
			return join("by default", d.Reason)
		}
		return join("by "+d.Rule, d.Reason)
	case *schemas.Started:
		return "attempt " + strconv.Itoa(d.Attempt) + " by " + d.By
	case *schemas.Completed:
		return join("HTTP "+strconv.Itoa(d.Status), parts(d.Summary))
	case *schemas.Failed:
		return join(string(d.Code), visible(d.Detail), parts(d.Summary))
	case *schemas.Cancelled:
		return join(visible(d.Reason), parts(d.Summary))
	case *schemas.Cancel:
		return visible(d.Reason)
	}
	return ""
}

// parts splits a call's time by the log's clock.
func parts(s schemas.Summary) string {
	if s.AuthorizedAt.IsZero() {
		return ""
	}
	text := "policy " + duration(s.AuthorizedAt.Sub(s.RequestedAt))
	if !s.UpstreamAt.IsZero() {
		text += ", queue " + duration(s.UpstreamAt.Sub(s.AuthorizedAt))
	}
	if s.Attempts > 1 {
		text += fmt.Sprintf(", %d attempts", s.Attempts)
	}
	return text
}

func join(parts ...string) string {
	var there []string
	for _, p := range parts {
		if p != "" {
			there = append(there, p)
		}
	}
	return strings.Join(there, "; ")
}

func size(e schemas.Event) string {
	switch n := len(e.Body); {
	case n == 0:
		return "–"
	case n < 10_000:
		return strconv.Itoa(n) + " B"
	default:
		return strconv.Itoa(n/1000) + " kB"
	}
}

func duration(d time.Duration) string {
	switch {
	case d < 10*time.Millisecond:
		return fmt.Sprintf("%.2f ms", float64(d.Microseconds())/1000)
	case d < 10*time.Second:
		return fmt.Sprintf("%d ms", d.Milliseconds())
	default:
		return d.Round(100 * time.Millisecond).String()
	}
}

// visible makes text safe for a terminal: what agents and upstreams said must
// not move the cursor, hide, or read backwards.
func visible(s string) string {
	var b strings.Builder
	for _, r := range s {
		if r == '\n' || r == '\t' {
			r = ' '
		}
		if unicode.IsPrint(r) {
			b.WriteRune(r)
		} else {
			fmt.Fprintf(&b, "\\u{%x}", r)
		}
	}
	return b.String()
}
