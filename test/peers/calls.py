# What the Python SDK's client is answered at several endpoints, as one JSON array: for each, what "Answered" of calls.go
# holds. Argument: a JSON object as for calls.mjs.
import asyncio
import json
import sys

from mcp import Client
from mcp.client.streamable_http import streamable_http_client


async def visit(url, calls, mode):
    async with Client(streamable_http_client(url), mode=mode) as client:
        answered = {"Revision": client.protocol_version, "Texts": [], "Failed": []}
        answered["Tools"] = [tool.name for tool in (await client.list_tools()).tools]
        for call in calls:
            result = await client.call_tool(call["tool"], call["args"])
            answered["Texts"].append("\n".join(block.text for block in result.content))
            answered["Failed"].append(result.is_error)
        return answered


async def main(era, visits):
    mode = "auto" if era == "modern" else "legacy"
    print(json.dumps([await visit(each["url"], each["calls"], mode) for each in visits]))


asyncio.run(main(**json.loads(sys.argv[1])))
