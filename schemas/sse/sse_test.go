package sse

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math"
	"reflect"
	"strings"
	"testing"
	"testing/iotest"
	"time"

	"pgregory.net/rapid"
)

// collect reads to the end.
func collect(r io.Reader, maxEvent int) ([]Event, error) {
	var events []Event
	for e, err := range Read(r, maxEvent) {
		if err != nil {
			return events, err
		}
		events = append(events, e)
	}
	return events, nil
}

func data(s string) Event { return Event{Data: []byte(s)} }

func TestRead(t *testing.T) {
	for _, c := range []struct {
		name, stream string
		max          int
		want         []Event
		err          error
	}{
		{name: "nothing"},
		{name: "blank lines", stream: "\n\r\n\r\r\n\n"},
		{name: "one", stream: "data: a\n\n", want: []Event{data("a")}},
		{name: "crlf", stream: "data: a\r\ndata: b\r\n\r\n", want: []Event{data("a\nb")}},
		{name: "cr", stream: "data: a\rdata: b\r\rdata: c\r\r", want: []Event{data("a\nb"), data("c")}},
		{name: "mixed", stream: "data: a\rdata: b\ndata: c\r\n\n", want: []Event{data("a\nb\nc")}},
		{name: "lf cr", stream: "data: a\n\rdata: b\n\r", want: []Event{data("a"), data("b")}},
		{name: "no space", stream: "data:a\n\n", want: []Event{data("a")}},
		{name: "two spaces", stream: "data:  a \n\n", want: []Event{data(" a ")}},
		{name: "colons", stream: "data: a: b:\n\n", want: []Event{data("a: b:")}},
		{name: "no colon", stream: "data\n\n", want: []Event{data("")}},
		{name: "empty data", stream: "data:\n\n", want: []Event{data("")}},
		{name: "empty data twice", stream: "data\ndata\n\n", want: []Event{data("\n")}},
		{name: "empty lines in data", stream: "data: \ndata: a\ndata:\n\n", want: []Event{data("\na\n")}},
		{name: "all fields", stream: "event: add\nid: 7-0\nretry: 1500\ndata: {}\n\n",
			want: []Event{{Name: "add", ID: "7-0", HasID: true, Retry: 1500 * time.Millisecond, Data: []byte("{}")}}},
		{name: "nothing is carried over", stream: "event: a\nid: 1\ndata: x\n\ndata: y\n\n",
			want: []Event{{Name: "a", ID: "1", HasID: true, Data: []byte("x")}, data("y")}},
		{name: "last wins", stream: "event: a\nevent: b\nid: 1\nid: 2\nretry: 1\nretry: 2\ndata:\n\n",
			want: []Event{{Name: "b", ID: "2", HasID: true, Retry: 2 * time.Millisecond, Data: []byte{}}}},
		{name: "priming", stream: "id: 1\nretry: 3000\ndata: \n\n",
			want: []Event{{ID: "1", HasID: true, Retry: 3 * time.Second, Data: []byte{}}}},
		{name: "id alone", stream: "id: 1\n\n", want: []Event{{ID: "1", HasID: true}}},
		{name: "empty id", stream: "id\ndata: a\n\nid: \n\n", want: []Event{{HasID: true, Data: []byte("a")}, {HasID: true}}},
		{name: "id with nul", stream: "id: a\x00b\ndata: a\n\n", want: []Event{data("a")}},
		{name: "id with nul after a good one", stream: "id: a\nid: \x00\ndata: a\n\n", want: []Event{{ID: "a", HasID: true, Data: []byte("a")}}},
		{name: "name alone", stream: "event: ping\n\n", want: []Event{{Name: "ping"}}},
		{name: "retry now", stream: "retry: 0\n\nretry: 000\n\n", want: []Event{{Retry: RetryNow}, {Retry: RetryNow}}},
		{name: "bad retry", stream: "retry: -1\nretry: 1.5\nretry:\nretry: 1s\nretry: \u0661\n\n"},
		{name: "endless retry", stream: "retry: " + strings.Repeat("9", 1000) + "\n\nretry: 9223372036854\n\nretry: 9223372036855\n\n",
			want: []Event{{Retry: maxRetry}, {Retry: maxRetry}, {Retry: maxRetry}}},
		{name: "unknown fields", stream: "foo: a\nDATA: b\n data: c\ndata : d\n\n"},
		{name: "comments", stream: ": ping\n\n:\n:x: y\r:  z\n", want: []Event{{Comment: "ping"}, {}, {Comment: "x: y"}, {Comment: " z"}}},
		{name: "comment in an event", stream: "data: a\n: ping\ndata: b\n\n", want: []Event{{Comment: "ping"}, data("a\nb")}},
		{name: "bom", stream: "\ufeffdata: a\n\n", want: []Event{data("a")}},
		{name: "bom alone", stream: "\ufeff\ndata: a\n\n", want: []Event{data("a")}},
		{name: "bom twice", stream: "\ufeff\ufeffdata: a\n\n"},
		{name: "bom later", stream: "\n\ufeffdata: a\n\n"},
		{name: "not utf-8", stream: "data: \xff\xfe\n\n", want: []Event{data("\xff\xfe")}},
		{name: "nul", stream: "data: a\x00b\n\n", want: []Event{data("a\x00b")}},
		{name: "cut in a line", stream: "data: a\n\ndata: b", want: []Event{data("a")}, err: io.ErrUnexpectedEOF},
		{name: "cut after a line", stream: "data: b\n", err: io.ErrUnexpectedEOF},
		{name: "cut after a line, cr", stream: "data: b\r", err: io.ErrUnexpectedEOF},
		{name: "cut in a field name", stream: "da", err: io.ErrUnexpectedEOF},
		{name: "cut in a comment", stream: ": pin", err: io.ErrUnexpectedEOF},
		{name: "cut after a comment", stream: ": ping\n", want: []Event{{Comment: "ping"}}},
		{name: "cut after an unknown field", stream: "foo\n", err: io.ErrUnexpectedEOF},
		{name: "cut in a bom", stream: "\xef\xbb", err: io.ErrUnexpectedEOF},
		{name: "large enough", stream: "data: 1234\n\ndata: 5678\n\n", max: 10, want: []Event{data("1234"), data("5678")}},
		{name: "too large", stream: "data: 1234\n\ndata: 56789\n\n", max: 10, want: []Event{data("1234")}, err: ErrTooLarge},
		{name: "too large in lines", stream: "data:1\nid:1\n\n", max: 9, err: ErrTooLarge},
		{name: "too large unfinished", stream: "data: 56789", max: 10, err: ErrTooLarge},
		{name: "too large comment", stream: ":" + strings.Repeat("x", 10) + "\n", max: 10, err: ErrTooLarge},
		{name: "many comments", stream: "data: a\n" + strings.Repeat(":x\n", 3) + "\n", max: 10,
			want: []Event{{Comment: "x"}, {Comment: "x"}, {Comment: "x"}, data("a")}},
	} {
		t.Run(c.name, func(t *testing.T) {
			for how, r := range map[string]io.Reader{
				"whole": strings.NewReader(c.stream),
				"bytes": iotest.OneByteReader(strings.NewReader(c.stream)),
				"eof":   iotest.DataErrReader(strings.NewReader(c.stream)),
			} {
				got, err := collect(r, c.max)
				if !errors.Is(err, c.err) || !reflect.DeepEqual(got, c.want) {
					t.Errorf("%s:\n got %+v, %v\nwant %+v, %v", how, got, err, c.want, c.err)
				}
			}
			ref, err := reference([]byte(c.stream), c.max)
			if !errors.Is(err, c.err) || !reflect.DeepEqual(ref, c.want) {
				t.Errorf("reference:\n got %+v, %v\nwant %+v, %v", ref, err, c.want, c.err)
			}
		})
	}
}

// Each event must be there before another byte is asked for.
func TestReadDoesNotWait(t *testing.T) {
	for _, c := range []struct {
		pieces []string
		counts []int // events after each piece
	}{
		{[]string{"data: a\n", "\n", "data: b\n\n"}, []int{0, 1, 2}},
		{[]string{"data: a\r\n\r", "\n", "data: b\r\n\r\n"}, []int{1, 1, 2}},
		{[]string{"data: a\r", "\n", "\r", "\ndata: b\r", "\r"}, []int{0, 0, 1, 1, 2}},
		{[]string{"data: a\r\r", "data: b\r\r\n"}, []int{1, 2}},
		{[]string{": ping\n", ":\r", "data: a\n", ": x\n", "\n"}, []int{1, 2, 2, 3, 4}},
		{[]string{"\xef", "\xbb\xbf", "data: a\n\n"}, []int{0, 0, 1}},
	} {
		piece, n := 0, 0
		r := readerFunc(func(p []byte) (int, error) {
			if piece > 0 && n != c.counts[piece-1] {
				t.Errorf("%q: %d events after piece %d, want %d", c.pieces, n, piece, c.counts[piece-1])
			}
			if piece == len(c.pieces) {
				return 0, io.EOF
			}
			piece++
			return copy(p, c.pieces[piece-1]), nil
		})
		for _, err := range Read(r, 0) {
			if err != nil {
				t.Errorf("%q: %v", c.pieces, err)
			}
			n++
		}
		if n != c.counts[len(c.counts)-1] {
			t.Errorf("%q: %d events", c.pieces, n)
		}
	}
}

type readerFunc func([]byte) (int, error)

func (f readerFunc) Read(p []byte) (int, error) { return f(p) }

func TestReadErrors(t *testing.T) {
	broken := errors.New("broken")
	got, err := collect(io.MultiReader(strings.NewReader("data: a\n\ndata: b\n"), iotest.ErrReader(broken)), 0)
	if !errors.Is(err, broken) || len(got) != 1 {
		t.Errorf("got %v, %v", got, err)
	}
	got, err = collect(readerFunc(func([]byte) (int, error) { return 0, nil }), 0)
	if !errors.Is(err, io.ErrNoProgress) || got != nil {
		t.Errorf("got %v, %v", got, err)
	}
	// Data that comes together with the error is not lost.
	got, err = collect(readerFunc(func(p []byte) (int, error) { return copy(p, "data: a\n\n"), broken }), 0)
	if !errors.Is(err, broken) || len(got) != 1 {
		t.Errorf("got %v, %v", got, err)
	}
	// Leaving the loop ends the reading.
	reads := 0
	for e := range Read(readerFunc(func(p []byte) (int, error) { reads++; return copy(p, "data: a\n\ndata: b\n\n"), nil }), 0) {
		if string(e.Data) != "a" {
			t.Error(e)
		}
		break
	}
	if reads != 1 {
		t.Errorf("%d reads", reads)
	}
}

func TestEventsOwnTheirMemory(t *testing.T) {
	got, err := collect(strings.NewReader("data: a\ndata: b\n\ndata: c\ndata: d\n\n"), 0)
	if err != nil || len(got) != 2 {
		t.Fatal(got, err)
	}
	_ = append(got[0].Data, "xxxxxxxx"...)
	if string(got[0].Data) != "a\nb" || string(got[1].Data) != "c\nd" {
		t.Errorf("%+v", got)
	}
}

func TestAppend(t *testing.T) {
	for _, c := range []struct {
		e    Event
		want string
	}{
		{Event{}, ":\n\n"},
		{Event{Comment: "ping"}, ": ping\n\n"},
		{Event{Comment: "a\nb\r\n\rc"}, ": a\n: b\n:\n: c\n\n"},
		{Event{Comment: " x", Data: []byte("a")}, ":  x\ndata: a\n\n"},
		{data(""), "data:\n\n"},
		{data("a"), "data: a\n\n"},
		{data(" a"), "data:  a\n\n"},
		{data("a\nb"), "data: a\ndata: b\n\n"},
		{data("\n"), "data:\ndata:\n\n"},
		{data("a\r\nb\rc\n\rd\r"), "data: a\ndata: b\ndata: c\ndata:\ndata: d\ndata:\n\n"},
		{Event{ID: "7-0", Name: "add", Retry: 1500 * time.Millisecond, Data: []byte("{}")}, "event: add\nid: 7-0\nretry: 1500\ndata: {}\n\n"},
		{Event{HasID: true}, "id: \n\n"},
		{Event{ID: "1"}, "id: 1\n\n"},
		{Event{ID: "1\ndata: evil\r\x00", Name: "a\nb\r\rid: c\x00"}, "event: abid: c\x00\nid: 1data: evil\n\n"},
		{Event{Retry: RetryNow}, "retry: 0\n\n"},
		{Event{Retry: time.Nanosecond}, "retry: 1\n\n"},
		{Event{Retry: time.Millisecond + 1}, "retry: 2\n\n"},
		{Event{Retry: math.MaxInt64}, "retry: 9223372036855\n\n"},
	} {
		if got := string(Append([]byte("x"), c.e)); got != "x"+c.want {
			t.Errorf("%+v:\n got %q\nwant %q", c.e, got, c.want)
		}
	}
}

func TestNormalize(t *testing.T) {
	for in, want := range map[string]string{
		"": "", "a\nb": "a\nb", "a\r\nb": "a\nb", "\r": "\n", "\r\r\n\n\r": "\n\n\n\n", "{\r\n \"a\":1\r}": "{\n \"a\":1\n}",
	} {
		in := []byte(in)
		before := bytes.Clone(in)
		if got := string(Normalize(in)); got != want {
			t.Errorf("%q: %q", in, got)
		}
		if !bytes.Equal(before, in) {
			t.Errorf("%q was changed", before)
		}
	}
}

// What is appended is read, however it is cut, and line ends of every kind make
// no difference.
func TestRoundTrip(t *testing.T) {
	text := rapid.StringOf(rapid.SampledFrom([]rune("ab: {}\",\n\n\r\t\x00\ufeffé")))
	line := rapid.StringOf(rapid.SampledFrom([]rune("ab: {}\",\té")))
	rapid.Check(t, func(t *rapid.T) {
		var stream []byte
		var want []Event
		for range rapid.IntRange(0, 5).Draw(t, "n") {
			var e Event
			if rapid.Bool().Draw(t, "comment") {
				e.Comment = line.Draw(t, "comment")
			} else {
				if rapid.Bool().Draw(t, "hasdata") {
					e.Data = []byte(text.Draw(t, "data"))
				}
				e.Name = line.Draw(t, "name")
				if e.HasID = rapid.Bool().Draw(t, "hasid"); e.HasID {
					e.ID = line.Draw(t, "id")
				}
				e.Retry = time.Millisecond * time.Duration(rapid.IntRange(0, 3).Draw(t, "retry"))
			}
			stream = Append(stream, e)
			if e.Data != nil {
				e.Data = Normalize(e.Data)
			}
			want = append(want, e)
		}
		if rapid.Bool().Draw(t, "crlf") {
			end := rapid.SampledFrom([]string{"\r", "\r\n"}).Draw(t, "end")
			stream = bytes.ReplaceAll(stream, []byte("\n"), []byte(end))
		}
		got, err := collect(pieces(stream, func() int { return rapid.IntRange(1, 9).Draw(t, "piece") }), 0)
		if err != nil || !reflect.DeepEqual(got, want) {
			t.Fatalf("%q\n got %+v, %v\nwant %+v", stream, got, err, want)
		}
	})
}

// pieces reads stream in pieces of the given sizes.
func pieces(stream []byte, size func() int) io.Reader {
	return readerFunc(func(p []byte) (int, error) {
		if len(stream) == 0 {
			return 0, io.EOF
		}
		n := copy(p, stream[:min(len(stream), size())])
		stream = stream[n:]
		return n, nil
	})
}

// reference reads a whole stream at once, as the standard is written, plus our
// three rules: what is too large, what is cut, comments as events.
func reference(stream []byte, maxEvent int) (events []Event, err error) {
	if maxEvent <= 0 {
		maxEvent = DefaultMaxEvent
	}
	s := strings.ReplaceAll(strings.ReplaceAll(string(stream), "\r\n", "\n"), "\r", "\n")
	lines := strings.Split(s, "\n")
	var e Event
	size, open := 0, false
	for i, line := range lines {
		if size+len(line) > maxEvent {
			return events, ErrTooLarge
		}
		if i == len(lines)-1 {
			if line != "" || open {
				return events, io.ErrUnexpectedEOF
			}
			return events, nil
		}
		if i == 0 {
			line = strings.TrimPrefix(line, "\ufeff")
		}
		field, value, _ := strings.Cut(line, ":")
		value = strings.TrimPrefix(value, " ")
		switch {
		case line == "":
			if !reflect.DeepEqual(e, Event{}) {
				events = append(events, e)
			}
			e, size, open = Event{}, 0, false
			continue
		case line[0] == ':':
			events = append(events, Event{Comment: value})
			continue
		case field == "data" && e.Data == nil:
			e.Data = append([]byte{}, value...)
		case field == "data":
			e.Data = append(append(e.Data, '\n'), value...)
		case field == "event":
			e.Name = value
		case field == "id" && !strings.Contains(value, "\x00"):
			e.ID, e.HasID = value, true
		case field == "retry" && value != "" && strings.Trim(value, "0123456789") == "":
			value = strings.TrimLeft(value, "0")
			ms := int64(0)
			if len(value) > 15 {
				ms = math.MaxInt64
			} else if value != "" {
				fmt.Sscan(value, &ms)
			}
			e.Retry = time.Duration(min(ms, int64(maxRetry/time.Millisecond))) * time.Millisecond
			if ms == 0 {
				e.Retry = RetryNow
			}
		}
		open, size = true, size+len(line)
	}
	return events, nil
}

// FuzzRead: whatever the bytes and however they come in pieces, Read gives what
// the reference gives, and writing that and reading it again gives it again.
func FuzzRead(f *testing.F) {
	for _, s := range []string{
		"data: a\n\n", "data: a\r\n\r\n", "data: a\r\r", "\ufeffdata: a\n\n: ping\n\nid\n\n",
		"event: message\nid: 1-0\nretry: 100\ndata: {\"jsonrpc\":\"2.0\"\ndata: ,\"id\":1,\"result\":{}}\n\n",
		"data", ":\n", "retry: 99999999999999999999\n\n", "id: \x00\n\n\r\n\r\ndata\n\n", "data: a\n: c\ndata: b\n\nfoo\n\n",
		"event: content_block_delta\ndata: {\"type\":\"x\"}\n\ndata: [DONE]\n\n",
	} {
		f.Add([]byte(s), byte(3), uint16(20))
		f.Add([]byte(s), byte(1), uint16(0))
	}
	f.Fuzz(func(t *testing.T, stream []byte, piece byte, maxEvent uint16) {
		want, wantErr := reference(stream, int(maxEvent))
		got, err := collect(pieces(stream, func() int { return int(piece) + 1 }), int(maxEvent))
		if !reflect.DeepEqual(got, want) || !errors.Is(err, wantErr) || (err == nil) != (wantErr == nil) {
			t.Fatalf("%q in %d, at most %d\n got %+v, %v\nwant %+v, %v", stream, int(piece)+1, maxEvent, got, err, want, wantErr)
		}
		var again []byte
		for _, e := range got {
			again = Append(again, e)
		}
		back, err := collect(bytes.NewReader(again), 0)
		if err != nil || !reflect.DeepEqual(back, got) {
			t.Fatalf("%q\nwritten as %q\n got %+v, %v\nwant %+v", stream, again, back, err, got)
		}
	})
}

// Streams that take minutes if anything is quadratic. There is no clock: the
// test binary's own time limit is the guard.
func TestLinear(t *testing.T) {
	n := 2 << 20
	if raceEnabled {
		n = 1 << 16
	}
	for name, stream := range map[string]string{
		"one line":        "data: " + strings.Repeat("x", n) + "\n\n",
		"lines":           strings.Repeat("data\n", n/5) + "\n",
		"lines, cr":       strings.Repeat("data\r", n/5) + "\r",
		"events":          strings.Repeat("data\n\n", n/6),
		"comments":        strings.Repeat(":\n", n/2),
		"blank":           strings.Repeat("\n", n),
		"blank, cr":       strings.Repeat("\r", n),
		"digits":          "retry: " + strings.Repeat("9", n) + "\n\n",
		"unknown, no end": strings.Repeat("\ufeff\x00", n/4),
	} {
		t.Run(name, func(t *testing.T) {
			r := io.Reader(strings.NewReader(stream))
			if name == "one line" {
				r = iotest.HalfReader(r)
			}
			if _, err := collect(r, n+100); err != nil && !errors.Is(err, io.ErrUnexpectedEOF) {
				t.Error(err)
			}
		})
	}
}

func BenchmarkRead(b *testing.B) {
	one := Append(nil, Event{ID: "4711-0", HasID: true, Data: []byte(`{"jsonrpc":"2.0","id":1,"result":{"content":[{"type":"text","text":"` + strings.Repeat("x", 900) + `"}]}}`)})
	chunkOf := Append(nil, data(`{"id":"c","object":"chat.completion.chunk","choices":[{"index":0,"delta":{"content":" word"}}]}`))
	for name, stream := range map[string][]byte{
		"1KB":         one,
		"1000x100B":   bytes.Repeat(chunkOf, 1000),
		"1MBonedata":  Append(nil, Event{Data: bytes.Repeat([]byte("x"), 1<<20)}),
		"1000x100BCR": bytes.ReplaceAll(bytes.Repeat(chunkOf, 1000), []byte("\n"), []byte("\r")),
	} {
		b.Run(name, func(b *testing.B) {
			b.SetBytes(int64(len(stream)))
			b.ReportAllocs()
			for b.Loop() {
				for _, err := range Read(bytes.NewReader(stream), 0) {
					if err != nil {
						b.Fatal(err)
					}
				}
			}
		})
	}
}

func BenchmarkAppend(b *testing.B) {
	e := Event{ID: "4711-0", Data: []byte(`{"jsonrpc":"2.0","id":1,"result":{"content":[{"type":"text","text":"` + strings.Repeat("x", 900) + `"}]}}`)}
	b.SetBytes(int64(len(e.Data)))
	b.ReportAllocs()
	var dst []byte
	for b.Loop() {
		dst = Append(dst[:0], e)
	}
}
