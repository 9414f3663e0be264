package dispatch

import (
	"os/exec"
	"syscall"
)

// ownGroup makes a command's process the leader of a group of its own, so that
// all that it starts can be ended with it, and has the kernel kill it when the
// thread that starts it is gone, which is when this process is (see stdio.thread),
// however that went.
func ownGroup(cmd *exec.Cmd) {
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
}

// reap waits until a process has ended, ends what is left of its group, and
// takes its status. In that order: as long as the status is not taken nobody
// else can have the group's number.
func reap(cmd *exec.Cmd) error {
	const byPID = 1 // P_PID
	for {
		_, _, errno := syscall.Syscall6(syscall.SYS_WAITID, byPID, uintptr(cmd.Process.Pid), 0, syscall.WEXITED|syscall.WNOWAIT, 0, 0)
		if errno != syscall.EINTR {
			break
		}
	}
	signalGroup(cmd, syscall.SIGKILL)
	return cmd.Wait()
}
