package peers

import (
	"crypto/ed25519"
	"crypto/sha256"
	"encoding/base64"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"os/exec"
	"path/filepath"
	"slices"
	"testing"
)

// Witness is litewitness, of torchwood, a witness of transparency logs (C2SP tlog-witness).
type Witness struct {
	URL string
	Key string // its public key

	db string
	t  testing.TB
}

// Litewitness starts one of a name on a free port, that knows no log. It ends with the test, and with the test's process
// should that be killed.
func Litewitness(t testing.TB, name string) *Witness {
	t.Helper()
	program := installed(t, "bin", "litewitness")
	public, private, err := ed25519.GenerateKey(nil)
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	agent := filepath.Join(dir, "agent")
	sshAgent(t, agent, private)
	w := &Witness{Key: WitnessKey(name, public), db: filepath.Join(dir, "witness.db"), t: t}
	fingerprint := sha256.Sum256(sshKey(public))
	w.URL = "http://" + serve(t, "litewitness", func(addr string) *exec.Cmd {
		return exec.Command(program, "-name", name, "-db", w.db, "-ssh-agent", agent, "-listen", addr,
			"-key", "SHA256:"+base64.RawStdEncoding.EncodeToString(fingerprint[:]))
	})
	return w
}

// WitnessKey is the text of a witness's public key.
func WitnessKey(name string, public ed25519.PublicKey) string {
	typed := append([]byte{4}, public...) // of cosignature/v1
	named := sha256.Sum256(slices.Concat([]byte(name+"\n"), typed))
	return fmt.Sprintf("%s+%x+%s", name, named[:4], base64.StdEncoding.EncodeToString(typed))
}

// Know has the witness know a log by its public key. This is what its own witnessctl does, which needs a module that
// is not to be had everywhere.
func (w *Witness) Know(origin, key string) {
	w.t.Helper()
	const script = `
import base64, hashlib, sqlite3, sys
db, origin, key = sys.argv[1:]
with sqlite3.connect(db, timeout=30) as c:
    empty = base64.b64encode(hashlib.sha256(b"").digest()).decode()
    c.execute("INSERT INTO log (origin, tree_size, tree_hash) VALUES (?, 0, ?)", (origin, empty))
    c.execute("INSERT INTO key (origin, key) VALUES (?, ?)", (origin, key))
`
	if out := python(w.t, "-c", script, w.db, origin, key); out.Exit != 0 {
		w.t.Fatalf("add the log to the witness: %+v", out)
	}
}

// sshAgent serves the two questions of an SSH agent (draft-miller-ssh-agent) that litewitness asks, which has its key
// nowhere else: for the keys, and for a signature.
func sshAgent(t testing.TB, socket string, key ed25519.PrivateKey) {
	t.Helper()
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() }) // it is asked no more
	public := sshKey(key.Public().(ed25519.PublicKey))
	answer := func(question []byte) []byte {
		const list, keys, sign, signed, failure = 11, 12, 13, 14, 5
		switch {
		case len(question) == 1 && question[0] == list:
			return slices.Concat([]byte{keys, 0, 0, 0, 1}, sshString(public), sshString(nil))
		case len(question) > 1+4+len(public)+4 && question[0] == sign:
			said := question[1+4+len(public)+4:] // behind the key and its own length, and before the flags
			said = said[:len(said)-4]
			return append([]byte{signed}, sshString(slices.Concat(sshString([]byte("ssh-ed25519")), sshString(ed25519.Sign(key, said))))...)
		}
		return []byte{failure}
	}
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer func() { _ = c.Close() }()
				for {
					var size [4]byte
					if _, err := io.ReadFull(c, size[:]); err != nil {
						return
					}
					question := make([]byte, min(binary.BigEndian.Uint32(size[:]), 1<<16))
					if _, err := io.ReadFull(c, question); err != nil {
						return
					}
					if _, err := c.Write(sshString(answer(question))); err != nil {
						return
					}
				}
			}()
		}
	}()
}

func sshKey(public ed25519.PublicKey) []byte {
	return append(sshString([]byte("ssh-ed25519")), sshString(public)...)
}

func sshString(b []byte) []byte {
	return append(binary.BigEndian.AppendUint32(nil, uint32(len(b))), b...)
}
