"""The sanitizers' copies of the tree: what is there, and nothing else."""

from __future__ import annotations

from tests import sanitize


def test_a_copy_loses_what_was_deleted_and_keeps_what_was_built(tmp_path):
    root, tree = tmp_path / "root", tmp_path / "tree"
    names = ["a.py", "tests/b.py", "tests/c.py"]
    built = ["build/x.o", "paramstats/_native.so", "paramstats/_build.json"]
    for folder, files in ((root, names), (tree, built)):
        for name in files:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(name)

    def copied() -> list[str]:
        sanitize.copy_changed(root, names, tree)
        return sorted(p.relative_to(tree).as_posix() for p in tree.rglob("*") if p.is_file())

    assert copied() == sorted(names + built)
    (root / "tests/b.py").unlink()  # git still lists it
    names.remove("tests/c.py")
    assert copied() == sorted(["a.py", *built])
