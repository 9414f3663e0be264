package test

import (
	"encoding/json"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"waybill.dev/schemas"
	"waybill.dev/test/gateway"
	"waybill.dev/test/peers"
)

// dashboard is what a test reads of deploy/grafana/waybill.json.
type dashboard struct {
	Panels []struct {
		ID         int
		Type       string
		Title      string
		Datasource *source
		GridPos    struct{ X, Y, W, H int }
		Targets    []struct {
			Datasource source
			RawSQL     string `json:"rawSql"`
			Expr       string
		}
	}
	Templating struct {
		List []struct {
			Name, Type string
			Query      string
			Datasource *source
		}
	}
}

type source struct{ Type, UID string }

const (
	grafanaClickHouse = "grafana-clickhouse-datasource"
	grafanaPrometheus = "prometheus"
)

var (
	timeFilter   = regexp.MustCompile(`\$__timeFilter\(([\w.]+)\)`)
	timeInterval = regexp.MustCompile(`\$__timeInterval\(([\w.]+)\)`)
	metricName   = regexp.MustCompile(`\b(?:waybill|process|go)_\w+`)
)

// TestDashboard runs every query of the dashboard: those of ClickHouse against
// the record of a gateway that has made calls of all kinds, with Grafana's macros
// put in as its plugin does; those of Prometheus have metrics that are there.
func TestDashboard(t *testing.T) {
	b, err := os.ReadFile(filepath.Join(peers.Root(t), "deploy", "grafana", "waybill.json"))
	if err != nil {
		t.Fatal(err)
	}
	var d dashboard
	if err := json.Unmarshal(b, &d); err != nil {
		t.Fatal(err)
	}
	c := newCollector(t)
	g := traced(t, fmt.Sprintf("clickhouse: {embedded: true, launcher: %s}\ntraces: {endpoint: %q, headers: {X-Team: {env: TEAM}}}\n", peers.ClickHouse(t), c.http()),
		"TEAM=tools", "OTEL_BSP_SCHEDULE_DELAY=20")
	relayed, _ := tracedTool(t, g, "relay", "relay", `{"via":"header","server":"old","tool":"echo"}`, "")
	tracedTool(t, g, "relay", "echo", `{"text":"fail"}`, "")
	tracedTool(t, g, "relay", "secret", `{}`, "")
	tracedTool(t, g, "relay", "ghost", `{}`, "") // which the server does not have
	tracedTool(t, g, schemas.Gateway, "waybill__call_many", `{"tool":"echo","servers":["*"],"arguments":{"text":"a"}}`, "")
	if a, err := g.Post(t.Context(), "old", "tools/list", "", `{"jsonrpc":"2.0","id":1,"method":"tools/list","params":{`+gateway.Meta+`}}`); err != nil || a.Status != http.StatusOK {
		t.Fatal(err, a.Status)
	}

	// What was called back is under its parent in the call graph, across sessions.
	eventually(t, g, fmt.Sprintf("SELECT server, name, back.root = back.parent AS top, session = (SELECT session FROM edges WHERE call = '%s') AS same FROM edges AS back WHERE parent = '%[1]s' AND method = 'tools/call'", relayed),
		`{"server":"old","name":"echo","top":1,"same":0}`)
	up := relayed.Span(schemas.PartUpstream)
	eventually(t, g, fmt.Sprintf("SELECT count() AS n FROM calls WHERE parent_span_id = '%s' AND trace_id = '%s' AND method = 'tools/call' AND length(span_id) = 16", up, (schemas.Event{Call: relayed}).TraceID()), `{"n":1}`)

	session := requested(t, g, func(e schemas.Event, _ *schemas.Requested) bool { return e.Call == relayed })[0].Session
	now := time.Now()
	fill := func(sql string) string {
		sql = timeFilter.ReplaceAllString(sql, fmt.Sprintf("$1 >= toDateTime(%d) AND $1 <= toDateTime(%d)", now.Add(-6*time.Hour).Unix(), now.Add(time.Minute).Unix()))
		sql = timeInterval.ReplaceAllString(sql, "toStartOfInterval(toDateTime($1), INTERVAL 60 second)")
		return strings.NewReplacer("${tenant:singlequote}", "'acme','other'", "$hours", "24", "$session", string(session)).Replace(sql)
	}
	run := func(what, sql string) {
		t.Helper()
		if sql = fill(sql); strings.Contains(sql, "$") {
			t.Errorf("%s: a variable that the test does not know in %s", what, sql)
			return
		}
		out, errs, exit := g.CLI("query", "--json", sql)
		if exit != 0 || strings.TrimSpace(out) == "" {
			t.Errorf("%s: %s\n%s%s", what, sql, out, errs)
		}
	}
	// Rows can be asked for a moment before they are counted.
	metrics, tick := "", time.NewTicker(50*time.Millisecond)
	defer tick.Stop()
	for end := now.Add(time.Minute); !strings.Contains(metrics, "\nwaybill_record_rows_total{") && time.Now().Before(end); <-tick.C {
		metrics = get(t, g.Admin+"/metrics")
	}
	ids, taken := map[int]bool{}, map[[2]int]string{}
	queries, expressions := 0, 0
	for _, p := range d.Panels {
		if ids[p.ID] || p.ID == 0 || p.Title == "" {
			t.Errorf("panel %d %q: ids are not 0 and there once, and it has a title", p.ID, p.Title)
		}
		ids[p.ID] = true
		for x := p.GridPos.X; x < p.GridPos.X+p.GridPos.W; x++ {
			for y := p.GridPos.Y; y < p.GridPos.Y+p.GridPos.H; y++ {
				if other := taken[[2]int{x, y}]; other != "" {
					t.Fatalf("panels %q and %q lie upon each other", other, p.Title)
				}
				taken[[2]int{x, y}] = p.Title
			}
		}
		if p.Type == "row" {
			continue
		}
		if len(p.Targets) == 0 {
			t.Errorf("%s asks nothing", p.Title)
		}
		for _, q := range p.Targets {
			if p.Datasource == nil || q.Datasource != *p.Datasource {
				t.Errorf("%s: datasources %v and %v", p.Title, p.Datasource, q.Datasource)
			}
			switch q.Datasource {
			case source{grafanaClickHouse, "${clickhouse}"}:
				queries++
				run(p.Title, q.RawSQL)
			case source{grafanaPrometheus, "${prometheus}"}:
				expressions++
				names := metricName.FindAllString(q.Expr, -1)
				if len(names) == 0 {
					t.Errorf("%s: no metric in %s", p.Title, q.Expr)
				}
				for _, name := range names {
					if !strings.Contains(metrics, "\n"+name+"{") && !strings.Contains(metrics, "\n"+name+" ") {
						t.Errorf("%s: there is no metric %s", p.Title, name)
					}
				}
			default:
				t.Errorf("%s: datasource %v", p.Title, q.Datasource)
			}
		}
	}
	var variables []string
	for _, v := range d.Templating.List {
		variables = append(variables, v.Name)
		if v.Type == "query" {
			run("variable "+v.Name, v.Query)
		}
	}
	if want := []string{"clickhouse", "prometheus", "tenant", "hours", "session"}; !slices.Equal(variables, want) {
		t.Errorf("variables %v, want %v", variables, want)
	}
	if queries < 15 || expressions < 15 {
		t.Errorf("%d queries and %d expressions", queries, expressions)
	}
	if err := g.Stop(); err != nil {
		t.Error(err)
	}
}
