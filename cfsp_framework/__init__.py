"""Prunes the feed-forward width of decoder language models; every step is a plugin.

Importing this package lets plain ``AutoModelForCausalLM.from_pretrained`` open the checkpoints it writes. It imports
neither torch nor transformers: the public names, listed in ``__init__.pyi``, are loaded when they are first used.
"""

import lazy_loader
import wrapt

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)


@wrapt.when_imported("transformers.modeling_utils")
def _open_pruned_checkpoints(module: object) -> None:
    from cfsp_framework.modeling.variable_width import install

    install()
