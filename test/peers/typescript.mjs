// What the TypeScript SDK's client sees at an MCP endpoint, as one JSON object: "seen" of clients.go.
// Arguments: the endpoint's URL; "tools" of clients.go, as JSON; the command line of a server to be started instead, if any.
import { Client, StreamableHTTPClientTransport } from '@modelcontextprotocol/client';
import { StdioClientTransport } from '@modelcontextprotocol/client/stdio';

const url = new URL(process.argv[2]);
const tools = JSON.parse(process.argv[3]);
const [command, ...args] = process.argv.slice(4);
const seen = { Progress: [] };

const client = new Client(
  { name: 'waybill-test-typescript', version: '1' },
  { versionNegotiation: { mode: 'auto' }, capabilities: { elicitation: {} } },
);
client.setRequestHandler('elicitation/create', () => ({ action: 'accept', content: { name: 'Ada' } }));
await client.connect(command ? new StdioClientTransport({ command, args }) : new StreamableHTTPClientTransport(url));
const call = (name, options) => client.callTool({ name }, options);

seen.Revision = client.getNegotiatedProtocolVersion();
seen.Listed = (await client.listTools()).tools.map((tool) => tool.name);
seen.Simple = (await call(tools.Simple)).content[0].text;
seen.Failing = (await call(tools.Failing)).isError === true;
await call(tools.Progress, { onprogress: ({ progress }) => seen.Progress.push(progress) });
seen.Asking = (await call(tools.Asking)).content[0].text;
seen.Unknown = await call(tools.Unknown).then(() => 0, (error) => error.code);
await client.close();

console.log(JSON.stringify(seen));
