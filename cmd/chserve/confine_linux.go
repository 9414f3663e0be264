package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"unsafe"

	"golang.org/x/sys/unix"
)

// The engine believes to be a command line tool, whose user may read whatever
// the process may: SELECT file('/etc/passwd') needs no right, and no setting
// forbids it. So the process itself may read nothing but what it needs. Linux
// takes such a promise (Landlock) from one thread, and hands it on to what that
// executes; hence this program begins by executing itself.

// confined is the argument by which the program knows that it is.
const confined = "--confined"

// What of a file system Landlock guards, by the version that the kernel has.
const (
	readFile = unix.LANDLOCK_ACCESS_FS_READ_FILE
	readOnly = readFile | unix.LANDLOCK_ACCESS_FS_READ_DIR
	execute  = readOnly | unix.LANDLOCK_ACCESS_FS_EXECUTE
	device   = readFile | unix.LANDLOCK_ACCESS_FS_WRITE_FILE | unix.LANDLOCK_ACCESS_FS_IOCTL_DEV
	first    = unix.LANDLOCK_ACCESS_FS_MAKE_SYM<<1 - 1
)

// confinement is the version of Landlock that the kernel has.
func confinement() (uintptr, error) {
	version, _, errno := unix.Syscall(unix.SYS_LANDLOCK_CREATE_RULESET, 0, 0, unix.LANDLOCK_CREATE_RULESET_VERSION)
	if errno != 0 {
		return 0, fmt.Errorf("%w: it could read every file that its user can, and this kernel cannot keep it from that (Landlock, Linux 5.13 and newer, switched on): %w; "+
			"give the gateway a server with `clickhouse: {dsn: …}`", errUnsupported, errno)
	}
	return version, nil
}

// confine starts this program anew, confined to o, and returns only errors.
func confine(o options, config string) error {
	runtime.LockOSThread()
	version, err := confinement()
	if err != nil {
		return err
	}
	all := uint64(first)
	for v, more := range map[uintptr]uint64{2: unix.LANDLOCK_ACCESS_FS_REFER, 3: unix.LANDLOCK_ACCESS_FS_TRUNCATE, 5: unix.LANDLOCK_ACCESS_FS_IOCTL_DEV} {
		if version >= v {
			all |= more
		}
	}
	rules, _, errno := unix.Syscall(unix.SYS_LANDLOCK_CREATE_RULESET, uintptr(unsafe.Pointer(&all)), unsafe.Sizeof(all), 0)
	if errno != 0 {
		return fmt.Errorf("confine the engine: %w", errno)
	}
	program, err := os.Executable()
	if err != nil {
		return err
	}
	store := filepath.Join(o.dir, "store")
	if err := os.MkdirAll(store, 0o700); err != nil {
		return err
	}
	type rule struct {
		access uint64
		paths  []string
	}
	for _, r := range []rule{
		{all, []string{store}},
		{readOnly, []string{
			config, filepath.Join(o.dir, "users.xml"), filepath.Join(o.dir, "none"), "/proc/self", "/proc/meminfo", "/proc/cpuinfo", "/proc/stat", "/proc/sys/vm", "/proc/sys/kernel",
			"/sys/fs/cgroup", "/sys/devices/system", "/sys/kernel/mm", "/etc/localtime", "/usr/share/zoneinfo", "/dev/urandom", "/dev/random",
		}},
		{execute, []string{program, o.library, "/lib", "/lib64", "/usr/lib", "/usr/lib64", "/etc/ld.so.cache"}},
		{device, []string{"/dev/null", "/dev/zero"}},
	} {
		for _, path := range r.paths {
			if err := permit(rules, path, r.access&all); err != nil && !errors.Is(err, os.ErrNotExist) {
				return fmt.Errorf("confine the engine to %s: %w", path, err)
			}
		}
	}
	// The engine's terminal is opened now: who may open one may read those of the
	// user's other programs.
	terminal, err := newTerminal()
	if err != nil {
		return fmt.Errorf("a terminal for the engine: %w", err)
	}
	for fd, f := range map[int]*os.File{promptFD: terminal.prompt, slaveFD: terminal.slave} {
		if err := unix.Dup3(int(f.Fd()), fd, 0); err != nil {
			return fmt.Errorf("hand on the engine's terminal: %w", err)
		}
	}
	// Root would be let in where nobody is (seal); for all others there is nothing to drop.
	for _, c := range []uintptr{unix.CAP_DAC_OVERRIDE, unix.CAP_DAC_READ_SEARCH} {
		if err := unix.Prctl(unix.PR_CAPBSET_DROP, c, 0, 0, 0); err != nil && !errors.Is(err, unix.EPERM) {
			return fmt.Errorf("confine the engine: %w", err)
		}
	}
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return fmt.Errorf("confine the engine: %w", err)
	}
	if _, _, errno := unix.Syscall(unix.SYS_LANDLOCK_RESTRICT_SELF, rules, 0, 0); errno != 0 {
		return fmt.Errorf("confine the engine: %w", errno)
	}
	// Nothing of the environment, which a query could read too.
	return unix.Exec(program, append(append([]string{program}, os.Args[1:]...), confined), []string{"PATH=/nonexistent", "HOME=" + store, "TZ=UTC"})
}

// permit allows access to what is beneath a path.
func permit(rules uintptr, path string, access uint64) error {
	fd, err := unix.Open(path, unix.O_PATH|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer func() { _ = unix.Close(fd) }()
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return err
	}
	if st.Mode&unix.S_IFMT != unix.S_IFDIR { // which has no directories to read
		access &= unix.LANDLOCK_ACCESS_FS_EXECUTE | unix.LANDLOCK_ACCESS_FS_WRITE_FILE | readFile | unix.LANDLOCK_ACCESS_FS_TRUNCATE | unix.LANDLOCK_ACCESS_FS_IOCTL_DEV
	}
	a := struct {
		access uint64
		fd     int32
	}{access, int32(fd)}
	if _, _, errno := unix.Syscall6(unix.SYS_LANDLOCK_ADD_RULE, rules, unix.LANDLOCK_RULE_PATH_BENEATH, uintptr(unsafe.Pointer(&a)), 0, 0, 0); errno != 0 {
		return errno
	}
	return nil
}
