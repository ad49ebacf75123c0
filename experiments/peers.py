"""llama.cpp with a model of Phi-2's shape in Q8_0, its 8-bit format, for experiments/speed.py.

Its file is written here with random weights. Q8_0 keeps 32 weights as int8 with one fp16 scale. The
block is Phi-2's own, without TinyGPT-V's norms: a little less work than ours.
"""

import importlib.util
import multiprocessing
import statistics
import struct
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np

from model import PhiConfig

MAGIC, VERSION, ALIGNMENT = b"GGUF", 3, 32
UINT32, FLOAT32, STRING = 4, 6, 8  # types of metadata
F32, Q8_0 = 0, 8  # types of tensors
BLOCK = np.dtype([("scale", "<f2"), ("weights", "i1", 32)])


def tensor_shapes(config: PhiConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of llama.cpp's phi2: matrices (out, in), vectors."""
    hidden, inner = config.hidden_size, config.intermediate_size
    layers = {"attn_qkv": (3 * hidden, hidden), "attn_output": (hidden, hidden),
              "ffn_up": (inner, hidden), "ffn_down": (hidden, inner)}  # fmt: skip
    yield "token_embd.weight", (config.vocab_size, hidden)
    for n in range(config.num_layers):
        for part in ("weight", "bias"):
            yield f"blk.{n}.attn_norm.{part}", (hidden,)
        for name, shape in layers.items():
            yield f"blk.{n}.{name}.weight", shape
            yield f"blk.{n}.{name}.bias", shape[:1]
    for part in ("weight", "bias"):
        yield f"output_norm.{part}", (hidden,)
    yield "output.weight", (config.vocab_size, hidden)
    yield "output.bias", (config.vocab_size,)


def metadata(config: PhiConfig) -> dict[str, int | float | str]:
    """What llama.cpp has to know of the model beside its tensors."""
    return {
        "general.architecture": "phi2", "general.alignment": ALIGNMENT,
        "phi2.context_length": config.max_position_embeddings,
        "phi2.embedding_length": config.hidden_size,
        "phi2.feed_forward_length": config.intermediate_size,
        "phi2.block_count": config.num_layers,
        "phi2.attention.head_count": config.num_heads,
        "phi2.attention.head_count_kv": config.num_heads,
        "phi2.attention.layer_norm_epsilon": config.layer_norm_eps,
        "phi2.rope.dimension_count": config.rotary_dim,
        "phi2.vocab_size": config.vocab_size,
        "tokenizer.ggml.model": "no_vocab",
    }  # fmt: skip


def text(value: str) -> bytes:
    """A string in GGUF: its length, its bytes."""
    return struct.pack("<Q", len(value)) + value.encode()


def field(value: int | float | str) -> bytes:
    """A value of the metadata in GGUF: its type, itself."""
    if isinstance(value, str):
        return struct.pack("<I", STRING) + text(value)
    kind, code = (UINT32, "I") if isinstance(value, int) else (FLOAT32, "f")
    return struct.pack(f"<I{code}", kind, value)


def random_tensor(shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """A vector of ones in fp32, or a matrix as random blocks of Q8_0."""
    if len(shape) == 1:
        return np.ones(shape, "<f4")
    blocks = np.empty(shape[0] * shape[1] // 32, BLOCK)
    blocks["scale"] = 0.02 / 73  # of uniform int8, this makes a standard deviation of 0.02
    blocks["weights"] = rng.integers(-127, 128, (len(blocks), 32), "i1")
    return blocks


def write_gguf(path: Path, config: PhiConfig) -> None:
    """A GGUF file: magic, counts, metadata, table of tensors, tensors."""
    fields, shapes = metadata(config), dict(tensor_shapes(config))
    table, offset = b"", 0
    for name, shape in shapes.items():
        kind, numbers = (Q8_0, np.prod(shape)) if len(shape) == 2 else (F32, shape[0])
        dims = struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
        table += text(name) + dims + struct.pack("<IQ", kind, offset)
        size = numbers // 32 * BLOCK.itemsize if kind == Q8_0 else 4 * numbers
        offset += -(-int(size) // ALIGNMENT) * ALIGNMENT
    rng = np.random.default_rng(0)
    with open(path, "wb") as file:
        file.write(MAGIC + struct.pack("<IQQ", VERSION, len(shapes), len(fields)))
        for key, value in fields.items():
            file.write(text(key) + field(value))
        file.write(table)
        for shape in shapes.values():
            file.write(b"\0" * (-file.tell() % ALIGNMENT))
            file.write(random_tensor(shape, rng).tobytes())
        file.write(b"\0" * (-file.tell() % ALIGNMENT))


def serve(path: Path, threads: int, connection: Connection) -> None:
    """Loads the file, and answers each (prompt, new_tokens) with seconds: of the prompt, and of a
    token after it; until None comes."""
    from llama_cpp import Llama

    llama = Llama(str(path), n_ctx=256, n_threads=threads, n_threads_batch=threads, verbose=False)
    for prompt, new_tokens in iter(connection.recv, None):
        llama.reset()
        ticks = [time.perf_counter()]
        for tokens in [list(range(1, prompt + 1))] + [[5]] * new_tokens:
            llama.eval(tokens)
            ticks.append(time.perf_counter())
        steps = [after - before for before, after in zip(ticks[1:], ticks[2:])]
        connection.send({"prefill": ticks[1] - ticks[0], "token": statistics.median(steps)})


class LlamaCpp:
    """The peer, with a file of `write_gguf`, in a process of its own: AMX has a setting for each
    thread, and there torch and llama.cpp would change each other's."""

    @staticmethod
    def is_installed() -> bool:
        """Whether llama-cpp-python is there."""
        return importlib.util.find_spec("llama_cpp") is not None

    def __init__(self, path: Path, threads: int):
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        context.Process(target=serve, args=(path, threads, theirs), daemon=True).start()
        theirs.close()

    def generation(self, prompt: int, new_tokens: int) -> dict[str, float]:
        """Seconds of a prompt of so many tokens, and of each token after it. Raises ValueError if
        llama.cpp has failed."""
        try:
            self.connection.send((prompt, new_tokens))
            return self.connection.recv()
        except (EOFError, OSError):
            raise ValueError("llama.cpp has failed; leave peer= out, or build it anew") from None

    def close(self) -> None:
        """Ends its process."""
        self.connection.send(None)
