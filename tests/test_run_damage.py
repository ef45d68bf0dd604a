"""Ways to break a run folder: after each, the same command goes on to the same bits, or one sentence says what to do.

Two writers: a live run is stopped in the middle of a checkpoint, and every other command on its folder must be refused before it
touches a byte (`SECOND`, beside a new run and beside a resumed one; two that start together; builders). Refusals: a command
whose settings or inputs do not fit the run leaves every byte as it was (`REFUSED`). Damage: one bit flipped, files cut, emptied,
deleted, replaced (`DAMAGE`). Kills, signals and full disks at writes, by the layer of faults.py.

All runs are ReFL with a LoRA on a tiny UNet: three updates, a checkpoint after each, two of them kept.
"""

import os
import random
import re
import shutil
import subprocess
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

import random_faults
import tiny
from faults import Ended, Fault, Server, compiler, tree
from run_contents import contents, differences

pytestmark = [
    pytest.mark.skipif(compiler() is None, reason="there is no C compiler for the fault layer"),
    pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="the fault layer needs Linux"),
]

RESUME = ("--resume-from-checkpoint", "latest")
OVERWRITE = ("--overwrite-output-dir",)
_FLAGS = (
    "--model {root}/pipeline --prompts {root}/two.txt --validation-prompts {root}/one.txt --rewards brightness=1 --pretraining off --resolution 32"
    " --num-inference-steps 2 --window 0 1 --lora.rank 2 --max-train-steps 3 --train-batch-size 1 --learning-rate 1e-2"
    " --gradient-accumulation-steps 1 --threads 1 --checkpointing-steps 1 --checkpoints-total-limit 2"
    " --reward-scale 1 --sample.num-inference-steps 1 --sample.solver ddim --sample.resolution 32 --output-dir {run}"
)


@dataclass(kw_only=True)
class Lab:
    """A server, inputs, and what runs without faults are like."""

    server: Server
    root: Path
    calls: int = 0
    """Writes of an undisturbed run."""
    whole: dict[str, str] = field(default_factory=dict)
    """Contents of an undisturbed run."""

    def argv(self, run: Path, *more: str) -> list[str]:
        """The command line of a run in this folder."""
        return [*_FLAGS.format(root=self.root, run=run).split(), *more]

    def train(self, run: Path, *more: str, fault: Fault | None = None) -> Ended:
        """Run to the end, or to the fault."""
        return self.server.run("finetune.refl", self.argv(run, *more), fault)

    def assert_settled(
        self, run: Path, ended: Ended, allowed: str = "equal or said", named: str = ""
    ) -> None:
        """Assert that a command has given the undisturbed run, or one sentence that names what is wrong.

        named: a text of what it prints. It may also go on without what is lost and name it: only that differs then, and the
        comparison of before and after is left out, in both pictures. A damaged checkpoint that it names may be set aside as NAME.damaged.
        """
        assert not ended.traced, ended.tail
        assert named in ended.output, ended.tail
        if ended.code == 0:
            aside = {path.name for path in run.glob("*.damaged")}
            assert all(name.removesuffix(".damaged") in ended.output for name in aside), ended.tail
            differ = [
                line
                for line in differences(self.whole, contents(run))
                if re.split("[ /]", line)[0] not in aside
            ]
            if differ and "warned" in allowed:
                assert named
                pictures = ("before_after.png is missing", "progress.png is missing")
                assert all(named in line or line in pictures for line in differ), differ
            else:
                assert not differ, f"{'; '.join(differ)} ({ended.tail})"
                assert "equal" in allowed, ended.tail
        else:
            assert ended.code == 2, ended.tail
            assert ended.sentence, ended.tail
            assert "said" in allowed, ended.tail


def quick(names: Iterable[str], *few: str) -> list[Any]:
    """The cases of a table: these few, and all others among the slow tests."""
    assert {*few} <= {*names}, few
    return [pytest.param(name, marks=() if name in few else pytest.mark.slow) for name in names]


@pytest.fixture(scope="module")
def lab(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """The server, a second prompt list, and an undisturbed run."""
    (root / "two.txt").write_text("a red circle\na blue square\n")
    (root / "one.txt").write_text("a green square\n")
    (root / "other.txt").write_text("a red circle\na green square\n")
    tiny.pipeline_folder(root / "other_pipeline", seed=1)
    with Server(*random_faults.MODULES) as server:
        lab = Lab(server=server, root=root)
        run = tmp_path_factory.mktemp("whole") / "run"
        ended = lab.train(run, fault=Fault(folder=run.parent))
        assert ended.code == 0, ended.tail
        lab.calls, lab.whole = ended.calls, contents(run)
        yield lab


@pytest.fixture(scope="module")
def killed(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was killed as it began its last checkpoint: it holds those after 1 and 2 updates."""
    run = tmp_path_factory.mktemp("killed") / "run"
    ended = lab.train(run, fault=Fault(kind="kill", at=1, folder=run.parent, match="step_000003"))
    assert ended.code == -9, ended.tail
    assert [path.name for path in sorted(run.glob("step_*"))] == ["step_000001", "step_000002"]
    return run


@pytest.fixture
def run(killed: Path, tmp_path: Path) -> Path:
    """A copy of the killed run."""
    return Path(shutil.copytree(killed, tmp_path / "run", symlinks=True))


def test_a_killed_run_goes_on_to_the_same_bits(lab: Lab, run: Path) -> None:
    """Nothing of the rest of this file would mean anything without it."""
    lab.assert_settled(run, lab.train(run, *RESUME), "equal")


# ---------------------------------------------------------------- two writers


@dataclass(frozen=True, kw_only=True)
class Live:
    """A run that stands still in the middle of a checkpoint."""

    run: Path
    child: int
    before: dict[str, str]


SECOND: dict[str, tuple[str, ...]] = {
    "train": (),
    "resume": RESUME,
    "resume from a checkpoint": ("--resume-from-checkpoint", "{run}/step_000001"),
    "overwrite": OVERWRITE,
    "resume with another seed": (*RESUME, "--seed", "99"),
    "resume with other prompts": (*RESUME, "--prompts", "{root}/other.txt"),
}


@pytest.fixture(scope="module", params=["a new run", pytest.param("a resumed run", marks=pytest.mark.slow)])
def live(lab: Lab, killed: Path, tmp_path_factory: pytest.TempPathFactory, request: Any) -> Live:
    """A run in the middle of a checkpoint, new or resumed."""
    run = tmp_path_factory.mktemp("live") / "run"
    resumed = request.param == "a resumed run"
    if resumed:
        shutil.copytree(killed, run)
    stop = Fault(kind="stop", at=2, folder=run.parent, match="step_000003" if resumed else "step_000001")
    child = lab.server.start("finetune.refl", lab.argv(run, *(RESUME if resumed else ())), stop)
    ended = lab.server.wait(child)
    assert ended.stopped, ended.tail
    return Live(run=run, child=child, before=tree(run.parent))


@pytest.mark.parametrize("second", SECOND)
def test_a_second_writer_is_refused_before_it_touches_a_byte(lab: Lab, live: Live, second: str) -> None:
    more = [flag.format(run=live.run, root=lab.root) for flag in SECOND[second]]
    ended = lab.train(live.run, *more)
    assert (ended.code, ended.traced) == (2, False), ended.tail
    assert str(live.run) in ended.sentence
    assert tree(live.run.parent) == live.before


def test_another_program_is_refused_too(lab: Lab, live: Live) -> None:
    argv = [*random_faults.recorded.arguments("pretrain_scorer", lab.root, live.run), *OVERWRITE]
    ended = lab.server.run("finetune.pretrain_scorer", argv)
    assert (ended.code, ended.traced) == (2, False), ended.tail
    assert tree(live.run.parent) == live.before


def test_the_first_writer_ends_as_if_alone(lab: Lab, live: Live) -> None:
    lab.server.go_on(live.child)
    lab.assert_settled(live.run, lab.server.wait(live.child), "equal")


@pytest.mark.parametrize("which", quick(["train and train", "resume and resume"], "resume and resume"))
def test_of_two_that_start_together_one_is_refused(
    lab: Lab, killed: Path, tmp_path: Path, which: str
) -> None:
    run = tmp_path / "run"
    if "resume" in which:
        shutil.copytree(killed, run)
    argv = lab.argv(run, *(RESUME if "resume" in which else ()))
    both = [lab.server.start("finetune.refl", argv) for _ in range(2)]
    ended = sorted((lab.server.wait(child) for child in both), key=lambda one: one.code)
    assert [one.code for one in ended] == [0, 2], [one.tail for one in ended]
    lab.assert_settled(run, ended[0], "equal")
    assert ended[1].sentence


BUILDERS = ["score", "generate", "diffusiondb", "shapes"]


@pytest.mark.parametrize("program", quick(BUILDERS, "score"))
def test_two_builders(lab: Lab, builder_root: Path, tmp_path: Path, program: str) -> None:
    """The second is refused while the first stands still in the middle; the first gives what it gives alone."""
    alone, box = tmp_path / "alone", tmp_path / "box"
    whole = random_faults.reference_of(lab.server, program, builder_root, alone)
    random_faults.fresh_box(program, builder_root, box)
    argv, module = random_faults.arguments(program, builder_root, box), random_faults.module_of(program)
    child = lab.server.start(module, argv, Fault(kind="stop", at=whole.calls // 2, folder=box))
    assert lab.server.wait(child).stopped
    before = tree(box)
    ended = lab.server.run(module, argv)
    assert (ended.code, ended.traced) == (2, False), ended.tail
    assert ended.sentence
    assert tree(box) == before
    lab.server.go_on(child)
    assert lab.server.wait(child).code == 0
    assert differences(whole.contents, contents(box)) == []


@pytest.fixture(scope="module")
def builder_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Inputs of the builders."""
    folder = tmp_path_factory.mktemp("builders")
    random_faults.write_inputs(folder)
    return folder


# ---------------------------------------------------------------- refusals


REFUSED: dict[str, tuple[tuple[str, ...], str]] = {
    "a new run where one is": ((), "--output-dir"),
    "another seed": ((*RESUME, "--seed", "99"), "seed"),
    "another batch size": ((*RESUME, "--train-batch-size", "2"), "batch"),
    "other prompts": ((*RESUME, "--prompts", "{root}/other.txt"), "prompts"),
    "another model": ((*RESUME, "--model", "{root}/other_pipeline"), "model"),
    "another reward": ((*RESUME, "--rewards", "brightness=2"), "reward"),
    "other sampling settings": ((*RESUME, "--sample.num-inference-steps", "2"), "num-inference-steps"),
    "another resolution": ((*RESUME, "--resolution", "64"), "resolution"),
    "another LoRA rank": ((*RESUME, "--lora.rank", "3"), "rank"),
    "an older checkpoint": (("--resume-from-checkpoint", "{run}/step_000001"), "step_000001"),
    "no such checkpoint": (("--resume-from-checkpoint", "{run}/step_000009"), "step_000009"),
    "overwriting with a model that is not there": ((*OVERWRITE, "--model", "{root}/none"), "none"),
    "overwriting with weights that do not load": ((*OVERWRITE, "--model", "{root}/torn"), "torn"),
}


SLOW_REFUSALS = ("another LoRA rank", "another resolution", "an older checkpoint", "no such checkpoint")


@pytest.mark.parametrize(
    "why",
    quick(REFUSED, *(name for name in REFUSED if name not in SLOW_REFUSALS)),
)
def test_a_refused_command_leaves_every_byte(lab: Lab, run: Path, why: str) -> None:
    if "torn" in REFUSED[why][1] and not (lab.root / "torn").exists():
        shutil.copytree(lab.root / "pipeline", lab.root / "torn")
        next((lab.root / "torn" / "unet").glob("*.safetensors")).write_bytes(b"")
    flags, named = REFUSED[why]
    before = tree(run.parent)
    ended = lab.train(run, *(flag.format(run=run, root=lab.root) for flag in flags))
    assert tree(run.parent) == before
    assert (ended.code, ended.traced) == (2, False), ended.tail
    assert named.lower() in ended.sentence.lower().replace("_", "-").replace("step-", "step_"), ended.sentence


def test_another_driver_leaves_every_byte(lab: Lab, run: Path) -> None:
    before = tree(run.parent)
    argv = [*random_faults.recorded.arguments("weird_lora", lab.root, run), *RESUME]
    ended = lab.server.run("finetune.weird_lora", argv)
    assert (ended.code, ended.traced) == (2, False), ended.tail
    assert tree(run.parent) == before


# ---------------------------------------------------------------- damage


def flip(path: Path) -> None:
    """Flip the lowest bit of one byte: in the middle, of text of a digit, so that it still reads as text."""
    content = bytearray(path.read_bytes())
    at = len(content) // 2
    if path.suffix in (".jsonl", ".json", ".yaml"):
        at = next((i for i in (*range(at, len(content)), *range(at)) if chr(content[i]).isdigit()), at)
    content[at] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    """Keep the first half."""
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def empty(path: Path) -> None:
    """Keep nothing."""
    path.write_bytes(b"")


def delete(path: Path) -> None:
    """Remove it."""
    path.unlink()


def on(change: Callable[[Path], None], pattern: str) -> Callable[[Path], None]:
    """Damage the one file of a run that a pattern finds."""

    def damage(run: Path) -> None:
        (path,) = run.glob(pattern)
        change(path)

    return damage


def list_shaped(run: Path) -> None:
    torch.save([1, 2, 3], run / "step_000002" / "state.pt")


def pickled(run: Path) -> None:
    torch.save(subprocess.Popen, run / "step_000002" / "state.pt")


def symlinked(run: Path) -> None:
    (run / "step_000002").rename(run.parent / "elsewhere")
    (run / "step_000002").symlink_to(run.parent / "elsewhere")


def dangling(run: Path) -> None:
    shutil.rmtree(run / "step_000002")
    (run / "step_000002").symlink_to(run.parent / "nowhere")


def misnamed(run: Path) -> None:
    shutil.copytree(run / "step_000001", run / "step_000007")


def swapped(run: Path) -> None:
    shutil.copy(run / "step_000001" / "state.pt", run / "step_000002" / "state.pt")


def without_lora(run: Path) -> None:
    shutil.rmtree(run / "step_000002" / "lora")


def a_file_for_a_folder(run: Path) -> None:
    shutil.rmtree(run / "step_000002")
    (run / "step_000002").write_text("")


def all_states(run: Path) -> None:
    for path in run.glob("step_*/state.pt"):
        flip(path)


def an_older_row(run: Path) -> None:
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[1:]))


def leftovers(run: Path) -> None:
    for name in (".step_000009.tmp-4194305", ".step_000001.tmp-gone", "samples/.step_000001.tmp-shared"):
        (run / name).mkdir()
        (run / name / "file").write_text("of a killed process")
    (run / ".config.yaml.tmp-4194305").write_text("of a killed process")
    (run / "samples" / ".step_000000.png.tmp-4194305").write_text("of a killed process")


ANY = "equal, said or warned"
DAMAGE: dict[str, tuple[Callable[[Path], None], str, str]] = {
    "bit in the newest state": (on(flip, "step_000002/state.pt"), "equal or said", "step_000002"),
    "bit in the newest weights": (on(flip, "step_000002/lora/*.safetensors"), "equal or said", "step_000002"),
    "bit in every state": (all_states, "said", "step_00000"),
    "bit in the manifest": (on(flip, "step_000002/manifest.json"), "equal or said", "step_000002"),
    "bit in the metrics": (on(flip, "metrics.jsonl"), "said", "metrics.jsonl"),
    "bit in the configuration": (on(flip, "config.yaml"), "equal or said", ""),
    "bit in the scores": (on(flip, "samples/step_000000/scores.json"), ANY, "samples/step_000000"),
    "bit in an image": (on(flip, "samples/step_000000/0000.png"), ANY, "samples/step_000000"),
    "state cut": (on(cut, "step_000002/state.pt"), "equal or said", "step_000002"),
    "state empty": (on(empty, "step_000002/state.pt"), "equal or said", "step_000002"),
    "state deleted": (on(delete, "step_000002/state.pt"), "equal or said", "step_000002"),
    "state a list": (list_shaped, "equal or said", "step_000002"),
    "state that would run code": (pickled, "equal or said", "step_000002"),
    "state of another step": (swapped, "equal or said", "step_000002"),
    "weights cut": (on(cut, "step_000002/lora/*.safetensors"), "equal or said", "step_000002"),
    "weights deleted": (without_lora, "equal or said", "step_000002"),
    "manifest deleted": (on(delete, "step_000002/manifest.json"), "equal or said", "step_000002"),
    "metrics cut": (on(cut, "metrics.jsonl"), "said", "metrics.jsonl"),
    "metrics empty": (on(empty, "metrics.jsonl"), "said", "metrics.jsonl"),
    "metrics deleted": (on(delete, "metrics.jsonl"), ANY, "metrics.jsonl"),
    "metrics without a row": (an_older_row, "said", "metrics.jsonl"),
    "configuration deleted": (on(delete, "config.yaml"), "equal or said", ""),
    "scores cut": (on(cut, "samples/step_000000/scores.json"), ANY, "samples/step_000000"),
    "scores deleted": (on(delete, "samples/step_000000/scores.json"), ANY, "samples/step_000000"),
    "image empty": (on(empty, "samples/step_000000/0000.png"), ANY, "samples/step_000000"),
    "image deleted": (on(delete, "samples/step_000000/0000.png"), ANY, "samples/step_000000"),
    "samples deleted": (lambda run: shutil.rmtree(run / "samples"), ANY, "samples/step_0000"),
    "checkpoint a dangling link": (dangling, "equal or said", "step_000002"),
    "checkpoint under another step's name": (misnamed, "equal or said", "step_000007"),
    "checkpoint a file": (a_file_for_a_folder, "equal or said", "step_000002"),
    "leftovers of killed programs": (leftovers, "equal", ""),
}


@pytest.mark.parametrize(
    "damage",
    quick(
        DAMAGE,
        "bit in the newest state",
        "bit in every state",
        "bit in the manifest",
        "bit in the metrics",
        "bit in the scores",
        "state a list",
        "state that would run code",
        "metrics cut",
        "scores deleted",
        "checkpoint a dangling link",
        "leftovers of killed programs",
    ),
)
def test_a_damaged_run(lab: Lab, run: Path, damage: str) -> None:
    change, allowed, named = DAMAGE[damage]
    change(run)
    lab.assert_settled(run, lab.train(run, *RESUME), allowed, named)


def test_a_linked_checkpoint(lab: Lab, run: Path) -> None:
    """It is used, or refused; the folder that it leads to is not touched."""
    symlinked(run)
    before = tree(run.parent / "elsewhere")
    ended = lab.train(run, *RESUME)
    assert not ended.traced, ended.tail
    assert tree(run.parent / "elsewhere") == before
    if ended.code == 0:
        found = {name: digest for name, digest in contents(run).items() if "step_000002" not in name}
        assert {name: digest for name, digest in lab.whole.items() if "step_000002" not in name} == found
    else:
        assert "step_000002" in ended.sentence


def test_a_bit_in_an_older_checkpoint_is_found_when_it_is_used(lab: Lab, run: Path) -> None:
    flip(run / "step_000001" / "state.pt")
    more = ("--resume-from-checkpoint", str(run / "step_000001"))
    ended = lab.train(run.parent / "another", *more)
    assert (ended.code, ended.traced) == (2, False), ended.tail
    assert "step_000001" in ended.sentence


def test_what_a_sentence_leaves_can_be_overwritten(lab: Lab, run: Path) -> None:
    """Nothing of the damaged run is in the new one; the user's own file stays."""
    all_states(run)
    (run / "notes.txt").write_text("mine")
    (run / "unet").mkdir()
    ended = lab.train(run, *OVERWRITE)
    assert (run / "notes.txt").read_text() == "mine"
    (run / "notes.txt").unlink()
    lab.assert_settled(run, ended, "equal")


def test_a_folder_that_may_not_be_written(lab: Lab, run: Path) -> None:
    """The first write of all is refused, so that even the lock cannot be had."""
    before = tree(run.parent)
    ended = lab.train(run, *RESUME, fault=Fault(kind="read-only", at=1, folder=run.parent))
    lab.assert_settled(run, ended, "said", "Read-only")
    assert tree(run.parent) == before


# ---------------------------------------------------------------- the layer itself, and a real disk


def test_no_write_of_a_library_escapes_the_layer(lab: Lab, tmp_path: Path) -> None:
    argv = ["--output-dir", str(tmp_path)]
    counted = lab.server.run("drivers.writer", argv, Fault(folder=tmp_path))
    assert counted.code == 0, counted.tail
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"a.txt", "a.pt", "a.safetensors", "a.parquet", "a.png", "folder"}
    expected = {
        "full": (6, 0), "read-only": (6, 0), "error": (1, 0), "kill": (-9, 1), "torn": (-9, 1), "term": (-15, 1),
    }  # fmt: skip
    for kind, (code, last) in expected.items():
        shutil.rmtree(tmp_path)
        tmp_path.mkdir()
        at = counted.calls if last else 1
        ended = lab.server.run("drivers.writer", argv, Fault(kind=kind, at=at, folder=tmp_path))
        assert ended.code == code, f"{kind}: {ended.tail}"
    shutil.rmtree(tmp_path)
    tmp_path.mkdir()
    beside = lab.server.run("drivers.writer", argv, Fault(kind="full", at=1, folder=tmp_path / "beside"))
    assert (beside.code, beside.calls) == (0, 0), beside.tail


def mount(folder: Path, options: str) -> bool:
    """Mount a file system in memory, or change it; whether that was allowed."""
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def test_a_real_disk_that_is_full_and_then_read_only(lab: Lab, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.geteuid() != 0 or not shutil.which("mount") or not mount(disk, "size=350k"):
        pytest.skip("a small file system cannot be mounted here")
    try:
        run = disk / "run"
        ended = lab.train(run)
        assert ended.code != 0
        assert not ended.traced, ended.tail
        assert "no space left" in ended.sentence.lower(), ended.tail
        assert list(run.glob("step_*")), "the disk was to be full only after the first checkpoint"
        before = tree(run)
        assert mount(disk, "remount,size=20m,ro")
        refused = lab.train(run, *RESUME)
        lab.assert_settled(run, refused, "said", "Read-only")
        assert tree(run) == before
        assert mount(disk, "remount,size=20m,rw")
        lab.assert_settled(run, lab.train(run, *RESUME), "equal")
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


# ---------------------------------------------------------------- faults at writes

DISK = ("full", "error", "read-only")


def assert_said(ended: Ended) -> None:
    """One sentence at most, no traceback; a fault at a write that does not matter may be passed over."""
    assert not ended.traced, ended.tail
    assert ended.code == 0 or ended.sentence, ended.tail


def points(number: int, calls: int) -> list[int]:
    """So many writes of a run, spread over it."""
    return sorted(random.Random(calls).sample(range(1, calls + 1), min(number, calls)))


def at_writes(lab: Lab, run: Path, kind: str, number: int) -> None:
    """Break a run at so many of its writes, each time from its start, and go on."""
    for at in points(number, lab.calls):
        shutil.rmtree(run.parent)
        run.parent.mkdir()
        ended = lab.train(run, fault=Fault(kind=kind, at=at, folder=run.parent))
        where = f"{kind} at {at}, {ended.where}"
        if kind in DISK:
            assert_said(ended)
        again = lab.train(run, *RESUME)
        assert not again.traced, f"{where}: {again.tail}"
        assert again.code == 0, f"{where}: {again.tail}"
        assert differences(lab.whole, contents(run)) == [], where
        assert [path.name for path in run.parent.iterdir()] == [run.name], where


@pytest.mark.parametrize("kind", ["full", "torn"])
def test_a_fault_at_a_write(lab: Lab, tmp_path: Path, kind: str) -> None:
    (tmp_path / "box").mkdir()
    at_writes(lab, tmp_path / "box" / "run", kind, 1)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kind", random_faults.KINDS)
def test_a_fault_at_any_write(lab: Lab, tmp_path: Path, kind: str) -> None:
    (tmp_path / "box").mkdir()
    at_writes(lab, tmp_path / "box" / "run", kind, lab.calls)


@pytest.mark.parametrize(
    "moment", quick(["step_000003", "samples/.step_000003", "/lora"], "samples/.step_000003")
)
def test_a_full_disk_names_the_last_checkpoint(lab: Lab, run: Path, moment: str) -> None:
    """Also where an earlier checkpoint is there: it is named, the partial files are gone, and it goes on."""
    ended = lab.train(run, *RESUME, fault=Fault(kind="full", at=2, folder=run.parent, match=moment))
    assert not ended.traced, ended.tail
    assert ended.code != 0
    assert "step_00000" in ended.sentence, ended.tail
    assert "no space left" in ended.sentence.lower()
    assert not [path for path in run.rglob(".*") if ".tmp-" in path.name]
    lab.assert_settled(run, lab.train(run, *RESUME), "equal")


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("change", [flip, cut, empty, delete])
def test_damage_of_every_file(lab: Lab, killed: Path, tmp_path: Path, change: Callable[[Path], None]) -> None:
    """Each file of a run but those which nothing reads: event files, older checkpoints and the grids of samples."""
    for path in sorted(path for path in killed.rglob("*") if path.is_file()):
        name = path.relative_to(killed)
        if name.parts[0] in ("tensorboard", "step_000001") or name.match("samples/*.png"):
            continue
        run = tmp_path / "run"
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(killed, run)
        change(run / name)
        sample = f"samples/{name.parts[1]}" if name.parts[0] == "samples" else ""
        lost = sample or (name.name if (change, name.name) == (delete, "metrics.jsonl") else "")
        read = sample in ("", "samples/step_000000")  # the images in between are compared with nothing
        if read:
            lab.assert_settled(run, lab.train(run, *RESUME), ANY if lost else "equal or said", lost)


def test_the_random_faults_are_of_all_programs() -> None:
    root = Path(__file__).parents[1]
    files = [*root.glob("finetune/*.py"), *root.glob("data_build/*.py")]
    programs = {f"{path.parent.name}.{path.stem}" for path in files if "\ndef main(" in path.read_text()}
    assert programs == {module for module in random_faults.MODULES if not module.startswith("eval.")}


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_faults_at_random() -> None:
    """A thousand, over all drivers and builders."""
    assert_none_bad(list(random_faults.trials(1000, seed=0)))


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_bits_at_random() -> None:
    """Two hundred, over all drivers."""
    assert_none_bad(list(random_faults.flips(200, seed=0)))


def assert_none_bad(done: list[random_faults.Trial]) -> None:
    bad = [str(trial) for trial in done if trial.verdict not in ("equal", "said")]
    assert not bad, "\n".join([random_faults.table(done), *bad])
