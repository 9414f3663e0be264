package test

import (
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"waybill.dev/test/gateway"
	"waybill.dev/test/peers"
	"waybill.dev/test/upstream"
)

const cuts = 1000

// A client whose connection is cut at any byte, 1,000 times in all, in the
// middle of a call's stream, of its session's GET stream, and of a stream that
// it had resumed, misses nothing, hears nothing twice and nothing of anybody
// else, when it goes on after the last event that it has. What others name it
// by is unknown to the gateway.
func TestResume(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	u := upstream.Start(t)
	g := gateway.Start(t, gateway.Config(`
tenants: [{id: acme}]
agents:
  - {id: researcher, tenant: acme, token_sha256: `+fmt.Sprintf("%x", sha256.Sum256([]byte("mine")))+`}
  - {id: rival, tenant: acme, token_sha256: `+fmt.Sprintf("%x", sha256.Sum256([]byte("theirs")))+`}
servers:
`+gateway.Native("counting", u.URL, "")))
	end := peers.Endpoint{URL: g.URL + "/mcp/counting", Token: "mine"}

	var done atomic.Int64 // cuts that were resumed
	var strangers atomic.Int64
	var clients sync.WaitGroup
	for n := range 8 {
		clients.Go(func() {
			c := cutter{t: t, end: end, chance: rand.New(rand.NewPCG(seed, uint64(n))), done: &done, strangers: &strangers}
			for i := 0; done.Load() < cuts && !t.Failed(); i++ {
				if err := c.session(t.Context(), fmt.Sprintf("%d-%d", n, i)); err != nil {
					t.Errorf("client %d, session %d: %v", n, i, err)
				}
			}
		})
	}
	clients.Wait()
	t.Logf("%d cuts, %d of them tried by somebody else", done.Load(), strangers.Load())
	if strangers.Load() == 0 {
		t.Error("nobody tried to resume another's stream")
	}
	if err := g.Stop(); err != nil {
		t.Errorf("stopping: %v", err)
	}
	if n := u.Sessions(); n.Opened == 0 || n.Open != 0 {
		t.Errorf("upstream sessions: %d opened, %d open at the end", n.Opened, n.Open)
	}
}

// cutter is a client that is cut off again and again.
type cutter struct {
	t               *testing.T
	end             peers.Endpoint
	chance          *rand.Rand
	done, strangers *atomic.Int64
}

// session calls tools in a session of its own, one after the other, and hears
// the session's GET stream beside them.
func (c *cutter) session(ctx context.Context, key string) error {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Minute)
	defer cancel()
	s, _, err := peers.OpenLegacy(ctx, c.end, "2025-11-25", struct{}{})
	if err != nil {
		return err
	}
	transport := &http.Transport{} // its connections are cut
	defer transport.CloseIdleConnections()
	s.Client = &http.Client{Transport: transport}

	const messages = 10
	var beside sync.WaitGroup
	var heard error
	stream, err := s.Listen(ctx, "")
	if err != nil {
		return err
	}
	chance := rand.New(rand.NewPCG(c.chance.Uint64(), 1))
	beside.Go(func() {
		heard = c.follow(ctx, s, stream, chance, key, messages)
	})
	tool := func(name, key string) (*peers.LegacyStream, error) {
		return s.Request(ctx, "tools/call", map[string]any{"name": name, "arguments": upstream.Args{Key: key, Progress: messages, Wait: 60}})
	}
	notified := make(chan error, 1)
	go func() {
		stream, err := tool("notify", key)
		if err == nil {
			_, err = stream.Answer()
			err = errors.Join(err, stream.Close())
		}
		notified <- err
	}()
	for i := range 2 {
		key := fmt.Sprintf("%s-%d", key, i)
		stream, err := tool("count", key)
		if err == nil {
			err = c.follow(ctx, s, stream, c.chance, key, messages)
		}
		if err != nil {
			return fmt.Errorf("call %s: %w", key, err)
		}
	}
	if err := <-notified; err != nil {
		return fmt.Errorf("notify: %w", err)
	}
	beside.Wait()
	if heard != nil {
		return fmt.Errorf("GET stream: %w", heard)
	}
	if status, err := s.Delete(ctx); err != nil || status >= 300 {
		return fmt.Errorf("DELETE: status %d, %v", status, err)
	}
	return nil
}

// follow reads a stream to its end, cut again and again: numbered messages about
// key, and of a call the answer.
func (c *cutter) follow(ctx context.Context, s *peers.LegacySession, stream *peers.LegacyStream, chance *rand.Rand, key string, messages int) error {
	id := stream.ID // empty for the GET stream, which has no answer
	next := 1
	last := ""
	for {
		if stream.Status != http.StatusOK {
			return fmt.Errorf("resumed after %q: HTTP %d", last, stream.Status)
		}
		stream.CutAfter(int64(60 + chance.IntN(900)))
		for {
			_, m, err := stream.Message()
			if stream.LastID != "" {
				last = stream.LastID
			}
			if errors.Is(err, peers.ErrCut) {
				break
			}
			if err != nil {
				return fmt.Errorf("after %q, with message %d to come: %w", last, next, err)
			}
			if m.Method == "" {
				if string(m.ID) != string(id) || m.Error != nil || !strings.Contains(string(m.Result), "count "+key+" for the 1. time") {
					return fmt.Errorf("answer %s %s, error %v", m.ID, m.Result, m.Error)
				}
				if next != messages+1 {
					return fmt.Errorf("the answer came with message %d to come", next)
				}
				if err := stream.Close(); err != nil {
					return err
				}
				rest, err := s.Listen(ctx, last)
				if err != nil {
					return err
				}
				if rest.Status != http.StatusNoContent {
					return fmt.Errorf("resumed after the answer: HTTP %d", rest.Status)
				}
				return rest.Close()
			}
			var p struct {
				ProgressToken string
				Progress      int
				Data          struct {
					Key string
					N   int
				}
			}
			if err := json.Unmarshal(m.Params, &p); err != nil {
				return err
			}
			if got := p.ProgressToken + p.Data.Key; got != key {
				return fmt.Errorf("a message of %q among those of %q: %s", got, key, m.Params)
			}
			if n := p.Progress + p.Data.N; n != next {
				return fmt.Errorf("message %d, want %d", n, next)
			}
			if next++; len(id) == 0 && next == messages+1 {
				return stream.Close()
			}
		}
		if last == "" {
			return errors.New("cut before the first event with an id, within 60 bytes")
		}
		if chance.IntN(8) == 0 {
			if err := c.refused(ctx, s, last); err != nil {
				return err
			}
		}
		var err error
		if stream, err = s.Listen(ctx, last); err != nil {
			return err
		}
		c.done.Add(1)
	}
}

// refused tries to resume a stream as somebody else, and in another session of
// one's own.
func (c *cutter) refused(ctx context.Context, s *peers.LegacySession, last string) error {
	other, _, err := peers.OpenLegacy(ctx, c.end, "2025-11-25", struct{}{})
	if err != nil {
		return err
	}
	thief := &peers.LegacySession{Endpoint: c.end, ID: s.ID, Revision: s.Revision}
	thief.Endpoint.Token = "theirs"
	for who, as := range map[string]struct {
		*peers.LegacySession
		status int
	}{"another principal": {thief, http.StatusNotFound}, "another session": {other, http.StatusBadRequest}} {
		stream, err := as.Listen(ctx, last)
		if err != nil {
			return err
		}
		if err := stream.Close(); err != nil && !errors.Is(err, io.EOF) {
			return err
		}
		if stream.Status != as.status {
			return fmt.Errorf("%s resumed after %q: HTTP %d", who, last, stream.Status)
		}
	}
	c.strangers.Add(1)
	_, err = other.Delete(ctx)
	return err
}
