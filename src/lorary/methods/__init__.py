"""One file per paper. Importing a file makes its words and its preset known: a new method is one line here."""

from lorary.methods import lora, rslora, loraplus, lora_fa  # noqa: F401, I001 (reading order)
from lorary.methods import qlora  # noqa: F401 (storage)
from lorary.methods import dora, glora, pissa, olora, vera, melora, multilora  # noqa: F401
from lorary.methods import adalora, delta_lora, o_lora  # noqa: F401 (rules)
from lorary.methods import longlora  # noqa: F401 (context)
from lorary.methods import lora_drop  # noqa: F401 (a function of a plan: no preset)
from lorary.methods import bitfit, full  # noqa: F401
