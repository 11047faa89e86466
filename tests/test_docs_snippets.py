"""The documents' examples, run in their order as a newcomer would, on files that this test writes."""

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from sklearn.datasets import load_digits

import arguments
import export
import hub
import models_mamba  # noqa: F401  (registers its models with timm)
import predict
import visualize
from helpers import write_hub_file
from vim_pretrained import PUBLISHED

ROOT = Path(__file__).resolve().parents[1]


def snippets_of(document: str) -> list[tuple[str, str]]:
    """(language, text) of the code blocks that name a language."""
    return re.findall(r"^```(\w+)\n(.*?)^```", (ROOT / document).read_text(), re.MULTILINE | re.DOTALL)


SNIPPETS = snippets_of("docs/GUIDE.md")


def is_of_big_data(line: str) -> bool:
    """Of data sets that no test has: its flags are read, and it is not run."""
    return "/data/" in line or "hfds/timm" in line


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A folder like a clone in which `make demo` has run, with some photos of digits, and
    the published tiny file's name, with fresh weights, in the Hub's cache.
    """
    folder = tmp_path_factory.mktemp("clone")
    (folder / "vim").symlink_to(ROOT / "vim")
    demo = folder / "output" / "demo" / "vim_nano_patch4_32"
    demo.mkdir(parents=True)
    model = timm.create_model("vim_nano_patch4_32", num_classes=10).state_dict()
    args = argparse.Namespace(model="vim_nano_patch4_32", input_size=32, data_set="DIGITS")
    names = [str(digit) for digit in range(10)]
    state = {"model": model, "model_ema": model, "epoch": 13, "args": args, "class_names": names}
    torch.save(state, demo / "best_checkpoint.pth")
    (folder / "photos").mkdir()
    for i, digit in enumerate(load_digits().images[:3]):
        Image.fromarray((digit * 15).astype("uint8")).save(folder / "photos" / f"{i}.png")
    published = PUBLISHED["vim_tiny_patch16_224"]
    fresh = {"model": timm.create_model("vim_tiny_patch16_224").state_dict(), "args": argparse.Namespace()}
    write_hub_file(folder / "hub", published.repo, published.file, fresh)
    return folder


# Each snippet has a process of its own, forked from one that has imported what is not ours: that takes longer than
# most snippets, and `import timm` alone must still not know our models.
RUNNER = """
import json, os, runpy, sys, traceback
import matplotlib.figure, sklearn.datasets, sklearn.model_selection
import timm, timm.optim, timm.scheduler, torch, torchvision, torch.utils.tensorboard

def run(language, text):
    if language == "python":
        exec(compile(text, "<snippet>", "exec"), {"__name__": "__main__"})
        return
    sys.argv = text.split()[1:]
    sys.path[0] = os.path.dirname(sys.argv[0])
    runpy.run_path(sys.argv[0], run_name="__main__")

for language, text in json.load(sys.stdin):
    print(text, flush=True)
    child = os.fork()
    if child == 0:
        code = 0
        try:
            run(language, text)
        except SystemExit as leaving:
            code = leaving.code or 0
        except BaseException:
            traceback.print_exc()
            code = 1
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    if os.waitpid(child, 0)[1] != 0:
        sys.exit("this one failed")
"""


def run(folder: Path, snippets: list[tuple[str, str]]) -> None:
    environment = os.environ | {"HF_HOME": str(folder), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", RUNNER], cwd=folder, env=environment, input=json.dumps(snippets),
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:]


@pytest.mark.slow
def test_the_guide_from_top_to_bottom(clone):
    pytest.importorskip("onnxruntime")
    lines = [(language, [text] if language == "python" else text.splitlines()) for language, text in SNIPPETS]
    snippets = [(language, text) for language, texts in lines for text in texts if not is_of_big_data(text)]
    assert all(language == "python" or text.startswith("python vim/") for language, text in snippets)
    assert len(snippets) > 12
    run(clone, snippets)
    written = ("guesses.csv", "model.onnx", "my-vim/config.json", "finetuned/checkpoint.pth")
    assert [name for name in written if not (clone / "output" / name).exists()] == []
    assert len(list((clone / "output" / "pictures").glob("*.png"))) == 2


def test_commands_of_big_data_have_flags_that_exist(monkeypatch):
    monkeypatch.chdir(ROOT)  # they name files of the repository
    lines = [line for language, text in SNIPPETS if language == "sh" for line in text.splitlines()]
    lines = [line for line in lines if is_of_big_data(line)]
    assert len(lines) >= 4
    for line in lines:
        args = arguments.parse_args(shlex.split(line)[2:])
        assert args.model == "vim_tiny_patch16_224"


DOCUMENTS = ["README.md", "CONTRIBUTING.md", *(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]


def anchors_of(text: str) -> list[str]:
    """What GitHub calls a document's headings in links."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL), re.MULTILINE)
    return [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_to_files_and_headings(document):
    path = ROOT / document
    links = [link for link in re.findall(r"\]\(([^)]+)\)", path.read_text()) if "://" not in link]
    for link in links:
        file, _, heading = link.partition("#")
        target = path.parent / file if file else path
        assert target.exists(), link
        assert not heading or heading in anchors_of(target.read_text()), link


def test_every_language_of_a_snippet_is_run():
    assert {language for language, _ in SNIPPETS} == {"python", "sh"}
    assert {language for language, _ in snippets_of("README.md")} == {"python", "bibtex"}
    assert {language for language, _ in snippets_of("docs/DENSE.md")} == {"python"}


@pytest.mark.slow
def test_the_python_of_the_readme_and_of_dense_prediction(clone):
    readme = [snippet for snippet in snippets_of("README.md") if snippet[0] == "python"]
    # It is written for scripts that stand beside the modules.
    dense = [("python", f'import sys; sys.path.insert(0, "vim")\n{text}') for _, text in snippets_of("docs/DENSE.md")]
    assert readme and dense
    run(clone, readme + dense)


PARSERS = {
    "checkpoint.py": hub.build_parser, "predict.py": predict.build_parser, "visualize.py": visualize.build_parser,
    "export.py": export.build_parser, "main.py": arguments.build_parser,
}  # fmt: skip


def test_the_readmes_table_of_commands():
    """Each runs in the guide; here, that this is how they are spelt."""
    rows = re.findall(r"^\| `python vim/(\S+) (.*?)` \|", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert {program for program, _ in rows} == PARSERS.keys()
    for program, flags in rows:
        assert PARSERS[program]().parse_args(shlex.split(flags))


@pytest.mark.slow
def test_a_snippet_that_fails_is_seen(clone):
    """The control: one that forgets to register the names, after one that did not."""
    good = 'import sys; sys.path.append("vim"); import models_mamba'
    with pytest.raises(AssertionError, match="Unknown model"):
        run(clone, [("python", good), ("python", 'import timm; timm.create_model("vim_nano_patch4_32")')])
