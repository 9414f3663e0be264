package edge_test

import (
	"crypto/sha256"
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"waybill.dev/edge"
)

// sized is the head of a request whose body has n bytes, or, when n is
// negative, an unsaid number of them.
func sized(token string, n int) string {
	length := fmt.Sprintf("Content-Length: %d", n)
	if n < 0 {
		length = "Transfer-Encoding: chunked"
	}
	return "POST /x HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n" + length + "\r\nAuthorization: Bearer " + token + "\r\n\r\n"
}

func budgeted(t *testing.T, o edge.Options, serve func(http.ResponseWriter, *http.Request, edge.Principal)) (s *edge.Server, addr string) {
	t.Helper()
	token := func(s string) [32]byte { return sha256.Sum256([]byte(s)) }
	o.Tokens = map[[32]byte]edge.Principal{
		token("a"): {Tenant: "acme", Agent: "a"}, token("b"): {Tenant: "globex", Agent: "b"}, token("c"): {Tenant: "initech", Agent: "c"},
	}
	s, addr, _ = start(t, o, edge.Route{Pattern: "POST /x", Serve: serve})
	return s, addr
}

// bodies waits until so many bytes are taken.
func bodies(t *testing.T, s *edge.Server, want int64) {
	t.Helper()
	again := time.NewTicker(time.Millisecond)
	defer again.Stop()
	for end := time.After(20 * time.Second); s.Stats().Bodies != want; {
		select {
		case <-again.C:
		case <-end:
			t.Fatalf("%d bytes are taken, want %d", s.Stats().Bodies, want)
		}
	}
}

func ask(t *testing.T, addr, request string) (*http.Response, string) {
	t.Helper()
	conn := dial(t, addr)
	if _, err := io.WriteString(conn, request); err != nil {
		t.Fatal(err)
	}
	return read(t, conn)
}

// Bodies in flight have so many bytes and no more, together and of a tenant,
// whether they have come or are only promised.
func TestBodyBudget(t *testing.T) {
	hold, held := make(chan struct{}), make(chan struct{}, 10)
	s, addr := budgeted(t, edge.Options{MaxBody: 100, MaxBodies: 250, MaxBodiesTenant: 150},
		func(w http.ResponseWriter, r *http.Request, p edge.Principal) {
			held <- struct{}{}
			<-hold
			echo(w, r, p)
		})
	refused := func(request string, status int, cause string) {
		t.Helper()
		res, body := ask(t, addr, request)
		if res.StatusCode != status || res.Header.Get("Retry-After") == "" || !strings.Contains(body, `"code":"`+cause+`"`) || !res.Close {
			t.Errorf("%s %v %s, want %d %s", res.Status, res.Header, body, status, cause)
		}
	}
	whole := strings.Repeat("x", 100)

	// One whose body is only promised.
	promised := dial(t, addr)
	fmt.Fprint(promised, sized("a", 100))
	bodies(t, s, 100)
	refused(sized("a", 51), 429, "body_budget_tenant")
	refused(sized("a", -1), 429, "body_budget_tenant") // it may be of 100 bytes
	fmt.Fprint(promised, whole)
	<-held
	bodies(t, s, 100)

	// One of unsaid length holds what it might have, then what it has.
	chunked := dial(t, addr)
	fmt.Fprint(chunked, sized("b", -1)+"5\r\n01234\r\n")
	bodies(t, s, 200)
	refused(sized("c", 51), 503, "body_budget")
	refused(sized("b", 51), 429, "body_budget_tenant") // its own budget is asked first
	fmt.Fprint(chunked, "0\r\n\r\n")
	<-held
	bodies(t, s, 105)

	// What needs nothing and what fits gets in.
	fits := dial(t, addr)
	fmt.Fprint(fits, sized("c", 100)+whole)
	<-held
	empty := dial(t, addr)
	fmt.Fprint(empty, sized("a", 0))
	<-held
	bodies(t, s, 205)
	if res, body := ask(t, addr, sized("c", 101)); res.StatusCode != 413 || res.Header.Get("Retry-After") != "" { // which never fits
		t.Errorf("%s %s", res.Status, body)
	}
	if st := s.Stats(); st.Refused[edge.CauseBodyBudget] != 1 || st.Refused[edge.CauseBodyBudgetTenant] != 3 {
		t.Errorf("%+v", st)
	}

	close(hold)
	for _, conn := range []io.Reader{promised, chunked, fits, empty} {
		if res, body := read(t, conn); res.StatusCode != 200 {
			t.Errorf("%s %s", res.Status, body)
		}
	}
	bodies(t, s, 0)
}

// However a call ends, its bytes are given back.
func TestBodyBudgetGivenBack(t *testing.T) {
	s, addr := budgeted(t, edge.Options{MaxBody: 100, MaxBodies: 100, MaxBodiesTenant: 100, BodyTimeout: 100 * time.Millisecond},
		func(w http.ResponseWriter, r *http.Request, p edge.Principal) {
			switch string(edge.Body(r)) {
			case "panic":
				panic("boom")
			case "abort":
				panic(http.ErrAbortHandler)
			}
			echo(w, r, p)
		})
	for name, c := range map[string]struct {
		request string
		status  int // 0: the connection breaks
	}{
		"served":          {sized("a", 2) + "{}", 200},
		"chunked":         {sized("a", -1) + "2\r\n{}\r\n0\r\n\r\n", 200},
		"panic":           {sized("a", 5) + "panic", 500},
		"abort":           {sized("a", 5) + "abort", 0},
		"never comes":     {sized("a", 100) + "{", 408},
		"chunks stop":     {sized("a", -1) + "2\r\n{}\r\n", 408},
		"chunk is none":   {sized("a", -1) + "zz\r\n", 400},
		"chunks too long": {sized("a", -1) + "65\r\n" + strings.Repeat("x", 101) + "\r\n0\r\n\r\n", 413},
	} {
		conn := dial(t, addr)
		fmt.Fprint(conn, c.request)
		if c.status == 0 {
			if _, err := io.ReadAll(conn); err != nil {
				t.Error(name, err)
			}
		} else if res, body := read(t, conn); res.StatusCode != c.status {
			t.Errorf("%s: %s %s", name, res.Status, body)
		}
		bodies(t, s, 0)
	}
	// The client leaves in the middle of its body. Until the server has noticed
	// the request, nothing being taken says nothing.
	cut := func() uint64 { return s.Stats().Refused[edge.CauseBody] + s.Stats().Refused[edge.CauseBodyTimeout] }
	before := cut()
	conn := dial(t, addr)
	fmt.Fprint(conn, sized("a", 100)+"{")
	conn.Close()
	again := time.NewTicker(time.Millisecond)
	defer again.Stop()
	for end := time.After(20 * time.Second); cut() == before; {
		select {
		case <-again.C:
		case <-end:
			t.Fatal("the request that was cut off is not refused")
		}
	}
	bodies(t, s, 0)
	if res, body := ask(t, addr, sized("a", 100)+strings.Repeat("x", 100)); res.StatusCode != 200 {
		t.Errorf("afterwards: %s %s", res.Status, body)
	}
}

// A budget is never so small that a body of the size that may be sent does not
// fit into it, and bodies larger than a buffer's beginning arrive as they were.
func TestBodyBudgetFitsOne(t *testing.T) {
	const size = 1 << 20
	s, addr := budgeted(t, edge.Options{MaxBody: size, MaxBodies: 1, MaxBodiesTenant: 1}, echo)
	for _, n := range []int{1, 64<<10 - 1, 64 << 10, 64<<10 + 1, size - 1, size} {
		body := strings.Repeat("0123456", n/7+1)[:n]
		for _, request := range []string{sized("a", n) + body, sized("a", -1) + fmt.Sprintf("%x\r\n%s\r\n0\r\n\r\n", n, body)} {
			if res, got := ask(t, addr, request); res.StatusCode != 200 || got != "acme/a "+body {
				t.Errorf("%d bytes: %s, %d bytes", n, res.Status, len(got))
			}
			bodies(t, s, 0)
		}
	}
}

// With many at once the bytes of the bodies that handlers hold are never more
// than the budget, everybody is served or told to come again, and a tenant's
// crowd leaves the others theirs.
func TestBodyBudgetCrowd(t *testing.T) {
	var held, most atomic.Int64
	s, addr := budgeted(t, edge.Options{MaxBody: 100, MaxBodies: 1000, MaxBodiesTenant: 300},
		func(w http.ResponseWriter, r *http.Request, p edge.Principal) {
			n := int64(len(edge.Body(r)))
			now := held.Add(n)
			defer held.Add(-n)
			for m := most.Load(); now > m && !most.CompareAndSwap(m, now); m = most.Load() {
			}
			echo(w, r, p)
		})
	var wg sync.WaitGroup
	for i := range 16 {
		wg.Go(func() {
			for j := range 50 {
				n := (i*50+j)%100 + 1
				request := sized("a", n) + strings.Repeat("x", n)
				if j%2 == 1 {
					request = sized("a", -1) + fmt.Sprintf("%x\r\n%s\r\n0\r\n\r\n", n, strings.Repeat("x", n))
				}
				if res, body := ask(t, addr, request); res.StatusCode != 200 && res.StatusCode != 429 {
					t.Errorf("%s %s", res.Status, body)
				}
			}
		})
	}
	wg.Go(func() { // one at a time of another tenant: 300 + 100 are fewer than 1000
		for range 100 {
			if res, body := ask(t, addr, sized("b", 100)+strings.Repeat("x", 100)); res.StatusCode != 200 {
				t.Errorf("%s %s", res.Status, body)
			}
		}
	})
	wg.Wait()
	if m := most.Load(); m > 400 {
		t.Errorf("%d bytes in flight", m)
	}
	bodies(t, s, 0)
}
