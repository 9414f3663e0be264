package cli

import (
	"context"
	"errors"
	"net/http"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"go.opentelemetry.io/otel/attribute"
	otelprom "go.opentelemetry.io/otel/exporters/prometheus"
	"go.opentelemetry.io/otel/metric"
	sdk "go.opentelemetry.io/otel/sdk/metric"

	"waybill.dev/bus"
	"waybill.dev/projections"
	"waybill.dev/projections/audit"
	"waybill.dev/schemas"
)

// metrics is all that is measured. It is made from what passes between the
// parts, so that none of them knows of it.
type metrics struct {
	g       *gateway
	handler http.Handler
	meter   metric.Meter

	calls    metric.Int64Counter
	duration metric.Float64Histogram
	caused   metric.Int64Counter
	labels   labelCache
	audited  atomic.Pointer[audit.State]     // nil where this process builds no tree
	cosigned atomic.Pointer[[]audit.Cosigns] // nil where it asks no witness
}

// methods that may be a label; a caller could invent any number of others.
var methods = map[string]bool{
	"server/discover": true, "tools/list": true, "tools/call": true, "prompts/list": true, "prompts/get": true,
	"resources/list": true, "resources/templates/list": true, "resources/read": true, "completion/complete": true,
	"subscriptions/listen": true,
}

func newMetrics(g *gateway) (*metrics, error) {
	registry := prometheus.NewRegistry()
	registry.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	exporter, err := otelprom.New(otelprom.WithRegisterer(registry), otelprom.WithoutScopeInfo(), otelprom.WithoutTargetInfo())
	if err != nil {
		return nil, err
	}
	m := &metrics{
		g: g, handler: promhttp.HandlerFor(registry, promhttp.HandlerOpts{}),
		meter:  sdk.NewMeterProvider(sdk.WithReader(exporter)).Meter("waybill.dev"),
		labels: labelCache{all: map[labels]*labelled{}},
	}
	if m.calls, err = m.meter.Int64Counter("waybill.calls", metric.WithDescription("Calls that ended, by server, method and outcome."), metric.WithUnit("{call}")); err != nil {
		return nil, err
	}
	if m.caused, err = m.meter.Int64Counter("waybill.front.calls", metric.WithDescription("Calls that the gateway made to put an answer together, by server, method and outcome."), metric.WithUnit("{call}")); err != nil {
		return nil, err
	}
	m.duration, err = m.meter.Float64Histogram("waybill.call.duration", metric.WithUnit("s"),
		metric.WithDescription("Time of a call: in total as the edge sees it, and its parts policy, queue and upstream by the log's clock."),
		metric.WithExplicitBucketBoundaries(.0005, .001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 30, 60))
	if err != nil {
		return nil, err
	}
	return m, m.gauges()
}

// observe counts and times what passes the Ask of an edge.
func (m *metrics) observe(ask schemas.Handler) schemas.Handler { return m.count(ask, m.calls, true) }

// children counts what passes the Ask of a front.
func (m *metrics) children(ask schemas.Handler) schemas.Handler { return m.count(ask, m.caused, false) }

func (m *metrics) count(ask schemas.Handler, calls metric.Int64Counter, timed bool) schemas.Handler {
	known := map[string]bool{}
	for _, name := range m.g.c.frontNames() {
		known[name] = true
	}
	for _, s := range m.g.c.Servers {
		known[s.Name] = true
	}
	label := func(ok bool, s string) string {
		if ok {
			return s
		}
		return "other"
	}
	return func(ctx context.Context, e schemas.Event, emit schemas.Emit) error {
		start := time.Now()
		outcome, code := "lost", ""
		var summary *schemas.Summary
		var ended time.Time
		err := ask(ctx, e, func(ctx context.Context, e schemas.Event) (schemas.Receipt, error) {
			switch d := e.Data.(type) {
			case *schemas.Completed:
				outcome, summary = "completed", &d.Summary
				if d.ErrorCode != 0 {
					code = "upstream_error"
				}
			case *schemas.Failed:
				outcome, code, summary = "failed", string(d.Code), &d.Summary
			case *schemas.Denied:
				outcome, summary = "denied", &d.Summary
			case *schemas.Cancelled:
				outcome, summary = "cancelled", &d.Summary
			}
			ended = e.Stored
			return emit(ctx, e)
		})
		if summary == nil && ctx.Err() != nil {
			outcome = "left"
		} else if summary == nil && err != nil {
			outcome = "refused"
		}
		r, _ := e.Data.(*schemas.Requested)
		l := m.labels.of(labels{label(known[r.Server], r.Server), label(methods[r.Method], r.Method), outcome, code})
		calls.Add(ctx, 1, l.call...)
		if r.Stream || !timed {
			return err // its length says nothing about the gateway
		}
		m.duration.Record(ctx, time.Since(start).Seconds(), l.total...)
		if summary != nil && !summary.AuthorizedAt.IsZero() {
			m.duration.Record(ctx, summary.AuthorizedAt.Sub(summary.RequestedAt).Seconds(), l.policy...)
			if !summary.UpstreamAt.IsZero() {
				m.duration.Record(ctx, summary.UpstreamAt.Sub(summary.AuthorizedAt).Seconds(), l.queue...)
				m.duration.Record(ctx, ended.Sub(summary.UpstreamAt).Seconds(), l.upstream...)
			}
		}
		return err
	}
}

// labels are those of one call.
type labels struct{ server, method, outcome, code string }

// labelled are the same labels as each measurement takes them.
type labelled struct {
	call                           []metric.AddOption
	total, policy, queue, upstream []metric.RecordOption
}

// labelCache keeps what was made of labels, which costs more than to count.
// There are no more than there are time series.
type labelCache struct {
	mu  sync.Mutex
	all map[labels]*labelled
}

func (c *labelCache) of(l labels) *labelled {
	c.mu.Lock()
	defer c.mu.Unlock()
	made := c.all[l]
	if made == nil {
		server, method := attribute.String("server", l.server), attribute.String("method", l.method)
		part := func(name string) []metric.RecordOption {
			return []metric.RecordOption{metric.WithAttributes(attribute.String("part", name), server, method)}
		}
		made = &labelled{
			call:  []metric.AddOption{metric.WithAttributes(server, method, attribute.String("outcome", l.outcome), attribute.String("code", l.code))},
			total: part("total"), policy: part("policy"), queue: part("queue"), upstream: part("upstream"),
		}
		c.all[l] = made
	}
	return made
}

// gauges are read when they are asked for.
func (m *metrics) gauges() error {
	inflight, err := m.meter.Int64ObservableGauge("waybill.edge.in_flight", metric.WithDescription("Calls and streams at the edge now."), metric.WithUnit("{call}"))
	if err != nil {
		return err
	}
	refused, err := m.meter.Int64ObservableCounter("waybill.edge.refused", metric.WithDescription("Requests refused by the HTTP shell, by cause."), metric.WithUnit("{request}"))
	if err != nil {
		return err
	}
	open, err := m.meter.Int64ObservableGauge("waybill.edge.sessions", metric.WithDescription("Sessions with an ID that are open, as far as this edge knows."), metric.WithUnit("{session}"))
	if err != nil {
		return err
	}
	streams, err := m.meter.Int64ObservableGauge("waybill.edge.streams", metric.WithDescription("Streams of sessions that clients have open at the edge now, by GET."), metric.WithUnit("{stream}"))
	if err != nil {
		return err
	}
	upstream, err := m.meter.Int64ObservableGauge("waybill.upstream.calls", metric.WithDescription("Calls and streams at an upstream now, and calls that wait for their turn."), metric.WithUnit("{call}"))
	if err != nil {
		return err
	}
	breaker, err := m.meter.Int64ObservableGauge("waybill.upstream.breaker", metric.WithDescription("0 closed, 1 half open, 2 open: the upstream is left alone."))
	if err != nil {
		return err
	}
	sessions, err := m.meter.Int64ObservableGauge("waybill.upstream.sessions", metric.WithDescription("Sessions that this process has open at an upstream."), metric.WithUnit("{session}"))
	if err != nil {
		return err
	}
	broken, err := m.meter.Int64ObservableGauge("waybill.policy.broken", metric.WithDescription("1 while the files of rules cannot be put in force; the former rules are."))
	if err != nil {
		return err
	}
	loads, err := m.meter.Int64ObservableCounter("waybill.policy.loads", metric.WithDescription("Policies put in force, and not, by outcome."))
	if err != nil {
		return err
	}
	_, err = m.meter.RegisterCallback(func(_ context.Context, o metric.Observer) error {
		if r := m.g.policy; r != nil {
			var is int64
			if r.broken.Load() != nil {
				is = 1
			}
			o.ObserveInt64(broken, is)
			o.ObserveInt64(loads, r.loads.Load(), metric.WithAttributes(attribute.String("outcome", "in_force")))
			o.ObserveInt64(loads, r.failures.Load(), metric.WithAttributes(attribute.String("outcome", "failed")))
		}
		if m.g.dispatcher != nil {
			for _, s := range m.g.dispatcher.Stats() {
				server := attribute.String("server", s.Server)
				o.ObserveInt64(upstream, int64(s.InFlight), metric.WithAttributes(server, attribute.String("state", "in_flight")))
				o.ObserveInt64(upstream, int64(s.Waiting), metric.WithAttributes(server, attribute.String("state", "waiting")))
				o.ObserveInt64(upstream, int64(s.Streams), metric.WithAttributes(server, attribute.String("state", "streams")))
				o.ObserveInt64(sessions, int64(s.Sessions), metric.WithAttributes(server))
				o.ObserveInt64(breaker, map[string]int64{"half-open": 1, "open": 2}[s.Breaker], metric.WithAttributes(server))
			}
		}
		if m.g.front == nil {
			return nil
		}
		s := m.g.front.Stats()
		o.ObserveInt64(inflight, s.InFlight)
		o.ObserveInt64(streams, s.Streams)
		o.ObserveInt64(open, int64(m.g.agents.Sessions()))
		for cause, n := range s.Refused {
			o.ObserveInt64(refused, int64(n), metric.WithAttributes(attribute.String("cause", cause.String())))
		}
		return nil
	}, inflight, refused, open, streams, upstream, sessions, breaker, broken, loads)
	return err
}

// tree is told how far the audit is.
func (m *metrics) tree(s audit.State) { m.audited.Store(&s) }

// cosigns is told how the audit's witnesses do.
func (m *metrics) cosigns(all []audit.Cosigns) { m.cosigned.Store(&all) }

// watchWitnesses adds how the audit's witnesses do, where this process asks them.
func (m *metrics) watchWitnesses() error {
	size, err := m.meter.Int64ObservableGauge("waybill.audit.cosigned", metric.WithDescription("Leaves of the newest checkpoint that a witness has signed."), metric.WithUnit("{event}"))
	if err != nil {
		return err
	}
	failed, err := m.meter.Int64ObservableCounter("waybill.audit.witness.failures", metric.WithDescription("Times that a witness did not sign; cause fork: it has signed another history of the log."), metric.WithUnit("{try}"))
	if err != nil {
		return err
	}
	_, err = m.meter.RegisterCallback(func(_ context.Context, o metric.Observer) error {
		all := m.cosigned.Load()
		if all == nil {
			return nil
		}
		for _, w := range *all {
			who := attribute.String("witness", w.Witness)
			o.ObserveInt64(size, int64(w.Size), metric.WithAttributes(who))
			o.ObserveInt64(failed, int64(w.Failed), metric.WithAttributes(who, attribute.String("cause", "failed")))
			o.ObserveInt64(failed, int64(w.Split), metric.WithAttributes(who, attribute.String("cause", "fork")))
		}
		return nil
	}, size, failed)
	return err
}

// watchLog adds the log's depths.
func (m *metrics) watchLog(l *bus.Log) error {
	var errs error
	gauge := func(name, unit, text string) metric.Int64ObservableGauge {
		g, err := m.meter.Int64ObservableGauge(name, metric.WithDescription(text), metric.WithUnit(unit))
		errs = errors.Join(errs, err)
		return g
	}
	events := gauge("waybill.log.events", "{event}", "Events in the log.")
	bytes := gauge("waybill.log.size", "By", "Bytes in the log.")
	depth := gauge("waybill.queue.depth", "{event}", "Events that a kind of work has not settled.")
	behind := gauge("waybill.queue.size", "By", "Bytes of the log from the oldest event on that a kind of work has not settled.")
	refusing := gauge("waybill.log.refusing", "", "1 while new calls are refused because the log is not read.")
	leaves := gauge("waybill.audit.leaves", "{event}", "Leaves of the audit's tree, where this process builds it.")
	signed := gauge("waybill.audit.signed", "{event}", "Leaves that a checkpoint covers.")
	if errs != nil {
		return errs
	}
	_, err := m.meter.RegisterCallback(func(ctx context.Context, o metric.Observer) error {
		ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
		defer cancel()
		s, err := l.Status(ctx)
		if err != nil {
			return err
		}
		o.ObserveInt64(events, int64(s.Events))
		o.ObserveInt64(bytes, int64(s.Bytes))
		for _, lag := range s.Lags {
			work := metric.WithAttributes(attribute.String("work", lag.Consumer))
			o.ObserveInt64(depth, int64(lag.Events), work)
			o.ObserveInt64(behind, int64(lag.Bytes), work)
		}
		var full int64
		if s.Refusing != "" {
			full = 1
		}
		o.ObserveInt64(refusing, full)
		if t := m.audited.Load(); t != nil {
			o.ObserveInt64(leaves, int64(t.Leaves))
			o.ObserveInt64(signed, int64(t.Signed))
		}
		return nil
	}, events, bytes, depth, behind, refusing, leaves, signed)
	return err
}

// watchRecord adds how the record is being written.
func (m *metrics) watchRecord(w *projections.Writer, l *bus.Log) error {
	rows, err := m.meter.Int64ObservableCounter("waybill.record.rows", metric.WithDescription("Rows written to the record by this process, by table."), metric.WithUnit("{row}"))
	if err != nil {
		return err
	}
	failed, err := m.meter.Int64ObservableCounter("waybill.record.failures", metric.WithDescription("Tries to write to the record that failed; they are repeated."), metric.WithUnit("{try}"))
	if err != nil {
		return err
	}
	lag, err := m.meter.Float64ObservableGauge("waybill.record.lag", metric.WithDescription("Age of the oldest event that is not in the record."), metric.WithUnit("s"))
	if err != nil {
		return err
	}
	_, err = m.meter.RegisterCallback(func(ctx context.Context, o metric.Observer) error {
		s := w.Stats()
		for table, n := range s.Rows {
			o.ObserveInt64(rows, int64(n), metric.WithAttributes(attribute.String("table", table)))
		}
		o.ObserveInt64(failed, int64(s.Failed))
		ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
		defer cancel()
		age, err := l.Age(ctx, consumer)
		if err != nil {
			return err
		}
		o.ObserveFloat64(lag, age.Seconds())
		return nil
	}, rows, failed, lag)
	return err
}
