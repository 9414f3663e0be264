package dispatch

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"

	"waybill.dev/schemas"
	"waybill.dev/schemas/jsonrpc"
)

// Rules for answers. Whatever a server says is looked through before it is
// stored, and so before anybody can be told: answers, the messages before them,
// how a task stands, what the server asks and tells outside of calls, how it
// introduces itself, and what comes late. What a rule takes out is nowhere in the
// log; the event says which rule it was, how often and where ([schemas.Screened]).
// A message in which no rule finds anything keeps its bytes.
//
// The rules, in their order: characters that people do not see or that act on
// terminals (answers_text.go), what the decision on the call orders to be taken
// out of its result, secrets (answers_secrets.go), the size, and what guards say
// ([Options.Guard]), who see what is left. A front has but the orders: what it
// answers comes of answers that were looked through.
//
// What cannot be looked through is kept back, and the call ends as withheld.

// Action is what becomes of what a rule finds.
type Action string

// Actions. Strip is for characters, Redact for secrets; the others for both.
const (
	Strip  Action = "strip"  // it is taken out
	Redact Action = "redact" // a word stands in its place
	Reject Action = "reject" // the message is kept back as a whole
	Report Action = "report" // it stays, and the event says so
	Allow  Action = "allow"  // nobody looks for it
)

// Answers are the rules for what servers say. What is "" is as in [DefaultAnswers],
// or, of a server, as for all.
type Answers struct {
	ANSI      Action // terminal escapes, in 7 and in 8 bits
	Control   Action // other control characters, but for tab, line feed and carriage return
	Bidi      Action // what turns the direction of text: embeddings, overrides, isolates
	Tags      Action // text that nobody sees: tag characters, variation selectors in a row
	Invisible Action // zero-width and other characters without an image
	Secrets   Action

	Depth int // how deep a message may be nested; 0: as for all, or 512
}

// DefaultAnswers changes nothing that is meant for reading.
func DefaultAnswers() Answers {
	return Answers{ANSI: Strip, Control: Allow, Bidi: Strip, Tags: Strip, Invisible: Allow, Secrets: Redact, Depth: answerDepth}
}

// over is a with what b says of its own.
func (a Answers) over(b Answers) Answers {
	for _, p := range []struct{ to, from *Action }{
		{&a.ANSI, &b.ANSI}, {&a.Control, &b.Control}, {&a.Bidi, &b.Bidi}, {&a.Tags, &b.Tags},
		{&a.Invisible, &b.Invisible}, {&a.Secrets, &b.Secrets},
	} {
		if *p.from != "" {
			*p.to = *p.from
		}
	}
	if b.Depth != 0 {
		a.Depth = b.Depth
	}
	return a
}

// Check tells what is wrong with the rules.
func (a Answers) Check() error {
	var errs []error
	for _, p := range []struct {
		key string
		is  Action
		own Action
	}{
		{"ansi", a.ANSI, Strip}, {"control", a.Control, Strip}, {"bidi", a.Bidi, Strip}, {"tags", a.Tags, Strip},
		{"invisible", a.Invisible, Strip}, {"secrets", a.Secrets, Redact},
	} {
		if p.is != "" && !slices.Contains([]Action{p.own, Reject, Report, Allow}, p.is) {
			errs = append(errs, fmt.Errorf("%s: %q is none of %s, reject, report and allow", p.key, p.is, p.own))
		}
	}
	if a.Depth < 0 || a.Depth > answerDepth {
		errs = append(errs, fmt.Errorf("depth: %d is not between 1 and %d", a.Depth, answerDepth))
	}
	return errors.Join(errs...)
}

// What an event says of findings is bounded, since an envelope has little room.
const (
	maxFindings = 16
	maxWhere    = 4
	maxPointer  = 96 // bytes
)

// answers looks through what servers say.
type answers struct {
	all     Answers
	of      map[string]Answers // of servers
	fronts  map[string]bool
	secrets *secrets
	rooms   sync.Pool // of *reading
}

func newAnswers(opt Options) (*answers, error) {
	a := &answers{all: DefaultAnswers().over(opt.Answers), of: map[string]Answers{}, fronts: map[string]bool{}}
	a.rooms.New = func() any { return new(reading) }
	if err := opt.Answers.Check(); err != nil {
		return nil, fmt.Errorf("answers: %w", err)
	}
	needed := a.all.Secrets != Allow
	for _, s := range opt.Servers {
		if err := s.Answers.Check(); err != nil {
			return nil, fmt.Errorf("server %q: answers: %w", s.Name, err)
		}
		rules := a.all.over(s.Answers)
		a.of[s.Name] = rules
		needed = needed || rules.Secrets != Allow
	}
	for _, f := range opt.Fronts {
		a.fronts[f.Name] = true
	}
	if !needed {
		return a, nil
	}
	var err error
	if opt.SecretRules == nil {
		a.secrets, err = builtIn()
	} else {
		a.secrets, err = newSecrets(opt.SecretRules)
	}
	return a, err
}

// withheld is why a message is kept back, and what was found until then.
type withheld struct {
	code     schemas.Failure
	why      string
	screened schemas.Screened
}

func (w *withheld) Error() string { return w.why }

// Unwrap makes it an error with which the log could refuse an event: who stores
// what a server has said knows what to do then.
func (w *withheld) Unwrap() error { return schemas.ErrInvalid }

// fault is what it comes to for a call.
func (w *withheld) fault() *Fault {
	kind := Withheld
	if w.code == schemas.FailTooLarge {
		kind = TooLarge
	}
	return &Fault{Kind: kind, Err: w}
}

// screen looks through a message of a server. The error is a [*withheld].
func (a *answers) screen(server string, orders *schemas.Orders, body []byte) (_ []byte, s schemas.Screened, _ error) {
	if len(body) == 0 {
		return body, s, nil
	}
	var found findings
	keep := func(code schemas.Failure, format string, args ...any) error {
		return &withheld{code, fmt.Sprintf(format, args...), found.screened()}
	}
	rules, ok := a.of[server]
	if !ok {
		rules = a.all
	}
	looks := !a.fronts[server]
	room := a.rooms.Get().(*reading)
	defer a.rooms.Put(room)
	if looks {
		if err := room.read(body, rules.Depth); err != nil {
			return nil, s, keep(schemas.FailWithheld, "the message cannot be looked through: %v", err)
		}
		if room.classes()&rules.classes() != 0 {
			var err error
			if body, err = rewrite(body, &found, rules.finder); err != nil {
				return nil, s, keep(schemas.FailWithheld, "%v", err)
			}
			if err := room.read(body, rules.Depth); err != nil {
				return nil, s, keep(schemas.FailWithheld, "the message cannot be looked through: %v", err)
			}
		}
	}
	if orders != nil && len(orders.RedactResult) > 0 {
		out, err := redactResult(body, orders.RedactResult, &found)
		if err != nil {
			return nil, s, keep(schemas.FailWithheld, "what is to be taken out of the result cannot be: %v", err)
		}
		if looks && len(found.all) > 0 {
			if err := room.read(out, rules.Depth); err != nil {
				return nil, s, keep(schemas.FailWithheld, "the message cannot be looked through: %v", err)
			}
		}
		body = out
	}
	if looks && rules.Secrets != Allow && a.secrets.mayHold(room.text) {
		var err error
		if body, err = rewrite(body, &found, func(member string, text []byte, cuts []cut) ([]cut, error) {
			return a.secrets.find(member, text, rules.Secrets, cuts)
		}); err != nil {
			return nil, s, keep(schemas.FailWithheld, "%v", err)
		}
	}
	return body, found.screened(), nil
}

// words is a text for operators, such as the detail of a failure, in which a
// server's words may be.
func (a *answers) words(server, text string) string {
	rules, ok := a.of[server]
	if !ok {
		rules = a.all
	}
	quoted := jsonrpc.Quote(text)
	rules = Answers{ANSI: Strip, Control: Strip, Bidi: Strip, Tags: Strip, Invisible: Strip, Secrets: rules.Secrets, Depth: answerDepth}
	if rules.Secrets != Allow {
		rules.Secrets = Redact
	}
	var found findings
	room := a.rooms.Get().(*reading)
	defer a.rooms.Put(room)
	out := quoted
	err := room.read(out, answerDepth)
	if err == nil && room.classes()&rules.classes() != 0 {
		if out, err = rewrite(out, &found, rules.finder); err == nil {
			err = room.read(out, answerDepth)
		}
	}
	if err == nil && rules.Secrets != Allow && a.secrets.mayHold(room.text) {
		out, err = rewrite(out, &found, func(m string, t []byte, cuts []cut) ([]cut, error) { return a.secrets.find(m, t, Redact, cuts) })
	}
	if err != nil {
		return "what was said cannot be looked through"
	}
	if len(found.all) == 0 {
		return text
	}
	v, err := jsonrpc.Parse(out, jsonrpc.Limits{})
	clean, ok := v.Text()
	if err != nil || !ok {
		return "what was said cannot be looked through"
	}
	return clean
}

// findings collects what was found in a message.
type findings struct {
	all  []schemas.Finding
	more int // rules beyond the first
}

// add counts a finding.
func (f *findings) add(rule string, did Action, where string) {
	word := map[Action]string{Strip: "stripped", Redact: "redacted", Report: "reported", Reject: "rejected"}[did]
	i := slices.IndexFunc(f.all, func(have schemas.Finding) bool { return have.Rule == rule && have.Did == word })
	if i < 0 {
		if len(f.all) == maxFindings {
			f.more++
			return
		}
		i = len(f.all)
		f.all = append(f.all, schemas.Finding{Rule: rule, Did: word})
	}
	it := &f.all[i]
	if it.Count++; len(it.Where) < maxWhere && !slices.Contains(it.Where, where) {
		it.Where = append(it.Where, where)
	}
}

func (f *findings) screened() schemas.Screened {
	return schemas.Screened{Found: f.all, FoundMore: f.more}
}

// rejected names the first rule that keeps the message back.
func (f *findings) rejected() error {
	for _, it := range f.all {
		if it.Did == "rejected" {
			return fmt.Errorf("rule %s rejects it, at %s", it.Rule, strings.Join(it.Where, ", "))
		}
	}
	return nil
}

// redacted stands in the place of what was taken out.
const redacted = `"[redacted]"`

// redactResult takes out of a result what stands at some paths. What is not there
// needs no redacting. A tool that gives an object often gives it as a text too: what
// stands at a path of structuredContent is taken out of such texts as well.
func redactResult(body []byte, paths []string, found *findings) ([]byte, error) {
	lim := jsonrpc.Limits{Bytes: max(len(body), 1), Depth: answerDepth, AllowCaseVariants: true}
	m, err := jsonrpc.Decode(body, lim)
	if err != nil {
		return nil, err
	}
	if !m.Result().Exists() {
		return body, nil
	}
	patch, gone := m.Patch(), map[int]bool{} // by where they stood
	changed := false
	for _, p := range paths {
		for _, at := range along(m.Result(), "/result", strings.Split(p, ".")) {
			patch, changed, gone[at.Offset()] = patch.Replace(at.Value, []byte(redacted)), true, true
			found.add("redact "+clip(p, maxPointer), Redact, at.pointer)
		}
	}
	i := -1
	for block := range m.Result().Get("content").Elements() {
		i++
		text, ok := block.Get("text").Text()
		if !ok || gone[block.Get("text").Offset()] {
			continue
		}
		inner, err := jsonrpc.Parse([]byte(text), lim)
		if err != nil || inner.Kind() != jsonrpc.Object && inner.Kind() != jsonrpc.Array {
			continue
		}
		within, hit := inner.Patch(), false
		for _, p := range paths {
			rest, ok := strings.CutPrefix(p, "structuredContent.")
			if !ok {
				continue
			}
			for _, at := range along(inner, "", strings.Split(rest, ".")) {
				within, hit = within.Replace(at.Value, []byte(redacted)), true
				found.add("redact "+clip(p, maxPointer), Redact, fmt.Sprintf("/result/content/%d/text", i))
			}
		}
		if hit {
			if err := within.Err(); err != nil {
				return nil, err
			}
			patch, changed = patch.Replace(block.Get("text"), jsonrpc.Quote(string(within.Bytes()))), true
		}
	}
	if !changed {
		return body, nil
	}
	if err := patch.Err(); err != nil {
		return nil, err
	}
	return patch.Bytes(), nil
}

// place is a value, and where it stands.
type place struct {
	jsonrpc.Value
	pointer string
}

// along finds the values at a path; * stands for every member or element.
func along(v jsonrpc.Value, pointer string, path []string) []place {
	if len(path) == 0 {
		if v.Exists() {
			return []place{{v, brief(pointer)}}
		}
		return nil
	}
	if path[0] != "*" {
		return along(v.Get(path[0]), pointer+"/"+token(path[0]), path[1:])
	}
	var all []place
	for _, m := range v.Members() {
		all = append(all, along(m, pointer+"/*", path[1:])...) // a name may be a secret
	}
	i := 0
	for e := range v.Elements() {
		all = append(all, along(e, fmt.Sprintf("%s/%d", pointer, i), path[1:])...)
		i++
	}
	return all
}

// clean looks through what the server says within the call, and has the guards
// asked whom the decision orders. The error is a [*Fault].
func (r *run) clean(ctx context.Context, body []byte) ([]byte, schemas.Screened, error) {
	if most := r.a.MaxResult; most > 0 && !r.a.Stream && r.said > most {
		w := &withheld{code: schemas.FailTooLarge, why: fmt.Sprintf("the server has said %d bytes, and a rule lets %d pass", r.said, most)}
		return nil, schemas.Screened{}, w.fault()
	}
	body, s, err := r.d.answers.screen(r.a.Server, &r.a.Orders, body)
	if w := new(withheld); errors.As(err, &w) {
		return nil, w.screened, w.fault()
	}
	if len(body) == 0 {
		return body, s, nil
	}
	for _, o := range r.a.Guards {
		check := schemas.Check{Guard: o.Guard, Said: schemas.CheckFailed, Reason: "nobody can ask it"}
		if r.d.opt.Guard != nil {
			// What the server has said has to be told, or kept back, whatever becomes of
			// the call's time. The guard has one of its own.
			check = r.d.opt.Guard(context.WithoutCancel(ctx), o.Guard, r.e, body)
		}
		s.Checks = append(s.Checks, check)
		if check.Said == schemas.CheckAllow || check.Said == schemas.CheckFailed && o.Open {
			continue
		}
		why := fmt.Sprintf("guard %s says no: %s", o.Guard, check.Reason)
		if check.Said != schemas.CheckDeny {
			why = fmt.Sprintf("guard %s has failed: %s", o.Guard, check.Reason)
		}
		return nil, s, (&withheld{schemas.FailWithheld, why, s}).fault()
	}
	return body, s, nil
}

// screened is the ending of a call with what may be told of its answer.
func (r *run) screened(ctx context.Context, end ending) ending {
	p, ok := end.data.(*schemas.Completed)
	if !ok {
		return end
	}
	r.said += len(end.body)
	body, s, err := r.clean(ctx, end.body)
	if f := new(Fault); errors.As(err, &f) {
		kept := failed(verdicts[f.Kind].code, f.Error())
		kept.data.(*schemas.Failed).Screened, kept.release = s, end.release
		return kept
	}
	p.Screened, p.Labels, end.body = s, r.a.Labels, body
	return end
}

// ordered tells whether rules order what can only be done by who sees the result.
func ordered(o *schemas.Orders) bool {
	return len(o.RedactResult) > 0 || o.MaxResult > 0 || len(o.Guards) > 0
}

// screenedEvent is an event that a server has said something in outside of a call's
// own run, looked through. The error wraps [schemas.ErrInvalid].
func (a *answers) screenedEvent(server string, e schemas.Event) (schemas.Event, error) {
	var at *schemas.Screened
	switch p := e.Data.(type) {
	case *schemas.Asked:
		at = &p.Screened
	case *schemas.Notified:
		at = &p.Screened
	case *schemas.Connected:
		at = &p.Screened
	default:
		return e, nil
	}
	body, s, err := a.screen(server, nil, e.Body)
	if err != nil {
		return e, err
	}
	*at, e.Body = s, body
	return e, nil
}
