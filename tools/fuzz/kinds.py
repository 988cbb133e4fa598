"""The native functions that take tensors: any kind of tensor and gradient, plain or not.

What is plain is computed here from what torch reports in Python. `read` must read plain tensors and
return all others, the same objects. A layout that `walk` has cached must describe the tensors as
they are, and `metadata` must be that of torch.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import paramstats
from paramstats._core import backend as backends
from paramstats._core import torch_abi
from paramstats._core.moments import ABSENT, ROW, row
from paramstats._summary import record_of
from tests.dtypes import DTYPES, FLOATS
from tests.oracle import check_exact, exact, stats_of
from tools.fuzz.elements import random_tensor
from tools.fuzz.modules import BACKENDS
from tools.fuzz.summaries import Subclass

READS = 100
"""Calls of `read` per case: other tensors of the case, in another order."""

REFUSED = (RuntimeError, AttributeError, TypeError, ValueError, NotImplementedError)
"""Exceptions of torch where a tensor cannot be made or changed."""

Tensor = torch.Tensor
NATIVE = BACKENDS[0].native
AUTOGRAD = torch_abi._keys(torch_abi._AUTOGRAD_KEYS)
PLAIN = torch_abi._keys_of(torch.empty(1)) & ~AUTOGRAD


class WithDispatch(torch.Tensor):
    """A subclass whose operators are Python code."""

    @staticmethod
    def __new__(cls, inner: Tensor, **options: Any) -> WithDispatch:
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, **options)

    def __init__(self, inner: Tensor, **_: Any) -> None:
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        inner = [a.inner if isinstance(a, cls) else a for a in args]
        return func(*inner, **(kwargs or {}))


class WithFunction(torch.Tensor):
    """A subclass that sees functions of torch."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        return super().__torch_function__(func, types, args, kwargs)


# ---- tensors ------------------------------------------------------------------------------------


def strided(rng: random.Random) -> Tensor:
    x = random_tensor(rng, rng.randrange(60), rng.choice(DTYPES))
    return x if rng.random() < 0.7 else rng.choice(VIEWS)(rng, x)


def floats(rng: random.Random) -> Tensor:
    return random_tensor(rng, rng.randrange(40), rng.choice(FLOATS[:4]))


VIEWS: list[Callable[[random.Random, Tensor], Tensor]] = [
    lambda rng, x: x[..., ::2] if x.dim() else x,
    lambda rng, x: x.flatten()[rng.randrange(3) :],
    lambda rng, x: x.mT if x.dim() > 1 else x,
    lambda rng, x: x.unsqueeze(0).expand(rng.randrange(3), *x.shape),
    lambda rng, x: x.flatten().unfold(0, 2, 1) if x.numel() > 2 else x,
    lambda rng, x: x.flatten()[:3].as_strided((2, 2), (0, 1)) if x.numel() > 2 else x,
    lambda rng, x: x.detach().view_as(x),
    lambda rng, x: x.data,
]


def resized(rng: random.Random) -> Tensor:
    """The storage is freed, smaller or larger than it was."""
    x = torch.ones(rng.randrange(1, 40), dtype=rng.choice(FLOATS))
    x = x[rng.randrange(3) :] if rng.random() < 0.5 else x
    x.untyped_storage().resize_(rng.choice((0, 1, 16, x.numel() * x.itemsize, 1000)))
    return x


def beyond_storage(rng: random.Random) -> Tensor:
    far = rng.choice((2, 10, 1 << 40, 1 << 61, (1 << 62) + 1))
    strides = rng.choice(((far, 1), (1, far), (0, far), (1, 1)))
    make = torch._C._dynamo.guards._reinterpret_tensor
    return make(torch.ones(7), (2, rng.randrange(4)), strides, rng.choice((0, 5, far)))


def nonleaf(rng: random.Random) -> Tensor:
    leaf = floats(rng).requires_grad_()
    x = leaf * 2
    if rng.random() < 0.7:
        x.retain_grad()
    x.sum().backward()
    return rng.choice((x, x, leaf, x.detach()))


def made_in_inference_mode(rng: random.Random) -> Tensor:
    with torch.inference_mode():
        x = torch.ones(rng.randrange(5), dtype=rng.choice(DTYPES))
        return x[1:] if rng.random() < 0.5 else x


def fake(rng: random.Random) -> Tensor:
    with FakeTensorMode():
        return torch.ones(rng.randrange(5))


def symbolic(rng: random.Random) -> Tensor:
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    return FakeTensorMode(shape_env=ShapeEnv(), static_shapes=False).from_tensor(torch.ones(5, 7))


def wrapper(rng: random.Random) -> Tensor:
    options = rng.choice(({}, {"requires_grad": True}, {"dispatch_sizes_strides_policy": "sizes"}))
    return WithDispatch(floats(rng), **options)


def complex_(rng: random.Random) -> Tensor:
    x = torch.randn(rng.randrange(5), dtype=rng.choice((torch.cfloat, torch.cdouble)))
    return rng.choice((x, x.conj(), x.real, x.imag, x.conj().imag, x.conj().real, -x.conj().imag))


def sparse(rng: random.Random) -> Tensor:
    x = torch.eye(rng.randrange(2, 5))
    return rng.choice((x.to_sparse, x.to_sparse_csr, x.to_sparse_csc))()


def quantized(rng: random.Random) -> Tensor:
    x = torch.rand(rng.randrange(1, 9))
    if rng.random() < 0.5:
        return torch.quantize_per_tensor(x, 0.1, 3, rng.choice((torch.qint8, torch.quint8)))
    scales, zeros = torch.rand(x.numel()) + 0.1, torch.zeros(x.numel())
    return torch.quantize_per_channel(x, scales, zeros, 0, torch.qint8)


def nested(rng: random.Random) -> Tensor:
    parts = [torch.ones(rng.randrange(1, 4)) for _ in range(2)]
    layout = rng.choice((torch.strided, torch.jagged))
    return torch.nested.nested_tensor(parts, layout=layout)


def other_dtype(rng: random.Random) -> Tensor:
    names = ("float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu", "bits8", "float4_e2m1fn_x2")
    dtype = getattr(torch, rng.choice(names))
    return torch.ones(4, dtype=torch.uint8).view(dtype)


def parameter(rng: random.Random) -> Tensor:
    return nn.Parameter(floats(rng), requires_grad=rng.random() < 0.8)


KINDS: list[Callable[[random.Random], Tensor]] = [
    *([strided] * 6),
    *([parameter] * 4),
    *(resized, resized, beyond_storage, nonleaf, nonleaf, made_in_inference_mode),
    *(wrapper, complex_, complex_, sparse, quantized, nested, other_dtype),
    lambda rng: fake(rng) if rng.random() < 0.99 else symbolic(rng),
    lambda rng: floats(rng).as_subclass(rng.choice((Subclass, WithFunction))),
    lambda rng: torch._lazy_clone(floats(rng)),
    lambda rng: torch.empty(rng.randrange(5), 2, device="meta"),
    lambda rng: torch.ones(3).to_mkldnn(),
    lambda rng: torch._efficientzerotensor(rng.randrange(1, 4)),
    lambda rng: torch._to_functional_tensor(torch.ones(3)),
    lambda rng: torch._neg_view(floats(rng)),
    lambda rng: torch.ones(3).rename("n"),
    lambda rng: nn.LazyLinear(3).weight,
    lambda rng: torch.ones(3).share_memory_(),
]
"""Tensors of every kind; some kinds are not in every version of torch."""


# ---- gradients ----------------------------------------------------------------------------------


def set_gradient(rng: random.Random, tensor: Tensor) -> None:
    """Set a gradient, perhaps one that torch would not make."""
    gradient = rng.choice(GRADIENTS)(rng, tensor)
    tensor.grad = gradient
    if rng.random() < 0.2:
        set_data(gradient, strided(rng))  # other sizes and another dtype
    if rng.random() < 0.1:
        set_data(tensor, floats(rng))


GRADIENTS: list[Callable[[random.Random, Tensor], Tensor]] = [
    lambda rng, x: torch.ones_like(x),
    lambda rng, x: torch.ones((), dtype=x.dtype).expand(x.shape),
    lambda rng, x: x.detach(),
    lambda rng, x: torch.ones_like(x).to_sparse(),
    lambda rng, x: torch._lazy_clone(torch.ones_like(x)),
    lambda rng, x: WithDispatch(torch.ones_like(x.detach())),
    lambda rng, x: torch.ones_like(x).as_subclass(Subclass),
    lambda rng, x: torch.ones_like(x).requires_grad_(),
    lambda rng, x: torch._neg_view(torch.ones_like(x)),
    lambda rng, x: torch.empty_like(x, device="meta"),
    lambda rng, x: torch._efficientzerotensor(x.shape, dtype=x.dtype),
]


def random_entry(rng: random.Random) -> Tensor:
    try:
        tensor = rng.choice(KINDS)(rng)
    except REFUSED:
        return torch.ones(2)  # this torch has no such tensor
    if rng.random() < 0.5 and not tensor.is_quantized:  # torch crashes for one without a scale
        try:
            set_gradient(rng, tensor)
        except REFUSED:
            return tensor
    if rng.random() < 0.05 and tensor.grad is not None:
        free(tensor.grad)
    return tensor


def set_data(tensor: Tensor, data: Tensor) -> None:
    if is_strided(tensor):  # torch crashes for some of the others
        tensor.data = data


def set_(tensor: Tensor, source: Tensor) -> None:
    if is_strided(tensor):
        tensor.detach().set_(source.to(tensor.dtype))


def free(tensor: Tensor) -> None:
    if is_strided(tensor) and tensor.untyped_storage().resizable():
        tensor.untyped_storage().resize_(0)


# ---- what the results must be -------------------------------------------------------------------


def is_strided(tensor: Tensor) -> bool:
    """Whether a tensor has the dispatch keys of a plain one."""
    return torch_abi._keys_of(tensor) & ~AUTOGRAD == PLAIN


def is_plain(tensor: Tensor) -> bool:
    """Whether the native module must read a tensor."""
    if not is_strided(tensor) or tensor.dtype not in DTYPES:
        return False
    with torch._C.DisableTorchFunctionSubclass():
        if tensor.numel() == 0:
            return True
        pairs = zip(tensor.shape, tensor.stride(), strict=True)
        last = tensor.storage_offset() + sum((n - 1) * s for n, s in pairs)
        return (last + 1) * tensor.itemsize <= tensor.untyped_storage().nbytes()


def is_lazy(tensor: Tensor) -> bool:
    if type(tensor) in (Tensor, nn.Parameter) or not is_strided(tensor):
        return False
    with torch._C.DisableTorchFunctionSubclass():
        return tensor.numel() == 0


class Expected:
    """A tensor of a case, and what must be read of it and of its gradient."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        has_grad = tensor.is_leaf or tensor.retains_grad
        self.grad = tensor.grad if has_grad else None
        self.is_read = is_plain(tensor) and not is_lazy(tensor)
        self.grad_is_read = self.grad is not None and is_plain(self.grad)
        self.rows: dict[bool, bytes] = {}

    def check(self, is_grad: bool, state: bytes) -> None:
        """Compare the first state with exact arithmetic, and others with the first."""
        if is_grad not in self.rows:
            tensor = self.grad if is_grad else self.tensor
            assert tensor is not None
            is_exact = type(tensor) is Tensor
            plain = tensor.detach() if is_exact else tensor.detach().as_subclass(Tensor)
            was_lazy = torch._C._is_cow_tensor(plain)
            check_exact(stats_of(row(state, 0)), exact(plain.clone()))
            assert torch._C._is_cow_tensor(plain) == was_lazy
            self.rows[is_grad] = state
        assert state == self.rows[is_grad]


def check_read(entries: list[Expected], params: bool, grads: bool) -> None:
    table, deferred, transfers, *_ = NATIVE.read([e.tensor for e in entries], params, grads)
    n = len(entries)
    assert len(table) == 2 * n * ROW.size and not transfers
    expected: list[tuple[int, Tensor]] = []
    for i, entry in enumerate(entries):
        if not params and is_strided(entry.tensor):
            with torch._C.DisableTorchFunctionSubclass():
                assert row(table, i).count == entry.tensor.numel()
        elif params and entry.is_read:
            entry.check(False, table[i * ROW.size : (i + 1) * ROW.size])
        else:
            expected.append((i, entry.tensor))
        if not grads or entry.grad is None:
            assert row(table, n + i).count == ABSENT
        elif entry.grad_is_read:
            entry.check(True, table[(n + i) * ROW.size : (n + i + 1) * ROW.size])
        else:
            expected.append((n + i, entry.grad))
    assert len(deferred) == len(expected), (deferred, expected)
    for (index, tensor), (expected_index, expected_tensor) in zip(deferred, expected, strict=True):
        assert index == expected_index and tensor is expected_tensor


def check_backends(entries: list[Expected]) -> None:
    """Deferred tensors have the same statistics, or the same reasons, with both backends."""
    source = [(str(i), entry.tensor) for i, entry in enumerate(entries)]
    results = []
    for backend in BACKENDS:
        backends._active = backend
        try:
            record = record_of(paramstats.summarize(source))
            results.append((record.table, record.skipped))
        except Exception as error:
            results.append((type(error), str(error)))
    backends._active = BACKENDS[0]
    (native, skipped), (reference, other_skipped) = results
    assert type(native) is type(reference), results
    if not isinstance(native, bytes):
        assert results[0] == results[1]
        return
    n = len(entries)
    for i, entry in enumerate(entries):
        parts = (
            (str(i), i, entry.is_read),
            (f"{i} (gradient)", n + i, entry.grad is None or entry.grad_is_read),
        )
        for name, at, is_read in parts:
            if not is_read:  # torch operators refuse some that the native module reads
                assert skipped.get(name) == other_skipped.get(name), name
                state = slice(at * ROW.size, (at + 1) * ROW.size)
                assert native[state] == reference[state], (row(native, at), row(reference, at))


def check_metadata(tensor: Tensor) -> None:
    cow = torch._C._is_cow_tensor(tensor) if is_strided(tensor) else True
    if cow or type(tensor) not in (Tensor, nn.Parameter):  # asking torch would copy, or run code
        return
    if tensor._grad is not None and not (tensor.is_leaf or tensor.retains_grad):
        return
    if tensor.numel() == 0 or is_plain(tensor) or tensor.is_complex():
        torch_abi._check_metadata(NATIVE, tensor)


# ---- walks --------------------------------------------------------------------------------------


def described(tensors: list[Tensor]) -> list[Any]:
    shapes = [None if nn.parameter.is_lazy(t) else tuple(t.shape) for t in tensors]
    pairs = zip(tensors, shapes, strict=True)
    return [(type(t), t.dtype, t.device, shape, t.requires_grad) for t, shape in pairs]


def check_walks(rng: random.Random, entries: list[Expected]) -> int:
    """List a module whose parameters change between the calls."""
    module = nn.Module()
    module._modules["child"] = nn.Module()
    for i, entry in enumerate(entries):
        chosen = rng.choice((module, module._modules["child"]))
        chosen._parameters[str(i)] = entry.tensor  # type: ignore[index, assignment]
    for _ in range(3):
        found = NATIVE.walk(module, False, lambda *arguments: described(arguments[-1]))
        if found is not None:
            layout, tensors = found
            listed = [*module._parameters.values(), *module._modules["child"]._parameters.values()]
            assert [id(t) for t in tensors] == [id(t) for t in dict.fromkeys(listed)]
            assert layout == described(tensors), (layout, described(tensors))
        tensor = rng.choice(entries).tensor
        try:
            rng.choice(CHANGES)(rng, tensor)
        except REFUSED:
            continue
    return 3


CHANGES: list[Callable[[random.Random, Tensor], object]] = [
    lambda rng, x: x.requires_grad_(not x.requires_grad),
    lambda rng, x: set_data(x, strided(rng)),
    lambda rng, x: set_data(x, floats(rng)),
    lambda rng, x: set_(x, strided(rng)),
    lambda rng, x: x.unsqueeze_(0) if is_strided(x) else x,
    lambda rng, x: x.squeeze_(0) if is_strided(x) else x,
    lambda rng, x: setattr(x, "__class__", Subclass) if type(x) is nn.Parameter else x,
]


# ---- tensors of functorch -----------------------------------------------------------------------


def check_wrapped(rng: random.Random) -> int:
    """Within a transform of functorch, wrapped tensors are deferred."""
    calls, other = 0, torch.ones(2)

    def function(x: Tensor) -> Tensor:
        nonlocal calls
        _, deferred, *_ = NATIVE.read([x, other, x], True, True)
        assert [(i, id(t)) for i, t in deferred] == [(0, id(x)), (2, id(x))]
        module = nn.Module()
        module._parameters["x"] = x  # type: ignore[assignment]
        found = NATIVE.walk(module, False, lambda *arguments: described(arguments[-1]))
        assert found is None or found[1][0] is x
        calls += 2
        return (x * 2).sum()

    transforms: list[Callable[[Any], Any]] = [torch.vmap, torch.func.grad]
    transforms.append(lambda f: lambda x: torch.func.jvp(f, (x,), (x,)))
    transforms.append(torch.func.functionalize)
    transform = rng.choice(transforms)
    if rng.random() < 0.3:
        transform(transform(function))(torch.ones(2, 3, 3)) if transform is torch.vmap else (
            torch.vmap(transform(function))(torch.ones(2, 3))
        )
    else:
        transform(function)(torch.ones(2, 3))
    return calls


def run(seed: int) -> int:
    """Runs one case; returns its executions."""
    rng = random.Random(seed)
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if rng.random() < 0.05:
            return check_wrapped(rng)
        entries = [Expected(random_entry(rng)) for _ in range(rng.randrange(1, 6))]
        for _ in range(READS):
            chosen = rng.choices(entries, k=rng.choice((1, 1, 2, 3, 6)))
            check_read(chosen, rng.random() < 0.8, rng.random() < 0.8)
        executions = READS
        for entry in entries:
            check_metadata(entry.tensor)
        if rng.random() < 0.2:
            check_backends(entries)
            executions += 2
        return executions + check_walks(rng, entries)
