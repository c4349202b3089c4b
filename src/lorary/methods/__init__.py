"""One file per paper. Importing a file registers its components and its preset: a new method is one line here.

A method outside this package registers itself through the entry point group `lorary.methods` of its own package.
"""

from importlib.metadata import entry_points  # noqa: I001 (the methods are in reading order)
from warnings import warn

from lorary._deprecated import keep_old_names
from lorary.methods import lora, rslora, lora_plus, lora_fa  # noqa: F401
from lorary.methods import qlora  # noqa: F401 (storage)
from lorary.methods import dora, glora, pissa, olora, vera, melora, multilora  # noqa: F401
from lorary.methods import hira, miss  # noqa: F401
from lorary.methods import loha, lokr  # noqa: F401 (products element by element, and of Kronecker)
from lorary.methods import alora  # noqa: F401 (from an invocation on)
from lorary.methods import adalora, delta_lora, o_lora  # noqa: F401 (rules)
from lorary.methods import loftq, lora_ga, corda, eva  # noqa: F401 (starts: at the quantisation error, at data)
from lorary.methods import longlora  # noqa: F401 (context)
from lorary.methods import token_rows  # noqa: F401 (rows of the vocabulary)
from lorary.methods import houlsby, ia3  # noqa: F401 (joins that train alone)
from lorary.methods import prefix_tuning, prompt_tuning  # noqa: F401 (context: tokens before the text)
from lorary.methods import lora_drop  # noqa: F401 (a function of a plan: no preset)
from lorary.methods import lorahub, s_lora  # noqa: F401 (functions of adapters: no preset)
from lorary.methods import bitfit, full  # noqa: F401


def _load_installed() -> None:
    """Import the methods of installed packages; a broken one is reported and does not affect the others."""
    for entry in sorted(entry_points(group="lorary.methods"), key=lambda entry: entry.name):
        try:
            entry.load()
        except (Exception, SystemExit) as error:
            package = entry.dist.name if entry.dist else "an installed package"
            warn(f"the method {entry.name} of {package} cannot be loaded: {error!r}", stacklevel=2)


keep_old_names("lorary.methods")
_load_installed()
