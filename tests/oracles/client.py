"""A client of the KBS protocol made of other people's parts: jwcrypto for keys and JWE, rfc8785 for canonical JSON.

Usage: client.py URL EXPECTED. Attests with `sample` evidence for each kind of TEE key, by cookie and by bearer token, and
compares the resource one/2/trois with EXPECTED. Ends with a line for each that held.
"""

import base64
import hashlib
import json
import sys
import urllib.error
import urllib.request

import rfc8785
from jwcrypto import jwe, jwk, jws

url, expected = sys.argv[1], sys.argv[2].encode()


def call(method, path, body=None, headers=None):
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url + "/kbs/v0" + path, data, headers or {}, method=method)
    if data is not None:
        request.add_header("Content-Type", "application/json")
    with urllib.request.urlopen(request, timeout=60) as answer:
        return answer.headers.get("Set-Cookie", "").split(";")[0], json.load(answer)


def public(key):
    members = json.loads(key.export_public())
    wanted = {"EC": ("kty", "crv", "x", "y"), "RSA": ("kty", "n", "e")}[members["kty"]]
    return {name: members[name] for name in wanted}


def attest(key, algorithm):
    cookie, challenge = call("POST", "/auth", {"version": "0.4.0", "tee": "sample", "extra-params": {}})
    assert len(base64.b64decode(challenge["nonce"], validate=True)) == 32
    tee_key = public(key) | {"alg": algorithm}
    runtime = {"nonce": challenge["nonce"], "tee-pubkey": tee_key}
    digest = hashlib.sha384(rfc8785.dumps(runtime | {"additional-evidence": ""})).digest()
    evidence = {"svn": "1", "report_data": base64.b64encode(digest).decode()}
    body = {
        "init-data": None,
        "runtime-data": runtime,
        "tee-evidence": {"primary_evidence": evidence, "additional_evidence": ""},
    }
    _, answer = call("POST", "/attest", body, {"Cookie": cookie})
    return cookie, answer["token"]


def check_token(token):
    parsed = jws.JWS()
    parsed.deserialize(token)
    header = parsed.jose_header
    assert header["alg"] == "ES256", header
    parsed.verify(jwk.JWK(**header["jwk"]))
    claims = json.loads(parsed.payload)
    assert claims["submods"]["cpu0"]["ear.veraison.annotated-evidence"]["sample"]


def check_sealed(message):
    """Members in the order in which kbs-types writes them anew."""
    header = json.loads(base64.urlsafe_b64decode(message["protected"] + "=="))
    assert list(header) == [m for m in ("alg", "enc", "epk") if m in header], header
    assert list(header.get("epk", {})) == sorted(header.get("epk", {})), header


for kind, algorithm, make in [
    ("P-256", "ECDH-ES+A256KW", {"kty": "EC", "crv": "P-256"}),
    ("P-521", "ECDH-ES+A256KW", {"kty": "EC", "crv": "P-521"}),
    ("RSA", "RSA-OAEP-256", {"kty": "RSA", "size": 2048}),
]:
    key = jwk.JWK.generate(**make)
    cookie, token = attest(key, algorithm)
    check_token(token)
    for by, headers in [("cookie", {"Cookie": cookie}), ("bearer", {"Authorization": "Bearer " + token})]:
        _, message = call("GET", "/resource/one/2/trois", headers=headers)
        check_sealed(message)
        opened = jwe.JWE(algs=[algorithm, "A256GCM"])
        opened.deserialize(json.dumps(message), key)
        assert opened.payload == expected, opened.payload
        print(f"{kind} by {by}: jwcrypto reads the resource")

# Evidence over another key is no evidence.
try:
    key, other = jwk.JWK.generate(kty="EC", crv="P-256"), jwk.JWK.generate(kty="EC", crv="P-256")
    cookie, challenge = call("POST", "/auth", {"version": "0.4.0", "tee": "sample", "extra-params": {}})
    runtime = {"nonce": challenge["nonce"], "tee-pubkey": public(key) | {"alg": "ECDH-ES+A256KW"}}
    digest = hashlib.sha384(rfc8785.dumps(runtime | {"additional-evidence": ""})).digest()
    runtime["tee-pubkey"] = public(other) | {"alg": "ECDH-ES+A256KW"}
    evidence = {"svn": "1", "report_data": base64.b64encode(digest).decode()}
    body = {
        "init-data": None,
        "runtime-data": runtime,
        "tee-evidence": {"primary_evidence": evidence, "additional_evidence": ""},
    }
    call("POST", "/attest", body, {"Cookie": cookie})
    sys.exit("another key was attested")
except urllib.error.HTTPError as error:
    assert error.code == 401, error
    assert json.load(error)["type"].endswith("/AttestationError")
    print("another key: refused")
