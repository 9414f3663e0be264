package bus_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/nats-io/nats.go"

	"waybill.dev/bus"
	"waybill.dev/bus/embed"
	"waybill.dev/schemas"
)

func (w *world) system(o bus.Options) *bus.System {
	w.t.Helper()
	s, err := w.open(o).System(w.t.Context())
	if err != nil {
		w.t.Fatal(err)
	}
	return s
}

// Who watches is given all records of its kinds in order, is told when it knows
// what there was, and hears what comes later.
func TestSystemWatch(t *testing.T) {
	w := start(t, embed.Options{})
	pol, op := w.system(bus.Options{Role: bus.RolePolicy}), w.system(bus.Options{Role: bus.RoleOperator})
	if _, err := op.Append(t.Context(), "approval", "a", []byte("grant")); err != nil {
		t.Fatal(err)
	}
	for i := range 300 {
		if _, err := pol.Append(t.Context(), "policy", fmt.Sprintf("p%d", i%3), fmt.Append(nil, i)); err != nil {
			t.Fatal(err)
		}
	}
	observer := w.system(bus.Options{Role: bus.RoleObserver})
	var got []bus.Record
	knows, more := make(chan int, 1), make(chan bus.Record, 1)
	background(t, func(ctx context.Context) error {
		return observer.Watch(ctx, []string{"policy"}, func(all bool) {
			if all {
				knows <- len(got)
			}
		}, func(_ context.Context, r bus.Record) error {
			if got = append(got, r); len(got) > 300 {
				more <- r
			}
			return errors.New("a fault of who takes stops nothing")
		})
	})
	if n := <-knows; n != 300 {
		t.Fatalf("knows after %d records, there were 300", n)
	}
	for i, r := range got {
		if r.Kind != "policy" || r.Name != fmt.Sprintf("p%d", i%3) || string(r.Body) != fmt.Sprint(i) || r.Stored.IsZero() {
			t.Fatalf("record %d is %+v", i, r)
		}
	}
	seq, err := pol.Append(t.Context(), "policy", "p0", []byte("live"))
	if err != nil {
		t.Fatal(err)
	}
	if r := <-more; r.Seq != seq || string(r.Body) != "live" {
		t.Errorf("then hears %+v, not sequence %d", r, seq)
	}

	// Where there is nothing, that is known at once.
	background(t, func(ctx context.Context) error {
		return observer.Watch(ctx, []string{"tool"}, func(all bool) {
			if all {
				knows <- 0
			}
		}, func(_ context.Context, r bus.Record) error { t.Errorf("hears %+v", r); return nil })
	})
	<-knows
	if err := observer.Watch(t.Context(), []string{"a.b"}, nil, nil); err == nil {
		t.Error("watches a kind that is no token")
	}
}

// Two that want to say what comes next: one does.
func TestSystemAppendAfter(t *testing.T) {
	w := start(t, embed.Options{})
	s := w.system(bus.Options{Role: bus.RoleOperator})
	first, err := s.AppendAfter(t.Context(), "approval", "x", []byte("0"), 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.AppendAfter(t.Context(), "approval", "x", []byte("again"), 0); !errors.Is(err, bus.ErrOvertaken) {
		t.Errorf("a second first: %v", err)
	}
	var mu sync.Mutex
	var won []uint64
	var all sync.WaitGroup
	for i := range 8 {
		all.Go(func() {
			seq, err := s.AppendAfter(t.Context(), "approval", "x", fmt.Append(nil, i), first)
			mu.Lock()
			defer mu.Unlock()
			if err == nil {
				won = append(won, seq)
			} else if !errors.Is(err, bus.ErrOvertaken) {
				t.Error(err)
			}
		})
	}
	all.Wait()
	if r, err := s.Latest(t.Context(), "approval", "x"); err != nil || len(won) != 1 || r.Seq != won[0] {
		t.Errorf("%v won; the newest is %+v, %v", won, r, err)
	}
	if _, err := s.Latest(t.Context(), "approval", "y"); !errors.Is(err, schemas.ErrNotFound) {
		t.Errorf("what there is not: %v", err)
	}
	for _, name := range []string{"", "a.b", "*", "A", "a b"} {
		if _, err := s.Append(t.Context(), "approval", name, nil); !errors.Is(err, schemas.ErrInvalid) {
			t.Errorf("name %q: %v", name, err)
		}
	}
	if _, err := s.Append(t.Context(), "approval", "x", make([]byte, bus.MaxBody+1)); !errors.Is(err, schemas.ErrTooLarge) {
		t.Errorf("a record too large: %v", err)
	}
}

// A store that fails, or fails after it has stored, ends with one record.
func TestSystemFaults(t *testing.T) {
	for _, after := range []bool{false, true} {
		w := start(t, embed.Options{})
		failed := 0
		s := w.system(bus.Options{Role: bus.RoleOperator, FaultSystem: func(_, _ string, stored bool) error {
			if stored == after && failed < 2 {
				failed++
				return errors.New("injected")
			}
			return nil
		}})
		one, err := s.AppendAfter(t.Context(), "approval", "x", []byte("1"), 0)
		if err != nil {
			t.Fatalf("stored %t: %v", after, err)
		}
		failed = 0
		two, err := s.Append(t.Context(), "approval", "x", []byte("1"))
		if err != nil {
			t.Fatalf("stored %t: %v", after, err)
		}
		failed = 0
		three, err := s.AppendAfter(t.Context(), "approval", "x", []byte("1"), two)
		if err != nil || one != 1 || two != 2 || three != 3 {
			t.Errorf("stored %t: sequences %d, %d, %d, %v", after, one, two, three, err)
		}
	}
}

func TestSystemContent(t *testing.T) {
	w := start(t, embed.Options{})
	s, observer := w.system(bus.Options{Role: bus.RolePolicy}), w.system(bus.Options{Role: bus.RoleObserver})
	for _, n := range []int{0, 1, 1 << 20, 1<<20 + 1, 5 << 20} {
		content := bytes.Repeat([]byte{byte(n), 'x', '\n', 0}, n/4+1)[:n]
		sum := sha256.Sum256(content)
		for range 2 {
			digest, err := s.Put(t.Context(), content)
			if err != nil || digest != hex.EncodeToString(sum[:]) {
				t.Fatalf("%d bytes: %s, %v", n, digest, err)
			}
		}
		if got, err := observer.Get(t.Context(), hex.EncodeToString(sum[:])); err != nil || !bytes.Equal(got, content) {
			t.Errorf("%d bytes: read back %d, %v", n, len(got), err)
		}
	}
	if _, err := s.Put(t.Context(), make([]byte, bus.MaxContent+1)); !errors.Is(err, schemas.ErrTooLarge) {
		t.Errorf("too large: %v", err)
	}
	if _, err := s.Get(t.Context(), strings.Repeat("0", 64)); !errors.Is(err, schemas.ErrNotFound) {
		t.Errorf("what there is not: %v", err)
	}

	// Something else under a digest is found out, and put right by the real one.
	sum := sha256.Sum256([]byte("rules"))
	digest := hex.EncodeToString(sum[:])
	nc, err := w.srv.Connect(bus.RolePolicy)
	if err != nil {
		t.Fatal(err)
	}
	defer nc.Close()
	if _, err := nc.Request("sys.content."+digest, []byte("other rules"), patience); err != nil {
		t.Fatal(err)
	}
	if got, err := s.Get(t.Context(), digest); err == nil || !strings.Contains(err.Error(), "damaged") {
		t.Errorf("read %q, %v", got, err)
	}
	if _, err := s.Put(t.Context(), []byte("rules")); err != nil {
		t.Fatal(err)
	}
	if got, err := s.Get(t.Context(), digest); err != nil || string(got) != "rules" {
		t.Errorf("read %q, %v", got, err)
	}
}

// Each role stores its own kinds of records; only the operator grants.
func TestSystemRights(t *testing.T) {
	w := start(t, embed.Options{})
	w.system(bus.Options{Role: bus.RoleObserver})
	may := map[bus.Role][]string{
		bus.RolePolicy: {"policy", "content"}, bus.RoleDispatch: {"tool", "content"},
		bus.RoleOperator: {"policy", "approval", "pin", "content"},
	}
	for _, role := range []bus.Role{bus.RoleEdge, bus.RolePolicy, bus.RoleDispatch, bus.RoleProject, bus.RoleOperator, bus.RoleObserver} {
		denied := make(chan error, 64)
		nc, err := w.srv.Connect(role, nats.ErrorHandler(func(_ *nats.Conn, _ *nats.Subscription, err error) { denied <- err }))
		if err != nil {
			t.Fatal(err)
		}
		defer nc.Close()
		for _, kind := range []string{"policy", "approval", "tool", "pin", "content"} {
			want := slices.Contains(may[role], kind)
			reply := nc.NewInbox()
			sub, err := nc.SubscribeSync(reply)
			if err != nil {
				t.Fatal(err)
			}
			if err := nc.PublishRequest("sys."+kind+".x", reply, []byte("x")); err != nil {
				t.Fatal(err)
			}
			if !want {
				if err := <-denied; !errors.Is(err, nats.ErrPermissionViolation) {
					t.Errorf("%s stores %s: %v", role, kind, err)
				}
			} else if m, err := sub.NextMsg(patience); err != nil || !strings.Contains(string(m.Data), `"seq"`) {
				t.Errorf("%s cannot store %s: %v", role, kind, err)
			}
		}
	}
}
