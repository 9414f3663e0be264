package bus

import (
	"context"
	"fmt"
	"strings"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"waybill.dev/schemas"
)

// A request is stored soon after its call was minted, by the clock of another
// machine perhaps. So much is looked through for it, and no more than so many
// requests, since anybody may name a span that does not exist.
const (
	spanBefore = time.Second
	spanAfter  = 5 * time.Second
	spanMost   = 4000
)

// BySpan finds the request of the call whose server was called under the span,
// which was minted within [schemas.SpanWithin] from a time on. It comes without
// its body. It returns [schemas.ErrNotFound].
//
// There is no index: the span says when to look, and of the requests of those
// seconds only the IDs are.
func (l *Log) BySpan(ctx context.Context, t schemas.Tenant, span string, minted time.Time) (schemas.Event, error) {
	subjects, err := Filter{Tenant: t, Kinds: []schemas.Kind{schemas.KindRequested}}.subjects()
	if err != nil {
		return schemas.Event{}, err
	}
	fail := func(err error) (schemas.Event, error) {
		return schemas.Event{}, fmt.Errorf("call of span %s: %w", span, err)
	}
	from := minted.Add(-spanBefore)
	c, err := retry(ctx, l, func(ctx context.Context) (jetstream.Consumer, error) {
		return l.stream.OrderedConsumer(ctx, jetstream.OrderedConsumerConfig{
			FilterSubjects: subjects, HeadersOnly: true,
			DeliverPolicy: jetstream.DeliverByStartTimePolicy, OptStartTime: &from,
			InactiveThreshold: 30 * time.Second,
		})
	})
	if err != nil {
		return fail(err)
	}
	defer l.letGo(ctx, c)
	info, err := retry(ctx, l, c.Info)
	if err != nil {
		return fail(err)
	}
	if info.NumPending == 0 {
		return fail(schemas.ErrNotFound)
	}
	it, err := c.Messages(jetstream.PullMaxMessages(200))
	if err != nil {
		return fail(err)
	}
	defer it.Stop()
	for range spanMost {
		m, err := it.Next(jetstream.NextContext(ctx))
		if err != nil {
			return fail(err)
		}
		md, err := m.Metadata()
		if err != nil {
			return fail(err)
		}
		call, _, _ := strings.Cut(m.Headers().Get(jetstream.MsgIDHeader), "/")
		if schemas.CallID(call).Span(schemas.PartUpstream) == span {
			e, _, err := decodeMsg(m)
			if err != nil {
				return fail(err)
			}
			e.Body = nil
			return e, nil
		}
		if md.NumPending == 0 || md.Timestamp.After(minted.Add(spanAfter)) {
			break
		}
	}
	return fail(schemas.ErrNotFound)
}
