"""Posts deliveries that ingress must refuse, signed by Stripe's official SDK, and one that it accepts.

    refused.py HOOK SECRET EVENT_FILE

Prints a JSON line for each: its name, the answer's status and body, and whether the SDK itself accepts
the webhook.
"""

import json
import sys
import time
import uuid

import stripe
from stripe import WebhookSignature

from hook import post


def sign(body, secret, timestamp=None):
    return WebhookSignature.generate_signature_header(body, secret, timestamp)


def main(hook, secret, event_file):
    with open(event_file, encoding="utf-8") as file:
        body = file.read()
    event = json.loads(body)
    now = int(time.time())
    elsewhere = hook.rstrip("/").rsplit("/", 1)[0] + f"/{uuid.uuid4()}/"
    over_the_limit = body + " " * (1024 * 1024 + 1 - len(body.encode()))

    def without(field):
        return json.dumps({key: value for key, value in event.items() if key != field})

    cases = [
        ("tampered body", hook, body.replace("active", "trialing"), sign(body, secret)),
        ("old timestamp", hook, body, sign(body, secret, now - 330)),
        ("wrong secret", hook, body, sign(body, "whsec_another")),
        ("missing header", hook, body, None),
        ("empty header", hook, body, ""),
        ("another scheme", hook, body, sign(body, secret).replace("v1=", "v0=")),
        ("unknown UUID", elsewhere, body, sign(body, secret)),
        ("body over the limit", hook, over_the_limit, sign(over_the_limit, secret)),
        ("no JSON", hook, "no JSON", sign("no JSON", secret)),
        ("JSON that is no object", hook, "[]", sign("[]", secret)),
        ("no id", hook, without("id"), sign(without("id"), secret)),
        ("no type", hook, without("type"), sign(without("type"), secret)),
        ("accepted", hook, body, sign(body, secret)),
    ]
    for name, url, body, signature in cases:
        status, answer = post(url, body.encode(), signature)
        try:
            stripe.Webhook.construct_event(body, signature, secret)
            is_webhook = True
        except (ValueError, AttributeError, stripe.SignatureVerificationError):
            is_webhook = False
        print(json.dumps({"name": name, "status": status, "answer": answer, "sdk": is_webhook}))


main(*sys.argv[1:])
