"""The articles' claims as experiments: ``swinscale claims NAME --scale desk|gpu|paper``.

Each claim is a module: the sentence, its published figures, the steps of the experiment, and how results are read. The rule
of each verdict stands in the module and is written beside the result. ``base`` says what a claim is, ``runner`` runs its steps,
``results`` and ``pages`` write files, pictures and Markdown.
"""

from swinscale.claims import amplitude, blocks, memory, resolution192, simmim, transfer, windows
from swinscale.claims.base import Claim

_MODULES = (windows, amplitude, blocks, transfer, resolution192, simmim, memory)
CLAIMS: dict[str, Claim] = {module.CLAIM.name: module.CLAIM for module in _MODULES}
"""By name, in the order of the articles."""
