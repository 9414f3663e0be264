// What a TypeScript SDK's client of revision 2025-11-25 sees, through a gateway, of everything-server without sessions,
// as one JSON object: "translatedSeen" of translated.go, whose comments say what each member is. Argument: a JSON object with
//   sdk   "v1" (@modelcontextprotocol/sdk) or "v2" (@modelcontextprotocol/client)
//   url   the endpoint
//   odd   another, of whose tools one answers what this revision does not have
const { sdk, url, odd } = JSON.parse(process.argv[2]);
const patience = 20_000;

async function load() {
  if (sdk === 'v2') {
    const { Client, StreamableHTTPClientTransport } = await import('@modelcontextprotocol/client');
    return {
      Client, StreamableHTTPClientTransport,
      onRequest: (client, method, handle) => client.setRequestHandler(method, handle),
      onNotification: (client, method, handle) => client.setNotificationHandler(method, handle),
      callTool: (client, params, options) => client.callTool(params, options),
    };
  }
  const { Client } = await import('@modelcontextprotocol/sdk/client/index.js');
  const { StreamableHTTPClientTransport } = await import('@modelcontextprotocol/sdk/client/streamableHttp.js');
  const types = await import('@modelcontextprotocol/sdk/types.js');
  const requests = {
    'sampling/createMessage': types.CreateMessageRequestSchema,
    'elicitation/create': types.ElicitRequestSchema,
    'roots/list': types.ListRootsRequestSchema,
  };
  const notifications = {
    'notifications/message': types.LoggingMessageNotificationSchema,
    'notifications/resources/updated': types.ResourceUpdatedNotificationSchema,
    'notifications/tools/list_changed': types.ToolListChangedNotificationSchema,
  };
  return {
    Client, StreamableHTTPClientTransport,
    onRequest: (client, method, handle) => client.setRequestHandler(requests[method], handle),
    onNotification: (client, method, handle) => client.setNotificationHandler(notifications[method], handle),
    callTool: (client, params, options) => client.callTool(params, undefined, options),
  };
}

// told is what came of a kind; take waits for one.
const told = {};
const waiting = [];
const tell = (kind, what) => {
  (told[kind] ??= []).push(what);
  waiting.splice(0).forEach((look) => look());
};
async function take(kind, fits = () => true) {
  const deadline = Date.now() + patience;
  for (;;) {
    const found = (told[kind] ?? []).find(fits);
    if (found !== undefined) return found;
    const left = deadline - Date.now();
    if (left <= 0) throw new Error(`waited for ${kind}; came: ${JSON.stringify(told)}`);
    await new Promise((look) => {
      const timer = setTimeout(look, left);
      waiting.push(() => { clearTimeout(timer); look(); });
    });
  }
}

const { Client, StreamableHTTPClientTransport, onRequest, onNotification, callTool } = await load();
async function connect(to) {
  const client = new Client(
    { name: `waybill-test-typescript-${sdk}`, version: '1' },
    { capabilities: { sampling: {}, elicitation: {}, roots: { listChanged: true } } },
  );
  onRequest(client, 'sampling/createMessage', () => ({ model: 'm', role: 'assistant', content: { type: 'text', text: 'Grüße' } }));
  onRequest(client, 'elicitation/create', () => ({ action: 'accept', content: { name: 'Ada', color: 'green', ok: true, context: 'rain' } }));
  onRequest(client, 'roots/list', () => ({ roots: [{ uri: 'file:///waybill/one', name: 'one' }] }));
  onNotification(client, 'notifications/message', ({ params }) => tell('log', params.data));
  onNotification(client, 'notifications/resources/updated', ({ params }) => tell('updated', params.uri));
  onNotification(client, 'notifications/tools/list_changed', () => tell('tools', true));
  const transport = new StreamableHTTPClientTransport(new URL(to));
  await client.connect(transport);
  return { client, transport };
}

const { client, transport } = await connect(url);
const seen = { Revision: transport.protocolVersion, Inputs: [], Progress: [] };
const call = (name, args = {}, options = undefined) => callTool(client, { name, arguments: args }, options);
const text = async (...args) => (await call(...args)).content[0].text;

seen.Tools = (await client.listTools()).tools.length;
for (const tool of ['elicitation', 'sampling', 'list_roots', 'request_state', 'multiple_inputs', 'multi_round', 'tampered_state']) {
  seen.Inputs.push(await text(`test_input_required_result_${tool}`));
}
seen.Inputs.push((await client.getPrompt({ name: 'test_input_required_result_prompt' })).messages[0].content.text);
await text('test_tool_with_progress', {}, { onprogress: ({ progress }) => seen.Progress.push(progress) });
await client.setLoggingLevel('info');
await text('test_tool_with_logging');
seen.Logged = await take('log', (data) => data === 'Tool execution completed');
await text('test_trigger_tool_change');
seen.Changed = await take('tools');
await client.subscribeResource({ uri: 'test://watched-resource' });
seen.Updated = await take('updated');
await client.unsubscribeResource({ uri: 'test://watched-resource' });
seen.Resources = (await client.listResources()).resources.length;
seen.Read = (await client.readResource({ uri: 'test://static-text' })).contents[0].text;
seen.Missing = await client.readResource({ uri: 'test://not-there' }).then(() => 0, (error) => error.code);
await transport.terminateSession();
await client.close();

const other = await connect(odd);
seen.OddTools = (await other.client.listTools()).tools.map(({ name }) => name);
seen.Odd = (await callTool(other.client, { name: 'list', arguments: {} })).content[0].text;
await other.client.close();

console.log(JSON.stringify(seen));
