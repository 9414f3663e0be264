# What the Python SDK's client, which finds out the revision by itself, sees of server-everything through a gateway, as one
# JSON object: "modernSeen" of modern.go, whose comments say what each member is. Argument: a JSON object as for modern.mjs.
import asyncio
import json
import sys
import warnings

from mcp import Client
from mcp.client.streamable_http import streamable_http_client
from mcp_types import (
    CreateMessageResult,
    ElicitResult,
    Implementation,
    ListRootsResult,
    LoggingMessageNotification,
    Root,
    TextContent,
)

warnings.simplefilter("ignore")  # that roots, sampling and logging are deprecated is known
PATIENCE = 20


async def main(url, prefix, name):
    seen, logs = {}, []
    user = {"asked": None, "answer": ElicitResult(action="accept", content={"name": "Ada", "check": True})}

    async def sample(context, params):
        user["asked"] = params.messages[0].content.text
        return CreateMessageResult(
            role="assistant", model="waybill-model", content=TextContent(type="text", text="sampled: grüße")
        )

    async def elicit(context, params):
        user["asked"] = params.message
        return user["answer"]

    async def list_roots(context):
        return ListRootsResult(roots=[Root(uri="file:///waybill/one", name="one")])

    async def told(message):
        if isinstance(message, LoggingMessageNotification):
            logs.append(message.params.level)

    async with Client(
        streamable_http_client(url),
        client_info=Implementation(name=name, version="1"),
        sampling_callback=sample,
        elicitation_callback=elicit,
        list_roots_callback=list_roots,
        message_handler=told,
    ) as client:

        async def call(tool, arguments=None, **options):
            return await client.call_tool(prefix + tool, arguments or {}, **options)

        async def text(tool, arguments=None, **options):
            return "\n".join(block.text for block in (await call(tool, arguments, **options)).content)

        seen["Revision"] = client.protocol_version
        seen["Tools"] = [tool.name for tool in (await client.list_tools()).tools]
        seen["Roots"] = await text("get-roots-list")
        seen["Echo"] = await text("echo", {"message": "grüße <&> 9007199254740993"})
        seen["Structured"] = (await call("get-structured-content", {"location": "New York"})).structured_content

        seen["Progress"], last = [], asyncio.Event()

        async def report(done, total, message):
            seen["Progress"].append([done, total])
            if done == total:
                last.set()

        seen["Operation"] = await text(
            "trigger-long-running-operation", {"duration": 0.2, "steps": 4}, progress_callback=report
        )
        async with asyncio.timeout(PATIENCE):
            await last.wait()  # it may be on its way through the SDK

        seen["Sampled"] = await text("trigger-sampling-request", {"prompt": "what is a waybill?", "maxTokens": 10})
        seen["SampledAsked"] = user["asked"]
        seen["Elicited"] = await text("trigger-elicitation-request")
        seen["ElicitedAsked"] = user["asked"]
        user["answer"] = ElicitResult(action="decline")
        seen["Declined"] = await text("trigger-elicitation-request")

        # The server logs every 5 s, whoever has asked for it.
        long = {"duration": 5.3, "steps": 1}
        await call("toggle-simulated-logging")
        await call("trigger-long-running-operation", long)
        seen["Quiet"] = not logs
        await call("trigger-long-running-operation", long, meta={"io.modelcontextprotocol/logLevel": "debug"})
        seen["Logged"] = list(logs)
        await call("toggle-simulated-logging")

        resources = (await client.list_resources()).resources
        document = next(str(r.uri) for r in resources if r.name.endswith("features.md"))
        seen["Read"] = (await client.read_resource(document)).contents[0].text
        async with client.listen(resource_subscriptions=[document], tools_list_changed=True) as subscription:
            honored = subscription.honored
            seen["Granted"] = honored.resource_subscriptions == [document] and honored.tools_list_changed is True
            await call("toggle-subscriber-updates")
            async with asyncio.timeout(PATIENCE):
                seen["Updated"] = str(getattr(await anext(subscription), "uri", "")) == document
            await call("toggle-subscriber-updates")

        begun = asyncio.Event()

        async def begin(done, total, message):
            begun.set()

        task = asyncio.create_task(
            call("trigger-long-running-operation", {"duration": 20, "steps": 100}, progress_callback=begin)
        )
        async with asyncio.timeout(PATIENCE):
            await begun.wait()
        task.cancel("enough")
        await asyncio.wait([task])
        seen["Cancelled"] = task.cancelled() or task.exception() is not None
        seen["After"] = await text("echo", {"message": "still here"})
    print(json.dumps(seen))


asyncio.run(main(**json.loads(sys.argv[1])))
