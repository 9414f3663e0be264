// Command chserve serves ClickHouse on loopback out of libchdb: the real HTTP
// and native servers, in a process of their own. `waybill up` runs it as its
// child; it is a program beside the gateway because the library makes a program
// dynamically linked and 200 MB large, and takes the process with it when it
// falls.
//
//	chserve --dir DIR [--library FILE] [--memory BYTES] [--http ADDR] [--native ADDR]
//	chserve --check
//
// It prints one line, {"http":"127.0.0.1:…","native":"127.0.0.1:…"}, when both
// servers listen, and serves until its standard input ends or it is told to
// stop (SIGTERM). DIR holds the tables and, in files that only their owner can
// read, the passwords of its two users (users.go). It exits with 3 where it can
// serve neither now nor later, on this machine; --check says only that.
package main

import (
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"
	"time"
)

func main() {
	if err := run(os.Args[1:]); err != nil {
		_, _ = fmt.Fprintln(os.Stderr, "chserve:", err)
		if errors.Is(err, errUnsupported) {
			os.Exit(3)
		}
		os.Exit(1)
	}
}

// errUnsupported is wrapped by the error of a machine on which the engine cannot run.
var errUnsupported = errors.New("the engine cannot run here")

// options are the command line.
type options struct {
	dir, library string
	memory       int64
	http, native string
}

func run(args []string) error {
	o := options{}
	fs := flag.NewFlagSet("chserve", flag.ContinueOnError)
	fs.StringVar(&o.dir, "dir", "", "`DIR` of the tables, made when missing")
	fs.StringVar(&o.library, "library", "", "`FILE` with the engine (default: libchdb.so beside this program)")
	fs.Int64Var(&o.memory, "memory", 1e9, "the engine's memory in `BYTES`, at most")
	fs.StringVar(&o.http, "http", "127.0.0.1:0", "loopback `ADDR` of the HTTP server")
	fs.StringVar(&o.native, "native", "127.0.0.1:0", "loopback `ADDR` of the native server")
	check := fs.Bool("check", false, "tell whether the engine can run on this machine")
	again := len(args) > 0 && args[len(args)-1] == confined
	if again {
		args = args[:len(args)-1]
	}
	if err := fs.Parse(args); err != nil {
		return err
	}
	if *check {
		_, err := confinement()
		return err
	}
	if o.dir == "" || fs.NArg() > 0 {
		return fmt.Errorf("usage: chserve --dir DIR [--library FILE] [--memory BYTES] [--http ADDR] [--native ADDR]")
	}
	if o.library == "" {
		program, err := os.Executable()
		if err != nil {
			return err
		}
		if program, err = filepath.EvalSymlinks(program); err != nil {
			return err
		}
		o.library = filepath.Join(filepath.Dir(program), "libchdb.so")
	}
	var err error
	if o.library, err = filepath.EvalSymlinks(o.library); err != nil {
		return fmt.Errorf("the engine's library: %w; `make build` installs it", err)
	}
	if o.dir, err = filepath.Abs(o.dir); err != nil {
		return err
	}
	config := filepath.Join(o.dir, "config.xml")
	if !again {
		if err := configure(o.dir, config, o.memory); err != nil {
			return err
		}
		return confine(o, config)
	}

	stop := make(chan os.Signal, 1)
	signal.Notify(stop, syscall.SIGTERM, syscall.SIGINT, syscall.SIGHUP)
	e, err := start(o, config)
	if err != nil {
		return err
	}
	go func() {
		_, _ = io.Copy(io.Discard, e.stdin) // whoever holds the other end has us live
		stop <- syscall.SIGHUP
	}()
	for {
		select {
		case <-stop:
			e.exit()
			select {
			case <-e.done:
			case <-time.After(5 * time.Second): // a query that does not end; a table survives worse
			}
			return nil
		case code := <-e.done:
			return fmt.Errorf("the engine ended by itself, with code %d: %s", code, e.said())
		case at := <-e.listening:
			if err := json.NewEncoder(e.stdout).Encode(at); err != nil {
				return err
			}
		}
	}
}
