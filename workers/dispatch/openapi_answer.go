package dispatch

import (
	"bytes"
	"cmp"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io"
	"mime"
	"net/http"
	"net/url"
	"regexp"
	"slices"
	"strings"
	"unicode/utf8"

	"github.com/santhosh-tekuri/jsonschema/v6"

	"waybill.dev/schemas/jsonrpc"
)

const (
	// maxBlob is the most of an answer's bytes that are shown as bytes.
	maxBlob = 1 << 20

	// maxProblem bounds what is repeated of the body of an error.
	maxProblem = 16 << 10
)

// answer makes a tool's result of what the API said. Statuses that are errors
// are the tool's, for the model to read; only a wish to be left alone for a
// while is not an answer, as for every upstream.
func (a *restAPI) answer(resp *http.Response, t *restTool, m mcpAnswer, arguments jsonrpc.Value) (Answer, error) {
	if refused := refusal(resp); refused != nil && refused.After > 0 {
		return Answer{}, refused
	}
	if e := strings.ToLower(resp.Header.Get("Content-Encoding")); e != "" && e != "identity" {
		return Answer{}, faultf(Garbled, "HTTP %d in the encoding %q, which was not asked for", resp.StatusCode, e)
	}
	body, err := readAnswer(resp, a.opt.MaxAnswer)
	if err != nil {
		return Answer{}, err
	}
	resp.Body.Close()
	result := a.toolResult(resp, body, t, m, arguments)
	answer, err := m.result(result)
	if err == nil && int64(len(answer.Body)) > a.opt.MaxAnswer && result["structuredContent"] != nil {
		// The text repeats it, for clients that do not read the other.
		result["content"] = []any{textContent(fmt.Sprintf("%s; the answer is in structuredContent.", statusLine(resp)))}
		answer, err = m.result(result)
	}
	if err != nil {
		return Answer{}, err
	}
	if int64(len(answer.Body)) > a.opt.MaxAnswer {
		return Answer{}, faultf(TooLarge, "HTTP %d with %d bytes, which make a result of %d", resp.StatusCode, len(body), len(answer.Body))
	}
	answer.Local = false
	return answer, nil
}

// readAnswer reads a body to its end, or as far as it may go.
func readAnswer(resp *http.Response, most int64) ([]byte, error) {
	if resp.ContentLength > most {
		return nil, faultf(TooLarge, "HTTP %d with %d bytes", resp.StatusCode, resp.ContentLength)
	}
	var buf bytes.Buffer
	switch n, err := buf.ReadFrom(io.LimitReader(resp.Body, most+1)); {
	case err != nil:
		return nil, faultf(Broken, "reading the answer: %w", err)
	case n > most:
		return nil, faultf(TooLarge, "HTTP %d with more than %d bytes", resp.StatusCode, most)
	}
	return buf.Bytes(), nil
}

func statusLine(resp *http.Response) string {
	return strings.TrimSpace(fmt.Sprintf("HTTP %d %s", resp.StatusCode, http.StatusText(resp.StatusCode)))
}

// toolResult is the result as MCP has it.
func (a *restAPI) toolResult(resp *http.Response, body []byte, t *restTool, m mcpAnswer, arguments jsonrpc.Value) map[string]any {
	kind, params, err := mime.ParseMediaType(resp.Header.Get("Content-Type"))
	if err != nil {
		kind = ""
	}
	if resp.StatusCode >= 300 {
		return map[string]any{"isError": true, "content": []any{textContent(a.secrets.Replace(problem(resp, kind, params["charset"], []byte(a.secrets.Replace(string(body))), t)))}}
	}
	result := map[string]any{}
	content := []any{}
	switch isJSON := jsonMedia(kind) || kind == "" && looksJSON(body); {
	case len(body) == 0:
		text := statusLine(resp) + ", without a body."
		for _, name := range []string{"Location", "Content-Location", "Content-Type", "Content-Length", "Last-Modified", "ETag"} {
			if v := resp.Header.Get(name); v != "" && (t.method == http.MethodHead || strings.HasSuffix(name, "Location")) {
				text += "\n" + name + ": " + clip(v, maxWords)
			}
		}
		content = append(content, textContent(a.secrets.Replace(text)))
		if t.output != nil && m.structured() {
			// A client holds a result to the output schema, unless it is an error.
			result["isError"] = true
			content = append(content, textContent("The API did what was asked, but says it without the JSON that its description promises."))
		}
	case isJSON:
		a.jsonResult(resp, body, t, m, result, &content)
	case strings.HasPrefix(kind, "image/") && kind != "image/svg+xml" && len(body) <= maxBlob:
		content = append(content, map[string]any{"type": "image", "mimeType": kind, "data": base64.StdEncoding.EncodeToString(body)})
	case strings.HasPrefix(kind, "audio/") && len(body) <= maxBlob:
		content = append(content, map[string]any{"type": "audio", "mimeType": kind, "data": base64.StdEncoding.EncodeToString(body)})
	case textual(kind, body):
		content = append(content, textContent(a.secrets.Replace(decodeText(body, params["charset"]))))
	case len(body) <= maxBlob:
		content = append(content, map[string]any{"type": "resource", "resource": map[string]any{
			"uri": "urn:waybill:answer", "mimeType": cmp.Or(kind, "application/octet-stream"), "blob": base64.StdEncoding.EncodeToString(body),
		}})
	default:
		content = append(content, textContent(fmt.Sprintf("%s: %d bytes of %s, which are too many to show.", statusLine(resp), len(body), cmp.Or(kind, "an unknown type"))))
	}
	if t.output != nil && result["structuredContent"] == nil && result["isError"] == nil && m.structured() {
		result["isError"] = true
		content = append(content, textContent(fmt.Sprintf("The API did what was asked (%s), but its answer is not the JSON that its description promises.", statusLine(resp))))
	}
	if next := nextPage(resp, t, arguments); next != "" {
		content = append(content, textContent(a.secrets.Replace(next)))
	}
	result["content"] = content
	return result
}

// jsonResult gives JSON as text, and an object as structured content too.
// Where the description promises a form that the answer does not have, it is
// given as text and marked: a client that holds it to the promise would show
// nothing at all.
func (a *restAPI) jsonResult(resp *http.Response, body []byte, t *restTool, m mcpAnswer, result map[string]any, content *[]any) {
	text := a.secrets.Replace(decodeText(body, ""))
	// As strict as an answer of any other upstream, and two levels less deep,
	// since it is put into one.
	v, err := jsonrpc.Parse([]byte(text), jsonrpc.Limits{Bytes: len(text), Depth: answerDepth - 4, AllowCaseVariants: true})
	*content = append(*content, textContent(text))
	if err != nil || v.Kind() != jsonrpc.Object || !m.structured() {
		return
	}
	if t.output != nil {
		decoded, err := jsonschema.UnmarshalJSON(strings.NewReader(text))
		var bad []string
		if err != nil {
			bad = []string{err.Error()}
		} else {
			bad = violations(t.output, decoded)
		}
		if len(bad) > 0 {
			note := "The API did what was asked (" + statusLine(resp) + "), but its answer, above, is not what its description promises:"
			for _, b := range bad {
				note += "\n- " + strings.Replace(b, "arguments", "answer", 1)
			}
			*content = append(*content, textContent(note))
			result["isError"] = true
			return
		}
	}
	result["structuredContent"] = json.RawMessage(v.Raw())
}

func looksJSON(body []byte) bool {
	b := bytes.TrimSpace(body)
	return len(b) > 0 && (b[0] == '{' || b[0] == '[')
}

// textual tells whether bytes are to be read.
func textual(kind string, body []byte) bool {
	switch {
	case strings.HasPrefix(kind, "text/"), strings.HasSuffix(kind, "+xml"), strings.HasSuffix(kind, "+yaml"), kind == "application/xml",
		kind == "application/yaml", kind == "application/javascript", kind == "application/x-ndjson", kind == "application/x-www-form-urlencoded":
		return true
	case kind == "":
		return utf8.Valid(body) && !bytes.ContainsRune(body, 0)
	}
	return false
}

// decodeText makes UTF-8 of a body.
func decodeText(body []byte, charset string) string {
	body = bytes.TrimPrefix(body, []byte("\ufeff"))
	if c := strings.ToLower(charset); c == "iso-8859-1" || c == "latin1" {
		runes := make([]rune, len(body))
		for i, b := range body {
			runes[i] = rune(b)
		}
		return string(runes)
	}
	return strings.ToValidUTF8(string(body), "\uFFFD")
}

var htmlTitle = regexp.MustCompile(`(?is)<title[^>]*>(.*?)</title>`)

// problem says in words what the API refuses: the status, what it says of the
// reason, and the body as it came.
func problem(resp *http.Response, kind, charset string, body []byte, t *restTool) string {
	text := statusLine(resp)
	switch s := resp.StatusCode; {
	case s < 400:
		text += ": redirects are not followed; the url of the API, or the arguments, have to be those of where it is"
	case s == http.StatusUnauthorized || s == http.StatusForbidden:
		if len(t.auth) == 0 {
			text += " (the gateway sent no credentials)"
		}
	case (s == http.StatusBadGateway || s == http.StatusGatewayTimeout) && !t.harmless():
		text += ": it is not known whether it was carried out"
	}
	switch {
	case len(body) == 0:
		return text
	case jsonMedia(kind) || looksJSON(body):
		if reason := problemReason(body); reason != "" {
			text += ": " + reason
		}
	case kind == "text/html":
		if m := htmlTitle.FindSubmatch(body); m != nil {
			text += ": " + clip(strings.Join(strings.Fields(string(m[1])), " "), 200)
		}
		return text + fmt.Sprintf("\n\n(a page of HTML, %d bytes)", len(body))
	case !textual(kind, body):
		return text + fmt.Sprintf("\n\n(%d bytes of %s)", len(body), cmp.Or(kind, "an unknown type"))
	}
	return text + "\n\n" + clip(decodeText(body, charset), maxProblem)
}

// problemReason reads RFC 9457's problem details, and what other APIs call
// the same.
func problemReason(body []byte) string {
	v, err := jsonrpc.Parse(body, jsonrpc.Limits{Bytes: len(body), Depth: answerDepth, AllowCaseVariants: true})
	if err != nil {
		return ""
	}
	var parts []string
	add := func(v jsonrpc.Value) bool {
		s, ok := v.Text()
		if s = strings.TrimSpace(s); ok && s != "" && s != "about:blank" && !slices.Contains(parts, s) {
			parts = append(parts, clip(s, maxWords))
		}
		return ok && s != ""
	}
	add(v.Get("title"))
	add(v.Get("detail"))
	if len(parts) == 0 {
		for _, path := range [][]string{{"message"}, {"error", "message"}, {"error_description"}, {"error"}, {"reason"}, {"description"}} {
			if add(v.Get(path...)) {
				break
			}
		}
	}
	return strings.Join(parts, ": ")
}

var linkNext = regexp.MustCompile(`<([^>]*)>([^<]*)`)

// nextPage reads the Link header (RFC 8288), and says which arguments lead to
// the next page.
func nextPage(resp *http.Response, t *restTool, arguments jsonrpc.Value) string {
	for _, link := range linkNext.FindAllStringSubmatch(strings.Join(resp.Header.Values("Link"), ", "), -1) {
		next := false
		for param := range strings.SplitSeq(link[2], ";") {
			k, v, _ := strings.Cut(strings.TrimSpace(strings.Trim(strings.TrimSpace(param), ",")), "=")
			if strings.EqualFold(strings.TrimSpace(k), "rel") && slices.Contains(strings.Fields(strings.ToLower(strings.Trim(strings.TrimSpace(v), `",`))), "next") {
				next = true
			}
		}
		u, err := url.Parse(link[1])
		if !next || err != nil {
			continue
		}
		values := u.Query()
		var args []string
		for _, p := range t.params {
			if p.in != "query" || !values.Has(p.name) || slices.ContainsFunc(t.auth, func(c credential) bool { return c.in == "query" && c.name == p.name }) {
				continue
			}
			v := values.Get(p.name)
			if now := arguments.Get(p.property); now.Exists() {
				text, isText := now.Text()
				if !isText {
					text = string(now.Raw())
				}
				if text == v {
					continue
				}
			}
			args = append(args, p.property+"="+clip(v, maxWords))
		}
		if len(args) > 0 {
			return "There is a next page: the same call with " + strings.Join(args, ", ") + "."
		}
		return "There is a next page."
	}
	return ""
}
