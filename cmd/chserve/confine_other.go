//go:build !linux

package main

import "fmt"

const confined = "--confined"

// confinement says that there is no engine to confine.
func confinement() (uintptr, error) {
	return 0, fmt.Errorf("%w: it is for Linux only; give the gateway a server with `clickhouse: {dsn: …}`", errUnsupported)
}

func confine(options, string) error { _, err := confinement(); return err } // there is no engine to confine
