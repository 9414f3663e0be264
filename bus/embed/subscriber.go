package embed

import (
	"crypto/rand"
	"errors"
	"fmt"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"

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

// accountOf is a subscriber's account.
func accountOf(s Subscriber) string { return "subscriber-" + s.Name }

// addSubscribers gives each subscriber an account and a user.
func addSubscribers(opts *server.Options, subscribers []Subscriber, passwords map[string]string) {
	for _, s := range subscribers {
		of := server.NewAccount(accountOf(s))
		opts.Accounts = append(opts.Accounts, of)
		opts.Users = append(opts.Users, &server.User{
			Username: s.Name, Password: passwords[s.Name], Account: of,
			Permissions: &server.Permissions{
				Publish:   &server.SubjectPermission{Allow: bus.SubscriberAsks(s.Name)},
				Subscribe: &server.SubjectPermission{Allow: append([]string{"_INBOX.>"}, bus.SubscriberHears(s.Tenant)...)},
			},
		})
	}
}

// enable gives the roles' account JetStream, which the server does by itself only
// where there is no account beside.
func enable(ns *server.Server) error {
	tasks := make(chan func())
	var done sync.WaitGroup
	done.Go(func() {
		for do := range tasks {
			do()
		}
	})
	err := ns.GlobalAccount().EnableJetStream(nil, tasks)
	close(tasks)
	done.Wait()
	if err != nil {
		return fmt.Errorf("start JetStream beside subscribers: %w", err)
	}
	return nil
}

// accountInfo is imported too, and no user may ask it: an account without it is
// given the server's own JetStream API, which would answer beside the log's.
const accountInfo = "$JS.API.INFO"

// share lets the subscribers' accounts have what they may read, before the server
// starts.
func share(ns *server.Server, subscribers []Subscriber) error {
	roles := ns.GlobalAccount()
	type export struct {
		stream bool
		to     []*server.Account
	}
	exports := map[string]*export{}
	of := map[string]*server.Account{}
	for _, s := range subscribers {
		a, err := ns.LookupAccount(accountOf(s))
		if err != nil {
			return fmt.Errorf("account of subscriber %s: %w", s.Name, err)
		}
		of[s.Name] = a
		add := func(subjects []string, stream bool) {
			for _, subject := range subjects {
				if exports[subject] == nil {
					exports[subject] = &export{stream: stream}
				}
				exports[subject].to = append(exports[subject].to, a)
			}
		}
		add(bus.SubscriberHears(s.Tenant), true)
		add(append(bus.SubscriberAsks(s.Name), accountInfo), false)
	}
	for subject, e := range exports {
		err := error(nil)
		switch {
		case e.stream:
			err = roles.AddStreamExport(subject, e.to)
		case strings.Contains(subject, ".MSG.NEXT."):
			err = roles.AddServiceExportWithResponse(subject, server.Streamed, e.to)
		default:
			err = roles.AddServiceExport(subject, e.to)
		}
		if err != nil {
			return fmt.Errorf("let subscribers have %s: %w", subject, err)
		}
	}
	for _, s := range subscribers {
		for _, subject := range bus.SubscriberHears(s.Tenant) {
			if err := of[s.Name].AddStreamImport(roles, subject, ""); err != nil {
				return fmt.Errorf("let subscriber %s hear %s: %w", s.Name, subject, err)
			}
		}
		for _, subject := range append(bus.SubscriberAsks(s.Name), accountInfo) {
			if err := of[s.Name].AddServiceImport(roles, subject, ""); err != nil {
				return fmt.Errorf("let subscriber %s ask %s: %w", s.Name, subject, err)
			}
		}
	}
	return nil
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
