package cli

import (
	"cmp"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"iter"
	"net"
	"net/http"
	"net/http/pprof"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"waybill.dev/bus"
	"waybill.dev/projections"
	"waybill.dev/schemas"
)

// The admin API. Health and metrics are open to whoever reaches the address;
// everything that shows what was said needs the token, which is kept in a
// file of the data directory that only its owner can read.
//
//	GET /healthz                    200 while the process runs
//	GET /readyz                     200 while every role of the process works
//	GET /metrics                    Prometheus
//	GET /debug/pprof/               token
//	GET /api/v1/sessions            token; ?tenant=&limit=  one session per line (NDJSON), newest last
//	GET /api/v1/sessions/S/events   token; ?from=clickhouse  one event per line, as schemas.Event is written
//	GET /api/v1/query               token; ?sql=  what the record answers, see answerLine
//	GET /api/v1/calls/CALL          token; the events of one call
//	GET /api/v1/policies/SHA256     token; the policy of a digest, as it is stored; /active: the one in force
//	GET /api/v1/traffic             token; ?since=24h&before=&tenant=&from=  what was asked for and decided, see appendTraffic
//	GET /api/v1/approvals           token; ?all=  what waits for an approval, one per line
//	POST /api/v1/approvals/ID       token; {"said": "granted" or "refused", "by", "for": seconds, "uses", "note"}
//	GET /api/v1/sessions/S/export   token; ?from=&redact=&rows=  the session with its proofs, as a file has it (export_file.go)
//	GET /api/v1/tools               token; ?definitions=  what is known of the servers' tools, prompts, resources and instructions, one registry.Entry per line
//	POST /api/v1/tools              token; a registry.Word: {"server", "kind", "name", "said": "approved" or "quarantined", "sha256", "by", "note"}
//	GET /api/v1/events              token; ?tenant=&session=&kind=  the same, live, until the client leaves
//	GET /api/v1/audit/lines         token; all that `waybill audit verify` reads, one audit.Line per line
//	GET /api/v1/audit/checkpoint    token; the newest checkpoint, the newest that witnesses have signed too, and the public keys
//	GET /api/v1/audit/proof         token; ?event=SEQ or STREAM/SEQ, a proof
//	GET /api/v1/audit/feed          token; ?tenant=&kind=  the audit's feed, live
//	POST /api/v1/rebuild            token; ?gaps=accept&dry=&archive=  makes the derived tables anew, of an archive that is sent or of events_v1
//	POST /api/v1/sessions/S/erase   token; ?reason=  destroys what was said in the session; answers when it is done
const tokenFile = "admin.token"

// addAdmin: what operators see.
func (g *gateway) addAdmin(ctx context.Context, ln net.Listener) error {
	l, err := g.open(ctx, bus.RoleObserver)
	if err != nil {
		return err
	}
	if err := g.metrics.watchLog(l); err != nil {
		return err
	}
	if !g.roles[bus.RoleEdge] { // where there is an edge, it watches
		g.workers = append(g.workers, part{"watch", func(ctx context.Context) error { return l.Watch(ctx, time.Second) }})
	}
	token, err := g.token()
	if err != nil {
		return err
	}
	operator, err := g.open(ctx, bus.RoleOperator)
	if err != nil {
		return err
	}
	sys, err := operator.System(ctx)
	if err != nil {
		return err
	}
	a := &admin{g: g, l: l, hash: sha256.Sum256([]byte(token))}
	people := &approvals{a, sys}
	mux := http.NewServeMux()
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) { _, _ = fmt.Fprintln(w, "ok") })
	mux.HandleFunc("GET /readyz", func(w http.ResponseWriter, _ *http.Request) {
		if what := g.notReady(); what != "" {
			http.Error(w, "not ready: "+what, http.StatusServiceUnavailable)
			return
		}
		_, _ = fmt.Fprintln(w, "ready")
	})
	mux.Handle("GET /metrics", g.metrics.handler)
	for pattern, h := range map[string]http.HandlerFunc{
		"/debug/pprof/":                         pprof.Index,
		"/debug/pprof/profile":                  pprof.Profile,
		"/debug/pprof/symbol":                   pprof.Symbol,
		"/debug/pprof/trace":                    pprof.Trace,
		"GET /api/v1/sessions":                  a.sessions,
		"GET /api/v1/sessions/{session}/events": a.session,
		"GET /api/v1/sessions/{session}/export": a.export,
		"GET /api/v1/events":                    a.events,
		"GET /api/v1/calls/{call}":              people.call,
		"GET /api/v1/policies/{digest}":         people.bundle,
		"GET /api/v1/approvals":                 people.list,
		"GET /api/v1/traffic":                   a.traffic,
		"POST /api/v1/approvals/{id}":           people.say,
		"GET /api/v1/tools":                     people.tools,
		"POST /api/v1/tools":                    people.pin,
		"GET /api/v1/query":                     a.query,
		"POST /api/v1/rebuild":                  a.rebuild,
		"GET /api/v1/audit/lines":               a.auditLines,
		"GET /api/v1/audit/checkpoint":          a.auditCheckpoint,
		"GET /api/v1/audit/proof":               a.auditProof,
		"GET /api/v1/audit/feed":                a.auditFeed,
		"POST /api/v1/sessions/{session}/erase": a.erase,
	} {
		mux.HandleFunc(pattern, a.guard(h))
	}
	base, cut := context.WithCancel(context.WithoutCancel(ctx))
	srv := &http.Server{
		Handler: impatient(localHost(ln.Addr(), mux)), ReadHeaderTimeout: 10 * time.Second, ReadTimeout: 30 * time.Second,
		IdleTimeout: time.Minute, MaxHeaderBytes: 16 << 10,
		BaseContext: func(net.Listener) context.Context { return base },
	}
	g.workers = append(g.workers, part{"admin", func(ctx context.Context) error {
		failed := make(chan error, 1)
		go func() { failed <- srv.Serve(&few{Listener: ln, places: make(chan struct{}, adminConns)}) }()
		select {
		case err := <-failed:
			cut()
			return err
		case <-ctx.Done():
		}
		cut() // ends what is being tailed
		wait, stop := context.WithTimeout(context.WithoutCancel(ctx), 2*time.Second)
		defer stop()
		if err := srv.Shutdown(wait); err != nil {
			_ = srv.Close()
		}
		<-failed
		return nil
	}})
	return nil
}

// token reads the admin token, or makes it.
func (g *gateway) token() (string, error) {
	file := filepath.Join(g.c.Data, tokenFile)
	b, err := os.ReadFile(file)
	if errors.Is(err, os.ErrNotExist) {
		return newToken(file)
	}
	if err != nil {
		return "", err
	}
	st, err := os.Stat(file)
	if err != nil {
		return "", err
	}
	if st.Mode().Perm()&0o077 != 0 {
		return "", fmt.Errorf("%s can be read by others (mode %o): chmod 600, or delete it for a new token", file, st.Mode().Perm())
	}
	t := strings.TrimSpace(string(b))
	if len(t) < 20 {
		return "", fmt.Errorf("%s holds %d characters, and a token needs at least 20: delete it for a new one", file, len(t))
	}
	return t, nil
}

// newToken makes the file whole or not at all: half a token would keep the
// gateway from starting.
func newToken(file string) (string, error) {
	if err := os.MkdirAll(filepath.Dir(file), 0o700); err != nil {
		return "", err
	}
	t := rand.Text()
	if err := os.WriteFile(file+".new", []byte(t+"\n"), 0o600); err != nil {
		return "", err
	}
	return t, os.Rename(file+".new", file)
}

const (
	adminConns = 256              // connections to the admin API at once
	patience   = 30 * time.Second // with an operator who does not read what was asked for
)

// few is a listener that has so many places for connections. Who finds none
// is told so, as far as that goes, and not kept waiting.
type few struct {
	net.Listener
	places chan struct{}
}

// Accept waits for a connection that has a place.
func (l *few) Accept() (net.Conn, error) {
	for {
		conn, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		select {
		case l.places <- struct{}{}:
			return &placed{Conn: conn, leave: sync.OnceFunc(func() { <-l.places })}, nil
		default:
			// The text fits into the buffer of a fresh connection.
			_ = conn.SetWriteDeadline(time.Now().Add(time.Second))
			_, _ = io.WriteString(conn, "HTTP/1.1 503 Service Unavailable\r\nRetry-After: 5\r\nConnection: close\r\nContent-Length: 0\r\n\r\n")
			_ = conn.Close()
		}
	}
}

type placed struct {
	net.Conn
	leave func()
}

// Close gives the place back.
func (c *placed) Close() error {
	defer c.leave()
	return c.Conn.Close()
}

// impatient cuts off who does not read, whichever handler it is: each write,
// not the answer as a whole, has to be done in time.
func impatient(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		rc := http.NewResponseController(w)
		more := func() { _ = rc.SetWriteDeadline(time.Now().Add(patience)) } // it fails on a closed connection only
		more()
		next.ServeHTTP(deadlined{w, more}, r)
		more() // for what is left in the buffer
	})
}

type deadlined struct {
	http.ResponseWriter
	more func()
}

func (d deadlined) Write(b []byte) (int, error) {
	d.more()
	return d.ResponseWriter.Write(b)
}

// Unwrap is for http.ResponseController.
func (d deadlined) Unwrap() http.ResponseWriter { return d.ResponseWriter }

// localHost refuses requests that name a foreign host on a loopback listener:
// a web page that has its name resolve to this machine.
func localHost(at net.Addr, next http.Handler) http.Handler {
	tcp, ok := at.(*net.TCPAddr)
	if !ok || !tcp.IP.IsLoopback() {
		return next
	}
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		host, _, err := net.SplitHostPort(r.Host)
		if err != nil {
			host = r.Host
		}
		if !loopback(strings.Trim(host, "[]")) {
			http.Error(w, "host "+strconv.Quote(r.Host)+" is not this machine", http.StatusForbidden)
			return
		}
		next.ServeHTTP(w, r)
	})
}

// admin answers the operators' questions from the log.
type admin struct {
	g    *gateway
	l    *bus.Log
	hash [sha256.Size]byte
}

// guard lets only the holder of the token in.
func (a *admin) guard(next http.HandlerFunc) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		scheme, given, _ := strings.Cut(r.Header.Get("Authorization"), " ")
		hash := sha256.Sum256([]byte(given))
		if !strings.EqualFold(scheme, "Bearer") || subtle.ConstantTimeCompare(hash[:], a.hash[:]) != 1 {
			w.Header().Set("WWW-Authenticate", "Bearer")
			http.Error(w, "this needs the token in "+tokenFile+" of the data directory", http.StatusUnauthorized)
			return
		}
		w.Header().Set("Cache-Control", "no-store")
		next(w, r)
	}
}

// session as a line of the list.
type sessionLine struct {
	Session  schemas.SessionKey      `json:"session"`
	Tenant   schemas.Tenant          `json:"tenant"`
	Agent    schemas.Agent           `json:"agent"`
	Protocol schemas.Protocol        `json:"protocol"`
	Name     string                  `json:"name"`
	Client   string                  `json:"client,omitempty"`
	Opened   time.Time               `json:"opened"`
	Events   map[schemas.Kind]uint64 `json:"events"`
}

func (a *admin) sessions(w http.ResponseWriter, r *http.Request) {
	q := r.URL.Query()
	limit := 0
	if s := q.Get("limit"); s != "" {
		n, err := strconv.Atoi(s)
		if err != nil || n < 0 {
			http.Error(w, "limit: not a number of sessions", http.StatusBadRequest)
			return
		}
		limit = n
	}
	f := bus.Filter{Tenant: schemas.Tenant(q.Get("tenant")), Kinds: []schemas.Kind{schemas.KindOpened}}
	if f.Tenant != "" && schemas.CheckToken(string(f.Tenant)) != nil {
		http.Error(w, "tenant: not a tenant's id", http.StatusBadRequest)
		return
	}
	last, err := a.l.Last(r.Context())
	if err != nil {
		a.fail(w, err)
		return
	}
	lines, err := opened(r.Context(), a.l.Read, f, limit, last, 10_000)
	if err != nil {
		a.fail(w, err)
		return
	}
	// Asked for one by one, at half a millisecond each: the counts of a whole
	// log in one go hold it up for seconds (measured with 600,000 subjects).
	w.Header().Set("Content-Type", "application/x-ndjson")
	out := json.NewEncoder(w)
	for _, line := range lines {
		var err error
		if line.Events, err = a.l.Counts(r.Context(), line.Tenant, line.Session); err != nil {
			panic(http.ErrAbortHandler) // a list cut short must not look whole
		}
		if out.Encode(line) != nil {
			return // the client left
		}
	}
}

// reader is bus.Log.Read.
type reader func(ctx context.Context, f bus.Filter, from uint64) iter.Seq2[schemas.Event, error]

// opened lists the newest limit sessions, or all for 0, the newest last. The
// first opened of a session counts; a later one, which an edge that started
// anew stores, repeats it. It looks at the end of the log first and further
// back only as long as it must: reading a long log for its opened events loads
// all of it. last is the newest event, and window is how many to look at first.
func opened(ctx context.Context, read reader, f bus.Filter, limit int, last, window uint64) ([]sessionLine, error) {
	for ; ; window *= 4 {
		from := uint64(1)
		if limit > 0 && window < last {
			from = last - window
		}
		var lines []sessionLine
		seen := map[schemas.SessionKey]bool{}
		for e, err := range read(ctx, f, from) {
			if errors.Is(err, bus.ErrUndecodable) {
				continue
			}
			if err != nil {
				return nil, err
			}
			o, ok := e.Data.(*schemas.Opened)
			if !ok || seen[e.Session] {
				continue
			}
			seen[e.Session] = true
			lines = append(lines, sessionLine{
				Session: e.Session, Tenant: e.Tenant, Agent: e.Agent, Protocol: o.Protocol,
				Name: o.Name, Client: o.Client, Opened: e.Stored,
			})
		}
		if from == 1 {
			return lines[max(0, len(lines)-cmp.Or(limit, len(lines))):], nil
		}
		lines, err := within(ctx, read, lines, from, limit)
		if err != nil || len(lines) == limit {
			return lines, err
		}
	}
}

// within leaves of sessions the newest limit, at most, that were not opened
// before from already.
func within(ctx context.Context, read reader, lines []sessionLine, from uint64, limit int) ([]sessionLine, error) {
	var kept []sessionLine
	for _, line := range slices.Backward(lines) {
		if len(kept) == limit {
			break
		}
		f := bus.Filter{Tenant: line.Tenant, Session: line.Session, Kinds: []schemas.Kind{schemas.KindOpened}}
		for e, err := range read(ctx, f, 1) {
			if errors.Is(err, bus.ErrUndecodable) {
				continue
			}
			if err != nil {
				return nil, err
			}
			if e.Seq >= from {
				kept = append(kept, line)
			}
			break
		}
	}
	slices.Reverse(kept)
	return kept, nil
}

// session writes the events of one session.
func (a *admin) session(w http.ResponseWriter, r *http.Request) {
	key := schemas.SessionKey(r.PathValue("session"))
	if schemas.CheckToken(string(key)) != nil {
		http.Error(w, "not a session's key", http.StatusBadRequest)
		return
	}
	found, where := false, "log"
	out := json.NewEncoder(w)
	events := a.l.Read(r.Context(), bus.Filter{Session: key}, 0)
	switch from := r.URL.Query().Get("from"); from {
	case "", "stream":
	case "clickhouse":
		if a.g.server == nil {
			http.Error(w, noRecord, http.StatusNotFound)
			return
		}
		where, events = "record", projections.Session(r.Context(), a.g.server, key)
	default:
		http.Error(w, "from: neither stream nor clickhouse", http.StatusBadRequest)
		return
	}
	for e, err := range events {
		gone := new(projections.BodyGone)
		odd := errors.Is(err, bus.ErrUndecodable) || errors.Is(err, projections.ErrUnreadable)
		if err != nil && !odd && !errors.As(err, &gone) {
			if !found {
				a.fail(w, err)
				return
			}
			panic(http.ErrAbortHandler)
		}
		if !found {
			found = true
			w.Header().Set("Content-Type", "application/x-ndjson")
		}
		var line any = e
		switch {
		case gone.Size > 0:
			text, err := e.MarshalJSON()
			if err != nil {
				panic(http.ErrAbortHandler)
			}
			line = json.RawMessage(fmt.Appendf(text[:len(text)-1], `,"body_gone":%d}`, gone.Size))
		case err != nil:
			line = map[string]any{"seq": e.Seq, "undecodable": err.Error()}
		}
		if out.Encode(line) != nil {
			return
		}
	}
	if !found {
		http.Error(w, "no session "+strconv.Quote(string(key))+" in the "+where+"; `waybill sessions` lists them", http.StatusNotFound)
	}
}

// events follows the log.
func (a *admin) events(w http.ResponseWriter, r *http.Request) {
	q := r.URL.Query()
	f := bus.Filter{Tenant: schemas.Tenant(q.Get("tenant")), Session: schemas.SessionKey(q.Get("session"))}
	for _, k := range q["kind"] {
		f.Kinds = append(f.Kinds, schemas.Kind(k))
	}
	last, err := a.l.Last(r.Context())
	if err != nil {
		a.fail(w, err)
		return
	}
	heard, err := a.l.Listen(r.Context(), f, last)
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	rc := http.NewResponseController(w)
	w.Header().Set("Content-Type", "application/x-ndjson")
	w.WriteHeader(http.StatusOK)
	_ = rc.Flush()
	out := json.NewEncoder(w)
	for e, err := range heard {
		var line any = e
		if err != nil {
			line = map[string]any{"seq": e.Seq, "undecodable": err.Error()}
		}
		// A reader that is too slow is cut off (see impatient); the log keeps
		// what it missed.
		if out.Encode(line) != nil || rc.Flush() != nil {
			return
		}
	}
}

func (a *admin) fail(w http.ResponseWriter, err error) {
	a.g.log.Error("admin API", "error", err)
	http.Error(w, err.Error(), http.StatusServiceUnavailable)
}
