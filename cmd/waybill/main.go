// Command waybill is the gateway and the commands to look into it.
package main

import (
	"context"
	"os"
	"os/signal"
	"syscall"

	"waybill.dev/cmd/waybill/cli"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	context.AfterFunc(ctx, stop) // a second Ctrl-C ends the process at once
	terminal := isTerminal(os.Stdout)
	os.Exit(cli.Run(ctx, os.Args[1:], cli.Env{
		Program: os.Args[0], Getenv: os.Getenv, Stdin: os.Stdin, Stdout: os.Stdout, Stderr: os.Stderr,
		Terminal: terminal, Color: terminal && os.Getenv("NO_COLOR") == "",
	}))
}

func isTerminal(f *os.File) bool {
	st, err := f.Stat()
	return err == nil && st.Mode()&os.ModeCharDevice != 0
}
