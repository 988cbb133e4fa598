"""Tell the tensors of a model from those of an optimizer and from all others, by their names."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence

from paramstats.checkpoints._stored_tensors import Group, StoredTensor

_OPTIMIZER = frozenset({"optimizer", "optimizers", "optim", "optims", "opt"})
_IN_OPTIMIZER = frozenset(
    {"state", "states", "param_groups", "param_states", "state_dict", "optimizer", "param_state"}
)
_STATE_KEYS = frozenset(
    {"exp_avg", "exp_avg_sq", "exp_avg_sq_row", "exp_avg_sq_col", "exp_avg_diff", "exp_inf"}
    | {"max_exp_avg_sq", "momentum_buffer", "square_avg", "acc_delta", "grad_avg"}
)
"""Keys of `torch.optim` and others, which no parameter of a model has."""

_PARAMETERS = frozenset({"weight", "bias"})
_MODEL = frozenset(
    {"model", "models", "module", "dict", "net", "network", "params", "weights"}
    | {"generator", "discriminator", "student", "teacher", "policy", "actor", "critic"}
)
"""Words in the keys of a training checkpoint that hold a model."""

_NOT_A_MODEL = frozenset(
    {"scheduler", "schedulers", "callback", "callbacks", "loop", "loops", "metric", "metrics"}
    | {"scaler", "sampler", "dataloader", "dataloaders", "datamodule", "hub", "trainer", "args"}
    | {"hyper", "hparams", "config", "history"}
)
"""Words in the keys of a training checkpoint that hold neither a model nor an optimizer."""

_GENERATOR_BYTES = 5056
"""Size of the state of torch's generator for the CPU."""

_COUNTERS = frozenset({"step", "steps", "epoch", "epochs", "iter", "iteration", "iterations"})
_SCORES = frozenset({"best", "loss", "score", "fitness"})
_AVERAGES = frozenset({"ema", "swa", "averaged"})

_MAX_DEPTH = 8
"""Keys to the state of an optimizer."""

_CAMEL_CASE = re.compile("(?<=[a-z])(?=[A-Z])")

_Path = tuple[str, ...]


def assign_groups(tensors: Sequence[StoredTensor]) -> list[StoredTensor]:
    """Return the tensors of a checkpoint, each with its group.

    A group other than "model" is kept. A tensor under several names is of the model if one of its
    names is. A moving average of the model (EMA) is "other" if the model is there as well, which is
    to say that most of its shapes are among those of the model.
    """
    paths = [[_path(name) for name in t.names] for t in tensors]
    states = {state for several in paths for path in several if (state := _state_of(path))}
    ends = {len(state) for state in states}

    def is_of_optimizer(path: _Path) -> bool:
        return _is_of_optimizer(path) or any(path[:end] in states for end in ends)

    groups: list[Group] = [
        "optimizer" if t.group == "model" and all(map(is_of_optimizer, path)) else t.group
        for t, path in zip(tensors, paths, strict=True)
    ]

    def move(test: Callable[[_Path, StoredTensor], bool]) -> None:
        for i, (t, path) in enumerate(zip(tensors, paths, strict=True)):
            if groups[i] == "model" and all(test(p, t) for p in path):
                groups[i] = "other"

    move(_is_random_state)
    move(lambda path, _: path[-1] == "num_batches_tracked")  # a count, not a weight
    tops = {path[0] for several in paths for path in several}
    if "optimizer" in groups or any(_MODEL & _words(top) for top in tops):
        move(_is_not_of_a_model)
    averages = {i for i, path in enumerate(paths) if all(map(_is_average, path))}
    shapes = {t.shape for i, t in enumerate(tensors) if groups[i] == "model" and i not in averages}
    if 2 * sum(tensors[i].shape in shapes for i in averages) > len(averages):
        move(lambda path, _: _is_average(path))
    return [
        t if t.group == group else t._replace(group=group)
        for t, group in zip(tensors, groups, strict=True)
    ]


def _path(name: str) -> _Path:
    """Return the keys of nested containers. Those of Megatron have slashes as well.

    "optimizerG" becomes "optimizer_g".
    """
    return tuple(re.split("[./]", _CAMEL_CASE.sub("_", name).lower()))


def _words(key: str) -> set[str]:
    """Return the words of a key, such as {"model", "ema"}; "model0" counts as "model"."""
    return {word.rstrip("0123456789") or word for word in key.split("_")}


def _state_of(path: _Path) -> _Path | None:
    """Return the path of an optimizer's states if a key says that this is one of them.

    All that is there is of the optimizer then, under any name: "sgd.state.0.step" as well, if there
    is "sgd.state.0.momentum_buffer".
    """
    is_state = 3 < len(path) <= _MAX_DEPTH and path[-3] == "state" and path[-1] in _STATE_KEYS
    return path[:-2] if is_state else None


def _is_of_optimizer(path: _Path) -> bool:
    """Return whether a name is that of an optimizer's state, also in a file of this alone."""
    if not _STATE_KEYS.isdisjoint(path):
        return True
    if path[0] == "state" and len(path) > 2 and path[1].isdigit():
        return path[-1] not in _PARAMETERS  # of a module that is called "state"
    last_state = max((i for i, key in enumerate(path) if key in _IN_OPTIMIZER), default=-1)
    for i, key in enumerate(path[:-1]):
        words = _words(key)
        if _OPTIMIZER.isdisjoint(words):
            continue
        if i < last_state or key.endswith(("state", "states", "state_dict", "states_dict")):
            return True
        # At the top level, "optimizer.x" is of an optimizer, "optimizer.weight" of a model.
        if i == 0 and words <= _OPTIMIZER - {"opt"} and path[-1] not in _PARAMETERS:
            return True
    return False


def _is_random_state(path: _Path, tensor: StoredTensor) -> bool:
    """Return whether it is the state of a random number generator."""
    words = [_words(key) for key in path]
    if any("rng" in one or {"random", "state"} <= one or "seed" in one for one in words):
        return True
    is_bytes = tensor.dtype.itemsize == 1 and len(tensor.shape) == 1
    if is_bytes and tensor.shape[0] == _GENERATOR_BYTES:
        return True
    return is_bytes and path[0] in ("cpu", "cuda") and len(path) <= 2


def _is_not_of_a_model(path: _Path, tensor: StoredTensor) -> bool:
    """Return whether it is something else that a training checkpoint contains."""
    words = _words(path[0])
    if len(path) == 1:
        is_scalar = math.prod(tensor.shape) == 1
        return is_scalar and not (_COUNTERS | _SCORES).isdisjoint(words)
    return not _NOT_A_MODEL.isdisjoint(words)


def _is_average(path: _Path) -> bool:
    """Return whether it is in a moving average, such as "ema" or "state_dict.model_ema"."""
    for i, key in enumerate(path[:2]):
        words = key.split("_")
        if len(path) > i + 1 and not _AVERAGES.isdisjoint((words[0], words[-1])):
            return True
        if _MODEL.isdisjoint(_words(key)):
            break
    return False
