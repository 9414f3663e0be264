package test

import (
	"encoding/json"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/modelcontextprotocol/go-sdk/mcp"

	"waybill.dev/schemas"
	"waybill.dev/test/gateway"
	"waybill.dev/test/peers"
)

// The Petstore, served by a program that knows nothing but its OpenAPI
// document and holds every request to it, as tools of the gateway, called by
// clients that know nothing but MCP.
func TestPetstore(t *testing.T) {
	document := filepath.Join(peers.Root(t), "workers", "dispatch", "testdata", "openapi", "petstore.yaml")
	url, prism := peers.Prism(t, document)
	g := gateway.Start(t, gateway.Config(`servers:
  - name: petstore
    openapi: {document: "`+document+`", url: "`+url+`", auth: {api_key: {env: PETSTORE_KEY}, petstore_auth: {env: PETSTORE_TOKEN}}}
`), "PETSTORE_KEY=key-of-the-petstore", "PETSTORE_TOKEN=token-of-the-petstore")

	ctx := t.Context()
	client := mcp.NewClient(&mcp.Implementation{Name: "waybill-test-petstore", Version: "1"}, nil)
	session, err := client.Connect(ctx, &mcp.StreamableClientTransport{Endpoint: g.URL + "/mcp/petstore"}, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer session.Close()
	if s := session.InitializeResult().ServerInfo; s == nil || s.Name != "petstore" || s.Version != "1.0.27" {
		t.Errorf("the server calls itself %+v", s)
	}

	var names []string
	for tool, err := range session.Tools(ctx, nil) {
		if err != nil {
			t.Fatal(err)
		}
		names = append(names, tool.Name)
	}
	want := []string{
		"addPet", "createUser", "deleteOrder", "deletePet", "findPetsByStatus", "findPetsByTags", "getInventory", "getOrderById",
		"getPetById", "getUserByName", "placeOrder", "updatePet", "updatePetWithForm", "uploadFile",
	}
	if !slices.Equal(names, want) {
		t.Errorf("tools %q", names)
	}

	// Prism refuses with 401, 404 or 422 what is not as the document says, so
	// these are held to it by somebody else.
	pet := map[string]any{"name": "rex", "photoUrls": []string{"https://pets.example/a b.png"}, "status": "sold", "tags": []any{map[string]any{"id": 1, "name": "x"}}}
	arguments := map[string]map[string]any{
		"addPet":            {"body": pet},
		"updatePet":         {"body": pet},
		"findPetsByStatus":  {"status": "pending"},
		"findPetsByTags":    {"tags": []string{"a b", "c,d", "ü&="}},
		"getPetById":        {"petId": 12},
		"updatePetWithForm": {"petId": 12, "name": "rex / max?", "status": "sold"},
		"deletePet":         {"petId": 12},
		"uploadFile":        {"petId": 12, "additionalMetadata": "100 %", "body": "iVBORw=="},
		"getInventory":      {},
		"placeOrder":        {"body": map[string]any{"petId": 12, "quantity": 1, "shipDate": "2026-07-28T10:00:00Z", "status": "placed"}},
		"getOrderById":      {"orderId": 1},
		"deleteOrder":       {"orderId": 1},
		"createUser":        {"body": map[string]any{"username": "ada", "password": "secret"}},
		"getUserByName":     {"username": "ada lovelace/1"},
	}
	for _, name := range names {
		result, err := session.CallTool(ctx, &mcp.CallToolParams{Name: name, Arguments: arguments[name]})
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if text, _ := json.Marshal(result.Content); result.IsError || len(result.Content) == 0 {
			t.Errorf("%s: %s", name, text)
		}
		if name == "getPetById" {
			if m, ok := result.StructuredContent.(map[string]any); !ok || m["name"] != "doggie" {
				t.Errorf("%s: %v", name, result.StructuredContent)
			}
		}
	}
	const received = "Request received"
	// It says so after it has answered, on a pipe.
	if !becomes(within, func() bool { return strings.Count(prism.Output(), received) >= len(names) }) {
		t.Errorf("prism received %d requests, want %d", strings.Count(prism.Output(), received), len(names))
	}

	// Wrong input gets no further than the gateway.
	for _, wrong := range []map[string]any{{"petId": "twelve"}, {"petId": 0}, {}, {"petId": 1, "x": 1}} {
		result, err := session.CallTool(ctx, &mcp.CallToolParams{Name: "getPetById", Arguments: wrong})
		if err != nil || !result.IsError {
			t.Errorf("%v: %+v, %v", wrong, result, err)
		}
	}
	if _, err := session.CallTool(ctx, &mcp.CallToolParams{Name: "feedPet"}); err == nil || !strings.Contains(err.Error(), "feedPet") {
		t.Errorf("a tool that does not exist: %v", err)
	}
	if n := strings.Count(prism.Output(), received); n != len(names) {
		t.Errorf("prism received %d requests, want %d: wrong input went through", n, len(names))
	}

	// A client that holds results to the output schemas, in both eras.
	for mode, revision := range map[string]string{"auto": "2026-07-28", "legacy": "2025-11-25"} {
		out := peers.NodeScript(t, filepath.Join("testdata", "petstore.mjs"), g.URL+"/mcp/petstore", mode)
		var seen struct {
			Revision string
			Listed   []string
			Pet      map[string]any
			Wrong    bool
		}
		if err := json.Unmarshal([]byte(out.Stdout), &seen); err != nil || out.Exit != 0 {
			t.Fatalf("TypeScript client: exit %d\n%s%s", out.Exit, out.Stdout, out.Stderr)
		}
		if seen.Revision != revision || !slices.Equal(seen.Listed, want) || seen.Pet["name"] != "doggie" || !seen.Wrong {
			t.Errorf("TypeScript client, %s: %+v", mode, seen)
		}
	}

	// With all servers behind one endpoint, too.
	federated, err := client.Connect(ctx, &mcp.StreamableClientTransport{Endpoint: g.URL + "/mcp"}, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer federated.Close()
	if result, err := federated.CallTool(ctx, &mcp.CallToolParams{Name: "petstore__getOrderById", Arguments: map[string]any{"orderId": 5}}); err != nil || result.IsError {
		t.Errorf("through /mcp: %+v, %v", result, err)
	}

	// The schemas are sound to who looks closely.
	if out := peers.Inspector(t, g.URL+"/mcp/petstore", "--transport", "http", "--protocol-era", "modern", "--format", "json", "--quiet",
		"--method", "tools/list", "--strict"); out.Exit != 0 {
		t.Errorf("Inspector: exit %d\n%s%s", out.Exit, out.Stdout, out.Stderr)
	}

	// Reads carry no claim, writes do; and the secrets are nowhere.
	claimed := map[string]bool{}
	for _, e := range g.Events() {
		text, err := json.Marshal(e)
		if err != nil {
			t.Fatal(err)
		}
		if all := string(text) + string(e.Body); strings.Contains(all, "of-the-petstore") {
			t.Errorf("a secret in %s", all)
		}
		if e.Kind() == schemas.KindStarted {
			claimed[string(e.Call)] = true
		}
	}
	if want := 8 + 1; len(claimed) != want { // POST, PUT, DELETE, and what nobody knows
		t.Errorf("%d calls were claimed, want %d", len(claimed), want)
	}
	if strings.Contains(g.Output(), "of-the-petstore") {
		t.Errorf("a secret in the log:\n%s", g.Output())
	}
	if err := g.Stop(); err != nil {
		t.Errorf("stopping: %v", err)
	}
}
