package cli

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sync/errgroup"

	"waybill.dev/bus"
	"waybill.dev/projections"
	"waybill.dev/schemas"
)

// RecordConfig says where the record is kept: in a ClickHouse inside, in any
// other, or nowhere (false). Without the key it is the one inside, where its
// launcher is beside the program.
type RecordConfig struct {
	Off      bool     `yaml:"-" json:"-"`                         // clickhouse: false
	Embedded bool     `yaml:"embedded" json:"embedded,omitempty"` // the one inside
	Launcher string   `yaml:"launcher" json:"launcher,omitempty"` // its program; default chserve beside waybill
	HTTP     string   `yaml:"http" json:"http,omitempty"`         // its HTTP address, on 127.0.0.1; default a free port
	Bodies   Duration `yaml:"bodies" json:"bodies"`               // how long bodies are kept, all else is kept; default 720h, 0 for ever
	DSN      Place    `yaml:"dsn" json:"dsn,omitzero"`            // of another server, for a user who may write
	ReadDSN  Place    `yaml:"read_dsn" json:"read_dsn,omitzero"`  // the same for one who may only read; default dsn with readonly=1
}

// bodiesKept is the default.
const bodiesKept = 30 * 24 * time.Hour

// Place is a DSN: a text without a password, or a secret.
type Place struct {
	Text   string `yaml:"-" json:"-"`
	Secret `yaml:",inline" json:"secret,omitzero"`
}

// UnmarshalYAML reads a DSN, which may be a text.
func (p *Place) UnmarshalYAML(decode func(any) error) error {
	*p = Place{}
	if err := decode(&p.Text); err == nil {
		return nil
	}
	p.Text = ""
	return decode(&p.Secret)
}

// MarshalJSON writes it as it is read.
func (p Place) MarshalJSON() ([]byte, error) {
	if p.Text != "" {
		return json.Marshal(p.Text)
	}
	return json.Marshal(p.Secret)
}

// check finds what is wrong.
func (p Place) check(key string, bad func(string, ...any)) {
	switch {
	case p == Place{}:
	case p.Text == "":
		if (p.Env == "") == (p.File == "") {
			bad("%s: needs env or file, one of them", key)
		}
	default:
		if u, err := url.Parse(p.Text); err != nil {
			bad("%s: not a URL such as clickhouse://host:9000", key)
		} else if _, secret := u.User.Password(); secret || u.Query().Has("password") {
			bad("%s: holds a password; use env or file", key)
		} else if err := (projections.DSN{Write: p.Text}).Check(); err != nil {
			bad("%s: %w", key, err)
		}
	}
}

// read is the DSN.
func (p Place) read(secret func(Secret) (string, error)) (string, error) {
	if p.Text != "" || p == (Place{}) {
		return p.Text, nil
	}
	return secret(p.Secret)
}

// UnmarshalYAML reads the record's place, which may be false.
func (r *RecordConfig) UnmarshalYAML(decode func(any) error) error {
	var on bool
	if err := decode(&on); err == nil {
		*r = RecordConfig{Off: !on, Embedded: on, Bodies: Duration{Duration: bodiesKept}}
		return nil
	}
	type plain RecordConfig
	*r = RecordConfig{Bodies: Duration{Duration: bodiesKept}}
	return decode((*plain)(r))
}

// MarshalJSON writes it as it is read.
func (r RecordConfig) MarshalJSON() ([]byte, error) {
	if r.Off {
		return []byte("false"), nil
	}
	type plain RecordConfig
	return json.Marshal(plain(r))
}

// check finds what is wrong.
func (r *RecordConfig) check(bad func(string, ...any)) {
	elsewhere := r.DSN != Place{}
	if r.Embedded && elsewhere {
		bad("clickhouse: embedded and dsn exclude each other")
	}
	r.DSN.check("clickhouse.dsn", bad)
	r.ReadDSN.check("clickhouse.read_dsn", bad)
	if (r.ReadDSN != Place{}) && !elsewhere {
		bad("clickhouse.read_dsn: goes with dsn")
	}
	if elsewhere && (r.Launcher != "" || r.HTTP != "") {
		bad("clickhouse: launcher and http belong to the ClickHouse inside, and exclude dsn")
	}
	switch b := r.Bodies; {
	case b.bad != nil:
		bad("clickhouse.bodies: %w", b.bad)
	case b.Duration != 0 && b.Duration < time.Hour:
		bad("clickhouse.bodies: %s is less than 1h, and not 0 for ever", b)
	}
	if r.HTTP != "" {
		if host, _, err := net.SplitHostPort(r.HTTP); err != nil || host != "127.0.0.1" {
			bad("clickhouse.http: %q is not 127.0.0.1:PORT", r.HTTP)
		}
	}
}

const (
	// noRecord is said to who asks for what is not there.
	noRecord = "this gateway keeps no record: run `make build`, which puts ClickHouse's launcher and library beside the program, or set clickhouse.dsn"

	consumer    = "project" // of the log, see bus.Role
	batchEvents = 10_000
	batchWait   = 250 * time.Millisecond
)

// findRecord decides where the record is, if anywhere.
func (g *gateway) findRecord(ctx context.Context) error {
	r := g.c.ClickHouse
	switch {
	case r.Off:
		return nil
	case r.DSN != Place{}:
		secret := g.c.secret(g.env.Getenv)
		var d projections.DSN
		var err error
		if d.Write, err = r.DSN.read(secret); err == nil {
			d.Read, err = r.ReadDSN.read(secret)
		}
		if err == nil {
			err = d.Check()
		}
		if err != nil {
			return errors.Join(errors.New("clickhouse.dsn"), err)
		}
		g.server = d
	default:
		launcher := r.Launcher
		if launcher == "" {
			launcher = besideProgram("chserve")
		}
		_, err := os.Stat(launcher)
		if err == nil && r.Launcher == "" {
			_, err = os.Stat(filepath.Join(filepath.Dir(launcher), "libchdb.so"))
		}
		if err == nil {
			err = projections.Supported(ctx, launcher)
		}
		switch {
		case errors.Is(err, projections.ErrUnsupported) && r.Embedded:
			return fmt.Errorf("clickhouse: %w", err)
		case errors.Is(err, projections.ErrUnsupported):
			g.log.Warn("no record is kept (`clickhouse: false` ends this message)", "error", err)
			return nil
		case err == nil:
		case r.Embedded:
			return errors.New("clickhouse: " + err.Error() + "; `make build` puts the launcher and its library beside the program")
		default:
			g.log.Info("no record is kept: there is no ClickHouse; run `make build`, which puts it beside the program, or set clickhouse.dsn (`clickhouse: false` ends this message)")
			return nil
		}
		if g.roles[bus.RoleProject] {
			g.engine = projections.NewEngine(projections.EngineOptions{
				Launcher: launcher, Dir: filepath.Join(g.c.Data, "clickhouse"), HTTP: r.HTTP, Bodies: r.Bodies.Duration, Log: g.log,
			})
			g.server = g.engine
		}
	}
	g.guard = []string{consumer}
	return nil
}

// besideProgram is a file in the directory of this program.
func besideProgram(name string) string {
	program, err := os.Executable()
	if err == nil {
		program, err = filepath.EvalSymlinks(program)
	}
	if err != nil {
		return name
	}
	return filepath.Join(filepath.Dir(program), name)
}

// recorded is the log as the record asks it.
type recorded struct{ *bus.Log }

// Load returns no event for what cannot be read: the record has no such.
func (r recorded) Load(ctx context.Context, seq uint64) (schemas.Event, error) {
	e, err := r.Log.Load(ctx, seq)
	if errors.Is(err, bus.ErrUndecodable) {
		return schemas.Event{}, nil
	}
	return e, err
}

// addRecord: the log → ClickHouse. It is behind the calls, and they do not wait
// for it: the gateway is ready without.
func (g *gateway) addRecord(ctx context.Context, _ net.Listener) error {
	if g.server == nil {
		return nil
	}
	l, err := g.open(ctx, bus.RoleProject)
	if err != nil {
		return err
	}
	g.record = projections.NewWriter(projections.WriterOptions{
		Server: g.server, Of: recorded{l}, Bodies: g.c.ClickHouse.Bodies.Duration, Now: time.Now, Log: g.log,
	})
	if err := g.metrics.watchRecord(g.record, l); err != nil {
		return err
	}
	g.workers = append(g.workers, part{"record", func(ctx context.Context) error {
		defer g.record.Close()
		var running errgroup.Group
		serving, stop := context.WithCancel(context.WithoutCancel(ctx))
		if g.engine != nil {
			running.Go(func() error { return g.engine.Run(serving) })
		}
		running.Go(func() error { g.record.Prepare(ctx); return nil })
		err := l.Batch(ctx, consumer, batchEvents, batchWait, func(ctx context.Context, b bus.Events) error {
			err := g.record.Take(ctx, b.First, b.Last, b.Events)
			if missing := new(projections.Missing); errors.As(err, &missing) {
				return &bus.Rewind{After: missing.After}
			}
			return err
		})
		stop() // after who writes to it
		return errors.Join(err, running.Wait())
	}})
	return nil
}
