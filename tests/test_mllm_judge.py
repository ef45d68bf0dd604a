"""A multimodal model as a held-out judge of the programs that name it as --rewards or --holdout-rewards, against a stub."""

import csv
import json
from pathlib import Path

import pytest
from PIL import Image

import record_trajectories as recorded
from data_build import score
from eval import benchmark
from preftune import cli
from preftune.mllm import backoff
from preftune.records import read_jsonl, write_jsonl
from preftune.training import validation
from stub_endpoint import Body, Reply, StubEndpoint, completion, failed, look, text_of

pytestmark = pytest.mark.usefixtures("cpu")

JUDGE = """
from preftune.mllm.judge import Judge
judge = Judge(base_url={url!r}, model="m", aspects=["fidelity"], calls={calls!r}, answer_retries=0)
"""
LEVELS = {"base": (0, 128, 64), "tuned": (64, 255, 200)}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pauses are short."""
    monkeypatch.setattr(backoff, "FIRST", 0.01)


def write_judge(folder: Path, stub: StubEndpoint) -> str:
    (folder / "judge.py").write_text(JUDGE.format(url=stub.url, calls=str(folder / "calls.jsonl")))
    return f"{folder / 'judge.py'}:judge"


def test_a_benchmark_by_a_judge(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A refusal ends it without a report; the next start asks what is missing alone, and the scores are the stub's."""
    for title, levels in LEVELS.items():
        rows = []
        for number, value in enumerate(levels):
            (tmp_path / title).mkdir(exist_ok=True)
            Image.new("RGB", (16, 16), (value, value, value)).save(tmp_path / title / f"{number}.png")
            rows.append({"file_name": f"{number}.png", "text": f"prompt {number}"})
        write_jsonl(tmp_path / title / "metadata.jsonl", rows)

    def shy(body: Body) -> Reply:
        return completion("I'm sorry.") if "prompt 2" in text_of(body) else look(body)

    with StubEndpoint(shy) as stub:
        words = [
            "--folders",
            *(f"{title}={tmp_path / title}" for title in LEVELS),
            "--rewards",
            write_judge(tmp_path, stub),
        ]
        words += ["--workers", "0", "--output-dir", str(tmp_path / "report")]
        with pytest.raises(SystemExit) as stop:
            benchmark.main(cli.parse(benchmark.Config, words))
        assert stop.value.code == 2
        said = capsys.readouterr().err
        assert "m did not rate fidelity of an image of 'prompt 2': refusal" in said.splitlines()[-1]
        assert not (tmp_path / "report" / "scores.csv").exists()
        stub.answer = look
        known = sum(
            "text" in json.loads(line) for line in (tmp_path / "calls.jsonl").read_text().splitlines()
        )
        asked = len(stub.requests)
        assert benchmark.main(cli.parse(benchmark.Config, words)) == 0
        assert len(stub.requests) - asked == 2 + 6 - known, "two random images of the trial, and six"
    with (tmp_path / "report" / "scores.csv").open() as file:
        rows = list(csv.reader(file))[1:]
    assert [float(row[-1]) for row in rows] == [1, 3, 2, 2, 5, 4]


def started(name: str, *words: str) -> None:
    """Start a program with these flags."""
    if name == "refl":
        recorded.train("refl", [*words])
    else:
        score.main(cli.parse(score.Config, [*words]))


def ended(capsys: pytest.CaptureFixture[str], code: int, name: str, *words: str) -> str:
    """What a program says that ends with this code: one sentence, without a traceback."""
    with pytest.raises(SystemExit) as stop:
        started(name, *words)
    assert stop.value.code == code
    said = capsys.readouterr().err
    assert "Traceback" not in said
    assert said.count(": error: ") == 1
    assert len([line for line in said.splitlines() if "judge.py" in line]) == 1
    return said.splitlines()[-1]


def test_a_judge_that_cannot_be_asked_ends_in_a_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Wrong settings, nobody there, a refusal, a server that knows no JSON schema; a fault of the user's own keeps its traceback."""
    recorded.write_inputs(tmp_path)
    (tmp_path / "data").mkdir()
    Image.new("RGB", (16, 16)).save(tmp_path / "data/0.png")
    write_jsonl(tmp_path / "data/metadata.jsonl", [{"file_name": "0.png", "text": "a cat"}])
    with StubEndpoint() as gone:
        name = write_judge(tmp_path, gone)
    scoring = ["--data", str(tmp_path / "data"), "--workers", "0", "--output-dir", str(tmp_path / "scored")]
    nobody = f"error: {name}: no connection to {gone.url}: "
    assert nobody in ended(capsys, 1, "score", *scoring, "--rewards", name)
    training = recorded.arguments("refl", tmp_path, tmp_path / "run")
    assert nobody in ended(capsys, 2, "refl", *training, "--holdout-rewards", name)
    with StubEndpoint(lambda body: failed(400, message="what schema?")) as stub:
        said = ended(capsys, 1, "score", *scoring, "--rewards", write_judge(tmp_path, stub))
        assert (
            "rejected: status 400: what schema?; if it does not know JSON schemas: --response-format" in said
        )
    wrong = tmp_path / "wrong_judge.py"
    wrong.write_text("\nfrom preftune.mllm.judge import Judge\njudge = Judge(base_url='here', model='m')\n")
    said = ended(capsys, 2, "score", *scoring, "--rewards", f"{wrong}:judge")
    assert f"error: running wrong_judge.py ({wrong}:3): --base-url is 'here'" in said
    wrong.write_text("def judge(pixels, prompts):\n    return int('x')\n")
    with pytest.raises(SystemExit):
        score.main(cli.parse(score.Config, [*scoring, "--rewards", f"{wrong}:judge"]))
    said = capsys.readouterr().err
    assert "Traceback" in said
    assert (
        f"judge failed at {wrong}:2 (return int('x')): ValueError: invalid literal" in said.splitlines()[-1]
    )


def test_a_run_goes_on_after_an_outage_of_its_judge(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The run ends; when it is resumed at its last checkpoint, which is older, it validates again."""
    recorded.write_inputs(tmp_path)
    few = ["--validation-prompts", str(tmp_path / "prompts.txt"), "--num-validation-prompts", "3"]
    steps = ["--max-train-steps", "2", "--validation-steps", "1", "--checkpointing-steps", "1", "--pretraining", "off"]  # fmt: skip

    def out(body: Body) -> Reply:
        return look(body) if len(stub.requests) <= 2 + 3 else completion("I'm sorry.")

    with StubEndpoint(out) as stub:
        argv = [*recorded.arguments("refl", tmp_path, tmp_path / "run"), *few, *steps]
        argv += ["--holdout-rewards", write_judge(tmp_path, stub)]
        said = ended(capsys, 1, "refl", *argv)
        assert "m did not rate fidelity of an image of " in said
        assert said.endswith(f"; the last complete checkpoint is {tmp_path / 'run/step_000000'}")
        assert validation.read(tmp_path / "run", "step_000001") is None
        stub.answer = look
        recorded.train("refl", [*argv, "--resume-from-checkpoint", "latest"])
    for name in ("step_000001", "step_000002"):
        found = validation.read(tmp_path / "run", name)
        assert found is not None
        assert len(next(iter(found.holdout.values()))) == 3


def test_a_guard_by_a_judge(tmp_path: Path) -> None:
    recorded.write_inputs(tmp_path)
    with StubEndpoint() as stub:
        name = write_judge(tmp_path, stub)
        argv = recorded.arguments("refl", tmp_path, tmp_path / "run")
        few = ["--validation-prompts", str(tmp_path / "prompts.txt"), "--num-validation-prompts", "3"]
        steps = [
            "--max-train-steps",
            "1",
            "--validation-steps",
            "1",
            "--pretraining",
            "off",
            "--holdout-rewards",
            name,
        ]
        recorded.train("refl", [*argv, *few, *steps])
        assert len(stub.requests) <= 2 + 2 * 3
    found = validation.read(tmp_path / "run", "step_000001")
    assert found is not None
    ((_, scores),) = found.holdout.items()
    assert len(scores) == 3
    assert all(score in (1, 2, 3, 4, 5) for score in scores)
    assert "validation_holdout" in read_jsonl(tmp_path / "run" / "metrics.jsonl")[-1] or len({*scores}) == 1
