package dispatch

import (
	"context"
	"errors"

	"github.com/cenkalti/backoff/v4"

	"waybill.dev/schemas/jsonrpc"
)

const (
	subscribe   = "subscriptions/listen"
	taskStands  = "notifications/tasks"
	listenFails = 5 // in a row, before the server is only asked
)

// errNotTold: the server does not tell of the task.
var errNotTold = errors.New("the server does not tell of its task")

// listen hears from a server of 2026-07-28 when its task stands otherwise
// (notifications/tasks), until stop; what it hears has the server asked at once. To
// ask now and then goes on all the same: a server need not tell. Each task takes one
// of the server's places for streams, of which clients have half to themselves; a
// task that finds none is only asked about.
func (r *run) listen(ctx context.Context) (stop func()) {
	places := r.up.streams.slots
	if len(places) >= cap(places)/2 {
		return func() {}
	}
	select {
	case places <- struct{}{}:
	default:
		return func() {}
	}
	news, id := r.task.news, r.task.id
	ctx, cancel := context.WithCancel(ctx)
	done := make(chan struct{})
	go func() {
		defer close(done)
		defer func() { <-places }()
		pauses := backoff.NewExponentialBackOff(backoff.WithInitialInterval(poll), backoff.WithMaxInterval(pollMost), backoff.WithMaxElapsedTime(0))
		for fails := 0; fails < listenFails; fails++ {
			answer, err := r.aboutAs(ctx, string(r.e.Call)+"-tasks", subscribe, id, "", nil, func(msg []byte) error {
				m, err := jsonrpc.Decode(msg, jsonrpc.Limits{Bytes: max(len(msg), 1), Depth: answerDepth, AllowCaseVariants: true})
				if err != nil {
					return nil
				}
				switch m.Method() {
				case acknowledged:
					for v := range m.Params().Get("notifications", "taskIds").Elements() {
						if text, _ := v.Text(); text == id {
							fails = 0
							pauses.Reset()
							poke(news) // what was said before it listened
							return nil
						}
					}
					return errNotTold
				case taskStands:
					poke(news)
				}
				return nil
			})
			if ctx.Err() != nil {
				return
			}
			if errors.Is(err, errNotTold) || err == nil && answer.Error().Exists() {
				break
			}
			r.d.opt.Log.Debug("a server's stream about its task has ended", "server", r.a.Server, "call", r.e.Call, "error", err)
			if !pause(ctx, pauses.NextBackOff()) {
				return
			}
		}
		r.d.opt.Log.Debug("a server is only asked how its task stands", "server", r.a.Server, "call", r.e.Call)
	}()
	return func() {
		cancel()
		<-done
	}
}
