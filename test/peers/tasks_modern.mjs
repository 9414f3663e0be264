// What the client of @modelcontextprotocol/ext-tasks, over the TypeScript SDK's client 2.4.0, sees of a server with tasks, as
// one JSON object: for each call how it ended, in how many statuses, and what was asked. Arguments: a JSON object with
//   url    the endpoint
//   calls  a list of {tool, args, cancel}: what is called, and whether it is cancelled as soon as it is a task
// The SDK does not take task results yet, so the package wants its requests sent by its host: here by fetch.
import { Client, StreamableHTTPClientTransport } from '@modelcontextprotocol/client';
import { createTaskSessionFromClient } from '@modelcontextprotocol/ext-tasks/client';

const { url, calls } = JSON.parse(process.argv[2]);
const clientInfo = { name: 'tasks', version: '1' };
const clientCapabilities = { elicitation: { form: {} } };
const client = new Client(clientInfo, { capabilities: clientCapabilities, versionNegotiation: { mode: 'auto' } });
await client.connect(new StreamableHTTPClientTransport(new URL(url)));

let ids = 1000;
const rawDispatch = async (request, options = {}) => {
  const name = request.method === 'tools/call' ? request.params.name : request.params.taskId;
  const response = await fetch(url, {
    method: 'POST', signal: options.signal,
    headers: {
      'Content-Type': 'application/json', Accept: 'application/json, text/event-stream', 'MCP-Protocol-Version': '2026-07-28',
      'Mcp-Method': request.method, 'Mcp-Name': name, ...options.context?.headers,
    },
    body: JSON.stringify({ jsonrpc: '2.0', id: ids++, ...request }),
  });
  let text = await response.text();
  if (response.headers.get('content-type').startsWith('text/event-stream')) {
    text = text.split('\n').filter((line) => line.startsWith('data: {')).at(-1).slice('data: '.length);
  }
  const m = JSON.parse(text);
  return m.error ? { kind: 'error', error: m.error } : { kind: 'result', result: m.result };
};

const out = { era: client.getProtocolEra(), calls: [] };
const session = createTaskSessionFromClient(client, {
  endpointId: 'test', rawDispatch, v2RequestFraming: { protocolVersion: '2026-07-28', clientInfo, clientCapabilities },
  onInputRequest: async (request) => {
    out.calls.at(-1).asked.push(request.params.message);
    return { action: 'accept', content: { name: 'n' + out.calls.at(-1).asked.length } };
  },
});
for (const { tool, args, cancel } of calls) {
  const call = { tool, asked: [] };
  out.calls.push(call);
  try {
    const execution = await session.callTool(tool, args);
    call.kind = execution.kind;
    if (cancel) await execution.cancel();
    const settled = await execution.settle();
    call.outcome = settled.outcome;
  } catch (e) {
    call.error = String(e);
  }
}
await session.close();
await client.close();
console.log(JSON.stringify(out));
