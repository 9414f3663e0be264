package test

import (
	"context"
	"strings"
	"testing"

	"waybill.dev/test/gateway"
	"waybill.dev/test/peers"
	"waybill.dev/test/upstream"
)

func TestMain(m *testing.M) {
	gateway.Main(m, map[string]func(context.Context) error{upstream.Child: upstream.Run, upstream.TasksChild: upstream.RunTasks, "nats": natsServer, connectChild: runConnect, clientLegChild: runClientLeg, serveChild: runServe})
}

// The official peers work through the gateway as they do without it.
func TestPeersThroughTheGateway(t *testing.T) {
	g := gateway.Start(t, gateway.Config("servers:\n"+gateway.Server("everything", peers.EverythingServer(t), "")))
	url := g.URL + "/mcp/everything"
	t.Run("conformance", func(t *testing.T) { peers.ConformanceModern(t, url) })
	t.Run("inspector", func(t *testing.T) { peers.ExerciseInspector(t, url) })
	t.Run("typescript", func(t *testing.T) { peers.ExerciseTypeScript(t, url) })
	t.Run("go", func(t *testing.T) { peers.ExerciseGoSDK(t, url) })

	// What they did can be listed and replayed.
	out, errs, exit := g.CLI("sessions")
	if exit != 0 || !strings.Contains(out, "acme") {
		t.Errorf("sessions: exit %d\n%s%s", exit, out, errs)
	}
	for _, e := range g.Events() {
		if err := e.Check(); err != nil {
			t.Error(err)
		}
	}
	if err := g.Stop(); err != nil {
		t.Errorf("stopping: %v", err)
	}
}
