package audit

import (
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"

	"golang.org/x/mod/sumdb/tlog"
)

// Proof shows to whoever has the public key, and nothing else of ours, that a
// message is in the log. It is written as JSON. To check it:
//
//  1. The leaf's hash is SHA-256 of a byte 00 and Record.
//  2. Path has the hashes beside the way from the leaf to the root (RFC 6962
//     §2.1.1), the lowest first; the root that comes out is the third line of
//     Checkpoint, in base64.
//  3. Checkpoint is signed: behind its empty line stands "— name base64", of which
//     the first 4 bytes name the key and the rest is the Ed25519 signature of the
//     text before the empty line.
//  4. What was said: `head` and `body` in Record are SHA-256 of Salt and a byte
//     (00 or 01) and the headers or the body.
type Proof struct {
	V          int                 `json:"v"`
	Origin     string              `json:"origin"`
	Keys       []string            `json:"keys"` // public keys: name+hash+base64 of a byte 01 and the key
	Checkpoint string              `json:"checkpoint"`
	Size       uint64              `json:"size"` // of the checkpoint's tree
	Number     uint64              `json:"number"`
	Record     string              `json:"record"`
	Path       []string            `json:"path"`             // base64
	Salt       string              `json:"salt,omitempty"`   // hex; absent after an erasure
	Header     map[string][]string `json:"header,omitempty"` // the message's, while the log has it
	Body       *string             `json:"body_base64,omitempty"`
}

// ErrProof is wrapped by the error for a proof that proves nothing.
var ErrProof = errors.New("the proof does not hold")

// Prove makes the proof of a leaf. entry is nil where the log has the message no
// more; salt is nil where it was erased.
func Prove(c Checkpoint, keys []string, number uint64, record []byte, entry *Entry, salt []byte, hashes tlog.HashReader) (Proof, error) {
	path, err := tlog.ProveRecord(int64(c.Size), int64(number), hashes)
	if err != nil {
		return Proof{}, fmt.Errorf("prove leaf %d: %w", number, err)
	}
	p := Proof{
		V: leafVersion, Origin: c.Origin, Keys: keys, Checkpoint: c.Text, Size: c.Size,
		Number: number, Record: string(record), Path: []string{}, Salt: hex.EncodeToString(salt),
	}
	for _, h := range path {
		p.Path = append(p.Path, base64.StdEncoding.EncodeToString(h[:]))
	}
	if entry != nil && salt != nil {
		body := base64.StdEncoding.EncodeToString(entry.Body)
		p.Header, p.Body = entry.Header, &body
	}
	return p, p.Check(keys)
}

// Check checks a proof with the public keys that are trusted.
func (p Proof) Check(trusted []string) error {
	known, err := Known(trusted)
	if err != nil {
		return err
	}
	c, err := OpenCheckpoint(p.Checkpoint, known)
	if err != nil {
		return fmt.Errorf("%w: %w", ErrProof, err)
	}
	path := make(tlog.RecordProof, len(p.Path))
	for i, s := range p.Path {
		if path[i], err = tlog.ParseHash(s); err != nil {
			return fmt.Errorf("%w: hash %d of the path: %w", ErrProof, i, err)
		}
	}
	if err := tlog.CheckRecord(path, int64(c.Size), c.Root, int64(p.Number), hashOf([]byte(p.Record))); err != nil {
		return fmt.Errorf("%w: %w", ErrProof, err)
	}
	l, err := ReadRecord([]byte(p.Record))
	if err != nil {
		return fmt.Errorf("%w: %w", ErrProof, err)
	}
	// What is said beside the record is no proof by itself, and has to be the same.
	if p.Origin != c.Origin || p.Size != c.Size {
		return fmt.Errorf("%w: it says %s and %d leaves, and the checkpoint %s and %d", ErrProof, p.Origin, p.Size, c.Origin, c.Size)
	}
	salt, err := hex.DecodeString(p.Salt)
	if err != nil {
		return fmt.Errorf("%w: the salt cannot be read", ErrProof)
	}
	if p.Header != nil && hex.EncodeToString(headDigest(salt, p.Header)) != l.Head {
		return fmt.Errorf("%w: the headers are not those in the record", ErrProof)
	}
	if p.Body == nil {
		return nil
	}
	body, err := base64.StdEncoding.DecodeString(*p.Body)
	if err != nil {
		return fmt.Errorf("%w: the body cannot be read", ErrProof)
	}
	if hex.EncodeToString(bodyDigest(salt, body)) != l.Body {
		return fmt.Errorf("%w: the body is not the one in the record", ErrProof)
	}
	return nil
}
