"""Studies for the tests of annotation: folders of small images with captions, a study of them, and a client of its pages."""

import json
import os
import re
import subprocess
import sys
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from data_build import annotate
from data_build.annotation_service import Service
from data_build.annotation_study import read_raters
from preftune.annotation.items import read_study
from preftune.annotation.results import Selection
from preftune.annotation.storage import Storage

ROOT = Path(__file__).parents[1]
TOKEN = re.compile(r"^(\w[\w .@-]*) \((annotator|inspector)\): (http://\S+)/(\w{32})/$", re.MULTILINE)


def images(folder: Path, prompts: Sequence[str], number: int, shade: int = 0, **columns: Any) -> Path:
    """Write a folder of `number` images of each prompt, all of another colour; columns are functions of (prompt, image) or values."""
    folder.mkdir(parents=True)
    rows = []
    for p, prompt in enumerate(prompts):
        for k in range(number):
            name = f"secret_{folder.name}_{p:04d}_{k}.png"
            colour = ((37 * p + 5 * shade) % 256, (28 * k + shade) % 256, (p // 7 + 11 * shade) % 256)
            Image.new("RGB", (24, 16), colour).save(folder / name)
            extra = {key: value(p, k) if callable(value) else value for key, value in columns.items()}
            rows.append({"file_name": name, "text": prompt, **extra})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def config(folder: Path, *data: str | Path, **flags: Any) -> annotate.Config:
    """The configuration of a study at folder/study."""
    given = {"annotators": ("ann", "bob"), "inspectors": ("eve",)} | flags
    return annotate.Config(output_dir=folder / "study", data=tuple(map(str, data)), **given)


def service(folder: Path, *data: str | Path, **flags: Any) -> Service:
    """A study as the program opens it, without its lock."""
    settings = config(folder, *data, **flags)
    annotate.study_of(settings)
    made_with, items = read_study(settings.output_dir)
    storage = Storage(settings.output_dir)
    storage.add_people(settings.annotators, "annotator")
    storage.add_people(settings.inspectors, "inspector")
    return Service(
        settings.output_dir, made_with, items, storage, raters=read_raters(settings.raters_from, items),
        selection=Selection(accepted_only=settings.accepted_only, drop_problems=settings.drop_problems),
    )  # fmt: skip


class Served:
    """The program in a process of its own."""

    def __init__(self, *words: str | Path, port: int = 0) -> None:
        """Start it, and wait for the links."""
        command = [sys.executable, "-m", "preftune", "annotate", *map(str, words), "--port", str(port)]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        self.process = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        assert self.process.stdout is not None
        said = ""
        for line in self.process.stdout:
            said += line
            if "Ctrl-C ends" in line:
                break
        self.links = {name: f"{address}/{token}/" for name, _, address, token in TOKEN.findall(said)}
        assert self.links, said
        self.port = int(next(iter(self.links.values())).split(":")[2].split("/")[0])

    def kill(self) -> None:
        """End it at once, wherever it is."""
        self.process.kill()
        self.process.wait()

    def end(self) -> str:
        """End it as a user or a system does, and return what it said; a process in the background may ignore Ctrl-C."""
        self.process.terminate()
        said, _ = self.process.communicate(timeout=60)
        assert self.process.returncode == 0, said
        return said

    def __enter__(self) -> "Served":
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()


def ask(address: str, body: object = None) -> Any:
    """What a server answers, as an object; an HTTPError where it refuses."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(address, data, {"Content-Type": "application/json"} if data else {})
    with urllib.request.urlopen(request, timeout=30) as response:
        return json.loads(response.read())


def answer_of(task: dict[str, Any], best: Any = sorted) -> dict[str, Any]:
    """A legal answer of a task; `best` orders image ids, the best first."""
    if task["kind"] == "prompt":
        return {"category": "Animals", "problems": ["unclear"]}
    if task["kind"] == "rating":
        return {"alignment": 5, "fidelity": 4, "harmlessness": 7, "overall": 5, "problems": ["body"]}
    return {"ranks": {image: rank for rank, image in enumerate(best(task["images"]), 1)}}


def answer_all(link: str, best: Any = sorted, seconds: float = 2.0) -> int:
    """Answer all tasks of a link over HTTP, and return their number."""
    done = 0
    while not (task := ask(f"{link}task")).get("finished"):
        ask(f"{link}answer", {"task": task["task"], "answer": answer_of(task, best), "seconds": seconds})
        done += 1
    return done
