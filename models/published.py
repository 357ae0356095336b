"""Published teachers: weights of locuslab/deq, or of a teacher.pt, loaded into a network of ours.

No pickled code is run. Tensor names are translated; sizes, finite numbers and tied weights are
checked, and the first thing that does not fit is named before any training.
"""

import io
import re
from pathlib import Path

import torch
from torch import Tensor, nn

from checkpoint import UsageError, contents_of, load, ours

PARAMETRIZED = (
    (r"^module\.", ""),  # DataParallel
    (r"weight_g$", "parametrizations.weight.original0"),
    (r"weight_v$", "parametrizations.weight.original1"),
)
# Names of locuslab/deq's MDEQ-Vision and ours, applied in this order.
MDEQ = (
    *PARAMETRIZED,
    (r"^downsample\.", "injection."),
    (r"^stage0\.(\d)", lambda m: f"injection.{6 + int(m[1])}"),
    (r"^fullstage\.branches\.(\d+)\.blocks\.0\.", r"cell.blocks.\1."),
    (r"\.gn(\d)\.", r".norm\1."),
    (r"^fullstage\.fuse_layers\.", "cell.fuse."),
    (r"\.net\.(\d+)\.conv", lambda m: f".{3 * int(m[1])}"),
    (r"\.net\.(\d+)\.gnorm", lambda m: f".{3 * int(m[1]) + 1}"),
    (r"\.net\.conv", ".0"),
    (r"\.net\.gnorm", ".1"),
    (r"^fullstage\.post_fuse_layers\.(\d+)\.conv", r"cell.post.\1.1"),
    (r"^fullstage\.post_fuse_layers\.(\d+)\.gnorm", r"cell.post.\1.2"),
    (r"^incre_modules\.(\d+)\.0\.downsample", r"increase.\1.shortcut"),
    (r"^incre_modules\.(\d+)\.0\.conv(\d)", lambda m: f"increase.{m[1]}.body.{3 * int(m[2]) - 3}"),
    (r"^incre_modules\.(\d+)\.0\.bn(\d)", lambda m: f"increase.{m[1]}.body.{3 * int(m[2]) - 2}"),
    (r"^downsamp_modules\.", "down."),
    (r"^final_layer\.", "last."),
    (r"^classifier\.", "last.5."),
)
# Names of locuslab/deq's DEQ-Sequence and ours.
TRANSFORMER = (
    *PARAMETRIZED,
    (r"^word_emb\.emb_layers\.", "injection.embedding.words."),
    (r"^word_emb\.emb_projs\.", "injection.embedding.projections."),
    (r"^inject_conv\.", "injection.linear."),
    (r"^func\.dec_attn\.(qkv|r)_net\.", r"cell.\1."),
    (r"^func\.dec_attn\.o_net\.", "cell.out."),
    (r"^func\.dec_attn\.r_([wr])_bias$", r"cell.b_\1"),
    (r"^func\.pos_ff\.ff1_net\.", "cell.wide."),
    (r"^func\.pos_ff\.ff2_net\.", "cell.narrow."),
    (r"^crit\.out_layers\.(\d+)\.weight$", r"softmax.words.\1.weight"),
    (r"^crit\.out_layers\.(\d+)\.bias$", r"softmax.biases.\1"),
    (r"^crit\.out_projs\.", "softmax.projections."),
    (r"^crit\.cluster_", "softmax.cluster."),
)


def translated(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of locuslab/deq under our names; unknown names stay, for `adopt` to report."""
    text = any(".dec_attn." in name for name in state)
    renamed = {}
    for name, value in state.items():
        if name.endswith("pos_emb.inv_freq"):  # a constant
            continue
        for pattern, name_here in TRANSFORMER if text else MDEQ:
            name = re.sub(pattern, name_here, name)
        # A transformer's convolutions have length 1: they are matrices.
        renamed[name] = value.squeeze(-1) if text and value.dim() == 3 else value
    return renamed


def weights(path: Path) -> dict[str, Tensor]:
    """The weights in a teacher's file under our names: a checkpoint of ours, or a state dict of
    locuslab/deq, which may lie within a larger checkpoint."""
    advice = "allowed are a teacher.pt of train.py and a state dict of locuslab/deq"
    raw = contents_of(path, advice)
    if ours(raw):
        return load(path, "teacher")["model"]
    try:
        state = torch.load(io.BytesIO(raw), map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a foreign file makes the reader raise
        reason = str(error).splitlines()[0]
        raise UsageError(f"{path} holds no plain tensors ({reason}); {advice}") from error
    state = state.get("state_dict", state) if isinstance(state, dict) else {}
    if not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise UsageError(f"{path} is no dict of tensors; {advice}")
    return translated(state)


def adopt(net: nn.Module, file: Path, preset: str) -> None:
    """Lays the weights of a teacher's file into net; UsageError names what does not fit."""
    state, ours = weights(file), net.state_dict()
    wrong = f"--teacher {file} is no {preset}:"
    missing, foreign = sorted(ours.keys() - state.keys()), sorted(state.keys() - ours.keys())
    for names, what in ((missing, "lacks"), (foreign, "has besides")):
        if names:
            raise UsageError(
                f"{wrong} it {what} {len(names)} tensors, first {names[0]}; allowed are "
                "checkpoints of the same --preset"
            )
    for name, value in state.items():
        if value.shape != ours[name].shape:
            raise UsageError(
                f"{wrong} {name} is {[*value.shape]} there, {[*ours[name].shape]} here"
            )
        if not value.isfinite().all():
            raise UsageError(f"--teacher {file}: {name} has numbers that are not finite")
    net.load_state_dict(state)
    for name, value in net.state_dict().items():
        if not torch.equal(value, state[name].to(value)):
            raise UsageError(
                f"{wrong} {name} is one tensor with another here, and differs from it there "
                "(was it trained with --not_tied?)"
            )
