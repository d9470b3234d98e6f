"""A KBS of other people's parts: joserfc encrypts, Python's own HTTP server carries. For our client, by `attestation/examples/fetch.rs`.

Usage: server.py FETCH. Serves one resource in many forms to FETCH, a program that is started as `FETCH URL kbs:///… KIND` and writes what
it got to standard output; ends with a line for each kind of key that held.
"""

import base64
import http.server
import json
import subprocess
import sys
import threading

from joserfc import jwe
from joserfc.jwk import ECKey, RSAKey, import_key

program = sys.argv[1]
SECRET = "only for who attests, ü".encode() + bytes(range(256))
KINDS = {
    "ECDH-ES+A256KW-P256": ("ECDH-ES+A256KW", lambda: ECKey.generate_key("P-256")),
    "ECDH-ES+A256KW-P521": ("ECDH-ES+A256KW", lambda: ECKey.generate_key("P-521")),
    "RSA-OAEP-256": ("RSA-OAEP-256", lambda: RSAKey.generate_key(2048)),
}


def part(value):
    return base64.urlsafe_b64encode(json.dumps(value).encode()).decode().rstrip("=")


def seal(key, algorithm, secret=SECRET, **header):
    """A message of five parts, whose header is all protected."""
    protected = {"enc": "A256GCM", "alg": algorithm} | header
    text = jwe.encrypt_compact(protected, secret, key, algorithms=[algorithm, protected["enc"], "DEF"])
    return dict(zip(("protected", "encrypted_key", "iv", "ciphertext", "tag"), text.split(".")))


# How the resource is sealed for the guest's key, and what the guest has to say when it does not take that.
def forms(algorithm, make):
    yield "plainly", lambda key: seal(key, algorithm), None
    yield "empty", lambda key: seal(key, algorithm, b""), None
    yield "with a name of its own in the header", lambda key: seal(key, algorithm, kid="1", typ="JWE"), None
    if algorithm != "RSA-OAEP-256":
        yield "with parties", lambda key: seal(key, algorithm, apu="QWxpY2U", apv="Qm9i"), None
    yield "for another key", lambda key: seal(make(), algorithm), "it was made for another key"
    yield "by a shorter cipher", lambda key: seal(key, algorithm, enc="A128GCM"), 'enc is "A128GCM"'
    yield "compressed", lambda key: seal(key, algorithm, zip="DEF"), "zip"

    def swapped(key):
        return seal(key, algorithm) | {"tag": seal(key, algorithm)["tag"]}

    yield "with another message's tag", swapped, "it was made for another key, or changed on its way"


class Kbs(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    key = form = None

    def answer(self, value, cookie=False):
        body = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        if cookie:
            self.send_header("Set-Cookie", "kbs-session-id=0123abcd")
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/kbs/v0/auth":
            return self.answer({"nonce": base64.b64encode(bytes(32)).decode(), "extra-params": ""}, cookie=True)
        assert self.path == "/kbs/v0/attest", self.path
        Kbs.key = import_key(body["runtime-data"]["tee-pubkey"])
        self.answer({"token": ".".join([part({"alg": "none"}), part({}), "AA"])})

    def do_GET(self):
        assert self.path == "/kbs/v0/resource/one/2/trois", self.path
        self.answer(Kbs.form(Kbs.key))

    def log_message(self, *_):
        pass


server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Kbs)
threading.Thread(target=server.serve_forever, daemon=True).start()
url = f"http://127.0.0.1:{server.server_port}"
for kind, (algorithm, make) in KINDS.items():
    taken = refused = 0
    for name, form, words in forms(algorithm, make):
        Kbs.form = staticmethod(form)
        done = subprocess.run([program, url, "kbs:///one/2/trois", kind], capture_output=True, timeout=120)
        said = done.stderr.decode()
        if words is None:
            wanted = b"" if name == "empty" else SECRET
            assert (done.returncode, done.stdout) == (0, wanted), f"{kind}, {name}: {said}"
            taken += 1
        else:
            assert done.returncode == 1 and words in said and not done.stdout, f"{kind}, {name}: {said}"
            refused += 1
    print(f"{kind}: our client opens {taken} forms of what joserfc encrypts, and refuses {refused}")
