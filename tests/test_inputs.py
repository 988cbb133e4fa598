"""What `summarize` returns for each kind of tensor and source, and which errors it raises."""

from __future__ import annotations

import gc
import math
import re
import sys
import types
import warnings
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch

import paramstats
from paramstats._summary import record_of
from tests import oracle
from tests.conftest import run_with_small_stack

summarize = paramstats.summarize


def stats_of(tensor: torch.Tensor) -> paramstats.ParamStats:
    return summarize({"x": tensor})["x"]


@pytest.fixture(autouse=True)
def _no_warnings(new_warnings):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message="Sparse (CSR|CSC|BSR|BSC)")
        warnings.filterwarnings("ignore", message="The PyTorch API of nested tensors")
        warnings.filterwarnings("ignore", message=".*quantize_per_tensor|torch.ao|`torch.jit")
        yield


# ---- strides ---------------------------------------------------------------------------------


STRIDED = {
    "transposed": lambda x: x.t(),
    "permuted": lambda x: x.view(20, 15, 100).permute(2, 0, 1),
    "channels_last": lambda x: x.view(10, 3, 20, 50).to(memory_format=torch.channels_last),
    "channels_last_3d": lambda x: x.view(5, 3, 4, 10, 50).to(memory_format=torch.channels_last_3d),
    "every second row": lambda x: x[::2],
    "every third column": lambda x: x[:, ::3],
    "a window": lambda x: x[3:200, 5:60],
    "an odd start": lambda x: x.flatten()[1:],
    "size 1 dimensions": lambda x: x[:, :1].unsqueeze(0),
    "expanded": lambda x: x[:, :1].expand(-1, 50),
    "expanded twice": lambda x: x[:1, :1].expand(40, 50),
    "a scalar": lambda x: x[4, 4],
    "overlapping": lambda x: x.flatten().unfold(0, 10, 3),
    "a diagonal": lambda x: x[:100, :100].diagonal(),
    "flipped": lambda x: x.flip(0),
}


@pytest.mark.parametrize("name", STRIDED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64], ids=str)
def test_all_elements_of_strided_tensors_are_read(backend, name, dtype):
    torch.manual_seed(0)
    x = STRIDED[name]((10 * torch.randn(300, 100)).to(dtype))
    oracle.check(stats_of(x), x)


def test_all_elements_of_a_large_tensor_with_gaps_are_read(backend):
    torch.manual_seed(0)
    x = torch.randn(1500, 500)[:, ::2]
    oracle.check(stats_of(x), x)


# ---- sizes -----------------------------------------------------------------------------------


def test_an_empty_tensor_has_norm_0_and_no_mean(backend):
    for shape in [(0,), (0, 5), (3, 0, 2)]:
        stats = stats_of(torch.empty(shape))
        assert (stats.count, stats.norm, stats.shape) == (0, 0.0, shape)
        for name in ("mean", "std", "rms", "min", "max", "abs_max", "zero_fraction"):
            assert math.isnan(getattr(stats, name)), name


def test_one_element_has_no_std(backend):
    stats = stats_of(torch.tensor([2.5]))
    assert math.isnan(stats.std) and (stats.mean, stats.norm, stats.min) == (2.5, 2.5, 2.5)
    assert summarize({"x": torch.tensor([2.5])}, correction=0)["x"].std == 0


# ---- gradients -------------------------------------------------------------------------------


def test_a_missing_gradient_differs_from_a_zero_gradient(backend):
    layer = torch.nn.Linear(3, 2)
    assert summarize(layer)["weight"].grad is None
    layer.weight.grad = torch.zeros_like(layer.weight)
    summary = summarize(layer)
    assert summary["weight"].grad.zero_fraction == 1.0
    assert summary["bias"].grad is None
    assert summary.total.grad.count == 6
    layer.weight.grad = None
    assert summarize(layer).total.grad is None


@pytest.mark.parametrize("coalesced", [True, False])
def test_a_sparse_gradient_is_read_as_dense(backend, coalesced):
    embedding = torch.nn.Embedding(1000, 16, sparse=True)
    embedding(torch.tensor([3, 7, 3, 900])).square().sum().backward()
    grad = embedding.weight.grad
    assert not grad.is_coalesced()
    if coalesced:
        embedding.weight.grad = grad.coalesce()
    stats = summarize(embedding)["weight"].grad
    oracle.check(stats, grad)
    assert stats.zero_count == 997 * 16


@pytest.mark.parametrize("layout", ["csr", "csc", "bsr", "coo"])
def test_sparse_tensors_are_read_as_dense(backend, layout):
    x = torch.zeros(40, 60)
    x[3, 5], x[30, 7], x[39, 59] = 2.0, -3.0, 7.0
    sparse = x.to_sparse(
        layout=getattr(torch, f"sparse_{layout}"), blocksize=(2, 2) if layout == "bsr" else None
    )
    oracle.check(stats_of(sparse), x)


def test_gradients_of_non_leaf_tensors_need_retain_grad(backend):
    leaf = torch.ones(3, requires_grad=True)
    inner = leaf * 2
    assert stats_of(inner).grad is None  # torch would warn at inner.grad
    kept = leaf * 2
    kept.retain_grad()
    kept.sum().backward()
    assert stats_of(kept).grad.mean == 1.0
    inner.grad = torch.ones(3)
    assert stats_of(inner).grad is None  # torch does not count it as retained


def test_grad_scale_divides_statistics_of_gradients_only(backend, model):
    plain = summarize(model)
    for p in model.parameters():
        p.grad *= 1024
    scaled = summarize(model, grad_scale=1024.0)
    for name in plain:
        for stat in ("mean", "std", "norm", "min", "max"):
            assert getattr(scaled[name].grad, stat) == pytest.approx(
                getattr(plain[name].grad, stat), rel=1e-6, abs=1e-12
            )
            assert getattr(scaled[name], stat) == getattr(plain[name], stat)
    assert scaled.total.grad.norm == pytest.approx(plain.total.grad.norm, rel=1e-6)
    key = "grad_norm/0.weight"
    assert scaled.scalars()[key] == pytest.approx(plain.scalars()[key], rel=1e-6)


# ---- tied, lazy, complex and other special tensors --------------------------------------------


def test_tied_parameters_count_once_and_have_all_their_names(backend):
    class Tied(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = torch.nn.Embedding(10, 4)
            self.head = torch.nn.Linear(4, 10, bias=False)
            self.head.weight = self.embed.weight
            self.block = torch.nn.Linear(4, 4)
            self.again = self.block

    tied = Tied()
    summary = summarize(tied)
    assert list(summary) == [name for name, _ in tied.named_parameters()]
    assert summary["embed.weight"].aliases == ("head.weight",)
    assert summary["block.bias"].aliases == ("again.bias",)
    assert summary["head.weight"].name == "embed.weight" and "again.weight" in summary
    assert summary.total.count == 40 + 16 + 4
    as_mapping = summarize(tied.state_dict())
    assert as_mapping["embed.weight"].aliases == ("head.weight",)
    assert as_mapping.total.count == 60


def test_lazy_parameters_are_listed_and_read_after_the_first_batch(backend):
    layer = torch.nn.Sequential(torch.nn.LazyLinear(4), torch.nn.Linear(4, 2))
    before = summarize(layer)
    assert (before["0.weight"].shape, before["0.weight"].count) == (None, 0)
    assert math.isnan(before["0.weight"].mean) and math.isnan(before["0.weight"].norm)
    assert "lazy" in str(before) and before.total.count == 10
    layer(torch.randn(3, 7))
    after = summarize(layer)
    assert after["0.weight"].shape == (4, 7)
    oracle.check(after["0.weight"], layer[0].weight)


def test_meta_tensors_are_listed_with_nan(backend):
    with torch.device("meta"):
        layer = torch.nn.Linear(5, 3)
    summary = summarize(layer)
    assert (summary["weight"].count, summary["weight"].shape) == (15, (3, 5))
    assert math.isnan(summary["weight"].norm) and math.isnan(summary["weight"].zero_fraction)
    assert summary.total.count == 18 and math.isnan(summary.total.norm)
    assert summary.scalars() == {}
    assert str(summary) and summary.to_dict()


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128], ids=str)
def test_complex_tensors_have_the_statistics_of_their_moduli(backend, dtype):
    torch.manual_seed(0)
    x = torch.randn(500, dtype=dtype) + 3
    x[:4] = 0
    stats = stats_of(x)
    assert stats.count == 500 and stats.zero_count == 4
    assert stats.mean == pytest.approx(x.mean().abs().item(), rel=1e-6)
    assert stats.std == pytest.approx(x.std().item(), rel=1e-5)
    assert stats.norm == pytest.approx(x.norm().item(), rel=1e-5)
    assert stats.abs_max == stats.max == pytest.approx(x.abs().max().item(), rel=1e-6)
    x[7] = complex(math.nan, 0)
    x[8] = complex(0, -math.inf)
    stats = stats_of(x)
    assert (stats.nan_count, stats.pos_inf_count, stats.finite.count) == (1, 1, 498)


def test_lazily_conjugated_and_negated_tensors_are_read(backend):
    x = torch.randn(50, dtype=torch.complex64)
    oracle.check(stats_of(x.conj().imag), x.conj().imag.resolve_neg())
    assert stats_of(x.conj()).norm == pytest.approx(x.norm().item(), rel=1e-6)


def test_quantized_tensors_are_read_dequantized(backend):
    x = torch.quantize_per_tensor(torch.randn(100), 0.1, 10, torch.quint8)
    oracle.check(stats_of(x), x)


def test_a_subclass_with_its_own_storage_is_read(backend):
    class Named(torch.Tensor):
        pass

    x = torch.randn(100).as_subclass(Named)
    oracle.check(stats_of(x), x.as_subclass(torch.Tensor))


class Wrapper(torch.Tensor):
    """A subclass that keeps its elements in another tensor, as quantized weights do."""

    is_readable = True

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    def __init__(self, inner):
        self.inner = inner

    def __tensor_flatten__(self):
        return ["inner"], None

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return cls(args[0].inner)
        if func is torch.ops.aten._to_copy.default and cls.is_readable:
            return func(args[0].inner, **(kwargs or {}))
        raise NotImplementedError(f"no {func}")


class Opaque(Wrapper):
    is_readable = False


class WarnsOften(Opaque):
    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        warnings.warn(f"no {func}", UserWarning, stacklevel=1)
        return super().__torch_dispatch__(func, types, args, kwargs)


def test_a_wrapper_subclass_is_read_through_its_own_operators(backend):
    inner = torch.randn(100)
    oracle.check(stats_of(Wrapper(inner)), inner)


def freed(size: int) -> torch.Tensor:
    x = torch.ones(size)
    x.untyped_storage().resize_(size)  # bytes
    return x


def beyond_storage(sizes, strides, offset) -> torch.Tensor:
    """Return a view beyond its storage; code that torch compiles makes views without a check."""
    return torch._C._dynamo.guards._reinterpret_tensor(torch.ones(10), sizes, strides, offset)


def nested(layout: torch.layout) -> torch.Tensor:
    return torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(3, 3)], layout=layout)


BEYOND = "holds 40 bytes, not all elements"
CODES = torch.arange(8, dtype=torch.uint8)
UNREADABLE = {
    "subclass": (lambda: Opaque(torch.ones(10)), "Opaque has no operator"),
    "subclass that warns": (lambda: WarnsOften(torch.ones(3)), "WarnsOften has no operator"),
    "freed storage": (lambda: freed(1000), "holds 1000 bytes"),
    "strides overflow": (lambda: beyond_storage((2, 2), (1 << 62, 1 << 62), 0), BEYOND),
    "offset overflows": (lambda: beyond_storage((2,), (1 << 62,), 1 << 62), BEYOND),
    "negative offset": (lambda: beyond_storage((3,), (1,), -5_000_000), BEYOND),
    "bytes overflow": (lambda: beyond_storage((2, 3), (1 << 61, 1), 1 << 61), BEYOND),
    "large stride": (lambda: beyond_storage((3,), (1 << 40,), 0), BEYOND),
    "uint4": (lambda: CODES.view(torch.uint4), "no conversion of torch.uint4 .*view.torch.uint8"),
    "bits8": (lambda: CODES.view(torch.bits8), "no conversion of torch.bits8 .*view.torch.uint8"),
    "float4": (lambda: CODES.view(torch.float4_e2m1fn_x2), "no conversion of .*view.torch.uint8"),
    "nested": (lambda: nested(torch.strided), "pass their parts"),
    "jagged": (lambda: nested(torch.jagged), "pass their parts"),
}


@pytest.mark.parametrize("kind", UNREADABLE)
def test_unreadable_tensors_are_skipped_with_a_reason(backend, kind):
    make, reason = UNREADABLE[kind]
    x = make()
    with pytest.warns(RuntimeWarning, match=f"'x' .*{reason}") as caught:
        summary, again = summarize({"x": x, "y": torch.ones(4)}), summarize({"x": x})
    assert len([w for w in caught if issubclass(w.category, RuntimeWarning)]) == 1, "warned twice"
    assert again.skipped == summary.skipped
    assert math.isnan(summary["x"].mean) and math.isnan(summary["x"].norm)
    assert summary["y"].norm == 2.0 and summary.total.count == 4
    assert re.search(reason, summary.skipped["x"])
    if not x.is_nested:
        assert summary["x"].count == x.numel()
    module = torch.nn.Linear(2, 2)
    module.register_buffer("x", x)
    assert "x" in summarize(module, buffers=True).skipped


# ---- sources ---------------------------------------------------------------------------------


def test_mappings_and_pairs_give_what_the_module_gives(backend, model):
    expected = summarize(model)
    for source in (
        dict(model.named_parameters()),
        model.named_parameters(),
        list(model.named_parameters()),
    ):
        summary = summarize(source)
        assert list(summary) == list(expected)
        assert summary["0.weight"].to_dict() == expected["0.weight"].to_dict()
    assert summarize(model.state_dict())["0.weight"].grad is None


def test_an_empty_source_gives_an_empty_summary(backend):
    for source in ({}, [], torch.nn.ReLU()):
        summary = summarize(source)
        assert len(summary) == 0 and summary.total.count == 0 and summary.total.grad is None
        assert str(summary) and summary.scalars()["param_norm/total"] == 0


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            {"model": {"w": torch.ones(1)}},
            "got dict for 'model'; to summarize the tensors in it, pass source",
        ),
        (None, "expected an nn.Module, a mapping .* got NoneType"),
        (3, "got int"),
        ("run.safetensors", "got str; .* paramstats.checkpoints.summarize_file"),
        (Path("run.pt"), "got pathlib.*; .* paramstats.checkpoints.summarize_file"),
        (torch.optim.SGD([torch.ones(1)]), "SGD; pass the model, and this as optimizer="),
        (types.SimpleNamespace(model=torch.nn.ReLU()), "SimpleNamespace; pass its model: source"),
        (torch.ones(3), "got torch.Tensor; for one tensor pass {'name': tensor}"),
        ([torch.ones(3)], r"expected \(name, tensor\) pairs, got torch.Tensor at position 0"),
        ({"w": 3.0}, "expected a torch.Tensor, got float for 'w'"),
        ({"w": torch.ones(1), "v": None}, "got NoneType for 'v'"),
        ({"w": torch.fx.Proxy(torch.fx.Graph().placeholder("w"))}, "Proxy for 'w'; leave it out"),
        ({1: torch.ones(1)}, "expected names to be str, got int for 1"),
        ({"w": np.ones(1)}, "got numpy.ndarray for 'w'; convert it with torch.from_numpy"),
    ],
)
def test_bad_sources_are_type_errors(backend, source, message):
    with pytest.raises(TypeError, match=f"^paramstats.summarize: .*{message}"):
        summarize(source)


def test_a_name_given_twice_is_an_error(backend):
    with pytest.raises(ValueError, match="every name once, got 'w' twice"):
        summarize([("w", torch.ones(1)), ("w", torch.ones(2))])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"grad_scale": 0.0}, ValueError, "number > 0 for grad_scale, got 0.0"),
        ({"grad_scale": 1e-310}, ValueError, "number > 0 for grad_scale, got 1e-310"),
        ({"include": 3}, TypeError, "regular expression or several for include, got int"),
        ({"exclude": "("}, re.error, "regular expressions for exclude"),
        ({"local": True, "async_op": True}, ValueError, "local=True without async_op=True, got b"),
        ({"local": True, "group": object()}, ValueError, "local=True without group=, got both"),
    ],
)
def test_bad_arguments_are_refused(backend, model, arguments, error, message):
    with pytest.raises(error, match=f"^paramstats.summarize: .*{message}"):
        summarize(model, **arguments)


@pytest.mark.parametrize(
    "value", [None, math.nan, math.inf, 10**400, torch.ones(2), "1", 1j, object()]
)
@pytest.mark.parametrize("argument", ["correction", "grad_scale"])
def test_only_finite_numbers_are_numbers(backend, argument, value):
    with pytest.raises(ValueError, match=f"finite number.* for {argument}, got"):
        summarize({"x": torch.ones(2)}, **{argument: value})


def test_params_and_grads_can_be_left_out(backend, model):
    only_grads = summarize(model, params=False)
    assert math.isnan(only_grads["0.weight"].mean) and only_grads["0.weight"].count == 48
    assert only_grads["0.weight"].grad.norm == summarize(model)["0.weight"].grad.norm
    assert summarize(model, grads=False)["0.weight"].grad is None


def test_include_and_exclude_select_names(backend, model):
    assert list(summarize(model, include="weight")) == ["0.weight", "2.weight"]
    assert list(summarize(model, include=["^0", r"^2\.b"])) == ["0.weight", "0.bias", "2.bias"]
    assert list(summarize(model, exclude="bias", include="^2")) == ["2.weight"]
    assert list(summarize(dict(model.named_parameters()), exclude="weight")) == ["0.bias", "2.bias"]
    only = summarize(model, include="^2.weight")
    assert only.total.count == 18 and only["2.weight"].grad.norm > 0
    assert summarize({"a": torch.ones(1), "b": "no tensor"}, exclude="b")["a"].count == 1
    with pytest.warns(RuntimeWarning, match="no name matches include='nothing'"):
        assert list(summarize(model, include="nothing")) == []


def test_tied_tensors_are_selected_by_any_of_their_names(backend):
    model = torch.nn.ModuleDict({"embed": torch.nn.Linear(3, 2), "head": torch.nn.Linear(3, 2)})
    model["head"].weight = model["embed"].weight
    for source in (model, model.state_dict(), list(model.named_parameters(remove_duplicate=False))):
        assert list(summarize(source, include="head")) == ["embed.weight", "head.bias"]
        assert list(summarize(source, exclude="embed")) == ["embed.weight", "head.bias"]


def test_the_total_does_not_cover_selected_buffers(backend):
    layer = torch.nn.BatchNorm1d(4)
    assert summarize(layer, buffers=True, include="weight|mean").total.count == 4


def test_different_views_of_one_memory_are_not_tied(backend):
    x = torch.arange(8, dtype=torch.float32)
    z = torch.randn(4, dtype=torch.complex64)
    source = {
        "floats": x,
        "bits": x.view(torch.int32),
        "half": x[:4],
        "z": z,
        "conjugate": z.conj(),
    }
    assert list(summarize(source)) == list(source)
    a = x.clone().requires_grad_()
    b = a.detach().requires_grad_()
    a.grad, b.grad = torch.ones(8), torch.zeros(8)
    assert summarize({"a": a, "b": b})["b"].grad.zero_fraction == 1.0


def test_bools_stored_as_any_byte_are_read(backend):
    x = torch.tensor([0, 255, 2], dtype=torch.uint8).view(torch.bool)
    stats = stats_of(x)
    assert (stats.max, stats.zero_count) == (1.0, 1) and stats.mean == pytest.approx(2 / 3)


class DropsGradient(Wrapper):
    """A subclass whose `numel()` runs Python code, which drops the gradient of another tensor."""

    @staticmethod
    def __new__(cls, inner, other):
        return torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, dtype=inner.dtype, dispatch_sizes_strides_policy="sizes"
        )

    def __init__(self, inner, other):
        self.inner, self.other = inner, other

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        args[0].other.grad = None
        raise NotImplementedError(f"no {func}")


@pytest.mark.parametrize("params", [True, False])
def test_a_gradient_may_be_dropped_during_the_call(backend, params):
    warnings.simplefilter("ignore")
    w = torch.ones(300_000, requires_grad=True)
    w.grad = torch.full((300_000,), 7.0)
    odd = DropsGradient(torch.ones(3), w)
    summary = summarize([("w", w), ("odd", odd)], params=params)
    grad = summary["w"].grad
    assert grad is None or grad.mean == 7.0


def test_extreme_grad_scales_do_not_overflow(backend):
    x = torch.ones(4, requires_grad=True)
    x.grad = torch.tensor([1.0, 2.0, 3.0, 4.0])
    for scale in (1e-200, 1e200):
        grad = summarize({"x": x}, grad_scale=scale)["x"].grad
        assert grad.mean == pytest.approx(2.5 / scale)
    x.grad = torch.ones(4)
    assert summarize({"x": x}, grad_scale=1e-200)["x"].grad.std == 0.0


def test_numbers_of_numpy_are_numbers(backend, model):
    summary = summarize(model, correction=np.int64(0), grad_scale=np.float32(2))
    assert summary == summarize(model, correction=0, grad_scale=2.0)


def test_buffers_are_listed_on_request(backend):
    layer = torch.nn.BatchNorm1d(4)
    layer(torch.randn(8, 4))
    summary = summarize(layer, buffers=True)
    assert list(summary) == ["weight", "bias", *dict(layer.named_buffers())]
    assert summary["num_batches_tracked"].mean == 1.0
    assert summary["running_mean"].kind == "buffer" and summary.total.count == 8
    assert "buffer_mean/running_mean" in summary.scalars()
    assert "running_mean" not in summarize(layer)


# ---- cases found by fuzzing ----------------------------------------------------------------------


@pytest.mark.parametrize("keys", ["ab", "abcde"])
def test_scalars_needs_a_key_for_each_statistic(native, keys):
    table = record_of(summarize({"a": torch.ones(3), "b": torch.ones(3)})).table
    with pytest.raises(IndexError, match="4 keys"):
        native.scalars(table, b"", dict.fromkeys(keys), bytes([1]), 1.0, 1.0)


def test_the_number_of_remembered_reasons_is_limited(backend):
    warnings.simplefilter("ignore")
    for size in range(1, 1200):
        summarize({"x": freed(size)})
    assert 100 < len(paramstats._core.reading._warned) <= 1000


def test_a_class_that_could_not_be_read_is_not_kept_alive(backend):
    warnings.simplefilter("ignore")

    class Passing(Opaque):
        pass

    summarize({"x": Passing(torch.ones(2))})
    alive = weakref.ref(Passing)
    del Passing
    gc.collect()
    assert alive() is None


def test_a_thread_with_a_small_stack_can_read_large_tensors(native):
    """The kernels copy tensors with gaps and NaN to buffers, which must not be on the stack."""
    plain = torch.linspace(1, 2, 40_000)
    holed = plain.clone()
    holed[::100] = math.nan
    tensors = {"plain": plain, "gaps": holed[::2], "holed": holed}
    expected, found = summarize(tensors), []
    for _ in range(20):
        run_with_small_stack(lambda: found.append(summarize(tensors)))
    assert found == [expected] * 20


# ---- inside function transforms --------------------------------------------------------------


@pytest.mark.parametrize("transform", ["grad", "jvp", "vjp"])
def test_tensors_inside_a_differentiating_transform_are_read(backend, transform):
    torch.manual_seed(0)
    w = torch.randn(40, 30)
    inside = []

    def loss(w):
        inside.append(summarize({"w": w}))
        return w.square().sum()

    {
        "grad": lambda: torch.func.grad(torch.func.grad(loss))(torch.tensor(2.0)),
        "jvp": lambda: torch.func.jvp(loss, (w,), (w,)),
        "vjp": lambda: torch.func.vjp(loss, w),
    }[transform]()
    oracle.check(inside[0]["w"], torch.tensor(2.0) if transform == "grad" else w)
    assert not inside[0].skipped


def test_tensors_inside_vmap_are_skipped_with_a_reason(backend):
    closed_over = torch.ones(3)
    inside = []

    def mean(w):
        inside.append(summarize({"w": w, "closed over": closed_over}))
        return w.mean()

    with pytest.warns(RuntimeWarning, match=r"'w' .*inside torch\.vmap .* outside of it"):
        torch.func.vmap(mean)(torch.randn(5, 7))
    assert math.isnan(inside[0]["w"].mean) and inside[0]["w"].shape == (7,)
    assert inside[0]["closed over"].mean == 1.0


def test_a_half_imported_fsdp_is_no_error(backend, monkeypatch):
    half = types.ModuleType("torch.distributed.fsdp")
    monkeypatch.setitem(sys.modules, "torch.distributed.fsdp", half)
    assert summarize(torch.nn.Linear(3, 2))["weight"].count == 6
