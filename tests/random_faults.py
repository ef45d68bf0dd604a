"""Faults at random in every driver and every builder: each is followed by the same command again, whose result is compared.

    python tests/random_faults.py --trials 1000 --seed 0

A trial runs a program on tiny inputs with a fault at a random write (see faults.KINDS), sometimes a second time with another
fault, then without one: a driver with `--resume-from-checkpoint latest`, a builder as it was. Its verdict is one of VERDICTS.
"""

import argparse
import random
import shutil
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import record_trajectories as recorded
import stub_endpoint
from faults import Ended, Fault, Server
from run_contents import contents, differences, is_leftover

VERDICTS = ("equal", "said", "different", "leftover", "traceback", "hangs")
"""equal: all files are those of a command without faults; said: it stopped with one sentence and exit code 2 at the end;
different: it said nothing, and a file is another; leftover: equal, but an unfinished file is still there."""
KINDS = ("full", "error", "kill", "torn", "term", "read-only")
RESUME = ["--resume-from-checkpoint", "latest"]

_SAMPLE = "--sample.num-inference-steps 2 --sample.solver ddim --sample.resolution 32"
_BUILDERS = {
    "shapes": "--count 6",
    "simulate_rankings": "--count 2 --images 3",
    "simulate_rankings climbed": "--count 2 --images 3 --model {root}/pipeline --step-counts 2 --climbed-by brightness --climb-steps 2",
    "generate": f"--model {{root}}/pipeline --prompts {{root}}/prompts.txt --count 4 --images 2 --prompts-per-part 2 {_SAMPLE}",
    "score": "--data {root}/images --rewards brightness shapes --chunk 4 --batch-size 2 --workers 0 --best 1",
    "score metadata": "--data {box}/images --rewards brightness --chunk 5 --workers 0 --best 0 --add-to-metadata",
    "diffusiondb": "--data {root}/parts --rewards shapes --workers 0 --batch-size 5 --shown 2 --scale 2",
    "preferences": "--layout hpdv2-test --input {root}/hpd/test.json",
    "annotate_mllm": "--data {root}/rankings --base-url {endpoint} --model m --concurrency 1 --aspects fidelity --orders 2",
    "annotate": "--data {root}/images --tasks prompt rating --no-serve",
    "unpack": "--data {root}/parts/part-000001.zip",
    "select_prompts": "--prompts {root}/prompts.txt --per-group 2 --k 3",
    "discord_choices": "--input {root}/chats/chat.json --salt-file {root}/chats/salt",
    "clean_prompts": "--prompts {root}/prompts.txt",
    "clean_prompts model": "--prompts {root}/prompts.txt --cleaner model --base-url {endpoint} --model m --concurrency 1",
}
_EVALUATIONS = {
    "benchmark images": f"--model {{root}}/pipeline --prompts {{root}}/prompts.txt --count 3 --num-images-per-prompt 2 {_SAMPLE}"
    " --sample.batch-size 4",
    "benchmark": "--folders a={root}/images b={root}/images --rewards brightness shapes --workers 0 --batch-size 2",
    "distribution": "--folders a={root}/images b={root}/images --rewards brightness shapes --workers 0 --batch-size 2",
    "selection": "--data {root}/rankings --rewards brightness --workers 0 --batch-size 2",
    "steps": f"--model {{root}}/pipeline --prompts {{root}}/prompts.txt --count 2 --num-images-per-prompt 2 --rewards brightness {_SAMPLE}",
}
DRIVERS = tuple(sorted(recorded._FLAGS))
PROGRAMS = (*DRIVERS, *_BUILDERS, *_EVALUATIONS)


def module_of(program: str) -> str:
    """The module of a program."""
    if program in _EVALUATIONS:
        return "eval.generate" if program == "benchmark images" else f"eval.{program}"
    return f"finetune.{program}" if program in DRIVERS else f"data_build.{program.split()[0]}"


MODULES = tuple(dict.fromkeys(map(module_of, PROGRAMS)))


def write_inputs(root: Path) -> None:
    """Write what the command lines name."""
    import test_diffusiondb
    import test_discord
    import test_preferences

    recorded.write_inputs(root)
    (root / "two.txt").write_text("a red circle\na blue square\n")
    for part, prompts in ((1, range(5)), (2, range(3, 8))):
        members = test_diffusiondb.members(part, prompts, 3)
        test_diffusiondb.write_part(root / "parts" / f"part-{part:06d}.zip", members)
    test_discord.write_small(root / "chats")
    (root / "hpd").mkdir()
    rows = [test_preferences.hpd(root / "hpd", ["0.jpg", "1.jpg", "2.jpg"])]
    test_preferences.config(root / "hpd", [*rows, test_preferences.hpd(root / "hpd", ["2.jpg", "3.jpg"])])


def arguments(program: str, root: Path, box: Path) -> list[str]:
    """The command line of a program whose output is box/out."""
    if program in DRIVERS:
        flags = recorded.arguments(program, root, box / "out")
        validated = ["--validation-prompts", str(root / "two.txt")] if "--sample.solver" in flags else []
        return [*flags, *validated, "--checkpoints-total-limit", "2", "--validation-steps", "2"]
    line = (_BUILDERS | _EVALUATIONS)[program]
    endpoint = stub_endpoint.background() if "{endpoint}" in line else ""
    words = line.format(root=root, box=box, endpoint=endpoint).split()
    return [*words, "--output-dir", str(box / "out")]


def fresh_box(program: str, root: Path, box: Path) -> None:
    """An empty folder, or one with the data that the program adds to."""
    shutil.rmtree(box, ignore_errors=True)
    box.mkdir()
    if program == "score metadata":
        shutil.copytree(root / "images", box / "images")


@dataclass(frozen=True, kw_only=True)
class Reference:
    """A program's result without faults."""

    contents: dict[str, str]
    calls: int


def reference_of(server: Server, program: str, root: Path, box: Path) -> Reference:
    """Run a program without faults."""
    fresh_box(program, root, box)
    ended = server.run(module_of(program), arguments(program, root, box), Fault(folder=box))
    assert ended.code == 0, f"{program}: {ended.output[-3000:]}"
    return Reference(contents=contents(box), calls=ended.calls)


@dataclass(kw_only=True)
class Trial:
    """One trial, and what it came to."""

    program: str
    faults: list[tuple[str, int]]
    verdict: str = ""
    wheres: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        faults = ", ".join(
            f"{kind} at {at} ({where})"
            for (kind, at), where in zip(self.faults, [*self.wheres, "", ""], strict=False)
        )
        return f"{self.verdict:10s} {self.program}: {faults}: {' | '.join(self.notes)}"


def drawn(rng: random.Random, program: str, reference: Reference) -> Trial:
    """A trial at random."""
    number = 2 if rng.random() < 0.3 else 1
    faults = [(rng.choice(KINDS), rng.randint(1, reference.calls)) for _ in range(number)]
    return Trial(program=program, faults=faults)


def attempt(server: Server, trial: Trial, reference: Reference, root: Path, box: Path) -> Trial:
    """Do what a trial says, and judge it."""
    program = trial.program
    fresh_box(program, root, box)
    argv, module = arguments(program, root, box), module_of(program)
    attempts: list[tuple[str, int]] = [*trial.faults, ("count", 0)]
    verdict = ""
    for number, (kind, at) in enumerate(attempts):
        again = RESUME if number and program in DRIVERS else []
        try:
            ended = server.run(module, [*argv, *again], Fault(kind=kind, at=at, folder=box))
        except AssertionError as error:
            trial.verdict, trial.notes = "hangs", [str(error)[-500:]]
            return trial
        trial.wheres.append(ended.where.replace(str(box), "BOX"))
        if ended.traced:
            verdict = "traceback"
            trial.notes.append(f"run {number + 1} ({kind}): {last_line(ended)}")
        if ended.code == 0:  # the fault came too late, or does no harm
            break
        if kind == "count" or not (ended.sentence or ended.traced or kind in ("kill", "torn", "term")):
            trial.notes.append(f"run {number + 1} ({kind}): exit code {ended.code}: {last_line(ended)}")
    differ = differences(reference.contents, contents(box))
    if verdict:
        trial.verdict = verdict
    elif ended.code and differ:
        trial.verdict = "said" if ended.code == 2 and ended.sentence else "traceback"
    elif all(is_leftover(name.rsplit(" is new", 1)[0]) for name in differ):
        trial.verdict = "leftover" if differ else "equal"
    else:
        trial.verdict = "different"
    trial.notes += differ[:6] if trial.verdict != "said" else []
    return trial


def flipped(
    server: Server, rng: random.Random, reference: Reference, program: str, root: Path, box: Path
) -> Trial:
    """Kill a driver at random, flip one bit of a file that is read again, go on, and judge."""
    trial = Trial(program=program, faults=[("kill", rng.randint(reference.calls // 2, reference.calls))])
    fresh_box(program, root, box)
    argv, module = arguments(program, root, box), module_of(program)
    server.run(module, argv, Fault(kind="kill", at=trial.faults[0][1], folder=box))
    steps = sorted(path.name for path in (box / "out").glob("step_*"))
    files = [path for path in (box / "out").rglob("*") if path.is_file() and path.stat().st_size]
    files = [path for path in files if _is_read(path.relative_to(box / "out"), steps[-1:])]
    path = rng.choice(sorted(files))
    content = bytearray(path.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)
    trial.wheres.append(f"bit of {path.relative_to(box)}")
    ended = server.run(module, [*argv, *RESUME], Fault(folder=box))
    aside = [f"out/{found.name}" for found in (box / "out").glob("*.damaged")]
    differ = [
        line for line in differences(reference.contents, contents(box)) if not line.startswith(tuple(aside))
    ]
    names = [part for part in path.relative_to(box / "out").parts if part != "samples"]
    warned = names[0] in ended.output
    if ended.traced:
        trial.verdict = "traceback"
    elif ended.code == 0 and not differ:
        trial.verdict = "equal"
    else:
        trial.verdict = (
            "said" if (ended.code == 2 and ended.sentence) or (not ended.code and warned) else "different"
        )
    trial.notes += [last_line(ended), *differ[:6]]
    return trial


def _is_read(name: Path, newest: list[str]) -> bool:
    """Whether a resume reads a file again: not event files, older checkpoints, grids, and samples but the first."""
    if name.parts[0] in ("tensorboard", "config.yaml") or name.name.startswith("."):
        return False
    if name.parts[0].startswith("step_"):
        return name.parts[0] in newest
    return name.parts[0] != "samples" or (len(name.parts) == 3 and name.parts[1].startswith("step_000000"))


def chosen(
    number: int, rng: random.Random, programs: tuple[str, ...]
) -> Iterator[tuple[Server, str, Reference, Path, Path]]:
    """Yield so many programs at random: server, program, what it writes without faults, folder of inputs, folder to run in."""
    with tempfile.TemporaryDirectory() as folder, Server(*MODULES) as server:
        root, box = Path(folder) / "inputs", Path(folder) / "box"
        root.mkdir()
        write_inputs(root)
        references: dict[str, Reference] = {}
        for _ in range(number):
            program = rng.choice(programs)
            if program not in references:
                references[program] = reference_of(server, program, root, box)
            yield server, program, references[program], root, box


def flips(number: int, seed: int) -> Iterator[Trial]:
    """Yield so many trials with a flipped bit, over all drivers."""
    rng = random.Random(seed)
    for server, program, reference, root, box in chosen(number, rng, DRIVERS):
        yield flipped(server, rng, reference, program, root, box)


def last_line(ended: Ended) -> str:
    """The end of what a program printed."""
    return (ended.output.strip().splitlines() or [""])[-1][:300]


def trials(number: int, seed: int, programs: tuple[str, ...] = PROGRAMS) -> Iterator[Trial]:
    """Yield so many trials of these programs, judged."""
    rng = random.Random(seed)
    for server, program, reference, root, box in chosen(number, rng, programs):
        yield attempt(server, drawn(rng, program, reference), reference, root, box)


def table(done: list[Trial]) -> str:
    """Counts of verdicts by program and by kind of the first fault."""
    lines = [" " * 18 + "".join(f"{verdict:>11s}" for verdict in VERDICTS)]
    groups = {name: [trial for trial in done if trial.program == name] for name in PROGRAMS}
    groups |= {kind: [trial for trial in done if trial.faults[0][0] == kind] for kind in KINDS}
    for name, group in {**groups, "all": done}.items():
        counts = Counter(trial.verdict for trial in group)
        lines.append(f"{name:18s}" + "".join(f"{counts[verdict]:11d}" for verdict in VERDICTS))
    return "\n".join(lines)


def main() -> None:
    """Print each trial and, at the end or when it is stopped, the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--programs", nargs="*", default=PROGRAMS)
    parser.add_argument("--flips", action="store_true", help="flip a bit after a kill")
    config = parser.parse_args()
    done: list[Trial] = []
    chosen = tuple(config.programs)
    found = flips(config.trials, config.seed) if config.flips else trials(config.trials, config.seed, chosen)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        for trial in found:
            done.append(trial)
            print(len(done), trial, flush=True)  # noqa: T201
    except KeyboardInterrupt:
        print(f"stopped after {len(done)} of {config.trials}")  # noqa: T201
    print(table(done))  # noqa: T201


if __name__ == "__main__":
    sys.exit(main())
