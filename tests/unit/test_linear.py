from __future__ import annotations

import copy
import shutil
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bitwright.artifact.layout import LayerSpec, layer_shapes
from bitwright.codebook import CodebookMatrix
from bitwright.recipe import ActivationRecipe
from bitwright.reference import quantized_linear
from bitwright.runtime import QuantizedLinear, dense_weights, quantized_linears

from .backends import needs_native
from .test_reference import EXTREMES
from .twins import gaussian, random_matrix

NAME = "model.layers.0.mlp.down_proj"


def module_of(
    matrix: CodebookMatrix, activations: ActivationRecipe | None = None, bias: Tensor | None = None
) -> QuantizedLinear:
    spec = LayerSpec(
        rows=matrix.rows,
        columns=matrix.columns,
        bits=matrix.bits,
        group=matrix.group,
        kind=matrix.kind,
        outliers=matrix.outlier_columns,
        bias=bias is not None,
        permutation=None if matrix.permutation is None else NAME,
    )
    return QuantizedLinear.from_matrix(NAME, spec, activations, matrix, bias)


def size(x: Tensor, matrix: CodebookMatrix) -> float:
    """What an output could amount to without any cancellation."""
    return float((x.double().abs().amax(dim=1) * matrix.columns).max() * matrix.dequantize().abs().max()) + 1e-12


CASES = [
    # rows, columns, group, kind, outliers, permuted
    (6, 40, 16, "free", 8, True),
    (6, 41, 16, "uniform", 5, True),
    (3, 32, 8, "free", 0, False),
    (1, 9, 8, "uniform", 8, False),
    (6, 41, 16, "shared", 5, True),
    (33, 40, 16, "shared", 0, False),
    (5, 30, 64, "free", 1, True),
]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("balance", ["support", "literal", "none"])
@pytest.mark.parametrize("bias", [True, False])
def test_forward_is_the_reference(case: Any, balance: Any, bias: bool) -> None:
    rows, columns, group, kind, outliers, permuted = case
    matrix = random_matrix(rows, columns, group, kind, outliers, 1, permuted)
    recipe = ActivationRecipe(balance=balance)
    offset = gaussian(rows, seed=2) if bias else None
    x = gaussian(5, columns, seed=3)
    y = module_of(matrix, recipe, offset)(x)
    assert y.dtype == torch.float32
    expected = quantized_linear(x, matrix, recipe, offset)
    assert (y.double() - expected).abs().max() <= 1e-5 * size(x, matrix) / columns**0.5


@pytest.mark.parametrize("name", EXTREMES)
@pytest.mark.parametrize("balance", ["support", "none"])
def test_extreme_activations(name: str, balance: Any) -> None:
    matrix = random_matrix(4, 29, 8, "free", 4, 7, True)
    recipe = ActivationRecipe(balance=balance)
    x = EXTREMES[name](gaussian(3, 29, seed=8))
    y = module_of(matrix, recipe)(x)
    assert y.isfinite().all()
    assert (y.double() - quantized_linear(x, matrix, recipe)).abs().max() <= 1e-5 * size(x, matrix)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_are_rounded_once(dtype: torch.dtype) -> None:
    """Computed in float32 from the rounded input, rounded at the end."""
    matrix = random_matrix(6, 40, 16, "free", 8, 1, True)
    recipe = ActivationRecipe()
    module = module_of(matrix, recipe, gaussian(6, seed=2))
    x = (gaussian(5, 40, seed=3) / 40).to(dtype)
    y = module(x)
    assert y.dtype == dtype
    assert torch.equal(y, module(x.float()).to(dtype))
    expected = quantized_linear(x, matrix, recipe, gaussian(6, seed=2))
    assert torch.allclose(y.double(), expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-3)


@pytest.mark.parametrize("shape", [(40,), (1, 40), (2, 3, 40), (2, 1, 2, 40), (0, 40), (2, 0, 40)])
def test_any_leading_shape(shape: tuple[int, ...]) -> None:
    matrix = random_matrix(6, 40, 16, "free", 8, 1, True)
    module = module_of(matrix, ActivationRecipe())
    x = torch.randn(shape, generator=torch.Generator().manual_seed(4))
    y = module(x)
    assert y.shape == (*shape[:-1], 6)
    assert torch.allclose(y.reshape(-1, 6), module(x.reshape(-1, 40)), atol=1e-4)


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("kind", ["free", "uniform", "shared", "salient"])
def test_sixteen_bit_activations_are_a_plain_linear(bits: int, kind: Any) -> None:
    matrix = random_matrix(6, 41, 16, kind, 5, 1, True, bits)
    x, bias = gaussian(5, 41, seed=3), gaussian(6, seed=2)
    expected = x.double() @ matrix.dequantize().double().T + bias.double()
    assert torch.allclose(module_of(matrix, None, bias)(x).double(), expected, rtol=1e-5, atol=1e-6 * size(x, matrix))


@pytest.mark.parametrize("case", CASES)
def test_buffers_are_what_the_format_names(case: Any) -> None:
    rows, columns, group, kind, outliers, permuted = case
    matrix = random_matrix(rows, columns, group, kind, outliers, 1, permuted)
    module = module_of(matrix, ActivationRecipe(), gaussian(rows))
    stored = {f"{NAME}.{part}": (tensor.dtype, tuple(tensor.shape)) for part, tensor in module.state_dict().items()}
    assert stored == layer_shapes(NAME, module.spec, torch.float32)
    again = module.matrix()
    assert torch.equal(again.dequantize(), matrix.dequantize())
    assert again.stored_bits() == matrix.stored_bits()
    assert all(again.tensors()[part] is getattr(module, part) for part in again.tensors())
    assert not list(module.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.float16])
def test_casts_reach_sentinel_and_bias_alone(dtype: torch.dtype) -> None:
    matrix = random_matrix(6, 40, 16, "free", 8, 1, True)
    module = module_of(matrix, None, gaussian(6))
    before = {name: tensor.clone() for name, tensor in module.named_buffers()}
    container = nn.Sequential(module).to(dtype)
    assert container[0] is module
    for name, tensor in module.named_buffers():
        if name in ("weight", "bias"):
            assert tensor.dtype == dtype
        else:
            assert tensor.dtype == before[name].dtype
            assert torch.equal(tensor, before[name])
    assert module.weight.numel() == 0
    x = gaussian(2, 40)
    assert module(x.to(dtype)).dtype == dtype


def test_followers_share_the_leaders_permutation() -> None:
    matrix = random_matrix(6, 40, 16, "free", 8, 1, True)
    leader = module_of(matrix, ActivationRecipe())
    other = random_matrix(3, 40, 16, "free", 8, 2, False)
    spec = LayerSpec(3, 40, 2, 16, "free", 8, False, NAME)
    follower = QuantizedLinear.from_matrix("follower", spec, ActivationRecipe(), other, None)
    assert "permutation" not in follower.state_dict()
    follower.share_permutation(leader)
    assert follower.order is not None
    assert torch.equal(follower.order, matrix.permutation)
    expected = quantized_linear(gaussian(2, 40), follower.matrix(), ActivationRecipe())
    assert torch.allclose(follower(gaussian(2, 40)).double(), expected, atol=1e-5 * size(gaussian(2, 40), other))
    # The leader is no child: it is neither stored twice nor moved twice. Copied together they stay together.
    assert [name for name, _ in follower.named_modules()] == [""]
    pair = copy.deepcopy(nn.ModuleList([leader, follower]))
    pair[0].permutation.fill_(0)
    assert not pair[1].order.any()
    assert leader.order.any()


def test_dense_weights_change_speed_alone() -> None:
    matrix = random_matrix(6, 40, 16, "free", 8, 1, True)
    model = nn.Sequential(module_of(matrix, ActivationRecipe()), nn.ReLU())
    assert [(name, child) for name, child in quantized_linears(model)] == [("0", model[0])]
    x = gaussian(3, 40)
    before = model(x)
    with dense_weights(model):
        assert model[0]._dense is not None
        assert torch.equal(model(x), before)
    assert model[0]._dense is None

    def interrupted() -> None:
        with dense_weights(model):
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        interrupted()
    assert model[0]._dense is None


def test_repr_says_what_it_is() -> None:
    module = module_of(random_matrix(6, 40, 16, "free", 8, 1, True))
    assert "40 -> 6, 2-bit free codes in groups of 16, 8 int8 outlier channels, bias=False" in repr(module)
    assert (module.in_features, module.out_features) == (40, 6)


@pytest.mark.parametrize(("balance", "op"), [("none", "site_linear"), ("support", "site_planes")])
@pytest.mark.parametrize("bias", [True, False])
def test_compile_and_export(backend: str, balance: Any, op: str, bias: bool) -> None:
    """As a whole, and where it is packed, as one op; for any number of tokens."""
    matrix = random_matrix(6, 40, 16, "free", 8, 1, True)
    module = module_of(matrix, ActivationRecipe(balance=balance), gaussian(6) if bias else None)
    if module.packable:  # on every backend but the reference
        module.pack()
    x = gaussian(5, 40).bfloat16()
    expected = module(x)
    torch.compiler.reset()
    assert torch.equal(torch.compile(module, fullgraph=True, backend="aot_eager")(x), expected)
    tokens = torch.export.Dim("tokens", min=2, max=1000)
    exported = torch.export.export(module, (x,), dynamic_shapes={"x": {0: tokens}})
    assert torch.equal(exported.module()(x[:3]), module(x[:3]))
    called = {str(node.target) for node in exported.graph.nodes}
    assert (f"bitwright.{op}.default" in called) == (backend != "reference")


@needs_native
@pytest.mark.skipif(shutil.which("c++") is None, reason="inductor needs a C++ compiler")
def test_inductor() -> None:
    module = module_of(random_matrix(6, 40, 16, "free", 8, 1, True), ActivationRecipe(balance="none"), gaussian(6))
    module.pack()
    x = gaussian(5, 40)
    torch.compiler.reset()
    compiled = torch.compile(lambda x: module(torch.relu(x) + 1) * 2, fullgraph=True)
    torch.testing.assert_close(compiled(x), module(torch.relu(x) + 1) * 2)
