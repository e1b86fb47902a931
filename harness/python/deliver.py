"""Signs an event with Stripe's official SDK, posts it, and receives the resulting signal with nats-py.

    deliver.py HOOK NATS_URL SECRET EVENT_FILE

Prints the HTTP answer and the signal as one JSON object.
"""

import asyncio
import json
import sys

import nats
from stripe import WebhookSignature

from hook import post


async def main(hook, nats_url, secret, event_file):
    with open(event_file, encoding="utf-8") as file:
        body = file.read()
    client = await nats.connect(nats_url)
    signals = await client.jetstream().subscribe(
        "subscription.changed", stream="LITESTRIPE_SIGNALS", ordered_consumer=True
    )
    signature = WebhookSignature.generate_signature_header(body, secret)
    answer = await asyncio.to_thread(post, hook, body.encode(), signature)
    signal = await signals.next_msg(timeout=30)
    print(
        json.dumps(
            {
                "status": answer[0],
                "answer": json.loads(answer[1]),
                "subject": signal.subject,
                "headers": dict(signal.headers),
                "body": json.loads(signal.data),
            }
        )
    )
    await client.close()


asyncio.run(main(*sys.argv[1:]))
