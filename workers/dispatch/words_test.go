package dispatch

import (
	"context"
	"fmt"
	"net/http"
	"strings"
	"testing"
	"unicode/utf8"

	"waybill.dev/schemas"
)

func TestClip(t *testing.T) {
	for _, c := range []struct {
		in   string
		n    int
		want string
	}{
		{"", 4, ""}, {"abcd", 4, "abcd"}, {"abcde", 4, "a…"}, {"aéé", 5, "aéé"}, {"aéééé", 5, "a…"}, {"日本", 5, "…"}, {"a\xffb", 8, "a\uFFFDb"},
	} {
		if got := clip(c.in, c.n); got != c.want {
			t.Errorf("%q to %d bytes: %q, want %q", c.in, c.n, got, c.want)
		}
	}
}

// An ending has room for a few words of others, and no more.
func TestWords(t *testing.T) {
	const long = 100 << 10
	isCut := func(s string, n int) {
		t.Helper()
		if len(s) > n || len(s) < n-utf8.UTFMax || !strings.HasSuffix(s, "…") || !utf8.ValidString(s) {
			t.Errorf("%d bytes of %d, ending in %q", len(s), n, s[max(0, len(s)-8):])
		}
	}
	r := newRig(t, nil)
	r.use(r.d, func(context.Context, Call, func([]byte) error) (Answer, error) {
		return Answer{}, faultf(Garbled, "it said %s", strings.Repeat("é", long))
	})
	r.handle(r.call("write"))
	isCut(r.want("bad_answer").Data.(*schemas.Failed).Detail, 500)

	for name, tell := range map[string]func(*rig, schemas.Event, schemas.Payload){
		"cancelled": func(r *rig, e schemas.Event, p schemas.Payload) { _ = r.d.Cancel(t.Context(), e.Next(p, nil), nil) },
		"cancelled in the past": func(r *rig, e schemas.Event, p schemas.Payload) {
			r.log.add(e.Next(p, nil))
			r.d = r.fresh()
		},
	} {
		t.Run(name, func(t *testing.T) {
			r := newRig(t, nil)
			e := r.call("write")
			tell(r, e, &schemas.Cancel{Reason: strings.Repeat("é", long)})
			r.use(r.d, never(t))
			for _, reason := range r.d.calls.young {
				isCut(reason, 500) // thousands of them are kept in memory
			}
			r.handle(e)
			isCut(r.want("cancelled").Data.(*schemas.Cancelled).Reason, 500)
		})
	}
}

func TestResultType(t *testing.T) {
	for n, want := range map[int]string{64: "completed", 65: "bad_answer", 100 << 10: "bad_answer"} {
		r := newRig(t, func(w http.ResponseWriter, req *http.Request) {
			fmt.Fprintf(w, `{"jsonrpc":"2.0","id":%s,"result":{"resultType":"%s"}}`, idOf(req), strings.Repeat("x", n))
		})
		r.handle(r.call("write"))
		r.want(want)
	}
}

// A list of which much is removed says what, as far as there is room.
func TestRemovedMore(t *testing.T) {
	var list strings.Builder
	for i := range 60 {
		fmt.Fprintf(&list, `{"name":"w%02d%s"},`, i, strings.Repeat("é", i*10))
	}
	r := newRig(t, func(w http.ResponseWriter, req *http.Request) {
		fmt.Fprintf(w, `{"jsonrpc":"2.0","id":%s,"result":{"tools":[%s{"name":"read"}]}}`, idOf(req), list.String())
	})
	only := authorized(func(a *schemas.Authorized) { a.Only = []string{"read"} })
	r.handle(r.method("tools/list", "", `{"jsonrpc":"2.0","id":1,"method":"tools/list"}`, only))
	end := r.want("completed")
	c := end.Data.(*schemas.Completed)
	if len(c.Removed) != 50 || c.RemovedMore != 10 || c.Removed[0] != "w00" || !strings.Contains(string(end.Body), `"tools":[{"name":"read"}]`) {
		t.Errorf("%q and %d more\n%s", c.Removed, c.RemovedMore, end.Body)
	}
	for i, name := range c.Removed {
		if len(name) > 128 || !utf8.ValidString(name) || (i*20+3 > 128) != strings.HasSuffix(name, "…") {
			t.Errorf("%d bytes: %s", len(name), name)
		}
	}
}
