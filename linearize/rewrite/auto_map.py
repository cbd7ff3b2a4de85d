"""What lets transformers' Auto classes restore a converted checkpoint where nobody imported `linearize`.

A checkpoint may bring code (`auto_map` in its config), which is run for those who ask for it by
`trust_remote_code=True`. Ours imports `linearize`, which has to be installed, and hands over to the class of
transformers that the model has anyway.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

FILE = "modeling_linearize"
_CODE = '''"""What restores this checkpoint by `trust_remote_code=True`. Needs the package linearize."""

import linearize  # noqa: F401  announces to transformers how the checkpoint is read
import transformers

{classes}'''
_CLASS = """
class {name}(transformers.{name}):
    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        return transformers.{name}.from_pretrained(*args, **kwargs)
"""


def entries(model: Any) -> dict[str, str]:
    """Class of transformers by Auto class: what the Auto classes make of the model's config.

    Nothing for a model whose class is not one of transformers: it brings code of its own.
    """
    import transformers

    config = type(model.config)
    if not config.__module__.startswith("transformers."):
        return {}
    found: dict[str, str] = {}
    for auto in (name for name in dir(transformers) if name.startswith("AutoModel")):
        mapping: Any = getattr(getattr(transformers, auto), "_model_mapping", None)
        classes: Any = mapping[config] if mapping is not None and config in mapping else ()
        for cls in classes if isinstance(classes, tuple) else (classes,):
            name = getattr(cls, "__name__", "")
            if name and getattr(transformers, name, None) is cls:
                found.setdefault(auto, name)
    return found


def write(entries: dict[str, str], folder: Path) -> None:
    """Write the code that `auto_map` names."""
    classes = "\n".join(_CLASS.format(name=name) for name in dict.fromkeys(entries.values()))
    (folder / f"{FILE}.py").write_text(_CODE.format(classes=classes), encoding="utf-8")


def forget(config: Any) -> None:
    """Remove our `auto_map` from a config that was read: the next save writes it anew."""
    known = getattr(config, "auto_map", None)
    if isinstance(known, dict) and known and all(f"{FILE}." in str(name) for name in known.values()):
        del config.auto_map
