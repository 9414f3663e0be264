package dispatch

import (
	"context"
	"fmt"
	"math"
	"slices"
	"strconv"
	"strings"
	"unicode"

	"waybill.dev/schemas/jsonrpc"
)

const findToolsDefinition = `"title":"Find tools","description":"Searches the tools of all servers that you may use, by what they are called, what they do and what arguments they take, and returns the best with their input schemas. Call what it finds by the name it gives.",` +
	`"inputSchema":{"type":"object","properties":{` +
	`"query":{"type":"string","description":"What the tool should do, in a few words.","minLength":1,"maxLength":1000},` +
	`"limit":{"type":"integer","description":"How many tools to return at most.","minimum":1,"maximum":50,"default":10}},` +
	`"required":["query"],"additionalProperties":false},` +
	`"outputSchema":{"type":"object","properties":{` +
	`"tools":{"type":"array","items":{"type":"object","properties":{"name":{"type":"string"},"server":{"type":"string"},"description":{"type":"string"},"inputSchema":{"type":"object"},"score":{"type":"number"},"cut":{"type":"boolean"}},"required":["name","server","score"]}},` +
	`"searched":{"type":"integer"},` +
	`"servers":{"type":"object","additionalProperties":{"type":"object","properties":{"error":{"type":"string"},"message":{"type":"string"}}}}},` +
	`"required":["tools","searched"]},` +
	`"annotations":{"readOnlyHint":true,"idempotentHint":true,"openWorldHint":false}`

const (
	maxQuery  = 1000 // bytes
	maxFound  = 50
	foundRoom = 1 << 20 // bytes of all that is found; beyond, schemas are left out
)

// findTools searches what the caller may use: exactly what the servers list
// for it, asked anew each time, so that no memory of ours can show what policy
// would not.
func (q *question) findTools(ctx context.Context, arguments jsonrpc.Value) (Answer, error) {
	query, limit := "", int64(10)
	for name, v := range arguments.Members() {
		ok := true
		switch name {
		case "query":
			query, ok = v.Text()
			ok = ok && len(query) <= maxQuery
		case "limit":
			limit, ok = v.Int()
			ok = ok && limit >= 1 && limit <= maxFound
		default:
			return q.misused("There is no argument %q; there are query and limit.", clip(name, 100)), nil
		}
		if !ok {
			return q.misused("The argument %s is wrong: query is a text of at most %d bytes, limit a number from 1 to %d.", name, maxQuery, maxFound), nil
		}
	}
	words := slices.Compact(slices.Sorted(slices.Values(tokens(query))))
	if len(words) == 0 {
		return q.misused("The argument query is missing, or has no words: say in a few what the tool should do."), nil
	}

	until := q.until(listTime)
	got := make([]listing, len(q.servers))
	each(len(got), listAtOnce, func(i int) {
		got[i] = q.read(ctx, q.servers[i], "tools/list", "", until, true, nil)
	})
	var all []*found
	var notes []noted
	for i := range got {
		seen := map[string]bool{}
		for j := range got[i].elements {
			e := &got[i].elements[j]
			alias := q.Alias(e.server, e.name)
			tool, err := jsonrpc.Parse(e.raw, jsonrpc.Limits{Bytes: len(e.raw), Depth: answerDepth, AllowCaseVariants: true})
			if err != nil || seen[alias] {
				continue // as in a list
			}
			seen[alias] = true
			all = append(all, &found{listed: e, alias: alias, tool: tool})
		}
		if t := got[i].note(); t != nil {
			notes = append(notes, noted{got[i].server, *t})
		}
	}
	best := rank(all, words)
	best = best[:min(len(best), int(limit))]

	text := fmt.Sprintf("%d of %d tools fit.", len(best), len(all))
	b := []byte(`{"tools":[`)
	for i, t := range best {
		if i > 0 {
			b = append(b, ',')
		}
		description := t.tool.Get("description")
		says, _ := description.Text()
		says, _, _ = strings.Cut(says, "\n")
		text += "\n" + t.alias + ": " + clip(says, 200)
		b = append(append(b, `{"name":`...), jsonrpc.Quote(t.alias)...)
		b = append(append(b, `,"server":`...), jsonrpc.Quote(t.server)...)
		cut := len(b)+len(description.Raw())+len(t.tool.Get("inputSchema").Raw()) > foundRoom
		if description.Kind() == jsonrpc.String && !cut {
			b = append(append(b, `,"description":`...), description.Raw()...)
		}
		if schema := t.tool.Get("inputSchema"); schema.Kind() == jsonrpc.Object && !cut {
			b = append(append(b, `,"inputSchema":`...), schema.Raw()...)
		}
		if cut {
			b = append(b, `,"cut":true`...)
		}
		b = strconv.AppendFloat(append(b, `,"score":`...), t.score, 'f', 4, 64)
		b = append(b, '}')
	}
	b = strconv.AppendInt(append(b, `],"searched":`...), int64(len(all)), 10)
	if len(notes) > 0 {
		_, servers, _ := strings.Cut(writeNotes(notes), ":")
		b = append(append(b, `,"servers":`...), servers...)
		text += fmt.Sprintf("\nNot all of it was searched: %d servers could not be asked.", len(notes))
	}
	return q.toolResult(text, append(b, '}'), false), nil
}

// found is a tool that is searched.
type found struct {
	*listed
	alias string
	tool  jsonrpc.Value
	terms map[string]float64 // how often a word is in it, by the weight of where it is
	size  float64            // of all its words
	score float64
}

// How much a word counts by where it stands: what a tool is called says more of
// it than what is written about one of its arguments.
const (
	inName        = 3
	inTitle       = 2
	inDescription = 1
	inParameter   = 1.5
	inMore        = 0.5
)

// rank orders the tools that have one of the words by how well they fit
// (BM25 over words weighted by their place), the best first; equal ones keep
// their order.
func rank(tools []*found, words []string) []*found {
	const k, b = 1.2, 0.75
	sum := 0.0
	for _, t := range tools {
		t.terms = map[string]float64{}
		t.count(t.name, inName)
		title, _ := t.tool.Get("title").Text()
		t.count(title, inTitle)
		description, _ := t.tool.Get("description").Text()
		t.count(description, inDescription)
		t.schema(t.tool.Get("inputSchema"), 8)
		sum += t.size
	}
	having := make([]float64, len(words)) // tools that have the word
	for _, t := range tools {
		for i, w := range words {
			if t.terms[w] > 0 {
				having[i]++
			}
		}
	}
	var fit []*found
	mean := sum / max(float64(len(tools)), 1)
	for _, t := range tools {
		for i, w := range words {
			if f := t.terms[w]; f > 0 {
				rare := math.Log(1 + (float64(len(tools))-having[i]+0.5)/(having[i]+0.5))
				t.score += rare * f * (k + 1) / (f + k*(1-b+b*t.size/mean))
			}
		}
		if t.score > 0 {
			fit = append(fit, t)
		}
	}
	slices.SortStableFunc(fit, func(a, b *found) int {
		switch {
		case a.score > b.score:
			return -1
		case a.score < b.score:
			return 1
		}
		return 0
	})
	return fit
}

func (t *found) count(text string, weight float64) {
	for _, w := range tokens(text) {
		t.terms[w] += weight
		t.size += weight
	}
}

// schema counts the names of arguments and what is said of them.
func (t *found) schema(v jsonrpc.Value, depth int) {
	if depth == 0 {
		return
	}
	for name, property := range v.Get("properties").Members() {
		t.count(name, inParameter)
		says, _ := property.Get("description").Text()
		t.count(says, inMore)
		for e := range property.Get("enum").Elements() {
			word, _ := e.Text()
			t.count(word, inMore)
		}
		t.schema(property, depth-1)
		t.schema(property.Get("items"), depth-1)
	}
}

// tokens are the words of a text, in lower case and without the s of a plural:
// readFile, read_file and "Reads files" have read and file.
func tokens(text string) []string {
	var words []string
	start, prev := -1, rune(0)
	end := func(at int) {
		if start >= 0 {
			w := strings.ToLower(text[start:at])
			if len(w) > 3 && strings.HasSuffix(w, "s") && !strings.HasSuffix(w, "ss") {
				w = w[:len(w)-1]
			}
			words = append(words, w)
		}
		start = -1
	}
	for i, r := range text {
		switch {
		case !unicode.IsLetter(r) && !unicode.IsDigit(r):
			end(i)
		case start >= 0 && unicode.IsUpper(r) && unicode.IsLower(prev):
			end(i)
			start = i
		case start < 0:
			start = i
		}
		prev = r
	}
	end(len(text))
	return words
}
