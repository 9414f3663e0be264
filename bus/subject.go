package bus

import (
	"fmt"
	"strings"

	"waybill.dev/schemas"
)

// subject is where an event is stored: ev.<tenant>.<session>.<kind>.<to>. The
// call's id is in the envelope and never a token: a subject for every call
// would cost 35 µs of CPU and 169 bytes of memory each. Only a task has some of
// its own (schemas.Event.Task), being asked about for as long as an hour.
func subject(e schemas.Event) string {
	t := tokens(e)
	return strings.Join(t[:], ".")
}

func tokens(e schemas.Event) [5]string {
	to := "_"
	if e.Edge != "" && (e.Kind().ToEdge() || e.ToTask()) {
		to = string(e.Edge)
	}
	return [5]string{"ev", string(e.Tenant), string(e.Session), string(e.Kind()), to}
}

// standsOn tells whether s is the event's subject.
func standsOn(e schemas.Event, s string) bool {
	t := tokens(e)
	for i := range t {
		var token string
		if token, s, _ = strings.Cut(s, "."); token != t[i] {
			return false
		}
	}
	return s == ""
}

// Filter selects events by their subject. The zero value selects all.
type Filter struct {
	Tenant  schemas.Tenant
	Session schemas.SessionKey
	Kinds   []schemas.Kind
	To      schemas.Replica

	// Beside adds, to what is addressed To a replica, events of these kinds that
	// are addressed to none.
	Beside []schemas.Kind
}

// subjects are the filter as the server wants it; the sets do not overlap.
func (f Filter) subjects() ([]string, error) {
	token := func(s string) (string, error) {
		if s == "" {
			return "*", nil
		}
		return s, schemas.CheckToken(s)
	}
	t, err := token(string(f.Tenant))
	if err != nil {
		return nil, fmt.Errorf("tenant: %w", err)
	}
	s, err := token(string(f.Session))
	if err != nil {
		return nil, fmt.Errorf("session: %w", err)
	}
	to, err := token(string(f.To))
	if err != nil {
		return nil, fmt.Errorf("edge: %w", err)
	}
	var subjects []string
	add := func(kinds []schemas.Kind, to string) error {
		for _, k := range kinds {
			if !k.Known() {
				return fmt.Errorf("unknown kind of event %q", k)
			}
			subjects = append(subjects, strings.Join([]string{"ev", t, s, string(k), to}, "."))
		}
		return nil
	}
	if len(f.Kinds) == 0 {
		subjects = append(subjects, strings.Join([]string{"ev", t, s, "*", to}, "."))
	} else if err := add(f.Kinds, to); err != nil {
		return nil, err
	}
	return subjects, add(f.Beside, "_")
}

// parts takes a subject of the log apart.
func parts(subject string) (schemas.Tenant, schemas.SessionKey, schemas.Kind, bool) {
	t := strings.Split(subject, ".")
	if len(t) != 5 || t[0] != "ev" {
		return "", "", "", false
	}
	return schemas.Tenant(t[1]), schemas.SessionKey(t[2]), schemas.Kind(t[3]), true
}
