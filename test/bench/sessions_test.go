package bench

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"waybill.dev/test/gateway"
	"waybill.dev/test/peers"
)

// legacyUpstream answers as cheaply as net/http can, with sessions of 2025-11-25
// and without (2026-07-28): a list of ten tools, and to calls their arguments.
func legacyUpstream(ctx context.Context) error {
	var tools []string
	for i := range 10 {
		tools = append(tools, fmt.Sprintf(`{"name":"tool_%d","description":"Does the thing with the number %d","inputSchema":{"type":"object","properties":{"text":{"type":"string"}}}}`, i, i))
	}
	return listen(ctx, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method != http.MethodPost {
			w.WriteHeader(http.StatusMethodNotAllowed)
			return
		}
		var m struct {
			ID     json.RawMessage
			Method string
			Params struct{ Arguments json.RawMessage }
		}
		if err := json.NewDecoder(r.Body).Decode(&m); err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		if m.ID == nil {
			w.WriteHeader(http.StatusAccepted)
			return
		}
		result := `{"resultType":"complete","content":[],"structuredContent":` + string(m.Params.Arguments) + `}`
		switch m.Method {
		case "initialize":
			w.Header().Set("Mcp-Session-Id", "one-for-all")
			result = `{"protocolVersion":"2025-11-25","capabilities":{"tools":{}},"serverInfo":{"name":"bench","version":"1"}}`
		case "server/discover":
			result = `{"resultType":"complete","supportedVersions":["2026-07-28"],"capabilities":{"tools":{}},"ttlMs":0,"cacheScope":"private"}`
		case "tools/list":
			result = `{"resultType":"complete","ttlMs":0,"cacheScope":"private","tools":[` + strings.Join(tools, ",") + `]}`
		}
		w.Header().Set("Content-Type", "application/json")
		_, _ = fmt.Fprintf(w, `{"jsonrpc":"2.0","id":%s,"result":%s}`, m.ID, result)
	}))
}

// BenchmarkSessions prints what the other ways of calling cost, beside the plain
// call of revision 2026-07-28: in a session, a list of all servers, and one call
// of many tools.
func BenchmarkSessions(b *testing.B) {
	const servers = 20
	translated := ""
	config := "fanout: {tools: [call_many]}\nservers:\n"
	for i := range servers {
		addr := gateway.FreeAddr(b)
		p := gateway.Child(b, "legacy-upstream", envAddr+"="+addr)
		if _, err := p.Await(b.Context(), "listening"); err != nil {
			b.Fatal(err)
		}
		config += gateway.Native(fmt.Sprintf("up%d", i), "http://"+addr+"/mcp", "idempotent: ['*'], concurrency: 1024")
		if i == 0 { // once more, as a server of one era only
			for _, era := range []string{"legacy", "modern"} {
				translated += fmt.Sprintf("  - {name: %s, mcp: {url: 'http://%s/mcp', era: %s}, idempotent: ['*'], concurrency: 1024}\n", era, addr, era)
			}
		}
	}
	g := gateway.Start(b, gateway.Config(config))
	gt := gateway.Start(b, gateway.Config("servers:\n"+translated))
	opened := func(url string) http.Header {
		session, _, err := peers.OpenLegacy(b.Context(), peers.Endpoint{URL: url}, "2025-11-25", struct{}{})
		if err != nil {
			b.Fatal(err)
		}
		return http.Header{"Mcp-Session-Id": {session.ID}, "Mcp-Protocol-Version": {"2025-11-25"}}
	}

	arguments := `{"text":"` + strings.Repeat("x", 800) + `"}`
	many := make([]string, servers)
	for i := range many {
		many[i] = fmt.Sprintf(`{"tool":"up%d__tool_1","arguments":%s}`, i, arguments)
	}
	modern := func(method, name string) http.Header {
		h := http.Header{"Mcp-Protocol-Version": {"2026-07-28"}, "Mcp-Method": {method}}
		if name != "" {
			h["Mcp-Name"] = []string{name}
		}
		return h
	}
	ways := []struct {
		name       string
		g          *gateway.Gateway
		path, body string
		header     http.Header
		want       string
	}{
		{"call", g, "/mcp/up0", `"tools/call","params":{"name":"tool_1","arguments":` + arguments + `,` + gateway.Meta + `}`, modern("tools/call", "tool_1"), `"structuredContent"`},
		{"call in a session", g, "/mcp/up0", `"tools/call","params":{"name":"tool_1","arguments":` + arguments + `}`, opened(g.URL + "/mcp/up0"), `"structuredContent"`},
		{"modern at legacy", gt, "/mcp/legacy", `"tools/call","params":{"name":"tool_1","arguments":` + arguments + `,` + gateway.Meta + `}`, modern("tools/call", "tool_1"), `"structuredContent"`},
		{"legacy at modern", gt, "/mcp/modern", `"tools/call","params":{"name":"tool_1","arguments":` + arguments + `}`, opened(gt.URL + "/mcp/modern"), `"structuredContent"`},
		{"list of 20 servers", g, "/mcp", `"tools/list","params":{` + gateway.Meta + `}`, modern("tools/list", ""), `"up19__tool_9"`},
		{"call_many of 20", g, "/mcp", `"tools/call","params":{"name":"waybill__call_many","arguments":{"calls":[` + strings.Join(many, ",") + `]},` + gateway.Meta + `}`, modern("tools/call", "waybill__call_many"), `"failed":0`},
	}
	var ids atomic.Int64
	fmt.Printf("\n%-20s %5s %9s %9s %9s %8s\n", "", "conns", "per s", "p50 µs", "p99 µs", "CPU µs")
	for _, way := range ways {
		for _, conns := range []int{1, 32} {
			client := &http.Client{Transport: &http.Transport{MaxIdleConnsPerHost: conns, MaxConnsPerHost: conns}}
			once := func() error {
				// An id may be in flight once in its session.
				req, err := http.NewRequestWithContext(b.Context(), http.MethodPost, way.g.URL+way.path, strings.NewReader(fmt.Sprintf(`{"jsonrpc":"2.0","id":%d,"method":%s}`, ids.Add(1), way.body)))
				if err != nil {
					return err
				}
				req.Header = way.header.Clone()
				req.Header.Set("Content-Type", "application/json")
				req.Header.Set("Accept", "application/json, text/event-stream")
				resp, err := client.Do(req)
				if err != nil {
					return err
				}
				answer, err := io.ReadAll(resp.Body)
				_ = resp.Body.Close()
				if err == nil && (resp.StatusCode != http.StatusOK || !bytes.Contains(answer, []byte(way.want))) {
					err = fmt.Errorf("%s: HTTP %d %.500s", way.name, resp.StatusCode, answer)
				}
				return err
			}
			if way.path == "/mcp" {
				conns = (conns + 3) / 4 // each of twenty calls
			}
			run := func(d time.Duration) []time.Duration {
				var mu sync.Mutex
				var all []time.Duration
				var callers sync.WaitGroup
				until := time.Now().Add(d)
				for range conns {
					callers.Go(func() {
						for {
							start := time.Now()
							if start.After(until) {
								return
							}
							if err := once(); err != nil {
								b.Error(err)
								return
							}
							took := time.Since(start)
							mu.Lock()
							all = append(all, took)
							mu.Unlock()
						}
					})
				}
				callers.Wait()
				return all
			}
			run(window / 6)
			cpu, start := cpuSeconds(b, way.g.Pid()), time.Now()
			all := run(window)
			took := time.Since(start)
			if len(all) == 0 {
				b.Fatalf("%s: none came through", way.name)
			}
			slices.Sort(all)
			fmt.Printf("%-20s %5d %9.0f %9d %9d %8.0f\n", way.name, conns, float64(len(all))/took.Seconds(),
				all[len(all)/2].Microseconds(), all[len(all)*99/100].Microseconds(), (cpuSeconds(b, way.g.Pid())-cpu)*1e6/float64(len(all)))
			client.CloseIdleConnections()
		}
	}
}
