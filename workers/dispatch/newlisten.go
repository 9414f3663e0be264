package dispatch

import (
	"bytes"
	"context"
	"net/http"
	"slices"
	"sync"
	"time"

	"waybill.dev/schemas/jsonrpc"
)

// streamState is what is known of the stream of a guest's session.
type streamState int

const (
	streamUnknown streamState = iota
	streamOpen
	streamNone // the server has none, or the session is lost
)

// streams is told by the listener of a session how its stream stands. g may be nil.
func (g *guest) streams(open bool) {
	if g == nil {
		return
	}
	now := streamNone
	if open {
		now = streamOpen
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.stream != now {
		g.stream = now
		close(g.told)
		g.told = make(chan struct{})
	}
}

// streamed waits until it is known whether there is a stream, for a while.
func (g *guest) streamed(ctx context.Context) (streamState, <-chan struct{}) {
	late := time.NewTimer(ackTime)
	defer late.Stop()
	for waited := false; ; {
		g.mu.Lock()
		now, told := g.stream, g.told
		g.mu.Unlock()
		if now != streamUnknown || waited {
			return now, told
		}
		select {
		case <-told:
		case <-late.C:
			waited = true
		case <-ctx.Done():
			return now, told
		}
	}
}

// subscription is one subscriptions/listen. What it is told waits in a queue, so
// that nobody who tells it waits.
type subscription struct {
	methods map[string]bool
	uris    map[string]bool
	news    chan struct{} // holds one

	mu    sync.Mutex
	queue []change
}

// change is a notification, and what it is about: told of twice it is the same.
type change struct {
	about string
	msg   []byte
}

// crowded is how many changes wait before a later one takes the place of an
// earlier one that says the same.
const crowded = 256

func (sub *subscription) tell(c change) {
	sub.mu.Lock()
	defer sub.mu.Unlock()
	if len(sub.queue) >= crowded {
		sub.queue = slices.DeleteFunc(sub.queue, func(o change) bool { return o.about == c.about })
	}
	sub.queue = append(sub.queue, c)
	select {
	case sub.news <- struct{}{}:
	default:
	}
}

func (sub *subscription) take() []change {
	sub.mu.Lock()
	defer sub.mu.Unlock()
	q := sub.queue
	sub.queue = nil
	return q
}

// publish tells the subscriptions of a change.
func (g *guest) publish(msg *jsonrpc.Message) {
	about := msg.Method()
	uri, _ := msg.Params().Get("uri").Text()
	updated := about == "notifications/resources/updated"
	if updated {
		about += " " + uri
	}
	g.mu.Lock()
	subs := slices.Clone(g.subs)
	g.mu.Unlock()
	for _, sub := range subs {
		if updated && sub.uris[uri] || !updated && sub.methods[about] {
			sub.tell(change{about, bytes.Clone(msg.Raw())})
		}
	}
}

// listens are the members of the filter that are yes or no: the capability with
// the member listChanged that a server must have, and what it then says.
var listens = map[string]struct{ capability, method string }{
	"toolsListChanged":     {"tools", "notifications/tools/list_changed"},
	"promptsListChanged":   {"prompts", "notifications/prompts/list_changed"},
	"resourcesListChanged": {"resources", "notifications/resources/list_changed"},
}

// listen answers subscriptions/listen with what the server says on the stream of
// the session. Where it has no stream nothing is granted, and the subscription
// ends at once, gracefully; the same becomes of one whose stream is lost for good.
func (g *guest) listen(ctx context.Context, s *session, c Call, m *jsonrpc.Message, progress func([]byte) error) (Answer, error) {
	filter := m.Params().Get("notifications")
	if filter.Kind() != jsonrpc.Object {
		return g.m.misused(c, `missing required "notifications"`), nil
	}
	var uris []string
	for v := range filter.Get("resourceSubscriptions").Elements() {
		uri, ok := v.Text()
		if !ok || len(uri) > maxURI || len(uris) >= maxSubscriptions {
			return g.m.misused(c, "resourceSubscriptions must be a list of URIs, not too long"), nil
		}
		if !slices.Contains(uris, uri) {
			uris = append(uris, uri)
		}
	}
	sub := &subscription{methods: map[string]bool{}, uris: map[string]bool{}, news: make(chan struct{}, 1)}
	granted := []byte{'{'}
	member := func(name string, value []byte) {
		if len(granted) > 1 {
			granted = append(granted, ',')
		}
		granted = append(append(append(granted, '"'), name+`":`...), value...)
	}
	now, told := g.streamed(ctx)
	caps := g.server.Load().caps
	if now != streamNone {
		for _, name := range listenable {
			of := listens[name]
			wants, _ := filter.Get(name).Bool()
			offers, _ := caps.Get(of.capability, "listChanged").Bool()
			if wants && offers {
				sub.methods[of.method] = true
				member(name, []byte("true"))
			}
		}
		for _, uri := range uris {
			sub.uris[uri] = true
		}
		g.mu.Lock()
		g.subs = append(g.subs, sub)
		g.mu.Unlock()
		defer func() {
			g.mu.Lock()
			g.subs = slices.DeleteFunc(g.subs, func(o *subscription) bool { return o == sub })
			g.mu.Unlock()
		}()
		list := []byte{'['}
		if offers, _ := caps.Get("resources", "subscribe").Bool(); offers {
			var held []string
			defer func() { g.unsubscribe(held) }()
			for _, uri := range uris {
				if err := g.subscribe(ctx, s, uri); err != nil {
					g.log().Debug("the server does not take a subscription", "error", err)
					continue
				}
				held = append(held, uri)
				if len(list) > 1 {
					list = append(list, ',')
				}
				list = append(list, jsonrpc.Quote(uri)...)
			}
		}
		if len(list) > 1 {
			member("resourceSubscriptions", append(list, ']'))
		}
	}
	if ctx.Err() != nil {
		return Answer{}, faultf(Broken, "%w", context.Cause(ctx))
	}
	id := string(jsonrpc.Quote(string(c.ID)))
	ack := `{"jsonrpc":"2.0","method":"` + acknowledged + `","params":{"_meta":{"` + metaSubscription + `":` + id + `},"notifications":` + string(granted) + `}}}`
	if err := progress([]byte(ack)); err != nil {
		return Answer{}, err
	}
	end := jsonrpc.ResultResponse([]byte(id), []byte(`{"resultType":"complete","_meta":{"`+metaSubscription+`":`+id+`}}`))
	for now != streamNone {
		select {
		case <-ctx.Done():
			return Answer{}, faultf(Broken, "%w", context.Cause(ctx))
		case <-told:
			g.mu.Lock()
			now, told = g.stream, g.told
			g.mu.Unlock()
		case <-sub.news:
		}
		for _, change := range sub.take() {
			if err := progress(tagged(change.msg, id)); err != nil {
				return Answer{}, err
			}
		}
	}
	return Answer{Status: http.StatusOK, Body: end}, nil
}

// tagged is a notification as a subscription has it.
func tagged(raw []byte, id string) []byte {
	m, err := jsonrpc.Decode(raw, jsonrpc.Limits{Bytes: len(raw), Depth: answerDepth, AllowCaseVariants: true})
	if err != nil {
		return raw // it was decoded before
	}
	p := m.Patch()
	meta := m.Params().Get("_meta")
	switch {
	case meta.Kind() == jsonrpc.Object:
		p.Set(meta, metaSubscription, []byte(id))
	case m.Params().Kind() == jsonrpc.Object:
		p.Set(m.Params(), "_meta", []byte(`{"`+metaSubscription+`":`+id+`}`))
	default:
		p.Set(m.Root(), "params", []byte(`{"_meta":{"`+metaSubscription+`":`+id+`}}`))
	}
	if out := p.Bytes(); out != nil {
		return out
	}
	return raw
}

// subscribe has the server tell of a resource, if it does not yet.
func (g *guest) subscribe(ctx context.Context, s *session, uri string) error {
	select {
	case g.wishing <- struct{}{}:
		defer func() { <-g.wishing }()
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	g.mu.Lock()
	n := g.uris[uri]
	g.mu.Unlock()
	if n == 0 {
		ctx, cancel := context.WithTimeout(ctx, g.t.timing.open)
		defer cancel()
		if err := g.aside(ctx, s, "resources/subscribe", []byte(`{"uri":`+string(jsonrpc.Quote(uri))+`}`)); err != nil {
			return err
		}
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.uris == nil {
		g.uris = map[string]int{}
	}
	g.uris[uri]++
	return nil
}

// unsubscribe says for the last who has listened that the server need not tell
// any more. It does not keep the caller waiting.
func (g *guest) unsubscribe(uris []string) {
	if len(uris) == 0 || !g.enter() {
		return
	}
	if !g.t.spawn(func() {
		defer g.leave()
		g.wishing <- struct{}{} // its holder has a deadline
		defer func() { <-g.wishing }()
		ctx, cancel := context.WithTimeout(g.t.ctx, g.t.timing.open)
		defer cancel()
		for _, uri := range uris {
			g.mu.Lock()
			g.uris[uri]--
			last := g.uris[uri] == 0
			if last {
				delete(g.uris, uri)
			}
			g.mu.Unlock()
			if !last {
				continue
			}
			s, err := g.session(ctx)
			if err == nil {
				err = g.aside(ctx, s, "resources/unsubscribe", []byte(`{"uri":`+string(jsonrpc.Quote(uri))+`}`))
			}
			if err != nil {
				g.log().Debug("the server goes on telling of a resource", "error", err)
			}
		}
	}) {
		g.leave()
	}
}
