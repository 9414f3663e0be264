package cli

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"slices"
	"time"

	"waybill.dev/workers/policy"
)

// approvalsCommand is `waybill approvals`.
func approvalsCommand(ctx context.Context, env Env, args []string) error {
	fs := flag.NewFlagSet("approvals", flag.ContinueOnError)
	find := clientFlags(fs)
	asJSON := fs.Bool("json", false, "print JSON, one approval per line")
	all := fs.Bool("all", false, "list those too that nobody waits for any more")
	uses := fs.Int("uses", 0, "grant `N` calls (default: those that wait, at least 1)")
	valid := fs.Duration("for", 10*time.Minute, "`TIME` that the word is good for")
	by := fs.String("by", "", "`NAME` of who says so (default: $USER); never the agent that asks")
	note := fs.String("note", "", "`TEXT` to keep with it")
	args, err := parse(env, fs, args)
	if err != nil {
		return err
	}
	said := ""
	switch {
	case len(args) == 0, len(args) == 1 && args[0] == "list":
	case len(args) == 2 && args[0] == "grant":
		said = policy.ApprovalGranted
	case len(args) == 2 && args[0] == "refuse":
		said = policy.ApprovalRefused
	case slices.Contains([]string{"grant", "refuse"}, args[0]):
		return usagef("%s takes one ID, as `waybill approvals` lists them", args[0])
	default:
		return usagef("unexpected argument %q", args[len(args)-1])
	}
	c, err := find(env)
	if err != nil {
		return err
	}
	if said == "" {
		q := url.Values{}
		if *all {
			q.Set("all", "1")
		}
		if *asJSON {
			return copyLines(ctx, c, env, "/api/v1/approvals", q)
		}
		n := 0
		for line, err := range lines[approvalLine](ctx, c, "/api/v1/approvals", q) {
			if err != nil {
				return err
			}
			if n++; n > 1 {
				_, _ = fmt.Fprintln(env.Stdout) // the writer is the caller's business
			}
			printApproval(env.Stdout, line)
		}
		if n == 0 {
			_, err = fmt.Fprintln(env.Stdout, "Nothing waits for an approval.")
		}
		return err
	}
	if *by == "" {
		*by = env.Getenv("USER")
	}
	if *by == "" {
		return usagef("--by: say who %s it", map[string]string{policy.ApprovalGranted: "grants", policy.ApprovalRefused: "refuses"}[said])
	}
	body, err := json.Marshal(map[string]any{"said": said, "by": *by, "uses": *uses, "note": *note, "for": valid.Seconds()})
	if err != nil {
		return err
	}
	answer, err := c.post(ctx, "/api/v1/approvals/"+url.PathEscape(args[1]), body)
	if err != nil {
		return err
	}
	if *asJSON {
		return env.printLine(bytes.TrimSpace(answer))
	}
	var line approvalLine
	if err := json.Unmarshal(answer, &line); err != nil || line.Word == nil {
		return fmt.Errorf("the gateway's answer: %w", errors.Join(err, errUnread))
	}
	what := fmt.Sprintf("%s %s %s on %s for %s", line.Agent, line.Method, visible(line.Name), visible(line.Server), valid)
	if said == policy.ApprovalGranted {
		_, err = fmt.Fprintf(env.Stdout, "Granted to %s, %d times: exactly these arguments.\n", what, line.Word.Uses)
	} else {
		_, err = fmt.Fprintf(env.Stdout, "Refused to %s.\n", what)
	}
	return err
}

var errUnread = errors.New("it cannot be read")

func printApproval(w io.Writer, l approvalLine) {
	_, _ = fmt.Fprintf(w, "%s  %s\n", l.ID, l.State)
	_, _ = fmt.Fprintf(w, "  agent    %s of %s\n", l.Agent, l.Tenant)
	_, _ = fmt.Fprintf(w, "  call     %s %s on %s", visible(l.Method), visible(l.Name), visible(l.Server))
	if l.Calls > 1 {
		_, _ = fmt.Fprintf(w, ", %d times", l.Calls)
	}
	_, _ = fmt.Fprintf(w, "\n  because  %s (rule %s)\n", visible(l.Reason), l.Rule)
	if len(l.Args) > 0 {
		_, _ = fmt.Fprintf(w, "  with     %s\n", escaped(l.Args))
	}
	_, _ = fmt.Fprintf(w, "  asked    %s; denied at %s if nobody grants it\n", l.Asked.Local().Format(time.DateTime), l.Expires.Local().Format(time.DateTime))
	if l.Word != nil {
		_, _ = fmt.Fprintf(w, "  last     %s by %s, good until %s %s\n", l.Word.Said, visible(l.Word.By), l.Word.Expires.Local().Format(time.DateTime), visible(l.Word.Note))
	}
}

// post sends a body to the admin API and returns the answer's.
func (c *client) post(ctx context.Context, path string, body []byte) ([]byte, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, c.base+path, bytes.NewReader(body))
	if err != nil {
		return nil, err
	}
	req.Header.Set("Authorization", "Bearer "+c.token)
	req.Header.Set("Content-Type", "application/json")
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		if outer := new(url.Error); errors.As(err, &outer) {
			err = outer.Err // the rest of it repeats the address
		}
		return nil, fmt.Errorf("no gateway answers at %s: %w; is `waybill up` running?", c.base, err)
	}
	defer func() { _ = resp.Body.Close() }()
	switch resp.StatusCode {
	case http.StatusOK:
		return io.ReadAll(io.LimitReader(resp.Body, 1<<20))
	case http.StatusBadRequest, http.StatusForbidden, http.StatusConflict:
		text, _ := io.ReadAll(io.LimitReader(resp.Body, 4096)) // what there is of it
		return nil, errors.New(visible(string(bytes.TrimSpace(text))))
	}
	return nil, c.refused(resp)
}
