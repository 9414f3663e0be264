// Package sse frames Server-Sent Events, as in WHATWG HTML §9.2: [Read] takes a
// stream apart, [Append] writes an event.
package sse
