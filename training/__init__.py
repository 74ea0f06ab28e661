"""Learning which channels to keep, and measuring what that does: the commands and their parts."""

import logging

# diffusers imports parts it does not need here, which say at length what is not installed
_IMPORTED = (
    "torchao",
    "torch.utils._pytree",
    "diffusers.quantizers",
    "transformers.utils.import_utils",
)
for _name in _IMPORTED:
    logging.getLogger(_name).setLevel(logging.ERROR)
