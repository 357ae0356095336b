"""Every command of both README.md runs, with tiny settings and small stand-ins for downloads."""

import contextlib
import dataclasses
import importlib
import itertools
import json
import re
import runpy
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import config
import tasks
import train
from evidence import chains, compare, contraction, pages, speed, timing
from models import mdeq, transformer
from tasks import Split, graphs, permutations, text

from . import test_graphs, test_images, test_mdeq, test_text, test_transformer
from .conftest import ROOT, TINY

FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
PAGES = "".join((ROOT / page).read_text() for page in ("README.md", "evidence/README.md"))
BLOCKS = [code for kind, code in FENCED.findall(PAGES) if not kind]
LINES = "".join(BLOCKS).replace("\\\n", " ").splitlines()
COMMANDS = [" ".join(line.partition("#")[0].split()) for line in LINES]
COMMANDS = [line for line in COMMANDS if line.startswith(("python", "torchrun"))]
# The files that lines of evidence.compare make, beside or instead of TASK.json.
MADE = {
    "--part main grid": ["", "-grid"],
    "--part aa": ["-aa"],
    "--part ablation": ["-ablation"],
    "--part teachers": ["-teachers"],
}


def tiny_flags(task: str) -> list[str]:
    """Flags that make a whole run of a task take seconds."""
    if task in graphs.TASKS:
        flags = test_graphs.TINY
    elif task in text.TASKS:
        flags = test_text.TINY
    elif task.startswith("imagenet"):
        flags = [*test_images.TINY, "--cache_gb=0.02"]
    else:
        flags = [*TINY, "--workers=0"]
    return [*(flag for flag in flags if "--task" not in flag)]


def small_world(folder: Path) -> None:
    """Makes the files that the commands name, and those that they would download."""
    generator = torch.Generator().manual_seed(0)
    for place, classes in (("data/imagenette-64", 10), ("DIR", test_mdeq.CLASSES)):
        for part, label in itertools.product(("train", "val"), range(classes)):
            where = folder / place / part / f"n{label:02}"
            where.mkdir(parents=True)
            for i in range(4 if part == "train" else 1):
                pixels = torch.randint(256, (40, 40, 3), generator=generator).byte().numpy()
                Image.fromarray(pixels).save(where / f"{i}.png")
    Image.fromarray(pixels[:16, :16]).save(folder / "digit.png")
    # As many words as the published transformer's stand-in has, <eos> among them.
    words = [f"w{i}" for i in range(test_transformer.WORDS - 5)]
    words = [*words, "<unk>", "The", "game", "was"]
    (folder / "data/ogbn_arxiv").mkdir()
    for place in ("data/wikitext-2", "DIR", "FOLDER"):
        (folder / place).mkdir(parents=True, exist_ok=True)
        test_text.make(folder / place, f"{' '.join(words)}\n" * 20, *[" ".join(words[:40])] * 2)
    graph = {key: value.numpy() for key, value in test_graphs.good_graph().items()}
    np.savez(folder / "mine.npz", **graph)
    torch.save(test_mdeq.reference_state(), folder / "MDEQ_Small_Cls.pkl")
    torch.save(test_transformer.reference_state(), folder / "wt103_deqtrans.pkl")
    shutil.copytree(ROOT / "results", folder / "results")
    for page in ("README.md", "RESULTS.md"):
        shutil.copy(ROOT / page, folder)


@pytest.fixture(scope="module", autouse=True)
def world(tmp_path_factory):
    """A working folder with these files, and small networks under the names of presets."""
    folder = tmp_path_factory.mktemp("readme")
    small_world(folder)

    with pytest.MonkeyPatch.context() as patch, contextlib.chdir(folder):
        small_tasks(patch)
        small_networks(patch)
        short_measurements(patch)
        # In this process, where the stand-ins are.
        patch.setattr(compare, "train", in_this_process)
        patch.setattr(contraction, "train", in_this_process)
        patch.setattr(pages, "ROOT", folder)
        yield folder


def in_this_process(module: str, *flags: str) -> None:
    """compare.train, but without another process."""
    importlib.import_module(module).main([*flags])


def small_tasks(patch) -> None:
    """Puts small tasks under the names of real ones."""
    content, sizes = test_graphs.good_graph(), dict(width=16, hidden=16)
    images, few = config.TASKS["digits"](None), slice(40)
    images = dataclasses.replace(images, test=Split(images.test.x[few], images.test.y[few]))

    def graph(name: str):
        return lambda data: graphs.node_task(name, content, sizes, graphs.SMALL, paper=sizes)

    def words(data, segment=64, memory=64):
        return dataclasses.replace(text.folder(Path("FOLDER"), segment, memory), name="docstrings")

    for name in ("cora", "ogbn-arxiv", "ogbn-products"):
        patch.setitem(config.TASKS, name, graph(name))
    patch.setitem(config.TASKS, "docstrings", words)
    for name in ("digits", "digits-hard", "cifar10"):
        patch.setitem(config.TASKS, name, lambda data, n=name: dataclasses.replace(images, name=n))


def small_networks(patch) -> None:
    """Puts small networks under the names of presets; none has torchvision's weights."""
    for name in ("imagenet-small", "imagenette"):
        patch.setitem(mdeq.PRESETS, name, test_mdeq.SMALL)
    vision = tasks.images.vision

    def plain(name, settings, classes):
        return vision(name.removesuffix("-pretrained"), settings, classes)

    patch.setattr(tasks.images, "vision", plain)
    narrow = {key: value for key, value in test_transformer.SMALL.items() if key in ("d", "heads")}
    narrow |= dict(inner=test_transformer.INNER, cutoffs=test_transformer.CUTS)
    for name in ("transformer-103", "transformer-small"):
        patch.setitem(transformer.PRESETS, name, narrow)


def short_measurements(patch) -> None:
    """Shortens the studies: two settings or students of each, one round of timing, small inputs."""
    patch.setattr(contraction, "KAPPA", contraction.KAPPA[:2])
    for name in ("grid", "ablation"):
        few = itertools.islice(compare.STUDENTS[name].items(), 2)
        patch.setitem(compare.STUDENTS, name, dict(few))
    patch.setattr(compare, "TEACHERS", dict(itertools.islice(compare.TEACHERS.items(), 2)))
    patch.setattr(permutations, "SAMPLES", (64, 16, 32))
    rounds = timing.interleaved
    for module in (timing, speed, chains):
        once = lambda jobs, n, *device, **_: rounds(jobs, 1, *device)  # noqa: E731
        patch.setattr(module, "interleaved", once)
    tiny = vars(speed.DRY) | {"networks": speed.CPU.networks, "dtype": torch.float32}
    patch.setattr(speed, "CPU", SimpleNamespace(**tiny))


def test_the_readme_has_commands():
    assert len(COMMANDS) >= 30


@pytest.mark.parametrize("line", COMMANDS)
def test_command(line, world, tmp_path, monkeypatch, capsys):
    line = line.replace('"The game was"', "The").replace("torchrun --nproc_per_node=8", "python")
    script, *flags = line.split()[1:]
    if script == "-m":
        script, *flags = flags
    if script.startswith(("models", "docs")):  # prints every preset's size, or draws
        figure = tmp_path / "figure.png"
        monkeypatch.setattr(sys, "argv", [script, *flags, str(figure)])
        runpy.run_module(script, run_name="__main__")
        assert figure.exists() or "parameters" in capsys.readouterr().out
        return
    asked = dict(itertools.pairwise([*flags, ""]))
    main = importlib.import_module(script.removesuffix(".py")).main
    if script == "evidence.pages":
        both = Path("README.md"), Path("RESULTS.md")
        before = [page.read_text() for page in both]
        main([])
        assert [page.read_text() for page in both] == before
        return
    task = asked.get("--task") or Path(asked.get("--run", "runs/digits")).name
    if script in ("train.py", "evidence.rivals"):
        main([*flags, *tiny_flags(task)])
    elif script == "evidence.contraction":
        main([*flags, "--results", str(tmp_path), "--flags", *tiny_flags(task)])
        rows = json.loads((tmp_path / f"{task}-contraction.json").read_text())["rows"]
        assert [one["setting"] for one in rows] == ["--kappa 0.5", "--kappa 0.8"]
    elif script == "evidence.compare":
        made = ["--seeds", "0", "--results", str(tmp_path)]
        main([*flags, *made, "--flags", *tiny_flags(task)])
        wanted = next((parts for asked, parts in MADE.items() if asked in line), [""])
        assert all((tmp_path / f"{task}{part}.json").exists() for part in wanted)
    elif script == "evidence.chains":
        made = ["--tasks", "chains-10", "--results", str(tmp_path)]
        main([*flags, *made, "--flags", *tiny_flags("digits-graph")])
        assert (tmp_path / "chains.png").exists()
    elif script == "evidence.depth":
        made = ["--results", str(tmp_path), "--flags", *tiny_flags("permutations")]
        compare.main(["--task", "permutations", "--seeds", "0", *made])
        main([*flags, *made])
        assert (tmp_path / "permutations-depth.png").exists()
    elif script == "evidence.speed":
        main(flags)
        found = json.loads(Path("results/speed.json").read_text())
        assert found["measured"].keys() == speed.PARTS.keys() | speed.CPU.networks.keys()
        assert "not_measured" not in json.dumps(found)
    else:
        if not Path(asked["--run"], "student.pt").exists():
            data = ["--data", "data"]
            train.main(["--task", task, "--out", asked["--run"], *data, *tiny_flags(task)])
            capsys.readouterr()
        main(flags)
    assert capsys.readouterr().out
