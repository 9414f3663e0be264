package cli

import (
	"bufio"
	"context"
	"io"
	"iter"
	"net"
	"net/http"
	"net/http/httptest"
	"slices"
	"testing"
	"time"

	"waybill.dev/bus"
	"waybill.dev/schemas"
)

// Who finds no place is told so, and a place that is left can be taken.
func TestFew(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	srv := httptest.NewUnstartedServer(http.NotFoundHandler())
	_ = srv.Listener.Close()
	l := &few{Listener: ln, places: make(chan struct{}, 1)}
	srv.Listener = l
	srv.Start()
	defer srv.Close()
	status := func(c net.Conn) int {
		t.Helper()
		resp, err := http.ReadResponse(bufio.NewReader(c), nil)
		if err != nil {
			t.Fatal(err)
		}
		_, _ = io.Copy(io.Discard, resp.Body)
		return resp.StatusCode
	}
	dial := func() net.Conn {
		t.Helper()
		c, err := net.Dial("tcp", ln.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	first, second := dial(), dial()
	if got := status(second); got != http.StatusServiceUnavailable {
		t.Errorf("the second of one: %d", got)
	}
	_ = first.Close()
	l.places <- struct{}{} // waits until the server has noticed
	<-l.places
	third := dial()
	defer func() { _ = third.Close() }()
	_, _ = io.WriteString(third, "GET / HTTP/1.1\r\nHost: x\r\n\r\n")
	if got := status(third); got != http.StatusNotFound {
		t.Errorf("after the first left: %d", got)
	}
}

// Each write has a deadline, and so has what is written last.
func TestImpatient(t *testing.T) {
	w := &deadlines{ResponseRecorder: httptest.NewRecorder()}
	impatient(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		_, _ = io.WriteString(w, "a")
		_, _ = io.WriteString(w, "b")
	})).ServeHTTP(w, httptest.NewRequest(http.MethodGet, "/", nil))
	if w.set != 4 {
		t.Errorf("%d deadlines, want one before, one for each write, one after", w.set)
	}
}

type deadlines struct {
	*httptest.ResponseRecorder
	set int
}

func (d *deadlines) SetWriteDeadline(at time.Time) error {
	d.set++
	return nil
}

// A session that was opened again is as old as it is, wherever one looks.
func TestOpened(t *testing.T) {
	var log []schemas.Event
	for i, key := range []schemas.SessionKey{"s1", "s2", "s3", "s1", "s1", "s4", "s2"} {
		log = append(log, schemas.Event{Seq: uint64(i + 1), Session: key, Data: &schemas.Opened{}})
	}
	read := func(_ context.Context, f bus.Filter, from uint64) iter.Seq2[schemas.Event, error] {
		return func(yield func(schemas.Event, error) bool) {
			for _, e := range log {
				if e.Seq >= from && (f.Session == "" || f.Session == e.Session) && !yield(e, nil) {
					return
				}
			}
		}
	}
	for limit, want := range map[int][]schemas.SessionKey{
		0: {"s1", "s2", "s3", "s4"}, 1: {"s4"}, 2: {"s3", "s4"}, 3: {"s2", "s3", "s4"}, 9: {"s1", "s2", "s3", "s4"},
	} {
		lines, err := opened(t.Context(), read, bus.Filter{}, limit, 7, 1)
		if err != nil {
			t.Fatal(err)
		}
		var got []schemas.SessionKey
		for _, line := range lines {
			got = append(got, line.Session)
		}
		if !slices.Equal(got, want) {
			t.Errorf("limit %d: %v, want %v", limit, got, want)
		}
	}
}
