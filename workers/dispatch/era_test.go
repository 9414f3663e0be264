package dispatch

import (
	"fmt"
	"io"
	"net/http"
	"strings"
	"testing"
)

// What servers say to the probe, and what is made of it.
func TestEra(t *testing.T) {
	const request = `{"jsonrpc":"2.0","id":"waybill-probe",`
	for name, c := range map[string]struct {
		status int
		kind   string
		body   string
		want   Era
	}{
		"modern":           {200, "", request + `"result":{"supportedVersions":["2026-07-28"],"capabilities":{}}}`, EraModern},
		"modern, streamed": {200, "text/event-stream", "data: " + request + `"result":{"supportedVersions":["2025-11-25","2026-07-28"]}}` + "\n\n", EraModern},
		"wants headers":    {400, "", request + `"error":{"code":-32020,"message":"m"}}`, EraModern},
		"wants more":       {400, "", request + `"error":{"code":-32021,"message":"m"}}`, EraModern},
		"discovers only":   {200, "", request + `"result":{"supportedVersions":["2025-11-25"]}}`, EraLegacy},
		"says old":         {400, "", request + `"error":{"code":-32022,"message":"m","data":{"supported":["2025-11-25"]}}}`, EraLegacy},
		"later than ours":  {400, "", request + `"error":{"code":-32022,"message":"m","data":{"supported":["2027-11-25"]}}}`, EraClient},
		"no session":       {400, "", `{"jsonrpc":"2.0","id":null,"error":{"code":-32000,"message":"Bad Request: Server not initialized"}}`, EraLegacy},
		"no method":        {404, "", request + `"error":{"code":-32601,"message":"m"}}`, EraLegacy},
		"no method, 200":   {200, "", request + `"error":{"code":-32601,"message":"m"}}`, EraLegacy},
		"text":             {400, "text/plain", "session required", EraLegacy},
		"who are you":      {401, "", ``, EraClient},
		"too many":         {429, "", ``, EraClient},
		"out of order":     {503, "", request + `"error":{"code":-32601,"message":"m"}}`, EraClient},
		"elsewhere":        {307, "", ``, EraClient},
		"garbage":          {200, "", `[]`, EraClient},
		"nothing":          {200, "text/event-stream", "", EraClient},
	} {
		t.Run(name, func(t *testing.T) {
			probes := make(chan struct{}, 10)
			r := newRig(t, func(w http.ResponseWriter, req *http.Request) {
				probes <- struct{}{}
				b, err := io.ReadAll(req.Body)
				if err != nil || !strings.Contains(string(b), `"server/discover"`) || req.Header.Get("Mcp-Method") != "server/discover" || req.Header.Get("Mcp-Protocol-Version") != "2026-07-28" {
					t.Errorf("asked %s %v %v", b, req.Header, err)
				}
				if c.kind == "" {
					c.kind = "application/json"
				}
				w.Header().Set("Content-Type", c.kind)
				w.WriteHeader(c.status)
				_, _ = fmt.Fprint(w, c.body)
			}, func(o *Options) { o.Servers[0].Era = EraAuto })
			m := r.d.upstreams["s"].mcp
			for range 3 {
				if got := m.eraOf(t.Context()); got != c.want {
					t.Errorf("era %q, want %q", got, c.want)
				}
			}
			if n := len(probes); n != 1 {
				t.Errorf("%d probes", n)
			}
			// What was known stays in force while it is looked at again.
			<-probes
			m.doubt()
			if got := m.eraOf(t.Context()); got != c.want {
				t.Errorf("in doubt: era %q, want %q", got, c.want)
			}
			<-probes
		})
	}
}
