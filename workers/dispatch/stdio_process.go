package dispatch

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/time/rate"

	"waybill.dev/schemas/jsonrpc"
)

// stdioTiming is what a test makes shorter.
type stdioTiming struct {
	stop   time.Duration // from the end of its standard input to SIGTERM
	term   time.Duration // from there to SIGKILL
	drain  time.Duration // to read what a process that has ended has left in its pipes
	stall  time.Duration // for a process to take a line, and for a reader to make room
	aside  time.Duration // to tell a process what nobody waits for
	pause  time.Duration // before a server that ended by itself is started again; doubles
	pauses time.Duration // the longest
	well   time.Duration // what has run so long was well
	idle   time.Duration // until a process ends that many share and nobody uses
}

var defaultStdioTiming = stdioTiming{
	stop: 2 * time.Second, term: 2 * time.Second, drain: time.Second, stall: 30 * time.Second, aside: 5 * time.Second,
	pause: 500 * time.Millisecond, pauses: time.Minute, well: time.Minute, idle: 10 * time.Minute,
}

const (
	// stdioPipe is how much of a process's output is read at once.
	stdioPipe = 64 << 10

	// stdioWords is the longest line of standard error that is kept.
	stdioWords = 4 << 10

	// stdioEnds is how much of the beginning and of the end of a line that is
	// too long is looked at for whose it is.
	stdioEnds = 1 << 10

	// stdioEndless is how much longer than a message may be a line gets, of which
	// no more than the ends are kept, before its process is ended.
	stdioEndless = 64 << 20

	// stdioAside is how many messages that nobody waits for may be on their way
	// to one process.
	stdioAside = 16
)

// process is one process of a server.
//
// Four goroutines belong to it: one waits for its end, one reads its answers,
// one its standard error, and one writes to it. They end with the process, which
// ends with end, or by itself.
type process struct {
	s       *stdio
	tenant  string // whose calls it serves; "": all, or the gateway's own
	session string // likewise; for the log
	shared  bool   // by many calls that are of no session of its own
	modern  bool   // no session: revision 2026-07-28
	began   time.Time

	cmd                   *exec.Cmd
	stdin, stdout, stderr *os.File

	turn   chan struct{} // who holds it may hand a line to the writer
	lines  chan *line
	ending chan struct{}  // closed by end
	exited chan struct{}  // closed when the process has
	gone   chan struct{}  // closed when nothing of it is left
	pipes  sync.WaitGroup // who reads from it and writes to it
	spoke  atomic.Bool    // it has said something of the protocol
	needed atomic.Bool    // it was asked more than what it is

	words string // the last line of its standard error; of supervise, when all is read

	asides chan struct{}
	noise  *rate.Limiter // of the log: what is no message, or nobody's

	mu       sync.Mutex
	running  bool // stop may be called
	over     bool // no request may begin
	wished   bool // it was we who ended it
	why      error
	asked    map[string]*pending // the requests in flight, by id as JSON
	tokens   map[string]*pending // by progress token as the process knows it, as JSON
	sessions map[string]*stdioSession
	numbered uint64
	company  chan struct{}    // closed when somebody else comes; nil: nobody waits to know
	opened   *jsonrpc.Message // the answer to initialize, when all share the process
	idle     *time.Timer
}

// line is what is written to a process, with its end.
type line struct {
	b     []byte
	done  chan struct{} // closed when the writer is through with it; never, if that ends before it takes it
	wrote atomic.Int64  // bytes; final when done is closed, and when the writer has ended
}

var (
	errStdioClosed  = errors.New("the session is closed")
	errStdioLeft    = errors.New("nobody waited for the session that it was to open")
	errStdioRefused = errors.New("it refused to open a session")
	errStdioAsked   = errors.New("the gateway has asked it what it wanted to know")
	errStdioIdle    = errors.New("nobody used it")
	errStdioDown    = errors.New("the gateway is shutting down")
	errStdioProbed  = errors.New("it does not speak revision " + mcpRevision)
	errStdioSlow    = errors.New("what it says was not read for too long")
)

// thread starts processes. It is one thread and stays for as long as any of them
// runs: the kernel ends them with the thread that started them.
func (s *stdio) thread(starts <-chan func()) {
	runtime.LockOSThread()
	for start := range starts {
		start()
	}
}

// start starts a process. The error is a [*Fault]: nothing was sent to anybody.
func (s *stdio) start(ctx context.Context, c *process) error {
	if err := s.place(ctx, c); err != nil {
		return err
	}
	err := c.open()
	if err == nil {
		started := make(chan error)
		s.starts <- func() { started <- c.cmd.Start() }
		err = <-started
		for _, f := range []*os.File{c.cmd.Stdin.(*os.File), c.cmd.Stdout.(*os.File), c.cmd.Stderr.(*os.File)} {
			f.Close() // the process has its own
		}
		if err != nil {
			c.stdin.Close()
			c.stdout.Close()
			c.stderr.Close()
		}
	}
	if err != nil {
		end := s.left(c, fmt.Errorf("starting it: %w", err), false)
		close(c.gone)
		return end.refused()
	}
	c.log().Info("a server was started", "pid", c.cmd.Process.Pid)
	c.mu.Lock()
	c.began, c.running = time.Now(), true
	if c.shared && !c.over {
		c.idle = time.AfterFunc(s.timing.idle, func() { c.unused() })
	}
	over := c.over
	c.mu.Unlock()
	if over { // the gateway is shutting down
		c.stop()
	}
	c.pipes.Go(c.pump)
	c.pipes.Go(c.hear)
	c.pipes.Go(c.writer)
	s.wg.Go(c.supervise)
	return nil
}

// open makes the command and its pipes.
func (c *process) open() (err error) {
	c.cmd = exec.Command(c.s.command[0], c.s.command[1:]...)
	c.cmd.Env, c.cmd.Dir = c.s.env, c.s.dir
	ownGroup(c.cmd)
	var files [6]*os.File
	for i := 0; i < len(files) && err == nil; i += 2 {
		files[i], files[i+1], err = os.Pipe()
	}
	if err != nil {
		for _, f := range files {
			f.Close() // of nil it is an error and nothing else
		}
		return err
	}
	c.cmd.Stdin, c.stdin = files[0], files[1]
	c.stdout, c.cmd.Stdout = files[2], files[3]
	c.stderr, c.cmd.Stderr = files[4], files[5]
	return nil
}

// supervise waits for the end of the process.
func (c *process) supervise() {
	err := reap(c.cmd)
	close(c.exited)
	c.end(nil, false)
	// Who has left its group may still hold the pipes.
	until := time.Now().Add(c.s.timing.drain)
	_, _ = c.stdout.SetReadDeadline(until), c.stderr.SetReadDeadline(until)
	// Also for the writer, who is told by end that there is no more to do: only
	// then it is certain how much of a line was written, and a call of which
	// nothing was may be made again.
	c.pipes.Wait()
	c.stdout.Close()
	c.stderr.Close()

	how := "it exited with code 0"
	if ended := new(exec.ExitError); errors.As(err, &ended) {
		how = "it exited with code " + fmt.Sprint(ended.ExitCode())
		if w, ok := ended.Sys().(syscall.WaitStatus); ok && w.Signaled() {
			how = "it was ended by a signal: " + w.Signal().String()
		}
	} else if err != nil {
		how = err.Error()
	}
	c.mu.Lock()
	why, wished := c.why, c.wished
	c.mu.Unlock()
	fault := errors.New(how)
	if why != nil {
		fault = fmt.Errorf("%w, and %s", why, how)
	}
	if c.words != "" {
		fault = fmt.Errorf("%w; its last words: %s", fault, c.words)
	}
	level := slog.LevelWarn
	if wished {
		level = slog.LevelInfo
	}
	c.log().Log(context.Background(), level, "a server has ended", "why", fault, "ran", time.Since(c.began).Round(time.Millisecond).String())
	end := c.s.left(c, fault, wished)
	c.mu.Lock()
	var boxes []*mailbox
	for _, p := range c.asked {
		boxes = append(boxes, &p.box)
	}
	for _, s := range c.sessions {
		boxes = append(boxes, &s.box)
	}
	c.mu.Unlock()
	for _, b := range boxes {
		b.fail(end)
	}
	close(c.gone)
}

// end ends the process, unless it is ending: its standard input first, then by
// SIGTERM to its group, then by SIGKILL.
func (c *process) end(why error, wished bool) {
	c.mu.Lock()
	select {
	case <-c.ending:
		c.mu.Unlock()
		return
	default:
	}
	c.over, c.why, c.wished = true, why, wished
	close(c.ending)
	if c.idle != nil {
		c.idle.Stop()
	}
	running := c.running
	c.mu.Unlock()
	if running {
		c.stop()
	}
}

// stop is the way of end. supervise, which is counted in wg, has not come to its
// end before.
func (c *process) stop() {
	c.stdin.Close()
	c.s.wg.Go(func() {
		for _, step := range []struct {
			after  time.Duration
			signal syscall.Signal
		}{{c.s.timing.stop, syscall.SIGTERM}, {c.s.timing.term, syscall.SIGKILL}} {
			t := time.NewTimer(step.after)
			select {
			case <-c.exited:
				t.Stop()
				return
			case <-t.C:
			}
			signalGroup(c.cmd, step.signal)
		}
	})
}

// signalGroup sends a signal to all processes of a command's group. That there
// is none any more is as good.
func signalGroup(cmd *exec.Cmd, sig syscall.Signal) { _ = syscall.Kill(-cmd.Process.Pid, sig) }

// unused ends a process that many share if nobody uses it, and says whether it
// has.
func (c *process) unused() bool {
	c.mu.Lock()
	idle := len(c.asked) == 0 && len(c.sessions) == 0 && !c.over
	c.over = c.over || idle
	c.mu.Unlock()
	if idle {
		c.end(errStdioIdle, true)
	}
	return idle
}

// used starts or stops the time after which a shared process ends. mu is held.
func (c *process) used() {
	switch {
	case c.idle == nil || c.over:
	case len(c.asked) == 0 && len(c.sessions) == 0:
		c.idle.Reset(c.s.timing.idle)
	default:
		c.idle.Stop()
	}
}

// write hands a line to the process. It returns when the line is on its way; the
// error says that it is not.
func (c *process) write(ctx context.Context, b []byte, connected func()) (*line, error) {
	select {
	case c.turn <- struct{}{}:
	case <-ctx.Done():
		return nil, faultf(Unsent, "the server takes no more: %w", context.Cause(ctx))
	case <-c.ending:
		return nil, errLost
	}
	connected()
	l := &line{b: oneLine(b), done: make(chan struct{})}
	c.lines <- l // there is room for who has the turn
	return l, nil
}

// oneLine is JSON on one line: what may stand there of line ends is white space.
// It is a copy.
func oneLine(b []byte) []byte {
	l := make([]byte, len(b)+1)
	copy(l, b)
	l[len(b)] = '\n'
	for i, x := range l[:len(b)] {
		if x == '\n' || x == '\r' {
			l[i] = ' '
		}
	}
	return l
}

func (c *process) writer() {
	for {
		var l *line
		select {
		case l = <-c.lines:
		case <-c.ending:
			return
		}
		_ = c.stdin.SetWriteDeadline(time.Now().Add(c.s.timing.stall)) // a pipe can
		n, err := c.stdin.Write(l.b)
		l.wrote.Store(int64(n))
		close(l.done)
		if err != nil {
			why := fmt.Errorf("it does not take what is sent to it: %w", err)
			if errors.Is(err, syscall.EPIPE) || errors.Is(err, os.ErrClosed) {
				why = nil // it is ending
			}
			c.end(why, false)
			return
		}
		<-c.turn
	}
}

// aside tells the process something that nobody waits for, such as that an
// answer is not wanted any more. It does not block.
func (c *process) aside(b []byte) {
	select {
	case c.asides <- struct{}{}:
	default:
		c.log().Warn("the server takes so little that it is not told all")
		return
	}
	if !c.s.spawn(func() {
		defer func() { <-c.asides }()
		ctx, cancel := context.WithTimeout(context.Background(), c.s.timing.aside)
		defer cancel()
		if _, err := c.write(ctx, b, func() {}); err != nil {
			c.log().Debug("the server was not told", "error", err)
		}
	}) {
		<-c.asides
	}
}

// hear reads the process's standard error into the log: so many lines a second,
// each clipped. It reads on whatever there is, so that the process need not wait.
func (c *process) hear() {
	r := bufio.NewReaderSize(c.stderr, stdioPipe)
	few := rate.NewLimiter(20, 100)
	words := func(b []byte) string { return clip(c.s.hide.Replace(string(b)), maxWords) }
	left := 0
	var last []byte
	for {
		b, _, err := readLine(r, stdioWords, math.MaxInt)
		if b = bytes.TrimSpace(b); len(b) > 0 {
			last = append(last[:0], b...)
			if few.Allow() {
				log := c.log()
				if left > 0 {
					log = log.With("left_out", left)
				}
				log.Info("a server writes", "stderr", words(b))
				left = 0
			} else {
				left++
			}
		}
		if err != nil {
			if left > 0 {
				c.log().Info("a server wrote more to its standard error than is kept", "left_out", left)
			}
			c.words = words(last)
			return
		}
	}
}

// pump reads what the process says.
func (c *process) pump() {
	r := bufio.NewReaderSize(c.stdout, stdioPipe)
	for {
		b, cut, err := readLine(r, c.s.limit, c.s.limit+stdioEndless)
		switch {
		case cut:
			c.tooLong(b)
		case len(bytes.TrimSpace(b)) > 0:
			c.message(b)
		}
		if errors.Is(err, errEndless) {
			c.end(err, false)
			return
		}
		if err != nil {
			c.end(errors.New("it has closed its standard output"), false)
			return
		}
	}
}

// errEndless: a line that is longer than any that is waited for to end.
var errEndless = fmt.Errorf("it has written a line of more than %d MiB and not ended it", stdioEndless>>20)

// readLine reads a line, without its end, up to endless bytes ([errEndless]). Of one that is longer than most it
// returns the beginning and the end, stdioEnds of each, and says so. What stands
// last may be a line that nothing ends.
func readLine(r *bufio.Reader, most, endless int) (b []byte, cut bool, err error) {
	for n := 0; ; {
		part, err := r.ReadSlice('\n')
		if n += len(part); n > endless {
			return b, true, errEndless
		}
		b = append(b, bytes.TrimSuffix(part, []byte("\n"))...)
		if cut = cut || len(b) > most; cut && len(b) > 2*stdioEnds {
			b = append(b[:stdioEnds], b[len(b)-stdioEnds:]...)
		}
		if errors.Is(err, bufio.ErrBufferFull) {
			continue
		}
		return bytes.TrimSuffix(b, []byte("\r")), cut, err
	}
}

func (c *process) log() *slog.Logger {
	log := c.s.log.With("server", c.s.server)
	if c.tenant != "" {
		log = log.With("tenant", c.tenant)
	}
	if c.session != "" {
		log = log.With("session", c.session)
	}
	return log
}

// place counts a process in, unless there are too many, or the server has failed
// and is left alone for now. Where others are about to end it waits for one, and
// if none is, one that nobody uses has to.
func (s *stdio) place(ctx context.Context, c *process) error {
	late := time.NewTimer(s.timing.stop + s.timing.term + s.timing.drain)
	defer late.Stop()
	for {
		s.mu.Lock()
		err := s.allowed(c)
		if err == nil {
			if s.starts == nil {
				s.starts = make(chan func())
				s.threads.Go(func() { s.thread(s.starts) })
			}
			s.children[c] = true
			s.wg.Add(1) // until left
			s.mu.Unlock()
			return nil
		}
		var soon <-chan struct{}
		var spare []*process
		if err.Kind == Busy {
			for other := range s.children {
				if c.tenant != "" && other.tenant != c.tenant && len(s.children) < s.most {
					continue
				}
				select {
				case <-other.ending:
					soon = other.gone
				default:
					if other.shared {
						spare = append(spare, other)
					}
				}
			}
		}
		s.mu.Unlock()
		for _, other := range spare {
			if soon == nil && other.unused() {
				soon = other.gone
			}
		}
		if soon == nil {
			return err
		}
		select {
		case <-soon:
		case <-late.C:
			return err
		case <-ctx.Done():
			return faultf(Unsent, "waiting for a place: %w", context.Cause(ctx))
		}
	}
}

// allowed says why a process may not be started; nil: it may. mu is held.
func (s *stdio) allowed(c *process) *Fault {
	if s.closed {
		return &Fault{Kind: Unsent, Err: errStdioDown}
	}
	for _, key := range []string{"", c.tenant} {
		if i := s.ill[key]; i != nil {
			if left := time.Until(i.until); left > 0 {
				return i.fault(left)
			}
		}
	}
	of := 0
	for other := range s.children {
		if other.tenant == c.tenant {
			of++
		}
	}
	switch share := max(s.most/2, 1); {
	case len(s.children) >= s.most:
		return faultf(Busy, "%d processes of the server run, no more may", len(s.children))
	case (c.tenant != "" || !c.shared) && of >= share:
		return faultf(Busy, "%d processes of the server run for the tenant, no more may", of)
	}
	return nil
}

// illness is what is known of a server that ended by itself: before it said
// anything, for everybody; later, for the tenant in whose session it did.
type illness struct {
	failures int
	at       time.Time // the last
	until    time.Time // it is left alone
	how      error
}

func (i *illness) fault(left time.Duration) *Fault {
	return &Fault{Kind: Refused, After: max(left, 1), Err: fmt.Errorf("the server has ended by itself, %d in a row, and is started again in %s: %w",
		i.failures, max(left, 0).Round(time.Millisecond), i.how)}
}

// stdioEnd is how a process has ended, as it is said to who waits for it.
type stdioEnd struct {
	how error
	ill *Fault // it is left alone for a while; may be nil
}

func (e *stdioEnd) Error() string { return "the server's process has ended: " + e.how.Error() }
func (e *stdioEnd) Unwrap() error { return e.how }

// refused is the end as a fault of what nobody has carried out.
func (e *stdioEnd) refused() *Fault {
	if e.ill != nil {
		return e.ill
	}
	return &Fault{Kind: Refused, Err: e}
}

// left counts a process out.
func (s *stdio) left(c *process, how error, wished bool) *stdioEnd {
	s.mu.Lock()
	defer s.mu.Unlock()
	defer s.wg.Done()
	delete(s.children, c)
	for id, session := range s.sessions {
		if session.c == c {
			delete(s.sessions, id)
		}
	}
	if s.legacy.c == c {
		s.legacy.c = nil
	}
	if at := s.modern[c.tenant]; at != nil && at.c == c {
		at.c = nil
	}
	end := &stdioEnd{how: how}
	key, spoke := "", c.spoke.Load() // of what the gateway asks for itself it is "" as well
	if spoke {
		key = c.tenant
	}
	i, now := s.ill[key], time.Now()
	if i != nil && (!c.began.IsZero() && now.Sub(c.began) >= s.timing.well || now.Sub(i.until) >= s.timing.well) {
		delete(s.ill, key)
		i = nil
	}
	if wished || !c.began.IsZero() && !c.needed.Load() {
		return end // some end because they are asked what they do not know
	}
	if i == nil {
		i = &illness{}
		s.ill[key] = i
	}
	// Of those that ran beside each other one counts.
	if c.began.IsZero() || c.began.After(i.at) {
		i.failures++
		n := i.failures - 1
		if spoke {
			n-- // the first time it is started again at once
		}
		i.at, i.until = now, now
		if n >= 0 {
			i.until = now.Add(min(s.timing.pause<<min(n, 16), s.timing.pauses))
		}
	}
	i.how = how
	if left := i.until.Sub(now); left > 0 {
		end.ill = i.fault(left)
	}
	return end
}

// hidden replaces what may not be logged, whoever says it.
func hidden(secrets []string) *strings.Replacer {
	var pairs []string
	for _, s := range secrets {
		if s != "" {
			pairs = append(pairs, s, "[secret]")
		}
	}
	return strings.NewReplacer(pairs...)
}
