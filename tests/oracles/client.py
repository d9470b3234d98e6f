"""A client of the KBS protocol made of other people's parts: joserfc (keys, JWE, JWS) and Node.js (RFC 8785, JWE).

Usage: client.py URL EXPECTED KBS. Compares canonical JSON of the program KBS with Node.js's; then attests to URL with
`sample` evidence for each kind of TEE key and compares the resource one/2/trois, fetched by cookie and by bearer token,
with EXPECTED. Ends with a line for each that held.
"""

import base64
import json
import pathlib
import random
import subprocess
import sys
import urllib.error
import urllib.request

from joserfc import jwe, jws, jwt
from joserfc.errors import BadSignatureError, JoseError
from joserfc.jwk import ECKey, RSAKey

url, expected, kbs = sys.argv[1], sys.argv[2].encode(), sys.argv[3]
KINDS = {
    "P-256": ("ECDH-ES+A256KW", lambda: ECKey.generate_key("P-256")),
    "P-521": ("ECDH-ES+A256KW", lambda: ECKey.generate_key("P-521")),
    "RSA": ("RSA-OAEP-256", lambda: RSAKey.generate_key(2048)),
}
# Keys whose order differs by code points and by UTF-16 units, and strings with every kind of escape.
AWKWARD = {
    "\ufb33": "after the emoji's first half",
    "\U0001f600": "before it",
    "\u20ac": "\u20ac$\u000f\nA'B\"\\\\\"/",
    "\r": "\u007f\u0080\u2028\u2029\ufeff",
    "1": ["\b\t\n\f\r\u0000\u001f", {}, [], ""],
    "10": None,
    "9": True,
    "\u00f6": "o\u0308",
    "": {"b": 1, "a": {"\U0010ffff": 0, "\uffff": 0}},
}
# ECMAScript's boundaries between plain and scientific notation, shortest forms, halves, and the ends of the range.
NUMBERS = """0 -0 -0.0 1 -1 4.50 2e-3 1E30 0.000000000000000000000000001 333333333.33333329 1e20 1e21 999999999999999999999
123456789012345680000 1e-6 1e-7 0.1 0.30000000000000004 5e-324 -5e-324 2.2250738585072014e-308 1.7976931348623157e308
9007199254740991 -9007199254740991 9007199254740992 295147905179352830000 9.999999999999997e22 1e23 1424953923781206.2
100 1e2 1.0 0.5 1.5e300 -1.5e-300""".split()

node = subprocess.Popen(
    ["node", pathlib.Path(__file__).with_name("jose.js")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, encoding="utf-8"
)


def ask(**question):
    node.stdin.write(json.dumps(question) + "\n")
    node.stdin.flush()
    return json.loads(node.stdout.readline())


def canonical(text):
    return ask(do="canonical", text=text)["text"]


def report_data(value):
    return ask(do="sha384", text=canonical(json.dumps(value)))["base64"]


def documents(count):
    """JSON texts: the awkward ones, and random ones with a printed seed."""
    seed = random.randrange(2**32)
    print(f"canonical JSON: seed {seed}")
    dice = random.Random(seed)
    ranges = [(0, 0x100), (0, 0xD800), (0xE000, 0x110000)]
    letters = [chr(dice.randrange(*dice.choice(ranges))) for _ in range(400)]

    def word():
        return "".join(dice.choices(letters, k=dice.randrange(6)))

    def value(depth):
        kind = dice.randrange(7 if depth else 4)
        if kind == 0:
            return word()
        if kind == 1:
            return dice.choice([None, True, False])
        if kind == 2:
            return dice.randrange(-(2**53), 2**53)
        if kind == 3:
            return dice.uniform(-10, 10) * 10.0 ** dice.randrange(-30, 30)
        if kind == 4:
            return [value(depth - 1) for _ in range(dice.randrange(4))]
        return {word(): value(depth - 1) for _ in range(dice.randrange(6))}

    yield json.dumps(AWKWARD)
    yield json.dumps(AWKWARD, ensure_ascii=False)
    yield '{"b":2,"numbers":[' + ",".join(NUMBERS) + '],"a":1}'
    for number in range(count):
        yield json.dumps(value(5), ensure_ascii=number % 2 == 0)


def check_canonical():
    texts = list(documents(500))
    lines = ("\n".join(texts) + "\n").encode()
    answer = subprocess.run([kbs, "--canonical"], input=lines, stdout=subprocess.PIPE, check=True).stdout
    ours = answer.decode().removesuffix("\n").split("\n")  # not splitlines(): U+2028 stays as it is
    assert len(ours) == len(texts), (len(ours), len(texts))
    for text, mine in zip(texts, ours):
        assert mine == canonical(text), f"{text}\nours:    {mine}\nNode.js: {canonical(text)}"
    print(f"canonical JSON: {len(texts)} documents as Node.js writes them")


def call(method, path, body=None, headers=None):
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url + "/kbs/v0" + path, data, headers or {}, method=method)
    if data is not None:
        request.add_header("Content-Type", "application/json")
    with urllib.request.urlopen(request, timeout=60) as answer:
        return answer.headers.get("Set-Cookie", "").split(";")[0], json.load(answer)


def refused(variant, *arguments, **more):
    try:
        call(*arguments, **more)
    except urllib.error.HTTPError as error:
        assert error.code == 401, error
        problem = json.load(error)
        assert problem["type"].endswith("/" + variant), problem
        return
    sys.exit(f"not refused as {variant}: {arguments}")


def public(key, algorithm):
    members = key.as_dict(private=False)
    wanted = {"EC": ("y", "x", "kty", "crv"), "RSA": ("n", "e", "kty")}[members["kty"]]
    return {name: members[name] for name in wanted} | {"alg": algorithm}


def challenge():
    cookie, answer = call("POST", "/auth", {"version": "0.4.0", "tee": "sample", "extra-params": {}})
    assert len(base64.b64decode(answer["nonce"], validate=True)) == 32
    return cookie, answer["nonce"]


def attestation(runtime, measured, additional=""):
    """What is posted, with evidence over `measured`; members stand in no order that a canonical form would have."""
    evidence = {"svn": "1", "report_data": report_data(measured | {"additional-evidence": additional})}
    return {
        "tee-evidence": {"primary_evidence": evidence, "additional_evidence": additional},
        "runtime-data": {name: runtime[name] for name in ("tee-pubkey", "nonce")},
        "init-data": None,
    }


def device(runtime):
    """Evidence of a device as text: the text itself is measured, so it is an awkward one."""
    evidence = AWKWARD | {"svn": "2", "report_data": report_data(runtime)}
    return json.dumps({"sampledevice": evidence}, ensure_ascii=False, indent="\t")


def attest(key, algorithm, devices):
    cookie, nonce = challenge()
    runtime = {"nonce": nonce, "tee-pubkey": public(key, algorithm)}
    additional = device(runtime) if devices else ""
    _, answer = call("POST", "/attest", attestation(runtime, runtime, additional), {"Cookie": cookie})
    return cookie, answer["token"], runtime


def check_token(token, runtime):
    """A JWT by its own header's key, which says what was attested; and one that the KBS has not signed is worth nothing."""
    header = jws.extract_compact(token.encode()).headers()
    assert (header["alg"], header["typ"]) == ("ES256", "JWT"), header
    claims = jwt.decode(token, ECKey.import_key(header["jwk"]), algorithms=["ES256"]).claims
    jwt.JWTClaimsRegistry(exp={"essential": True}, nbf={"essential": True}, iat={"essential": True}).validate(claims)
    assert claims["exp"] - claims["iat"] == 300, claims
    evidence = claims["submods"]["cpu0"]["ear.veraison.annotated-evidence"]
    assert evidence["sample"] and evidence["runtime_data_claims"] == runtime, evidence
    stranger = ECKey.generate_key("P-256")
    try:
        jwt.decode(token, stranger, algorithms=["ES256"])
        sys.exit("the token verifies by any key")
    except BadSignatureError:
        pass
    forged = jwt.encode({"alg": "ES256", "typ": "JWT", "jwk": stranger.as_dict(private=False)}, claims, stranger)
    refused("TokenVerifierError", "GET", "/resource/one/2/trois", headers={"Authorization": "Bearer " + forged})


def check_sealed(message):
    """Parts and members in the order in which kbs-types writes them anew."""
    assert sorted(message) == ["ciphertext", "encrypted_key", "iv", "protected", "tag"], message
    header = json.loads(base64.urlsafe_b64decode(message["protected"] + "=="))
    assert list(header) == [m for m in ("alg", "enc", "epk") if m in header], header
    assert list(header.get("epk", {})) == sorted(header.get("epk", {})), header


def open_by_joserfc(message, key, algorithm):
    return jwe.decrypt_json(message, key, algorithms=[algorithm, "A256GCM"]).plaintext


def open_by_node(message, key):
    answer = ask(do="open", message=message, key=key.as_dict(private=True))
    return base64.b64decode(answer["base64"]) if "base64" in answer else None


def check_resource(kind, algorithm, key, other, headers):
    _, message = call("GET", "/resource/one/2/trois", headers=headers)
    check_sealed(message)
    assert open_by_joserfc(message, key, algorithm) == expected
    assert open_by_node(message, key) == expected
    try:
        open_by_joserfc(message, other, algorithm)
        sys.exit(f"{kind}: joserfc opens it by another key")
    except (JoseError, ValueError):
        pass
    assert open_by_node(message, other) is None, f"{kind}: Node.js opens it by another key"
    changed = message | {"ciphertext": ("B" if message["ciphertext"][0] == "A" else "A") + message["ciphertext"][1:]}
    assert open_by_node(changed, key) is None


check_canonical()
for kind, (algorithm, make) in KINDS.items():
    key, other = make(), make()
    for devices in (False, True):
        cookie, token, runtime = attest(key, algorithm, devices)
        check_token(token, runtime)
        for by, headers in [("cookie", {"Cookie": cookie}), ("bearer", {"Authorization": "Bearer " + token})]:
            check_resource(kind, algorithm, key, other, headers)
            with_device = ", with a device" if devices else ""
            print(f"{kind} by {by}{with_device}: joserfc and Node.js read the resource, and by no other key")

# Evidence over another key, over another nonce, and over other words of a device is no evidence.
key, other = ECKey.generate_key("P-256"), ECKey.generate_key("P-256")
for what in ("key", "nonce", "device"):
    cookie, nonce = challenge()
    runtime = {"nonce": nonce, "tee-pubkey": public(key, "ECDH-ES+A256KW")}
    measured = dict(runtime)
    if what == "key":
        measured["tee-pubkey"] = public(other, "ECDH-ES+A256KW")
    if what == "nonce":
        measured["nonce"] = challenge()[1]
    body = attestation(runtime, measured, device(runtime) if what == "device" else "")
    if what == "device":
        body["tee-evidence"]["additional_evidence"] += " "
    refused("AttestationError", "POST", "/attest", body, {"Cookie": cookie})
    refused("TokenNotFound", "GET", "/resource/one/2/trois", headers={"Cookie": cookie})
    print(f"another {what}: refused")
