package projections

import "fmt"

// Question is something that people ask of the record, prepared as a view with
// parameters: SELECT * FROM top_talkers(hours=24).
type Question struct {
	Name    string
	Example string // how it is asked
	Help    string
	sql     string
}

// Questions are all of them, in the order in which they are shown. They count
// rows as they are: of the two endings that a call can have in a log older than
// its memory for IDs, the second counts until it is merged away. To leave it out
// (FINAL) would double what they cost.
func Questions() []Question {
	q := func(name, params, help, sql string) Question {
		return Question{Name: name, Example: "SELECT * FROM " + name + params, Help: help, sql: sql}
	}
	const lately = "stored > now() - toIntervalHour({hours:UInt32})"
	const causing = "SELECT parent FROM edges_v1 PREWHERE parent != '' AND parent != root WHERE " + lately // but for the first of a chain
	return []Question{
		q("top_talkers", "(hours=24)", "who calls most", `
SELECT tenant, agent, count() AS calls, countIf(parent != '') AS caused, countIf(outcome = 'failed') AS failed,
  countIf(outcome = 'denied') AS denied, uniq(session) AS sessions, sum(request_bytes) AS bytes_in, sum(answer_bytes) AS bytes_out
FROM calls_v1 WHERE `+lately+` GROUP BY tenant, agent ORDER BY calls DESC, tenant, agent`),
		q("error_rates", "(hours=24)", "which tools fail or are denied, and how often", `
SELECT server, method, name, count() AS calls, countIf(outcome = 'failed') AS failed, countIf(outcome = 'denied') AS denied,
  countIf(outcome = 'completed' AND error_code != 0) AS errors,
  round(countIf(outcome = 'failed' OR error_code != 0) / count(), 4) AS error_rate, round(countIf(outcome = 'denied') / count(), 4) AS denial_rate
FROM calls_v1 WHERE `+lately+` GROUP BY server, method, name ORDER BY failed + denied + errors DESC, calls DESC, server, method, name`),
		q("latency", "(hours=24)", "how long tools take, in milliseconds: in all, in the queue, at the server", `
WITH quantiles(0.5, 0.95, 0.99)(total_us) AS t
SELECT server, method, name, count() AS calls, round(t[1] / 1000, 2) AS p50, round(t[2] / 1000, 2) AS p95, round(t[3] / 1000, 2) AS p99,
  round(quantile(0.95)(policy_us) / 1000, 2) AS policy_p95, round(quantile(0.95)(queue_us) / 1000, 2) AS queue_p95,
  round(quantile(0.95)(upstream_us) / 1000, 2) AS upstream_p95
FROM calls_v1 PREWHERE outcome = 'completed' WHERE `+lately+` GROUP BY server, method, name ORDER BY p95 DESC, server, method, name`),
		q("who_used_what", "(hours=24)", "which agents called which tools", `
SELECT tenant, agent, server, method, name, count() AS calls, countIf(outcome = 'completed') AS completed, max(stored) AS latest
FROM calls_v1 WHERE `+lately+` GROUP BY tenant, agent, server, method, name ORDER BY calls DESC, tenant, agent, server, method, name`),
		q("fan_out", "(hours=24)", "which calls caused most others; the hundred first", `
WITH wide AS (SELECT root, count() AS n FROM edges_v1 PREWHERE parent != '' WHERE `+lately+` GROUP BY root ORDER BY n DESC, root LIMIT 100)
SELECT tenant, anyIf(session, call = root) AS session, root, anyIf(agent, call = root) AS agent, countIf(parent != '' AND `+lately+`) AS caused,
  uniqExactIf(server, parent != '' AND `+lately+`) AS servers, anyIf(server, call = root) AS root_server, anyIf(method, call = root) AS root_method,
  anyIf(name, call = root) AS root_name, minIf(stored, call = root) AS began
FROM edges_v1 WHERE root IN (SELECT root FROM wide) GROUP BY tenant, root ORDER BY caused DESC, root`),
		// Only calls in the middle, caused and causing, are followed: there are
		// few, and where there is none at all nothing is read for them. The first call of each chain and its last are looked up at the end.
		// (call || '' is no column of an index, which is slow for so many values.)
		// Where there are many of a length, some are shown. The setting spares their set
		// being made for the plan, and again for the answer.
		q("longest_chains", "(hours=24)", "calls that cause calls that cause calls: the hundred deepest, with the tools on the way", `
WITH RECURSIVE
  middle AS (SELECT tenant, root, parent, call, concat(server, ' ', if(name = '', method, name)) AS tool FROM edges_v1 PREWHERE parent != ''
    WHERE `+lately+` AND (SELECT count() FROM (`+causing+` LIMIT 1)) > 0 AND (call || '') IN (`+causing+`)),
  chain AS (
    SELECT tenant, root, call, toUInt32(3) AS depth, [tool] AS tools FROM middle WHERE parent = root
    UNION ALL
    SELECT e.tenant, e.root, e.call, c.depth + 1, arrayPushBack(c.tools, e.tool) FROM middle AS e JOIN chain AS c ON e.parent = c.call WHERE c.depth < 32),
  deepest AS (
    SELECT tenant, root, max(n) AS depth, argMax(way, n) AS tools, argMax(at, n) AS last FROM (
      SELECT tenant, root, chain.depth AS n, chain.tools AS way, chain.call AS at FROM chain
      UNION ALL
      SELECT tenant, root, toUInt32(2) AS n, emptyArrayString() AS way, root AS at FROM edges_v1 PREWHERE parent != '' WHERE parent = root AND `+lately+` LIMIT 1 BY root LIMIT 100)
    GROUP BY tenant, root ORDER BY depth DESC, root LIMIT 100)
SELECT f.tenant AS tenant, f.session AS session, f.root AS root, f.agent AS agent, f.depth AS depth,
  arrayPushBack(arrayPushFront(f.tools, f.tool), concat(l.server, ' ', if(l.name = '', l.method, l.name))) AS tools
FROM edges_v1 AS l ANY RIGHT JOIN (
  SELECT d.tenant AS tenant, e.session AS session, d.root AS root, e.agent AS agent, d.depth AS depth, d.tools AS tools, d.last AS last,
    concat(e.server, ' ', if(e.name = '', e.method, e.name)) AS tool
  FROM edges_v1 AS e ANY RIGHT JOIN deepest AS d ON e.call = d.root) AS f ON l.parent = f.last
ORDER BY depth DESC, root SETTINGS use_index_for_in_with_subqueries = 0`),
		q("unused_tools", "(hours=24)", "tools that a server has listed and nobody has called", `
SELECT server, tool FROM (
  SELECT server, arrayJoin(JSONExtractArrayRaw(argMax(body, seq), 'result', 'tools')) AS definition, JSONExtractString(definition, 'name') AS tool
  FROM events_v1 WHERE kind = 'completed' AND method = 'tools/list' AND error_code = 0 GROUP BY server, parent != '')
WHERE (server, tool) NOT IN (SELECT server, name FROM calls_v1 WHERE method = 'tools/call' AND `+lately+`)
GROUP BY server, tool ORDER BY server, tool`),
		q("slowest_sessions", "(hours=24)", "where agents wait longest, in milliseconds; the hundred first", `
WITH slow AS (SELECT session, sumIf(total_us, parent = '') AS us FROM calls_v1 WHERE `+lately+` GROUP BY session ORDER BY us DESC, session LIMIT 100)
SELECT tenant, session, any(agent) AS agent, count() AS calls, round(sum(total_us) / 1000, 1) AS waited, round(quantile(0.95)(total_us) / 1000, 1) AS p95,
  round(max(total_us) / 1000, 1) AS slowest, argMax(concat(server, ' ', if(name = '', method, name)), total_us) AS slowest_tool
FROM calls_v1 PREWHERE session IN (SELECT session FROM slow) WHERE `+lately+` AND parent = '' GROUP BY tenant, session ORDER BY waited DESC, session`),
		q("history", "(session='SESSION')", "the calls of one session, each with who caused it", `
SELECT e.stored AS began, e.call AS call, e.parent AS parent, e.agent AS agent, e.server AS server, e.method AS method, e.name AS name,
  if(c.call = '', 'open', c.outcome) AS outcome, c.code AS code, round(c.total_us / 1000, 2) AS ms
FROM (SELECT * FROM edges_v1 WHERE session = {session:String} ORDER BY log, seq LIMIT 1 BY call) AS e
LEFT JOIN (SELECT * FROM calls_v1 WHERE session = {session:String} ORDER BY log, seq LIMIT 1 BY call) AS c ON c.call = e.call ORDER BY e.seq`),
	}
}

func (q Question) view() string {
	return fmt.Sprintf("CREATE OR REPLACE VIEW %s AS %s", q.Name, q.sql)
}

// sessionsView puts the beginnings and ends of sessions together. The first
// beginning counts; an edge that starts anew repeats it.
const sessionsView = `CREATE OR REPLACE VIEW sessions AS
SELECT tenant, session, argMinIf(agent, seq, kind = 'opened') AS agent, argMinIf(protocol, seq, kind = 'opened') AS protocol,
  argMinIf(name, seq, kind = 'opened') AS name, argMinIf(client, seq, kind = 'opened') AS client, argMinIf(server, seq, kind = 'opened') AS server,
  argMinIf(revision, seq, kind = 'opened') AS revision, minIf(stored, kind = 'opened') AS opened_at,
  minOrNullIf(stored, kind = 'closed') AS closed_at, argMinIf(reason, seq, kind = 'closed') AS reason
FROM sessions_v1 GROUP BY tenant, session`

// schema are the statements that make the tables and views of an empty database,
// in which they are said.
func schema() []string {
	var all []string
	for _, t := range Tables() {
		all = append(all, t.ddl(), t.view())
	}
	all = append(all, sessionsView)
	for _, q := range Questions() {
		all = append(all, q.view())
	}
	return all
}
