//go:build !race

package test

// slowdown is how much slower than the built program a test's gateway may be.
const slowdown = 1

// manyKills is how often the gateway is killed; with the race detector each takes
// five times as long.
const manyKills = 50

// recordKills is how often gateway, engine or both are killed while the record is
// written.
const recordKills = 50

// unscreened is the configuration where large answers pass: nothing is left out.
const unscreened = ""

// manySessions is how many sessions of all kinds are verified.
const manySessions = 78
