"""What the model that comes with the package promises. Slow: it opens a real LLM of 135 million parameters."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from mars.model.base_llm import open_base_llm
from mars.model.language_tensors import tensors_digest
from mars.pipeline import SHIPPED, MarsPipeline

pytestmark = pytest.mark.slow

MEGABYTE = 1_000_000
PROMPT = "The capital of France is"


@pytest.fixture(scope="module")
def shipped() -> MarsPipeline:
    return MarsPipeline.from_pretrained()


def mars(*arguments: str, cwd: Path) -> str:
    command = [sys.executable, "-c", "from mars.cli import main; main()", *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=True).stdout


def test_the_model_is_at_most_60_megabytes() -> None:
    assert {"config.json", "visual.safetensors", "image_tokenizer.json", "image_tokenizer.safetensors"} <= {
        path.name for path in SHIPPED.iterdir()
    }
    assert sum(path.stat().st_size for path in SHIPPED.rglob("*") if path.is_file()) <= 60 * MEGABYTE


def test_the_card_says_what_its_page_says_today() -> None:
    page = (Path(__file__).parents[1] / "docs" / "mars-mini.md").read_text(encoding="utf-8")
    said = page[page.index("## Data and licences") :].strip()
    assert said in (SHIPPED / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("prompt", ["slice of pizza", "披萨"])
def test_one_command_twice_gives_identical_bytes(tmp_path: Path, prompt: str) -> None:
    for name in ("a.png", "b.png"):
        mars("generate", prompt, "--seed", "1", "--out", name, cwd=tmp_path)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    with Image.open(tmp_path / "a.png") as image:
        assert image.size == (128, 128)
        assert image.info["prompt"] == prompt
        assert len(image.convert("RGB").getcolors(128 * 128) or []) > 50


def test_a_batch_draws_what_single_calls_draw(shipped: MarsPipeline) -> None:
    together = shipped(["slice of pizza", "披萨", "cat"], seed=1)
    for prompt, codes in zip(together.prompts, together.codes, strict=True):
        assert shipped(prompt, seed=1).codes[0].tolist() == codes.tolist()


def test_what_was_drawn_is_drawn_again_larger(shipped: MarsPipeline) -> None:
    drawn = shipped("slice of pizza", seed=1)
    larger = shipped.upscale(drawn)
    assert [image.size for image in larger.images] == [(256, 256)]
    assert shipped.upscale(drawn).codes.tolist() == larger.codes.tolist()


def test_the_language_expert_is_the_language_model(shipped: MarsPipeline, tmp_path: Path) -> None:
    llm = open_base_llm(shipped.model.info.language)
    table = json.loads(mars("info", "--json", cwd=tmp_path))
    assert table["language digest"] == table["language digest of the LLM"] == tensors_digest(llm.tensors)


def test_chat_is_the_greedy_answer_of_the_same_weights_in_transformers(shipped: MarsPipeline, tmp_path: Path) -> None:
    import torch
    import transformers

    from mars.model.language_tensors import hub_name

    llm = open_base_llm(shipped.model.info.language)
    shape = llm.config
    oracle = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=shape.vocab_size, hidden_size=shape.width, intermediate_size=shape.ffn,
            num_hidden_layers=shape.num_layers, num_attention_heads=shape.num_heads,
            num_key_value_heads=shape.num_kv_heads, head_dim=shape.head_width, rope_theta=shape.rope_theta,
            rms_norm_eps=shape.norm_eps, max_position_embeddings=shape.max_positions,
            tie_word_embeddings=shape.tied_embeddings,
        )
    ).eval()  # fmt: skip
    missing, unknown = oracle.load_state_dict({hub_name(name): one for name, one in llm.tensors.items()}, strict=False)
    assert (set(missing) <= {"lm_head.weight"}, unknown) == (True, [])
    oracle.tie_weights()
    tokenizer = shipped.model.text_tokenizer
    prompt = torch.tensor([tokenizer.apply_chat(PROMPT, system="You are a helpful assistant.")])
    answer = oracle.generate(
        prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=48,
        eos_token_id=tokenizer.eos_id, pad_token_id=tokenizer.eos_id,
    )[0, prompt.shape[1] :].tolist()  # fmt: skip
    wanted = tokenizer.decode([one for one in answer if one != tokenizer.eos_id])
    assert "Paris" in wanted
    assert shipped.chat(PROMPT, max_tokens=48) == wanted
    assert mars("chat", PROMPT, "--max-tokens", "48", cwd=tmp_path) == f"{wanted}\n"


def test_drawing_imports_none_of_the_oracles(tmp_path: Path) -> None:
    code = (
        "import sys; from mars import MarsPipeline; MarsPipeline.from_pretrained()('cat', seed=0);"
        "unwanted = {'transformers', 'diffusers', 'pyarrow', 'sympy', 'tensorboard', 'torchmetrics'};"
        "print(sorted(sys.modules.keys() & unwanted))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_drawing_leaves_the_files_as_they_were(tmp_path: Path) -> None:
    before = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in SHIPPED.iterdir() if path.is_file()}
    mars("cat", "--seed", "0", cwd=tmp_path)
    after = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in SHIPPED.iterdir() if path.is_file()}
    assert before == after
