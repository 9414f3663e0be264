package mcp

import (
	"context"
	"crypto/rand"
	"sync"
	"time"

	"waybill.dev/schemas"
)

// A session has one stream of its own, the newest (2025-11-25, transports,
// "Multiple Connections": a message goes to one of them). Where several replicas
// serve it, the log says which that is: who begins one stores attached, by which
// the others end theirs, and say how far they had got.

// attachment is a stream of a session's own that other replicas know of.
type attachment struct {
	by  string
	seq uint64 // of the event that began it

	mu   sync.Mutex // guards what follows
	n    int
	said time.Time
	over bool
}

// handOverIn is how long a new stream waits for an older one at another replica
// to say how far it had got. One that says nothing is at a replica that is gone.
const handOverIn = 2 * time.Second

// attach says that a stream of the session's own begins here, after an event.
// Unless its client has said where it goes on, after is where the one before it
// had got, if that is further.
func (a *Adapter) attach(ctx context.Context, s *lasting, back bool, from uint64) (at *attachment, after uint64, err error) {
	var before schemas.Event // the stream before this one
	var end *schemas.Attached
	if !back {
		opened, _ := s.from()
		for e, err := range a.o.Scan(ctx, s.tenant, s.key, schemas.KindAttached, opened) {
			if err != nil {
				return nil, 0, err
			}
			switch d, ok := e.Data.(*schemas.Attached); {
			case !ok:
			case d.N == 0:
				before, end = e, nil
			case d.Over && before.Data != nil && before.Data.(*schemas.Attached).By == d.By:
				end = d
			}
		}
	}
	switch {
	case end != nil:
		from = max(from, end.Sent)
	case before.Data != nil:
		from = max(from, before.Data.(*schemas.Attached).Sent)
	}
	now := a.o.Now()
	at = &attachment{by: rand.Text(), said: now}
	receipt, err := a.o.Store(ctx, s.event(&schemas.Attached{By: at.by, Sent: from}, nil, now.UTC()))
	if err != nil {
		return nil, 0, err
	}
	at.seq = receipt.Seq
	if end == nil && before.Data != nil {
		from = a.handedOver(ctx, s, before.Data.(*schemas.Attached).By, before.Seq, from)
	}
	return at, from, nil
}

// handedOver waits for the end of an older stream, which began in the log at a
// sequence and told what came after sent. Where its end does not come, all of
// that is told again, rather than lost.
func (a *Adapter) handedOver(ctx context.Context, s *lasting, by string, began, sent uint64) uint64 {
	ctx, cancel := context.WithTimeout(ctx, handOverIn)
	defer cancel()
	_ = a.o.Follow(ctx, s.event(nil, nil, time.Time{}), began, func(_ context.Context, e schemas.Event) (schemas.Receipt, error) {
		if d, ok := e.Data.(*schemas.Attached); ok && d.By == by && d.Over {
			sent = max(sent, d.Sent)
			cancel()
		}
		return schemas.Receipt{}, nil
	})
	return sent
}

// say stores that a stream goes on, or has ended.
func (a *Adapter) say(ctx context.Context, s *lasting, at *attachment, over bool) {
	at.mu.Lock()
	defer at.mu.Unlock()
	if at.over {
		return
	}
	now := a.o.Now()
	at.n++
	at.said, at.over = now, over
	d := &schemas.Attached{By: at.by, N: at.n, Over: over}
	if over {
		_, d.Sent = s.from()
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
	defer cancel()
	if _, err := a.o.Store(ctx, s.event(d, nil, now.UTC())); err != nil {
		a.o.Log.Warn("other replicas do not hear of a session's stream", "session", s.key, "over", over, "error", err)
	}
}

// stillAttached says of the streams that last that they do, now and then: what is
// open is a use, and no other replica sees it.
func (a *Adapter) stillAttached(ctx context.Context, now time.Time) {
	if !a.o.Shared {
		return
	}
	for _, s := range a.table.list() {
		var at *attachment
		s.mu.Lock()
		if o := s.streams[""]; o != nil {
			at = o.at
		}
		s.mu.Unlock()
		if at == nil {
			continue
		}
		at.mu.Lock()
		due := !at.over && now.Sub(at.said) > a.table.limits.Idle/3
		at.mu.Unlock()
		if due && ctx.Err() == nil {
			a.say(ctx, s, at, false)
		}
	}
}
