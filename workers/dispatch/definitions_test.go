package dispatch

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"waybill.dev/schemas"
	"waybill.dev/schemas/jsonrpc"
)

// pinned stands for the registry: what is known, and why it must not be called.
type pinned struct {
	mu    sync.Mutex
	known map[string]string // tool → why not; "" is none
	fails error             // nothing can be recorded
}

func (p *pinned) definitions() *Definitions {
	return &Definitions{
		Pins: func(string) bool { return true },
		Listed: func(_ context.Context, _, _ string, result jsonrpc.Value) (shown []bool, err error) {
			p.mu.Lock()
			defer p.mu.Unlock()
			for e := range result.Get("tools").Elements() {
				name, _ := e.Get("name").Text()
				if _, ok := p.known[name]; !ok {
					p.known[name] = ""
				}
				if strings.Contains(string(e.Raw()), "changed") {
					p.known[name] = "it has changed"
				}
				shown = append(shown, p.known[name] == "")
			}
			return shown, p.fails
		},
		Said:     func(context.Context, string, jsonrpc.Value) (bool, error) { return false, nil },
		Presents: func(string) bool { return true },
		Heard:    func(string) bool { return true },
		Admit: func(q *schemas.Requested, _ string, _ []byte) (string, bool) {
			p.mu.Lock()
			defer p.mu.Unlock()
			why, ok := p.known[q.Name]
			return why, !ok && q.Method == "tools/call"
		},
		Answered: func(_, _ string, answer []byte) string {
			if strings.Contains(string(answer), "too much") {
				return "it has too much"
			}
			return ""
		},
	}
}

// What is called is what was listed and may be called, and nothing else reaches a
// server.
func TestDefinitions(t *testing.T) {
	const call = "tools/call write"
	for name, c := range map[string]struct {
		known  map[string]string
		tools  string // that the server lists
		fails  error
		status int
		want   string // ending
		asked  string // of the server, in order
	}{
		"known":                 {map[string]string{"write": ""}, "", nil, 200, "completed", call},
		"listed first":          {nil, `{"name":"write"}`, nil, 200, "completed", "tools/list, " + call},
		"on the next page":      {nil, `{"name":"other"}|{"name":"write"}`, nil, 200, "completed", "tools/list, tools/list, " + call},
		"not listed":            {nil, `{"name":"other"}`, nil, 200, "unlisted", "tools/list"},
		"quarantined":           {map[string]string{"write": "it has changed"}, "", nil, 200, "unlisted", ""},
		"changed as it is seen": {nil, `{"name":"write","description":"changed"}`, nil, 200, "unlisted", "tools/list"},
		"the list fails":        {nil, "", nil, 500, "unavailable", "tools/list"},
		"cannot be recorded":    {nil, `{"name":"other"}`, errors.New("the log is full"), 200, "unavailable", "tools/list"},
	} {
		t.Run(name, func(t *testing.T) {
			var asked []string
			pages := strings.Split(c.tools, "|")
			p := &pinned{known: c.known, fails: c.fails}
			if p.known == nil {
				p.known = map[string]string{}
			}
			r := newRig(t, func(w http.ResponseWriter, req *http.Request) {
				b, _ := io.ReadAll(req.Body)
				m, err := jsonrpc.Decode(b, jsonrpc.Limits{})
				if err != nil {
					t.Error(err)
				}
				tool, _ := m.Params().Get("name").Text()
				asked = append(asked, strings.TrimSpace(m.Method()+" "+tool))
				if m.Method() == "tools/call" {
					answerJSON(w, 200, fmt.Sprintf(`{"jsonrpc":"2.0","id":%s,"result":{"resultType":"complete"}}`, m.ID().Raw()))
					return
				}
				page, next := pages[0], ""
				if cursor, _ := m.Params().Get("cursor").Text(); cursor != "" {
					page = pages[1]
				} else if len(pages) > 1 {
					next = `,"nextCursor":"1"`
				}
				answerJSON(w, c.status, fmt.Sprintf(`{"jsonrpc":"2.0","id":%s,"result":{"resultType":"complete","tools":[%s]%s}}`, m.ID().Raw(), page, next))
			}, func(o *Options) { o.Definitions = p.definitions() })
			if c.status != 200 {
				pages = []string{`"`} // garbled, too
			}
			r.handle(r.call("write"))
			switch c.want {
			case "unlisted":
				e := r.want("invalid")
				if f := e.Data.(*schemas.Failed); !f.Unlisted || f.Attempts != 0 {
					t.Errorf("%+v", f)
				}
			default:
				r.want(c.want)
			}
			if got := strings.Join(asked, ", "); got != c.asked {
				t.Errorf("the server was asked %q, want %q", got, c.asked)
			}
		})
	}
}

// A name that is not there is not looked for again at once; a server that says that
// its list has changed is asked for it before the next call.
func TestListsAgain(t *testing.T) {
	var asked []string
	now := time.Now()
	p := &pinned{known: map[string]string{"read": ""}}
	changed := false
	r := newRig(t, func(w http.ResponseWriter, req *http.Request) {
		b, _ := io.ReadAll(req.Body)
		m, err := jsonrpc.Decode(b, jsonrpc.Limits{})
		if err != nil {
			t.Error(err)
		}
		asked = append(asked, m.Method())
		switch {
		case m.Method() == "tools/list" && changed:
			answerJSON(w, 200, fmt.Sprintf(`{"jsonrpc":"2.0","id":%s,"result":{"resultType":"complete","tools":[{"name":"read","description":"changed"}]}}`, m.ID().Raw()))
		case m.Method() == "tools/list":
			answerJSON(w, 200, fmt.Sprintf(`{"jsonrpc":"2.0","id":%s,"result":{"resultType":"complete","tools":[{"name":"read"}]}}`, m.ID().Raw()))
		default:
			changed = true
			w.Header().Set("Content-Type", "text/event-stream")
			_, _ = fmt.Fprintf(w, "data: {\"jsonrpc\":\"2.0\",\"method\":\"notifications/tools/list_changed\"}\n\ndata: {\"jsonrpc\":\"2.0\",\"id\":%s,\"result\":{\"resultType\":\"complete\"}}\n\n", m.ID().Raw())
		}
	}, func(o *Options) { o.Definitions, o.Now = p.definitions(), func() time.Time { return now } })
	next := func(tool, ending, want string) {
		t.Helper()
		r.log.events, r.log.ids, asked = nil, nil, nil
		r.handle(r.call(tool))
		r.want(ending)
		if got := strings.Join(asked, ", "); got != want {
			t.Errorf("the server was asked %q, want %q", got, want)
		}
	}
	next("hidden", "invalid", "tools/list")
	next("hidden", "invalid", "")
	now = now.Add(learnAgain)
	next("hidden", "invalid", "tools/list")
	next("read", "completed", "tools/call")
	now = now.Add(staleAgain)
	next("read", "invalid", "tools/list")
	next("read", "invalid", "")
}

// What a server says of itself that must not stands in no answer by which it is
// introduced or lists what it has; in the others it is nobody's business.
func TestPresents(t *testing.T) {
	const (
		info  = `{"name":"evil","version":"evil","title":"evil"}`
		plain = `{"name":"s","version":"unknown"}`
		meta  = `"_meta":{"io.modelcontextprotocol/serverInfo":` + info + `,"note":"evil"}`
		clean = `"_meta":{"io.modelcontextprotocol/serverInfo":` + plain + `}`
	)
	for _, c := range []struct{ method, said, want string }{
		{"server/discover", `"result":{` + meta + `,"capabilities":{},"instructions":"evil"}`, `"result":{` + clean + `,"capabilities":{}}`},
		{"tools/list", `"result":{"tools":[],` + meta + `}`, `"result":{"tools":[],` + clean + `}`},
		{"prompts/list", `"result":{"prompts":[],"_meta":{"note":"evil"}}`, `"result":{"prompts":[]}`},
		{"resources/list", `"error":{"code":-32000,"message":"evil","data":"evil"}`, `"error":{"code":-32000,"message":"The server answers with an error."}`},
		{"server/discover", `"error":{"code":-32000,"message":"evil"}`, `"error":{"code":-32000,"message":"The server answers with an error."}`},
		{"resources/templates/list", `"result":"evil"`, ""},
		{"completion/complete", `"result":{"completion":{"values":[]},` + meta + `}`, "the same"},
	} {
		p := &pinned{}
		r := newRig(t, func(w http.ResponseWriter, req *http.Request) {
			answerJSON(w, 200, `{"jsonrpc":"2.0","id":`+idOf(req)+`,`+c.said+`}`)
		}, func(o *Options) {
			o.Definitions = p.definitions()
			o.Definitions.Presents = func(server string) bool { return server != "s" }
		})
		r.handle(r.method(c.method, "", `{"jsonrpc":"2.0","id":1,"method":"`+c.method+`"}`))
		switch {
		case c.want == "":
			r.want("bad_answer")
			continue
		case c.want == "the same":
			c.want = c.said
		}
		if end := r.want("completed"); !strings.HasSuffix(string(end.Body), ","+c.want+"}") {
			t.Errorf("%s: %s\nbecomes %s", c.method, c.said, end.Body)
		}
	}
}

// A result that does not fit is not passed on.
func TestAnswerDoesNotConform(t *testing.T) {
	p := &pinned{known: map[string]string{"write": ""}}
	r := newRig(t, func(w http.ResponseWriter, req *http.Request) {
		answerJSON(w, 200, `{"jsonrpc":"2.0","id":`+idOf(req)+`,"result":{"resultType":"complete","structuredContent":"too much"}}`)
	}, func(o *Options) { o.Definitions = p.definitions() })
	r.handle(r.call("write"))
	if f := r.want("bad_answer").Data.(*schemas.Failed); f.Attempts != 1 || !strings.Contains(f.Detail, "output schema: it has too much") {
		t.Errorf("%+v", f)
	}
}
