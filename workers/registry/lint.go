package registry

import (
	"fmt"
	"maps"
	"regexp"
	"slices"
	"strings"
	"unicode"
)

// Notes are advice to who approves. They decide nothing: patterns find few of
// the texts that mean harm, and some that mean none.

const (
	maxNotes = 16
	maxRead  = 64 << 10 // bytes of a definition that are read for phrases
)

// phrases are what descriptions of tools have no reason to say.
var phrases = []struct {
	what string
	re   *regexp.Regexp
}{
	{"speaks to the model as a system would", regexp.MustCompile(`(?i)<\s*/?\s*(important|system|instructions?|secret|admin|critical)\s*>|\bsystem prompt\b|\[\[?\s*(system|inst)\b`)},
	{"wants other instructions forgotten", regexp.MustCompile(`(?i)\b(ignore|disregard|forget|override)\b.{0,30}\b(previous|prior|above|earlier|all|any|other|your)\b.{0,30}\b(instruction|rule|prompt|guideline|message|policy)`)},
	{"wants something kept from the user", regexp.MustCompile(`(?i)\b(do not|don't|never|without)\b.{0,20}\b(tell|telling|mention|mentioning|inform|informing|reveal|show|notify|notifying|asking|ask)\b.{0,30}\b(user|human|anyone|person|them|him|her)\b|\b(secretly|silently|covertly)\b`)},
	{"says when other tools are to be used", regexp.MustCompile(`(?i)\b(before|after|instead of|whenever|when)\b.{0,30}\b(using|calling|invoking|use|call|run|running)\b.{0,30}\b(this|any|other|another|every|the)\b.{0,20}\btools?\b`)},
	{"gives orders", regexp.MustCompile(`(?i)\byou (must|have to|need to|are required to|shall)\b|\b(mandatory|strictly required)\b`)},
	{"speaks of secrets", regexp.MustCompile(`(?i)~/\.\w+|\bid_(rsa|ed25519)\b|/etc/(passwd|shadow)|\.ssh/|\.aws/|\.env\b|\bprivate key\b|\b(pass|send|include|append|attach)\b.{0,40}\b(api[ _-]?key|password|token|credential|secret)s?\b`)},
}

// lint looks at all texts of a definition.
func lint(v any) []string {
	var notes []string
	left := maxRead
	note := func(format string, args ...any) {
		if s := fmt.Sprintf(format, args...); len(notes) < maxNotes && !slices.Contains(notes, s) {
			notes = append(notes, s)
		}
	}
	text := func(path, s string) {
		unseen := map[rune]int{}
		before := rune(0)
		for _, r := range s {
			// What emoji are made of is seen.
			joins := (r == 0xFE0F || r == 0x200D) && (unicode.IsSymbol(before) || before == 0xFE0F || unicode.IsDigit(before))
			if hidden(r) && !joins && r != '\n' && r != '\t' && r != '\r' {
				unseen[r]++
			}
			before = r
		}
		for _, r := range slices.Sorted(maps.Keys(unseen)) {
			note("%s: hidden character U+%04X, %d times", path, r, unseen[r])
		}
		if left -= len(s); left < 0 {
			note("%s: and what follows is longer than is looked at", path)
			return
		}
		for _, p := range phrases {
			if found := p.re.FindString(s); found != "" {
				note("%s: %s: %q", path, p.what, clip(found, 80))
			}
		}
	}
	var walk func(path string, v any)
	walk = func(path string, v any) {
		switch v := v.(type) {
		case string:
			text(path, v)
		case []any:
			for i, e := range v {
				walk(fmt.Sprintf("%s/%d", path, i), e)
			}
		case map[string]any:
			for _, k := range slices.Sorted(maps.Keys(v)) {
				at := path + "/" + clip(escape(k), 80)
				if strings.HasSuffix(path, "/properties") {
					if len(k) > 64 || strings.Count(k, " ") > 1 || strings.Count(k, "_") > 7 {
						note("%s: the name of an argument is as long as a sentence", at)
					}
				}
				text(at, k)
				walk(at, v[k])
			}
		}
	}
	walk("", v)
	return notes
}
