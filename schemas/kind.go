package schemas

import (
	"iter"
	"maps"
)

// Kind names what happened. A call is a short history:
//
//	requested → authorized → (started) → (progressed)* → completed | failed | cancelled
//	          ↘ denied
//	          ↘ held → authorized | denied
//	          ↘ failed                       (expired before it was decided)
//
// A call that goes on after its request was answered has (tasked)+ among these.
// Every accepted call ends in exactly one of completed, failed, denied,
// cancelled. Beside the calls stand the events of a session, what an upstream
// asks of the agent, and what comes after an ending.
type Kind string

const (
	KindRequested  Kind = "requested"
	KindAuthorized Kind = "authorized"
	KindDenied     Kind = "denied"
	KindHeld       Kind = "held"
	KindStarted    Kind = "started"
	KindProgressed Kind = "progressed"
	KindTasked     Kind = "tasked" // how a task stands, as which the call goes on
	KindCompleted  Kind = "completed"
	KindFailed     Kind = "failed"
	KindCancelled  Kind = "cancelled"
	KindCancel     Kind = "cancel"    // a wish; the call's owner ends it
	KindLate       Kind = "late"      // an answer that came after the ending
	KindCaused     Kind = "caused"    // the server that carries the call out has made another, in another session
	KindRouted     Kind = "routed"    // a call is handed to the process that alone can carry it out, or back to the one that waits
	KindOpened     Kind = "opened"    // session
	KindClosed     Kind = "closed"    // session
	KindAttached   Kind = "attached"  // the session's client listens at a replica, or does no more
	KindConnected  Kind = "connected" // the gateway has a session of its own at an upstream, for this one
	KindAsked      Kind = "asked"     // the upstream asks the agent
	KindAnswered   Kind = "answered"  // the agent's answer to that
	KindNotified   Kind = "notified"  // outside any call, either way
	KindErased     Kind = "erased"    // what was said in the session until then is destroyed
)

// kinds is the closed set, with the empty payload of each for decoding.
var kinds = map[Kind]func() Payload{
	KindRequested:  func() Payload { return &Requested{} },
	KindAuthorized: func() Payload { return &Authorized{} },
	KindDenied:     func() Payload { return &Denied{} },
	KindHeld:       func() Payload { return &Held{} },
	KindStarted:    func() Payload { return &Started{} },
	KindProgressed: func() Payload { return &Progressed{} },
	KindTasked:     func() Payload { return &Tasked{} },
	KindCompleted:  func() Payload { return &Completed{} },
	KindFailed:     func() Payload { return &Failed{} },
	KindCancelled:  func() Payload { return &Cancelled{} },
	KindCancel:     func() Payload { return &Cancel{} },
	KindLate:       func() Payload { return &Late{} },
	KindCaused:     func() Payload { return &Caused{} },
	KindRouted:     func() Payload { return &Routed{} },
	KindOpened:     func() Payload { return &Opened{} },
	KindClosed:     func() Payload { return &Closed{} },
	KindAttached:   func() Payload { return &Attached{} },
	KindConnected:  func() Payload { return &Connected{} },
	KindAsked:      func() Payload { return &Asked{} },
	KindAnswered:   func() Payload { return &Answered{} },
	KindNotified:   func() Payload { return &Notified{} },
	KindErased:     func() Payload { return &Erased{} },
}

// Kinds lists the closed set, in no order.
func Kinds() iter.Seq[Kind] { return maps.Keys(kinds) }

// Known tells whether k is one of the closed set.
func (k Kind) Known() bool { _, ok := kinds[k]; return ok }

// Ends tells whether an event of this kind ends its call.
func (k Kind) Ends() bool {
	return k == KindCompleted || k == KindFailed || k == KindDenied || k == KindCancelled
}

// OfCall tells whether an event of this kind always belongs to a call; the
// others belong to their session, or may (asked, answered, notified).
func (k Kind) OfCall() bool {
	switch k {
	case KindOpened, KindClosed, KindAttached, KindConnected, KindAsked, KindAnswered, KindNotified, KindErased:
		return false
	}
	return true
}

// ToEdge tells whether the edge that waits for the call wants to see it.
func (k Kind) ToEdge() bool {
	switch k {
	case KindDenied, KindHeld, KindProgressed, KindTasked, KindCompleted, KindFailed, KindCancelled, KindAsked, KindNotified, KindClosed:
		return true
	}
	return false
}
