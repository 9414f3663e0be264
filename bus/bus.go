// Package bus is the log: the only package that knows NATS, and the only way
// by which roles hear of each other. Its verbs are
//
//	Publish   store an event, with an acknowledgement        (publish.go)
//	Run       handle every event of a kind, whoever dies      (run.go)
//	Ask       store a request and follow its call to the end  (ask.go)
//	Listen    hear events from now on                         (listen.go)
//	Batch     take all events in order, in contiguous batches (batch.go)
//	Read      the past                                        (read.go)
//	System    what the gateway is made of, beside its calls   (system.go)
//
// Begin with [Open]. The server may be the embedded one (bus/embed) or an
// external cluster; nothing here can tell the difference.
package bus

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"waybill.dev/schemas"
)

// Dialer opens a connection for a role; extra options are the bus's own.
type Dialer func(Role, ...nats.Option) (*nats.Conn, error)

// URL dials an external NATS server or cluster: several URLs stand with commas
// between them. creds is a credentials file,
// or "". The permissions of the roles are then what the server's operator
// gave that user.
func URL(url, creds string) Dialer {
	return func(r Role, opts ...nats.Option) (*nats.Conn, error) {
		opts = append([]nats.Option{nats.Name("waybill " + string(r)), r.Inbox()}, opts...)
		if creds != "" {
			opts = append(opts, nats.UserCredentials(creds))
		}
		// A network that swallows everything is noticed within 10 s, so that
		// another server is tried.
		opts = append(opts, nats.PingInterval(5*time.Second), nats.MaxPingsOutstanding(2))
		return nats.Connect(url, opts...)
	}
}

// Options of a log.
type Options struct {
	Dial     Dialer
	Role     Role
	Replicas int           // of the streams; default 1. Three in a cluster
	MaxBytes int64         // of EVENTS; default 4 GiB
	MaxAge   time.Duration // of EVENTS; default 24 h
	Guard    []string      // durable consumers whose unread events must not be dropped, see Log.Watch
	Leases   bool          // several processes share the log: Setup makes what they need to own things ([Log.Leases])
	LeaseTTL time.Duration // after which a process that says nothing owns nothing any more; default 15 s, in whole seconds
	AckWait  time.Duration // after which work of a silent worker is given to another; default 5 s
	Log      *slog.Logger

	FeedAge   time.Duration // of the audit's feed; default 90 days
	FeedBytes int64         // of the audit's feed; default 8 GiB

	// Fault is a door for tests: it is asked before and after each publish
	// and may fail it, so that "failed" and "failed but stored" are both tried.
	Fault func(e schemas.Event, stored bool) error

	// FaultSystem is the same door for records ([Log.System]).
	FaultSystem func(kind, name string, stored bool) error
}

// Defaults and limits of the log.
const (
	// Duplicates is the window within which the log recognises a repeated ID.
	Duplicates = 2 * time.Minute
	// MaxBody is the largest body in bytes that an event may carry.
	MaxBody = 4 << 20

	events = "EVENTS"
	system = "SYSTEM"
	dead   = "DEAD"
)

// Log is a role's connection to the streams. Its methods may be used by many
// goroutines at once.
type Log struct {
	o      Options
	nc     *nats.Conn
	js     jetstream.JetStream
	stream jetstream.Stream       // EVENTS
	full   atomic.Pointer[string] // why new calls are refused
	stuck  atomic.Pointer[string] // which work stands still
	pasts  pasts
	acks   *acks

	life context.Context // until Close
	end  context.CancelFunc
}

// Open connects a role to the log. The streams must be there ([Setup]).
func Open(ctx context.Context, o Options) (*Log, error) {
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	if o.AckWait == 0 {
		o.AckWait = 5 * time.Second
	}
	l := &Log{o: o}
	closed := make(chan struct{})
	nc, err := o.Dial(o.Role,
		nats.MaxReconnects(-1),
		nats.ClosedHandler(func(*nats.Conn) { close(closed) }),
		nats.ReconnectWait(250*time.Millisecond),
		// What is published while there is no connection fails at once, and is
		// tried again by who publishes, who knows for how long. Kept for later it
		// would be stored when its caller has long been told that it was not.
		nats.ReconnectBufSize(-1),
		nats.ErrorHandler(func(_ *nats.Conn, sub *nats.Subscription, err error) {
			subject := ""
			if sub != nil {
				subject = sub.Subject
			}
			o.Log.Warn("log connection", "role", o.Role, "subject", subject, "error", err)
		}),
	)
	if err != nil {
		return nil, fmt.Errorf("connect %s to the log: %w", o.Role, err)
	}
	l.nc, l.acks = nc, newAcks(nc, closed)
	l.life, l.end = context.WithCancel(context.Background())
	l.pasts.busy = make(chan struct{}, pastReadings)
	if l.js, err = jetstream.New(nc); err == nil {
		l.stream, err = l.js.Stream(ctx, events)
	}
	if err != nil {
		l.Close()
		return nil, fmt.Errorf("open the log as %s: %w", o.Role, err)
	}
	return l, nil
}

// Close drops the connection. Run, Ask and Listen must have returned.
func (l *Log) Close() {
	l.end()
	l.nc.Close()
}

// Connected tells whether the log can be reached now.
func (l *Log) Connected() bool { return l.nc.IsConnected() }

// Identity tells this log from one that is begun anew in its place, whose
// sequences are other events'. It stays over restarts.
func (l *Log) Identity(ctx context.Context) (string, error) {
	info, err := l.stream.Info(ctx)
	if err != nil {
		return "", fmt.Errorf("identity of the log: %w", err)
	}
	return info.Created.UTC().Format(time.RFC3339Nano), nil
}

// Setup makes the streams, or brings their settings up to date. It needs the
// admin role.
func Setup(ctx context.Context, o Options) error {
	nc, err := o.Dial(RoleAdmin)
	if err != nil {
		return fmt.Errorf("connect to the log: %w", err)
	}
	defer nc.Close()
	js, err := jetstream.New(nc)
	if err != nil {
		return err
	}
	kept, err := o.kept(ctx, js)
	if err != nil {
		return err
	}
	streams := append([]jetstream.StreamConfig{kept, o.system(), o.dead()}, o.audit()...)
	if o.Leases {
		streams = append(streams, o.owners(), o.keys())
	}
	for _, c := range streams {
		for {
			if c.Name == feedStream {
				var before map[string]string
				if before, err = said(ctx, js, feedStream); err == nil {
					c.Metadata = keeping(c, before, time.Now())
				} else if ctx.Err() == nil && passing(err) && pause(ctx, 200*time.Millisecond) {
					continue
				} else {
					break
				}
			}
			_, err = js.CreateOrUpdateStream(ctx, c)
			// That of an earlier version cannot be brought to let anything be erased.
			if api := new(jetstream.APIError); c.Name == events && errors.As(err, &api) && api.ErrorCode == codeConfig {
				c.DenyDelete = true
				_, err = js.CreateOrUpdateStream(ctx, c)
			}
			// A cluster elects its leader first; an embedded server may still
			// recover its streams.
			if err == nil || ctx.Err() != nil || !passing(err) {
				break
			}
			if !pause(ctx, 200*time.Millisecond) {
				break
			}
		}
		if err != nil {
			return fmt.Errorf("set up stream %s: %w", c.Name, err)
		}
	}
	return nil
}

// kept is events(), with aging suspended where it is: what nobody has read may be
// older than that by now. Watch lets it go on.
func (o Options) kept(ctx context.Context, js jetstream.JetStream) (jetstream.StreamConfig, error) {
	c := o.events()
	for {
		s, err := js.Stream(ctx, events)
		switch {
		case err == nil:
			before := s.CachedInfo().Config
			c.Metadata = keeping(c, before.Metadata, time.Now())
			if len(o.Guard) > 0 && before.MaxAge == 0 {
				c.MaxAge = 0
			}
			return c, nil
		case errors.Is(err, jetstream.ErrStreamNotFound):
			c.Metadata = keeping(c, nil, time.Now())
			return c, nil
		case !passing(err), !pause(ctx, 200*time.Millisecond):
			return c, fmt.Errorf("how long the log keeps events: %w", err)
		}
	}
}

func (o Options) events() jetstream.StreamConfig {
	c := jetstream.StreamConfig{
		Name: events, Description: "every event of every call",
		Subjects: []string{"ev.>"},
		MaxBytes: 4 << 30, MaxAge: 24 * time.Hour,
		// Not DenyDelete: who erases a session has to. Nobody else may (role.go).
		Discard: jetstream.DiscardOld, DenyPurge: true,
		// In a cluster any node would answer, also one that has not got an event
		// yet that was acknowledged a moment ago; then only the leader may.
		AllowDirect: o.Replicas <= 1, Duplicates: Duplicates,
		Storage: jetstream.FileStorage, Replicas: max(o.Replicas, 1), MaxConsumers: -1,
	}
	if o.MaxBytes > 0 {
		c.MaxBytes = o.MaxBytes
	}
	if o.MaxAge > 0 {
		c.MaxAge = o.MaxAge
	}
	if c.MaxAge < c.Duplicates {
		c.Duplicates = c.MaxAge
	}
	return c
}

// dead is for dead letters. They come of what others did, so they are bounded:
// the oldest go first.
func (o Options) dead() jetstream.StreamConfig {
	return jetstream.StreamConfig{
		Name: dead, Description: "events that could not be read, or that a worker kept failing on",
		Subjects: []string{"dead.>"},
		MaxBytes: 256 << 20, MaxAge: 30 * 24 * time.Hour, Discard: jetstream.DiscardOld,
		AllowDirect: true, Duplicates: Duplicates,
		Storage: jetstream.FileStorage, Replicas: max(o.Replicas, 1), MaxConsumers: -1,
	}
}

// Codes of the server's errors for which its client has no names.
const (
	codeConfig    = 10052 // the settings are refused
	codeStorage   = 10047 // insufficient storage
	codeResources = 10023 // insufficient resources
	codeHeaders   = 10097 // header size exceeds 64 KiB
	codeTooFast   = 10167 // more is published than can be stored; this try was not
)

// passing tells whether an error may be gone at the next try.
func passing(err error) bool {
	var api *jetstream.APIError
	if errors.As(err, &api) {
		switch api.ErrorCode {
		case codeStorage, codeResources:
			return false
		case codeTooFast:
			return true
		}
		return api.Code >= 500
	}
	return errors.Is(err, nats.ErrTimeout) || errors.Is(err, nats.ErrNoResponders) ||
		errors.Is(err, context.DeadlineExceeded) || errors.Is(err, jetstream.ErrNoStreamResponse) ||
		errors.Is(err, nats.ErrDisconnected) || errors.Is(err, nats.ErrConnectionReconnecting) || errors.Is(err, nats.ErrReconnectBufExceeded)
}

// pause waits, and tells whether the context still stands.
func pause(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-t.C:
		return true
	}
}
