"""Brings a Mosquitto password file to the users given as JSON on standard input.

usage: users.py FILE check|write       prints "changed" or "same"
"""
import base64
import hashlib
import hmac
import json
import os
import sys

ITERATIONS = 101  # Mosquitto 2.0 reads whatever number stands in the file, and writes this one


def digest(password, salt, iterations):
    return hashlib.pbkdf2_hmac("sha512", password.encode(), salt, iterations)


def line(name, password):
    salt = os.urandom(12)
    parts = (base64.b64encode(part).decode() for part in (salt, digest(password, salt, ITERATIONS)))
    return "%s:$7$%d$%s$%s" % (name, ITERATIONS, *parts)


def matches(entry, password):
    try:
        _, kind, iterations, salt, wanted = entry.split("$")
        found = digest(password, base64.b64decode(salt), int(iterations))
        return kind == "7" and hmac.compare_digest(found, base64.b64decode(wanted))
    except ValueError:
        return False


def main(path, mode):
    users = json.load(sys.stdin)
    old = []
    if os.path.exists(path):
        with open(path) as file:
            old = file.read().splitlines()
    entries = dict(entry.split(":", 1) for entry in old if ":" in entry)
    new = []
    for name, password in sorted(users.items()):
        keep = matches(entries.get(name, ""), password)
        new.append("%s:%s" % (name, entries[name]) if keep else line(name, password))
    if new == old:
        return "same"
    if mode == "write":
        made = os.open(path + ".new", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(made, "w") as file:
            file.write("".join(entry + "\n" for entry in new))
            file.flush()
            os.fsync(file.fileno())
        if os.path.exists(path):
            owner = os.stat(path)
            os.chown(path + ".new", owner.st_uid, owner.st_gid)
            os.chmod(path + ".new", owner.st_mode & 0o777)
        os.replace(path + ".new", path)
    return "changed"


print(main(*sys.argv[1:]))
