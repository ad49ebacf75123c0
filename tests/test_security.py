"""Files made to do harm: none runs code, leads out of its folder, or takes more memory than it has.

Weights are read as tensors and plain values only, and no option changes that; archives are read
where they lie and never unpacked; names in a data file are of files beside it or below. (Downloads
are checked by length and hash: test_fetch.py. A prompt can't hold special tokens: test_data.py.)
"""

import ast
import io
import json
import os
import pickle
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch
from PIL import EpsImagePlugin

import data
import generate
import quantize
import train
from damaged import picture
from experiments import evaluate
from official import convert, load, stream
from test_load import EVA, PHI, QFORMER, STAGE

ROOT = Path(__file__).parent.parent
SHIPPED = ROOT / "miniature" / "weights"


# ---- no file runs code ----
class Payload:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.fixture
def payload(tmp_path):
    """A pickle that would make a folder, which does not exist at the end either."""
    ran = tmp_path / "ran"
    content = pickle.dumps({"model": Payload(ran)})
    pickle.loads(content)
    ran.rmdir()  # so the payload does work
    yield content, {"model": {"llama_proj.weight": torch.ones(1)}, "more": Payload(ran)}
    assert not ran.exists()


@pytest.mark.parametrize("name", [EVA, QFORMER, STAGE, f"{PHI}/pytorch_model.bin", f"{PHI}/a.pt",
                                  f"{PHI}/model.safetensors"])  # fmt: skip
def test_no_file_runs_code(name, payload, tmp_path, drawing, refusal):
    content, container = payload
    folder = tmp_path / "official"
    (folder / PHI).mkdir(parents=True)
    (folder / "a.part").touch()  # makes it a folder of official files, whatever else is there
    for is_zip in (None, True, False):
        if is_zip is None:
            (folder / name).write_bytes(content)
        else:
            torch.save(container, folder / name, _use_new_zipfile_serialization=is_zip)
        told = refusal(generate.main, "--weights", folder, "--img", drawing)
        assert f"{folder / name} (" in told
        if is_zip is not None and not name.endswith(".safetensors"):  # which is never unpickled
            assert "could run code" in told
        assert refusal(quantize.main, "--weights", folder, "--out", tmp_path / "int8") == told


@pytest.mark.parametrize("name", ["stage4/model.safetensors", "stage4/config.json", "vocab.json",
                                  "phi.safetensors", "merges.txt", "added_tokens.json"])
def test_no_checkpoint_directory_runs_code(name, payload, weights, drawing, refusal):
    (weights / name).write_bytes(payload[0])
    assert str(weights) in refusal(generate.main, "--weights", weights, "--img", drawing)


def test_no_state_of_training_runs_code(payload, tmp_path, refusal):
    out = tmp_path / "run"
    out.mkdir()
    (out / "train_state.pt").write_bytes(b"PK" + payload[0])
    assert str(out) in refusal(train.main, "stage=1", f"out={out}", "resume=1")
    torch.save(payload[1], out / "train_state.pt")
    assert "train_state.pt is damaged" in refusal(train.main, "stage=1", f"out={out}", "resume=1")


def test_no_references_run_code(payload, tmp_path, refusal):
    folder = tmp_path / "refcoco"
    for name in ("train2014", "refcoco"):
        (folder / name).mkdir(parents=True)
    (folder / "refcoco" / "instances.json").write_text('{"annotations": [], "images": []}')
    (folder / "refcoco" / "refs(unc).p").write_bytes(payload[0])
    told = refusal(evaluate.main, "bench=refcoco", f"data={folder}", f"out={tmp_path / 'a'}")
    assert "refs(unc).p is not a pickle of references" in told and "mkdir" in told
    assert convert.main(["refcoco", "--src", str(folder)]) == 2


def test_shards_run_no_code_and_write_nothing(payload, tmp_path, monkeypatch):
    """Nothing is unpacked: neither what is below other folders nor what a link points to."""
    (tmp_path / "in").mkdir()
    shard = tmp_path / "in" / "0.tar"
    with tarfile.open(shard, "w") as tar:
        for name in ("../../up.jpg", "../../up.json", "/absolute.json", "7.jpg", "7.json"):
            about = tarfile.TarInfo(name)
            about.size = len(payload[0])
            tar.addfile(about, io.BytesIO(payload[0]))
        link = tarfile.TarInfo("8.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    before = {path for path in tmp_path.parent.rglob("*")}
    stream.read_index.cache_clear()
    rows = stream.ShardDataset([shard], data.RowSettings(1, data.Tokenizer(SHIPPED), 28, 4))
    with pytest.raises(ValueError, match="20 records in a row cannot be used; the first: .*0.tar"):
        rows[0]
    assert {path for path in tmp_path.parent.rglob("*")} == before


def test_a_postscript_program_is_no_picture(tmp_path, monkeypatch):
    """Pillow would hand it to Ghostscript, whatever the ending of its name."""
    path = tmp_path / "a.jpg"
    picture().save(path, "EPS")
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_, **__: pytest.fail("it ran"))
    with pytest.raises(ValueError, match="cannot read the image .*a.jpg"):
        data.load_image(path)


def calls_in(path: Path) -> list[tuple[str, ast.Call]]:
    tree = ast.parse(path.read_text("utf-8"))
    return [(ast.unparse(n.func), n) for n in ast.walk(tree) if isinstance(n, ast.Call)]


def test_nothing_in_the_code_can_run_what_it_reads():
    """No unpickling but of names that are plain, no eval, no shell, no unpacking to the disk."""
    folders = ("experiments", "miniature", "official")  # and not an environment beside them
    files = [*ROOT.glob("*.py"), *(path for name in folders for path in (ROOT / name).glob("*.py"))]
    assert len(files) > 25
    forbidden = {"eval", "exec", "pickle.load", "pickle.loads", "np.load", "os.system"}
    for path in files:
        for name, call in calls_in(path):
            keys = {key.arg: ast.unparse(key.value) for key in call.keywords}
            assert name not in forbidden and not name.endswith((".extractall", ".extract")), path
            assert name != "torch.load" or keys.get("weights_only") == "True", path
            assert keys.get("shell") in (None, "False"), path


# ---- no name leads elsewhere, no size is believed ----
@pytest.mark.parametrize("name", ["../mine", "/etc/mine", "a/b", "..", ""])
def test_a_mixture_names_datasets_in_its_folder(name, tmp_path):
    (tmp_path / "mixture.json").write_text(json.dumps({"4": {name: [1, 6]}}))
    with pytest.raises(ValueError, match="mixture.json: .* is no name of a dataset"):
        stream.read_mixture(tmp_path, 4)


@pytest.mark.parametrize("pair", ["[NaN, 1]", "[Infinity, 1]", "[1, 1e999]", "[1, 1e9]"])
def test_a_mixture_has_numbers_that_can_be_drawn_with(pair, tmp_path):
    (tmp_path / "mixture.json").write_text('{"4": {"mine": %s}}' % pair)
    with pytest.raises(ValueError, match="mixture.json"):
        stream.read_mixture(tmp_path, 4)


def test_what_is_no_text_is_not_told_in_full(tmp_path):
    (tmp_path / "mixture.json").write_bytes(b"\xff" * 10_000)
    with pytest.raises(ValueError, match="mixture.json must be like .*UnicodeDecodeError") as error:
        stream.read_mixture(tmp_path, 4)
    assert len(str(error.value)) < 500


@pytest.mark.parametrize("weight_map", ['["a"]', '{"a": "../a.bin"}', '{"a": 1}', '{"a": ""}',
                                        '{"a": "a\\u001b"}', "null"])
def test_an_index_names_files_beside_it(weight_map, tmp_path):
    path = tmp_path / "model.safetensors.index.json"
    path.write_text('{"weight_map": %s}' % weight_map)
    with pytest.raises(ValueError, match="index.json does not say in which files"):
        load.find_parts(tmp_path)


def test_links_in_a_circle_come_to_an_end(tmp_path):
    for name in ("a", "b", "c"):
        (tmp_path / name).symlink_to(tmp_path)
    (tmp_path / "model.bin").write_bytes(b"")
    with pytest.raises(ValueError, match=r"model.bin \(0 bytes\) is damaged"):
        load.find_parts(tmp_path)


def test_an_archive_that_unpacks_to_more_is_refused(tmp_path):
    """torch stores what it saves as it is; what is compressed could have any size."""
    plain, packed = tmp_path / "a.pth", tmp_path / "b.pth"
    torch.save({"llama_proj.weight": torch.zeros(1000)}, plain)
    with zipfile.ZipFile(plain) as old, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name.replace("a/", "b/", 1), old.read(name))
    assert load.open_weights(plain).part == load.PROJECTION
    with pytest.raises(ValueError, match="b.pth .* is damaged or cut off .it is compressed"):
        load.open_weights(packed)


@pytest.mark.parametrize("tensor", [torch.eye(3).to_sparse(), torch.ones(3, device="meta")])
def test_tensors_without_numbers_are_no_weights(tensor, tmp_path):
    torch.save({"llama_proj.weight": tensor}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match="a.pth .* is not a table of tensors"):
        load.open_weights(tmp_path / "a.pth")


@pytest.mark.parametrize("content", [
    b"\x80\x02]r\0\0\0\2.", b"]p33554432\n.", b"\x80\x05\x96\0\0\0\x20\0\0\0\0",
])  # fmt: skip
def test_a_pickle_that_asks_for_memory_does_not_get_it(content, tmp_path):
    """A few bytes that say they are the 33 millionth object, or half a gigabyte long."""
    resource = pytest.importorskip("resource")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    (tmp_path / "refs.p").write_bytes(content)
    try:
        convert.read_references(tmp_path / "refs.p")
    except ValueError as error:
        assert "refs.p is not a pickle of references" in str(error)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KB


def test_a_shard_whose_sizes_lead_back_comes_to_an_end(tmp_path):
    """A negative size, which tar can write, leads to the same member again, for ever."""
    path = tmp_path / "0.tar"
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        about = tarfile.TarInfo("1.jpg")
        about.size = 512
        tar.addfile(about, io.BytesIO(bytes(512)))
    content = bytearray(path.read_bytes())
    content[124:136] = (-512 & (1 << 96) - 1).to_bytes(12, "big")
    content[148:156] = b" " * 8
    content[148:156] = b"%06o\0 " % sum(content[:512])
    path.write_bytes(content)
    with tarfile.open(path) as tar:
        assert tar.next().size == -512
    stream.read_index.cache_clear()
    assert stream.read_index(path) == [("", {})]


def test_a_shard_of_nothing_but_headers_comes_to_an_end(tmp_path):
    """tarfile goes one call deeper for each of them, and ends in an error that is not its own."""
    about = tarfile.TarInfo("x")
    about.type, about.size = tarfile.XHDTYPE, 512
    header = about.tobuf(tarfile.USTAR_FORMAT) + b"20 comment=harmless\n".ljust(512, b"\0")
    path = tmp_path / "0.tar"
    path.write_bytes(header * 2000)
    with pytest.raises(RecursionError):
        tarfile.open(path)
    stream.read_index.cache_clear()
    assert stream.read_index(path) == [("", {})]
