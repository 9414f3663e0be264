package dispatch

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"sync"
	"time"

	"waybill.dev/schemas"
	"waybill.dev/schemas/jsonrpc"
)

// Era says which of the two families of MCP's revisions a server is spoken to
// in (2026-07-28, basic/versioning, "Protocol Eras"): those with sessions, or
// those without.
type Era string

const (
	EraAuto   Era = ""       // found out: whoever answers server/discover is modern
	EraModern Era = "modern" // 2026-07-28 and later
	EraLegacy Era = "legacy" // 2025-11-25 and earlier
	EraClient Era = "client" // that of whoever calls: nothing is translated
)

// ParseEra reads an era as the configuration has it: "auto" is EraAuto.
func ParseEra(s string) (Era, error) {
	if s == "auto" {
		return EraAuto, nil
	}
	if e := Era(s); slices.Contains([]Era{EraAuto, EraModern, EraLegacy, EraClient}, e) {
		return e, nil
	}
	return "", fmt.Errorf("%q is none of auto, modern, legacy, client", s)
}

// What a probe may take, and how long its answer counts. A server is updated
// now and then; what its answers contradict is asked again at once (doubt).
const (
	probeTime  = 5 * time.Second
	probeStart = 20 * time.Second // of a server that has to be started first
	probeAgain = 10 * time.Minute
	probeRetry = time.Second // after one that told nothing
)

// eras knows the era of one server.
type eras struct {
	fixed Era
	time  time.Duration // what a probe may take

	mu      sync.Mutex
	era     Era           // EraAuto: not known
	until   time.Time     // when to probe again
	probing chan struct{} // closed when the probe under way has ended; nil: none is
}

// eraOf is the era in which a call is made: EraModern, EraLegacy or, where a server
// does not say which it is, EraClient. Who comes first probes, and who comes
// meanwhile waits; once the era is known, nobody waits when it is probed again.
func (m *mcpServer) eraOf(ctx context.Context) Era {
	e := &m.eras
	if e.fixed != EraAuto {
		return e.fixed
	}
	e.mu.Lock()
	known, now := e.era, time.Now()
	if now.Before(e.until) {
		e.mu.Unlock()
		return either(known)
	}
	probing := e.probing
	if probing == nil {
		probing = make(chan struct{})
		e.probing = probing
		// Not the call's context: others wait for the same probe.
		go m.probe(probing)
	}
	e.mu.Unlock()
	if known != EraAuto {
		return known
	}
	select {
	case <-probing:
	case <-ctx.Done():
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	return either(e.era)
}

func either(e Era) Era {
	if e == EraAuto {
		return EraClient
	}
	return e
}

// doubt has the era probed again before the next call: the server has answered
// as one of the other would.
func (m *mcpServer) doubt() {
	m.eras.mu.Lock()
	defer m.eras.mu.Unlock()
	m.eras.until = time.Time{}
}

// probe finds out the era.
func (m *mcpServer) probe(done chan struct{}) {
	ctx, cancel := context.WithTimeout(m.life, m.eras.time)
	defer cancel()
	era, err := m.ask(ctx)
	e := &m.eras
	e.mu.Lock()
	defer e.mu.Unlock()
	e.probing = nil
	close(done)
	if era == EraAuto {
		// What was known stays, for it is likelier than nothing.
		e.until = time.Now().Add(probeRetry)
		m.log.Debug("the era of a server was not found out", "server", m.name, "error", err)
		return
	}
	if era != e.era {
		m.log.Info("era of an MCP server", "server", m.name, "era", era, "was", e.era)
	}
	e.era, e.until = era, time.Now().Add(probeAgain)
}

// probeBody is what the probe asks. Its id cannot be a call's.
var probeBody = []byte(`{"jsonrpc":"2.0","id":"waybill-probe","method":"server/discover","params":{"_meta":{` +
	`"io.modelcontextprotocol/protocolVersion":"` + mcpRevision + `","io.modelcontextprotocol/clientCapabilities":{},` +
	`"io.modelcontextprotocol/clientInfo":{"name":"waybill","version":"1"}}}}`)

// ask probes: EraAuto if nothing can be concluded. A server of the modern era
// has to answer server/discover; one of the other answers with an error, or does
// not even look at what comes without a session (2026-07-28, basic/versioning,
// "Backward Compatibility"). Over stdio there are those that say nothing at all
// (basic/transports/stdio, "Backward Compatibility").
func (m *mcpServer) ask(ctx context.Context) (Era, error) {
	const id = schemas.CallID("waybill-probe")
	c := Call{
		ID: id, Body: probeBody, Connected: func() {}, Heard: func() {},
		Requested: &schemas.Requested{Target: schemas.Target{Protocol: "mcp", Server: m.name, Method: "server/discover"}},
	}
	body, header, err := m.request(c)
	if err != nil {
		return EraAuto, err
	}
	resp, err := m.send(ctx, http.MethodPost, header, body, func() {})
	if f := new(Fault); m.held && errors.As(err, &f) && f.Kind == Broken && errors.Is(ctx.Err(), context.DeadlineExceeded) {
		return EraLegacy, nil // it was asked, and runs
	}
	if err != nil {
		return EraAuto, err
	}
	defer resp.Body.Close()
	switch s := resp.StatusCode; {
	case s == http.StatusUnauthorized, s == http.StatusForbidden, s == http.StatusProxyAuthRequired,
		s == http.StatusRequestTimeout, s == http.StatusTooManyRequests, s >= 500, s >= 300 && s < 400:
		return EraAuto, fmt.Errorf("HTTP %d", s)
	}
	var text []byte
	if eventStream(resp) {
		var answer Answer
		if answer, err = m.stream(resp.Body, c, func([]byte) error { return nil }); err == nil {
			text = answer.Body
		}
	} else {
		text, err = m.read(resp)
	}
	if err != nil {
		return EraAuto, err
	}
	msg, err := m.decode(text, c)
	switch {
	case err == nil && msg.IsResponse() && msg.Result().Exists():
		if speaks(msg.Result().Get("supportedVersions")) {
			return EraModern, nil
		}
		return EraLegacy, nil
	case err == nil && msg.IsResponse():
		code, _ := msg.ErrorCode()
		return eraOfError(code, msg.Error().Get("data", "supported")), fmt.Errorf("error %d", code)
	case resp.StatusCode >= 400:
		return EraLegacy, nil // it wants a session, or to be asked otherwise
	}
	return EraAuto, fmt.Errorf("HTTP %d without an answer", resp.StatusCode)
}

// eraOfError is what an error in answer to the probe tells.
func eraOfError(code int, supported jsonrpc.Value) Era {
	switch code {
	case jsonrpc.CodeHeaderMismatch, jsonrpc.CodeMissingRequiredClientCapability:
		return EraModern // errors that only this era has
	case jsonrpc.CodeUnsupportedProtocolVersion:
		if supported.Kind() == jsonrpc.Array && !speaks(supported) && allLegacy(supported) {
			return EraLegacy
		}
		return EraAuto
	}
	return EraLegacy
}

func speaks(versions jsonrpc.Value) bool {
	for v := range versions.Elements() {
		if text, _ := v.Text(); text == mcpRevision {
			return true
		}
	}
	return false
}

func allLegacy(versions jsonrpc.Value) bool {
	for v := range versions.Elements() {
		if text, _ := v.Text(); !legacy(text) {
			return false
		}
	}
	return true
}
