package replay

import (
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"hash"
)

// chunks makes [schemas.Summary].ChunksSHA256 again: what the upstream said before
// its answer, in the order of the index. Chunks that an abandoned run has left
// behind the ending's count are no part of the answer; so the digest of each count
// is kept.
type chunks struct {
	n       int
	h       hash.Hash
	digests []string // of the first, the first two, …
}

// add adds the chunk of an index; one that does not follow is not taken.
func (c *chunks) add(index int, body []byte) {
	if index != c.n {
		return
	}
	if c.h == nil {
		c.h = sha256.New()
	}
	var n [8]byte
	binary.BigEndian.PutUint64(n[:], uint64(len(body)))
	c.h.Write(n[:])
	c.h.Write(body)
	c.n++
	c.digests = append(c.digests, hex.EncodeToString(c.h.Sum(nil)))
}

// digest is that of the first n chunks, false where there are not so many.
func (c *chunks) digest(n int) (string, bool) {
	switch {
	case n == 0:
		return "", true
	case n < 0 || n > c.n:
		return "", false
	}
	return c.digests[n-1], true
}
