package audit

import (
	"fmt"
	"testing"

	"golang.org/x/mod/sumdb/tlog"
)

// The tree is tlog's at every size, and its tiles are tlog's tiles.
func TestTreeIsTlogs(t *testing.T) {
	const most = 1<<16 + 300
	var ours tree
	var stored []tlog.Hash
	reader := tlog.HashReaderFunc(func(at []int64) ([]tlog.Hash, error) {
		out := make([]tlog.Hash, len(at))
		for i, n := range at {
			out[i] = stored[n]
		}
		return out, nil
	})
	tiles := map[tlog.Tile][]byte{}
	fits := func(tile tlog.Tile, data []byte) {
		want, err := tlog.ReadTileData(tile, reader)
		if err != nil {
			t.Fatal(err)
		}
		if string(data) != string(want) {
			t.Fatalf("%s is not tlog's", tile.Path())
		}
	}
	for n := range uint64(most) {
		record := fmt.Appendf(nil, "record %d", n)
		hashes, err := tlog.StoredHashes(int64(n), record, reader)
		if err != nil {
			t.Fatal(err)
		}
		stored = append(stored, hashes...)
		ours.add(hashOf(record), func(tile tlog.Tile, data []byte) { tiles[tile] = data })
		size := n + 1
		if size > 1100 && size < 1<<16-3 && size%997 != 0 {
			continue
		}
		want, err := tlog.TreeHash(int64(size), reader)
		if err != nil {
			t.Fatal(err)
		}
		if root := ours.root(); root != want {
			t.Fatalf("root of %d leaves: %s, want %s", size, root, want)
		}
		for tile, data := range ours.partial() {
			fits(tile, data)
		}
	}
	for tile, data := range tiles {
		fits(tile, data)
	}
	if all, edge := len(tlog.NewTiles(tileHeight, 0, most)), len(ours.partial()); all != len(tiles)+edge {
		t.Errorf("%d tiles and %d at the edge, want %d", len(tiles), edge, all)
	}
}
