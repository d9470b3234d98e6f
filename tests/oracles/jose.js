// RFC 8785 and RFC 7516 by Node.js, for client.py: a question on each line of standard input, its answer on one of standard output.
//
// {"do":"canonical","text":JSON} -> {"text":…}   {"do":"sha384","text":…} -> {"base64":…}
// {"do":"open","message":FLATTENED JWE,"key":PRIVATE JWK} -> {"base64":…}, or {"error":…}
"use strict";
const crypto = require("node:crypto");

// RFC 8785 takes numbers and strings as ECMAScript writes them; what is left is the order of members, by UTF-16 units, which
// is how sort() compares.
function canonical(value) {
  if (Array.isArray(value)) return "[" + value.map(canonical).join(",") + "]";
  if (value === null || typeof value !== "object") return JSON.stringify(value);
  const member = (name) => JSON.stringify(name) + ":" + canonical(value[name]);
  return "{" + Object.keys(value).sort().map(member).join(",") + "}";
}

const part = (text) => Buffer.from(text, "base64url");

function word(number) {
  const bytes = Buffer.alloc(4);
  bytes.writeUInt32BE(number);
  return bytes;
}

// RFC 7518, 4.6.2: one block of SHA-256, without PartyUInfo and PartyVInfo.
function agree(privateKey, header) {
  const publicKey = crypto.createPublicKey({ key: header.epk, format: "jwk" });
  const secret = crypto.diffieHellman({ privateKey, publicKey });
  const name = Buffer.from(header.alg);
  const input = [word(1), secret, word(name.length), name, word(0), word(0), word(256)];
  return crypto.createHash("sha256").update(Buffer.concat(input)).digest();
}

function contentKey(privateKey, header, wrapped) {
  if (header.alg === "RSA-OAEP-256") {
    const padding = crypto.constants.RSA_PKCS1_OAEP_PADDING;
    return crypto.privateDecrypt({ key: privateKey, padding, oaepHash: "sha256" }, wrapped);
  }
  if (header.alg !== "ECDH-ES+A256KW") throw new Error("alg " + header.alg);
  // RFC 3394, 2.2.3.1: the initial value that unwrapping has to find.
  const initial = Buffer.from("a6a6a6a6a6a6a6a6", "hex");
  const unwrap = crypto.createDecipheriv("id-aes256-wrap", agree(privateKey, header), initial);
  return Buffer.concat([unwrap.update(wrapped), unwrap.final()]);
}

function open(message, jwk) {
  const header = JSON.parse(part(message.protected));
  if (header.enc !== "A256GCM") throw new Error("enc " + header.enc);
  const key = contentKey(crypto.createPrivateKey({ key: jwk, format: "jwk" }), header, part(message.encrypted_key));
  const cipher = crypto.createDecipheriv("aes-256-gcm", key, part(message.iv));
  // The header as it came, to the letter.
  cipher.setAAD(Buffer.from(message.protected, "ascii"));
  cipher.setAuthTag(part(message.tag));
  return Buffer.concat([cipher.update(part(message.ciphertext)), cipher.final()]);
}

const answers = {
  canonical: ({ text }) => ({ text: canonical(JSON.parse(text)) }),
  sha384: ({ text }) => ({ base64: crypto.createHash("sha384").update(text, "utf8").digest("base64") }),
  open: ({ message, key }) => ({ base64: open(message, key).toString("base64") }),
};

require("node:readline")
  .createInterface({ input: process.stdin })
  .on("line", (line) => {
    const question = JSON.parse(line);
    let answer;
    try {
      answer = answers[question.do](question);
    } catch (error) {
      answer = { error: String(error) };
    }
    process.stdout.write(JSON.stringify(answer) + "\n");
  });
