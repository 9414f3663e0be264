package dispatch

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"waybill.dev/schemas"
	"waybill.dev/schemas/jsonrpc"
)

// stdioServer names the variable that makes of the test's program a server over
// stdio, as TestMain does. Its value is how that behaves: a list of words.
const stdioServer = "WAYBILL_TEST_STDIO"

func TestMain(m *testing.M) {
	how := os.Getenv(stdioServer)
	if how == "" {
		os.Exit(m.Run())
	}
	os.Exit(serveStdio(how))
}

// serveStdio is an MCP server as plain as the protocol allows.
func serveStdio(how string) int {
	is := func(word string) bool { return strings.Contains(how, word) }
	if is("sleeper") {
		signal.Ignore(syscall.SIGTERM, syscall.SIGHUP)
		select {}
	}
	if is("crash") {
		fmt.Fprintln(os.Stderr, "no such database: "+os.Getenv("SECRET"))
		return 7
	}
	if is("stubborn") {
		signal.Ignore(syscall.SIGTERM)
		sleeper := exec.Command(os.Args[0])
		sleeper.Env = append(os.Environ(), stdioServer+"=sleeper")
		sleeper.Stdout = os.Stdout // and so holds the pipe
		if err := sleeper.Start(); err != nil {
			return 1
		}
		fmt.Fprintln(os.Stderr, "sleeper", sleeper.Process.Pid)
	}
	var out sync.Mutex
	say := func(s string) {
		out.Lock()
		defer out.Unlock()
		fmt.Println(s)
	}
	if is("stays") {
		signal.Ignore(syscall.SIGTERM)
	}
	if _, file, ok := strings.Cut(how, "deaf:"); ok { // the first is
		if f, err := os.OpenFile(file, os.O_CREATE|os.O_EXCL, 0o600); err == nil {
			_ = f.Close()
			select {}
		}
	}
	answers := map[string]chan string{}
	in := bufio.NewReader(os.Stdin)
	for {
		text, err := in.ReadString('\n')
		if err != nil {
			break
		}
		m, err := jsonrpc.Decode([]byte(strings.TrimSpace(text)), jsonrpc.Limits{Depth: 512})
		if err != nil {
			fmt.Fprintln(os.Stderr, "read", text, err)
			return 9
		}
		id := string(m.ID().Raw())
		result := func(s string) { say(`{"result":` + s + `,"jsonrpc":"2.0","id":` + id + `}`) }
		name, _ := m.Params().Get("name").Text()
		arg, _ := m.Params().Get("arguments", "x").Text()
		token := string(m.Params().Get("_meta", "progressToken").Raw())
		progress := func(i int) {
			say(fmt.Sprintf(`{"jsonrpc":"2.0","method":"notifications/progress","params":{"progressToken":%s,"progress":%d}}`, token, i))
		}
		switch method := m.Method(); {
		case m.IsResponse():
			if c := answers[id]; c != nil {
				delete(answers, id)
				c <- string(m.Raw())
			}
		case method == "initialize":
			version, _ := m.Params().Get("protocolVersion").Text()
			result(`{"protocolVersion":"` + version + `","capabilities":{},"serverInfo":{"name":"s","version":"` + strconv.Itoa(os.Getpid()) + `"}}`)
		case !m.IsRequest():
			fmt.Fprintln(os.Stderr, "heard "+method)
			if strings.HasSuffix(method, "/roots/list_changed") {
				for i := range 3 {
					say(fmt.Sprintf(`{"jsonrpc":"2.0","method":"notifications/message","params":{"n":%d}}`, i))
				}
			}
		case method == "server/discover" && is("silent"):
		case method == "server/discover":
			if is("legacy") {
				say(`{"jsonrpc":"2.0","id":` + id + `,"error":{"code":-32601,"message":"Method not found"}}`)
				break
			}
			result(`{"supportedVersions":["2026-07-28"]}`)
		case name == "die":
			fmt.Fprintln(os.Stderr, "out of cheese")
			return 3
		case name == "kill":
			progress(1)
			_ = syscall.Kill(os.Getpid(), syscall.SIGKILL)
		case name == "never":
			progress(1)
		case name == "garbage":
			say("Listening on stdio…\n\n{not json\n[1]\n" + strings.Repeat("x", 10_000))
			result(`{"ok": 1E400}`)
		case name == "twice":
			result(`{"a":1,"a":2}`)
		case name == "long":
			result(`"` + strings.Repeat("x", 200_000) + `"`)
		case name == "flood":
			line := []byte(strings.Repeat("e", 1<<10-1) + "\n")
			w := bufio.NewWriterSize(os.Stderr, 1<<20)
			n, _ := strconv.Atoi(arg)
			for range n {
				_, _ = w.Write(line)
			}
			_ = w.Flush()
			result(`{}`)
		case name == "progress":
			n, _ := strconv.Atoi(arg)
			for i := range n {
				progress(i)
			}
			result(`{}`)
		case name == "ask":
			answer := make(chan string, 1)
			answers[`"q`+arg+`"`] = answer
			say(`{"jsonrpc":"2.0","id":"q` + arg + `","method":"elicitation/create","params":{}}`)
			go func() { result(`{"was":` + <-answer + `}`) }()
		case name == "wait": // for the file arg to be there
			_ = os.WriteFile(arg+".began", nil, 0o600)
			go func() {
				untilThere(arg)
				result(`{"text":"` + name + `"}`)
			}()
		case name == "mutter": // of its call, when the file arg is there, without saying so
			progress(1)
			go func() {
				untilThere(arg)
				for range 10 {
					say(`{"jsonrpc":"2.0","method":"notifications/message","params":{"level":"info","data":"of whom I cannot say"}}`)
				}
				_ = os.WriteFile(arg+".said", nil, 0o600)
			}()
		case name == "chatter": // for ever
			go func() {
				for {
					say(`{"jsonrpc":"2.0","method":"notifications/message","params":{"level":"info","data":"blah"}}`)
				}
			}()
		case name == "hush":
			_ = os.Stdout.Close()
		case name == "env":
			b, _ := json.Marshal(os.Environ())
			dir, _ := os.Getwd()
			result(`{"env":` + string(b) + `,"dir":"` + dir + `"}`)
		default:
			result(`{"pid":"` + strconv.Itoa(os.Getpid()) + `","got":` + string(m.Raw()) + `}`)
		}
	}
	if is("stubborn") || is("stays") {
		select {}
	}
	return 0
}

// stdioRig is a rig with a server over stdio that behaves as how says.
func stdioRig(t *testing.T, how string, change ...func(*Server)) (*rig, *stdio, *logged) {
	t.Helper()
	words := &logged{}
	r := newRig(t, nil, func(o *Options) {
		s := Server{
			Name: "s", Command: []string{os.Args[0]}, Env: map[string]string{stdioServer: "as " + how, "SECRET": "hunter22"}, Secrets: []string{"hunter22"},
			Idempotent: []string{"read*"}, Era: EraClient,
		}
		for _, f := range change {
			f(&s)
		}
		o.Servers, o.MaxAnswer, o.Log = []Server{s}, 64<<10, slog.New(slog.NewTextHandler(words, &slog.HandlerOptions{Level: slog.LevelDebug}))
	})
	r.open("s1")
	quick(r.d)
	s := r.d.upstreams["s"].mcp.transport.(*stdio)
	s.timing.stop, s.timing.term, s.timing.pause = 200*time.Millisecond, 200*time.Millisecond, 50*time.Millisecond
	t.Cleanup(func() {
		if strings.Contains(words.String(), "hunter22") {
			t.Error("a secret is in the log")
		}
		if t.Failed() {
			t.Log(words)
		}
	})
	return r, s, words
}

type logged struct {
	mu sync.Mutex
	b  strings.Builder
}

func (l *logged) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(b)
}

func (l *logged) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// becomes waits until something holds.
func becomes(t testing.TB, what string, holds func() bool) {
	t.Helper()
	late := time.After(20 * time.Second)
	for !holds() {
		select {
		case <-late:
			t.Fatalf("not within 20 s: %s", what)
		case <-time.After(time.Millisecond):
		}
	}
}

// alive tells whether a process is there that is no zombie.
func alive(pid int) bool {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	_, state, ok := strings.Cut(string(b), ") ")
	return err == nil && ok && !strings.HasPrefix(state, "Z")
}

// children are the processes that this one has started and not reaped.
func children(t testing.TB) (pids []int) {
	t.Helper()
	threads, err := os.ReadDir("/proc/self/task")
	if err != nil {
		t.Fatal(err)
	}
	for _, thread := range threads {
		b, err := os.ReadFile(filepath.Join("/proc/self/task", thread.Name(), "children"))
		if err != nil {
			continue // it has ended
		}
		for _, f := range strings.Fields(string(b)) {
			pid, err := strconv.Atoi(f)
			if err != nil {
				t.Fatal(err)
			}
			pids = append(pids, pid)
		}
	}
	return pids
}

func descriptors(t testing.TB) int {
	t.Helper()
	all, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(all)
}

// nothingLeft holds at the end of a test: what was started is gone.
func nothingLeft(t testing.TB) {
	leaks(t)
	before := len(children(t))
	t.Cleanup(func() {
		if now := children(t); len(now) > before {
			t.Errorf("processes are left: %v", now)
		}
	})
}

func with(key, value string) func(*schemas.Event) {
	return func(e *schemas.Event) {
		e.Body = []byte(strings.Replace(string(e.Body), `{"x": 1E400}`, `{"`+key+`":"`+value+`"}`, 1))
	}
}

// metered gives a call a progress token.
func metered(token string) func(*schemas.Event) {
	return func(e *schemas.Event) {
		e.Body = []byte(strings.Replace(string(e.Body), `"arguments"`, `"_meta":{"progressToken":`+token+`},`+"\n"+`"arguments"`, 1))
	}
}

// beside carries out a call beside others.
func (r *rig) beside(e schemas.Event) (wait func()) {
	done := make(chan error, 1)
	go func() { done <- r.d.Handle(context.Background(), e, r.log.emit) }()
	return func() {
		r.t.Helper()
		if err := <-done; err != nil {
			r.t.Fatal(err)
		}
	}
}

// A session has a process of its own, which ends with it.
func TestStdioSession(t *testing.T) {
	nothingLeft(t)
	r, s, _ := stdioRig(t, "")
	r.open("s2")
	first := r.method("initialize", "", initialize, inSession("s1"))
	if n := len(children(t)); n != 0 {
		t.Errorf("%d processes before the first request", n)
	}
	r.handle(first)
	r.ends(first, "completed")
	pids := map[string]string{}
	for _, key := range []string{"s1", "s2", "s1", "s2"} {
		e := r.legacy("write", inSession(key), metered("7"))
		r.handle(e)
		end := r.ends(e, "completed")
		m, err := jsonrpc.Decode(end.Body, jsonrpc.Limits{})
		if err != nil {
			t.Fatal(err)
		}
		// A process has no headers, so that what it is called by stands in _meta.
		parent, state := e.Onward(nil)
		if got := string(m.Result().Get("got").Raw()); !strings.Contains(got, `"arguments":{"x": 1E400}`) ||
			!strings.Contains(got, `"progressToken":7,"traceparent":"`+parent+`","tracestate":"`+state+`"}`) {
			t.Errorf("the server read %s", got)
		}
		pid, _ := m.Result().Get("pid").Text()
		if pids[key] == "" {
			pids[key] = pid
		}
		if pids[key] != pid {
			t.Errorf("session %s: process %s, before %s", key, pid, pids[key])
		}
	}
	if pids["s1"] == pids["s2"] || len(children(t)) != 2 {
		t.Errorf("processes %v %v", pids, children(t))
	}
	closed := r.log.add(schemas.Event{Tenant: "acme", Session: "s1", Agent: "a1", Data: &schemas.Closed{}})
	if err := r.d.Closed(t.Context(), closed, r.log.emit); err != nil {
		t.Fatal(err)
	}
	becomes(t, "one process is left", func() bool { return len(children(t)) == 1 })
	s.mu.Lock()
	if len(s.sessions) != 1 {
		t.Errorf("%d sessions", len(s.sessions))
	}
	s.mu.Unlock()
	r.d.Close()
}

// Of 2026-07-28 all calls share a process, which ends when nobody uses it.
func TestStdioModern(t *testing.T) {
	nothingLeft(t)
	r, s, _ := stdioRig(t, "")
	s.timing.idle = 300 * time.Millisecond
	var waits []func()
	var calls []schemas.Event
	for i := range 20 {
		e := r.call("read", metered(`"same"`), func(e *schemas.Event) { e.Session = schemas.SessionKey(fmt.Sprintf("s%d", i)) })
		calls, waits = append(calls, e), append(waits, r.beside(e))
	}
	for i, wait := range waits {
		wait()
		r.ends(calls[i], "completed")
	}
	if n := len(children(t)); n != 1 {
		t.Errorf("%d processes", n)
	}
	becomes(t, "the idle process ends", func() bool { return len(children(t)) == 0 })
	e := r.call("write")
	r.handle(e)
	r.ends(e, "completed")
	r.d.Close()
}

// What a process that answers nobody else's calls says is theirs whose it is.
func TestStdioInterleaved(t *testing.T) {
	for _, how := range []string{"modern", "session", "server"} {
		t.Run(how, func(t *testing.T) {
			nothingLeft(t)
			r, _, _ := stdioRig(t, "", func(s *Server) {
				if how == "server" {
					s.Process = "server"
				}
			})
			r.open("s2")
			gate := filepath.Join(t.TempDir(), "gate")
			kind := func(i int) func(*schemas.Event) {
				if how == "modern" {
					return func(*schemas.Event) {}
				}
				return inSession(fmt.Sprintf("s%d", i%2+1))
			}
			slow := r.call("wait", kind(0), with("x", gate))
			waitSlow := r.beside(slow)
			var calls []schemas.Event
			var waits []func()
			for i := range 10 {
				// In one session clients choose different tokens, in two maybe the same.
				e := r.call("progress", kind(i), metered(strconv.Itoa(i/2)), with("x", strconv.Itoa(i)))
				calls, waits = append(calls, e), append(waits, r.beside(e))
			}
			for i, wait := range waits {
				wait()
				r.ends(calls[i], "completed")
			}
			if err := os.WriteFile(gate, nil, 0o600); err != nil {
				t.Fatal(err)
			}
			waitSlow()
			r.ends(slow, "completed")
			said := map[schemas.CallID][]string{}
			for _, e := range r.log.of(schemas.KindProgressed) {
				said[e.Call] = append(said[e.Call], string(e.Body))
			}
			for i, e := range calls {
				if len(said[e.Call]) != i {
					t.Errorf("call %d: %d messages: %v", i, len(said[e.Call]), said[e.Call])
				}
				for n, m := range said[e.Call] {
					if want := fmt.Sprintf(`"params":{"progressToken":%d,"progress":%d}}`, i/2, n); !strings.HasSuffix(m, want) {
						t.Errorf("call %d: %s, want %s", i, m, want)
					}
				}
			}
			r.d.Close()
		})
	}
}

// untilThere waits for a file.
func untilThere(name string) {
	for {
		if _, err := os.Stat(name); err == nil {
			return
		}
		<-time.After(time.Millisecond)
	}
}

// A server asks in the middle of a call, and is answered.
func TestStdioAsks(t *testing.T) {
	for _, how := range []string{"session", "server"} {
		t.Run(how, func(t *testing.T) {
			nothingLeft(t)
			r, _, _ := stdioRig(t, "", func(s *Server) { s.Process = how })
			e := r.legacy("ask", with("x", "1"))
			wait := r.beside(e)
			asked := r.log.await(t, schemas.KindAsked, 1)[0]
			a := asked.Data.(*schemas.Asked)
			if asked.Call != e.Call || a.Method != "elicitation/create" {
				t.Errorf("%+v", asked)
			}
			answer := r.log.add(schemas.Event{
				Tenant: "acme", Session: "s1", Agent: "a1", Call: e.Call, Root: e.Call,
				Data: &schemas.Answered{Target: a.Target, ID: a.ID}, Body: []byte(`{"jsonrpc":"2.0","id":"` + a.ID + `","result":{"n":1E400}}`),
			})
			if err := r.d.Answered(t.Context(), answer, r.log.emit); err != nil {
				t.Fatal(err)
			}
			wait()
			if end := r.ends(e, "completed"); !strings.Contains(string(end.Body), `{"was":{"jsonrpc":"2.0","id":"q1","result":{"n":1E400}}}`) {
				t.Errorf("%s", end.Body)
			}
			// With two calls in flight it is not known whose the question is.
			gate := filepath.Join(t.TempDir(), "gate")
			slow := r.legacy("wait", with("x", gate))
			waitSlow := r.beside(slow)
			untilThere(gate + ".began")
			second := r.legacy("ask", with("x", "2"))
			waitSecond := r.beside(second)
			if how == "session" {
				asked = r.log.await(t, schemas.KindAsked, 2)[1]
				a = asked.Data.(*schemas.Asked)
				if asked.Call != "" && asked.Call != second.Call {
					t.Errorf("asked in %q", asked.Call)
				}
				answer = r.log.add(schemas.Event{
					Tenant: "acme", Session: "s1", Agent: "a1",
					Data: &schemas.Answered{Target: a.Target, ID: a.ID}, Body: []byte(`{"jsonrpc":"2.0","id":"` + a.ID + `","result":{}}`),
				})
				if err := r.d.Answered(t.Context(), answer, r.log.emit); err != nil {
					t.Fatal(err)
				}
			}
			waitSecond()
			if end := r.ends(second, "completed"); how == "server" && !strings.Contains(string(end.Body), "-32603") && !strings.Contains(string(end.Body), `"was"`) {
				t.Errorf("%s", end.Body)
			}
			if err := os.WriteFile(gate, nil, 0o600); err != nil {
				t.Fatal(err)
			}
			waitSlow()
			r.d.Close()
		})
	}
}

// What a server says outside of calls is the session's.
func TestStdioOutside(t *testing.T) {
	for _, how := range []string{"session", "server"} {
		t.Run(how, func(t *testing.T) {
			nothingLeft(t)
			r, _, _ := stdioRig(t, "", func(s *Server) { s.Process = how })
			r.open("s2")
			for _, key := range []string{"s1", "s2"} {
				e := r.legacy("read", inSession(key))
				r.handle(e)
				r.ends(e, "completed")
			}
			e := r.method("notifications/roots/list_changed", "", `{"jsonrpc":"2.0","method":"notifications/roots/list_changed"}`, inSession("s1"),
				authorized(func(a *schemas.Authorized) { a.OneWay = true }))
			r.handle(e)
			r.ends(e, "completed")
			want := map[string]int{"session": 3, "server": 6}[how]
			got := map[schemas.SessionKey]string{}
			for _, e := range r.log.await(t, schemas.KindNotified, want) {
				m, err := jsonrpc.Decode(e.Body, jsonrpc.Limits{})
				if err != nil {
					t.Fatal(err)
				}
				got[e.Session] += string(m.Params().Get("n").Raw())
			}
			if got["s1"] != "012" || how == "server" && got["s2"] != "012" || how == "session" && got["s2"] != "" {
				t.Errorf("%v", got)
			}
			r.d.Close()
		})
	}
}

// A server that exits at start is started again after pauses that grow; calls
// fail meanwhile, and say how it ended.
func TestStdioCrashAtStart(t *testing.T) {
	nothingLeft(t)
	r, s, words := stdioRig(t, "crash")
	s.timing.pause = time.Hour
	for i := range 4 {
		e := r.legacy("write")
		r.handle(e)
		end := r.ends(e, "unavailable")
		detail := end.Data.(*schemas.Failed).Detail
		if !strings.Contains(detail, "it exited with code 7; its last words: no such database: [secret]") || !strings.Contains(detail, "started again in") {
			t.Errorf("%d: %s", i, detail)
		}
	}
	if n := strings.Count(words.String(), "a server was started"); n != 1 {
		t.Errorf("started %d times", n)
	}
	modern := r.call("write")
	r.handle(modern)
	r.ends(modern, "unavailable")
	// The pauses are over, and the next is longer.
	s.mu.Lock()
	s.timing.pause = 20 * time.Millisecond
	s.ill[""].until = time.Now()
	s.mu.Unlock()
	var last time.Duration
	for range 3 {
		before := 0
		becomes(t, "another start", func() bool {
			e := r.legacy("write")
			r.handle(e)
			s.mu.Lock()
			defer s.mu.Unlock()
			was := before
			before = s.ill[""].failures
			return was != 0 && before > was
		})
		s.mu.Lock()
		pause := s.ill[""].until.Sub(s.ill[""].at)
		s.mu.Unlock()
		if pause <= last {
			t.Errorf("a pause of %v after one of %v", pause, last)
		}
		last = pause
	}
	r.d.Close()
}

// A program that cannot be started.
func TestStdioNoProgram(t *testing.T) {
	nothingLeft(t)
	r, _, _ := stdioRig(t, "", func(s *Server) { s.Command = []string{"/no/such/program"} })
	for _, e := range []schemas.Event{r.legacy("write"), r.call("write"), r.legacy("read")} {
		r.handle(e)
		if detail := r.ends(e, "unavailable").Data.(*schemas.Failed).Detail; !strings.Contains(detail, "starting it: fork/exec /no/such/program: no such file or directory") {
			t.Error(detail)
		}
	}
	r.d.Close()
}

// A process that ends in the middle of a call: what came of it is unknown, the
// next call starts another.
func TestStdioCrashInCall(t *testing.T) {
	for _, tool := range []string{"die", "kill"} {
		for _, how := range []string{"modern", "session", "server"} {
			t.Run(tool+"/"+how, func(t *testing.T) {
				nothingLeft(t)
				r, _, _ := stdioRig(t, "", func(s *Server) {
					if how == "server" {
						s.Process = how
					}
				})
				kind := inSession("s1")
				if how == "modern" {
					kind = func(*schemas.Event) {}
				}
				before := r.call("write", kind)
				r.handle(before)
				r.ends(before, "completed")
				e := r.call(tool, kind, metered("1"))
				r.handle(e)
				want := map[string]string{"die": "it exited with code 3; its last words: out of cheese", "kill": "it was ended by a signal: killed"}[tool]
				if detail := r.ends(e, "unknown").Data.(*schemas.Failed).Detail; !strings.Contains(detail, want) {
					t.Errorf("%s", detail)
				}
				after := r.call("write", kind)
				r.handle(after)
				r.ends(after, "completed")
				r.d.Close()
			})
		}
	}
}

// A server that does not want to end, and has started another process, is ended
// with it.
func TestStdioStubborn(t *testing.T) {
	nothingLeft(t)
	r, _, words := stdioRig(t, "stubborn")
	e := r.legacy("write")
	r.handle(e)
	r.ends(e, "completed")
	var sleeper int
	becomes(t, "it says whom it has started", func() bool {
		_, after, ok := strings.Cut(words.String(), `stderr="sleeper `)
		pid, _, _ := strings.Cut(after, `"`)
		sleeper, _ = strconv.Atoi(pid)
		return ok && sleeper > 0
	})
	if !alive(sleeper) {
		t.Error("the sleeper is not there")
	}
	began := time.Now()
	r.d.Close()
	if took := time.Since(began); took > 5*time.Second {
		t.Errorf("took %v", took)
	}
	becomes(t, "the sleeper is gone", func() bool { return !alive(sleeper) })
}

// What is not the protocol on standard output, and what is too much of anything.
func TestStdioOutput(t *testing.T) {
	nothingLeft(t)
	r, _, words := stdioRig(t, "")
	for _, kind := range []func(*schemas.Event){inSession("s1"), func(*schemas.Event) {}} {
		for tool, want := range map[string]string{"garbage": "completed", "twice": "bad_answer", "long": "too_large"} {
			e := r.call(tool, kind)
			r.handle(e)
			r.ends(e, want)
		}
		// A line that is too long ends only the call that it answers.
		gate := filepath.Join(t.TempDir(), "gate")
		slow := r.call("wait", kind, with("x", gate))
		wait := r.beside(slow)
		long := r.call("long", kind)
		r.handle(long)
		r.ends(long, "too_large")
		if err := os.WriteFile(gate, nil, 0o600); err != nil {
			t.Fatal(err)
		}
		wait()
		r.ends(slow, "completed")
	}
	if text := words.String(); !strings.Contains(text, "no message to its standard output") || !strings.Contains(text, "{not json") || len(text) > 100_000 {
		t.Errorf("%d bytes in the log", len(text))
	}
	r.d.Close()
}

// 1 GB of standard error neither stops the server nor fills anything.
func TestStdioFlood(t *testing.T) {
	nothingLeft(t)
	r, _, words := stdioRig(t, "")
	e := r.legacy("flood", with("x", strconv.Itoa(1<<20)))
	r.handle(e)
	r.ends(e, "completed")
	r.d.Close()
	if text := words.String(); !strings.Contains(text, "left_out=") || len(text) > 1<<20 {
		t.Errorf("%d bytes in the log", len(text))
	}
}

// unread handles a call and takes its first message, and no more until free is
// called, which returns what Handle has.
func (r *rig) unread(e schemas.Event) (free func() error) {
	reading, stuck, done := make(chan struct{}, 1), make(chan struct{}), make(chan error, 1)
	go func() {
		done <- r.d.Handle(context.Background(), e, func(ctx context.Context, e schemas.Event) (schemas.Receipt, error) {
			if e.Kind() == schemas.KindProgressed {
				poke(reading)
				<-stuck
			}
			return r.log.emit(ctx, e)
		})
	}()
	<-reading
	return func() error {
		close(stuck)
		return <-done
	}
}

// Who does not read holds the process up for a while, and fails then; the
// process lives on, and what others ask of it is answered.
func TestStdioSlowReader(t *testing.T) {
	nothingLeft(t)
	r, s, _ := stdioRig(t, "")
	s.timing.stall = 200 * time.Millisecond
	e := r.legacy("progress", metered("1"), with("x", strconv.Itoa(3*mailboxLetters)))
	free := r.unread(e)
	other := r.legacy("read")
	r.handle(other)
	r.ends(other, "completed")
	if err := free(); err != nil {
		t.Fatal(err)
	}
	if detail := r.ends(e, "unknown").Data.(*schemas.Failed).Detail; !strings.Contains(detail, errStdioSlow.Error()) {
		t.Error(detail)
	}
	if n := len(children(t)); n != 1 {
		t.Errorf("%d processes", n)
	}
	r.d.Close()
}

// A session whose stream nobody reads ends, and its process with it.
func TestStdioStreamUnread(t *testing.T) {
	nothingLeft(t)
	_, s, _ := stdioRig(t, "")
	s.timing.stall = 50 * time.Millisecond
	say := func(id, body string) (*http.Response, error) {
		req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, "stdio://s", strings.NewReader(body))
		if err != nil {
			t.Fatal(err)
		}
		req.Header.Set("Mcp-Session-Id", id)
		return s.RoundTrip(req)
	}
	resp, err := say("", initialize)
	if err != nil {
		t.Fatal(err)
	}
	id := resp.Header.Get("Mcp-Session-Id")
	becomes(t, "the session is gone", func() bool {
		resp, err := say(id, `{"jsonrpc":"2.0","method":"notifications/roots/list_changed"}`)
		if err != nil {
			t.Fatal(err)
		}
		return resp.StatusCode == http.StatusNotFound
	})
	becomes(t, "the process is gone", func() bool { return len(children(t)) == 0 })
	s.close()
}

// A call that is taken back: the server is told.
func TestStdioCancel(t *testing.T) {
	for how, kind := range map[string]func(*schemas.Event){"session": inSession("s1"), "modern": func(*schemas.Event) {}} {
		t.Run(how, func(t *testing.T) {
			nothingLeft(t)
			r, _, words := stdioRig(t, "")
			e := r.call("never", kind, metered("1"))
			wait := r.beside(e)
			r.log.await(t, schemas.KindProgressed, 1)
			wish := r.log.add(e.Next(&schemas.Cancel{Reason: "enough"}, nil))
			if err := r.d.Cancel(t.Context(), wish, r.log.emit); err != nil {
				t.Fatal(err)
			}
			wait()
			r.ends(e, "cancelled")
			becomes(t, "it is told", func() bool { return strings.Contains(words.String(), "heard notifications/cancelled") })
			r.d.Close()
		})
	}
}

// As many processes as may be, and half of them for a tenant.
func TestStdioProcesses(t *testing.T) {
	nothingLeft(t)
	r, s, _ := stdioRig(t, "", func(s *Server) { s.Processes = 4 })
	for i := range 3 {
		key := fmt.Sprintf("s%d", i+10)
		r.open(key)
		e := r.legacy("write", inSession(key))
		r.handle(e)
		r.ends(e, map[bool]string{true: "completed", false: "overloaded"}[i < 2])
	}
	// When one ends there is room.
	s.mu.Lock()
	for _, session := range s.sessions {
		s.mu.Unlock()
		session.leave(errStdioClosed)
		s.mu.Lock()
		break
	}
	s.mu.Unlock()
	r.open("s20")
	e := r.legacy("write", inSession("s20"))
	r.handle(e)
	r.ends(e, "completed")
	r.d.Close()
}

// The process sees what it is given, and where it is to run.
func TestStdioEnvironment(t *testing.T) {
	t.Setenv("WAYBILL_TEST_PRIVATE", "x")
	dir, err := filepath.EvalSymlinks(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	r, _, _ := stdioRig(t, "", func(s *Server) { s.Dir = dir })
	e := r.call("env")
	r.handle(e)
	m, err := jsonrpc.Decode(r.ends(e, "completed").Body, jsonrpc.Limits{})
	if err != nil {
		t.Fatal(err)
	}
	if got := string(m.Result().Get("env").Raw()); got != `["SECRET=hunter22","`+stdioServer+`=as "]` {
		t.Error(got)
	}
	if got, _ := m.Result().Get("dir").Text(); got != dir {
		t.Error(got)
	}
}

// Who asks a server whether it is modern, and hears that it is not, leaves no
// process behind.
func TestStdioProbe(t *testing.T) {
	nothingLeft(t)
	r, _, _ := stdioRig(t, "legacy")
	e := r.method("server/discover", "", `{"jsonrpc":"2.0","id":1,"method":"server/discover","params":{}}`)
	r.handle(e)
	r.ends(e, "completed")
	becomes(t, "the process ends", func() bool { return len(children(t)) == 0 })
	r.d.Close()
}

// One that does not answer what it does not know is of the era with sessions, and
// is asked once.
func TestStdioProbeSilent(t *testing.T) {
	nothingLeft(t)
	r, _, _ := stdioRig(t, "silent", func(s *Server) { s.Era = EraAuto })
	m := r.d.upstreams["s"].mcp
	if m.eras.time != probeStart {
		t.Errorf("a probe may take %v, want %v", m.eras.time, probeStart)
	}
	m.eras.time = time.Second
	if got := m.eraOf(t.Context()); got != EraLegacy {
		t.Errorf("era %q, want %q", got, EraLegacy)
	}
	if left := time.Until(m.eras.until); left < probeAgain/2 {
		t.Errorf("it is asked again in %v", left)
	}
	r.d.Close()
}

// What cannot be meant.
func TestStdioConfig(t *testing.T) {
	for want, s := range map[string]Server{
		"the program's name is empty": {Command: []string{""}},
		"a NUL character":             {Command: []string{"x", "a\x00"}},
		"neither url nor headers":     {Command: []string{"x"}, URL: "http://x"},
		`process "x"`:                 {Command: []string{"x"}, Process: "x"},
		`env "A=B" cannot be set`:     {Command: []string{"x"}, Env: map[string]string{"A=B": "c"}},
		`env "A" cannot be set`:       {Command: []string{"x"}, Env: map[string]string{"A": "\x00"}},
	} {
		s.Name = "s"
		_, err := newUpstream(s, Options{Log: slog.New(slog.DiscardHandler)})
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v, want %s", err, want)
		}
	}
}

func TestReadLine(t *testing.T) {
	long := strings.Repeat("a", 3000) + strings.Repeat("b", 3000)
	r := bufio.NewReaderSize(strings.NewReader("x\r\n\n"+long+"\nend"), 16)
	for _, want := range []struct {
		text string
		cut  bool
		err  error
	}{{"x", false, nil}, {"", false, nil}, {long[:1024] + long[len(long)-1024:], true, nil}, {"end", false, io.EOF}} {
		b, cut, err := readLine(r, 4000, 10_000)
		if string(b) != want.text || cut != want.cut || !errors.Is(err, want.err) {
			t.Errorf("%.20q %d %v %v, want %.20q", b, len(b), cut, err, want.text)
		}
	}
	if b, _, err := readLine(bufio.NewReaderSize(strings.NewReader(strings.Repeat("a", 20_000)), 16), 4000, 10_000); !errors.Is(err, errEndless) || len(b) > 4000 {
		t.Errorf("%d bytes of a line without end: %v", len(b), err)
	}
}

// stdioStarts is how many processes are started by TestStdioStarts. The variable
// WAYBILL_TEST_STARTS raises it.
const stdioStarts = 200

// Many starts leave nothing behind.
func TestStdioStarts(t *testing.T) {
	nothingLeft(t)
	many := stdioStarts
	if n, err := strconv.Atoi(os.Getenv("WAYBILL_TEST_STARTS")); err == nil {
		many = n
	}
	_, s, _ := stdioRig(t, "")
	s.log = slog.New(slog.DiscardHandler)
	s.timing.stop, s.timing.term = 10*time.Second, 10*time.Second
	send := func(method, id, body string) (*http.Response, string) {
		t.Helper()
		req, err := http.NewRequestWithContext(t.Context(), method, "stdio://s", strings.NewReader(body))
		if err != nil {
			t.Error(err)
			return nil, ""
		}
		req.Header.Set("Mcp-Session-Id", id)
		resp, err := s.RoundTrip(req)
		if err != nil {
			t.Error(err)
			return nil, ""
		}
		defer resp.Body.Close()
		b, err := io.ReadAll(resp.Body)
		if err != nil || resp.StatusCode > 299 {
			t.Errorf("%s: HTTP %d %v", method, resp.StatusCode, err)
		}
		return resp, string(b)
	}
	cpu := func(who int) time.Duration {
		var u syscall.Rusage
		if err := syscall.Getrusage(who, &u); err != nil {
			t.Fatal(err)
		}
		return time.Duration(u.Utime.Nano() + u.Stime.Nano())
	}
	fds, began := descriptors(t), time.Now()
	ours, theirs := cpu(syscall.RUSAGE_SELF), cpu(syscall.RUSAGE_CHILDREN)
	var workers sync.WaitGroup
	for range 4 {
		workers.Go(func() {
			for range many / 4 {
				resp, _ := send(http.MethodPost, "", initialize)
				if resp == nil {
					return
				}
				id := resp.Header.Get("Mcp-Session-Id")
				send(http.MethodPost, id, `{"jsonrpc":"2.0","method":"notifications/initialized"}`)
				if _, body := send(http.MethodPost, id, `{"jsonrpc":"2.0","id":"c","method":"tools/call","params":{"name":"read"}}`); !strings.Contains(body, `"pid"`) {
					t.Error(body)
				}
				send(http.MethodDelete, id, "")
			}
		})
	}
	workers.Wait()
	s.close()
	took := time.Since(began)
	if now := descriptors(t); now > fds {
		t.Errorf("%d descriptors, before there were %d", now, fds)
	}
	s.mu.Lock()
	if len(s.sessions)+len(s.children)+len(s.ill) > 0 {
		t.Errorf("%d sessions, %d processes, %d illnesses are remembered", len(s.sessions), len(s.children), len(s.ill))
	}
	s.mu.Unlock()
	n := time.Duration(many)
	t.Logf("%d starts, a call each: %v each; CPU each: ours %v, of the server's process %v", many,
		took/n, (cpu(syscall.RUSAGE_SELF)-ours)/n, (cpu(syscall.RUSAGE_CHILDREN)-theirs)/n)
}
