"""Creates and cancels subscriptions in a localstripe through Stripe's official SDK.

    localstripe_story.py API HOOK SECRET

Registers HOOK for localstripe's webhooks. Prints the subscriptions as one JSON object.
"""

import json
import sys
import urllib.request

from stripe import StripeClient


def register(api, hook, secret):
    webhook = json.dumps({"url": hook, "secret": secret}).encode()
    request = urllib.request.Request(
        f"{api}/_config/webhooks/litestripe", data=webhook, headers={"Content-Type": "application/json"}
    )
    urllib.request.urlopen(request, timeout=30).close()


def subscribe(stripe):
    product = stripe.v1.products.create({"name": "Team", "type": "service"})
    # localstripe is older than Stripe's prices; Stripe renders a plan as a price with the same id.
    plan = stripe.v1.plans.create({"product": product.id, "currency": "eur", "amount": 1900, "interval": "month"})
    customer = stripe.v1.customers.create({"email": "jo.doe@example.com"})
    card = {"number": "4242424242424242", "exp_month": "12", "exp_year": "2040", "cvc": "123"}
    method = stripe.v1.payment_methods.create({"type": "card", "card": card})
    stripe.v1.payment_methods.attach(method.id, {"customer": customer.id})
    stripe.v1.customers.update(customer.id, {"invoice_settings": {"default_payment_method": method.id}})
    return stripe.v1.subscriptions.create(
        {
            "customer": customer.id,
            "items": [{"plan": plan.id, "quantity": 3}],
            "metadata": {"workspace": "acme"},
        }
    )


def main(api, hook, secret):
    register(api, hook, secret)
    stripe = StripeClient("sk_test_localstripe", base_addresses={"api": api})
    subscription = subscribe(stripe)
    kept = stripe.v1.subscriptions.retrieve(subscribe(stripe).id)
    canceled = stripe.v1.subscriptions.cancel(subscription.id)
    print(json.dumps({"canceled": canceled.to_dict(), "kept": kept.to_dict()}))


main(*sys.argv[1:])
