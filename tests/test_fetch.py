"""Downloads from a server on this machine that behaves, breaks off, lies, and sends web pages."""

import hashlib
import json
import threading
from http.client import HTTPResponse
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

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
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(CONTENT)}")
            return self.end_headers()
        if self.path == "/busy" and len(self.asked) <= 2:
            return self.send_error(503)
        if self.path == "/page":
            body = b"\n<!DOCTYPE html><p>Sorry.</p>"
        if self.path == "/pointer":
            body = b"version https://git-lfs.github.com/spec/v1\noid sha256:00"
        self.send_response(206 if start else 200)
        length = len(body) + (1000 if self.path == "/too-short" else 0)
        self.send_header("Content-Length", str(length))
        self.end_headers()
        breaks = self.path in ("/breaks", "/no-ranges") and len(self.asked) <= 3
        self.wfile.write(body[: 300_000 if breaks else None])

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
        return {"path": f"folder/{path}", "url": url, "bytes": None, "sha256_prefix": None} | values

    yield entry
    server.shutdown()
    server.server_close()


def test_a_whole_file_gets_its_name_and_is_not_fetched_twice(file, tmp_path):
    digest = hashlib.sha256(CONTENT).hexdigest()
    good = file("good", bytes=len(CONTENT), sha256_prefix=digest[:8])
    assert fetch.fetch(good, tmp_path) and not fetch.fetch(good, tmp_path)
    assert (tmp_path / "folder" / "good").read_bytes() == CONTENT
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["good"]
    assert Server.asked == [None]


def test_a_bit_that_flipped_later_is_found_by_the_hash(file, tmp_path):
    good = file("good", sha256_prefix=hashlib.sha256(CONTENT).hexdigest()[:8])
    fetch.fetch(good, tmp_path)
    flipped = bytes([CONTENT[0] ^ 1]) + CONTENT[1:]
    (tmp_path / "folder" / "good").write_bytes(flipped)
    with pytest.raises(ValueError, match="has the hash .*delete it, .* and fetch it again"):
        fetch.fetch(good, tmp_path)


def test_a_broken_download_goes_on_where_it_stopped(file, tmp_path):
    assert fetch.fetch(file("breaks"), tmp_path)
    assert Server.asked == [None, "bytes=300000-", "bytes=600000-", "bytes=900000-"]
    assert (tmp_path / "folder" / "breaks").read_bytes() == CONTENT


def test_a_server_that_falls_silent_is_asked_for_the_rest(file, tmp_path, monkeypatch):
    read = HTTPResponse.read

    def read_or_wait(reply, size):
        if len(Server.asked) > 1:
            return read(reply, size)
        if tmp_path.joinpath("folder", "good.part").stat().st_size:
            raise TimeoutError("timed out")
        return read(reply, 300_000)

    monkeypatch.setattr(HTTPResponse, "read", read_or_wait)
    assert fetch.fetch(file("good"), tmp_path)
    assert Server.asked == [None, "bytes=300000-"]
    assert (tmp_path / "folder" / "good").read_bytes() == CONTENT


def test_a_server_that_knows_no_ranges_starts_anew(file, tmp_path):
    assert fetch.fetch(file("no-ranges"), tmp_path)
    assert (tmp_path / "folder" / "no-ranges").read_bytes() == CONTENT


def test_a_part_from_another_day_is_completed(file, tmp_path):
    (tmp_path / "folder").mkdir()
    part = tmp_path / "folder" / "good.part"
    part.write_bytes(CONTENT[:1234])
    assert fetch.fetch(file("good", bytes=len(CONTENT)), tmp_path) and not part.exists()
    (tmp_path / "folder" / "good").rename(part)  # as if stopped before it got its name
    assert fetch.fetch(file("good"), tmp_path) and Server.asked[-1] == "bytes=1048576-"
    assert (tmp_path / "folder" / "good").read_bytes() == CONTENT


def test_a_busy_server_is_asked_again(file, tmp_path):
    assert fetch.fetch(file("busy"), tmp_path) and len(Server.asked) == 3


@pytest.mark.parametrize("path, values, reason", [
    ("page", {}, "sent a web page of 29 bytes"),
    ("pointer", {}, "sent a git-lfs pointer"),
    ("good", {"bytes": 10}, "has 1,048,576 bytes, and should have 10;"),
    ("good", {"sha256_prefix": "00000000"}, "has the hash "),
    ("missing", {}, "404"),
])
def test_what_is_not_the_file_gets_no_name(file, tmp_path, path, values, reason):
    with pytest.raises(ValueError, match=reason):
        fetch.fetch(file(path, **values), tmp_path)
    assert not list((tmp_path / "folder").iterdir())


@pytest.mark.parametrize("make, reason", [
    (lambda part: part.mkdir(), "Is a directory"),
    (lambda part: part.symlink_to("/dev/full"), "No space left on device"),
])  # fmt: skip
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_what_can_not_be_written_is_told_at_once(file, tmp_path, make, reason, capsys):
    (tmp_path / "folder").mkdir()
    part = tmp_path / "folder" / "good.part"
    make(part)
    with pytest.raises(OSError, match=rf"cannot write {part} \({reason}\); make room there, or"):
        fetch.fetch(file("good"), tmp_path)
    assert len(Server.asked) == 1 and "127.0.0.1" not in capsys.readouterr().err


def test_fewer_bytes_than_promised_are_kept_for_the_next_time(file, tmp_path):
    with pytest.raises(OSError, match="run this again"):
        fetch.fetch(file("too-short"), tmp_path)
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["too-short.part"]


def test_the_list_names_every_file_and_a_stage_needs_its_own(capsys):
    files = json.loads(fetch.FILES.read_text("utf-8"))
    assert fetch.main([]) == 0
    listed = capsys.readouterr().out
    assert all(file["path"] in listed and file["url"] in listed for file in files)
    eva, clip = ({file["path"] for file in fetch.needed(files, 2, vision)}
                 for vision in ("eva", "clip"))  # fmt: skip
    assert [name for name in eva if "Stage" in name] == ["TinyGPT-V_for_Stage2.pth"]
    assert eva - clip == {"eva_vit_g.pth", "blip2_pretrained_flant5xxl.pth"}
    assert clip - eva == {"clip_vit_L.pth", "blip2_pretrained_vitL.pth"}
    assert "phi-2/vocab.json" in eva


def test_what_is_to_be_fetched_by_hand_is_only_listed(capsys):
    files = json.loads(fetch.FILES.read_text("utf-8"))
    (by_hand,) = [file for file in files if file.get("by_hand")]
    assert by_hand["path"] == "prerained_minigpt4_7b.pth"
    assert fetch.main([]) == 0
    listed = capsys.readouterr().out
    (line,) = [line for line in listed.splitlines() if line.startswith(by_hand["path"])]
    assert "(size unknown; stages 1; to be fetched by hand): MiniGPT-4's projection" in line
    assert all(by_hand not in fetch.needed(files, stage, "eva") for stage in (1, 2, 3, 4))


def test_the_command_line(file, tmp_path, monkeypatch, capsys):
    listed = tmp_path / "files.json"
    listed.write_text(json.dumps([file("good", stages=[4], vision="any"),
                                  file("missing", stages=[1], vision="eva")]))
    monkeypatch.setattr(fetch, "FILES", listed)
    assert fetch.main(["--out", str(tmp_path)]) == 0
    assert capsys.readouterr().out == "folder/good: fetched\n"
    assert fetch.main(["--out", str(tmp_path), "--stage", "1"]) == 2
    assert "404" in capsys.readouterr().err.splitlines()[-1]
