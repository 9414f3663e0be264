package edge

import "sync/atomic"

// tenant is what one tenant has in flight.
type tenant struct {
	inFlight atomic.Int64
	streams  atomic.Int64
	bodies   budget
}

// budget is a number of bytes that calls share.
type budget struct {
	most int64 // immutable
	used atomic.Int64
}

// take takes n bytes if there are so many. A try that fails takes nothing, not
// even for a moment, in which others would be refused that have room.
func (b *budget) take(n int64) bool {
	for {
		used := b.used.Load()
		if n > b.most-used {
			return false
		}
		if b.used.CompareAndSwap(used, used+n) {
			return true
		}
	}
}

func (b *budget) give(n int64) { b.used.Add(-n) }

// share is what one call has taken for its body. It belongs to the call's
// goroutine; the zero share holds nothing.
type share struct {
	all, mine *budget
	n         int64
}

// take takes n bytes for a tenant's call; ok tells if it could, and else
// tenant whose budget it was that is exhausted. The tenant's comes first: one
// that is over its own must not even touch what others need.
func (s *Server) take(t *tenant, n int64) (sh share, ok, ofTenant bool) {
	if !t.bodies.take(n) {
		return share{}, false, true
	}
	if !s.bodies.take(n) {
		t.bodies.give(n)
		return share{}, false, false
	}
	return share{&s.bodies, &t.bodies, n}, true, false
}

// shrink gives back what is beyond n bytes.
func (sh *share) shrink(n int64) {
	if sh.all == nil {
		return
	}
	sh.all.give(sh.n - n)
	sh.mine.give(sh.n - n)
	sh.n = n
}
