package test

import (
	"context"
	"fmt"
	"net"
	"net/url"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats-server/v2/server"

	"waybill.dev/schemas"
	"waybill.dev/test/gateway"
	"waybill.dev/test/peers"
)

const (
	envNATS    = "WAYBILL_TEST_NATS"     // address
	envNATSDir = "WAYBILL_TEST_NATS_DIR" // store

	// For a node of a cluster: its name, its address for the others, and theirs
	// with its own.
	envNATSCluster = "WAYBILL_TEST_NATS_CLUSTER"
)

// natsServer is a stock NATS server in a process of its own.
func natsServer(ctx context.Context) error {
	host, port, err := net.SplitHostPort(os.Getenv(envNATS))
	if err != nil {
		return err
	}
	o := &server.Options{Host: host, JetStream: true, StoreDir: os.Getenv(envNATSDir), MaxPayload: 8 << 20, NoSigs: true}
	if o.Port, err = strconv.Atoi(port); err != nil {
		return err
	}
	if cluster := os.Getenv(envNATSCluster); cluster != "" {
		name, addrs, _ := strings.Cut(cluster, " ")
		own, all, _ := strings.Cut(addrs, " ")
		o.ServerName, o.Cluster.Name, o.Cluster.PoolSize = name, "waybill", -1
		o.Cluster.Host, port, _ = strings.Cut(own, ":")
		if o.Cluster.Port, err = strconv.Atoi(port); err != nil {
			return err
		}
		for addr := range strings.SplitSeq(all, " ") {
			o.Routes = append(o.Routes, &url.URL{Scheme: "nats", Host: addr})
		}
	}
	s, err := server.NewServer(o)
	if err != nil {
		return err
	}
	s.Start()
	if !s.ReadyForConnections(time.Minute) {
		return fmt.Errorf("no connections")
	}
	fmt.Println("nats listens")
	<-ctx.Done()
	s.Shutdown()
	s.WaitForShutdown()
	return nil
}

// The same gateway against an external NATS, with its roles in processes of
// their own; NATS is killed and comes back, and so is a worker in the middle.
func TestExternalNATSAndRolesApart(t *testing.T) {
	addr, dir := gateway.FreeAddr(t), t.TempDir()
	startNATS := func() *peers.Process {
		p := gateway.Child(t, "nats", envNATS+"="+addr, envNATSDir+"="+dir)
		if _, err := p.Await(t.Context(), "nats listens"); err != nil {
			t.Fatal(err)
		}
		return p
	}
	nats := startNATS()
	config := gateway.Config(fmt.Sprintf("bus: {url: \"nats://%s\", replicas: 1}\nservers:\n", addr) +
		gateway.Server("everything", peers.EverythingServer(t), ""))
	gateway.Start(t, config, gateway.Roles("policy"))
	dispatch := gateway.Start(t, config, gateway.Roles("dispatch"))
	edge := gateway.Start(t, config, gateway.Roles("edge"))

	call := func() (gateway.Answer, error) {
		return edge.Post(t.Context(), "everything", "tools/call", "test_simple_text",
			`{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{"name":"test_simple_text","arguments":{},`+gateway.Meta+`}}`)
	}
	works := func(when string) {
		t.Helper()
		var last string
		for deadline := time.Now().Add(time.Minute); time.Now().Before(deadline); {
			a, err := call()
			if err == nil && a.Status == 200 && strings.Contains(string(a.Body), "This is a simple text response") {
				return
			}
			last = fmt.Sprintf("%v %d %s", err, a.Status, a.Body)
		}
		t.Fatalf("%s: %s", when, last)
	}
	works("at first")
	peers.ExerciseGoSDK(t, edge.URL+"/mcp/everything")

	dispatch.Kill()
	dispatch.Restart()
	works("after dispatch was killed")

	nats.Kill()
	nats = startNATS()
	works("after NATS was killed")

	// One ending for each call, whatever happened around it.
	endings := map[schemas.CallID]int{}
	for _, e := range edge.Events() {
		if e.Kind() == schemas.KindRequested {
			endings[e.Call] += 0
		} else if e.Kind().Ends() {
			endings[e.Call]++
		}
	}
	if len(endings) == 0 {
		t.Error("no calls in the log")
	}
	for id, n := range endings {
		if n > 1 {
			t.Errorf("call %s has %d endings", id, n)
		}
	}
	if err := nats.Stop(); err != nil {
		t.Error(err)
	}
}
