package dispatch

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"reflect"
	"regexp/syntax"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"waybill.dev/schemas"
	"waybill.dev/schemas/jsonrpc"
)

func answersOf(t testing.TB, change func(*Options)) *answers {
	t.Helper()
	opt := Options{Servers: []Server{{Name: "s"}}}
	if change != nil {
		change(&opt)
	}
	a, err := newAnswers(opt)
	if err != nil {
		t.Fatal(err)
	}
	return a
}

// foundIn is what was found, in a line.
func foundIn(s schemas.Screened) string {
	var all []string
	for _, f := range s.Found {
		all = append(all, fmt.Sprintf("%s %s %d at %s", f.Rule, f.Did, f.Count, strings.Join(f.Where, " ")))
	}
	for _, c := range s.Checks {
		all = append(all, c.Guard+" "+c.Said)
	}
	return strings.Join(all, "; ")
}

// token36 is what follows the prefix of a token; it is put together here so that
// no file holds one.
const token36 = "0123456789abcdefghijABCDEFGHIJ012345"

// What is taken out of answers, to the byte, and what is said of it.
func TestAnswerRules(t *testing.T) {
	result := func(text string) string {
		return `{"jsonrpc":"2.0","id":"c1", "result":{"content":[{"type":"text","text":"` + text + `"}]}}`
	}
	at := "/result/content/0/text"
	github := "gh" + "p_" + token36
	aws := "AbCd" + token36 // whose own form says nothing
	only := func(a Answers) func(*Options) { return func(o *Options) { o.Answers = a } }
	for _, c := range []struct {
		name   string
		change func(*Options)
		in     string
		out    string // "": kept back
		said   string
	}{
		{"clean", nil, result(`caf\u00e9 \/ “quotes” – \u2028 \b\u0000\u007f 👨‍👩‍👧 ❤️ \ud83d\ude00 \u200fעברית`), "same", ""},
		{"nothing", nil, "", "same", ""},
		{"colours", nil, result(`caf\u00e9 \/ \u001b[1;31mred\u001b[0m \n`), result(`caf\u00e9 \/ red \n`), "ansi stripped 2 at " + at},
		{"a link", nil, result(`\u001b]8;;https://evil.example/\u001b\\click\u001b]8;;\u0007`), result(`click`), "ansi stripped 2 at " + at},
		{"in 8 bits", nil, result(`\u009b31mred` + "\u009b0m \u009d0;title\u009cx"), result(`red x`), "ansi stripped 3 at " + at},
		{"without an end", nil, result(`a\u001b]0;all the rest`), result(`a0;all the rest`), "ansi stripped 1 at " + at},
		{"broken off", nil, result(`a\u001b`), result(`a`), "ansi stripped 1 at " + at},
		{"one that would be made by taking out another", nil, result(`\u001b\u001b[31m[31mx`), result(`[31mx`), "ansi stripped 2 at " + at},
		{"a reset", nil, result(`\u001bcx\u001b(By`), result(`xy`), "ansi stripped 2 at " + at},
		{"bidi", nil, result("a\u202eb\\u202cc\u2066d\u2069"), result("abcd"), "bidi stripped 4 at " + at},
		{"tags", nil, result("x\U000e0068\U000e0069\\udb40\\udc21 y"), result("x y"), "tags stripped 3 at " + at},
		{"the flag of Wales", nil, result("🏴\U000e0067\U000e0062\U000e0077\U000e006c\U000e0073\U000e007f"), "same", ""},
		{"a flag of nowhere", nil, result("🏴\U000e0078\U000e007f"), result("🏴"), "tags stripped 2 at " + at},
		{"variants in a row", nil, result("😀\ufe0f\ufe01\U000e0121x\ufe0f"), result("😀\ufe0fx\ufe0f"), "tags stripped 2 at " + at},
		{"in a row when what is between is gone", nil, result("😀\ufe0f\u202e\ufe01"), result("😀\ufe0f"), "bidi stripped 1 at " + at + "; tags stripped 1 at " + at},
		{"in a name", nil, `{"jsonrpc":"2.0","id":1,"result":{"a\u001b[1mb":[1,{"c/d":"\u202e"}]}}`, `{"jsonrpc":"2.0","id":1,"result":{"ab":[1,{"c/d":""}]}}`,
			"ansi stripped 1 at /result/ab; bidi stripped 1 at /result/ab/1/c~1d"},
		{"names that become one", nil, `{"jsonrpc":"2.0","id":1,"result":{"a":1,"a\u202e":2}}`, "", "bidi stripped 1 at /result/a"},
		{"an error", nil, `{"jsonrpc":"2.0","id":1,"error":{"code":-1,"message":"\u001b[2J","data":"\u202e"}}`, `{"jsonrpc":"2.0","id":1,"error":{"code":-1,"message":"","data":""}}`,
			"ansi stripped 1 at /error/message; bidi stripped 1 at /error/data"},
		{"control characters", only(Answers{Control: Strip}), result(`a\b\u0000\u007f\u0085\t\n\r`), result(`a\t\n\r`), "control stripped 4 at " + at},
		{"zero width", only(Answers{Invisible: Strip}), result("a\u200bb\ufeff\u00adc"), result("abc"), "invisible stripped 3 at " + at},
		{"rejected", only(Answers{Bidi: Reject}), result("a\u202eb"), "", "bidi rejected 1 at " + at},
		{"reported", only(Answers{ANSI: Report, Secrets: Report}), result(`\u001b[1m ` + github), "same", "ansi reported 1 at " + at + "; secret github-token reported 1 at " + at},
		{"allowed", only(Answers{ANSI: Allow, Secrets: Allow}), result(`\u001b[1m ` + github), "same", ""},
		{"of one server", func(o *Options) { o.Servers[0].Answers.Secrets = Allow }, result(github), "same", ""},
		{"a front", func(o *Options) { o.Servers, o.Fronts = nil, []*schemas.Front{{Name: "s"}} }, result(`\u001b[1m ` + github), "same", ""},
		{"a secret", nil, result(`token: ` + github + `, and \u00e9`), result(`token: [redacted: github-token], and \u00e9`), "secret github-token redacted 1 at " + at},
		{"an escaped one", nil, result(`gh\u0070_` + token36), result(`[redacted: github-token]`), "secret github-token redacted 1 at " + at},
		{"one in pieces", nil, result("ghp_01234\U000e0041" + token36[5:]), result(`[redacted: github-token]`), "tags stripped 1 at " + at + "; secret github-token redacted 1 at " + at},
		{"two in one", nil, result(github + " " + github), result(`[redacted: github-token] [redacted: github-token]`), "secret github-token redacted 2 at " + at},
		{"in a name", nil, `{"jsonrpc":"2.0","id":1,"result":{"` + github + `":{"a":"` + github + `"}}}`, `{"jsonrpc":"2.0","id":1,"result":{"[redacted: github-token]":{"a":"[redacted: github-token]"}}}`,
			"secret github-token redacted 2 at /result/[redacted: github-token] /result/[redacted: github-token]/a"},
		{"reported in a name", only(Answers{Secrets: Report}), `{"jsonrpc":"2.0","id":1,"result":{"` + github + `":1}}`, "same", "secret github-token reported 1 at /result/[redacted: github-token]"},
		{"a message before the answer", nil, `{"jsonrpc":"2.0","method":"notifications/message","params":{"data":["` + github + `"]}}`, `{"jsonrpc":"2.0","method":"notifications/message","params":{"data":["[redacted: github-token]"]}}`,
			"secret github-token redacted 1 at /params/data/0"},
		{"what is to be brought back", nil, `{"jsonrpc":"2.0","id":1,"result":{"requestState":"` + github + `","nextCursor":"` + github + `"}}`, "same", ""},
		{"the example of the documentation", nil, result("AKIA" + "IOSFODNN7EXAMPLE postgres://user:password@localhost/db"), "same", ""},
		{"a password in a URL", nil, result("postgres://app:" + "hunter2hunter2@db.example/app"), result("postgres://app:[redacted: url-password]@db.example/app"), "secret url-password redacted 1 at " + at},
		{"a key over lines", nil, result(`-----BEGIN RSA ` + `PRIVATE KEY-----\nMIIEowIBAAKCAQEA\n-----END RSA ` + `PRIVATE KEY-----\nafter`), result(`[redacted: private-key]\nafter`),
			"secret private-key redacted 1 at " + at},
		{"one that is cut off", nil, result(`-----BEGIN ` + `PRIVATE KEY-----\n` + strings.Repeat("MIIEvQIB", 6) + `\n`), result(`[redacted: private-key]`), "secret private-key redacted 1 at " + at},
		{"how one looks", nil, result(`-----BEGIN ` + `PRIVATE KEY-----\n...\n-----END ` + `PRIVATE KEY-----`), "same", ""},
		{"in JSON in a text", nil, result(`{\"a\":\"\\u001b[31m` + github + `\",\"b\": 1e5}`), result(`{\"a\":\"[redacted: github-token]\",\"b\": 1e5}`), "ansi stripped 1 at " + at + "; secret github-token redacted 1 at " + at},
		{"in JSON in JSON in a text", nil, result(`[\"{\\\"a\\\":\\\"\\\\u202e\\\"}\"]`), result(`[\"{\\\"a\\\":\\\"\\\"}\"]`), "bidi stripped 1 at " + at},
		{"after an escape in a text that is no JSON", nil, result(`{\"a\":\"\\n` + github + `\" and so on`), result(`{\"a\":\"\\n[redacted: github-token]\" and so on`), "secret github-token redacted 1 at " + at},
		{"JSON in a text that is clean", nil, result(`{\"a\":\"caf\\u00e9\\n\"}`), "same", ""},
		{"known by its name alone", nil, `{"jsonrpc":"2.0","id":1,"result":{"structuredContent":{"aws_secret_access_key" : "` + aws + `","note":"` + aws + `","Authorization":["x"]},"headers":{"Authorization":"Bearer ` + aws + `"}}}`,
			`{"jsonrpc":"2.0","id":1,"result":{"structuredContent":{"aws_secret_access_key" : "[redacted: aws-secret-key]","note":"` + aws + `","Authorization":["x"]},"headers":{"Authorization":"Bearer [redacted: authorization-header]"}}}`,
			"secret aws-secret-key redacted 1 at /result/structuredContent/aws_secret_access_key; secret authorization-header redacted 1 at /result/headers/Authorization"},
		{"known by its name in JSON in a text", nil, result(`{\"aws_secret_access_key\":\"` + aws + `\",\"note\":\"a\\nb\"}`), result(`{\"aws_secret_access_key\":\"[redacted: aws-secret-key]\",\"note\":\"a\\nb\"}`), "secret aws-secret-key redacted 1 at " + at},
		{"name and value as one", func(o *Options) { o.SecretRules = []SecretRule{{ID: "code", Match: `pin\W+\d{4}`}} }, `{"jsonrpc":"2.0","id":1,"result":{"pin":"1234 5678"}}`, `{"jsonrpc":"2.0","id":1,"result":{"pin":"[redacted: code] 5678"}}`, "secret code redacted 1 at /result/pin"},
		{"in colour", only(Answers{ANSI: Allow}), result(`\u001b[31m` + github), result(`\u001b[31m[redacted: github-token]`), "secret github-token redacted 1 at " + at},
		{"rejected secret", only(Answers{Secrets: Reject}), result(github), "", "secret github-token rejected 1 at " + at},
		{"too deep", only(Answers{Depth: 4}), `{"jsonrpc":"2.0","id":1,"result":{"a":[[[]]]}}`, "", ""},
		{"deep enough", only(Answers{Depth: 5}), `{"jsonrpc":"2.0","id":1,"result":{"a":[[[]]]}}`, "same", ""},
		{"not JSON", nil, `{"a`, "", ""},
		{"other secrets", func(o *Options) { o.SecretRules = []SecretRule{{ID: "badge", Match: `B-\d{4}`}} }, result("B-1234 " + github), result("[redacted: badge] " + github), "secret badge redacted 1 at " + at},
		{"no secrets", func(o *Options) { o.SecretRules = []SecretRule{} }, result(github), "same", ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			a := answersOf(t, c.change)
			in := []byte(c.in)
			out, s, err := a.screen("s", nil, in)
			if w := new(withheld); errors.As(err, &w) {
				s = w.screened
			}
			switch {
			case c.out == "" && err == nil:
				t.Errorf("is not kept back: %s", out)
			case c.out == "same" && (err != nil || !bytes.Equal(out, []byte(c.in)) || len(in) > 0 && &out[0] != &in[0]):
				t.Errorf("is not what it was: %v %s", err, out)
			case c.out != "" && c.out != "same" && string(out) != c.out:
				t.Errorf("%v\ngot  %q\nwant %q", err, out, c.out)
			}
			if got := foundIn(s); got != c.said {
				t.Errorf("said %q, want %q", got, c.said)
			}
			if out, s, err := a.screen("s", nil, out); err != nil || c.out != "same" && s.Found != nil {
				t.Errorf("what is left is not clean: %v %s %s", err, foundIn(s), out)
			}
			if string(in) != c.in {
				t.Error("what came in was changed")
			}
		})
	}
}

// A detail for operators holds a server's words, and so may a secret.
func TestAnswerWords(t *testing.T) {
	a := answersOf(t, nil)
	for in, want := range map[string]string{
		"plain “words”":                                "plain “words”",
		"\x1b[31mred \u202e gh" + "p_" + token36:       "red  [redacted: github-token]",
		"it says \"gh" + "p_" + token36 + "\"\nand so": "it says \"[redacted: github-token]\"\nand so",
	} {
		if got := a.words("s", in); got != want {
			t.Errorf("%q: %q, want %q", in, got, want)
		}
	}
}

// sample is a text that an expression matches; n chooses among the characters of a
// class.
func sample(re *syntax.Regexp, n int) string {
	var b strings.Builder
	switch re.Op {
	case syntax.OpLiteral:
		b.WriteString(string(re.Rune))
	case syntax.OpCharClass:
		var all []rune
		for i := 0; i < len(re.Rune); i += 2 {
			for r := max(re.Rune[i], ' '); r <= min(re.Rune[i+1], '~'); r++ {
				all = append(all, r)
			}
		}
		b.WriteRune(all[n%len(all)])
	case syntax.OpAnyChar, syntax.OpAnyCharNotNL:
		b.WriteByte("MIIEvQIBADANBgkqhkiG9w0BAQ"[n%26])
	case syntax.OpConcat, syntax.OpCapture:
		for i, sub := range re.Sub {
			b.WriteString(sample(sub, n+i))
		}
	case syntax.OpAlternate:
		b.WriteString(sample(re.Sub[0], n))
	case syntax.OpRepeat:
		for i := range re.Min {
			b.WriteString(sample(re.Sub[0], n+7*i))
		}
	case syntax.OpPlus:
		b.WriteString(sample(re.Sub[0], n))
	}
	return b.String()
}

// Each secret that is built in is found and taken out: a text that its expression
// describes, alone and among others, and of an expression of which a part is taken
// out, that part.
func TestBuiltInSecrets(t *testing.T) {
	rules, err := ParseSecretRules(builtInSecrets)
	if err != nil {
		t.Fatal(err)
	}
	if len(rules) < 60 {
		t.Fatalf("%d rules", len(rules))
	}
	s, err := newSecrets(rules)
	if err != nil {
		t.Fatal(err)
	}
	for i, r := range rules {
		re, err := syntax.Parse(r.Match, syntax.Perl)
		if err != nil {
			t.Fatal(err)
		}
		secret := sample(re.Simplify(), 3)
		if re, err = syntax.Parse(r.Match, syntax.Perl); err == nil {
			secret = sample(re, 3)
		}
		m := s.forms[i].match.FindStringSubmatchIndex(secret)
		if m == nil {
			t.Errorf("%s: %q is no sample", r.ID, secret)
			continue
		}
		hidden := secret[m[0]:m[1]]
		if len(m) > 2 {
			hidden = secret[m[2]:m[3]]
		}
		text := "say " + secret + " and"
		cuts, err := s.find("", []byte(text), Redact, nil)
		if err != nil || len(cuts) == 0 {
			t.Errorf("%s: %q is not found: %v", r.ID, text, err)
			continue
		}
		left := string(without([]byte(text), cuts))
		if strings.Contains(left, hidden) {
			t.Errorf("%s: %q is left of %q", r.ID, left, text)
		}
		if !slices.ContainsFunc(cuts, func(c cut) bool { return c.rule == "secret "+r.ID }) {
			t.Logf("%s: %q is taken for %s", r.ID, secret, cuts[0].rule)
		}
	}
}

// A secret is found wherever it stands in a long text.
func TestSecretsInALongText(t *testing.T) {
	a := answersOf(t, nil)
	github := "gh" + "p_" + token36
	for _, at := range []int{0, window - lap - 20, window - 20, window, 2*window - lap - 20, 3 * window} {
		in := `{"jsonrpc":"2.0","id":1,"result":["` + strings.Repeat("word ", at/5) + github + strings.Repeat(" word", window/5) + `"]}`
		out, s, err := a.screen("s", nil, []byte(in))
		if err != nil || foundIn(s) != "secret github-token redacted 1 at /result/0" || bytes.Contains(out, []byte(github)) {
			t.Errorf("at %d: %v %s", at, err, foundIn(s))
		}
	}
}

// A file of secrets that cannot be used is said to be so.
func TestSecretRules(t *testing.T) {
	for text, want := range map[string]string{
		"secrets: []": "", "secrets: [{id: a, match: 'x+y'}]": "",
		"": "has no secrets", "secrets:": "has no secrets", "rules: []": "unknown field",
		"secrets: [{id: A, match: x}]":                                   "secrets[0].id",
		"secrets: [{id: a, match: x}, {id: a, match: y}]":                "stands twice",
		"secrets: [{id: a}]":                                             "secrets[0].match",
		"secrets: [{id: a, match: '('}]":                                 "secrets[0].match",
		"secrets: [{id: a, match: 'x*'}]":                                "matches nothing at all",
		"secrets: [{id: a, match: '(?=x)'}]":                             "secrets[0].match",
		"secrets: [{id: a, match: '" + strings.Repeat("x", 2001) + "'}]": "1 to 2000",
	} {
		_, err := ParseSecretRules([]byte(text))
		if (err == nil) != (want == "") || err != nil && !strings.Contains(err.Error(), want) {
			t.Errorf("%.80q: %v, want %q", text, err, want)
		}
	}
	for _, a := range []Answers{{ANSI: Redact}, {Secrets: Strip}, {Bidi: "no"}, {Depth: 513}, {Depth: -1}} {
		if a.Check() == nil {
			t.Errorf("%+v is accepted", a)
		}
		if _, err := newAnswers(Options{Servers: []Server{{Name: "s", Answers: a}}}); err == nil {
			t.Errorf("%+v of a server is accepted", a)
		}
	}
}

// redactResult takes out what the decision orders, also where a tool says it a
// second time as a text.
func TestRedactResult(t *testing.T) {
	for _, c := range []struct{ in, paths, out, said string }{
		{`{"jsonrpc":"2.0","id":1,"result":{"a":{"b":[1,{"c":"x"},{"c":"y"}]},"d":1e400}}`, "a.b.*.c",
			`{"jsonrpc":"2.0","id":1,"result":{"a":{"b":[1,{"c":"[redacted]"},{"c":"[redacted]"}]},"d":1e400}}`,
			"redact a.b.*.c redacted 2 at /result/a/b/1/c /result/a/b/2/c"},
		{`{"jsonrpc":"2.0","id":1,"result":{"structuredContent":{"iban":"DE1","n":1},"content":[{"type":"text","text":"{\"iban\": \"DE1\", \"n\":1}"},{"type":"text","text":"DE1"}]}}`, "structuredContent.iban",
			`{"jsonrpc":"2.0","id":1,"result":{"structuredContent":{"iban":"[redacted]","n":1},"content":[{"type":"text","text":"{\"iban\": \"[redacted]\", \"n\":1}"},{"type":"text","text":"DE1"}]}}`,
			"redact structuredContent.iban redacted 2 at /result/structuredContent/iban /result/content/0/text"},
		{`{"jsonrpc":"2.0","id":1,"result":{"content":[{"type":"text","text":"a"},{"type":"image"}]}}`, "content.*.text content",
			`{"jsonrpc":"2.0","id":1,"result":{"content":"[redacted]"}}`, "redact content.*.text redacted 1 at /result/content/0/text; redact content redacted 1 at /result/content"},
		{`{"jsonrpc":"2.0","id":1,"result":{"structuredContent":{"a":1},"content":[{"text":"{\"a\":1,\"b\":2}"}]}}`, "content.*.text structuredContent.a",
			`{"jsonrpc":"2.0","id":1,"result":{"structuredContent":{"a":"[redacted]"},"content":[{"text":"[redacted]"}]}}`,
			"redact content.*.text redacted 1 at /result/content/0/text; redact structuredContent.a redacted 1 at /result/structuredContent/a"},
		{`{"jsonrpc":"2.0","id":1,"result":{"a":1}}`, "b.c", "same", ""},
		{`{"jsonrpc":"2.0","id":1,"error":{"code":1,"message":"a"}}`, "message", "same", ""},
		{`{"jsonrpc":"2.0","id":1,"result":{"m":{"secret name":{"v":1}}}}`, "m.*.v", `{"jsonrpc":"2.0","id":1,"result":{"m":{"secret name":{"v":"[redacted]"}}}}`, "redact m.*.v redacted 1 at /result/m/*/v"},
	} {
		a := answersOf(t, nil)
		out, s, err := a.screen("s", &schemas.Orders{RedactResult: strings.Fields(c.paths)}, []byte(c.in))
		if c.out == "same" {
			c.out = c.in
		}
		if err != nil || string(out) != c.out || foundIn(s) != c.said {
			t.Errorf("%s: %v\ngot  %s\nwant %s\nsaid %s\nwant %s", c.paths, err, out, c.out, foundIn(s), c.said)
		}
	}
}

// Orders of a decision, and guards, on every way that words of a server take
// through a call.
func TestAnswerOrders(t *testing.T) {
	const (
		plain    = "plain"
		streamed = "streamed"
	)
	text := func(s string) string { return fmt.Sprintf(`"content":[{"type":"text","text":%q}]`, s) }
	for _, c := range []struct {
		name   string
		orders schemas.Orders
		way    string
		text   string
		guard  map[string]string // what it says of a message that holds the word; default allow
		end    string
		found  string // of the ending
		chunks int
	}{
		{"labels", schemas.Orders{Labels: []string{"untrusted"}}, plain, "hello", nil, "completed", "", 0},
		{"redacts", schemas.Orders{RedactResult: []string{"content.*.text"}}, plain, "hello", nil, "completed", "redact content.*.text redacted 1 at /result/content/0/text", 0},
		{"redacts at the end of a stream", schemas.Orders{RedactResult: []string{"content.*.text"}}, streamed, "hello", nil, "completed", "redact content.*.text redacted 1 at /result/content/0/text", 2},
		{"small enough", schemas.Orders{MaxResult: 400}, plain, "hello", nil, "completed", "", 0},
		{"too large", schemas.Orders{MaxResult: 400}, plain, strings.Repeat("x", 400), nil, "too_large", "", 0},
		{"too large in pieces", schemas.Orders{MaxResult: 400}, streamed, strings.Repeat("x", 100), nil, "too_large", "", 2},
		{"a guard lets it pass", schemas.Orders{Guards: []schemas.GuardOrder{{Guard: "g"}}}, plain, "hello", nil, "completed", "g allow", 0},
		{"a guard says no", schemas.Orders{Guards: []schemas.GuardOrder{{Guard: "g"}}}, plain, "evil", map[string]string{"evil": "deny"}, "withheld", "g deny", 0},
		{"a guard fails", schemas.Orders{Guards: []schemas.GuardOrder{{Guard: "g"}}}, plain, "evil", map[string]string{"evil": "failed"}, "withheld", "g failed", 0},
		{"a guard fails, which may be", schemas.Orders{Guards: []schemas.GuardOrder{{Guard: "g", Open: true}}}, plain, "evil", map[string]string{"evil": "failed"}, "completed", "g failed", 0},
		{"a guard says what nobody knows", schemas.Orders{Guards: []schemas.GuardOrder{{Guard: "g", Open: true}}}, plain, "evil", map[string]string{"evil": "perhaps"}, "withheld", "g perhaps", 0},
		{"the second says no", schemas.Orders{Guards: []schemas.GuardOrder{{Guard: "g"}, {Guard: "h"}}}, plain, "h evil", map[string]string{"h evil": "deny"}, "withheld", "g allow; h deny", 0},
		{"a guard says no of the first of a stream", schemas.Orders{Guards: []schemas.GuardOrder{{Guard: "g"}}}, streamed, "x", map[string]string{"chunk 0": "deny"}, "withheld", "g deny", 0},
		{"a guard says no of the second", schemas.Orders{Guards: []schemas.GuardOrder{{Guard: "g"}}}, streamed, "x", map[string]string{"chunk 1": "deny"}, "withheld", "g deny", 1},
		{"a guard sees no secret", schemas.Orders{Guards: []schemas.GuardOrder{{Guard: "g"}}}, plain, "gh" + "p_" + token36, map[string]string{"p_": "deny"}, "completed", "secret github-token redacted 1 at /result/content/0/text; g allow", 0},
	} {
		t.Run(c.name, func(t *testing.T) {
			r := newRig(t, func(w http.ResponseWriter, req *http.Request) {
				id := idOf(req)
				end := `{"jsonrpc":"2.0","id":` + id + `,"result":{"resultType":"complete",` + text(c.text) + `}}`
				if c.way == plain {
					answerJSON(w, 200, end)
					return
				}
				w.Header().Set("Content-Type", "text/event-stream")
				for i := range 2 {
					_, _ = fmt.Fprintf(w, "data: {\"jsonrpc\":\"2.0\",\"method\":\"notifications/message\",\"params\":{\"data\":\"chunk %d %s\"}}\n\n", i, c.text)
				}
				_, _ = fmt.Fprintf(w, "data: %s\n\n", end)
			}, func(o *Options) {
				o.Guard = func(_ context.Context, name string, e schemas.Event, said []byte) schemas.Check {
					check := schemas.Check{Guard: name, Said: schemas.CheckAllow}
					if e.Kind() != schemas.KindAuthorized {
						t.Errorf("asked with %s", e.Kind())
					}
					for word, says := range c.guard {
						if w, of, ok := strings.Cut(word, " "); ok && len(w) == 1 {
							if name != w {
								continue
							}
							word = of
						}
						if bytes.Contains(said, []byte(word)) {
							check.Said, check.Reason = says, "because"
						}
					}
					return check
				}
			})
			r.handle(r.call("write", authorized(func(a *schemas.Authorized) { a.Orders = c.orders })))
			end := r.want(c.end)
			var s schemas.Screened
			switch d := end.Data.(type) {
			case *schemas.Completed:
				s = d.Screened
				if !slices.Equal(d.Labels, c.orders.Labels) {
					t.Errorf("labels %q", d.Labels)
				}
			case *schemas.Failed:
				s = d.Screened
				if end.Body != nil {
					t.Errorf("what was kept back is stored: %s", end.Body)
				}
			}
			if got := foundIn(s); got != c.found {
				t.Errorf("the ending says %q, want %q", got, c.found)
			}
			if n := len(r.log.of(schemas.KindProgressed)); n != c.chunks {
				t.Errorf("%d messages before the answer, want %d", n, c.chunks)
			}
			if strings.Contains(r.log.String(), "p_"+token36) {
				t.Errorf("the secret is in the log:%v", r.log)
			}
		})
	}
}

// Without anybody to ask, a guard has failed.
func TestNoGuard(t *testing.T) {
	r := newRig(t, func(w http.ResponseWriter, req *http.Request) {
		answerJSON(w, 200, `{"jsonrpc":"2.0","id":`+idOf(req)+`,"result":{}}`)
	})
	r.handle(r.call("write", authorized(func(a *schemas.Authorized) { a.Guards = []schemas.GuardOrder{{Guard: "g"}} })))
	if end := r.want("withheld"); !strings.Contains(end.Data.(*schemas.Failed).Detail, "nobody can ask it") {
		t.Errorf("%+v", end.Data)
	}
}

// The digest of what came before an answer is of what is stored of it.
func TestScreenedChunks(t *testing.T) {
	github := "gh" + "p_" + token36
	r := newRig(t, func(w http.ResponseWriter, req *http.Request) {
		id := idOf(req)
		w.Header().Set("Content-Type", "text/event-stream")
		_, _ = fmt.Fprintf(w, "data: {\"jsonrpc\":\"2.0\",\"method\":\"n\",\"params\":[\"%s\"]}\n\ndata: {\"jsonrpc\":\"2.0\",\"id\":%s,\"result\":{}}\n\n", github, id)
	})
	r.handle(r.call("write"))
	end := r.want("completed")
	chunk := r.log.of(schemas.KindProgressed)[0]
	if want := `{"jsonrpc":"2.0","method":"n","params":["[redacted: github-token]"]}`; string(chunk.Body) != want {
		t.Errorf("stored %s, want %s", chunk.Body, want)
	}
	if want := []schemas.Finding{{Rule: "secret github-token", Did: "redacted", Count: 1, Where: []string{"/params/0"}}}; !reflect.DeepEqual(chunk.Data.(*schemas.Progressed).Found, want) {
		t.Errorf("%+v", chunk.Data)
	}
	if s := summary(end); s.ChunksSHA256 != digestOf(string(chunk.Body)) {
		t.Errorf("digest %s", s.ChunksSHA256)
	}
}

// A task that is the server's own would be fetched without its orders.
func TestOrdersOfAForeignTask(t *testing.T) {
	r := newRig(t, func(http.ResponseWriter, *http.Request) { t.Error("called") })
	r.handle(r.call("write", authorized(func(a *schemas.Authorized) {
		a.Revision, a.TaskNow, a.TaskUntil = "2025-11-25", true, a.Deadline
		a.RedactResult = []string{"content"}
	})))
	r.want("invalid")
}

// Whatever comes: no panic, and what is left is clean, and JSON if it was.
func FuzzAnswers(f *testing.F) {
	for _, s := range []string{
		`{"jsonrpc":"2.0","id":1,"result":{"a":"\u001b[1mx","\u202e":["\udb40\udc61"]}}`, `"\ud800"`, `{"a":"\`, `[[[`, `]`, `"\u001b]x`, "\"\u009d\"", `{"a\u202e":1,"a":2}`,
	} {
		f.Add([]byte(s))
	}
	a := answersOf(f, func(o *Options) { o.Answers = Answers{Control: Strip, Invisible: Strip} })
	f.Fuzz(func(t *testing.T, in []byte) {
		kept := bytes.Clone(in)
		out, _, err := a.screen("s", &schemas.Orders{RedactResult: []string{"a", "*.b"}}, in)
		if !bytes.Equal(in, kept) {
			t.Fatal("what came in was changed")
		}
		if err != nil {
			return
		}
		lim := jsonrpc.Limits{Depth: answerDepth, AllowCaseVariants: true}
		if _, err := jsonrpc.Parse(in, lim); err != nil {
			return // what cannot be read does not get here
		}
		if _, err := jsonrpc.Parse(out, lim); err != nil {
			t.Fatalf("%q became %q: %v", in, out, err)
		}
		again, s, err := a.screen("s", nil, out)
		if err != nil || !bytes.Equal(again, out) {
			t.Fatalf("%q became %q and then %q: %v %s", in, out, again, err, foundIn(s))
		}
	})
}

// BenchmarkAnswers is what it costs to look through an answer of 4 KB: clean, as
// nearly all are, and with two secrets.
func BenchmarkAnswers(b *testing.B) {
	a := answersOf(b, nil)
	var words strings.Builder
	for i := 0; words.Len() < 3900; i++ {
		fmt.Fprintf(&words, "Row %d: the token of the session is kept, the key is \"k-%x\" – see https://docs.example/a/%d.\n", i, i*7919, i)
	}
	body := func(text string) []byte {
		q, err := json.Marshal(text)
		if err != nil {
			b.Fatal(err)
		}
		return []byte(`{"jsonrpc":"2.0","id":"c1","result":{"content":[{"type":"text","text":` + string(q) + `}]}}`)
	}
	github := "gh" + "p_" + token36
	for name, text := range map[string]string{"clean": words.String(), "secrets": github + words.String() + github} {
		in := body(text)
		b.Run(name, func(b *testing.B) {
			b.SetBytes(int64(len(in)))
			b.ReportAllocs()
			var before, after syscall.Rusage // the clock says how busy the machine is with other things
			if err := syscall.Getrusage(syscall.RUSAGE_SELF, &before); err != nil {
				b.Fatal(err)
			}
			defer func() {
				if err := syscall.Getrusage(syscall.RUSAGE_SELF, &after); err != nil {
					b.Fatal(err)
				}
				cpu := time.Duration(after.Utime.Nano() + after.Stime.Nano() - before.Utime.Nano() - before.Stime.Nano())
				b.ReportMetric(float64(cpu.Nanoseconds())/1000/float64(b.N), "cpu-µs/op")
			}()
			for b.Loop() {
				if _, s, err := a.screen("s", nil, in); err != nil || (s.Found == nil) != (name == "clean") {
					b.Fatal(err, s)
				}
			}
		})
	}
}
