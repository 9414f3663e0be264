# What the Python SDK's client sees of an MCP server that it starts, as one JSON object: "seen" of clients.go.
# Arguments: "tools" of clients.go, as JSON; the server's command line.
import asyncio
import json
import sys

from mcp import Client, StdioServerParameters
from mcp.shared.exceptions import MCPError
from mcp_types import ElicitResult


async def main(tools, command, *args):
    progress = []

    async def elicit(context, params):
        return ElicitResult(action="accept", content={"name": "Ada"})

    async def report(done, total, message):
        progress.append(done)

    async with Client(StdioServerParameters(command=command, args=args), elicitation_callback=elicit) as client:
        seen = {"Revision": client.protocol_version, "Unknown": 0}
        seen["Listed"] = [tool.name for tool in (await client.list_tools()).tools]
        seen["Simple"] = (await client.call_tool(tools["Simple"])).content[0].text
        seen["Failing"] = (await client.call_tool(tools["Failing"])).is_error
        await client.call_tool(tools["Progress"], progress_callback=report)
        async with asyncio.timeout(20):
            while len(progress) < 3:  # the last may be on its way through the SDK
                await asyncio.sleep(0.01)
        seen["Progress"] = progress
        seen["Asking"] = (await client.call_tool(tools["Asking"])).content[0].text
        try:
            await client.call_tool(tools["Unknown"])
        except MCPError as error:
            seen["Unknown"] = error.code
    print(json.dumps(seen))


asyncio.run(main(json.loads(sys.argv[1]), *sys.argv[2:]))
