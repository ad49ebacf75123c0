"""Downloads the official weight files: python official/fetch.py --out DIR

    python official/fetch.py                           what there is, how large, which licence
    python official/fetch.py --out DIR                 all that stage 4 answers with
    python official/fetch.py --out DIR --stage 2       what a model of stage 2 needs
    python official/fetch.py --out DIR --vision clip   with CLIP's ViT in the place of EVA's

What stands under "by hand" in files.json is only listed, with the page to fetch it from.

A broken download goes on where it stopped. A file gets its name only when it is whole: as long as
the server and files.json say, with the hash that files.json knows, and not an error page.
"""

import argparse
import hashlib
import json
import os
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPException, HTTPResponse
from pathlib import Path

from tqdm import tqdm

FILES = Path(__file__).with_name("files.json")
CHUNK = 1 << 20
TRIES, PAUSE = 5, 3  # in a row without a single new byte; seconds, more each time
NOT_WEIGHTS = {
    b"<": "a web page",
    b"version https://git-lfs": "a git-lfs pointer, a note of where the file is",
}


def needed(files: list[dict], stage: int, vision: str) -> list[dict]:
    """The files that a model of this stage with this ViT is made of, as far as they can be fetched
    from here."""
    return [file for file in files if stage in file["stages"]
            and file["vision"] in (vision, "any") and not file.get("by_hand")]  # fmt: skip


def describe(files: list[dict]) -> str:
    """What there is to download, file by file."""
    lines = []
    for file in files:
        size = f"{file['bytes'] / 1e6:,.1f} MB" if file["bytes"] else "size unknown"
        stages = ", ".join(map(str, file["stages"]))
        only = "" if file["vision"] == "any" else f"; only with --vision {file['vision']}"
        only += "; to be fetched by hand" if file.get("by_hand") else ""
        lines += [f"{file['path']}  ({size}; stages {stages}{only}): {file['what']}",
                  f"    {file['url']}", f"    licence: {file['license']}"]  # fmt: skip
    return "\n".join(lines)


def fetch(file: dict, out: Path) -> bool:
    """Makes sure that the file is in `out`; False if it was there already.

    Raises ValueError, saying what to do, for what came and is not the file, OSError where nothing
    comes or can be written. What has arrived of a broken download stays in FILE.part, for the next
    time.
    """
    path = out / file["path"]
    part = path.with_name(path.name + ".part")
    if path.exists():
        check(path, file, path.stat().st_size)
        return False
    path.parent.mkdir(parents=True, exist_ok=True)
    total = download(file["url"], part)
    try:
        check(part, file, total)
    except ValueError:
        part.unlink()
        raise
    os.replace(part, path)
    return True


class Interrupted(Exception):
    """Nobody answered, or the connection broke off: worth another try."""


@contextmanager
def network() -> Iterator[None]:
    """Tells what goes wrong on the way from what goes wrong here, with the disk."""
    try:
        yield
    except urllib.error.HTTPError:  # an answer
        raise
    except (HTTPException, OSError) as error:
        raise Interrupted(str(error)) from error


def download(url: str, part: Path) -> int:
    """Appends to `part` until it is as long as the server says; returns that length."""
    failures = total = 0
    while True:
        before = part.stat().st_size if part.exists() else 0
        try:
            total = request(url, part, before)
        except urllib.error.HTTPError as error:
            if error.code == 416:  # there is nothing after what we have: "bytes */LENGTH"
                length = error.headers.get("Content-Range", "*/0").rpartition("/")[2]
                total = total or int(length)
            elif error.code < 500 and error.code != 429:
                raise ValueError(f"{url}: the server says {error.code} {error.reason}") from None
        except Interrupted as error:
            print(f"{url}: {error}", file=sys.stderr)
        except OSError as error:
            advice = "make room there, or choose another --out"
            raise OSError(f"cannot write {part} ({error.strerror}); {advice}") from error
        size = part.stat().st_size if part.exists() else 0
        if total and size >= total:
            return total
        failures = 0 if size > before else failures + 1
        if failures == TRIES:
            raise OSError(f"{url}: no more bytes after {size}; run this again to go on from there")
        time.sleep(PAUSE * failures)


def request(url: str, part: Path, start: int) -> int:
    """One attempt: writes what the server sends from byte `start` on; returns the whole length."""
    headers = {"Range": f"bytes={start}-"} if start else {}
    with network():
        reply = urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=60)
    with reply:
        resumed = reply.status == 206
        length = reply.headers.get("Content-Length")
        if length is None or not length.isdigit():
            raise ValueError(f"{url}: the server does not say how long the file is")
        start = start if resumed else 0  # it sends everything anew
        total = start + int(length)
        with open(part, "ab" if resumed else "wb") as file, tqdm(
            total=total, initial=start, unit="B", unit_scale=True, desc=part.stem
        ) as bar:
            while block := receive(reply):
                file.write(block)
                bar.update(len(block))
    return total


def receive(reply: HTTPResponse) -> bytes:
    """The next bytes of an answer; none at its end."""
    with network():
        return reply.read(CHUNK)


def check(path: Path, file: dict, total: int) -> None:
    """Raises ValueError unless the file can be the one that files.json describes."""
    size, name = path.stat().st_size, file["path"]
    with open(path, "rb") as opened:
        kind = not_weights(opened.read(64))
    if kind:
        raise ValueError(f"{name}: {file['url']} sent {kind} of {size} bytes, not the file")
    if size != (file["bytes"] or total):
        raise ValueError(
            f"{name} has {size:,} bytes, and should have {file['bytes'] or total:,}; "
            f"delete it, if it is there, and fetch it again"
        )
    if file["sha256_prefix"]:
        found = sha256(path)
        if not found.startswith(file["sha256_prefix"]):
            raise ValueError(
                f"{name} has the hash {found}, and should have {file['sha256_prefix']}...; "
                f"delete it, if it is there, and fetch it again"
            )


def not_weights(beginning: bytes) -> str | None:
    """What a file is instead of weights, by its first bytes."""
    kinds = (kind for start, kind in NOT_WEIGHTS.items() if beginning.lstrip().startswith(start))
    return next(kinds, None)


def is_file_name(name: object) -> bool:
    """Whether it is the plain name of a file, without a folder in it."""
    return (isinstance(name, str) and name.isprintable() and Path(name).name == name
            and name not in ("", ".."))  # fmt: skip


def sha256(path: Path) -> str:
    """The hash of a file in hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as opened:
        while block := opened.read(CHUNK):
            digest.update(block)
    return digest.hexdigest()


def main(arguments: list[str]) -> int:
    """Exit code: 0, 2 after a line on stderr that says what was wrong, or 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(description="Download the official weight files.")
    parser.add_argument("--out", type=Path, metavar="DIR", help="without it: say what there is")
    parser.add_argument("--stage", type=int, choices=(1, 2, 3, 4), default=4)
    parser.add_argument("--vision", choices=("eva", "clip"), default="eva")
    given = parser.parse_args(arguments)
    files = json.loads(FILES.read_text("utf-8"))
    if given.out is None:
        print(describe(files))
        return 0
    try:
        for file in needed(files, given.stage, given.vision):
            print(f"{file['path']}: {'fetched' if fetch(file, given.out) else 'already there'}")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
