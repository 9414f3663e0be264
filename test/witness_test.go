package test

import (
	"bytes"
	"crypto/ed25519"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"golang.org/x/mod/sumdb/note"

	"waybill.dev/projections/audit"
	"waybill.dev/test/gateway"
	"waybill.dev/test/peers"
	"waybill.dev/test/upstream"
)

// cosigned waits until a witness has signed a tree of so many leaves.
func cosigned(t *testing.T, g *gateway.Gateway, leaves uint64) string {
	t.Helper()
	tick := time.NewTicker(100 * time.Millisecond)
	defer tick.Stop()
	for begun := time.Now(); ; <-tick.C {
		out, errs, exit := g.CLI("audit", "checkpoint", "--witnessed")
		if exit == 0 && size(t, out) >= leaves {
			return out
		}
		if time.Since(begun) > 20*time.Second*slowdown {
			t.Fatalf("of %d leaves nothing is cosigned: %s%s\n%s", leaves, out, errs, g.Output())
		}
	}
}

// A witness that others wrote signs what the gateway has signed, while another is away:
// when it knows the log, when the log has grown, and when it is started again. It refuses
// a fork, which the same key has signed, and that is reported; calls go on in all cases.
func TestWitness(t *testing.T) {
	t.Parallel()
	w := peers.Litewitness(t, "witness.example/one")
	hangs := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		_, _ = io.ReadAll(r.Body) // only then it is known that the client has left
		<-r.Context().Done()
	}))
	defer hangs.Close()
	const away = "away.example"
	never := peers.WitnessKey(away, make(ed25519.PublicKey, ed25519.PublicKeySize)) // nobody can sign by it
	u := upstream.Start(t)
	witnesses := `
  witnesses: [{url: "` + w.URL + `", key: "` + w.Key + `"}, {url: "` + hangs.URL + `", key: "` + never + `", timeout: 200ms}]
  witness_every: 1s`
	g := gateway.Start(t, gateway.Config(`
bus: {embedded: {listen: "`+gateway.FreeAddr(t)+`"}}
audit:
  subscribers: [{name: acme-siem, tenant: acme}]`+witnesses+`
servers:
`+gateway.Server("counter", u.URL, "")))
	url, err := os.ReadFile(filepath.Join(g.Dir, "data", "log", "subscribers", "acme-siem.url"))
	if err != nil {
		t.Fatal(err)
	}
	nc, err := nats.Connect(strings.TrimSpace(string(url)))
	if err != nil {
		t.Fatal(err)
	}
	defer nc.Close() // where the test ends early
	heard, err := nc.SubscribeSync("audit.cosigned")
	if err == nil {
		err = nc.Flush()
	}
	if err != nil {
		t.Fatal(err)
	}
	say(t, g, "one", "k1", "before any witness signs")
	s := signed(t, g)
	if _, errs, exit := g.CLI("audit", "checkpoint", "--witnessed"); exit != 1 || !strings.Contains(errs, "no witness has signed yet") {
		t.Errorf("exit %d: %s", exit, errs)
	}
	await := func(metric string) {
		t.Helper()
		tick := time.NewTicker(100 * time.Millisecond)
		defer tick.Stop()
		for begun := time.Now(); !strings.Contains(get(t, g.Admin+"/metrics"), metric); <-tick.C {
			if time.Since(begun) > 20*time.Second*slowdown {
				t.Fatalf("no %s: %s", metric, g.Output())
			}
		}
	}
	await(`waybill_audit_witness_failures_total{cause="failed",witness="witness.example/one"} 1`)
	key := s.Keys[0]
	origin, _, _ := strings.Cut(key, "+")
	w.Know(origin, key)
	m, err := heard.NextMsg(20 * time.Second * slowdown)
	if err != nil {
		t.Fatalf("nothing is cosigned: %v\n%s", err, g.Output())
	}
	nc.Close()
	by, err := audit.CosignerKey(w.Key)
	if err != nil {
		t.Fatal(err)
	}
	signedBy := func(text string) uint64 {
		t.Helper()
		if _, err := note.Open([]byte(text), note.VerifierList(by)); err != nil {
			t.Fatalf("%v: %s", err, text)
		}
		return size(t, text)
	}
	was := signedBy(string(m.Data))

	// It grows, and so does what is cosigned.
	say(t, g, "one", "k2", "more")
	last := cosigned(t, g, signed(t, g).Leaves)
	if signedBy(last) <= was {
		t.Errorf("%d, and before %d", signedBy(last), was)
	}
	r, exit := verify(t, g)
	if exit != 0 || r.Cosigned < 2 || r.Unknown != 0 || len(r.Witnessed) != 1 || r.Witnessed[0].Witness != "witness.example/one" ||
		r.Witnessed[0].Size != signedBy(last) || time.Since(r.Witnessed[0].Time) > time.Minute*slowdown {
		t.Errorf("exit %d %+v", exit, r)
	}
	out, _, exit := g.CLI("audit", "verify")
	if exit != 0 || !strings.Contains(out, fmt.Sprintf("witnessed     %d leaves by witness.example/one, at 2", signedBy(last))) || !strings.Contains(out, "nothing is cosigned by "+away) {
		t.Errorf("exit %d %s", exit, out)
	}
	// Kept, and without the configuration.
	saved := filepath.Join(g.Dir, "saved.jsonl")
	if r, exit = verify(t, g, "--save", saved); exit != 0 {
		t.Fatal(first(r))
	}
	if out, _, exit := g.CLI("audit", "verify", saved, "--key", key); exit != 0 || !strings.Contains(out, "by nobody who is known here: name the witnesses with --witness") {
		t.Errorf("exit %d %s", exit, out)
	}
	if r, exit = verify(t, g, saved, "--key", key, "--witness", w.Key); exit != 0 || len(r.Witnessed) != 1 || r.Unknown != 0 {
		t.Errorf("exit %d %+v", exit, r)
	}
	// Who trusts a witness does not take a record without its word.
	text, err := os.ReadFile(saved)
	if err != nil {
		t.Fatal(err)
	}
	without := filepath.Join(g.Dir, "without.jsonl")
	text = slices.Concat(slices.DeleteFunc(bytes.SplitAfter(text, []byte("\n")), func(line []byte) bool { return bytes.Contains(line, []byte(`"cosigned":`)) })...)
	if err := os.WriteFile(without, text, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, errs, exit := g.CLI("audit", "verify", without, "--key", key, "--witness", w.Key); exit != 1 || !strings.Contains(errs, "the witness witness.example/one has signed nothing in this record") {
		t.Errorf("exit %d %s", exit, errs)
	}
	metrics := get(t, g.Admin+"/metrics")
	for _, want := range []string{
		fmt.Sprintf(`waybill_audit_cosigned{witness="witness.example/one"} %d`, signedBy(last)),
		`waybill_audit_cosigned{witness="` + away + `"} 0`,
		`waybill_audit_witness_failures_total{cause="fork",witness="witness.example/one"} 0`,
	} {
		if !strings.Contains(metrics, want) {
			t.Errorf("no %s in the metrics", want)
		}
	}

	if out := g.Output(); strings.Count(out, "it answers 403 Forbidden") != 1 || strings.Count(out, "the witness signs now") != 1 {
		t.Errorf("not said, or twice: %s", out)
	}
	// The same key signs another log, as who has it could: what is put back is not what
	// there was, and it is longer than what the witness has signed.
	if err := g.Stop(); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"log", "audit.last"} {
		if err := os.RemoveAll(filepath.Join(g.Dir, "data", name)); err != nil {
			t.Fatal(err)
		}
	}
	config, err := os.ReadFile(g.File())
	if err != nil {
		t.Fatal(err)
	}
	configure := func(text string) {
		t.Helper()
		if err := os.WriteFile(g.File(), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		g.Restart()
	}
	configure(strings.Replace(string(config), witnesses, "", 1))
	for i := 0; stateOf(t, g).Leaves <= signedBy(last); i++ {
		say(t, g, "one", fmt.Sprint("f", i), "another history")
	}
	if signed(t, g).Keys[0] != key {
		t.Fatal("it has another key")
	}
	if err := g.Stop(); err != nil {
		t.Fatal(err)
	}
	configure(string(config))
	await(`waybill_audit_witness_failures_total{cause="fork",witness="witness.example/one"} 1`)
	if out := g.Output(); !strings.Contains(out, "POSSIBLE FORK") || !strings.Contains(out, "has not grown from the one of") {
		t.Errorf("not said: %s", out)
	}
	if out, _, exit := g.CLI("audit", "checkpoint", "--witnessed"); exit != 1 || out != "" {
		t.Errorf("cosigned: %s", out)
	}
	say(t, g, "one", "k9", "calls go on")
}
