package cli

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"iter"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	// The lines are as many as the events, and this reads them at half the cost.
	jsonv2 "github.com/go-json-experiment/json"

	"golang.org/x/mod/sumdb/note"

	"waybill.dev/projections/audit"
)

// auditVerify is `waybill audit verify`.
func auditVerify(ctx context.Context, env Env, args []string) error {
	fs := flag.NewFlagSet("audit verify", flag.ContinueOnError)
	connect := clientFlags(fs)
	check := audit.Check{Decode: decodeEntry, Header: headerOf}
	var against, keys []string
	fs.Func("against", "`FILE` with checkpoints of earlier, as `waybill audit checkpoint` printed them; may be repeated", func(s string) error {
		against = append(against, s)
		return nil
	})
	fs.Func("key", "public `KEY`, or a file of some, that is trusted; may be repeated (default: "+auditPubFile+" in the data directory)", func(s string) error {
		keys = append(keys, s)
		return nil
	})
	fs.Func("witness", "public `KEY` of a witness, or a file of some, that is trusted and must have signed; may be repeated (default: those in the configuration, which need not)", func(s string) (err error) {
		check.Witnesses, err = addWitnesses(check.Witnesses, s)
		return err
	})
	save := fs.String("save", "", "keep what was verified in `FILE`, which can be verified again without the gateway")
	asJSON := fs.Bool("json", false, "print the report as JSON")
	rest, err := parse(env, fs, args)
	switch {
	case err != nil:
		return err
	case len(rest) > 1:
		return usagef("unexpected argument %q", rest[1])
	case len(rest) == 1 && *save != "":
		return usagef("--save is for what the gateway says, not for %s", rest[0])
	}
	for _, file := range against {
		texts, err := checkpointsIn(file)
		if err != nil {
			return err
		}
		check.Against = append(check.Against, texts...)
	}
	for _, k := range keys {
		if _, err := audit.Known([]string{k}); err == nil {
			check.Keys = append(check.Keys, k)
			continue
		}
		some, err := publicKeys(k)
		if err == nil && len(some) == 0 {
			err = fmt.Errorf("%s: there is no key in it", k)
		}
		if err != nil {
			return fmt.Errorf("--key: %w", err)
		}
		check.Keys = append(check.Keys, some...)
	}
	lines, known, witnesses, err := auditSource(ctx, env, connect, rest, *save)
	if err != nil {
		return err
	}
	own := false
	if len(check.Keys) == 0 {
		check.Keys = known
	}
	named := check.Witnesses
	if len(named) == 0 {
		check.Witnesses = witnesses
	}
	if len(check.Keys) == 0 {
		own = true
		if lines, check.Keys, err = keysWithin(lines); err != nil {
			return err
		}
	}
	report, err := audit.Verify(ctx, lines, check)
	if err != nil {
		return err
	}
	if *asJSON {
		if err := env.printJSON(report); err != nil {
			return err
		}
	} else if err := printReport(env, report, own, check.Witnesses); err != nil {
		return err
	}
	if !report.OK() {
		return fmt.Errorf("the record is not as it was signed: %s", visible(report.Problems[0].String()))
	}
	// Who makes a record could leave out what witnesses have signed.
	for _, w := range named {
		if !slices.ContainsFunc(report.Witnessed, func(c audit.Cosignature) bool { return c.Witness == w.Name() }) {
			return fmt.Errorf("the witness %s has signed nothing in this record", visible(w.Name()))
		}
	}
	return nil
}

// auditSource is what is verified, and the public keys that lie beside the
// configuration, and of the witnesses in it.
func auditSource(ctx context.Context, env Env, connect func(Env) (*client, error), file []string, save string) (iter.Seq2[audit.Line, error], []string, []note.Verifier, error) {
	if len(file) == 1 {
		f, err := os.Open(file[0])
		if err != nil {
			return nil, nil, nil, err
		}
		return func(yield func(audit.Line, error) bool) {
			defer func() { _ = f.Close() }() // it is only read
			for l, err := range savedLines(f) {
				if !yield(l, err) || err != nil {
					return
				}
			}
		}, nil, nil, nil
	}
	c, err := connect(env)
	if err != nil {
		return nil, nil, nil, err
	}
	known, err := publicKeys(filepath.Join(c.data, auditPubFile))
	if err != nil {
		return nil, nil, nil, err
	}
	var witnesses []note.Verifier
	for _, w := range c.witnesses {
		if witnesses, err = addWitnesses(witnesses, w.Key); err != nil {
			return nil, nil, nil, err
		}
	}
	return func(yield func(audit.Line, error) bool) {
		var out *bufio.Writer
		if save != "" {
			f, err := os.OpenFile(save, os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o600)
			if err != nil {
				yield(audit.Line{}, err)
				return
			}
			out = bufio.NewWriter(f)
			defer func() {
				if err := errors.Join(out.Flush(), f.Close()); err != nil {
					_, _ = fmt.Fprintf(env.Stderr, "waybill audit verify: %s is not whole: %v\n", save, err)
				}
			}()
		}
		for text, err := range rawLines(ctx, c, "/api/v1/audit/lines", nil) {
			var l audit.Line
			if err == nil {
				err = jsonv2.Unmarshal(text, &l)
			}
			if err == nil && out != nil {
				_, err = out.Write(text)
			}
			if !yield(l, err) || err != nil {
				return
			}
		}
	}, known, witnesses, nil
}

func savedLines(r io.Reader) iter.Seq2[audit.Line, error] {
	return func(yield func(audit.Line, error) bool) {
		in := bufio.NewReaderSize(r, 256<<10)
		for n := 1; ; n++ {
			text, err := in.ReadBytes('\n')
			if err == io.EOF && len(bytes.TrimSpace(text)) == 0 {
				return
			}
			var l audit.Line
			if err == nil || err == io.EOF {
				if err = jsonv2.Unmarshal(text, &l); err != nil {
					err = fmt.Errorf("line %d: %w", n, err)
				}
			}
			if !yield(l, err) || err != nil {
				return
			}
		}
	}
}

// keysWithin takes the keys from the lines themselves.
func keysWithin(all iter.Seq2[audit.Line, error]) (iter.Seq2[audit.Line, error], []string, error) {
	next, stop := iter.Pull2(all)
	first, err, ok := next()
	if err == nil && (!ok || first.Log == nil) {
		err = audit.ErrLines
	}
	if err != nil {
		stop()
		return nil, nil, err
	}
	return func(yield func(audit.Line, error) bool) {
		defer stop()
		for l, err, ok := first, error(nil), true; ok; l, err, ok = next() {
			if !yield(l, err) {
				return
			}
		}
	}, first.Log.Keys, nil
}

// checkpointsIn reads a file of checkpoints, one behind the other.
func checkpointsIn(file string) ([]string, error) {
	b, err := os.ReadFile(file)
	if err != nil {
		return nil, fmt.Errorf("--against: %w", err)
	}
	// Three lines, an empty one, and signatures up to the next empty line.
	var all []string
	parts := strings.Split(strings.TrimSpace(string(b)), "\n\n")
	for i := 0; i+1 < len(parts); i += 2 {
		all = append(all, strings.TrimLeft(parts[i], "\n")+"\n\n"+parts[i+1]+"\n")
	}
	if len(parts)%2 != 0 || len(all) == 0 {
		return nil, fmt.Errorf("--against: %s holds no whole checkpoint", file)
	}
	return all, nil
}

func printReport(env Env, r audit.Report, own bool, witnesses []note.Verifier) error {
	p := &printer{w: env.Stdout, color: env.Color}
	p.line("log           %s", visible(r.Origin))
	p.line("checkpoints   %d, signed and each of a tree that grew from the one before; the newest of %d leaves", r.Checkpoints, r.Signed)
	printWitnessed(p, r, witnesses)
	p.line("messages      %d as they were signed", r.Messages)
	if r.Rows > 0 {
		p.line("rows          %d as they were signed, in all tables", r.Rows)
	}
	for _, n := range []struct {
		n    uint64
		text string
	}{
		{r.Bodiless, "of the rows without their bodies, whose time is over"},
		{r.Twice, "rows are there again, all the same, until ClickHouse merges them"},
		{r.Older, "rows of events that the log has lost, and has given their numbers again: no leaf is of them"},
		{r.Unled, "rows whose leaves the feed or the log does not have any more: nothing to hold them against"},
		{r.Before, "of the events are older than the first row"},
		{r.Others, "rows are of other logs, and not verified"},
		{r.Erased, "body erased, as an erasure in the log says"},
		{r.Aged, "older than what the log keeps; their leaves are in the tree"},
		{r.Unsigned, "too new to be signed"},
		{r.Unfed, "of the first leaves are not in the feed any more: of these only the hashes were verified"},
		{r.Gaps, "were not in the log any more when the tree reached them"},
	} {
		if n.n > 0 {
			p.line("              %d %s", n.n, n.text)
		}
	}
	if own {
		p.line("              the keys are the record's own word: name the one that you know with --key")
	}
	for _, problem := range r.Problems {
		p.line("%s %s", p.paint(red, "✗"), visible(problem.String()))
	}
	if r.More > 0 {
		p.line("%s and %d more", p.paint(red, "✗"), r.More)
	}
	if r.OK() {
		p.line("verified      nothing was changed, dropped or reordered")
	}
	return p.err
}

// auditProve is `waybill audit prove`.
func auditProve(ctx context.Context, env Env, args []string) error {
	fs := flag.NewFlagSet("audit prove", flag.ContinueOnError)
	connect := clientFlags(fs)
	out := fs.String("out", "", "write the proof to `FILE`")
	rest, err := parse(env, fs, args)
	switch {
	case err != nil:
		return err
	case len(rest) != 1:
		return usagef("name one event by its sequence, as `waybill audit tail` shows it, or as SYSTEM/SEQUENCE")
	}
	stream, seq, ok := place(rest[0])
	if !ok {
		return usagef("%q is not the sequence of an event, as `waybill audit tail` shows it, nor SYSTEM/SEQUENCE", rest[0])
	}
	c, err := connect(env)
	if err != nil {
		return err
	}
	var p audit.Proof
	if err := c.ask(ctx, http.MethodGet, "/api/v1/audit/proof", url.Values{"event": {rest[0]}}, &p); err != nil {
		return err
	}
	trusted, err := publicKeys(filepath.Join(c.data, auditPubFile))
	if err != nil {
		return err
	}
	if len(trusted) == 0 {
		trusted = p.Keys
	}
	if err := p.Check(trusted); err != nil {
		return err
	}
	// A proof of another event would hold as well.
	if l, err := audit.ReadRecord([]byte(p.Record)); err != nil || !l.Of(stream, seq) {
		return fmt.Errorf("the gateway's proof is not of %s %d: %w", stream, seq, errors.Join(audit.ErrProof, err))
	}
	text, err := marshal(p)
	if err != nil {
		return err
	}
	if *out != "" {
		return os.WriteFile(*out, append(text, '\n'), 0o600)
	}
	return env.printLine(text)
}

// place reads where a message is: the sequence of an event, or SYSTEM/SEQUENCE.
func place(text string) (stream string, seq uint64, ok bool) {
	stream = audit.Events
	if s, rest, ok := strings.Cut(text, "/"); ok {
		stream, text = s, rest
	}
	seq, err := strconv.ParseUint(text, 10, 64)
	return stream, seq, err == nil && seq > 0 && (stream == audit.Events || stream == audit.System)
}

// marshal writes JSON without escapes that HTML would need.
func marshal(v any) ([]byte, error) {
	var b bytes.Buffer
	out := json.NewEncoder(&b)
	out.SetEscapeHTML(false)
	err := out.Encode(v)
	return bytes.TrimSuffix(b.Bytes(), []byte("\n")), err
}

// auditCheckpoint is `waybill audit checkpoint`.
func auditCheckpoint(ctx context.Context, env Env, args []string) error {
	fs := flag.NewFlagSet("audit checkpoint", flag.ContinueOnError)
	connect := clientFlags(fs)
	asJSON := fs.Bool("json", false, "print it with the public keys, and how far the tree is, as JSON")
	cosigned := fs.Bool("witnessed", false, "print the newest that witnesses have signed too (audit.witnesses)")
	if err := none(parse(env, fs, args)); err != nil {
		return err
	}
	c, err := connect(env)
	if err != nil {
		return err
	}
	var s auditState
	if err := c.ask(ctx, http.MethodGet, "/api/v1/audit/checkpoint", nil, &s); err != nil {
		return err
	}
	if *asJSON {
		return env.printJSON(s)
	}
	text := s.Checkpoint
	if *cosigned {
		text = s.Cosigned
	}
	switch {
	case s.Checkpoint == "":
		return errors.New("nothing is signed yet")
	case text == "":
		return errors.New("no witness has signed yet; audit.witnesses says who is asked, and the gateway's log why not")
	}
	_, err = fmt.Fprint(env.Stdout, text)
	return err
}

// erase is `waybill erase`.
func erase(ctx context.Context, env Env, args []string) error {
	fs := flag.NewFlagSet("erase", flag.ContinueOnError)
	connect := clientFlags(fs)
	reason := fs.String("reason", "", "`TEXT` that stays in the record, and so must not repeat what is erased")
	asJSON := fs.Bool("json", false, "print one JSON object")
	rest, err := parse(env, fs, args)
	switch {
	case err != nil:
		return err
	case len(rest) != 1:
		return usagef("name one session; `waybill sessions` lists them")
	}
	c, err := connect(env)
	if err != nil {
		return err
	}
	var done erasure
	q := url.Values{}
	if *reason != "" {
		q.Set("reason", *reason)
	}
	if err := c.ask(ctx, http.MethodPost, "/api/v1/sessions/"+url.PathEscape(rest[0])+"/erase", q, &done); err != nil {
		return err
	}
	if *asJSON {
		return env.printJSON(done)
	}
	_, err = fmt.Fprintf(env.Stdout, "erased %d events of session %s of tenant %s; event %d says so, leaf %d of the audit's tree\n",
		done.Events, done.Session, done.Tenant, done.Seq, done.Leaf)
	return err
}

// ask asks for one JSON object.
func (c *client) ask(ctx context.Context, method, path string, query url.Values, v any) error {
	req, err := http.NewRequestWithContext(ctx, method, c.base+path+"?"+query.Encode(), nil)
	if err != nil {
		return err
	}
	req.Header.Set("Authorization", "Bearer "+c.token)
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		if outer := new(url.Error); errors.As(err, &outer) {
			err = outer.Err // the rest of it repeats the address
		}
		return fmt.Errorf("no gateway answers at %s: %w; is `waybill up` running?", c.base, cmp.Or(ctx.Err(), err))
	}
	defer func() { _ = resp.Body.Close() }()
	if resp.StatusCode == http.StatusConflict {
		text, _ := io.ReadAll(io.LimitReader(resp.Body, 4096)) // what there is of it
		return errors.New(visible(strings.TrimSpace(string(text))))
	}
	if resp.StatusCode != http.StatusOK {
		return c.refused(resp)
	}
	if err := json.NewDecoder(resp.Body).Decode(v); err != nil {
		return fmt.Errorf("the gateway's answer: %w", err)
	}
	return nil
}
