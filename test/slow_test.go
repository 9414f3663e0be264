//go:build race

package test

// slowdown is how much slower than the built program a test's gateway may be.
const slowdown = 3

// manyKills is how often the gateway is killed; with the race detector each takes
// five times as long.
const manyKills = 8

// recordKills is how often gateway, engine or both are killed while the record is
// written.
const recordKills = 5

// unscreened is the configuration where large answers pass: RE2 is Go code made of
// WebAssembly, and takes a minute for megabytes with the race detector in it. Without
// it, all is looked for.
const unscreened = "answers: {secrets: allow}\n"

// manySessions is how many sessions of all kinds are verified.
const manySessions = 13
