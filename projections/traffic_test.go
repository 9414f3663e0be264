package projections_test

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"waybill.dev/projections"
	"waybill.dev/schemas"
)

// Traffic is of some kinds, in the log's order, from a time on, and says from when
// on it is whole.
func TestTraffic(t *testing.T) {
	onServers(t, func(t *testing.T, s projections.Server) {
		base := day().Add(-3 * time.Hour)
		all := made(40, base)
		for i := range all[40:] {
			all[40+i].Stored = all[40+i].Stored.Add(2 * time.Hour)
			all[40+i].Tenant = "other"
		}
		take(t, writer(t, s, logOf("one", all)), all)
		kinds := []schemas.Kind{schemas.KindRequested, schemas.KindDenied}
		for _, tt := range []struct {
			from   time.Time
			tenant schemas.Tenant
			whole  bool // since the log began
			want   func(schemas.Event) bool
		}{
			{base.Add(-time.Hour), "", true, func(schemas.Event) bool { return true }},
			{base.Add(time.Hour), "", false, func(e schemas.Event) bool { return e.Seq > 40 }},
			{all[7].Stored, "acme", false, func(e schemas.Event) bool { return e.Seq > 7 && e.Seq <= 40 }},
			{base.Add(-time.Hour), "other", true, func(e schemas.Event) bool { return e.Seq > 40 }},
			{base.Add(4 * time.Hour), "", false, func(schemas.Event) bool { return false }},
		} {
			whole, events, err := projections.Traffic(t.Context(), s, tt.tenant, kinds, tt.from)
			if err != nil {
				t.Fatal(err)
			}
			if whole.IsZero() != tt.whole || !tt.whole && !whole.Equal(tt.from) {
				t.Errorf("from %s: whole from %s on", tt.from, whole)
			}
			var got, want []string
			for e, err := range events {
				if err != nil {
					t.Fatal(err)
				}
				text, _ := e.MarshalJSON()
				got = append(got, string(text))
			}
			for _, e := range all {
				if slices.Contains(kinds, e.Kind()) && tt.want(e) {
					text, _ := e.MarshalJSON()
					want = append(want, string(text))
				}
			}
			if !slices.Equal(got, want) {
				t.Errorf("from %s of %q: %d events\n%s\nwant %d\n%s", tt.from, tt.tenant, len(got), strings.Join(got, "\n"), len(want), fmt.Sprint(want))
			}
		}
	})
}
