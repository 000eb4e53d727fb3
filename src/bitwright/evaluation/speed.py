"""How fast the kernels and a whole model run, beside what the memory and torch can do in the same minutes.

Machines are shared and noisy: candidates take turns in shuffled order and medians are reported, and ratios are of
figures measured beside each other. Weights rotate through more memory than any cache, as those of a model do.
"""

from __future__ import annotations

import random
import resource
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from bitwright.errors import BitwrightError
from bitwright.evaluation.shapes import random_tiles
from bitwright.native import native
from bitwright.recipe import outlier_count
from bitwright.runtime import ops
from bitwright.runtime.tiles import Geometry

MEMORY = 256 << 20  # bytes that weights rotate through
HOT_TOKENS = 16  # beyond so many tokens arithmetic is the limit, and two copies do
PEAK_ROUNDS = 20_000  # about a millisecond
SLOW = 1.0  # seconds; a peer that takes longer is run once


@dataclass(frozen=True)
class KernelSpeed:
    """One product, activation quantization included. Times are medians in seconds."""

    rows: int
    columns: int
    tokens: int
    threads: int
    variant: str
    seconds: float
    bytes: int
    read_seconds: float
    peak_gigaflops: float | None
    peers: dict[str, float] = field(default_factory=dict)

    @property
    def gigabytes_per_second(self) -> float:
        return self.bytes / self.seconds / 1e9

    @property
    def gigaflops(self) -> float:
        """What a full-precision product of that size would need: 2 rows x columns x tokens."""
        return 2.0 * self.rows * self.columns * self.tokens / self.seconds / 1e9

    @property
    def of_peak(self) -> float | None:
        """Share of the multiply-adds that the variant does on registers alone, measured in the same run."""
        return self.gigaflops / self.peak_gigaflops if self.peak_gigaflops else None

    @property
    def over_read(self) -> float:
        """Time over that of reading the same bytes."""
        return self.seconds / self.read_seconds

    def to_dict(self) -> dict[str, Any]:
        return {
            **vars(self),
            "gigabytes_per_second": self.gigabytes_per_second,
            "gigaflops": self.gigaflops,
            "over_read": self.over_read,
            "of_peak": self.of_peak,
            "peer_ratios": {name: seconds / self.seconds for name, seconds in self.peers.items()},
        }


def require_native() -> Any:
    module = native()
    if module is None:
        raise BitwrightError("speed is measured on the native kernels, and there are none; see `bitwright doctor`")
    return module


def interleaved(candidates: dict[str, Callable[[int], Any]], seconds: float) -> dict[str, float]:
    """Median seconds of each candidate, called with the number of the round, for about `seconds` altogether."""
    times: dict[str, list[float]] = {name: [] for name in candidates}
    slow: set[str] = set()
    for name, call in candidates.items():  # warm up
        began = time.perf_counter()
        call(0)
        took = time.perf_counter() - began
        if took > SLOW:
            slow.add(name)
            times[name].append(took)
    names = [name for name in candidates if name not in slow]
    until, turn = time.perf_counter() + seconds, 1
    while names and (time.perf_counter() < until or turn <= 3):
        random.shuffle(names)
        for name in names:
            began = time.perf_counter()
            candidates[name](turn)
            times[name].append(time.perf_counter() - began)
        turn += 1
    return {name: statistics.median(values) for name, values in times.items()}


def kernel_speed(rows: int, columns: int, tokens: int, *, peers: bool = True, seconds: float = 1.5) -> KernelSpeed:
    """One site's product on random weights of the default recipe, on torch's number of threads."""
    module = require_native()
    geometry = Geometry(rows, columns, outlier_count(columns, "auto"), 128)
    size = geometry.packed_bytes()
    copies = max(2, -(-MEMORY // size)) if tokens <= HOT_TOKENS else 2
    weights = [random_tiles(geometry) for _ in range(copies)]
    threads = torch.get_num_threads()
    order = torch.randperm(columns).to(torch.int32)
    x = torch.randn(tokens, columns)

    def ours(turn: int) -> Tensor:
        packed = weights[turn % copies]
        y: Tensor = ops.site_linear(x, packed, order, None, rows, geometry.outliers, geometry.group, 1.0)
        return y

    def read(turn: int) -> None:
        # Another copy than the product's, whose end may still be in the cache.
        module.read_memory(weights[(turn + copies // 2) % copies].data_ptr(), size // 8, threads)

    candidates: dict[str, Callable[[int], Any]] = {"ours": ours, "read": read}
    multiplied = module.peak(PEAK_ROUNDS, threads)  # 0 where the variant has none
    if multiplied and tokens > 1:
        candidates["peak"] = lambda _: module.peak(PEAK_ROUNDS, threads)
    if peers:
        candidates.update(_peers(x, rows, columns, tokens))
    found = interleaved(candidates, seconds)
    peak = 2 * multiplied / found["peak"] / 1e9 if "peak" in found else None
    others = {name: found[name] for name in candidates if name not in ("ours", "read", "peak")}
    times = (found["ours"], size, found["read"])
    return KernelSpeed(rows, columns, tokens, threads, module.chosen(), *times, peak, others)


def _peers(x: Tensor, rows: int, columns: int, tokens: int) -> dict[str, Callable[[int], Any]]:
    """torch's bfloat16 product, and its int8 product without any scales."""
    size = 2 * rows * columns
    copies = max(1, -(-MEMORY // size)) if tokens <= HOT_TOKENS else 1
    dense = [torch.empty(rows, columns, dtype=torch.bfloat16).normal_(0, 0.02) for _ in range(copies)]
    narrow = x.to(torch.bfloat16)
    integers = torch.randint(-127, 128, (columns, rows), dtype=torch.int8)
    codes = torch.randint(-127, 128, (tokens, columns), dtype=torch.int8)
    found: dict[str, Callable[[int], Any]] = {
        "torch bf16": lambda turn: torch.nn.functional.linear(narrow, dense[turn % copies])
    }
    if tokens > HOT_TOKENS:  # made for large products
        found["torch int_mm"] = lambda turn: torch._int_mm(codes, integers)
    return found


@dataclass(frozen=True)
class ModelSpeed:
    """A whole model: prompt, first token, decode."""

    name: str
    variant: str
    threads: int
    prompt_tokens: int
    new_tokens: int
    prefill_tokens_per_second: float
    first_token_seconds: float
    decode_tokens_per_second: float
    generate_tokens_per_second: float
    bytes_per_token: int
    read_gigabytes_per_second: float
    resident_bytes: int

    @property
    def decode_gigabytes_per_second(self) -> float:
        return self.bytes_per_token * self.decode_tokens_per_second / 1e9

    @property
    def of_read_rate(self) -> float:
        """Bytes that decode moves a second over the read rate measured between its tokens."""
        return self.decode_gigabytes_per_second / self.read_gigabytes_per_second

    @property
    def generate_over_decode(self) -> float:
        """Time of a token of transformers' generate() over that of a decode step."""
        return self.decode_tokens_per_second / self.generate_tokens_per_second

    def to_dict(self) -> dict[str, Any]:
        return {
            **vars(self),
            "decode_gigabytes_per_second": self.decode_gigabytes_per_second,
            "of_read_rate": self.of_read_rate,
            "generate_over_decode": self.generate_over_decode,
        }


def weight_bytes(model: Any) -> int:
    """Bytes of weights that one token's forward pass reads: all but the embedding, of which it reads a row."""
    from bitwright.runtime import QuantizedHead, quantized_linears

    packed = sum(linear.packed.numel() for _, linear in quantized_linears(model) if linear.packed is not None)
    head = model.get_output_embeddings()
    tensors = head.matrix().tensors().values() if isinstance(head, QuantizedHead) else [head.weight]
    return int(packed + sum(tensor.nbytes for tensor in tensors))


def model_speed(
    model: Any, name: str, prompt_tokens: int = 128, new_tokens: int = 32, on_token: Callable[[int, int], None] = print
) -> ModelSpeed:
    """Prefill of a random prompt, then greedy decode; between tokens the memory's read rate is measured."""
    from bitwright.integrations.transformers import quantized_cache, recipe_of
    from bitwright.recipe import KVRecipe
    from bitwright.runtime import QuantizedKVCache, quantized_linears

    module = require_native()
    threads = torch.get_num_threads()
    recipe = recipe_of(model)
    layers = model.config.num_hidden_layers

    def cache() -> Any:
        return quantized_cache(model, recipe) if recipe else QuantizedKVCache(layers, KVRecipe())

    ids = torch.randint(0, model.config.vocab_size, (1, prompt_tokens))
    packed = [linear.packed for _, linear in quantized_linears(model) if linear.packed is not None]
    with torch.inference_mode():
        model(ids[:, :2], past_key_values=cache(), use_cache=True)  # warm up
        state = cache()
        began = time.perf_counter()
        logits = model(ids, past_key_values=state, use_cache=True, logits_to_keep=1).logits
        prefill = time.perf_counter() - began
        token = logits[:, -1:].argmax(dim=-1)
        first = time.perf_counter() - began
        steps, reads = [], []
        for index in range(new_tokens):
            began = time.perf_counter()
            token = model(token, past_key_values=state, use_cache=True).logits[:, -1:].argmax(dim=-1)
            steps.append(time.perf_counter() - began)
            part = packed[index % len(packed)]
            began = time.perf_counter()
            module.read_memory(part.data_ptr(), part.numel() // 8, threads)
            reads.append(part.numel() / (time.perf_counter() - began) / 1e9)
            on_token(index + 1, 2 * new_tokens)
        generated = _generate_steps(model, ids, cache(), new_tokens, on_token)
    return ModelSpeed(
        name=name,
        variant=module.chosen(),
        threads=threads,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        prefill_tokens_per_second=prompt_tokens / prefill,
        first_token_seconds=first,
        decode_tokens_per_second=1 / statistics.median(steps),
        generate_tokens_per_second=1 / statistics.median(generated),
        bytes_per_token=weight_bytes(model),
        read_gigabytes_per_second=statistics.median(reads),
        resident_bytes=resident_bytes(),
    )


def _generate_steps(
    model: Any, ids: Tensor, cache: Any, tokens: int, on_token: Callable[[int, int], None]
) -> list[float]:
    """Seconds of each new token but the first of a greedy generate() of transformers behind the same prompt."""
    from transformers import StoppingCriteria, StoppingCriteriaList

    ends: list[float] = []

    class Clock(StoppingCriteria):
        def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:  # type: ignore[override]
            ends.append(time.perf_counter())
            on_token(tokens + min(len(ends), tokens), 2 * tokens)
            return torch.zeros(input_ids.shape[0], dtype=torch.bool)

    # A token more than asked for: what is timed lies between two.
    model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        past_key_values=cache,
        max_new_tokens=tokens + 1,
        min_new_tokens=tokens + 1,
        do_sample=False,
        pad_token_id=0,
        stopping_criteria=StoppingCriteriaList([Clock()]),
    )
    return [end - begin for begin, end in pairwise(ends)]


def resident_bytes() -> int:
    """The largest resident memory of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
