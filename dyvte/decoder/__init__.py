"""What the teacher and the runtime both do to a decoder layer; nobody else touches one.

`wrapping` swaps a layer's forward and gives it back; `caches` reads and hands over one layer's keys and
values; `slots`, `picking` and `masks` select tokens out of its arguments; `attention` swaps its attention
function; `layout` and `windows` say which tokens there are and how far they see.
"""

from dyvte.decoder.layout import Layout
from dyvte.decoder.picking import Picker
from dyvte.decoder.slots import Slots
from dyvte.decoder.windows import Window, layer_windows
from dyvte.decoder.wrapping import hidden_of, replace_forward, returns_early, wrap_layers

__all__ = [
    "Layout",
    "Picker",
    "Slots",
    "Window",
    "hidden_of",
    "layer_windows",
    "replace_forward",
    "returns_early",
    "wrap_layers",
]
