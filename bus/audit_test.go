package bus_test

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"waybill.dev/bus"
	"waybill.dev/bus/embed"
	"waybill.dev/schemas"
)

// feed stores a record for a tenant, as number n.
func feed(t *testing.T, a *bus.Audit, n uint64, tenant string) {
	t.Helper()
	err := a.Append(t.Context(), n, []bus.FeedRecord{{
		Subject: "audit." + tenant + ".researcher.completed", Payload: fmt.Appendf(nil, `{"of":"%s","n":%d}`, tenant, n),
		Position: fmt.Sprintf("EVENTS=%d", n+1),
	}})
	if err != nil {
		t.Fatal(err)
	}
}

// subscriber connects with the URL that a subscriber is given.
func subscriber(t *testing.T, dir, name string) *nats.Conn {
	t.Helper()
	url, err := os.ReadFile(filepath.Join(dir, "subscribers", name+".url"))
	if err != nil {
		t.Fatal(err)
	}
	nc, err := nats.Connect(strings.TrimSpace(string(url)), nats.ErrorHandler(func(*nats.Conn, *nats.Subscription, error) {}))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(nc.Close)
	return nc
}

// A subscriber sees all of its tenant's records, live and what it has missed, and
// the checkpoints and tiles; nothing of others, nothing of the log; and it stores
// nothing.
func TestSubscribers(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "log")
	w := start(t, embed.Options{Dir: dir, Listen: "127.0.0.1:0", Subscribers: []embed.Subscriber{{Name: "siem-a", Tenant: "a"}, {Name: "siem-b", Tenant: "b"}}})
	l := w.open(bus.Options{Role: bus.RoleAudit})
	a, err := l.Audit(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range []string{"a", "b"} {
		if err := a.Subscriber(t.Context(), "siem-"+s, schemas.Tenant(s)); err != nil {
			t.Fatal(err)
		}
	}
	edge := w.open(bus.Options{Role: bus.RoleEdge})
	secret := request("secret")
	if _, err := edge.Publish(t.Context(), secret); err != nil {
		t.Fatal(err)
	}
	feed(t, a, 0, "a") // while nobody listens
	feed(t, a, 1, "b")

	nc := subscriber(t, dir, "siem-a")
	live, err := nc.SubscribeSync("audit.a.>")
	if err != nil {
		t.Fatal(err)
	}
	checkpoints, err := nc.SubscribeSync("audit.checkpoint")
	if err != nil {
		t.Fatal(err)
	}
	cosigned, err := nc.SubscribeSync("audit.cosigned")
	if err != nil {
		t.Fatal(err)
	}
	var others []*nats.Subscription
	for _, subject := range []string{"audit.b.>", "audit.>", "audit.*.*.*", "ev.>", "sys.>", "tlog.>", "salt.>", "dead.>", ">", "$JS.>", "$SYS.>", "_INBOX.>"} {
		s, err := nc.SubscribeSync(subject)
		if err == nil {
			others = append(others, s)
		}
	}
	if err := nc.Flush(); err != nil {
		t.Fatal(err)
	}
	feed(t, a, 2, "b")
	feed(t, a, 3, "a")
	if err := a.PutCheckpoint(t.Context(), "note", "EVENTS=1"); err != nil {
		t.Fatal(err)
	}
	if text, err := a.Cosigned(t.Context()); err != nil || text != "" {
		t.Errorf("cosigned before anybody has: %q %v", text, err)
	}
	for _, text := range []string{"cosigned note", "another"} {
		if err := a.PutCosigned(t.Context(), text); err != nil {
			t.Fatal(err)
		}
	}
	if err := a.PutTile(t.Context(), "tile/8/0/000", []byte("tile")); err != nil {
		t.Fatal(err)
	}
	if m, err := live.NextMsg(patience); err != nil || m.Subject != "audit.a.researcher.completed" || string(m.Data) != `{"of":"a","n":3}` {
		t.Errorf("live: %v %v", m, err)
	}
	if m, err := checkpoints.NextMsg(patience); err != nil || string(m.Data) != "note" {
		t.Errorf("checkpoint: %v %v", m, err)
	}
	if m, err := cosigned.NextMsg(patience); err != nil || string(m.Data) != "cosigned note" {
		t.Errorf("cosigned: %v %v", m, err)
	}
	if m, err := nc.Request("$JS.API.DIRECT.GET.AUDIT.audit.cosigned", nil, patience); err != nil || string(m.Data) != "another" {
		t.Errorf("cosigned: %v %v", m, err)
	}
	// The one is not the other: a builder goes by the newest checkpoint.
	if text, _, err := a.Checkpoint(t.Context()); err != nil || text != "note" {
		t.Errorf("the newest checkpoint is %q, %v", text, err)
	}
	if text, err := a.Cosigned(t.Context()); err != nil || text != "another" {
		t.Errorf("the newest cosigned one is %q, %v", text, err)
	}
	to, err := a.Signed(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for want, all := range map[string]iter.Seq2[bus.Checkpointed, error]{"note": a.Checkpoints(t.Context(), to), "cosigned note another": a.AllCosigned(t.Context(), to)} {
		var got []string
		for c, err := range all {
			if got = append(got, c.Text); err != nil {
				t.Fatal(err)
			}
		}
		if strings.Join(got, " ") != want {
			t.Errorf("%q, not %s", got, want)
		}
	}

	// What it was away for, from its own consumer; what it acknowledges does not
	// come again, what it does not, does.
	// So many records are waited for, and whether more come.
	pull := func(nc *nats.Conn, name string, n int) []string {
		t.Helper()
		inbox := nc.NewInbox()
		sub, err := nc.SubscribeSync(inbox)
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = sub.Unsubscribe() }()
		var got []string
		asked := time.Time{}
		for late := time.Now().Add(patience); ; {
			if asked.IsZero() {
				if err := nc.PublishRequest("$JS.API.CONSUMER.MSG.NEXT.FEED."+name, inbox, []byte(`{"batch":100,"expires":200000000}`)); err != nil {
					t.Fatal(err)
				}
				asked = time.Now()
			}
			m, err := sub.NextMsg(time.Second)
			if err != nil || len(m.Data) == 0 {
				if asked = (time.Time{}); len(got) < n && time.Now().Before(late) {
					continue
				}
				return got
			}
			got = append(got, string(m.Data))
			if _, err := nc.RequestMsg(&nats.Msg{Subject: m.Reply, Data: []byte("+ACK")}, patience); err != nil {
				t.Errorf("acknowledge on %s: %v", m.Reply, err)
			}
		}
	}
	if got := strings.Join(pull(nc, "siem-a", 2), ""); got != `{"of":"a","n":0}{"of":"a","n":3}` {
		t.Errorf("pulled %s", got)
	}
	feed(t, a, 4, "a")
	if got := strings.Join(pull(nc, "siem-a", 1), ""); got != `{"of":"a","n":4}` {
		t.Errorf("then %s", got)
	}
	if got := pull(nc, "siem-b", 0); len(got) > 0 {
		t.Errorf("of the other's consumer: %s", got)
	}
	// By the client library, too.
	js, err := jetstream.New(nc)
	if err != nil {
		t.Fatal(err)
	}
	c, err := js.Consumer(t.Context(), "FEED", "siem-a")
	if err != nil {
		t.Fatal(err)
	}
	feed(t, a, 5, "a")
	batch, err := c.Fetch(1, jetstream.FetchMaxWait(patience))
	if err != nil {
		t.Fatal(err)
	}
	m, ok := <-batch.Messages()
	if !ok || string(m.Data()) != `{"of":"a","n":5}` || m.DoubleAck(t.Context()) != nil {
		t.Errorf("fetched %v", m)
	}
	if m, err := nc.Request("$JS.API.DIRECT.GET.AUDIT.tlog.tile.8.0.000", nil, patience); err != nil || string(m.Data) != "tile" {
		t.Errorf("tile: %v %v", m, err)
	}

	if err := a.PutEdge(t.Context(), map[string][]byte{"tile/8/0/001.p/3": []byte("edge")}); err != nil {
		t.Fatal(err)
	}
	if m, err := nc.Request("$JS.API.DIRECT.GET.AUDIT_STATE.tlog.edge.0", nil, patience); err != nil || string(m.Data) != "edge" || m.Header.Get("Waybill-Tile") != "tile/8/0/001.p/3" {
		t.Errorf("tile that is not full: %v %v", m, err)
	}
	salt, err := a.Secret(t.Context(), "a", "s", 32, false)
	if err != nil {
		t.Fatal(err)
	}
	for _, subject := range []string{"tlog.edge.0", "tlog.edge.*", "salt.a.s", "salt.>", ">"} {
		for _, body := range []string{"", `{"seq":2}`, `{"last_by_subj":"salt.a.s"}`, `{"next_by_subj":"salt.>","seq":1}`, `{"multi_last":["salt.>"]}`, `{"batch":10,"seq":1}`} {
			if m, err := nc.Request("$JS.API.DIRECT.GET.AUDIT_STATE."+subject, []byte(body), 50*time.Millisecond); err == nil && strings.Contains(string(m.Data), string(salt)) {
				t.Errorf("a salt is to be had at %s by %q", subject, body)
			}
		}
	}

	// The rest it may not.
	refused := func(what, subject, body string) {
		t.Helper()
		if m, err := nc.Request(subject, []byte(body), 100*time.Millisecond); err == nil {
			t.Errorf("%s answers %s", what, m.Data)
		}
	}
	refused("reading an event", "$JS.API.STREAM.MSG.GET.EVENTS", `{"seq":1}`)
	refused("reading an event directly", "$JS.API.DIRECT.GET.EVENTS", `{"seq":1}`)
	refused("reading the feed", "$JS.API.DIRECT.GET.FEED", `{"seq":2}`)
	refused("reading the salts", "$JS.API.STREAM.MSG.GET.AUDIT_STATE", `{"seq":1}`)
	refused("reading the salts directly", "$JS.API.DIRECT.GET.AUDIT_STATE", `{"seq":2}`)
	refused("reading a salt", "$JS.API.DIRECT.GET.AUDIT_STATE.salt.a.s", "")
	refused("another's consumer", "$JS.API.CONSUMER.MSG.NEXT.FEED.siem-b", `{"batch":1,"no_wait":true}`)
	refused("a consumer of its own", "$JS.API.CONSUMER.CREATE.FEED.x.audit.b.>", `{"stream_name":"FEED","config":{"name":"x","filter_subject":"audit.b.>"}}`)
	refused("deleting a consumer", "$JS.API.CONSUMER.DELETE.FEED.siem-a", "")
	refused("deleting a record", "$JS.API.STREAM.MSG.DELETE.FEED", `{"seq":1}`)
	refused("storing an event", "ev.a.s.completed._", "x")
	refused("storing a record", "audit.a.researcher.completed", "x")
	refused("storing a checkpoint", "audit.checkpoint", "x")
	refused("storing a cosigned one", "audit.cosigned", "x")
	// Nor by having an answer sent there.
	for _, to := range []string{"ev.a.s.completed._", "audit.a.researcher.completed", "audit.checkpoint", "audit.cosigned"} {
		_ = nc.PublishRequest("$JS.API.CONSUMER.INFO.FEED.siem-a", to, nil)
		_ = nc.PublishRequest("$JS.API.CONSUMER.MSG.NEXT.FEED.siem-a", to, []byte(`{"batch":1,"no_wait":true}`))
	}
	// Which is behind them: what comes from here on none of them takes away.
	if got := pull(nc, "siem-a", 0); len(got) > 0 {
		t.Errorf("before the last there is %s", got)
	}
	feed(t, a, 6, "a")
	if got := strings.Join(pull(nc, "siem-a", 1), ""); !strings.Contains(got, `"n":6`) {
		t.Errorf("at last %s", got)
	}
	if last, err := edge.Last(t.Context()); err != nil || last != 1 {
		t.Errorf("the log ends at %d: %v", last, err)
	}
	if n, _, err := a.Head(t.Context()); err != nil || n != 7 {
		t.Errorf("the feed has %d records: %v", n, err)
	}
	for _, s := range others {
		for {
			m, err := s.NextMsg(10 * time.Millisecond)
			if err != nil {
				break
			}
			if strings.Contains(string(m.Data), `"of":"b"`) || strings.Contains(string(m.Data), "secret") {
				t.Errorf("%s hears %s: %s", s.Subject, m.Subject, m.Data)
			}
		}
	}
	// And the other hears what is its own only.
	if got := strings.Join(pull(subscriber(t, dir, "siem-b"), "siem-b", 2), ""); got != `{"of":"b","n":1}{"of":"b","n":2}` {
		t.Errorf("the other pulled %s", got)
	}
}

// Credentials and what a subscriber has not acknowledged stay over restarts.
func TestSubscriberAfterRestart(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "log")
	o := embed.Options{Dir: dir, Listen: "127.0.0.1:0", Subscribers: []embed.Subscriber{{Name: "siem", Tenant: "a"}}}
	var urls []string
	for round := range 2 {
		func() {
			srv, err := embed.Start(o)
			if err != nil {
				t.Fatal(err)
			}
			defer func() {
				if err := srv.Close(); err != nil {
					t.Error(err)
				}
			}()
			l := (&world{t, srv}).open(bus.Options{Role: bus.RoleAudit})
			defer l.Close()
			a, err := l.Audit(t.Context())
			if err == nil {
				err = a.Subscriber(t.Context(), "siem", "a")
			}
			if err != nil {
				t.Fatal(err)
			}
			b, err := os.ReadFile(filepath.Join(dir, "subscribers", "siem.url"))
			if err != nil {
				t.Fatal(err)
			}
			pass, _, _ := strings.Cut(string(b), "@")
			urls = append(urls, pass)
			if round == 0 {
				feed(t, a, 0, "a")
				return
			}
			nc := subscriber(t, dir, "siem")
			js, err := jetstream.New(nc)
			if err != nil {
				t.Fatal(err)
			}
			c, err := js.Consumer(t.Context(), "FEED", "siem")
			if err != nil {
				t.Fatal(err)
			}
			batch, err := c.Fetch(1, jetstream.FetchMaxWait(patience))
			if err != nil {
				t.Fatal(err)
			}
			if m, ok := <-batch.Messages(); !ok || string(m.Data()) != `{"of":"a","n":0}` {
				t.Errorf("%v", m)
			}
		}()
	}
	if urls[0] != urls[1] {
		t.Error("the credentials are new after a restart")
	}
}

// The feed takes no record that does not follow the one before.
func TestFeedIsDense(t *testing.T) {
	w := start(t, embed.Options{})
	a := w.audit()
	records := func(n int) []bus.FeedRecord {
		var all []bus.FeedRecord
		for i := range n {
			all = append(all, bus.FeedRecord{Subject: "audit.a.b.c", Payload: fmt.Append(nil, i)})
		}
		return all
	}
	if err := a.Append(t.Context(), 0, records(10)); err != nil {
		t.Fatal(err)
	}
	for _, n := range []uint64{0, 5, 9, 11, 100} {
		if err := a.Append(t.Context(), n, records(3)); err == nil {
			t.Errorf("it takes records from %d on", n)
		}
	}
	if err := a.Append(t.Context(), 10, records(3)); err != nil {
		t.Fatal(err)
	}
	if n, _, err := a.Head(t.Context()); n != 13 || err != nil {
		t.Errorf("%d records: %v", n, err)
	}
	for _, role := range bus.Roles() {
		if role == bus.RoleAudit || role == bus.RoleAdmin {
			continue
		}
		l := w.open(bus.Options{Role: role})
		other, err := l.Audit(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
		if err := other.Append(ctx, 13, records(1)); err == nil {
			t.Errorf("%s can write the feed", role)
		}
		cancel()
		ctx, cancel = context.WithTimeout(t.Context(), 100*time.Millisecond)
		if s, err := other.Secret(ctx, "", "", 32, true); err == nil && s != nil {
			t.Errorf("%s can read the salts", role)
		}
		cancel()
	}
}

// What is read of a tree that grows meanwhile is whole: no checkpoint of leaves
// that come later, and each tile, full or not.
func TestReadWhileGrowing(t *testing.T) {
	w := start(t, embed.Options{})
	l := w.open(bus.Options{Role: bus.RoleAudit})
	a, err := l.Audit(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	edge := func(path string) {
		t.Helper()
		if err := a.PutEdge(t.Context(), map[string][]byte{path: []byte(path)}); err != nil {
			t.Fatal(err)
		}
	}
	for _, c := range []string{"one", "two"} {
		if err := a.PutCheckpoint(t.Context(), c, ""); err != nil {
			t.Fatal(err)
		}
	}
	edge("tile/8/0/000.p/7")
	edge("tile/8/1/000.p/1")
	to, err := a.Signed(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if err := a.PutCheckpoint(t.Context(), "three", ""); err != nil {
		t.Fatal(err)
	}
	var checkpoints, tiles []string
	for c, err := range a.Checkpoints(t.Context(), to) {
		if err != nil {
			t.Fatal(err)
		}
		checkpoints = append(checkpoints, c.Text)
	}
	if got := strings.Join(checkpoints, " "); got != "one two" {
		t.Errorf("checkpoints %s", got)
	}
	for tile, err := range a.Tiles(t.Context()) {
		if err != nil {
			t.Fatal(err)
		}
		if len(tiles) == 0 { // it gets full in the middle of the reading
			if err := a.PutTile(t.Context(), "tile/8/0/000", []byte("full")); err != nil {
				t.Fatal(err)
			}
			edge("tile/8/0/001.p/3")
		}
		tiles = append(tiles, tile.Path)
	}
	slices.Sort(tiles)
	if got := strings.Join(tiles, " "); got != "tile/8/0/000 tile/8/0/000.p/7 tile/8/1/000.p/1" {
		t.Errorf("tiles %s", got)
	}
}

// An erasure is stored only where nothing of its session has come since it was
// decided on; what comes in other sessions does not matter.
func TestErasureOvertaken(t *testing.T) {
	w := start(t, embed.Options{})
	l, edge := w.open(bus.Options{Role: bus.RoleAudit}), w.open(bus.Options{Role: bus.RoleEdge})
	one, other := request("one"), request("other")
	other.Session = schemas.NewSessionKey("acme", "researcher", "two")
	read, err := edge.Publish(t.Context(), one)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := edge.Publish(t.Context(), other); err != nil {
		t.Fatal(err)
	}
	erased := func(id string) schemas.Event {
		return schemas.Event{Tenant: one.Tenant, Session: one.Session, Agent: one.Agent, Data: &schemas.Erased{ID: id}}
	}
	stored, err := l.PublishLast(t.Context(), erased("a"), read.Seq)
	if err != nil {
		t.Fatal(err)
	}
	if e, err := l.Load(t.Context(), stored.Seq); err != nil || e.Kind() != schemas.KindErased {
		t.Errorf("%v %v", e, err)
	}
	if _, err := l.PublishLast(t.Context(), erased("b"), read.Seq); !errors.Is(err, bus.ErrOvertaken) {
		t.Errorf("%v, want %v", err, bus.ErrOvertaken)
	}
}

// What the audit is answered, and salts among it, only its own role hears.
func TestAnswersArePrivate(t *testing.T) {
	w := start(t, embed.Options{})
	l := w.open(bus.Options{Role: bus.RoleAudit})
	a, err := l.Audit(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	secret, err := a.Secret(t.Context(), "", "", 32, false)
	if err != nil {
		t.Fatal(err)
	}
	for _, role := range bus.Roles() {
		if role == bus.RoleAudit || role == bus.RoleAdmin {
			continue
		}
		nc, err := w.srv.Connect(role, nats.ErrorHandler(func(*nats.Conn, *nats.Subscription, error) {}))
		if err != nil {
			t.Fatal(err)
		}
		defer nc.Close()
		heard := make(chan *nats.Msg, 64)
		for _, subject := range []string{"_INBOX.>", "_PRIV.>", "_PRIV.audit.>", ">", "salt.>"} {
			if _, err := nc.ChanSubscribe(subject, heard); err != nil {
				t.Fatal(err)
			}
		}
		if err := nc.Flush(); err != nil {
			t.Fatal(err)
		}
		if again, err := a.Secret(t.Context(), "", "", 32, true); err != nil || string(again) != string(secret) {
			t.Fatalf("%x %v", again, err)
		}
		// The answer to this comes behind whatever was heard.
		if err := nc.Flush(); err != nil {
			t.Fatal(err)
		}
		for len(heard) > 0 {
			if m := <-heard; strings.Contains(string(m.Data), `"message"`) {
				t.Errorf("%s hears on %s: %s", role, m.Subject, m.Data)
			}
		}
	}
}

// What is erased is overwritten, the session's only, and an erasure is no part of
// what it erases; to do so again does no harm.
func TestEraseOverwrites(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "log")
	w := start(t, embed.Options{Dir: dir})
	l := w.open(bus.Options{Role: bus.RoleAudit})
	a, err := l.Audit(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	edge := w.open(bus.Options{Role: bus.RoleEdge})
	gone, stays := request("canary-gone"), request("canary-stays")
	stays.Session = schemas.NewSessionKey("acme", "researcher", "two")
	for _, e := range []schemas.Event{gone, stays} {
		if _, err := edge.Publish(t.Context(), e); err != nil {
			t.Fatal(err)
		}
		if _, err := a.Secret(t.Context(), e.Tenant, e.Session, 32, false); err != nil {
			t.Fatal(err)
		}
	}
	erased := gone
	erased.Call, erased.Root, erased.Body, erased.Data = "", "", nil, &schemas.Erased{ID: "x"}
	receipt, err := l.Publish(t.Context(), erased)
	if err != nil {
		t.Fatal(err)
	}
	err = a.Append(t.Context(), 0, []bus.FeedRecord{
		{Subject: "audit.acme.researcher.requested", Payload: []byte("canary-gone of " + gone.Session), Position: "EVENTS=1"},
		{Subject: "audit.acme.researcher.requested", Payload: []byte("canary-stays of " + stays.Session), Position: "EVENTS=2"},
	})
	if err != nil {
		t.Fatal(err)
	}
	cut := func(payload []byte) ([]byte, bool) {
		return []byte("without"), strings.Contains(string(payload), "canary-gone")
	}
	for range 2 {
		if err := a.Erase(t.Context(), gone.Tenant, gone.Session, receipt.Seq, cut); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := l.Load(t.Context(), 1); !errors.Is(err, schemas.ErrNotFound) {
		t.Errorf("the event: %v", err)
	}
	if e, err := l.Load(t.Context(), 3); err != nil || e.Kind() != schemas.KindErased {
		t.Errorf("the erasure: %v", err)
	}
	if s, err := a.Secret(t.Context(), gone.Tenant, gone.Session, 32, true); s != nil || err != nil {
		t.Errorf("the secret: %v %v", s, err)
	}
	if s, err := a.Secret(t.Context(), stays.Tenant, stays.Session, 32, true); s == nil || err != nil {
		t.Errorf("the other's secret: %v", err)
	}
	var records []string
	for r, err := range a.Feed(t.Context(), 0, 2) {
		if err != nil {
			t.Fatal(err)
		}
		records = append(records, fmt.Sprint(r.Number, " ", string(r.Payload)))
	}
	if got := strings.Join(records, "; "); got != "0 without; 1 canary-stays of "+string(stays.Session) {
		t.Errorf("the feed: %s", got)
	}
	var there []string
	err = filepath.WalkDir(dir, func(path string, d os.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		b, err := os.ReadFile(path)
		if strings.Contains(string(b), "canary-gone") {
			there = append(there, path)
		}
		return err
	})
	if err != nil || len(there) > 0 {
		t.Errorf("%v: what was said is still in %v", err, there)
	}
	// Nobody else deletes.
	for _, role := range bus.Roles() {
		if role == bus.RoleAudit || role == bus.RoleAdmin {
			continue
		}
		nc, err := w.srv.Connect(role, nats.ErrorHandler(func(*nats.Conn, *nats.Subscription, error) {}))
		if err != nil {
			t.Fatal(err)
		}
		for _, stream := range []string{"EVENTS", "SYSTEM", "AUDIT", "FEED", "AUDIT_STATE", "DEAD"} {
			if m, err := nc.Request("$JS.API.STREAM.MSG.DELETE."+stream, []byte(`{"seq":2}`), 30*time.Millisecond); err == nil {
				t.Errorf("%s deletes of %s: %s", role, stream, m.Data)
			}
		}
		nc.Close()
	}
}

// What is read from a time on is all that is left of it, wherever what was erased had
// its place: rules count what was decided in the last hour.
func TestReadSinceErased(t *testing.T) {
	w := start(t, embed.Options{})
	l, edge := w.open(bus.Options{Role: bus.RoleAudit}), w.open(bus.Options{Role: bus.RoleEdge})
	a, err := l.Audit(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	gone := schemas.NewSessionKey("acme", "researcher", "gone")
	const erased = 4 // of 9, and among them what is looked at first
	var at []time.Time
	last := schemas.Event{}
	for i := range 9 {
		e := request(fmt.Sprint("c", i))
		if i >= 3 && i < 3+erased {
			e.Session, last = gone, e
		}
		r, err := edge.Publish(t.Context(), e)
		if err != nil {
			t.Fatal(err)
		}
		stored, err := l.Load(t.Context(), r.Seq)
		if err != nil {
			t.Fatal(err)
		}
		at = append(at, stored.Stored)
	}
	last.Call, last.Root, last.Body, last.Data = "", "", nil, &schemas.Erased{ID: "x"}
	r, err := l.Publish(t.Context(), last)
	if err != nil {
		t.Fatal(err)
	}
	if err := a.Erase(t.Context(), last.Tenant, gone, r.Seq, func([]byte) ([]byte, bool) { return nil, false }); err != nil {
		t.Fatal(err)
	}
	for i, since := range at {
		n := 0
		for e, err := range l.ReadSince(t.Context(), bus.Filter{Kinds: []schemas.Kind{schemas.KindRequested}}, since) {
			if n++; err != nil || e.Stored.Before(since) {
				t.Errorf("since %d: %v of %v, %v", i, e.Call, e.Stored, err)
			}
		}
		if want := len(at) - i - max(0, min(erased, 3+erased-i)); n != want {
			t.Errorf("since %d: %d events, %d are left", i, n, want)
		}
	}
}

// The records of what is erased are found in the feed by their places there, among
// others; and those of which the log has no events any more by their session.
func TestEraseFindsRecords(t *testing.T) {
	w := start(t, embed.Options{})
	l := w.open(bus.Options{Role: bus.RoleAudit})
	a, err := l.Audit(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	edge := w.open(bus.Options{Role: bus.RoleEdge})
	var last schemas.Receipt
	var session schemas.SessionKey
	var records []bus.FeedRecord
	record := func(text, position string) {
		records = append(records, bus.FeedRecord{Subject: "audit.acme.researcher.requested", Payload: []byte(text), Position: position})
	}
	record("old said of a session", "EVENTS=0") // of before the log
	for i := range 40 {
		e := request(fmt.Sprint("said ", i))
		if i%3 == 1 {
			e.Session = schemas.NewSessionKey("acme", "researcher", "other")
		} else {
			session = e.Session
		}
		if last, err = edge.Publish(t.Context(), e); err != nil {
			t.Fatal(err)
		}
		if i%7 == 3 { // of another stream
			record("system", fmt.Sprintf("EVENTS=%d SYSTEM=%d", last.Seq-1, i))
		}
		record(fmt.Sprintf("said %d of %s", i, e.Session), fmt.Sprintf("EVENTS=%d", last.Seq))
	}
	if err := a.Append(t.Context(), 0, records); err != nil {
		t.Fatal(err)
	}
	seen := 0
	cut := func(payload []byte) ([]byte, bool) {
		seen++
		return []byte("cut"), strings.Contains(string(payload), "said")
	}
	if err := a.Erase(t.Context(), "acme", session, last.Seq+1, cut); err != nil {
		t.Fatal(err)
	}
	if seen != 27 {
		t.Errorf("%d records were looked at for 27 events", seen)
	}
	cuts := func() (n int) {
		for r, err := range a.Feed(t.Context(), 0, uint64(len(records))) {
			if err != nil {
				t.Fatal(err)
			}
			if text := string(r.Payload); text == "cut" {
				n++
			} else if strings.Contains(text, string(session)) && r.Number > 0 {
				t.Errorf("record %d is %s", r.Number, text)
			}
		}
		return n
	}
	if n := cuts(); n != 27 {
		t.Errorf("%d records are without their bodies", n)
	}
	if err := a.EraseFeed(t.Context(), "acme", "researcher", "a session", uint64(len(records)), cut); err != nil {
		t.Fatal(err)
	}
	if n := cuts(); n != 28 {
		t.Errorf("%d records are without their bodies", n)
	}
}

// A session of which the log has nothing is found by its secret, and by the feed.
func TestOutlived(t *testing.T) {
	w := start(t, embed.Options{})
	a := w.audit()
	of := func(agent, session string) bus.FeedRecord {
		return bus.FeedRecord{
			Subject: "audit.acme." + agent + ".requested", Position: "EVENTS=1",
			Payload: []byte(`{"data":{"body":"\"subject\":\"ev.acme.s1.","leaf":{"subject":"ev.acme.` + session + `.requested._"}}}`),
		}
	}
	if err := a.Append(t.Context(), 0, []bus.FeedRecord{of("_", "s1"), of("researcher", "s1"), of("writer", "s2")}); err != nil {
		t.Fatal(err)
	}
	for _, s := range []schemas.SessionKey{"s1", "s2", "s3"} {
		if _, err := a.Secret(t.Context(), "acme", s, 32, false); err != nil {
			t.Fatal(err)
		}
	}
	for s, want := range map[schemas.SessionKey]string{"s1": "acme researcher 2", "s2": "acme writer 1", "s3": "acme _ 0"} {
		if tenant, agent, n, err := a.Outlived(t.Context(), s); err != nil || fmt.Sprint(tenant, " ", agent, " ", n) != want {
			t.Errorf("%s: %s %s %d %v, want %s", s, tenant, agent, n, err, want)
		}
	}
	if _, _, _, err := a.Outlived(t.Context(), "nobody"); !errors.Is(err, schemas.ErrNotFound) {
		t.Errorf("one that nobody knows: %v", err)
	}
	// A record that was replaced lies beside the secrets, under its number.
	if err := a.EraseFeed(t.Context(), "acme", "writer", "s2", 3, func([]byte) ([]byte, bool) { return []byte("cut"), true }); err != nil {
		t.Fatal(err)
	}
	for _, n := range []schemas.SessionKey{"0", "1", "2"} {
		if _, _, _, err := a.Outlived(t.Context(), n); !errors.Is(err, schemas.ErrNotFound) {
			t.Errorf("session %s: %v", n, err)
		}
	}
	// The first ones that were replaced are there all the same.
	if err := a.EraseFeed(t.Context(), "acme", "researcher", "s1", 3, func([]byte) ([]byte, bool) { return []byte("cut"), true }); err != nil {
		t.Fatal(err)
	}
	if n, err := a.First(t.Context()); err != nil || n != 0 {
		t.Errorf("the feed begins with %d: %v", n, err)
	}
}

// A session that is erased while the feed is read is not missing: what has been
// replaced since the reading began is read from where it is now.
func TestErasedWhileReading(t *testing.T) {
	w := start(t, embed.Options{})
	a := w.audit()
	const n = 60 // twice what is read ahead
	for i := range uint64(n) {
		text := fmt.Sprintf("%d %s", i, strings.Repeat("said", 128<<10))
		if err := a.Append(t.Context(), i, []bus.FeedRecord{{Subject: "audit.acme.researcher.requested", Payload: []byte(text), Position: "EVENTS=1"}}); err != nil {
			t.Fatal(err)
		}
	}
	erase := func(numbers ...string) {
		t.Helper()
		cut := func(payload []byte) ([]byte, bool) {
			number, _, _ := strings.Cut(string(payload), " ")
			return []byte(number + " cut"), slices.Contains(numbers, number)
		}
		if err := a.EraseFeed(t.Context(), "acme", "researcher", "said", n, cut); err != nil {
			t.Fatal(err)
		}
	}
	erase("0", "3")
	var got []string
	for r, err := range a.Feed(t.Context(), 0, n) {
		if err != nil {
			t.Fatal(err)
		}
		if number, _, _ := strings.Cut(string(r.Payload), " "); number != fmt.Sprint(r.Number) || r.Number != uint64(len(got)) {
			t.Fatalf("record %d, behind %d, is %.20s", r.Number, len(got), r.Payload)
		}
		got = append(got, string(r.Payload[:min(len(r.Payload), 10)]))
		if r.Number == 1 {
			erase("50", "57", "58", "59")
		}
	}
	if len(got) != n || got[0] != "0 cut" || got[3] != "3 cut" || got[59] != "59 cut" {
		t.Errorf("%d records: %q", len(got), got)
	}
}

// What is deleted while a stream is read was counted, and never comes: the reading ends,
// with all that is there.
func TestReadWhileDeleting(t *testing.T) {
	w := start(t, embed.Options{})
	a := w.audit()
	edge := w.open(bus.Options{Role: bus.RoleEdge})
	goes := schemas.NewSessionKey("acme", "researcher", "goes")
	const all, left = 700, 50 // 512 are read ahead
	for i := range all {
		e := request("said")
		if i >= left {
			e.Session = goes
		}
		if _, err := edge.Publish(t.Context(), e); err != nil {
			t.Fatal(err)
		}
	}
	messages, stop := iter.Pull2(a.Messages(t.Context(), "EVENTS", 1))
	defer stop()
	events, stop2 := iter.Pull2(edge.Read(t.Context(), bus.Filter{}, 0))
	defer stop2()
	readers := map[string]func() (error, bool){
		"messages": func() (error, bool) { _, err, ok := messages(); return err, ok },
		"events":   func() (error, bool) { _, err, ok := events(); return err, ok },
	}
	for what, next := range readers {
		if err, ok := next(); err != nil || !ok {
			t.Fatal(what, err, ok)
		}
	}
	if err := a.Erase(t.Context(), "acme", goes, all+1, func(b []byte) ([]byte, bool) { return b, false }); err != nil {
		t.Fatal(err)
	}
	for what, next := range readers {
		n := 1
		for err, ok := next(); ok; err, ok = next() {
			if err != nil {
				t.Fatal(what, err)
			}
			n++
		}
		if n < left || n == all {
			t.Errorf("%d %s were read, of %d and %d that went", n, what, left, all-left)
		}
	}
}

// audit opens the audit.
func (w *world) audit() *bus.Audit {
	w.t.Helper()
	a, err := w.open(bus.Options{Role: bus.RoleAudit}).Audit(w.t.Context())
	if err != nil {
		w.t.Fatal(err)
	}
	return a
}

// made is told each consumer that is made from now on, by stream and name.
func (w *world) made(js jetstream.JetStream) <-chan string {
	w.t.Helper()
	const subject = "$JS.EVENT.ADVISORY.CONSUMER.CREATED."
	made := make(chan string, 64)
	if _, err := js.Conn().Subscribe(subject+">", func(m *nats.Msg) { made <- strings.TrimPrefix(m.Subject, subject) }); err != nil {
		w.t.Fatal(err)
	}
	if err := js.Conn().Flush(); err != nil {
		w.t.Fatal(err)
	}
	return made
}

// What is stored is read in order and once, in bursts that are bounded, also when the
// reader's consumer goes again and again.
func TestBursts(t *testing.T) {
	w := start(t, embed.Options{})
	a := w.audit()
	edge := w.open(bus.Options{Role: bus.RoleEdge})
	js := w.js(bus.RoleAdmin)
	forget := func() (gone int) {
		s, err := js.Stream(t.Context(), "EVENTS")
		if err != nil {
			t.Fatal(err)
		}
		for name := range s.ConsumerNames(t.Context()).Name() {
			if err := s.DeleteConsumer(t.Context(), name); err != nil && !errors.Is(err, jetstream.ErrConsumerNotFound) {
				t.Fatal(err)
			}
			gone++
		}
		return gone
	}
	const all = 4000
	publish := func(n int, body string) {
		for range n {
			e := request("s1")
			e.Body = []byte(body)
			if _, err := edge.Publish(t.Context(), e); err != nil {
				t.Fatal(err)
			}
		}
	}
	large := `{"x":"` + strings.Repeat("x", 1<<20) + `"}`
	publish(1500, `{}`) // behind which it begins
	publish(20, large)
	var rest sync.WaitGroup
	defer rest.Wait()
	ctx, stop := context.WithTimeout(t.Context(), patience)
	defer stop()
	last, gone := uint64(0), 0
	for last < all && ctx.Err() == nil {
		for burst, err := range a.After(ctx, map[string]uint64{"EVENTS": last}) {
			if err != nil {
				t.Log(err) // it went before anything came; who reads begins again
				break
			}
			size := 0
			for _, m := range burst {
				if m.Stream != "EVENTS" {
					continue
				}
				if last++; m.Seq != last {
					t.Fatalf("sequence %d came where %d was due", m.Seq, last)
				}
				if m.Event.Data == nil {
					t.Fatalf("sequence %d was not read", m.Seq)
				}
				size += len(m.Body)
			}
			if len(burst) > 1000 || size > 8<<20 && len(burst) > 1 {
				t.Errorf("%d messages of %d bytes at once", len(burst), size)
			}
			if last == 1520 {
				rest.Go(func() { publish(all-1520, `{}`) })
			}
			if last >= all {
				break
			}
			if gone < 10 {
				gone += forget()
			}
		}
	}
	if last != all || gone < 2 {
		t.Errorf("%d of %d came, %d consumers went", last, all, gone)
	}
}

// A reader goes until its deadline, also one that is near.
func TestAfterUntilDeadline(t *testing.T) {
	w := start(t, embed.Options{})
	a := w.audit()
	ctx, stop := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer stop()
	for _, err := range a.After(ctx, nil) {
		t.Error(err)
	}
	if ctx.Err() == nil {
		t.Error("it ended early")
	}
}

// Nothing is left on the server of a reader that has ended.
func TestAfterLeavesNothing(t *testing.T) {
	w := start(t, embed.Options{})
	a := w.audit()
	js := w.js(bus.RoleAdmin)
	consumers := func() (n int) {
		for _, name := range []string{"EVENTS", "SYSTEM"} {
			s, err := js.Stream(t.Context(), name)
			if err != nil {
				t.Fatal(err)
			}
			n += s.CachedInfo().State.Consumers
		}
		return n
	}
	if _, err := w.open(bus.Options{Role: bus.RoleEdge}).Publish(t.Context(), request("s1")); err != nil {
		t.Fatal(err)
	}
	if _, err := w.system(bus.Options{Role: bus.RoleOperator}).Append(t.Context(), "approval", "a", []byte("grant")); err != nil {
		t.Fatal(err)
	}
	before, heard := consumers(), map[string]bool{}
	for burst, err := range a.After(t.Context(), nil) {
		if err != nil {
			t.Fatal(err)
		}
		if heard[burst[0].Stream] = true; len(heard) == 2 {
			break
		}
	}
	if n := consumers(); n != before {
		t.Errorf("%d consumers, %d before", n, before)
	}
}

// A reader that has nothing to read goes on when its consumer is gone.
func TestAfterAtRest(t *testing.T) {
	w := start(t, embed.Options{})
	a := w.audit()
	edge := w.open(bus.Options{Role: bus.RoleEdge})
	js := w.js(bus.RoleAdmin)
	var rest sync.WaitGroup
	defer rest.Wait()
	ctx, stop := context.WithTimeout(t.Context(), patience)
	defer stop()
	made := w.made(js)
	rest.Go(func() {
		for gone := 0; gone < 2; { // the second one behind one that read nothing
			var stream, name string
			select {
			case consumer := <-made:
				stream, name, _ = strings.Cut(consumer, ".")
			case <-ctx.Done():
				return
			}
			if stream != "EVENTS" {
				continue
			}
			if err := js.DeleteConsumer(ctx, stream, name); err != nil {
				t.Error(err)
			}
			gone++
		}
		if _, err := edge.Publish(ctx, request("s1")); err != nil {
			t.Error(err)
		}
	})
	for burst, err := range a.After(ctx, nil) {
		if err != nil {
			t.Fatal(err)
		}
		if burst[0].Stream == "EVENTS" {
			return
		}
	}
	t.Error("nothing came")
}
