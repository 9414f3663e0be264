package embed

import (
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"net/url"
	"os"
	"path/filepath"
	"strings"

	"github.com/nats-io/nats-server/v2/server"

	"waybill.dev/bus"
)

// Subscriber is a user of the socket that reads one tenant's feed of the audit, and
// the checkpoints and tiles, and nothing else. It has an account of its own: in
// the log's it could have answers, which go where who asks says, sent to where
// events are stored.
type Subscriber struct {
	Name   string // no role's
	Tenant string
}

// account is one account as the server's configuration has it, of which JSON is a
// form.
type account struct {
	JetStream string           `json:"jetstream,omitempty"`
	Exports   []map[string]any `json:"exports,omitempty"`
	Imports   []map[string]any `json:"imports,omitempty"`
	Users     []map[string]any `json:"users,omitempty"`
}

// global is the account of the roles.
const global = "$G"

// accounts gives each subscriber an account that imports what it may read.
func accounts(opts *server.Options, subscribers []Subscriber, passwords map[string]string) error {
	all := map[string]*account{global: {JetStream: "enabled"}}
	for _, s := range subscribers {
		name := "subscriber-" + s.Name
		of := &account{Users: []map[string]any{{
			"user": s.Name, "password": passwords[s.Name],
			"permissions": map[string]any{
				"publish":   bus.SubscriberAsks(s.Name),
				"subscribe": append([]string{"_INBOX.>", "_INBOX_*.>"}, bus.SubscriberHears(s.Tenant)...),
			},
		}}}
		for _, subject := range bus.SubscriberHears(s.Tenant) {
			all[global].Exports = append(all[global].Exports, map[string]any{"stream": subject, "accounts": []string{name}})
			of.Imports = append(of.Imports, map[string]any{"stream": map[string]any{"account": global, "subject": subject}})
		}
		for _, subject := range bus.SubscriberAsks(s.Name) {
			export := map[string]any{"service": subject, "accounts": []string{name}}
			if strings.Contains(subject, ".MSG.NEXT.") {
				export["response"] = "stream"
			}
			all[global].Exports = append(all[global].Exports, export)
			of.Imports = append(of.Imports, map[string]any{"service": map[string]any{"account": global, "subject": subject}})
		}
		all[name] = of
	}
	// What several may read is exported once, to all of them.
	all[global].Exports = merged(all[global].Exports)
	text, err := json.Marshal(map[string]any{"accounts": all})
	if err != nil {
		return err
	}
	parsed := &server.Options{}
	if err := parsed.ProcessConfigString(string(text)); err != nil {
		return fmt.Errorf("accounts of subscribers: %w", err)
	}
	opts.Accounts, opts.Users = parsed.Accounts, append(opts.Users, parsed.Users...)
	return nil
}

func merged(exports []map[string]any) []map[string]any {
	var out []map[string]any
	at := map[string]int{}
	for _, e := range exports {
		key := fmt.Sprint(e["stream"], " ", e["service"])
		if i, ok := at[key]; ok {
			out[i]["accounts"] = append(out[i]["accounts"].([]string), e["accounts"].([]string)...)
			continue
		}
		at[key] = len(out)
		out = append(out, e)
	}
	return out
}

// subscriberFile has the URL of a subscriber, with its password, which is kept
// over restarts.
func (o Options) subscriberFile(name string) string {
	return filepath.Join(o.Dir, "subscribers", name+".url")
}

// passwords reads those that there are, and makes the others.
func (o Options) passwords() (map[string]string, error) {
	all := map[string]string{}
	for _, s := range o.Subscribers {
		for _, r := range bus.Roles() {
			if s.Name == string(r) {
				return nil, fmt.Errorf("subscriber %q has the name of a role", s.Name)
			}
		}
		b, err := os.ReadFile(o.subscriberFile(s.Name))
		switch {
		case errors.Is(err, os.ErrNotExist):
			all[s.Name] = rand.Text()
		case err != nil:
			return nil, fmt.Errorf("password of subscriber %s: %w", s.Name, err)
		default:
			u, err := url.Parse(strings.TrimSpace(string(b)))
			if err != nil || u.User == nil {
				return nil, fmt.Errorf("%s holds no URL with a password: remove it for a new one", o.subscriberFile(s.Name))
			}
			all[s.Name], _ = u.User.Password()
		}
	}
	return all, nil
}

// writeSubscribers writes the files that subscribers are given.
func (o Options) writeSubscribers(addr string, passwords map[string]string) error {
	for name, pass := range passwords {
		file := o.subscriberFile(name)
		if err := os.MkdirAll(filepath.Dir(file), 0o700); err != nil {
			return err
		}
		text := fmt.Sprintf("nats://%s:%s@%s\n", name, pass, addr)
		if err := os.WriteFile(file+".new", []byte(text), 0o600); err != nil {
			return err
		}
		if err := os.Rename(file+".new", file); err != nil {
			return err
		}
	}
	return nil
}
