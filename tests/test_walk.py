"""Names and order are those of `named_parameters()`, also after a change and for odd modules."""

from __future__ import annotations

import copy
import ctypes
import gc
import importlib
import json
import re
import sys
import threading
import types
import weakref

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.optim.swa_utils import AveragedModel

import paramstats
from paramstats._core import shard as sharding
from paramstats._summary import layout_of
from tests.conftest import run_with_small_stack

summarize = paramstats.summarize


def expected_names(model: nn.Module, buffers: bool = False) -> list[str]:
    names = [name for name, _ in model.named_parameters()]
    return names + ([name for name, _ in model.named_buffers()] if buffers else [])


def put(module: nn.Module, key: object, child: nn.Module | None) -> None:
    """Add a child under a key that `setattr` or `add_module` would not accept."""
    module._modules[key] = child  # type: ignore[index]


class Block(nn.Module):
    def __init__(self, depth: int) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.none = None
        self.register_parameter("absent", None)
        self.norm = nn.BatchNorm1d(3)
        self.extra = nn.ParameterList([nn.Parameter(torch.ones(2)) for _ in range(2)])
        if depth:
            self.inner = nn.ModuleDict({"a": Block(depth - 1), "ü \n": nn.Identity()})
        self.scale = nn.Parameter(torch.tensor(2.0))


def scripted() -> nn.Module:
    return torch.jit.script(nn.Sequential(nn.Linear(3, 3), nn.ReLU()))


def with_weight_norm() -> nn.Module:
    model = nn.Sequential(nn.Linear(3, 3))
    nn.utils.parametrizations.weight_norm(model[0])
    return model


class Prefixed(nn.Linear):
    """Overrides `named_parameters`."""

    def named_parameters(self, *args, **kwargs):
        for name, p in super().named_parameters(*args, **kwargs):
            yield f"mine.{name}", p


class OwnModules(nn.Module):
    """Overrides `named_modules`."""

    def __init__(self) -> None:
        super().__init__()
        self.child = nn.Linear(2, 2)

    def named_modules(self, memo=None, prefix="", remove_duplicate=True):
        yield prefix, self
        yield prefix + ("." if prefix else "") + "other", self.child


def own_instance() -> nn.Module:
    """An instance, not a class, overrides `named_parameters`."""
    model = nn.Linear(3, 2)
    weight = model.weight
    model.named_parameters = lambda **_: iter([("only", weight)])
    return model


def cycle() -> nn.Module:
    model = nn.Sequential(nn.Linear(2, 2))
    put(model[0], "parent", model)
    return model


def nested(levels: int) -> nn.Module:
    model = nn.Linear(2, 2)
    for _ in range(levels):
        model = nn.Sequential(model)
    return model


def shared_in_shared() -> nn.Module:
    """2^24 paths lead to the leaf."""
    model = nn.Linear(2, 2)
    for _ in range(24):
        model = nn.Sequential(model, model)
    return model


def empty_child_names() -> nn.Module:
    model = nn.Module()
    put(model, "", nn.Linear(2, 2))
    put(model._modules[""], "", nn.Sequential(nn.Linear(1, 1)))
    put(model._modules[""], "a", nn.Sequential(nn.Linear(1, 1)))
    put(model._modules[""].a, "", nn.Linear(1, 1))
    return model


class Rewriting(str):
    def __radd__(self, other):
        return f"{other}rewritten"


def key_with_its_own_addition() -> nn.Module:
    model = nn.Sequential(nn.Linear(2, 2))
    model[0]._parameters[Rewriting("w")] = nn.Parameter(torch.ones(1))
    assert expected_names(model)[-1] == "0.rewritten"
    return model


class RaisingValues(dict):
    def values(self):
        raise OSError("no values")


def children_that_cannot_be_listed() -> nn.Module:
    model = nn.Linear(2, 2)
    model.__dict__["_modules"] = RaisingValues()
    return model


MODELS = {
    "blocks": lambda: nn.Sequential(Block(2), nn.Conv2d(1, 2, 3), nn.MultiheadAttention(4, 2)),
    "scripted": scripted,
    "weight norm": with_weight_norm,
    "overrides named_parameters": lambda: Prefixed(3, 2),
    "overrides named_modules": OwnModules,
    "child overrides named_modules": lambda: nn.Sequential(OwnModules()),
    "instance overrides": own_instance,
    "150 levels": lambda: nested(150),
    "cycle": cycle,
    "shared in shared": shared_in_shared,
    "empty child names": empty_child_names,
    "key with its own addition": key_with_its_own_addition,
    "children cannot be listed": children_that_cannot_be_listed,
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch.jit
@pytest.mark.parametrize("buffers", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_names_and_order_are_torchs(backend, name, buffers):
    model = MODELS[name]()
    for _ in range(2):  # the second call uses the cached layout
        assert list(summarize(model, buffers=buffers)) == expected_names(model, buffers)


def test_a_name_selects_the_tensor_that_torch_gives_for_it(backend):
    model = nn.Sequential(Block(2))
    name = "0.inner.a.inner.a.linear.weight"
    entry = summarize(model)[name]
    assert entry.mean == pytest.approx(model.get_parameter(name).mean().item(), abs=1e-6)
    assert next(iter(summarize(model, include=r"inner\.a\.inner\.a\.linear"))) == name


# ---- names under wrappers ------------------------------------------------------------------------


class OwnModuleChild(nn.Module):
    """A model that is no wrapper, but has a child called `module`."""

    def __init__(self) -> None:
        super().__init__()
        self.module = nn.Linear(2, 2)


def compiled(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="eager")


@pytest.mark.parametrize(
    "wrap",
    [
        nn.DataParallel,
        AveragedModel,
        compiled,
        lambda model: nn.DataParallel(compiled(model)),
        lambda model: compiled(nn.DataParallel(AveragedModel(model))),
    ],
)
@pytest.mark.parametrize("make", [lambda: nn.Sequential(nn.BatchNorm1d(3)), OwnModuleChild])
@pytest.mark.parametrize("nested_in", [None, "net"])
def test_names_do_not_contain_what_wrappers_add(backend, wrap, make, nested_in):
    model = make()
    wrapped = wrap(model)
    names = expected_names(model)
    if nested_in:
        outer = nn.Module()
        put(outer, nested_in, wrapped)
        wrapped, names = outer, [f"{nested_in}.{name}" for name in names]
    summary = summarize(wrapped)
    assert list(summary) == names
    for name, full in zip(names, expected_names(wrapped), strict=True):
        assert name != full and summary[full] == summary[name] and full in summary
        assert summary[full].name == name and summary[full].aliases == ()
        assert list(summary.filter(f"^{re.escape(full)}$")) == [name]
        assert list(summarize(wrapped, include=f"^{re.escape(full)}$")) == [name]
        assert list(summarize(wrapped, include=f"^{re.escape(name)}$")) == [name]
        both = f"^({re.escape(full)}|{re.escape(name)})$"
        assert name not in summarize(wrapped, exclude=both) and name not in summary.filter(
            exclude=both
        )
    assert f"param_norm/{names[0]}" in summary.scalars() and names[0] in str(summary.to_dict())


def test_names_do_not_contain_what_activation_checkpointing_adds(backend):
    summary = summarize(nn.Sequential(checkpoint_wrapper(nn.Linear(2, 2))))
    assert list(summary) == ["0.weight", "0.bias"]
    assert summary["0._checkpoint_wrapped_module.weight"] == summary["0.weight"]


@pytest.mark.parametrize("wrap", [lambda model: model, nn.DataParallel])
def test_a_child_called_module_keeps_its_name(backend, wrap):
    assert list(summarize(wrap(OwnModuleChild()))) == ["module.weight", "module.bias"]


def test_names_stay_as_they_are_where_two_would_be_equal(backend):
    model = nn.DataParallel(nn.Linear(2, 2))
    model.weight = nn.Parameter(torch.ones(1))  # "weight", as "module.weight" without wrapper
    summary = summarize(model)
    assert list(summary) == ["weight", "module.weight", "bias"]
    assert summary["weight"].count == 1 and "module.bias" in summary


def test_mappings_lose_the_marks_that_only_wrappers_use(backend):
    source = {"_orig_mod.w": torch.ones(1), "module.w": torch.ones(1), "x._orig_mod": torch.ones(1)}
    assert list(summarize(source)) == ["w", "module.w", "x._orig_mod"]


# ---- changes between calls -----------------------------------------------------------------------


def changed(model: nn.Module) -> None:
    model[0].added = nn.Linear(2, 2)


def replaced(model: nn.Module) -> None:
    model[0] = nn.Linear(2, 2)


def renamed(model: nn.Module) -> None:
    model[0]._modules["renamed"] = model[0]._modules.pop("inner")


def frozen(model: nn.Module) -> None:
    model[0].linear.weight.requires_grad_(False)


def removed(model: nn.Module) -> None:
    del model[0].linear


def tied(model: nn.Module) -> None:
    model[0].linear.weight = model[0].inner["a"].linear.weight


def reshaped(model: nn.Module) -> None:
    model[0].linear.weight.data = torch.ones(7, 3)


def converted(model: nn.Module) -> None:
    model.double()


def reordered(model: nn.Module) -> None:
    model[0]._parameters["scale"] = model[0]._parameters.pop("scale")
    model[0]._modules["linear"] = model[0]._modules.pop("linear")


def exchanged(model: nn.Module) -> None:
    model[0].linear.weight = nn.Parameter(torch.full((3, 3), 5.0))


@pytest.mark.parametrize(
    "change",
    [changed, replaced, renamed, frozen, removed, tied, reshaped, converted, reordered, exchanged],
    ids=lambda f: f.__name__,
)
def test_a_change_of_the_model_is_seen_by_the_next_call(backend, change):
    model = nn.Sequential(Block(1), nn.Linear(3, 2))
    before = summarize(model)
    names = list(before)
    snapshot = json.dumps(before.to_dict())
    change(model)
    after = summarize(model)
    assert list(after) == expected_names(model)
    for name, p in model.named_parameters():
        entry = after[name]
        assert (entry.shape, entry.dtype) == (tuple(p.shape), p.dtype)
        assert entry.requires_grad == p.requires_grad
        assert entry.mean == pytest.approx(p.double().mean().item(), abs=1e-6)
    assert list(before) == names and json.dumps(before.to_dict()) == snapshot


def test_another_shape_of_any_parameter_is_seen(backend):
    shapes = [(), (3,), (2, 3), (0,), (1, 2, 1)] * 9
    model = nn.ParameterList(torch.zeros(shape) for shape in shapes)
    for position, p in enumerate(model):
        paramstats.summarize(model)
        shapes[position] = tuple(size + 1 for size in p.shape)
        p.data = torch.zeros(shapes[position])
        assert [entry.shape for entry in paramstats.summarize(model).values()] == shapes


def test_summaries_of_an_unchanged_model_share_one_layout(native):
    model = nn.Sequential(Block(1))
    assert layout_of(summarize(model)) is layout_of(summarize(model))
    selected = [layout_of(summarize(model, include="linear")) for _ in range(2)]
    assert selected[0] is selected[1]


@pytest.mark.parametrize("pattern", ["^fc", r"^module\.fc", r"fc\.weight$"])
def test_exclude_matches_either_name_under_a_wrapper(backend, pattern):
    model = nn.DataParallel(
        nn.ModuleDict({"fc": nn.Linear(2, 2, bias=False), "b": nn.Linear(1, 1)})
    )
    assert list(summarize(model, exclude=pattern)) == ["b.weight", "b.bias"]
    assert list(summarize(model).filter(exclude=pattern)) == ["b.weight", "b.bias"]
    assert list(summarize(model, include=pattern)) == ["fc.weight"]
    assert not summarize(model).filter("^module").keys() ^ summarize(model).keys()


def cached_layouts(native) -> int:
    gc.collect()  # deletes models that other tests left behind
    return native.native.cached_layouts()


def parametrized() -> nn.Module:
    return nn.utils.parametrizations.weight_norm(nn.Linear(3, 2))


def class_that_refers_to_its_instance() -> nn.Module:
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.ones(2))

        def forward(self):
            return model

    model = Own()
    return model


def key_that_refers_to_its_model() -> nn.Module:
    class Owning(str):
        pass

    model = nn.Linear(2, 2)
    key = Owning("w")
    key.model = model
    model._parameters[key] = nn.Parameter(torch.ones(1))
    return model


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Sequential(Block(1)),
        parametrized,
        class_that_refers_to_its_instance,
        key_that_refers_to_its_model,
    ],
)
def test_the_cache_of_layouts_keeps_no_model_alive(native, make):
    before = cached_layouts(native)
    model = make()
    summarize(model)
    summarize(model, buffers=True)
    assert native.native.cached_layouts() <= before + 2
    alive = weakref.ref(model)
    del model
    gc.collect()
    assert alive() is None and native.native.cached_layouts() == before


def test_the_cache_of_layouts_does_not_grow_with_the_number_of_models(native):
    before = cached_layouts(native)
    for i in range(100):
        model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1 + i % 3))
        assert list(summarize(model)) == expected_names(model)
    del model
    assert cached_layouts(native) == before


@pytest.fixture
def collector():
    """Ignore objects of other tests, and restore the garbage collector's settings afterwards."""
    thresholds = gc.get_threshold()
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
    gc.set_threshold(*thresholds)
    gc.enable()


def test_the_garbage_collector_may_run_during_a_call(native, collector):
    """A finalizer empties the model, at each allocation that may start the collector."""

    class EmptiesModel:
        def __init__(self, model):
            self.me, self.model = self, model

        def __del__(self):
            for name in list(self.model._parameters):
                self.model._parameters[name] = None

    for warm in (True, False):
        for threshold in range(1, 30):
            model = nn.Linear(2, 2)
            if warm:
                summarize(model)
            gc.collect()
            gc.disable()
            EmptiesModel(model)
            gc.set_threshold(threshold, 10, 10)
            gc.enable()
            summarize(model)
            gc.disable()


def test_an_override_after_the_first_call_is_used(backend):
    model = nn.Linear(3, 2)
    assert list(summarize(model)) == ["weight", "bias"]
    weight = model.weight
    model.named_parameters = lambda **_: iter([("only", weight)])
    assert list(summarize(model)) == ["only"]

    class Later(nn.Linear):
        pass

    model = Later(3, 2)
    assert list(summarize(model)) == ["weight", "bias"]
    Later.named_parameters = lambda self, **_: iter([("mine", self.weight)])
    assert list(summarize(model)) == ["mine"]


def test_the_caches_of_a_layout_are_limited(backend):
    model = nn.Linear(2, 2)
    layout = layout_of(summarize(model))
    for i in range(100):
        summary = summarize(model, include=f"weight|{i}")
        summary.scalars(key=f"{i}/{{kind}}_{{stat}}/{{name}}")
    assert len(layout._selections) <= 16 and len(layout_of(summary).keys) <= 16


def test_a_call_leaks_no_reference(native):
    model = nn.Linear(3, 3)
    summarize(model)
    counted = [model, model.weight, model._parameters, type(model)]
    before = [sys.getrefcount(o) for o in counted]
    for _ in range(100):
        summarize(model)
    assert [sys.getrefcount(o) for o in counted] == before


def test_modules_need_no_hash_and_no_equality(native):  # torch's own listing needs the hash
    class Odd(nn.Linear):
        __hash__ = None

        def __eq__(self, other):
            raise AssertionError("compared")

    assert list(summarize(Odd(2, 2))) == ["weight", "bias"]


def test_modules_that_compare_equal_are_different_modules(backend):  # torch lists only one
    class Equal(nn.Linear):
        def __eq__(self, other):
            return True

        def __hash__(self):
            return 1

    assert len(summarize(nn.Sequential(Equal(1, 1), Equal(1, 1)))) == 4


def test_a_deep_copy_of_a_model_is_read_by_itself(backend):
    model = nn.Sequential(nn.Linear(2, 2))
    summarize(model)
    other = copy.deepcopy(model)
    other[0].bias.data.fill_(3)
    assert summarize(other)["0.bias"].mean == 3.0 != summarize(model)["0.bias"].mean


# ---- odd modules, found by fuzzing ---------------------------------------------------------------


@pytest.mark.parametrize("kind", ["_parameters", "_modules", "_buffers"])
def test_a_property_of_the_class_hides_the_attribute_of_the_instance(backend, kind):
    class Owned(nn.Module):
        locals()[kind] = property(lambda self: self.__dict__["shown"], lambda self, value: None)

        def __init__(self):
            self.__dict__["shown"] = {}
            super().__init__()

    model = Owned()
    hidden = nn.Linear(1, 1) if kind == "_modules" else nn.Parameter(torch.ones(1))
    model.__dict__[kind] = {"hidden": hidden}
    model.__dict__["shown"]["shown"] = copy.deepcopy(hidden)
    assert list(summarize(model, buffers=True)) == expected_names(model, buffers=True)


@pytest.mark.parametrize("value", [3, "x", nn.Linear(1, 1), nn.Linear])
def test_a_parameter_that_is_no_tensor_is_a_type_error(backend, value):
    model = nn.Sequential(nn.Linear(2, 2))
    model[0]._parameters["odd"] = value
    with pytest.raises(
        TypeError, match=r"^paramstats.summarize: .*Tensor, got .*'0.odd'; a module"
    ):
        summarize(model)


@pytest.mark.parametrize(
    ("listed", "message"),
    [
        ([(3, torch.ones(1))], "names to be str, got int for 3"),
        ([torch.ones(1)], "pairs, got torch.Tensor at position 0"),
        ([("a", torch.ones(1)), ("b", None)], "got NoneType for 'b'"),
    ],
)
def test_wrong_pairs_of_named_parameters_are_type_errors(backend, listed, message):
    model = nn.Linear(2, 2)
    model.named_parameters = lambda **_: iter(listed)
    with pytest.raises(TypeError, match=f"^paramstats.summarize: .*{message}"):
        summarize(model)


def test_two_tensors_with_one_name_are_an_error(backend):
    model = nn.Module()
    model.a = nn.Module()
    model.a.b = nn.Parameter(torch.zeros(1))
    model._parameters["a.b"] = nn.Parameter(torch.ones(1))
    with pytest.raises(ValueError, match=r"every name once, got 'a\.b' for two tensors"):
        summarize(model)
    model._parameters["a.b"] = model.a.b
    assert list(summarize(model)) == ["a.b"]


def test_the_walk_runs_no_comparison_of_attribute_names(native):
    """A dictionary lookup of `_modules` would run the key's code, which changes the model."""
    model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(50)), nn.Module())

    class Colliding:
        armed = False

        def __hash__(self):
            return hash("_modules")

        def __eq__(self, other):
            if Colliding.armed:
                for module in model:
                    module._parameters.clear()
            return False

    last = model[-1]
    own = dict(last.__dict__)
    last.__dict__.clear()
    last.__dict__[Colliding()] = 1
    last.__dict__.update(own)
    Colliding.armed = True
    _, tensors = native.walk(model, False, lambda *_: None)
    Colliding.armed = False
    assert len(tensors) == 100 and all(len(m._parameters) == 2 for m in list(model)[:-1])


def test_the_collector_does_not_run_while_modules_are_listed(native, collector):
    """The first access to the `__dict__` of a module allocates, which may start the collector."""
    found = []

    class EmptiesModel:
        def __init__(self, model):
            self.itself, self.model = self, model

        def __del__(self):
            for module in self.model:
                module._parameters.clear()
            self.junk = [torch.ones(2, 2) for _ in range(100)]

    for threshold in range(1, 25, 2):
        model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(20)))
        for i in range(20):
            put(model, str(20 + i), nn.Module())
        gc.collect()
        gc.disable()
        EmptiesModel(model)
        gc.set_threshold(threshold, 10, 10)
        gc.enable()
        found.append(native.walk(model, False, lambda module, names, *_: len(names)))
        gc.disable()
        assert gc.get_count()[0] >= 0
    assert all(len(tensors) == layout for layout, tensors in found)


def test_the_collector_stays_enabled_or_disabled(native):
    model = nn.Linear(2, 2)
    for switch in (gc.disable, gc.enable):
        switch()
        was = gc.isenabled()
        summarize(model)
        assert gc.isenabled() == was


def deep(levels: int) -> nn.Module:
    model: nn.Module = nn.Linear(2, 2)
    for _ in range(levels):
        outer = nn.Module()
        put(outer, "d", model)
        model = outer
    return model


def test_5000_levels_are_listed_by_the_native_backend(native):
    assert [len(name) for name in summarize(deep(5000))] == [2 * 5000 + 6, 2 * 5000 + 4]


def test_too_many_levels_for_python_are_an_error_with_a_remedy(backend):
    with pytest.raises(RecursionError, match=r"^paramstats.summarize: .*recursion lim") as caught:
        summarize(deep(20_000))
    assert isinstance(caught.value.__cause__, RecursionError)
    assert len(summarize(nn.Linear(2, 2))) == 2


def test_a_recursion_error_of_a_module_itself_is_not_changed(backend):
    class Endless(nn.Linear):
        def named_parameters(self, *args, **kwargs):
            return self.named_parameters(*args, **kwargs)

    with pytest.raises(RecursionError, match=r"^maximum recursion depth"):
        summarize(Endless(2, 2))


@pytest.mark.parametrize("fsdp", [False, True])
def test_a_thread_with_a_small_stack_can_list_deep_models(native, monkeypatch, fsdp):
    """900 levels, and a cycle, which Python lists; with FSDP imported, its modules are searched."""
    if fsdp:
        importlib.import_module("torch.distributed.fsdp")
    else:
        monkeypatch.delitem(sys.modules, "torch.distributed.fsdp", raising=False)
    found = []
    for model in (deep(900), cycle()):
        run_with_small_stack(lambda m=model: found.append(len(summarize(m))))
    assert found == [2, 2]


def test_fsdp_modules_are_found_while_another_thread_changes_the_model(monkeypatch):

    class Wrapped(nn.Module):
        pass

    fsdp = types.ModuleType("torch.distributed.fsdp")
    fsdp.FSDPModule = Wrapped  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.distributed.fsdp", fsdp)
    model, stop = nn.Module(), threading.Event()
    for i in range(5000):  # enough for a switch of threads during the search
        put(model, str(i), None)
    put(model, "wrapped", Wrapped())

    def change() -> None:
        while not stop.is_set():
            put(model, "more", None)
            sum(range(50))  # threads may switch here
            del model._modules["more"]

    thread = threading.Thread(target=change)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    thread.start()
    try:
        found = [sharding.is_sharded(model, []) for _ in range(100)]
    finally:
        stop.set()
        thread.join()
        sys.setswitchinterval(interval)
    assert all(found)


def test_20_000_modules_are_listed(backend):
    model = nn.Module()
    one = nn.Linear(1, 1)
    for i in range(20_000):
        put(model, str(i), nn.Module() if i % 1000 else one)
    summary = summarize(model)
    assert list(summary) == ["0.weight", "0.bias"]
    assert len(summary["0.bias"].aliases) == 19


def with_new_keys(module: nn.Module) -> None:
    """Replace the attribute names by equal, but not interned strings, as unpickling does."""
    for key in list(module.__dict__):
        module.__dict__["".join(list(key))] = module.__dict__.pop(key)


def with_reversed_attributes(module: nn.Module) -> None:
    items = list(module.__dict__.items())[::-1]
    module.__dict__.clear()
    module.__dict__.update(items)


def test_attributes_in_any_order_and_with_any_keys_are_read_natively(native):
    model = nn.Sequential(*(nn.BatchNorm1d(2) for _ in range(8)))
    with_new_keys(model)
    for i, module in enumerate(model):
        if i % 2:
            with_reversed_attributes(module)
        if i % 4 > 1:
            with_new_keys(module)
    assert list(summarize(model, buffers=True)) == expected_names(model, buffers=True)
    assert native.walk(model, True, lambda *_: None) is not None


@pytest.mark.parametrize("child", [zip, int, 3, threading.Lock], ids=str)
def test_children_that_are_no_modules_are_not_changed(native, child):
    """In CPython 3.12, asking a built-in type for its dictionary would write one into the type."""
    in_type = ctypes.c_void_p.from_address(id(zip) + 33 * ctypes.sizeof(ctypes.c_void_p))  # tp_dict
    before = in_type.value
    model = nn.Sequential(nn.Linear(2, 2))
    put(model, "x", child)
    assert native.walk(model, True, lambda *_: None) is None
    assert in_type.value == before
