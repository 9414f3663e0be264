package cli

import (
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"strings"
	"time"

	"waybill.dev/schemas"
	"waybill.dev/workers/registry"
)

// tools writes what is known of the servers' definitions, one registry.Entry per
// line; with the definitions themselves if ?definitions= says so.
func (a *approvals) tools(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("Content-Type", "application/x-ndjson")
	out := json.NewEncoder(w)
	out.SetEscapeHTML(false)
	for _, e := range a.g.pins.Entries(r.URL.Query().Get("definitions") != "") {
		if out.Encode(e) != nil {
			return
		}
	}
}

// pin stores what an operator says of a definition: the body is a registry.Word, of
// which the time is the gateway's. It answers with what has become of it, or 409 if
// the definition is another by now than the one that is meant.
func (a *approvals) pin(w http.ResponseWriter, r *http.Request) {
	var word registry.Word
	body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, 64<<10))
	d := json.NewDecoder(strings.NewReader(string(body)))
	d.DisallowUnknownFields()
	if err == nil {
		err = d.Decode(&word)
	}
	if err != nil {
		http.Error(w, "not what is said of a definition: "+err.Error(), http.StatusBadRequest)
		return
	}
	word.At = time.Now().UTC()
	record, err := registry.EncodeWord(word)
	if errors.Is(err, schemas.ErrInvalid) {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	if err != nil {
		a.fail(w, err)
		return
	}
	now, ok := a.entry(word.Ref)
	switch {
	case !ok:
		http.Error(w, "nothing of this name is known; `waybill tools` lists what is", http.StatusBadRequest)
		return
	case now.SHA256 != word.SHA256:
		http.Error(w, anotherByNow(now), http.StatusConflict)
		return
	case word.Said == registry.Approved && len(now.Now) == 0:
		http.Error(w, "its server has changed it so often that the text was not kept; quarantine any of the server's tools, have it listed again, and look at it then", http.StatusBadRequest)
		return
	}
	seq, err := a.sys.Append(r.Context(), registry.WordKind, registry.RecordName(word.Server), record)
	if err == nil {
		err = a.g.pins.Await(r.Context(), seq)
	}
	if err != nil {
		a.fail(w, err)
		return
	}
	if now, _ = a.entry(word.Ref); word.Said == registry.Approved && now.State != registry.Approved {
		http.Error(w, anotherByNow(now), http.StatusConflict)
		return
	}
	now.Now = nil
	w.Header().Set("Content-Type", "application/x-ndjson")
	_ = json.NewEncoder(w).Encode(now)
}

// anotherByNow is said to who has looked at what a definition was.
func anotherByNow(now registry.Entry) string {
	return "it has changed: what its server shows by now is " + now.SHA256 + "; look at it again"
}

func (a *approvals) entry(ref registry.Ref) (registry.Entry, bool) {
	for _, e := range a.g.pins.Entries(true) {
		if e.Ref == ref {
			return e, true
		}
	}
	return registry.Entry{}, false
}
