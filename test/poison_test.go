package test

import (
	"context"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"waybill.dev/schemas"
	"waybill.dev/test/gateway"
)

// The most that the gateway lets pass of a name and of Mcp-Param headers, of a
// character that is one byte on the wire and six in the JSON of an envelope.
var (
	poisonName  = strings.Repeat("<", 4<<10)
	poisonParam = strings.Repeat("<", 8<<10-len("Mcp-Param-P"))
)

// TestPoison: requests whose envelope is as large as can be sent are refused in
// words, or carried out, each in its own time. They hold up nobody else, the
// gateway stays ready, and none of them becomes a message that no worker can
// take.
func TestPoison(t *testing.T) {
	const (
		parallel = 64
		own      = 20 * time.Second * slowdown // a poisonous request's
		ordinary = 2 * time.Second * slowdown  // another caller's
		token    = "of-another-caller-7c1d0e5ab2f94c63"
	)
	up := newRawServer(t)
	up.serve(answering(soundAnswer))
	g := gateway.Start(t, gateway.Config("servers:\n"+gateway.Native("raw", up.url(), "")+`
tenants: [{id: acme}, {id: other}]
agents: [{id: researcher, tenant: acme}, {id: second, tenant: other, token_sha256: `+fmt.Sprintf("%x", sha256.Sum256([]byte(token)))+`}]
auth: {anonymous: researcher}
`))

	// other is a call of another tenant, and a look at whether all is ready.
	other := func() error {
		began := time.Now()
		ctx, cancel := context.WithTimeout(t.Context(), ordinary)
		defer cancel()
		a, err := g.Post(ctx, "raw", "tools/call", "a", soundBody, "Authorization: Bearer "+token)
		if err != nil {
			return fmt.Errorf("another caller, after %s: %w", time.Since(began), err)
		}
		body := string(a.Body)
		if strings.HasPrefix(a.Header.Get("Content-Type"), "text/event-stream") { // which is how one comes that took a while
			if all := messages(body); len(all) == 1 {
				body = all[0]
			}
		}
		if want := strings.ReplaceAll(soundAnswer, `"$CALL"`, "1"); a.Status != http.StatusOK || body != want {
			return fmt.Errorf("another caller: %d %s", a.Status, clip(string(a.Body)))
		}
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, g.Admin+"/readyz", nil)
		if err != nil {
			return err
		}
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			return fmt.Errorf("readyz: %w", err)
		}
		_ = resp.Body.Close()
		if resp.StatusCode != http.StatusOK {
			return fmt.Errorf("readyz: %s", resp.Status)
		}
		return nil
	}
	if err := other(); err != nil { // which warms up
		t.Fatal(err)
	}

	kinds := []struct {
		n                  int
		kind, method, name string
		param              int    // bytes of a Mcp-Param header
		less               int    // as many fewer for each further request
		some               string // one of the answers must contain this
	}{
		{300, "name and params", "tools/call", poisonName, len(poisonParam), 0, "request_too_large"},
		{300, "listening", "subscriptions/listen", "", len(poisonParam), 0, "request_too_large"},
		// Among these are envelopes that a header of JetStream can just hold,
		// but not with the little that an authorization adds.
		{300, "at the brink", "tools/call", poisonName, 6850, 1, "request_too_large"},
		// These fit, and are carried out.
		{60, "name", "tools/call", poisonName, 0, 0, `"result"`},
		{60, "params", "tools/call", "a", 4 << 10, 0, `"result"`},
	}
	var turns []struct{ kind, nth int } // mixed
	for i := range kinds[0].n {
		for k := range kinds {
			if i < kinds[k].n {
				turns = append(turns, struct{ kind, nth int }{k, i})
			}
		}
	}
	poison := func(kind, nth int) (answer string, err error) {
		k := kinds[kind]
		ctx, cancel := context.WithTimeout(t.Context(), own)
		defer cancel()
		params := gateway.Meta
		if k.name != "" {
			params = `"name":"` + k.name + `",` + params
		}
		began := time.Now()
		a, err := g.Post(ctx, "raw", k.method, k.name, `{"jsonrpc":"2.0","id":1,"method":"`+k.method+`","params":{`+params+`}}`,
			"Waybill-Session: poison", "Mcp-Param-P: "+poisonParam[:k.param-k.less*nth])
		if err != nil {
			return "", fmt.Errorf("%s: not answered after %s: %w", k.kind, time.Since(began), err)
		}
		last := string(a.Body)
		if strings.HasPrefix(a.Header.Get("Content-Type"), "text/event-stream") {
			all := messages(last)
			if len(all) == 0 {
				return "", fmt.Errorf("%s: an empty stream", k.kind)
			}
			last = all[len(all)-1]
		}
		var m struct {
			Result json.RawMessage
			Error  *struct{ Message string }
		}
		if err := json.Unmarshal([]byte(last), &m); err != nil {
			return "", fmt.Errorf("%s: %d %s: %w", k.kind, a.Status, clip(last), err)
		}
		clear := a.Status >= 400 && a.Status < 500 && m.Error != nil && m.Error.Message != ""
		if normal := a.Status == http.StatusOK && m.Result != nil; !clear && !normal {
			return "", fmt.Errorf("%s: %d %s", k.kind, a.Status, clip(last))
		}
		return last, nil
	}

	var wg, watch sync.WaitGroup
	over := make(chan struct{})
	watch.Go(func() {
		again := time.NewTicker(50 * time.Millisecond)
		defer again.Stop()
		for {
			if err := other(); err != nil {
				t.Error("meanwhile:", err)
				return
			}
			select {
			case <-over:
				return
			case <-again.C:
			}
		}
	})
	var next, failed atomic.Int64
	found := make([]atomic.Int64, len(kinds))
	for range parallel {
		wg.Go(func() {
			for i := int(next.Add(1)) - 1; i < len(turns) && failed.Load() < 5; i = int(next.Add(1)) - 1 {
				answer, err := poison(turns[i].kind, turns[i].nth)
				if err != nil {
					failed.Add(1)
					t.Error(err)
				} else if strings.Contains(answer, kinds[turns[i].kind].some) {
					found[turns[i].kind].Add(1)
				}
			}
		})
	}
	wg.Wait()
	close(over)
	watch.Wait()
	for i, k := range kinds {
		if found[i].Load() == 0 && failed.Load() == 0 {
			t.Errorf("%s: none was answered with %s", k.kind, k.some)
		}
	}

	// Whatever of it is in the log has come to its ending, and so there is
	// nothing left that could become a dead letter later.
	open := func() (n int) {
		calls := map[schemas.CallID]bool{}
		for _, e := range g.Session(schemas.NewSessionKey("acme", "researcher", "poison")) {
			if e.Kind() == schemas.KindRequested {
				calls[e.Call] = true
			}
			if e.Kind().Ends() {
				delete(calls, e.Call)
			}
		}
		return len(calls)
	}
	if !becomes(20*time.Second*slowdown, func() bool { return open() == 0 }) {
		t.Errorf("%d calls have no ending", open())
	}
	if err := other(); err != nil {
		t.Error("afterwards:", err)
	}
	if strings.Contains(g.Output(), "dead letter") {
		t.Error("there are dead letters")
	}
}
