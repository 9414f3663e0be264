package registry

import (
	"cmp"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/gowebpki/jcs"

	"waybill.dev/schemas"
	"waybill.dev/schemas/jsonrpc"
)

// lists says where the definitions in an MCP list stand.
var lists = map[string]struct {
	kind        Kind
	array, name string
}{
	"tools/list":               {Tool, "tools", "name"},
	"prompts/list":             {Prompt, "prompts", "name"},
	"resources/list":           {Resource, "resources", "uri"},
	"resources/templates/list": {Template, "resourceTemplates", "uriTemplate"},
}

// ErrList is a list that another reader could read otherwise. It is
// [schemas.ErrInvalid].
var ErrList = fmt.Errorf("%w: a list that is not clear", schemas.ErrInvalid)

// storeTime is what it may take to store what was seen.
const storeTime = 20 * time.Second

// Listed tells of each element of a list, the result of a method, whether it may be
// shown. What was not known before is a record by then. nil: all of them may, as
// the server is none whose definitions are pinned or the method none that lists.
// An error is [ErrList], or of what could not be recorded: then nothing may be
// shown.
func (r *Registry) Listed(ctx context.Context, server, method string, result jsonrpc.Value) ([]bool, error) {
	at, ok := lists[method]
	if !ok || !r.Pins(server) {
		return nil, nil
	}
	var array jsonrpc.Value
	for name, v := range result.Members() {
		if name == at.array {
			array = v
		} else if strings.EqualFold(name, at.array) {
			return nil, fmt.Errorf("%w: it has %q", ErrList, clip(name, 100))
		}
	}
	if array.Kind() != jsonrpc.Array {
		return nil, nil
	}
	var found []element
	first := map[string]int{}
	again := map[int]bool{}
	for v := range array.Elements() {
		e := r.element(server, at.kind, at.name, v)
		if e.why == "" {
			if i, before := first[e.ref.Name]; !before {
				first[e.ref.Name] = len(found)
			} else if again[len(found)] = true; e.sha256 != found[i].sha256 {
				// Nobody could say which of them is called.
				const several = "there are several of this name in one list"
				found[i].flaws, e.flaws = []string{several}, []string{several}
			}
		}
		found = append(found, e)
	}
	if err := r.observe(ctx, server, found); err != nil {
		return nil, err
	}
	shown := make([]bool, len(found))
	for i, e := range found {
		shown[i] = e.why == "" && len(e.flaws) == 0 && !again[i] && r.shows(e)
		if e.why != "" {
			r.o.Log.Warn("an element of a server's list is left out", "server", server, "method", method, "name", clip(e.ref.Name, 100), "why", e.why)
		}
	}
	return shown, nil
}

// element is what was read of an element of a list.
type element struct {
	ref        Ref
	raw        [32]byte // SHA-256 of its bytes
	sha256     string   // hex; of the canonical form
	definition []byte   // canonical; nil if it is known already
	flaws      []string
	why        string // it cannot be pinned, and so not shown; "": it can
}

func (r *Registry) element(server string, kind Kind, member string, v jsonrpc.Value) element {
	e := element{ref: Ref{Server: server, Kind: kind}}
	named := jsonrpc.Value{}
	for name, v := range v.Members() {
		if name == member {
			named = v
		} else if strings.EqualFold(name, member) {
			e.why = fmt.Sprintf("it has a %q too", clip(name, 100))
			return e
		}
	}
	var ok bool
	if e.ref.Name, ok = named.Text(); !ok || e.ref.Name == "" {
		e.why = "it has no " + member
		return e
	}
	if len(e.ref.Name) > maxName {
		e.ref.Name, e.why = "", fmt.Sprintf("its %s has more than %d bytes", member, maxName)
		return e
	}
	e.raw = sha256.Sum256(v.Raw())
	r.mu.RLock()
	p := r.pin(e.ref)
	if p != nil && p.raw == e.raw {
		e.sha256 = p.seen.SHA256
	}
	r.mu.RUnlock()
	if e.sha256 != "" {
		return e
	}
	e.define(kind, v)
	return e
}

// define finds the canonical form.
func (e *element) define(kind Kind, v jsonrpc.Value) {
	raw := v.Raw()
	if len(raw) > 2*maxDefinition {
		e.why = fmt.Sprintf("its definition has %d bytes", len(raw))
		return
	}
	own, err := jsonrpc.Parse(raw, jsonrpc.Limits{Bytes: len(raw), Depth: 2 * maxSchemaDeep, AllowCaseVariants: true})
	if err != nil {
		e.why = clip(err.Error(), 200)
		return
	}
	if kind == Resource {
		// How a thing is now is not what it is.
		p := own.Patch()
		if own.Get("size").Kind() == jsonrpc.Number {
			p.Remove(own, "size")
		}
		annotations := own.Get("annotations")
		if at, ok := annotations.Get("lastModified").Text(); ok {
			if _, err := time.Parse(time.RFC3339, at); err == nil {
				p.Remove(annotations, "lastModified")
			}
		}
		if raw = p.Bytes(); raw == nil {
			e.why = clip(fmt.Sprint(p.Err()), 200)
			return
		}
	}
	if e.definition, err = jcs.Transform(raw); err != nil {
		e.why = "it has no canonical form: " + clip(err.Error(), 200)
		return
	}
	if len(e.definition) > maxDefinition {
		e.why = fmt.Sprintf("its definition has %d bytes", len(e.definition))
		return
	}
	e.sha256 = digest(e.definition)
}

// pin is what is known of a definition, or nil. Registry.mu is held.
func (r *Registry) pin(ref Ref) *pin {
	if s := r.servers[ref.Server]; s != nil {
		return s.pins[ref]
	}
	return nil
}

// shows tells whether an element is what was approved.
func (r *Registry) shows(e element) bool {
	r.mu.RLock()
	defer r.mu.RUnlock()
	p := r.pin(e.ref)
	return p != nil && p.open() && p.seen.SHA256 == e.sha256
}

// observe records what was not known of a server. What has changed counts here
// from now on, whether or not it can be recorded.
func (r *Registry) observe(ctx context.Context, server string, found []element) error {
	if !r.ahead(found) {
		return nil
	}
	if r.o.Store == nil {
		return errors.New("what a server shows cannot be recorded here")
	}
	ctx, cancel := context.WithTimeout(ctx, storeTime)
	defer cancel()
	turn := r.observing[server]
	select {
	case turn <- struct{}{}:
		defer func() { <-turn }()
	case <-ctx.Done():
		return fmt.Errorf("record what the server %s shows: %w", server, context.Cause(ctx))
	}
	for {
		seen, more := r.news(server, found)
		if len(seen) == 0 {
			return nil
		}
		body, err := encode(Observation{Server: server, Approve: r.o.Servers[server], By: r.o.By, At: r.o.Now().UTC(), Seen: seen})
		if err != nil {
			return err
		}
		seq, err := r.o.Store(ctx, RecordName(server), body)
		if err == nil {
			err = r.Await(ctx, seq)
		}
		if err != nil {
			return fmt.Errorf("record what the server %s shows: %w", server, err)
		}
		r.tell(server, seen)
		if !more {
			return nil
		}
	}
}

// tell logs what became of what was seen.
func (r *Registry) tell(server string, seen []Seen) {
	for _, s := range seen {
		r.mu.RLock()
		p := r.pin(Ref{server, s.Kind, s.Name})
		open, why := p != nil && p.open(), ""
		if p != nil {
			why = p.reason()
		}
		r.mu.RUnlock()
		if !open {
			r.o.Log.Warn("a definition waits for a person: waybill tools diff NAME", "server", server, "kind", s.Kind, "name", clip(s.Name, 100),
				"sha256", s.SHA256, "was", s.Was, "why", why, "changes", len(s.Diff))
		}
	}
}

// ahead marks what has changed, and remembers the bytes of what has not. It tells
// whether there is anything to record.
func (r *Registry) ahead(found []element) (news bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for i := range found {
		e := &found[i]
		if e.why != "" {
			continue
		}
		switch p := r.pin(e.ref); {
		case p == nil:
			news = true
		case p.seen.SHA256 != e.sha256:
			p.ahead, news = e.sha256, true
		case len(e.flaws) > 0:
			p.ahead = "several"
		case len(p.seen.Definition) == 0:
			p.ahead, news = "", true
		default:
			p.ahead, p.raw = "", e.raw
		}
	}
	return news
}

// news is what no record says yet, as much of it as one record holds, and whether
// there is more. Where a server has said more than is kept of it, a change is still
// recorded, without the text, and what is new is left out.
func (r *Registry) news(server string, found []element) (seen []Seen, more bool) {
	var from [][]byte // of each what was approved
	r.mu.RLock()
	names, said := 0, 0
	if s := r.servers[server]; s != nil {
		names, said = len(s.pins), s.said
	}
	size := 0
	already := map[Ref]bool{}
	beside := map[look]Ref{}
	for _, e := range found {
		if e.why != "" || e.definition == nil || already[e.ref] { // of several of a name the first says that they are
			continue
		}
		p := r.pin(e.ref)
		full := said+size+len(e.definition) > r.maxSaid
		switch {
		case p == nil:
			if full || names+len(seen) >= maxNames {
				continue
			}
		case p.seen.SHA256 == e.sha256:
			if full || len(p.seen.Definition) > 0 {
				continue
			}
		case full && p.withheld:
			continue
		}
		if size > 0 && size+len(e.definition) > maxRecord {
			more = true
			break
		}
		next := Seen{Kind: e.ref.Kind, Name: e.ref.Name, SHA256: e.sha256}
		var before []byte
		if p != nil {
			next.Was, before = p.seen.SHA256, p.before
		}
		if !full {
			next.Definition = e.definition
			next.Flaws = append(slices.Clone(e.flaws), r.naming(e.ref, beside)...)
			size += len(e.definition)
		}
		already[e.ref] = true
		seen, from = append(seen, next), append(from, before)
	}
	r.mu.RUnlock()
	for i := range seen {
		s := &seen[i]
		if s.Kind == Tool && len(s.Definition) > 0 {
			s.Flaws = append(s.Flaws, schemaFlaws(s.Definition)...)
		}
		if v, err := parse(s.Definition); err == nil {
			s.Notes = lint(v)
		}
		if len(from[i]) > 0 && len(s.Definition) > 0 {
			s.Diff = diff(from[i], s.Definition)
			s.Diff = s.Diff[:min(len(s.Diff), 10)]
		}
	}
	return seen, more
}

// Said tells whether the instructions may be passed on that the result of
// initialize or server/discover has. What was not known before is a record by then.
func (r *Registry) Said(ctx context.Context, server string, result jsonrpc.Value) (bool, error) {
	v := result.Get("instructions")
	if !r.Pins(server) || !v.Exists() {
		return true, nil
	}
	e := element{ref: Ref{Server: server, Kind: Instructions}, raw: sha256.Sum256(v.Raw())}
	e.define(Instructions, v)
	if e.why != "" {
		r.o.Log.Warn("a server's instructions are left out", "server", server, "why", e.why)
		return false, nil
	}
	if err := r.observe(ctx, server, []element{e}); err != nil {
		return false, err
	}
	return r.shows(e), nil
}

// Presents tells whether a server may say of itself what it is, by its serverInfo,
// which is no definition and is not pinned. Where everything is approved by hand it
// may as long as its instructions are approved.
func (r *Registry) Presents(server string) bool {
	if r.o.Servers[server] != Manual {
		return true
	}
	r.mu.RLock()
	defer r.mu.RUnlock()
	p := r.pin(Ref{Server: server, Kind: Instructions})
	return p != nil && p.open()
}

// Heard tells whether anything of a server is approved, or need not be for it to
// speak to agents by itself.
func (r *Registry) Heard(server string) bool {
	if r.o.Servers[server] != Manual {
		return true
	}
	r.mu.RLock()
	defer r.mu.RUnlock()
	if s := r.servers[server]; s != nil {
		for _, p := range s.pins {
			if p.open() {
				return true
			}
		}
	}
	return false
}

// Completes says why a server must not be asked which values there are for an
// argument of a prompt or a template: what it would say is its text as any other.
// "": it may. What is not known may be where definitions are approved on first use.
func (r *Registry) Completes(server string, kind Kind, name string) string {
	if !r.Pins(server) {
		return ""
	}
	r.mu.RLock()
	defer r.mu.RUnlock()
	p := r.pin(Ref{server, kind, name})
	if p == nil && kind == Template { // it may be a resource, which is its own template
		p = r.pin(Ref{server, Resource, name})
	}
	switch {
	case p != nil && p.open(), p == nil && r.o.Servers[server] == FirstUse:
		return ""
	case p == nil:
		return fmt.Sprintf("no %s of this name was approved", kind)
	}
	return fmt.Sprintf("the %s is quarantined: %s", kind, clip(p.reason(), 300))
}

// Admission is what is to be said of a call before it goes on.
type Admission struct {
	SHA256    string // of the definition, where it is known
	Hints     Hints  // likewise
	Refused   string // why it may not be called; "": it may
	Arguments string // what is wrong with its arguments; "": nothing
	Unlisted  bool   // nothing is known of it; it has to be listed first
}

// named says of what kind the thing is that a method names.
var named = map[string]Kind{
	"tools/call": Tool, "prompts/get": Prompt,
	"resources/read": Resource, "resources/subscribe": Resource,
}

// Admit says whether what a method names may be called with arguments (of a tool;
// nil: it has none). It never asks anybody.
//
// A tool or prompt that is not known has to be listed. A resource need not be: a
// server tells of many by other ways. At a server where everything is approved by
// hand it must at least fit a template that is.
func (r *Registry) Admit(server, method, name string, arguments []byte) Admission {
	kind, ok := named[method]
	if !ok || !r.Pins(server) {
		return Admission{}
	}
	r.mu.RLock()
	p := r.pin(Ref{server, kind, name})
	if p == nil {
		defer r.mu.RUnlock()
		mode := r.o.Servers[server]
		switch {
		case kind == Resource && (mode == FirstUse || r.templated(server, name)):
			return Admission{}
		case kind != Resource && mode == FirstUse:
			return Admission{Unlisted: true}
		}
		return Admission{Refused: fmt.Sprintf("no %s of this name was approved", kind), Unlisted: true}
	}
	a := Admission{SHA256: p.seen.SHA256, Hints: p.hints}
	if !p.open() {
		a.Refused = fmt.Sprintf("the %s is quarantined: %s", kind, clip(p.reason(), 300))
	}
	checkers := p.checkers
	r.mu.RUnlock()
	if a.Refused != "" || checkers == nil {
		return a
	}
	if input, _ := checkers(); input != nil {
		if arguments == nil {
			arguments = []byte("{}")
		}
		a.Arguments = input.check(arguments)
	}
	return a
}

// Known is what is to be said of a tool, whatever its arguments.
func (r *Registry) Known(server, tool string) Admission {
	r.mu.RLock()
	defer r.mu.RUnlock()
	p := r.pin(Ref{server, Tool, tool})
	switch {
	case p == nil:
		return Admission{Unlisted: true}
	case p.open():
		return Admission{SHA256: p.seen.SHA256, Hints: p.hints}
	}
	return Admission{SHA256: p.seen.SHA256, Hints: p.hints, Refused: "the tool is quarantined: " + clip(p.reason(), 300)}
}

// templated tells whether an approved template of the server may stand for a URI.
// Registry.mu is held.
func (r *Registry) templated(server, uri string) bool {
	s := r.servers[server]
	if s == nil {
		return false
	}
	for ref, p := range s.pins {
		if ref.Kind == Template && p.open() && fits(ref.Name, uri) {
			return true
		}
	}
	return false
}

// fits tells whether a URI may be one of a template: what stands outside of its
// expressions has to be there, in this order.
func fits(template, uri string) bool {
	first := true
	for template != "" {
		text, rest, open := strings.Cut(template, "{")
		switch {
		case first && !strings.HasPrefix(uri, text):
			return false
		case first && (text == "" || !strings.Contains(text, ":")):
			return false // it would stand for everything
		case first:
			uri = uri[len(text):]
		case !open:
			return strings.HasSuffix(uri, text)
		default:
			i := strings.Index(uri, text)
			if i < 0 {
				return false
			}
			uri = uri[i+len(text):]
		}
		if first = false; !open {
			return uri == ""
		}
		_, template, open = strings.Cut(rest, "}")
		if !open {
			return false
		}
	}
	return true
}

// Answered says what is wrong with what a tool has answered, the whole answer to
// tools/call; "": nothing. Only what is there is held against the output schema: a
// client of an older revision gets its text alone.
func (r *Registry) Answered(server, name string, answer []byte) string {
	r.mu.RLock()
	p := r.pin(Ref{server, Tool, name})
	var checkers func() (input, output *checker)
	if p != nil {
		checkers = p.checkers
	}
	r.mu.RUnlock()
	if checkers == nil {
		return ""
	}
	_, output := checkers()
	if output == nil {
		return ""
	}
	m, err := jsonrpc.Decode(answer, jsonrpc.Limits{Bytes: len(answer), Depth: answerDepth, AllowCaseVariants: true})
	if err != nil {
		return "it cannot be read"
	}
	content := m.Result().Get("structuredContent")
	if is, _ := m.Result().Get("isError").Bool(); is || content.Kind() <= jsonrpc.Null {
		return ""
	}
	return output.check(content.Raw())
}

// answerDepth is how deep an answer may be nested, as in dispatch.
const answerDepth = 512

// Find is an entry by what people write: SERVER/NAME, or SERVER__NAME, or the NAME
// alone where there is one; * stands for any run of characters.
func Find(all []Entry, kind Kind, match func(pattern, name string) bool, name string) (found []Entry) {
	for _, e := range all {
		if kind != "" && e.Kind != kind {
			continue
		}
		written := cmp.Or(e.Name, string(e.Kind))
		if match(name, e.Server+"/"+written) || match(name, e.Server+"__"+written) || match(name, written) {
			found = append(found, e)
		}
	}
	return found
}
