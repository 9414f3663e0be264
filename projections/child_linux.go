package projections

import (
	"os/exec"
	"syscall"
)

// separate has the kernel end the child with us, however we end, and keeps the
// terminal's Ctrl-C from it: it goes after those who write to it.
func separate(cmd *exec.Cmd) {
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL, Setpgid: true}
}
