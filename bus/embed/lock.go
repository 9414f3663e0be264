package embed

import (
	"fmt"
	"os"
	"syscall"
)

// lock takes the data directory for this process. The kernel gives it back
// when the process ends, however it ends.
func lock(file string) (unlock func(), err error) {
	f, err := os.OpenFile(file, os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	if err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		_ = f.Close()
		return nil, fmt.Errorf("another waybill uses this data directory (%s is locked): stop it, or set another `data:`", file)
	}
	return func() { _ = f.Close() }, nil
}
