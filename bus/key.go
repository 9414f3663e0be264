package bus

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

const keys = "KEYS"

// keys holds the secrets that the processes of a gateway share. Only who uses
// one may read it (role.go).
func (o Options) keys() jetstream.StreamConfig {
	return jetstream.StreamConfig{
		Name: keys, Description: "secrets that the processes of the gateway share",
		Subjects: []string{"key.>"}, MaxMsgsPerSubject: 1, Discard: jetstream.DiscardNew, DiscardNewPerSubject: true,
		DenyDelete: true, DenyPurge: true, MaxBytes: 1 << 20,
		Storage: jetstream.FileStorage, Replicas: max(o.Replicas, 1), MaxConsumers: -1,
	}
}

// Key is a secret of size random bytes that all processes with this log share:
// who asks for it first makes it. name is a token.
func (l *Log) Key(ctx context.Context, name string, size int) ([]byte, error) {
	subject := "key." + name
	s, err := l.js.Stream(ctx, keys)
	for err == nil {
		var m *jetstream.RawStreamMsg
		m, err = s.GetLastMsgForSubject(ctx, subject)
		if err == nil && len(m.Data) != size {
			return nil, fmt.Errorf("the key %s has %d bytes, not %d", name, len(m.Data), size)
		}
		if err == nil {
			return m.Data, nil
		}
		if !errors.Is(err, jetstream.ErrMsgNotFound) {
			break
		}
		secret := make([]byte, size)
		_, _ = rand.Read(secret) // never fails
		_, err = l.js.PublishMsg(ctx, &nats.Msg{Subject: subject, Data: secret}, jetstream.WithExpectLastSequencePerSubject(0))
		if api := new(jetstream.APIError); errors.As(err, &api) && api.Code < 500 {
			err = nil // another was first: the next reading finds it, or says why not
			if ctx.Err() != nil {
				err = ctx.Err()
			}
		}
	}
	return nil, fmt.Errorf("the key %s: %w", name, err)
}
