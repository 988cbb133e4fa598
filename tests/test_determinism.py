"""States are bitwise equal for any number of threads, on every run, next to any other tensors."""

from __future__ import annotations

import gc
import threading

import pytest
import torch
from torch import nn

import paramstats
from tests import oracle


@pytest.fixture
def tensors() -> list[torch.Tensor]:
    torch.manual_seed(0)
    out = [torch.randn(n) + 0.3 for n in (5, 1023, 131_072, 131_073, 700_001)]
    out += [torch.randn(1200, 900).t(), torch.randn(900, 700)[:, ::2]]
    out += [x.to(torch.bfloat16) for x in out[:5]]
    out[4][3000] = float("nan")
    out += [torch.randn(n) for n in range(200)]  # several to a task of a thread
    return [*out, torch.randn(140_000), torch.empty(0)]


@pytest.fixture
def restore_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_states_do_not_depend_on_threads_runs_or_other_tensors(
    native, tensors, simd_level, restore_threads
):
    extension = native.native
    expected = _states(extension, tensors)
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for _ in range(10):
            assert _states(extension, tensors) == expected
    with_others = [torch.randn(300_000), *tensors, torch.randn(77)]
    assert _states(extension, with_others)[1:-1] == expected
    alone = [_states(extension, [t])[0] for t in tensors]
    assert alone == expected


def test_each_gradient_gets_its_own_row_in_a_long_list(native):
    class Parameter(nn.Parameter):
        pass

    torch.manual_seed(0)
    parameters = [(nn.Parameter, Parameter)[n % 2](torch.randn(n)) for n in range(100)]
    for parameter in parameters[::3]:
        parameter.grad = torch.randn_like(parameter)
    read = native.native.read
    table, deferred, *_ = read(parameters, True, True)
    alone = [read([parameter], True, True) for parameter in parameters]
    row, half = paramstats._core.moments.ROW.size, len(table) // 2
    assert [position for position, _ in deferred] == [n for n, (_, d, _) in enumerate(alone) if d]
    for n, (expected, _, _) in enumerate(alone):
        found = table[n * row : (n + 1) * row] + table[half + n * row : half + (n + 1) * row]
        assert found == expected


def _states(extension, tensors: list[torch.Tensor]) -> list[bytes]:
    table, deferred_rows, *_ = extension.read(tensors, True, False)
    assert not deferred_rows
    size = paramstats._core.moments.ROW.size
    return [table[i * size : (i + 1) * size] for i in range(len(tensors))]


def test_flushing_denormals_changes_no_statistic(native):
    tiny = torch.full((5000,), 2.0**-140)
    tiny[::2] = 2.0**-130
    expected = _states(native.native, [tiny])
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush denormals")
    try:
        assert _states(native.native, [tiny]) == expected
        assert (tiny[:1] * 0.5).item() == 0, "the caller's setting has changed"
    finally:
        torch.set_flush_denormal(False)


def test_many_threads_may_summarize_at_once(native):
    """Four threads summarize two models while a fifth trains a third.

    Gradients of the third are zeroed in place: torch itself crashes if one thread reads `p.grad`
    while the backward of another thread, which does not hold the GIL, replaces it.
    """
    torch.manual_seed(0)
    models = [
        torch.nn.Sequential(torch.nn.Linear(300, 900), torch.nn.Linear(900, n)) for n in (10, 500)
    ]
    for model in models:
        model(torch.randn(4, 300)).sum().backward()
    expected = [paramstats.summarize(m).to_dict() for m in models]
    trained = torch.nn.Sequential(
        torch.nn.Linear(64, 512), torch.nn.ReLU(), torch.nn.Linear(512, 8)
    )
    trained(torch.randn(32, 64)).square().mean().backward()
    stop, failures = threading.Event(), []

    def guarded(work):
        try:
            work()
        except Exception as error:  # raised again by the assertion in the main thread
            failures.append(error)

    def train():
        optimizer = torch.optim.SGD(trained.parameters(), lr=0.01)
        while not stop.is_set():
            optimizer.zero_grad(set_to_none=False)
            trained(torch.randn(32, 64)).square().mean().backward()
            optimizer.step()

    def summarize(which: int):
        for _ in range(40):
            assert paramstats.summarize(models[which]).to_dict() == expected[which]
            summary = paramstats.summarize(trained)  # while it changes
            assert 0 < summary["0.weight"].std < 10

    trainer = threading.Thread(target=guarded, args=(train,))
    readers = [
        threading.Thread(target=guarded, args=(lambda i=i: summarize(i % 2),)) for i in range(4)
    ]
    for thread in (trainer, *readers):
        thread.start()
    for thread in readers:
        thread.join()
    stop.set()
    trainer.join()
    assert not failures, failures
    oracle.check(paramstats.summarize(trained)["0.weight"], trained[0].weight)


def test_many_threads_may_create_and_delete_models(native):
    """Each thread's models enter the cache of layouts and leave it; one model is shared."""
    torch.manual_seed(0)
    shared = torch.nn.Linear(600, 600)  # large enough for several threads
    expected = paramstats.summarize(shared)["weight"].norm
    before = native.native.cached_layouts()
    errors = []

    def work(number: int) -> None:
        for size in range(1, 40):
            model = torch.nn.Sequential(*(torch.nn.Linear(1, 1) for _ in range(size)))
            names = list(paramstats.summarize(model, buffers=number % 2 == 0))
            if len(names) != 2 * size or paramstats.summarize(shared)["weight"].norm != expected:
                errors.append((number, size, names))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    gc.collect()
    assert native.native.cached_layouts() <= before
