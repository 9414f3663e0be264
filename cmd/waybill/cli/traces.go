package cli

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"net"
	"net/url"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/exporters/otlp/otlptrace"
	"go.opentelemetry.io/otel/exporters/otlp/otlptrace/otlptracegrpc"
	"go.opentelemetry.io/otel/exporters/otlp/otlptrace/otlptracehttp"
	"go.opentelemetry.io/otel/metric"
	"go.opentelemetry.io/otel/sdk/resource"
	semconv "go.opentelemetry.io/otel/semconv/v1.41.0"

	"waybill.dev/bus"
	"waybill.dev/projections/traces"
	"waybill.dev/schemas"
)

// TracesConfig says where spans of calls are sent: nowhere (false, the default
// unless the environment names an endpoint), or to a collector of OpenTelemetry
// over OTLP. What is not said here the variables OTEL_EXPORTER_OTLP_… say.
type TracesConfig struct {
	Off      bool              `yaml:"-" json:"-"`                         // traces: false
	On       bool              `yaml:"-" json:"on,omitempty"`              // traces: true, or a key
	Endpoint string            `yaml:"endpoint" json:"endpoint,omitempty"` // URL; default of the protocol: http://localhost:4318, http://localhost:4317
	Protocol string            `yaml:"protocol" json:"protocol,omitempty"` // http/protobuf, the default, or grpc
	Headers  map[string]Secret `yaml:"headers" json:"headers,omitempty"`   // sent with every request
	Sample   *float64          `yaml:"sample" json:"sample,omitempty"`     // the share of traces that are sent, of those that no caller has decided on; default 1
}

// UnmarshalYAML reads true and false too.
func (t *TracesConfig) UnmarshalYAML(decode func(any) error) error {
	var on bool
	if err := decode(&on); err == nil {
		*t = TracesConfig{Off: !on, On: on}
		return nil
	}
	type plain TracesConfig
	*t = TracesConfig{}
	err := decode((*plain)(t))
	t.On = true
	return err
}

// MarshalJSON writes it as it is read.
func (t TracesConfig) MarshalJSON() ([]byte, error) {
	if t.Off {
		return []byte("false"), nil
	}
	if t.On && t.Endpoint == "" && t.Protocol == "" && t.Headers == nil && t.Sample == nil {
		return []byte("true"), nil
	}
	t.On = false
	type plain TracesConfig
	return json.Marshal(plain(t))
}

const (
	otlpHTTP = "http/protobuf"
	otlpGRPC = "grpc"
)

// check finds what is wrong.
func (t *TracesConfig) check(bad func(string, ...any)) {
	if t.Endpoint != "" {
		u, err := url.Parse(t.Endpoint)
		switch {
		case err != nil || u.Host == "" || u.Scheme != "http" && u.Scheme != "https":
			bad("traces.endpoint: %q is not an http or https URL", t.Endpoint)
		case u.User != nil:
			bad("traces.endpoint: holds credentials; use traces.headers with env or file")
		}
	}
	switch t.Protocol {
	case "", otlpHTTP, otlpGRPC:
	default:
		bad("traces.protocol: %q is neither %s nor %s", t.Protocol, otlpHTTP, otlpGRPC)
	}
	for name, s := range t.Headers {
		if (s.Env == "") == (s.File == "") {
			bad("traces.headers.%s: needs env or file, one of them", name)
		}
	}
	if t.Sample != nil && !(*t.Sample >= 0 && *t.Sample <= 1) {
		bad("traces.sample: %v is not between 0 and 1", *t.Sample)
	}
}

// on tells whether spans are sent.
func (t *TracesConfig) on(getenv func(string) string) bool {
	switch {
	case t.Off, strings.EqualFold(getenv("OTEL_SDK_DISABLED"), "true"), getenv("OTEL_TRACES_EXPORTER") == "none":
		return false
	}
	return t.On || getenv("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT") != "" || getenv("OTEL_EXPORTER_OTLP_ENDPOINT") != ""
}

// flags are those of a trace that no caller named; nil where nobody here looks
// at it.
func (g *gateway) traceFlags() func(id string) string {
	if !g.c.Traces.on(g.env.Getenv) {
		return nil
	}
	return g.c.Traces.sample().Flags
}

func (t *TracesConfig) sample() traces.Sample {
	if t.Sample == nil {
		return 1
	}
	return traces.Sample(*t.Sample)
}

// client is what sends, by the configuration before the environment.
func (t *TracesConfig) client(getenv func(string) string, secret func(Secret) (string, error)) (otlptrace.Client, error) {
	headers := map[string]string{}
	for name, s := range t.Headers {
		v, err := secret(s)
		if err != nil {
			return nil, fmt.Errorf("traces.headers.%s: %w", name, err)
		}
		headers[name] = v
	}
	said := getenv("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT") != "" || getenv("OTEL_EXPORTER_OTLP_ENDPOINT") != ""
	endpoint := t.Endpoint
	protocol := cmp.Or(t.Protocol, getenv("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL"), getenv("OTEL_EXPORTER_OTLP_PROTOCOL"), otlpHTTP)
	switch protocol {
	case otlpHTTP:
		if endpoint == "" && !said {
			endpoint = "http://localhost:4318"
		}
		var o []otlptracehttp.Option
		if endpoint != "" {
			u, err := url.Parse(endpoint)
			if err != nil {
				return nil, fmt.Errorf("traces.endpoint: %w", err)
			}
			if strings.Trim(u.Path, "/") == "" {
				u.Path = "/v1/traces"
			}
			o = append(o, otlptracehttp.WithEndpointURL(u.String()))
		}
		if len(headers) > 0 {
			o = append(o, otlptracehttp.WithHeaders(headers))
		}
		return otlptracehttp.NewClient(o...), nil
	case otlpGRPC:
		if endpoint == "" && !said {
			endpoint = "http://localhost:4317"
		}
		var o []otlptracegrpc.Option
		if endpoint != "" {
			o = append(o, otlptracegrpc.WithEndpointURL(endpoint))
		}
		if len(headers) > 0 {
			o = append(o, otlptracegrpc.WithHeaders(headers))
		}
		return otlptracegrpc.NewClient(o...), nil
	}
	return nil, fmt.Errorf("OTEL_EXPORTER_OTLP_PROTOCOL: %q is neither %s nor %s", protocol, otlpHTTP, otlpGRPC)
}

// addTraces: the endings of calls → spans → a collector. Like the record it is
// behind the calls, and they do not wait for it; unlike the record it may lose
// some, and counts them.
func (g *gateway) addTraces(ctx context.Context) error {
	t := &g.c.Traces
	if !t.on(g.env.Getenv) {
		return nil
	}
	client, err := t.client(g.env.Getenv, g.c.secret(g.env.Getenv))
	if err != nil {
		return err
	}
	// What the environment says of the resource counts.
	r, err := resource.New(ctx,
		resource.WithAttributes(semconv.ServiceName("waybill"), semconv.ServiceVersion(programVersion()), semconv.ServiceInstanceID(g.instance)),
		resource.WithTelemetrySDK(), resource.WithFromEnv())
	if err != nil {
		return fmt.Errorf("OTEL_RESOURCE_ATTRIBUTES: %w", err)
	}
	l, err := g.open(ctx, bus.RoleTraces)
	if err != nil {
		return err
	}
	peers := g.c.peers()
	size := func(name string) int { n, _ := strconv.Atoi(g.env.Getenv(name)); return n }
	x := traces.New(traces.Options{
		Client: client, Resource: r, Version: programVersion(), Sample: t.sample(),
		Peer:  func(server string) traces.Peer { return peers[server] },
		Queue: size("OTEL_BSP_MAX_QUEUE_SIZE"), Batch: size("OTEL_BSP_MAX_EXPORT_BATCH_SIZE"),
		Delay: time.Duration(size("OTEL_BSP_SCHEDULE_DELAY")) * time.Millisecond, Log: g.log,
	})
	if err := g.metrics.watchTraces(x); err != nil {
		return err
	}
	var ends []schemas.Kind
	for k := range schemas.Kinds() {
		if k.Ends() {
			ends = append(ends, k)
		}
	}
	ready := g.up("traces")
	g.workers = append(g.workers,
		part{"traces", func(ctx context.Context) error { return l.Share(ctx, "traces", ends, ready.Store, x.Take) }},
		part{"collector", x.Run},
	)
	return nil
}

// peers are where the servers are, as spans say it.
func (c *Config) peers() map[string]traces.Peer {
	all := map[string]traces.Peer{}
	at := func(text string) traces.Peer {
		u, err := url.Parse(text)
		if err != nil || u.Host == "" {
			return traces.Peer{Transport: "tcp"}
		}
		port, _ := strconv.Atoi(u.Port())
		if port == 0 {
			port, _ = net.LookupPort("tcp", u.Scheme)
		}
		return traces.Peer{Address: u.Hostname(), Port: port, Transport: "tcp"}
	}
	for _, s := range c.Servers {
		switch {
		case s.MCP != nil && len(s.MCP.Command) > 0:
			all[s.Name] = traces.Peer{Address: filepath.Base(s.MCP.Command[0]), Transport: "pipe"}
		case s.MCP != nil:
			all[s.Name] = at(s.MCP.URL)
		case s.OpenAPI != nil:
			all[s.Name] = at(s.OpenAPI.URL)
		}
	}
	for _, name := range c.frontNames() {
		all[name] = traces.Peer{Front: true}
	}
	return all
}

// watchTraces adds how spans are sent.
func (m *metrics) watchTraces(x *traces.Exporter) error {
	spans, err := m.meter.Int64ObservableCounter("waybill.traces.spans", metric.WithDescription("Spans that were sent to the collector, and dropped because it does not take them or there was no room."), metric.WithUnit("{span}"))
	if err != nil {
		return err
	}
	waiting, err := m.meter.Int64ObservableGauge("waybill.traces.waiting", metric.WithDescription("Spans that wait to be sent."), metric.WithUnit("{span}"))
	if err != nil {
		return err
	}
	_, err = m.meter.RegisterCallback(func(_ context.Context, o metric.Observer) error {
		s := x.Stats()
		o.ObserveInt64(spans, int64(s.Exported), metric.WithAttributes(attribute.String("state", "exported")))
		o.ObserveInt64(spans, int64(s.Dropped), metric.WithAttributes(attribute.String("state", "dropped")))
		o.ObserveInt64(waiting, int64(s.Waiting))
		return nil
	}, spans, waiting)
	return err
}
