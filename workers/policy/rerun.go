package policy

import (
	"slices"
	"time"

	"waybill.dev/schemas"
)

// Rerun decides recorded requests again, under one bundle, in the order in which
// they were decided on. What a bundle's rules count, it counts by its own
// verdicts, from the traffic that it is given: a limit lets go on what it would
// have let go on. All other facts are as they were recorded.
//
// What an agent would have done after another answer nobody
// knows. Its memory is bounded: of limits as in [Policy], of sessions as below.
type Rerun struct {
	b      *Bundle
	from   time.Time // what came before is not given
	limits *limiter  // nil: counts too are as they were recorded

	sessions map[schemas.SessionKey]*soFar // of which the beginning was given
	order    []schemas.SessionKey          // of the same, the oldest first
}

// soFar is what was decided in a session.
type soFar struct {
	calls, denied int
	tools         []string // sorted
	labels        []string // sorted
}

// maxRerunSessions bounds how many sessions are followed. Of an older one the
// facts are those that were recorded.
const maxRerunSessions = 50_000

// NewRerun begins. all says that all traffic is given, from a time on (zero: from
// the beginning of the log), and that so it can be counted; else it is only some.
func NewRerun(b *Bundle, all bool, from time.Time) *Rerun {
	r := &Rerun{b: b, from: from, sessions: map[schemas.SessionKey]*soFar{}}
	if all && b.limits {
		r.limits = newLimiter()
	}
	return r
}

// Opened is told of the beginning of a session.
func (r *Rerun) Opened(e schemas.Event) {
	if _, known := r.sessions[e.Session]; known || !r.b.session {
		return
	}
	if len(r.order) >= maxRerunSessions {
		delete(r.sessions, r.order[0])
		r.order = r.order[1:]
	}
	r.sessions[e.Session] = &soFar{tools: []string{}}
	r.order = append(r.order, e.Session)
}

// Stateful tells whether verdicts depend on those before, so that Decide has to be
// called one after the other.
func (r *Rerun) Stateful() bool { return r.limits != nil || r.b.session }

// Decided is a decision as it was recorded.
type Decided struct {
	N        int
	Facts    Facts
	At       time.Time // when its call counts for limits: when it was asked for, or went on after it was held
	Outcome  string    // as [Verdict.Outcome]
	BodyGone bool      // the request's body is not there any more
}

// Decide says what the bundle says, see [Bundle.DecideAgain]. Where that is nothing,
// the call counts as it was decided.
func (r *Rerun) Decide(e schemas.Event, d Decided) (v Verdict, missing []string) {
	q, ok := e.Data.(*schemas.Requested)
	if !ok || q == nil {
		return Verdict{Reason: "not a request"}, nil
	}
	if s := r.sessions[e.Session]; s != nil {
		d.Facts.Session = &SessionFacts{Calls: s.calls, Denied: s.denied, Tools: s.tools, Labels: s.labels}
		defer func() { r.follow(s, q, v, missing, d) }()
	}
	if r.limits == nil {
		return r.b.DecideAgain(e, d.Facts, d.BodyGone)
	}
	limits := r.b.needs(&e, q).limits
	_, _ = r.limits.decide(limits, e.Call, d.At, &d.Facts, func() Verdict {
		for _, l := range limits {
			// Of a window that began before the traffic some may be unknown.
			if d.At.Add(-l.Per).Before(r.from) && d.Facts.Counts[l.key()] < l.Calls {
				delete(d.Facts.Counts, l.key())
			}
		}
		v, missing = r.b.DecideAgain(e, d.Facts, d.BodyGone)
		if missing != nil {
			return Verdict{Permit: d.Outcome == "permit", Limits: limits}
		}
		return v
	})
	return v, missing
}

// follow takes a verdict into what was decided in its session.
func (r *Rerun) follow(s *soFar, q *schemas.Requested, v Verdict, missing []string, d Decided) {
	outcome := v.Outcome()
	if missing != nil {
		outcome = d.Outcome
	}
	if outcome == "permit" {
		for _, label := range v.Obligations.Labels {
			if i, known := slices.BinarySearch(s.labels, label); !known {
				s.labels = slices.Insert(slices.Clone(s.labels), i, label)
			}
		}
	}
	switch {
	case outcome == "deny":
		s.denied++
	case outcome == "permit" && q.Method == toolsCall:
		s.calls++
		tool := q.Server + "/" + q.Name
		if i, known := slices.BinarySearch(s.tools, tool); !known {
			s.tools = slices.Insert(slices.Clone(s.tools), i, tool)
		}
	}
}
