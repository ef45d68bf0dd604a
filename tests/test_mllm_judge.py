"""A multimodal model as a held-out judge of the programs that name it as --rewards or --holdout-rewards, against a stub."""

import csv
import json
from pathlib import Path

import pytest
from PIL import Image

import record_trajectories as recorded
from eval import benchmark
from preftune import cli
from preftune.mllm import backoff
from preftune.records import read_jsonl, write_jsonl
from preftune.training import validation
from stub_endpoint import Body, Reply, StubEndpoint, completion, look, text_of

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
