package cli

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

var update = flag.Bool("update", false, "rewrite the golden files of the scripts")

// The program of the scripts is the test's own, started again under the name
// waybill.
func TestMain(m *testing.M) {
	if filepath.Base(os.Args[0]) != "waybill" {
		os.Exit(m.Run())
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	code := Run(ctx, os.Args[1:], Env{Getenv: os.Getenv, Stdin: os.Stdin, Stdout: os.Stdout, Stderr: os.Stderr})
	stop()
	os.Exit(code)
}

// TestScripts runs testdata/script/*.txtar: commands, one a line, then the
// files they start with ("-- name --"). The form is that of rogpeppe's
// testscript, of which this is what the scripts need; -update rewrites the
// files that cmp compares with. A word in single quotes is taken as it is;
// elsewhere $NAME is from the environment, where $LISTEN, $ADMIN and $OTHER are
// free addresses and $UPSTREAM is the URL of an MCP server (see upstream).
//
//	exits CODE PROGRAM ARGS...  run a program, which must end so
//	exec PROGRAM ARGS... [&N&]  the same for 0; or in the background, as N
//	term N                      SIGTERM to the background program N
//	await N PATTERN             until the background program N has printed it
//	wait CODE N                 until it has ended, which it must so; its output is then stdout and stderr
//	stdout PATTERN              what the last program printed has it (Go regexp, ^ and $ are of a line)
//	stderr PATTERN              the same of stderr; with ! before, both have it not
//	cmp stdout|stderr FILE      what it printed is the file
//	cp stdout FILE              keep it
//	jsonlines [KEY VALUE]       every line of stdout is a JSON object, and some line has the member
//	expand FILE...              replace $NAME in files by the environment's
//	env NAME=VALUE
//	ready                       wait until the gateway at $ADMIN is ready
//	call METHOD [NAME]          send a request to its server up; stdout: status and body
//	get URL [HEADER]...         the same for GET
func TestScripts(t *testing.T) {
	files, err := filepath.Glob("testdata/script/*.txtar")
	if err != nil || len(files) == 0 {
		t.Fatal("no scripts", err)
	}
	program, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	bin := t.TempDir()
	if err := os.Symlink(program, filepath.Join(bin, "waybill")); err != nil {
		t.Fatal(err)
	}
	for _, file := range files {
		t.Run(strings.TrimSuffix(filepath.Base(file), ".txtar"), func(t *testing.T) {
			t.Parallel()
			runScript(t, file, bin)
		})
	}
}

// script is one script as it runs.
type script struct {
	t              *testing.T
	dir            string
	env            map[string]string
	files          []string // of the archive, in its order
	golden         map[string]string
	stdout, stderr string
	background     map[string]*program
	line           string // that is run
}

// program is a running one.
type program struct {
	cmd            *exec.Cmd
	stdout, stderr output
}

// output may be read while it is written.
type output struct {
	mu  sync.Mutex
	buf strings.Builder
}

func (o *output) Write(b []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.buf.Write(b)
}

func (o *output) String() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.buf.String()
}

func runScript(t *testing.T, file, bin string) {
	server := httptest.NewServer(http.HandlerFunc(upstream))
	t.Cleanup(server.Close)
	s := &script{
		t: t, dir: t.TempDir(), golden: map[string]string{}, background: map[string]*program{},
		env: map[string]string{"PATH": bin + ":" + os.Getenv("PATH"), "TZ": "UTC", "UPSTREAM": server.URL},
	}
	s.env["WORK"] = s.dir
	for _, name := range []string{"LISTEN", "ADMIN", "OTHER"} {
		s.env[name] = freeAddr(t)
	}
	t.Cleanup(func() {
		for _, p := range s.background {
			_ = p.cmd.Process.Kill() // it has not ended by itself
			_ = p.cmd.Wait()
			t.Logf("%v printed\n%s%s", p.cmd.Args, &p.stdout, &p.stderr)
		}
	})
	text, err := os.ReadFile(file)
	s.check(err)
	lines, name := []string{}, ""
	content := map[string]*strings.Builder{}
	for line := range strings.Lines(string(text)) {
		if n, ok := strings.CutPrefix(strings.TrimSpace(line), "-- "); ok && strings.HasSuffix(n, " --") {
			name = strings.TrimSuffix(n, " --")
			s.files, content[name] = append(s.files, name), &strings.Builder{}
		} else if name != "" {
			content[name].WriteString(line)
		} else {
			lines = append(lines, strings.TrimSuffix(line, "\n"))
		}
	}
	for _, name := range s.files {
		s.check(os.MkdirAll(filepath.Dir(filepath.Join(s.dir, name)), 0o700))
		s.check(os.WriteFile(filepath.Join(s.dir, name), []byte(content[name].String()), 0o600))
	}
	for i, line := range lines {
		s.line = fmt.Sprintf("%s:%d: %s", file, i+1, line)
		if words := s.words(line); len(words) > 0 {
			s.run(words)
		}
	}
	if len(s.golden) > 0 && !t.Failed() {
		out := strings.Join(lines, "\n") + "\n"
		for _, name := range s.files {
			text, ok := s.golden[name]
			if !ok {
				text = content[name].String()
			}
			out += "-- " + name + " --\n" + text
		}
		s.check(os.WriteFile(file, []byte(out), 0o644))
	}
}

func (s *script) fatalf(format string, args ...any) {
	s.t.Helper()
	s.t.Fatalf("%s\n%s\n[stdout]\n%s[stderr]\n%s", s.line, fmt.Sprintf(format, args...), s.stdout, s.stderr)
}

func (s *script) check(err error) {
	if err != nil {
		s.t.Helper()
		s.fatalf("%v", err)
	}
}

// words takes a line apart.
func (s *script) words(line string) []string {
	var words []string
	quoted, in := false, false
	var plain, word strings.Builder
	flush := func() {
		word.WriteString(os.Expand(plain.String(), func(n string) string { return s.env[n] }))
		plain.Reset()
	}
	for i := 0; i < len(line); i++ {
		c := line[i]
		switch {
		case c == '\'' && quoted && strings.HasPrefix(line[i+1:], "'"):
			word.WriteByte('\'')
			i++
		case c == '\'':
			flush()
			quoted, in = !quoted, true
		case quoted:
			word.WriteByte(c)
		case c == '#' && !in:
			return words
		case c == ' ' && in:
			flush()
			words, in = append(words, word.String()), false
			word.Reset()
		case c != ' ':
			plain.WriteByte(c)
			in = true
		}
	}
	flush()
	if in {
		words = append(words, word.String())
	}
	return words
}

func (s *script) run(words []string) {
	s.t.Helper()
	not := words[0] == "!"
	if not {
		words = words[1:]
	}
	name, args := words[0], words[1:]
	switch name {
	case "exec":
		if n := args[len(args)-1]; len(n) > 2 && n[0] == '&' && n[len(n)-1] == '&' {
			s.background[strings.Trim(n, "&")] = s.start(args[:len(args)-1])
			return
		}
		s.end(s.start(args), "0")
	case "exits":
		s.end(s.start(args[1:]), args[0])
	case "term":
		s.check(s.background[args[0]].cmd.Process.Signal(syscall.SIGTERM))
	case "await":
		p, pattern := s.background[args[0]], regexp.MustCompile("(?m)"+args[1])
		s.poll(func() bool { return pattern.MatchString(p.stderr.String()) || pattern.MatchString(p.stdout.String()) })
	case "wait":
		p := s.background[args[1]]
		delete(s.background, args[1])
		s.end(p, args[0])
	case "stdout", "stderr":
		if regexp.MustCompile("(?m)"+args[0]).MatchString(s.text(name)) == not {
			s.fatalf("%s matches: %t", name, not)
		}
	case "cmp":
		want, err := os.ReadFile(filepath.Join(s.dir, args[1]))
		s.check(err)
		switch got := s.text(args[0]); {
		case *update && slices.Contains(s.files, args[1]):
			s.golden[args[1]] = got
		case got != string(want):
			s.fatalf("%s is not %s, which is\n%s", args[0], args[1], want)
		}
	case "cp":
		s.check(os.WriteFile(filepath.Join(s.dir, args[1]), []byte(s.text(args[0])), 0o600))
	case "jsonlines":
		s.jsonLines(args)
	case "expand":
		for _, file := range args {
			file = filepath.Join(s.dir, file)
			text, err := os.ReadFile(file)
			s.check(err)
			s.check(os.WriteFile(file, []byte(os.Expand(string(text), func(n string) string { return s.env[n] })), 0o600))
		}
	case "env":
		k, v, _ := strings.Cut(args[0], "=")
		s.env[k] = v
	case "ready":
		s.ready()
	case "call":
		s.call(args)
	case "get":
		s.send(http.MethodGet, args[0], "", args[1:])
	default:
		s.fatalf("no such command")
	}
}

func (s *script) text(of string) string {
	switch of {
	case "stdout":
		return s.stdout
	case "stderr":
		return s.stderr
	}
	b, err := os.ReadFile(filepath.Join(s.dir, of))
	s.check(err)
	return string(b)
}

func (s *script) start(args []string) *program {
	s.t.Helper()
	path := args[0]
	if path == "waybill" { // exec looks into the test's PATH, not the script's
		dir, _, _ := strings.Cut(s.env["PATH"], ":")
		path = filepath.Join(dir, path)
	}
	p := &program{cmd: exec.Command(path, args[1:]...)}
	p.cmd.Dir, p.cmd.Stdout, p.cmd.Stderr = s.dir, &p.stdout, &p.stderr
	for k, v := range s.env {
		p.cmd.Env = append(p.cmd.Env, k+"="+v)
	}
	s.check(p.cmd.Start())
	return p
}

func (s *script) end(p *program, code string) {
	s.t.Helper()
	err := p.cmd.Wait()
	s.stdout, s.stderr = p.stdout.String(), p.stderr.String()
	if ended := new(exec.ExitError); err != nil && !errors.As(err, &ended) {
		s.fatalf("%v", err)
	}
	if got := strconv.Itoa(p.cmd.ProcessState.ExitCode()); got != code {
		s.fatalf("exit code %s, want %s", got, code)
	}
}

func freeAddr(t *testing.T) string {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = l.Close() }()
	return l.Addr().String()
}

// upstream is a server whose tools are called after what they do; any other
// name is answered with a text that holds what must not reach a terminal.
func upstream(w http.ResponseWriter, r *http.Request) {
	var m struct {
		ID     json.RawMessage
		Method string
		Params struct{ Name string }
	}
	if err := json.NewDecoder(r.Body).Decode(&m); err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	if m.Method == "server/discover" {
		_, _ = fmt.Fprintf(w, `{"jsonrpc":"2.0","id":%s,"result":{"resultType":"complete","supportedVersions":["2026-07-28"],"capabilities":{"tools":{}}}}`, m.ID)
		return
	}
	switch m.Params.Name {
	case "broken":
		w.WriteHeader(http.StatusInternalServerError)
	case "wrong":
		_, _ = fmt.Fprintf(w, `{"jsonrpc":"2.0","id":%s,"error":{"code":-32602,"message":"wrong"}}`, m.ID)
	case "steps":
		w.Header().Set("Content-Type", "text/event-stream")
		for i := range 3 {
			_, _ = fmt.Fprintf(w, "data: {\"jsonrpc\":\"2.0\",\"method\":\"notifications/progress\",\"params\":{\"progress\":%d}}\n\n", i)
		}
		_, _ = fmt.Fprintf(w, "data: {\"jsonrpc\":\"2.0\",\"id\":%s,\"result\":{\"resultType\":\"complete\",\"content\":[]}}\n\n", m.ID)
	default:
		// U+009B begins an escape sequence in eight bits, U+202E turns text
		// around; JSON strings may hold both as they are.
		_, _ = fmt.Fprintf(w, `{"jsonrpc":"2.0","id":%s,"result":{"resultType":"complete","content":[{"type":"text","text":"a`+"\u009b31m\u202eb"+`"}]}}`, m.ID)
	}
}

// poll waits until done, but not for ever.
func (s *script) poll(done func() bool) {
	s.t.Helper()
	again := time.NewTicker(20 * time.Millisecond)
	defer again.Stop()
	late := time.After(2 * time.Minute)
	for !done() {
		select {
		case <-again.C:
		case <-late:
			s.fatalf("waited in vain")
		}
	}
}

func (s *script) ready() {
	s.t.Helper()
	s.poll(func() bool {
		resp, err := http.Get("http://" + s.env["ADMIN"] + "/readyz")
		if err != nil {
			return false
		}
		s.check(resp.Body.Close())
		return resp.StatusCode == http.StatusOK
	})
}

func (s *script) call(args []string) {
	params := map[string]any{"_meta": map[string]any{
		"io.modelcontextprotocol/protocolVersion":    "2026-07-28",
		"io.modelcontextprotocol/clientInfo":         map[string]string{"name": "script\x1b[2J", "version": "1"},
		"io.modelcontextprotocol/clientCapabilities": map[string]any{},
	}}
	header := []string{"Content-Type: application/json", "Accept: application/json, text/event-stream",
		"MCP-Protocol-Version: 2026-07-28", "Mcp-Method: " + args[0]}
	if len(args) > 1 {
		name := strings.ReplaceAll(args[1], "ESC", "\x1b")
		params["name"] = name
		header = append(header, "Mcp-Name: =?base64?"+base64.StdEncoding.EncodeToString([]byte(name))+"?=")
	}
	if token := s.env["TOKEN"]; token != "" {
		header = append(header, "Authorization: Bearer "+token)
	}
	body, err := json.Marshal(map[string]any{"jsonrpc": "2.0", "id": 1, "method": args[0], "params": params})
	s.check(err)
	s.send(http.MethodPost, "http://"+s.env["LISTEN"]+"/mcp/up", string(body), header)
}

func (s *script) send(method, url, body string, header []string) {
	req, err := http.NewRequest(method, url, strings.NewReader(body))
	s.check(err)
	for _, h := range header {
		name, value, _ := strings.Cut(h, ": ")
		if req.Header.Set(name, value); name == "Host" {
			req.Host = value
		}
	}
	resp, err := http.DefaultClient.Do(req)
	s.check(err)
	defer func() { _ = resp.Body.Close() }()
	text, err := io.ReadAll(resp.Body)
	s.check(err)
	s.stdout, s.stderr = fmt.Sprintf("%d\n%s\n", resp.StatusCode, text), ""
}

func (s *script) jsonLines(args []string) {
	n, found := 0, len(args) == 0
	for line := range strings.Lines(s.stdout) {
		n++
		var m map[string]any
		if err := json.Unmarshal([]byte(line), &m); err != nil {
			s.fatalf("line %d: %v", n, err)
		}
		found = found || fmt.Sprint(m[args[0]]) == args[1]
	}
	if n == 0 || !found {
		s.fatalf("%d lines, none of them with %v", n, args)
	}
}

// A session may be longer than what fits in memory: its events are printed as
// they come, not when the last has come.
func TestReplayJSONStreams(t *testing.T) {
	printed := make(chan struct{})
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		_, _ = io.WriteString(w, "{\"seq\":1}\n")
		_ = http.NewResponseController(w).Flush()
		select {
		case <-printed:
		case <-r.Context().Done():
		}
		_, _ = io.WriteString(w, "{\"seq\":2}\n")
	}))
	defer srv.Close()
	var out bytes.Buffer
	code := Run(t.Context(), []string{"replay", "s1", "--json", "--admin", srv.URL}, Env{
		Getenv: func(string) string { return "token" },
		Stdout: writerFunc(func(b []byte) (int, error) {
			if out.Len() == 0 {
				close(printed)
			}
			return out.Write(b)
		}),
		Stderr: t.Output(),
	})
	if code != exitOK || out.String() != "{\"seq\":1}\n{\"seq\":2}\n" {
		t.Errorf("exit %d, printed %q", code, &out)
	}
}

type writerFunc func([]byte) (int, error)

func (f writerFunc) Write(b []byte) (int, error) { return f(b) }

// What breaks off must not look whole.
func TestReplayBrokenOff(t *testing.T) {
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		_, _ = io.WriteString(w, "{\"seq\":1,\"undecodable\":\"odd\\u001b[2J\"}\n")
		_ = http.NewResponseController(w).Flush()
		panic(http.ErrAbortHandler)
	}))
	defer srv.Close()
	for _, args := range [][]string{{"replay", "s1"}, {"replay", "s1", "--json"}, {"sessions", "--json"}, {"audit", "tail"}} {
		var errs strings.Builder
		code := Run(t.Context(), append(args, "--admin", srv.URL), Env{
			Getenv: func(string) string { return "token" }, Stdout: io.Discard, Stderr: &errs,
		})
		if code != exitError || !strings.Contains(errs.String(), "broke off") {
			t.Errorf("%v: exit %d, %q", args, code, errs.String())
		}
	}
}

// A tree keeps no bodies unless they are to be printed, and a message that
// cannot be read does not end it.
func TestStory(t *testing.T) {
	var r record
	for _, line := range strings.Split(strings.TrimSpace(storyLines), "\n") {
		if err := json.Unmarshal([]byte(line), &r); err != nil {
			t.Fatal(err)
		}
		for _, full := range []bool{false, true} {
			s := newStory(full)
			s.add(r)
			for _, c := range s.calls {
				if e := c.events[0]; (e.Body != nil) != full || e.size != 2 {
					t.Errorf("full %t: body %q, size %d", full, e.Body, e.size)
				}
			}
		}
		r = record{}
	}
}

// What came of a call that nobody asked for is the session's own; of an old
// call the ending may be all that is left.
func TestStoryOfNoCall(t *testing.T) {
	s := newStory(false)
	for line := range strings.Lines(strings.TrimSpace(storyLines) + `
{"v":1,"kind":"cancel","id":"c2/cancel","seq":4,"stored":"2026-11-22T08:40:21Z","time":"2026-11-22T08:40:21Z","tenant":"acme","session":"s1","call":"c2","root":"c2","agent":"a","data":{"reason":"changed my mind"}}
{"v":1,"kind":"cancelled","id":"c3/end","seq":5,"stored":"2026-11-22T08:40:22Z","time":"2026-11-22T08:40:22Z","tenant":"acme","session":"s1","call":"c3","root":"c3","agent":"a","data":{"reason":"old"}}
`) {
		var r record
		if err := json.Unmarshal([]byte(line), &r); err != nil {
			t.Fatal(err)
		}
		s.add(r)
	}
	var out strings.Builder
	if err := s.print(Env{Stdout: &out}); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{": 2 calls, 1 cancelled, 1 open\n", "cancel             –  changed my mind  of no call in the log: c2\n├─ "} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("%q is missing in\n%s", want, &out)
		}
	}
}

// A terminal gets the same JSON without what would act on it; all else gets the
// bytes.
func TestJSONOnATerminal(t *testing.T) {
	const line = "{\"a\":\"\u009b31m\u202eü日\U000e0041\u007f\xff\\n\"}"
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, line+"\n") }))
	defer srv.Close()
	for terminal, want := range map[bool]string{
		false: line + "\n",
		true:  `{"a":"\u009b31m\u202eü日\udb40\udc41\u007f\ufffd\n"}` + "\n",
	} {
		var out strings.Builder
		code := Run(t.Context(), []string{"replay", "s1", "--json", "--admin", srv.URL}, Env{
			Getenv: func(string) string { return "token" }, Stdout: &out, Stderr: t.Output(), Terminal: terminal,
		})
		var before, after any
		if err := errors.Join(json.Unmarshal([]byte(line), &before), json.Unmarshal([]byte(out.String()), &after)); err != nil {
			t.Error(err)
		}
		if code != exitOK || out.String() != want || !reflect.DeepEqual(before, after) {
			t.Errorf("terminal %t: exit %d, %+q, want %+q", terminal, code, &out, want)
		}
	}
}

const storyLines = `
{"v":1,"kind":"requested","id":"c1/requested","seq":2,"stored":"2026-11-22T08:40:20Z","time":"2026-11-22T08:40:20Z","tenant":"acme","session":"s1","call":"c1","root":"c1","agent":"a","data":{"protocol":"mcp","server":"up","method":"tools/call","name":"x"},"body":"{}"}
{"seq":3,"undecodable":"no event"}
`
