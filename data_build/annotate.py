"""Serve pages on which people rate, rank and choose images, and write what training reads: the three annotation stages of
ImageReward (arXiv 2304.05977, appendix A.3 and B) and the user study of two alternatives of HPS (arXiv 2303.14420).

Annotators have links of their own, and orders of their own of prompts and images; nobody sees where an image is from. Ctrl-C ends
it, and the same command goes on. `--no-serve` writes the results of the answers that there are, and ends.

    preftune annotate --data images --tasks prompt rating ranking --annotators ann bob --inspectors eve --output-dir annotations
    preftune annotate --data base=images/base tuned=images/tuned --tasks choice --annotators p1 p2 p3 --output-dir study
    preftune annotate --output-dir study --raters-from data/annotated --no-serve

    study.json, items.jsonl, images/    the study: made by the first start, of --data
    answers.sqlite                      the answers, each on the disk before the page goes on; it holds the secret of the links
    rankings.jsonl                      rankings and choices, for `preftune reward-model` and `preftune dpo`
    metadata.jsonl                      rated images with their mean points, for `preftune reward-weighted`
    answers.jsonl                       all answers
    statistics.json, statistics.html    win rates, votes, agreement, Krippendorff's alpha, time

The results are written at every start, at the end, and by the inspector's button. Left out: images for a prompt that are
generated on demand, and accounts: whoever has a link is that person. The server speaks HTTP without encryption: at another
--host than this machine, put it behind a server that encrypts.
"""

import contextlib
import dataclasses
import re
import signal
import socket
from dataclasses import dataclass
from pathlib import Path

from preftune.annotation.tasks import KINDS, Kind, PromptProblem
from preftune.cli import exit_on_user_error, parse

_NAME = re.compile(r"\w[\w .@-]{0,39}")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Serve the pages of a study."""

    output_dir: Path
    """Folder of the study; made from --data where it does not exist yet."""
    data: tuple[str, ...] = ()
    """Folders of captioned images or rankings, each NAME=FOLDER or FOLDER; as a model, say. () = the study is there."""
    tasks: tuple[Kind, ...] = ("ranking",)
    """What is asked, in this order for each prompt: prompt = category and problems; rating = four axes of seven points and problems;
    ranking = an order of up to 9 images; choice = one of two images, of two folders, or of a single one any two.
    """
    annotators: tuple[str, ...] = ()
    """Names of people who answer; more can be added later."""
    inspectors: tuple[str, ...] = ()
    """Names of people who accept answers or send them back; they may answer, too."""
    annotators_per_item: int | None = None
    """Annotators who answer each prompt; None = all. Shares are even, and who joins later takes over what nobody has begun."""
    repeats: float = 0.05
    """Share of items that an annotator gets a second time, for the agreement with themselves, in [0, 1]."""
    choice_ties: bool = False
    """Let a choice be left undecided."""
    raters: tuple[str, ...] = ()
    """Columns of scores, or sources of rankings, in --data that people are compared with, such as scorers."""
    raters_from: tuple[Path, ...] = ()
    """Folders with rankings of images of the study, such as annotate-mllm writes: people are compared with all their sources. Other
    than --raters these may be of after the answers; name them whenever results are written.
    """
    guidelines: Path | None = None
    """Text file shown instead of the guidelines here: paragraphs, `# headings` and `- items`."""
    accepted_only: bool = False
    """Write only what an inspector has accepted into rankings.jsonl and metadata.jsonl."""
    drop_problems: tuple[PromptProblem, ...] = ()
    """Leave prompts out of rankings.jsonl and metadata.jsonl that anybody has marked with one of these problems; needs the task prompt."""
    serve: bool = True
    """Serve the pages; --no-serve: only make the study, or write the results of its answers."""
    host: str = "127.0.0.1"
    """Address to listen at."""
    port: int = 8765
    """Port to listen at; 0 = any that is free."""
    seed: int = 1
    """Orders are a function of (seed, annotator, item)."""

    def __post_init__(self) -> None:
        names = (*self.annotators, *self.inspectors)
        for name in names:
            if not _NAME.fullmatch(name):
                raise ValueError(f"the name {name!r} must have 1 to 40 letters, digits, spaces, . - _ and @")
        if len(set(names)) < len(names):
            raise ValueError(
                f"{max(names, key=names.count)} is named twice among --annotators and --inspectors"
            )
        if not self.tasks or len(set(self.tasks)) < len(self.tasks):
            raise ValueError(f"--tasks names one or more of {', '.join(KINDS)}, each once")
        if not 0 <= self.repeats <= 1:
            raise ValueError(f"--repeats must be in [0, 1], got {self.repeats}")
        if self.annotators_per_item is not None and self.annotators_per_item < 1:
            raise ValueError(f"--annotators-per-item must be at least 1, got {self.annotators_per_item}")
        if not 0 <= self.port <= 65535:
            raise ValueError(f"--port must be in 0..65535, got {self.port}")


if __name__ == "__main__":  # flags are read before numpy is imported
    CONFIG = parse(Config)

from data_build import annotation_study
from data_build.annotation_server import PAGES, listening, server
from data_build.annotation_service import Service
from preftune.annotation.items import Item, Settings, is_study, read_study
from preftune.annotation.results import Selection
from preftune.annotation.storage import Storage, is_there
from preftune.cli.notes import counted, say
from preftune.cli.printable import show
from preftune.files import replacing, write_text
from preftune.files.one_writer import one_writer
from preftune.pages import render
from rewards.input_files import read_text

MAX_GUIDELINES = 1 << 20
"""Bytes of --guidelines."""


def settings_of(config: Config) -> Settings:
    """Return what a study is made with."""
    return Settings(
        tasks=tuple(kind for kind in KINDS if kind in config.tasks),
        data=config.data,
        seed=config.seed,
        repeats=config.repeats,
        annotators_per_item=config.annotators_per_item,
        choice_ties=config.choice_ties,
        raters=config.raters,
    )


def study_of(config: Config) -> tuple[Settings, list[Item]]:
    """Return the study of the output folder, which is made where it is not there; ValueError for another one than --data says."""
    folder = config.output_dir
    if is_study(folder):
        settings, items = read_study(folder)
        asked = settings_of(config)
        usual = {field.name: field.default for field in dataclasses.fields(Config)}
        for name, value in vars(asked).items():  # without --data, what is not named is the study's
            if value != getattr(settings, name) and (config.data or value != usual[name]):
                raise ValueError(
                    f"{folder} holds a study with {_typed(name, getattr(settings, name))}, not {_typed(name, value)};"
                    " leave --data and the flags of the study out to go on with it, or choose another --output-dir"
                )
        _check_tasks(config, settings)
        return settings, items
    if folder.exists():
        raise ValueError(f"{folder} exists already and is no study; remove it or choose another --output-dir")
    if not config.data:
        raise ValueError(
            f"there is no study at {folder} yet; --data names the folders of images to make it of"
        )
    settings = settings_of(config)
    _check_tasks(config, settings)
    if config.serve and not (config.annotators or config.inspectors):
        raise ValueError("nobody takes part; --annotators names people")
    annotation_study.named_folders(settings.data)
    with replacing(folder) as unfinished:
        unfinished.mkdir()
        items = annotation_study.write(unfinished, settings)
    return settings, items


def _check_tasks(config: Config, settings: Settings) -> None:
    if config.drop_problems and "prompt" not in settings.tasks:
        raise ValueError(
            f"--drop-problems needs answers of the task prompt, and this study has {', '.join(settings.tasks)}"
        )


def _typed(name: str, value: object) -> str:
    """Return a flag and its value as they are typed."""
    flag = name.replace("_", "-")
    if isinstance(value, bool):
        return f"--{flag}" if value else f"--no-{flag}"
    return f"--{flag} {' '.join(map(str, value)) or 'none' if isinstance(value, tuple) else value}"


def guidelines_of(config: Config) -> str:
    """Return the text of the guidelines."""
    return read_text(config.guidelines or PAGES / "guidelines.txt", MAX_GUIDELINES)


def write_results(service: Service, config: Config) -> None:
    """Write all results, and say what there is."""
    counts = service.export()
    style = (PAGES / "annotate.css").read_text(encoding="utf-8")
    page = render(PAGES / "statistics.html.jinja", found=service.found(), style="", embedded=style)
    write_text(config.output_dir / "statistics.html", page)
    show(", ".join(f"{name}: {number}" for name, number in counts.items()))


def say_shares(service: Service) -> None:
    """Say who has how much where prompts are shared out, and that there are too few for it."""
    number, shares = service.settings.annotators_per_item, service.shares()
    if number is None or not shares:
        return
    parts = [
        f"{name} {counted(items, 'item')}" + (f" and {counted(again, 'repeat')}" if again else "")
        for name, (items, again) in shares.items()
    ]
    say(f"shares: {', '.join(parts)}")
    if len(shares) < number:
        there = "1 takes" if len(shares) == 1 else f"{len(shares)} take"
        say(
            f"each prompt is to have {number} annotators, and {there} part so far; --annotators adds people",
            "warning: ",
        )


def serve(service: Service, config: Config, guidelines: str, place: socket.socket) -> None:
    """Serve until Ctrl-C or SIGTERM; each answer is on the disk by then."""
    web = server(service, place, guidelines=guidelines)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    host = f"[{config.host}]" if ":" in config.host else config.host
    for person, path in service.links():
        show(f"{person.name} ({person.role}): http://{host}:{web.port}{path}")
    say("each link is for its person alone; Ctrl-C ends, and the same command goes on")
    try:
        web.serve_forever()
    except KeyboardInterrupt:
        say("ended")
    finally:
        web.server_close()


@one_writer
def main(config: Config) -> None:
    """Make or open the study, write the results that there are, serve, write the results."""
    with contextlib.ExitStack() as at_the_end:
        with exit_on_user_error():
            guidelines = guidelines_of(config)
            place = at_the_end.enter_context(listening(config.host, config.port)) if config.serve else None
            settings, items = study_of(config)
            raters = annotation_study.read_raters(config.raters_from, items)
            if (
                not config.serve
                and not is_there(config.output_dir)
                and not (config.annotators or config.inspectors)
            ):
                show(f"{config.output_dir}: {len(items)} items, no answers yet")
                return
            storage = Storage(config.output_dir)
            at_the_end.callback(storage.close)
            storage.add_people(config.annotators, "annotator")
            storage.add_people(config.inspectors, "inspector")
            if config.serve and not storage.people():
                raise ValueError("nobody takes part; --annotators names people")
        selection = Selection(accepted_only=config.accepted_only, drop_problems=config.drop_problems)
        service = Service(config.output_dir, settings, items, storage, raters=raters, selection=selection)
        write_results(service, config)
        say_shares(service)
        if place is not None:
            serve(service, config, guidelines, place)
            write_results(service, config)


if __name__ == "__main__":
    main(CONFIG)
