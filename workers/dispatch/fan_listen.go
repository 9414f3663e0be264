package dispatch

import (
	"cmp"
	"context"
	"slices"
	"sync"
	"time"

	"github.com/cenkalti/backoff/v4"

	"waybill.dev/schemas"
	"waybill.dev/schemas/jsonrpc"
)

const (
	ackTime   = 5 * time.Second // how long the acknowledgement waits for those of the servers
	maxUnsent = 1 << 20         // bytes of messages that wait for the acknowledgement

	acknowledged     = "notifications/subscriptions/acknowledged"
	metaSubscription = "io.modelcontextprotocol/subscriptionId"
)

// wishes of a subscription that are yes or no, in the order of the schema.
var listenable = []string{"toolsListChanged", "promptsListChanged", "resourcesListChanged"}

// heard is something that one of the streams of a subscription says.
type heard struct {
	server int // index in question.servers
	msg    []byte
	end    *ended // the stream is over
	again  bool   // and is opened again
}

// listen answers subscriptions/listen with what all servers say. Each is
// listened to by a stream of its own; one that cannot be, or ends, leaves the
// others as they are and is opened again after a while, and the whole ends when
// none is open. What a server had to say meanwhile is lost, as to a client that
// comes back to the server itself. The acknowledgement
// comes first, as soon as it is known what each server has agreed to, or after
// ackTime; it names what at least one of them has.
func (q *question) listen(ctx context.Context) (Answer, error) {
	notifications := q.m.Params().Get("notifications")
	if notifications.Kind() != jsonrpc.Object {
		return q.error(q.c, jsonrpc.CodeInvalidParams, "missing required \"notifications\""), nil
	}
	// All places at once: to wait for some while others are held is how two
	// that wait for each other come about.
	for i := range q.servers {
		select {
		case q.opt.places.streams <- struct{}{}:
			defer func() { <-q.opt.places.streams }()
		default:
			return Answer{}, faultf(Busy, "no room for %d more streams", len(q.servers)-i)
		}
	}
	ctx, stop := context.WithCancelCause(ctx)
	said := make(chan heard)
	var streams sync.WaitGroup
	defer streams.Wait()
	defer stop(nil)
	running := 0
	for i, server := range q.servers {
		body, err := q.listenRequest(server, notifications)
		if err != nil {
			return Answer{}, faultf(Invalid, "the request for %s: %w", server, err)
		}
		running++
		say := func(h heard) error {
			h.server = i
			select {
			case said <- h:
				return nil
			case <-ctx.Done():
				return context.Cause(ctx)
			}
		}
		streams.Go(func() {
			q.listenTo(ctx, child{
				server: server, method: q.c.Requested.Method, body: body, stream: true,
				heard: func(msg []byte) error { return say(heard{msg: msg}) },
			}, say)
		})
	}

	agreed := newAgreement(notifications)
	var unsent [][]byte
	size := 0     // of them
	open := false // the acknowledgement has been sent
	acknowledge := func() error {
		open = true
		if err := q.progress(agreed.message(q)); err != nil {
			return err
		}
		for _, msg := range unsent {
			if err := q.progress(msg); err != nil {
				return err
			}
		}
		unsent = nil
		return nil
	}
	waiting := make([]bool, len(q.servers)) // for its acknowledgement
	for i := range waiting {
		waiting[i] = true
	}
	late := time.NewTimer(ackTime)
	defer late.Stop()
	heardOf := false
	var wrong *ended
	for running > 0 {
		if !open && (!slices.Contains(waiting, true) || size >= maxUnsent) {
			if err := acknowledge(); err != nil {
				return Answer{}, err
			}
		}
		var err error
		select {
		case <-ctx.Done():
			return Answer{}, context.Cause(ctx)
		case <-late.C:
			if !open {
				err = acknowledge()
			}
		case h := <-said:
			switch {
			case h.again:
				running++
			case h.end != nil:
				running--
				waiting[h.server] = false
				if !h.end.denied && (h.end.wrong != nil || h.end.code != 0) {
					wrong = h.end
				}
			default:
				m, bad := jsonrpc.Decode(h.msg, jsonrpc.Limits{Bytes: len(h.msg), Depth: answerDepth, AllowCaseVariants: true})
				if bad != nil {
					continue // dispatch has decoded it before
				}
				if m.Method() == acknowledged {
					heardOf = true
					waiting[h.server] = false
					if !open {
						agreed.add(q, q.servers[h.server], m.Params().Get("notifications"))
					}
					continue
				}
				msg := q.renamed(q.servers[h.server], m)
				if msg == nil {
					continue
				}
				if open {
					err = q.progress(msg)
				} else {
					unsent, size = append(unsent, msg), size+len(msg)
				}
			}
		}
		if err != nil {
			return Answer{}, err
		}
	}
	if !heardOf && wrong != nil {
		return q.error(q.c, cmp.Or(wrong.code, jsonrpc.CodeInternalError), "None of the servers can be listened to."), nil
	}
	if !open {
		if err := acknowledge(); err != nil {
			return Answer{}, err
		}
	}
	return q.result(q.c, []byte(`{"resultType":"complete","_meta":{"`+metaSubscription+`":"`+string(q.c.ID)+`"}}`)), nil
}

// listenTo listens to one server until ctx ends, or there is nothing to be heard
// of it. Each stream is a call of its own, and its end is told before the pause,
// so that this is not what the whole goes on for.
func (q *question) listenTo(ctx context.Context, ch child, say func(heard) error) {
	t := q.opt.sessions.timing
	pauses := backoff.NewExponentialBackOff(
		backoff.WithInitialInterval(t.front), backoff.WithMultiplier(2), backoff.WithMaxInterval(t.fronts), backoff.WithMaxElapsedTime(0))
	for {
		began := q.opt.Now()
		out := q.ask(ctx, ch)
		// Nobody hears it only when it is over for all.
		if err := say(heard{end: &out}); err != nil || out.silent() {
			return
		}
		if q.opt.Now().Sub(began) > t.fronts {
			pauses.Reset() // it did live, so this is no server that always ends it
		}
		if !pause(ctx, pauses.NextBackOff()) || say(heard{again: true}) != nil {
			return
		}
	}
}

// silent tells whether a server that was listened to would say the same again:
// that it cannot be, at least not by this caller.
func (o *ended) silent() bool {
	switch {
	case o.denied, o.wrong == &otherRevision, o.code == jsonrpc.CodeMethodNotFound, o.code == jsonrpc.CodeInvalidParams:
		return true
	case o.wrong != nil:
		return o.wrong.code == string(schemas.FailInvalid)
	}
	return false
}

// listenRequest is the request for one server: of the resources, those that are
// its own, under their names there.
func (q *question) listenRequest(server string, notifications jsonrpc.Value) ([]byte, error) {
	return q.same(func(p *jsonrpc.Patch, _ jsonrpc.Value) {
		list := notifications.Get("resourceSubscriptions")
		if list.Kind() != jsonrpc.Array {
			return
		}
		uris := []byte{'['}
		for v := range list.Elements() {
			alias, _ := v.Text()
			if at, uri, ok := q.ResolveURI(alias); ok && at == server {
				if len(uris) > 1 {
					uris = append(uris, ',')
				}
				uris = append(uris, jsonrpc.Quote(uri)...)
			}
		}
		p.Replace(list, append(uris, ']'))
	})
}

// renamed is a message of a server as the front passes it on: of this
// subscription, and with the name that a resource has here. nil: not at all.
func (q *question) renamed(server string, m *jsonrpc.Message) []byte {
	p := m.Patch()
	if id := m.Params().Get("_meta", metaSubscription); id.Exists() {
		p.Replace(id, jsonrpc.Quote(string(q.c.ID)))
	}
	if uri := m.Params().Get("uri"); m.Method() == "notifications/resources/updated" {
		text, ok := uri.Text()
		if !ok || q.Exposed != nil {
			return nil
		}
		p.Replace(uri, jsonrpc.Quote(q.URI(server, text)))
	}
	return p.Bytes()
}

// agreement is what servers have agreed to say.
type agreement struct {
	yes  map[string]bool
	uris []string // as the caller names them, in its order
	all  []string
}

func newAgreement(wanted jsonrpc.Value) *agreement {
	a := &agreement{yes: map[string]bool{}}
	for v := range wanted.Get("resourceSubscriptions").Elements() {
		if text, ok := v.Text(); ok {
			a.all = append(a.all, text)
		}
	}
	return a
}

func (a *agreement) add(q *question, server string, agreed jsonrpc.Value) {
	for _, name := range listenable {
		if yes, _ := agreed.Get(name).Bool(); yes {
			a.yes[name] = true
		}
	}
	for v := range agreed.Get("resourceSubscriptions").Elements() {
		if text, ok := v.Text(); ok && q.Exposed == nil {
			a.uris = append(a.uris, q.URI(server, text))
		}
	}
}

// message is the acknowledgement.
func (a *agreement) message(q *question) []byte {
	b := []byte(`{"jsonrpc":"2.0","method":"` + acknowledged + `","params":{"notifications":{`)
	comma := ""
	for _, name := range listenable {
		if a.yes[name] {
			b = append(b, comma+`"`+name+`":true`...)
			comma = ","
		}
	}
	granted := make(map[string]bool, len(a.uris))
	for _, uri := range a.uris {
		granted[uri] = true
	}
	first := true
	for _, uri := range a.all {
		if !granted[uri] {
			continue
		}
		if first {
			b = append(b, comma+`"resourceSubscriptions":[`...)
		} else {
			b = append(b, ',')
		}
		first = false
		b = append(b, jsonrpc.Quote(uri)...)
	}
	if !first {
		b = append(b, ']')
	}
	b = append(b, `},"_meta":{"`+metaSubscription+`":`...)
	b = append(b, jsonrpc.Quote(string(q.c.ID))...)
	return append(b, `}}}`...)
}
