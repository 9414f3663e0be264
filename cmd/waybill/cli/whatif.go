package cli

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"iter"
	"net/url"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/goccy/go-yaml"

	"waybill.dev/schemas"
	"waybill.dev/workers/policy"
)

// Exit codes of a what-if, beside 0: nothing would change.
const (
	exitChanges   = 3 // some decisions would be others
	exitUndecided = 4 // none is known to be another, but of some it cannot be told
)

// outcome is the error of a command that has done what it was asked for, and whose
// exit code says what came out.
type outcome struct {
	code int
	text string
}

func (o *outcome) Error() string { return o.text }

// whatIf is --policy: it decides the calls of r.session, or all since r.since,
// under the rules in r.policy and prints what would change.
func (r *replaying) whatIf(ctx context.Context, env Env) error {
	b, err := r.rules(ctx)
	if err != nil {
		return err
	}
	w := whatIf{bundle: b, env: env, json: r.json, full: r.full || r.since == 0, examples: 3}
	if r.since > 0 {
		c, err := r.connect()
		if err != nil {
			return err
		}
		return w.of(ctx, since(ctx, c, r.from, r.since, r.tenant))
	}
	w.from = r.from
	return w.of(ctx, traffic{events: inBatches(ctx, func(ctx context.Context) iter.Seq2[json.RawMessage, error] {
		return r.events(ctx, r.session)
	}, func(line []byte) (e record, err error) { return e, json.Unmarshal(line, &e) })})
}

// rules are those to decide under. A directory has files of rules, which take the
// place of those in force; servers and `allow` stay. A configuration, itself or in
// the directory, has all of them.
func (r *replaying) rules(ctx context.Context) (*policy.Bundle, error) {
	info, err := os.Stat(r.policy)
	if err != nil {
		return nil, fmt.Errorf("--policy: %w", err)
	}
	file, names := r.policy, []string{r.policy}
	if info.IsDir() {
		file = filepath.Join(r.policy, "waybill.yaml")
	}
	if _, err := os.Stat(file); err == nil && (info.IsDir() || !hasRules(file)) {
		c, err := loadConfig(file)
		if err != nil {
			return nil, err
		}
		b, _, err := c.compilePolicy()
		return b, err
	}
	if info.IsDir() {
		if names, err = filepath.Glob(filepath.Join(r.policy, "*.yaml")); err != nil {
			return nil, fmt.Errorf("--policy: %w", err)
		}
		names = slices.DeleteFunc(names, func(n string) bool { return strings.HasSuffix(n, testFile) })
	}
	if len(names) == 0 {
		return nil, fmt.Errorf("--policy: %s has neither files of rules (*.yaml) nor a waybill.yaml", r.policy)
	}
	c, err := r.connect()
	if err != nil {
		return nil, fmt.Errorf("the policy in force, of which servers and `allow` stay: %w", err)
	}
	var source policy.Source
	for raw, err := range lines[json.RawMessage](ctx, c, "/api/v1/policies/"+activePolicy, nil) {
		if err == nil {
			err = json.Unmarshal(raw, &source)
		}
		if err != nil {
			return nil, fmt.Errorf("the policy in force, of which servers and `allow` stay: %w", err)
		}
	}
	source.Files = nil
	for _, n := range names {
		text, err := os.ReadFile(n)
		if err != nil {
			return nil, fmt.Errorf("--policy: %w", err)
		}
		source.Files = append(source.Files, policy.File{Name: filepath.Base(n), Text: string(text)})
	}
	encoded, err := source.Encode()
	if err != nil {
		return nil, err
	}
	b, err := policy.Compile(encoded)
	if err != nil {
		return nil, fmt.Errorf("--policy: %w", err)
	}
	return b, nil
}

// hasRules tells a file of rules from a configuration. What can be read as neither is
// the latter, which says why.
func hasRules(file string) bool {
	var f struct{ Rules any }
	text, err := os.ReadFile(file)
	return err == nil && yaml.Unmarshal(text, &f) == nil && f.Rules != nil
}

// traffic is what was asked for and decided.
type traffic struct {
	all    bool                       // of everybody, or of one tenant: what rules count can be counted
	head   func() trafficHead         // of all; known when events has yielded
	unread func() int                 // events of all that the gateway cannot read; known when there are no more
	events iter.Seq2[[]record, error] // by batches, in their order
}

// since is the traffic of the last d. Limits count what came up to an hour before.
func since(ctx context.Context, c *client, from string, d time.Duration, t schemas.Tenant) traffic {
	if from != fromStream && from != fromRecord {
		return traffic{events: func(yield func([]record, error) bool) {
			yield(nil, usagef("--since is of the log or of the record, and not of the file %s", from))
		}}
	}
	q := url.Values{"since": {d.String()}, "before": {policy.LongestLimit.String()}, "from": {from}, "tenant": {string(t)}}
	var head trafficHead
	var end struct{ Unread int }
	raw := func(ctx context.Context) iter.Seq2[json.RawMessage, error] {
		return func(yield func(json.RawMessage, error) bool) {
			n, whole := 0, false
			for line, err := range rawLines(ctx, c, "/api/v1/traffic", q) {
				switch n++; {
				case err != nil:
				case n == 1:
					if err = json.Unmarshal(line, &head); err == nil {
						continue
					}
				case strings.HasPrefix(string(line), `{"end"`):
					if err = json.Unmarshal(line, &end); err == nil {
						whole = true
						continue
					}
				}
				if !yield(line, err) || err != nil {
					return
				}
			}
			if !whole {
				yield(nil, errors.New("the gateway's answer broke off"))
			}
		}
	}
	// The first batch comes after the head was read.
	return traffic{all: true, head: func() trafficHead { return head }, unread: func() int { return end.Unread }, events: inBatches(ctx, raw, readTraffic)}
}

// How many lines are read at once by one goroutine, and how many bytes about.
const (
	batchLines = 256
	batchBytes = 1 << 20
)

// inBatches reads lines on all processors and yields what they hold in their order.
// It holds a few batches at a time.
func inBatches(ctx context.Context, lines func(context.Context) iter.Seq2[json.RawMessage, error], read func([]byte) (record, error)) iter.Seq2[[]record, error] {
	type batch struct {
		records []record
		err     error
	}
	return func(yield func([]record, error) bool) {
		outer := ctx
		ctx, cancel := context.WithCancel(ctx)
		var running sync.WaitGroup
		defer running.Wait()
		defer cancel()
		order := make(chan chan batch, runtime.GOMAXPROCS(0))
		running.Go(func() {
			defer close(order)
			send := func(some []json.RawMessage, failed error) bool {
				done := make(chan batch, 1)
				select {
				case order <- done:
				case <-ctx.Done():
					return false
				}
				running.Go(func() {
					b := batch{records: make([]record, 0, len(some))}
					for _, line := range some {
						r, err := read(line)
						if err != nil {
							b.err = fmt.Errorf("line of an event: %w", err)
							break
						}
						b.records = append(b.records, r)
					}
					b.err = cmp.Or(b.err, failed)
					done <- b
				})
				return failed == nil
			}
			some, size := make([]json.RawMessage, 0, batchLines), 0
			for line, err := range lines(ctx) {
				if err != nil {
					send(some, err)
					return
				}
				some, size = append(some, line), size+len(line)
				if len(some) == batchLines || size > batchBytes {
					if !send(some, nil) {
						return
					}
					some, size = make([]json.RawMessage, 0, batchLines), 0
				}
			}
			send(some, nil)
		})
		for done := range order {
			b := <-done
			if !yield(b.records, b.err) || b.err != nil {
				return
			}
		}
		if outer.Err() != nil {
			yield(nil, errInterrupted)
		}
	}
}

// whatIf decides traffic again.
type whatIf struct {
	bundle   *policy.Bundle
	env      Env
	json     bool
	from     string // where it is read, of one session; "" for all traffic
	full     bool   // each decision that would be another
	examples int    // of each change, where it is not full

	rerun  *policy.Rerun
	since  time.Time
	asked  map[schemas.CallID]*waiting
	queue  []*waiting // of asked, the oldest first
	held   int        // bytes of asked
	again  []decision // to be decided together
	size   int        // bytes of again
	report report
	shown  time.Time
	first  schemas.Kind // of one session: what it begins with
	erased string       // and what is said of its erasure
}

// waiting is a request on which nothing was decided yet, or that was held.
type waiting struct {
	record
	now  string // what it would be, where it was held
	over bool
}

// maxWaiting bounds the bytes of requests that wait for their decisions.
const maxWaiting = 64 << 20

// decision is one to be taken again.
type decision struct {
	request record
	policy.Decided
	was     schemas.Decision
	only    []string
	each    bool
	at      time.Time
	counted bool // it is reported; else only what is counted follows from it

	v       policy.Verdict
	missing []string
}

// of reads traffic and prints what would change.
func (w *whatIf) of(ctx context.Context, t traffic) error {
	w.asked = map[schemas.CallID]*waiting{}
	w.report = newReport(w)
	begun := time.Now()
	for records, err := range t.events {
		if err != nil {
			return err
		}
		if w.rerun == nil {
			var whole time.Time
			if t.head != nil {
				w.report.head = t.head()
				whole, w.since = w.report.head.Whole, w.report.head.Since
			}
			w.rerun = policy.NewRerun(w.bundle, t.all, whole)
		}
		for _, r := range records {
			if err := w.take(r); err != nil {
				return err
			}
		}
		if len(records) > 0 {
			w.progress(records[len(records)-1], begun)
		}
	}
	if ctx.Err() != nil {
		return errInterrupted
	}
	if err := w.flush(); err != nil {
		return err
	}
	if t.unread != nil {
		w.report.Undecodable += t.unread()
	}
	switch {
	case w.from == "" && w.report.Erased > 0:
		w.report.Notes = append(w.report.Notes, count(w.report.Erased, "session")+" erased: what was decided in them before is not there")
	case w.from == "":
	case w.erased != "":
		w.report.Notes = append(w.report.Notes, w.erased)
	case w.first != "" && w.first != schemas.KindOpened:
		w.report.Notes = append(w.report.Notes, halfAged(w.from))
	}
	if w.env.Terminal && !w.shown.IsZero() {
		_, _ = fmt.Fprint(w.env.Stderr, "\r\x1b[K")
	}
	w.report.Seconds = time.Since(begun).Seconds()
	return w.report.print()
}

// progress says on a terminal how far it is.
func (w *whatIf) progress(r record, begun time.Time) {
	if !w.env.Terminal || time.Since(w.shown) < 500*time.Millisecond {
		return
	}
	w.shown = time.Now()
	part := ""
	if h := w.report.head; h.Last > h.First && r.Seq >= h.First {
		part = fmt.Sprintf(", %d %%", min(100, 100*(r.Seq-h.First)/(h.Last-h.First)))
	}
	_, _ = fmt.Fprintf(w.env.Stderr, "\r%d decisions%s, %.0f a second\x1b[K", w.report.Decisions, part, float64(w.report.Decisions)/time.Since(begun).Seconds())
}

// take takes the next event.
func (w *whatIf) take(r record) error {
	if r.Undecodable != "" {
		w.report.Undecodable++
		return nil
	}
	if w.first == "" {
		w.first = r.Kind()
	}
	d := decision{at: r.Stored, counted: !r.Stored.Before(w.since)}
	switch p := r.Data.(type) {
	case *schemas.Erased:
		w.erased = wasErased(r.Seq, p)
		w.report.Erased++
		return nil
	case *schemas.Opened:
		if w.rerun.Stateful() { // what was decided before does not count for it
			if err := w.flush(); err != nil {
				return err
			}
			w.rerun.Opened(r.Event)
		}
		return nil
	case *schemas.Requested:
		w.wait(r)
		return nil
	case *schemas.Failed:
		w.drop(r.Call) // it was never decided on, or that is long past
		return nil
	case *schemas.Authorized:
		d.was, d.Outcome, d.only, d.each = p.Decision, "permit", p.Only, p.Each
	case *schemas.Denied:
		d.was, d.Outcome = p.Decision, "deny"
	case *schemas.Held:
		d.was, d.Outcome = p.Decision, "hold"
	default:
		return nil
	}
	asked := w.asked[r.Call]
	if asked == nil {
		if d.counted {
			w.report.NoRequest++
		}
		return nil
	}
	if asked.now != "" && asked.now != "hold" {
		w.drop(r.Call) // it would not have been asked for
		return nil
	}
	if !d.counted && !w.rerun.Stateful() && d.Outcome != "hold" {
		w.drop(r.Call)
		return nil
	}
	var err error
	d.request, d.N, d.BodyGone = asked.record, d.was.N, asked.Gone > 0
	if d.Facts, err = policy.FactsOf(d.was.Facts); err != nil {
		return fmt.Errorf("decision %d of call %s: %w", d.N, r.Call, err)
	}
	if d.At = asked.Stored; d.N > 1 {
		d.At = r.Stored
	}
	w.again, w.size = append(w.again, d), w.size+len(asked.Body)
	if d.Outcome == "hold" {
		if err := w.flush(); err != nil {
			return err
		}
		if asked.now = w.report.last; asked.now == "" {
			asked.now = "unknown"
		}
		return nil
	}
	w.drop(r.Call)
	if len(w.again) >= 16*batchLines || w.size > 16*batchBytes {
		return w.flush()
	}
	return nil
}

// wait keeps a request until it is decided on. What is too much is forgotten, and
// its decision counted as one without a request.
func (w *whatIf) wait(r record) {
	if w.asked[r.Call] != nil {
		return // the first in sequence wins
	}
	a := &waiting{record: r}
	w.asked[r.Call], w.queue = a, append(w.queue, a)
	w.held += len(r.Body) + 1024
	for len(w.queue) > 0 && (w.queue[0].over || w.held > maxWaiting) {
		if first := w.queue[0]; !first.over {
			w.drop(first.Call)
		}
		w.queue[0], w.queue = nil, w.queue[1:]
	}
}

func (w *whatIf) drop(call schemas.CallID) {
	if a := w.asked[call]; a != nil {
		delete(w.asked, call)
		w.held -= len(a.Body) + 1024
		a.over, a.Body = true, nil
	}
}

// flush decides what is to be decided: on all processors, or one after the other
// where a verdict depends on those before.
func (w *whatIf) flush() error {
	some := w.again
	if len(some) == 0 {
		return nil
	}
	part := len(some)
	if !w.rerun.Stateful() {
		part = max(64, (len(some)+runtime.GOMAXPROCS(0)-1)/runtime.GOMAXPROCS(0))
	}
	var deciding sync.WaitGroup
	for chunk := range slices.Chunk(some, part) {
		deciding.Go(func() {
			for i := range chunk {
				d := &chunk[i]
				d.v, d.missing = w.rerun.Decide(d.request.Event, d.Decided)
			}
		})
	}
	deciding.Wait()
	w.again, w.size = w.again[:0], 0
	for i := range some {
		if err := w.report.add(&some[i]); err != nil {
			return err
		}
	}
	clear(some)
	return nil
}
