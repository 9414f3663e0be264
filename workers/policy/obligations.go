package policy

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"

	"waybill.dev/schemas"
	"waybill.dev/schemas/jsonrpc"
)

// Obligations are what a rule orders for the calls that it lets go on. Those of
// all rules that apply come together.
type Obligations struct {
	Redact   []string      // arguments, by path: to.iban, items.*.note
	Tags     []string      // for the record
	Deadline time.Duration // of the call, after its request; 0: its own
	Wait     time.Duration // how long an approval is waited for; 0: to the call's deadline

	RedactResult []string // of the result, by path: structuredContent.iban, content.*.text
	MaxResult    int      // bytes of the answer; 0: as many as any
	Labels       []string // that the session carries from now on
	Guards       []Guard  // who is asked

	limit *limitRule // of one rule; see Rule.limit
}

// limitRule is a rate limit as a rule has it.
type limitRule struct {
	Calls int
	Per   time.Duration
	By    []string // agent, tenant, server, tool, session
}

// add puts those of another rule to these; order sorts them when all are there.
func (o *Obligations) add(more *Obligations) {
	least := func(a, b time.Duration) time.Duration {
		if a == 0 || b != 0 && b < a {
			return b
		}
		return a
	}
	o.Redact, o.Tags = append(o.Redact, more.Redact...), append(o.Tags, more.Tags...)
	o.RedactResult, o.Labels = append(o.RedactResult, more.RedactResult...), append(o.Labels, more.Labels...)
	o.Guards = append(o.Guards, more.Guards...)
	if o.MaxResult == 0 || more.MaxResult != 0 && more.MaxResult < o.MaxResult {
		o.MaxResult = more.MaxResult
	}
	o.Deadline, o.Wait = least(o.Deadline, more.Deadline), least(o.Wait, more.Wait)
}

func (o *Obligations) order() {
	for _, l := range []*[]string{&o.Redact, &o.Tags, &o.RedactResult, &o.Labels} {
		slices.Sort(*l)
		*l = slices.Compact(*l)
	}
	o.Guards = together(o.Guards)
}

// Orders are those for the answer, as dispatch takes them.
func (o Obligations) Orders() schemas.Orders {
	orders := schemas.Orders{RedactResult: o.RedactResult, MaxResult: o.MaxResult, Labels: o.Labels}
	for _, g := range o.Guards {
		if g.Answer {
			orders.Guards = append(orders.Guards, schemas.GuardOrder{Guard: g.Name, Open: g.Open})
		}
	}
	return orders
}

// Record writes them as a decision holds them.
func (o *Obligations) Record() (all []string) {
	o.each(func(what, of string) bool {
		all = append(all, what+of)
		return true
	})
	return all
}

// Recorded tells whether this is what Record writes.
func (o *Obligations) Recorded(all []string) bool {
	n := 0
	same := o.each(func(what, of string) bool {
		if n == len(all) {
			return false
		}
		rest, ok := strings.CutPrefix(all[n], what)
		n++
		return ok && rest == of
	})
	return same && n == len(all)
}

// each yields them one after the other, and tells whether that was to the end.
func (o *Obligations) each(yield func(what, of string) bool) bool {
	texts := func(what string, all []string) bool {
		for _, of := range all {
			if !yield(what, of) {
				return false
			}
		}
		return true
	}
	if !texts("tag ", o.Tags) || !texts("redact ", o.Redact) ||
		o.Deadline > 0 && !yield("deadline ", o.Deadline.String()) ||
		!texts("redact_result ", o.RedactResult) ||
		o.MaxResult > 0 && !yield("max_result ", strconv.Itoa(o.MaxResult)) ||
		!texts("label ", o.Labels) {
		return false
	}
	for _, g := range o.Guards {
		if !yield("", g.String()) {
			return false
		}
	}
	return true
}

// limit is the rule's rate limit for a request, if it has one.
func (r *Rule) limit(in *Input) (Limit, bool) {
	l := r.Obligations.limit
	if l == nil {
		return Limit{}, false
	}
	who := []string{"tenant=" + string(in.Event.Tenant)}
	for _, by := range l.By {
		switch by {
		case "agent":
			who = append(who, "agent="+string(in.Event.Agent))
		case "server":
			who = append(who, "server="+in.Request.Server)
		case "tool":
			who = append(who, fmt.Sprintf("tool=%s/%.200s", in.Request.Server, strings.ToValidUTF8(in.Request.Name, "�")))
		case "session":
			who = append(who, "session="+string(in.Event.Session))
		}
	}
	return Limit{Rule: r.ID, Who: strings.Join(who, " "), Calls: l.Calls, Per: l.Per, tenant: in.Event.Tenant}, true
}

// redacted is what stands in a place of what was redacted.
const redacted = `"[redacted]"`

// errRedact: what a rule orders to be redacted cannot be.
var errRedact = errors.New("the arguments cannot be redacted")

// redact takes the arguments at some paths out of a request. What is not there
// needs no redacting; what is there under a name that is another only by its case,
// or in arguments that are no object, cannot be redacted. It is pure, and so is the
// request that it makes.
func redact(q *schemas.Requested, body []byte, paths []string) ([]byte, error) {
	m, err := jsonrpc.Decode(body, jsonrpc.Limits{})
	if err != nil {
		return nil, fmt.Errorf("%w: %w", errRedact, err)
	}
	args, err := askedWith(q.Method, m.Params())
	if err != nil && args.Kind() != jsonrpc.Null {
		return nil, fmt.Errorf("%w: %w", errRedact, err)
	}
	var found []jsonrpc.Value
	for _, p := range paths {
		if found, err = at(found, args, strings.Split(p, ".")); err != nil {
			return nil, fmt.Errorf("%w: %s: %w", errRedact, p, err)
		}
	}
	if len(found) == 0 {
		return body, nil
	}
	for _, name := range slices.Sorted(maps.Keys(q.Headers)) { // the first that repeats one is named in the decision
		if strings.HasPrefix(name, "Mcp-Param-") {
			return nil, fmt.Errorf("%w: header %s repeats one of them", errRedact, name)
		}
	}
	// One may be within another: then the outer one is enough.
	slices.SortFunc(found, func(a, b jsonrpc.Value) int {
		if a.Offset() != b.Offset() {
			return a.Offset() - b.Offset()
		}
		return len(b.Raw()) - len(a.Raw())
	})
	patch, end := m.Patch(), -1
	for _, v := range found {
		if v.Offset() >= end {
			patch, end = patch.Replace(v, []byte(redacted)), v.Offset()+len(v.Raw())
		}
	}
	if err := patch.Err(); err != nil {
		return nil, fmt.Errorf("%w: %w", errRedact, err)
	}
	return patch.Bytes(), nil
}

// at adds the values at a path; * stands for every member or element.
func at(found []jsonrpc.Value, v jsonrpc.Value, path []string) ([]jsonrpc.Value, error) {
	if len(path) == 0 {
		if v.Exists() {
			found = append(found, v)
		}
		return found, nil
	}
	var err error
	if path[0] == "*" {
		for _, m := range v.Members() {
			if found, err = at(found, m, path[1:]); err != nil {
				return nil, err
			}
		}
		for e := range v.Elements() {
			if found, err = at(found, e, path[1:]); err != nil {
				return nil, err
			}
		}
		return found, nil
	}
	for name, m := range v.Members() {
		if name == path[0] {
			return at(found, m, path[1:])
		}
		if strings.EqualFold(name, path[0]) {
			return nil, errVariant(name, path[0])
		}
	}
	return found, nil
}
