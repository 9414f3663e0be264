//go:build !linux

package peers

import "os/exec"

// dieWithParent does nothing: only Linux offers it, and the pinned Node is for Linux too.
func dieWithParent(*exec.Cmd) {}
