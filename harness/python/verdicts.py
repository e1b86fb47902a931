"""Generates valid and invalid signature headers and lets Stripe's official SDK judge them.

    verdicts.py SEED COUNT

Prints a JSON line for each: header, body (hexadecimal), secrets, tolerance and time of receipt (both
in seconds, the latter an exact float), and whether the SDK accepts the delivery with any of the
secrets. The headers hold only what HTTP allows: Latin-1 characters, and of the control characters only
the tab.
"""

import hashlib
import hmac
import json
import random
import string
import sys
from types import SimpleNamespace

import stripe
import stripe._webhook

# Characters that HTTP allows and that a header parser may handle wrongly.
ODD = "=,;+-_ \t.0123456789abcdefABCDEFtv10xe" + "\x85\xa0\xb2\xbd\xe9\xff"
BLANKS = [" ", "  ", "\t", "\xa0", "\x85"]
DIGITS = "0123456789"
HEX = "0123456789abcdef"


def clock(now):
    """Makes the SDK's `time.time()` return a fixed time, which the output contains."""
    stripe._webhook.time = SimpleNamespace(time=lambda: now)


def accepts(header, body, secret, tolerance):
    try:
        stripe.WebhookSignature.verify_header(body, header, secret, tolerance)
        accepted = True
    except Exception:  # a webhook's handler answers 400 to any of them
        accepted = False
    if is_event(body):
        try:
            stripe.Webhook.construct_event(body, header, secret, tolerance)
            constructed = True
        except Exception:
            constructed = False
        assert constructed == accepted, (header, body)
    return accepted


def is_event(body):
    try:
        return json.loads(body)["object"] == "event"
    except Exception:
        return False


def signature(secret, timestamp, body):
    """Signs like the SDK, which signs the number that `int()` reads from the timestamp's text."""
    return hmac.new(secret.encode(), b"%d." % timestamp + body, hashlib.sha256).hexdigest()


class Maker:
    def __init__(self, seed):
        self.random = random.Random(seed)

    def case(self):
        choose = self.random.choice
        now = 1_795_430_000 + self.random.randrange(0, 8) / 8
        tolerance = choose([300] * 6 + [0, 1, 10, 2**32 - 1])
        secrets = [self.secret() for _ in range(choose([1, 1, 1, 2, 3]))]
        body = self.body()
        text = self.timestamp(int(now), tolerance)
        signer = choose(secrets * 15 + [self.secret()])
        header = self.header(text, signer, body)
        if self.random.random() < 0.2:
            header = self.mutated(header)
        return {"header": header, "body": body, "secrets": secrets, "tolerance": tolerance, "now": now}

    def secret(self):
        length = self.random.choice([1, 8, 32, 64, 65, 100])
        return "whsec_" + "".join(self.random.choices(string.ascii_letters + DIGITS + "+/=_-", k=length))

    def body(self):
        choose = self.random.choice
        event = {"id": f"evt_{self.random.randrange(10**9)}", "object": "event", "type": "customer.updated"}
        event["data"] = {"object": {"id": "cus_1", "object": "customer", "name": choose(["Jo", "Zoë ✓", "🦀", ""])}}
        return choose(
            [json.dumps(event, indent=2, ensure_ascii=choose([True, False])).encode()] * 30
            + [json.dumps(event).encode(), b"", b"no JSON", b"\xff\xfe", b"{\"a\":\"\xed\xa0\x80\"}", b"\xef\xbb\xbf{}"]
            + [b"a\r\nb\n", b" ", b"\0", b"." * 70_000]
        )

    def timestamp(self, now, tolerance):
        choose = self.random.choice
        edge = now - min(tolerance, now)
        at = choose(
            [now] * 20
            + [edge, edge - 1, edge + 1, now + 1, now + 300, now + 10**9]
            + [self.random.randrange(edge - 5, now + 5), 0, 1, -1, -now, 2**31, 2**63 - 1, 2**63, 2**64, -(2**63) - 1, 10**400]
        )
        plain = str(at)
        if self.random.random() < 0.7:
            return plain
        digits = plain.lstrip("-")
        return choose(
            [
                "+" + plain,
                "-" + plain,
                "0" + plain,
                "000" + digits,
                choose(BLANKS) + plain,
                plain + choose(BLANKS),
                choose(BLANKS) + "+" + plain + choose(BLANKS),
                "+ " + plain,
                digits[:1] + "_" + digits[1:],
                "_".join(digits),
                digits + "_",
                "_" + digits,
                digits[:1] + "__" + digits[1:],
                plain + ".0",
                plain + "e0",
                hex(abs(at)),
                "0b1",
                "1" * 4299,
                "1" * 4300,
                "1" * 4301,
                "0" * 4301,
                "1_" * 4299 + "1",
                "\xb2",
                "½",
                "",
                "now",
                "None",
                "nan",
                "inf",
                "-0",
                "+0",
                "--1",
                "+-1",
            ]
        )

    def header(self, text, secret, body):
        choose = self.random.choice
        try:
            timestamp = int(text)
        except ValueError:
            timestamp = choose([0, 1_795_430_000])
        right = signature(secret, timestamp, body)
        wrong = self.wrong(right)
        t, v1 = f"t={text}", f"v1={right}"
        if self.random.random() < 0.3:
            return f"{t},{v1}"
        items = choose(
            [
                [t, v1],
                [v1, t],
                [t, f"v1={wrong}"],
                [t, f"v1={wrong}", v1],
                [t, v1, f"v1={wrong}"],
                [f"v1={wrong}", f"v1={self.wrong(right)}", t, v1],
                [t, v1, v1],
                [t, f"v0={right}"],
                [t, f"v0={wrong}", v1],
                [t, v1, f"v2={wrong}", "scheme=x", "x"],
                [t],
                [v1],
                [t, "v1"],
                [t, v1, "v1"],
                ["v1", t, v1],
                ["t", t, v1],
                [t, "t", v1],
                [t, "t=1", v1],
                ["t=1", t, v1],
                [t, "t=", v1],
                ["t=", t, v1],
                [t + "=2", v1],
                [t, v1 + "=2"],
                [t, v1 + "="],
                [t, "v1==" + right],
                ["", t, v1],
                [t, "", v1],
                [t, v1, ""],
                [" " + t, v1],
                [t, " " + v1],
                ["t =" + text, v1],
                [t, "v1 =" + right],
                ["T=" + text, v1],
                [t, "V1=" + right],
                [t, "v1=" + right.upper()],
                [t, "v1=" + right + choose(BLANKS)],
                [t, "v1=" + choose(BLANKS) + right],
                [t, "v1=" + right[:-1]],
                [t, "v1=" + right + "0"],
                [t, "v1=é" + right],
                [t, "v1=é", v1],
                [t, v1, "v1=é"],
                [t, f"v1={wrong}", "v1=ÿ", v1],
                [t, "v1="],
                [t, "v1=", v1],
                [t, "v1='" + right + "'"],
                [f'"{t}"', v1],
            ]
        )
        return choose([",", ",", ",", ",", ",", ",", ", ", ";", " ", ",,", "&"]).join(items)

    def wrong(self, right):
        place = self.random.randrange(len(right))
        other = self.random.choice([digit for digit in HEX if digit != right[place]])
        return right[:place] + other + right[place + 1 :]

    def mutated(self, header):
        letters = list(header)
        for _ in range(self.random.choice([1, 1, 2, 5])):
            place = self.random.randrange(len(letters) + 1)
            how = self.random.randrange(5)
            if how == 0:
                letters.insert(place, self.random.choice(ODD))
            elif how == 1 and place < len(letters):
                del letters[place]
            elif how == 2 and place < len(letters):
                letters[place] = self.random.choice(ODD)
            elif how == 3:
                letters = letters[:place]
            elif how == 4:
                other = self.random.randrange(len(letters) + 1)
                first, last = min(place, other), max(place, other)
                letters[last:last] = letters[first:last]
        return "".join(letters)


def main(seed, count):
    maker = Maker(seed)
    for number in range(count):
        case = maker.case()
        if number == 0:
            case["header"] = ""
        header, body = case["header"], case["body"]
        assert all(letter == "\t" or 32 <= ord(letter) <= 255 and ord(letter) != 127 for letter in header), header
        clock(case["now"])
        accepted = any(accepts(header, body, secret, case["tolerance"]) for secret in case["secrets"])
        print(json.dumps({**case, "body": body.hex(), "accepted": accepted}))


main(int(sys.argv[1]), int(sys.argv[2]))
