package dispatch

import (
	"context"
	"sync"
	"time"
)

// What may wait in a mailbox: so many messages, and so many bytes, or one.
const (
	mailboxLetters = 1024
	mailboxBytes   = 1 << 20
)

// mailbox holds the messages of a process for who reads them. There is one who
// puts and one who takes.
type mailbox struct {
	more, room chan struct{} // one deep; something was put, or taken

	mu       sync.Mutex
	letters  []letter
	bytes    int
	numbered uint64
	err      error // what comes after them; nil: more may
}

type letter struct {
	raw    []byte
	number uint64 // given by put
	last   bool   // nothing comes after it
}

func (b *mailbox) init() {
	b.more, b.room = make(chan struct{}, 1), make(chan struct{}, 1)
}

func poke(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// put waits for room, but not longer than that, nor once others is closed, nor
// much longer once stop is. It is false if there is none. For what is the last
// there is always room, and where nobody reads any more. others may be nil.
func (b *mailbox) put(l letter, wait time.Duration, stop, others <-chan struct{}) bool {
	var late <-chan time.Time
	for {
		b.mu.Lock()
		full := !l.last && (len(b.letters) >= mailboxLetters || len(b.letters) > 0 && b.bytes+len(l.raw) > mailboxBytes)
		if !full || b.err != nil {
			if b.err == nil {
				b.numbered++
				l.number = b.numbered
				b.letters = append(b.letters, l)
				b.bytes += len(l.raw)
				poke(b.more)
			}
			b.mu.Unlock()
			return true
		}
		b.mu.Unlock()
		if wait <= 0 {
			return false
		}
		if late == nil {
			t := time.NewTimer(wait)
			defer t.Stop()
			late = t.C
		}
		select {
		case <-b.room:
		case <-late:
			return false
		case <-others:
			return false
		case <-stop:
			stop, late = nil, time.After(min(wait, time.Second))
		}
	}
}

// fail says that nothing comes any more after what is there.
func (b *mailbox) fail(err error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.err == nil {
		b.err = err
	}
	poke(b.more)
	poke(b.room)
}

// next is the first message. It stays there until pop.
func (b *mailbox) next(ctx context.Context) (letter, error) {
	for {
		b.mu.Lock()
		if len(b.letters) > 0 {
			defer b.mu.Unlock()
			return b.letters[0], nil
		}
		err := b.err
		b.mu.Unlock()
		if err != nil {
			return letter{}, err
		}
		select {
		case <-b.more:
		case <-ctx.Done():
			return letter{}, context.Cause(ctx)
		}
	}
}

// pop removes the first message.
func (b *mailbox) pop() {
	b.mu.Lock()
	defer b.mu.Unlock()
	if len(b.letters) > 0 {
		b.bytes -= len(b.letters[0].raw)
		b.letters[0] = letter{}
		b.letters = b.letters[1:]
		poke(b.room)
	}
}

// seen removes what has been read, up to a number.
func (b *mailbox) seen(number uint64) {
	b.mu.Lock()
	for len(b.letters) > 0 && b.letters[0].number <= number {
		b.bytes -= len(b.letters[0].raw)
		b.letters = b.letters[1:]
	}
	b.mu.Unlock()
	poke(b.room)
}
