// Package edge is the HTTP shell in front of every protocol: it owns the
// listener, the limits, who may come in and who they are. What a request
// means is the business of one adapter package for each protocol, which gives
// it [Route]s.
//
// A request passes, in this order, and is refused at the first that fails:
//
//	Host, Origin           403   a web page must not reach a local gateway (DNS rebinding)
//	path and method        404, 405
//	draining               503
//	Authorization          401   a wrong token is never taken for none
//	Content-Type, -Encoding 415
//	in flight, streams     503 for the gateway, 429 for the tenant
//	bytes of bodies        503 for the gateway, 429 for the tenant
//	body                   413, 408, 400
//
// Only then the adapter sees it, with its body whole in memory. So whatever
// reaches an adapter has a [Principal], and nothing that is slow, too large or
// cut off costs more than a place among the calls in flight and its share of
// the bytes that bodies may take. Every refusal is JSON that says what to do, and is counted by its [Cause].
//
// Begin with [New] and [Server.Run].
package edge

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"strings"
	"time"

	"waybill.dev/schemas"
)

// Principal is who calls, as the token says and never as the message says.
type Principal struct {
	Tenant schemas.Tenant
	Agent  schemas.Agent
	Groups []string
}

// Options of a [Server]. Zero means the default, where there is one.
type Options struct {
	// Hosts are the names under which the gateway is reached, "name" for any
	// port or "name:port". The loopback names are always among them.
	Hosts []string

	// Origins are the web origins, "https://console.example", whose pages may
	// call. The gateway's own origin is always among them.
	Origins []string

	// Tokens maps the SHA-256 of each bearer token to whom it stands for.
	Tokens map[[sha256.Size]byte]Principal

	// Anonymous is who calls without any token; nil: nobody. [Server.Run]
	// refuses it on a listener that other machines can reach.
	Anonymous *Principal

	// AnyToken says that who brings a token that is not known is Anonymous too:
	// where nothing is protected, and clients come as they are.
	AnyToken bool

	MaxBody           int64 // bytes; default 4 MiB
	MaxInFlight       int   // calls, streams among them; default 4096
	MaxInFlightTenant int   // the same for one tenant; default half of MaxInFlight
	MaxStreams        int   // open at once on routes that say Stream; default 4 × MaxInFlight
	MaxStreamsTenant  int   // the same for one tenant; default half of MaxStreams

	// MaxBodies bounds the bytes of the bodies of all calls in flight, and
	// MaxBodiesTenant those of one tenant's; without them memory would be
	// bounded by MaxInFlight × MaxBody only, which no machine has. A body's
	// bytes are taken before it is read, MaxBody of them when its length is
	// not said, and held until its call ends. Neither can be less than MaxBody,
	// so that what may be sent at all can be sent when nothing else is there.
	MaxBodies       int64 // default 128 MiB
	MaxBodiesTenant int64 // default half of MaxBodies

	MaxConns int // open connections; the next are closed at once; default 4 × MaxInFlight + MaxStreams

	HeaderTimeout time.Duration // until the header has come; default 10 s
	BodyTimeout   time.Duration // from there until the body has come, however slowly; default 30 s
	IdleTimeout   time.Duration // between two requests of a connection; default 2 min
	WriteTimeout  time.Duration // for each write, so that a stream may live on; default 30 s
	DrainTimeout  time.Duration // for calls in flight when Run is told to end; default 10 s

	Log *slog.Logger // default: discard
}

// maxHeader bounds a request's header. Tool arguments can be mirrored in it
// (MCP 2026-07-28, streamable HTTP, "Custom Headers"), hence more than usual.
const maxHeader = 64 << 10

// Route is one pattern of [http.ServeMux] and who serves it.
type Route struct {
	Pattern string

	// Serve answers. The body has been read: [Body] has it, and r.Body too.
	// r.Context ends when the client goes away, and with the cause
	// [ErrDraining] when the server gives up waiting. A panic becomes a 500.
	Serve func(w http.ResponseWriter, r *http.Request, p Principal)

	// Stream says that what Serve answers is a stream that lasts as long as the
	// client likes. These are counted apart from the calls, so that clients which
	// only listen take no place from those which ask.
	Stream bool

	// Refuse writes the body for requests that the shell refuses, in the form
	// in which the protocol has its errors. Nil: {"error":{"code","message"}}.
	Refuse func(status int, cause Cause, message string) []byte
}

// ErrDraining is the cause with which contexts end when the server shuts down.
var ErrDraining = errors.New("the gateway is shutting down")

// Server is one listener's worth of gateway. Its parts are set by [New] and
// immutable, but for the counters.
type Server struct {
	o     Options
	mux   *http.ServeMux
	hosts map[string]bool
	orig  map[string]bool

	bodies  budget                     // bytes of all bodies in flight
	tenants map[schemas.Tenant]*tenant // the keys are fixed

	// draining is closed first, when new calls are refused; cut ends the
	// context of what is still running DrainTimeout later.
	draining chan struct{}
	base     context.Context
	cut      context.CancelCauseFunc

	conns conns
	stats counters
}

// New checks the options and builds a server. It returns an error for patterns
// that [http.ServeMux] does not take, hosts and origins that are none, and
// principals that cannot stand in an event.
func New(o Options, routes ...Route) (*Server, error) {
	o = o.withDefaults()
	s := &Server{
		o: o, mux: http.NewServeMux(),
		hosts: map[string]bool{}, orig: map[string]bool{},
		tenants:  map[schemas.Tenant]*tenant{},
		draining: make(chan struct{}),
	}
	s.bodies.most = o.MaxBodies
	s.base, s.cut = context.WithCancelCause(context.Background())
	s.base = context.WithValue(s.base, drainKey{}, s.draining)
	for _, h := range o.Hosts {
		name, port := splitHost(h)
		if name == "" || strings.ContainsAny(name, "/@* ") || strings.Trim(port, "0123456789") != "" {
			return nil, fmt.Errorf("host %q: must be a name or name:port", h)
		}
		s.hosts[joinHost(name, port)] = true
	}
	for _, text := range o.Origins {
		origin, err := parseOrigin(text)
		if err != nil {
			return nil, fmt.Errorf("origin %q: %w", text, err)
		}
		s.orig[origin.String()] = true
	}
	who := make([]Principal, 0, len(o.Tokens)+1)
	for _, p := range o.Tokens {
		who = append(who, p)
	}
	if o.Anonymous != nil {
		who = append(who, *o.Anonymous)
	}
	for _, p := range who {
		if err := errors.Join(schemas.CheckToken(string(p.Tenant)), schemas.CheckToken(string(p.Agent))); err != nil {
			return nil, fmt.Errorf("principal %s/%s: %w", p.Tenant, p.Agent, err)
		}
		if s.tenants[p.Tenant] == nil {
			s.tenants[p.Tenant] = &tenant{bodies: budget{most: o.MaxBodiesTenant}}
		}
	}
	for _, route := range routes {
		if err := s.handle(route); err != nil {
			return nil, err
		}
	}
	return s, nil
}

func (o Options) withDefaults() Options {
	def := func(v *time.Duration, d time.Duration) {
		if *v <= 0 {
			*v = d
		}
	}
	if o.MaxBody <= 0 {
		o.MaxBody = 4 << 20
	}
	if o.MaxInFlight <= 0 {
		o.MaxInFlight = 4096
	}
	if o.MaxInFlightTenant <= 0 {
		o.MaxInFlightTenant = max(1, o.MaxInFlight/2)
	}
	if o.MaxBodies <= 0 {
		o.MaxBodies = 128 << 20
	}
	o.MaxBodies = max(o.MaxBodies, o.MaxBody)
	if o.MaxBodiesTenant <= 0 {
		o.MaxBodiesTenant = o.MaxBodies / 2
	}
	o.MaxBodiesTenant = max(o.MaxBodiesTenant, o.MaxBody)
	if o.MaxStreams <= 0 {
		o.MaxStreams = 4 * o.MaxInFlight
	}
	if o.MaxStreamsTenant <= 0 {
		o.MaxStreamsTenant = max(1, o.MaxStreams/2)
	}
	if o.MaxConns <= 0 {
		o.MaxConns = 4*o.MaxInFlight + o.MaxStreams
	}
	def(&o.HeaderTimeout, 10*time.Second)
	def(&o.BodyTimeout, 30*time.Second)
	def(&o.IdleTimeout, 2*time.Minute)
	def(&o.WriteTimeout, 30*time.Second)
	def(&o.DrainTimeout, 10*time.Second)
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	return o
}

// handle registers a route; the mux panics at a bad pattern.
func (s *Server) handle(route Route) (err error) {
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("route %q: %v", route.Pattern, p)
		}
	}()
	s.mux.HandleFunc(route.Pattern, func(w http.ResponseWriter, r *http.Request) { s.serve(w, r, route) })
	return nil
}

// Run serves ln until ctx is done or the listener fails, and returns when the
// last call, connection and goroutine is gone. It closes ln and is called once.
//
// When ctx is done it takes no new calls and waits up to DrainTimeout for those
// in flight; then it ends their contexts with [ErrDraining], gives them a moment
// to say so to their clients, and closes the connections. It returns nil after
// that, whether calls were cut or not.
func (s *Server) Run(ctx context.Context, ln net.Listener) error {
	defer s.cut(ErrDraining)
	if s.o.Anonymous != nil && !local(ln.Addr()) {
		_ = ln.Close()
		return fmt.Errorf("listen on %s: anonymous callers are for loopback listeners only", ln.Addr())
	}
	srv := &http.Server{
		Handler:           s,
		ReadHeaderTimeout: s.o.HeaderTimeout,
		IdleTimeout:       s.o.IdleTimeout,
		MaxHeaderBytes:    maxHeader,
		ConnState:         s.conns.state,
		BaseContext:       func(net.Listener) context.Context { return s.base },
		ErrorLog:          slog.NewLogLogger(s.o.Log.Handler(), slog.LevelDebug),
		// OPTIONS * is answered like everything else that is not served.
		DisableGeneralOptionsHandler: true,
	}
	failed := make(chan error, 1)
	go func() { failed <- srv.Serve(&limitListener{Listener: ln, s: s}) }()

	var err error
	select {
	case err = <-failed:
		err = fmt.Errorf("serve %s: %w", ln.Addr(), err)
	case <-ctx.Done():
	}
	close(s.draining)
	s.conns.closeFresh()

	wait, stop := context.WithTimeout(context.WithoutCancel(ctx), s.o.DrainTimeout)
	cutoff := srv.Shutdown(wait)
	stop()
	if cutoff != nil {
		s.o.Log.Warn("calls in flight are cut off", "calls", s.stats.inFlight.Load(), "after", s.o.DrainTimeout)
		s.cut(ErrDraining)
		wait, stop = context.WithTimeout(context.WithoutCancel(ctx), lastWords)
		_ = srv.Shutdown(wait)
		stop()
	}
	_ = srv.Close()
	if err == nil {
		<-failed
	}
	s.conns.wait()
	return err
}

// lastWords is how long a call that is cut off has to answer that it was.
const lastWords = 2 * time.Second

type drainKey struct{}

// UntilDrain returns a context that also ends, with the cause [ErrDraining], as
// soon as the server begins to shut down. It is for calls that last until the
// client leaves: waiting for them would be waiting in vain. Calling the returned
// function releases what it holds.
func UntilDrain(ctx context.Context) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancelCause(ctx)
	draining, _ := ctx.Value(drainKey{}).(chan struct{})
	if draining == nil {
		return ctx, func() { cancel(nil) }
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		select {
		case <-draining:
			cancel(ErrDraining)
		case <-ctx.Done():
		}
	}()
	return ctx, func() { cancel(nil); <-done }
}
