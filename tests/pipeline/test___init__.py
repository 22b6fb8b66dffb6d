import errno
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image

import mars
from mars.adapter import save_adapter, visual_digest
from mars.checkpoint import load_model, save_tensors
from mars.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    ImageError,
    MarsError,
    ModelError,
    PromptError,
    RequestError,
)
from mars.generation.sampling import Sampling
from mars.model.base_llm import open_base_llm
from mars.model.language_tensors import tensors_digest
from mars.model.lora import LoraConfig, adapter_of, add_lora, lora_tensors
from mars.model.precision import Precision
from mars.pipeline import MarsPipeline
from mars.pipeline.orders import MAX_IMAGES

PROMPTS = ["a red apple", "红苹果", "x", "a long prompt about nothing at all"]


def test_each_prompt_gives_n_pictures_in_order(pipe: MarsPipeline) -> None:
    drawn = pipe(PROMPTS[:2], n=3, seed=5)
    assert drawn.prompts == [PROMPTS[0]] * 3 + [PROMPTS[1]] * 3
    assert drawn.seeds == [5, 6, 7, 5, 6, 7]
    assert drawn.codes.shape == (6, 2, 3)
    assert [image.size for image in drawn.images] == [(48, 32)] * 6
    assert drawn.seconds["total"] == pytest.approx(drawn.seconds["prompt_and_codes"] + drawn.seconds["pixels"])


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_a_batch_draws_what_single_calls_draw(pipe: MarsPipeline, guidance: float) -> None:
    sampling = Sampling(guidance=guidance)
    together = pipe(PROMPTS, n=2, seed=11, sampling=sampling)
    for prompt, seed, image, codes in zip(
        together.prompts, together.seeds, together.images, together.codes, strict=True
    ):
        alone = pipe(prompt, seed=seed, sampling=sampling)
        assert torch.equal(alone.codes[0], codes)
        assert np.abs(np.asarray(alone.images[0], dtype=int) - np.asarray(image, dtype=int)).max() <= 1
        assert alone.images[0].info == image.info
    assert len({image.tobytes() for image in together.images}) > 4


def test_another_process_draws_the_same_bytes(pipe: MarsPipeline, tiny_model: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from mars import MarsPipeline;"
        "MarsPipeline.from_pretrained(sys.argv[1])('a red apple', seed=3).images[0].save(sys.argv[2]);"
        "print(sorted(sys.modules.keys() & {'transformers', 'diffusers', 'pyarrow', 'sympy', 'tensorboard'}))"
    )
    command = [sys.executable, "-c", code, str(tiny_model), str(tmp_path / "there.png")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.stderr, done.stdout.strip()) == ("", "[]")
    pipe("a red apple", seed=3).images[0].save(tmp_path / "here.png")
    assert (tmp_path / "there.png").read_bytes() == (tmp_path / "here.png").read_bytes()


def test_guidance_1_does_not_look_at_the_negative_prompt(pipe: MarsPipeline) -> None:
    plain, guided = Sampling(guidance=1.0), Sampling(guidance=4.0)
    one, other = (pipe(PROMPTS, seed=1, sampling=plain, negative_prompt=text).codes for text in ("", "blue"))
    assert torch.equal(one, other)
    one, other = (pipe(PROMPTS, seed=1, sampling=guided, negative_prompt=text).codes for text in ("", "blue"))
    assert not torch.equal(one, other)


def test_a_png_says_how_it_was_drawn(pipe: MarsPipeline, tmp_path: Path) -> None:
    sampling = Sampling(temperature=0.8, top_k=20, top_p=0.9, guidance=2.5)
    pipe(" 红苹果 ", seed=9, sampling=sampling, negative_prompt="蓝").images[0].save(tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as image:
        text = dict(image.info)
    assert (text["prompt"].strip(), text["seed"], text["model"]) == ("红苹果", "9", "tiny")
    settings = json.loads(text["settings"])
    assert settings.pop("negative_prompt") == "蓝"
    assert Sampling(**settings) == sampling
    assert text["model_digest"] == pipe.model.visual_digest
    assert text["language_digest"] == pipe.model.info.language_digest
    assert text["software"] == f"mars-t2i {mars.__version__}"
    again = pipe(text["prompt"], seed=int(text["seed"]), sampling=Sampling(**settings), negative_prompt="蓝")
    again.images[0].save(tmp_path / "b.png")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_a_seed_that_was_not_given_is_drawn_and_told(pipe: MarsPipeline) -> None:
    first, second = pipe("a"), pipe("a")
    assert first.seeds != second.seeds
    assert torch.equal(pipe("a", seed=first.seeds[0]).codes, first.codes)


@pytest.mark.parametrize(
    ("prompt", "options", "kind", "message"),
    [
        ("", {}, PromptError, "the prompt must not be empty"),
        (" \n\t", {}, PromptError, "the prompt must not be empty"),
        (["a", ""], {}, PromptError, "the prompt must not be empty"),
        ([], {}, PromptError, "at least one prompt, got none"),
        ("x" * 600, {}, PromptError, "at most 512 tokens, got 601; shorten it"),
        ("x" * 200, {}, RequestError, "must fit into 192 positions, got 207; shorten the prompt"),
        ("a\udce4b", {}, PromptError, "valid Unicode"),
        ("a", {"negative_prompt": "x" * 600}, PromptError, "at most 512 tokens"),
        ("a", {"n": 0}, RequestError, f"1 to {MAX_IMAGES} pictures, got n = 0"),
        ("a", {"n": -3}, RequestError, "got n = -3"),
        ("a", {"n": 10_000}, RequestError, f"1 to {MAX_IMAGES} pictures, got n = 10000"),
        (["a"] * 40, {"n": 2}, RequestError, "got n = 2 for 40 prompts"),
        ("a", {"seed": -1}, RequestError, "seed must lie in"),
        ("a", {"seed": 2**63}, RequestError, "seed must lie in"),
        ("a", {"width": 100}, RequestError, "width must be a multiple of 16, got 100; trained sizes are 48x32"),
        ("a", {"height": -16}, RequestError, "height must be a multiple of 16, got -16"),
        ("a", {"width": 64, "height": 64}, RequestError, r"trained on \(48x32\), got 64x64"),
        ("a", {"width": 32, "height": 48}, RequestError, r"trained on \(48x32\), got 32x48"),
    ],
    ids=lambda value: str(value)[:24],
)  # fmt: skip
def test_a_request_that_cannot_be_met_is_one_line(
    pipe: MarsPipeline, prompt: Any, options: dict[str, Any], kind: type[MarsError], message: str
) -> None:
    with pytest.raises(kind, match=message) as caught:
        pipe(prompt, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("side", ["width", "height"])
def test_a_side_of_0_is_one_line(pipe: MarsPipeline, side: str) -> None:
    with pytest.raises(RequestError, match=f"{side} must be a multiple of 16, got 0"):
        pipe("a", **{side: 0})  # type: ignore[arg-type]


def test_the_largest_seed_draws(pipe: MarsPipeline) -> None:
    assert pipe("a", seed=2**63 - MAX_IMAGES - 1, n=2).seeds[1] == 2**63 - MAX_IMAGES


def test_no_such_model_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no model at .*; name a folder that holds config.json"):
        MarsPipeline.from_pretrained(tmp_path / "none")


def test_a_model_whose_language_model_is_gone_is_one_line(tmp_path: Path, tiny_model: Path) -> None:
    shutil.copytree(tiny_model, tmp_path / "model")
    table = json.loads((tmp_path / "model" / "config.json").read_text("utf-8"))
    table["language"] = str(tmp_path / "gone.gguf")
    (tmp_path / "model" / "config.json").write_text(json.dumps(table), "utf-8")
    with pytest.raises(ModelError, match="no such file"):
        MarsPipeline.from_pretrained(tmp_path / "model")


def test_the_description_counts_and_digests_what_is_in_memory(pipe: MarsPipeline, tiny_llm: Path) -> None:
    table = pipe.describe()
    llm = open_base_llm(str(tiny_llm))
    assert table["language digest"] == table["language digest of the LLM"] == tensors_digest(llm.tensors)
    assert table["language expert parameters"] == sum(tensor.numel() for tensor in llm.tensors.values())
    parts = [value for key, value in table.items() if key.endswith("parameters")]
    assert table["bytes in memory"] == 4 * sum(int(part) for part in parts)
    assert table["vocabulary"] == -(-(llm.config.vocab_size + 64 + 6) // 8) * 8
    assert table["layers with a visual expert"] == "0, 2"
    assert table["picture sizes"] == "48x32"


def chat_ids(pipe: MarsPipeline, text: str) -> list[int]:
    return pipe.model.text_tokenizer.apply_chat(text, system="You are a helpful assistant.")


def test_chat_is_the_greedy_answer_of_the_language_model_alone(pipe: MarsPipeline, tiny_llm: Path) -> None:
    import transformers

    oracle = transformers.LlamaForCausalLM.from_pretrained(tiny_llm).eval()
    for text in ("hello", "什么"):
        ids = torch.tensor([chat_ids(pipe, text)])
        answer = oracle.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=20)
        wanted = answer[0, ids.shape[1] :].tolist()
        wanted = wanted[: wanted.index(2)] if 2 in wanted else wanted
        assert pipe.chat(text, max_tokens=20) == pipe.model.text_tokenizer.decode(wanted)


def test_chat_tells_its_whole_answer_piece_by_piece(pipe: MarsPipeline) -> None:
    for text in ("hello", "什么", "a", "b", "c"):
        pieces: list[str] = []
        answer = pipe.chat(text, max_tokens=12, emit=pieces.append)
        assert answer == "".join(pieces)


def test_nothing_said_is_one_line(pipe: MarsPipeline) -> None:
    for text in ("", "  \n"):
        with pytest.raises(PromptError, match="must not be empty"):
            pipe.chat(text)
    with pytest.raises(RequestError, match="must be shorter than 192 tokens"):
        pipe.chat("x" * 500)


def test_a_caption_depends_on_the_picture_and_repeats(pipe: MarsPipeline, tmp_path: Path) -> None:
    pictures = pipe(PROMPTS, seed=0).images
    for index, picture in enumerate(pictures):
        picture.save(tmp_path / f"{index}.png")
        assert torch.equal(pipe.encode(picture), pipe.encode(Image.open(tmp_path / f"{index}.png")))
        assert pipe.caption(picture, max_tokens=4) == pipe.caption(tmp_path / f"{index}.png", max_tokens=4)
    assert isinstance(pipe.caption(pictures[0], language="zh", max_tokens=4), str)
    with pytest.raises(RequestError, match="language must be one of en, zh, got 'fr'"):
        pipe.caption(pictures[0], language="fr")
    with pytest.raises(ImageError, match="no picture at"):
        pipe.caption(tmp_path / "none.png")


@pytest.mark.parametrize("size", [(48, 32), (96, 64), (20, 200), (1000, 16)])
def test_a_picture_of_any_shape_becomes_codes(pipe: MarsPipeline, size: tuple[int, int]) -> None:
    assert pipe.encode(Image.new("RGB", size, "red")).shape == (2, 3)


def test_a_transparent_picture_lies_on_white(pipe: MarsPipeline) -> None:
    clear = Image.new("RGBA", (48, 32), (255, 0, 0, 0))
    assert torch.equal(pipe.encode(clear), pipe.encode(Image.new("RGB", (48, 32), "white")))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "CMYK", "I;16", "I", "F"])
def test_a_picture_of_any_mode_becomes_codes(pipe: MarsPipeline, mode: str) -> None:
    assert pipe.encode(Image.new(mode, (48, 32))).shape == (2, 3)


def test_a_pipeline_that_was_moved_draws_the_same(pipe: MarsPipeline, tiny_model: Path, even_model: Path) -> None:
    moved = MarsPipeline.from_pretrained(tiny_model).to("cpu")
    assert moved("a", seed=1).images[0].tobytes() == pipe("a", seed=1).images[0].tobytes()
    with pytest.raises(RequestError, match=r"the device must be one of PyTorch's here, got cpu:x") as caught:
        moved.to("cpu:x")
    assert "\n" not in str(caught.value)
    assert moved("a", seed=2).images[0].tobytes() == pipe("a", seed=2).images[0].tobytes()
    rounded = MarsPipeline.from_pretrained(even_model, precision="int8")
    with pytest.raises(RequestError, match="weights in int8 stay on the CPU; open the model in fp32 or fp16"):
        rounded.to("cpu")


def test_a_package_without_a_model_says_how_to_get_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mars.pipeline.SHIPPED", tmp_path)
    with pytest.raises(ModelError, match="no model comes with this version; train one with"):
        MarsPipeline.from_pretrained()


def test_a_saved_model_draws_the_same_and_has_a_card(pipe: MarsPipeline, tmp_path: Path) -> None:
    for _ in range(2):  # the second time over the first
        pipe.save_pretrained(tmp_path / "deep" / "saved")
    again = MarsPipeline.from_pretrained(tmp_path / "deep" / "saved")
    for seed in (1, 2):
        assert again(PROMPTS, seed=seed).images[1].tobytes() == pipe(PROMPTS, seed=seed).images[1].tobytes()
    assert again.model.info == pipe.model.info
    assert again.describe() == pipe.describe()
    card = ModelCard.load(tmp_path / "deep" / "saved" / "README.md")
    assert card.data.to_dict()["pipeline_tag"] == "text-to-image"
    assert again.model.visual_digest in card.text
    assert again.model.info.language_digest in card.text
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["saved"]


def test_a_card_names_the_weights_that_were_written(pipe: MarsPipeline, tiny_model: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_model, tmp_path / "wide"))
    wide = {name: weight * 1.0001 for name, weight in pipe.model.transformer.visual_tensors().items()}
    save_tensors(folder / "visual.safetensors", wide)  # fp32, as a run that is not done has them
    opened = MarsPipeline.from_pretrained(folder)
    opened.save_pretrained(tmp_path / "saved", licence="mit")
    digest = MarsPipeline.from_pretrained(tmp_path / "saved").model.visual_digest
    assert digest != opened.model.visual_digest
    card = (tmp_path / "saved" / "README.md").read_text("utf-8")
    assert digest in card
    assert card.splitlines()[2] == 'license: "mit"'


def test_nothing_is_saved_over_something_else_or_from_rounded_weights(
    pipe: MarsPipeline, even_model: Path, tmp_path: Path
) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.png").touch()
    with pytest.raises(CheckpointError, match="must be new or empty, as what is there would be lost"):
        pipe.save_pretrained(tmp_path / "photos")
    rounded = MarsPipeline.from_pretrained(even_model, precision="int8")
    with pytest.raises(CheckpointError, match="weights rounded to int8 cannot be saved; open the model in fp32"):
        rounded.save_pretrained(tmp_path / "new")
    with pytest.raises(CheckpointError, match="weights rounded to int8"):
        rounded.push_to_hub("someone/tiny")
    with pytest.raises(DataError, match="must be a report"):
        pipe.save_pretrained(tmp_path / "new", report=even_model / "config.json")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a.png", "photos"]


def test_a_full_disk_leaves_no_half_of_a_model(
    pipe: MarsPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_space(*arguments: object, **options: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("mars.files.os.replace", no_space)
    with pytest.raises(CheckpointError, match="the disk is full; nothing was written"):
        pipe.save_pretrained(tmp_path / "saved")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_rounded_weights_draw_the_same_picture_each_time_from_fewer_bytes(
    even_model: Path, precision: Precision
) -> None:
    whole = MarsPipeline.from_pretrained(even_model)
    pipe = MarsPipeline.from_pretrained(even_model, precision=precision)
    first, again, other = (pipe(PROMPTS[:2], seed=seed) for seed in (1, 1, 2))
    assert [image.size for image in first.images] == [(32, 32)] * 2
    assert torch.equal(first.codes, again.codes)
    assert not torch.equal(first.codes, other.codes)
    assert isinstance(pipe.chat("hello", max_tokens=3), str)
    assert isinstance(pipe.caption(first.images[0], max_tokens=3), str)
    table, before = pipe.describe(), whole.describe()
    assert int(table["bytes in memory"]) < int(before["bytes in memory"])
    assert table["language expert parameters"] == before["language expert parameters"]
    assert (table["precision"], table["visual digest"]) == (precision, before["visual digest"])


def test_weights_that_blocks_do_not_divide_and_unknown_precisions_are_one_line(tiny_model: Path) -> None:
    with pytest.raises(
        ModelError, match=r"layers\.\d\..*need a multiple of 32 inputs, got \d+; choose another width, or fp32"
    ):
        MarsPipeline.from_pretrained(tiny_model, precision="int4")
    for source in (tiny_model, "nobody/nothing"):  # before the hub is asked
        with pytest.raises(ConfigError, match="precision must be one of fp32, fp16, int8, int4, got 'int5'"):
            MarsPipeline.from_pretrained(source, precision="int5")  # type: ignore[arg-type]


@pytest.mark.parametrize("precision", ["fp32", "int4"])
def test_a_released_llm_draws_the_same_picture_and_no_other(even_model: Path, precision: Precision) -> None:
    wanted = MarsPipeline.from_pretrained(even_model, precision=precision)(PROMPTS, seed=4)
    pipe = MarsPipeline.from_pretrained(even_model, precision=precision)
    before = pipe.describe()
    drawn = pipe(PROMPTS, seed=4, release_language=True)
    assert [image.tobytes() for image in drawn.images] == [image.tobytes() for image in wanted.images]
    table = pipe.describe()
    assert int(table["bytes in memory"]) < int(before["bytes in memory"])
    assert int(table["language expert parameters"]) < 0.02 * int(before["language expert parameters"])  # shared norms
    assert table["visual expert parameters"] == before["visual expert parameters"]
    assert table["language digest"] == "none: rounded or released"
    for use in (lambda: pipe("a"), lambda: pipe.chat("a"), lambda: pipe.caption(drawn.images[0])):
        with pytest.raises(RequestError, match="released after its prompt; open the model again") as caught:
            use()
        assert "\n" not in str(caught.value)


def test_a_revision_of_a_folder_is_one_line(tiny_model: Path) -> None:
    for source in (tiny_model, "nowhere", None):
        with pytest.raises((RequestError, ModelError), match="a revision is for a model on the hub|no model comes"):
            MarsPipeline.from_pretrained(source, revision="v1")


@pytest.fixture
def adapter(tiny_model: Path, tmp_path: Path) -> Path:
    """An adapter of the tiny model that shows in its pictures."""
    transformer, config = load_model(tiny_model).transformer, LoraConfig(rank=2)
    digest = visual_digest(transformer.visual_tensors())
    add_lora(transformer, config, generator=torch.Generator().manual_seed(0))
    weights = {name: torch.randn(weight.shape) for name, weight in lora_tensors(transformer).items()}
    (tmp_path / "style").mkdir()
    save_adapter(tmp_path / "style", adapter_of(weights, config, base_digest=digest), config, base="tiny")
    return tmp_path / "style"


def test_an_adapter_draws_other_pictures_and_they_name_it(
    pipe: MarsPipeline, tiny_model: Path, adapter: Path, tmp_path: Path
) -> None:
    plain = pipe("a red apple", seed=1)
    opened = MarsPipeline.from_pretrained(tiny_model, lora=adapter, lora_scale=0.8)
    drawn = opened("a red apple", seed=1)
    assert not torch.equal(drawn.codes, plain.codes)
    assert drawn.images[0].info["lora"] == opened.describe()["adapter"] == "style x 0.8"
    assert drawn.images[0].info["model_digest"] != plain.images[0].info["model_digest"]
    assert "lora" not in plain.images[0].info
    later = MarsPipeline.from_pretrained(tiny_model)
    later.load_lora(adapter, scale=0.8)
    assert torch.equal(later("a red apple", seed=1).codes, drawn.codes)
    later.save_pretrained(tmp_path / "merged")
    merged = MarsPipeline.from_pretrained(tmp_path / "merged")("a red apple", seed=1, sampling=Sampling(temperature=0))
    assert torch.equal(merged.codes, later("a red apple", seed=1, sampling=Sampling(temperature=0)).codes)


def test_chat_does_not_hear_of_an_adapter(pipe: MarsPipeline, tiny_model: Path, adapter: Path) -> None:
    adapted = MarsPipeline.from_pretrained(tiny_model, lora=adapter)
    assert adapted.chat("hello", max_tokens=8) == pipe.chat("hello", max_tokens=8)


def test_an_adapter_that_cannot_be_used_is_one_line(tiny_model: Path, adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no LoRA adapter at"):
        MarsPipeline.from_pretrained(tiny_model, lora=tmp_path)
    with pytest.raises(RequestError, match="lora_scale must be a finite number"):
        MarsPipeline.from_pretrained(tiny_model, lora=adapter, lora_scale=float("inf"))
