//go:build !linux

package projections

import (
	"os"
	"os/exec"
)

func separate(*exec.Cmd) {}

// connection is never used: there is no engine but on Linux.
func connection(string) (ours, theirs *os.File, err error) { return nil, nil, ErrUnsupported }
