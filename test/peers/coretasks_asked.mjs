// What a TypeScript SDK v1 client sees of server-everything when it answers what the server asks with tasks of its own (revision
// 2025-11-25), which the server then asks after. Arguments: a JSON object with
//   url     the endpoint
//   token   bearer token, or ""
//   prefix  of the names of the tools
import { Client } from '@modelcontextprotocol/sdk/client/index.js';
import { StreamableHTTPClientTransport } from '@modelcontextprotocol/sdk/client/streamableHttp.js';
import { InMemoryTaskStore } from '@modelcontextprotocol/sdk/experimental/tasks/stores/in-memory.js';
import { CreateMessageRequestSchema, ElicitRequestSchema } from '@modelcontextprotocol/sdk/types.js';

const { url, token, prefix } = JSON.parse(process.argv[2]);
const taskStore = new InMemoryTaskStore();
const client = new Client({ name: 'asked', version: '1' }, {
  capabilities: { sampling: {}, elicitation: {}, tasks: { list: {}, cancel: {}, requests: { sampling: { createMessage: {} }, elicitation: { create: {} } } } },
  taskStore,
});
const made = [];
const ids = [];
const later = (result) => async (request, { taskStore: tasks }) => {
  const task = await tasks.createTask({ ttl: request.params.task.ttl, pollInterval: 100 });
  made.push(request.method);
  ids.push(task.taskId);
  setTimeout(() => tasks.storeTaskResult(task.taskId, 'completed', result(request)), 100); // before the server asks, which it does after a second
  return { task };
};
client.setRequestHandler(CreateMessageRequestSchema, later((request) => ({
  model: 'm', role: 'assistant', content: { type: 'text', text: 'said to ' + request.params.messages[0].content.text },
})));
client.setRequestHandler(ElicitRequestSchema, later((request) => ({
  action: 'accept', content: Object.fromEntries(Object.entries(request.params.requestedSchema.properties).map(([name, of]) => [name, of.enum?.[0] ?? of.default ?? (of.type === 'string' ? 'it' : 1)])),
})));
const transport = new StreamableHTTPClientTransport(new URL(url), { requestInit: token ? { headers: { Authorization: 'Bearer ' + token } } : {} });
await client.connect(transport);
const text = async (name, args) => {
  const result = await client.callTool({ name: prefix + name, arguments: args });
  return ids.reduce((text, id) => text.replaceAll(id, 'the task'), result.content[0].text);
};
const out = {
  sampling: await text('trigger-sampling-request-async', { prompt: 'hello', maxTokens: 10 }),
  elicitation: await text('trigger-elicitation-request-async', {}),
  made,
};
console.log(JSON.stringify(out));
await client.close();
taskStore.cleanup();
