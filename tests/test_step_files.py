"""Folders whose names are patterns, and steps that orbax wrote but did not merge."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from gptjax.checkpoints import restore, save, step_files
from gptjax.checkpoints.restore import restore_newest
from gptjax.checkpoints.save import Saver
from gptjax.checkpoints.steps import checkpoint_folder, quarantined, saved_steps, step_folder
from gptjax.commands import doctor, run_checks
from gptjax.errors import CheckpointError, OutputError
from gptjax.terminal import cli

from .helpers import ROOT
from .test_checkpoint import everything, flip, make_state, save_steps

NAMES = ["run[a]", "a*", "[", "é b#%20$x", "two\nlines", "a\\b", os.fsdecode(b"caf\xe9")]


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_may_have_any_name(name: str, tmp_path: Path) -> None:
    run_dir = tmp_path / "proj [v2]" / name
    save_steps(run_dir, {10: None, 20: 1.0})
    save_steps(run_dir, {30: None}, keep=1)  # opened anew
    assert saved_steps(run_dir) == [20, 30]
    state = make_state()
    found = restore_newest(run_dir, everything(state))
    wte = np.asarray(state.params["wte"]["embedding"]) + 30
    assert np.array_equal(found.params["wte"]["embedding"], wte)


def test_the_link_is_gone_when_the_process_ends(tmp_path: Path) -> None:
    (tmp_path / "[x]").mkdir()
    code = (
        "import sys; from pathlib import Path; from gptjax.checkpoints import step_files;"
        "path = step_files.plain_path(Path(sys.argv[1])); print(path); (path / 'file').touch()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "[x]")],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=True,
    )
    link = Path(done.stdout.strip())
    assert (tmp_path / "[x]" / "file").is_file() and not link.parent.exists()


def test_a_link_that_is_tidied_away_is_made_again(tmp_path: Path) -> None:
    (tmp_path / "[x]").mkdir()
    link = step_files.plain_path(tmp_path / "[x]")
    assert step_files.plain_path(tmp_path / "[x]") == link
    shutil.rmtree(link.parent)
    again = step_files.plain_path(tmp_path / "[x]")
    assert again != link and again.samefile(tmp_path / "[x]")


def test_no_place_for_a_link_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "[tmp]").mkdir()
    monkeypatch.setattr(step_files.tempfile, "gettempdir", lambda: str(tmp_path / "[tmp]"))
    with pytest.raises(OutputError, match=r"a sign such as .* TMPDIR"):
        Saver(tmp_path / "run[b]")


@pytest.fixture
def unmerged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What gptjax 0.1 left in such a folder: a step without manifests, called saved."""
    run_dir = tmp_path / "old[1]"
    with monkeypatch.context() as patch:
        patch.setattr(save, "plain_path", lambda folder: folder)
        patch.setattr(save, "require_whole", lambda run_dir, step: None)
        save_steps(run_dir, {10: None})
    assert not list(run_dir.glob("checkpoints/10/*/manifest.ocdbt"))
    return run_dir


def test_saved_means_that_it_can_be_restored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(save, "plain_path", lambda folder: folder)
    said: list[str] = []
    saver = Saver(tmp_path / "run[a]", notify=said.append)
    state = make_state()
    saver.save(5, state.params, {"opt_state": state.opt_state}, {"val_loss": None})
    saver.close()
    assert saver.last is None and saved_steps(tmp_path / "run[a]") == []
    assert "step 5 was not saved" in said[0], said


def test_an_unmerged_step_is_not_set_aside(unmerged: Path) -> None:
    with pytest.raises(CheckpointError, match=r"never merged.* --mend"):
        restore_newest(unmerged, everything(make_state()))
    assert saved_steps(unmerged) == [10] and quarantined(unmerged) == []


@pytest.mark.parametrize("name", ["10", "quarantine-10"])
def test_doctor_mends_it(unmerged: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    folder = checkpoint_folder(unmerged)
    (folder / "10").rename(folder / name)
    finding = run_checks.check_steps(unmerged)
    assert finding.status == "FAIL" and finding.remedy == f"gptjax doctor '{unmerged}' --mend"
    assert cli.run(doctor.main, ["--mend"]) == 2
    cli.run(doctor.main, [str(unmerged), "--mend", "--json"])
    assert run_checks.check_steps(unmerged).status == "ok"
    state = make_state()
    found = restore_newest(unmerged, everything(state))
    wte = np.asarray(state.params["wte"]["embedding"]) + 10
    assert np.array_equal(found.params["wte"]["embedding"], wte)


def test_doctor_sees_a_step_that_lacks_arrays(tmp_path: Path) -> None:
    save_steps(tmp_path, {10: None})
    assert run_checks.check_steps(tmp_path).status == "ok"
    path = step_folder(tmp_path, 10) / "extra" / "manifest.ocdbt"
    content = path.read_bytes()
    flip(path)
    assert run_checks.check_steps(tmp_path).status == "FAIL"
    path.write_bytes(content)
    shutil.copy(path.parent.parent / "params" / "manifest.ocdbt", path)
    assert run_checks.check_steps(tmp_path).status == "FAIL"


def test_other_shapes_are_not_damage(tmp_path: Path) -> None:
    save_steps(tmp_path, {10: None})
    params, extra = everything(make_state())
    wider = {**params, "wpe": {"embedding": jax.ShapeDtypeStruct((17, 32), np.float32)}}
    more = {**params, "rope": params["wpe"]}
    for other, said in ((wider, "has shape"), (more, "does not hold params/rope/embedding")):
        with pytest.raises(CheckpointError, match=said):
            restore_newest(tmp_path, (other, extra))
    fewer = {name: value for name, value in params.items() if name != "wpe"}
    with pytest.raises(CheckpointError, match="holds params/wpe/embedding"):
        restore_newest(tmp_path, (fewer, extra))
    assert saved_steps(tmp_path) == [10]


def test_what_the_machine_cannot_read_is_not_set_aside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_steps(tmp_path, {10: None, 20: None})

    def refuse(*args: object, **kwargs: object) -> None:
        raise ValueError("PERMISSION_DENIED: Error opening file: Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(restore.ocp.CheckpointManager, "restore", refuse)
        with pytest.raises(CheckpointError, match="Permission denied"):
            restore_newest(tmp_path, everything(make_state()))
    assert saved_steps(tmp_path) == [10, 20]


def test_what_is_set_aside_says_that_the_cause_may_lie_elsewhere(tmp_path: Path) -> None:
    save_steps(tmp_path, {10: None, 20: None})
    (step_folder(tmp_path, 20) / "params" / "_METADATA").write_text("{")
    said: list[str] = []
    restore_newest(tmp_path, everything(make_state()), notify=said.append)
    assert "moved to quarantine-20" in said[0] and "may also be the disk" in said[0]
