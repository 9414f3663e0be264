package projections

import (
	"fmt"
	"os"
	"os/exec"
	"syscall"
)

// separate has the kernel end the child with us, however we end, and keeps the
// terminal's Ctrl-C from it: it goes after those who write to it.
func separate(cmd *exec.Cmd) {
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL, Setpgid: true}
}

// connection is both ends of a connection, ours first. It is a socket and no pipe: the
// engine opens what a query names, /proc/self/fd/0 too, and whoever opens a pipe so
// waits until somebody writes into it, or reads what is another's. A socket cannot be
// opened.
func connection(name string) (ours, theirs *os.File, err error) {
	fds, err := syscall.Socketpair(syscall.AF_UNIX, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, fmt.Errorf("%s of the engine: %w", name, err)
	}
	if err := syscall.SetNonblock(fds[0], true); err != nil { // so that to close it ends its reader
		return nil, nil, fmt.Errorf("%s of the engine: %w", name, err)
	}
	return os.NewFile(uintptr(fds[0]), name), os.NewFile(uintptr(fds[1]), name), nil
}
