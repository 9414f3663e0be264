package projections

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/url"
	"time"

	"github.com/ClickHouse/clickhouse-go/v2"
)

// Server is a ClickHouse: the [Engine] inside, or any other ([DSN]).
type Server interface {
	// Options says how to reach the server now, as the user who writes or as
	// one who can only read. It waits for a server that is about to start.
	Options(ctx context.Context, readOnly bool) (*clickhouse.Options, error)
}

// DSN is a server that somebody else runs: clickhouse://user:password@host:9000
// or http://user:password@host:8123, with the parameters of clickhouse-go.
type DSN struct {
	Write string
	Read  string // of a user who can only read; "" for Write with readonly=1
}

// Check tells what is wrong with the DSN, without repeating its password.
func (d DSN) Check() error {
	for _, dsn := range []string{d.Write, d.Read} {
		if dsn == "" {
			continue
		}
		if _, err := clickhouse.ParseDSN(dsn); err != nil {
			if u := new(url.Error); errors.As(err, &u) {
				err = u.Err // the rest repeats the text
			}
			return fmt.Errorf("not a DSN such as clickhouse://user:password@host:9000: %w", err)
		}
	}
	return nil
}

// Options of the user.
func (d DSN) Options(_ context.Context, readOnly bool) (*clickhouse.Options, error) {
	dsn := d.Write
	if readOnly && d.Read != "" {
		dsn = d.Read
	}
	o, err := clickhouse.ParseDSN(dsn)
	if err != nil {
		return nil, d.Check()
	}
	if readOnly && d.Read == "" {
		// Whoever has set readonly to 1 cannot change any setting again, and
		// neither can a query: no writes, no DDL, no table functions that reach out.
		if o.Settings == nil {
			o.Settings = clickhouse.Settings{}
		}
		o.Settings["readonly"] = 1
	}
	return o, nil
}

// starting is how long one waits for a server that is about to start.
const starting = 10 * time.Second

// open connects.
func open(ctx context.Context, s Server, readOnly bool) (clickhouse.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, starting)
	defer cancel()
	o, err := s.Options(ctx, readOnly)
	if err != nil {
		return nil, err
	}
	o.MaxOpenConns, o.MaxIdleConns = 2, 1
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
		Addr: []string{addr}, Auth: clickhouse.Auth{Username: user, Password: password},
		// Loopback is faster than any compression.
		Compression: &clickhouse.Compression{Method: clickhouse.CompressionNone},
		DialContext: func(ctx context.Context, addr string) (net.Conn, error) {
			var d net.Dialer
			return d.DialContext(ctx, "tcp", addr)
		},
	}
}
