//go:build race

package jsonrpc

// raceEnabled makes the largest tests small: the race detector slows them by
// more than ten times, and they are about one goroutine.
const raceEnabled = true
