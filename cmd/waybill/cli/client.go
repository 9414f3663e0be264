package cli

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"iter"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"unicode"
	"unicode/utf16"
	"unicode/utf8"

	"waybill.dev/schemas"
)

// client talks to a running gateway's admin API.
type client struct {
	base   string
	token  string
	from   string // where the token is from
	data   string // the data directory of the configuration
	listen string // where agents reach the gateway, by the configuration

	witnesses []WitnessConfig // of the audit, by the configuration

	connected func() // told when an answer begins; may be nil
}

// adminToken is the environment variable that may hold the token.
const adminToken = "WAYBILL_ADMIN_TOKEN"

// clientFlags adds the flags by which a command finds the gateway.
func clientFlags(fs *flag.FlagSet) func(env Env) (*client, error) {
	file := fs.String("config", "", "configuration `FILE` of the running gateway (default: waybill.yaml, where there is one)")
	addr := fs.String("admin", "", "admin `URL` of the running gateway (default: from the configuration)")
	token := fs.String("token-file", "", "`FILE` with the admin token (default: $"+adminToken+", or the file in the data directory)")
	return func(env Env) (*client, error) {
		c := defaults()
		name := *file
		if name == "" {
			if _, err := os.Stat("waybill.yaml"); err == nil {
				name = "waybill.yaml"
			}
		}
		if name != "" {
			loaded, err := loadConfig(name)
			if err != nil {
				return nil, err
			}
			c = *loaded
		}
		base := "http://" + c.Admin
		if *addr != "" {
			u, err := url.Parse(*addr)
			if err != nil || u.Host == "" || u.Scheme != "http" && u.Scheme != "https" {
				return nil, usagef("--admin %q: not a URL such as http://127.0.0.1:8081", *addr)
			}
			base = strings.TrimSuffix(*addr, "/")
		}
		if secret := env.Getenv(adminToken); secret != "" && *token == "" {
			return &client{base: base, token: secret, from: "$" + adminToken, data: c.Data, listen: c.Listen, witnesses: c.Audit.Witnesses}, nil
		}
		from := *token
		if from == "" {
			from = filepath.Join(c.Data, tokenFile)
		}
		b, err := os.ReadFile(from)
		switch {
		case errors.Is(err, os.ErrNotExist) && *token == "" && name == "":
			return nil, fmt.Errorf("there is neither waybill.yaml nor %s here: name the gateway's configuration with --config", from)
		case errors.Is(err, os.ErrNotExist) && *token == "":
			return nil, fmt.Errorf("no admin token in %s: `waybill up` makes it when it first runs with %s", from, name)
		case err != nil:
			return nil, fmt.Errorf("admin token: %w", err)
		}
		return &client{base: base, token: strings.TrimSpace(string(b)), from: from, data: c.Data, listen: c.Listen, witnesses: c.Audit.Witnesses}, nil
	}
}

// refused is the error of an answer that is none.
func (c *client) refused(resp *http.Response) error {
	text, _ := io.ReadAll(io.LimitReader(resp.Body, 4096)) // what there is of it
	what := visible(strings.TrimSpace(string(text)))
	switch {
	case resp.StatusCode == http.StatusUnauthorized:
		return fmt.Errorf("the gateway at %s has another admin token than %s: name its configuration with --config, or its token with --token-file", c.base, c.from)
	case resp.StatusCode == http.StatusNotFound && what != "" && what != "404 page not found":
		return errors.New(what)
	}
	return fmt.Errorf("%s answers %s: %s", c.base, resp.Status, what)
}

// record is one line of the events API: an event, or what is said of a
// message that is none.
type record struct {
	schemas.Event
	Undecodable string
	Gone        int // size of a body that is no longer kept
}

// UnmarshalJSON reads a line.
func (r *record) UnmarshalJSON(b []byte) error {
	var odd struct {
		Seq         uint64
		Undecodable string
		Gone        int `json:"body_gone"`
	}
	if err := json.Unmarshal(b, &odd); err != nil {
		return err
	}
	if odd.Undecodable != "" {
		r.Seq, r.Undecodable = odd.Seq, odd.Undecodable
		return nil
	}
	r.Gone = odd.Gone
	return r.Event.UnmarshalJSON(b)
}

// copyLines prints what a path answers, line by line as it comes.
func copyLines(ctx context.Context, c *client, env Env, path string, query url.Values) error {
	for line, err := range lines[json.RawMessage](ctx, c, path, query) {
		if err != nil {
			return err
		}
		if err := env.printLine(line); err != nil {
			return err
		}
	}
	return nil
}

// printJSON prints a value as one line.
func (env Env) printJSON(v any) error {
	line, err := json.Marshal(v)
	if err != nil {
		return err
	}
	return env.printLine(line)
}

// printLine prints one line of JSON as it is, or, on a terminal, with what
// would move the cursor, hide or read backwards escaped: the same JSON.
func (env Env) printLine(line []byte) error {
	if env.Terminal {
		line = escaped(line)
	}
	_, err := fmt.Fprintf(env.Stdout, "%s\n", line)
	return err
}

// escaped writes what is not printable as \uXXXX. Such characters stand in
// strings only, but for white space.
func escaped(line []byte) []byte {
	out := make([]byte, 0, len(line))
	for _, r := range string(line) {
		switch {
		case r < ' ':
			out = append(out, ' ')
		case unicode.IsPrint(r) && r != utf8.RuneError:
			out = utf8.AppendRune(out, r)
		default:
			for _, half := range utf16.AppendRune(nil, r) {
				out = fmt.Appendf(out, "\\u%04x", half)
			}
		}
	}
	return out
}

// lines asks for a path and yields the answer's lines, each decoded into a T.
// It holds one line at a time. An error is the last; an end without one is the
// end of the answer.
func lines[T any](ctx context.Context, c *client, path string, query url.Values) iter.Seq2[T, error] {
	return func(yield func(T, error) bool) {
		for line, err := range rawLines(ctx, c, path, query) {
			var v T
			if err == nil {
				if err = json.Unmarshal(line, &v); err != nil {
					err = fmt.Errorf("line from the gateway: %w", err)
				}
			}
			if !yield(v, err) || err != nil {
				return
			}
		}
	}
}

// rawLines is lines that are not decoded.
func rawLines(ctx context.Context, c *client, path string, query url.Values) iter.Seq2[[]byte, error] {
	return c.exchange(ctx, http.MethodGet, path+"?"+query.Encode(), nil)
}

// exchange sends a body, which may be nil, and yields the answer's lines.
func (c *client) exchange(ctx context.Context, method, path string, body io.Reader) iter.Seq2[[]byte, error] {
	return func(yield func([]byte, error) bool) {
		fail := func(err error) {
			if ctx.Err() != nil {
				err = errInterrupted
			}
			yield(nil, err)
		}
		req, err := http.NewRequestWithContext(ctx, method, c.base+path, body)
		if err != nil {
			fail(err)
			return
		}
		req.Header.Set("Authorization", "Bearer "+c.token)
		if body != nil {
			req.Header.Set("Content-Type", "application/x-ndjson")
		}
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			if outer := new(url.Error); errors.As(err, &outer) {
				err = outer.Err // the rest of it repeats the address
			}
			fail(fmt.Errorf("no gateway answers at %s: %w; is `waybill up` running?", c.base, err))
			return
		}
		defer func() { _ = resp.Body.Close() }()
		if resp.StatusCode != http.StatusOK {
			fail(c.refused(resp))
			return
		}
		if c.connected != nil {
			c.connected()
		}
		in := bufio.NewReader(resp.Body)
		for {
			line, err := in.ReadBytes('\n')
			if err == io.EOF && len(line) == 0 {
				return
			}
			if err != nil {
				fail(fmt.Errorf("the gateway's answer broke off: %w", err))
				return
			}
			if !yield(line, nil) {
				return
			}
		}
	}
}

// errInterrupted: what was printed is not all.
var errInterrupted = errors.New("interrupted")
