package mcp_test

import (
	"bufio"
	"context"
	"crypto/sha256"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"waybill.dev/schemas"
)

func hash(token string) [32]byte { return sha256.Sum256([]byte(token)) }

var legacyHeaders = []string{"MCP-Protocol-Version: 2025-11-25", "Mcp-Session-Id: $SESSION"}

// TestLegacyGolden runs the exchanges of testdata/legacy/*.txt. A file is one
// log and its exchanges one client's, in their order; the sections are those of
// [TestGolden], and
//
//	NAME/stored    golden: the events that it added to the log, one a line
//
// $SESSION is the session ID that an answer last had, $CALL the call id; a line
// "next" in a script begins that of the next call. A line "+events N" makes the
// client leave after so many events, "+restart" starts the gateway anew on its
// log first.
func TestLegacyGolden(t *testing.T) {
	files, err := filepath.Glob("testdata/legacy/*.txt")
	if err != nil || len(files) == 0 {
		t.Fatal("no files", err)
	}
	for _, file := range files {
		t.Run(strings.TrimSuffix(filepath.Base(file), ".txt"), func(t *testing.T) { legacyFile(t, file) })
	}
}

func legacyFile(t *testing.T, file string) {
	raw, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	sections, names := map[string]string{}, []string{}
	var out strings.Builder
	section := ""
	for line := range strings.Lines(string(raw)) {
		name, ok := strings.CutPrefix(strings.TrimSuffix(line, " --\n"), "-- ")
		switch {
		case ok:
			section = name
			sections[name] = ""
			if name, ok := strings.CutSuffix(name, "/request"); ok {
				names = append(names, name)
			}
		case section == "":
			out.WriteString(line)
		default:
			sections[section] += line
		}
	}
	scripts := make(chan string, 16)
	log := newMemory(t, func(ctx context.Context, e schemas.Event, emit schemas.Emit) error {
		return scripted(<-scripts, func(schemas.Event) {})(ctx, e, emit)
	})
	o := log.options()
	o.Now = func() time.Time { return noon }
	o.Deadline = func(string, string) time.Duration { return time.Minute }
	o.Fronts = []*schemas.Front{
		{Name: schemas.Gateway, Servers: []string{"everything", "files"}},
		{Name: "support", Servers: []string{"everything"}, Exposed: []schemas.Exposed{{Server: "everything", Tool: "echo", As: "say"}}},
	}
	addr, stop := up(t, o)
	session, told := "", 0
	hide := func(s string) string {
		if session != "" {
			s = strings.ReplaceAll(s, session, "$SESSION")
		}
		s = callID.ReplaceAllString(s, "$$CALL")
		return sessionKey.ReplaceAllString(s, "$$KEY")
	}
	for _, name := range names {
		request, script := sections[name+"/request"], sections[name+"/ask"]
		events := 0
		head, body, _ := strings.Cut(request, "\n\n")
		var lines []string
		for _, l := range strings.Split(strings.TrimSpace(head), "\n") {
			switch verb, rest, _ := strings.Cut(l, " "); verb {
			case "+events":
				fmt.Sscan(rest, &events)
			case "+restart":
				stop()
				addr, stop = up(t, o)
			default:
				lines = append(lines, l)
			}
		}
		for _, l := range legacyHeaders {
			name, _, _ := strings.Cut(l, ":")
			if !slices.ContainsFunc(lines, func(have string) bool {
				return strings.HasPrefix(strings.ToLower(strings.TrimPrefix(have, "-")), strings.ToLower(name))
			}) {
				lines = append(lines, l)
			}
		}
		if _, ok := sections[name+"/ask"]; ok {
			for _, one := range strings.Split(script, "next\n") {
				scripts <- one
			}
		}
		text := strings.ReplaceAll(strings.Join(lines, "\n")+"\n\n"+body, "$SESSION", session)
		response, id := legacyExchange(t, addr, text, events)
		if id != "" {
			session = id
		}
		var stored strings.Builder
		for _, e := range log.all()[told:] {
			if strings.Contains(string(e.ID()), session) && session != "" {
				t.Errorf("the session's ID is in the event %s", e.ID())
			}
			b, err := e.MarshalJSON()
			if err != nil {
				t.Fatal(err)
			}
			if session != "" && strings.Contains(string(b), session) {
				t.Errorf("the session's ID is in the log: %s", b)
			}
			fmt.Fprintf(&stored, "%d %s\n", e.Seq, hide(brief(e)))
			told++
		}
		if strings.Contains(response, "secret") {
			t.Errorf("operator's detail shown to the caller:\n%s", response)
		}
		response = hide(response)
		fmt.Fprintf(&out, "-- %s/request --\n%s", name, request)
		if ask, ok := sections[name+"/ask"]; ok {
			fmt.Fprintf(&out, "-- %s/ask --\n%s", name, ask)
		}
		fmt.Fprintf(&out, "-- %s/stored --\n%s-- %s/response --\n%s", name, stored.String(), name, response)
		if *update {
			continue
		}
		if got := stored.String(); got != sections[name+"/stored"] {
			t.Errorf("%s: stored\n%s\nwant\n%s", name, got, sections[name+"/stored"])
		}
		if response != sections[name+"/response"] {
			t.Errorf("%s: response\n%s\nwant\n%s", name, response, sections[name+"/response"])
		}
	}
	if *update {
		if err := os.WriteFile(file, []byte(out.String()), 0o644); err != nil {
			t.Fatal(err)
		}
	}
}

var sessionKey = regexp.MustCompile(`\bs[0-9a-v]{26}\b`)

// brief is what matters of an event here.
func brief(e schemas.Event) string {
	s := string(e.Kind())
	switch d := e.Data.(type) {
	case *schemas.Opened:
		s += fmt.Sprintf(" %q %q at %q %s", d.Name, d.Client, d.Server, d.Revision)
	case *schemas.Closed:
		s += fmt.Sprintf(" %q", d.Reason)
	case *schemas.Requested:
		s += fmt.Sprintf(" %s %s %q %s", d.Server, d.Method, d.Name, d.Revision)
		if d.Alias != "" {
			s += fmt.Sprintf(" alias %q", d.Alias)
		}
		if d.OneWay {
			s += " one way"
		}
		if e.Parent != "" {
			s += " of $PARENT"
		}
	case *schemas.Asked:
		s += fmt.Sprintf(" %s %s", d.Method, d.ID)
	case *schemas.Answered:
		s += fmt.Sprintf(" %s %s of %s", d.Method, d.ID, e.Call)
	case *schemas.Cancel:
		s += fmt.Sprintf(" %q", d.Reason)
	}
	return s + " " + string(e.Body)
}

// legacyExchange sends one request and reads the answer, or so many events of
// it. The connection is closed afterwards, and by the time it returns the
// gateway knows.
func legacyExchange(t *testing.T, addr, request string, events int) (response, session string) {
	t.Helper()
	conn, err := net.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if _, err := conn.Write(wire(request)); err != nil {
		t.Fatal(err)
	}
	res, err := http.ReadResponse(bufio.NewReader(conn), nil)
	if err != nil {
		t.Fatal(err)
	}
	var body strings.Builder
	if events > 0 {
		in := bufio.NewReader(res.Body)
		for events > 0 {
			line, err := in.ReadString('\n')
			if err != nil {
				t.Fatalf("%v after %q", err, body.String())
			}
			body.WriteString(line)
			if line == "\n" {
				events--
			}
		}
	} else if _, err := io.Copy(&body, res.Body); err != nil {
		t.Fatal(err)
	}
	var b strings.Builder
	fmt.Fprintln(&b, res.Status)
	for _, name := range []string{"Allow", "Content-Type", "Mcp-Session-Id", "Retry-After"} {
		for _, v := range res.Header[name] {
			fmt.Fprintf(&b, "%s: %s\n", name, v)
		}
	}
	fmt.Fprintf(&b, "\n%s\n", body.String())
	return b.String(), res.Header.Get("Mcp-Session-Id")
}
