package projections_test

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/ClickHouse/clickhouse-go/v2"

	"waybill.dev/projections"
	"waybill.dev/schemas"
	"waybill.dev/test/peers"
)

const patience = time.Minute

// engine runs a ClickHouse of the test's own.
func engine(t testing.TB) *projections.Engine {
	e := projections.NewEngine(projections.EngineOptions{Launcher: peers.ClickHouse(t), Dir: filepath.Join(t.TempDir(), "clickhouse"),
		Log: slog.New(slog.NewTextHandler(t.Output(), nil)),
	})
	ctx, cancel := context.WithCancel(context.WithoutCancel(t.Context()))
	var running sync.WaitGroup
	running.Go(func() {
		if err := e.Run(ctx); err != nil {
			t.Error(err)
		}
	})
	t.Cleanup(func() { cancel(); running.Wait() })
	return e
}

// dsn is the engine as a server that somebody else runs, by one of its ports.
func dsn(t testing.TB, e *projections.Engine, scheme string) projections.DSN {
	t.Helper()
	o, err := e.Options(t.Context(), false)
	if err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(e.URLFile())
	if err != nil {
		t.Fatal(err)
	}
	u, err := url.Parse(strings.TrimSpace(string(b)))
	if err != nil {
		t.Fatal(err)
	}
	u.Path = ""
	if u.Scheme = scheme; scheme != "http" {
		u.Host = o.Addr[0]
	}
	d := projections.DSN{Read: u.String()}
	u.User = url.UserPassword(o.Auth.Username, o.Auth.Password)
	d.Write = u.String()
	return d
}

// onServers runs a test on every kind of server: the engine inside, the same by
// either of its ports as if it were somebody else's, and the server of
// WAYBILL_TEST_CLICKHOUSE_DSN if that is set, in a database of the test's own.
func onServers(t *testing.T, test func(*testing.T, projections.Server)) {
	for _, scheme := range []string{"inside", "clickhouse", "http"} {
		t.Run(scheme, func(t *testing.T) {
			e := engine(t)
			if scheme == "inside" {
				test(t, e)
				return
			}
			test(t, dsn(t, e, scheme))
		})
	}
	if given := os.Getenv("WAYBILL_TEST_CLICKHOUSE_DSN"); given != "" {
		t.Run("given", func(t *testing.T) {
			u, err := url.Parse(given)
			if err != nil {
				t.Fatal("WAYBILL_TEST_CLICKHOUSE_DSN:", err)
			}
			o, err := clickhouse.ParseDSN(given)
			if err != nil {
				t.Fatal("WAYBILL_TEST_CLICKHOUSE_DSN:", err)
			}
			u.Path = "/waybill_test_" + strings.ToLower(rand.Text())
			t.Cleanup(func() {
				o.Auth.Database = ""
				conn, err := clickhouse.Open(o)
				if err == nil {
					err = errors.Join(conn.Exec(context.WithoutCancel(t.Context()), "DROP DATABASE IF EXISTS "+u.Path[1:]), conn.Close())
				}
				if err != nil {
					t.Error(err)
				}
			})
			test(t, projections.DSN{Write: u.String()})
		})
	}
}

// log is a log in memory.
type log struct {
	name   string
	events map[uint64]schemas.Event
	last   uint64
}

func logOf(name string, events []schemas.Event) *log {
	l := &log{name: name, events: map[uint64]schemas.Event{}}
	for _, e := range events {
		l.events[e.Seq], l.last = e, max(l.last, e.Seq)
	}
	return l
}

func (l *log) Identity(context.Context) (string, error) { return l.name, nil }
func (l *log) Last(context.Context) (uint64, error)     { return l.last, nil }
func (l *log) Load(_ context.Context, seq uint64) (schemas.Event, error) {
	e, ok := l.events[seq]
	if !ok {
		return e, schemas.ErrNotFound
	}
	return e, nil
}

func writer(t testing.TB, s projections.Server, l *log) *projections.Writer {
	return projections.NewWriter(projections.WriterOptions{Server: s, Of: l, Now: time.Now, Log: slog.New(slog.NewTextHandler(t.Output(), nil))})
}

// ask returns an answer's rows, each as text.
func ask(t testing.TB, s projections.Server, sql string) []string {
	t.Helper()
	rows, err := query(t.Context(), s, sql)
	if err != nil {
		t.Fatalf("%s: %v", sql, err)
	}
	return rows
}

func query(ctx context.Context, s projections.Server, sql string) (rows []string, err error) {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	err = projections.Query(ctx, s, sql, projections.Answer{
		Columns: func([]projections.ResultColumn) error { return nil },
		Row:     func(v []any) error { rows = append(rows, strings.TrimSuffix(fmt.Sprintln(v...), "\n")); return nil },
	})
	return rows, err
}

// day is when the made events happened; recent enough for the questions.
func day() time.Time { return time.Now().UTC().Truncate(time.Hour) }

// made is a call's events: a top call, and one that it caused.
func made(n int, base time.Time) []schemas.Event {
	var all []schemas.Event
	seq := uint64(0)
	add := func(e schemas.Event) {
		seq++
		e.Seq, e.Stored, e.Time = seq, base.Add(time.Duration(seq)*time.Millisecond), base
		all = append(all, e)
	}
	for i := range n {
		e := schemas.Event{
			Tenant: "acme", Agent: "researcher", Session: schemas.SessionKey(fmt.Sprintf("s%d", i%3)),
			Call: schemas.CallID(fmt.Sprintf("c%d", i)), Trace: "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
		}
		e.Root = e.Call
		if i%2 == 1 {
			e.Session = schemas.SessionKey(fmt.Sprintf("s%d", (i-1)%3))
			e.Parent = schemas.CallID(fmt.Sprintf("c%d", i-1))
			e.Root = e.Parent
		}
		target := schemas.Target{Protocol: "mcp", Server: "files", Method: "tools/call", Name: "read"}
		add(e.Next(&schemas.Requested{Target: target}, []byte(`{"name":"read"}`)))
		s := schemas.Summary{Target: target, Permit: "allow", RequestSize: 15, RequestedAt: base.Add(time.Duration(seq) * time.Millisecond)}
		switch i % 4 {
		case 0, 1:
			s.AuthorizedAt, s.UpstreamAt, s.Attempts = s.RequestedAt.Add(time.Millisecond), s.RequestedAt.Add(2*time.Millisecond), 1
			add(e.Next(&schemas.Completed{Summary: s, Status: 200}, []byte("{\"r\":\"\xff\"}")))
		case 2:
			s.Permit = ""
			add(e.Next(&schemas.Denied{Summary: s, Decision: schemas.Decision{N: 1, Rule: "no", Reason: "because"}}, nil))
		case 3:
			add(e.Next(&schemas.Failed{Summary: s, Code: schemas.FailTimeout, Detail: "slow"}, nil))
		}
	}
	return all
}

// Progress and rows are told one at a time, also of a query with much of both.
func TestProgress(t *testing.T) {
	e := engine(t)
	rows, told, seen := 0, 0, 0 // of no lock: the race detector looks
	if err := projections.Query(t.Context(), e, "SELECT number, toString(number) FROM numbers(3000000)", projections.Answer{
		Columns:  func([]projections.ResultColumn) error { return nil },
		Row:      func([]any) error { rows++; seen = told; return nil },
		Progress: func(projections.Progress) { told++ },
	}); err != nil {
		t.Fatal(err)
	}
	if rows != 3000000 || told == 0 || seen > told {
		t.Errorf("%d rows, told %d times", rows, told)
	}
}

// A chain of five calls, one of which has a second branch, is found whole.
func TestLongestChains(t *testing.T) {
	e := engine(t)
	var all []schemas.Event
	for i, parent := range []int{-1, 0, 1, 2, 3, 1, -1, 6, -1} {
		ev := schemas.Event{
			Tenant: "acme", Agent: "researcher", Session: schemas.SessionKey(fmt.Sprint("s", i)), Call: schemas.CallID(fmt.Sprint("c", i)),
			Seq: uint64(i + 1), Stored: day().Add(time.Duration(i)),
		}
		switch ev.Root = "c0"; {
		case parent >= 0:
			ev.Parent = schemas.CallID(fmt.Sprint("c", parent))
			if parent == 6 {
				ev.Root = "c6"
			}
		default:
			ev.Root = ev.Call
		}
		ev.Data = &schemas.Requested{Target: schemas.Target{Protocol: "mcp", Server: "s", Method: "tools/call", Name: fmt.Sprint("t", i)}}
		all = append(all, ev)
	}
	take(t, writer(t, e, logOf("one", all)), all)
	got := ask(t, e, "SELECT root, session, depth, tools FROM longest_chains(hours=24)")
	if want := []string{"c0 s0 5 [s t0 s t1 s t2 s t3 s t4]", "c6 s6 2 [s t6 s t7]"}; !slices.Equal(got, want) {
		t.Errorf("%q, want %q", got, want)
	}
	if got := ask(t, e, "SELECT root, caused FROM fan_out(hours=24)"); !slices.Equal(got, []string{"c0 5", "c6 1"}) {
		t.Errorf("%q", got)
	}
}

func take(t testing.TB, w *projections.Writer, events []schemas.Event) {
	t.Helper()
	for n := 0; ; n++ {
		err := w.Take(t.Context(), events[0].Seq, events[len(events)-1].Seq, events)
		if err == nil {
			return
		}
		if n == 5 || t.Context().Err() != nil {
			t.Fatal(err)
		}
	}
}

// What is written is what happened, once, however often it comes; and it comes
// back as it was.
func TestWriter(t *testing.T) { onServers(t, written) }

func written(t *testing.T, e projections.Server) {
	all := made(40, day())
	w := writer(t, e, logOf("one", all))
	take(t, w, all[:30])
	take(t, w, all[10:60]) // what came before, in a batch of another cut
	w.Close()
	w = writer(t, e, logOf("one", all)) // a process that starts anew
	take(t, w, all)
	take(t, writer(t, e, logOf("two", all[:4])), all[:4]) // another log, which counts from one again
	if s := w.Stats(); s.Rows["events_v1"] != 20 || s.Seq != 80 || s.Down != "" {
		t.Errorf("stats %+v", s)
	}

	for sql, want := range map[string]string{
		"SELECT log, count(), uniqExact(seq), max(seq) FROM events_v1 GROUP BY log ORDER BY log":                                                                                                  "one 80 80 80;two 4 4 4",
		"SELECT outcome, count() FROM calls_v1 WHERE log = 'one' GROUP BY outcome ORDER BY 1":                                                                                                     "completed 20;denied 10;failed 10",
		"SELECT total_us, policy_us, queue_us, upstream_us, request_bytes, answer_bytes, rule, status, trace_id, parent_span_id, length(span_id) FROM calls_v1 WHERE call = 'c1' AND log = 'one'": "1000 1000 1000 0 15 9 allow 200 0af7651916cd43dd8448eb211c80319c b7ad6b7169203331 16",
		"SELECT code, reason, rule, total_us FROM calls WHERE call IN ('c2', 'c3') ORDER BY call":                                                                                                 " because no 1000;timeout slow allow 1000",
		"SELECT count(), countIf(parent != ''), countIf(root = call) FROM edges_v1 WHERE log = 'one'":                                                                                             "40 20 20",
		"SELECT root, caused, root_name FROM fan_out(hours=24) LIMIT 1":                                                                                                                           "c0 2 read",
		"SELECT depth, tools FROM longest_chains(hours=24) LIMIT 1":                                                                                                                               "2 [files read files read]",
		"SELECT agent, calls, caused, failed, denied, sessions FROM top_talkers(hours=24)":                                                                                                        "researcher 42 21 10 10 3",
		"SELECT hex(body) FROM events WHERE kind = 'completed' AND call = 'c0' LIMIT 1":                                                                                                           "7B2272223A22FF227D",
	} {
		if got := strings.Join(ask(t, e, sql), ";"); got != want {
			t.Errorf("%s:\n%s\nwant\n%s", sql, got, want)
		}
	}
	for _, q := range projections.Questions() {
		ask(t, e, q.Example)
	}

	var got, want []string
	for e, err := range projections.Session(t.Context(), e, "s1") {
		if err != nil {
			t.Fatal(err)
		}
		text, _ := e.MarshalJSON()
		got = append(got, string(text))
	}
	for _, e := range all {
		if e.Session == "s1" {
			text, _ := e.MarshalJSON()
			want = append(want, string(text))
		}
	}
	if !slices.Equal(got, want) {
		t.Errorf("replayed\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
}

// A log that has lost its end twice, and whose clock was set back meanwhile: what it has
// now is found behind what it had, and the next event goes on there.
func TestLostEndTwice(t *testing.T) {
	e := engine(t)
	all := made(10, day())
	again := func(from int, back time.Duration) []schemas.Event { // what came in the place of the last ones
		var now []schemas.Event
		for _, ev := range made(10, day().Add(-back)) {
			if ev.Seq >= uint64(from) {
				ev.Call += schemas.CallID(fmt.Sprint("x", from))
				now = append(now, ev)
			}
		}
		return now
	}
	take(t, writer(t, e, logOf("one", all)), all)
	for i, tt := range []struct {
		from int
		back time.Duration
	}{{15, 0}, {13, 3 * time.Hour}, {19, time.Hour}} {
		now := append(slices.Clone(all[:tt.from-1]), again(tt.from, tt.back)...)
		w := writer(t, e, logOf("one", now))
		take(t, w, now[:tt.from])
		w.Close()
		w = writer(t, e, logOf("one", now)) // and it starts anew in the middle
		take(t, w, now)
		all = now
		latest := ask(t, e, "SELECT count(), uniqExact(seq), min(seq), max(seq) FROM events_v1 WHERE log = (SELECT max(log) FROM events_v1)")
		if want := fmt.Sprintf("%d %d %d 20", 21-tt.from, 21-tt.from, tt.from); !slices.Equal(latest, []string{want}) {
			t.Errorf("the log's end, lost for the %d. time: %v, want %s", i+1, latest, want)
		}
		r, err := projections.OpenRows(t.Context(), e, "one")
		if err != nil {
			t.Fatal(err)
		}
		n := 0
		for row, err := range r.All {
			if err != nil {
				t.Fatal(err)
			}
			n++
			if want := now[row.Seq-1]; row.Event.ID() != want.ID() || len(row.Wrong) > 0 {
				t.Errorf("%d is %s, the log has %s; %v", row.Seq, row.Event.ID(), want.ID(), row.Wrong)
			}
		}
		if n != 20 {
			t.Errorf("%d rows", n)
		}
	}
}

// Whoever asks can read the record, and nothing else.
func TestQueryIsReadOnly(t *testing.T) {
	onServers(t, func(t *testing.T, s projections.Server) {
		readOnly(t, s)
		if d, ok := s.(projections.DSN); ok && d.Read != "" {
			d.Read = "" // the one who may write, with a setting
			readOnly(t, d)
		}
	})
}

func readOnly(t *testing.T, s projections.Server) {
	all := made(2, day())
	take(t, writer(t, s, logOf("one", all)), all)
	for _, sql := range refused(t) {
		if rows, err := query(t.Context(), s, sql); err == nil {
			t.Errorf("%s: carried out, %v", sql, rows)
		} else if !errors.Is(err, projections.ErrQuery) {
			t.Errorf("%s: %v", sql, err)
		}
	}
	if _, err := query(t.Context(), s, "SELECT * FROM latency"); err == nil || !strings.Contains(err.Error(), "SELECT * FROM latency(hours=24)") {
		t.Errorf("a prepared question without its parameters: %v", err)
	}
	outside := filepath.Join(t.TempDir(), "out")
	_, _ = query(t.Context(), s, "SELECT 1 INTO OUTFILE '"+outside+"'") // of which one port says that it is the client's to do
	if _, err := os.Stat(outside); err == nil {
		t.Error("a query wrote a file")
	}
	if got := ask(t, s, "SELECT count() FROM events_v1"); !slices.Equal(got, []string{"4"}) {
		t.Errorf("%v events", got)
	}
	for _, sql := range []string{
		"SHOW TABLES", "DESCRIBE TABLE calls", "EXPLAIN SELECT 1", "(SELECT 1)", " -- of course\n/* (DROP */ ((select 1))", "WITH 1 AS x SELECT x", "FROM calls SELECT count()",
		"SELECT 'DROP TABLE events_v1; INSERT'", "SELECT count() FROM calls WHERE reason = '\\' OR 1 = 1 --'",
	} {
		ask(t, s, sql)
	}
}

// refused are statements that nobody may carry out who can only read.
func refused(t testing.TB) []string {
	secret := filepath.Join(t.TempDir(), "secret")
	if err := os.WriteFile(secret, []byte("secret"), 0o600); err != nil {
		t.Fatal(err)
	}
	return []string{
		"INSERT INTO events_v1 (seq) VALUES (1)", "ALTER TABLE events_v1 DELETE WHERE 1", "TRUNCATE TABLE events_v1", "DROP TABLE events_v1",
		"CREATE TABLE x (a Int8) ENGINE = Memory", "CREATE TEMPORARY TABLE x (a Int8)", "CREATE VIEW v AS SELECT 1", "DELETE FROM events_v1 WHERE 1",
		"OPTIMIZE TABLE events_v1", "KILL QUERY WHERE 1", "SYSTEM SHUTDOWN", "SYSTEM STOP LISTEN TCP", "GRANT ALL ON *.* TO reader", "DROP DATABASE waybill",
		"RENAME TABLE events_v1 TO x", "DETACH TABLE events_v1", "EXCHANGE TABLES events_v1 AND calls_v1", "BACKUP TABLE events_v1 TO File('x')",
		"SET readonly = 0", "SET max_threads = 1", "SELECT 1 SETTINGS readonly = 0", "SELECT 1 SETTINGS max_threads = 1", "SELECT 1 SETTINGS allow_ddl = 0",
		"SELECT * FROM file('/etc/passwd', 'LineAsString')", "SELECT file('/etc/passwd')", "SELECT file('/proc/1/environ')", "SELECT file('/proc/self/root/etc/passwd')", "SELECT file('/dev/ptmx')",
		"SELECT file('" + secret + "')", "SELECT * FROM url('http://127.0.0.1:1/', 'LineAsString')",
		"SELECT * FROM remote('127.0.0.1:1', system.one)", "SELECT * FROM executable('ls', TSV, 'a String')", "SELECT * FROM s3('http://127.0.0.1:1/x', 'CSV')",
		"SELECT * FROM mysql('127.0.0.1:1', 'a', 'b', 'c', 'd')", "SELECT * FROM input('a String')", "SELECT * FROM fileCluster('x', '/etc/passwd', 'LineAsString')",
		"INSERT INTO FUNCTION file('" + filepath.Join(t.TempDir(), "out") + "') SELECT 1",
		"SELECT 1; DROP TABLE events_v1", "/* */ DROP TABLE events_v1", "-- SELECT\nDROP TABLE events_v1", "SHOW CREATE USER default",
		"WITH x AS (SELECT 1) INSERT INTO events_v1 (seq) SELECT 1", "EXPLAIN SELECT * FROM url('http://127.0.0.1:1/', 'LineAsString')",
	}
}

// The same holds for whoever has the password of the reader, and for whoever has
// none.
func TestReaderOverHTTP(t *testing.T) {
	e := engine(t)
	all := made(2, day())
	take(t, writer(t, e, logOf("one", all)), all)
	b, err := os.ReadFile(e.URLFile())
	if err != nil {
		t.Fatal(err)
	}
	if info, err := os.Stat(e.URLFile()); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("the file with the password: %v %v", info.Mode(), err)
	}
	reader := strings.TrimSpace(string(b))
	u, err := url.Parse(reader)
	if err != nil {
		t.Fatal(err)
	}
	client := &http.Client{Timeout: patience}
	post := func(to, sql string) (int, string) {
		t.Helper()
		resp, err := client.Post(to, "text/plain", strings.NewReader(sql))
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = resp.Body.Close() }()
		text, err := io.ReadAll(resp.Body)
		if err != nil {
			t.Fatal(err)
		}
		return resp.StatusCode, strings.TrimSpace(string(text))
	}
	own := filepath.Dir(e.URLFile())
	for _, sql := range append(refused(t), "SELECT * FROM system.processes", "SELECT * FROM system.users",
		"SELECT file('"+own+"/gateway.password')", "SELECT file('"+own+"/reader.url')", "SELECT file('"+own+"/none/../gateway.password')") {
		if status, text := post(reader, sql); status == http.StatusOK && text != "" {
			t.Errorf("%s: carried out, %s", sql, text)
		}
	}
	// Nobody waits at what the engine's process has open, its pipes among them.
	for fd := range 64 {
		begun := time.Now()
		post(reader, fmt.Sprintf("SELECT length(file('/proc/self/fd/%d'))", fd))
		if took := time.Since(begun); took > patience/2 {
			t.Fatalf("descriptor %d: answered after %s", fd, took)
		}
	}
	u.RawQuery = "readonly=0"
	if status, text := post(u.String(), "SELECT 1"); status == http.StatusOK {
		t.Errorf("a setting in the address: %s", text)
	}
	if status, text := post(reader, "SELECT count() FROM events_v1"); status != http.StatusOK || text != "4" {
		t.Errorf("%d %s", status, text)
	}
	u.RawQuery, u.User = "", nil // the engine's own user
	for _, sql := range append(refused(t), "SELECT count() FROM waybill.events_v1", "SELECT * FROM system.tables", "SYSTEM START LISTEN HTTP", "SYSTEM STOP LISTEN HTTP") {
		if status, text := post(u.String(), sql); status == http.StatusOK {
			t.Errorf("%s: carried out for nobody, %s", sql, text)
		}
	}
	for _, user := range []string{"reader", "gateway"} {
		u.User = url.UserPassword(user, "wrong")
		if status, text := post(u.String(), "SELECT 1"); status == http.StatusOK {
			t.Errorf("%s with a wrong password: %s", user, text)
		}
	}
	if status, text := post(reader, "SELECT count() FROM events_v1"); status != http.StatusOK || text != "4" {
		t.Errorf("after all that: %d %s", status, text)
	}
}
