"""A share of the clinic (`make clinic` runs it all), and the clinic's own machinery."""

from __future__ import annotations

import pytest

pytest.importorskip("sklearn", reason="scikit-learn is not installed")
pytest.importorskip("transformers", reason="transformers is not installed")

import paramstats
from tests.clinic.__main__ import cases, report
from tests.clinic.judge import judge
from tests.clinic.runner import record, replay
from tests.findings_models import one_thread

__all__ = ["one_thread"]  # a fixture

CASES = {case.name: case for case in cases()}

SICK = (
    "layer of dead ReLUs",
    "layer not in the optimizer",
    "bfloat16 mlp loses updates",
    "mlp adamw lr 3",
    "detached states",
    "hidden and last layer zero",
    "NaN in the loss at step 20",
    "root of zero in a convolution",
    "12 sigmoid layers",
    "init std 1e-3",
    "zero_grad forgotten transformer",
    "one layer clamped lstm",
)
HEALTHY = (
    "mlp sgd momentum",
    "mlp he init depth 8 gelu",
    "residual mlp rezero",
    "resnet zero init",
    "nfnet sgd clipped",
    "opt float32",
    "lstm language",
    "word2vec",
    "bfloat16 weights",
    "lora mlp",
    "actor-critic",
    "sharpness-aware",
    "convnext",
    "beit",
    "cait layer scale 1e-5",
    "transformer sum loss",
    "transformer stochastic depth",
    "amp float16 searches its scale",
    "byol target network",
)


@pytest.mark.parametrize("name", SICK)
def test_a_disease_is_named(name):
    verdict = judge(record(CASES[name]))
    assert any(verdict.named.values()), "no view names it"


@pytest.mark.parametrize("name", HEALTHY)
def test_a_healthy_training_is_quiet(name):
    verdict = judge(record(CASES[name]))
    assert not any(verdict.alarms.values())
    assert verdict.last_loss < 0.9 * verdict.first_loss, "it does not learn, so is it healthy?"


def test_the_clinic_is_large_and_has_all_kinds_in_both_halves():
    for half in ("set", "judged"):
        of_half = [case for case in CASES.values() if case.half == half]
        sick = [case for case in of_half if case.codes]
        assert len(sick) >= 40 and len(of_half) - len(sick) >= 60
    names = [{c.codes for c in CASES.values() if c.half == half} for half in ("set", "judged")]
    assert names[0] == names[1]


def test_the_codes_exist():
    codes = {code for case in CASES.values() for code in case.codes}
    assert codes <= set(paramstats.FindingCode.__members__)


def test_a_recording_gives_the_same_verdict(tmp_path):
    case = CASES["layer dies at step 30"]
    first = judge(record(case, tmp_path))
    again = judge(replay(case, tmp_path))
    assert repr(again) == repr(first)
    assert {view: hit[0] for view, hit in again.named.items() if hit}["summary"] == 30


def test_the_exit_status_is_that_of_the_judged_half(capsys):
    case = CASES["layer not in the optimizer"]
    verdict = judge(record(case))
    verdict.named = {}
    assert report([verdict]) == 0 and case.half == "set"
    verdict.case = CASES["block not in the optimizer"]
    assert report([verdict]) == 1
    assert "judged: 0 of 1 diseases named" in capsys.readouterr().out
