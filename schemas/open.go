package schemas

// Open is the event as it may be known to those who may not know what was said:
// its envelope without the body, and without what of the envelope repeats words
// of a message: headers that mirror arguments, an upstream's text in a failure,
// a client's reason. Nor does it have digests of what was said, or what is made
// of such: they have no salt, and of few words one finds by trying which they
// are of. It is what the audit keeps when a session is erased.
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
		c := *d
		c.Headers, c.BodySHA256 = nil, ""
		c.Decision = c.open()
		e.Data = &c
	case *Denied:
		c := *d
		c.Summary, c.Decision = c.Summary.open(), c.Decision.open()
		e.Data = &c
	case *Held:
		c := *d
		c.Decision = c.open()
		e.Data = &c
	case *Completed:
		if d.ChunksSHA256 != "" {
			c := *d
			c.Summary = c.open()
			e.Data = &c
		}
	case *Failed:
		c := *d
		c.Summary, c.Detail = c.open(), ""
		e.Data = &c
	case *Cancelled:
		c := *d
		c.Summary, c.Reason = c.open(), ""
		e.Data = &c
	case *Cancel:
		if d.Reason != "" {
			c := *d
			c.Reason = ""
			e.Data = &c
		}
	}
	return e
}

func (d Decision) open() Decision {
	d.ArgsSHA256, d.Approval = "", ""
	return d
}

func (s Summary) open() Summary {
	s.ChunksSHA256 = ""
	return s
}
