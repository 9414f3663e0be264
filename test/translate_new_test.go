package test

import (
	"bytes"
	"crypto/sha256"
	"fmt"
	"io"
	"net"
	"net/http"
	"regexp"
	"strings"
	"testing"

	"waybill.dev/schemas"
	"waybill.dev/schemas/jsonrpc"
	"waybill.dev/test/gateway"
	"waybill.dev/test/peers"
	"waybill.dev/test/upstream"
)

// The suite's client has no sessions, everything-server has: 35 of 37 scenarios
// pass, and the two others are impossible.
func TestNewClientConformance(t *testing.T) {
	t.Parallel() // it mostly waits
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
	t.Parallel() // it mostly waits
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
	g := gateway.Start(t, gateway.Config("servers:\n"+gateway.Server("raw", up.url(), "approve: none")))
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

// A gateway that is killed while a call waits for its client has lost it, and says
// so; the log does not call it a success. With other words than those of the
// client, or in other hands, what it brings back reaches nobody.
func TestNewClientRestart(t *testing.T) {
	up := upstream.Start(t)
	hash := func(token string) string { return fmt.Sprintf("%x", sha256.Sum256([]byte(token))) }
	g := gateway.Start(t, gateway.Config(fmt.Sprintf("servers:\n  - {name: up, mcp: {url: %q, era: legacy}}\n", up.URL)+`
tenants: [{id: acme}]
agents:
  - {id: one, tenant: acme, token_sha256: `+hash("one")+`}
  - {id: two, tenant: acme, token_sha256: `+hash("two")+"}\n"))
	call := func(token, key, more string) (gateway.Answer, jsonrpc.Value) {
		t.Helper()
		body := `{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{"name":"ask","arguments":{"key":"` + key + `"},` +
			strings.Replace(gateway.Meta, `Capabilities":{}`, `Capabilities":{"elicitation":{}}`, 1) + more + `}}`
		a, err := g.Post(t.Context(), "up", "tools/call", "ask", body, "Authorization: Bearer "+token, "Waybill-Session: s")
		if err != nil {
			t.Fatal(err)
		}
		m, err := jsonrpc.Decode(a.Body, jsonrpc.Limits{})
		if err != nil {
			t.Fatalf("%v: %s", err, a.Body)
		}
		return a, m.Root()
	}
	ask := func() (session schemas.SessionKey, more string) {
		t.Helper()
		a, v := call("one", "k", "")
		state, ok := v.Get("result", "requestState").Text()
		if kind, _ := v.Get("result", "resultType").Text(); kind != "input_required" || !ok {
			t.Fatalf("it does not ask: %s", a.Body)
		}
		return schemas.SessionKey(a.Header.Get("Waybill-Session-Key")), `,"inputResponses":{"elicitation/create-1":{"action":"accept","content":{"name":"Ada"}}},"requestState":"` + state + `"`
	}
	refused := func(what, token, key, more, words string) {
		t.Helper()
		a, v := call(token, key, more)
		text, _ := v.Get("error", "message").Text()
		if code, _ := v.Get("error", "code").Int(); code != -32602 || a.Status != 400 || !strings.Contains(text, words) {
			t.Errorf("%s: HTTP %d %s", what, a.Status, a.Body)
		}
	}
	session, more := ask()
	refused("another principal", "two", "k", more, "is not valid for this request")
	refused("other arguments", "one", "l", more, "is not valid for this request")
	refused("tampered", "one", "k", strings.Replace(more, `"wb1.`, `"wb1.A`, 1), "is not valid for this request")
	if a, v := call("one", "k", more); !strings.Contains(string(v.Get("result").Raw()), "Ada") {
		t.Errorf("the answer did not come: %s", a.Body)
	}
	refused("again", "one", "k", more, "does not hold the call any more")
	if n := len(up.Effects()); n != 1 {
		t.Errorf("%d effects", n)
	}

	_, more = ask()
	g.Kill()
	g.Restart()
	refused("after a restart", "one", "k", more, "The outcome of that call is unknown")
	if n := len(up.Effects()); n != 2 {
		t.Errorf("%d effects", n)
	}
	asked := 0
	for _, e := range g.Session(session) {
		if err := e.Check(); err != nil {
			t.Error(err)
		}
		if d, ok := e.Data.(*schemas.Completed); ok && d.Result == "input_required" {
			asked++
		}
	}
	if asked != 2 {
		t.Errorf("%d calls ended as ones that asked", asked)
	}
	if err := g.Stop(); err != nil {
		t.Errorf("stopping: %v", err)
	}
	if n := up.Sessions().Open; n != 1 { // the one that was killed could not close its own
		t.Errorf("%d sessions are left open at the server", n)
	}
}
