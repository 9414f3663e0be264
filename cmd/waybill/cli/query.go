package cli

import (
	"context"
	"encoding/csv"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"math"
	"net/http"
	"net/url"
	"reflect"
	"strings"
	"text/tabwriter"
	"time"
	"unicode/utf8"

	"waybill.dev/projections"
)

// answerLine is a line of what the query API answers: the columns first, then
// rows, with progress in between; at last done or an error.
type answerLine struct {
	Columns  []projections.ResultColumn `json:"columns,omitempty"`
	Row      []any                      `json:"row,omitempty"`
	Progress *projections.Progress      `json:"progress,omitempty"`
	Done     bool                       `json:"done,omitempty"`
	Error    string                     `json:"error,omitempty"`
}

// maxSQL is how long a question may be.
const maxSQL = 12 << 10

// query asks the record, as the user who can only read.
func (a *admin) query(w http.ResponseWriter, r *http.Request) {
	sql := r.URL.Query().Get("sql")
	switch {
	case a.g.server == nil:
		http.Error(w, noRecord, http.StatusNotFound)
		return
	case strings.TrimSpace(sql) == "", len(sql) > maxSQL:
		http.Error(w, fmt.Sprintf("sql: needs 1 to %d characters", maxSQL), http.StatusBadRequest)
		return
	}
	if a.g.record != nil { // of a server that has never been written to
		waiting, cancel := context.WithTimeout(r.Context(), 10*time.Second)
		a.g.record.Prepared(waiting)
		cancel()
	}
	out := json.NewEncoder(w)
	rc := http.NewResponseController(w)
	begun := false
	begin := func() {
		if !begun {
			begun = true
			w.Header().Set("Content-Type", "application/x-ndjson")
		}
	}
	last := time.Now()
	err := projections.Query(r.Context(), a.g.server, sql, projections.Answer{
		Columns: func(c []projections.ResultColumn) error { begin(); return out.Encode(answerLine{Columns: c}) },
		Row: func(values []any) error {
			row := make([]any, len(values))
			for i, v := range values {
				row[i] = plain(reflect.ValueOf(v))
			}
			return out.Encode(answerLine{Row: row})
		},
		Progress: func(p projections.Progress) {
			if time.Since(last) > 500*time.Millisecond {
				last = time.Now()
				begin()
				_ = out.Encode(answerLine{Progress: &p}) // who left is found out by the rows
				_ = rc.Flush()
			}
		},
	})
	switch {
	case err == nil:
		begin()
		_ = out.Encode(answerLine{Done: true}) // without it the answer is not whole
	case begun:
		_ = out.Encode(answerLine{Error: err.Error()})
	case errors.Is(err, projections.ErrQuery):
		http.Error(w, err.Error(), http.StatusBadRequest)
	default:
		a.fail(w, err)
	}
}

// query is `waybill query`.
func query(ctx context.Context, env Env, args []string) error {
	fs := flag.NewFlagSet("query", flag.ContinueOnError)
	connect := clientFlags(fs)
	list := fs.Bool("list", false, "list the tables and the prepared questions")
	asJSON := fs.Bool("json", false, "print one JSON object per line")
	asCSV := fs.Bool("csv", false, "print CSV, the names of the columns first")
	rest, err := parse(env, fs, args)
	switch {
	case err != nil:
		return err
	case *list && len(rest) == 0:
		return listQuestions(env, *asJSON)
	case len(rest) != 1 || *list:
		return usagef("one question, in quotes: waybill query 'SELECT * FROM top_talkers(hours=24)'; `waybill query --list` lists what is prepared")
	case *asJSON && *asCSV:
		return usagef("--json and --csv exclude each other")
	}
	c, err := connect(env)
	if err != nil {
		return err
	}
	var p table = &tablePrinter{env: env}
	if *asJSON {
		p = &jsonPrinter{env: env}
	} else if *asCSV {
		p = &csvPrinter{w: csv.NewWriter(env.Stdout)}
	}
	done, shown := false, false
	for line, err := range lines[rawAnswer](ctx, c, "/api/v1/query", url.Values{"sql": {rest[0]}}) {
		switch {
		case err != nil:
			return errors.Join(p.end(), err)
		case line.Error != "":
			return errors.Join(p.end(), errors.New(visible(line.Error)))
		case line.Done:
			done = true
		case line.Columns != nil:
			err = p.columns(line.Columns)
		case line.Row != nil:
			err = p.row(line.Row)
		case line.Progress != nil && env.Terminal:
			shown = true
			_, _ = fmt.Fprintf(env.Stderr, "\r%d rows read", line.Progress.Rows)
		}
		if err != nil {
			return err
		}
	}
	if shown {
		_, _ = fmt.Fprint(env.Stderr, "\r\x1b[K")
	}
	if err := p.end(); err != nil {
		return err
	}
	if !done {
		return errors.New("the gateway's answer broke off")
	}
	return nil
}

// rawAnswer is an answerLine as it is read: numbers stay as they are written.
type rawAnswer struct {
	Columns  []projections.ResultColumn
	Row      []json.RawMessage
	Progress *projections.Progress
	Done     bool
	Error    string
}

// listQuestions shows what can be asked.
func listQuestions(env Env, asJSON bool) error {
	t := tabwriter.NewWriter(env.Stdout, 0, 0, 2, ' ', 0)
	line := func(kind, name, example, help string) error {
		if asJSON {
			return env.printJSON(map[string]string{"kind": kind, "name": name, "example": example, "help": help})
		}
		_, err := fmt.Fprintf(t, "  %s\t%s\n", example, help)
		return err
	}
	var errs []error
	say := func(text string) {
		if !asJSON {
			_, err := fmt.Fprintln(t, text)
			errs = append(errs, err)
		}
	}
	say("Prepared questions:")
	for _, q := range projections.Questions() {
		errs = append(errs, line("question", q.Name, q.Example, q.Help))
	}
	say("\nTables:")
	for _, v := range projections.Tables() {
		errs = append(errs, line("table", v.View, "SELECT * FROM "+v.View, v.Help))
	}
	errs = append(errs, line("table", "sessions", "SELECT * FROM sessions", "every session, from its beginning to its end"))
	return errors.Join(append(errs, t.Flush())...)
}

// table prints an answer.
type table interface {
	columns([]projections.ResultColumn) error
	row([]json.RawMessage) error
	end() error
}

// jsonPrinter prints an object for each row, its members in the order of the columns.
type jsonPrinter struct {
	env   Env
	names [][]byte
}

func (p *jsonPrinter) columns(c []projections.ResultColumn) error {
	for _, c := range c {
		name, err := json.Marshal(c.Name)
		if err != nil {
			return err
		}
		p.names = append(p.names, name)
	}
	return nil
}

func (p *jsonPrinter) row(values []json.RawMessage) error {
	line := []byte{'{'}
	for i, v := range values[:min(len(values), len(p.names))] {
		if i > 0 {
			line = append(line, ',')
		}
		line = append(append(append(line, p.names[i]...), ':'), v...)
	}
	return p.env.printLine(append(line, '}'))
}

func (*jsonPrinter) end() error { return nil }

type csvPrinter struct{ w *csv.Writer }

func (p *csvPrinter) columns(c []projections.ResultColumn) error {
	var names []string
	for _, c := range c {
		names = append(names, c.Name)
	}
	return p.w.Write(names)
}

func (p *csvPrinter) row(values []json.RawMessage) error {
	var cells []string
	for _, v := range values {
		cells = append(cells, cell(v))
	}
	return p.w.Write(cells)
}

func (p *csvPrinter) end() error { p.w.Flush(); return p.w.Error() }

// tablePrinter aligns the columns of up to a thousand rows at a time, so that
// an answer of any length can be printed.
type tablePrinter struct {
	env  Env
	t    *tabwriter.Writer
	rows int
}

const (
	pageRows = 1000
	cellMax  = 120 // characters of a value; --json and --csv show all of it
)

func (p *tablePrinter) columns(c []projections.ResultColumn) error {
	p.t = tabwriter.NewWriter(p.env.Stdout, 0, 0, 2, ' ', 0)
	var names []string
	for _, c := range c {
		names = append(names, visible(c.Name))
	}
	_, err := fmt.Fprintln(p.t, strings.Join(names, "\t"))
	return err
}

func (p *tablePrinter) row(values []json.RawMessage) error {
	var cells []string
	for _, v := range values {
		text := []rune(visible(cell(v)))
		if len(text) > cellMax {
			text = append(text[:cellMax-1], '…')
		}
		cells = append(cells, string(text))
	}
	if _, err := fmt.Fprintln(p.t, strings.Join(cells, "\t")); err != nil {
		return err
	}
	if p.rows++; p.rows%pageRows == 0 {
		return p.t.Flush()
	}
	return nil
}

func (p *tablePrinter) end() error {
	if p.t == nil {
		return nil
	}
	if _, err := fmt.Fprintf(p.t, "(%s)\n", count(p.rows, "row")); err != nil {
		return err
	}
	return p.t.Flush()
}

// cell is a value as text: a string without its quotes, nothing for null, JSON
// for the rest.
func cell(v json.RawMessage) string {
	var s *string
	if err := json.Unmarshal(v, &s); err == nil {
		if s == nil {
			return ""
		}
		return *s
	}
	return string(v)
}

// plain makes of a value what JSON has a form for.
func plain(v reflect.Value) any {
	if !v.IsValid() {
		return nil
	}
	switch x := v.Interface().(type) {
	case time.Time:
		return x.UTC().Format("2006-01-02 15:04:05.999999999")
	case interface{ Any() any }: // Variant, Dynamic
		return plain(reflect.ValueOf(x.Any()))
	case string:
		return text(x)
	case fmt.Stringer: // UUID, decimal, address
		if v.Kind() != reflect.Pointer || !v.IsNil() {
			return x.String()
		}
		return nil
	}
	switch v.Kind() {
	case reflect.Pointer, reflect.Interface:
		if v.IsNil() {
			return nil
		}
		return plain(v.Elem())
	case reflect.Float32, reflect.Float64:
		if f := v.Float(); math.IsNaN(f) || math.IsInf(f, 0) {
			return fmt.Sprint(f)
		}
	case reflect.Struct:
		at := reflect.New(v.Type())
		at.Elem().Set(v)
		if of, ok := at.Interface().(interface{ NestedMap() map[string]any }); ok { // JSON
			return plain(reflect.ValueOf(of.NestedMap()))
		}
	case reflect.Slice, reflect.Array: // also of bytes: a text is a string
		list := make([]any, v.Len())
		for i := range list {
			list[i] = plain(v.Index(i))
		}
		return list
	case reflect.Map:
		object := map[string]any{}
		for _, k := range v.MapKeys() {
			object[fmt.Sprint(plain(k))] = plain(v.MapIndex(k))
		}
		return object
	}
	return v.Interface()
}

// text is a string as it is, or, where it is none (a digest, a picture), in
// hexadecimal.
func text(s string) string {
	if utf8.ValidString(s) {
		return s
	}
	return fmt.Sprintf("0x%x", s)
}
