package mcp_test

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"net"
	"sync"
	"testing"

	"waybill.dev/edge"
	"waybill.dev/edge/mcp"
	"waybill.dev/schemas"
)

// memory is a log that keeps what the real one promises: one order, each ID
// once, what is stored is heard. rest is the rest of the gateway: it carries
// out what is requested.
type memory struct {
	rest schemas.Handler

	mu      sync.Mutex
	events  []schemas.Event
	ids     map[schemas.EventID]uint64
	changed chan struct{}
	work    sync.WaitGroup
}

func newMemory(t *testing.T, rest schemas.Handler) *memory {
	m := &memory{rest: rest, ids: map[schemas.EventID]uint64{}, changed: make(chan struct{})}
	t.Cleanup(m.work.Wait)
	return m
}

func (m *memory) store(_ context.Context, e schemas.Event) (schemas.Receipt, error) {
	if err := e.Check(); err != nil {
		return schemas.Receipt{}, err
	}
	if e.Time.IsZero() {
		e.Time = noon
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if seq := m.ids[e.ID()]; seq != 0 {
		return schemas.Receipt{Seq: seq, Duplicate: true}, nil
	}
	e.Seq = uint64(len(m.events)) + 1
	m.ids[e.ID()] = e.Seq
	m.events = append(m.events, e)
	close(m.changed)
	m.changed = make(chan struct{})
	return schemas.Receipt{Seq: e.Seq}, nil
}

func (m *memory) since(after uint64) ([]schemas.Event, <-chan struct{}) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if after > uint64(len(m.events)) {
		return nil, m.changed
	}
	return m.events[after:], m.changed
}

func (m *memory) all() []schemas.Event { all, _ := m.since(0); return all }

// settled waits until every call among these events has ended.
func (m *memory) settled(these func(schemas.Event) bool) {
	for {
		all, changed := m.since(0)
		open := map[schemas.CallID]bool{}
		for _, e := range all {
			switch {
			case !these(e):
			case e.Kind() == schemas.KindRequested:
				open[e.Call] = true
			case e.Kind().Ends():
				delete(open, e.Call)
			}
		}
		if len(open) == 0 {
			return
		}
		<-changed
	}
}

// ask is what bus.Asker.Ask is.
func (m *memory) ask(ctx context.Context, e schemas.Event, emit schemas.Emit) error {
	r, err := m.store(ctx, e)
	if err != nil {
		return err
	}
	e.Seq = r.Seq
	m.work.Go(func() { _ = m.rest(context.WithoutCancel(ctx), e, m.store) })
	if _, err = emit(ctx, e); err == nil {
		err = m.follow(ctx, e, r.Seq, emit)
	}
	if why := context.Cause(ctx); err != nil && !errors.Is(why, schemas.ErrDetached) {
		c := e.Next(&schemas.Cancel{Reason: fmt.Sprint(why)}, nil)
		_, _ = m.store(ctx, c)
	}
	return err
}

// follow is what bus.Asker.Follow is.
func (m *memory) follow(ctx context.Context, of schemas.Event, after uint64, emit schemas.Emit) error {
	for {
		next, changed := m.since(after)
		for _, e := range next {
			after = e.Seq
			if e.Tenant != of.Tenant || e.Session != of.Session || e.Call != of.Call {
				continue
			}
			if of.Call == "" {
				switch e.Kind() {
				case schemas.KindAsked, schemas.KindNotified, schemas.KindClosed, schemas.KindAttached:
				default:
					continue
				}
			}
			if _, err := emit(ctx, e); err != nil {
				return err
			}
			if e.Kind().Ends() || e.Kind() == schemas.KindClosed {
				return nil
			}
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

func (m *memory) load(_ context.Context, seq uint64) (e schemas.Event, err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if seq == 0 || seq > uint64(len(m.events)) {
		return e, schemas.ErrNotFound
	}
	return m.events[seq-1], nil
}

func (m *memory) find(fits func(schemas.Event) bool) (found schemas.Event, err error) {
	err = schemas.ErrNotFound
	for _, e := range m.all() {
		if fits(e) {
			found, err = e, nil
		}
	}
	return found, err
}

func (m *memory) latest(_ context.Context, t schemas.Tenant, s schemas.SessionKey, k schemas.Kind) (schemas.Event, error) {
	return m.find(func(e schemas.Event) bool { return e.Tenant == t && e.Session == s && e.Kind() == k })
}

func (m *memory) scan(_ context.Context, t schemas.Tenant, s schemas.SessionKey, k schemas.Kind, after uint64) iter.Seq2[schemas.Event, error] {
	return func(yield func(schemas.Event, error) bool) {
		next, _ := m.since(after)
		for _, e := range next {
			if e.Tenant == t && e.Session == s && e.Kind() == k && !yield(e, nil) {
				return
			}
		}
	}
}

func (m *memory) asked(_ context.Context, t schemas.Tenant, s schemas.SessionKey, id string) (schemas.Event, error) {
	return m.find(func(e schemas.Event) bool {
		a, ok := e.Data.(*schemas.Asked)
		return ok && e.Tenant == t && e.Session == s && a.ID == id
	})
}

func (m *memory) sessions(ctx context.Context, emit schemas.Emit) error {
	for after := uint64(0); ; {
		next, changed := m.since(after)
		for _, e := range next {
			after = e.Seq
			if k := e.Kind(); k == schemas.KindOpened || k == schemas.KindClosed {
				if _, err := emit(ctx, e); err != nil {
					return err
				}
			}
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return nil
		}
	}
}

// options are an adapter's on this log.
func (m *memory) options() mcp.Options {
	return mcp.Options{
		Ask: m.ask, Store: m.store, Follow: m.follow, Load: m.load, Latest: m.latest, Asked: m.asked, Scan: m.scan, Sessions: m.sessions, Edge: "e0",
	}
}

// Tokens of two tenants' agents.
var people = map[string]edge.Principal{
	"alice": {Tenant: "acme", Agent: "alice"},
	"bob":   {Tenant: "acme", Agent: "bob"},
	"eve":   {Tenant: "evil", Agent: "alice"},
}

// up serves an adapter of these options until the test ends or stop is called.
func up(t *testing.T, o mcp.Options) (addr string, stop func()) {
	t.Helper()
	a := mcp.New(o)
	eo := edge.Options{Anonymous: &edge.Principal{Tenant: "acme", Agent: "researcher"}, Tokens: map[[32]byte]edge.Principal{}}
	for token, p := range people {
		eo.Tokens[hash(token)] = p
	}
	s, err := edge.New(eo, a.Routes()...)
	if err != nil {
		t.Fatal(err)
	}
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ran := make(chan error, 1)
	go func() { ran <- a.Run(ctx) }()
	shut := run(t, s, ln)
	stop = sync.OnceFunc(func() {
		shut()
		cancel()
		if err := <-ran; err != nil {
			t.Error(err)
		}
	})
	t.Cleanup(stop)
	return ln.Addr().String(), stop
}
