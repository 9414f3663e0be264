// What a TypeScript SDK's client sees of server-everything in a session of revision 2025-11-25, as one JSON object:
// "legacySeen" of legacy.go, whose comments say what each member is. Argument: a JSON object with
//   sdk     "v1" (@modelcontextprotocol/sdk) or "v2" (@modelcontextprotocol/client)
//   url     the endpoint
//   prefix  what stands before the names of tools and prompts
//   unique  a word that no other run uses: server-everything shares the names of session resources among its sessions
//   token   bearer token, or ""
//   command what to start and speak to by stdin and stdout instead of the URL, or null
//   duration, steps   of the operation whose stream is cut
// Both SDKs do every step themselves. URIs come from lists, because an endpoint may rewrite them.
const { sdk, url, prefix, unique, token, command, duration, steps } = JSON.parse(process.argv[2]);
const named = (name) => prefix + name;
const patience = 20_000;

// What differs between the two SDKs.
async function load() {
  if (sdk === 'v2') {
    const { Client, StreamableHTTPClientTransport, UriTemplate } = await import('@modelcontextprotocol/client');
    const { StdioClientTransport } = await import('@modelcontextprotocol/client/stdio');
    return {
      Client, StreamableHTTPClientTransport, StdioClientTransport, UriTemplate,
      onRequest: (client, method, handle) => client.setRequestHandler(method, handle),
      onNotification: (client, method, handle) => client.setNotificationHandler(method, handle),
      call: (client, params, options) => client.callTool(params, options),
    };
  }
  const { Client } = await import('@modelcontextprotocol/sdk/client/index.js');
  const { StreamableHTTPClientTransport } = await import('@modelcontextprotocol/sdk/client/streamableHttp.js');
  const { StdioClientTransport } = await import('@modelcontextprotocol/sdk/client/stdio.js');
  const { UriTemplate } = await import('@modelcontextprotocol/sdk/shared/uriTemplate.js');
  const types = await import('@modelcontextprotocol/sdk/types.js');
  const requests = {
    'sampling/createMessage': types.CreateMessageRequestSchema,
    'elicitation/create': types.ElicitRequestSchema,
    'roots/list': types.ListRootsRequestSchema,
  };
  const notifications = {
    'notifications/message': types.LoggingMessageNotificationSchema,
    'notifications/resources/updated': types.ResourceUpdatedNotificationSchema,
    'notifications/resources/list_changed': types.ResourceListChangedNotificationSchema,
  };
  return {
    Client, StreamableHTTPClientTransport, StdioClientTransport, UriTemplate,
    onRequest: (client, method, handle) => client.setRequestHandler(requests[method], handle),
    onNotification: (client, method, handle) => client.setNotificationHandler(notifications[method], handle),
    call: (client, params, options) => client.callTool(params, undefined, options),
  };
}

// A list that can be waited on: take returns the first entry from there on that fits, and waits for one.
class Inbox {
  entries = [];
  waiting = [];
  push(entry) {
    this.entries.push(entry);
    this.waiting.splice(0).forEach((look) => look());
  }
  async take(what, fits, from = 0) {
    const deadline = Date.now() + patience;
    for (;;) {
      const found = this.entries.slice(from).find(fits);
      if (found !== undefined) return found;
      const left = deadline - Date.now();
      if (left <= 0) throw new Error(`waited for ${what}; came: ${JSON.stringify(this.entries)}`);
      await new Promise((look) => {
        const timer = setTimeout(look, left);
        this.waiting.push(() => { clearTimeout(timer); look(); });
      });
    }
  }
}

// All pages of a list.
async function all(list, member) {
  const entries = [];
  let cursor;
  do {
    const page = await list(cursor === undefined ? {} : { cursor });
    entries.push(...page[member]);
    cursor = page.nextCursor;
  } while (cursor !== undefined);
  return entries;
}

const { Client, StreamableHTTPClientTransport, StdioClientTransport, UriTemplate, onRequest, onNotification, call: callTool } = await load();
const seen = {};
const logs = new Inbox();
const updates = new Inbox();
const changes = new Inbox();
let roots = [{ uri: 'file:///waybill/one', name: 'one' }];
let elicit = { action: 'accept', content: { name: 'Ada', check: true } };
let asked;

const client = new Client(
  { name: `waybill-test-typescript-${sdk}`, version: '1' },
  { capabilities: { sampling: {}, elicitation: {}, roots: { listChanged: true } } },
);
onRequest(client, 'sampling/createMessage', ({ params }) => {
  asked = params.messages[0].content.text;
  return { model: 'waybill-model', role: 'assistant', content: { type: 'text', text: 'sampled: grüße' } };
});
onRequest(client, 'elicitation/create', ({ params }) => {
  asked = params.message;
  return elicit;
});
onRequest(client, 'roots/list', () => ({ roots }));
onNotification(client, 'notifications/message', ({ params }) => logs.push(params));
onNotification(client, 'notifications/resources/updated', ({ params }) => updates.push(params.uri));
onNotification(client, 'notifications/resources/list_changed', () => changes.push(true));

// Over HTTP the SDKs reconnect by themselves, and with Last-Event-ID.
const transport = command ? new StdioClientTransport({ command: command[0], args: command.slice(1) }) : new StreamableHTTPClientTransport(new URL(url), {
  requestInit: token ? { headers: { Authorization: `Bearer ${token}` } } : {},
  reconnectionOptions: { initialReconnectionDelay: 100, maxReconnectionDelay: 1000, reconnectionDelayGrowFactor: 1, maxRetries: 5 },
});
if (command) transport.setProtocolVersion = (version) => { transport.protocolVersion = version; }; // as over HTTP
await client.connect(transport);
const call = (name, args = {}, options = undefined) => callTool(client, { name: named(name), arguments: args }, options);
const text = (result) => result.content[0].text;
const logged = (start, from = 0) => logs.take(`log ${start}`, ({ data }) => String(data).startsWith(start), from);

seen.Revision = transport.protocolVersion;

// Roots come first: the server asks for them when the session begins, over the GET stream, so what it then logs tells
// that the stream is open.
await logged('Roots updated: 1 root');
seen.Roots = [text(await call('get-roots-list'))];
roots = [...roots, { uri: 'file:///waybill/two', name: 'two' }];
await client.sendRootsListChanged();
await logged('Roots updated: 2 root');
seen.Roots.push(text(await call('get-roots-list')));

seen.Tools = (await all((params) => client.listTools(params), 'tools')).map(({ name }) => name);
seen.Echo = text(await call('echo', { message: 'grüße <&> 9007199254740993' }));
seen.Structured = (await call('get-structured-content', { location: 'New York' })).structuredContent;
seen.Failing = (await call('get-resource-reference', { resourceType: 'Text', resourceId: -1 })).isError === true;
seen.Unknown = await call('no-such-tool').then(
  (result) => (result.isError === true ? 'isError' : 'result'),
  (error) => `error ${error.code}`,
);

seen.Progress = [];
seen.Operation = text(await call('trigger-long-running-operation', { duration: 0.2, steps: 4 },
  { onprogress: ({ progress, total }) => seen.Progress.push([progress, total]) }));

// What is logged below the level must not come. One that is above it tells that there is nothing more to wait for.
const resources = await all((params) => client.listResources(params), 'resources');
const resource = (name) => resources.find((r) => r.name === name || r.name === named(name));
seen.Resources = resources.map(({ name }) => name);
const document = resource('features.md').uri;
await client.setLoggingLevel('debug');
await call('toggle-simulated-logging');
seen.Logged = await logs.take('a simulated log message', ({ data }) => /^\w+[- ]level[- ]message/i.test(data));
await call('toggle-simulated-logging');
await client.subscribeResource({ uri: document });
await logged('Received Subscribe');
await call('toggle-subscriber-updates');
seen.Updated = (await updates.take('an updated resource', () => true)) === document;
await call('toggle-subscriber-updates');
await client.setLoggingLevel('error');
await client.unsubscribeResource({ uri: document });
await client.setLoggingLevel('info');
const before = logs.entries.length;
await client.subscribeResource({ uri: resource('architecture.md').uri });
await logged('Received Subscribe', before);
seen.Quiet = !logs.entries.some(({ data }) => String(data).startsWith('Received Unsubscribe'));

const abort = new AbortController();
const begun = new Inbox();
const operation = call('trigger-long-running-operation', { duration: 10, steps: 100 },
  { signal: abort.signal, onprogress: ({ progress }) => begun.push(progress) })
  .then(() => false, () => true);
await begun.take('progress of the operation to be cancelled', () => true);
abort.abort('enough');
seen.Cancelled = await operation;
await client.ping();
seen.Pinged = true;

seen.Prompts = (await all((params) => client.listPrompts(params), 'prompts')).map(({ name }) => name);
seen.Prompt = (await client.getPrompt({ name: named('args-prompt'), arguments: { city: 'Zürich', state: 'ZH' } })).messages[0].content.text;
const completable = { type: 'ref/prompt', name: named('completable-prompt') };
seen.Completed = [
  (await client.complete({ ref: completable, argument: { name: 'department', value: 'S' } })).completion.values,
  (await client.complete({ ref: completable, argument: { name: 'name', value: '' }, context: { arguments: { department: 'Sales' } } })).completion.values,
];

const templates = await all((params) => client.listResourceTemplates(params), 'resourceTemplates');
seen.Templates = templates.map(({ name }) => name);
const [read] = (await client.readResource({ uri: document })).contents;
seen.Read = read.text;
seen.ReadURI = read.uri === document;
const template = templates.find(({ name }) => name.endsWith('Dynamic Text Resource')).uriTemplate;
seen.Template = (await client.readResource({ uri: new UriTemplate(template).expand({ resourceId: '7' }) })).contents[0].text;
seen.Completed.push((await client.complete({ ref: { type: 'ref/resource', uri: template }, argument: { name: 'resourceId', value: '7' } })).completion.values);

seen.Sampled = text(await call('trigger-sampling-request', { prompt: 'what is a waybill?' }));
seen.SampledAsked = asked;
seen.Elicited = (await call('trigger-elicitation-request')).content.map((block) => block.text).join('\n');
seen.ElicitedAsked = asked;
elicit = { action: 'decline' };
seen.Declined = text(await call('trigger-elicitation-request'));

const file = `${unique}.gz`;
await call('gzip-file-as-resource', { name: file, data: 'data:text/plain,waybill', outputType: 'resourceLink' });
await changes.take('a changed list of resources', () => true);
const added = (await all((params) => client.listResources(params), 'resources')).find(({ name }) => name.endsWith(file));
seen.Added = (await client.readResource({ uri: added.uri })).contents[0].blob;

// The peer in between cuts this call's stream after the first progress (legacy.go).
seen.Resumed = [];
seen.ResumedOperation = text(await call('trigger-long-running-operation', { duration, steps },
  { onprogress: ({ progress, total }) => seen.Resumed.push([progress, total]), timeout: patience }));

if (!command) await transport.terminateSession();
await client.close();
console.log(JSON.stringify(seen));
process.exit(0);
