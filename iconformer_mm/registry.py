"""Registries of iconformer_mm.

``ADAPTERS`` holds the adapter modules, ``PEFT_METHODS`` the named recipes that
say which adapter goes where and what else is trained. MMEngine gives a scope
one child of ``MODELS``; methods are no modules, so theirs stands alone.
"""

from mmengine.registry import MODELS, Registry

ADAPTERS = Registry('adapter', parent=MODELS, scope='iconformer_mm', locations=['iconformer_mm.adapters'])
PEFT_METHODS = Registry('PEFT method', scope='iconformer_mm', locations=['iconformer_mm.tuning'])
