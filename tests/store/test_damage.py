"""Files damaged at random: identical results or an error that names the file, and nothing lost beyond it."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

import explaind_core as explaind
from explaind_core import errors
from explaind_core.cli import app as cli
from explaind_core.store.integrity import damages
from explaind_core.store.run_store import RunStore
from explaind_core.testing import record_example

_spec = importlib.util.spec_from_file_location("damage", Path(__file__).parents[2] / "benchmarks" / "damage.py")
damage = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(damage)


def test_no_damage_passes_unseen(tmp_path):
    seen = set()
    for kind, sort, said, lost, _ in damage.rounds(64, 7, tmp_path):
        assert said in ("identical results", "error names the file"), (kind, sort, said)
        assert not lost, (kind, sort, lost)
        seen.add(said)
    assert "error names the file" in seen


@pytest.fixture
def run():
    return record_example(steps=4)


def test_an_intact_run_has_no_damages(run):
    assert run.check_files(progress=False) == ()


def test_all_damages_are_told(run):
    store = run.store
    store.step_path(2).write_bytes(store.step_path(2).read_bytes()[:-3])
    store.step_path(3).unlink()
    batch = store.batch_path(run._header(4)["batches"][0]["key"])
    batch.unlink()
    found = damages(RunStore(run.path))
    assert [(e.what, Path(e.where).name) for e in found] == [
        ("step 2 is truncated", "000002.safetensors"),
        ("step 3 is missing", "000003.safetensors"),
        ("the batch of step 4 is missing", batch.name),
    ]


def test_a_step_of_another_run_is_named(run):
    other = record_example(steps=4, seed=1)
    run.store.step_path(3).write_bytes(other.store.step_path(3).read_bytes())
    with pytest.raises(errors.StoreError, match=r"step 3 belongs to another run than manifest.json[\s\S]*000003"):
        explaind.open_run(run.path)


def test_two_steps_that_were_swapped_are_named(run):
    second, third = run.store.step_path(2), run.store.step_path(3)
    contents = second.read_bytes()
    second.write_bytes(third.read_bytes())
    third.write_bytes(contents)
    with pytest.raises(errors.StoreError, match=r"step 2 is another file of a run[\s\S]*000002[\s\S]*000003"):
        explaind.open_run(run.path)


def test_a_flipped_bit_in_a_parameter_is_found_when_it_is_read(run):
    path = run.store.step_path(2)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    opened = explaind.open_run(run.path, model=run.model)
    with pytest.raises(errors.StoreError, match=r"step 2 is damaged[\s\S]*000002[\s\S]*until=1[\s\S]*damaged=True"):
        explaind.attribute(opened, damage.torch.zeros(1, 4, dtype=damage.torch.float64), progress=False)


def test_what_is_intact_of_a_damaged_run_can_be_read(run):
    run.store.step_path(2).unlink()
    (run.path / "manifest.json").write_text("{")
    opened = explaind.open_run(run.path, model=run.model, damaged=True)
    assert len(opened.steps) == 4
    assert damage.same(opened.theta(4), run.theta(4))
    with pytest.raises(errors.StoreError, match="step 2 is missing"):
        opened.theta(2)


def test_a_missing_snapshot_is_missed(tmp_path):
    damage.record(tmp_path / "run", "AdamW, snapshots, no compression", 0)
    run = explaind.open_run(tmp_path / "run")
    assert run.snapshots() == [0, 2, 4, 6]
    run.store.snapshot_path(4).unlink()
    with pytest.raises(errors.StoreError, match=r"the snapshot after step 4 is missing"):
        run.snapshots()
    assert explaind.open_run(run.path, damaged=True).snapshots() == [0, 2, 6]
    assert [e.what for e in run.check_files(progress=False)] == ["the snapshot after step 4 is missing"]


def test_the_command_checks_a_run(run, monkeypatch, capsys):
    def call():
        monkeypatch.setattr("sys.argv", ["explaind", "check", str(run.path)])
        with pytest.raises(SystemExit) as status:
            cli.main()
        return status.value.code, capsys.readouterr().out

    assert call()[0] == 0
    run.store.step_path(2).unlink()
    status, printed = call()
    assert status == 1
    assert "step 2 is missing" in printed
    assert "1 files are damaged or missing" in printed
