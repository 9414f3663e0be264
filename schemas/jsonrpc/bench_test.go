package jsonrpc

import (
	"bytes"
	"fmt"
	"io"
	"strings"
	"testing"

	"github.com/go-json-experiment/json/jsontext"
)

// call1K is an ordinary tools/call of MCP 2026-07-28, about 1 KB.
var call1K = []byte(`{"jsonrpc":"2.0","id":4711,"method":"tools/call","params":{"name":"files__search","arguments":{` +
	`"query":"quarterly report 2026 revenue by region","path":"/srv/shared/finance/2026","recursive":true,"limit":50,` +
	`"filters":[{"field":"modified","op":">=","value":"2026-01-01T00:00:00Z"},{"field":"size","op":"<","value":10485760}],` +
	`"options":{"highlight":true,"snippets":3,"language":"de","fuzzy":0.8,"fields":["title","body","author","tags"]},` +
	`"note":"Bitte nur abgeschlossene Quartale; \"draft\" und Entwürfe auslassen. Danke schön!"},` +
	`"_meta":{"io.modelcontextprotocol/protocolVersion":"2026-07-28",` +
	`"io.modelcontextprotocol/clientCapabilities":{"elicitation":{"form":{}},"sampling":{}},` +
	`"io.modelcontextprotocol/clientInfo":{"name":"researcher","version":"1.4.2"},` +
	`"progressToken":"p-4711","traceparent":"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"}}}`)

func BenchmarkDecode(b *testing.B) {
	large := []byte(`{"jsonrpc":"2.0","id":1,"result":{"content":[{"type":"text","text":"` + strings.Repeat("0123456789abcdef", 64<<10) + `"}]}}`)
	var many bytes.Buffer
	many.WriteString(`{"jsonrpc":"2.0","id":1,"result":{`)
	for i := range 100_000 {
		fmt.Fprintf(&many, `"name%d":%d,`, i, i)
	}
	many.WriteString(`"last":0}}`)
	for _, c := range []struct {
		name string
		raw  []byte
	}{{"1KB", call1K}, {"1MBstring", large}, {"100000names", many.Bytes()}} {
		b.Run(c.name, func(b *testing.B) {
			b.SetBytes(int64(len(c.raw)))
			b.ReportAllocs()
			for b.Loop() {
				if _, err := Decode(c.raw, Limits{}); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

// BenchmarkJsontextTokens is what the lexing alone would cost with jsontext,
// without any check of names.
func BenchmarkJsontextTokens(b *testing.B) {
	b.SetBytes(int64(len(call1K)))
	b.ReportAllocs()
	var d jsontext.Decoder
	for b.Loop() {
		d.Reset(bytes.NewBuffer(call1K), jsontext.AllowDuplicateNames(true))
		for {
			if _, err := d.ReadToken(); err == io.EOF {
				break
			} else if err != nil {
				b.Fatal(err)
			}
		}
	}
}

func BenchmarkGet(b *testing.B) {
	m, err := Decode(call1K, Limits{})
	if err != nil {
		b.Fatal(err)
	}
	b.ReportAllocs()
	for b.Loop() {
		if !m.Params().Get("_meta", "io.modelcontextprotocol/clientInfo", "name").Exists() {
			b.Fatal("not found")
		}
	}
}

func BenchmarkPatch(b *testing.B) {
	m, err := Decode(call1K, Limits{})
	if err != nil {
		b.Fatal(err)
	}
	id, name := []byte("1"), []byte(`"search"`)
	b.ReportAllocs()
	for b.Loop() {
		p := m.Patch().Replace(m.ID(), id).Set(m.Params(), "name", name)
		p.Remove(m.Params().Get("_meta"), "progressToken")
		if p.Bytes() == nil {
			b.Fatal(p.Err())
		}
	}
}
