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
	"iter"
	"maps"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"
	"unicode"

	"waybill.dev/schemas"
)

// replaying is what `waybill replay` was asked for.
type replaying struct {
	session schemas.SessionKey // "" for all traffic since a time
	from    string             // stream, clickhouse or the name of an exported file
	keys    []string           // public keys to verify by, or files of some
	connect func() (*client, error)

	full, json bool // show
	verify     bool

	serve  string // address at which the record answers; "" for not
	fast   bool
	onMiss string // fail or live

	policy string        // rules to decide under; "" for not
	since  time.Duration // of all traffic; 0 for one session
	tenant schemas.Tenant
}

// replayCommand is `waybill replay`.
func replayCommand(ctx context.Context, env Env, args []string) error {
	r := replaying{from: fromStream, onMiss: "fail"}
	fs := flag.NewFlagSet("replay", flag.ContinueOnError)
	connect := clientFlags(fs)
	fs.BoolVar(&r.full, "full", false, "print the bodies too")
	fs.BoolVar(&r.json, "json", false, "print one event per line, bodies included; with --verify and --policy the report")
	fs.StringVar(&r.from, "from", fromStream, "`F`, where the events are read: stream (the log), clickhouse (the record) or a file that `waybill export` wrote")
	fs.BoolVar(&r.verify, "verify", false, "make again what can be made again from what was recorded, and name the first difference")
	keys := keyFlag(fs, " with --verify")
	fs.StringVar(&r.serve, "serve", "", "answer an agent from the record, at `ADDR`, without any server")
	fs.BoolVar(&r.fast, "fast", false, "with --serve: at once, and not after the time that it took")
	fs.StringVar(&r.onMiss, "on-miss", r.onMiss, "with --serve: `W`, what becomes of a call that was not recorded: fail, or live, which makes it")
	fs.StringVar(&r.policy, "policy", "", "decide the calls under the rules in `DIR`, or a file of them, and print what would change; exits with 3 if anything would, with 4 if nothing is known to but of some it cannot be told")
	fs.Func("since", "with --policy: all traffic of the last `D`, such as 24h, and not one session", func(s string) (err error) {
		if r.since, err = time.ParseDuration(s); err == nil && r.since <= 0 {
			err = errors.New("must be longer than 0")
		}
		return err
	})
	fs.Func("tenant", "with --since: only calls of `TENANT`", func(s string) error { r.tenant = schemas.Tenant(s); return schemas.CheckToken(s) })
	rest, err := parse(env, fs, args)
	if err != nil {
		return err
	}
	given := map[string]bool{}
	fs.Visit(func(f *flag.Flag) { given[f.Name] = true })
	if err := r.check(given, rest); err != nil {
		return err
	}
	r.keys = *keys
	r.connect = sync.OnceValues(func() (*client, error) { return connect(env) })
	switch {
	case given["serve"]:
		return r.answer(ctx, env)
	case given["policy"]:
		return r.whatIf(ctx, env)
	case r.verify:
		return r.verified(ctx, env)
	}
	return r.show(ctx, env)
}

// Where events are read; any other word is the name of a file.
const (
	fromStream = "stream"
	fromRecord = "clickhouse"
)

// check says what does not go together.
func (r *replaying) check(given map[string]bool, rest []string) error {
	for _, pair := range [][2]string{{"fast", "serve"}, {"on-miss", "serve"}, {"since", "policy"}, {"tenant", "since"}, {"key", "verify"}} {
		if given[pair[0]] && !given[pair[1]] {
			return usagef("--%s goes with --%s", pair[0], pair[1])
		}
	}
	for _, pair := range [][2]string{{"serve", "policy"}, {"serve", "verify"}, {"policy", "verify"}, {"serve", "json"}, {"serve", "full"}} {
		if given[pair[0]] && given[pair[1]] {
			return usagef("--%s and --%s are two things", pair[0], pair[1])
		}
	}
	switch {
	case given["serve"] && r.serve == "", given["policy"] && r.policy == "", r.from == "":
		return usagef("an empty value")
	case r.onMiss != "fail" && r.onMiss != "live":
		return usagef("--on-miss %q: there are fail and live", r.onMiss)
	case given["since"] && len(rest) > 0:
		return usagef("--since is of all sessions, and %s is one", rest[0])
	case given["since"]:
		return nil
	case len(rest) == 0 && r.file():
		return nil // the only session in it
	case len(rest) != 1:
		return usagef("name one session; `waybill sessions` lists them")
	}
	if err := schemas.CheckToken(rest[0]); err != nil {
		return usagef("%q is no session key: %v", rest[0], err)
	}
	r.session = schemas.SessionKey(rest[0])
	return nil
}

// file tells whether events are read from an exported file.
func (r *replaying) file() bool { return r.from != fromStream && r.from != fromRecord }

// events reads a session from where it is to be read, as lines of the events API.
func (r *replaying) events(ctx context.Context, key schemas.SessionKey) iter.Seq2[json.RawMessage, error] {
	return func(yield func(json.RawMessage, error) bool) {
		if r.file() {
			exportedEvents(r.from, key)(yield)
			return
		}
		c, err := r.connect()
		if err != nil {
			yield(nil, err)
			return
		}
		for line, err := range rawLines(ctx, c, "/api/v1/sessions/"+string(key)+"/events", url.Values{"from": {r.from}}) {
			if !yield(line, err) || err != nil {
				return
			}
		}
	}
}

// records is events, read.
func (r *replaying) records(ctx context.Context, key schemas.SessionKey) iter.Seq2[record, error] {
	return func(yield func(record, error) bool) {
		for line, err := range r.events(ctx, key) {
			var e record
			if err == nil {
				if err = json.Unmarshal(line, &e); err != nil {
					err = fmt.Errorf("line of an event: %w", err)
				}
			}
			if !yield(e, err) || err != nil {
				return
			}
		}
	}
}

// show prints the session.
func (r *replaying) show(ctx context.Context, env Env) error {
	if r.json {
		for line, err := range r.events(ctx, r.session) {
			if err != nil {
				return err
			}
			if !json.Valid(line) {
				return fmt.Errorf("line of an event: not JSON: %.100q", line)
			}
			if err := env.printLine(bytes.TrimSuffix(line, []byte("\n"))); err != nil {
				return err
			}
		}
		return nil
	}
	s := newStory(r.full)
	s.from = r.from
	for e, err := range r.records(ctx, r.session) {
		if err != nil {
			return err
		}
		s.add(e)
	}
	s.follow(func(key schemas.SessionKey) iter.Seq2[record, error] { return r.records(ctx, key) })
	if ctx.Err() != nil {
		return errInterrupted
	}
	return s.print(env)
}

// story is a session as a tree: calls under the calls that caused them, the
// events of a call in the order of the log.
type story struct {
	full   bool // bodies are wanted; else only their size is kept
	from   string
	first  schemas.Event
	opened *schemas.Opened
	beside []entry // of no call
	roots  []*call
	calls  map[schemas.CallID]*call
	notes  []string // of what is not shown
	events int
	gone   int // bodies that are no longer kept
	last   time.Time
}

// entry is an event, which may have left its body behind.
type entry struct {
	record
	size int
}

type call struct {
	id        schemas.CallID
	events    []entry
	caused    []*call
	elsewhere schemas.SessionKey // in which it was made; "" for that of the story
}

func newStory(full bool) *story { return &story{full: full, calls: map[schemas.CallID]*call{}} }

func (s *story) add(r record) {
	e := s.entry(r)
	if e.Undecodable != "" {
		s.beside = append(s.beside, e)
		return
	}
	if s.events++; s.events == 1 {
		s.first = e.Event
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
	s.addCall(e)
}

// entry is an event as the story keeps it.
func (s *story) entry(r record) entry {
	e := entry{r, max(len(r.Body), r.Gone)}
	if r.Gone > 0 {
		s.gone++
	}
	if !s.full {
		e.Body = nil
	}
	return e
}

// addCall adds an event of a call.
func (s *story) addCall(e entry) *call {
	c := s.calls[e.Call]
	if c == nil {
		c = &call{id: e.Call}
		s.calls[e.Call] = c
		if p := s.calls[e.Parent]; p != nil && p != c {
			p.caused = append(p.caused, c)
		} else {
			s.roots = append(s.roots, c)
		}
	}
	c.events = append(c.events, e)
	return c
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

// settle takes what is no call out of the calls: a wish to cancel what was
// never asked for, say. Of an old call the ending alone may be left.
func (s *story) settle() {
	var roots []*call
	var keep func(list []*call) []*call
	keep = func(list []*call) []*call {
		var calls []*call
		for _, c := range list {
			c.caused = keep(c.caused)
			if c.real() {
				calls = append(calls, c)
				continue
			}
			delete(s.calls, c.id)
			s.beside = append(s.beside, c.events...)
			roots = append(roots, c.caused...)
		}
		return calls
	}
	s.roots = append(keep(s.roots), roots...)
	bySeq := func(a, b entry) int { return cmp.Compare(a.Seq, b.Seq) }
	slices.SortFunc(s.beside, bySeq)
	slices.SortFunc(s.roots, func(a, b *call) int { return bySeq(a.events[0], b.events[0]) })
}

func (s *story) print(env Env) error {
	s.settle()
	p := &printer{w: env.Stdout, color: env.Color}
	f := s.first
	p.line("%s  %s/%s", p.paint(bold, "session "+string(f.Session)), f.Tenant, f.Agent)
	if s.opened != nil {
		text := fmt.Sprintf("%s \"%s\"", visible(string(s.opened.Protocol)), visible(s.opened.Name))
		if s.opened.Client != "" {
			text += ", client " + visible(s.opened.Client)
		}
		p.line("%s", text)
	}
	until := s.last.Local().Format("15:04:05.000")
	if s.last.Sub(f.Stored) > 12*time.Hour {
		until = s.last.Local().Format("2006-01-02 15:04:05.000")
	}
	p.line("%s to %s, %s: %s", f.Stored.Local().Format("2006-01-02 15:04:05.000"), until, count(s.events, "event"), s.outcomes())
	if s.gone > 0 {
		text := " without the body, which the record keeps for clickhouse.bodies only"
		if s.from != fromRecord {
			text = " without the body, which was left out when they were exported, or not kept any more"
		}
		p.line("%s", p.paint(yellow, count(s.gone, "event")+text))
	}
	for _, e := range s.beside {
		if e.Undecodable != "" {
			p.line("%12s  %s", "", p.paint(red, "undecodable: "+visible(e.Undecodable)))
			continue
		}
		text := fmt.Sprintf("%s  %-10s %9s", e.Stored.Local().Format("15:04:05.000"), e.Kind(), size(e.size))
		if d := detail(e.Event); d != "" {
			text += "  " + d
		}
		if e.Call != "" {
			text += "  " + p.paint(dim, "of no call in the log: "+string(e.Call))
		}
		p.line("%s", text)
		if s.full && len(e.Body) > 0 {
			p.line("%12s  %s", "", p.paint(dim, visible(string(e.Body))))
		}
	}
	for i, c := range s.roots {
		c.print(p, "", i == len(s.roots)-1, s.full)
	}
	for _, note := range append(s.lacks(), s.notes...) {
		p.line("%s", p.paint(yellow, visible(note)))
	}
	return p.err
}

// lacks says what of the session is not there any more.
func (s *story) lacks() (notes []string) {
	for _, e := range s.beside {
		if d, ok := e.Data.(*schemas.Erased); ok {
			notes = append(notes, wasErased(e.Seq, d))
		}
	}
	if d := s.first.Data; len(notes) == 0 && d != nil && d.Kind() != schemas.KindOpened {
		notes = append(notes, halfAged(s.from))
	}
	return notes
}

// wasErased says that a session was erased.
func wasErased(seq uint64, d *schemas.Erased) string {
	return join(fmt.Sprintf("what was said before event %d was erased", seq), d.Reason)
}

// outcomes counts the calls by how they ended.
func (s *story) outcomes() string {
	n, all := map[string]int{}, 0
	for _, c := range s.calls {
		if c.elsewhere != "" {
			continue
		}
		all++
		end := "open"
		if e, ok := c.end(); ok {
			end = string(e.Kind())
		}
		n[end]++
	}
	var parts []string
	for _, end := range []schemas.Kind{schemas.KindCompleted, schemas.KindDenied, schemas.KindFailed, schemas.KindCancelled, "open"} {
		if k := n[string(end)]; k > 0 {
			parts = append(parts, fmt.Sprintf("%d %s", k, end))
		}
	}
	return strings.TrimSuffix(count(all, "call")+", "+strings.Join(parts, ", "), ", ")
}

func count(n int, of string) string {
	if n != 1 {
		of += "s"
	}
	return strconv.Itoa(n) + " " + of
}

// real tells whether somebody asked for the call.
func (c *call) real() bool {
	_, ended := c.end()
	return ended || slices.ContainsFunc(c.events, func(e entry) bool { return e.Kind() == schemas.KindRequested })
}

// end is the event that ended the call: the first counts.
func (c *call) end() (schemas.Event, bool) {
	for _, e := range c.events {
		if e.Kind().Ends() {
			return e.Event, true
		}
	}
	return schemas.Event{}, false
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
		// Progress is folded into one line, unless bodies are wanted.
		n := 1
		for !full && e.Kind() == schemas.KindProgressed && i+1 < len(c.events) && c.events[i+1].Kind() == schemas.KindProgressed {
			i++
			n++
		}
		mark, beside := "├─ ", "│  "
		if i == len(c.events)-1 && len(c.caused) == 0 {
			mark, beside = "└─ ", "   "
		}
		text := fmt.Sprintf("%-10s %10s %9s", e.Kind(), "+"+duration(e.Stored.Sub(start)), size(e.size))
		if n > 1 {
			text += fmt.Sprintf("  and %d more until +%s", n-1, duration(c.events[i].Stored.Sub(start)))
		}
		if d := detail(e.Event); d != "" {
			text += "  " + d
		}
		p.line("%s%s%s", indent, mark, strings.TrimRight(text, " "))
		if full {
			for _, ground := range grounds(e.Event) {
				p.line("%s%s%s", indent, beside, p.paint(dim, visible(ground)))
			}
		}
		switch {
		case !full || len(e.Body) == 0:
		case i > 0 && e.Kind() == schemas.KindAuthorized && bytes.Equal(e.Body, c.events[0].Body):
			p.line("%s%s%s", indent, beside, p.paint(dim, "(the request, as above)"))
		default:
			p.line("%s%s%s", indent, beside, p.paint(dim, visible(string(e.Body))))
		}
	}
	for i, sub := range c.caused {
		sub.print(p, indent, i == len(c.caused)-1, full)
	}
}

// title says what the call was and how it ended.
func (c *call) title(p *printer) string {
	first := c.events[0].Event
	name := what(first)
	if name == "" {
		name = string(first.Kind())
	}
	outcome, color := "open", yellow
	if e, ok := c.end(); ok {
		outcome, color = string(e.Kind()), kindColor(e)
		switch d := e.Data.(type) {
		case *schemas.Completed:
			if d.ErrorCode != 0 {
				outcome = fmt.Sprintf("completed with error %d", d.ErrorCode)
			}
		case *schemas.Failed:
			outcome = "failed: " + visible(string(d.Code))
		}
		if took := e.Stored.Sub(first.Stored); took > 0 {
			outcome += " in " + duration(took)
		}
	}
	if c.elsewhere != "" {
		outcome += ", by " + string(first.Agent) + " in session " + string(c.elsewhere)
	}
	return fmt.Sprintf("%s  %s  %s  %s", first.Stored.Local().Format("15:04:05.000"), p.paint(bold, name), p.paint(color, outcome), p.paint(dim, string(c.id)))
}

// kindColor is the colour of an event: red for what needs a look.
func kindColor(e schemas.Event) int {
	switch d := e.Data.(type) {
	case *schemas.Completed:
		if d.ErrorCode != 0 {
			return red
		}
		return green
	case *schemas.Denied, *schemas.Failed:
		return red
	case *schemas.Cancelled, *schemas.Held:
		return yellow
	}
	return dim
}

// target is what a call is for, with its upstream.
func target(t schemas.Target) string {
	if t.Method == "" {
		return ""
	}
	return strings.TrimSpace(visible(t.Method)+" "+visible(t.Name)) + " → " + visible(t.Server)
}

// detail is what a line says beyond kind, time and size. Whoever wrote the file that
// it may be of has chosen the names of the rules in it, too.
func detail(e schemas.Event) string {
	if of, ok := e.Data.(interface{ Screening() schemas.Screened }); ok {
		return visible(join(ofKind(e), screened(of.Screening())))
	}
	return visible(ofKind(e))
}

// screened says what was found in what a server said, and what guards said of it.
func screened(s schemas.Screened) string {
	var all []string
	for _, f := range s.Found {
		all = append(all, visible(f.Rule)+" "+visible(f.Did)+" "+count(f.Count, "time"))
	}
	if s.FoundMore > 0 {
		all = append(all, count(s.FoundMore, "finding")+" more")
	}
	for _, c := range s.Checks {
		word := "guard " + visible(c.Guard) + " says " + visible(c.Said) + " after " + strconv.Itoa(c.Millis) + " ms"
		if c.Reason != "" {
			word += ": " + visible(c.Reason)
		}
		all = append(all, word)
	}
	return join(all...)
}

func ofKind(e schemas.Event) string {
	switch d := e.Data.(type) {
	case *schemas.Requested:
		alias, back := "", ""
		if d.Alias != "" {
			alias = "called " + visible(d.Alias) + " by the client"
		}
		if d.Back {
			back = "made for call " + string(e.Parent)
		}
		return join(alias, back)
	case *schemas.Caused:
		return "call " + string(d.Call) + " by " + string(d.Agent) + " in session " + string(d.Session)
	case *schemas.Connected:
		return "to " + visible(d.Server) + ", revision " + visible(d.Revision)
	case *schemas.Asked:
		return visible(d.Method) + ", by " + visible(d.Server)
	case *schemas.Answered:
		return visible(d.Method) + ", to " + visible(d.Server)
	case *schemas.Notified:
		if d.ToServer {
			return visible(d.Method) + ", to " + visible(d.Server)
		}
		return visible(d.Method) + ", by " + visible(d.Server)
	case *schemas.Closed:
		return visible(d.Reason)
	case *schemas.Authorized:
		behind := ""
		if d.BodySize > 0 {
			behind = fmt.Sprintf("body of %s stays at event %d", size(d.BodySize), d.RequestedSeq)
		}
		return join("by "+d.Rule, d.Reason, visible(d.Facts["approval"]), behind)
	case *schemas.Held:
		return join("by "+d.Rule, d.Reason, "approval "+d.Approval+" is waited for until "+d.Expires.Local().Format("15:04:05"))
	case *schemas.Denied:
		if d.Rule == "" {
			return cmp.Or(d.Reason, "no rule allows it")
		}
		return join("by "+d.Rule, visible(d.Reason))
	case *schemas.Started:
		return "claimed by " + visible(d.By)
	case *schemas.Tasked:
		return visible(d.Status)
	case *schemas.Erased:
		return visible(d.Reason)
	case *schemas.Attached:
		switch {
		case d.Over:
			return "no more"
		case d.N > 0:
			return "still"
		}
	case *schemas.Routed:
		if d.Back {
			return "back to " + visible(d.To)
		}
		return "to its owner " + visible(d.To)
	case *schemas.Completed:
		status, code, removed := "", "", ""
		if d.Status != 0 {
			status = "HTTP " + strconv.Itoa(d.Status)
		}
		if d.ErrorCode != 0 {
			code = "error " + strconv.Itoa(d.ErrorCode)
		}
		if n := len(d.Removed); n > 0 {
			removed = count(n, "name") + " kept from the caller"
		}
		return join(status, code, visible(d.Result), removed, parts(d.Summary, e.Stored))
	case *schemas.Failed:
		return join(string(d.Code), visible(d.Detail), parts(d.Summary, e.Stored))
	case *schemas.Cancelled:
		return join(visible(d.Reason), parts(d.Summary, e.Stored))
	case *schemas.Cancel:
		return visible(d.Reason)
	}
	return ""
}

// parts splits a call's time by the log's clock: until policy decided, until the
// upstream was called, until it had answered.
func parts(s schemas.Summary, ended time.Time) string {
	if s.AuthorizedAt.IsZero() {
		return ""
	}
	text := "policy " + duration(s.AuthorizedAt.Sub(s.RequestedAt))
	if s.UpstreamAt.IsZero() {
		return text
	}
	text += ", queue " + duration(s.UpstreamAt.Sub(s.AuthorizedAt)) + ", upstream " + duration(ended.Sub(s.UpstreamAt))
	if s.Attempts > 1 {
		text += fmt.Sprintf(", %d attempts", s.Attempts)
	}
	return text
}

// grounds are what a decision was made on, one line each.
func grounds(e schemas.Event) (lines []string) {
	d := schemas.DecisionOf(e.Data)
	if len(d.Matches) > 0 {
		text := "rules that spoke: " + strings.Join(d.Matches, ", ")
		if d.MatchesMore > 0 {
			text += fmt.Sprintf(" and %d more", d.MatchesMore)
		}
		lines = append(lines, text)
	}
	if len(d.Obligations) > 0 {
		lines = append(lines, "ordered: "+strings.Join(d.Obligations, ", "))
	}
	for _, name := range slices.Sorted(maps.Keys(d.Facts)) {
		lines = append(lines, name+" = "+d.Facts[name])
	}
	if d.PolicySHA256 != "" {
		lines = append(lines, "policy "+d.PolicySHA256)
	}
	return lines
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

func size(n int) string {
	switch {
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
