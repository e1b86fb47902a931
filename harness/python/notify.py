"""Signs thin events with Stripe's official SDK and posts them.

    notify.py HOOK SECRET BODIES_FILE

The file holds a JSON list of bodies, which are sent byte for byte. Prints a JSON line for each: the
answer's status, and the signature.
"""

import json
import sys

from stripe import WebhookSignature

from hook import post


def main(hook, secret, bodies_file):
    with open(bodies_file, encoding="utf-8") as file:
        bodies = json.load(file)
    for body in bodies:
        signature = WebhookSignature.generate_signature_header(body, secret)
        status, _ = post(hook, body.encode(), signature)
        print(json.dumps({"status": status, "signature": signature}))


main(*sys.argv[1:])
