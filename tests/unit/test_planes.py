"""The boolean product: every variant of this build against the others, the format and the readable twin."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from bitwright.activations import quantize_groups, quantize_outliers
from bitwright.codebook import CodebookMatrix
from bitwright.recipe import ActivationRecipe
from bitwright.reference import quantized_linear
from bitwright.runtime import native, plane_ops, planes

from .test_ops import needs_native, restore, use
from .test_reference import EXTREMES
from .twins import examples, gaussian, random_matrix

module: Any = native.find()
# The names of the byte kernels' variants; one that this processor lacks falls back to the best that runs.
VARIANTS = [name for name, runs in module.variants() if runs] if module else []
BALANCES = plane_ops.BALANCES


@pytest.fixture(params=[*VARIANTS, native.REFERENCE])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    use(request.param, monkeypatch)
    yield request.param
    restore()


def a_matrix(rows: int, columns: int, outliers: int, group: int, kind: Any = "free", seed: int = 0) -> CodebookMatrix:
    return random_matrix(rows, columns, group, kind, outliers, seed, True)


def call(x: Tensor, matrix: CodebookMatrix, balance: str, clip: float = 1.0, bias: Tensor | None = None) -> Tensor:
    g, packed = planes.geometry_of(matrix), planes.pack(matrix)
    order = None if matrix.permutation is None else matrix.permutation.to(torch.int32)
    return plane_ops.site_planes(x, packed, order, bias, g.rows, g.outliers, g.group, clip, balance)


SITES = [
    # rows, columns, outliers, group
    (64, 256, 32, 128),
    (39, 300, 17, 64),
    (1, 40, 3, 24),
    (80, 600, 8, 256),
    (3, 1300, 0, 1024),
    (100, 1000, 100, 128),
    (7, 9, 8, 8),
    (32, 129, 1, 128),
]


@pytest.mark.parametrize("shape", SITES)
@pytest.mark.parametrize("kind", ["free", "uniform", "shared"])
def test_packing_keeps_every_bit(backend: str, shape: Any, kind: Any) -> None:
    matrix = a_matrix(*shape, kind=kind)
    g, packed = planes.geometry_of(matrix), planes.pack(matrix)
    assert torch.equal(packed, planes.pack_reference(matrix, g, torch.zeros_like(packed)))
    found, expected = planes.unpack(packed, g, kind), matrix.tensors()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("shape", SITES)
@pytest.mark.parametrize("balance", BALANCES)
@pytest.mark.parametrize(("tokens", "clip"), [(1, 1.0), (14, 0.9)])
def test_linear_is_the_readable_twin(backend: str, shape: Any, balance: Any, tokens: int, clip: float) -> None:
    matrix = a_matrix(*shape)
    x, bias = gaussian(tokens, matrix.columns, seed=1) * 3, gaussian(matrix.rows, seed=2)
    expected = quantized_linear(x, matrix, ActivationRecipe(balance=balance, clip=clip), bias)
    found = call(x, matrix, balance, clip, bias)
    assert found.shape == (tokens, matrix.rows)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


def spread_out(x: Tensor, spread: str) -> Tensor:
    return {
        "normal": x,
        "positive": x.abs() + 5,
        "negative": -x.abs() * 0.01 - 3,
        "huge": x * 1e30,
        "tiny": x * 1e-30,
        "equal": torch.full_like(x, 2.5),
        "mixed": x * torch.logspace(-6, 6, len(x)).unsqueeze(1),
    }[spread]


SPREADS = st.sampled_from(["normal", "positive", "negative", "huge", "tiny", "equal", "mixed"])


@needs_native
@given(
    rows=st.integers(1, 140),
    groups=st.integers(1, 4),
    group=st.sampled_from([8, 16, 24, 64, 128, 136, 264]),
    ragged=st.integers(0, 7),
    outliers=st.sampled_from([0, 0, 1, 3, 16, 33]),
    tokens=st.sampled_from([1, 2, 3, 5, 8, 9, 12, 17, 97, 110]),
    kind=st.sampled_from(["free", "uniform", "shared"]),
    balance=st.sampled_from(BALANCES),
    clip=st.sampled_from([1.0, 0.85]),
    spread=SPREADS,
    threads=st.integers(1, 3),
    seed=st.integers(0, 1000),
)
@examples(60)
def test_all_variants_agree_to_the_last_bit(
    rows: int,
    groups: int,
    group: int,
    ragged: int,
    outliers: int,
    tokens: int,
    kind: Any,
    balance: str,
    clip: float,
    spread: str,
    threads: int,
    seed: int,
) -> None:
    normal = max(1, groups * group - ragged)
    matrix = a_matrix(rows, normal + outliers, outliers, group, kind, seed)
    x = spread_out(gaussian(tokens, matrix.columns, seed=seed), spread)
    results = {}
    before = torch.get_num_threads()
    try:
        for name in VARIANTS:
            module.choose(name)
            torch.set_num_threads(threads if name != "scalar" else 1)
            results[name] = call(x, matrix, balance, clip)
            alone = call(x[-1:], matrix, balance, clip)
            assert torch.equal(alone[0], results[name][-1]), "a token's result depends on its neighbours"
    finally:
        torch.set_num_threads(before)
        restore()
    for name, found in results.items():
        assert torch.equal(found, results["scalar"]), name


@needs_native
@given(
    groups=st.integers(1, 3),
    group=st.sampled_from([8, 24, 128, 136]),
    ragged=st.integers(0, 7),
    outliers=st.sampled_from([0, 1, 16]),
    balance=st.sampled_from(BALANCES),
    clip=st.sampled_from([1.0, 0.85]),
    spread=SPREADS,
    seed=st.integers(0, 1000),
)
@examples(40)
def test_quantizer_is_the_one_in_torch(
    groups: int, group: int, ragged: int, outliers: int, balance: Any, clip: float, spread: str, seed: int
) -> None:
    normal, tokens = groups * group - ragged, 4
    x = spread_out(gaussian(tokens, normal + outliers, seed=seed), spread)
    expected = quantize_groups(x[:, :normal], group, ActivationRecipe(balance=balance, clip=clip))
    results = []
    try:
        for name in VARIANTS:
            module.choose(name)
            results.append(run_quantizer(x, outliers, group, balance, clip))
    finally:
        restore()
    for found in results:
        for one, other in zip(found, results[0], strict=True):
            assert torch.equal(one, other)
    words, ones, scales, offset, integers, outlier_step = results[0]
    bits = (words.to(torch.int32).unsqueeze(-1) >> torch.arange(16, dtype=torch.int32)) & 1
    bits = bits.unflatten(-1, (4, 4)).transpose(-1, -2).flatten(-3, -2)  # [groups, tokens, group, planes]
    codes = (bits * torch.tensor([1, 2, 4, 8])).sum(dim=-1)
    assert torch.equal(codes.transpose(0, 1), expected.codes.to(torch.int64))
    assert torch.equal(ones.to(torch.int64).sum(dim=2), bits.sum(dim=2))
    assert torch.equal(offset.T, (-expected.step * expected.zero).squeeze(-1))
    if expected.plane_scales is None:
        assert torch.equal(scales.transpose(0, 1), expected.step * torch.tensor([1.0, 2.0, 4.0, 8.0]))
    else:
        # The sums of rounding errors run in another order there.
        torch.testing.assert_close(scales.transpose(0, 1), expected.plane_scales, rtol=2e-6, atol=0)
    if outliers:
        expected_integers, expected_step = quantize_outliers(x[:, normal:])
        assert torch.equal(integers[:, :outliers].to(torch.float32), expected_integers)
        assert torch.equal(outlier_step, expected_step.squeeze(-1))


def run_quantizer(x: Tensor, outliers: int, group: int, balance: str, clip: float) -> list[Tensor]:
    """words [groups, tokens, group / 4], ones [groups, tokens, parts, 4], scales, offset; outlier integers, steps."""
    tokens, columns = x.shape
    groups = -(-(columns - outliers) // group)
    words = torch.full((groups, tokens, group // 4), -1, dtype=torch.int16)
    ones = torch.full((groups, tokens, -(-group // 128), 4), 255, dtype=torch.uint8)
    scales, offset = torch.empty(groups, tokens, 4), torch.empty(groups, tokens)
    integers = torch.zeros(tokens, -(-outliers // 4) * 4, dtype=torch.int8)
    outlier_step, outlier_shift = torch.zeros(tokens), torch.zeros(tokens, dtype=torch.int32)
    out = [words, ones, scales, offset, integers, outlier_step, outlier_shift]
    number = {"none": 0, "support": 1, "literal": 2}[balance]
    sizes = (tokens, columns, outliers, group)
    module.quantize_planes(x.data_ptr(), *sizes, 0, (1 - clip) / 2, number, *(part.data_ptr() for part in out))
    return out[:-1]


@pytest.mark.parametrize("name", EXTREMES)
@pytest.mark.parametrize("balance", BALANCES)
def test_extreme_inputs(backend: str, name: str, balance: Any) -> None:
    matrix = CodebookMatrix(**{**vars(a_matrix(40, 150, 6, 64)), "permutation": None})
    x = EXTREMES[name](gaussian(4, 150, seed=8))
    expected = quantized_linear(x, matrix, ActivationRecipe(balance=balance))
    found = call(x, matrix, balance).double()
    size = float(x.double().abs().max() * 150 * matrix.dequantize().abs().max()) + 1e-12
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-6 * size)


@needs_native
def test_extreme_levels_are_exact() -> None:
    """Counts, their products and sums at their bounds: nothing saturates, in any variant."""
    codes = torch.randint(0, 4, (64, 512), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    codes[:32] = torch.arange(32, dtype=torch.uint8).unsqueeze(1) // 8  # rows of one code alone
    levels = torch.tensor([-128, 127], dtype=torch.int8)[
        torch.randint(0, 2, (64, 2, 4), generator=torch.Generator().manual_seed(2))
    ]
    matrix = CodebookMatrix(
        64, 512, 2, 256, "free", planes.pack_planes(codes, 2), torch.ones(64, 2, dtype=torch.float16), levels
    )
    x = torch.cat([torch.zeros(1, 512), torch.full((1, 512), 15.0)])
    x[:, ::256] = torch.tensor([[15.0], [0.0]])  # codes 15 in one channel a group, and in all but one
    expected = x.double() @ matrix.dequantize().double().T  # integers below 2**24: fp32 is exact
    try:
        for name in VARIANTS:
            module.choose(name)
            for balance in BALANCES:
                assert torch.equal(call(x, matrix, balance).double(), expected), name
    finally:
        restore()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("channel", [0, 149])
@pytest.mark.parametrize("balance", BALANCES)
def test_what_is_not_finite_stays_visible(backend: str, value: float, channel: int, balance: str) -> None:
    matrix = CodebookMatrix(**{**vars(a_matrix(40, 150, 6, 64)), "permutation": None})
    x = gaussian(3, 150, seed=3)
    x[1, channel] = value
    found = call(x, matrix, balance)
    assert bool(found[1].isnan().all())
    assert bool(found[[0, 2]].isfinite().all())


def test_the_op_passes_opcheck(backend: str) -> None:
    matrix = a_matrix(32, 100, 4, 32)
    packed, order = planes.pack(matrix), matrix.permutation
    assert order is not None
    for tokens, balance in ((1, "support"), (5, "none")):
        arguments = (gaussian(tokens, 100), packed, order.to(torch.int32), gaussian(32), 32, 4, 32, 1.0, balance)
        torch.library.opcheck(plane_ops.site_planes, arguments)


def test_compile_and_export(backend: str) -> None:
    packed = planes.pack(a_matrix(32, 100, 4, 32))

    class Layer(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = plane_ops.site_planes(torch.tanh(x), packed, None, None, 32, 4, 32, 0.9, "literal")
            return y.relu()

    x = gaussian(2, 3, 100)
    expected = Layer()(x)
    assert torch.equal(torch.compile(Layer(), fullgraph=True, backend="aot_eager")(x), expected)
    assert torch.equal(torch.export.export(Layer(), (x,)).module()(x), expected)


def test_what_does_not_fit_is_refused(backend: str) -> None:
    packed, x = planes.pack(a_matrix(20, 100, 4, 32)), gaussian(2, 100)

    def run(x: Tensor, packed: Tensor, order: Any = None, bias: Any = None, group: int = 32, b: str = "none") -> None:
        plane_ops.site_planes(x, packed, order, bias, 20, 4, group, 1.0, b)

    with pytest.raises(ValueError, match="packed weights"):
        run(x, packed[:-1])
    with pytest.raises(ValueError, match="packed weights"):
        run(x[:, :-40], packed)
    with pytest.raises(ValueError, match="64 divides"):
        run(x, torch.cat([packed, packed])[1 : 1 + len(packed)])
    with pytest.raises(ValueError, match="order must be"):
        run(x, packed, order=torch.arange(100))
    with pytest.raises(ValueError, match="bias must be"):
        run(x, packed, bias=gaussian(21))
    with pytest.raises(ValueError, match="float32"):
        run(x.double(), packed)
    with pytest.raises(ValueError, match="balance must be one of support, literal, none; found 'fair'"):
        run(x, packed, b="fair")
    with pytest.raises(ValueError, match="multiple of 8; found 12"):
        run(x, packed, group=12)
    three = random_matrix(4, 100, 32, "free", 4, 0, True, bits=3)
    with pytest.raises(ValueError, match="2-bit"):
        planes.pack(three)


@needs_native
def test_a_variant_of_the_byte_kernels_has_one_here() -> None:
    runs_here = {"avx512", "avx2", "neon", "scalar", "avx512-emulated"}
    try:
        for name in VARIANTS:
            module.choose(name)
            assert module.chosen_planes() in runs_here
        module.choose("scalar")
        assert module.chosen_planes() == "scalar"
    finally:
        restore()
