package cli

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"log/slog"
	"net/http"
	"net/url"
	"strings"
	"sync"

	"waybill.dev/replay/playback"
	"waybill.dev/schemas"
	"waybill.dev/workers/dispatch"
)

// liveCalls makes calls that were not recorded at the running gateway, as one of
// its clients: to dispatch its endpoints are servers, of the era of whoever calls.
// So the gateway decides on them as on any other, for the agent whose token is in
// $WAYBILL_TOKEN, and they are sessions and calls of their own in its log.
type liveCalls struct {
	base  *url.URL
	token string
	slog  *slog.Logger
	log   *playback.Log // set before the first call

	mu sync.Mutex // guards of
	of map[string]*dispatch.Dispatcher
}

// maxEndpoints bounds how many endpoints of the gateway are called.
const maxEndpoints = 64

// live finds the running gateway.
func (r *replaying) live(env Env, log *slog.Logger) (*liveCalls, error) {
	c, err := r.connect()
	if err != nil {
		return nil, err
	}
	base, err := listenURL(c.listen)
	if err != nil {
		return nil, err
	}
	token, err := agentToken(env, "")
	return &liveCalls{base: base, token: token, slog: log, of: map[string]*dispatch.Dispatcher{}}, err
}

// carry is a [schemas.Handler] for requested.
func (v *liveCalls) carry(ctx context.Context, e schemas.Event, emit schemas.Emit) error {
	d, ok := e.Data.(*schemas.Requested)
	if !ok {
		return errors.ErrUnsupported
	}
	to, err := v.at(d.Server)
	if err != nil {
		return err
	}
	// Nothing is decided here: the gateway does.
	a := e.Next(&schemas.Authorized{
		Requested: *d, Decision: schemas.Decision{N: 1, Reason: "--on-miss live"}, RequestedSeq: e.Seq, RequestedAt: e.Stored,
	}, e.Body)
	receipt, err := emit(ctx, a)
	if err != nil {
		return err
	}
	if a, err = v.log.Load(ctx, receipt.Seq); err != nil {
		return err
	}
	return to.Handle(ctx, a, emit)
}

// at is who calls an endpoint.
func (v *liveCalls) at(server string) (*dispatch.Dispatcher, error) {
	v.mu.Lock()
	defer v.mu.Unlock()
	if d := v.of[server]; d != nil {
		return d, nil
	}
	if err := schemas.CheckToken(server); err != nil {
		return nil, fmt.Errorf("the endpoint /mcp/%s: %w", server, err)
	}
	if len(v.of) == maxEndpoints {
		return nil, fmt.Errorf("more than %d endpoints", maxEndpoints)
	}
	path := server
	if server == schemas.Gateway {
		path = ""
	}
	header := http.Header{}
	if v.token != "" {
		header.Set("Authorization", "Bearer "+v.token)
	}
	d, err := dispatch.New(dispatch.Options{
		Servers: []dispatch.Server{{Name: server, URL: v.base.JoinPath("mcp", path).String(), Era: dispatch.EraClient, Header: header}},
		Load:    v.log.Load, Past: v.log.Past, Latest: v.latest, Scan: v.scan, Store: v.log.Store,
		Instance: "replay", Log: v.slog,
	})
	if err != nil {
		return nil, err
	}
	v.of[server] = d
	return d, nil
}

// scan reads the events of a kind in a session, but for the connections of then,
// whose other ends are gone.
func (v *liveCalls) scan(ctx context.Context, t schemas.Tenant, s schemas.SessionKey, k schemas.Kind) iter.Seq2[schemas.Event, error] {
	return func(yield func(schemas.Event, error) bool) {
		for e, err := range v.log.Scan(ctx, t, s, k, 0) {
			if c, ok := e.Data.(*schemas.Connected); ok && strings.HasPrefix(c.By, playback.Replayed) {
				continue
			}
			if !yield(e, err) {
				return
			}
		}
	}
}

func (v *liveCalls) latest(ctx context.Context, t schemas.Tenant, s schemas.SessionKey, k schemas.Kind) (found schemas.Event, err error) {
	err = fmt.Errorf("%s of session %s: %w", k, s, schemas.ErrNotFound)
	for e := range v.scan(ctx, t, s, k) {
		found, err = e, nil
	}
	return found, err
}

// run tells those who call what the client says in the middle of calls, until ctx
// is done.
func (v *liveCalls) run(ctx context.Context) {
	v.log.Hear(ctx, dispatch.Heard(), func(ctx context.Context, e schemas.Event) {
		for _, d := range v.all() {
			if err := d.Hear(ctx, e, v.log.Store); err != nil && ctx.Err() == nil {
				v.slog.Warn("the gateway is not told what the client said", "kind", e.Kind(), "call", e.Call, "error", err)
			}
		}
	})
}

func (v *liveCalls) all() []*dispatch.Dispatcher {
	v.mu.Lock()
	defer v.mu.Unlock()
	all := make([]*dispatch.Dispatcher, 0, len(v.of))
	for _, d := range v.of {
		all = append(all, d)
	}
	return all
}

func (v *liveCalls) close() {
	for _, d := range v.all() {
		d.Close()
	}
}
