package cli

import (
	"fmt"
	"iter"

	"waybill.dev/schemas"
)

// maxCaused is how many other sessions a replay reads for what was called for its
// calls.
const maxCaused = 100

// follow reads what servers have called for the story's calls, in sessions of
// their own ([schemas.Caused]), and for those calls in turn. Of these sessions
// nothing else is taken. What cannot be read is noted.
func (s *story) follow(read func(schemas.SessionKey) iter.Seq2[record, error]) {
	seen := map[schemas.SessionKey]bool{s.first.Session: true}
	for n := 0; ; n++ {
		var next schemas.SessionKey
		for _, c := range s.calls {
			for _, e := range c.events {
				if d, ok := e.Data.(*schemas.Caused); ok && !seen[d.Session] && (next == "" || d.Session < next) {
					next = d.Session
				}
			}
		}
		switch {
		case next == "":
			return
		case n == maxCaused:
			s.notes = append(s.notes, fmt.Sprintf("there are calls in more than %d other sessions", maxCaused))
			return
		}
		seen[next] = true
		for e, err := range read(next) {
			if err != nil {
				s.notes = append(s.notes, fmt.Sprintf("what was called in session %s is not shown: %v", next, err))
				break
			}
			if e.Undecodable != "" || e.Call == "" || s.calls[e.Call] == nil && s.calls[e.Parent] == nil {
				continue
			}
			s.addCall(s.entry(e)).elsewhere = next
		}
	}
}
