"""A teacher's text encoder: tokenizers and encoders as diffusers' pipelines save them, kept in the folder `text/`.

Vocabularies are text and weights safetensors, read by classes named here, so nothing in the folder is run.
Needs the extra `diffusers`.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from msdcli.errors import UserError
from msdcli.foreign import check_file
from msdcli.nets.diffusers.files import read_object

RECORD = "text.json"
# What each part of a pipeline may be, and what is copied of it.
ENCODERS = {"CLIPTextModel": "sd", "CLIPTextModelWithProjection": "sd3", "T5EncoderModel": "t5"}
TOKENIZERS = {"CLIPTokenizer", "CLIPTokenizerFast", "T5Tokenizer", "T5TokenizerFast"}
TOKENIZER_FILES = (
    *("vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("added_tokens.json", "spiece.model"),
)
FORMS = (["sd"], ["sd", "sd3"], ["sd3", "sd3"], ["sd3", "sd3", "t5"])  # SD 1.5's, SDXL's, SD3's without T5 and with
T5_LENGTH = 256  # vectors of T5 in SD3's prompts, as its pipeline asks for


class TextEncoder:
    """Prompts to what the denoiser sees of them: SD 1.5's form (one CLIP), SDXL's (two), or SD3's (two, with or
    without T5).
    """

    def __init__(self, folder: Path, device: torch.device | str = "cpu") -> None:
        library, record = _library(), read_record(folder)
        self.form = record["kind"]
        self.empty_is_zero = record.get("empty") == "zeros"
        self.length, self.width = record["tokens"], record["width"]
        self.device = torch.device(device)
        self._encoders: list[tuple[Any, Any, int]] = []
        for part in record["parts"]:
            clip = part["class_name"] != "T5EncoderModel"
            tokenizer = getattr(library, "CLIPTokenizer" if clip else "T5TokenizerFast")
            for weights in (folder / part["encoder"]).glob("*.safetensors"):
                check_file(weights)
            try:
                words = tokenizer.from_pretrained(folder / part["tokenizer"], local_files_only=True)
                net = getattr(library, part["class_name"]).from_pretrained(
                    folder / part["encoder"], local_files_only=True, use_safetensors=True
                )
            except (OSError, ValueError, RuntimeError, KeyError, TypeError, ImportError) as error:
                raise UserError(f"{folder}: {part['encoder']} cannot be read ({error})") from None
            net = net.requires_grad_(False).eval()
            # Only T5 is large enough for its stored type to matter; CLIP's embeddings decide who owns a prompt.
            net = net.to(self.device) if self.device.type == "cuda" and not clip else net.float().to(self.device)
            self._encoders.append((words, net, part["length"]))

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor, int]:
        """Return tokens [n, length, width] and pooled [n, pooled width], float32, and how many prompts were cut off."""
        found, cut = [self._run(i, prompts) for i in range(len(self._encoders))], self._too_long(prompts)
        if self.form == "sd":
            return (*found[0], cut)
        if self.form == "sdxl":
            tokens, pooled = torch.cat([tokens for tokens, _ in found], dim=2), found[1][1]
            if self.empty_is_zero:  # what the pipeline takes for no prompt
                said = torch.tensor([bool(prompt) for prompt in prompts], device=tokens.device)
                tokens, pooled = tokens * said[:, None, None], pooled * said[:, None]
            return tokens, pooled, cut
        clips = torch.cat([tokens for tokens, _ in found[:2]], dim=2)
        clips = torch.nn.functional.pad(clips, (0, self.width - clips.shape[2]))
        pooled = torch.cat([pooled for _, pooled in found[:2]], dim=1)
        t5 = found[2][0] if len(found) > 2 else clips.new_zeros(len(clips), T5_LENGTH, self.width)
        return torch.cat([clips, t5], dim=1), pooled, cut

    def _run(self, number: int, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        words, net, length = self._encoders[number]
        ids = words(
            list(prompts), padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        ).input_ids.to(self.device)
        if self.form == "sd":
            out = net(ids)
            return out.last_hidden_state, out.pooler_output
        if number == 2:
            tokens = net(ids)[0].float()
            return tokens, tokens[:, 0]
        out = net(ids, output_hidden_states=True)
        # SDXL's first encoder has no projection; only what the second one pools is used.
        return out.hidden_states[-2], out.text_embeds if "text_embeds" in out else out.pooler_output

    def _too_long(self, prompts: Sequence[str]) -> int:
        """Prompts that the tokenizer with the most room cuts off."""
        words, _, length = max(self._encoders, key=lambda encoder: encoder[2])
        ids = words(list(prompts), truncation=False, verbose=False).input_ids
        return sum(len(i) > length for i in ids)


def read_record(folder: Path) -> dict[str, Any]:
    """Read text.json. UserError where there is none, or a damaged one."""
    try:
        record: dict[str, Any] = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        assert record["kind"] in ("sd", "sdxl", "sd3") and all(
            part["class_name"] in ENCODERS for part in record["parts"]
        )
        assert all(Path(part[k]).name == part[k] for part in record["parts"] for k in ("encoder", "tokenizer"))
    except FileNotFoundError:
        raise UserError(f"{folder.parent} has no text encoder: {folder / RECORD} is missing") from None
    except (OSError, ValueError, KeyError, TypeError, AssertionError) as error:
        raise UserError(f"{folder / RECORD} is damaged: {error}") from None
    return record


def unread(index: dict[str, Any]) -> list[str]:
    """Return the classes of a pipeline's text encoders where msd does not know how their vectors go together."""
    said = [index.get(f"text_encoder{number}") for number in ("", "_2", "_3", "_4")]
    names = [str(entry[1]) for entry in said if isinstance(entry, list) and len(entry) == 2 and entry[1] is not None]
    return names if names and [ENCODERS.get(name) for name in names] not in FORMS else []


def _check_t5_words(folder: Path) -> None:
    """Raise UserError where T5's tokenizer cannot be read: it is tokenizer.json, or a model of sentencepiece."""
    if (folder / "tokenizer.json").is_file():
        return
    if not (folder / "spiece.model").is_file():
        raise UserError(f"{folder} has neither tokenizer.json nor spiece.model: T5's tokenizer is one of the two")
    if importlib.util.find_spec("sentencepiece") is None:
        raise UserError(
            f"{folder} has no tokenizer.json, and spiece.model is read by the library sentencepiece, which is not here",
            hint="pip install 'msdcli[diffusers]'",
        )


def describe(pipeline: Path, index: dict[str, Any], width: int) -> dict[str, Any]:
    """What text.json says of a pipeline whose denoiser wants prompts of `width`. UserError for what is not known."""
    parts = []
    for number in ("", "_2", "_3"):
        name, words = (index.get(f"{what}{number}") or [None, None] for what in ("text_encoder", "tokenizer"))
        if name[1] is None:
            continue
        if name[1] not in ENCODERS or words[1] not in TOKENIZERS:
            raise UserError(
                f"{pipeline}: text_encoder{number} is {name[1]} with {words[1]}; msd knows {', '.join(ENCODERS)}"
            )
        config = read_object(pipeline / f"text_encoder{number}" / "config.json")
        t5 = name[1] == "T5EncoderModel"
        if t5:
            _check_t5_words(pipeline / f"tokenizer{number}")
        length = T5_LENGTH if t5 else int(config.get("max_position_embeddings", 77))
        files = {"encoder": f"text_encoder{number}", "tokenizer": f"tokenizer{number}"}
        parts.append({"class_name": name[1], "length": length} | files)
    kinds = [ENCODERS[part["class_name"]] for part in parts]
    if kinds == ["sd"]:
        if config.get("hidden_size", width) != width:
            raise UserError(
                f"{pipeline}: its text encoder gives {config['hidden_size']} numbers, its network wants {width}"
            )
        return {"kind": "sd", "tokens": parts[0]["length"], "width": width, "parts": parts}
    if kinds == ["sd", "sd3"]:
        widths = [read_object(pipeline / part["encoder"] / "config.json").get("hidden_size") for part in parts]
        given = sum(w for w in widths if isinstance(w, int))
        if given != width:
            raise UserError(f"{pipeline}: its text encoders give {given} numbers, its network wants {width}")
        empty = {"empty": "zeros"} if index.get("force_zeros_for_empty_prompt", True) else {}
        return {"kind": "sdxl", "tokens": parts[0]["length"], "width": width, "parts": parts} | empty
    if kinds == ["sd3"]:
        raise UserError(
            f"{pipeline}: one text encoder with a projection is SDXL's refiner, which goes on from another model's "
            "images: msd distils the base model"
        )
    if kinds in (["sd3", "sd3"], ["sd3", "sd3", "t5"]):
        return {"kind": "sd3", "tokens": parts[0]["length"] + T5_LENGTH, "width": width, "parts": parts}
    raise UserError(
        f"{pipeline}: text encoders {kinds or 'missing'}; msd knows SD 1.5's one, SDXL's two and SD3's two or three"
    )


def files_of(pipeline: Path, record: dict[str, Any]) -> list[Path]:
    """The files that make the text encoder, relative to the pipeline. UserError where weights are missing."""
    files = []
    for part in record["parts"]:
        folder = pipeline / part["encoder"]
        weights = sorted(folder.glob("model*.safetensors*"))
        if not (folder / "model.safetensors").is_file() and not (folder / "model.safetensors.index.json").is_file():
            raise UserError(
                f"{folder} has no model.safetensors", hint="pickles (.bin) are not read; get the safetensors file"
            )
        files += [folder / "config.json", *weights]
        files += [path for name in TOKENIZER_FILES if (path := pipeline / part["tokenizer"] / name).is_file()]
    return [path.relative_to(pipeline) for path in files]


def copy(pipeline: Path, record: dict[str, Any], target: Path, *, link: bool = False) -> None:
    """Copy the text encoder to the folder `target`, or `link` to it; text.json comes last and makes it complete."""
    for name in files_of(pipeline, record):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        if link:
            (target / name).symlink_to((pipeline / name).absolute())
        else:
            shutil.copyfile(pipeline / name, target / name)
    temporary = target / f".{RECORD}.tmp"
    temporary.write_text(json.dumps(record, indent=1), encoding="utf-8")
    temporary.replace(target / RECORD)


def _library() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise UserError(
            f"text encoders need the library transformers ({error})", hint="pip install 'msdcli[diffusers]'"
        ) from None
    transformers.utils.logging.disable_progress_bar()
    return transformers
