"""Reads stored thin events with Stripe's official SDK, as a receiver of webhooks does.

    parse.py SECRET API_BASE API_KEY MESSAGES_FILE

The file holds a JSON list of objects with `body` and `signature`. Prints a JSON line for each: the SDK's
class, what it reads from the body, and the objects that it fetches from the API at API_BASE for it.
"""

import json
import sys

import stripe


def main(secret, api_base, api_key, messages_file):
    with open(messages_file, encoding="utf-8") as file:
        messages = json.load(file)
    client = stripe.StripeClient(api_key, base_addresses={"api": api_base}, max_network_retries=0)
    for message in messages:
        notification = client.parse_event_notification(
            message["body"].encode(), message["signature"], secret
        )
        related = notification.related_object
        request = notification.reason.request if notification.reason else None
        fetched = notification.fetch_related_object()
        print(
            json.dumps(
                {
                    "class": type(notification).__name__,
                    "id": notification.id,
                    "type": notification.type,
                    "created": notification.created,
                    "livemode": notification.livemode,
                    "context": str(notification.context) if notification.context else None,
                    "request": request.id if request else None,
                    "related": [related.id, related.type, related.url],
                    "fetched": [fetched["id"], fetched["object"]],
                    "snapshot_event": notification.fetch_event().snapshot_event,
                }
            )
        )


main(*sys.argv[1:])
