package audit

import (
	"crypto/ed25519"
	"encoding/base64"
	"errors"
	"fmt"
	"strconv"
	"strings"

	"golang.org/x/mod/sumdb/note"
	"golang.org/x/mod/sumdb/tlog"
)

// Checkpoint is the signed word for the tree of a size (C2SP tlog-checkpoint).
type Checkpoint struct {
	Origin string
	Size   uint64
	Root   tlog.Hash
	Text   string // as it was signed, signatures included
}

// ErrCheckpoint is wrapped by the error for what is no checkpoint, or not signed
// by a key that is known.
var ErrCheckpoint = errors.New("not a checkpoint of this log")

func (c Checkpoint) body() string {
	return fmt.Sprintf("%s\n%d\n%s\n", c.Origin, c.Size, base64.StdEncoding.EncodeToString(c.Root[:]))
}

// OpenCheckpoint reads a checkpoint that one of the keys has signed.
func OpenCheckpoint(text string, keys note.Verifiers) (Checkpoint, error) {
	n, err := note.Open([]byte(text), keys)
	if err != nil {
		return Checkpoint{}, fmt.Errorf("%w: %w", ErrCheckpoint, err)
	}
	lines := strings.SplitN(n.Text, "\n", 4)
	if len(lines) < 4 || lines[0] == "" {
		return Checkpoint{}, fmt.Errorf("%w: fewer than three lines", ErrCheckpoint)
	}
	size, err := strconv.ParseUint(lines[1], 10, 63)
	if err != nil || strconv.FormatUint(size, 10) != lines[1] {
		return Checkpoint{}, fmt.Errorf("%w: size %q", ErrCheckpoint, lines[1])
	}
	root, err := tlog.ParseHash(lines[2])
	if err != nil {
		return Checkpoint{}, fmt.Errorf("%w: root %q", ErrCheckpoint, lines[2])
	}
	return Checkpoint{lines[0], size, root, text}, nil
}

// Keys are what checkpoints are signed and known by.
type Keys struct {
	Signers   []note.Signer // the newest last; all sign
	Verifiers []string      // public keys, as note writes them; all that have ever signed
}

// NewKey makes a signer's key for an origin of 32 random bytes: the private key
// and the public one, in the text form of signed notes.
func NewKey(origin string, seed []byte) (private, public string, err error) {
	key := ed25519.NewKeyFromSeed(seed)
	public, err = note.NewEd25519VerifierKey(origin, key.Public().(ed25519.PublicKey))
	if err != nil {
		return "", "", fmt.Errorf("key of %q: %w", origin, err)
	}
	// PRIVATE+KEY+name+hash+key; the public key has the same name and hash.
	return "PRIVATE+KEY+" + public[:len(origin)+9] + "+" + base64.StdEncoding.EncodeToString(append([]byte{1}, seed...)), public, nil
}

// PublicKey is the public key of a private one that NewKey made.
func PublicKey(private string) (string, error) {
	parts := strings.SplitN(private, "+", 5)
	if len(parts) != 5 {
		return "", errors.New("not a private key of signed notes")
	}
	seed, err := base64.StdEncoding.DecodeString(parts[4])
	if err != nil || len(seed) != 1+ed25519.SeedSize {
		return "", errors.New("not a private key of signed notes")
	}
	_, public, err := NewKey(parts[2], seed[1:])
	return public, err
}

// Known are the verifiers of public keys.
func Known(public []string) (note.Verifiers, error) {
	var all []note.Verifier
	for _, k := range public {
		v, err := note.NewVerifier(k)
		if err != nil {
			return nil, fmt.Errorf("public key %q: %w", k, err)
		}
		all = append(all, v)
	}
	return note.VerifierList(all...), nil
}

// sign makes the checkpoint of a tree.
func (k Keys) sign(origin string, size uint64, root tlog.Hash) (Checkpoint, error) {
	c := Checkpoint{Origin: origin, Size: size, Root: root}
	text, err := note.Sign(&note.Note{Text: c.body()}, k.Signers...)
	if err != nil {
		return c, fmt.Errorf("sign the tree of %d: %w", size, err)
	}
	c.Text = string(text)
	return c, nil
}
