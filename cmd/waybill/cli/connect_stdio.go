package cli

import (
	"bufio"
	"bytes"
	"errors"
	"io"
	"sync"
)

// stdinLine is one line of the client's, without its end.
type stdinLine struct {
	text    []byte
	tooLong bool // longer than it may be; the text is missing
}

// readLines reads lines until the end of in, and gives each to take, which
// says whether to go on. A line that is too long is skipped, whatever its
// length: no more than most bytes of it are ever held. The last line needs no
// end. The error is that of in, nil at its end.
func readLines(in io.Reader, most int, take func(stdinLine) bool) error {
	r := bufio.NewReaderSize(in, 64<<10)
	var line []byte
	skip := false
	for {
		piece, err := r.ReadSlice('\n')
		switch {
		case skip:
		case len(line)+len(bytes.TrimRight(piece, "\r\n")) > most:
			line, skip = nil, true
		default:
			line = append(line, piece...)
		}
		if errors.Is(err, bufio.ErrBufferFull) {
			continue
		}
		if skip || len(line) > 0 {
			if !take(stdinLine{bytes.Trim(line, " \t\r\n"), skip}) {
				return nil
			}
		}
		line, skip = nil, false
		switch {
		case err == io.EOF:
			return nil
		case err != nil:
			return err
		}
	}
}

// lineWriter writes whole lines to the client, from any goroutine. After the
// first that fails broken is closed and nothing more is written.
type lineWriter struct {
	broken chan struct{}

	mu  sync.Mutex // guards what follows
	out io.Writer
	err error
	buf []byte
}

func newLineWriter(out io.Writer) *lineWriter {
	return &lineWriter{out: out, broken: make(chan struct{})}
}

// write writes one message. What ends a line within it, which in JSON can only
// stand between tokens, becomes a space.
func (w *lineWriter) write(message []byte) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.err != nil {
		return w.err
	}
	w.buf = append(append(w.buf[:0], bytes.TrimSpace(message)...), '\n')
	for i, c := range w.buf[:len(w.buf)-1] {
		if c == '\n' || c == '\r' {
			w.buf[i] = ' '
		}
	}
	if _, w.err = w.out.Write(w.buf); w.err != nil {
		close(w.broken)
	}
	if cap(w.buf) > 1<<20 {
		w.buf = nil
	}
	return w.err
}
