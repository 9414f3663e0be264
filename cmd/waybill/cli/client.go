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
)

// client talks to a running gateway's admin API.
type client struct {
	base, token string
}

// clientFlags adds the flags by which a command finds the gateway.
func clientFlags(fs *flag.FlagSet) func(env Env) (*client, error) {
	file := fs.String("config", "", "configuration `FILE` of the running gateway (default waybill.yaml, where there is one)")
	addr := fs.String("admin", "", "admin `URL` of the running gateway (default: from the configuration)")
	token := fs.String("token-file", "", "`FILE` with the admin token (default: in the data directory)")
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
			if err != nil || u.Host == "" {
				return nil, usagef("--admin %q: not a URL such as http://127.0.0.1:8081", *addr)
			}
			base = strings.TrimSuffix(*addr, "/")
		}
		secret := env.Getenv("WAYBILL_ADMIN_TOKEN")
		if secret == "" {
			from := *token
			if from == "" {
				from = filepath.Join(c.Data, tokenFile)
			}
			b, err := os.ReadFile(from)
			if err != nil {
				return nil, fmt.Errorf("admin token: %w; name the gateway's configuration with --config, or the file with --token-file", err)
			}
			secret = strings.TrimSpace(string(b))
		}
		return &client{base: base, token: secret}, nil
	}
}

// lines asks for a path and yields the answer's lines, each decoded into a T.
func lines[T any](ctx context.Context, c *client, path string, query url.Values) iter.Seq2[T, error] {
	return func(yield func(T, error) bool) {
		var zero T
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, c.base+path+"?"+query.Encode(), nil)
		if err != nil {
			yield(zero, err)
			return
		}
		req.Header.Set("Authorization", "Bearer "+c.token)
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			if ctx.Err() == nil {
				yield(zero, fmt.Errorf("no gateway answers at %s (%w); is `waybill up` running?", c.base, err))
			}
			return
		}
		defer func() { _ = resp.Body.Close() }()
		if resp.StatusCode != http.StatusOK {
			text, _ := io.ReadAll(io.LimitReader(resp.Body, 4096)) // what there is of it
			yield(zero, errors.New(strings.TrimSpace(string(text))))
			return
		}
		in := bufio.NewReader(resp.Body)
		for {
			line, err := in.ReadBytes('\n')
			if err == io.EOF && len(line) == 0 {
				return
			}
			if err != nil {
				if ctx.Err() == nil {
					yield(zero, fmt.Errorf("the gateway's answer broke off: %w", err))
				}
				return
			}
			var v T
			if err := json.Unmarshal(line, &v); err != nil {
				err = fmt.Errorf("line from the gateway: %w", err)
				if !yield(zero, err) {
					return
				}
				continue
			}
			if !yield(v, nil) {
				return
			}
		}
	}
}
