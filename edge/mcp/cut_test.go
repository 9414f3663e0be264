package mcp_test

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"waybill.dev/schemas"
	"waybill.dev/schemas/sse"
)

// TestCut: clients that are cut off at random points, in the middle of a call's
// stream, of the session's, and between the two, and come back with
// Last-Event-ID to either of two gateways on one log: they get each message
// once, in order, and nothing of another stream or session. Another principal
// gets nothing at all.
func TestCut(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	log := newMemory(t, func(ctx context.Context, e schemas.Event, emit schemas.Emit) error {
		r := rand.New(rand.NewPCG(seed, e.Seq))
		if e.Data.(*schemas.Requested).Method == "initialize" {
			return answering(initialized)(ctx, e, emit)
		}
		beside := e
		beside.Call, beside.Root, beside.Edge = "", "", ""
		for n := range r.IntN(8) {
			pause(r)
			text := fmt.Appendf(nil, `{"jsonrpc":"2.0","method":"notifications/message","params":{"data":"%s %d %s"}}`, e.Call, n, strings.Repeat("x", r.IntN(200)))
			var err error
			switch r.IntN(5) {
			case 0:
				_, err = emit(ctx, beside.Next(&schemas.Notified{ID: fmt.Sprint(e.Call, n)}, text))
			case 1:
				_, err = emit(ctx, e.Next(&schemas.Notified{ID: fmt.Sprint(e.Call, n)}, text))
			case 2:
				_, err = emit(ctx, beside.Next(&schemas.Notified{ID: fmt.Sprint(e.Call, n), ToServer: true}, text))
			default:
				_, err = emit(ctx, e.Next(&schemas.Progressed{Index: n}, text))
			}
			if err != nil {
				return err
			}
		}
		pause(r)
		return answering(fmt.Sprintf(`{"jsonrpc":"2.0","id":%q,"result":{"of":%q}}`, e.Call, e.Call))(ctx, e, emit)
	})
	var addrs []string
	for range 2 {
		addr, _ := up(t, log.options())
		addrs = append(addrs, addr)
	}
	const sessions, calls = 6, 40
	var all sync.WaitGroup
	var mu sync.Mutex
	cuts := 0
	for n := range sessions {
		all.Go(func() {
			r := rand.New(rand.NewPCG(seed, 1e6+uint64(n)))
			c := open(t, addrs[0], []string{"alice", "bob", "eve"}[n%3])
			stranger := *c
			stranger.token = []string{"bob", "eve", "alice"}[n%3]
			mine := func(e schemas.Event) bool {
				return e.Session == schemas.NewSessionKey(people[c.token].Tenant, people[c.token].Agent, c.session)
			}
			cut := 0
			position := "" // in the session's stream
			patience := 5 * time.Millisecond
			// read takes what comes up to a random number of bytes.
			read := func(method, last, body string, most int) (seen []sse.Event, whole bool) {
				ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
				defer cancel()
				if method == "GET" && last == position {
					// The session's stream may have nothing to say.
					ctx, cancel = context.WithTimeout(ctx, patience)
					defer cancel()
				}
				c.addr = addrs[r.IntN(len(addrs))]
				res := c.try(ctx, method, last, body)
				if res == nil {
					return nil, false // cut before the header
				}
				defer res.Body.Close()
				if res.StatusCode != 200 {
					b, _ := io.ReadAll(res.Body)
					t.Errorf("%s %s: %s %s", method, last, res.Status, b)
					return nil, true
				}
				in := &io.LimitedReader{R: res.Body, N: int64(most)}
				if res.Header.Get("Content-Type") == "application/json" {
					b, _ := io.ReadAll(res.Body)
					return []sse.Event{{Data: b}}, true
				}
				for e, err := range sse.Read(in, 0) {
					if err != nil {
						break
					}
					if e.ID != "" || e.Data != nil {
						seen = append(seen, e)
					}
				}
				if in.N == 0 {
					cut++
				}
				return seen, in.N > 0
			}
			var heard []sse.Event // of the session's stream
			hear := func(most int) {
				seen, _ := read("GET", position, "", most)
				if patience *= 2; len(seen) > 0 || patience > 2*time.Second {
					patience = 5 * time.Millisecond // a slow machine gets more, in the end
				}
				for _, e := range seen {
					position = e.ID
					if len(e.Data) > 0 {
						heard = append(heard, e)
					}
				}
			}
			for id := range calls {
				var told []sse.Event
				seen, whole := read("POST", "", fmt.Sprintf(`{"jsonrpc":"2.0","id":"%d/%d","method":"tools/call","params":{"name":"a"}}`, n, id), 1+r.IntN(900))
				told = append(told, seen...)
				for tries := 0; !done(told) && len(told) > 0; tries++ {
					if whole {
						t.Errorf("ended without an answer: %+v", told)
						return
					}
					if r.IntN(4) == 0 {
						hear(1 + r.IntN(600))
					}
					last := told[len(told)-1].ID
					if res := stranger.do(context.Background(), "GET", last, ""); res.StatusCode != 404 {
						t.Errorf("another principal's resume: %s", res.Status)
						res.Body.Close()
					} else {
						res.Body.Close()
					}
					seen, whole = read("GET", last, "", 1+r.IntN(900))
					told = append(told, seen...)
				}
				if len(told) == 0 {
					continue // cut before the first event: there is nothing to come back with
				}
				// What the log has of this call is what the client was told.
				var anchor schemas.Event
				var want []string
				for _, e := range log.all() {
					if q, ok := e.Data.(*schemas.Requested); ok && mine(e) && q.Method == "tools/call" && bytes.Contains(e.Body, fmt.Appendf(nil, `"id":"%d/%d"`, n, id)) {
						anchor = e
					}
				}
				for _, e := range log.all() {
					if e.Call == anchor.Call && e.Kind().ToEdge() {
						want = append(want, strings.Replace(string(e.Body), fmt.Sprintf(`"id":%q`, e.Call), fmt.Sprintf(`"id":"%d/%d"`, n, id), 1))
					}
				}
				var got []string
				for _, e := range told {
					if len(e.Data) > 0 {
						got = append(got, string(e.Data))
					}
					if e.ID != "" && !strings.HasPrefix(e.ID, fmt.Sprint(anchor.Seq, "-")) {
						t.Errorf("id %s in the stream of %d", e.ID, anchor.Seq)
					}
				}
				if !slices.Equal(got, want) {
					t.Errorf("told\n%q\nwant\n%q", got, want)
				}
			}
			log.settled(mine)
			var want []string
			for _, e := range log.all() {
				if d, ok := e.Data.(*schemas.Notified); ok && mine(e) && e.Call == "" && !d.ToServer {
					want = append(want, string(e.Body))
				}
			}
			for len(heard) < len(want) && !t.Failed() {
				patience = max(patience, 100*time.Millisecond)
				hear(1 + r.IntN(600))
			}
			var got []string
			for _, e := range heard {
				got = append(got, string(e.Data))
			}
			if !slices.Equal(got, want) {
				t.Errorf("heard\n%q\nwant\n%q", got, want)
			}
			mu.Lock()
			defer mu.Unlock()
			cuts += cut
		})
	}
	all.Wait()
	t.Logf("%d cuts", cuts)
	for _, e := range log.all() {
		if e.Kind() == schemas.KindCancel {
			t.Errorf("a client that left cancelled a call: %+v", e)
		}
	}
}

// pause gives others a turn, as often as not.
func pause(r *rand.Rand) {
	for range r.IntN(20) {
		<-time.After(time.Microsecond)
	}
}

func done(told []sse.Event) bool {
	return len(told) > 0 && bytes.Contains(told[len(told)-1].Data, []byte(`"result"`))
}
