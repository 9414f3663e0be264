package cli

import (
	"bytes"
	"context"
	"encoding/json"
	"os"
	"path/filepath"
	"testing"

	"github.com/goccy/go-yaml"

	"waybill.dev/edge"
	"waybill.dev/schemas"
	"waybill.dev/workers/dispatch"
)

// FuzzConfig: a configuration is refused with words, or it is one that every
// part of the gateway takes, and that `config check` prints so that it can be
// read again and means the same.
func FuzzConfig(f *testing.F) {
	example, err := os.ReadFile(filepath.Join("..", "..", "..", "deploy", "waybill.yaml"))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(example)
	// The example with what is commented out in it.
	f.Add(bytes.ReplaceAll(bytes.ReplaceAll(example, []byte("\n# "), []byte("\n")), []byte("    # "), []byte("    ")))
	for _, s := range []string{
		"", "{}", "[]", "listen: [", "a: &a [*a]", "listen: &x :1\nadmin: *x\n", "x: {<<: *y}", "\xef\xbb\xbflisten: :1", "\x00", "---\n---\n",
		"hosts: [a.example, 'b:1', '']\norigins: ['https://a.example', null]\n",
		"tenants: [{id: a}]\nagents: [{id: b, tenant: a, groups: [g], token_sha256: 15c8ab745fdeda94033d07103b3ff431ef716bbc1271ad960c87fede8a496852}]\nauth: {anonymous: b}\n",
		"servers: [{name: s, mcp: {url: 'http://h/p?q', headers: {X-A: {env: A}, Content-Type: {env: B}, 'b ad': {env: C}}}, idempotent: ['*'], deadline: 3s, concurrency: 1, queue: 2}]\n",
		"servers: [{name: s, mcp: {url: 'http://u:p@h'}, approve: manual, openapi: {}}, null]\n",
		"servers: [{name: s, openapi: {document: nowhere.yaml, url: 'http://h/v1', auth: {key: {env: A}}, headers: {X-A: {file: f}}}}]\n",
		"servers: [{name: s, mcp: {}}]\nviews: []\npolicies: {}\n",
		"servers: [{name: s, mcp: {url: 'http://h'}}]\nviews: [{name: v, from: {s: [a, {tool: b, as: c, description: d}], waybill: [find_tools]}}]\nfanout: {tools: [find_tools], concurrency: 3}\n",
		"servers: [{name: s, mcp: {url: 'http://h'}}]\nviews: [{name: s, from: {s: [null, 1, {}, [x]]}}, null]\nfanout: {tools: [x], concurrency: -1}\n",
		"allow: [{agents: ['*'], servers: [a], tools: [''], methods: ['**']}, null, {}]\n",
		"bus: {embedded: {sync: always, key_file: /k, cluster: {a: {b: 1}}}, max_bytes: 1e18, max_age: 10000000h}\nclickhouse: {embedded: true}\n",
		"bus: {url: nats://h, creds: c, replicas: -1}\nclickhouse: false\n",
		"limits: {body: 0x10, in_flight: 1, in_flight_per_tenant: 9223372036854775807, deadline: 1, drain: 0s}\n",
	} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, text []byte) {
		const dir = "/etc/waybill" // not looked into
		c, err := parseConfig(text, dir)
		if err != nil {
			if err.Error() == "" {
				t.Fatal("refused without a word")
			}
			return
		}
		if err := c.check(); err != nil {
			t.Fatalf("valid once: %v", err)
		}
		if err := build(c); err != nil {
			t.Errorf("valid, but the gateway would not start: %v", err)
		}

		effective, err := json.Marshal(c)
		if err != nil {
			t.Fatal(err)
		}
		printed, err := yaml.JSONToYAML(effective)
		if err != nil {
			t.Fatal(err)
		}
		again, err := parseConfig(printed, dir)
		if err != nil {
			t.Fatalf("what config check prints is not valid: %v\n%s", err, printed)
		}
		if twice, err := json.Marshal(again); err != nil || !bytes.Equal(effective, twice) {
			t.Fatalf("%s\nprinted and read again is\n%s", effective, twice)
		}
	})
}

// build makes of a configuration what the roles make of it, secrets included,
// without running it.
func build(c *Config) error {
	bare := *c
	bare.Policies = nil // files, which a fuzzer has no business with
	if _, _, err := bare.compilePolicy(); err != nil {
		return err
	}
	tokens, anonymous := c.principals()
	if _, err := edge.New(edge.Options{Hosts: c.Hosts, Origins: c.Origins, Tokens: tokens, Anonymous: anonymous}); err != nil {
		return err
	}
	servers, err := c.upstreams(noEnv, anySecret)
	if err != nil {
		return err
	}
	d, err := dispatch.New(dispatch.Options{
		Servers: servers,
		Load:    func(context.Context, uint64) (e schemas.Event, err error) { return },
		Past:    func(context.Context, schemas.Event) (es []schemas.Event, err error) { return },
	})
	if err == nil {
		d.Close()
	}
	return err
}
