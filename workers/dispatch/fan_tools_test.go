package dispatch

import (
	"context"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"waybill.dev/schemas"
	"waybill.dev/schemas/jsonrpc"
)

// toolset answers tools/call by the tool's name.
func toolset(answers map[string]said) script {
	return func(method string, m *jsonrpc.Message) said {
		name, _ := m.Params().Get("name").Text()
		if a, ok := answers[name]; ok && method == "tools/call" {
			return a
		}
		return said{status: 400, err: `{"code":-32602,"message":"unknown tool \"` + name + `\""}`}
	}
}

type many struct {
	IsError           bool
	Content           []struct{ Text string }
	StructuredContent struct {
		Results []struct {
			Tool, Server, Call string
			OK, Cut            bool
			Bytes              int
			Result             json.RawMessage
			Error              *struct {
				Code    any
				Message string
			}
		}
		OK, Failed int
	}
}

func (w *town) many(t *testing.T, arguments string) (m many) {
	t.Helper()
	got := w.result(schemas.Gateway, "tools/call", callMany, `{"name":"call_many","arguments":`+arguments+`,`+fanMeta+`}`)
	var r struct{ Result many }
	if err := json.Unmarshal([]byte(`{`+got+`}`), &r); err != nil {
		t.Fatalf("%v: %s", err, got)
	}
	return r.Result
}

func TestCallMany(t *testing.T) {
	ok := said{result: `{"content":[{"type":"text","text":"x"}],"n":1.50}`}
	w := newTown(t, map[string]script{
		"a": toolset(map[string]said{"t": ok, "long name, which is no clean one": ok}),
		"b": toolset(map[string]said{"t": {result: `{"content":[],"isError":true}`}, "big": {result: `{"x":"` + strings.Repeat("y", 100<<10) + `"}`},
			"asks": {result: `{"resultType":"input_required","inputRequests":{}}`}}),
		"c":      toolset(map[string]said{"t": {status: 500}}),
		"d":      toolset(map[string]said{"t": {hang: true}}),
		"secret": toolset(map[string]said{"t": ok}),
	}, func(o *Options) {
		o.MaxAnswer = 192 << 10
		for i := range o.Servers {
			if o.Servers[i].Name == "d" {
				o.Servers[i].Deadline = 300 * time.Millisecond
			}
		}
	})
	w.allow = func(q *schemas.Requested) (bool, []string) { return q.Server != "secret" && q.Server != "nobody", nil }
	m := w.many(t, `{"calls":[{"tool":"a__t","arguments":{"x":1E400}},{"tool":"b__t"},{"tool":"c__t"},{"tool":"d__t"},{"tool":"secret__t"},{"tool":"nobody__t"},{"tool":"a__gone"},{"tool":"what"},{"tool":"b__big"},{"tool":"b__asks"}]}`)
	s := m.StructuredContent
	if m.IsError || len(s.Results) != 10 || s.OK != 2 || s.Failed != 8 {
		t.Fatalf("%+v", m)
	}
	if r := s.Results[0]; !r.OK || string(r.Result) != `{"content":[{"type":"text","text":"x"}],"n":1.50}` || r.Server != "a" || r.Tool != "a__t" {
		t.Errorf("%+v", r)
	}
	if r := s.Results[1]; r.OK || !strings.Contains(string(r.Result), "isError") || r.Error != nil {
		t.Errorf("%+v", r)
	}
	for i, want := range map[int]string{
		2: `unknown`, 3: `unknown`, 4: `-32602 unknown tool "t"`, 5: `-32602 unknown tool "t"`, 6: `-32602 unknown tool "gone"`, 7: `-32602 unknown tool "what"`, 9: `input_required`,
	} {
		r := s.Results[i]
		if r.OK || r.Error == nil || !strings.HasPrefix(fmt.Sprint(r.Error.Code, " ", r.Error.Message), want) || r.Call == "" && i != 7 || r.Result != nil {
			t.Errorf("%d: %+v %+v, want %s", i, r, r.Error, want)
		}
	}
	if r := s.Results[8]; !r.OK || !r.Cut || r.Bytes < 100<<10 || r.Result != nil {
		t.Errorf("%+v", r)
	}
	// The arguments go on as they are.
	for _, e := range w.children() {
		if e.Data.(*schemas.Requested).Name == "t" && e.Data.(*schemas.Requested).Server == "a" &&
			!strings.HasPrefix(string(e.Body), `{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{"name":"t","arguments":{"x":1E400},"_meta":{`) {
			t.Errorf("%s", e.Body)
		}
	}

	// Of a server that the caller may not use he learns by naming it only that
	// the tool is unknown there, and by "*" nothing.
	for servers, want := range map[string]string{
		`["*","a"]`: "a b c d", `["*","secret"]`: "a b c d secret", `["secret","*"]`: "secret a b c d",
	} {
		m = w.many(t, `{"tool":"t","servers":`+servers+`,"arguments":{}}`)
		var got []string
		for _, r := range m.StructuredContent.Results {
			got = append(got, r.Server)
		}
		if strings.Join(got, " ") != want || m.StructuredContent.OK != 1 || m.StructuredContent.Failed != len(got)-1 ||
			strings.Contains(m.Content[0].Text, "secret") != strings.Contains(servers, "secret") {
			t.Errorf("%s: %+v", servers, m)
		}
	}
	if m = w.many(t, `{"tool":"gone","servers":["*"]}`); !m.IsError || m.StructuredContent.Failed != 4 {
		t.Errorf("%+v", m)
	}
	w.allow = func(q *schemas.Requested) (bool, []string) { return q.Server == schemas.Gateway, nil }
	if m = w.many(t, `{"tool":"t","servers":["*"]}`); !m.IsError || len(m.StructuredContent.Results) != 0 || !strings.HasPrefix(m.Content[0].Text, "There is no server") {
		t.Errorf("%+v", m)
	}
}

// A name that was shortened is looked up in the server's list.
func TestCallManyShortened(t *testing.T) {
	const long = "a name, which is not clean"
	w := newTown(t, map[string]script{"a": func(method string, m *jsonrpc.Message) said {
		if method == "tools/list" {
			return said{result: `{"tools":[{"name":"x"},{"name":"` + long + `"}]}`}
		}
		return toolset(map[string]said{long: {result: `{}`}, "x_deadbeef": {result: `{}`}})(method, m)
	}})
	alias := (&schemas.Front{Name: schemas.Gateway}).Alias("a", long)
	m := w.many(t, `{"calls":[{"tool":"`+alias+`"},{"tool":"a__x_deadbeef"}]}`)
	if m.StructuredContent.OK != 2 {
		t.Errorf("%+v", m)
	}
}

// Nothing is called when the arguments are wrong, and they say how.
func TestCallManyMisused(t *testing.T) {
	w := newTown(t, map[string]script{"a": toolset(nil)})
	over := strings.TrimSuffix(strings.Repeat(`{"tool":"a__t"},`, 101), ",")
	for arguments, want := range map[string]string{
		`{}`:                                     "Give calls, or tool and servers.",
		`{"calls":[]}`:                           "nothing to call",
		`{"calls":{}}`:                           "must be a list",
		`{"calls":[1]}`:                          "calls[0] must have",
		`{"calls":[{"tool":"a__t"},{"tool":1}]}`: "calls[1] must have",
		`{"calls":[{"tool":"a__t","x":1}]}`:      "calls[0] must have",
		`{"calls":[{"tool":"a__t","arguments":[]}]}`:                "calls[0] must have",
		`{"calls":[` + over + `]}`:                                  "100 calls at most",
		`{"calls":[{"tool":"a__t"}],"tool":"t"}`:                    "either calls, or",
		`{"tool":"t"}`:                                              "Give calls, or tool and servers.",
		`{"tool":"t","servers":[]}`:                                 "nothing to call",
		`{"tool":"t","servers":"*"}`:                                "nothing to call",
		`{"tool":"t","servers":[1]}`:                                "list of names",
		`{"tool":"","servers":["*"]}`:                               "name of a tool",
		`{"tool":"t","servers":["*"],"arguments":1}`:                "must be an object",
		`{"tool":"find_tools","servers":["waybill"]}`:               "cannot be called from within",
		`{"calls":[{"tool":"a__t"},{"tool":"waybill__call_many"}]}`: "cannot be called from within",
		`{"nope":1}`: `no argument "nope"`,
	} {
		m := w.many(t, arguments)
		if !m.IsError || len(m.Content) != 1 || !strings.Contains(m.Content[0].Text, want) || !strings.HasSuffix(m.Content[0].Text, "Nothing was called.") {
			t.Errorf("%.100s: %+v", arguments, m)
		}
	}
	if got := w.result(schemas.Gateway, "tools/call", callMany, `{"name":"call_many","arguments":[],`+fanMeta+`}`); !strings.Contains(got, "-32602") {
		t.Error(got)
	}
	if got := w.result(schemas.Gateway, "tools/call", "other", `{"name":"other",`+fanMeta+`}`); !strings.Contains(got, `unknown tool \"other\"`) {
		t.Error(got)
	}
	r := w.call(context.Background(), schemas.Gateway, "tools/call", findTools, `{"name":"call_many",`+fanMeta+`}`)
	if d, ok := r.end.Data.(*schemas.Failed); !ok || d.Code != schemas.FailInvalid {
		t.Errorf("what was judged is not what was asked: %+v", r.end.Data)
	}
	if n := len(w.children()); n != 0 {
		t.Errorf("%d were called", n)
	}
}

// So many at once and no more; the caller hears how many are done; whoever
// takes the whole back takes back all of it.
func TestCallManyAtOnce(t *testing.T) {
	leaks(t)
	var mu sync.Mutex
	now, most := 0, 0
	release := make(chan struct{})
	full := make(chan struct{}, 100)
	slow := func(string, *jsonrpc.Message) said {
		mu.Lock()
		now++
		most = max(most, now)
		if now == 3 {
			full <- struct{}{}
		}
		mu.Unlock()
		<-release
		mu.Lock()
		now--
		mu.Unlock()
		return said{result: `{}`}
	}
	w := newTown(t, map[string]script{"a": slow}, func(o *Options) { o.Fanout.Concurrency = 3 })
	go func() { <-full; close(release) }()
	params := `{"name":"call_many","arguments":{"calls":[` + strings.TrimSuffix(strings.Repeat(`{"tool":"a__t"},`, 10), ",") + `]},` + fanMeta + `}`
	r := w.call(context.Background(), schemas.Gateway, "tools/call", callMany, params)
	if most != 3 {
		t.Errorf("%d at once", most)
	}
	if len(r.progress) != 10 || r.progress[9] != `{"jsonrpc":"2.0","method":"notifications/progress","params":{"progressToken":"p","progress":10,"total":10}}` {
		t.Errorf("%s", r.progress)
	}
	if n := len(w.log.of(schemas.KindStarted)); n != 11 {
		t.Errorf("%d claims", n)
	}

	reached := make(chan struct{}, 10)
	w = newTown(t, map[string]script{"a": func(string, *jsonrpc.Message) said { reached <- struct{}{}; return said{hang: true} }}, func(o *Options) { o.Fanout.Concurrency = 2 })
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		w.call(ctx, schemas.Gateway, "tools/call", callMany, params)
	}()
	<-reached
	<-reached
	stored := make(chan schemas.Kind, 100)
	w.log.mu.Lock()
	w.log.stored = stored
	w.log.mu.Unlock()
	cancel()
	<-done
	for n := 0; n < 3; {
		if <-stored == schemas.KindCancelled {
			n++
		}
	}
	if n := len(w.children()); n != 2 {
		t.Errorf("%d were called", n)
	}
}

func TestFindTools(t *testing.T) {
	tool := func(name, description, properties string) string {
		return fmt.Sprintf(`{"name":%q,"description":%q,"inputSchema":{"type":"object","properties":{%s}}}`, name, description, properties)
	}
	w := newTown(t, map[string]script{
		"files": lister(`[` + strings.Join([]string{
			tool("readFile", "Reads a file from disk.", `"path":{"type":"string","description":"where it is"}`),
			tool("write_file", "Writes a file to disk.", `"path":{"type":"string"},"text":{"type":"string"}`),
			tool("list", "Lists a directory.", `"path":{"type":"string"},"pattern":{"type":"string","description":"only files like this"}`),
		}, ",") + `]`),
		"mail":   lister(`[` + tool("send", "Sends a message.", `"to":{"type":"string"},"attachments":{"type":"array","items":{"type":"object","properties":{"file":{"type":"string"}}}}`) + `]`),
		"secret": lister(`[` + tool("read_file_secret", "Reads a file that nobody may.", ``) + `]`),
		"broken": func(string, *jsonrpc.Message) said { return said{status: 500} },
	})
	w.allow = func(q *schemas.Requested) (bool, []string) {
		if q.Server == "files" {
			return true, []string{"readFile", "list"}
		}
		return q.Server != "secret", nil
	}
	find := func(arguments string) string {
		return w.result(schemas.Gateway, "tools/call", findTools, `{"name":"find_tools","arguments":`+arguments+`,`+fanMeta+`}`)
	}
	var r struct {
		Result struct {
			IsError           bool
			StructuredContent struct {
				Tools []struct {
					Name, Server, Description string
					InputSchema               json.RawMessage
					Score                     float64
				}
				Searched int
				Servers  map[string]struct{ Error string }
			}
		}
	}
	got := find(`{"query":"Read files"}`)
	if err := json.Unmarshal([]byte(`{`+got+`}`), &r); err != nil {
		t.Fatalf("%v: %s", err, got)
	}
	s := r.Result.StructuredContent
	var names []string
	for _, tool := range s.Tools {
		names = append(names, tool.Name)
	}
	if strings.Join(names, " ") != "files__readFile mail__send files__list" || s.Searched != 3 || s.Servers["broken"].Error != "bad_answer" || r.Result.IsError {
		t.Errorf("%s", got)
	}
	if s.Tools[0].Server != "files" || string(s.Tools[0].InputSchema) != `{"type":"object","properties":{"path":{"type":"string","description":"where it is"}}}` || s.Tools[0].Score <= s.Tools[1].Score {
		t.Errorf("%+v", s.Tools[0])
	}
	for range 3 {
		if again := find(`{"query":"Read files"}`); again != got {
			t.Errorf("first\n%s\nthen\n%s", got, again)
		}
	}
	if got := find(`{"query":"path","limit":1}`); strings.Count(got, `"score"`) != 1 {
		t.Error(got)
	}
	if got := find(`{"query":"zebra"}`); !strings.Contains(got, `"structuredContent":{"tools":[],"searched":3`) {
		t.Error(got)
	}
	for _, bad := range []string{`{}`, `{"query":""}`, `{"query":"…"}`, `{"query":1}`, `{"query":"x","limit":0}`, `{"query":"x","limit":51}`, `{"query":"x","limit":1.5}`, `{"query":"x","more":1}`, `{"query":"` + strings.Repeat("x", 1001) + `"}`} {
		if got := find(bad); !strings.Contains(got, `"isError":true`) {
			t.Errorf("%.50s: %s", bad, got)
		}
	}
}

func TestTokens(t *testing.T) {
	for text, want := range map[string]string{
		"readFile":              "read file",
		"read_files":            "read file",
		"HTTPServer v2":         "httpserver v2",
		"Über-Maß, pass glass!": "über maß pass glass",
		"":                      "",
		" a  b ":                "a b",
	} {
		if got := strings.Join(tokens(text), " "); got != want {
			t.Errorf("%q is %q, want %q", text, got, want)
		}
	}
}

// Far more at once than there are places: every call ends, most of them as they
// should, and none waits for another's place. What is too much is refused.
func TestFrontsDoNotStandStill(t *testing.T) {
	view := &schemas.Front{Name: "v", Servers: []string{"a", schemas.Gateway}, Exposed: []schemas.Exposed{{Server: "a", Tool: "t"}, {Server: schemas.Gateway, Tool: findTools}}}
	serve := func(method string, m *jsonrpc.Message) said {
		if method == "tools/list" {
			return lister(`[{"name":"t"}]`)(method, m)
		}
		return said{result: `{}`}
	}
	w := newTown(t, map[string]script{"a": serve, "b": serve}, func(o *Options) {
		o.Fronts = append(o.Fronts, view)
		o.places = &places{8, 8, make(chan struct{}, 8), make(chan struct{}, 8)}
	})
	// As few places at dispatch as the bounds of the fronts leave room for.
	w.places = make(chan struct{}, 2*2*8+8+1)
	var all sync.WaitGroup
	var mu sync.Mutex
	ends := map[string]int{}
	for i := range 240 {
		all.Go(func() {
			var r reply
			switch i % 4 {
			case 0:
				r = w.call(context.Background(), schemas.Gateway, "tools/list", "", `{`+fanMeta+`}`)
			case 1:
				r = w.call(context.Background(), "v", "tools/list", "", `{`+fanMeta+`}`)
			case 2:
				r = w.call(context.Background(), schemas.Gateway, "tools/call", callMany, `{"name":"call_many","arguments":{"tool":"t","servers":["*"]},`+fanMeta+`}`)
			default:
				r = w.call(context.Background(), "a", "tools/call", "t", `{"name":"t",`+fanMeta+`}`)
			}
			mu.Lock()
			defer mu.Unlock()
			end := outcome(r.end)
			if strings.Contains(string(r.end.Body), "dev.waybill/servers") || strings.Contains(string(r.end.Body), `"ok":false`) {
				end = "in part" // a view whose question to the gateway's front was too much
			}
			ends[end]++
		})
	}
	all.Wait()
	t.Log(ends)
	if ends["completed"] < 60+2*8 || ends["completed"]+ends["in part"]+ends["overloaded"] != 240 {
		t.Errorf("%v", ends)
	}
	if len(w.d.opt.places.calls) != 0 || len(w.d.opt.places.streams) != 0 {
		t.Error("places are not given back")
	}
	for _, s := range w.d.Stats() {
		if s.InFlight+s.Waiting+s.Streams != 0 {
			t.Errorf("%+v", s)
		}
	}
}

// The order of tools of equal rank does not depend on chance.
func TestRankTies(t *testing.T) {
	var tools []*found
	for i := range 50 {
		raw := fmt.Appendf(nil, `{"name":"t%d","description":"the same words"}`, i)
		v, err := jsonrpc.Parse(raw, jsonrpc.Limits{})
		if err != nil {
			t.Fatal(err)
		}
		tools = append(tools, &found{listed: &listed{name: fmt.Sprintf("t%d", i)}, tool: v})
	}
	words := []string{"same", "the", "word"}
	rand.Shuffle(len(words), func(i, j int) { words[i], words[j] = words[j], words[i] })
	slices.Sort(words)
	for i, got := range rank(tools, words) {
		if got.name != fmt.Sprintf("t%d", i) {
			t.Fatalf("%d is %s", i, got.name)
		}
	}
}
