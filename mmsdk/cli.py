"""The command line, `mmsdk COMMAND`.

Everything heavy is imported inside the commands, so that `mmsdk --help` is quick. A mistake of the user ends with one
line on stderr and exit code 2, Ctrl-C with 130; a fault of the program with its traceback and 1.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import re
import shutil
import sys
import time
import traceback
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from mmsdk import __version__
from mmsdk.errors import CheckpointError, ImageError, MMSDKError, unknown_name
from mmsdk.training.recipes import RECIPES

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from mmsdk.entropy import EntropyModel
    from mmsdk.tokens import ImageTokens, TokenSpec
    from tokenizers_img.base import ImageTokenizer

DEFAULT_MODEL = "emoji-64"
# Pictures of small models are enlarged to at least this many pixels a side.
PLEASANT_SIZE = 256
# Models with fewer parameters run on one thread.
SMALL_MODEL = 50_000_000

_PACKAGES = ("mmsdk", "tokenizers_img", "generators", "pruning")
_INTERRUPTED = 130
_TOKEN_STREAM_START = b"\x89T"
_CHECKPOINT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)

ModelOption = Annotated[
    str, typer.Option("--model", "-m", metavar="NAME", help="Embedded model, local folder, or hub id `owner/name`.")
]
OptionsOption = Annotated[
    list[str] | None,
    typer.Option("--option", metavar="KEY=VALUE", help="Any further setting; the value is read as JSON, else as text."),
]
PresetOption = Annotated[str, typer.Option(metavar="NAME", help="Settings that were saved with the model.")]
AccelerateOption = Annotated[
    Literal["disa", "lantern", "cspd", "recycling"] | None,
    typer.Option(
        help="disa: fewer diffusion or flow steps as the picture is completed (50 down to 5). lantern: a draft head, "
        "and tokens that look alike count as one another; as many drafts as pay here, so that seeds do not repeat "
        "pictures. cspd: a small MAR drafts for a large one. recycling: drafts from earlier predictions; the same "
        "pictures."
    ),
]
DraftOption = Annotated[
    str | None,
    typer.Option(
        metavar="NAME", help="What lantern or cspd drafts with. Default: the one that ships with an embedded model."
    ),
]
ScaleOption = Annotated[
    int | None,
    typer.Option(min=1, help=f"Enlarge by this factor. Default: up to {PLEASANT_SIZE} pixels; 1 saves what was drawn."),
]


def _show_version(value: bool) -> None:
    if value:
        typer.echo(f"mmsdk {__version__}")
        raise typer.Exit


@app.callback()
def _mmsdk(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the whole traceback of an error (also: MMSDK_DEBUG=1).")
    ] = False,
) -> None:
    """Text to pictures, pictures to a few tokens, and back.

    \b
    First steps:
      mmsdk generate "red heart" -o heart.png
      mmsdk tokenize heart.png -o heart.tok
      mmsdk inspect heart.tok
      mmsdk detokenize heart.tok -o again.png
    """  # noqa: D301 - \b keeps the lines of the examples


# ---------------------------------------------------------------- pictures


@app.command()
def generate(
    output: Annotated[
        str,  # a Path would forget the / at its end
        typer.Option(
            "--output", "-o", metavar="FILE", help="Picture to write, or a folder (ending in /, or existing)."
        ),
    ],
    prompts: Annotated[list[str] | None, typer.Argument(metavar="[PROMPT]...", help="What to draw.")] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**62, help="Picture number i (from 0) is drawn with seed + i.")] = 0,
    num_images: Annotated[int, typer.Option("--num-images", "-n", min=1, help="Pictures for each prompt.")] = 1,
    guidance_scale: Annotated[
        float | None, typer.Option(help="How strictly to follow the prompt; 1 is off and twice as fast.")
    ] = None,
    num_tokens: Annotated[
        int | None, typer.Option(help="Stop after so many tokens: fewer are faster and coarser (ordered tokens only).")
    ] = None,
    temperature: Annotated[float | None, typer.Option(help="Below 1: safer choices. Above: wilder ones.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Choose among the k most probable tokens; 0: all.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Choose among tokens of this total probability; 1: all.")] = None,
    class_label: Annotated[
        list[int] | None, typer.Option(help="For class-conditional models, in place of a prompt; may be repeated.")
    ] = None,
    preset: PresetOption = "default",
    accelerate: AccelerateOption = None,
    draft: DraftOption = None,
    option: OptionsOption = None,
    model: ModelOption = DEFAULT_MODEL,
    scale: ScaleOption = None,
    stream_to: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Also save the unfinished pictures, named by their tokens.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures drawn at once; changes memory, not pictures.")] = 16,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads. Default: 1 for small models.")] = None,
    device: Annotated[str | None, typer.Option(help="Where to compute. Default: cuda where there is one.")] = None,
) -> None:
    """Draw pictures from prompts.

    Several pictures become one sheet in FILE: one row for each prompt, or as square as possible with one picture
    each. Where -o is a folder, they become one file each (0.png, 1.png, ...). Guidance, temperature and everything
    else that --option can set (top_k, num_iter, num_steps, ...) default to a preset that the model was saved with.

    \b
    Examples:
      mmsdk generate "red heart" -o heart.png
      mmsdk generate "pizza" "cat face" --num-images 4 --seed 7 -o sheet.png
      mmsdk generate "green apple" -n 20 -o apples/
      mmsdk generate "rocket" -o rocket.png --stream-to steps/
      mmsdk generate "sun" -m emoji-64-mar --accelerate disa --option num_iter=8 -o sun.png
      mmsdk generate "sun" --accelerate lantern -o sun.png
    """  # noqa: D301
    if bool(prompts) == bool(class_label):
        raise ValueError("Give a PROMPT (or, for class-conditional models, --class-label), and not both.")
    conditions: list[Any] = [item for item in (prompts or class_label or []) for _ in range(num_images)]
    if stream_to is not None and len(conditions) > batch_size:
        raise ValueError(
            f"--stream-to draws one batch: {len(conditions)} pictures need --batch-size {len(conditions)}."
        )
    target = _PictureTarget.check(output)
    started = time.monotonic()
    import torch

    from mmsdk.loading import resolve

    _quiet_libraries()
    pipeline = resolve("ar_image_pipeline").from_pretrained(model).to(_torch_device(device))
    _set_threads(threads, pipeline.transformer)
    key = "prompt" if prompts else "class_labels"
    settings = {
        "guidance_scale": guidance_scale,
        "num_tokens": num_tokens,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "preset": preset,
        "accelerator": _accelerator(accelerate, draft, pipeline),
        **_parse_options(option),
    }
    columns = num_images if num_images > 1 and len(conditions) > num_images else None
    images: list[Image.Image] = []
    for first in range(0, len(conditions), batch_size):
        batch = conditions[first : first + batch_size]
        generators = [torch.Generator().manual_seed(seed + first + i) for i in range(len(batch))]
        if stream_to is None:
            images += pipeline(**{key: batch}, **settings, generator=generators).images
            continue
        stream_to.mkdir(parents=True, exist_ok=True)
        for step in pipeline.stream(**{key: batch}, **settings, generator=generators):
            _PictureTarget(stream_to / f"{step.num_tokens:04d}.png", False).write(step.images, scale, columns)
        images += step.images
    described = target.write(images, scale, columns)
    typer.echo(f"{described}, seed {seed}, {time.monotonic() - started:.1f} s")


@app.command()
def edit(
    image: Annotated[Path, typer.Argument(metavar="IMAGE", help="Picture to change.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="Picture to write.")],
    prompt: Annotated[str | None, typer.Argument(metavar="[PROMPT]", help="What to draw.")] = None,
    mask: Annotated[
        Path | None, typer.Option(metavar="PICTURE", help="White where to draw anew, of the size of IMAGE.")
    ] = None,
    keep_tokens: Annotated[
        int | None,
        typer.Option(min=0, help="Keep so many tokens and draw the rest anew: fewer are freer (ordered tokens only)."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**62, help="Picture number i (from 0) is drawn with seed + i.")] = 0,
    num_images: Annotated[int, typer.Option("--num-images", "-n", min=1, help="Pictures, side by side.")] = 1,
    class_label: Annotated[int | None, typer.Option(help="For class-conditional models, in place of a prompt.")] = None,
    preset: PresetOption = "default",
    accelerate: AccelerateOption = None,
    draft: DraftOption = None,
    option: OptionsOption = None,
    model: ModelOption = DEFAULT_MODEL,
    scale: ScaleOption = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads. Default: 1 for small models.")] = None,
    device: Annotated[str | None, typer.Option(help="Where to compute. Default: cuda where there is one.")] = None,
) -> None:
    """Draw a part of a picture anew (--mask), or vary it (--keep-tokens).

    With --mask, all tokens that the mask touches are drawn anew; a model that writes a grid from top to bottom also
    draws what follows them. With --keep-tokens, the first tokens of One-D-Piece or FlexTok keep the gist.

    \b
    Examples:
      mmsdk edit heart.png "red heart" --mask corner.png -m emoji-64-mar -o again.png
      mmsdk edit heart.png "red heart" --keep-tokens 8 -n 4 -m emoji-64-1d -o hearts.png
    """  # noqa: D301
    if (mask is None) == (keep_tokens is None):
        raise ValueError("Give --mask (where to draw anew) or --keep-tokens (how much to keep), and not both.")
    if (prompt is None) == (class_label is None):
        raise ValueError("Give a PROMPT (or, for class-conditional models, --class-label), and not both.")
    target = _PictureTarget.check(str(output))
    started = time.monotonic()
    import torch

    from mmsdk.loading import resolve

    _quiet_libraries()
    pipeline = resolve("ar_image_pipeline").from_pretrained(model).to(_torch_device(device))
    _set_threads(threads, pipeline.transformer)
    conditions = {"class_labels": [class_label] * num_images} if prompt is None else {"prompt": [prompt] * num_images}
    accelerator = _accelerator(accelerate, draft, pipeline)
    settings: dict[str, Any] = {"preset": preset, "accelerator": accelerator, **_parse_options(option)}
    settings["generator"] = [torch.Generator().manual_seed(seed + i) for i in range(num_images)]
    pictures = [image] * num_images
    if mask is not None:
        images = pipeline.inpaint(pictures, mask, **conditions, **settings).images
    else:
        images = pipeline.vary(pictures, keep_tokens, **conditions, **settings).images
    described = target.write(images, scale, None)
    typer.echo(f"{described}, seed {seed}, {time.monotonic() - started:.1f} s")


def _accelerator(name: str | None, draft: str | None, pipeline: Any) -> Any:
    """Return what `--accelerate` names."""
    if name is None:
        if draft is not None:
            raise ValueError("--draft needs --accelerate lantern or cspd.")
        return None
    from generators.accelerators import make_accelerator

    return make_accelerator(name, pipeline, draft)


@app.command()
def tokenize(
    image: Annotated[Path, typer.Argument(metavar="IMAGE", help="Picture of any common format and size.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="Token file to write.")],
    num_tokens: Annotated[
        int | None, typer.Option(help="Keep so many tokens: fewer are smaller and coarser (ordered tokens only).")
    ] = None,
    target_psnr: Annotated[
        float | None,
        typer.Option(
            metavar="DB", help="Keep as few tokens as reach this PSNR at the tokenizer's size (ordered tokens only)."
        ),
    ] = None,
    bits: Annotated[int | None, typer.Option(help="Bits of each index: the quality knob of tokenbridge.")] = None,
    fit: Annotated[
        Literal["crop", "letterbox"], typer.Option(help="Cut a square out, or keep the whole picture and its shape.")
    ] = "crop",
    tokenizer: Annotated[
        str | None, typer.Option(help="Which tokenizer of the model. Default: the folder's own, else one_d_piece.")
    ] = None,
    entropy_model: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL", help="Generator of such tokens, such as emoji-64-1d: likely tokens then take fewer bits."
        ),
    ] = None,
    model: ModelOption = DEFAULT_MODEL,
) -> None:
    """Turn a picture into a file of tokens.

    The picture is resized and cut to the size that the tokenizer works at, or with --fit letterbox resized whole, with
    white margins that `detokenize` removes. The result is lossy.

    \b
    Examples:
      mmsdk tokenize photo.jpg -o photo.tok
      mmsdk tokenize photo.jpg -o whole.tok --fit letterbox
      mmsdk tokenize photo.jpg -o small.tok --num-tokens 8
      mmsdk tokenize photo.jpg -o good.tok --target-psnr 20
      mmsdk tokenize photo.jpg -o grid.tok --tokenizer vq
      mmsdk tokenize photo.jpg -o coded.tok --num-tokens 32 --entropy-model emoji-64-1d
    """  # noqa: D301
    if target_psnr is not None and num_tokens is not None:
        raise ValueError("Give --num-tokens or --target-psnr, which chooses the number, and not both.")
    if target_psnr is not None and not (math.isfinite(target_psnr) and target_psnr > 0):
        raise ValueError(f"--target-psnr must be a positive number of dB, received {target_psnr:g}.")
    _check_parent(output)
    from mmsdk.images import open_image

    picture = open_image(image)
    _quiet_libraries()
    encoder = _load_tokenizer(model, tokenizer, bits)
    _set_threads(None, encoder)
    tokens = encoder.encode(picture, num_tokens, fit=fit)
    reached = ""
    if target_psnr is not None:
        tokens, quality = _fewest_tokens(encoder, tokens, encoder.preprocess(picture, fit), target_psnr)
        reached = f", {quality:.1f} dB"
    tight = len(tokens.to_bytes())
    tokens.save(output, _load_entropy_model(entropy_model))
    size = output.stat().st_size
    saved = "" if entropy_model is None else f" ({tight} without entropy coding)"
    typer.echo(f"{output}: {int(tokens.lengths[0])} tokens, {size} bytes{saved}{reached}")


def _fewest_tokens(
    encoder: ImageTokenizer, tokens: ImageTokens, picture: Tensor, target: float
) -> tuple[ImageTokens, float]:
    """Return the shortest prefix of one image's tokens whose PSNR reaches `target`, and that PSNR.

    Quality need not rise with every token, so each length is tried, from 1 on. Margins do not count.
    """
    from mmsdk.tokens import ImageTokens, placement_box
    from mmsdk.training.tokenizer_recipes import psnr

    if not encoder.ordered:
        knob = f"; choose its --{encoder.quality_knob} instead" if encoder.quality_knob else ""
        raise ValueError(
            f"--target-psnr needs ordered tokens, any prefix of which decodes: {encoder.registry_name!r} always takes "
            f"all {encoder.max_tokens}{knob}."
        )
    original = tokens.spec.image_size if tokens.placements is None else tokens.placements[0].tolist()
    top, left, height, width = placement_box(original, tokens.spec.image_size)
    box = (..., slice(top, top + height), slice(left, left + width))
    best, count = -math.inf, tokens.num_tokens
    for first in range(1, count + 1, 16):
        lengths = range(first, min(first + 16, count + 1))
        prefixes = ImageTokens.cat([tokens.truncate(length) for length in lengths])
        for length, quality in zip(lengths, psnr(encoder.decode(prefixes).images[box], picture[box]), strict=True):
            if quality >= target:
                return tokens.truncate(length), float(quality)
            best = max(best, float(quality))
    raise ValueError(
        f"No number of tokens reaches --target-psnr {target:g}: the best of 1 to {count} is {best:.2f} dB."
    )


@app.command()
def detokenize(
    tokens_file: Annotated[Path, typer.Argument(metavar="FILE.tok", help="What `mmsdk tokenize` wrote.")],
    output: Annotated[
        str,
        typer.Option(
            "--output", "-o", metavar="IMAGE", help="Picture to write, or a folder (ending in /, or existing)."
        ),
    ],
    num_tokens: Annotated[int | None, typer.Option(help="Use the first so many tokens (ordered tokens only).")] = None,
    entropy_model: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="What the file was written with, if it was entropy coded."),
    ] = None,
    model: ModelOption = DEFAULT_MODEL,
    scale: Annotated[int, typer.Option(min=1, help="Enlarge by this factor.")] = 1,
) -> None:
    """Turn a file of tokens back into a picture.

    The file names its tokenizer; the model must be the one that wrote it. Letterboxed pictures get their margins cut
    off and their own size back. Several pictures become one sheet, or files in a folder.

    \b
    Examples:
      mmsdk detokenize photo.tok -o photo.png
      mmsdk detokenize photo.tok -o coarse.png --num-tokens 4 --scale 4
    """  # noqa: D301
    target = _PictureTarget.check(output)
    from mmsdk.tokens import ImageTokens

    _quiet_libraries()
    tokens = ImageTokens.load(tokens_file, entropy_model=_load_entropy_model(entropy_model))
    if num_tokens is not None:
        tokens = tokens.truncate(num_tokens)
    decoder = _load_tokenizer(model, tokens.spec.tokenizer, _stated_bits(tokens.spec))
    _set_threads(None, decoder)
    typer.echo(target.write(decoder.decode(tokens).to_pil(), scale))


# ---------------------------------------------------------------- looking inside


@app.command()
def prune(
    image: Annotated[Path, typer.Argument(metavar="IMAGE", help="Picture of any common format and size.")],
    question: Annotated[str, typer.Option("--question", "-q", help="What to ask about it.")],
    method: Annotated[str, typer.Option(help="How to choose visual tokens; --plan compares all.")] = "divprune",
    keep_ratio: Annotated[float | None, typer.Option(help="Share of the visual tokens to keep. Default: 0.25.")] = None,
    num_tokens: Annotated[int | None, typer.Option(help="Keep so many visual tokens instead.")] = None,
    show: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw the kept patches over the picture, the others dimmed.")
    ] = None,
    plan: Annotated[
        bool, typer.Option("--plan", help="Do not answer, but say how many tokens each method may keep for a target.")
    ] = False,
    target_ms: Annotated[
        float | None, typer.Option(metavar="MS", help="With --plan: milliseconds until the prompt is read.")
    ] = None,
    target_flops: Annotated[
        float | None, typer.Option(metavar="N", help="With --plan: operations of the language model's prefill.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 64,
    model: Annotated[
        str, typer.Option("--model", "-m", metavar="NAME", help="Embedded model, local folder, or hub id of a VLM.")
    ] = "emoji-vqa",
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads. Default: 1 for small models.")] = None,
) -> None:
    """Ask a vision-language model about a picture, of which it sees a part of the tokens.

    The embedded model knows grids of emoji (`mmsdk data --vqa` writes some) and four questions: what is at b3?, where
    is the cat?, is there any cat?, how many cat? Any other model of transformers that takes pictures works as well.

    \b
    Examples:
      mmsdk prune scene.png -q "what is at b3?" --keep-ratio 0.1 --show kept.png
      mmsdk prune photo.jpg -q "What is this?" --method hired -m llava-hf/llava-v1.6-mistral-7b-hf
      mmsdk prune scene.png -q "what is at b3?" --plan --target-flops 1e8
    """  # noqa: D301
    if plan != (target_ms is not None or target_flops is not None):
        raise ValueError("--plan needs a target, --target-ms or --target-flops, and targets need --plan.")
    if keep_ratio is not None and num_tokens is not None:
        raise ValueError("Give --keep-ratio or --num-tokens, and not both.")
    if show is not None:
        _check_parent(show)
    import torch

    from mmsdk.images import open_image, save_image
    from mmsdk.loading import PRUNERS, load_vlm, resolve

    if method not in PRUNERS:
        raise unknown_name("pruning method", method, list(PRUNERS))
    if num_tokens is None and keep_ratio is None:
        keep_ratio = 0.25
    pruner = resolve(method)(keep_ratio=keep_ratio, num_tokens=num_tokens)
    picture = open_image(image).convert("RGB")
    _quiet_libraries()
    vlm, processor = load_vlm(model)
    _set_threads(threads, vlm)
    if getattr(processor, "chat_template", None):
        content = [{"type": "image"}, {"type": "text", "text": question}]
        prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    else:
        prompt = f"{getattr(processor, 'image_token', '<image>')} {question}"
    inputs = dict(processor(images=picture, text=prompt, return_tensors="pt"))
    if plan:
        _print_plan(vlm, inputs, target_ms, target_flops)
        return
    with torch.inference_mode(), pruner(vlm):
        output = vlm.generate(**inputs, do_sample=False, max_new_tokens=max_new_tokens)
    report = pruner.report
    said = processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
    typer.echo(said)
    typer.echo(
        f"{sum(report.tokens_after)} of {sum(report.tokens_before)} visual tokens, "
        f"{report.flops_after / report.flops_before:.0%} of the prefill's operations",
        err=True,
    )
    if show is not None:
        save_image(resolve("draw_kept")(vlm, inputs, picture, report.kept[0]), show)
        typer.echo(f"{show}: kept patches", err=True)


def _print_plan(vlm: Any, inputs: dict[str, Any], target_ms: float | None, target_flops: float | None) -> None:
    from mmsdk.loading import PRUNERS, resolve

    # What is not made for this kind of model or image has nothing to propose.
    methods = {}
    for name in PRUNERS:
        with contextlib.suppress(ValueError, TypeError):
            resolve(name)(keep_ratio=0.5).prepare(vlm, inputs)
            methods[name] = resolve(name)
    seconds = None if target_ms is None else target_ms / 1e3
    rows = [("method", "tokens", "keep_ratio", "ms", "MFLOP")]
    for found in resolve("prune_plan")(vlm, inputs, methods, target_seconds=seconds, target_flops=target_flops):
        if found.num_tokens is None or found.keep_ratio is None or found.flops is None:
            rows.append((found.method, "-", "-", "-", "-"))
            continue
        time_needed = "-" if found.seconds is None else f"{1e3 * found.seconds:.1f}"
        rows.append(
            (found.method, f"{found.num_tokens}", f"{found.keep_ratio:.3f}", time_needed, f"{found.flops / 1e6:.0f}")
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        first, *numbers = (f"{c:>{w}}" for c, w in zip(row, widths, strict=True))
        typer.echo("  ".join([f"{first.strip():<{widths[0]}}", *numbers]))


@app.command()
def inspect(
    source: Annotated[str, typer.Argument(metavar="FILE|MODEL", help="Token file, model, or published checkpoint.")],
) -> None:
    """Describe a token file, a model, or a published checkpoint.

    \b
    Examples:
      mmsdk inspect photo.tok
      mmsdk inspect emoji-64
      mmsdk inspect runs/vq/model
      mmsdk inspect downloads/one-d-piece-l-256.safetensors
    """  # noqa: D301
    from mmsdk.loading import WEIGHTS_FOLDER, embedded_models

    path = Path(source)
    index = embedded_models()
    if source in index:
        for component, folder in index[source].items():
            _echo_fields(f"{source}, {component}", _describe_folder(WEIGHTS_FOLDER / folder))
    elif path.is_dir():
        _echo_fields(source, _describe_folder(path))
    elif not path.is_file():
        raise unknown_name("file or model (no file, folder or embedded model)", source, list(index))
    elif path.suffix == ".tok" or _starts_with(path, _TOKEN_STREAM_START):
        _echo_fields(source, _describe_tokens(path))
    elif path.suffix in _CHECKPOINT_SUFFIXES:
        _echo_fields(source, _describe_checkpoint(path))
    else:
        raise ValueError(
            f"{source!r} is neither a token file (.tok) nor a checkpoint ({', '.join(_CHECKPOINT_SUFFIXES)}), by its "
            "name and its first bytes."
        )


def _describe_tokens(path: Path) -> dict[str, Any]:
    from mmsdk.tokens import ImageTokens

    tokens = ImageTokens.load(path)
    spec = tokens.spec
    size = path.stat().st_size
    count, bits = int(tokens.lengths.sum()), int(tokens.num_bits.sum())
    sizes = spec.codebook_size
    if sizes is None:
        codebook = "none, continuous latents"
    elif len(sizes) == 1:
        codebook = f"{sizes[0]} entries"
    else:
        codebook = f"{len(sizes)} channels of {', '.join(map(str, sorted(set(sizes))))} entries"
    images = f"{len(tokens)} of {spec.image_size[1]} x {spec.image_size[0]} pixels"
    if tokens.placements is not None:
        images += f", letterboxed from {', '.join(f'{w} x {h}' for h, w in tokens.placements.tolist())}"
    order = "any prefix decodes" if spec.ordered else "all are needed"
    if spec.grid is not None:
        order = f"grid of {spec.grid[0]} x {spec.grid[1]}"
    return {
        "kind": "image tokens",
        "tokenizer": f"{spec.tokenizer}, fingerprint {spec.fingerprint}",
        "images": images,
        "tokens": f"{', '.join(map(str, tokens.lengths.tolist()))} of at most {spec.max_tokens}",
        "order": order,
        "codebook": codebook,
        "bits": f"{bits}, {bits / count:g} per token",
        "bytes": f"{size}, of which {(bits + 7) // 8} for tokens; {8 * size / len(tokens):g} bits per image in all",
    }


def _describe_folder(folder: Path) -> dict[str, Any]:
    """Describe a pipeline folder or a model folder."""
    shapes = {p: _safetensors_shapes(p) for p in sorted(folder.rglob("*.safetensors"))}
    described: dict[str, Any] = {}
    if (folder / "model_index.json").is_file():
        index = _read_json(folder / "model_index.json")
        described["class"] = index.get("_class_name", "unknown")
        for name, entry in index.items():
            if isinstance(entry, list) and entry and entry[-1] is not None and not name.startswith("_"):
                count = sum(_count(s) for p, s in shapes.items() if (folder / name) in p.parents)
                described[name] = str(entry[-1]) + (f", {count:,} parameters" if count else "")
        described["config"] = {k: v for k, v in index.items() if not k.startswith("_") and not isinstance(v, list)}
    elif (folder / "config.json").is_file():
        config = _read_json(folder / "config.json")
        described["class"] = config.get("_class_name") or ", ".join(config.get("architectures") or ["unknown"])
        described["config"] = {k: v for k, v in config.items() if not k.startswith("_")}
    else:
        raise CheckpointError(f"{str(folder)!r} holds no model: neither model_index.json nor config.json is there.")
    described["parameters"] = f"{sum(map(_count, shapes.values())):,}"
    described["size"] = _bytes(sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()))
    described["licence"] = _licence(folder)
    return described


def _describe_checkpoint(path: Path) -> dict[str, Any]:
    if path.suffix == ".safetensors":
        shapes = _safetensors_shapes(path)
    else:
        from mmsdk.loading import load_original

        shapes = {k: tuple(v.shape) for k, v in load_original(path).items()}
    family = guess_family(shapes)
    described = {
        "kind": "checkpoint",
        "keys": f"{len(shapes):,}",
        "parameters": f"{_count(shapes):,}",
        "size": _bytes(path.stat().st_size),
        "family": family or "unknown",
    }
    if family:
        described["convert with"] = f"mmsdk convert {path} -o FOLDER --family {family} --config ..."
    return described


def guess_family(shapes: Mapping[str, Sequence[int]]) -> str | None:
    """Guess from the keys and shapes of a published state dict which class of the registry reads it; None: no idea."""
    if "tok_embeddings.weight" in shapes and any(key.startswith("cls_embedding.") for key in shapes):
        return "llamagen"
    if "encoder.latent_token_positional_embedding" in shapes:
        # The same architecture; of the first generation, One-D-Piece has 256 tokens and TiTok up to 128.
        legacy = "decoder.ffn.2.weight" in shapes
        return "one_d_piece" if legacy and shapes["encoder.latent_token_positional_embedding"][0] == 256 else "titok"
    if "quantize.embedding.weight" in shapes and any(key.startswith("encoder.conv_blocks.") for key in shapes):
        return "vq"
    return None


def _safetensors_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Read the shapes from a file's header, without its tensors."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            return {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118 - it is no mapping
    except SafetensorError as error:
        raise CheckpointError(f"Cannot read the checkpoint {str(path)!r}: {error}") from error


def _count(shapes: Mapping[str, Sequence[int]]) -> int:
    return sum(math.prod(shape) for shape in shapes.values())


def _licence(folder: Path) -> str:
    """Return what the front matter of the model card says; parts of an embedded model may share one, a folder up."""
    from mmsdk.loading import WEIGHTS_FOLDER

    folders = [folder] + [folder.parent] * (WEIGHTS_FOLDER in folder.parent.parents)
    for card in (place / "README.md" for place in folders):
        if card.is_file():
            front_matter = re.match(r"---\n(.*?)\n---\n", card.read_text(encoding="utf-8"), re.DOTALL)
            licence = re.search(r"^license:\s*(\S+)", front_matter[1], re.MULTILINE) if front_matter else None
            if licence:
                return licence[1]
    return "not stated in a model card"


# ---------------------------------------------------------------- training and measuring


@app.command()
def train(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help=", ".join(RECIPES) + ".")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FOLDER", help="Default: runs/RECIPE.")
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Optimizer steps in all. Default: the recipe's.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Images for each step. Default: the recipe's.")] = None,
    max_seconds: Annotated[
        float | None, typer.Option(min=0, help="Stop with a checkpoint after this time; the same command goes on.")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, help="Of weights, batches and dropout. Default: the recipe's.")
    ] = None,
    no_resume: Annotated[bool, typer.Option("--no-resume", help="Ignore checkpoints in the folder.")] = False,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads. Default: torch's choice.")] = None,
    option: OptionsOption = None,
) -> None:
    """Train one of the embedded models.

    Fetches and builds the emoji data set first, if it is not there (see `mmsdk data`). Writes metrics.jsonl,
    checkpoints and, at each evaluation, FOLDER/model, which all other commands take as --model. An interrupted
    training goes on where its last checkpoint stands.

    \b
    Examples:
      mmsdk train vq --max-seconds 3600
      mmsdk train one_d_piece --option codec_source=runs/vq/model
      mmsdk train llamagen --option tokenizer_source=runs/vq/model --steps 20000
    """  # noqa: D301
    import dataclasses

    from mmsdk.training.recipes import resolve_recipe

    folder = output or Path("runs") / recipe
    chosen = resolve_recipe(recipe)(**_parse_options(option))
    given: dict[str, Any] = {"steps": steps, "batch_size": batch_size, "seed": seed}
    chosen.config = dataclasses.replace(chosen.config, **{k: v for k, v in given.items() if v is not None})
    _set_threads(threads)
    from mmsdk.training.loop import train as run_training

    _show_log()
    saved = run_training(chosen, folder, resume=not no_resume, max_seconds=max_seconds)
    if saved.is_dir():
        typer.echo(f"{saved}: the model of the last evaluation; look at it with `mmsdk inspect {saved}`")
    else:
        typer.echo(f"{folder}: stopped before the first evaluation; run the same command again to go on")


@app.command()
def data(
    cache_dir: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Default: $MMSDK_CACHE, else ~/.cache/mmsdk.")
    ] = None,
    licences: Annotated[bool, typer.Option("--licences", help="Only show the image sets and their licences.")] = False,
    vqa: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Also write the emoji-vqa test scenes and their questions there."),
    ] = None,
    vqa_scenes: Annotated[int, typer.Option(min=1, help="How many scenes; each has four questions.")] = 132,
) -> None:
    """Fetch and build the emoji data set.

    Downloads the image sets with npm, checks each by its SHA-512 and rasterises them: about two minutes and 200 MB,
    once. Needs `pip install "mmsdk[data]"`.

    \b
    Examples:
      mmsdk data --licences
      mmsdk data
      mmsdk data --vqa emoji-vqa-test
    """  # noqa: D301
    from mmsdk.data.emoji import PACKAGES, build_emoji_dataset

    rows = [("style", "licence", "npm package")]
    rows += [(p.style or "(captions)", p.licence, f"{p.npm_name}@{p.version}") for p in PACKAGES.values()]
    widths = [max(len(row[i]) for row in rows) for i in range(2)]
    for style, licence, package in rows:
        typer.echo(f"{style:<{widths[0]}}  {licence:<{widths[1]}}  {package}")
    if licences:
        return
    _show_log()
    folder = build_emoji_dataset(cache_dir)
    typer.echo(f"{folder}: {len(json.loads((folder / 'records.json').read_text())):,} images")
    if vqa is not None:
        from mmsdk.data.emoji_vqa import write_scenes

        typer.echo(f"{write_scenes(vqa, count=vqa_scenes, cache_dir=cache_dir)}: {vqa_scenes} scenes, questions.jsonl")


@app.command()
def bench(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="Without a name: list the benchmarks.")] = None,
    json_path: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Also write the figures as JSON.")
    ] = None,
    output_dir: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Write plots and sample sheets here.")
    ] = None,
    option: OptionsOption = None,
) -> None:
    """Measure one of the claims.

    Both sides of a ratio are measured in one run, and what was executed is counted beside the time.

    \b
    Examples:
      mmsdk bench
      mmsdk bench reconstruction --json reconstruction.json --output-dir plots
      mmsdk bench t2i --option model=runs/llamagen/model
    """  # noqa: D301
    from mmsdk.bench.runner import BENCHMARKS, format_table, run_benchmark

    if name is None:
        typer.echo("\n".join(sorted(BENCHMARKS)))
        return
    if json_path is not None:
        _check_parent(json_path)
    _quiet_libraries()
    result = run_benchmark(name, json_path=json_path, output_dir=output_dir, **_parse_options(option))
    typer.echo(format_table(result))


# ---------------------------------------------------------------- published checkpoints


@app.command()
def convert(
    checkpoint: Annotated[
        Path, typer.Argument(metavar="CHECKPOINT", help="Published file: .safetensors, .bin, .pt ...")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FOLDER", help="Folder to write; must not exist.")],
    family: Annotated[str, typer.Option(help="one_d_piece, titok, vq or llamagen; `mmsdk inspect` guesses.")],
    config: Annotated[
        str | None,
        typer.Option(metavar="NAME|FILE.json", help="Published size, such as l256, l32, vq16 or B, or a file."),
    ] = None,
    image_size: Annotated[
        int | None,
        typer.Option(min=1, help="Side of the pictures, where the files do not tell (vq, llamagen). Default: 256."),
    ] = None,
) -> None:
    """Turn a published checkpoint into a folder for from_pretrained.

    The published files hold weights only, so their size must be named (a configuration file is the published one, as
    JSON). For llamagen the sizes are read from the weights, and --config or --image-size says what they do not tell.
    Pickles are read with weights_only=True. Nothing is left behind if it fails.

    \b
    Examples:
      mmsdk convert one-d-piece-l-256.safetensors -o one-d-piece --family one_d_piece --config l256
      mmsdk convert tokenizer_titok_l32.bin -o titok-l32 --family titok --config l32
      mmsdk convert vq_ds16_c2i.pt -o vq16 --family vq --config vq16 --image-size 384
      mmsdk convert c2i_B_384.pt -o llamagen-b --family llamagen --image-size 384
    """  # noqa: D301
    if output.exists():
        raise FileExistsError(f"{str(output)!r} exists already; name a new folder.")
    _check_parent(output)
    if not checkpoint.is_file():
        raise FileNotFoundError(f"No checkpoint file at {str(checkpoint)!r}.")
    from mmsdk.loading import REGISTRY, resolve

    _quiet_libraries()
    target = resolve(family) if family in REGISTRY else None
    if not hasattr(target, "from_original"):
        raise unknown_name("family", family, [name for name in REGISTRY if hasattr(resolve(name), "from_original")])
    model = _from_original(target, checkpoint, config, image_size)
    partial = output.with_name(f".{output.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        model.save_pretrained(partial)
        partial.rename(output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    _echo_fields(str(output), _describe_folder(output))


def _from_original(target: Any, checkpoint: Path, config: str | None, image_size: int | None) -> Any:
    """Call `from_original` with what the class takes: a preset's name, or a mapping."""
    import inspect as introspection

    values: Any = config
    if config is not None and config.endswith(".json"):
        values = _read_json(Path(config))
    if hasattr(target, "preset_config"):
        # Its sizes are read from the weights; a preset adds what they do not tell.
        if isinstance(values, str):
            preset = target.preset_config(values, image_size or 256)
            values = {k: preset[k] for k in ("hidden_size", "num_layers", "num_heads", "max_tokens")}
        elif image_size is not None:
            values = {"max_tokens": target.preset_config("B", image_size)["max_tokens"], **(values or {})}
    elif values is None:
        raise ValueError(f"--config is missing: a file, or one of {', '.join(sorted(target.presets))}.")
    settings = {}
    if image_size is not None and "image_size" in introspection.signature(target.from_original).parameters:
        settings["image_size"] = image_size
    return target.from_original(checkpoint, values, **settings)


# ---------------------------------------------------------------- shared


def _load_entropy_model(name: str | None) -> EntropyModel | None:
    """Load the generator that predicts tokens; None for None."""
    if name is None:
        return None
    from mmsdk.loading import resolve

    return resolve("llamagen_entropy")(resolve("llamagen").from_pretrained(name))


def _load_tokenizer(model: str, component: str | None, bits: int | None = None) -> Any:
    """Load an image tokenizer from an embedded model, its own folder, a pipeline's folder or the hub.

    `bits` replaces those that it was saved with.
    """
    from mmsdk.loading import REGISTRY, TOKENIZERS, embedded_models, resolve

    source = model
    if model not in embedded_models():
        if (Path(model) / "model_index.json").is_file():
            source = str(Path(model) / "image_tokenizer")
        if (Path(source) / "config.json").is_file():
            class_name = _read_json(Path(source) / "config.json").get("_class_name")
            found = next((k for k, v in REGISTRY.items() if v.endswith(f":{class_name}")), None)
            if component is not None and found != component:
                raise CheckpointError(
                    f"{source!r} holds a model of the class {class_name}, not the {component!r} asked for."
                )
            component = found
    component = component or "one_d_piece"
    if component not in TOKENIZERS:
        raise unknown_name("tokenizer", component, list(TOKENIZERS))
    model_class = resolve(component)
    if bits is None:
        return model_class.from_pretrained(source).eval()
    if model_class.quality_knob != "bits":
        having = [name for name in TOKENIZERS if resolve(name).quality_knob == "bits"]
        advice = " Its tokens are ordered: --num-tokens makes them cheaper." if model_class.ordered else ""
        raise ValueError(f"--bits {bits} is a setting of {', '.join(having)} only, not of {component!r}.{advice}")
    return model_class.from_pretrained(source, bits=bits).eval()


def _stated_bits(spec: TokenSpec) -> int | None:
    """Return the bits that tokens were made with, where they are their tokenizer's quality knob."""
    from mmsdk.loading import TOKENIZERS, resolve

    if spec.codebook_size and spec.tokenizer in TOKENIZERS and resolve(spec.tokenizer).quality_knob == "bits":
        return (spec.codebook_size[0] - 1).bit_length()
    return None


def _check_parent(path: Path) -> None:
    """Find out before the work, not after it, that there is nowhere to write."""
    if not path.parent.is_dir():
        raise FileNotFoundError(f"Cannot write {path}: there is no folder {path.parent}.")


@dataclass(frozen=True)
class _PictureTarget:
    """Where pictures go: one file, or a folder of files."""

    path: Path
    is_folder: bool

    @classmethod
    def check(cls, output: str) -> _PictureTarget:
        """Find out before the work, not after it, that the target cannot be written."""
        from mmsdk.images import _WRITABLE_FORMATS

        path = Path(output)
        _check_parent(path)
        is_folder = path.is_dir() or output.endswith(("/", os.sep))
        if not is_folder and path.suffix.lower() not in _WRITABLE_FORMATS:
            raise ImageError(
                f"Cannot write {output!r}: the extension {path.suffix!r} is unknown. Accepted are "
                f"{', '.join(_WRITABLE_FORMATS)}, or a folder ending in /."
            )
        return cls(path, is_folder)

    def write(self, images: Sequence[Image.Image], scale: int | None, columns: int | None = None) -> str:
        """Enlarge the pictures and write them, several to one file as a sheet; say what was written."""
        from PIL import Image

        from mmsdk.images import image_grid, save_image

        factor = scale or max(1, math.ceil(PLEASANT_SIZE / min(images[0].size)))
        if factor > 1:
            images = [i.resize((i.width * factor, i.height * factor), Image.Resampling.LANCZOS) for i in images]
        if not self.is_folder and len({i.size for i in images}) > 1:
            raise ImageError(
                f"{len(images)} pictures of different sizes make no sheet {str(self.path)!r}; name a folder instead."
            )
        count = "1 picture" if len(images) == 1 else f"{len(images)} pictures"
        if self.is_folder:
            self.path.mkdir(exist_ok=True)
            digits = len(str(len(images) - 1))
            for number, image in enumerate(images):
                save_image(image, self.path / f"{number:0{digits}d}.png")
            sizes = " and ".join(dict.fromkeys(f"{i.width} x {i.height}" for i in images))
            return f"{self.path}: {count} of {sizes} pixels"
        sheet = images[0]
        if len(images) > 1:
            padding = max(2, images[0].width // 32)
            sheet = image_grid(images, columns or math.ceil(math.sqrt(len(images))), padding)
        save_image(sheet, self.path)
        return f"{self.path}: {count}, {sheet.width} x {sheet.height} pixels"


def _torch_device(name: str | None) -> Any:
    import torch

    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"--device {name!r} cannot be used here: {str(error).splitlines()[0]}") from error
    return device


def _set_threads(threads: int | None, model: Any = None) -> None:
    """Use so many CPU threads; where nobody says how many, one for a small model.

    A step of a small model takes a few milliseconds. Threads that wait for each other after each operation gain little
    then, and cost a lot on a machine that is busy with something else.
    """
    import torch

    if threads is None and model is not None and "OMP_NUM_THREADS" not in os.environ:
        threads = 1 if sum(p.numel() for p in model.parameters()) < SMALL_MODEL else None
    if threads is not None:
        torch.set_num_threads(threads)


def _quiet_libraries() -> None:
    """Keep the loading bars and advice of diffusers and transformers off the terminal; ours remain."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    for library in (diffusers_logging, transformers_logging):
        library.set_verbosity_error()
        library.disable_progress_bar()


def _show_log() -> None:
    """Show what our own modules log, in step with progress bars."""
    from tqdm.auto import tqdm

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            tqdm.write(self.format(record), file=sys.stderr)

    logger = logging.getLogger("mmsdk")
    logger.setLevel(logging.INFO)
    if not logger.handlers:
        logger.addHandler(Handler())


def _parse_options(options: Iterable[str] | None) -> dict[str, Any]:
    """Read `key=value`; a value is JSON (numbers, true, null, lists), or else text."""
    parsed: dict[str, Any] = {}
    for item in options or ():
        key, separator, value = item.partition("=")
        name = key.strip().replace("-", "_")
        if not separator or not name.isidentifier():
            raise ValueError(f"--option takes KEY=VALUE, received {item!r}.")
        try:
            parsed[name] = json.loads(value)
        except json.JSONDecodeError:
            parsed[name] = value
    return parsed


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{str(path)!r} is no readable JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{str(path)!r} holds {type(content).__name__}, expected an object.")
    return content


def _starts_with(path: Path, start: bytes) -> bool:
    with path.open("rb") as file:
        return file.read(len(start)) == start


def _bytes(count: int) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} bytes"


def _echo_fields(title: str, fields: Mapping[str, Any]) -> None:
    typer.echo(title)
    width = max(map(len, fields))
    for name, value in fields.items():
        if isinstance(value, Mapping):
            value = ", ".join(f"{k}={v}" for k, v in value.items())
        typer.echo(f"  {name:<{width}}  {value}")


# ---------------------------------------------------------------- errors


def _is_user_error(error: BaseException) -> bool:
    """Tell what users can mend from faults of the program.

    A `ValueError` or `TypeError` counts where one of our packages raised it: that is how they refuse arguments. Of any
    other package it is unexpected and deserves its traceback.
    """
    if isinstance(error, MMSDKError | OSError):
        return True
    if not isinstance(error, ValueError | TypeError):
        return False
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return frames[-1].f_globals.get("__name__", "").partition(".")[0] in _PACKAGES


def _one_line(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.filename}: {error.strerror}."
    return " ".join(str(error).split()) or type(error).__name__


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    Args:
        arguments: what follows `mmsdk`; by default the arguments of the process.
    """
    given = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    debug = os.environ.get("MMSDK_DEBUG", "0") not in ("", "0") or "--debug" in given
    try:
        code = typer.main.get_command(app)(given, prog_name="mmsdk", standalone_mode=False)
    except (typer.Abort, KeyboardInterrupt):
        return _INTERRUPTED
    except typer.TyperException as error:
        typer.echo(f"mmsdk: {error.format_message()} See `mmsdk --help`.", err=True)
        return 2
    except Exception as error:
        if debug or not _is_user_error(error):
            raise
        typer.echo(f"mmsdk: {_one_line(error)}", err=True)
        return 2
    return code if isinstance(code, int) else 0
