// Package sse frames Server-Sent Events (WHATWG HTML §9.2, "Server-sent
// events"): [Read] takes a stream apart, [Append] writes an event.
//
// A browser keeps state between events (the last event id, the time to
// reconnect); a gateway wants to see what was sent. So an [Event] is what stood
// in the stream, and nothing is carried from one to the next.
package sse

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"iter"
	"math"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"
)

// Event is what stands between two blank lines, or one comment line.
//
// The zero Event is a bare comment, the shortest keepalive there is.
type Event struct {
	// ID is the id line's value. An empty one is not the same as none: it
	// tells a browser to forget the last event id. HasID tells them apart;
	// Append writes the line if HasID is set or ID is not empty.
	ID    string
	HasID bool

	// Name is the event line's value, "" if there is none, which means
	// "message".
	Name string

	// Data is the data lines' values, joined by newlines. It is nil if there
	// was no data line (a browser does not dispatch such an event, it only
	// notes id and retry), and empty but not nil for an empty one, as in the
	// priming event of MCP 2025-11-25.
	//
	// These are the bytes of the stream. The standard has a browser replace
	// what is not UTF-8; here it is kept, for whoever parses the data to
	// refuse.
	Data []byte

	// Retry is the time to wait before reconnecting, 0 if there is no retry
	// line, and RetryNow for the line "retry: 0". The stream counts
	// milliseconds; Append rounds up.
	Retry time.Duration

	// Comment is the text of a comment line. Read delivers each comment line
	// at once, as an Event of its own with nothing but this: a keepalive is
	// worth nothing when it waits for an event, and a server that sends many
	// of them must not fill the event's memory.
	Comment string
}

// RetryNow stands for a time to reconnect of zero.
const RetryNow time.Duration = -1

// maxRetry is the longest time that a Duration holds in whole milliseconds;
// Read cuts what is longer.
const maxRetry = math.MaxInt64 / time.Millisecond * time.Millisecond

// DefaultMaxEvent is the size of an event that Read accepts if it is not told
// another: 4 MiB of data, the limit of a body, and room for the field names.
const DefaultMaxEvent = 4<<20 + 64<<10

// ErrTooLarge is what [Read] ends with when an event is larger than it may be.
var ErrTooLarge = errors.New("event too large")

// chunk is how much is read at once, and so how far a search for the end of a
// line can go in vain.
const chunk = 8 << 10

// chunks are reused: many streams carry one event of a kilobyte.
var chunks = sync.Pool{New: func() any { return new([chunk]byte) }}

// Read returns the events of a stream as they arrive.
//
// An event is delivered as soon as the byte that ends its blank line has been
// read; if that is a CR, nothing waits for the LF that may follow. Lines end
// with LF, CR LF or CR, a byte order mark in front of the stream is dropped, as
// are fields that the standard does not know and ids with a NUL, all as the
// standard says.
//
// The iteration ends silently when the stream ends between events. It ends with
// an error, which comes with the zero Event and is always the last, when
//
//   - the stream ends within an event (io.ErrUnexpectedEOF). The standard
//     discards such an event silently, and so is it not delivered here either,
//     since its data may be cut anywhere; but the reader is told. Within an
//     event means after any line but a comment or a blank one, or within any
//     line;
//   - the lines of an event are longer than maxEvent bytes, line ends not
//     counted (ErrTooLarge); of comments, only the one being read counts. Zero
//     or less means DefaultMaxEvent;
//   - r fails (the error of r, wrapped).
//
// Each Event has memory of its own. Read does not close r, and stops reading it
// when the loop is left.
func Read(r io.Reader, maxEvent int) iter.Seq2[Event, error] {
	if maxEvent <= 0 {
		maxEvent = DefaultMaxEvent
	}
	return func(yield func(Event, error) bool) {
		p := parser{max: maxEvent}
		pooled := chunks.Get().(*[chunk]byte)
		defer chunks.Put(pooled)
		buf := pooled[:]
		for idle := 0; ; {
			n, err := r.Read(buf)
			if !p.feed(buf[:n], yield) {
				return
			}
			switch {
			case err == io.EOF:
				if p.open || len(p.line) > 0 {
					yield(Event{}, fmt.Errorf("event stream cut within an event, after %d bytes of it: %w", p.size+len(p.line), io.ErrUnexpectedEOF))
				}
				return
			case err != nil:
				yield(Event{}, fmt.Errorf("reading event stream: %w", err))
				return
			case n > 0:
				idle = 0
			default:
				if idle++; idle == 100 {
					yield(Event{}, fmt.Errorf("reading event stream: %w", io.ErrNoProgress))
					return
				}
			}
		}
	}
}

// parser is the state between two chunks.
type parser struct {
	max  int
	line []byte // beginning of a line whose end has not come yet
	cr   bool   // the last byte was a CR that ended a line; a LF now belongs to it
	past bool   // the first line is past, and with it the place of a byte order mark

	open  bool   // a line of the next event has been seen
	size  int    // bytes of its lines
	event Event  // what they said, but for the data
	data  []byte // of the data lines, each followed by a newline
	named bool   // data has been seen
}

// feed reads on. It is false when the iteration is over.
func (p *parser) feed(b []byte, yield func(Event, error) bool) bool {
	for len(b) > 0 {
		if p.cr {
			p.cr = false
			if b[0] == '\n' {
				b = b[1:]
				continue
			}
		}
		// Looking for CR only in front of the next LF keeps this linear
		// when lines end with LF; if they end with CR, each line may cost
		// a search of one chunk.
		end := bytes.IndexByte(b, '\n')
		if end < 0 {
			end = len(b)
		}
		if i := bytes.IndexByte(b[:end], '\r'); i >= 0 {
			end = i
		}
		if p.size+len(p.line)+end > p.max {
			yield(Event{}, fmt.Errorf("%w: more than %d bytes", ErrTooLarge, p.max))
			return false
		}
		if end == len(b) {
			if cap(p.line)-len(p.line) < len(b) {
				p.line = slices.Grow(p.line, len(p.line)+len(b)) // append would grow long ones by a quarter
			}
			p.line = append(p.line, b...)
			return true
		}
		p.cr = b[end] == '\r'
		line := b[:end]
		b = b[end+1:]
		if len(p.line) > 0 {
			line = append(p.line, line...)
			p.line = line[:0]
		}
		if !p.past {
			p.past = true
			line = bytes.TrimPrefix(line, []byte("\xef\xbb\xbf"))
		}
		if !p.read(line, yield) {
			return false
		}
	}
	return true
}

// read reads one line. It is false when the iteration is over.
func (p *parser) read(line []byte, yield func(Event, error) bool) bool {
	if len(line) == 0 {
		return p.dispatch(yield)
	}
	name, value, _ := bytes.Cut(line, []byte(":"))
	value = bytes.TrimPrefix(value, []byte(" "))
	if len(name) == 0 && line[0] == ':' {
		return yield(Event{Comment: string(value)}, nil)
	}
	p.open = true
	p.size += len(line)
	switch string(name) {
	case "data":
		p.named = true
		p.data = append(append(p.data, value...), '\n')
	case "event":
		p.event.Name = string(value)
	case "id":
		if bytes.IndexByte(value, 0) < 0 {
			p.event.ID, p.event.HasID = string(value), true
		}
	case "retry":
		if d, ok := parseRetry(value); ok {
			p.event.Retry = d
		}
	}
	return true
}

// dispatch delivers the event that a blank line has ended, if its lines said
// anything.
func (p *parser) dispatch(yield func(Event, error) bool) bool {
	e := p.event
	// After a large event there may be an hour of small ones: it takes the
	// memory along.
	large := cap(p.data) > 64*chunk
	if p.named {
		e.Data = p.data[: len(p.data)-1 : len(p.data)-1]
		if !large {
			e.Data = bytes.Clone(e.Data)
		}
	}
	p.open, p.size, p.event, p.data, p.named = false, 0, Event{}, p.data[:0], false
	if large {
		p.data = nil
	}
	if cap(p.line) > 64*chunk {
		p.line = nil
	}
	if e.Data == nil && !e.HasID && e.Name == "" && e.Retry == 0 {
		return true
	}
	return yield(e, nil)
}

// parseRetry reads a retry line's value: ASCII digits and nothing else.
func parseRetry(value []byte) (time.Duration, bool) {
	if len(value) == 0 {
		return 0, false
	}
	var d time.Duration
	for _, c := range value {
		if c < '0' || c > '9' {
			return 0, false
		}
		if d > (maxRetry-9*time.Millisecond)/10 {
			d = maxRetry // and stays there
			continue
		}
		d = d*10 + time.Duration(c-'0')*time.Millisecond
	}
	if d == 0 {
		return RetryNow, true
	}
	return d, true
}

// Append appends an event to dst, with its blank line, and returns the extended
// slice.
//
// Data is split into data lines where a reader would see lines, at LF, CR LF
// and CR; what the reader gets is [Normalize] of it. A comment with several
// lines is several comments. CR, LF and NUL cannot be said in an id, nor CR and
// LF in a name; they are left out, so that no value can add a line of its own.
func Append(dst []byte, e Event) []byte {
	hasID := e.HasID || e.ID != ""
	rest := e.Data != nil || hasID || e.Name != "" || e.Retry != 0
	if e.Comment != "" || !rest {
		dst = appendLines(dst, ":", []byte(e.Comment))
	}
	if e.Name != "" {
		dst = append(dst, "event: "...)
		dst = appendWithout(dst, e.Name, "\r\n")
		dst = append(dst, '\n')
	}
	if hasID {
		dst = append(dst, "id: "...)
		dst = appendWithout(dst, e.ID, "\r\n\x00")
		dst = append(dst, '\n')
	}
	if e.Retry != 0 {
		ms := int64(0)
		if e.Retry > 0 {
			ms = int64((e.Retry-1)/time.Millisecond) + 1
		}
		dst = append(dst, "retry: "...)
		dst = strconv.AppendInt(dst, ms, 10)
		dst = append(dst, '\n')
	}
	if e.Data != nil {
		dst = appendLines(dst, "data:", e.Data)
	}
	return append(dst, '\n')
}

// appendLines writes each line of text behind the field. The space makes a value
// that begins with a space come out whole.
func appendLines(dst []byte, field string, text []byte) []byte {
	text = Normalize(text)
	dst = slices.Grow(dst, len(field)+len(text)+3)
	for more := true; more; {
		var line []byte
		line, text, more = bytes.Cut(text, []byte("\n"))
		dst = append(dst, field...)
		if len(line) > 0 {
			dst = append(dst, ' ')
		}
		dst = append(dst, line...)
		dst = append(dst, '\n')
	}
	return dst
}

func appendWithout(dst []byte, s, cut string) []byte {
	if !strings.ContainsAny(s, cut) {
		return append(dst, s...)
	}
	for i := range len(s) {
		if strings.IndexByte(cut, s[i]) < 0 {
			dst = append(dst, s[i])
		}
	}
	return dst
}

// Normalize returns data as it comes out of a stream: CR LF and CR are LF. It is
// data itself if it has no CR.
//
// An event stream cannot carry a CR. In JSON a CR may stand only between
// tokens, never in a string, so a normalized JSON text means the same; but it
// is another text with another digest. Normalize first what is stored or signed
// and then sent, and the record shows what the receiver got.
func Normalize(data []byte) []byte {
	if bytes.IndexByte(data, '\r') < 0 {
		return data
	}
	out := bytes.ReplaceAll(data, []byte("\r\n"), []byte("\n"))
	for i, c := range out {
		if c == '\r' {
			out[i] = '\n'
		}
	}
	return out
}
