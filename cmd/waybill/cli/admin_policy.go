package cli

import (
	"context"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"strings"
	"time"

	"waybill.dev/bus"
	"waybill.dev/schemas"
	"waybill.dev/schemas/jsonrpc"
	"waybill.dev/workers/policy"
)

// approvals are the part of the admin API by which people say what becomes of
// calls that are held.
type approvals struct {
	*admin
	sys *bus.System // as operator
}

// approvalLine is an approval that was asked for, as a line of the list.
type approvalLine struct {
	ID      string             `json:"id"`
	State   string             `json:"state"` // waiting, granted, refused or over
	Tenant  schemas.Tenant     `json:"tenant"`
	Agent   schemas.Agent      `json:"agent"`
	Session schemas.SessionKey `json:"session"`
	Call    schemas.CallID     `json:"call"`  // the first that waits
	Calls   int                `json:"calls"` // that wait
	Server  string             `json:"server"`
	Method  string             `json:"method"`
	Name    string             `json:"name,omitempty"`
	Rule    string             `json:"rule"`
	Reason  string             `json:"reason"`
	Asked   time.Time          `json:"asked"`
	Expires time.Time          `json:"expires"`
	Args    json.RawMessage    `json:"args,omitempty"` // as the request has them
	Word    *policy.Word       `json:"word,omitempty"` // what was said last

	word uint64     // the sequence of its record; 0: there is none
	use  policy.Use // the last that was made of what was granted
}

// stands says why a grant that names no number of uses is not taken: somebody has said
// something already that is still good, and no call waits for more. Of two people who
// look at the same call, the second would else let another of its kind go on, or what
// the first has refused. "": it is taken.
func (l *approvalLine) stands(now time.Time) string {
	waits := l.Calls
	if waits > 0 && l.use.Call == l.Call {
		waits-- // it is about to go on
	}
	switch {
	case l.Word == nil, !now.Before(l.Word.Expires):
		return ""
	case l.Word.Said == policy.ApprovalGranted && l.use.Grant == l.word && waits > 0:
		return "" // which it was for others
	}
	return fmt.Sprintf("%s has %s it already, which is good until %s; who grants more says how many calls (--uses)",
		l.Word.By, l.Word.Said, l.Word.Expires.Local().Format(time.DateTime))
}

func (a *approvals) list(w http.ResponseWriter, r *http.Request) {
	lines, err := a.asked(r.Context(), "")
	if err != nil {
		a.fail(w, err)
		return
	}
	w.Header().Set("Content-Type", "application/x-ndjson")
	out := json.NewEncoder(w)
	for _, line := range lines {
		if r.URL.Query().Get("all") == "" && line.State != "waiting" {
			continue
		}
		if out.Encode(line) != nil {
			return
		}
	}
}

// mostArgs is how much of a request's arguments a list shows.
const mostArgs = 64 << 10

// asked are the approvals that the log knows of, or the one of an id.
func (a *approvals) asked(ctx context.Context, id string) ([]*approvalLine, error) {
	var lines []*approvalLine
	byID := map[string]*approvalLine{}
	seen := map[schemas.CallID]bool{}
	for e, err := range a.l.Read(ctx, bus.Filter{Kinds: []schemas.Kind{schemas.KindHeld}}, 0) {
		if errors.Is(err, bus.ErrUndecodable) {
			continue
		}
		if err != nil {
			return nil, err
		}
		h, ok := e.Data.(*schemas.Held)
		if !ok || seen[e.Call] || id != "" && h.Approval != id {
			continue
		}
		seen[e.Call] = true
		line := byID[h.Approval]
		if line == nil {
			line = &approvalLine{ID: h.Approval, State: "over"}
			byID[h.Approval] = line
			lines = append(lines, line)
		}
		if line.Calls == 0 {
			line.Tenant, line.Agent, line.Session, line.Call = e.Tenant, e.Agent, e.Session, e.Call
			line.Server, line.Method, line.Name = h.Server, h.Method, h.Name
			line.Rule, line.Reason, line.Asked, line.Expires = h.Rule, h.Reason, h.RequestedAt, h.Expires
			line.Args = a.args(ctx, h)
		}
		of := e
		of.Seq = h.RequestedSeq
		past, err := a.l.Past(ctx, of)
		if err != nil {
			return nil, err
		}
		waits := true
		for _, p := range past {
			waits = waits && (p.Data == nil || p.Kind() != schemas.KindAuthorized && !p.Kind().Ends())
		}
		if waits {
			line.Calls++
			line.State, line.Expires = "waiting", h.Expires
		}
	}
	for _, line := range lines {
		rec, err := a.sys.Latest(ctx, policy.WordKind, line.ID)
		if errors.Is(err, schemas.ErrNotFound) {
			continue
		}
		if err != nil {
			return nil, err
		}
		line.word = rec.Seq
		var word policy.Word
		if json.Unmarshal(rec.Body, &word) == nil {
			line.Word = &word
			if line.State == "over" {
				line.State = word.Said
			}
		}
		rec, err = a.sys.Latest(ctx, policy.UseKind, line.ID)
		if err == nil {
			_ = json.Unmarshal(rec.Body, &line.use) // of what cannot be read nothing is known
		} else if !errors.Is(err, schemas.ErrNotFound) {
			return nil, err
		}
	}
	return lines, nil
}

// args are the arguments that a person is to look at.
func (a *approvals) args(ctx context.Context, h *schemas.Held) json.RawMessage {
	e, err := a.l.Load(ctx, h.RequestedSeq)
	if err != nil {
		return nil
	}
	return shownArgs(h.Method, e.Body)
}

// shownArgs are the arguments of a tool or a prompt, and the whole params of anything
// else, and of a call that asks with more than arguments: in these, a member called
// arguments is one of many, and to show it alone would hide the rest from who approves.
func shownArgs(method string, body []byte) json.RawMessage {
	m, err := jsonrpc.Decode(body, jsonrpc.Limits{})
	if err != nil {
		return nil
	}
	args := m.Params()
	if method == "tools/call" || method == "prompts/get" {
		more := false
		for name := range args.Members() {
			more = more || policy.Beside(name)
		}
		if v := args.Get("arguments"); v.Exists() && !more {
			args = v
		}
	}
	if raw := args.Raw(); len(raw) > 0 && len(raw) <= mostArgs {
		return json.RawMessage(raw)
	}
	return json.RawMessage(strconv.Quote(fmt.Sprintf("%d bytes; see the request of the call", len(args.Raw()))))
}

// say stores what somebody says of an approval: the body is a policy.Word, with
// `for` seconds in place of its expiry.
func (a *approvals) say(w http.ResponseWriter, r *http.Request) {
	var said struct {
		policy.Word
		For float64 `json:"for"`
	}
	body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, 16<<10))
	d := json.NewDecoder(strings.NewReader(string(body)))
	d.DisallowUnknownFields()
	if err == nil {
		err = d.Decode(&said)
	}
	if err != nil {
		http.Error(w, "not what an approval is answered with: "+err.Error(), http.StatusBadRequest)
		return
	}
	if said.For < 1 || said.For > 7*24*3600 {
		http.Error(w, "for: must be 1s to 168h", http.StatusBadRequest)
		return
	}
	id := r.PathValue("id")
	lines, err := a.asked(r.Context(), id)
	if err != nil {
		a.fail(w, err)
		return
	}
	if len(lines) == 0 {
		http.Error(w, "no call that the log knows of asks for the approval "+strconv.Quote(id)+"; `waybill approvals` lists those that do", http.StatusNotFound)
		return
	}
	word := said.Word
	if why := lines[0].stands(time.Now()); why != "" && word.Said == policy.ApprovalGranted && word.Uses == 0 {
		http.Error(w, why, http.StatusConflict)
		return
	}
	word.Expires = time.Now().UTC().Add(time.Duration(said.For * float64(time.Second)))
	if word.Said == policy.ApprovalGranted && word.Uses == 0 {
		word.Uses = max(1, lines[0].Calls)
	}
	if err := policy.CheckWord(word, lines[0].Agent); err != nil {
		http.Error(w, err.Error(), http.StatusForbidden)
		return
	}
	record, err := json.Marshal(word)
	if err == nil {
		_, err = a.sys.AppendAfter(r.Context(), policy.WordKind, id, record, lines[0].word)
	}
	if errors.Is(err, bus.ErrOvertaken) {
		http.Error(w, "somebody else has said something of it meanwhile; `waybill approvals --all` lists what", http.StatusConflict)
		return
	}
	if err != nil {
		a.fail(w, err)
		return
	}
	lines[0].Word = &word
	w.Header().Set("Content-Type", "application/x-ndjson")
	_ = json.NewEncoder(w).Encode(lines[0])
}

// bundle is the encoded policy of a digest, which decisions name, or the one in force.
func (a *approvals) bundle(w http.ResponseWriter, r *http.Request) {
	digest := r.PathValue("digest")
	if digest == activePolicy {
		var now activation
		rec, err := a.sys.Latest(r.Context(), policyKind, activePolicy)
		if err == nil {
			err = json.Unmarshal(rec.Body, &now)
		}
		switch {
		case errors.Is(err, schemas.ErrNotFound):
			http.Error(w, "no policy is in force yet", http.StatusNotFound)
			return
		case err != nil:
			a.fail(w, err)
			return
		}
		digest = now.SHA256
	}
	if b, err := hex.DecodeString(digest); err != nil || len(b) != 32 {
		http.Error(w, "not a SHA-256 in hex", http.StatusBadRequest)
		return
	}
	encoded, err := a.sys.Get(r.Context(), digest)
	switch {
	case errors.Is(err, schemas.ErrNotFound):
		http.Error(w, "no policy of this digest is known", http.StatusNotFound)
		return
	case err != nil:
		a.fail(w, err)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	_, _ = w.Write(append(encoded, '\n')) // one line
}

// call writes the events of one call.
func (a *approvals) call(w http.ResponseWriter, r *http.Request) {
	id := schemas.CallID(r.PathValue("call"))
	at := id.Minted()
	if at.IsZero() {
		http.Error(w, "not a call's id", http.StatusBadRequest)
		return
	}
	// Its first event was stored about when its id was made, by another clock perhaps.
	const apart = time.Minute
	var first schemas.Event
	for e, err := range a.l.ReadSince(r.Context(), bus.Filter{Kinds: []schemas.Kind{schemas.KindRequested}}, at.Add(-apart)) {
		if err != nil && !errors.Is(err, bus.ErrUndecodable) {
			a.fail(w, err)
			return
		}
		if err == nil && e.Call == id {
			first = e
			break
		}
		if e.Stored.After(at.Add(apart)) {
			break
		}
	}
	if first.Seq == 0 {
		http.Error(w, "no call "+strconv.Quote(string(id))+" in the log", http.StatusNotFound)
		return
	}
	past, err := a.l.Past(r.Context(), first)
	if err != nil {
		a.fail(w, err)
		return
	}
	w.Header().Set("Content-Type", "application/x-ndjson")
	out := json.NewEncoder(w)
	for _, e := range past {
		if out.Encode(e) != nil {
			return
		}
	}
}
