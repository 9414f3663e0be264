package test

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/url"
	"os"
	"os/exec"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"waybill.dev/cmd/waybill/cli"
	"waybill.dev/test/gateway"
	"waybill.dev/test/peers"
	"waybill.dev/test/upstream"
)

// connectChild is the name under which the test's own program is `waybill
// connect`, and envConnect has its arguments.
const (
	connectChild = "connect"
	envConnect   = "WAYBILL_TEST_CONNECT"
)

func runConnect(ctx context.Context) error {
	args := append([]string{"connect"}, strings.Fields(os.Getenv(envConnect))...)
	if exit := cli.Run(ctx, args, cli.Env{Getenv: os.Getenv, Stdin: os.Stdin, Stdout: os.Stdout, Stderr: os.Stderr}); exit != 0 {
		return errors.New("connect failed")
	}
	return nil
}

// connects is the command line with which a client starts `waybill connect` for
// the endpoint at a URL. Clients pass on little of their environment, so that it
// is in the command.
func connects(t testing.TB, more ...string) func(endpoint string) []string {
	t.Helper()
	program, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	return func(endpoint string) []string {
		u, err := url.Parse(endpoint)
		if err != nil {
			t.Fatal(err)
		}
		args := "--url " + u.Scheme + "://" + u.Host
		if server, ok := strings.CutPrefix(u.Path, "/mcp/"); ok {
			args += " --server " + server
		}
		return append(append([]string{"/usr/bin/env", gateway.AsChild(connectChild), envConnect + "=" + args}, more...), program)
	}
}

// Clients that nobody here has written, by stdin and stdout, of both eras, do
// what they do by HTTP: the twenty steps with sessions and a stream that breaks,
// and the tools of the era without.
func TestConnectPeers(t *testing.T) {
	t.Parallel() // it mostly waits
	g := gateway.Start(t, gateway.Config("servers:\n"+
		gateway.Server("everything", peers.ServerEverything(t), "")+
		gateway.Server("modern", peers.EverythingServer(t), "")))
	command := connects(t)
	t.Run("modern", func(t *testing.T) {
		at := g.URL + "/mcp/modern"
		t.Run("TypeScript", func(t *testing.T) { t.Parallel(); peers.ExerciseTypeScript(t, at, command(at)...) })
		t.Run("Go SDK", func(t *testing.T) { t.Parallel(); peers.ExerciseGoSDK(t, at, command(at)...) })
		t.Run("Python", func(t *testing.T) { t.Parallel(); peers.ExercisePython(t, command(at)...) })
		t.Run("Inspector", func(t *testing.T) { t.Parallel(); peers.ExerciseInspector(t, at, command(at)...) })
	})
	t.Run("legacy", func(t *testing.T) {
		peers.ExerciseLegacy(t, peers.Endpoint{URL: g.URL + "/mcp/everything", Command: command})
	})
	t.Run("all servers", func(t *testing.T) {
		peers.ExerciseLegacyGoSDK(t, peers.Endpoint{URL: g.URL + "/mcp", Prefix: "everything__", Command: command}, "2025-11-25")
	})
	if err := g.Stop(); err != nil {
		t.Errorf("stopping: %v", err)
	}
}

// piped is a `waybill connect` to which the test speaks line by line.
type piped struct {
	t     *testing.T
	cmd   *exec.Cmd
	in    io.WriteCloser
	lines chan string // closed at the end of stdout
	errs  *bytes.Buffer
	ended chan error
}

// pipe starts it for the endpoint at a URL, with an environment.
func pipe(t *testing.T, at string, env ...string) *piped {
	t.Helper()
	command := connects(t, env...)(at)
	p := &piped{t: t, cmd: exec.Command(command[0], command[1:]...), lines: make(chan string, 1<<10), errs: &bytes.Buffer{}, ended: make(chan error, 1)}
	p.cmd.Stderr = p.errs
	in, err := p.cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := p.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if p.in = in; p.cmd.Start() != nil {
		t.Fatal("connect does not start")
	}
	go func() {
		for r := bufio.NewReader(out); ; {
			line, err := r.ReadString('\n')
			if err != nil {
				if line != "" {
					p.lines <- "cut: " + line
				}
				break
			}
			p.lines <- strings.TrimSuffix(line, "\n")
		}
		close(p.lines)
		p.ended <- p.cmd.Wait()
	}()
	t.Cleanup(func() {
		_ = p.cmd.Process.Kill()
		_ = in.Close()
		for range p.lines { // until it is gone
		}
		if t.Failed() {
			t.Logf("connect said:\n%s", p.errs)
		}
	})
	return p
}

// say writes a line.
func (p *piped) say(format string, args ...any) {
	p.t.Helper()
	if _, err := fmt.Fprintf(p.in, format+"\n", args...); err != nil {
		p.t.Fatal(err)
	}
}

// hear reads the next line.
func (p *piped) hear() string {
	p.t.Helper()
	select {
	case line, ok := <-p.lines:
		if !ok {
			p.t.Fatal("connect has ended")
		}
		return line
	case <-time.After(time.Minute):
		p.t.Fatal("nothing came")
	}
	return ""
}

// open begins a session, with an id that no float holds.
func (p *piped) open() {
	p.t.Helper()
	p.say(`{"jsonrpc":"2.0","id":9007199254740993,"method":"initialize","params":{"protocolVersion":"2025-11-25","capabilities":{"elicitation":{}},"clientInfo":{"name":"piped","version":"1"}}}`)
	if line := p.hear(); !strings.Contains(line, `"id":9007199254740993`) || !strings.Contains(line, `"protocolVersion":"2025-11-25"`) {
		p.t.Fatalf("initialize: %s", line)
	}
	p.say(`{"jsonrpc":"2.0","method":"notifications/initialized"}`)
}

// call is a tools/call of the session, or, with gateway.Meta, of none.
func (p *piped) call(id, tool string, args upstream.Args, more string) {
	p.t.Helper()
	arguments, err := json.Marshal(args)
	if err != nil {
		p.t.Fatal(err)
	}
	if more != "" {
		more = "," + more
	}
	p.say(`{"jsonrpc":"2.0","id":%s,"method":"tools/call","params":{"name":%q,"arguments":%s%s}}`, id, tool, arguments, more)
}

// end closes stdin and returns how the program ended.
func (p *piped) end() error {
	p.t.Helper()
	if err := p.in.Close(); err != nil {
		p.t.Fatal(err)
	}
	return p.gone()
}

func (p *piped) gone() error {
	p.t.Helper()
	for line := range p.lines {
		p.t.Errorf("at the end came %s", line)
	}
	select {
	case err := <-p.ended:
		return err
	case <-time.After(time.Minute):
		p.t.Fatal("connect does not end")
	}
	return nil
}

// What goes in comes out, both ways and in both eras, byte for byte but for the
// id that the gateway has of its own upstream: numbers that no float holds,
// unknown members, escapes, white space, ids that look alike.
func TestConnectBytes(t *testing.T) {
	up := newRawServer(t)
	const result = `{ "content" : [], "n":12345678901234567890.50, "e":1E400, "s":"\u00e9<&>\ud83d\ude80", "x-unknown":{"z":1,"a":[null,-0.0]},"resultType":"complete" }`
	var mu sync.Mutex
	var got []string
	up.serve(func(conn net.Conn, r *received) {
		var m struct {
			ID     json.RawMessage
			Method string
		}
		if json.Unmarshal(r.body, &m) != nil || len(m.ID) == 0 {
			_, _ = io.WriteString(conn, "HTTP/1.1 202 Accepted\r\nContent-Length: 0\r\n\r\n")
			return
		}
		head, body := "Content-Type: application/json\r\n", fmt.Sprintf(`{"x":1.0, "jsonrpc":"2.0","id":%s,"result":%s}`, m.ID, result)
		switch m.Method {
		case "initialize":
			head += "Mcp-Session-Id: s\r\n"
			body = fmt.Sprintf(`{"jsonrpc":"2.0","id":%s,"result":{"protocolVersion":"2025-11-25","capabilities":{},"serverInfo":{"name":"raw","version":"1"}}}`, m.ID)
		case "tools/call":
			mu.Lock()
			got = append(got, strings.Replace(string(r.body), string(m.ID), "ID", 1))
			mu.Unlock()
		default:
			body = fmt.Sprintf(`{"jsonrpc":"2.0","id":%s,"error":{"code":-32601,"message":"no"}}`, m.ID)
		}
		_, _ = fmt.Fprintf(conn, "HTTP/1.1 200 OK\r\n%sContent-Length: %d\r\n\r\n%s", head, len(body), body)
	})
	g := gateway.Start(t, gateway.Config(fmt.Sprintf("servers:\n  - {name: legacy, mcp: {url: %q, era: legacy}, approve: none}\n  - {name: modern, mcp: {url: %q, era: modern}, approve: none}\n", up.url(), up.url())))
	for _, era := range []struct{ name, meta string }{{"legacy", `"_meta":{"k":1.10}`}, {"modern", gateway.Meta}} {
		t.Run(era.name, func(t *testing.T) {
			p := pipe(t, g.URL+"/mcp/"+era.name)
			if era.name == "legacy" {
				p.open()
			}
			for _, id := range []string{`18446744073709551617`, `1`, `1.0`, `"1"`, `1e0`, `"\u0061"`, `"a b"`, `-0`} {
				request := func(id string) string {
					return `{"zz":[1.0,1E+2], "jsonrpc":"2.0" ,"method":"tools/call","id":` + id + `,"params":{"name":"n","arguments":{"big":9007199254740993,"f":1.50,"s":"\u00fc\/"},"unknown":true,` + era.meta + `}}`
				}
				mu.Lock()
				got = nil
				mu.Unlock()
				p.say("  %s\r", request(id))
				if line, want := p.hear(), `{"x":1.0, "jsonrpc":"2.0","id":`+id+`,"result":`+result+`}`; line != want {
					t.Errorf("the answer\n%s is not\n%s", line, want)
				}
				mu.Lock()
				if len(got) != 1 || got[0] != request("ID") {
					t.Errorf("the server got %q, not %s", got, request("ID"))
				}
				mu.Unlock()
			}
			if err := p.end(); err != nil {
				t.Errorf("the end: %v", err)
			}
			if p.errs.Len() > 0 {
				t.Errorf("it said %s", p.errs)
			}
		})
	}
}

// A gateway that is killed in the middle of a call's stream and comes back:
// what it had stored is told once, the call has one answer, which says that the
// outcome is unknown, and is carried out once. What was asked meanwhile is
// answered afterwards, in the same session, and what the server has to say of
// its own too.
func TestConnectKilled(t *testing.T) {
	u := upstream.Start(t)
	g := gateway.Start(t, gateway.Config("servers:\n"+gateway.Server("counting", u.URL, "")))
	p := pipe(t, g.URL+"/mcp/counting")
	p.open()
	progress, logged, answers := []int{}, []int{}, map[string]string{}
	step := func() {
		t.Helper()
		var m struct {
			ID     json.RawMessage
			Method string
			Params struct {
				Progress int
				Data     struct{ N int }
			}
		}
		line := p.hear()
		if err := json.Unmarshal([]byte(line), &m); err != nil {
			t.Fatalf("%v: %s", err, line)
		}
		switch m.Method {
		case "notifications/progress":
			progress = append(progress, m.Params.Progress)
		case "notifications/message":
			logged = append(logged, m.Params.Data.N)
		case "":
			if answers[string(m.ID)] != "" {
				t.Errorf("a second answer: %s", line)
			}
			answers[string(m.ID)] = line
		}
	}
	p.call("1", "count", upstream.Args{Key: "cut", Progress: 100, Wait: 20_000}, "")
	for len(progress) < 30 { // by then the gateway has made a stream of it
		step()
	}
	g.Kill()
	p.call("2", "count", upstream.Args{Key: "meanwhile"}, "")
	p.say(`{"jsonrpc":"2.0","id":3,"method":"ping"}`)
	g.Restart()
	for len(answers) < 3 {
		step()
	}
	for i, n := range progress {
		if n != i+1 {
			t.Errorf("progress %v", progress)
			break
		}
	}
	if !strings.Contains(answers["1"], "The outcome of this call is unknown") {
		t.Errorf("the call that was cut: %s", answers["1"])
	}
	if !strings.Contains(answers["2"], "count meanwhile for the 1. time") {
		t.Errorf("what was asked meanwhile: %s", answers["2"])
	}
	p.call("4", "notify", upstream.Args{Key: "after", Progress: 5}, "")
	for len(answers) < 4 || len(logged) < 5 {
		step()
	}
	for i, n := range logged {
		if n != i+1 {
			t.Errorf("logged %v", logged)
			break
		}
	}
	if err := p.end(); err != nil {
		t.Errorf("the end: %v", err)
	}
	counts := map[string]int{}
	for _, e := range u.Effects() {
		counts[e.Key]++
	}
	if counts["cut"] != 1 || counts["meanwhile"] != 1 || counts["after"] != 1 {
		t.Errorf("effects: %v", counts)
	}
	if n := u.Sessions(); n.Opened != 1 || n.Open != 0 {
		t.Errorf("the server's sessions: %+v", n)
	}
	for _, said := range []string{"no gateway answers at", "answers\n"} {
		if strings.Count(p.errs.String(), said) != 1 {
			t.Errorf("it did not say %q once:\n%s", said, p.errs)
		}
	}
}

// A network that cuts connections at any byte, in the middle of answers, of
// streams and between them: what a server says is told once and in order, every
// request has one answer, and nothing is carried out twice. An answer that broke
// off before there was anything to come back for is unknown, and said to be.
func TestConnectCuts(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	u := upstream.Start(t)
	g := gateway.Start(t, gateway.Config("servers:\n"+gateway.Server("counting", u.URL, "")))
	between := newCutter(t, strings.TrimPrefix(g.URL, "http://"), seed)
	const clients, calls, messages = 4, 50, 10
	var all sync.WaitGroup
	var unknown atomic.Int64
	for n := range clients {
		p := pipe(t, between.url+"/mcp/counting")
		all.Go(func() {
			key := func(i int) string { return fmt.Sprintf("%d-%d", n, i) }
			heard, ended := map[string]int{}, map[string]string{}
			step := func() bool {
				var m struct {
					ID     json.RawMessage
					Method string
					Params struct {
						ProgressToken string
						Progress      int
						Data          struct {
							Key string
							N   int
						}
					}
				}
				line, ok := "", false
				select {
				case line, ok = <-p.lines:
				case <-time.After(time.Minute):
				}
				if !ok || json.Unmarshal([]byte(line), &m) != nil {
					t.Errorf("client %d: %q", n, line)
					return false
				}
				if m.Method == "" {
					if ended[string(m.ID)] != "" {
						t.Errorf("client %d: a second answer: %s", n, line)
					}
					ended[string(m.ID)] = line
					return true
				}
				of := m.Params.ProgressToken + m.Params.Data.Key
				if heard[of]++; heard[of] != m.Params.Progress+m.Params.Data.N {
					t.Errorf("client %d: message %d is %s", n, heard[of], line)
					return false
				}
				return true
			}
			p.say(`{"jsonrpc":"2.0","id":"open","method":"initialize","params":{"protocolVersion":"2025-11-25","capabilities":{},"clientInfo":{"name":"cut","version":"1"}}}`)
			if !step() || !strings.Contains(ended[`"open"`], `"result"`) {
				t.Errorf("client %d: %v", n, ended)
				return
			}
			p.say(`{"jsonrpc":"2.0","method":"notifications/initialized"}`)
			for i := range calls {
				tool := []string{"count", "notify"}[i%2]
				p.call(fmt.Sprint(i), tool, upstream.Args{Key: key(i), Progress: messages, Wait: 100}, "")
				for ended[fmt.Sprint(i)] == "" {
					if !step() {
						return
					}
				}
			}
			done := map[string]bool{}
			for _, e := range u.Effects() {
				done[e.Key] = true
			}
			for i := range calls {
				end, known := ended[fmt.Sprint(i)], true
				if known = strings.Contains(end, "for the 1. time"); !known {
					unknown.Add(1)
					if !strings.Contains(end, `"code":"unknown"`) {
						t.Errorf("client %d: the answer is %s", n, end)
					}
				}
				// What is said on the session's own stream comes whatever became of
				// the call.
				for i%2 == 1 && done[key(i)] && heard[key(i)] < messages {
					if !step() {
						return
					}
				}
				if known && heard[key(i)] != messages {
					t.Errorf("client %d: call %d: %d messages", n, i, heard[key(i)])
				}
			}
			if err := p.in.Close(); err != nil {
				t.Error(err)
			}
		})
	}
	all.Wait()
	counts := map[string]int{}
	for _, e := range u.Effects() {
		if counts[e.Key]++; counts[e.Key] > 1 {
			t.Errorf("%s was carried out %d times", e.Key, counts[e.Key])
		}
	}
	t.Logf("%d cuts, %d of %d calls unknown", between.cuts.Load(), unknown.Load(), clients*calls)
	if between.cuts.Load() < 100 || unknown.Load() > clients*calls/2 {
		t.Error("too few cuts, or too many calls unknown")
	}
}

// cutNet carries connections to an address and cuts each after some bytes that
// came back.
type cutNet struct {
	url  string
	cuts atomic.Int64
}

func newCutter(t *testing.T, to string, seed uint64) *cutNet {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	n := &cutNet{url: "http://" + ln.Addr().String()}
	var all sync.WaitGroup
	var mu sync.Mutex
	chance, open := rand.New(rand.NewPCG(seed, 7)), map[net.Conn]bool{}
	all.Go(func() {
		for {
			here, err := ln.Accept()
			if err != nil {
				return
			}
			there, err := net.Dial("tcp", to)
			if err != nil {
				_ = here.Close()
				continue
			}
			mu.Lock()
			most := 100 + chance.Int64N(3000)
			open[here], open[there] = true, true
			mu.Unlock()
			all.Go(func() {
				_, _ = io.Copy(there, here) // until one of them is closed
				_ = there.Close()
			})
			all.Go(func() {
				if k, _ := io.CopyN(here, there, most); k == most {
					n.cuts.Add(1)
				}
				_, _ = here.Close(), there.Close()
				mu.Lock()
				defer mu.Unlock()
				delete(open, here)
				delete(open, there)
			})
		}
	})
	t.Cleanup(func() {
		_ = ln.Close()
		mu.Lock()
		for c := range open {
			_ = c.Close()
		}
		mu.Unlock()
		all.Wait()
	})
	return n
}

// Two of them at once, each with a token of its own: neither sees anything of
// the other, whose ids are the same. Nobody is told the tokens. SIGTERM ends one
// as the end of stdin does the other, and both end their sessions.
func TestConnectTwo(t *testing.T) {
	u := upstream.Start(t)
	hash := func(token string) string { return fmt.Sprintf("%x", sha256.Sum256([]byte(token))) }
	g := gateway.Start(t, gateway.Config(`
tenants: [{id: acme}]
agents:
  - {id: researcher, tenant: acme, token_sha256: `+hash("token-of-one")+`}
  - {id: rival, tenant: acme, token_sha256: `+hash("token-of-two")+`}
servers:
`+gateway.Server("counting", u.URL, "")))
	one := pipe(t, g.URL+"/mcp/counting", "WAYBILL_TOKEN=token-of-one")
	two := pipe(t, g.URL+"/mcp/counting", "WAYBILL_TOKEN=token-of-two")
	none := pipe(t, g.URL+"/mcp/counting", "WAYBILL_TOKEN=token-of-nobody")
	none.say(`{"jsonrpc":"2.0","id":1,"method":"initialize","params":{"protocolVersion":"2025-11-25","capabilities":{},"clientInfo":{"name":"none","version":"1"}}}`)
	if line := none.hear(); !strings.Contains(line, "token is not known") || !strings.Contains(line, `"id":1`) {
		t.Errorf("without a token of its own: %s", line)
	}
	for _, p := range []*piped{one, two} {
		p.open()
	}
	for i := range 20 {
		for who, p := range map[string]*piped{"one": one, "two": two} {
			p.call(fmt.Sprint(i), "count", upstream.Args{Key: fmt.Sprintf("%s-%d", who, i)}, "")
		}
	}
	for who, p := range map[string]*piped{"one": one, "two": two} {
		for range 20 {
			var m struct{ ID int }
			line := p.hear()
			if err := json.Unmarshal([]byte(line), &m); err != nil || !strings.Contains(line, fmt.Sprintf("count %s-%d for the 1. time", who, m.ID)) {
				t.Errorf("%s: %v %s", who, err, line)
			}
		}
	}
	// A question, in the middle of a call, and its answer.
	one.call(`"q"`, "ask", upstream.Args{Key: "asked"}, "")
	var asked struct {
		ID     json.RawMessage
		Method string
	}
	if err := json.Unmarshal([]byte(one.hear()), &asked); err != nil || asked.Method != "elicitation/create" {
		t.Fatalf("asked %+v %v", asked, err)
	}
	one.say(`{"jsonrpc":"2.0","id":%s,"result":{"action":"accept","content":{"name":"Ada"},"n":1e400}}`, asked.ID)
	if line := one.hear(); !strings.Contains(line, "Ada") || !strings.Contains(line, "1e400") || !strings.Contains(line, `"id":"q"`) {
		t.Errorf("the question's call: %s", line)
	}
	if err := one.end(); err != nil {
		t.Errorf("the end of stdin: %v", err)
	}
	if err := two.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if err := two.gone(); err != nil {
		t.Errorf("SIGTERM: %v", err)
	}
	if !becomes(within, func() bool { return u.Sessions().Open == 0 }) {
		t.Errorf("the server's sessions: %+v", u.Sessions())
	}
	if n := u.Sessions().Opened; n != 2 {
		t.Errorf("%d sessions were opened", n)
	}
	_ = none.end() // as it was not let in
	for _, p := range []*piped{one, two, none} {
		if strings.Contains(p.errs.String(), "token-of") {
			t.Errorf("it told a token: %s", p.errs)
		}
	}
}

// The headers of revision 2026-07-28 are made of the message, those too that a
// tool's schema asks for: at once when the client has listed the tools, and else
// after the refusal. A call is carried out once either way.
func TestConnectHeaders(t *testing.T) {
	g := gateway.Start(t, gateway.Config("servers:\n"+gateway.Server("modern", peers.EverythingServer(t), "")))
	for _, listed := range []bool{false, true} {
		p := pipe(t, g.URL+"/mcp/modern")
		if listed {
			p.say(`{"jsonrpc":"2.0","id":0,"method":"tools/list","params":{%s}}`, gateway.Meta)
			if line := p.hear(); !strings.Contains(line, "test_x_mcp_header") {
				t.Fatal(line)
			}
		}
		p.say(`{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{"name":"test_x_mcp_header","arguments":{"region":"größe"},%s}}`, gateway.Meta)
		if line := p.hear(); !strings.Contains(line, `"id":1`) || !strings.Contains(line, `"content"`) || strings.Contains(line, `"error"`) {
			t.Errorf("listed %t: %s", listed, line)
		}
		if err := p.end(); err != nil {
			t.Errorf("the end: %v", err)
		}
	}
	calls := map[string]int{}
	for _, e := range g.Events() {
		calls[string(e.Kind())]++
	}
	if calls["requested"] != 5 { // refused, list, call; list, call
		t.Errorf("events: %v", calls)
	}
}

// What the client takes back ends, in both eras, without an answer.
func TestConnectCancel(t *testing.T) {
	u := upstream.Start(t)
	g := gateway.Start(t, gateway.Config("servers:\n"+gateway.Server("counting", u.URL, "")))
	for _, era := range []struct{ name, meta string }{{"legacy", ""}, {"modern", gateway.Meta}} {
		p := pipe(t, g.URL+"/mcp/counting")
		if era.name == "legacy" {
			p.open()
		}
		p.call(`"long"`, "count", upstream.Args{Key: era.name, Wait: 60_000}, era.meta)
		if !becomes(within, func() bool { return strings.Contains(fmt.Sprint(u.Effects()), era.name) }) {
			t.Fatal("the call does not begin")
		}
		p.say(`{"jsonrpc":"2.0","method":"notifications/cancelled","params":{"requestId":"long","reason":"enough"}}`)
		if !becomes(within, func() bool {
			for _, e := range g.Events() {
				if string(e.Kind()) == "cancelled" && e.Call != "" && strings.Contains(fmt.Sprint(u.Effects()), string(e.Call)) && era.name == lastKey(u) {
					return true
				}
			}
			return false
		}) {
			t.Errorf("%s: the call was not cancelled", era.name)
		}
		p.call(`"long"`, "count", upstream.Args{Key: "again"}, era.meta) // the id is free again
		if line := p.hear(); !strings.Contains(line, "count again") {
			t.Errorf("%s: %s", era.name, line)
		}
		if err := p.end(); err != nil {
			t.Errorf("%s: the end: %v", era.name, err)
		}
	}
}

// lastKey is that of the latest effect.
func lastKey(u *upstream.Upstream) string {
	all := u.Effects()
	return all[len(all)-1].Key
}
