"""Primus in released files: names, arguments, the order of the tokens, and both ways between them and ours.

Ours flattens the tokens as x, y, z. So do networks of `dynamic-network-architectures` from 0.4.3 on ("whd", what
nnDetection builds). Those before, nnssl's masked autoencoder and the released OpenMind files flatten the second image
axis first ("hwd") but number their rotary positions with the first one first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

from torch import Tensor

from pretrain3d.backbones.checkpoints.contract import Ledger, shown, three
from pretrain3d.backbones.primus import LAYER_SCALE
from pretrain3d.config import UserError, by_text

ENCODER, STEM = "eva", "down_projection"
HEADS = {396: 6, 792: 12, 864: 12, 1056: 16}  # by width: S, B, M, L and nnFoundation's deeper one
CLASSES = {"primus_s": "PrimusS", "primus_b": "PrimusB", "primus_m": "PrimusM", "primus_l": "PrimusL"}
SHAPES = {  # width, depth, heads; patches of 8^3
    "primus_s": (396, 12, 6), "primus_b": (792, 12, 12), "primus_m": (864, 16, 12), "primus_l": (1056, 24, 16),
}  # fmt: skip
_FIXED: dict[str, tuple[Any, ...]] = {  # what ours computes and no shape of a weight tells
    "use_rot_pos_emb": (True,), "rope_kwargs": (None, {}), "num_register_tokens": (0,),
}  # fmt: skip


def exchanged(tensor: Tensor, heads: int, order: Sequence[int]) -> Tensor:
    """The rows of each head's query or key, (C, ...), with its thirds, one per image axis, in another order.

    Doing so to both leaves every product of the two as it was, if the rotary positions of the axes change places too.
    """
    return tensor.unflatten(0, (heads, 3, -1))[:, list(order)].flatten(0, 2)


def turned(name: str) -> bool:
    """Whether a tensor holds queries or keys."""
    return not {"q_proj", "k_proj"}.isdisjoint(name.split("."))


def ours(
    weights: Mapping[str, Tensor],
    grid: Sequence[int],
    heads: int,
    encoder: str = ENCODER,
    stem: str = STEM,
    order: str = "hwd",
) -> dict[str, Tensor]:
    """The state dict of `Primus` from the weights of a released file.

    "hwd" becomes our order by exchanging the first two axes of the learned positions, and with them the first two
    thirds of the channels of each head's query and key. The exchange is its own inverse.

    Args:
        weights: name -> tensor; others than the encoder's and the stem's are left out.
        grid: (3,) tokens along x, y, z of the learned positions.
        heads: of the attention.
        encoder, stem: prefixes, ``key_to_encoder`` and ``key_to_stem`` of the file's plan.
        order: of the tokens, "hwd" or "whd".

    Raises:
        UserError: "hwd" and a grid that is not square in x and y: the two orders then name different places.
    """
    x, y, z = grid
    swap = order == "hwd"
    if swap and x != y:
        raise UserError(f"released Primus weights need as many tokens along x as along y; the grid is {by_text(grid)}")
    state = {}
    for name, tensor in weights.items():
        if name.startswith(f"{stem}.proj."):
            state[f"embedding.{name.removeprefix(f'{stem}.proj.')}"] = tensor
        elif name == f"{encoder}.pos_embed":
            places = tensor[0].view(x, y, z, -1)
            state["encoder.positions"] = (places.transpose(0, 1) if swap else places).permute(3, 0, 1, 2).contiguous()
        elif name.startswith(f"{encoder}."):
            rest = name.removeprefix(f"{encoder}.")
            state[f"encoder.{rest}"] = exchanged(tensor, heads, (1, 0, 2)) if swap and turned(rest) else tensor
    return state


def released_weights(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The names of a released file from our state dict, in the order "whd"."""
    out = {}
    for name, tensor in weights.items():
        if name == "encoder.positions":
            out[f"{ENCODER}.pos_embed"] = tensor.flatten(1).T[None].contiguous()
        elif name.startswith("embedding."):
            out[f"{STEM}.proj.{name.removeprefix('embedding.')}"] = tensor
        else:
            out[f"{ENCODER}.{name.removeprefix('encoder.')}"] = tensor
    return out


def take(
    ledger: Ledger, encoder: str, stem: str, kwargs: Mapping[str, Any], sizes: Sequence[Any], order: str, where: str
) -> tuple[dict[str, Any], dict[str, Tensor], list[str]]:
    """Node, state dict and notes out of a file.

    Args:
        ledger: the file's tensors.
        encoder, stem: their prefixes.
        kwargs: ``arch_kwargs``, may be empty: all but the heads is in the shapes, with which they must agree.
        sizes: image sizes that the learned positions may belong to, likeliest first; None among them is passed over.
        order: of the tokens.
        where: the file, for errors.

    Raises:
        UserError: heads that nobody tells, arguments of another network than the weights are of or ours computes, or
            learned positions that fit none of the sizes.
    """
    notes = []
    projection, places = f"{stem}.proj.weight", f"{encoder}.pos_embed"
    for name in (projection, places):
        if name not in ledger:
            raise UserError(f"{where}: a Primus without {name}; the plan's key_to_encoder and key_to_stem are wrong")
    width, in_channels, *patch = ledger.left[projection].shape
    if f"{encoder}.cls_token" in ledger:
        ledger.drop([f"{encoder}.cls_token"], "class token")
        ledger.left[places] = ledger.left[places][:, 1:]
        notes.append("the class token and its position were left out, as all loaders of these files do")
    heads = kwargs.get("eva_numheads") or kwargs.get("encoder_eva_numheads") or HEADS.get(width)
    if heads is None:
        raise UserError(f"{where}: arch_kwargs does not say how many heads a Primus of width {width} has")
    if type(heads) is not int or heads < 1 or width % (6 * heads):
        raise UserError(f"{where}: {shown(heads)} heads do not fit a Primus of width {width}, a multiple of 6 for each")
    shapes = [three(size, "image size", where) for size in (kwargs.get("input_shape"), *sizes)]
    size = _image_size(shapes, patch, ledger.left[places].shape[1], where)
    prefix = f"{encoder}.blocks."
    depth = 1 + max((int(name.removeprefix(prefix).split(".")[0]) for name in ledger.under(prefix[:-1])), default=-1)
    found = {"embed_dim": width, "eva_depth": depth, "encoder_eva_depth": depth, "patch_embed_size": patch}
    for key, value in kwargs.items():
        stated = list(value) if isinstance(value, (list, tuple)) else value
        if key in found and stated is not None and stated != found[key]:
            raise UserError(f"{where}: arch_kwargs.{key} is {shown(value)}, but by its weights it is {found[key]}")
        if key in _FIXED and value not in _FIXED[key]:
            raise UserError(f"{where}: arch_kwargs.{key} is {shown(value)}; pretrain3d's Primus has no such variant")
    names = [*ledger.under(encoder), *ledger.under(f"{stem}.proj")]
    grid = [s // p for s, p in zip(size, patch, strict=True)]
    state = ours({name: ledger.take(name) for name in names}, grid, heads, encoder, stem, order)
    arguments = {"embed_dim": width, "depth": depth, "heads": heads, "patch": list(patch),
                 "image_size": size, "in_channels": in_channels}  # fmt: skip
    return node_of(arguments), state, notes


def node_of(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """``{"name", ...}``: a named variant where it is one."""
    shape = ("embed_dim", "depth", "heads", "patch")
    free = {key: arguments[key] for key in ("image_size", "in_channels")}
    found = (arguments["embed_dim"], arguments["depth"], arguments["heads"])
    for name, known in SHAPES.items():
        if found == known and list(arguments["patch"]) == [8, 8, 8]:
            return {"name": name, **free}
    return {"name": "primus", **{key: arguments[key] for key in shape}, **free}


def kwargs_of(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """``arch_kwargs`` under the names that nnDetection's and nnU-Net's loaders of Primus read."""
    return {
        "input_channels": arguments["in_channels"],
        "embed_dim": arguments["embed_dim"],
        "patch_embed_size": arguments["patch"],
        "input_shape": arguments["image_size"],
        "encoder_eva_depth": arguments["depth"],
        "encoder_eva_numheads": arguments["heads"],
        "drop_path_rate": arguments["drop_path"],
        "init_values": LAYER_SCALE,
        "scale_attn_inner": True,
    }


def _image_size(sizes: Sequence[Any], patch: Sequence[int], tokens: int, where: str) -> list[int]:
    """The first size that the number of tokens fits, else the cube that it fits."""
    side = round(tokens ** (1 / 3))
    for size in [*sizes, [side * p for p in patch]]:
        if size and prod(s // p for s, p in zip(size, patch, strict=True)) == tokens:
            return [int(s) for s in size]
    raise UserError(f"{where}: {tokens} learned positions fit no image size that the plan names ({sizes})")
