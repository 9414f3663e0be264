package edge

import (
	"net"
	"net/http"
	"sync"
	"sync/atomic"

	"waybill.dev/schemas"
)

// Cause is why the shell refused a request: a closed set, fit for a label of a
// metric.
type Cause int

const (
	CauseHost Cause = iota
	CauseOrigin
	CausePath
	CauseMethod
	CauseDraining
	CauseToken
	CauseContent
	CauseInFlight
	CauseInFlightTenant
	CauseStreams
	CauseStreamsTenant
	CauseBodyBudget
	CauseBodyBudgetTenant
	CauseBodySize
	CauseBodyTimeout
	CauseBody
	CauseConns
	causes
)

var causeNames = [causes]string{
	"host", "origin", "path", "method", "draining", "token", "content_type",
	"in_flight", "in_flight_tenant", "streams", "streams_tenant", "body_budget", "body_budget_tenant", "body_size", "body_timeout", "body", "connections",
}

func (c Cause) String() string { return causeNames[c] }

// Stats is what there is to measure, at one moment.
type Stats struct {
	Connections int64
	InFlight    int64                    // calls given to a route; those that are answered with a stream are among them
	Streams     int64                    // open on routes of streams
	Tenants     map[schemas.Tenant]int64 // in flight, of each
	Bodies      int64                    // bytes taken by the bodies of calls in flight
	Served      uint64                   // calls that a route has ended
	Panics      uint64
	Refused     map[Cause]uint64 // every cause is present
}

type counters struct {
	inFlight atomic.Int64
	streams  atomic.Int64
	served   atomic.Uint64
	panics   atomic.Uint64
	refused  [causes]atomic.Uint64
}

// Stats reads the counters. They are read one by one, so they need not agree.
func (s *Server) Stats() Stats {
	st := Stats{
		Connections: s.conns.open.Load(),
		InFlight:    s.stats.inFlight.Load(),
		Streams:     s.stats.streams.Load(),
		Tenants:     make(map[schemas.Tenant]int64, len(s.tenants)),
		Bodies:      s.bodies.used.Load(),
		Served:      s.stats.served.Load(),
		Panics:      s.stats.panics.Load(),
		Refused:     make(map[Cause]uint64, causes),
	}
	for t, n := range s.tenants {
		st.Tenants[t] = n.inFlight.Load()
	}
	for c := range s.stats.refused {
		st.Refused[Cause(c)] = s.stats.refused[c].Load()
	}
	return st
}

// conns follows the connections, to know when the last goroutine of the HTTP
// server is gone, and which of them have not asked for anything yet: these
// [http.Server.Shutdown] would wait five seconds for.
type conns struct {
	open atomic.Int64
	all  sync.WaitGroup

	mu    sync.Mutex
	fresh map[net.Conn]struct{} // guarded by mu; nil once closed
	shut  bool                  // guarded by mu
}

// state is called by the HTTP server, StateNew from its accept loop.
func (c *conns) state(conn net.Conn, st http.ConnState) {
	switch st {
	case http.StateNew:
		c.open.Add(1)
		c.all.Add(1)
		c.mu.Lock()
		defer c.mu.Unlock()
		if c.shut {
			_ = conn.Close()
			return
		}
		if c.fresh == nil {
			c.fresh = map[net.Conn]struct{}{}
		}
		c.fresh[conn] = struct{}{}
	case http.StateActive:
		c.forget(conn)
	case http.StateClosed, http.StateHijacked:
		c.forget(conn)
		c.open.Add(-1)
		c.all.Done()
	}
}

func (c *conns) forget(conn net.Conn) {
	c.mu.Lock()
	delete(c.fresh, conn)
	c.mu.Unlock()
}

func (c *conns) closeFresh() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.shut = true
	for conn := range c.fresh {
		_ = conn.Close()
	}
	c.fresh = nil
}

func (c *conns) wait() { c.all.Wait() }

// limitListener closes connections beyond MaxConns as they come. They cannot be
// told why: that would mean reading from them first.
type limitListener struct {
	net.Listener
	s *Server
}

func (l *limitListener) Accept() (net.Conn, error) {
	for {
		conn, err := l.Listener.Accept()
		if err != nil || l.s.conns.open.Load() < int64(l.s.o.MaxConns) {
			return conn, err
		}
		l.s.stats.refused[CauseConns].Add(1)
		_ = conn.Close()
	}
}
