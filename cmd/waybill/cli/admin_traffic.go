package cli

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"iter"
	"net/http"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/go-json-experiment/json/jsontext"

	"waybill.dev/bus"
	"waybill.dev/projections"
	"waybill.dev/schemas"
)

// trafficKinds are what is asked for and decided, and what tells when neither comes
// any more, or is gone.
func trafficKinds() []schemas.Kind {
	return []schemas.Kind{schemas.KindOpened, schemas.KindRequested, schemas.KindAuthorized, schemas.KindDenied, schemas.KindHeld, schemas.KindFailed, schemas.KindErased}
}

// trafficHead is the first line of the traffic.
type trafficHead struct {
	Now   time.Time `json:"now"`
	Since time.Time `json:"since"`          // as it was asked for
	Whole time.Time `json:"whole,omitzero"` // all of it is there from then on; absent: from the log's beginning
	First uint64    `json:"first"`          // sequences between which it lies, to tell how far it is read
	Last  uint64    `json:"last"`
}

// traffic writes what was asked for and decided since a time, and, before, from when
// on it is whole. See appendTraffic for the lines of events.
func (a *admin) traffic(w http.ResponseWriter, r *http.Request) {
	q := r.URL.Query()
	span := func(key string) (time.Duration, bool) {
		d, err := time.ParseDuration(q.Get(key))
		if err != nil || d < 0 {
			http.Error(w, key+": not a time such as 24h", http.StatusBadRequest)
			return 0, false
		}
		return d, true
	}
	since, ok := span("since")
	if !ok {
		return
	}
	before, ok := span("before")
	if !ok {
		return
	}
	f := bus.Filter{Tenant: schemas.Tenant(q.Get("tenant")), Kinds: trafficKinds()}
	if f.Tenant != "" && schemas.CheckToken(string(f.Tenant)) != nil {
		http.Error(w, "tenant: not a tenant's id", http.StatusBadRequest)
		return
	}
	head := trafficHead{Now: time.Now().UTC()}
	head.Since = head.Now.Add(-since)
	from := head.Since.Add(-before)
	st, err := a.l.Status(r.Context())
	if err != nil {
		a.fail(w, err)
		return
	}
	var events iter.Seq2[schemas.Event, error]
	switch q.Get("from") {
	case "", fromStream:
		head.Last, head.Whole = st.LastSeq, from
		if st.FirstSeq <= 1 {
			head.Whole = time.Time{}
		} else if oldest, err := a.l.Load(r.Context(), st.FirstSeq); err == nil && oldest.Stored.After(from) {
			head.Whole = oldest.Stored
		}
		events = a.l.ReadSince(r.Context(), f, from)
	case fromRecord:
		if a.g.server == nil {
			http.Error(w, noRecord, http.StatusNotFound)
			return
		}
		head.Last = st.LastSeq
		if head.Whole, events, err = projections.Traffic(r.Context(), a.g.server, f.Tenant, f.Kinds, from); err != nil {
			a.fail(w, err)
			return
		}
	default:
		http.Error(w, "from: neither stream nor clickhouse", http.StatusBadRequest)
		return
	}
	begun, unread := false, 0
	var line []byte
	for e, err := range events {
		gone := new(projections.BodyGone)
		odd := errors.Is(err, bus.ErrUndecodable) || errors.Is(err, projections.ErrUnreadable)
		if err != nil && !odd && !errors.As(err, &gone) {
			if !begun {
				a.fail(w, err)
				return
			}
			panic(http.ErrAbortHandler) // what is cut short must not look whole
		}
		if !begun {
			begun, head.First = true, e.Seq
			w.Header().Set("Content-Type", "application/x-ndjson")
			if json.NewEncoder(w).Encode(head) != nil {
				return
			}
		}
		if odd {
			unread++ // a newer program may have decided on it
			continue
		}
		if line, err = appendTraffic(line[:0], e, gone.Size); err != nil {
			panic(http.ErrAbortHandler)
		}
		if _, err := w.Write(line); err != nil {
			return
		}
	}
	if !begun {
		w.Header().Set("Content-Type", "application/x-ndjson")
		_ = json.NewEncoder(w).Encode(head)
	}
	_, _ = fmt.Fprintf(w, "{\"end\":true,\"unread\":%d}\n", unread) // without it the traffic is not whole
}

// A line of the traffic is an event in its written form, behind its body, where
// that is of any use: of requests.
//
//	{"body":"…","event":{…}}  {"body_base64":"…","event":{…}}  {"body_gone":N,"event":{…}}  {"event":{…}}
const (
	trafficBody   = `{"body":`
	trafficBase64 = `{"body_base64":`
	trafficEvent  = `{"event":`
	trafficThen   = `,"event":`
)

// appendTraffic appends a line.
func appendTraffic(b []byte, e schemas.Event, gone int) ([]byte, error) {
	body := e.Body
	e.Body = nil
	envelope, err := e.MarshalJSON()
	if err != nil {
		return b, err
	}
	request := e.Kind() == schemas.KindRequested
	switch {
	case request && gone > 0:
		b = fmt.Appendf(b, `{"body_gone":%d%s`, gone, trafficThen)
	case request && len(body) > 0:
		text, key := any(body), trafficBase64
		if utf8.Valid(body) {
			text, key = string(body), trafficBody
		}
		quoted, err := json.Marshal(text)
		if err != nil {
			return b, err
		}
		b = append(append(append(b, key...), quoted...), trafficThen...)
	default:
		b = append(b, trafficEvent...)
	}
	return append(append(b, envelope...), "}\n"...), nil
}

// errTraffic: a line that is none of the traffic.
var errTraffic = errors.New("not a line of traffic")

// readTraffic reads a line. The event keeps parts of it.
func readTraffic(line []byte) (r record, err error) {
	line = bytes.TrimSuffix(bytes.TrimSpace(line), []byte("}"))
	event, quoted := "", []byte(nil)
	switch {
	case bytes.HasPrefix(line, []byte(trafficBody)):
		quoted = line[len(trafficBody):]
		end := endOfString(quoted)
		quoted, event = quoted[:end], string(quoted[end:])
	case bytes.HasPrefix(line, []byte(trafficEvent)):
		event = trafficThen + string(line[len(trafficEvent):])
	default:
		var odd struct {
			Body  []byte          `json:"body_base64"`
			Gone  int             `json:"body_gone"`
			Event json.RawMessage `json:"event"`
		}
		if err := json.Unmarshal(append(bytes.Clone(line), '}'), &odd); err != nil || odd.Event == nil {
			return r, fmt.Errorf("%w: %.80q", errTraffic, line)
		}
		r.Body, r.Gone, event = odd.Body, odd.Gone, trafficThen+string(odd.Event)
	}
	event, ok := strings.CutPrefix(event, trafficThen)
	if !ok {
		return r, fmt.Errorf("%w: %.80q", errTraffic, line)
	}
	body := r.Body
	if quoted != nil {
		if body, err = jsontext.AppendUnquote(make([]byte, 0, len(quoted)), quoted); err != nil {
			return r, fmt.Errorf("%w: %w", errTraffic, err)
		}
	}
	if err := r.Event.UnmarshalString(event); err != nil {
		return r, err
	}
	r.Body = body
	return r, nil
}

// endOfString is where a JSON string ends with which b begins; 0 if it does not.
func endOfString(b []byte) int {
	if len(b) == 0 || b[0] != '"' {
		return 0
	}
	for i := 1; i < len(b); i++ {
		switch b[i] {
		case '\\':
			i++
		case '"':
			return i + 1
		}
	}
	return 0
}
