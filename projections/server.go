package projections

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"regexp"
	"time"

	"github.com/ClickHouse/clickhouse-go/v2"
)

// Server is a ClickHouse: the [Engine] inside, or any other ([DSN]).
type Server interface {
	// Options says how to reach the server now, as the user who writes or as
	// one who can only read, and names the database of the record. It waits for
	// a server that is about to start.
	Options(ctx context.Context, readOnly bool) (*clickhouse.Options, error)
}

// DSN is a server that somebody else runs: clickhouse://user:password@host:9000
// or http://user:password@host:8123, with the parameters of clickhouse-go. Its
// path names the database of the record, /waybill where there is none.
type DSN struct {
	Write string
	Read  string // of a user who can only read; "" for Write with readonly=1
}

var databaseName = regexp.MustCompile(`^[A-Za-z_][A-Za-z0-9_]{0,99}$`)

// Check tells what is wrong with the DSN, without repeating its password.
func (d DSN) Check() error {
	_, err := d.options(d.Write)
	if err == nil && d.Read != "" {
		_, err = d.options(d.Read)
	}
	return err
}

func (d DSN) options(dsn string) (*clickhouse.Options, error) {
	o, err := clickhouse.ParseDSN(dsn)
	if err != nil {
		if u := new(url.Error); errors.As(err, &u) {
			err = u.Err // the rest repeats the text
		}
		return nil, fmt.Errorf("not a DSN such as clickhouse://user:password@host:9000: %w", err)
	}
	if o.Auth.Database = cmp.Or(o.Auth.Database, Database); !databaseName.MatchString(o.Auth.Database) {
		return nil, fmt.Errorf("not a DSN of a database that has a name of letters, digits and _")
	}
	return o, nil
}

// Options of the user.
func (d DSN) Options(_ context.Context, readOnly bool) (*clickhouse.Options, error) {
	dsn := d.Write
	if readOnly && d.Read != "" {
		dsn = d.Read
	}
	o, err := d.options(dsn)
	if err == nil && readOnly && d.Read == "" {
		// Whoever has set readonly to 1 cannot change any setting again, and
		// neither can a query: no writes, no DDL, no table functions that reach out.
		if o.Settings == nil {
			o.Settings = clickhouse.Settings{}
		}
		o.Settings["readonly"] = 1
		if o.Protocol == clickhouse.HTTP {
			o.Settings["cancel_http_readonly_queries_on_client_close"] = 1
		}
	}
	return o, err
}

// starting is how long one waits for a server that is about to start.
const starting = 10 * time.Second

// open connects.
func open(ctx context.Context, s Server, readOnly bool) (clickhouse.Conn, error) {
	return openSome(ctx, s, readOnly, 1)
}

// openSome opens a pool of so many connections.
func openSome(ctx context.Context, s Server, readOnly bool, conns int) (clickhouse.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, starting)
	defer cancel()
	o, err := s.Options(ctx, readOnly)
	if err != nil {
		return nil, err
	}
	if readOnly {
		o.ReadTimeout = queryTime
		o.TransportFunc = func(t *http.Transport) (http.RoundTripper, error) { return unset{t}, nil }
	}
	return dial(o, conns)
}

// queryTime is how long a server may be silent over what it is asked.
const queryTime = 10 * time.Minute

// unset takes out of each request the setting that the driver makes of its own
// timeouts: who can only read may change none.
type unset struct{ *http.Transport }

func (u unset) RoundTrip(r *http.Request) (*http.Response, error) {
	r = r.Clone(r.Context())
	q := r.URL.Query()
	q.Del("max_execution_time")
	r.URL.RawQuery = q.Encode()
	return u.Transport.RoundTrip(r)
}

// dial opens a pool of so many connections, which are made when they are used.
func dial(o *clickhouse.Options, conns int) (clickhouse.Conn, error) {
	o.MaxOpenConns, o.MaxIdleConns = conns, conns
	if o.DialTimeout == 0 {
		o.DialTimeout = 5 * time.Second
	}
	if o.ReadTimeout == 0 {
		o.ReadTimeout = 2 * time.Minute
	}
	c, err := clickhouse.Open(o)
	if err != nil {
		return nil, fmt.Errorf("ClickHouse at %v: %w", o.Addr, err)
	}
	return c, nil
}

// local is a server on this machine.
func local(addr, user, password string) *clickhouse.Options {
	return &clickhouse.Options{
		Addr: []string{addr}, Auth: clickhouse.Auth{Username: user, Password: password, Database: Database},
		// Loopback is faster than any compression.
		Compression: &clickhouse.Compression{Method: clickhouse.CompressionNone},
		DialContext: func(ctx context.Context, addr string) (net.Conn, error) {
			var d net.Dialer
			return d.DialContext(ctx, "tcp", addr)
		},
	}
}

// Codes of ClickHouse's errors.
const (
	codeNoTable    = 60
	codeNoDatabase = 81
	codeDenied     = 497
)

func isCode(err error, code int32) bool {
	var e *clickhouse.Exception
	return errors.As(err, &e) && e.Code == code
}
