//go:build !linux

package dispatch

import (
	"os/exec"
	"syscall"
)

// ownGroup makes a command's process the leader of a group of its own, so that
// all that it starts can be ended with it. Only Linux ends it when this process
// is killed; elsewhere it sees the end of its standard input.
func ownGroup(cmd *exec.Cmd) { cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true} }

// reap waits until a process has ended, and ends what is left of its group.
func reap(cmd *exec.Cmd) error {
	err := cmd.Wait()
	signalGroup(cmd, syscall.SIGKILL)
	return err
}
