package mcp

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"waybill.dev/schemas"
)

// Every failure there is has an answer that a person can act on.
func TestFailuresComplete(t *testing.T) {
	for _, f := range schemas.Failures() {
		r, ok := failures[f]
		if !ok || r.message == "" || r.code == 0 || r.status == 0 {
			t.Errorf("%s: %+v", f, r)
		}
	}
	if len(failures) != len(schemas.Failures()) {
		t.Error("an answer to a failure that there is not")
	}
	if m := failures[schemas.FailUnknown].message; !strings.Contains(m, "unknown") || !strings.Contains(m, "not repeated") {
		t.Error(m)
	}
}

func TestAccepts(t *testing.T) {
	for in, want := range map[string]string{
		"application/json, text/event-stream":       "true true",
		"text/event-stream,application/json":        "true true",
		"*/*":                                       "true true",
		"application/*":                             "true false",
		"Text/Event-Stream; charset=utf-8":          "false true",
		"application/json;q=0, */*":                 "false true",
		"*/*;q=0, text/event-stream;q=0.001":        "false true",
		"text/event-stream;q=0.0, application/json": "true false",
		"text/html":                                 "false false",
		"":                                          "true true",
	} {
		if j, s := accepts([]string{in}); fmt.Sprint(j, s) != want {
			t.Errorf("%q: %v %v", in, j, s)
		}
	}
	if j, s := accepts(nil); !j || !s {
		t.Error("no header accepts everything")
	}
}

// The set of seen sessions is bounded and keeps what is in use.
func TestSeen(t *testing.T) {
	s := newSeen(10, time.Minute)
	at := time.Now()
	s.age(at)
	s.add("mine")
	for i := range 1000 {
		s.add(schemas.SessionKey(fmt.Sprint(i)))
		if !s.has("mine") {
			t.Fatal("forgotten while in use")
		}
		if n := len(s.now) + len(s.old); n > 10 {
			t.Fatal(n)
		}
	}
	if s.has("1") {
		t.Error("not forgotten")
	}
	s.age(at.Add(59 * time.Second))
	s.age(at.Add(time.Minute))
	s.age(at.Add(119 * time.Second))
	if !s.has("mine") {
		t.Error("forgotten before its time")
	}
	s.age(at.Add(2 * time.Minute)) // it was asked for since
	s.age(at.Add(3 * time.Minute))
	if n := len(s.now) + len(s.old); n != 0 {
		t.Errorf("%d are remembered that nobody has asked for", n)
	}
}
