package bus

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"strconv"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

// ackWithin bounds one try to publish.
const ackWithin = 5 * time.Second

// acks publishes messages and waits for the log's word. The client's own way to
// do that has one more goroutine between the connection and who waits, and a
// subject for each reply, which the server has to look up anew each time. Here
// each message in flight has an inbox, which is used again by the next.
type acks struct {
	nc     *nats.Conn
	closed <-chan struct{} // when nc is
	idle   chan *inbox
}

// inbox belongs to one publish at a time.
type inbox struct {
	subject string
	sub     *nats.Subscription
	heard   chan *nats.Msg
	late    *time.Timer // stopped while the inbox is idle
}

// inboxes is how many are kept for later. More are made when they are needed.
const inboxes = 512

func newAcks(nc *nats.Conn, closed <-chan struct{}) *acks {
	return &acks{nc: nc, closed: closed, idle: make(chan *inbox, inboxes)}
}

// publish returns when the message is stored, and an error if that is not known.
func (a *acks) publish(ctx context.Context, m *nats.Msg) (*jetstream.PubAck, error) {
	in, err := a.take()
	if err != nil {
		return nil, err
	}
	m.Reply = in.subject
	if err := a.nc.PublishMsg(m); err != nil {
		a.drop(in)
		return nil, err
	}
	in.late.Reset(ackWithin)
	select {
	case r := <-in.heard:
		a.give(in)
		return readAck(r)
	case <-ctx.Done():
		err = ctx.Err()
	case <-in.late.C:
		err = nats.ErrTimeout
	case <-a.closed:
		err = fmt.Errorf("waiting for the log's answer: %w", nats.ErrDisconnected)
	}
	a.drop(in) // what comes yet must not be taken for the next one's
	return nil, err
}

func (a *acks) take() (*inbox, error) {
	for {
		select {
		case in := <-a.idle:
			if len(in.heard) == 0 {
				return in, nil
			}
			a.drop(in) // it was answered twice
		default:
			return a.open()
		}
	}
}

func (a *acks) open() (*inbox, error) {
	in := &inbox{subject: a.nc.NewInbox(), heard: make(chan *nats.Msg, 4), late: time.NewTimer(ackWithin)}
	in.late.Stop()
	var err error
	in.sub, err = a.nc.ChanSubscribe(in.subject, in.heard)
	return in, err
}

func (a *acks) give(in *inbox) {
	in.late.Stop()
	select {
	case a.idle <- in:
	default:
		a.drop(in)
	}
}

func (a *acks) drop(in *inbox) {
	in.late.Stop()
	_ = in.sub.Unsubscribe() // fails only when the connection is gone, and the subscription with it
}

// readAck reads what the log answered.
func readAck(m *nats.Msg) (*jetstream.PubAck, error) {
	// In nearly every case to the letter this, and encoding/json is dear.
	if seq, ok := bytes.CutPrefix(m.Data, []byte(`{"stream":"`+events+`","seq":`)); ok {
		if n, err := strconv.ParseUint(string(bytes.TrimSuffix(seq, []byte("}"))), 10, 64); err == nil {
			return &jetstream.PubAck{Stream: events, Sequence: n}, nil
		}
	}
	if len(m.Data) == 0 && m.Header.Get("Status") == "503" {
		return nil, nats.ErrNoResponders
	}
	var r struct {
		Error *jetstream.APIError `json:"error"`
		jetstream.PubAck
	}
	switch err := json.Unmarshal(m.Data, &r); {
	case err != nil:
		return nil, fmt.Errorf("the log's answer: %w", err)
	case r.Error != nil:
		return nil, r.Error
	case r.Stream == "":
		return nil, fmt.Errorf("the log's answer names no stream: %w", jetstream.ErrInvalidJSAck)
	}
	return &r.PubAck, nil
}
