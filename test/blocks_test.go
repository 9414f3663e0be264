package test

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"github.com/minio/highwayhash"
)

// record is a record in a block file of the log, as NATS writes it. Whoever has
// the disk can write such files, with checksums that are right.
type blockRecord struct {
	seq     uint64
	time    uint64
	subject string
	header  []byte // nil for none
	body    []byte
}

const (
	blockHeader     = 22 // length, sequence, time, length of the subject
	blockHasHeaders = 1 << 31
	special         = 3 << 62 // sequences of what is no message: tombstones and what was erased
)

// readBlock reads a block file. What is no message is left out.
func readBlock(t *testing.T, file string) (all []blockRecord) {
	t.Helper()
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	le := binary.LittleEndian
	for len(b) > 0 {
		length := le.Uint32(b)
		rest := b[blockHeader : length&^blockHasHeaders-8]
		r := blockRecord{seq: le.Uint64(b[4:]), time: le.Uint64(b[12:])}
		n := int(le.Uint16(b[20:]))
		b = b[length&^blockHasHeaders:]
		if r.seq&special != 0 {
			continue
		}
		r.subject, rest = string(rest[:n]), rest[n:]
		if length&blockHasHeaders != 0 {
			n := le.Uint32(rest)
			r.header, rest = rest[4:4+n], rest[4+n:]
		}
		r.body = rest
		all = append(all, r)
	}
	return all
}

// writeBlock writes a block file of a stream, and removes the index, which the
// server then makes anew.
func writeBlock(t *testing.T, file, stream string, index int, all []blockRecord) {
	t.Helper()
	key := sha256.Sum256(fmt.Appendf(nil, "%s-%d", stream, index))
	hash, err := highwayhash.New64(key[:])
	if err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	le := binary.LittleEndian
	for _, r := range all {
		length := blockHeader + len(r.subject) + len(r.body) + 8
		flag := 0
		if r.header != nil {
			length += 4 + len(r.header)
			flag = blockHasHeaders
		}
		head := make([]byte, blockHeader)
		le.PutUint32(head, uint32(length|flag))
		le.PutUint64(head[4:], r.seq)
		le.PutUint64(head[12:], r.time)
		le.PutUint16(head[20:], uint16(len(r.subject)))
		out.Write(head)
		out.WriteString(r.subject)
		hash.Reset()
		_, _ = hash.Write(head[4:20])
		_, _ = hash.Write([]byte(r.subject))
		if r.header != nil {
			out.Write(le.AppendUint32(nil, uint32(len(r.header))))
			out.Write(r.header)
			_, _ = hash.Write(r.header)
		}
		out.Write(r.body)
		_, _ = hash.Write(r.body)
		out.Write(hash.Sum(nil))
	}
	if err := os.WriteFile(file, out.Bytes(), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(filepath.Join(filepath.Dir(file), "index.db")); err != nil && !os.IsNotExist(err) {
		t.Fatal(err)
	}
}
