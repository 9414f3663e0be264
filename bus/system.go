package bus

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"maps"
	"strings"
	"time"

	"github.com/cenkalti/backoff/v4"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"waybill.dev/schemas"
)

// System is what the gateway is made of, kept in the stream SYSTEM: which policy
// is in force, what was approved, which tools are known. Its records are never
// dropped; what counts is decided by who reads them, in their order. Its verbs
// are
//
//	Append, AppendAfter   store a record, with an acknowledgement
//	Watch                 all records of some kinds, from the first on, then live
//	Latest                the newest record of a name
//	Put, Get              contents by their digest, which records name
type System struct {
	l      *Log
	stream jetstream.Stream
}

// Record is one entry of the system. It stands on sys.<kind>.<name>; both are
// tokens ([schemas.CheckToken]), so a name from outside has to be hashed.
type Record struct {
	Seq    uint64
	Stored time.Time
	Kind   string
	Name   string
	Body   []byte
}

const (
	contentKind   = "content"
	headerParts   = "Waybill-Parts"
	contentPart   = 1 << 20
	systemMax     = 512 << 20
	systemMaxPart = 64

	// MaxContent is the largest content in bytes that [System.Put] takes.
	MaxContent = systemMaxPart * contentPart
)

// ErrOvertaken: another record was stored under this name before, or another event
// in this session.
var ErrOvertaken = errors.New("another record was stored first")

func (o Options) system() jetstream.StreamConfig {
	return jetstream.StreamConfig{
		Name: system, Description: "what the gateway is made of: registry, policy, approvals",
		Subjects: []string{"sys.>"},
		// Full is an answer: nothing of it may go to make room.
		MaxBytes: systemMax, Discard: jetstream.DiscardNew, DenyPurge: true, DenyDelete: true,
		AllowDirect: o.Replicas <= 1, Duplicates: Duplicates,
		Storage: jetstream.FileStorage, Replicas: max(o.Replicas, 1), MaxConsumers: -1,
	}
}

// System opens the stream SYSTEM for the log's role, which may store only the
// kinds that role.go gives it.
func (l *Log) System(ctx context.Context) (*System, error) {
	s, err := l.js.Stream(ctx, system)
	if err != nil {
		return nil, fmt.Errorf("open the system's records as %s: %w", l.o.Role, err)
	}
	return &System{l: l, stream: s}, nil
}

// Append stores a record and returns its sequence when the log has acknowledged
// it. What may pass is tried again, and stored once all the same. It returns
// [schemas.ErrTooLarge], [schemas.ErrInvalid] or [schemas.ErrOverloaded] when it
// is not stored; after any other error it may be.
func (s *System) Append(ctx context.Context, kind, name string, body []byte) (uint64, error) {
	return s.append(ctx, kind, name, body, nil, nil)
}

// AppendAfter is Append if the newest record of the name is the one of sequence
// last (0: there is none); else it returns [ErrOvertaken].
func (s *System) AppendAfter(ctx context.Context, kind, name string, body []byte, last uint64) (uint64, error) {
	return s.append(ctx, kind, name, body, nil, &last)
}

func (s *System) append(ctx context.Context, kind, name string, body []byte, header nats.Header, last *uint64) (uint64, error) {
	subject, err := systemSubject(kind, name)
	if err != nil {
		return 0, fmt.Errorf("%w: %w", schemas.ErrInvalid, err)
	}
	if len(body) > MaxBody {
		return 0, fmt.Errorf("store %s: %w: %d bytes, a record may have %d", subject, schemas.ErrTooLarge, len(body), MaxBody)
	}
	// Not derived from what is stored: to say the same again is another record.
	id := rand.Text()
	opts := []jetstream.PublishOpt{jetstream.WithMsgID(id), jetstream.WithRetryAttempts(0)}
	if last != nil {
		opts = append(opts, jetstream.WithExpectLastSequencePerSubject(*last))
	}
	var seq uint64
	perhaps := false
	try := func() error {
		if s.l.o.FaultSystem != nil {
			if err := s.l.o.FaultSystem(kind, name, false); err != nil {
				return err
			}
		}
		ack, err := s.l.js.PublishMsg(ctx, &nats.Msg{Subject: subject, Header: maps.Clone(header), Data: body}, opts...)
		switch {
		case err == nil:
			seq = ack.Sequence
			if s.l.o.FaultSystem != nil {
				err = s.l.o.FaultSystem(kind, name, true)
			}
		case last != nil && overtaken(err):
			// It may be overtaken by its own first try.
			newest, e := s.stream.GetLastMsgForSubject(ctx, subject)
			switch {
			case e == nil && newest.Header.Get(jetstream.MsgIDHeader) == id:
				seq = newest.Sequence
				return nil
			case e == nil:
				return backoff.Permanent(fmt.Errorf("%w: sequence %d", ErrOvertaken, newest.Sequence))
			default:
				err = e
			}
		}
		perhaps = perhaps || err != nil && !refuses(err)
		if err != nil && s.l.o.FaultSystem == nil && !passing(err) {
			return backoff.Permanent(err)
		}
		return err
	}
	if err = try(); err != nil && ctx.Err() == nil && !permanent(err) {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, publishFor) // try uses it too
		defer cancel()
		wait := backoff.NewExponentialBackOff(backoff.WithInitialInterval(20*time.Millisecond), backoff.WithMaxInterval(time.Second))
		err = backoff.Retry(try, backoff.WithContext(wait, ctx))
	}
	switch {
	case err == nil:
		return seq, nil
	case errors.Is(err, ErrOvertaken):
		return 0, fmt.Errorf("store %s: %w", subject, err)
	case perhaps:
		return 0, fmt.Errorf("store %s: not known to be stored: %w", subject, err)
	}
	return 0, fmt.Errorf("store %s: %w", subject, refused(err))
}

func permanent(err error) bool {
	p := new(backoff.PermanentError)
	return errors.As(err, &p)
}

// systemSubject is where a record stands.
func systemSubject(kind, name string) (string, error) {
	for _, token := range []string{kind, name} {
		if err := schemas.CheckToken(token); err != nil {
			return "", fmt.Errorf("record %s.%s: %w", kind, name, err)
		}
	}
	return "sys." + kind + "." + name, nil
}

// Latest is the newest record of a name. It returns [schemas.ErrNotFound].
func (s *System) Latest(ctx context.Context, kind, name string) (Record, error) {
	m, err := s.last(ctx, kind, name)
	if err != nil {
		return Record{}, err
	}
	return Record{Seq: m.Sequence, Stored: m.Time.UTC(), Kind: kind, Name: name, Body: m.Data}, nil
}

func (s *System) last(ctx context.Context, kind, name string) (*jetstream.RawStreamMsg, error) {
	subject, err := systemSubject(kind, name)
	if err != nil {
		return nil, err
	}
	m, err := retry(ctx, s.l, func(ctx context.Context) (*jetstream.RawStreamMsg, error) {
		return s.stream.GetLastMsgForSubject(ctx, subject)
	})
	if errors.Is(err, jetstream.ErrMsgNotFound) {
		return nil, fmt.Errorf("%s: %w", subject, schemas.ErrNotFound)
	}
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", subject, err)
	}
	return m, nil
}

// Watch gives every record of the kinds to take, one at a time and in order,
// from the first on and then as they are stored, over every interruption, until
// ctx is done. known (may be nil) is told true when take has had all that was
// stored when Watch asked, and false while it cannot hear. An error of take is
// logged: the record counts as taken.
func (s *System) Watch(ctx context.Context, kinds []string, known func(bool), take func(context.Context, Record) error) error {
	var subjects []string
	for _, k := range kinds {
		if err := schemas.CheckToken(k); err != nil {
			return fmt.Errorf("watch records of kind %q: %w", k, err)
		}
		subjects = append(subjects, "sys."+k+".*")
	}
	if known == nil {
		known = func(bool) {}
	}
	after := uint64(0)
	for {
		err := s.watch(ctx, subjects, &after, known, take)
		known(false)
		if ctx.Err() != nil {
			return nil
		}
		s.l.o.Log.Warn("watching the system's records was interrupted, reading on", "kinds", kinds, "after", after, "error", err)
		pause(ctx, 250*time.Millisecond)
	}
}

func (s *System) watch(ctx context.Context, subjects []string, after *uint64, known func(bool), take func(context.Context, Record) error) error {
	// The newest according to the stream's leader: the node that feeds the
	// consumer may be behind.
	var newest uint64
	for _, subject := range subjects {
		m, err := retry(ctx, s.l, func(ctx context.Context) (*jetstream.RawStreamMsg, error) {
			return s.stream.GetLastMsgForSubject(ctx, subject)
		})
		if err != nil && !errors.Is(err, jetstream.ErrMsgNotFound) {
			return fmt.Errorf("ask for the newest of %s: %w", subject, err)
		}
		if err == nil {
			newest = max(newest, m.Sequence)
		}
	}
	c, err := retry(ctx, s.l, func(ctx context.Context) (jetstream.Consumer, error) {
		return s.stream.OrderedConsumer(ctx, jetstream.OrderedConsumerConfig{
			FilterSubjects: subjects, DeliverPolicy: jetstream.DeliverByStartSequencePolicy,
			OptStartSeq: *after + 1, InactiveThreshold: 30 * time.Second,
		})
	})
	if err != nil {
		return fmt.Errorf("read the system's records: %w", err)
	}
	it, err := c.Messages(s.l.pulling()...)
	if err != nil {
		return fmt.Errorf("read the system's records: %w", err)
	}
	defer it.Stop()
	defer context.AfterFunc(ctx, it.Stop)()
	caught := *after >= newest
	if caught {
		known(true)
	}
	for {
		m, err := it.Next()
		switch {
		case errors.Is(err, jetstream.ErrNoHeartbeat) && ctx.Err() == nil && s.l.nc.IsConnected():
			continue // it goes on where it was
		case err != nil:
			return err
		}
		md, err := m.Metadata()
		if err != nil {
			return err
		}
		r := Record{Seq: md.Sequence.Stream, Stored: md.Timestamp.UTC(), Body: m.Data()}
		_, rest, _ := strings.Cut(m.Subject(), ".")
		r.Kind, r.Name, _ = strings.Cut(rest, ".")
		if err := take(ctx, r); err != nil && ctx.Err() == nil {
			s.l.o.Log.Error("record not taken", "subject", m.Subject(), "seq", r.Seq, "error", err)
		}
		*after = r.Seq
		if !caught && *after >= newest {
			caught = true
			known(true)
		}
	}
}

// Put stores a content, once, and returns its digest: SHA-256 in hex. One that is
// too large for a record is kept in parts. It returns errors as Append does.
func (s *System) Put(ctx context.Context, content []byte) (digest string, err error) {
	digest = contentDigest(content)
	if len(content) > MaxContent {
		return digest, fmt.Errorf("content %s: %w: %d bytes, may have %d", digest, schemas.ErrTooLarge, len(content), MaxContent)
	}
	// Of a content that is there but is not what it says, the newest counts.
	last := uint64(0)
	switch m, err := s.last(ctx, contentKind, digest); {
	case err == nil:
		if _, err := s.content(ctx, m, digest); err == nil {
			return digest, nil
		}
		last = m.Sequence
	case !errors.Is(err, schemas.ErrNotFound):
		return digest, err
	}
	var header nats.Header
	body := content
	if len(content) > contentPart {
		var parts []string
		for rest := content; len(rest) > 0; {
			part := rest[:min(len(rest), contentPart)]
			rest = rest[len(part):]
			d, err := s.Put(ctx, part)
			if err != nil {
				return digest, err
			}
			parts = append(parts, d)
		}
		header, body = nats.Header{headerParts: {fmt.Sprint(len(parts))}}, []byte(strings.Join(parts, "\n"))
	}
	_, err = s.append(ctx, contentKind, digest, body, header, &last)
	if errors.Is(err, ErrOvertaken) { // by another that stores the same
		_, err = s.Get(ctx, digest)
	}
	return digest, err
}

// Get reads a content by its digest and checks that it is that. It returns
// [schemas.ErrNotFound].
func (s *System) Get(ctx context.Context, digest string) ([]byte, error) {
	m, err := s.last(ctx, contentKind, digest)
	if err != nil {
		return nil, err
	}
	return s.content(ctx, m, digest)
}

func (s *System) content(ctx context.Context, m *jetstream.RawStreamMsg, digest string) ([]byte, error) {
	body := m.Data
	if m.Header.Get(headerParts) != "" {
		parts := strings.Split(string(body), "\n")
		if len(parts) > systemMaxPart {
			return nil, fmt.Errorf("content %s has %d parts, may have %d", digest, len(parts), systemMaxPart)
		}
		body = nil
		for _, d := range parts {
			p, err := s.last(ctx, contentKind, d)
			if err != nil {
				return nil, fmt.Errorf("part of content %s: %w", digest, err)
			}
			body = append(body, p.Data...)
		}
	}
	if got := contentDigest(body); got != digest {
		return nil, fmt.Errorf("content %s is damaged: its digest is %s", digest, got)
	}
	return body, nil
}

func contentDigest(b []byte) string {
	sum := sha256.Sum256(b)
	return hex.EncodeToString(sum[:])
}
