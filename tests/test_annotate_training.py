"""From images of the embedded model to a trained scorer and a LoRA, with the judge of the shapes world as the annotator."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from annotated import ROOT, Served, answer_of, ask
from browser import Browser
from data_build import simulate_rankings
from finetune import dpo, reward_model
from preftune.cli import parse

TINY = ROOT / "assets" / "tiny"


def best_of(golds: dict[str, float]) -> Any:
    """Order image ids as the judge does."""
    return lambda ids: sorted(ids, key=lambda image: -golds[image])


def order_all(link: str, golds: dict[str, float]) -> None:
    """Order all images as the judge does: with the keys of a browser where there is one, else over HTTP."""
    try:
        browser = Browser()
    except pytest.skip.Exception:
        while not (task := ask(f"{link}task")).get("finished"):
            ask(
                f"{link}answer",
                {"task": task["task"], "answer": answer_of(task, best_of(golds)), "seconds": 1},
            )
        return
    tab = browser.open("judge", link)
    while task := tab.task():
        shown = tab.run(
            "[...document.querySelectorAll('#work figure img')].map((image) => image.src.split('/').at(-1))"
        )
        tab.keys(*(str(shown.index(image) + 1) for image in best_of(golds)(shown)), "Enter")
        tab.until(f"document.body.dataset.task !== '{task}'")
    browser.close()


def test_from_pages_to_a_scorer_and_a_lora(tmp_path: Path, cpu: None) -> None:
    words = [
        "--count",
        "5",
        "--images",
        "4",
        "--step-counts",
        "2",
        "--annotator-noise",
        "0",
        "--model",
        str(TINY / "pipeline"),
    ]
    simulate_rankings.main(
        parse(simulate_rankings.Config, [*words, "--output-dir", str(tmp_path / "images")])
    )
    rows = [json.loads(line) for line in (tmp_path / "images" / "rankings.jsonl").read_text().splitlines()]
    golds = {
        hashlib.sha256((tmp_path / "images" / name).read_bytes()).hexdigest()[:24]: gold + at / 1e6
        for row in rows
        for at, (name, gold) in enumerate(zip(row["generations"], row["gold"], strict=True))
    }
    study = tmp_path / "study"
    flags = ("--data", tmp_path / "images", "--annotators", "judge", "--repeats", "0", "--output-dir", study)
    with Served(*flags) as web:
        order_all(web.links["judge"], golds)
        assert "rankings.jsonl: 5" in web.end()
    for line in (study / "rankings.jsonl").read_text().splitlines():
        row = json.loads(line)
        in_order = [
            golds[Path(name).stem] for _, name in sorted(zip(row["ranking"], row["generations"], strict=True))
        ]
        assert in_order == sorted(in_order, reverse=True), "the order is the judge's"
    common = [
        "--data",
        str(study),
        "--max-train-steps",
        "2",
        "--train-batch-size",
        "2",
        "--mixed-precision",
        "no",
    ]
    scorer = ["--model", str(TINY / "imagereward"), "--validation-steps", "2", "--checkpointing-steps", "2"]
    assert (
        reward_model.main(
            parse(reward_model.Config, [*common, *scorer, "--output-dir", str(tmp_path / "scorer")])
        )
        == 0
    )
    assert (tmp_path / "scorer" / "scorer" / "config.json").is_file()
    tuned = ["--model", str(TINY / "pipeline"), "--resolution", "64", "--gradient-accumulation-steps", "1"]
    shown = [
        "--num-validation-prompts",
        "1",
        "--sample.num-inference-steps",
        "1",
        "--sample.resolution",
        "64",
    ]
    assert dpo.main(parse(dpo.Config, [*common, *tuned, *shown, "--output-dir", str(tmp_path / "lora")])) == 0
    metrics = [json.loads(line) for line in (tmp_path / "lora" / "metrics.jsonl").read_text().splitlines()]
    assert metrics[0]["loss"] == pytest.approx(0.6931, abs=1e-4)
    assert (tmp_path / "lora" / "lora").is_dir()
