package audit

import (
	"golang.org/x/mod/sumdb/tlog"
)

// Tiles are of this height: each has the hashes of 256 subtrees.
const (
	tileHeight = 8
	tileWidth  = 1 << tileHeight
)

// tree is the right edge of a growing tree: at each level of tiles, the hashes of
// the tile that is not full yet. Everything to its left is in full tiles.
type tree struct {
	size  uint64
	edges [][]tlog.Hash
}

// add adds a leaf and hands on each tile that it makes full.
func (t *tree) add(h tlog.Hash, full func(tlog.Tile, []byte)) {
	n := t.size
	t.size++
	for level := 0; ; level++ {
		if level == len(t.edges) {
			t.edges = append(t.edges, make([]tlog.Hash, 0, tileWidth))
		}
		t.edges[level] = append(t.edges[level], h)
		if len(t.edges[level]) < tileWidth {
			return
		}
		n >>= tileHeight
		full(tlog.Tile{H: tileHeight, L: level, N: int64(n), W: tileWidth}, tileData(t.edges[level]))
		h = perfect(t.edges[level])
		t.edges[level] = t.edges[level][:0]
	}
}

// root is the tree's hash. That of an empty tree is SHA-256 of nothing.
func (t *tree) root() tlog.Hash {
	var parts []tlog.Hash // of perfect subtrees, the largest first
	for level := len(t.edges) - 1; level >= 0; level-- {
		rest := t.edges[level]
		for bit := tileWidth; bit > 0; bit >>= 1 {
			if len(rest)&bit != 0 {
				parts = append(parts, perfect(rest[:bit]))
				rest = rest[bit:]
			}
		}
	}
	if len(parts) == 0 {
		return emptyRoot
	}
	h := parts[len(parts)-1]
	for i := len(parts) - 2; i >= 0; i-- {
		h = tlog.NodeHash(parts[i], h)
	}
	return h
}

// partial are the tiles of the right edge that are not full.
func (t *tree) partial() map[tlog.Tile][]byte {
	tiles := map[tlog.Tile][]byte{}
	for level, hashes := range t.edges {
		if len(hashes) > 0 {
			n := t.size >> (tileHeight * (level + 1))
			tiles[tlog.Tile{H: tileHeight, L: level, N: int64(n), W: len(hashes)}] = tileData(hashes)
		}
	}
	return tiles
}

// emptyRoot is SHA-256 of nothing.
var emptyRoot = tlog.Hash{
	0xe3, 0xb0, 0xc4, 0x42, 0x98, 0xfc, 0x1c, 0x14, 0x9a, 0xfb, 0xf4, 0xc8, 0x99, 0x6f, 0xb9, 0x24,
	0x27, 0xae, 0x41, 0xe4, 0x64, 0x9b, 0x93, 0x4c, 0xa4, 0x95, 0x99, 0x1b, 0x78, 0x52, 0xb8, 0x55,
}

// perfect is the hash of a subtree whose leaves' number is a power of two.
func perfect(hashes []tlog.Hash) tlog.Hash {
	var room [tileWidth]tlog.Hash
	level := room[:copy(room[:], hashes)]
	for len(level) > 1 {
		for i := 0; i < len(level); i += 2 {
			level[i/2] = tlog.NodeHash(level[i], level[i+1])
		}
		level = level[:len(level)/2]
	}
	return level[0]
}

func tileData(hashes []tlog.Hash) []byte {
	b := make([]byte, 0, len(hashes)*tlog.HashSize)
	for _, h := range hashes {
		b = append(b, h[:]...)
	}
	return b
}

func tileHashes(data []byte) []tlog.Hash {
	hashes := make([]tlog.Hash, len(data)/tlog.HashSize)
	for i := range hashes {
		copy(hashes[i][:], data[i*tlog.HashSize:])
	}
	return hashes
}
