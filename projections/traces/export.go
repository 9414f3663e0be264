package traces

import (
	"context"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"log/slog"
	"math"
	"strings"
	"sync/atomic"
	"time"

	"go.opentelemetry.io/otel/exporters/otlp/otlptrace"
	"go.opentelemetry.io/otel/sdk/resource"
	commonpb "go.opentelemetry.io/proto/otlp/common/v1"
	resourcepb "go.opentelemetry.io/proto/otlp/resource/v1"
	tracepb "go.opentelemetry.io/proto/otlp/trace/v1"

	"waybill.dev/schemas"
)

// Options of an [Exporter]. Client is required.
type Options struct {
	Client   otlptrace.Client // sends; its errors are not tried again but by itself
	Resource *resource.Resource
	Version  string // of the program

	Sample Sample                   // of the traces that no caller has decided on
	Peer   func(server string) Peer // nil: nothing is known

	Queue int           // spans that wait to be sent; beyond, dropped; default 8192
	Batch int           // spans sent at once; default 512
	Delay time.Duration // that a span waits for others at most; default 1 s

	Log *slog.Logger // default: none
}

// Sample is the share of traces that are exported, from 0 to 1.
type Sample float64

// Flags are those of a trace by its id: the same everywhere and at all times.
func (s Sample) Flags(id string) string {
	b, err := hex.DecodeString(id)
	if err != nil || len(b) != 16 {
		return schemas.NotSampled
	}
	// Of the last 7 bytes, which are random in every trace id (W3C Trace Context,
	// level 2).
	n := binary.BigEndian.Uint64(b[8:]) << 8 >> 8
	if float64(n) < float64(s)*math.Exp2(56) {
		return schemas.Sampled
	}
	return schemas.NotSampled
}

// Exporter sends the spans of calls that end. It never makes anybody wait: what
// it has no room for, and what the collector does not take, is dropped and
// counted.
type Exporter struct {
	o     Options
	queue chan *tracepb.Span

	exported, dropped atomic.Uint64
}

// New makes an exporter, whose Run sends.
func New(o Options) *Exporter {
	if o.Queue <= 0 {
		o.Queue = 8192
	}
	if o.Batch <= 0 {
		o.Batch = 512
	}
	if o.Delay <= 0 {
		o.Delay = time.Second
	}
	if o.Peer == nil {
		o.Peer = func(string) Peer { return Peer{} }
	}
	if o.Resource == nil {
		o.Resource = resource.Empty()
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	return &Exporter{o: o, queue: make(chan *tracepb.Span, o.Queue)}
}

// Stats is how many spans were sent and dropped, and how many wait.
type Stats struct {
	Exported, Dropped uint64
	Waiting           int
}

// Stats are the exporter's.
func (x *Exporter) Stats() Stats {
	return Stats{x.exported.Load(), x.dropped.Load(), len(x.queue)}
}

// Take makes the spans of a call that the event ends, if its trace is sampled,
// and leaves them to Run.
func (x *Exporter) Take(e schemas.Event) {
	if !e.Kind().Ends() {
		return
	}
	if flags := e.TraceFlags(x.o.Sample.Flags); flags[1]&1 == 0 { // '1' and '3' have the bit, '0' and '2' have not
		return
	}
	for _, s := range Spans(e, x.o.Peer(schemas.SummaryOf(e.Data).Server), x.o.Sample.Flags) {
		select {
		case x.queue <- s:
		default:
			x.dropped.Add(1)
		}
	}
}

// sendTime bounds one sending, and lastTime what is sent at the end.
const (
	sendTime = 15 * time.Second
	lastTime = 3 * time.Second
)

// Run sends until ctx is done, and then, for a moment, what is left.
func (x *Exporter) Run(ctx context.Context) error {
	if err := x.o.Client.Start(ctx); err != nil {
		return fmt.Errorf("connect to the collector of traces: %w", err)
	}
	defer func() {
		stop, cancel := context.WithTimeout(context.WithoutCancel(ctx), lastTime)
		defer cancel()
		if err := x.o.Client.Stop(stop); err != nil {
			x.o.Log.Warn("the collector of traces was left without a word", "error", err)
		}
	}()
	r := x.resource()
	failing := false
	send := func(ctx context.Context, within time.Duration, batch []*tracepb.Span) {
		ctx, cancel := context.WithTimeout(ctx, within)
		defer cancel()
		err := x.o.Client.UploadTraces(ctx, []*tracepb.ResourceSpans{{
			Resource: r, SchemaUrl: schemaURL,
			ScopeSpans: []*tracepb.ScopeSpans{{
				Scope: &commonpb.InstrumentationScope{Name: "waybill.dev/projections/traces", Version: x.o.Version},
				Spans: batch, SchemaUrl: schemaURL,
			}},
		}})
		if err != nil {
			x.dropped.Add(uint64(len(batch)))
			if !failing {
				x.o.Log.Warn("the collector does not take traces, which are dropped", "error", err)
			}
		} else {
			x.exported.Add(uint64(len(batch)))
			if failing {
				x.o.Log.Info("the collector takes traces again", "dropped", x.dropped.Load())
			}
		}
		failing = err != nil
	}
	for {
		batch, more := x.batch(ctx)
		if !more {
			last, cancel := context.WithTimeout(context.WithoutCancel(ctx), lastTime)
			defer cancel()
			for {
				for len(batch) < x.o.Batch && len(x.queue) > 0 {
					batch = append(batch, <-x.queue)
				}
				if len(batch) == 0 {
					return nil
				}
				send(last, lastTime, batch)
				batch = nil
			}
		}
		send(ctx, sendTime, batch)
	}
}

// batch waits for spans; more is false when ctx is done.
func (x *Exporter) batch(ctx context.Context) (batch []*tracepb.Span, more bool) {
	select {
	case s := <-x.queue:
		batch = append(batch, s)
	case <-ctx.Done():
		return nil, false
	}
	t := time.NewTimer(x.o.Delay)
	defer t.Stop()
	for len(batch) < x.o.Batch {
		select {
		case s := <-x.queue:
			batch = append(batch, s)
		case <-t.C:
			return batch, true
		case <-ctx.Done():
			return batch, false
		}
	}
	return batch, true
}

func (x *Exporter) resource() *resourcepb.Resource {
	return &resourcepb.Resource{Attributes: values(x.o.Resource.Attributes())}
}

// valid is s as UTF-8, as which alone it can be sent.
func valid(s string) string { return strings.ToValidUTF8(s, "\uFFFD") }
