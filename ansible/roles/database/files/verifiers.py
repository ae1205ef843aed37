"""Prints the ALTER ROLE statements that bring stored SCRAM verifiers to the passwords wanted.

Standard input: {"stored": {role: verifier}, "wanted": {role: password}}
"""
import base64
import hashlib
import hmac
import json
import os
import sys

ITERATIONS = 4096  # PostgreSQL's own


def verifier(password, salt, iterations):
    salted = hashlib.pbkdf2_hmac("sha256", password.encode("ascii"), salt, iterations)
    client = hashlib.sha256(hmac.digest(salted, b"Client Key", "sha256")).digest()
    server = hmac.digest(salted, b"Server Key", "sha256")
    salt, client, server = (base64.b64encode(part).decode() for part in (salt, client, server))
    return "SCRAM-SHA-256$%d:%s$%s:%s" % (iterations, salt, client, server)


def matches(stored, password):
    try:
        kind, salted, _ = stored.split("$")
        iterations, salt = salted.split(":")
        again = verifier(password, base64.b64decode(salt), int(iterations))
        return kind == "SCRAM-SHA-256" and hmac.compare_digest(stored, again)
    except ValueError:
        return False


given = json.load(sys.stdin)
for role, password in sorted(given["wanted"].items()):
    if not password or not password.isascii():
        sys.exit("the password of %s is empty or not plain ASCII" % role)
    if not matches(given["stored"].get(role, ""), password):
        made = verifier(password, os.urandom(16), ITERATIONS)
        print("ALTER ROLE \"%s\" PASSWORD '%s';" % (role.replace('"', '""'), made))
