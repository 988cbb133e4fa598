"""Every row of the table of inputs: what each kind of tensor or source gets."""

from __future__ import annotations

import gc
import math
import sys
import types
import warnings
import weakref

import pytest
import torch

import paramstats
from paramstats._summary import record_of
from tests import oracle
from tests.conftest import in_a_small_thread

summarize = paramstats.summarize


def stats_of(tensor: torch.Tensor) -> paramstats.ParamStats:
    return summarize({"x": tensor})["x"]


@pytest.fixture(autouse=True)
def _no_warnings():
    paramstats._core.reading._warned.clear()  # each test gets its own
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message="Sparse (CSR|CSC|BSR|BSC)")  # torch: beta
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
def test_strides(backend, name, dtype):
    torch.manual_seed(0)
    x = STRIDED[name]((10 * torch.randn(300, 100)).to(dtype))
    oracle.check(stats_of(x), x)


def test_a_large_tensor_with_gaps(backend):
    torch.manual_seed(0)
    x = torch.randn(1500, 500)[:, ::2]
    oracle.check(stats_of(x), x)


# ---- sizes -----------------------------------------------------------------------------------


def test_empty(backend):
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


def test_no_gradient_is_none_and_a_zero_gradient_is_not(backend):
    layer = torch.nn.Linear(3, 2)
    assert summarize(layer)["weight"].grad is None
    layer.weight.grad = torch.zeros_like(layer.weight)
    summary = summarize(layer)
    assert summary["weight"].grad.zero_fraction == 1.0
    assert summary["bias"].grad is None
    assert summary.total.grad.count == 6
    layer.weight.grad = None
    assert summarize(layer).total.grad is None


def test_a_gradient_set_to_none_is_noticed(backend, model):
    assert summarize(model)["0.weight"].grad is not None
    model.zero_grad()
    assert summarize(model)["0.weight"].grad is None


@pytest.mark.parametrize("coalesced", [True, False])
def test_sparse_gradient(backend, coalesced):
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
def test_sparse_layouts(backend, layout):
    x = torch.zeros(40, 60)
    x[3, 5], x[30, 7], x[39, 59] = 2.0, -3.0, 7.0
    sparse = x.to_sparse(
        layout=getattr(torch, f"sparse_{layout}"), blocksize=(2, 2) if layout == "bsr" else None
    )
    oracle.check(stats_of(sparse), x)


def test_gradients_of_tensors_that_are_not_leaves(backend):
    leaf = torch.ones(3, requires_grad=True)
    inner = leaf * 2
    assert stats_of(inner).grad is None  # torch warns at inner.grad; no warning here
    kept = leaf * 2
    kept.retain_grad()
    kept.sum().backward()
    assert stats_of(kept).grad.mean == 1.0


def test_grad_scale_divides_gradients_alone(backend, model):
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


# ---- tensors that are not what they seem -----------------------------------------------------


def test_tied_parameters_count_once_and_answer_to_every_name(backend):
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


def test_lazy_layers_before_and_after_their_first_batch(backend):
    layer = torch.nn.Sequential(torch.nn.LazyLinear(4), torch.nn.Linear(4, 2))
    before = summarize(layer)
    assert (before["0.weight"].shape, before["0.weight"].count) == (None, 0)
    assert math.isnan(before["0.weight"].mean) and math.isnan(before["0.weight"].norm)
    assert "lazy" in str(before) and before.total.count == 10
    layer(torch.randn(3, 7))
    after = summarize(layer)
    assert after["0.weight"].shape == (4, 7)
    oracle.check(after["0.weight"], layer[0].weight)


def test_meta_tensors_are_listed_unread(backend):
    with torch.device("meta"):
        layer = torch.nn.Linear(5, 3)
    summary = summarize(layer)
    assert (summary["weight"].count, summary["weight"].shape) == (15, (3, 5))
    assert math.isnan(summary["weight"].norm) and math.isnan(summary["weight"].zero_fraction)
    assert summary.total.count == 18 and math.isnan(summary.total.norm)
    assert summary.scalars() == {}
    assert str(summary) and summary.to_dict()


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128], ids=str)
def test_complex(backend, dtype):
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


def test_lazily_conjugated_and_negated(backend):
    x = torch.randn(50, dtype=torch.complex64)
    oracle.check(stats_of(x.conj().imag), x.conj().imag.resolve_neg())
    assert stats_of(x.conj()).norm == pytest.approx(x.norm().item(), rel=1e-6)


def test_quantized(backend):
    x = torch.quantize_per_tensor(torch.randn(100), 0.1, 10, torch.quint8)
    oracle.check(stats_of(x), x)


def test_subclass_with_storage_of_its_own(backend):
    class Named(torch.Tensor):
        pass

    x = torch.randn(100).as_subclass(Named)
    oracle.check(stats_of(x), x.as_subclass(torch.Tensor))


class Wrapper(torch.Tensor):
    """Keeps its elements in another tensor, as quantised weights do."""

    readable = True

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
        if func is torch.ops.aten._to_copy.default and cls.readable:
            return func(args[0].inner, **(kwargs or {}))
        raise NotImplementedError(f"no {func}")


class Opaque(Wrapper):
    readable = False


def test_wrapper_subclass_through_its_own_operators(backend):
    inner = torch.randn(100)
    oracle.check(stats_of(Wrapper(inner)), inner)


def test_unreadable_subclass_is_skipped_with_a_reason(backend):
    with pytest.warns(RuntimeWarning, match="'a'.*Opaque has no operator"):
        summary = summarize({"a": Opaque(torch.randn(10)), "b": torch.ones(3)})
    assert math.isnan(summary["a"].mean) and summary["b"].mean == 1.0
    assert "Opaque" in summary.skipped["a"] and summary.total.count == 3
    summarize({"a": Opaque(torch.randn(10))})  # warned once: an error here would fail the test


def test_freed_storage_is_not_read(backend):
    x = torch.randn(1000)
    x.untyped_storage().resize_(0)
    with pytest.warns(RuntimeWarning, match="holds 0 bytes"):
        summary = summarize({"x": x, "y": torch.ones(2)})
    assert math.isnan(summary["x"].norm) and summary["x"].count == 1000
    assert summary["y"].norm == pytest.approx(math.sqrt(2))


# ---- sources ---------------------------------------------------------------------------------


def test_mappings_and_pairs(backend, model):
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


def test_nothing(backend):
    for source in ({}, [], torch.nn.ReLU()):
        summary = summarize(source)
        assert len(summary) == 0 and summary.total.count == 0 and summary.total.grad is None
        assert str(summary) and summary.scalars()["param_norm/total"] == 0


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"model": {"w": torch.ones(1)}}, "got dict for 'model'; pass that mapping itself"),
        (None, "expected an nn.Module, a mapping .* got NoneType"),
        (3, "got int"),
        ("model", "got str"),
        (torch.ones(3), "got torch.Tensor; for one tensor pass {'name': tensor}"),
        ([torch.ones(3)], r"expected \(name, tensor\) pairs, got torch.Tensor at position 0"),
        ({"w": 3.0}, "expected a torch.Tensor, got float for 'w'"),
        ({"w": torch.ones(1), "v": None}, "got NoneType for 'v'"),
        ({"w": torch.fx.Proxy(torch.fx.Graph().placeholder("w"))}, "Proxy for 'w'; leave it out"),
        ({1: torch.ones(1)}, "expected names to be str, got int for 1"),
    ],
)
def test_bad_sources(backend, source, message):
    with pytest.raises(TypeError, match=f"^paramstats.summarize: .*{message}"):
        summarize(source)


def test_a_name_twice(backend):
    with pytest.raises(ValueError, match="every name once, got 'w' twice"):
        summarize([("w", torch.ones(1)), ("w", torch.ones(2))])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"correction": None}, ValueError, "finite number for correction, got None"),
        ({"correction": math.nan}, ValueError, "correction"),
        ({"grad_scale": 0.0}, ValueError, "number > 0 for grad_scale, got 0.0"),
        ({"grad_scale": math.inf}, ValueError, "grad_scale"),
        ({"include": 3}, TypeError, "regular expression or several for include, got int"),
        ({"exclude": "("}, Exception, "regular expressions for exclude"),
    ],
)
def test_bad_arguments(backend, model, arguments, error, message):
    with pytest.raises(error, match=message):
        summarize(model, **arguments)


def test_params_false_and_grads_false(backend, model):
    only_grads = summarize(model, params=False)
    assert math.isnan(only_grads["0.weight"].mean) and only_grads["0.weight"].count == 48
    assert only_grads["0.weight"].grad.norm == summarize(model)["0.weight"].grad.norm
    assert summarize(model, grads=False)["0.weight"].grad is None


def test_include_and_exclude(backend, model):
    assert list(summarize(model, include="weight")) == ["0.weight", "2.weight"]
    assert list(summarize(model, include=["^0", r"^2\.b"])) == ["0.weight", "0.bias", "2.bias"]
    assert list(summarize(model, exclude="bias", include="^2")) == ["2.weight"]
    assert list(summarize(dict(model.named_parameters()), exclude="weight")) == ["0.bias", "2.bias"]
    only = summarize(model, include="^2.weight")
    assert only.total.count == 18 and only["2.weight"].grad.norm > 0
    assert summarize({"a": torch.ones(1), "b": "no tensor"}, exclude="b")["a"].count == 1
    with pytest.warns(RuntimeWarning, match="no name passes include='nothing'"):
        assert list(summarize(model, include="nothing")) == []


def test_ties_are_selected_alike_from_models_and_mappings(backend):
    model = torch.nn.ModuleDict({"embed": torch.nn.Linear(3, 2), "head": torch.nn.Linear(3, 2)})
    model["head"].weight = model["embed"].weight
    for source in (model, model.state_dict(), list(model.named_parameters(remove_duplicate=False))):
        assert list(summarize(source, include="head")) == ["embed.weight", "head.bias"]
        assert list(summarize(source, exclude="embed")) == ["embed.weight", "head.bias"]


def test_selected_buffers_stay_out_of_the_total(backend):
    layer = torch.nn.BatchNorm1d(4)
    assert summarize(layer, buffers=True, include="weight|mean").total.count == 4


def test_views_that_only_look_alike_are_not_one_tensor(backend):
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


def test_bools_of_any_byte(backend):
    x = torch.tensor([0, 255, 2], dtype=torch.uint8).view(torch.bool)
    stats = stats_of(x)
    assert (stats.max, stats.zero_count) == (1.0, 1) and stats.mean == pytest.approx(2 / 3)


def test_nested_tensors_are_skipped_with_a_reason(backend):
    warnings.simplefilter("ignore")  # torch's, that they are a prototype, and ours
    parts = [torch.ones(2, 3), torch.ones(3, 3)]
    for layout in (torch.strided, torch.jagged):
        nested = torch.nested.nested_tensor(parts, layout=layout)
        summary = summarize({"n": nested, "x": torch.ones(4)})
        assert math.isnan(summary["n"].mean) and summary["x"].norm == 2.0
        assert "pass their parts" in summary.skipped["n"]
        module = torch.nn.Linear(2, 2)
        module.register_buffer("n", nested)
        assert "n" in summarize(module, buffers=True).skipped


class TellsSizesItself(Wrapper):
    """Answers `numel()` with Python code, which lets go of another tensor's gradient."""

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
def test_a_subclass_that_drops_a_gradient_meanwhile(backend, params):
    warnings.simplefilter("ignore")
    w = torch.ones(300_000, requires_grad=True)
    w.grad = torch.full((300_000,), 7.0)
    odd = TellsSizesItself(torch.ones(3), w)
    summary = summarize([("w", w), ("odd", odd)], params=params)
    grad = summary["w"].grad
    assert grad is None or grad.mean == 7.0


def test_a_hand_set_gradient_of_no_leaf_is_torchs_business(backend):
    inner = torch.ones(3, requires_grad=True) * 2
    inner.grad = torch.ones(3)
    assert stats_of(inner).grad is None  # as torch warns: it is no leaf and retains none


def test_extreme_grad_scales(backend):
    x = torch.ones(4, requires_grad=True)
    x.grad = torch.tensor([1.0, 2.0, 3.0, 4.0])
    for scale in (1e-200, 1e200):
        grad = summarize({"x": x}, grad_scale=scale)["x"].grad
        assert grad.mean == pytest.approx(2.5 / scale)
    x.grad = torch.ones(4)
    assert summarize({"x": x}, grad_scale=1e-200)["x"].grad.std == 0.0


def test_numpys_numbers_are_numbers(backend, model):
    np = pytest.importorskip("numpy", reason="numpy is not installed")
    summary = summarize(model, correction=np.int64(0), grad_scale=np.float32(2))
    assert summary == summarize(model, correction=0, grad_scale=2.0)


def test_buffers(backend):
    layer = torch.nn.BatchNorm1d(4)
    layer(torch.randn(8, 4))
    summary = summarize(layer, buffers=True)
    assert list(summary) == ["weight", "bias", *dict(layer.named_buffers())]
    assert summary["num_batches_tracked"].mean == 1.0
    assert summary["running_mean"].kind == "buffer" and summary.total.count == 8
    assert "buffer_mean/running_mean" in summary.scalars()
    assert "running_mean" not in summarize(layer)


# ---- found by tools/fuzz -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sizes", "strides", "offset"),
    [
        ((2, 2), (1 << 62, 1 << 62), 0),  # their sum wraps around
        ((2,), (1 << 62,), 1 << 62),
        ((3,), (1,), -5_000_000),
        ((2, 3), (1 << 61, 1), 1 << 61),  # so do bytes
        ((3,), (1 << 40,), 0),
    ],
)
def test_elements_beyond_the_storage_are_not_read(backend, sizes, strides, offset):
    """What torch compiles takes sizes, strides and offset unchecked."""
    x = torch._C._dynamo.guards._reinterpret_tensor(torch.ones(10), sizes, strides, offset)
    with pytest.warns(RuntimeWarning, match="holds 40 bytes, not all elements"):
        summary = summarize({"x": x})
    assert math.isnan(summary["x"].norm) and summary["x"].count == x.numel()


@pytest.mark.parametrize("value", [10**400, torch.ones(2), "1", 1j, object()])
@pytest.mark.parametrize("argument", ["correction", "grad_scale"])
def test_what_is_no_number_is_refused(backend, argument, value):
    with pytest.raises(ValueError, match=f"finite number.* for {argument}, got"):
        summarize({"x": torch.ones(2)}, **{argument: value})


def test_a_key_that_empties_its_list(native):
    table = record_of(summarize({"a": torch.ones(3), "b": torch.ones(3)})).table

    class Shrinking:
        def __hash__(self):
            keys.clear()
            return 1

    keys = [Shrinking(), "b" * 3, "c" * 3, "d" * 3]
    with pytest.raises(IndexError, match="keys have changed"):
        native.scalars(table, keys, [1], 1.0, 1.0)


def test_reasons_for_not_reading_do_not_pile_up(backend):
    warnings.simplefilter("ignore")
    warned = paramstats._core.reading._warned
    warned.clear()
    try:
        for size in range(1, 1200):
            x = torch.ones(size)
            x.untyped_storage().resize_(size)
            summarize({"x": x})
        assert 100 < len(warned) <= 1000
    finally:
        warned.clear()


def test_a_class_that_could_not_be_read_may_go(backend):
    warnings.simplefilter("ignore")

    class Passing(Opaque):
        pass

    summarize({"x": Passing(torch.ones(2))})
    alive = weakref.ref(Passing)
    del Passing
    gc.collect()
    assert alive() is None


def test_a_small_stack_is_enough(native):
    """Of a thread: what is copied to be read, elements with gaps and NaN, does not lie on it."""
    plain = torch.linspace(1, 2, 40_000)
    holed = plain.clone()
    holed[::100] = math.nan
    tensors = {"plain": plain, "gaps": holed[::2], "holed": holed}
    expected, found = summarize(tensors), []
    for _ in range(20):
        in_a_small_thread(lambda: found.append(summarize(tensors)))
    assert found == [expected] * 20


# ---- inside transforms of functions --------------------------------------------------------------


@pytest.mark.parametrize("transform", ["grad", "jvp", "vjp"])
def test_inside_a_transform_that_differentiates(backend, transform):
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


def test_inside_vmap_tensors_are_skipped_with_a_reason(backend):
    closed_over = torch.ones(3)
    inside = []

    def mean(w):
        inside.append(summarize({"w": w, "closed over": closed_over}))
        return w.mean()

    with pytest.warns(RuntimeWarning, match=r"'w' .*inside torch\.vmap .* outside of it"):
        torch.func.vmap(mean)(torch.randn(5, 7))
    assert math.isnan(inside[0]["w"].mean) and inside[0]["w"].shape == (7,)
    assert inside[0]["closed over"].mean == 1.0


# ---- reasons -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.uint4, torch.bits8, torch.float4_e2m1fn_x2], ids=str)
def test_types_that_torch_cannot_convert_are_skipped_with_a_remedy(backend, dtype):
    codes = torch.arange(8, dtype=torch.uint8)
    with pytest.warns(RuntimeWarning, match=f"'x' .*no conversion of {dtype} .*view.torch.uint8"):
        summary = summarize({"x": codes.view(dtype), "codes": codes})
    assert math.isnan(summary["x"].norm) and summary["codes"].mean == 3.5


def test_asking_a_subclass_for_its_elements_warns_of_nothing_else(backend):
    class Complains(Opaque):
        @classmethod
        def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
            warnings.warn(f"no {func}", UserWarning, stacklevel=1)
            return super().__torch_dispatch__(func, types, args, kwargs)

    with pytest.warns(RuntimeWarning, match="Complains has no operator"):
        assert "x" in summarize({"x": Complains(torch.ones(3))}).skipped


def test_while_another_thread_imports_fsdp(backend, monkeypatch):
    half = types.ModuleType("torch.distributed.fsdp")
    monkeypatch.setitem(sys.modules, "torch.distributed.fsdp", half)
    assert summarize(torch.nn.Linear(3, 2))["weight"].count == 6
