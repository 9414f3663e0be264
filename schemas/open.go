package schemas

// Open is the event as it may be known to those who may not know what was said:
// its envelope without the body, and without what of the envelope repeats words
// of a message: headers that mirror arguments, an upstream's text in a failure,
// a client's reason. It is what the audit keeps when a session is erased.
func (e Event) Open() Event {
	e.Body = nil
	switch d := e.Data.(type) {
	case *Requested:
		if d.Headers != nil {
			c := *d
			c.Headers = nil
			e.Data = &c
		}
	case *Authorized:
		if d.Headers != nil {
			c := *d
			c.Headers = nil
			e.Data = &c
		}
	case *Failed:
		if d.Detail != "" {
			c := *d
			c.Detail = ""
			e.Data = &c
		}
	case *Cancelled:
		if d.Reason != "" {
			c := *d
			c.Reason = ""
			e.Data = &c
		}
	case *Cancel:
		if d.Reason != "" {
			c := *d
			c.Reason = ""
			e.Data = &c
		}
	}
	return e
}
