import json
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import save_file

from mars.checkpoint import load_image_tokenizer, read_json
from mars.image_tokenizer.config import ImageTokenizerConfig
from mars.image_tokenizer.families import FAMILIES
from mars.image_tokenizer.model import ImageTokenizer
from mars.pipeline import MarsPipeline

Run = Callable[..., tuple[int, str, str]]


def one_line(ran: tuple[int, str, str], *words: str, code: int) -> None:
    found, out, err = ran
    assert (found, out, err.count("\n")) == (code, "", 1)
    assert err.startswith("mars: ")
    for word in words:
        assert word in err


@pytest.fixture
def taming_tokenizer(tmp_path: Path) -> Path:
    """A folder with a random VQ-GAN under the names of taming-transformers."""
    config = ImageTokenizerConfig(num_codes=64, code_width=8, channels=(32, 64), middle_attention=True)
    names = FAMILIES["taming"]
    tensors = {
        names.name(name, len(config.channels)): tensor
        for name, tensor in ImageTokenizer(config).state_dict().items()
        if name != "quantizer.bias"
    }
    folder = tmp_path / "taming"
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    return folder


def test_init_makes_a_model_with_the_options_that_are_set(run: Run, even_llm: Path, tiny_model: Path) -> None:
    options = ["visual_width=24", "share_norms=false", "init=random", "visual_layers=[0,2]"]
    code, out, err = run(
        "init", "--llm", even_llm, "--image-tokenizer", tiny_model, "--size", 32, "--out", "new", "--name", "mine",
        "--include-language", *(word for option in options for word in ("--set", option)),
    )  # fmt: skip
    assert (code, out) == (0, "new\n")
    assert err == f"mine: a visual expert beside {even_llm}, to be trained on 32x32 pixels\n"
    semvie = read_json(Path("new/config.json"))["model"]["semvie"]
    assert (semvie["visual_width"], semvie["visual_layers"]) == (24, [0, 2])
    assert MarsPipeline.from_pretrained("new")("x", seed=1).images[0].size == (32, 32)
    code, out, _ = run("info", "new", "--json")
    assert (code, json.loads(out)["language model"]) == (0, "./language")


@pytest.mark.parametrize(
    ("options", "words", "code"),
    [
        (["--set", "visual_widht=24"], ["unknown key visual_widht", "did you mean visual_width?"], 2),
        (["--set", "visual_width"], ["must look like section.key=value"], 2),
        (["--set", "visual_width=24"], ["share_norms needs visual_width 32"], 2),
        (["--size", "40"], ["multiple of 16"], 2),
        (["--llm", "nobody.gguf"], ["must be a file, folder, hub id or package:NAME, got nobody.gguf"], 1),
        (["--llm", "nobody/nothing", "--revision", "v1"], ["model nobody/nothing at v1 is neither in the hub's"], 1),
        (["--image-tokenizer", "nowhere"], ["must be a folder, a file or a hub id, got nowhere"], 1),
        (["--out", "."], ["must be new or empty"], 1),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else "",
)
def test_init_refuses_in_one_line_and_leaves_nothing(
    run: Run, even_llm: Path, tiny_model: Path, options: list[str], words: list[str], code: int
) -> None:
    Path("kept").touch()
    usual = {"--llm": even_llm, "--image-tokenizer": tiny_model, "--size": 32, "--out": "new"}
    arguments = [word for name, value in usual.items() if name not in options for word in (name, value)]
    one_line(run("init", *arguments, *options), *words, code=code)
    assert [path.name for path in Path().iterdir()] == ["kept"]


@pytest.mark.parametrize("half", [True, False])
def test_an_image_tokenizer_of_others_becomes_ours(run: Run, taming_tokenizer: Path, half: bool) -> None:
    flags = ["--half"] if half else []
    code, out, err = run("convert", "image-tokenizer", taming_tokenizer, "--out", "ours", *flags)
    assert (code, out, err) == (0, "ours\n", "64 codes by l2, 2 pixels each, pixels -1..1\n")
    tokenizer, tensors = load_image_tokenizer(Path("ours"))
    assert {str(tensor.dtype) for tensor in tensors.values()} == {"torch.float16" if half else "torch.float32"}
    assert (tokenizer.config.num_codes, tokenizer.config.factor) == (64, 2)
    one_line(run("convert", "image-tokenizer", taming_tokenizer, "--out", "ours"), "must be new or empty", code=1)


def test_what_is_no_image_tokenizer_is_one_line(run: Run, even_llm: Path) -> None:
    one_line(run("convert", "image-tokenizer", "nowhere", "--out", "ours"), "no image tokenizer at nowhere", code=1)
    one_line(run("convert", "image-tokenizer", even_llm, "--out", "ours"), "model.safetensors", code=1)
    one_line(
        run("convert", "image-tokenizer", even_llm, "--out", "ours", "--family", "x"), "family must be one", code=2
    )
    assert list(Path().iterdir()) == []


def test_convert_alone_shows_its_commands(run: Run) -> None:
    code, out, err = run("convert")
    assert code in (0, 2)
    assert "image-tokenizer" in out + err
