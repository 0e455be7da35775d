"""A tiny random text-to-image pipeline, built and saved by the libraries themselves: of SD 1.5, SDXL or SD3."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    diffusers = pytest.importorskip("diffusers")
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")

from tests.tiny_unet import TINY_UNET

UNET = TINY_UNET | {
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "cross_attention_dim": 16,
    "attention_head_dim": 2,
}
SD3 = {
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "patch_size": 2,
    "num_layers": 2,
    "num_attention_heads": 2,
    "attention_head_dim": 4,
    "joint_attention_dim": 40,
    "caption_projection_dim": 8,
    "pooled_projection_dim": 24,
    "pos_embed_max_size": 8,
}
SDXL = {
    "cross_attention_dim": 32,
    "transformer_layers_per_block": [2, 1],
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 6 * 8 + 12,
}
LETTERS = "abcdefghijklmnopqrstuvwxyz"
WORDS = ("red", "blue", "fox", "house", "sea", "sun")


def tokenizer(folder: Path) -> Any:
    """A CLIP tokenizer of single letters and a few words, from a vocabulary and merges written here."""
    folder.mkdir(parents=True)
    tokens = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS)]
    merges = []
    for word in WORDS:
        parts = [*word[:-1], f"{word[-1]}</w>"]
        while len(parts) > 1:
            merges.append(f"{parts[0]} {parts[1]}")
            parts = [parts[0] + parts[1], *parts[2:]]
            tokens.append(parts[0])
    tokens = [*dict.fromkeys(tokens), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *dict.fromkeys(merges)]) + "\n")
    words = transformers.CLIPTokenizer.from_pretrained(folder)
    words.model_max_length = 12
    words.save_pretrained(folder)
    return words


def clip(words: Any, width: int, *, projected: int | None = None) -> Any:
    end = words.convert_tokens_to_ids("<|endoftext|>")
    config = transformers.CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=12,
        projection_dim=projected or width,
        bos_token_id=words.convert_tokens_to_ids("<|startoftext|>"),
        eos_token_id=end,
        pad_token_id=end,
    )
    kind = transformers.CLIPTextModelWithProjection if projected else transformers.CLIPTextModel
    net = kind(config).eval().requires_grad_(False)
    for parameter in net.parameters():
        parameter.mul_(6)  # the library's small weights make all prompts nearly the same
    return net


def sd_pipeline(folder: Path, scheduler: Any = None, **changes: Any) -> dict[str, Any]:
    """Save a pipeline of SD 1.5's kind; return its parts."""
    torch.manual_seed(0)
    scheduler = scheduler or diffusers.DDPMScheduler(
        *(1000, 0.00085, 0.012, "scaled_linear"), steps_offset=1, clip_sample=False
    )
    net = diffusers.UNet2DConditionModel(**(UNET | changes)).eval().requires_grad_(False)
    words = tokenizer(folder / "tokenizer")
    parts = {"unet": net, "scheduler": scheduler, "text_encoder": clip(words, 16), "tokenizer": words}
    return _save(folder, parts)


def t5_tokenizer(folder: Path, form: str) -> Any:
    """T5's tokenizer of a few words, as `tokenizer.json` or as a `spiece.model`; T5's own files are either."""
    folder.mkdir(parents=True)
    texts = [f"a {a} {b}" for a in WORDS for b in WORDS]
    if form == "spiece.model":
        trainer = pytest.importorskip("sentencepiece").SentencePieceTrainer
        special = {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1, "minloglevel": 2}
        prefix = str(folder / "spiece")
        trainer.train(
            sentence_iterator=iter(texts), model_prefix=prefix, vocab_size=40, hard_vocab_limit=False, **special
        )
    else:
        pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((f"▁{w}", -1.0) for w in ("a", *WORDS))]
        words = tokenizers.Tokenizer(tokenizers.models.Unigram([*pieces, ("▁", -3.0)], unk_id=2))
        words.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
        words.post_processor = tokenizers.processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
        words.save(str(folder / "tokenizer.json"))
    said = {"tokenizer_class": "T5Tokenizer", "extra_ids": 0, "pad_token": "<pad>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(said))
    return transformers.T5TokenizerFast.from_pretrained(folder)


def sd3_pipeline(folder: Path, *, t5: str | None = None) -> dict[str, Any]:
    """Save a pipeline of SD3's kind, with T5 if that is a form of its tokenizer; return its parts."""
    torch.manual_seed(0)
    parts = {
        "transformer": diffusers.SD3Transformer2DModel(**SD3).eval().requires_grad_(False),
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    }
    for number in ("", "_2"):
        words = tokenizer(folder / f"tokenizer{number}")
        parts |= {f"text_encoder{number}": clip(words, 16, projected=12), f"tokenizer{number}": words}
    parts |= {"text_encoder_3": None, "tokenizer_3": None}
    if t5 is not None:
        words = t5_tokenizer(folder / "tokenizer_3", t5)
        config = transformers.T5Config(vocab_size=64, d_model=40, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
        parts |= {"text_encoder_3": transformers.T5EncoderModel(config).eval(), "tokenizer_3": words}
    return _save(folder, parts)


def sdxl_pipeline(folder: Path, **save: Any) -> dict[str, Any]:
    """Save a pipeline of SDXL's kind; return its parts. `save`: how the network is written, max_shard_size for one."""
    torch.manual_seed(0)
    parts = {
        "unet": diffusers.UNet2DConditionModel(**(UNET | SDXL)).eval().requires_grad_(False),
        "scheduler": diffusers.EulerDiscreteScheduler(1000, 0.00085, 0.012, "scaled_linear"),
    }
    for number, projected in (("", None), ("_2", 12)):
        words = tokenizer(folder / f"tokenizer{number}")
        parts |= {f"text_encoder{number}": clip(words, 16, projected=projected), f"tokenizer{number}": words}
    return _save(folder, parts, **save)


def _save(folder: Path, parts: dict[str, Any], **of_the_network: Any) -> dict[str, Any]:
    index: dict[str, Any] = {"_class_name": "StableDiffusionPipeline"}
    for name, part in parts.items():
        if part is None:
            continue
        if name != "tokenizer_3":  # it lies there in the form that a test wants
            part.save_pretrained(folder / name, **(of_the_network if name == "unet" else {}))
        library = "transformers" if name.startswith("t") and name != "transformer" else "diffusers"
        index[name] = [library, type(part).__name__]
    (folder / "model_index.json").write_text(json.dumps(index))
    return parts


def prompts(num: int) -> list[str]:
    """Different prompts of a few words."""
    things = [f"a {colour} {thing}" for colour in WORDS for thing in WORDS]
    return [f"{thing} {LETTERS[i % 26]}" for i, thing in enumerate(things * (1 + num // len(things)))][:num]
