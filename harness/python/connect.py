"""Connects with nats-py to these servers, as they stand in NATS_URL, and prints the server's port.

Arguments: NATS_URL.
"""

import asyncio
import json
import sys

import nats


async def main(servers):
    client = await nats.connect(servers.split(","))
    print(json.dumps(client.connected_url.port))
    await client.close()


asyncio.run(main(sys.argv[1]))
