package test

import (
	"bytes"
	"fmt"
	"io"
	"net"
	"net/http"
	"regexp"
	"strings"
	"testing"

	"waybill.dev/schemas"
	"waybill.dev/test/gateway"
	"waybill.dev/test/peers"
)

// The suite's client has no sessions, everything-server has: 35 of 37 scenarios
// pass, and the two others are impossible.
func TestNewClientConformance(t *testing.T) {
	g := gateway.Start(t, gateway.Config("servers:\n"+gateway.Server("everything", peers.EverythingServer(t, "-stateless=false"), "")))
	peers.ConformanceTranslated(t, g.URL+"/mcp/everything",
		peers.Untranslatable{
			Scenario: "input-required-result-basic-elicitation", Check: "sep-2322-elicitation-incomplete", Message: `missing expected key "user_name"`,
			Why: `2026-07-28, basic/patterns/mrtr, "InputRequests": "Keys are server-assigned string identifiers"; elicitation/create of 2025-11-25 has none, so the gateway has to make one up`,
		},
		peers.Untranslatable{
			Scenario: "input-required-result-multi-round", Check: "sep-2322-multi-round-r2", Message: "Expected new InputRequiredResult",
			Why: `2026-07-28, basic/index, "ResultType": "For backward compatibility with servers implementing earlier protocol versions, which do not include resultType, clients MUST treat an absent resultType as "complete""; in a session the Go SDK's server asks once itself, and then answers with inputRequests and no resultType`,
		},
	)
	if err := g.Stop(); err != nil {
		t.Errorf("stopping: %v", err)
	}
}

// Clients without sessions before server-everything, by itself and behind the
// front of all servers.
func TestNewClientPeers(t *testing.T) {
	g := gateway.Start(t, gateway.Config("servers:\n"+gateway.Server("everything", peers.ServerEverything(t), "")))
	t.Run("peers", func(t *testing.T) { // for these run beside each other
		t.Run("server", func(t *testing.T) { peers.ExerciseModern(t, peers.Endpoint{URL: g.URL + "/mcp/everything"}) })
		t.Run("all servers", func(t *testing.T) {
			peers.ExerciseModern(t, peers.Endpoint{URL: g.URL + "/mcp", Prefix: "everything__"})
		})
	})
	for _, e := range g.Events() {
		if err := e.Check(); err != nil {
			t.Error(err)
		}
	}
	if err := g.Stop(); err != nil {
		t.Errorf("stopping: %v", err)
	}
}

var requestState = regexp.MustCompile(`"requestState":"wb1\.[A-Za-z0-9_-]+"`)

// What is translated between a client without sessions and a server with them
// keeps its bytes but for the marked ones.
func TestNewClientZeroLoss(t *testing.T) {
	const result = `{"protocolVersion":"2025-11-25","capabilities":{"tools":{},"resources":{}},"serverInfo":{"name":"raw","version":"1","x":1E400}}`
	up := newRawServer(t)
	g := gateway.Start(t, gateway.Config("servers:\n"+gateway.Server("raw", up.url(), "")))
	golden(t, "testdata/translated_new.txt", "got", func(t *testing.T, _ string, section map[string]string) string {
		head, body := split(strings.TrimSuffix(section["request"], "\n"))
		sent, wantUp := unmark(body)
		streamed := strings.Contains(section["answer"], "text/event-stream")
		if !streamed {
			section["answer"] = strings.TrimSuffix(section["answer"], "\n")
		}
		answerHead, answerBody := split(section["answer"])
		answered, wantDown := unmark(answerBody)
		var seen *received
		id := ""
		up.serve(func(c net.Conn, r *received) {
			reply := func(status, kind, body string) {
				_, _ = fmt.Fprintf(c, "HTTP/1.1 %s\r\nContent-Type: %s\r\nMcp-Session-Id: upstream-session\r\nContent-Length: %d\r\n\r\n%s", status, kind, len(body), body)
			}
			call := callID.FindSubmatch(r.body)
			own := regexp.MustCompile(`"id":("[^"]*")`).FindSubmatch(r.body)
			switch {
			case r.method == http.MethodDelete:
				reply("200 OK", "text/plain", "")
			case r.method != http.MethodPost:
				_, _ = io.WriteString(c, notAllowed)
			case bytes.Contains(r.body, []byte(`"server/discover"`)):
				reply("400 Bad Request", "text/plain", "a session is required")
			case bytes.Contains(r.body, []byte(`"initialize"`)) && own != nil:
				reply("200 OK", "application/json", `{"jsonrpc":"2.0","id":`+string(own[1])+`,"result":`+result+`}`)
			case own == nil || call == nil:
				_, _ = io.WriteString(c, accepted)
			default:
				seen, id = r, string(call[1])
				b := strings.ReplaceAll(answered, "$CALL", id)
				if strings.Contains(answerBody, "$STATE") { // the exchange goes on: the stream stays open
					_, _ = io.WriteString(c, strings.ReplaceAll(answerHead, "\n", "\r\n")+"\r\n\r\n"+b)
					_, _ = c.Read(make([]byte, 1)) // until the gateway leaves
					return
				}
				_, _ = io.WriteString(c, strings.ReplaceAll(answerHead, "\n", "\r\n")+fmt.Sprintf("\r\nContent-Length: %d\r\n\r\n", len(b))+b)
			}
		})
		resp, got := post(t, g, t.Name(), head, sent)
		if seen == nil || id == "" {
			t.Fatalf("the upstream was not called; the client got %s\n%s", resp.Status, clip(got))
		}
		same(t, "what the upstream received", string(seen.body), strings.ReplaceAll(wantUp, "$CALL", id))
		for _, h := range []string{"Mcp-Method", "Mcp-Name", "Mcp-Param-X"} {
			if seen.header[h] != nil {
				t.Errorf("the upstream got %s", h)
			}
		}
		want := []string{strings.ReplaceAll(wantDown, "$CALL", id)}
		if streamed {
			want = messages(want[0])
		}
		gots := []string{got}
		if strings.HasPrefix(resp.Header.Get("Content-Type"), "text/event-stream") {
			gots = messages(got)
		}
		if len(gots) != len(want) {
			t.Fatalf("the client got %d messages, want %d:\n%s", len(gots), len(want), clip(got))
		}
		for i := range want {
			same(t, fmt.Sprintf("message %d that the client received", i), requestState.ReplaceAllString(gots[i], `"requestState":"$$STATE"`), want[i])
		}
		var out strings.Builder
		fmt.Fprintf(&out, "client < %s\n", resp.Status)
		for _, e := range g.Session(schemas.SessionKey(resp.Header.Get("Waybill-Session-Key"))) {
			fmt.Fprintf(&out, "log %s\n", e.Kind())
			if r, ok := e.Data.(*schemas.Requested); ok && r != nil {
				same(t, "what is stored as requested", string(e.Body), sent)
			}
			if d, ok := e.Data.(*schemas.Completed); ok && d.ErrorCode == 0 && !bytes.Contains(e.Body, []byte(`"resultType":`)) {
				t.Errorf("stored as completed: %s", e.Body)
			}
		}
		return out.String()
	})
	if err := g.Stop(); err != nil {
		t.Errorf("stopping: %v", err)
	}
}
