// What the TypeScript SDK's client, which finds out the revision by itself, sees of server-everything through a gateway, as
// one JSON object: "modernSeen" of modern.go, whose comments say what each member is. Argument: a JSON object with
//   url     the endpoint
//   prefix  what stands before the names of tools
//   name    of the client
import { Client, StreamableHTTPClientTransport } from '@modelcontextprotocol/client';

const { url, prefix, name } = JSON.parse(process.argv[2]);
const patience = 20_000;
const seen = { Progress: [], Logged: [], Quiet: true };
const waiting = [];
const settle = (list, entry) => { list.push(entry); waiting.splice(0).forEach((look) => look()); };
async function until(what, done) {
  const deadline = Date.now() + patience;
  while (!done()) {
    const left = deadline - Date.now();
    if (left <= 0) throw new Error(`waited for ${what}`);
    await new Promise((look) => {
      const timer = setTimeout(look, left);
      waiting.push(() => { clearTimeout(timer); look(); });
    });
  }
}

const client = new Client(
  { name, version: '1' },
  { versionNegotiation: { mode: 'auto' }, capabilities: { sampling: {}, elicitation: {}, roots: {} } },
);
let elicit = { action: 'accept', content: { name: 'Ada', check: true } };
client.setRequestHandler('elicitation/create', ({ params }) => { seen.ElicitedAsked = params.message; return elicit; });
client.setRequestHandler('sampling/createMessage', ({ params }) => {
  seen.SampledAsked = params.messages[0].content.text;
  return { model: 'waybill-model', role: 'assistant', content: { type: 'text', text: 'sampled: grüße' } };
});
client.setRequestHandler('roots/list', () => ({ roots: [{ uri: 'file:///waybill/one', name: 'one' }] }));
const logs = [];
const updates = [];
client.setNotificationHandler('notifications/message', ({ params }) => settle(logs, params));
client.setNotificationHandler('notifications/resources/updated', ({ params }) => settle(updates, params.uri));
await client.connect(new StreamableHTTPClientTransport(new URL(url)));
const call = (tool, args = {}, options = undefined, meta = undefined) =>
  client.callTool({ name: prefix + tool, arguments: args, ...(meta && { _meta: meta }) }, options);
const text = (result) => result.content.map((c) => c.text).join('\n');

seen.Revision = client.getNegotiatedProtocolVersion();
seen.Tools = (await client.listTools()).tools.map((tool) => tool.name);
seen.Roots = text(await call('get-roots-list'));
seen.Echo = text(await call('echo', { message: 'grüße <&> 9007199254740993' }));
seen.Structured = (await call('get-structured-content', { location: 'New York' })).structuredContent;
seen.Operation = text(await call('trigger-long-running-operation', { duration: 0.2, steps: 4 },
  { onprogress: ({ progress, total }) => seen.Progress.push([progress, total]) }));
seen.Sampled = text(await call('trigger-sampling-request', { prompt: 'what is a waybill?', maxTokens: 10 }));
seen.Elicited = text(await call('trigger-elicitation-request'));
elicit = { action: 'decline' };
seen.Declined = text(await call('trigger-elicitation-request'));

// The server logs every 5 s, whoever has asked for it.
await call('toggle-simulated-logging');
await call('trigger-long-running-operation', { duration: 5.3, steps: 1 });
seen.Quiet = logs.length === 0;
await call('trigger-long-running-operation', { duration: 5.3, steps: 1 }, undefined, { 'io.modelcontextprotocol/logLevel': 'debug' });
seen.Logged = logs.map(({ level }) => level);
await call('toggle-simulated-logging');

const resources = (await client.listResources()).resources;
const document = resources.find((r) => r.name.endsWith('features.md')).uri;
seen.Read = (await client.readResource({ uri: document })).contents[0].text;
const subscription = await client.listen({ resourceSubscriptions: [document], toolsListChanged: true });
seen.Granted = (subscription.honoredFilter.resourceSubscriptions ?? [])[0] === document && subscription.honoredFilter.toolsListChanged === true;
await call('toggle-subscriber-updates');
await until('an updated resource', () => updates.length > 0);
seen.Updated = updates.every((uri) => uri === document);
await call('toggle-subscriber-updates');
await subscription.close();

const abort = new AbortController();
seen.Cancelled = await call('trigger-long-running-operation', { duration: 20, steps: 100 },
  { onprogress: () => abort.abort(), signal: abort.signal }).then(() => false, () => true);
seen.After = text(await call('echo', { message: 'still here' }));
await client.close();

console.log(JSON.stringify(seen));
