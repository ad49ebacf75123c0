"""Downloads from a server on this machine that behaves, breaks off, lies, and sends web pages."""

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from official import fetch

CONTENT = bytes(range(256)) * 4096  # 1 MiB


class Server(BaseHTTPRequestHandler):
    """The path says how to behave; `asked` remembers the Range of every request."""

    asked: list = []

    def do_GET(self):
        wanted = self.headers.get("Range")
        self.asked.append(wanted)
        start = int(wanted[6:-1]) if wanted and self.path != "/no-ranges" else 0
        body = CONTENT[start:]
        if self.path == "/missing":
            return self.send_error(404)
        if start >= len(CONTENT):
            return self.send_error(416)
        if self.path == "/page":
            body = b"\n<!DOCTYPE html><p>Sorry.</p>"
        self.send_response(206 if start else 200)
        length = len(body) + (1000 if self.path == "/too-short" else 0)
        self.send_header("Content-Length", str(length))
        self.end_headers()
        breaks = self.path == "/breaks" and len(self.asked) <= 3 or self.path == "/no-ranges"
        self.wfile.write(body[: 300_000 if breaks and len(self.asked) <= 3 else None])

    def log_message(self, *_):
        pass


@pytest.fixture
def file(tmp_path, monkeypatch):
    """Makes an entry of files.json that asks the server for a path."""
    monkeypatch.setattr(fetch, "PAUSE", 0)
    server = HTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    Server.asked.clear()

    def entry(path, **values):
        url = f"http://127.0.0.1:{server.server_port}/{path}"
        return {"path": f"folder/{path}", "url": url, "bytes": None, "sha256": None} | values

    yield entry
    server.shutdown()
    server.server_close()


def test_a_whole_file_gets_its_name_and_is_not_fetched_twice(file, tmp_path):
    digest = hashlib.sha256(CONTENT).hexdigest()
    good = file("good", bytes=len(CONTENT), sha256=digest[:8])
    assert fetch.fetch(good, tmp_path) and not fetch.fetch(good, tmp_path)
    assert (tmp_path / "folder" / "good").read_bytes() == CONTENT
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["good"]
    assert Server.asked == [None]


def test_a_broken_download_goes_on_where_it_stopped(file, tmp_path):
    assert fetch.fetch(file("breaks"), tmp_path)
    assert Server.asked == [None, "bytes=300000-", "bytes=600000-", "bytes=900000-"]
    assert (tmp_path / "folder" / "breaks").read_bytes() == CONTENT


def test_a_server_that_knows_no_ranges_starts_anew(file, tmp_path):
    assert fetch.fetch(file("no-ranges"), tmp_path)
    assert (tmp_path / "folder" / "no-ranges").read_bytes() == CONTENT


def test_a_part_from_another_day_is_completed(file, tmp_path):
    (tmp_path / "folder").mkdir()
    part = tmp_path / "folder" / "good.part"
    part.write_bytes(CONTENT[:1234])
    assert fetch.fetch(file("good", bytes=len(CONTENT)), tmp_path) and not part.exists()
    part.write_bytes(CONTENT + b"too long")
    (tmp_path / "folder" / "good").unlink()
    assert fetch.fetch(file("good"), tmp_path)
    assert (tmp_path / "folder" / "good").read_bytes() == CONTENT


@pytest.mark.parametrize("path, values, reason", [
    ("page", {}, "sent a web page of 29 bytes"),
    ("good", {"bytes": 10}, "has 1,048,576 bytes, and should have 10;"),
    ("good", {"sha256": "00000000"}, "has the hash "),
    ("missing", {}, "404"),
])
def test_what_is_not_the_file_gets_no_name(file, tmp_path, path, values, reason):
    with pytest.raises(ValueError, match=reason):
        fetch.fetch(file(path, **values), tmp_path)
    assert not list((tmp_path / "folder").iterdir())


def test_fewer_bytes_than_promised_are_kept_for_the_next_time(file, tmp_path):
    with pytest.raises(OSError, match="run this again"):
        fetch.fetch(file("too-short"), tmp_path)
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["too-short.part"]


def test_the_list_names_every_file_of_a_stage(capsys):
    files = json.loads(fetch.FILES.read_text("utf-8"))
    assert fetch.main(["--list"]) == 0
    listed = capsys.readouterr().out
    assert all(file["path"] in listed and file["url"] in listed for file in files)
    names = [file["path"] for file in fetch.needed(files, 2)]
    assert [name for name in names if "Stage" in name] == ["TinyGPT-V_for_Stage2.pth"]
    assert {"eva_vit_g.pth", "blip2_pretrained_flant5xxl.pth", "phi-2/vocab.json"} <= set(names)
