//go:build race

package test

// slowdown is how much slower than the built program a test's gateway may be.
const slowdown = 3
