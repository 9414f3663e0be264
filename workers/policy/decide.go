package policy

// Nothing in this file, nor in the files of the kinds of rule, may look at a
// clock, at chance or at the world: replay recomputes every decision and must
// agree. test/arch_test.go checks it.

import (
	"cmp"
	"errors"
	"fmt"
	"slices"
	"strings"

	"cel.dev/cel-go/common/types/ref"

	"waybill.dev/schemas"
)

// Effect is what a rule says when it applies.
type Effect int

const (
	Permit  Effect = iota + 1 // the call may go on, unless another rule says otherwise
	Forbid                    // the call may not go on, whatever else is said
	Approve                   // what is permitted has to be approved by a person first
	Oblige                    // what is permitted comes with obligations
)

func (e Effect) String() string {
	if e < Permit || e > Oblige {
		return "no effect"
	}
	return [...]string{"permit", "forbid", "require_approval", "oblige"}[e-1]
}

// A Rule is one line of the policy, of whatever kind.
type Rule struct {
	ID     string // decisions name it
	Effect Effect
	Reason string // for operators

	// Methods and Servers are patterns of what the rule may concern, to find it
	// by; Match looks by itself. None: all.
	Methods, Servers []string

	Obligations Obligations // not of a forbid

	// Match looks at a request. It must not change it and must be pure: the same
	// event with the same facts gives the same match, and the same error. A rule
	// that fails or panics is taken at its worst: a permit does not apply, any
	// other does.
	Match func(in *Input) (Match, error)

	needs func(in *Input) needs // facts that it may look at; nil: none
	asks  needs                 // of all its requests; without limits
	plain bool                  // it orders nothing; set by NewBundle
	where string                // file and line
	when  string                // its condition, as written
}

// Input is what a rule looks at.
type Input struct {
	Event   *schemas.Event
	Request *schemas.Requested // the event's payload
	Facts   Facts

	anyArgs bool    // it is asked about a tool, whatever the arguments; or these are not known
	open    *open   // the facts were found out for other rules; see DecideAgain
	read    *read   // what was read of the request already; may be nil
	args    ref.Val // see arguments
	size    int     // see [jsonrpc.Value.Size]; 0: nobody has asked
}

// Match is what a rule finds in a request.
type Match struct {
	Applies bool // the rule's effect holds for this request
	Maybe   bool // it would for some arguments, or facts; only where these are left open

	// Selected says that only its condition keeps the rule from applying.
	Selected bool

	// Tools answers a tools/list: patterns ([schemas.Match]) of the tools that
	// this permit may let the caller call on this server, also when it does not
	// apply to the listing itself. "*" is all of them.
	Tools []string

	// Each says that of the tools of this server the rule has to be asked about
	// each by its name ([Bundle.Shows]).
	Each bool
}

// Verdict is the word on one request.
type Verdict struct {
	Permit bool
	Hold   bool     // it would be permitted, if a person approved
	Ask    []string // it would be permitted or held, depending on what these guards say
	Rule   string   // the rule that decided, the first in order; "" for default deny
	Reason string   // of a denial or a hold, for operators; a permit's reason is its rule
	Only   []string // what a permitted tools/list may show; nil: all of it
	Each   bool     // and of that, what [Bundle.Shows] says

	Matches     []string    // the rules that spoke, sorted
	Obligations Obligations // of all of them together, where it is permitted or held
	Limits      []Limit     // that were looked at, and count the call where it is permitted
	Faults      []Fault     // rules that failed on the way; their consequence is already drawn
}

// Fault is a rule that could not be evaluated.
type Fault struct {
	Rule string
	Err  error
}

// protocols are those whose methods the rules know how to read. A request of
// any other is denied.
var protocols = []schemas.Protocol{"mcp"}

const (
	toolsCall  = "tools/call"
	toolsList  = "tools/list"
	promptsGet = "prompts/get"
)

// Decide says whether the event, which must be a request, may go on. It is
// pure. All rules are asked that may concern it; a forbid wins over everything,
// a limit that is reached over what is left, then a rule that requires approval
// over the permits; without a permit the call is denied.
func (b *Bundle) Decide(e schemas.Event, facts Facts) Verdict {
	q, _ := e.Data.(*schemas.Requested)
	return b.decide(&Input{Event: &e, Request: q, Facts: facts})
}

func (b *Bundle) decide(in *Input) Verdict {
	if reason := b.senseless(in); reason != "" {
		return Verdict{Reason: reason}
	}
	var s voices
	for _, r := range b.concerning(in.Request) {
		m, err := r.match(in)
		s.add(r, m, err)
	}
	return b.conclude(in, s)
}

// senseless says why no rule is asked about a request; "" if they are.
func (b *Bundle) senseless(in *Input) string {
	q, facts := in.Request, in.Facts
	switch {
	case q == nil:
		return "not a request"
	case !slices.Contains(protocols, q.Protocol):
		return "unknown protocol"
	case q.Server == "":
		return "no server is named"
	case !b.servers[q.Server]:
		return "unknown server"
	case q.Method == "":
		return "no method is named"
	case q.Name == "" && misnamed(q.Method, in.Event.Body):
		return "what it names is not named as it should be"
	case facts.Refused != "":
		return facts.Refused
	case facts.Arguments != "":
		return "the arguments do not fit the tool's input schema: " + facts.Arguments
	}
	return ""
}

// voices is what rules have said of a request.
type voices struct {
	forbids, permits, approves, obliges []*Rule // that apply

	tools   []string // of a list, see Match
	each    bool
	matches []string // the rules that apply
	faults  []Fault
}

// add takes what a rule says. One that fails is taken at its worst.
func (s *voices) add(r *Rule, m Match, err error) {
	if err != nil {
		s.faults = append(s.faults, Fault{r.ID, err})
		m = Match{Applies: r.Effect != Permit, Each: m.Each}
	}
	s.tools = append(s.tools, m.Tools...)
	s.each = s.each || m.Each
	if !m.Applies {
		return
	}
	if s.matches == nil {
		s.matches = make([]string, 0, 16)
	}
	s.matches = append(s.matches, r.ID)
	switch r.Effect {
	case Permit:
		s.permits = append(s.permits, r)
	case Forbid:
		s.forbids = append(s.forbids, r)
	case Approve:
		s.approves = append(s.approves, r)
	case Oblige:
		if s.obliges == nil {
			s.obliges = make([]*Rule, 0, 16)
		}
		s.obliges = append(s.obliges, r)
	}
}

// conclude says what follows of what the rules say.
func (b *Bundle) conclude(in *Input, s voices) Verdict {
	q, facts := in.Request, in.Facts
	forbids, permits, approves, obliges := s.forbids, s.permits, s.approves, s.obliges
	v := Verdict{Each: s.each, Matches: s.matches, Faults: s.faults}
	slices.Sort(v.Matches)
	failed := func(r *Rule) (error, bool) {
		i := slices.IndexFunc(v.Faults, func(f Fault) bool { return f.Rule == r.ID })
		if i < 0 {
			return nil, false
		}
		return v.Faults[i].Err, true
	}
	deny := func(r *Rule, reason string) Verdict {
		v.Rule, v.Reason = r.ID, reason
		if err, ok := failed(r); ok {
			v.Reason += ", since it failed: " + brief(err)
		}
		v.Only, v.Each, v.Obligations = nil, false, Obligations{}
		return v
	}
	if len(forbids) > 0 {
		r := forbids[0]
		return deny(r, cmp.Or(r.Reason, "a rule forbids this call"))
	}
	if len(permits) == 0 {
		v.Reason, v.Each = "no rule permits this call", false
		for _, f := range v.Faults {
			if r := b.rule(f.Rule); r != nil && r.Effect == Permit {
				v.Reason += "; rule " + f.Rule + " failed: " + brief(f.Err)
				break
			}
		}
		return v
	}
	v.Rule = permits[0].ID
	let := slices.Concat(permits, approves, obliges)
	for _, r := range let {
		v.Obligations.add(&r.Obligations)
		l, ok := r.limit(in)
		if !ok {
			continue
		}
		v.Limits = append(v.Limits, l)
		count, known := facts.Counts[l.key()]
		if !known && in.open.passes(l) {
			continue
		}
		if !known {
			return deny(r, "a rate limit cannot be held, since the calls are not counted")
		}
		if count >= l.Calls {
			return deny(r, cmp.Or(r.Reason, "the rate limit is reached")+": "+l.String())
		}
	}
	v.Obligations.order()
	ask, by, reason := v.guarded(let, facts)
	switch {
	case by != nil:
		return deny(by, reason)
	case len(ask) > 0:
		v.Ask, v.Reason = ask, "it depends on guards, which were not asked: "+strings.Join(ask, ", ")
		return v
	}
	said, _, _ := strings.Cut(facts.Approval, " ")
	said = strings.TrimSuffix(said, ":")
	switch {
	case said == "" && len(approves) > 0:
		r := approves[0]
		v.Hold = true
		v.Rule, v.Reason = r.ID, cmp.Or(r.Reason, "a person has to approve this call")
		if err, ok := failed(r); ok {
			v.Reason += "; the rule failed: " + brief(err)
		}
		return v
	case said == "" || said == ApprovalGranted:
	default:
		// Whatever the rules say by now: who was refused, or has left, is not let on.
		r := permits[0]
		if len(approves) > 0 {
			r = approves[0]
		}
		switch said {
		case ApprovalSilence:
			return deny(r, "nobody has approved the call in time")
		case ApprovalGone:
			return deny(r, "the caller did not wait for the approval")
		}
		return deny(r, facts.Approval)
	}
	v.Permit = true
	if q.Method == toolsList {
		if !slices.Contains(s.tools, "*") {
			v.Only = append([]string{}, s.tools...) // not nil: a permit of the list alone shows nothing
			slices.Sort(v.Only)
			v.Only = slices.Compact(v.Only)
		}
	} else {
		v.Each = false
	}
	return v
}

// Shows tells whether a list may show a tool: whether the caller of the
// tools/list e, which was permitted, could call it with some arguments, as far as
// the facts of that decision go. It is pure.
//
// With the arguments open, a condition may be open too. An open permit counts, as
// some arguments may meet it; an open forbid does not, as some may not. A limit
// that is reached for now and an approval to be asked for hide nothing.
func (b *Bundle) Shows(e schemas.Event, facts Facts, tool string) bool {
	var q schemas.Requested
	switch d := e.Data.(type) {
	case *schemas.Requested:
		q = *d
	case *schemas.Authorized:
		q = d.Requested
	default:
		return false
	}
	if !b.servers[q.Server] || tool == "" {
		return false
	}
	q.Method, q.Name, q.Alias = toolsCall, tool, ""
	e.Data, e.Body = &q, nil
	in := &Input{Event: &e, Request: &q, Facts: facts, anyArgs: true}
	permitted := false
	for _, r := range b.concerning(&q) {
		if r.Effect != Permit && r.Effect != Forbid {
			continue
		}
		m, err := r.match(in)
		switch {
		case r.Effect == Forbid && (err != nil || m.Applies):
			return false
		case r.Effect == Permit && err == nil && (m.Applies || m.Maybe):
			permitted = true
		}
	}
	return permitted
}

// errPanicked stands for whatever a rule panicked with, which may hold an
// address and so differ from run to run.
var errPanicked = errors.New("the rule panicked")

// match evaluates the rule and turns a panic into an error: one broken rule
// must not take the worker down with it, again and again at each redelivery.
func (r *Rule) match(in *Input) (m Match, err error) {
	defer func() {
		if v := recover(); v != nil {
			m, err = Match{}, panicked{fmt.Sprint(v)}
		}
	}()
	return r.Match(in)
}

// panicked keeps the value for the operator's log and out of the decision.
type panicked struct{ value string }

func (p panicked) Error() string { return errPanicked.Error() + ": " + p.value }
func (p panicked) Unwrap() error { return errPanicked }

// brief is an error as a decision may hold it.
func brief(err error) string {
	if errors.Is(err, errPanicked) {
		return errPanicked.Error()
	}
	s := err.Error()
	if len(s) > 200 {
		s = s[:200] + "…"
	}
	return strings.ToValidUTF8(s, "�")
}
