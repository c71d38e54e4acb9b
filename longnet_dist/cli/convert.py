"""``longnet convert``: a model of another program in a folder of ours, and back."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longnet_dist.cli.program.parser import CommandParser, positive

if TYPE_CHECKING:
    from longnet_dist.model.encoder import LongNetEncoder

SUMMARY = "turn weights of torchscale, GigaPath or LongViT into a folder of ours, and back"
STATE_FILE, CONFIG_FILE = "state_dict.pt", "config.json"
_SIZES = ("heads", "depth", "dim", "mlp_ratio", "max_wsi_size", "tile_size", "global_pool")
_TAKEN = {"torchscale": ("config", "decoder"), "gigapath": _SIZES, "longvit": ("heads",)}
"""Options of each program; what is converted back has its own sizes and takes none."""
EXAMPLES = """\
examples:
  longnet convert gigapath slide_encoder.pth --output gigapath
  longnet convert longvit longvit_small.pth --output longvit
  longnet convert torchscale model.pt --config config.json --output model
  longnet convert torchscale decoder.pt --config config.json --decoder --output model
  longnet convert gigapath gigapath --to torchscale --output back

Nothing is unpickled but tensors. OUTPUT gets model.safetensors and config.json. To use it:

  from longnet_dist.model.pretrained import from_pretrained
  model = from_pretrained("gigapath")

--config is a JSON file with the keyword arguments of torchscale's EncoderConfig or DecoderConfig.
With --to torchscale, FILE is such a folder, and OUTPUT gets state_dict.pt, under the names of the original program, and
for torchscale config.json with its keyword arguments.
"""


def main(arguments: Sequence[str]) -> None:
    """Convert as the command line says.

    Args:
        arguments: the words behind ``longnet convert``.

    Raises:
        LongNetError: the weights cannot be read or do not fit, or the output cannot be written.
    """
    options = parser().parse_args(arguments)
    _check_options(options)

    from longnet_dist.model.pretrained import check_new, save_pretrained

    check_new(options.output)
    if options.to == "torchscale":
        _write_back(options.program, options.file, options.output)
    else:
        save_pretrained(_imported(options), options.output)
    print(f"converted to {options.output}")


def _check_options(options: argparse.Namespace) -> None:
    """Refuse an option that would have no effect."""
    from longnet_dist.errors import ConfigError

    back = options.to == "torchscale"
    taken = () if back else _TAKEN[options.program]
    given = [name for names in _TAKEN.values() for name in names if getattr(options, name) not in (None, False)]
    if wrong := [f"--{name.replace('_', '-')}" for name in dict.fromkeys(given) if name not in taken]:
        what = "a folder that goes back has its own sizes, so --to torchscale" if back else f"{options.program}"
        known = ", ".join(f"--{name.replace('_', '-')}" for name in taken)
        raise ConfigError(f"{what} takes no {', '.join(wrong)}; leave it out{known and f' ({known} can be given)'}")


def _imported(options: argparse.Namespace) -> LongNetEncoder:
    from longnet_dist.interop import from_torchscale, gigapath_slide_encoder, longvit_encoder
    from longnet_dist.interop.state_dicts import read_file, state_dict_of

    if options.program == "gigapath":
        given = {name: value for name in _SIZES if (value := getattr(options, name)) is not None}
        return gigapath_slide_encoder(options.file, **given).encoder
    if options.program == "longvit":
        return longvit_encoder(options.file, **({} if options.heads is None else {"heads": options.heads})).encoder
    found = read_file(options.file)
    return from_torchscale(state_dict_of(found), _config(options.config, found), options.decoder)


def _config(path: Path | None, found: Any) -> dict[str, Any]:
    """Return the configuration in a file, or the one that lies beside the state dict."""
    from longnet_dist.errors import ConfigError

    if path is None:
        if isinstance(found, dict) and isinstance(found.get("config"), dict):
            return dict(found["config"])
        raise ConfigError(
            "torchscale's weights do not say their segment lengths; give --config, a JSON file with the keyword "
            "arguments of its EncoderConfig or DecoderConfig"
        )
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(
            f"cannot read the configuration {path}: {error}; --config is a JSON file with the keyword arguments of "
            f"torchscale's EncoderConfig or DecoderConfig"
        ) from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold a JSON object, the keyword arguments of torchscale's configuration")
    return values


def _write_back(program: str, source: Path, output: Path) -> None:
    import torch

    from longnet_dist.errors import ConfigError
    from longnet_dist.interop import to_torchscale
    from longnet_dist.interop.gigapath import to_gigapath
    from longnet_dist.interop.longvit import to_longvit
    from longnet_dist.model.encoder import LongNetEncoder
    from longnet_dist.model.pretrained import empty_folder, from_pretrained

    model = from_pretrained(source)
    if not isinstance(model, LongNetEncoder):
        raise ConfigError(f"{source} holds a language model of longnet_dist, which torchscale has no equivalent of")
    config = None
    if program == "torchscale":
        state, config = to_torchscale(model)
    else:
        state = to_gigapath(model) if program == "gigapath" else to_longvit(model)
    try:
        empty_folder(output)
        torch.save({"model": state}, output / STATE_FILE)
        if config is not None:
            (output / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot write to {output}: {error}") from None


def parser() -> argparse.ArgumentParser:
    """Return the parser of ``longnet convert``."""
    what = "Turn the weights of another program into a folder of ours, or with --to back."
    result = CommandParser("convert", what, EXAMPLES)
    result.add_argument("program", choices=("torchscale", "gigapath", "longvit"), help="whose weights they are")
    result.add_argument("file", type=Path, metavar="FILE", help="weights: a file of torch.save, or .safetensors")
    result.add_argument("--output", type=Path, required=True, metavar="DIR", help="new, or empty")
    result.add_argument("--to", choices=("longnet", "torchscale"), default="longnet", help="(default %(default)s)")
    scale = result.add_argument_group("torchscale")
    scale.add_argument("--config", type=Path, metavar="JSON", help="keyword arguments of torchscale's configuration")
    scale.add_argument("--decoder", action="store_true", help="the weights are a decoder's")
    sizes = result.add_argument_group(
        "gigapath, longvit", "sizes; defaults: those of the weights, or the published ones"
    )
    sizes.add_argument("--heads", type=positive, metavar="n", help="attention heads; weights hide them (default 16)")
    sizes.add_argument("--depth", type=positive, metavar="n", help="blocks (gigapath)")
    sizes.add_argument("--dim", type=positive, metavar="n", help="model dim (gigapath)")
    sizes.add_argument("--mlp-ratio", type=float, metavar="x", help="feed-forward dim over dim (gigapath)")
    sizes.add_argument("--max-wsi-size", type=positive, metavar="px", help="largest slide (gigapath, default 262144)")
    sizes.add_argument(
        "--tile-size",
        type=positive,
        metavar="px",
        help="side of a tile, in the pixels of coords (gigapath, default 256)",
    )
    sizes.add_argument("--global-pool", action="store_true", help="average the tiles (gigapath; default: cls row)")
    return result
