"""quantize.py: the bound, the twins, the int8 unit and what stands in for it, and the files."""

import json
import os
import shutil
import subprocess
import sys
import weakref
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn
from torch.testing import assert_close

import quantize
from data import inference_prompt, load_image
from generate import answer, encode_images
from lora import LoRAConfig, LoRALinear, merge_lora, merge_tensors
from model import KVCache, Phi, PhiConfig, TinyGPTV
from official.checkpoints import save_checkpoint
from quantize import (
    Int8Block,
    Int8Linear,
    Int8VisionBlock,
    PackedLinear,
    dequantize,
    quantize_rows,
)
from train import TrainConfig, train
from vision import Attention, Block, VisionConfig

ROOT = Path(__file__).resolve().parent.parent
WEIGHTS = ROOT / "miniature" / "weights"
PICTURE = ROOT / "assets" / "shapes.png"
CONFIG = PhiConfig(
    vocab_size=29, hidden_size=64, num_layers=2, num_heads=4, intermediate_size=96,
    max_position_embeddings=32, partial_rotary_factor=0.5,
)  # fmt: skip
CPU = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
needs_unit = pytest.mark.skipif(not quantize.has_int8_unit(), reason="this CPU has no int8 unit")

on_both_units = pytest.mark.usefixtures("unit")


@pytest.fixture(params=[False, True], ids=["vectors", "matrices"])
def unit(request, monkeypatch):
    """As on a CPU whose unit multiplies vectors, for which weights are packed, and as on one whose
    unit multiplies matrices (AMX): its products are as right on the other."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_int8": request.param})


@pytest.fixture(scope="module")
def int8_directory(tmp_path_factory):
    out = tmp_path_factory.mktemp("int8") / "weights"
    assert quantize.main(["--weights", str(WEIGHTS), "--out", str(out)]) == 0
    return out


@pytest.fixture(autouse=True)
def no_gradients():
    torch.manual_seed(0)
    with torch.inference_mode():
        yield


def random_linear(in_features=96, out_features=40, bias=True):
    linear = nn.Linear(in_features, out_features, bias)
    nn.init.normal_(linear.weight)
    return linear


def error(found, right):
    return float((found.float() - right).norm() / right.norm())


# ---- the idea ----
def test_no_weight_is_off_by_more_than_half_a_step():
    weight = torch.randn(50, 300).double() * torch.logspace(-6, 6, 50)[:, None]
    weight[3, 7] = 1e5  # a row with an outlier
    quantized, scale = quantize_rows(weight.float())
    off = (quantized.double() * scale.double()[:, None] - weight).abs()
    assert quantized.dtype == torch.int8 and scale.dtype == torch.float32
    assert (off <= 0.5001 * scale[:, None]).all()
    assert (off.amax(1) > 0.4 * scale).sum() > 45  # the bound is no wider than it has to be


def test_the_largest_weight_is_127_and_the_scale_is_symmetric():
    quantized, scale = quantize_rows(torch.tensor([[1.0, -4.0, 0.5], [2.0, 0.1, 0.0]]))
    assert_close(scale, torch.tensor([4 / 127, 2 / 127]))
    assert quantized.tolist() == [[32, -127, 16], [127, 6, 0]]


def test_rows_of_nothing_and_of_almost_nothing():
    weight = torch.tensor([[0.0, 0.0], [1e-42, -1e-44], [3e-38, 1e-38]])
    quantized, scale = quantize_rows(weight)
    back = dequantize(quantized, scale)
    assert (scale > 0).all()  # 0 / 0 is no whole number, whatever the processor makes of it
    assert (back[0] == 0).all() and back.isfinite().all()
    assert_close(back, weight, atol=1e-38, rtol=0.01)


def test_half_precision_is_quantized_as_what_it_stands_for():
    weight = torch.randn(5, 70).half()
    for found, right in zip(quantize_rows(weight), quantize_rows(weight.float())):
        assert torch.equal(found, right)


def test_what_is_quantized_is_every_matrix_of_phi_and_of_the_vits_blocks():
    model = TinyGPTV.from_pretrained(WEIGHTS)
    merge_lora(model)
    linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    quantize.quantize_model(model)
    chosen = {name for name, module in model.named_modules() if isinstance(module, Int8Linear)}
    assert {name.split(".")[0] for name in linear - chosen} == {"qformer", "projector"}
    assert len(chosen) == 4 * 6 + 1 + 4 * 5


def test_quantizing_lets_go_of_each_matrix_before_the_next():
    model = TinyGPTV.from_pretrained(WEIGHTS, stage=1)
    before = [weakref.ref(layer) for layer in model.modules() if type(layer) is nn.Linear]
    alive = []
    original = quantize.quantize_rows

    def counting(weight):
        alive.append(sum(layer() is not None for layer in before))
        return original(weight)

    with mock.patch.object(quantize, "quantize_rows", counting):
        quantize.quantize_model(model)
    assert alive[0] - alive[-1] == len(alive) - 1 == 44


@needs_unit
def test_packing_releases_after_each_layer():
    whole = TinyGPTV.from_pretrained(WEIGHTS, stage=4, int8=True, pack=False)
    phi = whole.phi
    before = [weakref.ref(block.self_attn.qkv.weight) for block in phi.layers]
    alive = []
    quantize.pack_phi(phi, lambda: alive.append(sum(weight() is not None for weight in before)))
    layers = len(before)
    assert len(alive) == layers + 1 and alive[-1] == 0  # the last is after lm_head
    # Two threads: at the n-th count n layers are gone, and perhaps one more.
    for n, left in enumerate(sorted(alive[:-1], reverse=True), 1):
        assert layers - n - 1 <= left <= layers - n


@needs_unit
@on_both_units
def test_a_unit_for_matrices_takes_a_weight_where_it_lies(request):
    layers = [Int8Linear(random_linear()), Int8Linear(random_linear(96, 24))]
    one, two = PackedLinear(layers[:1], 2), PackedLinear(layers, 2)
    has_amx = request.node.callspec.params["unit"]
    assert one.has_amx == two.has_amx == has_amx
    if has_amx:
        assert one.weight.data_ptr() == layers[0].weight.data_ptr()
        assert torch.equal(two.weight, torch.cat([layer.weight for layer in layers]))
    assert one.state_dict() == {}


# ---- layers and their twins ----
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 96), (2, 3, 96), (2, 40, 96)])
def test_int8_linear_equals_its_definition(shape, bias):
    linear, x = random_linear(bias=bias), torch.randn(shape)
    layer = Int8Linear(linear)
    right = F.linear(x, dequantize(*quantize_rows(linear.weight)), linear.bias)
    assert_close(layer.naive(x), right)
    assert layer(x).shape == right.shape and error(layer(x), right) < 0.006
    assert error(right, linear(x)) < 0.012  # what int8 itself costs


def test_large_sums_do_not_overflow_where_autocast_would_multiply_in_fp16():
    """W is multiplied without its scale: sums of 2048 products reach some 100,000, fp16 65,504."""
    layer, x = Int8Linear(random_linear(2048, 8)), 60 * torch.randn(20, 2048)
    with torch.autocast("cpu", torch.float16):
        assert error(layer(x), layer.naive(x)) < 0.006


@needs_unit
@on_both_units
@pytest.mark.parametrize("num_bytes, tolerance", [(1, 0.012), (2, 6e-5)])
@pytest.mark.parametrize("shape", [(1, 96), (3, 96), (3, 5, 96)])
def test_packed_layers_equal_their_definition(shape, num_bytes, tolerance):
    layers = [Int8Linear(random_linear()), Int8Linear(random_linear(96, 24, bias=False))]
    x = torch.randn(shape) * 10
    right = torch.cat([layer.naive(x) for layer in layers], dim=-1)
    packed = PackedLinear(layers, num_bytes)
    assert packed(x).shape == right.shape and error(packed(x), right) < tolerance
    assert error(packed(x), right) > tolerance / 20  # the tolerance is not idle
    order = torch.cat([torch.randperm(40), torch.arange(40, 64)])  # of the first alone
    assert error(PackedLinear(layers, num_bytes, order[:40])(x), right[..., order]) < tolerance


@needs_unit
@on_both_units
def test_the_bias_is_kept_exactly():
    linear = random_linear()
    for layer in (Int8Linear(linear), PackedLinear([Int8Linear(linear)], 1),
                  PackedLinear([Int8Linear(linear)], 2)):  # fmt: skip
        assert torch.equal(layer(torch.zeros(1, 96))[0], linear.bias)


@needs_unit
@on_both_units
@pytest.mark.parametrize("num_bytes, tolerance", [(1, 0.012), (2, 6e-5)])
def test_one_row_with_an_outlier_does_not_spoil_the_others(num_bytes, tolerance):
    layer, x = Int8Linear(random_linear()), torch.randn(4, 96)
    x[1, 5] = 1e4
    packed = PackedLinear([layer], num_bytes)
    for row in (0, 2, 3):
        assert error(packed(x)[row], layer.naive(x)[row]) < tolerance


@needs_unit
def test_where_one_byte_is_too_coarse_there_are_two():
    """One number of one row is 200 times the others: with 127 steps those would all be zero."""
    linear, x = random_linear(), torch.randn(4, 96)
    linear.weight.data[:, 5] *= 0.01
    x[2, 5] = 200
    layer = Int8Linear(linear)
    right = layer.naive(x)[2]
    assert error(PackedLinear([layer], 1)(x)[2], right) < 0.01
    with mock.patch.object(quantize, "is_coarse", lambda *_: False):
        assert error(PackedLinear([layer], 1)(x)[2], right) > 0.1


def test_a_normal_distribution_is_not_coarse_nor_after_gelu():
    x = torch.randn(300, 6144)
    for rows in (x[:, :1408], F.gelu(x)):
        sizes = rows.abs()
        assert not quantize.is_coarse(sizes, sizes.amax(1, keepdim=True) / 127)


@needs_unit
def test_a_vision_block_by_rows_is_the_block():
    """Two pictures of 300 tokens: the second part of the rows begins in the first picture."""
    config = VisionConfig(28, 14, hidden_size=32, num_layers=1, num_heads=2, intermediate_size=64)
    block = Block(config).requires_grad_(False)
    block.attn.q_bias.normal_()
    block.attn.v_bias.normal_()
    for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"):
        block.set_submodule(name, Int8Linear(block.get_submodule(name)))
    quantize.pack_layers(block, 1)
    x = torch.randn(2, 300, 32)
    assert_close(Int8VisionBlock(block)(x), block(x), rtol=0, atol=1e-6)


@needs_unit
@on_both_units
def test_whole_numbers_are_multiplied_without_error():
    """Weights and numbers that need no rounding, the largest among them, with the exact sum."""
    linear = random_linear(64, 32)
    linear.weight.data = torch.randint(-127, 128, (32, 64)).float()
    linear.weight.data[:, 0] = 127
    linear.bias.data.zero_()
    numbers = torch.randint(-32512, 32513, (7, 64)).float()
    numbers[:, 0] = 32512
    exact = numbers.double() @ linear.weight.double().T
    packed = PackedLinear([Int8Linear(linear)], 2)
    assert_close(packed(numbers).double(), exact, rtol=1e-6, atol=2.0)


@pytest.mark.skipif("avx512_vnni" not in CPU, reason="this CPU has no int8 unit")
def test_a_cpu_with_the_unit_is_known():
    """Else all that needs the unit would be passed over: it finds out by the same products."""
    assert quantize.has_int8_unit()


def test_a_cpu_without_the_unit_is_found_out_and_still_answers(int8_directory):
    """AVX2 adds pairs of products in 16 bits, where 2 * 255 * 127 does not fit."""
    code = "import quantize; print(quantize.has_int8_unit())"
    environment = os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX2"}
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment,
                         capture_output=True, text=True)  # fmt: skip
    assert run.stdout == "False\n"
    command = [sys.executable, "generate.py", "--weights", str(int8_directory), "--img", PICTURE]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert "a large red solid star" in run.stdout and run.returncode == 0 and run.stderr == ""


# ---- a layer of Phi ----
def small_phi():
    phi = Phi(CONFIG)
    for parameter in phi.parameters():
        nn.init.normal_(parameter, std=0.3)
    for block in phi.layers:
        block.mlp.fc1.weight.mul_(0.4)  # to where the two kinds of GELU differ most
        block.mlp.fc2.weight.mul_(5)
        for parent, name in ((block.self_attn, "qkv"), (block.self_attn, "dense"),
                             (block.mlp, "fc1"), (block.mlp, "fc2")):  # fmt: skip
            linear = Int8Linear(getattr(parent, name))
            linear.forward = linear.naive
            setattr(parent, name, linear)
    return phi.eval()


@needs_unit
@on_both_units
@pytest.mark.parametrize("padding", [[0, 0], [3, 1]])
def test_int8_blocks_equal_those_of_the_model(padding):
    """Prefill, then three tokens one by one through the cache, with and without padding."""
    phi, fast = small_phi(), small_phi()
    fast.load_state_dict(phi.state_dict())
    fast.layers = nn.ModuleList(Int8Block(block, rotary_dim=8) for block in fast.layers)
    x = torch.randn(2, 9, CONFIG.hidden_size)
    mask = (torch.arange(9) >= torch.tensor(padding)[:, None]).long()
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    caches = KVCache(CONFIG, 2, 9), KVCache(CONFIG, 2, 9)
    for start, end in ((0, 6), (6, 7), (7, 8), (8, 9)):
        seen = mask[:, :end] if any(padding) else None
        right, found = (
            each(x[:, start:end], seen, positions[:, start:end], cache)
            for each, cache in zip((phi, fast), caches)
        )
        real = mask[:, start:end].bool()
        assert error(found[real], right[real]) < 1e-4


@needs_unit
def test_a_phi_without_the_new_norms_is_packed_layer_by_layer():
    config = replace(CONFIG, qk_norm=False, attn_norm=False)
    phi, x = nn.ModuleDict({"phi": Phi(config).eval()}), torch.randn(1, 5, CONFIG.hidden_size)
    quantize.quantize_model(phi)
    right = phi["phi"](x)
    quantize.pack_phi(phi["phi"], lambda: None)
    assert isinstance(phi["phi"].layers[1].mlp.fc2, PackedLinear)
    assert error(phi["phi"](x), right) < 0.01


@needs_unit
def test_int8_blocks_show_their_attention():
    phi, x = small_phi(), torch.randn(1, 5, CONFIG.hidden_size)
    right, found = [], []
    phi(x, maps=right)
    phi.layers = nn.ModuleList(Int8Block(block, rotary_dim=8) for block in phi.layers)
    phi(x, maps=found)
    for one, other in zip(right, found, strict=True):
        assert_close(other, one, atol=2e-4, rtol=0)


# ---- the whole model ----
def int8_state():
    model = TinyGPTV.from_pretrained(WEIGHTS)
    merge_lora(model)
    quantize.quantize_model(model)
    return model.state_dict()


def test_the_file_holds_what_merging_and_quantizing_in_memory_gives(int8_directory):
    right, found = int8_state(), load_file(int8_directory / "model.safetensors")
    assert set(found) == set(right)
    for name, tensor in found.items():
        assert torch.equal(tensor.to(right[name].dtype), right[name]), name
        is_int8 = bool(quantize.QUANTIZED.fullmatch(name.removesuffix(".weight")))
        assert (tensor.dtype == torch.int8) == is_int8
    config = json.loads((int8_directory / "config.json").read_text())
    assert config["int8"] and config["lora"] is None and config["backbones"] == "."


def test_lora_is_merged_before_rounding():
    """To round W and add what LoRA says would not be the same."""
    model = TinyGPTV.from_pretrained(WEIGHTS)
    layer = model.phi.layers[0].self_attn.dense
    assert isinstance(layer, LoRALinear)
    merged = layer.weight + layer.scaling * layer.lora_B.weight @ layer.lora_A.weight
    name = "phi.layers.0.self_attn.dense.weight"
    off = (int8_state()[name].int() - quantize_rows(merged)[0]).abs()
    assert off.max() <= 1 and (off > 0).sum() < 5  # sums may be rounded in another order
    assert (int8_state()[name].int() - quantize_rows(layer.weight)[0]).abs().max() > 5


@pytest.mark.parametrize("order", ["W A B", "A W B"])
def test_lora_that_comes_too_late_is_not_lost_in_silence(order):
    names = {"W": "dense.weight", "A": "dense.lora_A.weight", "B": "dense.lora_B.weight"}
    late = [(names[part], torch.ones(2, 2)) for part in order.split()]
    with pytest.raises(ValueError, match="lora_.*weight came without its partner, or after"):
        list(merge_tensors(late, LoRAConfig(r=2, alpha=2)))


def test_a_tensor_that_does_not_come_is_an_error(tmp_path):
    expected = {"a": torch.empty(2, device="meta"), "b": torch.empty(3, device="meta")}
    with pytest.raises(ValueError, match="1 tensors did not come as a whole, first b"):
        quantize.write_tensors(tmp_path / "x", expected, iter([("a", torch.ones(2))]))


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="maps are read from /proc")
def test_weights_are_used_where_they_lie_in_the_file(int8_directory):
    model = TinyGPTV.from_pretrained(int8_directory, pack=False)
    state, file = model.state_dict(), load_file(int8_directory / "model.safetensors")
    assert all(torch.equal(state[name], tensor.to(state[name].dtype))
               for name, tensor in file.items())  # fmt: skip
    lines = Path("/proc/self/maps").read_text().splitlines()
    places = [line.split()[0].split("-") for line in lines if str(int8_directory) in line]
    for name in ("phi.lm_head.weight", "phi.embed_tokens.weight"):
        address = state[name].data_ptr()
        assert any(int(a, 16) <= address < int(b, 16) for a, b in places)


def test_to_load_imports_no_compiler(int8_directory):
    """Some operations on the meta device would, and a start would take twice as long."""
    code = ("import sys; from model import TinyGPTV; load = TinyGPTV.from_pretrained; "
            "load(sys.argv[1]); load(sys.argv[1], int8=True); load(sys.argv[2]); "
            "print({'torch._dynamo', 'sympy'} & set(sys.modules))")
    command = [sys.executable, "-c", code, str(WEIGHTS), str(int8_directory)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.stdout == "set()\n", run.stderr


@needs_unit
def test_packed_or_not_the_answers_are_those_of_the_whole_weights(int8_directory):
    image = load_image(PICTURE)
    asked = [inference_prompt("caption", "", 4), inference_prompt("grounding", "", 4),
             inference_prompt("vqa", "what color is the star?", 4)]  # fmt: skip
    packed = TinyGPTV.from_pretrained(int8_directory)
    assert isinstance(packed.phi.layers[0], Int8Block)
    as_they_lie = TinyGPTV.from_pretrained(int8_directory, pack=False)
    answers = [answer(model, [image] * 3, asked) for model in
               (TinyGPTV.from_pretrained(WEIGHTS), packed, as_they_lie)]  # fmt: skip
    assert answers[0] == answers[1] == answers[2]


@pytest.mark.parametrize("pack", [False, True])
def test_what_phi_gets_to_see_stays_the_same(int8_directory, pack):
    image = load_image(PICTURE)
    right = encode_images(TinyGPTV.from_pretrained(WEIGHTS), [image])
    found = encode_images(TinyGPTV.from_pretrained(int8_directory, pack=pack), [image])
    assert error(found, right) < 0.03


@needs_unit
@torch.inference_mode(False)
@torch.enable_grad()
def test_a_packed_model_has_a_loss_but_no_gradient(int8_directory):
    model = TinyGPTV.from_pretrained(int8_directory, device="cpu:0")
    assert isinstance(model.phi.layers[0], Int8Block)
    ids = torch.arange(2, 12)[None]
    assert not model(ids, ids, torch.ones_like(ids)).requires_grad
    embeds = model.phi.embed(ids).requires_grad_()
    with pytest.raises(RuntimeError, match="no gradient; load the model with pack=False"):
        model.phi(embeds)


def test_the_vits_attention_keeps_its_biases():
    """They are no part of its linear layer, but parameters of their own."""
    attention = Attention(VisionConfig(56, 14, 64, 1, 4, 96))
    for bias in (attention.q_bias, attention.v_bias):
        nn.init.normal_(bias)
    x = torch.randn(1, 17, 64)
    right = attention(x)
    attention.qkv = Int8Linear(attention.qkv)
    assert error(attention(x), right) < 0.02
    attention.v_bias.zero_()
    assert error(attention(x), right) > 0.2


def test_to_quantize_while_loading_is_the_same_as_from_the_file(int8_directory):
    loaded = TinyGPTV.from_pretrained(int8_directory, pack=False).state_dict()
    made = TinyGPTV.from_pretrained(WEIGHTS, int8=True, pack=False).state_dict()
    assert set(loaded) == set(made)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in made.items())
    assert made["qformer.layers.0.mlp.fc1.weight"].dtype == torch.bfloat16
    assert made["phi.embed_tokens.weight"].dtype == torch.float16


def test_the_commands(int8_directory, tmp_path):
    commands = [
        ["quantize.py", "--weights", WEIGHTS, "--stage", "2", "--out", tmp_path / "two"],
        ["generate.py", "--weights", tmp_path / "two", "--img", PICTURE],
        ["generate.py", "--int8", "--img", PICTURE],
    ]
    for command in commands:
        run = subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, capture_output=True,
                             text=True)  # fmt: skip
        assert run.returncode == 0 and run.stdout and run.stderr == "", run.stderr
    assert "a large red solid star" in run.stdout


# ---- what is refused ----
def failure(capsys, *arguments):
    assert quantize.main([str(argument) for argument in arguments]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    return lines[0]


def test_mistakes_are_told_in_one_line(int8_directory, tmp_path, capsys):
    again = failure(capsys, "--weights", int8_directory, "--out", tmp_path / "b")
    assert again.endswith("is quantized already")
    (tmp_path / "a.txt").write_text("mine")
    full = failure(capsys, "--weights", WEIGHTS, "--out", tmp_path)
    assert "is not an empty folder" in full and (tmp_path / "a.txt").read_text() == "mine"
    inside = failure(capsys, "--weights", WEIGHTS, "--out", WEIGHTS / "int8")
    assert "would count as weights of it" in inside and not (WEIGHTS / "int8").exists()
    assert "no weights directory" in failure(
        capsys, "--weights", tmp_path / "no", "--out", tmp_path / "c"
    )


def test_what_was_begun_is_taken_away_after_an_error(tmp_path, capsys):
    with mock.patch("torch.Tensor.numpy", side_effect=OSError("disk full")):  # in mid-file
        told = failure(capsys, "--weights", WEIGHTS, "--out", tmp_path / "a")
    assert "cannot write" in told and "disk full" in told
    assert list((tmp_path / "a").iterdir()) == []
    assert quantize.main(["--weights", str(WEIGHTS), "--out", str(tmp_path / "a")]) == 0


def test_a_missing_file_of_the_source_is_named(tmp_path, capsys):
    source = shutil.copytree(WEIGHTS, tmp_path / "source")
    (source / "phi.safetensors").unlink()
    told = failure(capsys, "--weights", source, "--out", tmp_path / "a")
    assert "phi.safetensors is missing" in told and "cannot write" not in told
    assert list((tmp_path / "a").iterdir()) == []


def test_a_quantized_model_is_not_saved_or_trained(int8_directory, tmp_path):
    with pytest.raises(ValueError, match="use the one that it was made from"):
        save_checkpoint(TinyGPTV.from_pretrained(int8_directory), tmp_path)
    config = TrainConfig(
        stage=4, from_stage=4, weights=str(int8_directory), out=str(tmp_path / "out")
    )
    with pytest.raises(ValueError, match="is quantized; train on what it was made from"):
        train(config)


def test_int8_that_is_none_is_refused(int8_directory, tmp_path):
    """Without a check, numbers above 127 would come round as others."""
    shutil.copytree(int8_directory, tmp_path / "w")
    tensors = load_file(tmp_path / "w" / "model.safetensors")
    tensors["phi.lm_head.weight"] = tensors["phi.lm_head.weight"].int() + 1000
    save_file(tensors, tmp_path / "w" / "model.safetensors")
    with pytest.raises(ValueError, match="lm_head.weight holds torch.int32, the model needs"):
        TinyGPTV.from_pretrained(tmp_path / "w")


def test_a_damaged_file_is_named(int8_directory, tmp_path):
    shutil.copytree(int8_directory, tmp_path / "w")
    file = tmp_path / "w" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-7])
    with pytest.raises(ValueError, match="model.safetensors .* is not a safetensors file"):
        TinyGPTV.from_pretrained(tmp_path / "w")


@torch.inference_mode(False)
@torch.enable_grad()
def test_the_gradient_goes_back_through_int8_weights():
    """As through the matrix that they stand for; x and weights are rounded to bf16 on the way."""
    torch.manual_seed(0)
    linear = quantize.Int8Linear(nn.Linear(64, 48))
    x = torch.randn(5, 7, 64, requires_grad=True)
    target = torch.randn(5, 7, 48)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.dtype) or t, lambda t: t):
        y = linear(x)
    [found] = torch.autograd.grad((y * target).sum(), x)
    expected_y = linear.naive(x)
    [expected] = torch.autograd.grad((expected_y * target).sum(), x)
    assert (y - expected_y).norm() < 0.01 * expected_y.norm()
    assert (found - expected).norm() < 0.01 * expected.norm()
    assert set(kept) == {torch.int8, torch.float32}  # W and its scales, nothing of x
