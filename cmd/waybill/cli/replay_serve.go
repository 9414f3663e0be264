package cli

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"waybill.dev/edge"
	"waybill.dev/edge/mcp"
	"waybill.dev/replay/playback"
	"waybill.dev/schemas"
)

// answer is --serve: it answers an agent from the record, at r.serve, until ctx
// ends. Edge and adapter are those of the gateway; in the place of the log, and of
// all that is behind it, is the recorded session. Nothing here can call a server,
// but for --on-miss live.
func (r *replaying) answer(ctx context.Context, env Env) error {
	at, err := net.ResolveTCPAddr("tcp", r.serve)
	switch {
	case err != nil:
		return fmt.Errorf("--serve: %w", err)
	case !at.IP.IsLoopback(): // nor is it opened for a moment
		return usagef("--serve %q: must be an address that only this machine can reach, such as 127.0.0.1:8090: whoever can reach it is told what was said in the session", r.serve)
	}
	events, err := r.recorded(ctx)
	if err != nil {
		return err
	}
	var live *liveCalls
	o := playback.Options{Fast: r.fast, Report: reporter(env)}
	log := newLog(env.Stderr, slog.LevelWarn, false)
	if r.onMiss == "live" {
		if live, err = r.live(env, log); err != nil {
			return fmt.Errorf("--on-miss live: %w", err)
		}
		defer live.close()
		o.Live = live.carry
	}
	l, err := playback.New(events, o)
	if err != nil {
		return err
	}
	defer l.Close()
	if live != nil {
		live.log = l
	}

	ln, err := net.Listen("tcp", at.String())
	if err != nil {
		return fmt.Errorf("--serve: %w", err)
	}
	tenant, agent := l.Who()
	adapter := mcp.New(mcp.Options{
		Ask: l.Ask, Store: l.Store, Edge: "replay", Follow: l.Follow, Load: l.Load, Latest: l.Latest, Asked: l.Asked, Scan: l.Scan,
		Task: l.Task, Tasked: l.TaskedAfter, TaskTime: time.Hour, Tasks: func(string) bool { return l.Tasked() },
		Fronts: l.Fronts(), Log: log,
	})
	srv, err := edge.New(edge.Options{
		Anonymous: &edge.Principal{Tenant: tenant, Agent: agent}, AnyToken: true, DrainTimeout: time.Second, Log: log,
	}, adapter.Routes()...)
	if err != nil {
		_ = ln.Close()
		return err
	}
	r.ready(env, l, ln.Addr(), events[0].Session)

	run, stop := context.WithCancel(ctx)
	defer stop()
	var all errgroup.Group
	all.Go(func() error { defer stop(); return srv.Run(run, ln) })
	all.Go(func() error { return adapter.Run(run) })
	if live != nil {
		all.Go(func() error { live.run(run); return nil })
	}
	if err := all.Wait(); err != nil {
		return err
	}
	return summarize(env, l.Summary())
}

// maxRecorded bounds the bytes of a session that is played: it is held whole.
const maxRecorded = 1 << 30

// recorded reads the session whole. What of it is not there any more must not be
// made up.
func (r *replaying) recorded(ctx context.Context) ([]schemas.Event, error) {
	var events []schemas.Event
	size := 0
	for e, err := range r.records(ctx, r.session) {
		if ctx.Err() != nil {
			return nil, errInterrupted
		}
		if err != nil {
			return nil, err
		}
		switch {
		case e.Undecodable != "":
			return nil, fmt.Errorf("event %d cannot be read (%s), so the session cannot be played", e.Seq, visible(e.Undecodable))
		case e.Gone > 0:
			return nil, fmt.Errorf("the body of event %d is no longer kept, so the session cannot be played", e.Seq)
		}
		if size += len(e.Body) + 1024; size > maxRecorded {
			return nil, fmt.Errorf("the session has more than %d MB, which is the most that is played", maxRecorded>>20)
		}
		events = append(events, e.Event)
	}
	return events, nil
}

// ready says where it is, and what of the session cannot be played.
func (r *replaying) ready(env Env, l *playback.Log, at net.Addr, session schemas.SessionKey) {
	p := func(format string, args ...any) { _, _ = fmt.Fprintf(env.Stdout, format+"\n", args...) }
	tenant, agent := l.Who()
	p("Replay is ready: session %s of %s/%s, %s.", session, tenant, agent, count(l.Recorded(), "call"))
	p("")
	for _, path := range l.Paths() {
		p("  MCP endpoint   http://%s%s", at, visible(path))
	}
	for _, n := range l.Notes() {
		p("  note           %s", visible(n))
	}
	p("")
	if r.onMiss == "live" {
		p("A call that was not recorded is made at the running gateway.")
	} else {
		p("No server is called: a call that was not recorded fails.")
	}
	p("Ctrl-C ends it, and says what was different.")
}

// reporter prints each difference when it is found.
func reporter(env Env) func(playback.Difference) {
	var mu sync.Mutex
	return func(d playback.Difference) {
		var b strings.Builder
		fmt.Fprintf(&b, "waybill replay: different: %s: %s", target(d.Target), visible(d.What))
		if d.Seq > 0 {
			fmt.Fprintf(&b, " (event %d)", d.Seq)
		}
		if d.Handed {
			b.WriteString("; made at the running gateway")
		}
		for _, line := range d.Diff {
			b.WriteString("\n  " + visible(line))
		}
		mu.Lock()
		defer mu.Unlock()
		_, _ = fmt.Fprintln(env.Stderr, b.String()) // nobody is there to be told that nobody hears it
	}
}

// errDifferent: the agent did not do what it did then.
var errDifferent = errors.New("this was not the session that was recorded")

// maxUnasked is how many calls that were never asked for are named.
const maxUnasked = 20

// summarize prints what came of it. It returns errDifferent if anything was
// different.
func summarize(env Env, s playback.Summary) error {
	p := &printer{w: env.Stdout, color: env.Color}
	p.line("")
	p.line("%s answered from the record, %d not recorded, %d never asked for; %s",
		count(s.Served, "call"), s.Missed, s.Never, count(s.Differences, "difference"))
	if s.Reordered > 0 {
		p.line("%s earlier than then, before one that had ended before it", count(s.Reordered, "call"))
	}
	for i, what := range s.Unasked {
		if i == maxUnasked {
			p.line("  … and %d more", s.Never-i)
			break
		}
		p.line("  never asked for: %s", visible(what))
	}
	if p.err == nil && !s.Same() {
		return errDifferent
	}
	return p.err
}
