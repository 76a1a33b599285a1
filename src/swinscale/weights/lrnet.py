"""Loading the weights of an LR-Net: our own files alone, for another number of classes or input channels where asked for."""

from __future__ import annotations

import os

from swinscale.models.lrnet import LRNet
from swinscale.weights.exact import fit_channels, leave_classifier, load_exactly
from swinscale.weights.files import State, read_state_dict
from swinscale.weights.hashes import check_hashes
from swinscale.weights.report import LoadReport
from swinscale.weights.resize import ChannelInit

FIRST = "stem.conv.weight"


def load_lrnet(
    model: LRNet,
    source: str | os.PathLike[str],
    *,
    in_chans_init: ChannelInit = "repeat",
    keep_meta: bool = False,
    verify: bool = True,
) -> LoadReport:
    """Loads a directory or weight file of this library into ``model``, in place. A classifier of other classes stays the model's own.

    Args:
        in_chans_init: what the first layer does with another number of input channels; see ``adapt_channels``.
        keep_meta: a classifier on the meta device that the file does not fill may stay there, to be initialised later.
        verify: compare the file with the SHA-256 recorded beside it.

    Raises:
        UsageError: for weights that cannot be read, or do not fit; then nothing is changed.
    """
    if verify:
        check_hashes(source)
    state: State = dict(read_state_dict(source)[0])
    report = LoadReport(str(source), "swinscale", "an LR-Net" if FIRST in state else "no LR-Net")
    fit_channels(state, FIRST, model.config.in_chans, in_chans_init, report)
    leave_classifier(state, model.num_classes, report)
    what = f"an LR-Net of depths {model.config.depths} and widths {model.config.widths}"
    return load_exactly(model, state, report, what, keep_meta)
