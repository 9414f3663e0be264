package dispatch

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"mime/multipart"
	"net/http"
	"net/textproto"
	"net/url"
	"slices"
	"strings"

	"waybill.dev/schemas/jsonrpc"
)

// wire is a request as it grows.
type wire struct {
	header http.Header
	path   string // the template, with what was put in
	query  []string
	cookie []string
}

// errNested: OpenAPI does not say how a value inside a value is written in
// this style, so servers do not agree on it.
var errNested = errors.New("a list or object inside of this value cannot be written in the parameter's style")

// put writes the value of a parameter where it belongs.
func (w *wire) put(p restParam, v any) error {
	if p.json {
		b, err := encodeJSON(v)
		if err != nil {
			return err
		}
		v = string(b)
	}
	switch p.in {
	case "path":
		return w.putPath(p, v)
	case "query":
		pairs, err := queryPairs(p, v)
		w.query = append(w.query, pairs...)
		return err
	case "header":
		text, err := simple(v, p.explode, func(s string) string { return s })
		if err != nil {
			return err
		}
		text = strings.TrimSpace(text)
		if strings.IndexFunc(text, func(r rune) bool { return r < 0x20 || r > 0x7e }) >= 0 {
			return errors.New("a header takes visible ASCII only")
		}
		name := http.CanonicalHeaderKey(p.name)
		if ours(name) {
			// Idempotency-Key is for the API. In this spelling, which is as
			// good on the wire, net/http does not take it for leave to send
			// the request again by itself.
			name = strings.ToLower(name)
		}
		w.header[name] = []string{text}
		return nil
	default:
		text, err := scalars(v, ",", func(s string) string { return escape(s, "") })
		if err != nil {
			return err
		}
		w.cookie = append(w.cookie, p.name+"="+text)
		return nil
	}
}

// authorize adds a credential, which counts more than anything of that name.
func (w *wire) authorize(c credential) {
	switch c.in {
	case "header":
		w.header[http.CanonicalHeaderKey(c.name)] = []string{c.value}
	case "query":
		// An argument that is an object may bring any name.
		name := escape(c.name, "") + "="
		w.query = slices.DeleteFunc(w.query, func(pair string) bool { return strings.HasPrefix(pair, name) })
		w.query = append(w.query, name+escape(c.value, ""))
	case "cookie":
		w.cookie = slices.DeleteFunc(w.cookie, func(pair string) bool { return strings.HasPrefix(pair, c.name+"=") })
		w.cookie = append(w.cookie, c.name+"="+escape(c.value, "!#$&'()*+/:<=>?@[]^`{|}"))
	}
}

// url is the address, once everything is in. What the arguments say stays in
// the place of their parameter: a segment of the path cannot become two, or a
// step up.
func (w *wire) url(base *url.URL) (*url.URL, error) {
	if len(w.cookie) > 0 {
		w.header["Cookie"] = []string{strings.Join(slices.Concat(w.header["Cookie"], w.cookie), "; ")}
	}
	for step := range strings.SplitSeq(w.path, "/") {
		if plain, err := url.PathUnescape(step); err != nil || plain == "." || plain == ".." {
			return nil, errors.New("the path would hold a step up")
		}
	}
	u := *base
	u.RawPath = base.EscapedPath() + w.path
	var err error
	if u.Path, err = url.PathUnescape(u.RawPath); err != nil {
		return nil, errors.New("the path cannot be written")
	}
	u.RawQuery = strings.Join(w.query, "&")
	return &u, nil
}

func (w *wire) putPath(p restParam, v any) error {
	e := func(s string) string { return escape(s, "") }
	var text string
	var err error
	switch p.style {
	case "label":
		if text, err = joined(v, p.explode, ".", ",", "", e); err == nil {
			text = "." + text
		}
	case "matrix":
		name := escape(p.name, "")
		switch v := v.(type) {
		case map[string]any:
			if text, err = joined(v, p.explode, ";", ",", "", e); !p.explode {
				text = name + "=" + text
			}
		case []any:
			sep, prefix := ",", ""
			if p.explode {
				sep, prefix = ";", name+"="
			}
			if text, err = joined(v, true, sep, ",", prefix, e); !p.explode {
				text = name + "=" + text
			}
		default:
			if text, err = scalar(v); err == nil {
				text = name + "=" + e(text)
			}
		}
		text = ";" + text
	default:
		text, err = simple(v, p.explode, e)
	}
	if err != nil {
		return err
	}
	if text == "" {
		return errors.New("a path parameter cannot be empty")
	}
	// Also what a server, or something before it, would unescape first.
	plain, err := url.PathUnescape(text)
	if err != nil {
		return err
	}
	for range 3 {
		for _, step := range strings.FieldsFunc(plain, func(r rune) bool { return r == '/' || r == '\\' }) {
			// There are servers that leave out what follows a semicolon.
			step, _, _ = strings.Cut(step, ";")
			if step = strings.TrimSpace(step); step == "." || step == ".." {
				return errors.New("a path parameter cannot be, or hold, a step up, or a dot for a step")
			}
		}
		if again, err := url.PathUnescape(plain); err == nil {
			plain = again
		}
	}
	w.path = strings.ReplaceAll(w.path, "{"+p.name+"}", text)
	return nil
}

// queryPairs are the name=value of a query parameter.
func queryPairs(p restParam, v any) ([]string, error) {
	unescaped := ""
	if p.reserved {
		unescaped = "!$'()*,:;@/?" // of the reserved ones, those that do not end a value
	}
	e := func(s string) string { return escape(s, unescaped) }
	name := escape(p.name, "")
	switch v := v.(type) {
	case []any:
		if len(v) == 0 {
			return nil, nil
		}
		if p.explode {
			var pairs []string
			for _, item := range v {
				text, err := scalar(item)
				if err != nil {
					return nil, err
				}
				pairs = append(pairs, name+"="+e(text))
			}
			return pairs, nil
		}
		sep := map[string]string{"spaceDelimited": "%20", "pipeDelimited": "%7C"}[p.style]
		if sep == "" {
			sep = ","
		}
		text, err := scalars(v, sep, e)
		return []string{name + "=" + text}, err
	case map[string]any:
		if len(v) == 0 {
			return nil, nil
		}
		if p.style == "deepObject" {
			return deepObject(name, v, e, 0)
		}
		if p.explode {
			var pairs []string
			for _, key := range slices.Sorted(maps.Keys(v)) {
				text, err := scalar(v[key])
				if err != nil {
					return nil, err
				}
				pairs = append(pairs, escape(key, "")+"="+e(text))
			}
			return pairs, nil
		}
		text, err := joined(v, false, ",", ",", "", e)
		return []string{name + "=" + text}, err
	}
	text, err := scalar(v)
	return []string{name + "=" + e(text)}, err
}

// deepObject writes name[key]=value, deeper as far as there are objects; lists
// repeat the name, which most servers read so.
func deepObject(name string, v map[string]any, e func(string) string, depth int) ([]string, error) {
	if depth > 8 {
		return nil, errNested
	}
	var pairs []string
	for _, key := range slices.Sorted(maps.Keys(v)) {
		at := name + "%5B" + escape(key, "") + "%5D"
		switch item := v[key].(type) {
		case map[string]any:
			inner, err := deepObject(at, item, e, depth+1)
			if err != nil {
				return nil, err
			}
			pairs = append(pairs, inner...)
		case []any:
			for _, x := range item {
				text, err := scalar(x)
				if err != nil {
					return nil, err
				}
				pairs = append(pairs, at+"="+e(text))
			}
		default:
			text, err := scalar(item)
			if err != nil {
				return nil, err
			}
			pairs = append(pairs, at+"="+e(text))
		}
	}
	return pairs, nil
}

// simple is the style simple: a,b and k,v or k=v.
func simple(v any, explode bool, e func(string) string) (string, error) {
	return joined(v, explode, ",", ",", "", e)
}

// joined writes a value with sep between its parts. An object's keys, in order,
// are parts too, or with explode stand before a =. prefix stands before each
// item of a list.
func joined(v any, explode bool, sep, inner, prefix string, e func(string) string) (string, error) {
	var parts []string
	switch v := v.(type) {
	case []any:
		for _, item := range v {
			text, err := scalar(item)
			if err != nil {
				return "", err
			}
			parts = append(parts, prefix+e(text))
		}
		if !explode {
			sep = inner
		}
	case map[string]any:
		between := "="
		if !explode {
			between, sep = inner, inner
		}
		for _, key := range slices.Sorted(maps.Keys(v)) {
			text, err := scalar(v[key])
			if err != nil {
				return "", err
			}
			parts = append(parts, e(key)+between+e(text))
		}
	default:
		text, err := scalar(v)
		return e(text), err
	}
	return strings.Join(parts, sep), nil
}

// scalars writes one scalar, or a list of them.
func scalars(v any, sep string, e func(string) string) (string, error) {
	list, ok := v.([]any)
	if !ok {
		list = []any{v}
	}
	parts := make([]string, len(list))
	for i, item := range list {
		text, err := scalar(item)
		if err != nil {
			return "", err
		}
		parts[i] = e(text)
	}
	return strings.Join(parts, sep), nil
}

// scalar writes a value that has no parts. Numbers keep their digits.
func scalar(v any) (string, error) {
	switch v := v.(type) {
	case string:
		return v, nil
	case json.Number:
		return v.String(), nil
	case bool:
		if v {
			return "true", nil
		}
		return "false", nil
	case nil:
		return "", nil
	}
	return "", errNested
}

// escape writes s with percents, but for unreserved characters (RFC 3986 §2.3)
// and those of more.
func escape(s, more string) string {
	const hex = "0123456789ABCDEF"
	var b strings.Builder
	for i := range len(s) {
		c := s[i]
		switch {
		case c >= 'a' && c <= 'z', c >= 'A' && c <= 'Z', c >= '0' && c <= '9', strings.IndexByte("-._~", c) >= 0, strings.IndexByte(more, c) >= 0:
			b.WriteByte(c)
		default:
			b.WriteByte('%')
			b.WriteByte(hex[c>>4])
			b.WriteByte(hex[c&15])
		}
	}
	return b.String()
}

func base64Text(s string) string { return base64.StdEncoding.EncodeToString([]byte(s)) }

// decodeNumbers decodes JSON, keeping the digits of numbers.
func decodeNumbers(raw []byte, into any) error {
	d := json.NewDecoder(bytes.NewReader(raw))
	d.UseNumber()
	return d.Decode(into)
}

// encode writes the body. JSON goes out as it came in.
func (b *restBody) encode(raw jsonrpc.Value, v any) (body []byte, contentType string, err error) {
	switch b.kind {
	case bodyJSON:
		return raw.Raw(), b.media, nil
	case bodyText:
		text, err := scalar(v)
		return []byte(text), b.media + "; charset=utf-8", err
	case bodyBinary:
		body, err := fromBase64(v)
		return body, b.media, err
	}
	object, ok := v.(map[string]any)
	if !ok {
		return nil, "", errors.New("it must be an object")
	}
	if b.kind == bodyMultipart {
		return b.multipart(object)
	}
	var pairs []string
	for _, name := range slices.Sorted(maps.Keys(object)) {
		f, known := b.fields[name]
		if !known {
			f = bodyField{explode: true}
		}
		item := object[name]
		if _, isObject := item.(map[string]any); f.media == "application/json" || isObject && f.style == "" {
			text, err := encodeJSON(item)
			if err != nil {
				return nil, "", err
			}
			pairs = append(pairs, escape(name, "")+"="+escape(string(text), ""))
			continue
		}
		more, err := queryPairs(restParam{name: name, style: f.style, explode: f.explode}, item)
		if err != nil {
			return nil, "", fmt.Errorf("%s: %w", name, err)
		}
		pairs = append(pairs, more...)
	}
	return []byte(strings.Join(pairs, "&")), "application/x-www-form-urlencoded", nil
}

// multipart writes each member as a part, each item of a list as one.
func (b *restBody) multipart(object map[string]any) ([]byte, string, error) {
	var buf bytes.Buffer
	w := multipart.NewWriter(&buf)
	for _, name := range slices.Sorted(maps.Keys(object)) {
		f := b.fields[name]
		items, list := object[name].([]any)
		if !list || f.media == "application/json" && !f.binary {
			items = []any{object[name]}
		}
		for _, item := range items {
			if item == nil {
				continue
			}
			h := textproto.MIMEHeader{}
			disposition := `form-data; name="` + quoteName(name) + `"`
			var content []byte
			media := f.media
			text, err := scalar(item)
			switch {
			case f.binary:
				disposition += `; filename="` + quoteName(name) + `"`
				if media == "" || strings.Contains(media, "*") {
					media = "application/octet-stream"
				}
				content, err = fromBase64(item)
			case media == "application/json" || err != nil:
				media = "application/json"
				content, err = encodeJSON(item)
			default:
				content = []byte(text)
			}
			if err != nil {
				return nil, "", fmt.Errorf("%s: %w", name, err)
			}
			h.Set("Content-Disposition", disposition)
			if media != "" {
				h.Set("Content-Type", media)
			}
			part, err := w.CreatePart(h)
			if err == nil {
				_, err = part.Write(content)
			}
			if err != nil {
				return nil, "", err
			}
		}
	}
	if err := w.Close(); err != nil {
		return nil, "", err
	}
	return buf.Bytes(), w.FormDataContentType(), nil
}

// quoteName escapes a name as browsers do.
func quoteName(s string) string {
	return strings.NewReplacer("\\", "\\\\", `"`, "%22", "\r", "%0D", "\n", "%0A").Replace(s)
}

func fromBase64(v any) ([]byte, error) {
	s, ok := v.(string)
	if !ok {
		return nil, errors.New("it must be a text, in base64")
	}
	b, err := base64.StdEncoding.DecodeString(s)
	if err != nil {
		return nil, errors.New("it is not base64")
	}
	return b, nil
}
