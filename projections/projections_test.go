package projections_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

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

func writer(s projections.Server, log string) *projections.Writer {
	return projections.NewWriter(projections.WriterOptions{
		Server: s, Now: time.Now, Identity: func(context.Context) (string, error) { return log, nil },
	})
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
func TestWriter(t *testing.T) {
	e := engine(t)
	all := made(40, day())
	w := writer(e, "one")
	take(t, w, all[:30])
	take(t, w, all[10:60]) // what came before, in a batch of another cut
	w.Close()
	w = writer(e, "one") // a process that starts anew
	take(t, w, all)
	take(t, writer(e, "two"), all[:4]) // another log, which counts from one again
	if s := w.Stats(); s.Rows["events_v1"] != 20 || s.Seq != 80 || s.Down != "" {
		t.Errorf("stats %+v", s)
	}

	for sql, want := range map[string]string{
		"SELECT log, count(), uniqExact(seq), max(seq) FROM events_v1 GROUP BY log ORDER BY log":                                                                 "one 80 80 80;two 4 4 4",
		"SELECT outcome, count() FROM calls_v1 WHERE log = 'one' GROUP BY outcome ORDER BY 1":                                                                    "completed 20;denied 10;failed 10",
		"SELECT total_us, policy_us, queue_us, upstream_us, request_bytes, answer_bytes, rule, status, trace_id FROM calls_v1 WHERE call = 'c1' AND log = 'one'": "1000 1000 1000 0 15 9 allow 200 0af7651916cd43dd8448eb211c80319c",
		"SELECT code, reason, rule, total_us FROM calls WHERE call IN ('c2', 'c3') ORDER BY call":                                                                " because no 1000;timeout slow allow 1000",
		"SELECT count(), countIf(parent != ''), countIf(root = call) FROM edges_v1 WHERE log = 'one'":                                                            "40 20 20",
		"SELECT root, caused, root_name FROM fan_out(hours=24) LIMIT 1":                                                                                          "c0 1 read",
		"SELECT depth, tools FROM longest_chains(hours=24) LIMIT 1":                                                                                              "2 [files read files read]",
		"SELECT agent, calls, caused, failed, denied, sessions FROM top_talkers(hours=24)":                                                                       "researcher 40 20 10 10 3",
		"SELECT hex(body) FROM events WHERE kind = 'completed' AND call = 'c0' LIMIT 1":                                                                          "7B2272223A22FF227D",
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

// Whoever asks can read the record, and nothing else.
func TestQueryIsReadOnly(t *testing.T) {
	e := engine(t)
	take(t, writer(e, "one"), made(2, day()))
	outside := filepath.Join(t.TempDir(), "out")
	for _, sql := range []string{
		"INSERT INTO events_v1 (seq) VALUES (1)", "ALTER TABLE events_v1 DELETE WHERE 1", "TRUNCATE TABLE events_v1", "DROP TABLE events_v1",
		"CREATE TABLE waybill.x (a Int8) ENGINE = Memory", "CREATE TEMPORARY TABLE x (a Int8)", "CREATE VIEW waybill.v AS SELECT 1",
		"OPTIMIZE TABLE events_v1", "KILL QUERY WHERE 1", "SYSTEM SHUTDOWN", "SYSTEM STOP LISTEN TCP", "GRANT ALL ON *.* TO reader",
		"SET readonly = 0", "SET max_threads = 1", "SELECT 1 SETTINGS readonly = 0", "SELECT count() FROM events SETTINGS max_execution_time = 0",
		"SELECT * FROM file('/etc/passwd', 'LineAsString')", "SELECT * FROM url('http://127.0.0.1:1/', 'LineAsString')",
		"SELECT * FROM remote('127.0.0.1:1', system.one)", "SELECT * FROM executable('ls', TSV, 'a String')", "SELECT * FROM s3('http://127.0.0.1:1/x', 'CSV')",
		"INSERT INTO FUNCTION file('" + outside + "') SELECT 1",
		"SELECT 1; DROP TABLE events_v1", "SELECT * FROM system.processes", "SELECT * FROM system.users", "SHOW CREATE USER default",
	} {
		if rows, err := query(t.Context(), e, sql); err == nil {
			t.Errorf("%s: carried out, %v", sql, rows)
		} else if !errors.Is(err, projections.ErrQuery) {
			t.Errorf("%s: %v", sql, err)
		}
	}
	ask(t, e, "SELECT 1 INTO OUTFILE '"+outside+"'") // of which the server says that it is the client's to do
	if _, err := os.Stat(outside); err == nil {
		t.Error("a query wrote a file")
	}
	if got := ask(t, e, "SELECT count() FROM events_v1"); !slices.Equal(got, []string{"4"}) {
		t.Errorf("%v events", got)
	}
	ask(t, e, "SHOW TABLES")
	ask(t, e, "DESCRIBE TABLE calls")
}
