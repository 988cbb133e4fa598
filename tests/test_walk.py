"""Names, order, ties and changes of a model: always what `named_parameters()` says."""

from __future__ import annotations

import copy
import ctypes
import gc
import importlib
import json
import sys
import threading
import types
import weakref

import pytest
import torch
from torch import nn

import paramstats
from paramstats._core import shard as sharding
from tests.conftest import in_a_small_thread

summarize = paramstats.summarize


def expected_names(model: nn.Module, buffers: bool = False) -> list[str]:
    names = [name for name, _ in model.named_parameters()]
    return names + ([name for name, _ in model.named_buffers()] if buffers else [])


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


@pytest.mark.parametrize("buffers", [False, True])
def test_names_and_order(backend, buffers):
    model = nn.Sequential(Block(2), nn.Conv2d(1, 2, 3), nn.MultiheadAttention(4, 2))
    assert list(summarize(model, buffers=buffers)) == expected_names(model, buffers)
    assert list(summarize(model, buffers=buffers)) == expected_names(model, buffers)


def test_nested_blocks_by_name(backend):
    model = nn.Sequential(Block(2))
    name = "0.inner.a.inner.a.linear.weight"
    entry = summarize(model)[name]
    assert entry.mean == pytest.approx(model.get_parameter(name).mean().item(), abs=1e-6)
    assert next(iter(summarize(model, include=r"inner\.a\.inner\.a\.linear"))) == name


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
def test_a_changed_model_is_noticed(backend, change):
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
    assert (
        list(before) == names and json.dumps(before.to_dict()) == snapshot
    )  # a summary is a snapshot


def test_an_unchanged_model_keeps_its_layout(native):
    model = nn.Sequential(Block(1))
    assert summarize(model)._layout is summarize(model)._layout
    assert summarize(model, include="linear")._layout is summarize(model, include="linear")._layout


def layouts_left(native) -> int:
    gc.collect()  # models that other tests left
    return native.native.cached_layouts()


def test_layouts_go_with_their_model(native):
    before = layouts_left(native)
    model = nn.Sequential(Block(1))
    summarize(model)
    summarize(model, buffers=True)
    assert native.native.cached_layouts() == before + 2
    alive = weakref.ref(model)
    del model
    gc.collect()
    assert alive() is None and native.native.cached_layouts() == before


def test_models_whose_class_knows_them_go_too(native):
    """A parametrized module's class reaches the module: a cycle that the cache must not root."""

    def parametrized():
        return nn.utils.parametrizations.weight_norm(nn.Linear(3, 2))

    def closure():
        class Own(nn.Module):
            def __init__(self):
                super().__init__()
                self.w = nn.Parameter(torch.ones(2))

            def forward(self):
                return model

        model = Own()
        return model

    before = layouts_left(native)
    for make in (parametrized, closure):
        model = make()
        summarize(model)
        alive = weakref.ref(model)
        del model
        gc.collect()
        assert alive() is None
    assert native.native.cached_layouts() == before


@pytest.fixture
def collector():
    """Passes over what other tests have imported and kept; afterwards it is what it was."""
    thresholds = gc.get_threshold()
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
    gc.set_threshold(*thresholds)
    gc.enable()


def test_the_garbage_collector_may_run_at_any_time(native, collector):
    """A finalizer that empties the model, at every allocation that can set the collector off."""

    class Evil:
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
            Evil(model)
            gc.set_threshold(threshold, 10, 10)
            gc.enable()
            summarize(model)
            gc.disable()


def test_overrides_after_the_first_call_are_noticed(backend):
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


def test_modules_shared_within_shared_modules_end(backend):
    """2^24 paths lead to the leaf."""
    model = nn.Linear(2, 2)
    for _ in range(24):
        model = nn.Sequential(model, model)
    assert list(summarize(model)) == expected_names(model)


def test_templates_and_selections_do_not_pile_up(backend):
    model = nn.Linear(2, 2)
    layout = summarize(model)._layout
    for i in range(100):
        summary = summarize(model, include=f"weight|{i}")
        summary.scalars(key=f"{i}/{{kind}}_{{stat}}/{{name}}")
    assert len(layout._selections) <= 16 and len(summary._layout._keys) <= 16


def test_many_models_come_and_go(native):
    before = layouts_left(native)
    for i in range(200):
        model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1 + i % 3))
        assert list(summarize(model)) == expected_names(model)
    del model
    gc.collect()
    assert native.native.cached_layouts() == before


def test_references_stay_where_they_were(native):
    model = nn.Linear(3, 3)
    summarize(model)
    counted = [model, model.weight, model._parameters, type(model)]
    before = [sys.getrefcount(o) for o in counted]
    for _ in range(100):
        summarize(model)
    assert [sys.getrefcount(o) for o in counted] == before


class Doubled(nn.Linear):
    """Lists itself in a way of its own."""

    def named_parameters(self, *args, **kwargs):
        for name, p in super().named_parameters(*args, **kwargs):
            yield f"mine.{name}", p


class Listed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.child = nn.Linear(2, 2)

    def named_modules(self, memo=None, prefix="", remove_duplicate=True):
        yield prefix, self
        yield prefix + ("." if prefix else "") + "other", self.child


@pytest.mark.parametrize("cls", [lambda: Doubled(3, 2), Listed, lambda: nn.Sequential(Listed())])
def test_classes_that_list_themselves_are_asked(backend, cls):
    model = cls()
    assert list(summarize(model)) == expected_names(model)
    assert list(summarize(model)) == expected_names(model)


def test_an_instance_that_lists_itself_is_asked(backend):
    model = nn.Linear(3, 2)
    weight = model.weight
    model.named_parameters = lambda **_: iter([("only", weight)])
    assert list(summarize(model)) == ["only"]


def test_scripted_and_wrapped_models(backend):
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
    scripted = torch.jit.script(model)
    assert list(summarize(scripted)) == expected_names(scripted)
    parallel = nn.DataParallel(model)
    assert list(summarize(parallel)) == expected_names(model)
    nn.utils.parametrizations.weight_norm(model[0])
    assert list(summarize(model)) == expected_names(model)


def test_a_cycle_of_modules_ends(backend):
    model = nn.Sequential(nn.Linear(2, 2))
    model[0].parent = model
    assert list(summarize(model)) == ["0.weight", "0.bias"]


def test_deep_nesting(backend):
    model = nn.Linear(2, 2)
    for _ in range(150):
        model = nn.Sequential(model)
    assert list(summarize(model)) == expected_names(model)


def test_modules_without_hash_or_equality(native):  # torch's own listing needs the hash
    class Odd(nn.Linear):
        __hash__ = None

        def __eq__(self, other):
            raise AssertionError("compared")

    assert list(summarize(Odd(2, 2))) == ["weight", "bias"]


def test_copies_have_layouts_of_their_own(backend):
    model = nn.Sequential(nn.Linear(2, 2))
    summarize(model)
    other = copy.deepcopy(model)
    other[0].bias.data.fill_(3)
    assert summarize(other)["0.bias"].mean == 3.0 != summarize(model)["0.bias"].mean


# ---- modules that nobody should write: found by the fuzzer -----------------------------------


def put(module: nn.Module, key: object, child: nn.Module | None) -> None:
    module._modules[key] = child  # type: ignore[index]


def test_a_child_without_a_name(backend):
    model = nn.Module()
    put(model, "", nn.Linear(2, 2))
    put(model._modules[""], "", nn.Sequential(nn.Linear(1, 1)))
    put(model._modules[""], "a", nn.Sequential(nn.Linear(1, 1)))
    put(model._modules[""].a, "", nn.Linear(1, 1))
    assert list(summarize(model)) == expected_names(model)


def test_keys_that_are_more_than_strings(backend):
    class Rewriting(str):
        def __radd__(self, other):
            return f"{other}rewritten"

    model = nn.Sequential(nn.Linear(2, 2))
    model[0]._parameters[Rewriting("w")] = nn.Parameter(torch.ones(1))
    assert list(summarize(model)) == expected_names(model)
    assert list(summarize(model))[-1] == "0.rewritten"


def test_a_key_does_not_keep_its_model(native):
    class Owning(str):
        pass

    model = nn.Linear(2, 2)
    key = Owning("w")
    key.model = model
    model._parameters[key] = nn.Parameter(torch.ones(1))
    summarize(model)
    alive = weakref.ref(model)
    del model, key
    gc.collect()
    assert alive() is None


@pytest.mark.parametrize("kind", ["_parameters", "_modules", "_buffers"])
def test_a_property_of_the_class_comes_before_the_instance(backend, kind):
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
def test_a_parameter_that_is_no_tensor(backend, value):
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
def test_a_module_that_lists_nonsense(backend, listed, message):
    model = nn.Linear(2, 2)
    model.named_parameters = lambda **_: iter(listed)
    with pytest.raises(TypeError, match=f"^paramstats.summarize: .*{message}"):
        summarize(model)


def test_two_tensors_of_one_name(backend):
    model = nn.Module()
    model.a = nn.Module()
    model.a.b = nn.Parameter(torch.zeros(1))
    model._parameters["a.b"] = nn.Parameter(torch.ones(1))
    with pytest.raises(ValueError, match=r"every name once, got 'a\.b' for two tensors"):
        summarize(model)
    model._parameters["a.b"] = model.a.b
    assert list(summarize(model)) == ["a.b"]


def test_an_attribute_whose_comparison_changes_the_model(native):
    """Looking `_modules` up would compare it, and run its code, in the middle of the walk."""
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


def test_the_collector_does_not_run_while_the_tree_is_read(native, collector):
    """Modules that were never asked for their __dict__ have it made then: an allocation."""
    found = []

    class Evil:
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
        Evil(model)
        gc.set_threshold(threshold, 10, 10)
        gc.enable()
        found.append(native.walk(model, False, lambda module, names, *_: len(names)))
        gc.disable()
        assert gc.get_count()[0] >= 0
    assert all(len(tensors) == layout for layout, tensors in found)


def test_the_collector_is_left_as_it_was(native):
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


def test_5000_levels(native):
    assert [len(name) for name in summarize(deep(5000))] == [2 * 5000 + 6, 2 * 5000 + 4]


def test_too_many_levels_for_python_are_an_error(backend):
    with pytest.raises(RecursionError, match=r"^paramstats.summarize: .*recursion limit"):
        summarize(deep(20_000))
    assert len(summarize(nn.Linear(2, 2))) == 2


def test_a_recursion_of_a_modules_own_is_what_it_raised(backend):
    class Endless(nn.Linear):
        def named_parameters(self, *args, **kwargs):
            return self.named_parameters(*args, **kwargs)

    with pytest.raises(RecursionError, match=r"^maximum recursion depth"):
        summarize(Endless(2, 2))


def test_the_cause_of_too_many_levels_is_kept(backend):
    with pytest.raises(RecursionError, match=r"^paramstats.summarize: ") as caught:
        summarize(deep(20_000))
    assert isinstance(caught.value.__cause__, RecursionError)


@pytest.mark.parametrize("fsdp", [False, True])
def test_a_small_stack_is_enough(native, monkeypatch, fsdp):
    """Of a thread: 900 levels; a cycle, which is left to Python; also where FSDP is looked for."""
    if fsdp:
        importlib.import_module("torch.distributed.fsdp")
    else:
        monkeypatch.delitem(sys.modules, "torch.distributed.fsdp", raising=False)
    cycle = nn.Sequential(nn.Linear(2, 2))
    put(cycle[0], "up", cycle)
    found = []
    for model in (deep(900), cycle):
        in_a_small_thread(lambda m=model: found.append(len(summarize(m))))
    assert found == [2, 2]


def test_fsdp_is_found_while_another_thread_changes_the_model(monkeypatch):
    """What is wrapped is in the model all the time; other modules come and go."""

    class Wrapped(nn.Module):
        pass

    fsdp = types.ModuleType("torch.distributed.fsdp")
    fsdp.FSDPModule = Wrapped  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.distributed.fsdp", fsdp)
    model, stop = nn.Module(), threading.Event()
    for i in range(5000):  # long enough to be looked through for threads to take turns meanwhile
        put(model, str(i), None)
    put(model, "wrapped", Wrapped())

    def change() -> None:
        while not stop.is_set():
            put(model, "more", None)
            sum(range(50))  # a place to be interrupted at
            del model._modules["more"]

    thread = threading.Thread(target=change)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    thread.start()
    try:
        found = [sharding.is_sharded(model, []) for _ in range(300)]
    finally:
        stop.set()
        thread.join()
        sys.setswitchinterval(interval)
    assert all(found)


def test_100_000_modules(backend):
    model = nn.Module()
    one = nn.Linear(1, 1)
    for i in range(100_000):
        put(model, str(i), nn.Module() if i % 1000 else one)
    summary = summarize(model)
    assert list(summary) == ["0.weight", "0.bias"]
    assert len(summary["0.bias"].aliases) == 99


def test_unpickled_dictionaries_are_read_natively(native):
    """Their keys are strings of their own, not those that a module's code holds."""
    model = nn.Sequential(nn.Linear(2, 2))
    for module in model.modules():
        for key in list(module.__dict__):
            module.__dict__["".join(list(key))] = module.__dict__.pop(key)
    assert native.walk(model, True, lambda *_: None) is not None
    assert list(summarize(model)) == expected_names(model)


def reversed_attributes(module: nn.Module) -> None:
    items = list(module.__dict__.items())[::-1]
    module.__dict__.clear()
    module.__dict__.update(items)


def test_attributes_in_any_order_are_read_natively(native):
    """Beside each other: own strings and the interpreter's, in both orders."""
    model = nn.Sequential(*(nn.BatchNorm1d(2) for _ in range(8)))
    for i, module in enumerate(model):
        if i % 2:
            reversed_attributes(module)
        if i % 4 > 1:
            for key in list(module.__dict__):
                module.__dict__["".join(list(key))] = module.__dict__.pop(key)
    assert list(summarize(model, buffers=True)) == expected_names(model, buffers=True)
    assert native.walk(model, True, lambda *_: None) is not None


@pytest.mark.parametrize("child", [zip, int, 3, object()], ids=str)
def test_children_that_are_no_modules_stay_as_they_are(native, child):
    """CPython 3.12 keeps a built-in type's attributes elsewhere: asked for its dictionary in
    general, it writes a new one into the type."""
    in_type = ctypes.c_void_p.from_address(id(zip) + 33 * ctypes.sizeof(ctypes.c_void_p))  # tp_dict
    before = in_type.value
    model = nn.Sequential(nn.Linear(2, 2))
    put(model, "x", child)
    assert native.walk(model, True, lambda *_: None) is None
    assert in_type.value == before


def test_children_that_raise_when_they_are_listed(backend):
    class Raising(dict):
        def values(self):
            raise OSError("no values")

    model = nn.Linear(2, 2)
    model.__dict__["_modules"] = Raising()
    assert list(summarize(model)) == expected_names(model)


def test_modules_that_torch_calls_equal_are_two(backend):
    class Equal(nn.Linear):
        def __eq__(self, other):
            return True

        def __hash__(self):
            return 1

    model = nn.Sequential(Equal(1, 1), Equal(1, 1))
    assert len(summarize(model)) == 4
