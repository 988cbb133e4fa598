"""Tensors of two checkpoints whose names differ, and explicit mappings of names."""

from __future__ import annotations

import re
import subprocess
import sys
from functools import partial

import pytest
import torch
from torch.optim.swa_utils import AveragedModel

from paramstats.checkpoints import compare
from paramstats.checkpoints._compare import alignment
from paramstats.checkpoints._stored_tensors import StoredTensor
from tests.checkpoints.files import save_file

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

TEXT = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}


def random(model):
    """Return a model whose parameters all differ."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    return model


def llama():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(vocab_size=32, num_key_value_heads=2, **TEXT)
    return random(transformers.LlamaForCausalLM(config))


def llava():
    """A model whose towers have layers of equal shapes."""
    torch.manual_seed(1)
    config = transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(vocab_size=32, num_key_value_heads=2, **TEXT),
        vision_config=transformers.CLIPVisionConfig(image_size=4, patch_size=2, **TEXT),
        image_token_index=1,
    )
    return random(transformers.LlavaForConditionalGeneration(config))


def changed(tensors):
    """Return other tensors; one of three is the same."""
    return {
        name: x.clone() if i % 3 == 0 else x + 0.01 * torch.randn_like(x)
        for i, (name, x) in enumerate(tensors.items())
    }


def check(a, b, name_in_b, result):
    """Check a comparison of state_dicts with torch, given the name in b of each name in a."""
    assert {row.name for row in result.rows} == set(name_in_b)
    assert result.mapped == {x: y for x, y in name_in_b.items() if x != y}
    assert set(result.only_in_a) == set(a) - set(name_in_b)
    assert set(result.only_in_b) == set(b) - set(name_in_b.values())
    for row in result.rows:
        x, y = a[row.name].double(), b[name_in_b[row.name]].double()
        assert row.relative_change == pytest.approx(float((y - x).norm() / x.norm()), rel=1e-5)
        assert row.changed_count == int((x != y).sum())


def ddp(model):
    return torch.nn.DataParallel(model).state_dict()


def compiled(model):
    return torch.compile(model).state_dict()


def averaged(model):
    return {n: x for n, x in AveragedModel(model).state_dict().items() if n != "n_averaged"}


def recomputed(model):
    """Return the names of DDP around layers with activation checkpointing."""
    state = model.state_dict().items()
    mark = r"\g<0>_checkpoint_wrapped_module."
    return {f"module.{re.sub(r'layers[.][0-9][.]', mark, name)}": x for name, x in state}


def marked(mark, position, model):
    """Return a state_dict with a wrapper around the module at a position of the names."""
    state = {}
    for name, x in model.state_dict().items():
        parts = name.split(".")
        parts[position:position] = [mark]
        state[".".join(parts)] = x
    return state


def lora(model):
    """Return the state_dict of a model as PEFT wraps it."""
    state = {}
    for name, x in model.state_dict().items():
        if re.search(r"[qv]_proj\.weight$", name):
            module = f"base_model.model.{name.removesuffix('.weight')}"
            state[f"{module}.base_layer.weight"] = x
            state[f"{module}.lora_A.default.weight"] = torch.ones(2, 8)
            state[f"{module}.lora_B.default.weight"] = torch.zeros(8, 2)
        else:
            state[f"base_model.model.{name}"] = x
    return state


@pytest.mark.parametrize(
    ("wrap", "pattern"),
    [
        (ddp, "module.*"),
        (compiled, "_orig_mod.*"),
        (averaged, "module.*"),
        (lambda model: ddp(torch.compile(model)), "module._orig_mod.*"),
        (recomputed, "module.*._checkpoint_wrapped_module.*"),
        (partial(marked, "_fsdp_wrapped_module", 0), "_fsdp_wrapped_module.*"),
        (partial(marked, "_checkpoint_wrapped_module", 1), "*._checkpoint_wrapped_module.*"),
        (lora, "base_model.model.*.base_layer.*"),
    ],
)
@pytest.mark.parametrize("is_reversed", [False, True])
def test_parts_of_wrappers_are_ignored(wrap, pattern, is_reversed):
    model = llama()
    plain = model.state_dict()
    name_of = {x.numpy().tobytes(): name for name, x in plain.items()}
    wrapped = wrap(model)
    name_in_plain = {n: name_of.get(x.numpy().tobytes()) for n, x in wrapped.items()}
    name_in_plain = {n: name for n, name in name_in_plain.items() if name is not None}
    assert len(name_in_plain) == len(plain)
    other = changed(plain)
    if is_reversed:
        plain_names = {y: x for x, y in name_in_plain.items()}
        result = compare(other, wrapped)
        check(other, wrapped, plain_names, result)
        line = f"renamed: a '*' = b '{pattern}' ("
    else:
        result = compare(wrapped, other)
        check(wrapped, other, name_in_plain, result)
        line = f"renamed: a '{pattern}' = b '*' ("
    assert any(note.startswith(line) for note in result.notes)


def old_llava(name):
    """Return a name as it was before `language_model` moved into `model`."""
    name = name.removeprefix("model.")
    name = re.sub("^vision_tower", "vision_tower.vision_model", name)
    name = re.sub("^language_model", "language_model.model", name)
    return re.sub("^lm_head", "language_model.lm_head", name)


def test_language_model_that_moved(tmp_path):
    new = llava().state_dict()
    old = {old_llava(name): x for name, x in changed(new).items()}
    save_file({name: x.contiguous() for name, x in new.items()}, tmp_path / "new.safetensors")
    torch.save(old, tmp_path / "old.bin")
    result = compare(tmp_path / "old.bin", tmp_path / "new.safetensors")
    check(old, new, {old_llava(name): name for name in new}, result)
    assert result.notes[:2] == (
        "renamed: a 'vision_tower.vision_model.*' = b 'model.vision_tower.*' (39 tensors)",
        "renamed: a 'language_model.model.*' = b 'model.language_model.*' (20 tensors)",
    )


def test_language_model_against_a_model_with_two_towers():
    a, b = llama().state_dict(), llava().state_dict()
    names = {name: name.replace("model.", "model.language_model.", 1) for name in a}
    assert set(names.values()) <= set(b) and names["lm_head.weight"] == "lm_head.weight"
    check(a, b, names, compare(a, b))


def test_training_checkpoint_against_weights_both_with_optimizer(tmp_path):
    model = llama()
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    lightning = {
        "state_dict": {f"model.{name}": x for name, x in model.state_dict().items()},
        "optimizer_states": [optimizer.state_dict()],
        "epoch": 3,
    }
    plain = {**changed(model.state_dict()), "optimizer": optimizer.state_dict()}
    torch.save(lightning, tmp_path / "a.ckpt")
    torch.save(plain, tmp_path / "b.pt")
    result = compare(tmp_path / "a.ckpt", tmp_path / "b.pt")
    rows = {row.name: row for row in result.rows}
    assert result.only_in_a == result.only_in_b == ()
    for name, x in model.state_dict().items():
        assert result.mapped[f"state_dict.model.{name}"] == name
        expected = float((plain[name].double() - x.double()).norm() / x.double().norm())
        found = rows[f"state_dict.model.{name}"].relative_change
        assert found == pytest.approx(expected, rel=1e-5)
    assert result.mapped["optimizer_states.0.state.0.exp_avg"] == "optimizer.state.0.exp_avg"


def test_names_without_anything_in_common_give_a_reason():
    megatron = {
        "embedding.word_embeddings.weight": torch.ones(32, 8),
        "decoder.layers.0.self_attention.linear_proj.weight": torch.ones(8, 8),
        "decoder.layers.0.mlp.linear_fc2.weight": torch.ones(8, 16),
        "decoder.final_layernorm.weight": torch.ones(8),
    }
    result = compare(megatron, llama())
    assert result.rows == () and len(result.only_in_a) == 4 and len(result.only_in_b) == 21
    for part in (
        *("no tensor was compared: a has 4 tensors such as 'embedding.word_embeddings.weight'"),
        *("b has 21 tensors such as 'model.embed_tokens.weight'", "map", "strip_a", "FILE#PART"),
    ):
        assert part in result.reason
    assert result.reason in result.table().splitlines() and result.to_dict()["reason"]
    result = compare(
        megatron,
        llama(),
        map=[
            (r"^embedding\.word_embeddings", "model.embed_tokens"),
            ("^decoder", "model"),
            (r"self_attention\.linear_proj", "self_attn.o_proj"),
            (r"mlp\.linear_fc2", "mlp.down_proj"),
            ("final_layernorm", "norm"),
        ],
    )
    assert len(result.rows) == 4 and result.reason == ""
    assert result.mapped["decoder.final_layernorm.weight"] == "model.norm.weight"
    assert "renamed as map, strip_a and strip_b say: 4 tensors" in result.notes


def test_reasons_of_other_empty_comparisons():
    w = {"w": torch.ones(2)}
    assert compare({}, w).reason == "no tensor was compared: a has no tensors"
    assert compare({}, {}).reason == "no tensor was compared: a and b have no tensors"
    assert "1 tensor has a name in both, but other" in compare(w, {"w": torch.ones(3)}).reason
    assert compare(w, w).reason == ""


def tensors(names, group="model", shape=(2,)):
    return [StoredTensor(name, shape, torch.float32, (), group=group) for name in names]


def pair_names(a, b):
    found = alignment.align(a, b, {}, {})
    return {x.name: y.name for x, y in found.pairs}, found.lines


LAYERS = [f"layers.{i}.{name}.weight" for i in range(3) for name in ("up", "down")]


@pytest.mark.parametrize(
    ("heads_a", "heads_b", "expected"),
    [
        (["model."], [""], [("model.", "")]),
        (["state_dict.net."], ["", "extra."], [("state_dict.net.", "")]),
        (["model.", "ema."], [""], [("model.", "")]),  # the usual head
        (["ema."], ["model.", "ema."], [("ema.", "ema.")]),
        (["x.y."], ["u.v."], [("x.y.", "u.v.")]),
        (["q.", "k."], [""], []),  # either
        (["q."], ["enc.", "dec."], []),
        (["text."], ["wrapper.text.", "wrapper.image."], [("text.", "wrapper.text.")]),
        (["a.", "b."], ["m.a.", "m.b."], [("a.", "m.a."), ("b.", "m.b.")]),
        (["stage0."], ["stage1."], []),  # other numbers are other layers
    ],
)
def test_heads_are_removed_unless_they_are_ambiguous(heads_a, heads_b, expected):
    a, b = (
        tensors(head + name for head in heads for name in LAYERS) for heads in (heads_a, heads_b)
    )
    pairs, lines = pair_names(a, b)
    assert pairs == {x + name: y + name for x, y in expected for name in LAYERS}
    assert any(line.startswith("not paired: ") for line in lines) == (
        not expected and heads_a != ["stage0."]
    )
    pairs, _ = pair_names(b, a)
    assert pairs == {y + name: x + name for x, y in expected for name in LAYERS}


def test_what_is_never_paired():
    for a, b in [
        (tensors(["w", "m.w"], "optimizer"), tensors(["w", "w2"])),  # an optimizer and a model
        (tensors(["optim.layers.0.w"], "optimizer"), tensors(["layers.0.w"])),
        (tensors(["x.layers.0.w"], shape=(3,)), tensors(["y.layers.0.w"])),  # other shapes
        (tensors(["up.weight"]), tensors(["down.weight"])),  # one part in common
        (tensors(["layers.0.up.w"]), tensors(["layers.1.up.w"])),
    ]:
        assert pair_names(a, b)[0] == pair_names(b, a)[0] == {}
    pairs, _ = pair_names(tensors(["m.w"], "optimizer"), tensors(["w"], "optimizer"))
    assert pairs == {"m.w": "w"}


def test_names_that_agree_come_first():
    a = tensors(["w", "module.w", "model.v"])
    pairs, _ = pair_names(a, tensors(["module.w", "v", "w"]))
    assert pairs == {"w": "w", "module.w": "module.w", "model.v": "v"}
    # Two tensors would get the same name.
    pairs, _ = pair_names(tensors(["module.w", "_orig_mod.w"]), tensors(["w"]))
    assert pairs == {}


def test_tied_tensors_are_aligned_under_all_names():
    w = torch.ones(2)
    tied = {"module.w": w, "module.tied": w}
    result = compare(tied, {"w": w * 2, "tied": w * 3})
    assert {row.name: row.relative_change for row in result.rows} == {
        "module.tied": 2.0,
        "module.w": 1.0,
    }
    result = compare({"w": w * 2, "tied": w * 3}, tied)
    assert len(result.rows) == 2 and result.mapped == {"w": "module.w", "tied": "module.tied"}


HOSTILE = r"""
from paramstats.checkpoints._compare.alignment import align
from paramstats.checkpoints._stored_tensors import StoredTensor
import torch
n = 10_000
for a, b in [
    (["a." * 1_000_000 + "w"], ["w", "b"]),
    (["module." * 100_000 + f"w{i}" for i in range(100)], [f"w{i}" for i in range(100)]),
    ([f"w{i}.x" for i in range(n)], [f"h{i}.w{i}.x" for i in range(n)]),
    ([f"a{i}.w{i // 8}.x.y.z" for i in range(n)], [f"b{i}.w{i // 8}.x.y.z" for i in range(n)]),
    ([f"a{i}.w.x.y.z" for i in range(n)], [f"b{i}.w.x.y.z" for i in range(n)]),
    (["." * i for i in range(1, 3000)], ["a" + "." * i for i in range(3000)]),
]:
    a, b = ([StoredTensor(name, (), torch.float32, ()) for name in names] for names in (a, b))
    align(a, b, {}, {})
print("done")
"""


def test_names_of_any_form_are_aligned_in_little_time():
    command = [sys.executable, "-c", HOSTILE]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.stdout == "done\n", done.stderr


def test_explicit_names():
    x, y = torch.ones(2), torch.zeros(2)
    a = {"net.enc0.w": x, "net.enc1.w": y, "net.w": x + 1}
    b = {"m.layers.0.w": x, "m.layers.1.w": y, "m.w": x + 1}
    for arguments in (
        {"map": {r"enc(\d)": r"layers.\1"}, "strip_a": "net.", "strip_b": "m"},
        {"map": {re.compile(r"^net\.enc(\d)"): r"m.layers.\1", "^net": "m"}},
        {"map": [("net", "m"), ("enc", "layers.")]},
    ):
        result = compare(a, b, **arguments)
        assert len(result.rows) == 3 and all(row.changed_count == 0 for row in result.rows)
        assert result.mapped["net.enc1.w"] == "m.layers.1.w"


@pytest.mark.parametrize(
    ("arguments", "kind", "text"),
    [
        ({"map": "a=b"}, TypeError, "expected a dict or pairs"),
        ({"map": ["ab"]}, TypeError, "expected a dict or pairs"),
        ({"map": {"a": 1}}, TypeError, "expected a dict or pairs"),
        ({"map": {"(": "b"}}, re.error, r"expected a regular expression in map, got '\('"),
        ({"map": {"x": r"\1"}}, ValueError, "invalid group reference"),
        ({"map": {".*": "same"}}, ValueError, "leave every tensor of a its own name, got 'same"),
        ({"strip_b": 1}, TypeError, "expected a str for strip_b, got 1"),
        ({"strip_a": "x."}, ValueError, "got 'w' for 'w' and for 'x.w'"),
    ],
)
def test_bad_mappings(arguments, kind, text):
    a = {"w": torch.ones(1), "x.w": torch.ones(2)}
    with pytest.raises(kind, match=text):
        compare(a, a, **arguments)


@pytest.mark.parametrize(
    "arguments", [{"strip_a": "nothing."}, {"strip_b": "nothing."}, {"map": {"nothing": ""}}]
)
def test_a_mapping_without_effect_is_a_warning(arguments):
    a = {"w": torch.ones(1)}
    with pytest.warns(RuntimeWarning, match=r"expected names in [ab] .*nothing.*such as 'w'|for"):
        compare(a, a, **arguments)
