"""Loading files whose names are those of the model: what networks without windows need."""

from __future__ import annotations

import torch
from torch import nn

from swinscale.errors import UsageError
from swinscale.weights.files import State
from swinscale.weights.load import put
from swinscale.weights.report import LoadReport, some
from swinscale.weights.resize import ChannelInit, adapt_channels


def fit_channels(state: State, name: str, channels: int, how: ChannelInit, report: LoadReport) -> None:
    """Makes the filters ``name`` of ``state`` those of so many input channels; ``how`` as in ``adapt_channels``."""
    weight = state.get(name)
    if weight is None or (weight.shape[1] == channels and isinstance(how, str)):
        return
    if how == "random":
        report.fresh[name] = f"{weight.shape[1]} channels in the file, {channels} in the model"
        del state[name]
        return
    state[name] = adapt_channels(weight, channels, how)
    report.reshaped[name] = f"input channels {weight.shape[1]} → {channels}, in_chans_init={how!r}"


def leave_classifier(state: State, classes: int, report: LoadReport) -> None:
    """Takes a classifier that is not one of so many ``classes`` out of ``state``."""
    theirs = len(state.get("head.bias", ()))
    if theirs == classes:
        return
    for name in ("head.weight", "head.bias"):
        state.pop(name, None)
        if classes:
            report.fresh[name] = f"new classifier: {theirs or 'no'} classes in the file, {classes} in the model"
    if not classes:
        report.left_out.append(f"the classifier ({theirs} classes): the model has none")


def load_exactly(model: nn.Module, state: State, report: LoadReport, what: str, keep_meta: bool) -> LoadReport:
    """Puts ``state`` into ``model``, but for what ``report`` calls fresh, and completes the report.

    Args:
        what: the model in words, for the error.
        keep_meta: what is fresh may stay on the meta device, to be initialised later.

    Raises:
        UsageError: if a tensor is missing, has another shape or no place; then nothing is changed.
    """
    own = model.state_dict()
    for name, tensor in own.items():
        if name in report.fresh:
            continue
        report.elements += tensor.numel()
        if name not in state:
            report.missing.append(name)
        elif state[name].shape != tensor.shape:
            report.mismatched[name] = f"file {tuple(state[name].shape)}, model {tuple(tensor.shape)}"
        else:
            report.matched.append(name)
            report.elements_matched += tensor.numel()
    report.unexpected = [name for name in state if name not in own]
    wrong = {
        **dict.fromkeys(report.missing, "missing"),
        **report.mismatched,
        **dict.fromkeys(report.unexpected, "no place for it"),
    }
    if wrong:
        raise UsageError(
            f"{report.source} does not fit {what}: {some([f'{name} ({why})' for name, why in wrong.items()])}. "
            f"Build the model that its config.json describes."
        )
    if left := [name for name in report.fresh if own[name].is_meta and not keep_meta]:
        raise UsageError(
            f"The model is on the meta device, and {report.source} has no {some(left)}: call init_weights() before loading."
        )
    with torch.no_grad():
        put(model, {name: state[name] for name in report.matched})
    return report
